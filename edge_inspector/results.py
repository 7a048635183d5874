"""Verdicts, findings, results: the record of one inspection, as it is stored and published.

States and fields follow OPC 40100-1 where it has one (Machine Vision, ResultType); `pass`, `fail` and `undecided` are
its OK, NotOK and NotDecidable.
"""

from __future__ import annotations

import re
from datetime import datetime, timezone
from enum import Enum
from typing import Annotated, Literal

from pydantic import AfterValidator, AwareDatetime, PlainSerializer, WithJsonSchema

from edge_inspector.schema import Field, TolerantModel

MAX_REGIONS = 16
MAX_RESULT_BYTES = 4096


class Verdict(str, Enum):
    """Only `pass` lets a part through; everything else, silence included, does not."""

    PASS = "pass"  # noqa: S105 - not a password
    FAIL = "fail"
    UNDECIDED = "undecided"


class Reason(str, Enum):
    """Why a verdict is what it is."""

    BELOW_THRESHOLD = "below_threshold"
    ABOVE_THRESHOLD = "above_threshold"
    LATE = "late"
    INTERRUPTED = "interrupted"
    MISSING_IMAGE = "missing_image"
    CORRUPT_IMAGE = "corrupt_image"
    DARK_IMAGE = "dark_image"
    FROZEN_IMAGE = "frozen_image"
    WRONG_FORMAT = "wrong_format"
    NOT_A_NUMBER = "not_a_number"
    UNKNOWN_PRODUCT = "unknown_product"
    NOT_READY = "not_ready"
    OVERLOAD = "overload"
    ENGINE_FAULT = "engine_fault"
    NOT_RECORDED = "not_recorded"
    INVALID_TRIGGER = "invalid_trigger"
    TRIGGER_ID_REUSED = "trigger_id_reused"
    REFUSED = "refused"
    """The trigger was not taken: no part was inspected, there is no record."""


