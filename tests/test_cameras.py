"""The Camera contract over sources that run everywhere, and the faults it must survive."""

from __future__ import annotations

import http.server
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edge_inspector import pictures
from edge_inspector.cameras import Camera, CameraState, open_source
from edge_inspector.cameras.mjpeg import MjpegSource
from edge_inspector.cameras.sources import video_devices
from edge_inspector.cameras.synthetic import SyntheticSource, draw_part
from edge_inspector.config import CameraConfig, parse_line
from edge_inspector.door import typed
from edge_inspector.errors import CameraEnded, CameraError, SchemaError
from edge_inspector.frames import Frame
from tests.line import ENGINES, until

RECORDING = ENGINES / "recording"


def camera(uri: str, *, on_demand: bool = False, **more: Any) -> Camera:
    config = CameraConfig.model_validate({"uri": uri, **more})
    return Camera("top", config, lambda: open_source(config, typed(Path("/"))), on_demand=on_demand)


def taken(source: Camera, count: int, timeout_s: float = 15.0) -> list[Frame]:
    found: list[Frame] = []
    end = time.monotonic() + timeout_s
    while len(found) < count and time.monotonic() < end:
        frame = source.next(0.5)
        if frame is not None:
            found.append(frame)
    assert len(found) == count, f"{len(found)} of {count} frames; {source.state} {source.fault}"
    return found


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "parts.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 64))
    for n in range(12):
        writer.write(draw_part(np.random.default_rng(n), 64, 64, False))
    writer.release()
    return path


@pytest.mark.parametrize("kind", ["dir", "file", "synthetic", "isolated"])
def test_every_source_delivers_numbered_read_only_frames(kind: str, video: Path) -> None:
    uri = {
        "dir": f"dir://{RECORDING}", "file": f"file://{video}", "synthetic": "synthetic://",
        "isolated": "synthetic://?isolate=1&fps=50",
    }[kind]  # fmt: skip
    with camera(uri) as source:
        frames = taken(source, 10)
    assert [f.seq for f in frames] == list(range(10))
    assert all(not f.image.flags.writeable and f.image.dtype == np.uint8 and f.image.ndim == 3 for f in frames)
    assert all(b.captured_s > a.captured_s for a, b in zip(frames, frames[1:], strict=False))
    assert all(f.captured_at.tzinfo is not None for f in frames)


def test_a_recording_ends_or_loops() -> None:
    with camera(f"dir://{RECORDING}") as source:
        taken(source, 60)
        with pytest.raises(CameraEnded):
            source.next(2.0)
    with camera(f"dir://{RECORDING}?loop=1") as source:
        assert taken(source, 61)[60].source_id == "paper-001"


def test_pixels_cross_the_process_border_unchanged() -> None:
    with (
        camera("synthetic://?isolate=1&fps=50&seed=3&depth=16&grey=1") as far,
        camera("synthetic://?seed=3&depth=16&grey=1") as near,
    ):
        a, b = taken(far, 5), taken(near, 5)
    by_name = {f.source_id: f.image for f in b}
    common = [f for f in a if f.source_id in by_name]
    assert common
    assert all(np.array_equal(f.image, by_name[f.source_id]) and f.image.dtype == np.uint16 for f in common)


def test_an_unreadable_picture_is_a_broken_frame_not_a_missing_one(tmp_path: Path) -> None:
    shutil.copy(RECORDING / "paper-001.png", tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes(b"broken")
    with camera(f"dir://{tmp_path}") as source:
        frames = taken(source, 2)
    assert [f.fault for f in frames] == ["", "corrupt_image"]


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("dir:///nowhere", "no such folder"),
        ("file:///nowhere.mp4", "no such file"),
        ("v4l2:///dev/video77", "cannot be opened"),
        ("rtsp://127.0.0.1:1/x", "cannot be opened"),
        ("synthetic://?colour=red", "an unknown option stands after the ?"),
        ("synthetic://?fps=fast", "is not a number"),
        ("synthetic://?fault=sulk", "unknown fault"),
    ],
)
def test_a_camera_that_cannot_be_opened_says_why_and_is_tried_again(uri: str, words: str) -> None:
    with camera(uri) as source:
        until(lambda: source.state is CameraState.FAULT, 20, "fault")
        assert words in source.fault
        assert source.next(0.1) is None
        until(lambda: source.counts.reopened >= 1, 10, "second try")


