"""Teaching: shown defects are found afterwards, shown good parts pass, the promise is kept, and nothing is made worse."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_inspector import bundles, pictures, signatures
from edge_inspector.bundles import Bundle
from edge_inspector.cameras.synthetic import draw_part
from edge_inspector.errors import InspectorError, TrainingError
from edge_inspector.results import Verdict
from edge_inspector.roi import Rectangle, Roi
from edge_inspector.runtime import OnnxEngine, judge_samples
from edge_inspector.runtime.engine import picture_score

torch = pytest.importorskip("torch", reason='torch is not installed: pip install "edge-inspector[train]"')

import onnx  # noqa: E402

from edge_inspector.training import orders  # noqa: E402
from edge_inspector.training.networks.feature_fit import FeatureAnogan  # noqa: E402
from edge_inspector.training.teaching import defects, lesson, material  # noqa: E402
from edge_inspector.training.teaching.lesson import Order, teach  # noqa: E402
from edge_inspector.training.teaching.network import Network  # noqa: E402

SIDE = 64
SMALL = FeatureAnogan(side=SIDE, prototypes=64, steps=30)


def part(number: int, lamp: int = 0) -> NDArray[np.uint8]:
    picture = draw_part(np.random.default_rng((0, number)), SIDE, SIDE, defect=False)
    return np.asarray(np.clip(picture.astype(int) + lamp, 0, 255), np.uint8)


def dulled(number: int, depth: int = 28) -> NDArray[np.uint8]:
    """A part with a soft, checked dark spot, of a kind that nobody draws."""
    rng = np.random.default_rng((7, number))
    picture = part(5000 + number).astype(np.float64)
    y, x = rng.integers(22, 42, 2)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    spot = ((rows + columns) % 2 == 0) * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 20)
    return np.asarray(np.clip(picture - depth * spot[:, :, None], 0, 255), np.uint8)


def blotted(number: int) -> NDArray[np.uint8]:
    """A part with a defect that nobody misses."""
    picture = part(6000 + number)
    picture[22:42, 22:42] = (0, 0, 255)
    return picture


def folder(place: Path, images: list[NDArray[np.uint8]]) -> Path:
    place.mkdir(parents=True)
    for number, image in enumerate(images):
        pictures.write(place / f"{number:03d}.png", image)
    return place


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained bundle, its keys, and what it can be taught from.

    Its network is small, and how much such a one misses depends on the seed: this one leaves something to learn.
    """
    place = tmp_path_factory.mktemp("school")
    good = folder(place / "good", [part(number) for number in range(80)])
    signatures.create_key(place / "keys" / "signing.key", place / "trust")
    key = signatures.read_private_key(place / "keys" / "signing.key")
    orders.train(orders.Order(folder=good, out=place / "disc", product="disc", name="disc", key=key, family=SMALL, seed=2))
    return place


def ask(school: Path, out: Path, **more: Any) -> Order:
    key = signatures.read_private_key(school / "keys" / "signing.key")
    return Order(**{"bundle": school / "disc", "trust": school / "trust", "out": out, "key": key, **more})


def opened(school: Path, place: Path) -> Bundle:
    return bundles.open_bundle(place, school / "trust")


def failed(bundle: Bundle, images: list[NDArray[np.uint8]]) -> float:
    with OnnxEngine(bundle) as engine:
        scores = np.array([picture_score(engine, image) for image in images])
    return float((scores > bundle.manifest.threshold).mean())


def test_a_handful_of_shown_defects_is_found_afterwards_and_good_parts_still_pass(school: Path, tmp_path: Path) -> None:
    steps: list[str] = []
    shown = folder(tmp_path / "shown" / "dull", [dulled(number) for number in range(8)]).parent
    learned = teach(ask(school, tmp_path / "disc-2", defects=shown, command="teach x"), lambda name, _, __: steps.append(name))
    before, after = opened(school, school / "disc"), opened(school, learned.folder)
    fresh, good = [dulled(number) for number in range(100, 140)], [part(number) for number in range(1000, 1060)]
    assert failed(after, fresh) > failed(before, fresh) + 0.1
    assert failed(after, good) <= after.manifest.rates.at_most  # type: ignore[union-attr]
    assert {"looking at shown", "defects"} <= set(steps)
    (found, drawn) = learned.changes
    assert found.name == "shown defects, dull, found"
    assert found.after.above > found.before.above
    assert drawn.after.above >= 0.99 * drawn.before.above
    manifest = after.manifest
    assert (manifest.release, manifest.name) == (2, "disc")
    assert manifest.taught is not None
    assert (manifest.taught.parent, manifest.taught.defects) == (before.sha256, 8)
    assert manifest.calibration.n == 80
    assert any(sample.file.startswith("sample-taught") and sample.verdict is Verdict.FAIL for sample in manifest.samples)
    with OnnxEngine(after) as engine:
        judge_samples(engine)
    page = (after.folder / "report.html").read_text()
    assert "what it was taught" in page
    assert "shown defects, dull, found" in page
    assert page.count("<figure>") == 8
    assert "Detection limit" in (after.folder / "report-trained.html").read_text()


