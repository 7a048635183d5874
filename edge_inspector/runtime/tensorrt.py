"""TensorRT: compile a graph, run an engine. One path for all versions from 10.3: members are probed, versions never compared.

Networks are strongly typed, so that the types in the graph are the precision; TF32, which would shorten the distances' numbers
to 10 bits, is off. Inputs and outputs are found by name and keep their addresses from the first call to the last.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edge_inspector.bundles import Bundle
from edge_inspector.errors import EngineError, EngineLost
from edge_inspector.runtime.cuda import Buffer, gpu
from edge_inspector.runtime.engine import Outputs
from edge_inspector.runtime.precision import Precision

WORKSPACE_BYTES = 256 << 20
"""Scratch memory that a layer may use; without a bound small devices are killed while they build."""
Tell = Callable[[str, int, int], None]
"""Phase, step, steps."""


def load() -> Any:
    """The module tensorrt. Raises EngineError where it is missing or cannot be loaded."""
    try:
        return import_module("tensorrt")
    except ImportError as error:
        raise EngineError(
            f"TensorRT cannot be loaded: {error}", hint="it comes with JetPack (python3-libnvinfer) or from NVIDIA's own index"
        ) from error


def log_of(trt: Any) -> Any:
    """A logger that keeps the last warnings and errors: `tail()` says them."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: deque[str] = deque(maxlen=8)

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.Severity.ERROR):
                self.lines.append(message.strip())

        def tail(self) -> str:
            return "; ".join(self.lines) or "it does not say why"

    return Log()


def _monitor_of(trt: Any, tell: Tell) -> Any:
    """Tells the phases of a build; where the version has no monitor, None."""
    if not hasattr(trt, "IProgressMonitor"):
        return None

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:  # noqa: ARG002
            self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            tell(phase_name, step + 1, self.steps.get(phase_name, 0))
            return True

        def phase_finish(self, phase_name: str) -> None:
            tell(phase_name, self.steps.get(phase_name, 0), self.steps.get(phase_name, 0))

    return Monitor()


def _flags(kind: Any, *names: str) -> int:
    """Bits of those members that this version still has: in some it is the default, in others a flag."""
    return sum(1 << int(kind.__members__[name]) for name in names if name in kind.__members__)


