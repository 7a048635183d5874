"""Pictures for training: copies are left out, odd ones are told, an earlier capture goes on."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edge_inspector import pictures
from edge_inspector.cameras.folder import broken_frame
from edge_inspector.cameras.synthetic import draw_part
from edge_inspector.capture import Album
from edge_inspector.errors import InspectorError
from edge_inspector.frames import Frame, Pixels, frozen, utc_now
from tests.line import ENGINES, RECORDING


def frame(image: Pixels) -> Frame:
    return Frame(frozen(image), 0, time.monotonic(), utc_now())


def noisy(image: np.ndarray, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 2, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def test_a_part_that_lies_still_is_stored_once_and_other_parts_all(tmp_path: Path) -> None:
    album = Album(tmp_path)
    still = draw_part(np.random.default_rng(0), 480, 640, False)
    kept = [album.take(frame(noisy(still, seed))).path for seed in range(5)]
    assert kept == [tmp_path / "000001.png", None, None, None, None]
    for path in pictures.listed(ENGINES / "recording").taken[:30]:
        assert album.take(frame(pictures.read(path))).path is not None
    assert album.kept == 31
    assert np.array_equal(pictures.read(tmp_path / "000001.png"), noisy(still, 0))


def test_numbers_go_on_and_what_an_earlier_capture_stored_is_a_copy(tmp_path: Path) -> None:
    parts = [draw_part(np.random.default_rng(n), 240, 320, False) for n in range(3)]
    first = Album(tmp_path)
    for part in parts[:2]:
        first.take(frame(part))
    (tmp_path / "000002.png").rename(tmp_path / "2.png")  # a person's own numbering
    again = Album(tmp_path)
    assert again.take(frame(parts[1])).why_not == "shows the same as an earlier one"
    assert again.take(frame(parts[2])).path == tmp_path / "000003.png"


@pytest.mark.parametrize("bits", [8, 12])
def test_what_is_wrong_with_the_light_or_the_focus_is_told(tmp_path: Path, bits: int) -> None:
    def of(image: np.ndarray) -> Frame:
        return frame(image if bits == 8 else (image.astype(np.uint16) << 4) + 15)

    album = Album(tmp_path)
    for n in range(4):
        assert album.take(of(draw_part(np.random.default_rng(n), 240, 320, False))).hints == ()
    sharp = draw_part(np.random.default_rng(9), 240, 320, False)
    import cv2

    assert any("less sharp" in hint for hint in album.take(of(cv2.GaussianBlur(sharp, (0, 0), 4))).hints)
    bright = sharp.copy()
    bright[:60] = 255
    assert any("as bright as can be" in hint for hint in album.take(of(bright)).hints)
    dark = album.take(frame(np.full((240, 320), 3, np.uint8)))
    assert any("nearly dark" in hint for hint in dark.hints)


def test_a_broken_frame_is_not_stored(tmp_path: Path) -> None:
    taken = Album(tmp_path).take(broken_frame(0, "", "truncated"))
    assert (taken.path, taken.why_not) == (None, "truncated")
    with pytest.raises(InspectorError, match="Not a directory|File exists"):
        (tmp_path / "file").touch()
        Album(tmp_path / "file")


def test_the_verb_takes_what_a_camera_gives_and_says_where_there_is_none(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "edge_inspector.cli", "capture", *arguments], capture_output=True,
                              text=True, timeout=60, check=False)  # fmt: skip

    done = run(RECORDING, "--out", str(tmp_path / "good"), "--every", "0", "--count", "7", "--json")
    assert json.loads(done.stdout)["stored"] == 7
    assert len(list((tmp_path / "good").glob("*.png"))) == 7
    none = run("v4l2:///dev/video77", "--out", str(tmp_path / "none"))
    assert none.returncode == 2
    assert "/dev/video77: cannot be opened" in none.stderr
    assert "no camera 'sheet/top'" in run("sheet/top", "--out", str(tmp_path / "x"), "--config", str(_device(tmp_path))).stderr


def _device(folder: Path) -> Path:
    (folder / "device.yaml").write_text("schema: ei.device.v1\nidentity: {site: a, line: b, device: c}\n")
    (folder / "line.yaml").write_text(
        "schema: ei.line.v1\nstations: {one: {product: p, products: {p: r}, cameras: {top: {uri: 'synthetic://'}}}}\n"
        "recipes: {r: {cameras: {top: {rois: {all: {bundle: b}}}}}}\n"
    )
    return folder / "device.yaml"
