"""Test-time alignment with autoregressive reward models: the public names, each imported when it is first used.

    from pipeline import Request, load_experiment

    decoder = load_experiment()  # base and ARMs of this folder's params.yaml
    for index, generation in decoder.generate([Request("Describe a rainy Monday.", {"positivity": 1.0})]):
        print(generation.text)

`import pipeline` alone is light: it loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.arm_training import train_arm
    from pipeline.config import UserError, load_params
    from pipeline.decoder import Generation, GuidedDecoder, Request, Trace
    from pipeline.experiment import load_experiment
    from pipeline.params import Params
    from pipeline.processor import GuidanceLogitsProcessor

__all__ = [
    "Generation",
    "GuidanceLogitsProcessor",
    "GuidedDecoder",
    "Params",
    "Request",
    "Trace",
    "UserError",
    "load_experiment",
    "load_params",
    "train_arm",
]

_MODULES = {
    "Generation": "pipeline.decoder",
    "GuidanceLogitsProcessor": "pipeline.processor",
    "GuidedDecoder": "pipeline.decoder",
    "Params": "pipeline.params",
    "Request": "pipeline.decoder",
    "Trace": "pipeline.decoder",
    "UserError": "pipeline.config",
    "load_experiment": "pipeline.experiment",
    "load_params": "pipeline.config",
    "train_arm": "pipeline.arm_training",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
