"""What a bundle was not trained on is refused, and a promise that does not hold is told wherever somebody looks."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge_inspector import pictures, preprocess
from edge_inspector.bundles import Bundle, InputSpec, PictureKind, Rates, TrainedOn, open_bundle
from edge_inspector.checks import check_device
from edge_inspector.frames import frozen
from edge_inspector.inspector import Inspector
from edge_inspector.recipes import CameraRecipe, Recipe, RoiRecipe
from edge_inspector.roi import Rectangle, Roi
from edge_inspector.runtime import Engine, OnnxEngine
from tests.line import ENGINES, RECORDING, DaemonProcess, Mosquitto, device_folder, line_yaml, listening, until
from tests.test_preprocess import frame
from tests.tiny import tiny_bundle

LINE = """\
schema: ei.line.v1
version: 3
stations:
  grey: {{trigger: free, expires_ms: 60000, product: paper, products: {{paper: whole}}, cameras: {{top: {{uri: "dir://{grey}?loop=1&fps=20"}}}}}}
  other: {{trigger: free, expires_ms: 60000, product: paper, products: {{paper: other}}, cameras: {{top: {{uri: "{recording}?loop=1&fps=20"}}}}}}
  small: {{trigger: free, expires_ms: 60000, product: paper, products: {{paper: small}}, cameras: {{top: {{uri: "{recording}?loop=1&fps=20"}}}}}}
recipes:
  whole: {{cameras: {{top: {{rois: {{all: {{bundle: paper}}}}}}}}}}
  other: {{cameras: {{top: {{rois: {{all: {{bundle: paper, threshold: 99.0, rectangle: {{x_px: 0, y_px: 0, w_px: 120, h_px: 120}}}}}}}}}}}}
  small: {{cameras: {{top: {{rois: {{all: {{bundle: paper, rectangle: {{x_px: 0, y_px: 0, w_px: 96, h_px: 96}}}}}}}}}}}}
