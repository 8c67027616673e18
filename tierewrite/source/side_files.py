"""Side files: weights in other formats among them, and those that are left out on request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from tierewrite.errors import shown
from tierewrite.source.table import CONFIG_NAMES, Checkpoint
from tierewrite.tables import some

_OTHER_FORMATS = (".bin", ".pt", ".pth", ".gguf", ".ckpt", ".msgpack", ".h5", ".onnx")
_NO_WEIGHTS = ("training_args.bin", "scheduler.pt", "rng_state.pth")


def in_other_formats(names: Iterable[str]) -> list[str]:
    """The files that hold weights and are no safetensors, by their names."""
    return [n for n in names if n.endswith(_OTHER_FORMATS) and n.rpartition("/")[2] not in _NO_WEIGHTS]


def other_weights(checkpoint: Checkpoint) -> tuple[str, ...]:
    """A warning that names the side files that hold weights in other formats, if there are any."""
    found = in_other_formats(side.name for side in checkpoint.side_files)
    if not found:
        return ()
    nbytes = sum(side.size for side in checkpoint.side_files if side.name in set(found))
    what = f"weights in other formats are copied as they are, {nbytes:,} bytes: {some(found, 5)}"
    return (f"{what}; --exclude leaves them out",)


def excluding(checkpoint: Checkpoint, patterns: Sequence[str]) -> Checkpoint:
    """`checkpoint` without the side files whose name, or path in it, one of the wildcards matches; folders stay.

    A warning names each wildcard that leaves nothing out: it may be misspelled.
    """
    names = [side.name for side in checkpoint.side_files if side.name not in CONFIG_NAMES]
    matched = {pattern: {name for name in names if _matches(name, pattern)} for pattern in patterns}
    idle = [f"'{shown(pattern)}'" for pattern, found in matched.items() if not found]
    said = (f"exclude {', '.join(idle)} leaves out nothing: no file of SRC that may be left out has such a name",)
    left_out = set().union(*matched.values())
    kept = tuple(side for side in checkpoint.side_files if side.name not in left_out)
    return replace(checkpoint, side_files=kept, warnings=(*checkpoint.warnings, *(said if idle else ())))


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition("/")[2], pattern)
