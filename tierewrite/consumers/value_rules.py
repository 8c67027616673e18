"""What is broken in the values of weights, whoever loads them: rules for `check --values`.

What is evidence and what is not: a NaN or an infinity in a weight is always wrong. Zeros are not: biases, routers,
adapters and the padding rows of a vocabulary may be zero. So zeros count in linear layers alone, and as an error where
an expert is all zero among experts that are not. How far weights reach differs from layer to layer; experts of a layer
are alike, within a factor of ten at most, so that only an expert that is far off its siblings is told.

Cases: vllm-project/vllm pull requests 53537 (a file broken in transfer), 45320 and 54444 (scales that an exporter left
out or that are zero or not finite).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from tierewrite import formats
from tierewrite.consumers.findings import Finding
from tierewrite.consumers.rules import Rule, RuleSet
from tierewrite.consumers.subject import Subject
from tierewrite.consumers.values import Values, kind_of, leaf_of, read_values, sampled
from tierewrite.formats.experts import split_expert
from tierewrite.formats.nvfp4_blobs import blob_of
from tierewrite.numbers.extremes import values_of
from tierewrite.source.table import TensorEntry
from tierewrite.tables import count

OFF = 32.0
"""An expert whose values reach so many times further than its siblings' median, or less far, is told."""
FEWEST_SIBLINGS = 4
MANY, SHARE = 16, 0.1
"""Block scales at a limit: so many, and that part of a weight's, or all of at least `FEWEST_SIBLINGS`."""
E2M1_LARGEST = 6.0
SCALES = ("weight_scale", "weight_scale_inv", "scale")
F16_LARGEST = 65504.0
_NOT_LINEAR = re.compile(
    r"(^|\.)(gate|router|shared|wte|wpe|score|classifier)(\.|$)|embed|position|router|lm_head|lora_|norm|conv|mask|rotary"
)
VALUE_RULES: RuleSet[Looked]


@dataclass
class Looked:
    """What was read of a checkpoint.

    Attributes:
        entries: all of its headers, by name.
        values: the tensors that were read.
        vocabularies: the sizes of vocabularies that the config names.
    """

    entries: Mapping[str, TensorEntry]
    values: Mapping[str, Values]
    vocabularies: frozenset[int] = field(default_factory=frozenset)

    @cached_property
    def weights(self) -> dict[str, Values]:
        """The matrices of linear layers and experts; not embeddings, heads and routers, nor scales."""
        return {name: values for name, values in self.values.items() if self._is_linear(values.entry)}

    def _is_linear(self, entry: TensorEntry) -> bool:
        expert = "experts." in entry.name
        if len(entry.shape) != 2 and not (expert and len(entry.shape) == 3):
            return False
        part = formats.part_of_weight(entry.name)
        if part is not None and not part[1].main:
            return False
        if formats.is_own_parameter(entry.name) or _NOT_LINEAR.search(entry.name):
            return False
        return expert or entry.shape[0] not in self.vocabularies

    @cached_property
    def reaches(self) -> dict[str, npt.NDArray[np.float64]]:
        """Weight -> [matrices], how far its rows reach: the median of their largest decoded magnitudes.

        A weight whose scales were not read is not here. Scales are taken by their medians: it is about orders of
        magnitude.
        """
        found: dict[str, npt.NDArray[np.float64]] = {}
        for name, values in self.weights.items():
            factor = self._factor(name, values)
            if factor is not None:
                found[name] = values.spread() * factor
        return found

    def _factor(self, name: str, values: Values) -> Any:
        """What the elements of a weight are multiplied with, one number or one a matrix; None if it is not known."""
        scales = self.scales_of(name, values)
        if values.kind == "E2M1":
            if len(scales) < 2:
                return None
            blocks, whole = scales
            number = whole.spread()[0]
            if whole.entry.name.endswith("global_scale"):  # compressed-tensors stores the reciprocal
                number = 1 / number if number else 0.0
            return E2M1_LARGEST * blocks.spread() * number
        if not scales:
            return None if values.kind == "I8" else 1.0
        spread = scales[0].spread()
        return spread if len(spread) in (1, values.matrices) else float(np.median(spread))

    def scales_of(self, name: str, values: Values) -> list[Values]:
        """The scales of a weight that were read: of NVFP4 those of its blocks and the one of all; else one or none."""
        module = name.rpartition(".")[0]
        if values.kind == "E2M1":
            _, parts = blob_of(name, self.entries)
            assert parts is not None
            names = [f"{module}.{part}" for part in parts[1:]]
        elif values.kind in ("F8_E4M3", "F8_E5M2", "I8"):
            names = [f"{module}.{suffix}" for suffix in SCALES] + [f"{name}_scale", f"{name}_scale_inv"]
        else:
            return []
        found = [self.values[scale] for scale in dict.fromkeys(names) if scale in self.values]
        return found if values.kind == "E2M1" else found[:1]

    def zero_rows(self, name: str, values: Values) -> npt.NDArray[np.bool_]:
        """bool [rows], of which rows nothing is left once they are decoded: their codes or their scales are zero."""
        zero = values.zero_rows()
        for scale in self.scales_of(name, values):
            of_scale = scale.zero_rows()
            if len(of_scale) in (1, len(zero)):
                zero = zero | of_scale
        return zero

    @cached_property
    def siblings(self) -> list[dict[str, float]]:
        """The experts of one layer and one projection: what names each -> how far it reaches."""
        groups: dict[tuple[str, str], dict[str, float]] = {}
        fused: list[dict[str, float]] = []
        for name, reach in self.reaches.items():
            if len(reach) > 1:
                fused.append({f"{name}[{number}]": value for number, value in enumerate(reach.tolist())})
                continue
            container, number, projection = split_expert(name.rpartition(".")[0])
            if number is not None:
                groups.setdefault((container, projection), {})[name] = float(reach[0])
        return [*groups.values(), *fused]


