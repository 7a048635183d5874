"""Wires to the line: pulses in time, a heartbeat that ends with the process; on a file, and on a chip below the real libgpiod."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_inspector.config import OutputConfig
from edge_inspector.errors import OutputError
from edge_inspector.outputs import Outputs
from edge_inspector.results import Verdict
from tests.line import DaemonProcess, Mosquitto, device_folder, line_yaml, listening, needed, preloadable, until

OK, REJECT, BEAT = 3, 5, 7
CHIP = "/dev/gpiochip99"


@pytest.fixture(params=["file", "gpiod"])
def chip(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, dict[str, str]]:
    """The address of a chip, the file that shows its voltages, and the environment in which it exists."""
    voltages = tmp_path / "voltages"
    voltages.write_bytes(bytes(64))
    if request.param == "file":
        return f"file://{voltages}", voltages, {}
    needed(importlib.util.find_spec("gpiod"), 'pip install "edge-inspector[gpiod]"')
    return CHIP, voltages, {"LD_PRELOAD": preloadable("gpiochip", tmp_path), "GPIOCHIP": str(voltages)}


class Watch:
    """What a PLC sees of the lines, looking every half millisecond."""

    def __init__(self, voltages: Path) -> None:
        self.voltages = voltages
        self.edges: list[tuple[float, int, int]] = []
        self._last = self.now()

    def now(self) -> bytes:
        return self.voltages.read_bytes()[:64]

    def look(self, until_s: float, done: Callable[[], bool] = lambda: False) -> None:
        while time.monotonic() < until_s and not done():
            now = self.now()
            self.edges += [(time.monotonic(), n, now[n]) for n in range(64) if now[n] != self._last[n]]
            self._last = now
            time.sleep(0.0005)

    def of(self, line: int) -> list[tuple[float, int]]:
        return [(at, level) for at, number, level in self.edges if number == line]


PULSES = """
import sys, time
from edge_inspector.config import OutputConfig
from edge_inspector.outputs import Outputs
from edge_inspector.results import Verdict
config = OutputConfig.model_validate({
    "chip": sys.argv[1], "ok": {"line": 3, "pulse_ms": 100, "delay_ms": 200},
    "reject": {"line": 5, "pulse_ms": 100, "active_low": True}, "heartbeat": {"line": 7, "period_ms": 40}})
with Outputs("press", config) as outputs:
    print("open", flush=True)
    end = time.monotonic() + 1.5
    outputs.alive()
    for verdict in sys.argv[2:]:
        print(time.monotonic(), flush=True)
        outputs.verdict(Verdict(verdict), time.monotonic(), time.monotonic() + 5)
    while time.monotonic() < end:
        outputs.alive()
        time.sleep(0.1)
