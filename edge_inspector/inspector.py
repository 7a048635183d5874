"""One inspection: frames of a part in, findings and verdict out. No camera, no broker, no wall clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edge_inspector import preprocess, scoring
from edge_inspector.config import LineConfig, StationConfig
from edge_inspector.errors import EngineError, EngineLost
from edge_inspector.frames import Frame, Pixels
from edge_inspector.messages import EngineState
from edge_inspector.recipes import Recipe, RoiRecipe, decide
from edge_inspector.results import (
    MAX_REGIONS,
    BundleRef,
    ConfigurationRef,
    EngineRef,
    Finding,
    Reason,
    RecipeRef,
    Times,
    Verdict,
)  # fmt: skip
from edge_inspector.roi import Roi
from edge_inspector.runtime import Engine, Outputs

_LARGEST_PX = 1 << 17
"""Beyond every corner that a region may have."""
_PROMISE_CHARACTERS = 400


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
    """Of the failing findings, or of all where that was asked for."""
    lost: EngineLost | None = None
    """The GPU has failed: nothing will be judged by this process any more."""


@dataclass
class _Job:
    """One region of one frame, on its way to a finding."""

    camera: str
    roi_name: str
    roi: RoiRecipe
    number: int
    frame: Frame
    mm_per_px: float | None
    engine: Engine
    plan: preprocess.Plan | None = None
    outputs: Outputs | None = None
    """Of its tiles."""
    refused: tuple[Reason, str] | None = None
    """Why it cannot be judged."""
    broken_promise: str = ""
    """Why its bundle's rates do not hold for it."""


class Inspector:
    """Applies one recipe with open engines. Plans and buffers are kept from part to part."""

    def __init__(self, recipe: Recipe, engines: Mapping[str, Engine], *, explain_all: bool = False) -> None:
        """`engines` holds an open engine for each of the recipe's bundles, by bundle name. Used from one thread.

        `explain_all`: passing findings are explained as well, which takes time.
        """
        self.recipe, self.engines, self._explain_all = recipe, engines, explain_all
        self._plans: dict[tuple[str, str], preprocess.Plan] = {}
        self.broken_promises = {
            (camera, roi): self._broken(camera, roi, None) for camera, of in recipe.cameras.items() for roi in of.rois
        }
        """For each camera and region why its bundle's rates do not hold; its size counts from its first frame on."""

    def _broken(self, camera: str, roi_name: str, plan: preprocess.Plan | None) -> str:
        of_camera = self.recipe.cameras[camera]
        roi = of_camera.rois[roi_name]
        manifest, box = self.engines[roi.bundle].bundle.manifest, plan.box if plan else _known_box(roi)
        return preprocess.broken_promise(manifest, roi.shape, roi.threshold, of_camera.intensity_window, box)

    @property
    def misfit(self) -> preprocess.FormatError | None:
        """What is wrong with a rectangle or polygon of another size than its bundle was trained on, where one is."""
        for camera, of_camera in self.recipe.cameras.items():
            for name, roi in of_camera.rois.items():
                manifest, box = self.engines[roi.bundle].bundle.manifest, _known_box(roi)
                try:
                    if box is not None:
                        preprocess.refuse_unlike(manifest, box)
                except preprocess.FormatError as error:
                    return preprocess.FormatError(f"{camera}/{name}: {error.message}", hint=error.hint)
        return None

    @property
    def promise(self) -> str:
        """Why what the bundles promise does not hold in this recipe, and where; empty where it does."""
        return "; ".join(f"{camera}/{roi} {why}" for (camera, roi), why in self.broken_promises.items() if why)

    @property
    def finds(self) -> float | None:
        """The smallest share of drawn defects that one of its bundles finds at its own threshold; None: not known of one."""
        regions = [roi for camera in self.recipe.cameras.values() for roi in camera.rois.values()]
        rates = [self.engines[roi.bundle].bundle.manifest.rates if roi.threshold is None else None for roi in regions]
        shares = [rate.found if rate is not None else None for rate in rates]
        return _smallest(shares)

    def inspect(self, frames: Mapping[str, Sequence[Frame]]) -> Inspection:
        """Judge one part. `frames` holds for each camera of the recipe as many frames as its decision needs.

        All regions that one bundle judges, of all cameras, go through its network together. Whatever cannot be judged is
        `undecided` with its reason; nothing here raises for a bad frame or a bad score.
        """
        clock = _Clock()
        jobs = [
            _Job(camera, roi_name, roi, number, frame, recipe.mm_per_px, self.engines[roi.bundle])
            for camera, recipe in self.recipe.cameras.items()
            for number, frame in enumerate(frames.get(camera, ()))
            for roi_name, roi in recipe.rois.items()
        ]
        with clock.preprocess():
            for job in jobs:
                self._planned(job)
        lost = None
        for name, engine in self.engines.items():
            try:
                _judge([job for job in jobs if job.roi.bundle == name and job.plan is not None], engine, clock)
            except EngineLost as error:
                lost = error
        found = [_found(job, explain=self._explain_all) for job in jobs]
        findings = tuple(finding for finding, _ in found)
        missing = [c for c in self.recipe.cameras if len(frames.get(c, ())) < self.recipe.decision.frames]
        verdict, reason = decide(list(findings), self.recipe.decision)
        detail = next((job.refused[1] for job in jobs if job.refused is not None), "")
        if missing and verdict is not Verdict.FAIL:
            verdict, reason = Verdict.UNDECIDED, Reason.MISSING_IMAGE
            detail = f"no image of camera {', '.join(missing)}"
        times = Times(preprocess=clock.preprocess_ms, infer=clock.infer_ms, decide=clock.rest_ms())
        views = tuple(view for _, view in found if view is not None)
        return Inspection(verdict, reason, detail, findings, times, views, lost)

    def _planned(self, job: _Job) -> None:
        if job.frame.fault:
            job.refused = Reason(job.frame.fault), job.frame.fault_detail
            return
        plan = self._plans.get((job.camera, job.roi_name))
        height, width = job.frame.image.shape[:2]
        try:
            if plan is None or plan.size != (height, width):
                manifest, window = job.engine.bundle.manifest, self.recipe.cameras[job.camera].intensity_window
                plan = preprocess.Plan(manifest.input, job.roi.shape, height, width, window)
                preprocess.refuse_unlike(manifest, plan.box)
                self._plans[job.camera, job.roi_name] = plan
                self.broken_promises[job.camera, job.roi_name] = self._broken(job.camera, job.roi_name, plan)
            preprocess.refuse_camera(job.engine.bundle, job.frame.image)
            job.plan, job.broken_promise = plan, self.broken_promises[job.camera, job.roi_name]
        except preprocess.FormatError as error:
            job.refused = Reason.WRONG_FORMAT, error.message


