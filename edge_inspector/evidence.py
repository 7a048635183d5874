"""Pictures of parts, kept under a quota by their value: what failed, what could not be judged, what nearly failed, what passed.

Of each part the frames as they were judged, without loss, so that `replay` can judge them again; of a failed one also what
explains it to people: the region as seen, its anomaly map, what was expected (JPEG, a fifth of the time that PNG takes).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import queue
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from edge_inspector import pictures
from edge_inspector.access import Access
from edge_inspector.errors import PictureError
from edge_inspector.frames import Frame
from edge_inspector.inspector import View
from edge_inspector.messages import Cause
from edge_inspector.results import Evidence, Result, Verdict, rfc3339
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
_SPARE_BYTES = 64 << 20
"""So much of the disk, or a twentieth of a small one, is left to the results."""
_SPARE_FILES = 256
_EXPLANATION_BYTES = 1 << 20
"""More than an explanation ever takes."""
_NAMED_WITHIN_S = 0.5
"""For so long an explanation waits for its result's id, which follows once the record is on the disk."""
_TRY_AGAIN_S = 2.0
_LATELY_S = 60.0


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
    named: Future[str] | None

    @property
    def bytes(self) -> int:
        """In memory."""
        shown = 0 if self.worst is None else self.worst.anomaly.nbytes
        return shown + sum(frame.image.nbytes for _, frame in self.frames)

    @property
    def most_bytes(self) -> int:
        """On the disk, at most: what a PNG cannot shorten it stores as it is, with a little around it."""
        pixels = sum(_on_disk(frame.image.nbytes + frame.image.nbytes // 64 + _BLOCK) for _, frame in self.frames)
        return pixels + (0 if self.worst is None else _EXPLANATION_BYTES) + 4 * _BLOCK


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

    def __init__(self, folder: Path, quota_mb: int, passed: float = 0.0, access: Access | None = None) -> None:
        """A quota of 0 keeps nothing. `passed`: share of passed parts that are kept; `access`: who may read them."""
        self.folder, self.quota, self.passed = folder, quota_mb << 20, passed
        self.dropped = 0
        """Not kept: the writer was behind, or the disk had no room; their results say so."""
        self.lost = 0
        """Told as stored, and not: the disk refused, or was filled by somebody else, after their record was made."""
        self.failing = ""
        """Why the disk refuses pictures, or has no room for them."""
        self.used: dict[str, int] = dict.fromkeys(SHARES, 0)
        """Bytes, by kind."""
        self._access = access or Access()
        self._kept: dict[str, OrderedDict[str, int]] = {kind: OrderedDict() for kind in SHARES}
        self._jobs: queue.Queue[_Job | None] = queue.Queue(QUEUE)
        self._waiting = self._promised = 0
        """Bytes of what is not written yet: in memory, and at most on the disk."""
        self._refused_bytes = 0
        """What a part would have taken that the disk had no room for."""
        self._too_large = float("inf")
        """Bytes of a part that was found to be more than the quota."""
        self._lock = threading.Lock()
        self._behind_s = float("-inf")
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

    def causes(self) -> list[Cause]:
        """What people should know: whose pictures are not there."""
        texts = []
        if self.failing:
            texts.append(f"pictures of parts are not kept: {self.failing}")
        if time.monotonic() - self._behind_s < _LATELY_S:
            texts.append("pictures of some parts are not kept: they come faster than they can be written")
        if self._too_large < float("inf"):
            texts.append(f"a part's pictures are more than storage.evidence_mb ({self.quota >> 20} MB)")
        if self.lost:
            texts.append(f"of {self.lost} parts since the start, which were told as stored, the pictures are lost")
        if not texts:
            return []
        return [Cause(code="evidence_not_kept", severity="maintenance_required", thing="evidence", text="; ".join(texts))]

    def offer(
        self,
        result: Result,
        frames: Mapping[str, Sequence[Frame]],
        views: Sequence[View],
        named: Future[str] | None = None,
    ) -> Evidence | None:
        """Hand in a part that was judged; None: its like is not kept. `stored` is False where there is no room for it.

        `named` will tell the result's id, for the picture that explains it.
        """
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
        return self.keep(kind, identity, frames, views, _title(result), named)

    def keep(
        self,
        kind: str,
        identity: str,
        frames: Mapping[str, Sequence[Frame]],
        views: Iterable[View],
        title: str,
        named: Future[str] | None = None,
    ) -> Evidence | None:
        """Hand in frames, and what explains them, under a name (64 hexadecimal digits). None without frames or quota."""
        taken = tuple((camera, frame) for camera, got in frames.items() for frame in got)
        worst = max(views, key=lambda view: view.finding.ratio or 0.0, default=None)
        if not taken or not self.quota:
            return None
        stored = self._take(_Job(kind, identity[:32], taken, worst, title, named))
        self.dropped += not stored
        return Evidence(id=f"sha256:{identity}", stored=stored)

    def _take(self, job: _Job) -> bool:
        """Promise that a part will be written, where memory, writer and disk have room for it."""
        with self._lock:
            fits = self._waiting == 0 or self._waiting + job.bytes <= QUEUE_BYTES
            if not fits or self._jobs.full():
                self._behind_s = time.monotonic()
                return False
            if job.bytes >= self._too_large:
                return False
            if self.failing or not self._has_room(self._promised + job.most_bytes):
                self._refused_bytes = job.most_bytes
                return False
            self._waiting += job.bytes
            self._promised += job.most_bytes
            self._jobs.put(job)
        return True

    def _has_room(self, wanted: int) -> bool:
        """Whether the disk takes so many bytes more, and leaves the results some. Notes why not."""
        try:
            disk = os.statvfs(self._looked_at())
        except OSError as error:
            self.failing = f"{self.folder}: {error.strerror}"
            return False
        spare = min(_SPARE_BYTES, disk.f_blocks * disk.f_frsize // 20)
        free = disk.f_bavail * disk.f_frsize
        if free - spare >= wanted and (disk.f_favail > _SPARE_FILES or not disk.f_files):
            return True
        self.failing = f"{self.folder}: the disk is full: {free >> 20} MB free, of which {spare >> 20} MB are for results"
        return False

    def _looked_at(self) -> Path:
        """The folder, or what it will lie in."""
        return next((path for path in (self.folder, *self.folder.parents) if path.exists()), Path("/"))

    # --- the thread

    def _run(self) -> None:
        try:
            self._look()
        except OSError as error:  # what cannot be counted now is when a next start can
            log.error("evidence of earlier runs: %s", error)
        while not self._given_up:
            try:
                job = self._jobs.get(timeout=_TRY_AGAIN_S)
            except queue.Empty:
                self._try_again()
                continue
            if job is None:
                return
            self._write_or_tell(job)
            with self._lock:
                self._waiting -= job.bytes
                self._promised -= job.most_bytes

    def _write_or_tell(self, job: _Job) -> None:
        place = self.folder / job.kind / job.name
        try:
            self._write(job, place)
        except Exception as error:  # root of a thread: one part's picture must not cost all others theirs
            shutil.rmtree(place, ignore_errors=True)  # half of it is of no use, and counted nowhere
            self.lost += 1
            if isinstance(error, OSError):
                self.failing = f"{place}: {error.strerror}"
                log.error("evidence not kept: %s", error)
            else:
                log.exception("evidence not kept")

    def _try_again(self) -> None:
        """Whether the disk takes pictures again."""
        if not self.failing or not self._has_room(self._promised + self._refused_bytes):
            return
        probe = self.folder / ".probe"
        try:
            self._access.make_folder(self.folder)
            self._access.write(probe, bytes(_BLOCK))
            probe.unlink()
            self.failing = ""
        except OSError as error:
            self.failing = f"{self.folder}: {error.strerror}"

    def _look(self) -> None:
        """What earlier runs have kept, oldest first; what they did not finish, and what no version keeps now, is removed."""
        for old in self.folder.glob("*.jpg"):
            old.unlink()
        if self.folder.exists():
            self._access.give(self.folder)
        for kind, kept in self._kept.items():
            places = [place for place in (self.folder / kind).glob("*") if place.is_dir()]
            for place in sorted(places, key=lambda place: place.stat().st_mtime):
                if (place / _FRAMES).exists():
                    kept[place.name] = sum(_on_disk(path.stat().st_size) for path in place.iterdir())
                    self._open(place)
                else:
                    shutil.rmtree(place, ignore_errors=True)
            if places:
                self._access.give(self.folder / kind)
            self.used[kind] = sum(kept.values())

    def _open(self, place: Path) -> None:
        """Give an earlier part to those who may read it now."""
        with contextlib.suppress(PermissionError):  # another user's, of an earlier installation
            for path in (*place.iterdir(), place):
                self._access.give(path)

    def _write(self, job: _Job, place: Path) -> None:
        files: dict[str, bytes] = {}
        told = []
        for number, (camera, frame) in enumerate(job.frames):
            name = f"{number}-{camera}.png" if frame.image.size else None  # one that came broken has no pixels
            told.append({"file": name, "camera": camera, "fault": frame.fault, "fault_detail": frame.fault_detail})
            if name is not None:
                files[name] = pictures.encoded(frame.image)
        if job.worst is not None:
            files[EXPLANATION] = _explained(job, job.worst)
        files[_FRAMES] = json.dumps(told).encode()  # last: a part with it is whole
        size = sum(_on_disk(len(data)) for data in files.values())
        self._make_room(job, size)
        for folder in (self.folder, place.parent, place):
            self._access.make_folder(folder)
        for name, data in files.items():
            self._access.write(place / name, data)
        self._kept[job.kind][job.name] = size
        self.used[job.kind] += size

    def _make_room(self, job: _Job, wanted: int) -> None:
        """Remove parts until `wanted` bytes fit: the oldest of the kind that is furthest above its share."""
        if wanted > self.quota:
            self._too_large = min(self._too_large, job.bytes)
            raise PictureError(f"{self.folder}: a part of {wanted >> 20} MB is more than the quota", hint="storage.evidence_mb")
        while sum(self.used.values()) + wanted > self.quota:
            over = {
                one: (self.used[one] + wanted * (one == job.kind)) / share for one, share in SHARES.items() if self._kept[one]
            }
            most = max(over, key=lambda one: over[one])
            name, size = self._kept[most].popitem(last=False)
            shutil.rmtree(self.folder / most / name, ignore_errors=True)
            self.used[most] -= size


def _title(result: Result) -> str:
    part = f"part {result.part_id}  " if result.part_id is not None else ""
    return (
        f"{result.station}  {part}trigger {result.trigger_id}\n"
        f"{result.verdict.value}: {result.reason.value}  {rfc3339(result.decided_at)}"
    )


def _explained(job: _Job, view: View) -> bytes:
    """The picture that explains a part: which it was, when, by how much, and as which result it is on record."""
    finding, result_id = view.finding, ""
    if job.named is not None:
        with contextlib.suppress(FutureTimeout):
            result_id = job.named.result(_NAMED_WITHIN_S)
    score = "no score" if finding.score is None else f"score {finding.score:.4g}, threshold {finding.threshold:.4g}"
    caption = f"{job.title}\n{finding.camera}, {finding.roi}: {score}" + (f"  result {result_id}" if result_id else "")
    picture = pictures.explanation(
        view.seen, view.anomaly, finding.threshold, finding.regions, view.expected, caption, view.offset_px
    )
    return pictures.encoded(picture, ".jpg")
