"""A source in a child process: its hangs and crashes end with the child, never with the daemon.

Pixels travel through a ring of slots in a memfd (nothing is left in /dev/shm), everything else as JSON over a
socket pair. Each slot has a generation number, odd while it is written: the parent copies a slot out and then looks
whether the generation is still the one it was told, so that a frame overwritten meanwhile is counted as lost, never
judged half old and half new.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import json
import mmap
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_inspector import confinement
from edge_inspector.addresses import Address
from edge_inspector.cameras.opencv import ENVIRONMENT
from edge_inspector.cameras.source import Info
from edge_inspector.cameras.walls import walls_of
from edge_inspector.config import CameraConfig
from edge_inspector.door import Admit, Admitted
from edge_inspector.errors import CameraEnded, CameraError
from edge_inspector.frames import Frame, frozen

SLOTS = 8
_ENTRY = "from edge_inspector.confinement import enter; enter(); from edge_inspector.cameras.isolation import main; main()"
_HEADER = 4096
_MESSAGE, _SPECIFICATION = 8192, 131_072
_ERROR = 1024
_OPEN_MARGIN_S = 10.0
"""Beside the camera's own timeout: starting Python and importing OpenCV on a busy machine."""
_PR_SET_PDEATHSIG = 1
_ALIVE = b"{}"
_HANGS_S = 2.0
"""Beside the camera's own timeout: a child that says nothing at all for so long is stuck in its driver."""
_IDLE_S = 0.25
_LEAVE_S = 0.5
_SLICE_S = 0.002
"""Between two looks for a triggered image: the child listens for the next trigger meanwhile."""
_TRIGGER = b"t"
_SIGNALS = {number.value: number.name for number in signal.Signals}
_UNPACED_S = 0.04
"""Between two frames of a recording that has no rate of its own."""


class _Ring:
    """SLOTS frames of one size in a memfd; a header page holds their generations."""

    def __init__(self, descriptor: int, frame_bytes: int, *, writable: bool) -> None:
        self.frame_bytes = frame_bytes
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._map = mmap.mmap(descriptor, _HEADER + SLOTS * frame_bytes, mmap.MAP_SHARED, access)
        self.generations: NDArray[np.uint64] = np.frombuffer(self._map, np.uint64, SLOTS)

    def slot(self, number: int) -> NDArray[np.uint8]:
        return np.frombuffer(self._map, np.uint8, self.frame_bytes, _HEADER + number * self.frame_bytes)


def _as_told(info: Info) -> Info:
    """How a source behaves in a child: a camera waits for its trigger there too, what is drawn or recorded runs free."""
    return replace(info, pulled=False, triggerable=info.triggerable and not info.simulated)


# --- the parent


