"""What a quantization family is, as data: a name, how to recognise it, and a table of companions.

A *companion* is a tensor that belongs to a weight: its packed form, a scale, a zero point. A family's file fills in
one `Family`; nothing here, and nothing that uses it, branches on which family it is. Refuses nothing and reads no
file: a suffix that no table lists is simply not there, and `classify` answers None for it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Literal

Merge = Literal["max", "min"]


class Role(enum.Enum):
    """What must hold between the sides of a tie before one copy of a companion may stand for both."""

    WEIGHT = "weight"  #: computed from the weight: byte-identical on all sides, one copy stays
    ACTIVATION = "activation"  #: calibrated from inputs: one value that covers every side
    KV = "kv"  #: KV-cache range: kept per side, merged only on request
    PER_SIDE = "per-side"  #: no part of the weight: untouched on every side
    ADJACENT = "adjacent"  #: baked into the weight and its neighbours: byte-identical, and the neighbours too

    @property
    def identical(self) -> bool:
        """Whether the sides of a tie must hold the same bytes of it, on all sides or on none."""
        return self in (Role.WEIGHT, Role.ADJACENT)

    @property
    def of_weight(self) -> bool:
        """Whether a tensor of this role goes where its weight goes, so that it shows that there is one."""
        return self in (Role.WEIGHT, Role.ACTIVATION, Role.ADJACENT)

    @property
    def quantizes(self) -> bool:
        """Whether a tensor of this role beside a `weight` shows that the module is quantized."""
        return self in (Role.WEIGHT, Role.ADJACENT)


@dataclass(frozen=True, slots=True)
class Companion:
    """One kind of tensor that a family writes beside (or as) a weight.

    Attributes:
        suffix: what follows the module's name and a dot. In a family's `fused` table it is a pattern in which
            `{leaf}` stands for the name of the fused parameter (`gate_up_proj`); `classify` fills it in. At most an
            underscore stands before it (`_{leaf}_qdata`).
        role: see `Role`.
        merge: for ACTIVATION and KV, which of the sides' values covers all of them: "max" of scales, "min"
            where the reciprocal is stored; None where values cannot be merged and must be equal.
        family: the name of the family whose table lists it (the first one, where several agree).
        uncalibrated: values that mean "calibration never reached this", beyond those that mean it in any format
            (`numbers.merging`).
        optional: the exporter also writes it where activations are not quantized, with an `uncalibrated` value: that
            calibration reached no side is then usual, and no reason for a warning.
        main: it is the weight itself in this family's form (`weight`, `weight_packed`, `qweight`).
    """

    suffix: str
    role: Role
    merge: Merge | None = None
    family: str = ""
    uncalibrated: tuple[float, ...] = ()
    main: bool = False
    optional: bool = False

    @property
    def meaning(self) -> tuple[Role, Merge | None, tuple[float, ...], bool, bool]:
        """All that decides what happens to the tensor; families agree on a suffix when these are equal."""
        return (self.role, self.merge, self.uncalibrated, self.main, self.optional)


@dataclass(frozen=True, slots=True)
class Signs:
    """How a family shows in a checkpoint. What configs say is compared without regard to case.

    A key that only this family writes is enough. What a config says is not: a tensor of the family has to be there too.

    Attributes:
        methods: values of `quantization_config.quant_method` in config.json.
        formats: values of `quantization_config.format`, or of a config group's `format`.
        producers: values of `producer.name` in hf_quant_config.json or in `quantization_config`.
        members: objects in config.json that only this family writes beside `quantization_config`.
        endings: last words of keys that only this family writes (`weight_packed`).
        tails: ends of such last words (`_blocks`).
    """

    methods: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    producers: tuple[str, ...] = ()
    members: tuple[str, ...] = ()
    endings: tuple[str, ...] = ()
    tails: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Family:
    """One quantization family.

    Attributes:
        name: its name in reports.
        signs: how `detect` recognises it.
        companions: what it writes for a parameter called `weight`.
        fused: what it writes for a fused parameter of another name (`experts.gate_up_proj`), as `{leaf}`
            patterns.
        kv: attention-level tensors, relative to the attention module (`k_proj.k_scale`, `k_scale`).
        own_only: suffixes whose meaning holds only where this family is detected, because another family
            gives them another one, or because parameters are called so too; they stay out of the default union.
    """

    name: str
    signs: Signs = field(default_factory=Signs)
    companions: tuple[Companion, ...] = ()
    fused: tuple[Companion, ...] = ()
    kv: tuple[Companion, ...] = ()
    own_only: frozenset[str] = frozenset()


def weight(*suffixes: str) -> tuple[Companion, ...]:
    """Companions computed from the weight (WEIGHT)."""
    return tuple(Companion(suffix, Role.WEIGHT) for suffix in suffixes)


def main(*suffixes: str) -> tuple[Companion, ...]:
    """The weight itself under a family's name for it (WEIGHT, `main`)."""
    return tuple(Companion(suffix, Role.WEIGHT, main=True) for suffix in suffixes)


def activation(
    merge: Merge, *suffixes: str, uncalibrated: tuple[float, ...] = (), optional: bool = False
) -> tuple[Companion, ...]:
    """Ranges calibrated from inputs or outputs (ACTIVATION), covered by the `merge` of all sides."""
    return tuple(
        Companion(suffix, Role.ACTIVATION, merge, uncalibrated=uncalibrated, optional=optional) for suffix in suffixes
    )


def kv_cache(merge: Merge | None, *suffixes: str) -> tuple[Companion, ...]:
    """KV-cache ranges (KV); `merge` None where they have to be equal to be merged."""
    return tuple(Companion(suffix, Role.KV, merge) for suffix in suffixes)
