"""Multi-objective measures, all maximised: dominance, hypervolume, mean inner product, rank correlation, intervals.

Shapes: N points, M objectives.
"""

from collections.abc import Sequence
from itertools import pairwise

import moocore
import numpy as np
import pandas as pd
from scipy.stats import bootstrap, spearmanr

from pipeline.config.points import BASE, point_temperature, point_weights
from pipeline.config.schema import Params
from pipeline.evaluation.statistics import hypervolume

_DRAWN = 2_000_000  # values that a bootstrap draws at once, 16 MB; in how many parts it draws them changes no interval


def non_dominated(scores_NM: np.ndarray) -> np.ndarray:
    """Which points no other point beats (as good everywhere, better somewhere): mask_N."""
    return np.asarray(moocore.is_nondominated(scores_NM, maximise=True, keep_weakly=True), dtype=bool)


def mean_inner_product(weights_NM: np.ndarray, scores_NM: np.ndarray) -> float:
    """MIP (PARM, Lin et al. 2025): mean over points of ⟨w, score⟩, weights scaled so that |w| sums to 1."""
    shares_NM = weights_NM / np.abs(weights_NM).sum(axis=1, keepdims=True)
    return float((shares_NM * scores_NM).sum(axis=1).mean())


def rank_correlation(weights_N: np.ndarray, scores_N: np.ndarray) -> float | None:
    """Spearman's ρ between an objective's weight and its score; None where either never changes."""
    if len(set(weights_N)) < 2 or len(set(scores_N)) < 2:
        return None
    return float(spearmanr(weights_N, scores_N).statistic)


