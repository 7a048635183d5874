"""Folder of good parts -> signed bundle: audit, fit, calibrate, export, check, report."""

from __future__ import annotations

import hashlib
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch

from edge_inspector import bundles, pictures, preprocess, scoring
from edge_inspector.bundles import (
    NAME_PATTERN,
    Bundle,
    Calibration,
    FileEntry,
    InputSpec,
    Manifest,
    PictureKind,
    Rates,
    Sample,
    TrainedOn,
)
from edge_inspector.errors import InspectorError, TrainingError
from edge_inspector.frames import utc_now
from edge_inspector.preprocess import Window
from edge_inspector.results import Verdict
from edge_inspector.roi import Roi
from edge_inspector.runtime import OnnxEngine, judge_samples
from edge_inspector.signatures import Ed25519PrivateKey
from edge_inspector.training import audit, calibrate, data, export, limits, report
from edge_inspector.training.networks import Family, Fitted, Half
from edge_inspector.training.networks.feature_fit import FeatureAnogan
from edge_inspector.training.run import Progress, Run, key_of
from edge_inspector.training.teaching.material import beside

_PARITY_PICTURES, _WHITEST = 16, 65535
_ODDEST, _RESTS = (1, 2, 4), 0.9
"""A threshold that falls below this share of itself without so many of the oddest parts rests on these."""
_MORE, _WORTHWHILE = 100, 0.01
_COARSE, _SEEN_PX = 0.5, 4
"""Below this share of their resolution pictures are better cut into tiles; marks of about so many px of input are seen: half a
place of the finest feature map."""
_READ_SINCE = "0.1.0"
"""The first release that can read and run what is made here: what was added since, it ignores."""
Made = TypeVar("Made")


@dataclass(frozen=True)
class Order:
    """What is to be trained."""

    folder: Path
    out: Path
    """Folder of the bundle; the work in progress lies beside it, in OUT.training."""
    product: str
    name: str
    key: Ed25519PrivateKey
    release: int = 1
    family: Family = field(default_factory=FeatureAnogan)
    seed: int = 1
    roi: Roi = field(default_factory=Roi)
    """What the recipe will judge of each picture."""
    tile: int | None = None
    overlap: float = 0.0
    intensity_window: Window | None = None
    wish: scoring.Wish = field(default_factory=lambda: scoring.Wish(0.05))
    """How many good parts may be rejected."""
    leave_out: tuple[str, ...] = ()
    """Names of good pictures that are not learned from; the promise counts them as rejected."""
    device: str = "cpu"
    restart: bool = False
    minutes: float | None = None
    """What all of it may take; the fit takes as many pictures and steps as it can."""
    latency_ms: float | None = None
    """What judging a picture may take on this machine; the input is made as small as that needs."""
    command: str = ""


@dataclass(frozen=True)
class Trained:
    """A finished bundle and what may be said of it."""

    folder: Path
    promise: scoring.Promise
    found: scoring.Found | None
    """What the threshold costs; None where no defects were drawn."""
    remarks: tuple[audit.Remark, ...]
    notes: tuple[str, ...]
    limit: limits.Curve
    parity: float
    key_id: str


def train(
    order: Order,
    on_progress: Callable[[Progress], None] = lambda _: None,
    on_audit: Callable[[data.Pictures], None] = lambda _: None,
    stopping: Callable[[], bool] = lambda: False,
) -> Trained:
    """Train, calibrate, export, check and sign. Resumes where an interrupted run with the same settings stopped.

    `on_audit` is told what the folder holds before anything is fitted. Where `stopping` says so, training saves a
    checkpoint and raises KeyboardInterrupt. Raises TrainingError, PictureError, BundleError.
    """
    try:
        with _tidied(order):
            return _train(order, on_progress, on_audit, stopping)
    except OSError as error:
        raise TrainingError(
            f"{error.filename or order.out}: {error.strerror}",
            hint="free some space and run the same command again: it resumes from the last checkpoint",
        ) from error


@contextmanager
def _tidied(order: Order) -> Iterator[None]:
    """Leave nothing behind of a training that is refused before its first checkpoint."""
    work = _work(order)
    made = [path for path in (work, *work.parents) if not path.exists()]
    try:
        yield
    except (InspectorError, OSError):
        if work in made and not any(work.glob("*.pt")):
            shutil.rmtree(work, ignore_errors=True)
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise


def _work(order: Order) -> Path:
    """The folder of the work in progress."""
    return order.out.with_name(order.out.name + ".training")


