"""Weights for an outcome: what measured weight vectors say of those between them, and which of those is best.

Shapes: P prompts, N measured weight vectors, C candidates, M objectives, K = M + 1 measures (the rewards, then the KL
to the base), R resamples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.interpolate import RBFInterpolator
from scipy.stats import qmc

from pipeline.config.errors import UserError
from pipeline.evaluation.statistics import Bootstrap, resampled_means

WORST = "worst"  # what is maximised: the lowest of the rewards
_SMOOTHING = np.geomspace(1e-4, 1e1, 11)  # of the surface, tried by leaving points out
_CANDIDATES = 2048  # weight vectors between which a choice is made
_ALONE = 64  # and those of one objective alone


@dataclass(frozen=True)
class Target:
    """What is asked for: the best of something subject to bounds on the rest."""

    at_least: Mapping[str, float] = field(default_factory=dict)  # the least reward, by objective
    maximise: str | None = None  # an objective, or `WORST`; None: as little KL to the base as possible
    kl: float | None = None  # the largest mean KL to the base, nats per response

    def check(self, objectives: Sequence[str]) -> None:
        """Refuse what no weights could be chosen for.

        Raises:
            UserError: an objective that there is not, or nothing but the base would be chosen.
        """
        for name in (*self.at_least, *([self.maximise] if self.maximise not in (None, WORST) else [])):
            if name not in objectives:
                raise UserError(f"there is no objective {name}: choose of {', '.join(objectives)}.")
        if self.maximise is None and not self.at_least:
            raise UserError("as little KL as possible is the base itself: say what to maximise, or at least how much.")
        for name, bound in self.at_least.items():
            if not np.isfinite(bound):
                raise UserError(f"at least {bound:g} of {name} is no bound: say a number.")
        if self.kl is not None and not 0 < self.kl < np.inf:
            raise UserError(f"a mean KL of {self.kl:g} nats bounds nothing: say a number above 0.")

    def value(self, measures_CK: np.ndarray, objectives: Sequence[str]) -> np.ndarray:
        """What is maximised: value_C."""
        if self.maximise is None:
            return -measures_CK[:, -1]
        if self.maximise == WORST:
            return measures_CK[:, :-1].min(axis=1)
        return measures_CK[:, list(objectives).index(self.maximise)]

    def shortfall(self, measures_CK: np.ndarray, objectives: Sequence[str]) -> np.ndarray:
        """By how much the bounds are missed, each as a share of itself, in sum: shortfall_C, 0 where none is."""
        bounds = [(list(objectives).index(name), bound, 1.0) for name, bound in self.at_least.items()]
        bounds += [] if self.kl is None else [(-1, self.kl, -1.0)]
        missed_CB = [
            np.maximum(0.0, sign * (bound - measures_CK[:, place])) / (abs(bound) or 1.0)
            for place, bound, sign in bounds
        ]
        return np.sum(missed_CB, axis=0) if missed_CB else np.zeros(len(measures_CK))

    def best(self, measures_CK: np.ndarray, objectives: Sequence[str]) -> int:
        """The candidate that misses least of the bounds, and of those the best."""
        return int(
            np.lexsort((-self.value(measures_CK, objectives), self.shortfall(measures_CK, objectives).round(6)))[0]
        )


@dataclass(frozen=True)
class Surface:
    """Rewards and KL over weight vectors, by thin-plate splines through what was measured.

    A spline that is smoothed is a linear map of the values at its nodes, so that every bootstrap sample of the prompts
    is another surface at no further cost. How much is smoothed is chosen for each measure by leaving points out.

    Args:
        weights_NM: what was measured; no two of them equal.
        measures_PNK: the rewards and the KL of every prompt.
        bootstrap: of the intervals.
    """

    weights_NM: np.ndarray
    measures_PNK: np.ndarray
    bootstrap: Bootstrap

    def predicted(self, candidates_CM: np.ndarray) -> np.ndarray:
        """What weight vectors bring: measures_CK."""
        return np.einsum("kcn,nk->ck", self._maps(candidates_CM), self.measures_PNK.mean(0))

    def interval(self, weights_M: np.ndarray) -> np.ndarray:
        """The percentile intervals of what a weight vector brings, prompts resampled: bounds_2K."""
        map_KN = self._maps(weights_M[None])[:, 0]
        values_RK = np.einsum("kn,rnk->rk", map_KN, resampled_means(self.measures_PNK, self.bootstrap))
        tail = (1 - self.bootstrap.confidence) / 2
        return np.quantile(values_RK, [tail, 1 - tail], axis=0)

    def _maps(self, candidates_CM: np.ndarray) -> np.ndarray:
        """Per measure, the weights of the measured values in each candidate's: maps_KCN."""
        means_NK, identity = self.measures_PNK.mean(0), np.eye(len(self.weights_NM))
        splines = [RBFInterpolator(self.weights_NM, identity, smoothing=smoothing) for smoothing in _SMOOTHING]
        at_nodes = [spline(self.weights_NM) for spline in splines]
        candidates = [spline(candidates_CM) for spline in splines]
        chosen = [
            int(np.argmin([_left_out_error(map_NN, of_measure_N) for map_NN in at_nodes]))
            for of_measure_N in means_NK.T
        ]
        return np.stack([candidates[place] for place in chosen])


def _left_out_error(map_NN: np.ndarray, values_N: np.ndarray) -> float:
    """The mean squared error at each point of a smoother that was fitted without it."""
    left_out_N = (values_N - map_NN @ values_N) / np.maximum(1 - np.diag(map_NN), 1e-9)
    return float(np.mean(left_out_N**2))


def candidates(most: float, objectives: int) -> np.ndarray:
    """Weight vectors whose sum is at most `most`, none negative, evenly spread, and those of one objective alone.

    Args:
        most: the largest sum.
        objectives: M.

    Returns:
        candidates_CM.

    Raises:
        ValueError: `most` is not above 0.
    """
    if most <= 0:
        raise ValueError(f"weights that sum to {most} at most are none.")
    alone_M = np.linspace(0, most, _ALONE + 1)[1:, None, None] * np.eye(objectives)
    # Sorted uniform numbers cut a stick into pieces that are uniform on the simplex; the last piece is left over.
    cuts = np.sort(qmc.Sobol(objectives, seed=0).random(_CANDIDATES), axis=1)
    return np.concatenate([most * np.diff(cuts, axis=1, prepend=0.0), alone_M.reshape(-1, objectives)])
