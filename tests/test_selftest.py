"""Samples judged again while a station runs: on command, on schedule; what fails them judges no part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge_inspector import pictures
from edge_inspector.config import SelfTestConfig
from edge_inspector.runtime import Engine, OnnxEngine
from edge_inspector.selftest import SelfTest
from tests.line import DaemonProcess, Listener, Mosquitto, device_folder, line_yaml, listening, until
from tests.tiny import picture, tiny_bundle

LINE = line_yaml("synthetic://?seed=1&fps=10", bundle="tiny")


def device(tmp_path: Path, port: int, self_test: str = "") -> tuple[Path, Path]:
    """A device that judges with a tiny bundle, and the bundle's sample of a good part."""
    folder = device_folder(
        tmp_path / "device", port, LINE.replace("    product:", f"    self_test: {{{self_test}}}\n    product:")
    )
    tiny_bundle(folder / "bundles")
    text = (folder / "device.yaml").read_text().splitlines()
    kept = [line for line in text if not line.startswith(("trust:", "bundles:"))]
    (folder / "device.yaml").write_text("\n".join([*kept, "trust: bundles/trust", "bundles: bundles", ""]))
    return folder, folder / "bundles" / "tiny" / "sample-140.png"


def ask(listener: Listener, station: str = "sheet") -> dict[str, Any]:
    number = len(listener.of("reply", "hmi")) + 1
    listener.say({"request_id": f"{number}", "client": "hmi", "station": station}, "command", "self-test")
    until(lambda: len(listener.of("reply", "hmi")) == number, what="reply")
    return listener.of("reply", "hmi")[-1]


def states(listener: Listener) -> list[str]:
    return [told["state"] for told in listener.of("ready", "sheet")]


def test_a_station_whose_samples_fail_judges_nothing_until_they_are_right_again(tmp_path: Path, mosquitto: Mosquitto) -> None:
    folder, sample = device(tmp_path, mosquitto.port)
    with listening(mosquitto.port) as listener, DaemonProcess(folder):
        first = until(lambda: [r for r in listener.of("ready", "sheet") if r["ready"]], what="ready")[0]["tested_at"]
        assert ask(listener)["ok"]
        until(lambda: listener.of("ready", "sheet")[-1]["tested_at"] > first, what="a test by command")
        right = sample.read_bytes()
        pictures.write(sample, picture(230))
        assert ask(listener)["ok"]
        until(lambda: states(listener)[-1] == "error", what="an error")
        assert "sample-140.png: " in listener.of("ready", "sheet")[-1]["reason"]
        until(
            lambda: any(c["code"] == "self_test_failed" for told in listener.of("health") for c in told["reasons"]),
            what="health",
        )
        listener.say({"trigger_id": "T-1"}, "trigger", "sheet")
        undecided = until(lambda: listener.of("result", "sheet"), what="a result")[-1]
        assert (undecided["verdict"], undecided["reason"]) == ("undecided", "not_ready")
        sample.write_bytes(right)
        ask(listener)
        until(lambda: states(listener)[-1] == "ready", what="ready again")
        listener.say({"trigger_id": "T-2"}, "trigger", "sheet")
        until(lambda: any(r["verdict"] != "undecided" for r in listener.of("result", "sheet")), what="a judged part")
        assert not ask(listener, "nowhere")["ok"]


def test_networks_that_failed_stay_in_doubt_whoever_opens_them_again_and_parts_wait_for_one_sample_at_most(
    tmp_path: Path,
) -> None:
    bundle = tiny_bundle(tmp_path)
    bundle.let_go()
    sample = bundle.folder / "sample-140.png"
    with OnnxEngine(bundle, batch=1) as engine:
        engines: dict[str, Engine] = {"tiny": engine}
        test = SelfTest("sheet", SelfTestConfig())
        assert not test.step(engines), "not due before the networks are open"
        test.begin()
        assert (test.at is not None, test.blocks, test.step(engines)) == (True, False, False)
        right = sample.read_bytes()
        pictures.write(sample, picture(230))
        test.order()
        assert test.step(engines)
        assert "sample-140.png: " in test.fault
        test.begin()  # other inspectors, or a reload: the same networks may be in them
        assert test.blocks
        sample.write_bytes(right)
        assert [test.step(engines), test.step(engines), test.step(engines)] == [False, True, False], "one sample each"
        assert not test.blocks
        test.order()
        assert not test.step(engines)
        test.begin()
        assert [test.step(engines), test.step(engines)] == [False, True], "what was interrupted begins anew"
    assert SelfTest("sheet", SelfTestConfig(required=False)).blocks is False


@pytest.mark.parametrize("required", [True, False])
def test_on_schedule_it_is_repeated_by_itself_and_not_required_it_is_told_only(
    tmp_path: Path, mosquitto: Mosquitto, required: bool
) -> None:
    folder, sample = device(tmp_path, mosquitto.port, f"every_h: 0.001, required: {json.dumps(required)}")
    with listening(mosquitto.port) as listener, DaemonProcess(folder):
        first = until(lambda: [r for r in listener.of("ready", "sheet") if r["ready"]], what="ready")[0]["tested_at"]
        until(lambda: listener.of("ready", "sheet")[-1]["tested_at"] > first, what="a test after 3.6 s")
        pictures.write(sample, picture(230))
        until(
            lambda: any(c["code"] == "self_test_failed" for told in listener.of("health") for c in told["reasons"]),
            what="health",
        )
        assert states(listener)[-1] == ("error" if required else "ready")
