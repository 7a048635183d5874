"""A bundle's files, brought to this device: from a folder or over https, no more than was signed, going on where it stopped."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import ssl
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from http.client import (
    NOT_FOUND,
    OK,
    PARTIAL_CONTENT,
    HTTPException,
    HTTPResponse,
    HTTPSConnection,
)
from pathlib import Path
from types import TracebackType
from typing import Protocol
from urllib.parse import urlsplit

from edge_inspector.addresses import told_source
from edge_inspector.bundles import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    SIGNATURE,
    FileEntry,
    Manifest,
    signed_manifest,
)
from edge_inspector.errors import (
    BundleDamaged,
    BundleError,
    BundleUntrusted,
    InspectorError,
    SourceUnreachable,
)
from edge_inspector.threads import Thread

ROOM = 3
"""Times the bundle's size that must be free: its files, what is built of them, and something to live on."""
_PIECE = 1 << 18
_TIMEOUT_S = 20.0
_LOOK_S, _JOIN_S = 0.25, 5.0
Tell = Callable[[str, int, int], None]
"""Phase, bytes done, bytes in all; what it raises ends the work. Called a few times a second, from any thread."""

Judge = Callable[[str], str]
"""Says where a source really lies; raises BundleError for one that may not be read."""


@dataclass(frozen=True)
class Patience:
    """What a source may take."""

    total_s: float = 6 * 3600.0
    """For all tries together."""
    least_bytes_s: float = 16 * 1024.0
    window_s: float = 30.0
    """It must give that much in each such stretch of waiting for it."""


PATIENCE = Patience()


class _Pieces(Protocol):
    def read1(self, most: int, /) -> bytes:
        """What there is, as soon as there is some; empty at the end. Raises OSError."""
        ...

    def close(self) -> None: ...


class _Watch:
    """Ends a connection that gives too little, takes too long, or is not wanted any more.

    There is no lock: whoever fetches only adds to its figures, and the watching thread compares them with what it saw last.
    """

    def __init__(self, source: str, tell: Tell, patience: Patience, end_s: float) -> None:
        """Works between `__enter__` and `__exit__`; `tell` raises when nobody wants the bundle any more."""
        self.done, self.total = 0, 0
        self.fault: InspectorError | None = None
        self._source, self._tell, self._patience, self._end_s = source, tell, patience, end_s
        self._waits: tuple[float, float | None] = 0.0, None
        """Seconds that were waited for the source, and since when it has its turn again."""
        self._got = 0
        self._seen: tuple[float, int] = 0.0, 0
        """What was waited and had come when the rate was looked at last."""
        self._line: socket.socket | None = None
        self._over = threading.Event()
        self._thread = Thread(target=self._run, name="fetch-watch", daemon=True)

    def __enter__(self) -> _Watch:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End; the connection is left to its owner."""
        self._over.set()
        self._thread.join(_JOIN_S)
        self._let_go()

    def follow(self, line: socket.socket | None) -> None:
        """This connection is to be ended, from before its first byte on."""
        self._let_go()
        self._line = line.dup() if line is not None else None
        self.refuse()

    def _let_go(self) -> None:
        line, self._line = self._line, None
        if line is not None:
            line.close()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Meanwhile the source has its turn. Raises what has ended the connection."""
        self._waits = self._waited(), time.monotonic()
        try:
            yield
        finally:
            self._waits = self._waited(), None
        self.refuse()

    def got(self, count: int) -> None:
        """So many bytes came."""
        self._got += count

    def reached(self, done: int) -> None:
        """So much of the bundle is here. Raises what `tell` raises."""
        self.done = done
        self._tell("fetch", self.done, self.total)

    def refuse(self) -> None:
        """Raise what has ended the connection."""
        if self.fault is not None:
            raise self.fault

    def _waited(self) -> float:
        waited_s, since = self._waits
        return waited_s + (time.monotonic() - since if since is not None else 0.0)

    def _run(self) -> None:
        while not self._over.wait(_LOOK_S):
            try:
                self._tell("fetch", self.done, self.total)
                self._check()
            except InspectorError as fault:
                self.fault = fault
                self._shut()
                return

    def _check(self) -> None:
        hint = "is it there, and can this device reach it well enough?"
        if time.monotonic() > self._end_s:
            words = f"it did not come within {self._patience.total_s:g} s"
            raise SourceUnreachable(f"{self._source}: {words}", hint=hint)
        waited_s, got = self._waited(), self._got
        for_s, more = waited_s - self._seen[0], got - self._seen[1]
        if for_s < self._patience.window_s:
            return
        self._seen = waited_s, got
        rate, least = more / for_s, self._patience.least_bytes_s
        if rate < least:
            words = f"it gives {rate:.0f} bytes a second, at least {least:.0f} are needed"
            raise SourceUnreachable(f"{self._source}: {words}", hint=hint)

    def _shut(self) -> None:
        line = self._line
        with suppress(OSError):  # gone already
            if line is not None:
                line.shutdown(socket.SHUT_RDWR)


