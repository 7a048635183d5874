r"""Remote line configurations: wanted -> prepared -> on trial -> in force, or back to the last good one.

    in force --wanted--> preparing (bundles verified, engines opened beside, samples judged) --> on trial --confirm--> in force
                             \--fault--> rejected          deadline, failure, cancel, third start --> rolled back

It tells what must be in force (`line`) and never how that is done: whoever runs the line compares and acts. Whatever shows
in `line` or in `report` is on disk before, so that a crash anywhere ends in a configuration that was good or is on trial.
Versions only rise: what a broker kept from before, or delivers again, changes nothing.

After Junos' `commit confirmed`, RFC 6241 (8.4, confirmed commit), and the desired and reported documents of device shadows.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from edge_inspector import messages, signatures
from edge_inspector.config import LineConfig, parse_line
from edge_inspector.errors import Fault, InspectorError, SchemaError, SignatureError
from edge_inspector.frames import utc_now
from edge_inspector.messages import (
    Cause,
    ConfigConfirm,
    ConfigDesired,
    ConfigEntry,
    ConfigOutcome,
    ConfigReported,
    ConfigTrial,
    FaultFacts,
    Order,
)  # fmt: skip
from edge_inspector.remote import state
from edge_inspector.remote.state import Kept, Trial, boot_time
from edge_inspector.results import ConfigurationRef
from edge_inspector.schema import read_json, validate

log = logging.getLogger(__name__)

STARTS = 2
"""Of the daemon during one trial, or while it prepares one configuration; the next gives it up."""
FAILURE_S = 15.0
"""For how long a failure that was not there before the trial is borne: cameras need a few seconds to open again."""
HISTORY, TOLD = 50, 10
_FAULTS, _TEXT = 16, 300
_MASK = "***"
Outcome = Literal[
    "preparing", "trial", "committed", "rejected", "stale", "rolled_back", "cancelled", "reset", "refused", "too_early"
]


@dataclass(frozen=True)
class Candidate:
    """A configuration that is to be prepared: everything it needs opened and tried, beside what runs."""

    line: LineConfig
    document: dict[str, Any]
    by: str
    confirm_s: int


class Configuration:
    """Which line configuration must be in force. Used from one thread."""

    def __init__(
        self, folder: Path, load_file: Callable[[], LineConfig], *, device: str, trust: Path | None = None,
        clock: Callable[[], tuple[str, float]] = boot_time,
    ) -> None:  # fmt: skip
        """`trust`: keys that orders must be signed by; None: unsigned ones are taken too. `device`: SITE/LINE/DEVICE.

        Begins with what is on disk: a trial counts its starts and may be over. Raises SchemaError or InspectorError when
        nothing is on disk and the file is not good.
        """
        self.candidate: Candidate | None = None
        self.file_fault = ""
        """Why the file is not good, where an earlier configuration stands in for it."""
        self._path = folder / "remote.json"
        self._load_file, self._device, self._trust, self._clock = load_file, device, trust, clock
        self._answered = ""
        self._failures: AbstractSet[str] = frozenset()
        self._starting: AbstractSet[str] = frozenset()
        self._failing_s: float | None = None
        self._state = state.read(self._path)
        self._last = self._state.history[-1] if self._state.history else None
        self._good = self._first()
        self._trial: LineConfig | None = None
        self._resume()

    @property
    def line(self) -> LineConfig:
        """What must be in force."""
        return self._trial or self._good

    @property
    def on_trial(self) -> bool:
        """Whether it may have to go again."""
        return self._trial is not None

    @property
    def last(self) -> ConfigEntry | None:
        """The latest order and what became of it."""
        return self._last

    @property
    def is_remote(self) -> bool:
        """Whether what is in force came from afar."""
        return self._source == "remote"

    def causes(self) -> list[Cause]:
        """What people should know."""
        trial, latest, causes = self._state.trial, self._state.history[-1:], []
        if trial is not None:
            text = f"version {self.line.version} of {trial.by} is on trial until {trial.deadline_at:%Y-%m-%d %H:%M:%S} UTC"
            causes.append(Cause(code="configuration_trial", severity="check_function", thing="configuration", text=text))
        if latest and latest[0].outcome == "rolled_back":
            text = f"version {latest[0].version} of {latest[0].by} was rolled back: {latest[0].reason}"
            causes.append(
                Cause(code="configuration_rolled_back", severity="maintenance_required", thing="configuration", text=text)
            )
        if self.file_fault:
            causes.append(
                Cause(code="configuration_refused", severity="maintenance_required", thing="line.yaml", text=self.file_fault)
            )
        return causes

    @property
    def _source(self) -> Literal["file", "remote"]:
        kept = self._state.trial or self._state.good
        return kept.source if kept is not None else "file"

    def report(self) -> ConfigReported:
        """For the retained topic."""
        trial, reference = self._state.trial, self.line.reference()
        return ConfigReported(
            source=self._source, version=reference.version, hash=reference.hash, good_version=self._good.version,
            seen=self.seen,
            trial=ConfigTrial(
                version=reference.version, hash=reference.hash, by=trial.by, deadline_at=trial.deadline_at, starts=trial.starts
            ) if trial is not None else None,
            last=self._last, history=self._state.history[-TOLD:], line=self.line.document(masked=True),
        )  # fmt: skip

    @property
    def seen(self) -> int:
        """The highest version that was ever decided on."""
        return max(self._state.seen, self._good.version, self._trial.version if self._trial else 0)

    # --- orders

    def take(self, kind: str, payload: bytes) -> None:
        """Carry out an order that came over MQTT: `desired` or `confirm`. What is wrong with it is reported, never raised."""
        if not payload:
            return  # a retained message was cleared
        by = "unknown"
        digest = hashlib.sha256(payload).hexdigest()
        if kind == "desired" and digest == self._answered:
            return  # the broker delivers a retained message again on every connection
        try:
            values = read_json(payload, f"config/{kind}")
            by = str(values.get("by", by))[:128] if isinstance(values, dict) else by
            if kind == "desired":
                self._answered = digest
                self._desired(self._authorised(ConfigDesired, values, kind))
            else:
                self._confirm(self._authorised(ConfigConfirm, values, kind))
        except SchemaError as error:
            self._note(by, "rejected", "not as it should be", faults=error.faults)
        except InspectorError as error:
            self._note(by, "refused", error.message)

    def _authorised(self, model: type[messages.M], values: object, kind: str) -> messages.M:
        order = validate(model, values, f"config/{kind}")
        assert isinstance(order, Order)
        assert isinstance(values, dict)
        if order.device not in ("", self._device):
            raise InspectorError(f"for {order.device}, this is {self._device}")
        if self._trust is not None:
            if order.signature is None or not order.device:
                raise SignatureError("not signed for this device, which device.yaml requires")
            signatures.verify(order.signature, messages.signed_bytes(values), signatures.trusted_keys(self._trust))
        return order

    def _desired(self, order: ConfigDesired) -> None:
        line = parse_line(order.line, "config/desired")
        _refuse_masked(line)
        reference = line.reference()
        if self._decided(reference):
            return
        preparing = self.candidate.line.version if self.candidate is not None else 0
        if line.version <= max(self.seen, preparing):
            self._note(order.by, "stale", f"versions up to {max(self.seen, preparing)} are taken", reference)
            return
        if order.confirm_s == 0 and line.stations != self.line.stations:
            problem = "0 is for changes of recipes only; this one changes stations or cameras"
            raise SchemaError("config/desired", [Fault("confirm_s", problem)])
        version, times = self._state.attempt
        times = times + 1 if version == line.version else 1
        if times > STARTS:
            reason = f"the daemon ended {STARTS} times while it prepared it"
            self._decide(order.by, "rejected", reason, reference, seen=line.version, attempt=(0, 0))
            return
        self._save(attempt=(line.version, times))
        self.candidate = Candidate(line, order.line, order.by, order.confirm_s)
        self._note(order.by, "preparing", "", reference)

    def _decided(self, reference: ConfigurationRef) -> bool:
        """Whether this very document was wanted before: after a restart the broker delivers it once more."""
        known = [(e.version, e.hash) for e in self._state.history] + [(self.line.version, self.line.reference().hash)]
        return (reference.version, reference.hash) in known

    def prepared(self, candidate: Candidate, error: InspectorError | None) -> None:
        """The candidate was tried beside what runs; `error`: what is wrong with it."""
        if candidate is not self.candidate:
            return  # another one is wanted by now
        self.candidate = None
        try:
            if error is not None:
                raise error
            self._accept(candidate)
        except InspectorError as refusal:
            self._reject(candidate, refusal.message)

    def _accept(self, candidate: Candidate) -> None:
        reference = candidate.line.reference()
        if candidate.confirm_s:
            self._begin_trial(candidate, reference)
            return
        kept = Kept(line=candidate.document, source="remote", by=candidate.by)
        self._decide(
            candidate.by,
            "committed",
            "without a trial",
            reference,
            seen=reference.version,
            attempt=(0, 0),
            good=kept,
            trial=None,
        )
        self._good, self._trial = candidate.line, None

    def _reject(self, candidate: Candidate, reason: str) -> None:
        reference = candidate.line.reference()
        try:
            self._decide(candidate.by, "rejected", reason, reference, seen=max(self.seen, reference.version), attempt=(0, 0))
        except InspectorError as error:  # a full disk: it stays as it was, and the next start counts an attempt
            self._note(candidate.by, "rejected", f"{reason}; {error.message}", reference)

    def _begin_trial(self, candidate: Candidate, reference: ConfigurationRef) -> None:
        boot, now_s = self._clock()
        trial = Trial(
            line=candidate.document, source="remote", by=candidate.by, confirm_s=candidate.confirm_s, boot=boot,
            deadline_s=now_s + candidate.confirm_s, deadline_at=utc_now() + timedelta(seconds=candidate.confirm_s), starts=0,
            failures=tuple(sorted(self._failures)),
        )  # fmt: skip
        good = self._state.good
        if good is None or good.source == "file":
            good = Kept(line=self._good.document(), source="file", by="line.yaml")
        self._decide(
            candidate.by, "trial", f"to be confirmed within {candidate.confirm_s} s", reference, seen=reference.version,
            attempt=(0, 0), good=good, trial=trial,
        )  # fmt: skip
        self._trial, self._failing_s, self._starting = candidate.line, None, {"the configuration"}

    def _confirm(self, order: ConfigConfirm) -> None:
        trial = self._state.trial
        if order.action == "reset":
            self._reset(order)
        elif order.action == "cancel" and self.candidate is not None and self.candidate.line.version == order.version:
            reference = self.candidate.line.reference()
            self._decide(order.by, "cancelled", "while it was prepared", reference, seen=order.version, attempt=(0, 0))
            self.candidate = None
        elif trial is None or self.line.version != order.version:
            raise InspectorError(f"{order.action} of version {order.version}, which is not on trial")
        elif order.action == "cancel":
            self._roll_back("cancelled", "", by=order.by)
        elif new := self._failures - set(trial.failures):
            raise InspectorError(f"not confirmed: since the trial began there is {', '.join(sorted(new))}")
        elif self._starting:
            self._note(order.by, "too_early", f"not yet running: {', '.join(sorted(self._starting))}", self.line.reference())
        else:
            kept = Kept(line=trial.line, source="remote", by=trial.by)
            self._decide(order.by, "committed", "", self.line.reference(), good=kept, trial=None)
            self._good, self._trial = self.line, None

    def _reset(self, order: ConfigConfirm) -> None:
        if not self.is_remote or order.version != self.line.version:
            raise InspectorError(f"reset of version {order.version}: in force is {self._source} version {self.line.version}")
        file, seen = self._load_file(), self.seen
        self._decide(order.by, "reset", "line.yaml is in force again", file.reference(), seen=seen, good=None, trial=None)
        self._good, self._trial, self.candidate, self.file_fault = file, None, None, ""

    # --- what happens by itself

    def tick(self, failures: AbstractSet[str], *, connected: bool, starting: AbstractSet[str] = frozenset()) -> None:
        """Look at the clock, at what fails (things with their codes) and what is not there yet; a few times a second."""
        self._failures, self._starting = failures, starting
        trial = self._state.trial
        if trial is None:
            return
        boot, now_s = self._clock()
        new = failures - set(trial.failures)
        if not new:
            self._failing_s = None
        elif self._failing_s is None:
            self._failing_s = now_s
        if boot == trial.boot and now_s >= trial.deadline_s:
            self._roll_back("rolled_back", _unconfirmed(trial.confirm_s, connected=connected))
        elif self._failing_s is not None and now_s - self._failing_s > FAILURE_S:
            self._roll_back("rolled_back", f"since the trial began there is {', '.join(sorted(new))}")

    def failed(self, error: InspectorError) -> bool:
        """What is in force could not be started; returns whether there is another one now."""
        if self._trial is None:
            return False
        self._roll_back("rolled_back", error.message)
        return True

    def read_file(self) -> None:
        """Take line.yaml again, as it is now. Raises SchemaError or InspectorError; then nothing has changed."""
        if self.is_remote:
            raise InspectorError(
                f"line.yaml is not read: remote version {self.line.version} is in force", hint="edge-inspector remote reset"
            )
        file = self._load_file()
        if self._state.good is not None:
            self._save(good=None, seen=self.seen)
        self._good, self.file_fault = file, ""

    def _roll_back(self, outcome: Literal["rolled_back", "cancelled"], reason: str, by: str = "device") -> None:
        reference, self._trial = self.line.reference(), None
        try:
            self._decide(by, outcome, reason, reference, trial=None)
        except InspectorError as error:  # a full disk must not keep a bad configuration in force; the next start decides so too
            self._state = self._state.model_copy(update={"trial": None})
            self._note(by, outcome, f"{reason}; {error.message}", reference)

    # --- on disk

    def _first(self) -> LineConfig:
        """The last good configuration: a remote one, else the file, else what the file was when it was last good."""
        good = self._state.good
        if good is not None and good.source == "remote":
            try:
                return parse_line(good.line, str(self._path))
            except SchemaError as error:  # written by another version of this program
                log.error("the remote configuration in force is not understood, line.yaml stands in for it: %s", error)
                self.file_fault = f"the remote configuration is not understood: {error.message}"[:_TEXT]
                self._state = self._state.model_copy(update={"good": None, "trial": None, "seen": self._state.seen})
        try:
            return self._load_file()
        except InspectorError as error:
            if good is None or good.source == "remote":
                raise
            log.error("line.yaml is refused, what it last was stays in force: %s", error)
            self.file_fault = error.message[:_TEXT]
            return parse_line(good.line, str(self._path))

    def _resume(self) -> None:
        """Go on with the configuration that was on trial before this start, unless its time is over."""
        trial = self._state.trial
        if trial is None:
            return
        try:
            self._trial = parse_line(trial.line, str(self._path))
        except SchemaError as error:  # written by another version of this program
            log.error("the configuration on trial is not understood, it is rolled back: %s", error)
            self._state = self._state.model_copy(update={"trial": None})
            return
        boot, now_s = self._clock()
        if boot != trial.boot:  # for how long the machine was off is not known: the time begins anew
            until = {"deadline_s": now_s + trial.confirm_s, "deadline_at": utc_now() + timedelta(seconds=trial.confirm_s)}
            trial = trial.model_copy(update={"boot": boot, **until})
        starts = trial.starts + 1
        if now_s >= trial.deadline_s:
            self._roll_back("rolled_back", _unconfirmed(trial.confirm_s))
        elif starts > STARTS:
            self._roll_back("rolled_back", f"the daemon started {starts} times during its trial")
        else:
            try:
                self._save(trial=trial.model_copy(update={"starts": starts}))
            except InspectorError as error:  # starts that cannot be counted might never end
                self._roll_back("rolled_back", error.message)

    def _save(self, **changes: Any) -> None:
        """Write the state with these changes, then take it as ours. Raises InspectorError; then nothing has changed."""
        changed = self._state.model_copy(update=changes)
        state.write(self._path, changed)
        self._state = changed

    def _decide(self, by: str, outcome: ConfigOutcome, reason: str, reference: ConfigurationRef, **changes: Any) -> None:
        """Write a decision down, then tell it."""
        entry = _entry(by, outcome, reason, reference, ())
        self._save(history=(*self._state.history, entry)[-HISTORY:], **changes)
        self._last = entry
        log.info("configuration version %d of %s: %s %s", reference.version, by, outcome.replace("_", " "), reason)

    def _note(
        self,
        by: str,
        outcome: ConfigOutcome,
        reason: str,
        reference: ConfigurationRef | None = None,
        faults: Sequence[Fault] = (),
    ) -> None:
        """Tell what changes nothing; not kept, so that no flood of bad orders washes out the audit trail."""
        self._last = _entry(by, outcome, reason, reference, faults)
        log.info("configuration order of %s: %s %s", by, outcome, reason or "")


def _entry(
    by: str, outcome: ConfigOutcome, reason: str, reference: ConfigurationRef | None, faults: Sequence[Fault]
) -> ConfigEntry:
    shown = tuple(
        FaultFacts(path=f.path[:_TEXT], problem=f.problem[:_TEXT], found=f.found[:_TEXT], suggestion=f.suggestion[:_TEXT])
        for f in faults[:_FAULTS]
    )
    return ConfigEntry(
        at=utc_now(), by=by, version=reference.version if reference else None, hash=reference.hash if reference else "",
        outcome=outcome, reason=reason[:_TEXT], faults=shown,
    )  # fmt: skip


def _unconfirmed(confirm_s: int, *, connected: bool = True) -> str:
    return f"not confirmed within {confirm_s} s" + ("" if connected else "; the broker could not be reached")


def _refuse_masked(line: LineConfig) -> None:
    """A document that was read back has its passwords masked. Raises SchemaError."""
    faults = [
        Fault(f"stations.{name}.cameras.{camera}.uri", "a password or option is masked", config.uri, "write it out")
        for name, station in line.stations.items()
        for camera, config in station.cameras.items()
        if _MASK in config.uri
    ]
    if faults:
        raise SchemaError("config/desired", faults)