class IsolatedSource:
    """Source protocol, run by a child process."""

    def __init__(self, config: CameraConfig, admit: Admit, own: Path | None = None, cache: Path | None = None) -> None:
        """`own`: the folder that the child may write to, removed when it is closed; None: one in the system's for such."""
        self.config, self._admit = config, admit
        self._own, self._cache = own, cache
        self._made: Path | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._ring: _Ring | None = None
        self._lost, self._heard_s = 0, 0.0

    def open(self) -> Info:
        """Start the child and wait for its camera, within the camera's timeout. Raises CameraError."""
        self.close()
        admitted = self._admit(self.config)
        own = self._folder()
        cache = self._cache or own
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        specification = json.dumps({"config": self.config.model_dump(mode="json"), "admitted": _told(admitted)})
        ours.send(specification.encode())  # not in the command line, which everybody on the machine may read
        with theirs:
            self._child = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [sys.executable, "-c", _ENTRY, str(theirs.fileno()), confinement.written(walls_of(admitted, own, cache))],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                env={**os.environ, **ENVIRONMENT, "TMPDIR": str(own), "XDG_CACHE_HOME": str(cache), "HOME": str(cache)},
            )  # fmt: skip
        self._socket = ours
        wait_s = _OPEN_MARGIN_S + self.config.timeout_ms / 1000
        message = self._received(wait_s)
        if message is None:
            raise CameraError(f"{self.config.name}: did not open within {wait_s:g} s", hint="does it answer otherwise?")
        return _as_told(Info(**message["info"]))

    def _folder(self) -> Path:
        """The child's own folder, empty; on a full disk it is not there, and the child writes nowhere."""
        if self._own is None:
            self._made = Path(tempfile.mkdtemp(prefix="edge-inspector-camera-"))
            return self._made
        shutil.rmtree(self._own, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._own.mkdir(mode=0o700, parents=True)
            if self._cache is not None:
                self._cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._made = self._own
        return self._own

    def read(self, timeout_s: float) -> Frame | None:
        """The next frame, copied out of the ring. Raises CameraEnded, CameraError (also when the child died)."""
        end = time.monotonic() + timeout_s
        if time.monotonic() - self._heard_s > self.config.timeout_ms / 1000 + _HANGS_S:
            raise CameraError(f"{self.config.name}: its process hangs", hint="the driver may be stuck")
        while (message := self._received(max(0.0, end - time.monotonic()))) is not None:
            if "frame" not in message:  # it lives
                continue
            frame = self._copied(message["frame"])
            if frame is not None:
                return frame
            self._lost += 1
        return None

    def _received(self, timeout_s: float) -> dict[str, Any] | None:
        if not select.select([self._socket], [], [], timeout_s)[0]:
            return None
        try:
            data, ancillary, _, _ = self._socket.recvmsg(_MESSAGE, socket.CMSG_SPACE(4))
        except ConnectionResetError:  # it ended before it had read what it should open
            data, ancillary = b"", []
        if not data:
            raise CameraError(
                f"{self.config.name}: the camera process ended {self._ended()}", hint="the driver may have crashed"
            )
        self._heard_s = time.monotonic()
        message: dict[str, Any] = json.loads(data)
        if "error" in message:
            kind = CameraEnded if message["ended"] else CameraError
            raise kind(message["error"], hint=message["hint"])
        for _, _, passed in ancillary:
            descriptor = array.array("i", passed)[0]
            try:
                self._ring = _Ring(descriptor, message["frame"]["bytes"], writable=False)
            finally:
                os.close(descriptor)
        return message

    def _ended(self) -> str:
        """How the child ended; it closes its socket a moment before the system knows."""
        if self._child is None:
            return "before"
        try:
            code = self._child.wait(_LEAVE_S)
        except subprocess.TimeoutExpired:
            return "its connection, and still runs"
        if code >= 0:
            return f"with exit code {code}"
        return f"by signal {_SIGNALS.get(-code, -code)}"

    def _copied(self, told: dict[str, Any]) -> Frame | None:
        if told["fault"]:
            image = np.zeros((0, 0), np.uint8)
        else:
            if self._ring is None:
                raise CameraError(f"{self.config.name}: a frame came before its memory")
            slot = self._ring.slot(told["slot"])[: told["bytes"]]
            image = slot.copy().view(told["dtype"]).reshape(told["shape"])
            if int(self._ring.generations[told["slot"]]) != told["generation"]:
                return None
        lost, self._lost = self._lost + told["lost"], 0
        return Frame(
            frozen(image), told["seq"], told["captured_s"], datetime.fromisoformat(told["captured_at"]), told["clock"],
            told["source_id"], lost, 0, told["key"], told["fault"], told["fault_detail"],
        )  # fmt: skip

    def trigger(self) -> None:
        """Tell the child. Raises CameraError where it is gone."""
        try:
            self._socket.send(_TRIGGER, socket.MSG_DONTWAIT)
        except OSError as error:
            raise CameraError(f"{self.config.name}: the camera process does not listen: {error.strerror}") from error

    def close(self) -> None:
        """End the child: it lets go of its camera, which would stay taken for seconds otherwise, or is killed.

        One that is stuck in the kernel is not waited for.
        """
        child, self._child = self._child, None
        made, self._made = self._made, None
        if child is not None:
            self._end(child)
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)

    def _end(self, child: subprocess.Popen[bytes]) -> None:
        self._socket.close()
        self._ring = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_LEAVE_S)
        if child.poll() is None:
            child.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # dead as soon as the driver lets go; Popen reaps it later
                child.wait(_LEAVE_S)


def _told(admitted: Admitted) -> dict[str, Any]:
    """What the door let through, as JSON values for the child."""
    values = asdict(admitted)
    return {**values, "path": os.fsdecode(admitted.path), "roots": [os.fsdecode(root) for root in admitted.roots]}


# --- the child


def _heard(values: dict[str, Any]) -> Admitted:
    address = Address(**values.pop("address"))
    return Admitted(address, Path(values.pop("path")), tuple(Path(root) for root in values.pop("roots")), **values)


