"""What is odd about a folder of pictures is said in words; a sound folder is left alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("torch", reason='torch is not installed: pip install "edge-inspector[train]"')

from edge_inspector import pictures
from edge_inspector.cameras.synthetic import draw_part
from edge_inspector.errors import TrainingError
from edge_inspector.training import audit, data

Change = Callable[[int, NDArray[np.uint8]], NDArray[np.uint8]]


def folder(tmp_path: Path, change: Change = lambda _, image: image, count: int = 30) -> Path:
    for n in range(count):
        image = draw_part(np.random.default_rng(n), 64, 64, False)
        pictures.write(tmp_path / f"{n:03d}.png", change(n, image))
    return tmp_path


def said(where: Path) -> list[audit.Remark]:
    return list(data.survey(where).remarks)


def only(remarks: list[audit.Remark], text: str) -> audit.Remark:
    found = [remark for remark in remarks if text in remark.text]
    assert len(found) == 1, [str(remark) for remark in remarks]
    return found[0]


def test_a_sound_folder_gets_no_remark(tmp_path: Path) -> None:
    assert said(folder(tmp_path)) == []


def test_a_stranger_is_shown_to_be_looked_at(tmp_path: Path) -> None:
    def one_upside_down(n: int, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return 255 - image if n == 7 else image

    assert [path.name for path in only(said(folder(tmp_path, one_upside_down)), "really good").paths] == ["007.png"]


def test_a_blurred_picture_is_named(tmp_path: Path) -> None:
    def one_blurred(n: int, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return cv2.GaussianBlur(image, (0, 0), 6).astype(np.uint8) if n == 3 else image

    assert [path.name for path in only(said(folder(tmp_path, one_blurred)), "less sharp").paths] == ["003.png"]


def test_two_products_in_a_folder_are_noticed(tmp_path: Path) -> None:
    def second(n: int, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return np.asarray(image / 3, np.uint8) if n % 3 == 0 else image

    remark = only(said(folder(tmp_path, second)), "two groups of 20 and 10")
    assert {int(path.stem) % 3 for path in remark.paths} == {0}


def test_near_copies_are_counted(tmp_path: Path) -> None:
    """One scene filmed: every second picture is its predecessor with a little noise."""

    def filmed(n: int, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if n % 2 == 0:
            return image
        before = draw_part(np.random.default_rng(n - 1), 64, 64, False).astype(np.int16)
        noisy = before + np.random.default_rng(n).integers(-2, 3, before.shape)
        return np.asarray(np.clip(noisy, 0, 255), np.uint8)

    assert len(only(said(folder(tmp_path, filmed)), "near copies").paths) >= 10


def test_a_drifting_lamp_and_a_dark_picture_are_told(tmp_path: Path) -> None:
    def drifting(n: int, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return (image * (0.5 + n / 60)).astype(np.uint8) if n else np.zeros_like(image)

    remarks = said(folder(tmp_path, drifting))
    assert "brighter" in only(remarks, "in the order of their names").text
    assert [path.name for path in only(remarks, "lamp off").paths] == ["000.png"]


def test_pictures_of_one_short_session_are_told(tmp_path: Path) -> None:
    where = folder(tmp_path)
    for n, path in enumerate(sorted(where.iterdir())):
        os.utime(path, (1_700_000_000 + 20 * n, 1_700_000_000 + 20 * n))
    assert "within 10 minutes" in only(said(where), "other shifts").text


def test_grey_among_colour_is_refused_with_an_example(tmp_path: Path) -> None:
    def one_grey(n: int, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return np.ascontiguousarray(image[:, :, 0]) if n == 5 else image

    with pytest.raises(TrainingError, match=r"29 colour, 1 grey; grey is, for one, 005\.png"):
        data.survey(folder(tmp_path, one_grey))


def test_grey_pictures_with_alpha_are_read_without_it(tmp_path: Path) -> None:
    for n in range(20):
        grey = draw_part(np.random.default_rng(n), 32, 32, False)[:, :, 0]
        rgba = np.dstack([grey, grey, grey, np.full_like(grey, 255)])
        assert cv2.imwrite(str(tmp_path / f"{n}.png"), rgba)
    assert data.survey(tmp_path).channels == 3
