"""How good a bundle is on labelled pictures: detection, localisation, and what its threshold lets through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from edge_inspector import pictures, preprocess, scoring
from edge_inspector.errors import InspectorError
from edge_inspector.frames import Pixels
from edge_inspector.results import Verdict
from edge_inspector.roi import Roi
from edge_inspector.runtime import Engine
from edge_inspector.runtime.engine import judged_tiles

_MAP_PX = 256
"""Longest side at which maps are compared with masks: AUROC and AUPRO hardly depend on it, memory does."""
_PRO_LIMIT = 0.3
_NO_KIND = ("ground_truth", "train")
"""Folders beside those of the kinds, where FOLDER has no test/."""


@dataclass(frozen=True)
class Rate:
    """k of n, with its exact 95 % confidence interval."""

    k: int
    n: int

    @property
    def interval(self) -> tuple[float, float]:
        """Exact 95 % confidence interval."""
        return scoring.interval(self.k, self.n)

    def __str__(self) -> str:
        low, high = self.interval
        share = f"{self.k / self.n:.1%}" if self.n else "none"
        return f"{share} ({self.k} of {self.n}; 95 % interval {low:.1%} to {high:.1%})"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"k": self.k, "n": self.n, "rate": self.k / self.n if self.n else None, "interval95": self.interval}


@dataclass(frozen=True)
class Detection:
    """How well scores tell bad parts from good ones, whatever the threshold. Shares, 0 to 1."""

    auroc: float
    average_precision: float
    max_f1: float
    fpr_at_recall: dict[int, float]
    """False rejects at the threshold that finds 95, 99 and 100 % of the bad parts."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "auroc": self.auroc, "average_precision": self.average_precision, "max_f1": self.max_f1,
            **{f"fpr_at_{recall}_recall": fpr for recall, fpr in self.fpr_at_recall.items()},
        }  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """The figures; None where what they need is missing: good and bad parts, or masks."""

    bundle: str
    threshold: float
    detection: Detection | None
    pixel_auroc: float | None
    aupro: float | None
    false_reject: Rate
    escape: Rate
    escape_by_kind: dict[str, Rate]
    auroc_by_kind: dict[str, float]
    trivial: dict[str, float]
    """AUROC of plain numbers of the picture. Where one is high, the set is easy, or its classes were lit differently."""
    parts: tuple[tuple[Path, str, float], ...]
    """Every picture with its kind and score."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "bundle": self.bundle,
            "threshold": self.threshold,
            "image": self.detection.to_json() if self.detection else None,
            "pixel": {"auroc": self.pixel_auroc, "aupro": self.aupro},
            "false_reject": self.false_reject.to_json(),
            "escape": self.escape.to_json(),
            "by_kind": {
                kind: {"auroc": self.auroc_by_kind.get(kind), "escape": rate.to_json()}
                for kind, rate in self.escape_by_kind.items()
            },
            "trivial_auroc": self.trivial,
        }


def labelled(folder: Path) -> dict[str, list[Path]]:
    """Pictures by kind: subfolder names of FOLDER/test or FOLDER; `good` are the good parts. Raises InspectorError."""
    root = folder / "test" if (folder / "test").is_dir() else folder
    found = [p for p in sorted(root.iterdir()) if p.is_dir() and p.name not in _NO_KIND] if root.is_dir() else []
    kinds = {p.name: pictures.listed(p) for p in found}
    if not kinds:
        raise InspectorError(
            f"{folder}: no labelled pictures", hint="expected subfolders: good/ and one for each kind of defect"
        )
    return kinds


def mask_of(folder: Path, kind: str, path: Path) -> NDArray[np.uint8] | None:
    """The mask [H, W] of a defective picture in FOLDER/ground_truth/KIND: NAME_mask.* or NAME.*, non-zero = defect."""
    for name in (f"{path.stem}_mask", path.stem):
        for suffix in pictures.SUFFIXES:
            candidate = folder / "ground_truth" / kind / f"{name}{suffix}"
            if candidate.is_file():
                mask = pictures.read(candidate)
                return (mask.max(2) if mask.ndim == 3 else mask).astype(bool).astype(np.uint8)
    return None


def detection(good: ArrayLike, bad: ArrayLike) -> Detection:
    """Figures from the scores of good and of bad parts."""
    a, b = np.asarray(good, float), np.asarray(bad, float)
    labels, scores = np.r_[np.zeros(len(a)), np.ones(len(b))], np.r_[a, b]
    order = np.argsort(-scores, kind="stable")
    last = np.r_[np.diff(scores[order]) != 0, True]  # ties are one threshold
    found, called = np.cumsum(labels[order])[last], np.flatnonzero(last) + 1
    precision, recall = found / called, found / len(b)
    ordered = np.sort(b)
    return Detection(
        auroc=scoring.auroc(a, b),
        average_precision=float((np.diff(recall, prepend=0) * precision).sum()),
        max_f1=float((2 * found / (called + len(b))).max()),
        fpr_at_recall={r: float((a >= ordered[int(len(b) * (100 - r) / 100)]).mean()) for r in (95, 99, 100)},
    )


def aupro(maps: Sequence[NDArray[np.float32]], masks: Sequence[NDArray[np.uint8]]) -> float:
    """Area under the per-region-overlap curve up to 30 % false-positive pixels, as a share (Bergmann et al. 2020)."""
    normal = np.sort(np.concatenate([m[mask == 0] for m, mask in zip(maps, masks, strict=True)]))[::-1]
    rates = np.linspace(0, _PRO_LIMIT, 300)
    thresholds = normal[(rates * (len(normal) - 1)).astype(int)]
    overlaps = []
    for m, mask in zip(maps, masks, strict=True):
        count, labels = cv2.connectedComponents(mask, connectivity=8)
        for label in range(1, count):
            values = np.sort(m[labels == label])
            overlaps.append(1 - np.searchsorted(values, thresholds, "right") / len(values))
    curve = np.mean(overlaps, 0)
    return float((curve[1:] + curve[:-1]).mean() / 2)


def _small(image: NDArray[Any], interpolation: int) -> NDArray[Any]:
    scale = _MAP_PX / max(image.shape[:2])
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    return cv2.resize(image, size, interpolation=interpolation)


class Trivial:
    """Plain numbers of a picture; how far they are from those of good parts is a score that any network must beat."""

    NAMES = ("brightness", "contrast", "sharpness", "mean picture")

    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.numbers: list[tuple[float, float, float]] = []
        self.thumbnails: list[NDArray[np.float32]] = []

    def add(self, kind: str, image: Pixels) -> None:
        """Take the numbers of one picture."""
        grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY) if image.ndim == 3 else image
        small = cv2.resize(grey, (64, 64), interpolation=cv2.INTER_AREA).astype(np.float32)
        self.kinds.append(kind)
        self.numbers.append((float(grey.mean()), float(grey.std()), float(cv2.Laplacian(small, cv2.CV_32F).var())))
        self.thumbnails.append(small)

    def auroc(self) -> dict[str, float]:
        """AUROC of each number's distance from the good parts' mean; the good parts are those of the test themselves."""
        good = np.array([kind == "good" for kind in self.kinds])
        if not good.any() or good.all():
            return {}
        numbers, thumbnails = np.array(self.numbers), np.stack(self.thumbnails)
        far = np.abs(numbers - numbers[good].mean(0))
        pictured = np.abs(thumbnails - thumbnails[good].mean(0)).mean((1, 2))
        columns = (*far.T, pictured)
        return {name: scoring.auroc(c[good], c[~good]) for name, c in zip(self.NAMES, columns, strict=True)}


def evaluate(engine: Engine, folder: Path, tick: Callable[[], None] = lambda: None, roi: Roi | None = None) -> Evaluation:
    """Judge every labelled picture, or a region of each, with an open engine. Raises InspectorError, PictureError.

    Masks are looked for in FOLDER/ground_truth; a defective picture without one is left out of the pixel figures.
    """
    manifest = engine.bundle.manifest
    parts, maps, masks, trivial = [], [], [], Trivial()
    for kind, paths in labelled(folder).items():
        for path in paths:
            image = pictures.read(path)
            height, width = image.shape[:2]
            plan = preprocess.Plan(manifest.input, roi or Roi(), height, width, manifest.training.intensity_window)
            preprocess.refuse_unlike(manifest.training, manifest.input, plan.box)
            x, y, w, h = plan.box
            scores, tiles = judged_tiles(engine, plan, image)
            parts.append((path, kind, float(scores.max())))
            trivial.add(kind, image[y : y + h, x : x + w])
            mask = np.zeros((height, width), np.uint8) if kind == "good" else mask_of(folder, kind, path)
            if mask is not None and mask.shape == (height, width):
                maps.append(_small(plan.stitched(tiles), cv2.INTER_LINEAR).astype(np.float32))
                inside = mask[y : y + h, x : x + w].astype(np.float32)
                masks.append((_small(inside, cv2.INTER_AREA) > 0).astype(np.uint8))
            tick()
    return _figures(manifest.name, manifest.release, manifest.threshold, parts, (maps, masks), trivial.auroc())


def _figures(
    name: str, release: int, threshold: float, parts: list[tuple[Path, str, float]],
    pixels: tuple[list[NDArray[np.float32]], list[NDArray[np.uint8]]], trivial: dict[str, float],
) -> Evaluation:  # fmt: skip
    kinds: dict[str, list[float]] = {}
    for _, kind, score in parts:
        kinds.setdefault(kind, []).append(score)
    good = kinds.pop("good", [])
    bad = [score for scores in kinds.values() for score in scores]
    maps, masks = pixels
    masked = any(mask.any() for mask in masks)

    def escaped(scores: list[float]) -> Rate:
        return Rate(sum(scoring.judge(score, threshold)[0] is not Verdict.FAIL for score in scores), len(scores))

    flat = [np.concatenate([a.ravel() for a in arrays]) for arrays in (maps, masks)] if masked else []
    return Evaluation(
        bundle=f"{name}-{release}",
        threshold=threshold,
        detection=detection(good, bad) if good and bad else None,
        pixel_auroc=scoring.auroc(flat[0][flat[1] == 0], flat[0][flat[1] == 1]) if masked else None,
        aupro=aupro(maps, masks) if masked else None,
        false_reject=Rate(len(good) - escaped(good).k, len(good)),
        escape=escaped(bad),
        escape_by_kind={kind: escaped(scores) for kind, scores in kinds.items()},
        auroc_by_kind={kind: scoring.auroc(good, scores) for kind, scores in kinds.items()} if good else {},
        trivial=trivial,
        parts=tuple(parts),
    )