class _Place(Protocol):
    def open(self, name: str, offset: int) -> tuple[_Pieces, int]:
        """A file from `offset` on, and where it really begins. Raises OSError."""
        ...


class _Folder:
    def __init__(self, folder: Path, judge: Judge) -> None:
        self.folder, self._judge = folder, judge

    def open(self, name: str, offset: int) -> tuple[_Pieces, int]:
        place = self._judge(str(self.folder / name))
        descriptor = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        file = os.fdopen(descriptor, "rb")
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            file.close()
            raise OSError(f"{name} is not a plain file")
        file.seek(offset)
        return file, offset


class _Connection(HTTPSConnection):
    """Watched from its first byte on."""

    def __init__(self, host: str, port: int, context: ssl.SSLContext, watch: _Watch) -> None:
        super().__init__(host, port, timeout=_TIMEOUT_S, context=context)
        self._tls, self._watch = context, watch

    def connect(self) -> None:
        """Connect, and speak TLS."""
        line = socket.create_connection((self.host, self.port), _TIMEOUT_S)
        self._watch.follow(line)
        self.sock = self._tls.wrap_socket(line, server_hostname=self.host)


class _Answer:
    """A response and its connection."""

    def __init__(self, connection: _Connection, response: HTTPResponse) -> None:
        self._connection, self._response = connection, response

    def read1(self, most: int, /) -> bytes:
        return self._response.read1(most)

    def close(self) -> None:
        self._response.close()
        self._connection.close()


class _Server:
    """Redirects are not followed: what was ordered is one address."""

    def __init__(self, url: str, ca_file: Path | None, watch: _Watch) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 443
        self._path, self._query = parts.path.rstrip("/"), f"?{parts.query}" if parts.query else ""
        self._context = ssl.create_default_context(cafile=str(ca_file) if ca_file else None)
        self._watch = watch

    def open(self, name: str, offset: int) -> tuple[_Pieces, int]:
        connection = _Connection(self._host, self._port, self._context, self._watch)
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        with ExitStack() as opened:
            opened.callback(connection.close)
            connection.request("GET", f"{self._path}/{name}{self._query}", headers=headers)
            response = opened.enter_context(closing(connection.getresponse()))
            _refuse_status(response, name)
            opened.pop_all()
        return _Answer(connection, response), offset if response.status == PARTIAL_CONTENT else 0


def _refuse_status(answer: HTTPResponse, name: str) -> None:
    if answer.status == NOT_FOUND:
        raise FileNotFoundError(f"{name}: No such file there (404)")
    target = answer.headers.get("Location")
    if target is not None:
        why = "redirects are not followed" if target.startswith("https:") else "which is no https address"
        raise OSError(f"{name} leads on to {told_source(target)}, {why}: order the address where it lies")
    if answer.status not in (OK, PARTIAL_CONTENT):
        raise OSError(f"{name}: the server answers {answer.status} {answer.reason}")


