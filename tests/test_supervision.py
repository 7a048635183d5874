"""When a camera's fault is over, when its pictures are taken for frozen, and how a camera's process is told to have ended."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from edge_inspector.cameras import Camera, CameraState
from edge_inspector.cameras.camera import _Guard
from edge_inspector.cameras.gst import _STREAM_CODED
from edge_inspector.cameras.source import Info
from edge_inspector.cameras.synthetic import SyntheticSource
from edge_inspector.config import CameraConfig, Guards
from edge_inspector.door import typed
from edge_inspector.frames import Frame, Pixels, utc_now
from tests.line import until
from tests.test_cameras import camera, taken

INFO = Info(64, 48, 1, 8, 25.0)


class Asked(SyntheticSource):
    """A camera that makes an image when it is told to, unless it is dumb."""

    dumb = threading.Event()

    def open(self) -> Info:
        self._told = False
        return replace(super().open(), simulated=False, pulled=False, triggerable=True, coding="single")

    def trigger(self) -> None:
        self._told = True

    def read(self, timeout_s: float) -> Frame | None:
        if not self._told or self.dumb.is_set():
            time.sleep(timeout_s)
            return None
        self._told = False
        return super().read(timeout_s)


class Still(SyntheticSource):
    """A camera that waits for a line which nobody pulses, and fails once."""

    opened = 0

    def open(self) -> Info:
        Still.opened += 1
        if Still.opened == 1:
            raise OSError("not there yet")
        return replace(super().open(), simulated=False, pulled=False, triggerable=False, waits=True)

    def read(self, timeout_s: float) -> Frame | None:
        time.sleep(timeout_s)
        return None


def states(source: Camera, for_s: float) -> set[tuple[str, bool]]:
    """The states it had in that time, each with whether it said that it gives images."""
    found, end = set(), time.monotonic() + for_s
    while time.monotonic() < end:
        found.add((source.state.value, not source.hindrance))
        time.sleep(0.005)
    return found


def test_a_camera_that_opens_and_never_delivers_is_in_fault_without_a_break() -> None:
    with camera("synthetic://?fps=30&fault=silent", timeout_ms=200) as source:
        assert (source.state, source.hindrance) == (CameraState.CONNECTING, "connecting")
        until(lambda: source.state is not CameraState.CONNECTING, 20, "a first state")
        assert states(source, 2.5) == {("fault", False)}
        until(lambda: source.counts.reopened >= 2, 20, "reopened")


def test_a_camera_that_is_asked_gives_an_image_of_no_part_before_its_fault_is_over() -> None:
    config = CameraConfig(uri="synthetic://", timeout_ms=150)
    Asked.dumb.clear()
    with Camera("top", config, lambda: Asked(config, typed(Path("/"))), on_demand=True) as source:
        until(lambda: source.state is CameraState.STREAMING, what="streaming: nobody has asked yet")
        Asked.dumb.set()
        while source.state is not CameraState.FAULT:  # two in a row that do not come
            source.trigger()
            assert source.next(0.3) is None
        assert states(source, 2.0) == {("fault", False)}
        Asked.dumb.clear()
        until(lambda: source.state is CameraState.STREAMING, what="over, though no part came")
        assert source.next(0.1) is None, "what was asked for then is no part's image"
        asked_s = time.monotonic()
        source.trigger()
        frame = source.next(2.0)
        assert frame is not None
        assert frame.captured_s >= asked_s


def test_a_camera_on_a_line_that_stands_still_works_as_soon_as_it_is_open() -> None:
    config = CameraConfig(uri="synthetic://", timeout_ms=100)
    with Camera("top", config, lambda: Still(config, typed(Path("/")))) as source:
        until(lambda: source.state is CameraState.FAULT, what="fault")
        until(lambda: source.state is CameraState.STREAMING, what="streaming")
        assert states(source, 0.5) == {("streaming", True)}


def found(pictures: list[Pixels], info: Info = INFO, *, every_s: float = 0.04, key: Any = None, **guards: Any) -> list[bool]:
    """Which of these pictures, one after the other, are taken for frozen; `key`: number -> whether it is a key frame."""
    guard = _Guard(Guards.model_validate(guards))
    told = []
    for number, image in enumerate(pictures):
        frame = Frame(image, number, number * every_s, utc_now(), key=key(number) if key else None)
        fault = guard.fault(frame, info)
        assert fault is None or fault[0].value == "frozen_image"
        told.append(fault is not None)
    return told


def pictures(count: int, *, differ_at: tuple[int, ...] = (), level: int = 90) -> list[Pixels]:
    """Copies of one picture; of those at `differ_at` the very last byte differs."""
    rng = np.random.default_rng(1)
    one = rng.integers(level, level + 20, (48, 64), dtype=np.uint8)
    made = [one.copy() for _ in range(count)]
    for number in differ_at:
        made[number][-1, -1] ^= 1
    return list(made)


def test_ten_equal_frames_of_a_camera_are_frozen_and_one_byte_that_differs_is_none() -> None:
    assert found(pictures(12)) == [False] * 9 + [True] * 3
    assert found(pictures(20, differ_at=(5, 14))) == [False] * 20
    assert found(pictures(22, differ_at=(11,))) == [False] * 9 + [True] * 2 + [False] * 10 + [True]
    assert not any(found(pictures(50), frozen_frames=0))
    assert found(pictures(5), frozen_frames=2) == [False, False, True, True, True]


@pytest.mark.parametrize(
    "image",
    [np.zeros((48, 64), np.uint8), np.full((48, 64), 3, np.uint8), np.full((48, 64), 255, np.uint8), np.full((48, 64), 4095, np.uint16)],
)  # fmt: skip
def test_black_and_saturated_frames_may_be_equal_for_ever(image: Pixels) -> None:
    info = replace(INFO, depth_bits=image.itemsize * 8)
    assert not any(found([image] * 50, info))


def test_twelve_bit_frames_that_are_equal_are_frozen() -> None:
    dim = [np.add(image, 300, dtype=np.uint16) for image in pictures(10)]
    assert found(dim, replace(INFO, depth_bits=16))[-1]


def test_a_frame_of_another_size_or_depth_is_told() -> None:
    guard = _Guard(Guards())
    for image in (np.zeros((48, 63), np.uint8), np.zeros((48, 64, 3), np.uint8), np.zeros((48, 64), np.uint16)):
        fault = guard.fault(Frame(image, 0, 0.0, utc_now()), INFO)
        assert fault is not None
        assert fault[0].value == "wrong_format"


@pytest.mark.parametrize("coding", ["recorded", "simulated"])
def test_a_recording_is_never_frozen_unless_somebody_asks_for_it(coding: str) -> None:
    info = replace(INFO, simulated=True) if coding == "simulated" else replace(INFO, coding="recorded")
    assert not any(found(pictures(100), info))
    assert any(found(pictures(100), info, frozen_frames=10))


def test_a_stream_is_frozen_after_ten_seconds_and_two_key_frames() -> None:
    stream: Literal["stream"] = "stream"
    info = replace(INFO, coding=stream)
    every_5_s = found(pictures(500), info, key=lambda number: number % 125 == 0)
    assert every_5_s.index(True) == 250, "10 s"
    every_8_s = found(pictures(500), info, key=lambda number: number % 200 == 0)
    assert every_8_s.index(True) == 400, "the second key frame since it stands still"
    assert found(pictures(2000), info).index(True) == 1500, "60 s where nobody knows the key frames"


def test_pipelines_that_decode_streams_are_known_by_their_elements() -> None:
    streams = (
        "rtspsrc location=x ! rtph264depay ! avdec_h264",
        "filesrc ! decodebin",
        "udpsrc ! h265parse ! nvv4l2decoder",
        "x ! vp9dec",
    )
    singles = (
        "v4l2src ! image/jpeg ! jpegdec",
        "nvarguscamerasrc ! nvvidconv",
        "aravissrc ! bayer2rgb",
        "videotestsrc is-live=true",
    )
    assert all(_STREAM_CODED.search(pipeline) for pipeline in streams)
    assert not any(_STREAM_CODED.search(pipeline) for pipeline in singles)


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("synthetic://?isolate=1&fps=30&fault=crash&after=2", "the camera process ended with exit code 70"),
        ("synthetic://?isolate=1&seed=-1", "ValueError: "),
    ],
)
def test_a_camera_process_that_ends_says_how(uri: str, words: str) -> None:
    with camera(uri) as source:
        assert words in until(lambda: source.fault, 20, "fault")


def test_a_camera_process_that_was_killed_tells_the_signal_by_name() -> None:
    with camera("synthetic://?isolate=1&fps=30") as source:
        taken(source, 2)
        listed = subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "cameras.isolation"], capture_output=True, check=True)
        os.kill(int(listed.stdout.split()[-1]), signal.SIGSEGV)
        assert "the camera process ended by signal SIGSEGV" in until(lambda: source.fault, 20, "fault")


def test_frame_times_are_read_while_frames_arrive() -> None:
    config = CameraConfig(uri="synthetic://?fps=30")
    source, over = Camera("top", config, lambda: SyntheticSource(config, typed(Path("/"))), on_demand=True), threading.Event()
    image = np.zeros((1, 1), np.uint8)

    def arrive() -> None:
        number = 0
        while not over.is_set():
            number += 1
            source._deliver(Frame(image, number, number / 30, utc_now(), fault="corrupt_image"), INFO)

    arriving = threading.Thread(target=arrive)
    arriving.start()
    try:
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            with source._changed:
                source._latency_s(INFO)  # as `next` does
    finally:
        over.set()
        arriving.join()
