"""What a document may name, what is told of it, and the walls around a camera's process."""

from __future__ import annotations

import http.server
import json
import os
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_inspector import addresses, confinement
from edge_inspector.cameras import open_source
from edge_inspector.cameras.sources import direct_source
from edge_inspector.cameras.synthetic import draw_part
from edge_inspector.config import CameraConfig, DeviceConfig, LineConfig, load_device, parse_line
from edge_inspector.door import Door, NotListed, Sources, listing, typed
from edge_inspector.errors import BundleError, CameraError, SchemaError
from edge_inspector.schema import read_yaml, validate
from edge_inspector.wiring import door_of, refusals
from tests.line import ENGINES, DaemonProcess, Mosquitto, device_folder, free_port, listening, until

LISTED = Sources(
    folders=("recordings",), hosts=("10.0.0.5", "10.1.0.0/24", "Cam.Plant", "::1"), gst={"belt": "videotestsrc"},
    gentl={"vendor": "vendor.cti"},
)  # fmt: skip


def asked(uri: str, **more: Any) -> CameraConfig:
    return CameraConfig.model_validate({"uri": uri, **more})


@pytest.fixture
def door(tmp_path: Path) -> Door:
    (tmp_path / "recordings" / "monday").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    (tmp_path / "recordings" / "out").symlink_to(tmp_path / "secret")
    return Door(LISTED, tmp_path)


@pytest.mark.parametrize(
    "uri",
    [
        "dir://recordings", "dir://recordings/monday?fps=5&loop=1", "dir://recordings/../recordings", "file://recordings/a.mp4",
        "rtsp://10.0.0.5/stream?x=1", "rtsps://u:p%40ss@10.1.0.77:8554/", "http://cam.plant:8080/video.mjpg", "https://CAM.PLANT./v",
        "http://[::1]/v", "gige://10.1.0.3", "aravis://10.0.0.5", "aravis://22334455?trigger=software", "u3v://", "pylon://0815-0000",
        "gst:belt", "gentl://7?producer=vendor&trigger=Line1", "csi://0", "synthetic://?fps=5", "v4l2:///dev/video99",
    ],
)  # fmt: skip
def test_what_is_listed_or_needs_no_listing_is_admitted(door: Door, uri: str) -> None:
    assert door.judge(asked(uri)).address.scheme == uri.split(":", maxsplit=1)[0]


