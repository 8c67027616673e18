"""Two checkpoints of a batch must not meet: no DST in or around another's DST or anybody's SRC."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from tierewrite.batches.item import Item
from tierewrite.errors import UsageError, shown
from tierewrite.output.target import staging_names
from tierewrite.source import hub
from tierewrite.stores.places import chain, is_local, located

Chain = tuple[Hashable, ...]
"""Of a place; see `places.chain`."""


def refuse_clashes(items: Sequence[Item]) -> None:
    """No DST may be, or lie in or around, another's DST or anybody's SRC.

    Raises:
        UsageError: two items, or a SRC and a DST, would meet.
    """
    sources: dict[Hashable, tuple[Item, Chain]] = {}
    targets: dict[Hashable, tuple[Item, Chain]] = {}
    staged: dict[Hashable, Item] = {}
    for item in items:
        if hub.repo_id(item.src) is None:
            at = chain(located(item.src))
            sources.setdefault(at[0], (item, at))
        assert item.dst is not None
        place = located(item.dst)
        at = chain(place)
        if at[0] in targets:
            other = targets[at[0]][0]
            raise _clash(item, other, "the same DST, '{dst}'; give one of them a `dst` of its own in a list")
        targets[at[0]] = item, at
        if is_local(place):
            staged.update(dict.fromkeys((chain(name)[0] for name in staging_names(place)), item))
    for item, at in targets.values():
        for above in at:
            if above in targets and targets[above][0] is not item:
                raise _clash(item, targets[above][0], "DSTs that lie inside one another ('{dst}')")
            if above in sources:
                other = sources[above][0]
                raise _clash(item, other, "a DST ('{dst}') that is, or lies inside of, the SRC of the other")
            if above in staged:
                raise _clash(item, staged[above], "a DST ('{dst}') that lies where the other's DST is staged")
    for item, at in sources.values():
        for above in at:
            if above in targets:
                raise _clash(targets[above][0], item, "a DST ('{dst}') that holds the SRC of the other")
            if above in staged:
                raise _clash(staged[above], item, "a DST ('{dst}') that is staged where the SRC of the other lies")


def _clash(one: Item, other: Item, what: str) -> UsageError:
    text = what.format(dst=shown(located(one.dst or "")))
    if one is other:
        return UsageError(f"'{shown(located(one.src))}' ({one.origin}) has {text}")
    return UsageError(
        f"'{shown(located(one.src))}' ({one.origin}) and '{shown(located(other.src))}' ({other.origin}) have {text}"
    )
