"""What people ordered of a station holds through reloads, remote changes and kill -9, and no part is judged against it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edge_inspector import pictures
from edge_inspector.errors import InspectorError
from edge_inspector.schema import read_yaml
from edge_inspector.standing import MOST, Orders, Standing
from tests.line import DaemonProcess, Listener, Mosquitto, device_folder, listening, until
from tests.tiny import picture, tiny_bundle

SELECTED, HALTED = ("s0", "s1", "s2", "s3"), ("s4", "s5", "s6", "s7")
STATION = """\
  {name}:
    trigger: free
    expires_ms: 5000
    product: lax
    products: {products}
    cameras: {{top: {{uri: "synthetic://?fps={fps}&width=32&height=32&seed=1"}}}}
"""
BOTH = "{lax: lax, strict: strict}"
RECIPES = """\
recipes:
  lax: {cameras: {top: {rois: {all: {bundle: tiny, threshold: 100}}}}}
  strict: {cameras: {top: {rois: {all: {bundle: tiny, threshold: 0.0001}}}}}
"""


def line(version: int, names: tuple[str, ...], products: str = BOTH, fps: int = 50) -> str:
    stations = "".join(STATION.format(name=name, products=products, fps=fps) for name in names)
    return f"schema: ei.line.v1\nversion: {version}\nstations:\n{stations}{RECIPES}"


def device(folder: Path, port: int, text: str) -> Path:
    """A device that judges with a tiny bundle of its own, and takes orders of whoever the broker lets publish."""
    made = device_folder(folder / "device", port, text, extra="remote: {require_signature: false}\n")
    tiny_bundle(made / "bundles")
    rows = [row for row in (made / "device.yaml").read_text().splitlines() if not row.startswith(("trust:", "bundles:"))]
    (made / "device.yaml").write_text("\n".join([*rows, "trust: bundles/trust", "bundles: bundles", ""]))
    return made


def order(listener: Listener, name: str, station: str, **more: str) -> dict[str, Any]:
    """Command something of a station; returns the answer."""
    number = len(listener.of("reply", "hmi")) + 1
    listener.say({"request_id": f"{number}", "client": "hmi", "station": station, **more}, "command", name)
    until(lambda: len(listener.of("reply", "hmi")) == number, what=f"an answer to {name}")
    return listener.of("reply", "hmi")[-1]


def told(listener: Listener, station: str) -> dict[str, Any]:
    return (listener.of("ready", station) or [{"state": "", "ready": None, "product": "", "reason": ""}])[-1]


def against_orders(listener: Listener) -> list[tuple[str, str, str]]:
    """Parts that were judged, and readiness that was told, although people ordered otherwise."""
    results = [r for name in (*SELECTED, *HALTED) for r in listener.of("result", name) if r["verdict"] != "undecided"]
    results = [r for r in results if r["configuration"]["version"] > 1]  # those from before are still on their way
    wrong = [(r["station"], r["product"], r["verdict"]) for r in results if r["station"] in HALTED or r["product"] != "strict"]
    readies = [r for name in (*SELECTED, *HALTED) for r in listener.of("ready", name) if r["ready"]]
    return wrong + [
        (r["station"], r["product"], "ready") for r in readies if r["station"] in HALTED or r["product"] != "strict"
    ]


def test_reloads_and_remote_changes_under_load_judge_no_part_against_what_was_ordered(
    tmp_path: Path, mosquitto: Mosquitto
) -> None:
    names = (*SELECTED, *HALTED)
    folder = device(tmp_path, mosquitto.port, line(1, names))
    with listening(mosquitto.port) as listener, DaemonProcess(folder) as daemon:
        assert daemon.process is not None
        until(lambda: all(told(listener, name)["ready"] for name in names), 60, "all ready")
        for name in SELECTED:
            assert order(listener, "select-product", name, product="strict")["ok"]
        for name in HALTED:
            assert order(listener, "halt", name)["ok"]
        until(lambda: all(told(listener, name)["state"] == "halted" for name in HALTED), 20, "halted")
        time.sleep(1.0)  # parts that were at hand
        listener.pump()
        listener.heard.clear()
        for version in (2, 3, 4):
            text = line(version, names, fps=50 + version)  # other cameras: the line is made anew
            if version == 4:
                listener.say({"by": "anna", "line": read_yaml(text.encode(), "x")}, "config", "desired", retain=True)
            else:
                (folder / "line.yaml").write_text(text)
                daemon.process.send_signal(signal.SIGHUP)

            def judged(version: int = version) -> bool:
                found = [r for name in SELECTED for r in listener.of("result", name) if r.get("configuration")]
                return {r["station"] for r in found if r["configuration"]["version"] == version} == set(SELECTED)

            until(judged, 60, f"parts judged under version {version}")
        assert against_orders(listener) == []
        assert {told(listener, name)["state"] for name in HALTED} == {"halted"}
        assert len([r for name in SELECTED for r in listener.of("result", name)]) > 50, "it was under load"


def judged_by(listener: Listener, session: str) -> list[dict[str, Any]]:
    """Parts that were judged in one session of the daemon; older ones are sent again after a kill."""
    return [r for r in listener.of("result", "s0") if session in r["trigger_id"] and r["verdict"] != "undecided"]


@contextmanager
def restarted(daemon: DaemonProcess, listener: Listener, station: str) -> Iterator[dict[str, Any]]:
    """The daemon after kill -9, once it has said for a while how the station stands."""
    daemon.kill()
    listener.pump()
    listener.heard.clear()
    daemon.start()
    until(lambda: told(listener, station)["state"] not in ("", "preoperational"), 30, "a station that has started")
    time.sleep(0.5)
    yield told(listener, station)


def test_after_kill_9_product_halt_and_doubt_are_what_they_were(tmp_path: Path, mosquitto: Mosquitto) -> None:
    folder = device(tmp_path, mosquitto.port, line(1, ("s0",)))
    sample = folder / "bundles" / "tiny" / "sample-140.png"
    with listening(mosquitto.port) as listener, DaemonProcess(folder) as daemon:
        until(lambda: told(listener, "s0")["ready"], 30, "ready")
        assert order(listener, "select-product", "s0", product="strict")["ok"]
        with restarted(daemon, listener, "s0") as ready:
            assert (ready["ready"], ready["product"], ready["product_ordered"]) == (True, "strict", True)
        assert order(listener, "halt", "s0")["ok"]
        with restarted(daemon, listener, "s0") as ready:
            assert (ready["ready"], ready["state"], ready["product"]) == (False, "halted", "strict")
            assert not judged_by(listener, ready["session"])
        (folder / "line.yaml").write_text(line(2, ("s0",), "{lax: lax}"))
        assert order(listener, "start", "s0")["ok"]
        with restarted(daemon, listener, "s0") as ready:
            assert (ready["ready"], ready["state"], ready["product"]) == (False, "error", "strict")
            assert "product strict was selected, and the configuration has no such product" in ready["reason"]
            reasons = until(lambda: listener.of("health") and listener.of("health")[-1]["reasons"], what="health")
            assert "not_ready" in {reason["code"] for reason in reasons}
            assert not judged_by(listener, ready["session"])
            assert order(listener, "select-product", "s0", product="lax")["ok"]
            until(lambda: told(listener, "s0")["ready"], what="ready, since it was ordered anew")
        right = sample.read_bytes()
        pictures.write(sample, picture(230))
        assert order(listener, "self-test", "s0")["ok"]
        until(lambda: told(listener, "s0")["state"] == "error", what="a failed self-test")
        kept = until(
            lambda: json.loads((folder / "state" / "orders.json").read_text())["stations"]["s0"]["doubt"], what="doubt"
        )
        assert "sample-140.png" in kept
        sample.write_bytes(right)
        with restarted(daemon, listener, "s0"):
            first = next(r for r in listener.of("ready", "s0") if r["ready"])
            assert first["tested_at"] is not None, "nothing is ready before its samples are judged again"
        until(lambda: told(listener, "s0")["ready"], what="ready, since its samples are right again")


def test_orders_that_cannot_be_read_are_not_guessed(tmp_path: Path) -> None:
    path = tmp_path / "orders.json"
    Orders(path, ["a", "b"]).change("a", product="fine")
    path.write_bytes(path.read_bytes()[:-20])
    orders = Orders(path, ["a", "b"])
    assert all(orders.of(name).halted and "orders.json cannot be read" in orders.of(name).lost for name in "ab")
    orders.change("a", product="fine", lost="")
    again = Orders(path, ["a", "b"])
    assert (again.of("a").lost, again.of("a").halted, bool(again.of("b").lost)) == ("", True, True)


def test_what_cannot_be_written_is_refused_but_a_halt_holds_all_the_same(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        folder = Path("/proc/self")  # where not even root writes
    else:
        folder = tmp_path / "read-only"
        folder.mkdir(mode=0o500)
    orders = Orders(folder / "orders.json", ["a"])
    with pytest.raises(InspectorError, match="cannot be kept, nothing was changed"):
        orders.change("a", product="fine")
    with pytest.raises(InspectorError, match="cannot be kept, it holds until the next restart"):
        orders.insist("a", halted=True)
    assert orders.of("a") == Standing(halted=True)
    assert [cause.code for cause in orders.causes()] == ["orders_not_kept"]
    orders.path = tmp_path / "orders.json"
    orders.retry()
    assert (orders.causes(), Orders(orders.path, ["a"]).of("a").halted) == ([], True)


def test_orders_of_stations_that_are_gone_are_kept_within_bounds(tmp_path: Path) -> None:
    path = tmp_path / "orders.json"
    old = {f"s{number}": {"product": "fine"} for number in range(MOST + 10)}
    path.write_text(json.dumps({"schema": "ei.orders.v1", "stations": old}))
    orders = Orders(path, ["now", "s3"])
    orders.change("now", halted=True)
    kept = json.loads(path.read_text())["stations"]
    assert len(kept) == MOST
    assert (f"s{MOST + 9}" in kept, "s3" in kept, "now" in kept, "s4" in kept) == (True, True, True, False)
    orders.use(["s200"])
    assert orders.of("s200") == Standing(product="fine"), "a configuration that comes back finds what was ordered"
