"""Disks that are full, and disks that fail: nothing accepted is lost, all that is dropped is told, and the line goes on.

Short by default; EDGE_INSPECTOR_LONG=1 runs the full counts (-s shows the figures).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path

from edge_inspector.outbox import Outbox
from edge_inspector.results import Reason, Verdict
from tests.faults.writer import Ledger, has_stored, reopened, writer
from tests.line import DaemonProcess, Listener, Mosquitto, listening, needed, subscribing, until
from tests.plant import Plant, drained, ready
from tests.test_outbox import result

LONG = bool(os.environ.get("EDGE_INSPECTOR_LONG"))
FULL_S = 30.0 if LONG else 4.0
IN_TIME = 0.9
"""Share of parts judged in time on a full disk; the rest are late passes, whose record waited for room beyond their expiry."""
STORED, FAILED = (10_000, 100) if LONG else (300, 5)
"""Accepted results, and commits that failed, of each of two lives on a failing disk: less would show nothing."""
AGAIN = "results wait in memory"
"""What the log says of a commit that failed."""


@contextmanager
def kept_full(folder: Path) -> Iterator[None]:
    """Another program takes every byte of the disk, and each that is given up, at once."""
    stop, path = threading.Event(), folder / "fill"

    def fill() -> None:
        with path.open("wb", buffering=0) as file:
            while not stop.wait(0.02):
                with contextlib.suppress(OSError):  # full, as it is meant to be
                    while True:
                        file.write(b"x" * 4096)

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        until(lambda: shutil.disk_usage(folder).free == 0, what="a full disk")
        yield
    finally:
        stop.set()
        thread.join()
        path.unlink()


def history(folder: Path) -> dict[int, Verdict]:
    """An outbox that is all but full, as after weeks: one part in ten failed. What it holds."""
    found: dict[int, Verdict] = {}
    with Outbox(folder, ["press"], quota_mb=4) as outbox:
        while outbox.counts.used < 0.78:
            batch = []
            for n in range(len(found) + 1, len(found) + 51):
                old = result(n, Verdict.FAIL if n % 10 == 0 else Verdict.PASS, "x" * 200, "press")
                batch.append(outbox.submit(old.model_copy(update={"trigger_id": f"old-{n}"})))
            found |= {stored.seq: stored.verdict for stored in (future.result(20) for future in batch)}
        assert not outbox.counts.dropped
    return found


def ranges(numbers: list[int]) -> list[tuple[int, int]]:
    """Sorted numbers as ranges from..to."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return [(run[0], run[-1]) for run in runs]


def small_plant(folder: Path, port: int, disk: Path) -> Plant:
    """A device that keeps its results on a small disk, 4 MB of them at most."""
    plant = Plant(folder, port)
    with (plant.device / "device.yaml").open("a") as file:
        file.write(f"storage: {{folder: {disk}, results_mb: 4, evidence_mb: 0}}\n")
    return plant


def kept_on(disk: Path) -> set[int]:
    """The numbers of the results that are still there."""
    with contextlib.closing(sqlite3.connect(disk / "outbox.db")) as database:
        return {seq for (seq,) in database.execute("SELECT seq FROM results")}


def check_drops(known: dict[int, Verdict], kept: set[int]) -> list[int]:
    """The oldest passes went, and nothing else. Returns what went."""
    missing = sorted(set(known) - kept)
    passed = [seq for seq, verdict in sorted(known.items()) if verdict is Verdict.PASS]
    assert missing, "nothing was dropped: this shows nothing"
    assert missing == passed[: len(missing)], "a fail, or a newer pass, was dropped while older passes were there"
    return missing


def head_is_final(listener: Listener, disk: Path, hi: int) -> bool:
    """Whether the last head was told after the last drop."""
    heads = listener.of("head", "press")
    omitted = heads[-1]["gaps_omitted"] + len(heads[-1]["gaps"])
    with contextlib.closing(sqlite3.connect(disk / "outbox.db")) as database:
        ((gaps,),) = database.execute("SELECT COUNT(*) FROM gaps WHERE hi >= ?", (heads[-1]["lo"],))
    return bool(heads[-1]["hi"] == hi and omitted == gaps)


def check_announced(listener: Listener, port: int, known: dict[int, Verdict], missing: list[int], earlier: int) -> None:
    """Head, health and a replay tell what is no more; who begins anew gets all the rest."""
    lowest = min(set(known) - set(missing))
    gaps = [(lo, hi) for lo, hi in ranges(missing) if lo > lowest]
    head = listener.of("head", "press")[-1]
    assert (head["hi"], head["lo"]) == (max(known), lowest)
    assert [tuple(gap) for gap in head["gaps"]] == gaps[-16:]
    assert head["gaps_omitted"] == len(gaps) - len(gaps[-16:])
    until(lambda: listener.of("health")[-1]["outbox"]["dropped"] == len(missing) - earlier, 15, "drops counted in health")
    with subscribing(port, "newcomer") as newcomer:
        found: list[int] = []

        def all_there() -> bool:
            found.extend(r.seq for r in newcomer.results(1.0))
            return bool(found) and found[-1] == max(known)

        until(all_there, 30, "all the rest")
        assert found == sorted(set(known) - set(missing))
        assert newcomer.skipped == sum(hi + 1 - lo for lo, hi in gaps)


