"""Call order of our CUDA and TensorRT code: real PyCUDA on a driver without a GPU, and a stand-in TensorRT. No figure of a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.nvidia.parts import environment

pytest.importorskip("onnx", reason='onnx is not installed: pip install "edge-inspector[tensorrt]"')

from tests.tiny import tiny_bundle

COUNTS = """
import ctypes
library = ctypes.CDLL("libcuda.so.1")
library.fake_cuda_count.restype = ctypes.c_long
NAMES = ("uploads", "downloads", "device_buffers", "pinned_buffers", "waits", "pushes", "depth")
def counts():
    return {name: library.fake_cuda_count(kind) for kind, name in enumerate(NAMES)}
"""
ENGINE = """
import json, logging, sys
from pathlib import Path
from edge_inspector.bundles import open_bundle
from edge_inspector.runtime import Workshop, judge_samples
from edge_inspector.errors import EngineError, EngineLost
folder = Path(sys.argv[1])
bundle = open_bundle(folder / "tiny", folder / "trust")
workshop = Workshop(folder / "engines", folder / "trust")
"""


def ran(driver: Path, code: str, *arguments: object, **more: str) -> Any:
    """The last line a program prints, as JSON; it must end well: PyCUDA aborts where a context is left over."""
    program = textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:edge_inspector", "-c", COUNTS + ENGINE + program, *map(str, arguments)],
        env=environment(driver, **more), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "PyCUDA ERROR" not in done.stderr, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("device")
    tiny_bundle(where)
    return where


def test_a_frame_costs_two_copies_there_and_one_for_each_output_back(driver: Path, folder: Path) -> None:
    found = ran(driver, """
        engine, record = workshop.engine(bundle, "auto", 2)
        with engine:
            before = counts()
            for _ in range(10):
                engine()
            after = counts()
        print(json.dumps({name: after[name] - before[name] for name in NAMES} | {"end": counts()}))
        """, folder)  # fmt: skip
    end = found.pop("end")
    assert found == {
        "uploads": 20,
        "downloads": 20,
        "device_buffers": 0,
        "pinned_buffers": 0,
        "waits": 10,
        "pushes": 10,
        "depth": 0,
    }
    assert (end["device_buffers"], end["pinned_buffers"], end["depth"]) == (0, 0, 0)


def test_an_integrated_gpu_copies_nothing(driver: Path, folder: Path) -> None:
    found = ran(driver, """
        engine, record = workshop.engine(bundle, "auto", 2)
        with engine:
            scores = judge_samples(engine)
            print(json.dumps(counts() | {"scores": scores}))
        """, folder, FAKE_CUDA_INTEGRATED="1")  # fmt: skip
    assert (found["uploads"], found["downloads"], found["device_buffers"]) == (0, 0, 0)
    assert found["pinned_buffers"] == 4
    assert found["scores"] == pytest.approx([0.09375, 0.71875], rel=1e-3)


def test_an_engine_is_opened_in_one_thread_and_used_in_another_while_the_old_one_goes_on(driver: Path, folder: Path) -> None:
    found = ran(driver, """
        import threading
        from contextlib import ExitStack
        engine = lambda: workshop.engine(bundle, "auto", 1)[0]
        stack, swapped, parts, judged = ExitStack(), [], [0, 0], threading.Event()
        old = stack.enter_context(engine())
        def warm():
            judged.wait(10)
            swapped.append(stack.enter_context(engine()))
        def station():
            global old
            while parts[1] < 50:
                if swapped:
                    old = swapped[0]
                    parts[1] += 1
                else:
                    parts[0] += 1
                old()
                judged.set()
            depths.append(counts()["depth"])
        depths = []
        line = threading.Thread(target=station)
        line.start()
        opener = threading.Thread(target=warm)
        opener.start()
        opener.join(30), line.join(30)
        stack.close()
        depths.append(counts()["depth"])
        print(json.dumps({"parts": parts, "depths": depths, "alive": line.is_alive()}))
        """, folder)  # fmt: skip
    assert found["alive"] is False
    assert found["parts"][1] == 50
    assert found["parts"][0] > 0, "parts were judged while the new engine was opened"
    assert found["depths"] == [0, 0]


def test_a_gpu_that_fails_for_good_is_told_from_other_faults_and_left_in_peace(
    driver: Path, folder: Path, tmp_path: Path
) -> None:
    found = ran(driver, """
        engine, record = workshop.engine(bundle, "auto", 1)
        told = []
        with engine:
            engine()
            Path(sys.argv[2]).touch()
            for _ in range(2):
                try:
                    engine()
                except EngineLost as error:
                    told.append(error.message)
        print(json.dumps(told), flush=True)
        import os; os._exit(0)
        """, folder, tmp_path / "lost", FAKE_CUDA_LOST=str(tmp_path / "lost"))  # fmt: skip
    assert len(found) == 2
    assert "illegal memory access" in found[0]


def test_without_a_context_pycuda_refuses_so_nothing_here_works_by_chance(driver: Path, folder: Path) -> None:
    found = ran(driver, """
        from edge_inspector.runtime.cuda import gpu
        graphics = gpu()
        try:
            graphics.stream()
        except Exception as error:
            print(json.dumps(str(error)))
        """, folder)  # fmt: skip
    assert "no currently active context" in found


def test_our_runner_adds_no_call_to_the_bare_sequence(driver: Path, folder: Path) -> None:
    """Members of TensorRT that one inspection looks at: the call itself. What it costs is told by tests.benchmarks.runner."""
    found = ran(driver, """
        import tensorrt
        engine, record = workshop.engine(bundle, "auto", 1)
        with engine:
            tensorrt.CALLS.clear()
            engine()
            print(json.dumps(sorted(tensorrt.CALLS)))
        """, folder)  # fmt: skip
    assert found == ["IExecutionContext.execute_async_v3"]
