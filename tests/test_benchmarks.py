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

RESULTS = Path(__file__).with_name("benchmarks") / "results"
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
    "cost-": ("--sides", "64", "--backbones", "lite2", "--prototypes", "16", "--rounds", "1"),
    "delay-": ("2",),
    "detection-": ("SET", "--pictures", "24", "--out", "SET/out", *TRAINED),
    "gans-": ("SET", "--minutes", "0.01", "--width", "4", "--anogan-steps", "1", "--out", "SET/out"),
    "promise-": ("SET", "--splits", "1", "--pictures", "24", "--out", "SET/out", *TRAINED),
    "precision-": ("SET/tiny", "SET/test/good", "--trust", "SET/trust"),
    "teaching-": ("SET", "--pictures", "24", "--draws", "1", "--out", "SET/out", *TRAINED),
    "runner-": ("--rounds", "5"),
    "tables-": ("RESULTS/detection.jsonl", "--curves", "SET/curves.svg"),
    "vit-": ("SET/whole.onnx", "SET/vit.onnx"),
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


def transformer(path: Path) -> None:
    """An ONNX file with the names that `vit` cuts at: patches of 14 px as tokens, a first one for all, one block."""
    onnx = pytest.importorskip("onnx")
    from tests.benchmarks import vit

    make = onnx.helper.make_node
    values = {
        "kernel": np.zeros((384, 3, 14, 14), np.float32), "flat": np.array([0, 384, -1]), "zero": np.array([0]), "one": np.array([1]),
        "axis": np.array([1]),
    }  # fmt: skip
    nodes = [
        make("Conv", ["input_image", "kernel"], [vit.PATCHES], strides=[14, 14]),
        make("Reshape", [vit.PATCHES, "flat"], ["flattened"]),
        make("Transpose", ["flattened"], ["patches"], perm=[0, 2, 1]),
        make("Slice", ["patches", "zero", "one", "axis"], ["class"]),
        make("Concat", ["class", "patches"], ["tokens"], axis=1),
        make("Identity", ["tokens"], ["/backbone/encoder/layer.7/Add_1_output_0"]),
        make("ReduceMean", ["/backbone/encoder/layer.7/Add_1_output_0"], ["output_importance"]),
    ]
    given, made = (
        onnx.helper.make_tensor_value_info(name, 1, shape)
        for name, shape in (("input_image", ["N", 3, 224, 224]), ("output_importance", None))
    )
    held = [onnx.numpy_helper.from_array(value, name) for name, value in values.items()]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "vit", [given], [made], held), opset_imports=[onnx.helper.make_opsetid("", 14)]
    )
    onnx.save(model, str(path))


def require(module: str) -> None:
    if module in ("cost", "detection", "gans", "promise", "teaching"):
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
    if module == "vit":
        transformer(tmp_path / "whole.onnx")
    words = [word.replace("SET", str(tmp_path)).replace("RESULTS", str(RESULTS)) for word in RUNS[name]]
    monkeypatch.setattr(sys, "argv", [module, *words])
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
