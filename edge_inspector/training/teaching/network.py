"""A bundle's network, opened for teaching: what it computes on the way, and the same graph with other contents."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edge_inspector.errors import TrainingError
from edge_inspector.training.normals import Floats

INNER = ("features", "maps", "fused")
"""Tensors of the graph that lie between the backbone's maps (`tap0`, `tap1`, ...) and the score: what the terms see
[N, C, h, w], the terms' smoothed maps [N, T, h, w], and their weighted sum [N, 1, h, w]."""
_BANK = ("whitening", "shift", "kernel", "level")
_TAP = re.compile(r"tap\d+")
_LESSON = "lesson/"
"""Names of what teaching puts into a graph begin so."""
BATCH = 8
"""Tiles that are computed together."""


@dataclass(frozen=True)
class Term:
    """A taught term: relu(blur(sum over channels of weight x features + inner) + outer) is added to the weighted sum."""

    weight: Floats
    """[C, h, w]"""
    inner: Floats
    """[h, w]"""
    outer: float


@dataclass(frozen=True)
class Residuals:
    """What a graph holds of good parts; None: it does not use that term."""

    mean: Floats | None
    """[C, h, w]"""
    whitening: Floats | None
    """[neighbourhoods, C, C]"""
    bank: dict[str, Floats] | None
    """As `Prototypes.convolutions` gives it."""


class Network:
    """The graph of feature-anogan, as `export` writes it."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model

    @staticmethod
    def of(data: bytes, name: str) -> Network:
        """`data`: of network.onnx, verified. What an earlier lesson put in is left out. Raises TrainingError."""
        model = onnx.load_from_string(data)
        known = {output for node in model.graph.node for output in node.output}
        if not known.issuperset({*INNER, "tap0"}):
            raise TrainingError(
                f"{name}: its network cannot be taught",
                hint="train it again with this release; only feature-anogan can be taught, not fanogan",
            )
        _without_lesson(model.graph)
        return Network(model)

    def between(self, inputs: Sequence[str], outputs: Sequence[str]) -> Callable[..., list[Floats]]:
        """A function of some of its tensors that gives others, for a few tiles at a time."""
        part = onnx.utils.Extractor(self.model).extract_model(list(inputs), list(outputs))
        session = onnxruntime.InferenceSession(part.SerializeToString(), providers=["CPUExecutionProvider"])

        def compute(*given: NDArray[np.generic]) -> list[Floats]:
            found: list[Floats] = session.run(list(outputs), dict(zip(inputs, given, strict=True)))
            return found

        return compute

    @property
    def taps(self) -> list[str]:
        """The backbone's maps, the finest first."""
        names = [name for node in self.model.graph.node for name in node.output if _TAP.fullmatch(name)]
        return sorted(names, key=lambda name: int(name.removeprefix("tap")))

    def of_stored(self, taps: Sequence[NDArray[np.float16]], output: str) -> Iterator[tuple[slice, Floats]]:
        """One of its tensors by a backbone's stored maps: rows and what they give, a batch after the other."""
        compute = self.between(self.taps, [output])
        for start in range(0, len(taps[0]), BATCH):
            part = slice(start, start + BATCH)
            yield part, compute(*(tap[part].astype(np.float32) for tap in taps))[0]

    @property
    def kernel(self) -> Floats:
        """The blur of maps, [k, k]."""
        whole: Floats = self._constant("kernel")[0, 0]
        return whole

    @property
    def depth(self) -> int:
        """How many channels the features have."""
        return int(self._constant("heads.mean").size)

    @property
    def unit(self) -> float:
        """What scores are divided by."""
        return float(self._constant("unit"))

    @property
    def residuals(self) -> Residuals:
        """What it holds of good parts."""
        terms = {node.name.rsplit("/", 1)[0].rsplit("/", 1)[-1] for node in self.model.graph.node}
        gaussian, bank = "gaussian" in terms, "bank" in terms
        return Residuals(
            self._constant("heads.gaussian.mean")[0] if gaussian else None,
            self._constant(self.whitening()) if gaussian else None,
            {name: self._constant(f"heads.bank.{name}") for name in _BANK} if bank else None,
        )

    def with_residuals(self, residuals: Residuals) -> Network:
        """The same network, of other good parts."""
        changed = self._copy()
        if residuals.mean is not None and residuals.whitening is not None:
            changed.replace("heads.gaussian.mean", residuals.mean[None])
            changed.replace(changed.whitening(), residuals.whitening)
        for name, value in (residuals.bank or {}).items():
            changed.replace(f"heads.bank.{name}", value)
        return changed

    def with_usual(self, mean: Floats, gain: Floats) -> Network:
        """The same network, with other means and gains of its maps, [T, h, w] each."""
        changed = self._copy()
        changed.replace("mean", mean)
        changed.replace("gain", gain)
        return changed

    def written(self, term: Term | None) -> bytes:
        """The bytes of network.onnx, with a taught term or without."""
        changed = self._copy()
        if term is not None:
            _put_lesson(changed.model.graph, term, changed.named("kernel").name)
        onnx.checker.check_model(changed.model)
        data: bytes = changed.model.SerializeToString()
        return data

    def _copy(self) -> Network:
        changed = onnx.ModelProto()
        changed.CopyFrom(self.model)
        return Network(changed)

    def named(self, name: str) -> onnx.TensorProto:
        """The constant whose name in the graph's module is this: an exporter puts the module's own before it."""
        for tensor in self.model.graph.initializer:
            whole = tensor.name.removesuffix(":half")
            if whole == name or whole.split("graph.", 1)[-1] == name:
                found: onnx.TensorProto = tensor
                return found
        raise TrainingError(f"the network has no {name}", hint="train it again with this release")

    def whitening(self) -> str:
        """The name of what the exporter gave a number instead."""
        node = next(node for node in self.model.graph.node if node.name.endswith("gaussian/MatMul"))
        return str(node.input[1])

    def _constant(self, name: str) -> Floats:
        return numpy_helper.to_array(self.named(name)).astype(np.float32)

    def replace(self, name: str, value: Floats) -> None:
        """With a value of the same shape, or another number of rows; in the precision that it has."""
        tensor = self.named(name)
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        tensor.CopyFrom(numpy_helper.from_array(value.astype(dtype), tensor.name))


