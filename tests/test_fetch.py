"""Bundles over https: a real server with a certificate of its own, that breaks off, lies and leads elsewhere."""

from __future__ import annotations

import http.server
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_inspector import bundles, signatures
from edge_inspector.door import Door, Sources
from edge_inspector.errors import BundleDamaged, BundleError, BundleUntrusted, InspectorError, SourceUnreachable
from edge_inspector.remote.fetch import Patience, fetch
from tests.line import needed
from tests.tiny import tiny_bundle


def certificate(place: Path) -> Path:
    needed(shutil.which("openssl"), "apt install openssl")
    made = place / "server.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(place / "server.key"), "-out",
         str(made), "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    return made


class Dripping:
    """A server that gives a byte every now and then, for ever: from its TLS on, in its headers, or in its answer."""

    def __init__(self, place: Path, stage: str, every_s: float = 0.2) -> None:
        self.certificate, self._stage, self._every_s = certificate(place), stage, every_s
        self._key = place / "server.key"
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open = list[socket.socket]()
        self._over = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                line, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(line)
            threading.Thread(target=self._serve, args=(line,), daemon=True).start()

    def _serve(self, line: socket.socket) -> None:
        try:
            if self._stage != "tls":
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(self.certificate, self._key)
                line = context.wrap_socket(line, server_side=True)
                self._open.append(line)
                line.recv(4096)
                line.sendall(b"HTTP/1.1 200 OK\r\nX-Long: ")
            if self._stage == "answer":
                line.sendall(b"x\r\nContent-Length: 1000000\r\n\r\n")
            bytes_ = b"\x16\x03\x03\x40\x00" if self._stage == "tls" else b""  # a record of 16 KB begins
            while not self._over.wait(self._every_s):
                line.sendall(bytes_[:1] or b" ")
                bytes_ = bytes_[1:]
        except OSError:
            return  # the other side has had enough

    def close(self) -> None:
        self._over.set()
        for line in (self._listener, *self._open):
            line.close()


@pytest.fixture(params=["tls", "headers", "answer"])
def dripping(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Dripping]:
    server = Dripping(tmp_path, request.param)
    yield server
    server.close()


class Server:
    """Serves a folder; `cut` ends each answer after so many bytes, `lead` sends the client elsewhere."""

    def __init__(self, folder: Path, place: Path) -> None:
        self.certificate = certificate(place)
        self.cut: int | None = None
        self.pause_s = 0.0
        self.lead = ""
        self.asked: list[tuple[str, int]] = []
        """Files, and from which byte on."""
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                begin = int(m.group(1)) if (m := re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
                outer.asked.append((self.path[1:], begin))
                time.sleep(outer.pause_s)
                if outer.lead:
                    self.send_response(302)
                    self.send_header("Location", outer.lead)
                    self.end_headers()
                    return
                file = folder / self.path[1:]
                if not file.exists():
                    self.send_error(404)
                    return
                data = file.read_bytes()[begin:]
                self.send_response(206 if begin else 200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: outer.cut] if file.name == "network.onnx" else data)

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, place / "server.key")
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"https://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Server, Path]]:
    folder = tiny_bundle(tmp_path / "made").folder
    server = Server(folder, tmp_path)
    yield server, folder
    server.close()


def untold(phase: str, done: int, total: int) -> None:
    pass


def test_a_bundle_comes_over_https_and_goes_on_where_it_broke_off(served: tuple[Server, Path], tmp_path: Path) -> None:
    server, folder = served
    trust, here, told = folder.parent / "trust", tmp_path / "here", list[tuple[int, int]]()
    server.cut = 100
    size = (folder / "network.onnx").stat().st_size
    tries = 0
    while True:
        try:
            fetch(server.url, here, trust, lambda _, done, total: told.append((done, total)), server.certificate)
            break
        except SourceUnreachable:
            tries += 1
            assert tries < size, "must go on"
    begins = [begin for name, begin in server.asked if name == "network.onnx"]
    assert begins == list(range(0, size, 100)), "each try goes on where the last one ended"
    assert bundles.open_bundle(here, trust).manifest.name == "tiny"
    assert told[-1] == (
        sum(p.stat().st_size for p in folder.iterdir() if p.name not in ("manifest.json", "signature")),
        told[-1][1],
    )
    assert told[-1][0] == told[-1][1]
    asked = len(server.asked)
    fetch(server.url, here, trust, untold, server.certificate)
    assert len(server.asked) == asked + 2, "what is there already is not fetched again"


def test_no_more_comes_than_was_signed(served: tuple[Server, Path], tmp_path: Path) -> None:
    server, folder = served
    trust, here = folder.parent / "trust", tmp_path / "here"
    network = (folder / "network.onnx").read_bytes()
    (folder / "network.onnx").write_bytes(network + b"x" * 10_000_000)
    with pytest.raises(BundleDamaged, match="not what the manifest says"):
        fetch(server.url, here, trust, untold, server.certificate)
    assert sum(p.stat().st_size for p in here.iterdir()) < 100_000
    (folder / "network.onnx").write_bytes(network[:-1] + b"?")
    with pytest.raises(BundleDamaged, match="not what the manifest says"):
        fetch(server.url, here, trust, untold, server.certificate)
    (folder / "network.onnx").write_bytes(network[:-1])
    with pytest.raises(SourceUnreachable, match="ended after"):
        fetch(str(folder), here, trust, untold)
    (folder / "manifest.json").write_bytes(b"{" + b" " * (5 << 20))
    with pytest.raises(BundleDamaged, match="more than"):
        fetch(server.url, here, trust, untold, server.certificate)


