"""An ARM's rewards of pairs in RewardBench's columns, against sums written out with PEFT's own forward."""

import json

import pandas as pd
import pytest
import torch
from peft import PeftModel

from pipeline.config.errors import UserError
from pipeline.config.load import load_params
from pipeline.config.workspace import Workspace
from pipeline.models.loading import load_model
from pipeline.stages import rewardbench
from pipeline.training.rewardbench import REWARDS
from tests.reference import CPU

PAIRS = [
    {"prompt": "Why?", "chosen": "good and great", "rejected": "bad", "subset": "chat"},
    {"prompt": "Tips?", "chosen": "sad", "rejected": "happy", "subset": "chat"},
    {"prompt": "Describe a rainy Monday.", "chosen": "love", "rejected": "hate it all", "subset": "safety"},
    {"prompt": "Describe a rainy Monday.", "chosen": "nice", "rejected": "awful", "subset": "safety"},
    {"prompt": "Why tea?", "chosen": "wonderful", "rejected": "terrible", "subset": "safety"},
]


@torch.no_grad()
def logp(model, prompter, prompt, response):
    before, after = prompter.prompt_ids(prompt), prompter.response_ids(prompt, response)
    logps = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1].log_softmax(-1)
    return float(logps.gather(1, torch.tensor(after)[:, None]).sum()), len(after)


def written(folder, rows):
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_each_reward_orders_the_pairs_as_peft_s_own_forward_does(project, tiny, arms, prompter):
    found = rewardbench.scored(load_params(), Workspace(), "positivity", written(project, PAIRS))
    start = load_model(tiny, torch.float32, CPU)
    arm = PeftModel.from_pretrained(load_model(tiny, torch.float32, CPU), str(arms["one"])).eval()
    right = {kind: {} for kind in REWARDS}
    for row in PAIRS:
        rewards = {}
        for side in ("chosen", "rejected"):
            value, tokens = logp(arm, prompter, row["prompt"], row[side])
            ratio = value - logp(start, prompter, row["prompt"], row[side])[0]
            rewards[side] = {"sum": value, "mean": value / tokens, "ratio": ratio}
        for kind in right:
            for subset in ("all", row["subset"]):
                right[kind].setdefault(subset, []).append(rewards["chosen"][kind] > rewards["rejected"][kind])
    assert {subset for subset, _ in found} == {"all", "chat", "safety"}
    for (subset, kind), line in found.items():
        assert line.accuracy.pairs == len(right[kind][subset])
        assert line.accuracy.value == pytest.approx(sum(right[kind][subset]) / len(right[kind][subset]))
    assert len({tuple(right[kind]["all"]) for kind in right}) > 1, "the rewards are told apart"


def test_the_command_prints_and_writes_the_table(project, capsys):
    rewardbench.main([str(written(project, PAIRS)), "--objective", "positivity", "--out", "out/table.csv"])
    table = pd.read_csv("out/table.csv")
    assert len(table) == 9 and set(table["subset"]) == {"all", "chat", "safety"}
    assert "safety" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**PAIRS[0], "chosen": ["a", "b"]}], "pairs.jsonl.*1 has no text chosen: RewardBench's columns are"),
        ([{"prompt": "Why?", "chosen": "a"}], "has no text rejected"),
        ([], "is empty"),
    ],
)
def test_what_is_no_pair_is_named_with_its_line(project, rows, message):
    with pytest.raises(UserError, match=message):
        rewardbench.scored(load_params(), Workspace(), "positivity", written(project, rows))


def test_an_unknown_objective_is_refused(project):
    with pytest.raises(
        UserError, match=r"--objective kindness: params\.yaml has the objectives positivity, conciseness"
    ):
        rewardbench.scored(load_params(), Workspace(), "kindness", written(project, PAIRS))
