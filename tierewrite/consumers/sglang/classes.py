"""What is known of SGLang's model classes: classes.json, which tests/sglang_loader/classes.py makes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

How = Literal["measured", "read", "not known"]
Fate = Literal["loaded", "ignored", "refused"]


@dataclass(frozen=True)
class ModelClass:
    """One class of SGLang's.

    Attributes:
        how: "measured": SGLang's loader was run on checkpoints of it. "read": only the text of its module was searched.
            "not known": neither told anything, or SGLang has no class of that name.
        head: of a tied model: "tied": the embedding serves as the head. "own": the head is a parameter of its own, that
            only `lm_head.weight` fills. "none": the class has no head. None: not known.
        quantized: whether it takes ModelOpt's quantization; None: not known.
        kv_scales: what becomes of `k_scale` and `v_scale` of a quantized checkpoint: "loaded", "ignored" or "refused";
            None: not known.
        leftover_fused, leftover: what becomes of a name that is no parameter's, below a projection that is fused (q, k,
            v) and below another: "ignored" or "refused"; None: not known.
        plain_kv_scales, plain_leftover_fused, plain_leftover: the same of a checkpoint without a quantization config.
        fused_experts: whether it reads experts that are stored as one tensor; None: not known, or it has none.
    """

    how: How = "not known"
    head: Literal["tied", "own", "none"] | None = None
    quantized: bool | None = None
    kv_scales: Fate | None = None
    leftover_fused: Fate | None = None
    leftover: Fate | None = None
    plain_kv_scales: Fate | None = None
    plain_leftover_fused: Fate | None = None
    plain_leftover: Fate | None = None
    fused_experts: bool | None = None

    def unquantized(self) -> ModelClass:
        """The same for a checkpoint without a quantization config: some classes have another one for those with it."""
        return replace(
            self, kv_scales=self.plain_kv_scales, leftover_fused=self.plain_leftover_fused, leftover=self.plain_leftover
        )


@lru_cache(maxsize=1)
def table() -> Mapping[str, ModelClass]:
    """Architecture -> what is known of it."""
    data = json.loads((Path(__file__).parent / "classes.json").read_text(encoding="utf-8"))
    return {name: ModelClass(**row) for name, row in data["classes"].items()}


def model_class(architecture: str) -> ModelClass:
    """What is known of the class of that name."""
    return table().get(architecture, ModelClass())
