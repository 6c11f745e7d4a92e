"""Fixtures: the real conf composed and shrunk, a fetched tiny model, ARMs of it, a decoder. Offline, CPU only."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}
os.environ["OMP_NUM_THREADS"] = "1"  # threads only wait for each other on models this small; tests run side by side

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from pipeline.config.load import to_params
from pipeline.config.schema import Model, Params
from pipeline.config.workspace import Workspace
from pipeline.decoding.backbone import Backbone
from pipeline.decoding.decoder import GuidedDecoder
from pipeline.models.fetch import fetch
from pipeline.models.loading import load_model
from pipeline.models.prompting import Prompter
from tests.reference import Reference
from tests.tiny import ROOT, write_adapter, write_project, write_tiny

Composer = Callable[..., Params]


def pytest_addoption(parser: pytest.Parser) -> None:
    """CI says how many tests it expects, so that tests skipped in silence do not pass for tests that passed."""
    parser.addoption("--at-least", type=int, default=0, help="fail if fewer tests pass")
    parser.addoption("--preload", action="store_true", help="see tests/preloaded.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that run the whole DAG come first: begun last, one of them would keep a single worker busy at the end."""
    items.sort(key=lambda item: not item.path.stem.endswith("_dag"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    passed, floor = len(terminalreporter.stats.get("passed", ())), config.getoption("--at-least")
    if passed < floor:
        terminalreporter.write_line(
            f"{passed} tests passed, but at least {floor} should: see what was skipped", red=True
        )


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and len(reporter.stats.get("passed", ())) < session.config.getoption("--at-least"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def compose_params() -> Composer:
    """Compose the real conf with overrides, as the command line does."""

    def run(*overrides: str) -> Params:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return to_params(compose("config", overrides=list(overrides)))

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fetched tiny base, with its origin.json."""
    folder = tmp_path_factory.mktemp("models")
    spec = Model(source="path", location=str(write_tiny(folder / "source")))
    fetch("tiny", spec, folder / "tiny")
    return folder / "tiny"


@pytest.fixture(scope="session")
def prompter(tiny: Path) -> Prompter:
    return Prompter.load(tiny, None)


@pytest.fixture
def base(tiny: Path) -> torch.nn.Module:
    return load_model(tiny, torch.float32, torch.device("cpu"))


@pytest.fixture(scope="session")
def arms(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three random LoRA adapters of the tiny base, saved by PEFT; one adapts the attention only."""
    folder = tmp_path_factory.mktemp("arms")
    targets = {"one": "all-linear", "two": "all-linear", "three": ["q_proj"]}
    return {name: write_adapter(tiny, folder / name, seed, at) for seed, (name, at) in enumerate(targets.items(), 1)}


@pytest.fixture
def decoder(base: torch.nn.Module, prompter: Prompter, arms: dict[str, Path]) -> GuidedDecoder:
    return GuidedDecoder(Backbone(base, prompter, arms), batch_size=8)


@pytest.fixture(scope="module")
def reference(tiny: Path, arms: dict[str, Path], prompter: Prompter) -> Reference:
    return Reference(tiny, arms, prompter)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "models", tmp_path / "results", tmp_path / "scratch")


@pytest.fixture
def smoke_params(compose_params: Composer, tiny: Path) -> Params:
    """The smoke experiment on the tiny base of this test session."""
    params = compose_params("experiment=smoke", f"data.path={ROOT / 'pipeline/data/prompts/everyday.jsonl'}")
    spec = dataclasses.replace(params.models["tiny"], location=str(tiny))
    return dataclasses.replace(params, models={**params.models, "tiny": spec})


@pytest.fixture
def project(tmp_path: Path, tiny: Path, arms: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's folder with a base, two ARMs and params.yaml, which is the current one."""
    write_project(tmp_path, tiny, {"positivity": arms["one"], "conciseness": arms["two"]})
    monkeypatch.chdir(tmp_path)
    return tmp_path