def test_what_was_taught_can_be_taught_further_and_stays_one_term(school: Path, tmp_path: Path) -> None:
    first = folder(tmp_path / "first", [dulled(number) for number in range(8)])
    second = folder(tmp_path / "second", [dulled(number) for number in range(20, 24)])
    teach(ask(school, tmp_path / "two", defects=first))
    again = teach(ask(school, tmp_path / "three", bundle=tmp_path / "two", defects=second))
    bundle = opened(school, again.folder)
    assert bundle.manifest.release == 3
    assert len(material.opened(again.folder, bundle.manifest.material).about.taught) == 12
    graph = onnx.load_from_string(bundle.read(bundles.NETWORK)).graph
    assert [node.name for node in graph.node].count("lesson/fused") == 1
    with pytest.raises(TrainingError, match="taught before: 000"):
        teach(ask(school, tmp_path / "four", bundle=tmp_path / "three", defects=first))


def test_a_lesson_never_drops_an_earlier_one_in_silence(school: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teach(ask(school, tmp_path / "two", defects=folder(tmp_path / "d", [dulled(number) for number in range(8)])))
    more = folder(tmp_path / "g", [part(number) for number in range(2800, 2804)])
    kept = teach(ask(school, tmp_path / "three", bundle=tmp_path / "two", good=more))
    assert kept.weight > 0
    monkeypatch.setattr(defects, "WEIGHTS", ())
    with pytest.raises(TrainingError, match="was taught before would be lost"):
        teach(ask(school, tmp_path / "four", bundle=tmp_path / "two", good=more))


def test_good_parts_under_another_lamp_pass_afterwards(school: Path, tmp_path: Path) -> None:
    lamp = 30
    shown = folder(tmp_path / "lamp", [part(number, lamp) for number in range(2000, 2030)])
    learned = teach(ask(school, tmp_path / "out", good=shown, accept_loss=True))
    before, after = opened(school, school / "disc"), opened(school, learned.folder)
    fresh, old = ([part(number, light) for number in range(3000, 3040)] for light in (lamp, 0))
    assert failed(before, fresh) > 0.5, "else this test shows nothing"
    assert failed(after, fresh) < 0.3
    assert failed(after, old) < 0.2
    assert failed(after, [draw_part(np.random.default_rng((1, n)), SIDE, SIDE, defect=True) for n in range(20)]) > 0.8
    rejected = learned.changes[-1]
    assert rejected.name == "shown good parts, rejected"
    assert rejected.after.above < rejected.before.above
    assert after.manifest.calibration.n == 110
    assert learned.weight == 0


def test_good_parts_like_the_others_do_not_raise_the_threshold_for_one_odd_one(school: Path, tmp_path: Path) -> None:
    like_the_others = [part(number) for number in range(2000, 2024)]
    odd = draw_part(np.random.default_rng((1, 3)), SIDE, SIDE, defect=True)
    plain = teach(ask(school, tmp_path / "plain", good=folder(tmp_path / "g", like_the_others), accept_loss=True))
    learned = teach(ask(school, tmp_path / "out", good=folder(tmp_path / "h", [*like_the_others, odd]), accept_loss=True))
    before, after = plain.promise.threshold, learned.promise.threshold
    assert after < 1.2 * before, "the largest score of 25 would lie far above"
    assert max(opened(school, learned.folder).manifest.calibration.scores) > 2 * after
    assert "the shown good parts score no higher than the others: the rates of all hold for them, too" in learned.notes


def test_a_network_with_its_own_residuals_computes_what_it_did(school: Path) -> None:
    network = Network.of(opened(school, school / "disc").read(bundles.NETWORK), "disc")
    same, other = network.with_residuals(network.residuals), network.residuals
    assert other.bank is not None
    moved = network.with_residuals(replace(other, bank={**other.bank, "shift": other.bank["shift"] + 1}))
    image = np.stack([part(1)[:, :, ::-1], part(2)[:, :, ::-1]])
    maps = [one.between(["image"], ["maps"])(image)[0] for one in (network, same, moved)]
    np.testing.assert_allclose(maps[1], maps[0], rtol=1e-3, atol=1e-3)
    assert np.abs(maps[2] - maps[0]).max() > 0.1


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_pictures_are_learned_from_or_refused_with_a_reason(school: Path, tmp_path: Path, count: int) -> None:
    shown = folder(tmp_path / "few", [dulled(number, 30) for number in range(200, 200 + count)])
    try:
        learned = teach(ask(school, tmp_path / "out", defects=shown))
    except TrainingError as error:
        assert "nothing was learned of these defects: " in error.message
        assert error.hint
        assert not (tmp_path / "out").exists()
    else:
        bundle = opened(school, learned.folder)
        assert failed(bundle, [part(number) for number in range(1000, 1060)]) <= bundle.manifest.rates.at_most  # type: ignore[union-attr]


def bare(place: Path) -> Path:
    place.mkdir(parents=True)
    return place


def grey(number: int) -> NDArray[np.uint8]:
    return np.asarray(dulled(number).mean(2), np.uint8)


REFUSED = {
    "nothing is shown": (dict, "nothing is shown"),
    "masks alone": (lambda t: {"masks": bare(t / "m"), "good": bare(t / "g")}, "--masks without --defects"),
    "an empty folder": (lambda t: {"defects": bare(t / "d")}, "no pictures in it"),
    "no folder": (lambda t: {"defects": t / "nowhere"}, "nowhere"),
    "one picture as both": (
        lambda t: {"defects": folder(t / "d", [dulled(1)]), "good": folder(t / "g", [part(2500), dulled(1)])},
        "000 in --defects and 001 in --good are the same picture",
    ),
    "a part that was trained on": (
        lambda t: {"defects": folder(t / "d", [dulled(1), part(17)])},
        "001 in --defects was trained on as a good part: 017",
    ),
    "known good parts": (lambda t: {"good": folder(t / "g", [part(3)])}, "000 in --good is known already: 003"),
    "good parts as defects": (
        lambda t: {"defects": folder(t / "d", [part(number) for number in range(2600, 2604)])},
        "nothing was learned of these defects",
    ),
    "another size": (
        lambda t: {"defects": folder(t / "d", [np.full((200, 64, 3), 90, np.uint8)])},
        "d/000.png: region of 64x200, the bundle was trained on 64x64",
    ),
    "another colour": (lambda t: {"defects": folder(t / "d", [grey(1)])}, "grey frame, the bundle was trained on colour"),
    "found already": (
        lambda t: {"defects": folder(t / "d", [blotted(number) for number in range(3)])},
        "all 3 are found already",
    ),
    "no mask": (
        lambda t: {"defects": folder(t / "d", [dulled(1)]), "masks": bare(t / "m")},
        "no mask for 000.png",
    ),
    "a mask of another size": (
        lambda t: {
            "defects": folder(t / "d", [dulled(1)]),
            "masks": folder(t / "m", [np.full((9, 9), 255, np.uint8)]),
        },
        "its mask has 9x9 px, the picture 64x64",
    ),
    "an empty mask": (
        lambda t: {"defects": folder(t / "d", [dulled(1)]), "masks": folder(t / "m", [np.zeros((64, 64), np.uint8)])},
        "its mask marks nothing",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_taught_is_refused_in_words_and_leaves_nothing(school: Path, tmp_path: Path, name: str) -> None:
    make, said = REFUSED[name]
    with pytest.raises(InspectorError) as refused:
        teach(ask(school, tmp_path / "out", **(make(tmp_path) if make is not dict else {})))
    assert said in refused.value.message
    assert refused.value.hint
    assert not list(tmp_path.glob("out*"))


def test_a_bundle_is_taught_only_from_what_was_left_beside_it(school: Path, tmp_path: Path) -> None:
    shown = folder(tmp_path / "d", [dulled(1)])
    shutil.copytree(school / "disc", tmp_path / "moved")
    with pytest.raises(TrainingError, match=r"moved\.teach: missing"):
        teach(ask(school, tmp_path / "out", bundle=tmp_path / "moved", defects=shown))
    shutil.copytree(school / "disc.teach", tmp_path / "moved.teach")
    folds = np.load(tmp_path / "moved.teach" / "good-fold.npy")
    np.save(tmp_path / "moved.teach" / "good-fold.npy", folds * 0)
    with pytest.raises(TrainingError, match="is not what was left beside this bundle"):
        teach(ask(school, tmp_path / "out", bundle=tmp_path / "moved", defects=shown))


def test_a_mask_says_which_places_are_the_defect(school: Path, tmp_path: Path) -> None:
    images, masks = [dulled(number) for number in range(8)], []
    for number in range(8):
        rng = np.random.default_rng((7, number))
        y, x = rng.integers(22, 42, 2)
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[y - 3 : y + 4, x - 3 : x + 4] = 255
        masks.append(mask)
    learned = teach(ask(school, tmp_path / "out", defects=folder(tmp_path / "d", images), masks=folder(tmp_path / "m", masks)))
    assert learned.changes[0].after.above > learned.changes[0].before.above


def test_what_is_kept_is_bounded_and_spread_over_all_pictures(school: Path) -> None:
    held = material.opened(school / "disc", opened(school, school / "disc").manifest.material)
    few, numbers = held.good.thinned(sum(tap.nbytes for tap in held.good.taps) // 4)
    assert few.pictures == len(numbers) == 20
    assert (numbers[0], numbers[-1]) == (0, 79)
    assert few.picture.tolist() == list(range(20))


def test_the_command_teaches_without_pytorch(school: Path, tmp_path: Path) -> None:
    shown = folder(tmp_path / "d", [dulled(number) for number in range(8)])
    code = "import sys; sys.modules['torch'] = None\nfrom edge_inspector.cli import main; main()"
    out = tmp_path / "taught"
    command = [sys.executable, "-c", code, "teach", str(school / "disc"), "--defects", str(shown), "--out", str(out), "--json"]
    done = subprocess.run(command, cwd=school, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["release"] == 2
    assert told["bundle"] == str(out)
    assert told["changes"][0]["after"]["of"] == 8
    assert (tmp_path / "taught.teach" / "about.json").exists()


def test_tiles_of_a_region_with_an_int8_backbone_are_taught_from_whole_frames(tmp_path: Path) -> None:
    def framed(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return np.pad(image, ((10, 6), (20, 4), (0, 0)))

    good = folder(tmp_path / "good", [framed(part(number)) for number in range(40)])
    signatures.create_key(tmp_path / "keys" / "signing.key", tmp_path / "trust")
    key = signatures.read_private_key(tmp_path / "keys" / "signing.key")
    roi = Roi(rectangle=Rectangle(x_px=20, y_px=10, w_px=SIDE, h_px=SIDE))
    family = replace(SMALL, steps=20, int8=True)
    trained = orders.train(
        orders.Order(folder=good, out=tmp_path / "disc", product="disc", name="disc", key=key, family=family, roi=roi, tile=48)
    )
    shown = folder(tmp_path / "d", [framed(dulled(number, 40)) for number in range(6)])
    more = folder(tmp_path / "g", [framed(part(number)) for number in range(2000, 2006)])
    learned = teach(ask(tmp_path, tmp_path / "out", defects=shown, good=more, accept_loss=True))
    bundle = opened(tmp_path, learned.folder)
    assert bundle.manifest.pictures.region == opened(tmp_path, trained.folder).manifest.pictures.region == roi
    assert learned.promise.n == 46
    assert "6 good parts say no rate of their own: 13 more" in learned.notes[0]
    with OnnxEngine(bundle) as engine:
        judge_samples(engine)
    for image in [pictures.read(path) for path in sorted(learned.folder.glob("sample-*.png"))]:
        assert image.shape == (SIDE, SIDE, 3), "samples are what is judged"
    with pytest.raises(TrainingError, match="000 in --good is known already: 000"):
        teach(ask(tmp_path, tmp_path / "again", good=folder(tmp_path / "k", [framed(part(0))])))


def test_a_lesson_that_would_lose_drawn_defects_asks_first(
    school: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lesson, "_LOSS", -1.0)
    shown = folder(tmp_path / "g", [part(number) for number in range(2700, 2710)])
    with pytest.raises(TrainingError, match=r"of drawn defects are found now.*the oddest are 00\d, 00\d, 00\d") as refused:
        teach(ask(school, tmp_path / "out", good=shown))
    assert "--accept-loss" in (refused.value.hint or "")
    assert teach(ask(school, tmp_path / "out", good=shown, accept_loss=True)).release == 2
