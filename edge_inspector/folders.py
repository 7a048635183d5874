"""Which files of a folder are pictures, and what each of them is called: the one rule for training, evaluation and cameras.

Nothing is left out in silence: whatever is not taken is told with its reason.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edge_inspector.errors import PictureError
from edge_inspector.formats import SIGNATURE_BYTES, sniffed

_SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".pnm",
    ".pam", ".pfm", ".jp2", ".j2k", ".jpf", ".jpx", ".jxl", ".gif", ".avif", ".heic", ".heif", ".exr", ".hdr", ".psd", ".tga",
    ".ras", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".dcm",
)  # fmt: skip
"""Files that a person takes for pictures: one that cannot be read is a broken part, whatever it holds."""
_SYSTEM = {
    "$recycle.bin", "recycler", "recycled", "system volume information", "lost+found", "lost.dir", "found.000", "__macosx",
    "@eadir", "@recycle", "#recycle", "#snapshot", "network trash folder", "temporary items", "thumbs.db", "ehthumbs.db",
    "desktop.ini",
}  # fmt: skip
"""Files and folders that systems and file managers make for themselves; those that begin with a dot count as well."""
_TEXT_BYTES = 512
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1f\x7f]")
_NAME_CHARACTERS = 160
"""Longest name of a part; results have little room."""


@dataclass(frozen=True)
class LeftOut:
    """A file or folder that is not taken, and why."""

    path: Path
    reason: str
    harmless: bool
    """Whether nothing can be missing: hidden, of the system, or surely no picture."""

    def __str__(self) -> str:
        return f"{printable(self.path)}: {self.reason}"


@dataclass(frozen=True)
class Listing:
    """The pictures of a folder in name order, and what else lies there."""

    folder: Path
    taken: tuple[Path, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def doubtful(self) -> tuple[LeftOut, ...]:
        """What may be a part that nobody looks at."""
        return tuple(one for one in self.left_out if not one.harmless)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why something was left out, each reason once."""
        return tuple(dict.fromkeys(one.reason for one in self.left_out))

    @property
    def told(self) -> tuple[str, ...]:
        """What is left out: a line for each reason, with some of the names."""
        return tuple(f"left out, {reason}: {_some(self._names(reason))}" for reason in self.reasons)

    def _names(self, reason: str) -> list[str]:
        return [printable(_relative(one.path, self.folder)) for one in self.left_out if one.reason == reason]


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def printable(name: str | Path) -> str:
    r"""A name as text that every terminal, log and JSON document takes; bytes that are no UTF-8 are shown as \xfc."""
    text = os.fsencode(str(name)).decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def part_names(paths: Sequence[Path], folder: Path | None = None) -> tuple[str, ...]:
    """What the part on each picture is called: its path in the folder, without its ending where that is no other's.

    Names are printable, unlike each other, and short enough for a result.
    """
    within = [_relative(path, folder) if folder is not None else path for path in paths]
    short = Counter(path.with_suffix("") for path in within)
    names = [printable(path if short[path.with_suffix("")] > 1 else path.with_suffix("")) for path in within]
    again = Counter(names)
    return tuple(_shortened(name, path, unclear=again[name] > 1) for name, path in zip(names, within, strict=True))


def _shortened(name: str, path: Path, *, unclear: bool) -> str:
    if len(name) <= _NAME_CHARACTERS and not unclear:
        return name
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    return f"{name[-(_NAME_CHARACTERS - 9) :]}-{digest}"


def _relative(path: Path, folder: Path) -> Path:
    return path.relative_to(folder) if path.is_relative_to(folder) else path


def is_picture(path: Path) -> bool:
    """Whether a file begins as a picture, or has an ending of one."""
    try:
        return path.is_file() and _looks_like_one(path, _start(path))
    except OSError:
        return False


def _looks_like_one(path: Path, start: bytes) -> bool:
    return bool(sniffed(start[:SIGNATURE_BYTES])) or path.suffix.lower() in _SUFFIXES


Follow = Callable[[Path], object]
"""Asked before a link is followed, so that nothing behind it is looked at where it raises."""


def listed(folder: Path, follow: Follow = lambda _: None) -> Listing:
    """As `listing`. Raises PictureError also where no picture is there, and what `follow` raises."""
    found = listing(folder, follow)
    if not found.taken:
        more = f"; {found.told[0]}" if found.told else ""
        raise PictureError(f"{printable(folder)}: no pictures in it{more}", hint="give the folder that holds the pictures")
    return found


def listing(folder: Path, follow: Follow = lambda _: None) -> Listing:
    """The pictures of a folder and its subfolders, linked ones too, in name order. Raises PictureError without the folder.

    A picture is what begins as one, or has an ending of one. Linked folders are read once.
    """
    if not folder.is_dir():
        raise PictureError(f"{printable(folder)}: no such folder", hint="give the folder that holds the pictures")
    walk = _Walk(follow)
    walk.enter(folder)
    return Listing(folder, tuple(sorted(walk.taken)), tuple(sorted(walk.left_out, key=lambda one: one.path)))


@dataclass
class _Walk:
    """A walk through a folder: its own folders first, then linked ones that were not met on the way."""

    follow: Follow
    taken: list[Path] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    _read: set[Path] = field(default_factory=set)
    """Folders that were read, without links in their paths."""
    _linked: list[Path] = field(default_factory=list)

    def enter(self, folder: Path) -> None:
        """Read a folder, then what is linked in it."""
        self._folder(folder)
        while self._linked:
            link = self._linked.pop(0)
            target = link.resolve()
            if target in self._read:
                self._leave(link, f"links to {printable(target)}, which is read already", harmless=True)
            elif any(read.is_relative_to(target) for read in self._read):
                self._leave(link, "links to a folder that holds this one: a loop", harmless=True)
            else:
                self._folder(link)

    def _leave(self, path: Path, reason: str, *, harmless: bool) -> None:
        self.left_out.append(LeftOut(path, reason, harmless))

    def _folder(self, folder: Path) -> None:
        try:
            resolved = folder.resolve()
            if resolved in self._read:
                return
            self._read.add(resolved)
            names = sorted(os.listdir(folder))
        except OSError as error:
            self._leave(folder, f"a folder that cannot be read ({error.strerror})", harmless=False)
            return
        for name in names:
            self._entry(folder / name)

    def _entry(self, path: Path) -> None:
        if path.name.startswith(".") or path.name.endswith("~") or path.name.lower() in _SYSTEM:
            self._leave(path, "hidden, or of the system", harmless=True)
            return
        try:
            if path.is_symlink():
                self.follow(path)
            mode = path.stat().st_mode
            self._known(path, mode)
        except OSError as error:
            broken = path.is_symlink() and not os.path.lexists(os.path.realpath(path))
            what = "a link to nothing" if broken else f"cannot be read ({error.strerror})"
            self._leave(path, what, harmless=False)

    def _known(self, path: Path, mode: int) -> None:
        if stat.S_ISDIR(mode):
            self._linked.append(path) if path.is_symlink() else self._folder(path)
        elif not stat.S_ISREG(mode):
            self._leave(path, "not a plain file", harmless=False)
        else:
            self._file(path)

    def _file(self, path: Path) -> None:
        start = _start(path)
        if _looks_like_one(path, start):
            self.taken.append(path)
        elif _is_text(start):
            self._leave(path, "text, no picture", harmless=True)
        else:
            self._leave(path, "of a kind that is not known", harmless=False)


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_TEXT_BYTES)


def _is_text(start: bytes) -> bool:
    """Whether it holds no control characters but blanks and line ends, whatever its encoding."""
    return _CONTROL.search(start) is None
