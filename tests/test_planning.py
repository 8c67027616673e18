"""What the program does, told by what it plans: a header and the ties of its model in, the fate of each tensor out.

A case is a table. On the left stands what the headers say (key, dtype, shape), on the right what is planned: an action,
the key in the output that holds the tensor or stands for it, and the tie group that it belongs to ("-" for none). "="
is the tensor's own key. No bytes are read: a plan says what happens if the bytes confirm it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub.serialization import split_state_dict_into_shards_factory
from hypothesis import given
from hypothesis import strategies as st

import tierewrite
from tests.checkpoints import count_calls, write_sparse_shard
from tierewrite.numbers.merging import mergeable
from tierewrite.planning.layout import split
from tierewrite.planning.needed_names import NeededNames
from tierewrite.planning.plan import RewritePlan
from tierewrite.planning.planner import plan
from tierewrite.planning.policy import Policy
from tierewrite.source.table import DTYPE_BITS, Checkpoint, Shard, TensorEntry
from tierewrite.ties.on_disk import DiskTies, TieGroup

Slots = Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Case:
    """One rule.

    Attributes:
        rule: what is shown, as a sentence.
        ties: group id -> the slots of the group: the names of one parameter on each side, canonical first.
        table: "key dtype[shape] action target group", a line a tensor, in the order of the file.
        policy: the options.
        config: config.json.
        known: what the bytes have told already, as `plan` takes it.
        owned: keys that are parameters of the model themselves.
        reason: a part of why the group is not confirmed.
        warning: a part of a warning.
        added: keys of the output that the source does not have.
        merges: target -> the keys that become one value.
        differing: group id -> aliases that are not one with the others.
    """

    rule: str
    ties: Mapping[str, Slots]
    table: str
    policy: Policy = field(default_factory=Policy)
    config: Mapping[str, Any] = field(default_factory=dict)
    known: Mapping[str, Any] = field(default_factory=dict)
    owned: frozenset[str] = frozenset()
    reason: str | None = None
    warning: str | None = None
    added: tuple[str, ...] = ()
    merges: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    differing: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


MODELOPT = {"quantization_config": {"quant_method": "modelopt"}}
SMOOTHED = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}}
AB: Mapping[str, Slots] = {"t": [("a.q_proj.weight", "b.q_proj.weight")]}
"""One tie: the weight of b.q_proj is that of a.q_proj."""

WEIGHTS = [
    Case(
        "what no tie speaks of stays as it is",
        {},
        """
        a.q_proj.weight      BF16[4,4]  keep  =  -
        b.q_proj.weight      BF16[4,4]  keep  =  -
        """,
    ),
    Case(
        "a tied weight is stored once, under its canonical name",
        AB,
        """
        a.q_proj.weight      BF16[4,4]  keep  =                t
        b.q_proj.weight      BF16[4,4]  drop  a.q_proj.weight  t
        """,
    ),
    Case(
        "everything computed from the weight goes with it",
        AB,
        """
        a.q_proj.weight          U8[4,8]       keep  =                         t
        a.q_proj.weight_scale    F8_E4M3[4,1]  keep  =                         t
        a.q_proj.weight_scale_2  F32[]         keep  =                         t
        b.q_proj.weight          U8[4,8]       drop  a.q_proj.weight           t
        b.q_proj.weight_scale    F8_E4M3[4,1]  drop  a.q_proj.weight_scale     t
        b.q_proj.weight_scale_2  F32[]         drop  a.q_proj.weight_scale_2   t
        """,
        config=MODELOPT,
    ),
    Case(
        "under another name too: a packed weight is the tied parameter in its format's form",
        AB,
        """
        a.q_proj.weight_packed   U8[4,8]       keep  =                         t
        a.q_proj.weight_scale    F8_E4M3[4,1]  keep  =                         t
        b.q_proj.weight_packed   U8[4,8]       drop  a.q_proj.weight_packed    t
        b.q_proj.weight_scale    F8_E4M3[4,1]  drop  a.q_proj.weight_scale     t
        """,
    ),
    Case(
        "where the canonical side is absent the first side that is there takes its name",
        {"t": [("a.q_proj.weight", "b.q_proj.weight", "c.q_proj.weight")]},
        """
        b.q_proj.weight      BF16[4,4]  rename  a.q_proj.weight  t
        c.q_proj.weight      BF16[4,4]  drop    a.q_proj.weight  t
        """,
    ),
    Case(
        "of three sides one stays",
        {"t": [("a.q_proj.weight", "b.q_proj.weight", "c.q_proj.weight")]},
        """
        c.q_proj.weight      BF16[4,4]  drop    a.q_proj.weight  t
        a.q_proj.weight      BF16[4,4]  keep    =                t
        b.q_proj.weight      BF16[4,4]  drop    a.q_proj.weight  t
        """,
    ),
    Case(
        "one side alone is what the right export has: nothing to do",
        AB,
        """
        a.q_proj.weight      BF16[4,4]  keep    =                t
        """,
    ),
    Case(
        "the sides' parameters may have different names: their own last word is what differs",
        {"t": [("embed.weight", "head.table")]},
        """
        embed.weight         BF16[4,4]  keep  =             t
        head.table           BF16[4,4]  drop  embed.weight  t
        """,
    ),
    Case(
        "a fused parameter has its companions beside it, not below",
        {"t": [("a.experts.gate_up_proj", "b.experts.gate_up_proj")]},
        """
        a.experts.gate_up_proj               U8[2,4,8]       keep  =                                   t
        a.experts.gate_up_proj_weight_scale  F8_E4M3[2,4,1]  keep  =                                   t
        a.experts.down_proj                  U8[2,8,4]       keep  =                                   -
        b.experts.gate_up_proj               U8[2,4,8]       drop  a.experts.gate_up_proj              t
        b.experts.gate_up_proj_weight_scale  F8_E4M3[2,4,1]  drop  a.experts.gate_up_proj_weight_scale t
        b.experts.down_proj                  U8[2,8,4]       keep  =                                   -
        """,
        config=MODELOPT,
    ),
    Case(
        "a fused parameter of many experts that are stored one by one is as many slots",
        {"t": [(f"a.experts.{e}.up_proj.weight", f"b.experts.{e}.up_proj.weight") for e in range(2)]},
        """
        a.experts.0.up_proj.weight  BF16[4,4]  keep  =                           t
        a.experts.1.up_proj.weight  BF16[4,4]  keep  =                           t
        b.experts.0.up_proj.weight  BF16[4,4]  drop  a.experts.0.up_proj.weight  t
        b.experts.1.up_proj.weight  BF16[4,4]  drop  a.experts.1.up_proj.weight  t
        """,
    ),
    Case(
        "each slot decides by itself which side is there",
        {"t": [(f"a.experts.{e}.up_proj.weight", f"b.experts.{e}.up_proj.weight") for e in range(2)]},
        """
        a.experts.0.up_proj.weight  BF16[4,4]  keep    =                           t
        b.experts.0.up_proj.weight  BF16[4,4]  drop    a.experts.0.up_proj.weight  t
        b.experts.1.up_proj.weight  BF16[4,4]  rename  a.experts.1.up_proj.weight  t
        """,
    ),
]

SCALES_AND_BUFFERS = [
    Case(
        "an activation scale belongs to a side: one value that covers all of them stays",
        AB,
        """
        a.q_proj.weight       F8_E4M3[4,4]  keep   =                    t
        a.q_proj.input_scale  F32[]         merge  =                    t
        b.q_proj.weight       F8_E4M3[4,4]  drop   a.q_proj.weight      t
        b.q_proj.input_scale  F32[]         drop   a.q_proj.input_scale t
        """,
        config=MODELOPT,
        merges={"a.q_proj.input_scale": ("a.q_proj.input_scale", "b.q_proj.input_scale")},
    ),
    Case(
        "an activation scale that only one side has is moved to the canonical side",
        AB,
        """
        a.q_proj.weight       F8_E4M3[4,4]  keep   =                    t
        b.q_proj.weight       F8_E4M3[4,4]  drop   a.q_proj.weight      t
        b.q_proj.input_scale  F32[]         rename a.q_proj.input_scale t
        """,
        config=MODELOPT,
        merges={"a.q_proj.input_scale": ("b.q_proj.input_scale",)},
    ),
    Case(
        "an activation scale that only the canonical side has is kept",
        AB,
        """
        a.q_proj.weight       F8_E4M3[4,4]  keep   =                    t
        a.q_proj.input_scale  F32[]         keep   =                    t
        b.q_proj.weight       F8_E4M3[4,4]  drop   a.q_proj.weight      t
        """,
        config=MODELOPT,
    ),
    Case(
        "KV-cache scales stay on every side by default: the two attentions cache different values",
        {"t": [("a.attn.k_proj.weight", "b.attn.k_proj.weight")]},
        """
        a.attn.k_proj.weight   F8_E4M3[4,4]  keep  =                     t
        a.attn.k_proj.k_scale  F32[]         keep  =                     -
        b.attn.k_proj.weight   F8_E4M3[4,4]  drop  a.attn.k_proj.weight  t
        b.attn.k_proj.k_scale  F32[]         keep  =                     -
        """,
        config=MODELOPT,
    ),
    Case(
        "KV-cache scales are merged on request",
        {"t": [("a.attn.k_proj.weight", "b.attn.k_proj.weight")]},
        """
        a.attn.k_proj.weight   F8_E4M3[4,4]  keep  =                     t
        a.attn.k_proj.k_scale  F32[]         merge =                     t
        b.attn.k_proj.weight   F8_E4M3[4,4]  drop  a.attn.k_proj.weight  t
        b.attn.k_proj.k_scale  F32[]         drop  a.attn.k_proj.k_scale t
        """,
        Policy(kv_scales="merge"),
        MODELOPT,
        merges={"a.attn.k_proj.k_scale": ("a.attn.k_proj.k_scale", "b.attn.k_proj.k_scale")},
    ),
    Case(
        "a merged KV-cache scale needs no projection of its own: keys and values may be shared",
        {"t": [("a.attn.k_proj.weight", "b.attn.k_proj.weight")]},
        """
        a.attn.k_proj.weight   F8_E4M3[4,4]  keep  =                     t
        b.attn.k_proj.weight   F8_E4M3[4,4]  drop  a.attn.k_proj.weight  t
        a.attn.v_proj.v_scale  F32[]         merge =                     t
        b.attn.v_proj.v_scale  F32[]         drop  a.attn.v_proj.v_scale t
        """,
        Policy(kv_scales="merge"),
        MODELOPT,
    ),
    Case(
        "a KV-cache scale stays beside a projection that is not tied, and needs it",
        {"t": [("a.attn.v_proj.weight", "b.attn.v_proj.weight")]},
        """
        a.attn.v_proj.weight   F8_E4M3[4,4]  keep  =                     t
        b.attn.v_proj.weight   F8_E4M3[4,4]  drop  a.attn.v_proj.weight  t
        a.attn.v_proj.v_scale  F32[]         merge =                     t
        b.attn.v_proj.v_scale  F32[]         drop  a.attn.v_proj.v_scale t
        a.attn.k_proj.weight   F8_E4M3[4,4]  keep  =                     -
        b.attn.k_proj.weight   F8_E4M3[4,4]  keep  =                     -
        a.attn.k_proj.k_scale  F32[]         keep  =                     -
        b.attn.k_proj.k_scale  F32[]         keep  =                     -
        """,
        Policy(kv_scales="merge"),
        MODELOPT,
        warning="'b.attn.k_proj.weight' is stored too, and not tied",
    ),
    Case(
        "a KV-cache scale goes where the weight beside it goes: one of three projections may be tied otherwise",
        {
            "k": [("c.attn.k_proj.weight", "b.attn.k_proj.weight")],
            "v": [("a.attn.v_proj.weight", "b.attn.v_proj.weight", "c.attn.v_proj.weight")],
        },
        """
        a.attn.k_proj.weight   F8_E4M3[4,4]  keep  =                     -
        b.attn.k_proj.weight   F8_E4M3[4,4]  drop  c.attn.k_proj.weight  k
        c.attn.k_proj.weight   F8_E4M3[4,4]  keep  =                     k
        a.attn.v_proj.weight   F8_E4M3[4,4]  keep  =                     v
        b.attn.v_proj.weight   F8_E4M3[4,4]  drop  a.attn.v_proj.weight  v
        c.attn.v_proj.weight   F8_E4M3[4,4]  drop  a.attn.v_proj.weight  v
        a.attn.k_proj.k_scale  F32[]         keep  =                     -
        b.attn.k_proj.k_scale  F32[]         drop  c.attn.k_proj.k_scale k
        c.attn.k_proj.k_scale  F32[]         merge =                     k
        a.attn.v_proj.v_scale  F32[]         merge =                     v
        b.attn.v_proj.v_scale  F32[]         drop  a.attn.v_proj.v_scale v
        c.attn.v_proj.v_scale  F32[]         drop  a.attn.v_proj.v_scale v
        """,
        Policy(kv_scales="merge"),
        MODELOPT,
        warning="'b.attn.k_proj.weight' is stored too, and not tied to the projection of that name",
        merges={
            "c.attn.k_proj.k_scale": ("c.attn.k_proj.k_scale", "b.attn.k_proj.k_scale"),
            "a.attn.v_proj.v_scale": ("a.attn.v_proj.v_scale", "b.attn.v_proj.v_scale", "c.attn.v_proj.v_scale"),
        },
    ),
    Case(
        "KV-cache scales that differ in kind are kept, with a warning",
        {"t": [("a.attn.k_proj.weight", "b.attn.k_proj.weight")]},
        """
        a.attn.k_proj.weight   F8_E4M3[4,4]  keep  =                     t
        a.attn.k_proj.k_scale  F32[]         keep  =                     -
        b.attn.k_proj.weight   F8_E4M3[4,4]  drop  a.attn.k_proj.weight  t
        b.attn.k_proj.k_scale  F32[4]        keep  =                     -
        """,
        Policy(kv_scales="merge"),
        MODELOPT,
        warning="its sides are stored differently",
    ),
    Case(
        "with biases KV-cache scales are merged only if both are equal: the bias has no common value",
        {"t": [("a.attn.k_proj.weight", "b.attn.k_proj.weight")]},
        """
        a.attn.k_proj.weight   F8_E4M3[4,4]  keep  =                     t
        a.attn.k_proj.k_scale  F32[]         merge =                     t
        a.attn.k_proj.k_bias   F32[]         keep  =                     t
        b.attn.k_proj.weight   F8_E4M3[4,4]  drop  a.attn.k_proj.weight  t
        b.attn.k_proj.k_scale  F32[]         drop  a.attn.k_proj.k_scale t
        b.attn.k_proj.k_bias   F32[]         drop  a.attn.k_proj.k_bias  t
        """,
        Policy(kv_scales="merge"),
        MODELOPT,
    ),
    Case(
        "a KV-cache bias on one side only keeps the layer's scales",
        {"t": [("a.attn.k_proj.weight", "b.attn.k_proj.weight")]},
        """
        a.attn.k_proj.weight   F8_E4M3[4,4]  keep  =                     t
        a.attn.k_proj.k_scale  F32[]         keep  =                     -
        a.attn.k_proj.k_bias   F32[]         keep  =                     -
        b.attn.k_proj.weight   F8_E4M3[4,4]  drop  a.attn.k_proj.weight  t
        b.attn.k_proj.k_scale  F32[]         keep  =                     -
        """,
        Policy(kv_scales="merge"),
        MODELOPT,
        warning="a bias is not on every side",
    ),
    Case(
        "KV-cache scales whose biases the bytes have found to differ are kept",
        {"t": [("a.attn.k_proj.weight", "b.attn.k_proj.weight")]},
        """
        a.attn.k_proj.weight   F8_E4M3[4,4]  keep  =                     t
        a.attn.k_proj.k_scale  F32[]         keep  =                     -
        b.attn.k_proj.weight   F8_E4M3[4,4]  drop  a.attn.k_proj.weight  t
        b.attn.k_proj.k_scale  F32[]         keep  =                     -
        """,
        Policy(kv_scales="merge"),
        MODELOPT,
        {"separate_kv": frozenset({"a.attn.k_proj.k_scale"})},
    ),
    Case(
        "a KV-cache scale of one attention whose own projections are tied stays: there is no other side",
        {"t": [("a.attn.k_proj.weight", "a.attn.v_proj.weight")]},
        """
        a.attn.k_proj.weight   F8_E4M3[4,4]  keep  =                     t
        a.attn.v_proj.weight   F8_E4M3[4,4]  drop  a.attn.k_proj.weight  t
        a.attn.k_proj.k_scale  F32[]         keep  =                     -
        a.attn.v_proj.v_scale  F32[]         keep  =                     -
        """,
        Policy(kv_scales="merge"),
        MODELOPT,
    ),
    Case(
        "an attention of which one projection is refuted keeps its KV-cache scales",
        {
            "k": [("a.attn.k_proj.weight", "b.attn.k_proj.weight")],
            "v": [("a.attn.v_proj.weight", "b.attn.v_proj.weight")],
        },
        """
        a.attn.k_proj.weight   F8_E4M3[4,4]  keep  =                     k
        a.attn.v_proj.weight   F8_E4M3[4,4]  keep  =                     v
        a.attn.k_proj.k_scale  F32[]         keep  =                     -
        b.attn.k_proj.weight   F8_E4M3[4,4]  drop  a.attn.k_proj.weight  k
        b.attn.v_proj.weight   F8_E4M3[4,2]  keep  =                     v
        b.attn.k_proj.k_scale  F32[]         keep  =                     -
        """,
        Policy(kv_scales="merge"),
        MODELOPT,
        reason="'a.attn.v_proj.weight' is F8_E4M3 [4, 4] but 'b.attn.v_proj.weight' is F8_E4M3 [4, 2]",
    ),
    Case(
        "a bias is a parameter of its own: it stays on every side unless it is tied too",
        {"w": [("a.q_proj.weight", "b.q_proj.weight")], "b": [("a.k_proj.bias", "b.k_proj.bias")]},
        """
        a.q_proj.weight  BF16[4,4]  keep  =                w
        a.q_proj.bias    BF16[4]    keep  =                -
        b.q_proj.weight  BF16[4,4]  drop  a.q_proj.weight  w
        b.q_proj.bias    BF16[4]    keep  =                -
        a.k_proj.bias    BF16[4]    keep  =                b
        b.k_proj.bias    BF16[4]    drop  a.k_proj.bias    b
        """,
    ),
    Case(
        "a bias that is tied beside its weight belongs to its own group",
        {"w": [("a.q_proj.weight", "b.q_proj.weight")], "b": [("a.q_proj.bias", "b.q_proj.bias")]},
        """
        a.q_proj.weight  BF16[4,4]  keep  =                w
        a.q_proj.bias    BF16[4]    keep  =                b
        b.q_proj.weight  BF16[4,4]  drop  a.q_proj.weight  w
        b.q_proj.bias    BF16[4]    drop  a.q_proj.bias    b
        """,
    ),
    Case(
        "a parameter of the model is nobody's companion, whatever it is called",
        AB,
        """
        a.q_proj.weight       BF16[4,4]  keep  =                t
        a.q_proj.zzz          BF16[4]    keep  =                -
        b.q_proj.weight       BF16[4,4]  drop  a.q_proj.weight  t
        """,
        owned=frozenset({"a.q_proj.zzz"}),
    ),
]

REFUSED = [
    Case(
        "a companion that no format knows keeps the whole group",
        AB,
        """
        a.q_proj.weight      BF16[4,4]  keep  =  t
        b.q_proj.weight      BF16[4,4]  keep  =  t
        b.q_proj.zzz         F32[]      keep  =  t
        """,
        reason="no known format has the tensor 'b.q_proj.zzz' (suffix 'zzz') beside the tied parameter",
    ),
    Case(
        "sides of different shapes keep the whole group",
        AB,
        """
        a.q_proj.weight      BF16[4,4]  keep  =  t
        b.q_proj.weight      BF16[4,8]  keep  =  t
        """,
        reason="'a.q_proj.weight' is BF16 [4, 4] but 'b.q_proj.weight' is BF16 [4, 8]",
    ),
    Case(
        "sides of different dtypes keep the whole group",
        AB,
        """
        a.q_proj.weight      BF16[4,4]  keep  =  t
        b.q_proj.weight      F16[4,4]   keep  =  t
        """,
        reason="'a.q_proj.weight' is BF16 [4, 4] but 'b.q_proj.weight' is F16 [4, 4]",
    ),
    Case(
        "sides of which only one is quantized keep the whole group",
        AB,
        """
        a.q_proj.weight        F8_E4M3[4,4]  keep  =  t
        a.q_proj.weight_scale  F32[]         keep  =  t
        b.q_proj.weight        F8_E4M3[4,4]  keep  =  t
        """,
        config=MODELOPT,
        reason="'a.q_proj.weight_scale' has no twin",
    ),
    Case(
        "activation scales that cannot become one value keep the whole group",
        AB,
        """
        a.q_proj.weight       F8_E4M3[4,4]  keep  =  t
        a.q_proj.input_scale  F32[]         keep  =  t
        b.q_proj.weight       F8_E4M3[4,4]  keep  =  t
        b.q_proj.input_scale  F32[7]        keep  =  t
        """,
        config=MODELOPT,
        reason=f"'a.q_proj.input_scale', 'b.q_proj.input_scale': {mergeable([('F32', ()), ('F32', (7,))])}",
    ),
    Case(
        "one refuted slot keeps all slots of the group",
        {"t": [(f"a.experts.{e}.up_proj.weight", f"b.experts.{e}.up_proj.weight") for e in range(2)]},
        """
        a.experts.0.up_proj.weight  BF16[4,4]  keep  =  t
        a.experts.1.up_proj.weight  BF16[4,4]  keep  =  t
        b.experts.0.up_proj.weight  BF16[4,4]  keep  =  t
        b.experts.1.up_proj.weight  BF16[4,2]  keep  =  t
        """,
        reason="'a.experts.1.up_proj.weight' is BF16 [4, 4] but 'b.experts.1.up_proj.weight' is BF16 [4, 2]",
    ),
    Case(
        "a tensor that two ties claim goes with the first; the second is kept",
        {"t": [("a.q_proj.weight", "b.q_proj.weight")], "u": [("c.q_proj.weight", "b.q_proj.weight")]},
        """
        a.q_proj.weight  BF16[4,4]  keep  =                t
        b.q_proj.weight  BF16[4,4]  drop  a.q_proj.weight  t
        c.q_proj.weight  BF16[4,4]  keep  =                u
        """,
        reason="'b.q_proj.weight' already belongs to the tie of 't'",
    ),
    Case(
        "a kept group claims nothing: what it shares with another may still go",
        {"u": [("c.q_proj.weight", "b.q_proj.weight")], "t": [("a.q_proj.weight", "b.q_proj.weight")]},
        """
        a.q_proj.weight  BF16[4,4]  keep  =                t
        b.q_proj.weight  BF16[4,4]  drop  a.q_proj.weight  t
        c.q_proj.weight  BF16[4,8]  keep  =                u
        """,
        reason="'c.q_proj.weight' is BF16 [4, 8] but 'b.q_proj.weight' is BF16 [4, 4]",
    ),
    Case(
        "a canonical name that another tensor has is not taken",
        {"t": [("a.q_proj.table", "b.q_proj.weight")]},
        """
        a.q_proj.table_scale  F32[]         keep  =  -
        b.q_proj.weight       F8_E4M3[4,4]  keep  =  t
        b.q_proj.weight_scale F32[]         keep  =  t
        """,
        config=MODELOPT,
        owned=frozenset({"a.q_proj.table_scale"}),
        reason="'b.q_proj.weight_scale' would become 'a.q_proj.table_scale', a name that another tensor has",
    ),
    Case(
        "a group that its bytes refuted is kept whole",
        AB,
        """
        a.q_proj.weight      BF16[4,4]  keep  =  t
        b.q_proj.weight      BF16[4,4]  keep  =  t
        """,
        known={"refuted": {"t": "they differ"}},
        reason="they differ",
    ),
]

THREE: Mapping[str, Slots] = {"t": [("embed.weight", "encoder.embed.weight", "lm_head.weight")]}
KEEP = Policy(on_mismatch="keep")

ONE_SIDE_DIFFERS = [
    Case(
        "of several aliases the one that differs keeps the group whole by default, and is named",
        THREE,
        """
        embed.weight          BF16[4,4]  keep  =  t
        encoder.embed.weight  BF16[4,4]  keep  =  t
        lm_head.weight        BF16[8,4]  keep  =  t
        """,
        reason="'embed.weight' is BF16 [4, 4] but 'lm_head.weight' is BF16 [8, 4]",
        differing={"t": ("lm_head.weight",)},
    ),
    Case(
        "on_mismatch=keep: of several aliases the one that differs stays alone",
        THREE,
        """
        embed.weight          BF16[4,4]  keep  =             t
        encoder.embed.weight  BF16[4,4]  drop  embed.weight  t
        lm_head.weight        BF16[8,4]  keep  =             t
        """,
        KEEP,
        differing={"t": ("lm_head.weight",)},
    ),
    Case(
        "on_mismatch=keep: the same where the bytes say which side differs",
        THREE,
        """
        embed.weight          BF16[4,4]  keep  =             t
        encoder.embed.weight  BF16[4,4]  drop  embed.weight  t
        lm_head.weight        BF16[4,4]  keep  =             t
        """,
        KEEP,
        known={"refuted": {"t": "they differ"}, "differing": {"t": {"lm_head.weight": "they differ"}}},
        differing={"t": ("lm_head.weight",)},
    ),
    Case(
        "on_mismatch=keep: a quantized head stays with all of its companions",
        THREE,
        """
        embed.weight          BF16[4,4]     keep  =             t
        encoder.embed.weight  BF16[4,4]     drop  embed.weight  t
        lm_head.weight        F8_E4M3[4,4]  keep  =             t
        lm_head.weight_scale  F32[]         keep  =             t
        lm_head.input_scale   F32[]         keep  =             t
        """,
        KEEP,
        differing={"t": ("lm_head.weight",)},
    ),
    Case(
        "on_mismatch=keep: a side that differs in one slot stays in all of them",
        {"t": [tuple(f"{side}.experts.{e}.up_proj.weight" for side in "abc") for e in range(2)]},
        """
        a.experts.0.up_proj.weight  BF16[4,4]  keep  =                           t
        a.experts.1.up_proj.weight  BF16[4,4]  keep  =                           t
        b.experts.0.up_proj.weight  BF16[4,4]  drop  a.experts.0.up_proj.weight  t
        b.experts.1.up_proj.weight  BF16[4,4]  drop  a.experts.1.up_proj.weight  t
        c.experts.0.up_proj.weight  BF16[4,4]  keep  =                           t
        c.experts.1.up_proj.weight  BF16[4,2]  keep  =                           t
        """,
        KEEP,
        differing={"t": ("c.experts.0.up_proj.weight",)},
    ),
    Case(
        "on_mismatch=keep: its activation scale is no part of the merged value",
        {"t": [("a.q_proj.weight", "b.q_proj.weight", "c.q_proj.weight")]},
        """
        a.q_proj.weight       F8_E4M3[4,4]  keep   =                    t
        a.q_proj.input_scale  F32[]         merge  =                    t
        b.q_proj.weight       F8_E4M3[4,4]  drop   a.q_proj.weight      t
        b.q_proj.input_scale  F32[]         drop   a.q_proj.input_scale t
        c.q_proj.weight       F8_E4M3[4,4]  keep   =                    t
        c.q_proj.input_scale  F32[]         keep   =                    t
        """,
        KEEP,
        MODELOPT,
        {"refuted": {"t": "differ"}, "differing": {"t": {"c.q_proj.weight": "differ"}}},
        differing={"t": ("c.q_proj.weight",)},
        merges={"a.q_proj.input_scale": ("a.q_proj.input_scale", "b.q_proj.input_scale")},
    ),
    Case(
        "on_mismatch=keep: nor are its KV-cache scales merged with the others'",
        {"t": [("a.attn.k_proj.weight", "b.attn.k_proj.weight", "c.attn.k_proj.weight")]},
        """
        a.attn.k_proj.weight   F8_E4M3[4,4]  keep   =                     t
        a.attn.k_proj.k_scale  F32[]         merge  =                     t
        b.attn.k_proj.weight   F8_E4M3[4,4]  drop   a.attn.k_proj.weight  t
        b.attn.k_proj.k_scale  F32[]         drop   a.attn.k_proj.k_scale t
        c.attn.k_proj.weight   F8_E4M3[4,2]  keep   =                     t
        c.attn.k_proj.k_scale  F32[]         keep   =                     t
        """,
        Policy(on_mismatch="keep", kv_scales="merge"),
        MODELOPT,
        differing={"t": ("c.attn.k_proj.weight",)},
    ),
    Case(
        "on_mismatch=keep: all sides stay where the canonical one is not there: which of the others it is, nobody says",
        THREE,
        """
        encoder.embed.weight  BF16[4,4]  keep  =  t
        lm_head.weight        BF16[8,4]  keep  =  t
        """,
        KEEP,
        reason="'encoder.embed.weight' is BF16 [4, 4] but 'lm_head.weight' is BF16 [8, 4]",
    ),
    Case(
        "on_mismatch=keep: all sides stay where aliases agree with each other and not with the canonical one",
        THREE,
        """
        embed.weight          BF16[8,4]  keep  =  t
        encoder.embed.weight  BF16[4,4]  keep  =  t
        lm_head.weight        BF16[4,4]  keep  =  t
        """,
        KEEP,
        reason="'embed.weight' is BF16 [8, 4] but 'encoder.embed.weight' is BF16 [4, 4]",
    ),
    Case(
        "on_mismatch=keep: an alias that is not there agrees with nobody",
        THREE,
        """
        embed.weight    BF16[4,4]  keep  =  t
        lm_head.weight  BF16[8,4]  keep  =  t
        """,
        KEEP,
        reason="'embed.weight' is BF16 [4, 4] but 'lm_head.weight' is BF16 [8, 4]",
    ),
    Case(
        "on_mismatch=keep: an alias that another tie has claimed stays with that tie",
        {
            "u": [("other.weight", "lm_head.weight")],
            "t": [("embed.weight", "encoder.embed.weight", "lm_head.weight")],
        },
        """
        other.weight          BF16[4,4]  keep  =             u
        embed.weight          BF16[4,4]  keep  =             t
        encoder.embed.weight  BF16[4,4]  drop  embed.weight  t
        lm_head.weight        BF16[4,4]  drop  other.weight  u
        """,
        KEEP,
        differing={"t": ("lm_head.weight",)},
    ),
]

SMOOTHING = [
    Case(
        "in a smoothed checkpoint the sides' norms hold a part of the weight: they must be equal, and both stay",
        {"t": [("a.layers.0.q_proj.weight", "b.layers.0.q_proj.weight")]},
        """
        a.layers.0.input_layernorm.weight  BF16[4]     keep  =                               -
        a.layers.0.q_proj.weight           U8[4,2]     keep  =                               t
        a.layers.0.q_proj.weight_scale     F32[4,1]    keep  =                               t
        b.layers.0.input_layernorm.weight  BF16[4]     keep  =                               -
        b.layers.0.q_proj.weight           U8[4,2]     drop  a.layers.0.q_proj.weight        t
        b.layers.0.q_proj.weight_scale     F32[4,1]    drop  a.layers.0.q_proj.weight_scale  t
        """,
        config=SMOOTHED,
    ),
    Case(
        "a smoothed neighbour that is tied must agree too: here its headers differ already",
        {
            "t": [("a.layers.0.q_proj.weight", "b.layers.0.q_proj.weight")],
            "n": [("a.layers.0.input_layernorm.weight", "b.layers.0.input_layernorm.weight")],
        },
        """
        a.layers.0.input_layernorm.weight  BF16[4]   keep  =  n
        a.layers.0.q_proj.weight           U8[4,2]   keep  =  t
        a.layers.0.q_proj.weight_scale     F32[4,1]  keep  =  t
        b.layers.0.input_layernorm.weight  BF16[8]   keep  =  n
        b.layers.0.q_proj.weight           U8[4,2]   keep  =  t
        b.layers.0.q_proj.weight_scale     F32[4,1]  keep  =  t
        """,
        config=SMOOTHED,
        reason="and both were smoothed together with 'a.layers.0.q_proj.weight'",
    ),
]

OPTIONS = [
    Case(
        "unify_fused_scales: NVFP4 projections that a consumer fuses may be re-encoded",
        {},
        """
        a.q_proj.weight          U8[4,8]       repack  =  -
        a.q_proj.weight_scale    F8_E4M3[4,1]  repack  =  -
        a.q_proj.weight_scale_2  F32[]         repack  =  -
        a.k_proj.weight          U8[4,8]       repack  =  -
        a.k_proj.weight_scale    F8_E4M3[4,1]  repack  =  -
        a.k_proj.weight_scale_2  F32[]         repack  =  -
        a.o_proj.weight          U8[4,8]       keep    =  -
        a.o_proj.weight_scale    F8_E4M3[4,1]  keep    =  -
        a.o_proj.weight_scale_2  F32[]         keep    =  -
        """,
        Policy(unify_fused_scales=True),
        MODELOPT,
    ),
    Case(
        "on_mismatch=repack: a blob whose sides are known to differ by scaling alone is re-encoded once",
        AB,
        """
        a.q_proj.weight          U8[4,8]       repack  =                         t
        a.q_proj.weight_scale    F8_E4M3[4,1]  repack  =                         t
        a.q_proj.weight_scale_2  F32[]         repack  =                         t
        b.q_proj.weight          U8[4,8]       drop    a.q_proj.weight           t
        b.q_proj.weight_scale    F8_E4M3[4,1]  drop    a.q_proj.weight_scale     t
        b.q_proj.weight_scale_2  F32[]         drop    a.q_proj.weight_scale_2   t
        """,
        Policy(on_mismatch="repack"),
        MODELOPT,
        {"repacked": {"t": frozenset({"a.q_proj"})}},
    ),
    Case(
        "fill_missing_scales: an expert that lacks its projection's activation scale gets one",
        {},
        """
        a.experts.0.up_proj.weight       F8_E4M3[4,4]  keep  =  -
        a.experts.0.up_proj.input_scale  F32[]         keep  =  -
        a.experts.1.up_proj.weight       F8_E4M3[4,4]  keep  =  -
        """,
        Policy(fill_missing_scales=True),
        MODELOPT,
        added=("a.experts.1.up_proj.input_scale",),
    ),
    Case(
        "fill_missing_scales: none where no value can be chosen",
        {},
        """
        a.experts.0.up_proj.weight       F8_E4M3[4,4]  keep  =  -
        a.experts.0.up_proj.input_scale  F32[]         keep  =  -
        a.experts.1.up_proj.weight       F8_E4M3[4,4]  keep  =  -
        """,
        Policy(fill_missing_scales=True),
        MODELOPT,
        {"unfillable": frozenset({"a.experts.1.up_proj.input_scale"})},
    ),
    Case(
        "fill_missing_scales: an alias's scale is the canonical expert's",
        {"t": [(f"a.experts.{e}.up_proj.weight", f"b.experts.{e}.up_proj.weight") for e in range(2)]},
        """
        a.experts.0.up_proj.weight       F8_E4M3[4,4]  keep    =                                t
        a.experts.1.up_proj.weight       F8_E4M3[4,4]  keep    =                                t
        b.experts.0.up_proj.weight       F8_E4M3[4,4]  drop    a.experts.0.up_proj.weight       t
        b.experts.0.up_proj.input_scale  F32[]         rename  a.experts.0.up_proj.input_scale  t
        b.experts.1.up_proj.weight       F8_E4M3[4,4]  drop    a.experts.1.up_proj.weight       t
        """,
        Policy(fill_missing_scales=True),
        MODELOPT,
        added=("a.experts.1.up_proj.input_scale",),
    ),
]

SIDE_B_NEEDED = NeededNames("a consumer", frozenset({"b.q_proj.weight_scale", "b.q_proj.input_scale"}))
NAMES = [
    Case(
        "a name that a consumer needs stays, though another tensor stands for it",
        {"t": [("embed.weight", "head.weight")]},
        """
        embed.weight  BF16[4,4]  keep  =  t
        head.weight   BF16[4,4]  keep  =  t
        """,
        known={"needed": NeededNames("a consumer", frozenset({"head.weight"}))},
        warning="1 tensor of a tied module stays on every side, with one value: a consumer needs the names",
    ),
    Case(
        "what is equal is kept as it is, a merged scale is written on both sides, the rest goes",
        AB,
        """
        a.q_proj.weight        F8_E4M3[4,8]  keep   =                t
        a.q_proj.weight_scale  F32[]         keep   =                t
        a.q_proj.input_scale   F32[]         merge  =                t
        b.q_proj.weight        F8_E4M3[4,8]  drop   a.q_proj.weight  t
        b.q_proj.weight_scale  F32[]         keep   =                t
        b.q_proj.input_scale   F32[]         merge  =                t
        """,
        config=MODELOPT,
        known={"needed": SIDE_B_NEEDED},
        warning="2 tensors",
        merges={"a.q_proj.input_scale": ("a.q_proj.input_scale", "b.q_proj.input_scale")},
    ),
    Case(
        "of three sides only the one that is needed stays",
        {"t": [("a.q_proj.weight", "b.q_proj.weight", "c.q_proj.weight")]},
        """
        a.q_proj.input_scale   F32[]      merge  =                     t
        a.q_proj.weight        BF16[4,8]  keep   =                     t
        b.q_proj.input_scale   F32[]      merge  =                     t
        b.q_proj.weight        BF16[4,8]  drop   a.q_proj.weight       t
        c.q_proj.input_scale   F32[]      drop   a.q_proj.input_scale  t
        c.q_proj.weight        BF16[4,8]  drop   a.q_proj.weight       t
        """,
        known={"needed": SIDE_B_NEEDED},
        warning="1 tensor of a tied module stays",
        merges={"a.q_proj.input_scale": ("a.q_proj.input_scale", "b.q_proj.input_scale", "c.q_proj.input_scale")},
    ),
    Case(
        "a KV-cache scale too",
        {"t": [("a.k_proj.weight", "b.k_proj.weight")]},
        """
        a.k_proj.k_scale  F32[]      merge  =                t
        a.k_proj.weight   BF16[4,8]  keep   =                t
        b.k_proj.k_scale  F32[]      merge  =                t
        b.k_proj.weight   BF16[4,8]  drop   a.k_proj.weight  t
        """,
        Policy(kv_scales="merge"),
        known={"needed": NeededNames("a consumer", frozenset({"b.k_proj.k_scale"}))},
        warning="1 tensor of a tied module stays",
        merges={"a.k_proj.k_scale": ("a.k_proj.k_scale", "b.k_proj.k_scale")},
    ),
    Case(
        "where the canonical side is absent its name is taken, needed or not",
        {"t": [("embed.weight", "head.weight")]},
        """
        head.weight   BF16[4,4]  rename  embed.weight  t
        """,
        known={"needed": NeededNames("a consumer", frozenset({"head.weight"}))},
    ),
    Case(
        "needed names change nothing where the headers refute the tie",
        AB,
        """
        a.q_proj.weight  BF16[4,4]  keep  =  t
        b.q_proj.weight  BF16[4,5]  keep  =  t
        """,
        known={"needed": NeededNames("a consumer", frozenset({"b.q_proj.weight"}))},
        reason="is BF16 [4, 4] but",
    ),
]
"""A consumer needs names that a tie would drop."""

CASES = [*WEIGHTS, *SCALES_AND_BUFFERS, *REFUSED, *ONE_SIDE_DIFFERS, *SMOOTHING, *OPTIONS, *NAMES]


def read(table: str) -> tuple[list[TensorEntry], dict[str, tuple[str, str, str | None]]]:
    """The tensors of a case's table, one after the other in one file, and what is to become of each."""
    entries: list[TensorEntry] = []
    wanted: dict[str, tuple[str, str, str | None]] = {}
    at = 8
    for line in table.strip().splitlines():
        key, header, action, target, group = line.split()
        found = re.fullmatch(r"(\w+)\[([\d,]*)\]", header)
        assert found is not None, header
        dtype, shape = found[1], tuple(map(int, filter(None, found[2].split(","))))
        size = DTYPE_BITS[dtype] // 8
        for length in shape:
            size *= length
        entries.append(TensorEntry(key, dtype, shape, 0, at, at + size))
        at += size
        wanted[key] = (action, key if target == "=" else target, None if group == "-" else group)
    return entries, wanted


