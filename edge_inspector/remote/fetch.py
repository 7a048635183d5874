"""A bundle's files, brought to this device: from a folder or over https, no more than was signed, going on where it stopped."""

from __future__ import annotations

import hashlib
import os
import shutil
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import closing
from http.client import NOT_FOUND, PARTIAL_CONTENT, HTTPException, HTTPMessage
from pathlib import Path
from typing import IO, Protocol
from urllib.parse import urlsplit

from edge_inspector.addresses import told_source
from edge_inspector.bundles import MANIFEST, MAX_MANIFEST_BYTES, SIGNATURE, FileEntry, Manifest, signed_manifest
from edge_inspector.errors import BundleDamaged, BundleError, BundleUntrusted, SourceUnreachable

ROOM = 3
"""Times the bundle's size that must be free: its files, what is built of them, and something to live on."""
_PIECE = 1 << 18
_TIMEOUT_S = 20.0
Tell = Callable[[str, int, int], None]
"""Phase, bytes done, bytes in all; what it raises ends the work."""
Judge = Callable[[str], str]
"""Says where a source really lies; raises BundleError for one that may not be read."""


class _Place(Protocol):
    def open(self, name: str, offset: int) -> tuple[IO[bytes], int]:
        """A file from `offset` on, and where it really begins. Raises OSError."""
        ...


class _Folder:
    def __init__(self, folder: Path, judge: Judge) -> None:
        self.folder, self._judge = folder, judge

    def open(self, name: str, offset: int) -> tuple[IO[bytes], int]:
        place = Path(self._judge(str(self.folder / name)))
        file = place.open("rb")
        file.seek(offset)
        return file, offset


class _NoDetours(urllib.request.HTTPRedirectHandler):
    """Only to https again, at a host that is listed."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        if urlsplit(newurl).scheme != "https":
            raise urllib.error.URLError("leads on to what is no https address")
        self._judge(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Server:
    def __init__(self, url: str, ca_file: Path | None, judge: Judge) -> None:
        self.url = url.rstrip("/")
        context = ssl.create_default_context(cafile=str(ca_file) if ca_file else None)
        self._opener = urllib.request.build_opener(_NoDetours(judge), urllib.request.HTTPSHandler(context=context))

    def open(self, name: str, offset: int) -> tuple[IO[bytes], int]:
        request = urllib.request.Request(f"{self.url}/{name}")  # noqa: S310 - https, as `fetch` sees to
        if offset:
            request.add_header("Range", f"bytes={offset}-")
        answer = self._opener.open(request, timeout=_TIMEOUT_S)
        return answer, offset if answer.status == PARTIAL_CONTENT else 0


def fetch(
    source: str, folder: Path, trust: Path, tell: Tell, ca_file: Path | None = None, *, judge: Judge = lambda place: place
) -> Manifest:  # fmt: skip
    """Bring the bundle at `source`, an https address or an absolute path, into `folder`; returns its manifest.

    The manifest and its signature come first: nothing else is fetched of a bundle that is not trusted, and of each file no
    more than the manifest says. Files that are there already are kept. Everything is on disk when this returns.
    `judge`: the door, which is asked where each file really lies and each redirection leads.
    Raises BundleError.
    """
    place: _Place
    where = told_source(source)
    if urlsplit(source).scheme == "https":
        place = _Server(source, ca_file, judge)
    elif source.startswith("/"):
        place = _Folder(Path(source), judge)
    else:
        raise BundleError(f"{where}: neither an https address nor an absolute path", hint="https://server/bundles/lid/7")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (MANIFEST, SIGNATURE):
            (folder / name).write_bytes(_small(place, name, where))
        manifest = signed_manifest(folder, trust)
        _refuse_no_room(folder, sum(entry.size for entry in manifest.files.values()))
        _bring(place, folder, manifest, tell)
        _sync(folder)
    except (OSError, HTTPException) as error:  # URLError is an OSError
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise SourceUnreachable(f"{where}: {reason}", hint="is it there, and can this device reach it?") from error
    return manifest


def _small(place: _Place, name: str, source: str) -> bytes:
    try:
        file, _ = place.open(name, 0)
    except (FileNotFoundError, urllib.error.HTTPError) as error:
        if name != SIGNATURE or getattr(error, "code", NOT_FOUND) != NOT_FOUND:
            raise
        raise BundleUntrusted(f"{source}: not signed", hint="sign it: edge-inspector sign BUNDLE --key KEY") from error
    with closing(file):
        data = file.read(MAX_MANIFEST_BYTES + 1)
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleDamaged(f"{name}: more than {MAX_MANIFEST_BYTES} bytes")
    return data


def _refuse_no_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < ROOM * size:
        raise BundleError(
            f"{folder}: {free >> 20} MB free, {ROOM * size >> 20} MB are needed", hint="make room, or lower storage.evidence_mb"
        )


def _bring(place: _Place, folder: Path, manifest: Manifest, tell: Tell) -> None:
    total, done = sum(entry.size for entry in manifest.files.values()), 0
    for path in folder.iterdir():  # of another bundle, or another try
        if path.name.removesuffix(".part") not in {MANIFEST, SIGNATURE, *manifest.files}:
            path.unlink()
    for name, entry in manifest.files.items():
        path = folder / name
        if not (path.exists() and path.stat().st_size == entry.size and _hash(path) == entry.sha256):
            _bring_one(place, path, entry, lambda bytes_, before=done: tell("fetch", before + bytes_, total))  # type: ignore[misc]
        done += entry.size
        tell("fetch", done, total)


def _bring_one(place: _Place, path: Path, entry: FileEntry, tell: Callable[[int], None]) -> None:
    part = path.with_name(path.name + ".part")
    offset = part.stat().st_size if part.exists() else 0
    if offset > entry.size:
        offset = 0
    file, offset = place.open(path.name, offset) if offset < entry.size else (None, offset)
    with part.open("r+b" if offset else "wb") as out:
        out.truncate(offset)
        out.seek(offset)
        while file is not None and (piece := file.read(min(_PIECE, entry.size + 1 - out.tell()))):
            out.write(piece)
            tell(out.tell())
            if out.tell() > entry.size:
                break
    if file is not None:
        file.close()
    found = part.stat().st_size
    if found < entry.size:
        raise OSError(f"{path.name} ended after {found} of {entry.size} bytes")
    if found > entry.size or _hash(part) != entry.sha256:
        part.unlink()
        raise BundleDamaged(f"{path.name}: not what the manifest says", hint="the source does not fit its own manifest")
    os.replace(part, path)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    """All of it, on disk: what is in force after a power cut must be there."""
    for path in (*folder.iterdir(), folder, folder.parent):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
