import io
import json

import pytest
import torch
from rich.console import Console

from pipeline.config.errors import UserError
from pipeline.config.points import BASE
from pipeline.decoding.decoder import Request
from pipeline.decoding.trace import GUIDED
from pipeline.generation import explain

PROMPT = "Describe a rainy Monday."
REQUESTS = [
    Request(PROMPT, {"one": 1.0, "two": 0.5}, max_new_tokens=12),
    Request(PROMPT, {"one": 1.0, "two": 0.0}, temperature=0.7, max_new_tokens=12),
    Request(PROMPT, {"one": 2.0, "base": -1.0}, top_k=5, top_p=0.9, max_new_tokens=12),
    Request(PROMPT, {"one": 1.0, "two": 1.0}, max_new_tokens=12),
    Request(PROMPT, {"three": 0.0}, max_new_tokens=12),
]


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_trace_adds_up_to_what_the_decoder_says(decoder, request_):
    [(_, generation)] = decoder.generate([request_])
    trace = decoder.trace(request_, generation.tokens)
    assert sum(trace.token_logps(GUIDED)) == pytest.approx(generation.logp, abs=1e-4)
    assert sum(trace.token_logps(BASE)) == pytest.approx(generation.logp_base, abs=1e-4)
    assert set(trace.logps) == {GUIDED, BASE, *(set(request_.weights) - {BASE})}
    assert all(logps_TV.shape[0] == len(generation.tokens) for logps_TV in trace.logps.values())
    assert all(torch.allclose(logps_TV.exp().sum(-1), torch.tensor(1.0)) for logps_TV in trace.logps.values())


def test_rewards_are_those_of_the_models_run_one_by_one(decoder, reference):
    request = REQUESTS[0]
    [(_, generation)] = decoder.generate([request])
    trace = decoder.trace(request, generation.tokens)
    for name in ("one", "two"):
        alone = Request(PROMPT, {"base": 0.0, name: 1.0})
        for place, token in enumerate(generation.tokens):
            base, arm = reference.laws(alone, generation.tokens[:place])
            assert trace.rewards(name)[place] == pytest.approx(arm[token] - base[token], abs=1e-4)


def test_texts_add_up_and_special_tokens_are_named(decoder, prompter):
    text = "wonderful — 這 good!"
    trace = decoder.trace(REQUESTS[0], decoder.response_ids(PROMPT, text))
    assert "".join(trace.texts[:-1]) == text
    assert trace.texts[-1] == prompter.tokenizer.eos_token


def test_alternatives_hold_the_top_of_every_law_and_the_token_that_stands_there(decoder):
    request = REQUESTS[0]
    trace = decoder.trace(request, decoder.response_ids(PROMPT, "good wonderful"))
    found = trace.alternatives(1, 3)
    assert sum(one.chosen for one in found) == 1
    for law, logps_TV in trace.logps.items():
        top = sorted(logps_TV[1].exp().tolist(), reverse=True)[:3]
        shown = [one.probabilities[law] for one in found]
        assert all(any(value == pytest.approx(each) for each in shown) for value in top)
    guided = [one.probabilities[GUIDED] for one in found]
    assert guided == sorted(guided, reverse=True)


def test_an_empty_response_is_refused(decoder):
    with pytest.raises(UserError, match="has no tokens to explain"):
        decoder.trace(REQUESTS[0], [])


def test_what_is_shown_names_arms_sums_and_alternatives(decoder):
    trace = decoder.trace(REQUESTS[0], decoder.response_ids(PROMPT, "good day"))
    out = io.StringIO()
    explain.show(trace, Console(file=out, width=120, force_terminal=False), 0, 3)
    told = out.getvalue()
    assert "one, α = 1" in told and "two, α = 0.5" in told and "position 0" in told
    assert f"{sum(trace.rewards('one')):+.1f} nats beside the base" in told
    with pytest.raises(UserError, match="--position 99: the response has the positions 0 to"):
        explain.show(trace, Console(file=out), 99, 3)


def test_a_weight_of_no_objective_is_refused(smoke_params, workspace):
    with pytest.raises(UserError, match="--weights names kindness, which is no objective: use positivity, conciseness"):
        explain.explained(smoke_params, workspace, "Why?", None, {"kindness": 1.0})


def test_responses_read_together_have_the_traces_of_each_alone(decoder):
    requests = [REQUESTS[0], REQUESTS[3], Request("Why?", {"three": 0.0, "one": 0.5})]
    responses = [decoder.response_ids(request.prompt, "good " * size) for size, request in enumerate(requests, 1)]
    together = decoder.traces(requests, responses)
    for request, tokens, trace in zip(requests, responses, together, strict=True):
        alone = decoder.trace(request, tokens)
        assert trace.texts == alone.texts and trace.arms == alone.arms == list(request.weights)
        for law, logps_TV in alone.logps.items():
            assert torch.allclose(trace.logps[law], logps_TV, atol=1e-4)


def test_a_record_is_plain_json_of_the_same_numbers(decoder):
    trace = decoder.trace(REQUESTS[0], decoder.response_ids(PROMPT, "good wonderful"))
    record = json.loads(json.dumps(trace.record(2), allow_nan=False))
    assert record["rewards"]["two"] == [round(reward, 2) for reward in trace.rewards("two")]
    assert record["laws"] == [BASE, "one", "two", GUIDED] and len(record["alternatives"]) == len(record["tokens"])
    for position, found in enumerate(record["alternatives"]):
        [stands] = [text for text, chosen, _ in found if chosen]
        assert stands == trace.prompter.tokenizer.decode([trace.tokens[position]])
    assert "rgba(" in trace._repr_html_()
