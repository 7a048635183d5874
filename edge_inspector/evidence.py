"""Pictures of failed parts, kept under a quota: the region as seen, its anomaly map, what was expected.

They are for people: JPEG, a fifth of the time that PNG takes.
"""

from __future__ import annotations

import hashlib
import logging
import queue
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from edge_inspector import pictures
from edge_inspector.errors import PictureError
from edge_inspector.inspector import View
from edge_inspector.results import Evidence
from edge_inspector.threads import Thread

log = logging.getLogger(__name__)

QUEUE = 16
"""Pictures that wait to be written; more are not kept, and the result says so."""


@dataclass(frozen=True)
class _Job:
    path: Path
    view: View
    title: str


class EvidenceStore:
    """Writes pictures beside the line of results; oldest go first. Use as a context manager."""

    def __init__(self, folder: Path, quota_mb: int) -> None:
        """A quota of 0 keeps nothing."""
        self.folder, self.quota = folder, quota_mb << 20
        self.dropped = 0
        self._jobs: queue.Queue[_Job | None] = queue.Queue(QUEUE)
        self._thread = Thread(target=self._run, name="evidence", daemon=True)

    def __enter__(self) -> EvidenceStore:
        """Start the writer."""
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Write what waits (within two seconds)."""
        try:
            self._jobs.put(None, timeout=1.0)
        except queue.Full:
            return
        self._thread.join(2.0)

    def path(self, evidence_id: str) -> Path:
        """Where the picture of an evidence id lies."""
        return self.folder / f"{evidence_id.removeprefix('sha256:')[:32]}.jpg"

    def keep(self, views: Iterable[View], title: str) -> Evidence | None:
        """Hand in the worst view of a failed part. `stored` is False when the writer is behind or keeps nothing."""
        worst = max(views, key=lambda view: view.finding.ratio or 0.0, default=None)
        if worst is None:
            return None
        identity = f"sha256:{hashlib.sha256(worst.seen.tobytes()).hexdigest()}"
        try:
            if self.quota == 0:
                raise queue.Full
            self._jobs.put_nowait(_Job(self.path(identity), worst, title))
        except queue.Full:
            self.dropped += 1
            return Evidence(id=identity, stored=False)
        return Evidence(id=identity, stored=True)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._write(job)
            except (PictureError, OSError) as error:
                self.dropped += 1
                log.error("evidence not kept: %s", error)

    def _write(self, job: _Job) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        view, finding = job.view, job.view.finding
        picture = pictures.explanation(
            view.seen, view.anomaly, finding.threshold, finding.regions, view.expected, job.title, view.offset_px
        )
        data = pictures.encoded(picture)
        self._make_room(len(data))
        pictures.write_encoded(job.path, data)

    def _make_room(self, wanted: int) -> None:
        files = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in self.folder.glob("*.jpg"))
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total + wanted <= self.quota:
                return
            path.unlink(missing_ok=True)
            total -= size
