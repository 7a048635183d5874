"""Building, keeping, refusing engines, and the daemon on them: all real but the GPU and TensorRT, which are stand-ins."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_inspector.results import Reason, Verdict
from tests.line import DaemonProcess, Mosquitto, collected, device_folder, listening, subscribing, until
from tests.nvidia.parts import environment

pytest.importorskip("onnx", reason='onnx is not installed: pip install "edge-inspector[tensorrt]"')

from edge_inspector import bundles, pictures, signatures
from tests.tiny import picture, tiny_bundle

ENGINE = "engine: {runtime: tensorrt}\n"
LINE = """\
schema: ei.line.v1
stations:
  sheet:
    trigger: software
    expires_ms: 20000
    product: tiny
    products: {tiny: two}
    cameras:
      left: {uri: "dir://left"}
      right: {uri: "dir://right"}
recipes:
  two:
    cameras:
      left: {rois: {all: {bundle: tiny}}}
      right: {rois: {all: {bundle: tiny}}}
"""


@pytest.fixture
def device(tmp_path: Path, driver: Path) -> Path:
    """A device folder with a bundle of its own, for two cameras."""
    tiny_bundle(tmp_path / "made")
    folder = device_folder(tmp_path / "device", 1, LINE, extra=ENGINE)
    settings = (folder / "device.yaml").read_text().splitlines()
    kept = [line for line in settings if not line.startswith(("trust", "bundles"))]
    (folder / "device.yaml").write_text("\n".join([*kept, "trust: trust", "bundles: bundles"]) + "\n")
    shutil.copytree(tmp_path / "made" / "trust", folder / "trust")
    shutil.copytree(tmp_path / "made" / "tiny", folder / "bundles" / "tiny")
    for camera, levels in (("left", (140, 220, 140, 140)), ("right", (140, 140, 230, 140))):
        (folder / camera).mkdir()
        for number, level in enumerate(levels):
            pictures.write(folder / camera / f"{number}.png", picture(level))
    return folder


def built(driver: Path, folder: Path, *options: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edge_inspector.cli", "build", "tiny", "--config", str(folder / "device.yaml"), "--json", *options],
        env=environment(driver, **more), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def files(folder: Path, suffix: str) -> list[Path]:
    return sorted((folder / "state" / "engines").glob(f"*.{suffix}"))


def test_the_contract_of_every_engine_holds_for_this_one(driver: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rs", "tests/test_preprocess.py", "-k", "keeps_its_buffers"],
        env=environment(driver), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert "2 passed" in done.stdout, done.stdout


def test_an_engine_is_built_once_with_a_record_that_says_what_it_is(device: Path, driver: Path) -> None:
    first = built(driver, device)
    assert first.returncode == 0, first.stderr
    record = json.loads(first.stdout)
    assert (record["tensorrt"], record["gpu"], record["compute_capability"]) == ("10.3.0", "no GPU", "8.7")
    assert (record["precision"], record["batch"], record["refused"]) == ("fp16", 2, "")
    assert record["parity"]["frames"] == 200
    assert record["parity"]["flips"] == 0
    assert (device / "state" / "engines").stat().st_mode & 0o777 == 0o700
    before = files(device, "engine")[0].stat().st_mtime_ns
    again = built(driver, device)
    assert json.loads(again.stdout)["built_at"] == record["built_at"]
    assert files(device, "engine")[0].stat().st_mtime_ns == before
    assert len(files(device, "cache")) == 1
    assert json.loads(built(driver, device, "--again").stdout)["built_at"] != record["built_at"]


def test_bench_tells_the_gpus_stages_beside_onnx_runtime(device: Path, driver: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edge_inspector.cli", "bench", str(device / "bundles" / "tiny"), "--config",
         str(device / "device.yaml"), "--rounds", "10", "--json"],
        env=environment(driver), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    gpu, cpu = json.loads(done.stdout)["runs"]
    assert (gpu["runtime"], gpu["precision"], cpu["runtime"]) == ("tensorrt", "fp16", "onnxruntime")
    assert list(gpu["stages"]) == [
        "preprocess", "infer", "total", "infer: upload", "infer: network alone", "infer: download",
    ]  # fmt: skip
    assert list(cpu["stages"]) == ["preprocess", "infer", "total"]


def why(device: Path, driver: Path, **more: str) -> str:
    """What the daemon's log would say of a build."""
    code = (
        "import logging, sys; logging.basicConfig(level=logging.INFO); from pathlib import Path\n"
        "from edge_inspector.bundles import open_bundle; from edge_inspector.runtime import Workshop\n"
        "folder = Path(sys.argv[1]); bundle = open_bundle(folder / 'bundles/tiny', folder / 'trust')\n"
        "Workshop(folder / 'state/engines', folder / 'trust').engine(bundle, 'auto', 2)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(device)], env=environment(driver, **more), capture_output=True,
                          text=True, timeout=120, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_what_does_not_fit_any_more_is_built_again_and_the_log_says_why(device: Path, driver: Path) -> None:
    assert "building the fp16 engine of bundle tiny: there is none yet" in why(device, driver)
    assert why(device, driver) == ""
    newer = why(device, driver, STAND_IN_VERSION="10.16.1")
    assert "changed since the last one: TensorRT (10.3.0, now 10.16.1)" in newer
    assert why(device, driver) == "", "the engine of the other version is kept: a rollback needs no build"
    for path in files(device, "engine"):
        path.write_bytes(path.read_bytes()[:-1])
    assert "the engine's file is damaged" in why(device, driver)
    for path in files(device, "engine"):
        path.unlink()
    assert "the engine cannot be read (No such file or directory)" in why(device, driver)
    for path in files(device, "json"):
        path.write_text("{")
    assert "its record is damaged" in why(device, driver)


def test_an_engine_that_judges_otherwise_is_refused_once_and_not_built_again(device: Path, driver: Path) -> None:
    first = built(driver, device, STAND_IN_FAULT="off")
    assert first.returncode == 2
    assert "its engine was refused: bundle tiny, fp16: bundle tiny: sample-" in first.stderr
    assert "hint" in first.stderr
    assert files(device, "engine") == []
    written = files(device, "json")[0].stat().st_mtime_ns
    assert "its engine was refused" in built(driver, device).stderr
    assert files(device, "json")[0].stat().st_mtime_ns == written
    assert built(driver, device, "--again").returncode == 0


def test_a_new_release_of_the_same_network_is_compared_anew(device: Path, driver: Path) -> None:
    assert "there is none yet" in why(device, driver)
    changed = bundles.open_bundle(device / "bundles" / "tiny", device / "trust").manifest.model_copy(update={"release": 2})
    bundles.write_manifest(device / "bundles" / "tiny", changed)
    bundles.sign(device / "bundles" / "tiny", signatures.read_private_key(device.parent / "made" / "keys" / "signing.key"))
    assert "changed since the last one: the bundle (" in why(device, driver)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("crash", "the build ended with signal SIGABRT"),
        ("refuse", "TensorRT built no engine: Could not find any implementation for node /backbone/stem"),
    ],
)
def test_a_build_that_fails_says_so_and_leaves_nothing(device: Path, driver: Path, fault: str, words: str) -> None:
    done = built(driver, device, STAND_IN_FAULT=fault)
    assert done.returncode == 2
    assert words in done.stderr
    assert files(device, "engine") == []
    assert built(driver, device).returncode == 0


