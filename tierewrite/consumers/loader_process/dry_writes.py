"""Records, while a consumer loads a model on the meta device, which key writes which elements of which parameter.

Everything that PyTorch does passes through a dispatch mode: an operator that writes into the memory of a parameter is
recorded with the region that it writes, and values are followed from the checkpoint's tensors through whatever is made
of them (slices, casts, concatenations). No weight is read: tensors of more than `SMALL` elements have no bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from dry_coverage import Coverage, Write, coverage
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode

SMALL = 64
"""Elements of a tensor whose bytes are read: loaders look at scales."""
LARGEST_REAL = 1 << 28  # bytes of a tensor that is read after all, where the loader asks for its values
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip
for _name, _attribute in (("F8_E8M0", "float8_e8m0fnu"), ("F4", "float4_e2m1fn_x2")):
    if hasattr(torch, _attribute):
        DTYPES[_name] = getattr(torch, _attribute)
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANDOM = ("uniform_", "normal_", "random_", "trunc_normal_", "kaiming_uniform_")


class Feed:
    """The checkpoint's tensors as a loader gets them, and the one that it is at.

    Attributes:
        key: the tensor that was handed out last; None before the first and after the last.
        last: the same, but not forgotten after the last.
        seen: all that were handed out.
        dropped: keys that are left out.
        real: keys whose bytes are read however large they are.
    """

    def __init__(self) -> None:
        self.key: str | None = None
        self.last: str | None = None
        self.seen: list[str] = []
        self.dropped: set[str] = set()
        self.real: set[str] = set()
        self.origins: dict[int, tuple[str, ...]] = {}
        self.alive: list[Any] = []

    def start(self) -> None:
        """Before a load."""
        self.key = self.last = None
        self.seen.clear()
        self.origins.clear()
        self.alive.clear()

    def open(self, path: str, framework: str = "pt", device: str = "cpu") -> _File:
        """In the place of `safetensors.safe_open`."""
        return _File(self, safe_open(path, framework="pt"))

    def watched(self, items: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The consumer's own iterator over the checkpoint; knows from here on which tensor is which."""
        for key, tensor in items:
            if key in self.dropped:
                continue
            self.key = self.last = key
            self.seen.append(key)
            storage = tensor.untyped_storage()
            self.origins[storage._cdata] = (key,)
            self.alive.append(storage)
            yield key, tensor
        self.key = None


class _File:
    """An open safetensors file whose large tensors have no bytes."""

    def __init__(self, feed: Feed, file: Any) -> None:
        self._feed, self._file = feed, file

    def __enter__(self) -> _File:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def get_tensor(self, key: str) -> torch.Tensor:
        """Its bytes where it is small; else a tensor on the meta device."""
        found = self._file.get_slice(key)
        shape, dtype = found.get_shape(), DTYPES.get(found.get_dtype())
        elements = 1
        for size in shape:
            elements *= size
        if dtype is None or elements <= SMALL:
            return self._file.get_tensor(key)
        if key in self._feed.real and elements * dtype.itemsize <= LARGEST_REAL:
            return self._file.get_tensor(key)
        return torch.empty(shape, dtype=dtype, device="meta")


