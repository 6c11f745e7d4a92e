import pytest
import torch

from pipeline.config.errors import UserError
from pipeline.config.schema import Arm
from pipeline.training.arm import ResponseModel, trainable
from pipeline.training.attention import RECOMPUTED, attention_mask
from pipeline.training.batches import PromptGroup, collate, tokenise
from pipeline.training.losses import arm_loss
from tests.tiny import tiny_model

CPU = torch.device("cpu")


@pytest.fixture
def groups(prompter):
    rows = [
        {"id": f"{prompt}{n}", "prompt": prompt, "chosen": f"{'good great ' * (n + 1)}love", "rejected": bad}
        for prompt in ("Describe a rainy Monday.", "Tips?", "Why?")
        for n, bad in enumerate(("bad awful", "sad"))
    ]
    return tokenise(rows, prompter, 256, "rows").groups


def two_row_logps(model, group):
    """Each response in a row of its own behind its own copy of the prompt."""
    found = []
    for response in group.responses:
        logps = torch.log_softmax(model(torch.tensor([group.prompt + response])).logits[0], -1)
        start = len(group.prompt) - 1
        found.append(sum(logps[start + at, token] for at, token in enumerate(response)))
    return torch.stack(found)


@pytest.mark.parametrize("attention", ["eager", "sdpa", RECOMPUTED])
def test_shared_prompt_rows_equal_separate_rows_in_value_and_gradient(groups, attention):
    model = tiny_model(500).double().eval()
    batch, results = collate(groups, pad=0), []
    for shared in (True, False):
        model.set_attn_implementation(attention if shared else "eager")
        model.zero_grad()
        logps = (
            ResponseModel(model, torch.float64)(batch)
            if shared
            else torch.cat([two_row_logps(model, group) for group in groups])
        )
        arm_loss(logps[batch["chosen"]], logps[batch["rejected"]], 0.1).mean().backward()
        results.append((logps.detach(), [p.grad.clone() for p in model.parameters()]))
    (shared, gradients), (separate, wanted) = results
    torch.testing.assert_close(shared, separate, atol=1e-5, rtol=1e-7)  # transformers' softmax is in float32
    for mine, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


def test_prompt_and_sibling_tokens_never_enter_the_log_probability(groups):
    model, group = ResponseModel(tiny_model(500).double().eval(), torch.float64), groups[0]
    alone = PromptGroup(group.prompt, group.responses[1:2], [])
    torch.testing.assert_close(model(collate([group], 0))[1:2], model(collate([alone], 0)), atol=1e-9, rtol=1e-9)
    assert all(response[-1] == 1 for response in group.responses), "the end-of-sequence token is part of a response"


def test_a_token_sees_the_prompt_and_its_own_response_up_to_itself():
    seen = attention_mask(torch.tensor([[0, 0, 1, 1, 2, 2, -1]]), torch.float32)[0, 0] == 0
    assert seen[:6].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 1, 1, 0],
    ]


def test_attention_probabilities_are_not_kept_for_the_backward_pass():
    group = PromptGroup([5] * 60, [[6] * 60, [7] * 60], [(0, 1)])
    kept = {}
    for attention in ("eager", RECOMPUTED):
        model = tiny_model(500)
        model.set_attn_implementation(attention)
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=shapes: (to.append(t.shape), t)[1], lambda t: t):
            ResponseModel(model, torch.float32)(collate([group], 0))
        kept[attention] = sum(shape[-2:] == (180, 180) and shape[1] == 4 for shape in shapes if len(shape) == 4)
    assert kept["eager"] >= 2 and kept[RECOMPUTED] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_of_adapters_are_kept_in_the_computing_dtype(dtype):
    model = trainable(tiny_model(500).to(dtype).requires_grad_(False), Arm("tiny", targets="all-linear"), 0, CPU)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}, "master weights"
    batch, kept = collate([PromptGroup([5, 6, 7], [[8, 9], [10, 1]], [(0, 1)])], 0), []
    response_model = ResponseModel(model, dtype)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        logps = response_model(batch)
    assert logps.dtype == torch.float32
    wide = [
        t for t in kept if t.dtype == torch.float32 and t.numel() == 64 * 7
    ]  # the MLP's inner features, 7 positions
    assert (len(wide) > 0) == (dtype == torch.float32)
    logps.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_the_head_sees_only_positions_that_predict_a_response_token():
    model, seen = tiny_model(500).eval().requires_grad_(False), []
    groups = [PromptGroup([5, 6, 7, 8], [[9, 1], [10, 11, 1]], [(0, 1)]), PromptGroup([5], [[9, 1], [1]], [(0, 1)])]
    linear = torch.nn.functional.linear
    head = model.get_output_embeddings().weight

    def watched(given, weight, bias=None):
        if weight.data_ptr() == head.data_ptr():
            seen.append(given.shape)
        return linear(given, weight, bias)

    torch.nn.functional.linear = watched
    try:
        ResponseModel(model, torch.float32)(collate(groups, 0))
    finally:
        torch.nn.functional.linear = linear
    assert seen == [(8, 32)]


def test_a_model_that_caps_its_logits_is_refused():
    model = tiny_model(500).eval()
    forward = model.forward

    def capped(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = 3 * torch.tanh(out.logits / 3)
        return out

    model.forward = capped
    with pytest.raises(UserError, match="base: llama changes its logits behind the head"):
        trainable(model, Arm("tiny", targets="all-linear"), 0, CPU)


def test_a_model_whose_attention_is_not_plain_is_refused(monkeypatch):
    model = tiny_model(500).eval()
    monkeypatch.setattr("pipeline.training.attention._attend", lambda q, *_: torch.zeros_like(q).transpose(1, 2))
    with pytest.raises(UserError, match="base: llama has an attention of its own kind"):
        trainable(model, Arm("tiny", targets="all-linear"), 0, CPU)


def test_target_modules_that_are_not_there_are_refused():
    with pytest.raises(UserError, match=r"arm\.targets c_attn: "):
        trainable(tiny_model(500).eval(), Arm("tiny", targets="c_attn"), 0, CPU)
