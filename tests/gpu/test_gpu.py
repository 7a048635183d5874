"""On a machine with an NVIDIA GPU: `pytest tests/gpu -s`. PyCUDA for real: copies, streams, threads; prints what it measured.

What needs TensorRT skips by name where it is missing; nothing here is timed against a limit.
"""

from __future__ import annotations

import threading
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from edge_inspector.bundles import open_bundle
from edge_inspector.errors import EngineError
from edge_inspector.runtime import Workshop, judge_samples
from edge_inspector.runtime.cuda import Gpu, Stream, gpu
from tests.line import ENGINES

FRAME = (1, 384, 384, 3)
LARGE = (64 << 20,)


@pytest.fixture(scope="module")
def device() -> Gpu:
    try:
        return gpu()
    except EngineError as error:
        pytest.skip(f"no NVIDIA GPU with PyCUDA: {error.message}")


def median_ms(device: Gpu, shape: tuple[int, ...], direction: str, rounds: int = 30) -> float:
    """Of one copy, by the GPU's own clock."""
    with device:
        buffer, stream = device.buffer(shape, np.uint8), device.stream()
        times = []
        for _ in range(rounds):
            began = stream.mark()
            stream.upload(buffer) if direction == "up" else stream.download(buffer)
            ended = stream.mark()
            stream.wait()
            times.append(ended.time_since(began))
        buffer.free()
    return float(np.median(times))


def test_what_goes_to_the_gpu_comes_back(device: Gpu) -> None:
    with device:
        buffer, stream = device.buffer(FRAME, np.uint8), device.stream()
        sent = np.random.default_rng(0).integers(0, 256, FRAME, np.uint8)
        buffer.host[:] = sent
        stream.upload(buffer)
        stream.wait()
        if not buffer.mapped:
            buffer.host[:] = 0
        stream.download(buffer)
        stream.wait()
        assert np.array_equal(buffer.host, sent)
        buffer.free()


def test_copies_reach_a_bandwidth_that_is_told(device: Gpu) -> None:
    facts = device.facts
    print(f"\n{facts}")
    for direction in ("up", "down"):
        frame, large = median_ms(device, FRAME, direction), median_ms(device, LARGE, direction)
        per_s = LARGE[0] / large / 1e6 if large else float("inf")
        limit = np.prod(FRAME) / 1e6 / per_s if per_s else 0.0
        print(
            f"{direction}: a frame {frame * 1e3:.1f} us (by bandwidth alone {limit * 1e3:.1f} us), 64 MiB at {per_s:.1f} GB/s"
        )
        assert frame >= 0
        assert large > 0 or facts.integrated


def test_a_buffer_of_one_thread_is_used_by_another_and_neither_keeps_a_context(device: Gpu) -> None:
    found: list[bool] = []
    with device:
        buffer, stream = device.buffer(FRAME, np.uint8), device.stream()
    buffer.host[:] = 7

    def other(stream: Stream) -> None:
        with device:
            stream.upload(buffer)
            stream.download(buffer)
            stream.wait()
        found.append(bool((buffer.host == 7).all()))

    for _ in range(4):
        thread = threading.Thread(target=other, args=(stream,))
        thread.start()
        thread.join(30)
    assert found == [True] * 4
    with device:
        del stream
        buffer.free()


def test_memory_that_is_not_there_is_an_error_and_not_the_end(device: Gpu) -> None:
    with pytest.raises(EngineError, match="no memory left"), device:
        device.buffer((1 << 42,), np.uint8)
    test_what_goes_to_the_gpu_comes_back(device)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensorrt_judges_the_shipped_bundle_as_onnx_runtime_does(device: Gpu, precision: str, tmp_path: Path) -> None:
    if find_spec("tensorrt") is None:
        pytest.skip("TensorRT is not installed: it comes with JetPack or from NVIDIA's own index")
    bundle = open_bundle(ENGINES / "paper", ENGINES / "trust")
    engine, record = Workshop(tmp_path, ENGINES / "trust").engine(bundle, precision, 1)  # type: ignore[arg-type]
    with engine:
        judge_samples(engine)
        stages = [engine.stages_ms() for _ in range(100)]
    print(f"\n{device.facts.name} {precision}: built in {record.build_s} s, {record.parity}")
    print({stage: f"{np.median([found[stage] for found in stages]):.3f} ms" for stage in stages[0]})
    assert record.parity["flips"] == 0
