"""MQTT topics and payloads: `ei/v1/{site}/{line}/{device}/...`, JSON, UTC. JSON Schemas of all of them ship.

Subscribers ignore unknown fields; an added field keeps v1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel

from edge_inspector.errors import InspectorError
from edge_inspector.results import Evidence, Moment, PartId, Reason, Result, Verdict
from edge_inspector.schema import MAX_BYTES, Field, TolerantModel, read_json, validate
from edge_inspector.signatures import Signature

ROOT = "ei/v1"
MAX_REQUEST_BYTES = 8192
MAX_REPORT_BYTES = 1 << 18
MAX_VERSION = 2**53
PlainId = Annotated[str, Field(pattern=r"^[\x21-\x7e]+$", min_length=1, max_length=128)]
TopicLevel = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", max_length=64)]


@dataclass(frozen=True)
class Topics:
    """The topics of one device."""

    site: str
    line: str
    device: str

    @property
    def root(self) -> str:
        return f"{ROOT}/{self.site}/{self.line}/{self.device}"

    @property
    def device_path(self) -> str:
        """SITE/LINE/DEVICE, as people name a device."""
        return f"{self.site}/{self.line}/{self.device}"

    def of(self, *levels: str) -> str:
        return "/".join((self.root, *levels))

    def within(self, topic: str) -> tuple[str, ...]:
        """The levels below this device's root; empty for a foreign topic."""
        prefix = self.root + "/"
        return tuple(topic[len(prefix) :].split("/")) if topic.startswith(prefix) else ()


S = TypeVar("S")


def named(stations: Mapping[str, S], name: str) -> S:
    """The station that a message is for. Raises InspectorError."""
    if name not in stations:
        raise InspectorError(f"no station {name!r}", hint=f"stations here: {', '.join(stations)}")
    return stations[name]


class Tagged(TolerantModel):
    """Any message of ours, as far as its kind."""

    schema_: str = Field("", alias="schema")


class TriggerRequest(TolerantModel):
    """trigger/{station}: inspect one part now."""

    trigger_id: PlainId
    part_id: PartId | None = None
    product: PlainId | None = None
    expires_at: Moment | None = None


class VerdictMessage(TolerantModel):
    """verdict/{station}: for the PLC. Useful until `expires_at`; absence means not ok."""

    schema_: Literal["ei.verdict.v1"] = Field("ei.verdict.v1", alias="schema")
    station: str
    trigger_id: str
    part_id: str | None = None
    verdict: Verdict
    reason: Reason
    repeated: bool = Field(False, description="the answer to a trigger id that was judged before")
    detail: str | None = Field(None, description="what is wrong with a trigger that was refused")
    expires_at: Moment
    expires_in_ms: int = Field(
        0, ge=0, description="what was left until `expires_at` when this was sent, for clocks that do not agree; 0: too late"
    )


Shortened = Annotated[
    Literal[True] | None, Field(description="the broker takes no larger message: what matters least was left out")
]


class Gap(TolerantModel):
    """Results that will never come: a quota dropped them, or the broker takes no message so large."""

    schema_: Literal["ei.gap.v1"] = Field("ei.gap.v1", alias="schema")
    station: str
    stream: str
    lo: int
    hi: int
    reason: Literal["quota", "too_large"] = "quota"


class Head(TolerantModel):
    """head/{station}, retained: which results exist, so that a subscriber notices what it missed."""

    schema_: Literal["ei.head.v1"] = Field("ei.head.v1", alias="schema")
    station: str
    stream: str
    lo: int = Field(description="lowest seq still kept; 1 when nothing was ever dropped")
    hi: int = Field(description="highest seq; 0 before the first result")
    gaps: tuple[tuple[int, int], ...] = Field((), description="dropped ranges between lo and hi, newest last")
    gaps_omitted: int = Field(0, description="older gaps left out here; a replay tells them")
    life: int = Field(
        0, description="rises with every start of the device: one that is told a higher life of its own stream was put back"
    )


class ReplayRequest(TolerantModel):
    """replay/{station}/request: send results lo..hi to replay/{station}/{client}."""

    request_id: PlainId
    client: TopicLevel
    stream: PlainId
    lo: int = Field(ge=1, le=2**53)
    hi: int = Field(ge=1, le=2**53)


