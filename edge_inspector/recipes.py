"""Recipes: what is judged on each camera for one product, and how findings become a verdict."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from typing import Annotated

from pydantic import model_validator

from edge_inspector.results import Finding, Reason, RecipeRef, Verdict
from edge_inspector.roi import Roi
from edge_inspector.schema import Field, Model

Id = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", max_length=64)]
Level = Annotated[int, Field(ge=0, le=65535)]


class RoiRecipe(Roi):
    """One region of interest: its shape (none: the whole frame) and the bundle that judges it."""

    bundle: Id
    threshold: float | None = Field(None, gt=0, description="overrides the bundle's own threshold")

    @property
    def shape(self) -> Roi:
        """The region without its bundle."""
        return Roi(rectangle=self.rectangle, polygon=self.polygon)


class CameraRecipe(Model):
    """What is judged in the frames of one camera."""

    rois: dict[Id, RoiRecipe] = Field(min_length=1, max_length=32)
    intensity_window: tuple[Level, Level] | None = Field(
        None, description="intensities that become 0 and 255; needed for 10 to 16 bit, e.g. [0, 4095] for 12 bit"
    )
    mm_per_px: float | None = Field(None, gt=0, description="scale, so that areas are told in mm² too")

    @model_validator(mode="after")
    def _window_rises(self) -> CameraRecipe:
        if self.intensity_window is not None and self.intensity_window[0] >= self.intensity_window[1]:
            raise ValueError("intensity_window must rise: [low, high]")
        return self


class Decision(Model):
    """A part fails when at least `failing_frames` of `frames` frames have a failing finding. 1 of 1: the worst finding."""

    frames: int = Field(1, ge=1, le=16)
    failing_frames: int = Field(1, ge=1, le=16)

    @model_validator(mode="after")
    def _possible(self) -> Decision:
        if self.failing_frames > self.frames:
            raise ValueError(f"failing_frames ({self.failing_frames}) is more than frames ({self.frames})")
        return self


class Recipe(Model):
    """How one product is inspected."""

    cameras: dict[Id, CameraRecipe] = Field(min_length=1, max_length=16)
    decision: Decision = Decision()

    @property
    def bundles(self) -> set[str]:
        """Names of the bundles that it uses."""
        return {roi.bundle for camera in self.cameras.values() for roi in camera.rois.values()}

    def reference(self, identity: str) -> RecipeRef:
        """Its id with the hash of its content."""
        return RecipeRef(id=identity, hash=hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:12])


def decide(findings: Iterable[Finding], decision: Decision) -> tuple[Verdict, Reason]:
    """Findings of one part -> its verdict. Never `pass` while an undecided finding could have changed it."""
    frames: dict[int, list[Finding]] = defaultdict(list)
    for finding in findings:
        frames[finding.frame].append(finding)
    failing = sum(any(f.verdict is Verdict.FAIL for f in frame) for frame in frames.values())
    if failing >= decision.failing_frames:
        return Verdict.FAIL, Reason.ABOVE_THRESHOLD
    open_ones = [
        next(f for f in frame if f.verdict is Verdict.UNDECIDED)
        for frame in frames.values()
        if any(f.verdict is Verdict.UNDECIDED for f in frame) and not any(f.verdict is Verdict.FAIL for f in frame)
    ]
    missing = decision.frames - len(frames)
    if failing + len(open_ones) + missing >= decision.failing_frames:
        return Verdict.UNDECIDED, open_ones[0].reason if open_ones else Reason.MISSING_IMAGE
    return Verdict.PASS, Reason.BELOW_THRESHOLD
