"""GigE Vision over real GVCP and GVSP: libaravis against its own simulator, with our pictures."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pytest

from edge_inspector.cameras import Camera, CameraState, genicam
from edge_inspector.cameras.aravis import HINT, AravisSource, library
from edge_inspector.cameras.sources import open_source
from edge_inspector.config import CameraConfig
from edge_inspector.door import typed
from edge_inspector.errors import CameraError
from tests.line import needed, until
from tests.test_cameras import taken

URI = "aravis://127.0.0.1"


class Simulator:
    """One camera; its port is fixed, so a second one needs a network of its own: `within` is the command that enters it."""

    def __init__(self, address: str = "127.0.0.1", within: tuple[str, ...] = ()) -> None:
        self.address, self.within = address, within
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [*self.within, sys.executable, "-m", "tests.gige", self.address, "EI01"], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).resolve().parents[1],
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def tell(self, line: str) -> None:
        self.say(line)
        self.done()

    def say(self, line: str) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def done(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "done\n"

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def installed() -> bool:
    """Whether libaravis is there."""
    try:
        library()
    except CameraError:
        return False
    return True


@pytest.fixture
def simulator() -> Iterator[Simulator]:
    needed(installed(), HINT)
    found = Simulator()
    found.start()
    yield found
    found.stop()


def camera(uri: str = URI, *, on_demand: bool = False, **more: Any) -> Camera:
    config = CameraConfig.model_validate({"uri": uri, **more})
    return Camera("top", config, lambda: open_source(config, typed(Path("/"))), on_demand=on_demand)


def identity(image: np.ndarray) -> int:
    return int.from_bytes(image.reshape(-1)[:8].tobytes(), "big")


def test_a_camera_whose_process_was_killed_streams_to_the_next_one(simulator: Simulator) -> None:
    with camera("gige://127.0.0.1", width=64, height=64, fps=50) as source:
        taken(source, 5)
        (child,) = (p for p in psutil.Process().children() if simulator.process is not None and p.pid != simulator.process.pid)
        child.suspend()  # it cannot let go of its camera
        until(lambda: source.counts.reopened, 10, "another process")
        taken(source, 5)


def test_settings_are_taken_and_frames_come_with_their_own_pixels_and_ids(simulator: Simulator) -> None:
    with camera(width=320, height=200, fps=50, exposure_us=4000, pixel_format="Mono8", features={"GainRaw": 2}) as source:
        frames = taken(source, 20)
        info = source.info
    assert info is not None
    assert (info.width, info.height, info.channels, info.depth_bits) == (320, 200, 1, 8)
    assert all(frame.image.shape == (200, 320) for frame in frames)
    assert all(str(identity(frame.image)) == frame.source_id for frame in frames), "id in the pixels, id of the block"
    assert {int(np.median(frame.image)) for frame in frames} == {40}, "as bright as the exposure"
    assert not any(frame.lost for frame in frames)
    assert [frame.seq for frame in frames] == list(range(20))
    assert all(0 <= time.monotonic() - frame.captured_s < 30 for frame in frames)
    assert all(not frame.image.flags.writeable for frame in frames)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"width": 99999 // 8}, "Width 12499 was refused: .*the camera takes 1 to "),
        ({"exposure_us": 59_000_000.0}, "ExposureTimeAbs 59000000.0 was refused: .*the camera takes 10 to "),
        ({"pixel_format": "Mono7"}, "PixelFormat Mono7 was refused: .*the camera takes BayerBG8, .*Mono16"),
        ({"features": {"NoSuchFeature": 3}}, "the camera has no NoSuchFeature"),
    ],
)
def test_a_setting_that_the_camera_does_not_have_is_refused_with_its_range(
    simulator: Simulator, settings: dict[str, Any], words: str
) -> None:
    source = AravisSource(CameraConfig.model_validate({"uri": URI, **settings}), typed(Path("/")))
    with pytest.raises(CameraError, match=words.replace("+", r"\+")):
        source.open()
    source.close()


def test_a_software_trigger_makes_one_image_each(simulator: Simulator) -> None:
    with camera(f"{URI}?trigger=software", on_demand=True, exposure_us=1000) as source:
        until(lambda: source.state is CameraState.STREAMING, what="streaming")
        assert source.next(0.5) is None
        found = []
        for _ in range(5):
            source.trigger()
            asked = time.monotonic()
            frame = source.next(3.0)
            assert frame is not None
            assert frame.captured_s >= asked - 0.1
            found.append(identity(frame.image))
        assert source.next(0.5) is None
    assert len(set(found)) == 5


def test_a_camera_that_dies_is_noticed_and_taken_back(simulator: Simulator) -> None:
    with camera(timeout_ms=1000) as source:
        before = taken(source, 3)
        simulator.stop()
        until(lambda: source.state is CameraState.FAULT, 10, "fault")
        assert "silent for " in source.fault or "cannot be opened" in source.fault
        simulator.start()
        end = time.monotonic() + 20
        after = None
        while time.monotonic() < end and (after is None or not after.epoch):
            after = source.next(0.5) or after
    assert after is not None
    assert after.epoch > 0
    assert after.seq > before[-1].seq


def test_a_frozen_camera_is_noticed_and_reopened_when_it_thaws(simulator: Simulator) -> None:
    assert simulator.process is not None
    with camera(timeout_ms=1000) as source:
        taken(source, 3)
        simulator.process.send_signal(signal.SIGSTOP)
        until(lambda: source.state is CameraState.FAULT, 10, "fault")
        simulator.process.send_signal(signal.SIGCONT)
        until(lambda: source.state is CameraState.STREAMING and source.next(0.2) is not None, 30, "frames again")


def test_cameras_that_answer_are_listed_with_the_uri_that_opens_them(simulator: Simulator) -> None:
    listed = json.loads(
        subprocess.run([sys.executable, "-m", "edge_inspector.cli", "cameras", "--json"], capture_output=True, text=True,
                       timeout=60, check=True).stdout
    )  # fmt: skip
    ours = next(found for found in listed if found["serial"] == "EI01")
    assert ours["uri"] == "aravis://EI01"
    assert "Aravis" in ours["model"]
    assert "127.0.0.1" in ours["details"]
    with camera(ours["uri"]) as source:
        assert taken(source, 2)


def test_nobody_there_is_told_with_what_to_do() -> None:
    needed(installed(), HINT)
    source = AravisSource(CameraConfig(uri="gige://127.0.0.9"), typed(Path("/")))
    with pytest.raises(CameraError, match="gige://127.0.0.9: cannot be opened: ") as caught:
        source.open()
    assert "powered" in caught.value.hint
    source.close()


@pytest.mark.parametrize("pattern", ["GR", "RG", "GB", "BG"])
@pytest.mark.parametrize("bits", [8, 12])
def test_each_bayer_pattern_gives_its_colours_back(pattern: str, bits: int) -> None:
    """A red part under each mosaic: red where the pattern says R, nothing elsewhere."""
    _, kind, channels, code = next(known for known in genicam.FORMATS.values() if known[0] == f"Bayer{pattern}{bits}")
    assert channels == 1
    assert code is not None
    rows = {"GR": "GRBG", "RG": "RGGB", "GB": "GBRG", "BG": "BGGR"}[pattern]
    at = rows.index("R")
    mosaic: np.ndarray = np.zeros((16, 16), kind)
    mosaic[at // 2 :: 2, at % 2 :: 2] = 200
    blue, green, red = cv2.cvtColor(mosaic, code)[4:-4, 4:-4].reshape(-1, 3).mean(0)
    assert (red, green, blue) == (200, 0, 0)


@pytest.mark.parametrize(("pixel_format", "channels", "depth"), [("BayerBG8", 3, 8), ("Mono16", 1, 16), ("RGB8", 3, 8)])
def test_formats_arrive_as_grey_or_bgr_of_their_depth(
    simulator: Simulator, pixel_format: str, channels: int, depth: int
) -> None:
    with camera(pixel_format=pixel_format) as source:
        until(lambda: source.state is not CameraState.CONNECTING, what="opened")
        image = taken(source, 2)[-1].image
    assert (1 if image.ndim == 2 else 3, image.dtype.itemsize * 8) == (channels, depth)


def test_block_ids_are_counted_across_their_wrap() -> None:
    assert genicam.gap(0, 65400) == 0
    assert genicam.gap(7, 8) == 0
    assert genicam.gap(7, 11) == 3
    assert genicam.gap(65535, 1) == 0
    assert genicam.gap(65534, 2) == 2
    assert genicam.gap(70000, 70002) == 1
    assert genicam.gap(100, 3) == genicam.gap(70002, 3) == 0, "a camera that counts anew has lost nothing that we know of"


def test_settings_of_industrial_cameras_are_refused_elsewhere() -> None:
    with pytest.raises(ValueError, match="exposure_us, features: only cameras of aravis://"):
        CameraConfig.model_validate({"uri": "v4l2:///dev/video0", "exposure_us": 100, "features": {"Gamma": 1.0}})
