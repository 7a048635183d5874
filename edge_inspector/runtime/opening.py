"""Which engine a bundle gets, as device.yaml says."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from edge_inspector.bundles import Bundle
from edge_inspector.config import EngineConfig
from edge_inspector.errors import EngineError, EngineLost
from edge_inspector.runtime.build import Workshop, untold
from edge_inspector.runtime.engine import Engine
from edge_inspector.runtime.onnx import OnnxEngine
from edge_inspector.runtime.tensorrt import Tell

log = logging.getLogger(__name__)


@contextmanager
def opened(
    bundle: Bundle, config: EngineConfig, workshop: Workshop, batch_for: Callable[[str], int], tell: Tell = untold
) -> Iterator[Engine]:
    """An engine, open and warm; with TensorRT it is built first where none fits, which takes minutes.

    `batch_for`: runtime -> tiles judged together. Raises EngineError; EngineLost, which nothing stands in for, when the GPU
    has failed for this process. ONNX Runtime stands in for TensorRT only where the configuration says so.
    """
    with ExitStack() as stack:
        engine: Engine
        if config.runtime == "onnxruntime":
            engine = stack.enter_context(OnnxEngine(bundle, batch=batch_for("onnxruntime"), threads=config.threads))
        else:
            try:
                engine = stack.enter_context(workshop.engine(bundle, config.precision, batch_for("tensorrt"), tell)[0])
            except EngineError as error:
                if isinstance(error, EngineLost) or not config.fallback:
                    raise
                log.warning("bundle %s runs on the CPU: %s", bundle.manifest.name, error)
                engine = stack.enter_context(
                    OnnxEngine(bundle, batch=batch_for("onnxruntime"), threads=config.threads, instead=error.message)
                )
        yield engine
