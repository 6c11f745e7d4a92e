"""`arm=parm`: one training makes the ARMs of all objectives, and every mix of them costs two forwards per token."""

import json

import pandas as pd
import pytest

from pipeline.config.errors import UserError
from pipeline.data.files import read_jsonl
from pipeline.stages import explain, fetch, generate, judge, pareto, prepare, train
from tests.config.test_config import ONE_POINT
from tests.stages.test_sentence import composed  # noqa: F401


@pytest.mark.parametrize("kind", ["parm", "uniarm"])
def test_one_training_serves_every_mix_at_two_forwards(composed, workspace, kind):  # noqa: F811
    params = composed(f"arm={kind}", "objectives.conciseness.tie=0.0")
    fetch.run(params, workspace, "tiny")
    prepare.run(params, workspace)
    with pytest.raises(UserError, match="trains all objectives together: train --objective all"):
        train.run(params, workspace, "positivity")
    train.run(params, workspace, "all")
    for stage in (generate, explain, judge, pareto):
        stage.run(params, workspace)
    front = pd.read_csv(workspace.results / "pareto/front.csv").set_index("point")
    mixed = front[(front.alpha_positivity > 0) & (front.alpha_conciseness > 0)]
    assert len(mixed) == 3 and (mixed.method == kind).all()
    assert front.forwards_per_token.tolist() == [2 if method == kind else 1 for method in front.method]
    rows = pd.DataFrame([row for _, row in read_jsonl(workspace.results / "generate/rows.jsonl")])
    assert (rows.forwards.dropna() == 2 * rows.n_tokens[rows.forwards.notna()]).all()
    assert set(rows.point[rows.forwards.notna()]) == set(mixed.index)
    arms = json.loads((workspace.results / "pareto/metrics.json").read_text())["arms"]
    assert list(arms) == ["positivity", "conciseness"]
    assert all(0 <= arm["accuracy"] <= 1 and arm["pairs"] and arm["dropped_pairs"] for arm in arms.values())
    assert set(pd.read_csv(workspace.results / "pareto/curves.csv").objective) == {"all"}
    assert {folder.name for folder in workspace.arms.iterdir()} == set(params.objectives)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["objectives=positivity", *ONE_POINT], "there is one objective: set arm.kind=separate"),
        (["arm.tuning=full"], "an adapter: set arm.tuning=lora"),
        (["arm.rank=1"], "set arm.rank to 2 or more"),
        (["trainer=fsdp"], "cannot be sharded: use trainer=ddp"),
        (["experiment=comparison"], "comparison compares with separate ones: set arm.kind=separate"),
        (
            ["objectives.positivity.pretrained={source: path, location: /arms/warm}"],
            "trained here: set objectives.positivity.pretrained=null",
        ),
    ],
)
def test_what_an_arm_for_all_mixes_cannot_be_is_one_sentence(compose_params, overrides, said):
    with pytest.raises(UserError, match=f"arm.kind parm is one ARM for all mixes.*{said}"):
        compose_params("arm=parm", *overrides)
