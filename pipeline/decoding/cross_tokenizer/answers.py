"""What ARMs of another tokenizer say of the base's next tokens, as a law over the base's vocabulary.

Shapes: B rows; b those that any of these ARMs serves, r those that one of them serves; C candidates; V the base's
vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Answers:
    """What the ARMs say of the base's likely next tokens, its ends among them.

    `values` has each ARM as one of the base, log π_base + log P_arm − log P_ref, not normalised; the reference,
    translated, is the base.
    """

    rows_b: Tensor  # that any ARM serves
    tokens_bC: Tensor  # the candidates
    asked_bC: Tensor  # which of them the ARMs were asked about: of a token that is there twice, one
    values: Mapping[str, tuple[Tensor, Tensor]]  # per lane the places in `rows_b` of the rows it serves, values_rC
    uncovered_mass_B: Tensor  # the base's mass on all other tokens

    def guided(self, logps_BV: Tensor, alphas: Mapping[str, Tensor]) -> Tensor:
        """The law of the base and what shares its vocabulary, times the ARMs': logps_BV, in place.

        Where an ARM serves a row, what is no candidate there has −inf.

        Args:
            logps_BV: that law.
            alphas: per lane, its exponent at the rows that it serves, alpha_r.
        """
        total_bC = logps_BV[self.rows_b[:, None], self.tokens_bC]
        for lane, (places_r, values_rC) in self.values.items():
            total_bC.index_add_(0, places_r, (values_rC * alphas[lane][:, None]).to(total_bC.dtype))
        law_bC = torch.log_softmax(total_bC.masked_fill_(~self.asked_bC, -torch.inf), dim=-1)
        logps_BV.index_fill_(0, self.rows_b, -torch.inf)
        logps_BV[self._rows_n, self.tokens_bC[self.asked_bC]] = law_bC[self.asked_bC]
        return logps_BV

    def over_vocabulary(self, base_BV: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """`values` over all of the base's tokens, per lane the rows and values_rV: the base's own at no candidates."""
        views = {}
        for lane, (places_r, values_rC) in self.values.items():
            values_BV = base_BV.float().clone()
            asked_rC = self.asked_bC[places_r]
            at_n = self.rows_b[places_r][:, None].expand_as(asked_rC)[asked_rC]
            values_BV[at_n, self.tokens_bC[places_r][asked_rC]] = values_rC[asked_rC]
            views[lane] = self.rows_b[places_r], values_BV[self.rows_b[places_r]]
        return views

    @property
    def _rows_n(self) -> Tensor:
        """The row of every candidate that was asked about."""
        return self.rows_b[:, None].expand_as(self.asked_bC)[self.asked_bC]
