"""The report of a bundle: one HTML file that needs nothing else, for the person who must trust the numbers."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_inspector import pictures, preprocess
from edge_inspector.bundles import Manifest
from edge_inspector.frames import Pixels
from edge_inspector.roi import Roi
from edge_inspector.runtime import Engine
from edge_inspector.scoring import Found, Promise
from edge_inspector.training import audit
from edge_inspector.training.data import Pictures
from edge_inspector.training.limits import Curve

if TYPE_CHECKING:  # it needs PyTorch, and teaching renders pages without
    from edge_inspector.training.networks import Fitted

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:62em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.2em .8em .2em 0;text-align:left;vertical-align:top}"
    "table.grid td,table.grid th{padding:.2em .7em;text-align:right;border:1px solid #ddd}"
    "img{max-width:100%;margin:.3em 0}code{background:#eee;padding:.1em .3em;overflow-wrap:anywhere}"
    "figure{display:inline-block;margin:.5em 1em .5em 0}figcaption{font-size:13px;color:#555}"
    ".warning{color:#a40}h2{margin-top:1.6em}@media print{body{margin:0;max-width:none}figure,table{break-inside:avoid}}"
)
_BARS, _EXTREMES = 40, 3


@dataclass(frozen=True)
class Extreme:
    """A good part with what the network makes of it."""

    path: Path
    picture: Pixels
    """As `pictures.explanation` gives it."""


def extremes(engine: Engine, ranked: Sequence[Path], scores: Sequence[float]) -> tuple[list[Extreme], list[Extreme]]:
    """The most ordinary and the oddest good parts, seen by an open engine; ranked by their scores, which are as given."""
    shown = list(zip(ranked, scores, strict=True))
    return (
        [_explained(engine, *part) for part in shown[:_EXTREMES]],
        [_explained(engine, *part) for part in shown[: -_EXTREMES - 1 : -1]],
    )


def _explained(engine: Engine, path: Path, unseen: float) -> Extreme:
    name = pictures.printable(path.name)
    title = f"{name}: {unseen:.3f} to a network that did not know it"
    return Extreme(path, explained(engine, pictures.read(path), lambda score: f"{title}, {score:.3f} to this one"))


def explained(engine: Engine, image: Pixels, title: Callable[[float], str]) -> Pixels:
    """A picture with what an open engine makes of it; `title` by its score."""
    manifest = engine.bundle.manifest
    plan = preprocess.Plan(manifest.input, Roi(), image.shape[0], image.shape[1], manifest.training.intensity_window)
    images, valid = plan.buffers()
    plan.fill(image, images, valid)
    maps: list[NDArray[np.float32]] = []
    drawn: list[NDArray[np.uint8]] = []
    score = 0.0
    for tile, mask in zip(images, valid, strict=True):
        engine.images[0], engine.valid[0] = tile, mask
        outputs = engine()
        score = max(score, float(outputs.score[0]))
        maps.append(outputs.map[0].copy())
        if outputs.expected is not None:
            drawn.append(outputs.expected[0].copy())
    anomaly = plan.stitched(np.stack(maps))
    expected = plan.stitched(np.stack(drawn)) if drawn else None
    regions = plan.regions(anomaly, manifest.threshold, None) if score > manifest.threshold else ()
    return pictures.explanation(image, anomaly, manifest.threshold, regions, expected, title(score))


def embedded(image: Pixels, width: int | None = None) -> str:
    """A picture inside a page."""
    data = base64.b64encode(pictures.encoded(image, ".jpg")).decode()
    return f'<img width="{width or image.shape[1]}" src="data:image/jpeg;base64,{data}" alt="">'


def _histogram(scores: Sequence[float], promise: Promise) -> str:
    """Scores of good parts as inline SVG, with the threshold and the review band."""
    top = max(*scores, promise.threshold) * 1.1
    counts, _ = np.histogram(scores, bins=_BARS, range=(0, top))
    bars = "".join(
        f'<rect x="{i * 15}" y="{150 - height:.1f}" width="13" height="{height:.1f}" fill="#47a"/>'
        for i, height in enumerate(140 * counts / counts.max())
    )
    x, from_x = (value / top * _BARS * 15 for value in (promise.threshold, promise.review))
    return (
        f'<svg viewBox="0 0 600 175" width="600"><rect x="{from_x:.1f}" y="0" width="{x - from_x:.1f}" height="150"'
        f' fill="#fe9" opacity="0.6"/>{bars}<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="150" stroke="#c00"/>'
        f'<text x="0" y="168" font-size="12">0</text><text x="{x:.1f}" y="168" font-size="12" fill="#c00"'
        f' text-anchor="middle">threshold {promise.threshold:.3g}</text></svg>'
    )


def _charts(losses: dict[str, dict[int, dict[str, float]]]) -> str:
    """A chart for each figure that was told, with a line for each stage."""
    lines: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for stage, told in losses.items():
        for step, figures in sorted(told.items()):
            for name, value in figures.items():
                lines.setdefault(name, {}).setdefault(stage, []).append((step, value))
    return "".join(_chart(name, stages) for name, stages in lines.items())


def _chart(name: str, stages: dict[str, list[tuple[int, float]]]) -> str:
    """Lines over steps as inline SVG, labelled with the smallest and largest value."""
    values = [value for points in stages.values() for _, value in points]
    low, high, last = min(values), max(values), max(step for points in stages.values() for step, _ in points)
    tall = (high - low) or 1.0
    drawn = "".join(
        f'<polyline fill="none" stroke="hsl({360 * i // len(stages)} 60% 45%)" points="'
        + " ".join(f"{300 * step / last:.1f},{110 - 100 * (value - low) / tall:.1f}" for step, value in points)
        + '"/>'
        for i, points in enumerate(stages.values())
    )
    return (
        f'<figure><svg viewBox="-60 0 370 130" width="370"><path d="M0 0V110H300" fill="none" stroke="#999"/>{drawn}'
        f'<g font-size="11"><text x="-5" y="14" text-anchor="end">{high:.3g}</text>'
        f'<text x="-5" y="110" text-anchor="end">{low:.3g}</text>'
        f'<text x="300" y="125" text-anchor="end">step {last}</text></g></svg>'
        f"<figcaption>{html.escape(name)}: {html.escape(', '.join(stages))}</figcaption></figure>"
    )


def _limit_table(limit: Curve) -> str:
    """Shares found, greener where more."""
    head = "".join(f"<th>{size:g} px</th>" for size in limit.sizes_px)
    rows = "".join(
        f"<tr><th>{contrast} levels</th>"
        + "".join(f'<td style="background:rgba(40,160,80,{share:.2f})">{share:.0%}</td>' for share in row)
        + "</tr>"
        for contrast, row in zip(limit.contrasts, limit.found, strict=True)
    )
    return f'<table class="grid"><tr><th></th>{head}</tr>{rows}</table>'


def _remarks(remarks: Iterable[audit.Remark]) -> str:
    items = []
    for remark in remarks:
        shown = embedded(audit.montage(remark.paths)) if remark.paths else ""
        items.append(f'<li class="{remark.level}">{html.escape(str(remark))}<br>{shown}</li>')
    return "".join(items) or "<li>nothing odd was found</li>"


def _figures(extremes: Sequence[Extreme]) -> str:
    return "".join(f"<figure>{embedded(e.picture)}</figure>" for e in extremes)


def _facts(manifest: Manifest, surveyed: Pictures) -> str:
    metrics, used = manifest.metrics, manifest.backbone
    facts = {
        "product": manifest.product,
        "bundle": f"{manifest.name}, release {manifest.release}, made {manifest.created_at:%Y-%m-%d %H:%M} UTC",
        "trained on": f"{manifest.training.pictures} pictures of good parts, {surveyed.width_px}x{surveyed.height_px},"
        f" {surveyed.depth_bits} bit, digest {surveyed.digest[:16]}…",
        "network": manifest.network,
        "backbone": f"{used.name}, sha256 {used.sha256[:16]}…, licence {used.licence}" if used else "none",
        "input": f"{manifest.input.width}x{manifest.input.height}"
        + (f", tiles of {manifest.input.tile} px" if manifest.input.tile else ""),
        "cost per tile": f"{metrics['gmac']:.2f} GMAC, {metrics['million_parameters']:.1f} million parameters,"
        f" {metrics['megabytes']:.1f} MB,"
        f" {metrics['cpu_ms_one_thread']:.0f} ms of one CPU thread where it was trained",
        "PyTorch against ONNX Runtime": f"largest relative difference {metrics['parity']:.1e}",
    }
    return "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items())


def render(
    manifest: Manifest, promise: Promise, found: Found | None, surveyed: Pictures,
    fitted: Fitted, limit: Curve, sheets: Sequence[Path],
    losses: dict[str, dict[int, dict[str, float]]], parts: tuple[list[Extreme], list[Extreme]], folder: Path,
) -> str:  # fmt: skip
    """The page as text. Sheets are shown in the order given, first to last training step; `losses` by stage and step;
    samples lie in `folder`.
    """
    samples = "".join(
        f"<figure>{embedded(pictures.to_bgr8(pictures.read(folder / s.file)), 200)}"
        f"<figcaption>{html.escape(s.file)}: {s.score:.3f}, {s.verdict.value}</figcaption></figure>"
        for s in manifest.samples
    )
    learned = "".join(f"<figure>{embedded(pictures.read(s))}<figcaption>{html.escape(s.stem)}</figcaption></figure>"
                      for s in sheets)  # fmt: skip
    said = "".join(f"<li>{html.escape(note)}</li>" for note in fitted.notes)
    rejected = sum(score > promise.threshold for score in manifest.calibration.scores)
    ordinary, odd = parts
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(manifest.name)}</title>
<style>{STYLE}</style><h1>Bundle {html.escape(manifest.name)}</h1><table>{_facts(manifest, surveyed)}</table>
<h2>The promise</h2><p><b>{html.escape(str(promise))}.</b> The first rate is what to expect on average; the second is
sure. Threshold {promise.threshold:.4g}; scores are in units of the median good part
({html.escape(manifest.calibration.method)}). Of these {promise.n} good parts {rejected} lie above it.
Parts between {promise.review:.4g} and the threshold pass, but another set of {promise.n} pictures
might have failed them: they are worth a look. All of this holds for parts like those in the pictures; what the pictures do
not show is not covered.</p>
{_histogram(manifest.calibration.scores, promise)}
<p>What it costs: {html.escape(str(found)) if found else "no defects were drawn"}.</p>
<h2>Detection limit</h2><p>Chips drawn into good parts, a kind of defect that no network was trained on: share found at this
threshold, by diameter and contrast (of 255), {limit.parts} each. {html.escape(str(limit)).capitalize()}. Real defects differ:
this says what cannot be hoped for.</p>{_limit_table(limit)}
<h2>The pictures</h2><ul>{_remarks(surveyed.remarks)}</ul>
<h2>What was learned</h2><ul>{said}</ul>{_charts(losses)}
<p>{html.escape(fitted.sheets)}</p>{learned}
<h2>The oddest good parts</h2><p>Are these really good? If not, take them out and train again.</p>{_figures(odd)}
<h2>The most ordinary good parts</h2>{_figures(ordinary)}
<h2>Limit samples</h2><p>Judged again at every start; a network that scores them otherwise does not go on the line.</p>{samples}
<h2>Made with</h2><p><code>{html.escape(manifest.command or "the Python interface")}</code></p></html>
"""
