"""What remote code ties without declaring it, read off the built model by identity of its parameters.

Of transformers' own classes nothing is undeclared: their loader goes by `_tied_weights_keys` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tierewrite.errors import shown
from tierewrite.ties import meta_model


@dataclass(frozen=True)
class TiedInCode:
    """Parameters that are one without a declaration.

    Attributes:
        pairs: alias -> canonical, where loading the model makes them one again.
        lost: (alias, canonical) where it does not: only `__init__` makes them one.
    """

    pairs: Mapping[str, str]
    lost: tuple[tuple[str, str], ...]

    @property
    def warnings(self) -> list[str]:
        """What to say of those that loading does not tie again."""
        return [
            f"the class makes '{shown(alias)}' and '{shown(canonical)}' one parameter without declaring it; "
            "transformers does not tie them again when it loads, so both are kept. For loaders that do, use --ties FILE"
            for alias, canonical in self.lost
        ]


def tied_in_code(model: Any, declared: Mapping[str, str]) -> TiedInCode:
    """What the class of `model` makes one parameter besides `declared` (alias -> canonical).

    Args:
        model: built on the meta device; its parameters are exchanged for others.
    """
    if type(model).__module__.startswith("transformers."):
        return TiedInCode({}, ())
    first = meta_model.embedding_weight(model, "get_input_embeddings")
    made = _pairs(model, declared, first)
    _load_each_by_itself(model)
    _tie_again(model)
    again = _pairs(model, declared, first)
    lost = [pair for pair in made.items() if pair[0] not in again and pair[1] not in again]
    return TiedInCode(again, tuple(lost))


def _pairs(model: Any, declared: Mapping[str, str], first: str | None) -> dict[str, str]:
    """alias -> canonical of the parameters that are one object, without those of which all is declared."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    pairs: dict[str, str] = {}
    for group in names.values():
        roots = [name for name in group if name not in declared]
        if len(roots) > 1:
            root = first if first in roots else roots[0]
            pairs.update({name: root for name in roots if name != root})
    return pairs


def _load_each_by_itself(model: Any) -> None:
    """Every name gets a parameter of its own, as when transformers loads; modules that are one object stay one."""
    import torch

    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        parent, _, leaf = name.rpartition(".")
        loaded = torch.nn.Parameter(torch.empty_like(parameter), requires_grad=False)
        setattr(model.get_submodule(parent), leaf, loaded)


def _as_transformers_4_ties(output: Any, source: Any) -> None:
    """What overrides that were written for transformers 4 call."""
    output.weight = source.weight


def _tie_again(model: Any) -> None:
    """`tie_weights()`, as transformers calls it after loading; one that fails ties nothing."""
    for module in model.modules():
        if not hasattr(module, "_tie_or_clone_weights"):
            module._tie_or_clone_weights = _as_transformers_4_ties
    try:
        with meta_model.legacy_lists({}):
            model.tie_weights()
    except Exception as exc:
        meta_model.stop_if_fatal(exc)
