"""A damaged file of results: set aside, told, and judged on; what the broker does not have is taken over."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from edge_inspector import database, health
from edge_inspector.outbox import Outbox
from edge_inspector.results import Reason, Result
from tests.line import until
from tests.test_outbox import result, stored, trigger

PAGE = 4096
RESULTS, ACKED = 600, 400


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound file: 600 results, of which the broker has 400, and one trigger that is open."""
    folder = tmp_path_factory.mktemp("whole")
    with Outbox(folder, ["s"]) as outbox:
        futures = [outbox.submit(result(n, detail="x" * 200)) for n in range(1, RESULTS + 1)]
        outbox.journal("s", trigger(9000)).result(10)
        futures[-1].result(10)
        outbox.acknowledged("s", ACKED)
        until(lambda: outbox.head("s").acked == ACKED)
    return folder / "outbox.db"


def copied(whole: Path, folder: Path, *, clean: bool = True) -> Path:
    path = folder / "outbox.db"
    path.write_bytes(whole.read_bytes())
    if not clean:
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE facts SET value = 0 WHERE name = 'clean'")
    return path


def page_of(path: Path, what: str) -> int:
    """A page: the root of a table or index, or the leaf that holds a text."""
    with closing(sqlite3.connect(path)) as connection:
        roots = {name: int(page) for name, page in connection.execute("SELECT name, rootpage FROM sqlite_master")}
    return roots[what] if what in roots else path.read_bytes().rfind(what.encode()) // PAGE + 1


