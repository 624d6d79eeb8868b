"""Entry points of the command line: `camphive COMMAND [options]`, and `scripts/prune.py` for `accelerate launch`.

Dispatches to the commands and turns their errors into exit codes: 0, or 2 on an error that the user can correct.
"""

import sys
from collections.abc import Callable, Sequence

from hf_camphive.cli.commands.compare import compare
from hf_camphive.cli.commands.evaluate import evaluate
from hf_camphive.cli.commands.expand import expand
from hf_camphive.cli.commands.inspect import inspect
from hf_camphive.cli.commands.prune import prune
from hf_camphive.core.errors import CampHiVeError
from hf_camphive.core.runtime import keep_freed_memory

USAGE = """usage: camphive {prune,inspect,evaluate,expand,compare} [options]

Make image classifiers from the Hugging Face Hub smaller for real.

  prune      score, merge, cut, finetune and save; without options, the demo
  inspect    show a network's channel groups, what they cost, and what cannot be cut and why
  evaluate   top-1, top-5, MACs and latency of any model on a dataset
  expand     widen channel groups without changing the function, to train and prune again
  compare    criteria, merge rules and ratios side by side over several seeds: table and plot

camphive COMMAND --help lists the options of a command.
"""
Command = Callable[[Sequence[str]], None]
COMMANDS: dict[str, Command] = {command.__name__: command for command in (prune, inspect, evaluate, expand, compare)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `camphive` with these arguments (by default the process's) and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if arguments[0] not in COMMANDS:
        print(USAGE, file=sys.stderr)
        print(f"error: there is no command {arguments[0]!r}", file=sys.stderr)
        return 2
    return _exit_code(COMMANDS[arguments[0]], arguments[1:])


def prune_main() -> int:
    """Run `scripts/prune.py` with the process's arguments and return its exit code."""
    return _exit_code(prune, sys.argv[1:])


def _exit_code(command: Command, arguments: Sequence[str]) -> int:
    keep_freed_memory()
    try:
        command(arguments)
    except CampHiVeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
