"""A small classifier of texts: logistic regression on words and pairs of words, readable and a second to fit.

It says how far two sets of responses differ before anything is trained on them, and how much like the one set a new
text is. It sees which words there are, each text scaled to length 1, so that long texts do not count as such.

Shapes: N texts, F features.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import csr_array

_WORD = re.compile(r"\w+(?:['’]\w+)*")
_FEWEST_TEXTS = 2  # that a feature must be in
_MOST_FEATURES = 20_000
_PENALTY = 0.1  # of the squared weights, beside the sum of the log-losses
_DIGITS = 4


def features_of(text: str) -> set[str]:
    """The words of a text and its pairs of neighbours, in small letters."""
    words = _WORD.findall(text.lower())
    return {*words, *(f"{one} {other}" for one, other in pairwise(words))}


@dataclass(frozen=True)
class TextClassifier:
    """The log-odds that a text is of the first set: bias + Σ weights of its features / √(their number)."""

    weights: Mapping[str, float]
    bias: float = 0.0

    @classmethod
    def fit(cls, first: Sequence[str], second: Sequence[str]) -> "TextClassifier":
        """From texts of the two sets, by L-BFGS with an L2 penalty; none of either set gives no weights."""
        texts = [features_of(text) for text in (*first, *second)]
        counts = Counter(feature for features in texts for feature in features)
        common = [feature for feature, count in counts.most_common(_MOST_FEATURES) if count >= _FEWEST_TEXTS]
        if not common or not first or not second:
            return cls({})
        places = {feature: place for place, feature in enumerate(sorted(common))}
        rows = [sorted(places[feature] for feature in features if feature in places) for features in texts]
        scale = np.repeat([1 / math.sqrt(len(features) or 1) for features in texts], [len(row) for row in rows])
        starts = np.cumsum([0, *map(len, rows)])
        matrix_NF = csr_array((scale, np.concatenate([*rows, []]).astype(int), starts), (len(texts), len(places)))
        sign_N = np.repeat([1.0, -1.0], [len(first), len(second)])

        def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
            margins_N = sign_N * (matrix_NF @ weights[:-1] + weights[-1])
            slope_N = -sign_N / (1 + np.exp(np.clip(margins_N, -500, 500)))
            gradient = np.append(matrix_NF.T @ slope_N + 2 * _PENALTY * weights[:-1], slope_N.sum())
            return float(np.logaddexp(0, -margins_N).sum() + _PENALTY * weights[:-1] @ weights[:-1]), gradient

        solution = minimize(loss, np.zeros(len(places) + 1), jac=True, method="L-BFGS-B", options={"maxiter": 200}).x
        weights = {name: round(float(solution[place]), _DIGITS) for name, place in places.items()}
        return cls({name: weight for name, weight in weights.items() if weight}, round(float(solution[-1]), _DIGITS))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "TextClassifier":
        """From what `to_json` made."""
        return cls(value["weights"], value["bias"])

    def to_json(self) -> dict[str, Any]:
        """As a JSON value."""
        return {"bias": self.bias, "weights": dict(self.weights)}

    def log_odds(self, text: str) -> float:
        """How much likelier the text is of the first set, in nats."""
        features = features_of(text)
        return self.bias + sum(self.weights.get(name, 0.0) for name in sorted(features)) / math.sqrt(len(features) or 1)

    def probability(self, text: str) -> float:
        """The probability that the text is of the first set, in (0, 1)."""
        return 1 / (1 + math.exp(-max(-500.0, min(500.0, self.log_odds(text)))))

    def strongest(self, count: int) -> tuple[list[str], list[str]]:
        """The features that speak most for the first set, and most for the second."""
        ranked = sorted(self.weights, key=lambda name: (-self.weights[name], name))
        return (
            [name for name in ranked[:count] if self.weights[name] > 0],
            [name for name in ranked[::-1][:count] if self.weights[name] < 0],
        )
