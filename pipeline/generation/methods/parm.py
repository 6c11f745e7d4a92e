"""PARM (Lin et al., ICML 2025) as a law: one adapter, conditioned on the weights, guides the base."""

from pipeline.config.errors import UserError
from pipeline.config.points import Mix, policy_lane
from pipeline.generation.methods import Law, Place
from pipeline.models.parm import adapter_at


def law(mix: Mix, place: Place) -> Law:
    """log π_base + Σα · log π_r(w), with the PARM at the mix's shares and the sum of the weights in the place of α.

    Raises:
        UserError: none is trained.
    """
    rivals = place.params.tune.rivals
    name = next((name for name, rival in rivals.items() if rival.kind == "parm"), None)
    if name is None:
        raise UserError("no PARM is trained: add one to tune.rivals, with kind: parm.")
    source = place.rival(name)
    folder = adapter_at(source, mix.shares, place.derived / f"{name}-{mix.point}")
    return Law(
        {policy_lane(folder.name): mix.strength * sum(mix.weights.values())},
        {policy_lane(folder.name): folder},
        {source},
    )
