"""Which engine a bundle gets, as device.yaml says."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from edge_inspector.bundles import Bundle
from edge_inspector.config import EngineConfig
from edge_inspector.errors import EngineError
from edge_inspector.runtime.build import Tell, Workshop, untold
from edge_inspector.runtime.engine import Engine
from edge_inspector.runtime.onnx import OnnxEngine

log = logging.getLogger(__name__)


@contextmanager
def opened(bundle: Bundle, config: EngineConfig, workshop: Workshop, batch: int, tell: Tell = untold) -> Iterator[Engine]:
    """An engine, open and warm; with TensorRT it is built first where none fits, which takes minutes.

    Raises EngineError. ONNX Runtime stands in for TensorRT only where the configuration says so.
    """
    with ExitStack() as stack:
        engine: Engine
        if config.runtime == "onnxruntime":
            engine = stack.enter_context(OnnxEngine(bundle, batch=batch, threads=config.threads))
        else:
            try:
                engine = stack.enter_context(workshop.engine(bundle, config.precision, batch, tell)[0])
            except EngineError as error:
                if not config.fallback:
                    raise
                log.warning("bundle %s runs on the CPU: %s", bundle.manifest.name, error)
                engine = stack.enter_context(OnnxEngine(bundle, batch=batch, threads=config.threads, instead=error.message))
        yield engine