@pytest.mark.parametrize(("fault", "words"), [("hang", "took more than 6 s"), ("hog", "took too much memory: ")])
def test_a_build_that_takes_too_much_is_ended(device: Path, driver: Path, fault: str, words: str) -> None:
    code = (
        "import sys; from pathlib import Path; from edge_inspector.bundles import open_bundle\n"
        "from edge_inspector.runtime.build import Limits, Workshop\n"
        "folder = Path(sys.argv[1]); bundle = open_bundle(folder / 'bundles/tiny', folder / 'trust')\n"
        "limits = Limits(seconds=6, memory_mb=500)\n"
        "try: Workshop(folder / 'state/engines', folder / 'trust', limits=limits).engine(bundle, 'auto', 2)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(device)], env=environment(driver, STAND_IN_FAULT=fault),
                          capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
    assert "EngineError" in done.stdout, done.stderr
    assert words in done.stdout


def test_a_fault_on_the_way_is_no_refusal(device: Path, driver: Path, tmp_path: Path) -> None:
    dropped = built(driver, device, STAND_IN_FAULT="dropped")
    assert "TensorRT did not run it" in dropped.stderr
    (tmp_path / "lost").touch()
    lost = built(driver, device, FAKE_CUDA_LOST=str(tmp_path / "lost"))
    assert "the GPU failed" in lost.stderr
    assert files(device, "json") == []
    assert built(driver, device, STAND_IN_FAULT="chatty").returncode == 0


def test_a_bundle_that_cannot_be_compared_is_refused_once(device: Path, driver: Path) -> None:
    other = tiny_bundle(device / "other", threshold=5.0, levels=(140,))
    shutil.rmtree(device / "bundles" / "tiny")
    shutil.copytree(other.folder, device / "bundles" / "tiny")
    shutil.rmtree(device / "trust")
    shutil.copytree(device / "other" / "trust", device / "trust")
    first = built(driver, device)
    assert "0 of 200 frames near its threshold could be made" in first.stderr
    assert "building" in first.stderr
    again = built(driver, device)
    assert again.returncode == 2
    assert "building" not in again.stderr


def test_the_folder_holds_what_is_used_and_belongs_to_who_uses_it(device: Path, driver: Path) -> None:
    engines = device / "state" / "engines"
    engines.mkdir(parents=True)
    for name in ("old.engine", "old.json.part", "timing-0.cache"):
        (engines / name).write_bytes(b"x")
    if os.geteuid() == 0:
        os.chown(device / "state", 65534, 65534)
    assert built(driver, device).returncode == 0
    assert {path.suffix for path in engines.iterdir()} == {"", ".engine", ".json", ".cache"}
    assert len(list(engines.iterdir())) == 4
    assert {path.stat().st_uid for path in [engines, *engines.iterdir()]} == {(device / "state").stat().st_uid}


# --- the daemon


@pytest.fixture
def line(device: Path, mosquitto: Mosquitto) -> Path:
    settings = (device / "device.yaml").read_text().replace("port: 1,", f"port: {mosquitto.port},")
    (device / "device.yaml").write_text(settings)
    return device


@pytest.fixture
def daemon_environment(driver: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    yield environment(driver, FAKE_CUDA_LOST=str(tmp_path / "lost"))


def test_cameras_of_a_part_are_judged_together_and_a_lost_gpu_costs_one_part(
    line: Path, mosquitto: Mosquitto, tmp_path: Path, daemon_environment: dict[str, str]
) -> None:
    with listening(mosquitto.port) as listener, subscribing(mosquitto.port) as subscriber:
        with DaemonProcess(line, daemon_environment) as daemon:
            until(lambda: any(m["ready"] for m in listener.of("ready", "sheet")), 60, "station ready")
            told = [m["reason"] for m in listener.of("ready", "sheet")]
            assert any("building the engine of bundle tiny" in reason for reason in told)
            until(lambda: any(m["engines"] for m in listener.of("state")), what="engines told")
            runs = listener.of("state")[-1]["engines"]["tiny"]
            assert (runs["runtime"], runs["precision"], runs["instead"], runs["release"]) == ("tensorrt", "fp16", "", 1)
            for number in range(3):
                listener.say({"trigger_id": f"T-{number}"}, "trigger", "sheet")
            first = collected(subscriber, 3)
            assert [result.verdict for result in first] == [Verdict.PASS, Verdict.FAIL, Verdict.FAIL]
            assert [f.camera for f in first[1].findings if f.verdict is Verdict.FAIL] == ["left"]
            assert {f.engine.runtime for result in first for f in result.findings} == {"tensorrt"}
            (tmp_path / "lost").touch()
            listener.say({"trigger_id": "T-3"}, "trigger", "sheet")
            process = daemon.process
            assert process is not None
            assert process.wait(20) == 2, daemon.log
            assert "the GPU failed: " in daemon.log
        (tmp_path / "lost").unlink()
        with DaemonProcess(line, daemon_environment):
            lost = collected(subscriber, 2)[-1]  # a result is had once the next is asked for: T-2 comes again
            assert (lost.trigger_id, lost.verdict, lost.reason) == ("T-3", Verdict.UNDECIDED, Reason.ENGINE_FAULT)
            until(lambda: listener.of("ready", "sheet")[-1]["ready"], 60, "station ready again")
            listener.say({"trigger_id": "T-4"}, "trigger", "sheet")
            assert collected(subscriber, 2)[-1].verdict is Verdict.PASS


def test_the_cpu_stands_in_only_where_the_configuration_says_so_and_it_is_told(
    line: Path, mosquitto: Mosquitto, daemon_environment: dict[str, str]
) -> None:
    broken = {**daemon_environment, "STAND_IN_FAULT": "refuse"}
    with listening(mosquitto.port) as listener:
        with DaemonProcess(line, broken):
            until(lambda: listener.of("ready", "sheet")[-1]["state"] == "error" if listener.of("ready", "sheet") else False, 60)
            assert "TensorRT built no engine" in listener.of("ready", "sheet")[-1]["reason"]
        settings = (line / "device.yaml").read_text().replace("runtime: tensorrt", "runtime: tensorrt, fallback: true")
        (line / "device.yaml").write_text(settings)
        with DaemonProcess(line, broken):
            until(lambda: any(m.get("engines") for m in listener.of("state")), 60, "engines told")
            told = listener.of("state")[-1]["engines"]["tiny"]
            assert told["runtime"] == "onnxruntime"
            assert "TensorRT built no engine" in told["instead"]
            until(lambda: any("engine_fallback" in str(m["reasons"]) for m in listener.of("health")), 20, "health")


def test_a_station_answers_while_its_engine_is_built_and_stops_at_once(
    line: Path, mosquitto: Mosquitto, daemon_environment: dict[str, str]
) -> None:
    with (
        listening(mosquitto.port) as listener,
        subscribing(mosquitto.port) as subscriber,
        DaemonProcess(line, {**daemon_environment, "STAND_IN_FAULT": "hang"}) as daemon,
    ):
        until(lambda: any("building the engine" in m["reason"] for m in listener.of("ready", "sheet")), 60, "building")
        listener.say({"trigger_id": "T-0"}, "trigger", "sheet")
        told = collected(subscriber, 1)[0]
        assert (told.verdict, told.reason) == (Verdict.UNDECIDED, Reason.NOT_READY)
        assert "building the engine of bundle tiny" in told.detail
        assert daemon.stop() == 0


def test_a_gpu_that_is_lost_while_an_engine_is_opened_ends_the_daemon(
    line: Path, daemon_environment: dict[str, str], driver: Path
) -> None:
    assert built(driver, line).returncode == 0
    settings = (line / "device.yaml").read_text().replace("runtime: tensorrt", "runtime: tensorrt, fallback: true")
    (line / "device.yaml").write_text(settings)
    Path(daemon_environment["FAKE_CUDA_LOST"]).touch()
    with DaemonProcess(line, daemon_environment) as daemon:
        process = daemon.process
        assert process is not None
        assert process.wait(30) == 2, daemon.log
        assert "the GPU failed: " in daemon.log
        assert "runs on the CPU" not in daemon.log
