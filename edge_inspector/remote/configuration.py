r"""Remote line configurations: wanted -> prepared -> on trial -> in force, or back to the last good one (`trial.py`).

    in force --wanted--> preparing (bundles verified, engines opened beside, samples judged) --> on trial
                             \--fault--> rejected

It tells what must be in force (`line`) and never how that is done: whoever runs the line compares and acts.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_inspector.addresses import WITHHELD
from edge_inspector.config import LineConfig, parse_line
from edge_inspector.errors import Fault, InspectorError, SchemaError, SignatureError
from edge_inspector.messages import Cause, ConfigDesired, ConfigReported, Confirm
from edge_inspector.remote.authority import Authority
from edge_inspector.remote.trial import TOLD, Kept, Trials, boot_time

log = logging.getLogger(__name__)

WHAT = "configuration"
_PROMISES = 3


@dataclass(frozen=True)
class Candidate:
    """A configuration that is to be prepared: everything it needs opened and tried, beside what runs."""

    line: LineConfig
    kept: Kept
    confirm_s: int


class Configuration:
    """Which line configuration must be in force. Used from one thread."""

    def __init__(
        self, path: Path, load_file: Callable[[], LineConfig], authority: Authority,
        clock: Callable[[], tuple[str, float]] = boot_time, *, refusals: Callable[[LineConfig], list[Fault]] = lambda _: [],
    ) -> None:  # fmt: skip
        """`path`: where its state lies. `refusals`: what a wanted line names and this device does not list.

        Begins with what is on disk.

        Raises SchemaError or InspectorError when nothing is on disk and the file is not good.
        """
        self.candidate: Candidate | None = None
        self.trials = Trials(path, WHAT, clock)
        self._load_file, self._authority, self._refusals = load_file, authority, refusals
        self._answered = ""
        self._lines: dict[str, LineConfig] = {}
        """Parsed, by hash: of what is good and what is on trial."""
        self._promise: dict[str, str] = {}
        """Why the promised rates do not hold, by hash of the configurations that were prepared last."""
        self._fault = ""
        self._refuse_strange()
        self._file = self._first_file()

    @property
    def line(self) -> LineConfig:
        """What must be in force: the same object as long as it is the same."""
        return self._line_of(self.trials.in_force)

    @property
    def is_remote(self) -> bool:
        """Whether what is in force came from afar."""
        kept = self.trials.in_force
        return kept is not None and kept.source == "remote"

    @property
    def seen(self) -> int:
        """Versions up to this one are taken."""
        return max(self.trials.seen, self.line.version)

    def hear(self, seen: int) -> None:
        """The broker holds a report of ours that knows of versions up to this one."""
        self.trials.hear(seen, self.seen)

    def causes(self) -> list[Cause]:
        """What people should know."""
        causes = self.trials.causes()
        if self._fault:
            causes.append(
                Cause(code="configuration_refused", severity="maintenance_required", thing="line.yaml", text=self._fault)
            )
        return causes

    def report(self) -> ConfigReported:
        """For the retained topic."""
        reference, trials = self.line.reference(), self.trials
        return ConfigReported(
            source="remote" if self.is_remote else "local", version=reference.version, hash=reference.hash,
            good_version=self.good_line.version, seen=self.seen, trial=trials.facts(), last=trials.last,
            history=trials.state.history[-TOLD:], line=self.line.document(reported_only=True),
            promise=self._promise.get(reference.hash, ""),
        )  # fmt: skip

    # --- orders

    def take(self, kind: str, payload: bytes, *, again: bool = False, busy: str = "") -> None:
        """Carry out an order that came over MQTT: `desired` or `confirm`. What is wrong with it is reported, never raised.

        `again`: the broker had kept it, and delivers it on every connection. `busy`: why nothing new can be begun now.
        """
        digest = hashlib.sha256(payload).hexdigest()
        if not payload or (again and digest == self._answered):
            return
        by = "unknown"
        try:
            values, by = self._authority.read(payload, f"config/{kind}")
            if kind == "desired":
                self._desired(self._authority.checked(ConfigDesired, values), busy, again=again)
                self._answered = digest
            else:
                self._confirm(self._authority.checked(Confirm, values, WHAT))
        except SchemaError as error:
            self._answered = digest if kind == "desired" else self._answered
            self.trials.note(by, "rejected", "not as it should be", faults=error.faults)
        except SignatureError as error:
            if not (again and self._decided(values)):  # from before signatures were required, and carried out then
                self.trials.note(by, "refused", str(error))
        except InspectorError as error:
            self.trials.note(by, "refused", str(error))

    def _decided(self, values: dict[str, Any]) -> bool:
        """Whether this very document was decided on before, whoever sends it."""
        try:
            line = parse_line(values.get("line"), "config/desired")
        except SchemaError:
            return False
        return self.trials.knows(line.version, line.reference().hash)

    def _desired(self, order: ConfigDesired, busy: str, *, again: bool) -> None:
        line = parse_line(order.line, "config/desired")
        faults = _withheld(line) or self._refusals(line)
        if faults:
            raise SchemaError("config/desired", faults)
        version, digest = line.version, line.reference().hash
        if self.trials.knows(version, digest) or line.reference() == self.line.reference():
            if not again:
                self.trials.note(order.by, "stale", "this very one was decided on before", version, digest)
            return
        seen = max(self.seen, self.candidate.line.version if self.candidate is not None else 0)
        if version <= seen:
            self.trials.note(order.by, "stale", f"versions up to {seen} are taken", version, digest)
            return
        self.trials.refuse_leap(version)
        if order.confirm_s == 0:
            self._refuse_untried(line)
        if busy:
            raise InspectorError(busy)
        if self.trials.attempt(order.by, version, digest):
            kept = Kept(document=order.line, version=version, hash=digest, source="remote", by=order.by)
            self.candidate = Candidate(line, kept, order.confirm_s)

    def prepared(self, candidate: Candidate, error: InspectorError | None, promise: str = "") -> None:
        """The candidate was tried beside what runs; `error`: what is wrong with it; `promise`: why its rates do not hold."""
        if candidate is not self.candidate:
            return  # another one is wanted by now
        self.candidate = None
        kept = candidate.kept
        self._promise = {**dict(list(self._promise.items())[-_PROMISES:]), kept.hash: promise}
        try:
            if error is not None:
                raise error
            if candidate.confirm_s:
                self.trials.begin(kept, candidate.confirm_s, self._good())
            else:
                self._refuse_untried(candidate.line)
                self.trials.commit(kept.by, kept, "without a trial")
            held = {one.hash for one in (self.trials.trial, self.trials.state.good) if one is not None}
            self._lines = {
                digest: line for digest, line in {**self._lines, kept.hash: candidate.line}.items() if digest in held
            }
        except InspectorError as refusal:
            self.trials.reject(kept.by, kept.version, kept.hash, refusal.message)

    def _refuse_untried(self, line: LineConfig) -> None:
        """Without a trial nothing but recipes may differ from what is good. Raises SchemaError."""
        if line.stations != self.good_line.stations:
            problem = "0 is for changes of recipes only; this one changes stations or cameras"
            raise SchemaError("config/desired", [Fault("confirm_s", problem)])

    @property
    def good_line(self) -> LineConfig:
        """What a rollback leads to."""
        return self._line_of(self.trials.state.good)

    def _good(self) -> Kept:
        """What a rollback leads to, as it is now."""
        good = self.trials.state.good
        if good is not None and good.source == "remote":
            return good
        reference = self._file.reference()
        return Kept(
            document=self._file.document(), version=reference.version, hash=reference.hash, source="local", by="line.yaml"
        )

    def _confirm(self, order: Confirm) -> None:
        if order.action == "reset":
            self._reset(order)
        elif order.action == "cancel" and self.candidate is not None and self.candidate.line.version == order.version:
            digest, why = self.candidate.kept.hash, "while it was prepared"
            self.trials.decide(order.by, "cancelled", why, order.version, digest, seen=order.version, attempt=(0, 0))
            self.candidate = None
        else:
            self.trials.confirm(order, named=self._authority.trust is not None)

    def _reset(self, order: Confirm) -> None:
        if not self.is_remote or order.version != self.line.version:
            found = f"{'remote' if self.is_remote else 'line.yaml'}, version {self.line.version}"
            raise InspectorError(f"reset of version {order.version}: in force is {found}")
        file, seen = self._load_file(), self.seen
        reference, why = file.reference(), "line.yaml is in force again"
        self.trials.decide(order.by, "reset", why, reference.version, reference.hash, seen=seen, good=None, trial=None)
        self._file, self.candidate, self._fault = file, None, ""

    # --- the file, and what else the device has of its own

    def failed(self, error: InspectorError) -> bool:
        """What is in force could not be started; returns whether there is another one now."""
        if self.trials.trial is None:
            return False
        self.trials.roll_back("rolled_back", error.message)
        return True

    def read_file(self) -> None:
        """Take line.yaml again, as it is now, where it is in force. Raises InspectorError; then nothing has changed."""
        file = self._load_file()
        if self.trials.state.good is not None:
            self.trials.save(good=None, seen=self.seen)
        self._file, self._fault = file, ""

    def _first_file(self) -> LineConfig:
        """The file; what it was when it was last good, where a remote one is in force or it is not good any more."""
        good = self.trials.state.good
        if good is not None and good.source == "remote":
            return self._line_of(good)
        try:
            return self._load_file()
        except InspectorError as error:
            if good is None:
                raise
            log.error("line.yaml is refused, what it last was stays in force: %s", error)
            self._fault = error.message
            return parse_line(good.document, str(self.trials.path))

    def _refuse_strange(self) -> None:
        """Let go of documents that this version of the program does not understand: another version wrote them."""
        for name in ("trial", "good"):
            kept: Kept | None = getattr(self.trials.state, name)
            try:
                if kept is not None:
                    self._lines[kept.hash] = parse_line(kept.document, str(self.trials.path))
            except SchemaError as error:
                log.error("the configuration that is %s is not understood, it is let go: %s", name, error)
                self._fault = f"the remote configuration is not understood: {error.message}"
                self.trials.state = self.trials.state.model_copy(update={name: None})

    def _line_of(self, kept: Kept | None) -> LineConfig:
        if kept is None or kept.source == "local":
            return self._file
        if kept.hash not in self._lines:
            self._lines[kept.hash] = parse_line(kept.document, str(self.trials.path))
        return self._lines[kept.hash]


def _withheld(line: LineConfig) -> list[Fault]:
    """Addresses of a document that was read back from a report, which does not tell them whole."""
    return [
        Fault(f"stations.{name}.cameras.{camera}.uri", f"holds {WITHHELD}, for what a report does not tell", "", "write it out")
        for name, station in line.stations.items()
        for camera, config in station.cameras.items()
        if WITHHELD in config.uri
    ]
