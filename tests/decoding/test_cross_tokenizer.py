import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from scipy.stats import chisquare
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers import models as kinds
from transformers import PreTrainedTokenizerFast

from pipeline.config.errors import UserError
from pipeline.config.points import REFERENCE
from pipeline.config.schema import Model, Point, Sweep
from pipeline.decoding.backbone import Backbone
from pipeline.decoding.cross_tokenizer.spelling import Spelling
from pipeline.decoding.decoder import GuidedDecoder, Request
from pipeline.decoding.logits_processor import GuidanceLogitsProcessor
from pipeline.generation.rows import generate_sweep
from pipeline.models.fetch import fetch
from pipeline.models.loading import load_model
from pipeline.models.prompting import Prompter
from tests.exact import END, ByteModel, product, text_logp
from tests.foreign import Slow, foreign_model, sentencepiece
from tests.tiny import tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
WORDS = {"<unk>": 0, "<end>": 1, "a": 2}
PROMPTS = ["Describe a rainy Monday.", "Tips?", "Write a review of the corner bakery near the station."]
pytestmark = pytest.mark.filterwarnings("ignore:.*another tokenizer")


def log_ratio(weights):
    return {**weights, "base": 1.0 - sum(weights.values())}


@pytest.fixture(scope="module")
def tokens():
    return Spelling(sentencepiece(), "base"), Spelling(tiny_tokenizer(), "arm")


@pytest.fixture
def arm(tiny, prompter, arms):
    return Backbone(load_model(tiny, torch.float32, CPU), prompter, arms, name=REFERENCE)


@pytest.fixture
def across(arm):
    """A decoder of a base with byte fallback and ARMs with byte-level tokens; every token is a candidate."""
    tokenizer = sentencepiece()
    base = Backbone(foreign_model(len(tokenizer)), Prompter(tokenizer, None))
    decoder = GuidedDecoder(base, arm, batch_size=8)
    decoder._bridge.candidates = 10**9
    return decoder


@pytest.fixture
def slow(tiny, prompter, arms, across):
    fresh = {name: load_model(tiny, torch.float32, CPU) for name in arms}
    adapted = {name: PeftModel.from_pretrained(fresh[name], str(folder)).eval() for name, folder in arms.items()}
    tokenizer = sentencepiece()
    reference = load_model(tiny, torch.float32, CPU)
    base = foreign_model(len(tokenizer))
    return Slow(base, adapted, reference, Prompter(tokenizer, None), prompter, across._bridge)


@settings(max_examples=150, deadline=None)
@given(st.text(min_size=1, max_size=12))
def test_spelling_and_bytes_are_inverse(tokens, text):
    for spelling in tokens:
        assert spelling.joined(spelling.spell(text.encode())) == text.encode()


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="é🙂 ab", min_size=1, max_size=6), st.integers(0, 8), st.integers(0, 8))
def test_texts_that_begin_or_end_inside_a_character_are_spelled(tokens, text, first, last):
    piece = text.encode()[first : len(text.encode()) - last]
    for spelling in tokens:
        assert spelling.joined(spelling.spell(piece)) == piece


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([b"the", b" rain", b"\xff", b"\xc3", "é".encode(), b"\xf0\x9f", b"\x80"]), max_size=6))
def test_bytes_that_are_no_text_are_spelled_where_they_stand(tokens, parts):
    text = b"".join(parts)
    for spelling in tokens:
        assert spelling.joined(spelling.spell(text)) == text


