"""Training on real pictures: survey, split, resume, calibration, export, evaluation. Needs the train extra."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edge_inspector import bundles, pictures
from edge_inspector.bundles import InputSpec
from edge_inspector.cameras.synthetic import draw_part
from edge_inspector.errors import PictureError, TrainingError
from edge_inspector.results import Verdict
from edge_inspector.roi import Roi
from edge_inspector.runtime import OnnxEngine, judge_samples
from tests.line import filled

torch = pytest.importorskip("torch", reason='torch is not installed: pip install "edge-inspector[train]"')

from edge_inspector import training  # noqa: E402
from edge_inspector.training import data  # noqa: E402
from edge_inspector.training.fit import Fit, Progress, Settings  # noqa: E402
from edge_inspector.training.orders import Order  # noqa: E402

TINY = Settings(size=32, width=4, batch=8, critic_steps=1, gan_steps=6, encoder_steps=60, seed=3)


def drawn(folder: Path, count: int, *, defect: bool = False, size: int = 32) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        pictures.write(folder / f"{n:03d}.png", draw_part(np.random.default_rng((defect, n)), size, size, defect))
    return folder


def order(tmp_path: Path, folder: Path, **more: object) -> Order:
    key = tmp_path / "signing.key"
    if not key.exists():
        bundles.create_key(key, tmp_path / "trust")
    values: dict[str, object] = {
        "folder": folder, "out": tmp_path / "bundle", "product": "disc", "name": "disc",
        "key": bundles.read_private_key(key), "settings": TINY, "alpha": 0.1, "command": "edge-inspector train x",
    }  # fmt: skip
    return Order(**{**values, **more})  # type: ignore[arg-type]


def test_a_folder_of_good_parts_becomes_a_signed_bundle_that_keeps_its_word(tmp_path: Path) -> None:
    steps: list[Progress] = []
    trained = training.train(order(tmp_path, drawn(tmp_path / "good", 120)), steps.append)
    opened = bundles.open_bundle(trained.folder, tmp_path / "trust")
    manifest = opened.manifest
    assert {step.stage for step in steps} == {"GAN", "encoder"}
    assert trained.parity < 1e-4
    assert manifest.training.pictures == 120
    assert manifest.calibration.n == len(manifest.calibration.scores) == 30
    assert manifest.threshold in manifest.calibration.scores
    assert np.median(manifest.calibration.scores) == pytest.approx(1.0, rel=1e-3)
    assert {sample.verdict for sample in manifest.samples} == {Verdict.PASS, Verdict.FAIL}
    with OnnxEngine(opened, batch=2) as engine:
        judge_samples(engine)
        drawn(tmp_path / "test" / "good", 10)
        drawn(tmp_path / "test" / "scratch", 10, defect=True)
        found = training.evaluate(engine, tmp_path)
    assert found.auroc is not None
    assert found.escape.n == found.false_reject.n == 10
    assert set(found.escape_by_kind) == {"scratch"}
    json.dumps(found.to_json())
    page = (trained.folder / "report.html").read_text()
    assert "edge-inspector train x" in page
    assert "at most 0.1 of good parts rejected" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    with pytest.raises(TrainingError, match="exists already"):
        training.train(order(tmp_path, tmp_path / "good"))


class _Stopped(Exception):
    pass


def _stop_at(stage: str, step: int) -> Callable[[Progress], None]:
    def look(progress: Progress) -> None:
        if (progress.stage, progress.step) == (stage, step):
            raise _Stopped

    return look


def test_an_interrupted_run_resumes_to_the_same_network(tmp_path: Path) -> None:
    tiles = np.stack([draw_part(np.random.default_rng(n), 32, 32, False) for n in range(24)])
    settings = Settings(size=32, width=4, batch=4, critic_steps=1, gan_steps=4, encoder_steps=4, seed=5)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = Fit(tiles, settings, tmp_path / "a").run(lambda _: None, save_every=1)
    for stage, step in (("GAN", 2), ("encoder", 3)):
        with pytest.raises(_Stopped):
            Fit(tiles, settings, tmp_path / "b").run(_stop_at(stage, step), save_every=1)
    resumed = Fit(tiles, settings, tmp_path / "b").run(lambda _: None, save_every=1)
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    longer = Fit(tiles, dataclasses.replace(settings, encoder_steps=6), tmp_path / "b")
    longer.run(lambda _: None)
    assert longer.encoder_step == 6
    with pytest.raises(TrainingError, match="other settings or pictures"):
        Fit(tiles[:20], settings, tmp_path / "b").run(lambda _: None)
    (tmp_path / "b" / "checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(TrainingError, match="damaged checkpoint"):
        Fit(tiles, settings, tmp_path / "b").run(lambda _: None)


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


def test_held_out_parts_come_in_runs_and_are_never_fitted(tmp_path: Path) -> None:
    surveyed = data.survey(drawn(tmp_path, 100))
    assert not set(surveyed.fit) & set(surveyed.held_out)
    assert len(surveyed.held_out) == 25
    numbers = [int(path.stem) for path in surveyed.held_out]
    assert numbers[:5] == [15, 16, 17, 18, 19]


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
    told = " ".join(data.survey(odd).warnings)
    assert "left out 1 unreadable" in told
    assert "1 exact copies" in told
    assert "differ in size" in told


def test_the_tiles_trained_on_are_those_of_the_line(tmp_path: Path) -> None:
    folder = drawn(tmp_path, 4, size=64)
    spec = InputSpec(height=32, width=32, tile=32)
    tiles = data.load_tiles(sorted(folder.glob("*.png")), spec, Roi(), None)
    assert tiles.shape == (16, 32, 32, 3)
    assert np.array_equal(tiles[1], pictures.read(folder / "000.png")[:32, 32:])


def test_a_full_disk_stops_training_with_a_word_and_it_resumes(tmp_path: Path, small_disk: Path) -> None:
    folder = drawn(tmp_path / "good", 40)
    fill = filled(small_disk)
    wanted = order(tmp_path, folder, out=small_disk / "bundle")
    with pytest.raises((TrainingError, PictureError)) as caught:
        training.train(wanted)
    assert caught.value.hint
    fill.unlink()
    assert training.train(wanted).folder == small_disk / "bundle"