@pytest.mark.parametrize(
    ("uri", "lines"),
    [
        ("dir:///etc", {"folders": ["/etc"]}), ("dir://recordings/../secret", {"folders": ["recordings/../secret"]}),
        ("dir://recordings2", {"folders": ["recordings2"]}), ("file:///etc/x.mp4", {"folders": ["/etc"]}),
        ("file://a.mp4", {"folders": ["."]}), ("dir:///my%20data", {"folders": ["/my data"]}),
        ("http://10.0.0.6/", {"hosts": ["10.0.0.6"]}), ("http://10.0.0.5@10.0.0.6/", {"hosts": ["10.0.0.6"]}),
        ("http://10.0.0.5\\@evil/", {"hosts": ["evil"]}), ("rtsp://localhost/x", {"hosts": ["localhost"]}),
        ("http://0x0a000005/", {"hosts": ["0x0a000005"]}), ("http://[::ffff:10.0.0.5]/", {"hosts": ["::ffff:10.0.0.5"]}),
        ("gige://10.9.9.9", {"hosts": ["10.9.9.9"]}), ("aravis://10.9.9.9", {"hosts": ["10.9.9.9"]}),
        ("gige://plant", {"hosts": ["plant"]}), ("gst:other", {"gst": {"other": "PIPELINE"}}),
        ("gst:videotestsrc ! file:///tmp/x", {"gst": {"name": "PIPELINE"}}), ("gentl://7", {"gentl": {"name": "FILE.cti"}}),
        ("gentl://7?cti=/tmp/x.cti", {"gentl": {"name": "/tmp/x.cti"}}),
        ("gentl://7?producer=other", {"gentl": {"name": "FILE.cti"}}),
    ],
)  # fmt: skip
def test_what_is_not_listed_is_refused_with_the_lines_that_list_it(door: Door, uri: str, lines: dict[str, Any]) -> None:
    with pytest.raises(NotListed) as caught:
        door.judge(asked(uri))
    text = caught.value.message.partition("add sources: ")[2].partition(", and write uri:")[0]
    assert read_yaml(text.encode(), "lines") == lines
    Sources.model_validate_json(json.dumps(lines))


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("dir://recordings/out", "leads out of the listed folders"), ("dir://recordings/Lot#12", "%23"),
        ("http://10.0.0.5/cam#2", "%23"), ("dir://recordings/what?", "%3F"), ("dir://recordings?12", "%3F"),
        ("dir://recordings/a%00b", "%25"), ("rtsp://u:a/b@10.0.0.5/x", "%2F"), ("rtsp://10.0.0.5:abc/", "HOST"), ("http://", "HOST"),
        ("http://10.0.0.5/a\r\nHost: x", "control characters"), ("dir://user:pw@nas/x", "%40"), ("gige://u:p@10.0.0.5", "%40"),
        ("v4l2:///dev/null", "no V4L2 camera"), ("v4l2:///dev/../etc/passwd", "no V4L2 camera"), ("v4l2://0", "no V4L2 camera"),
        ("synthetic://?password=x", "unknown option"),
    ],
)  # fmt: skip
def test_an_address_that_may_be_read_in_two_ways_or_leads_elsewhere_is_refused(door: Door, uri: str, words: str) -> None:
    with pytest.raises(CameraError) as caught:
        door.judge(asked(uri))
    assert words in str(caught.value)
    assert not isinstance(caught.value, NotListed)


def test_a_picture_that_is_a_link_out_of_the_listed_folders_is_not_read(door: Door, tmp_path: Path) -> None:
    (tmp_path / "recordings" / "1.png").write_bytes((ENGINES / "recording" / "paper-001.png").read_bytes())
    (tmp_path / "secret" / "2.png").write_bytes((ENGINES / "recording" / "paper-002.png").read_bytes())
    (tmp_path / "recordings" / "2.png").symlink_to(tmp_path / "secret" / "2.png")
    with pytest.raises(CameraError, match="leads out of the listed folders"):
        open_source(asked("dir://recordings"), door.admit).open()


def test_nothing_that_is_not_listed_is_looked_at(tmp_path: Path) -> None:
    """A refusal is the same whether a path is there or not."""
    (tmp_path / "there").mkdir()
    told = []
    for name in ("there", "none!"):
        with pytest.raises(NotListed) as caught:
            Door(Sources(), tmp_path).judge(asked(f"dir://{name}/x"))
        told.append(caught.value.message.replace(name, "NAME").replace("'", ""))
    assert told[0] == told[1]


@pytest.mark.parametrize("source", ["https://10.0.0.5/lid/8", "https://cam.plant:8443/lid", "recordings"])
def test_a_bundles_source_goes_through_the_same_door(door: Door, tmp_path: Path, source: str) -> None:
    door.judge_bundle(source if source.startswith("https") else str(tmp_path / source))
    for refused, words in (
        ("https://10.0.0.6/x", "{hosts: [10.0.0.6]}"), ("/etc", "{folders: [/etc]}"), (str(tmp_path / "recordings/out"), "leads out"),
        ("http://10.0.0.5/x", "neither"), ("https://u:p@10.0.0.5/x", "neither"), ("recordings", "neither"), (" https://x/", "neither"),
    ):  # fmt: skip
        with pytest.raises(BundleError, match="."):
            door.judge_bundle(refused)
        with pytest.raises(BundleError) as caught:
            door.judge_bundle(refused)
        assert words in str(caught.value), refused


