"""Threads that the system knows by name: `top -H -p PID` and `ps -L` show which one is busy or stuck."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

_LONGEST = 15
"""Of a name, in bytes (prctl(2), PR_SET_NAME)."""


class Thread(threading.Thread):
    """A thread whose name is the system's, too; Python does that from 3.14 on."""

    def run(self) -> None:
        """Name itself, then work."""
        with contextlib.suppress(OSError):  # a name is for people; without /proc there is none
            Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(self.name[:_LONGEST])
        super().run()
