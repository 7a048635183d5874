"""Cameras of any vendor through its GenTL producer: `gentl://SERIAL?producer=NAME`, `gentl://?producer=NAME` for the first.

The name stands under `sources: {gentl: ...}` in device.yaml: a producer is a vendor's library, and what loads it is no message.
Extra `gentl` (harvesters). `?trigger=` as for aravis. Run in a child process.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from edge_inspector.cameras import genicam
from edge_inspector.cameras.folder import broken_frame
from edge_inspector.cameras.source import DeviceClock, Found, Info, moment, settle
from edge_inspector.config import CameraConfig
from edge_inspector.door import Admit
from edge_inspector.errors import CameraError, PictureError
from edge_inspector.frames import Frame, frozen
from edge_inspector.installation import install

PRODUCERS = "GENICAM_GENTL64_PATH"
BUFFERS = 8


def harvester(producer: Path) -> Any:
    """A Harvester that knows the cameras of one producer. Raises CameraError."""
    try:
        from harvesters.core import Harvester  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise CameraError(f"harvesters cannot be loaded: {error}", hint=install("gentl")) from error
    logging.getLogger("harvesters").setLevel(logging.CRITICAL)  # what it tells is told by our errors
    known = Harvester()
    try:
        known.add_file(str(producer), check_existence=True)
    except OSError as error:
        raise CameraError(f"{producer}: no such GenTL producer", hint="a file with the ending .cti") from error
    known.update()
    return known


def found() -> list[Found]:
    """Cameras of all installed producers. Raises CameraError where the library is missing."""
    folders = [Path(folder) for folder in os.environ.get(PRODUCERS, "").split(":") if folder]
    return [told for folder in folders for path in sorted(folder.glob("*.cti")) for told in _found(path)]


def _found(producer: Path) -> list[Found]:
    known = harvester(producer)
    try:
        return [
            Found(
                f"gentl://{told.serial_number}?cti={producer}", f"{told.vendor} {told.model}", told.serial_number, told.tl_type,
                _formats(known, number),
            )
            for number, told in enumerate(known.device_info_list)
        ]  # fmt: skip
    finally:
        known.reset()


def _formats(known: Any, number: int) -> tuple[str, ...]:
    """Pixel formats of a camera that nobody uses now."""
    try:
        acquirer = known.create(number)
    except Exception:  # noqa: BLE001 - GenTL's classes; it is in use
        return ()
    try:
        return tuple(acquirer.remote_device.node_map.get_node("PixelFormat").symbolics)
    finally:
        acquirer.destroy()


class _Nodes:
    """genicam.Nodes on the reference implementation's node map."""

    def __init__(self, nodes: Any) -> None:
        self._nodes = nodes

    def text(self, name: str) -> str | None:
        try:
            return str(self._nodes.get_node(name).to_string())
        except Exception:  # noqa: BLE001 - GenApi's classes; absent and unreadable are one here
            return None

    def put(self, name: str, text: str) -> None:
        self._nodes.get_node(name).from_string(text)

    def limits(self, name: str) -> str:
        node = self._nodes.get_node(name)
        if hasattr(node, "symbolics"):
            return f" (the camera takes {', '.join(node.symbolics)})"
        return f" (the camera takes {node.min:g} to {node.max:g})" if hasattr(node, "min") else ""


class GentlSource:
    """Source protocol for one camera."""

    def __init__(self, config: CameraConfig, admit: Admit) -> None:
        self.config, self._admit = config, admit
        self._harvester: Any = None
        self._acquirer: Any = None
        self._seq = self._last_id = 0
        self._clock = DeviceClock()

    def open(self) -> Info:
        """Open, set, read back, start. Raises CameraError."""
        admitted = self._admit(self.config)
        address, self._harvester = admitted.address, harvester(admitted.path)
        serials = [told.serial_number for told in self._harvester.device_info_list]
        if not serials or (address.place and address.place not in serials):
            there = ", ".join(serials) or "none"
            raise CameraError(f"{self.config.name}: no such camera; there: {there}", hint="is it powered and plugged in?")
        try:
            self._acquirer = self._harvester.create(serials.index(address.place) if address.place else 0)
        except Exception as error:  # GenTL's own classes
            raise CameraError(f"{self.config.name}: cannot be opened: {error}", hint="does another program use it?") from error
        trigger = address.options.get("trigger", "")
        info = genicam.set_up(_Nodes(self._acquirer.remote_device.node_map), self.config, trigger)
        self._acquirer.num_buffers = BUFFERS
        self._acquirer.start()
        if not trigger:
            settle(self.read, self.config.timeout_ms / 1000)
        return info

    def read(self, timeout_s: float) -> Frame | None:
        """The next frame; an incomplete one is a broken one."""
        buffer = self._acquirer.try_fetch(timeout=max(0.001, timeout_s))
        if buffer is None:
            return None
        try:
            return self._frame(buffer)
        finally:
            buffer.queue()

    def _frame(self, buffer: Any) -> Frame:
        arrived_s, identity = time.monotonic(), int(buffer.module.frame_id)
        lost, self._last_id = genicam.gap(self._last_id, identity), identity
        seq, self._seq = self._seq, self._seq + 1
        if not buffer.module.is_complete() or not buffer.payload.components:
            broken = broken_frame(seq, str(identity), f"{self.config.name}: incomplete")
            return replace(broken, lost=lost, **self._clock.known(_timestamp_s(buffer)))
        shown = buffer.payload.components[0]
        stamp = _timestamp_s(buffer)
        captured_s = self._clock.captured_s(stamp, arrived_s) if stamp else arrived_s
        code, padding = genicam.code_of(shown.data_format), int(shown.x_padding)
        try:
            image = genicam.pixels(shown.data, code, shown.width, shown.height, padding)
        except PictureError as error:
            return replace(broken_frame(seq, str(identity), f"{self.config.name}: {error.message}"), lost=lost)
        clock: Literal["device", "arrival"] = "device" if stamp else "arrival"
        return Frame(frozen(image), seq, captured_s, moment(captured_s), clock, str(identity), lost)

    def trigger(self) -> None:
        """Make an image now. Raises CameraError."""
        try:
            self._acquirer.remote_device.node_map.TriggerSoftware.execute()
        except Exception as error:  # GenTL's own classes
            raise CameraError(f"{self.config.name}: trigger refused: {error}") from error

    def close(self) -> None:
        """Stop and let go."""
        if self._acquirer is not None:
            self._acquirer.destroy()
            self._acquirer = None
        if self._harvester is not None:
            self._harvester.reset()
            self._harvester = None


def _timestamp_s(buffer: Any) -> float:
    """When the camera made it, by its own clock; 0 where the producer does not tell."""
    try:
        return float(buffer.timestamp_ns) / 1e9
    except Exception:  # noqa: BLE001 - not every producer has one, and each says so in its own way
        return 0.0
