"""Cameras measured on this machine: python -m tests.benchmarks.cameras [--rigs aravis v4l2 ...] [--seconds 6] [--faults hang ...] | --four

For each stack: frames a second against the rate that was set, CPU for each frame (all processes of ours), from capture to our hands,
and how long it takes to notice and to recover from hang, kill and freeze. --four: four 720p cameras (pylon's emulation) in one
daemon with the shipped bundle. One line of JSON each. Nothing here asserts: machines are noisy.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from edge_inspector.cameras import Camera, CameraState, open_source
from edge_inspector.config import CameraConfig
from edge_inspector.door import typed
from tests.faults.rigs import RIGS, Rig, Rtsp
from tests.line import DaemonProcess, Mosquitto, collected, device_folder, subscribing, until

STATIONS = """\
schema: ei.line.v1
version: 1
stations:
{stations}
recipes:
  whole: {{cameras: {{top: {{rois: {{all: {{bundle: paper, rectangle: {{x_px: 576, y_px: 296, w_px: 128, h_px: 128}}}}}}}}}}}}
"""
STATION = """\
  s{n}: {{trigger: free, product: paper, products: {{paper: whole}}, cameras: {{top: {{uri: "pylon://0815-000{n}", width: 1280,
    height: 720, pixel_format: Mono8, features: {{AcquisitionFrameRateEnable: true, AcquisitionFrameRateAbs: {fps}}}}}}}}}
"""


def cpu_s() -> float:
    """Of this process and its children, the camera's own among them."""
    own = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (own, *own.children(recursive=True)))


def flow(rig: Rig, seconds: float) -> dict[str, Any]:
    """Frames as they come."""
    config = CameraConfig.model_validate({"uri": rig.uri, "timeout_ms": 1000, **rig.settings})
    triggered = "trigger=" in rig.uri
    with Camera("top", config, partial(open_source, config, typed(Path("/"))), on_demand=triggered) as camera:
        until(lambda: camera.state is CameraState.STREAMING, 30, "streaming")
        ages, shown = [], []
        began, busy = time.monotonic(), cpu_s()
        while (now := time.monotonic()) - began < seconds:
            if triggered:
                camera.trigger()
            frame = camera.next(1.0)
            if frame is not None:
                ages.append(time.monotonic() - (now if triggered else frame.captured_s))
                if isinstance(rig, Rtsp):
                    shown.append(time.monotonic() - rig.told_ms(frame.image) / 1000)
        took, busy = time.monotonic() - began, cpu_s() - busy
        rate = camera.info.fps if camera.info else None
    found = {
        "rate_set": rate, "frames_per_s": len(ages) / took, "cpu_ms_per_frame": busy / len(ages) * 1e3,
        "lost": camera.counts.lost, ("trigger" if triggered else "capture") + "_to_frame_ms": percentiles(ages),
    }  # fmt: skip
    return found | ({"scene_to_frame_ms": percentiles(shown)} if shown else {})


def percentiles(seconds: list[float]) -> list[float]:
    """Median and 99th, ms."""
    return [round(float(p) * 1e3, 2) for p in np.percentile(seconds, (50, 99))]


def trouble(rig: Rig, fault: str) -> dict[str, float]:
    """Seconds until it is noticed, and from its end until a good frame."""
    guards = {"dark_below": 10, "frozen_frames": 5}
    config = CameraConfig.model_validate({"uri": rig.uri, "timeout_ms": 500, "guards": guards, **rig.settings})
    with Camera("top", config, partial(open_source, config, typed(Path("/"))), on_demand="trigger=" in rig.uri) as camera:

        def good() -> bool:
            if camera.on_demand:
                camera.trigger()
            frame = camera.next(0.3)
            return frame is not None and not frame.fault

        def noticed() -> bool:
            if camera.on_demand:
                camera.trigger()
            frame = camera.next(0.1)
            return camera.state is CameraState.FAULT or bool(frame and frame.fault)

        until(good, 30, "frames")
        rig.do(fault)
        began = time.monotonic()
        until(noticed, 30, fault)
        noticed_s = time.monotonic() - began
        time.sleep(2.0)
        rig.mend()
        began = time.monotonic()
        until(good, 30, "frames again")
        return {"noticed_s": round(noticed_s, 2), "recovered_s": round(time.monotonic() - began, 2)}


def four(fps: float, count: int) -> dict[str, Any]:
    """Four 720p cameras at once, the inspection running."""
    with tempfile.TemporaryDirectory() as folder:
        broker = Mosquitto(Path(folder) / "mosquitto").start()
        line = STATIONS.format(stations="".join(STATION.format(n=n, fps=fps) for n in range(4)))
        device = device_folder(Path(folder) / "device", broker.port, line)
        try:
            with subscribing(broker.port) as subscriber, DaemonProcess(device, {"PYLON_CAMEMU": "4"}) as daemon:
                assert daemon.process is not None
                collected(subscriber, min(40, count), 60)
                process = psutil.Process(daemon.process.pid)
                tree = (process, *process.children(recursive=True))
                busy, began = sum(sum(p.cpu_times()[:2]) for p in tree), time.monotonic()
                results = collected(subscriber, count, 300)
                took, busy = time.monotonic() - began, sum(sum(p.cpu_times()[:2]) for p in tree) - busy
        finally:
            broker.stop()
    reasons = [result.reason.value for result in results]
    return {
        "cameras": 4, "rate_set": fps, "parts_per_s": len(results) / took, "cpu_share_of_one_core": busy / took,
        "overload": reasons.count("overload"), "late": reasons.count("late"),
        "total_ms": percentiles([result.times_ms.total / 1e3 for result in results]),
    }  # fmt: skip


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rigs", nargs="+", choices=RIGS, default=list(RIGS))
    parser.add_argument("--seconds", type=float, default=6.0)
    faults = ("hang", "unplug", "freeze")
    parser.add_argument("--faults", nargs="*", choices=faults, default=list(faults))
    parser.add_argument("--four", action="store_true")
    parser.add_argument("--parts", type=int, default=200, help="of the four together")
    parser.add_argument("--fps", type=float, default=2.0, help="of each of the four")
    given = parser.parse_args()
    if given.four:
        print(json.dumps(four(given.fps, given.parts)), flush=True)
        return
    for name in given.rigs:
        with tempfile.TemporaryDirectory() as folder:
            rig = RIGS[name](Path(folder))
            rig.start()
            os.environ.update(rig.environment)
            try:
                found = {"rig": name, "load": round(os.getloadavg()[0], 1), **flow(rig, given.seconds)}
                print(json.dumps(found), flush=True)
                for fault in sorted(rig.shows & set(given.faults)):
                    print(json.dumps({"rig": name, "fault": fault, **trouble(rig, fault)}), flush=True)
            finally:
                rig.mend()
                rig.stop()
                for key in rig.environment:
                    os.environ.pop(key, None)


if __name__ == "__main__":
    main()
