"""What an ONNX file holds, read from its bytes without running it and without the onnx package.

Only what a bundle must be refused for: tensors kept in other files, operators from foreign domains, local functions.
The wire format is protobuf's (protobuf.dev, "Encoding"), the field numbers are those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from edge_inspector.errors import BundleUnsupported

MAX_DEPTH = 16
OPSET = 17

# Field numbers of onnx.proto.
_MODEL_GRAPH, _MODEL_OPSETS, _MODEL_FUNCTIONS = 7, 8, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_SPARSE = 1, 5, 15
_NODE_ATTRIBUTE, _NODE_OP, _NODE_DOMAIN = 5, 4, 7
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 5, 6, 10, 11
_TENSOR_EXTERNAL, _TENSOR_LOCATION = 13, 14
_OPSET_DOMAIN, _OPSET_VERSION = 1, 2


@dataclass
class GraphFacts:
    """Operators used, domains named, whether data lies outside the file."""

    operators: set[str] = field(default_factory=set)
    domains: set[str] = field(default_factory=set)
    opset: int = 0
    external_data: bool = False
    functions: bool = False


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("ends inside a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:  # protobuf's continuation bit
            return value, at
    raise ValueError("number too long")


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == 2:  # length-delimited
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"unknown wire type {kind}")
        if at + size > len(data):
            raise ValueError("a field reaches beyond the end")
        yield number, data[at : at + size]
        at += size


def _messages(data: memoryview, *numbers: int) -> Iterator[memoryview]:
    for number, value in _fields(data):
        if number in numbers and isinstance(value, memoryview):
            yield value


def _tensor(data: memoryview, facts: GraphFacts) -> None:
    for number, value in _fields(data):
        if number == _TENSOR_EXTERNAL or (number == _TENSOR_LOCATION and value != 0):
            facts.external_data = True


def _node(data: memoryview, facts: GraphFacts, depth: int) -> None:
    for number, value in _fields(data):
        if not isinstance(value, memoryview):
            continue
        if number == _NODE_OP:
            facts.operators.add(bytes(value).decode())
        elif number == _NODE_DOMAIN:
            facts.domains.add(bytes(value).decode())
        elif number == _NODE_ATTRIBUTE:
            for tensor in _messages(value, _ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS):
                _tensor(tensor, facts)
            for graph in _messages(value, _ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
                _graph(graph, facts, depth + 1)


def _graph(data: memoryview, facts: GraphFacts, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"graphs nested deeper than {MAX_DEPTH}")
    for number, value in _fields(data):
        if not isinstance(value, memoryview):
            continue
        if number == _GRAPH_NODE:
            _node(value, facts, depth)
        elif number == _GRAPH_INITIALIZER:
            _tensor(value, facts)
        elif number == _GRAPH_SPARSE:
            for tensor in _messages(value, 1, 2):
                _tensor(tensor, facts)


def facts_of(data: bytes) -> GraphFacts:
    """Read an ONNX model's bytes. Raises ValueError when they are not one."""
    facts = GraphFacts()
    graphs = 0
    for number, value in _fields(memoryview(data)):
        if number == _MODEL_FUNCTIONS:
            facts.functions = True
        if number == _MODEL_OPSETS and isinstance(value, memoryview):
            opset = dict(_fields(value))
            domain = opset.get(_OPSET_DOMAIN, memoryview(b""))
            name = bytes(domain).decode() if isinstance(domain, memoryview) else ""
            facts.domains.add(name)
            version = opset.get(_OPSET_VERSION, 0)
            facts.opset = version if name == "" and isinstance(version, int) else facts.opset
        if number == _MODEL_GRAPH and isinstance(value, memoryview):
            graphs += 1
            _graph(value, facts, 0)
    if graphs != 1:
        raise ValueError(f"{graphs} graphs, expected 1")
    return facts


def refuse_foreign(data: bytes, name: str) -> None:
    """Raise BundleUnsupported unless the model is self-contained and of standard operators only."""
    try:
        facts = facts_of(data)
    except (ValueError, UnicodeDecodeError) as error:
        raise BundleUnsupported(f"{name}: not an ONNX model: {error}") from error
    if facts.external_data:
        raise BundleUnsupported(f"{name}: keeps tensors in other files", hint="export it with all data inside")
    foreign = sorted(facts.domains - {"", "ai.onnx"})
    if foreign:
        raise BundleUnsupported(f"{name}: operators of foreign domains {foreign}; only ai.onnx is allowed")
    if facts.functions:
        raise BundleUnsupported(f"{name}: defines its own functions", hint="inline them when exporting")
    if facts.opset > OPSET:
        raise BundleUnsupported(f"{name}: opset {facts.opset}, at most {OPSET} is supported")
