#!/usr/bin/env python3
"""What vLLM's own model classes do with names: consumers/vllm/classes.json and formats/fused_sets.json.

    classes.py facts OUT_DIR NAMES.json... [--only ARCHITECTURE...]    one JSON file a class, in vLLM's environment
    classes.py table OUT_DIR CLASSES.json FUSED_SETS.json              the tables, of those files

NAMES.json are what class_names.py makes. Every class is built on the meta device from the small config in the names,
with a quantization config that only notes who asks for a quantization. Then its load_weights is given one tensor at a
time: each name is refused, passed over, or written into a parameter, and that is what the table says of it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.abc
import importlib.machinery
import json
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
os.environ.setdefault("VLLM_MLA_DISABLE", "0")
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")
import shim  # noqa: F401
import torch
from class_names import LAYERS, pattern
from torch.utils._python_dispatch import TorchDispatchMode

SECONDS = 120
SMALL = 64
"""Tensors of at most so many elements are given with (zero) values: loaders look at them."""
WRITES = {"copy_", "fill_", "index_put_", "zero_", "index_copy_", "_foreach_copy_"}


STUBS = ("mistral_common", "torchaudio", "flashinfer")
"""Packages that some classes import and that naming weights does not need."""
ROUTING = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
HUB_ENTRIES: dict[str, dict[str, Any]] = {
    "Glm4MoeLiteForCausalLM": {"first_k_dense_replace": 1},
    "MiniMaxM2ForCausalLM": {"rotary_dim": 64, "scoring_func": "sigmoid", "use_routing_bias": True},
    "Lfm2ForCausalLM": {"block_dim": 2560, "block_ff_dim": 12288},
    "AfmoeForCausalLM": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    "LongcatFlashForCausalLM": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True},
}
"""What the configs on the hub have, vLLM's class reads and the default config of transformers lacks."""


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules of STUBS that are not installed; whatever is taken from them is an empty class."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] in STUBS:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def exec_module(self, module: Any) -> None:
        module.__getattr__ = lambda attribute: type(attribute, (), {})


def numbers_of_meta() -> None:
    """Numbers taken from tensors on the meta device are zeros: only names matter here."""
    item, tolist = torch.Tensor.item, torch.Tensor.tolist

    def zeros(shape: Any) -> Any:
        return [zeros(shape[1:]) for _ in range(shape[0])] if len(shape) else 0.0

    torch.Tensor.item = lambda self: 0.0 if self.is_meta else item(self)  # type: ignore[method-assign]
    torch.Tensor.tolist = (  # type: ignore[method-assign]
        lambda self: zeros(self.shape) if self.is_meta else tolist(self)
    )


def prepare_vllm() -> None:
    """The slow imports, and the changes without which a machine without a GPU cannot build every class."""
    import vllm.engine.arg_utils
    import vllm.model_executor.model_loader.default_loader  # noqa: F401
    import vllm.model_executor.models.registry as registry
    from vllm.platforms import cpu
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    sys.meta_path.append(Stubs())
    numbers_of_meta()
    registry._run_in_subprocess = lambda function: function()
    library = torch.library.Library("_C", "FRAGMENT")
    for name in ("gelu_quick", "gelu_new", "gelu_fast", "gelu_and_mul", "gelu_tanh_and_mul", "silu_and_mul"):
        with contextlib.suppress(RuntimeError):
            library.define(name + "(Tensor! out, Tensor input) -> ()")
    prepare_vllm.library = library  # type: ignore[attr-defined]  # it has to outlive this function
    cpu.CpuPlatform.has_device_capability = classmethod(lambda *a, **k: True)
    cpu.CpuPlatform.supported_quantization = []
    chosen = cpu.CpuPlatform.get_attn_backend_cls.__func__  # type: ignore[attr-defined]

    def dense(cls: Any, selected_backend: Any, attn_selector_config: Any, **more: Any) -> Any:
        return chosen(cls, selected_backend, attn_selector_config._replace(use_sparse=False), **more)

    cpu.CpuPlatform.get_attn_backend_cls = classmethod(dense)
    CPUAttentionBackend.supports_kv_cache_dtype = classmethod(lambda *_: True)
    CPUAttentionBackend.get_supported_head_sizes = staticmethod(list)
    CPUAttentionBackend.supports_head_size = classmethod(lambda *_: True)


