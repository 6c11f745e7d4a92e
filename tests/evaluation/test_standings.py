import numpy as np
import pandas as pd
import pytest

from pipeline.evaluation.standings import alpaca_eval
from pipeline.generation.comparison import entries_of, standings_of

SHARES = {"p100_c000": 1.0, "p075_c025": 0.75, "p050_c050": 0.5, "p025_c075": 0.25, "p000_c100": 0.0}


@pytest.fixture(scope="module")
def params(compose_params):
    return compose_params(
        "experiment=comparison", "methods@comparison.methods=[genarm,mod,cards]", "judge.resamples=300",
        "comparison.methods.cards.prompts=7", "comparison.methods.genarm.strengths=[1.0,0.5]",
    )  # fmt: skip


@pytest.fixture(scope="module")
def rows(params):
    """Every method trades one objective for the other; mod earns more at half the KL; cards answers seven prompts."""
    generator, found = np.random.default_rng(0), []
    prompts = [f"prompt {number:02}" for number in generator.permutation(20)]
    levels = dict(zip(prompts, generator.normal(0, 0.2, 20), strict=True))
    for entry in entries_of(params):
        asked = prompts[:7] if entry.method == "cards" else prompts
        strength = entry.mix.strength if entry.mix else 0.0
        share = SHARES.get(entry.point, 0.5)
        gain = {"base": 0.0, "genarm": 0.3, "mod": 0.4, "cards": 0.1}[entry.method] * strength
        kl = {"base": 0.0, "genarm": 16.0, "mod": 8.0, "cards": np.nan}[entry.method] * strength
        for prompt in asked:
            found.append(
                {
                    "method": entry.method, "point": entry.point, "line": entry.name, "prompt": prompt, "sample": 0,
                    "response": f"{entry.method} says {prompt}", "finish": "eos",
                    "positivity": 0.3 + levels[prompt] + gain * share,
                    "conciseness": 0.3 - levels[prompt] + gain * (1 - share), "kl": kl, "logp_base": -20.0,
                    "n_tokens": 10, "forwards": 30,
                }
            )  # fmt: skip
    return pd.DataFrame(found)


def test_the_table_has_the_columns_that_it_promises(params, rows):
    methods = ("base", "genarm", "mod", "cards")
    table = standings_of(params, rows).table(dict.fromkeys(methods, 1000))
    wanted = (
        "method, point, alpha_positivity, alpha_conciseness, reward_positivity, reward_conciseness, "
        "ci_low_positivity, ci_low_conciseness, ci_high_positivity, ci_high_conciseness, kl, readable, ended, words, "
        "perplexity, distinct_2, distinct_2_within, repetition, relevance, relevance_ci_low, relevance_ci_high, "
        "readable_positivity, held_out_positivity, held_out_positivity_ci_low, held_out_positivity_ci_high, "
        "readable_conciseness, held_out_conciseness, held_out_conciseness_ci_low, held_out_conciseness_ci_high, "
        "forwards_per_token, train_tokens, prompts"
    )
    assert ", ".join(table.columns) == wanted
    halved = table[(table.method == "genarm") & (table.alpha_positivity == 0.5) & (table.alpha_conciseness == 0)]
    assert len(halved) == 1 and halved.kl.iloc[0] == 8.0, "half the strength at the end of the front"
    assert (table.forwards_per_token == 3).all() and table.perplexity.iloc[0] == pytest.approx(np.exp(2), abs=1e-3)
    assert set(table[table.method == "cards"].prompts) == {7} and set(table[table.method == "mod"].prompts) == {20}


