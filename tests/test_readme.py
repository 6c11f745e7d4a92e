"""The README files: figures are those of the tables beside them, links lead somewhere, compositions are accepted."""

import json
import math
import re
import shlex
import subprocess

import pandas as pd
import pytest

from pipeline.evaluation import text_quality as quality
from pipeline.report import markdown
from tests.bench import alignment_tax, choose, human
from tests.test_layers import FLOORS
from tests.tiny import ROOT

NUMBER = re.compile(r"(?<![\w.-])[-+]?\d+(?:,\d{3})*(?:\.\d+)?")
FILES = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
PAGES = [name for name in FILES.stdout.splitlines() if "/rubrics/" not in name]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES}
VLLM_PAGE, CROSS_PAGE = "pipeline/decoding/vllm/README.md", "pipeline/decoding/cross_tokenizer/README.md"
BENCH_PAGE, RESULTS_PAGE = "results/bench/README.md", "results/README.md"


def section(page, title):
    """A section's text, in one line as far as prose goes."""
    pattern = rf"^##+ {re.escape(title)}\n(.*?)(?=^##|\Z)"
    return re.search(pattern, TEXTS[page], flags=re.DOTALL | re.MULTILINE).group(1)


def prose(page, title):
    return " ".join(section(page, title).split())


def prose_of_page(page):
    return " ".join(TEXTS[page].split())


def table_lines(page, title):
    return [line for line in section(page, title).splitlines() if line.startswith("|")]


