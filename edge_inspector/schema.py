"""The one door for documents: YAML or JSON bytes in, a validated model or every fault out.

Files, the command line and remote updates all come through here. YAML is read as JSON would be: no aliases, no
duplicate keys, no dates, and only `true` and `false` are booleans (`no` is a word, `12:30` a text).
"""

from __future__ import annotations

import json
import re
import typing
from difflib import get_close_matches
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge_inspector.errors import Fault, SchemaError

__all__ = ["MAX_BYTES", "Field", "Model", "TolerantModel", "json_schema", "read_json", "read_yaml", "validate"]

MAX_BYTES = 64 * 1024
_SHOWN = 60


class Model(BaseModel):
    """A document or part of one: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TolerantModel(BaseModel):
    """A message from elsewhere: frozen, unknown fields ignored, so that later versions may add some."""

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="null")


M = TypeVar("M", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """SafeLoader without aliases, duplicate keys, dates, sexagesimal numbers or yes/no booleans."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: ARG002 - as in PyYAML
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not a text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=True)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"^(?:null|~|)$", ["n", "~", ""]),
    ("bool", r"^(?:true|false)$", list("tf")),
    ("int", r"^[-+]?(?:0|[1-9][0-9]*)$", list("-+0123456789")),
    ("float", r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def _bounded(data: bytes, source: str, limit: int = MAX_BYTES) -> str:
    if len(data) > limit:
        raise SchemaError(source, [Fault("", f"at most {limit} bytes are allowed", f"{len(data)} bytes")])
    try:
        return data.decode("utf-8-sig")  # some editors and controllers put a byte order mark before it
    except UnicodeDecodeError as error:
        kind = "UTF-16, save it as UTF-8" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else error.reason
        raise SchemaError(source, [Fault("", f"not UTF-8 text: {kind} at byte {error.start}")]) from error


def _sound(values: object, source: str) -> object:
    r"""Refuse texts that no encoding has (escapes like \ud800): they could be read, and never told to anybody."""
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise SchemaError(source, [Fault("", "half of a surrogate pair is no text")]) from error
    return values


def read_yaml(data: bytes, source: str) -> object:
    """Parse YAML bytes (at most 64 KB) into plain values. Raises SchemaError."""
    text = _bounded(data, source)
    try:
        return _sound(yaml.load(text, Loader=_Loader), source)  # noqa: S506 - _Loader is a SafeLoader made stricter
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise SchemaError(source, [Fault(where, error.problem or "not YAML")]) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise SchemaError(source, [Fault("", f"not YAML: {str(error).splitlines()[0]}")]) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"duplicate key {twice!r}")
    return out


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def read_json(data: bytes, source: str, limit: int = MAX_BYTES) -> object:
    """Parse JSON bytes (at most 64 KB, unless said otherwise) into plain values. Raises SchemaError."""
    text = _bounded(data, source, limit)
    try:
        return _sound(json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant), source)
    except (ValueError, RecursionError) as error:
        raise SchemaError(source, [Fault("", f"not JSON: {error}")]) from error


def _strip(annotation: Any) -> Any:
    """The part of an annotation that has fields: X of Annotated[X, ...] and of X | None."""
    while True:
        origin = typing.get_origin(annotation)
        arguments = [a for a in typing.get_args(annotation) if a is not type(None)]
        if origin is typing.Annotated or (origin is not None and origin not in (dict, list, tuple) and len(arguments) == 1):
            annotation = arguments[0]
        else:
            return annotation


def _known_keys(annotation: Any, location: tuple[Any, ...]) -> list[str]:
    """Field names allowed at `location` inside `annotation`; empty where that cannot be told."""
    annotation = _strip(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if not location:
            return [field.alias or name for name, field in annotation.model_fields.items()]
        field = annotation.model_fields.get(str(location[0]))
        return _known_keys(field.annotation, location[1:]) if field else []
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (dict, list, tuple) and location:
        return _known_keys(arguments[1] if origin is dict else arguments[0], location[1:])
    return []


def _suggestion(word: str, allowed: list[str]) -> str:
    near = get_close_matches(word, allowed, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(allowed)}" if allowed else ""


def _fault(model: type[BaseModel], error: Any) -> Fault:
    location = tuple(error["loc"])
    path = ".".join(str(part) for part in location if part != "[key]")
    kind, found = error["type"], repr(error["input"])
    found = found if len(found) <= _SHOWN else found[: _SHOWN - 1] + "…"
    if kind == "missing":
        return Fault(path, "is required")
    if kind == "extra_forbidden":
        return Fault(path, "unknown key", suggestion=_suggestion(str(location[-1]), _known_keys(model, location[:-1])))
    if kind in ("literal_error", "enum"):
        allowed = re.findall(r"'([^']*)'", str(error.get("ctx", {}).get("expected", "")))
        return Fault(
            path,
            f"must be one of {', '.join(allowed)}",
            found,
            _suggestion(str(error["input"]), allowed) if get_close_matches(str(error["input"]), allowed, n=1) else "",
        )
    message = error["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    return Fault(path, message.replace("input should be", "must be"), found)


def validate(model: type[M], data: object, source: str) -> M:
    """Check plain values against `model`. Raises SchemaError with every fault: path, found, allowed, did you mean."""
    try:
        return model.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        faults = [_fault(model, one) for one in error.errors(include_url=False)]
        raise SchemaError(source, faults) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise SchemaError(source, [Fault("", str(error))]) from error


def json_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema of a document, as `edge-inspector schema` prints and the package ships it."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema()}
