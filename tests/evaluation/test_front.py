import tracemalloc
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.config.errors import UserError
from pipeline.config.judges import OracleJudge
from pipeline.config.points import point_laws
from pipeline.config.schema import Objective
from pipeline.evaluation.front import (
    front_metrics,
    front_table,
    knee,
    long_scores,
    mean_inner_product,
    non_dominated,
    rank_correlation,
)
from pipeline.evaluation.judging import judge_rows, win_rates
from pipeline.evaluation.statistics import Bootstrap, bootstrap_mean, gap_recovered, hypervolume
from tests.judges import generated, judge_of

QUICK = settings(max_examples=50, deadline=None, derandomize=True)
JUDGE = OracleJudge(kind="oracle", confidence=0.95, resamples=100)
GRID = st.integers(-4, 4).map(float)  # few values: many ties and duplicates
SCORES = st.tuples(st.integers(1, 12), st.integers(2, 4)).flatmap(lambda shape: arrays(float, shape, elements=GRID))
PLANE = st.integers(1, 12).flatmap(lambda count: arrays(float, (count, 2), elements=GRID))


def beaten(point, others):
    return any((other >= point).all() and (other > point).any() for other in others)


def swept_area(scores, reference):
    """Sweep from the best first objective down, adding the strip above the best second objective so far."""
    area, best = 0.0, reference[1]
    for x, y in sorted(map(tuple, scores), reverse=True):
        if x > reference[0] and y > best:
            area, best = area + (x - reference[0]) * (y - best), y
    return area


@QUICK
@given(scores=SCORES)
def test_the_front_is_what_no_other_point_beats(scores):
    assert non_dominated(scores).tolist() == [not beaten(point, scores) for point in scores]


def test_equal_points_share_the_front():
    assert non_dominated(np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])).tolist() == [
        True,
        True,
        True,
        False,
    ]


def test_a_point_without_a_score_neither_beats_nor_stands():
    scores = np.array([[np.nan, 9.0], [1.0, 1.0], [0.5, 1.0], [9.0, np.nan]])
    assert non_dominated(scores).tolist() == [False, True, False, False]
    assert non_dominated(scores[:1]).tolist() == [False]


@QUICK
@given(scores=PLANE, reference=st.tuples(GRID, GRID))
def test_hypervolume_is_the_swept_area_in_the_plane(scores, reference):
    assert hypervolume(scores, reference) == pytest.approx(swept_area(scores, reference))


@QUICK
@given(scores=SCORES, data=st.data())
def test_hypervolume_never_falls_when_a_point_is_added(scores, data):
    reference = [-1.0] * scores.shape[1]
    more = np.vstack([scores, data.draw(arrays(float, (1, scores.shape[1]), elements=GRID))])
    before, after = hypervolume(scores, reference), hypervolume(more, reference)
    assert after >= before - 1e-9
    if (more[-1] > -1).all() and not any((point >= more[-1]).all() for point in scores):
        assert after > before


@QUICK
@given(scores=SCORES)
def test_hypervolume_is_zero_where_every_point_fails_the_reference_somewhere(scores):
    scores[:, 0] = np.minimum(scores[:, 0], 0.0)
    assert hypervolume(scores, [0.0] + [-10.0] * (scores.shape[1] - 1)) == 0.0


def test_hypervolume_of_a_box_is_its_volume_and_points_below_the_reference_add_nothing():
    assert hypervolume(np.array([[1.0, 2.0, 3.0]]), [0.0, 0.0, 0.0]) == pytest.approx(6.0)
    assert hypervolume(np.array([[1.0, 2.0], [5.0, -1.0]]), [0.0, 0.0]) == pytest.approx(2.0)


@pytest.mark.parametrize("coordinate", [np.nan, np.inf, -np.inf])
def test_hypervolume_has_no_value_for_a_reference_that_is_not_finite(coordinate):
    with pytest.raises(ValueError, match="not finite"):
        hypervolume(np.array([[1.0, 2.0]]), [0.0, coordinate])


def test_points_without_a_score_add_no_volume():
    assert hypervolume(np.array([[1.0, 2.0], [np.nan, 9.0]]), [0.0, 0.0]) == 2.0
    assert hypervolume(np.array([[np.nan, 9.0]]), [0.0, 0.0]) == 0.0


