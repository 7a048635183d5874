"""The Engine protocol, and the self-test of a bundle on its own samples."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_inspector import pictures, preprocess, scoring
from edge_inspector.bundles import Bundle
from edge_inspector.errors import EngineError
from edge_inspector.frames import Pixels
from edge_inspector.roi import Roi

SCORE_TOLERANCE = 0.01
"""Largest allowed |difference of score| / threshold between runtimes on a bundle's own samples."""


@dataclass(frozen=True)
class Outputs:
    """What a network says of a batch. The arrays are the engine's own: the next call overwrites them."""

    score: NDArray[np.float32]
    """[N]"""
    map: NDArray[np.float32]
    """[N, h, w]"""
    expected: NDArray[np.uint8] | None
    """[N, H, W, C] where the network draws what it expected."""


class Engine(Protocol):
    """Runs one bundle with a fixed batch. Opened and warmed in `__enter__`, off the hot path."""

    bundle: Bundle
    runtime: str
    precision: str
    batch: int
    images: NDArray[np.uint8]
    """Input buffer [batch, H, W, C]; write here, then call."""
    valid: NDArray[np.uint8]
    """Input buffer [batch, H, W]; 0 where nothing is judged."""

    def __enter__(self) -> Engine: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def __call__(self) -> Outputs:
        """Judge what lies in the input buffers. Raises EngineError."""
        ...


def judged_tiles(engine: Engine, plan: preprocess.Plan, image: Pixels) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scores [tiles] and anomaly maps [tiles, h, w] of a picture of any number of tiles, in batches of the engine's size."""
    images, valid = plan.buffers()
    plan.fill(image, images, valid)
    scores, maps = [], []
    for start in range(0, len(images), engine.batch):
        n = len(images[start : start + engine.batch])
        engine.images[:n], engine.valid[:n] = images[start : start + n], valid[start : start + n]
        outputs = engine()
        scores.append(outputs.score[:n].copy())
        maps.append(outputs.map[:n].copy())
    return np.concatenate(scores), np.concatenate(maps)


def picture_score(engine: Engine, image: Pixels) -> float:
    """Score of a whole picture (uint8 or uint16 [H, W] or [H, W, 3] BGR): the largest over its tiles."""
    manifest = engine.bundle.manifest
    plan = preprocess.Plan(manifest.input, Roi(), image.shape[0], image.shape[1], manifest.training.intensity_window)
    return float(judged_tiles(engine, plan, image)[0].max())


def judge_samples(engine: Engine) -> list[float]:
    """Judge every sample of the bundle; returns the scores. Raises EngineError at a flip or a score too far off."""
    manifest = engine.bundle.manifest
    scores = []
    for sample in manifest.samples:
        score = picture_score(engine, pictures.read(engine.bundle.folder / sample.file))
        verdict, _ = scoring.judge(score, manifest.threshold)
        if verdict is not sample.verdict or not abs(score - sample.score) <= SCORE_TOLERANCE * manifest.threshold:
            raise EngineError(
                f"bundle {manifest.name}: {sample.file} scores {score:.4g} ({verdict.value}),"
                f" expected {sample.score:.4g} ({sample.verdict.value})",
                hint="the network does not compute here what it did when trained; build or roll out the bundle again",
            )
        scores.append(score)
    return scores
