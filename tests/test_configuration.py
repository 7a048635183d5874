"""The state machine of remote configurations: what must never come into force, what must not be kept from going."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge_inspector import durable
from edge_inspector.config import parse_line
from edge_inspector.errors import InspectorError
from edge_inspector.remote.authority import Authority
from edge_inspector.remote.configuration import Configuration

FAULT = {"s/top: camera_fault"}


def document(version: int, threshold: float = 1.0, camera: str = "synthetic://") -> dict[str, Any]:
    return {
        "schema": "ei.line.v1", "version": version,
        "stations": {"s": {"product": "p", "products": {"p": "r"}, "cameras": {"top": {"uri": camera}}}},
        "recipes": {"r": {"cameras": {"top": {"rois": {"all": {"bundle": "b", "threshold": threshold}}}}}},
    }  # fmt: skip


class Machine:
    """A Configuration with a clock that the test moves."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now_s = folder, 0.0
        self.start()

    def start(self) -> None:
        self.it = Configuration(
            self.folder / "configuration.json", lambda: parse_line(document(3), "line.yaml"), Authority("a/b/c"),
            clock=lambda: ("boot", self.now_s),
        )  # fmt: skip

    def want(self, line: dict[str, Any], confirm_s: int = 600) -> str:
        self.it.take("desired", json.dumps({"by": "anna", "line": line, "confirm_s": confirm_s}).encode())
        if self.it.candidate is not None:
            self.it.prepared(self.it.candidate, None)
        return self.outcome

    def confirm(self, version: int, action: str = "confirm") -> str:
        self.it.take("confirm", json.dumps({"by": "ben", "version": version, "action": action}).encode())
        return self.outcome

    def passes(self, seconds: float, failures: set[str] | None = None) -> str:
        for _ in range(round(seconds * 2)):
            self.now_s += 0.5
            self.it.trials.tick(failures or set(), connected=True)
        return self.outcome

    @property
    def outcome(self) -> str:
        return self.it.trials.last.outcome if self.it.trials.last is not None else ""


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_confirmation_that_waited_for_a_restart_is_too_early(machine: Machine) -> None:
    assert machine.want(document(4)) == "trial"
    machine.passes(5)
    machine.start()
    assert machine.confirm(4) == "too_early"
    machine.passes(1, FAULT)
    assert machine.confirm(4) == "refused"


def test_a_camera_that_comes_and_goes_is_a_failure(machine: Machine) -> None:
    machine.want(document(4))
    for _ in range(5):
        machine.passes(4, FAULT)
        machine.passes(1)
    assert machine.outcome == "rolled_back"


def test_a_hiccup_is_none(machine: Machine) -> None:
    machine.want(document(4))
    for _ in range(10):
        machine.passes(3, FAULT)
        machine.passes(20)
    assert machine.outcome == "trial"


def test_without_a_trial_only_recipes_of_what_is_good_may_change(machine: Machine) -> None:
    machine.want(document(4, camera="synthetic://?fps=5"))
    assert machine.want(document(5, camera="synthetic://?fps=5"), confirm_s=0) == "rejected"
    assert machine.it.good_line.version == 3
    assert machine.want(document(6, threshold=2.0), confirm_s=0) == "committed"
    assert machine.it.line.version == 6


def test_a_trial_upon_a_trial_does_not_inherit_its_failures(machine: Machine) -> None:
    machine.want(document(4, camera="dir:///nowhere"))
    machine.passes(5, FAULT)
    assert machine.want(document(5, camera="dir:///nowhere")) == "trial"
    assert machine.passes(20, FAULT) == "rolled_back"


def test_a_failure_that_was_there_before_is_not_the_trials(machine: Machine) -> None:
    machine.passes(1, FAULT)
    machine.want(document(4))
    assert machine.passes(60, FAULT) == "trial"
    assert machine.confirm(4) == "committed"


def test_no_threshold_is_infinite(machine: Machine) -> None:
    payload = json.dumps({"by": "anna", "line": document(4, threshold=12345.0)}).replace("12345.0", "1e999")
    machine.it.take("desired", payload.encode())
    assert machine.outcome == "rejected"


def test_what_was_given_up_on_a_full_disk_stays_given_up(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.want(document(4))

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(durable, "write", full)
        assert machine.confirm(4, "cancel") == "cancelled"
        assert machine.it.line.version == 3
        machine.passes(1)
    machine.passes(1)
    machine.start()
    assert machine.it.line.version == 3
    assert machine.it.trials.state.history[-1].outcome == "cancelled"
    assert machine.want(document(4)) == "stale"


def test_one_order_cannot_use_up_all_versions(machine: Machine) -> None:
    assert machine.want(document(2**53)) == "refused"
    assert machine.want(document(4)) == "trial"


def test_every_order_is_answered_but_what_the_broker_delivers_again(machine: Machine) -> None:
    order = json.dumps({"by": "anna", "line": document(4)}).encode()
    machine.it.take("desired", order)
    assert machine.it.candidate is not None
    machine.it.prepared(machine.it.candidate, InspectorError("no such bundle"))
    machine.it.take("desired", order, again=True)
    assert machine.outcome == "rejected"
    machine.it.take("desired", order)
    assert machine.outcome == "stale"


def test_a_state_that_is_no_state_is_set_aside(machine: Machine) -> None:
    machine.want(document(4))
    (machine.folder / "configuration.json").write_text("{")
    machine.start()
    assert machine.it.line.version == 3
    assert list(machine.folder.glob("configuration.damaged-*.json"))


def test_what_a_report_does_not_tell_is_not_taken_for_an_address(machine: Machine) -> None:
    machine.want(document(4, camera="rtsp://user:secret@10.0.0.5/live?token=t"))
    shown = machine.it.report().line
    assert "secret" not in json.dumps(shown)
    assert "live" not in json.dumps(shown)
    shown["version"] = 5
    assert machine.want(shown) == "rejected"
    assert machine.it.trials.last is not None
    assert "holds ***" in machine.it.trials.last.faults[0].problem


def test_the_time_of_a_trial_goes_on_over_a_restart(machine: Machine) -> None:
    machine.want(document(4), confirm_s=60)
    machine.now_s += 59
    machine.start()
    assert machine.it.trials.trial is not None
    machine.now_s += 2
    machine.start()
    assert machine.outcome == "rolled_back"


def test_a_trial_that_an_older_version_of_the_program_began_goes_on(machine: Machine) -> None:
    machine.want(document(4))
    path = machine.folder / "configuration.json"
    state = json.loads(path.read_text())
    del state["trial"]["id"]
    path.write_text(json.dumps(state))
    machine.start()
    machine.passes(1)
    assert machine.confirm(4) == "committed"


def test_a_promise_that_does_not_hold_is_reported_with_its_configuration(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.it.take("desired", json.dumps({"by": "anna", "line": document(4, 99.0), "confirm_s": 600}).encode())
    assert machine.it.candidate is not None
    machine.it.prepared(machine.it.candidate, None, "station s: threshold set by the recipe")
    assert machine.it.report().promise == "station s: threshold set by the recipe"
    machine.confirm(4, "cancel")
    assert machine.it.report().promise == ""
