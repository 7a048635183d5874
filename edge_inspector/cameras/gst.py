"""Any GStreamer pipeline that device.yaml lists as a camera, `gst:NAME`, and a Jetson's own: `csi://0`.

By ctypes on the system's libraries (libgstreamer1.0-0, and the plugins that the pipeline names), since wheels of OpenCV have no
GStreamer. The pipeline is given without its sink. Run in a child process: stopping a stuck pipeline was seen to take 9 s.
"""

from __future__ import annotations

import ctypes
import re
import time
from functools import cache
from typing import Any, Literal

import numpy as np

from edge_inspector.cameras.source import Info, check_format, moment
from edge_inspector.config import CameraConfig
from edge_inspector.door import Admit, Admitted
from edge_inspector.errors import CameraEnded, CameraError
from edge_inspector.frames import Frame, Pixels, frozen

HINT = "apt install libgstreamer1.0-0 gstreamer1.0-plugins-base, and the plugins that the pipeline needs"
_SINK = "appsink name=edge_inspector max-buffers=8 sync=false"
_FORMATS: dict[str, tuple[type, int]] = {"BGR": (np.uint8, 3), "GRAY8": (np.uint8, 1), "GRAY16_LE": (np.uint16, 1)}
_STREAM_CODED = re.compile(r"h26[345]|hevc|vp[89]|av1|mpeg[24v]|theora|decodebin|playbin|rtspsrc|nvv4l2decoder|vaapidecode")
"""Elements that decode pictures from what differs between them."""
_NULL, _PAUSED, _PLAYING = 1, 3, 4
_FAILURE, _LIVE = 0, 3
_END, _ERROR = 1, 2
_READ = 1
_NO_TIME = 2**64 - 1
_UNSOUND = {
    0: "the pipeline has a syntax error", 1: "the pipeline names an element that is not installed",
    2: "the pipeline sets a property that its element does not have", 3: "two elements of the pipeline cannot be linked",
    4: "the pipeline sets a property to what it cannot be", 5: "the pipeline holds an empty bin", 6: "the pipeline is empty",
}  # fmt: skip
"""GstParseError. GStreamer's own words are not told: they quote the pipeline, which may hold a password."""
_NS = 1_000_000_000

_P, _S, _U64, _I = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint64, ctypes.c_int


class _GError(ctypes.Structure):
    _fields_ = (("domain", ctypes.c_uint32), ("code", _I), ("message", _S))


class _Map(ctypes.Structure):
    """GstMapInfo."""

    _fields_ = (
        ("memory", _P), ("flags", _I), ("data", _P), ("size", ctypes.c_size_t), ("maxsize", ctypes.c_size_t),
        ("user_data", _P * 4), ("reserved", _P * 4),
    )  # fmt: skip


class _Buffer(ctypes.Structure):
    """The beginning of a GstBuffer: a GstMiniObject of 64 bytes, its pool, its time. Stable in all of GStreamer 1."""

    _fields_ = (("mini_object", ctypes.c_byte * 64), ("pool", _P), ("pts", _U64))


class _Message(ctypes.Structure):
    """The beginning of a GstMessage."""

    _fields_ = (("mini_object", ctypes.c_byte * 64), ("kind", _I))


_CALLS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "gst_parse_launch": (_P, (_S, _P)), "gst_bin_get_by_name": (_P, (_P, _S)), "gst_element_set_state": (_I, (_P, _I)),
    "gst_element_get_state": (_I, (_P, _P, _P, _U64)), "gst_element_get_base_time": (_U64, (_P,)),
    "gst_element_get_bus": (_P, (_P,)), "gst_bus_timed_pop_filtered": (_P, (_P, _U64, _I)),
    "gst_message_parse_error": (None, (_P, _P, _P)), "gst_mini_object_unref": (None, (_P,)),
    "gst_error_get_message": (_P, (ctypes.c_uint32, _I)), "gst_system_clock_obtain": (_P, ()),
    "gst_pipeline_use_clock": (None, (_P, _P)),
    "gst_sample_get_buffer": (_P, (_P,)), "gst_sample_get_caps": (_P, (_P,)), "gst_caps_get_structure": (_P, (_P, _I)),
    "gst_structure_get_int": (_I, (_P, _S, _P)), "gst_structure_get_string": (_S, (_P, _S)),
    "gst_structure_get_fraction": (_I, (_P, _S, _P, _P)),
    "gst_buffer_map": (_I, (_P, _P, _I)), "gst_buffer_unmap": (None, (_P, _P)), "gst_object_unref": (None, (_P,)),
}  # fmt: skip


