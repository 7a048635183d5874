"""GigE Vision and USB3 Vision cameras through libaravis: `aravis://SERIAL`, `aravis://192.168.1.10`, `gige://`, `u3v://`.

By ctypes on the system's library (Debian and Ubuntu: libaravis-0.8-0), so that no Python package is needed. Names of features
are GenICam's (SFNC). Every setting is read back; the library's own range check is on, or it would take values no camera has.
Run in a child process: calls to a camera that has vanished were seen to take up to 5 s.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

from edge_inspector.addresses import Address
from edge_inspector.cameras import genicam
from edge_inspector.cameras.folder import broken_frame
from edge_inspector.cameras.source import DeviceClock, Found, Info, moment, settle
from edge_inspector.config import CameraConfig
from edge_inspector.door import Admit
from edge_inspector.errors import CameraError, PictureError
from edge_inspector.frames import Frame, frozen

LIBRARY = "libaravis-0.8.so.0"
HINT = "apt install libaravis-0.8-0"
BUFFERS = 8
_CHECK_RANGES = 1
_SUCCESS = 0
_STATUS = {
    1: "cleared",
    2: "late packets",
    3: "missing packets",
    4: "wrong packet",
    5: "wrong size",
    6: "half filled",
    7: "aborted",
}
_P, _S, _D, _I64, _B = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_double, ctypes.c_int64, ctypes.c_int
_LOST = ctypes.CFUNCTYPE(None, _P, _P)


_TOLD = ("id", "vendor", "model", "serial_nbr", "address", "protocol")
"""What a camera that was not opened says of itself."""


class _GError(ctypes.Structure):
    _fields_ = (("domain", ctypes.c_uint32), ("code", ctypes.c_int), ("message", _S))


# function: result, arguments; a trailing GError** is added where the third item says so.
_CALLS: dict[str, tuple[Any, tuple[Any, ...], bool]] = {
    "arv_update_device_list": (None, (), False), "arv_get_n_devices": (ctypes.c_uint, (), False),
    **{f"arv_get_device_{what}": (_S, (ctypes.c_uint,), False) for what in _TOLD},
    "arv_camera_new": (_P, (_S,), True), "arv_camera_get_device": (_P, (_P,), False),
    "arv_camera_clear_triggers": (None, (_P,), True),
    "arv_camera_software_trigger": (None, (_P,), True), "arv_camera_get_payload": (ctypes.c_uint, (_P,), True),
    "arv_camera_create_stream": (_P, (_P, _P, _P), True), "arv_camera_start_acquisition": (None, (_P,), True),
    "arv_camera_stop_acquisition": (None, (_P,), True), "arv_camera_is_gv_device": (_B, (_P,), False),
    "arv_camera_gv_auto_packet_size": (ctypes.c_uint, (_P,), True),
    "arv_device_set_range_check_policy": (None, (_P, _B), False),
    "arv_device_get_feature": (_P, (_P, _S), False),
    "arv_gc_feature_node_get_value_as_string": (_S, (_P,), True),
    "arv_gc_feature_node_set_value_from_string": (None, (_P, _S), True),
    "arv_device_get_integer_feature_bounds": (None, (_P, _S, _P, _P), True),
    "arv_device_get_float_feature_bounds": (None, (_P, _S, _P, _P), True),
    "arv_device_dup_available_enumeration_feature_values_as_strings": (ctypes.POINTER(_S), (_P, _S, _P), True),
    "arv_buffer_new_allocate": (_P, (ctypes.c_size_t,), False), "arv_stream_push_buffer": (None, (_P, _P), False),
    "arv_stream_timeout_pop_buffer": (_P, (_P, ctypes.c_uint64), False), "arv_buffer_get_status": (_B, (_P,), False),
    "arv_buffer_get_data": (_P, (_P, _P), False), "arv_buffer_get_frame_id": (ctypes.c_uint64, (_P,), False),
    "arv_buffer_get_system_timestamp": (ctypes.c_uint64, (_P,), False),
    "arv_buffer_get_timestamp": (ctypes.c_uint64, (_P,), False),
    "arv_buffer_get_image_width": (_B, (_P,), False), "arv_buffer_get_image_height": (_B, (_P,), False),
    "arv_buffer_get_image_pixel_format": (ctypes.c_uint32, (_P,), False),
}  # fmt: skip


class _Library:
    """libaravis with typed calls; a GError becomes CameraError."""

    def __init__(self) -> None:
        """Raises CameraError where the library is missing."""
        try:
            aravis, self.gobject, self._glib = (
                ctypes.CDLL(name) for name in (LIBRARY, "libgobject-2.0.so.0", "libglib-2.0.so.0")
            )
        except OSError as error:
            raise CameraError(f"{LIBRARY} cannot be loaded: {error}", hint=HINT) from error
        self._glib.g_error_free.argtypes = [_P]
        self.gobject.g_object_unref.argtypes = [_P]
        self.gobject.g_signal_connect_data.argtypes = [_P, _S, _LOST, _P, _P, ctypes.c_int]
        self._padding = getattr(aravis, "arv_buffer_get_image_padding", None)
        if self._padding is not None:
            self._padding.restype, self._padding.argtypes = None, [_P, _P, _P]
        for name, (result, arguments, fails) in _CALLS.items():
            call = getattr(aravis, name)
            call.restype, call.argtypes = result, [*arguments, *([_P] if fails else [])]
            setattr(self, name.removeprefix("arv_"), self._checked(call) if fails else call)

    def _checked(self, call: Any) -> Callable[..., Any]:
        def checked(*given: Any) -> Any:
            error = ctypes.POINTER(_GError)()
            result = call(*given, ctypes.byref(error))
            if error:
                message = error.contents.message.decode(errors="replace")
                self._glib.g_error_free(error)
                raise CameraError(message)
            return result

        return checked

    def row_padding(self, buffer: Any) -> int | None:
        """Bytes behind each row of an image; None where the library is too old to tell."""
        if self._padding is None:
            return None
        right, below = ctypes.c_int(), ctypes.c_int()
        self._padding(buffer, ctypes.byref(right), ctypes.byref(below))
        return right.value

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


@cache
def library() -> _Library:
    """The library, loaded once. Raises CameraError where it is missing."""
    return _Library()


def _answering() -> list[dict[str, str]]:
    """What each camera says of itself that answers now; takes a second."""
    arv = library()
    arv.update_device_list()
    listed = [
        {what: (getattr(arv, f"get_device_{what}")(number) or b"").decode(errors="replace") for what in _TOLD}
        for number in range(arv.get_n_devices())
    ]
    return [told for told in listed if told["protocol"] != "Fake"]


def found() -> list[Found]:
    """Cameras that answer now. Raises CameraError where the library is missing."""
    return [
        Found(
            f"aravis://{told['serial_nbr'] or told['id']}", f"{told['vendor']} {told['model']}".strip(), told["serial_nbr"],
            f"{told['protocol']}, {told['address']}", _formats(told["id"]),
        )
        for told in _answering()
    ]  # fmt: skip


def _formats(identity: str) -> tuple[str, ...]:
    """Pixel formats of a camera that nobody uses now."""
    arv = library()
    try:
        camera = arv.camera_new(identity.encode())
    except CameraError:
        return ()
    try:
        return _Nodes(arv.camera_get_device(camera)).entries("PixelFormat")
    finally:
        arv.gobject.g_object_unref(camera)


class _Nodes:
    """genicam.Nodes on a device."""

    def __init__(self, device: Any) -> None:
        self._device = device

    def text(self, name: str) -> str | None:
        arv = library()
        node = arv.device_get_feature(self._device, name.encode())
        try:
            return (arv.gc_feature_node_get_value_as_string(node) or b"").decode() if node else None
        except CameraError:
            return None

    def put(self, name: str, text: str) -> None:
        arv = library()
        arv.gc_feature_node_set_value_from_string(arv.device_get_feature(self._device, name.encode()), text.encode())

    def entries(self, name: str) -> tuple[str, ...]:
        """What an enumeration takes; nothing for another kind."""
        arv, count = library(), ctypes.c_uint()
        try:
            values = arv.device_dup_available_enumeration_feature_values_as_strings(
                self._device, name.encode(), ctypes.byref(count)
            )
        except CameraError:
            return ()
        return tuple(values[n].decode() for n in range(count.value))

    def limits(self, name: str) -> str:
        arv, key = library(), name.encode()
        if entries := self.entries(name):
            return f" (the camera takes {', '.join(entries)})"
        for number, bounds in (
            (ctypes.c_int64, arv.device_get_integer_feature_bounds), (ctypes.c_double, arv.device_get_float_feature_bounds),
        ):  # fmt: skip
            low, high = number(), number()
            with contextlib.suppress(CameraError):
                bounds(self._device, key, ctypes.byref(low), ctypes.byref(high))
                return f" (the camera takes {low.value:g} to {high.value:g})"
        return ""


class AravisSource:
    """Source protocol for one camera. `?trigger=software`: images when told to, `?trigger=Line1`: on an edge; else free."""

    def __init__(self, config: CameraConfig, admit: Admit) -> None:
        self.config, self._admit = config, admit
        self._camera = self._stream = self._device = None
        self._seq, self._last_id, self._gone = 0, 0, False
        self._clock = DeviceClock()

    def open(self) -> Info:
        """Open, set, read back, start. Raises CameraError."""
        address, arv = self._admit(self.config).address, library()
        self._trigger = address.options.get("trigger", "")
        try:
            self._camera = self._connected(address)
        except CameraError as error:
            raise self._error(
                f"cannot be opened: {error.message}", "is it powered, in this subnet, and used by nobody else?"
            ) from error
        self._device = arv.camera_get_device(self._camera)
        arv.device_set_range_check_policy(self._device, _CHECK_RANGES)
        self._on_lost = _LOST(lambda _device, _data: self._vanished())  # kept: C calls it as long as the device lives
        arv.gobject.g_signal_connect_data(self._device, b"control-lost", self._on_lost, None, None, 0)
        try:
            info = self._set_up()
        except CameraError as error:
            if error.message.startswith(self.config.name):
                raise
            raise self._error(error.message, "is it used by another program, or by the daemon?") from error
        payload = arv.camera_get_payload(self._camera)
        self._stream = arv.camera_create_stream(self._camera, None, None)
        for _ in range(BUFFERS):
            arv.stream_push_buffer(self._stream, arv.buffer_new_allocate(payload))
        arv.camera_start_acquisition(self._camera)
        if not self._trigger:
            settle(self.read, self.config.timeout_ms / 1000)
        return info

    def _connected(self, address: Address) -> Any:
        """By an address that was listed; else one of those that answer, by serial number or id.

        The library would take any other name for that of a host, and ask for it.
        """
        if address.host or not address.place:
            return library().camera_new(address.host.encode() or None)
        names = ("serial_nbr", "id")
        known = next((told["id"] for told in _answering() if address.place in (told[name] for name in names)), None)
        if known is None:
            raise CameraError("no camera with this serial number answers")
        return library().camera_new(known.encode())

    def _vanished(self) -> None:
        self._gone = True

    def _set_up(self) -> Info:
        config, arv = self.config, library()
        arv.camera_stop_acquisition(self._camera)  # one whose user was killed still sends to where that listened
        arv.camera_clear_triggers(self._camera)
        if config.packet_size is None and arv.camera_is_gv_device(self._camera):
            arv.camera_gv_auto_packet_size(self._camera)
        return genicam.set_up(_Nodes(self._device), config, self._trigger)

    def read(self, timeout_s: float) -> Frame | None:
        """The next frame; one with lost packets is a broken one. Raises CameraError when the camera has vanished."""
        if self._gone:
            raise self._error("control lost", "was it unplugged, or taken by another program?")
        arv = library()
        buffer = arv.stream_timeout_pop_buffer(self._stream, round(timeout_s * 1e6))
        if not buffer:
            return None
        try:
            return self._frame(buffer)
        finally:
            arv.stream_push_buffer(self._stream, buffer)

    def _frame(self, buffer: Any) -> Frame:
        arv = library()
        status, identity = arv.buffer_get_status(buffer), int(arv.buffer_get_frame_id(buffer))
        lost, self._last_id = genicam.gap(self._last_id, identity), identity
        seq, self._seq = self._seq, self._seq + 1
        now_s = time.monotonic()
        arrived_s = now_s - min(60.0, max(0.0, time.time() - arv.buffer_get_system_timestamp(buffer) / 1e9))
        stamp = arv.buffer_get_timestamp(buffer) / 1e9
        if status != _SUCCESS:
            told = _STATUS.get(status, f"status {status}")
            broken = broken_frame(seq, str(identity), f"{self.config.name}: {told}")
            return replace(broken, lost=lost, **self._clock.known(stamp))
        captured_s = self._clock.captured_s(stamp, arrived_s) if stamp else arrived_s
        size = ctypes.c_size_t()
        data = arv.buffer_get_data(buffer, ctypes.byref(size))
        memory: Any = (ctypes.c_uint8 * size.value).from_address(data)
        width, height = arv.buffer_get_image_width(buffer), arv.buffer_get_image_height(buffer)
        try:
            image = genicam.pixels(memory, arv.buffer_get_image_pixel_format(buffer), width, height, arv.row_padding(buffer))
        except PictureError as error:
            return replace(broken_frame(seq, str(identity), f"{self.config.name}: {error.message}"), lost=lost)
        return Frame(frozen(image), seq, captured_s, moment(captured_s), "device" if stamp else "arrival", str(identity), lost)

    def trigger(self) -> None:
        """Make an image now. Raises CameraError."""
        library().camera_software_trigger(self._camera)

    def close(self) -> None:
        """Stop and let go; 5 s at most where the camera has vanished."""
        arv = library() if self._camera else None
        if arv is None:
            return
        try:
            if self._stream and not self._gone:
                arv.camera_stop_acquisition(self._camera)
        except CameraError:
            self._gone = True  # it no longer answers: nothing is left to stop
        for thing in (self._stream, self._camera):
            if thing:
                arv.gobject.g_object_unref(thing)
        self._camera = self._stream = self._device = None

    def _error(self, what: str, hint: str = "") -> CameraError:
        return CameraError(f"{self.config.name}: {what}", hint=hint)
