r"""Commit-confirm: what is wanted is on trial until confirmed, else given up. Configurations and bundles share it.

    good --begin--> on trial --confirm--> good (the new one)
                        \--deadline, failure, cancel, third start--> good (the old one)

Whatever shows was on disk before, so that a crash anywhere ends in something that was good or is on trial. Versions only rise:
what a broker kept from before, or delivers again, changes nothing.

After Junos' `commit confirmed` and RFC 6241 (8.4, confirmed commit).
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from edge_inspector import durable
from edge_inspector.errors import Fault, InspectorError
from edge_inspector.flood import Flood, besides
from edge_inspector.frames import utc_now
from edge_inspector.messages import AuditEntry, Cause, Confirm, FaultFacts, Outcome, TrialFacts
from edge_inspector.results import Moment
from edge_inspector.schema import Field, Model, validate

log = logging.getLogger(__name__)

STARTS = 2
"""Of the daemon during one trial, or while it prepares one thing; the next gives it up."""
FAILURE_S = 15.0
"""For how long a failure that was not there before the trial is borne: cameras need a few seconds to open again."""
HISTORY, TOLD = 50, 10
LEAP = 10**9
_FAULTS, _TEXT = 16, 300
_WANTED = ("preparing", "rolled_back", "cancelled")
"""What is noted of orders that were taken: never many."""


class Kept(Model):
    """Something that is or may be in force: what it says, and where it came from."""

    document: dict[str, Any]
    version: int
    hash: str
    source: Literal["local", "remote"]
    by: str


class Trial(Kept):
    """Something that is to be confirmed."""

    id: str = ""
    """Random, another one after each start: a confirmation of this trial is none of another."""
    confirm_s: int
    boot: str
    """Of the machine; the deadline counts in that boot's seconds."""
    deadline_s: float
    deadline_at: Moment
    starts: int
    failures: tuple[str, ...]
    """That were there before."""


class State(Model):
    """What is on disk."""

    schema_: Literal["ei.trials.v1"] = Field("ei.trials.v1", alias="schema")
    seen: int = 0
    """The highest version that was ever decided on."""
    attempt: tuple[int, int] = (0, 0)
    """Version, and how often it was begun to be prepared."""
    good: Kept | None = None
    """None: what the device has of its own, which no remote order has touched yet."""
    trial: Trial | None = None
    history: tuple[AuditEntry, ...] = ()


def state_of(path: Path) -> State:
    """What is on disk; nothing is changed by looking. Raises OSError, ValueError, SchemaError."""
    try:
        return validate(State, json.loads(path.read_bytes()), str(path))
    except FileNotFoundError:
        return State()