def damage(path: Path, page: int) -> None:
    with path.open("r+b") as file:
        file.seek((page - 1) * PAGE)
        file.write(b"\xde\xad" * (PAGE // 2))


def read_all(outbox: Outbox) -> list[Result]:
    """What a broker would get, from the first result that it does not have."""
    found: list[Result] = []

    def complete() -> bool:
        head = outbox.head("s")
        found[:] = [r for r in stored(outbox) if r.seq > head.acked]
        return len(found) == head.hi - head.acked

    until(complete, what="every result")
    return found


PLACES = {
    "T-500": 190,  # a leaf with results that the broker does not have: all but those on it
    "T-100": 199,  # one with history: all of them
    "results": 199,  # the root of their table: they are found in the bytes
    "streams": 199,
    "triggers": 199,
    "passed": 199,
    "sqlite_autoindex_results_1": 199,
    "sqlite_autoindex_triggers_1": 199,
    "facts": 199,
    "sqlite_schema": 199,
}


@pytest.mark.parametrize("clean", [True, False], ids=["after a clean end", "after a kill"])
@pytest.mark.parametrize("place", PLACES)
def test_a_damaged_page_ends_no_start_and_what_the_broker_lacks_is_taken_over(
    whole: Path, tmp_path: Path, place: str, clean: bool
) -> None:
    path = copied(whole, tmp_path, clean=clean)
    damage(path, 1 if place == "sqlite_schema" else page_of(path, place))
    for start in range(3):
        with Outbox(tmp_path, ["s"]) as outbox:
            assert outbox.append(result(9001 + start)).trigger_id == f"T-{9001 + start}"
            found = read_all(outbox)
            assert outbox.failure is None
            ids = [r.result_id for r in found]
            assert ids == [f"{r.stream}-{r.seq}" for r in found]
            numbers = {int(r.trigger_id[2:]) for r in found}
            taken = len(numbers & set(range(ACKED + 1, RESULTS + 1)))
            assert taken >= PLACES[place]
            if outbox.counts.damaged is not None:
                assert next(cause.code for cause in health.storage_causes(outbox.counts, tmp_path)) == "outbox_damaged"
            if not clean and place != "facts":
                assert outbox.counts.damaged is not None, "it is checked after a kill"
            if start == 0 and outbox.counts.damaged is not None and taken:
                moved = [r for r in found if int(r.trigger_id[2:]) <= RESULTS]
                assert all(r.former_id is not None and r.former_id.endswith(f"-{r.trigger_id[2:]}") for r in moved)
            outbox.acknowledged("s", 0, outbox.generation)
    assert len(list(tmp_path.glob("outbox.damaged-*.db"))) <= 1


def test_damage_that_shows_while_parts_are_judged_costs_no_part_its_record(whole: Path, tmp_path: Path) -> None:
    path = copied(whole, tmp_path)
    with Outbox(tmp_path, ["s"]) as outbox:
        before = outbox.head("s")
        assert outbox.journal("s", trigger(9001)).result(10).new
        damage(path, page_of(whole, "T-500"))
        assert outbox.results("s", 480, 520, 100) == [], "what cannot be read is not told"
        until(lambda: outbox.head("s").stream != before.stream, what="a new stream")
        assert outbox.append(result(9001)).stream == outbox.head("s").stream
        found = read_all(outbox)
        assert (found[-1].trigger_id, found[-1].reason) == ("T-9001", Reason.BELOW_THRESHOLD), "its trigger was in hand"
        assert len(found) > 190
        outbox.acknowledged("s", before.hi, 0)
        assert outbox.head("s").acked == 0, "what was sent under the old numbers acknowledges nothing of the new"
        assert not outbox.journal("s", trigger(9001)).result(10).new
        assert not outbox.journal("s", trigger(9000)).result(10).new
    with Outbox(tmp_path, ["s"]) as outbox:
        interrupted = [r.trigger_id for r in stored(outbox) if r.reason is Reason.INTERRUPTED]
        assert interrupted == ["T-9000"]


@pytest.mark.parametrize("at", [0, 24, 40, 20_000], ids=["header", "checksum", "frame", "middle"])
def test_a_damaged_log_ends_no_start_and_nothing_behind_the_damage_is_made_up(tmp_path: Path, at: int) -> None:
    (tmp_path / "killed").mkdir()
    with Outbox(tmp_path / "live", ["s"]) as outbox:
        for n in range(1, 40):
            outbox.append(result(n, detail="x" * 200))
        for name in ("outbox.db", "outbox.db-wal"):
            (tmp_path / "killed" / name).write_bytes((tmp_path / "live" / name).read_bytes())
    with (tmp_path / "killed" / "outbox.db-wal").open("r+b") as file:
        file.seek(at)
        file.write(b"\xde\xad" * 40)
    with Outbox(tmp_path / "killed", ["s"]) as outbox:
        before = outbox.head("s").hi
        assert [r.trigger_id for r in stored(outbox)] == [f"T-{n}" for n in range(1, before + 1)]
        assert outbox.append(result(100)).seq == before + 1


def test_a_trigger_whose_body_is_damaged_is_interrupted_like_any_other(whole: Path, tmp_path: Path) -> None:
    path = copied(whole, tmp_path)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE triggers SET body = CAST(x'ff00ff' AS TEXT) WHERE seq IS NULL")
    with Outbox(tmp_path, ["s"]) as outbox:
        last = stored(outbox)[-1]
        assert (last.trigger_id, last.reason) == ("T-9000", Reason.INTERRUPTED)


def test_a_crash_while_a_damaged_file_is_replaced_loses_nothing_that_was_taken_over(whole: Path, tmp_path: Path) -> None:
    copied(whole, tmp_path).rename(tmp_path / "outbox.new.db")  # set aside already, not in place yet
    with Outbox(tmp_path, ["s"]) as outbox:
        assert outbox.head("s").hi == RESULTS + 1
    (tmp_path / "outbox.new.db").write_bytes(b"half written")  # not set aside yet
    with Outbox(tmp_path, ["s"]) as outbox:
        assert outbox.head("s").hi == RESULTS + 1
    assert not (tmp_path / "outbox.new.db").exists()


def test_the_check_of_a_large_file_ends_in_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(sqlite3.connect(tmp_path / "large.db")) as connection:
        connection.execute("PRAGMA synchronous=OFF")
        connection.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, body BLOB)")
        fill = (
            "WITH n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 60000) "
            "INSERT INTO t SELECT i, randomblob(900) FROM n"
        )
        with connection:
            connection.execute(fill)
        assert database.fault_of(connection, limit_s=0.0) == ""
        assert "ended before its end" in caplog.text
        caplog.clear()
        assert database.fault_of(connection, limit_s=60.0) == ""
        assert not caplog.text
