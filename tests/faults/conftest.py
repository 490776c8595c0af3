"""One undisturbed run for all fault tests of a process, with the teachers of the finished smoke run."""

from pathlib import Path

import pytest
from kinds import Lab


@pytest.fixture(scope="session")
def lab(pristine_storage: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("faults"), teachers=pristine_storage)
