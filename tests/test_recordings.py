"""Frames that are not whole: padded rows of buffers, cut-off videos, damaged pictures of network cameras."""

from __future__ import annotations

import http.server
import threading
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from edge_inspector import pictures
from edge_inspector.cameras import genicam, gentl, pylon
from edge_inspector.cameras.mjpeg import MjpegSource
from edge_inspector.cameras.synthetic import draw_part
from edge_inspector.config import CameraConfig
from edge_inspector.door import typed
from edge_inspector.errors import CameraEnded, PictureError
from tests.line import until
from tests.test_cameras import camera, taken

CASES = Path(__file__).parent / "cases"


# --- rows with padding


def _padded(padding: int) -> tuple[np.ndarray, bytes]:
    image = np.tile(np.arange(10, dtype=np.uint8) * 20, (6, 1))
    raw = np.zeros((6, 10 + padding), np.uint8)
    raw[:, :10] = image
    return image, raw.tobytes()


def test_rows_with_padding_are_not_sheared_whatever_the_stack_tells() -> None:
    mono8, mono16, rgb8 = 0x01080001, 0x01100007, 0x02180014
    image, data = _padded(2)
    assert np.array_equal(genicam.pixels(data, mono8, 10, 6, 2), image)
    assert np.array_equal(genicam.pixels(data[:-2], mono8, 10, 6, 2), image)  # none behind the last row
    assert np.array_equal(genicam.pixels(image.tobytes(), mono8, 10, 6, 2), image)  # taken out by the stack
    assert np.array_equal(genicam.pixels(image.tobytes() + bytes(1000), mono8, 10, 6, None), image)  # chunks behind it
    assert np.array_equal(genicam.pixels(data, mono16, 5, 6, 2), image.view(np.uint16))
    assert np.array_equal(genicam.pixels(data, rgb8, 3, 6, 3), image[:, :9].reshape(6, 3, 3)[:, :, ::-1])
    for length, padding in ((72, None), (59, 0), (71, 4)):
        with pytest.raises(PictureError, match="bytes came"):
            genicam.pixels(data[:length], mono8, 10, 6, padding)


def test_every_stack_asks_its_buffers_for_the_padding_of_rows(tmp_path: Path) -> None:
    """On modelled buffers: none of the cameras here has padding. harvesters 1.4 tells it and leaves it in."""
    image, data = _padded(2)
    component = SimpleNamespace(data=np.frombuffer(data, np.uint8), data_format="Mono8", width=10, height=6, x_padding=2)
    module = SimpleNamespace(frame_id=1, is_complete=lambda: True)
    buffer = SimpleNamespace(module=module, payload=SimpleNamespace(components=[component]), timestamp_ns=0)
    frame = gentl.GentlSource(CameraConfig(uri="gentl://1"), typed(tmp_path))._frame(buffer)
    assert np.array_equal(frame.image, image)
    component.data = np.frombuffer(data[:50], np.uint8)
    assert gentl.GentlSource(CameraConfig(uri="gentl://1"), typed(tmp_path))._frame(buffer).fault == "corrupt_image"
    told = {"BlockID": 1, "TimeStamp": 0, "PixelType": 0x01080001, "Width": 10, "Height": 6, "PaddingX": 2}
    result = SimpleNamespace(
        GrabSucceeded=lambda: True, GetArrayZeroCopy=lambda raw: nullcontext(memoryview(data)),
        **{f"Get{name}": partial(int, value) for name, value in told.items()},
    )  # fmt: skip
    frame = pylon.PylonSource(CameraConfig(uri="pylon://1"), typed(tmp_path))._frame(result)
    assert np.array_equal(frame.image, image)


# --- videos


@pytest.mark.parametrize(
    ("name", "good", "broken", "lost", "words"),
    [
        ("trunc.avi", 8, 2, 10, "ends after 9 of 20 frames"), ("hole.avi", 16, 2, 2, "ends after 17 of 20 frames"),
        ("hole.mp4", 17, 3, 0, "cannot be decoded"), ("lost.mp4", 16, 23, 1, "up to the next key frame"),
    ],
)  # fmt: skip
def test_what_a_video_lacks_is_told_and_never_judged_as_whole(name: str, good: int, broken: int, lost: int, words: str) -> None:
    with camera(f"file://{CASES / '13-video-ends-early' / name}") as source:
        frames = taken(source, good + broken, 30)
        with pytest.raises(CameraEnded):
            until(lambda: source.next(0.1) is not None, 5, "the end")
    faults = [frame.fault for frame in frames]
    assert (faults.count(""), faults.count("corrupt_image"), sum(frame.lost for frame in frames)) == (good, broken, lost)
    assert any(words in frame.fault_detail for frame in frames)
    assert len({frame.source_id for frame in frames}) == len(frames)


def test_a_whole_video_is_delivered_whole_and_again_where_it_loops(tmp_path: Path) -> None:
    parts = [draw_part(np.random.default_rng(n), 96, 128, False) for n in range(12)]
    for suffix, codec in ((".avi", "MJPG"), (".mp4", "mp4v")):
        writer = cv2.VideoWriter(str(tmp_path / f"v{suffix}"), cv2.VideoWriter.fourcc(*codec), 10, (128, 96))
        for part in parts:
            writer.write(part)
        writer.release()
        with camera(f"file://{tmp_path / f'v{suffix}'}?loop=1") as source:
            frames = taken(source, 30, 30)
        assert {frame.fault for frame in frames} == {""}
        assert {frame.lost for frame in frames} == {0}
        assert np.array_equal(frames[0].image, frames[12].image)
        assert float(np.abs(frames[3].image.astype(int) - parts[3]).mean()) < 12


# --- network cameras


class _Cut(http.server.BaseHTTPRequestHandler):
    """A stream whose pictures but the first have lost half of their data, and not their end marker."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        whole = pictures.encoded(draw_part(np.random.default_rng(0), 96, 128, False), ".jpg")
        for number in range(6):
            data = whole if number < 1 else whole[: len(whole) // 2] + b"\xff\xd9"
            self.wfile.write(f"--frame\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data + b"\r\n")

    def log_message(self, *_: Any) -> None:
        return


def test_a_picture_of_an_http_camera_without_its_middle_is_a_broken_frame(tmp_path: Path) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Cut)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    source = MjpegSource(CameraConfig(uri=f"http://127.0.0.1:{server.server_port}/"), typed(tmp_path))
    try:
        source.open()
        frames = [source.read(1.0) for _ in range(4)]
    finally:
        source.close()
        server.shutdown()
        server.server_close()
    assert [frame.fault for frame in frames if frame is not None] == ["corrupt_image"] * 4