def test_mean_inner_product_by_hand():
    weights, scores = np.array([[1.0, 0.0], [0.5, 0.5], [1.0, 3.0]]), np.array([[0.2, 9.0], [0.4, 0.8], [1.0, -1.0]])
    assert mean_inner_product(weights, scores) == pytest.approx((0.2 + 0.6 - 0.5) / 3)
    assert mean_inner_product(weights * 7, scores) == pytest.approx((0.2 + 0.6 - 0.5) / 3)


def test_rank_correlation_sees_order_and_shrugs_at_constants():
    rising = np.array([0.0, 0.25, 0.5, 1.0])
    assert rank_correlation(rising, np.exp(rising * 9)) == pytest.approx(1.0)
    assert rank_correlation(rising, -rising) == pytest.approx(-1.0)
    assert rank_correlation(rising, np.array([1.0, 2.0, 4.0, 3.0])) == pytest.approx(0.8)
    assert rank_correlation(rising, np.ones(4)) is None
    assert rank_correlation(np.ones(4), rising) is None


@QUICK
@given(values=arrays(float, st.integers(1, 30), elements=st.integers(-50, 50).map(lambda n: n / 10)))
def test_an_interval_holds_its_mean_and_lies_in_the_range_of_the_values(values):
    mean, low, high = bootstrap_mean(values, Bootstrap(0.95, 200, 0))
    assert mean == pytest.approx(values.mean())
    assert values.min() - 1e-9 <= low <= mean + 1e-9
    assert mean - 1e-9 <= high <= values.max() + 1e-9


@pytest.mark.parametrize("values", [[0.3], [0.3] * 20])
def test_a_constant_has_an_interval_of_no_width(values):
    assert bootstrap_mean(np.array(values), Bootstrap(0.95, 200, 0)) == pytest.approx((0.3, 0.3, 0.3))


def test_a_seed_fixes_the_interval_and_more_confidence_widens_it():
    values = np.random.default_rng(0).normal(size=30)
    found = bootstrap_mean(values, Bootstrap(0.95, 300, 7))
    assert bootstrap_mean(values, Bootstrap(0.95, 300, 7)) == found
    assert bootstrap_mean(values, Bootstrap(0.95, 300, 8)) != found
    _, low, high = bootstrap_mean(values, Bootstrap(0.5, 300, 7))
    assert found[1] < low < high < found[2]


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    samples = np.random.default_rng(1).normal(2.0, 3.0, size=(200, 50))
    intervals = [bootstrap_mean(sample, Bootstrap(0.95, 300, seed)) for seed, sample in enumerate(samples)]
    covered = sum(low <= 2.0 <= high for _, low, high in intervals) / len(intervals)
    assert 0.88 <= covered <= 0.99


def frame(**scores):
    rows = [
        {"point": point, "prompt": f"prompt {n // 2}", "sample": n % 2, "warm": value, "short": -value}
        for point, values in scores.items()
        for n, value in enumerate(values)
    ]
    return pd.DataFrame(rows).sample(frac=1.0, random_state=0)


def rates(scored, control="control", judge=JUDGE):
    wins = win_rates(scored, control, ["warm", "short"], Bootstrap.of(judge, 0))
    return {(row.point, row.objective): row for row in wins.itertuples()}


FOUR = st.lists(GRID, min_size=4, max_size=4)


@QUICK
@given(values=FOUR)
def test_the_control_against_itself_is_one_half(values):
    found = rates(frame(control=values))["control", "warm"]
    assert (found.win_rate, found.ci_low, found.ci_high, found.ties, found.prompts) == (0.5, 0.5, 0.5, 4, 2)


@QUICK
@given(values=FOUR)
def test_a_strictly_better_point_always_wins_and_its_mirror_image_always_loses(values):
    found = rates(frame(control=values, better=[value + 1 for value in values]))
    assert found["better", "warm"].win_rate == 1.0
    assert found["better", "short"].win_rate == 0.0
    assert found["better", "warm"].ties == 0


