"""The names of `from pipeline import …`, and the Python that the README files show."""

import json
import re
import subprocess
import sys

import pytest
import torch

import pipeline
from pipeline import GuidanceLogitsProcessor, GuidedDecoder, Request, UserError, load_experiment, train_arm
from pipeline.config.schema import Trainer
from tests.tiny import ROOT

PAIRS = [
    {"prompt": prompt, "chosen": chosen, "rejected": rejected, "split": split}
    for split, prompt in [("train", "Tips?"), ("train", "Why?"), ("validation", "And?"), ("test", "How?")]
    for chosen, rejected in [("good great", "bad"), ("love", "awful hate")]
]


def examples(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    return [block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "openai" not in block]


EXAMPLES = [(page, place) for page in ("README.md", "pipeline/README.md") for place in range(len(examples(page)))]


def test_importing_the_package_loads_nothing_heavy():
    script = "import pipeline, sys; assert dir(pipeline); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "lightning", "pandas", "hydra", "pydantic", "wandb"}
    assert "pipeline" in done.stdout.split() and not heavy & set(done.stdout.split())


def test_all_public_names_are_there():
    assert len(pipeline.__all__) == 10
    for name in pipeline.__all__:
        assert getattr(pipeline, name).__name__ == name
        assert name in dir(pipeline)
    with pytest.raises(AttributeError, match="module 'pipeline' has no attribute 'GuidedDecode'"):
        pipeline.GuidedDecode  # noqa: B018


@pytest.fixture
def project(tiny, arms, tmp_path, monkeypatch):
    """A project's folder whose embedded model is a tiny one."""
    (tmp_path / "models" / "arms").mkdir(parents=True)
    (tmp_path / "models" / "smollm2-135m").symlink_to(tiny)
    for name, arm in {"positivity": "one", "conciseness": "two"}.items():
        (tmp_path / "models" / "arms" / name).symlink_to(arms[arm])
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    pairs = tmp_path / "results" / "prepare" / "pairs" / "positivity.jsonl"
    pairs.parent.mkdir(parents=True)
    pairs.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_examples():
    assert [page for page, _ in EXAMPLES] == ["README.md", *["pipeline/README.md"] * 3]


@pytest.mark.parametrize(("page", "place"), EXAMPLES)
def test_the_python_of_the_readme_files_runs(project, page, place, capsys):
    example = examples(page)[place]
    assert len([line for line in example.splitlines() if line.strip()]) <= 17
    exec(compile(example, page, "exec"), {})
    assert capsys.readouterr().out.strip()


def test_an_experiment_is_the_decoder_of_its_params(project, tiny, arms):
    weights = {"positivity": 1.0, "conciseness": 0.5}
    request = Request("Tips?", weights, max_new_tokens=8, seed=3)
    ((_, loaded),) = load_experiment(project, device="cpu", batch_size=2).generate([request])
    folders = {"positivity": arms["one"], "conciseness": arms["two"]}
    ((_, direct),) = GuidedDecoder.load(tiny, folders, device="cpu").generate([request])
    assert loaded.tokens == direct.tokens and loaded.kl == pytest.approx(direct.kl, abs=1e-4) and direct.kl > 0


def test_what_a_project_lacks_is_named(project):
    with pytest.raises(UserError, match=r"params\.yaml has no ARM kindness: choose one of positivity, conciseness"):
        load_experiment(project, arms=["kindness"])
    with pytest.raises(UserError, match=r"params\.yaml has no base gpt: choose one of smollm2-135m"):
        load_experiment(project, base="gpt")
    with pytest.raises(UserError, match=r"models/smollm2-20l is not there yet: run `make repro`"):
        load_experiment(project, base="smollm2-20l")
    with pytest.raises(UserError, match=r"elsewhere/params\.yaml is missing"):
        load_experiment(project / "elsewhere")


def test_an_arm_trained_by_a_call_guides(tiny, tmp_path):
    trainer = Trainer(lr=1e-2, epochs=4, batch_size=2, accelerator="cpu")
    metrics = train_arm(tiny, PAIRS, tmp_path / "kindness", beta=0.1, trainer=trainer)
    assert metrics["pairs"] == 2 and metrics["steps"] == 4 and 0 <= metrics["accuracy"] <= 1
    files = {file.name for file in (tmp_path / "kindness").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= files
    again = train_arm(tiny, PAIRS, tmp_path / "again" / "kindness", beta=0.1, trainer=trainer)
    assert again == metrics
    decoder = GuidedDecoder.load(tiny, {"kindness": tmp_path / "kindness"}, device="cpu")
    ((_, generation),) = decoder.generate([Request("Tips?", {"kindness": 1.0}, max_new_tokens=4)])
    assert generation.kl > 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"chosen": None}, r"pair 0 has no text chosen: every pair needs prompt, chosen, rejected, split"),
        ({"split": "dev"}, r"pair 0 has split 'dev': use one of train, validation, test"),
    ],
)
def test_pairs_that_cannot_be_trained_on_are_named(tiny, tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence):
        train_arm(tiny, [{**PAIRS[0], **change}], tmp_path / "arm")


def test_a_split_without_pairs_is_named(tiny, tmp_path):
    with pytest.raises(UserError, match="there is no pair of split test"):
        train_arm(tiny, [pair for pair in PAIRS if pair["split"] != "test"], tmp_path / "arm")


def test_a_processor_of_folders_runs_adapters_and_whole_models(base, tiny, arms, prompter):
    weights, folders = {"one": 0.7, "whole": 0.3}, {"one": arms["one"], "whole": tiny}
    processor = GuidanceLogitsProcessor.load(base, tiny, folders, weights)
    decoder = GuidedDecoder.load(tiny, folders, device="cpu")
    ids = torch.tensor([prompter.prompt_ids("Tips?")])
    written = base.generate(ids, do_sample=False, max_new_tokens=6, logits_processor=[processor])[0, ids.shape[1] :]
    ((_, greedy),) = decoder.generate([Request("Tips?", weights, temperature=0.0, max_new_tokens=6)])
    assert written.tolist()[: len(greedy.tokens)] == list(greedy.tokens)
