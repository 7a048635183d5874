"""The one door for documents."""

from __future__ import annotations

import importlib
import json
import re
import time
from pathlib import Path

import pytest
from pydantic import BaseModel

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


@pytest.mark.parametrize("text", [b'{"a":1,"a":2}', b"{", b"NaN", b'{"a": Infinity}', b'{"a": 1e999}', b"[" * 100_000])
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
    assert '"soon"' in told
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


HARDLY: tuple[object, ...] = (
    None, True, -1, 0, 10**30, -(10**30), 0.5, -0.5, 1e308, "", "x" * 5000, "Ä ö", "*", "2020-01-01", "2020-01-01T00:00:00", [],
    {}, ["a"], [1, 2, 3, 4, 5, 6, 7], {"a": 1}, {"A B": 1}, [[1, 2]], [[1, 2, 3], [1, 2], [3, 4]], {"a": {}}, [{}], [None] * 520,
    {f"a{n}": 0 for n in range(300)}, {"x": 0, "y": 0}, "dir:///x", "gst:", "\x00", [[]], {"a": [[], {}, None]},
)  # fmt: skip
FOREIGN = re.compile(
    r"pydantic|tuple|dict|[Ii]nput|\^\[|\\|None|True|False|validat|error|string|instance|pars|mapping|`|\bint\b|\bstr\b|float"
)


def models(kind: type[BaseModel] = BaseModel) -> set[type[BaseModel]]:
    """All that this package has, with those that are not documents of their own."""
    return {m for below in kind.__subclasses__() for m in (below, *models(below)) if m.__module__.startswith("edge_inspector")}


def test_whatever_is_wrong_is_said_in_plain_words() -> None:
    for module in ("bundles", "config", "documents", "remote.trial", "runtime.build", "evidence", "messages"):
        importlib.import_module(f"edge_inspector.{module}")
    told = set()
    for model in models():
        for name, field in model.model_fields.items():
            for value in HARDLY:
                try:
                    validate(model, {field.alias or name: value}, "x")
                except SchemaError as error:
                    told |= {fault.problem for fault in error.faults if not fault.problem.startswith("must be one of")}
    assert len(told) > 60
    assert [words for words in told if FOREIGN.search(words)] == []
    assert "cannot be used here" not in told, "each kind of fault has its words"


def test_a_document_of_nothing_but_faults_costs_little_and_says_how_many() -> None:
    text = json.dumps({f"stations{n}": n for n in range(4000)}).encode()
    began = time.process_time()
    with pytest.raises(SchemaError) as caught:
        validate(LineConfig, read_json(text, "x", len(text)), "x")
    assert time.process_time() - began < 2.0
    assert len(caught.value.faults) == 101
    assert "3903 more" in str(caught.value.faults[-1])


def test_a_section_that_stands_for_a_value_is_not_shown_since_it_may_hold_a_password() -> None:
    text = line_yaml().replace("expires_ms: 5000", "expires_ms: {a: [1, true, null]}")
    text = text.replace('"}}', '", features: {Gain: {}}}}')
    with pytest.raises(SchemaError) as caught:
        parse_line(read_yaml(text.encode(), "x"), "x")
    assert [(fault.path, fault.problem, fault.found) for fault in caught.value.faults] == [
        ("stations.sheet.expires_ms", "must be a whole number", ""),
        ("stations.sheet.cameras.top.features.Gain", "must be true or false or a whole number or a number or a text", ""),
    ]
