"""Bundles rolled out over MQTT: the daemon as a process, a real Mosquitto, real ONNX Runtime on a network of a page."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_inspector import bundles, health, signatures
from edge_inspector.frames import utc_now
from tests.line import DaemonProcess, Mosquitto, listening, until
from tests.plant import Plant, drained, ended, ready, releases, reported, want
from tests.test_remote import edge, edge_json
from tests.tiny import graph


def test_a_release_comes_into_force_between_two_parts_and_stays(tmp_path: Path, mosquitto: Mosquitto) -> None:
    plant = Plant(tmp_path, mosquitto.port)
    source = plant.release(2, threshold=0.55)
    with drained(mosquitto.port) as found, listening(mosquitto.port) as listener, DaemonProcess(plant.device) as daemon:
        ready(listener)
        with plant.parts(listener) as sent:
            want(listener, 2, source, confirm_parts=40)
            told = ended(listener, 2, "committed")
            time.sleep(1.0)
        until(lambda: len(found) == len(sent), what="all results")
        assert [r.trigger_id for r in found] == sent, "each trigger one result, in order"
        assert {r.reason.value for r in found} == {"above_threshold", "below_threshold"}, "none was missed at the swap"
        assert releases(found) == sorted(releases(found))
        assert set(releases(found)) == {1, 2}
        assert {(r.findings[0].bundle.release, r.findings[0].threshold) for r in found} == {(1, 0.5), (2, 0.55)}
        assert (told["release"], told["good_release"], told["source"], told.get("trial")) == (2, 2, "remote", None)
        assert told["shadow"]["parts"] >= 12
        assert told["shadow"]["disagreements"] == 0
        assert [e["outcome"] for e in told["history"]] == ["trial", "committed"]
        phases = [r["phase"]["name"] for r in listener.of("bundle", "tiny", "reported") if r.get("phase")]
        assert phases == sorted(phases, key=("fetch", "verify", "build", "samples", "shadow").index)
        shutil.rmtree(source)
        daemon.kill()
        daemon.start()
        ready(listener)
        until(lambda: listener.of("result", "press")[-1]["trigger_id"] == sent[-1], what="results again")
        listener.say({"trigger_id": "after"}, "trigger", "press")
        last = until(
            lambda: next((r for r in listener.of("result", "press") if r["trigger_id"] == "after"), None), what="a result"
        )
        assert last["findings"][0]["bundle"]["release"] == 2, "after a kill, from what was kept on the device"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bad_bundles_are_refused_and_the_line_goes_on(tmp_path: Path, mosquitto: Mosquitto) -> None:
    plant = Plant(tmp_path, mosquitto.port, expires_ms=1000)
    numbers = itertools.count(10)

    def fresh(**changes: Any) -> tuple[int, Path]:
        number = next(numbers)
        return number, plant.release(number, **changes)

    def network(change: Callable[[onnx.ModelProto], None]) -> tuple[int, Path]:
        """A release whose graph is another one, signed by a key that is trusted."""
        number, folder = fresh()
        model = onnx.load_from_string(graph())
        change(model)
        (folder / "network.onnx").write_bytes(model.SerializeToString())
        entries = {name: entry.model_dump() for name, entry in bundles.file_entries(folder).items()}
        return number, plant.resigned(folder, files=entries)

    def foreign(model: onnx.ModelProto) -> None:
        model.graph.node[0].domain = "com.example"

    def outside(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="/etc/passwd")

    def slow(model: onnx.ModelProto) -> None:
        """Thousands of times what it needs: large products of matrices, which nothing can compute beforehand."""
        del model.graph.output[1:]
        model.graph.output.append(helper.make_tensor_value_info("map", TensorProto.FLOAT, ["N", 8, 8]))
        big = numpy_helper.from_array(np.full((1200, 1200), 1e-9, np.float32), "big")
        model.graph.initializer.append(big)
        model.graph.node.append(helper.make_node("ReduceMax", ["pixels"], ["top"], keepdims=0, name="/top"))
        model.graph.node.append(helper.make_node("Mul", ["big", "top"], ["m"], name="/m"))
        names = ["m", *(f"m{n}" for n in range(10))]
        for before, after in itertools.pairwise(names):
            model.graph.node.append(helper.make_node("MatMul", [before, "big"], [after], name=f"/{after}"))
        model.graph.node.append(helper.make_node("ReduceMax", [names[-1]], ["much"], keepdims=0, name="/much"))
        for node in model.graph.node:
            node.output[:] = ["bare" if name == "score" else name for name in node.output]
        model.graph.node.append(helper.make_node("Add", ["bare", "much"], ["score"], name="/score"))

    unsigned = fresh()
    (unsigned[1] / "signature").unlink()
    foreigner = fresh()
    signatures.create_key(tmp_path / "other.key", tmp_path / "nowhere")
    bundles.sign(foreigner[1], signatures.read_private_key(tmp_path / "other.key"))
    changed = fresh()
    (changed[1] / "manifest.json").write_text(
        (changed[1] / "manifest.json").read_text().replace('"threshold": 0.5', '"threshold": 5')
    )
    oversize = fresh()
    with (oversize[1] / "network.onnx").open("ab") as file:
        file.write(b"x")
    older = fresh()
    plant.resigned(older[1], release=1)
    climbing = fresh()
    manifest = json.loads((climbing[1] / "manifest.json").read_text())
    plant.resigned(climbing[1], files={"../../escape": manifest["files"]["network.onnx"], **manifest["files"]})
    expired = fresh()
    plant.resigned(expired[1], not_after=(utc_now() - timedelta(days=1)).isoformat())
    elsewhere = fresh(scope=("plant/line/other", "plant/li"))
    later = fresh()
    plant.resigned(later[1], min_version="99.0.0")
    cases = {
        "not signed": unsigned, "not trusted": foreigner, "does not fit the content": changed,
        "not what the manifest says": oversize, "holds release 1": older, "not a plain name": climbing, "is for plant/line/other": elsewhere,
        "needs edge-inspector 99": later, "com.example": network(foreign), "keeps tensors in other files": network(outside),
        "sample-140.png scores": fresh(weight=0.5), "its network": network(slow),
    }  # fmt: skip
    if health.clock().ok:
        cases["expired"] = expired
    with drained(mosquitto.port) as found, listening(mosquitto.port) as listener, DaemonProcess(plant.device) as daemon:
        ready(listener)
        with plant.parts(listener, 0.05) as sent:
            for why, (number, source) in cases.items():
                want(listener, number, source)
                told = ended(listener, number, "rejected", "refused", timeout_s=60.0)
                assert why in told["last"]["reason"], (why, told["last"])
                assert (told["release"], told.get("trial")) == (1, None)
            want(listener, 1, plant.made / "tiny")
            ended(listener, 1, "stale")
        until(lambda: len(found) == len(sent), what="all results")
        assert set(releases([r for r in found if r.findings])) == {1}
        assert {r.trigger_id for r in found} == set(sent)
        judged = sum(r.verdict.value != "undecided" for r in found)
        assert judged > 0.9 * len(found), "a build beside may cost a part its time, not the line"
        assert not (tmp_path / "escape").exists()
        assert not [p for p in (plant.device / "state" / "bundles" / "tiny").iterdir() if p.is_dir()], "their files are removed"
        assert "Traceback" not in daemon.log


def test_a_release_that_judges_otherwise_is_refused_with_the_parts_it_differs_on(tmp_path: Path, mosquitto: Mosquitto) -> None:
    plant = Plant(tmp_path, mosquitto.port)
    source = plant.release(2, threshold=0.05, levels=(130, 220))
    with listening(mosquitto.port) as listener, DaemonProcess(plant.device):
        ready(listener)
        with plant.parts(listener):
            want(listener, 2, source)
            told = ended(listener, 2, "rejected")
    shadow = told["shadow"]
    assert f"{shadow['disagreements']} of {shadow['parts']} parts are judged differently" in told["last"]["reason"]
    assert shadow["latest"]
    for one in shadow["latest"]:
        assert (one["old"], one["new"]) == ("pass", "fail")
        kept = (
            plant.device
            / "state"
            / "evidence"
            / "failed"
            / one["evidence"]["id"].removeprefix("sha256:")[:32]
            / "explanation.jpg"
        )
        until(kept.exists, what="a picture")


def test_a_release_that_fails_most_parts_on_trial_is_rolled_back(tmp_path: Path, mosquitto: Mosquitto) -> None:
    plant = Plant(tmp_path, mosquitto.port)
    source = plant.release(2, threshold=0.01, levels=(129, 220))
    with drained(mosquitto.port) as found, listening(mosquitto.port) as listener, DaemonProcess(plant.device):
        ready(listener)
        with plant.parts(listener, 0.05) as sent:
            want(listener, 2, source, shadow_parts=0)
            ended(listener, 2, "trial")
            told = ended(listener, 2, "rolled_back", timeout_s=60)
            time.sleep(1.0)
        until(lambda: len(found) == len(sent), what="all results")
    assert "parts fail" in told["last"]["reason"]
    assert (told["release"], told["good_release"], told["seen"]) == (1, 1, 2)
    order = [release for release, _ in itertools.groupby(releases(found))]
    assert order == [1, 2, 1]
    assert {r.reason.value for r in found} == {"above_threshold", "below_threshold"}


def test_one_thing_at_a_time_and_a_person_may_confirm_cancel_and_reset(tmp_path: Path, mosquitto: Mosquitto) -> None:
    plant = Plant(tmp_path, mosquitto.port)

    def decide(version: int, action: str) -> None:
        listener.say({"by": "ben", "version": version, "action": action}, "bundle", "tiny", "confirm")

    with listening(mosquitto.port) as listener, DaemonProcess(plant.device):
        ready(listener)
        want(listener, 2, plant.release(2))
        until(lambda: (reported(listener).get("phase") or {}).get("name") == "shadow", what="shadow")
        line = {"by": "anna", "line": {"schema": "ei.line.v1"}}
        listener.say(line, "config", "desired", retain=True)
        until(
            lambda: (listener.of("config", "reported")[-1].get("last") or {}).get("faults"), what="faults of the document first"
        )
        decide(2, "cancel")
        told = ended(listener, 2, "cancelled")
        assert told["last"]["reason"] == "during shadow"
        want(listener, 3, plant.release(3), shadow_parts=0)
        ended(listener, 3, "trial")
        for _ in range(20):
            decide(3, "confirm")
            time.sleep(0.5)
            if reported(listener)["last"]["outcome"] == "committed":
                break
        assert reported(listener)["source"] == "remote"
        decide(3, "reset")
        told = ended(listener, 1, "reset")
        assert (told["source"], told["release"], told["seen"]) == ("local", 1, 3)

        def judged() -> list[int]:
            listener.say({"trigger_id": f"T-{time.monotonic()}"}, "trigger", "press")
            time.sleep(0.2)
            return [r["findings"][0]["bundle"]["release"] for r in listener.of("result", "press") if r["findings"]]

        assert set(until(judged, what="a part that is judged")) == {1}
        listener.say({"by": "x", "bundle": "glass", "release": 2, "source": "/x"}, "bundle", "glass", "desired", retain=True)
        until(lambda: any("no station judges with it" in a["text"] for a in listener.of("alert")), what="an alert")


def test_people_roll_a_release_out_and_see_how_far_it_is(tmp_path: Path, mosquitto: Mosquitto) -> None:
    plant = Plant(tmp_path, mosquitto.port)
    there = ("--device", "plant/line/edge", "--broker", f"127.0.0.1:{mosquitto.port}", "--config", tmp_path / "none.yaml")
    source = plant.release(2)
    with listening(mosquitto.port) as listener, DaemonProcess(plant.device):
        ready(listener)
        with plant.parts(listener):
            told = edge("rollout", source, *there, "--shadow-parts", "15")
            assert "parts: 0 judged differently" in told
            assert "edge-inspector remote confirm --bundle tiny" in told
            assert "has seen releases up to 2" in edge("rollout", source, *there, code=2)
            assert "committed" in edge("remote", "confirm", "--bundle", "tiny", *there)
            assert edge_json("remote", "show", "--bundle", "tiny", "--json", *there)["release"] == 2
            assert "bundle/tiny: version 2, remote" in edge("remote", "show", "--bundle", "tiny", *there)
            assert "the device's own" in edge("remote", "reset", "--bundle", "tiny", "--yes", *there)
            bad = plant.release(3)
            (bad / "signature").unlink()
            assert "not signed" in edge("rollout", bad, *there, code=2), "said before it is sent"
            bundles.sign(bad, signatures.read_private_key(plant.made / "keys" / "signing.key"))
            (bad / "report.html").write_bytes(b"x")
            assert "does not list" in edge("rollout", bad, *there, code=2)
            (bad / "report.html").unlink()
            signatures.create_key(tmp_path / "other.key", tmp_path / "nowhere")
            bundles.sign(bad, signatures.read_private_key(tmp_path / "other.key"))
            assert "not trusted" in edge("rollout", bad, *there, code=1), "only the device knows whom it trusts"
            with_keys = (*there[:-1], plant.device / "device.yaml")
            assert "not trusted" in edge("rollout", bad, *with_keys, code=2), "here they are known"
            bundles.sign(bad, signatures.read_private_key(plant.made / "keys" / "signing.key"))
            assert "parts: 0 judged differently" in edge("rollout", bad, *there, "--shadow-parts", "15")
    assert "No such file" in edge("rollout", tmp_path / "nothing", *there, code=2)
