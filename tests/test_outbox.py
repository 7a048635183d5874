"""Results on disk: numbered, bounded, and there after every kind of end."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from edge_inspector import messages
from edge_inspector.errors import OutboxError
from edge_inspector.frames import Trigger
from edge_inspector.history import stored_results
from edge_inspector.outbox import Outbox
from edge_inspector.quota import BALLAST_BYTES
from edge_inspector.results import Reason, Result, Verdict
from tests.line import filled, until

NOW = datetime.now(timezone.utc)


def result(number: int, verdict: Verdict = Verdict.PASS, detail: str = "", station: str = "s") -> Result:
    return Result(
        station=station, trigger_id=f"T-{number}", verdict=verdict, reason=Reason.BELOW_THRESHOLD, detail=detail,
        triggered_at=NOW, decided_at=NOW, expires_at=NOW,
    )  # fmt: skip


def trigger(number: int) -> Trigger:
    now_s = time.monotonic()
    return Trigger(f"T-{number}", now_s, NOW, now_s + 1, NOW + timedelta(seconds=1), journalled=True)


def stored(outbox: Outbox, station: str = "s") -> list[Result]:
    head = outbox.head(station)
    return [messages.decode(Result, body, "x") for _, body in outbox.results(station, 1, head.hi, 100_000)]


def test_results_are_numbered_without_gap_per_station_and_across_restarts(tmp_path: Path) -> None:
    for start in (1, 4):
        with Outbox(tmp_path, ["s", "t"]) as outbox:
            for n in range(start, start + 3):
                assert outbox.append(result(n)).seq == n
            outbox.append(result(0, station="t"))
            found = stored(outbox)
    assert [r.seq for r in found] == [1, 2, 3, 4, 5, 6]
    assert len({r.stream for r in found}) == 1
    assert found[0].result_id == f"{found[0].stream}-1"


def test_a_journalled_trigger_without_result_becomes_interrupted_at_the_next_start(tmp_path: Path) -> None:
    with Outbox(tmp_path, ["s"]) as outbox:
        assert outbox.journal("s", trigger(1)).result(5).new
        assert outbox.journal("s", trigger(2)).result(5).new
        outbox.append(result(2))
    with Outbox(tmp_path, ["s"]) as outbox:
        found = {r.trigger_id: (r.verdict, r.reason) for r in stored(outbox)}
        assert found == {
            "T-1": (Verdict.UNDECIDED, Reason.INTERRUPTED), "T-2": (Verdict.PASS, Reason.BELOW_THRESHOLD),
        }  # fmt: skip
        again = outbox.journal("s", trigger(2)).result(5)
        assert not again.new
        assert again.result is not None


def test_a_pass_that_reaches_the_disk_late_is_stored_as_late(tmp_path: Path) -> None:
    with Outbox(tmp_path, ["s"]) as outbox:
        late = outbox.submit(result(1), expires_s=time.monotonic() - 1).result(5)
        fail = outbox.submit(result(2, Verdict.FAIL), expires_s=time.monotonic() - 1).result(5)
    assert (late.verdict, late.reason) == (Verdict.UNDECIDED, Reason.LATE)
    assert fail.verdict is Verdict.FAIL


def test_the_quota_drops_passed_results_first_and_every_drop_is_a_gap(tmp_path: Path) -> None:
    with Outbox(tmp_path, ["s"], quota_mb=4) as outbox:
        total = 9000
        for n in range(1, total + 1):
            outbox.submit(result(n, Verdict.FAIL if n % 10 == 0 else Verdict.PASS, "x" * 200))
            if n % 500 == 0:
                until(outbox._work.empty)  # the queue is bounded: let the committer follow
        outbox.append(result(total + 1))
        head = outbox.head("s")
        kept = {r.seq for r in stored(outbox)}
        gaps = outbox.gaps("s", 1, head.hi, 100_000)
        assert outbox.counts.dropped > 1000
        assert outbox.counts.used < 1.0
    missing = {seq for lo, hi in gaps for seq in range(lo, hi + 1)}
    assert missing | kept == set(range(1, head.hi + 1))
    assert not missing & kept
    assert set(range(10, total + 1, 10)) <= kept, "a failed part was dropped while passed ones were there"
    size = sum(p.stat().st_size for p in tmp_path.iterdir() if p.name.startswith("outbox"))
    assert size < (4 << 20) + (1 << 20)


def test_a_damaged_file_is_set_aside_and_a_new_stream_begins(tmp_path: Path) -> None:
    with Outbox(tmp_path, ["s"]) as outbox:
        first = outbox.append(result(1)).stream
    (tmp_path / "outbox.db").write_bytes(b"this is no database" * 500)
    with Outbox(tmp_path, ["s"]) as outbox:
        second = outbox.append(result(1))
    assert second.stream != first
    assert second.seq == 1
    assert list(tmp_path.glob("outbox.damaged-*"))


_EARLIER = """
CREATE TABLE streams(station TEXT PRIMARY KEY, stream TEXT NOT NULL, next INTEGER NOT NULL, acked INTEGER NOT NULL);
CREATE TABLE results(id INTEGER PRIMARY KEY, station TEXT NOT NULL, seq INTEGER NOT NULL, verdict TEXT NOT NULL,
  body BLOB NOT NULL, UNIQUE(station, seq));
