"""Pictures of parts, kept under a quota by their value: what failed, what could not be judged, what nearly failed, what passed.

Of each part the frames as they were judged, without loss, so that `replay` can judge them again; of a failed one also what
explains it to people: the region as seen, its anomaly map, what was expected (JPEG, a fifth of the time that PNG takes).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import queue
import shutil
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from edge_inspector import pictures
from edge_inspector.errors import PictureError
from edge_inspector.frames import Frame
from edge_inspector.inspector import View
from edge_inspector.results import Evidence, Result, Verdict
from edge_inspector.threads import Thread

log = logging.getLogger(__name__)

SHARES = {"failed": 0.5, "undecided": 0.2, "near": 0.2, "passed": 0.1}
"""Kind of part -> its share of the quota. What one kind does not use the others may; it is given back when it is wanted."""
NEAR = 0.9
"""A part that passes with so much of a threshold nearly failed."""
QUEUE = 16
"""Parts that wait to be written; more are not kept, and the result says so."""
QUEUE_BYTES = 128 << 20
"""So much of their frames, too: they are not free to be used again meanwhile."""
EXPLANATION = "explanation.jpg"
_FRAMES = "frames.json"
_BLOCK = 4096


@dataclass(frozen=True)
class Kept:
    """A frame that was kept."""

    camera: str
    path: Path | None
    """None: there was nothing to keep, the frame came broken."""
    fault: str
    fault_detail: str


@dataclass(frozen=True)
class _Job:
    kind: str
    name: str
    frames: tuple[tuple[str, Frame], ...]
    worst: View | None
    title: str

    @property
    def bytes(self) -> int:
        shown = 0 if self.worst is None else self.worst.anomaly.nbytes
        return shown + sum(frame.image.nbytes for _, frame in self.frames)


def _name(evidence_id: str) -> str:
    return evidence_id.removeprefix("sha256:")[:32]


def _on_disk(size: int) -> int:
    """What a file takes, in whole blocks: of small parts that is most of it."""
    return -(-size // _BLOCK) * _BLOCK


def place_of(folder: Path, evidence_id: str) -> Path | None:
    """The folder of a kept part, or None once the quota has taken it. `folder`: the store's."""
    places = (folder / kind / _name(evidence_id) for kind in SHARES)
    return next((place for place in places if (place / _FRAMES).exists()), None)


def explanation_of(folder: Path, result: Result) -> Path | None:
    """Where the picture lies, or will lie soon, that explains a failed part; None where none is kept."""
    kept = result.evidence
    if kept is None or not kept.stored or result.verdict is not Verdict.FAIL:
        return None
    return folder / "failed" / _name(kept.id) / EXPLANATION


def frames_of(place: Path) -> list[Kept]:
    """The frames of a kept part, in the order of its cameras and their taking. Raises OSError, ValueError."""
    return [
        Kept(entry["camera"], place / entry["file"] if entry["file"] else None, entry["fault"], entry["fault_detail"])
        for entry in json.loads((place / _FRAMES).read_text())
    ]


