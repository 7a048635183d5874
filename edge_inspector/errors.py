"""Every error the package raises on purpose.

InspectorError            what went wrong, and a hint what to do
├── SchemaError           a document is not what it should be: all faults at once
├── SignatureError        no key, or a signature that is missing, wrong, or by a key that is not trusted
├── PictureError          a picture file cannot be read or written
├── BundleError           a bundle is refused
│   ├── BundleUntrusted   signature missing, wrong, or by a key that is not trusted
│   ├── BundleDamaged     files missing, extra, changed, or not plain files
│   ├── SourceUnreachable where it shall be fetched from does not give it, this time
│   └── BundleUnsupported sound, but not for this version, this date or this runtime
├── CameraError           a camera cannot be opened or does not deliver what was set
│   └── CameraEnded       a recording has no more frames
├── EngineError           a network cannot be run
│   ├── EngineRefused     a compiled network does not judge as it should
│   └── EngineLost        the GPU failed for good: only a new process may get it back
├── OutputError           a line of a GPIO chip cannot be had
├── OutboxError           results cannot be stored
├── BrokerError           the broker cannot be reached or refuses
└── TrainingError         a bundle cannot be trained from these pictures
"""

from __future__ import annotations

from dataclasses import dataclass


class InspectorError(Exception):
    """What went wrong (the thing, what was found, what was expected); `hint` says what to do about it."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a document: where, what was found, what is allowed."""

    path: str
    problem: str
    found: str = ""
    suggestion: str = ""

    def __str__(self) -> str:
        found = f" (found {self.found})" if self.found else ""
        suggestion = f"; {self.suggestion}" if self.suggestion else ""
        return f"{self.path or 'document'}: {self.problem}{found}{suggestion}"


class SchemaError(InspectorError):
    """A document is refused; `faults` holds everything wrong with it."""

    def __init__(self, source: str, faults: list[Fault], *, hint: str = "") -> None:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        super().__init__("\n".join([f"{source}: {count}", *(f"  {fault}" for fault in faults)]), hint=hint)
        self.source = source
        self.faults = faults


class SignatureError(InspectorError):
    """A file is no key, or a signature is missing, wrong, or by a key that is not trusted."""


class PictureError(InspectorError):
    """A picture file cannot be read or written."""


class BundleError(InspectorError):
    """A bundle is refused."""


class BundleUntrusted(BundleError):
    """The signature is missing, wrong, or made by a key that is not trusted."""


class BundleDamaged(BundleError):
    """Files are missing, extra, changed, or not plain files."""


class SourceUnreachable(BundleError):
    """Where a bundle shall be fetched from does not give it, this time."""


class BundleUnsupported(BundleError):
    """The bundle is sound, but not for this version, this date or this runtime."""


class CameraError(InspectorError):
    """A camera cannot be opened or does not deliver what was set."""


class CameraEnded(CameraError):
    """A recording has no more frames."""


class EngineError(InspectorError):
    """A network cannot be run."""


class EngineRefused(EngineError):
    """A compiled network does not judge as ONNX Runtime does."""


class EngineLost(EngineError):
    """The GPU failed for good: every later call fails too, and only a new process may get it back."""


class OutputError(InspectorError):
    """A line of a GPIO chip cannot be had."""


class OutboxError(InspectorError):
    """Results cannot be stored."""


class BrokerError(InspectorError):
    """The broker cannot be reached or refuses."""


class TrainingError(InspectorError):
    """A bundle cannot be trained from these pictures."""
