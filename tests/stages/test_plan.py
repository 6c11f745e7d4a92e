import dataclasses
import io
import re

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig

from pipeline.config.errors import UserError
from pipeline.config.methods import Comparison
from pipeline.models import memory
from pipeline.stages import plan
from pipeline.stages.plan import Assumed, Rows
from tests.models.test_memory import SEVEN, SEVENTY, planned
from tests.tiny import ROOT


def printed(params, workspace, *options):
    out = io.StringIO()
    fits = plan.print_plan(params, workspace, Console(file=out, width=300), *options)
    return fits, out.getvalue()


def test_the_plan_prints_what_it_reckons(smoke_params, workspace):
    params = planned(smoke_params, workspace, "large", dtype="bfloat16")
    SEVENTY.save_pretrained(workspace.model("large"))
    workspace.model("small").mkdir(parents=True)
    SEVEN.save_pretrained(workspace.model("small"))
    spec = dataclasses.replace(params.models["large"], location="small")
    params = dataclasses.replace(
        params, models={**params.models, "small": spec}, arm=dataclasses.replace(params.arm, base="small")
    )
    fits, told = printed(params, workspace, Assumed(bandwidth=1e12, acceptance=0.75))
    assert not fits and "this does not fit" in told
    assert "forwards per token: 2" in told and "(1.10 times)" in told
    assert "one row at a time, by reading weights at 1e+03 GB/s: 7.25 tokens/s of large unguided, 6.6 guided, " in told
    assert (
        "15 if small drafts 5 tokens in each round of which 0.75 are right (2.28 times guided, 2.07 times unguided)"
        in told
    )
    assert "2 ARMs of small one after the other, LoRA of rank 8, weights: 13.5 GB beside activations" in told
    assert "6 prompts x 7 points x 1 samples = 42 rows" in told
    assert "judging" not in told, "the oracle asks nobody"


def test_time_and_judges_are_reckoned_from_rows(compose_params, workspace):
    params = compose_params("experiment=hh_rlhf", "decoding.batch_size=1")
    workspace.model("llama-7b-sft").mkdir(parents=True)
    LlamaConfig(num_hidden_layers=1, vocab_size=64, hidden_size=64, intermediate_size=64).save_pretrained(
        workspace.model("llama-7b-sft")
    )
    fits, told = printed(params, workspace, Assumed(900.0, (1.0, 10.0)))
    assert fits
    assert "300 prompts x 3 points x 1 samples = 900 rows" in told
    assert "time: 2.13 minutes at most, at 900 tokens/s" in told  # 900 rows of 128 tokens
    calls, read, written = plan.calls(params.judge, params, Rows.of(params, workspace))
    assert calls == 2 * 300 + 50, "two points beside the control, and the card; one order each"
    assert f"at most {calls} answers of gpt-4o-mini" in told
    assert f"at most {(read + 10 * written) / 1e6:.2f} at 1 and 10" in told
    priced = dataclasses.replace(params.judge, price=(1.0, 10.0), max_calls=300)
    _, told = printed(dataclasses.replace(params, judge=priced), workspace, Assumed(900.0))
    assert f"answers of gpt-4o-mini in 3 runs of at most 300, {read / 1e6:.3g} M" in told
    assert f"at most {(read + 10 * written) / 1e6:.2f} at 1 and 10" in told
    both = dataclasses.replace(params.judge, orders="both")
    assert plan.calls(both, params, Rows.of(params, workspace))[0] == 2 * calls


