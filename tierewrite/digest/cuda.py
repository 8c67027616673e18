"""BLAKE3 on CUDA GPUs, by CuPy: the same digests as `cpu`, for any length and any alignment.

Refuses: devices that fail a self-test, and non-contiguous device arrays (ValueError; a copy would not be ours to
make). Every failure of CuPy, driver or device becomes DeviceFailed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tierewrite.digest import DeviceFailed
from tierewrite.digest.cuda_device import Gpu, device_work, pinned, split
from tierewrite.digest.cuda_stream import Copied, CudaStream
from tierewrite.digest.spans import Bytes, host_bytes, layout

_STAGE = 16 << 20
"""Bytes of each buffer through which host data go that were not handed over in a stream."""


class CudaDigester:
    """BLAKE3 on all CUDA GPUs that work; see `tierewrite.digest.Digester`.

    Args:
        devices: CUDA device numbers to use; None takes all that pass a self-test.

    Raises:
        DeviceFailed: CuPy is missing, there is no device, or none passes.
    """

    device = "cuda"

    def __init__(self, devices: Sequence[int] | None = None) -> None:
        try:
            import cupy
        except ModuleNotFoundError as error:
            raise DeviceFailed(f"no {error.name} is installed; pip install 'tierewrite[cuda13]' brings CuPy") from error
        except Exception as error:  # a CuPy without its CUDA libraries raises much else than ImportError
            raise DeviceFailed(f"CuPy does not import: {error}") from error
        self._cupy = cupy
        with device_work("counting devices"):
            numbers = range(cupy.cuda.runtime.getDeviceCount()) if devices is None else devices
        if not numbers:
            raise DeviceFailed("there is no CUDA device")
        self.gpus: list[Gpu] = []
        failed: DeviceFailed | None = None
        for number in numbers:
            try:
                with device_work(f"preparing device {number}"):
                    self.gpus.append(Gpu(cupy, number))
            except DeviceFailed as error:
                failed = error
        if not self.gpus:
            assert failed is not None
            raise failed
        names = [gpu.name for gpu in self.gpus]
        counted = [f"{names.count(name)} x {name}" if names.count(name) > 1 else name for name in dict.fromkeys(names)]
        self.description = f"{', '.join(counted)} (CuPy {cupy.__version__})"

    def digest(self, data: object) -> bytes:
        """See `Digester`."""
        return self.digest_arrays([data])[0]

    def digest_many(self, data: object, spans: Iterable[tuple[int, int]]) -> list[bytes]:
        """See `Digester`."""
        ranges = np.array(spans if isinstance(spans, np.ndarray) else list(spans), dtype=np.int64).reshape(-1, 2)
        there = self._on_device(data)
        flat = host_bytes(data) if there is None else there
        size = flat.nbytes
        wrong = (ranges < 0).any(axis=1) | (ranges.sum(axis=1) > size)
        if wrong.any():
            start, length = ranges[wrong.argmax()].tolist()
            raise ValueError(f"bytes {start} to {start + length} leave a buffer of {size} bytes")
        if there is None:
            return self._through_host([flat[start : start + length] for start, length in ranges.tolist()])
        with device_work("hashing"), self._cupy.cuda.Device(there.device.id):
            unsigned = ranges.astype(np.uint64)
            address = unsigned[:, 0] + np.uint64(there.data.ptr)
            return split(self._gpu(there.device.id).digests(address, np.ascontiguousarray(unsigned[:, 1])))

    def digest_arrays(self, arrays: Iterable[object]) -> list[bytes]:
        """See `Digester`."""
        items = list(arrays)
        digests: list[bytes] = [b""] * len(items)
        arrays_there = [self._on_device(item) for item in items]
        there = {i: array for i, array in enumerate(arrays_there) if array is not None}
        here = [i for i, array in enumerate(arrays_there) if array is None]
        for i, digest in zip(here, self._through_host([host_bytes(items[i]) for i in here]), strict=True):
            digests[i] = digest
        for number in {array.device.id for array in there.values()}:
            mine = [i for i, array in there.items() if array.device.id == number]
            with device_work("hashing"), self._cupy.cuda.Device(number):
                address = np.array([there[i].data.ptr if there[i].nbytes else 0 for i in mine], np.uint64)
                length = np.array([there[i].nbytes for i in mine], np.uint64)
                for i, digest in zip(mine, split(self._gpu(number).digests(address, length)), strict=True):
                    digests[i] = digest
        return digests

    def host_buffer(self, nbytes: int) -> Bytes:
        """See `Digester`."""
        return pinned(self._cupy, nbytes)

    def stream(self, buffer_size: int) -> CudaStream:
        """See `Digester`."""
        return CudaStream(self.gpus, buffer_size)

    def _gpu(self, number: int) -> Gpu:
        for gpu in self.gpus:
            if gpu.number == number:
                return gpu
        raise ValueError(f"the array lives on device {number}, which this digester does not use")

    def _on_device(self, data: object) -> Any | None:
        """A flat uint8 CuPy view of data on a GPU, ordered after the work that makes them; None for host data."""
        cupy = self._cupy
        if type(data).__module__.partition(".")[0] == "torch":
            import torch

            assert isinstance(data, torch.Tensor)
            if data.device.type != "cuda":
                return None
            if not data.is_contiguous():
                raise ValueError("the tensor on the GPU is not contiguous: call .contiguous() on it")
            # through uint8, for which every dtype has a view; DLPack makes our stream wait for torch's
            with cupy.cuda.Device(data.device.index):
                return cupy.from_dlpack(data.detach().reshape(-1).view(torch.uint8))
        if isinstance(data, cupy.ndarray) or hasattr(data, "__cuda_array_interface__"):
            array = cupy.asarray(data)
        elif not isinstance(data, np.ndarray) and hasattr(data, "__dlpack_device__"):
            if data.__dlpack_device__()[0] != 2:  # kDLCUDA of dlpack.h
                return None
            array = cupy.from_dlpack(data)
        else:
            return None
        if not array.flags.c_contiguous:
            raise ValueError("the array on the GPU is not contiguous in row-major order: copy it first")
        return array.reshape(-1).view(np.uint8)

    def _through_host(self, views: Sequence[Bytes]) -> list[bytes]:
        if not views:
            return []
        with self.stream(_STAGE) as stream:
            stages = [self.host_buffer(_STAGE) for _ in range(2)]
            tickets: list[Copied | None] = [None, None]
            for turn, spans in enumerate(layout([len(view) for view in views], _STAGE)):
                stage, ticket = stages[turn % 2], tickets[turn % 2]
                if ticket is not None:
                    ticket.wait()
                for span in spans:
                    part = views[span.tensor][span.position : span.position + span.length]
                    stage[span.start : span.start + span.length] = part
                filled = spans[-1].start + spans[-1].length
                tickets[turn % 2] = stream.update(stage[:filled], spans)
            digests = stream.finish()
        return [digests[i] for i in range(len(views))]
