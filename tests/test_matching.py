"""Images find their parts by time: an oracle that knows the truth checks random lines with everything that goes wrong on one."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone

import numpy as np
import pytest

from edge_inspector.frames import Frame, Trigger
from edge_inspector.matching import Matcher, Part

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)
NOTHING = np.zeros((0, 0), np.uint8)
CAMERAS = ("left", "right")


def frame(part: str, at_s: float, lost: int = 0) -> Frame:
    """An image; the part that it truly shows is its source_id."""
    return Frame(NOTHING, 0, at_s, NOW, source_id=part, lost=lost)


def trigger(part: str, at_s: float) -> Trigger:
    return Trigger(part, at_s, NOW, at_s + 10, NOW, part_id=part)


def matcher(*, announced: bool = True, delay_s: float = 0.2, cameras: tuple[str, ...] = CAMERAS) -> Matcher:
    return Matcher(cameras, announced=announced, delay_s=delay_s, tolerance_s=0.05, sync_s=0.01, debounce_s=0.1, patience_s=0.3)


def run(found: Matcher, events: list[tuple[float, str, Frame | Trigger]], until_s: float) -> list[Part]:
    """Play events at their times of arrival, looking every 5 ms; announcements arrive in the order they were received."""
    parts: list[Part] = []
    waiting = sorted(events, key=lambda event: event[0])
    for now_s in np.arange(0, until_s, 0.005):
        while waiting and waiting[0][0] <= now_s:
            _, camera, thing = waiting.pop(0)
            if isinstance(thing, Trigger):
                found.announce(thing)
            else:
                found.seen(camera, thing)
        coming = next((thing for _, _, thing in waiting if isinstance(thing, Trigger)), None)
        parts += found.due(now_s, min(now_s, coming.received_s) if coming else now_s)
    assert not waiting
    return parts


def shown(parts: list[Part]) -> dict[str, set[str]]:
    return {p.trigger.trigger_id: {f.source_id for f in p.frames.values()} for p in parts if p.trigger}


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("delay_s", [0.0, 0.2])
def test_no_announced_part_is_ever_judged_by_the_images_of_another(seed: int, delay_s: float) -> None:
    """Parts come as close as the configuration says; images are missing, one or many in a row, extra, bouncing, late.

    The disk, which every announcement goes by, is slow at times.
    """
    rng = np.random.default_rng(seed)
    events: list[tuple[float, str, Frame | Trigger]] = []
    whole, missing_run, extras, at_s, disk_s = set(), 0, 0, 1.0, 0.0
    for number in range(400):
        gap_s = 0.12 + rng.exponential(0.1)
        if gap_s > 0.3 and rng.random() < 0.3:  # somebody walks through the photo eye: fires all, between parts
            extras += 1
            extra_s = at_s + gap_s / 2
            events += [(extra_s + 0.01, camera, frame("nobody", extra_s)) for camera in CAMERAS]
        at_s += gap_s
        part = f"P{number}"
        announced_s = at_s - delay_s + rng.uniform(-0.04, 0.04)
        disk_s = max(disk_s, announced_s + rng.exponential(0.005) + (0.6 if rng.random() < 0.05 else 0))
        events.append((disk_s, "", trigger(part, announced_s)))
        missing_run = missing_run - 1 if missing_run > 0 else int(rng.integers(1, 4)) if rng.random() < 0.08 else 0
        there = [c for c in CAMERAS if not missing_run and rng.random() > 0.03]
        for camera in there:
            exposed_s = at_s + rng.uniform(-0.004, 0.004)
            events.append((exposed_s + rng.uniform(0.005, 0.2), camera, frame(part, exposed_s)))
            if rng.random() < 0.05:  # the photo eye bounces
                events.append((exposed_s + 0.03, camera, frame(part, exposed_s + 0.02)))
        if len(there) == 2:
            whole.add(part)
    found = matcher(delay_s=delay_s)
    parts = run(found, events, at_s + 3)
    assert len(parts) == 400, "one outcome for each announcement"
    assert len(shown(parts)) == 400
    wrong = {part: seen for part, seen in shown(parts).items() if seen - {part}}
    assert wrong == {}
    judged = {p.trigger.trigger_id for p in parts if p.trigger and p.frames.keys() == set(CAMERAS)}
    assert judged <= whole
    assert len(judged) > 0.75 * len(whole), "and most parts that have their images are judged"
    assert found.counts.bounced > 0
    assert found.counts.extra >= extras > 0


def test_two_missing_images_in_a_row_do_not_shift_those_that_follow() -> None:
    events: list[tuple[float, str, Frame | Trigger]] = []
    for number in range(6):
        at_s = 1 + number * 0.15
        events.append((at_s, "", trigger(f"P{number}", at_s)))
        if number not in (2, 3):
            events += [(at_s + 0.22, camera, frame(f"P{number}", at_s + 0.2)) for camera in CAMERAS]
    parts = shown(run(matcher(), events, 4))
    assert parts == {f"P{n}": set() if n in (2, 3) else {f"P{n}"} for n in range(6)}


def test_parts_announced_too_close_together_are_left_undecided_both() -> None:
    events: list[tuple[float, str, Frame | Trigger]] = [(1.0, "", trigger("A", 1.0)), (1.04, "", trigger("B", 1.04))]
    events += [(1.25, camera, frame("B", 1.23)) for camera in CAMERAS]  # A's was missing
    parts = run(matcher(), events, 3)
    assert shown(parts) == {"A": set(), "B": set()}
    assert all("too close together" in part.doubt for part in parts)


def test_an_announcement_that_waits_for_the_disk_is_a_rival_all_the_same() -> None:
    events: list[tuple[float, str, Frame | Trigger]] = [(1.0, "", trigger("A", 1.0)), (2.0, "", trigger("B", 1.04))]
    events += [(1.25, camera, frame("B", 1.23)) for camera in CAMERAS]  # A's was missing
    assert shown(run(matcher(), events, 3)) == {"A": set(), "B": set()}


def test_an_image_waits_for_its_announcement_which_waits_for_the_disk() -> None:
    found = matcher()
    events: list[tuple[float, str, Frame | Trigger]] = [(2.0, "", trigger("A", 1.0))]
    events += [(1.21, camera, frame("A", 1.2)) for camera in CAMERAS]
    assert shown(run(found, events, 3)) == {"A": {"A"}}
    assert found.counts.extra == 0


def test_an_extra_image_is_counted_and_belongs_to_nobody() -> None:
    found = matcher()
    parts = run(found, [(1.0, camera, frame("nobody", 1.0)) for camera in CAMERAS], 3)
    assert parts == []
    assert found.counts.extra == 1


def test_unannounced_parts_need_all_their_cameras_and_late_images_make_no_part_of_their_own() -> None:
    events: list[tuple[float, str, Frame | Trigger]] = [
        (1.01, "left", frame("A", 1.0)), (1.02, "right", frame("A", 1.004)),
        (2.01, "left", frame("B", 2.0)),
        (3.01, "left", frame("C", 3.0)), (3.9, "right", frame("C", 3.002)),
        (5.01, "left", frame("D", 5.0)), (5.02, "right", frame("D", 5.0)),
    ]  # fmt: skip
    parts = run(matcher(announced=False), events, 6)
    assert [sorted(part.frames) for part in parts] == [["left", "right"], ["left"], ["left"], ["left", "right"]]


def test_an_edge_whose_image_was_lost_on_its_way_is_a_part_without_images() -> None:
    """Block ids tell how many images a camera has lost."""
    events: list[tuple[float, str, Frame | Trigger]] = [
        (1.01, "left", frame("A", 1.0)),
        (3.01, "left", frame("D", 3.0, lost=2)),
    ]
    parts = run(matcher(announced=False, cameras=("left",)), events, 5)
    assert [len(part.frames) for part in parts] == [1, 0, 0, 1]
    two = run(matcher(announced=False), [(1.01, "left", frame("A", 1.0)), (3.01, "left", frame("B", 3.0, lost=1))], 5)
    assert [len(part.frames) for part in two] == [1, 1], "of two cameras, one's loss is an image that its group lacks"


def test_a_broken_image_whose_time_is_not_known_hides_no_part() -> None:
    broken = replace(frame("A", 1.11), fault="corrupt_image")  # exposed at 1.0
    events: list[tuple[float, str, Frame | Trigger]] = [(1.11, "left", broken), (1.17, "left", frame("B", 1.15))]
    parts = run(matcher(announced=False, cameras=("left",)), events, 3)
    assert [{f.source_id for f in part.frames.values()} for part in parts] == [{"A"}, {"B"}]
