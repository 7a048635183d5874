"""What judging a tile costs: python -m tests.benchmarks.cost [--sides 256 384 512] [--backbones lite0 lite2]

Graphs of the default shape with nothing in them, as `train` exports them: multiply-adds, size, and the median time of ONNX
Runtime on one and two threads. Times are of this machine, and only mean something beside each other.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from edge_inspector.training import export
from edge_inspector.training.networks import feature_anogan as networks
from edge_inspector.training.networks.backbone_file import source


def graph(backbone: str, side: int, prototypes: int, folder: Path) -> networks.FeatureAnoganGraph:
    """A whole network of side x side px."""
    found = source(backbone)
    taps = found.taps
    h, w = taps.places(side, side)
    heads, usual = networks.empty_heads(taps.depth, h, w, prototypes), torch.ones(len(networks.TERMS), h, w)
    exemplars = networks.Exemplars(torch.zeros(24, taps.depth * h * w // 16), torch.zeros(24, side // 2, side // 2, 3))
    return networks.FeatureAnoganGraph(found.opened(folder), heads, exemplars, networks.TERMS, usual, usual).eval()


def median_ms(path: Path, side: int, threads: int, rounds: int) -> float:
    """Of a tile, by the clock."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {"image": np.zeros((1, side, side, 3), np.uint8), "valid": np.ones((1, side, side), np.uint8)}
    took = []
    for _ in range(rounds + 2):
        began = time.perf_counter()
        session.run(None, feed)
        took.append(time.perf_counter() - began)
    return 1e3 * float(np.median(took[2:]))


def main() -> None:
    """One row for each backbone and side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 384, 512])
    parser.add_argument("--backbones", nargs="+", default=["lite0", "lite2"])
    parser.add_argument("--prototypes", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args()
    print("| backbone | input | GMAC | MB | ms, one thread | two threads |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        for backbone in given.backbones:
            for side in given.sides:
                example = np.zeros((1, side, side, 3), np.uint8)
                export.export(graph(backbone, side, given.prototypes, Path(folder)), path, example)
                cost = export.cost(path, example)
                one, two = (median_ms(path, side, threads, given.rounds) for threads in (1, 2))
                print(
                    f"| {backbone} | {side} | {cost['gmac']:.2f} | {cost['megabytes']:.0f} | {one:.0f} | {two:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
