"""One inspection: frames of a part in, findings and verdict out. No camera, no broker, no wall clock."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edge_inspector import preprocess, scoring
from edge_inspector.errors import EngineError
from edge_inspector.frames import Frame, Pixels
from edge_inspector.recipes import CameraRecipe, Recipe, RoiRecipe, decide
from edge_inspector.results import (
    MAX_REGIONS,
    BundleRef,
    EngineRef,
    Finding,
    Reason,
    Times,
    Verdict,
)  # fmt: skip
from edge_inspector.runtime import Engine


@dataclass(frozen=True)
class View:
    """What a finding looked at, for the picture that explains it. All in pixels of the region of interest."""

    finding: Finding
    seen: Pixels
    anomaly: NDArray[np.float32]
    expected: NDArray[np.uint8] | None
    offset_px: tuple[int, int]


@dataclass(frozen=True)
class Inspection:
    """The outcome for one part."""

    verdict: Verdict
    reason: Reason
    detail: str = ""
    findings: tuple[Finding, ...] = ()
    times_ms: Times = field(default_factory=Times)
    views: tuple[View, ...] = ()
    """Of the failing findings; empty when nothing failed."""


class Inspector:
    """Applies one recipe with open engines. Plans and buffers are kept from part to part."""

    def __init__(self, recipe: Recipe, engines: Mapping[str, Engine]) -> None:
        """`engines` holds an open engine for each of the recipe's bundles, by bundle name. Used from one thread."""
        self.recipe, self.engines = recipe, engines
        self._plans: dict[tuple[str, str], preprocess.Plan] = {}

    def inspect(self, frames: Mapping[str, Sequence[Frame]]) -> Inspection:
        """Judge one part. `frames` holds for each camera of the recipe as many frames as its decision needs.

        Whatever cannot be judged is `undecided` with its reason; nothing here raises for a bad frame or a bad score.
        """
        clock = _Clock()
        findings: list[Finding] = []
        views: list[View] = []
        detail = ""
        for camera, recipe in self.recipe.cameras.items():
            for number, frame in enumerate(frames.get(camera, ())):
                for roi_name, roi in recipe.rois.items():
                    finding, view, why = self._judged(camera, recipe, roi_name, roi, number, frame, clock)
                    findings.append(finding)
                    detail = detail or why
                    if view is not None:
                        views.append(view)
        missing = [c for c in self.recipe.cameras if len(frames.get(c, ())) < self.recipe.decision.frames]
        verdict, reason = decide(findings, self.recipe.decision)
        if missing and verdict is not Verdict.FAIL:
            verdict, reason = Verdict.UNDECIDED, Reason.MISSING_IMAGE
            detail = f"no image of camera {', '.join(missing)}"
        times = Times(preprocess=clock.preprocess_ms, infer=clock.infer_ms, decide=clock.rest_ms())
        return Inspection(verdict, reason, detail, tuple(findings), times, tuple(views))

    def _judged(
        self, camera: str, recipe: CameraRecipe, roi_name: str, roi: RoiRecipe, number: int, frame: Frame, clock: _Clock
    ) -> tuple[Finding, View | None, str]:
        engine = self.engines[roi.bundle]
        manifest = engine.bundle.manifest
        threshold = roi.threshold or manifest.threshold

        def found(verdict: Verdict, reason: Reason, score: float | None = None) -> Finding:
            return Finding(
                camera=camera, roi=roi_name, frame=number, verdict=verdict, reason=reason, score=score,
                threshold=threshold, ratio=None if score is None else round(score / threshold, 4),
                bundle=BundleRef(name=manifest.name, release=manifest.release, sha256=engine.bundle.sha256[:12]),
                engine=EngineRef(runtime=engine.runtime, precision=engine.precision),
            )  # fmt: skip

        if frame.fault:
            return found(Verdict.UNDECIDED, Reason(frame.fault)), None, frame.fault_detail
        try:
            plan = self._plan(camera, recipe, roi_name, roi, frame, engine)
            scores, maps, expected = _run(plan, engine, frame.image, clock)
        except preprocess.FormatError as error:
            return found(Verdict.UNDECIDED, Reason.WRONG_FORMAT), None, error.message
        except EngineError as error:
            return found(Verdict.UNDECIDED, Reason.ENGINE_FAULT), None, error.message
        score = float(scores.max())
        verdict, reason = scoring.judge(score, threshold)
        if verdict is Verdict.UNDECIDED:
            return found(verdict, reason), None, f"score {score}"
        finding = found(verdict, reason, round(score, 5))
        if verdict is Verdict.PASS:
            return finding, None, ""
        anomaly = plan.stitched(maps)
        regions = plan.regions(anomaly, threshold, recipe.mm_per_px)
        finding = finding.model_copy(
            update={"regions": regions[:MAX_REGIONS], "regions_omitted": max(0, len(regions) - MAX_REGIONS)}
        )
        x, y, w, h = plan.box
        drawn = plan.stitched(expected) if expected is not None else None
        return finding, View(finding, frame.image[y : y + h, x : x + w], anomaly, drawn, (x, y)), ""

    def _plan(
        self, camera: str, recipe: CameraRecipe, roi_name: str, roi: RoiRecipe, frame: Frame, engine: Engine
    ) -> preprocess.Plan:
        plan = self._plans.get((camera, roi_name))
        if plan is None or plan.size != frame.image.shape[:2]:
            manifest = engine.bundle.manifest
            height, width = frame.image.shape[:2]
            plan = preprocess.Plan(manifest.input, roi.shape, height, width, recipe.intensity_window)
            preprocess.refuse_unlike(manifest.training, manifest.input, plan.box)
            self._plans[camera, roi_name] = plan
        return plan


