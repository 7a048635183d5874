"""Any ONNX file that gives feature maps, as a backbone: checked, and brought into the one form that is used.

Its input is float [N, 3, H, W], RGB in 0..255: what else its network wants of pixels is part of the file. Its outputs are
feature maps [N, C, h, w] and nothing else. README tells how to export one from torchvision, timm or a vision transformer.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edge_inspector.bundles import BackboneUsed
from edge_inspector.errors import BundleUnsupported, TrainingError
from edge_inspector.graphs import OPSET, OWN_DOMAINS, refuse_foreign
from edge_inspector.training.networks.backbone import LITES, Backbone, OnnxBackbone, Source, Taps

MOST_CHANNELS = 384
"""Of more, so many are taken at random, as PaDiM does (Defard et al. 2021, section III.B): a covariance grows with their
square, and there is one for each neighbourhood."""
_MOST_BYTES = 400 << 20
_STRIDES = range(4, 33)
_SIDE = 224
"""Where the file leaves it open, it is tried with this many pixels: what the published ones were trained with."""
_ALIKE = 1e-3
_HINT = "README, Train, tells how to export a backbone"


def source(name: str) -> Source:
    """A packaged backbone by its name, or an ONNX file by its path. Raises TrainingError."""
    if name in LITES:
        return LITES[name]
    path = Path(name)
    if not path.is_file():
        raise TrainingError(
            f"backbone {name}: neither {' nor '.join(LITES)}, and there is no such file",
            hint="name one of these, or an ONNX file that gives feature maps",
        )
    return _read(path)


@dataclass(frozen=True)
class FileSource:
    """A file's bytes in the form that is used."""

    used: BackboneUsed
    taps: Taps
    data: bytes
    of: int
    """Channels that the file has; of these the taps have some."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """What of it is used."""
        if self.of == self.taps.depth:
            return ()
        return (f"{self.taps.depth} of the backbone's {self.of} channels are used, taken at random: more would only cost",)

    def opened(self, folder: Path) -> Backbone:
        """As ONNX Runtime computes it."""
        path = folder / f"backbone-{self.used.sha256[:12]}.onnx"
        path.write_bytes(self.data)
        return OnnxBackbone(path, self.taps)


@lru_cache(maxsize=1)
def _read(path: Path) -> FileSource:
    if path.stat().st_size > _MOST_BYTES:
        raise _refused(path, f"{path.stat().st_size / 1e6:.0f} MB; at most {_MOST_BYTES / 1e6:.0f} MB are taken")
    content = path.read_bytes()
    model = _standard(path, content)
    form = _Form(path, model)
    told = {entry.key.lower(): entry.value for entry in model.metadata_props}
    licence = told.get("licence") or told.get("license") or "not told by the file"
    used = BackboneUsed(name=path.name, sha256=hashlib.sha256(content).hexdigest(), licence=licence)
    return FileSource(used, form.taps, form.data, form.of)


def _refused(path: Path, why: str, hint: str = _HINT) -> TrainingError:
    return TrainingError(f"backbone {path}: {why}", hint=hint)


def _standard(path: Path, content: bytes) -> Any:
    """The model with our operator set. Raises TrainingError."""
    try:
        model = onnx.load_from_string(content)
    except Exception as error:  # protobuf's kinds are no part of its interface
        raise _refused(path, f"not an ONNX model that can be read: {_first_line(error)}") from error
    try:
        model = _at_opset(path, model)
        refuse_foreign(model.SerializeToString(), "its graph")
        onnx.checker.check_model(model)
    except BundleUnsupported as error:
        raise _refused(path, error.message, error.hint or _HINT) from error
    except (onnx.checker.ValidationError, ValueError) as error:
        raise _refused(path, _first_line(error)) from error
    return model


def _at_opset(path: Path, model: Any) -> Any:
    """The model with our operator set, where it is of standard operators alone."""
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    if not opsets or set(opsets) - OWN_DOMAINS or set(opsets.values()) == {OPSET}:
        return model
    try:
        return onnx.version_converter.convert_version(model, OPSET)
    except Exception as error:  # the converter has one kind for everything
        raise _refused(path, f"its operators cannot be brought to opset {OPSET}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class _Form:
    """A model, tried, with the names that are used, weights at half precision, and no more channels than are used."""

    def __init__(self, path: Path, model: Any) -> None:
        self.path, self.model = path, model
        self._name_input()
        outputs = [output.name for output in model.graph.output]
        self.of, self.taps = 0, Taps((), ())
        height, width = self._size
        one = self._run(height, width, 1)
        two = self._run(height, width, 2)
        for name, a, b in zip(outputs, one, two, strict=True):
            self._check(name, a, b)
        order = sorted(range(len(one)), key=lambda number: -one[number].shape[2])
        strides = tuple(self._stride(outputs[number], one[number]) for number in order)
        if any(stride % strides[0] for stride in strides):
            raise _refused(path, f"its maps have strides {strides}: each must be a multiple of the finest")
        channels = [one[number].shape[1] for number in order]
        self.of = sum(channels)
        taken = np.sort(np.random.default_rng(0).permutation(self.of)[:MOST_CHANNELS])
        split = np.split(taken, np.searchsorted(taken, np.cumsum(channels)[:-1]))
        kept = [(number, some - start) for number, some, start in zip(order, split, np.cumsum([0, *channels]), strict=False)]
        self.taps = Taps(tuple(len(some) for _, some in kept), strides, self._fixed)
        self._round()
        self._put_taps([(outputs[number], some) for number, some in kept])

    @cached_property
    def data(self) -> bytes:
        """The bytes of the file that is used."""
        whole: bytes = self.model.SerializeToString()
        return whole

    @cached_property
    def _fixed(self) -> tuple[int, int] | None:
        height, width = (d.dim_value for d in self._dims[2:])
        if height > 0 and width > 0:
            return height, width
        return None

    @property
    def _size(self) -> tuple[int, int]:
        return self._fixed or (_SIDE, _SIDE)

    @property
    def _dims(self) -> Any:
        return self.model.graph.input[0].type.tensor_type.shape.dim

    def _name_input(self) -> None:
        graph = self.model.graph
        held = {tensor.name for tensor in graph.initializer}
        given = [value for value in graph.input if value.name not in held]
        kinds = [value.type.tensor_type for value in given]
        if len(given) != 1 or kinds[0].elem_type != onnx.TensorProto.FLOAT or len(kinds[0].shape.dim) != 4:
            found = ", ".join(value.name for value in given) or "none"
            raise _refused(self.path, f"its inputs are {found}: one float [N, 3, H, W] is taken")
        channels = kinds[0].shape.dim[1]
        if channels.HasField("dim_value") and channels.dim_value != 3:
            raise _refused(self.path, f"its input has {channels.dim_value} channels: RGB pictures have 3")
        del graph.input[:]
        graph.input.append(given[0])
        del graph.value_info[:]  # it may name sizes that no longer hold
        self._dims[0].dim_param = "N"
        old, graph.input[0].name = given[0].name, "pixels"
        for node in graph.node:
            for number, name in enumerate(node.input):
                if name == old:
                    node.input[number] = "pixels"
        for output in graph.output:
            if len(output.type.tensor_type.shape.dim):
                output.type.tensor_type.shape.dim[0].dim_param = "N"
        self.model.ir_version = 8

    def _run(self, height: int, width: int, count: int) -> list[NDArray[np.float32]]:
        """Its outputs for pictures that are all noise, the first always the same."""
        rng = np.random.default_rng(0)
        noise = np.stack([rng.integers(0, 256, (3, height, width)) for _ in range(count)]).astype(np.float32)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        try:
            session = onnxruntime.InferenceSession(
                self.model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )  # fmt: skip
            found: list[NDArray[np.float32]] = session.run(None, {"pixels": noise})
        except Exception as error:  # ONNX Runtime has one kind for everything
            raise _refused(self.path, f"cannot be run on {count} of {width}x{height} px: {_first_line(error)}") from error
        return found

    def _check(self, name: str, one: NDArray[np.float32], two: NDArray[np.float32]) -> None:
        if one.ndim != 4 or one.dtype != np.float32:
            raise _refused(
                self.path,
                f"its output {name} is {one.dtype} {list(one.shape)}: only feature maps, float [N, C, h, w], are taken",
            )
        if not (np.isfinite(one).all() and one.std() > 0):
            raise _refused(self.path, f"its output {name} is the same everywhere, or no finite number")
        if two.shape != (2, *one.shape[1:]) or np.abs(two[0] - one[0]).max() > _ALIKE * np.abs(one).max():
            raise _refused(
                self.path, f"its output {name} is another one for a picture beside a second one: batches must not matter"
            )

    def _stride(self, name: str, tap: NDArray[np.float32]) -> int:
        height, width = self._size
        rows, columns = tap.shape[2:]
        stride = int(height // max(1, rows))
        if stride not in _STRIDES or (rows * stride, columns * stride) != (height, width):
            raise _refused(
                self.path,
                f"its output {name} has {columns}x{rows} places for {width}x{height} px: "
                f"strides from {_STRIDES[0]} to {_STRIDES[-1]} px are taken, whole and the same both ways",
            )
        return stride

    def _round(self) -> None:
        """Weights to half precision, so that a half-precision engine computes with the very same ones."""
        for tensor in self.model.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) > 1:
                with np.errstate(over="ignore"):
                    value = numpy_helper.to_array(tensor).astype(np.float16).astype(np.float32)
                if not np.isfinite(value).all():
                    raise _refused(self.path, f"its weights {tensor.name} are too large for half precision")
                tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))

    def _put_taps(self, kept: list[tuple[str, NDArray[np.intp]]]) -> None:
        graph = self.model.graph
        del graph.output[:]
        for tap, (name, channels) in zip(self.taps.names, kept, strict=True):
            if self.of > MOST_CHANNELS:
                index = f"{tap}/channels"
                graph.initializer.append(numpy_helper.from_array(channels.astype(np.int64), index))
                graph.node.append(helper.make_node("Gather", [name, index], [tap], name=f"{tap}/gather", axis=1))
            else:
                graph.node.append(helper.make_node("Identity", [name], [tap], name=f"{tap}/identity"))
            graph.output.append(helper.make_tensor_value_info(tap, onnx.TensorProto.FLOAT, ["N", len(channels), None, None]))
