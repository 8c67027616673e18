"""Output tensors as torch tensors, one shard after the other: mapped where they are copies, else read or made."""

from __future__ import annotations

import itertools
import mmap
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from tierewrite.output.result import BUFFER_BYTES
from tierewrite.output.unwritten import UnwrittenOutput
from tierewrite.planning.plan import OutShard, OutTensor
from tierewrite.source.dtypes import PAIRS, TORCH_OF_SAFETENSORS
from tierewrite.source.table import Kind
from tierewrite.stores.local import LocalFile
from tierewrite.values.content import COPY

if TYPE_CHECKING:
    import torch

Named = tuple[str, "torch.Tensor"]

_AHEAD = 3  # loads: one that is used, the others being read
_TENSORS = 4096  # in a load, at most


def tensors_of(
    output: UnwrittenOutput, by_name: bool = False, wanted: Callable[[str], bool] | None = None
) -> Iterator[Named]:
    """The tensors of all shards of an output: (key in the output, tensor on the CPU), shard by shard.

    Memory is bounded: a survivor in a folder of this machine is a view of its mapped file; of all else at most three
    loads of 8 MiB are held, or of one tensor where that is larger.

    Args:
        by_name: within a shard by name, as `safetensors.safe_open(...).keys()` gives them; else as they lie in the
            file.
        wanted: whether a key is wanted; what is not is not read.

    Raises:
        SourceChanged: a source file is not, or at the end no longer, what it was when its header was read.
        SystemFailure: reading failed.
    """
    with output, ThreadPoolExecutor(_AHEAD - 1, thread_name_prefix="tierewrite-read") as pool:
        for shard in output.plan.shards:
            tensors: Iterable[OutTensor] = shard.tensors
            if by_name:
                tensors = sorted(tensors, key=lambda tensor: tensor.name)
            if wanted is not None:
                tensors = [tensor for tensor in tensors if wanted(tensor.name)]
            yield from _read_ahead(_ShardReader(output, shard), tensors, pool)
        output.finish()


def _read_ahead(reader: _ShardReader, tensors: Iterable[OutTensor], pool: ThreadPoolExecutor) -> Iterator[Named]:
    waiting: deque[Future[list[Named]]] = deque()
    try:
        for load in reader.loads(tensors):
            waiting.append(pool.submit(reader.read, load))
            if len(waiting) == _AHEAD:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


class _ShardReader:
    """Reads the tensors of one output shard; files are mapped for as long as it or one of their tensors is used."""

    def __init__(self, output: UnwrittenOutput, shard: OutShard) -> None:
        self._output = output
        self._shard = shard
        self._table = output.checkpoint.tensors
        self._maps: dict[int, mmap.mmap] = {}

    def loads(self, tensors: Iterable[OutTensor]) -> Iterator[list[OutTensor]]:
        """Tensors that are read together: what has to be read of them fits into a buffer, or is one tensor."""
        load: list[OutTensor] = []
        size = 0
        for tensor in tensors:
            nbytes = 0 if self._is_mapped(tensor) else tensor.end - tensor.start
            if load and (size + nbytes > BUFFER_BYTES or len(load) == _TENSORS):
                yield load
                load, size = [], 0
            load.append(tensor)
            size += nbytes
        if load:
            yield load

    def read(self, load: list[OutTensor]) -> list[Named]:
        """The tensors of a load, in its order."""
        found: list[Named] = []
        for mapped, group in itertools.groupby(load, key=self._is_mapped):
            for run in [[tensor] for tensor in group] if mapped else _runs(group):
                start, end = run[0].start, run[-1].end
                if mapped:
                    data: Any = self._map(run[0])
                    start -= int(self._table.start[self._table.row[run[0].source]])
                else:
                    data = bytearray(end - start)
                    self._output.read(self._shard, start, end, memoryview(data))
                found += [(one.name, as_tensor(data, one.start - start, self._kind(one))) for one in run]
        return found

    def _is_mapped(self, tensor: OutTensor) -> bool:
        """Whether it is a survivor in a file of this machine's."""
        if tensor.added or self._output.contents.get(tensor.name, COPY) is not COPY:
            return False
        return isinstance(self._output.source(self._number(tensor)), LocalFile)

    def _number(self, tensor: OutTensor) -> int:
        return int(self._table.shard[self._table.row[tensor.source]])

    def _kind(self, tensor: OutTensor) -> Kind:
        return self._table.kinds[self._table.kind[self._table.row[tensor.source]]]

    def _map(self, tensor: OutTensor) -> mmap.mmap:
        number = self._number(tensor)
        if number not in self._maps:
            source = self._output.source(number)
            assert isinstance(source, LocalFile)
            self._maps[number] = source.mapped()
        return self._maps[number]


def _runs(tensors: Iterable[OutTensor]) -> Iterator[list[OutTensor]]:
    """Neighbours in the output."""
    run: list[OutTensor] = []
    for tensor in tensors:
        if run and run[-1].end != tensor.start:
            yield run
            run = []
        run.append(tensor)
    if run:
        yield run


def as_tensor(data: Any, offset: int, kind: Kind) -> torch.Tensor:
    """A torch tensor of the bytes of `data` from `offset` on, without a copy where they are aligned for its dtype.

    Args:
        data: what torch may write to; it stays alive as long as the tensor does.
        kind: dtype and shape, as a header has them.
    """
    import torch

    name, shape = kind
    dtype = getattr(torch, TORCH_OF_SAFETENSORS[name])
    if name == PAIRS and shape:
        shape = (*shape[:-1], shape[-1] // 2)
    count = dtype.itemsize
    for size in shape:
        count *= size
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(data, dtype=torch.uint8, count=count, offset=offset)
    if flat.data_ptr() % dtype.itemsize:
        flat = flat.clone()
    return flat.view(dtype).reshape(shape)


def unknown_to_torch(kinds: Iterable[Kind]) -> list[str]:
    """The dtypes that the installed torch does not have, sorted."""
    import torch

    names = {name for name, _ in kinds}
    return sorted(name for name in names if not hasattr(torch, TORCH_OF_SAFETENSORS.get(name, "")))
