"""One answer to "would a part be judged now, and why not": ready, the heartbeat, verdicts and health give the same."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from edge_inspector import pictures
from edge_inspector.cameras import open_source
from edge_inspector.config import LineConfig
from edge_inspector.door import typed
from edge_inspector.evidence import EvidenceStore
from edge_inspector.frames import Trigger, utc_now
from edge_inspector.inspector import Inspectors
from edge_inspector.messages import VerdictMessage
from edge_inspector.outbox import Outbox
from edge_inspector.recorder import Voice
from edge_inspector.runtime import OnnxEngine
from edge_inspector.setting import Setting
from edge_inspector.standing import Orders
from edge_inspector.station import Station
from tests.line import until
from tests.tiny import picture, tiny_bundle


@dataclass
class Rig:
    """A station in this process, what it tells, and what may stand against it from outside."""

    station: Station
    outside: list[str]
    verdicts: list[VerdictMessage] = field(default_factory=list)
    readies: list[Any] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=count)

    def retain(self, message: BaseModel, *_: str) -> None:
        self.readies.append(message)

    def verdict(self, message: VerdictMessage) -> bool:
        self.verdicts.append(message)
        return True

    def judged(self) -> VerdictMessage:
        """The verdict of one part more."""
        name, now_s, now = f"T-{next(self.numbers)}", time.monotonic(), utc_now()
        self.station.setting.outbox.journal(
            "press", trigger := Trigger(name, now_s, now, now_s + 5, now + timedelta(seconds=5))
        )
        self.station.offer(trigger)
        until(lambda: name in {verdict.trigger_id for verdict in self.verdicts}, what="verdict")
        return self.verdicts[-1]

    def agrees(self, why: str, reason: str) -> None:
        """Everything that tells whether it judges tells this."""
        until(lambda: self.readies and self.readies[-1].reason == why, what=why)
        assert self.readies[-1].ready is not bool(why)
        assert self.station.hindrance == why, "which the heartbeat asks"
        verdict = self.judged()
        assert (verdict.verdict.value == "undecided", verdict.reason.value) == (bool(why), reason)
        told = {cause.text for cause in self.station.causes() if cause.code in ("not_ready", "halted", "camera_fault")}
        assert told == ({why.removeprefix("camera top: ")} if why else set())


@contextmanager
def running(tmp_path: Path, uri: str) -> Iterator[Rig]:
    (tmp_path / "late").mkdir()
    bundle, outside = tiny_bundle(tmp_path), [""]
    line = LineConfig.model_validate({
        "schema": "ei.line.v1",
        "stations": {"press": {"trigger": "software", "product": "p", "products": {"p": "r", "q": "r"}, "cameras": {"top": {"uri": uri}}}},
        "recipes": {"r": {"cameras": {"top": {"rois": {"all": {"bundle": "tiny", "threshold": 1e9}}}}}},
    })  # fmt: skip
    config = line.stations["press"]
    with ExitStack() as stack:
        engine = stack.enter_context(OnnxEngine(bundle))
        setting = Setting(
            outbox=stack.enter_context(Outbox(tmp_path / "state", ["press"])), evidence=stack.enter_context(EvidenceStore(tmp_path / "e", 0)),
            configuration=line.reference(), session="s", make_source=lambda name: open_source(config.cameras[name], typed(tmp_path)),
            inspectors=lambda _: Inspectors.of(config, line, lambda _: engine), clock_ok=lambda: True, watch=lambda _: lambda: None,
            forget=lambda _: None, orders=Orders(tmp_path / "orders.json", ["press"]), hindrance=lambda: outside[0],
        )  # fmt: skip
        made = Rig(Station("press", config, setting), outside)
        made.station.voice = Voice(made.verdict, made.retain)
        made.station.announce()
        stack.enter_context(made.station)
        yield made


def test_ready_heartbeat_verdicts_and_health_give_one_answer(tmp_path: Path) -> None:
    with running(tmp_path, "synthetic://") as rig:
        rig.agrees("", "below_threshold")
        first = [(ready.ready, ready.state) for ready in rig.readies]
        assert first[0] == (False, "preoperational")
        assert all(state == "ready" for is_ready, state in first if is_ready), "not before its networks are open"
        rig.outside[0] = "no trigger is heard"
        rig.agrees("no trigger is heard", "not_ready")
        rig.outside[0] = ""
        rig.agrees("", "below_threshold")
        rig.station.command("halt", None)
        assert rig.readies[-1].state == "halted", "told before the command is answered"
        rig.agrees("halted by command", "not_ready")
        rig.station.command("start", None)
        rig.agrees("", "below_threshold")


def test_a_part_whose_camera_is_in_fault_is_undecided_at_once(tmp_path: Path) -> None:
    with running(tmp_path, f"dir://{tmp_path}/late") as rig:
        fault = until(lambda: rig.station.cameras["top"].fault, what="fault")
        rig.agrees(f"camera top: {fault}", "missing_image")
        pictures.write(tmp_path / "late" / "1.png", picture(140))
        rig.agrees("", "below_threshold")
