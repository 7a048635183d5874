"""Running a bundle's network: one protocol, one engine per way to run it."""

from edge_inspector.runtime.build import Workshop
from edge_inspector.runtime.engine import Engine, Outputs, judge_sample, judge_samples, picture_of
from edge_inspector.runtime.onnx import OnnxEngine
from edge_inspector.runtime.opening import opened
from edge_inspector.runtime.pool import Pool
from edge_inspector.runtime.tensorrt import Tell

__all__ = [
    "Engine",
    "OnnxEngine",
    "Outputs",
    "Pool",
    "Tell",
    "Workshop",
    "judge_sample",
    "judge_samples",
    "opened",
    "picture_of",
]
