"""Every test of the command line works in a folder of its own, and times briefly."""

import pytest
from support.brief import time_briefly
from support.cli import prune


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    time_briefly(monkeypatch)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A finished run's folder, which no test changes."""
    folder = tmp_path_factory.mktemp("cli") / "small"
    with pytest.MonkeyPatch.context() as patch:
        time_briefly(patch)
        assert prune("--output-dir", folder) == 0
    return folder