def _smallest(shares: Sequence[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return min(known) if known and len(known) == len(shares) else None


def _known_box(roi: RoiRecipe) -> preprocess.Box | None:
    """The box of a shape, whatever the frame; None for all of a frame that has not come."""
    return None if roi.shape == Roi() else roi.shape.box(_LARGEST_PX, _LARGEST_PX)


def _judge(jobs: list[_Job], engine: Engine, clock: _Clock) -> None:
    """Tiles of many regions through one network, in as few batches as they fit into; outputs lie in the jobs then.

    Raises EngineLost; any other failure of the engine is written into the jobs it concerns.
    """
    several = sum(len(job.plan.tiles) for job in jobs if job.plan is not None) > engine.batch
    waiting: list[tuple[_Job, int, int]] = []
    at = 0
    for job in jobs:
        assert job.plan is not None
        count = len(job.plan.tiles)
        if at + count > engine.batch:
            _run(waiting, engine, clock, keep=several)
            waiting, at = [], 0
        try:
            if count > engine.batch:
                _run_in_pieces(job, job.plan, engine, clock)
                continue
            with clock.preprocess():
                job.plan.fill(job.frame.image, engine.images[at : at + count], engine.valid[at : at + count])
        except preprocess.FormatError as error:
            job.refused = Reason.WRONG_FORMAT, error.message
            continue
        waiting.append((job, at, at + count))
        at += count
    _run(waiting, engine, clock, keep=several)


def _run(waiting: list[tuple[_Job, int, int]], engine: Engine, clock: _Clock, *, keep: bool) -> None:
    """Run the engine on what lies in its buffers. `keep`: it will run again before the outputs are looked at."""
    if not waiting:
        return
    try:
        with clock.infer():
            outputs = engine()
    except EngineError as error:
        for job, _, _ in waiting:
            job.refused = Reason.ENGINE_FAULT, error.message
        if isinstance(error, EngineLost):
            raise
        return
    for job, start, stop in waiting:
        part = outputs.part(start, stop)
        job.outputs = part.copy() if keep else part


def _run_in_pieces(job: _Job, plan: preprocess.Plan, engine: Engine, clock: _Clock) -> None:
    """All tiles of a region that is larger than a batch."""
    with clock.preprocess():
        images, valid = plan.buffers()
        plan.fill(job.frame.image, images, valid)
    pieces: list[Outputs] = []
    for start in range(0, len(images), engine.batch):
        count = len(images[start : start + engine.batch])
        with clock.preprocess():
            engine.images[:count], engine.valid[:count] = images[start : start + count], valid[start : start + count]
        job.outputs = None
        _run([(job, 0, count)], engine, clock, keep=True)
        if job.outputs is None:
            return
        pieces.append(job.outputs)
    job.outputs = Outputs.joined(pieces)


def _found(job: _Job, *, explain: bool) -> tuple[Finding, View | None]:
    """What came out for one region; for a failing one, what explains it; `explain`: for a passing one, too."""
    manifest = job.engine.bundle.manifest
    threshold = job.roi.threshold or manifest.threshold

    def finding(verdict: Verdict, reason: Reason, score: float | None = None) -> Finding:
        return Finding(
            camera=job.camera, roi=job.roi_name, frame=job.number, verdict=verdict, reason=reason, score=score,
            threshold=threshold, ratio=None if score is None else round(score / threshold, 4),
            bundle=BundleRef(name=manifest.name, release=manifest.release, sha256=job.engine.bundle.sha256[:12]),
            engine=EngineRef(runtime=job.engine.runtime, precision=job.engine.precision),
            promise=job.broken_promise or None,
        )  # fmt: skip

    plan, outputs = job.plan, job.outputs
    if job.refused is not None or plan is None or outputs is None:
        return finding(Verdict.UNDECIDED, job.refused[0] if job.refused else Reason.ENGINE_FAULT), None
    score = float(outputs.score.max())
    verdict, reason = scoring.judge(score, threshold)
    if verdict is Verdict.UNDECIDED:
        job.refused = reason, f"score {score}"
        return finding(verdict, reason), None
    if verdict is Verdict.PASS and not explain:
        return finding(verdict, reason, round(score, 5)), None
    anomaly = plan.stitched(outputs.map)
    regions = plan.regions(anomaly, threshold, job.mm_per_px) if verdict is Verdict.FAIL else ()
    shown = {"regions": regions[:MAX_REGIONS], "regions_omitted": max(0, len(regions) - MAX_REGIONS)}
    judged = finding(verdict, reason, round(score, 5)).model_copy(update=shown)
    x, y, w, h = plan.box
    drawn = plan.stitched(outputs.expected) if outputs.expected is not None else None
    return judged, View(judged, job.frame.image[y : y + h, x : x + w], anomaly, drawn, (x, y))


@dataclass(frozen=True)
class Inspectors:
    """What judges the parts of one station under one configuration."""

    by_recipe: Mapping[str, tuple[Inspector, RecipeRef]]
    engines: Mapping[str, Engine]
    """By bundle."""
    configuration: ConfigurationRef

    @property
    def states(self) -> dict[str, EngineState]:
        """What runs each bundle."""
        return {
            name: EngineState(
                runtime=engine.runtime,
                precision=engine.precision,
                instead=engine.instead,
                release=engine.bundle.manifest.release,
                sha256=engine.bundle.sha256[:12],
            )  # fmt: skip
            for name, engine in self.engines.items()
        }

    @property
    def finds(self) -> float | None:
        """The smallest share of drawn defects that a bundle of these recipes finds; None: not known of one."""
        return _smallest([inspector.finds for inspector, _ in self.by_recipe.values()])

    @property
    def promise(self) -> str:
        """Why what the bundles promise does not hold in these recipes, and where; empty where it does."""
        told = {recipe_id: inspector.promise for recipe_id, (inspector, _) in self.by_recipe.items()}
        return "; ".join(f"recipe {recipe_id}, {why}" for recipe_id, why in told.items() if why)[:_PROMISE_CHARACTERS]

    @classmethod
    def of(cls, station: StationConfig, line: LineConfig, open_engine: Callable[[str], Engine]) -> Inspectors:
        """An inspector for each recipe of the station. `open_engine`: bundle name -> open engine. Raises InspectorError."""
        by_recipe: dict[str, tuple[Inspector, RecipeRef]] = {}
        engines: dict[str, Engine] = {}
        for recipe_id in dict.fromkeys(station.products.values()):
            recipe = line.recipes[recipe_id]
            for bundle in sorted(recipe.bundles - set(engines)):
                engines[bundle] = open_engine(bundle)
            by_recipe[recipe_id] = (Inspector(recipe, engines), recipe.reference(recipe_id))
        unfit = [inspector.misfit for inspector, _ in by_recipe.values()]
        if all(unfit) and unfit[0] is not None:  # no product could be judged
            raise unfit[0]
        return cls(by_recipe, engines, line.reference())


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