CREATE INDEX passed ON results(id) WHERE verdict = 'pass';
CREATE TABLE triggers(id INTEGER PRIMARY KEY, station TEXT NOT NULL, trigger_id TEXT NOT NULL, body TEXT NOT NULL,
  seq INTEGER, UNIQUE(station, trigger_id));
CREATE INDEX open_triggers ON triggers(id) WHERE seq IS NULL;
CREATE TABLE gaps(station TEXT NOT NULL, lo INTEGER NOT NULL, hi INTEGER NOT NULL, PRIMARY KEY(station, lo));
INSERT INTO streams VALUES('s', 'c0ffee00', 4, 1);
INSERT INTO gaps VALUES('s', 1, 1);
"""


def test_a_file_of_an_earlier_release_goes_on_in_its_stream_and_loses_nothing(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "outbox.db")) as connection, connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.executescript(_EARLIER)
        for n in (2, 3):
            old = result(n).model_copy(update={"result_id": f"c0ffee00-{n}", "stream": "c0ffee00", "seq": n})
            connection.execute("INSERT INTO results VALUES(?, 's', ?, 'pass', ?)", (n, n, old.payload()))
            connection.execute("INSERT INTO triggers VALUES(?, 's', ?, '', ?)", (n, f"T-{n}", n))
    with Outbox(tmp_path, ["s"]) as outbox:
        assert outbox.append(result(4)).result_id == "c0ffee00-4"
        head = outbox.head("s")
        assert (head.stream, head.lo, head.hi, head.acked) == ("c0ffee00", 2, 4, 1)
        assert outbox.gaps("s", 1, 4, 9) == [(1, 1)]
        assert [r.trigger_id for r in stored(outbox)] == ["T-2", "T-3", "T-4"]
        assert not outbox.journal("s", trigger(2)).result(5).new
    assert not list(tmp_path.glob("outbox.damaged-*"))


def test_records_are_found_by_result_part_and_trigger_whatever_the_folder_is_called(tmp_path: Path) -> None:
    folder = tmp_path / "line #1? 100%20 ü"
    part = {"part_id": '01\x1d"ä/7"'}
    with Outbox(folder, ["s"]) as outbox:
        first = outbox.append(result(1).model_copy(update=part))
        again = outbox.append(result(2).model_copy(update=part))
        outbox.append(result(12))
        for name, found in ((first.result_id, [first]), (part["part_id"], [first, again]), ("T-2", [again]), ("T-", [])):
            assert [r.result_id for r in stored_results(folder / "outbox.db", name)] == [r.result_id for r in found]
    assert {path.name for path in tmp_path.iterdir()} == {folder.name}, "no stray file beside it"
    with pytest.raises(OutboxError, match="nowhere"):
        stored_results(tmp_path / "nowhere" / "outbox.db", "T-1")
    assert not (tmp_path / "nowhere").exists()


def test_a_state_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutboxError, match="file/x"), Outbox(tmp_path / "file" / "x", ["s"]):
        pass


def test_acknowledgements_survive_and_a_closed_outbox_takes_nothing(tmp_path: Path) -> None:
    with Outbox(tmp_path, ["s"]) as outbox:
        for n in range(1, 6):
            outbox.append(result(n))
        outbox.acknowledged("s", 4)
    with pytest.raises(OutboxError, match="closed"):
        outbox.append(result(6))
    with Outbox(tmp_path, ["s"]) as outbox:
        assert outbox.head("s").acked == 4
        assert outbox.counts.pending == 1


def test_what_a_future_resolved_for_is_there_after_kill_9(tmp_path: Path) -> None:
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).resolve().parents[1])!r})
from pathlib import Path
from edge_inspector.outbox import Outbox
from tests.test_outbox import result
ledger = os.open({str(tmp_path / "ledger")!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
with Outbox(Path({str(tmp_path)!r}), ["s"]) as outbox:
    for n in range(1, 10**6):
        done = outbox.submit(result(n))
        done.add_done_callback(lambda f: os.write(ledger, f"{{f.result().seq}} {{f.result().trigger_id}}\\n".encode()))
        if n % 20 == 0:
            done.result(10)
"""
    child = subprocess.Popen([sys.executable, "-c", code])
    until(lambda: (tmp_path / "ledger").exists() and (tmp_path / "ledger").stat().st_size > 2000, 30, "load")
    child.kill()
    child.wait()
    accepted = [line.split() for line in (tmp_path / "ledger").read_text().splitlines() if " T-" in line]
    with Outbox(tmp_path, ["s"]) as outbox:
        found = {str(r.seq): r.trigger_id for r in stored(outbox)}
    assert len(accepted) > 100
    assert all(found.get(seq) == trigger_id for seq, trigger_id in accepted)