def test_parts_get_verdicts_while_the_disk_is_full_and_only_old_passes_are_dropped_and_told(
    tmp_path: Path, mosquitto: Mosquitto, small_disk: Path
) -> None:
    before = history(small_disk)
    earlier = len(set(before) - kept_on(small_disk))  # dropped while the history was made, which health does not count
    plant = small_plant(tmp_path / "plant", mosquitto.port, small_disk)
    with (
        drained(mosquitto.port) as found, listening(mosquitto.port) as listener, DaemonProcess(plant.device) as daemon,
    ):  # fmt: skip
        ready(listener)

        def told(condition: Callable[[], object] = lambda: True) -> dict[str, str] | None:
            """What the line was told, once the condition holds; the listener takes what comes all the while."""
            verdicts = {verdict["trigger_id"]: verdict["verdict"] for verdict in listener.of("verdict", "press")}
            return verdicts if condition() else None

        with plant.parts(listener, 1 / 60) as sent:
            until(lambda: len(told() or ()) > 60, what="verdicts")
            with kept_full(small_disk):
                first = len(sent)
                until(lambda: told(lambda: len(sent) >= first + FULL_S * 40), 2 * FULL_S, "parts")
                last = len(sent)
            until(lambda: told(lambda: len(sent) >= last + 60), what="parts after it")
        until(lambda: told(lambda: {r.trigger_id for r in found} >= set(sent)), 30, "a record of every part")
        records = {r.trigger_id: r for r in found if r.trigger_id in set(sent)}
        # Of a pass that waited too long for the disk nothing is told: absence means not ok.
        late = {name for name, r in records.items() if r.reason is Reason.LATE}
        until(lambda: set(sent) <= late | set(told() or ()), what="a verdict for every part that was in time")
        verdicts = told() or {}
        assert daemon.process is not None
        assert daemon.process.poll() is None, "it ended"
        known = before | {r.seq: r.verdict for r in found}
        assert sorted(known) == list(range(1, max(known) + 1)), "a result that nobody got"
        until(lambda: not any(r["code"] == "outbox_failing" for r in listener.of("health")[-1]["reasons"]), what="health")
        until(lambda: head_is_final(listener, small_disk, max(known)), what="a head of all that is there")
        missing = check_drops(known, kept_on(small_disk))
        check_announced(listener, mosquitto.port, known, missing, earlier)
        assert daemon.stop() == 0
    assert {name: verdict for name, verdict in verdicts.items() if records[name].verdict.value != verdict} == {}
    during = [records[name] for name in sent[first:last]]
    decided = sum(r.verdict is not Verdict.UNDECIDED for r in during)
    failing = sum(any(r["code"] == "outbox_failing" for r in health["reasons"]) for health in listener.of("health"))
    print(f"\ndisk full for {len(during)} parts: {decided} passed or failed in time, {len(late)} passes late for their record; "
          f"health told so {failing} times; {len(missing)} results dropped, the oldest passes, all counted and told")  # fmt: skip
    assert decided >= IN_TIME * len(during), "a full disk stopped the line"


def test_a_disk_that_fails_one_sync_in_ten_loses_nothing_accepted(tmp_path: Path) -> None:
    """The first life is killed under these errors, the second one ends by itself; then the disk is a good one again."""
    needed(shutil.which("fiu-run"), "apt install fiu-utils")
    chances = {"sync/fdatasync": 0.1, "sync/fsync": 0.1, "rw/pwrite": 0.002}
    points = [f"enable_random name=posix/io/{name},probability={chance},failinfo=5" for name, chance in chances.items()]
    errors = [word for point in points for word in ("-c", point)]
    folder, log = tmp_path / "state", tmp_path / "log"
    ledgers = [tmp_path / name / "ledger" for name in ("killed", "ended")]
    for path in ledgers:
        path.parent.mkdir()
        process = writer(folder, path, path.parent.name, log, ["fiu-run", "-x", *errors])
        try:
            until(partial(has_stored, path, STORED, process), 300, "results")
            least = log.read_text().count(AGAIN) + FAILED  # right after one of them the process is killed
            until(lambda least=least: log.read_text().count(AGAIN) >= least, 300, "failures")  # type: ignore[misc]
            if path.parent.name == "ended":
                path.with_name("enough").touch()
                assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()
    found = reopened(folder)
    killed, ended = (Ledger(path) for path in ledgers)
    assert killed.missing(found) == []
    assert ended.missing(found) == []
    assert len(ended.stored) + ended.refused["result"] == ended.handed, "neither accepted nor refused"
    assert len(ended.taken) + ended.refused["trigger"] == ended.handed, "neither taken nor refused"
    failed = log.read_text().count(AGAIN)
    print(f"\n{failed} failed commits tried again; {len(killed.stored) + len(ended.stored)} results and "
          f"{len(killed.taken) + len(ended.taken)} triggers accepted, 0 missing; refused: {dict(killed.refused + ended.refused)}")  # fmt: skip