def make_probe(*, kv: bool) -> Any:
    """A quantization config that notes which layers ask for a quantization, and which mappers are applied to it.

    Args:
        kv: give attention parameters for the scales of its cache.
    """
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
    from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    kinds = ((LinearBase, "linear"), (ParallelLMHead, "head"), (VocabParallelEmbedding, "embedding"),
             (RoutedExperts, "experts"), (Attention, "attention"))  # fmt: skip

    class Probe(QuantizationConfig):
        def __init__(self) -> None:
            super().__init__()
            self.asked: list[tuple[Any, str, str]] = []
            self.mappers: list[Any] = []

        def get_name(self) -> str:
            return "probe"

        def get_supported_act_dtypes(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16, torch.float32]

        @classmethod
        def get_min_capability(cls) -> int:
            return 0

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Any:
            return cls()

        def apply_vllm_mapper(self, mapper: Any) -> None:
            self.mappers.append(mapper)

        def get_quant_method(self, layer: Any, prefix: str) -> Any:
            kind = next((k for c, k in kinds if isinstance(layer, c)), type(layer).__name__)
            if "Attention" in kind:
                kind = "attention"
            self.asked.append((layer, prefix, kind))
            if kind == "attention" and kv:
                return BaseKVCacheMethod(self)
            return UnquantizedLinearMethod() if kind == "linear" else None

    return Probe()


