"""Bundles over https: a real server with a certificate of its own, that breaks off, lies and leads elsewhere."""

from __future__ import annotations

import http.server
import re
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_inspector import bundles, signatures
from edge_inspector.door import Door, Sources
from edge_inspector.errors import BundleDamaged, BundleError, BundleUntrusted, SourceUnreachable
from edge_inspector.remote.fetch import fetch
from tests.line import needed
from tests.tiny import tiny_bundle


class Server:
    """Serves a folder; `cut` ends each answer after so many bytes, `lead` sends the client elsewhere."""

    def __init__(self, folder: Path, place: Path) -> None:
        needed(shutil.which("openssl"), "apt install openssl")
        self.certificate = place / "server.pem"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(place / "server.key"), "-out",
             str(self.certificate), "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
            check=True, capture_output=True,
        )  # fmt: skip
        self.cut: int | None = None
        self.lead = ""
        self.asked: list[tuple[str, int]] = []
        """Files, and from which byte on."""
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                begin = int(m.group(1)) if (m := re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
                outer.asked.append((self.path[1:], begin))
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
    server.lead = "https://localhost:1/elsewhere"
    with pytest.raises(BundleError, match=r"localhost: its host is not listed; add sources: {hosts: \[localhost\]}"):
        fetch(server.url, tmp_path / "led", trust, untold, server.certificate, judge=door.judge_bundle)
    (folder / "manifest.json").rename(tmp_path / "manifest.json")
    (folder / "manifest.json").symlink_to(tmp_path / "manifest.json")
    with pytest.raises(BundleError, match="leads out of the listed folders"):
        fetch(str(folder), tmp_path / "linked", trust, untold, judge=door.judge_bundle)


def test_a_disk_without_room_is_told_before_it_is_full(small_disk: Path, tmp_path: Path) -> None:
    folder = tiny_bundle(tmp_path / "made").folder
    (folder / "report.html").write_bytes(b"x" * 3_000_000)
    old = bundles.signed_manifest(folder, folder.parent / "trust")
    bundles.write_manifest(folder, old.model_copy(update={"files": bundles.file_entries(folder)}))
    bundles.sign(folder, signatures.read_private_key(folder.parent / "keys" / "signing.key"))
    with pytest.raises(BundleError, match="are needed"):
        fetch(str(folder), small_disk / "here", folder.parent / "trust", untold)
