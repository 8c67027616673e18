#!/usr/bin/env python3
"""Feed DiffusionGemma checkpoints to vLLM's own model class and weight loaders, on a CPU.

    load.py CKPT_DIR... [--order file|reverse|encoder-first|decoder-first] [--process] [--full]
                        [--out FILE_OR_DIR] [--fail-on-conflict]

Real vLLM code: ModelConfig and VllmConfig from the folder, the quantization config and its name mapping,
model construction with every create_weights, the checkpoint's file list and order, AutoWeightsLoader,
WeightsMapper and every weight_loader, and the check of the sampler's settings. Replaced: only the choice of
the NVFP4 linear and MoE kernels (vLLM's own 'emulation' classes, which no CPU would be given).

Prints one JSON object a checkpoint. Exit status: 0 every key accepted and every parameter filled, 1 if not,
2 vLLM refused the folder before loading, 3 (only with --fail-on-conflict) loads, but keys with different
values met in one parameter. With several folders --out is a folder (one file each, named after the
checkpoint), vLLM is imported once, every folder is loaded in a forked child, and the exit status is the
largest one.

Tiny models only: each parameter is copied once for every key that reaches it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"  # diffusion models need it; there is no Triton here
import shim  # noqa: F401
import torch

ENCODER = "model.encoder.language_model."
# Filled with a default where the checkpoint has none.
KV_SCALES = {f"{x}_{kind}" for x in ("q", "k", "v", "prob") for kind in ("scale", "zero_point")}


class Log(logging.Handler):
    """Collects vLLM's warnings: they are all that tells of several defects."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def import_vllm() -> None:
    """The slow imports, done before any fork."""
    import vllm.engine.arg_utils
    import vllm.model_executor.layers.quantization.modelopt
    import vllm.model_executor.model_loader.default_loader
    import vllm.model_executor.models.diffusion_gemma  # noqa: F401
    import vllm.model_executor.models.registry as registry

    registry._run_in_subprocess = lambda fn: fn()  # keeps the shim in effect


def prepare(ckpt: str, rank: int = 0, ranks: int = 1, rendezvous: str = "", **options: Any) -> Any:
    """The VllmConfig that `vllm serve` would make of the folder, with kernels that a CPU can have.

    Args:
        rank, ranks: of the tensor-parallel group.
        rendezvous: a file that the ranks share; "": one of its own.
        options: further arguments of EngineArgs.
    """
    from vllm.config import set_current_vllm_config
    from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms.interface import PlatformEnum

    options = {"max_model_len": 256, **options}
    args = EngineArgs(model=ckpt, skip_tokenizer_init=True, enforce_eager=True, **options)
    config = args.create_engine_config()

    # Kernel choice: nothing in vLLM serves NVFP4 on a CPU, so hand out emulation.
    import vllm.model_executor.kernels.linear as linear
    import vllm.model_executor.layers.quantization.modelopt as modelopt
    from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend, backend_to_kernel_cls
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w4a4_nvfp4 as compressed,
    )

    linear._POSSIBLE_NVFP4_KERNELS[PlatformEnum.CPU] = [linear.EmulationNvFp4LinearKernel]
    backend = NvFp4MoeBackend.EMULATION
    modelopt.select_nvfp4_moe_backend = lambda **kw: (backend, backend_to_kernel_cls(backend)[0])
    compressed.select_nvfp4_moe_backend = modelopt.select_nvfp4_moe_backend

    # Weight-only checkpoints ask for Marlin; an FP8 KV cache asks for AVX-512.
    linear.MarlinNvFp4LinearKernel.is_supported = classmethod(lambda *_: (True, None))
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    CPUAttentionBackend.supports_kv_cache_dtype = classmethod(lambda *_: True)

    with set_current_vllm_config(config):
        meeting = "file://" + (rendezvous or tempfile.mktemp(prefix="vllm_rdzv"))
        init_distributed_environment(ranks, rank, meeting, rank, "gloo")
        initialize_model_parallel(ranks)
    return config


