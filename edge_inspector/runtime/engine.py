"""The Engine protocol, and the self-test of a bundle on its own samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_inspector import pictures, preprocess, scoring
from edge_inspector.bundles import Bundle, Sample
from edge_inspector.errors import EngineRefused
from edge_inspector.frames import Pixels
from edge_inspector.roi import Roi
from edge_inspector.runtime.precision import Precision

TOLERANCE: dict[Precision, float] = {"fp32": 0.01, "fp16": 0.01, "int8": 0.03}
"""Largest allowed |difference of score| / threshold between runtimes."""


@dataclass(frozen=True)
class Outputs:
    """What a network says of a batch. The arrays are the engine's own: the next call overwrites them."""

    score: NDArray[np.float32]
    """[N]"""
    map: NDArray[np.float32]
    """[N, h, w]"""
    expected: NDArray[np.uint8] | None
    """[N, H, W, C] where the network draws what it expected."""

    def part(self, start: int, stop: int) -> Outputs:
        """Of some of the batch; still the engine's own memory."""
        expected = None if self.expected is None else self.expected[start:stop]
        return Outputs(self.score[start:stop], self.map[start:stop], expected)

    def copy(self) -> Outputs:
        """Memory of its own, for what must outlive the next call."""
        return Outputs(self.score.copy(), self.map.copy(), None if self.expected is None else self.expected.copy())

    @staticmethod
    def joined(parts: Sequence[Outputs]) -> Outputs:
        """One after the other."""
        expected = [part.expected for part in parts if part.expected is not None]
        return Outputs(
            np.concatenate([part.score for part in parts]), np.concatenate([part.map for part in parts]),
            np.concatenate(expected) if expected else None,
        )  # fmt: skip


class Engine(Protocol):
    """Runs one bundle with a fixed batch. Opened and warmed in `__enter__`, off the hot path."""

    bundle: Bundle
    runtime: str
    precision: Precision
    instead: str
    """Why it stands in for the runtime that was wanted; empty where it does not."""
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

    def stages_ms(self) -> dict[str, float]:
        """Judge once more and time the stages of it, where the engine has any."""
        ...


def judged_tiles(engine: Engine, plan: preprocess.Plan, image: Pixels) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scores [tiles] and anomaly maps [tiles, h, w] of a picture of any number of tiles, in batches of the engine's size."""
    images, valid = plan.buffers()
    plan.fill(image, images, valid)
    parts = []
    for start in range(0, len(images), engine.batch):
        n = len(images[start : start + engine.batch])
        engine.images[:n], engine.valid[:n] = images[start : start + n], valid[start : start + n]
        parts.append(engine().part(0, n).copy())
    outputs = Outputs.joined(parts)
    return outputs.score, outputs.map


def picture_score(engine: Engine, image: Pixels) -> float:
    """Score of a whole picture (uint8 or uint16 [H, W] or [H, W, 3] BGR): the largest over its tiles."""
    manifest = engine.bundle.manifest
    plan = preprocess.Plan(manifest.input, Roi(), image.shape[0], image.shape[1], manifest.training.intensity_window)
    return float(judged_tiles(engine, plan, image)[0].max())


def picture_of(bundle: Bundle, sample: Sample) -> Pixels:
    """The pixels of a sample, from the bytes that were verified. Raises BundleDamaged or PictureError."""
    return pictures.decode(bundle.read(sample.file), str(bundle.folder / sample.file))


def judge_samples(engine: Engine) -> list[float]:
    """Judge every sample of the bundle; returns the scores. Raises EngineRefused at a flip or a score too far off."""
    return [judge_sample(engine, sample) for sample in engine.bundle.manifest.samples]


def judge_sample(engine: Engine, sample: Sample) -> float:
    """Judge one sample; returns its score. Raises EngineRefused at a flip or a score too far off."""
    manifest = engine.bundle.manifest
    score = picture_score(engine, picture_of(engine.bundle, sample))
    verdict, _ = scoring.judge(score, manifest.threshold)
    if verdict is not sample.verdict or not abs(score - sample.score) <= TOLERANCE[engine.precision] * manifest.threshold:
        raise EngineRefused(
            f"bundle {manifest.name}: {sample.file} scores {score:.4g} ({verdict.value}),"
            f" expected {sample.score:.4g} ({sample.verdict.value})",
            hint="the network does not compute here what it did when trained; build or roll out the bundle again",
        )
    return score