def checkpoint_of(entries: Sequence[TensorEntry], config: Mapping[str, Any] | None = None) -> Checkpoint:
    """A source in which `entries` stand: headers alone, nothing on disk."""
    shards = tuple(
        Shard(f"{n}.safetensors", Path(f"{n}.safetensors"), 0, 0, 0, 8, {}) for n in sorted({e.shard for e in entries})
    )
    made = Checkpoint.of(Path(), shards, {entry.name: entry for entry in entries})
    return replace(made, config=dict(config or {}))


def ties_of(groups: Mapping[str, Slots], owned: frozenset[str] = frozenset()) -> DiskTies:
    made = [
        TieGroup(name, name, slots[0][1:], ("test",) * (len(slots[0]) - 1), slots)
        for name, slots in ((name, tuple(slots)) for name, slots in groups.items())
    ]
    return DiskTies(tuple(made), owned, ())


def planned(case: Case) -> RewritePlan:
    entries, _ = read(case.table)
    return plan(checkpoint_of(entries, case.config), ties_of(case.ties, case.owned), case.policy, **case.known)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.rule)
def test_plan(case: Case) -> None:
    entries, wanted = read(case.table)
    made = planned(case)
    fates = {name: (fate.action.value, fate.target, fate.group) for name, fate in made.tensors.items()}
    assert fates == wanted
    assert list(fates) == [entry.name for entry in entries], "in the order of the source"
    # The output holds what is not dropped, under its new name, and what is added; every byte of it once.
    stays = {target: name for name, (action, target, _) in wanted.items() if action != "drop"}
    sizes = {entry.name: entry.nbytes for entry in entries}
    out = [tensor for shard in made.shards for tensor in shard.tensors]
    assert {tensor.name: tensor.source for tensor in out if not tensor.added} == stays
    assert {tensor.name for tensor in out if tensor.added} == set(case.added)
    assert all(tensor.end - tensor.start == sizes[tensor.source] for tensor in out)
    # Each group counts what is dropped for it, and says why it is not confirmed.
    for group in made.groups:
        mine = [name for name, (action, _, owner) in wanted.items() if action == "drop" and owner == group.id]
        assert (group.dropped, group.dropped_bytes) == (len(mine), sum(sizes[name] for name in mine))
    reasons = [group.reason for group in made.groups if group.status == "unconfirmed"]
    assert all(reasons)
    assert bool(reasons) == (case.reason is not None)
    assert case.reason is None or any(case.reason in reason for reason in reasons if reason is not None)
    assert (case.warning is None) == (not made.warnings)
    assert case.warning is None or any(case.warning in warning for warning in made.warnings)
    differing = {group.id: tuple(group.differing_aliases) for group in made.groups if group.differing_aliases}
    assert differing == case.differing
    merges = {merge.target: merge.keys for group in made.groups for merge in group.merges}
    assert all(merges.get(target) == keys for target, keys in case.merges.items())
    # A name that a consumer needs is written with the merge that covers it; every other merge has its own target.
    kept = {name for group in made.groups for name in group.kept_names}
    covered = {*merges, *(key for keys in merges.values() for key in keys if key in kept)}
    assert all(target in covered for target, (action, _, _) in wanted.items() if action == "merge")


