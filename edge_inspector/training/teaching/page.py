"""The report of a lesson: one page that people read."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from edge_inspector.bundles import Bundle, Manifest
from edge_inspector.frames import Pixels
from edge_inspector.runtime import Engine
from edge_inspector.scoring import Promise
from edge_inspector.training.report import STYLE, embedded, explained
from edge_inspector.training.teaching.changes import Change
from edge_inspector.training.teaching.shown import Shown, region_of

_MOST = 24


@dataclass(frozen=True)
class Seen:
    """Shown pictures, as the new network sees them."""

    defects: tuple[Pixels, ...]
    good: tuple[Pixels, ...]


def seen(engine: Engine, bad: Shown | None, good: Shown | None, bundle: Bundle) -> Seen:
    """Some of what was shown, by an engine that runs the new network."""

    def some(group: Shown | None) -> tuple[Pixels, ...]:
        if group is None:
            return ()
        named = list(zip(group.paths, group.names, strict=True))[:_MOST]
        return tuple(explained(engine, region_of(bundle, path), f"{name}: {{:.3f}}".format) for path, name in named)

    return Seen(some(bad), some(good))


def render(
    manifest: Manifest, parent: Manifest, promise: Promise, changes: Sequence[Change], notes: Sequence[str], shown: Seen
) -> str:
    """The page as text."""
    rows = "".join(
        f"<tr><td>{html.escape(change.name)}</td><td>{change.before}</td><td>{change.after}</td></tr>" for change in changes
    )
    said = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    taught = manifest.taught
    told = f"{taught.defects} pictures of defects, {taught.good} of good parts" if taught is not None else ""
    groups = "".join(
        f"<h2>{title}</h2>" + "".join(f"<figure>{embedded(image)}</figure>" for image in images)
        for title, images in (("Shown defects, as it sees them now", shown.defects), ("Shown good parts", shown.good))
        if images
    )
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(manifest.name)}</title>
<style>{STYLE}</style><h1>Bundle {html.escape(manifest.name)}, release {manifest.release}: what it was taught</h1>
<p>Release {parent.release} was shown {told}. How it was trained is told in report-trained.html beside this page.</p>
<h2>What has changed</h2>
<table class="grid"><tr><th></th><th>release {parent.release}</th><th>release {manifest.release}</th></tr>{rows}
<tr><td>threshold</td><td>{parent.threshold:.4g}</td><td>{manifest.threshold:.4g}</td></tr></table>
<p>Each shown defect is counted by a lesson that left it out, where there are two or more; each good part by networks that were
fitted without it. Drawn defects are of kinds that no network was trained on.</p><ul>{said}</ul>
<h2>The promise</h2><p><b>{html.escape(str(promise))}.</b> Before: {html.escape(parent.rates_said)}.</p>
{groups}
<h2>Made with</h2><p><code>{html.escape(manifest.command or "the Python interface")}</code></p></html>
"""
