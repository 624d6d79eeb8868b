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

    from hf_camphive.core.measures import format_count
    from hf_camphive.network.analysis import NetworkAnalysis
    from hf_camphive.network.timm_interface import input_size

    base = load_model(model)
    analysis = NetworkAnalysis.of(base.net, input_size(base.net))
    trace = analysis.trace
    macs = {name: count * analysis.state[name].numel() for name, count in trace.positions.items()}
    parameters = {name: analysis.state[name].numel() for name in analysis.parameters}
    print(f"{base.architecture}: {len(analysis.groups)} groups, input {'x'.join(map(str, trace.input_size))}")
    print(f"{format_count(sum(macs.values()))} MACs per image, {format_count(sum(parameters.values()))} parameters\n")
    print(format_table([("group", "channels", "MACs", "parameters", "width"), *_rows(analysis, macs, parameters)]))
    print("\nShares are of the layers that a group touches; a layer between two groups counts for both.")
    print(f"Residual branches that can be dropped whole: {', '.join(b.module for b in analysis.branches) or 'none'}")


def _rows(analysis: Any, macs: Mapping[str, int], parameters: Mapping[str, int]) -> Iterator[tuple[str, ...]]:
    """Yield one row per group: name, channels, its shares of the MACs and parameters, and a bar of its width."""
    widest = max(group.size for group in analysis.groups)
    for group in analysis.groups:
        touched = {slot.tensor for slot in group.slots}
        remark = (
            f"frozen: {group.frozen}" if group.frozen else "between blocks" if group.name in analysis.exterior else ""
        )
        bar = ("░" if group.frozen else "█") * max(1, round(BAR * group.size / widest))
        shares = (
            f"{sum(costs.get(name, 0) for name in touched) / sum(costs.values()):.1%}" for costs in (macs, parameters)
        )
        yield group.name, str(group.size), *shares, f"{bar:<{BAR}}  {remark}"
