"""A model's folder may bring code: it is not run, and nobody is asked whether to run it."""

import ast
import json
from pathlib import Path

import pytest

from pipeline.config.errors import UserError
from pipeline.config.judges import RewardJudge, Scoring
from pipeline.config.schema import Model
from pipeline.data.responses import Response
from pipeline.models.fetch import fetch
from tests.judges import rewards_of
from tests.tiny import ROOT, tiny_tokenizer

LOADERS = ("from_pretrained", "from_config")


def auto_calls() -> list[tuple[str, ast.Call]]:
    """Every call of a class of transformers that could run a model's own code: (file and line, call)."""
    calls = []
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOADERS):
                continue
            if ast.unparse(node.func.value).split(".")[-1].startswith("Auto"):
                calls.append((f"{path.relative_to(ROOT)}:{node.lineno}", node))
    return calls


def test_every_call_says_that_no_model_code_is_run():
    calls = auto_calls()
    assert len(calls) > 15
    for where, call in calls:
        given = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "trust_remote_code"]
        assert given == ["False"], f"{where}: add trust_remote_code=False"


@pytest.fixture
def armed(tmp_path, monkeypatch):
    """A model's folder whose configuration is code, and the file that this code would write."""
    folder, trace = tmp_path / "armed", tmp_path / "it ran"
    folder.mkdir()
    told = {
        "model_type": "peculiar", "architectures": ["PeculiarForSequenceClassification"], "num_labels": 1,
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForSequenceClassification": "code.Model"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(told))
    (folder / "code.py").write_text(f"from pathlib import Path\nPath({str(trace)!r}).touch()\n")
    tiny_tokenizer().save_pretrained(folder)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run the code"))
    yield folder
    assert not trace.exists()


def test_fetch_refuses_a_model_that_is_code(armed, tmp_path):
    with pytest.raises(UserError, match=r"config\.json cannot be read .*contains custom code"):
        fetch("armed", Model(source="path", location=str(armed)), tmp_path / "models" / "armed")


def test_a_reward_model_that_is_code_is_refused(armed, smoke_params, workspace):
    judge = RewardJudge(kind="reward_model", models=dict.fromkeys(smoke_params.objectives, Scoring("path", str(armed))))
    rewards = rewards_of(judge, smoke_params, workspace)
    with pytest.raises(UserError, match=r"could not be loaded .*contains custom code.*a model without code of its own"):
        rewards.of({"positivity": [Response(prompt="Why?", response="So.")]})


def test_the_armed_folder_would_ask_without(armed):
    """The check above sees something: where it is not said, transformers asks."""
    from transformers import AutoConfig

    with pytest.raises(pytest.fail.Exception, match="asked whether"):
        AutoConfig.from_pretrained(Path(armed))
