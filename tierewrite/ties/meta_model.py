"""A model class built on the meta device: names, shapes and declared ties, without weights, network or output.

Building is bounded: a class that makes more modules, or takes longer, than any real model is stopped.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tierewrite.errors import Interrupted, SystemFailure, shown, without_a_folder
from tierewrite.ties import this_thread
from tierewrite.ties.flags import flag_places
from tierewrite.ties.patterns import safe_pattern
from tierewrite.ties.renames import Renames
from tierewrite.ties.tie import FLAG, ModelNames

# Both bounds are far above what the largest class of transformers needs.
MAX_MODULES = 2_000_000
MAX_BUILD_SECONDS = 60.0

# What is no answer of the class: the user, a signal or the interpreter stops the program.
_FATAL = (KeyboardInterrupt, GeneratorExit, Interrupted)


def stop_if_fatal(exc: BaseException | None) -> None:
    """Raise the user's or a signal's exception again, even if transformers' validators wrapped it in one of theirs."""
    seen: set[int] = set()
    while exc is not None and id(exc) not in seen:
        if isinstance(exc, _FATAL):
            raise exc
        seen.add(id(exc))
        exc = exc.__cause__ or exc.__context__


class TooLarge(Exception):
    """The class makes more modules, or takes longer, than any real model."""


