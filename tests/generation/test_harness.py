"""The guided law on the harness's tasks, against the law written out with PEFT's own forward."""

import io
import json
import tarfile

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf

from pipeline.config.errors import UserError
from pipeline.decoding.decoder import GuidedDecoder, Request
from pipeline.evaluation.statistics import Bootstrap
from pipeline.models.prompting import Prompter
from tests.reference import Reference
from tests.tiny import tiny_model, tiny_tokenizer

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'genarm-pipeline[lm-eval]'")
from lm_eval.api.instance import Instance

from pipeline.generation import harness
from tests.bench import alignment_tax

WEIGHTS = {"positivity": 0.7, "conciseness": -0.4}
LAWS = {"plain": WEIGHTS, "log_ratio": {**WEIGHTS, "base": 0.7}}  # the ARMs are of the base: 1 − Σα


@pytest.fixture
def reference(tiny, arms, prompter):
    return Reference(tiny, {"positivity": arms["one"], "conciseness": arms["two"]}, prompter)


def asked(kind, *arguments):
    return [Instance(kind, {}, one, 0) for one in arguments]


def likelihood(reference, prompter, weights, context, continuation):
    """log π(continuation | context) and whether it is the likeliest, over raw texts."""
    before = prompter.tokenizer(context, add_special_tokens=False)["input_ids"]
    tokens = prompter.tokenizer(context + continuation, add_special_tokens=False)["input_ids"][len(before) :]
    raw = Prompter(prompter.tokenizer, "{prompt}")
    plain = Reference.__new__(Reference)
    plain.base, plain.arms, plain.prompter = reference.base, reference.arms, raw
    total, greedy = 0.0, True
    for step, token in enumerate(tokens):
        _, law = plain.laws(Request(context, weights), tokens[:step])
        total, greedy = total + float(law[token]), greedy and int(np.argmax(law)) == token
    return total, greedy


@pytest.mark.parametrize("form", ["plain", "log_ratio"])
def test_likelihoods_are_those_of_the_guided_law(project, reference, prompter, form):
    model = harness.GuidedLM(form=form, batch_size=3, **WEIGHTS)
    pairs = [
        ("Why tea?", " good"),
        ("Describe a rainy Monday.", " awful and sad"),
        ("Why tea?", " bad"),
        ("Tips", " x"),
    ]
    for pair, (value, greedy) in zip(pairs, model.loglikelihood(asked("loglikelihood", *pairs)), strict=True):
        expected, likeliest = likelihood(reference, prompter, LAWS[form], *pair)
        assert value == pytest.approx(expected, abs=1e-3) and bool(greedy) == likeliest


def test_without_weights_it_is_the_base(project, reference, prompter):
    [(value, _)] = harness.GuidedLM().loglikelihood(asked("loglikelihood", ("Why tea?", " good")))
    assert value == pytest.approx(likelihood(reference, prompter, {}, "Why tea?", " good")[0], abs=1e-3)


def test_a_greedy_answer_is_the_decoder_s(project, arms, tiny):
    model = harness.GuidedLM(batch_size=2, **WEIGHTS)
    prompts = ["Describe a rainy Monday.", "Why?"]
    texts = [model.apply_chat_template([{"role": "user", "content": prompt}]) for prompt in prompts]
    answers = model.generate_until(
        asked(
            "generate_until", *((text, {"until": ["never"], "max_gen_toks": 7, "do_sample": False}) for text in texts)
        )
    )
    decoder = GuidedDecoder.load(
        harness.ModelSet(harness.load_params(), harness.Workspace(), "tiny", WEIGHTS).strong,
        {"positivity": arms["one"], "conciseness": arms["two"]},
    )
    requests = [Request(prompt, WEIGHTS, temperature=0.0, max_new_tokens=7) for prompt in prompts]
    rows = dict(decoder.generate(requests))
    assert answers == [rows[index].text for index in range(2)]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"kindness": 1.0}, "names kindness: use base, form, .* or an objective .positivity, conciseness"),
        ({"positivity": "high"}, "positivity=high: a weight is a finite number"),
        ({"positivity": float("nan")}, "a weight is a finite number"),
        ({"base": "huge"}, "base=huge: params.yaml has no such model, but smollm2-135m"),
        ({"form": "dpo"}, "form=dpo: use plain or log_ratio"),
    ],
)
def test_what_it_does_not_know_is_refused_before_anything_is_loaded(project, monkeypatch, how, message):
    monkeypatch.setattr(harness, "ModelSet", None)
    with pytest.raises(UserError, match=message):
        harness.GuidedLM(**how)


