"""Labels: for each element of each value the channel that it belongs to, and which channels were found to be one.

A channel before any coupling is an *atom*, a number; elements that belong to none carry `NO_CHANNEL`. A label tensor has
the shape of the value for a batch of one image, and is expanded (stride 0) along the axes on which it does not vary.
"""

from collections import defaultdict
from dataclasses import dataclass

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
    """A number of channels that `module` works with.

    `kind`: "written" where the number itself stands in its code, "input" where so many come in from outside, else "size".
    `lines` [n, number] are labels; in each line that is not removed as a whole the same number of them stays.
    """

    module: str
    number: int
    lines: Tensor
    kind: str = "written"


class Labels:
    """What is known so far of one graph's channels; `values` holds labels or, for sizes, plain numbers."""

    def __init__(self, graph: TracedProgram) -> None:
        self.graph = graph
        self.parent: list[int] = []  # union-find over atoms
        self.reasons: dict[int, str] = {}  # atom -> why it is frozen
        self.places: dict[int, list[Place]] = defaultdict(list)
        self.owners: dict[tuple[str, int, int], int] = {}  # tensor, axis, position -> first atom placed there
        self.values: dict[fx.Node, object] = {graph.image: torch.tensor(NO_CHANNEL).expand(shape_of(graph.image))}
        self.known: dict[fx.Node, Tensor] = dict(graph.constants)  # values that depend neither on image nor on weights
        self.positions: dict[str, int] = defaultdict(int)
        self.grids: list[Tensor] = []
        self.literals: list[Literal] = []

    # Atoms

    def new_atoms(self, count: int) -> Tensor:
        first = len(self.parent)
        self.parent.extend(range(first, first + count))
        return torch.arange(first, first + count)

    def root(self, atom: int) -> int:
        while self.parent[atom] != atom:
            self.parent[atom] = atom = self.parent[self.parent[atom]]
        return atom

    def roots(self, labels: Tensor) -> Tensor:
        """The labels with every atom replaced by the channel that it has become part of."""
        atoms, places = torch.unique(labels, return_inverse=True)
        return torch.tensor([a if a == NO_CHANNEL else self.root(a) for a in atoms.tolist()])[places]

    def join(self, a: int, b: int) -> None:
        a, b = sorted((self.root(a), self.root(b)))
        self.parent[b] = a

    def couple(self, a: Tensor, b: Tensor) -> Tensor:
        """Join the atoms of two label tensors element by element (broadcast); returns the joint labels."""
        a, b = torch.broadcast_tensors(a, b)
        shape, (a, b) = a.shape, (thin(a, b), thin(b, a))
        pairs = (a + 1) * (len(self.parent) + 1) + (b + 1)  # one number a pair: much faster to make unique
        for pair in torch.unique(pairs).tolist():
            x, y = (label - 1 for label in divmod(pair, len(self.parent) + 1))
            if x != NO_CHANNEL and y != NO_CHANNEL:
                self.join(x, y)
        return torch.where(a == NO_CHANNEL, b, a).expand(shape)

    def join_along(self, labels: Tensor, axis: int) -> Tensor:
        """Join all atoms that lie in one line along an axis; returns the labels with that axis reduced to size 1."""
        first = labels.narrow(axis, 0, 1)
        for part in labels.split(1, dim=axis)[1:] if varies(labels, axis) else ():
            first = self.couple(first, part)
        return first

    def freeze(self, labels: Tensor, reason: str) -> None:
        for atom in torch.unique(thin(labels)).tolist():
            if atom != NO_CHANNEL:
                self.reasons.setdefault(atom, reason)

    def place(self, atoms: Tensor, tensor: str, axis: int, role: Role) -> None:
        """Note that position i of a tensor's axis belongs to atoms[i]; a tensor used twice couples both uses."""
        for position, atom in enumerate(atoms.tolist()):
            if atom != NO_CHANNEL:
                self.places[atom].append((tensor, axis, role, position))
                self.join(self.owners.setdefault((tensor, axis, position), atom), atom)

    # Values

    def of(self, value: object) -> Tensor:
        """Labels of an operand; a parameter used directly gets atoms of its own along its last long axis."""
        if not isinstance(value, fx.Node):
            return torch.tensor(NO_CHANNEL)
        if value in self.known:
            return torch.tensor(NO_CHANNEL).expand(shape_of(value))
        if value not in self.values and value in self.graph.tensors:
            self.values[value] = self._parameter(value)
        return self.values[value]

    def _parameter(self, node: fx.Node) -> Tensor:
        name, shape = self.graph.tensors[node], tuple(node.meta["val"].shape)
        axes = [axis for axis, size in enumerate(shape) if size > 1]
        if not axes:
            return torch.tensor(NO_CHANNEL).expand(shape)
        atoms = self.new_atoms(shape[axes[-1]])
        self.place(atoms, name, axes[-1], "affine")
        return spread(atoms, shape, axes[-1])

    def channels(self, value: fx.Node, axis: int) -> Tensor:
        """The one atom of each position along an axis; those that share a position go together.

        Raises where channels lie along other axes only.
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
        """Name of a parameter or buffer. Raises where it is computed instead."""
        if not isinstance(tensor, fx.Node) or tensor not in self.graph.tensors:
            raise UnsupportedOperation("computes its weight")
        return self.graph.tensors[tensor]

    # What must hold of the whole

    def count(self, node: fx.Node, number: object, labels: Tensor, axis: int) -> None:
        """Note that a number in the code of the node's module counts the channels along an axis."""
        if isinstance(number, int) and number > 1 and varies(labels, axis):
            lines = thin(labels, keep=axis).movedim(axis, -1).reshape(-1, labels.shape[axis])
            self.literals.append(Literal(module_of(node), number, lines))

    def count_sizes(self, node: fx.Node) -> None:
        """Note how many channels go into an operation and come out of it."""
        module = module_of(node)
        for value in (node, *node.all_input_nodes):
            labels = self.values.get(value)
            kind = "size" if module_of(value).startswith(module) or value in self.graph.tensors else "input"
            for axis in range(labels.dim()) if isinstance(labels, Tensor) else ():
                if varies(labels, axis):
                    lines = thin(labels, keep=axis).movedim(axis, -1).reshape(-1, labels.shape[axis])
                    self.literals.append(Literal(module, labels.shape[axis], lines, kind))

    def keep_rectangular(self, labels: Tensor) -> None:
        """Note a value on several of whose axes channels vary: what stays of it must be a rectangle again."""
        if sum(varies(labels, axis) for axis in range(labels.dim())) > 1:
            self.grids.append(thin(labels).squeeze())

    def settle(self) -> None:
        """Tie channels until whatever is removed, every value stays rectangular: all axes but the longest are tied."""
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
    """Shape of a node's value for a batch of one image (the batch is the only symbolic size)."""
    return sizes(node.meta["val"])


