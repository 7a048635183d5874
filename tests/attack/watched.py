"""Runs the daemon and tells every file that it or its children open: in a mount namespace of its own, by fanotify(7) on each mount.

`python -m tests.attack.watched DEVICE_YAML RESOLV_CONF`, by `unshare --mount`. Ends the daemon when its standard input ends.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path

_CLASS = 0x0000_0001 | 0x0000_0010 | 0x0000_0020
"""FAN_CLOEXEC, FAN_UNLIMITED_QUEUE, FAN_UNLIMITED_MARKS."""
_ADD, _MOUNT = 0x01, 0x10
_OPEN, _EXECUTED, _WRITTEN, _FOLDERS = 0x20, 0x1000, 0x08, 0x4000_0000
_WATCHED = _OPEN | _EXECUTED | _WRITTEN | _FOLDERS
_HERE = -100
_EVENT = struct.Struct("=IBBHQii")
_LIBC = ctypes.CDLL(None, use_errno=True)


def watcher() -> int:
    """A descriptor that tells what is opened on any mount of this namespace."""
    found = int(_LIBC.fanotify_init(_CLASS, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_LARGEFILE))
    if found < 0:
        raise OSError(ctypes.get_errno(), "fanotify_init")
    marked = 0
    for row in Path("/proc/self/mountinfo").read_text().splitlines():
        place = row.split()[4].encode().decode("unicode_escape")
        marked += _LIBC.fanotify_mark(found, _ADD | _MOUNT, ctypes.c_uint64(_WATCHED), _HERE, os.fsencode(place)) == 0
    if not marked:
        raise OSError(ctypes.get_errno(), "fanotify_mark")
    return found


def tell(watch: int) -> None:
    """Print each path once for reading, once for writing."""
    told = set()
    while True:
        data, at = os.read(watch, 1 << 16), 0
        while at < len(data):
            length, _, _, _, mask, opened, process = _EVENT.unpack_from(data, at)
            at += length
            if opened < 0:
                print(json.dumps(["", "overflow", 0]), flush=True)
                continue
            path = os.readlink(f"/proc/self/fd/{opened}")
            os.close(opened)
            kind = "written" if mask & _WRITTEN else "opened"
            if process != os.getpid() and (path, kind) not in told:
                told.add((path, kind))
                print(json.dumps([path, kind, process]), flush=True)


def main() -> None:
    """See above."""
    device, names = sys.argv[1:]
    subprocess.run(["mount", "--bind", names, "/etc/resolv.conf"], check=True)
    threading.Thread(target=tell, args=(watcher(),), daemon=True).start()
    with Path(device).with_name("log").open("wb") as log:
        daemon = subprocess.Popen(
            [sys.executable, "-m", "edge_inspector.cli", "run", "--config", device], stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            cwd=Path(device).parent,
        )  # fmt: skip
        sys.stdin.read()
        daemon.terminate()
        code = daemon.wait(20)
    print(json.dumps(["", f"ended {code}", daemon.pid]), flush=True)


if __name__ == "__main__":
    main()
