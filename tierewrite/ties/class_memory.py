"""What a class of the installed transformers answered before: kept in a file, so that it need not be imported again.

An answer is kept under everything that it depends on: the config, the names in the checkpoint, and what is installed
(`installed`). It is taken only if the files of transformers that were imported for it are what they were, and if all
that it says can be true (`_checked`). Remote code is never remembered, nor what could not be built here.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
from blake3 import blake3

from tierewrite import formats
from tierewrite.errors import ConfigError
from tierewrite.kept_files import KeptFiles, cache_folder
from tierewrite.source.table import as_names
from tierewrite.ties import candidates, installed
from tierewrite.ties.renames import Answers, Live, Renames, Transform
from tierewrite.ties.tie import Declared, ModelNames, Tie

SCHEMA = "tierewrite/class/2"
_KEPT = 128
_MOST_BYTES = 64 << 20
"""Of one answer: a model of 100,000 experts whose names on disk are others than in memory."""
_ALL_BYTES = 256 << 20

_BELIEVED: ContextVar[bool] = ContextVar("tierewrite_class_memory_believed", default=True)


@contextlib.contextmanager
def not_believed() -> Iterator[None]:
    """Inside, every class is asked itself, and what it says replaces what was remembered."""
    token = _BELIEVED.set(False)
    try:
        yield
    finally:
        _BELIEVED.reset(token)


class _Kept(msgspec.Struct, forbid_unknown_fields=True):
    """What a file holds: `Declared` with its `ModelNames`, and what they depend on that has no part in its name."""

    schema: str
    key: str
    files: list[str]
    content: str
    ties: list[tuple[str, str, str]]
    detail: str
    unpaired: list[str]
    warnings: list[str]
    class_name: str
    base_model_prefix: str
    shapes: dict[str, tuple[int, ...]]
    flags: dict[str, list[tuple[str, ...]]]
    optional: list[str]
    ignored: list[str]
    embeddings: tuple[str, str] | None
    transforms: list[tuple[tuple[str, ...], tuple[str, ...], bool, int]]
    loaded: dict[str, tuple[str, str | None]]
    saved: list[tuple[str, tuple[str | int, ...], tuple[str, ...]]]


@dataclass(frozen=True)
class Entry:
    """One question to a class, and where its answer is kept.

    Attributes:
        files: where.
        key: what the answer depends on, hexadecimal.
    """

    files: KeptFiles
    key: str

    def answer(self, ask: Callable[[], Declared]) -> Declared:
        """What the class said before; else what it says now, which is kept.

        Args:
            ask: asks the class itself.

        Raises:
            What `ask` raises.
        """
        found = self._read() if _BELIEVED.get() else None
        if found is not None:
            return self._remembered(found, ask)
        declared = ask()
        if _may_be_kept(declared):
            assert declared.model is not None
            declared.model.renames.kept_by(lambda: self._keep(declared))
        return declared

    def _read(self) -> Declared | None:
        """What is kept, if it can be trusted."""
        text = self.files.read(self.key)
        if not text:
            return None
        try:
            kept = msgspec.json.decode(text, type=_Kept)
            if (kept.schema, kept.key) != (SCHEMA, self.key):
                raise ValueError("it is of another question or version")
            declared = _checked(kept)
        except (ValueError, msgspec.MsgspecError, RecursionError) as error:
            self.files.ignored(self.key, error)
            return None
        return declared if installed.content_of_transformers(kept.files) == kept.content else None

    def _remembered(self, found: Declared, ask: Callable[[], Declared]) -> Declared:
        """`found`, which asks the class itself when a name comes that it was not asked before."""
        model = found.model
        assert model is not None

        def live() -> Live:
            now = ask()
            if now.model is None or not _same(now, found):
                raise ConfigError(
                    f"what {found.detail} says of this config changed while it was used; run the command again"
                )
            return now.model.renames.live()

        renames = Renames(live, model.renames.transforms, model.renames.answers)
        declared = replace(found, model=replace(model, renames=renames))
        renames.kept_by(lambda: self._keep(declared), already=True)
        return declared

    def _keep(self, declared: Declared) -> None:
        """Writes it down, with what other processes learned of the same answer."""
        files = installed.files_of_transformers()
        content = installed.content_of_transformers(files or ())
        if files is None or content is None or not installed.is_as_imported(files):
            return
        assert declared.model is not None
        answers = declared.model.renames.answers
        before = self._read()
        if before is not None and before.model is not None and _same(before, declared):
            old = before.model.renames.answers
            answers = Answers({**old.loaded, **answers.loaded}, {**old.saved, **answers.saved})
        kept = _as_kept(self.key, files, content, declared, answers)
        with contextlib.suppress(ValueError):  # else no later command would believe it
            _checked(kept)
            self.files.keep(self.key, msgspec.json.encode(kept))


def entry_of(root: Path, config: Mapping[str, Any], keys: Collection[str], trust_remote_code: bool) -> Entry | None:
    """Where the answer for this config and these names is kept; None where it is not to be remembered.

    Args:
        root: the checkpoint's folder.
    """
    folder = cache_folder("classes", root)
    if folder is None or trust_remote_code or config.get("auto_map") or candidates.registered_here(config):
        return None
    here = installed.digest()
    if here is None:
        return None
    try:
        asked = (json.dumps(config).encode(), msgspec.json.encode(as_names(keys).names))
    except (TypeError, ValueError, RecursionError):  # a config in memory may hold anything
        return None
    hasher = blake3(SCHEMA.encode() + here)
    for part in asked:
        hasher.update(blake3(part).digest())
    return Entry(KeptFiles(folder, _KEPT, _MOST_BYTES, _ALL_BYTES), hasher.hexdigest())


def _may_be_kept(declared: Declared) -> bool:
    """Whether the class was built and says the same whenever it is asked."""
    model = declared.model
    return (
        model is not None
        and bool(model.shapes)
        and model.of_transformers
        and model.renames.by_name_alone
        and not declared.instead_of
    )


def _same(one: Declared, other: Declared) -> bool:
    """Whether two answers say the same, but for the names that the class was asked."""
    return _comparable(one) == _comparable(other)


def _comparable(declared: Declared) -> _Kept:
    return _as_kept("", (), "", declared, Answers())


def _as_kept(key: str, files: tuple[str, ...], content: str, declared: Declared, answers: Answers) -> _Kept:
    model = declared.model
    assert model is not None
    return _Kept(
        schema=SCHEMA,
        key=key,
        files=list(files),
        content=content,
        ties=[(tie.alias, tie.canonical, tie.origin) for tie in declared.ties],
        detail=declared.detail,
        unpaired=list(declared.unpaired),
        warnings=list(declared.warnings),
        class_name=model.class_name,
        base_model_prefix=model.base_model_prefix,
        shapes=dict(model.shapes),
        flags={alias: list(places) for alias, places in model.flags.items()},
        optional=sorted(model.optional),
        ignored=list(model.ignored),
        embeddings=model.embeddings,
        transforms=[(t.sources, t.targets, t.converts, t.stacked) for t in model.renames.transforms],
        loaded=answers.loaded,
        saved=[(name, part, names) for (name, part), names in answers.saved.items()],
    )


def _checked(kept: _Kept) -> Declared:
    """What a file says, if it can be the answer of a class.

    Raises:
        ValueError: it cannot.
    """
    if not kept.shapes.keys() >= {*kept.optional, *(kept.embeddings or ())}:
        raise ValueError("it names parameters that the class does not have")
    if not kept.shapes or any(size < 0 for shape in kept.shapes.values() for size in shape):
        raise ValueError("it holds shapes that no parameters have")
    _check_ties(kept)
    _check_answers(kept)
    transforms = tuple(Transform(*transform) for transform in kept.transforms)
    saved = {(name, part): names for name, part, names in kept.saved}

    def nobody() -> Live:
        raise AssertionError("the class was not asked")

    model = ModelNames(
        kept.class_name,
        kept.base_model_prefix,
        kept.shapes,
        Renames(nobody, transforms, Answers(kept.loaded, saved)),
        {alias: tuple(places) for alias, places in kept.flags.items()},
        frozenset(kept.optional),
        tuple(kept.ignored),
        kept.embeddings,
        of_transformers=True,
    )
    ties = tuple(Tie(*tie) for tie in kept.ties)
    return Declared(ties, "class", kept.detail, tuple(kept.unpaired), tuple(kept.warnings), model, remembered=True)


def _check_ties(kept: _Kept) -> None:
    """Raises ValueError: its ties cannot be those of a class."""
    aliases = {alias for alias, _, _ in kept.ties}
    if len(aliases) < len(kept.ties):
        raise ValueError("it ties a parameter twice")
    for alias, canonical, _ in kept.ties:
        if alias not in kept.shapes or canonical not in kept.shapes:
            raise ValueError(f"it ties '{alias}' to '{canonical}', and the class does not have both")
        if canonical in aliases:
            raise ValueError(f"it ties '{alias}' to '{canonical}', which is itself tied")
        if _is_companion(alias, kept.shapes) or _is_companion(canonical, kept.shapes):
            raise ValueError(f"it ties '{alias}' to '{canonical}': these are no parameters but belong to others")


def _is_companion(name: str, shapes: Collection[str]) -> bool:
    """Whether a name is that of a scale or the like, which belongs to a parameter that is there."""
    if formats.is_own_parameter(name):
        return False
    part = formats.part_of_weight(name)
    owners = formats.fused_parameters(name) if part is None else (part[0],)
    return any(owner != name and owner in shapes for owner in owners)


def _check_answers(kept: _Kept) -> None:
    """Raises ValueError: what it says of names cannot come from its transforms."""
    patterns = {pattern for sources, _, converts, _ in kept.transforms if converts for pattern in sources}
    if any(not sources or not targets for sources, targets, _, _ in kept.transforms):
        raise ValueError("it holds a transform without patterns")
    if any(stacked not in (0, len(sources)) for sources, _, _, stacked in kept.transforms):
        raise ValueError("it stacks other tensors than a transform has")
    if any(pattern is not None and pattern not in patterns for _, pattern in kept.loaded.values()):
        raise ValueError("it holds a name that no transform of it converts")
