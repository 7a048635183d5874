"""Walls around a camera's process: Landlock, by ctypes on the kernel's calls (landlock(7), Linux 5.13 and later).

What a process may write is named; where it is asked for, also what it may read and which TCP ports it may reach. It cannot be
taken back, holds for every process that it starts, and needs no privileges.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import stat
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

_CREATE, _ADD, _RESTRICT = 444, 445, 446
_VERSION, _BENEATH, _PORT = 1, 1, 2
_NO_NEW_PRIVILEGES = 38
_EXECUTE, _WRITE, _READ_FILE, _READ_FOLDER = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_MAKE = 0b1_1111_1111 << 4
"""Remove folders and files, make devices, folders, files, sockets, pipes, links."""
_REFER, _TRUNCATE, _DEVICE = 1 << 13, 1 << 14, 1 << 15
_SINCE = {2: _REFER, 3: _TRUNCATE, 5: _DEVICE}
_BIND, _CONNECT = 1 << 0, 1 << 1
_NET_SINCE, _SCOPES_SINCE, _SCOPES = 4, 6, 0b11
"""Scopes: no abstract socket of, and no signal to, a process outside."""
_FOR_FILES = _EXECUTE | _WRITE | _READ_FILE | _TRUNCATE | _DEVICE

MISSING = "this kernel has no Landlock (Linux 5.13 or newer, with landlock among its lsm=), or a unit forbids it"


@dataclass(frozen=True)
class Walls:
    """What a process is left with; paths that are not there are passed over."""

    folders: Sequence[str]
    """Where it may make, write and remove files."""
    devices: Sequence[str] = ()
    """Device nodes, or folders of such, that it may use."""
    reads: Sequence[str] | None = None
    """What else it may read; None: everything that its user may."""
    ports: Sequence[int] | None = None
    """TCP ports that it may connect to, listening on none; None: any."""
    alone: bool = False
    """Whether no signal and no abstract socket of another process may be reached."""


@cache
def version() -> int:
    """What the kernel's Landlock can do, as a number; 0 where there is none, or where a unit forbids the calls."""
    return max(0, int(ctypes.CDLL(None).syscall(_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION))))


def confine(walls: Walls) -> None:
    """Put them around this thread and all that it will start. Raises OSError."""
    known = version()
    files = _WRITE | _MAKE | sum(right for since, right in _SINCE.items() if known >= since)
    reading = _EXECUTE | _READ_FILE | _READ_FOLDER
    if walls.reads is not None:
        files |= reading
    ports = _BIND | _CONNECT if walls.ports is not None and known >= _NET_SINCE else 0
    scopes = _SCOPES if walls.alone and known >= _SCOPES_SINCE else 0
    ruleset = struct.pack("=QQQ", files, ports, scopes)
    size = 8 if known < _NET_SINCE else 16 if known < _SCOPES_SINCE else 24
    created = _call(_CREATE, ruleset, ctypes.c_size_t(size), ctypes.c_uint32(0))
    try:
        _allow(created, walls.folders, files)
        _allow(created, walls.devices, files & (_WRITE | _TRUNCATE | _DEVICE | reading))
        _allow(created, walls.reads or (), reading)
        for port in (walls.ports or ()) if ports else ():
            _call(_ADD, created, _PORT, struct.pack("=QQ", _CONNECT, port), ctypes.c_uint32(0))
        if ctypes.CDLL(None, use_errno=True).prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "no_new_privs was refused")
        _call(_RESTRICT, created, ctypes.c_uint32(0))
    finally:
        os.close(created)


def _allow(ruleset: int, paths: Sequence[str], rights: int) -> None:
    for path in paths:
        try:
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # a device that is not there, a cache that nobody has made
        try:
            is_folder = stat.S_ISDIR(os.fstat(opened).st_mode)
            given = rights if is_folder else rights & _FOR_FILES
            with suppress(_NoFile):
                _call(_ADD, ruleset, _BENEATH, struct.pack("=Qi", given, opened), ctypes.c_uint32(0))
        finally:
            os.close(opened)


class _NoFile(OSError):
    """What was opened lies in no file system, so that no rule can be about it."""


def _call(number: int, *arguments: object) -> int:
    found = int(ctypes.CDLL(None, use_errno=True).syscall(number, *arguments))
    if found < 0:
        error = ctypes.get_errno()
        if error == errno.EBADFD:
            raise _NoFile(error, os.strerror(error))
        raise OSError(error, f"Landlock: {os.strerror(error)}")
    return found


def used_by_python() -> tuple[str, ...]:
    """What Python and the system's libraries are read from; none of a user's or of the device's own files."""
    package = Path(__file__).resolve().parents[1]
    system = ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc", "/proc", "/sys", "/dev", "/run/systemd/resolve")
    own = {sys.prefix, sys.base_prefix, str(package), *(path for path in sys.path if path)}
    return (*system, *sorted(own))


def written(walls: Walls) -> str:
    """For the command line of a process that begins with `enter`; empty where the kernel has no Landlock."""
    return json.dumps(asdict(walls)) if version() else ""


def enter() -> None:
    """Put the walls that the last argument tells around this process, before it loads anything else."""
    if not sys.argv[-1]:
        return
    confine(Walls(**json.loads(sys.argv[-1])))
