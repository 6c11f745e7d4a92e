import json
import re
from dataclasses import replace

import pandas as pd
import pytest

from pipeline.config.schema import Point, Sweep
from pipeline.decoding.token_colours import STRONGEST, coloured, on_white, tint
from pipeline.report import figures, pages, terminal
from tests.browser import opened

POINTS = {"base": (0.0, 0.0), "sharpened": (0.0, 0.0), "ends": (1.0, 0.0), "mixed": (0.5, 0.5)}
NASTY = 'A </script><img src=x onerror="alert(1)"> reply'


@pytest.fixture
def front():
    lines = []
    for place, (point, alphas) in enumerate(POINTS.items()):
        line = {"method": "genarm" if any(alphas) else "base", "base": "tiny", "point": point, "temperature": 1.0}
        for name, alpha, score in zip(
            ("positivity", "conciseness"), alphas, (0.2 * place, 0.7 - 0.2 * place), strict=True
        ):
            line |= {f"alpha_{name}": alpha, f"score_{name}": score, f"ci_low_{name}": score - 0.1}
            line |= {f"ci_high_{name}": score + 0.1, f"win_rate_{name}": 0.5}
        quality = {"readable": 0.9, "ended": 0.5, "distinct_2_within": 0.9, "relevance": 0.7}
        rest = {
            "kl": 3.0 * place,
            "perplexity": 9.0,
            "distinct_2": 0.8,
            **quality,
            "n_tokens": 6.0,
            "forwards_per_token": 1,
        }
        lines.append(line | rest | {"on_front": place > 1})
    return pd.DataFrame(lines)


@pytest.fixture
def scored():
    rows = [
        {
            "prompt": f"Question {number}?", "point": point, "sample": 0, "n_tokens": 5 + number, "kl": 1.0,
            "response": NASTY if number == 0 else f"{point} answers {number}", "positivity": 0.1 * number * (place - 1),
            "conciseness": None if point == "ends" else 0.5,
        }
        for number in range(6)
        for place, point in enumerate(POINTS)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def trace(prompt, point):
    alternatives = [[["good", True, [0.1, 0.4, 0.2, 0.3]], [" bad", False, [0.2, 0.1, 0.2, 0.1]]]] * 3
    rewards = {"positivity": [2.0, -1.0, 0.5], "conciseness": [-4.0, 0.0, 1.0]}
    laws, alphas = ["base", *rewards, "guided"], POINTS[point]
    return {
        "point": point, "prompt": prompt, "weights": dict(zip(rewards, alphas, strict=True)), "laws": laws,
        "tokens": ["good", " <b>day</b>", "<end>"], "rewards": rewards, "alternatives": alternatives,
    }  # fmt: skip


@pytest.fixture
def page(smoke_params, front, scored, tmp_path):
    """The address of a report whose numbers are known."""
    share = {"value": 0.7, "ci_low": 0.6, "ci_high": 0.8, "pairs": 9, "prompts": 3}
    arm = {
        "accuracy": 0.7, "ci_low": 0.6, "ci_high": 0.8, "pairs": 9, "prompts": 3,
        "length_matched": share, "chosen_longer": share,
        "length_correlation": -0.2, "dropped_pairs": {}, "truncated_prompts": {}, "steps": 3, "tokens": 9,
    }  # fmt: skip
    names = list(smoke_params.objectives)
    told = {
        "accuracy": share, "ties": 0.0, "undetermined": 0.1, "reasons": {"<b>length</b>": 2}, "position_bias": None,
        "truncated": 0.25,
    }  # fmt: skip
    metrics = {
        "hypervolume": 0.5, "hypervolume_controls": 0.1, "readable_hypervolume": 0.4,
        "readable_hypervolume_controls": 0.1, "reference": dict.fromkeys(names, 0.0), "mip": {"genarm": 0.4},
        "spearman": {"genarm": dict.fromkeys(names, 1.0)}, "arms": dict.fromkeys(names, arm),
        "judge": {"kind": "oracle", "objectives": dict.fromkeys(names, told)},
    }  # fmt: skip
    data = {
        "read": 9, "rows": {"train": 9}, "prompts": {"train": 3}, "characters": {"prompt": {"median": 1, "longest": 2}},
        "objectives": {name: {"pairs": {"train": 9}, "ties": 0, "longer_preferred": None} for name in names},
        "conflicts": {}, "dropped": {"empty response": {"rows": 2, "such as": ["<i>line 3</i>"]}}, "oddities": {},
    }  # fmt: skip
    win = {"win_rate": 0.5, "ci_low": 0.4, "ci_high": 0.6, "undetermined": 0}
    wins = pd.DataFrame([{"point": point, "objective": name, **win} for point in POINTS for name in names])
    curves = pd.DataFrame(
        [
            {"objective": name, "phase": phase, "step": step, "loss": 0.6, "accuracy": 0.5}
            for name in names
            for phase in ("train", "eval")
            for step in (0, 1, 2)
        ]
    )
    drawings = [
        figures.front(front, names, "sharpened", "mixed"),
        figures.reward_kl(front, names),
        figures.curves(curves),
    ]
    tokens = [trace(prompt, point) for prompt in ("Question 0?", "Question 1?") for point in POINTS]
    path = tmp_path / "index.html"
    cards, tables = {"metrics": metrics, "data": data}, {"front": front, "wins": wins}
    points = {
        point: Point(dict(zip(names, alphas, strict=True)), sharpen=float(point == "sharpened"))
        for point, alphas in POINTS.items()
    }
    params = replace(smoke_params, sweep=Sweep("sharpened", points))
    pages.report(params, tables, cards, scored, tokens, drawings, path)
    return path


def test_the_page_needs_nothing_else_and_runs_nothing_that_it_shows(page):
    html = page.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"(?!#|\.\./)", html)
    assert "default-src 'none'" in html and "http" not in html.replace("http-equiv", "")
    assert "All rows, whole, are" in html and "../judge/scores.jsonl" in html
    assert "<img" not in html and NASTY not in html and "&lt;i&gt;line 3" in html
    assert "undetermined: &lt;b&gt;length" in html and "texts beyond its context" in html


