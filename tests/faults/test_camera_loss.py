"""A daemon whose camera stops sending, ends, goes dark or changes its size: what it tells, and when it judges again.

What a camera alone does is in test_cameras.py. EDGE_INSPECTOR_LONG=1 keeps the camera away for longer, and more often.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_inspector.cameras import Camera, Source, open_source
from edge_inspector.config import CameraConfig
from edge_inspector.door import typed
from tests.faults.rigs import Http
from tests.line import DaemonProcess, Listener, Mosquitto, device_folder, listening, until
from tests.tiny import tiny_bundle

LONG = bool(os.environ.get("EDGE_INSPECTOR_LONG"))
AWAY_S = 12.0 if LONG else 3.0
ROUNDS = 5 if LONG else 1
PERIOD_S, TIMEOUT_S = 0.02, 0.5
LOOK_S = 0.5
"""How often the daemon looks around."""
BUSY_S = 0.3
"""For processes to get their turn on a busy machine."""
TOLD_S = 2 * PERIOD_S + TIMEOUT_S + LOOK_S + BUSY_S
BACK_S = 3.0
STARTS_S = 1.0
"""Of these, for a camera's process to start and for its first picture."""
UNJUDGED = 5
"""Parts in a row that cannot be judged are a failure."""
LINE = """\
schema: ei.line.v1
version: 1
stations:
  press:
    trigger: software
    expires_ms: 800
    product: tiny
    products: {{tiny: whole}}
    cameras: {{top: {{uri: "{uri}", timeout_ms: 500, latency_ms: 20, guards: {{dark_below: 10, frozen_frames: 0}}}}}}
recipes:
  whole: {{cameras: {{top: {{rois: {{all: {{bundle: tiny, threshold: 1000}}}}}}}}}}
"""


@pytest.fixture
def camera(tmp_path: Path) -> Iterator[Http]:
    found = Http(tmp_path)
    found.start()
    yield found
    found.stop()


def made(folder: Path, port: int, uri: str) -> Path:
    """A device with the tiny bundle; whatever it judges passes."""
    tiny_bundle(folder / "made")
    device = device_folder(folder / "device", port, LINE.format(uri=uri)) / "device.yaml"
    kept = device.read_text().splitlines()[:3]
    sources = "sources: {hosts: [127.0.0.1]}\n"
    device.write_text("\n".join([*kept, f"trust: {folder / 'made' / 'trust'}", f"bundles: {folder / 'made'}", sources]))
    return device.parent


class Parts:
    """They come by, one after the other."""

    def __init__(self, listener: Listener) -> None:
        self.listener, self._number = listener, count()

    def judged(self) -> dict[str, Any]:
        """The record of the next one."""
        name = f"T-{next(self._number)}"
        self.listener.say({"trigger_id": name}, "trigger", "press")

        def found() -> dict[str, Any] | None:
            return next((r for r in self.listener.of("result", "press") if r["trigger_id"] == name), None)

        return until(found, what=f"record of {name}")  # type: ignore[no-any-return]

    def until_passing(self) -> float:
        """How long until one passes."""
        began = time.monotonic()
        while self.judged()["verdict"] != "pass":
            assert time.monotonic() - began < 30, self.listener.of("health")[-1]
        return time.monotonic() - began


def failure(listener: Listener, code: str) -> bool:
    """Whether health says now that something failed, and what."""
    told = (listener.of("health") or [{"status": "", "reasons": []}])[-1]
    return told["status"] == "failure" and code in {reason["code"] for reason in told["reasons"]}


def is_ready(listener: Listener) -> bool:
    return bool(listener.of("ready", "press") and listener.of("ready", "press")[-1]["ready"])


