"""The stand-in driver, compiled once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.nvidia.parts import needs_pycuda, stand_in_driver


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs_pycuda()
    return stand_in_driver(tmp_path_factory.mktemp("driver"))
