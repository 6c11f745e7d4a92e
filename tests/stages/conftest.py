"""Fixtures: a throw-away copy of the repository; with `--preload` its stages start with the libraries loaded."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.preloaded import preloaded_python
from tests.stages.repository import ENVIRONMENT, checked_out, commit, compose, run


@pytest.fixture(scope="session")
def python(pytestconfig: pytest.Config) -> Iterator[None]:
    """What DVC starts as `python`."""
    if not pytestconfig.getoption("--preload"):
        yield
        return
    with tempfile.TemporaryDirectory() as folder, preloaded_python(Path(folder), ENVIRONMENT) as first:
        path = ENVIRONMENT["PATH"]
        ENVIRONMENT["PATH"] = f"{first}:{path}"
        yield
        ENVIRONMENT["PATH"] = path


@pytest.fixture(scope="module")
def repository(python: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A throw-away copy of the repository, of this module's own."""
    return checked_out(tmp_path_factory.mktemp("repository"))


@pytest.fixture(scope="module")
def copy(repository: Path) -> Path:
    """The same, in which the smoke experiment has run and is committed."""
    compose(repository, "experiment=smoke")
    run(repository, "dvc", "repro", "-q")
    commit(repository, "smoke")
    return repository
