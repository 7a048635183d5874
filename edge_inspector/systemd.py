"""What systemd wants to hear: READY, STATUS, WATCHDOG, STOPPING (sd_notify(3)), and its journal."""

from __future__ import annotations

import logging
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

JOURNAL = "/run/systemd/journal/socket"
FIELDS = ("station", "trigger_id", "part_id", "verdict", "seq")
"""What a log record may carry beside its text (`extra=`); in the journal EI_STATION and so on."""
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
_LONGEST = 32_768
TICK_S = 1.0
"""Every critical loop calls its tick at least this often."""


_unheard: set[str] = set()
"""Notify sockets that are gone, as was logged."""


def notify(message: str, environment: dict[str, str] | os._Environ[str] = os.environ) -> bool:
    """Send one message to the notify socket; returns whether somebody hears it: elsewhere than under systemd nobody does.

    Never waits for long and never raises: a lost status line must not end the line.
    """
    address = environment.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    place = "\0" + address[1:] if address.startswith("@") else address
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.settimeout(TICK_S)
            sender.sendto(message.encode(), place)
    except OSError as error:
        if address not in _unheard:
            log.warning("systemd does not hear us at %s: %s", address, error.strerror or error)
        _unheard.add(address)
        return False
    _unheard.discard(address)
    return True


def is_journal(environment: dict[str, str] | os._Environ[str] = os.environ) -> bool:
    """Whether stderr leads to the journal (systemd.exec(5), JOURNAL_STREAM)."""
    try:
        where = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):  # closed, or no file
        return False
    return environment.get("JOURNAL_STREAM") == f"{where.st_dev}:{where.st_ino}"


class JournalHandler(logging.Handler):
    """Log records as journal entries with fields (systemd's native protocol). Never waits: what it cannot take is lost."""

    def __init__(self, address: str = JOURNAL) -> None:
        """Raises OSError where there is no journal."""
        super().__init__()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self._socket.connect(address)
        self.lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record."""
        try:
            message = self.format(record)[:_LONGEST]
        except Exception:  # noqa: BLE001 - as every handler: who logs nonsense is told on stderr, and goes on
            self.handleError(record)
            return
        entry = {
            "MESSAGE": message, "PRIORITY": _PRIORITIES.get(record.levelno, 6),
            "SYSLOG_IDENTIFIER": "edge-inspector", "LOGGER": record.name, "THREAD_NAME": record.threadName or "",
        }  # fmt: skip
        entry |= {f"EI_{name.upper()}": value for name in FIELDS if (value := getattr(record, name, None)) is not None}
        try:
            self._socket.send(b"".join(_field(name, str(value).encode(errors="replace")) for name, value in entry.items()))
        except OSError:  # the journal is full or gone: nobody is left to tell, and the line must not wait
            self.lost += 1

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
        super().close()


def _field(name: str, value: bytes) -> bytes:
    if b"\n" in value:
        return name.encode() + b"\n" + struct.pack("<Q", len(value)) + value + b"\n"
    return name.encode() + b"=" + value + b"\n"


class Watchdog:
    """Pings systemd as long as every critical loop ticks; a loop that hangs stops the pings, and systemd acts."""

    def __init__(self, patience_s: float = 5.0) -> None:
        """A loop that has not ticked for `patience_s` counts as hanging."""
        self.patience_s = patience_s
        self._ticks: dict[str, float] = {}
        self._lock = threading.Lock()

    def loop(self, name: str) -> Callable[[], None]:
        """Register a critical loop; returns the function that it calls at least once a second."""

        def tick() -> None:
            self._ticks[name] = time.monotonic()

        with self._lock:
            tick()
        return tick

    def forget(self, name: str) -> None:
        """A loop ended on purpose."""
        with self._lock:
            self._ticks.pop(name, None)

    def silent_s(self) -> dict[str, float]:
        """Seconds since each loop ticked."""
        now = time.monotonic()
        with self._lock:
            return {name: now - at for name, at in self._ticks.items()}

    def hanging(self) -> list[str]:
        """Loops that have not ticked in time."""
        return sorted(name for name, silent in self.silent_s().items() if silent > self.patience_s)

    def ping(self) -> list[str]:
        """Tell systemd that all is well, unless a loop hangs; returns those that do."""
        hanging = self.hanging()
        if not hanging:
            notify("WATCHDOG=1")
        return hanging
