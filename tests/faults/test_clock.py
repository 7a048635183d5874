"""A device whose clock jumps by an hour, or that starts in 1970: no timeout of ours goes by the clock on the wall.

The daemon runs under libfaketime, which moves the wall clock of this process alone. EDGE_INSPECTOR_LONG=1 jumps more often.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from edge_inspector.config import parse_line
from edge_inspector.results import Verdict
from edge_inspector.schema import read_yaml
from tests.faults.rigs import Http
from tests.line import DaemonProcess, Listener, Mosquitto, collected, listening, needed, preloadable, subscribing, until
from tests.plant import Plant

ROUNDS = 4 if os.environ.get("EDGE_INSPECTOR_LONG") else 1
HOUR_S = 3600
OFF = 0.1
"""By which a timeout may be early or late, as a share of it."""
LOOK_S = 0.5
"""How often the daemon looks whether a trial is over."""
EXPIRES_S, CAMERA_S, CONFIRM_S = 2.0, 4.0, 6
SETTLES_S = 0.2
"""For pictures on their way to arrive."""
BUSY_S = 1.0
"""For messages on their way on a busy machine. By the wall clock it would be an hour."""
TIMEOUTS = {"part": (EXPIRES_S, BUSY_S), "camera": (CAMERA_S, BUSY_S), "trial": (CONFIRM_S, LOOK_S + BUSY_S)}
"""Each with what it may be late besides."""
UNSYNCHRONISED, SYNCHRONISED = 5, 0
LINE = """\
schema: ei.line.v1
version: {version}
stations:
  press:
    trigger: software
    expires_ms: 30000
    product: tiny
    products: {{tiny: whole}}
    cameras: {{top: {{uri: "dir://{pictures}?loop=1"}}}}
  gate:
    trigger: software
    expires_ms: 2000
    product: tiny
    products: {{tiny: whole}}
    cameras: {{top: {{uri: "{uri}", timeout_ms: 4000, latency_ms: 20, guards: {{frozen_frames: 0}}}}}}
recipes:
  whole: {{cameras: {{top: {{rois: {{all: {{bundle: tiny, threshold: {threshold}}}}}}}}}}}
"""


class Clock:
    """The wall clock of a daemon, and what the kernel says of it."""

    def __init__(self, folder: Path) -> None:
        library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
        needed(library, "apt install libfaketime")
        self._time, self._state, self.ahead_s = folder / "clock-time", folder / "clock-state", 0
        self.environment = {
            "LD_PRELOAD": f"{preloadable('clock', folder)}:{library}", "ADJTIMEX": str(self._state),
            "FAKETIME_TIMESTAMP_FILE": str(self._time), "FAKETIME_NO_CACHE": "1", "DONT_FAKE_MONOTONIC": "1",
        }  # fmt: skip
        self.set(0, SYNCHRONISED)

    def set(self, ahead_s: int, state: int) -> None:
        """From now on the clock is so much ahead of the true one."""
        self.ahead_s = ahead_s
        for path, text in ((self._time, f"{ahead_s:+d}\n"), (self._state, f"{state}\n")):
            part = path.with_suffix(".part")
            part.write_text(text)
            os.replace(part, path)  # it is read all the time

    def shows(self, moment: str) -> float:
        """By how many seconds a moment of the daemon's is later than what its clock shows now."""
        return datetime.fromisoformat(moment.replace("Z", "+00:00")).timestamp() - time.time() - self.ahead_s


class Rig:
    """A device with two stations: parts come by at the one, the other one's camera can be stopped."""

    def __init__(self, folder: Path, port: int, camera: Http) -> None:
        self.plant, self.clock, self.camera = Plant(folder, port), Clock(folder), camera
        self.pictures = folder / "pictures"
        (self.plant.device / "line.yaml").write_text(self.line(1))
        self.daemon = DaemonProcess(self.plant.device, self.clock.environment)

    def line(self, version: int) -> str:
        """Parts at the press are judged; whatever comes to the gate passes in the first version."""
        return LINE.format(version=version, pictures=self.pictures, uri=self.camera.uri, threshold=0.5 + version)

    def want(self, listener: Listener, version: int) -> None:
        """Order another configuration, on trial."""
        line = parse_line(read_yaml(self.line(version).encode(), "line.yaml"), "line.yaml").document()
        listener.say({"by": "anna", "line": line, "confirm_s": CONFIRM_S}, "config", "desired", retain=True)


@pytest.fixture
def camera(tmp_path: Path) -> Iterator[Http]:
    found = Http(tmp_path)
    found.start()
    yield found
    found.stop()


def ready(listener: Listener) -> None:
    until(lambda: all(any(told["ready"] for told in listener.of("ready", name)) for name in ("press", "gate")), what="ready")


def outcome(listener: Listener) -> tuple[int, str]:
    """Of the last order: its version, and what became of it."""
    told = (listener.of("config", "reported") or [{}])[-1].get("last") or {}
    return told.get("version") or 0, told.get("outcome") or ""


def verdicts(listener: Listener, trigger_id: str) -> list[dict[str, Any]]:
    return [told for told in listener.of("verdict", "gate") if told["trigger_id"] == trigger_id]


def when(conditions: dict[str, Callable[[], Any]], timeout_s: float) -> dict[str, float]:
    """When each of these came true."""
    found: dict[str, float] = {}

    def looked() -> bool:
        for name, condition in conditions.items():
            if name not in found and condition():
                found[name] = time.monotonic()
        return len(found) == len(conditions)

    until(looked, timeout_s, f"all of {', '.join(conditions)}")
    return found


