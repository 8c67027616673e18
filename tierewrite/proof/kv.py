"""KV-cache scales of attention modules whose projections are tied: what `--kv-scales merge` makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tierewrite import formats
from tierewrite.formats import Companion
from tierewrite.proof.judge import Group, Stand
from tierewrite.proof.values import why_no_value
from tierewrite.source.table import Checkpoint

_KeysBySuffix = Mapping[str, tuple[str, Companion]]  # what follows the attention module's name -> key, companion
_Places = Mapping[str, str | None]


def kv_stands(
    source: Checkpoint, digests: Mapping[str, bytes], groups: Iterable[Group], places: _Places
) -> dict[str, Stand]:
    """What stands for the KV-cache scales of several sides, where the ties of their projections are confirmed.

    Args:
        digests: of all tensors of SRC.
        groups: the declared ties, judged.
        places: key of SRC that a tie has already -> the name in DST that stands for it; None if a consumer needs it.
    """
    modules: dict[str, dict[str, tuple[str, Companion]]] = {}
    families = formats.detect(source.config, source.quant_config, source.tensors.keys())
    for key in source.tensors:
        hit = formats.kv_scale(key, families) or formats.kv_scale(key)
        if hit is not None:
            modules.setdefault(hit[0], {})[hit[1]] = key, hit[2]
    stands: dict[str, Stand] = {}
    taken = set(places)
    for canonical, (sides, owners) in sorted(_paired(groups).items()):
        parts = [modules.get(side, {}) for side in sides]
        if not _agree(parts, digests):
            continue
        for rest in sorted({rest for part in parts for rest in part}):
            there = [part[rest] for part in parts if rest in part]
            keys = tuple(key for key, _ in there)
            target = f"{canonical}.{rest}"
            entries = [source.tensors[key] for key in keys]
            alike = len({(entry.dtype, entry.shape) for entry in entries}) == 1
            one = alike if there[0][1].merge is None else why_no_value(entries) is None
            if _beside_another([key for key in keys if key != target], target, source, places):
                continue
            if keys != (target,) and one and taken.isdisjoint(keys):
                rule = there[0][1] if there[0][1].merge is not None else None  # biases are equal: one of them stays
                stands[target] = Stand(target, keys, rule, _owner(rest, owners))
                taken.update(keys)
    return stands


def _beside_another(keys: Iterable[str], target: str, source: Checkpoint, places: _Places) -> bool:
    """Whether one of these scales belongs to a weight for which another one stands than that beside `target`."""
    own = set(formats.main_names(f"{target.rpartition('.')[0]}.weight"))
    weights = {name for key in keys for name in formats.main_names(f"{key.rpartition('.')[0]}.weight")}
    return any(name in source.tensors and places.get(name, name) not in (None, *own) for name in weights)


def _owner(rest: str, owners: Sequence[str]) -> str:
    """The tie that a scale is listed under: that of its own projection, else the first."""
    word = rest.partition(".")[0]
    return next((owner for owner in sorted(owners) if f".{word}." in f".{owner}."), min(owners))


def _paired(groups: Iterable[Group]) -> dict[str, tuple[tuple[str, ...], list[str]]]:
    """Canonical attention module -> the modules of all sides, and the ties that pair them."""
    pairs: dict[str, list[tuple[tuple[str, ...], str]]] = {}
    blocked: set[str] = set()
    for group in groups:
        for slot in group.tie.slots:
            sides = tuple(name.rpartition(".")[0].rpartition(".")[0] for name in slot)
            if group.reason is not None:
                blocked.add(sides[0])
            elif len(sides) > 1 and all(sides):
                pairs.setdefault(sides[0], []).append((sides, group.tie.id))
    return {
        canonical: (_in_all([sides for sides, _ in found]), [owner for _, owner in found])
        for canonical, found in pairs.items()
        if canonical not in blocked
    }


def _in_all(found: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The modules that every tie of an attention pairs, each once."""
    return tuple(dict.fromkeys(side for side in found[0] if all(side in other for other in found)))


def _agree(parts: Sequence[_KeysBySuffix], digests: Mapping[str, bytes]) -> bool:
    """Sides whose keys or values are also shifted (a bias) stand for each other only where all of it is equal."""
    if not any(companion.merge is None for part in parts for _, companion in part.values()):
        return True
    with_any = [part for part in parts if part]
    for rest in set().union(*with_any):
        found = [part[rest] for part in with_any if rest in part]
        if found[0][1].merge is None and len(found) != len(with_any):
            return False
        if len({digests[key] for key, _ in found}) > 1:
            return False
    return True
