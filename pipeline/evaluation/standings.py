"""What the rows of a comparison say: its tables, each line and each difference with an interval.

Shapes: P prompts, N points of a method, M objectives, R resamples, K values of KL.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import pandas as pd

from pipeline.config.methods import Method
from pipeline.config.points import Mix
from pipeline.config.schema import Objective, Point
from pipeline.data.files import Row
from pipeline.evaluation.front import mean_inner_product
from pipeline.evaluation.statistics import (
    Bootstrap,
    bootstrap_mean,
    holm,
    hypervolume,
    hypervolume_difference,
    interval,
    p_value,
    prompt_means,
    resampled_rewards,
    reward_at,
)
from pipeline.evaluation.text_quality import quality_columns, readable, readable_scores

_FRONT = ("hypervolume", "readable_hypervolume", "delta_hv", "delta_ci_low", "delta_ci_high", "p_holm", "mip")
_MATCHED = ("reward", "ci_low", "ci_high", "difference", "difference_ci_low", "difference_ci_high", "p_holm")
KLS = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])  # nats per response, at which rewards are compared
UNGUIDED = "base"  # the method of unguided points


@dataclass(frozen=True)
class Entry:
    """One line of the table: a method at a point of the sweep, at a strength."""

    method: str
    point: str
    mix: Mix | None = None  # None: unguided
    front: bool = True  # whether the line is of the method's front, or only of its curve of reward against KL

    @property
    def name(self) -> str:
        """How its rows are found."""
        strength = "" if self.mix is None or self.front else f" x{self.mix.strength:g}"
        return f"{self.method}/{self.point}{strength}"


def entries(methods: Mapping[str, Method], points: Mapping[str, Point]) -> list[Entry]:
    """The lines of the table: unguided points of a sweep, then every method at the guided ones.

    A method's first strength is for all points; the others are for those that weigh one objective alone. Points with a
    negative weight are left to the sweep: most methods cannot steer away from what they were trained for.
    """
    listed = [Entry(UNGUIDED, name) for name, point in points.items() if not point.guided]
    for method, config in methods.items():
        for name, point in points.items():
            weights = {objective: weight for objective, weight in point.weights.items() if weight}
            if any(weight < 0 for weight in weights.values()):
                continue
            strengths = config.strengths if len(weights) == 1 else config.strengths[:1]
            for number, strength in enumerate(strengths if weights else ()):
                listed.append(Entry(method, name, Mix(name, weights, strength), front=number == 0))
    return listed


@dataclass(frozen=True)
class Standings:
    """The judged rows of a comparison, and what its tables make of them."""

    rows: pd.DataFrame  # each of the `line` that one of the entries names
    entries: Sequence[Entry]
    against: str  # the method that differences are from
    objectives: Mapping[str, Objective]
    bootstrap: Bootstrap

    @property
    def methods(self) -> list[str]:
        """Those that are compared, in their order; what is unguided is none."""
        return list(dict.fromkeys(entry.method for entry in self.entries if entry.mix))

    def table(self, training: Mapping[str, int]) -> pd.DataFrame:
        """table.csv: every line's rewards with their intervals, what they cost in KL, text, computing and training.

        Args:
            training: by method, the tokens that it was trained on.
        """
        lines = []
        for entry in self.entries:
            of_line = self.rows[self.rows.line == entry.name]
            line: Row = {"method": entry.method, "point": entry.point}
            for name in self.objectives:
                line[f"alpha_{name}"] = entry.mix.strength * entry.mix.weights.get(name, 0.0) if entry.mix else 0.0
            intervals = {name: bootstrap_mean(prompt_means(of_line, name), self.bootstrap) for name in self.objectives}
            for place, column in enumerate(("reward", "ci_low", "ci_high")):
                line |= {f"{column}_{name}": bounds[place] for name, bounds in intervals.items()}
            tokens = of_line.n_tokens.sum()
            line |= {"kl": of_line.kl.mean()} | quality_columns(of_line, self.objectives, self.bootstrap)
            line |= {
                "forwards_per_token": of_line.forwards.sum() / tokens,
                "train_tokens": training[entry.method],
                "prompts": of_line.prompt.nunique(),
            }
            lines.append(line)
        return pd.DataFrame(lines).round(4)

    def _scores(self, rows: pd.DataFrame, method: str, prompts: Sequence[str]) -> np.ndarray:
        """Mean scores of a method's front on prompts, its points in the order of the sweep: scores_PNM."""
        lines = [entry.name for entry in self.entries if entry.method == method and entry.front]
        means = rows[rows.line.isin(lines)].groupby(["line", "prompt"])[list(self.objectives)].mean()
        return np.stack([means.loc[line].loc[list(prompts)].to_numpy() for line in lines], axis=1)

    def _judged_prompts(self, method: str, lines: Sequence[str]) -> list[str]:
        """The prompts of a method on which every one of the lines has a verdict on every objective."""
        rows = self.rows
        means = rows[rows.line.isin(lines)].groupby(["line", "prompt"])[list(self.objectives)].mean()
        lacking = set(means[means.isna().any(axis=1)].index.get_level_values("prompt"))
        return sorted(set(rows[rows.method == method].prompt) - lacking)

    def fronts(self) -> pd.DataFrame:
        """fronts.csv: hypervolume and MIP of every method, and its hypervolume minus that of `against`.

        Scores are as the judge gives them, not normalised; the reference point is that of the objectives. A method that
        answered fewer prompts is compared on those, and prompts without a verdict at some point of either are left out.
        Of `readable_hypervolume`, responses that one cannot read count as at the reference point.
        Intervals are each difference's own; `p_holm` is corrected for the number of differences.
        """
        rows, against = self.rows, self.against
        reference = [objective.reference for objective in self.objectives.values()]
        legible = rows.assign(**readable_scores(rows, self.objectives))
        lines = []
        for method in (UNGUIDED, *self.methods):
            front = [entry.name for entry in self.entries if entry.method in (method, against) and entry.front]
            prompts = self._judged_prompts(method, front)
            if not prompts:
                lines.append({"method": method, **dict.fromkeys(_FRONT), "prompts": 0})
                continue
            own_PNM = self._scores(rows, method, prompts)
            readable_NM = self._scores(legible, method, prompts).mean(0)
            other_PNM = self._scores(rows, against, prompts)
            difference = hypervolume_difference(own_PNM, other_PNM, reference, self.bootstrap)
            mixes = [entry.mix for entry in self.entries if entry.method == method and entry.front and entry.mix]
            weights_NM = np.array([[mix.weights.get(name, 0.0) for name in self.objectives] for mix in mixes])
            means_NM = own_PNM.mean(0)
            mip = mean_inner_product(weights_NM, means_NM) if mixes else None
            measures = zip(
                _FRONT,
                (*(hypervolume(scores_NM, reference) for scores_NM in (means_NM, readable_NM)), *difference, mip),
                strict=True,
            )
            lines.append({"method": method, **dict(measures), "prompts": len(prompts)})
        table = pd.DataFrame(lines).astype(dict.fromkeys(_FRONT, float))
        table["p_holm"] = holm(table.p_holm.where(table.method != against).to_numpy())
        return table.round(4)

    def matched(self) -> pd.DataFrame:
        """matched.csv: reward at equal KL to the base, for each objective and method, with the difference to `against`.

        A method's curve goes from the base through its points that weigh the objective alone, at all strengths, and is
        interpolated linearly, and so is the share of its responses that one can read, `readable`. Methods whose KL is
        unknown have none. Intervals are each difference's own; `p_holm` is corrected for the number of differences at
        that KL on that objective.
        """
        table = pd.DataFrame(self._matched(), columns=["objective", "kl", "method", *_MATCHED, "readable"])
        families = table.astype({"p_holm": float}).groupby(["objective", "kl"]).p_holm
        table["p_holm"] = families.transform(lambda family: holm(family.to_numpy()))
        return table.round(4)

    def _matched(self) -> Iterator[Row]:
        against, confidence = self.against, self.bootstrap.confidence
        for name in self.objectives:
            for method in self.methods:
                lines = [*self._curve_lines(method, name), *self._curve_lines(against, name)]
                prompts = self._judged_prompts(method, lines)
                own, other = (self._curve(one, name, prompts) for one in (method, against))
                legible_K = self._readable_at(self._curve_lines(method, name))
                for place, kl in enumerate(KLS):
                    if own is None or np.isnan(own[0][place]):
                        continue
                    low, high = interval(own[1][:, place], confidence)
                    line: Row = {"objective": name, "kl": kl, "method": method, "reward": own[0][place]}
                    line |= {"ci_low": low, "ci_high": high, "readable": legible_K[place]}
                    if other is not None and method != against and not np.isnan(other[0][place]):
                        differences_R = own[1][:, place] - other[1][:, place]
                        low, high = interval(differences_R, confidence)
                        line |= {"difference": own[0][place] - other[0][place], "p_holm": p_value(differences_R)}
                        line |= {"difference_ci_low": low, "difference_ci_high": high}
                    yield line

    def _readable_at(self, lines: Sequence[str]) -> np.ndarray:
        """The readable share of a curve's responses at `KLS`: share_K."""
        parts = [self.rows[self.rows.line == line] for line in lines]
        kl_N = np.array([part.kl.mean() for part in parts])
        return reward_at(kl_N, np.array([readable(part).mean() for part in parts]), KLS)

    def _curve_lines(self, method: str, objective: str) -> list[str]:
        """The base, and the lines of a method that weigh one objective alone."""
        mixed = [entry for entry in self.entries if entry.method == method and entry.mix]
        alone = [entry.name for entry in mixed if entry.mix and entry.mix.weights.keys() == {objective}]
        return [next(entry.name for entry in self.entries if entry.mix is None), *alone]

    def _curve(self, method: str, objective: str, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray] | None:
        """A method's reward at `KLS` and that of its bootstrap samples: reward_K, rewards_RK.

        None where KL is unknown, or no prompt has all verdicts.
        """
        lines = self._curve_lines(method, objective)
        means = self.rows[self.rows.line.isin(lines)].groupby(["line", "prompt"])[["kl", objective]].mean()
        if means.kl.isna().any() or not len(prompts):
            return None
        both_PN2 = np.stack([means.loc[line].loc[list(prompts)].to_numpy() for line in lines], axis=1)
        kl_PN, reward_PN = both_PN2.transpose(2, 0, 1)
        resampled_RK = resampled_rewards(kl_PN, reward_PN, KLS, self.bootstrap)
        return reward_at(kl_PN.mean(0), reward_PN.mean(0), KLS), resampled_RK

    def win_rates(self) -> pd.DataFrame:
        """wins.csv: how often a method's response earns more than another's to the same prompt at the same weights.

        What it earns is Σ_i w_i · score_i at the weights w of the point; a tie is half a win. Intervals resample
        prompts.
        """
        objectives, rows = list(self.objectives), self.rows
        earned: dict[str, dict[str, pd.Series]] = {}
        for entry in self.entries:
            if entry.mix and entry.front:
                of_line = rows[rows.line == entry.name]
                shares = np.array([entry.mix.shares.get(name, 0.0) for name in objectives])
                value = pd.Series(of_line[objectives].to_numpy() @ shares, [of_line.prompt, of_line["sample"]])
                earned.setdefault(entry.method, {})[entry.point] = value
        lines = []
        for one, other in permutations(earned, 2):
            both = pd.concat(earned[one]), pd.concat(earned[other])
            difference = (both[0] - both[1]).dropna()
            won = (difference > 0) + 0.5 * (difference == 0)
            by_prompt = won.groupby(level=1).mean().to_numpy()
            mean, low, high = bootstrap_mean(by_prompt, self.bootstrap)
            lines.append((one, other, mean, low, high, len(by_prompt)))
        return pd.DataFrame(lines, columns=["method", "other", "win_rate", "ci_low", "ci_high", "prompts"]).round(4)


def alpaca_eval(rows: pd.DataFrame) -> dict[str, list[Row]]:
    """The responses of every line as alpaca_eval reads them, by the line's name."""
    return {
        name: [
            {"instruction": row.prompt, "output": row.response, "generator": name, "dataset": "genarm"}
            for row in of_line[of_line["sample"] == of_line["sample"].min()].itertuples()
        ]
        for name, of_line in rows.groupby("line", sort=False)
    }