def case_of(rule: str) -> Case:
    (case,) = [case for case in CASES if case.rule == rule]
    return case


def test_what_must_be_equal_is_listed_slot_by_slot_and_the_first_side_first() -> None:
    (group,) = planned(case_of("everything computed from the weight goes with it")).groups
    parts = ("weight", "weight_scale", "weight_scale_2")
    assert list(group.checks) == [(f"a.q_proj.{part}", f"b.q_proj.{part}") for part in parts]
    assert group.status == "planned"


def test_a_smoothed_neighbour_is_among_the_checks_but_not_among_the_dropped() -> None:
    group = planned(
        Case(
            "",
            {
                "t": [("a.layers.0.q_proj.weight", "b.layers.0.q_proj.weight")],
                "n": [("a.layers.0.input_layernorm.weight", "b.layers.0.input_layernorm.weight")],
            },
            """
            a.layers.0.input_layernorm.weight  BF16[4]   keep  =  n
            a.layers.0.q_proj.weight           U8[4,2]   keep  =  t
            a.layers.0.q_proj.weight_scale     F32[4,1]  keep  =  t
            b.layers.0.input_layernorm.weight  BF16[4]   keep  =  n
            b.layers.0.q_proj.weight           U8[4,2]   keep  =  t
            b.layers.0.q_proj.weight_scale     F32[4,1]  keep  =  t
            """,
            config=SMOOTHED,
        )
    ).by_id["t"]
    assert ("a.layers.0.input_layernorm.weight", "b.layers.0.input_layernorm.weight") in list(group.checks)
    assert group.dropped == 2


