"""How good a bundle is on labelled pictures: detection, localisation, and what its threshold lets through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from edge_inspector import formats, pictures, preprocess, scoring
from edge_inspector.errors import InspectorError, PictureError
from edge_inspector.frames import Pixels
from edge_inspector.results import Region, Verdict
from edge_inspector.roi import Roi
from edge_inspector.runtime import Engine
from edge_inspector.runtime.engine import judged_tiles

_MAP_PX = 256
"""Longest side at which maps are compared with masks: AUROC and AUPRO hardly depend on it, memory does."""
_PRO_LIMIT = 0.3
GOOD = "good"
_GOOD = {GOOD, "ok", "normal", "pass", "passed", "io", "i.o.", "gut", "healthy", "defect-free", "defect_free", "ok_front"}
"""What people call folders of good parts."""
_DEFECTIVE = {
    "bad",
    "ng",
    "nok",
    "nio",
    "n.i.o.",
    "fail",
    "failed",
    "defect",
    "defects",
    "defective",
    "anomaly",
    "reject",
    "rejects",
}
"""What people call folders of parts that are not good, where they do not name the kind."""
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
    notes: tuple[str, ...] = ()
    """What is not judged, and other things to know before the figures."""
    unreadable: tuple[tuple[Path, str], ...] = ()
    """Pictures that could not be judged, and why."""
    doubtful: tuple[pictures.LeftOut, ...] = ()
    """What may be a part that nobody looked at."""

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
            "notes": list(self.notes),
            "unreadable": [why for _, why in self.unreadable],
        }


@dataclass(frozen=True)
class Labelled:
    """Labelled pictures: of each kind, with what the folders hold besides."""

    folder: Path
    kinds: dict[str, tuple[Path, ...]]
    """`good` first where there are good parts; every other name is a kind of defect."""
    left_out: tuple[pictures.LeftOut, ...]
    notes: tuple[str, ...]
    """What a person should know before the figures."""

    @property
    def doubtful(self) -> tuple[pictures.LeftOut, ...]:
        """What may be a part that nobody looked at."""
        return tuple(one for one in self.left_out if not one.harmless)


def labelled(folder: Path) -> Labelled:
    """Pictures by kind: subfolders of FOLDER/test or FOLDER. Raises InspectorError where it is not clear which are good.

    The folder of the good parts is `good`, `ok`, `normal` or the like, in any case of letters.
    """
    root = folder / "test" if (folder / "test").is_dir() else folder
    subfolders, left_out = _subfolders(root)
    good = [path for path in subfolders if path.name.casefold() in _GOOD]
    if len(good) > 1:
        names = " and ".join(pictures.printable(path.name) for path in good)
        raise InspectorError(f"{folder}: {names} are both folders of good parts", hint="move the good parts into one folder")
    listings = {GOOD if path in good else pictures.printable(path.name): pictures.listed(path) for path in (*good, *subfolders)}
    if not listings:
        raise InspectorError(
            f"{folder}: no labelled pictures", hint="expected subfolders: good/ and one for each kind of defect"
        )
    _refuse_unclear(folder, set(listings))
    left_out += [one for listing in listings.values() for one in listing.left_out]
    notes = [line for listing in listings.values() for line in listing.told]
    if not good:
        notes.append(f"no good parts are there (no folder {GOOD}/): only defective ones are judged")
    return Labelled(folder, {kind: listing.taken for kind, listing in listings.items()}, tuple(left_out), tuple(notes))


def _subfolders(root: Path) -> tuple[list[Path], list[pictures.LeftOut]]:
    """The folders of kinds, and what lies beside them: pictures there have no label."""
    if not root.is_dir():
        return [], []
    found = pictures.listing(root)
    beside = [path for path in found.taken if path.parent == root]
    left_out = [pictures.LeftOut(path, "beside the folders of kinds: it has no label", harmless=False) for path in beside]
    left_out += [one for one in found.left_out if one.path.parent == root]
    hidden = {one.path for one in found.left_out}
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and path not in hidden]
    return [path for path in folders if path.name not in _NO_KIND], left_out


def _refuse_unclear(folder: Path, kinds: set[str]) -> None:
    """Raise InspectorError where no folder is known to hold good parts and one of them might: no defect is called so."""
    doubtful = sorted(kind for kind in kinds if kind.casefold() in _DEFECTIVE)
    others = sorted(kinds - set(doubtful))
    if GOOD not in kinds and doubtful and others:
        raise InspectorError(
            f"{folder}: no folder of good parts; found {', '.join([*others, *doubtful])}",
            hint=f"name the folder of the good parts {GOOD}, and leave the others as kinds of defects",
        )


def mask_of(folder: Path, kind: str, path: Path) -> NDArray[np.uint8] | None:
    """The mask [H, W] of a defective picture in FOLDER/ground_truth/KIND: NAME_mask.* or NAME.*; 1 where its defect is.

    Raises PictureError for one that cannot be read.
    """
    return mask_beside(folder / "ground_truth" / kind, path)


def mask_beside(place: Path, path: Path) -> NDArray[np.uint8] | None:
    """The mask of a picture in a folder of masks: NAME_mask.* or NAME.*. Raises PictureError."""
    names = [f"{path.stem}_mask", path.stem]
    found = [other for name in names for other in sorted(place.glob(f"{escape(name)}.*")) if pictures.is_picture(other)]
    return _mask(found[0]) if found else None


def _mask(path: Path) -> NDArray[np.uint8]:
    """A picture of a mask -> [H, W] of 0 and 1. Raises PictureError.

    From half of white on a pixel is defect, so that noise of JPEG and soft edges are not; numbers of classes count all.
    """
    data = pictures.content(path)
    image = pictures.decode(data, str(path))
    levels = image.max(2) if image.ndim == 3 else image
    half = (int(np.iinfo(levels.dtype).max) + 1) // 2
    soft = formats.is_lossy(data) or int(levels.max(initial=0)) >= half
    return (levels >= (half if soft else 1)).astype(np.uint8)


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
        good = np.array([kind == GOOD for kind in self.kinds])
        if not good.any() or good.all():
            return {}
        numbers, thumbnails = np.array(self.numbers), np.stack(self.thumbnails)
        far = np.abs(numbers - numbers[good].mean(0))
        pictured = np.abs(thumbnails - thumbnails[good].mean(0)).mean((1, 2))
        columns = (*far.T, pictured)
        return {name: scoring.auroc(c[good], c[~good]) for name, c in zip(self.NAMES, columns, strict=True)}


@dataclass(frozen=True)
class Wrong:
    """A part that was judged wrongly, with what a person needs to see why. Pixels are those of the region."""

    path: Path
    name: str
    """KIND/NAME: what the part is called."""
    kind: str
    score: float
    threshold: float
    seen: Pixels
    anomaly: NDArray[np.float32]
    regions: tuple[Region, ...]
    offset_px: tuple[int, int]


def evaluate(
    engine: Engine,
    folder: Path,
    tick: Callable[[], None] = lambda: None,
    roi: Roi | None = None,
    wrong: Callable[[Wrong], None] = lambda _: None,
) -> Evaluation:
    """Judge every labelled picture, or a region of each, with an open engine. Raises InspectorError, PictureError.

    Masks are looked for in FOLDER/ground_truth; a defective picture without one is left out of the pixel figures. A picture
    that cannot be read is told in `unreadable`. `wrong` is told each part that is judged wrongly.
    """
    manifest, given = engine.bundle.manifest, labelled(folder)
    judged = _Judged(engine, given, roi or Roi(), wrong)
    for kind, paths in given.kinds.items():
        for path, name in zip(paths, pictures.part_names(paths, folder), strict=True):
            judged.take(kind, path, name)
            tick()
    figures = _figures(
        manifest.name, manifest.release, manifest.threshold, judged.parts, (judged.maps, judged.masks), judged.trivial.auroc()
    )
    return replace(figures, notes=given.notes, unreadable=tuple(judged.unreadable), doubtful=given.doubtful)


class _Judged:
    """What comes out for labelled pictures, one after the other."""

    def __init__(self, engine: Engine, given: Labelled, roi: Roi, wrong: Callable[[Wrong], None]) -> None:
        self._engine, self._given, self._roi, self._wrong = engine, given, roi, wrong
        self.parts: list[tuple[Path, str, float]] = []
        self.unreadable: list[tuple[Path, str]] = []
        self.maps: list[NDArray[np.float32]] = []
        self.masks: list[NDArray[np.uint8]] = []
        self.trivial = Trivial()

    def take(self, kind: str, path: Path, name: str) -> None:
        """Judge one picture. Raises FormatError for one that the bundle is not for."""
        try:
            image = pictures.read(path)
        except PictureError as error:
            self.unreadable.append((path, error.message))
            return
        bundle = self._engine.bundle
        manifest = bundle.manifest
        height, width = image.shape[:2]
        plan = preprocess.Plan(manifest.input, self._roi, height, width, manifest.training.intensity_window)
        preprocess.refuse_camera(bundle, image)
        preprocess.refuse_unlike(manifest, plan.box)
        x, y, w, h = plan.box
        scores, tiles = judged_tiles(self._engine, plan, image)
        score, anomaly = float(scores.max()), plan.stitched(tiles).astype(np.float32)
        self.parts.append((path, kind, score))
        self.trivial.add(kind, image[y : y + h, x : x + w])
        self._compared(kind, path, plan, anomaly)
        failed = scoring.judge(score, manifest.threshold)[0] is Verdict.FAIL
        if failed == (kind == GOOD):
            regions = plan.regions(anomaly, manifest.threshold, None) if failed else ()
            seen = image[y : y + h, x : x + w]
            self._wrong(Wrong(path, name, kind, score, manifest.threshold, seen, anomaly, regions, (x, y)))

    def _compared(self, kind: str, path: Path, plan: preprocess.Plan, anomaly: NDArray[np.float32]) -> None:
        """Keep map and mask of a picture that has a mask, or needs none."""
        mask = np.zeros(plan.size, np.uint8) if kind == GOOD else mask_of(self._given.folder, kind, path)
        if mask is None:
            return
        if mask.shape != plan.size:
            found, expected = f"{mask.shape[1]}x{mask.shape[0]}", f"{plan.size[1]}x{plan.size[0]}"
            raise PictureError(
                f"{path}: its mask is {found} px, expected {expected}", hint="save the mask in the picture's size"
            )
        x, y, w, h = plan.box
        self.maps.append(_small(anomaly, cv2.INTER_LINEAR).astype(np.float32))
        inside = mask[y : y + h, x : x + w].astype(np.float32)
        self.masks.append((_small(inside, cv2.INTER_AREA) > 0).astype(np.uint8))


def _figures(
    name: str, release: int, threshold: float, parts: list[tuple[Path, str, float]],
    pixels: tuple[list[NDArray[np.float32]], list[NDArray[np.uint8]]], trivial: dict[str, float],
) -> Evaluation:  # fmt: skip
    kinds: dict[str, list[float]] = {}
    for _, kind, score in parts:
        kinds.setdefault(kind, []).append(score)
    good = kinds.pop(GOOD, [])
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
