"""Pictures for training: copies are left out, odd ones are told, an earlier capture goes on."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import cv2
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


def washer(rng: np.random.Generator, *, chipped: bool) -> np.ndarray:
    """A small part, back-lit, turned at random: 1280x1024 px, of which it covers two thousandths."""
    image = np.full((1024, 1280), 235, np.uint8)
    x, y = 640 + int(rng.integers(-3, 4)), 512 + int(rng.integers(-3, 4))
    cv2.ellipse(image, (x, y), (30, 22), rng.uniform(0, 360), 0, 360, 40, -1, cv2.LINE_AA)
    cv2.circle(image, (x, y), 8, 235, -1, cv2.LINE_AA)
    if chipped:
        cv2.circle(image, (x + 25, y), 6, 235, -1, cv2.LINE_AA)
    return image


def seal(rng: np.random.Generator) -> np.ndarray:
    """Dark rubber at 12 bit, with a mark at another place of each."""
    image, angle = np.full((480, 640), 60, np.float32), rng.uniform(0, 6.28)
    cv2.circle(image, (320, 240), 180, 75, 8)
    cv2.circle(image, (int(320 + 180 * np.cos(angle)), int(240 + 180 * np.sin(angle))), 5, 110, -1)
    return np.clip(image + rng.normal(0, 3, image.shape), 0, 4095).astype(np.uint16)


def test_small_and_dark_parts_that_differ_by_little_are_all_kept(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    small = Album(tmp_path / "small")
    for number in range(12):
        small.take(frame(noisy(washer(rng, chipped=number >= 8), number)))
    dark = Album(tmp_path / "dark")
    for _ in range(10):
        dark.take(frame(seal(rng)))
    assert (small.kept, dark.kept) == (12, 10)


def test_marks_two_pixels_apart_are_two_parts(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)  # the tenth and the seventeenth are marked nearly alike
    album = Album(tmp_path)
    for _ in range(20):
        album.take(frame(seal(rng)))
    assert album.kept == 20


def test_a_part_that_lies_still_is_a_copy_under_noise_that_grows_with_light_and_a_lamp_that_flickers(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    still = {
        "bright part": np.pad(np.full((200, 300), 220.0), 200, constant_values=20.0), "dark part": washer(rng, chipped=False),
        "saturated": np.where(washer(rng, chipped=False) > 200, 400.0, 60.0), "textured": draw_part(rng, 480, 640, False),
    }  # fmt: skip
    for name, scene in still.items():
        album = Album(tmp_path / name)
        for _ in range(6):
            light = scene * rng.uniform(0.97, 1.03)
            seen = light + rng.normal(0, 1, scene.shape) * (0.5 + 0.2 * np.sqrt(np.clip(light, 0, 255)))
            album.take(frame(np.clip(np.rint(seen), 0, 255).astype(np.uint8)))
        assert album.kept == 1, name


def test_a_mark_on_a_part_without_any_noise_is_another_part(tmp_path: Path) -> None:
    plain = np.full((300, 400), 90, np.uint8)
    marked = plain.copy()
    marked[100:104, 200:204] = 110
    album = Album(tmp_path)
    assert [album.take(frame(image)).path is not None for image in (plain, plain, marked, marked)] == [True, False, True, False]


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
