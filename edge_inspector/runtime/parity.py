"""The gate behind every build: a compiled network must judge as ONNX Runtime does.

Judged are the bundle's own samples and frames near the threshold, where a small difference would turn a verdict: tiles of the
samples with a blot, which is faded until the score lies within 20 % of the threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_inspector import preprocess, scoring
from edge_inspector.bundles import Bundle
from edge_inspector.errors import EngineRefused
from edge_inspector.roi import Roi
from edge_inspector.runtime.engine import TOLERANCE, Engine, Outputs, judge_samples, picture_of
from edge_inspector.runtime.precision import Precision

FRAMES, REACH = 200, 0.2
MARGIN: dict[Precision, float] = {"fp32": 0.001, "fp16": 0.001, "int8": 0.01}
"""How near to the threshold frames may score, in thresholds: about what rounding does to a sound engine."""
_FADES, _NEAR = 8, 0.04
"""Strengths of a blot that are tried until the score is so near to what it should be, in thresholds; then another blot."""
_TRIES = 20
"""Blots tried for each frame that is wanted."""
_SEED = 1


@dataclass(frozen=True)
class Near:
    """Frames near the threshold, as the network takes them, with the scores that ONNX Runtime gives them."""

    images: NDArray[np.uint8]
    """[N, H, W, C]"""
    valid: NDArray[np.uint8]
    """[N, H, W]"""
    scores: NDArray[np.float32]
    """[N]"""
    maps: NDArray[np.float32]
    """[N, h, w]"""


@dataclass(frozen=True)
class Parity:
    """How well two engines agree on frames near the threshold."""

    frames: int
    largest: float
    """|difference of score| / threshold."""
    largest_map: float
    """|difference of a place of the anomaly map| / threshold."""
    flips: int


def near_threshold(reference: Engine, margin: float, step: Callable[[int], None], count: int = FRAMES) -> Near:
    """Make `count` frames whose scores lie within 20 % of the threshold, but not nearer than `margin`, both in thresholds.

    Still nearer a flip would say nothing. `reference` has a batch of one. Raises EngineRefused where the network gives too few
    such scores.
    """
    rng, threshold = np.random.default_rng(_SEED), reference.bundle.manifest.threshold
    tiles = [tile for tile in _tiles(reference.bundle) if _score(reference, *tile) < threshold]
    images, valid, scores, maps = [], [], [], []
    for attempt in range(_TRIES * count if tiles else 0):
        image, inside = tiles[attempt % len(tiles)]
        np.copyto(reference.valid[0], inside)
        target = 1 + rng.choice((-1, 1)) * rng.uniform(margin, REACH)
        found = _faded(reference, image, _blot(rng, image), target)
        if found is not None and margin < abs(found[1] / threshold - 1) < REACH:
            images.append(found[0])
            maps.append(found[2])
            valid.append(inside)
            scores.append(found[1])
            step(len(scores))
        if len(scores) == count:
            return Near(np.stack(images), np.stack(valid), np.array(scores, np.float32), np.stack(maps))
    raise EngineRefused(
        f"bundle {reference.bundle.manifest.name}: {len(scores)} of {count} frames near its threshold could be made",
        hint="a blot on its samples hardly moves its score; it cannot be compared where it matters",
    )


def _tiles(bundle: Bundle) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Every tile of every sample, image and valid."""
    manifest = bundle.manifest
    for sample in manifest.samples:
        picture = picture_of(bundle, sample)
        plan = preprocess.Plan(manifest.input, Roi(), picture.shape[0], picture.shape[1], manifest.training.intensity_window)
        images, valid = plan.buffers()
        plan.fill(picture, images, valid)
        yield from zip(images, valid, strict=True)


def _score(engine: Engine, image: NDArray[np.uint8], inside: NDArray[np.uint8]) -> float:
    engine.images[0], engine.valid[0] = image, inside
    return float(engine().score[0])


