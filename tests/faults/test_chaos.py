"""Everything that can be lost is killed, frozen, wiped or cut off, as drawn from a seed, while parts come at 60/s.

Short by default; EDGE_INSPECTOR_LONG=1 runs five seeds of a minute each (-s shows the figures).

What is held against the records: the daemon's own database once it is gone (all it accepted), the received file of a
subscriber in a process of its own, and what the line was told: each part that was passed, each trigger that a broker had.
A broker that is killed or wiped loses what it had acknowledged, and no device can help that: triggers are counted on only
from the last such fault on, the other faults go on after it.
"""

from __future__ import annotations

import contextlib
import os
import queue
import random
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from edge_inspector import messages
from edge_inspector.config import BrokerConfig
from edge_inspector.messages import Head, VerdictMessage
from edge_inspector.mqtt import Acknowledged, Connection, Event, Message
from edge_inspector.results import Verdict
from tests.faults.mes import Mes
from tests.faults.proxy import Proxy
from tests.faults.records import Records
from tests.line import MOSQUITTO, TOPICS, DaemonProcess, Mosquitto, needed, until
from tests.plant import Plant

LONG = bool(os.environ.get("EDGE_INSPECTOR_LONG"))
SEEDS = (1, 2, 3, 4, 5) if LONG else (1,)
RATE_HZ = 60.0
WINDOW = 100
"""Triggers that the line has sent and the broker not acknowledged."""
TWICE = 10
"""Each of so many triggers comes twice, as QoS 1 allows."""
QUIET_S = 2.0


class Controller:
    """The line's controller: sends each trigger until the broker has it, and remembers what it was told."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.sent = 0
        self.taken: dict[str, float] = {}
        """Trigger -> when it was first sent, of those that the broker acknowledged."""
        self.passed: set[str] = set()
        self.told: set[str] = set()
        self.head: Head | None = None
        self._begun_s: dict[str, float] = {}
        self._again: deque[str] = deque()
        self._waiting: dict[int, str] = {}
        self._standing: int | None = None
        self.stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Controller:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Send no new triggers, but those that no broker has."""
        self.stopping.set()
        self._thread.join(60.0)
        assert not self._thread.is_alive(), f"no broker took {len(self._waiting) + len(self._again)} triggers"

    def _run(self) -> None:
        began = time.monotonic()
        while not self.stopping.is_set() or self._waiting or self._again:
            self.listen(0.005)
            if self.connection.standing != self._standing:
                self._standing = self.connection.standing
                self._again.extend(self._waiting.values())
                self._waiting.clear()
            due = 0 if self.stopping.is_set() else int((time.monotonic() - began) * RATE_HZ)
            while self._standing is not None and len(self._waiting) < WINDOW and (self._again or self.sent < due):
                if not self._again:
                    self._again.extend([f"T-{self.sent}"] * (2 if self.sent % TWICE == 0 else 1))
                    self._begun_s[f"T-{self.sent}"] = time.monotonic()
                    self.sent += 1
                body = f'{{"trigger_id": "{self._again[0]}"}}'.encode()
                token = self.connection.publish(TOPICS.of("trigger", "press"), body)
                if token is None:
                    break
                self._waiting[token] = self._again.popleft()

    def listen(self, wait_s: float) -> None:
        """Take what the broker says."""
        with contextlib.suppress(queue.Empty):
            event = self.connection.events.get(timeout=wait_s)
            while True:
                self._take(event)
                event = self.connection.events.get_nowait()

    def _take(self, event: Event) -> None:
        if isinstance(event, Acknowledged) and event.token in self._waiting:
            trigger_id = self._waiting.pop(event.token)
            self.taken[trigger_id] = self._begun_s[trigger_id]
        elif isinstance(event, Message):
            self.connection.acknowledge(event.ack)
            if TOPICS.within(event.topic)[0] == "head":
                self.head = messages.decode(Head, event.payload, event.topic)
                return
            verdict = messages.decode(VerdictMessage, event.payload, event.topic)
            self.told.add(verdict.trigger_id)
            if verdict.verdict is Verdict.PASS:
                self.passed.add(verdict.trigger_id)

    def first_told_after(self, moment_s: float) -> bool:
        """Whether the line was told of a part that came after that moment: all of it works again."""
        return any(self._begun_s[trigger_id] > moment_s for trigger_id in set(self.told))


