"""Basler cameras through pylon: `pylon://SERIAL`, `pylon://` for the first. Extra `pylon` (pypylon). Run in a child process.

`?trigger=software` or `?trigger=Line1` as for aravis. The environment PYLON_CAMEMU=N gives N emulated cameras.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, Literal

from edge_inspector.cameras import genicam
from edge_inspector.cameras.folder import broken_frame
from edge_inspector.cameras.source import DeviceClock, Found, Info, moment, settle
from edge_inspector.config import CameraConfig
from edge_inspector.door import Admit
from edge_inspector.errors import CameraError, PictureError
from edge_inspector.frames import Frame, frozen
from edge_inspector.installation import install

BUFFERS = 8


def library() -> Any:
    """The pypylon package's `pylon` module. Raises CameraError where it is missing."""
    try:
        from pypylon import pylon  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise CameraError(f"pypylon cannot be loaded: {error}", hint=install("pylon")) from error
    return pylon


def found() -> list[Found]:
    """Cameras that answer now. Raises CameraError where the library is missing."""
    factory = library().TlFactory.GetInstance()
    return [
        Found(f"pylon://{serial}", f"Basler {told.GetModelName()}", serial, told.GetDeviceClass(), _formats(factory, told))
        for told in factory.EnumerateDevices()
        if (serial := told.GetSerialNumber())
    ]


def _formats(factory: Any, told: Any) -> tuple[str, ...]:
    """Pixel formats of a camera that nobody uses now."""
    try:
        camera = library().InstantCamera(factory.CreateDevice(told))
        camera.Open()
    except Exception:  # noqa: BLE001 - pylon's classes; it is in use
        return ()
    try:
        return tuple(camera.GetNodeMap().GetNode("PixelFormat").GetSymbolics())
    finally:
        camera.Close()


class _Nodes:
    """genicam.Nodes on a pylon node map."""

    def __init__(self, nodes: Any) -> None:
        self._nodes = nodes

    def text(self, name: str) -> str | None:
        try:
            return str(self._nodes.GetNode(name).ToString())
        except Exception:  # noqa: BLE001 - pylon's classes; absent and unreadable are one here
            return None

    def put(self, name: str, text: str) -> None:
        self._nodes.GetNode(name).FromString(text)

    def limits(self, name: str) -> str:
        node = self._nodes.GetNode(name)
        if hasattr(node, "GetSymbolics"):
            return f" (the camera takes {', '.join(node.GetSymbolics())})"
        return f" (the camera takes {node.GetMin():g} to {node.GetMax():g})" if hasattr(node, "GetMin") else ""


class PylonSource:
    """Source protocol for one camera."""

    def __init__(self, config: CameraConfig, admit: Admit) -> None:
        self.config, self._admit = config, admit
        self._camera: Any = None
        self._seq = self._last_id = 0
        self._clock = DeviceClock()

    def open(self) -> Info:
        """Open, set, read back, start. Raises CameraError."""
        address, pylon = self._admit(self.config).address, library()
        factory = pylon.TlFactory.GetInstance()
        answering = {told.GetSerialNumber(): told for told in factory.EnumerateDevices()}
        device = answering.get(address.place) if address.place else next(iter(answering.values()), None)
        if device is None:
            there = ", ".join(answering) or "none"
            raise CameraError(f"{self.config.name}: no such camera; there: {there}", hint="is it powered, and in this subnet?")
        try:
            self._camera = pylon.InstantCamera(factory.CreateDevice(device))
            self._camera.Open()
        except Exception as error:  # pylon's own classes
            raise CameraError(f"{self.config.name}: cannot be opened: {error}", hint="does another program use it?") from error
        trigger = address.options.get("trigger", "")
        info = genicam.set_up(_Nodes(self._camera.GetNodeMap()), self.config, trigger)
        self._camera.MaxNumBuffer.SetValue(BUFFERS)
        self._camera.StartGrabbing(pylon.GrabStrategy_OneByOne)
        if not trigger:
            settle(self.read, self.config.timeout_ms / 1000)
        return info

    def read(self, timeout_s: float) -> Frame | None:
        """The next frame; one that pylon calls incomplete is a broken one. Raises CameraError when the camera is gone."""
        pylon = library()
        result = self._camera.RetrieveResult(round(timeout_s * 1000), pylon.TimeoutHandling_Return)
        if not result.IsValid():
            if self._camera.IsCameraDeviceRemoved():
                raise CameraError(f"{self.config.name}: removed", hint="cable or power")
            return None
        try:
            return self._frame(result)
        finally:
            result.Release()

    def _frame(self, result: Any) -> Frame:
        arrived_s, identity = time.monotonic(), int(result.GetBlockID())
        lost, self._last_id = genicam.gap(self._last_id, identity), identity
        seq, self._seq = self._seq, self._seq + 1
        if not result.GrabSucceeded():
            broken = broken_frame(seq, str(identity), f"{self.config.name}: {result.GetErrorDescription()}")
            return replace(broken, lost=lost, **self._clock.known(result.GetTimeStamp() / 1e9))
        stamp = result.GetTimeStamp() / 1e9  # 0 from an emulated camera
        captured_s = self._clock.captured_s(stamp, arrived_s) if stamp else arrived_s
        with result.GetArrayZeroCopy(raw=True) as memory:
            try:
                size = result.GetWidth(), result.GetHeight(), result.GetPaddingX()
                image = genicam.pixels(memory, result.GetPixelType(), *size)
            except PictureError as error:
                return replace(broken_frame(seq, str(identity), f"{self.config.name}: {error.message}"), lost=lost)
        clock: Literal["device", "arrival"] = "device" if stamp else "arrival"
        return Frame(frozen(image), seq, captured_s, moment(captured_s), clock, str(identity), lost)

    def trigger(self) -> None:
        """Make an image now. Raises CameraError."""
        patience_ms = self.config.timeout_ms
        try:  # a trigger that comes before the camera is ready for it would be ignored
            self._camera.WaitForFrameTriggerReady(patience_ms, library().TimeoutHandling_ThrowException)
            self._camera.ExecuteSoftwareTrigger()
        except Exception as error:  # pylon's own classes
            raise CameraError(f"{self.config.name}: trigger refused: {error}") from error

    def close(self) -> None:
        """Stop and let go."""
        if self._camera is not None:
            self._camera.Close()
            self._camera = None