def test_every_point_of_a_figure_says_what_it_is(front):
    svg = figures.front(front, ["positivity", "conciseness"], "sharpened").svg()
    labels = re.findall(r'class="mark"[^>]*?aria-label="([^"]*)"', svg)
    assert [label.split("&#10;")[0].split("\n")[0] for label in labels] == list(POINTS)
    assert "positivity 0.60 [0.50, 0.70]" in labels[3]
    assert "#1f2a37" not in svg and "currentColor" in svg
    assert len(set(re.findall(r'id="([^"]*)"', svg))) == len(re.findall(r'id="([^"]*)"', svg))


def test_a_chosen_point_says_its_weights_and_how_to_ask_for_it(page):
    with opened(page.as_uri()) as browser:
        mark, place = browser.locator('.mark[data-point="ends"]'), browser.locator("#point-place")
        mark.click()
        assert mark.get_attribute("aria-pressed") == "true"
        assert "α: positivity 1" in place.inner_text() and "positivity 0.40 [0.30, 0.50]" in place.inner_text()
        assert "KL 6.0 nats · readable 0.90" in place.inner_text() and "the run “ends”" in place.inner_text()
        place.locator("summary").first.click()
        command = place.locator("pre").first.inner_text()
        body = json.loads(command[command.index("'{") + 1 : -1])
        assert body["guidance"] == {"weights": {"positivity": 1}} and body["model"] == "tiny"
        place.locator("summary").last.click()
        compile(place.locator("pre").last.inner_text(), "copied", "exec")
        place.get_by_text("Samples at ends").click()
        assert browser.locator("#samples-filter [name=point] option:checked").inner_text() == "ends"
        mark = browser.locator('.mark[data-point="mixed"]')
        mark.focus()
        browser.keyboard.press("Enter")
        assert "α: positivity 0.5, conciseness 0.5" in place.inner_text()


def test_between_two_points_weights_are_mixed_and_scores_are_called_a_guess(page):
    with opened(page.as_uri()) as browser:
        place, form = browser.locator("#point-place"), browser.locator("#point")
        browser.locator('.mark[data-point="ends"]').click()
        # Not the sharpened control: it is another temperature, which no weights reach.
        assert form.locator("[name=other] option").all_inner_texts() == ["–", "base", "mixed"]
        form.locator("[name=other]").select_option(label="mixed")
        form.locator("[name=share]").fill("0.5")
        assert "α: positivity 0.75, conciseness 0.25" in place.inner_text()
        assert "positivity 0.50 · conciseness 0.20 · KL 7.5" in place.inner_text()
        assert "not measured" in place.inner_text()
        form.locator("[name=other]").select_option(label="base")
        assert "α: positivity 0.5" in place.inner_text()