class Rig:
    """The whole line, and the faults that it may have."""

    def __init__(self, folder: Path, seed: int, stack: ExitStack) -> None:
        self.random = random.Random(seed)
        self.faults: Counter[str] = Counter()
        self.broker = Mosquitto(folder / "mosquitto").start()
        stack.callback(self.broker.stop)
        self.cables = [stack.enter_context(Proxy(self.broker.port)) for _ in range(2)]
        self.plant = Plant(folder / "plant", self.cables[0].port)
        self.mes = Mes(folder / "mes", self.cables[1].port).start()
        stack.callback(self.mes.kill)
        self.daemon = stack.enter_context(DaemonProcess(self.plant.device))
        config = BrokerConfig(host="127.0.0.1", port=self.broker.port)
        listened = [TOPICS.of(name, "press") for name in ("verdict", "head")]
        connection = stack.enter_context(Connection(config, "controller", subscriptions=listened))
        self.controller = stack.enter_context(Controller(connection))

    def _pause(self, least_s: float, most_s: float) -> None:
        time.sleep(self.random.uniform(least_s, most_s))

    def _kill_daemon(self) -> None:
        self.daemon.kill()
        self.daemon.start()

    def _kill_subscriber(self) -> None:
        self.mes.kill()
        self._pause(0.0, 2.0)
        self.mes.start()

    def _kill_broker(self) -> None:
        self.broker.kill()
        self._pause(0.1, 3.0 if LONG else 1.0)
        self.broker.start()

    def _wipe_broker(self) -> None:
        self.broker.kill()
        (self.broker.folder / "mosquitto.db").unlink(missing_ok=True)
        self.broker.start()

    def _restart_broker(self) -> None:
        self.broker.stop()
        self.broker.start()

    def _freeze_broker(self) -> None:
        assert self.broker.process is not None
        self.broker.process.send_signal(signal.SIGSTOP)
        time.sleep(2.0)
        self.broker.process.send_signal(signal.SIGCONT)

    def _cut_off(self) -> None:
        """The device's cable, or the subscriber's; in the long form also for longer than its keepalive of 5 s allows."""
        cable = self.random.choice(self.cables)
        cable.swallow()
        self._pause(1.0, 10.0 if LONG else 2.0)
        cable.mend()

    def chaos(self, duration_s: float, *, forgetful: bool) -> None:
        """Faults for so long, and until each kind has been, in an order that the seed gives."""
        kinds: dict[str, Callable[[], None]] = {
            "daemon killed": self._kill_daemon, "subscriber killed": self._kill_subscriber,
            "broker restarted": self._restart_broker, "broker frozen": self._freeze_broker, "cut off": self._cut_off,
        }  # fmt: skip
        if forgetful:
            kinds |= {"broker killed": self._kill_broker, "broker wiped": self._wipe_broker}
        end = time.monotonic() + duration_s
        deck: list[str] = []
        while time.monotonic() < end or not set(kinds) <= set(self.faults):
            deck = deck or self.random.sample(sorted(kinds), len(kinds))
            self._pause(0.5, 2.0 if LONG else 1.0)
            name = deck.pop()
            kinds[name]()
            self.faults[name] += 1


def is_settled(rig: Rig, counted: set[str]) -> bool:
    """Whether the subscriber has all, and nothing more has come for QUIET_S."""
    before, end = rig.controller.head, time.monotonic() + QUIET_S
    while time.monotonic() < end:
        rig.controller.listen(0.1)
    head = rig.controller.head
    found = {(r.stream, r.seq): r.trigger_id for life in rig.mes.lives() for r in life}
    return head is not None and head == before and len(found) >= head.hi and counted <= set(found.values())


def run_seed(folder: Path, seed: int, stack: ExitStack) -> int:
    """One run; returns how many results it had."""
    rig = Rig(folder, seed, stack)
    controller = rig.controller
    until(lambda: controller.told, 30, "the first verdict")
    rig.chaos(45.0 if LONG else 9.0, forgetful=True)
    calm_s = time.monotonic()
    until(lambda: controller.first_told_after(calm_s), 60, "verdicts after a broker has forgotten all")
    counted_s = time.monotonic()
    rig.chaos(15.0 if LONG else 5.0, forgetful=False)
    last_s = time.monotonic()
    until(lambda: controller.first_told_after(last_s), 60, "verdicts after the last fault")
    controller.stop()
    counted = {trigger_id for trigger_id, begun_s in controller.taken.items() if begun_s > counted_s}

    end = time.monotonic() + 60
    while not is_settled(rig, counted) and time.monotonic() < end:  # what is missing then is told below, by name
        pass
    took_s = time.monotonic() - last_s
    assert rig.daemon.stop() == 0
    records, lives = Records(rig.plant.device / "state"), rig.mes.lives()
    received = [r for life in lives for r in life]
    distinct = {(r.stream, r.seq) for r in received}
    lost = len(records.results) - len(distinct)
    doubled = len(received) - len(distinct) + sum(life[-1].duplicates for life in lives if life)
    replayed = sum(life[-1].replayed for life in lives if life)
    print(f"\nseed {seed}: {controller.sent} triggers, {len(records.results)} accepted, {lost} lost, {doubled} raw duplicates, "
          f"{replayed} replayed, {len(counted)} triggers counted on, {len(controller.passed)} passes told, all there "
          f"{took_s:.0f} s after the last fault; {sum(rig.faults.values())} faults: {dict(sorted(rig.faults.items()))}")  # fmt: skip
    records.check_received(lives)
    records.check_triggers(controller.passed, counted)
    assert counted
    assert controller.passed
    return len(records.results)


def test_no_accepted_result_is_lost_or_doubled_whatever_is_killed_frozen_wiped_or_cut_off(tmp_path: Path) -> None:
    needed(MOSQUITTO, "apt install mosquitto")
    total = 0
    for seed in SEEDS:
        with ExitStack() as stack:
            total += run_seed(tmp_path / f"seed-{seed}", seed, stack)
    print(f"{total} results in all, none lost")
    assert total >= (15_000 if LONG else 300)
