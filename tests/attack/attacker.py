"""The attack: `unshare --net python -m tests.attack.attacker FOLDER COUNT SEED` prints what was reached, as JSON.

Allowed, and so not told: reads of Python, of the system's libraries and of the files that these look up, of the device's own folder,
of its bundles and of what device.yaml lists; writes below its state folder; connections to its broker and to a listed host.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from edge_inspector import pictures
from edge_inspector.cameras.synthetic import draw_part
from tests.attack.documents import LISTED_HOST, TRAP, admissible, demonstrated, generated, line
from tests.line import Listener, Mosquitto, listening, until
from tests.tiny import tiny_bundle

REPOSITORY = Path(__file__).resolve().parents[2]
BATCH = 50
TRIED_S = 2.0
LIBRARY = """
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>
__attribute__((constructor)) static void loaded(void) { close(open("%s", O_CREAT | O_WRONLY, 0600)); }
"""
READ_BY_LIBRARIES = {
    "/etc/ld.so.cache", "/etc/ld.so.preload", "/etc/localtime", "/etc/timezone", "/etc/hosts", "/etc/host.conf", "/etc/nsswitch.conf",
    "/etc/resolv.conf", "/etc/gai.conf", "/etc/ssl/openssl.cnf", "/etc/ssl/certs", "/etc/protocols", "/etc/services", "/etc/mime.types",
    "/etc/machine-id", "/etc/os-release", "/etc/passwd", "/etc/group", "/etc/locale.alias", "/etc/openni2/OpenNI.ini", "/etc/libva.conf",
    "/etc/gitconfig", "/tmp", "/var/tmp", "/etc/drirc",
}  # fmt: skip
"""Opened by the C library, glib, OpenCV and GStreamer's plugins of their own accord; the last folders to see whether they are there."""