def test_a_group_of_one_side_alone_is_canonical() -> None:
    (group,) = planned(case_of("one side alone is what the right export has: nothing to do")).groups
    assert (group.status, list(group.checks), list(group.merges)) == ("canonical", [], [])


def test_kv_scales_with_biases_name_what_has_to_be_equal() -> None:
    made = planned(
        case_of("with biases KV-cache scales are merged only if both are equal: the bias has no common value")
    )
    (group,) = made.groups
    rows = (
        ("a.attn.k_proj.k_bias", "b.attn.k_proj.k_bias"),
        ("a.attn.k_proj.k_scale", "b.attn.k_proj.k_scale"),
    )
    assert [(merge.kv, merge.only_if_equal) for merge in group.merges] == [(True, rows), (True, rows)]


def test_a_repacked_blob_is_no_check_any_more() -> None:
    made = planned(
        case_of("on_mismatch=repack: a blob whose sides are known to differ by scaling alone is re-encoded once")
    )
    (group,) = made.groups
    parts = ("weight", "weight_scale", "weight_scale_2")
    assert list(group.checks) == []
    assert list(group.differing) == [(f"a.q_proj.{part}", f"b.q_proj.{part}") for part in parts]
    assert group.repacked == {"a.q_proj"}


def test_the_scales_of_experts_are_listed_by_projection() -> None:
    rule = "fill_missing_scales: an expert that lacks its projection's activation scale gets one"
    (found,) = planned(case_of(rule)).expert_scales
    assert found.name == "a.experts.*.up_proj.input_scale"
    assert dict(found.members) == {"a.experts.0.up_proj.input_scale": "a.experts.0.up_proj.input_scale"}
    assert found.missing == ("a.experts.1.up_proj.input_scale",)


