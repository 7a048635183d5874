"""`inspect`, `evaluate` and `train` look at every picture, say what they did not look at, and overwrite nothing."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edge_inspector import pictures
from edge_inspector.cli.regions import given
from edge_inspector.errors import InspectorError, PictureError
from edge_inspector.roi import Rectangle, Roi
from edge_inspector.training.evaluation import labelled, mask_of
from tests.line import DaemonProcess, Mosquitto, device_folder, line_yaml, listening, until
from tests.test_cli import PAPER, RECORDING, TRUST, run

BAD, GOOD = ("003", "006", "009", "012"), ("001", "002", "004", "005")
LATIN = os.fsdecode(b"Gr\xfcn.png")


def recorded(number: str) -> Path:
    return RECORDING / f"paper-{number}.png"


def copied(folder: Path, names: dict[str, str]) -> Path:
    """Pictures of the recording, by the names they get."""
    for name, number in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(recorded(number), folder / name)
    return folder


def test_inspect_judges_every_picture_and_saves_each_under_a_name_of_its_own(tmp_path: Path) -> None:
    names = {"dent/000.png": "003", "scratch/000.png": "006", "scratch-000.png": "009", "good/000.png": "001", "1.png": "002"}
    folder = copied(tmp_path / "mv", names)
    bad = pictures.read(recorded("012"))
    (folder / "1.ppm").write_bytes(pictures.encoded(bad, ".ppm"))
    (folder / LATIN).write_bytes(recorded("004").read_bytes())
    copied(tmp_path / "elsewhere", {"x.png": "005"})
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    copied(folder / ".Trash-1000", {"a.png": "003"})
    (folder / "notes.txt").write_text("nothing")
    done = run("inspect", PAPER, str(folder), "--trust", TRUST, "--json", "--save", str(tmp_path / "saved"))
    verdicts = {result["part_id"]: result["verdict"] for result in json.loads(done.stdout)}
    assert verdicts == {
        "1.png": "pass", "1.ppm": "fail", r"Gr\xfcn": "pass", "dent/000": "fail", "good/000": "pass", "linked/x": "pass",
        "scratch-000": "fail", "scratch/000": "fail",
    }  # fmt: skip
    assert done.returncode == 1  # what is hidden, and text, do not matter
    assert ".Trash-1000" in done.stderr
    assert "notes.txt" in done.stderr
    assert len(list((tmp_path / "saved").glob("*.png"))) == len(verdicts)  # a part that passes is shown as well
    (folder / "gone.png").symlink_to("/mnt/not-mounted/003.png")
    (folder / "photo.gif").write_bytes(b"GIF89a" + bytes(30))
    done = run("inspect", PAPER, str(folder), "--trust", TRUST)
    assert done.returncode == 2
    assert "link to nothing" in done.stderr
    assert "GIF files are not read" in done.stderr


@pytest.mark.parametrize("name", ["good", "OK", "Good", "normal"])
def test_good_parts_are_found_by_what_people_call_them(tmp_path: Path, name: str) -> None:
    folder = copied(tmp_path, {f"{name}/1.png": "001", "NG/2.png": "003"})
    assert {kind: len(paths) for kind, paths in labelled(folder).kinds.items()} == {"good": 1, "NG": 1}


def test_folders_that_do_not_say_which_parts_are_good_are_refused_and_none_at_all_is_told(tmp_path: Path) -> None:
    with pytest.raises(InspectorError, match="no folder of good parts; found Teile, NG"):
        labelled(copied(tmp_path / "a", {"Teile/1.png": "001", "NG/2.png": "003"}))
    with pytest.raises(InspectorError, match="both folders of good parts"):
        labelled(copied(tmp_path / "b", {"ok/1.png": "001", "good/2.png": "002"}))
    only = labelled(copied(tmp_path / "c", {"dent/1.png": "003", "scratch/1.png": "006", "top.png": "001"}))
    assert list(only.kinds) == ["dent", "scratch"]
    assert any("no good parts" in note for note in only.notes)
    assert [one.path.name for one in only.doubtful] == ["top.png"]


def test_evaluate_goes_on_after_a_broken_picture_and_shows_what_is_judged_wrongly(tmp_path: Path) -> None:
    folder = copied(tmp_path / "ev", {f"OK/{n}.png": n for n in GOOD} | {f"impurity/{n}.png": n for n in BAD})
    copied(folder, {"impurity/good-one.png": "007", "OK/bad-one.png": "015"})
    done = run("evaluate", PAPER, str(folder), "--trust", TRUST, "--json", "--save", str(tmp_path / "wrong"))
    assert done.returncode == 0
    assert json.loads(done.stdout)["false_reject"]["k"] == 1
    names = sorted(path.name for path in (tmp_path / "wrong").iterdir())
    assert names == ["OK-bad-one.png", "impurity-good-one.png"]
    (folder / "OK" / "broken.png").write_bytes(recorded("001").read_bytes()[:5000])
    done = run("evaluate", PAPER, str(folder), "--trust", TRUST, "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["false_reject"]["n"] == 5
    assert "broken.png" in done.stderr


def test_masks_say_the_same_whatever_kind_of_file_they_are(tmp_path: Path) -> None:
    mask = np.zeros((128, 128), np.uint8)
    cv2.circle(mask, (50, 65), 17, 255, -1)
    truth = tmp_path / "ground_truth" / "impurity"
    truth.mkdir(parents=True)
    found = []
    for suffix in (".png", ".jpg", ".bmp", ".tif", ".webp"):
        (truth / f"003_mask{suffix}").write_bytes(pictures.encoded(mask, suffix))
        found.append(mask_of(tmp_path, "impurity", tmp_path / "003.png"))
        (truth / f"003_mask{suffix}").unlink()
    assert all(one is not None and np.array_equal(one, mask > 0) for one in found)
    classes = (mask > 0).astype(np.uint8) * 2
    classes[0, 0] = 1
    pictures.write(truth / "003.png", classes)
    numbered = mask_of(tmp_path, "impurity", tmp_path / "003.png")
    assert numbered is not None
    assert np.array_equal(numbered, classes > 0)
    (truth / "003.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(PictureError, match="003.png"):
        mask_of(tmp_path, "impurity", tmp_path / "003.png")


def test_a_folder_camera_gives_every_part_a_name_of_its_own_and_a_strange_name_stops_nothing(
    tmp_path: Path, mosquitto: Mosquitto
) -> None:
    shown = copied(tmp_path / "mv", {"dent/000.png": "003", "good/000.png": "001", "good/001.png": "002", LATIN: "004"})
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml(f"dir://{shown}", trigger="free", expires_ms=60000))
    with listening(mosquitto.port) as listener, DaemonProcess(folder) as daemon:
        until(lambda: len(listener.of("result", "sheet")) == 4, 30, "results")
        assert daemon.process is not None
        assert daemon.process.poll() is None
    verdicts = {result["part_id"]: result["verdict"] for result in listener.of("result", "sheet")}
    assert verdicts == {"dent/000": "fail", "good/000": "pass", "good/001": "pass", r"Gr\xfcn": "pass"}


# --- training


def _good(folder: Path) -> Path:
    with (RECORDING / "truth.csv").open() as file:
        parts = [row["part"] for row in csv.DictReader(file) if row["kind"] == "good"]
    folder.mkdir(parents=True)
    for part in parts:
        shutil.copy(RECORDING / f"{part}.png", folder)
    return folder


def test_training_leaves_out_what_is_deleted_or_broken_and_says_so(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason='torch is not installed: pip install "edge-inspector[train]"')
    from edge_inspector.training import data

    folder = copied(_good(tmp_path / "stick"), {".Trash-1000/files/1.png": "003", LATIN: "004"})
    (folder / "half.jpg").write_bytes((Path(__file__).parent / "cases/03-damaged-jpeg-judged/jtrunc_eoi.jpg").read_bytes())
    (folder / "gone.png").symlink_to("/mnt/not-mounted/003.png")
    count = len(list(folder.glob("paper-*.png")))
    surveyed = data.survey(folder)
    assert len(surveyed.paths) == count  # the copy under another name is one
    said = {str(remark): remark.level for remark in surveyed.remarks}
    assert any(".Trash-1000" in text and level == "note" for text, level in said.items())
    for words in ("half.jpg", "gone.png", "exact copies"):
        assert any(words in text and level == "warning" for text, level in said.items()), words
    json.dumps([remark.to_json() for remark in surveyed.remarks]).encode()
    assert surveyed.sizes == ((128, 128), (128, 128))


LINE = """\
schema: ei.line.v1
stations: {s: {product: p, products: {p: my-recipe}, cameras: {top: {uri: "synthetic://"}}}}
recipes: {my-recipe: {cameras: {top: {rois: {lid: {bundle: lid, polygon: [[10, 10], [105, 12], [60, 100]]}}}}}}
"""


def test_a_region_is_named_by_its_recipe_or_given_in_pixels(tmp_path: Path) -> None:
    line = tmp_path / "line.yaml"
    line.write_text(LINE)
    corners = ((10, 10), (105, 12), (60, 100))
    assert given(None, None, f"{line}:my-recipe/top/lid").roi == Roi(polygon=corners)
    assert given(None, "10,10 105,12 60, 100", None).roi == Roi(polygon=corners)
    assert given(None, None, None).roi == Roi()
    for rectangle, polygon, recipe, words in (
        (None, None, f"{line}:my-recipe/top/rim", "no region my-recipe/top/rim"), (None, None, "top", "FILE:RECIPE/CAMERA/ROI"),
        (None, "1,2 3,4", None, "polygon"), (None, "a,b", None, "corners as X,Y"), ((0, 0, 4, 4), None, None, "w_px"),
        (None, "1,2 30,4 9,20", f"{line}:my-recipe/top/lid", "expected one of both"), ((0, 0, 9, 9), "1,2 30,4 9,9", None, "both"),
    ):  # fmt: skip
        with pytest.raises(InspectorError, match=words):
            given(rectangle, polygon, recipe)


def test_a_bundle_is_trained_on_the_outline_of_its_recipe_and_a_refused_training_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason='torch is not installed: pip install "edge-inspector[train]"')
    from edge_inspector import training
    from tests.test_training import TINY, order

    folder, out = _good(tmp_path / "good"), tmp_path / "new" / "bundles" / "lid"
    wanted = order(tmp_path, folder, out=out, family=TINY)
    refused: tuple[dict[str, Any], ...] = (
        {"roi": Roi(rectangle=Rectangle(x_px=100, y_px=0, w_px=64, h_px=64))}, {"device": "cuda:77"},
        {"folder": tmp_path / "nowhere"},
    )  # fmt: skip
    for changes in refused:
        with pytest.raises(InspectorError):
            training.train(dataclasses.replace(wanted, **changes))
        assert not (tmp_path / "new").exists(), changes
    polygon = ((10, 10), (105, 12), (60, 100))
    training.train(dataclasses.replace(wanted, roi=Roi(polygon=polygon)))
    trained = json.loads((out / "manifest.json").read_text())["pictures"]
    assert trained["sizes"] == [[96, 91], [96, 91]]
    assert trained["channels"] == 3
    assert trained["region"] == {"polygon": [list(corner) for corner in polygon]}
    sample = pictures.read(out / "sample-good-1.png")
    assert sample.shape == (91, 96, 3)
    assert set(sample[-1, 0].tolist()) == {127}  # outside the polygon


def test_a_size_that_is_rounded_is_said(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason='torch is not installed: pip install "edge-inspector[train]"')
    from edge_inspector.training import data, orders
    from edge_inspector.training.networks.feature_fit import FeatureAnogan

    surveyed = data.Pictures((), 128, 128, (1.0, 1.0), 3, 8, "", (), ((128, 128), (128, 128)))
    order = orders.Order(tmp_path, tmp_path / "b", "p", "p", None, family=FeatureAnogan(side=100))  # type: ignore[arg-type]
    assert [str(remark) for remark in orders._on_size(order, surveyed)] == [
        "the network's input is 96x96 px for a size of 100: its sides are multiples of 32"
    ]
    large = data.Pictures((), 1000, 2000, (2.0, 2.0), 3, 8, "", (), ((2000, 1000), (2000, 1000)))
    (said,) = orders._on_size(replace(order, family=FeatureAnogan()), large)
    assert str(said) == (
        "the network sees the pictures at 18% of their resolution, marks of less than about 22 px are lost. "
        "With --tile 256 it sees all of it, in 32 tiles, which take 32 times as long"
    )
    assert list(orders._on_size(replace(order, family=FeatureAnogan(), tile=256), large)) == []
