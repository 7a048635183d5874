"""New pictures from a bundle: good parts as its GAN draws them, walks between them, and defects with masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from edge_inspector import pictures
from edge_inspector.bundles import GENERATOR, Bundle
from edge_inspector.errors import PictureError
from edge_inspector.frames import Pixels
from edge_inspector.results import Verdict
from edge_inspector.runtime import picture_of
from edge_inspector.training import synthesis

_WALKS, _STEPS, _ACROSS = 6, 10, 8
_FAMILIES = {"learned": synthesis.LEARNED, "withheld": synthesis.WITHHELD}
Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class Generated:
    """How many pictures were written."""

    good: int
    defects: int


class Drawer:
    """The generator G of a bundle that has one (fanogan; feature-anogan draws features, not pictures)."""

    def __init__(self, bundle: Bundle) -> None:
        self._session = onnxruntime.InferenceSession(bundle.read(GENERATOR), providers=["CPUExecutionProvider"])
        self.latent = int(self._session.get_inputs()[0].shape[1])

    def __call__(self, latents: NDArray[np.float32]) -> Picture:
        """Latents [N, latent] -> pictures uint8 [N, H, W, C], BGR or grey."""
        parts = [self._session.run(None, {"latent": latents[i : i + 32]})[0] for i in range(0, len(latents), 32)]
        return np.concatenate(parts)


def generate(
    bundle: Bundle, out: Path, count: int, seed: int, sources: Sequence[Path] = (), tick: Callable[[], None] = lambda: None
) -> Generated:
    """Write `count` drawn good parts, and `count` good parts with a drawn defect of each set of families, with masks.

    `out` gets MVTec layout, so that `evaluate` reads it: test/good, test/learned, test/withheld, ground_truth/; and the
    sheets drawn.png and walks.png. Defects go into `sources`, or into the bundle's own good samples. Raises PictureError.
    """
    rng, window = np.random.default_rng(seed), bundle.manifest.training.intensity_window
    _made(out)
    good = 0
    if GENERATOR in bundle.manifest.files:
        draw = Drawer(bundle)
        drawn = draw(rng.standard_normal((count, draw.latent), dtype=np.float32))
        for number, picture in enumerate(drawn):
            _put(out / "test" / "good", f"{number:04d}", _as_camera(picture, window))
            tick()
        good = len(drawn)
        rows = [drawn[i : i + _ACROSS] for i in range(0, min(good, _ACROSS**2), _ACROSS)]
        pictures.write(out / "drawn.png", _sheet([row for row in rows if len(row) == len(rows[0])]))
        pictures.write(out / "walks.png", _sheet([draw(walk(rng, draw.latent)) for _ in range(_WALKS)]))
    own = [s for s in bundle.manifest.samples if s.verdict is Verdict.PASS]
    given = [partial(pictures.read, path) for path in sources] or [partial(picture_of, bundle, sample) for sample in own]
    for name, family in _FAMILIES.items():
        for number in range(count):
            picture = _scaled(given[number % len(given)](), window)
            other = _scaled(given[int(rng.integers(len(given)))](), window)
            spoiled, mask = synthesis.visibly_spoiled(rng, picture, other if other.shape == picture.shape else picture, family)
            _put(out / "test" / name, f"{number:04d}", _as_camera(spoiled, window))
            _put(out / "ground_truth" / name, f"{number:04d}_mask", mask * np.uint8(255))
            tick()
    return Generated(good, count * len(_FAMILIES))


def walk(rng: np.random.Generator, latent: int) -> NDArray[np.float32]:
    """Latents [_STEPS, latent] on the great circle between two random ones (White 2016): every one is as likely as they."""
    a, b = rng.standard_normal((2, latent))
    angle = np.arccos(np.clip(a @ b / np.linalg.norm(a) / np.linalg.norm(b), -1, 1))
    t = np.linspace(0, 1, _STEPS)[:, None]
    walked: NDArray[np.float32] = ((np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)).astype(np.float32)
    return walked


def _sheet(rows: Sequence[Picture]) -> Picture:
    return np.concatenate([np.concatenate(list(row), 1) for row in rows], 0)


def _scaled(image: Pixels, window: tuple[int, int] | None) -> Picture:
    """A picture as uint8 [H, W, C]; `window`: what is black and white in it."""
    low, high = window or (0, np.iinfo(image.dtype).max)
    levels = (image.astype(np.float32) - low) * (255 / (high - low))
    return np.asarray(levels.clip(0, 255).round(), np.uint8).reshape(*image.shape[:2], -1)


def _as_camera(picture: Picture, window: tuple[int, int] | None) -> NDArray[Any]:
    """A picture uint8 [H, W, C] with the intensities that the bundle's camera gives."""
    if window is None:
        return picture
    low, high = window
    levels = (low + picture.astype(np.float32) * ((high - low) / 255)).round()
    return np.asarray(levels, np.uint16 if high > np.iinfo(np.uint8).max else np.uint8)


def _made(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PictureError(f"{folder}: {error.strerror}", hint="give a folder that can be written with --out") from error


def _put(folder: Path, name: str, picture: NDArray[Any]) -> None:
    _made(folder)
    pictures.write(folder / f"{name}.png", picture)