def compiled(trt: Any, graph: bytes, batch: int, tell: Tell, cache: bytes | None = None) -> tuple[bytes, bytes]:
    """ONNX graph -> engine for this GPU, and the timing cache (empty where none was given). Raises EngineError.

    `cache`: of an earlier build with the same version on the same GPU; b"" begins one.
    """
    log, monitor = log_of(trt), _monitor_of(trt, tell)
    builder = trt.Builder(log)
    network = builder.create_network(_flags(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", "STRONGLY_TYPED"))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(graph):
        said = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise EngineError(f"TensorRT cannot read the graph: {said}", hint="its own words; doctor tells the version")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
    if "TF32" in trt.BuilderFlag.__members__:
        config.clear_flag(trt.BuilderFlag.TF32)
    if monitor is not None:
        config.progress_monitor = monitor
    if cache is not None:
        config.set_timing_cache(config.create_timing_cache(cache) or config.create_timing_cache(b""), False)
    profile = builder.create_optimization_profile()
    for number in range(network.num_inputs):
        tensor = network.get_input(number)
        shape = (batch, *tuple(tensor.shape)[1:])
        profile.set_shape(tensor.name, shape, shape, shape)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"TensorRT built no engine: {log.tail()}", hint="its own words; is there enough free memory?")
    return bytes(plan), b"" if cache is None else bytes(config.get_timing_cache().serialize())


class TensorRtEngine:
    """Engine protocol on an NVIDIA GPU."""

    runtime = "tensorrt"
    instead = ""

    def __init__(self, bundle: Bundle, plan: Path, sha256: str, precision: Precision, *, batch: int = 1) -> None:
        """`plan` is the compiled engine, whose hash must be `sha256`. Nothing is loaded before `__enter__`."""
        self.bundle, self.plan, self.sha256, self.precision, self.batch = bundle, plan, sha256, precision, batch
        self._runtime = self._engine = self._context = self._stream = cast("Any", None)

    def __enter__(self) -> TensorRtEngine:
        """Load and warm the engine. Raises EngineError."""
        trt = load()
        self._gpu, self._log, self._buffers = gpu(), log_of(trt), dict[str, Buffer]()
        data = self._read()
        with ExitStack() as opened:
            opened.callback(self._close)
            with self._gpu:
                self._load(trt, data)
                self._bind(trt)
            self()
            opened.pop_all()
        return self

    def _load(self, trt: Any, data: bytes) -> None:
        self._runtime = trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise self._error(f"TensorRT {trt.__version__} cannot load its engine: {self._log.tail()}")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise self._error(f"no room to run it: {self._log.tail()}")
        self._stream = self._gpu.stream()

    def _read(self) -> bytes:
        try:
            data = self.plan.read_bytes()
        except OSError as error:
            raise self._error(f"its engine cannot be read: {error.strerror}") from error
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise self._error(f"its engine {self.plan} is damaged")
        return data

    def _bind(self, trt: Any) -> None:
        """Give every input and output memory that stays; shapes of inputs decide those of outputs."""
        engine, context = self._engine, self._context
        names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        for name in inputs:
            context.set_input_shape(name, (self.batch, *tuple(engine.get_tensor_shape(name))[1:]))
        for name in names:
            shape = tuple(context.get_tensor_shape(name))
            buffer = self._buffers[name] = self._gpu.buffer(shape, trt.nptype(engine.get_tensor_dtype(name)))
            context.set_tensor_address(name, buffer.address)
        held = {name: buffer.host for name, buffer in self._buffers.items()}
        self.images: NDArray[np.uint8] = held["image"]
        self.valid: NDArray[np.uint8] = held["valid"]
        self._outputs = Outputs(held["score"], held["map"], held.get("expected"))
        self._uploads = tuple(self._buffers[name] for name in inputs)
        self._downloads = tuple(self._buffers[name] for name in names if name not in inputs)

    def __call__(self) -> Outputs:
        """Judge what lies in the input buffers. Raises EngineError; EngineLost when the GPU has failed."""
        stream = self._stream
        with self._gpu:
            for buffer in self._uploads:
                stream.upload(buffer)
            queued = self._context.execute_async_v3(stream.handle)
            for buffer in self._downloads:
                stream.download(buffer)
            stream.wait()
        if not queued:
            raise self._error(f"TensorRT did not run it: {self._log.tail()}")
        return self._outputs

    def stages_ms(self) -> dict[str, float]:
        """By the GPU's own clock: copies to it, the network alone, copies back."""
        stream = self._stream
        with self._gpu:
            began = stream.mark()
            for buffer in self._uploads:
                stream.upload(buffer)
            uploaded = stream.mark()
            self._context.execute_async_v3(stream.handle)
            judged = stream.mark()
            for buffer in self._downloads:
                stream.download(buffer)
            downloaded = stream.mark()
            stream.wait()
            return {
                "upload": uploaded.time_since(began),
                "network alone": judged.time_since(uploaded),
                "download": downloaded.time_since(judged),
            }

    def _error(self, what: str) -> EngineError:
        return EngineError(f"bundle {self.bundle.manifest.name}: {what}", hint="edge-inspector build compiles it again")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Let go of the engine and its memory."""
        self._close()

    def _close(self) -> None:
        if self._gpu.lost:
            self._gpu.keep((self._context, self._engine, self._runtime, self._stream, self._buffers))
            return
        with suppress(EngineLost), self._gpu:  # it may fail just now
            self._context = self._engine = self._runtime = self._stream = None
            for buffer in self._buffers.values():
                buffer.free()