def _blot(rng: np.random.Generator, image: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Colour [C] and strength [H, W, 1] of a round blot with a soft rim, anywhere; every other one black or white."""
    height, width, channels = image.shape
    y, x = rng.uniform(0, height), rng.uniform(0, width)
    radius = rng.uniform(0.02, 0.15) * min(height, width) + 2
    rows, columns = np.ogrid[:height, :width]
    away = np.hypot(rows - y, columns - x) / radius
    levels = rng.integers(0, 256, size=(channels,)) if rng.random() < 0.5 else np.full(channels, rng.choice((0, 255)))
    colour: NDArray[np.float32] = levels.astype(np.float32)
    return colour, np.asarray(np.clip(2 - 2 * away, 0, 1), np.float32)[..., None]


def _faded(
    reference: Engine, image: NDArray[np.uint8], blot: tuple[NDArray[np.float32], NDArray[np.float32]], target: float
) -> tuple[NDArray[np.uint8], float, NDArray[np.float32]] | None:
    """The image with so much of the blot that it scores near `target` thresholds, score and map; None where nothing does."""
    colour, shape = blot
    threshold = reference.bundle.manifest.threshold

    def judged(strength: float) -> Outputs:
        mixed = image + strength * shape * (colour - image)
        np.copyto(reference.images[0], np.round(mixed), casting="unsafe")
        return reference()

    def scored(strength: float) -> float:
        return float(judged(strength).score[0]) / threshold

    low, below = 0.0, scored(0.0)
    high, above = 1.0, scored(1.0)
    if not below < target < above:
        return None
    for _ in range(_FADES):
        # By the slope between the two ends, but never so near to one that the other hardly moves.
        share = min(max((target - below) / (above - below), 0.2), 0.8)
        middle = low + share * (high - low)
        outputs = judged(middle)
        score = float(outputs.score[0]) / threshold
        if abs(score - target) < _NEAR:
            return reference.images[0].copy(), score * threshold, outputs.map[0].copy()
        if score < target:
            low, below = middle, score
        else:
            high, above = middle, score
    return None


def compared(engine: Engine, near: Near) -> Parity:
    """Judge the same frames; refuses nothing."""
    scores, maps = np.empty_like(near.scores), np.empty_like(near.maps)
    for start in range(0, len(scores), engine.batch):
        n = len(scores[start : start + engine.batch])
        engine.images[:n], engine.valid[:n] = near.images[start : start + n], near.valid[start : start + n]
        outputs = engine()
        scores[start : start + n], maps[start : start + n] = outputs.score[:n], outputs.map[:n]
    threshold = engine.bundle.manifest.threshold
    flips = sum(
        scoring.judge(float(a), threshold)[0] is not scoring.judge(float(b), threshold)[0]
        for a, b in zip(near.scores, scores, strict=True)
    )
    off, off_maps = (np.abs(a - b).max() / threshold for a, b in ((scores, near.scores), (maps, near.maps)))
    return Parity(len(scores), float(off), float(off_maps), flips)


def refuse_unlike(engine: Engine, near: Near) -> Parity:
    """Raise EngineRefused unless samples and frames near the threshold are judged as ONNX Runtime judges them."""
    name, tolerance = f"bundle {engine.bundle.manifest.name}, {engine.precision}", TOLERANCE[engine.precision]
    hint = "another precision may do: edge-inspector build --precision fp32"
    try:
        judge_samples(engine)
    except EngineRefused as error:
        raise EngineRefused(f"{name}: {error.message}", hint=hint) from error
    parity = compared(engine, near)
    if parity.flips or not max(parity.largest, parity.largest_map) <= tolerance:  # not a number is refused too
        raise EngineRefused(
            f"{name}: scores differ from ONNX Runtime's by {parity.largest:.2%} of the threshold, maps by"
            f" {parity.largest_map:.2%} (at most {tolerance:.0%}), {parity.flips} of {parity.frames} verdicts flip",
            hint=hint,
        )
    return parity
