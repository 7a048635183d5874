"""Cropping, windowing, tiling, masking; the inspector on top of it; the engine contract."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import pytest

from edge_inspector import pictures, preprocess, scoring
from edge_inspector.bundles import InputSpec, open_bundle
from edge_inspector.config import EngineConfig
from edge_inspector.errors import EngineError, PictureError
from edge_inspector.frames import Frame, Pixels, frozen, utc_now
from edge_inspector.inspector import Inspector
from edge_inspector.recipes import CameraRecipe, Decision, Recipe, RoiRecipe
from edge_inspector.results import Reason, Verdict
from edge_inspector.roi import Rectangle, Roi
from edge_inspector.runtime import OnnxEngine, Workshop, judge_samples, opened, tensorrt
from edge_inspector.runtime.cuda import gpu
from tests.line import ENGINES

RECORDING = ENGINES / "recording"


def frame(image: Pixels) -> Frame:
    return Frame(frozen(image), 0, time.monotonic(), utc_now())


def spec(**more: object) -> InputSpec:
    return InputSpec.model_validate({"height": 32, "width": 32, **more})


def filled(plan: preprocess.Plan, image: Pixels) -> tuple[np.ndarray, np.ndarray]:
    images, valid = plan.buffers()
    assert plan.fill(image, images, valid) == len(images)
    return images, valid


def test_tiles_cover_a_region_and_stitching_puts_them_back() -> None:
    image = np.random.default_rng(0).integers(0, 255, (70, 100, 3), np.uint8)
    plan = preprocess.Plan(spec(tile=32, overlap=0.25), Roi(), 70, 100)
    images, _ = filled(plan, image)
    assert len(plan.tiles) == preprocess.tile_count(plan.spec, 100, 70) == 12
    assert np.array_equal(plan.stitched(images), image)


def test_a_region_is_cut_where_the_recipe_says() -> None:
    image = np.zeros((100, 100, 3), np.uint8)
    image[20:52, 40:72] = 200
    roi = Roi(rectangle=Rectangle(x_px=40, y_px=20, w_px=32, h_px=32))
    images, valid = filled(preprocess.Plan(spec(), roi, 100, 100), image)
    assert (images == 200).all()
    assert valid.all()


def test_what_lies_outside_a_polygon_is_blank_and_not_valid() -> None:
    image = np.full((32, 32), 200, np.uint8)
    roi = Roi(polygon=((0, 0), (31, 0), (0, 31)))
    images, valid = filled(preprocess.Plan(spec(channels=1, order="grey"), roi, 32, 32), image)
    assert (images[valid == 0] == preprocess.BLANK).all()
    assert (images[valid == 1] == 200).all()
    assert 0.5 < valid.mean() < 0.6


def test_a_letterbox_keeps_the_shape_and_marks_its_bars() -> None:
    image = np.full((20, 40), 9, np.uint8)
    images, valid = filled(preprocess.Plan(spec(channels=1, order="grey", fit="letterbox"), Roi(), 20, 40), image)
    assert valid[0, 8:24].all()
    assert valid.sum() == 16 * 32
    assert (images[0, :8] == preprocess.BLANK).all()
    assert (images[0, 8:24] == 9).all()


def test_twelve_bits_come_through_the_intensity_window() -> None:
    image = np.full((32, 32), 2048, np.uint16)
    images, _ = filled(preprocess.Plan(spec(channels=1, order="grey"), Roi(), 32, 32, (0, 4095)), image)
    assert (images == 128).all()
    with pytest.raises(preprocess.FormatError, match="no intensity_window"):
        filled(preprocess.Plan(spec(channels=1, order="grey"), Roi(), 32, 32), image)


@pytest.mark.parametrize(("order", "first"), [("bgr", 10), ("rgb", 30), ("grey", None)])
def test_colours_come_in_the_networks_order(order: str, first: int | None) -> None:
    image = np.dstack([np.full((40, 40), v, np.uint8) for v in (10, 20, 30)])
    plan = preprocess.Plan(spec(order=order, channels=1 if order == "grey" else 3), Roi(), 40, 40)
    images, _ = filled(plan, image)
    assert images[0, 0, 0, 0] == (first if first is not None else cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)[0, 0])
    grey = np.full((40, 40), 77, np.uint8)
    assert (filled(plan, grey)[0] == 77).all()


def test_filling_allocates_nothing_per_frame() -> None:
    image = np.random.default_rng(0).integers(0, 255, (480, 640, 3), np.uint8)
    plan = preprocess.Plan(spec(order="rgb", tile=160), Roi(), 480, 640)
    images, valid = plan.buffers()
    plan.fill(image, images, valid)
    tracemalloc.start()
    plan.fill(image, images, valid)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4096, "numpy allocated a buffer"


def test_regions_are_boxes_with_area_in_frame_pixels_and_square_millimetres() -> None:
    plan = preprocess.Plan(spec(), Roi(rectangle=Rectangle(x_px=10, y_px=20, w_px=32, h_px=32)), 100, 100)
    anomaly = np.zeros((32, 32), np.float32)
    anomaly[4:6, 3:8], anomaly[20, 20] = 2.0, 3.0
    strong, wide = plan.regions(anomaly, 1.0, 0.5)
    assert (strong.x_px, strong.y_px, strong.area_px, strong.peak) == (30, 40, 1, 3.0)
    assert (wide.x_px, wide.y_px, wide.w_px, wide.h_px, wide.area_px, wide.area_mm2) == (13, 24, 5, 2, 10, 2.5)


# --- pictures


def test_truncated_empty_and_foreign_files_are_refused_with_their_name(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 255, (50, 50, 3), np.uint8)
    for suffix in (".jpg", ".png"):
        data = pictures.encoded(image, suffix)
        with pytest.raises(PictureError, match=f"x{suffix}"):
            pictures.decode(data[: len(data) // 2], f"x{suffix}")
    for data in (b"", b"text"):
        with pytest.raises(PictureError, match="bad"):
            pictures.decode(data, "bad")
    with pytest.raises(PictureError, match="No such file"):
        pictures.read(tmp_path / "none.png")
    with pytest.raises(PictureError, match="no pictures in it"):
        pictures.listed(tmp_path)


def test_alpha_is_dropped_and_sixteen_bits_are_kept() -> None:
    bgra = np.dstack([np.full((9, 9), v, np.uint8) for v in (1, 2, 3, 128)])
    assert pictures.decode(pictures.encoded(bgra), "x").shape == (9, 9, 3)
    deep = np.full((9, 9), 4000, np.uint16)
    assert np.array_equal(pictures.decode(pictures.encoded(deep), "x"), deep)


# --- the engine contract, for every implementation


@pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt"])
def test_an_engine_keeps_its_buffers_and_judges_its_samples(
    runtime: Literal["onnxruntime", "tensorrt"], tmp_path: Path
) -> None:
    bundle = open_bundle(ENGINES / "paper", ENGINES / "trust")
    if runtime == "tensorrt":  # on a GPU, and in tests/nvidia on stand-ins
        try:
            tensorrt.load()
            gpu()
        except EngineError as error:
            pytest.skip(f"no GPU with TensorRT and PyCUDA: {error.message}")
    with opened(bundle, EngineConfig(runtime=runtime), Workshop(tmp_path, ENGINES / "trust"), lambda _: 3) as engine:
        assert (engine.runtime, engine.batch, engine.instead) == (runtime, 3, "")
        first = engine()
        assert first.score.shape == (3,)
        assert first.map.shape[0] == 3
        assert first.expected is not None
        assert first.expected.shape == engine.images.shape
        held = first.score.ctypes.data
        assert engine().score.ctypes.data == held
        for scored, sample in zip(judge_samples(engine), bundle.manifest.samples, strict=True):
            assert scoring.judge(scored, bundle.manifest.threshold)[0] is sample.verdict
        engine.valid[:] = 0
        assert (engine().map == 0).all(), "what is not valid must not be judged"


def test_a_network_that_computes_something_else_fails_its_samples() -> None:
    bundle = open_bundle(ENGINES / "paper", ENGINES / "trust")
    changed = bundle.manifest.samples[0].model_copy(update={"score": bundle.manifest.samples[0].score * 1.2})
    manifest = bundle.manifest.model_copy(update={"samples": (changed,)})
    with (
        OnnxEngine(type(bundle)(bundle.folder, manifest, bundle.sha256, bundle.key_id)) as engine,
        pytest.raises(EngineError, match="sample-good-1.png scores"),
    ):
        judge_samples(engine)


# --- inspector


def recipe(rois: dict[str, RoiRecipe] | None = None, decision: Decision | None = None) -> Recipe:
    camera = CameraRecipe(rois=rois or {"all": RoiRecipe(bundle="paper")}, mm_per_px=0.1)
    return Recipe(cameras={"top": camera}, decision=decision or Decision())


def test_a_defect_fails_with_place_area_and_expected_appearance() -> None:
    bundle = open_bundle(ENGINES / "paper", ENGINES / "trust")
    image = pictures.read(ENGINES / "paper" / "sample-fail-1.png")
    with OnnxEngine(bundle, batch=4) as engine:
        found = Inspector(recipe(), {"paper": engine}).inspect({"top": [frame(image)]})
    assert (found.verdict, found.reason) == (Verdict.FAIL, Reason.ABOVE_THRESHOLD)
    worst = found.findings[0].regions[0]
    assert abs(worst.x_px + worst.w_px / 2 - image.shape[1] / 2) < 16
    assert abs(worst.y_px + worst.h_px / 2 - image.shape[0] / 2) < 16
    assert worst.area_mm2 == pytest.approx(worst.area_px * 0.01)
    view = found.views[0]
    assert view.expected is not None
    assert view.expected.shape == image.shape
    assert view.anomaly.shape == image.shape[:2]
    picture = pictures.explanation(view.seen, view.anomaly, 1.0, found.findings[0].regions, view.expected, "t")
    assert picture.shape[1] > 3 * 300
    kept = pictures.decode(pictures.encoded(picture, ".jpg"), "kept").astype(int)
    scale = picture.shape[1] / 3 / image.shape[1]
    side = kept[56 + round((worst.y_px + worst.h_px / 2) * scale)][round(worst.x_px * scale) - 2 :][:5]
    assert (side[:, 2] - side[:, :2].max(axis=1)).max() > 90, "the box is not red any more"


def test_the_batch_size_does_not_change_the_score() -> None:
    bundle = open_bundle(ENGINES / "paper", ENGINES / "trust")
    image = pictures.read(RECORDING / "paper-003.png")
    scores = []
    for batch in (1, 3, 4, 16):
        with OnnxEngine(bundle, batch=batch) as engine:
            found = Inspector(recipe(), {"paper": engine}).inspect({"top": [frame(image)]}).findings[0].score
            assert found is not None
            scores.append(found)
    assert scores == pytest.approx([scores[0]] * 4, rel=1e-4)


def test_frames_that_do_not_fit_are_undecided_and_say_why() -> None:
    bundle = open_bundle(ENGINES / "paper", ENGINES / "trust")
    outside = {"rim": RoiRecipe(bundle="paper", rectangle=Rectangle(x_px=100, y_px=0, w_px=64, h_px=64))}
    good = pictures.read(RECORDING / "paper-001.png")
    with OnnxEngine(bundle, batch=4) as engine:
        engines = {"paper": engine}
        found = Inspector(recipe(outside), engines).inspect({"top": [frame(good)]})
        assert (found.verdict, found.reason) == (Verdict.UNDECIDED, Reason.WRONG_FORMAT)
        assert "reaches outside a frame of 128x128" in found.detail
        deep = Inspector(recipe(), engines).inspect({"top": [frame(good.astype(np.uint16))]})
        assert deep.reason is Reason.WRONG_FORMAT
        none = Inspector(recipe(), engines).inspect({})
        assert (none.verdict, none.reason) == (Verdict.UNDECIDED, Reason.MISSING_IMAGE)
        two_of_three = Inspector(recipe(decision=Decision(frames=3, failing_frames=2)), engines)
        bad = pictures.read(ENGINES / "paper" / "sample-fail-1.png")
        assert two_of_three.inspect({"top": [frame(good), frame(bad), frame(good)]}).verdict is Verdict.PASS
        assert two_of_three.inspect({"top": [frame(bad), frame(bad), frame(good)]}).verdict is Verdict.FAIL


def test_a_whole_region_network_refuses_another_shape() -> None:
    manifest = open_bundle(ENGINES / "paper", ENGINES / "trust").manifest.model_copy(update={"input": spec()})
    preprocess.refuse_unlike(manifest, (0, 0, 150, 150))
    with pytest.raises(preprocess.FormatError, match="trained on"):
        preprocess.refuse_unlike(manifest, (0, 0, 640, 480))