def test_a_setting_that_was_not_taken_is_refused() -> None:
    config = CameraConfig(uri="synthetic://?width=64&height=64", width=128)
    with pytest.raises(CameraError, match="width 64, the configuration sets 128"):
        open_source(config, typed(Path("/"))).open()


def test_a_source_that_cannot_even_be_closed_is_replaced_all_the_same() -> None:
    class Clumsy(SyntheticSource):
        def read(self, timeout_s: float) -> Frame | None:
            if self._seq == 3:
                raise CameraError("unplugged")
            return super().read(timeout_s)

        def close(self) -> None:
            super().close()
            raise OSError("still open")

    config = CameraConfig(uri="synthetic://?fps=30")
    with Camera("top", config, lambda: Clumsy(config, typed(Path("/")))) as source:
        assert {frame.epoch for frame in taken(source, 8)} >= {0, 1, 2}


@pytest.mark.parametrize("fault", ["hang", "crash", "unplug", "silent"])
def test_a_fault_ends_with_a_reopened_camera_and_frames_again(fault: str) -> None:
    with camera(f"synthetic://?isolate=1&fps=30&fault={fault}&after=5", timeout_ms=400) as source:
        frames = taken(source, 12, 30)
        assert source.counts.reopened >= 1
    assert [f.seq for f in frames] == list(range(12))
    assert {f.epoch for f in frames} >= {0, 1}


def test_a_hanging_camera_does_not_slow_another_nor_the_end() -> None:
    hang = camera("synthetic://?fps=30&fault=hang&after=1", timeout_ms=60_000)
    with hang, camera("synthetic://?fps=20") as fine:
        taken(hang, 1)
        times = [f.captured_s for f in taken(fine, 20)]
        began = time.monotonic()
    assert time.monotonic() - began < 6.0
    assert max(b - a for a, b in zip(times[5:], times[6:], strict=False)) < 1.0


def test_dark_and_frozen_frames_are_found() -> None:
    for fault, guards, reason in (
        ("dark", {"dark_below": 20}, "dark_image"), ("freeze", {"frozen_frames": 2}, "frozen_image"),
    ):  # fmt: skip
        with camera(f"synthetic://?fault={fault}&after=2", guards=guards) as source:
            faults = [f.fault for f in taken(source, 8)]
        assert faults[:2] == ["", ""]
        assert faults[-1] == reason


def test_a_slow_user_loses_counted_frames_of_a_live_camera_and_none_of_a_recording() -> None:
    with camera("synthetic://?fps=100") as live:
        taken(live, 1)
        time.sleep(0.5)
        frames = taken(live, 20)
        assert sum(f.lost for f in frames) == live.counts.lost > 0
    with camera("synthetic://?fps=100", policy="latest") as latest:
        taken(latest, 1)
        time.sleep(1.5)
        frame = taken(latest, 1)[0]
        assert time.monotonic() - frame.captured_s < 1.0
        assert latest.counts.skipped > 0
    with camera(f"dir://{RECORDING}") as recording:
        taken(recording, 1)
        time.sleep(0.3)
        assert all(f.lost == 0 for f in taken(recording, 30))


def test_a_triggered_frame_is_never_older_than_its_trigger() -> None:
    with camera("synthetic://?fps=50&isolate=1", on_demand=True) as free_running:
        until(lambda: free_running.state is CameraState.STREAMING, 15, "streaming")
        for _ in range(5):
            time.sleep(0.1)
            asked = time.monotonic()
            free_running.trigger()
            frame = free_running.next(2.0)
            assert frame is not None
            assert frame.captured_s >= asked
    with camera("synthetic://?fps=100&isolate=1", on_demand=True) as late_user:
        until(lambda: late_user.state is CameraState.STREAMING, 15, "streaming")
        late_user.trigger()
        asked = time.monotonic()
        time.sleep(1.5)
        frame = late_user.next(2.0)
        assert frame is not None
        assert frame.captured_s - asked < 1.0, "not the first frame since the trigger"
    with camera(f"dir://{RECORDING}", on_demand=True) as folder:
        until(lambda: folder.state is CameraState.STREAMING, 15, "streaming")
        assert folder.next(0.3) is None
        names = []
        for _ in range(3):
            folder.trigger()
            frame = folder.next(2.0)
            assert frame is not None
            names.append(frame.source_id)
    assert names == ["paper-001", "paper-002", "paper-003"]


