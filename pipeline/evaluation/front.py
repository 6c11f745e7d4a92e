"""Multi-objective measures, all maximised: dominance, hypervolume, mean inner product, rank correlation, intervals.

Shapes: N points, M objectives.
"""

from collections.abc import Mapping, Sequence

import moocore
import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from pipeline.config.points import PointLaw
from pipeline.config.schema import Objective
from pipeline.evaluation.statistics import Bootstrap, bootstrap_mean, hypervolume, prompt_means
from pipeline.evaluation.text_quality import quality_columns


def non_dominated(scores_NM: np.ndarray) -> np.ndarray:
    """Which points no other point beats (as good everywhere, better somewhere): mask_N.

    A point without one of the scores is not among them, and beats none.
    """
    kept_N = ~np.isnan(scores_NM).any(axis=1)
    if kept_N.any():
        kept_N[kept_N] = moocore.is_nondominated(scores_NM[kept_N], maximise=True, keep_weakly=True)
    return kept_N


def mean_inner_product(weights_NM: np.ndarray, scores_NM: np.ndarray) -> float:
    """MIP (PARM, Lin et al. 2025): mean over points of ⟨w, score⟩, weights scaled so that |w| sums to 1."""
    shares_NM = weights_NM / np.abs(weights_NM).sum(axis=1, keepdims=True)
    return float((shares_NM * scores_NM).sum(axis=1).mean())


def knee(scores_NM: np.ndarray) -> int | None:
    """The point that bulges most: where giving up more of one objective begins to bring little of another.

    Of the points that no other beats, the one farthest out from the hyperplane through the best of each objective, all
    scores scaled to those points' range (Das 1999, "On characterizing the knee of the Pareto curve"). None where no
    point lies outside of it, or there is nothing to give up.
    """
    kept = np.flatnonzero(non_dominated(scores_NM))
    if scores_NM.shape[1] < 2 or not len(kept):
        return None
    low_M, high_M = scores_NM[kept].min(0), scores_NM[kept].max(0)
    if not (high_M > low_M).all():
        return None
    scaled_NM = (scores_NM[kept] - low_M) / (high_M - low_M)
    # Scaled so that the best of each is at 1; where the others are 0 there, the hyperplane is Σ = 1.
    corners_MM = scaled_NM[scaled_NM.argmax(0)]
    normal_M, *_ = np.linalg.lstsq(corners_MM, np.ones(len(corners_MM)), rcond=None)
    out_N = scaled_NM @ normal_M - 1
    return int(kept[out_N.argmax()]) if out_N.max() > 1e-9 else None


def rank_correlation(weights_N: np.ndarray, scores_N: np.ndarray) -> float | None:
    """Spearman's ρ between an objective's weight and its score; None where either never changes."""
    if len(set(weights_N)) < 2 or len(set(scores_N)) < 2:
        return None
    return float(spearmanr(weights_N, scores_N).statistic)


def front_table(
    base: str,
    laws: Mapping[str, PointLaw],
    objectives: Mapping[str, Objective],
    scored: pd.DataFrame,
    wins: pd.DataFrame,
    bootstrap: Bootstrap,
) -> pd.DataFrame:
    """front.csv: one line per point with weights, scores and their intervals, cost in KL, win rates.

    Args:
        base: the name of the model that is steered.
        laws: those of the points.
        objectives: of the run.
        scored: the judged rows.
        wins: what `win_rates` returns of them.
        bootstrap: of the intervals, which resample prompts.
    """
    lines = []
    for name, law in laws.items():
        rows = scored[scored.point == name]
        line: dict[str, object] = {
            "method": law.method,
            "base": base,
            "point": name,
        }
        line |= {f"alpha_{objective}": law.alphas.get(objective, 0.0) for objective in objectives}
        line["temperature"] = law.temperature
        intervals = {objective: bootstrap_mean(prompt_means(rows, objective), bootstrap) for objective in objectives}
        line |= {f"score_{objective}": interval[0] for objective, interval in intervals.items()}
        line |= {f"ci_low_{objective}": interval[1] for objective, interval in intervals.items()}
        line |= {f"ci_high_{objective}": interval[2] for objective, interval in intervals.items()}
        line["kl"] = rows.kl.mean()
        won = wins[wins.point == name].set_index("objective").win_rate
        line |= {f"win_rate_{objective}": won[objective] for objective in objectives}
        line |= quality_columns(rows, objectives, bootstrap)
        line["n_tokens"] = rows.n_tokens.mean()
        line["forwards_per_token"] = law.models
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


def front_metrics(objectives: Mapping[str, Objective], front: pd.DataFrame) -> dict[str, object]:
    """metrics.json: hypervolume of the sweep and of the unguided points, MIP, size of the front, rank correlations.

    Of the readable hypervolumes, a response that one cannot read counts as at the reference point.

    MIP and rank correlations are those of each method of guidance: a weight of one is not a weight of another.
    """
    scores = [f"score_{objective}" for objective in objectives]
    reference = [objective.reference for objective in objectives.values()]
    readable = [f"readable_{objective}" for objective in objectives]
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
        "readable_hypervolume": hypervolume(front[readable].to_numpy(), reference),
        "readable_hypervolume_controls": hypervolume(controls[readable].to_numpy(), reference)
        if len(controls)
        else 0.0,
        "reference": dict(zip(objectives, reference, strict=True)),
        "mip": mip,
        "n_front": int(front.on_front.sum()),
        "knee": None if (place := knee(front[scores].to_numpy())) is None else front.point.iloc[place],
        "spearman": spearman,
    }
