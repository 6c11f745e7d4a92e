import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency
from transformers import AutoTokenizer

from pipeline.config.errors import UserError
from pipeline.decoding.backbone import Backbone
from pipeline.decoding.decoder import GuidedDecoder, Request
from pipeline.decoding.logits_processor import GuidanceLogitsProcessor
from pipeline.models.prompting import Prompter, left_pad
from tests.reference import Reference
from tests.tiny import tiny_model

PROMPTS = ["Describe a rainy Monday.", "Tips?", "Write a review of the corner bakery near the station."]
WEIGHTS = {"one": 0.5, "two": 0.4}


@pytest.fixture
def guidance(base, prompter, arms):
    return lambda weights=WEIGHTS: GuidanceLogitsProcessor(prompter, weights, Backbone(base, prompter, arms, name=None))


def inputs(prompter, prompts=PROMPTS):
    pad = prompter.tokenizer.pad_token_id
    ids, mask = left_pad([prompter.prompt_ids(prompt) for prompt in prompts], pad, torch.device("cpu"))
    return {"input_ids": ids, "attention_mask": mask, "pad_token_id": pad}


def decoded(base, prompter, arms, prompts=PROMPTS, **how):
    requests = [Request(prompt, WEIGHTS, **how) for prompt in prompts]
    rows = dict(GuidedDecoder(Backbone(base, prompter, arms)).generate(requests))
    return [rows[index] for index in range(len(requests))]


def test_generate_and_the_decoder_choose_the_same_tokens(base, prompter, arms, guidance):
    given = inputs(prompter)
    found = base.generate(**given, do_sample=False, max_new_tokens=12, logits_processor=[guidance()])
    for row, wanted in zip(found, decoded(base, prompter, arms, temperature=0.0, max_new_tokens=12), strict=True):
        assert row[given["input_ids"].shape[1] :].tolist()[: len(wanted.tokens)] == wanted.tokens


