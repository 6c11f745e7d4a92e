import contextlib
import io
import json
import shutil

import pytest
import torch

from pipeline.config.errors import UserError
from pipeline.config.workspace import Workspace
from pipeline.decoding.decoder import Request
from tests.browser import opened
from tests.tiny import ROOT

gradio = pytest.importorskip("gradio", reason="gradio is not installed: pip install 'genarm-pipeline[playground]'")
from pipeline.report import playground as served  # noqa: E402

HOW = {"temperature": 1.0, "max_new_tokens": 12, "seed": 3}


@pytest.fixture
def playground(project):
    from pipeline.config.load import load_params

    return served.Playground(load_params(), Workspace())


def test_a_stream_is_what_the_decoder_writes_and_its_rewards_those_of_a_trace(decoder):
    requests = [Request("Why?", {"one": 0.0, "two": 0.0}, **HOW), Request("Why?", {"one": 1.0, "two": 0.5}, **HOW)]
    drafts = list(decoder.stream(requests))
    assert [len(draft.tokens) for draft in drafts[0]] == [1, 1] and len(drafts) > 1
    for index, generation in decoder.generate(requests):
        draft = drafts[-1][index]
        assert draft.generation.text == generation.text and draft.generation.kl == pytest.approx(
            generation.kl, abs=1e-4
        )
        trace = decoder.trace(requests[index], generation.tokens)
        assert draft.texts == trace.texts
        for name in ("one", "two"):
            assert torch.allclose(torch.tensor(draft.rewards[name]), torch.tensor(trace.rewards(name)), atol=1e-4)


def test_weights_change_without_loading_anything_again(playground):
    texts = set()
    for alpha in (0.0, 1.0, 2.0):
        *_, (control, guided) = playground.write("tiny", "Why?", {"positivity": alpha, "conciseness": 0.0}, **HOW)
        texts.add(guided.generation.text)
        assert (guided.generation.text == control.generation.text) == (alpha == 0.0)
    assert len(texts) == 3 and playground._loaded.cache_info().misses == 1


def test_the_python_it_offers_writes_the_same(playground):
    weights = {"positivity": 1.0, "conciseness": 0.5}
    prompt = "It's \"quoted\";\nprint('no')"
    *_, (control, guided) = playground.write("tiny", prompt, weights, **HOW)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(playground.code("tiny", prompt, weights, **HOW), {})
    assert printed.getvalue() == f"base:   {control.generation.text}\nguided: {guided.generation.text}\n"


@pytest.mark.parametrize(("prompt", "how"), [("  ", HOW), ("x" * 4001, HOW), ("Why?", HOW | {"max_new_tokens": 513})])
def test_what_is_out_of_bounds_is_refused(playground, prompt, how):
    with pytest.raises(UserError, match=r"1 to (4000|512)"):
        next(playground.write("tiny", prompt, {"positivity": 1.0}, **how))


def test_without_models_it_says_what_to_do(smoke_params, workspace):
    with pytest.raises(UserError, match="run `make repro` first"):
        served.Playground(smoke_params, workspace)


def test_a_person_moves_a_slider_and_reads_both_texts(playground):
    blocks = served.serve(playground, port=None, wait=False)
    try:
        assert blocks.local_url.startswith("http://127.0.0.1:") and blocks.share_url is None
        with opened(blocks.local_url) as browser:
            browser.locator("#prompt textarea").fill("Why <b>me</b>?")
            browser.locator("#alpha-positivity input[type=number]").fill("2")
            browser.locator("#alpha-positivity input[type=number]").press("Tab")
            browser.locator("#write").click()
            for side in ("#control", "#guided"):
                browser.locator(f"{side} small", has_text="tokens").wait_for(timeout=60_000)
            browser.locator("#reproduce button").first.click()
            code = browser.locator("#code .cm-content").inner_text()
            shown = [browser.locator(f"{side} p").inner_text() for side in ("#control", "#guided")]
            tinted = browser.locator("#guided span").first.get_attribute("style")
        assert "'positivity': 2" in code and "rgba(" in tinted
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, {})
        end = "<end>"
        control, guided = printed.getvalue().removeprefix("base:   ").split("\nguided: ")
        assert [text.removesuffix(end).strip() for text in shown] == [control.strip(), guided.strip()]
    finally:
        blocks.close()