def test_the_command_runs_a_task_of_one_s_own(project, reference, prompter, capsys, monkeypatch):
    questions = [
        {"question": "Why tea?", "choices": ["good", "awful", "sad"], "gold": 0},
        {"question": "Describe a rainy Monday.", "choices": ["happy", "bad", "terrible"], "gold": 1},
        {"question": "Tips?", "choices": ["love", "hate", "nice"], "gold": 2},
    ]
    tasks = project / "tasks"
    tasks.mkdir()
    (tasks / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    config = {
        "task": "own", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tasks / "own.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "choices", "doc_to_target": "gold", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tasks / "own.yaml").write_text(json.dumps(config))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(project / "cache"))
    arguments = ["--tasks", "own", "--include_path", str(tasks), "--output_path", str(project / "out.json")]
    harness.main([*arguments, "--model_args", ",".join(f"{name}={alpha}" for name, alpha in WEIGHTS.items())])
    right = [
        int(
            np.argmax(
                [likelihood(reference, prompter, WEIGHTS, row["question"], f" {one}")[0] for one in row["choices"]]
            )
        )
        == row["gold"]
        for row in questions
    ]
    [written] = project.glob("out*.json")
    assert json.loads(written.read_text())["results"]["own"]["acc,none"] == pytest.approx(np.mean(right))
    assert "genarm" in capsys.readouterr().out


def test_an_arm_of_another_tokenizer_is_refused(project):
    other, tokenizer = project / "models/other", tiny_tokenizer(["<more>"])
    tiny_model(len(tokenizer), seed=3).save_pretrained(other)
    tokenizer.save_pretrained(other)
    config = OmegaConf.load("params.yaml")
    config.models.other = {"source": "path", "location": str(other)}
    OmegaConf.save(config, "params.yaml")
    with pytest.raises(UserError, match="base=other: the ARMs have the tokenizer of tiny"):
        harness.GuidedLM(base="other", **WEIGHTS)


def test_tasks_of_big_bench_are_asked_as_it_asks_them(project, monkeypatch):
    def example(text, **scores):
        return {"input": text, "target_scores": scores}

    files = {
        "phrase_relatedness": {"examples": [example("tea", good=0, great=1), example("Monday", sad=1, happy=0)]},
        "entailed_polarity": {
            "examples": [example("Why?", yes=0.0, no=1.0)], "append_choices_to_input": False,
            "example_input_prefix": "\n", "example_output_prefix": "\nA:",
        },
    }  # fmt: skip
    with tarfile.open(project / "bigbench.tar.gz", "w:gz") as archive:
        for name, content in files.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"bigbench-1.0.0/bigbench/benchmark_tasks/{name}/task.json")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    monkeypatch.setattr(alignment_tax, "TASKS", {name: [name] for name in files})
    monkeypatch.setenv("HF_DATASETS_CACHE", str(project / "cache"))
    alignment_tax.write_tasks(project / "bigbench.tar.gz", project / "tasks", items=100)
    first, last = (
        json.loads((project / f"tasks/{name}.jsonl").read_text().splitlines()[0])
        for name in ("phrase_relatedness", "entailed_polarity")
    )
    assert first == {"question": "Q: tea\n  choice: good\n  choice: great\nA:", "choices": ["good", "great"], "gold": 1}
    assert last == {"question": "Why?\nA:", "choices": ["yes", "no"], "gold": 1}
    points = [{}, {"positivity": 2.0}]
    frames = [alignment_tax.scored(point, project / "tasks") for point in points]
    bootstrap = Bootstrap(seed=0)
    lines = [
        line
        for point, at in zip(points, frames, strict=True)
        for line in alignment_tax.lines_of(point, at, frames[0], bootstrap)
    ]
    assert [(line["task"], line["form"], line["questions"], line["chance"]) for line in lines] == [
        ("phrase_relatedness", "base", 2, 0.5), ("entailed_polarity", "base", 1, 0.5),
        ("phrase_relatedness", "plain", 2, 0.5), ("entailed_polarity", "plain", 1, 0.5),
    ]  # fmt: skip
    assert all(line["acc_change"] == 0.0 for line in lines[:2])
    text = alignment_tax.page(pd.DataFrame(lines).assign(base="tiny"))
    assert "| phrase_relatedness (2, 0.50) |" in text and "| base | 2, 0 |" in text