def _run(
    plan: preprocess.Plan, engine: Engine, image: Pixels, clock: _Clock
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.uint8] | None]:
    """All tiles of a region through the engine, in as many batches as it takes."""
    total = len(plan.tiles)
    if total <= engine.batch:
        with clock.preprocess():
            plan.fill(image, engine.images, engine.valid)
        with clock.infer():
            out = engine()
        return out.score[:total], out.map[:total], None if out.expected is None else out.expected[:total]
    with clock.preprocess():
        images, valid = plan.buffers()
        plan.fill(image, images, valid)
    scores, maps, expected = [], [], []
    for start in range(0, total, engine.batch):
        n = min(engine.batch, total - start)
        with clock.preprocess():
            engine.images[:n], engine.valid[:n] = images[start : start + n], valid[start : start + n]
        with clock.infer():
            out = engine()
        scores.append(out.score[:n].copy())
        maps.append(out.map[:n].copy())
        if out.expected is not None:
            expected.append(out.expected[:n].copy())
    return np.concatenate(scores), np.concatenate(maps), np.concatenate(expected) if expected else None


class _Clock:
    """Durations of the stages, in milliseconds."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.preprocess_ms = 0.0
        self.infer_ms = 0.0

    def preprocess(self) -> _Stopwatch:
        return _Stopwatch(self, "preprocess_ms")

    def infer(self) -> _Stopwatch:
        return _Stopwatch(self, "infer_ms")

    def rest_ms(self) -> float:
        passed = (time.perf_counter() - self._began) * 1e3
        self.preprocess_ms, self.infer_ms = round(self.preprocess_ms, 2), round(self.infer_ms, 2)
        return round(max(0.0, passed - self.preprocess_ms - self.infer_ms), 2)


class _Stopwatch:
    def __init__(self, clock: _Clock, stage: str) -> None:
        self._clock, self._stage = clock, stage

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        passed = (time.perf_counter() - self._began) * 1e3
        setattr(self._clock, self._stage, getattr(self._clock, self._stage) + passed)