def test_scores_are_the_law_at_every_step(base, prompter, arms, tiny, guidance):
    given, how = inputs(prompter), {"do_sample": True, "top_k": 0, "max_new_tokens": 8}
    torch.manual_seed(0)
    out = base.generate(
        **given, **how, num_return_sequences=2, logits_processor=[guidance()], output_scores=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    start, reference = given["input_ids"].shape[1], Reference(tiny, arms, prompter)
    for row in range(len(out.sequences)):
        tokens = out.sequences[row, start:].tolist()
        length = tokens.index(prompter.eos) + 1 if prompter.eos in tokens else len(tokens)
        for step in range(length):
            _, law = reference.laws(Request(PROMPTS[row // 2], WEIGHTS), tokens[:step])
            np.testing.assert_allclose(out.scores[step][row].numpy(), law, atol=1e-4, rtol=0)


def test_generate_and_the_decoder_draw_from_the_same_law(base, prompter, arms, guidance):
    count, how = 4000, {"temperature": 1.5, "top_k": 8, "top_p": 0.95, "min_p": 0.02}
    given = inputs(prompter, PROMPTS[:1])
    torch.manual_seed(0)
    sampled = base.generate(
        **given, do_sample=True, **how, max_new_tokens=2, num_return_sequences=count, logits_processor=[guidance()]
    )[:, given["input_ids"].shape[1] :]
    requests = [Request(PROMPTS[0], WEIGHTS, max_new_tokens=2, sample=n, **how) for n in range(count)]
    rows = [row for _, row in GuidedDecoder(Backbone(base, prompter, arms), batch_size=count).generate(requests)]
    drawn = torch.tensor([row.tokens + [prompter.tokenizer.pad_token_id] * (2 - len(row.tokens)) for row in rows])
    for place in (0, 1):
        table = np.stack([np.bincount(each[:, place], minlength=prompter.vocab_size) for each in (sampled, drawn)])
        table = table[:, table.sum(0) >= 10]
        found = chi2_contingency(table)
        print(f"token {place + 1}: {table.shape[1]} cells, p = {found.pvalue:.3f} that the two laws are one")
        assert table.shape[1] > 4
        assert found.pvalue > 0.001


def test_no_weight_leaves_the_base_s_law(base, prompter, guidance):
    scores = torch.randn(2, prompter.vocab_size)
    found = guidance({"one": 0.0})(torch.tensor([[5, 6], [7, 8]]), scores)
    torch.testing.assert_close(found, scores.log_softmax(-1))


def test_the_padding_of_a_base_s_head_gets_no_mass(prompter):
    wide = tiny_model(prompter.vocab_size + 13).eval()
    arm = Backbone(tiny_model(prompter.vocab_size, seed=2).eval(), prompter, name="arm")
    found = GuidanceLogitsProcessor(prompter, {"arm": 1.0}, arm)(
        torch.tensor([[5]]), wide(torch.tensor([[5]])).logits[:, -1]
    )
    assert found.shape == (1, prompter.vocab_size + 13)
    assert found[0, prompter.vocab_size :].tolist() == [-torch.inf] * 13


def test_a_pad_token_that_also_begins_the_prompt_is_kept(tiny, base, arms):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.pad_token = "<user>"  # with which the chat template begins
    guidance = GuidanceLogitsProcessor(
        Prompter(tokenizer, None), WEIGHTS, Backbone(base, Prompter(tokenizer, None), arms, name=None)
    )
    pad, scores = tokenizer.pad_token_id, torch.zeros(1, 500)
    torch.testing.assert_close(
        guidance(torch.tensor([[pad, pad, pad, 7, 8]]), scores), guidance(torch.tensor([[pad, 7, 8]]), scores)
    )


def test_an_attention_mask_says_what_is_padding(base, prompter, arms):
    ids, mask = torch.tensor([[0, 0, 7, 8], [0, 9, 7, 8]]), torch.tensor([[0, 1, 1, 1], [0, 1, 1, 1]])
    backbone, scores = Backbone(base, prompter, arms, name=None), torch.zeros(4, 500)
    found = GuidanceLogitsProcessor(prompter, WEIGHTS, backbone, attention_mask=mask)(
        ids.repeat_interleave(2, 0), scores
    )
    for row, prompt in ((0, [0, 7, 8]), (2, [9, 7, 8])):
        alone = GuidanceLogitsProcessor(prompter, WEIGHTS, backbone, attention_mask=torch.ones(1, 3))
        torch.testing.assert_close(found[row : row + 1], alone(torch.tensor([prompt]), scores[:1]), atol=1e-5, rtol=0)
        assert torch.equal(found[row], found[row + 1])


def test_several_rows_without_a_pad_token_need_a_mask(tiny, base, arms):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.pad_token = None
    prompter = Prompter(tokenizer, None)
    guidance = GuidanceLogitsProcessor(prompter, WEIGHTS, Backbone(base, prompter, arms, name=None))
    assert guidance(torch.tensor([[7, 8]]), torch.zeros(1, 500)).isfinite().all()
    with pytest.raises(UserError, match="attention_mask"):
        guidance(torch.tensor([[7, 8, 9], [7, 7, 9]]), torch.zeros(2, 500))


def test_two_processors_may_share_a_backbone(base, prompter, arms):
    shared = Backbone(base, prompter, arms, name=None)
    one, two = (GuidanceLogitsProcessor(prompter, {name: 1.0}, shared) for name in ("one", "two"))
    ids, scores, turns = [torch.tensor([[7, 8]]), torch.tensor([[7, 9]])], torch.zeros(1, 500), []
    for _ in range(3):
        turns.append([guidance(given, scores) for guidance, given in zip((one, two), ids, strict=True)])
        ids = [torch.cat([given, given[:, -1:]], 1) for given in ids]
    fresh = [GuidanceLogitsProcessor(prompter, {name: 1.0}, shared) for name in ("one", "two")]
    for last, given, guidance in zip(turns[-1], ids, fresh, strict=True):
        torch.testing.assert_close(last, guidance(given[:, :-1], scores), atol=1e-5, rtol=0)


def test_another_prompt_starts_anew(base, prompter, guidance):
    once, fresh = guidance(), [guidance() for _ in PROMPTS]
    for prompt, alone in zip(PROMPTS, fresh, strict=True):
        how = {"do_sample": False, "max_new_tokens": 5}
        both = [base.generate(**inputs(prompter, [prompt]), **how, logits_processor=[each]) for each in (once, alone)]
        assert torch.equal(*both)


def test_beams_are_refused(base, prompter, guidance):
    with pytest.raises(UserError, match="num_beams=1"):
        base.generate(
            **inputs(prompter), num_beams=4, do_sample=False, max_new_tokens=16, logits_processor=[guidance()]
        )


def test_unknown_arm_is_refused(guidance):
    with pytest.raises(UserError, match="weights name four, but the ARMs are one, two, three"):
        guidance({"four": 1.0})


@pytest.mark.parametrize("base_weight", [1.0, 0.1])
def test_whole_sequences_have_the_law_of_every_step(base, prompter, guidance, base_weight):
    weights = {**WEIGHTS, "base": base_weight}
    rows = [prompter.prompt_ids(prompt) for prompt in PROMPTS[:2]]
    size = max(map(len, rows))
    ids = torch.tensor([row + [0] * (size - len(row)) for row in rows])
    logits = base(ids).logits
    found = guidance(weights).sequence_logits(ids, logits).log_softmax(-1)
    for row, tokens in enumerate(rows):
        for step in (0, len(tokens) - 1):
            alone = guidance(weights)(torch.tensor([tokens[: step + 1]]), logits[row : row + 1, step])
            torch.testing.assert_close(found[row, step], alone[0], atol=1e-4, rtol=0)