def timely(what: str, took_s: float, seconds: float, late_s: float) -> None:
    print(f"\n{what}: {took_s:.2f} s of {seconds:g}")
    assert (1 - OFF) * seconds <= took_s <= (1 + OFF) * seconds + late_s, what


def jumped(rig: Rig, listener: Listener, number: int) -> None:
    """With a trial, a part and a camera's silence under way the clock jumps ahead and back: each ends when it should."""
    version, part = number + 2, f"G-{number}"
    rig.want(listener, version)
    until(lambda: outcome(listener) == (version, "trial"), what="trial")
    began = {"trial": time.monotonic()}
    rig.camera.do("hang")
    began["camera"] = time.monotonic()
    time.sleep(SETTLES_S)
    listener.say({"trigger_id": part}, "trigger", "gate")
    began["part"] = time.monotonic()
    for ahead_s in (HOUR_S, -HOUR_S):
        time.sleep(SETTLES_S)
        rig.clock.set(ahead_s, SYNCHRONISED)
    ended = when({"part": lambda: verdicts(listener, part)}, 3 * EXPIRES_S)
    (told,) = verdicts(listener, part)
    assert told["verdict"] == "undecided"
    assert abs(rig.clock.shows(told["expires_at"])) < CONFIRM_S, "it says until when by the clock that it was told by"
    listener.say({"trigger_id": part}, "trigger", "gate")
    until(lambda: len(verdicts(listener, part)) == 2, what="the answer to who asks again")
    ended |= when({
        "camera": lambda: "silent" in listener.of("ready", "gate")[-1]["reason"],
        "trial": lambda: outcome(listener) == (version, "rolled_back"),
    }, 3 * CONFIRM_S)  # fmt: skip
    for name, (seconds, late_s) in TIMEOUTS.items():
        timely(name, ended[name] - began[name], seconds, late_s)
    rig.camera.mend()
    until(lambda: listener.of("ready", "gate")[-1]["ready"], what="its camera")


def test_an_hour_more_and_less_moves_no_timeout_and_no_part_and_keeps_no_verdict_alive(
    tmp_path: Path, mosquitto: Mosquitto, camera: Http
) -> None:
    rig = Rig(tmp_path, mosquitto.port, camera)
    with listening(mosquitto.port, "plc"):
        """It will be away; the broker keeps for it what it missed."""
    with listening(mosquitto.port) as listener, subscribing(mosquitto.port) as subscriber, rig.daemon:
        ready(listener)
        with rig.plant.parts(listener, 0.1) as sent:
            for number in range(ROUNDS):
                jumped(rig, listener, number)
        results = collected(subscriber, len(sent) + ROUNDS)
        with listening(mosquitto.port, "plc") as plc:
            until(lambda: len(plc.of("result", "gate")) == ROUNDS, what="what the broker kept")
            assert not plc.of("verdict", "gate"), "these parts have gone"
    press = [result for result in results if result.station == "press"]
    assert [result.trigger_id for result in press] == sent
    assert [result.seq for result in press] == list(range(1, len(sent) + 1))
    assert [(result.trigger_id, result.detail) for result in press if result.verdict is not Verdict.PASS] == []
    assert all(result.clock_ok for result in press)
    assert [result.seq for result in results if result.station == "gate"] == list(range(1, ROUNDS + 1))
    assert len({result.triggered_at.hour for result in press}) > 1, "the clock did jump"


def test_a_device_that_starts_in_1970_judges_in_time_and_says_that_its_clock_is_wrong_until_it_is_right(
    tmp_path: Path, mosquitto: Mosquitto, camera: Http
) -> None:
    rig = Rig(tmp_path, mosquitto.port, camera)
    rig.clock.set(HOUR_S - int(time.time()), UNSYNCHRONISED)
    with listening(mosquitto.port) as listener, subscribing(mosquitto.port) as subscriber, rig.daemon:
        ready(listener)
        with rig.plant.parts(listener, 0.1) as sent:
            until(lambda: len(sent) > 10, what="parts")
            camera.do("hang")
            time.sleep(SETTLES_S)
            until_s = datetime.fromtimestamp(time.time() + 10 * EXPIRES_S, timezone.utc).isoformat()
            listener.say({"trigger_id": "G", "expires_at": until_s}, "trigger", "gate")
            began = time.monotonic()
            until(lambda: verdicts(listener, "G"), what="its end")
            timely("part", time.monotonic() - began, *TIMEOUTS["part"])
            assert not listener.of("health")[-1]["clock"]["ok"]
            wrong = len(listener.of("result", "press"))
            rig.clock.set(0, SYNCHRONISED)
            until(lambda: listener.of("result", "press")[-1]["clock_ok"], what="a clock that is right")
            until(lambda: listener.of("health")[-1]["clock"]["ok"], what="health")
        press = [result for result in collected(subscriber, len(sent) + 1) if result.station == "press"]
    assert [result.trigger_id for result in press] == sent
    assert [result.seq for result in press] == list(range(1, len(sent) + 1))
    assert {result.verdict.value for result in press} == {"pass"}
    assert {result.clock_ok for result in press[:wrong]} == {False}
    assert press[-1].clock_ok
    assert (press[0].triggered_at.year, press[-1].triggered_at.year > 2000) == (1970, True)