@cache
def library() -> Any:
    """GStreamer with typed calls, initialised once. Raises CameraError where it is missing."""
    try:
        gst, app = ctypes.CDLL("libgstreamer-1.0.so.0"), ctypes.CDLL("libgstapp-1.0.so.0")
    except OSError as error:
        raise CameraError(f"GStreamer cannot be loaded: {error}", hint=HINT) from error
    for name, (result, arguments) in _CALLS.items():
        call = getattr(gst, name)
        call.restype, call.argtypes = result, arguments
    pull = app.gst_app_sink_try_pull_sample
    pull.restype, pull.argtypes = _P, [_P, _U64]
    setattr(gst, "pull", pull)  # noqa: B010 - to the rest of this file it is one library
    gst.gst_init(None, None)
    return gst


def pipeline_of(config: CameraConfig, admitted: Admitted) -> str:
    """What GStreamer is told to run. Raises CameraError for a sensor that is none."""
    address = admitted.address
    if address.scheme == "gst":
        return f"{admitted.pipeline} ! videoconvert ! video/x-raw,format={{ {', '.join(_FORMATS)} }} ! {_SINK}"
    if not address.place.isdigit():
        raise CameraError(f"{config.name}: a sensor's number is expected", hint="csi://0 is the first")
    wanted = {"width": config.width, "height": config.height}
    caps = "".join(f",{name}={value}" for name, value in wanted.items() if value is not None)
    if config.fps is not None:
        caps += f",framerate={round(config.fps * 1000)}/1000"
    return (
        f"nvarguscamerasrc sensor-id={address.place} ! video/x-raw(memory:NVMM){caps} ! nvvidconv ! video/x-raw,format=BGRx ! "
        f"videoconvert ! video/x-raw,format=BGR ! {_SINK}"
    )


