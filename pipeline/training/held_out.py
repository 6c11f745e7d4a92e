"""How good an ARM is on held-out pairs, and how much of that is length.

Shapes: S responses, P prompts, R resamples.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch.utils.data import DataLoader

from pipeline.config.schema import Loss
from pipeline.evaluation.statistics import Bootstrap, Share, share
from pipeline.training.arm import ResponseModel
from pipeline.training.losses import implicit_rewards

_LIKE = 0.1  # responses whose lengths differ by at most this share of the longer one count as equally long


@dataclass(frozen=True)
class HeldOut:
    """What an ARM does on pairs it has not seen."""

    accuracy: Share
    length_matched: Share  # accuracy on pairs of equally long responses
    chosen_longer: Share  # how often a judge that only counts tokens would be right
    length_correlation: float | None  # Spearman's, of log π_r(y|x) with the number of tokens of y
    reward_mean: float  # of what the loss compares, over the responses
    reward_std: float


def held_out(
    rewards_S: Sequence[float],
    logps_S: Sequence[float],
    lengths_S: Sequence[int],
    pairs: Sequence[tuple[int, int]],
    prompts: Sequence[Hashable],
    bootstrap: Bootstrap,
) -> HeldOut:
    """Accuracy and length bias from the rewards of responses and the pairs among them.

    Args:
        rewards_S: what the loss compares: log π_r(y|x) itself, its mean over tokens, or its ratio to a reference.
        logps_S: log π_r(y|x) of each response.
        lengths_S: its tokens.
        pairs: (chosen, rejected) as places among the responses.
        prompts: the prompt that each pair is of.
        bootstrap: of the intervals.
    """
    chosen, rejected = np.array(pairs, dtype=int).reshape(-1, 2).T
    rewards, lengths = np.asarray(rewards_S, dtype=float), np.asarray(lengths_S)
    right = rewards[chosen] > rewards[rejected]
    longer, difference = np.maximum(lengths[chosen], lengths[rejected]), lengths[chosen] - lengths[rejected]
    like = np.abs(difference) <= _LIKE * longer
    varied = len(set(lengths_S)) > 1 and len(set(logps_S)) > 1

    def among(true: np.ndarray, counted: np.ndarray) -> Share:
        own = [prompt for prompt, counts in zip(prompts, counted, strict=True) if counts]
        return share(true[counted], own, bootstrap)

    return HeldOut(
        among(right, np.full(len(right), True)),
        among(right, like),
        among(difference > 0, difference != 0),
        float(spearmanr(logps_S, lengths).statistic) if varied else None,
        float(rewards.mean()) if len(rewards) else 0.0,
        float(rewards.std()) if len(rewards) else 1.0,
    )


@torch.no_grad()
def evaluate(
    model: ResponseModel, loss: Loss, loader: DataLoader[Any], device: torch.device, bootstrap: Bootstrap
) -> HeldOut:
    """`held_out` of the pairs of a loader."""
    model.to(device).eval()
    rewards: list[float] = []
    logps: list[float] = []
    lengths: list[int] = []
    pairs: list[tuple[int, int]] = []
    prompts: list[int] = []
    for batch in loader:
        first = len(logps)
        logps_S = model({key: value.to(device) for key, value in batch.items()}).cpu()
        rewards += implicit_rewards(loss, logps_S, batch["response"], batch.get("reference")).tolist()
        logps += logps_S.tolist()
        lengths += torch.bincount(batch["response"]).tolist()
        sides = (batch["chosen"] + first).tolist(), (batch["rejected"] + first).tolist()
        pairs += zip(*sides, strict=True)
        prompts += batch["prompt"].tolist()
    return held_out(rewards, logps, lengths, pairs, prompts, bootstrap)
