"""The published experiments, each from files of its datasets' schema to a front, on tiny models of its architecture."""

import dataclasses
import json
import shutil

import pandas as pd
import pytest
from peft import PeftModel

from pipeline.config.errors import UserError
from pipeline.config.schema import Model
from pipeline.stages import comparison, explain, fetch, generate, judge, pareto, prepare, train, tune
from tests import schemas
from tests.endpoint import KEY, Server
from tests.tiny import ROOT, tiny_model, tiny_tokenizer

SMALLER = (  # what makes a run short; the presets' own values are compared below
    "trainer.epochs=1", "trainer.batch_size=4", "trainer.checkpoint_every=50", "trainer.evaluations_per_epoch=1",
    "trainer.max_length=200", "decoding.max_new_tokens=4", "decoding.batch_size=8", "judge.card_pairs=2",
    "judge.resamples=50", "judge.api_key_env=JUDGE_KEY", "tracking=disabled", "++data.limits={train: 12, test: 4}",
    "data.validation_fraction=0.3",
)  # fmt: skip
PRESETS = {
    "hh_rlhf": "full_hh_rlhf",
    "pku_saferlhf": "pku_saferlhf_10k",
    "pku_saferlhf_65b": "pku_saferlhf_10k",
    "tulu2_weak_to_strong": "ultrafeedback_binarized",
}


@pytest.fixture
def composed(compose_params, tmp_path, monkeypatch):
    """A preset whose models are tiny Llamas and whose data are in a local folder."""

    def run(name, *overrides):
        data = tmp_path / "data"
        schemas.WRITERS[PRESETS[name]](data)
        local = [f"data.path={data}", "data.download=[]"]
        if name == "tulu2_weak_to_strong":
            local.append(f"data.prompts={schemas.alpaca_eval(tmp_path)}")
        params = compose_params(f"experiment={name}", *SMALLER, *local, *overrides)
        made = {}
        for seed, model in enumerate(sorted(set(params.fetch))):
            folder = tmp_path / "source" / model
            tokenizer = tiny_tokenizer()
            tiny_model(len(tokenizer), seed).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            local_spec = {"source": "path", "location": str(folder), "dtype": "float32", "device_map": None}
            made[model] = dataclasses.replace(params.models[model], **local_spec)
        return dataclasses.replace(params, models={**params.models, **made})

    return run


def run_all(params, workspace):
    for name in dict.fromkeys(params.fetch):
        fetch.run(params, workspace, name)
    prepare.run(params, workspace)
    for objective in params.objectives:
        train.run(params, workspace, objective)
    generate.run(params, workspace)
    judge.run(params, workspace)
    explain.run(params, workspace)
    pareto.run(params, workspace)
    return pd.read_csv(workspace.results / "pareto" / "front.csv").set_index("point")


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_goes_from_its_data_to_a_front(composed, endpoint, workspace, name):
    params = composed(name, f"judge.base_url={endpoint.url}")
    front = run_all(params, workspace)
    assert list(front.index) == list(params.sweep.points)
    objectives = list(params.objectives)
    judged = front.drop(index=params.sweep.control)[[f"score_{name}" for name in objectives]]
    assert judged.notna().all(axis=None), "every point beside the control has verdicts"
    asked = {question["messages"][1]["content"] for _, question, _ in endpoint.requests}
    assert asked, "the judge's endpoint was asked"
    guided = [point for point, found in params.sweep.points.items() if found.guided]
    assert (front.loc[guided, "kl"] > 0).all()
    page = (workspace.results / "report" / "index.html").read_text(encoding="utf-8")
    assert "Preference data" in page and KEY not in page
    card = json.loads((workspace.results / "prepare" / "data_card.json").read_text())
    assert set(card["objectives"]) == set(objectives)
    if name.startswith("pku"):
        assert 0 < card["conflicts"]["helpfulness, harmlessness"]["rate"] < 1
    arm = workspace.arm(objectives[0])
    assert (arm / ("config.json" if params.arm.tuning == "full" else "adapter_config.json")).is_file()


def test_what_an_experiment_recommends_beside_it_runs_to_its_end(composed, endpoint, workspace):
    """`conf/experiment/hh_rlhf.yaml`: DPO of the same base beside the ARM, by the judge of the experiment."""
    told = (ROOT / "conf/experiment/hh_rlhf.yaml").read_text(encoding="utf-8").replace("\n# ", " ")
    overrides = ["comparison=default", "tune=human_preference", "methods@comparison.methods=[genarm,mod]"]
    assert all(override in told for override in overrides)
    params = composed("hh_rlhf", f"judge.base_url={endpoint.url}", *overrides)
    for name in dict.fromkeys(params.fetch):
        fetch.run(params, workspace, name)
    prepare.run(params, workspace)
    train.run(params, workspace, "human_preference")
    tune.run(params, workspace, params.base, "human_preference")
    comparison.run(params, workspace)
    table = pd.read_csv(workspace.results / "comparison" / "table.csv")
    assert set(table.method) == {"base", "genarm", "mod"}
    assert (table[table.point == params.sweep.control].reward_human_preference == 0.5).all()


