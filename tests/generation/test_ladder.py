import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.errors import UserError
from pipeline.config.points import point_weights
from pipeline.config.schema import Point
from pipeline.evaluation.judging import scored_frame
from pipeline.evaluation.ladder import UNDEFINED, lines_of, table
from pipeline.evaluation.statistics import Bootstrap, gap_recovered
from pipeline.generation.ladder import judge_bases, sample
from pipeline.generation.rows import point_requests
from tests.judges import judge_of

SURE = Bootstrap(0.95, 500, 0)
COMPOSED = {"weak_to_strong": ["objectives=positivity"]}
REWARDS = st.lists(st.floats(-1, 1), min_size=8, max_size=20)


def named_lines(params):
    return lines_of(params.sweep, list(params.objectives), params.arm.base, params.weak_to_strong.best_of)


@pytest.fixture
def params(compose_params):
    return compose_params("experiment=weak_to_strong")


@given(REWARDS)
@settings(deadline=None, max_examples=25)
def test_the_tuned_base_recovers_all_of_the_gap_and_the_control_nothing(control):
    control_P = np.array(control)
    tuned_P = control_P + np.linspace(0.5, 1.0, len(control_P))
    for guided_P, wanted in ((tuned_P, 1.0), (control_P, 0.0), ((tuned_P + control_P) / 2, 0.5)):
        assert gap_recovered(guided_P, control_P, tuned_P, SURE) == pytest.approx((wanted, wanted, wanted))


def test_prompts_are_resampled_together():
    """Prompts that differ widely say little about the levels, and all about the share, which is the same in each."""
    generator = np.random.default_rng(0)
    control_P, gap_P = generator.normal(0, 5, 50), generator.uniform(1, 2, 50)
    value, low, high = gap_recovered(control_P + 0.6 * gap_P, control_P, control_P + gap_P, SURE)
    assert value == pytest.approx(0.6) and high - low < 1e-9
    _, low, high = gap_recovered(control_P + generator.normal(0.6, 0.5, 50), control_P, control_P + gap_P, SURE)
    assert low < 0.4 < high < 1 and high - low > 0.05


def test_the_share_of_a_gap_that_may_be_nothing_is_not_defined():
    control_P = np.zeros(40)
    tuned_P = np.tile([1.0, -1.0], 20)
    assert gap_recovered(control_P + 1, control_P, tuned_P, SURE) is None
    assert gap_recovered(control_P - 1, control_P, control_P - 2, SURE) == pytest.approx((0.5, 0.5, 0.5))


def test_every_point_is_a_line_with_its_method_and_alpha(params):
    lines = named_lines(params)
    assert [*lines] == [*params.sweep.points, "best_of_4/positivity"]
    told = {name: (line.method, line.arm, line.alpha) for name, line in lines.items()}
    assert told["base"] == ("control", "", 0.0)
    assert told["sharpened_050"] == ("sharpened", "", 0.5), "as sharp as guidance with alpha 0.5"
    assert told["p050"] == ("genarm", "smollm2-10l", 0.5)
    assert told["r100"] == ("genarm_log_ratio", "smollm2-10l", 1.0)
    assert told["dpo"] == ("dpo", "", None)


@pytest.mark.parametrize("sweep", ["simplex5", "ends", "weak_to_strong", "cross_family"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_controls_are_as_sharp_as_guidance_at_every_temperature(compose_params, sweep, temperature):
    """The guided sum is divided by the temperature: unguided logits are multiplied by 1 + Σα to be as sharp."""
    params = compose_params(f"sweep={sweep}", f"decoding.temperature={temperature}", *COMPOSED.get(sweep, ()))
    asked = {point: request.temperature for point, request in point_requests(params, params.base, ["Why?"])}
    assert asked["base"] == temperature
    for name, total in (("sharpened", 1.0), ("sharpened_050", 0.5), ("sharpened_100", 1.0)):
        assert asked.get(name, temperature / (1 + total)) == pytest.approx(temperature / (1 + total), abs=1e-4)
    assert any(name.startswith("sharpened") for name in asked)


def test_a_point_of_several_objectives_is_for_none_alone(compose_params):
    told = {
        name: dataclasses.astuple(line)[:4]
        for name, line in named_lines(compose_params("experiment=cross_family")).items()
    }
    assert told["p100_c000"] == ("genarm_log_ratio", "positivity", "smollm2-135m", 1.0)
    assert told["p050_c010"] == ("genarm_log_ratio", "", "smollm2-135m", 0.6)
    assert told["best_of_4/conciseness"] == ("best_of_4", "conciseness", "", None)


def test_other_methods_are_lines_at_the_guided_points(compose_params):
    params = compose_params("experiment=cross_family")
    ladder = params.weak_to_strong
    lines = lines_of(params.sweep, list(params.objectives), params.arm.base, ladder.best_of, ladder.methods)
    guided = [name for name, point in params.sweep.points.items() if point.guided]
    assert {*ladder.methods} == {"nudging", "byte_proxy_tuning"}
    for method in ladder.methods:
        for name in guided:
            line, plain = lines[f"{method}/{name}"], lines[name]
            assert dataclasses.replace(line, method=plain.method) == dataclasses.replace(plain, weights=line.weights)
            assert line.method == method and line.weights == {key: one for key, one in plain.weights.items() if one}


def test_the_law_of_each_form_by_lane(params):
    def weights(form, base, **given):
        return point_weights(Point(given, form=form), params.arm.base == base)

    assert weights("plain", "smollm2-135m", positivity=0.5) == {"positivity": 0.5}
    assert weights("log_ratio", "smollm2-135m", positivity=0.5) == {"positivity": 0.5, "reference": -0.5}
    assert weights("log_ratio", "smollm2-10l", positivity=0.5) == {"positivity": 0.5, "base": 0.5}, "its own base"
    assert weights("alone", "smollm2-135m", positivity=1.0) == {"base": 0.0, "positivity": 1.0}
    assert weights("dpo", "smollm2-135m", positivity=1.0) == {"base": 0.0, "policy/positivity": 1.0}


def test_a_form_without_weights_is_refused(compose_params):
    with pytest.raises(UserError, match=r"sweep\.points\.base has a form but no weights"):
        compose_params("+sweep.points.base.form=dpo")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("base=smollm2-10", r"base smollm2-10 is no model: did you mean smollm2-10l\?"),
        ("arm.base=tulu", r"arm\.base tulu is no model: did you mean tulu2-7b\?"),
        ("data.sampler=smollm2-20l", r"data\.sampler smollm2-20l is not among the models that fetch lists"),
        ("weak_to_strong.bases=[tiny]", r"weak_to_strong\.bases\[0\] tiny is no model"),
        ("weak_to_strong.weak=[smollm2-20l]", r"weak_to_strong\.weak must be the ARM's model"),
        ("+models.arms={source: path, location: x}", "no model can be called arms"),
    ],
)
def test_names_of_models_are_checked(compose_params, override, sentence):
    fetch = ["fetch=[smollm2-135m]"] if "sampler" in override else []
    with pytest.raises(UserError, match=sentence):
        compose_params(override, *fetch)