def sizes(value: Tensor) -> tuple[int, ...]:
    """Shape of a traced value for a batch of one image."""
    return tuple(size if isinstance(size, int) else _at_one(size) for size in value.shape)


def _at_one(size: torch.SymInt) -> int:
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, 1)))


def varies(labels: Tensor, axis: int) -> bool:
    """Whether labels may differ along an axis."""
    return labels.shape[axis] > 1 and labels.stride(axis) != 0


def thin(labels: Tensor, other: Tensor | None = None, keep: int | None = None) -> Tensor:
    """Drop repetition along expanded axes (stride 0 in both tensors): labels are mostly the same all over an image."""
    for axis in range(labels.dim()):
        repeated = labels.stride(axis) == 0 and (other is None or other.stride(axis) == 0)
        if repeated and axis != keep and labels.shape[axis] > 1:
            labels = labels.narrow(axis, 0, 1)
    return labels


def compact(labels: Tensor) -> Tensor:
    """The same labels, expanded along every axis on which they do not vary."""
    shape = labels.shape
    for axis in range(labels.dim()):
        if varies(labels, axis) and (labels == labels.narrow(axis, 0, 1)).all():
            labels = labels.narrow(axis, 0, 1)
    return labels.expand(shape)


def spread(atoms: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
    """Labels of a whole value from the atoms along one axis."""
    view = [1] * len(shape)
    view[axis] = -1
    return atoms.view(view).expand(shape)
