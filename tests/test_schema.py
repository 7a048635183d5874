"""The one door for documents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_inspector.config import DeviceConfig, LineConfig, load_line, parse_line
from edge_inspector.documents import SCHEMAS
from edge_inspector.errors import SchemaError
from edge_inspector.schema import MAX_BYTES, json_schema, read_json, read_yaml, validate
from tests.line import line_yaml

TEMPLATES = Path(__file__).resolve().parents[1] / "edge_inspector" / "cli" / "templates"


def test_words_stay_words() -> None:
    data = read_yaml(b"a: no\nb: 12:30:00\nc: 2026-01-01\nd: 1e3\ne: 012\nf: true\ng: null\nh: -4", "x")
    assert data == {
        "a": "no", "b": "12:30:00", "c": "2026-01-01", "d": 1000.0, "e": "012", "f": True, "g": None, "h": -4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"a: 1\na: 2", "duplicate key 'a'"),
        (b"a: &x [1]\nb: *x", "aliases are not allowed"),
        (b"a: [", "line 1"),
        (b"1: 2", "is not a text"),
        (b"a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        (b"#" * (MAX_BYTES + 1), "at most 65536 bytes"),
        (b"\xff", "not UTF-8"),
        (b"[" * 5000, "not YAML"),
    ],
)
def test_bad_yaml_is_one_clear_fault(text: bytes, problem: str) -> None:
    with pytest.raises(SchemaError, match="x: 1 fault") as caught:
        read_yaml(text, "x")
    assert problem in str(caught.value)


@pytest.mark.parametrize("text", [b'{"a":1,"a":2}', b"{", b"NaN", b'{"a": Infinity}', b"[" * 100_000])
def test_bad_json_is_refused(text: bytes) -> None:
    with pytest.raises(SchemaError):
        read_json(text, "x")


def test_all_faults_come_at_once_with_path_found_allowed_and_did_you_mean() -> None:
    text = line_yaml().replace("trigger: software", "triger: software").replace("expires_ms: 5000", "expires_ms: soon")
    text = text.replace("dir://", "dri://")
    with pytest.raises(SchemaError) as caught:
        parse_line(read_yaml(text.encode(), "line.yaml"), "line.yaml")
    told = str(caught.value)
    assert len(caught.value.faults) == 3
    assert "stations.sheet.triger: unknown key" in told
    assert "did you mean 'trigger'?" in told
    assert "stations.sheet.expires_ms" in told
    assert "'soon'" in told
    assert "camera URI must start with one of dir://" in told


def test_a_wrong_choice_names_the_allowed_ones() -> None:
    with pytest.raises(SchemaError, match="must be one of free, software") as caught:
        parse_line(read_yaml(line_yaml(trigger="softwar").encode(), "x"), "x")
    assert "did you mean 'software'?" in str(caught.value)


def test_names_that_lead_nowhere_are_faults() -> None:
    text = line_yaml().replace("{paper: whole}", "{paper: hole, glass: whole}").replace("product: paper\n", "product: papr\n")
    text = text.replace("whole: {cameras: {top:", "whole: {cameras: {side:")
    with pytest.raises(SchemaError) as caught:
        parse_line(read_yaml(text.encode(), "x"), "x")
    assert [fault.path for fault in caught.value.faults] == [
        "stations.sheet.product", "stations.sheet.products.paper", "recipes.whole.cameras.side",
    ]  # fmt: skip


def test_a_free_station_needs_its_product() -> None:
    text = line_yaml(trigger="free").replace("    product: paper\n", "")
    with pytest.raises(SchemaError, match="is required where the trigger is free"):
        parse_line(read_yaml(text.encode(), "x"), "x")


def test_a_free_station_has_one_camera() -> None:
    text = line_yaml(trigger="free").replace("cameras: {top:", 'cameras: {side: {uri: "synthetic://"}, top:', 1)
    with pytest.raises(SchemaError, match="free needs a station of one camera"):
        parse_line(read_yaml(text.encode(), "x"), "x")


def test_the_templates_of_init_are_valid() -> None:
    validate(DeviceConfig, read_yaml((TEMPLATES / "device.yaml").read_bytes(), "device"), "device")
    assert load_line(TEMPLATES / "line.yaml").bundles == {"my-product"}


def test_the_shipped_schemas_are_those_of_the_code() -> None:
    folder = TEMPLATES.parents[1] / "schemas"
    shipped = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert shipped == {name: json_schema(model) for name, model in SCHEMAS.items()}


def test_one_document_reads_the_same_from_yaml_and_json() -> None:
    values = read_yaml(line_yaml().encode(), "x")
    assert parse_line(read_json(json.dumps(values).encode(), "x"), "x") == parse_line(values, "x")
    assert isinstance(parse_line(values, "x"), LineConfig)