# ------------------------------------------------------------------------------------------ where the survivors stand


def layout(made: RewritePlan) -> dict[str, list[tuple[str, int, int]]]:
    return {shard.name: [(t.name, t.start, t.end) for t in shard.tensors] for shard in made.shards}


LAYOUT = [
    TensorEntry("a", "U8", (4,), 0, 8, 12),
    TensorEntry("b", "F32", (2,), 0, 12, 20),
    TensorEntry("c", "U8", (4,), 1, 8, 12),
    TensorEntry("d", "BF16", (2,), 1, 12, 16),
]


def test_wide_dtypes_come_first_and_else_the_order_of_the_source() -> None:
    made = plan(checkpoint_of(LAYOUT), ties_of({}), Policy(max_shard_size=100))
    assert layout(made) == {"model.safetensors": [("b", 0, 8), ("d", 8, 12), ("a", 12, 16), ("c", 16, 20)]}
    assert made.total_bytes == made.source_bytes == 20


def test_the_fullest_shard_of_the_source_is_the_limit() -> None:
    made = plan(checkpoint_of(LAYOUT), ties_of({}))
    assert layout(made) == {
        "model-00001-of-00002.safetensors": [("b", 0, 8), ("a", 8, 12)],
        "model-00002-of-00002.safetensors": [("d", 0, 4), ("c", 4, 8)],
    }