def bootstrap_mean(values_N: np.ndarray, confidence: float, resamples: int, seed: int) -> tuple[float, float, float]:
    """Mean and percentile-bootstrap interval: (mean, low, high); NaN where there are no values."""
    if not len(values_N):
        return np.nan, np.nan, np.nan
    mean = float(np.mean(values_N))
    if np.ptp(values_N) == 0:
        return mean, mean, mean
    interval = bootstrap(
        (values_N,), np.mean, confidence_level=confidence, n_resamples=resamples, method="percentile",
        batch=max(1, _DRAWN // len(values_N)), rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return mean, float(interval.low), float(interval.high)


def gap_recovered(
    guided_P: np.ndarray, control_P: np.ndarray, tuned_P: np.ndarray, confidence: float, resamples: int, seed: int
) -> tuple[float, float, float] | None:
    """(guided − control) / (tuned − control) with its percentile interval: (value, low, high).

    The weak-to-strong measure of Burns et al. (arXiv 2312.09390) with guidance in the place of weak supervision.
    Prompts are resampled together (paired bootstrap). None where the interval of the gap itself, tuned − control,
    includes 0, or no prompt has all three: a share of nothing is not defined.
    """
    gap_P = tuned_P - control_P
    _, low, high = bootstrap_mean(gap_P, confidence, resamples, seed)
    if not (low > 0 or high < 0):
        return None
    gain_P = guided_P - control_P
    ratio = gain_P.mean() / gap_P.mean()
    if np.ptp(gain_P) == 0 and np.ptp(gap_P) == 0:
        return float(ratio), float(ratio), float(ratio)
    interval = bootstrap(
        (gain_P, gap_P), lambda gain, gap, axis=-1: gain.mean(axis) / gap.mean(axis), paired=True, vectorized=True,
        confidence_level=confidence, n_resamples=resamples, method="percentile",
        batch=max(1, _DRAWN // len(gap_P)), rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return float(ratio), float(interval.low), float(interval.high)


def distinct_2(texts: Sequence[str]) -> float:
    """Distinct word bigrams over all word bigrams of the texts (Li et al. 2016); 0 without bigrams."""
    count, distinct = 0, set()
    for text in texts:
        bigrams = list(pairwise(text.lower().split()))
        count += len(bigrams)
        distinct.update(bigrams)
    return len(distinct) / count if count else 0.0


def prompt_means(rows: pd.DataFrame, objective: str) -> np.ndarray:
    """An objective's mean score of every prompt that has one: undetermined verdicts are none."""
    return rows.groupby("prompt")[objective].mean().dropna().to_numpy()


def front_table(params: Params, scored: pd.DataFrame, wins: pd.DataFrame) -> pd.DataFrame:
    """front.csv: one line per point with weights, scores and their intervals, cost in KL, win rates.

    Args:
        scored: the judged rows; intervals resample prompts.
        wins: what `win_rates` found.
    """
    judge, objectives = params.judge, list(params.objectives)
    lines = []
    for name, point in params.sweep.points.items():
        mine = scored[scored.point == name]
        line: dict[str, object] = {
            "method": point.method,
            "base": params.base,
            "point": name,
        }
        line |= {f"alpha_{objective}": point.weights.get(objective, 0.0) for objective in objectives}
        line["temperature"] = point_temperature(point, params)
        weights = point_weights(point, params, params.base)
        intervals = {
            objective: bootstrap_mean(
                prompt_means(mine, objective),
                judge.confidence,
                judge.resamples,
                params.seed,
            )
            for objective in objectives
        }
        line |= {f"score_{objective}": interval[0] for objective, interval in intervals.items()}
        line |= {f"ci_low_{objective}": interval[1] for objective, interval in intervals.items()}
        line |= {f"ci_high_{objective}": interval[2] for objective, interval in intervals.items()}
        line["kl"] = mine.kl.mean()
        won = wins[wins.point == name].set_index("objective").win_rate
        line |= {f"win_rate_{objective}": won[objective] for objective in objectives}
        line["perplexity"] = float(np.exp(-mine.logp_base.sum() / mine.n_tokens.sum()))
        line["distinct_2"] = distinct_2(list(mine.response))
        line["n_tokens"] = mine.n_tokens.mean()
        line["forwards_per_token"] = 1 + sum(weight != 0 for name, weight in weights.items() if name != BASE)
        lines.append(line)
    table = pd.DataFrame(lines)
    table["on_front"] = non_dominated(table[[f"score_{objective}" for objective in objectives]].to_numpy())
    return table.round(4)


def long_scores(front: pd.DataFrame, objectives: Sequence[str]) -> pd.DataFrame:
    """The guided points as `method, point, objective, alpha, score`: a score against its own weight."""
    guided = front[front.method != "base"]
    parts = [
        pd.DataFrame(
            {
                "method": guided.method,
                "point": guided.point,
                "objective": name,
                "alpha": guided[f"alpha_{name}"],
                "score": guided[f"score_{name}"],
            }
        )
        for name in objectives
    ]
    return pd.concat(parts).sort_values(["objective", "method", "alpha"])


def front_metrics(params: Params, front: pd.DataFrame) -> dict[str, object]:
    """metrics.json: hypervolume of the sweep and of the unguided points, MIP, size of the front, rank correlations.

    MIP and rank correlations are those of each method of guidance: a weight of one is not a weight of another.
    """
    objectives = list(params.objectives)
    scores = [f"score_{objective}" for objective in objectives]
    reference = [params.objectives[objective].reference for objective in objectives]
    controls = front[front.method == "base"]
    mip, spearman = {}, {}
    for method, guided in front[front.method != "base"].groupby("method", sort=False):
        alphas_NM, scores_NM = guided[[f"alpha_{name}" for name in objectives]].to_numpy(), guided[scores].to_numpy()
        mip[method] = mean_inner_product(alphas_NM, scores_NM)
        ranks = map(rank_correlation, alphas_NM.T, scores_NM.T)
        spearman[method] = dict(zip(objectives, ranks, strict=True))
    return {
        "hypervolume": hypervolume(front[scores].to_numpy(), reference),
        "hypervolume_controls": hypervolume(controls[scores].to_numpy(), reference) if len(controls) else 0.0,
        "reference": dict(zip(objectives, reference, strict=True)),
        "mip": mip,
        "n_front": int(front.on_front.sum()),
        "spearman": spearman,
    }