class EvidenceStore:
    """Writes pictures beside the line of results, in a thread of its own. Use as a context manager."""

    def __init__(self, folder: Path, quota_mb: int, passed: float = 0.0) -> None:
        """A quota of 0 keeps nothing. `passed`: share of passed parts that are kept."""
        self.folder, self.quota, self.passed = folder, quota_mb << 20, passed
        self.dropped = 0
        """Not kept: the writer was behind, or the disk refused."""
        self.used: dict[str, int] = dict.fromkeys(SHARES, 0)
        """Bytes, by kind."""
        self._kept: dict[str, OrderedDict[str, int]] = {kind: OrderedDict() for kind in SHARES}
        self._jobs: queue.Queue[_Job | None] = queue.Queue(QUEUE)
        self._waiting, self._lock = 0, threading.Lock()
        self._given_up = False
        self._thread = Thread(target=self._run, name="evidence", daemon=True)

    def __enter__(self) -> EvidenceStore:
        """Start the writer."""
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Write what waits (within two seconds); nothing more after that, another store may have begun."""
        with contextlib.suppress(queue.Full):
            self._jobs.put(None, timeout=1.0)
        self._thread.join(1.0)
        self._given_up = True

    def offer(self, result: Result, frames: Mapping[str, Sequence[Frame]], views: Sequence[View]) -> Evidence | None:
        """Hand in a part that was judged; None: its like is not kept. `stored` is False when the writer is behind."""
        identity = hashlib.sha256(f"{result.station}/{result.trigger_id}/{result.decided_at}".encode()).hexdigest()
        ratio = max((finding.ratio for finding in result.findings if finding.ratio is not None), default=0.0)
        if result.verdict is not Verdict.PASS:
            kind = "failed" if result.verdict is Verdict.FAIL else "undecided"
        elif ratio >= NEAR:
            kind = "near"
        elif int(identity[-8:], 16) < self.passed * 2**32:  # drawn by the part's own name
            kind = "passed"
        else:
            return None
        title = f"{result.station}  part {result.part_id or result.trigger_id}  {result.verdict.value}"
        return self.keep(kind, identity, frames, views, title)

    def keep(
        self, kind: str, identity: str, frames: Mapping[str, Sequence[Frame]], views: Iterable[View], title: str
    ) -> Evidence | None:
        """Hand in frames, and what explains them, under a name (64 hexadecimal digits). None without frames or quota."""
        taken = tuple((camera, frame) for camera, got in frames.items() for frame in got)
        worst = max(views, key=lambda view: view.finding.ratio or 0.0, default=None)
        if not taken or not self.quota:
            return None
        job = _Job(kind, identity[:32], taken, worst, title)
        with self._lock:
            fits = self._waiting == 0 or self._waiting + job.bytes <= QUEUE_BYTES
            self._waiting += job.bytes if fits else 0
        try:
            if not fits:
                raise queue.Full
            self._jobs.put_nowait(job)
        except queue.Full:
            self._done(job if fits else None)
            self.dropped += 1
            return Evidence(id=f"sha256:{identity}", stored=False)
        return Evidence(id=f"sha256:{identity}", stored=True)

    # --- the thread

    def _run(self) -> None:
        try:
            self._look()
        except OSError as error:  # what cannot be counted now is when a next start can
            log.error("evidence of earlier runs: %s", error)
        while (job := self._jobs.get()) is not None and not self._given_up:
            try:
                self._write(job)
            except Exception:  # root of a thread: one part's picture must not cost all others theirs
                self.dropped += 1
                log.exception("evidence not kept")
            self._done(job)

    def _done(self, job: _Job | None) -> None:
        with self._lock:
            self._waiting -= job.bytes if job is not None else 0

    def _look(self) -> None:
        """What earlier runs have kept, oldest first; what they did not finish, and what no version keeps now, is removed."""
        for old in self.folder.glob("*.jpg"):
            old.unlink()
        for kind, kept in self._kept.items():
            places = [place for place in (self.folder / kind).glob("*") if place.is_dir()]
            for place in sorted(places, key=lambda place: place.stat().st_mtime):
                if (place / _FRAMES).exists():
                    kept[place.name] = sum(_on_disk(path.stat().st_size) for path in place.iterdir())
                else:
                    shutil.rmtree(place, ignore_errors=True)
            self.used[kind] = sum(kept.values())

    def _write(self, job: _Job) -> None:
        files: dict[str, bytes] = {}
        told = []
        for number, (camera, frame) in enumerate(job.frames):
            name = f"{number}-{camera}.png" if frame.image.size else None  # one that came broken has no pixels
            told.append({"file": name, "camera": camera, "fault": frame.fault, "fault_detail": frame.fault_detail})
            if name is not None:
                files[name] = pictures.encoded(frame.image)
        if job.worst is not None:
            view, finding = job.worst, job.worst.finding
            files[EXPLANATION] = pictures.encoded(
                pictures.explanation(
                    view.seen, view.anomaly, finding.threshold, finding.regions, view.expected, job.title, view.offset_px
                ),
                ".jpg",
            )
        files[_FRAMES] = json.dumps(told).encode()  # last: a part with it is whole
        size = sum(_on_disk(len(data)) for data in files.values())
        self._make_room(job.kind, size)
        place = self.folder / job.kind / job.name
        place.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            pictures.write_encoded(place / name, data)
        self._kept[job.kind][job.name] = size
        self.used[job.kind] += size

    def _make_room(self, kind: str, wanted: int) -> None:
        """Remove parts until `wanted` bytes fit: the oldest of the kind that is furthest above its share."""
        if wanted > self.quota:
            raise PictureError(f"{self.folder}: a part of {wanted >> 20} MB is more than the quota", hint="storage.evidence_mb")
        while sum(self.used.values()) + wanted > self.quota:
            over = {one: (self.used[one] + wanted * (one == kind)) / share for one, share in SHARES.items() if self._kept[one]}
            most = max(over, key=lambda one: over[one])
            name, size = self._kept[most].popitem(last=False)
            shutil.rmtree(self.folder / most / name, ignore_errors=True)
            self.used[most] -= size
