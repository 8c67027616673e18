"""What vLLM's rules look at: a subject with vLLM's reading of the quantization config, and the modules it builds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from tierewrite import formats
from tierewrite.consumers.backbone import matches
from tierewrite.consumers.class_facts import ClassFacts
from tierewrite.consumers.subject import FLOATS, PACKED, Module, Subject
from tierewrite.consumers.vllm.ignore import ExactIgnore, Ignore, ModeloptIgnore
from tierewrite.consumers.vllm.quantization import VISION, Quantization
from tierewrite.consumers.vllm.schemes import Scheme
from tierewrite.formats.experts import split_expert
from tierewrite.formats.numbered import pattern_of

HEADS = ("lm_head", "proj_out", "embed_out")
QUANTIZABLE = ("linear", "head", "experts")
MTP_ENTRIES = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules", "num_mtp_layers")
MTP_MODULES = ("mtp", "mtp_layers", "mtp_block")
# `model.layers.61.`, `model.language_model.layers.48.`; not the layers of an encoder or a vision tower.
_LAYER = re.compile(r"(?:model\.|language_model\.|transformer\.|decoder\.)*(?:layers|h)\.(\d+)\.")


def _numbered(key: str) -> Iterator[tuple[str, int]]:
    """Numbers in a name, each with what stands before it; not those of experts."""
    parts = key.split(".")
    for at, part in enumerate(parts):
        if part.isdecimal() and part.isascii() and at and parts[at - 1] != "experts":
            yield ".".join(parts[:at]), int(part)


class VllmSubject(Subject):
    """A subject with vLLM's reading of the quantization config."""

    @property
    def facts(self) -> ClassFacts | None:
        """What vLLM's own class does with names; None where no table says so, or its class could not be asked."""
        facts = self.backbone.facts
        return facts if facts is not None and facts.asked else None

    @property
    def known(self) -> bool:
        """Whether vLLM's names for this architecture are known, by a backbone or by facts of its class."""
        return bool(self.backbone.linear) or bool(self.backbone.prefixes) or self.facts is not None

    @cached_property
    def _text_config(self) -> Mapping[str, Any]:
        """The config of the language model."""
        parts = (self.config.get(name) for name in ("text_config", "llm_config", "language_config"))
        return next((p for p in parts if isinstance(p, Mapping) and "num_hidden_layers" in p), self.config)

    @property
    def layer_count(self) -> int | None:
        """How many layers the language model has, by config.json; None where it does not say."""
        found = self._text_config.get("num_hidden_layers")
        return found if isinstance(found, int) else None

    @property
    def mtp(self) -> tuple[str, int]:
        """The entry of config.json that declares layers for multi-token prediction, and how many; ("", 0): none."""
        for name in MTP_ENTRIES:
            for part in (self._text_config, self.config):
                count = part.get(name)
                if isinstance(count, int) and count > 0:
                    return name, count
        return "", 0

    @cached_property
    def mtp_keys(self) -> frozenset[str]:
        """Keys of layers for multi-token prediction: below `mtp`, or of a layer beyond the model's last."""
        return frozenset(k for k in self.entries if k.split(".", 1)[0] in MTP_MODULES or self.beyond_last_layer(k))

    def _behind_last_layer(self, key: str) -> int | None:
        """How many layers of the language model stand between its last, by config.json, and that of the key; None if
        the key's is no layer behind it.
        """
        found = _LAYER.match(key)
        if found is None or self.layer_count is None or int(found[1]) < self.layer_count:
            return None
        return int(found[1]) - self.layer_count

    def beyond_last_layer(self, key: str) -> bool:
        """The key belongs to a layer of the language model, of a higher number than config.json gives it."""
        return self._behind_last_layer(key) is not None

    def of_declared_mtp(self, key: str) -> bool:
        """The key belongs to a layer behind the model's last that config.json declares to be for such prediction."""
        behind = self._behind_last_layer(key)
        return behind is not None and behind < self.mtp[1]

    @cached_property
    def _stacks(self) -> Mapping[str, int]:
        """What stands before the number of a layer -> the highest number, of the keys that the model class has."""
        found: dict[str, int] = {}
        for key in self.places:
            for stack, number in _numbered(key):
                found[stack] = max(number, found.get(stack, 0))
        return found

    def beyond_its_stack(self, key: str) -> bool:
        """The key is a layer's that is like those of the model class, of a higher number than any of them."""
        return any(number > self._stacks.get(stack, number) for stack, number in _numbered(key))

    @property
    def shares_kv(self) -> bool:
        """Its last layers use K and V of earlier ones (Gemma 3n, Gemma 4)."""
        return bool(self._text_config.get("num_kv_shared_layers"))

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
        """The list of modules that vLLM leaves unquantized; an empty one where its meaning is not known."""
        q = self.quantization
        entries = q.ignore if q is not None and q.lists_known and q.problem is None else ()
        return self.ignore_of(entries)

    def ignore_of(self, entries: tuple[str, ...]) -> Ignore:
        """vLLM's reading of another list."""
        q = self.quantization
        if q is None or q.modelopt:
            return ModeloptIgnore(entries, self.backbone)
        return ExactIgnore(entries, self.backbone, any_expert=q.method in ("fp8", "quark"))

    @cached_property
    def destinations(self) -> Mapping[str, list[str]]:
        """See Subject."""
        if self.facts is None:
            return self.targets
        found: dict[str, list[str]] = {}
        for name, keys in self.targets.items():
            found.setdefault(self.facts.map(name), []).extend(keys)
        return found

    def built_as(self, module: str) -> str:
        """The vLLM module that a module of the checkpoint becomes a part of: qkv_proj, gate_up_proj, experts."""
        if self.facts is not None:
            return self._built.get(module, module)
        container, expert, _ = split_expert(module)
        if expert is not None:
            return container
        parent, _, leaf = module.rpartition(".")
        for fused, shards in self.backbone.fused.items():
            if leaf in shards:
                return f"{parent}.{fused}"
        return module

    @cached_property
    def _built(self) -> Mapping[str, str]:
        """Module of the checkpoint -> module of vLLM's, for those that the class reads."""
        facts = self.facts
        assert facts is not None
        found: dict[str, str] = {}
        for name, module in self.modules.items():
            keys = (f"{module.stem}.weight", *(formats.main_parameter(k[0]) or k[0] for k in module.leaves.values()))
            built = next((b for key in keys if (b := facts.module(key)) is not None), None)
            if built is not None:
                found[name] = built
        return found

    def shared_parameter(self, module: str) -> tuple[str, int | None] | None:
        """What identifies the parameter of vLLM's that the module's weight is a part of: its name, and the expert.

        None where it is not known to share one with others.
        """
        parent, _, leaf = module.rpartition(".")
        if self.facts is not None:
            parameter = self.facts.parameter(f"{module}.weight")
            return None if parameter is None else (parameter, split_expert(module)[1])
        for fused, shards in self.backbone.fused.items():
            if leaf in shards:
                return f"{parent}.{fused}", None
        return None

    def partner_there(self, name: str) -> bool:
        """See Subject."""
        if self.facts is None:
            return super().partner_there(name)
        shared = self.shared_parameter(name.rpartition(".")[0])
        return shared is not None and shared in self._shared_there

    @cached_property
    def _shared_there(self) -> set[tuple[str, int | None] | None]:
        return {self.shared_parameter(name) for name, module in self.modules.items() if module.weight is not None}

    def needs(self, parameter: str) -> bool:
        """See Subject."""
        if self.facts is not None and pattern_of(parameter) in self.facts.unneeded:
            return False
        return super().needs(parameter)

    def never_quantized(self, module: str) -> bool:
        """vLLM builds it plain whatever the config says."""
        q = self.quantization
        built = self.built_as(module)
        if any(v in built for v in VISION) and (q is None or q.modelopt):
            return True
        if self.facts is None:
            return matches(module, self.backbone.plain)
        kind = self.facts.kind(built)
        return module in self._built and kind not in QUANTIZABLE and not (kind == "embedding" and not self._lists_known)

    @property
    def _lists_known(self) -> bool:
        return self.quantization is not None and self.quantization.lists_known

    @cached_property
    def _kinds(self) -> set[str]:
        """Modules of which some checkpoint layer is quantized, numbers left out: for backbones without data."""
        return {pattern_of(name) for name in self.quantized}

    def is_linear(self, module: str) -> bool:
        """vLLM builds it as a linear layer that takes the checkpoint's quantization."""
        if self.never_quantized(module):
            return False
        if self.facts is not None and module in self._built:
            built = self._built[module]
            kind = self.facts.kind(built)
            if kind == "head" and self.quantization is not None and not self.quantization.quantizes_head:
                return False
            return kind in QUANTIZABLE and (self._targets is None or bool(self._targets.reasons(built)))
        if not self.backbone.linear:
            return pattern_of(module) in self._kinds or module == "lm_head"
        for row in self.backbone.linear:
            if matches(module, (row["modules"],)):
                sizes = [self._config_entry(path) for path in row.get("multiples_of_64", ())]
                if all(isinstance(size, int) and size % 64 == 0 for size in sizes):
                    return True
        return False

    @cached_property
    def _targets(self) -> Ignore | None:
        """What compressed-tensors quantizes, matched as its lists are; None where that is every linear."""
        q = self.quantization
        return ExactIgnore(q.targets, self.backbone) if q is not None and q.targets else None

    def _config_entry(self, path: str) -> Any:
        found: Any = self.config
        for part in path.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return found

    @property
    def plain_head(self) -> str | None:
        """vLLM's head, where it would be built quantized unless the ignore list names it, and is not so on disk."""
        q = self.quantization
        if q is None or not q.quantizes_head:
            return None
        if self.facts is not None:
            tied = any(alias.endswith(("lm_head.weight", "proj_out.weight")) for alias in self.canonical)
            stored = any(key.endswith(("lm_head.weight", "proj_out.weight")) for key in self.entries)
            head = self.facts.head[0 if tied and not stored else 1]
            quantized = any(self.built_as(name) == head for name in self.quantized)
            return None if quantized or not head else head
        tied_head = "lm_head.weight" in self.canonical or "lm_head" in self.modules or not self.backbone.linear
        has_head = self.model is None or any(n.rpartition(".")[0].endswith("lm_head") for n in self.model.shapes)
        return "lm_head" if tied_head and has_head and "lm_head" not in self.quantized else None

    @cached_property
    def linear(self) -> dict[str, dict[str, Module]]:
        """vLLM's linear modules: name -> the checkpoint modules that it is made of."""
        found: dict[str, dict[str, Module]] = {}
        for name, module in self.modules.items():
            if self.weight_of(module) is not None and self.is_linear(name):
                found.setdefault(self.built_as(name), {})[name] = module
        return found

    def weight_of(self, module: Module) -> str | None:
        """The key of its weight; of plain experts that are stored as one tensor a projection, the first of these."""
        if module.weight is not None or self.facts is None or self.facts.kind(self.built_as(module.name)) != "experts":
            return module.weight
        keys = (keys[0] for keys in module.leaves.values())
        plain = (key for key in keys if self.entries[key].dtype in FLOATS and len(self.entries[key].shape) == 3)
        return next((key for key in plain if self.facts.what(key) == "reads"), None)

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

    @property
    def built_quantized_of_plain(self) -> bool:
        """Nothing is quantized on disk, and vLLM builds linear modules quantized all the same."""
        q = self.quantization
        if q is None or q.scheme is None or not q.lists_known or self.count_quantized or not self.known:
            return False
        return any(name not in self.excluded for name in self.linear if name.rpartition(".")[2] not in HEADS)

    @cached_property
    def declared_otherwise(self) -> bool:
        """The config's algorithm is not what lies on disk."""
        scheme, found = self.scheme, self.on_disk_format
        return scheme is not None and found is not None and found != scheme.family

    @cached_property
    def on_disk_format(self) -> str | None:
        """ "nvfp4", "nvfp4-packed" or "fp8", by what most quantized modules have; None for anything else."""
        seen: Counter[str] = Counter()
        for module in self.quantized.values():
            key = module.weight
            if key is None:
                continue
            if "weight_packed" in module.leaves and "weight_global_scale" in module.leaves:
                seen["nvfp4-packed"] += 1
            elif "weight_scale_2" in module.leaves:
                seen["nvfp4"] += 1
            else:
                seen["fp8" if self.entries[key].dtype == "F8_E4M3" else ""] += 1
        return (seen.most_common(1)[0][0] or None) if seen else None

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
