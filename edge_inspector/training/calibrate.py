"""Limit samples: pictures in a bundle with the verdicts they must get."""

from __future__ import annotations

from collections.abc import Sequence
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


def blemished(image: Pixels, size: float, scale: tuple[int, int] = (0, 255)) -> Pixels:
    """The picture with a round blot of `size` (share of its height) in its middle, as far from its mean as can be.

    `scale`: the intensities that are black and white.
    """
    height, width = image.shape[:2]
    rows, columns = np.mgrid[:height, :width]
    blot = np.hypot(rows - height / 2, columns - width / 2) < max(1.0, size * height / 2)
    black, white = scale
    spoiled: NDArray[np.generic] = image.copy()
    spoiled[blot] = black if image.mean() > (black + white) / 2 else white
    return spoiled


def limit_samples(engine: Engine, ranked: Sequence[Path], threshold: float, folder: Path) -> tuple[Sample, ...]:
    """Write sample-*.png: good parts (ordinary to odd, as far as they pass) and one with a blot that just fails.

    `ranked`: pictures of good parts, the most ordinary first. Raises TrainingError when no blot fails: such a network
    finds nothing.
    """
    samples: list[Sample] = []
    tried = dict.fromkeys(ranked[round(share * (len(ranked) - 1))] for share in (0.5, 0.9, 0.8, 0.7, 0.6, 0.4, 0.3))
    for path in tried:
        image = pictures.read(path)
        score = picture_score(engine, image)
        if score <= threshold and len(samples) < GOOD_SAMPLES:
            name = f"sample-good-{len(samples) + 1}.png"
            pictures.write(folder / name, image)
            samples.append(Sample(file=name, score=score, verdict=Verdict.PASS))
    if not samples:
        raise TrainingError("no ordinary good part passes its own threshold", hint="please report this with the pictures' kind")
    ordinary = pictures.read(folder / samples[0].file)
    scale = engine.bundle.manifest.training.intensity_window or (0, 255)
    for size in np.geomspace(0.02, 0.8, 12):
        spoiled = blemished(ordinary, float(size), scale)
        score = picture_score(engine, spoiled)
        if score > 1.05 * threshold:
            pictures.write(folder / "sample-fail-1.png", spoiled)
            return (*samples, Sample(file="sample-fail-1.png", score=score, verdict=Verdict.FAIL))
    raise TrainingError(
        "even a blot over most of a part stays below the threshold: the network finds nothing",
        hint="train longer, or look for odd parts among the pictures",
    )
