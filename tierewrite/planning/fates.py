"""What has been decided so far for each tensor of the source: a tensor belongs to one group, a name to one survivor."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from tierewrite import formats
from tierewrite.planning.groups import Decisions, Unconfirmed
from tierewrite.planning.plan import Action
from tierewrite.source.table import Tensors


class Fates:
    """Columns over the rows of the source, filled in group by group; what no group decides is kept.

    Args:
        tensors: the source.
        groups: their ids.
        needed: keys that are not dropped, because a consumer needs their names.

    Attributes:
        action, stands_for, merged, group, new_names: as in `RewritePlan`.
        kept_name: bool, whether a row stays only because its name is needed.
    """

    def __init__(self, tensors: Tensors, groups: Sequence[str], needed: Collection[str] = ()) -> None:
        count = len(tensors)
        self._tensors = tensors
        self._ids = groups
        self.action = np.full(count, Action.KEEP.code, np.int8)
        self.stands_for = np.arange(count, dtype=np.int64)
        self.merged = np.zeros(count, bool)
        self.group = np.full(count, -1, np.int32)
        self.new_names: dict[int, str] = {}
        self.kept_name = np.zeros(count, bool)
        self._needed = np.zeros(count, bool)
        self._needed[[tensors.row[name] for name in needed if name in tensors.row]] = True
        self._claimed = np.zeros(count, bool)
        self._taken: set[str] = set()

    def claimed(self, rows: np.ndarray) -> np.ndarray:
        """bool, whether something is planned for each row by a group; a side that is kept whole claims nothing."""
        claimed: np.ndarray = self._claimed[rows]
        return claimed

    def drops_companions(self) -> bool:
        """Whether anything is dropped that belongs to a weight or is a packed one."""
        leaves = np.unique(self._tensors.leaf[self.action == Action.DROP.code]).tolist()
        names = (self._tensors.leaves[number] for number in leaves)
        return any(formats.is_companion(name) or formats.fused_parameters(name) for name in names)

    def claim(self, group: int, made: Decisions) -> None:
        """Enters what is planned for a group.

        Raises:
            Unconfirmed: a tensor belongs to another group, or a new name to another tensor. Nothing is entered then.
        """
        self.check(made)
        self._taken.update(made.new_names.values())
        self.enter(group, made)

    def check(self, made: Decisions) -> None:
        """Raises Unconfirmed, with the first tensor that cannot be had, or cannot be renamed."""
        names = self._tensors.names
        claimed = self.claimed(made.row)
        clashing = self._clashing(made)
        if not claimed.any() and not clashing:
            return
        for row, taken in zip(made.row.tolist(), claimed.tolist(), strict=True):
            if taken:
                raise Unconfirmed(f"'{names[row]}' already belongs to the tie of '{self._ids[self.group[row]]}'")
            if row in clashing:
                raise Unconfirmed(
                    f"'{names[row]}' would become '{made.new_names[row]}', a name that another tensor has"
                )

    def _clashing(self, made: Decisions) -> set[int]:
        """The rows that would take the name of a tensor outside of their group, or one that is taken already."""
        there = self._tensors.row
        renamed = {row: name for row, name in made.new_names.items() if name in there or name in self._taken}
        if not renamed:
            return set()
        own = set(made.row.tolist())
        return {row for row, name in renamed.items() if name in self._taken or there[name] not in own}

    def enter(self, group: int, made: Decisions) -> None:
        """Enters what becomes of some tensors, whoever had them before."""
        self.action[made.row] = made.action
        self.stands_for[made.row] = made.stands_for
        self.merged[made.row] = made.merged
        self.group[made.row] = group
        self._keep_needed(made.row)
        self._claimed[made.row] = True
        rename = Action.RENAME.code
        self.new_names.update({row: name for row, name in made.new_names.items() if self.action[row] == rename})

    def _keep_needed(self, rows: np.ndarray) -> None:
        """Those of `rows` that would be dropped stay if their names are needed, with the value that drops them."""
        rows = rows[self._needed[rows] & (self.action[rows] == Action.DROP.code)]
        if not len(rows):  # np.unique loads numpy.ma, which nothing else needs
            return
        stay = np.unique(rows)
        merged = self.merged[self.stands_for[stay]]
        self.action[stay] = np.where(merged, Action.MERGE.code, Action.KEEP.code)
        self.merged[stay] = merged
        self.stands_for[stay] = stay
        self.kept_name[stay] = True

    def keep(self, group: int, rows: np.ndarray) -> None:
        """Enters what a group keeps as it is: of these tensors those that no group has claimed."""
        self.group[rows[~self.claimed(rows)]] = group

    def repack(self, rows: Sequence[int] | np.ndarray) -> None:
        """Marks survivors that are re-encoded, or may be."""
        self.action[rows] = Action.REPACK.code

    def dropped(self) -> tuple[list[int], list[int]]:
        """How many tensors are dropped for each group, and their bytes."""
        rows = np.flatnonzero(self.action == Action.DROP.code)
        sizes = np.zeros(len(self._ids), np.int64)
        np.add.at(sizes, self.group[rows], self._tensors.nbytes[rows])
        return np.bincount(self.group[rows], minlength=len(self._ids)).tolist(), sizes.tolist()
