"""The same by exhaustion, a text at a time: what a model that writes tokens says of bytes, and the guided law of those.

For tests and small models: every call asks the model about every canonical spelling of every beginning of the text.
The method is that of Hayase et al. (arXiv 2506.14123) for byte-pair tokenizers: a text begins with some bytes if
canonical tokens spell a part of them and one more token covers the rest, whatever it adds.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pipeline.decoding.cross_tokenizer.spelling import Spelling

NextLogps = Callable[[tuple[int, ...]], Tensor]  # log P of the next token behind tokens of a response, logps_A
END = 256  # the entry of a byte law that says that the text ends


class ByteModel:
    """A model's law over texts as bytes.

    Args:
        next_logps: its law over tokens.
        spelling: what those are.
        end: the token that ends a text.
    """

    def __init__(self, next_logps: NextLogps, spelling: Spelling, end: int) -> None:
        self._next, self._spelling, self._end = next_logps, spelling, end

    def spelled(self, text: bytes) -> Tensor:
        """log P of exactly the canonical tokens of a text."""
        tokens = self._spelling.spell(text)
        found = torch.zeros((), dtype=torch.float64)
        for place, token in enumerate(tokens):
            found = found + self._next(tokens[:place])[token].double()
        return found

    def begins(self, text: bytes) -> Tensor:
        """log P of all texts that begin with this one, itself included: every covering counted."""
        if not text:
            return torch.zeros((), dtype=torch.float64)
        parts = []
        for cut in range(len(text)):
            covers = self._spelling.covering(text[cut:])
            tokens = self._spelling.spell(text[:cut])
            if len(covers) and self._spelling.joined(tokens) == text[:cut]:
                parts.append(self.spelled(text[:cut]) + self._next(tokens)[covers].double().logsumexp(0))
        return torch.stack(parts).logsumexp(0) if parts else torch.tensor(-torch.inf, dtype=torch.float64)

    def byte_law(self, text: bytes) -> Tensor:
        """log P of the next byte behind a text, and of its end: logps of 257, normalised."""
        ends = self.spelled(text) + self._next(self._spelling.spell(text))[self._end].double()
        each = [self.begins(text + bytes([byte])) for byte in range(256)]
        return torch.stack([*each, ends]).log_softmax(0)


def product(base: ByteModel, arms: Mapping[str, ByteModel], reference: ByteModel, text: bytes,
            weights: Mapping[str, float]) -> Tensor:  # fmt: skip
    """log π(b) = log P_base(b) + Σ_i α_i (log P_i(b) − log P_ref(b)) − log Z: the guided law of bytes, logps of 257."""
    of_reference, total = reference.byte_law(text), base.byte_law(text)
    for name, alpha in weights.items():
        total = total + alpha * (arms[name].byte_law(text) - of_reference)
    return total.nan_to_num(nan=-torch.inf).log_softmax(0)


def text_logp(law: Callable[[bytes], Tensor], text: bytes) -> float:
    """log P of a whole text, its end included, under a law of bytes."""
    steps: Sequence[int] = [*text, END]
    return float(sum(law(text[:place])[byte] for place, byte in enumerate(steps)))
