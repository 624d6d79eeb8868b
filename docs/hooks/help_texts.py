"""Put what `camphive COMMAND --help` prints in place of a line `<!-- help: COMMAND -->`."""

import io
import os
import re
from contextlib import redirect_stdout, suppress

_MARK = re.compile(r"^<!-- help: (\w+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: object) -> str:
    return _MARK.sub(lambda found: f"```text\n{help_of(found[1])}```", markdown)


def help_of(command: str) -> str:
    from hf_camphive.cli.main import main

    os.environ["COLUMNS"] = "82"  # where argparse wraps lines
    printed = io.StringIO()
    with redirect_stdout(printed), suppress(SystemExit):
        main([command, "--help"])
    return printed.getvalue().strip() + "\n"
