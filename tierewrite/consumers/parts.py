"""Which parts of a parameter no key fills, where a checkpoint stores it in parts: the weights of experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tierewrite.ties.on_disk import Part
from tierewrite.ties.tie import ModelNames
from tierewrite.ties.unpacked import projections


def parts_missing(parts: Mapping[Part, str], model: ModelNames, parameter: str) -> tuple[list[str], list[str]]:
    """What is missing of a parameter that some keys are parts of.

    Args:
        parts: part -> key, as `ties.on_disk.places` has it; not empty, and none is the whole.
        model: the class, with its shapes and its conversions of names.
        parameter: its name in memory.

    Returns:
        Names of tensors that belong to something that is there in part, and experts (`...experts.3`) of which this
        parameter has no part at all.
    """
    container, tails = _spelled(parts)
    wanted = tuple(tails) if container is None else _tails(parts, model, parameter)
    if container is None:
        return [], []
    count = model.shapes[parameter][0] if model.shapes[parameter] else 0
    there = {(tail, part[-1]) for tail, found in tails.items() for part in found}
    names: list[str] = []
    experts: list[str] = []
    for number in range(count):
        lacking = [tail for tail in wanted if (tail, number) not in there]
        if len(lacking) == len(wanted):
            experts.append(f"{container}.{number}")
        names += [f"{container}.{number}.{tail}" for tail in lacking]
    return names, experts


def _spelled(parts: Mapping[Part, str]) -> tuple[str | None, dict[str, list[Part]]]:
    """How the experts are spelled on disk: what stands before their number; what follows it -> the parts so named.

    None before the number where the parts are not experts.
    """
    container: str | None = None
    tails: dict[str, list[Part]] = {}
    for part, key in parts.items():
        before, found, after = key.rpartition(f".{part[-1]}.")
        if not found or not _numbered(part):
            return None, {}
        container = before
        tails.setdefault(_unpacked(part, after), []).append(part)
    return container, tails


def _numbered(part: Part) -> bool:
    return part[0] == "expert" or (part[0] == "converter" and "*" in str(part[1]))


def _unpacked(part: Part, after: str) -> str:
    """The unquantized name that follows an expert's number: `gate_proj.weight`, for `gate_proj.weight_packed` too."""
    if part[0] == "expert":
        return f"{part[1]}.{part[2]}"
    return _tail(str(part[1])) or after


def _tail(pattern: str) -> str:
    """What follows the expert's number in a converter's source pattern: `mlp.experts.*.w1.weight` -> `w1.weight`."""
    return pattern.rpartition("*.")[2].replace("\\", "").rstrip("$")


def _tails(parts: Mapping[Part, str], model: ModelNames, parameter: str) -> tuple[str, ...]:
    """All that an expert must have of this parameter, by what follows its number."""
    first = next(iter(parts))
    if first[0] == "expert":
        stem = parameter.rpartition(".")[2]
        names = (stem,) if first[1] == stem else projections(stem)
        return tuple(f"{name}.{first[2]}" for name in names)
    return tuple(_tail(pattern) for pattern in _sources(model, str(first[1])))


def _sources(model: ModelNames, pattern: str) -> Iterator[str]:
    """The source patterns of the conversion that `pattern` is one of."""
    for transform in model.renames.transforms:
        if pattern in transform.sources:
            yield from transform.sources
            return