def lost(camera: Http, fault: str, parts: Parts) -> tuple[float, float]:
    """A camera is away for a while: after which time that was told, after which it was back."""
    listener = parts.listener
    camera.do(fault)
    began = time.monotonic()
    until(partial(failure, listener, "camera_fault"), what="failure")
    told_s = time.monotonic() - began
    until(lambda: "camera top" in listener.of("ready", "press")[-1]["reason"], what="not ready")
    assert not is_ready(listener)
    during = [parts.judged() for _ in range(2)]
    assert {(part["verdict"], part["reason"]) for part in during} == {("undecided", "missing_image")}
    time.sleep(max(0.0, began + AWAY_S - time.monotonic()))
    camera.mend()
    back_s = parts.until_passing()
    until(lambda: is_ready(listener) and not failure(listener, "camera_fault"), what="ready, and no failure")
    return told_s, back_s


def test_a_lost_camera_is_told_in_time_passes_nothing_and_is_back_in_time(
    tmp_path: Path, mosquitto: Mosquitto, camera: Http
) -> None:
    folder = made(tmp_path, mosquitto.port, camera.uri)
    with listening(mosquitto.port) as listener, DaemonProcess(folder):
        parts = Parts(listener)
        until(lambda: is_ready(listener), what="ready")
        parts.until_passing()
        for fault in ("hang", "unplug") * ROUNDS:
            told_s, back_s = lost(camera, fault, parts)
            print(f"\n{fault}: told after {told_s:.2f} s of {TOLD_S:.2f}, back after {back_s:.2f} s of {BACK_S}")
            assert told_s <= TOLD_S
            assert back_s <= BACK_S


def test_pictures_that_must_not_be_judged_are_a_failure_after_five_parts_and_none_passes(
    tmp_path: Path, mosquitto: Mosquitto, camera: Http
) -> None:
    folder = made(tmp_path, mosquitto.port, camera.uri)
    with listening(mosquitto.port) as listener, DaemonProcess(folder):
        parts = Parts(listener)
        until(lambda: is_ready(listener), what="ready")
        parts.until_passing()
        for fault, reason in (("dark", "dark_image"), ("resize", "wrong_format")) * ROUNDS:
            camera.do(fault)
            time.sleep(TIMEOUT_S)  # pictures that are on their way
            during = [parts.judged() for _ in range(UNJUDGED)]
            began = time.monotonic()
            until(partial(failure, listener, "nothing_judged"), what="failure")
            told_s = time.monotonic() - began
            assert {(part["verdict"], part["reason"]) for part in during} == {("undecided", reason)}
            camera.mend()
            back_s = parts.until_passing()
            until(lambda: not failure(listener, "nothing_judged"), what="no failure any more")
            print(f"\n{fault}: told {told_s:.2f} s after {UNJUDGED} parts, back after {back_s:.2f} s of {BACK_S}")
            assert told_s <= LOOK_S + BUSY_S
            assert back_s <= BACK_S


def test_a_lost_camera_is_tried_less_and_less_often_but_often_enough_and_not_in_step_with_others(tmp_path: Path) -> None:
    cameras, tries, in_step_s = 12, 6, 0.1
    config = CameraConfig(uri=f"dir://{tmp_path}/nowhere")  # fails at once: what passes between two tries is the wait
    tried: list[list[float]] = [[] for _ in range(cameras)]

    def opened(times: list[float]) -> Source:
        times.append(time.monotonic())
        return open_source(config, typed(tmp_path))

    with ExitStack() as stack:
        for number, times in enumerate(tried):
            stack.enter_context(Camera(f"camera-{number}", config, partial(opened, times)))
        until(lambda: all(len(times) >= tries for times in tried), what="tries")
    waits = np.diff([times[:tries] for times in tried], axis=1)
    assert (waits[:, :3].min(axis=0) >= (0.15, 0.3, 0.6)).all(), "each wait is longer than the one before"
    assert waits.max() <= BACK_S - STARTS_S
    assert np.ptp(waits.sum(axis=1)) > in_step_s, "without chance they would come within milliseconds"
