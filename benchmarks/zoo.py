"""Prune every network of tests/zoo.txt to half its channels, here and with torch-pruning; keeps a table in docs/zoo.md.

    python benchmarks/zoo.py

Resumable: what stands in docs/results/zoo.json is not run again (`--again NAME...` does). Each network and tool has a
process of its own, with a limit on time and memory. Weights are random: what is proved is the cut, not the accuracy.
torch-pruning must be installed for its columns (`pip install torch-pruning==1.6.1`).
"""

import argparse
import json
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import timm
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from hf_camphive.core.plan import ChannelCut, PrunePlan
from hf_camphive.core.runtime import environment
from hf_camphive.network.footprint import count_macs
from hf_camphive.network.graph.blocks import droppable_branches
from hf_camphive.network.graph.program import REMOVED_SUFFIX, named_tensors
from hf_camphive.network.graph.tracing import Trace, trace_network
from hf_camphive.network.modeling.modeling_camphive import CampHiVeForImageClassification
from hf_camphive.network.surgery.cutting import apply_plan, mask_state
from hf_camphive.network.surgery.verification import check_groups

ROOT = Path(__file__).parent.parent
LIST, RESULTS, PAGE = ROOT / "tests" / "zoo.txt", ROOT / "docs" / "results" / "zoo.json", ROOT / "docs" / "zoo.md"
RATIO, SMALL, TOLERANCE = 0.5, 96, 1e-9
MEMORY = 20 * 2**30


def main() -> None:
    """Run what is missing, keeping each row as it comes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=2, metavar=("TOOL", "NETWORK"), help="run one in this process, print its row")
    parser.add_argument(
        "--again", nargs="*", default=[], metavar="NETWORK", help="run these again ('failed': all such)"
    )
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=list(TOOLS))
    parser.add_argument("--timeout", type=int, default=600, help="processor seconds for one network and tool")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(TOOLS[options.one[0]](options.one[1])))
        return
    names = [line for line in LIST.read_text().split("\n") if line and not line.startswith("#")]
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for tool in options.tools:
        for name in names:
            row = rows.setdefault(name, {}).get(tool)
            if row is None or name in options.again or ("failed" in options.again and not passed(row)):
                rows[name][tool] = in_own_process(tool, name, options.timeout)
                print(f"{tool:>14} {name:<32} {verdict(rows[name][tool])}", flush=True)
                write({name: rows[name] for name in names if name in rows})
    write({name: rows[name] for name in names})


def write(rows: dict[str, dict]) -> None:
    """Keep the rows and the page made of them."""
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    PAGE.write_text(page(rows))


def in_own_process(tool: str, name: str, timeout: float) -> dict:
    """One network in a process that may crash, hang or eat memory without harm."""
    command = [sys.executable, __file__, "--one", tool, name]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=lambda: limit(timeout))
    if done.returncode == -signal.SIGXCPU:
        return {"error": f"not done after {timeout} s"}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "Error" in line] or [f"exit code {done.returncode}"]
        return {"error": lines[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def limit(seconds: int) -> None:
    """Let an allocation fail rather than the machine, and stop after so many seconds of processor time."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))


# This package


def prune_here(name: str) -> dict:
    """Trace, plan, cut; then prove the cut, train a step, save and reload."""
    net, size = network(name)
    began = time.process_time()
    trace = check_groups(net, trace_network(net, size), torch.Generator().manual_seed(0))
    plan = uniform_plan(trace)
    small = apply_plan(net, plan, trace)
    seconds = time.process_time() - began
    free = [group for group in trace.groups if not group.frozen]
    frozen = {g.name: g.frozen for g in trace.groups if g.frozen and g.frozen != "output of the network"}
    return {
        "input": size[1],
        "groups": len(free),
        "frozen": frozen,
        "statistics": len({s.tensor for g in free for s in g.slots if s.role == "statistics"}),
        "macs": count_macs(net, size),
        "macs_left": count_macs(small, size),
        "error_vs_masked": difference(trace, mask_state(named_tensors(net), plan), small),
        "trains": trains(small, size),
        "reloads": reloads(name, small.float(), size),
        "seconds": seconds,
        "environment": environment(),
    }


def uniform_plan(trace: Trace) -> PrunePlan:
    """Every group that is free keeps a random half of its channels, at least one."""
    generator = torch.Generator().manual_seed(0)
    cuts = []
    for group in trace.groups:
        if not group.frozen and group.size > 1:
            keep = torch.randperm(group.size, generator=generator)[: max(1, int(group.size * (1 - RATIO)))]
            cuts.append(ChannelCut(group.name, tuple(sorted(keep.tolist()))))
    return PrunePlan(trace.groups, droppable_branches(trace), tuple(cuts), (), "random", "none", 2, 1)


