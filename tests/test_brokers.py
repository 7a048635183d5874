"""One line of results, verdicts and presence over every broker that is at hand, with each limit that a broker may have."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from edge_inspector import health, messages
from edge_inspector.broker import Broker
from edge_inspector.config import BrokerConfig
from edge_inspector.demo import EmbeddedBroker
from edge_inspector.frames import Coming, Trigger, utc_now
from edge_inspector.handshake import Handshake
from edge_inspector.messages import Ready, StateMessage, VerdictMessage
from edge_inspector.mqtt import Connection, Message, Will, tls_context
from edge_inspector.outbox import Outbox
from edge_inspector.results import BundleRef, EngineRef, Finding, Reason, Region, Result, Verdict
from edge_inspector.subscriber import Subscriber
from tests.line import MOSQUITTO, TOPICS, Mosquitto, collected, free_port, needed, until

PARTS = 12
ACL = Path(__file__).resolve().parents[1] / "systemd" / "mosquitto.acl"
AEDES = Path(os.environ.get("EDGE_INSPECTOR_AEDES", "/opt/aedes"))
"""Where `npm install aedes` has put it; tried where it is there."""
_AEDES = """
const { createServer } = require('net'); const { Aedes } = require('aedes');
(async () => { const aedes = await Aedes.createBroker();
createServer(aedes.handle).listen(Number(process.argv[1]), '127.0.0.1') })()
"""


@dataclass(frozen=True)
class Case:
    """A broker, and what it says that is of note."""

    name: str
    conf: str = ""
    protocol: str = "auto"
    tls: bool = False
    codes: frozenset[str] = frozenset()
    shortened: bool = False
    lost: bool = False
    """Whether results fit in no form; they are told as gaps."""


LIMITS = [
    Case("open"),
    Case("open, MQTT 3.1.1", protocol="3.1.1"),
    Case("TLS, client certificates and the shipped access list", tls=True),
    Case("max_packet_size 1500", "max_packet_size 1500\n", codes=frozenset({"message_too_large"}), shortened=True),
    Case("max_packet_size 1500, MQTT 3.1.1", "max_packet_size 1500\n", "3.1.1",
         codes=frozenset({"connection_ended", "message_too_large"}), shortened=True),
    Case("message_size_limit 1500, MQTT 3.1.1", "message_size_limit 1500\n", "3.1.1",
         codes=frozenset({"message_too_large"}), shortened=True),
    Case("max_packet_size 400", "max_packet_size 400\n", codes=frozenset({"message_too_large"}), lost=True),
    Case("max_qos 0", "max_qos 0\n", codes=frozenset({"broker_lacks"})),
    Case("retain_available false", "retain_available false\n", codes=frozenset({"broker_lacks"})),
    Case("max_inflight_messages 1", "max_inflight_messages 1\n"),
    Case("max_keepalive 10", "max_keepalive 10\n"),
]  # fmt: skip
if os.environ.get("EDGE_INSPECTOR_LONG"):  # paho ends the connection on Mosquitto's refusal: found out as where nothing is said
    found_out = frozenset({"connection_ended", "message_too_large"})
    LIMITS.append(Case("message_size_limit 1500", "message_size_limit 1500\n", codes=found_out, shortened=True))


def made(number: int) -> Result:
    """A result; every third one is large."""
    now = utc_now()
    region = Region(x_px=100, y_px=100, w_px=10, h_px=10, area_px=100, peak=1.25)
    finding = Finding(
        camera="top", roi="all", verdict=Verdict.FAIL, reason=Reason.ABOVE_THRESHOLD, score=2.0, threshold=1.0, ratio=2.0,
        bundle=BundleRef(name="paper", release=1, sha256="0123456789ab"), regions=(region,) * (16 if number % 3 == 0 else 1),
        engine=EngineRef(runtime="onnxruntime", precision="fp32"),
    )  # fmt: skip
    return Result(
        station="sheet", trigger_id=f"T-{number}", verdict=Verdict.FAIL, reason=Reason.ABOVE_THRESHOLD, triggered_at=now,
        decided_at=now, expires_at=now, findings=(finding,) * (2 if number % 3 == 0 else 1),
    )  # fmt: skip


class Station:
    """Fails every part at once; takes no commands."""

    expires_ms = 5000

    def __init__(self) -> None:
        self.coming = Coming()
        self.handshake: Handshake | None = None

    def reused(self, trigger: Trigger, result: Result) -> None:
        raise AssertionError(f"{trigger.trigger_id} belongs to one part here, {result.part_id}")

    def offer(self, trigger: Trigger) -> None:
        assert self.handshake is not None
        at = utc_now() + timedelta(seconds=5)
        self.handshake.verdict(
            VerdictMessage(
                station="sheet",
                trigger_id=trigger.trigger_id,
                verdict=Verdict.FAIL,
                reason=Reason.ABOVE_THRESHOLD,
                expires_at=at,
            )  # fmt: skip
        )

    def command(self, name: str, product: str | None) -> None:
        raise AssertionError(name)


@dataclass
class Device:
    """A device's two connections and what uses them."""

    outbox: Outbox
    connection: Connection
    heard: Connection
    broker: Broker

    @property
    def codes(self) -> set[str]:
        """What health would say."""
        causes = [*health.broker_causes(self.connection, "device"), *health.broker_causes(self.heard, "device/handshake")]
        return {cause.code for cause in causes}