IN_ORDER = [
    TensorEntry("b", "F32", (2,), 0, 8, 16),
    TensorEntry("a", "U8", (2,), 0, 16, 18),
    TensorEntry("d", "U8", (8,), 1, 8, 16),
    TensorEntry("e", "F32", (1,), 2, 8, 12),
    TensorEntry("f", "U8", (3,), 2, 12, 15),
]
"""Three files with the wide dtypes first, as a rewrite writes them; the last would have room for more."""


def sharded(made: RewritePlan) -> list[list[str]]:
    return [[tensor.name for tensor in shard.tensors] for shard in made.shards]


def test_files_that_stay_whole_stay_as_they_are() -> None:
    """So that a canonical checkpoint comes out as it went in; split again, `a` and `d` would change places."""
    assert sharded(plan(checkpoint_of(IN_ORDER), ties_of({}))) == [["b", "a"], ["d"], ["e", "f"]]


def test_a_file_of_aliases_alone_goes_and_the_others_stay() -> None:
    entries = [*IN_ORDER, TensorEntry("alias", "U8", (8,), 3, 8, 16)]
    made = plan(checkpoint_of(entries), ties_of({"t": [("d", "alias")]}))
    assert sharded(made) == [["b", "a"], ["d"], ["e", "f"]]
    assert [shard.name for shard in made.shards] == [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]


