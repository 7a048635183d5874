"""A part of the past judged again, from the frames that were kept of it, beside what its record says."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from edge_inspector import pictures
from edge_inspector.cameras.folder import broken_frame
from edge_inspector.config import Device, LineConfig, load_line, parse_line
from edge_inspector.errors import InspectorError
from edge_inspector.evidence import frames_of, place_of
from edge_inspector.frames import Frame, frozen
from edge_inspector.history import stored_results
from edge_inspector.inspector import Inspection, Inspector
from edge_inspector.remote.trial import Kept, state_of
from edge_inspector.results import Finding, Reason, RecipeRef, Result
from edge_inspector.runtime import Pool
from edge_inspector.wiring import Setup, TellBuild, inspectors_of

SAME = 0.002
"""Scores that differ by less of the threshold are the same: they are stored rounded, and threads sum in any order."""


@dataclass(frozen=True)
class Replay:
    """What came out then and now, and why it differs."""

    then: Result
    now: Inspection
    reasons: tuple[str, ...]
    """Of any difference, the likely causes first; empty where the same came out."""
    earlier: tuple[Result, ...] = ()
    """Of the same part, where it was judged more than once."""

    @property
    def is_same(self) -> bool:
        """Whether the part gets the same verdict."""
        return self.then.verdict is self.now.verdict


def setup_in_force(device: Device) -> Setup:
    """What the device judges by, read from its disk: nothing is counted or changed by it. Raises InspectorError."""
    kept = _kept(device, "configuration.json")
    if kept is not None and kept.source == "remote":
        line = parse_line(kept.document, "the remote configuration in force")
    else:
        line = load_line(device.line_file)
    return Setup(line, {name: device.state / place for name, place in _rolled_out(device, line)})


def _kept(device: Device, name: str) -> Kept | None:
    try:
        state = state_of(device.state / name)
    except (OSError, ValueError) as error:
        raise InspectorError(
            f"{device.state / name}: {error}", hint="may you read it? The daemon mends what is damaged"
        ) from error
    return state.trial or state.good


def _rolled_out(device: Device, line: LineConfig) -> Iterator[tuple[str, str]]:
    for name in sorted(line.bundles):
        kept = _kept(device, f"bundles/{name}/rollout.json")
        if kept is not None and kept.source == "remote":
            yield name, f"bundles/{name}/{kept.version}"


def records_of(device: Device, name: str) -> list[Result]:
    """The records with this result id, or of the part or trigger with this id, oldest first. Raises InspectorError."""
    found = stored_results(device.state / "outbox.db", name)
    if not found:
        raise InspectorError(
            f"no result, part or trigger {name!r} in {device.state}",
            hint="result ids are STREAM-SEQ, as in result_id of a result; old results are dropped by storage.results_mb",
        )
    return [result for result in found if result.result_id == name] or found


def _frames(device: Device, result: Result) -> dict[str, list[Frame]]:
    kept = result.evidence
    place = place_of(device.state / "evidence", kept.id) if kept is not None else None
    if place is None:
        raise InspectorError(
            f"no frames are kept of result {result.result_id}",
            hint="kept are parts that failed, were undecided, nearly failed, and a few that passed: storage.evidence_mb",
        )
    frames: dict[str, list[Frame]] = {}
    try:
        kept_frames = frames_of(place)
    except (OSError, ValueError, KeyError) as error:
        raise InspectorError(
            f"{place}: cannot be read: {error}", hint="the disk may be damaged, or the quota has just taken it"
        ) from error
    for number, one in enumerate(kept_frames):
        image = frozen(pictures.read(one.path)) if one.path is not None else broken_frame(number, "", "").image
        at = result.captured_at or result.triggered_at
        frames.setdefault(one.camera, []).append(
            Frame(image, number, time.monotonic(), at, fault=one.fault, fault_detail=one.fault_detail)
        )
    return frames


@contextmanager
def _inspector(device: Device, result: Result, tell: TellBuild) -> Iterator[tuple[Inspector, RecipeRef]]:
    setup, pool = setup_in_force(device), Pool()
    recipe = result.recipe
    if recipe is None:
        raise InspectorError(f"result {result.result_id}: no recipe was applied: {result.reason.value}: {result.detail}")
    try:
        station = setup.line.stations.get(result.station)
        if station is None or recipe.id not in station.products.values():
            raise InspectorError(
                f"recipe {recipe.id} of station {result.station} is not in the configuration in force any more"
            )
        yield inspectors_of(device, setup, result.station, pool, tell).by_recipe[recipe.id]
    finally:
        pool.close()


def replay(device: Device, name: str, tell: TellBuild = lambda *_: None) -> Replay:
    """Judge the kept frames of a result, or of a part's newest result, by what is in force now. Raises InspectorError."""
    *earlier, then = records_of(device, name)
    frames = _frames(device, then)
    with _inspector(device, then, tell) as (inspector, reference):
        now = inspector.inspect(frames)
    return Replay(then, now, tuple(_reasons(then, now, reference)), tuple(earlier))


def _reasons(then: Result, now: Inspection, recipe: RecipeRef) -> Iterator[str]:
    """What is another one, and what came out differently."""
    assert then.recipe is not None
    if then.recipe != recipe:
        yield f"recipe {recipe.id} has changed: {then.recipe.hash} then, {recipe.hash} now"
    found = {_place(finding): finding for finding in now.findings}
    changed = False
    for old in then.findings:
        new = found.pop(_place(old), None)
        told = list(_differences(old, new)) if new is not None else [f"{_named(old)}: not judged any more"]
        changed = changed or bool(told)
        yield from told
    for new in found.values():
        yield f"{_named(new)}: not judged then"
    if then.verdict is not now.verdict:
        if then.reason is Reason.LATE:
            yield f"it came too late then ({then.detail}); judged again there is no hurry"
        elif not changed and then.recipe == recipe:
            yield "the same recipe, network and scores, and another verdict: not explained, please report it"


def _place(finding: Finding) -> tuple[str, str, int]:
    return finding.camera, finding.roi, finding.frame


def _named(finding: Finding) -> str:
    return f"{finding.camera}, {finding.roi}"


def _differences(old: Finding, new: Finding) -> Iterator[str]:
    name, known = _named(old), False
    pairs: tuple[tuple[str, Callable[[Finding], str]], ...] = (
        ("bundle", lambda f: f"{f.bundle.name} {f.bundle.release} ({f.bundle.sha256})"),
        ("engine", lambda f: f"{f.engine.runtime} {f.engine.precision}"),
        ("threshold", lambda f: f"{f.threshold:.4g}"),
    )
    for what, shown in pairs:
        if shown(old) != shown(new):
            known = True
            yield f"{name}: {what} {shown(old)} then, {shown(new)} now"
    if old.reason is not new.reason:
        yield f"{name}: {old.reason.value} then, {new.reason.value} now"
    if old.score is not None and new.score is not None and abs(old.score - new.score) > SAME * old.threshold:
        why = "" if known else ": by the same network, so its frames are not what it saw then; please report it"
        yield f"{name}: score {old.score:.4g} then, {new.score:.4g} now{why}"
