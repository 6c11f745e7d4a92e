"""GenARM (Xu et al., ICLR 2025), its log-ratio form, and both with policies in the place of the ARMs."""

from pipeline.config.methods import GenArm
from pipeline.config.points import BASE, Mix, point_weights, policy_lane
from pipeline.config.schema import Point
from pipeline.generation.methods import Law, Place


def law(method: GenArm, mix: Mix, place: Place) -> Law:
    """log π_base + Σ α_i log π_r,i, α_i being weight times strength; or its log-ratio form.

    With policies in the place of the ARMs the effect of the training loss is separated from that of the decoding law.
    """
    alphas = {name: weight * mix.strength for name, weight in mix.weights.items()}
    if method.arms == "policies":
        folders = {policy_lane(name): place.rival(name) for name in alphas}
        rest = {} if method.form == "plain" else {BASE: 1 - sum(alphas.values())}
        lanes = {policy_lane(name): alpha for name, alpha in alphas.items()}
        return Law({**rest, **lanes}, folders, folders.values())
    weights = point_weights(Point(alphas, form=method.form), place.params.arm.base == place.base)
    return Law(weights, trained=[place.workspace.arm(name) for name in alphas])