def _train(
    order: Order, on_progress: Callable[[Progress], None], on_audit: Callable[[data.Pictures], None],
    stopping: Callable[[], bool],
) -> Trained:  # fmt: skip
    _refuse(order)
    run = Run(_work(order), device=order.device, seed=order.seed, on_progress=on_progress, stopping=stopping,
              minutes=order.minutes)  # fmt: skip
    with run.alone(restart=order.restart):
        return _trained(order, run, on_audit)


def _trained(order: Order, run: Run, on_audit: Callable[[data.Pictures], None]) -> Trained:
    folder, original = order.folder, None
    if order.roi != Roi():
        key = hashlib.sha256(order.roi.model_dump_json().encode()).hexdigest()[:12]
        folder, original = run.folder / f"region-{key}", order.folder
        _everywhere(run, lambda: data.cropped(order.folder, order.roi, folder, order.intensity_window))
    surveyed = data.survey(
        folder, lambda done, count: run.step("reading", done, count), order.intensity_window, original, order.leave_out
    )
    if surveyed.depth_bits != 8 and order.intensity_window is None:
        raise TrainingError(
            f"{order.folder}: {surveyed.depth_bits}-bit pictures need --intensity-window LOW HIGH",
            hint="0 4095 for a 12-bit camera, 0 1023 for 10 bit",
        )
    shorter = min(surveyed.height_px, surveyed.width_px)
    if order.tile is not None and order.tile > shorter:
        remark = audit.Remark("note", f"tiles of {shorter} px instead of {order.tile}: the pictures are no larger")
        order, surveyed = replace(order, tile=shorter), replace(surveyed, remarks=(*surveyed.remarks, remark))
    surveyed = replace(surveyed, remarks=(*surveyed.remarks, *_on_size(order, surveyed)))
    if run.first:
        on_audit(surveyed)
    try:
        order = _light_enough(order, surveyed, run)
        spec = order.family.input_spec(surveyed, order.tile, order.overlap)
        fitted = order.family.fit(surveyed, spec, order.intensity_window, run)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"{order.device}: out of memory: {str(error).splitlines()[0]}",
            hint="close what else uses the GPU, give a smaller --size, or train with --device cpu",
        ) from error
    return _everywhere(run, lambda: _bundle(order, surveyed, spec, fitted, run))


def _on_size(order: Order, surveyed: data.Pictures) -> Iterator[audit.Remark]:
    """Says which input a size that is no multiple of the network's steps gives, and what is lost of large pictures."""
    side = getattr(order.family, "side", 0)
    scale = side / math.sqrt(surveyed.height_px * surveyed.width_px)
    if order.tile is None and 0 < scale < _COARSE:
        tile = min(max(16, side), surveyed.height_px, surveyed.width_px)
        spec = order.family.input_spec(surveyed, tile, order.overlap)
        tiles = preprocess.tile_count(spec, surveyed.width_px, surveyed.height_px)
        yield audit.Remark(
            "note",
            f"the network sees the pictures at {scale:.0%} of their resolution, marks of less than about "
            f"{_SEEN_PX / scale:.0f} px are lost. With --tile {tile} it sees all of it, in {tiles} tiles, "
            f"which take {tiles} times as long",
        )
    step = order.family.source.taps.multiple if isinstance(order.family, FeatureAnogan) else side
    if order.latency_ms is None and side % step:
        spec = order.family.input_spec(surveyed, order.tile, order.overlap)
        text = f"the network's input is {spec.width}x{spec.height} px for a size of {side}: its sides are multiples of {step}"
        yield audit.Remark("note", text)


def _refuse(order: Order) -> None:
    """Raise TrainingError for what cannot be meant."""
    if order.out.exists():
        raise TrainingError(f"{order.out}: exists already", hint="give another --out, or remove the old bundle")
    for name in (order.product, order.name):
        if not re.match(NAME_PATTERN, name):
            raise TrainingError(f"name {name!r}: must be small letters, digits and single hyphens", hint="as in: my-product")
    if order.intensity_window is not None and not 0 <= order.intensity_window[0] < order.intensity_window[1] <= _WHITEST:
        low, high = order.intensity_window
        raise TrainingError(f"intensity window {low} {high}: must rise, from 0 at least to {_WHITEST} at most")
    if order.seed < 0:
        raise TrainingError(f"seed {order.seed}: must not be negative")


