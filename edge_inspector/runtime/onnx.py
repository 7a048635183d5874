"""ONNX Runtime on the CPU: buffers bound once, nothing allocated per frame."""

from __future__ import annotations

from types import TracebackType

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from edge_inspector.bundles import NETWORK, Bundle
from edge_inspector.errors import EngineError
from edge_inspector.runtime.engine import Outputs
from edge_inspector.runtime.precision import Precision, precision_of

# What onnxruntime raises for a bad model or a failed run; it has no public base class.
_FAULTS: tuple[type[Exception], ...] = (RuntimeError, ValueError, *(
    kind for kind in vars(onnxruntime.capi.onnxruntime_pybind11_state).values()
    if isinstance(kind, type) and issubclass(kind, Exception)
))  # fmt: skip


class OnnxEngine:
    """Engine protocol on ONNX Runtime's CPU provider."""

    runtime = "onnxruntime"

    def __init__(
        self, bundle: Bundle, *, batch: int = 1, threads: int = 2, graph: bytes | None = None, instead: str = ""
    ) -> None:
        """Nothing is loaded before `__enter__`. `threads` bounds the cores of one call; `graph`: run this, not the bundle's."""
        self.bundle, self.batch, self.threads, self._graph = bundle, batch, threads, graph
        self.precision: Precision = "fp32"
        self.instead = instead
        spec = bundle.manifest.input
        self.images: NDArray[np.uint8] = np.zeros((batch, spec.height, spec.width, spec.channels), np.uint8)
        self.valid: NDArray[np.uint8] = np.zeros((batch, spec.height, spec.width), np.uint8)

    def __enter__(self) -> OnnxEngine:
        """Load and warm the network. Raises EngineError."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # cores idle between two parts
        try:
            graph = self._graph or self.bundle.read(NETWORK)
            self.precision = precision_of(graph)
            self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
            self._bind()
            self()
        except _FAULTS as error:
            raise EngineError(
                f"bundle {self.bundle.manifest.name}: ONNX Runtime cannot run it: {str(error).splitlines()[0]}",
                hint="edge-inspector doctor tells the version of ONNX Runtime; was the bundle made for a newer one?",
            ) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Let go of the network and its memory."""
        del self._binding, self._session

    def _bind(self) -> None:
        self._binding = self._session.io_binding()
        self._binding.bind_cpu_input("image", self.images)
        self._binding.bind_cpu_input("valid", self.valid)
        warm = self._session.run(None, {"image": self.images, "valid": self.valid})
        names = [output.name for output in self._session.get_outputs()]
        held = {}
        for name, value in zip(names, warm, strict=True):
            array = np.zeros(value.shape, value.dtype)
            self._binding.bind_output(name, "cpu", 0, value.dtype.type, value.shape, array.ctypes.data)
            held[name] = array
        self._outputs = Outputs(held["score"], held["map"], held.get("expected"))

    def __call__(self) -> Outputs:
        """Judge what lies in the input buffers. Raises EngineError."""
        try:
            self._session.run_with_iobinding(self._binding)
        except _FAULTS as error:
            raise EngineError(f"bundle {self.bundle.manifest.name}: {str(error).splitlines()[0]}") from error
        return self._outputs

    def stages_ms(self) -> dict[str, float]:
        """None: nothing is copied."""
        return {}
