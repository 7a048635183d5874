"""Every verb as a user calls it; wrong things give one clear message with a hint, never a traceback."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import typer
from rich.text import Text

from edge_inspector import demo, pictures
from edge_inspector.cli import app
from edge_inspector.documents import SCHEMAS
from edge_inspector.schema import json_schema
from tests.line import ENGINES, DaemonProcess, Mosquitto, device_folder, free_port, line_yaml, until

PAPER, TRUST, RECORDING = str(ENGINES / "paper"), str(ENGINES / "trust"), ENGINES / "recording"


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "edge_inspector.cli", *arguments], capture_output=True, text=True, cwd=cwd, timeout=300,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_init_writes_what_check_understands_and_never_overwrites(tmp_path: Path) -> None:
    first = run("init", cwd=tmp_path)
    assert first.returncode == 0
    assert (tmp_path / "keys" / "signing.key").exists()
    assert list((tmp_path / "trust").glob("*.pub"))
    checked = run("check", "--json", cwd=tmp_path)
    assert checked.returncode == 1
    findings = {f["thing"]: f for f in json.loads(checked.stdout)}
    assert findings["line.yaml" if "line.yaml" in findings else str(tmp_path / "line.yaml")]["ok"]
    assert findings["camera press-1/top"]["ok"]
    assert "no such bundle" in findings["bundle my-product"]["text"]
    again = run("init", cwd=tmp_path)
    assert again.returncode == 2
    assert "never overwrites" in again.stderr


def test_check_tries_what_the_daemon_takes_at_its_start(tmp_path: Path, mosquitto: Mosquitto) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (tmp_path / "file").touch()
        folder = device_folder(
            tmp_path / "device", mosquitto.port, line_yaml(),
            extra=f"metrics: {{port: {port}}}\nengine: {{runtime: tensorrt}}\nstorage: {{folder: {tmp_path / 'file' / 'state'}}}\n",
        )  # fmt: skip
        done = run("check", "--json", "--config", str(folder / "device.yaml"))
    found = {f["thing"]: f for f in json.loads(done.stdout)}
    assert done.returncode == 1
    assert "Address already in use" in found[f"metrics port {port}"]["text"]
    assert "cannot be written" in found[f"state {tmp_path / 'file' / 'state'}"]["text"]
    assert "TensorRT cannot run here" in found["engine"]["text"] or found["engine"]["ok"], "where there is an NVIDIA GPU"
    text = (folder / "device.yaml").read_text().replace("tensorrt", "tensorrt, fallback: true")
    (folder / "device.yaml").write_text("\n".join(x for x in text.splitlines() if not x.startswith("storage:")))
    done = run("check", "--json", "--config", str(folder / "device.yaml"))
    assert all(f["ok"] for f in json.loads(done.stdout)), done.stdout
    assert not (folder / "state").exists(), "nothing is left behind"


def test_the_program_says_its_version() -> None:
    assert run("--version").stdout == f"edge-inspector {version('edge-inspector')}\n"


def _verbs(group: Any, *names: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, verb in group.commands.items():
        if hasattr(verb, "commands"):
            yield from _verbs(verb, *names, name)
        else:
            yield (*names, name), verb


def test_help_swallows_no_word_as_markup() -> None:
    verbs = list(_verbs(typer.main.get_group(app)))
    assert len(verbs) > 25
    for names, verb in verbs:
        for parameter in verb.params:
            text = getattr(parameter, "help", None) or ""
            assert Text.from_markup(text).plain == text, (names, parameter.name)


def test_check_tries_broker_cameras_bundles_and_recipes(tmp_path: Path, mosquitto: Mosquitto) -> None:
    good = device_folder(tmp_path / "good", mosquitto.port, line_yaml())
    done = run("check", "--config", str(good / "device.yaml"))
    assert done.returncode == 0, done.stdout
    assert "answers, MQTT 5" in done.stdout
    assert "128x128" in done.stdout
    assert "1 tile(s)" in done.stdout
    bad = device_folder(tmp_path / "bad", free_port(), line_yaml("dir:///nowhere", bundle="nothing"))
    done = run("check", "--config", str(bad / "device.yaml"))
    assert done.returncode == 1
    for words in ("refused", "no such folder", "no such bundle", "hint:"):
        assert words in done.stdout


def test_a_faulty_configuration_shows_all_faults(tmp_path: Path) -> None:
    folder = device_folder(tmp_path, 1883, "schema: ei.line.v1\nstation: {}\nversion: one\n")
    done = run("check", "--config", str(folder / "device.yaml"))
    assert "did you mean 'stations'?" in done.stdout
    assert "version" in done.stdout
    started = run("run", "--config", str(folder / "device.yaml"))
    assert started.returncode == 2
    assert "did you mean 'stations'?" in started.stderr
    assert "device.yaml" in run("run", "--config", str(tmp_path / "none" / "device.yaml")).stderr


def test_inspect_answers_by_exit_code_json_and_pictures(tmp_path: Path) -> None:
    good, bad = str(ENGINES / "paper" / "sample-good-1.png"), str(ENGINES / "paper" / "sample-fail-1.png")
    assert run("inspect", PAPER, good, "--trust", TRUST).returncode == 0
    done = run("inspect", PAPER, good, bad, "--trust", TRUST, "--json", "--save", str(tmp_path / "out"))
    assert done.returncode == 1
    results = json.loads(done.stdout)
    assert [r["verdict"] for r in results] == ["pass", "fail"]
    for result in results:
        jsonschema.validate(result, json_schema(SCHEMAS["result"]))
    assert pictures.read(tmp_path / "out" / "sample-fail-1.png").shape[1] > 900
    (tmp_path / "broken.png").write_bytes(b"x")
    done = run("inspect", PAPER, str(tmp_path / "broken.png"), "--trust", TRUST)
    assert done.returncode == 2
    assert "hint:" in done.stderr
    assert "undecided" in done.stdout
    done = run("inspect", PAPER, good, "--trust", str(tmp_path))
    assert done.returncode == 2
    assert "not trusted" in done.stderr
    assert run("inspect", str(tmp_path / "none"), good, "--trust", TRUST).returncode == 2


def test_evaluate_gives_rates_with_intervals(tmp_path: Path) -> None:
    for kind, name in (("good", "sample-good-1.png"), ("blot", "sample-fail-1.png")):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / name).write_bytes((ENGINES / "paper" / name).read_bytes())
    done = run("evaluate", PAPER, str(tmp_path), "--trust", TRUST, "--json")
    found = json.loads(done.stdout)
    assert found["image"]["auroc"] == 1.0
    assert found["trivial_auroc"].keys() == {"brightness", "contrast", "sharpness", "mean picture"}
    assert found["escape"]["k"] == 0
    assert found["escape"]["interval95"][1] == pytest.approx(0.975)
    assert "95 % interval" in run("evaluate", PAPER, str(tmp_path), "--trust", TRUST).stdout
    assert "no labelled pictures" in run("evaluate", PAPER, str(tmp_path / "good"), "--trust", TRUST).stderr


def test_bench_doctor_schema_keygen_and_sign(tmp_path: Path) -> None:
    figures = json.loads(run("bench", PAPER, "--trust", TRUST, "--rounds", "10", "--json").stdout)
    assert figures["tiles"] == 1
    assert figures["runs"][0]["stages"]["infer"]["p50_ms"] > 0
    findings = {f["thing"]: f for f in json.loads(run("doctor", "--json").stdout)}
    assert findings["opencv-python"]["ok"]
    assert all(f["ok"] or f["hint"] for f in findings.values())
    assert "line" in run("schema").stdout.split()
    assert json.loads(run("schema", "result").stdout)["title"] == "Result"
    assert "there are: device" in run("schema", "nothing").stderr
    key = tmp_path / "k"
    assert run("keygen", str(key), "--trust", str(tmp_path / "trust")).returncode == 0
    assert "exists already" in run("keygen", str(key)).stderr
    done = run("sign", str(tmp_path), "--key", str(key))
    assert done.returncode == 2
    assert "missing" in done.stderr


def test_train_says_what_is_wrong_before_it_starts(tmp_path: Path) -> None:
    assert "keygen" in run("train", str(RECORDING), "--product", "x", cwd=tmp_path).stderr
    pytest.importorskip("torch", reason='torch is not installed: pip install "edge-inspector[train]"')
    run("keygen", cwd=tmp_path)
    (tmp_path / "few").mkdir()
    for n in range(3):
        (tmp_path / "few" / f"{n}.png").write_bytes((RECORDING / f"paper-00{n + 1}.png").read_bytes())
    assert "at least 20 are needed" in run("train", "few", "--product", "x", cwd=tmp_path).stderr
    assert "small letters" in run("train", "few", "--product", "Bad Name", cwd=tmp_path).stderr
    few = ("train", "few", "--product", "x")
    assert "between 64 and 1024" in run(*few, "--size", "50", cwd=tmp_path).stderr
    assert "must be one of" in run(*few, "--family", "fanogan", "--size", "50", cwd=tmp_path).stderr
    assert "--width: feature-anogan has no such setting" in run(*few, "--width", "8", cwd=tmp_path).stderr
    assert "only one of them" in run(*few, "--expected", "0.02", "--alpha", "0.05", cwd=tmp_path).stderr
    done = run("train", str(RECORDING), "--product", "x", "--family", "fanogan", "--size", "32", "--width", "4", "--gan-steps", "2",
               "--encoder-steps", "40", "--json", "--tile", "64", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert not made["kept"], "15 held-out pictures do not carry an expected 5 %"
    assert made["needed"] == 19
    assert made["expected"] == pytest.approx(1 / (made["n"] + 1))
    assert made["at_most"] > made["expected"]
    assert (tmp_path / made["bundle"] / "report.html").exists()


def test_watch_follows_results(tmp_path: Path, mosquitto: Mosquitto) -> None:
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml(trigger="free"))
    with DaemonProcess(folder) as daemon:
        until(lambda: "ready: sheet" in daemon.log, what="ready")
        done = run("watch", "--config", str(folder / "device.yaml"), "--start", "all", "--seconds", "6", "--json")
        read = run("watch", "--config", str(folder / "device.yaml"), "--seconds", "3")
        assert "ready/sheet  ready" in read.stderr
        assert "state  online" in read.stderr
        assert "{" not in read.stderr, "words for people, not JSON"
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["seq"] for r in results] == list(range(1, 61))


STUCK = """
import sys, time
from pathlib import Path
from edge_inspector import cli
from edge_inspector.bundles import open_bundle
from edge_inspector.runtime import OnnxEngine
from edge_inspector.threads import Thread

