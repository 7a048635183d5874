"""Wires to the line: pulses for a verdict, and a heartbeat that ends with the process.

`ok` is pulsed for a pass, `reject` for everything else, each at its own delay after the trigger, when the part is where the
diverter stands. A fail is pulsed at once, a pass only when its record is on disk: the caller sees to that. What must never be:
a pulse that comes so late that it meets the next part; a heartbeat without a daemon that judges.

A killed process leaves its lines as the chip likes, most likely as they were. So wire `ok` through a relay that the heartbeat
holds: it drops when the edges stop.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from edge_inspector.config import OutputConfig
from edge_inspector.errors import OutputError
from edge_inspector.installation import install
from edge_inspector.messages import Cause
from edge_inspector.results import Verdict
from edge_inspector.threads import Thread

log = logging.getLogger(__name__)

ALIVE_S = 2.0
"""For how long the daemon's last sign of life keeps the heartbeat going."""
_IDLE_S = 1.0
_LATELY_S = 60.0
_PAGE = 4096


class Lines(Protocol):
    """Output lines of one chip, requested together, all inactive at first."""

    def set(self, line: int, active: bool) -> None:
        """Raises OSError."""
        ...

    def close(self) -> None:
        """Let go of them."""
        ...


class GpiodLines:
    """Lines of a real chip, by the kernel's character device (libgpiod 2). Raises OutputError where they cannot be had."""

    def __init__(self, chip: str, lines: Mapping[int, bool]) -> None:
        """`lines`: number -> whether it is active when low."""
        try:
            import gpiod  # noqa: PLC0415 - an extra
            from gpiod.line import Direction, Value  # noqa: PLC0415
        except ImportError as error:
            raise OutputError(f"gpiod cannot be loaded: {error}", hint=install("gpiod")) from error
        self._values = {False: Value.INACTIVE, True: Value.ACTIVE}
        settings: dict[Any, Any] = {
            line: gpiod.LineSettings(direction=Direction.OUTPUT, output_value=Value.INACTIVE, active_low=low)
            for line, low in lines.items()
        }
        try:
            self._request: Any = gpiod.request_lines(chip, consumer="edge-inspector", config=settings)
        except (OSError, ValueError) as error:
            told = f"{chip}, lines {', '.join(map(str, lines))}: {error}"
            raise OutputError(
                told, hint="gpioinfo lists chips and lines; may this user open it, and does nobody else?"
            ) from error

    def set(self, line: int, active: bool) -> None:
        """Drive a line."""
        self._request.set_value(line, self._values[active])

    def close(self) -> None:
        """Release the lines."""
        self._request.release()


class FileLines:
    """A chip that is a file, one byte for each line, for trials without hardware: `chip: file:///tmp/lines`.

    It shows voltages: an active line that is `active_low` is 0. Like a chip, it keeps them when the process dies.
    """

    def __init__(self, chip: str, lines: Mapping[int, bool]) -> None:
        """`lines`: number -> whether it is active when low."""
        try:
            descriptor = os.open(chip.removeprefix("file://"), os.O_RDWR | os.O_CREAT, 0o644)
            try:
                os.ftruncate(descriptor, _PAGE)
                self._voltages = mmap.mmap(descriptor, _PAGE)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise OutputError(f"{chip}: {error.strerror}", hint="a file in a folder that exists") from error
        self._low = dict(lines)
        for line in lines:
            self.set(line, False)

    def set(self, line: int, active: bool) -> None:
        """Drive a line."""
        self._voltages[line] = active != self._low[line]

    def close(self) -> None:
        """Let go of the file."""
        self._voltages.close()


def opened(chip: str, lines: Mapping[int, bool]) -> Lines:
    """The lines of a chip. Raises OutputError."""
    return FileLines(chip, lines) if chip.startswith("file://") else GpiodLines(chip, lines)


@dataclass
class OutputCounts:
    """What happened since the start."""

    pulses: int = 0
    missed: int = 0
    """Verdicts that came when their part had passed the diverter."""


@dataclass(eq=False)
class _Pulse:
    line: int
    on_s: float
    off_s: float
    driven: bool = False