def judged(params, values):
    """Rows of one base whose positivity is `values[point]`, two samples of each prompt."""
    return pd.DataFrame(
        {
            "base": "smollm2-135m", "point": point, "prompt": f"prompt {prompt}", "sample": sample,
            "response": f"word {prompt} {sample}", "positivity": value + 0.1 * prompt, "kl": 3.0, "logp_base": -8.0,
            "n_tokens": 4, "finish": "eos",
        }
        for point, value in values.items()
        for prompt in range(6)
        for sample in range(2)
    )  # fmt: skip


def test_the_table_has_one_line_per_base_and_method(params):
    values = dict.fromkeys(named_lines(params), 0.0) | {"dpo": 0.4, "p100": 0.3, "best_of_4/positivity": 0.2}
    lines = table(
        judged(params, values), named_lines(params), params.objectives, Bootstrap.of(params.judge, params.seed)
    )
    wanted = (
        "base, method, arm, alpha, reward_positivity, ci_low_positivity, ci_high_positivity, kl, readable, "
        "ended, words, perplexity, distinct_2, distinct_2_within, repetition, relevance, relevance_ci_low, "
        "relevance_ci_high, readable_positivity, held_out_positivity, held_out_positivity_ci_low, "
        "held_out_positivity_ci_high, prompts, gap_recovered, gap_ci_low, gap_ci_high"
    )
    assert ", ".join(lines.columns) == wanted
    guided = lines[(lines.method == "genarm") & (lines.alpha == 1.0)].iloc[0]
    assert (
        guided.reward_positivity == pytest.approx(0.55) and guided.ci_low_positivity < 0.55 < guided.ci_high_positivity
    )
    assert guided.gap_recovered == pytest.approx(0.75) and guided.perplexity == pytest.approx(math.exp(2), abs=1e-3)
    best = lines[lines.method == "best_of_4"].iloc[0]
    assert best.gap_recovered == pytest.approx(0.5)
    assert lines[lines.method.isin(["control", "dpo"])].gap_recovered.isna().all()


def test_a_gap_that_includes_nothing_says_so(params):
    rows = judged(params, dict.fromkeys(named_lines(params), 0.0))
    lines = table(rows, named_lines(params), params.objectives, Bootstrap.of(params.judge, params.seed))
    assert set(lines[~lines.method.isin(["control", "dpo"])].gap_recovered) == {UNDEFINED}


def test_best_of_n_is_the_best_of_its_own_samples(smoke_params, tiny, workspace):
    workspace.models.mkdir()
    workspace.model("tiny").symlink_to(tiny)
    params = dataclasses.replace(
        smoke_params,
        sweep=dataclasses.replace(smoke_params.sweep, control="base", points={"base": Point()}),
        decoding=dataclasses.replace(smoke_params.decoding, samples_per_prompt=2, max_new_tokens=6),
        weak_to_strong=dataclasses.replace(smoke_params.weak_to_strong, best_of=3),
    )
    sampled = {"tiny": sample(params, workspace, "tiny", ["Why?", "Tell me about tea."])}
    rows = judge_bases(params, sampled, judge_of(params, workspace))
    by_point = scored_frame(rows, params.objectives).groupby("point")
    assert by_point.size().to_dict() == {"base": 4, "best_of_3/positivity": 4, "best_of_3/conciseness": 4}
    for _, row in by_point.get_group("best_of_3/positivity").iterrows():
        assert row.kl == pytest.approx(math.log(3) - 2 / 3, abs=1e-3), "its bound"
    plain = by_point.get_group("base").set_index(["prompt", "sample"])
    for objective in params.objectives:
        best = by_point.get_group(f"best_of_3/{objective}").set_index(["prompt", "sample"])
        assert (best[objective] >= plain[objective]).all(), "the plain row is one of the three"
