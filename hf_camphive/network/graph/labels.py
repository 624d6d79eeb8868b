"""Label each element of each value with the channel that it belongs to, and record which channels are coupled.

Before any coupling a channel is an *atom*, numbered from 0; elements that belong to no channel have the label `NO_CHANNEL`.
Coupled atoms are joined into one channel. A label tensor has the shape of its value for a batch of one image, and is
expanded (stride 0) along the axes on which it does not vary.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from hf_camphive.core.plan import Role
from hf_camphive.network.graph.program import TracedProgram, module_of

NO_CHANNEL = -1
Place = tuple[str, int, Role, int]  # tensor, axis, role, position


class UnsupportedOperation(Exception):
    """An operation that cannot be followed; the message completes "<operation> in <module> ..."."""


@dataclass(frozen=True)
class Literal:
    """A number of channels that occurs in the operations of `module`.

    `kind` is "written" if the number is an argument of an operation, "input" if it is the size of a value that comes from
    outside the module, else "size". `lines` [n, number] are the labels that the number counts, one row for each position
    on the other axes. A row is either removed as a whole, or keeps as many labels as every other row that is not.
    """

    module: str
    number: int
    lines: Tensor
    kind: str = "written"


class Labels:
    """The labels of all values of a graph computed so far, and the couplings between atoms found on the way.

    `values` maps nodes to their labels: a tensor, a list of tensors for several results, or a plain number for a size.
    """

    def __init__(self, graph: TracedProgram) -> None:
        self.graph = graph
        self.parent: list[int] = []  # union-find over atoms
        self.reasons: dict[int, str] = {}  # atom -> why it is frozen
        self.places: dict[int, list[Place]] = defaultdict(list)
        self.owners: dict[tuple[str, int, int], int] = {}  # tensor, axis, position -> first atom placed there
        self.values: dict[fx.Node, Any] = {graph.image: torch.tensor(NO_CHANNEL).expand(shape_of(graph.image))}
        self.known: dict[fx.Node, Tensor] = dict(graph.constants)  # values that depend on neither image nor weights
        self.positions: dict[str, int] = defaultdict(int)
        self.grids: list[Tensor] = []
        self.literals: list[Literal] = []

    # Atoms

    def new_atoms(self, count: int) -> Tensor:
        """Return the numbers of `count` new atoms."""
        first = len(self.parent)
        self.parent.extend(range(first, first + count))
        return torch.arange(first, first + count)

    def root(self, atom: int) -> int:
        """Return the atom that represents the channel of this atom."""
        while self.parent[atom] != atom:
            self.parent[atom] = atom = self.parent[self.parent[atom]]
        return atom

    def roots(self, labels: Tensor) -> Tensor:
        """Return the labels with every atom replaced by the `root` of its channel."""
        atoms, places = torch.unique(labels, return_inverse=True)
        return torch.tensor([a if a == NO_CHANNEL else self.root(a) for a in atoms.tolist()])[places]

    def join(self, a: int, b: int) -> None:
        """Join the channels of two atoms into one."""
        a, b = sorted((self.root(a), self.root(b)))
        self.parent[b] = a

    def couple(self, a: Tensor, b: Tensor) -> Tensor:
        """Join the atoms of two label tensors element by element (broadcast); return the joint labels."""
        a, b = torch.broadcast_tensors(a, b)
        shape, (a, b) = a.shape, (thin(a, b), thin(b, a))
        pairs = (a + 1) * (len(self.parent) + 1) + (b + 1)  # one number for each pair: `unique` is much faster
        for pair in torch.unique(pairs).tolist():
            x, y = (label - 1 for label in divmod(pair, len(self.parent) + 1))
            if x != NO_CHANNEL and y != NO_CHANNEL:
                self.join(x, y)
        return torch.where(a == NO_CHANNEL, b, a).expand(shape)

    def join_along(self, labels: Tensor, axis: int) -> Tensor:
        """Join all atoms that lie in one line along an axis; return the labels with that axis reduced to size 1."""
        first = labels.narrow(axis, 0, 1)
        for part in labels.split(1, dim=axis)[1:] if varies(labels, axis) else ():
            first = self.couple(first, part)
        return first

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Mark the channels of all labels as not removable; the first reason given for an atom is kept."""
        for atom in torch.unique(thin(labels)).tolist():
            if atom != NO_CHANNEL:
                self.reasons.setdefault(atom, reason)

    def place(self, atoms: Tensor, tensor: str, axis: int, role: Role) -> None:
        """Record that position i of a tensor's axis belongs to atoms[i]; a tensor that is used twice couples both uses."""
        for position, atom in enumerate(atoms.tolist()):
            if atom != NO_CHANNEL:
                self.places[atom].append((tensor, axis, role, position))
                self.join(self.owners.setdefault((tensor, axis, position), atom), atom)

    # Values

    def of(self, value: object) -> Tensor:
        """Return the labels of an operand; a parameter that is used directly gets new atoms along its last axis above 1."""
        if not isinstance(value, fx.Node):
            return torch.tensor(NO_CHANNEL)
        if value in self.known:
            return torch.tensor(NO_CHANNEL).expand(shape_of(value))
        if value not in self.values and value in self.graph.tensors:
            self.values[value] = self._parameter(value)
        return self.values[value]

    def _parameter(self, node: fx.Node) -> Tensor:
        """Return new labels for a parameter that an operation uses directly."""
        name, shape = self.graph.tensors[node], tuple(node.meta["val"].shape)
        axes = [axis for axis, size in enumerate(shape) if size > 1]
        if not axes:
            return torch.tensor(NO_CHANNEL).expand(shape)
        atoms = self.new_atoms(shape[axes[-1]])
        self.place(atoms, name, axes[-1], "affine")
        return spread(atoms, shape, axes[-1])

    def channels(self, value: fx.Node, axis: int) -> Tensor:
        """Return one atom for each position along an axis, after joining all atoms at the same position.

        Raises:
            UnsupportedOperation: Labels vary along other axes, but not along this one.
        """
        labels = self.of(value)
        axis = axis % labels.dim()
        rows = thin(labels, keep=axis).movedim(axis, 0).reshape(labels.shape[axis], -1)
        if not ((rows == rows.amax(dim=1, keepdim=True)) | (rows == NO_CHANNEL)).all():
            if not varies(compact(labels), axis):
                raise UnsupportedOperation("reads an axis whose positions mix channels")
            rows = self.join_along(rows, 1)
        return rows.amax(dim=1)

    def name_of(self, tensor: object) -> str:
        """Return the name of a parameter or buffer.

        Raises:
            UnsupportedOperation: The argument is computed by the network instead.
        """
        if not isinstance(tensor, fx.Node) or tensor not in self.graph.tensors:
            raise UnsupportedOperation("computes its weight")
        return self.graph.tensors[tensor]

    # Constraints on whole values

    def count(self, node: fx.Node, number: object, labels: Tensor, axis: int) -> None:
        """Record that a number among the node's arguments counts the channels along an axis."""
        if isinstance(number, int) and number > 1 and varies(labels, axis):
            lines = thin(labels, keep=axis).movedim(axis, -1).reshape(-1, labels.shape[axis])
            self.literals.append(Literal(module_of(node), number, lines))

    def count_sizes(self, node: fx.Node) -> None:
        """Record the number of channels along each axis of an operation's inputs and result."""
        module = module_of(node)
        for value in (node, *node.all_input_nodes):
            labels = self.values.get(value)
            kind = "size" if module_of(value).startswith(module) or value in self.graph.tensors else "input"
            for axis in range(labels.dim()) if isinstance(labels, Tensor) else ():
                if varies(labels, axis):
                    lines = thin(labels, keep=axis).movedim(axis, -1).reshape(-1, labels.shape[axis])
                    self.literals.append(Literal(module, labels.shape[axis], lines, kind))

    def keep_rectangular(self, labels: Tensor) -> None:
        """Record a value whose labels vary along several axes: after any removal it must be rectangular again."""
        if sum(varies(labels, axis) for axis in range(labels.dim())) > 1:
            self.grids.append(thin(labels).squeeze())

    def settle(self) -> None:
        """Join channels until every recorded value stays rectangular after any removal: along all axes but the longest."""
        settled = False
        while not settled:
            settled = True
            for grid in self.grids:
                roots = compact(self.roots(grid))
                axes = [axis for axis in range(roots.dim()) if varies(roots, axis)]
                if len(axes) < 2:
                    continue
                settled = False
                if (roots == NO_CHANNEL).any():
                    self.freeze(grid, "joined with values that belong to no channel")
                longest = max(axes, key=lambda axis: (roots.shape[axis], axis))
                for axis in axes:
                    if axis != longest:
                        roots = self.join_along(roots, axis)
            self.grids = [grid for grid in self.grids if not (grid == NO_CHANNEL).any()] if not settled else self.grids


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of a node's value for a batch of one image (the batch is the only symbolic size)."""
    return sizes(node.meta["val"])