class ReplayEnd(TolerantModel):
    """Last message of a replay: what was answered. Ask again from hi + 1 for the rest."""

    schema_: Literal["ei.replay-end.v1"] = Field("ei.replay-end.v1", alias="schema")
    request_id: str
    station: str
    stream: str
    lo: int
    hi: int
    error: str = ""


class EngineState(TolerantModel):
    """What runs a bundle."""

    runtime: str
    precision: str
    release: int | None = None
    sha256: str = Field("", description="of the bundle, its first twelve digits, as in results")
    instead: str = Field("", description="why it stands in for the runtime that was wanted; empty where it does not")


class StateMessage(TolerantModel):
    """state, retained; the last will says online: false."""

    schema_: Literal["ei.state.v1"] = Field("ei.state.v1", alias="schema")
    online: bool
    session: str
    at: Moment | None = None
    version: str = ""
    capabilities: tuple[str, ...] = ()
    engines: dict[str, EngineState] = Field(default_factory=dict, description="by bundle, once its station is ready")
    configuration_version: int | None = None
    stations: tuple[str, ...] = Field((), description="there are: some brokers find nothing retained by a wildcard")
    shortened: Shortened = None


class Ready(TolerantModel):
    """ready/{station}, retained. States follow OPC 40100-1 (section 8.2, 8.3)."""

    schema_: Literal["ei.ready.v1"] = Field("ei.ready.v1", alias="schema")
    station: str
    ready: bool
    busy: bool = False
    state: Literal["preoperational", "halted", "error", "initialized", "ready", "single_execution", "continuous_execution"]
    reason: str = ""
    product: str | None = None
    product_ordered: bool = Field(False, description="by command: it holds until another one is ordered, also after a restart")
    recipe: str | None = None
    session: str
    tested_at: Moment | None = Field(None, description="when the samples of its bundles were judged last")
    promise: str = Field("", description="why the promised rates do not hold for its recipes, and where; empty: they do")
    finds: float | None = Field(
        None, description="smallest share of drawn defects that one of its bundles finds at its own threshold; none: not known"
    )


class Cause(TolerantModel):
    """One thing that is wrong."""

    code: str
    severity: Literal["failure", "check_function", "off_spec", "maintenance_required"]
    thing: str
    text: str


class OutboxFacts(TolerantModel):
    """How full the outbox is."""

    pending: int
    used: float = Field(description="share of the quota in use")
    dropped: int = Field(description="dropped by the quota since start")
    dropped_unsent: int = Field(description="of these, before the broker had them")
    refused: int


class ClockFacts(TolerantModel):
    """Whether the clock can be trusted."""

    ok: bool
    source: str
    offset_ms: float | None = None


class CameraFacts(TolerantModel):
    """What a camera has delivered since the start, and what it has not."""

    state: str
    frames: int
    lost: int = Field(description="on their way, or because nobody took them in time")
    broken: int = Field(description="came, but cannot be judged")
    missing: int = Field(description="asked for by a trigger, and never came")
    skipped: int = Field(description="let go on purpose: older than wanted")
    reopened: int


class HealthMessage(TolerantModel):
    """health, retained: NAMUR NE 107 status and its reasons."""

    schema_: Literal["ei.health.v1"] = Field("ei.health.v1", alias="schema")
    at: Moment
    status: Literal["normal", "failure", "check_function", "off_spec", "maintenance_required"]
    reasons: tuple[Cause, ...] = ()
    outbox: OutboxFacts
    clock: ClockFacts
    dropped_messages: int = 0
    cameras: dict[str, CameraFacts] = Field(default_factory=dict, description="by station/camera")
    shortened: Shortened = None


class Alert(TolerantModel):
    """alert/{station}: something a person should know, raised and cleared."""

    schema_: Literal["ei.alert.v1"] = Field("ei.alert.v1", alias="schema")
    station: str
    change: Literal["raised", "cleared"]
    code: str
    severity: Literal["failure", "check_function", "off_spec", "maintenance_required"]
    text: str
    result_id: str | None = None
    at: Moment
    expires_at: Moment
    shortened: Shortened = None


