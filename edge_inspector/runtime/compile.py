"""The child process that compiles: python -m edge_inspector.runtime.compile, an order as one line of JSON on stdin.

It writes the engine and its record, and says on stdout, one JSON a line, how far it is and at last what went wrong. What goes
wrong here (no memory, a crash in the compiler, a GPU that fails) ends this process, never the daemon. It ends with its parent:
stdin closes then.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edge_inspector import durable
from edge_inspector.bundles import NETWORK, Bundle, open_bundle
from edge_inspector.errors import BundleDamaged, EngineRefused, InspectorError
from edge_inspector.frames import utc_now
from edge_inspector.runtime import parity, precision, tensorrt
from edge_inspector.runtime.build import EngineRecord, Order
from edge_inspector.runtime.onnx import OnnxEngine
from edge_inspector.runtime.tensorrt import Tell
from edge_inspector.schema import read_json, validate

_CACHE_BYTES = 64 << 20
"""A timing cache that has grown beyond is begun anew."""


def main() -> None:
    """Do what stdin says."""
    order = validate(Order, read_json(sys.stdin.buffer.readline(), "order"), "order")
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    os.nice(10)  # parts are judged meanwhile
    Path("/proc/self/oom_score_adj").write_text("1000")  # where memory runs out this process goes first
    voice = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print is no message of ours

    def say(**what: Any) -> None:
        voice.write(json.dumps(what) + "\n")

    try:
        _make(order, lambda phase, step, steps: say(phase=phase, step=step, steps=steps))
    except InspectorError as error:
        say(error=error.message, hint=error.hint)
        sys.exit(1)


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):  # past Python's buffer, whose lock would outlive this process's end
        pass
    os._exit(3)


def _make(order: Order, tell: Tell) -> None:
    """Compile, compare, record. A refusal is recorded, so that it is not tried again for nothing; a fault on the way is not."""
    record = order.record
    bundle = open_bundle(Path(order.bundle), Path(order.trust), clock_ok=order.clock_ok)
    if bundle.sha256 != record.bundle_sha256:
        raise BundleDamaged(f"{bundle.folder}: changed while it was about to be compiled")
    place = Path(order.place)
    engine, told = place.with_suffix(".engine"), place.with_suffix(".json")
    try:
        with OnnxEngine(bundle, threads=order.threads) as reference:
            near = parity.near_threshold(
                reference, parity.MARGIN[record.precision], lambda done: tell("frames near the threshold", done, parity.FRAMES)
            )
        record = _compiled(bundle, record, engine, Path(order.timing_cache), tell)
        with tensorrt.TensorRtEngine(bundle, engine, record.engine_sha256, record.precision, batch=record.batch) as candidate:
            record = record.model_copy(update={"parity": asdict(parity.refuse_unlike(candidate, near))})
    except EngineRefused as refused:
        record = record.model_copy(update={"refused": refused.message, "built_at": utc_now()})
        engine.unlink(missing_ok=True)
    durable.write(told, record.model_dump_json(by_alias=True, indent=1).encode())


def _compiled(bundle: Bundle, record: EngineRecord, engine: Path, cache: Path, tell: Tell) -> EngineRecord:
    began = time.monotonic()
    timings = cache.read_bytes() if cache.exists() and cache.stat().st_size < _CACHE_BYTES else b""
    graph = precision.converted(bundle.read(NETWORK), record.precision)
    plan, timings = tensorrt.compiled(tensorrt.load(), graph, record.batch, tell, timings)
    durable.write(cache, timings)
    durable.write(engine, plan)
    return record.model_copy(
        update={
            "build_s": round(time.monotonic() - began, 1),
            "built_at": utc_now(),
            "engine_sha256": hashlib.sha256(plan).hexdigest(),
        }
    )


if __name__ == "__main__":
    main()
