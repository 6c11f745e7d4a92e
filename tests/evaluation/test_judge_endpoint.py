"""What an endpoint may do to a judge that was paid for: every reply is kept, and each question asked once."""

import dataclasses
import errno
import json
import os
import signal
import time

import pytest

from pipeline.config.errors import UserError
from pipeline.data import row_store
from pipeline.evaluation.judges.progress import Progress
from pipeline.evaluation.judges.reply import Reply, refusal_reason
from pipeline.evaluation.judges.rubric import Question
from pipeline.evaluation.judges.verdicts import undetermined
from pipeline.stages import judge as stage
from tests.endpoint import KEY, completion, longer, parts
from tests.evaluation.conftest import asking, rows_of, scores_of
from tests.judges import verdicts_of

PAIRS = [(f"Why {number}?", "long and good " * (number % 7 + 1), f"short {number}") for number in range(100)]
REFUSED = {"error": {"message": "The response was filtered.", "code": "content_filter"}}
MANY = 2 * len(PAIRS)


@pytest.fixture
def run(smoke_params, workspace):
    """Verdicts of one run on positivity, by default on a hundred pairs in both orders."""

    def of(judge, pairs=PAIRS):
        return verdicts_of(judge, smoke_params, workspace).of({"positivity": pairs})["positivity"]

    return of


def kept(workspace):
    return [json.loads(line)["row"] for line in (workspace.scratch / "store/verdicts.jsonl").open()]