def test_a_full_disk_never_wedges_and_loses_nothing_accepted(small_disk: Path) -> None:
    """Somebody else fills the disk: results wait, passes are dropped for room, and it goes on without a restart."""
    accepted: list[int] = []
    with Outbox(small_disk, ["s"], quota_mb=64) as outbox:
        until((small_disk / "ballast").exists, what="ballast")
        for n in range(1, 200):
            accepted.append(outbox.append(result(n, Verdict.FAIL if n % 10 == 0 else Verdict.PASS, "x" * 200)).seq)
        fill = filled(small_disk)
        futures = [outbox.submit(result(n, Verdict.FAIL, "x" * 200)) for n in range(200, 3000)]
        time.sleep(2.0)
        gave_way = not (small_disk / "ballast").exists()
        fill.unlink()
        accepted += [future.result(20).seq for future in futures]
        head = outbox.head("s")
        kept = {r.seq for r in stored(outbox)}
        missing = {seq for lo, hi in outbox.gaps("s", 1, head.hi, 100_000) for seq in range(lo, hi + 1)}
        assert outbox.append(result(9999)).seq == head.hi + 1
    assert gave_way, f"the ballast of {BALLAST_BYTES} bytes was not given up"
    assert set(accepted) == set(range(1, 3000))
    assert kept | missing == set(accepted)
    with sqlite3.connect(small_disk / "outbox.db") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_reading_does_not_wait_for_writing(tmp_path: Path) -> None:
    with Outbox(tmp_path, ["s"]) as outbox:
        outbox.append(result(1))
        blocker = sqlite3.connect(tmp_path / "outbox.db", isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        future = outbox.submit(result(2))
        assert [seq for seq, _ in outbox.results("s", 1, 9, 9)] == [1]
        assert not future.done()
        blocker.execute("ROLLBACK")
        blocker.close()
        assert future.result(10).seq == 2
