"""`python -m pipeline choose`: weights for an outcome, on a tiny model whose rewards are known."""

import dataclasses
import json
import shutil

import pytest

from pipeline.config.errors import UserError
from pipeline.config.load import load_params
from pipeline.config.schema import Objective, Point, Sweep
from pipeline.data.files import write_jsonl
from pipeline.evaluation.targets import Target
from pipeline.generation.targets import TargetSearch, validation_prompts
from pipeline.stages import choose
from tests.tiny import ROOT

PROMPTS = ["Why?", "Tell me about tea.", "Any tips?", "Describe a rainy Monday."]
OBJECTIVES = ("one", "two")


class Judge:
    """Scores a response by what its row says of the weights: a judge whose rewards are known."""

    def __init__(self, undetermined=()):
        self.prepared, self.undetermined = 0, undetermined

    def prepare(self, pairs, rows):
        self.prepared += sum(len(each) for each, _ in rows)

    def scores(self, rows, control):
        assert all((row.prompt, row.sample) in control for row in rows)
        return {
            "one": [None if row.prompt in self.undetermined else min(1.0, row.kl / 4) for row in rows],
            "two": [1.0 - min(1.0, row.kl / 4) for row in rows],
        }


@pytest.fixture
def project(smoke_params, workspace, tiny, arms):
    workspace.models.mkdir()
    workspace.model("tiny").symlink_to(tiny)
    for name in OBJECTIVES:
        workspace.arm(name).parent.mkdir(exist_ok=True)
        workspace.arm(name).symlink_to(arms[name])
        pairs = [{"prompt": prompt, "split": split} for split in ("train", "validation") for prompt in PROMPTS[:3]]
        pairs += [{"prompt": PROMPTS[3], "split": "test"}]
        write_jsonl(workspace.results / "prepare" / "pairs" / f"{name}.jsonl", pairs)
    points = {"base": Point(), "one": Point({"one": 1.0}), "two": Point({"two": 1.0}), "away": Point({"one": 0.5})}
    return dataclasses.replace(
        smoke_params,
        objectives={name: Objective(label=name) for name in OBJECTIVES},
        arm=dataclasses.replace(smoke_params.arm, base="tiny"),
        sweep=Sweep("base", points),
        decoding=dataclasses.replace(smoke_params.decoding, max_new_tokens=8),
    )


def test_only_validation_prompts_are_looked_at(project, workspace):
    assert validation_prompts(workspace, OBJECTIVES) == PROMPTS[:3]


def test_weights_are_chosen_that_reach_the_outcome_at_little_kl(project, workspace):
    judge = Judge()
    search = TargetSearch(project, workspace, judge, samples=2)
    choice = search.choose(Target({"one": 0.5}), points=4)
    mean, low, high = choice.rewards["one"]
    assert choice.shortfall == 0 and mean >= 0.5 - 1e-6 and low <= mean <= high
    assert choice.kl[0] < 3.5 and 7 <= choice.measured <= 10  # four KL are reward 1
    # Nothing is generated or asked again for another target where the surface is known.
    asked = judge.prepared
    again = search.choose(Target({"one": 0.5}), points=0)
    assert judge.prepared == asked and again.measured == choice.measured


def test_a_sweep_along_one_line_is_enough_to_begin_with(project, workspace):
    points = {"base": Point(), "even": Point({"one": 0.5, "two": 0.5})}
    search = TargetSearch(dataclasses.replace(project, sweep=Sweep("base", points)), workspace, Judge(), samples=1)
    choice = search.choose(Target({"one": 0.5}), points=0)
    assert choice.measured == 1 + 2 + 4 and choice.shortfall == 0


def test_no_samples_measure_nothing(project, workspace):
    with pytest.raises(UserError, match="0 responses to a prompt measure nothing"):
        TargetSearch(project, workspace, Judge(), samples=0)


def test_what_cannot_be_reached_is_said_with_the_nearest(project, workspace):
    search = TargetSearch(project, workspace, Judge(), samples=1)
    choice = search.choose(Target({"one": 0.9, "two": 0.9}), points=1)
    assert choice.shortfall > 0.5
    assert "not attainable by weights like these; the nearest is" in choose.described(choice, "plain", project)


def test_prompts_without_a_verdict_are_left_out_and_none_left_is_an_error(project, workspace):
    search = TargetSearch(project, workspace, Judge(PROMPTS[:1]), samples=1)
    search.choose(Target(maximise="two"), points=0)
    assert len(search.surface().measures_PNK) == 2
    search = TargetSearch(project, workspace, Judge(PROMPTS), samples=1)
    with pytest.raises(UserError, match="undetermined on every prompt"):
        search.choose(Target(maximise="two"), points=0)


def test_a_choice_says_how_to_ask_for_it(project, workspace):
    search = TargetSearch(project, workspace, Judge(), samples=1, form="log_ratio")
    text = choose.described(search.choose(Target(maximise="one", kl=2.0), points=1), "log_ratio", project)
    body = json.loads(text[text.index("'{") + 1 : text.index("}'") + 1])
    weights = body["guidance"]["weights"]
    assert weights["base"] == pytest.approx(1 - sum(weights[name] for name in OBJECTIVES if name in weights))
    assert "nats per response" in text and f"Request(prompt, {weights!r}" in text


def test_a_chosen_point_is_written_into_the_parameters_whole_or_not_at_all(tmp_path):
    file = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", file)
    choose.write_point(file, "gentle", {"positivity": 0.4, "conciseness": 0.0}, "plain")
    assert load_params(file).sweep.points["gentle"] == Point({"positivity": 0.4})
    before = file.read_text()
    with pytest.raises(UserError, match="kindness"):
        choose.write_point(file, "other", {"kindness": 1.0}, "plain")
    assert file.read_text() == before


@pytest.mark.parametrize(("text", "bound"), [("positivity=0.8", ("positivity", 0.8)), ("a=b=-1", None), ("x", None)])
def test_bounds_are_written_as_an_objective_and_a_number(text, bound):
    if bound:
        assert choose.least(text) == bound
        return
    with pytest.raises(UserError, match=r"write positivity=0\.8"):
        choose.least(text)