def build(config: Any) -> torch.nn.Module:
    """vLLM's model, its parameters not yet filled."""
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    config.compilation_config.static_forward_context.clear()
    with set_default_torch_dtype(config.model_config.dtype):
        return initialize_model(config)


class Source:
    """vLLM's own iterator over the checkpoint; remembers the key in flight."""

    def __init__(self, config: Any, model: torch.nn.Module, order: str, drop: set[str]) -> None:
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

        self.loader = DefaultModelLoader(config.load_config)
        self.config, self.model, self.order, self.drop = config, model, order, drop
        self.key: str | None = None
        self.keys: list[str] = []

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        items = self.loader.get_all_weights(self.config.model_config, self.model)
        if self.order != "file":
            items = list(items)
            if self.order == "reverse":
                items.reverse()
            else:
                encoder_last = self.order == "decoder-first"
                items.sort(key=lambda kv: kv[0].startswith(ENCODER) == encoder_last)
        for key, tensor in items:
            if key in self.drop:
                continue
            self.key = key
            self.keys.append(key)
            yield key, tensor


def targets(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint can fill: parameters and persistent buffers."""
    out: dict[str, torch.Tensor] = dict(model.named_parameters())
    for module_name, module in model.named_modules():
        for n, buffer in module.named_buffers(recurse=False):
            if n in module._non_persistent_buffers_set or buffer is None:
                continue
            if n in ("_k_scale", "_v_scale", "_q_scale", "_prob_scale"):
                continue  # runtime copies of the k_scale, v_scale, ... parameters
            if not any(buffer is t for t in out.values()):
                out[f"{module_name}.{n}" if module_name else n] = buffer
    return out


def raw(t: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes, sharing its memory."""
    return t.detach().reshape(-1).view(torch.uint8)


def digest(t: torch.Tensor) -> str:
    """Short SHA-256 of dtype, shape and bytes."""
    h = hashlib.sha256(f"{t.dtype}{tuple(t.shape)}".encode())
    if t.numel():
        h.update(bytes(raw(t.contiguous()).numpy()))
    return h.hexdigest()[:20]


class Trace:
    """Wraps every weight_loader; finds, element by element, which key wrote it.

    A loader is called twice, over a buffer and over its complement: the elements that come out the same both
    times are the ones that it wrote.
    """

    def __init__(self, model: torch.nn.Module, source: Source) -> None:
        from vllm.model_executor.model_loader.weight_utils import default_weight_loader

        self.source, self.params = source, targets(model)
        self.owner: dict[str, torch.Tensor] = {}
        self.writes: dict[str, int] = {}
        self.conflicts: list[dict[str, Any]] = []
        self.index: dict[str, int] = {}
        self.names: list[str] = []
        self.casts: dict[str, list[str]] = {}
        for name, p in self.params.items():
            assert p.is_contiguous(), name
            self.owner[name] = torch.full((p.numel(),), -1, dtype=torch.int32)
            p.weight_loader = self.wrap(name, p, getattr(p, "weight_loader", default_weight_loader))

    def wrap(self, name: str, p: Any, original: Any) -> Any:
        def loader(*args: Any, **kw: Any) -> Any:
            param = kw.get("param", args[0] if args else None)
            assert param is p, f"{name}: loader called for another parameter"
            loaded = kw.get("loaded_weight", args[1] if len(args) > 1 else None)
            key = self.source.key
            assert key is not None
            if loaded is not None and loaded.dtype != p.dtype:
                cast = f"{loaded.dtype} -> {p.dtype}".replace("torch.", "")
                self.casts.setdefault(cast, []).append(key)
            if p.numel() == 0:
                return original(*args, **kw)
            buffer = raw(p.data)
            before = buffer.clone()
            buffer.copy_(~before)
            original(*args, **kw)
            first = buffer.clone()
            buffer.copy_(before)
            result = original(*args, **kw)
            size = p.element_size()
            wrote = (first == buffer).view(-1, size).all(1)
            self.writes[key] = self.writes.get(key, 0) + int(wrote.sum())
            if key not in self.index:
                self.index[key] = len(self.names)
                self.names.append(key)
            owner = self.owner[name]
            again = wrote & (owner >= 0) & (owner != self.index[key])
            if again.any():
                differ = again & (before.view(-1, size) != buffer.view(-1, size)).any(1)
                for previous in owner[again].unique().tolist():
                    both = again & (owner == previous)
                    at = int(both.nonzero()[0])
                    self.conflicts.append(
                        {
                            "param": name, "first": self.names[previous], "winner": key,
                            "elements": int(both.sum()), "different": int((both & differ).sum()),
                            "first_value": float(before.view(p.dtype)[at]),
                            "winner_value": float(p.data.reshape(-1)[at]),
                        }
                    )  # fmt: skip
            owner[wrote] = self.index[key]
            return result

        return loader


def refused_keys(config: Any, model: torch.nn.Module, order: str, limit: int) -> list[dict[str, str]]:
    """Which keys abort the load: it is retried without each of them until it runs through."""
    drop: set[str] = set()
    refused: list[dict[str, str]] = []
    while len(refused) < limit:
        source = Source(config, model, order, drop)
        try:
            model.load_weights(source)
            break
        except Exception as e:
            refused.append({"key": str(source.key), "error": f"{type(e).__name__}: {e}"[:240]})
            if source.key is None or source.key in drop:
                break
            drop.add(source.key)
    return refused


def is_kv_scale(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in KV_SCALES and ".attn." in name


def scale_notes(params: dict[str, torch.Tensor]) -> list[str]:
    """What process_weights_after_loading will do with the scales (the rules of vLLM's modelopt.py)."""
    notes = []
    for n, p in params.items():
        v = p.data
        if n.endswith("routed_experts.w13_weight_scale_2") and v.ndim == 2 and v.shape[1] == 2:
            if not torch.allclose(v[:, 0], v[:, 1]):
                differ = int((v[:, 0] != v[:, 1]).sum())
                notes.append(f"{n}: w1 != w3 for {differ} experts; w1's is used for both")
        elif n.endswith(("weight_scale_2", ".input_scale")) and "routed_experts" not in n and v.numel() > 1:
            if torch.unique(v).numel() != 1:
                notes.append(f"{n}: {[float(x) for x in v]}; the maximum is used for all shards")
        elif n.endswith(("w13_input_scale", "w2_input_scale")) and torch.unique(v).numel() != 1:
            notes.append(
                f"{n}: {torch.unique(v).numel()} different values over experts and shards, min "
                f"{float(v.min()):.6g} max {float(v.max()):.6g}; most backends use one maximum"
            )
        if n.endswith(("input_scale", "weight_scale_2")) and not (torch.isfinite(v).all() and (v > 0).all()):
            notes.append(f"{n}: not positive and finite")
    return notes


def process(config: Any, model: torch.nn.Module) -> dict[str, Any]:
    """Run process_weights_after_loading; digests of what the kernels would compute with."""
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    try:
        process_weights_after_loading(model, config.model_config, torch.device("cpu"))
    except Exception as e:
        # An operator that vLLM's CPU build has and a bare torch has not says nothing of the checkpoint.
        which = "process_unsupported" if "_OpNamespace" in str(e) else "process_failed"
        return {which: f"{type(e).__name__}: {e}"[:500]}
    scales: dict[str, Any] = {}
    for n, m in model.named_modules():
        if "decoder.decoder_layers" in n:
            continue
        for attribute in ("input_global_scale", "weight_global_scale", "w13_input_scale", "w2_input_scale",
                          "w13_weight_scale_2", "w2_weight_scale_2"):  # fmt: skip
            v = getattr(m, attribute, None)
            if isinstance(v, torch.Tensor):
                scales[f"{n}.{attribute}"] = [float(x) for x in v.reshape(-1)[:8]]
    digests = {n: digest(p.data) for n, p in targets(model).items()}
    return {"processed_scales": scales, "processed_digests": digests}


def sampler_settings(config: Any, model: torch.nn.Module) -> str | None:
    """What vLLM's DiffusionGemmaModelState objects to in generation_config.json; None if nothing."""
    from vllm.model_executor.models import diffusion_gemma

    settings = config.model_config.try_get_generation_config()
    state = SimpleNamespace(
        vllm_config=config, model_config=config.model_config, gen_config=settings, model=model,
        diffusion_states=None,
    )  # fmt: skip
    diffusion_gemma.DiffusionSampler = lambda **kw: None  # only its arguments are of interest
    try:
        settings["stability_threshold"]  # as DiffusionGemmaModelState.__init__ does
        diffusion_gemma.DiffusionGemmaModelState.custom_sampler(state, None)
    except (KeyError, ValueError) as e:
        return f"{type(e).__name__}: {e}"
    return None


def load(ckpt: str, order: str, also_process: bool, limit: int) -> dict[str, Any]:
    """Everything that vLLM does with one folder, as plain data; key 'status' holds the exit status."""
    import vllm
    from vllm.config import set_current_vllm_config

    name = os.path.basename(os.path.abspath(ckpt))
    out: dict[str, Any] = {"checkpoint": name, "vllm": vllm.__version__, "order": order}
    log = Log()
    try:
        config = prepare(ckpt)
        # Only now: creating a VllmConfig configures vLLM's logger again.
        logging.getLogger("vllm").addHandler(log)
        with set_current_vllm_config(config):
            model = build(config)
    except Exception as e:
        refused = f"{type(e).__name__}: {e}"[:600]
        return out | {"refused": refused, "warnings": sorted(set(log.lines)), "status": 2}
    quantization = config.quant_config
    weight_only = getattr(quantization, "quant_method", None) == "W4A16_NVFP4"
    out["quantization"] = config.model_config.quantization
    out["quant_algo"] = getattr(quantization, "quant_method", None)
    out["excluded_after_mapping"] = sorted(set(getattr(quantization, "exclude_modules", [])))
    out["quantized_modules"] = sorted(
        n for n, m in model.named_modules()
        if type(getattr(m, "quant_method", None)).__name__.startswith("ModelOpt")
        and not n.endswith(".attn") and "decoder.decoder_layers" not in n
    )  # fmt: skip
    out["sampler_settings"] = sampler_settings(config, model)
    out["warnings_at_build"] = sorted(set(log.lines))

    with set_current_vllm_config(config):
        unexpected = refused_keys(config, model, order, limit)
        # The load that counts, traced, into a fresh model, without the keys that abort it.
        log.lines.clear()
        model = build(config)
        source = Source(config, model, order, {u["key"] for u in unexpected})
        trace = Trace(model, source)
        returned: set[str] = set()
        try:
            returned = set(model.load_weights(source))
        except Exception as e:
            out["load_failed"] = f"{source.key}: {type(e).__name__}: {e}"[:400]

        unloaded, partial, kv_default, unused = [], [], [], []
        for n, owner in trace.owner.items():
            left = int((owner < 0).sum())
            if left == 0:
                continue
            if is_kv_scale(n):
                kv_default.append(n)
            elif weight_only and n.endswith("input_scale"):
                unused.append(n)  # registered, never read
            elif left == owner.numel():
                unloaded.append(n)
            else:
                partial.append({"param": n, "missing": left, "of": owner.numel()})
        scales: dict[str, Any] = {}
        for n, p in trace.params.items():
            if n.endswith(("input_scale", "weight_scale_2")) or (is_kv_scale(n) and n not in kv_default):
                keys = [trace.names[o] if o >= 0 else None for o in trace.owner[n].tolist()]
                values = [float(v) for v in p.data.reshape(-1)]
                scales[n] = [{"value": v, "key": k} for v, k in zip(values, keys, strict=True)]
        different = [c for c in trace.conflicts if c["different"]]
        empty = {*unloaded, *kv_default, *unused}
        out.update(
            accepted=len(source.keys),
            ignored=[k for k in source.keys if trace.writes.get(k, 0) == 0],
            unexpected=unexpected,
            unloaded_params=unloaded,
            partial_params=partial,
            kv_scales_left_at_default=len(kv_default),
            input_scales_not_used=len(unused),
            kv_cache_dtype=str(config.cache_config.cache_dtype),
            # names that vLLM itself would report as loaded although elements are missing
            called_loaded_though_partial=[x["param"] for x in partial if x["param"] in returned],
            conflicts={"total": len(trace.conflicts), "different": len(different), "list": different},
            dtype_casts={k: len(v) for k, v in trace.casts.items()},
            scale_notes=scale_notes({n: p for n, p in trace.params.items() if n not in unused}),
            scales=scales,
            digests={n: digest(p.data) for n, p in trace.params.items() if n not in empty},
            warnings=sorted(set(log.lines)),
        )
        if also_process:
            log.lines.clear()
            out.update(process(config, model))
            out["warnings_of_processing"] = sorted(set(log.lines))
    bad = unexpected or unloaded or partial or "load_failed" in out or "process_failed" in out
    out["status"] = 1 if bad else 0
    return out


def summary(out: dict[str, Any]) -> dict[str, Any]:
    """The same object with long lists cut, for a terminal."""
    short = {k: v for k, v in out.items() if not k.endswith("digests")}
    for k, v in short.items():
        if isinstance(v, list) and len(v) > 12:
            short[k] = [*v[:12], f"... {len(v) - 12} more"]
    if "conflicts" in short and len(short["conflicts"]["list"]) > 6:
        found = short["conflicts"]["list"]
        short["conflicts"] = short["conflicts"] | {"list": [*found[:6], f"... {len(found) - 6} more"]}
    if "scales" in short:
        scales = short["scales"].items()
        short["scales"] = {n: v for n, v in scales if n.endswith("input_scale") and ".layers.0." in n}
    return short


def one(ckpt: str, a: argparse.Namespace, out_file: str | None, stdout: Any) -> int:
    out = load(ckpt, a.order, a.process, a.max_retries)
    if out_file:
        Path(out_file).write_text(json.dumps(out, indent=1), encoding="utf-8")
    else:
        stdout.write(json.dumps(out if a.full else summary(out), indent=1) + "\n")
        stdout.flush()
    if out["status"] == 0 and a.fail_on_conflict and out["conflicts"]["different"]:
        return 3
    return int(out["status"])


def main() -> int:
    ap = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    ap.add_argument("ckpt", nargs="+")
    ap.add_argument("--order", default="file", choices=["file", "reverse", "encoder-first", "decoder-first"])
    ap.add_argument("--process", action="store_true", help="also run process_weights_after_loading")
    ap.add_argument("--full", action="store_true", help="print long lists in full")
    ap.add_argument("--fail-on-conflict", action="store_true")
    ap.add_argument("--out", help="write the full JSON there (a folder when several checkpoints are given)")
    ap.add_argument("--max-retries", type=int, default=400)
    a = ap.parse_args()
    # vLLM logs to standard output; keep that for the JSON alone.
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)  # tiny tensors; and a forked child has no thread pool
    import_vllm()
    if len(a.ckpt) == 1:
        return one(a.ckpt[0], a, a.out, stdout)
    status = 0
    for ckpt in a.ckpt:
        out_file = os.path.join(a.out, os.path.basename(os.path.abspath(ckpt)) + ".json") if a.out else None
        pid = os.fork()  # vLLM keeps global state (process groups, layer names): a child for each
        if pid == 0:
            code = 70
            try:
                code = one(ckpt, a, out_file, stdout)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        status = max(status, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    return status


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # gloo's threads would keep the process alive
