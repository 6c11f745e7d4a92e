"""What a comparison may claim: differences with their intervals, prompts resampled together (paired bootstrap).

Shapes: P prompts, N points of a method, M objectives, R resamples, K values of KL.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import moocore
import numpy as np
import pandas as pd
from scipy import stats

from pipeline.config.judges import Judge

_DRAWN = 2_000_000  # values that a bootstrap draws at once, 16 MB; in how many parts it draws them changes no interval


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are drawn: percentiles of resampled means."""

    confidence: float = 0.95
    resamples: int = 2000
    seed: int = 0

    @classmethod
    def of(cls, judge: Judge, seed: int) -> "Bootstrap":
        """As the judge's section and the run's seed say."""
        return cls(judge.confidence, judge.resamples, seed)

    def interval(self, *samples: np.ndarray, statistic: Callable[..., Any] = np.mean) -> tuple[float, float]:
        """The percentile interval of a statistic of paired samples, prompts resampled together: (low, high)."""
        bounds = stats.bootstrap(
            samples, statistic, paired=True, confidence_level=self.confidence, n_resamples=self.resamples,
            method="percentile", batch=max(1, _DRAWN // len(samples[0])), rng=np.random.default_rng(self.seed),
        ).confidence_interval  # fmt: skip
        return float(bounds.low), float(bounds.high)


def hypervolume(scores_NM: np.ndarray, reference_M: Sequence[float]) -> float:
    """Volume between the reference point and the front; points below the reference, or without a score, add nothing.

    Raises:
        ValueError: a coordinate of the reference point is not finite; moocore's answer would be 0.
    """
    reference = np.asarray(reference_M, dtype=float)
    if not np.isfinite(reference).all():
        raise ValueError(f"the reference point {reference} is not finite.")
    return float(moocore.hypervolume(scores_NM[~np.isnan(scores_NM).any(axis=1)], ref=reference, maximise=True))


def prompt_means(rows: pd.DataFrame, objective: str) -> np.ndarray:
    """An objective's mean score of every prompt that has one: undetermined verdicts are none."""
    return rows.groupby("prompt")[objective].mean().dropna().to_numpy()


def bootstrap_mean(values_N: np.ndarray, bootstrap: Bootstrap) -> tuple[float, float, float]:
    """Mean and percentile-bootstrap interval: (mean, low, high); NaN where there are no values."""
    if not len(values_N):
        return np.nan, np.nan, np.nan
    mean = float(np.mean(values_N))
    if np.ptp(values_N) == 0:
        return mean, mean, mean
    return mean, *bootstrap.interval(values_N)


def gap_recovered(
    guided_P: np.ndarray, control_P: np.ndarray, tuned_P: np.ndarray, bootstrap: Bootstrap
) -> tuple[float, float, float] | None:
    """(guided − control) / (tuned − control) with its percentile interval: (value, low, high).

    The weak-to-strong measure of Burns et al. (arXiv 2312.09390) with guidance in the place of weak supervision.
    Prompts are resampled together (paired bootstrap). None where the interval of the gap itself, tuned − control,
    includes 0, or no prompt has all three: a share of nothing is not defined.
    """
    gap_P = tuned_P - control_P
    _, low, high = bootstrap_mean(gap_P, bootstrap)
    if not (low > 0 or high < 0):
        return None
    gain_P = guided_P - control_P
    ratio = gain_P.mean() / gap_P.mean()
    if np.ptp(gain_P) == 0 and np.ptp(gap_P) == 0:
        return float(ratio), float(ratio), float(ratio)
    shares = bootstrap.interval(gain_P, gap_P, statistic=lambda gain, gap, axis=-1: gain.mean(axis) / gap.mean(axis))
    return float(ratio), *shares


def resampled_means(values_PX: np.ndarray, bootstrap: Bootstrap) -> np.ndarray:
    """Means over prompts of every bootstrap sample: means_RX. Equal seeds and P draw the same prompts."""
    prompts = len(values_PX)
    drawn_RP = np.random.default_rng(bootstrap.seed).multinomial(
        prompts, np.full(prompts, 1 / prompts), size=bootstrap.resamples
    )
    flat_RX = drawn_RP @ values_PX.reshape(prompts, -1) / prompts
    return flat_RX.reshape(bootstrap.resamples, *values_PX.shape[1:])


def interval(values_R: np.ndarray, confidence: float) -> tuple[float, float]:
    """The percentile interval of resampled values: (low, high)."""
    low, high = np.quantile(values_R, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def p_value(differences_R: np.ndarray) -> float:
    """The two-sided bootstrap p-value of no difference; never below 2 / (R + 1)."""
    beyond = min((differences_R <= 0).sum(), (differences_R >= 0).sum())
    return min(1.0, 2 * (1 + float(beyond)) / (1 + len(differences_R)))


def holm(p_N: np.ndarray) -> np.ndarray:
    """P-values corrected for their number (Holm 1979), which holds however they depend on each other; NaN stays."""
    order = np.argsort(p_N)  # NaN last
    tests = np.isfinite(p_N).sum()
    corrected = np.maximum.accumulate(p_N[order] * np.maximum(1, tests - np.arange(len(p_N))))
    return np.minimum(1.0, corrected)[np.argsort(order)]


def hypervolume_difference(
    one_PNM: np.ndarray, other_PNM: np.ndarray, reference_M: Sequence[float], bootstrap: Bootstrap
) -> tuple[float, float, float, float]:
    """Hypervolume of one method's mean scores minus another's: (difference, low, high, p-value).

    Both were asked the same prompts; the numbers of their points may differ.
    """
    difference = hypervolume(one_PNM.mean(0), reference_M) - hypervolume(other_PNM.mean(0), reference_M)
    means = (resampled_means(values, bootstrap) for values in (one_PNM, other_PNM))
    differences_R = np.array(
        [
            hypervolume(one_NM, reference_M) - hypervolume(other_NM, reference_M)
            for one_NM, other_NM in zip(*means, strict=True)
        ]
    )
    return difference, *interval(differences_R, bootstrap.confidence), p_value(differences_R)


def reward_at(kl_N: np.ndarray, reward_N: np.ndarray, kl_K: np.ndarray) -> np.ndarray:
    """Reward at given KL on the line through a method's points, in order of their KL: reward_K, NaN beyond them."""
    order = np.argsort(kl_N, kind="stable")
    return np.interp(kl_K, kl_N[order], reward_N[order], left=np.nan, right=np.nan)


def resampled_rewards(kl_PN: np.ndarray, reward_PN: np.ndarray, kl_K: np.ndarray, bootstrap: Bootstrap) -> np.ndarray:
    """`reward_at` of every bootstrap sample: rewards_RK; beyond a sample's last point, the reward of that point.

    The KL of the points is resampled with their rewards: it is measured too.
    """
    both_RN2 = resampled_means(np.stack([kl_PN, reward_PN], axis=2), bootstrap)
    rows = []
    for means_N2 in both_RN2:
        order = np.argsort(means_N2[:, 0], kind="stable")
        rows.append(np.interp(kl_K, means_N2[order, 0], means_N2[order, 1]))
    return np.stack(rows)


@dataclass(frozen=True)
class Share:
    """A share of pairs with an interval over their prompts; None without pairs."""

    value: float | None
    ci_low: float | None
    ci_high: float | None
    pairs: int
    prompts: int  # that the pairs are of

    def __str__(self) -> str:
        if self.value is None:
            return "no such pairs"
        return f"{self.value:.3f} [{self.ci_low:.3f}, {self.ci_high:.3f}], {self.pairs} pairs of {self.prompts} prompts"


def share(right: Sequence[float], prompts: Sequence[Hashable], bootstrap: Bootstrap) -> Share:
    """The share of pairs that is true, with a percentile interval that resamples prompts with all of their pairs.

    Pairs of one prompt share responses, so they are no independent cases. Where all prompts agree there is nothing to
    resample: the interval is then Wilson's, with the prompts as its cases.

    Args:
        right: of each pair, 1/2 where it is neither.
        prompts: the prompt that each pair is of.
        bootstrap: of the interval.
    """
    if not len(right):
        return Share(None, None, None, 0, 0)
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    places = [numbers[prompt] for prompt in prompts]
    counts_P2 = np.stack([np.bincount(places, np.asarray(right, dtype=float)), np.bincount(places)], axis=1)
    value = float(counts_P2[:, 0].sum() / counts_P2[:, 1].sum())
    if np.ptp(counts_P2[:, 0] / counts_P2[:, 1]) == 0:
        low, high = _wilson(value, len(counts_P2), bootstrap.confidence)
    else:
        means_R2 = resampled_means(counts_P2, bootstrap)
        low, high = interval(means_R2[:, 0] / means_R2[:, 1], bootstrap.confidence)
    return Share(value, low, high, len(right), len(counts_P2))


def _wilson(value: float, cases: int, confidence: float) -> tuple[float, float]:
    """Wilson's score interval of a share; scipy has it of whole counts only."""
    squared = float(stats.norm.ppf((1 + confidence) / 2)) ** 2 / cases
    centre = (value + squared / 2) / (1 + squared)
    half = (squared * value * (1 - value) + squared**2 / 4) ** 0.5 / (1 + squared)
    return max(0.0, centre - half), min(1.0, centre + half)


def best_of_kl(n: int, logp: float, logp_base: float) -> float:
    """An upper bound of the KL to the base of the best of n samples, averaged over rows.

    The KL to the law that was sampled from is at most log n − (n − 1) / n (Beirami et al., arXiv 2401.01879); what that
    law itself has to the base at temperature 1 comes in by the log-probabilities of the sample that was chosen.
    """
    return math.log(n) - (n - 1) / n + logp - logp_base
