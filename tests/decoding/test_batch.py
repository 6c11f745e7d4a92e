import numpy as np
import pytest

from pipeline.config.errors import UserError
from pipeline.decoding.backbone import Backbone
from pipeline.decoding.decoder import GuidedDecoder, Request
from tests.reference import POINTS, PROMPTS, requests, run
from tests.tiny import tiny_model


def test_rows_end_at_eos_or_at_their_own_limit(decoder, prompter):
    wanted = [Request(PROMPTS[0], temperature=3.0, max_new_tokens=4 + n % 9, sample=n) for n in range(300)]
    finishes = set()
    for request, row in zip(wanted, run(decoder, wanted), strict=True):
        finishes.add(row.finish)
        if row.finish == "eos":
            assert row.tokens[-1] == prompter.eos and prompter.eos not in row.tokens[:-1]
        else:
            assert len(row.tokens) == request.max_new_tokens and prompter.eos not in row.tokens
    assert finishes == {"eos", "length"}


def test_any_end_of_the_model_ends_a_row(base, prompter):
    (free,) = run(GuidedDecoder(Backbone(base, prompter)), [Request("Why?", temperature=0.0, max_new_tokens=4)])
    token = free.tokens[1]
    base.generation_config.eos_token_id = [prompter.eos, token]
    (row,) = run(GuidedDecoder(Backbone(base, prompter)), [Request("Why?", temperature=0.0, max_new_tokens=9)])
    assert row.finish == "eos" and row.tokens.index(token) == len(row.tokens) - 1


def test_a_stop_text_ends_a_row_and_is_left_out(decoder):
    free = run(decoder, requests(max_new_tokens=20))
    stops = ("a", " the", "er")
    halted = run(decoder, requests(max_new_tokens=20, stop=stops))
    assert {row.finish for row in halted} >= {"stop"}
    for before, after in zip(free, halted, strict=True):
        assert before.tokens[: len(after.tokens)] == after.tokens
        assert not any(stop in after.text for stop in stops)
        if after.finish == "stop":
            assert before.text.startswith(after.text)
            cut = decoder._backbones[0].prompter.spell(after.tokens[:-1])
            assert not any(stop in cut for stop in stops), "it ended one token late"


@pytest.mark.parametrize("how", [{"top_k": 3}, {"top_p": 0.4}, {"min_p": 0.3}, {"top_k": 1}, {"temperature": 0.0}])
def test_a_truncated_row_draws_only_what_the_law_keeps(decoder, reference, how):
    for request in requests(points=POINTS[1:3], **how):
        most = (request.top_k or np.inf) if request.temperature else 1
        (row,) = run(decoder, [request])
        for place, token in enumerate(row.tokens):
            law = np.exp(reference.laws(request, row.tokens[:place])[1])
            rank, likelier = (law > law[token] + 1e-6).sum(), law[law > law[token] + 1e-6].sum()
            assert rank < most
            assert likelier < request.top_p + 1e-4
            assert law[token] >= request.min_p * law.max() - 1e-6
        assert np.isfinite([row.logp, row.kl]).all()


def test_truncated_and_free_rows_share_a_batch(decoder):
    free, greedy = requests(prompts=PROMPTS[:1]), requests(prompts=PROMPTS[:1], temperature=0.0)
    together = run(decoder, free + greedy)
    assert [row.tokens for row in together] == [row.tokens for row in run(decoder, free) + run(decoder, greedy)]


@pytest.mark.parametrize(
    "how",
    [{"temperature": -0.1}, {"top_k": -1}, {"top_p": 0.0}, {"min_p": 1.0}, {"max_new_tokens": 0}, {"stop": ("",)}],
)
def test_a_request_out_of_range_is_refused(how):
    with pytest.raises(UserError, match=f"a request's {next(iter(how))} is"):
        Request("Why?", **how)


@pytest.mark.parametrize("guilty", ["base", "arm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_name_the_model_and_the_row(base, prompter, guilty, value):
    arm = tiny_model(prompter.vocab_size, seed=3).eval()
    decoder = GuidedDecoder(Backbone(base, prompter), Backbone(arm, prompter, name="arm"))
    wanted = requests(points=[{}, {"arm": 1.0}], max_new_tokens=20)
    spoiled, count = {"base": base, "arm": arm}[guilty], [0]
    backbone = decoder._backbones[0 if guilty == "base" else 1]
    assert spoiled is not backbone.adapted.model

    def spoil(_module, _given, output):
        count[0] += 1
        if count[0] > 3:
            output[1] = value
        return output

    backbone.adapted.model.get_output_embeddings().register_forward_hook(spoil)
    with pytest.raises(UserError, match=rf"^{guilty} gave logits that are not finite at token \d+ of the response to"):
        list(decoder.generate(wanted))