@pytest.mark.parametrize("uri", ["gst:videotestsrc ! x=1", "gentl://7?cti=/opt/a.cti&trigger=Line1", "dir://a", "http://h:9/x"])
def test_what_a_person_types_is_listed_by_being_typed(tmp_path: Path, uri: str) -> None:
    admitted = typed(tmp_path)(asked(uri))
    assert (admitted.pipeline, admitted.address.options.get("trigger", "Line1")) in (
        ("", "Line1"),
        ("videotestsrc ! x=1", "Line1"),
    )
    found = listing(uri, "top")
    Door(found.sources, tmp_path).judge(asked(found.uri))


def test_a_line_is_refused_whole_with_each_place(door: Door) -> None:
    line = _line({"a": {"uri": "dir:///etc"}, "b": {"uri": "synthetic://"}, "c": {"uri": "gst:x ! y"}})
    assert [fault.path for fault in refusals(door, line)] == ["stations.s.cameras.a.uri", "stations.s.cameras.c.uri"]


def _line(cameras: dict[str, Any], bundle: str = "b") -> LineConfig:
    station = {"trigger": "software", "product": "p", "products": {"p": "r"}, "cameras": cameras}
    recipe = {"cameras": {name: {"rois": {"all": {"bundle": bundle}}} for name in cameras}}
    return parse_line({"schema": "ei.line.v1", "stations": {"s": station}, "recipes": {"r": recipe}}, "line")


@pytest.mark.parametrize("host", ["10.1.0.5/24", "a b", "http://x", "", "host:80"])
def test_a_host_that_is_none_is_refused_in_device_yaml(host: str) -> None:
    with pytest.raises(SchemaError):
        validate(Sources, {"hosts": [host]}, "device.yaml")


# --- what is told

SECRET = "Geheim7"
PLACES = [
    f"rtsp://admin:Ge/{SECRET}@127.0.0.1:9/stream1", f"rtsp://u:pa/ss@{SECRET}/x", f"rtsp://u:{SECRET}@h/x", f"http://h/x?pwd={SECRET}",
    f"http://h/{SECRET}", f"http://h/x?{SECRET}", f'gst:rtspsrc user-pw="a {SECRET}" ! x', f'gst:souphttpsrc extra-headers="h,Authorization={SECRET}"',
    f"dir://u:{SECRET}@nas/x", f"file:///x?password={SECRET}", f"gige://u:{SECRET}@10.0.0.5", f"aravis://7?pw={SECRET}",
    f"gentl://7?producer=x&key={SECRET}", f"synthetic://?{SECRET}=1", f"synthetic://?fps={SECRET}", f"csi://{SECRET}", f"https://{SECRET}:x@h:9999999/",
    f"v4l2://u:{SECRET}@x", f"dir:///x#{SECRET}", f"http://h:{SECRET}/",
]  # fmt: skip


@pytest.mark.parametrize("uri", PLACES)
def test_no_password_of_an_address_is_told(uri: str, tmp_path: Path) -> None:
    config = asked(uri)
    everything = Sources(folders=("/",), hosts=("127.0.0.1", "h", "10.0.0.5", SECRET), unconfined=True)
    for door in (Door(Sources(), tmp_path), Door(everything, tmp_path)):
        quick = config.model_copy(update={"timeout_ms": 50})
        with closing(direct_source(quick, door.admit)) as source, pytest.raises(CameraError) as caught:
            source.open()
        assert SECRET.lower() not in str(caught.value).lower()
    assert SECRET.lower() not in config.name.lower()
    assert SECRET not in addresses.reported(uri)


