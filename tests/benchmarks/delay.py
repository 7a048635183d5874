"""How long a verdict takes over a network, with and without TCP_NODELAY, in one run: a veth pair between two namespaces.

python -m tests.benchmarks.delay [PARTS]        (as root; Mosquitto on one side, a device's two connections on the other)
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np

from edge_inspector.broker import Broker
from edge_inspector.config import BrokerConfig
from edge_inspector.handshake import Handshake
from edge_inspector.mqtt import Connection, Message, connection
from edge_inspector.outbox import Outbox
from tests.line import MOSQUITTO, TOPICS, until
from tests.test_brokers import Station, made

BROKER, DEVICE, PORT = "10.213.0.1", "10.213.0.2", 1883
EVERY_S = 0.05


class Recording(Station):
    """Tells its verdict and stores its result, as a station does."""

    def __init__(self, outbox: Outbox) -> None:
        super().__init__()
        self.outbox, self.number = outbox, 0

    def offer(self, trigger: object) -> None:
        super().offer(trigger)  # type: ignore[arg-type]
        self.number += 1
        self.outbox.submit(made(self.number))


def device(folder: Path, *, delayed: bool) -> None:
    """The device's side, until it is killed."""
    if delayed:
        connection._without_delay = lambda *_: None
    config = BrokerConfig(host=BROKER, port=PORT)
    with ExitStack() as stack:
        outbox = stack.enter_context(Outbox(folder, ["sheet"]))
        station = Recording(outbox)
        main = stack.enter_context(Connection(config, "edge", subscriptions=Broker.subscriptions(TOPICS)))
        heard = stack.enter_context(Connection(config, "edge.handshake", subscriptions=Handshake.subscriptions(TOPICS)))
        broker = stack.enter_context(Broker(main, TOPICS, outbox, {"sheet": station}))
        handshake = Handshake(heard, TOPICS, outbox, {"sheet": station}, broker.refuse)
        station.handshake = stack.enter_context(handshake)
        time.sleep(3600)


def measured(parts: int) -> list[float]:
    """Trigger to verdict, in ms."""
    took = []
    config = BrokerConfig(host=BROKER, port=PORT)
    with Connection(config, "plc", subscriptions=[TOPICS.of("verdict", "+")], durable=False) as plc:
        until(plc.connected.is_set, what="connection")
        for number in range(parts + 10):
            name, began_s = f"{time.time()}-{number}", time.monotonic()
            plc.publish(TOPICS.of("trigger", "sheet"), json.dumps({"trigger_id": name}).encode())
            while True:
                event = plc.events.get(timeout=10)
                if isinstance(event, Message):
                    plc.acknowledge(event.ack)
                    if json.loads(event.payload)["trigger_id"] == name:
                        break
            if number >= 10:
                took.append((time.monotonic() - began_s) * 1e3)
            with suppress(queue.Empty):
                plc.events.get(timeout=EVERY_S)
    return took


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def inside(name: str, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["ip", "netns", "exec", name, *words], stderr=subprocess.DEVNULL)


def program(*words: str) -> list[str]:
    return [sys.executable, "-m", "tests.benchmarks.delay", *words]


def compare(parts: int, folder: Path) -> None:
    for broker_delays in (False, True):
        conf = folder / f"{broker_delays}.conf"
        conf.write_text(
            f"user root\nlistener {PORT} {BROKER}\nallow_anonymous true\nset_tcp_nodelay {str(not broker_delays).lower()}\n"
        )
        broker = inside("ei-broker", str(MOSQUITTO), "-c", str(conf))
        try:
            for delayed in (True, False):
                side = inside("ei-device", *program("device", str(folder / f"{broker_delays}-{delayed}"), str(int(delayed))))
                try:
                    time.sleep(3.0)
                    asked = program("measure", str(parts))
                    told = subprocess.run(["ip", "netns", "exec", "ei-broker", *asked], check=True, capture_output=True)
                    took = json.loads(told.stdout)
                    print(f"device {'without' if delayed else 'with   '} TCP_NODELAY, Mosquitto {'without' if broker_delays else 'with   '}: "
                          f"median {np.median(took):.1f} ms, p99 {np.percentile(took, 99):.1f} ms ({len(took)} parts)", flush=True)  # fmt: skip
                finally:
                    side.kill()
                    side.wait()
        finally:
            broker.kill()
            broker.wait()


def main(parts: int) -> None:
    try:
        for name in ("ei-broker", "ei-device"):
            ip("netns", "add", name)
        ip("link", "add", "ei-b", "netns", "ei-broker", "type", "veth", "peer", "name", "ei-d", "netns", "ei-device")
        for name, link, address in (("ei-broker", "ei-b", BROKER), ("ei-device", "ei-d", DEVICE)):
            ip("-n", name, "address", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
        with tempfile.TemporaryDirectory() as folder:
            compare(parts, Path(folder))
    finally:
        for name in ("ei-broker", "ei-device"):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["device"]:
        device(Path(sys.argv[2]), delayed=sys.argv[3] == "1")
    elif sys.argv[1:2] == ["measure"]:
        print(json.dumps(measured(int(sys.argv[2]))))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