def test_a_limit_that_takes_fewer_files_or_smaller_ones_splits_again() -> None:
    assert sharded(plan(checkpoint_of(IN_ORDER), ties_of({}), Policy(max_shard_size=10))) == [
        ["b", "a"],
        ["d"],
        ["e", "f"],
    ]
    assert len(plan(checkpoint_of(IN_ORDER), ties_of({}), Policy(max_shard_size=100)).shards) == 1
    assert len(plan(checkpoint_of(IN_ORDER), ties_of({}), Policy(max_shard_size=8)).shards) == 4


def test_max_shard_size_limits_each_file() -> None:
    made = plan(checkpoint_of(LAYOUT), ties_of({}), Policy(max_shard_size=8))
    assert [shard.nbytes for shard in made.shards] == [4, 8, 8]
    assert sorted(tensor.name for shard in made.shards for tensor in shard.tensors) == ["a", "b", "c", "d"]


@given(st.lists(st.integers(0, 12), min_size=1, max_size=30), st.integers(1, 20))
def test_files_are_split_as_hugging_face_splits(sizes: list[int], limit: int) -> None:
    theirs = split_state_dict_into_shards_factory(
        {str(at): size for at, size in enumerate(sizes)},
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    ours = [[str(at) for at in members] for members in split(np.array(sizes), limit)]
    assert ours == list(theirs.filename_to_tensors.values())


def test_a_checkpoint_without_tensors_is_one_empty_file() -> None:
    assert layout(plan(checkpoint_of([]), ties_of({}))) == {"model.safetensors": []}


# ---------------------------------------------------------------------------------------------- many slots of one tie

EXPERTS = 300
SUFFIXES = ("weight", "weight_scale", "weight_scale_2", "input_scale")
Headers = dict[str, tuple[str, tuple[int, ...]]]


def module(side: str, expert: int) -> str:
    return f"{side}.experts.{expert}.up_proj"


def headers() -> Headers:
    return {
        f"{module(side, expert)}.{suffix}": ("U8", (2,)) if suffix == "weight" else ("F32", ())
        for side in ("a", "b")
        for expert in range(EXPERTS)
        for suffix in SUFFIXES
    }


def slots_of(experts: Sequence[int]) -> list[tuple[str, ...]]:
    return [(f"{module('a', expert)}.weight", f"{module('b', expert)}.weight") for expert in experts]


def planned_of(made: Headers, groups: Mapping[str, Slots], owned: str = "") -> RewritePlan:
    entries = [TensorEntry(key, dtype, shape, 0, 0, 4) for key, (dtype, shape) in made.items()]
    return plan(checkpoint_of(entries, MODELOPT), ties_of(groups, frozenset({owned})))


def fate_of(made: RewritePlan, key: str) -> tuple[str, str, bool]:
    fate = made.tensors[key]
    return fate.action.value, fate.target, fate.merged


def unchanged(made: Headers) -> None: ...


def a_side_lacks_a_scale(made: Headers) -> None:
    del made[f"{module('a', 123)}.input_scale"]


def another_suffix(made: Headers) -> None:
    for side in ("a", "b"):
        made[f"{module(side, 123)}.bias"] = ("F32", (1,))


def an_expert_under_the_aliases_name_alone(made: Headers) -> None:
    for suffix in SUFFIXES:
        del made[f"{module('a', 7)}.{suffix}"]


@pytest.mark.parametrize("owned", ["", f"{module('b', 50)}.input_scale"])
@pytest.mark.parametrize(
    "change", [unchanged, a_side_lacks_a_scale, another_suffix, an_expert_under_the_aliases_name_alone]
)
def test_slots_planned_together_come_out_as_one_by_one(change: Callable[[Headers], None], owned: str) -> None:
    made = headers()
    change(made)
    slots = slots_of(range(EXPERTS))
    together = planned_of(made, {"t": slots}, owned)
    alone = planned_of(made, {f"t{number}": [slot] for number, slot in enumerate(slots)}, owned)
    assert [fate_of(together, key) for key in made] == [fate_of(alone, key) for key in made]
    (group,) = together.groups
    assert list(group.checks) == [row for one in alone.groups for row in one.checks]
    assert list(group.merges) == [merge for one in alone.groups for merge in one.merges]
    assert group.dropped == sum(one.dropped for one in alone.groups)


def test_alike_slots_are_checked_and_merged_in_their_order() -> None:
    (group,) = planned_of(headers(), {"t": slots_of(range(EXPERTS))}).groups
    pairs = [(module("a", expert), module("b", expert)) for expert in range(EXPERTS)]
    assert list(group.checks) == [(f"{a}.{part}", f"{b}.{part}") for a, b in pairs for part in SUFFIXES[:3]]
    assert [(merge.target, merge.keys) for merge in group.merges] == [
        (f"{a}.input_scale", (f"{a}.input_scale", f"{b}.input_scale")) for a, b in pairs
    ]
    assert group.dropped == 4 * EXPERTS


@pytest.mark.parametrize("owned", ["", f"{module('b', 50)}.input_scale"])
def test_of_a_tensor_in_two_slots_the_later_one_decides(owned: str) -> None:
    slots = slots_of(range(30))
    turned = slots[5][::-1]
    made = planned_of(headers(), {"t": [*slots[:20], turned, *slots[20:], slots[6]]}, owned)
    assert fate_of(made, f"{module('b', 5)}.weight")[0] == "keep"
    assert fate_of(made, f"{module('a', 5)}.weight")[:2] == ("drop", f"{module('b', 5)}.weight")
    assert fate_of(made, f"{module('b', 6)}.weight")[:2] == ("drop", f"{module('a', 6)}.weight")
    (group,) = made.groups
    assert list(group.checks).count((f"{module('a', 6)}.weight", f"{module('b', 6)}.weight")) == 2


def test_the_first_refuted_slot_is_named() -> None:
    made = headers()
    for expert in (299, 288, 131):
        made[f"{module('b', expert)}.weight"] = ("U8", (2, 1))
    (group,) = planned_of(made, {"t": slots_of(range(EXPERTS))}).groups
    assert group.status == "unconfirmed"
    assert group.reason == f"'{module('a', 131)}.weight' is U8 [2] but '{module('b', 131)}.weight' is U8 [2, 1]"


def test_an_unknown_suffix_at_the_very_end_is_found() -> None:
    made = headers()
    made[f"{module('b', 99)}.zzz"] = ("F32", ())
    (group,) = planned_of(made, {"t": slots_of(range(EXPERTS))}).groups
    assert group.reason == (
        f"no known format has the tensor '{module('b', 99)}.zzz' (suffix 'zzz') beside the tied parameter "
        f"'{module('b', 99)}.weight'"
    )


@pytest.mark.parametrize("form", ["m.a{}", "m.a{}.weight", "a{}.weight"])
def test_refused_ties_cost_no_look_at_every_name_of_their_module(form: str, tmp_path: Path) -> None:
    def calls(ties: int) -> int:
        folder = tmp_path / str(ties)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        tensors = {f"m.x{i}": ("U8", [4], 4) for i in range(4 * ties)}
        declared = {}
        for i in range(ties):
            name = form.format(i)
            alias = name.replace("a", "b", 1)
            tensors |= {name: ("U8", [8], 8), alias: ("U8", [9], 9)}
            declared[alias] = name
        write_sparse_shard(folder / "model.safetensors", tensors)
        made, number = count_calls(lambda: tierewrite.plan(folder, ties=declared))
        assert len(made.unconfirmed()) == ties
        return number

    calls(1)  # what is made once
    assert calls(800) < 2.5 * calls(400)
