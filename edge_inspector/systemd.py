"""What systemd wants to hear: READY, STATUS, WATCHDOG, STOPPING (sd_notify(3)). Silent where systemd is not."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable

TICK_S = 1.0
"""Every critical loop calls its tick at least this often."""


def notify(message: str, environment: dict[str, str] | os._Environ[str] = os.environ) -> bool:
    """Send one message to the notify socket; returns whether there is one."""
    address = environment.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.sendto(message.encode(), address)
    return True


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

    def hanging(self) -> list[str]:
        """Loops that have not ticked in time."""
        now = time.monotonic()
        with self._lock:
            return sorted(name for name, at in self._ticks.items() if now - at > self.patience_s)

    def ping(self) -> list[str]:
        """Tell systemd that all is well, unless a loop hangs; returns those that do."""
        hanging = self.hanging()
        if not hanging:
            notify("WATCHDOG=1")
        return hanging