def test_presets_have_the_published_hyper_parameters(compose_params):
    told = {name: compose_params(f"experiment={name}") for name in PRESETS}
    assert {name: {o: p.objectives[o].beta for o in p.objectives} for name, p in told.items()} == {
        "hh_rlhf": {"human_preference": 0.05},
        "pku_saferlhf": {"helpfulness": 0.5, "harmlessness": 0.01},
        "pku_saferlhf_65b": {"helpfulness": 0.5, "harmlessness": 0.01},
        "tulu2_weak_to_strong": {"human_preference": 0.1},
    }
    assert {name: (p.base, p.arm.base) for name, p in told.items()} == {
        "hh_rlhf": ("llama-7b-sft", "llama-7b-sft"),
        "pku_saferlhf": ("alpaca-7b", "alpaca-7b"),
        "pku_saferlhf_65b": ("alpaca-65b", "alpaca-7b"),
        "tulu2_weak_to_strong": ("tulu2-70b", "tulu2-7b"),
    }
    for name in ("hh_rlhf", "pku_saferlhf", "pku_saferlhf_65b"):
        arm, trainer = told[name].arm, told[name].trainer
        assert (arm.tuning, arm.rank, arm.lora_alpha, arm.dropout) == ("lora", 8, 16, 0.05)
        assert (trainer.lr, trainer.scheduler, trainer.weight_decay) == (5e-4, "cosine", 0.05)
        assert (trainer.epochs, trainer.batch_size) == (1, 32)
        assert trainer.warmup_steps == {"hh_rlhf": 100}.get(name, 20)
    strong = told["tulu2_weak_to_strong"]
    assert (strong.arm.tuning, strong.trainer.lr, strong.trainer.scheduler) == ("full", 5e-7, "linear")
    assert (strong.trainer.warmup_steps, strong.trainer.epochs, strong.trainer.batch_size) == (0.1, 3, 32)
    assert told["hh_rlhf"].data.limits == {"test": 300} and told["hh_rlhf"].decoding.max_new_tokens == 128
    assert told["pku_saferlhf"].data.limits == {"test": 500} and told["pku_saferlhf"].decoding.max_new_tokens == 512
    assert told["pku_saferlhf"].data.test_fraction == 0.05
    assert all(p.decoding.temperature == 1.0 for p in told.values())


def pretrained(params, location):
    spec = Model(source="path", location=str(location), dtype="float32")
    changed = {name: dataclasses.replace(found, pretrained=spec) for name, found in params.objectives.items()}
    return dataclasses.replace(params, objectives=changed)


@pytest.mark.parametrize("kind", ["adapter", "whole"])
def test_an_arm_that_is_there_already_is_measured_and_not_trained(composed, endpoint, workspace, tmp_path, kind):
    preset = "hh_rlhf" if kind == "adapter" else "tulu2_weak_to_strong"
    params = composed(preset, f"judge.base_url={endpoint.url}")
    run_all(params, workspace)
    published = shutil.copytree(workspace.arm("human_preference"), tmp_path / "published")
    trained = json.loads((workspace.results / "train" / "human_preference" / "metrics.json").read_text())
    before = (workspace.results / "generate" / "rows.jsonl").read_text()
    shutil.rmtree(workspace.results / "train")
    front = run_all(pretrained(params, published), workspace)
    told = json.loads((workspace.results / "train" / "human_preference" / "metrics.json").read_text())
    assert {key: told[key] for key in ("accuracy", "pairs", "length_correlation")} == {
        key: trained[key] for key in ("accuracy", "pairs", "length_correlation")
    }
    assert (told["steps"], told["tokens"]) == (0, 0)
    assert (workspace.results / "generate" / "rows.jsonl").read_text() == before, "the same ARM, the same texts"
    assert len(front) == 3


def test_an_adapter_of_another_model_is_refused(composed, workspace, tmp_path, arms, monkeypatch):
    params = composed("hh_rlhf")
    for name in dict.fromkeys(params.fetch):
        fetch.run(params, workspace, name)
    prepare.run(params, workspace)

    def unfit(*_, **__):
        raise RuntimeError("size mismatch for q_proj\nand more")

    monkeypatch.setattr(PeftModel, "from_pretrained", unfit)
    with pytest.raises(UserError, match=r"is no adapter of llama-7b-sft \(size mismatch for q_proj\): set arm\.base"):
        train.run(pretrained(params, arms["one"]), workspace, "human_preference")


def test_the_published_arm_has_a_name(compose_params):
    params = compose_params(
        "experiment=tulu2_weak_to_strong", "objectives.human_preference.pretrained=${models.tulu2-7b-arm}"
    )
    assert params.objectives["human_preference"].pretrained == params.models["tulu2-7b-arm"]
