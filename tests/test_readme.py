"""Figures that README quotes are those of the tables it names."""

import json
import math
import re

import pandas as pd
import pytest

from tests.tiny import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"(?<![\w.-])[-+]?\d+(?:,\d{3})*(?:\.\d+)?")


def section(title):
    return re.search(rf"^##+ {re.escape(title)}\n(.*?)(?=^##)", README, flags=re.DOTALL | re.MULTILINE).group(1)


def lines_of(title):
    """The lines of a section's tables by their first cell, without emphasis."""
    rows = [
        re.split(r" *\| *", line.replace("**", ""))[1:-1] for line in section(title).splitlines() if line[:1] == "|"
    ]
    return {cells[0]: cells[1:] for cells in rows}


def quotes(text, *values):
    """Whether the numbers of a text are these values, rounded to as many digits as the text gives them."""
    numbers = [number.replace(",", "") for number in NUMBER.findall(text)]
    decimals = [len(number.partition(".")[2]) for number in numbers]
    return len(numbers) == len(values) and all(
        math.isclose(float(number), value, rel_tol=0, abs_tol=0.5 * 10**-places + 1e-9)
        for number, places, value in zip(numbers, decimals, values, strict=True)
    )


def csv(path, *index):
    table = pd.read_csv(ROOT / "results" / path)
    return table.set_index([*index]).sort_index() if index else table


def interval(line, objective, kind):
    return line[f"{kind}_{objective}"], line[f"ci_low_{objective}"], line[f"ci_high_{objective}"]


def test_a_figure_is_compared_at_the_digits_it_has():
    assert quotes("0.75 [0.68, 0.81], KL 16", 0.749, 0.6849, 0.805, 15.6) and quotes("2,000", 2000)
    assert not quotes("0.75", 0.74) and not quotes("0.75", 0.75, 0.8) and not quotes("-0.75", 0.75)


def test_the_front_is_that_of_the_default_experiment():
    front, lines = csv("pareto/front.csv", "point"), lines_of("Two commands")
    for name, line in front.iterrows():
        weights, *scores, kl, distinct = lines[name]
        alphas = [line.alpha_positivity, line.alpha_conciseness]
        assert weights == "none" if line.method == "base" else quotes(weights, *alphas)
        for quoted, objective in zip(scores, ("positivity", "conciseness"), strict=True):
            assert quotes(quoted, *interval(line, objective, "score")), (name, quoted)
        assert quotes(kl, line.kl) and quotes(distinct, line.distinct_2)


def test_held_out_accuracies_are_those_of_the_default_experiment():
    text, metrics = section("Two commands"), json.loads((ROOT / "results/pareto/metrics.json").read_text())
    arm = metrics["arms"]["positivity"]
    said = re.search(
        r"positivity ARM prefers the chosen response in (.*?) of (\d+) cases, and in 0.76\n(.*?) of the (\d+)", text
    )
    assert quotes(said[1], arm["accuracy"], arm["ci_low"], arm["ci_high"]) and int(said[2]) == arm["pairs"]
    like = arm["length_matched"]
    assert (
        quotes(f"0.76 {said[3]}", *(like[key] for key in ("value", "ci_low", "ci_high")))
        and int(said[4]) == like["pairs"]
    )
    assert quotes(
        re.search(r"always taking the longer one would be right in ([\d.]+\d)", text)[1], arm["chosen_longer"]["value"]
    )
    assert quotes(re.search(r"hypervolume was\s+0.35 instead of ([\d.]+\d)", text)[1], metrics["hypervolume"])
    tokens = csv("pareto/front.csv", "point").n_tokens["p000_c100"]
    assert quotes(re.search(r"at its own end (\d+) of 48 tokens", text)[1], tokens)


LADDER = {
    "control: the base alone": ("control", 0.0), "sharpened as by α = 1, T = 1/2": ("sharpened", 1.0),
    "guided, plain, α = 0.5": ("genarm", 0.5), "guided, plain, α = 1": ("genarm", 1.0),
    "guided, log-ratio, α = 0.5": ("genarm_log_ratio", 0.5), "guided, log-ratio, α = 1": ("genarm_log_ratio", 1.0),
    "the small ARM alone": ("arm", 1.0), "the base itself tuned by DPO": ("dpo", None),
    "best of 4, picked by the oracle": ("best_of_4", None),
}  # fmt: skip
GAPS = {
    "gap recovered, plain, α = 1": ("genarm", 1.0), "gap recovered, log-ratio, α = 1": ("genarm_log_ratio", 1.0),
}  # fmt: skip


