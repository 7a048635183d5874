"""Pictures under a quota, by value; what is kept can be judged again."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edge_inspector import pictures
from edge_inspector.cameras.folder import broken_frame
from edge_inspector.cli import online
from edge_inspector.config import Device
from edge_inspector.errors import InspectorError
from edge_inspector.evidence import EXPLANATION, NEAR, EvidenceStore, frames_of, place_of
from edge_inspector.frames import Frame, frozen, utc_now
from edge_inspector.inspector import View
from edge_inspector.replay import replay, setup_in_force
from edge_inspector.results import BundleRef, EngineRef, Finding, Reason, Region, Result, Verdict
from tests.line import DaemonProcess, Listener, Mosquitto, device_folder, line_yaml, listening, loaded, until


def result(number: int, verdict: Verdict, ratio: float | None = 0.5) -> Result:
    now = utc_now()
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
        until(lambda: store.dropped == 1, what="told")
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


def failed_part(listener: Listener, device: Device) -> tuple[dict[str, Any], Path]:
    """The result of a part that fails, and where its frames are kept."""
    until(lambda: listener.of("ready", "sheet") and listener.of("ready", "sheet")[-1]["ready"], what="ready")
    for n in range(8):
        listener.say({"trigger_id": f"T-{n}"}, "trigger", "sheet")
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
    with pytest.raises(InspectorError, match="no result 'x-1'"):
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
