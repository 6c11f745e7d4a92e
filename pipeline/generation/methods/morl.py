"""One policy for each mix of objectives.

MORL by DPO trains it on the pairs of all objectives, each weighing its share: the scalarised loss Σ_i w_i L_DPO,i (the
DPO loss-weighting baseline of MODPO, Zhou et al. 2024). RLOO trains it on its own samples.
"""

from typing import Literal

from pipeline.config.errors import UserError
from pipeline.config.points import BASE, Mix, policy_lane
from pipeline.generation.methods import Law, Place


def law(kind: Literal["dpo", "rloo"], mix: Mix, place: Place) -> Law:
    """The policy of the mix, and as much of the base as the strength leaves.

    Raises:
        UserError: no policy was trained for these weights.
    """
    rival = next(
        (
            name
            for name, rival in place.params.tune.rivals.items()
            if rival.kind == kind and Mix(name, rival.weights, 1.0).shares == mix.shares
        ),
        None,
    )
    if rival is None:
        raise UserError(f"no {kind} policy is trained for the weights of point {mix.point}: add it to tune.rivals.")
    lane, folder = policy_lane(rival), place.rival(rival)
    return Law({BASE: 1 - mix.strength, lane: mix.strength}, {lane: folder}, [folder])
