"""Tests on a GPU, skipped where there is none. GENARM_GPU_TESTS_ON_CPU=1 runs them on the CPU, as a dry run."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.decoding.backbone import Backbone
from pipeline.models.loading import load_model, resolve_device
from pipeline.models.prompting import Prompter

DRY = os.environ.get("GENARM_GPU_TESTS_ON_CPU") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("error:.*cannot be replayed"))
            if not (DRY or torch.cuda.is_available()):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return resolve_device("cpu" if DRY else "auto")


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The device, for what a CPU cannot do."""
    if device.type != "cuda":
        pytest.skip("a CPU cannot do this")
    return device


@pytest.fixture(params=[True, False], ids=["replayed", "eager"])
def static(request: pytest.FixtureRequest) -> bool:
    """Whether a step has fixed shapes and is replayed as a CUDA graph."""
    return bool(request.param)


@pytest.fixture(autouse=True)
def whole_float32() -> None:
    """No test is run with float32 products in TF32."""
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.fixture
def backbone_of(tiny: Path, prompter: Prompter, arms: dict[str, Path], device: torch.device) -> Callable[..., Backbone]:
    """The tiny base, with its three adapters and on the device unless told otherwise."""

    def make(
        place: torch.device = device,
        dtype: torch.dtype = torch.float32,
        static: bool = False,
        adapters: dict[str, Path] = arms,
        **how: str,
    ) -> Backbone:
        made = Backbone(load_model(tiny, dtype, place), prompter, adapters, **how)
        made.static = static
        return made

    return make
