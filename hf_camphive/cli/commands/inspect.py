"""`camphive inspect`: a network's channel groups, what they cost, and what cannot be cut and why."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hf_camphive.cli.arguments import parse
from hf_camphive.cli.inputs import ModelArguments, load_model
from hf_camphive.cli.output import format_table

BAR = 16  # characters of the widest group


def inspect(arguments: Sequence[str]) -> None:
    """Print a network's channel groups with their share of MACs and parameters, and what is frozen and why.

    Raises:
        ModelError: The network cannot be found, read or traced.
    """
    (model,) = parse(inspect, arguments, ModelArguments)

    import torch

    from hf_camphive.core.measures import format_count
    from hf_camphive.network.graph.blocks import droppable_branches
    from hf_camphive.network.graph.program import named_tensors
    from hf_camphive.network.graph.tracing import trace_network
    from hf_camphive.network.surgery.verification import check_groups

    base = load_model(model)
    trace = trace_network(base.net, tuple(base.net.pretrained_cfg["input_size"]))
    trace = check_groups(base.net, trace, torch.Generator().manual_seed(0))
    sizes = {name: tensor.numel() for name, tensor in named_tensors(base.net).items()}
    macs = {name: count * sizes[name] for name, count in trace.positions.items()}
    parameters = {name: p.numel() for name, p in base.net.named_parameters()}
    print(f"{base.architecture}: {len(trace.groups)} groups, input {'x'.join(map(str, trace.input_size))}")
    print(f"{format_count(sum(macs.values()))} MACs per image, {format_count(sum(parameters.values()))} parameters\n")
    print(format_table([("group", "channels", "MACs", "parameters", "width"), *_rows(trace, macs, parameters)]))
    branches = droppable_branches(trace)
    print("\nShares are of the layers that a group touches; a layer between two groups counts for both.")
    print(f"Residual branches that can be dropped whole: {', '.join(b.module for b in branches) or 'none'}")


def _rows(trace: Any, macs: Mapping[str, int], parameters: Mapping[str, int]) -> Iterator[tuple[str, ...]]:
    """Yield one row per group: name, channels, its shares of the MACs and parameters, and a bar of its width."""
    from hf_camphive.network.graph.blocks import exterior_groups

    exterior = exterior_groups(trace)
    widest = max(group.size for group in trace.groups)
    for group in trace.groups:
        touched = {slot.tensor for slot in group.slots}
        remark = f"frozen: {group.frozen}" if group.frozen else "between blocks" if group.name in exterior else ""
        bar = ("░" if group.frozen else "█") * max(1, round(BAR * group.size / widest))
        shares = (
            f"{sum(costs.get(name, 0) for name in touched) / sum(costs.values()):.1%}" for costs in (macs, parameters)
        )
        yield group.name, str(group.size), *shares, f"{bar:<{BAR}}  {remark}"
