"""GenARM (Xu et al., ICLR 2025) and its variants: the log-ratio form, and guidance where the base is unsure.

The gate is that of SIA: at tokens the base is sure of, it goes on alone.
"""

from pipeline.baselines import Law, Mix, Place
from pipeline.config import GenArm, Point
from pipeline.generation import point_weights


def law(method: GenArm, mix: Mix, place: Place) -> Law:
    """log π_base + Σ α_i log π_r,i, α_i being weight times strength; its log-ratio form; either of them gated."""
    alphas = {name: weight * mix.strength for name, weight in mix.weights.items()}
    weights = point_weights(Point(alphas, form=method.form), place.params, place.params.base)
    return Law(weights, trained=[place.workspace.arm(name) for name in alphas], gate=method.gate)
