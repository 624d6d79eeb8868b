"""Collect the structure of a network, computed once: operations, channel groups, residual branches, weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from hf_camphive.core.plan import Branch, ChannelGroup
from hf_camphive.network.graph.blocks import droppable_branches, exterior_groups
from hf_camphive.network.graph.program import named_tensors
from hf_camphive.network.graph.tracing import Trace, trace_network
from hf_camphive.network.surgery.verification import check_groups


@dataclass(frozen=True, eq=False)
class NetworkAnalysis:
    """The structure and weights of a network, as scoring, planning and merging read them.

    `state` holds all parameters and buffers by name (`named_tensors`); `parameters` are the names of the parameters among
    them. Whatever follows from the trace is computed on first use.
    """

    trace: Trace
    state: Mapping[str, Tensor]
    parameters: frozenset[str]

    @classmethod
    def of(cls, net: nn.Module, input_size: tuple[int, int, int], seed: int = 0) -> "NetworkAnalysis":
        """Trace a network for images of `input_size` (C, H, W), and test its channel groups by experiment.

        Groups that fail the experiment are frozen, with the reason. `seed` seeds the random weights and images of the
        experiment.

        Raises:
            ModelError: The network cannot be traced.
        """
        trace = check_groups(net, trace_network(net, input_size), torch.Generator().manual_seed(seed))
        names = frozenset(name for name, _ in net.named_parameters())
        return cls(trace, named_tensors(net), names)

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """Channel groups in forward order, frozen ones included."""
        return self.trace.groups

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter and buffer."""
        return {name: tuple(tensor.shape) for name, tensor in self.state.items()}

    @cached_property
    def branches(self) -> tuple[Branch, ...]:
        """Residual branches that can be dropped as a whole."""
        return droppable_branches(self.trace)

    @cached_property
    def exterior(self) -> frozenset[str]:
        """Names of the groups between blocks (residual streams, stem, features)."""
        return exterior_groups(self.trace)