@pytest.mark.parametrize(
    ("scores", "place"),
    [
        ([[0.0, 1.0], [0.8, 0.9], [1.0, 0.0]], 1),  # much of one for little of the other
        ([[0.0, 1.0], [0.4, 0.7], [0.7, 0.6], [1.0, 0.0]], 2),
        ([[0.0, 10.0], [0.4, 7.0], [0.7, 6.0], [1.0, 0.0]], 2),  # whatever the units
        ([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]], None),  # a line has none
        ([[0.0, 1.0], [0.2, 0.2], [1.0, 0.0]], None),  # nor has one that bends inwards
        ([[0.0, 1.0], [0.8, 0.9], [0.79, 0.89], [1.0, 0.0]], 1),  # a point that another beats is none
        ([[1.0, 1.0], [0.2, 0.3]], None),  # nothing is given up
        ([[np.nan, 1.0], [0.0, 1.0], [0.8, 0.9], [1.0, 0.0]], 2),
        ([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.5, 0.6, 0.5]], 3),
        ([[0.3], [0.7]], None),
    ],
)
def test_the_knee_is_the_point_that_bulges_most(scores, place):
    assert knee(np.array(scores)) == place


@QUICK
@given(one=FOUR, two=FOUR)
def test_win_rates_are_antisymmetric(one, two):
    scored = frame(one=one, two=two)
    forth, back = rates(scored, "one")["two", "warm"], rates(scored, "two")["one", "warm"]
    assert forth.win_rate + back.win_rate == pytest.approx(1.0)
    assert forth.ties == back.ties == sum(a == b for a, b in zip(one, two, strict=True))


def test_ties_are_half_a_win_and_samples_are_compared_one_to_one():
    found = rates(frame(control=[0.0, 1.0, 2.0, 3.0], mixed=[0.0, 2.0, 1.0, 4.0]))["mixed", "warm"]
    assert (found.win_rate, found.ties, found.prompts) == (0.625, 1, 2)


def test_every_prompt_weighs_the_same_in_a_win_rate():
    scored = frame(control=[0.0] * 4, mixed=[1.0, 1.0, -1.0, -1.0])
    fewer = scored[(scored.prompt != "prompt 1") | (scored["sample"] == 0)]
    assert rates(fewer)["mixed", "warm"].win_rate == 0.5


@pytest.mark.parametrize("drawn", [1, 50, 1000])
def test_a_bootstrap_drawn_in_parts_is_the_same_and_small(monkeypatch, drawn):
    values, others = np.random.default_rng(0).random((2, 60))
    whole = (
        bootstrap_mean(values, Bootstrap(0.95, 300, 1)),
        gap_recovered(values + others, values, values + 1, Bootstrap(0.95, 300, 1)),
    )
    monkeypatch.setattr("pipeline.evaluation.statistics._DRAWN", drawn)
    parts = (
        bootstrap_mean(values, Bootstrap(0.95, 300, 1)),
        gap_recovered(values + others, values, values + 1, Bootstrap(0.95, 300, 1)),
    )
    assert parts == whole