class _Sender:
    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self._ring: _Ring | None = None
        self._written = 0
        self._lost = 0

    def send(self, frame: Frame) -> None:
        """Write a frame into the next slot and tell the parent; drop and count it when the parent is behind."""
        passed: list[int] = []
        told = {
            "seq": frame.seq, "captured_s": frame.captured_s, "captured_at": frame.captured_at.isoformat(),
            "clock": frame.clock, "source_id": frame.source_id, "lost": frame.lost + self._lost,
            "fault": frame.fault, "fault_detail": frame.fault_detail, "key": frame.key,
        }  # fmt: skip
        if not frame.fault:
            if self._ring is None or self._ring.frame_bytes < frame.image.nbytes:
                passed = [self._new_ring(frame.image.nbytes)]
            told |= self._write(frame)
        data = json.dumps(told).encode()
        try:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", passed))] if passed else []
            self.channel.sendmsg([b'{"frame":' + data + b"}"], ancillary, socket.MSG_DONTWAIT)
            self._lost = 0
        except BlockingIOError:
            self._lost += 1 + frame.lost
            self._ring = None if passed else self._ring
        finally:
            for descriptor in passed:
                os.close(descriptor)

    def _new_ring(self, frame_bytes: int) -> int:
        descriptor = os.memfd_create("edge-inspector-frames", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, _HEADER + SLOTS * frame_bytes)
        self._ring = _Ring(descriptor, frame_bytes, writable=True)
        return descriptor

    def _write(self, frame: Frame) -> dict[str, Any]:
        if self._ring is None:
            raise CameraError("no ring")
        number = self._written % SLOTS
        self._written += 1
        self._ring.generations[number] += 1
        flat = frame.image.reshape(-1).view(np.uint8)
        self._ring.slot(number)[: flat.size] = flat
        self._ring.generations[number] += 1
        return {
            "slot": number, "generation": int(self._ring.generations[number]), "bytes": int(flat.size),
            "dtype": frame.image.dtype.str, "shape": frame.image.shape,
        }  # fmt: skip


def _child(channel: socket.socket, specification: dict[str, Any]) -> None:
    """Open the source and send its frames until the parent is gone."""
    from edge_inspector.cameras.sources import direct_source  # noqa: PLC0415 - which imports this module

    config = CameraConfig.model_validate(specification["config"])
    sender = _Sender(channel)
    admitted = _heard(specification["admitted"])
    source = direct_source(config, lambda _: admitted)
    try:
        info = source.open()
        channel.send(json.dumps({"info": asdict(info)}).encode())
        triggered = _as_told(info).triggerable
        outstanding = late = clocked = False
        wait_s = _IDLE_S if triggered else _UNPACED_S if info.pulled else 0.0
        while True:
            called = bool(select.select([channel], [], [], _SLICE_S if outstanding else wait_s)[0])
            if called and not channel.recv(1):  # the parent is gone
                return
            if called:
                late = late or outstanding  # a camera without a clock cannot tell whose image comes next
                if late and not clocked:
                    raise CameraError(f"{config.name}: an image is missing, and no clock tells whose the next one is")
                while source.read(0.0) is not None:  # an image that nobody waits for any more
                    pass
                source.trigger()
                outstanding = True
            # An untold camera is asked too: one that is gone says so, and an image that nobody wanted does not wait.
            frame = source.read(0.0 if triggered else config.timeout_ms / 1000)
            if frame is not None and (outstanding or not triggered):
                outstanding, clocked = False, frame.clock == "device"
                sender.send(frame)
            elif frame is None:
                with contextlib.suppress(BlockingIOError):
                    channel.send(_ALIVE, socket.MSG_DONTWAIT)
    except (BrokenPipeError, ConnectionResetError):
        raise
    except Exception as error:  # noqa: BLE001 - the root of a process: whatever a driver raises is told by the parent
        channel.send(json.dumps(_told_error(config, error)).encode())
    finally:
        source.close()


def _told_error(config: CameraConfig, error: Exception) -> dict[str, Any]:
    if isinstance(error, CameraError):
        return {"error": error.message, "hint": error.hint, "ended": isinstance(error, CameraEnded)}
    return {"error": f"{config.name}: {type(error).__name__}: {error}"[:_ERROR], "hint": "see its driver", "ended": False}


def main() -> None:
    """Entry point of the child: the number of a socket, whose first message says what to open."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a dead daemon frees the camera
    for number in (signal.SIGINT, signal.SIGTERM):  # it ends when the daemon lets go of its socket
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        try:
            _child(channel, json.loads(channel.recv(_SPECIFICATION)))
        except (BrokenPipeError, ConnectionResetError):
            sys.exit(0)
