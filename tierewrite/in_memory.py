"""A state dict in memory: the same plan, the same proof and the same report as for a checkpoint on disk.

    state_dict, report = tierewrite.dedupe_state_dict(model.state_dict(), model)
    model.save_pretrained("canonical", state_dict=state_dict)      # which empties the dict it is given

The tensors are described as a checkpoint's header would describe them, and everything is decided by the rooms that
decide for files; no rule lives here. Survivors are the caller's own tensor objects: nothing is copied but merged
scales. Ties are confirmed by the BLAKE3 of the tensors' bytes, on the GPU for tensors that are there, if CuPy works.

Refused: meta tensors, sharded tensors (DTensor) and other tensors made of several, sparse and torch-quantized ones,
values that are no tensors. None of them has the bytes that a checkpoint would hold.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from tierewrite import digest
from tierewrite.consumers.needed import with_needed_names
from tierewrite.errors import UsageError, first_line, shown
from tierewrite.planning.plan import Action, RewritePlan, needed_for_confirmation
from tierewrite.planning.policy import KVScales, NamesFor, Policy
from tierewrite.report import Report, build_report
from tierewrite.rewriting.options import Device
from tierewrite.source.dtypes import PAIRS, SAFETENSORS_OF_TORCH
from tierewrite.source.table import Checkpoint, Shard, TensorEntry, Tensors
from tierewrite.ties.on_disk import on_disk
from tierewrite.ties.tie_map import TieMap
from tierewrite.values.confirm import refusal, refuted
from tierewrite.values.content import Patch
from tierewrite.values.merged import MergedScales, merge_scales, separate_kv_warnings
from tierewrite.values.opened import Evidence, Opened

if TYPE_CHECKING:
    import torch

OnMismatchInMemory = Literal["error", "keep"]
"""Nothing is re-encoded in memory: there is no "repack"."""

NAME = "state dict"
"""What report and errors call source and result."""

_ADVICE = 'Keep both in the state dict with on_mismatch="keep", or find out which step made them differ.'


def dedupe_state_dict(
    state_dict: Mapping[str, torch.Tensor],
    ties: Any,
    *,
    on_mismatch: OnMismatchInMemory = "error",
    kv_scales: KVScales = "keep",
    keep_names_for: NamesFor | None = None,
    device: Device = "auto",
) -> tuple[dict[str, torch.Tensor], Report]:
    """Every tied tensor of `state_dict` once, under its canonical name.

    Args:
        state_dict: dense torch tensors on CPU or GPUs, contiguous or not, under the names of the model or of a
            checkpoint. Neither it nor any of its tensors is changed. May be empty, as it is on all ranks but the first
            after a gather.
        ties: who declares the ties: a transformers `PreTrainedModel` (also wrapped by DDP, torch.compile or FSDP2), a
            `PretrainedConfig` with its `architectures`, a mapping {alias: canonical} as in a ties file, or a `TieMap`.
        on_mismatch: "error" refuses when a declared tie is not confirmed by the bytes; "keep" leaves such groups whole.
        keep_names_for: "sglang" or "transformers": every name that its loader would miss stays, with the one value of
            its tie; None: one name of each tie.
        kv_scales: "keep" leaves KV-cache scales on every side; "merge" leaves one merged canonical value.
        device: where the hashing happens. "auto": tensors on a GPU are hashed there if CuPy works, and else through
            copies, one tensor at a time; "cpu": always so; "cuda": as "auto", but a GPU is a must.

    Returns:
        The new state dict, in the order of the old one, and the report of what was done. A survivor is the very object
        that came in; only merged scales are new: same dtype, shape and device, no gradient.

    Raises:
        UsageError: a wrong argument, or a value that is no tensor with bytes (`tensor` names it); TieFileError: a
            mapping that is cyclic or matches nothing.
        Refused: a tie is not confirmed, or a companion is of no known format.
        ConfigError: the class that the config names cannot be asked for its ties.
    """
    for option, value, choices in (
        ("on_mismatch", on_mismatch, get_args(OnMismatchInMemory)),
        ("device", device, get_args(Device)),
    ):
        if value not in choices:
            raise UsageError(f"{option} is {value!r}; expected one of {', '.join(choices)}")
    if not isinstance(state_dict, Mapping):
        raise UsageError(f"the state dict is a {type(state_dict).__name__}; expected a mapping of names to tensors")
    policy = Policy(on_mismatch=on_mismatch, kv_scales=kv_scales, keep_names_for=keep_names_for)
    config = _config_of(ties)
    checkpoint = _described(state_dict, config)
    tie_map = _ties_of(ties, config, state_dict.keys())
    disk = on_disk(tie_map, state_dict.keys(), checkpoint.tensors)
    hasher = _Hasher(state_dict, device)
    opened = with_needed_names(Opened(checkpoint, tie_map, disk), policy)
    evidence = Evidence()
    while isinstance(step := _attempt(opened, policy, evidence, hasher, state_dict), Evidence):
        evidence = step
    plan, values = step
    result = _carried_out(state_dict, plan, values.contents)
    report = build_report(
        checkpoint,
        tie_map,
        plan,
        merged=values.merged,
        reencoded=(),
        shards=(),
        src=NAME,
        dst=NAME,
        device=hasher.description,
        warnings=(*values.warnings, *separate_kv_warnings(evidence.separate_kv)),
    )
    return result, replace(report, before_shards=(), after_tensors=len(result))


def _attempt(
    opened: Opened, policy: Policy, evidence: Evidence, hasher: _Hasher, state_dict: Mapping[str, torch.Tensor]
) -> tuple[RewritePlan, MergedScales] | Evidence:
    """A plan that the bytes confirm and the values of its scales; or what the next plan has to know.

    Raises:
        Refused: a tie is not confirmed, and `on_mismatch` is "error".
    """
    plan = opened.plan(policy, evidence)
    digests = hasher.digests(needed_for_confirmation(plan.groups))
    found = refuted(opened.checkpoint, plan, digests)
    if policy.on_mismatch == "error" and (found or plan.unconfirmed()):
        raise refusal(opened.checkpoint, plan, found, digests, _ADVICE)
    if found:
        return evidence.with_refuted(opened.checkpoint, plan, digests, found)
    values = merge_scales(opened.checkpoint, plan, lambda _, keys: _read(state_dict, keys))
    if values.separate_kv:
        return replace(evidence, separate_kv=evidence.separate_kv | values.separate_kv)
    return plan, values


def _carried_out(
    state_dict: Mapping[str, torch.Tensor],
    plan: RewritePlan,
    contents: Mapping[str, Patch],
) -> dict[str, torch.Tensor]:
    """The result of a confirmed plan, in the order of the source."""
    result: dict[str, torch.Tensor] = OrderedDict() if isinstance(state_dict, OrderedDict) else {}
    if hasattr(state_dict, "_metadata"):  # versions of the modules, which load_state_dict asks for
        result._metadata = state_dict._metadata  # type: ignore[attr-defined]
    for name, tensor in state_dict.items():
        fate = plan.tensors[name]
        if fate.action is Action.DROP:
            continue
        content = contents.get(fate.target)
        if content is not None and content.data != content.original:
            tensor = _like(tensor, content.data)
        result[fate.target] = tensor
    return result


def _config_of(ties: Any) -> dict[str, Any]:
    """The config of a model or the config itself, as config.json would have it; {} if there is none."""
    config: Any = getattr(_unwrapped(ties), "config", None) if _is_module(ties) else ties
    if not hasattr(config, "to_json_string"):
        return {}
    try:
        found = json.loads(config.to_json_string(use_diff=False))
    except Exception as error:
        raise UsageError(f"the config ({type(config).__name__}) cannot be written as JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def _ties_of(ties: Any, config: dict[str, Any], keys: Iterable[str]) -> TieMap:
    """The ties that `ties` declares, whatever it is.

    Raises:
        UsageError: it is nothing that declares ties.
    """
    keys = list(keys)
    if isinstance(ties, TieMap):
        return ties
    if isinstance(ties, Mapping):
        return TieMap.from_mapping(ties, keys) if keys else TieMap((), "mapping")
    if _is_module(ties):
        model = _unwrapped(ties)
        if not hasattr(model, "all_tied_weights_keys"):
            raise UsageError(
                f"a {type(model).__name__} does not declare ties the way transformers' models do; pass the "
                "PreTrainedModel, its config, or a mapping {alias: canonical}"
            )
        return TieMap.from_model(model)
    if config:
        if not config.get("architectures"):
            # The class that AutoModel takes then has no head, and says nothing about it.
            raise UsageError(
                f"the config ({type(ties).__name__}) names no architectures, so whose ties count is not known; pass "
                'the model, or set config.architectures to its class, as in ["Qwen3ForCausalLM"]'
            )
        return TieMap.resolve(Path(), config, keys=keys)
    raise UsageError(
        f"the ties are a {type(ties).__name__}; expected a transformers model or config, or a mapping "
        "{alias: canonical}"
    )


def _is_module(value: Any) -> bool:
    import torch

    return isinstance(value, torch.nn.Module)


def _unwrapped(model: Any) -> Any:
    """The model inside DistributedDataParallel (`module`) and torch.compile (`_orig_mod`)."""
    while True:
        children = model._modules  # torch.compile's wrapper passes every other attribute on
        if "_orig_mod" in children:
            model = children["_orig_mod"]
        elif "module" in children and not hasattr(model, "all_tied_weights_keys"):
            model = children["module"]
        else:
            break
    return model


def _described(state_dict: Mapping[str, Any], config: dict[str, Any]) -> Checkpoint:
    """The state dict as the header of a checkpoint of one file would describe it.

    Raises:
        UsageError: a key that is no name, or a value that has no bytes of its own.
    """
    entries: dict[str, TensorEntry] = {}
    position = 0
    for name, tensor in state_dict.items():
        if not isinstance(name, str):
            raise UsageError(f"the key {shown(repr(name))} of the state dict is no string")
        _check(name, tensor)
        dtype = str(tensor.dtype).removeprefix("torch.")
        shape = tuple(tensor.shape)
        name_in_header = SAFETENSORS_OF_TORCH.get(dtype, dtype)  # what is missing there is compared, never interpreted
        if name_in_header == PAIRS and shape:
            shape = (*shape[:-1], 2 * shape[-1])
        end = position + tensor.numel() * tensor.element_size()
        entries[name] = TensorEntry(name, name_in_header, shape, 0, position, end)
        position = end
    shard = Shard(NAME, Path(), position, 0, 0, 0, {})
    return Checkpoint(Path(), (shard,), Tensors.of(entries.values()), None, (), (), config, {}, ())


def _check(name: str, tensor: Any) -> None:
    import torch
    from torch._subclasses.fake_tensor import is_fake
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    problem = None
    if not isinstance(tensor, torch.Tensor):
        problem = f"is a {type(tensor).__name__}; expected a tensor. Take it out of the state dict first"
    elif torch.nn.parameter.is_lazy(tensor):
        problem = "is uninitialized: it has no shape yet. Run the model once, or load the weights, then deduplicate"
    elif tensor.is_nested:
        problem = "is a nested tensor, one of several shapes; expected a dense one, as a checkpoint holds it"
    elif hasattr(tensor, "device_mesh") and hasattr(tensor, "placements"):
        problem = (
            "is a DTensor, a part of a tensor that is spread over ranks; expected all of it. Gather the state dict "
            "first: get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))"
        )
    elif tensor.is_meta or is_fake(tensor):
        problem = "is a meta tensor: it has no bytes to compare. Load the weights first, then deduplicate"
    elif is_traceable_wrapper_subclass(tensor):
        problem = (
            f"is a {type(tensor).__name__}, a tensor made of several; expected plain tensors, as a checkpoint holds "
            "them. Flatten it first, as its library does to save it"
        )
    elif tensor.layout is not torch.strided or tensor.is_quantized:
        problem = f"is a {tensor.layout} tensor of {tensor.dtype}; expected a dense one, as a checkpoint holds it"
    else:
        problem = _missing_bytes(tensor)
    if problem is not None:
        raise UsageError(problem, tensor=name)


def _missing_bytes(tensor: torch.Tensor) -> str | None:
    """What is wrong with a dense tensor whose memory is shorter than its shape says; None if nothing is."""
    try:
        there = tensor.untyped_storage().nbytes()
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        needed = (tensor.storage_offset() + last + 1) * tensor.element_size() if tensor.numel() else 0
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return f"has no memory that can be read ({shown(first_line(error))}); expected a plain tensor with its bytes"
    if there >= needed:
        return None
    return (
        f"says that it takes {needed} bytes, and its memory has {there}: freed, as by FSDP between two steps. Gather "
        "the state dict first: get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))"
    )


def _bytes_view(name: str, tensor: torch.Tensor, *, on_cpu: bool = False) -> torch.Tensor:
    """The tensor's bytes in row-major order, uint8 (n,); a copy only if they do not lie so, or not on the CPU.

    Raises:
        UsageError: torch cannot give them.
    """
    import torch

    try:
        with torch._C.DisableTorchFunctionSubclass():  # a dense subclass is read as the plain tensor that it is
            plain = tensor.detach().as_subclass(torch.Tensor)
        plain = plain.cpu() if on_cpu else plain
        return plain.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise UsageError(
            f"is a {type(tensor).__name__} of {tensor.dtype} on {tensor.device} whose bytes cannot be read "
            f"({shown(first_line(error))}); expected a plain tensor, as a checkpoint holds it",
            tensor=name,
        ) from error


def _read(state_dict: Mapping[str, torch.Tensor], keys: Iterable[str]) -> dict[str, bytes]:
    """The bytes of small tensors (scales): one transfer a device, not one a tensor."""
    import torch

    by_device: dict[Any, list[str]] = {}
    for key in keys:
        by_device.setdefault(state_dict[key].device, []).append(key)
    found: dict[str, bytes] = {}
    for names in by_device.values():
        views = [_bytes_view(name, state_dict[name]) for name in names]
        data = torch.cat(views).cpu().numpy().tobytes()
        position = 0
        for name, view in zip(names, views, strict=True):
            found[name] = data[position : position + len(view)]
            position += len(view)
    return found


def _like(tensor: torch.Tensor, data: bytes) -> torch.Tensor:
    """A tensor of these bytes, with the dtype, shape and device of `tensor`."""
    import torch

    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return flat.view(tensor.dtype).reshape(tensor.shape).to(tensor.device)


class _Hasher:
    """Digests of a state dict's tensors, each memory once, where the tensors are."""

    def __init__(self, state_dict: Mapping[str, torch.Tensor], device: str) -> None:
        self._tensors = state_dict
        self._cpu = digest.select("cpu")
        self._gpu: digest.Digester | None = None
        if device == "cuda" or (device == "auto" and any(t.device.type == "cuda" for t in state_dict.values())):
            found = digest.select(device)
            self._gpu = found if found.device == "cuda" else None
            self._cpu = self._cpu if self._gpu else found
        self._known: dict[str, bytes] = {}

    @property
    def description(self) -> str:
        return (self._gpu or self._cpu).description

    def digests(self, keys: Iterable[str]) -> Mapping[str, bytes]:
        """BLAKE3 of each of these tensors (and of any asked for earlier)."""
        # One piece of memory has one content while the state dict holds it, whatever its names are.
        same: dict[Any, list[str]] = {}
        for key in keys:
            if key not in self._known:
                same.setdefault(_memory(key, self._tensors[key]), []).append(key)
        in_place: dict[bool, list[tuple[list[str], torch.Tensor]]] = {True: [], False: []}
        for names in same.values():
            tensor = self._tensors[names[0]]
            on_gpu = tensor.device.type == "cuda" and self._gpu is not None
            if (
                tensor.is_contiguous()
                and not tensor.is_conj()
                and not tensor.is_neg()
                and (on_gpu or tensor.device.type == "cpu")
            ):
                in_place[on_gpu].append((names, _bytes_view(names[0], tensor)))
                continue
            # a copy in row-major order or on the host; one at a time
            digester = self._gpu if on_gpu and self._gpu is not None else self._cpu
            view = _bytes_view(names[0], tensor, on_cpu=not on_gpu)
            self._known.update(dict.fromkeys(names, digester.digest(view)))
        for on_gpu, rows in in_place.items():
            if rows:
                digester = self._gpu if on_gpu and self._gpu is not None else self._cpu
                found = digester.digest_arrays([view for _, view in rows])
                for (names, _), value in zip(rows, found, strict=True):
                    self._known.update(dict.fromkeys(names, value))
        return self._known


def _memory(key: str, tensor: torch.Tensor) -> Any:
    """Equal for tensors that are the same elements of the same memory; unique where that cannot be known."""
    import torch

    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.numel() == 0:
        return key
    flags = (tensor.is_conj(), tensor.is_neg())
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), flags
