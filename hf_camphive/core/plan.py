"""The pruning plan as a value: which channels of which group are removed, decided before any weight changes.

Pure data without heavy imports. Plans compare by value, and a plan equals the one read back from its JSON.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

from hf_camphive.core.errors import PlanError
from hf_camphive.core.measures import format_cost
from hf_camphive.core.records import RecordFormat

PLAN_FILE = "prune_plan.json"
FORMAT = RecordFormat(PLAN_FILE, PlanError)
Role = Literal["producer", "affine", "consumer", "statistics"]


@dataclass(frozen=True)
class Slot:
    """One axis of one tensor that carries a group's channels.

    `index` lists positions along the axis, channel by channel: channel c of a group of C channels is at
    `index[c * r : (c + 1) * r]` with r = len(index) / C (r > 1 after a flatten, or in tied convolution groups).

    With role "statistics" no tensor has the name: "<weight>#gone" stands for the channels that a norm leaves out of its
    statistics.
    """

    tensor: str
    axis: int
    role: Role
    index: tuple[int, ...]

    def positions(self, channels: Iterable[int], size: int) -> list[int]:
        """Return the ascending positions of `channels` of a group of `size` channels."""
        repeat = len(self.index) // size
        return sorted(p for c in channels for p in self.index[c * repeat : (c + 1) * repeat])


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can only be removed together from all tensors that carry them.

    `frozen` is the reason why none may be removed, or None.
    """

    name: str
    size: int
    slots: tuple[Slot, ...]
    frozen: str | None = None

    def consumers(self) -> tuple[Slot, ...]:
        """Return the slots of tensors that read the channels."""
        return tuple(slot for slot in self.slots if slot.role == "consumer")


@dataclass(frozen=True)
class Branch:
    """A residual branch that can be dropped as a whole: module(x) becomes after(shortcut(x) + constant).

    `shortcut` and `after` name the child modules of `module` that remain. `groups` are the groups inside the branch. The
    branch is dropped when any of the groups in `gates` loses all channels, since each of them alone feeds its output.
    """

    module: str
    shortcut: tuple[str, ...]
    after: tuple[str, ...]
    groups: tuple[str, ...]
    gates: tuple[str, ...]
    tensors: tuple[str, ...]
    add: str
    output: str


@dataclass(frozen=True)
class ChannelCut:
    """The cut of one group: its channels `keep` remain, the others are removed.

    `pairs` are (removed, receiver) channels for merge rules that merge pairs. `implants` are channels that remain with
    1x1 kernels only (HAP's neural implants), placed after those in `keep`.
    """

    group: str
    keep: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...] = ()
    implants: tuple[int, ...] = ()


@dataclass(frozen=True)
class Budget:
    """A cost before pruning, its budget, and its value under the plan, in MACs per image, parameters or ms per batch."""

    cost: Literal["macs", "params", "latency"]
    before: float
    target: float
    after: float