class Outputs:
    """Drives the lines of one station in a thread of its own. Use as a context manager."""

    def __init__(self, station: str, config: OutputConfig) -> None:
        """Nothing is opened before `__enter__`."""
        self.config = config
        self.counts = OutputCounts()
        self._station = station
        self._missed_s = float("-inf")
        self.failure: Exception | None = None
        self._alive_s = float("-inf")
        self._pulses: list[_Pulse] = []
        self._active: set[int] = set()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = Thread(target=self._run, name=f"outputs-{station}", daemon=True)

    def __enter__(self) -> Outputs:
        """Open the lines, all inactive. Raises OutputError."""
        self._lines = opened(self.config.chip, self.config.lines)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """All lines inactive, then let go."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(2.0)

    def alive(self) -> None:
        """The daemon judges: the heartbeat may go on for ALIVE_S."""
        self._alive_s = time.monotonic()

    def verdict(self, verdict: Verdict, triggered_s: float, expires_s: float) -> None:
        """Pulse the line of a verdict while its part is at the diverter; never blocks.

        With a delay the pulse has its place in time and is cut short where the verdict comes late; without one it may begin
        until the verdict expires.
        """
        pulse = self.config.ok if verdict is Verdict.PASS else self.config.reject
        if pulse is None:
            return
        now_s = time.monotonic()
        on_s = triggered_s + pulse.delay_ms / 1e3 if pulse.delay_ms else now_s
        off_s = on_s + pulse.pulse_ms / 1e3
        with self._changed:
            if now_s >= (off_s if pulse.delay_ms else expires_s):
                self._missed(now_s)
                return
            self._pulses.append(_Pulse(pulse.line, on_s, off_s))
            self._changed.notify_all()

    def causes(self) -> list[Cause]:
        """What is wrong with the wires."""
        if time.monotonic() - self._missed_s > _LATELY_S:
            return []
        text = f"{self.counts.missed} verdicts since the start came when their part had passed the diverter"
        return [Cause(code="output_missed", severity="failure", thing=self._station, text=text)]

    def _missed(self, now_s: float) -> None:
        self.counts.missed += 1
        self._missed_s = now_s

    def _drive(self, now_s: float) -> float:
        """Set each line as its pulses say; returns when the next of them begins or ends."""
        with self._changed:
            begun = [pulse for pulse in self._pulses if pulse.on_s <= now_s]
            over = [pulse for pulse in begun if pulse.off_s <= now_s]
            for pulse in over:
                if not pulse.driven:  # this thread was held up all the while
                    self._missed(now_s)
            self._pulses = [pulse for pulse in self._pulses if pulse not in over]
            next_s = min((p.off_s if p.on_s <= now_s else p.on_s for p in self._pulses), default=now_s + _IDLE_S)
        active = {pulse.line for pulse in begun if pulse not in over}
        for pulse in begun:
            self.counts.pulses += pulse not in over and not pulse.driven
            pulse.driven = True
        for line in self._active ^ active:
            self._lines.set(line, line in active)
        self._active = active
        return next_s

    def _run(self) -> None:
        beat, beats_s, high = self.config.heartbeat, 0.0, False
        try:
            while not self._closing:
                now_s = time.monotonic()
                next_s = self._drive(now_s)
                if beat is not None and now_s >= beats_s and now_s - self._alive_s < ALIVE_S:
                    beats_s, high = now_s + beat.period_ms / 2e3, not high
                    self._lines.set(beat.line, high)
                if beat is not None:
                    next_s = min(next_s, max(beats_s, now_s + beat.period_ms / 20e3))
                with self._changed:
                    if not self._closing and not any(pulse.on_s < next_s for pulse in self._pulses if not pulse.driven):
                        self._changed.wait(max(0.0, next_s - time.monotonic()))
            for line in self.config.lines:
                self._lines.set(line, False)
        except Exception as error:  # root of a thread: the heartbeat ends with it, and the daemon says why
            log.exception("outputs on %s", self.config.chip)
            self.failure = error
        finally:
            self._lines.close()
