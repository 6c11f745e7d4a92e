"""Methods whose models have tokenizers of their own and agree on a text, not on its tokens: what they share."""

from collections.abc import Sequence

from pipeline.config.points import BASE, REFERENCE
from pipeline.decoding.backbone import Backbone
from pipeline.decoding.cross_tokenizer.spelling import Spelling
from pipeline.decoding.cross_tokenizer.text_reader import TextReader
from pipeline.generation.methods.search import Found, Search


class TextSearch(Search[Backbone]):
    """`Search` of a base and ARMs of any tokenizers. A request's weights name the ARMs.

    Args:
        base: the base, and the ARMs that are adapters of it.
        beside: the other ARMs and the lane `reference`, which they were made from; without it that is the base.
        batch_size: rows at once.

    Raises:
        UserError: the bytes of a tokenizer cannot be recovered.
    """

    def __init__(self, base: Backbone, beside: Sequence[Backbone], batch_size: int) -> None:
        arms = {lane: backbone for backbone in (base, *beside) for lane in backbone.lanes if lane != BASE}
        self._reference = REFERENCE if REFERENCE in arms else BASE
        super().__init__(base.adapted.model, base.prompter, arms, batch_size)
        self._backbones = [base, *beside]
        self._spellings = [
            Spelling(backbone.prompter.tokenizer, ", ".join(backbone.lanes)) for backbone in self._backbones
        ]

    def _readers(self, rows: Sequence[Found]) -> list[TextReader]:
        """One for each model, the base's first; every row is read by the base, the reference and its own ARMs."""
        served = [{BASE, self._reference, *row.request.arms} for row in rows]
        return [
            TextReader(
                backbone, spelling, [backbone.prompter.prompt_ids(row.request.prompt) for row in rows],
                [lanes & set(backbone.lanes) for lanes in served],
            )
            for backbone, spelling in zip(self._backbones, self._spellings, strict=True)
        ]  # fmt: skip
