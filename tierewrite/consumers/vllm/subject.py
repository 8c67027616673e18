"""What vLLM's rules look at: a subject with vLLM's reading of the quantization config, and the modules it builds."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import Any

from tierewrite.consumers.backbone import matches
from tierewrite.consumers.subject import PACKED, Module, Subject
from tierewrite.consumers.vllm.ignore import Ignore
from tierewrite.consumers.vllm.quantization import VISION, Quantization, Scheme
from tierewrite.formats.experts import split_expert


class VllmSubject(Subject):
    """A subject with vLLM's reading of the quantization config."""

    @cached_property
    def quantization(self) -> Quantization | None:
        """What vLLM reads in the configs; None if it takes the checkpoint for an unquantized one."""
        return Quantization.of(self.config, self.folder.quant_config)

    @property
    def scheme(self) -> Scheme | None:
        """What a quantized module must have on disk, if that is known and the config is sound."""
        q = self.quantization
        return None if q is None or q.problem is not None else q.scheme

    @cached_property
    def ignore(self) -> Ignore:
        """The list of modules that vLLM leaves unquantized; an empty one where that is not ModelOpt's."""
        q = self.quantization
        entries = q.ignore if q is not None and q.modelopt and q.problem is None else ()
        return Ignore(entries, self.backbone)

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

    @property
    def group_size(self) -> int | None:
        """The block size that most block scales on disk have; None where there are none."""
        return self.groups.most_common(1)[0][0] if self.groups else None


def _family(scheme: Scheme) -> str:
    if scheme.block is None:
        return "fp8"
    return "nvfp4-packed" if scheme.weight == "weight_packed" else "nvfp4"


def numberless(name: str) -> str:
    """The name with every numeric component replaced by *."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
