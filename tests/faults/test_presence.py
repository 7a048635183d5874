"""Whether others know that a device is there: when it dies, when the network swallows it, when it comes back at once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from edge_inspector.mqtt import WILL_DELAY_S
from tests.faults.proxy import Proxy
from tests.line import DaemonProcess, Listener, Mosquitto, device_folder, line_yaml, listening, until

KEEPALIVE_S = 2
"""A broker gives up a client after one and a half of it (MQTT 5, 3.1.2.10)."""
KNOWN_S = 1.5 * KEEPALIVE_S + WILL_DELAY_S
BROKER_LOOKS_S = 7
"""Mosquitto 2.0 looks for clients that are overdue every 6 s, and counts in whole seconds."""
WILL_LATE_S = 3
"""After the will's time; it comes up to a second late."""
STARTS = 4
"""Tries at a start quicker than the delay: a busy machine may need longer."""


def made(folder: Path, port: int) -> Path:
    """A device that the broker hears of often."""
    device = device_folder(folder / "device", port, line_yaml()) / "device.yaml"
    device.write_text(device.read_text().replace("keepalive_s: 5", f"keepalive_s: {KEEPALIVE_S}"))
    return device.parent


def told(listener: Listener) -> list[dict[str, Any]]:
    """What was heard on `state` so far."""
    return listener.of("state")


def until_online(listener: Listener, known: int = 0) -> None:
    """Until more is known than so many messages, and the last one says online."""
    until(lambda: len(told(listener)) > known and told(listener)[-1]["online"], 20, "online")


def until_offline(listener: Listener) -> float:
    """How long it takes from now on."""
    began = time.monotonic()
    until(lambda: not told(listener)[-1]["online"], KNOWN_S + 2 * BROKER_LOOKS_S, "offline")
    return time.monotonic() - began


def test_a_killed_device_is_offline_when_its_time_to_come_back_is_over(tmp_path: Path, mosquitto: Mosquitto) -> None:
    folder = made(tmp_path, mosquitto.port)
    with listening(mosquitto.port) as listener, DaemonProcess(folder) as daemon:
        until_online(listener)
        until(lambda: listener.of("ready", "sheet")[-1:] and listener.of("ready", "sheet")[-1]["ready"], 20, "ready")
        daemon.kill()
        took_s = until_offline(listener)
        until(lambda: not listener.of("ready", "sheet")[-1]["ready"], 2, "not ready: the one station's will")
        assert listener.of("ready", "sheet")[-1]["reason"] == "the device is gone"
    print(f"\nkilled: offline after {took_s:.1f} s, {KNOWN_S} s at most")
    assert took_s <= KNOWN_S


def test_a_device_that_the_network_swallows_is_offline_in_time_and_online_again(tmp_path: Path, mosquitto: Mosquitto) -> None:
    with Proxy(mosquitto.port) as proxy, listening(mosquitto.port) as listener:
        folder = made(tmp_path, proxy.port)
        with DaemonProcess(folder) as daemon:
            until_online(listener)
            proxy.swallow()
            took_s = until_offline(listener)
            known, connections = len(told(listener)), proxy.connections
            assert connections > 1, "the device noticed too: it tried again"
            proxy.mend()
            began = time.monotonic()
            until_online(listener, known)
            print(f"\nswallowed: offline after {took_s:.1f} s, {KNOWN_S} s and a look of the broker at most; "
                  f"online {time.monotonic() - began:.1f} s after")  # fmt: skip
            assert daemon.process is not None
            assert daemon.process.poll() is None
            listener.say({"trigger_id": "after"}, "trigger", "sheet")
            until(lambda: listener.of("result", "sheet"), what="a part after it")
    assert took_s <= KNOWN_S + BROKER_LOOKS_S


def test_a_device_that_starts_again_at_once_was_never_offline(tmp_path: Path, mosquitto: Mosquitto) -> None:
    folder = made(tmp_path, mosquitto.port)
    with listening(mosquitto.port) as listener, DaemonProcess(folder) as daemon:
        until_online(listener)
        for _ in range(STARTS):
            known = len(told(listener))
            daemon.kill()
            killed_s = time.monotonic()
            daemon.start()
            until(lambda n=known: any(state["online"] for state in told(listener)[n:]), 20, "online")  # type: ignore[misc]
            away_s = time.monotonic() - killed_s
            if away_s < WILL_DELAY_S:
                break
        assert away_s < WILL_DELAY_S, "no start was quick enough to try it"
        time.sleep(killed_s + WILL_DELAY_S + WILL_LATE_S - time.monotonic())
        print(f"\nrestarted: away for {away_s:.1f} s, {WILL_DELAY_S} s are given")
        assert [state["online"] for state in told(listener)[known:]] == [True] * (len(told(listener)) - known)
