"""Training on real pictures: survey, split, resume, calibration, export, evaluation. Needs the train extra."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import jsonschema
import numpy as np
import pytest

from edge_inspector import bundles, pictures, scoring, signatures
from edge_inspector.bundles import InputSpec
from edge_inspector.cameras.synthetic import draw_part
from edge_inspector.errors import PictureError, TrainingError
from edge_inspector.inspector import Inspector
from edge_inspector.preprocess import FormatError, Tile, refuse_unlike
from edge_inspector.recipes import CameraRecipe, Recipe, RoiRecipe
from edge_inspector.results import Verdict
from edge_inspector.roi import Rectangle, Roi
from edge_inspector.runtime import OnnxEngine, judge_samples
from edge_inspector.scoring import Wish
from tests.line import filled
from tests.test_preprocess import frame

torch = pytest.importorskip("torch", reason='torch is not installed: pip install "edge-inspector[train]"')

import onnx  # noqa: E402

from edge_inspector import training  # noqa: E402
from edge_inspector.training import data, evaluation, generation, orders  # noqa: E402
from edge_inspector.training.networks import Family, Half, feature_weights  # noqa: E402
from edge_inspector.training.networks.fanogan_fit import Fanogan, Fitter  # noqa: E402
from edge_inspector.training.networks.feature_anogan import judged, patches, scaled  # noqa: E402
from edge_inspector.training.networks.feature_fit import FeatureAnogan  # noqa: E402
from edge_inspector.training.networks.feature_material import Extractor, Gatherer, gathered  # noqa: E402
from edge_inspector.training.networks.feature_residuals import Residuals, moments  # noqa: E402
from edge_inspector.training.normals import blocks  # noqa: E402
from edge_inspector.training.orders import Order  # noqa: E402
from edge_inspector.training.run import Progress, Run  # noqa: E402

READ_BY_0_1 = Path(__file__).parent / "cases" / "installation-0.1" / "manifest.schema.json"
"""What the first release refuses of a manifest; a device that runs it takes bundles that are made now."""
TINY = Fanogan(side=32, width=4, batch=8, critic_steps=1, gan_steps=6, encoder_steps=60)
SMALL = FeatureAnogan(side=64, prototypes=64, steps=30)
INT8 = dataclasses.replace(SMALL, int8=True)


def drawn(folder: Path, count: int, *, defect: bool = False, size: int = 32) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        pictures.write(folder / f"{n:03d}.png", draw_part(np.random.default_rng((defect, n)), size, size, defect))
    return folder


def order(tmp_path: Path, folder: Path, **more: object) -> Order:
    key = tmp_path / "signing.key"
    if not key.exists():
        signatures.create_key(key, tmp_path / "trust")
    values: dict[str, object] = {
        "folder": folder, "out": tmp_path / "bundle", "product": "disc", "name": "disc",
        "key": signatures.read_private_key(key), "family": TINY, "seed": 3, "wish": Wish(0.1), "command": "edge-inspector train x",
    }  # fmt: skip
    return Order(**{**values, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize("family", [TINY, SMALL, INT8], ids=["fanogan", "feature-anogan", "int8"])
def test_a_folder_of_good_parts_becomes_a_signed_bundle_that_keeps_its_word(tmp_path: Path, family: Family) -> None:
    steps: list[Progress] = []
    trained = training.train(order(tmp_path, drawn(tmp_path / "good", 60), family=family), steps.append)
    opened = bundles.open_bundle(trained.folder, tmp_path / "trust")
    manifest = opened.manifest
    written = json.loads((trained.folder / bundles.MANIFEST).read_text())
    jsonschema.validate(written, json.loads(READ_BY_0_1.read_text()))
    graph = onnx.load_from_string(opened.read(bundles.NETWORK)).graph
    kinds = {w.name: w.data_type for w in graph.initializer}
    dequantised = {kinds.get(n.input[0], onnx.TensorProto.INT8) for n in graph.node if n.op_type == "DequantizeLinear"}
    assert dequantised == ({onnx.TensorProto.INT8} if family is INT8 else set()), "TensorRT takes no other"
    assert {"reading", "detection limit"} < {step.stage for step in steps}
    assert all(1 <= step.step <= step.steps for step in steps)
    assert trained.parity < 1e-4
    assert manifest.training.pictures == 60
    assert manifest.calibration.n == len(manifest.calibration.scores) == (14 if family is TINY else 60)
    assert np.median(manifest.calibration.scores) == pytest.approx(1.0, rel=1e-3)
    assert {sample.verdict for sample in manifest.samples} == {Verdict.PASS, Verdict.FAIL}
    with OnnxEngine(opened, batch=2) as engine:
        judge_samples(engine)
        drawn(tmp_path / "test" / "good", 10)
        drawn(tmp_path / "test" / "scratch", 10, defect=True)
        found = training.evaluate(engine, tmp_path)
    assert found.detection is not None
    if family is not TINY:
        assert found.detection.auroc > 0.9  # drawn scratches are no riddle
    assert found.escape.n == found.false_reject.n == 10
    assert set(found.escape_by_kind) == set(found.auroc_by_kind) == {"scratch"}
    json.dumps(found.to_json())
    page = (trained.folder / "report.html").read_text()
    assert "edge-inspector train x" in page
    assert "of good parts will be rejected; with 95 % confidence" in page
    assert "Detection limit" in page
    assert page.count("<polyline") == (3 if family is TINY else 8)
    assert ("what G draws freely" if family is TINY else "neither the parts nor such defects") in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    made = generation.generate(opened, tmp_path / "drawn", 5, seed=1)
    assert (made.good, made.defects) == (5 if family is TINY else 0, 10)
    assert (tmp_path / "drawn" / "walks.png").exists() == (family is TINY)
    for kind in ("learned", "withheld"):
        masks = [
            evaluation.mask_of(tmp_path / "drawn", kind, p) for p in pictures.listed(tmp_path / "drawn" / "test" / kind).taken
        ]
        assert sum(mask is not None and bool(mask.any()) for mask in masks) == 5
    with pytest.raises(TrainingError, match="exists already"):
        training.train(order(tmp_path, tmp_path / "good"))


def test_tiles_judged_in_any_batch_give_one_score(tmp_path: Path) -> None:
    trained = training.train(order(tmp_path, drawn(tmp_path / "good", 24, size=96), tile=40, overlap=0.1))
    opened = bundles.open_bundle(trained.folder, tmp_path / "trust")
    image = draw_part(np.random.default_rng(5), 96, 96, True)
    recipe = Recipe(cameras={"top": CameraRecipe(rois={"all": RoiRecipe(bundle="disc")})})
    scores = []
    for batch in (1, 2, 9, 16):
        with OnnxEngine(opened, batch=batch) as engine:
            found = Inspector(recipe, {"disc": engine}).inspect({"top": [frame(image)]}).findings[0].score
            assert found is not None
            scores.append(found)
    assert scores == pytest.approx([scores[0]] * 4, rel=1e-4)


def states(graph: Any) -> list[Any]:
    return list(graph.state_dict().values())


def test_an_interrupted_gan_resumes_to_the_same_network(tmp_path: Path) -> None:
    tiles = np.stack([draw_part(np.random.default_rng(n), 32, 32, False) for n in range(24)])
    settings = Fanogan(side=32, width=4, batch=4, critic_steps=1, gan_steps=4, encoder_steps=4)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = Fitter(tiles, settings, Run(tmp_path / "a", seed=5), "x").graph()
    for stage, step in (("GAN", 2), ("encoder", 3)):
        seen: list[Progress] = []

        def stop(seen: list[Progress] = seen, stage: str = stage, step: int = step) -> bool:
            return (seen[-1].stage, seen[-1].step) == (stage, step)

        with pytest.raises(KeyboardInterrupt):
            Fitter(tiles, settings, Run(tmp_path / "b", seed=5, on_progress=seen.append, stopping=stop), "x").graph()
    resumed = Fitter(tiles, settings, Run(tmp_path / "b", seed=5), "x").graph()
    assert all(torch.equal(a, b) for a, b in zip(states(whole), states(resumed), strict=True))
    longer = Fitter(tiles, dataclasses.replace(settings, encoder_steps=6), Run(tmp_path / "b", seed=5), "x")
    longer.graph()
    assert longer.encoder_step == 6
    with pytest.raises(TrainingError, match="other settings or pictures"):
        Fitter(tiles[:20], settings, Run(tmp_path / "b", seed=5), "x").graph()
    (tmp_path / "b" / "fanogan.pt").write_bytes(b"damaged")
    with pytest.raises(TrainingError, match="damaged checkpoint"):
        Fitter(tiles, settings, Run(tmp_path / "b", seed=5), "x").graph()


def test_an_interrupted_flagship_resumes_to_the_same_network(tmp_path: Path) -> None:
    """Within the features, the generator and the discriminator: nothing is done twice but what was under way."""
    surveyed = data.survey(drawn(tmp_path / "good", 80))
    spec = SMALL.input_spec(surveyed, None, 0)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = SMALL.fit(surveyed, spec, None, Run(tmp_path / "a"))
    seen: list[Progress] = []
    for stage, step, first in (
        ("features", 70, ("features", 1)),
        ("generator 2 of 3", 13, ("features", 65)),
        ("discriminator 2 of 3", 7, ("generator 2 of 3", 14)),
        ("", 0, ("discriminator 2 of 3", 8)),
    ):
        seen.clear()

        def stop(stage: str = stage, step: int = step) -> bool:
            return bool(seen) and (seen[-1].stage, seen[-1].step) == (stage, step)

        run = Run(tmp_path / "b", on_progress=seen.append, stopping=stop)
        if stage:
            with pytest.raises(KeyboardInterrupt):
                SMALL.fit(surveyed, spec, None, run)
        else:
            resumed = SMALL.fit(surveyed, spec, None, run)
        begun = [(now.stage, now.step) for now in seen if now.stage != "generator 2 of 3" or stage != ""]
        assert begun[0] == first, "what was kept is not done again"
    assert {f"generator {n}" for n in ("1 of 3", "2 of 3", "3 of 3", "for all")} < set(run.losses)
    sheets = [pictures.read(tmp_path / "b" / f"sheet-fold-{fold}.png") for fold in range(3)]
    assert all(sheet.shape[0] == 64 and sheet.shape[1] % 32 == 0 for sheet in sheets)
    assert all(torch.equal(a, b) for a, b in zip(states(whole.graph), states(resumed.graph), strict=True))
    assert np.array_equal(whole.scores, resumed.scores)


def test_two_trainings_of_one_bundle_lock_each_other_out_and_a_refused_one_leaves_nothing(tmp_path: Path) -> None:
    few = drawn(tmp_path / "few", 3)
    wanted = order(tmp_path, few)
    with Run(tmp_path / "bundle.training").alone():
        with pytest.raises(TrainingError, match="another training works there"):
            training.train(wanted)
        assert (tmp_path / "bundle.training").exists(), "it is the other one's"
    shutil.rmtree(tmp_path / "bundle.training")
    with pytest.raises(TrainingError, match="3 usable pictures"):
        training.train(wanted)
    assert not (tmp_path / "bundle.training").exists()


def test_minutes_bound_the_pictures_that_are_fitted_to_as_well(tmp_path: Path) -> None:
    surveyed = data.survey(drawn(tmp_path / "good", 80))
    spec = SMALL.input_spec(surveyed, None, 0)
    (tmp_path / "work").mkdir()
    fitted = SMALL.fit(surveyed, spec, None, Run(tmp_path / "work", minutes=0.001))
    assert any("fitted to 60 tiles" in note for note in fitted.notes)
    assert not np.isnan(fitted.scores).any(), "the promise rests on all"


def test_the_critic_loss_is_wgan_gps() -> None:
    """With a linear critic f(x) = w.x the penalty is known: 10 (|w| - 1)^2, and the loss is w.(fake - real)."""
    from edge_inspector.training.networks.fanogan import critic_loss

    class Linear(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x: Any) -> Any:
            return 3.0 * x.flatten(1)[:, :1] + 4.0 * x.flatten(1)[:, 1:2]

    real, fake = torch.zeros(5, 1, 4, 4), torch.ones(5, 1, 4, 4)
    loss, penalty = critic_loss(Linear(), real, fake)
    assert loss.item() == pytest.approx(7.0)
    assert penalty.item() == pytest.approx(10 * (5 - 1) ** 2, rel=1e-5)


def test_folds_are_runs_of_neighbours(tmp_path: Path) -> None:
    folds = data.survey(drawn(tmp_path, 100)).folds(4)
    assert np.bincount(folds).tolist() == [26, 26, 24, 24]
    assert np.flatnonzero(folds == 3)[:4].tolist() == [6, 7, 14, 15]


def test_bad_folders_are_told_in_words(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match="no such folder"):
        data.survey(tmp_path / "nowhere")
    with pytest.raises(PictureError, match="no pictures"):
        data.survey(tmp_path)
    three = drawn(tmp_path / "three", 3)
    with pytest.raises(TrainingError, match="3 usable pictures, at least 20 are needed"):
        data.survey(three)
    mixed = drawn(tmp_path / "mixed", 25)
    pictures.write(mixed / "deep.png", np.zeros((32, 32, 3), np.uint16))
    with pytest.raises(TrainingError, match="mixed bit depths"):
        data.survey(mixed)
    deep = tmp_path / "deep"
    deep.mkdir()
    for n in range(25):
        pictures.write(deep / f"{n}.png", np.full((32, 32), 1000 + n, np.uint16))
    with pytest.raises(TrainingError, match="16-bit pictures need --intensity-window"):
        training.train(order(tmp_path, deep))
    odd = drawn(tmp_path / "odd", 25)
    (odd / "broken.png").write_bytes(b"x")
    shutil.copy(odd / "000.png", odd / "copy.png")
    pictures.write(odd / "large.png", cv2.resize(draw_part(np.random.default_rng(0), 32, 32, False), (64, 48)))
    surveyed = data.survey(odd)
    assert len(surveyed.paths) == 26
    told = " ".join(str(remark) for remark in surveyed.remarks)
    assert "unreadable (not a picture: it starts as none of the kinds that are read): broken.png" in told
    assert "1 exact copies" in told
    assert "differ in size" in told


@pytest.mark.parametrize(
    ("more", "said"),
    [({"seed": -1}, "seed -1"), ({"intensity_window": (100, 100)}, "intensity window 100 100: must rise"),
     ({"device": "cpu:0"}, "device 'cpu:0'"), ({"device": "cuda:7"}, "0 CUDA devices" if not torch.cuda.is_available() else "7")],
)  # fmt: skip
def test_an_order_that_cannot_be_meant_is_refused_in_words(tmp_path: Path, more: dict[str, object], said: str) -> None:
    with pytest.raises(TrainingError, match=said):
        training.train(order(tmp_path, drawn(tmp_path / "good", 20), family=SMALL, **more))


@pytest.mark.parametrize("count", [72, 73])
def test_a_corrupt_picture_and_a_copy_are_left_out_and_shown(tmp_path: Path, count: int) -> None:
    folder = drawn(tmp_path / "good", count)
    (folder / "broken.png").write_bytes(b"x")
    shutil.copy(folder / "000.png", folder / "copy.png")
    trained = training.train(order(tmp_path, folder, family=SMALL))
    assert len(bundles.open_bundle(trained.folder, tmp_path / "trust").manifest.calibration.scores) == count
    page = (trained.folder / "report.html").read_text()
    assert "broken.png" in page
    assert "copy.png" in page
    assert not trained.folder.with_name("bundle.training").exists()


@pytest.mark.parametrize("tile", [None, 32])
def test_what_memory_does_not_hold_is_judged_for_the_promise_all_the_same(tmp_path: Path, tile: int | None) -> None:
    """One tile a picture, or four; half of all tiles are fitted to, or a quarter."""
    surveyed = data.survey(drawn(tmp_path / "good", 24, size=64))
    (tmp_path / "work").mkdir()
    few = 12 if tile is None else 24
    family = dataclasses.replace(SMALL, most_places=few * 8 * 8)
    fitted = family.fit(surveyed, family.input_spec(surveyed, tile, 0), None, Run(tmp_path / "work"))
    assert np.isfinite(fitted.scores).all()
    assert any(f"fitted to {few} tiles" in note for note in fitted.notes)
    (tmp_path / "other").mkdir()
    whole = SMALL.fit(surveyed, SMALL.input_spec(surveyed, tile, 0), None, Run(tmp_path / "other"))
    assert not any("fitted to" in note for note in whole.notes)


def test_a_score_is_the_same_from_memory_and_one_by_one(tmp_path: Path) -> None:
    surveyed = data.survey(drawn(tmp_path / "good", 20))
    spec = SMALL.input_spec(surveyed, None, 0)
    (tmp_path / "work").mkdir()
    material = gathered(surveyed.paths, surveyed.folds(SMALL.folds), spec, None, Run(tmp_path / "work"), SMALL.source)
    heads = SMALL.heads(material, Run(tmp_path / "work"), "x")
    crossed = feature_weights.cross_fit(material, heads)
    fold = int(material.fold[0])
    mean, spread = feature_weights.tensors(crossed.without[fold])
    tiles = data.load_tiles(surveyed.paths[:1], spec, None)
    taps = material.extractor.taps
    features = patches(material.extractor([tiles.images[0]]), taps.strides)
    counted = judged(torch.from_numpy(tiles.valid), taps.stride)
    alone = feature_weights.score_of(heads[fold], mean, 1 / spread, features, counted)
    assert alone == pytest.approx(crossed.scores((1.0, 1.0, 1.0), spoiled=False)[0], rel=5e-3)  # memory is at half precision


def test_a_threshold_that_rests_on_few_odd_parts_is_said_with_their_names() -> None:
    names = [Path(f"{n:03d}.png") for n in range(40)]
    even = [1 + n / 100 for n in range(40)]
    promise = scoring.promise(even, Wish(0.05))
    assert list(orders._rests_on(names, even, [1.2, 1.3], promise)) == []
    odd = [*even[:37], 4.0, 5.0, 6.0]
    (said,) = orders._rests_on(names, odd, [1.2, 1.5, 1.7, 9.0], scoring.promise(odd, Wish(0.05)))
    assert "few parts decide the threshold, 5" in said
    assert "without the oddest 2: 4, 25% of drawn defects found, 7.32 % of good parts rejected" in said
    assert "without the oddest 4: 1.35, 75% of drawn defects found, 12.2 % of good parts rejected" in said
    assert "039.png, 038.png, 037.png" in said


def test_good_parts_that_a_person_leaves_out_are_recorded_and_count_as_rejected(tmp_path: Path) -> None:
    good = drawn(tmp_path / "good", 30)
    trained = training.train(order(tmp_path, good, family=SMALL, leave_out=("003.png", "017.png")))
    manifest = bundles.open_bundle(trained.folder, tmp_path / "trust").manifest
    assert manifest.pictures.left_out == ("003.png", "017.png")
    assert (manifest.training.pictures, len(manifest.calibration.scores), manifest.calibration.n) == (28, 28, 30)
    assert trained.promise.expected == pytest.approx(3 / 31), "two that are left out, and the largest score"
    for names, said in ((("x.png",), "x.png: no such picture"), (("003.png", "003.png"), "003.png: named twice")):
        with pytest.raises(TrainingError, match=said):
            training.train(order(tmp_path, good, out=tmp_path / "other", family=SMALL, leave_out=names))


def test_a_fold_taken_away_leaves_the_gaussian_of_the_others(tmp_path: Path) -> None:
    surveyed = data.survey(drawn(tmp_path / "good", 24))
    spec = SMALL.input_spec(surveyed, None, 0)
    run = Run(tmp_path)
    material = gathered(surveyed.paths, surveyed.folds(SMALL.folds), spec, None, run, SMALL.source)
    mean, spread = moments(material, torch.arange(24))
    found = Residuals(material, 64, run).gaussian([5], mean, spread)
    others = torch.from_numpy(np.flatnonzero(material.fold != 5))
    f = scaled(material.good.raw(others), mean, spread)
    assert torch.allclose(found.mean[0], f.mean(0), atol=1e-4)
    some = torch.from_numpy(blocks(f.numpy()))[3]
    centre = torch.from_numpy(blocks(f.mean(0)[None].numpy()))[3]
    covariance = some.T @ some / len(some) - centre.T @ centre / len(centre)
    away = torch.randn(len(covariance), generator=torch.Generator().manual_seed(1))
    expected = away @ torch.linalg.inv(covariance.double() + 0.05 * torch.eye(len(away))).float() @ away
    assert ((away @ found.whitening[3].float()) ** 2).sum().item() == pytest.approx(expected.item(), rel=0.02)


def test_a_bright_12_bit_camera_gets_blots_within_its_scale_and_pictures_that_evaluate_reads(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "good", 24, size=48)
    for path in pictures.listed(folder).taken:
        pictures.write(path, (2600 + pictures.read(path)[:, :, 0].astype(np.uint16) * 5))
    trained = training.train(order(tmp_path, folder, family=SMALL, intensity_window=(0, 4095), wish=Wish(0.2)))
    assert not any("lamp" in remark.text for remark in trained.remarks)
    opened = bundles.open_bundle(trained.folder, tmp_path / "trust")
    assert pictures.read(trained.folder / "sample-fail-1.png").max() <= 4095
    generation.generate(opened, tmp_path / "drawn", 4, seed=1, sources=pictures.listed(folder).taken)
    shutil.copytree(folder, tmp_path / "drawn" / "test" / "good")
    with OnnxEngine(opened) as engine:
        found = training.evaluate(engine, tmp_path / "drawn")
        assert found.detection is not None
        assert found.detection.auroc > 0.5
        pictures.write(tmp_path / "drawn" / "test" / "good" / "eight.png", np.full((48, 48), 200, np.uint8))
        with pytest.raises(FormatError, match="8-bit frame, the bundle was trained on 16 bit"):
            training.evaluate(engine, tmp_path / "drawn")


def test_tiles_are_never_wider_than_the_pictures(tmp_path: Path) -> None:
    (tmp_path / "strips").mkdir()
    for n in range(20):
        pictures.write(tmp_path / "strips" / f"{n:02d}.png", draw_part(np.random.default_rng(n), 40, 120, False))
    trained = training.train(order(tmp_path, tmp_path / "strips", family=SMALL, tile=512, wish=Wish(0.2)))
    assert "tiles of 40 px instead of 512" in " ".join(str(remark) for remark in trained.remarks)
    manifest = bundles.open_bundle(trained.folder, tmp_path / "trust").manifest
    assert manifest.input.tile == 40
    with pytest.raises(FormatError, match="narrower than the bundle's tiles"):
        refuse_unlike(manifest, (0, 0, 120, 30))
    with pytest.raises(TrainingError, match="--tile 8"):
        thin = dataclasses.replace(data.survey(tmp_path / "strips"), height_px=8, width_px=4000)
        FeatureAnogan().input_spec(thin, None, 0)


def test_a_region_is_trained_on_evaluated_and_inspected_as_the_recipe_cuts_it(tmp_path: Path) -> None:
    """Two parts side by side in each picture; the bundle is for the right one. A scratch on the left one is not its matter."""
    rng = np.random.default_rng(0)
    for kind, left, right, count in (("train", False, False, 30), ("test/good", True, False, 8), ("test/bad", False, True, 8)):
        (tmp_path / kind).mkdir(parents=True)
        for n in range(count):
            parts = [draw_part(rng, 48, 48, defect) for defect in (left, right)]
            pictures.write(tmp_path / kind / f"{n:02d}.png", np.hstack(parts))
    region = Rectangle(x_px=48, y_px=0, w_px=48, h_px=48)
    trained = training.train(order(tmp_path, tmp_path / "train", family=SMALL, roi=Roi(rectangle=region)))
    opened = bundles.open_bundle(trained.folder, tmp_path / "trust")
    assert (opened.manifest.training.width_px, opened.manifest.training.height_px) == (48, 48)
    with OnnxEngine(opened) as engine:
        found = training.evaluate(engine, tmp_path, roi=Roi(rectangle=region))
        assert found.detection is not None
        assert found.detection.auroc > 0.9
        with pytest.raises(FormatError, match="trained on 48x48"):
            training.evaluate(engine, tmp_path)
    with pytest.raises(PictureError, match="reaches outside its 96x48 px"):
        outside = Rectangle(x_px=90, y_px=0, w_px=48, h_px=48)
        training.train(order(tmp_path, tmp_path / "train", family=SMALL, roi=Roi(rectangle=outside), out=tmp_path / "other"))


def test_what_a_network_must_not_know_is_not_cut_into_what_it_learns(tmp_path: Path) -> None:
    """Two folds, a dark and a bright one: each has a pool of its own to cut from."""
    spec = InputSpec(height=32, width=32, order="rgb")
    run = Run(tmp_path)
    gatherer = Gatherer(spec, np.arange(20) % 2, Extractor(SMALL.source, 32, 32, run), run)
    for row in range(20):
        image = np.full((32, 32, 3), 200 if row % 2 else 20, np.uint8)
        gatherer.add(row, [(row, image, Tile(0, 0, 32, 32, 0, 0, 32, 32))])
    assert {int(tile.max()) for _, tile in gatherer.pools[0]} == {20}
    assert {int(tile.max()) for _, tile in gatherer.pools[1]} == {200}


def test_the_tiles_trained_on_are_those_of_the_line(tmp_path: Path) -> None:
    folder = drawn(tmp_path, 4, size=64)
    tiles = data.load_tiles(sorted(folder.glob("*.png")), InputSpec(height=32, width=32, tile=32), None)
    assert tiles.images.shape == (16, 32, 32, 3)
    assert np.array_equal(tiles.images[1], pictures.read(folder / "000.png")[:32, 32:])
    assert tiles.picture.tolist() == [n for n in range(4) for _ in range(4)]
    second = tiles.of(np.array([False, True, False, False]))
    assert np.array_equal(second.images, tiles.images[4:8])


def test_a_full_disk_stops_training_with_a_word_and_it_resumes(tmp_path: Path, small_disk: Path) -> None:
    folder = drawn(tmp_path / "good", 40)
    fill = filled(small_disk)
    wanted = order(tmp_path, folder, out=small_disk / "bundle")
    with pytest.raises((TrainingError, PictureError)) as caught:
        training.train(wanted)
    assert caught.value.hint
    with pytest.raises(TrainingError) as caught:
        training.train(dataclasses.replace(wanted, out=small_disk / "other", family=SMALL))
    assert caught.value.hint
    fill.unlink()
    shutil.rmtree(small_disk / "other.training", ignore_errors=True)
    assert training.train(wanted).folder == small_disk / "bundle"


def test_what_more_pictures_may_bring_is_told_by_half_of_them() -> None:
    good = np.linspace(0, 1, 100)
    half = Half(good, np.array([0.5, 0.5, 0.5, 2.0]))
    found = scoring.found([0.5, 0.5, 2.0, 2.0], good.tolist(), Wish(0.05), scoring.promise)
    (said,) = orders._more_pictures(half, found, Wish(0.05), 100)
    assert said == (
        "half of these pictures would find 25% of drawn defects, all of them find 50%: 100 more may bring about 25 points"
    )
    (little,) = orders._more_pictures(Half(good, np.array([2.0, 2.0, 0.5, 0.5])), found, Wish(0.05), 100)
    assert little.endswith("more pictures of the same kind would bring little")
    assert list(orders._more_pictures(None, found, Wish(0.05), 100)) == []