@pytest.mark.parametrize("title", [*LADDER, *GAPS])
def test_the_ladder_is_that_of_its_table(title):
    table, quoted = csv("weak_to_strong/table.csv"), lines_of("Weak to strong")
    method, alpha = (LADDER | GAPS)[title]
    for name, said in zip(quoted["base"], quoted[title], strict=True):
        base = table.base == name.strip("`")
        (line,) = table[base & (table.method == method) & ((table.alpha == alpha) | (alpha is None))].to_dict("records")
        if title in GAPS:
            assert quotes(said, line["gap_recovered"], line["gap_ci_low"], line["gap_ci_high"]), (name, said)
        else:
            kl = [line["kl"]] if "KL" in said else []
            assert quotes(said, *interval(line, "positivity", "reward"), *kl), (name, said)


def test_distinct_2_on_the_ladder_is_that_of_its_table():
    table = csv("weak_to_strong/table.csv")
    table = table[(table.base == "smollm2-135m") & table.alpha.isin([0.0, 1.0])].set_index("method").distinct_2
    said = re.search(
        r"on the 135M base distinct-2 stays at (.*?\))\s*where the plain form falls to ([\d.]+\d)",
        section("Weak to strong"),
        re.DOTALL,
    )
    assert quotes(f"{said[1]} {said[2]}", table["genarm_log_ratio"], table["control"], table["genarm"])


CROSS = {
    "control: Gemma alone": ("control", 0, 0), "sharpened, T = 1/2": ("sharpened", 0, 0),
    "guided, α = 0.5, 0": ("genarm_log_ratio", 0.5, 0), "guided, α = 1, 0": ("genarm_log_ratio", 1, 0),
    "guided, α = 0.75, 0.05": ("genarm_log_ratio", 0.75, 0.05), "guided, α = 0.5, 0.1": ("genarm_log_ratio", 0.5, 0.1),
    "guided, α = 0.25, 0.15": ("genarm_log_ratio", 0.25, 0.15), "guided, α = 0, 0.2": ("genarm_log_ratio", 0, 0.2),
    "best of 4 by the oracle of positivity": ("best_of_4", 0, 0),
    "best of 4 by the oracle of conciseness": ("best_of_4", 0, 0),
}  # fmt: skip


@pytest.mark.parametrize("title", CROSS)
def test_guidance_across_families_is_that_of_its_table(title):
    table, (method, *alphas) = csv("cross_family/table.csv"), CROSS[title]
    picked = title.split()[-1] if method == "best_of_4" else ""
    same = (table.method == method) & (table.alpha_positivity == alphas[0]) & (table.alpha_conciseness == alphas[1])
    (line,) = table[same & (table.picked_by.fillna("") == picked)].to_dict("records")
    *scores, kl, perplexity, distinct, left_out = lines_of("Across model families")[title]
    for quoted, objective in zip(scores, ("positivity", "conciseness"), strict=True):
        assert quotes(quoted, *interval(line, objective, "reward"))
    assert quotes(kl, line["kl"]) and quotes(perplexity, line["perplexity"]) and quotes(distinct, line["distinct_2"])
    assert quotes(left_out, line["left_out"]) if line["left_out"] else left_out == "–"


def test_each_objective_rises_with_its_weight_along_the_line():
    assert "each objective rises with its α (Spearman 1 and 1, five points)" in " ".join(
        section("Across model families").split()
    )
    table = csv("cross_family/table.csv")
    line = table[
        (table.method == "genarm_log_ratio")
        & (table.alpha_positivity / 1 + table.alpha_conciseness / 0.2).round(6).eq(1)
    ]
    assert len(line) == 5
    for objective in ("positivity", "conciseness"):
        assert line.sort_values(f"alpha_{objective}")[f"reward_{objective}"].is_monotonic_increasing


def test_what_guidance_across_families_costs_is_that_of_its_bench():
    said = re.search(r"A token takes (.*?) times as long", section("Across model families"))[1]
    assert quotes(said, *csv("bench/crosstoken.csv", "batch").over)


COMPARED = {
    "`base`, unguided": "base", "GenARM": "genarm", "GenARM, log-ratio": "log_ratio", "GenARM, gated": "gated",
    "GenARM, DPO policies as ARMs": "genarm_dpo", "PARM": "parm", "DPO at the ends, MOD between": "mod",
    "DPO for each mix (MORL)": "morl", "rewarded soup (products)": "soup", "soup of factors": "soup_factors",
    "best of 4, reward models": "best_of_n", "ARGS (32 prompts)": "args",
    "Transfer-Q, short roll-outs (16 prompts)": "transfer_q", "CARDS (16 prompts)": "cards",
}  # fmt: skip