def fetch(
    source: str, folder: Path, trust: Path, tell: Tell, ca_file: Path | None = None,
    *, judge: Judge = lambda place: place, patience: Patience = PATIENCE, end_s: float | None = None,
) -> Manifest:  # fmt: skip
    """Bring the bundle at `source`, an https address or an absolute path, into `folder`; returns its manifest.

    The manifest and its signature come first: nothing else is fetched of a bundle that is not trusted, and of each file no
    more than the manifest says. Files that are there already are kept. Everything is on disk when this returns.
    `judge`: asked where each file of a folder really lies. `end_s`: by the monotonic
    clock. Raises BundleError, and what `tell` raises.
    """
    end_s = time.monotonic() + patience.total_s if end_s is None else end_s
    where = told_source(source)
    with _Watch(where, tell, patience, end_s) as watch:
        try:
            return _fetched(_place(source, ca_file, watch, judge), where, folder, trust, watch)
        except (OSError, HTTPException) as error:
            watch.refuse()
            reason = getattr(error, "strerror", None) or error
            hint = "is it there, and can this device reach it?"
            if isinstance(error, ssl.SSLCertVerificationError):
                hint = "TLS: remote.ca_file in device.yaml names the authority of the server's certificate"
            raise SourceUnreachable(f"{where}: {reason}", hint=hint) from error


def _place(source: str, ca_file: Path | None, watch: _Watch, judge: Judge) -> _Place:
    try:
        if urlsplit(source).scheme == "https":
            return _Server(source, ca_file, watch)
    except ValueError as error:
        raise BundleError(f"{told_source(source)}: not an address", hint="https://server/bundles/lid/7") from error
    if source.startswith("/"):
        return _Folder(Path(source), judge)
    where = told_source(source)
    raise BundleError(f"{where}: neither an https address nor an absolute path", hint="https://server/bundles/lid/7")


def _fetched(place: _Place, source: str, folder: Path, trust: Path, watch: _Watch) -> Manifest:
    folder.mkdir(parents=True, exist_ok=True)
    for name in (MANIFEST, SIGNATURE):
        (folder / name).write_bytes(_small(place, name, source, watch))
    manifest = signed_manifest(folder, trust)
    _refuse_no_room(folder, sum(entry.size for entry in manifest.files.values()))
    _bring(place, folder, manifest, watch)
    _sync(folder)
    return manifest


def _pieces(place: _Place, name: str, offset: int, watch: _Watch) -> Iterator[tuple[int, bytes]]:
    """What comes of a file, and where it belongs; empty pieces: it begins there. Raises OSError."""
    with ExitStack() as opened:
        with watch.waiting():
            file, offset = place.open(name, offset)
            opened.callback(file.close)
        yield offset, b""
        while True:
            with watch.waiting():
                piece = file.read1(_PIECE)
            if not piece:
                return
            watch.got(len(piece))
            yield offset, piece
            offset += len(piece)


def _small(place: _Place, name: str, source: str, watch: _Watch) -> bytes:
    data = b""
    try:
        for _, piece in _pieces(place, name, 0, watch):
            data += piece
            if len(data) > MAX_MANIFEST_BYTES:
                raise BundleDamaged(f"{name}: more than {MAX_MANIFEST_BYTES} bytes")
    except FileNotFoundError as error:
        if name != SIGNATURE:
            raise
        raise BundleUntrusted(f"{source}: not signed", hint="sign it: edge-inspector sign BUNDLE --key KEY") from error
    return data


def _refuse_no_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < ROOM * size:
        raise BundleError(
            f"{folder}: {free >> 20} MB free, {ROOM * size >> 20} MB are needed", hint="make room, or lower storage.evidence_mb"
        )


def _bring(place: _Place, folder: Path, manifest: Manifest, watch: _Watch) -> None:
    watch.total = sum(entry.size for entry in manifest.files.values())
    for path in folder.iterdir():  # of another bundle, or another try
        if path.name.removesuffix(".part") not in {MANIFEST, SIGNATURE, *manifest.files}:
            path.unlink()
    before = 0
    for name, entry in manifest.files.items():
        path = folder / name
        if not (path.exists() and path.stat().st_size == entry.size and _hash(path) == entry.sha256):
            _bring_one(place, path, entry, before, watch)
        before += entry.size
        watch.reached(before)


def _bring_one(place: _Place, path: Path, entry: FileEntry, before: int, watch: _Watch) -> None:
    part = path.with_name(path.name + ".part")
    offset = part.stat().st_size if part.exists() else 0
    offset = 0 if offset > entry.size else offset
    with part.open("r+b" if offset else "wb") as out:
        for at, piece in _pieces(place, path.name, offset, watch) if offset < entry.size else ():
            if not piece:
                out.truncate(at)
            out.seek(at)
            out.write(piece[: entry.size + 1 - at])
            watch.reached(before + out.tell())
            if out.tell() > entry.size:
                break
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
