"""The one door for documents: YAML or JSON bytes in, a validated model or every fault out.

Files, the command line and remote updates all come through here. YAML is read as JSON would be: no aliases, no
duplicate keys, no dates, and only `true` and `false` are booleans (`no` is a word, `12:30` a text).
"""

from __future__ import annotations

import json
import math
import re
import typing
from difflib import get_close_matches
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge_inspector.errors import Fault, SchemaError

__all__ = [
    "MAX_BYTES", "Field", "Model", "TolerantModel", "block", "flow", "json_schema", "read_json", "read_yaml", "validate",
]  # fmt: skip

MAX_BYTES = 64 * 1024
MAX_FAULTS = 100
"""That are told; whoever sends thousands costs no more."""
_SHOWN = 60
_ADDRESSES = ("uri", "source")
"""Fields that may hold a password."""
_WRONG_TYPES = ("model_type", "dict_type", "model_attributes_type", "tuple_type", "list_type")


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


def flow(values: object) -> str:
    """Plain values as one line of YAML, to be put into a document."""
    text: str = yaml.safe_dump(values, default_flow_style=True, sort_keys=False, allow_unicode=True, width=float("inf"))
    return text.strip()


def block(values: object) -> str:
    """Plain values as lines of YAML, to be put into a document."""
    text: str = yaml.safe_dump(values, default_flow_style=None, sort_keys=False, allow_unicode=True, width=100)
    return text


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"duplicate key {twice!r}")
    return out


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    """Numbers that are too large become endless: they could be read, and never written as JSON again."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large a number")
    return number


def read_json(data: bytes, source: str, limit: int = MAX_BYTES) -> object:
    """Parse JSON bytes (at most 64 KB, unless said otherwise) into plain values. Raises SchemaError."""
    text = _bounded(data, source, limit)
    try:
        return _sound(json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite), source)
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


_WORDS = {
    "missing": "is required",
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a number that is not endless",
    "string_type": "must be a text",
    "model_type": "must be a section with keys of its own",
    "dict_type": "must be a section with keys of its own",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "string_too_short": "must have at least {min_length} character(s)",
    "string_too_long": "must have at most {max_length} characters",
    "too_short": "must have at least {min_length} entries",
    "too_long": "must have at most {max_length} entries",
    "timezone_aware": "must say its time zone, as in 2026-11-23T08:15:30.123Z",
    "timezone_naive": "must say no time zone",
}
"""What is wrong, by pydantic's kind of fault."""
_FAMILIES = {
    "int_": _WORDS["int_type"],
    "float_": _WORDS["float_type"],
    "bool_": _WORDS["bool_type"],
    "string_": _WORDS["string_type"],
    "datetime_": "must be a time, as in 2026-11-23T08:15:30.123Z",
    "date_": "must be a time, as in 2026-11-23T08:15:30.123Z",
    "model_": _WORDS["model_type"],
    "dict_": _WORDS["dict_type"],
}
_PATTERNS = {
    r"^[a-z0-9]+(-[a-z0-9]+)*$": "must be small letters and digits, with single hyphens between them, as in press-1",
    r"^[\x21-\x7e]+$": "must be letters, digits and signs of ASCII, without blanks",
    r"^[A-Za-z0-9_-]+$": "must be letters of ASCII, digits, - and _",
    r"^[0-9a-f]{16}$": "must be 16 digits of 0-9 and a-f",
    r"^[0-9a-f]{64}$": "must be 64 digits of 0-9 and a-f",
    r"^[0-9]+\.[0-9]+\.[0-9]+$": "must be a version of three numbers, as in 1.2.0",
}
_SCALARS = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text"}
"""Names that pydantic gives the members of a union, within a fault's place."""


def _found(location: tuple[Any, ...], kind: str, value: object) -> str:
    """What a document says, as it could stand in it: never an address, nor what holds one or stands for a section."""
    if (location and location[-1] in _ADDRESSES) or isinstance(value, dict):
        return ""
    if isinstance(value, str) and kind in _WRONG_TYPES:
        return "a text"
    if isinstance(value, list) and any(isinstance(one, (str, dict, list)) for one in value):
        return "a list"
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return ""
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _problem(error: Any) -> str:
    """A fault in plain words, never pydantic's."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])  # our own validators' words
    if kind == "string_pattern_mismatch":
        return _PATTERNS.get(context["pattern"], "has characters that may not stand here")
    if kind in _WORDS:
        return _WORDS[kind].format(**{name: _plain(value) for name, value in context.items()})
    return next((words for family, words in _FAMILIES.items() if kind.startswith(family)), "cannot be used here")


def _plain(value: object) -> object:
    return f"{value:g}" if isinstance(value, float) and abs(value) < 1e6 else value


def _fault(model: type[BaseModel], error: Any) -> Fault:
    location = tuple(error["loc"])
    path = ".".join(str(part) for part in location if part != "[key]")
    kind, found = error["type"], _found(location, error["type"], error["input"])
    if kind == "missing":
        return Fault(path, _problem(error))
    if kind == "extra_forbidden":
        return Fault(path, "unknown key", suggestion=_suggestion(str(location[-1]), _known_keys(model, location[:-1])))
    if kind in ("literal_error", "enum"):
        allowed = re.findall(r"'([^']*)'", str(error.get("ctx", {}).get("expected", "")))
        near = get_close_matches(str(error["input"]), allowed, n=1)
        suggestion = _suggestion(str(error["input"]), allowed) if near else ""
        return Fault(path, f"must be one of {', '.join(allowed)}", found, suggestion)
    return Fault(path, _problem(error), found)


def _faults(model: type[BaseModel], errors: list[Any]) -> list[Fault]:
    """One fault for each place: a value that is none of several kinds has pydantic's for each of them."""
    faults, places = [], dict[tuple[Any, ...], list[str]]()
    for error in errors:
        location = tuple(error["loc"])
        if len(location) > 1 and location[-1] in _SCALARS and error["type"].endswith("_type"):
            places.setdefault(location[:-1], []).append(location[-1])
    for error in errors:
        location = tuple(error["loc"])
        kinds = places.get(location[:-1], [])
        if len(kinds) < 2 or location[-1] not in kinds:
            faults.append(_fault(model, error))
        elif location[-1] == kinds[0]:
            words = f"must be {' or '.join(_SCALARS[kind] for kind in kinds)}"
            faults.append(Fault(".".join(map(str, location[:-1])), words, _found(location[:-1], "", error["input"])))
    return faults


def validate(model: type[M], data: object, source: str) -> M:
    """Check plain values against `model`. Raises SchemaError with every fault: path, found, allowed, did you mean."""
    try:
        return model.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        faults = _faults(model, errors[:MAX_FAULTS])
        faults += [Fault("", f"{len(errors) - MAX_FAULTS} more faults")] if len(errors) > MAX_FAULTS else []
        raise SchemaError(source, faults) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise SchemaError(source, [Fault("", str(error))]) from error


def json_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema of a document, as `edge-inspector schema` prints and the package ships it."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema()}
