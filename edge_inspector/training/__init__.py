"""Offline: pictures of good parts in, a signed bundle out; and how good it is on labelled pictures."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_inspector.training.evaluation import evaluate
    from edge_inspector.training.orders import train

_HOMES = {"evaluate": "evaluation", "train": "orders"}
__all__ = ["evaluate", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edge_inspector.training' has no attribute {name!r}")
    return getattr(import_module(f"edge_inspector.training.{_HOMES[name]}"), name)
