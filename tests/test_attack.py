"""Whoever may publish on the broker reads, writes, loads and reaches nothing outside (tests/attack)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.line import MOSQUITTO, needed

REPOSITORY = Path(__file__).resolve().parents[1]
COUNT = int(os.environ.get("EDGE_INSPECTOR_ATTACKS", "200"))
SEED = int(os.environ.get("EDGE_INSPECTOR_SEED", "14"))


def test_no_line_document_reads_writes_loads_or_reaches_what_is_not_listed(tmp_path: Path) -> None:
    needed(MOSQUITTO, "apt install mosquitto")
    needed(
        os.geteuid() == 0 and shutil.which("unshare") and shutil.which("ip") and shutil.which("cc"), "root, iproute2 and gcc"
    )
    run = subprocess.run(
        ["unshare", "--net", sys.executable, "-m", "tests.attack.attacker", str(tmp_path), str(COUNT), str(SEED)],
        capture_output=True, text=True, cwd=REPOSITORY, check=False, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    told = json.loads(run.stdout)
    print(f"\n{ {key: value for key, value in told.items() if key not in ('outside', 'reached')} }")
    assert told["documents"] > COUNT
    assert told["tried"] > 0
    led_out = {name: state for name, state in told["states"].items() if name != "belt"}
    assert set(led_out.values()) == {"fault"}
    assert told["files"] > 100, "fanotify saw the daemon"
    assert (told["outside"], told["reached"]) == ([], [])
    assert not told["canaries_changed"]
    assert not told["loaded"]
    assert told["ended"] == "ended 0"
    assert not told["traceback"]
    assert not told["password_told"]
