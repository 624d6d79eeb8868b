"""Plans for toy networks."""

import torch
from torch import nn

from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.plan import ChannelCut, PrunePlan
from hf_camphive.network.analysis import NetworkAnalysis
from hf_camphive.network.graph.blocks import droppable_branches, exterior_groups
from hf_camphive.network.graph.program import named_tensors
from hf_camphive.network.graph.tracing import Trace
from hf_camphive.pruning.planning.costs import CostModel
from hf_camphive.pruning.planning.greedy import make_plan


def plan_with(trace: Trace, keep: dict[str, tuple[int, ...]], dropped: tuple[str, ...] = ()) -> PrunePlan:
    cuts = tuple(ChannelCut(name, kept) for name, kept in keep.items())
    return PrunePlan(trace.groups, droppable_branches(trace), cuts, dropped, "random", "none", 2, 1)


def random_plan(net, trace: Trace, seed: int, share: float, scope: str = "all") -> PrunePlan:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: tuple(t.shape) for name, t in named_tensors(net).items()}
    network = CostModel(trace.groups, droppable_branches(trace), exterior_groups(trace), trace.positions, shapes)
    # Every fifth group is worth next to nothing, so that some residual branches are emptied.
    scores = {
        g.name: torch.rand(g.size, generator=generator) * (1e-3 if i % 5 == 1 else 1)
        for i, g in enumerate(trace.groups)
    }
    return make_plan(network, scores, int(network.macs * share), CampHiVeConfig(scope=scope))


def analysis_of(net: nn.Module, trace: Trace) -> NetworkAnalysis:
    """The analysis of a network that was traced already, its groups not tested by experiment."""
    return NetworkAnalysis(trace, named_tensors(net), frozenset(name for name, _ in net.named_parameters()))