def test_nothing_is_left_behind_after_closing() -> None:
    before = len(os.listdir("/proc/self/fd")), set(os.listdir("/dev/shm"))
    with camera("synthetic://?fps=30&isolate=1") as source:
        taken(source, 3)
        child = subprocess.run(
            ["pgrep", "-P", str(os.getpid()), "-f", "cameras.isolation"], capture_output=True, text=True, check=False
        )
        assert child.stdout.strip()
    until(lambda: len(os.listdir("/proc/self/fd")) <= before[0], 5, "descriptors closed")
    until(lambda: set(os.listdir("/dev/shm")) <= before[1], 5, "shared memory given back")
    pid = int(child.stdout.split()[0])
    assert not Path(f"/proc/{pid}").exists()


def test_video_devices_are_listed_by_the_name_that_lasts_and_without_their_metadata(tmp_path: Path) -> None:
    devices, classes = tmp_path / "dev", tmp_path / "class"
    for name, index, model in (("video0", "0", "HD Camera"), ("video1", "1", "HD Camera"), ("video2", "0", "Other")):
        (classes / name).mkdir(parents=True)
        (classes / name / "index").write_text(index + "\n")
        (classes / name / "name").write_text(model + "\n")
        (devices / name).parent.mkdir(exist_ok=True)
        (devices / name).touch()
    (devices / "v4l" / "by-id").mkdir(parents=True)
    (devices / "v4l" / "by-id" / "usb-HD-7-video-index0").symlink_to(devices / "video0")
    found = video_devices(devices, classes)
    assert [(f.uri, f.model) for f in found] == [
        (f"v4l2://{devices}/v4l/by-id/usb-HD-7-video-index0", "HD Camera"), (f"v4l2://{devices}/video2", "Other"),
    ]  # fmt: skip


