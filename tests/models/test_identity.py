"""What makes results the same: rows by the law's version and by tokens, models by all of their files."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pipeline.config.judges import RewardJudge, Scoring
from pipeline.decoding.backbone import Backbone
from pipeline.decoding.decoder import GuidedDecoder, Request
from pipeline.decoding.guidance import LAW_VERSION
from pipeline.models.identity import ORIGIN, folder_identity
from pipeline.models.prompting import Prompter
from tests.generation.test_rows import rows_of, sweep  # noqa: F401
from tests.judges import rewards_of
from tests.reference import PROMPTS, run
from tests.tiny import ROOT, tiny_model, tiny_tokenizer

GOLDEN = ROOT / "tests" / "golden" / "rows.json"
WAYS = [
    {}, {"weights": {"one": 1.0}}, {"weights": {"one": 0.5, "two": 0.7}}, {"weights": {"base": 0.0, "two": 1.0}},
    {"weights": {"base": -0.5, "one": 1.5}}, {"weights": {"one": -1.0}, "temperature": 0.7}, {"temperature": 0.0},
    {"weights": {"one": 1.0}, "top_k": 5}, {"weights": {"one": 1.0}, "top_p": 0.8}, {"min_p": 0.1},
    {"weights": {"two": 1.0}, "stop": ("e",)}, {"sample": 1, "seed": 3},
]  # fmt: skip


def golden_rows(folder):
    """Rows of a tiny random model in float64, where no rounding decides a draw."""
    for seed, name in enumerate(("one", "two"), 1):
        adapted = get_peft_model(tiny_model(500), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        generator = torch.Generator().manual_seed(seed)
        for key, weight in adapted.named_parameters():
            if "lora_" in key:
                weight.data = torch.randn(weight.shape, generator=generator) * 0.2
        adapted.save_pretrained(str(folder / name))
    model, adapters = tiny_model(500).double().eval(), {name: folder / name for name in ("one", "two")}
    decoder = GuidedDecoder(Backbone(model, Prompter(tiny_tokenizer(), None), adapters))
    asked = [Request(prompt, **{"max_new_tokens": 8, **way}) for way in WAYS for prompt in PROMPTS[:2]]
    return [
        {"text": row.text, "tokens": row.tokens, "finish": row.finish, "sums": [row.logp, row.logp_base, row.kl]}
        for row in run(decoder, asked)
    ]


def test_rows_of_a_law_are_those_of_its_version(tmp_path):
    committed, rows = json.loads(GOLDEN.read_text(encoding="utf-8")), golden_rows(tmp_path)
    same = [(row["text"], row["tokens"], row["finish"]) for row in rows] == [
        (row["text"], row["tokens"], row["finish"]) for row in committed["rows"]
    ]
    same &= all(
        row["sums"] == pytest.approx(other["sums"], abs=1e-6)
        for row, other in zip(rows, committed["rows"], strict=True)
    )
    assert same or committed["law"] != LAW_VERSION, (
        "the same requests give other rows: if that is meant, raise LAW_VERSION in pipeline.decoding.guidance, so that "
        "no store serves rows of the law before, and run `python -m tests.models.test_identity`."
    )
    assert committed["law"] == LAW_VERSION, (
        "run `python -m tests.models.test_identity` to commit the rows of this version."
    )


def test_another_version_of_the_law_serves_no_row_of_the_one_before(sweep, tiny, arms, tmp_path, capsys, monkeypatch):  # noqa: F811
    rows_of(sweep, tiny, arms, tmp_path / "store.jsonl")
    monkeypatch.setattr("pipeline.generation.rows.LAW_VERSION", LAW_VERSION + 1)
    rows_of(sweep, tiny, arms, tmp_path / "store.jsonl")
    assert capsys.readouterr().out.count(": 0 of 9 rows") == 2


def test_a_prompt_that_is_asked_otherwise_is_another_row(sweep, tiny, arms, tmp_path, capsys, monkeypatch):  # noqa: F811
    rows_of(sweep, tiny, arms, tmp_path / "store.jsonl")
    before = Prompter.prompt_ids
    monkeypatch.setattr(Prompter, "prompt_ids", lambda self, prompt: [*before(self, prompt), 7])
    rows_of(sweep, tiny, arms, tmp_path / "store.jsonl")
    assert capsys.readouterr().out.count(": 0 of 9 rows") == 2


@pytest.fixture
def folder(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "name",
    ["merges.txt", "tokenizer.model", "chat_template.jinja", "config.json", "additional_chat_templates/tool.jinja"],
)
def test_every_file_that_loading_or_asking_reads_tells_models_apart(folder, name):
    before = folder_identity(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text((folder / name).read_text() + " " if (folder / name).exists() else "new")
    assert folder_identity(folder) != before


def test_what_no_model_reads_does_not_tell_models_apart(folder):
    before = folder_identity(folder)
    (folder / ORIGIN).write_text("{}")
    (folder / "README.md").write_text("a card")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock.json").write_text("{}")
    assert folder_identity(folder) == before


def test_two_files_that_change_names_are_another_model(folder):
    (folder / "a.txt").write_text("one")
    (folder / "b.txt").write_text("two")
    before = folder_identity(folder)
    (folder / "a.txt").write_text("two")
    (folder / "b.txt").write_text("one")
    assert folder_identity(folder) != before


def test_a_reward_model_that_changed_in_the_middle_of_its_weights_or_in_its_template_is_another(
    folder, smoke_params, workspace
):
    specs = {name: Scoring(source="path", location=str(folder)) for name in smoke_params.objectives}
    judge = RewardJudge(kind="reward_model", models=specs)
    rewards = rewards_of(judge, smoke_params, workspace)
    known = {rewards._identity("positivity")}
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1  # as long as before, and with the same end
    weights.write_bytes(content)
    known.add(rewards._identity("positivity"))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    known.add(rewards._identity("positivity"))
    assert len(known) == 3


if __name__ == "__main__":
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as scratch:
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in golden_rows(Path(scratch)))
    GOLDEN.write_text(f'{{"law": {LAW_VERSION}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")