class Command(TolerantModel):
    """command/{name}; the answer goes to reply/{client}. Signed, unless device.yaml opens it: then all is needed."""

    request_id: PlainId = Field(description="a signed one is carried out once in a session, and answered again as it was")
    client: TopicLevel
    station: PlainId
    product: PlainId | None = None
    command: str = Field("", max_length=64, description="its name, as in the topic; needed where it is signed, as all below")
    by: PlainId | None = Field(None, description="who gives it; may be left out")
    device: str = Field("", max_length=200, description="SITE/LINE/DEVICE: it holds there only")
    session: str = Field("", max_length=64, description="of the device, as in `state`: it holds until the next one only")
    expires_at: Moment | None = Field(None, description="void from then on; an hour ahead at most")
    signature: Signature | None = Field(None, description="over `signed_bytes` of the rest")


class ReplyError(TolerantModel):
    """Why a command was refused."""

    code: str
    message: str
    hint: str = ""


class Reply(TolerantModel):
    """reply/{client}."""

    schema_: Literal["ei.reply.v1"] = Field("ei.reply.v1", alias="schema")
    request_id: str
    ok: bool
    error: ReplyError | None = None


class Order(TolerantModel):
    """Who wants something changed, and of which device; signed where the device requires it."""

    by: PlainId = Field(description="who wants it, for the audit trail")
    device: str = Field("", max_length=200, description="SITE/LINE/DEVICE; needed where it is signed: it holds there only")
    signature: Signature | None = Field(None, description="over `signed_bytes` of the rest")


class ConfigDesired(Order):
    """config/desired, retained: the line configuration that a device shall have."""

    schema_: Literal["ei.config-desired.v1"] = Field("ei.config-desired.v1", alias="schema")
    line: dict[str, Any] = Field(description="line.yaml as JSON, whole; its version must be above every earlier one")
    confirm_s: int = Field(
        600, ge=0, le=86_400, description="on trial for so long: without a confirmation it is rolled back; 0: no trial, only "
        "where nothing but recipes changes",
    )  # fmt: skip


class Confirm(Order):
    """config/confirm, bundle/{name}/confirm: what shall become of the one with this version or release."""

    schema_: Literal["ei.confirm.v1"] = Field("ei.confirm.v1", alias="schema")
    subject: str = Field("", max_length=128, description="configuration, or bundle/NAME; needed where it is signed")
    trial: str = Field("", max_length=64, description="its id, as reported; needed where it is signed")
    version: int = Field(ge=1, le=MAX_VERSION)
    action: Literal["confirm", "cancel", "reset"] = Field(
        description="confirm or cancel the one on trial; reset: from the remote one in force back to the device's own"
    )


class FaultFacts(TolerantModel):
    """One thing wrong with a document."""

    path: str
    problem: str
    found: str = ""
    suggestion: str = ""


Outcome = Literal[
    "preparing", "trial", "committed", "rejected", "stale", "rolled_back", "cancelled", "reset", "refused", "too_early"
]


class AuditEntry(TolerantModel):
    """One line of the audit trail: who wanted what, and what became of it."""

    at: Moment
    by: str
    version: int | None = None
    hash: str = ""
    outcome: Outcome
    reason: str = ""
    faults: tuple[FaultFacts, ...] = ()


class TrialFacts(TolerantModel):
    """What is on trial."""

    id: str = Field("", description="another one for each trial: a signed confirmation names it")
    version: int
    hash: str
    by: str
    deadline_at: Moment = Field(description="when it is rolled back, unless it is confirmed")
    starts: int = Field(description="of the daemon since the trial began; the third rolls it back")


class ConfigReported(TolerantModel):
    """config/reported, retained: which line configuration is in force, and what became of those that were wanted."""

    schema_: Literal["ei.config-reported.v1"] = Field("ei.config-reported.v1", alias="schema")
    source: Literal["local", "remote"] = Field(description="of what is in force: the device's own line.yaml, or remote")
    version: int = Field(description="in force")
    hash: str
    good_version: int = Field(description="what a rollback leads to")
    seen: int = Field(description="versions up to this one are taken")
    trial: TrialFacts | None = None
    last: AuditEntry | None = Field(None, description="the latest order and what became of it")
    history: tuple[AuditEntry, ...] = Field((), description="the audit trail, newest last")
    line: dict[str, Any] = Field(description="the document in force; *** stands in addresses of cameras for what is not told")
    shortened: Shortened = None
    promise: str = Field("", description="why the promised rates do not hold under a remote one; empty: they do, or local")


