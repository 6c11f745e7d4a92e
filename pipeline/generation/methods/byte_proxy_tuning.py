"""Byte-wise proxy tuning (byte-sampler, Hayase et al., arXiv 2506.14123): the log-ratio law over bytes.

log π(b) = log P_base(b) + Σ_i α_i (log P_i(b) − log P_ref(b)) − log Z at every next byte b, each model's say on bytes
being the sum over the tokens that go on with it. Where all models share a tokenizer this is not the law over tokens,
since another distribution is normalised.

Shapes: B rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.config.points import BASE
from pipeline.decoding.cross_tokenizer.text_reader import END, ByteReader
from pipeline.decoding.guidance import draw, kl_divergence, random_generator
from pipeline.generation.methods.search import Found
from pipeline.generation.methods.text_search import TextSearch

Laws = Mapping[tuple[str, int], Tensor]  # log P of the next byte, by lane and row


@dataclass
class _Bytes:
    """What a row has written, and what each byte adds to its sums: logp, logp_base and KL."""

    text: bytes = b""
    sums: list[list[float]] = field(default_factory=list)


class ByteProxyTuning(TextSearch):
    """`TextSearch` byte by byte. Its arguments are those of `TextSearch`."""

    def search(self, rows: list[Found]) -> None:
        """Draw a byte of every row at a time until all have ended."""
        texts = self._readers(rows)
        readers = [ByteReader(text, each.ends) for text, each in zip(texts, self._backbones, strict=True)]
        streams = [random_generator(row.request.stream) for row in rows]
        written = [_Bytes() for _ in rows]
        while alive := [place for place, row in enumerate(rows) if row.finish is None]:
            laws: dict[tuple[str, int], Tensor] = {}
            for reader in readers:
                laws |= reader.read({place: written[place].text for place in alive})
            law_B257 = torch.stack([self._law(rows[place], place, laws) for place in alive])
            base_B257 = torch.stack([laws[BASE, place] for place in alive])
            uniforms = [streams[place].random() for place in alive]
            uniforms_B = torch.tensor(uniforms, dtype=torch.float64, device=law_B257.device)
            drawn_B = draw(law_B257, uniforms_B)
            logp_B, logp_base_B = (logps.gather(1, drawn_B[:, None])[:, 0] for logps in (law_B257, base_B257))
            sums_B3 = torch.stack([logp_B, logp_base_B, kl_divergence(law_B257, base_B257)], dim=1).tolist()
            for place, drawn, sums in zip(alive, drawn_B.tolist(), sums_B3, strict=True):
                written[place].sums.append(sums)
                self._go_on(rows[place], written[place], drawn)
        for place, row in enumerate(rows):
            row.forwards = sum(text.positions[place] for text in texts)

    def _law(self, row: Found, place: int, laws: Laws) -> Tensor:
        law = laws[BASE, place]
        for name, alpha in row.request.arms.items():
            law = law + alpha * (laws[name, place] - laws[self._reference, place])
        return law.nan_to_num(nan=-torch.inf).log_softmax(0)  # neither of the two can write such a byte

    def _go_on(self, row: Found, written: _Bytes, drawn: int) -> None:
        """Put a byte behind a row; it has ended with its end, or with the last token of the base that it may have."""
        written.text += b"" if drawn == END else bytes([drawn])
        spelling, most = self._spellings[0], row.request.max_new_tokens
        tokens = spelling.spell(written.text)
        if drawn == END:
            row.finish, row.tokens, kept = "eos", [*tokens, self._prompter.eos], len(written.sums)
        elif len(tokens) > most:  # only now it is known that the last token stays as it is
            row.finish, row.tokens, kept = "length", list(tokens[:most]), len(spelling.joined(tokens[:most]))
        else:
            return
        row.logp, row.logp_base, row.kl = (sum(column) for column in zip(*written.sums[:kept], strict=True))
