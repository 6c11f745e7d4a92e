"""PARM (Lin et al., ICML 2025) and UniARM (arXiv 2602.09538): an adapter conditioned on the weights guides."""

from pipeline.config.errors import UserError
from pipeline.config.points import Mix, policy_lane
from pipeline.generation.methods import Law, Place


def law(kind: str, mix: Mix, place: Place) -> Law:
    """log π_base + Σα · log π_r(w): its adapters are of one mixture, which decoding knows how to read.

    Raises:
        UserError: none of the kind is trained.
    """
    rivals = place.params.tune.rivals
    name = next((name for name, rival in rivals.items() if rival.kind == kind), None)
    if name is None:
        raise UserError(f"no {kind} is trained: add one to tune.rivals, with kind: {kind}.")
    source = place.rival(name)
    lanes = {objective: policy_lane(f"{name}-{objective}") for objective in mix.weights}
    return Law(
        {lanes[objective]: mix.strength * weight for objective, weight in mix.weights.items()},
        {lane: source / objective for objective, lane in lanes.items()},
        {source},
    )
