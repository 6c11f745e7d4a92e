import subprocess
import sys

import pytest
import torch

from pipeline.arm import attach_adapter, pair_logps
from pipeline.config import Arm, UserError
from pipeline.losses import token_logps
from pipeline.pairs import PromptGroup, collate
from tests.tiny import tiny_model


def tensors(count, dtype, learns, bias=True):
    generator = torch.Generator().manual_seed(count)
    hidden, head, offset = (
        torch.randn(*shape, generator=generator, dtype=dtype) for shape in [(count, 16), (90, 16), (90,)]
    )
    label = torch.randint(0, 90, (count,), generator=generator)
    return hidden.requires_grad_(), head.requires_grad_(learns), label, offset.requires_grad_(learns) if bias else None


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [1, 255, 256, 257, 600])
def test_chunked_log_probabilities_and_gradients_are_those_of_the_whole(count, bias, learns):
    hidden, head, label, offset = tensors(count, torch.float64, learns, bias)
    upstream = torch.randn(count, dtype=torch.float64)
    wanted = torch.log_softmax(torch.nn.functional.linear(hidden, head, offset), -1).gather(1, label[:, None])[:, 0]
    found = token_logps(hidden, head, label, offset)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    learning = [tensor for tensor in (hidden, head, offset) if tensor is not None and tensor.requires_grad]
    for mine, other in zip(
        torch.autograd.grad(found, learning, upstream), torch.autograd.grad(wanted, learning, upstream), strict=True
    ):
        torch.testing.assert_close(mine, other, atol=1e-10, rtol=0)


def test_log_probabilities_of_a_bfloat16_model_are_float32():
    hidden, head, label, _ = tensors(40, torch.bfloat16, False)
    found = token_logps(hidden, head, label)
    assert found.dtype == torch.float32
    found.sum().backward()
    assert hidden.grad.dtype == torch.bfloat16
    wanted = torch.log_softmax(hidden.double() @ head.double().T, -1).gather(1, label[:, None])[:, 0]
    torch.testing.assert_close(found.double(), wanted, atol=0.1, rtol=0.02)


MEMORY = """
import sys, torch
from pathlib import Path
from pipeline.losses import token_logps

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

hidden, head = torch.randn(2500, 8, requires_grad=True), torch.randn(100_000, 8)
label, before = torch.randint(0, 100_000, (2500,)), status("VmRSS")
if sys.argv[1] == "whole":
    found = torch.log_softmax(hidden @ head.T, -1).gather(1, label[:, None]).sum()
else:
    found = token_logps(hidden, head, label).sum()
found.backward()
print(status("VmHWM") - before)
"""


def test_the_logits_of_all_tokens_are_never_held():
    """2500 tokens of a vocabulary of 100,000 are 954 MB of float32 logits."""
    peak = {
        how: float(
            subprocess.run([sys.executable, "-c", MEMORY, how], capture_output=True, text=True, check=True).stdout
        )
        for how in ("whole", "chunked")
    }
    print(f"peak above the inputs: {peak['whole']:.0f} MB whole, {peak['chunked']:.0f} MB in chunks")
    assert peak["whole"] > 1800
    assert peak["chunked"] < 500


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
        pair_logps(model, collate(groups, 0))
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
        attach_adapter(model, Arm(targets="all-linear"), 0)
