"""What the points of a sweep mean to the decoder: exponents by lane, temperatures, mixes."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.config.schema import Params, Point


@dataclass(frozen=True)
class PointLaw:
    """What a point of the sweep asks of the decoder."""

    method: str  # what is sampled from, as tables name it
    alphas: Mapping[str, float]  # of the objectives
    weights: Mapping[str, float]  # the exponents of the law, by lane
    temperature: float
    models: int  # that read every token: the base, and an ARM for each objective or one for all


def point_laws(params: Params, base: str) -> dict[str, PointLaw]:
    """The laws of all points on a base.

    An unguided point's temperature is divided by 1 + Σα of the guidance that it is to be as sharp as.
    """
    own, laws = params.arm.base == base, {}
    for name, point in params.sweep.points.items():
        weights, method = point_weights(point, own), point.method
        lanes = {lane for lane, weight in weights.items() if weight} | {BASE}
        models = len(lanes)
        if params.arm.for_all_mixes:
            method = method.replace("genarm", params.arm.kind)
            models -= max(0, len(lanes & point.weights.keys()) - 1)
        temperature = round(params.decoding.temperature / (1 + point.sharpen), 4)
        laws[name] = PointLaw(method, point.weights, weights, temperature, models)
    return laws


def point_weights(point: Point, own: bool) -> dict[str, float]:
    """The exponents of the point's law, by lane (`Point.method` names the laws).

    The log-ratio form takes from what the ARMs were made from what it gives to them: where that is the base itself
    (`own`), the base's own exponent falls.
    """
    weights = dict(point.weights)
    if point.form == "dpo":
        return {BASE: 0.0, **{policy_lane(name): alpha for name, alpha in weights.items()}}
    if point.form == "alone":
        return {BASE: 0.0, **weights}
    if point.form == "log_ratio":
        total = sum(weights.values())
        return weights | ({BASE: 1.0 - total} if own else {REFERENCE: -total})
    return weights


def policy_lane(rival: str) -> str:
    """The lane of an adapter of the base that was tuned for comparison; for one objective it has that one's name."""
    return f"{_POLICY}{rival}"


def rival_of(lane: str) -> str | None:
    """The name of what was tuned that a lane stands for, as `policy_lane` writes it; None of any other lane."""
    return lane.removeprefix(_POLICY) if lane.startswith(_POLICY) else None


_POLICY = "policy/"


BASE = "base"  # the name of the base's own lane


REFERENCE = "reference"  # that of the model which the ARMs were made from, where that is another


@dataclass(frozen=True)
class Mix:
    """What a row is asked for."""

    point: str  # of the sweep
    weights: Mapping[str, float]  # of the objectives, above 0
    strength: float  # by which the weights are multiplied

    @property
    def shares(self) -> dict[str, float]:
        """The weights scaled to sum to 1."""
        total = sum(self.weights.values())
        return {name: weight / total for name, weight in self.weights.items()}
