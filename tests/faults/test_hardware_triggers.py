"""A sensor fires two cameras, each in a network of its own; the number of the part in front stands in the pixels and, by a network
that reads it, in the result. No part may be judged by the image of another."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from edge_inspector.cameras import CameraState
from edge_inspector.config import CameraConfig
from edge_inspector.results import Reason, Result, Verdict
from tests.faults.test_cameras import Line
from tests.line import needed, until
from tests.test_aravis import Simulator, installed
from tests.tiny import coded_bundle

NETWORK = "10.213"
ANNOUNCED = {"announced": True, "tolerance_ms": 200, "sync_ms": 150, "debounce_ms": 450, "delay_ms": 0}
"""The simulator looks at its line every 40 ms only: no camera is so slow."""
PITCH_S = 0.55


def ip(*words: str) -> int:
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode


@pytest.fixture
def cameras() -> Iterator[dict[str, Simulator]]:
    """Two cameras, 10.213.1.2 and 10.213.2.2, behind cables that can be pulled."""
    needed(installed(), "apt install libaravis-0.8-0")
    needed(shutil.which("ip"), "apt install iproute2")
    found: dict[str, Simulator] = {}
    with ExitStack() as stack:
        for number, name in enumerate(("left", "right"), 1):
            space, ours, theirs = f"ei-{name}", f"ei{number}a", f"ei{number}b"
            ip("netns", "del", space)  # what a killed run has left
            if ip("netns", "add", space):
                pytest.skip("networks of their own need root: ip netns add")
            stack.callback(ip, "netns", "del", space)
            stack.callback(ip, "link", "del", ours)
            for command in (
                f"link add {ours} type veth peer name {theirs} netns {space}",
                f"addr add {NETWORK}.{number}.1/24 dev {ours}", f"link set {ours} up",
                f"-n {space} addr add {NETWORK}.{number}.2/24 dev {theirs}", f"-n {space} link set {theirs} up",
            ):  # fmt: skip
                assert ip(*command.split()) == 0, command
            found[name] = Simulator(f"{NETWORK}.{number}.2", ("ip", "netns", "exec", space))
            found[name].start()
            stack.callback(found[name].stop)
        yield found


def line(cameras: dict[str, Simulator], folder: Path, stack: ExitStack, **hardware: object) -> Line:
    configured = {
        name: CameraConfig.model_validate({
            "uri": f"aravis://{camera.address}?trigger=Line0", "width": 64, "height": 64, "exposure_us": 1000, "timeout_ms": 600,
        })
        for name, camera in cameras.items()
    }  # fmt: skip
    found = Line(configured, coded_bundle(folder), stack, trigger="hardware", hardware=hardware)
    until(lambda: all(c.state is CameraState.STREAMING for c in found.station.cameras.values()), 30, "both cameras")
    return found


class Belt:
    """Brings parts in front of the cameras, tells of them, and fires the sensor."""

    def __init__(self, cameras: dict[str, Simulator], line: Line) -> None:
        self.cameras, self.line, self.part = cameras, line, 0

    def bring(self, *, fires: tuple[str, ...] = ("left", "right"), announced: bool = True) -> str:
        self.part += 1
        for name in fires:
            self.cameras[name].tell(f"part {self.part}")
        name = f"T{self.part}"
        if announced:
            self.line.announce(name)
        for camera in fires:
            self.cameras[camera].say("pulse")
        for camera in fires:
            self.cameras[camera].done()
        time.sleep(PITCH_S)
        return name


def shown(result: Result) -> set[float | None]:
    return {finding.score for finding in result.findings if finding.verdict is Verdict.PASS}


def test_each_announced_part_is_judged_by_its_own_images_whatever_is_missing(
    cameras: dict[str, Simulator], tmp_path: Path
) -> None:
    with ExitStack() as stack:
        found = line(cameras, tmp_path, stack, **ANNOUNCED)
        belt = Belt(cameras, found)
        whole = [belt.bring() for _ in range(5)]
        blind = [belt.bring(fires=()) for _ in range(2)]  # two in a row that the sensor did not see
        whole += [belt.bring() for _ in range(3)]
        half = [belt.bring(fires=("left",))]
        belt.bring(announced=False)  # a hand in the sensor
        whole += [belt.bring() for _ in range(3)]
        results = {result.trigger_id: result for result in found.of({*whole, *blind, *half})}
        assert Counter(result.trigger_id for result in found.records()) == dict.fromkeys(results, 1)
        for name, result in results.items():
            assert shown(result) <= {float(name[1:])}, "the image of another part"
        assert {results[name].verdict for name in whole} == {Verdict.PASS}
        assert {(results[name].verdict, results[name].reason) for name in blind + half} == {
            (Verdict.UNDECIDED, Reason.MISSING_IMAGE)
        }
        assert found.unfitting.extra == 1
        assert "images_unfitting" in {cause.code for cause in found.station.causes()}


def test_a_camera_that_is_gone_leaves_parts_undecided_and_never_passed_by_the_other(
    cameras: dict[str, Simulator], tmp_path: Path
) -> None:
    with ExitStack() as stack:
        found = line(cameras, tmp_path, stack, **ANNOUNCED)
        belt = Belt(cameras, found)
        before = [belt.bring() for _ in range(2)]
        cameras["right"].stop()
        during = [belt.bring(fires=("left",)) for _ in range(6)]
        cameras["right"].start()
        until(lambda: found.station.cameras["right"].counts.reopened > 0, 30, "reopened")
        until(lambda: found.station.cameras["right"].state is CameraState.STREAMING, 30, "back")
        after = [belt.bring() for _ in range(3)]
        results = {result.trigger_id: result for result in found.of({*before, *during, *after})}
        assert len(results) == len(found.records())
        assert {results[name].verdict for name in during} == {Verdict.UNDECIDED}
        assert {results[name].verdict for name in (*before, *after[1:])} == {Verdict.PASS}
        assert all(shown(results[name]) == {float(name[1:])} for name in (*before, *after[1:]))


def test_a_sensor_alone_makes_parts_and_a_line_that_stands_still_is_no_fault(
    cameras: dict[str, Simulator], tmp_path: Path
) -> None:
    with ExitStack() as stack:
        found = line(cameras, tmp_path, stack, announced=False, sync_ms=300, debounce_ms=400)
        belt = Belt(cameras, found)
        time.sleep(2.5)  # four times the cameras' own timeout
        assert {(c.state, c.counts.reopened) for c in found.station.cameras.values()} == {(CameraState.STREAMING, 0)}
        for _ in range(4):
            belt.bring(announced=False)
        belt.bring(fires=("right",), announced=False)
        until(lambda: len(found.records()) == 5, 10, "a record of each part")
        verdicts = [(record.verdict, shown(record)) for record in found.records()]
        assert verdicts[:4] == [(Verdict.PASS, {float(n)}) for n in range(1, 5)]
        assert verdicts[4][0] is Verdict.UNDECIDED