@contextmanager
def device(folder: Path, config: BrokerConfig, certificates: Path | None = None) -> Iterator[Device]:
    tls = client_tls(certificates, "edge-1")
    station = Station()
    offline = StateMessage(online=False, session="s1")
    will = Will(TOPICS.of("state"), messages.encode(offline))
    with (
        Outbox(folder, ["sheet"], quota_mb=4) as outbox,
        Connection(config, "ei-p", subscriptions=Broker.subscriptions(TOPICS), will=will, tls=tls) as connection,
        Connection(config, "ei-p.handshake", subscriptions=Handshake.subscriptions(TOPICS), tls=tls) as heard,
        Broker(connection, TOPICS, outbox, {"sheet": station}, hears=lambda: heard.hearing) as broker,
        Handshake(heard, TOPICS, outbox, {"sheet": station}, broker.refuse) as station.handshake,
    ):
        broker.retain(StateMessage(online=True, session="s1", stations=("sheet",)), "state")
        broker.retain(Ready(station="sheet", ready=True, state="ready", session="s1"), "ready", "sheet")
        yield Device(outbox, connection, heard, broker)


def client_tls(certificates: Path | None, user: str) -> ssl.SSLContext | None:
    if certificates is None:
        return None
    return tls_context(certificates / "ca.pem", certificates / f"{user}.pem", certificates / f"{user}.key")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and what it gave the broker, the device and its users."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, cwd=folder)

    key = ("-newkey", "rsa:2048", "-nodes")
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca", "-days", "2")
    (folder / "ext").write_text("subjectAltName=IP:127.0.0.1")
    for name in ("127.0.0.1", "edge-1", "mes", "controller"):
        openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        ca = ("-CA", "ca.pem", "-CAkey", "ca.key")
        openssl("x509", "-req", "-in", f"{name}.csr", *ca, "-out", f"{name}.pem", "-extfile", "ext", "-days", "2")
    for path in folder.iterdir():
        path.chmod(0o644)
    folder.chmod(0o755)
    return folder


def check_line(folder: Path, port: int, case: Case, certificates: Path | None = None) -> None:
    """Results in order, each once; verdicts; presence; and what is said."""
    host = {"host": "127.0.0.1", "port": port, "keepalive_s": 20}
    config = BrokerConfig.model_validate({**host, "protocol": case.protocol})
    reading = BrokerConfig.model_validate(host)
    with contextlib.ExitStack() as stack:
        topics, tls = Subscriber.subscriptions(TOPICS, "mes"), client_tls(certificates, "mes")
        user = stack.enter_context(Connection(reading, "mes", subscriptions=topics, tls=tls))
        tls = client_tls(certificates, "controller")
        plc = stack.enter_context(Connection(reading, "plc", subscriptions=[TOPICS.of("verdict", "sheet")], tls=tls))
        edge = stack.enter_context(device(folder, config, certificates))
        up = (user.connected, plc.connected)
        until(lambda: all(event.is_set() for event in up) and edge.heard.hearing is not None, 20, what="connections")
        subscriber = Subscriber(user, TOPICS, client="mes", start="all")
        for number in range(1, PARTS + 1):
            edge.outbox.append(made(number))
        seqs, large = [] if case.lost else list(range(1, PARTS + 1)), set(range(3, PARTS + 1, 3))
        found = [] if case.lost else collected(subscriber, PARTS, 40)
        assert [result.seq for result in found] == seqs
        until(lambda: [list(subscriber.results(0.1)), subscriber.skipped == PARTS - len(seqs)][1], what="gaps")
        assert {result.seq for result in found if result.shortened} == (large if case.shortened else set())
        assert all(len(result.findings) for result in found if not result.shortened)
        request = json.dumps({"trigger_id": "T-9"}).encode()
        until(lambda: plc.publish(TOPICS.of("trigger", "sheet"), request) is not None)
        assert answer(plc).expires_in_ms > 0
        until(lambda: [list(subscriber.results(0.1)), subscriber.is_ready("sheet")][1], 15, what="ready")
        assert subscriber.online
        assert edge.codes == case.codes, edge.codes
        if not case.lost and case.name != "retain_available false":
            check_latecomer(reading, seqs, certificates)