def test_covering_tokens_are_those_that_begin_with_the_text(tokens):
    for spelling in tokens:
        for text in (b" ", b"r", b" ra", b"there", b"\xf0", b"zzz"):
            wanted = {token for token, piece in enumerate(spelling.pieces) if piece and piece.startswith(text)}
            assert set(spelling.covering(text).tolist()) == wanted


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        (Tokenizer(kinds.WordLevel(WORDS, unk_token="<unk>")), "WordLevel.* has an unknown token"),
        (Tokenizer(kinds.WordPiece(WORDS, unk_token="<unk>")), "WordPiece.* has an unknown token"),
        (None, "normalises texts"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_does_not_tell_its_bytes_is_refused(tokenizer, said):
    if tokenizer is None:
        tokenizer = tiny_tokenizer().backend_tokenizer
        tokenizer.normalizer = normalizers.NFKC()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    with pytest.raises(UserError, match=f"stranger: .*{said}"):
        Spelling(fast, "stranger")


def test_a_mark_of_the_beginning_is_no_part_of_a_text_that_goes_on():
    tokenizer = tiny_tokenizer().backend_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    spelling = Spelling(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>"), "arm")
    assert spelling.joined(spelling.spell(b"the")) == b"the"


class Toy:
    """A law over token sequences of three letters and their merges, drawn at random from a sequence's own seed."""

    def __init__(self, seed):
        vocab = {"<end>": 0, "a": 1, "b": 2, "c": 3, "ab": 4, "bc": 5, "abc": 6, "ca": 7}
        merges = [("b", "c"), ("a", "b"), ("a", "bc"), ("c", "a")]
        tokenizer = Tokenizer(kinds.BPE(vocab, merges))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(use_regex=False), decoders.ByteLevel()
        tokenizer.pre_tokenizer.add_prefix_space = False
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
        self.spelling, self.seed = _letters(fast), seed

    def next_logps(self, tokens):
        generator = torch.Generator().manual_seed(hash((self.seed, tokens)) % 2**31)
        return torch.randn(8, generator=generator, dtype=torch.float64).log_softmax(0)


def _letters(fast):
    """The spelling of a tokenizer that knows three letters only: the probes are of texts that it cannot write."""
    import pipeline.decoding.cross_tokenizer.spelling as module

    probes, module._PROBES = module._PROBES, ()
    try:
        return Spelling(fast, "toy")
    finally:
        module._PROBES = probes


@pytest.mark.parametrize("text", [b"a", b"ab", b"abc", b"bca", b"cab", b"aabc", b"abcab"])
def test_prefix_probabilities_are_brute_force_sums(text):
    toy = Toy(0)
    model, pieces, mass = ByteModel(toy.next_logps, toy.spelling, 0), toy.spelling.pieces, 0.0
    for size in range(1, len(text) + 1):
        for path in itertools.product(range(1, 8), repeat=size):
            before = b"".join(pieces[token] for token in path[:-1])
            canonical = toy.spelling.spell(before) == path[:-1]
            if canonical and len(before) < len(text) and (before + pieces[path[-1]]).startswith(text):
                mass += float(sum(toy.next_logps(path[:at])[token] for at, token in enumerate(path)).exp())
    assert float(model.begins(text).exp()) == pytest.approx(mass, rel=1e-12)
    law = model.byte_law(text)
    assert float(law.exp().sum()) == pytest.approx(1.0)


def test_the_product_of_bytes_is_the_base_where_arm_and_reference_agree():
    base, arm = (ByteModel(Toy(seed).next_logps, Toy(seed).spelling, 0) for seed in (1, 2))
    law = product(base, {"one": arm}, arm, b"ab", {"one": 3.0})
    np.testing.assert_allclose(law.exp(), base.byte_law(b"ab").exp(), atol=1e-12)
    assert text_logp(base.byte_law, b"ab") < 0
    assert law[END] > -torch.inf


def permuted(tokenizer, order):
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    told["model"]["vocab"] = {piece: order[token] for piece, token in told["model"]["vocab"].items()}
    for entry in told["added_tokens"]:
        entry["id"] = order[entry["id"]]
    told["added_tokens"].sort(key=lambda entry: entry["id"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(told)), eos_token="<end>", pad_token="<pad>"
    )
    fast.chat_template = tokenizer.chat_template
    return fast


def test_the_same_strings_in_another_order_give_the_law_of_one_vocabulary(arm, prompter):
    size = prompter.vocab_size
    order = torch.randperm(size, generator=torch.Generator().manual_seed(5)).tolist()
    plain, moved = tiny_model(size, seed=7).eval(), tiny_model(size, seed=7).eval()
    moved.model.embed_tokens.weight.data[order] = plain.model.embed_tokens.weight.data.clone()
    moved.generation_config.eos_token_id = order[prompter.eos]
    ordinary = GuidedDecoder(Backbone(plain, prompter), arm, batch_size=8)
    other = GuidedDecoder(Backbone(moved, Prompter(permuted(prompter.tokenizer, order), None)), arm, batch_size=8)
    other._bridge.candidates = 10**9
    assert not other._bridge.table.shared
    asked = [
        Request(prompt, {**weights, REFERENCE: -sum(weights.values())}, max_new_tokens=10, seed=seed)
        for prompt in PROMPTS for weights in ({"one": 1.0}, {"one": 0.5, "two": 0.7}) for seed in (0, 1)
    ]  # fmt: skip
    written = dict(ordinary.generate(asked))
    texts = [written[place].tokens for place in range(len(asked))]
    one = ordinary.traces(asked, texts)
    two = other.traces(asked, [[order[token] for token in text] for text in texts])
    for first, second in zip(one, two, strict=True):
        np.testing.assert_allclose(first.logps["guided"], second.logps["guided"][:, order], atol=5e-5)


def test_an_arm_that_is_its_reference_leaves_the_base_as_it_is(tiny, prompter):
    tokenizer = sentencepiece()
    small = load_model(tiny, torch.float32, CPU)
    base = Backbone(foreign_model(len(tokenizer)), Prompter(tokenizer, None))
    others = Backbone(small, prompter, name=REFERENCE), Backbone(small, prompter, name="one")
    decoder = GuidedDecoder(base, *others, batch_size=8)
    decoder._bridge.candidates = 10**9
    asked = [Request(prompt, log_ratio({"one": 2.0}), max_new_tokens=12) for prompt in PROMPTS]
    written = dict(decoder.generate(asked))
    for trace in decoder.traces(asked, [written[place].tokens for place in range(len(asked))]):
        silent = [0, 2]  # <pad> is one of the ARM's tokens too, <unk> is not
        base_law = trace.logps["base"].clone()
        base_law[:, silent[1]] = -torch.inf
        np.testing.assert_allclose(trace.logps["guided"].exp(), base_law.softmax(-1), atol=1e-5)
    assert all(generation.left_out < 12 * 0.1 for generation in written.values())


@pytest.mark.parametrize("weights", [{"one": 1.0}, {"one": 0.5, "two": 0.7}])
def test_the_law_is_that_of_the_definition_at_every_step(across, slow, weights):
    asked = [Request(prompt, log_ratio(weights), max_new_tokens=10, seed=seed) for prompt in PROMPTS for seed in (0, 1)]
    written = dict(across.generate(asked))
    texts = [written[place].tokens for place in range(len(asked))]
    opened = 0
    for trace, text in zip(across.traces(asked, texts), texts, strict=True):
        for step in range(len(text)):
            wanted = slow.law(trace.request.prompt, weights, text[:step])
            np.testing.assert_allclose(np.exp(trace.logps["guided"][step]), np.exp(wanted), atol=2e-5)
            opened += bool(slow.open_after(text[:step])[1])
    assert opened > 10  # spellings that were open, read anew or looked ahead from


def test_texts_are_drawn_from_the_enumerated_law(across):
    across._bridge.candidates, across._batch_size, count = 12, 512, 3000
    request = Request("Tips?", log_ratio({"one": 1.0}), max_new_tokens=2)
    drawn = [row.tokens for _, row in across.generate([dataclasses.replace(request, sample=n) for n in range(count)])]
    first = across.trace(request, [5]).logps["guided"][0].exp()
    likely = [int(token) for token in first.topk(4).indices if int(token) != 1]  # 1 ends a text
    seconds = [
        trace.logps["guided"][1].exp() for trace in across.traces([request] * len(likely), [[t, 5] for t in likely])
    ]
    expected = {
        (token, int(other)): float(count * first[token] * second[other])
        for token, second in zip(likely, seconds, strict=True) for other in second.topk(6).indices
    }  # fmt: skip
    expected = {text: value for text, value in expected.items() if value >= 5}
    observed = [sum(tuple(text) == wanted for text in drawn) for wanted in expected]
    wanted = list(expected.values())
    found = chisquare([*observed, count - sum(observed)], [*wanted, count - sum(wanted)])
    print(f"{len(expected)} texts: p = {found.pvalue:.3f} that the two laws are one")
    assert len(expected) >= 4
    assert found.pvalue > 0.001


def test_rows_do_not_depend_on_the_batch_around_them(across):
    asked = [Request(prompt, log_ratio({"one": 1.0}), max_new_tokens=length, seed=seed)
             for prompt in PROMPTS for length in (3, 9) for seed in (0, 1)]  # fmt: skip
    together = dict(across.generate(asked))
    across._batch_size = 2
    assert {place: row.tokens for place, row in across.generate(asked)} == {
        k: row.tokens for k, row in together.items()
    }


def test_only_candidates_are_drawn_and_the_rest_is_told(across):
    across._bridge.candidates = 4
    request = Request("Tips?", log_ratio({"one": 1.0}), max_new_tokens=8)
    [(_, row)] = across.generate([request])
    trace = across.trace(request, row.tokens)
    allowed = (trace.logps["guided"] > -torch.inf).sum(-1)
    assert int(allowed.max()) <= 4 + 1  # the likeliest, and the end
    outside = (trace.logps["base"].exp() * (trace.logps["guided"] == -torch.inf)).sum(-1)
    assert row.left_out == pytest.approx(float(outside.sum()), abs=1e-4)


def test_the_processor_of_transformers_draws_from_the_same_law(across, arm):
    tokenizer = sentencepiece()
    prompter, model = Prompter(tokenizer, None), foreign_model(len(tokenizer))
    guidance = GuidanceLogitsProcessor(prompter, {"one": 1.0, REFERENCE: -1.0}, arm, prompts=["Tips?"])
    guidance._bridge.candidates = 10**9
    ids = torch.tensor([prompter.prompt_ids("Tips?")])
    found = model.generate(ids, do_sample=False, max_new_tokens=10, logits_processor=[guidance], pad_token_id=0)
    request = Request("Tips?", {"one": 1.0, REFERENCE: -1.0}, temperature=0.0, max_new_tokens=10)
    [(_, row)] = across.generate([request])
    assert found[0, ids.shape[1] :].tolist()[: len(row.tokens)] == row.tokens
    with pytest.raises(UserError, match="cannot read the base's prompts"):
        GuidanceLogitsProcessor(prompter, {"one": 1.0}, arm)


def test_the_user_is_told_once_and_a_reference_is_asked_for(tiny, prompter, arms):
    tokenizer = sentencepiece()
    base = Backbone(foreign_model(len(tokenizer)), Prompter(tokenizer, None))
    small = load_model(tiny, torch.float32, CPU)
    with pytest.warns(UserWarning, match="one, two, three: another tokenizer than the base's"):
        GuidedDecoder(base, Backbone(small, prompter, arms, name=REFERENCE))
    with pytest.raises(UserError, match=r"weighed against the model it was made from: .*arm_base"):
        GuidedDecoder(base, Backbone(small, prompter, arms, name=None))


def test_an_arm_whose_context_is_full_is_one_sentence(tmp_path, prompter):
    tokenizer = sentencepiece()
    base = Backbone(foreign_model(len(tokenizer)), Prompter(tokenizer, None))
    small = tiny_model(prompter.vocab_size, context=24).eval()
    decoder = GuidedDecoder(base, Backbone(small, prompter, name=REFERENCE), Backbone(small, prompter, name="one"))
    with pytest.raises(UserError, match="context of 24"):
        list(decoder.generate([Request("Tips?", log_ratio({"one": 1.0}), max_new_tokens=40)]))


def test_a_sweep_on_a_base_of_another_family_needs_no_more_than_its_name(smoke_params, tiny, arms, workspace, tmp_path):
    tokenizer = sentencepiece()
    foreign_model(len(tokenizer)).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    spec = Model(source="path", location=str(tmp_path / "source"))
    fetch("foreign", spec, workspace.model("foreign"))
    shutil.copytree(tiny, workspace.model("tiny"))
    shutil.copytree(arms["one"], workspace.arm("positivity"))
    points = {
        "base": Point(),
        "plain": Point({"positivity": 1.0}),
        "ratio": Point({"positivity": 1.0}, form="log_ratio"),
    }
    params = dataclasses.replace(
        smoke_params, base="foreign", models={**smoke_params.models, "foreign": spec},
        arm=dataclasses.replace(smoke_params.arm, base="tiny"), sweep=Sweep("base", points),
    )  # fmt: skip
    with pytest.warns(UserWarning, match="positivity: another tokenizer than the base's"):
        rows = generate_sweep(params, workspace, "foreign", ["Tips?", "Why?"])
    told = {row.point: row.left_out for row in rows}
    assert told["base"] == 0.0
    assert told["plain"] > 0.0 and told["ratio"] > 0.0
