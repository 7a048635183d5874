"""Pictures under a quota, by value; what is kept can be judged again."""

from __future__ import annotations

import json
import os
import shutil
import time
from concurrent.futures import Future
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edge_inspector import pictures
from edge_inspector.access import Access
from edge_inspector.cameras.folder import broken_frame
from edge_inspector.cli import online
from edge_inspector.config import Device
from edge_inspector.errors import InspectorError
from edge_inspector.evidence import EXPLANATION, NEAR, EvidenceStore, _on_disk, frames_of, place_of
from edge_inspector.frames import Frame, frozen, utc_now
from edge_inspector.inspector import View
from edge_inspector.replay import records_of, replay, setup_in_force
from edge_inspector.results import BundleRef, EngineRef, Finding, Reason, Region, Result, Verdict
from tests.line import DaemonProcess, Listener, Mosquitto, device_folder, filled, line_yaml, listening, loaded, until


def result(number: int, verdict: Verdict, ratio: float | None = 0.5) -> Result:
    now = datetime(2026, 11, 25, 12, tzinfo=timezone.utc)  # a share is drawn by the part's name and time: the same ones always
    region = Region(x_px=1, y_px=2, w_px=3, h_px=4, area_px=12, peak=2.0)
    finding = Finding(
        camera="top", roi="all", verdict=verdict, reason=Reason.ABOVE_THRESHOLD, score=ratio, threshold=1.0, ratio=ratio,
        bundle=BundleRef(name="b", release=1, sha256="ab"), engine=EngineRef(runtime="x", precision="fp32"), regions=(region,),
    )  # fmt: skip
    return Result(
        station="s", trigger_id=f"T-{number}", verdict=verdict, reason=Reason.ABOVE_THRESHOLD, triggered_at=now,
        decided_at=now, expires_at=now + timedelta(seconds=1), findings=(finding,),
    )  # fmt: skip


def frames(seed: int, side: int = 64) -> dict[str, list[Frame]]:
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8)
    return {"top": [Frame(frozen(pixels), 0, 0.0, utc_now())]}


def view(of: Result, shown: dict[str, list[Frame]]) -> View:
    seen = shown["top"][0].image
    return View(of.findings[0], seen, (seen[:, :, 0] / 100).astype(np.float32), seen, (0, 0))


def kept(store: EvidenceStore, number: int, verdict: Verdict, ratio: float = 0.5, side: int = 64) -> Path | None:
    told, shown = result(number, verdict, ratio), frames(number, side)
    evidence = store.offer(told, shown, [view(told, shown)] if verdict is Verdict.FAIL else [])
    if evidence is None or not evidence.stored:
        return None
    return Path(until(lambda: place_of(store.folder, evidence.id), what="frames"))


def test_what_failed_was_undecided_or_nearly_failed_is_kept_without_loss_and_a_share_of_what_passed(tmp_path: Path) -> None:
    with EvidenceStore(tmp_path, quota_mb=64, passed=0.2) as store:
        failed = kept(store, 1, Verdict.FAIL, 1.5)
        assert failed is not None
        assert (failed / EXPLANATION).exists()
        (one,) = frames_of(failed)
        assert one.camera == "top"
        assert one.path is not None
        assert np.array_equal(pictures.read(one.path), frames(1)["top"][0].image)
        undecided = kept(store, 2, Verdict.UNDECIDED)
        near = kept(store, 3, Verdict.PASS, NEAR)
        assert [place.parent.name for place in (failed, undecided, near) if place] == ["failed", "undecided", "near"]
        passed = [kept(store, number, Verdict.PASS) for number in range(10, 210)]
        assert 20 <= sum(place is not None for place in passed) <= 60, "about a fifth"
        assert store.offer(result(500, Verdict.UNDECIDED), {}, []) is None, "no frames, nothing to keep"
    with EvidenceStore(tmp_path / "none", quota_mb=0, passed=1.0) as store:
        assert store.offer(result(1, Verdict.FAIL), frames(1), []) is None


