"""Which `tie_word_embeddings` of config.json each declared tie hangs on: that of the (sub)model that declares it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tierewrite.ties.tie import ConfigPath


def flag_places(model: Any) -> dict[str, tuple[ConfigPath, ...]]:
    """Alias -> the (sub)configs whose `tie_word_embeddings` switches its tie, of a built transformers model.

    Source: `PreTrainedModel.get_expanded_tied_weights_keys`, which asks each submodel's own config.
    """
    from transformers import PreTrainedModel

    known = _places_of_configs(model.config)
    place_of: dict[str, ConfigPath] = {}  # of each submodel, by its name
    found: dict[str, tuple[ConfigPath, ...]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, PreTrainedModel):
            continue
        # A config that was copied for a submodel is its parent's.
        above = place_of.get(_parent(prefix, place_of), ())
        place = place_of[prefix] = known.get(id(module.config), above)
        lead = f"{prefix}." if prefix else ""
        for alias in _declared_by(module):
            found[lead + alias] = tuple(dict.fromkeys((*found.get(lead + alias, ()), place)))
    return found


def _declared_by(module: Any) -> list[str]:
    """The aliases that a submodel declares itself, its names; of a legacy list what it names."""
    declared = module._tied_weights_keys
    if isinstance(declared, Mapping):
        return list(module.get_expanded_tied_weights_keys(all_submodels=False))
    return [name for name in declared or () if isinstance(name, str)]


def _parent(prefix: str, known: Mapping[str, ConfigPath]) -> str:
    """The nearest module above `prefix` that is known."""
    while prefix:
        prefix = prefix.rpartition(".")[0]
        if prefix in known:
            break
    return prefix


def _places_of_configs(config: Any) -> dict[int, ConfigPath]:
    """Identity of each (sub)config -> its place."""
    found: dict[int, ConfigPath] = {id(config): ()}
    waiting = [config]
    while waiting:
        above = waiting.pop()
        for name in getattr(above, "sub_configs", None) or ():
            below = getattr(above, name, None)
            if below is not None and id(below) not in found:
                found[id(below)] = (*found[id(above)], name)
                waiting.append(below)
    return found