def reloads(name: str, small: nn.Module, size: tuple[int, int, int]) -> bool:
    """Whether both readers give the saved network back bit by bit."""
    image = torch.randn(2, *size, generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        CampHiVeForImageClassification.from_timm(small, name).save_pretrained(folder)
        expected = aligned(small.eval())(image)
        for reader in (
            AutoModelForImageClassification.from_pretrained(folder, use_safetensors=True).eval(),
            from_timm(folder),
        ):
            net = getattr(reader, "timm_model", reader)
            state = net.state_dict()
            same = all(torch.equal(tensor, state[key]) for key, tensor in small.state_dict().items())
            if not same or not torch.equal(aligned(net)(image), expected):
                return False
    return True


def aligned(net: nn.Module) -> nn.Module:
    """The network with its weights in fresh memory: where they lie decides which kernels run, and so the last bit."""
    for parameter in net.parameters():
        parameter.data = parameter.data.clone()
    return net


def from_timm(folder: str) -> nn.Module:
    """The network as timm itself reads it."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


# torch-pruning


def prune_with_torch_pruning(name: str) -> dict:
    """The same ratio by its own means; then the same proof."""
    import torch_pruning as tp

    net, size = network(name)
    began = time.process_time()
    small, example = torch_pruning_copy(net), torch.zeros(1, *size, dtype=torch.float64)
    pruner = tp.pruner.BasePruner(
        small,
        example,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=RATIO,
        ignored_layers=[layer for layer in small.modules() if layer is small.get_classifier()],
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
        prune_num_heads=False,
    )
    pruner.step()
    seconds = time.process_time() - began
    small.eval()
    row = {"input": size[1], "macs": count_macs(net, size), "macs_left": count_macs(small, size), "seconds": seconds}
    trace = trace_network(net, size)
    masked = masked_like(named_tensors(net), named_tensors(small), trace)
    return {**row, "error_vs_masked": difference(trace, masked, small), "trains": trains(small, size)}


def torch_pruning_copy(net: nn.Module) -> nn.Module:
    """A copy that it may change in place."""
    import copy

    return copy.deepcopy(net)


def masked_like(dense: dict[str, Tensor], small: dict[str, Tensor], trace: Trace) -> dict[str, Tensor]:
    """The dense weights with zeros in each input channel that is gone; which those are, their values tell.

    All weights are drawn at random, so that each value stands at one place only.
    """
    masked = dict(dense)
    for group in trace.groups:
        for slot in group.slots:
            source = slot.tensor.removesuffix(REMOVED_SUFFIX)
            axis = min(dense[source].dim() - 1, 1) if source != slot.tensor else slot.axis
            if slot.role not in ("consumer", "statistics") or dense[source].shape == small[source].shape:
                continue
            order = dense[source].flatten().argsort()
            found = order[torch.searchsorted(dense[source].flatten()[order], small[source].flatten())]
            kept = torch.unravel_index(found, dense[source].shape)[axis]
            gone = torch.tensor(sorted(set(range(dense[source].shape[axis])) - set(kept.tolist())), dtype=torch.long)
            masked[slot.tensor] = gone if source != slot.tensor else masked[source].index_fill(axis, gone, 0)
    return masked


TOOLS: dict[str, Callable[[str], dict]] = {"camphive": prune_here, "torch_pruning": prune_with_torch_pruning}


# Both


def network(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """The network in float64 with random weights of which none is zero or equal to another, and an input size."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    net = timm.create_model(name).eval().double()
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():
                noise = torch.rand_like(tensor)
                tensor.add_(0.05 * noise if tensor.dim() == 1 else 1e-3 * noise)
    config = net.pretrained_cfg
    size = config["input_size"][1:] if config.get("fixed_input_size") else (SMALL, SMALL)
    return net, (config["input_size"][0], *size)


def difference(trace: Trace, masked: dict[str, Tensor], small: nn.Module) -> float:
    """Largest difference between the cut and the masked network's output, relative to the largest output."""
    image = torch.randn(2, *trace.input_size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        (expected,) = trace.graph.run(masked, image)
        return float((small.eval()(image) - expected).abs().max() / expected.abs().max())


def trains(small: nn.Module, size: tuple[int, int, int]) -> bool:
    """Whether one step of SGD has finite gradients and changes the weights."""
    import copy

    net = copy.deepcopy(small).float().train()
    before = {key: parameter.detach().clone() for key, parameter in net.named_parameters()}
    image = torch.randn(4, *size, generator=torch.Generator().manual_seed(3))
    nn.functional.cross_entropy(net(image), torch.arange(4)).backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    finite = all(bool(p.grad.isfinite().all()) for p in net.parameters() if p.grad is not None)
    return finite and any(not torch.equal(before[key], p) for key, p in net.named_parameters())


# The page


def passed(row: dict) -> bool:
    """Half of the MACs gone, the function proved, a training step, and bit-equal reload (where the tool has one)."""
    return not row.get("error") and row["macs_left"] <= row["macs"] / 2 and proved(row) and row.get("reloads", True)


def proved(row: dict) -> bool:
    """Whether the cut network is the masked one's function, and trains."""
    return row["error_vs_masked"] <= TOLERANCE and row["trains"]


def verdict(row: dict) -> str:
    """One row in words."""
    if row.get("error"):
        return f"failed: {row['error']}"
    text = (
        f"{1 - row['macs_left'] / row['macs']:.0%} of MACs cut, {row['error_vs_masked']:.0e}, {row['seconds']:.1f} s"
    )
    text += "" if row["trains"] else ", does not train"
    text += "" if row.get("reloads", True) else ", does not reload"
    return text + (f", {len(row['frozen'])} frozen: {next(iter(row['frozen'].values()))}" if row.get("frozen") else "")


def page(rows: dict[str, dict]) -> str:
    """docs/zoo.md."""
    here = {name: row["camphive"] for name, row in rows.items() if "camphive" in row}
    there = {name: row["torch_pruning"] for name, row in rows.items() if "torch_pruning" in row}
    lines = [
        "# The zoo",
        "",
        "Networks of timm with random weights, cut to half of the channels of every group. `make zoo` repeats this for the",
        "list in `tests/zoo.txt`.",
        "",
        *totals({"hf_camphive": here} | ({"torch-pruning 1.6.1": there} if there else {})),
        "",
        "Columns of the table below:",
        "",
        "- *error*: largest difference between the outputs of the cut and of the masked network, in float64, relative to the",
        "  largest output.",
        "- *norms*: 'kept only' where a norm (or a standardised weight) takes its statistics over an axis that is cut. The",
        "  masked network then takes them over the kept channels too.",
        "- *s*: processor time of one thread for trace, self-test, plan and cut.",
        "- *failed*: raised an exception, or was stopped at the limit on processor time. `docs/results/zoo.json` says which.",
        "",
        "| network | input | groups | MACs cut | error | norms | trains | reloads | s | torch-pruning: MACs cut | error | s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [table_row(name, here[name], there.get(name)) for name in here]
    notes = [(name, note) for name, row in here.items() if (note := remark(row))]
    lines += ["", "## What could not be cut, and why", ""] if notes else []
    lines += [f"- **{name}**: {note}" for name, note in notes]
    return "\n".join(lines) + "\n"


def totals(tools: dict[str, dict[str, dict]]) -> list[str]:
    """What became of all networks, as a table with one column for each tool."""
    columns = []
    for rows in tools.values():
        done = [row for row in rows.values() if not row.get("error")]
        right = [row for row in done if proved(row)]
        half = [row for row in right if passed(row)]
        took = f"{median(row['seconds'] for row in done):.1f} s" if done else ""
        columns.append([str(len(rows)), str(len(done)), str(len(right)), str(len(half)), took])
    names = (
        "networks",
        "cut without an exception",
        "of these, compute the masked network's function, and train",
        "of these, lose at least half of their MACs (hf_camphive: and read back bit for bit)",
        "median time",
    )
    lines = [["", *tools], ["---"] * (len(tools) + 1), *([name, *cells] for name, *cells in zip(names, *columns))]
    return [f"| {' | '.join(line)} |" for line in lines]


def table_row(name: str, here: dict, there: dict | None) -> str:
    """One line of the table."""
    theirs = ["", "", ""]
    if there is not None:
        theirs = ["failed", "", ""] if there.get("error") else short(there)
    if here.get("error"):
        return "| " + " | ".join([name, "", "", "failed", "", "", "", "", "", *theirs]) + " |"
    share, error, seconds = short(here)
    groups = f"{here['groups']}" + (f" + {len(here['frozen'])} frozen" if here["frozen"] else "")
    norms = "kept only" if here["statistics"] else ""
    flags = ["yes" if here[key] else "**no**" for key in ("trains", "reloads")]
    return "| " + " | ".join([name, str(here["input"]), groups, share, error, norms, *flags, seconds, *theirs]) + " |"


def short(row: dict) -> list[str]:
    """MACs cut, error and seconds as text."""
    right = row["error_vs_masked"] <= TOLERANCE
    error = f"{row['error_vs_masked']:.0e}"
    return [f"{1 - row['macs_left'] / row['macs']:.0%}", error if right else f"**{error}**", f"{row['seconds']:.1f}"]


def remark(row: dict) -> str:
    """Why a network is not cut as the others are."""
    if row.get("error"):
        return row["error"]
    groups: dict[str, list[str]] = {}
    for group, reason in row["frozen"].items():
        kind = re.sub(r" in \S+", "", reason.partition(" does not run with these widths")[0])
        groups.setdefault(kind, []).append(group)
    return "; ".join(
        f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {row['frozen'][names[0]]}"
        for names in groups.values()
    )


if __name__ == "__main__":
    if "--one" not in sys.argv and find_spec("torch_pruning") is None:
        sys.exit("torch-pruning is not installed: pip install torch-pruning==1.6.1, or give --tools camphive")
    main()