def boot_time() -> tuple[str, float]:
    """This boot of the machine, and seconds since: no wall clock that may jump, and it goes on while the machine sleeps."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip(), time.clock_gettime(time.CLOCK_BOOTTIME)


class _Failing:
    """For how long something has failed, with pauses: a camera that comes and goes is no good one."""

    def __init__(self) -> None:
        self._sum_s = self._quiet_s = 0.0
        self._at: float | None = None

    def seconds(self, fails: bool, now_s: float) -> float:
        """Of failure, until it was quiet for FAILURE_S."""
        passed_s = now_s - self._at if self._at is not None else 0.0
        self._at = now_s
        self._quiet_s = 0.0 if fails else self._quiet_s + passed_s
        self._sum_s = self._sum_s + passed_s if fails else 0.0 if self._quiet_s > FAILURE_S else self._sum_s
        return self._sum_s


class Trials:
    """What is good, what is on trial, and the audit trail of one thing. Used from one thread."""

    def __init__(self, path: Path, what: str, clock: Callable[[], tuple[str, float]] = boot_time) -> None:
        """`what`: its name in messages. Begins with what is on disk: a trial counts its starts and may be over."""
        self.path, self.what = path, what
        self._clock = clock
        self._failures: AbstractSet[str] = frozenset()
        self._starting: AbstractSet[str] = {"all"}
        self._failing = _Failing()
        self._heard = 0
        self._refusals = Flood()
        self._unwritten = False
        """A trial was given up, and the disk does not know it yet."""
        self.state = self._read()
        self.last = self.state.history[-1] if self.state.history else None
        """The latest order, or what became of it."""
        self._resume()

    @property
    def trial(self) -> Trial | None:
        """What is on trial."""
        return self.state.trial

    @property
    def in_force(self) -> Kept | None:
        """What must be in force; None: what the device has of its own."""
        return self.state.trial or self.state.good

    @property
    def seen(self) -> int:
        """Versions up to this one are taken."""
        kept = (self.state.good, self.state.trial)
        return max(self.state.seen, self._heard, *(one.version for one in kept if one is not None), 0)

    def knows(self, version: int, digest: str) -> bool:
        """Whether this very thing was decided on before: after a restart the broker delivers an order once more."""
        return any((entry.version, entry.hash) == (version, digest) for entry in self.state.history)

    def causes(self) -> list[Cause]:
        """What people should know."""
        trial, latest, causes = self.state.trial, self.state.history[-1:], []
        code = self.what.split()[0]
        if trial is not None:
            text = f"version {trial.version} of {trial.by} is on trial until {trial.deadline_at:%Y-%m-%d %H:%M:%S} UTC"
            causes.append(Cause(code=f"{code}_trial", severity="check_function", thing=self.what, text=text))
        if latest and latest[0].outcome == "rolled_back":
            text = f"version {latest[0].version} was rolled back: {latest[0].reason}"
            causes.append(Cause(code=f"{code}_rolled_back", severity="maintenance_required", thing=self.what, text=text))
        return causes

    def facts(self) -> TrialFacts | None:
        """Of the trial, for reports."""
        trial = self.state.trial
        if trial is None:
            return None
        return TrialFacts(
            id=trial.id, version=trial.version, hash=trial.hash, by=trial.by, deadline_at=trial.deadline_at,
            starts=trial.starts,
        )  # fmt: skip

    def hear(self, seen: int, own: int) -> None:
        """Take over up to which version orders are void, as the broker holds it: our state may be an older copy, put back.

        `own`: what is taken here. One forged report must not use up all numbers there are.
        """
        if not own < seen <= own + LEAP:
            return
        log.warning("%s: the broker knows of version %d, we know of %d: older orders are void", self.what, seen, own)
        self._heard = seen
        with suppress(InspectorError):  # on a full disk it is heard again at the next start
            self.save(seen=seen)

    # --- what is decided

    def refuse_leap(self, version: int) -> None:
        """One order must not use up all numbers there are. Raises InspectorError."""
        if version > self.seen + LEAP:
            raise InspectorError(f"version {version} is more than {LEAP} above {self.seen}", hint="count on from there")

    def attempt(self, by: str, version: int, digest: str) -> bool:
        """Count that it is begun to be prepared; False, and rejected, where that ended the daemon too often."""
        tried, times = self.state.attempt
        times = times + 1 if tried == version else 1
        if times > STARTS:
            self.reject(by, version, digest, f"the daemon ended {STARTS} times while it prepared it")
            return False
        self.save(attempt=(version, times))
        self.note(by, "preparing", "", version, digest)
        return True

    def reject(self, by: str, version: int, digest: str, reason: str) -> None:
        """It was tried, and is not good: never again."""
        try:
            self.decide(by, "rejected", reason, version, digest, seen=max(self.seen, version), attempt=(0, 0))
        except InspectorError as error:  # a full disk: it stays as it was, and the next start counts an attempt
            self.note(by, "rejected", f"{reason}; {error.message}", version, digest)

    def begin(self, wanted: Kept, confirm_s: int, before: Kept) -> None:
        """Put it on trial. `before`: what is good until now. Raises InspectorError when that cannot be written."""
        boot, now_s = self._clock()
        trial = Trial(
            **dict(wanted), id=secrets.token_hex(8), confirm_s=confirm_s, boot=boot, deadline_s=now_s + confirm_s,
            deadline_at=utc_now() + timedelta(seconds=confirm_s), starts=0,
            failures=self.state.trial.failures if self.state.trial is not None else tuple(sorted(self._failures)),
        )  # fmt: skip
        self.decide(
            wanted.by, "trial", f"to be confirmed within {confirm_s} s", wanted.version, wanted.hash,
            seen=max(self.seen, wanted.version), attempt=(0, 0), good=before, trial=trial,
        )  # fmt: skip
        self._failing, self._starting = _Failing(), {self.what}

    def commit(self, by: str, wanted: Kept, reason: str = "") -> None:
        """It is good from now on. Raises InspectorError when that cannot be written."""
        kept = Kept.model_construct(**{name: getattr(wanted, name) for name in Kept.model_fields})
        seen = max(self.seen, wanted.version)
        self.decide(by, "committed", reason, wanted.version, wanted.hash, seen=seen, attempt=(0, 0), good=kept, trial=None)

    def roll_back(self, outcome: Literal["rolled_back", "cancelled"], reason: str, by: str = "device") -> None:
        """Give up what is on trial."""
        trial = self.state.trial
        if trial is None:
            return
        try:
            self.decide(by, outcome, reason, trial.version, trial.hash, trial=None)
        except InspectorError as error:  # a full disk must not keep a bad one in force
            self.note(by, outcome, f"{reason}; {error.message}", trial.version, trial.hash)
            history = (*self.state.history, self.last) if self.last is not None else self.state.history
            self.state = self.state.model_copy(update={"trial": None, "history": history[-HISTORY:]})
            self._unwritten = True

    def confirm(self, order: Confirm, *, named: bool = False) -> None:
        """Confirm or cancel what is on trial; `named`: the order must name the trial. Raises InspectorError."""
        trial = self.state.trial
        if trial is None or trial.version != order.version:
            raise InspectorError(f"{order.action} of version {order.version}, which is not on trial")
        if order.trial != trial.id and (named or order.trial):
            raise InspectorError(
                f"{order.action} of trial {order.trial or '(none named)'}; on trial is {trial.id}",
                hint="name the trial as it is reported: edge-inspector remote confirm does",
            )
        if order.action == "cancel":
            self.roll_back("cancelled", "", by=order.by)
        elif new := self._new_failures(trial):
            raise InspectorError(f"not confirmed: since the trial began there is {', '.join(new)}")
        elif self._starting:
            why = f"not yet running: {', '.join(sorted(self._starting))}"
            self.note(order.by, "too_early", why, trial.version, trial.hash)
        else:
            self.commit(order.by, trial)

    def tick(self, failures: AbstractSet[str], *, connected: bool, starting: AbstractSet[str] = frozenset()) -> None:
        """Look at the clock, at what fails (things with their codes) and what is not there yet; a few times a second."""
        self._failures, self._starting = failures, starting
        if self._unwritten:
            with suppress(InspectorError):  # no room yet: again at the next look
                self.save()
        trial = self.state.trial
        if trial is None:
            return
        boot, now_s = self._clock()
        new = self._new_failures(trial)
        failing_s = self._failing.seconds(bool(new), now_s)
        if boot == trial.boot and now_s >= trial.deadline_s:
            self.roll_back("rolled_back", _unconfirmed(trial.confirm_s, connected=connected))
        elif new and failing_s > FAILURE_S:
            self.roll_back("rolled_back", f"since the trial began there is {', '.join(new)}")

    @property
    def is_sound(self) -> bool:
        """Whether all runs and nothing fails that did not before the trial."""
        return self.state.trial is not None and not self._starting and not self._new_failures(self.state.trial)

    def _new_failures(self, trial: Trial) -> list[str]:
        return sorted(self._failures - set(trial.failures))

    def _resume(self) -> None:
        """Go on with what was on trial before this start, unless its time is over."""
        trial = self.state.trial
        if trial is None:
            return
        boot, now_s = self._clock()
        if boot != trial.boot:  # for how long the machine was off is not known: the time begins anew
            until = {"deadline_s": now_s + trial.confirm_s, "deadline_at": utc_now() + timedelta(seconds=trial.confirm_s)}
            trial = trial.model_copy(update={"boot": boot, **until})
        trial = trial.model_copy(update={"id": secrets.token_hex(8)})  # the state folder may be an older copy, put back
        starts = trial.starts + 1
        if now_s >= trial.deadline_s:
            self.roll_back("rolled_back", _unconfirmed(trial.confirm_s))
        elif starts > STARTS:
            self.roll_back("rolled_back", f"the daemon started {starts} times during its trial")
        else:
            try:
                self.save(trial=trial.model_copy(update={"starts": starts}))
            except InspectorError as error:  # starts that cannot be counted might never end
                self.roll_back("rolled_back", error.message)

    # --- on disk

    def decide(self, by: str, outcome: Outcome, reason: str, version: int, digest: str, **changes: Any) -> None:
        """Write a decision down, then tell it. Raises InspectorError; then nothing has changed."""
        entry = _entry(by, outcome, reason, version, digest)
        self.save(history=(*self.state.history, entry)[-HISTORY:], **changes)
        self.last = entry
        log.info("%s version %d, %s: %s %s", self.what, version, by, outcome.replace("_", " "), reason)

    def note(
        self, by: str, outcome: Outcome, reason: str, version: int | None = None, digest: str = "", faults: Sequence[Fault] = ()
    ) -> None:
        """Tell what changes nothing; not kept, so that no flood of bad orders washes out the audit trail."""
        self.last = _entry(by, outcome, reason, version, digest, faults)
        untold = 0 if outcome in _WANTED else self._refusals.told()
        if untold is not None:
            words = (self.what, _line(by), outcome.replace("_", " "), _line(reason), besides(untold))
            log.info("%s, order of %s: %s %s%s", *words)

    def save(self, **changes: Any) -> None:
        """Write the state with these changes, then take it as ours. Raises InspectorError; then nothing has changed."""
        changed = self.state.model_copy(update=changes)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            durable.write(self.path, changed.model_dump_json(by_alias=True).encode())
        except OSError as error:
            raise InspectorError(f"{self.path}: {error.strerror}", hint="check the state folder and its free space") from error
        self.state, self._unwritten = changed, False

    def _read(self) -> State:
        try:
            return state_of(self.path)
        except OSError as error:
            raise InspectorError(f"{self.path}: {error.strerror}", hint="check the state folder and its disk") from error
        except (ValueError, InspectorError) as error:
            aside = self.path.with_name(f"{self.path.stem}.damaged-{int(time.time())}.json")
            log.error("%s is damaged (%s): set aside as %s", self.path, error, aside.name)
            os.replace(self.path, aside)
            return State()


def _entry(
    by: str, outcome: Outcome, reason: str, version: int | None, digest: str, faults: Sequence[Fault] = ()
) -> AuditEntry:
    shown = tuple(
        FaultFacts(path=_line(f.path), problem=_line(f.problem), found=_line(f.found), suggestion=_line(f.suggestion))
        for f in faults[:_FAULTS]
    )
    return AuditEntry(at=utc_now(), by=by, version=version, hash=digest, outcome=outcome, reason=_line(reason), faults=shown)


def _line(text: str) -> str:
    """For a terminal or a log: one line, no control characters, whatever an order said."""
    return "".join(c if c.isprintable() else " " for c in text)[:_TEXT]


def _unconfirmed(confirm_s: int, *, connected: bool = True) -> str:
    return f"not confirmed within {confirm_s} s" + ("" if connected else "; the broker could not be reached")