def answer(plc: Connection) -> VerdictMessage:
    while True:
        event = plc.events.get(timeout=15)
        if isinstance(event, Message):
            plc.acknowledge(event.ack)
            return messages.decode(VerdictMessage, event.payload, event.topic)


def check_latecomer(config: BrokerConfig, seqs: list[int], certificates: Path | None) -> None:
    """Who comes when nothing happens any more learns from what is retained that there are results."""
    topics, tls = Subscriber.subscriptions(TOPICS, "late"), client_tls(certificates, "mes")
    with Connection(config, "late", subscriptions=topics, tls=tls) as user:
        subscriber = Subscriber(user, TOPICS, client="late", start="all")
        assert [result.seq for result in collected(subscriber, PARTS, 20)] == seqs
        until(lambda: [list(subscriber.results(0.1)), subscriber.is_ready("sheet")][1], 15, what="ready")


def secured(certificates: Path, folder: Path) -> str:
    """Mosquitto's settings for TLS with client certificates, each role a user with the rights that ship."""
    server = certificates / "127.0.0.1"
    files = f"cafile {certificates / 'ca.pem'}\ncertfile {server}.pem\nkeyfile {server}.key\nrequire_certificate true\n"
    if not ACL.exists():
        return files
    own = folder / "acl"
    own.write_text(ACL.read_text().replace("plant-1/line-1/edge-1", TOPICS.device_path))
    own.chmod(0o644)
    return f"{files}use_identity_as_username true\nacl_file {own}\n"


@pytest.mark.parametrize("case", LIMITS, ids=lambda case: case.name)
def test_results_verdicts_and_presence_arrive_whatever_mosquitto_allows(tmp_path: Path, case: Case, certificates: Path) -> None:
    needed(MOSQUITTO, "apt install mosquitto")
    conf = case.conf + (secured(certificates, tmp_path) if case.tls else "")
    broker = Mosquitto(tmp_path / "m", conf).start()
    try:
        check_line(tmp_path / "device", broker.port, case, certificates if case.tls else None)
    finally:
        broker.stop()


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
        return True
    return False


# amqtt leaves the sockets of clients that it refuses (MQTT 5) to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_results_verdicts_and_presence_arrive_over_amqtt(tmp_path: Path) -> None:
    with EmbeddedBroker() as broker:
        check_line(tmp_path / "device", broker.port, Case("amqtt"))
    gc.collect()  # what amqtt leaves unclosed ends here, in the test that made it


@contextmanager
def served(command: list[str], port: int, environment: dict[str, str], patience_s: float) -> Iterator[None]:
    """A broker as a process group of its own."""
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until(lambda: answers(port), patience_s, command[0])
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.skipif(not (AEDES / "node_modules" / "aedes").is_dir(), reason="aedes is not installed: npm install aedes")
def test_results_verdicts_and_presence_arrive_over_aedes(tmp_path: Path) -> None:
    port = free_port()
    with served(["node", "-e", _AEDES, str(port)], port, {"NODE_PATH": str(AEDES / "node_modules")}, 15):
        check_line(tmp_path / "device", port, Case("aedes"))


RABBIT = shutil.which("rabbitmq-server", path="/usr/lib/rabbitmq/bin")
"""Not what is on the path: that one changes user and folder."""


@pytest.mark.skipif(RABBIT is None, reason="RabbitMQ is not installed: apt install rabbitmq-server")
def test_results_verdicts_and_presence_arrive_over_rabbitmq(tmp_path: Path) -> None:
    port, folder = free_port(), tmp_path / "rabbit"
    folder.mkdir()
    folder.chmod(0o777)
    (folder / "plugins").write_text("[rabbitmq_mqtt].")
    (folder / "rabbitmq.conf").write_text(
        f"listeners.tcp.1 = 127.0.0.1:{free_port()}\nmqtt.listeners.tcp.1 = 127.0.0.1:{port}\nmqtt.allow_anonymous = true\n"
        "mqtt.vhost = /\nmqtt.default_user = guest\nmqtt.default_pass = guest\n"
    )
    environment = {
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"), "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
        "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"), "RABBITMQ_LOG_BASE": str(folder / "log"), "HOME": str(folder),
        "RABBITMQ_NODENAME": f"ei{port}@localhost", "RABBITMQ_DIST_PORT": str(free_port()), "ERL_EPMD_PORT": str(free_port()),
    }  # fmt: skip
    names = int(environment["ERL_EPMD_PORT"])  # Erlang's own one would stay behind
    with served(["epmd", "-port", str(names)], names, {}, 15), served([str(RABBIT)], port, environment, 120):
        check_line(tmp_path / "device", port, Case("RabbitMQ"))
