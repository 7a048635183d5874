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
OWN_DOMAINS = {"", "ai.onnx"}

# Field numbers of onnx.proto.
_MODEL_GRAPH, _MODEL_OPSETS, _MODEL_TRAINING, _MODEL_FUNCTIONS = 7, 8, 20, 25
_TRAINING_GRAPHS = (1, 2)
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_SPARSE = 1, 5, 15
_NODE_ATTRIBUTE, _NODE_OP, _NODE_DOMAIN = 5, 4, 7
_ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS, _ATTRIBUTE_SPARSE = (5, 10), (6, 11), (22, 23)
_SPARSE_TENSORS = (1, 2)
_TENSOR_EXTERNAL, _TENSOR_LOCATION = 13, 14
_OPSET_DOMAIN, _OPSET_VERSION = 1, 2

_NUMBER, _BYTES = 0, 2
_FIXED = {1: 8, 5: 4}
"""Wire types, and the sizes of those that have one."""
_TAG_BYTES, _NUMBER_BYTES = 5, 10
_TAG_BITS, _NUMBER_BITS = 32, 64


@dataclass
class GraphFacts:
    """Operators used, domains named, whether data lies outside the file."""

    operators: set[str] = field(default_factory=set)
    domains: set[str] = field(default_factory=set)
    opset: int = 0
    external_data: bool = False
    functions: bool = False


def _varint(data: memoryview, at: int, most_bytes: int, most_bits: int) -> tuple[int, int]:
    """A number and where it ends. Readers cut off what does not fit, each in its own way: refused here."""
    value = 0
    for place in range(most_bytes):
        if at >= len(data):
            raise ValueError("ends inside a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:  # protobuf's continuation bit
            break
    else:
        raise ValueError("number too long")
    if value >> most_bits:
        raise ValueError(f"number of more than {most_bits} bits")
    return value, at


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field: an int of wire type 0, bytes of wire type 2.

    A field of onnx.proto that has another wire type is an unknown one to every reader, and left out.
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at, _TAG_BYTES, _TAG_BITS)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise ValueError("a field has the number 0")
        if kind == _NUMBER:
            value, at = _varint(data, at, _NUMBER_BYTES, _NUMBER_BITS)
            yield number, value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at, _TAG_BYTES, _TAG_BITS)
        elif kind in _FIXED:
            size = _FIXED[kind]
        else:
            raise ValueError(f"unknown wire type {kind}")
        if at + size > len(data):
            raise ValueError("a field reaches beyond the end")
        if kind == _BYTES:
            yield number, data[at : at + size]
        at += size


def _messages(data: memoryview, *numbers: int) -> Iterator[memoryview]:
    for number, value in _fields(data):
        if number in numbers and isinstance(value, memoryview):
            yield value


def _numbers(data: memoryview, wanted: int) -> Iterator[int]:
    for number, value in _fields(data):
        if number == wanted and isinstance(value, int):
            yield value


def _text(data: memoryview) -> str:
    return bytes(data).decode()


def _tensor(data: memoryview, facts: GraphFacts) -> None:
    entries = sum(1 for _ in _messages(data, _TENSOR_EXTERNAL))  # an empty one is one, too
    if entries or any(_numbers(data, _TENSOR_LOCATION)):
        facts.external_data = True


def _sparse(data: memoryview, facts: GraphFacts) -> None:
    for tensor in _messages(data, *_SPARSE_TENSORS):
        _tensor(tensor, facts)


def _attribute(data: memoryview, facts: GraphFacts, depth: int) -> None:
    for tensor in _messages(data, *_ATTRIBUTE_TENSORS):
        _tensor(tensor, facts)
    for sparse in _messages(data, *_ATTRIBUTE_SPARSE):
        _sparse(sparse, facts)
    for graph in _messages(data, *_ATTRIBUTE_GRAPHS):
        _graph(graph, facts, depth + 1)


def _node(data: memoryview, facts: GraphFacts, depth: int) -> None:
    facts.operators.update(map(_text, _messages(data, _NODE_OP)))
    facts.domains.update(map(_text, _messages(data, _NODE_DOMAIN)))
    for attribute in _messages(data, _NODE_ATTRIBUTE):
        _attribute(attribute, facts, depth)


def _graph(data: memoryview, facts: GraphFacts, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"graphs nested deeper than {MAX_DEPTH}")
    for node in _messages(data, _GRAPH_NODE):
        _node(node, facts, depth)
    for tensor in _messages(data, _GRAPH_INITIALIZER):
        _tensor(tensor, facts)
    for sparse in _messages(data, _GRAPH_SPARSE):
        _sparse(sparse, facts)


def _opset(data: memoryview, facts: GraphFacts) -> None:
    """Of a field that comes twice all values count: which one does is the reader's secret."""
    names = set(map(_text, _messages(data, _OPSET_DOMAIN))) or {""}
    facts.domains.update(names)
    if names & OWN_DOMAINS:
        facts.opset = max(facts.opset, *_numbers(data, _OPSET_VERSION), 0)


def facts_of(data: bytes) -> GraphFacts:
    """Read an ONNX model's bytes. Raises ValueError when they are not one, or could be read in two ways."""
    facts, model = GraphFacts(), memoryview(data)
    facts.functions = sum(1 for _ in _messages(model, _MODEL_FUNCTIONS)) > 0
    for opset in _messages(model, _MODEL_OPSETS):
        _opset(opset, facts)
    graphs = list(_messages(model, _MODEL_GRAPH))
    if len(graphs) != 1:
        raise ValueError(f"{len(graphs)} graphs, expected 1")
    training = (graph for info in _messages(model, _MODEL_TRAINING) for graph in _messages(info, *_TRAINING_GRAPHS))
    for graph in (*graphs, *training):
        _graph(graph, facts, 0)
    return facts


def refuse_foreign(data: bytes, name: str) -> None:
    """Raise BundleUnsupported unless the model is self-contained and of standard operators only."""
    try:
        facts = facts_of(data)
    except (ValueError, UnicodeDecodeError) as error:
        raise BundleUnsupported(f"{name}: not an ONNX model: {error}") from error
    if facts.external_data:
        raise BundleUnsupported(f"{name}: keeps tensors in other files", hint="export it with all data inside")
    foreign = sorted(facts.domains - OWN_DOMAINS)
    if foreign:
        raise BundleUnsupported(f"{name}: operators of foreign domains {foreign}; only ai.onnx is allowed")
    if facts.functions:
        raise BundleUnsupported(f"{name}: defines its own functions", hint="inline them when exporting")
    if facts.opset > OPSET:
        raise BundleUnsupported(f"{name}: opset {facts.opset}, at most {OPSET} is supported")