class Traps:
    """Listens where nobody may come; a listed host leads on to one of them."""

    def __init__(self) -> None:
        self.reached: list[str] = []
        for host in (TRAP, "127.0.0.1", "::1"):
            for port in (80, 443, 554, 322, 8080, 21):
                self._listen(host, port, self._note)
            self._hear(host, 3956)
        self._hear("127.0.0.53", 53)
        for port in (80, 554):
            self._listen(LISTED_HOST, port, self._lead_on)

    def _listen(self, host: str, port: int, answer: Any) -> None:
        server = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)

        def serve() -> None:
            while True:
                connection, _ = server.accept()
                threading.Thread(target=answer, args=(connection, f"{host}:{port}"), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()

    def _hear(self, host: str, port: int) -> None:
        heard = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        heard.bind((host, port))

        def hear() -> None:
            while True:
                data, sender = heard.recvfrom(4096)
                self.reached.append(f"udp {host}:{port} from {sender}: {data[:60]!r}")

        threading.Thread(target=hear, daemon=True).start()

    def _note(self, connection: socket.socket, where: str) -> None:
        self.reached.append(f"tcp {where}")
        connection.close()

    def _lead_on(self, connection: socket.socket, _where: str) -> None:
        with connection:
            request = connection.recv(4096)
            rtsp = b"RTSP/1.0" in request
            if b"/asks" in request:
                connection.sendall(b"HTTP/1.0 401 no\r\nWWW-Authenticate: Basic realm=x\r\n\r\n")
            elif rtsp:
                connection.sendall(b"RTSP/1.0 302 Found\r\nCSeq: 1\r\nLocation: rtsp://%s/x\r\n\r\n" % TRAP.encode())
            else:
                connection.sendall(b"HTTP/1.0 302 Found\r\nLocation: http://%s/x\r\n\r\n" % TRAP.encode())


def make_world(world: Path, port: int) -> Path:
    """A device, what it lists, and canaries beside both; returns device.yaml."""
    device, listed, canary = (world / name for name in ("device", "listed", "canary"))
    for folder in (device / "credentials", listed / "links", listed / "own", canary):
        folder.mkdir(parents=True)
    bundle = tiny_bundle(world / "made")
    shutil.copytree(bundle.folder, device / "bundles" / "tiny")
    shutil.copytree(bundle.folder.parent / "trust", device / "trust")
    rng = np.random.default_rng(0)
    for place in (listed / "own" / "1.png", listed / "own" / "2.png", canary / "secret.png"):
        pictures.write(place, draw_part(rng, 64, 64, False))
    writer = cv2.VideoWriter(str(canary / "secret.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 64))
    for _ in range(5):
        writer.write(draw_part(rng, 64, 64, False))
    writer.release()
    source = world / "made" / "library.c"
    source.write_text(LIBRARY % (canary / "loaded"))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(canary / "library.so"), str(source)], check=True)
    links = listed / "links"
    (links / "out").symlink_to(canary)
    (links / "secret.avi").symlink_to(canary / "secret.avi")
    (links / "list.ffconcat").write_text("ffconcat version 1.0\nfile secret.avi\n")
    (links / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:1,\nsecret.avi\n#EXTINF:1,\nhttp://{TRAP}/x.ts\n")
    (links / "p%d.jpg").write_bytes(b"")
    (links / "p1.jpg").symlink_to(canary / "secret.png")
    (links / "pictures").mkdir()
    (links / "pictures" / "1.png").symlink_to(canary / "secret.png")
    (device / "credentials" / "camera").write_text("password\n")
    (device / "device.yaml").write_text(
        "schema: ei.device.v1\nidentity: {site: plant, line: line, device: edge}\n"
        f"broker: {{host: 127.0.0.1, port: {port}, keepalive_s: 5}}\nremote: {{require_signature: false}}\n"
        f"sources: {{folders: [../listed], hosts: [{LISTED_HOST}], gentl: {{vendor: none.cti}}, "
        'gst: {belt: "videotestsrc is-live=true ! video/x-raw,width=32,height=32,framerate=5/1"}}\n'
    )
    own = line(
        1,
        {
            "press": {"top": {"uri": "dir://../listed/own?loop=1&fps=2"}},
            "belt": {"top": {"uri": "gst:belt", "timeout_ms": 20_000}},
        },
    )
    (device / "line.yaml").write_text(json.dumps(own))
    return device / "device.yaml"


def fingerprint(folder: Path) -> dict[str, str]:
    """Names and contents."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


class Attack:
    """Sends documents and waits until each was answered."""

    def __init__(self, listener: Listener) -> None:
        self.listener, self.version, self.marks = listener, 100, 0
        self.sent = self.tried = 0

    def send(self, stations: dict[str, dict[str, dict[str, Any]]]) -> None:
        self.version += 1
        self.sent += 1
        order = {"schema": "ei.config-desired.v1", "by": "attacker", "confirm_s": 60, "line": line(self.version, stations)}
        self.listener.say(json.dumps(order).encode("utf-8", "surrogatepass"), "config", "desired")

    def settle(self) -> None:
        """Wait until all were read; what was good enough to be tried is tried for a while, then cancelled."""
        self.marks += 1
        by = f"mark-{self.marks}"
        self.listener.say({"schema": "ei.config-desired.v1", "by": by, "line": {}}, "config", "desired")
        until(lambda: self._last().get("by") == by or self._trial(), 120, "an answer")
        time.sleep(TRIED_S)
        while trial := until(lambda: self._trial() or "none", 5, "a trial"):
            if trial == "none":
                return
            self.tried += 1
            time.sleep(2 * TRIED_S)
            cancel = {"schema": "ei.confirm.v1", "by": "attacker", "action": "cancel", "version": trial["version"]}
            self.listener.say(cancel, "config", "confirm")
            until(lambda: not self._trial(), 30, "the end of a trial")

    def _last(self) -> dict[str, Any]:
        told = self.listener.of("config", "reported")
        return (told[-1].get("last") or {}) if told else {}

    def _trial(self) -> Any:
        told = self.listener.of("config", "reported")
        return told[-1].get("trial") if told else None


def outside(events: list[list[Any]], world: Path) -> list[str]:
    """What was opened beyond the list above."""
    reads = [
        sys.prefix, sys.base_prefix, os.path.realpath(sys.prefix), str(REPOSITORY / "edge_inspector"), "/usr", "/lib", "/lib64", "/bin", "/proc",
        "/sys", "/dev", str(world / "device"), str(world / "listed"), "/etc/ssl/certs", "/etc/fonts", "/var/cache/fontconfig", "/etc/OpenCL", "/etc/vulkan",
    ]  # fmt: skip
    writes = [str(world / "device" / "state"), str(world / "device" / "log"), "/dev"]
    reads.append(str(Path(sys.prefix).parent / ".git"))  # harvesters asks git for its version where it is in a checkout
    reads.append(str(REPOSITORY / "edge_inspector.egg-info"))  # the program's own version, where it runs from a checkout
    named = re.compile(r"/proc/[0-9]+/task/[0-9]+/comm")  # a thread's name
    exact = {*READ_BY_LIBRARIES, str(REPOSITORY), "/", "/etc"}

    def fits(path: str, places: list[str]) -> bool:
        return any(path == place or path.startswith(f"{place}/") for place in places)

    return sorted(
        f"{kind}: {path}"
        for path, kind, _ in events
        if path
        and "memfd:" not in path
        and not named.fullmatch(path)
        and not (fits(path, writes) if kind == "written" else path in exact or fits(path, reads))
    )


def main() -> None:
    """See above."""
    folder, count, number = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    world = folder / "world"
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for host in (TRAP, LISTED_HOST):
        subprocess.run(["ip", "addr", "add", f"{host}/32", "dev", "lo"], check=True)
    traps, broker = Traps(), Mosquitto(folder / "mosquitto").start()
    device = make_world(world, broker.port)
    names = folder / "resolv.conf"
    names.write_text("nameserver 127.0.0.53\n")
    before = fingerprint(world / "canary")
    events: list[list[Any]] = []
    watched = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", "tests.attack.watched", str(device), str(names)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert watched.stdout is not None
    assert watched.stdin is not None
    heard = watched.stdout
    reader = threading.Thread(target=lambda: events.extend(json.loads(row) for row in heard), daemon=True)
    reader.start()
    try:
        with listening(broker.port) as listener:
            attack = Attack(listener)
            until(lambda: set(_states(listener).values()) == {"streaming"}, 300, "the line's own cameras")
            attack.send({name: {"top": camera} for name, camera in admissible().items()})
            states = until(lambda: _tried(listener), 180, "every listed camera tried")
            attack.settle()
            documents = [{"a": {"uri": uri}} for uri in demonstrated(world)] + generated(world, count, number)
            for start in range(0, len(documents), BATCH):
                for cameras in documents[start : start + BATCH]:
                    attack.send({"press": cameras})
                attack.settle()
            _order_bundles(listener, world)
            until(lambda: listener.of("health"), 30, "health")
            outcomes = {(report.get("last") or {}).get("outcome", "") for report in listener.of("config", "reported")}
            told = json.dumps([payload for _, payload in listener.heard])
    finally:
        watched.stdin.close()
        watched.wait(30)
        reader.join(10)
        broker.stop()
    log = (world / "device" / "log").read_text()
    after = fingerprint(world / "canary")
    print(json.dumps({
        "documents": attack.sent, "tried": attack.tried, "states": states, "outcomes": sorted(outcomes), "files": len(events), "outside": outside(events, world),
        "reached": traps.reached, "canaries_changed": before != after, "loaded": "loaded" in after, "ended": events[-1][1],
        "traceback": "Traceback" in log, "password_told": "password\\n" in told,
    }))  # fmt: skip


def _states(listener: Listener) -> dict[str, str]:
    """Of all cameras, by station."""
    told = listener.of("health")
    return {name.split("/")[0]: facts["state"] for name, facts in told[-1]["cameras"].items()} if told else {}


def _tried(listener: Listener) -> dict[str, str]:
    """Of the listed cameras, once each was opened or could not be."""
    states = _states(listener)
    return states if set(states) == set(admissible()) and "connecting" not in states.values() else {}


def _order_bundles(listener: Listener, world: Path) -> None:
    """Bundles from where device.yaml lists nothing."""
    sources = [
        str(world / "canary"),
        "/etc",
        f"{world}/listed/links/out",
        f"https://{TRAP}/x",
        f"https://{LISTED_HOST}@{TRAP}/x",
        "https://evil.example/x",
    ]
    for release, source in enumerate(sources, 2):
        order = {
            "schema": "ei.bundle-desired.v1",
            "by": f"attacker-{release}",
            "bundle": "tiny",
            "release": release,
            "source": source,
        }
        listener.say(order, "bundle", "tiny", "desired")
    until(
        lambda: (listener.of("bundle", "tiny", "reported")[-1].get("last") or {}).get("by") == f"attacker-{release}",
        30,
        "the last bundle",
    )


if __name__ == "__main__":
    main()
