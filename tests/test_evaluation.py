"""The figures of an evaluation, against values worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_inspector import pictures
from edge_inspector.bundles import open_bundle
from edge_inspector.runtime import OnnxEngine
from edge_inspector.training import evaluate
from edge_inspector.training.evaluation import Trivial, aupro, detection, labelled, mask_of
from tests.line import ENGINES


def test_detection_figures_are_those_of_their_definitions() -> None:
    """Good 1 2 3 4, bad 2 5 6: ranks and thresholds small enough to count."""
    found = detection([1.0, 2.0, 3.0, 4.0], [2.0, 5.0, 6.0])
    assert found.auroc == pytest.approx((4 + 4 + 1.5) / 12)
    # Thresholds 6, 5, 4, 3, 2: precision 1, 1, 2/3, 1/2, 3/6; recall rises at 6, 5 and 2.
    assert found.average_precision == pytest.approx((1 + 1 + 0.5) / 3)
    assert found.max_f1 == pytest.approx(2 * 2 / (2 + 3))
    assert found.fpr_at_recall == {95: 0.75, 99: 0.75, 100: 0.75}


def test_aupro_is_one_for_a_perfect_map_and_small_for_a_blind_one() -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[10:20, 10:20] = 1
    perfect = mask.astype(np.float32) + 0.001 * np.random.default_rng(0).random((64, 64), dtype=np.float32)
    blind = np.random.default_rng(1).random((64, 64), dtype=np.float32)
    assert aupro([perfect], [mask]) == pytest.approx(1.0, abs=0.01)
    assert aupro([blind], [mask]) == pytest.approx(0.15, abs=0.05)  # the diagonal up to 30 %


def test_aupro_counts_regions_alike_whatever_their_size() -> None:
    """A large region found and a small one missed: half, not the large one's share of pixels."""
    mask = np.zeros((64, 64), np.uint8)
    mask[5:45, 5:45] = 1
    mask[60:62, 60:62] = 1
    found = np.zeros((64, 64), np.float32)
    found[5:45, 5:45] = 1
    found[mask == 0] = np.linspace(0.1, 0.2, int((mask == 0).sum()))
    assert aupro([found], [mask]) == pytest.approx(0.5, abs=0.01)


def test_masks_and_training_pictures_are_no_kind_of_defect(tmp_path: Path) -> None:
    for name in ("good", "scratch", "ground_truth", "train"):
        (tmp_path / name).mkdir()
        pictures.write(tmp_path / name / "0.png", np.zeros((8, 8), np.uint8))
    assert set(labelled(tmp_path).kinds) == {"good", "scratch"}


def test_a_set_that_brightness_solves_shows_as_one() -> None:
    trivial = Trivial()
    rng = np.random.default_rng(0)
    for n in range(20):
        bright = 120 if n % 2 else 60
        kind = "bad" if n % 2 else "good"
        trivial.add(kind, rng.integers(bright - 5, bright + 5, (40, 40), dtype=np.uint8))
    assert trivial.auroc()["brightness"] == 1.0
    assert 0.2 < trivial.auroc()["contrast"] < 0.8


def test_the_shipped_bundle_is_evaluated_with_masks_by_kind(tmp_path: Path) -> None:
    """A good sample and the same part with its blot; the mask is where they differ."""
    bundle = open_bundle(ENGINES / "paper", ENGINES / "trust")
    good, fail = (pictures.read(bundle.folder / f"sample-{name}-1.png") for name in ("good", "fail"))
    for name in ("test/good", "test/blot", "ground_truth/blot"):
        (tmp_path / name).mkdir(parents=True)
    pictures.write(tmp_path / "test" / "good" / "a.png", good)
    pictures.write(tmp_path / "test" / "blot" / "b.png", fail)
    mask = (np.abs(good.astype(int) - fail).max(2) > 0).astype(np.uint8) * 255
    pictures.write(tmp_path / "ground_truth" / "blot" / "b_mask.png", mask)
    assert mask_of(tmp_path, "blot", tmp_path / "test" / "blot" / "b.png") is not None
    assert mask_of(tmp_path, "scratch", tmp_path / "b.png") is None
    with OnnxEngine(bundle) as engine:
        found = evaluate(engine, tmp_path)
    assert found.detection is not None
    assert found.detection.auroc == 1.0
    assert found.pixel_auroc is not None
    assert found.pixel_auroc > 0.9
    assert found.aupro is not None
    assert found.auroc_by_kind == {"blot": 1.0}
    assert {kind: rate.k for kind, rate in found.escape_by_kind.items()} == {"blot": 0}
    assert found.to_json()["pixel"]["aupro"] == found.aupro