VALUE_RULES = RuleSet()

VALUES_NOT_FINITE = Rule(
    id="values-not-finite",
    title="tensors hold NaN or infinity",
    severity="error",
    consequence="whatever passes through them becomes NaN",
    fix="compare the files' digests with those at their source and fetch them again, or export again",
    source="check --values; vllm-project/vllm pull request 53537",
)


@VALUE_RULES.add(VALUES_NOT_FINITE)
def not_finite(s: Looked) -> Iterator[Finding]:
    """A mask may hold infinities; no weight and no scale does."""
    nan: list[str] = []
    infinite: list[str] = []
    for name, values in s.values.items():
        with_nan, with_infinity = values.not_finite()
        if with_nan:
            nan.append(name)
        elif with_infinity and "mask" not in name:
            infinite.append(name)
    if nan or infinite:
        yield VALUES_NOT_FINITE.at((*nan, *infinite), f"{len(nan)} tensors hold NaN, {len(infinite)} others infinity")


VALUES_TOO_LARGE = Rule(
    id="values-too-large",
    title="weights are larger than the largest F16",
    severity="error",
    consequence="no model has such weights: the bytes are not those that were written, or their dtype is wrong",
    fix="compare the files' digests with those at their source and fetch them again, or export again",
    source="check --values; vllm-project/vllm pull request 53537",
)


@VALUE_RULES.add(VALUES_TOO_LARGE)
def too_large(s: Looked) -> Iterator[Finding]:
    """Matrices alone: a buffer may hold the lowest number of its dtype as a mask."""
    names: list[str] = []
    largest = 0.0
    for name, values in s.values.items():
        if values.kind in ("BF16", "F32", "F64") and len(values.entry.shape) > 1 and "mask" not in name:
            reach = values_of(values.largest, values.kind)
            reach = reach[np.isfinite(reach)]
            if len(reach) and reach.max() > F16_LARGEST and not formats.is_companion(leaf_of(name)):
                names.append(name)
                largest = max(largest, float(reach.max()))
    if names:
        yield VALUES_TOO_LARGE.at(names, f"{len(names)} tensors hold numbers up to {largest:.3g}")