class GstSource:
    """Source protocol for one pipeline."""

    def __init__(self, config: CameraConfig, admit: Admit) -> None:
        self.config, self._admit = config, admit
        self._pipeline: Any = None
        self._sink: Any = None
        self._bus: Any = None
        self._launched = ""
        self._live, self._rate, self._seq = False, 0.0, 0
        self._first: Frame | None = None

    def open(self) -> Info:
        """Start the pipeline and look at its first frame. Raises CameraError with GStreamer's own words."""
        gst, error = library(), ctypes.POINTER(_GError)()
        self._launched = pipeline_of(self.config, self._admit(self.config))
        self._pipeline = gst.gst_parse_launch(self._launched.encode(), ctypes.byref(error))
        if error:
            raise self._error(_UNSOUND.get(error.contents.code, "the pipeline is not understood"))
        self._sink = gst.gst_bin_get_by_name(self._pipeline, b"edge_inspector")
        self._bus = gst.gst_element_get_bus(self._pipeline)
        gst.gst_pipeline_use_clock(self._pipeline, gst.gst_system_clock_obtain())  # the monotonic one, as ours
        timeout_ns = self.config.timeout_ms * 1_000_000
        paused = gst.gst_element_set_state(self._pipeline, _PAUSED)
        self._live = _LIVE in (paused, gst.gst_element_get_state(self._pipeline, None, None, timeout_ns))
        if _FAILURE in (paused, gst.gst_element_set_state(self._pipeline, _PLAYING)):
            raise self._error(self._told() or "it does not start")
        sample = gst.pull(self._sink, timeout_ns)
        if not sample:
            raise self._error(self._told() or "no first frame in time")
        self._first = self._frame(sample)  # `read` gives it: a recording must not lose one
        image = self._first.image
        info = Info(
            image.shape[1], image.shape[0], 1 if image.ndim == 2 else 3, image.dtype.itemsize * 8, self._rate or None,
            coding=self._coding(),
        )  # fmt: skip
        check_format(self.config, info)
        return info

    def _coding(self) -> Literal["single", "stream", "recorded"]:
        if not self._live:
            return "recorded"
        return "stream" if _STREAM_CODED.search(self._launched) else "single"

    def read(self, timeout_s: float) -> Frame | None:
        """The next frame. Raises CameraEnded where a recording ends, CameraError where a live stream does."""
        first, self._first = self._first, None
        if first is not None:
            return first
        sample = library().pull(self._sink, round(timeout_s * _NS))
        if sample:
            return self._frame(sample)
        told = self._told()
        if told is None:
            return None
        if told or self._live:
            raise self._error(told or "the stream ended")
        raise CameraEnded(f"{self.config.name}: no more frames")

    def _told(self) -> str | None:
        """The pipeline's error, "" for its end, None for neither."""
        gst = library()
        message = gst.gst_bus_timed_pop_filtered(self._bus, 0, _END | _ERROR)
        if not message:
            return None
        error = ctypes.POINTER(_GError)()
        try:
            if ctypes.cast(message, ctypes.POINTER(_Message)).contents.kind == _END:
                return ""
            gst.gst_message_parse_error(message, ctypes.byref(error), None)
            words = gst.gst_error_get_message(error.contents.domain, error.contents.code)
            return str(ctypes.string_at(words).decode(errors="replace"))
        finally:
            gst.gst_mini_object_unref(message)

    def _frame(self, sample: Any) -> Frame:
        gst = library()
        try:
            buffer = gst.gst_sample_get_buffer(sample)
            image = self._pixels(buffer, gst.gst_caps_get_structure(gst.gst_sample_get_caps(sample), 0))
            arrived_s, pts = time.monotonic(), ctypes.cast(buffer, ctypes.POINTER(_Buffer)).contents.pts
            stamped = self._live and pts != _NO_TIME
            captured_s = (gst.gst_element_get_base_time(self._pipeline) + pts) / _NS if stamped else arrived_s
            captured_s = min(captured_s, arrived_s)
        finally:
            gst.gst_mini_object_unref(sample)
        seq, self._seq = self._seq, self._seq + 1
        return Frame(image, seq, captured_s, moment(captured_s), "kernel" if stamped else "arrival")

    def _pixels(self, buffer: Any, structure: Any) -> Pixels:
        """A copy in our own memory; GStreamer pads rows to four bytes."""
        gst, width, height, mapped = library(), _I(), _I(), _Map()
        over, under = _I(), _I(1)
        gst.gst_structure_get_int(structure, b"width", ctypes.byref(width))
        gst.gst_structure_get_int(structure, b"height", ctypes.byref(height))
        gst.gst_structure_get_fraction(structure, b"framerate", ctypes.byref(over), ctypes.byref(under))
        self._rate = over.value / max(1, under.value)
        kind, channels = _FORMATS[gst.gst_structure_get_string(structure, b"format").decode()]
        used = width.value * channels * np.dtype(kind).itemsize
        stride = (used + 3) // 4 * 4
        if not gst.gst_buffer_map(buffer, ctypes.byref(mapped), _READ):
            raise self._error("a frame cannot be read")
        try:
            more = mapped.size - stride * height.value
            if more < 0 or (more and more % height.value == 0):  # longer rows than its format has: each would be shifted
                raise self._error(f"a frame of {mapped.size} bytes, {stride * height.value} expected")
            memory: Any = (ctypes.c_uint8 * (stride * height.value)).from_address(mapped.data)
            rows = np.frombuffer(memory, np.uint8).reshape(height.value, stride)[:, :used]
            shape = (height.value, width.value) if channels == 1 else (height.value, width.value, channels)
            return frozen(rows.copy().view(kind).reshape(shape))
        finally:
            gst.gst_buffer_unmap(buffer, ctypes.byref(mapped))

    def _error(self, what: str) -> CameraError:
        return CameraError(f"{self.config.name}: {what}", hint="gst-launch-1.0 tells more; are all its plugins installed?")

    def trigger(self) -> None:
        """Pipelines run free."""
        raise CameraError(f"{self.config.name}: cannot be triggered")

    def close(self) -> None:
        """Stop the pipeline."""
        if self._pipeline:
            gst = library()
            gst.gst_element_set_state(self._pipeline, _NULL)
            for thing in (self._sink, self._bus, self._pipeline):
                if thing:
                    gst.gst_object_unref(thing)
            self._pipeline = self._sink = self._bus = None
