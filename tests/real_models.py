"""Facts of public models whose config.json and index were read, and the checkpoints that follow from them.

Neither file is here. A row says what decides the names and shapes, and how many tensors and bytes the index names; the
names themselves are made by the installed transformers (or, for code that it lacks, from patterns), and their digest
shows that they are those of the release. The rows are in real_models.json, one a line.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from tests import zoo

Config = dict[str, Any]


@dataclass(frozen=True)
class Packed:
    """Weights of `bits` bits with a scale for each `group` of inputs, of the modules whose names `of` matches.

    Attributes:
        form: "mlx" (weight, scales, biases) or "pack-quantized" (weight_packed, weight_scale, weight_shape).
    """

    form: str
    bits: int
    group: int
    of: str

    def parts(self, name: str, entry: zoo.Entry) -> dict[str, zoo.Entry]:
        """What one tensor becomes."""
        dtype, shape = entry
        module = name.removesuffix(".weight")
        if len(shape) != 2 or not re.search(self.of, module):
            return {name: entry}
        words, scales = (shape[0], shape[1] * self.bits // 32), (shape[0], shape[1] // self.group)
        if self.form == "mlx":
            return {name: ("U32", words), f"{module}.scales": (dtype, scales), f"{module}.biases": (dtype, scales)}
        packed: zoo.Entry = ("I32", words)
        return {
            f"{module}.weight_packed": packed,
            f"{module}.weight_scale": (dtype, scales),
            f"{module}.weight_shape": ("I64", (2,)),
        }


@dataclass(frozen=True, eq=False)
class RealModel:
    """One release.

    Attributes:
        hub: its id on the Hub, or that of the model it was made from, as the repository says it; "" if it does not.
        repository, commit, index: where the index was read; config.json is beside it unless `config_at` says where.
        tensors: how many names the index has.
        digest: BLAKE3 of these names, sorted, one a line.
        total_size: as the index says it; 0 in one that says 0.
        dtype: of all parameters.
        config: members of config.json that decide names, shapes and ties.
        stored: aliases of active ties that the release holds.
        counted_once: of these, those that total_size counts as one tensor with what they are tied to.
        of_files: whether total_size is that of the files, with their headers.
        renamed: how names begin in transformers, and in the release.
        buffers: what is stored beside the parameters: pattern of names -> dtype and shape.
        packed: how weights are quantized.
        patterns: all names, where transformers lacks the class: such a release is refused. Shapes are then not known.
        named: the class that transformers has for this model_type, where `architectures` names one that it lacks.
        warns: part of the warning that a plan gives; "" if there is none.
    """

    hub: str
    repository: str
    commit: str
    index: str
    tensors: int
    digest: str
    total_size: int
    config: Config
    dtype: str = "BF16"
    config_at: str = ""
    stored: tuple[str, ...] = ()
    counted_once: tuple[str, ...] = ()
    of_files: bool = False
    renamed: tuple[str, str] = ("", "")
    buffers: Mapping[str, zoo.Entry] = field(default_factory=dict)
    packed: Packed | None = None
    patterns: tuple[str, ...] = ()
    named: str = ""
    warns: str = ""

    @classmethod
    def of(cls, row: dict[str, Any]) -> RealModel:
        """From a row of the table, where lists stand for tuples and names to be ignored are patterns too."""
        row = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
        row["buffers"] = {key: (dtype, tuple(shape)) for key, (dtype, shape) in row.get("buffers", {}).items()}
        row["packed"] = Packed(**row["packed"]) if "packed" in row else None
        quantization = row["config"].get("quantization_config", {})
        if "ignore" in quantization:
            quantization["ignore"] = [name for pattern in quantization["ignore"] for name in spelled(pattern)]
        return cls(**row)

    @property
    def name(self) -> str:
        """For the name of a test."""
        folder = self.index.rpartition("/")[0].replace("/", "-")
        return self.repository.partition("/")[2] + (f"-{folder}" if folder else "")


@dataclass(frozen=True)
class Release:
    """The names and shapes of a release, and its ties.

    Attributes:
        real: as it was published.
        naive: the same with every alias of every active tie.
        drops: the aliases, each with the name that stands for it.
    """

    real: Mapping[str, zoo.Entry]
    naive: Mapping[str, zoo.Entry]
    drops: Mapping[str, str]


def spelled(pattern: str) -> list[str]:
    """The names of a pattern: `{0..2,7}` stands for these numbers, `{a,b}` for these words."""
    pieces: list[list[str]] = []
    for number, piece in enumerate(re.split(r"\{([^{}]*)\}", pattern)):
        choices = [piece] if number % 2 == 0 else []
        for word in piece.split(",") if number % 2 else ():
            first, dots, last = word.partition("..")
            choices += [str(n) for n in range(int(first), int(last) + 1)] if dots else [word]
        pieces.append(choices)
    return ["".join(chosen) for chosen in itertools.product(*pieces)]


def digest_of(names: Iterable[str]) -> str:
    return blake3("\n".join(sorted(names)).encode()).hexdigest()


def class_of(model: RealModel) -> Any:
    import transformers

    return getattr(transformers, model.named or model.config["architectures"][0])


def config_of(model: RealModel, **changes: Any) -> Any:
    """The config that transformers makes of the row."""
    import transformers

    config = {**model.config, **changes}
    return transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config)


def release_of(model: RealModel, **changes: Any) -> Release:
    """What the row says, with other sizes in config.json on request."""
    if model.patterns:
        names = [name for pattern in model.patterns for name in spelled(pattern)]
        entries = dict.fromkeys(names, (model.dtype, (8, 8)))
        return Release(entries, entries, {})
    import torch

    with zoo.quiet(), torch.device("meta"):
        built = class_of(model)(config_of(model, **changes))
        built.tie_weights(recompute_mapping=False)
        state = {k: v for k, v in built.state_dict(keep_vars=True).items() if hasattr(v, "shape")}
        hub = zoo.hub_checkpoint(built, state, zoo.shared_parameters(built, state))
    ours, theirs = model.renamed

    def renamed(name: str) -> str:
        already = theirs and name.startswith(theirs)  # an older transformers may call it so
        return theirs + name.removeprefix(ours) if ours and name.startswith(ours) and not already else name

    naive: dict[str, zoo.Entry] = {}
    for name, (_, shape) in hub.entries.items():
        for part, of_part in one_by_one(renamed(name), shape) if model.packed else [(renamed(name), shape)]:
            entry = (model.dtype, of_part)
            naive.update(model.packed.parts(part, entry) if model.packed else {part: entry})
    for pattern, entry in model.buffers.items():
        naive.update(dict.fromkeys(spelled(pattern), entry))
    drops = {renamed(alias): renamed(canonical) for alias, canonical in hub.drops.items()}
    return Release({k: v for k, v in naive.items() if k not in drops or k in model.stored}, naive, drops)


def one_by_one(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """A fused tensor of experts as one tensor for each projection of each expert; any other as it is."""
    module, _, last = name.rpartition(".")
    if not module.endswith(".experts") or last not in ("gate_up_proj", "down_proj"):
        return [(name, shape)]
    number, rows, columns = shape
    projections = ["gate_proj", "up_proj"] if last == "gate_up_proj" else [last]
    one = (rows // len(projections), columns)
    return [(f"{module}.{e}.{projection}.weight", one) for e in range(number) for projection in projections]


def total_size(model: RealModel, entries: Mapping[str, zoo.Entry]) -> int:
    """As an index counts it: BOOL as bits, and what shares memory once where the release had it so."""
    bits = 0
    for name, (dtype, shape) in entries.items():
        if name not in model.counted_once:
            bits += math.prod(shape) * (1 if dtype == "BOOL" else 8 * zoo.SIZES.get(dtype, 1))
    return bits // 8


MODELS = tuple(RealModel.of(row) for row in json.loads(Path(__file__).with_suffix(".json").read_text()))
