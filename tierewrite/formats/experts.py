"""How the tensors of unpacked experts are called: `model.layers.0.mlp.experts.3.up_proj.weight`."""

from __future__ import annotations

import re
from typing import NamedTuple

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.([^.]+)\.([^.]+)")


class ExpertKey(NamedTuple):
    """The key of one expert's tensor in its words.

    Attributes:
        experts: the module that holds the experts.
        number: the expert's, as it is written.
        projection: its linear layer.
        suffix: the tensor of that.
    """

    experts: str
    number: str
    projection: str
    suffix: str

    @property
    def key(self) -> str:
        """All of it again."""
        return ".".join(self)


def expert_key(key: str) -> ExpertKey | None:
    """`key` in its words; None if it is no tensor of an unpacked expert's linear layer."""
    found = _EXPERT.fullmatch(key)
    return None if found is None else ExpertKey(*found.groups())


def split_expert(module: str) -> tuple[str, int | None, str]:
    """`model.layers.0.experts.3.up_proj` -> ("model.layers.0.experts", 3, "up_proj"); no expert: (module, None, "")."""
    parent, _, projection = module.rpartition(".")
    container, _, number = parent.rpartition(".")
    if number.isdecimal() and number.isascii() and container.rpartition(".")[2] == "experts":
        return container, int(number), projection
    return module, None, ""


def expert_of(key: str) -> str | None:
    """The expert that a tensor belongs to: `...experts.3`; None where it is no expert's."""
    container, number, _ = split_expert(key.rpartition(".")[0])
    return None if number is None else f"{container}.{number}"
