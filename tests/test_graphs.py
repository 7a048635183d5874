"""What the onnx package reads of a file, our reader sees or refuses: both read the same odd bytes."""

from __future__ import annotations

import os
from random import Random
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

pytest.importorskip("onnx", reason='onnx is not installed: pip install "edge-inspector[tensorrt]"')

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from edge_inspector import graphs
from edge_inspector.errors import BundleUnsupported
from edge_inspector.graphs import GraphFacts
from tests.tiny import graph

EXAMPLES = int(os.environ.get("EDGE_INSPECTOR_EXAMPLES", "1500"))
SEEDS = st.integers(0, 2**64 - 1)

MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 8: "opset", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {4: "word", 5: "attribute", 7: "word"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry", 14: "place"},
    "opset": {1: "word", 2: "number"},
    "entry": {1: "word", 2: "word"},
    "function": {1: "word"},
}
"""onnx.proto, as far as a bundle may be refused for it."""
WORDS = ("", "ai.onnx", "Add", "evil", "com.microsoft", "ai.onnx.ml")
NUMBERS = (0, 1, 2, 17, 18, 1 << 31, 1 << 32, (1 << 32) + 1, (1 << 63) + 17, (1 << 64) - 1)


def varint(value: int, more: int = 0) -> bytes:
    """`more`: bytes that say nothing."""
    digits = [value & 0x7F]
    while value := value >> 7:
        digits.append(value & 0x7F)
    digits += [0] * more
    return bytes([*(digit | 0x80 for digit in digits[:-1]), digits[-1]])


class Maker:
    """Makes the bytes of a model; `oddness`: the share of fields that no honest writer makes."""

    def __init__(self, seed: int, oddness: float) -> None:
        self.random, self.oddness = Random(seed), oddness

    def model(self) -> bytes:
        graph = self.field(7, self.message("graph", 1))
        parts = [graph, *(self.field(n, self.message(MESSAGES["model"][n], 1)) for n in self.some((8, 8, 20, 25, 7), 2))]
        self.random.shuffle(parts)
        data = b"".join(parts)
        if self.is_odd():
            at = self.random.randrange(len(data))
            data = data[:at] + self.random.randbytes(self.random.randrange(4)) + data[at + self.random.randrange(4) :]
        return data

    def is_odd(self) -> bool:
        return self.random.random() < self.oddness

    def some(self, numbers: tuple[int, ...], most: int) -> list[int]:
        return self.random.choices(numbers, k=self.random.randint(0, most))

    def message(self, kind: str, depth: int) -> bytes:
        known = MESSAGES[kind]
        numbers = self.some(tuple(known), 4 if depth < 5 else 1)
        return b"".join(self.field(number, self.value(known[number], depth + 1)) for number in numbers)

    def value(self, kind: str, depth: int) -> int | bytes:
        if kind in {"number", "place"}:
            return self.random.choice(NUMBERS if self.is_odd() else (0, 1) if kind == "place" else (1, 17, 18))
        return self.random.choice(WORDS).encode() if kind == "word" else self.message(kind, depth)

    def field(self, number: int, content: int | bytes) -> bytes:
        kind, more, high, size_more = (0 if isinstance(content, int) else 2), 0, 0, 0
        if self.is_odd():
            more, size_more = (self.random.choice((0, 0, 1, 2, 5, 6)) for _ in range(2))
            high = self.random.choice((0, 0, 0, *(1 << bit for bit in (32, 33, 34, 35, 63))))
            kind = self.random.choice((kind, kind, kind, kind, 0, 1, 2, 3, 4, 5))
        tag = varint(high | number << 3 | kind, more)
        if kind == 0:
            return tag + varint(content if isinstance(content, int) else len(content), size_more)
        data = varint(content) if isinstance(content, int) else content
        if kind == 2:
            return tag + varint(len(data), size_more) + data
        if kind == 3:  # a group, and its end
            return tag + data + varint(number << 3 | 4)
        return tag + data[:8].ljust({1: 8, 5: 4}.get(kind, 0), b"\0")