def test_a_flood_of_one_kind_takes_nothing_from_the_shares_of_others(tmp_path: Path) -> None:
    with EvidenceStore(tmp_path, quota_mb=1, passed=1.0) as store:
        first = [kept(store, number, Verdict.PASS) for number in range(6)]
        assert all(first)
        failed = [kept(store, number, Verdict.FAIL, 1.5) for number in range(100, 160)]
        assert sum(path.stat().st_size for path in tmp_path.rglob("*.*")) <= 1 << 20
        assert all(place is not None and place.exists() for place in first), "86 kB of passed ones: within a tenth"
        assert failed[-1] is not None
        assert failed[-1].exists()
        assert failed[0] is not None
        assert not failed[0].exists(), "of what is above its share the oldest go"
        flood = [kept(store, number, Verdict.PASS) for number in range(200, 260)]
        assert flood[0] is not None
        assert not flood[0].exists()
        left = [place for place in failed if place is not None and place.exists()]
        assert store.used["failed"] > (1 << 20) * 0.4, f"{len(left)} left"
    with EvidenceStore(tmp_path, quota_mb=1, passed=1.0) as again:
        until(lambda: again.used == store.used, what="what is there, counted")


def test_what_a_kill_left_half_written_is_removed_and_a_part_larger_than_the_quota_takes_nothing(tmp_path: Path) -> None:
    half = tmp_path / "failed" / "0123"
    half.mkdir(parents=True)
    (half / "0-top.png").write_bytes(b"x" * 1000)
    with EvidenceStore(tmp_path, quota_mb=1, passed=1.0) as store:
        place = kept(store, 1, Verdict.PASS)
        assert not half.exists()
        told = store.offer(result(2, Verdict.FAIL), frames(2, side=800), [])
        assert told is not None
        until(lambda: store.lost == 1, what="told")
        again = store.offer(result(3, Verdict.FAIL), frames(3, side=800), [])
        assert again is not None
        assert not again.stored, "by now it is known"
        assert "more than storage.evidence_mb" in store.causes()[0].text
        assert place is not None
        assert place.exists()


def test_a_frame_that_came_broken_costs_no_other_part_its_pictures(tmp_path: Path) -> None:
    with EvidenceStore(tmp_path, quota_mb=64) as store:
        torn = {"top": [broken_frame(0, "7", "truncated")], "side": frames(1)["top"]}
        told = store.offer(result(1, Verdict.UNDECIDED, None), torn, [])
        assert told is not None
        place = until(lambda: place_of(tmp_path, told.id), what="frames")
        assert [(one.camera, one.path is None, one.fault) for one in frames_of(place)] == [
            ("top", True, "corrupt_image"), ("side", False, "")
        ]  # fmt: skip
        assert kept(store, 2, Verdict.FAIL, 1.5) is not None
    assert store.dropped == 0


def test_a_writer_that_is_behind_drops_and_the_result_says_so(tmp_path: Path) -> None:
    store = EvidenceStore(tmp_path, quota_mb=64)  # not entered: nobody writes
    told = [store.offer(result(number, Verdict.FAIL), frames(number), []) for number in range(20)]
    assert [one.stored for one in told if one is not None] == [True] * 16 + [False] * 4
    assert store.dropped == 4
    large = EvidenceStore(tmp_path, quota_mb=1024)
    told = [large.offer(result(number, Verdict.FAIL), frames(number, side=4000), []) for number in range(3)]
    assert [one.stored for one in told if one is not None] == [True, True, False], "48 MB each, 128 MB may wait"


def crowd(number: int) -> dict[str, list[Frame]]:
    """The frames of a part that no PNG makes smaller: 750 kB."""
    pixels = np.random.default_rng(number).integers(0, 255, (400, 400, 3), np.uint8)
    return {"top": [Frame(frozen(pixels), 0, 0.0, utc_now())], "side": [Frame(frozen(pixels[:200]), 0, 0.0, utc_now())]}


