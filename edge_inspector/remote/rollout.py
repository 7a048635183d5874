r"""Remote bundles: wanted -> fetched, verified, built, its samples judged -> judging beside -> on trial -> in force, or back.

    in force --wanted--> FETCH -> VERIFY -> BUILD -> SAMPLES -> SHADOW --> on trial (`trial.py`)
                      |      \------any fault--------------------------> rejected, its files removed
                      `-------------any fault--------------------------> refused: mended, it may come again

It tells which folder a bundle is to be opened from (`folder`) and never how that is done: whoever runs the line does it.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edge_inspector.addresses import told_source
from edge_inspector.bundles import Bundle, open_bundle, signed_manifest
from edge_inspector.errors import BundleError, BundleUnsupported, InspectorError, SchemaError, SignatureError, SourceUnreachable
from edge_inspector.messages import BundleDesired, BundleReported, Confirm, PhaseFacts, ShadowFacts
from edge_inspector.remote.authority import Authority
from edge_inspector.remote.fetch import PATIENCE, Judge, Patience, Tell, fetch
from edge_inspector.remote.trial import TOLD, Kept, State, Trials, boot_time

log = logging.getLogger(__name__)

_RETRIES_S = (2.0, 5.0, 15.0)
_LOOK_S = 0.25
RATE_PARTS = 20
"""Parts on trial before the share of fails says anything."""


@dataclass(frozen=True)
class Wanted:
    """A release that is to be tried."""

    order: BundleDesired
    hash: str
    folder: Path


class Rollout:
    """Which release of one bundle must be in force. Used from one thread, but for `fetched`."""

    def __init__(
        self, name: str, folder: Path, own: Path, authority: Authority, *, trust: Path, ca_file: Path | None = None,
        judge: Judge = lambda place: place, clock: Callable[[], tuple[str, float]] = boot_time,
    ) -> None:  # fmt: skip
        """`folder`: where its state and releases lie; `own`: the device's own one; `trust`: keys of bundles.

        `judge`: the door, which says what a bundle may come from.
        """
        self.name, self.own = name, own
        self.candidate: Wanted | None = None
        self.phase: PhaseFacts | None = None
        self.shadow: ShadowFacts | None = None
        self.trials = Trials(folder / "rollout.json", f"bundle {name}", clock)
        self._folder, self._authority, self._trust, self._ca_file = folder, authority, trust, ca_file
        self._judge = judge
        self._answered = ""
        self._own_release = self._known_own()

    @property
    def folder(self) -> Path | None:
        """Where the release that must be in force lies; None: the device's own."""
        kept = self.trials.in_force
        return self._place(kept.version) if kept is not None and kept.source == "remote" else None

    @property
    def good_folder(self) -> Path | None:
        """Where the release lies that a rollback leads to; None: the device's own."""
        good = self.trials.state.good
        return self._place(good.version) if good is not None and good.source == "remote" else None

    @property
    def is_untouched(self) -> bool:
        """Whether nothing was ever ordered of it that is on disk, or is being tried."""
        return self.candidate is None and self.trials.state == State()

    @property
    def order(self) -> BundleDesired | None:
        """Of the release on trial."""
        trial = self.trials.trial
        return BundleDesired.model_validate(trial.document) if trial is not None else None

    @property
    def seen(self) -> int:
        """Releases up to this one are taken."""
        return max(self.trials.seen, self._own_release or 0)

    def hear(self, seen: int) -> None:
        """The broker holds a report of ours that knows of releases up to this one."""
        self.trials.hear(seen, self.seen)

    def report(self) -> BundleReported:
        """For the retained topic."""
        trials, kept, good = self.trials, self.trials.in_force, self.trials.state.good
        remote = kept is not None and kept.source == "remote"
        return BundleReported(
            bundle=self.name, source="remote" if remote else "local",
            release=kept.version if kept is not None and remote else self._own_release,
            good_release=good.version if good is not None and good.source == "remote" else self._own_release, seen=self.seen,
            phase=self.phase, shadow=self.shadow, trial=trials.facts(), last=trials.last, history=trials.state.history[-TOLD:],
        )  # fmt: skip

    # --- orders

    def take(self, kind: str, payload: bytes, *, again: bool = False, busy: str = "") -> None:
        """Carry out an order that came over MQTT: `desired` or `confirm`. What is wrong with it is reported, never raised.

        `again`: the broker had kept it, and delivers it on every connection. `busy`: why nothing new can be begun now.
        """
        digest, by = hashlib.sha256(payload).hexdigest(), "unknown"
        if not payload or (again and digest == self._answered):
            return
        try:
            values, by = self._authority.read(payload, f"bundle/{self.name}/{kind}")
            if kind == "desired":
                self._desired(self._authority.checked(BundleDesired, values), busy, again=again)
                self._answered = digest
            else:
                self._confirm(self._authority.checked(Confirm, values, f"bundle/{self.name}"))
        except SchemaError as error:
            self._answered = digest if kind == "desired" else self._answered
            self.trials.note(by, "rejected", "not as it should be", faults=error.faults)
        except SignatureError as error:
            decided = self.trials.knows(values.get("release", 0), _digest(values.get("release"), values.get("source")))
            if not (again and decided):  # from before signatures were required, and carried out then
                self.trials.note(by, "refused", str(error))
        except InspectorError as error:
            self.trials.note(by, "refused", str(error))

    def _desired(self, order: BundleDesired, busy: str, *, again: bool) -> None:
        if order.bundle != self.name:
            raise InspectorError(f"for bundle {order.bundle}, this is {self.name}")
        digest = _digest(order.release, order.source)
        if self.trials.knows(order.release, digest):
            if not again:
                self.trials.note(order.by, "stale", "this very one was decided on before", order.release, digest)
            return
        seen = max(self.seen, self.candidate.order.release if self.candidate is not None else 0)
        if order.release <= seen:
            self.trials.note(order.by, "stale", f"releases up to {seen} are taken", order.release, digest)
            return
        self.trials.refuse_leap(order.release)
        self._judge(order.source)
        if busy or self.candidate is not None:
            raise InspectorError(busy or f"release {self.candidate.order.release if self.candidate else ''} is being tried")
        if self.trials.attempt(order.by, order.release, digest):
            self.candidate = Wanted(order, digest, self._place(order.release))
            self.phase, self.shadow = PhaseFacts(name="fetch", done=0, total=0), None

    def fetched(
        self, wanted: Wanted, tell: Tell, *, clock_ok: bool, patience: Patience = PATIENCE
    ) -> Bundle:  # fmt: skip
        """Bring a release here and verify it; may take long, and runs in a thread of its own. Raises InspectorError."""
        order, end_s = wanted.order, time.monotonic() + patience.total_s
        for wait_s in (*_RETRIES_S, None):
            try:
                fetch(
                    order.source, wanted.folder, self._trust, tell, self._ca_file, judge=self._judge,
                    patience=patience, end_s=end_s,
                )  # fmt: skip
                break
            except SourceUnreachable as error:
                if wait_s is None or time.monotonic() + wait_s > end_s:
                    raise
                log.warning("bundle %s release %d: %s; again in %d s", self.name, order.release, error.message, wait_s)
                self._wait(wait_s, tell)
        tell("verify", 0, 1)
        bundle = open_bundle(wanted.folder, self._trust, clock_ok=clock_ok)
        manifest = bundle.manifest
        if (manifest.name, manifest.release) != (self.name, order.release):
            raise BundleUnsupported(
                f"{told_source(order.source)} holds release {manifest.release} of {manifest.name}, "
                f"wanted is {order.release} of {self.name}"
            )
        device = self._authority.device
        if manifest.scope and not any(device == place or device.startswith(f"{place}/") for place in manifest.scope):
            raise BundleUnsupported(f"release {manifest.release} is for {', '.join(manifest.scope)}; this is {device}")
        tell("verify", 1, 1)
        return bundle

    def _wait(self, wait_s: float, tell: Tell) -> None:
        end = time.monotonic() + wait_s
        while time.monotonic() < end:
            tell("fetch", self.phase.done if self.phase else 0, self.phase.total if self.phase else 0)
            time.sleep(_LOOK_S)

    def prepared(self, wanted: Wanted, error: InspectorError | None) -> None:
        """The candidate was tried beside what runs; `error`: what is wrong with it."""
        if wanted is not self.candidate:
            return
        self.candidate, self.phase = None, None
        order = wanted.order
        kept = Kept(
            document=order.model_dump(mode="json", by_alias=True, exclude_none=True), version=order.release, hash=wanted.hash,
            source="remote", by=order.by,
        )  # fmt: skip
        try:
            if error is not None:
                raise error
            self.trials.begin(kept, order.confirm_s, self._good())
        except BundleError as refusal:  # no part was judged by it: mended, the same release may come again
            if isinstance(refusal, SourceUnreachable):  # nor is anything to be mended here
                self._answered = ""
            with suppress(InspectorError):  # on a full disk an attempt more counts
                self.trials.save(attempt=(0, 0))
            self.trials.note(order.by, "refused", refusal.message, order.release, wanted.hash)
        except InspectorError as refusal:
            self.trials.reject(order.by, order.release, wanted.hash, refusal.message)

    def wait(self, reason: str) -> None:
        """The candidate is here, and has to wait for others."""
        wanted, last = self.candidate, self.trials.last
        if wanted is not None and (last is None or last.reason != f"it waits: {reason}"):
            order = wanted.order
            self.trials.note(order.by, "preparing", f"it waits: {reason}", order.release, wanted.hash)

    def _good(self) -> Kept:
        good = self.trials.state.good
        if good is not None and good.source == "remote":
            return good
        return Kept(document={}, version=self._own_release or 0, hash="", source="local", by="device")

    def _confirm(self, order: Confirm) -> None:
        candidate = self.candidate
        if order.action == "reset":
            self._reset(order)
        elif order.action == "cancel" and candidate is not None and candidate.order.release == order.version:
            why = f"during {self.phase.name}" if self.phase is not None else ""
            self.trials.decide(order.by, "cancelled", why, order.version, candidate.hash, seen=order.version, attempt=(0, 0))
            self.candidate, self.phase = None, None
        else:
            self.trials.confirm(order, named=self._authority.trust is not None)

    def _reset(self, order: Confirm) -> None:
        kept = self.trials.in_force
        if kept is None or kept.source == "local" or order.version != kept.version:
            raise InspectorError(f"reset of release {order.version}, which is not in force, or is the device's own")
        own = open_bundle(self.own, self._trust)  # what cannot be opened must not come into force
        seen, release = self.seen, own.manifest.release
        self.trials.decide(order.by, "reset", "the device's own", release, "", seen=seen, good=None, trial=None)
        self._own_release = release

    # --- files

    def tidy(self) -> None:
        """Remove files of releases that nothing can come back to."""
        kept = {str(one.version) for one in (self.trials.trial, self.trials.state.good) if one is not None}
        if self.candidate is not None:
            kept.add(str(self.candidate.order.release))
        for place in self._folder.iterdir() if self._folder.is_dir() else ():
            if place.is_dir() and place.name not in kept:
                shutil.rmtree(place, ignore_errors=True)

    def _place(self, release: int) -> Path:
        return self._folder / str(release)

    def _known_own(self) -> int | None:
        try:
            return signed_manifest(self.own, self._trust).release
        except (InspectorError, OSError):
            return None  # the station that needs it says what is wrong with it


def _digest(release: object, source: object) -> str:
    """What an order says, apart from how it is to be tried."""
    return hashlib.sha256(f"{release} {source}".encode()).hexdigest()[:12]
