"""Which causal LMs can be trained and decoded here, judged by a config: before a download, and before any work."""

import inspect
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, DynamicCache, DynamicLayer
from transformers.cache_utils import DynamicSlidingWindowLayer

from pipeline.config.errors import UserError


def text_config(config: Any) -> Any:
    """The part of a config that is about the language model: all of it, unless the model reads pictures as well."""
    return config.get_text_config(decoder=True)


def check_architecture(config: Any, name: str) -> None:
    """Refuse what cannot be trained and decoded: each row of a batch needs positions, keys and values of its own.

    Raises:
        UserError: it is not a causal LM, keeps more than keys and values, takes no positions, or has no context length.
    """
    kind, text = config.model_type, text_config(config)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{name}: {kind} is not a causal language model: use one.")
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=text).layers):
        raise UserError(f"{name}: {kind} keeps more than keys and values while decoding: use a plain attention model.")
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if getattr(text, "alibi", False) or "position_ids" not in inspect.signature(model.forward).parameters:
        raise UserError(f"{name}: {kind} takes no positions (it has ALiBi), so rows cannot be batched: use another.")
    if not hasattr(text, "max_position_embeddings"):
        raise UserError(
            f"{name}: {kind} does not say how long its context is: set max_position_embeddings in its config."
        )