def test_a_person_writes_two_sentences_and_gets_a_slider(project, monkeypatch):
    from pipeline.config.load import load_params

    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(
        text.replace("path: pipeline/data/prompts", f"path: {ROOT}/pipeline/data/prompts")
        .replace("epochs: 6", "epochs: 1")
        .replace("train: 6", "train: 16")
        .replace("sampler: smollm2-135m", "sampler: tiny")
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    playground = served.Playground(load_params(), Workspace())
    blocks = served.serve(playground, port=None, wait=False)
    try:
        with opened(blocks.local_url) as browser:
            browser.locator("#dial-name textarea, #dial-name input").fill("warmth")
            browser.locator("#dial-wanted textarea, #dial-wanted input").fill("Answer warmly.")
            browser.locator("#dial-unwanted textarea, #dial-unwanted input").fill("answer  WARMLY.")
            browser.locator("#dial-make").click()
            browser.get_by_text("are the same sentence").first.wait_for(timeout=20_000)
            browser.locator("#dial-unwanted textarea, #dial-unwanted input").fill("Answer coldly.")
            assert not browser.locator("#alpha-dial-0").is_visible()
            browser.locator("#dial-make").click()
            browser.locator("#dial-progress", has_text="finished in").wait_for(timeout=120_000)
            browser.locator("#alpha-dial-0", has_text="α warmth").wait_for(timeout=20_000)
            browser.locator("#alpha-dial-0 input[type=number]").fill("2")
            browser.locator("#alpha-dial-0 input[type=number]").press("Tab")
            browser.locator("#write").click()
            browser.locator("#guided small", has_text="warmth").wait_for(timeout=60_000)
            browser.locator("#reproduce button").first.click()
            code = browser.locator("#code .cm-content").inner_text()
        assert "'warmth': 2" in code
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, {})
        assert printed.getvalue().startswith("base:   ")
    finally:
        blocks.close()


def test_a_person_asks_for_an_outcome_and_the_sliders_follow(project):
    from pipeline.config.load import load_params

    pairs = project / "results/prepare/pairs"
    pairs.mkdir(parents=True)
    for name in ("positivity", "conciseness"):
        rows = [{"prompt": prompt, "split": "validation"} for prompt in ("Why?", "Tips?", "Describe a rainy Monday.")]
        (pairs / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    playground = served.Playground(load_params(), Workspace())
    blocks = served.serve(playground, port=None, wait=False)
    try:
        with opened(blocks.local_url) as browser:
            browser.locator("#choose").click()
            browser.get_by_text("as little KL as possible is the base itself").first.wait_for(timeout=20_000)
            browser.locator("#least-conciseness textarea, #least-conciseness input").fill("much")
            browser.locator("#choose").click()
            browser.get_by_text("much is not a number").first.wait_for(timeout=20_000)
            browser.locator("#least-conciseness textarea, #least-conciseness input").fill("0.3")
            browser.locator("#most-kl textarea, #most-kl input").fill("30")
            browser.locator("#choose").click()
            browser.locator("#promise", has_text="on validation prompts").wait_for(timeout=120_000)
            promise = browser.locator("#promise").inner_text()
            shown = [
                float(browser.locator(f"#alpha-{name} input[type=number]").input_value()) for name in playground.arms
            ]
    finally:
        blocks.close()
    choice = playground.chooser.choose({"positivity": None, "conciseness": 0.3}, "least KL", 30.0)
    assert shown == [round(choice.weights[name], 2) for name in playground.arms]
    assert f"KL {choice.kl[0]:.1f} [" in promise and f"conciseness {choice.rewards['conciseness'][0]:.2f} [" in promise


def test_a_dial_guides_only_the_base_that_it_was_made_of(playground, project, arms):
    folder = project / "scratch/dials/warmth"
    shutil.copytree(arms["three"], folder / "arm")
    said = {"name": "warmth", "wanted": "a", "unwanted": "b", "base": "tiny", "verdict": "", "accuracy": 0.5}
    said["seconds"] = 1.0
    (folder / "dial.json").write_text(json.dumps(said))
    *_, (control, guided) = playground.write("tiny", "Why?", {"positivity": 0.0, "warmth": 2.0}, **HOW)
    assert control.generation.text != guided.generation.text and set(guided.rewards) == {"positivity", "warmth"}
    assert playground.maker.law("tiny", {"positivity": 0.5, "warmth": -1.0}) == {
        "positivity": 0.5, "warmth": -1.0, "base": 2.0,
    }, "a dial in the log-ratio form takes from the base what it gives to the ARM"  # fmt: skip
    (folder / "dial.json").write_text(json.dumps(said | {"base": "other"}))
    with pytest.raises(UserError, match="the dial warmth was made of other"):
        next(playground.write("tiny", "Why?", {"warmth": 2.0}, **HOW))
