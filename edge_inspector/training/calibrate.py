"""Part-level scores of pictures through the engine, as on the line; limit samples for a bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_inspector import pictures
from edge_inspector.bundles import Sample
from edge_inspector.errors import TrainingError
from edge_inspector.frames import Pixels
from edge_inspector.results import Verdict
from edge_inspector.runtime import Engine
from edge_inspector.runtime.engine import picture_score

GOOD_SAMPLES = 3


def scores(engine: Engine, paths: Iterable[Path], tick: Callable[[], None] = lambda: None) -> list[float]:
    """The score of each picture: the largest over its tiles, through the same preprocessing as on the line."""
    found = []
    for path in paths:
        found.append(picture_score(engine, pictures.read(path)))
        tick()
    return found


def blemished(image: Pixels, size: float) -> Pixels:
    """The picture with a round blot of `size` (share of its height) in its middle, as far from its mean as can be."""
    height, width = image.shape[:2]
    rows, columns = np.mgrid[:height, :width]
    blot = np.hypot(rows - height / 2, columns - width / 2) < max(1.0, size * height / 2)
    top = np.iinfo(image.dtype).max
    spoiled: NDArray[np.generic] = image.copy()
    spoiled[blot] = 0 if image.mean() > top / 2 else top
    return spoiled


def limit_samples(engine: Engine, paths: list[Path], threshold: float, folder: Path) -> tuple[Sample, ...]:
    """Write sample-*.png: good parts (median, high, highest below the threshold) and one with a blot that just fails.

    Raises TrainingError when no blot fails: such a network finds nothing.
    """
    ranked = sorted((score, path) for score, path in zip(scores(engine, paths), paths, strict=True) if score <= threshold)
    chosen = [ranked[round(share * (len(ranked) - 1))] for share in np.linspace(0.5, 1.0, GOOD_SAMPLES)]
    samples = []
    for number, (score, path) in enumerate(chosen, 1):
        name = f"sample-good-{number}.png"
        pictures.write(folder / name, pictures.read(path))
        samples.append(Sample(file=name, score=score, verdict=Verdict.PASS))
    for size in np.geomspace(0.02, 0.8, 12):
        spoiled = blemished(pictures.read(chosen[0][1]), float(size))
        score = picture_score(engine, spoiled)
        if score > 1.05 * threshold:
            pictures.write(folder / "sample-fail-1.png", spoiled)
            return (*samples, Sample(file="sample-fail-1.png", score=score, verdict=Verdict.FAIL))
    raise TrainingError(
        "even a blot over most of a part stays below the threshold: the network finds nothing",
        hint="train longer (--gan-steps, --encoder-steps), or look for odd parts among the pictures",
    )
