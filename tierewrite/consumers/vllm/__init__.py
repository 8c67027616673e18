"""What vLLM demands of a checkpoint. vLLM loads incomplete and contradictory quantized checkpoints without a
word; each rule here names one way in which that goes wrong.

Every rule is a small generator over a `Subject`; its docstring names the file and function of vLLM 0.33 in which
the behaviour was read (below vllm/ of the package), and tests/vllm_behaviour.json records what the real loader does
with a checkpoint that has the defect. `RULES` is the list that `check` runs, in order.

Not checked: what the weights' values mean; tensor-parallel layouts; algorithms other than NVFP4, W4A16_NVFP4,
FP8 and compressed-tensors' nvfp4-pack-quantized beyond names and completeness (a note says so).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np

from tierewrite import formats
from tierewrite.consumers.backbone import matches
from tierewrite.consumers.findings import Finding, Mend
from tierewrite.consumers.subject import FLOATS, PACKED, Module, Subject, numbers, rounded_to_e4m3
from tierewrite.consumers.vllm.quantization import ALGOS, VISION, Ignore, Quantization, Scheme
from tierewrite.formats import Role
from tierewrite.source.table import INDEX_NAME, TensorEntry
from tierewrite.ties.on_disk import WHOLE

VERSION = "0.33.0"
SMALLEST_NORMAL = 2.0**-126  # of F32: what is below was never computed from data
REWRITE: Mend = "rewrite"
FILL: Mend = "rewrite --fill-missing-scales"
MODELOPT = "model_executor/layers/quantization/modelopt.py"
KV_LEAVES = {"k_scale": "k", "v_scale": "v"}

Rule = Callable[["VllmSubject"], Iterator[Finding]]
RULES: list[Rule] = []


def rule(function: Rule) -> Rule:
    """Registers a rule; they run in the order of this file."""
    RULES.append(function)
    return function


class VllmSubject(Subject):
    """A subject with vLLM's reading of the quantization config."""

    @cached_property
    def quantization(self) -> Quantization | None:
        return Quantization.of(self.config, self.folder.quant_config)

    @property
    def scheme(self) -> Scheme | None:
        """What a quantized module must have on disk, if that is known and the config is sound."""
        q = self.quantization
        return None if q is None or q.problem is not None else q.scheme

    @cached_property
    def ignore(self) -> Ignore:
        q = self.quantization
        entries = q.ignore if q is not None and q.modelopt and q.problem is None else ()
        return Ignore(entries, self.backbone)

    @property
    def usable(self) -> bool:
        """The files that the index names are all there, so that what is missing is missing for good."""
        return not self.folder.absent

    # -- modules as vLLM builds them

    def built_as(self, module: str) -> str:
        """The vLLM module that a module of the checkpoint becomes a part of: qkv_proj, gate_up_proj, experts."""
        container, expert, _ = split_expert(module)
        if expert is not None:
            return container
        parent, _, leaf = module.rpartition(".")
        for fused, shards in self.backbone.fused.items():
            if leaf in shards:
                return f"{parent}.{fused}"
        return module

    def never_quantized(self, module: str) -> bool:
        """vLLM builds it plain whatever the config says."""
        return any(v in module for v in VISION) or matches(module, self.backbone.plain)

    @cached_property
    def _kinds(self) -> set[str]:
        """Modules of which some checkpoint layer is quantized, numbers left out: for backbones without data."""
        return {numberless(name) for name in self.quantized}

    def is_linear(self, module: str) -> bool:
        """vLLM builds it as a linear layer that takes the checkpoint's quantization."""
        if self.never_quantized(module):
            return False
        if not self.backbone.linear:
            return numberless(module) in self._kinds or module == "lm_head"
        for row in self.backbone.linear:
            if matches(module, (row["modules"],)):
                sizes = [self._config_entry(path) for path in row.get("multiples_of_64", ())]
                if all(isinstance(size, int) and size % 64 == 0 for size in sizes):
                    return True
        return False

    def _config_entry(self, path: str) -> Any:
        found: Any = self.config
        for part in path.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return found

    @cached_property
    def linear(self) -> dict[str, dict[str, Module]]:
        """vLLM's linear modules: name -> the checkpoint modules that it is made of."""
        found: dict[str, dict[str, Module]] = {}
        for name, module in self.modules.items():
            if module.weight is not None and self.is_linear(name):
                found.setdefault(self.built_as(name), {})[name] = module
        return found

    @cached_property
    def excluded(self) -> set[str]:
        """vLLM's linear modules that the ignore list leaves unquantized."""
        return {name for name in self.linear if self.ignore.reasons(name)}

    @cached_property
    def sound(self) -> dict[str, Module]:
        """Modules quantized on disk that vLLM builds quantized too: those whose tensors can be checked."""
        if self.scheme is None or self.declared_otherwise:
            return {}
        return {
            name: m
            for name, m in self.quantized.items()
            if self.is_linear(name) and self.built_as(name) not in self.excluded and m.weight is not None
        }

    @cached_property
    def declared_otherwise(self) -> bool:
        """The config's algorithm is not what lies on disk."""
        scheme, found = self.scheme, self.on_disk_format
        return scheme is not None and found is not None and found != _family(scheme)

    @cached_property
    def on_disk_format(self) -> str | None:
        """"nvfp4", "nvfp4-packed" or "fp8", by what most quantized modules have; None for anything else."""
        seen: Counter[str] = Counter()
        for module in self.quantized.values():
            key = module.weight
            if key is None:
                continue
            if "weight_packed" in module.leaves and "weight_global_scale" in module.leaves:
                seen["nvfp4-packed"] += 1
            elif "weight_scale_2" in module.leaves:
                seen["nvfp4"] += 1
            elif self.entries[key].dtype == "F8_E4M3":
                seen["fp8"] += 1
        return seen.most_common(1)[0][0] if seen else None

    def in_features(self, key: str) -> int | None:
        """Columns of the unquantized weight: by the model class, else by what is packed."""
        size = self.size(key)
        if size is not None and len(size) == 2:
            return size[1]
        entry = self.entries[key]
        return entry.shape[1] * (2 if entry.dtype in PACKED else 1) if len(entry.shape) == 2 else None

    @cached_property
    def groups(self) -> Counter[int]:
        """Group sizes that the block scales on disk have, with how many modules have each."""
        found: Counter[int] = Counter()
        block = self.scheme.block if self.scheme else None
        for module in self.sound.values():
            scale = module.key(block) if block else None
            columns = self.in_features(module.weight) if module.weight else None
            if scale is None or not columns or len(self.entries[scale].shape) != 2:
                continue
            wide = self.entries[scale].shape[1]
            if wide and columns % wide == 0:
                found[columns // wide] += 1
        return found


def _family(scheme: Scheme) -> str:
    if scheme.block is None:
        return "fp8"
    return "nvfp4-packed" if scheme.weight == "weight_packed" else "nvfp4"


def split_expert(module: str) -> tuple[str, int | None, str]:
    """`model.layers.0.experts.3.up_proj` -> ("model.layers.0.experts", 3, "up_proj"); no expert: None."""
    parent, _, projection = module.rpartition(".")
    container, _, number = parent.rpartition(".")
    if number.isdecimal() and number.isascii() and container.rpartition(".")[2] == "experts":
        return container, int(number), projection
    return module, None, ""


def numberless(name: str) -> str:
    """The name with every numeric component replaced by *."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


# ------------------------------------------------------------------------------------------- files and index


@rule
def index_names_missing_file(s: VllmSubject) -> Iterator[Finding]:
    """model_executor/model_loader/weight_utils.py `filter_duplicate_safetensors_files`: FileNotFoundError."""
    if s.folder.absent:
        yield Finding(
            "index-names-missing-file",
            "error",
            s.folder.absent,
            f"{INDEX_NAME} names {len(s.folder.absent)} files that are not in the folder",
            "vLLM refuses to load",
            "bring the files, or export anew",
            None,
            "model_executor/model_loader/weight_utils.py filter_duplicate_safetensors_files",
        )


@rule
def file_not_indexed(s: VllmSubject) -> Iterator[Finding]:
    """model_executor/model_loader/weight_utils.py `filter_duplicate_safetensors_files`: other files are not read."""
    if s.folder.consolidated:
        return
    for file, names in s.folder.unread.items():
        lost = tuple(n for n in names if n not in s.entries)
        yield Finding(
            "file-not-indexed",
            "error" if lost else "warning",
            lost or (file,),
            f"{file} is not in {INDEX_NAME}; {len(lost)} of its {len(names)} tensors are nowhere else",
            "vLLM does not read it" + ("; the parameters stay uninitialised" if lost else ""),
            "add the tensors to the index" if lost else "remove the file",
            None,
            "model_executor/model_loader/weight_utils.py filter_duplicate_safetensors_files",
        )


@rule
def index_against_files(s: VllmSubject) -> Iterator[Finding]:
    """model_executor/model_loader/weight_utils.py `safetensors_weights_iterator`: files are read whole, so the
    index's keys do not matter to vLLM.
    """
    weight_map = s.folder.weight_map
    if weight_map is None or s.folder.consolidated:
        return
    files = s.folder.shards
    missing = tuple(k for k in s.entries if k not in weight_map)
    source = "model_executor/model_loader/weight_utils.py safetensors_weights_iterator"
    if missing:
        yield Finding(
            "index-incomplete", "warning", missing, f"{INDEX_NAME} lacks {len(missing)} tensors of the files it names",
            "vLLM reads them all the same; tools that go by the index do not", "add them to the index", None, source,
        )  # fmt: skip
    absent = set(s.folder.absent)
    wrong = tuple(
        k
        for k, file in weight_map.items()
        if file not in absent and (k not in s.entries or files[s.entries[k].shard].name != file)
    )
    if wrong:
        yield Finding(
            "index-names-missing-tensor", "warning", wrong,
            f"{INDEX_NAME} lists {len(wrong)} tensors that the file named for them does not hold",
            "vLLM goes by the files; tools that go by the index fail", "remove them from the index", None, source,
        )  # fmt: skip


@rule
def consolidated_file(s: VllmSubject) -> Iterator[Finding]:
    """model_executor/model_loader/default_loader.py `_prepare_weights`: Mistral's format comes first."""
    if s.folder.consolidated and s.folder.unread:
        yield Finding(
            "consolidated-file",
            "error",
            s.folder.consolidated,
            f"{', '.join(s.folder.consolidated)} beside {len(s.folder.unread)} other safetensors files",
            "vLLM takes the folder for Mistral's own format and reads nothing else",
            "remove or rename the file",
            None,
            "model_executor/model_loader/default_loader.py _prepare_weights",
        )


@rule
def duplicate_key(s: VllmSubject) -> Iterator[Finding]:
    """model_executor/model_loader/weight_utils.py `safetensors_weights_iterator`: files in natural order of their
    names, each whole; the tensor that is read last wins.
    """
    repeated = sorted(s.folder.repeated.items(), key=lambda item: item[1][0].nbytes)
    equal = s.equal(entries for _, entries in repeated)
    differ: list[str] = []
    same: list[str] = []
    for (name, _), verdict in zip(repeated, equal, strict=True):
        (same if verdict else differ).append(name)
    for severity, names in (("error", differ), ("warning", same)):
        if names:
            yield Finding(
                "duplicate-key",
                "error" if severity == "error" else "warning",
                tuple(names),
                f"{len(names)} tensors are in several files, "
                + ("with different bytes" if severity == "error" else "with equal bytes"),
                "the file whose name comes last in natural order wins",
                "keep one of them",
                None,
                "model_executor/model_loader/weight_utils.py safetensors_weights_iterator",
            )


# --------------------------------------------------------------------------------------------------- configs


@rule
def architectures(s: VllmSubject) -> Iterator[Finding]:
    """model_executor/models/registry.py `_normalize_arch` and `inspect_model_cls`: the first known one is built."""
    source = "model_executor/models/registry.py inspect_model_cls"
    if not s.architectures:
        yield Finding(
            "architectures", "error", ("config.json: architectures",), "config.json names no architecture",
            "vLLM guesses one from model_type and refuses what it does not know",
            "name the model class in config.json", None, source,
        )  # fmt: skip
    elif s.class_problem is not None and not s.backbone.architectures:
        yield Finding(
            "architectures", "error", ("config.json: architectures",),
            f"'{s.architecture}' is known neither here nor to the installed transformers: {s.class_problem}",
            "vLLM refuses a class that it does not know",
            "correct the name, or the config that it cannot be built from",
            None, source,
        )  # fmt: skip


@rule
def quant_config(s: VllmSubject) -> Iterator[Finding]:
    """config/model.py `_verify_quantization`; modelopt.py `ModelOptQuantConfigBase.from_config`."""
    q = s.quantization
    if q is None:
        if s.quantized:
            yield Finding(
                "quant-config-missing", "error", ("config.json: quantization_config",),
                f"{len(s.quantized)} modules are quantized, and no config says so",
                "vLLM builds plain layers; the packed tensors abort the load",
                "restore hf_quant_config.json or quantization_config from the export", None,
                "model_executor/model_loader/weight_utils.py get_quant_config",
            )  # fmt: skip
    elif q.problem is not None:
        yield Finding(
            "quant-config-invalid", "error", (q.where,), q.problem, "vLLM refuses to load, or loads as if unquantized",
            "restore the config from the export", None, f"{MODELOPT} ModelOptQuantConfigBase.from_config",
        )  # fmt: skip
    elif s.declared_otherwise:
        yield Finding(
            "quant-algo-mismatch", "error", (f"{q.where}.quant_algo",),
            f"the config says {q.declared or q.algo}, the tensors are {s.on_disk_format}",
            "vLLM builds parameters of other shapes; the load aborts", "restore the config from the export", None,
            f"{MODELOPT} LINEAR_ALGOS",
        )  # fmt: skip
    elif q.modelopt and q.scheme is None and q.algo in ALGOS:
        s.notes.append(f"{q.algo}: names and completeness are checked, scales and shapes are not")


@rule
def quant_configs_disagree(s: VllmSubject) -> Iterator[Finding]:
    """model_executor/model_loader/weight_utils.py `get_quant_config`: hf_quant_config.json is read only where
    config.json says nothing.
    """
    q = s.quantization
    if q is None or not s.folder.quant_config or q.where == "hf_quant_config.json" or not q.modelopt:
        return
    other = Quantization.of({}, s.folder.quant_config)
    assert other is not None
    differing = []
    if other.declared != q.declared:
        differing.append("quant_algo")
    if other.kv_fp8 != q.kv_fp8:
        differing.append("kv_cache_quant_algo")
    if set(other.ignore) != set(q.ignore):
        differing.append("exclude_modules")
    if other.group_size != q.group_size:
        differing.append("group_size")
    if differing:
        yield Finding(
            "quant-config-disagrees", "warning", tuple(f"hf_quant_config.json: quantization.{d}" for d in differing),
            f"hf_quant_config.json and config.json differ in {', '.join(differing)}",
            "vLLM uses config.json; other readers may use the other", "make them equal, or remove hf_quant_config.json",
            None, "model_executor/model_loader/weight_utils.py get_quant_config",
        )  # fmt: skip


@rule
def activations_unused(s: VllmSubject) -> Iterator[Finding]:
    """modelopt.py `ModelOptNvFp4Config._from_config`, `_DropInputScale`: weight-only, input scales are dropped."""
    if s.quantization is None or s.quantization.algo != "W4A16_NVFP4" or s.declared_otherwise:
        return
    keys = tuple(k for m in s.sound.values() for k in m.leaves.get("input_scale", ()))
    if keys:
        yield Finding(
            "activations-unused", "warning", keys,
            f"the config says weight-only, yet {len(keys)} input scales are stored",
            "vLLM drops them and computes with 16-bit activations",
            "if activations were calibrated, restore input_activations in config_groups", None,
            f"{MODELOPT} ModelOptNvFp4Config._from_config",
        )  # fmt: skip


@rule
def generation_config(s: VllmSubject) -> Iterator[Finding]:
    """model_executor/models/diffusion_gemma.py `DiffusionGemmaModelState.__init__`, `custom_sampler`. Serving can
    name another folder (`--generation-config`).
    """
    wanted = s.backbone.generation
    if wanted is None:
        return
    have = s.folder.generation
    lacking = [f"generation_config.json: {n}" for n in wanted["numbers"] if not isinstance(have.get(n), (int, float))]
    sampler = have.get("sampler_config")
    rules = wanted["sampler"]
    value = sampler.get(rules["positive"]) if isinstance(sampler, dict) else None
    named = isinstance(sampler, dict) and rules["class"] in str(sampler.get("_cls_name", ""))
    if not named or not isinstance(value, (int, float)) or not value > 0:
        lacking.append("generation_config.json: sampler_config")
    if lacking:
        yield Finding(
            "generation-config", "warning", tuple(lacking),
            f"generation_config.json lacks {', '.join(x.rpartition(' ')[2] for x in lacking)}",
            "vLLM fails when the model is served, unless told to read another generation config",
            "copy the values from the original model's generation_config.json", None,
            "model_executor/models/diffusion_gemma.py DiffusionGemmaModelState",
        )  # fmt: skip


# ------------------------------------------------------------------------------------------ ignore patterns


@rule
def ignore_partly_fused(s: VllmSubject) -> Iterator[Finding]:
    """layers/quantization/utils/quant_utils.py `is_layer_skipped`: ValueError "some but not all shards"."""
    q = s.quantization
    assert q is None or q.ignore_path
    for module in s.linear:
        named = s.ignore.partly(module)
        if named and q is not None:
            parent = module.rpartition(".")[0]
            others = [x for x in s.backbone.fused[module.rpartition(".")[2]] if x not in named]
            plain = [n for n, m in s.linear[module].items() if n not in s.quantized and m.weight]
            mixed = 0 < len(plain) < len(s.linear[module])
            yield Finding(
                "ignore-partly-fused", "error", tuple(f"{q.ignore_path}: {parent}.{n}" for n in named),
                f"'{parent}' is one parameter for {', '.join((*named, *others))}, "
                f"and only {', '.join(named)} is listed",
                "vLLM refuses to load",
                "quantize all of them or none; no list can say this"
                if mixed
                else "list all of them (those without a weight too) or none",
                None if mixed else REWRITE,
                "model_executor/layers/quantization/utils/quant_utils.py is_layer_skipped",
            )  # fmt: skip


@rule
def ignored_but_quantized(s: VllmSubject) -> Iterator[Finding]:
    """modelopt.py `is_layer_excluded`, `apply_vllm_mapper`: entries of both sides are mapped to one backbone and
    merged, `X*` becomes `X` and `X.*`, and a bare entry matches as a substring.
    """
    q = s.quantization
    if q is None or not s.ignore.entries:
        return
    guilty: dict[tuple[str, int], list[str]] = {}
    quantized_linear = [n for n, parts in s.linear.items() if any(p in s.quantized for p in parts)]
    for module in quantized_linear:
        if s.ignore.partly(module):
            continue
        for number, kind in s.ignore.reasons(module).items():
            guilty.setdefault((kind, number), []).append(module)
    everything = set(s.linear)
    found: dict[str, list[tuple[int, list[str]]]] = {}
    for (kind, number), modules in guilty.items():
        entry = q.ignore[number]
        if len(everything) > 1 and everything <= {m for m in everything if number in s.ignore.reasons(m)}:
            which = "ignore-everything"
        elif kind == "expert":
            which = "ignore-one-expert"
        elif kind == "substring":
            which = "ignore-substring"
        elif _one_sided(s, entry):
            which = "ignore-side-conflict"
        else:
            which = "ignored-but-quantized"
        found.setdefault(which, []).append((number, modules))
    for which, entries in found.items():
        modules = list(dict.fromkeys(m for _, ms in entries for m in ms))
        mixed = [m for m in modules if any(p not in s.quantized for p in s.linear[m])]
        yield Finding(
            which, "error",
            (*(f"{q.ignore_path}[{n}]: {q.ignore[n]}" for n, _ in entries), *modules),
            f"{len(entries)} ignore patterns exclude {len(modules)} modules that are quantized on disk"
            f" ({_EXPLAINED[which]})",
            "vLLM builds them unquantized; their scales abort the load",
            "make the experts of a layer all quantized or all plain; no list can say this"
            if mixed
            else "take the patterns out, and list by name the unquantized modules that they stood for",
            None if mixed else REWRITE,
            f"{MODELOPT} ModelOptQuantConfigBase.is_layer_excluded",
        )  # fmt: skip


_EXPLAINED = {
    "ignore-everything": "after the mapping to one backbone the pattern covers everything",
    "ignore-one-expert": "an entry inside a layer's experts unquantizes all of them",
    "ignore-substring": "vLLM finds the pattern anywhere in a name",
    "ignore-side-conflict": "it was meant for one side, and both become one backbone",
    "ignored-but-quantized": "the patterns name them",
}


def _one_sided(s: VllmSubject, entry: str) -> bool:
    """The entry is spelled for one side, and no entry says the same for another side."""
    side = s.backbone.side(entry)
    if side is None or len(s.backbone.sides) < 2:
        return False
    rest = entry.removeprefix(side)
    return not any(f"{other}{rest}" in s.ignore.entries for other in s.backbone.sides if other != side)


@rule
def unlisted_unquantized(s: VllmSubject) -> Iterator[Finding]:
    """modelopt.py `get_quant_method`: every linear layer that no entry names is built quantized, the head included."""
    q = s.quantization
    if q is None or not q.modelopt or q.problem is not None or s.declared_otherwise:
        return
    if not s.quantized:
        return
    tied_head = "lm_head.weight" in s.canonical or "lm_head" in s.modules or not s.backbone.linear
    has_head = s.model is None or any(n.rpartition(".")[0].endswith("lm_head") for n in s.model.shapes)
    if tied_head and has_head and "lm_head" not in s.quantized and not s.ignore.reasons("lm_head"):
        yield Finding(
            "unlisted-lm-head", "error", (q.ignore_path,), "lm_head is not quantized, and no ignore entry names it",
            "vLLM builds a quantized head; its scales are never loaded", "add lm_head to the ignore list", REWRITE,
            f"{MODELOPT} ModelOptQuantConfigBase.get_quant_method",
        )  # fmt: skip
    keys: list[str] = []
    partly: list[str] = []
    for name, parts in s.linear.items():
        plain = [m for p, m in parts.items() if p not in s.quantized and m.weight and p != "lm_head"]
        if plain and name not in s.excluded and not s.ignore.partly(name):
            (keys if len(plain) == len(parts) else partly).extend(m.weight or "" for m in plain)
    for found, mend in ((keys, REWRITE), (partly, None)):
        if found:
            yield Finding(
                "unlisted-unquantized", "error", tuple(found),
                f"{len(found)} unquantized weights of modules that the ignore list does not name",
                "vLLM builds packed parameters for them; the load aborts, or packs the numbers by value",
                "add the modules to the ignore list"
                if mend
                else "their neighbours in the fused parameter are quantized: quantize all of them or none",
                mend, f"{MODELOPT} ModelOptQuantConfigBase.get_quant_method",
            )  # fmt: skip


@rule
def cannot_be_quantized(s: VllmSubject) -> Iterator[Finding]:
    """models/gemma4.py `Gemma4Router` (GateLinear without a quantization config), diffusion_gemma.py
    `DiffusionGemmaSelfConditioning` (nn.Linear); modelopt.py `get_quant_method` for vision modules.
    """
    keys = tuple(
        key
        for name, m in s.quantized.items()
        if s.never_quantized(name)
        for leaf, keys in m.leaves.items()
        for key in keys
        if leaf != "weight"
    )
    if keys:
        modules = {key.rpartition(".")[0] for key in keys}
        yield Finding(
            "cannot-be-quantized", "error", keys, f"{len(modules)} modules are quantized that vLLM only builds plain",
            "the load aborts at their scales", "export with these modules excluded from quantization", None,
            s.backbone.source or f"{MODELOPT} get_quant_method",
        )  # fmt: skip


# ----------------------------------------------------------------------------------- names, completeness


@rule
def names_that_meet(s: VllmSubject) -> Iterator[Finding]:
    """models/utils.py `WeightsMapper`, `AutoWeightsLoader.load_weights`: names that are mapped to one parameter are
    loaded one after the other, in the order of files and of names; the last one stays.
    """
    meeting = [keys for keys in s.targets.values() if len(keys) > 1 and not _dropped(s, keys)]
    # Scales first: where they differ, the weights need not be read.
    meeting.sort(key=lambda keys: max(s.entries[k].nbytes for k in keys))
    verdicts = s.equal(tuple(s.entries[k] for k in keys) for keys in meeting)
    merged: list[str] = []
    differ: list[str] = []
    sides: list[str] = []
    kv: list[str] = []
    same: list[str] = []
    unknown: list[str] = []
    for keys, verdict in zip(meeting, verdicts, strict=True):
        if verdict is None:
            unknown.extend(keys)
        elif verdict:
            if _tied(s, keys) and not _is_kv(s, keys[0]):  # what is not tied belongs to every side
                same.extend(keys)
        elif _is_kv(s, keys[0]):
            kv.extend(keys)
        elif not _tied(s, keys):
            sides.extend(keys)
        elif _role(s, keys[0]) is Role.ACTIVATION:
            merged.extend(keys)
        else:
            differ.extend(keys)
    source = "model_executor/models/utils.py AutoWeightsLoader"
    wins = "the one that is read last wins, without a word; another sharding has another winner"
    rows: tuple[tuple[str, list[str], str, str, Mend | None], ...] = (
        ("name-conflict", merged, "activation scales that were calibrated per side",
         "rewrite merges them into one that covers all sides", REWRITE),
        ("name-conflict", differ, "tied weights, or scales computed from them, with different bytes",
         "the tie is not what the checkpoint holds; export anew", None),
        ("per-side-conflict", kv, "KV-cache scales of the sides",
         "rewrite --kv-scales merge keeps the larger range", REWRITE),
        ("per-side-conflict", sides, "tensors that are not tied, one a side",
         "a single backbone cannot represent both: choose one side's values", None),
    )  # fmt: skip
    for which, keys_, what, mend, by in rows:
        if keys_:
            yield Finding(
                which, "error", tuple(keys_), f"{len(keys_)} names meet in one parameter each: {what}", wins, mend, by,
                source,
            )  # fmt: skip
    if same:
        yield Finding(
            "duplicate-names", "warning", tuple(same),
            f"{len(same)} names meet in one parameter each, with equal bytes",
            "both are read; disk and loading time are wasted", "rewrite keeps one of each", REWRITE, source,
        )  # fmt: skip
    if unknown:
        yield Finding(
            "duplicate-names", "warning", tuple(unknown),
            f"{len(unknown)} names meet in one parameter each; they are too large to be compared here",
            "if they differ, the one that is read last wins", "rewrite compares them and keeps one of each", REWRITE,
            source,
        )  # fmt: skip


def _dropped(s: VllmSubject, keys: list[str]) -> bool:
    return s.backbone.passes_over(s.backbone.map(keys[0]))


def _is_kv(s: VllmSubject, key: str) -> bool:
    return (formats.kv_scale(key, s.families) or formats.kv_scale(key)) is not None


def _tied(s: VllmSubject, keys: list[str]) -> bool:
    """The keys are (companions of) sides of one declared tie."""
    parameters = {s.canonical.get(p, p) for p in (_parameter(s, k) for k in keys) if p is not None}
    return len(parameters) == 1


def _parameter(s: VllmSubject, key: str) -> str | None:
    """The parameter in memory that a key is, or is a companion of."""
    place = s.places.get(key)
    if place is None:
        module = key.rpartition(".")[0]
        place = next((s.places[k] for w in ("weight", "weight_packed") if (k := f"{module}.{w}") in s.places), None)
    return None if place is None else place[0]


def _role(s: VllmSubject, key: str) -> Role | None:
    found = formats.classify("weight", key.rpartition(".")[2], s.families)
    return None if found is None else found.role


@rule
def missing_parameters(s: VllmSubject) -> Iterator[Finding]:
    """model_loader/default_loader.py `load_weights`: only unquantized models are tracked; layers/fused_moe and
    layers/linear.py create parameters with torch.empty, and one shard or expert that comes is enough.
    """
    if s.model is None or not s.usable:
        if s.model is None:
            s.notes.append("completeness was not checked: no model class says which parameters there are")
        return
    plain, shards, gone = s.missing()
    strict = s.quantization is None
    happens = (
        "vLLM refuses an unquantized checkpoint that is incomplete"
        if strict
        else "vLLM does not notice: uninitialised memory is used"
    )
    rows = (
        ("expert-missing", gone, "experts have no weight at all"),
        ("fused-shard-missing", shards, "shards of fused projections are missing while others are there"),
        ("parameter-missing", plain, "parameters are filled by no key"),
    )
    for which, keys, what in rows:
        if keys:
            yield Finding(
                which, "error", tuple(keys), f"{len(keys)} {what}", happens,
                "export anew, or copy them from a complete checkpoint", None,
                "model_executor/model_loader/default_loader.py DefaultModelLoader.load_weights",
            )  # fmt: skip


@rule
def unexpected_tensors(s: VllmSubject) -> Iterator[Finding]:
    """models/utils.py `AutoWeightsLoader._load_module` ("There is no module or parameter named"), `_load_param`
    (nested weight); fused_moe/routed_experts.py `load_weights` (AttributeError). Not an error there: `.bias`,
    `*.g_idx`, rotary tables, KV scales of modules without attention, experts beyond the last.
    """
    if s.model is None:
        return
    unexpected: list[str] = []
    ignored: list[str] = []
    beyond: list[str] = []
    for key in s.entries:
        place = s.places.get(key)
        if place is not None:
            parameter, part = place
            if part and part[0] == "expert" and part[3] >= s.model.shapes[parameter][0]:
                beyond.append(key)
            continue
        mapped = s.backbone.map(key)
        module, _, leaf = mapped.rpartition(".")
        if s.backbone.passes_over(mapped) or leaf == "bias":
            # Tables that are computed anyway are no loss; a bias is.
            if leaf == "bias":
                ignored.append(key)
            continue
        if formats.kv_scale(key, s.families) or formats.kv_scale(key):
            continue
        owner = s.modules.get(module)
        weight = owner.weight if owner is not None else None
        if weight is not None and weight in s.places:
            parameter, part = s.places[weight]
            if part and part[0] == "expert" and part[3] >= s.model.shapes[parameter][0]:
                beyond.append(key)
                continue
            if _known_leaf(s, module, leaf):
                continue
        elif owner is not None and weight is None and _known_leaf(s, module, leaf):
            continue  # its weight is missing: another rule's finding
        unexpected.append(key)
    if unexpected:
        yield Finding(
            "unexpected-tensor", "error", tuple(unexpected), f"{len(unexpected)} tensors belong to no parameter",
            "the load aborts at the first of them", "export anew, or remove them from the files", None,
            "model_executor/models/utils.py AutoWeightsLoader._load_module",
        )  # fmt: skip
    if ignored or beyond:
        yield Finding(
            "ignored-tensor", "warning", (*ignored, *beyond),
            f"{len(ignored) + len(beyond)} tensors that vLLM has no use for "
            "(biases, experts beyond the config's number)",
            "vLLM passes over them without a word", "if they matter, the config is wrong", None,
            "model_executor/models/utils.py AutoWeightsLoader.load_weights",
        )  # fmt: skip


def _known_leaf(s: VllmSubject, module: str, leaf: str) -> bool:
    """vLLM has a parameter for this companion, or another rule reports it."""
    if leaf in ("weight", "weight_packed"):
        return True
    scheme = s.scheme
    if scheme is None or s.declared_otherwise or s.never_quantized(module):
        # Without a scheme nothing can be said of a companion that some format knows.
        return formats.classify("weight", leaf) is not None
    if s.built_as(module) in s.excluded and leaf in scheme.leaves:
        return True
    return leaf in scheme.leaves


@rule
def stored_tied_head(s: VllmSubject) -> Iterator[Finding]:
    """config/model.py `maybe_untie_word_embeddings`; model_loader/weight_tying.py `maybe_retie_word_embeddings`."""
    for alias, canonical in s.canonical.items():
        head = s.entries.get(alias)
        if head is None or not alias.endswith("lm_head.weight"):
            continue
        embedding = _entry_of(s, canonical)
        verdict = next(s.equal([(head, embedding)])) if embedding is not None else None
        differs = verdict is False
        yield Finding(
            "lm-head-stored", "warning", (alias,),
            f"the config ties lm_head to '{canonical}', and the checkpoint stores it"
            + (" with other bytes" if differs else " too"),
            "vLLM unties the head and uses the stored one" + ("" if differs else "; memory is wasted"),
            "set tie_word_embeddings to false if the head is meant, or remove it" if differs else "rewrite drops it",
            None if differs else REWRITE, "config/model.py ModelConfig.maybe_untie_word_embeddings",
        )  # fmt: skip


def _entry_of(s: VllmSubject, parameter: str) -> TensorEntry | None:
    """The tensor that fills a parameter, under whichever of its tied names it is stored."""
    root = s.canonical.get(parameter, parameter)
    for key, (found, part) in s.places.items():
        if part == WHOLE and s.canonical.get(found, found) == root and not key.endswith("lm_head.weight"):
            return s.entries[key]
    return None


# ------------------------------------------------------------------------------------------- dtypes and shapes


@rule
def group_size(s: VllmSubject) -> Iterator[Finding]:
    """modelopt.py `KNvfp4Static.create_weights`, `ModelOptNvFp4FusedMoE.create_weights`: weight_scale has
    in / group_size columns; group_size is quantization_config's own (not config_groups'), by default 16.
    """
    q = s.quantization
    if q is None or not s.groups or not q.modelopt:
        return
    most = s.groups.most_common(1)[0][0]
    if most != q.group_size:
        yield Finding(
            "group-size-mismatch", "error", (f"{q.where}.group_size",),
            f"the config says blocks of {q.group_size}, the scales on disk are for blocks of {most}",
            "vLLM builds scales of another shape; the load aborts", f"set group_size to {most}", None,
            f"{MODELOPT} KNvfp4Static.create_weights",
        )  # fmt: skip


@rule
def sizes(s: VllmSubject) -> Iterator[Finding]:
    """modelopt.py `KNvfp4Static.create_weights` (multiples of 16); marlin_utils.py `check_moe_marlin_supports_config`
    (experts: hidden size a multiple of 128, no padding), other backends pad.
    """
    scheme = s.scheme
    if scheme is None or scheme.block is None:
        return
    odd, narrow = [], set()
    for name, module in s.sound.items():
        columns = s.in_features(module.weight) if module.weight else None
        if columns is None:
            continue
        if columns % 16:
            odd.append(module.weight or name)
        container, expert, projection = split_expert(name)
        if expert is not None and columns % 128 and not projection.startswith("down"):
            narrow.add(container)
    if odd:
        yield Finding(
            "not-divisible", "error", tuple(odd),
            f"{len(odd)} weights have a number of columns that is no multiple of 16",
            "vLLM refuses to load", "leave these modules out of the quantization", None,
            f"{MODELOPT} KNvfp4Static.create_weights",
        )  # fmt: skip
    if narrow:
        yield Finding(
            "alignment", "warning", tuple(sorted(narrow)), "the experts' hidden size is no multiple of 128",
            "vLLM's Marlin backend (GPUs without FP4) cannot serve them; others can", "", None,
            "model_executor/layers/quantization/utils/marlin_utils.py check_moe_marlin_supports_config",
        )  # fmt: skip


@rule
def shapes(s: VllmSubject) -> Iterator[Finding]:
    """models/.. `default_weight_loader` (AssertionError); parameter.py `load_merged_column_weight`; for experts
    fused_moe/routed_experts.py `_narrow_expert_data_for_padding` copies what there is and leaves the rest.
    """
    wrong: list[str] = []
    for name, entry in s.entries.items():
        size = s.size(name)
        if size is None or (s.places[name][1] != WHOLE and s.places[name][1][0] != "expert"):
            continue
        owner = s.modules.get(s.backbone.map(name).rpartition(".")[0])
        if _packed(s, owner, name):
            continue
        if entry.shape != size and not (_elements(entry.shape) == _elements(size) == 1):
            wrong.append(name)
    scheme, most = s.scheme, s.groups.most_common(1)[0][0] if s.groups else None
    for module in s.sound.values():
        assert scheme is not None
        key = module.weight
        assert key is not None
        size = s.size(key)
        rows = size[0] if size is not None else s.entries[key].shape[0] if s.entries[key].shape else 0
        columns = s.in_features(key)
        if scheme.pack == 2 and s.entries[key].dtype in FLOATS:
            continue
        if columns is not None and s.entries[key].shape != (rows, columns // scheme.pack):
            wrong.append(key)
        scale = module.key(scheme.block) if scheme.block else None
        whole = scale is not None and columns and most and columns % most == 0
        if whole and s.entries[scale or ""].shape != (rows, (columns or 0) // (most or 1)):
            wrong.append(scale or "")
        for leaf in scheme.scalars:
            scalar = module.key(leaf)
            if scalar is not None and _elements(s.entries[scalar].shape) != 1:
                wrong.append(scalar)
    for name in s.entries:
        if formats.kv_scale(name, s.families) and name.endswith("_scale") and _elements(s.entries[name].shape) != 1:
            wrong.append(name)
    if wrong:
        yield Finding(
            "wrong-shape", "error", tuple(dict.fromkeys(wrong)),
            f"{len(wrong)} tensors have other shapes than their parameters",
            "the load aborts; for an expert, what is missing stays uninitialised", "export anew", None,
            "model_executor/model_loader/weight_utils.py default_weight_loader",
        )  # fmt: skip


def _packed(s: VllmSubject, module: Module | None, key: str) -> bool:
    """The key is the weight of a quantized module, on whichever side."""
    if module is None or module.name not in s.quantized:
        return False
    return key in module.leaves.get("weight", ()) or key in module.leaves.get("weight_packed", ())


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count


@rule
def dtypes(s: VllmSubject) -> Iterator[Finding]:
    """models/utils.py `_load_param` warns, weight_utils.py `default_weight_loader` and the fused loaders do not: each
    copies by value. Harmless where every value survives, or where bytes are only relabelled (I8 as U8).
    """
    harmful: list[str] = []
    harmless: list[str] = []
    floats: list[str] = []
    for name in s.places:
        owner = s.modules.get(s.backbone.map(name).rpartition(".")[0])
        if not _packed(s, owner, name) and s.entries[name].dtype not in FLOATS:
            harmful.append(name)
    scheme = s.scheme
    for module in s.sound.values():
        assert scheme is not None
        key = module.weight
        assert key is not None
        dtype = s.entries[key].dtype
        if dtype != scheme.dtype:
            (harmless if (dtype, scheme.dtype) == ("I8", "U8") else harmful).append(key)
        scale = module.key(scheme.block) if scheme.block else None
        if scale is not None and s.entries[scale].dtype != "F8_E4M3":
            (floats if s.entries[scale].dtype in FLOATS else harmful).append(scale)
        for leaf in scheme.scalars:
            scalar = module.key(leaf)
            if scalar is not None and s.entries[scalar].dtype != "F32":
                (harmless if s.entries[scalar].dtype in FLOATS else harmful).append(scalar)
    for key, data in s.read(floats):
        exact = bool(rounded_to_e4m3(numbers(s.entries[key].dtype, data)).all())
        (harmless if exact else harmful).append(key)
    source = "model_executor/model_loader/weight_utils.py default_weight_loader"
    if harmful:
        yield Finding(
            "wrong-dtype", "error", tuple(harmful), f"{len(harmful)} tensors have dtypes that their parameters do not",
            "vLLM converts them by value: other numbers come out", "export anew", None, source,
        )  # fmt: skip
    if harmless:
        yield Finding(
            "wrong-dtype", "warning", tuple(harmless),
            f"{len(harmless)} tensors have other dtypes than their parameters; the values survive the conversion",
            "vLLM converts them by value; other consumers may not", "export anew", None, source,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ scales


@rule
def missing_scales(s: VllmSubject) -> Iterator[Finding]:
    """modelopt.py `process` (only a NaN `weight_scale` of a dense layer is noticed); fused_moe creates its scales with
    torch.empty. https://github.com/vllm-project/vllm/issues/45212: inf, then NaN and pad tokens.
    """
    scheme = s.scheme
    if scheme is None or not s.usable:
        return
    fill: list[str] = []
    lost: list[str] = []
    for name, module in s.sound.items():
        for leaf in (*((scheme.block,) if scheme.block else ()), *scheme.scalars):
            if leaf not in module.leaves:
                expert = split_expert(name)[1] is not None
                can = expert and leaf in ("input_scale", "input_global_scale")
                (fill if can else lost).append(f"{module.stem}.{leaf}")
    yield from _scale_finding("scale-missing", fill, lost, "scales are missing", "uninitialised memory is used")


@rule
def invalid_scales(s: VllmSubject) -> Iterator[Finding]:
    """modelopt.py `KNvfp4Dynamic.process`, `KNvfp4Static.process`, `ModelOptNvFp4FusedMoE`: no scale is looked at,
    but for NaN block scales of a dense layer. quantization/kv_cache.py: negative KV scales count as not stored, zero
    fails an assertion.
    """
    bad: dict[str, tuple[list[str], list[str]]] = {w: ([], []) for w in _INVALID}
    relevant = {k for m in s.sound.values() for leaf, keys in m.leaves.items() if leaf in _checked(s) for k in keys}
    if s.quantization is not None and s.quantization.kv_fp8:
        relevant |= {k for k in s.entries if k.rpartition(".")[2] in KV_LEAVES}
    for key, values in s.scalars.items():
        if key not in relevant or not values.size:
            continue
        leaf = key.rpartition(".")[2]
        companion = formats.classify("weight", leaf, s.families) or formats.classify("weight", leaf)
        activation = companion is not None and companion.role is Role.ACTIVATION
        unset = companion.uncalibrated if companion is not None else ()
        if not np.isfinite(values).all():
            which = "scale-not-finite"
        elif (values <= 0).any():
            which = "scale-not-positive"
        elif activation and ((values < SMALLEST_NORMAL).any() or np.isin(values, unset).any()):
            which = "scale-uncalibrated"
        else:
            continue
        expert = split_expert(s.backbone.map(key).rpartition(".")[0])[1] is not None
        bad[which][0 if activation and expert else 1].append(key)
    block = s.scheme.block if s.scheme is not None else None
    wide = [k for m in s.sound.values() if block for k in m.leaves.get(block, ()) if s.entries[k].dtype == "F8_E4M3"]
    for key, data in s.read(wide):
        codes = np.frombuffer(data, np.uint8)
        # Positive finite E4M3 codes are 0x00 to 0x7E; one pass over the bytes settles nearly every tensor.
        if codes.size and codes.max() > 0x7E:
            if ((codes & 0x7F) == 0x7F).any():
                bad["scale-not-finite"][1].append(key)
            elif (codes > 0x80).any():
                bad["scale-not-positive"][1].append(key)
    for which, (fill, lost) in bad.items():
        happens = "vLLM computes with it; infinities and NaN follow"
        yield from _scale_finding(which, fill, lost, _INVALID[which], happens)


_INVALID = {
    "scale-not-finite": "scales are infinite or NaN",
    "scale-not-positive": "scales are zero or negative",
    "scale-uncalibrated": "activation scales were never calibrated (uninitialised or default values)",
}


def _checked(s: VllmSubject) -> tuple[str, ...]:
    """Leaves whose scalars vLLM computes with."""
    return s.scheme.scalars if s.scheme is not None else ()


def _scale_finding(which: str, fill: list[str], lost: list[str], what: str, happens: str) -> Iterator[Finding]:
    rows: tuple[tuple[list[str], str, Mend | None], ...] = (
        (fill, "rewrite --fill-missing-scales takes it from the tied side, else from the layer's other experts", FILL),
        (lost, "calibrate and export anew", None),
    )
    for keys, mend, by in rows:
        if keys:
            yield Finding(
                which, "error", tuple(keys), f"{len(keys)} {what}", happens, mend, by,
                f"{MODELOPT} process_weights_after_loading",
            )  # fmt: skip


@rule
def fused_scales(s: VllmSubject) -> Iterator[Finding]:
    """modelopt.py `KNvfp4Static.process` (the largest is used for all shards), `ModelOptNvFp4FusedMoE.
    process_weights_after_loading` (w1's is used for w3); `KNvfp4Dynamic.process` for input scales (the largest).
    """
    scheme = s.scheme
    if scheme is None or scheme.shared is None:
        return
    weights: list[str] = []
    inputs: list[str] = []
    moving = next((x for x in scheme.scalars if x.startswith("input")), None)
    for fused, shards in _fused(s):
        for leaf, found in ((scheme.shared, weights), (moving, inputs)):
            if leaf is None or (leaf == moving and split_expert(f"{fused}.x")[1] is not None):
                continue
            keys = [k for m in shards if (k := m.key(leaf)) is not None and k in s.scalars]
            values = {s.scalars[k].tobytes() for k in keys}
            if len(values) > 1 and all(np.isfinite(s.scalars[k]).all() and (s.scalars[k] > 0).all() for k in keys):
                found.extend(keys)
    modelopt = scheme.shared == "weight_scale_2"  # the one form that is re-encoded
    if weights:
        yield Finding(
            "fused-weight-scale-differs", "error", tuple(weights),
            f"{len(weights)} {scheme.shared} of projections that share one parameter differ",
            "vLLM uses one of them for all shards: the others' weights come out scaled",
            "rewrite re-encodes to one scale" if modelopt else "export anew with one scale for fused projections",
            REWRITE if modelopt else None,
            f"{MODELOPT} KNvfp4Static.process, ModelOptNvFp4FusedMoE.process_weights_after_loading",
        )  # fmt: skip
    if inputs:
        yield Finding(
            "fused-input-scale-differs", "warning", tuple(inputs),
            f"{len(inputs)} {moving} of projections that share one parameter differ",
            "vLLM uses the largest for all shards; a little precision is lost", "", None,
            f"{MODELOPT} KNvfp4Dynamic.process",
        )  # fmt: skip


def _fused(s: VllmSubject) -> Iterator[tuple[str, list[Module]]]:
    """Groups of quantized modules that share one parameter of vLLM's: q/k/v, gate/up, and each expert's gate/up."""
    groups: dict[str, list[Module]] = {}
    for name, module in s.sound.items():
        parent, _, leaf = name.rpartition(".")
        for fused, shards in s.backbone.fused.items():
            if leaf in shards:
                groups.setdefault(f"{parent}.{fused}", []).append(module)
    for fused, modules in groups.items():
        if len(modules) > 1:
            yield fused.rpartition(".")[0], modules


@rule
def kv_scales(s: VllmSubject) -> Iterator[Finding]:
    """quantization/kv_cache.py `BaseKVCacheMethod.process_weights_after_loading`: none stored means 1.0, one of the two
    serves for both; without an FP8 cache they are dropped.
    """
    q = s.quantization
    if q is None or not q.modelopt or q.problem is not None:
        return
    source = "model_executor/layers/quantization/kv_cache.py BaseKVCacheMethod"
    stored: dict[str, dict[str, list[str]]] = {}
    for key in s.entries:
        kind = KV_LEAVES.get(key.rpartition(".")[2])
        hit = formats.kv_scale(key, s.families) if kind else None
        if hit is not None and kind is not None:
            stored.setdefault(s.backbone.map(f"{hit[0]}."), {}).setdefault(kind, []).append(key)
    if not q.kv_fp8:
        keys = tuple(k for kinds in stored.values() for ks in kinds.values() for k in ks)
        if keys:
            yield Finding(
                "kv-scales-unused", "warning", keys,
                f"{len(keys)} KV scales are stored, and no config declares an FP8 cache",
                "vLLM keeps the cache in 16 bits unless told otherwise (--kv-cache-dtype fp8)",
                "restore kv_cache_scheme if the cache is meant to be FP8", None, source,
            )  # fmt: skip
        return
    half, none = [], []
    attention = {f"{n.rpartition('.')[0]}." for n in s.modules if n.endswith(".self_attn.q_proj")}
    for module in sorted(attention):
        kinds = stored.get(module, {})
        if len(kinds) == 1:
            half.append(f"{module}{'v_proj.v_scale' if 'k' in kinds else 'k_proj.k_scale'}")
        elif not kinds:
            none.append(module.rstrip("."))
    if half:
        yield Finding(
            "kv-scale-missing", "error", tuple(half), f"{len(half)} layers have only one of k_scale and v_scale",
            "vLLM uses that one for both", "calibrate the cache and export anew", None, source,
        )  # fmt: skip
    if none:
        yield Finding(
            "kv-scale-missing", "warning", tuple(none),
            f"{len(none)} layers have no KV scale, and the config declares an FP8 cache",
            "vLLM uses 1.0, and warns", "calibrate the cache and export anew", None, source,
        )  # fmt: skip


def findings(subject: VllmSubject) -> Iterable[Finding]:
    """Run every rule."""
    for each in RULES:
        yield from each(subject)