def test_fronts_are_compared_on_the_prompts_that_both_answered(params, rows):
    fronts = standings_of(params, rows).fronts().set_index("method")
    assert fronts.loc["genarm", "delta_hv"] == 0 and fronts.loc["mod", "delta_ci_low"] > 0
    assert np.isnan(fronts.loc["genarm", "p_holm"])
    assert fronts.loc["mod", "p_holm"] == pytest.approx(3 * 2 / 301, abs=1e-4), "of three differences the surest"
    assert fronts.loc["cards", "delta_ci_high"] < 0 and fronts.loc["cards", "prompts"] == 7
    seven = rows[rows.prompt.isin(rows[rows.method == "cards"].prompt.unique())]
    again = standings_of(params, seven).fronts().set_index("method")
    assert again.loc["cards", "delta_hv"] == fronts.loc["cards", "delta_hv"]
    shares = np.array([[share, 1 - share] for share in SHARES.values()])
    means = 0.3 + 0.4 * shares + np.array([1, -1]) * (rows[rows.line == "base/base"].positivity.mean() - 0.3)
    assert fronts.loc["mod", "mip"] == pytest.approx((shares * means).sum(1).mean(), abs=1e-4)


def test_rewards_are_compared_at_equal_kl(params, rows):
    matched = standings_of(params, rows).matched().set_index(["objective", "kl", "method"])
    start = rows[rows.line == "base/base"].positivity.mean()
    at = matched.loc["positivity", 8.0, "genarm"]
    assert at.reward == pytest.approx(start + 0.15, abs=1e-4) and np.isnan(at.difference)
    at = matched.loc["positivity", 8.0, "mod"]
    assert at.reward == pytest.approx(start + 0.4, abs=1e-4) and at.difference == pytest.approx(0.25, abs=1e-4)
    assert at.difference_ci_low == pytest.approx(0.25, abs=1e-3), "prompts are resampled together"
    assert ("positivity", 16.0, "mod") not in matched.index, "nothing is said beyond what was measured"
    assert "cards" not in matched.index.get_level_values("method"), "its KL is unknown"


def test_readable_shares_stand_beside_rewards_at_equal_kl(params, rows):
    halved = rows.line.str.startswith("genarm/") & rows.line.str.endswith(" x0.5")
    rows = rows.assign(response=rows.response.where(~halved, "no"), logp_base=-1.0)
    matched = standings_of(params, rows).matched().set_index(["objective", "kl", "method"]).readable
    found = [matched.loc["positivity", kl, "genarm"] for kl in (2.0, 4.0, 8.0, 16.0)]
    assert found == pytest.approx([0.75, 0.5, 0.0, 1.0]) and matched.loc["positivity", 8.0, "mod"] == 1.0


def test_what_has_no_verdict_is_left_out_and_counted(params, rows):
    """A pairwise judge may say nothing of a response: its prompt is then compared nowhere."""
    known, unknown = rows.copy(), rows.prompt.unique()[:2]
    known.loc[(known.line == "mod/p050_c050") & known.prompt.isin(unknown), "positivity"] = np.nan
    left = rows[~rows.prompt.isin(unknown)]
    fronts, whole, fewer = (standings_of(params, found).fronts().set_index("method") for found in (known, rows, left))
    assert fronts.loc["mod"].prompts == 18 and fronts.loc["genarm"].prompts == 20
    assert fronts.loc["mod", "delta_hv"] == fewer.loc["mod", "delta_hv"]
    assert fronts.loc["genarm", "hypervolume"] == whole.loc["genarm", "hypervolume"]
    tokens = dict.fromkeys(("base", *params.comparison.methods), 0)
    table = standings_of(params, known).table(tokens)
    assert table.reward_positivity.notna().all()
    known["positivity"] = np.nan
    assert standings_of(params, known).fronts().prompts.eq(0).all() and standings_of(params, known).matched().empty


def test_whoever_earns_more_on_every_prompt_always_wins(params, rows):
    wins = standings_of(params, rows).win_rates().set_index(["method", "other"])
    assert wins.loc[("mod", "genarm"), "win_rate"] == 1 and wins.loc[("genarm", "mod"), "win_rate"] == 0
    assert wins.loc[("genarm", "cards"), "prompts"] == 7


def test_responses_are_exported_by_line(rows):
    exported = alpaca_eval(rows)
    assert set(exported) == set(rows.line)
    assert exported["mod/p050_c050"][0] == {
        "instruction": rows.prompt.iloc[0], "output": f"mod says {rows.prompt.iloc[0]}", "generator": "mod/p050_c050",
        "dataset": "genarm",
    }  # fmt: skip