def whole(folder: Path) -> set[str]:
    return {path.parent.name for path in folder.glob("*/*/frames.json")}


def told_stored(store: EvidenceStore, numbers: range) -> set[str]:
    """The names of the parts of which the result says that pictures are stored."""
    told = set()
    for number in numbers:
        evidence = store.offer(result(number, Verdict.UNDECIDED), crowd(number), [])
        if evidence is not None and evidence.stored:
            told.add(evidence.id.removeprefix("sha256:")[:32])
        time.sleep(0.01)
    return told


def test_on_a_full_disk_only_what_is_written_is_told_as_stored_and_health_says_so_until_there_is_room(small_disk: Path) -> None:
    with EvidenceStore(small_disk / "evidence", quota_mb=64) as store:
        told = told_stored(store, range(30))
        until(lambda: whole(store.folder) == told, what="what was told")
        assert 3 <= len(told) < 10, "of 6 MB"
        assert store.dropped == 30 - len(told)
        assert [cause.code for cause in store.causes()] == ["evidence_not_kept"]
        assert "full" in store.causes()[0].text
        size = sum(_on_disk(path.stat().st_size) for path in store.folder.rglob("*.*"))
        assert sum(store.used.values()) == size, "all that is there is counted"
        assert shutil.disk_usage(small_disk).free > (6 << 20) // 20, "the results keep some room"
        for place in list(store.folder.glob("*/*"))[:2]:
            shutil.rmtree(place)
        until(lambda: not store.causes(), what="room again")
        again = told_stored(store, range(100, 101))
        assert again
        until(lambda: again <= whole(store.folder), what="kept again")
    assert store.lost == 0


def test_a_disk_that_somebody_fills_after_a_part_was_told_as_stored_leaves_no_half_and_says_what_is_lost(
    small_disk: Path,
) -> None:
    store = EvidenceStore(small_disk / "evidence", quota_mb=64)
    told = told_stored(store, range(2))  # not entered: they wait
    assert len(told) == 2
    fill = filled(small_disk)
    with store:
        until(lambda: store.lost == 2, what="told")
        assert not list(store.folder.glob("*/*"))
        assert "2 parts" in store.causes()[0].text
        refused = store.offer(result(5, Verdict.UNDECIDED), crowd(5), [])
        assert refused is not None
        assert not refused.stored
        fill.unlink()
        until(lambda: not store.failing, what="room again")
        assert told_stored(store, range(9, 10))


def test_nobody_else_reads_the_pictures_but_a_group_that_is_named_also_those_of_before(tmp_path: Path) -> None:
    group = 65533
    folder = tmp_path / "evidence"
    before = os.umask(0o022)
    try:
        for access, modes in ((Access(), (0o700, 0o600)), (Access(group), (0o750, 0o640)), (Access(), (0o700, 0o600))):
            with EvidenceStore(folder, quota_mb=64, access=access) as store:
                until(lambda store=store: sum(len(kept) for kept in store._kept.values()) == len(whole(folder)), what="a look")  # type: ignore[misc]
                assert kept(store, len(whole(folder)), Verdict.FAIL, 1.5) is not None
                for path in (folder, *folder.rglob("*")):
                    found = path.stat()
                    assert found.st_mode & 0o777 == modes[0 if path.is_dir() else 1], path
                    assert access.group is None or found.st_gid == group or os.geteuid()
    finally:
        os.umask(before)
    assert len(whole(folder)) == 3


