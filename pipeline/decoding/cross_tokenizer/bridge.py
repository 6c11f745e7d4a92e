"""Who is guided by whom: the models that read the base's tokens as they are, and those that need them translated."""

from collections.abc import Collection, Sequence
from functools import lru_cache

from pipeline.config.errors import UserError
from pipeline.config.points import REFERENCE
from pipeline.decoding.backbone import Backbone
from pipeline.decoding.cross_tokenizer.spelling import Spelling
from pipeline.decoding.cross_tokenizer.translation import Translation
from pipeline.models.prompting import Prompter
from pipeline.models.vocabulary import check_end, check_vocabulary, same_vocabulary

_ROOM = 1 << 16  # spellings that are remembered


class TokenizerBridge:
    """ARMs and their reference, of one tokenizer, for a base of another: the tables, made once.

    Args:
        base: the base's tokenizer.
        ends: its tokens that end a response.
        backbones: those of the ARMs and of the lane `reference`.
        vocab_size: the tokens that the base's law is over.
        candidates: how many of the base's likeliest tokens the ARMs evaluate, beside its ends; of those that
            they spell with several of their own, the ones of probability 2 / candidates at least.

    Raises:
        UserError: no lane is called `reference`; ARMs of several tokenizers; one whose bytes cannot be recovered.
    """

    def __init__(
        self,
        base: Prompter,
        ends: Collection[int],
        backbones: Sequence[Backbone],
        vocab_size: int,
        candidates: int = 64,
    ) -> None:
        self.backbones, self.candidates, self.ends = backbones, candidates, sorted(ends)
        self.lanes = [lane for backbone in backbones for lane in backbone.lanes]
        arms = ", ".join(name for name in self.lanes if name != REFERENCE)
        holder = next((backbone for backbone in backbones if REFERENCE in backbone.lanes), None)
        if holder is None:
            try:
                check_vocabulary(base.tokenizer, backbones[0].prompter.tokenizer, arms)
            except UserError as error:
                raise UserError(
                    f"{str(error).split(': use ', maxsplit=1)[0]}; an ARM of another tokenizer is weighed against the "
                    "model it was made from: give that model too (GuidedDecoder.load: arm_base), or use an ARM of this "
                    "base."
                ) from error
        assert holder is not None
        for backbone in backbones:
            check_vocabulary(holder.prompter.tokenizer, backbone.prompter.tokenizer, ", ".join(backbone.lanes))
        self.arm_size = min(backbone.vocab_size for backbone in backbones)
        self.base, self.arm = Spelling(base.tokenizer, "base"), Spelling(holder.prompter.tokenizer, arms)
        self.table = Translation.between(self.base, self.arm, ends, holder.prompter.eos, vocab_size, self.arm_size)
        # What each token of the base adds to the text; an end adds none, whatever it spells.
        self.pieces = [None if token in ends else piece for token, piece in enumerate(self.base.pieces)]
        self.path = lru_cache(maxsize=_ROOM)(self._spelled)

    def serving(self, lanes: Collection[str]) -> list[str]:
        """Those of the lanes that run here, and with any of them the reference."""
        own = [lane for backbone in self.backbones for lane in backbone.own(lanes)]
        return [*dict.fromkeys([*own, REFERENCE])] if own else []

    def _spelled(
        self, pending: bytes, written: tuple[int, ...], tail: tuple[int, ...], token: int
    ) -> tuple[tuple[int, ...], bool]:
        """`path`: how the ARM spells what is pending with a token of the base, and whether that token is its last."""
        same, piece = self.table.same[token], self.pieces[token] or b""
        alone = (same,) if same >= 0 else self.arm.spell(piece)
        if not pending:
            return alone, same >= 0
        if self.base.spell(pending + piece) != (*written, token):
            return (*tail, *alone), same >= 0  # the base departs from its own spelling, and so does the ARM
        path = self.arm.spell(pending + piece)
        return path, same >= 0 and path == (*tail, same)


def common_vocabulary(base: Prompter, backbones: Sequence[Backbone]) -> int:
    """How many tokens all models share that read the base's: their logits are cut to these.

    Raises:
        UserError: two lanes have one name, or an ARM's responses end with another token than the base's.
    """
    names = [lane for backbone in backbones for lane in backbone.lanes]
    for lane in names:
        if names.count(lane) > 1:
            raise UserError(f"two models are called {lane}: name each ARM differently.")
    sharing = [backbone for backbone in backbones if same_vocabulary(base.tokenizer, backbone.prompter.tokenizer)]
    for backbone in sharing:
        check_end(base, backbone.prompter, ", ".join(backbone.lanes))
    return min([base.vocab_size, *(backbone.vocab_size for backbone in sharing)])