class Writes(TorchDispatchMode):
    """Notes which parameters are written into, by their storage."""

    def __init__(self, by_storage: dict[int, str]) -> None:
        super().__init__()
        self.by_storage = by_storage
        self.written: dict[str, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.split(".")[0] in WRITES and args and isinstance(args[0], torch.Tensor):
            name = self.by_storage.get(args[0].untyped_storage()._cdata)
            if name is not None:
                self.written[name] = None
        return func(*args, **(kwargs or {}))


def engine_config(written: dict[str, Any], folder: str) -> Any:
    """The VllmConfig of a folder that holds nothing but this config.json."""
    from vllm.engine.arg_utils import EngineArgs

    (Path(folder) / "config.json").write_text(json.dumps(written), encoding="utf-8")
    args = EngineArgs(model=folder, skip_tokenizer_init=True, enforce_eager=True, max_model_len=64, dtype="bfloat16",
                      limit_mm_per_prompt={})  # fmt: skip
    return args.create_engine_config()


def build(config: Any, probe: Any) -> Any:
    """vLLM's model on the meta device."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    config.quant_config = probe
    config.compilation_config.static_forward_context.clear()
    with set_current_vllm_config(config), torch.device("meta"), set_default_torch_dtype(config.model_config.dtype):
        return initialize_model(config)


def targets(model: Any) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers, each once."""
    found: dict[str, torch.Tensor] = dict(model.named_parameters())
    for module_name, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found.setdefault(f"{module_name}.{name}" if module_name else name, buffer)
    return found


class Feeder:
    """Gives a model's load_weights one tensor at a time."""

    def __init__(self, model: Any, config: Any) -> None:
        self.model, self.config = model, config
        self.by_storage: dict[int, str] = {}
        for name, tensor in targets(model).items():
            self.by_storage.setdefault(tensor.untyped_storage()._cdata, name)

    def feed(self, key: str, dtype: str, shape: list[int]) -> tuple[str, list[str] | str]:
        """("reads", parameters written) or ("ignored", "") or ("refused", what vLLM says)."""
        from vllm.config import set_current_vllm_config

        count = 1
        for size in shape:
            count *= size
        kind = getattr(torch, dtype)
        kind = torch.bfloat16 if kind.is_floating_point and kind.itemsize > 1 else kind
        where = "cpu" if count <= SMALL else "meta"
        tensor = torch.zeros(shape, dtype=kind, device=where)
        record = Writes(self.by_storage)
        try:
            with set_current_vllm_config(self.config), record:
                self.model.load_weights(iter([(key, tensor)]))
        except Exception as e:
            if record.written and not isinstance(e, (KeyError, AttributeError)):
                return "reads", list(record.written)
            return "refused", f"{type(e).__name__}: {' '.join(str(e).split())[:160]}"
        return ("reads", list(record.written)) if record.written else ("ignored", "")


def base_of(parameter: str) -> str:
    """The vLLM module that a weight is, or the parameter's own name: `..experts.w13_weight` is `..experts.w13`."""
    return re.sub(r"[._]weight$", "", parameter)


def unpacked_experts(name: str, dtype: str, shape: list[int]) -> Iterator[tuple[str, list[Any]]]:
    """The names under which exporters unpack a fused parameter of experts that the class keeps fused on the hub."""
    parent, _, leaf = name.rpartition(".")
    if not parent.endswith("experts") or len(shape) != 3:
        return
    words = leaf.split("_")
    projections = [f"{w}_{words[-1]}" for w in words[:-1]] if len(words) > 2 else [leaf]
    for projection in projections:
        yield f"{parent}.0.{projection}.weight", [dtype, [shape[1] // len(projections), shape[2]]]


def families(names: dict[str, Any]) -> Iterator[dict[str, list[Any]]]:
    """Every way of writing each parameter: key -> [dtype, shape].

    Its names on the hub and in memory; with and without the base model's prefix; as transformers 4 wrote vision
    towers; unpacked, where it holds experts.
    """
    prefix = names["prefix"] + "." if names["prefix"] else None
    hub = {pattern(key): (key, entry) for key, entry in names["hub"].items()}
    for name, found in names["memory"].items():
        family = dict(hub[p] for p in names["becomes"].get(pattern(name), ()) if p in hub) | {name: found}
        for key, entry in list(family.items()):
            family |= dict(unpacked_experts(key, *entry))
        for key, entry in list(family.items()):
            family[with_vision_model(key)] = entry
            if prefix and key.startswith(prefix):
                family[key.removeprefix(prefix)] = entry
            elif prefix and "lm_head" not in key:
                family[prefix + key] = entry
        yield family


BUFFERS = ("rotary_emb.inv_freq", "masked_bias", "attn_bias", "bias", "position_ids")
KV = ("k_proj.k_scale", "qkv_proj.k_scale", "k_scale", "attn.k_scale")


def layers_of(config: dict[str, Any]) -> int | None:
    """How many layers the language model has."""
    parts = [config, *(v for k, v in config.items() if isinstance(v, dict) and "text" in k)]
    found = [part[name] for part in parts for name in LAYERS if isinstance(part.get(name), int)]
    return found[0] if found else None


def odd_names(hub: dict[str, Any], layers: int | None) -> dict[str, str]:
    """Names that no class has parameters for, each by what it stands for."""
    found = {"unknown": "mystery.weight", "mtp": "mtp.fc.weight"}
    layered = [k for k in hub if re.search(r"(?<![^.])(layers|h|blocks)\.\d+\.", k) and "vision" not in k]
    if not layered or layers is None:
        return found
    stem = re.match(r"(.*?(?<![^.])(?:layers|h|blocks)\.)\d+\.", layered[0])
    assert stem is not None
    found["unknown in a layer"] = f"{stem[1]}0.mystery.weight"
    found["beyond eh_proj"] = f"{stem[1]}{layers}.eh_proj.weight"
    attention = re.compile(re.escape(stem[1]) + r"\d+(\.\w+)*\.\w*att\w*\.\w+\.weight")
    inner = next((k for k in layered if attention.fullmatch(k) and "norm" not in k), None)
    if inner is not None:
        found["beyond layer"] = re.sub(rf"^{re.escape(stem[1])}\d+", f"{stem[1]}{layers}", inner)
        module = inner.removesuffix(".weight")
        parent = module.rpartition(".")[0]
        found["leftover"] = f"{module}.weight_quantizer._amax"
        found["pre_quant_scale"] = f"{module}.pre_quant_scale"
        found |= {f"buffer {b}": f"{parent}.{b}" for b in BUFFERS}
        found |= {f"kv {k}": f"{parent}.{k}" for k in KV}
    return found


def facts(architecture: str, names: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that is asked of one class; key "problem" where it could not be built."""
    import vllm
    from vllm.config import set_current_vllm_config
    from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel

    out: dict[str, Any] = {"vllm": vllm.__version__}
    names = [n | {"config": hub_entries(architecture, n["config"])} for n in names]
    with tempfile.TemporaryDirectory() as folder:
        config = first_that_works([partial(engine_config, with_tie(n["config"], False), folder) for n in names])
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, "file://" + tempfile.mktemp(prefix="rdzv"), 0, "gloo")
        initialize_model_parallel(1)
    heads: dict[str, Any] = {}
    ways = [(w, kv) for n in names for kv in (True, False) for w in (n["config"], with_head_dim(n["config"]))]
    for tied in (True, False):  # the untied one is fed
        try:
            model, probe, config = first_that_works([partial(built, w, tied, kv) for w, kv in ways])
        except Exception:
            if not tied:
                raise
            continue
        heads["tied" if tied else "untied"] = sorted({p for _, p, k in probe.asked if k == "head"})
    out["class"] = type(model).__name__
    out["head"] = heads
    out |= of_build(model, probe)
    out |= of_feeding(Feeder(model, config), names)
    return out


def hub_entries(architecture: str, written: dict[str, Any]) -> dict[str, Any]:
    """The config with what the hub's have."""
    routed = any(name in written for name in ("n_routed_experts", "num_experts", "num_local_experts"))
    return (ROUTING if routed else {}) | HUB_ENTRIES.get(architecture, {}) | written


def first_that_works(ways: list[Any]) -> Any:
    """What the first of the calls returns that raises nothing; the first's exception where all raise."""
    first: Exception | None = None
    for way in ways:
        try:
            return way()
        except Exception as e:
            first = first or e
    assert first is not None
    raise first


def built(written: dict[str, Any], tied: bool, kv: bool) -> tuple[Any, Any, Any]:
    """(model, probe, VllmConfig) of one config."""
    with tempfile.TemporaryDirectory() as folder:
        config = engine_config(with_tie(written, tied), folder)
        probe = make_probe(kv=kv)
        return build(config, probe), probe, config


def with_head_dim(written: dict[str, Any]) -> dict[str, Any]:
    """The config with a head_dim, which some classes of vLLM take for granted."""
    written = {k: with_head_dim(v) if isinstance(v, dict) else v for k, v in written.items()}
    heads, hidden = written.get("num_attention_heads"), written.get("hidden_size")
    if not isinstance(heads, int) or not isinstance(hidden, int) or not heads:
        return written
    return {"head_dim": hidden // heads} | written


def with_tie(written: dict[str, Any], tied: bool) -> dict[str, Any]:
    """The config with tie_word_embeddings set wherever it is, and with a multi-token-prediction layer declared."""
    out: dict[str, Any] = {k: with_tie(v, tied) if isinstance(v, dict) else v for k, v in written.items()}
    if "num_hidden_layers" in out:
        out |= {"num_nextn_predict_layers": 1, "num_mtp_modules": 1}
    if "tie_word_embeddings" in out or "architectures" in out:
        out["tie_word_embeddings"] = tied
    return out


def of_build(model: Any, probe: Any) -> dict[str, Any]:
    """What building tells: who takes a quantization, under which names, and the mappings."""
    paths = {id(module): name for name, module in model.named_modules()}
    takes: dict[str, str] = {}
    path: dict[str, str] = {}
    for layer, prefix, kind in probe.asked:
        takes[pattern(prefix)] = kind
        where = paths.get(id(layer))
        if where is not None and where != prefix:
            path[pattern(where)] = pattern(prefix)
    mappers = []
    for mapper in probe.mappers:
        data = mapper_data(mapper)
        if data and data not in mappers:
            mappers.append(data)
    return {"takes": takes, "path": path, "packed": dict(probe.packed_modules_mapping), "mappers": mappers}


def mapper_data(mapper: Any) -> dict[str, Any]:
    """A WeightsMapper as data, in the order in which it works."""
    found: dict[str, Any] = {}
    renaming = [[list(r.source_patterns), list(r.target_patterns)] for r in getattr(mapper, "orig_to_new_renaming", [])]
    regex = [[p.pattern, t] for p, t in mapper.orig_to_new_regex.items()]
    for kind, pairs in (
        ("renaming", renaming),
        ("regex", regex),
        ("substr", list(map(list, mapper.orig_to_new_substr.items()))),
        ("prefix", list(map(list, mapper.orig_to_new_prefix.items()))),
        ("suffix", list(map(list, mapper.orig_to_new_suffix.items()))),
    ):
        if pairs:
            found[kind] = pairs
    return found


def own_names(feeder: Feeder) -> Iterator[tuple[str, list[Any]]]:
    """The model's own parameters, one a pattern, with fused ones unpacked into equal parts."""
    seen: set[str] = set()
    packed = feeder.config.quant_config.packed_modules_mapping
    for name, tensor in targets(feeder.model).items():
        if pattern(name) in seen or "." not in name or name.endswith(("_scale", "_zero_point")):
            continue
        seen.add(pattern(name))
        dtype, shape = str(tensor.dtype).removeprefix("torch."), list(tensor.shape)
        parent, _, leaf = name.rpartition(".")
        above, _, module = parent.rpartition(".")
        parts = packed.get(module, ())
        if not parts:
            yield name, [dtype, shape]
        elif shape and shape[0] % len(parts) == 0:
            for part in parts:
                yield f"{above}.{part}.{leaf}", [dtype, [shape[0] // len(parts), *shape[1:]]]


def with_vision_model(name: str) -> str:
    """The name as transformers 4 wrote it, with the vision model below the vision tower."""
    return re.sub(r"(?<![^.])vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name, count=1)


def of_feeding(feeder: Feeder, names: list[dict[str, Any]]) -> dict[str, Any]:
    """What load_weights does with every name.

    A name is said to be refused only where another name of the same parameter is read: else the class may have it with
    another config.
    """
    reads: dict[str, str] = {}
    ignored: dict[str, None] = {}
    refused: dict[str, str] = {}
    owners: dict[str, set[str]] = {}  # the ways of writing a parameter, by one of them
    for which in names:
        for family in families(which):
            patterns = set(map(pattern, family))
            owners.setdefault(min(patterns), set()).update(patterns)
            for key, (dtype, shape) in family.items():
                known = pattern(key)
                if known in reads or known in ignored or known in refused:
                    continue
                what, answer = feeder.feed(key, dtype, shape)
                if what == "reads":
                    reads[known] = pattern(base_of(answer[0]))
                elif what == "ignored":
                    ignored[known] = None
                else:
                    refused[known] = str(answer)
    for key, (dtype, shape) in own_names(feeder):
        if pattern(key) in reads:
            continue
        what, answer = feeder.feed(key, dtype, shape)
        if what == "reads":
            reads[pattern(key)] = pattern(base_of(answer[0]))
            ignored.pop(pattern(key), None)
            refused.pop(pattern(key), None)
    odd = {}
    for label, key in odd_names(names[0]["hub"], layers_of(names[0]["config"])).items():
        odd[label] = feeder.feed(key, "bfloat16", [] if label.startswith("kv ") else [8, 8])[0]
    spelled_otherwise = {p for ways in owners.values() if ways & reads.keys() for p in ways}
    unread = [ways for ways in owners.values() if not ways & reads.keys()]
    memory = {pattern(k) for which in names for k in which["memory"]}
    return {
        "reads": reads,
        "ignored": list(ignored),
        "refused": {k: v for k, v in refused.items() if k in spelled_otherwise},
        "unsure": sorted(refused.keys() - spelled_otherwise),
        "unneeded": sorted(memory & {p for ways in unread if ways & ignored.keys() for p in ways}),
        "odd": odd,
        "transformers": [which["transformers"] for which in names],
    }


def attributes(architecture: str) -> dict[str, Any]:
    """What can be read of a class without building it."""
    from vllm.model_executor.models.registry import ModelRegistry

    model_class = ModelRegistry.models[architecture].load_model_cls()
    mapper = getattr(model_class, "hf_to_vllm_mapper", None)
    packed = getattr(model_class, "packed_modules_mapping", None)
    return {
        "class": model_class.__name__,
        "packed": dict(packed) if isinstance(packed, dict) else {},
        "mappers": [mapper_data(mapper.get_rename_mapper())] if mapper is not None else [],
    }


def retired() -> dict[str, str]:
    """Classes that vLLM had once, with the last version that did."""
    from vllm.model_executor.models.registry import _PREVIOUSLY_SUPPORTED_MODELS

    return dict(_PREVIOUSLY_SUPPORTED_MODELS)


def one(architecture: str, names: list[dict[str, Any]], known: bool, unbuilt: str) -> dict[str, Any]:
    """The facts of one class, or what is known without building it; `unbuilt`: why transformers' own has no names."""
    problem = f"transformers {unbuilt}: its names are not known"
    if names:
        try:
            return facts(architecture, names)
        except Exception as e:
            if os.environ.get("TB"):
                traceback.print_exc()
            problem = f"{type(e).__name__}: {telling(' '.join(str(e).split()))}"
    elif not known and architecture in retired():
        problem = f"Model architecture {architecture} was supported in vLLM until v{retired()[architecture]}"
    found: dict[str, Any] = {"problem": problem}
    if known:
        try:
            found |= attributes(architecture)
        except Exception as e:
            found["problem"] += f"; {type(e).__name__}: {' '.join(str(e).split())[:200]}"
    return found


def run_all(target: Path, files: list[str], only: list[str]) -> None:
    """A child for each class: vLLM keeps global state."""
    tables = [json.loads(Path(f).read_text(encoding="utf-8")) for f in files]
    torch.set_num_threads(1)
    prepare_vllm()
    from vllm.model_executor.models.registry import ModelRegistry

    registered = set(ModelRegistry.models)
    (target / "registry").write_text(json.dumps(sorted(registered)), encoding="utf-8")
    for architecture in only or sorted(registered | retired().keys() | {a for t in tables for a in t}):
        file = target / f"{architecture}.json"
        if file.exists() and not only:
            continue
        told = [t[architecture] for t in tables if architecture in t]
        names = [table for table in told if "hub" in table]
        unbuilt = "could not build the class from its default config" if told else "has no class of this name"
        pid = os.fork()
        if pid == 0:
            signal.alarm(SECONDS)
            try:
                found = one(architecture, names, architecture in registered, unbuilt)
                file.write_text(json.dumps(found | {"registered": architecture in registered}), encoding="utf-8")
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        status = os.waitpid(pid, 0)[1]
        if not file.exists():
            found = {"problem": f"the process ended with {status}", "registered": architecture in registered}
            file.write_text(json.dumps(found), encoding="utf-8")


def shortest_prefixes(refused: Iterable[str], known: Iterable[str]) -> list[str]:
    """The shortest beginnings, in whole components, that some refused name has and no other known name."""
    taken = {".".join(name.split(".")[:n]) for name in known for n in range(1, name.count(".") + 2)}
    found: dict[str, None] = {}
    for name in refused:
        parts = name.split(".")
        short = next((p for n in range(1, len(parts) + 1) if (p := ".".join(parts[:n])) not in taken), None)
        if short is not None:
            found[short] = None
    return sorted(found)


REFUSALS = (
    r"Model architecture \w+ was supported in vLLM until v[\d.]+",
    r"Model architecture \w+ is not supported in-tree anymore",
    r"Argument \w+ not found in the forward method of <class '[\w.]+'>",
    r"does not dispatch through the Transformers attention interface",
    r"The Transformers implementation of '?\w+'? is not compatible with vLLM",
    r"has no vLLM implementation and the Transformers implementation is not compatible with vLLM",
    r"Model architectures \[[^]]*\] are not supported for now",
)


def telling(problem: str) -> str:
    """The end of a problem, or vLLM's words of refusal where those stand before it."""
    end = problem[-300:]
    refusals = [m[0] for text in (end, problem) for r in REFUSALS if (m := re.search(r, text))]
    return end if not refusals or refusals[0] in end else refusals[0]


def compact(found: dict[str, Any]) -> dict[str, Any]:
    """The facts of one class in the form of the table; see consumers/class_facts.py."""
    problem = found.get("problem", "")
    out: dict[str, Any] = {"registered": found["registered"], "class": found.get("class", "")}
    if problem:
        words = next((m[0] for r in REFUSALS if (m := re.search(r, problem))), "")
        out |= {"refusal": words} if words and not found["registered"] else {}
        out["problem"] = " ".join(re.sub(r"/tmp/\S+", "DIR", problem).split())[:120]
    out |= {k: v for k in ("packed", "mappers") if (v := found.get(k))}
    if "reads" not in found:
        return out
    reads, refused = found["reads"], found["refused"]
    same = sorted(k for k, v in reads.items() if v == base_of(k))
    out["reads"] = {"same": same, **{k: v for k, v in sorted(reads.items()) if k not in set(same)}}
    out["ignored"] = sorted(found["ignored"])
    out["refused"] = shortest_prefixes(refused, [*reads, *found["ignored"], *found["unsure"]])
    out["unneeded"] = found["unneeded"]
    out["takes"] = dict(sorted(found["takes"].items()))
    bases = {*reads.values(), *(module_of(v) for v in reads.values())}
    out["listed_as"] = {k: v for k, v in sorted(found["path"].items()) if k in bases}
    by_answer: dict[str, list[str]] = {}
    for label, answer in found["odd"].items():
        by_answer.setdefault(answer, []).append(label)
    out["odd"] = by_answer
    out["head"] = [(found["head"].get(w) or [""])[0] for w in ("tied", "untied")]
    return {k: v for k, v in out.items() if v not in ({}, [], "")}


def module_of(base: str) -> str:
    """The module that holds a parameter `...routed_experts.w13`, of experts; else the name itself."""
    parent, _, leaf = base.rpartition(".")
    return parent if re.fullmatch(r"w\d+(_\w+)?", leaf) else base


USUAL = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""As formats/fused.py."""


def fused_sets(reads: dict[str, str]) -> dict[str, list[list[str]]]:
    """Modules whose projections are not fused as usual -> the sets that are."""
    words: dict[str, dict[str, list[str]]] = {}
    for key, parameter in reads.items():
        module, _, leaf = key.rpartition(".")
        parent, _, word = module.rpartition(".")
        if leaf == "weight" and word != "*":
            words.setdefault(parent, {}).setdefault(parameter, []).append(word)
    found: dict[str, list[list[str]]] = {}
    for parent, by_parameter in words.items():
        there = {word for group in by_parameter.values() for word in group}
        usual = {frozenset(s) & there for s in USUAL}
        fused = {frozenset(group) for group in by_parameter.values() if len(group) > 1}
        if fused != {s for s in usual if len(s) > 1}:
            found[parent] = sorted(sorted(group) for group in fused)
    return found


def for_pooling(architecture: str) -> bool:
    """The class may be served through an adapter for pooling, which takes other names too."""
    return architecture.endswith(("Model", "Classification", "Retrieval")) and not architecture.endswith("HeadModel")


def write_table(folder: Path, target: Path, fused_target: Path) -> None:
    """All classes; those of one class of vLLM's that could not be asked are like one that could."""
    found = {f.stem: json.loads(f.read_text(encoding="utf-8")) for f in sorted(folder.glob("*.json"))}
    asked = {d["class"]: a for a, d in reversed(found.items()) if "reads" in d and d["registered"]}
    classes: dict[str, Any] = {}
    for architecture, data in found.items():
        like = asked.get(data.get("class", ""))
        if "reads" not in data and data["registered"] and like is not None and not for_pooling(architecture):
            classes[architecture] = {"like": like}
        else:
            classes[architecture] = compact(data)
            if for_pooling(architecture):
                classes[architecture] = {k: v for k, v in classes[architecture].items() if k not in ("refused", "odd")}
    version = next(d["vllm"] for d in found.values() if "vllm" in d)
    versions = sorted({v for d in found.values() for v in d.get("transformers", ())})
    head = {"schema": 1, "vllm": version, "transformers": versions}
    rows = ",\n".join(f"{json.dumps(a)}: {json.dumps(c)}" for a, c in sorted(classes.items()))
    target.write_text(json.dumps(head)[:-1] + ', "classes": {\n' + rows + "\n}}\n", encoding="utf-8")
    fused = {a: s for a, d in found.items() if d["registered"] and (s := fused_sets(d.get("reads", {})))}
    fused |= {a: fused[c["like"]] for a, c in classes.items() if c.get("like") in fused}
    rows = ",\n".join(f"{json.dumps(a)}: {json.dumps(s)}" for a, s in sorted(fused.items()))
    text = json.dumps({"schema": 1, "vllm": version})[:-1] + ', "classes": {\n' + rows + "\n}}\n"
    fused_target.write_text(text, encoding="utf-8")


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=["facts", "table"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--only", nargs="*", default=[])
    args = parser.parse_args()
    args.folder.mkdir(exist_ok=True)
    if args.what == "facts":
        run_all(args.folder, args.files, args.only)
    else:
        write_table(args.folder, *map(Path, args.files))


if __name__ == "__main__":
    main()