def lines_of(page, title):
    """The lines of a section's tables by their first cell, without emphasis."""
    rows = [
        re.split(r" *\| *", line.replace("**", ""))[1:-1]
        for line in section(page, title).splitlines()
        if line[:1] == "|"
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


OBJECTIVES = ["positivity", "conciseness"]


def pages_written(folder):
    """What stages would write from the committed tables."""
    metrics = json.loads((ROOT / "results/pareto/metrics.json").read_text(encoding="utf-8"))
    markdown.front_page(csv("pareto/front.csv"), OBJECTIVES, metrics, folder / "pareto.md")
    for name in ("comparison", "targets", "conditioned"):
        tables = {each: csv(f"{name}/{each}.csv") for each in ("table", "fronts", "matched")}
        markdown.comparison_page(tables, OBJECTIVES, "genarm", folder / f"{name}.md")
    markdown.ladder_page(csv("weak_to_strong/table.csv"), ["positivity"], "smollm2-10l", folder / "weak_to_strong.md")
    markdown.ladder_page(csv("cross_family/table.csv"), OBJECTIVES, "smollm2-135m", folder / "cross_family.md")
    return {file.stem: file.read_text(encoding="utf-8") for file in folder.iterdir()}


def test_result_pages_are_those_that_stages_write_from_the_committed_tables(tmp_path):
    written = pages_written(tmp_path)
    assert set(written) == {"pareto", "comparison", "targets", "conditioned", "weak_to_strong", "cross_family"}
    for folder, text in written.items():
        assert TEXTS[f"results/{folder}/README.md"] == text, folder


def test_the_table_of_the_first_page_is_the_stage_s():
    table = table_lines("README.md", "What comes out")
    assert len(table) == 2 + len(csv("pareto/front.csv"))
    assert "\n".join(table) in TEXTS["results/pareto/README.md"], "copy the table of results/pareto/README.md"


def test_the_first_page_is_one_page():
    assert len(TEXTS["README.md"].splitlines()) <= 150


def test_the_map_lists_the_packages_from_the_top_floor_down():
    rooms = re.findall(r"^\| \[pipeline/(\w+)\]", section("README.md", "The map of the house"), flags=re.MULTILINE)
    assert set(rooms) == set(FLOORS)
    assert [FLOORS[name] for name in rooms] == sorted(FLOORS.values(), reverse=True)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_of_the_project_and_to_headings_that_are_there(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", TEXTS[page], flags=re.DOTALL)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            names = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in names, f"{page}: {target}"


def compositions():
    """The overrides of every `make params ARGS=…` that a page shows, where they are whole."""
    for page, text in TEXTS.items():
        if page == "CONTRIBUTING.md":  # whose compositions need what its recipes add: see test_contributing
            continue
        for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                match = re.search(r"""make (?:params|plan) .*?ARGS=(?:"((?:[^"\\]|\\.)*)"|(\S+))""", line)
                if match and "…" not in line:
                    yield page, (match[1] or match[2]).replace("\\$", "$")


@pytest.mark.parametrize(("page", "overrides"), sorted(set(compositions())))
def test_compositions_that_pages_show_are_accepted(page, overrides, compose_params):
    assert compose_params(*shlex.split(overrides)).sweep.points


def test_there_are_compositions_to_check():
    assert len(set(compositions())) > 15


def test_held_out_accuracies_are_those_of_the_default_experiment():
    text, metrics = (
        prose(RESULTS_PAGE, "The default experiment"),
        json.loads((ROOT / "results/pareto/metrics.json").read_text(encoding="utf-8")),
    )
    arm = metrics["arms"]["positivity"]
    quoted = re.search(
        r"prefers the chosen response in (.*?) of (\d+) cases, and in (.*?) of the (\d+) whose.*? right in ([\d.]+\d)",
        text,
    )
    like = arm["length_matched"]
    assert quotes(quoted[1], arm["accuracy"], arm["ci_low"], arm["ci_high"]) and int(quoted[2]) == arm["pairs"]
    assert quotes(quoted[3], *(like[key] for key in ("value", "ci_low", "ci_high")))
    assert int(quoted[4]) == like["pairs"] and quotes(quoted[5], arm["chosen_longer"]["value"])
    front = csv("pareto/front.csv", "point")
    quoted = re.search(
        r"\(relevance (.*?), the sharpened control (.*?)\).*?\(distinct-2 (.*?), the control (.*?)\)", text
    )
    for place, column in ((1, "relevance"), (3, "distinct_2")):
        assert quotes(f"{quoted[place]} {quoted[place + 1]}", front[column].p100_c000, front[column].sharpened)
    guided, floor = front.readable[front.method != "base"], r"readable at \(1, 0\), and ([\d.]+) or more at the other"
    assert quotes(re.search(r"themselves: ([\d.]+) of them", text)[1], guided.p100_c000)
    assert quotes(re.search(floor, text)[1], guided.drop("p100_c000").min())
    spearman = re.search(r"Spearman ([\d.]+) of weight and score, that of positivity ([\d.]+\d)", text)
    assert quotes(" ".join(spearman.groups()), *(metrics["spearman"]["genarm"][name] for name in OBJECTIVES[::-1]))


def test_the_texts_of_the_first_page_are_those_of_the_report():
    report = (ROOT / "results/report/index.html").read_text(encoding="utf-8").replace("\\u0027", "'")
    shown = re.findall(r"^> - \(.*?\) (.*?)\.{0,1}(?: …)?$", section("README.md", "What comes out"), flags=re.MULTILINE)
    assert len(shown) == 8
    for text in shown:
        assert text in report, text


def test_what_counts_as_readable_is_what_the_code_says():
    text = prose_of_page("pipeline/evaluation/README.md")
    number = r"(\d+(?:\.\d+)?)"
    parts = (
        f"at least {number} words",
        f"{number} distinct word pairs",
        f"more than {number} of six",
        f"most {number} under",
    )
    quoted = [re.search(part, text)[1] for part in parts]
    limits = (quality.FEWEST_WORDS, quality.LOWEST_DISTINCT_2, quality.HIGHEST_REPETITION, quality.HIGHEST_PERPLEXITY)
    assert quotes(" ".join(quoted), *limits) and quality.REPETITION_WORDS == 6


def test_the_spread_over_seeds_is_that_of_their_table():
    fronts, text = csv("seeds/fronts.csv"), prose("README.md", "Honest limits")
    number = r"([\d.]+)"
    spread = rf"hypervolume is {number} to {number} \(unguided {number} to {number}\), and for the first seed"
    quoted = re.search(rf"{spread} {number} in float32 and {number} on another processor", text)
    ends = (fronts[name].agg(["min", "max"]) for name in ("readable_hypervolume", "readable_hypervolume_controls"))
    others = csv("seeds/machines.csv", "machine").readable_hypervolume[["float32", "bfloat16, another processor"]]
    assert quotes(" ".join(quoted.groups()), *(value for pair in ends for value in pair), *others) and len(fronts) == 3


def test_what_is_said_of_the_trials_is_in_their_table():
    text, table = prose(RESULTS_PAGE, "How the defaults were chosen"), csv("trials/table.csv", "trial", "point")
    assert len(table.index.unique("trial")) == 9 and "nine trials" in text and "[nine trials]" in TEXTS["README.md"]
    quoted = re.search(
        r"at the conciseness end ([\d.]+) of the.*? had ([\d.]+\d)\..*?worst there: ([\d.]+) readable", text
    )
    trials = ("paper_loss", "default", "labels_by_scorer")
    assert quotes(" ".join(quoted.groups()), *(table.readable[trial, "p000_c100"] for trial in trials))


def test_what_is_said_of_the_ladder_is_in_its_table():
    text, table = prose(RESULTS_PAGE, "Weak to strong"), csv("weak_to_strong/table.csv")
    tried = csv("weak_to_strong/trials.csv", "trial", "point")

    def quoted(pattern, *values):
        found = re.search(pattern, text)
        assert quotes(" ".join(found.groups()), *values), (found[0], values)

    at = table.assign(alpha=table.alpha.fillna(1.0)).set_index(["base", "method", "alpha"])
    ours, gap = at.loc["smollm2-135m"], ["gap_recovered", "gap_ci_low", "gap_ci_high"]
    plain, ratio, base = ours.loc["genarm", 1.0], ours.loc["genarm_log_ratio", 0.5], ours.loc["control", 0.0]
    best = table[table.method == "best_of_4"].set_index("base").loc["smollm2-135m"]
    quoted(r"recovers (.*?) of what DPO on .*? or more, (.*?), without", *plain[gap], *best[gap])
    quoted(r"oracle\. (\S+) of its responses are readable, (\S+) of the base's, .*? falls from (\S+) to (\S+\d)\.",
           plain.readable, base.readable, base.distinct_2, plain.distinct_2)  # fmt: skip
    scored, half = ["reward_positivity", "kl"], ours.loc["genarm", 0.5]
    quoted(r"it has (\S+) at (\S+) nats, the plain form (\S+) at (\S+),", *ratio[scored], *half[scored])
    quoted(r"base; (\S+) of its responses are readable. At α = 1 it is too much: (\S+) are",
           ratio.readable, ours.readable["genarm_log_ratio", 1.0])  # fmt: skip
    assert abs(ratio.distinct_2 - base.distinct_2) < 0.02
    small, middle = at.loc["smollm2-10l"], at.loc["smollm2-20l"]
    pairs = [own.reward_positivity[name, 1.0] for own in (small, middle) for name in ("genarm", "dpo")]
    quoted(r"above DPO, (\S+) against (\S+) on \S+ and (\S+) against (\S+) on", *pairs)
    quoted(r"moves these by (\S+) and (\S+) nats", small.kl["dpo", 1.0], middle.kl["dpo", 1.0])
    quoted(r"responses (\S+) and (\S+) are readable\. \*", *(own.readable["control", 0.0] for own in (small, middle)))
    default = csv("weak_to_strong/default_lr.csv", "base", "method", "alpha").reward_positivity
    quoted(r"choice: (\S+) on .*? has (\S+)", default["smollm2-135m", "genarm", 1.0], plain.reward_positivity)
    steps = [tried.positivity[f"lr_{lr}", "p100"] for lr in ("5.0e-4", "1.0e-3", "2.0e-3")]
    quoted(r"had (\S+) there, at twice that (\S+), at four times (\S+) with (\S+) readable",
           *steps, tried.readable["lr_2.0e-3", "p100"])  # fmt: skip


def test_the_models_of_the_ladder_are_those_of_its_page():
    text = prose(RESULTS_PAGE, "Weak to strong")
    page = (ROOT / "results/weak_to_strong/index.html").read_text(encoding="utf-8")
    for perplexity in re.search(
        r"Perplexity of held-out.*?: (.*?) for itself, (.*?) with 20 layers, (.*?) with 10", text
    ).groups():
        assert perplexity in page
    sizes = re.search(r"distilled: (\d+ and \d+ of its \d+) million parameters", text)[1]
    rows = re.findall(r"<td>smollm2-\w+</td><td>\d+</td><td>([\d.]+) M</td>", page)
    assert quotes(sizes, *map(float, rows))


def test_what_is_said_of_one_arm_for_all_mixes_is_in_its_tables():
    text, fronts = prose(RESULTS_PAGE, "One ARM for all mixes"), csv("conditioned/fronts.csv", "method")
    table = csv("conditioned/table.csv").drop_duplicates(["method", "point"]).set_index(["method", "point"])
    seeds = csv("conditioned/seeds.csv").set_index(["run", "against", "method"])
    names, runs, columns = ["parm", "uniarm", "genarm"], ["0", "1", "2"], ["delta_hv", "delta_ci_low", "delta_ci_high"]
    pooled, over_parm = seeds.loc["all", "genarm"], seeds.loc["all", "parm"]
    volumes = [seeds.hypervolume[run, "genarm", name] for name in names for run in runs]
    assert quotes(re.search(r"PARM's hypervolumes are (.*?)\. Of", text)[1], *volumes)
    assert quotes(
        re.search(r"ahead of GenARM's by (.*?);", text)[1], *pooled.loc["parm", columns], *pooled.loc["uniarm", columns]
    )
    alone = [fronts.loc[name, column] for name in names[:2] for column in columns]
    assert quotes(re.search(r"did not show it \((.*?)\)\.", text)[1], *alone)
    assert quotes(re.search(r"not ahead of PARM\*\*: (.*?)\. Its", text)[1], *over_parm.loc["uniarm", columns])
    assert (fronts.delta_ci_low[names[:2]] < 0).all() and (pooled.delta_ci_low[names[:2]] > 0).all()
    assert quotes(re.search(r"inner product of (.*?)\. \*", text)[1], *pooled.mip[names])
    first = " ".join(section("README.md", "Honest limits").split())
    assert quotes(re.search(r"hypervolumes are (.*?), for two", first)[1], *pooled.hypervolume[names])
    here = csv("comparison/fronts.csv", "method").hypervolume[names]
    assert quotes(re.search(r"in bfloat16 (.*?)\. They", first)[1], *here)
    ends = [(name, point) for name in ("genarm", "parm", "uniarm") for point in ("p100_c000", "p000_c100")]
    turned = re.search(r"GenARM's positivity (.*?)In between", text)[1]
    assert quotes(turned, *(table.reward_positivity[end] for end in ends))
    genarm = csv("conditioned/table.csv")
    genarm = genarm[genarm.method == "genarm"].set_index(["point", "alpha_conciseness"]).reward_conciseness
    ended = [seeds.end_conciseness[run, "genarm", "genarm"] for run in runs]
    assert quotes(re.search(r"conciseness end: (.*?) there", text)[1], *ended)
    steps = [("p000_c100", 0.5), ("p050_c050", 0.5)]
    assert quotes(re.search(r"too much, with (.*?)\. PARM", text)[1], *(genarm[at] for at in steps))
    tried = csv("trials/rivals.csv")
    assert len(tried[tried.method == "uniarm"]) == 3
    assert (
        tried[(tried.method == "parm") & tried.machine.str.startswith("2 CPU cores")][["beta", "lr"]]
        .drop_duplicates()
        .shape[0]
        == 5
    )


def test_each_objective_rises_with_its_weight_along_the_line():
    assert "each objective rises with its α (Spearman 1 and 1, five points)" in prose(
        RESULTS_PAGE, "Across model families"
    )
    table = csv("cross_family/table.csv")
    line = table[
        (table.method == "genarm_log_ratio")
        & (table.alpha_positivity / 1 + table.alpha_conciseness / 0.2).round(6).eq(1)
    ]
    assert len(line) == 5
    for objective in OBJECTIVES:
        assert line.sort_values(f"alpha_{objective}")[f"reward_{objective}"].is_monotonic_increasing
    best = table[(table.method == "genarm_log_ratio") & (table.alpha_positivity == 1)].iloc[0]
    others = table[table.method.isin(["control", "sharpened", "best_of_4"])]
    assert len(others) == 4 and (best.ci_low_positivity > others.ci_high_positivity).all()


def test_what_is_said_of_other_ways_across_tokenizers_is_in_the_table():
    text = prose(RESULTS_PAGE, "Across model families")
    table = csv("cross_family/table.csv").set_index(["method", "alpha_positivity", "alpha_conciseness"])
    over_bytes, over_tokens, nudged = (
        table.loc[name] for name in ("byte_proxy_tuning", "genarm_log_ratio", "nudging")
    )  # fmt: skip
    interval = [f"{column}_positivity" for column in ("reward", "ci_low", "ci_high")]
    half, whole, concise = (0.5, 0.0), (1.0, 0.0), (0.0, 0.2)
    found = re.search(r"at the same KL: (.*?)\. Its texts", text)[1]
    laws = (over_bytes.loc[half], over_tokens.loc[half])
    assert quotes(found, *(law[column] for law in laws for column in (*interval, "kl")))
    found = re.search(r"are worse: (.*?) under Gemma", text)[1].replace("α = 1", "")
    ends = over_bytes.loc[half], over_bytes.loc[whole]
    assert quotes(found, *(end.readable for end in ends), *(end.perplexity for end in ends))
    found = re.search(r"code has it\) reaches (.*?)\. Both", text)[1].replace("α = 1", "")
    assert quotes(
        found, *nudged.loc[whole][interval], nudged.loc[whole].readable, nudged.loc[concise].readable,
        over_tokens.loc[concise].readable,
    )  # fmt: skip
    assert quotes(
        re.search(r"intervals, and ([\d.]+) .*? readable \(([\d.]+) of", text)[0].replace("α = 1", ""),
        over_tokens.loc[whole].readable, table.loc["control"].iloc[0].readable,
    )  # fmt: skip
    prompts = nudged.prompts.iloc[0], over_bytes.prompts.iloc[0]
    assert quotes(re.search(r"one base; (.*?)\.$", text.strip())[1], *prompts)


def test_what_a_third_objective_does_is_in_its_table():
    at, text = csv("three_objectives/front.csv", "point"), prose(RESULTS_PAGE, "A third objective")
    metrics = json.loads((ROOT / "results/three_objectives/metrics.json").read_text(encoding="utf-8"))
    scores = ["score_positivity", "score_conciseness", "score_first_person"]
    held_out = ["held_out_first_person", "held_out_first_person_ci_low", "held_out_first_person_ci_high"]
    control, alone, beside = at.loc["sharpened"], at.loc["f050"], at.loc["p050_f025"]
    card = json.loads((ROOT / "results/three_objectives/data_card.json").read_text(encoding="utf-8"))
    told = card["objectives"]["first_person"]["held-out accuracy"]
    tried = csv("three_objectives/trials.csv", "beta", "point").readable
    own = ["score_first_person", "ci_low_first_person", "ci_high_first_person"]
    for pattern, values in {
        r"The share of sentences .*? of the third": (
            *at.loc["base", own],
            *control[own],
            *alone[own],
            alone.alpha_first_person,
        ),
        r"a classifier of words .*?\. ": (
            *(told["classifier"][name] for name in ("value", "ci_low", "ci_high")),
            told["length"]["value"],
        ),
        r"where [\d.]+ of the texts were": (tried[5, "f100"],),
        r"\(with 10: .*?\)": (10, tried[10, "f100"]),
        r"with as little as .*? readable": (beside.alpha_first_person, beside.score_first_person, beside.readable),
        r"All three in one .*?\. ": (*at.loc["p033_c033_f017", scores], *at.loc["base", scores]),
        r"Hypervolume .*?\. ": (metrics["hypervolume"], metrics["hypervolume_controls"]),
        r"hardly moves with this ARM .*?;": (*alone[held_out], *control[held_out]),
        r"first person with it .*?:": (at.score_first_person["p100"],),
    }.items():
        (found,) = re.findall(pattern, text)
        assert quotes(found, *values), found


def test_relevance_by_words_orders_texts_as_an_encoder_does():
    table = csv("bench/relevance.csv")
    alike = [own[["words", "encoder", "cosine"]].corr("spearman").words for _, own in table.groupby("table")]
    quoted = re.search(
        r"(on average .*? below).*?(rank correlations of .*? cosine)", prose_of_page("pipeline/evaluation/README.md")
    )
    values = [(table.encoder - table.words).mean(), *(one.encoder for one in alike), *(one.cosine for one in alike)]
    assert quotes(" ".join(quoted.groups()), *values)


def test_what_guidance_across_families_costs_is_that_of_its_bench():
    text, table = " ".join(TEXTS[CROSS_PAGE].split()), csv("bench/crosstoken.csv", "batch")
    assert quotes(re.search(r"A token takes (.*?) times as long", text)[1], *table.over)
    assert quotes(re.search(r"medians of three, (.*?) at batch", text)[1], *table.loc[32, ["low", "high"]])
    assert quotes(re.search(r"moved the log-ratio by (.*?) nats", text)[1], table.departing.iloc[0])


def test_what_is_said_of_the_comparison_is_in_its_tables():
    text, table = prose(RESULTS_PAGE, "Comparison of methods"), csv("comparison/table.csv")
    fronts, matched = csv("comparison/fronts.csv", "method"), csv("comparison/matched.csv", "objective", "method", "kl")
    columns, points = ["hypervolume", "readable_hypervolume"], table.drop_duplicates(["method", "point"])
    ends = {point: points[points.point == point].set_index("method") for point in ("p100_c000", "p000_c100")}

    def quoted(pattern, *values):
        found = re.search(pattern, text)
        assert quotes(" ".join(found.groups()), *values), (found[0], values)

    single, single_matched = (
        csv("comparison/float32.csv", "method"),
        csv("comparison/float32_matched.csv").query("kl == 8"),
    )
    assert len(fronts) == 1 + 15 and len(single) == 1 + 12
    assert list(fronts.readable_hypervolume.nlargest(3).index) == ["uniarm", "parm", "genarm"]
    assert list(single.hypervolume.nlargest(3).index) == ["uniarm", "parm", "genarm"]
    one, parm, genarm = (fronts.loc[name] for name in ("uniarm", "parm", "genarm"))
    quoted(r"UniARM has a hypervolume of (\S+), readable (\S+), PARM (\S+) and (\S+), GenARM (\S+) and (\S+\d)\.",
           *one[columns], *parm[columns], *genarm[columns])  # fmt: skip
    delta = ["delta_hv", "delta_ci_low", "delta_ci_high"]
    quoted(r"differences are (.*?), p = (\S+) each", *one[delta], *parm[delta], one.p_holm)
    quoted(r"in float32 (\S+) and (\S+), and", *single.delta_hv[["uniarm", "parm"]])
    assert one.p_holm == parm.p_holm
    few = {"args": 32, "transfer_q": 16, "cards": 16}
    assert table.prompts.eq(table.method.map(few).fillna(100)).all()
    quoted(r"\((\d+) for ARGS, (\d+) for Transfer-Q and CARDS\)", few["args"], few["cards"])
    along = [ends[point].reward_positivity for point in ends]
    quoted(r"PARM's positivity goes from ([\d.]+) to ([\d.]+) along", *(reward["parm"] for reward in along))
    quoted(r"GenARM's from ([\d.]+) to ([\d.]+\d)", *(reward["genarm"] for reward in along))
    quoted(r"as large a hypervolume, (\S+), but a readable one of (\S+); (\S+) and (\S+) in",
           *fronts.loc["log_ratio", columns], *single.loc["log_ratio", columns])  # fmt: skip
    assert fronts.delta_ci_low["log_ratio"] < 0 < fronts.delta_ci_high["log_ratio"]
    dpo = ["mod", "morl", "soup", "soup_factors", "genarm_dpo"]
    lower = table.set_index("point", append=True).assign(least=lambda t: t.filter(like="reward_").min(axis=1))
    worst = lower.groupby("method").least.max()
    quoted(r"highest has (\S+) with UniARM, (\S+) with PARM, (\S+) in the log-ratio .*?, (\S+) with GenARM, (\S+) with",
           *worst[["uniarm", "parm", "log_ratio", "genarm"]], worst[dpo].max())  # fmt: skip
    best = [lower.least[lower.method == name].idxmax()[1] for name in ("uniarm", "parm", "log_ratio", "genarm")]
    assert set(best) == {"p050_c050", "p025_c075"}
    spread = [end for run in (fronts, single) for end in run.hypervolume[dpo].agg(["min", "max"])]
    quoted(r"place of ARMs\) have (\S+) to (\S+), in float32 (\S+) to (\S+\d)\.", *spread)
    readable = ends["p000_c100"].readable
    quoted(r"unlikely: ([\d.]+) of DPO's.*? readable, ([\d.]+) of", readable["mod"], readable["genarm"])
    less = ["difference", "difference_ci_high", "difference_ci_low"]
    warm, terse = (matched.loc[name].xs(8.0, level="kl") for name in ("positivity", "conciseness"))
    warmer, terser = (matched.loc[name].xs(16.0, level="kl") for name in ("positivity", "conciseness"))
    quoted(r"at 8 nats GenARM has a positivity of (\S+) and a conciseness of (\S+\d)\.",
           warm.reward["genarm"], terse.reward["genarm"])  # fmt: skip
    quoted(r"PARM has (.*?) less conciseness there, and at (\d+) nats (.*?) less positivity; UniARM (.*?) less",
           *-terse.loc["parm", less], 16, *-warmer.loc["parm", less], *-warmer.loc["uniarm", less])  # fmt: skip
    both = ["parm", "uniarm"]
    assert terse.p_holm["parm"] < 0.05 and (warmer.p_holm[both] < 0.05).all()
    assert min(*warm.p_holm[both], terse.p_holm["uniarm"], *terser.p_holm[both]) > 0.05
    assert (single_matched[single_matched.method.isin(both)].difference_ci_high < 0).all()
    quoted(r"DPO has (\S+) and (\S+) at 8 nats", warm.reward["mod"], terse.reward["mod"])
    quoted(r"of which (\S+) is readable, (\S+) of GenARM's\.", *terse.readable[["mod", "genarm"]])
    assert warm.p_holm["mod"] > 0.05 > terse.p_holm["mod"]
    quoted(r"form's at 8 nats, (\S+), (\S+) is readable", *terse.loc["log_ratio", ["reward", "readable"]])
    head = table[table.method.isin(["fudge", "controlled_decoding"])]
    quoted(r"below the base's (\S+), within", fronts.hypervolume["base"])
    assert head.kl.max() < 5 and fronts.hypervolume[head.method.unique()].max() < fronts.hypervolume["base"]
    tried = csv("trials/rivals.csv")
    prefix = tried[tried.method.isin(["fudge", "controlled_decoding"])]
    strongest = prefix.sort_values("reward_positivity_p100_c000").iloc[-1]
    quoted(r"moved positivity, to ([\d.]+) at (\d+) nats", *strongest[["reward_positivity_p100_c000", "kl_p100_c000"]])
    assert (prefix.reward_conciseness_p000_c100 < 0.06).all() and strongest.method == "fudge"
    there = tried[tried.machine == "2 CPU cores, bfloat16"]
    assert len(there.dropna(subset="beta")) == 13 and len(prefix) == 10 and (tried.method == "uniarm").sum() == 3
    searches, end = list(few), ends["p100_c000"]
    forwards = points.set_index(["point", "method"]).forwards_per_token
    quoted(r"to (\S+) \(ARGS\), (\S+) \(Transfer-Q\) and (\S+) \(CARDS\), for (\d+) to (\d+) forwards",
           *end.reward_positivity[searches], *forwards["p100_c000"][searches].agg(["min", "max"]))  # fmt: skip
    quoted(r"conciseness: (\S+) at most", ends["p000_c100"].reward_conciseness[searches].max())
    quoted(r"has a hypervolume of (\S+) for (\d+) forwards, CARDS (\S+) for (\d+\d)\.",
           fronts.hypervolume["best_of_n"], forwards["p050_c050", "best_of_n"], fronts.hypervolume["cards"],
           forwards["p050_c050", "cards"])  # fmt: skip


def test_what_is_said_of_dials_and_sentences_is_in_their_table():
    text, at = prose(RESULTS_PAGE, "A dial or the sentence"), csv("sentence/table.csv", "objective", "method", "alpha")

    def quoted(pattern, *values):
        found = re.search(pattern, text)
        assert quotes(" ".join(found.groups()), *values), (found[0], values)

    warm, short, simple = (at.loc[name] for name in ("positivity", "conciseness", "simplicity"))
    dial, sentence, contrast = ("log_ratio", 0.5), ("instruction", 1.0), ("contrast_prompting", 1.0)
    scored = ["score", "ci_low", "ci_high"]
    quoted(r"it scores (.*?) at (\d+) nats .*?, and (\S+) of", *warm.loc[dial, [*scored, "kl", "readable"]])
    quoted(r"in the prompt scores (.*?)\. Its", *warm.loc[sentence, scored])
    quoted(r"takes the score to (\S+), where (\S+) are", *warm.loc[("log_ratio", -1.0), ["score", "readable"]])
    quoted(r"The dial's (\S+) at .*? which (\S+) are readable; the", *short.loc[dial, ["score", "readable"]])
    quoted(r"the sentence has (\S+) and (\S+\d)\.", *short.loc[sentence, ["score", "readable"]])
    matched = csv("targets/matched.csv", "objective", "method", "kl").loc[("conciseness", "log_ratio", 8.0)]
    quoted(r"8 nats, it has (\S+), and (\S+) are", matched.reward, matched.readable)
    best = simple.groupby("method").score.max()
    quoted(r"base has (\S+), the dial (\S+), the sentence (\S+), DPO (\S+\d)\.",
           best["base"], best["log_ratio"], simple.score[sentence], best["mod"])  # fmt: skip
    quoted(r"dial works: (\S+) at", simple.score["log_ratio", -1.0])
    both = pd.DataFrame([warm.loc[contrast], short.loc[contrast]])
    quoted(r"its kind: (\S+) and (\S+) at (\d+) and (\d+) nats, (\S+) and (\S+) readable",
           *both.score, *both.kl, *both.readable)  # fmt: skip
    untrained = warm.loc[["instruction", "instruction_system", "contrast_prompting"]].score
    assert untrained.idxmax() == contrast and contrast[0] == short.score[untrained.index].idxmax()[0]


def test_what_is_said_of_human_preference_is_in_its_tables():
    text, learning = prose(RESULTS_PAGE, "Human preference at a small scale"), csv("human/learning.csv")
    steering, run = csv("human/steering.csv"), json.loads((ROOT / "results/human/run.json").read_text())
    assert human.page(learning, steering, run) == TEXTS["results/human/README.md"]

    def quoted(pattern, *values):
        found = re.search(pattern, text)
        assert quotes(" ".join(found.groups()), *values), (found[0], values)

    mean = learning.groupby(["variant", "pairs", "reward"]).mean(numeric_only=True)
    arm, dpo, simpo = (mean.loc[name, 900] for name in ("arm", "dpo", "simpo"))
    columns = ["length_correlation", "accuracy", "balanced_accuracy", "matched_accuracy", "matched_pairs"]
    quoted(
        r"correlation of (\S+) with it; accuracy (\S+), balanced (\S+), and (\S+) of the (\d+) pairs",
        *arm.loc["sum", columns],
    )
    quoted(r"even right in (\S+) only", arm.accuracy["ratio"])
    quoted(r"\((\S+) with 100\), nor .*? \((\S+)\)", mean.accuracy["arm", 100, "sum"],
           mean.accuracy["arm, balanced", 900, "sum"])  # fmt: skip
    balanced = ["balanced_accuracy", "balanced_ci_low", "balanced_ci_high"]
    quoted(r"its start, has (\S+), balanced (.*?), and (\S+) of",
           *dpo.loc["ratio", ["accuracy", *balanced, "matched_accuracy"]])  # fmt: skip
    quoted(r"same ratio has (\S+), balanced (\S+), though .*?, has (\S+\d)\.",
           *simpo.loc["ratio", ["accuracy", "balanced_accuracy"]], simpo.accuracy["mean"])  # fmt: skip
    at = steering.set_index(["variant", "alpha"])
    quoted(r"refuses more, (\S+) of .*? refuses (\S+), at .*?: (\S+) reads", at.refused["arm", 1.0],
           at.refused["base", 0.0], at.reads_well["arm", 1.0])  # fmt: skip
    ratio = at.loc["dpo, log-ratio", 1.0]
    quoted(r"stays readable \((\S+)\), refuses (\S+), and", ratio.reads_well, ratio.refused)
    assert 0.45 < ratio.ended < 0.55
    quoted(r"(\d+) words at α = (\d), (\d+) at α = (\d)", at.words["simpo, log-ratio", 1.0], 1,
           at.words["simpo, log-ratio", 2.0], 2)  # fmt: skip
    assert quotes(re.search(r"judged on (\d+) held-out", text)[1], learning.test_pairs.iloc[0])


def test_promises_are_shown_as_their_bench_writes_them():
    table = csv("choose/table.csv")
    assert choose.page(table, OBJECTIVES) == TEXTS["results/choose/README.md"] and len(table) >= 8
    text, measured = prose(RESULTS_PAGE, "Weights for an outcome"), ["measured_positivity", "measured_conciseness"]
    best, even = (table[table.target.str.startswith(each)].iloc[0] for each in ("the best worst", "positivity ≥ 0.7"))
    alphas = ["alpha_positivity", "alpha_conciseness"]
    found = re.search(
        r"highest at \((.*?)\): (.*?) on test prompts, where even weights of \((.*?)\) give (.*?)\.$", text
    )
    assert quotes(" ".join(found.groups()), *best[alphas], *best[measured], *even[alphas], *even[measured])
    assert TEXTS["results/choose/README.md"].count("10 of 10") == 3 and "10 of 10 targets" in text


def test_what_is_said_of_the_alignment_tax_is_in_its_table():
    table, text = csv("alignment_tax/table.csv"), prose(RESULTS_PAGE, "Alignment tax")
    assert alignment_tax.page(table) == TEXTS["results/alignment_tax/README.md"]
    at = table.set_index(["task", "form", "alpha_positivity", "alpha_conciseness"]).sort_index()
    places = [
        ("base", 0.0, 0.0),
        ("plain", 1.0, 0.0),
        ("plain", 0.0, 1.0),
        ("plain", 0.5, 0.5),
        ("log_ratio", 0.5, 0.5),
    ]
    intent, alike, polarity, social = (
        at.loc[name].loc[places]
        for name in ("intent_recognition", "similarities_abstraction", "entailed_polarity", "social_iqa")
    )
    found = re.search(r"every weight, from (\S+) to (\S+) at .*?, (\S+) at .*? and (\S+) between", text)
    assert quotes(" ".join(found.groups()), *intent.acc_norm[:4]) and (intent.acc_norm_change_high[1:] < 0).all()
    found = re.search(r"in common falls from (\S+) to (\S+), plain guidance leaves (\S+),", text)
    assert quotes(" ".join(found.groups()), *alike.acc_norm.iloc[[0, 4, 3]])
    assert alike.acc_norm_change_high.iloc[4] < 0 < alike.acc_norm_change_high.iloc[3]
    assert polarity.acc_norm.nunique() == 1 and (social.acc_norm_ci_low < social.chance).all()
    others = table[~table.task.isin(["intent_recognition", "similarities_abstraction"])]
    assert ((others.acc_norm_change_low <= 0) & (others.acc_norm_change_high >= 0)).all()
    assert "all 221 pairs" in text and at.loc["hhh_alignment"].questions.eq(221).all() and len(table) == 30


def test_what_is_said_of_rewards_at_equal_kl_is_in_their_table():
    text, places = prose(RESULTS_PAGE, "Reward at equal KL"), ("objective", "kl", "method")
    matched, dropped = csv("targets/matched.csv", *places), csv("targets/dropped.csv", *places)
    interval = ["reward", "ci_low", "ci_high"]

    def quoted(pattern, *values):
        found = re.search(pattern, text)
        assert quotes(" ".join(found.groups()), *values), (found[0], values)

    def rewards(objective, method, *kls):
        return [matched.reward[objective, kl, method] for kl in kls]

    for pattern, place in (
        (r"at 4 nats the log-ratio form has (.*?\]) and DPO", ("conciseness", 4.0, "log_ratio")),
        (r"at 4 nats the log-ratio form has .*? and DPO (.*?\]);", ("conciseness", 4.0, "mod")),
        (r"at 8 nats the log-ratio form (.*?\]), the plain", ("conciseness", 8.0, "log_ratio")),
        (r"\], the plain form (.*?\]), DPO", ("conciseness", 8.0, "genarm")),
        (r"\], DPO (0\.42 \[.*?\])\.", ("conciseness", 8.0, "mod")),
    ):
        quoted(pattern, *matched.loc[place, interval])
    for kl, better in ((4.0, "log_ratio"), (8.0, "log_ratio"), (8.0, "genarm")):
        assert matched.ci_low["conciseness", kl, better] > matched.ci_high["conciseness", kl, "mod"], "intervals apart"
    legible = [matched.readable["conciseness", 8.0, name] for name in ("genarm", "log_ratio", "mod")]
    quoted(
        r"At 8 nats (\S+) of the plain form's responses are readable, (\S+) of the log-ratio form's, (\S+) of", *legible
    )
    quoted(r"DPO has (\S+), (\S+) and (\S+) at 4, 8 and 16 nats, the", *rewards("positivity", "mod", 4.0, 8.0, 16.0))
    quoted(
        r"16 nats, the log-ratio form (\S+), (\S+) and (\S+), with", *rewards("positivity", "log_ratio", 4.0, 8.0, 16.0)
    )
    quoted(r"overlap; the plain form (\S+), (\S+) and (\S+), which", *rewards("positivity", "genarm", 4.0, 8.0, 16.0))
    for kl in (4.0, 8.0, 16.0):
        assert matched.ci_low["positivity", kl, "mod"] < matched.ci_high["positivity", kl, "log_ratio"], "they overlap"
    lower = [matched.p_holm["positivity", kl, name] for kl in (4.0, 16.0) for name in ("log_ratio", "mod")]
    assert max(lower) < 0.05 < min(matched.p_holm["positivity", 8.0, name] for name in ("log_ratio", "mod"))
    near = matched.xs("log_ratio", level="method").query("kl <= 8")
    assert (near.difference > 0).all() and near[near.p_holm >= 0.05].index.to_list() == [("positivity", 8.0)]
    quoted(r"conciseness: (\S+) at 16 nats, where the plain form has (\S+),",
           *(matched.reward["conciseness", 16.0, name] for name in ("log_ratio", "genarm")))  # fmt: skip
    hypervolumes = csv("targets/fronts.csv", "method").hypervolume
    quoted(r"hypervolume is (\S+) against (\S+)\. \*", *hypervolumes[["log_ratio", "genarm"]])
    table = csv("targets/table.csv", "method", "point", "alpha_positivity", "alpha_conciseness")
    best = table.loc["best_of_n"]
    quoted(r"at the (\S+) nats that are its bound, has a positivity of (\S+), more .*? and a conciseness of (0\.14);",
           best.kl.iloc[0], best.reward_positivity.max(), best.reward_conciseness.max())  # fmt: skip
    assert best.reward_positivity.max() > matched.reward.loc["positivity", 1.0].max()
    assert (abs(best.forwards_per_token - 8) < 1).all()
    assert (table.forwards_per_token[["genarm", "log_ratio", "mod"]] == 2).all()
    assert not (dropped.difference > 0).any()
    lower = -dropped.difference
    quoted(r"at 4 nats positivity is (\S+) lower and conciseness (\S+), at 8",
           lower["positivity", 4.0, "gated"], lower["conciseness", 4.0, "gated"])  # fmt: skip
    assert all(dropped.difference_ci_high[name, 8.0, "gated"] > 0 for name in OBJECTIVES), "the same within intervals"
    quoted(r"plain form's, at 4 nats (\S+) lower, and conciseness at 8 nats is (\S+) lower: tokens",
           lower["positivity", 4.0, "budgeted"], lower["conciseness", 8.0, "budgeted"])  # fmt: skip
    assert dropped.p_holm["positivity", 8.0, "budgeted"] == 1
    quoted(r"more than 10 nats, and at 8 nats positivity is (\S+) lower", lower["positivity", 8.0, "plausible"])


VLLM = {
    "unguided vLLM": ("unguided", 0), "guided": ("guided", 2), "the same lanes, each drawing for itself": ("lanes", 2),
    "guided, vLLM's own LoRA class for CPUs": ("stock", 2), "`GuidedDecoder`": ("decoder", 2),
}  # fmt: skip


@pytest.mark.parametrize("title", VLLM)
def test_speeds_inside_vllm_are_those_of_its_bench(title):
    table, quoted = csv("bench/vllm.csv", "engine", "arms", "batch"), lines_of(VLLM_PAGE, "Speed")[title]
    for batch, figures in zip((1, 8, 32, 64), quoted, strict=True):
        if (*VLLM[title], batch) not in table.index:
            assert figures == "–"
            continue
        row = table.loc[(*VLLM[title], batch)]
        assert quotes(figures, row.tokens_per_s, *([] if title == "unguided vLLM" else [row.of_unguided])), figures


def test_what_is_said_of_serving_is_in_its_benches():
    text, table = prose(VLLM_PAGE, "Speed"), csv("bench/vllm.csv", "engine", "arms").sort_values("batch")
    figures = re.search(r"With one ARM (.*?) of unguided", text)[1]
    assert quotes(figures, *table.loc[("guided", 1)].of_unguided)
    served = csv("bench/serve.csv", "requests")
    assert (served.answers == served.whole).all() and not served.internal_errors.any()
    assert len(served) == 11 and "5401 to 6000" in served.index
    quoted = re.search(
        r"memory rose from (.*?) to (.*?) GiB over the first 3,600 and to (.*?) over the rest, (.*?) of", text
    )
    memory = served.memory_gib
    last = memory["5401 to 6000"]
    places = (memory["64 at once"], memory["3001 to 3600"], last, last - memory["4201 to 4800"])
    assert quotes(" ".join(quoted.groups()), *places)
    tiny = csv("bench/serve_tiny.csv", "requests")
    assert (tiny.answers == tiny.whole).all() and not tiny.internal_errors.any() and "18001 to 20000" in tiny.index
    halves = re.search(r"memory was (.*?) GiB after the first half and (.*?) after the second", text)
    assert quotes(" ".join(halves.groups()), *tiny.memory_gib[["8001 to 10000", "18001 to 20000"]])


COSTS = {
    "naive: a plain logits processor, three forwards": "naive",
    "`GuidanceLogitsProcessor` inside `generate`, two forwards": "processor", "`GuidedDecoder`, one forward": "ours",
}  # fmt: skip


def test_what_guidance_costs_is_that_of_its_bench():
    table, text = (
        csv("bench/decoding.csv", "dtype", "k", "method", "batch").ratio_to_unguided,
        prose(BENCH_PAGE, "Guided decoding on a CPU"),
    )
    for title, method in COSTS.items():
        quoted = lines_of(BENCH_PAGE, "Guided decoding on a CPU")[title]
        assert all(
            quotes(figures, table["bfloat16", 2, method, batch])
            for batch, figures in zip((1, 8, 32), quoted, strict=True)
        )
    figures = re.search(r"In float32 `GuidedDecoder` costs (.*?)\. ", text)[1]
    assert quotes(figures, *(table["float32", 2, "ours", batch] for batch in (1, 8, 32)))
    at_once = csv("bench/sweep.csv", "method")
    assert quotes(re.search(r"takes 1 / ([\d.]+) of the time", text)[1], at_once.ratio_to_at_once["point by point"])
    precision = csv("bench/precision.csv", "point")
    points = precision.drop(index="all")
    assert quotes(re.search(r"on (\d+) steps of real prompts", text)[1], precision.steps["all"])
    figures = re.search(r"by ([\d.]+) nats of KL on average\s+against float32 \((.*?) at the 99th", text)
    assert quotes(figures[1], precision.mean_kl["all"]) and quotes(figures[2], points.p99_kl.min(), points.p99_kl.max())


MIXED = {"two": 2, "three": 3, "five": 5}


def test_what_one_arm_for_all_mixes_costs_is_that_of_its_bench():
    table, lines = (
        csv("bench/mixtures.csv", "arms", "objectives", "batch"),
        lines_of(BENCH_PAGE, "One ARM for all mixes"),
    )
    kinds = {"separate ARMs": "separate", "one ARM": "for all mixes"}
    for title, (word, kind) in {f"{word} objectives, {kind}": (word, kind) for word in MIXED for kind in kinds}.items():
        wanted = [table.ratio_to_unguided[kinds[kind], MIXED[word], batch] for batch in (1, 8, 32)]
        assert all(quotes(figures, value) for figures, value in zip(lines[title], wanted, strict=True)), title
    assert set(table.dtype) == {"float32"}


DRAFTED = {
    "one ARM, plain, α = 0.5": (1, "plain", 0.5), "one ARM, plain, α = 1": (1, "plain", 1.0),
    "one ARM, plain, α = 2": (1, "plain", 2.0), "two ARMs, plain, α = 0.5 each": (2, "plain", 1.0),
    "one ARM, log-ratio, α = 1": (1, "log_ratio", 1.0),
}  # fmt: skip


def test_how_often_drafts_are_right_is_that_of_the_bench():
    title = "Speculative guidance"
    table, lines = csv("bench/acceptance.csv", "drafts_from", "arms", "form", "alpha"), lines_of(BENCH_PAGE, title)
    for name, point in DRAFTED.items():
        line = table.loc["the model of the ARMs", *point]
        figures = line[["rejection", "gumbel", "inverse", "likely", "per_forward_3"]]
        assert all(quotes(quoted, value) for quoted, value in zip(lines[name], figures, strict=True)), name
    others = table.likely.unstack("drafts_from").loc[(1, "plain", 1.0)]
    quoted = re.search(
        r"the ARMs alone are right in ([\d.]+) and the small model without them in ([\d.]+)", prose(BENCH_PAGE, title)
    )
    assert quotes(" ".join(quoted.groups()), others["the ARMs"], others["no ARM"])


def test_what_drafts_gain_is_that_of_the_bench():
    table, lines = pd.read_csv(ROOT / "results/bench/speculation.csv"), lines_of(BENCH_PAGE, "Speculative guidance")
    bases = dict(zip(("the base", "six times its layers"), table.base.unique(), strict=True))
    speed = table.set_index(["base", "batch", "run"])
    for name, base in bases.items():
        for batch in speed.loc[base].index.unique("batch"):
            at = speed.loc[base, batch]
            best = at[at.index.str.fullmatch(r"guided, [1-9] drafted")].over_plain.max()
            auto = at.loc["guided, as many as pay"]
            quoted = lines[f"{name}, batch {batch}"]
            figures = (
                at.tokens_per_s["unguided"], at.tokens_per_s["guided, 0 drafted"], best, auto.tokens_per_s,
                auto.over_plain, auto.low, auto.high, auto.over_unguided,
            )  # fmt: skip
            assert quotes(" ".join(quoted), *figures), (name, batch)
    text = re.search(
        r"is ([\d.]+) times as fast as without drafts; on a base .*? ([\d.]+) times",
        prose(RESULTS_PAGE, "Weak to strong"),
    )
    assert quotes(
        " ".join(text.groups()), *(speed.loc[base, 1, "guided, as many as pay"].over_plain for base in bases.values())
    )


TRAINED = {
    "one pair of each embedded prompt": "short",
    "the same behind two earlier turns (65 % of tokens are prompt)": "long",
    "four pairs among the four responses of a prompt": "embedded",
}  # fmt: skip


def test_what_training_costs_is_that_of_its_bench():
    table, text = csv("bench/training.csv", "dtype", "trainer", "prompts"), prose(BENCH_PAGE, "Training")
    for title, prompts in TRAINED.items():
        (ratio, memory), ours = lines_of(BENCH_PAGE, "Training")[title], table.loc[("bfloat16", "ours", prompts)]
        assert quotes(ratio, ours.ratio_to_trl, ours.low, ours.high)
        assert quotes(memory, table.peak_mb["bfloat16", "trl", prompts] / 1000, ours.peak_mb / 1000)
    figures = re.search(r"In float32 \(one repetition\) (.*?) times TRL's", text)[1]
    assert quotes(figures, *(table.ratio_to_trl["float32", "ours", prompts] for prompts in TRAINED.values()))
    share = table.peak_mb["float32", "ours", "short"] / table.peak_mb["float32", "trl", "short"]
    assert quotes(re.search(r"is then ([\d.]+) of TRL's", text)[1], share)
    figures = re.search(r"DPO here is (.*?) times TRL's", text)[1]
    assert quotes(figures, *(table.ratio_to_trl["bfloat16", "ours-dpo", prompts] for prompts in ("short", "long")))


def test_how_fast_files_are_read_is_that_of_the_bench():
    table, text = csv("bench/prepare.csv", "file"), prose("pipeline/data/README.md", "What is checked")
    figures = re.search(
        r"Lines \((.*?) million rows\) is prepared in (.*?) minutes and (.*?) GiB of memory, "
        r"as Parquet in (.*?) minutes and (.*?) GiB",
        text,
    )
    lines, parquet = table.loc["jsonl"], table.loc["parquet"]
    assert (
        quotes(figures[1], lines.rows / 1e6)
        and quotes(figures[2], lines.seconds / 60)
        and quotes(figures[3], lines.peak_gib)
    )
    assert quotes(figures[4], parquet.seconds / 60) and quotes(figures[5], parquet.peak_gib)


def test_speeds_on_a_gpu_are_those_of_the_bench():
    text, table = section(BENCH_PAGE, "Guided decoding on a GPU"), pd.read_csv(ROOT / "results/bench/gpu.csv")
    table = table[(table.model == "7b")]
    lines = {
        "`generate`, unguided": ("unguided", 0), "`GuidedDecoder`, unguided": ("ours", 0),
        "`GuidedDecoder`, two ARMs": ("ours", 2), "`GuidedDecoder`, a 1B model as ARM": ("own", 1),
        "naive: a plain logits processor, two ARMs": ("naive", 2),
    }  # fmt: skip
    quoted = {cells[0]: cells[1:] for line in text.splitlines() if len(cells := re.split(r" *\| *", line)[1:-1]) == 5}
    for title, (method, k) in lines.items():
        rows = table[(table.method == method) & (table.k == k) & (table.prompt_tokens == 64)].set_index("batch")
        for batch, figures in zip((1, 8, 32, 128), quoted[title], strict=True):
            assert figures == "–" if batch not in rows.index else int(figures) == round(rows.tokens_per_s[batch])
    text = " ".join(text.split())
    steps = table[(table.batch == 1) & (table.prompt_tokens == 64)].set_index(["method", "k"]).step_ms
    for figures in (f"{steps['ours', 0]} ms", f"{steps['ours', 2]} ms", f"{steps['eager', 2]} ms"):
        assert figures in text
    assert f"{steps['ours', 0] / steps['ours', 2]:.2f} of the unguided" in text
    share = table[(table.method == "ours") & (table.k == 0) & (table.batch == 1) & (table.prompt_tokens == 64)]
    assert f"{share.bandwidth_share.item():.2f} of the unguided step" in text
    trained = pd.read_csv(ROOT / "results/bench/gpu_training.csv").set_index(["model", "kind", "trainer"])
    for model in ("7b", "1b"):
        for trainer in ("ours", "trl"):
            row = trained.loc[(model, "short", trainer)]
            assert re.search(rf"{row.pairs_per_s:.1f}[^.]* in {row.peak_gb:.1f} GB", prose(BENCH_PAGE, "Training"))
