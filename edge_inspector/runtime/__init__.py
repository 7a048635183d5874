"""Running a bundle's network: one protocol, one engine per way to run it."""

from edge_inspector.runtime.engine import Engine, Outputs, judge_samples
from edge_inspector.runtime.onnx import OnnxEngine

__all__ = ["Engine", "OnnxEngine", "Outputs", "judge_samples"]
