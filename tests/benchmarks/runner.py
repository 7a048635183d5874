"""What our runner costs beside the bare calls: python -m tests.benchmarks.runner [--rounds 5000]

On a driver without a GPU and a TensorRT that computes nothing (tests/nvidia), so that only the host's side is left: the same
copies, launch and wait, once through TensorRtEngine and once written out. Then the longest pause between two parts while
another thread opens and warms a second engine. Needs tests/nvidia/install.sh.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.nvidia.parts import environment, stand_in_driver

CODE = """
import sys, threading, time
from pathlib import Path
from statistics import median
from edge_inspector.runtime.tensorrt import TensorRtEngine
from edge_inspector.runtime import tensorrt as ours
from tests.tiny import graph, tiny_bundle
import hashlib, tensorrt
import pycuda.driver as cuda
folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
bundle = tiny_bundle(folder)
plan, _ = ours.compiled(tensorrt, graph(), 1, lambda *told: None)
(folder / "plan").write_bytes(plan)
def engine():
    return TensorRtEngine(bundle, folder / "plan", hashlib.sha256(plan).hexdigest(), "fp32")
with engine() as first:
    up = [(b.address, b.host) for b in first._uploads]
    down = [(b.host, b.address) for b in first._downloads]
    stream, context, handle = first._stream._stream, first._context, first._stream.handle
    def bare():
        for to, host in up:
            cuda.memcpy_htod_async(to, host, stream)
        context.execute_async_v3(handle)
        for host, to in down:
            cuda.memcpy_dtoh_async(host, to, stream)
        stream.synchronize()
    def timed(call):
        times = []
        for _ in range(rounds):
            began = time.perf_counter()
            call()
            times.append((time.perf_counter() - began) * 1e6)
        return median(times)
    through, written = [], []
    for _ in range(5):
        through.append(timed(first))
        with first._gpu:
            written.append(timed(bare))
    a, b = median(through), median(written)
    print(f"runner {a:.1f} us, bare calls {b:.1f} us: {a - b:.1f} us more, ratio {a / b:.2f} (median of 5 x {rounds})")
    opened, judged = threading.Event(), threading.Event()
    def warm():
        judged.wait(10)
        with engine():
            opened.set()
    thread = threading.Thread(target=warm)
    pauses, last = [], time.perf_counter()
    thread.start()
    while not opened.is_set():
        first()
        now = time.perf_counter()
        pauses.append((now - last) * 1e3)
        last = now
        judged.set()
    thread.join()
    print(f"while a second engine was opened: {len(pauses)} parts, median {median(pauses):.3f} ms, longest pause {max(pauses):.1f} ms")
"""


def main() -> None:
    """Run both in a process that finds the stand-ins."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        driver = stand_in_driver(Path(folder))
        subprocess.run(
            [sys.executable, "-c", CODE, folder, str(given.rounds)], env=environment(driver, STAND_IN_FAULT="idle"), check=True
        )


if __name__ == "__main__":
    main()