def judge():
    with OnnxEngine(open_bundle(Path(sys.argv[2]), Path(sys.argv[3])), batch=16) as engine:
        judging.append(True)
        while True:
            engine()

judging = []
Thread(target=judge, name="station-stuck", daemon=True).start()
while not judging:
    time.sleep(0.05)
sys.argv[1:] = ["schema", sys.argv[1]]
cli.main()
"""


def test_a_part_that_is_still_judged_at_the_end_does_not_abort_the_process() -> None:
    """As when a daemon is stopped on a machine that needs seconds for a part."""
    for document, code in (("result", 0), ("nothing", 2), ("result", 0)):
        done = subprocess.run([sys.executable, "-c", STUCK, document, PAPER, TRUST], capture_output=True, check=False)
        assert done.returncode == code, done.stderr
        assert (b'"$defs"' in done.stdout) == (code == 0), "what was printed is not lost"


def test_the_demo_waits_for_a_slow_line_and_says_what_for(tmp_path: Path) -> None:
    told: list[str] = []
    found: list[str] = []
    summary = demo.run(tmp_path, ENGINES, lambda result, *_: found.append(result.result_id), told.append, told_every_s=0.01)
    assert (summary.parts, summary.judged) == (60, 60), "a pause is no end"
    assert len(set(found)) == 60
    assert told[0] == "the daemon starts"
    assert told[-1].startswith("station sheet is ready"), told[-1]


def test_a_demo_that_judges_nothing_ends_with_2_and_says_why(tmp_path: Path) -> None:
    engines = tmp_path / "engines"
    for name in ("paper", "trust"):
        shutil.copytree(ENGINES / name, engines / name)
    (engines / "recording").mkdir()
    pictures.write(engines / "recording" / "strip.png", np.full((32, 320, 3), 128, np.uint8))
    (engines / "recording" / "truth.csv").write_text("part,kind\nstrip,good\n")
    done = run("demo", str(tmp_path / "out"), "--engines", str(engines))
    assert done.returncode == 2, done.stdout
    assert "undecided" in done.stdout
    assert "error: the demo judged no part" in done.stderr
    (engines / "paper" / "network.onnx").write_bytes(b"")
    done = run("demo", str(tmp_path / "out"), "--engines", str(engines))
    assert done.returncode == 2, done.stdout
    assert "error: station sheet is not ready: " in done.stderr
    assert "network.onnx" in done.stderr


def test_the_demo_runs_the_whole_line_and_tells_the_truth(tmp_path: Path) -> None:
    done = run("demo", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "in truth:" in line]
    assert len(lines) == 60
    failed = [line for line in lines if line.startswith("fail")]
    escapes = sum(line.startswith("pass") and "impurity" in line for line in lines)
    rejects = sum("good" in line.split("in truth:")[1] for line in failed)
    assert f"{rejects} of 40 good parts rejected, {escapes} of 20 defective parts passed" in done.stdout
    assert len(list((tmp_path / "out" / "failed").glob("*.jpg"))) == len(failed) > 0
    assert "edge-inspector train" in done.stdout


def test_without_a_terminal_long_work_tells_how_far_it_is_in_lines() -> None:
    from edge_inspector.cli import shown

    with shown.progress_bar() as bar, shown.err.capture() as told:
        task = bar.add_task("features", total=3, figures="")
        for _ in range(3):
            bar.advance(task)
    assert told.get() == "features: 3 of 3 in 0 s\n"


def test_printed_commands_work_as_printed() -> None:
    """Also where the program is not on the PATH, and was installed from a folder."""
    from edge_inspector import installation

    told = subprocess.run(
        [*installation.program().split(), "schema"], capture_output=True, text=True, check=True, timeout=60,
        env={"PATH": "/nowhere"},
    )  # fmt: skip
    assert "result" in told.stdout.split()
    command = installation.install("train")
    assert command.startswith(f"{sys.executable} -m pip install ")
    assert command.endswith("[train]'")
    assert Path(command.split("install ")[1].strip("'").removesuffix("[train]")).joinpath("pyproject.toml").exists()
