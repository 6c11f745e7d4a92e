"""MOD (Shi et al., NeurIPS 2024): decoding from the weighted geometric mean of the objectives' policies.

Weights on one objective alone leave its policy: DPO. A strength below 1 mixes with the base (Liu et al. 2024,
decoding-time realignment).
"""

from pipeline.config.points import BASE, Mix, policy_lane
from pipeline.generation.methods import Law, Place


def law(mix: Mix, place: Place) -> Law:
    """(1 − s) log π_base + s Σ w_i log π_i, s being the strength and w the shares."""
    lanes = {policy_lane(name): mix.strength * share for name, share in mix.shares.items()}
    folders = {policy_lane(name): place.rival(name) for name in mix.shares}
    return Law({BASE: 1 - mix.strength, **lanes}, folders, folders.values())