def choice(content, **more):
    return {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop", **more}


def test_nothing_is_asked_once_a_reply_cannot_be_kept(serve, run, workspace, monkeypatch):
    server, append, written = serve(), row_store._append, []

    def full(file, block, path):
        if block:
            written.append(block)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        append(file, block, path)

    monkeypatch.setattr(row_store, "_append", full)
    with pytest.raises(OSError, match="No space left"):
        run(asking(server))
    # A reply that waits to be written has made room for another question.
    assert len(server.requests) <= 3 + 2 * 4, "those under way at the third reply, four at a time"
    assert len(kept(workspace)) == len(server.requests) - 1


@pytest.fixture
def interruptible():
    """A shell that starts the tests in its background has them ignore what Ctrl-C sends."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_run_keeps_what_is_under_way(serve, run, workspace):
    server, once = serve(), iter([True])

    def interrupting(body):
        if len(server.requests) >= 40 and next(once, False):  # several threads answer: none need see just 40
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.02)
        return longer(body)

    server.reply = interrupting
    with pytest.raises(KeyboardInterrupt):
        run(asking(server))
    asked = len(server.requests)
    assert 40 <= asked < 100 and len(kept(workspace)) == asked
    assert scores_of(run(asking(server))) == [(1.0, 1.0)] * 100 and len(server.requests) == MANY


def test_waiting_between_attempts_ends_with_the_run(serve, run, workspace):
    """One question fails for good; another, told to come back in a minute, does not hold the run up."""
    server = serve()
    busy = (429, {"error": {"message": "later"}}, {"Retry-After": "60"})
    server.odd = lambda body: busy if "Why 1?" in str(body) else (401, {"error": {"message": "no"}})
    with pytest.raises(UserError, match="did not answer"):
        run(asking(server, concurrency=4), PAIRS[1:2] + PAIRS[2:3])


ODD = {
    "no message": (completion({"index": 0, "message": None, "finish_reason": "stop"}), "content is null"),
    "null": (completion(choice(None)), "content is null"),
    "number": (completion(choice(7)), "content is a number"),
    "truth value": (completion(choice(True)), "content is a truth value"),
    "parts": (completion(choice([{"type": "text", "text": "A"}])), "content is a list"),
    "object": (completion(choice({"text": "A"})), "content is an object"),
    "refusal": (completion({"index": 0, "message": {"content": None, "refusal": "No."}}), "refusal"),
    "cut off": (completion(choice(None, finish_reason="length")), "finish_reason=length"),
    "cut off in a text": (completion(choice("I think that", finish_reason="length")), "finish_reason=length"),
    "filtered": (completion(choice("", finish_reason="content_filter")), "content_filter"),
    "odd end": (completion(choice("", finish_reason="\x1b[31m stop\n")), "finish_reason=??31m?stop?"),
    "no choice": (completion(), "no choices"),
    "no choices": ({"id": "x"}, "no choices"),
    "a text for choices": (completion() | {"choices": "A"}, "no choices"),
    "an object for choices": (completion() | {"choices": {"0": 1}}, "no choices"),
    "a list in choices": (completion(["A"]), "no choices"),
    "odd usage": (completion(choice("?"), usage={"prompt_tokens": "x", "completion_tokens": -1}), "no verdict"),
    "filtered in an answer": (REFUSED, "content_filter"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_reply_is_one_undetermined_verdict_and_asked_for_once(serve, run, workspace, name):
    body, reason = ODD[name]
    server = serve()
    server.odd = lambda asked: (200, body) if "Why 3?" in str(asked) else None
    for _ in range(2):
        verdicts = run(asking(server), PAIRS[:10])
        assert len(server.requests) == 20, "a second run asks nothing"
        assert scores_of(verdicts) == [(None, None) if place == 3 else (1.0, 1.0) for place in range(10)]
        ((found, count),) = undetermined(verdicts).items()
        assert found.startswith(reason) and count == 2
    for row in kept(workspace):
        assert isinstance(row["reply"], str) and Reply.of_row(row).row().items() <= row.items()


def test_half_a_surrogate_pair_in_a_reply_does_no_harm(serve, run, workspace):
    server = serve()
    server.reply = lambda body: f"\ud83d is half of it.\nVERDICT {parts(body)[0]}: A"
    assert scores_of(run(asking(server), PAIRS[:2])) == [(1.0, 0.0)] * 2
    assert all("\ud83d" not in row["reply"] for row in kept(workspace))


def test_what_an_earlier_version_kept_of_an_odd_reply_stops_nobody():
    for poison in ([{"type": "text", "text": "A"}], None, 7):
        assert Reply.of_row({"objective": "x", "reply": poison}).reason.startswith("content is ")


@pytest.mark.parametrize(
    ("status", "error", "reason"),
    [
        (400, {"code": "content_filter", "message": "filtered"}, "content_filter"),
        (400, {"code": None, "message": "triggering Azure OpenAI's content management policy"}, "content_filter"),
        (403, {"code": 403, "message": "requires moderation; your input was flagged"}, "content_filter"),
        (400, {"code": "context_length_exceeded", "message": "too many"}, "context_length_exceeded"),
        (400, {"code": 400, "message": "maximum context length is 4096 tokens"}, "context_length_exceeded"),
        (400, {"code": "peculiar", "message": "not this one"}, "refused with status 400"),
        (413, {"message": "large"}, "refused with status 413"),
    ],
)
def test_a_refused_question_is_one_undetermined_verdict(serve, run, status, error, reason):
    server = serve()
    server.odd = lambda asked: (status, {"error": error}) if "Why 3?" in str(asked) else None
    for _ in range(2):
        verdicts = run(asking(server))
        assert undetermined(verdicts) == {reason: 2} and len(server.requests) == MANY
    assert scores_of(verdicts).count((1.0, 1.0)) == 99


def test_what_refuses_every_question_is_a_fault_of_the_settings(serve, run, workspace):
    server = serve()
    server.odd = lambda asked: (400, {"error": {"message": "unknown parameter", "code": "unsupported_parameter"}})
    for pairs in (PAIRS, PAIRS[:1]):
        with pytest.raises(UserError, match=r"did not answer .*unknown parameter"):
            run(asking(server), pairs)
    assert len(server.requests) < 20 and not kept(workspace)


def test_a_reason_is_known_by_code_or_words():
    assert refusal_reason("max_tokens is too large", "invalid_value") is None
    assert refusal_reason("This model's context window is 8k", None) == "context_length_exceeded"


def test_a_run_has_one_budget_for_card_rows_and_objectives(serve, smoke_params, workspace):
    server = serve()
    rows_of(workspace)
    params = dataclasses.replace(smoke_params, judge=asking(server, max_calls=10))
    asked = []
    for _ in range(10):
        try:
            stage.run(params, workspace)
            break
        except UserError as error:
            assert "judge.max_calls=10 is reached" in str(error)
        asked.append(len(server.requests))
    assert asked == [10, 20, 30], "16 for the card of two objectives, and 24 for rows that differ from the control's"
    assert len(server.requests) == 40 and (workspace.results / "judge/wins.csv").is_file()


def test_objectives_with_one_rubric_share_their_questions(serve, smoke_params, workspace):
    server = serve()
    judge = asking(server, rubrics={"positivity": "overall", "conciseness": "overall"})
    found = verdicts_of(judge, smoke_params, workspace).of(dict.fromkeys(smoke_params.objectives, PAIRS[:5]))
    assert found["positivity"] == found["conciseness"] and len(server.requests) == 10


def test_a_judge_without_a_verdict_leaves_its_card_and_stops_there(serve, smoke_params, workspace):
    server = serve()
    server.odd = lambda asked: (200, completion(choice("", finish_reason="length")))
    rows_of(workspace)
    params = dataclasses.replace(smoke_params, judge=asking(server))
    with pytest.raises(UserError, match=r"no verdict on positivity.*8 finish_reason=length.*raise judge\.max_tokens"):
        stage.run(params, workspace)
    card = json.loads((workspace.results / "judge/card.json").read_text())["objectives"]["positivity"]
    assert card["undetermined"] == 1 and card["reasons"] == {"finish_reason=length": 8}
    assert len(server.requests) == 16, "the card's questions; the rows are not paid for"
    assert {row["finish_reason"] for row in kept(workspace)} == {"length"}


def test_undetermined_verdicts_of_the_rows_are_summed_up_by_reason(serve, smoke_params, workspace, capsys):
    server = serve()
    rows_of(workspace)
    server.odd = lambda asked: (400, REFUSED) if "How?" in parts_of(asked) else None
    params = dataclasses.replace(smoke_params, judge=asking(server))
    stage.run(params, workspace)
    shown = capsys.readouterr().out
    assert "4 of 12 verdicts on positivity are undetermined: 4 content_filter" in shown
    assert "judge: 40 questions, 0 of them answered before, 40 calls left, at most" in shown


def parts_of(body):
    return body["messages"][1]["content"]


def test_rows_without_any_verdict_stop_with_the_reason(serve, smoke_params, workspace):
    server = serve()
    rows_of(workspace)
    held_out = ("test 0?", "test 1?", "test 2?", "test 3?")
    server.odd = lambda asked: None if any(one in parts_of(asked) for one in held_out) else (400, REFUSED)
    params = dataclasses.replace(smoke_params, judge=asking(server))
    with pytest.raises(UserError, match="12 of 12 verdicts on positivity are undetermined: 12 content_filter"):
        stage.run(params, workspace)


def test_progress_reckons_calls_tokens_and_cost():
    class Server:
        url = "http://127.0.0.1:1/v1"

    questions = [Question("rubric", "prompt", "one", "two")] * 1000
    judge = asking(Server, max_tokens=100, price=(1.0, 10.0))
    with Progress(judge, questions) as progress:
        first = progress.left
        assert first.startswith("1000 calls left, at most") and first.endswith("0.1 M written, cost 1.14")
        for _ in range(500):
            progress.add(Reply("x", usage=(2000, 10)))
        assert progress.left == "500 calls left, about 1 M tokens read and 0.005 M written, cost 1.05"
    assert "cost" not in Progress(dataclasses.replace(judge, price=None), questions).left


@pytest.mark.parametrize("key", [f"{KEY}\n", f"  {KEY}  "])
def test_blanks_around_a_key_are_no_part_of_it(serve, run, monkeypatch, key):
    server = serve()
    monkeypatch.setenv("JUDGE_KEY", key)
    run(asking(server), PAIRS[:1])
    assert server.requests[0][2]["authorization"] == f"Bearer {KEY}"


def test_a_key_of_two_lines_is_refused_and_not_shown(serve, run, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", f"{KEY}\n{KEY}")
    with pytest.raises(UserError, match="JUDGE_KEY holds characters that no key has") as caught:
        run(asking(serve()), PAIRS[:1])
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("where", ["judge.base_url", "data.path", "+judge.extra_body.proxy"])
@pytest.mark.parametrize(
    "address", ["https://me:hunter2@host/v1", "https://hunter2@host/v1", "https://h/v1?api_key=hunter2"]
)
def test_a_password_in_an_address_is_refused_and_not_shown(compose_params, where, address):
    with pytest.raises(UserError, match="is an address that holds a password or key") as caught:
        compose_params("judge=llm", f"{where}='{address}'", "judge.max_calls=no")
    assert "hunter2" not in str(caught.value) and where.lstrip("+") in str(caught.value)


def test_an_address_of_a_judge_is_one(compose_params):
    assert compose_params("judge=llm", "judge.base_url=http://127.0.0.1:8000/v1").judge.base_url.endswith("/v1")
    for address in ("127.0.0.1:8000/v1", "https://host/v1?version=2"):
        with pytest.raises(UserError, match=r"judge\.base_url is .* an address starts with http"):
            compose_params("judge=llm", f"judge.base_url='{address}'")
