"""Rollouts under crashes: every line of the shipped modules, kills in every phase, and swap after swap under load.

Short by default; EDGE_INSPECTOR_LONG=1 runs the full counts.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from edge_inspector import durable
from edge_inspector.bundles import open_bundle
from edge_inspector.errors import InspectorError
from edge_inspector.remote import fetch, rollout, trial
from edge_inspector.remote.authority import Authority
from edge_inspector.remote.rollout import Rollout
from tests.faults.crashes import Crash, Disk, Schedule
from tests.line import DaemonProcess, Mosquitto, listening, until
from tests.plant import Plant, drained, ended, ready, releases, reported, want
from tests.tiny import tiny_bundle

LONG = bool(os.environ.get("EDGE_INSPECTOR_LONG"))
MODULES = tuple(Path(module.__file__) for module in (durable, fetch, rollout, trial) if module.__file__)


@dataclass
class World:
    """A device whose process may end at any line: a broker that keeps what is retained, a disk, a clock, and what was seen."""

    made: Path
    disk: Disk
    schedule: Schedule
    power: bool
    now_s: float = 0.0
    retained: bytes = b""
    confirmed: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    release: int = 1
    """In force, as seen last."""

    def boot(self) -> Rollout:
        for _ in range(20):
            try:
                with self.schedule.traced():
                    now = Rollout(
                        "tiny", self.disk.folder, self.made / "tiny", Authority("plant/line/edge"), trust=self.made / "trust",
                        clock=lambda: ("boot", self.now_s),
                    )  # fmt: skip
                    self.look(now)
                    now.take("desired", self.retained)
                    self.look(now)
                return now
            except Crash:
                self.crashed()
        raise AssertionError("does not start")

    def crashed(self) -> None:
        if self.power:
            self.disk.cut()

    def look(self, now: Rollout) -> None:
        """What the daemon does: try what is wanted, put in force, tidy up when nothing is being tried."""
        now.trials.tick(set(), connected=True)
        wanted = now.candidate
        if wanted is not None:
            try:
                now.fetched(wanted, lambda *_: None, clock_ok=True)
                error = None
            except InspectorError as refusal:
                error = refusal
            now.prepared(wanted, error)
        if now.candidate is None and now.trials.trial is None:
            now.tidy()
        self.check(now)

    def check(self, now: Rollout) -> None:
        """What must hold whenever something shows."""
        told = now.report()
        self.release = told.release or 0
        folder = now.folder
        if folder is not None:
            certain = {path.name for path in self.disk.certain() if path.parent == folder} if self.power else None
            if open_bundle(folder, self.made / "trust").manifest.release != told.release:
                self.problems.append(f"release {told.release} shows, another one lies there")
            if certain is not None and certain != {path.name for path in folder.iterdir()}:
                self.problems.append(f"release {told.release} shows, and is not on disk for certain")
        if self.release in self.refused:
            self.problems.append(f"release {self.release} was given up before")
        for entry in told.history:
            if entry.outcome in ("rejected", "rolled_back", "cancelled") and entry.version is not None:
                self.refused.add(entry.version)

    def do(self, now: Rollout, step: tuple[Any, ...]) -> Rollout:
        """One step of a script, again after each crash: senders repeat what was not answered."""
        for _ in range(20):
            try:
                with self.schedule.traced():
                    self._one(now, step)
                    self.look(now)
                    self.look(now)
                return now
            except Crash:
                self.crashed()
                now = self.boot()
        raise AssertionError("never got through")

    def _one(self, now: Rollout, step: tuple[Any, ...]) -> None:
        kind, *more = step
        if kind == "want":
            source = self.made / f"release-{more[0]}"
            order = {"by": "anna", "bundle": "tiny", "release": more[0], "source": str(source), "confirm_s": 60}
            self.retained = json.dumps(order).encode()
            now.take("desired", self.retained)
        elif kind in ("confirm", "cancel", "reset"):
            if kind == "confirm" and now.trials.trial is not None and now.trials.trial.version == more[0]:
                self.confirmed.add(more[0])
            now.take("confirm", json.dumps({"by": "ben", "version": more[0], "action": kind}).encode())
        elif kind == "passes":
            self.now_s += more[0]

    def finish(self, now: Rollout) -> None:
        """A long time later."""
        self.now_s += 1e6
        now = self.do(now, ("nothing",))
        told = now.report()
        if told.trial is not None or told.release != told.good_release:
            self.problems.append(f"release {told.release} in force, {told.good_release} is good")
        if told.source == "remote" and told.release not in self.confirmed:
            self.problems.append(f"release {told.release} is in force and nobody confirmed it")


SCRIPTS: dict[str, tuple[int, list[tuple[Any, ...]]]] = {  # what is in force at the end when nothing crashes, and what happens
    "confirmed": (2, [("want", 2), ("confirm", 2)]),
    "forgotten": (1, [("want", 2), ("passes", 61)]),
    "not signed, then right": (4, [("want", 3), ("confirm", 3), ("want", 4), ("confirm", 4)]),
    "one after the other": (4, [("want", 2), ("confirm", 2), ("want", 4), ("confirm", 4)]),
    "confirmed, then forgotten": (2, [("want", 2), ("confirm", 2), ("want", 4), ("passes", 61)]),
    "cancelled": (1, [("want", 2), ("cancel", 2), ("confirm", 2)]),
    "reset": (1, [("want", 2), ("confirm", 2), ("reset", 2)]),
    "starts again and again": (1, [("want", 2), ("starts",), ("starts",), ("starts",), ("confirm", 2)]),
}


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory: a disk's fsync takes milliseconds, thousands of times."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    yield folder
    shutil.rmtree(folder)


def run(
    memory: Path, script: list[tuple[Any, ...]], at: tuple[int, ...], *, power: bool, monkeypatch: pytest.MonkeyPatch
) -> World:
    state = memory / "state"
    shutil.rmtree(state, ignore_errors=True)
    state.mkdir()
    disk = Disk(state)
    monkeypatch.setattr(os, "fsync", disk.fsync)
    world = World(memory / "made", disk, Schedule(MODULES, at), power)
    now = world.boot()
    for step in script:
        now = world.do(now, step) if step[0] != "starts" else world.boot()
    world.finish(now)
    monkeypatch.undo()
    return world


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # files of the dead
def test_a_crash_at_any_line_ends_in_a_good_release(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2, 3, 4):
        place = "tiny" if number == 1 else f"release-{number}"
        tiny_bundle(memory / "made", place=place, release=number)
    (memory / "made" / "release-3" / "signature").unlink()
    rng, count, lines, crashes = random.Random(7), 0, 0, 0
    for name, (release, script) in SCRIPTS.items():
        calm = run(memory, script, (), power=False, monkeypatch=monkeypatch)
        assert calm.problems == [], name
        assert calm.release == release, name
        lines += calm.schedule.lines
        singles = [(line,) for line in range(1, calm.schedule.lines + 40)]
        pairs = [tuple(sorted(rng.sample(range(1, calm.schedule.lines * 2), 2))) for _ in singles]
        for at in (*singles, *pairs) if LONG else (*singles[::92], *pairs[::188]):
            for power in (False, True):
                world = run(memory, script, at, power=power, monkeypatch=monkeypatch)
                assert world.problems == [], f"{name}, crash before line {at}, {'power cut' if power else 'kill'}"
                count, crashes = count + 1, crashes + world.schedule.done
    print(f"\n{len(SCRIPTS)} scripts of {lines} lines: {count} schedules, {crashes} crashes, 0 violations")
    assert count >= (5000 if LONG else 150)
    assert crashes >= count / 2, "the crashes must have happened"


def test_a_kill_in_any_phase_ends_in_a_good_release(tmp_path: Path, mosquitto: Mosquitto) -> None:
    plant = Plant(tmp_path, mosquitto.port)
    numbers = itertools.count(2)
    with listening(mosquitto.port) as listener, DaemonProcess(plant.device) as daemon, plant.parts(listener, 0.1):
        for phase in ("fetch", "build", "shadow", "trial"):
            ready(listener)
            number = next(numbers)
            good = until(lambda: reported(listener).get("good_release"), what="a report")
            want(listener, number, plant.release(number), confirm_parts=30)

            def reached(phase: str = phase, number: int = number) -> bool:
                told = reported(listener)
                if phase == "trial":
                    return bool(told.get("trial"))
                now = (told.get("phase") or {}).get("name")
                return now == phase or bool(told.get("trial")) or told["release"] == number

            until(reached, 30, phase)
            daemon.kill()
            daemon.start()
            told = ended(listener, number, "committed", timeout_s=60)
            assert told["release"] == told["good_release"] == number
            assert good < number
        assert "Traceback" not in daemon.log


def test_swap_after_swap_under_load_each_trigger_gets_one_result_by_one_release(tmp_path: Path, mosquitto: Mosquitto) -> None:
    swaps = 20 if LONG else 4
    plant = Plant(tmp_path, mosquitto.port)
    with drained(mosquitto.port) as found, listening(mosquitto.port) as listener, DaemonProcess(plant.device):
        ready(listener)
        with plant.parts(listener, 0.02) as sent:
            for number in range(2, swaps + 2):
                want(listener, number, plant.release(number, threshold=0.5 + number / 1000), shadow_parts=5, confirm_parts=20)
                ended(listener, number, "committed", timeout_s=60)
            until(lambda: len(sent) >= (1000 if LONG else 200), 120, "triggers")
        until(lambda: len(found) == len(sent), 60, "all results")
        time.sleep(0.5)
    assert [r.trigger_id for r in found] == sent, "lost, doubled or out of order"
    assert {r.reason.value for r in found} == {"above_threshold", "below_threshold"}, "a part was missed at a swap"
    assert releases(found) == sorted(releases(found))
    assert {(r.findings[0].bundle.release, r.findings[0].threshold) for r in found} == {
        (1, 0.5), *((number, 0.5 + number / 1000) for number in range(2, swaps + 2)),
    }  # fmt: skip
    print(f"\n{swaps} swaps, {len(sent)} triggers, each with one result, none undecided")
