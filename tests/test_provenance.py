"""A state folder that was put back to an older copy of itself gives no number twice."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import pytest

from edge_inspector import messages, provenance
from edge_inspector.broker import Broker
from edge_inspector.config import BrokerConfig
from edge_inspector.history import stored_results
from edge_inspector.messages import Head
from edge_inspector.mqtt import Connection
from edge_inspector.outbox import Outbox
from edge_inspector.provenance import Provenance
from edge_inspector.results import Reason, Result, Verdict
from edge_inspector.subscriber import Subscriber
from tests.line import TOPICS, DaemonProcess, Mosquitto, device_folder, line_yaml, listening, subscribing, until
from tests.test_outbox import stored

NOW = datetime.now(timezone.utc)


def result(name: str, station: str = "sheet") -> Result:
    return Result(
        station=station, trigger_id=name, verdict=Verdict.FAIL, reason=Reason.ABOVE_THRESHOLD,
        triggered_at=NOW, decided_at=NOW, expires_at=NOW,
    )  # fmt: skip


class NoStation:
    """A station that only lends its name."""

    def command(self, name: str, product: str | None) -> None:
        raise AssertionError(name)


@contextmanager
def boot(state: Path, port: int, stations: Sequence[str] = ("sheet",)) -> Iterator[tuple[Outbox, Provenance]]:
    """What the daemon has of outbox, provenance and broker, on one state folder."""
    config = BrokerConfig.model_validate({"host": "127.0.0.1", "port": port, "keepalive_s": 2})

    def connect(heads: Sequence[str]) -> Connection:
        return Connection(config, "device.heads", subscriptions=heads, durable=False)

    own = Connection(config, "device", subscriptions=Broker.subscriptions(TOPICS))
    with Outbox(state, stations) as outbox, own:
        asked = Provenance(outbox, TOPICS, connect, own.connected.is_set, wake=own.wake)
        names = {name: NoStation() for name in stations}
        with asked, Broker(own, TOPICS, outbox, names, proven=asked.proven):
            yield outbox, asked


def taken(user: Subscriber, count: int) -> list[Result]:
    """So many results, the last one taken, too."""
    found: list[Result] = []

    def enough() -> bool:
        found.extend(user.results(0.3))
        return len(found) >= count

    until(enough, 30, "results")
    return found


def sent(outbox: Outbox, station: str = "sheet") -> bool:
    head = outbox.head(station)
    return head.acked == head.hi


def told(port: int, head: Head | bytes, station: str = "sheet") -> None:
    """Somebody publishes a retained head."""
    payload = head if isinstance(head, bytes) else messages.encode(head)
    with listening(port, "somebody") as listener:
        listener.say(payload, "head", station, retain=True)
        until(lambda: listener.of("head", station) if not isinstance(head, bytes) else True, what="the head")


def test_after_a_rollback_of_the_state_folder_no_number_comes_twice_and_the_user_gets_every_part(
    tmp_path: Path, mosquitto: Mosquitto
) -> None:
    state, seen = tmp_path / "state", tmp_path / "seen"
    with boot(state, mosquitto.port) as (outbox, _), subscribing(mosquitto.port, state=seen) as user:
        for name in "abc":
            outbox.append(result(name))
        first = taken(user, 3)
        until(lambda: sent(outbox), what="acknowledgements")
        user.save()
    shutil.copytree(state, tmp_path / "golden")
    with boot(state, mosquitto.port) as (outbox, asked), subscribing(mosquitto.port, state=seen) as user:
        for name in "defg":
            outbox.append(result(name))
        second = taken(user, 4)
        user.save()
        assert not asked.causes()
    assert {r.stream for r in first + second} == {first[0].stream}, "an ordinary start goes on"
    shutil.rmtree(state)
    shutil.copytree(tmp_path / "golden", state)
    with boot(state, mosquitto.port) as (outbox, asked), subscribing(mosquitto.port, state=seen) as user:
        for name in "hij":
            outbox.append(result(name))
        third = taken(user, 3)
        assert [r.trigger_id for r in third] == ["h", "i", "j"]
        assert [r.seq for r in third] == [1, 2, 3]
        assert [cause.code for cause in asked.causes()] == ["state_put_back"]
        assert user.duplicates == 0
        until(lambda: sent(outbox), what="acknowledgements")
        head = outbox.head("sheet")
        assert (head.lo, head.hi) == (1, 3)
        assert [r.result_id for r in stored(outbox, "sheet")] == [f"{head.stream}-{n}" for n in (1, 2, 3)]
        assert all(r.former_id is None for r in third), "they were never told by another number"
    ids = [r.result_id for r in first + second + third]
    assert len(set(ids)) == len(ids)
    with boot(state, mosquitto.port) as (outbox, asked):
        until(asked.proven, what="an answer")
        assert not asked.causes(), "once is enough"
        assert outbox.head("sheet") == head


def test_a_result_that_moves_into_a_new_stream_comes_once_to_who_has_it(tmp_path: Path, mosquitto: Mosquitto) -> None:
    """The copy was made before the broker had acknowledged what it holds."""
    state, seen = tmp_path / "state", tmp_path / "seen"
    with Outbox(state, ["sheet"]) as outbox:
        for name in "ab":
            outbox.append(result(name))
    shutil.copytree(state, tmp_path / "golden")
    with boot(state, mosquitto.port) as (outbox, _), subscribing(mosquitto.port, state=seen) as user:
        assert len(taken(user, 2)) == 2
        user.save()
    shutil.rmtree(state)
    shutil.copytree(tmp_path / "golden", state)
    with boot(state, mosquitto.port) as (outbox, _), subscribing(mosquitto.port, state=seen) as user:
        outbox.append(result("c"))
        (only,) = taken(user, 1)
        assert (only.trigger_id, only.seq, user.duplicates) == ("c", 3, 2)


def test_a_copy_is_known_although_the_other_life_told_no_higher_number(tmp_path: Path, mosquitto: Mosquitto) -> None:
    """A machine with its state in memory loses power within the second in which the head lags behind the results."""
    state = tmp_path / "state"
    with boot(state, mosquitto.port) as (outbox, _):
        outbox.append(result("a"))
        until(lambda: sent(outbox))
    shutil.copytree(state, tmp_path / "golden")
    with boot(state, mosquitto.port) as (outbox, asked), listening(mosquitto.port) as listener:
        until(asked.proven)
        until(lambda: any(h["life"] == outbox.origin.life and h["hi"] == 1 for h in listener.of("head")), what="its head")
    shutil.rmtree(state)
    shutil.copytree(tmp_path / "golden", state)
    with boot(state, mosquitto.port) as (outbox, asked):
        until(asked.proven)
        assert [cause.code for cause in asked.causes()] == ["state_put_back"]


def test_until_the_broker_was_heard_results_wait_and_move_with_those_that_it_never_had(
    tmp_path: Path, mosquitto: Mosquitto
) -> None:
    state = tmp_path / "state"
    mosquitto.kill()
    with Outbox(state, ["sheet", "lid"]) as outbox:
        for name in ("a", "b", "c"):
            outbox.append(result(name))
        outbox.append(result("x", "lid"))
        outbox.acknowledged("sheet", 1)
        old = outbox.head("sheet").stream
    mosquitto.start()
    told(mosquitto.port, Head(station="sheet", stream=old, lo=1, hi=9))
    mosquitto.stop()
    with boot(state, mosquitto.port, ["sheet", "lid"]) as (outbox, asked):
        provisional = outbox.append(result("d"))
        assert provisional.result_id == f"{old}-4", "judging goes on without a broker"
        assert not asked.proven()
        mosquitto.start()
        with subscribing(mosquitto.port) as user:
            found = taken(user, 4)
        sheet = [r for r in found if r.station == "sheet"]
        assert [(r.seq, r.trigger_id, r.former_id) for r in sheet] == [
            (1, "b", f"{old}-2"), (2, "c", f"{old}-3"), (3, "d", None),
        ]  # fmt: skip
        lid = next(r for r in found if r.station == "lid")
        assert (lid.seq, lid.trigger_id, lid.former_id is not None) == (1, "x", True), "the whole file is an old copy"
        assert old not in {r.stream for r in found}
        assert {r.result_id for r in sheet} == {r.result_id for r in stored(outbox, "sheet")}


@pytest.mark.parametrize(
    "forged",
    [
        b"", b"{", b"[" * 3000, b'{"stream": 7}', b'{"station":"sheet","stream":"x","lo":1,"hi":1e400}', b"huge",
        Head(station="sheet", stream="another", lo=1, hi=2**50, life=2**50),
    ],
)  # fmt: skip
def test_a_head_that_says_nothing_of_our_stream_changes_nothing(
    tmp_path: Path, mosquitto: Mosquitto, forged: Head | bytes
) -> None:
    with Outbox(tmp_path, ["sheet"]) as outbox:
        before = outbox.append(result("a")).stream
    if forged == b"huge":
        forged = f'{{"station":"sheet","stream":"{before}","lo":1,"hi":1{"0" * 6000}}}'.encode()
    told(mosquitto.port, forged)
    with boot(tmp_path, mosquitto.port) as (outbox, asked):
        until(lambda: sent(outbox), what="results sent")
        assert outbox.head("sheet").stream == before
        assert not asked.causes()


def test_a_forged_head_costs_one_new_stream_a_start_and_no_result_and_no_history(tmp_path: Path, mosquitto: Mosquitto) -> None:
    with Outbox(tmp_path, ["sheet"]) as outbox:
        old = outbox.append(result("a")).stream
        outbox.acknowledged("sheet", 1)
    with boot(tmp_path, mosquitto.port) as (outbox, asked):
        told(mosquitto.port, Head(station="sheet", stream=old, lo=1, hi=99))
        until(asked.proven)
        if asked.causes():  # it came before the answer was known
            old = outbox.head("sheet").stream
        until(lambda: outbox.head("sheet").stream == old)
        told(mosquitto.port, Head(station="sheet", stream=old, lo=1, hi=99))
        outbox.append(result("b"))
        until(lambda: sent(outbox))
        assert outbox.head("sheet").stream == old, "once it is known nobody is listened to"
    told(mosquitto.port, Head(station="sheet", stream=old, lo=1, hi=99))
    with boot(tmp_path, mosquitto.port) as (outbox, asked):
        until(asked.proven)
        assert [cause.code for cause in asked.causes()] == ["state_put_back"]
        assert outbox.head("sheet").stream != old
    assert [r.trigger_id for name in ("a", "b") for r in stored_results(tmp_path / "outbox.db", name)] == ["a", "b"]


def test_a_broker_that_does_not_tell_heads_holds_results_up_for_seconds_only_and_health_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acl = tmp_path / "acl"
    acl.write_text("topic write #\ntopic read ei/v1/plant/line/edge/result/#\n")
    acl.chmod(0o644)
    broker = Mosquitto(tmp_path / "m", f"acl_file {acl}\n").start()
    monkeypatch.setattr(provenance, "PATIENCE_S", 1.0)
    try:
        with Outbox(tmp_path / "state", ["sheet"]) as outbox:
            outbox.append(result("a"))
        with boot(tmp_path / "state", broker.port) as (outbox, asked):
            until(lambda: sent(outbox), what="results sent")
            assert [cause.code for cause in asked.causes()] == ["state_unproven"]
    finally:
        broker.stop()


def test_the_daemon_of_a_state_folder_that_was_put_back_says_so_and_its_user_misses_no_part(
    tmp_path: Path, mosquitto: Mosquitto
) -> None:
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml())
    state, results = folder / "state", list[Result]()
    with subscribing(mosquitto.port) as user, listening(mosquitto.port) as listener:
        for life in range(2):
            with boot(state, mosquitto.port) as (outbox, _):
                outbox.append(result(f"T-{life}"))
                results += taken(user, 1)
                until(lambda: sent(outbox))
            if life == 0:
                shutil.copytree(state, tmp_path / "golden")
        shutil.rmtree(state)
        shutil.copytree(tmp_path / "golden", state)
        with DaemonProcess(folder):
            until(lambda: any(r["ready"] for r in listener.of("ready", "sheet")), what="ready")
            listener.say({"trigger_id": "T-2"}, "trigger", "sheet")
            results += taken(user, 1)
            until(lambda: any(a["code"] == "state_put_back" for a in listener.of("alert")), what="an alert")
    assert [r.trigger_id for r in results] == ["T-0", "T-1", "T-2"]
    assert len({r.result_id for r in results}) == len(results)
    assert user.duplicates == 0
