"""INT8 backbones: quantised first, so that everything after is fitted to what will be computed on the line.

Quantising a finished network costs several points of AUROC; heads fitted to quantised features cost next to none.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

from edge_inspector.graphs import OPSET


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Pictures, one at a time."""

    def __init__(self, images: NDArray[np.uint8]) -> None:
        self.left: Iterator[NDArray[np.uint8]] = iter(images)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """The next picture as the backbone takes it, or None."""
        image = next(self.left, None)
        return None if image is None else {"pixels": image.transpose(2, 0, 1)[None].astype(np.float32)}


def quantise(network: Path, images: NDArray[np.uint8], out: Path) -> None:
    """Write an INT8 (Q/DQ, per channel, symmetric) version of a backbone; ranges come from pictures uint8 [N, H, W, 3].

    As TensorRT takes it: convolutions only, and biases stay floats (it refuses 32-bit ones).
    """
    quantize_static(
        str(network), str(out), _Reader(images), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QInt8, weight_type=QuantType.QInt8, calibrate_method=CalibrationMethod.MinMax,
        op_types_to_quantize=["Conv"],
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
    )  # fmt: skip


def joined(files: dict[str, Path], out: Path) -> None:
    """Write ONNX files as one: outputs feed the inputs of the next that have their names.

    A file's key is the part of the graph that it becomes: the first word of its nodes' names, unless it is empty.
    """
    (place, first), *others = files.items()
    whole = _plain(first, place, "0/")
    for number, (place, path) in enumerate(others, 1):
        following = _plain(path, place, f"{number}/")
        fed = {value.name for value in following.graph.input} & {value.name for value in whole.graph.output}
        keep = [value.name for value in whole.graph.output if value.name not in fed]
        whole = onnx.compose.merge_models(
            whole, following, io_map=[(name, name) for name in sorted(fed)],
            outputs=keep + [value.name for value in following.graph.output],
        )  # fmt: skip
    onnx.checker.check_model(whole)
    onnx.save(whole, str(out))


def _plain(path: Path, place: str, prefix: str) -> onnx.ModelProto:
    """A model whose inner names cannot meet others', with one operator set: the quantiser lists some that it does not use."""
    model = onnx.load(str(path))
    model = onnx.compose.add_prefix(model, prefix, rename_nodes=False, rename_inputs=False, rename_outputs=False)
    for node in model.graph.node if place else ():
        node.name = f"/{place}/{node.name.lstrip('/') or node.output[0]}"
    model.ir_version = 8
    del model.opset_import[:]
    model.opset_import.append(onnx.helper.make_opsetid("", OPSET))
    return model
