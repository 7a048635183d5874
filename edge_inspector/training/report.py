"""The report of a bundle: one HTML file that needs nothing else, for the person who must trust the numbers."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from edge_inspector import pictures
from edge_inspector.bundles import Manifest, Sample
from edge_inspector.frames import Pixels
from edge_inspector.scoring import Promise
from edge_inspector.training.data import Pictures
from edge_inspector.training.fit import Settings

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.2em .8em .2em 0;text-align:left;vertical-align:top}"
    "img{max-width:100%;image-rendering:pixelated;margin:.3em 0}code{background:#eee;padding:.1em .3em}"
    "figure{display:inline-block;margin:.5em 1em .5em 0}figcaption{font-size:13px;color:#555}"
)
_BARS = 40


def _embedded(image: Pixels, zoom: int) -> str:
    data = base64.b64encode(pictures.encoded(image, ".jpg")).decode()
    return f'<img width="{image.shape[1] * zoom}" src="data:image/jpeg;base64,{data}" alt="">'


def _histogram(scores: Sequence[float], threshold: float) -> str:
    """Scores of held-out good parts as inline SVG, with the threshold."""
    top = max(*scores, threshold) * 1.1
    counts, _ = np.histogram(scores, bins=_BARS, range=(0, top))
    bars = "".join(
        f'<rect x="{i * 15}" y="{150 - height:.1f}" width="13" height="{height:.1f}" fill="#47a"/>'
        for i, height in enumerate(140 * counts / counts.max())
    )
    x = threshold / top * _BARS * 15
    return (
        f'<svg viewBox="0 0 600 175" width="600">{bars}<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="150" stroke="#c00"/>'
        f'<text x="0" y="168" font-size="12">0</text><text x="{x:.1f}" y="168" font-size="12" fill="#c00"'
        f' text-anchor="middle">threshold {threshold:.3g}</text></svg>'
    )


def render(
    manifest: Manifest, promise: Promise, surveyed: Pictures, settings: Settings,
    sheets: Sequence[Pixels], samples: Sequence[tuple[Sample, Pixels]],
) -> str:  # fmt: skip
    """The page as text. Sheets are shown in the order given, first to last training step."""
    facts = {
        "product": manifest.product,
        "bundle": f"{manifest.name}, release {manifest.release}, made {manifest.created_at:%Y-%m-%d %H:%M} UTC",
        "trained on": f"{manifest.training.pictures} pictures of good parts"
        f" ({len(surveyed.fit)} to fit the network, {len(surveyed.held_out)} held out to calibrate it)",
        "pictures": f"{surveyed.width_px}x{surveyed.height_px}, {surveyed.depth_bits} bit, digest {surveyed.digest[:16]}…",
        "network": manifest.network,
        "settings": ", ".join(f"{key} {value}" for key, value in asdict(settings).items()),
        "PyTorch against ONNX Runtime": f"largest relative difference {manifest.metrics.get('parity', 0):.1e}",
    }
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in surveyed.warnings) or "<li>nothing odd was found</li>"
    shown = "".join(
        f"<figure>{_embedded(image, 2)}<figcaption>{html.escape(s.file)}: {s.score:.3f}, {s.verdict.value}</figcaption>"
        "</figure>"
        for s, image in samples
    )
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(manifest.name)}</title>
<style>{_STYLE}</style><h1>Bundle {html.escape(manifest.name)}</h1><table>{rows}</table>
<h2>The promise</h2><p><b>{html.escape(str(promise))}.</b> Threshold {promise.threshold:.4g}; scores are in units of the
median good part. It holds for parts like those in the pictures; what the pictures do not show is not covered.</p>
{_histogram(manifest.calibration.scores, promise.threshold)}
<h2>The pictures</h2><ul>{notes}</ul>
<h2>While it learned</h2><p>Each sheet: good parts, what the network makes of them, what it draws freely.</p>
{"".join(_embedded(sheet, 2) for sheet in sheets)}
<h2>Limit samples</h2><p>Judged again at every start; a network that scores them otherwise does not go on the line.</p>{shown}
<h2>Made with</h2><p><code>{html.escape(manifest.command or "the Python interface")}</code></p></html>
"""
