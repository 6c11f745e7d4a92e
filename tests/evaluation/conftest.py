import pytest

from pipeline.config.judges import LlmJudge
from pipeline.data.files import write_jsonl
from pipeline.data.responses import write_generated
from pipeline.evaluation.judges import llm
from tests.endpoint import KEY, Server
from tests.judges import generated, verdicts_of


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.setattr(llm, "_back_off", lambda state: 0.01)
    started = []

    def run(*faults):
        started.append(Server(*faults))
        return started[-1]

    yield run
    for server in started:
        server.shutdown()
        server.server_close()


def asking(server, **settings):
    told = {"rubrics": {"positivity": "overall", "conciseness": "conciseness"}, "resamples": 50, **settings}
    return LlmJudge(kind="llm", base_url=server.url, model="m", api_key_env="JUDGE_KEY", **told)


def scores_of(verdicts):
    return [tuple(one.score for one in each) for each in verdicts]


def rows_of(workspace, points=("base", "sharpened", "p100_c000")):
    """What generate and prepare wrote: longer responses at later points, pairs whose chosen response is the longer."""
    rows = [
        generated(prompt, "word " * (3 + place + 2 * number), point=point)
        for number, prompt in enumerate(("Why?", "How?", "When?"))
        for place, point in enumerate(points)
    ]
    write_generated(workspace.results / "generate/rows.jsonl", rows)
    for name in ("positivity", "conciseness"):
        pairs = [
            {"prompt": f"{split} {number}?", "chosen": "good " * (3 + number), "rejected": "bad", "split": split}
            for split in ("train", "test")
            for number in range(4)
        ]
        write_jsonl(workspace.results / f"prepare/pairs/{name}.jsonl", pairs)
    return rows


@pytest.fixture
def verdicts(smoke_params, workspace):
    """The scores of a judge's verdicts for one objective; every call is a run of its own."""

    def of(judge, pairs):
        return scores_of(verdicts_of(judge, smoke_params, workspace).of({"positivity": pairs})["positivity"])

    return of
