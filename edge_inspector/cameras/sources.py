"""Camera URI -> Source."""

from __future__ import annotations

import fcntl
import struct
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qsl

from edge_inspector.addresses import scheme_of
from edge_inspector.cameras import aravis, gentl, pylon
from edge_inspector.cameras.folder import FolderSource
from edge_inspector.cameras.gst import GstSource
from edge_inspector.cameras.isolation import IsolatedSource
from edge_inspector.cameras.mjpeg import MjpegSource
from edge_inspector.cameras.opencv import OpencvSource
from edge_inspector.cameras.source import Found, Source
from edge_inspector.cameras.synthetic import LETHAL, SyntheticSource
from edge_inspector.cameras.video import VideoSource
from edge_inspector.config import CameraConfig
from edge_inspector.door import Admit
from edge_inspector.errors import CameraError

_ENUM_FMT, _FORMAT_LAYOUT = 0xC0405602, "=III32s4s16x"
_KINDS: dict[str, Callable[[CameraConfig, Admit], Source]] = {
    "dir": FolderSource,
    "file": VideoSource,
    "synthetic": SyntheticSource,
}
_ISOLATED: dict[str, Callable[[CameraConfig, Admit], Source]] = {
    **dict.fromkeys(("http", "https"), MjpegSource), **dict.fromkeys(("gst", "csi"), GstSource),
    **dict.fromkeys(("v4l2", "rtsp", "rtsps"), OpencvSource), "pylon": pylon.PylonSource, "gentl": gentl.GentlSource,
    **dict.fromkeys(("aravis", "gige", "u3v"), aravis.AravisSource),
}  # fmt: skip
"""These can hang, or crash: they are a vendor's library, or FFmpeg."""


def direct_source(config: CameraConfig, admit: Admit) -> Source:
    """The source of a URI, in this process. `admit`: the door that it asks when it is opened."""
    return (_KINDS | _ISOLATED)[scheme_of(config.uri)](config, admit)


def is_isolated(config: CameraConfig) -> bool:
    """Whether its calls can hang, so that a child process makes them."""
    options = dict(parse_qsl(config.uri.partition("?")[2])) if scheme_of(config.uri) == "synthetic" else {}
    return scheme_of(config.uri) in _ISOLATED or "isolate" in options or options.get("fault") in LETHAL


def open_source(config: CameraConfig, admit: Admit, own: Path | None = None, cache: Path | None = None) -> Source:
    """The source of a URI, in a child process where its calls can hang. Not opened yet.

    `own`: the only folder that its child may write to, removed when it is closed; None: one of its own. `cache`: where its
    libraries may keep what they find out; None: `own`.
    """
    return IsolatedSource(config, admit, own, cache) if is_isolated(config) else direct_source(config, admit)


def search() -> tuple[list[Found], list[CameraError]]:
    """Cameras that are there now, on every stack, and what kept a stack from being asked."""
    listed, missing = video_devices(Path("/dev"), Path("/sys/class/video4linux")), []
    for found in (aravis.found, pylon.found, gentl.found):
        try:
            listed += found()
        except CameraError as error:
            missing.append(error)
    return listed, missing


def video_devices(devices: Path, classes: Path) -> list[Found]:
    """V4L2 cameras, by names that stay when they are plugged in elsewhere (by-id), where they have one."""
    lasting = {path.resolve(): path for path in sorted((devices / "v4l" / "by-id").glob("*"), reverse=True)}
    listed = []
    for place in sorted(classes.glob("video*"), key=lambda path: (len(path.name), path.name)):
        try:
            index, model = (place / "index").read_text().strip(), (place / "name").read_text().strip()
        except OSError:
            continue  # unplugged just now
        if index == "0":  # further ones of a camera carry metadata, no pictures
            device = devices / place.name
            listed.append(Found(f"v4l2://{lasting.get(device, device)}", model, "", str(device), _video_formats(device)))
    return listed


def _video_formats(device: Path) -> tuple[str, ...]:
    """Pixel formats of a V4L2 device (VIDIOC_ENUM_FMT of linux/videodev2.h); asking disturbs nobody."""
    listed: list[str] = []
    try:
        with device.open("rb", buffering=0) as opened:
            while True:
                answer = fcntl.ioctl(opened, _ENUM_FMT, struct.pack(_FORMAT_LAYOUT, len(listed), 1, 0, b"", b""))
                listed.append(struct.unpack(_FORMAT_LAYOUT, answer)[4].decode())
    except OSError:  # EINVAL after the last one
        return tuple(listed)
