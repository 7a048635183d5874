"""What a daemon has accepted, held against what others got and were told."""

from __future__ import annotations

import contextlib
import sqlite3
from collections import Counter
from itertools import pairwise
from pathlib import Path

from edge_inspector import messages
from edge_inspector.results import Result, Verdict
from tests.faults.mes import Received


class Records:
    """What the daemon has accepted, read from its database once it is gone."""

    def __init__(self, state: Path) -> None:
        with contextlib.closing(sqlite3.connect(state / "outbox.db")) as database:
            self.streams = database.execute("SELECT stream, next - 1 FROM streams").fetchall()
            rows = database.execute("SELECT seq, body FROM results ORDER BY seq").fetchall()
            self.triggers = dict(database.execute("SELECT trigger_id, seq FROM triggers").fetchall())
            self.gaps = database.execute("SELECT lo, hi FROM gaps").fetchall()
        self.results = {seq: messages.decode(Result, body, "a record") for seq, body in rows}

    def check_received(self, lives: list[list[Received]]) -> None:
        """Each life of the subscriber got all in order, without hole or repeat, from where the last had come to at most."""
        upcoming = 1
        for life in filter(None, lives):
            assert life[0].seq <= upcoming, "a hole between two lives of the subscriber"
            assert all(b.seq == a.seq + 1 for a, b in pairwise(life)), "lost, doubled or out of order"
            upcoming = max(upcoming, life[-1].seq + 1)
        ((stream, hi),) = self.streams
        told = {(r.stream, r.seq): (r.trigger_id, r.verdict) for life in lives for r in life}
        for life in lives:
            for r in life:
                assert told[r.stream, r.seq] == (r.trigger_id, r.verdict), "two results by one number"
        assert not self.gaps
        assert list(self.results) == list(range(1, hi + 1))
        assert told == {(stream, seq): (r.trigger_id, r.verdict.value) for seq, r in self.results.items()}

    def check_triggers(self, passed: set[str], counted: set[str]) -> None:
        """Each trigger that was taken has one result; what the line was told of a pass is on record."""
        by_trigger = Counter(r.trigger_id for r in self.results.values())
        assert max(by_trigger.values()) == 1, "a trigger with two results"
        assert None not in self.triggers.values(), "a trigger without result"
        assert {seq: r.trigger_id for seq, r in self.results.items()} == {seq: name for name, seq in self.triggers.items()}
        assert passed <= {r.trigger_id for r in self.results.values() if r.verdict is Verdict.PASS}, "passed without record"
        assert counted <= set(by_trigger), "a trigger that the broker had taken is lost"
