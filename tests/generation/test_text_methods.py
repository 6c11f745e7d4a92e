"""Methods whose models agree on a text: byte-wise proxy tuning beside its law by exhaustion, nudging turn by turn."""

from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.points import BASE, REFERENCE
from pipeline.decoding.backbone import Backbone
from pipeline.decoding.cross_tokenizer.spelling import Spelling
from pipeline.decoding.cross_tokenizer.text_reader import ByteReader, TextReader
from pipeline.decoding.guidance import cut, normalised
from pipeline.decoding.request import Request
from pipeline.generation.methods.byte_proxy_tuning import ByteProxyTuning
from pipeline.generation.methods.nudging import Nudging
from pipeline.models.loading import load_model
from pipeline.models.prompting import Prompter
from tests.exact import ByteModel, product, text_logp
from tests.foreign import foreign_model, sentencepiece

PROMPTS = ["Describe a rainy Monday.", "Tips?", "Write a review of the corner bakery near the station."]
MIX = {"one": 0.75, "two": 0.5}


@pytest.fixture(scope="module")
def base():
    """A base whose texts end sooner than by chance."""
    tokenizer = sentencepiece()
    model = foreign_model(len(tokenizer))
    model.lm_head.weight.data[tokenizer.eos_token_id] *= 4
    return Backbone(model, Prompter(tokenizer, None))


@pytest.fixture
def small(tiny, prompter, arms):
    return Backbone(load_model(tiny, torch.float32, torch.device("cpu")), prompter, arms, name=REFERENCE)


def spelling_of(backbone):
    return Spelling(backbone.prompter.tokenizer, "a model")


def exact(backbone, lane, prompt):
    """A lane's law of bytes behind a prompt, by exhaustion: no cache, every text read anew."""
    ids = backbone.prompter.prompt_ids(prompt)

    @lru_cache(None)
    def next_logps(tokens):
        backbone.adapted.serve([(lane, 0, 1)], step=False)
        with torch.inference_mode():
            logits = backbone.adapted.model(input_ids=torch.tensor([[*ids, *tokens]])).logits[0, -1]
            return normalised(cut(logits[None], backbone.vocab_size))[0].double()

    (end,) = backbone.ends
    return ByteModel(next_logps, spelling_of(backbone), end)


@torch.inference_mode()
@settings(max_examples=6, deadline=None)
@given(st.lists(st.sampled_from([*"the rain. ", "é", "🙂", " a great", "good"]), min_size=1, max_size=5))
def test_bytes_are_read_as_the_sum_over_all_tokens_that_spell_them(base, pieces):
    text = "".join(pieces).encode()
    reader = ByteReader(
        TextReader(base, spelling_of(base), [base.prompter.prompt_ids(prompt) for prompt in PROMPTS[:2]], [{BASE}] * 2),
        base.ends,
    )
    wanted = [exact(base, BASE, prompt) for prompt in PROMPTS[:2]]
    read = [0, 0]
    for step in range(2 * len(text) + 2):  # in turn and together, each a byte at a time
        rows = [row for row in (0, 1) if read[row] <= len(text) and (step + row) % 3]
        laws = reader.read({row: text[: read[row]] for row in rows})
        for row in rows:
            law = wanted[row].byte_law(text[: read[row]])
            np.testing.assert_allclose(laws[BASE, row].exp(), law.exp(), atol=2e-5)
            read[row] += 1


def test_what_is_read_of_one_row_has_nothing_to_do_with_the_others(base, small):
    texts = [b"the rainy walk", b"", b"great, good and happy"]
    prompts = [small.prompter.prompt_ids(prompt) for prompt in PROMPTS]
    with torch.inference_mode():
        together = TextReader(small, spelling_of(small), prompts, [small.lanes, {"one"}, {"two", REFERENCE}])
        list(together.read({0: b"the rain", 2: b"gre"}))
        found = {(read.lane, read.row): read for read in together.read(dict(enumerate(texts)))}
        assert found.keys() == {*((lane, 0) for lane in small.lanes), ("one", 1), ("two", 2), (REFERENCE, 2)}
        for (lane, row), read in found.items():
            alone = TextReader(small, spelling_of(small), [prompts[row]], [{lane}])
            (one,) = alone.read({0: texts[row]})
            assert one.tokens == read.tokens == spelling_of(small).spell(texts[row])
            assert one.logp == pytest.approx(read.logp, abs=1e-4)
            torch.testing.assert_close(one.next_A, read.next_A, atol=1e-4, rtol=0)


def generated(decoder, requests):
    return [row for _, row in sorted(decoder.generate(requests), key=lambda found: found[0])]


