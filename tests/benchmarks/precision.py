"""What half precision changes: python -m tests.benchmarks.precision BUNDLE FOLDER [--trust TRUST]

Every picture under FOLDER is judged by ONNX Runtime with the bundle's graph and with the half-precision graph that TensorRT would
compile. Told: the largest difference of a score in thresholds, flips of verdicts, and the same near the threshold (the gate).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from edge_inspector import pictures
from edge_inspector.bundles import NETWORK, open_bundle
from edge_inspector.runtime import OnnxEngine, parity
from edge_inspector.runtime.engine import picture_score
from edge_inspector.runtime.precision import chosen, converted


def main() -> None:
    """Judge, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trust", type=Path, default=Path("engines/trust"))
    given = parser.parse_args()
    bundle = open_bundle(given.bundle, given.trust)
    graph, threshold = bundle.read(NETWORK), bundle.manifest.threshold
    precision = chosen(graph, "auto", bundle.manifest.name)
    paths = sorted(p for p in given.folder.rglob("*") if pictures.is_picture(p))
    with OnnxEngine(bundle) as full, OnnxEngine(bundle, graph=converted(graph, precision)) as other:
        scores = np.array([[picture_score(engine, pictures.read(path)) for engine in (full, other)] for path in paths])
        near = parity.near_threshold(full, parity.MARGIN[precision], lambda done: None)
        found = parity.compared(other, near)
    off = np.abs(scores[:, 1] - scores[:, 0]) / threshold
    flips = int(((scores > threshold)[:, 0] != (scores > threshold)[:, 1]).sum())
    print(f"{bundle.manifest.name}, {precision}: {len(paths)} pictures, largest difference {off.max():.3%} of the threshold,"
          f" {flips} verdicts flip; {found.frames} frames near it: {found.largest:.3%},"
          f" maps {found.largest_map:.3%}, {found.flips} flip")  # fmt: skip


if __name__ == "__main__":
    main()
