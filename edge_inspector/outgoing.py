"""What was sent to the broker and is not acknowledged yet, whose turn it is, and which message the broker does not bear.

Results of stations that keep up go before those of stations that lag, and none of them waits for another.

Some brokers close the connection on a message that is too large and do not say so (MQTT 3.1.1). When a connection
ends so, one message at a time is sent; one after which it ends again and again is too large.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

WINDOW = 15
"""Below what brokers allow one client; 20 is common."""
LIVE = 4
"""A station with at most so many results to send keeps up."""
_ALIKE = 4
"""Every so many turns all stations are served alike, so that none waits for ever."""
_RESERVED = 5
"""Of the window, for stations that keep up."""
_ENDINGS = 3
"""So many connections that end after the same message, and it is too large."""
_CAREFUL_FOR = 30
"""Messages that are acknowledged one by one until more may be sent at once again."""
_LEARNT_S = 3600.0
"""What was learnt is tried anew after so long: it may have been something else."""
SHORTEST = 256
"""Bytes below which no message is shortened further for a guess."""


@dataclass(frozen=True)
class Sent:
    """One publication; `station` and `seq` of a result that counts as sent; topics of one `kind` carry the same messages."""

    topic: str
    size: int
    station: str | None = None
    seq: int = 0
    kind: str = ""


class Outgoing:
    """The publications of one connection after the other. For one thread."""

    def __init__(self) -> None:
        self.most = WINDOW
        self._sent: dict[int, Sent] = {}
        self._careful = 0
        self._endings: Counter[str] = Counter()
        self._learnt: dict[str, tuple[int, float]] = {}
        self._borne: dict[str, int] = {}
        """The largest that the broker has acknowledged, by topic and kind."""

    def __len__(self) -> int:
        return len(self._sent)

    @property
    def is_careful(self) -> bool:
        """Whether one message at a time is sent."""
        return self._careful > 0

    @property
    def room(self) -> int:
        """How many more may be sent now."""
        return max(0, (1 if self._careful else self.most) - len(self._sent))

    def add(self, token: int, sent: Sent) -> None:
        """Something was sent."""
        self._sent[token] = sent

    def take(self, token: int) -> Sent | None:
        """It was answered; returns what it was."""
        return self._sent.pop(token, None)

    def acknowledged(self, sent: Sent) -> None:
        """The broker has it."""
        self._endings.pop(sent.topic, None)
        for key in (sent.topic, sent.kind):
            self._borne[key] = max(sent.size, self._borne.get(key, 0))
        self._careful = max(0, self._careful - 1)

    def waiting(self, station: str) -> list[int]:
        """The results of a station that are not answered yet."""
        return [sent.seq for sent in self._sent.values() if sent.station == station]

    def forget(self) -> None:
        """No answer to what was sent counts any more."""
        self._sent.clear()

    def lost(self, *, may_be_a_message: bool) -> Sent | None:
        """The connection is gone, and all that was not answered with it; returns what was learnt to be too large."""
        sent = list(self._sent.values())
        self.forget()
        if not may_be_a_message or not sent:
            return None
        if self._careful and len(sent) == 1:
            self._endings[sent[0].topic] += 1
            if self._endings[sent[0].topic] >= _ENDINGS:
                self.learn(sent[0])
                return sent[0]
        self._careful = _CAREFUL_FOR
        return None

    def learn(self, sent: Sent) -> None:
        """This was too large."""
        self._endings.pop(sent.topic, None)
        is_kind = bool(sent.kind) and self._borne.get(sent.kind, 0) < sent.size  # else it is the topic's fault, not the size's
        key = sent.kind if is_kind else sent.topic
        borne = min(self._borne.get(key, 0), sent.size - 1)
        self._learnt[key] = max(sent.size // 2, (sent.size + 3 * borne) // 4, SHORTEST - 1), time.monotonic()

    def payload_bytes(self, topic: str, told: int, kind: str = "") -> int:
        """The largest payload for a topic: what the broker told, or less where it was learnt."""
        since_s = time.monotonic() - _LEARNT_S
        learnt = [self._learnt[key] for key in (topic, kind) if key in self._learnt]
        return min([told, *(size for size, at_s in learnt if at_s > since_s)])


def turns(waiting: Mapping[str, int], room: int, first: int) -> dict[str, int]:
    """How many results of each station to send now; `first` counts up, so that each begins once."""
    names = [name for name, count in waiting.items() if count > 0]
    names = names[first % len(names) :] + names[: first % len(names)] if names else []
    live = [name for name in names if waiting[name] <= LIVE or first % _ALIKE == 0]
    behind = [name for name in names if name not in live]
    given = _shared({name: waiting[name] for name in live}, room)
    left = room - sum(given.values())
    reserved = _RESERVED if len(waiting) > 1 and room > _RESERVED else 0
    return given | _shared({name: waiting[name] for name in behind}, min(left, max(1, room - reserved)))


def _shared(waiting: Mapping[str, int], room: int) -> dict[str, int]:
    """The room, one by one in turn."""
    given = dict.fromkeys(waiting, 0)
    while room > 0 and (open_ := [name for name in waiting if given[name] < waiting[name]]):
        for name in open_[:room]:
            given[name] += 1
        room -= min(room, len(open_))
    return {name: count for name, count in given.items() if count}