def rfc3339(moment: datetime) -> str:
    """UTC with milliseconds and Z: 2026-11-23T08:15:30.123Z."""
    return moment.astimezone(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


Moment = Annotated[
    AwareDatetime,
    PlainSerializer(rfc3339, return_type=str, when_used="json"),
    WithJsonSchema({"type": "string", "format": "date-time"}),
]


_UNSCANNED = (r"\u0000-\u0003\u0005-\u001b\u007f-\u009f", r"\u2028-\u202e\u2066-\u2069")
"""Characters that no scanner reads from a label: controls but for separators (GS1, ISO 15434), and what turns text around."""


def _scanned(text: str) -> str:
    found = re.search(f"[{''.join(_UNSCANNED)}]", text)
    if found:
        raise ValueError(f"the character U+{ord(found[0]):04X} is not taken: printable ones, blanks and GS1 separators are")
    return text


PartId = Annotated[
    str,
    Field(min_length=1, max_length=128, json_schema_extra={"pattern": f"^[^{''.join(_UNSCANNED)}]+$"}),
    AfterValidator(_scanned),
]
"""What a scanner reads, as it is: blanks, any printable Unicode, U+001D between the fields of a GS1 code."""


class Region(TolerantModel):
    """A connected area of the anomaly map above the threshold, in pixels of the frame (mm with a scale)."""

    x_px: int
    y_px: int
    w_px: int
    h_px: int
    area_px: int
    area_mm2: float | None = None
    peak: float


class BundleRef(TolerantModel):
    """Which bundle judged."""

    name: str
    release: int
    sha256: str


class EngineRef(TolerantModel):
    """What ran it."""

    runtime: str
    precision: str


class Finding(TolerantModel):
    """The outcome of one region of interest."""

    camera: str
    roi: str
    frame: int = 0
    verdict: Verdict
    reason: Reason
    score: float | None = None
    threshold: float
    ratio: float | None = None
    bundle: BundleRef
    engine: EngineRef
    promise: str | None = Field(None, description="why the rates promised with its threshold do not hold; none: they do")
    regions: tuple[Region, ...] = ()
    regions_omitted: int = 0


class RecipeRef(TolerantModel):
    """Which recipe was applied: its id and the hash of its content."""

    id: str
    hash: str


class ConfigurationRef(TolerantModel):
    """Which line configuration was in force."""

    version: int
    hash: str


class Evidence(TolerantModel):
    """Pictures kept of this inspection."""

    id: str
    stored: bool


class Times(TolerantModel):
    """How long each stage took, in milliseconds; `total` runs from trigger to decision."""

    capture: float = 0.0
    preprocess: float = 0.0
    infer: float = 0.0
    decide: float = 0.0
    total: float = 0.0


class Result(TolerantModel):
    """The record of one inspection. `result_id`, `stream` and `seq` are given by the outbox when it is stored."""

    schema_: Literal["ei.result.v1"] = Field("ei.result.v1", alias="schema")
    result_id: str = ""
    stream: str = ""
    seq: int = 0
    station: str
    trigger_id: str
    part_id: str | None = None
    product: str | None = None
    verdict: Verdict
    reason: Reason
    detail: str = ""
    state: Literal["completed", "aborted", "failed"] = "completed"
    simulated: bool = False
    clock_ok: bool = True
    triggered_at: Moment
    captured_at: Moment | None = None
    decided_at: Moment
    expires_at: Moment
    recipe: RecipeRef | None = None
    configuration: ConfigurationRef | None = None
    findings: tuple[Finding, ...] = ()
    findings_omitted: int = 0
    times_ms: Times = Times()
    evidence: Evidence | None = None
    shortened: Literal[True] | None = Field(
        None, description="the broker takes no more: regions, findings or texts were left out; a replay gives no more"
    )
    former_id: str | None = Field(
        None, description="result_id under which it may have been told already, before its stream had to end: no other part"
    )

    def payload(self) -> bytes:
        """JSON of at most 4 KB: regions, then findings, are left out (and counted) until it fits."""
        result = self
        while len(data := result.model_dump_json(by_alias=True, exclude_none=True).encode()) > MAX_RESULT_BYTES:
            result = _smaller(result)
        return data


def fitted(result: Result, most_bytes: int) -> bytes | None:
    """The JSON of a result within so many bytes, shortened where it must be; None where even the shortest does not fit."""
    data = result.payload()
    shortened = result.model_copy(update={"shortened": True})
    while len(data) > most_bytes:
        smaller = _smaller(shortened)
        if smaller == shortened:
            return None
        shortened = smaller
        data = shortened.payload()
    return data


def _smaller(result: Result) -> Result:
    """The same result with the list that is longest halved: regions of one finding, else the passing findings; then without
    what is not needed to act on it.
    """
    findings = list(result.findings)
    longest = max(range(len(findings)), key=lambda i: len(findings[i].regions), default=None)
    if longest is not None and findings[longest].regions:
        finding = findings[longest]
        keep = len(finding.regions) // 2
        findings[longest] = finding.model_copy(
            update={
                "regions": finding.regions[:keep],
                "regions_omitted": finding.regions_omitted + len(finding.regions) - keep,
            }
        )
        return result.model_copy(update={"findings": tuple(findings)})
    if len(findings) > 1:
        findings.sort(key=lambda f: f.ratio if f.ratio is not None else float("inf"), reverse=True)
        keep = len(findings) // 2
        omitted = result.findings_omitted + len(findings) - keep
        return result.model_copy(update={"findings": tuple(findings[:keep]), "findings_omitted": omitted})
    if findings or len(result.detail) > 64:
        omitted = result.findings_omitted + len(findings)
        return result.model_copy(update={"detail": result.detail[:64], "findings": (), "findings_omitted": omitted})
    return result.model_copy(
        update={"detail": "", "evidence": None, "recipe": None, "configuration": None, "captured_at": None, "times_ms": Times()}
    )
