"""Orphans: what belonged to a packed weight and stayed in DST under its own name, while the weight itself went.

A side of a tie goes whole or stays whole. An orphan shows that it was torn: SRC held `b.q_proj.weight` and
`b.q_proj.svdquant_lora_a`, DST holds the factor alone, and side b cannot be loaded.

This is a reading of its own: it shares names, dtypes and sizes of tensors with the rest of verification, and the list
of keys that the model class calls parameters. It does not ask formats/, nor which ties are confirmed: a suffix that the
tables lack, or have wrong, would make the rewrite and the proof blind in the same way. So what follows repeats on
purpose, in short, what formats/ says at length. It is meant to find a torn module of any format, known or not.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from tierewrite.source.table import TensorEntry

# What a module's weight is called, packed or not, by the exporters that call it something else than it is in memory.
_WEIGHTS = (
    "weight", "weight_packed", "qweight", "weight._data", "weight._data._data", "_weight_qdata", "trellis", "W_q",
)  # fmt: skip
# A parameter's codes: gpt-oss' MXFP4, torchao.
_BLOCKS = ("_blocks", "_qdata", "_packed_weights", "_packed_weight", "_qdata_and_metadata")
# Tensors beside a weight that do not belong to it: biases with all of theirs, and ranges of the KV cache.
_NOT_OF_WEIGHT = re.compile(r"(.+_)?bias(_scale|_zero_point)?(_2)?|[kvq]_(scale|bias|zero_point|global_scale)|kv_scale")
_KV_OUTPUT = re.compile(r"(.+\.)?[kv]_proj\.output_(scale|zero_point|global_scale)")
# Dtypes of weights that are not quantized; all others are packed, and need what stands beside them.
_PLAIN = frozenset({"F64", "F32", "F16", "BF16", "C64", "I64", "U64", "BOOL"})


def orphans(
    source: Mapping[str, TensorEntry], target: Collection[str], owned: Collection[str]
) -> Iterator[tuple[str, str]]:
    """(orphan, the weight that is gone) for each tensor of `target` that is one.

    Args:
        source: the tensors of SRC, key -> header.
        target: the names of DST's tensors.
        owned: keys of SRC that the model class calls parameters or buffers of their own.
    """
    gone_below: dict[str, list[str]] = {}
    for key in source:
        if key not in target:
            gone_below.setdefault(key.rpartition(".")[0], []).append(key)
    if not gone_below:
        return
    modules = {*gone_below, *(parent.removesuffix("._data").removesuffix(".weight") for parent in gone_below)}
    for key in source:
        parent, _, leaf = key.rpartition(".")
        above = parent.rpartition(".")[0]
        near = parent in modules or above in modules or above.rpartition(".")[0] in modules
        if not near or key not in target or key in owned or _NOT_OF_WEIGHT.fullmatch(leaf) or _KV_OUTPUT.fullmatch(key):
            continue
        main = _main_of(key, source, gone_below)
        if main is not None and main not in target:
            yield key, main


def _main_of(key: str, source: Mapping[str, TensorEntry], gone_below: Mapping[str, list[str]]) -> str | None:
    """The packed tensor of SRC that `key` belongs to; None where it belongs to none, or is one itself."""
    parent, _, leaf = key.rpartition(".")
    if leaf in _WEIGHTS or leaf.endswith(_BLOCKS) or key.endswith((".weight._data", ".weight._data._data")):
        return None
    # x.weight.absmax, x.weight.quant_state.nf4: below the very name of a tensor.
    above = parent
    while above:
        if above in source:
            return above
        above = above.rpartition(".")[0]
    # gate_up_proj_scales, codes_table: begins with another tensor's name.
    words = leaf.split("_")
    for count in range(1, len(words)):
        stem = key.removesuffix("_" + "_".join(words[count:]))
        for name in (stem, *(stem + end for end in _BLOCKS)):
            if name != key and name in source and source[name].dtype not in _PLAIN:
                return name
    # q_proj.input_scale, q_proj.weight_quantizer.lora_a, q_proj.weight._scale: beside a weight.
    for module in (parent, parent.rpartition(".")[0]):
        for weight in _WEIGHTS:
            name = f"{module}.{weight}" if module else weight
            if name in source and source[name].dtype not in _PLAIN:
                return name
    # Of a format that nobody knows: beside the largest tensor that is gone, if that is packed and this is not. Nothing
    # but what is called after it belongs to a bias.
    gone = [name for name in gone_below.get(parent, ()) if not _NOT_OF_WEIGHT.fullmatch(name.rpartition(".")[2])]
    if source[key].dtype in _PLAIN and gone:
        largest = max(gone, key=lambda name: source[name].nbytes)
        if source[largest].dtype not in _PLAIN and source[largest].nbytes > source[key].nbytes:
            return largest
    return None