@pytest.mark.parametrize("title", COMPARED)
def test_the_comparison_is_that_of_its_tables(title):
    method, table = COMPARED[title], csv("comparison/table.csv").drop_duplicates(["method", "point"])
    fronts, lines = csv("comparison/fronts.csv", "method"), table[table.method == method].set_index("point")
    unguided = method == "base"
    even, first, last = (lines.loc["base" if unguided else point] for point in ("p050_c050", "p100_c000", "p000_c100"))
    volume, delta, positive, concise, kl, distinct, forwards, speed, training = lines_of(
        "Comparison with other methods"
    )[title]
    assert quotes(volume, fronts.hypervolume[method])
    if method == "genarm":
        assert delta == "–"
    else:
        assert quotes(delta, *fronts.loc[method, ["delta_hv", "delta_ci_low", "delta_ci_high"]])
    assert quotes(positive, first.reward_positivity) and quotes(concise, last.reward_conciseness)
    assert kl == "–" if math.isnan(even.kl) else quotes(kl, even.kl)
    assert quotes(distinct, even.distinct_2) and quotes(forwards, even.forwards_per_token)
    assert quotes(speed, even.tokens_per_s)
    assert training == "–" if unguided else quotes(training, even.train_seconds / 60)
    if "prompts" in title:
        assert f"({fronts.prompts[method]} prompts)" in title


def test_what_is_said_of_the_comparison_is_in_its_tables():
    text, table = section("Comparison with other methods"), csv("comparison/table.csv")
    matched = csv("comparison/matched.csv", "objective", "kl", "method").loc[("positivity", 16.0)]
    said = re.search(
        r"at 16 nats positivity is (.*?) where DPO \(MOD's end\) has (.*?);\s*the log-ratio form has (.*?) there", text
    )
    for quoted, method in zip(said.groups(), ("genarm", "mod", "log_ratio"), strict=True):
        assert quotes(quoted, *matched.loc[method, ["reward", "ci_low", "ci_high"]])
    ends = table[table.point == "p000_c100"].drop_duplicates("method").set_index("method")
    assert quotes(re.search(r"\(perplexity (\d+) under the base\)", text)[1][:2], ends.perplexity["mod"] / 100)
    (parm,) = table[(table.method == "parm") & (table.alpha_positivity == 1)].distinct_2
    assert quotes(re.search(r"repeats itself at the positivity end \(distinct-2 ([\d.]+)\)", text)[1], parm)


VLLM = {
    "unguided vLLM": ("unguided", 0), "guided": ("guided", 2), "the same lanes, each drawing for itself": ("lanes", 2),
    "guided, vLLM's own LoRA class for CPUs": ("stock", 2), "`GuidedDecoder`": ("decoder", 2),
}  # fmt: skip


@pytest.mark.parametrize("title", VLLM)
def test_speeds_inside_vllm_are_those_of_its_bench(title):
    table, quoted = csv("bench/vllm.csv", "engine", "arms", "batch"), lines_of("Serving with vLLM")[title]
    for batch, said in zip((1, 8, 32, 64), quoted, strict=True):
        if (*VLLM[title], batch) not in table.index:
            assert said == "–"
            continue
        row = table.loc[(*VLLM[title], batch)]
        assert quotes(said, row.tokens_per_s, *([] if title == "unguided vLLM" else [row.of_unguided])), said


def test_what_is_said_of_serving_is_in_its_benches():
    text, table = section("Serving with vLLM"), csv("bench/vllm.csv", "engine", "arms").sort_values("batch")
    said = re.search(r"With one ARM (.*?) of unguided", text)[1]
    assert quotes(said, *table.loc[("guided", 1)].of_unguided)
    served = csv("bench/serve.csv", "requests")
    assert (served.answers == served.whole).all() and served.answers.sum() == 64 + 2000
    said = re.search(r"memory rose from (.*?) GiB over the first 1,200 and stood still over the last 800", text)[1]
    assert quotes(said, served.memory_gib["64 at once"], served.memory_gib["1001 to 1200"])
    assert served.memory_gib["1801 to 2000"] == served.memory_gib["1001 to 1200"]


COSTS = {
    "naive: a plain logits processor, three forwards": "naive",
    "`GuidanceProcessor` inside `generate`, two forwards": "processor", "`GuidedDecoder`, one forward": "ours",
}  # fmt: skip


def test_what_guidance_costs_is_that_of_its_bench():
    table, text = (
        csv("bench/decoding.csv", "dtype", "k", "method", "batch").ratio_to_unguided,
        section("What guidance costs"),
    )
    for title, method in COSTS.items():
        quoted = lines_of("What guidance costs")[title]
        assert all(
            quotes(said, table["bfloat16", 2, method, batch]) for batch, said in zip((1, 8, 32), quoted, strict=True)
        )
    said = re.search(r"In float32 `GuidedDecoder` costs (.*?)\. ", text)[1]
    assert quotes(said, *(table["float32", 2, "ours", batch] for batch in (1, 8, 32)))
    at_once = csv("bench/sweep.csv", "method")
    assert quotes(re.search(r"takes 1 / ([\d.]+) of the time", text)[1], at_once.ratio_to_at_once["point by point"])
    precision = csv("bench/precision.csv", "point")
    points = precision.drop(index="all")
    assert quotes(re.search(r"on (\d+) steps of real prompts", text)[1], precision.steps["all"])
    said = re.search(r"by ([\d.]+) nats of KL on average\s+against float32 \((.*?) at the 99th", text)
    assert quotes(said[1], precision.mean_kl["all"]) and quotes(said[2], points.p99_kl.min(), points.p99_kl.max())


