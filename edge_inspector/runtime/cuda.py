"""The GPU through PyCUDA: buffers that stay, one stream, copies. Nothing of CUDA's own shows beyond this file.

A context is current only inside `with gpu:`, pushed and popped by whichever thread is there, so no thread ever ends with one on
its stack (PyCUDA aborts the process then) and an engine may be opened in one thread and used in another. It is the device's
primary context, which TensorRT uses too. Processes are started, never forked: CUDA does not survive a fork.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from edge_inspector.errors import EngineError, EngineLost


@dataclass(frozen=True)
class GpuFacts:
    """What the driver says of the GPU."""

    name: str
    compute_capability: str
    """major.minor"""
    memory_mb: int
    integrated: bool
    """Shares its memory with the CPU, as on a Jetson."""
    cuda: str
    """The newest CUDA version that the driver speaks."""
    multiprocessors: int


class Buffer:
    """An array of page-locked memory, and where the GPU finds its content: `address`.

    On an integrated GPU both are the same memory and nothing is ever copied.
    """

    def __init__(self, host: NDArray[Any], device: Any) -> None:
        self.host, self._device = host, device
        self.address = int(host.base.get_device_pointer() if device is None else device)  # type: ignore[union-attr]

    @property
    def mapped(self) -> bool:
        """Whether the GPU reads and writes `host` itself."""
        return self._device is None

    def free(self) -> None:
        """Give the memory back; nobody may look at `host` any more."""
        if self._device is not None:
            self._device.free()
        self.host.base.free()  # type: ignore[union-attr]


class Stream:
    """Copies and calls in order. Made inside `with gpu:`."""

    def __init__(self, cuda: Any) -> None:
        self._cuda, self._stream = cuda, cuda.Stream()
        self.handle = int(self._stream.handle)

    def upload(self, buffer: Buffer) -> None:
        """Queue the copy to the GPU, where one is needed."""
        if not buffer.mapped:
            self._cuda.memcpy_htod_async(buffer.address, buffer.host, self._stream)

    def download(self, buffer: Buffer) -> None:
        """Queue the copy from the GPU, where one is needed."""
        if not buffer.mapped:
            self._cuda.memcpy_dtoh_async(buffer.host, buffer.address, self._stream)

    def wait(self) -> None:
        """Until everything queued is done."""
        self._stream.synchronize()

    def mark(self) -> Any:
        """An event at this point of the stream; `later.time_since(earlier)` gives milliseconds once both have passed."""
        return self._cuda.Event().record(self._stream)


class Gpu:
    """One GPU. `with gpu:` makes its context current in this thread."""

    def __init__(self, ordinal: int = 0) -> None:
        """Raises EngineError where PyCUDA, the driver or the GPU is missing."""
        try:
            import pycuda.driver as cuda  # noqa: PLC0415 - only devices with a GPU have it
        except ImportError as error:
            raise EngineError(
                f"PyCUDA cannot be loaded: {error}",
                hint="is NVIDIA's driver there? PyCUDA is built on the device: README, On a Jetson",
            ) from error
        try:
            cuda.init()
            device = cuda.Device(ordinal)
            attribute = cuda.device_attribute
            version = cuda.get_driver_version()
            self.facts = GpuFacts(
                device.name(), ".".join(map(str, device.compute_capability())), device.total_memory() >> 20,
                bool(device.get_attribute(attribute.INTEGRATED)), f"{version // 1000}.{version % 1000 // 10}",
                device.get_attribute(attribute.MULTIPROCESSOR_COUNT),
            )  # fmt: skip
            self._context = device.retain_primary_context()
        except cuda.Error as error:
            raise EngineError(
                f"the GPU cannot be used: {error}", hint="does nvidia-smi (Jetson: tegrastats) see it?"
            ) from error
        self._cuda = cuda
        self._kept: list[object] = []
        self.lost = False
        """It has failed: only a new process may get it back."""

    def __enter__(self) -> Gpu:
        """Push the context. What CUDA raises here and inside becomes EngineError (memory) or EngineLost (all else)."""
        try:
            self._context.push()
        except self._cuda.Error as error:
            raise self._lost(error) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Pop the context."""
        try:
            self._cuda.Context.pop()
        except self._cuda.Error as popped:
            raise self._lost(popped) from error
        if isinstance(error, self._cuda.MemoryError):
            raise EngineError(f"the GPU has no memory left: {error}", hint="fewer tiles, cameras or bundles at once") from error
        if isinstance(error, self._cuda.Error):
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> EngineLost:
        self.lost = True
        return EngineLost(f"the GPU failed: {error}", hint="a new process gets it back, if anything does")

    def keep(self, thing: object) -> None:
        """Hold something until the process ends: freeing it would ask a GPU that has failed."""
        self._kept.append(thing)

    def buffer(self, shape: tuple[int, ...], dtype: DTypeLike) -> Buffer:
        """Zeroed memory for one input or output. Inside `with gpu:`."""
        cuda = self._cuda
        mapped = cuda.host_alloc_flags.DEVICEMAP if self.facts.integrated else 0
        host = cuda.pagelocked_zeros(shape, np.dtype(dtype), mem_flags=mapped)
        return Buffer(host, None if mapped else cuda.mem_alloc(host.nbytes))

    def stream(self) -> Stream:
        """A stream of one's own. Inside `with gpu:`."""
        return Stream(self._cuda)


@cache
def gpu() -> Gpu:
    """The GPU of this process, for its whole life: a context that PyCUDA releases stays on the driver's stack of that thread.

    Raises EngineError as Gpu does.
    """
    return Gpu()
