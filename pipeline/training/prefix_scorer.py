"""Training a prefix scorer: a head on the frozen base that says of each prefix of a response how it will end.

Every prefix of a chosen response is an example of the preferred kind, every one of a rejected response an example of
the other (FUDGE, arXiv 2104.05218, section 3). Shapes: B pairs, N response tokens, S responses, D features.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.models.prefix_scorer import PREFIX_SCORER, PrefixHead
from pipeline.training.arm import ARM, ResponseModel
from pipeline.training.losses import length_normalised, response_logps, reward_metrics


class PrefixScorer(ResponseModel):
    """The head, and the base whose states it reads."""

    def __init__(self, model: PreTrainedModel | PeftModel, dtype: torch.dtype) -> None:
        plain: Any = model.unload() if isinstance(model, PeftModel) else model
        super().__init__(plain.requires_grad_(False), dtype)
        size = self.causal.get_output_embeddings().weight.shape[1]
        self.head = PrefixHead(size).to(self.causal.device)

    def of_prefixes(self, batch: dict[str, Tensor]) -> Tensor:
        """Log-odds behind every response token of a collated batch: logit_N."""
        with torch.no_grad():
            hidden_ND = self.hidden(batch)
            row_ND = self.causal.get_output_embeddings().weight[batch["label"]]
        return self.head.of_tokens(hidden_ND, row_ND)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Log-odds behind the last token of every response: logit_S."""
        return self.of_prefixes(batch)[_last(batch["response"])]

    def write(self, folder: Path, base: str) -> None:
        """The head alone."""
        state = {name: value.detach().contiguous().cpu() for name, value in self.head.state_dict().items()}
        save_file(state, folder / PREFIX_SCORER, metadata={"format": "pt", "base": base})


def _last(response_N: Tensor) -> Tensor:
    """The place of each response's last token; those of one response stand together: last_S."""
    return torch.bincount(response_N).cumsum(0) - 1


def prefix_loss(logit_N: Tensor, response_N: Tensor, chosen_B: Tensor, rejected_B: Tensor) -> Tensor:
    """−log p(preferred) of a chosen response's prefixes, −log(1 − p) of a rejected one's, each averaged: loss_B."""
    preferred_S, other_S = (
        length_normalised(response_logps(F.logsigmoid(sign * logit_N), response_N), response_N) for sign in (1, -1)
    )
    return -(preferred_S[chosen_B] + other_S[rejected_B]) / 2


class PrefixScoring(ARM):
    """Trains a prefix scorer by `prefix_loss`."""

    def _pairs(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        model: Any = self.model
        logit_N, response_N = model.of_prefixes(batch), batch["response"]
        loss_B = prefix_loss(logit_N, response_N, batch["chosen"], batch["rejected"])
        logit_S = logit_N.detach()[_last(response_N)]
        chosen_B, rejected_B = logit_S[batch["chosen"]], logit_S[batch["rejected"]]
        metrics = {
            "loss": loss_B.detach(),
            **reward_metrics(chosen_B, rejected_B, 1.0),
            "logps/chosen": chosen_B,
            "logps/rejected": rejected_B,
            "pairs": torch.ones_like(loss_B),
        }
        return loss_B * self.weights_of(batch["objective"]), metrics
