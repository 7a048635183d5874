"""Live cameras through OpenCV: `v4l2:///dev/video0`, `rtsp://`. Run in a child process: their calls can hang."""

from __future__ import annotations

import time
from typing import Literal

import cv2

from edge_inspector.addresses import scheme_of
from edge_inspector.cameras import ffmpeg, rtsp
from edge_inspector.cameras.source import DeviceClock, Info, check_format, moment
from edge_inspector.config import CameraConfig
from edge_inspector.door import Admit
from edge_inspector.errors import CameraError
from edge_inspector.frames import Frame, frozen

ENVIRONMENT = {
    "OPENCV_FFMPEG_IS_THREAD_SAFE": "1",
    "OPENCV_VIDEOIO_V4L_SELECT_TIMEOUT": "1",
    ffmpeg.OPTIONS: ffmpeg.STREAMS,
    "OPENCV_LOG_LEVEL": "ERROR",
    "OPENCV_FFMPEG_LOGLEVEL": "8",
}
"""What the child's OpenCV must find before it is imported."""
_DRAIN_S = 2.0
_LIVE_SHARE = 0.3
"""A frame that took this share of its period to come was waited for, not kept."""
_OLDEST_S = 60.0
_STEP = 0.02
"""A frame rate may be off by this share: cameras round."""


class OpencvSource:
    """One live camera. What OpenCV reports is not believed: settings are read back, a slow read is a failed one."""

    def __init__(self, config: CameraConfig, admit: Admit) -> None:
        self.config, self._admit = config, admit
        self._capture: cv2.VideoCapture | None = None
        self._seq = 0
        self._kernel_stamps = scheme_of(config.uri) == "v4l2"
        self._clock = DeviceClock()

    def open(self) -> Info:
        """Open, set, read back. Raises CameraError."""
        config, admitted = self.config, self._admit(self.config)
        timeout = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, config.timeout_ms, cv2.CAP_PROP_READ_TIMEOUT_MSEC, config.timeout_ms]
        if self._kernel_stamps:
            capture = cv2.VideoCapture(str(admitted.path), cv2.CAP_V4L2)
            hint = "is it plugged in, and may this user open it? ls -l /dev/v4l/by-id"
        else:
            rtsp.refuse_redirect(admitted.address, config.timeout_ms / 1000)
            url = admitted.address.url(admitted.user, admitted.password)
            capture = cv2.VideoCapture(url, cv2.CAP_FFMPEG, [*timeout, cv2.CAP_PROP_N_THREADS, 1])
            hint = "check address, user and password of the stream"
        self._capture = capture
        if not capture.isOpened():
            raise CameraError(f"{config.name}: cannot be opened", hint=hint)
        if not self._kernel_stamps:
            rtsp.refuse_elsewhere(admitted.address)
        for setting, value in (
            (cv2.CAP_PROP_FRAME_WIDTH, config.width),
            (cv2.CAP_PROP_FRAME_HEIGHT, config.height),
            (cv2.CAP_PROP_FPS, config.fps),
        ):
            if value is not None:
                capture.set(setting, value)
        capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
        done, first = capture.read()
        if not done or first is None or not first.size:
            raise CameraError(f"{config.name}: opened, but gives no frame", hint=hint)
        fps = capture.get(cv2.CAP_PROP_FPS)
        if not self._kernel_stamps:
            self._drain(capture, fps)
        info = Info(
            first.shape[1], first.shape[0], 1 if first.ndim == 2 else 3, first.dtype.itemsize * 8, fps or None,
            coding="single" if self._kernel_stamps else "stream",
        )  # fmt: skip
        check_format(config, info)
        if config.fps is not None and abs(fps - config.fps) > _STEP * config.fps:
            raise CameraError(f"{config.name}: {fps:g} frames/s, the configuration sets {config.fps:g}")
        return info

    def read(self, timeout_s: float) -> Frame | None:
        """The next frame; a read that took as long as its timeout returned an old one and counts as none."""
        if self._capture is None:
            raise CameraError(f"{self.config.name}: not open")
        began = time.monotonic()
        done, image = self._capture.read()
        now = time.monotonic()
        if not done:
            raise CameraError(f"{self.config.name}: no frame", hint="unplugged, or the stream ended")
        if now - began >= min(timeout_s, self.config.timeout_ms / 1000):
            return None
        self._seq += 1
        captured_s, clock = self._when(self._capture, now)
        return Frame(frozen(image), self._seq - 1, captured_s, moment(captured_s), clock, key=self._is_key(self._capture))

    def _is_key(self, capture: cv2.VideoCapture) -> bool | None:
        """Whether the frame is one of a stream that was coded alone; None where OpenCV or FFmpeg does not say."""
        kind = 0 if self._kernel_stamps else int(capture.get(cv2.CAP_PROP_FRAME_TYPE))
        return chr(kind) == "I" if kind in map(ord, "IPB") else None

    def _when(self, capture: cv2.VideoCapture, arrived_s: float) -> tuple[float, Literal["device", "kernel", "arrival"]]:
        """When a frame was made: after a pause the oldest come first, and look as new as any."""
        stamp = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        if self._kernel_stamps:
            known = 0.0 <= arrived_s - stamp < _OLDEST_S
            return (stamp, "kernel") if known else (arrived_s, "arrival")
        return (self._clock.captured_s(stamp, arrived_s), "device") if stamp > 0 else (arrived_s, "arrival")

    def _drain(self, capture: cv2.VideoCapture, fps: float) -> None:
        """Let go of what the server or FFmpeg has kept, up to a second of it at once; what follows teaches us its clock."""
        end, live = time.monotonic() + _DRAIN_S, 0
        while live < DeviceClock.SURE and (began := time.monotonic()) < end and capture.grab():
            self._when(capture, time.monotonic())
            live += time.monotonic() - began > _LIVE_SHARE / max(1.0, fps)

    def trigger(self) -> None:
        """These cameras run free."""
        raise CameraError(f"{self.config.name}: cannot be triggered")

    def close(self) -> None:
        """Let go of the device."""
        if self._capture is not None:
            self._capture.release()
            self._capture = None
