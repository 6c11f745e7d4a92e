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
    from pipeline.config.errors import UserError
    from pipeline.config.load import load_params
    from pipeline.config.schema import Params
    from pipeline.decoding.decoder import Generation, GuidedDecoder, Request, Trace
    from pipeline.decoding.logits_processor import GuidanceLogitsProcessor
    from pipeline.generation.experiment import load_experiment
    from pipeline.training.train_arm import train_arm

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
    "Generation": "pipeline.decoding.decoder",
    "GuidanceLogitsProcessor": "pipeline.decoding.logits_processor",
    "GuidedDecoder": "pipeline.decoding.decoder",
    "Params": "pipeline.config.schema",
    "Request": "pipeline.decoding.decoder",
    "Trace": "pipeline.decoding.decoder",
    "UserError": "pipeline.config.errors",
    "load_experiment": "pipeline.generation.experiment",
    "load_params": "pipeline.config.load",
    "train_arm": "pipeline.training.train_arm",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
