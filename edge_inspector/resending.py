"""Replays: results that a subscriber asks for again, and what it will never get."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

from edge_inspector.errors import InspectorError
from edge_inspector.messages import Gap, ReplayEnd, ReplayRequest, Topics
from edge_inspector.outbox import Outbox
from edge_inspector.results import MAX_RESULT_BYTES
from edge_inspector.sender import Sender

REPLAY_RANGE = 500
REPLAYS = 32
_ASKED_OFTEN = 3
"""A replay that is asked for again so often did not arrive, though the broker acknowledged it: it may be too large."""
_ASKED = 256
"""Replays of which it is remembered how often they were asked for."""


@dataclass
class _Replay:
    request: ReplayRequest
    station: str
    at: int
    hi: int
    error: str = ""
    gaps: list[tuple[int, int]] = field(default_factory=list)
    most_bytes: int = MAX_RESULT_BYTES


class Resending:
    """The replays that wait; for the thread that sends."""

    def __init__(self, outbox: Outbox, topics: Topics, sender: Sender) -> None:
        self._outbox, self._topics, self._sender = outbox, topics, sender
        self._replays: deque[_Replay] = deque()
        self._asked: OrderedDict[tuple[str, str], tuple[int, int]] = OrderedDict()
        """Of (station, client): from where a replay was asked for, and how often in a row."""

    def __len__(self) -> int:
        return len(self._replays)

    def clear(self) -> None:
        """Answer nobody any more: the connection on which they asked is gone."""
        self._replays.clear()

    def ask(self, station: str, request: ReplayRequest, *, proven: bool) -> None:
        """Take a request; `proven`: the numbers of the stream are nobody else's. Raises InspectorError."""
        if request.client == "request":
            raise InspectorError(f"replay/{station}/request: a client cannot be named 'request'")
        head = self._outbox.head(station)
        replay = _Replay(request, station, request.lo, min(request.hi, request.lo + REPLAY_RANGE - 1, head.hi))
        if not proven:
            replay.error = "not known yet whether this stream goes on, ask again later"
        elif request.stream != head.stream:
            replay.error = f"unknown stream {request.stream!r}, this is {head.stream!r}"
        elif len(self._replays) >= REPLAYS:
            replay.error = "busy, ask again later"
        else:
            replay.gaps = self._outbox.gaps(station, replay.at, replay.hi, REPLAY_RANGE)
            replay.most_bytes = self._bytes_for(station, request)
        if len(self._replays) < 2 * REPLAYS:
            self._replays.append(replay)

    def serve(self, room: int) -> None:
        """Go on with the replay that was asked for first, as far as the window has room."""
        replay = self._replays[0]
        topic = self._topics.of("replay", replay.station, replay.request.client)
        if replay.gaps:
            for lo, hi in replay.gaps[:room]:
                self._sender.publish(topic, Gap(station=replay.station, stream=replay.request.stream, lo=lo, hi=hi))
            replay.gaps = replay.gaps[room:]
            return
        rows = self._outbox.results(replay.station, replay.at, replay.hi, room) if not replay.error else []
        for seq, payload in rows:
            self._send(topic, replay, seq, payload)
            replay.at = seq + 1
        if len(rows) < room:
            self._replays.popleft()
            self._sender.publish(topic, _end_of(replay))

    def _send(self, topic: str, replay: _Replay, seq: int, payload: bytes) -> None:
        fits = self._sender.fitted(topic, payload, replay.most_bytes)
        if fits is not None:
            self._sender.result(topic, fits)
            return
        gap = Gap(station=replay.station, stream=replay.request.stream, lo=seq, hi=seq, reason="too_large")
        self._sender.publish(topic, gap)

    def _bytes_for(self, station: str, request: ReplayRequest) -> int:
        """How large results may be: what is asked for again and again did not arrive, though it was sent."""
        key = station, request.client
        lo, times = self._asked.get(key, (0, 0))
        times = times + 1 if lo == request.lo else 1
        self._asked[key] = request.lo, times
        self._asked.move_to_end(key)
        if len(self._asked) > _ASKED:
            self._asked.popitem(last=False)
        return MAX_RESULT_BYTES >> max(0, times - _ASKED_OFTEN)


def _end_of(replay: _Replay) -> ReplayEnd:
    request = replay.request
    hi = replay.hi if not replay.error else request.lo - 1
    return ReplayEnd(
        request_id=request.request_id, station=replay.station, stream=request.stream, lo=request.lo, hi=hi,
        error=replay.error,
    )  # fmt: skip
