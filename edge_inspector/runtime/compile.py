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

from edge_inspector.bundles import open_bundle
from edge_inspector.errors import BundleDamaged, EngineRefused, InspectorError
from edge_inspector.frames import utc_now
from edge_inspector.runtime import parity, precision, tensorrt
from edge_inspector.runtime.build import Order
from edge_inspector.runtime.engine import TOLERANCE
from edge_inspector.runtime.onnx import OnnxEngine
from edge_inspector.schema import read_json, validate


def main() -> None:
    """Do what stdin says."""
    order = validate(Order, read_json(sys.stdin.buffer.readline(), "order"), "order")
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    os.nice(10)  # parts are judged meanwhile
    Path("/proc/self/oom_score_adj").write_text("1000")  # where memory runs out this process goes first
    try:
        _make(order)
    except InspectorError as error:
        _say(error=error.message, hint=error.hint)
        sys.exit(1)


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):  # past Python's buffer, whose lock would outlive this process's end
        pass
    os._exit(3)


def _say(**what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def _tell(phase: str, step: int, steps: int) -> None:
    _say(phase=phase, step=step, steps=steps)


def _make(order: Order) -> None:
    record, bundle = order.record, open_bundle(Path(order.bundle), Path(order.trust))
    place = Path(order.place)
    graph = bundle.network.read_bytes()
    if hashlib.sha256(graph).hexdigest() != record.network_sha256:
        raise BundleDamaged(f"{bundle.network}: changed while it was about to be compiled")
    began = time.monotonic()
    cache = Path(order.timing_cache)
    plan, kept = tensorrt.compiled(
        tensorrt.load(), precision.converted(graph, record.precision), record.batch, _tell,
        cache.read_bytes() if cache.exists() else b"",
    )  # fmt: skip
    _write(cache, kept)
    _write(place.with_suffix(".engine"), plan)
    record = record.model_copy(
        update={
            "build_s": round(time.monotonic() - began, 1),
            "built_at": utc_now(),
            "engine_sha256": hashlib.sha256(plan).hexdigest(),
        }
    )
    tolerance = TOLERANCE[record.precision]
    with OnnxEngine(bundle, threads=order.threads) as reference:
        near = parity.near_threshold(
            reference, tolerance, step=lambda done: _tell("frames near the threshold", done, parity.FRAMES)
        )
    try:
        with tensorrt.TensorRtEngine(
            bundle, place.with_suffix(".engine"), record.engine_sha256, record.precision, batch=record.batch
        ) as engine:
            record = record.model_copy(update={"parity": asdict(parity.refuse_unlike(engine, near))})
    except EngineRefused as refused:
        record = record.model_copy(update={"refused": refused.message})
        place.with_suffix(".engine").unlink()
    _write(place.with_suffix(".json"), record.model_dump_json(by_alias=True, indent=1).encode())


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all, also where the power fails."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


if __name__ == "__main__":
    main()