def test_byte_proxy_tuning_draws_from_the_product_of_the_models_laws_of_bytes(base, small):
    asked = [
        Request(prompt, weights, max_new_tokens=6, seed=seed)
        for prompt in PROMPTS[:2] for weights in (MIX, {"one": 1.0}, {}) for seed in (0, 1)
    ]  # fmt: skip
    rows = generated(ByteProxyTuning(base, [small], 8), asked)
    spelling = spelling_of(base)
    ended = [row for row in rows if row.finish == "eos"]
    assert ended and len(ended) < len(rows)
    for request, row in zip(asked, rows, strict=True):
        models = {lane: exact(small, lane, request.prompt) for lane in small.lanes}
        own = exact(base, BASE, request.prompt)
        tokens = tuple(row.tokens[:-1] if row.finish == "eos" else row.tokens)
        text = spelling.joined(tokens)
        assert len(row.tokens) <= 6 + 1 and spelling.spell(text) == tokens

        def law(text, models=models, own=own, weights=request.weights):
            arms = {name: models[name] for name in weights}
            return product(own, arms, models[REFERENCE], text, weights)

        if row.finish == "eos":
            assert row.logp == pytest.approx(text_logp(law, text), abs=1e-3)
            assert row.logp_base == pytest.approx(text_logp(own.byte_law, text), abs=1e-3)
        else:
            assert row.logp == pytest.approx(sum(float(law(text[:at])[byte]) for at, byte in enumerate(text)), abs=1e-3)
        assert (row.kl == pytest.approx(0, abs=1e-4)) == (not request.weights) and row.kl > -1e-6
    alone = generated(ByteProxyTuning(base, [small], 1), asked)
    assert [row.tokens for row in alone] == [row.tokens for row in rows], "what a row draws has to do with the batch"


def turns(monkeypatch, decoder, requests):
    """The rows, and who wrote each piece of them."""
    told = []
    write = Nudging._write

    def spy(self, row, token, spelling, ends):
        told.append((row.found.request.seed, spelling is self._spellings[0], token in ends, spelling.pieces[token]))
        write(self, row, token, spelling, ends)

    with monkeypatch.context() as patched:
        patched.setattr(Nudging, "_write", spy)
        return generated(decoder, requests), told


def test_the_small_model_writes_words_where_the_base_is_unsure_and_the_base_the_rest(monkeypatch, base, small):
    asked = [Request(PROMPTS[0], {"one": 1.0}, max_new_tokens=8, seed=seed) for seed in range(6)]
    never, always, between = (
        turns(monkeypatch, Nudging(base, [small], 4, threshold), asked) for threshold in (1e-9, 0.999999, 0.02)
    )
    for _, told in (never, always, between):
        for seed in range(6):
            writers = [by_base for of, by_base, *_ in told if of == seed]
            assert writers and not writers[0], "the small model opens"
    assert not any(by_base for _, by_base, *_ in always[1])
    assert {by_base for _, by_base, *_ in between[1]} == {True, False}
    for seed in range(6):
        mine = [(by_base, piece) for of, by_base, _, piece in never[1] if of == seed]
        first = [by_base for by_base, _ in mine]
        opening = first.index(True) if True in first else len(first)
        assert all(first[opening:]), "a base that is always sure never gives the word back"
        word = b"".join(piece or b"" for _, piece in mine[:opening])
        assert len(word.split()) <= 1
    for rows, _ in (never, always, between):
        for row in rows:
            assert len(row.tokens) <= 8 and np.isnan([row.kl, row.logp]).all() and row.forwards > 0
            ended = row.finish == "eos"
            laws = exact(base, BASE, PROMPTS[0])._next
            tokens = tuple(row.tokens)
            logp = sum(float(laws(tokens[:place])[token]) for place, token in enumerate(tokens))
            assert row.logp_base == pytest.approx(logp, abs=1e-3), "how likely the base finds the text"
            assert ended == (tokens[-1] in base.ends)


def test_a_small_model_left_to_itself_writes_its_own_law(base, small):
    """Always unsure, nudging is the small model: what it writes first has the law of the ARM at α = 1."""
    asked = [Request(PROMPTS[1], {"one": 1.0}, max_new_tokens=1, seed=seed) for seed in range(400)]
    rows = generated(Nudging(base, [small], 400, 0.999999), asked)
    law = exact(small, "one", PROMPTS[1])._next(())
    (end,) = small.ends
    share = np.mean([row.finish == "eos" and len(row.tokens) == 1 for row in rows])
    wanted = float(law[end].exp())
    assert share == pytest.approx(wanted, abs=4 * np.sqrt(wanted * (1 - wanted) / 400) + 1e-9)