"""
NOT_VALID = "not valid: threshold set by the recipe, region of 120x120, trained on 128x128"


@pytest.fixture
def grey(tmp_path: Path) -> Path:
    """The recording as a camera left in Mono8 gives it."""
    (tmp_path / "grey").mkdir()
    for path in pictures.listed(ENGINES / "recording").taken[:4]:
        pictures.write(tmp_path / "grey" / path.name, cv2.cvtColor(pictures.read(path), cv2.COLOR_BGR2GRAY))
    return tmp_path / "grey"


def test_check_ready_health_and_results_tell_what_a_bundle_was_not_trained_on(
    tmp_path: Path, grey: Path, mosquitto: Mosquitto
) -> None:
    folder = device_folder(tmp_path / "device", mosquitto.port, LINE.format(grey=grey, recording=RECORDING))
    said = {finding.thing: (finding.ok, finding.text) for finding in check_device(folder / "device.yaml")}
    assert said["recipe whole, camera top, roi all"] == (False, "grey frame, the bundle was trained on colour")
    assert said["recipe small, camera top, roi all"] == (False, "region of 96x96, the bundle was trained on 128x128")
    ok, text = said["recipe other, camera top, roi all"]
    assert ok
    assert NOT_VALID in text
    with listening(mosquitto.port) as listener, DaemonProcess(folder):
        until(lambda: len(listener.of("result", "grey")) > 5 and listener.of("result", "other"), what="results")
        until(lambda: any("96x96" in ready["reason"] for ready in listener.of("ready", "small")), what="not ready")
        until(lambda: NOT_VALID in listener.of("ready", "other")[-1].get("promise", ""), what="ready with its promise")
        codes = {("nothing_judged", "grey"), ("promise_not_valid", "other"), ("not_ready", "small")}
        until(
            lambda: codes <= {(r["code"], r["thing"]) for h in listener.of("health")[-1:] for r in h["reasons"]}, what="health"
        )
        refused, judged = listener.of("result", "grey")[0], listener.of("result", "other")[0]
    assert (refused["verdict"], refused["reason"]) == ("undecided", "wrong_format")
    assert refused["detail"] == "grey frame, the bundle was trained on colour"
    assert judged["findings"][0]["promise"] == NOT_VALID


@pytest.fixture
def paper() -> Bundle:
    return open_bundle(ENGINES / "paper", ENGINES / "trust")


def test_a_frame_of_another_depth_is_refused_with_both(paper: Bundle) -> None:
    assert paper.channels == 3  # the manifest of an old bundle does not say so: its samples do
    colour = np.zeros((128, 128, 3), np.uint8)
    preprocess.refuse_camera(paper, colour)
    with pytest.raises(preprocess.FormatError, match="16-bit frame, the bundle was trained on 8 bit"):
        preprocess.refuse_camera(paper, colour.astype(np.uint16))
    recipe = Recipe(cameras={"top": CameraRecipe(rois={"all": RoiRecipe(bundle="paper")}, intensity_window=(0, 4095))})
    with OnnxEngine(paper) as engine:
        found = Inspector(recipe, {"paper": engine}).inspect({"top": [frame(frozen(colour.astype(np.uint16)))]})
    assert (found.reason.value, found.detail) == ("wrong_format", "16-bit frame, the bundle was trained on 8 bit")


@pytest.mark.parametrize(("found", "ok"), [(0.7, True), (0.04, False), (0.0, False)])
def test_check_tells_both_rates_and_their_cost_and_refuses_what_finds_next_to_nothing(
    tmp_path: Path, mosquitto: Mosquitto, found: float, ok: bool
) -> None:
    rates = Rates(
        asked="expected", wish=0.05, expected=0.05, at_most=0.08, needed=19,
        found=found, found_at_half=0.03, found_at_twice=0.8,
    )  # fmt: skip
    tiny_bundle(tmp_path, rates=rates)
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml(bundle="tiny"))
    text = (folder / "device.yaml").read_text()
    text = text.replace(f"trust: {ENGINES / 'trust'}", f"trust: {tmp_path / 'trust'}")
    (folder / "device.yaml").write_text(text.replace(f"bundles: {ENGINES}", f"bundles: {tmp_path}"))
    said = {finding.thing: finding for finding in check_device(folder / "device.yaml")}
    assert said["bundle tiny"].ok is ok
    assert "5 % of good parts will be rejected; with 95 % confidence" in said["bundle tiny"].text
    assert f"{found:.0%} of drawn defects are found" in said["bundle tiny"].text
    assert ("next to nothing" in said["bundle tiny"].text) is not ok


@pytest.mark.parametrize(
    ("width", "height", "refused", "told"),
    [(100, 50, False, False), (140, 70, False, False), (160, 80, False, True), (82, 42, False, True), (176, 88, True, True),
     (78, 39, True, True)],
)  # fmt: skip
def test_a_region_is_refused_beyond_a_fifth_and_told_from_the_first_pixel_on(
    width: int, height: int, refused: bool, told: bool, paper: Bundle
) -> None:
    """Trained on pictures of 100x50 to 140x70."""
    trained = TrainedOn(digest="", pictures=9, height_px=60, width_px=120, depth_bits=8, aspects=(2.0, 2.0))
    kind, spec = PictureKind(sizes=((100, 50), (140, 70))), InputSpec(height=32, width=64)
    manifest = paper.manifest.model_copy(update={"training": trained, "pictures": kind, "input": spec})
    box = (0, 0, width, height)
    if refused:
        with pytest.raises(preprocess.FormatError, match=f"{width}x{height}.*100x50 to 140x70"):
            preprocess.refuse_unlike(manifest, box)
    else:
        preprocess.refuse_unlike(manifest, box)
    assert bool(preprocess.broken_promise(manifest, Roi(), None, None, box)) is told


def test_the_promise_is_that_of_threshold_window_and_outline(paper: Bundle) -> None:
    def told(roi: Roi, threshold: float | None = None, window: tuple[int, int] | None = None) -> str:
        return preprocess.broken_promise(paper.manifest, roi, threshold, window, None)

    assert told(Roi()) == told(Roi(), paper.manifest.threshold) == ""
    assert told(Roi(rectangle=Rectangle(x_px=3, y_px=4, w_px=128, h_px=128))) == ""
    assert "threshold" in told(Roi(), 99.0)
    assert "window" in told(Roi(), None, (0, 200))
    corners = ((10, 10), (138, 10), (70, 138))
    assert "outline" in told(Roi(polygon=corners))
    kind = PictureKind(region=Roi(polygon=tuple((x - 9, y - 9) for x, y in corners)))
    manifest = paper.manifest.model_copy(update={"pictures": kind})
    assert preprocess.broken_promise(manifest, Roi(polygon=corners), None, None, None) == ""
    assert "outline" in preprocess.broken_promise(manifest, Roi(), None, None, None)


@pytest.mark.parametrize(
    ("shares", "threshold", "finds"),
    [((0.7, 0.4), None, 0.4), ((0.7, None), None, None), ((0.7, 0.4), 0.9, None)],
    ids=["the smallest", "of one nothing is known", "another threshold"],
)
def test_ready_tells_what_its_thresholds_find(
    tmp_path: Path, shares: tuple[float | None, ...], threshold: float | None, finds: float | None
) -> None:
    engines: dict[str, Engine] = {}
    for number, share in enumerate(shares):
        rates = Rates(asked="expected", wish=0.05, expected=0.05, at_most=0.1, needed=19, found=share)
        engines[f"b{number}"] = OnnxEngine(tiny_bundle(tmp_path, name=f"b{number}", rates=rates))
    rois = {name: RoiRecipe(bundle=name, threshold=threshold if name == "b1" else None) for name in engines}
    recipe = Recipe(cameras={"top": CameraRecipe(rois=rois)})
    with ExitStack() as opened:
        for engine in engines.values():
            opened.enter_context(engine)
        assert Inspector(recipe, engines).finds == finds