def sizes(value: Tensor) -> tuple[int, ...]:
    """Return the shape of a traced value for a batch of one image."""
    return tuple(size if isinstance(size, int) else _at_one(size) for size in value.shape)


def _at_one(size: torch.SymInt) -> int:
    """Return the value of a symbolic size for a batch of one image."""
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, 1)))


def varies(labels: Tensor, axis: int) -> bool:
    """Return whether labels may differ along an axis."""
    return labels.shape[axis] > 1 and labels.stride(axis) != 0


def thin(labels: Tensor, other: Tensor | None = None, keep: int | None = None) -> Tensor:
    """Reduce axes along which labels only repeat (stride 0 in `labels`, and in `other` if given) to size 1, but not `keep`.

    Most labels are the same at all positions of an image, so this saves most of the work.
    """
    for axis in range(labels.dim()):
        repeated = labels.stride(axis) == 0 and (other is None or other.stride(axis) == 0)
        if repeated and axis != keep and labels.shape[axis] > 1:
            labels = labels.narrow(axis, 0, 1)
    return labels


def compact(labels: Tensor) -> Tensor:
    """Return the same labels, expanded (stride 0) along every axis on which they do not vary."""
    shape = labels.shape
    for axis in range(labels.dim()):
        if varies(labels, axis) and (labels == labels.narrow(axis, 0, 1)).all():
            labels = labels.narrow(axis, 0, 1)
    return labels.expand(shape)


def spread(atoms: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
    """Return the labels of a value of this shape from the atoms along one axis."""
    view = [1] * len(shape)
    view[axis] = -1
    return atoms.view(view).expand(shape)
