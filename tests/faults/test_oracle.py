"""The short form of tests.faults.oracle: every kind of trigger, with faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.oracle import MODES, run
from tests.line import MOSQUITTO, needed
from tests.test_aravis import installed


@pytest.mark.parametrize("mode", list(MODES))
def test_each_trigger_gets_one_result_by_its_own_parts_image(mode: str, tmp_path: Path) -> None:
    needed(MOSQUITTO, "apt install mosquitto")
    needed(installed(), "apt install libaravis-0.8-0")
    found = run(mode, 40, tmp_path, seed=3)
    assert found["violations"] == []
    assert found["results"] == 40
    assert found["faults"].get("told twice", 0) > 0
    assert sum(count for reason, count in found["reasons"].items() if reason.startswith("pass")) > 13