def _without_lesson(graph: onnx.GraphProto) -> None:
    for node in [node for node in graph.node if node.name.startswith(_LESSON)]:
        graph.node.remove(node)
    for tensor in [tensor for tensor in graph.initializer if tensor.name.startswith(_LESSON)]:
        graph.initializer.remove(tensor)
    _feed(graph, f"{_LESSON}fused", "fused")


def _feed(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Let every node that takes one tensor take another."""
    for node in graph.node:
        for number, name in enumerate(node.input):
            if name == old:
                node.input[number] = new


def _put_lesson(graph: onnx.GraphProto, term: Term, kernel: str) -> None:
    def constant(name: str, value: NDArray[np.generic]) -> str:
        graph.initializer.append(numpy_helper.from_array(value, _LESSON + name))
        return _LESSON + name

    weight = constant("weight", term.weight[None].astype(np.float16))
    inner = constant("inner", term.inner[None, None].astype(np.float32))
    outer = constant("outer", np.array(term.outer, np.float32))
    channels = constant("channels", np.array([1], np.int64))
    _feed(graph, "fused", f"{_LESSON}fused")
    steps: tuple[tuple[str, list[str], str, dict[str, Any]], ...] = (
        ("Cast", [weight], "whole", {"to": onnx.TensorProto.FLOAT}),
        ("Mul", ["features", f"{_LESSON}whole"], "product", {}),
        ("ReduceSum", [f"{_LESSON}product", channels], "sum", {"keepdims": 1}),
        ("Add", [f"{_LESSON}sum", inner], "centred", {}),
        ("Conv", [f"{_LESSON}centred", kernel], "blurred", {"pads": [_reach(graph, kernel)] * 4}),
        ("Add", [f"{_LESSON}blurred", outer], "above", {}),
        ("Relu", [f"{_LESSON}above"], "taught", {}),
        ("Add", ["fused", f"{_LESSON}taught"], "fused", {}),
    )
    nodes = [helper.make_node(kind, given, [_LESSON + made], name=_LESSON + made, **more) for kind, given, made, more in steps]
    at = 1 + next(number for number, node in enumerate(graph.node) if "fused" in node.output)
    before, after = list(graph.node[:at]), list(graph.node[at:])
    del graph.node[:]
    graph.node.extend([*before, *nodes, *after])


def _reach(graph: onnx.GraphProto, kernel: str) -> int:
    return int(next(tensor.dims[-1] // 2 for tensor in graph.initializer if tensor.name == kernel))
