"""How this program was installed: what printed commands must say to work as they are printed."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlsplit

_NAME = "edge-inspector"


def program() -> str:
    """This program as a shell finds it: its name, or its path where it is not on the PATH."""
    if shutil.which(_NAME):
        return _NAME
    beside = Path(sys.executable).with_name(_NAME)
    return shlex.quote(str(beside)) if beside.exists() else shlex.join([sys.executable, "-m", "edge_inspector.cli"])


def install(extra: str) -> str:
    """The command that installs what an extra brings, into this Python, from where this program came."""
    source = shlex.quote(f"{_source()}[{extra}]")
    return f"{shlex.quote(sys.executable)} -m pip install {source}"


def _source() -> str:
    """The folder that it was installed from, or its name where an index gave it."""
    checkout = Path(__file__).resolve().parents[1]
    if (checkout / "pyproject.toml").exists():
        return str(checkout)
    try:
        told = distribution(_NAME).read_text("direct_url.json")
    except PackageNotFoundError:
        return _NAME
    url = urlsplit(json.loads(told)["url"]) if told else None
    return unquote(url.path) if url is not None and url.scheme == "file" else _NAME