EXPERT_OF_ZEROS = Rule(
    id="expert-of-zeros",
    title="all weights of an expert are zero, and those of its siblings are not",
    severity="error",
    consequence="tokens that are routed there get nothing from it",
    fix="compare the files' digests with those at their source and fetch them again, or export again",
    source="check --values; vllm-project/vllm issue 54189",
)


@VALUE_RULES.add(EXPERT_OF_ZEROS)
def experts_of_zeros(s: Looked) -> Iterator[Finding]:
    """Zero after its scales: codes, block scales or the tensor's scale are zero."""
    zero = [name for siblings in s.siblings if any(siblings.values()) for name, reach in siblings.items() if reach == 0]
    if zero:
        yield EXPERT_OF_ZEROS.at(zero, f"{len(zero)} weights of experts are zero, and their siblings are not")


EXPERT_OFF = Rule(
    id="expert-off-its-siblings",
    title="the weights of an expert are orders of magnitude larger or smaller than those of its siblings",
    severity="error",
    consequence="its output drowns that of the others, or is lost in it",
    fix="compare its scales with those of its siblings; fetch the file again, or export again",
    source="check --values",
)


@VALUE_RULES.add(EXPERT_OFF)
def experts_off_their_siblings(s: Looked) -> Iterator[Finding]:
    """The median of the rows' largest decoded magnitudes, against the median of the experts of the layer."""
    off: list[str] = []
    furthest = 1.0
    for siblings in s.siblings:
        there = {name: reach for name, reach in siblings.items() if reach > 0 and np.isfinite(reach)}
        if len(there) < FEWEST_SIBLINGS:
            continue
        median = float(np.median(list(there.values())))
        for name, reach in there.items():
            ratio = max(reach / median, median / reach)
            if ratio >= OFF:
                off.append(name)
                furthest = max(furthest, ratio)
    if off:
        yield EXPERT_OFF.at(off, f"{len(off)} weights of experts are off their siblings', up to {furthest:.3g} times")


WEIGHT_OF_ZEROS = Rule(
    id="weight-of-zeros",
    title="all of a linear layer's weight is zero",
    severity="warning",
    consequence="the layer gives nothing, as in a model that was extended by new layers, or in a broken one",
    fix="if it is not meant so, fetch the file again, or export again",
    source="check --values",
)
ROWS_OF_ZEROS = Rule(
    id="rows-of-zeros",
    title="rows of a linear layer's weight are zero, and others are not",
    severity="warning",
    consequence="these outputs are zero, as in a model that was pruned or padded, or in a file with a hole",
    fix="if it is not meant so, compare the files' digests with those at their source and fetch them again",
    source="check --values; vllm-project/vllm pull request 53537",
)


@VALUE_RULES.add(WEIGHT_OF_ZEROS, ROWS_OF_ZEROS)
def zeros(s: Looked) -> Iterator[Finding]:
    """Not of embeddings, heads, routers, norms, adapters and biases; of experts only what is no expert of zeros."""
    whole: list[str] = []
    rows: list[str] = []
    zero_rows = 0
    told = {name for siblings in s.siblings if any(siblings.values()) for name, reach in siblings.items() if not reach}
    for name, values in s.weights.items():
        zero = s.zero_rows(name, values)
        if name not in told and len(zero) and zero.all():
            whole.append(name)
        elif name not in told:
            per_matrix = zero.reshape(values.matrices, -1)
            partly = per_matrix[~per_matrix.all(axis=1)]
            if partly.any():
                rows.append(name)
                zero_rows += int(partly.sum())
    if whole:
        yield WEIGHT_OF_ZEROS.at(whole, f"{len(whole)} weights of linear layers are zero")
    if rows:
        yield ROWS_OF_ZEROS.at(rows, f"{zero_rows} rows are zero, in {len(rows)} weights")