print(outputs.counts.pulses, flush=True)
"""


def started(chip: tuple[str, Path, dict[str, str]], *verdicts: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PULSES, chip[0], *verdicts], stdout=subprocess.PIPE, text=True, env={**os.environ, **chip[2]}
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    return process


def test_verdicts_pulse_their_lines_at_their_time_and_the_heartbeat_beats(chip: tuple[str, Path, dict[str, str]]) -> None:
    process = started(chip, "pass", "fail")
    watch = Watch(chip[1])
    assert process.stdout is not None
    told_s = float(process.stdout.readline())
    watch.look(time.monotonic() + 1.2)
    (on_s, high), (off_s, low) = watch.of(OK)
    assert (high, low) == (1, 0)
    assert 0.19 < on_s - told_s < 1.0, "the part needs 200 ms to the diverter"
    assert 0.08 < off_s - on_s < 1.0
    assert [level for _, level in watch.of(REJECT)][-1:] == [1], "active low: high again after the pulse"
    assert len(watch.of(BEAT)) > 20
    process.communicate(timeout=10)
    assert process.returncode == 0
    assert chip[1].read_bytes()[REJECT] == 1, "all inactive after the end"
    assert chip[1].read_bytes()[OK] == chip[1].read_bytes()[BEAT] == 0


def test_a_killed_process_beats_no_more(chip: tuple[str, Path, dict[str, str]]) -> None:
    """What an external relay sees: it holds while edges come, and drops when they stop."""
    process = started(chip, "pass")
    watch = Watch(chip[1])
    watch.look(time.monotonic() + 5, lambda: len(watch.of(BEAT)) > 8)
    assert len(watch.of(BEAT)) > 8
    process.send_signal(signal.SIGKILL)
    process.communicate()
    beats = len(watch.of(BEAT))
    watch.look(time.monotonic() + 0.5)
    assert len(watch.of(BEAT)) <= beats + 1


def test_a_verdict_that_comes_late_ends_its_pulse_where_its_part_ends(tmp_path: Path) -> None:
    given = {"chip": f"file://{tmp_path / 'v'}", "ok": {"line": OK, "pulse_ms": 300, "delay_ms": 100}}
    with Outputs("press", OutputConfig.model_validate(given)) as outputs:
        watch = Watch(tmp_path / "v")
        now_s = time.monotonic()
        outputs.verdict(Verdict.PASS, now_s - 0.3, now_s + 5)  # its pulse would have begun 200 ms ago
        watch.look(now_s + 1.0)
    (on_s, _), (off_s, _) = watch.of(OK)
    assert off_s - on_s < 0.2
    assert off_s < now_s + 0.2


def test_a_verdict_that_is_worth_nothing_any_more_pulses_nothing(tmp_path: Path) -> None:
    with Outputs(
        "press", OutputConfig.model_validate({"chip": f"file://{tmp_path / 'v'}", "reject": {"line": REJECT}})
    ) as outputs:
        watch = Watch(tmp_path / "v")
        outputs.verdict(Verdict.FAIL, time.monotonic() - 30, time.monotonic() - 29)
        watch.look(time.monotonic() + 0.2)
        assert watch.of(REJECT) == []
        assert outputs.counts.missed == 1


def test_a_daemon_that_no_longer_judges_beats_no_more(tmp_path: Path) -> None:
    voltages = tmp_path / "v"
    config = OutputConfig.model_validate({"chip": f"file://{voltages}", "heartbeat": {"line": BEAT, "period_ms": 40}})
    with Outputs("press", config) as outputs:
        watch = Watch(voltages)
        watch.look(time.monotonic() + 0.3)
        assert watch.of(BEAT) == [], "not before the daemon says so"
        outputs.alive()
        watch.look(time.monotonic() + 1.0)
        assert len(watch.of(BEAT)) > 10
        watch.look(time.monotonic() + 1.5)
        beats = len(watch.of(BEAT))
        watch.look(time.monotonic() + 0.5)
        assert len(watch.of(BEAT)) == beats


def test_a_verdict_that_comes_when_its_part_has_passed_is_counted_and_pulses_nothing(tmp_path: Path) -> None:
    given = {"chip": f"file://{tmp_path / 'v'}", "reject": {"line": REJECT, "pulse_ms": 20, "delay_ms": 100}}
    with Outputs("press", OutputConfig.model_validate(given)) as outputs:
        watch = Watch(tmp_path / "v")
        outputs.verdict(Verdict.FAIL, time.monotonic() - 0.5, time.monotonic() + 5)
        watch.look(time.monotonic() + 0.2)
        assert watch.of(REJECT) == []
        assert (outputs.counts.missed, outputs.counts.pulses) == (1, 0)


def test_pulses_that_meet_are_one_long_one(tmp_path: Path) -> None:
    given = {"chip": f"file://{tmp_path / 'v'}", "reject": {"line": REJECT, "pulse_ms": 200}}
    with Outputs("press", OutputConfig.model_validate(given)) as outputs:
        watch = Watch(tmp_path / "v")
        outputs.verdict(Verdict.FAIL, 0.0, time.monotonic() + 5)
        watch.look(time.monotonic() + 0.1)
        outputs.verdict(Verdict.UNDECIDED, 0.0, time.monotonic() + 5)
        watch.look(time.monotonic() + 0.6)
    (on_s, _), (off_s, _) = watch.of(REJECT)
    assert off_s - on_s > 0.29


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"chip": "/dev/gpiochip0"}, "one of ok, reject and heartbeat"),
        ({"chip": "x", "ok": {"line": 1}, "reject": {"line": 1}}, "need a line each"),
        ({"chip": "x", "ok": {"line": -1}}, "greater than or equal to 0"),
    ],
)
def test_wires_that_make_no_sense_are_refused(given: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        OutputConfig.model_validate(given)


def test_a_chip_that_cannot_be_had_is_told_with_what_to_do() -> None:
    for chip in ("/dev/gpiochip77", "file:///nowhere/lines"):
        with pytest.raises(OutputError) as caught:
            Outputs("press", OutputConfig.model_validate({"chip": chip, "ok": {"line": 1}})).__enter__()
        assert chip.rsplit("/", 1)[0] in caught.value.message or "gpiod" in caught.value.message
        assert caught.value.hint


def test_the_daemon_drives_the_lines_and_its_death_stops_the_heartbeat(
    tmp_path: Path, mosquitto: Mosquitto, chip: tuple[str, Path, dict[str, str]]
) -> None:
    wires = (
        f'outputs: {{sheet: {{chip: "{chip[0]}", ok: {{line: {OK}, pulse_ms: 50}}, reject: {{line: {REJECT}, pulse_ms: 50}}, '
        f"heartbeat: {{line: {BEAT}, period_ms: 50}}}}}}\n"
    )
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml(), extra=wires)
    with DaemonProcess(folder, chip[2]) as daemon, listening(mosquitto.port) as listener:
        until(lambda: [r for r in listener.of("ready", "sheet") if r["ready"]], 30, "ready")
        watch = Watch(chip[1])
        for number in range(12):
            listener.say({"trigger_id": f"T{number}"}, "trigger", "sheet")
            watch.look(time.monotonic() + 0.3)
        verdicts = [v["verdict"] for v in listener.of("verdict", "sheet")]
        assert len(verdicts) == 12
        for line, count in ((OK, verdicts.count("pass")), (REJECT, 12 - verdicts.count("pass"))):
            assert sum(level for _, level in watch.of(line)) == count
        assert {"pass", "fail"} <= set(verdicts)
        assert len(watch.of(BEAT)) > 60
        for order, beating in (("halt", False), ("start", True)):
            listener.say({"request_id": "r", "client": "c", "station": "sheet", "name": order}, "command", order)
            watch.look(time.monotonic() + 3.5)  # what was alive counts for two seconds
            beats = len(watch.of(BEAT))
            watch.look(time.monotonic() + 0.5)
            assert (len(watch.of(BEAT)) > beats) == beating, order
        daemon.kill()
        beats = len(watch.of(BEAT))
        watch.look(time.monotonic() + 0.5)
        assert len(watch.of(BEAT)) <= beats + 1
