"""A bundle is read once: what was verified is what runs, whatever becomes of the files meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edge_inspector import bundles
from edge_inspector.errors import BundleDamaged, BundleUnsupported
from edge_inspector.runtime import OnnxEngine, Pool, judge_samples
from edge_inspector.runtime.engine import picture_score
from tests.line import until
from tests.tiny import graph, picture, score_of, tiny_bundle

LOADS = 400
LEVEL = 200


@contextmanager
def swapped(network: Path, good: bytes, foreign: bytes) -> Iterator[None]:
    """Meanwhile another process puts a foreign network in the place of the good one, and back:
    by rename, and by writing over it."""
    program = Path(__file__).with_name("swapping.py")
    (network.parent.parent / "good").write_bytes(good)
    (network.parent.parent / "foreign").write_bytes(foreign)
    process = subprocess.Popen([sys.executable, str(program), str(network)])
    try:
        until((network.parent.parent / "swapping").exists, what="the other process")
        yield
    finally:
        process.kill()
        process.wait()


def test_of_400_loads_none_runs_a_network_that_was_swapped_in_between_two_reads(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path)
    network = bundle.folder / bundles.NETWORK
    ran = {"the signed one": 0, "a foreign one": 0, "none": 0}
    with swapped(network, graph(), graph(weight=0.25)):
        for _ in range(LOADS):
            try:
                opened = bundles.open_bundle(bundle.folder, tmp_path / "trust")
                with OnnxEngine(opened, threads=1) as engine:
                    score = picture_score(engine, picture(LEVEL))
            except BundleDamaged:
                ran["none"] += 1
                continue
            ran["the signed one" if score == pytest.approx(score_of(LEVEL)) else "a foreign one"] += 1
    assert ran["a foreign one"] == 0, ran
    assert ran["the signed one"] > LOADS // 20, f"the test must try something: {ran}"
    assert ran["none"] > LOADS // 20, f"the test must try something: {ran}"


def test_what_was_verified_runs_though_the_files_are_others_by_now_and_its_memory_is_let_go(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path)
    (bundle.folder / "sample-140.png").unlink()
    (bundle.folder / bundles.NETWORK).write_bytes(graph(weight=0.25))
    with pooled(bundle) as engine:
        assert picture_score(engine, picture(LEVEL)) == pytest.approx(score_of(LEVEL))
        assert not bundle._held, "the runtime has its own"
        with pytest.raises(BundleDamaged, match=r"sample-140\.png: missing"):
            judge_samples(engine)
        with pytest.raises(BundleDamaged, match="sha256 differs"):
            bundle.read(bundles.NETWORK)


@contextmanager
def pooled(bundle: bundles.Bundle) -> Iterator[OnnxEngine]:
    pool = Pool()
    try:
        engine = pool.engine((bundle.sha256, 1), lambda: OnnxEngine(bundle))
        assert isinstance(engine, OnnxEngine)
        yield engine
    finally:
        pool.close()


def linked(path: Path) -> None:
    path.symlink_to(path.parent)


def test_a_pipe_a_growing_file_and_a_folder_in_the_place_of_a_file_hold_nobody_up(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path)
    network = bundle.folder / bundles.NETWORK
    good = network.read_bytes()
    network.write_bytes(good + b"x" * 50_000_000)
    with pytest.raises(BundleDamaged, match=f"more than {len(good)} bytes"):
        bundles.open_bundle(bundle.folder, tmp_path / "trust")
    for name in (bundles.NETWORK, bundles.MANIFEST, bundles.SIGNATURE):
        for number, make in enumerate((os.mkfifo, os.mkdir, linked)):
            folder = tiny_bundle(tmp_path / f"{name}-{number}").folder
            (folder / name).unlink()
            make(folder / name)
            began = time.monotonic()
            with pytest.raises(BundleDamaged, match="not a plain file"):
                bundles.open_bundle(folder, folder.parent / "trust")
            assert time.monotonic() - began < 2


def test_a_generator_that_reads_other_files_is_refused_as_a_network_is(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(graph())
    tensor = model.graph.initializer[0]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / bundles.GENERATOR).write_bytes(model.SerializeToString())
    with pytest.raises(BundleUnsupported, match=r"generator\.onnx: keeps tensors in other files"):
        tiny_bundle(tmp_path)
