"""No station's results wait for another's, and what the broker does not bear holds up nothing behind it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from edge_inspector.broker import Broker
from edge_inspector.config import BrokerConfig
from edge_inspector.fitting import shortened
from edge_inspector.frames import utc_now
from edge_inspector.health import assess
from edge_inspector.messages import Alert, Cause, ClockFacts, HealthMessage, Reply, ReplyError, decode
from edge_inspector.mqtt import Connection, Message
from edge_inspector.outbox import Counts, Outbox
from edge_inspector.outgoing import LIVE, SHORTEST, WINDOW, Outgoing, Sent, turns
from tests.line import TOPICS, Mosquitto, until
from tests.test_broker import result

STATIONS = tuple("abcde")
BACKLOG, LIVE_PARTS = 1500, 20


def test_what_is_live_goes_first_and_backlogs_share_the_rest() -> None:
    assert turns({"a": 1000, "b": 1}, WINDOW, 1) == {"b": 1, "a": 10}, "room is kept for what comes next"
    assert turns({"a": 1000}, WINDOW, 1) == {"a": WINDOW}, "nobody to keep it for"
    assert turns({"a": 1000, "b": 1000, "c": 0}, WINDOW, 1) == {"a": 5, "b": 5}
    assert turns({}, WINDOW, 1) == turns({"a": 0}, WINDOW, 1) == turns({"a": 1000, "b": 2}, 0, 1) == {}
    counts: Counter[str] = Counter()
    for turn in range(1000):  # one at a time, and two stations that would take it all
        counts.update(turns({"a": LIVE, "b": LIVE, "c": 1000}, 1, turn))
    assert min(counts.values()) > 50, "nobody waits for ever"
    for turn in range(1000, 2000):
        counts.update(turns(dict.fromkeys(STATIONS, 1000), 1, turn))
    assert max(counts[name] for name in "de") - min(counts[name] for name in "de") <= 1


def test_one_message_after_which_the_connection_ends_again_and_again_is_too_large() -> None:
    out = Outgoing()
    for token in range(5):
        out.add(token, Sent(f"t/{token}", 3000))
    assert out.lost(may_be_a_message=True) is None
    assert out.room == 1, "one by one from now on"
    for times in (1, 2, 3):
        out.add(10 * times, Sent("t/0", 100))
        sent = out.take(10 * times)
        assert sent is not None
        out.acknowledged(sent)
        out.add(10 * times + 1, Sent("t/1", 3000))
        assert (out.lost(may_be_a_message=True) is not None) == (times == 3)
    assert out.payload_bytes("t/1", 10_000) == 1500
    assert out.payload_bytes("t/0", 10_000) == 10_000
    for _ in range(3):
        out.add(1, Sent("t/0", 100))
        assert out.lost(may_be_a_message=False) is None, "the network's fault"
    for size in (1500, 750, 375):
        out.learn(Sent("t/1", size))
    assert out.payload_bytes("t/1", 10_000) == SHORTEST - 1


def test_messages_that_do_not_fit_keep_what_matters_most() -> None:
    at = utc_now()
    causes = [Cause(code=f"c{n}", severity="failure" if n == 9 else "off_spec", thing="x", text="t" * 80) for n in range(12)]
    health = assess(causes, Counts(), ClockFacts(ok=True, source="kernel"), 0, {})
    small = shortened(health, 600)
    assert small is not None
    kept = decode(HealthMessage, small, "health")
    assert (kept.status, kept.reasons[0].code, kept.shortened) == ("failure", "c9", True)
    alert = Alert(station="a", change="raised", code="x", severity="failure", text="é" * 1000, at=at, expires_at=at)
    assert len(shortened(alert, 400) or b"?" * 401) <= 400
    reply = Reply(request_id="1", ok=False, error=ReplyError(code="refused", message="m" * 500, hint="h" * 500))
    answer = decode(Reply, shortened(reply, 700) or b"", "reply")
    assert answer.error is not None
    assert answer.error.message == "m" * 500, "the hint goes first"
    assert shortened(reply, 20) is None


def test_five_saturated_stations_get_the_same_and_a_live_result_waits_for_no_backlog(
    tmp_path: Path, mosquitto: Mosquitto
) -> None:
    config = BrokerConfig(host="127.0.0.1", port=mosquitto.port)
    heard: list[str] = []
    with (
        Outbox(tmp_path, [*STATIONS, "live"], quota_mb=16) as outbox,
        Connection(config, "ear", subscriptions=[TOPICS.of("result", "+")]) as ear,
    ):
        until(ear.connected.is_set, what="connection")
        for number in range(BACKLOG):
            for station in STATIONS:
                last = outbox.submit(result(number).model_copy(update={"station": station}))
            if number % 500 == 499:
                last.result(30)

        def listen() -> int:
            while not ear.events.empty():
                event = ear.events.get()
                if isinstance(event, Message):
                    heard.append(TOPICS.within(event.topic)[1])
                    ear.acknowledge(event.ack)
            return len(heard)

        with (
            Connection(config, "device", subscriptions=Broker.subscriptions(TOPICS)) as connection,
            Broker(connection, TOPICS, outbox, {}),
        ):
            waited = []
            for number in range(LIVE_PARTS):
                until(lambda n=number: listen() >= 200 * n, 30, "a backlog")  # type: ignore[misc]
                before = len(heard)
                outbox.append(result(number).model_copy(update={"station": "live"}))
                until(lambda b=before: listen() and "live" in heard[b:], 30, "a live result")  # type: ignore[misc]
                waited.append(heard[before:].index("live"))
            assert listen() < BACKLOG * len(STATIONS), "the backlogs were over before"
            shares = Counter(heard[:2000])
            until(lambda: listen() == BACKLOG * len(STATIONS) + LIVE_PARTS, 60, "all")
    shares.pop("live", None)
    print(f"\nof 2000 results: {dict(shares)}; a live one came after {sorted(waited)[len(waited) // 2]} others (median), "
          f"{max(waited)} at most, with {BACKLOG * len(STATIONS)} waiting")  # fmt: skip
    assert max(shares.values()) - min(shares.values()) <= 0.1 * 400
    assert sorted(waited)[len(waited) // 2] < 150
