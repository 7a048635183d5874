"""Folder of good parts -> signed bundle: survey, fit, calibrate, export, check, report."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_inspector import bundles, pictures, scoring
from edge_inspector.bundles import NAME_PATTERN, Bundle, Calibration, FileEntry, InputSpec, Manifest, Sample, TrainedOn
from edge_inspector.errors import TrainingError
from edge_inspector.frames import utc_now
from edge_inspector.preprocess import Window
from edge_inspector.results import Verdict
from edge_inspector.roi import Roi
from edge_inspector.runtime import OnnxEngine, judge_samples
from edge_inspector.training import calibrate, data, export, report
from edge_inspector.training.fit import CHECKPOINT, Fit, Progress, Settings
from edge_inspector.training.networks.fanogan import FanoganGraph

SIZES = (32, 64, 128)
_PARITY_TILES = 16


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
    settings: Settings = field(default_factory=Settings)
    tile: int | None = None
    overlap: float = 0.0
    intensity_window: Window | None = None
    alpha: float = 0.05
    confidence: float = 0.95
    device: str = "cpu"
    restart: bool = False
    command: str = ""


@dataclass(frozen=True)
class Trained:
    """A finished bundle and what may be said of it."""

    folder: Path
    promise: scoring.Promise
    warnings: tuple[str, ...]
    parity: float
    key_id: str


def train(order: Order, on_progress: Callable[[Progress], None] = lambda _: None) -> Trained:
    """Train, calibrate, export, check and sign. Resumes where an interrupted run with the same settings stopped.

    Raises TrainingError, PictureError, BundleError.
    """
    if order.out.exists():
        raise TrainingError(f"{order.out}: exists already", hint="give another --out, or remove the old bundle")
    for name in (order.product, order.name):
        if not re.match(NAME_PATTERN, name):
            raise TrainingError(f"name {name!r}: must be small letters, digits and single hyphens", hint="as in: my-product")
    if order.settings.size not in SIZES:
        raise TrainingError(f"size {order.settings.size}: must be one of {SIZES}")
    work = order.out.with_name(order.out.name + ".training")
    if order.restart:
        shutil.rmtree(work, ignore_errors=True)
    _make(work)
    surveyed = data.survey(order.folder)
    if surveyed.depth_bits != 8 and order.intensity_window is None:
        raise TrainingError(
            f"{order.folder}: {surveyed.depth_bits}-bit pictures need --intensity-window LOW HIGH",
            hint="0 4095 for a 12-bit camera, 0 1023 for 10 bit",
        )
    spec = _spec(order, surveyed)
    tiles = data.load_tiles(surveyed.fit, spec, Roi(), order.intensity_window)
    graph = Fit(tiles, order.settings, work, device=order.device).run(on_progress)
    return _bundle(order, surveyed, spec, tiles, graph, work)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"{folder}: {error.strerror}", hint="give a folder that can be written with --out") from error


def _spec(order: Order, surveyed: data.Pictures) -> InputSpec:
    grey = surveyed.channels == 1
    return InputSpec(
        height=order.settings.size, width=order.settings.size, channels=1 if grey else 3, order="grey" if grey else "bgr",
        tile=order.tile, overlap=order.overlap,
    )  # fmt: skip


def _bundle(
    order: Order, surveyed: data.Pictures, spec: InputSpec, tiles: np.ndarray, graph: FanoganGraph, work: Path
) -> Trained:
    """Calibrate on the held-out parts, write everything, check it as the line will, sign, move into place."""
    part = work / "bundle"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    draft = _draft(order, surveyed, spec)
    graph.cpu().balance(torch.from_numpy(data.load_tiles(surveyed.held_out, spec, Roi(), order.intensity_window)))
    export.export(graph, part / bundles.NETWORK, tiles[:1])
    with OnnxEngine(Bundle(part, draft, "", "")) as engine:
        raw = calibrate.scores(engine, surveyed.held_out)
    scale = float(np.median(raw))
    if not scale > 0:
        raise TrainingError(f"good parts score {scale}: the network does not work", hint="train longer")
    graph.unit.fill_(scale)
    export.export(graph, part / bundles.NETWORK, tiles[:1])
    parity = export.parity(graph, part / bundles.NETWORK, tiles[:: max(1, len(tiles) // _PARITY_TILES)][:_PARITY_TILES])
    with OnnxEngine(Bundle(part, draft, "", "")) as engine:
        held_out = calibrate.scores(engine, surveyed.held_out)
        promise = scoring.promise(held_out, order.alpha, order.confidence)
        samples = calibrate.limit_samples(engine, list(surveyed.held_out), promise.threshold, part)
    calibration = Calibration(
        n=promise.n, alpha=order.alpha, confidence=order.confidence, kept=promise.kept, scores=tuple(sorted(held_out))
    )
    manifest = draft.model_copy(
        update={
            "calibration": calibration,
            "threshold": promise.threshold,
            "scale": scale,
            "samples": samples,
            "metrics": {"parity": parity},
        }  # fmt: skip
    )
    sheets = sorted(work.glob("sheet-*.png"))
    page = report.render(manifest, promise, surveyed, order.settings, [pictures.read(sheet) for sheet in _thinned(sheets)],
                         [(s, pictures.read(part / s.file)) for s in samples])  # fmt: skip
    (part / bundles.REPORT).write_text(page)
    manifest = manifest.model_copy(update={"files": bundles.file_entries(part)})
    bundles.write_manifest(part, manifest)
    identity = bundles.sign(part, order.key)
    with OnnxEngine(Bundle(part, manifest, "", identity)) as engine:
        judge_samples(engine)
    part.rename(order.out)
    (work / CHECKPOINT).unlink(missing_ok=True)
    return Trained(order.out, promise, surveyed.warnings, parity, identity)


def _thinned(sheets: list[Path], most: int = 4) -> list[Path]:
    if len(sheets) <= most:
        return sheets
    return [sheets[round(i * (len(sheets) - 1) / (most - 1))] for i in range(most)]


def _draft(order: Order, surveyed: data.Pictures, spec: InputSpec) -> Manifest:
    """The manifest before calibration."""
    settings = ", ".join(f"{key} {value}" for key, value in asdict(order.settings).items())
    return Manifest(
        schema="ei.bundle.v1", name=order.name, release=order.release, product=order.product, created_at=utc_now(),
        network=f"fanogan: {settings}; torch {torch.__version__}", input=spec,
        calibration=Calibration(n=1, alpha=order.alpha, confidence=order.confidence, kept=False, scores=()),
        threshold=1.0, scale=1.0, samples=(Sample(file="none", score=0, verdict=Verdict.PASS),),
        training=TrainedOn(
            digest=surveyed.digest, pictures=len(surveyed.fit) + len(surveyed.held_out), height_px=surveyed.height_px,
            width_px=surveyed.width_px, depth_bits=surveyed.depth_bits, intensity_window=order.intensity_window,
        ),
        min_version=version("edge-inspector"), command=order.command, files={"none": FileEntry(size=0, sha256="0" * 64)},
    )  # fmt: skip
