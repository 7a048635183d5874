"""What FFmpeg, within OpenCV, may open: a file or a stream, and nothing that its content names."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

OPTIONS = "OPENCV_FFMPEG_CAPTURE_OPTIONS"
"""OpenCV reads it whenever it opens something, and hands it to FFmpeg."""
_CONTAINERS = (
    "avi", "mov", "mp4", "m4a", "3gp", "3g2", "mj2", "matroska", "webm", "mpeg", "mpegts", "mpegvideo", "mjpeg", "h264", "hevc",
    "m4v", "ivf", "ogg", "flv", "asf", "nut", "mxf", "gif", "yuv4mpegpipe", "dv",
)  # fmt: skip
"""Formats that hold their pictures themselves: no playlist, list of files, numbered pictures, or description of a stream."""
RECORDINGS = f"protocol_whitelist;file|format_whitelist;{','.join(_CONTAINERS)}"
STREAMS = "rtsp_transport;tcp|protocol_whitelist;rtsp,rtsps,rtp,tcp,tls|format_whitelist;rtsp,sdp"
_ONE_AT_A_TIME = threading.Lock()


@contextmanager
def restricted(options: str) -> Iterator[None]:
    """While something is opened: the environment is everybody's, so one at a time."""
    with _ONE_AT_A_TIME:
        before = os.environ.get(OPTIONS)
        os.environ[OPTIONS] = options
        try:
            yield
        finally:
            os.environ.pop(OPTIONS)
            if before is not None:
                os.environ[OPTIONS] = before