@dataclass(frozen=True)
class PrunePlan:
    """The cuts and dropped branches of one cycle, for a network with these groups and branches.

    `macs_before` and `macs_after` count multiply-accumulates per image (1 MAC = 2 FLOPs). `budgets` are those of this
    cycle; latency in them is predicted.

    Raises:
        PlanError: The plan contradicts itself, such as by cutting a frozen group.
    """

    groups: tuple[ChannelGroup, ...]
    branches: tuple[Branch, ...]
    cuts: tuple[ChannelCut, ...]
    dropped: tuple[str, ...]
    criterion: str
    merge: str
    macs_before: int
    macs_after: int
    budgets: tuple[Budget, ...] = ()

    def __post_init__(self) -> None:
        sizes = {group.name: group for group in self.groups}
        for cut in self.cuts:
            group = sizes.get(cut.group)
            if group is None:
                raise PlanError(f"the plan cuts group {cut.group!r}, which is not among its groups")
            if group.frozen:
                raise PlanError(f"the plan cuts group {cut.group!r}, which is frozen: {group.frozen}")
            if any(not 0 <= c < group.size for c in cut.keep) or any(a >= b for a, b in pairwise(cut.keep)):
                raise PlanError(
                    f"group {cut.group!r}: keep must be ascending channels of 0..{group.size - 1}, got {cut.keep}"
                )
            if set(cut.implants) - set(range(group.size)) or set(cut.implants) & set(cut.keep):
                raise PlanError(
                    f"group {cut.group!r}: implants must be channels of 0..{group.size - 1} that are not kept, got "
                    f"{cut.implants}"
                )
            for removed, receiver in cut.pairs:
                if removed in cut.keep or receiver not in cut.keep:
                    raise PlanError(
                        f"group {cut.group!r}: pair ({removed}, {receiver}) must go from a removed to a kept channel"
                    )
        if unknown := set(self.dropped) - {branch.module for branch in self.branches}:
            raise PlanError(f"the plan drops {sorted(unknown)}, which are not among its branches")

    @cached_property
    def keep(self) -> Mapping[str, tuple[int, ...]]:
        """Kept channels of each group, cut or not."""
        kept = {group.name: tuple(range(group.size)) for group in self.groups}
        return kept | {cut.group: cut.keep for cut in self.cuts}

    @cached_property
    def remain(self) -> Mapping[str, tuple[int, ...]]:
        """Channels of each group after the cut, in their order there: kept ones, then implants."""
        return {name: (*kept, *self.implants.get(name, ())) for name, kept in self.keep.items()}

    @cached_property
    def implants(self) -> Mapping[str, tuple[int, ...]]:
        """Channels that become implants, for the groups that have any."""
        return {cut.group: cut.implants for cut in self.cuts if cut.implants}

    def without_implants(self) -> "PrunePlan":
        """Return the plan with implants removed like other channels."""
        return replace(self, cuts=tuple(replace(cut, implants=()) for cut in self.cuts)) if self.implants else self

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as an entry of `prune_plan.json`."""
        return {
            "criterion": self.criterion,
            "merge": self.merge,
            "macs_before": self.macs_before,
            "macs_after": self.macs_after,
            **({"budgets": [asdict(budget) for budget in self.budgets]} if self.budgets else {}),
            "dropped": list(self.dropped),
            "cuts": [
                {"group": cut.group, "keep": encode_runs(cut.keep), "pairs": [list(pair) for pair in cut.pairs]}
                | ({"implants": encode_runs(cut.implants)} if cut.implants else {})
                for cut in self.cuts
            ],
            "groups": [
                {
                    "name": group.name,
                    "size": group.size,
                    "frozen": group.frozen,
                    "slots": [[s.tensor, s.axis, s.role, encode_runs(s.index)] for s in group.slots],
                }
                for group in self.groups
            ],
            "branches": [
                {key: list(value) if isinstance(value, tuple) else value for key, value in vars(branch).items()}
                for branch in self.branches
            ],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PrunePlan":
        """Rebuild a plan from `to_dict`.

        Raises:
            PlanError: A key is missing, a value does not fit, or the plan contradicts itself.
        """
        return FORMAT.build(values, cls._from_values)

    @classmethod
    def _from_values(cls, values: Mapping[str, Any]) -> "PrunePlan":
        return cls(
            groups=tuple(map(_group_from, values["groups"])),
            branches=tuple(map(_branch_from, values["branches"])),
            cuts=tuple(map(_cut_from, values["cuts"])),
            dropped=tuple(values["dropped"]),
            budgets=tuple(Budget(**budget) for budget in values.get("budgets", ())),
            **{key: values[key] for key in ("criterion", "merge", "macs_before", "macs_after")},
        )

    def summary(self) -> str:
        """Return the plan as a table: one row per group that is cut, then dropped branches, frozen groups and budgets."""
        lines = self._cut_table()
        for name, channels in self.implants.items():
            lines.append(f"implants: {len(channels)} removed channels of {name} keep 1x1 kernels")
        if self.dropped:
            lines.append(f"dropped whole: {', '.join(self.dropped)}")
        for group in self.groups:
            if group.frozen:
                lines.append(f"frozen: {group.name} ({group.size} channels): {group.frozen}")
        share = self.macs_after / self.macs_before
        lines.append(
            f"MACs per image: {self.macs_before:,} -> {self.macs_after:,} ({share:.1%}, {1 / share:.2f}x fewer)"
        )
        for budget in self.budgets:
            before, target, after = (
                format_cost(budget.cost, value) for value in (budget.before, budget.target, budget.after)
            )
            predicted = "predicted " if budget.cost == "latency" else ""
            lines.append(f"budget: at most {target}; {predicted}{after}, from {before}")
        return "\n".join(lines)

    def _cut_table(self) -> list[str]:
        rows = [("group", "channels", "kept", "removed")]
        keep = self.keep
        for group in self.groups:
            if (kept := len(keep[group.name])) < group.size:
                rows.append((group.name, str(group.size), str(kept), f"{1 - kept / group.size:.0%}"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
            for row in rows
        ]
        return [lines[0], "-" * len(lines[0]), *lines[1:]]

    def diff(self, other: "PrunePlan") -> str:
        """Return the differences to a plan for the same groups, one line per group; empty if there are none."""
        mine, theirs = self.keep, other.keep
        lines = []
        for name in sorted(mine.keys() | theirs.keys()):
            a, b = set(mine.get(name, ())), set(theirs.get(name, ()))
            if a != b:
                lines.append(
                    f"{name}: keeps {encode_runs(sorted(a - b)) or '-'} where the other keeps {encode_runs(sorted(b - a)) or '-'}"
                )
        return "\n".join(lines)


def plans_to_json(plans: Iterable[PrunePlan]) -> str:
    """Return the text of `prune_plan.json`: the plans of all cycles, in order."""
    return FORMAT.write({"cycles": [plan.to_dict() for plan in plans]})


def plans_from_json(text: str | bytes) -> tuple[PrunePlan, ...]:
    """Read the text of `prune_plan.json`.

    Raises:
        PlanError: The text is damaged or has another schema, or a plan contradicts itself.
    """
    return FORMAT.read(text, lambda values: tuple(map(PrunePlan.from_dict, values["cycles"])))


def _branch_from(values: Mapping[str, Any]) -> Branch:
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return Branch(**fields)


def _group_from(values: Mapping[str, Any]) -> ChannelGroup:
    slots = (Slot(tensor, axis, role, decode_runs(runs)) for tensor, axis, role, runs in values["slots"])
    return ChannelGroup(values["name"], values["size"], tuple(slots), values["frozen"])


def _cut_from(values: Mapping[str, Any]) -> ChannelCut:
    pairs = tuple((removed, receiver) for removed, receiver in values["pairs"])
    return ChannelCut(values["group"], decode_runs(values["keep"]), pairs, decode_runs(values.get("implants", "")))


def encode_runs(numbers: Iterable[int]) -> str:
    """Write numbers as slices: (0, 1, 2, 8, 10, 12) becomes "0:3 8:13:2", and a single number stays a number."""
    numbers, parts, i = list(numbers), [], 0
    while i < len(numbers):
        step = numbers[i + 1] - numbers[i] if i + 1 < len(numbers) else 0
        j = i + 1
        while step > 0 and j < len(numbers) and numbers[j] - numbers[j - 1] == step:
            j += 1
        if j - i > 2 or (j - i == 2 and step == 1):
            parts.append(f"{numbers[i]}:{numbers[j - 1] + 1}" + (f":{step}" if step > 1 else ""))
        else:
            parts.append(str(numbers[i]))
            j = i + 1
        i = j
    return " ".join(parts)


def decode_runs(text: str) -> tuple[int, ...]:
    """Read the text of `encode_runs`.

    Raises:
        ValueError: The text is no list of slices and numbers.
    """
    numbers: list[int] = []
    for part in text.split():
        bounds = [int(p) for p in part.split(":")]
        numbers.extend(range(*bounds) if len(bounds) > 1 else bounds)
    return tuple(numbers)
