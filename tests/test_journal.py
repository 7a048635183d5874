"""Trigger ids that come again: the same part is answered, another part gets a record of its own and is never told a pass."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from edge_inspector.errors import SchemaError
from edge_inspector.frames import Trigger, utc_now
from edge_inspector.messages import TriggerRequest, decode
from edge_inspector.outbox import Outbox
from edge_inspector.results import Reason, Result, Verdict
from edge_inspector.schema import validate
from tests.line import ENGINES, DaemonProcess, Mosquitto, device_folder, line_yaml, listening, until
from tests.test_daemon import ready
from tests.test_outbox import result, stored, trigger


def asked(part_id: str | None, product: str | None = None) -> Trigger:
    return replace(trigger(1), part_id=part_id, product=product)


def answered(outbox: Outbox, part: Trigger) -> tuple[bool, bool, tuple[Verdict, Reason] | None]:
    """Whether a trigger is new, whether its id is another part's, and the verdict that is told."""
    found = outbox.journal("s", part).result(5)
    told = decode(Result, found.result, "x") if found.result else None
    return found.new, found.reused, (told.verdict, told.reason) if told else None


PASS, REUSED = (Verdict.PASS, Reason.BELOW_THRESHOLD), (Verdict.UNDECIDED, Reason.TRIGGER_ID_REUSED)


def test_a_trigger_id_of_another_part_gets_one_record_of_its_own_and_a_repetition_its_answer(tmp_path: Path) -> None:
    with Outbox(tmp_path, ["s"]) as outbox:
        assert answered(outbox, asked("A-1")) == (True, False, None)
        assert answered(outbox, asked("A-1")) == (False, False, None), "not judged yet"
        assert answered(outbox, asked("B-2")) == (False, True, REUSED), "and not told A-1's, whatever that will be"
        outbox.append(result(1).model_copy(update={"part_id": "A-1", "product": "lid"}))
    with Outbox(tmp_path, ["s"]) as outbox:  # a restart: nothing of it was interrupted
        assert answered(outbox, asked("A-1")) == (False, False, PASS), "the product that was judged is none that was asked for"
        assert answered(outbox, asked("B-2")) == (False, False, REUSED)
        assert answered(outbox, asked("A-1", "lid")) == (False, True, REUSED)
        assert answered(outbox, asked(None)) == (False, True, REUSED)
        records = [(r.trigger_id, r.part_id, r.verdict.value) for r in stored(outbox)]
    assert records == [
        ("T-1", "B-2", "undecided"), ("T-1", "A-1", "pass"), ("T-1", "A-1", "undecided"), ("T-1", None, "undecided"),
    ]  # fmt: skip


def test_a_journal_of_an_earlier_release_is_taken_over(tmp_path: Path) -> None:
    with Outbox(tmp_path, ["s"]) as outbox:
        assert answered(outbox, asked("A-1"))[0]
        outbox.append(result(1).model_copy(update={"part_id": "A-1"}))
    connection = sqlite3.connect(tmp_path / "outbox.db")
    connection.execute("ALTER TABLE triggers DROP COLUMN asked")
    connection.close()
    with Outbox(tmp_path, ["s"]) as outbox:
        assert answered(outbox, asked("A-1")) == (False, False, PASS)
        assert answered(outbox, asked("B-2")) == (False, True, REUSED)


@pytest.mark.parametrize(
    "part_id",
    ["A 17", "Gehäuse №5", "零件 7", "\x1d0104012345678901\x1d2110", "[)>\x1e06\x1dP123\x1e\x04", "]C1010401", "x" * 128, "🙂"],
)
def test_a_part_id_is_what_a_scanner_reads(part_id: str) -> None:
    assert validate(TriggerRequest, {"trigger_id": "1", "part_id": part_id}, "x").part_id == part_id


@pytest.mark.parametrize(
    ("part_id", "words"),
    [
        ("a\x00b", "U\\+0000"), ("a\nb", "U\\+000A"), ("\x7f", "U\\+007F"), ("\u202egnp", "U\\+202E"), ("", "at least 1"),
        ("x" * 129, "at most 128"), (17, "must be a text"),
    ],
)  # fmt: skip
def test_what_no_scanner_reads_is_refused_by_name(part_id: Any, words: str) -> None:
    with pytest.raises(SchemaError, match=words):
        validate(TriggerRequest, {"trigger_id": "1", "part_id": part_id}, "x")


def test_a_counter_that_starts_again_leaves_a_record_for_each_part_and_passes_none(
    tmp_path: Path, mosquitto: Mosquitto
) -> None:
    uri = f"dir://{ENGINES / 'recording'}?loop=1"
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml(uri, expires_ms=3000))
    with listening(mosquitto.port) as listener, DaemonProcess(folder):
        ready(listener)

        def said(count: int, part: str) -> None:
            before = len(listener.of("verdict", "sheet"))
            for number in range(1, count + 1):
                listener.say({"trigger_id": str(number), "part_id": f"{part}{number}"}, "trigger", "sheet")
            until(lambda: len(listener.of("verdict", "sheet")) == before + count, what="verdicts")

        said(8, "first \x1d")
        said(8, "second \x1d")
        said(2, "second \x1d")  # truly again
        until(lambda: len(listener.of("result", "sheet")) == 16, what="a record of each part")
        records = {(r["trigger_id"], r["part_id"]): (r["verdict"], r["reason"]) for r in listener.of("result", "sheet")}
        assert len(records) == 16
        reused = ("undecided", "trigger_id_reused")
        assert {records[f"{n}", f"second \x1d{n}"] for n in range(1, 9)} == {reused}
        told = [(v["trigger_id"], v["part_id"], v["verdict"], v["repeated"]) for v in listener.of("verdict", "sheet")]
        assert told[8:16] == [(f"{n}", f"second \x1d{n}", "undecided", False) for n in range(1, 9)]
        assert told[16:] == [(f"{n}", f"second \x1d{n}", "undecided", True) for n in (1, 2)]
        until(lambda: any(a["code"] == "trigger_id_reused" for a in listener.of("alert", "sheet")), what="an alert")

        listener.say({"trigger_id": "bad", "part_id": "a\nb", "product": ""}, "trigger", "sheet")
        refused = until(lambda: [v for v in listener.of("verdict", "sheet") if v["trigger_id"] == "bad"], what="an answer")[0]
        assert (refused["verdict"], refused["reason"]) == ("undecided", "invalid_trigger")
        record = until(lambda: [r for r in listener.of("result", "sheet") if r["trigger_id"] == "bad"], what="its record")[0]
        assert "part_id: the character U+000A is not taken" in record["detail"]
        assert "product" in record["detail"]
        until(lambda: any(a["code"] == "bad_message" for a in listener.of("alert", "sheet")), what="an alert of it")

        passed = next(r["trigger_id"] for r in listener.of("result", "sheet") if r["verdict"] == "pass")
        expired = max(datetime.fromisoformat(v["expires_at"].replace("Z", "+00:00")) for v in listener.of("verdict", "sheet"))
        until(lambda: utc_now() > expired, what="the end of all verdicts")
        listener.heard.clear()
        listener.say({"trigger_id": passed, "part_id": f"first \x1d{passed}"}, "trigger", "sheet")
        late = until(lambda: listener.of("verdict", "sheet"), what="an answer")[-1]
        assert (late["verdict"], late["reason"], late["repeated"]) == ("undecided", "late", True)
