"""Half-precision graphs for strongly typed networks: what networks compute in half, what measures in full.

Distances, sums, normalisations and scores lose their meaning at half precision (a distance is a small difference of large
squares), so only the layers between them are converted. onnxruntime's and onnxconverter-common's converters round values at
half precision between layers that were to stay in full (seen in 1.32 and 1.16): hence these few lines.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from edge_inspector.errors import EngineError
from edge_inspector.graphs import facts_of
from edge_inspector.installation import install

Precision = Literal["fp32", "fp16", "int8"]
_NETWORK = {"Add", "AveragePool", "Clip", "Concat", "Conv", "ConvTranspose", "Gemm", "LeakyRelu", "Relu", "Resize", "Tanh"}
_MEASURES = {"attention", "bank", "gaussian", "exemplars"}
"""Parts of a graph that stay in full: distances to good parts, and backbones that attend, whose sums outgrow half precision;
so does what stands in no part, at the top."""


def precision_of(graph: bytes) -> Precision:
    """What a graph is: int8 when it was quantised in training, else full; a halved one is no bundle's."""
    return "int8" if "QuantizeLinear" in facts_of(graph).operators else "fp32"


def chosen(network: bytes, wanted: Literal["auto", Precision], name: str) -> Precision:
    """The precision a bundle's graph is to run at. Raises EngineError for one that it cannot have."""
    if precision_of(network) == "int8":
        if wanted in ("fp32", "fp16"):
            raise EngineError(f"bundle {name} was trained as int8, {wanted} is wanted", hint="leave the precision at auto")
        return "int8"
    if wanted == "int8":
        raise EngineError(f"bundle {name} was not trained as int8", hint="train it with --int8: it is fitted to its rounding")
    return "fp16" if wanted == "auto" else wanted


def converted(network: bytes, precision: Precision) -> bytes:
    """The ONNX graph to compile: strongly typed, so that the types in it are the precision. Raises EngineError."""
    return halved(network) if precision == "fp16" else network


def halved(network: bytes) -> bytes:
    """The same ONNX graph with its network layers at half precision; inputs and outputs keep their types.

    Raises EngineError without the package onnx.
    """
    try:
        import onnx  # noqa: PLC0415 - only devices that build engines have it
    except ImportError as error:
        raise EngineError(f"half precision needs a package: {error}", hint=install("tensorrt")) from error
    model = onnx.load_from_string(network)
    _Halver(onnx, model.graph).convert()
    onnx.checker.check_model(model, full_check=True)
    made: bytes = model.SerializeToString()
    return made


class _Halver:
    """Rewrites one graph in place."""

    def __init__(self, onnx: Any, graph: Any) -> None:
        self.onnx, self.graph = onnx, graph
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        # Bundles store what is exact at half precision so, with a cast behind it.
        self.constants |= {
            n.output[0]: self.constants[n.input[0]] for n in graph.node if _widens(n) and n.input[0] in self.constants
        }
        self.constants |= {n.output[0]: n.attribute[0].t for n in graph.node if n.op_type == "Constant"}
        self.half: set[str] = set()
        """Values that are at half precision."""
        self.nodes: list[Any] = []
        self.made: set[str] = set()

    def convert(self) -> None:
        for node in list(self.graph.node):
            halves = _halves(node)
            for at, name in enumerate(node.input):
                if name and halves and not (node.op_type == "Resize" and at):  # sizes stay numbers of their own
                    node.input[at] = self._constant(name) if name in self.constants else self._as(name, half=True)
                elif name in self.half:
                    node.input[at] = self._as(name, half=False)
            if halves:
                self.half.update(node.output)
            self.nodes.append(node)
        del self.graph.value_info[:]  # it names the old types
        used = {name for node in self.nodes for name in node.input}
        _keep(self.graph.node, [n for n in self.nodes if not (n.op_type == "Constant" or _widens(n)) or n.output[0] in used])
        _keep(self.graph.initializer, [tensor for tensor in self.graph.initializer if tensor.name in used])

    def _constant(self, name: str) -> str:
        """A weight at half precision: stored so, or a copy."""
        stored = self.constants[name]
        if stored.name and stored.data_type == self.onnx.TensorProto.FLOAT16:
            return str(stored.name)
        copy = f"{name}:half"
        if copy not in self.made:
            self.made.add(copy)
            value = self.onnx.numpy_helper.to_array(stored).astype(np.float16)
            self.graph.initializer.append(self.onnx.numpy_helper.from_array(value, copy))
        return copy

    def _as(self, name: str, *, half: bool) -> str:
        """A value at the wanted precision, cast where it is at the other."""
        if (name in self.half) == half:
            return name
        cast = f"{name}:{'half' if half else 'full'}"
        if cast not in self.made:
            self.made.add(cast)
            kind = self.onnx.TensorProto.FLOAT16 if half else self.onnx.TensorProto.FLOAT
            self.nodes.append(self.onnx.helper.make_node("Cast", [name], [cast], name=cast, to=kind))
        return cast


def _keep(field: Any, kept: list[Any]) -> None:
    """Replace what a repeated field of a message holds."""
    del field[:]
    field.extend(kept)


def _widens(node: Any) -> bool:
    return bool(node.op_type == "Cast" and node.name.endswith(":cast"))


def _halves(node: Any) -> bool:
    """By the node's place, as PyTorch's exporter names it: /part/.../operator."""
    place = node.name.split("/")[1:-1]
    return node.op_type in _NETWORK and bool(place) and place[0] not in _MEASURES
