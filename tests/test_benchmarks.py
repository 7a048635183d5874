"""Every benchmark still runs, and measures what it says: each for a moment, with the smallest arguments it takes."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_inspector import pictures
from edge_inspector.cameras.synthetic import draw_part
from tests.line import MOSQUITTO, needed
from tests.nvidia.parts import needs_pycuda
from tests.tiny import tiny_bundle

MODULES = {path.stem for path in Path(__file__).with_name("benchmarks").glob("*.py")} - {"__init__"}
TRAINED = ("--side", "64", "--prototypes", "16", "--steps", "2")
RUNS = {
    # "SET" stands for a folder with a set of pictures and a tiny bundle.
    "line-throughput": ("throughput", "--parts", "4", "--rounds", "1"),
    "line-latency": ("latency", "--parts", "2", "--rounds", "1"),
    "line-start": ("start", "--rounds", "1"),
    "line-soak": ("soak", "--parts", "4", "--rounds", "2"),
    "cameras-http": ("--rigs", "http", "--seconds", "0.3", "--faults", "hang"),
    "cameras-four": ("--four", "--fps", "20", "--parts", "4"),
    "delay-": ("2",),
    "detection-": ("SET", "--pictures", "24", "--out", "SET/out", *TRAINED),
    "gans-": ("SET", "--minutes", "0.01", "--width", "4", "--anogan-steps", "1", "--out", "SET/out"),
    "promise-": ("SET", "--splits", "1", "--pictures", "24", "--out", "SET/out", *TRAINED),
    "precision-": ("SET/tiny", "SET/test/good", "--trust", "SET/trust"),
    "teaching-": ("SET", "--pictures", "24", "--draws", "1", "--out", "SET/out", *TRAINED),
    "runner-": ("--rounds", "5"),
}


def drawn_set(folder: Path) -> None:
    """24 good parts to train on; four good and four defective ones to judge."""
    for place, first, count, defective in (
        ("train/good", 0, 24, False),
        ("test/good", 24, 4, False),
        ("test/bad", 28, 4, True),
    ):
        (folder / place).mkdir(parents=True)
        for number in range(first, first + count):
            pictures.write(folder / place / f"{number:03d}.png", draw_part(np.random.default_rng(number), 64, 64, defective))


def require(module: str) -> None:
    if module in ("detection", "gans", "promise", "teaching"):
        pytest.importorskip("torch", reason='torch is not installed: pip install "edge-inspector[train]"')
    if module == "runner":
        needs_pycuda()
    if module == "cameras":
        pytest.importorskip("pypylon", reason="pylon is not installed: pip install pypylon")
    if module == "delay":
        needed(shutil.which("ip"), "apt install iproute2")
    if module in ("line", "cameras", "delay"):
        needed(MOSQUITTO, "apt install mosquitto")


def test_no_benchmark_is_left_out() -> None:
    assert {name.split("-")[0] for name in RUNS} == MODULES


@pytest.mark.parametrize("name", RUNS)
def test_a_benchmark_runs_and_prints_its_figures(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    module = name.split("-", maxsplit=1)[0]
    require(module)
    drawn_set(tmp_path)
    tiny_bundle(tmp_path)
    monkeypatch.setattr(sys, "argv", [module, *(word.replace("SET", str(tmp_path)) for word in RUNS[name])])
    monkeypatch.delitem(sys.modules, f"tests.benchmarks.{module}", raising=False)
    runpy.run_module(f"tests.benchmarks.{module}", run_name="__main__")
    printed = capfd.readouterr().out
    assert printed
    if name == "line-throughput":
        figures: dict[str, Any] = json.loads(printed)
        assert {"station-sheet", "evidence", "outbox-committe", "broker"} <= set(figures["daemon_cpu_ms_by_thread"])


def test_the_bare_loop_judges_one_picture_for_each_part(tmp_path: Path) -> None:
    """Its engine's cost is that of one picture: four in a batch once made the line look three times as quick as it is."""
    from tests.benchmarks.line import bare_loop, files

    found = bare_loop(files(tmp_path / "files", 4))
    assert found["engine_cpu"] < found["cpu"] < 1.5 * found["engine_cpu"] + 0.02