def oracle(data: bytes) -> GraphFacts | None:
    """What the onnx package makes of the same bytes; None: it refuses them."""
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        return None
    facts = GraphFacts(functions=bool(model.functions))
    for opset in model.opset_import:
        facts.domains.add(opset.domain)
        if opset.domain in graphs.OWN_DOMAINS:
            facts.opset = max(facts.opset, opset.version)
    walk(model.graph, facts)
    for info in model.training_info:
        walk(info.initialization, facts)
        walk(info.algorithm, facts)
    return facts


def walk(one: Any, facts: GraphFacts) -> None:
    """Add what any message holds, by the package's own description of it."""
    if isinstance(one, onnx.TensorProto) and (one.external_data or one.data_location != onnx.TensorProto.DEFAULT):
        facts.external_data = True
    if isinstance(one, onnx.NodeProto):
        facts.operators |= {one.op_type} if one.HasField("op_type") else set()
        facts.domains |= {one.domain} if one.HasField("domain") else set()
    for description, held in one.ListFields():
        if description.message_type is not None:
            for inner in [held] if hasattr(held, "ListFields") else held:
                walk(inner, facts)


@given(seed=SEEDS, oddness=st.sampled_from((0.02, 0.1, 0.5)))
@settings(max_examples=EXAMPLES, deadline=None)
def test_whatever_the_onnx_package_reads_of_odd_bytes_our_reader_sees_or_refuses(seed: int, oddness: float) -> None:
    data = Maker(seed, oddness).model()
    theirs = oracle(data)
    try:
        ours = graphs.facts_of(data)
    except ValueError:
        event("refused by both" if theirs is None else "refused by ours alone")
        return
    event("read by both" if theirs is not None else "read by ours alone")
    if theirs is not None:
        assert ours.operators >= theirs.operators
        assert ours.domains >= theirs.domains
        assert ours.opset >= theirs.opset
        assert ours.external_data >= theirs.external_data
        assert ours.functions >= theirs.functions


@given(seed=SEEDS)
@settings(max_examples=EXAMPLES // 3, deadline=None)
def test_what_an_honest_writer_makes_is_read_as_the_onnx_package_reads_it(seed: int) -> None:
    data = onnx.ModelProto.FromString(Maker(seed, 0.0).model()).SerializeToString()
    theirs = oracle(data)
    assert theirs is not None
    ours = graphs.facts_of(data)
    assert (ours.operators, ours.external_data, ours.functions) == (theirs.operators, theirs.external_data, theirs.functions)
    assert ours.domains >= theirs.domains
    assert ours.opset == theirs.opset


def foreign_node(tag: bytes) -> bytes:
    """The tiny network with one more node, of a foreign domain, under a tag of the graph's field 1."""
    model = onnx.load_from_string(graph())
    node = onnx.helper.make_node("Evil", ["image"], ["evil"], domain="com.example").SerializeToString()
    inner = model.graph.SerializeToString() + tag + varint(len(node)) + node
    model.ClearField("graph")
    data: bytes = model.SerializeToString() + varint(7 << 3 | 2) + varint(len(inner)) + inner
    return data


@pytest.mark.parametrize("high", [0, 1 << 32, 1 << 33, 1 << 34, 1 << 35, 1 << 42, 1 << 63])
@pytest.mark.parametrize("more", [0, 1, 3])
def test_a_node_under_a_tag_of_more_than_32_bits_does_not_slip_through(high: int, more: int) -> None:
    with pytest.raises(BundleUnsupported, match=r"com\.example|bits|too long"):
        graphs.refuse_foreign(foreign_node(varint(high | 1 << 3 | 2, more)), "x")


@pytest.mark.parametrize(
    "opset",
    [
        b"\x0a\x04evil\x08\x00\x10\x11",  # a domain, then a number under the same tag, which is none
        b"\x10\x63\x15aaaa",  # version 99, then four bytes under the same tag
        b"\x10\x63\x10\x11",  # version 99, then 17
        b"\x0a\x07ai.onnx\x10\x63",
    ],
)
def test_a_value_that_comes_twice_hides_none(opset: bytes) -> None:
    data = graph() + varint(8 << 3 | 2) + varint(len(opset)) + opset
    with pytest.raises(BundleUnsupported, match="evil|opset 99"):
        graphs.refuse_foreign(data, "x")