class BundleDesired(Order):
    """bundle/{name}/desired, retained: the release of a bundle that a device shall judge with."""

    schema_: Literal["ei.bundle-desired.v1"] = Field("ei.bundle-desired.v1", alias="schema")
    bundle: PlainId = Field(description="its name, as in the topic")
    release: int = Field(ge=1, le=MAX_VERSION, description="above every earlier one")
    source: str = Field(max_length=2048, description="https://server/folder, or the path of a folder on the device")
    shadow_parts: int = Field(50, ge=0, le=100_000, description="so many parts are judged by both before the trial")
    shadow_s: int = Field(3600, ge=1, le=7 * 86_400, description="within which they must come")
    max_disagreements: float = Field(0.1, ge=0, le=1, description="share of these that may be judged differently")
    max_slower: float = Field(1.5, ge=1, le=100, description="times as long as before that the networks may take")
    confirm_s: int = Field(
        3600, ge=1, le=7 * 86_400, description="on trial for so long: without a confirmation it is rolled back"
    )
    confirm_parts: int | None = Field(None, ge=20, le=1_000_000, description="confirmed by itself after so many parts on trial")
    max_fails: float = Field(0.5, gt=0, le=1, description="share of at least 20 parts on trial; more fail: rolled back")


class Disagreement(TolerantModel):
    """A part that two releases judge differently; the ratios are score / threshold."""

    trigger_id: str
    part_id: str | None = None
    old: Verdict
    new: Verdict
    old_ratio: float | None = None
    new_ratio: float | None = None
    evidence: Evidence | None = None


class ShadowFacts(TolerantModel):
    """What came out where both releases judged the same parts."""

    parts: int
    disagreements: int
    old_ms: float = Field(description="median time of the networks for one part")
    new_ms: float
    latest: tuple[Disagreement, ...] = ()


class PhaseFacts(TolerantModel):
    """Where a rollout stands: fetch, verify, build, samples, shadow."""

    name: str
    done: int
    total: int


class BundleReported(TolerantModel):
    """bundle/{name}/reported, retained: which release is in force, and what became of those that were wanted."""

    schema_: Literal["ei.bundle-reported.v1"] = Field("ei.bundle-reported.v1", alias="schema")
    bundle: str
    source: Literal["local", "remote"] = Field(description="of what is in force: the device's own folder, or remote")
    release: int | None = Field(description="in force, as far as that is known")
    good_release: int | None = Field(description="what a rollback leads to")
    seen: int = Field(description="releases up to this one are taken")
    phase: PhaseFacts | None = None
    shadow: ShadowFacts | None = None
    trial: TrialFacts | None = None
    last: AuditEntry | None = None
    history: tuple[AuditEntry, ...] = ()
    shortened: Shortened = None


def signed_bytes(values: dict[str, Any]) -> bytes:
    """What the signature of an order covers: its JSON without `signature`, keys sorted by code point,
    no spaces, UTF-8, numbers as Python writes them (1.0, 1e-07).
    """
    rest = {key: value for key, value in values.items() if key != "signature"}
    return json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


PUBLISHED: dict[str, type[BaseModel]] = {
    "result": Result,
    "verdict": VerdictMessage,
    "gap": Gap,
    "head": Head,
    "replay-end": ReplayEnd,
    "state": StateMessage,
    "ready": Ready,
    "health": HealthMessage,
    "alert": Alert,
    "reply": Reply,
    "trigger": TriggerRequest,
    "replay-request": ReplayRequest,
    "command": Command,
    "config-desired": ConfigDesired,
    "confirm": Confirm,
    "bundle-desired": BundleDesired,
    "bundle-reported": BundleReported,
    "config-reported": ConfigReported,
}
M = TypeVar("M", bound=BaseModel)


def encode(message: BaseModel) -> bytes:
    """A payload's bytes."""
    return message.model_dump_json(by_alias=True, exclude_none=True).encode()


def decode(model: type[M], payload: bytes, topic: str, limit: int = MAX_BYTES) -> M:
    """A payload's model. Raises SchemaError with every fault."""
    return validate(model, read_json(payload, topic, limit), topic)