class Building(TorchDispatchMode):
    """While a model is built: which memory nobody has set.

    Attributes:
        unset: its addresses, each with the memory: that of a tensor that is gone would be the next one's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unset: dict[int, Any] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        name = operator._schema.name
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            if "empty" in name:
                self.unset[storage._cdata] = storage
            elif not name.endswith(_RANDOM) and (name.endswith("_") or not _is_view(operator)):
                self.unset.pop(storage._cdata, None)
        return result


def _is_view(operator: Any) -> bool:
    return any(a.alias_info is not None for a in operator._schema.arguments)


class Recorder(TorchDispatchMode):
    """While a model is loaded: every write into `targets`, by name.

    Attributes:
        writes: parameter -> its writes, in their order.
        casts: (key, parameter) -> (dtype found, dtype wanted).
    """

    def __init__(self, feed: Feed, targets: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.feed, self.targets = feed, targets
        self.writes: dict[str, list[Write]] = {name: [] for name in targets}
        self.casts: dict[tuple[str, str], tuple[str, str]] = {}
        self._names: dict[int, list[str]] = {}
        for name, tensor in targets.items():
            self._names.setdefault(tensor.untyped_storage()._cdata, []).append(name)
        self._memory = {name: tensor.untyped_storage() for name, tensor in targets.items()}
        self._written: dict[Any, tuple[int, ...]] = {}
        self._converted: dict[str, str] = {}  # key -> dtype before a conversion on its way
        self._scalar: tuple[str | None, tuple[str, ...]] = (None, ())  # whose value was last taken as a number

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        positions = self._written.get(operator)
        if positions is None:
            arguments = operator._schema.arguments
            positions = tuple(i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)
            self._written[operator] = positions
        if positions:
            for i in positions:
                if i < len(args):
                    for target in args[i] if isinstance(args[i], (list, tuple)) else (args[i],):
                        self._wrote(operator, target, args)
        else:
            self._follow(operator, result, args)
        return result

    def _follow(self, operator: Any, result: Any, args: Any) -> None:
        """What is made of a checkpoint's tensor is the checkpoint's, too."""
        origins = self.feed.origins
        if operator is torch.ops.aten._local_scalar_dense.default:
            self._scalar = self.feed.key, origins.get(args[0].untyped_storage()._cdata, ())
            return
        if operator is torch.ops.aten._to_copy.default and result.dtype != args[0].dtype:
            for key in origins.get(args[0].untyped_storage()._cdata, ()):
                self._converted.setdefault(key, NAMES.get(args[0].dtype, str(args[0].dtype)))
        for made in result if isinstance(result, (list, tuple)) else (result,):
            if not isinstance(made, torch.Tensor):
                continue
            storage = made.untyped_storage()
            memory = storage._cdata
            if memory in origins and any(t.untyped_storage()._cdata == memory for t in _tensors(args)):
                continue  # a view
            keys = tuple(dict.fromkeys(k for t in _tensors(args) for k in origins.get(t.untyped_storage()._cdata, ())))
            if keys:
                origins[memory] = keys
                self.feed.alive.append(storage)

    def _wrote(self, operator: Any, target: Any, args: Any) -> None:
        if not isinstance(target, torch.Tensor):
            return
        origins = self.feed.origins
        sources = [t for t in _tensors(args[1:]) if t is not target]
        keys = tuple(dict.fromkeys(k for t in sources for k in origins.get(t.untyped_storage()._cdata, ())))
        memory = target.untyped_storage()._cdata
        names = self._names.get(memory)
        if names is None:
            if keys:  # an intermediate buffer
                origins[memory] = tuple(dict.fromkeys((*origins.get(memory, ()), *keys)))
                self.feed.alive.append(target.untyped_storage())
            return
        if not keys and self.feed.key is not None:
            if sources:
                keys = (self.feed.key,)  # values whose way could not be followed
            elif self._scalar[0] == self.feed.key:
                keys = self._scalar[1]
        start = target.storage_offset()
        for name in names:
            owner = self.targets[name]
            if len(names) > 1 and not 0 <= start - owner.storage_offset() < max(owner.numel(), 1):
                continue  # another parameter in the same memory
            self.writes[name].append(Write(keys, start, tuple(target.shape), tuple(target.stride())))
            self._note_cast(name, target.dtype, sources)

    def _note_cast(self, name: str, wanted: torch.dtype, sources: list[torch.Tensor]) -> None:
        to = NAMES.get(wanted, str(wanted))
        for source in sources:
            found = NAMES.get(source.dtype, str(source.dtype))
            for key in self.feed.origins.get(source.untyped_storage()._cdata, ()):
                before = self._converted.get(key, found)
                if before != to:
                    self.casts.setdefault((key, name), (before, to))

    def replaced(self, name: str, now: torch.Tensor) -> bool:
        """The parameter has other memory than before the load: its writes were not all seen."""
        return now.untyped_storage()._cdata != self._memory[name]._cdata

    def coverage(self, name: str) -> Coverage:
        """What the writes into one parameter come to."""
        target = self.targets[name]
        return coverage(tuple(target.shape), tuple(target.stride()), target.storage_offset(), self.writes[name])


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
