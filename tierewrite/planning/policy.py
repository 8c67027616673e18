"""TODO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Policy:
    """The options that decide content (all of them are recorded in the manifest).

    Attributes:
        on_mismatch: "error" refuses the checkpoint when a declared tie is not confirmed; "keep" leaves that group
            as it is; "repack" writes one NVFP4 blob where the sides differ only by scaling, and else refuses.
        kv_scales: "keep" leaves KV-cache scales on every side; "merge" leaves one merged canonical value.
        max_shard_size: most tensor bytes in one output shard; None takes the fullest input shard's.
        unify_fused_scales: one `weight_scale_2` for the NVFP4 projections that a consumer fuses (q/k/v, gate/up).
        fill_missing_scales: an expert's missing or never calibrated activation scale is taken from the layer's others.
        fix_ignore: rewrite entries of ignore lists that disagree with what is on disk after the ties are rewritten.
    """

    on_mismatch: str = "error"
    kv_scales: str = "keep"
    max_shard_size: int | None = None
    unify_fused_scales: bool = False
    fix_ignore: bool = False
    fill_missing_scales: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "on_mismatch": self.on_mismatch,
            "kv_scales": self.kv_scales,
            "max_shard_size": self.max_shard_size,
            "unify_fused_scales": self.unify_fused_scales,
            "fix_ignore": self.fix_ignore,
            "fill_missing_scales": self.fill_missing_scales,
        }
