"""A stand-in for TensorRT where there is none: its engines are the ONNX graph, run by ONNX Runtime in the buffers' memory.

With the stand-in driver, whose device memory is host memory, the whole path runs and gives true scores. It shows which calls are
made, and in which order; how NVIDIA's library behaves it cannot show. `CALLS` collects every member that was used.
STAND_IN_VERSION, STAND_IN_FAULT (crash, hang, hog, chatty, dropped, off, refuse; idle: nothing is computed) change it.
"""

from __future__ import annotations

import ctypes
import enum
import json
import os
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime

CALLS: set[str] = set()
__version__ = os.environ.get("STAND_IN_VERSION", "10.3.0")
_FAULT = os.environ.get("STAND_IN_FAULT", "")


class _Recorded:
    """Notes every member that is looked at from outside."""

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_"):
            CALLS.add(f"{type(self).__name__}.{name}")
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            CALLS.add(f"{type(self).__name__}.{name}")
        super().__setattr__(name, value)


class _Module(ModuleType):
    def __getattribute__(self, name: str) -> Any:
        if name[0].isupper() and name != "CALLS":
            CALLS.add(name)
        return super().__getattribute__(name)


sys.modules[__name__].__class__ = _Module


class NetworkDefinitionCreationFlag(enum.IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


class BuilderFlag(enum.IntEnum):
    TF32 = 7


class MemoryPoolType(enum.IntEnum):
    WORKSPACE = 0


class TensorIOMode(enum.IntEnum):
    INPUT = 1
    OUTPUT = 2


class DataType(enum.IntEnum):
    FLOAT = 0
    UINT8 = 5


def nptype(kind: DataType) -> type:
    return np.uint8 if kind is DataType.UINT8 else np.float32


class ILogger:
    class Severity(enum.IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2


class IProgressMonitor:
    pass


class _Tensor:
    def __init__(self, told: Any) -> None:
        self.name, self.shape = told.name, tuple(-1 if isinstance(n, str) else n for n in told.shape)


class INetworkDefinition(_Recorded):
    def __init__(self, flags: int) -> None:
        self._flags, self._graph = flags, b""

    @property
    def num_inputs(self) -> int:
        return len(_session(self._graph).get_inputs())

    def get_input(self, number: int) -> _Tensor:
        return _Tensor(_session(self._graph).get_inputs()[number])


def _session(graph: bytes) -> Any:
    return onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])


class ParserError(_Recorded):
    def __str__(self) -> str:
        return "this is no graph"


class OnnxParser(_Recorded):
    def __init__(self, network: INetworkDefinition, logger: Any) -> None:
        self._network = network

    def parse(self, graph: bytes) -> bool:
        self._network._graph = graph
        return graph[:1] == b"\x08"  # ir_version is an ONNX file's first field

    @property
    def num_errors(self) -> int:
        return 1

    def get_error(self, number: int) -> ParserError:
        return ParserError()


class ITimingCache(_Recorded):
    def serialize(self) -> bytes:
        return b"timings"


class IBuilderConfig(_Recorded):
    progress_monitor: Any = None

    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None:
        assert size > 0

    def clear_flag(self, flag: BuilderFlag) -> None: ...

    def create_timing_cache(self, data: bytes) -> ITimingCache:
        assert data in (b"", b"timings")
        return ITimingCache()

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> None: ...

    def get_timing_cache(self) -> ITimingCache:
        return ITimingCache()

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        assert profile._shapes
        return 0


class IOptimizationProfile(_Recorded):
    def __init__(self) -> None:
        self._shapes: dict[str, Any] = {}

    def set_shape(self, name: str, least: Any, common: Any, most: Any) -> None:
        assert least == common == most
        self._shapes[name] = common


class Builder(_Recorded):
    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def create_network(self, flags: int) -> INetworkDefinition:
        return INetworkDefinition(flags)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
        _FAULTS.get(_FAULT, lambda: None)()
        if _FAULT == "refuse":
            self._logger.log(ILogger.Severity.ERROR, "Could not find any implementation for node /backbone/stem")
            return None
        monitor = config.progress_monitor
        if monitor is not None:
            CALLS.update({"IProgressMonitor.phase_start", "IProgressMonitor.step_complete", "IProgressMonitor.phase_finish"})
            monitor.phase_start("Building Engine", None, 2)
            assert monitor.step_complete("Building Engine", 0)
            monitor.phase_finish("Building Engine")
        return json.dumps({"version": __version__}).encode() + b"\n" + network._graph


def _hog() -> None:
    _FAULTS["kept"] = bytearray(b"x") * (600 << 20)  # type: ignore[assignment]
    time.sleep(60)


_FAULTS: dict[str, Callable[[], Any]] = {
    "chatty": lambda: os.write(1, b"a word from a library\n"),
    "crash": os.abort,
    "hang": lambda: time.sleep(60),
    "hog": _hog,
}


class IExecutionContext(_Recorded):
    def __init__(self, session: Any) -> None:
        self._session, self._shapes, self._addresses = session, dict[str, Any](), dict[str, int]()

    def set_input_shape(self, name: str, shape: Any) -> bool:
        self._shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> Any:
        if name in self._shapes:
            return self._shapes[name]
        zeros = {told.name: np.zeros(self._shapes[told.name], np.uint8) for told in self._session.get_inputs()}
        names = [told.name for told in self._session.get_outputs()]
        self._shapes |= dict(zip(names, (value.shape for value in self._session.run(names, zeros)), strict=True))
        return self._shapes[name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def _array(self, told: Any) -> Any:
        kind: np.dtype[Any] = np.dtype(np.uint8 if "uint8" in told.type else np.float32)
        shape = self._shapes[told.name]
        size = int(np.prod(shape)) * kind.itemsize
        memory: Any = (ctypes.c_uint8 * size).from_address(self._addresses[told.name])
        return np.frombuffer(memory, kind).reshape(shape)

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle
        if _FAULT in ("idle", "dropped"):
            return _FAULT == "idle"
        given = {told.name: self._array(told) for told in self._session.get_inputs()}
        outputs = self._session.get_outputs()
        for told, value in zip(outputs, self._session.run([told.name for told in outputs], given), strict=True):
            self._array(told)[...] = value * 1.1 if _FAULT == "off" and told.name == "score" else value
        return True


class ICudaEngine(_Recorded):
    def __init__(self, graph: bytes) -> None:
        self._session = _session(graph)
        self._told = [*self._session.get_inputs(), *self._session.get_outputs()]

    @property
    def num_io_tensors(self) -> int:
        return len(self._told)

    def get_tensor_name(self, number: int) -> str:
        return str(self._told[number].name)

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        inputs = [told.name for told in self._session.get_inputs()]
        return TensorIOMode.INPUT if name in inputs else TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> Any:
        return next(_Tensor(told).shape for told in self._told if told.name == name)

    def get_tensor_dtype(self, name: str) -> DataType:
        return next(DataType.UINT8 if "uint8" in told.type else DataType.FLOAT for told in self._told if told.name == name)

    def create_execution_context(self) -> IExecutionContext:
        return IExecutionContext(self._session)


class Runtime(_Recorded):
    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> ICudaEngine | None:
        told, graph = plan.split(b"\n", 1)
        if json.loads(told)["version"] != __version__:
            self._logger.log(
                ILogger.Severity.ERROR, "stdVersionRead == serializationVersion failed.Version tag does not match."
            )
            return None
        return ICudaEngine(graph)