def test_no_topic_and_no_log_and_no_check_tells_a_password(tmp_path: Path, mosquitto: Mosquitto) -> None:
    folder = device_folder(tmp_path / "device", mosquitto.port, "")
    cameras = {f"c{number}": {"uri": uri, "timeout_ms": 200} for number, uri in enumerate(PLACES[:16])}
    document = _line(cameras, bundle="paper").document()
    (folder / "line.yaml").write_text(json.dumps(document))
    with listening(mosquitto.port) as listener, DaemonProcess(folder) as daemon:
        until(lambda: any("camera_fault" in json.dumps(health) for health in listener.of("health")), 60, "faults")
        for version, change in ((2, "rtps://u:"), (3, "rtsp://u/x:"), (4, "gst:x y=")):
            document["version"], document["stations"]["s"]["cameras"]["c0"]["uri"] = version, f"{change}{SECRET}@h"
            listener.say({"by": f"v{version}", "line": document}, "config", "desired")
        until(
            lambda: [told for told in listener.of("config", "reported") if (told.get("last") or {}).get("by") == "v4"],
            what="a refusal",
        )
        checked = subprocess.run(
            [sys.executable, "-m", "edge_inspector.cli", "check", "--config", str(folder / "device.yaml")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        daemon.stop()
    for text in (json.dumps([payload for _, payload in listener.heard]), daemon.log, checked.stdout, checked.stderr):
        assert SECRET.lower() not in text.lower().replace(f"rtsp://{SECRET.lower()}", "")
    assert "rtsp://***" in json.dumps(listener.of("config", "reported"))


def test_faults_of_a_document_tell_no_address() -> None:
    for cameras in (
        {"a": {"uri": f"rtps://u:{SECRET}@h"}}, {"a": f"rtsp://u:{SECRET}@h"}, {"a": {"uri": f"dir://{SECRET}", "gain_db": 1}},
        {"a": {"uri": [f"rtsp://u:{SECRET}@h"]}}, {"a": [{"uri": f"rtsp://u:{SECRET}@h"}]},
        {"a": {"uri": f"dir://{SECRET}", "user": "x"}},
    ):  # fmt: skip
        with pytest.raises(SchemaError) as caught:
            _line(cameras)
        assert SECRET not in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(addresses.SCHEMES), st.text(st.characters(codec="utf-8"), max_size=40))
def test_an_address_is_taken_apart_or_refused_whatever_it_holds(scheme: str, rest: str) -> None:
    uri = f"{scheme}:{rest}"
    try:
        Door(LISTED, Path("/nowhere")).judge(asked(uri))
    except CameraError as error:
        json.dumps(str(error)).encode()
    told = addresses.told(uri)
    assert told.startswith(scheme)
    assert addresses.reported(uri) == uri or addresses.WITHHELD in addresses.reported(uri)


def test_a_password_is_read_from_the_devices_credentials_and_from_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials" / "camera").write_text("p@ss\n")
    (tmp_path / "device.yaml").write_text(
        "schema: ei.device.v1\nidentity: {site: a, line: b, device: c}\nsources: {hosts: [h]}\n"
        "broker: {username: x, password_file: credentials/broker}\n"
    )
    door = door_of(load_device(tmp_path / "device.yaml"))
    admitted = door.admit(asked("rtsp://h/x", user="me", password_file="credentials/camera"))
    assert (admitted.user, admitted.password) == ("me", "p@ss")
    assert admitted.address.url(admitted.user, admitted.password) == "rtsp://me:p%40ss@h/x"
    assert "p@ss" not in repr(admitted)
    for more, words in (
        ({"user": "me", "password_file": "credentials/none"}, "no password"),
        ({"user": "me", "password_file": "credentials/broker"}, "not for cameras"),
    ):
        with pytest.raises(CameraError, match=words):
            door.admit(asked("rtsp://h/x", **more))
    for name in ("/etc/shadow", "../x", "credentials/../device.yaml", "credentials/a/b", "keys/signing.key"):
        with pytest.raises(ValueError, match="pattern"):
            asked("rtsp://h/x", user="me", password_file=name)


# --- streams that lead elsewhere, recordings that name others


class Trap:
    """Counts who connects."""

    def __enter__(self) -> Trap:
        self.calls = 0
        self.socket = socket.create_server(("127.0.0.2", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.calls += 1
            connection.close()

    def __exit__(self, *_: object) -> None:
        self.socket.close()


@contextmanager
def served(handler: type[socketserver.BaseRequestHandler]) -> Iterator[int]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def _refused(uri: str) -> str:
    source = open_source(asked(uri, timeout_ms=1000), Door(Sources(hosts=("127.0.0.1",)), Path("/")).admit)
    with pytest.raises(CameraError) as caught:
        source.open()
    source.close()
    return caught.value.message


def test_streams_that_lead_on_to_another_host_are_not_followed() -> None:
    with Trap() as trap:

        class Http(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(302, "geheim")
                self.send_header("Location", f"http://127.0.0.2:{trap.port}/x")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        class Rtsp(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                while request := self.rfile.readline():
                    number = b"1"
                    while (header := self.rfile.readline()).strip():
                        number = header.split(b":")[1].strip() if header.startswith(b"CSeq") else number
                    leads = b"" if request.startswith(b"OPTIONS") else b"Location: rtsp://127.0.0.2:%d/x\r\n" % trap.port
                    status = b"302 Found" if leads else b"200 OK"
                    self.wfile.write(b"RTSP/1.0 %s\r\nCSeq: %s\r\n%s\r\n" % (status, number, leads))

        with served(Http) as port:
            told = _refused(f"http://127.0.0.1:{port}/x")
            assert told == "http://127.0.0.1: cannot be opened: 302: leads on to another address, which is not followed"
        with served(Rtsp) as port:
            assert "leads on to another address, which is not followed" in _refused(f"rtsp://127.0.0.1:{port}/x")
        assert trap.calls == 0


@pytest.mark.parametrize("kind", ["m3u8", "ffconcat", "sdp", "mpd"])
def test_a_recording_that_names_another_file_or_address_is_no_video(tmp_path: Path, kind: str) -> None:
    video = tmp_path / "secret" / "parts.avi"
    video.parent.mkdir()
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 64))
    for n in range(12):
        writer.write(draw_part(np.random.default_rng(n), 64, 64, False))
    writer.release()
    listed = tmp_path / "listed"
    listed.mkdir()
    (listed / "fine.avi").write_bytes(video.read_bytes())
    (listed / "link.avi").symlink_to(video)
    with Trap() as trap:
        text = {
            "m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{video}\n#EXTINF:10,\nhttp://127.0.0.2:{trap.port}/x.ts\n",
            "ffconcat": "ffconcat version 1.0\nfile link.avi\n",
            "sdp": f"v=0\no=- 0 0 IN IP4 127.0.0.2\ns=x\nc=IN IP4 127.0.0.2\nt=0 0\nm=video {free_port()} RTP/AVP 26\n",
            "mpd": f"<MPD xmlns='urn:mpeg:dash:schema:mpd:2011'><BaseURL>http://127.0.0.2:{trap.port}/</BaseURL></MPD>",
        }[kind]
        (listed / f"parts.{kind}").write_text(text)
        door = Door(Sources(folders=("listed",)), tmp_path)
        open_source(asked("file://listed/fine.avi"), door.admit).open()
        with pytest.raises(CameraError, match="not a video that OpenCV can read"):
            open_source(asked(f"file://listed/parts.{kind}"), door.admit).open()
        with pytest.raises(CameraError, match="leads out"):
            open_source(asked("file://listed/link.avi"), door.admit).open()
        assert trap.calls == 0


# --- walls

WITHIN = """
import json, os, socket, subprocess, sys
from edge_inspector.confinement import Walls, confine
own, elsewhere, port, other = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
def tried(work):
    try:
        work()
        return "done"
    except OSError as error:
        return error.strerror
def connected(port):
    socket.create_connection(("127.0.0.1", port), 1).close()
confine(Walls((own,), ("/dev/null",), ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/proc", "/dev/null", sys.prefix, sys.base_prefix, own), (port,), alone=True))
print(json.dumps({
    "own": tried(lambda: open(own + "/x", "w").write("x")), "null": tried(lambda: open("/dev/null", "w").write("x")),
    "elsewhere": tried(lambda: open(elsewhere + "/x", "w")), "over": tried(lambda: open(elsewhere + "/there", "w")),
    "cut": tried(lambda: os.truncate(elsewhere + "/there", 0)), "removed": tried(lambda: os.remove(elsewhere + "/there")),
    "read": tried(lambda: open(elsewhere + "/there").read()), "listed": tried(lambda: os.listdir(elsewhere)),
    "link": tried(lambda: os.link(own + "/x", elsewhere + "/link")),
    "port": tried(lambda: connected(port)), "other": tried(lambda: connected(other)),
    "signal": tried(lambda: os.kill(os.getppid(), 0)), "child": subprocess.run(["/bin/sh", "-c", f"echo > {elsewhere}/y"]).returncode,
    "privileges": [line.split()[1] for line in open("/proc/self/status") if line.startswith("NoNewPrivs")] if os.access("/proc/self/status", os.R_OK) else [],
}))
"""


def test_a_confined_process_writes_reads_and_reaches_what_it_is_left_with(tmp_path: Path) -> None:
    if not confinement.version():
        pytest.skip(confinement.MISSING)
    own, elsewhere = tmp_path / "own", tmp_path / "elsewhere"
    own.mkdir()
    elsewhere.mkdir()
    (elsewhere / "there").write_text("kept")
    with socket.create_server(("127.0.0.1", 0)) as a, socket.create_server(("127.0.0.1", 0)) as b:
        ports = [str(one.getsockname()[1]) for one in (a, b)]
        run = subprocess.run(
            [sys.executable, "-c", WITHIN, str(own), str(elsewhere), *ports], capture_output=True, text=True, check=True
        )
    told = json.loads(run.stdout)
    assert (told["own"], told["null"]) == ("done", "done")
    denied = {key: told[key] for key in ("elsewhere", "over", "cut", "removed", "read", "listed")}
    assert set(denied.values()) == {"Permission denied"}, denied
    assert told["link"] in ("Permission denied", "Invalid cross-device link")
    assert told["child"] != 0, "what it starts is confined, too"
    if confinement.version() >= 4:
        assert (told["port"], told["other"]) == ("done", "Permission denied")
    if confinement.version() >= 6:
        assert told["signal"] == "Operation not permitted"
    assert [path.name for path in elsewhere.iterdir()] == ["there"]
    assert (elsewhere / "there").read_text() == "kept"


def test_every_cameras_process_has_its_walls_and_leaves_nothing_behind(tmp_path: Path) -> None:
    if not confinement.version():
        pytest.skip(confinement.MISSING)
    own = tmp_path / "state" / "cameras" / "s-top"
    source = open_source(asked("synthetic://?isolate=1&fps=50"), typed(tmp_path), own, tmp_path / "cache")
    source.open()
    child = source._child.pid  # type: ignore[attr-defined]
    status = Path(f"/proc/{child}/status").read_text()
    environment = Path(f"/proc/{child}/environ").read_text()
    source.close()
    assert "NoNewPrivs:\t1" in status
    assert f"TMPDIR={own}" in environment
    assert not own.exists()


# A seccomp filter (BPF) that answers ENOSYS to landlock_create_ruleset: as a kernel without Landlock does.
WITHOUT = """
import ctypes, os, struct, sys
program = [(0x20, 0, 0, 0), (0x15, 0, 1, 444), (0x06, 0, 0, 0x00050000 | 38), (0x06, 0, 0, 0x7fff0000)]
filters = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in program))
libc = ctypes.CDLL(None)
libc.prctl(38, 1, 0, 0, 0)
header = struct.pack("=H6xQ", len(program), ctypes.addressof(filters))
assert libc.prctl(22, 2, header) == 0
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def test_without_landlock_doctor_check_and_health_say_so_and_pipelines_need_a_word(tmp_path: Path) -> None:
    (tmp_path / "device.yaml").write_text(
        f"schema: ei.device.v1\nidentity: {{site: a, line: b, device: c}}\nbroker: {{host: 127.0.0.1, port: {free_port()}}}\n"
        "sources: {gst: {belt: videotestsrc}}\n"
    )
    document = _line({"a": {"uri": "gst:belt", "timeout_ms": 100}}).document()
    (tmp_path / "line.yaml").write_text(json.dumps(document))

    def said(*arguments: str) -> str:
        run = subprocess.run(
            [sys.executable, "-c", WITHOUT, *arguments], capture_output=True, text=True, check=False,
            env={**os.environ, "COLUMNS": "300"},
        )  # fmt: skip
        return run.stdout + run.stderr

    told = said("-m", "edge_inspector.cli", "check", "--config", str(tmp_path / "device.yaml"))
    assert "are not confined: this kernel has no Landlock" in told
    assert "add sources: {unconfined: true}" in told
    asked_too = (
        "import sys; from pathlib import Path; from edge_inspector import checks, config, daemon; "
        "print(checks._landlock(), *daemon._unconfined(config.load_line(Path(sys.argv[1]))))"
    )
    told = said("-c", asked_too, str(tmp_path / "line.yaml"))
    assert "Finding(thing='Landlock', ok=False, text='this kernel has no Landlock" in told
    assert "code='cameras_unconfined'" in told


def test_the_unit_lets_the_daemon_use_landlock() -> None:
    unit = (Path(__file__).resolve().parents[1] / "systemd" / "edge-inspector@.service").read_text()
    assert "SystemCallFilter=landlock_create_ruleset landlock_add_rule landlock_restrict_self\n" in unit
    assert "NoNewPrivileges=yes" in unit


# --- check --sources


def test_check_prints_the_section_of_a_line_that_runs(tmp_path: Path) -> None:
    device = {
        "schema": "ei.device.v1",
        "identity": {"site": "a", "line": "b", "device": "c"},
        "sources": {"hosts": ["10.0.0.9"]},
    }
    (tmp_path / "device.yaml").write_text(json.dumps(device))
    uris = [
        "dir:///data/a",
        "file:///data/b.mp4",
        "rtsp://u:p@10.0.0.5/x",
        "gst:videotestsrc ! queue",
        "gentl://7?cti=/o/v.cti",
        "synthetic://",
    ]
    line = _line({f"c{number}": {"uri": uri} for number, uri in enumerate(uris)})
    (tmp_path / "line.yaml").write_text(json.dumps(line.document()))
    run = subprocess.run(
        [sys.executable, "-m", "edge_inspector.cli", "check", "--sources", "--config", str(tmp_path / "device.yaml")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    section = read_yaml(run.stdout.encode(), "printed")
    assert isinstance(section, dict)
    sources = validate(DeviceConfig, {**device, **section}, "device.yaml").sources
    assert sources == Sources(
        folders=("/data/a", "/data"),
        hosts=("10.0.0.9", "10.0.0.5"),
        gst={"s-c3": "videotestsrc ! queue"},
        gentl={"s-c4": "/o/v.cti"},
    )
    assert "# stations.s.cameras.c3.uri: gst:s-c3" in run.stdout
    mended = {name: config.uri for name, config in line.stations["s"].cameras.items()}
    mended |= {"c3": "gst:s-c3", "c4": "gentl://7?producer=s-c4"}
    door = Door(replace_unconfined(sources), tmp_path)
    assert refusals(door, _line({name: {"uri": uri} for name, uri in mended.items()})) == []


def replace_unconfined(sources: Sources) -> Sources:
    return sources.model_copy(update={"unconfined": True})
