"""Who may read what the daemon writes: nobody else, but for the pictures that device.yaml opens to a group."""

from __future__ import annotations

import grp
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edge_inspector.errors import InspectorError

log = logging.getLogger(__name__)

EVIDENCE = "evidence"
"""The folder of pictures in the state folder."""
_PRIVATE_FILE, _PRIVATE_FOLDER = 0o600, 0o700
_SHARED_FILE, _SHARED_FOLDER = 0o640, 0o750
_PASSAGE = 0o710
"""The state folder, where a folder in it is open to a group: passed through, not listed."""


@dataclass(frozen=True)
class Access:
    """The modes of files and folders; `group`: the number of one that may read them, too."""

    group: int | None = None

    @property
    def file(self) -> int:
        """The mode of a file."""
        return _PRIVATE_FILE if self.group is None else _SHARED_FILE

    @property
    def folder(self) -> int:
        """The mode of a folder."""
        return _PRIVATE_FOLDER if self.group is None else _SHARED_FOLDER

    def give(self, path: Path) -> None:
        """Set group and mode of a file or folder, where they are others. Raises OSError."""
        self._set(path, self.folder if path.is_dir() else self.file)

    def let_through(self, path: Path) -> None:
        """Let the group pass through a folder, without listing it. Raises OSError."""
        self._set(path, _PASSAGE)

    def _set(self, path: Path, mode: int) -> None:
        found = path.lstat()
        if self.group is not None and found.st_gid != self.group:
            os.chown(path, -1, self.group, follow_symlinks=False)
        if found.st_mode & 0o777 != mode:
            path.chmod(mode | found.st_mode & 0o7000)

    def make_folder(self, path: Path) -> None:
        """Make a folder where there is none; those above it are private, but for its parent. Raises OSError."""
        path.mkdir(mode=_PRIVATE_FOLDER, parents=True, exist_ok=True)
        self.give(path)

    def write(self, path: Path, data: bytes) -> None:
        """Write a new file. Raises OSError."""
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _PRIVATE_FILE)
        with os.fdopen(descriptor, "wb") as file:
            if self.group is not None and os.fstat(descriptor).st_gid != self.group:
                os.fchown(descriptor, -1, self.group)
            os.fchmod(descriptor, self.file)
            file.write(data)


def access_of(group: str | None) -> Access:
    """The access that device.yaml names with `storage.evidence_group`. Raises InspectorError."""
    if group is None:
        return Access()
    try:
        number = grp.getgrnam(group).gr_gid
    except KeyError:
        raise InspectorError(
            f"storage.evidence_group: there is no group {group!r} on this machine", hint=f"sudo groupadd --system {group}"
        ) from None
    if os.geteuid() and number not in (os.getegid(), *os.getgroups()):
        raise InspectorError(
            f"storage.evidence_group: the user who runs this (number {os.geteuid()}) is not in the group {group!r}",
            hint=f"sudo usermod -aG {group} USER, then log in again; as a service: systemctl edit, [Service], Group={group}",
        )
    return Access(number)


@contextmanager
def private(state: Path, access: Access) -> Iterator[None]:
    """Meanwhile what this process and its children make is its owner's alone; so is, from now on, what is there.

    `access`: of the one folder in it that may be open to a group. Raises InspectorError.
    """
    before = os.umask(0o077)
    try:
        _close(state, access)
        yield
    finally:
        os.umask(before)


def _close(state: Path, access: Access) -> None:
    try:
        state.mkdir(parents=True, exist_ok=True)
        real = state.resolve()  # systemd gives its services a link
        for folder, folders, files in os.walk(real):
            if Path(folder) == real and EVIDENCE in folders:
                folders.remove(EVIDENCE)  # whoever writes there sees to it
            for path in (Path(folder), *(Path(folder, name) for name in files)):
                _make_private(path)
        if access.group is not None:
            access.let_through(real)
    except OSError as error:
        raise InspectorError(f"{state}: {error.strerror}", hint="check the state folder's permissions") from error


def _make_private(path: Path) -> None:
    try:
        if not path.is_symlink():
            Access().give(path)
    except PermissionError:
        log.warning("%s belongs to another user: its mode %o stays", path, path.lstat().st_mode & 0o777)