def test_nothing_but_the_manifest_comes_of_a_bundle_that_is_not_trusted(served: tuple[Server, Path], tmp_path: Path) -> None:
    server, folder = served
    with pytest.raises(BundleUntrusted, match="not trusted"):
        fetch(server.url, tmp_path / "here", tmp_path / "no-keys", untold, server.certificate)
    (folder / "signature").unlink()
    with pytest.raises(BundleUntrusted, match="not signed"):
        fetch(server.url, tmp_path / "here", folder.parent / "trust", untold, server.certificate)
    assert {name for name, _ in server.asked} == {"manifest.json", "signature"}


def test_where_it_comes_from_is_https_or_a_folder(served: tuple[Server, Path], tmp_path: Path) -> None:
    server, folder = served
    trust, here = folder.parent / "trust", tmp_path / "here"
    for source in ("http://127.0.0.1/x", "file:///etc", "ftp://x", "relative/path", ""):
        with pytest.raises(BundleError, match="neither an https address"):
            fetch(source, here, trust, untold)
    with pytest.raises(SourceUnreachable, match="certificate"):
        fetch(server.url, here, trust, untold)
    server.lead = "http://127.0.0.1:1/elsewhere"
    with pytest.raises(SourceUnreachable, match="no https address"):
        fetch(server.url, here, trust, untold, server.certificate)
    with pytest.raises(SourceUnreachable, match="No such file"):
        fetch(str(tmp_path / "nowhere"), here, trust, untold)


def test_a_bundle_comes_from_what_is_listed_wherever_a_server_or_a_link_leads(
    served: tuple[Server, Path], tmp_path: Path
) -> None:
    server, folder = served
    trust, here = folder.parent / "trust", tmp_path / "here"
    door = Door(Sources(folders=(str(folder),), hosts=("127.0.0.1",)), tmp_path)
    fetch(server.url, here, trust, untold, server.certificate, judge=door.judge_bundle)
    fetch(str(folder), tmp_path / "there", trust, untold, judge=door.judge_bundle)
    (folder / "manifest.json").rename(tmp_path / "manifest.json")
    (folder / "manifest.json").symlink_to(tmp_path / "manifest.json")
    with pytest.raises(BundleError, match="leads out of the listed folders"):
        fetch(str(folder), tmp_path / "linked", trust, untold, judge=door.judge_bundle)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_source_that_gives_too_little_or_takes_too_long_is_left_and_cancel_ends_it_at_once(
    dripping: Dripping, tmp_path: Path
) -> None:
    where = (dripping.url, tmp_path / "here", tmp_path / "trust")
    slow = Patience(least_bytes_s=1000, window_s=1.0)
    for patience, words in ((slow, "bytes a second, at least 1000 are needed"), (Patience(total_s=1.5), "did not come within")):
        began = time.monotonic()
        with pytest.raises(SourceUnreachable, match=words):
            fetch(*where, untold, dripping.certificate, patience=patience)
        assert time.monotonic() - began < 8
    began = time.monotonic()

    def cancelled(*_: object) -> None:
        if time.monotonic() - began > 0.5:
            raise InspectorError("cancelled")

    with pytest.raises(InspectorError, match="cancelled"):
        fetch(*where, cancelled, dripping.certificate)
    assert time.monotonic() - began < 4


def test_a_source_that_is_slow_but_gives_enough_is_waited_for(served: tuple[Server, Path], tmp_path: Path) -> None:
    server, folder = served
    patience = Patience(least_bytes_s=50, window_s=1.0)
    server.pause_s = 0.3
    fetch(server.url, tmp_path / "here", folder.parent / "trust", untold, server.certificate, patience=patience)


def test_a_pipe_in_the_place_of_a_file_holds_nobody_up(tmp_path: Path) -> None:
    folder = tiny_bundle(tmp_path / "made").folder
    for name in ("manifest.json", "network.onnx"):
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / name).unlink()
        os.mkfifo(tmp_path / name / name)
        with pytest.raises(SourceUnreachable, match="not a plain file"):
            fetch(str(tmp_path / name), tmp_path / "here", folder.parent / "trust", untold)


def test_a_disk_without_room_is_told_before_it_is_full(small_disk: Path, tmp_path: Path) -> None:
    folder = tiny_bundle(tmp_path / "made").folder
    (folder / "report.html").write_bytes(b"x" * 3_000_000)
    old = bundles.signed_manifest(folder, folder.parent / "trust")
    bundles.write_manifest(folder, old.model_copy(update={"files": bundles.file_entries(folder)}))
    bundles.sign(folder, signatures.read_private_key(folder.parent / "keys" / "signing.key"))
    with pytest.raises(BundleError, match="are needed"):
        fetch(str(folder), small_disk / "here", folder.parent / "trust", untold)