def _light_enough(order: Order, surveyed: data.Pictures, run: Run) -> Order:
    """The order with a family that keeps its latency; measured once, so that a resumed run and all processes agree."""
    if order.latency_ms is None:
        return order
    about = {**asdict(order.family), "latency_ms": order.latency_ms, "tile": order.tile, "digest": surveyed.digest}  # type: ignore[call-overload]
    key = key_of(about)
    found = run.load("latency", key)
    if found is None:
        family = order.family.within_ms(surveyed, order.tile, order.overlap, order.latency_ms) if run.first else order.family
        found = run.shared({"settings": asdict(family)}, 0)  # type: ignore[call-overload]
        run.save("latency", key, found)
    return replace(order, family=type(order.family)(**found["settings"]))


def _everywhere(run: Run, make: Callable[[], Made]) -> Made:
    """What the first process makes, or why it could not, in every process: none is left waiting for it."""
    made: Made | None = None
    refused: InspectorError | None = None
    if run.first:
        try:
            made = make()
        except InspectorError as error:
            refused = error
    made, refused = run.shared((made, refused), 0)
    if refused is not None:
        raise refused
    return cast("Made", made)


def _bundle(order: Order, surveyed: data.Pictures, spec: InputSpec, fitted: Fitted, run: Run) -> Trained:
    """Set the scale and the threshold, write everything, check it as the line will, sign, move into place."""
    part = run.folder / "bundle"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    known = ~np.isnan(fitted.scores)
    scale = float(np.median(fitted.scores[known]))
    if not (np.isfinite(fitted.scores[known]).all() and scale > 0):
        raise TrainingError(f"good parts score {scale}: the network does not work", hint="train longer, or with another --seed")
    graph: Any = fitted.graph
    graph.unit.fill_(scale)
    scores = fitted.scores / scale
    good = scores[known].tolist()
    keeping = partial(scoring.promise, rejected=len(order.leave_out))
    promise = keeping(good, order.wish)
    found = scoring.found((fitted.drawn / scale).tolist(), good, order.wish, keeping) if len(fitted.drawn) else None
    some = surveyed.paths[:: max(1, len(surveyed.paths) // _PARITY_PICTURES)][:_PARITY_PICTURES]
    tiles = data.load_tiles(some, spec, order.intensity_window).images[:_PARITY_PICTURES]
    export.export(graph, part / bundles.NETWORK, tiles[:1])
    if fitted.generator is not None:
        drawing, latent = fitted.generator
        export.write(drawing, (torch.zeros(1, latent),), part / bundles.GENERATOR, ["latent"], ["picture"])
    parity = export.parity(graph, part / bundles.NETWORK, tiles)
    cost = export.cost(part / bundles.NETWORK, tiles[:1])
    manifest = _calibrated(_draft(order, surveyed, spec), promise, good, found, fitted.method, scale)
    ascending = [i for i in np.argsort(scores) if known[i]]
    ranked = [surveyed.paths[i] for i in ascending]
    told = (
        *_rests_on(ranked, sorted(good), (fitted.drawn / scale).tolist(), promise),
        *_more_pictures(fitted.half, found, order.wish, len(good)),
    )  # fmt: skip
    fitted = replace(fitted, notes=(*fitted.notes, *told))
    graph_bytes = (part / bundles.NETWORK).read_bytes()
    with OnnxEngine(Bundle(part, manifest, "", ""), graph=graph_bytes) as engine:
        samples = calibrate.limit_samples(engine, ranked, promise.threshold, part)
        limit = limits.curve(engine, ranked, run.rng(), lambda done, count: run.step("detection limit", done, count))
        extremes = report.extremes(engine, ranked, scores[ascending].tolist())
    metrics = {"parity": parity, **fitted.figures, **cost, **limit.figures()}
    left = run.folder / "teach"
    digest = fitted.material.write(left) if fitted.material is not None else None
    manifest = manifest.model_copy(
        update={"samples": samples, "metrics": metrics, "material": digest, "backbone": fitted.backbone}
    )
    sheets = _thinned(sorted(run.folder.glob("sheet-*.png")))
    page = report.render(manifest, promise, found, surveyed, fitted, limit, sheets, run.losses, extremes, part)
    (part / bundles.REPORT).write_text(page)
    manifest = manifest.model_copy(update={"files": bundles.file_entries(part)})
    bundles.write_manifest(part, manifest)
    identity = bundles.sign(part, order.key)
    with OnnxEngine(Bundle(part, manifest, "", identity)) as engine:
        judge_samples(engine)
    shutil.rmtree(beside(order.out), ignore_errors=True)
    if digest is not None:
        left.rename(beside(order.out))
    part.rename(order.out)
    run.remove()
    return Trained(order.out, promise, found, surveyed.remarks, fitted.notes, limit, parity, identity)


def _calibrated(
    draft: Manifest, promise: scoring.Promise, good: list[float], found: scoring.Found | None, method: str, scale: float
) -> Manifest:
    """The manifest with its threshold and what that promises and costs."""
    calibration = Calibration(
        n=promise.n, alpha=promise.alpha, confidence=promise.wish.confidence, kept=promise.kept,
        scores=tuple(sorted(good)), method=method, review=promise.review,
    )  # fmt: skip
    rates = Rates(
        asked="at_most" if promise.wish.sure else "expected", wish=promise.wish.rate, expected=promise.expected,
        at_most=promise.at_most, needed=promise.wish.needed, found=found and found.here,
        found_at_half=found and found.at_half, found_at_twice=found and found.at_twice,
    )  # fmt: skip
    told = {"calibration": calibration, "rates": rates, "threshold": promise.threshold, "scale": scale}
    return draft.model_copy(update=told)


def _more_pictures(half: Half | None, found: scoring.Found | None, wish: scoring.Wish, count: int) -> Iterator[str]:
    """What 100 more good pictures may bring: each doubling brings about what the last one did."""
    if half is None or found is None:
        return
    then = scoring.found(half.drawn.tolist(), half.good.tolist(), wish, scoring.promise).here
    gain = (found.here - then) * math.log2(1 + _MORE / count)
    said = f"half of these pictures would find {then:.0%} of drawn defects, all of them find {found.here:.0%}"
    if gain >= _WORTHWHILE:
        yield f"{said}: {_MORE} more may bring about {100 * gain:.0f} points"
    else:
        yield f"{said}: more pictures of the same kind would bring little"


def _rests_on(ranked: Sequence[Path], good: list[float], drawn: list[float], promise: scoring.Promise) -> Iterator[str]:
    """Says so where few odd parts decide the threshold; `ranked` and their scores `good` ascend."""
    said = []
    left_out = promise.n - len(good)
    for count in _ODDEST:
        if count >= len(good):
            continue
        without = scoring.promise(good[:-count], promise.wish, rejected=left_out + count)
        if without.threshold < _RESTS * promise.threshold:
            found = f", {np.mean(np.array(drawn) > without.threshold):.0%} of drawn defects found" if drawn else ""
            rate = f"{100 * without.expected:.3g} % of good parts rejected"
            said.append(f"without the oddest {count}: {without.threshold:.3g}{found}, {rate}")
    if said:
        names = ", ".join(pictures.printable(path.name) for path in ranked[: -max(_ODDEST) - 1 : -1])
        yield (
            f"few parts decide the threshold, {promise.threshold:.3g}; {'; '.join(said)}. The oddest are {names}. "
            "Are they really good? If not, take them out and train again. If they are, but may be rejected, write "
            "their names into a file, one on each line, and train again with --leave-out FILE"
        )


def _thinned(sheets: list[Path], most: int = 6) -> list[Path]:
    if len(sheets) <= most:
        return sheets
    return [sheets[round(i * (len(sheets) - 1) / (most - 1))] for i in range(most)]


def _draft(order: Order, surveyed: data.Pictures, spec: InputSpec) -> Manifest:
    """The manifest before calibration."""
    settings = ", ".join(f"{key} {value}" for key, value in {**asdict(order.family), "seed": order.seed}.items())  # type: ignore[call-overload]
    low, high = surveyed.aspects
    return Manifest(
        schema="ei.bundle.v1", name=order.name, release=order.release, product=order.product, created_at=utc_now(),
        network=f"{order.family.name}: {settings}; torch {torch.__version__}", input=spec,
        calibration=Calibration(n=1, alpha=order.wish.rate, confidence=order.wish.confidence, kept=False, scores=()),
        threshold=1.0, scale=1.0, samples=(Sample(file="none", score=0, verdict=Verdict.PASS),),
        training=TrainedOn(
            digest=surveyed.digest, pictures=len(surveyed.paths), height_px=surveyed.height_px, width_px=surveyed.width_px,
            depth_bits=surveyed.depth_bits, intensity_window=order.intensity_window, aspects=(round(low, 4), round(high, 4)),
        ),
        pictures=PictureKind(
            channels=1 if surveyed.channels == 1 else 3, sizes=surveyed.sizes, region=None if order.roi == Roi() else order.roi,
            left_out=order.leave_out,
        ),
        min_version=_READ_SINCE, command=order.command, files={"none": FileEntry(size=0, sha256="0" * 64)},
    )  # fmt: skip
