"""Stacks of cameras beside GigE Vision's: Basler's emulation, a GenTL producer, GStreamer. What each alone does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_inspector.cameras import Camera, CameraState
from edge_inspector.cameras.gst import GstSource, pipeline_of
from edge_inspector.cameras.source import DeviceClock
from edge_inspector.config import CameraConfig
from edge_inspector.door import typed
from edge_inspector.errors import CameraEnded, CameraError
from tests.faults.rigs import GSTREAMER, Gentl, Pylon, has_gstreamer
from tests.line import needed, until
from tests.test_cameras import camera, taken

TEST_PICTURES = "gst:videotestsrc is-live=true ! video/x-raw,width=66,height=64,framerate=25/1"


@pytest.fixture
def pylon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pylon:
    found = Pylon(tmp_path)
    found.start()
    monkeypatch.setenv("PYLON_CAMEMU", "2")
    return found


@pytest.fixture
def gentl(tmp_path: Path) -> Gentl:
    found = Gentl(tmp_path)
    found.start()
    return found


def said(code: str, *, environment: dict[str, str] | None = None) -> Any:
    """What a process of its own prints: pylon and GenTL keep threads and locks in the one that loads them."""
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **(environment or {})},
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_a_software_trigger_makes_one_image_each_of_a_basler_camera(pylon: Pylon) -> None:
    with camera("pylon://0815-0001?trigger=software", on_demand=True, width=320, height=240, exposure_us=500) as source:
        until(lambda: source.state is CameraState.STREAMING, 30, "streaming")
        assert source.next(0.3) is None
        shapes = set()
        for _ in range(5):
            asked_s = time.monotonic()
            source.trigger()
            frame = until(lambda: source.next(1.0), 5, "an image")
            assert frame.captured_s >= asked_s
            shapes.add(frame.image.shape)
        assert source.next(0.3) is None
    assert shapes == {(240, 320)}


FAILED_BUFFERS = """
import json, sys
from pathlib import Path
from edge_inspector.cameras.pylon import PylonSource
from edge_inspector.config import CameraConfig
from edge_inspector.door import typed
source = PylonSource(CameraConfig(uri="pylon://", width=64, height=64, fps=50), typed(Path("/")))
source.open()
source.read(1.0)
source._camera.ForceFailedBufferCount.Value = 3
source._camera.ForceFailedBuffer.Execute()
frames = [source.read(1.0) for _ in range(12)]
source.close()
print(json.dumps([[f.fault, f.lost] for f in frames]))
"""


def test_an_incomplete_image_of_a_basler_camera_is_a_broken_frame(pylon: Pylon) -> None:
    frames = said(FAILED_BUFFERS)
    assert [fault for fault, _ in frames].count("corrupt_image") == 3
    assert sum(lost for _, lost in frames) == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"width": 5000}, "Width 5000 was refused: .*the camera takes 1 to 4096"),
        ({"pixel_format": "Mono7"}, r"PixelFormat Mono7 was refused: .*the camera takes Mono8, "),
        ({"features": {"NoSuchFeature": 3}}, "the camera has no NoSuchFeature"),
        ({"pixel_format": "RGB16Packed"}, "pixel format RGB16Packed is not understood"),
    ],
)
def test_a_setting_that_a_basler_camera_does_not_have_is_refused_with_its_range(
    pylon: Pylon, settings: dict[str, Any], words: str
) -> None:
    with camera("pylon://", **settings) as source:
        until(lambda: source.state is CameraState.FAULT, 30, "refused")
        assert re.search(words, source.fault), source.fault


def test_a_basler_camera_that_is_not_there_is_told_with_those_that_are(pylon: Pylon) -> None:
    with camera("pylon://77") as source:
        until(lambda: source.state is CameraState.FAULT, 30, "refused")
        assert "no such camera; there: 0815-0000, 0815-0001" in source.fault


def test_frames_of_a_gentl_producer_come_in_its_format_and_at_its_rate(gentl: Gentl) -> None:
    with camera(gentl.uri, fps=100, width=200, height=160, pixel_format="Mono8") as source:
        frames = taken(source, 30)
        assert str(source.info) == "200x160, 1 channel(s), 8 bit at 100/s, PixelFormat Mono8"
    assert all(f.image.shape == (160, 200) and f.image.dtype == np.uint8 for f in frames)
    ids = [int(f.source_id) for f in frames]
    assert ids == sorted(set(ids))


@pytest.mark.parametrize(
    ("place", "words"),
    [("7", "no such camera; there: 0, 1, 2"), ("0?trigger=software", "the camera has no trigger")],
)
def test_what_a_gentl_producer_does_not_have_is_told(gentl: Gentl, place: str, words: str) -> None:
    uri = gentl.uri.replace("gentl://0?", f"gentl://{place}{'&' if '?' in place else '?'}")
    with camera(uri) as source:
        until(lambda: source.state is CameraState.FAULT, 30, "refused")
        assert words in source.fault


def _refused(source: Camera) -> bool:
    return source.state is CameraState.FAULT


def test_a_producer_that_is_not_there_is_told(gentl: Gentl) -> None:
    for uri, words in (("gentl://0?cti=/nowhere/x.cti", "no such GenTL producer"), ("gentl://0", "under a name")):
        with camera(uri) as source:
            until(partial(_refused, source), 30, "refused")
            assert words in source.fault


def test_every_stack_is_searched_for_cameras(pylon: Pylon, gentl: Gentl) -> None:
    producers = str(Path(gentl.uri.split("cti=")[1]).parent)
    run = subprocess.run(
        [sys.executable, "-m", "edge_inspector.cli", "cameras", "--json"], capture_output=True, text=True, timeout=60, check=True,
        env={**os.environ, "GENICAM_GENTL64_PATH": producers, "PYLON_CAMEMU": "1"},
    )  # fmt: skip
    uris = {found["uri"] for found in json.loads(run.stdout)}
    cti = gentl.uri.split("cti=")[1]
    assert {"pylon://0815-0000", *(f"gentl://{number}?cti={cti}" for number in range(3))} <= uris


# --- GStreamer


@pytest.fixture
def gstreamer() -> Iterator[None]:
    needed(has_gstreamer(), GSTREAMER)
    yield


@pytest.mark.usefixtures("gstreamer")
def test_a_pipelines_frames_have_its_size_and_its_clock() -> None:
    with camera(TEST_PICTURES) as source:
        frames = taken(source, 20)
        assert str(source.info) == "66x64, 3 channel(s), 8 bit at 25/s"
    assert all(f.image.shape == (64, 66, 3) and f.clock == "kernel" for f in frames), "rows are padded to 68 pixels in memory"
    bars = frames[0].image[5]
    assert bars[2].min() > 180
    assert bars[-2, 2] < 30
    assert bars[-2, 0] > 180, "the test picture goes from white to blue: the order is BGR"
    gaps = np.diff([f.captured_s for f in frames])
    assert abs(np.median(gaps) - 0.04) < 0.005


@pytest.mark.usefixtures("gstreamer")
def test_a_pipeline_of_a_recording_ends_and_sixteen_bits_stay() -> None:
    uri = "gst:videotestsrc num-buffers=5 ! video/x-raw,format=GRAY16_LE,width=32,height=32"
    with camera(uri) as source:
        frames = taken(source, 5)
        with pytest.raises(CameraEnded, match="no more frames"):
            source.next(5.0)
    assert all(f.image.dtype == np.uint16 and f.image.max() > 60_000 for f in frames)


@pytest.mark.usefixtures("gstreamer")
@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("gst:nosuchthing ! videoconvert", "names an element that is not installed"),
        ("gst:videotestsrc ! audioconvert", "cannot be linked"),
        ("gst:filesrc location=/nowhere ! decodebin", "Resource not found"),
        ("csi://0", "names an element that is not installed"),
        ("csi://front", "a sensor's number is expected"),
    ],
)
def test_a_pipeline_that_does_not_run_says_why(uri: str, words: str) -> None:
    source = GstSource(CameraConfig(uri=uri), typed(Path("/")))
    with pytest.raises(CameraError, match=words) as caught:
        source.open()
    source.close()
    assert caught.value.hint


def test_a_jetsons_own_camera_is_asked_for_what_is_configured() -> None:
    config = CameraConfig(uri="csi://1", width=1280, height=720, fps=59.94)
    told = pipeline_of(config, typed(Path("/"))(config))
    assert told.startswith(
        "nvarguscamerasrc sensor-id=1 ! video/x-raw(memory:NVMM),width=1280,height=720,framerate=59940/1000 ! "
    )


# --- the clock of a camera


@pytest.mark.parametrize("drift", [1 + 100e-6, 1 - 100e-6])
def test_a_cameras_clock_is_brought_to_ours_by_the_least_delayed_frame_and_may_drift(drift: float) -> None:
    rng = np.random.default_rng(0)
    clock, errors = DeviceClock(), []
    times = [*(1000 + n * 0.05 for n in range(6000)), *(1000 + 3600 + n * 0.05 for n in range(600))]  # an hour's pause
    for exposed_s in times:
        arrived_s = exposed_s + 0.002 + rng.exponential(0.03)
        told_s = clock.captured_s(exposed_s * drift - 77.0, arrived_s)
        assert told_s <= arrived_s
        errors.append(told_s - exposed_s)
    settled = np.abs([*errors[100:6000], *errors[6100:]])
    assert settled.max() < 0.015, "100 ppm make 6 ms in the minute that counts"
    assert np.min(errors) > -0.007, "and no frame is dated long before its exposure, not after a pause either"


def test_a_cameras_clock_that_is_set_anew_is_learned_anew() -> None:
    clock = DeviceClock()
    told = [clock.captured_s(at_s - (2.0 if at_s > 5 else 0.0), at_s + 0.01) for at_s in np.arange(0, 10, 0.05)]
    assert np.abs(np.array(told) - np.arange(0, 10, 0.05)).max() < 0.011


def test_a_late_image_of_a_camera_without_a_clock_is_nobodys(pylon: Pylon) -> None:
    """Its exposure is longer than the triggers are apart: whose image comes next cannot be told, so the camera starts anew."""
    with camera(
        "pylon://?trigger=software", on_demand=True, timeout_ms=2000, features={"ExposureTimeAbs": 400_000.0}
    ) as source:
        until(lambda: source.state is CameraState.STREAMING, 30, "streaming")
        source.trigger()
        time.sleep(0.1)
        source.trigger()
        until(lambda: "no clock tells whose" in source.fault, 10, "refused")
        assert source.next(0.1) is None
        until(lambda: source.state is CameraState.STREAMING, 20, "again")
        source.trigger()
        assert until(lambda: source.next(1.0), 5, "an image for a trigger alone")