def test_the_least_kl_that_reaches_an_outcome_is_found(page):
    with opened(page.as_uri()) as browser:
        outcome, place = browser.locator("#outcome"), browser.locator("#point-place")
        outcome.locator("[name=positivity]").fill("0.3")
        outcome.locator("button").click()
        assert "KL 4.5 nats" in place.inner_text() and browser.locator("#outcome-found").inner_text() == ""
        outcome.locator("[name=positivity]").fill("0.95")
        outcome.locator("button").click()
        assert "out of reach" in browser.locator("#outcome-found").inner_text()
        assert "α: positivity 0.5, conciseness 0.5" in place.inner_text()


def test_no_two_methods_of_a_comparison_look_alike(compose_params):
    methods = compose_params("experiment=comparison").comparison.methods
    styles = figures._styles(pd.DataFrame({"method": ["base", *methods]}))
    assert len(methods) == 15 and len({tuple(look.values()) for look in styles.values()}) == 1 + len(methods)


def test_figures_are_the_same_file_when_drawn_again(front, tmp_path):
    for name in ("one", "two"):
        figures.reward_kl(front, ["positivity", "conciseness"]).save(tmp_path / f"{name}.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def samples_of(scored, seed=0):
    return pages.samples(scored, list(POINTS), dict.fromkeys(POINTS, "sharpened"), ["positivity", "conciseness"], seed)


def shown_characters(samples):
    texts = [text for each in samples["prompts"] for text in (each["prompt"], *(r["text"] for r in each["responses"]))]
    return sum(map(len, texts))


def test_a_browser_of_many_samples_shows_prompts_drawn_by_the_seed(scored, monkeypatch):
    whole = samples_of(scored)
    assert [each["prompt"] for each in whole["prompts"]] == [f"Question {number}?" for number in range(6)]
    assert whole["total"] == 6 and whole["points"][3] == {"name": "mixed", "control": 1}
    assert whole["prompts"][2]["responses"][2]["scores"] == [0.2, None]
    monkeypatch.setattr(pages, "_CHARACTERS", shown_characters(whole) // 2)
    drawn = [samples_of(scored, seed) for seed in (0, 0, 1, 2, 3)]
    assert all(0 < len(each["prompts"]) < each["total"] == 6 for each in drawn)
    assert all(each["prompts"] == sorted(each["prompts"], key=lambda one: one["prompt"]) for each in drawn)
    assert drawn[0] == drawn[1] and len({str(each["prompts"]) for each in drawn}) > 1
    json.dumps(drawn, allow_nan=False)


@pytest.mark.parametrize("long", ["prompt", "response"])
def test_a_page_is_bounded_however_long_prompts_and_responses_are(scored, long):
    many = pd.concat([scored.assign(prompt=f"{turn} " + scored.prompt) for turn in range(100)])
    many[long] = many[long] + " word" * 2_000
    samples = samples_of(many)
    assert shown_characters(samples) <= 610_000 and len(samples["prompts"]) > 1
    text = samples["prompts"][0]["responses"][0]["text"] if long == "response" else samples["prompts"][0]["prompt"]
    assert text.endswith(" more characters]") and len(text) < 4_100


def test_prompts_of_the_token_view_are_shown_once_and_cut(scored):
    prompts = ["x" * 9_000 + tail for tail in "ab"]
    shown = pages.token_rewards([trace(prompt, point) for prompt in prompts for point in POINTS])
    assert [each["prompt"] for each in shown["traces"]] == [0] * 4 + [1] * 4
    assert all(len(prompt) < 4_100 for prompt in shown["prompts"])


def test_colours_grow_with_the_reward_and_tell_more_from_less():
    assert tint(1.0)[:3] != tint(-1.0)[:3]
    assert tint(0.5)[3] < tint(1.0)[3] < tint(STRONGEST)[3] == tint(9.0)[3] == 1.0
    assert on_white(0.0) == (255, 255, 255)
    assert coloured(["<b>"], [1.0]).count("<b>") == 0


def test_the_terminal_shows_the_front(front, capsys):
    metrics = {"hypervolume": 0.5, "hypervolume_controls": 0.1, "n_front": 2}
    metrics |= {"readable_hypervolume": 0.4, "readable_hypervolume_controls": 0.1}
    terminal.front(front, ["positivity", "conciseness"], metrics)
    printed = capsys.readouterr().out
    assert "hypervolume 0.500" in printed and "mixed" in printed


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_points_speak_to_mouse_and_keyboard(page, scheme):
    with opened(page.as_uri(), scheme=scheme) as browser:
        tip = browser.locator("#tip")
        browser.locator(".figure .mark").nth(3).hover()
        assert "mixed" in tip.inner_text() and "positivity 0.60 [0.50, 0.70]" in tip.inner_text()
        browser.locator(".figure .mark").first.focus()
        browser.keyboard.press("ArrowRight")
        assert tip.inner_text().startswith("sharpened")
        browser.keyboard.press("Escape")
        assert not tip.is_visible()


def test_samples_are_filtered_by_objective_outcome_length_and_words(page):
    with opened(page.as_uri()) as browser:
        form, count = browser.locator("#samples-filter"), browser.locator("#samples-count")
        assert count.inner_text() == "6 of 6 prompts"
        assert browser.locator("#samples-place article").count() == len(POINTS)
        assert NASTY in browser.locator("#samples-place article").first.inner_text()
        form.locator("[name=point]").select_option(label="mixed")
        form.locator("[name=outcome]").select_option(label="win")
        assert count.inner_text() == "5 of 6 prompts"  # the first scores 0 everywhere: a tie
        form.locator("[name=objective]").select_option(label="conciseness")
        assert count.inner_text().startswith("0 of 6 prompts")
        form.locator("[name=outcome]").select_option(label="tie")
        form.locator("[name=least]").fill("8")
        form.locator("[name=most]").fill("9")
        assert count.inner_text() == "2 of 6 prompts"
        form.locator("[name=words]").fill("ANSWERS 4")
        assert browser.locator("#samples-place .tokens").inner_text() == "Question 4?"
        form.locator("[name=point]").select_option(label="ends")
        form.locator("[name=outcome]").select_option(label="undetermined")
        assert count.inner_text() == "1 of 6 prompts"


def test_prompts_are_turned_by_keyboard(page):
    with opened(page.as_uri()) as browser:
        browser.locator("#samples-next").focus()
        browser.keyboard.press("Enter")
        assert browser.locator("#samples-place .tokens").inner_text() == "Question 1?"
        assert browser.locator("#samples-previous").is_enabled()


def test_a_token_shows_what_might_have_stood_there(page):
    with opened(page.as_uri()) as browser:
        lines = browser.locator("#tokens-lines .tokens")
        assert lines.count() == 2 and lines.first.inner_text() == "good <b>day</b><end>"
        assert "positivity, α = 0.5: +1.5 nats" in browser.locator("#tokens-lines h3").first.inner_text()
        backgrounds = [token.evaluate("token => token.style.background") for token in lines.first.locator("span").all()]
        assert "--more" in backgrounds[0] and "--less" in backgrounds[1]
        lines.first.locator("span").first.focus()
        browser.keyboard.press("ArrowRight")
        others = browser.locator("#tokens-others")
        assert "Position 1" in others.inner_text() and others.locator("tr.chosen td").nth(2).inner_text() == "0.400"
        browser.locator("#tokens-point").select_option(label="ends")
        assert "α = 1" in browser.locator("#tokens-lines h3").first.inner_text()


def test_a_phone_scrolls_down_only(page):
    with opened(page.as_uri(), width=390, height=844) as browser:
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390


def test_everything_has_a_name_and_enough_contrast(page):
    for scheme in ("light", "dark"):
        with opened(page.as_uri(), scheme=scheme) as browser:
            nameless = browser.evaluate(
                """[...document.querySelectorAll("select, input, button, svg[role]")].filter((each) =>
                     !(each.labels && each.labels.length) && !each.getAttribute("aria-label")
                     && !each.textContent.trim()).length"""
            )
            assert nameless == 0
            assert min(browser.evaluate(CONTRASTS)) >= 4.5


CONTRASTS = """() => {
  const light = (colour) => {
    const parts = colour.match(/[0-9.]+/g).slice(0, 3).map((part) => part / 255)
      .map((part) => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (!colour.endsWith(", 0)")) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  return [...document.querySelectorAll("h1, p, td, small, a, dt, dd, label, #samples-place h3")].map((element) => {
    const [one, two] = [light(getComputedStyle(element).color), light(behind(element))].sort((a, b) => b - a);
    return (one + 0.05) / (two + 0.05);
  });
}"""