class _Mjpeg(http.server.BaseHTTPRequestHandler):
    """Sends a stream as the path says; every third picture of `truncated` ends in its middle."""

    def do_GET(self) -> None:
        path = self.path.strip("/")
        if path == "guarded" and self.headers.get("Authorization") != "Basic dXNlcjpwQHNz":  # user:p@ss
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="camera"')
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if path == "page" else "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        whole = pictures.encoded(draw_part(np.random.default_rng(0), 96, 128, False), ".jpg")
        try:
            for n in range(1, 1000):
                data = whole[: len(whole) // 2] if path == "truncated" and n % 3 == 0 else whole
                told = "" if path == "unsized" else f"Content-Length: {len(data)}\r\n"
                self.wfile.write(f"--frame\r\nContent-Type: image/jpeg\r\n{told}\r\n".encode() + data + b"\r\n")
                time.sleep(0.02)
                if path == "dying" and n % 10 == 0:
                    self.wfile.write(f"--frame\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data[:100])
                    return
                if path == "silent" and n == 5:
                    time.sleep(3)
        except OSError:
            return

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def mjpeg_port() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Mjpeg)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("path", ["sized", "unsized"])
def test_an_http_camera_delivers_every_picture_whole(mjpeg_port: int, path: str) -> None:
    with camera(f"http://127.0.0.1:{mjpeg_port}/{path}", timeout_ms=3000) as source:
        frames = taken(source, 10, 30)
        assert source.info is not None
        assert (source.info.width, source.info.height) == (128, 96)
    whole = pictures.decode(pictures.encoded(draw_part(np.random.default_rng(0), 96, 128, False), ".jpg"), "x")
    assert all(np.array_equal(frame.image, whole) for frame in frames)


def test_an_http_camera_that_sends_its_last_picture_again_and_again_is_told_as_frozen(mjpeg_port: int) -> None:
    with camera(f"http://127.0.0.1:{mjpeg_port}/sized", timeout_ms=3000) as source:
        frames = taken(source, 14, 30)
        assert [frame.fault for frame in frames] == [""] * 9 + ["frozen_image"] * 5
        assert "identical frames in a row" in source.frozen
        assert source.hindrance == source.frozen
    with camera(f"http://127.0.0.1:{mjpeg_port}/sized", timeout_ms=3000, guards={"frozen_frames": 0}) as unguarded:
        assert {frame.fault for frame in taken(unguarded, 14, 30)} == {""}


def test_a_truncated_picture_of_an_http_camera_is_a_broken_frame_and_never_a_concealed_one(mjpeg_port: int) -> None:
    with camera(f"http://127.0.0.1:{mjpeg_port}/truncated", timeout_ms=3000) as source:
        frames = taken(source, 12, 30)
    assert [frame.fault for frame in frames].count("corrupt_image") == 4
    assert {frame.fault_detail for frame in frames if frame.fault} == {"picture: truncated: the JPEG has no end marker"}


@pytest.mark.parametrize(("path", "words"), [("dying", "it ended inside a picture"), ("silent", "silent for 500 ms")])
def test_an_http_stream_that_stops_is_told_and_opened_again(mjpeg_port: int, path: str, words: str) -> None:
    with camera(f"http://127.0.0.1:{mjpeg_port}/{path}", timeout_ms=500) as source:
        faults = set()

        def again() -> bool:
            source.next(0.05)
            faults.add(source.fault)
            return any(words in fault for fault in faults)

        until(again, 20, words)
        assert taken(source, 3, 20)


def test_pictures_that_waited_for_us_are_not_dated_as_new(mjpeg_port: int) -> None:
    source = MjpegSource(CameraConfig(uri=f"http://127.0.0.1:{mjpeg_port}/sized"), typed(Path("/")))
    source.open()
    assert source.read(1.0) is not None
    time.sleep(0.6)  # thirty pictures wait in the sockets
    since_s = time.monotonic()
    frames = [source.read(1.0) for _ in range(60)]
    source.close()
    old = [frame for frame in frames if frame and frame.captured_s < since_s]
    assert len(old) >= 25
    assert frames[-1] is not None
    assert frames[-1].captured_s > since_s, "and those that follow are"


@pytest.mark.parametrize(
    ("station", "words"),
    [
        ({"trigger": "hardware", "cameras": {"top": {"uri": "dir://x", "policy": "latest"}}}, "latest would skip parts"),
        (
            {"trigger": "hardware", "cameras": {"top": {"uri": "aravis://1"}}},
            "waits for nothing, the station's trigger is hardware",
        ),
        ({"trigger": "free", "cameras": {"top": {"uri": "pylon://?trigger=software"}}}, "waits for software"),
        ({"trigger": "software", "cameras": {"top": {"uri": "gige://1?trigger=Line1"}}}, "waits for Line1"),
        ({"trigger": "hardware", "hardware": {"announced": True, "delay_ms": 990}}, "is over before the image may come"),
        ({"trigger": "hardware", "hardware": {"announced": True, "debounce_ms": 60}}, "at least twice tolerance_ms"),
    ],
)
def test_a_station_whose_triggers_and_cameras_do_not_fit_is_refused(station: dict[str, Any], words: str) -> None:
    cameras = {"top": {"uri": "dir://x"}}
    line = {
        "schema": "ei.line.v1", "stations": {"press": {"product": "p", "products": {"p": "r"}, "cameras": cameras, **station}},
        "recipes": {"r": {"cameras": {"top": {"rois": {"all": {"bundle": "b"}}}}}},
    }  # fmt: skip
    with pytest.raises(SchemaError) as caught:
        parse_line(line, "line.yaml")
    assert words in caught.value.message


def test_what_is_no_stream_of_jpegs_is_refused_and_passwords_are_not_told(mjpeg_port: int) -> None:
    def told(place: str) -> str:
        with camera(place) as source:
            return str(until(lambda: source.fault, 15, "fault"))

    assert "sends text/html, no stream of JPEGs" in told(f"http://127.0.0.1:{mjpeg_port}/page")
    refused = told(f"http://user:secret@127.0.0.1:{mjpeg_port}/guarded")
    assert "cannot be opened: 401" in refused
    assert "secret" not in refused
    with camera(f"http://user:p%40ss@127.0.0.1:{mjpeg_port}/guarded") as source:
        assert taken(source, 2)
