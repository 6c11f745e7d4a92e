"""PARM (Lin et al., ICML 2025) and UniARM (arXiv 2602.09538): an adapter conditioned on the weights guides."""

from pipeline.config.errors import UserError
from pipeline.config.points import Mix, policy_lane
from pipeline.generation.methods import Law, Place
from pipeline.models.conditioned_arm import adapter_at


def law(kind: str, mix: Mix, place: Place) -> Law:
    """log π_base + Σα · log π_r(w), with the ARM at the mix's shares and the sum of the weights in the place of α.

    Raises:
        UserError: none of the kind is trained.
    """
    rivals = place.params.tune.rivals
    name = next((name for name, rival in rivals.items() if rival.kind == kind), None)
    if name is None:
        raise UserError(f"no {kind} is trained: add one to tune.rivals, with kind: {kind}.")
    source = place.rival(name)
    point = f"{name}-{mix.point}"
    folder = place.derived(point, [source], mix.shares, lambda target: adapter_at(source, mix.shares, target))
    return Law(
        {policy_lane(folder.name): mix.strength * sum(mix.weights.values())},
        {policy_lane(folder.name): folder},
        {source},
    )