def in_one_line(exc: BaseException) -> str:
    """An exception in one line: its type, and what it says."""
    text = str(exc).strip().replace("\n", " ")
    return shown(f"{type(exc).__name__}: {text}" if text else type(exc).__name__)


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """What fails inside is the installation of torch and transformers: no fault of a checkpoint, and no bug here."""
    try:
        yield
    except BaseException as exc:  # a library that was built for another system raises much else than ImportError
        stop_if_fatal(exc)
        advice = without_a_folder() or "repair their installation, or say what is tied with --ties FILE"
        raise SystemFailure(
            f"torch and transformers, which know what is tied, cannot be imported here: {in_one_line(exc)}; {advice}"
        ) from exc


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing that transformers, torch or remote code says in this thread reaches the user; others are heard.

    Raises:
        SystemFailure: torch or transformers cannot be imported.
    """
    with _importing():
        import transformers  # configures its logger on import

        _ = transformers
    loggers = ("transformers", "huggingface_hub", "torch", "transformers_modules")
    with this_thread.logging_nothing(*loggers), this_thread.printing_nothing():
        with this_thread.warning_of_nothing(), _importing():
            import torch
            from transformers import PreTrainedModel

            _ = torch, PreTrainedModel
        with this_thread.warning_of_nothing(others_stay=False):
            yield


class _TrueHere:
    """A switch that is on in the thread that made it, and elsewhere what it was."""

    def __init__(self, elsewhere: object) -> None:
        self._here, self._elsewhere = this_thread.ThisThread(), elsewhere

    def __bool__(self) -> bool:
        return bool(self._elsewhere) or bool(self._here)


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """huggingface_hub behaves as under HF_HUB_OFFLINE=1 in this thread; its setting is as before afterwards."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = _TrueHere(before)  # another checkpoint of a batch may be downloading
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Inside, building more modules than any real model has, or for longer, raises `TooLarge`."""
    from torch.nn.modules.module import register_module_module_registration_hook as watch

    count = 0
    deadline = time.monotonic() + MAX_BUILD_SECONDS
    here = this_thread.ThisThread()

    def on_module(*_: Any) -> None:
        nonlocal count
        if not here:  # another thread's model
            return
        count += 1
        if count > MAX_MODULES or (count % 1024 == 0 and time.monotonic() > deadline):
            raise TooLarge(f"more than {MAX_MODULES:,} modules or {MAX_BUILD_SECONDS:.0f} s to build")

    handle = watch(on_module)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def legacy_lists(found: dict[int, list[str]]) -> Iterator[None]:
    """Inside, a class whose `_tied_weights_keys` is a legacy list builds; `found` takes the list, by id(module)."""
    from transformers import PreTrainedModel

    original = PreTrainedModel.get_expanded_tied_weights_keys

    def expanded(self: Any, all_submodels: bool = False) -> dict[str, str]:
        declared = self._tied_weights_keys
        if not all_submodels and declared is not None and not isinstance(declared, dict):
            if getattr(self.config, FLAG, False):
                found[id(self)] = [d for d in declared if isinstance(d, str)]
            return {}
        expanded_here: dict[str, str] = original(self, all_submodels=all_submodels)
        return expanded_here

    with this_thread.replaced(PreTrainedModel, "get_expanded_tied_weights_keys", expanded):
        yield


def build(model_class: Any, built_config: Any) -> tuple[Any, dict[int, list[str]]]:
    """The model on the meta device: names and shapes, no storage, no initialisation."""
    import torch

    legacy: dict[int, list[str]] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_bounded())
        stack.enter_context(legacy_lists(legacy))
        stack.enter_context(torch.device("meta"))
        for owner, name in _filling():
            stack.enter_context(this_thread.replaced(owner, name, _nothing))
        return model_class(built_config), legacy


def _nothing(*_: Any, **__: Any) -> None:
    """In place of what fills or ties weights that have no storage."""


def _filling() -> Iterator[tuple[Any, str]]:
    """The functions that fill weights, and those that tie them, as (owner, name).

    Not by transformers' own `no_init_weights`: it switches `torch.nn.init` off for every thread of the process.
    """
    from transformers import PreTrainedModel, initialization

    functions = getattr(initialization, "TORCH_INIT_FUNCTIONS", ())
    for module in map(sys.modules.get, getattr(initialization, "TORCH_MODULES_TO_PATCH", ())):
        yield from ((module, name) for name in functions if hasattr(module, name))
    yield PreTrainedModel, "init_weights"
    yield PreTrainedModel, "tie_weights"


def declared_by(
    model: Any, legacy: Mapping[int, list[str]]
) -> tuple[dict[str, str], dict[str, str], tuple[str, ...], tuple[str, ...]]:
    """(pairs, origins, unpaired, warnings) of a built model; names are parameters or buffers that exist."""
    from transformers import PreTrainedModel

    expanded = _expanded(model)
    existing = _existing(model)
    submodels = [(p, m) for p, m in model.named_modules(remove_duplicate=False) if isinstance(m, PreTrainedModel)]
    declaring = [
        (p, type(m).__name__, [re.compile(safe_pattern(k)) for k in m._tied_weights_keys])
        for p, m in submodels
        if m._tied_weights_keys
    ]
    pairs = {a: c for a, c in expanded.items() if a != c and a in existing and c in existing}
    origins: dict[str, str] = {}
    for alias, canonical in pairs.items():
        # The innermost declarer whose patterns can speak of both names.
        prefix, name = "", type(model).__name__
        for inner, class_name, patterns in reversed(declaring):
            lead = f"{inner}." if inner else ""
            if alias.startswith(lead) and canonical.startswith(lead):
                part = alias[len(lead) :]
                if any(pattern.match(part) for pattern in patterns):
                    prefix, name = inner, class_name
                    break
        origins[alias] = f"class {name} at '{prefix}'" if prefix else f"class {name}"
    unpaired: list[str] = []
    for prefix, module in submodels:
        listed = legacy.get(id(module)) or _list_of(module)
        if listed:
            made, left = _pair_legacy(module, prefix, listed, existing)
            for alias, canonical in made.items():
                if alias not in pairs:
                    pairs[alias] = canonical
                    where = f" at '{prefix}'" if prefix else ""
                    origins[alias] = f"class {type(module).__name__}{where} (legacy list)"
            unpaired.extend(left)
    notes = [f"the declaration '{shown(n)}' names no counterpart; it is not treated as tied" for n in unpaired]
    return pairs, origins, tuple(unpaired), tuple(notes)


def _expanded(model: Any) -> dict[str, str]:
    """alias -> canonical of all active declarations; also of a class that never calls `post_init()`."""
    found = getattr(model, "all_tied_weights_keys", None)
    if found is None:
        with legacy_lists({}):
            found = model.get_expanded_tied_weights_keys(all_submodels=True)
    return dict(found)


def _list_of(module: Any) -> list[str]:
    """The legacy list of a class that never calls `post_init()`, if its config switches ties on."""
    declared = module._tied_weights_keys
    if isinstance(declared, dict) or not declared or not getattr(module.config, FLAG, False):
        return []
    return [name for name in declared if isinstance(name, str)]


def _existing(model: Any) -> dict[str, tuple[int, ...]]:
    """Every parameter and persistent buffer under every name of it, with its shape."""
    return {n: tuple(t.shape) for n, t in model.state_dict().items() if hasattr(t, "shape")}


def _pair_legacy(
    module: Any, prefix: str, declared: Sequence[str], existing: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, str], list[str]]:
    """Pair a legacy list with the input embedding, where an entry is another matrix of the same shape.

    transformers 4 tied the output embedding (and, in encoder-decoder models, the stacks' embeddings) to
    `get_input_embeddings()`; entries of any other shape (biases) were tied by code that nothing declares.
    """
    lead = f"{prefix}." if prefix else ""
    try:
        embedding = module.get_input_embeddings()
    except Exception as exc:
        stop_if_fatal(exc)
        embedding = None
    weight = getattr(embedding, "weight", None)
    canonical = next(
        (n for n, p in module.named_parameters(remove_duplicate=False) if weight is not None and p is weight),
        None,
    )
    made: dict[str, str] = {}
    left: list[str] = []
    for entry in declared:
        inside = (key[len(lead) :] for key in existing if key.startswith(lead))
        names = [name for name in inside if re.search(safe_pattern(entry), name)]
        if not names:
            left.append(lead + entry)
        for name in names:
            if name == canonical:
                continue
            fits = canonical is not None and existing[lead + name] == existing[lead + canonical]
            if fits and name.endswith("weight"):
                made[lead + name] = f"{lead}{canonical}"
            else:
                left.append(lead + name)
    return made, left


def names_of(model: Any) -> ModelNames:
    """What a model on the meta device says of names: its own, its prefix, and transformers' renamings for it."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping

    hub = tuple(get_model_conversion_mapping(model, add_legacy=False))
    # What get_model_conversion_mapping appends by default.
    every = (*hub, *(get_checkpoint_conversion_mapping("legacy") or ()))
    existing = _existing(model)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    spared = [re.compile(safe_pattern(p)) for p in model._keys_to_ignore_on_load_missing or ()]
    optional = {name for name in existing if name not in parameters or any(p.search(name) for p in spared)}
    return ModelNames(
        type(model).__name__,
        str(model.base_model_prefix or ""),
        existing,
        Renames.of(every, hub),
        flag_places(model),
        frozenset(optional),
        tuple(model._keys_to_ignore_on_load_unexpected or ()),
        None if any(_declares(module) for module in model.modules()) else _embeddings(model, existing),
        {_package(part) for part in (*model.modules(), model.config)} <= {"transformers", "torch"},
    )


def _package(of: Any) -> str:
    return type(of).__module__.partition(".")[0]


def _declares(module: Any) -> bool:
    return bool(getattr(module, "_tied_weights_keys", None))


def embedding_weight(model: Any, method: str) -> str | None:
    """The name of the weight of what `method` gives, such as "get_input_embeddings"; None if it has none."""
    try:
        embedding = getattr(model, method)()
    except Exception as exc:
        stop_if_fatal(exc)
        return None
    if getattr(embedding, "weight", None) is None:
        return None
    return next((f"{name}.weight" for name, module in model.named_modules() if module is embedding and name), None)


def _embeddings(model: Any, existing: Mapping[str, tuple[int, ...]]) -> tuple[str, str] | None:
    """The names of the weights of input and output embedding, where the class has both and they are of one shape."""
    first, second = (embedding_weight(model, f"get_{end}put_embeddings") for end in ("in", "out"))
    if first is None or second is None or first == second or first not in existing or second not in existing:
        return None
    return (first, second) if existing[first] == existing[second] else None