SCALES_AT_LIMIT = Rule(
    id="block-scales-at-limit",
    title="many block scales of an NVFP4 weight are the largest that E4M3 has",
    severity="error",
    consequence="larger weights were cut off there: the tensor's scale is too small",
    fix="export again; the tensor's scale has to be its largest magnitude / (6 * 448)",
    source="check --values; nvidia-modelopt torch/quantization/qtensor/nvfp4_tensor.py",
)
SCALES_AT_BOTTOM = Rule(
    id="block-scales-at-bottom",
    title="many block scales of an NVFP4 weight are zero or the smallest that E4M3 has, and their rows are not zero",
    severity="warning",
    consequence="smaller weights were lost there: the tensor's scale is too large",
    fix="export again; the tensor's scale has to be its largest magnitude / (6 * 448)",
    source="check --values; nvidia-modelopt torch/quantization/qtensor/nvfp4_tensor.py",
)


@VALUE_RULES.add(SCALES_AT_LIMIT, SCALES_AT_BOTTOM)
def block_scales(s: Looked) -> Iterator[Finding]:
    """One block of a tensor is at the limit by construction, with fused projections none may be."""
    top: list[str] = []
    bottom: list[str] = []
    for name, weight in s.weights.items():
        if weight.kind != "E2M1":
            continue
        module, parts = blob_of(name, s.entries)
        scales = s.values.get(f"{module}.{parts[1]}") if parts is not None else None
        if scales is None:
            continue
        alive = scales.elements * (1 - float(weight.zero_rows().mean()))  # blocks in rows that are not zero
        if _many(scales.at_limit, scales.elements):
            top.append(scales.entry.name)
        if _many(scales.at_bottom - (scales.elements - alive), alive):
            bottom.append(scales.entry.name)
    if top:
        yield SCALES_AT_LIMIT.at(top, f"{len(top)} weights have {SHARE:.0%} or more of their block scales at 448")
    if bottom:
        yield SCALES_AT_BOTTOM.at(bottom, f"{len(bottom)} weights have {SHARE:.0%} or more of theirs at 2^-9 or zero")


def _many(count: float, elements: float) -> bool:
    return elements >= FEWEST_SIBLINGS and (count >= elements or (count >= MANY and count >= SHARE * elements))


def vocabulary_sizes(config: Mapping[str, Any]) -> frozenset[int]:
    """Every `vocab_size` of a config, those of its parts too."""
    found: set[int] = set()
    for key, value in config.items():
        if isinstance(value, dict):
            found |= vocabulary_sizes(value)
        elif "vocab_size" in key and isinstance(value, int):
            found.add(value)
    return frozenset(found)


def look_at_values(
    subject: Subject,
    *,
    sample: int | None = None,
    device: str = "auto",
    advance: Callable[[int], None] | None = None,
) -> tuple[Finding, ...]:
    """What is wrong with the values of a checkpoint's weights. Reads them; what was not checked becomes a note.

    Args:
        subject: the checkpoint.
        sample: how many weights to read; None: all.
        device: "cpu", "cuda", or "auto": a GPU that CuPy can use, if there is one.
        advance: called with numbers of bytes as they are read.

    Raises:
        SourceChanged, SystemFailure: reading failed. Interrupted: a signal arrived.
    """
    entries = subject.entries
    kinds = {name: kind for name, entry in entries.items() if (kind := kind_of(entry, entries)) is not None}
    names = sampled(entries, kinds, sample)
    values = read_values(subject.folder, names, kinds, device=device, advance=advance)
    subject.bytes_read += sum(one.entry.nbytes for one in values.values())
    subject.notes.extend(_not_checked(entries, kinds, names, sample))
    looked = Looked(entries, values, vocabulary_sizes(subject.config))
    return tuple(VALUE_RULES.findings(looked))


def _not_checked(
    entries: Mapping[str, TensorEntry], kinds: Mapping[str, str], names: Collection[str], sample: int | None
) -> Iterator[str]:
    """Sentences on what was not looked at."""
    unread = [entry for name, entry in entries.items() if name not in kinds and entry.nbytes]
    if unread:
        dtypes = ", ".join(sorted({entry.dtype for entry in unread}))
        size = sum(entry.nbytes for entry in unread)
        tensors = count(len(unread), "tensor")
        yield f"the values of {tensors} ({size:,} bytes) were not checked: packed or integers ({dtypes})"
    if sample is not None and len(names) < len(kinds):
        yield f"the values of {count(len(kinds) - len(names), 'tensor')} were not checked: --sample {sample}"