def test_the_picture_of_a_failed_part_tells_part_time_score_threshold_and_result(tmp_path: Path) -> None:
    named: Future[str] = Future()
    failed = result(1, Verdict.FAIL, 1.37).model_copy(update={"part_id": "Teil-ä"})
    with EvidenceStore(tmp_path, quota_mb=64) as store:
        evidence = store.offer(failed, frames(1), [view(failed, frames(1))], named)
        named.set_result("s7k2-42")
        assert evidence is not None
        place = until(lambda: place_of(tmp_path, evidence.id), what="its pictures")
    (shown,) = [pictures.read(place / EXPLANATION)]
    captions = "s  part Teil-ä  trigger T-1\nfail: above_threshold  2026-11-25T12:00:00.000Z"
    captions += "\ntop, all: score 1.37, threshold 1  result s7k2-42"
    looked = view(failed, frames(1))
    expected = pictures.explanation(looked.seen, looked.anomaly, 1.0, failed.findings[0].regions, looked.expected, captions)
    assert shown.shape == expected.shape
    assert np.abs(shown[:70].astype(int) - expected[:70]).mean() < 3, "this text, and no other"


def failed_part(listener: Listener, device: Device) -> tuple[dict[str, Any], Path]:
    """The result of a part that fails, and where its frames are kept."""
    until(lambda: listener.of("ready", "sheet") and listener.of("ready", "sheet")[-1]["ready"], what="ready")
    for n in range(8):
        listener.say({"trigger_id": f"T-{n}", "part_id": f"P-{n}"}, "trigger", "sheet")
    found = until(lambda: [r for r in listener.of("result", "sheet") if r["verdict"] == "fail"], what="a part that fails")[0]
    return found, until(lambda: place_of(device.state / "evidence", found["evidence"]["id"]), what="its frames")


def test_a_result_is_replayed_and_every_difference_explained(
    tmp_path: Path, mosquitto: Mosquitto, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml())
    with listening(mosquitto.port) as listener, DaemonProcess(folder):
        device = loaded(folder)
        failed, _ = failed_part(listener, device)
        same = replay(device, failed["result_id"])  # beside the running daemon
        assert same.is_same
        assert same.reasons == ()
        listener.say({"trigger_id": "again", "part_id": failed["part_id"]}, "trigger", "sheet")
        until(lambda: [r for r in listener.of("result", "sheet") if r["trigger_id"] == "again"], what="the same part again")
        *earlier, newest = records_of(device, failed["part_id"])
        assert [r.result_id for r in earlier] == [failed["result_id"]]
        assert newest.trigger_id == "again"
        assert replay(device, failed["trigger_id"]).then.result_id == failed["result_id"]
    text = (folder / "line.yaml").read_text()
    (folder / "line.yaml").write_text(text.replace("{bundle: paper}", "{bundle: paper, threshold: 1000000}"))
    with pytest.raises(SystemExit) as ended:
        _exits(online.replay, failed["result_id"], folder / "device.yaml", as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert ended.value.code == 1
    assert (told["then"]["verdict"], told["now"]["verdict"]) == ("fail", "pass")
    assert "recipe whole has changed" in told["reasons"][0]
    assert "threshold" in told["reasons"][1]
    assert "1e+06 now" in told["reasons"][1]
    with pytest.raises(InspectorError, match="no result, part or trigger 'x-1'"):
        replay(device, "x-1")
    (folder / "line.yaml").write_text(text.replace("whole", "other"))
    with pytest.raises(InspectorError, match="recipe whole of station sheet is not in"):
        replay(device, failed["result_id"])
    assert set(setup_in_force(device).line.recipes) == {"other"}


def _exits(verb: object, *arguments: object, **options: object) -> None:
    import typer

    try:
        verb(*arguments, **options)  # type: ignore[operator]
    except typer.Exit as ended:
        raise SystemExit(ended.exit_code) from ended


def test_another_score_by_the_same_network_is_no_harmless_difference(tmp_path: Path, mosquitto: Mosquitto) -> None:
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml())
    with listening(mosquitto.port) as listener, DaemonProcess(folder):
        device = loaded(folder)
        failed, place = failed_part(listener, device)
    (frame,) = frames_of(place)
    assert frame.path is not None
    pictures.write(frame.path, cv2.GaussianBlur(pictures.read(frame.path), (9, 9), 3))
    again = replay(device, failed["result_id"])
    assert any("not what it saw then" in reason for reason in again.reasons)
