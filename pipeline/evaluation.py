"""How good an ARM is on held-out pairs, and how much of that is length.

Shapes: S responses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest, spearmanr
from torch.utils.data import DataLoader

from pipeline.arm import ResponseModel
from pipeline.losses import implicit_rewards
from pipeline.params import Loss

_LIKE = 0.1  # responses whose lengths differ by at most this share of the longer one count as equally long


@dataclass(frozen=True)
class Share:
    """A share of pairs with its Wilson score interval; None without pairs."""

    value: float | None
    ci_low: float | None
    ci_high: float | None
    pairs: int

    def __str__(self) -> str:
        if self.value is None:
            return "no such pairs"
        return f"{self.value:.3f} (Wilson {self.ci_low:.3f} to {self.ci_high:.3f}, {self.pairs} pairs)"


@dataclass(frozen=True)
class HeldOut:
    """What an ARM does on pairs it has not seen."""

    accuracy: Share
    length_matched: Share  # accuracy on pairs of equally long responses
    chosen_longer: Share  # how often a judge that only counts tokens would be right
    length_correlation: float | None  # Spearman's, of log π_r(y|x) with the number of tokens of y
    reward_mean: float  # of what the loss compares, over the responses
    reward_std: float


def share(right: Sequence[bool], confidence: float) -> Share:
    """The share that is true, with its Wilson score interval."""
    if not len(right):
        return Share(None, None, None, 0)
    found = binomtest(int(sum(right)), len(right))
    interval = found.proportion_ci(confidence, method="wilson")
    return Share(found.statistic, float(interval.low), float(interval.high), len(right))


def held_out(
    rewards_S: Sequence[float],
    logps_S: Sequence[float],
    lengths_S: Sequence[int],
    pairs: Sequence[tuple[int, int]],
    confidence: float,
) -> HeldOut:
    """Accuracy and length bias from the rewards of responses and the pairs among them.

    Args:
        rewards_S: what the loss compares: log π_r(y|x) itself, its mean over tokens, or its ratio to a reference.
        logps_S: log π_r(y|x) of each response.
        lengths_S: its tokens.
        pairs: (chosen, rejected) as places among the responses.
        confidence: of the intervals.
    """
    chosen, rejected = np.array(pairs, dtype=int).reshape(-1, 2).T
    rewards, lengths = np.asarray(rewards_S, dtype=float), np.asarray(lengths_S)
    right = rewards[chosen] > rewards[rejected]
    longer, difference = np.maximum(lengths[chosen], lengths[rejected]), lengths[chosen] - lengths[rejected]
    like = np.abs(difference) <= _LIKE * longer
    varied = len(set(lengths_S)) > 1 and len(set(logps_S)) > 1
    return HeldOut(
        share(right, confidence),
        share(right[like], confidence),
        share((difference > 0)[difference != 0], confidence),
        float(spearmanr(logps_S, lengths).statistic) if varied else None,
        float(rewards.mean()) if len(rewards) else 0.0,
        float(rewards.std()) if len(rewards) else 1.0,
    )


@torch.no_grad()
def evaluate(
    model: ResponseModel, loss: Loss, loader: DataLoader[Any], device: torch.device, confidence: float
) -> HeldOut:
    """`held_out` of the pairs of a loader."""
    model.to(device).eval()
    rewards: list[float] = []
    logps: list[float] = []
    lengths: list[int] = []
    pairs: list[tuple[int, int]] = []
    for batch in loader:
        first = len(logps)
        logps_S = model({key: value.to(device) for key, value in batch.items()}).cpu()
        rewards += implicit_rewards(loss, logps_S, batch["response"], batch.get("reference")).tolist()
        logps += logps_S.tolist()
        lengths += torch.bincount(batch["response"]).tolist()
        sides = (batch["chosen"] + first).tolist(), (batch["rejected"] + first).tolist()
        pairs += zip(*sides, strict=True)
    return held_out(rewards, logps, lengths, pairs, confidence)