def test_a_bootstrap_of_many_prompts_fits_into_little_memory():
    values = np.random.default_rng(0).random(50_000)
    tracemalloc.start()
    bootstrap_mean(values, Bootstrap(0.95, 200, 0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 60e6  # bytes; all at once are 160 million


def test_rows_are_scored_under_the_names_of_their_objectives(smoke_params, workspace):
    objectives = {"brief": Objective(label="x", scorer="conciseness")}
    judge = judge_of(replace(smoke_params, objectives=objectives), workspace)
    row = generated("What is on?", "Tea is on.", tokens=[7, 8])
    [judged] = judge_rows([row], judge, {})
    assert judged == replace(row, tokens=(), scores={"brief": 0.925})
    assert judged.to_json().keys() == {*row.to_json(), "brief"} - {"tokens"}


def test_an_objective_without_a_scorer_cannot_be_judged(smoke_params, workspace):
    with pytest.raises(UserError, match=r"objectives\.brief has no scorer"):
        judge_of(replace(smoke_params, objectives={"brief": Objective(label="x")}), workspace)


@pytest.fixture
def front(compose_params):
    return judged(compose_params("judge.resamples=50"))


def judged(params, unknown=()):
    """A sweep whose positivity rises from point to point, and its table; `unknown` points have no verdict on it."""
    points = list(params.sweep.points)
    rows = [
        {
            "point": point, "prompt": f"p{n}", "sample": 0, "response": f"tea {point} tea", "kl": float(place),
            "finish": "eos",
            "logp_base": -2.0 * (n + 1), "n_tokens": n + 1, "conciseness": 1 - place / 10,
            "positivity": None if point in unknown else place / 10 + n % 2,
        }
        for place, point in enumerate(points)
        for n in range(4)
    ]  # fmt: skip
    scored = pd.DataFrame(rows)
    bootstrap = Bootstrap.of(params.judge, 0)
    wins = win_rates(scored, params.sweep.control, list(params.objectives), bootstrap)
    laws = point_laws(params, params.base)
    return params, front_table(params.base, laws, params.objectives, scored, wins, bootstrap)


def test_the_front_table_has_one_line_per_point_with_scores_cost_and_wins(front):
    params, table = front
    line = table.set_index("point").loc["p075_c025"]
    assert list(table.point) == list(params.sweep.points)
    assert (line.method, line.alpha_positivity, line.alpha_conciseness, line.temperature) == ("genarm", 0.75, 0.25, 1.0)
    assert line.score_positivity == pytest.approx(0.8)
    assert line.ci_low_positivity < 0.8 < line.ci_high_positivity
    assert (line.kl, line.n_tokens, line.win_rate_positivity, line.win_rate_conciseness) == (3.0, 2.5, 1.0, 0.0)
    assert line.perplexity == pytest.approx(np.exp(2.0), abs=1e-3)
    assert table.on_front.all()
    assert list(table.method[:2]) == ["base", "base"]


def test_front_metrics_are_those_of_the_table(front):
    params, table = front
    metrics = front_metrics(params.objectives, table)
    scores = table[["score_positivity", "score_conciseness"]].to_numpy()
    assert metrics["hypervolume"] == pytest.approx(swept_area(scores, (0.0, 0.0)))
    assert metrics["hypervolume_controls"] == pytest.approx(swept_area(scores[:2], (0.0, 0.0)))
    assert metrics["n_front"] == len(table)
    assert metrics["spearman"] == {"genarm": {"positivity": pytest.approx(-1.0), "conciseness": pytest.approx(-1.0)}}
    guided = table[table.method == "genarm"]
    by_hand = guided.alpha_positivity * guided.score_positivity + guided.alpha_conciseness * guided.score_conciseness
    assert metrics["mip"] == {"genarm": pytest.approx(by_hand.mean())}


def test_every_law_of_guidance_is_measured_by_itself(compose_params):
    """A sweep in the log-ratio form has a MIP, rank correlations and a scatter of scores as well."""
    params, table = judged(compose_params("experiment=cross_family", "judge.resamples=50"))
    metrics = front_metrics(params.objectives, table)
    assert metrics["mip"].keys() == metrics["spearman"].keys() == {"genarm_log_ratio"}
    assert metrics["spearman"]["genarm_log_ratio"]["positivity"] is not None
    assert len(long_scores(table, list(params.objectives))) == 2 * 6
    params, table = judged(compose_params("+sweep.points.p050_c050.form=log_ratio", "judge.resamples=50"))
    metrics = front_metrics(params.objectives, table)
    assert metrics["mip"].keys() == {"genarm", "genarm_log_ratio"}
    by_hand = table.set_index("point").loc["p050_c050", ["score_positivity", "score_conciseness"]].mean()
    assert metrics["mip"]["genarm_log_ratio"] == pytest.approx(by_hand)


def test_a_point_without_any_verdict_has_no_score_and_stops_nothing(compose_params):
    params, table = judged(compose_params("judge.resamples=50"), unknown=["p100_c000"])
    line = table.set_index("point").loc["p100_c000"]
    assert np.isnan([line.score_positivity, line.win_rate_positivity]).all() and not line.on_front
    assert line.score_conciseness > 0
    scores = table[table.point != "p100_c000"][["score_positivity", "score_conciseness"]].to_numpy()
    assert front_metrics(params.objectives, table)["hypervolume"] == pytest.approx(swept_area(scores, (0.0, 0.0)))


def test_long_scores_hold_each_guided_point_once_per_objective(front):
    params, table = front
    long = long_scores(table, list(params.objectives))
    assert len(long) == 2 * 5
    assert not set(long.point) & {"base", "sharpened"}
    assert list(long[long.objective == "conciseness"].alpha) == [0.0, 0.25, 0.5, 0.75, 1.0]