TRAINED = {
    "one pair of each embedded prompt": "short",
    "the same behind two earlier turns (65 % of tokens are prompt)": "long",
    "all pairs among four responses, as the pipeline trains": "embedded",
}  # fmt: skip


def test_what_training_costs_is_that_of_its_bench():
    table, text = csv("bench/training.csv", "dtype", "trainer", "prompts"), section("What training costs")
    for title, prompts in TRAINED.items():
        (ratio, memory), ours = lines_of("What training costs")[title], table.loc[("bfloat16", "ours", prompts)]
        assert quotes(ratio, ours.ratio_to_trl, ours.low, ours.high)
        assert quotes(memory, table.peak_mb["bfloat16", "trl", prompts] / 1000, ours.peak_mb / 1000)
    said = re.search(r"In float32 \(one repetition\) (.*?) times TRL's", text)[1]
    assert quotes(said, *(table.ratio_to_trl["float32", "ours", prompts] for prompts in TRAINED.values()))
    share = table.peak_mb["float32", "ours", "short"] / table.peak_mb["float32", "trl", "short"]
    assert quotes(re.search(r"is then ([\d.]+) of TRL's", text)[1], share)
    said = re.search(r"DPO here is (.*?) times TRL's", text)[1]
    assert quotes(said, *(table.ratio_to_trl["bfloat16", "ours-dpo", prompts] for prompts in ("short", "long")))


def test_how_fast_files_are_read_is_that_of_the_bench():
    table, text = csv("bench/prepare.csv", "file"), section("Data")
    said = re.search(
        r"Lines \((.*?) million rows\) is prepared in (.*?) minutes and (.*?) GiB of memory, "
        r"as Parquet in (.*?) minutes and (.*?) GiB",
        text,
    )
    lines, parquet = table.loc["jsonl"], table.loc["parquet"]
    assert quotes(said[1], lines.rows / 1e6) and quotes(said[2], lines.seconds / 60) and quotes(said[3], lines.peak_gib)
    assert quotes(said[4], parquet.seconds / 60) and quotes(said[5], parquet.peak_gib)


def test_speeds_on_a_gpu_are_those_of_the_bench():
    text, table = section("On a GPU"), pd.read_csv(ROOT / "results/bench/gpu.csv")
    table = table[(table.model == "7b")]
    lines = {
        "`generate`, unguided": ("unguided", 0), "`GuidedDecoder`, unguided": ("ours", 0),
        "`GuidedDecoder`, two ARMs": ("ours", 2), "`GuidedDecoder`, a 1B model as ARM": ("own", 1),
        "naive: a plain logits processor, two ARMs": ("naive", 2),
    }  # fmt: skip
    quoted = {cells[0]: cells[1:] for line in text.splitlines() if len(cells := re.split(r" *\| *", line)[1:-1]) == 5}
    for title, (method, k) in lines.items():
        rows = table[(table.method == method) & (table.k == k) & (table.prompt_tokens == 64)].set_index("batch")
        for batch, said in zip((1, 8, 32, 128), quoted[title], strict=True):
            assert said == "–" if batch not in rows.index else int(said) == round(rows.tokens_per_s[batch])
    steps = table[(table.batch == 1) & (table.prompt_tokens == 64)].set_index(["method", "k"]).step_ms
    for said in (f"{steps['ours', 0]} ms", f"{steps['ours', 2]} ms", f"{steps['eager', 2]} ms"):
        assert said in text
    assert f"{steps['ours', 0] / steps['ours', 2]:.2f} of the unguided" in text
    share = table[(table.method == "ours") & (table.k == 0) & (table.batch == 1) & (table.prompt_tokens == 64)]
    assert f"{share.bandwidth_share.item():.2f} of the unguided step" in text
    trained = pd.read_csv(ROOT / "results/bench/gpu_training.csv").set_index(["model", "kind", "trainer"])
    for model in ("7b", "1b"):
        for trainer in ("ours", "trl"):
            row = trained.loc[(model, "short", trainer)]
            assert re.search(rf"{row.pairs_per_s:.1f}[^.]* in {row.peak_gb:.1f} GB", text)
