"""A prefix scorer: how likely a response is to be as preferred, for every next token, from one hidden state of a base.

The log-odds are low-rank in state and token: q(h, v) = gelu(W h + b) · P e_v + u · h + c, with e_v the row of token v
in the base's head. Shapes: N positions, V vocabulary, D features, R rank.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.config.errors import UserError

PREFIX_SCORER = "prefix_scorer.safetensors"
RANK = 64


class PrefixHead(nn.Module):
    """The trained part.

    Args:
        size: features of a hidden state, and of a row of the head.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.state = nn.Linear(size, RANK)
        self.token = nn.Linear(size, RANK, bias=False)
        self.prefix = nn.Linear(size, 1)
        nn.init.zeros_(self.token.weight)  # at first no token is better than another

    def of_tokens(self, hidden_ND: Tensor, row_ND: Tensor) -> Tensor:
        """Log-odds at the token whose row of the base's head stands beside each state: logit_N."""
        state_NR, prefix_N = self._read(hidden_ND)
        return torch.linalg.vecdot(state_NR, self.token(row_ND.float())) + prefix_N

    def of_all(self, hidden_ND: Tensor, token_VR: Tensor) -> Tensor:
        """Log-odds at every token: logit_NV.

        Args:
            token_VR: `token` of every row of the base's head.
        """
        state_NR, prefix_N = self._read(hidden_ND)
        return state_NR @ token_VR.T + prefix_N[:, None]

    def _read(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
        hidden_ND = hidden_ND.float()
        return F.gelu(self.state(hidden_ND)), self.prefix(hidden_ND)[:, 0]


class PrefixValues:
    """A trained head on its base, ready for every next token."""

    def __init__(self, head: PrefixHead, base: Any) -> None:
        self._head = head.to(base.device).eval().requires_grad_(False)
        self._token_VR = self._head.token(base.get_output_embeddings().weight.float())

    @classmethod
    def load(cls, folder: Path, base: Any) -> "PrefixValues":
        """The head of a folder, as `PrefixScorer.write` leaves it, on the causal LM that it was trained on.

        Raises:
            UserError: the folder holds none, or it is of another base.
        """
        size = base.get_output_embeddings().weight.shape[1]
        head = PrefixHead(size)
        try:
            head.load_state_dict(load_file(folder / PREFIX_SCORER))
        except Exception as error:
            raise UserError(
                f"{folder} holds no prefix scorer of this base ({error}): train it again (stage tune)."
            ) from error
        return cls(head, base)

    def of(self, hidden_BD: Tensor) -> Tensor:
        """Log-odds at every next token: logit_BV in float32."""
        return self._head.of_all(hidden_BD, self._token_VR)