def test_comparisons_ask_the_judge_too(compose_params, workspace):
    more = ["comparison=default", "tune=human_preference", "methods@comparison.methods=[genarm,mod]"]
    more += ["comparison.methods.mod.prompts=20", "comparison.methods.genarm.strengths=[1.0,0.5]"]
    params = compose_params("experiment=hh_rlhf", *more)
    rows = Rows.of(params, workspace)
    lines = 2 * 300 + 2 * 20  # each method at two strengths
    assert plan.calls(params.judge, params, rows)[0] == 2 * 300 + lines + 50
    ladder = dataclasses.replace(params.weak_to_strong, bases=("a", "b"), best_of=4)
    alone = dataclasses.replace(params, weak_to_strong=ladder, comparison=Comparison())
    assert plan.calls(params.judge, alone, rows)[0] == 2 * 300 + 2 * (2 + 3) * 300 + 50


def test_rows_come_from_prepare_or_are_assumed(smoke_params, workspace):
    unlimited = dataclasses.replace(smoke_params, data=dataclasses.replace(smoke_params.data, limits={}))
    assert "1000 prompts (assumed) x 7 points" in str(Rows.of(unlimited, workspace))
    file = workspace.results / "prepare" / "prompts.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert Rows.of(unlimited, workspace).prompts == 2


@pytest.mark.parametrize("options", [["--help"], ["params.yaml", "--price", "1"]])
def test_the_command_line_explains_itself(options, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["plan", *options])
    with pytest.raises(SystemExit):
        plan.main(options)
    shown = capsys.readouterr()
    assert "--tokens-per-second" in shown.out + shown.err


def test_what_preparing_samples_and_asks_is_reckoned(compose_params):
    def told(*overrides):
        out = io.StringIO()
        limits = "data.limits={train: 10, validation: 2, test: 3}"
        params = compose_params(limits, *overrides)
        plan.print_preparing(params, Console(file=out, width=300))
        return out.getvalue()

    assert "15 prompts x 2 instructions" in told("objectives=sentence") and "= 30 responses" in told(
        "objectives=sentence"
    )
    assert "15 prompts x 4 instructions" in told(), "two sentences of each of two objectives"
    scored = ("objectives=scored", "data.sampling.responses_per_prompt=4")
    assert "x 1 instructions" in told(*scored), "scorers share one set of responses"
    judged = told(
        *scored, "+judge@objectives.positivity.annotator=llm", "objectives.positivity.annotator.max_calls=100"
    )
    assert (
        "labelling positivity: at most 180 answers of gpt-4o-mini on 90 pairs" in judged and "max_calls: 100" in judged
    )
    assert told("data=own", "data.path=mine.jsonl", "objectives=scored") == "", (
        "rows from files are sampled from nobody"
    )


@pytest.mark.parametrize(
    ("option", "value"),
    [("--bandwidth", "0"), ("--bandwidth", "-3"), ("--tokens-per-second", "nan"), ("--acceptance", "1.2")],
)
def test_impossible_measures_are_refused(option, value):
    with pytest.raises(UserError, match=rf"{option} {value} is no (speed|share): give a number"):
        plan.main([option, value])


def test_what_drafts_would_gain_by_the_sizes_alone_is_what_the_benches_page_says():
    thirteen = LlamaConfig(
        vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
    )
    page = (ROOT / "results/bench/README.md").read_text(encoding="utf-8")

    def need(name, config):
        shape = memory.shape_of(config)
        return memory.Need(name, shape, memory.weight_bytes(shape, torch.bfloat16, None), 0.0)

    for size, config in (("13B", thirteen), ("70B", SEVENTY)):
        cells = re.search(rf"^\| {size} \| (.*) \|$", page, flags=re.MULTILINE)[1].split(" | ")
        for acceptance, cell in zip((0.6, 0.7, 0.8), cells[2:], strict=True):
            told = plan._speculation(need("base", config), need("arm", SEVEN), Assumed(acceptance=acceptance), 3.35e12)
            unguided, guided, drafted, length = re.search(
                r"GB/s: (\S+) tokens/s of base unguided, (\S+) guided, (\S+) if arm drafts (\d)", told
            ).groups()
            assert [f"{float(speed):.0f}" for speed in (unguided, guided)] == cells[:2]
            assert cell == f"{float(drafted):.0f} (γ {length})"
