import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from pipeline.config.schema import Loss
from pipeline.training.losses import (
    arm_loss,
    distillation,
    hinge_loss,
    implicit_rewards,
    length_normalised,
    preference_loss,
    token_logps,
)


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
from pipeline.training.losses import token_logps

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


CHOSEN, REJECTED = torch.tensor([-3.0, -9.0], dtype=torch.float64), torch.tensor([-5.0, -2.0], dtype=torch.float64)


def log_sigmoid(value):
    return -math.log1p(math.exp(-value))


def test_arm_loss_is_the_equation():
    wanted = [-log_sigmoid(0.1 * 2.0), -log_sigmoid(0.1 * -7.0)]
    assert arm_loss(CHOSEN, REJECTED, 0.1).tolist() == pytest.approx(wanted)


def test_a_margin_shifts_the_logit_and_smoothing_mixes_in_the_flipped_pair():
    shifted = [-log_sigmoid(0.1 * 2.0 - 0.3), -log_sigmoid(0.1 * -7.0 - 0.3)]
    assert arm_loss(CHOSEN, REJECTED, 0.1, margin=0.3).tolist() == pytest.approx(shifted)
    mixed = 0.8 * arm_loss(CHOSEN, REJECTED, 0.1) + 0.2 * arm_loss(REJECTED, CHOSEN, 0.1)
    torch.testing.assert_close(arm_loss(CHOSEN, REJECTED, 0.1, label_smoothing=0.2), mixed)


def test_label_smoothing_is_least_where_the_model_is_as_sure_as_the_labels():
    logits = torch.linspace(-6, 6, 2401, dtype=torch.float64)
    smoothed = arm_loss(logits, torch.zeros_like(logits), 1.0, label_smoothing=0.2)
    assert float(logits[smoothed.argmin()]) == pytest.approx(math.log(0.8 / 0.2), abs=0.01)


def test_hinge_loss_is_nothing_beyond_the_margin():
    assert hinge_loss(CHOSEN, REJECTED, 0.1).tolist() == pytest.approx([1 - 0.2, 1 + 0.7])
    assert hinge_loss(CHOSEN, REJECTED, 0.5).tolist() == pytest.approx([0.0, 1 + 3.5])
    assert hinge_loss(CHOSEN, REJECTED, 0.5, margin=0.5).tolist() == pytest.approx([0.5, 1.5 + 3.5])


RESPONSE = torch.tensor([0, 0, 0, 1, 2, 2])
LOGPS, REFERENCE = torch.tensor([-6.0, -2.0, -5.0]), torch.tensor([-5.0, -3.0, -4.5])


def test_simpo_compares_means_over_tokens():
    assert length_normalised(LOGPS, RESPONSE).tolist() == [-2.0, -2.0, -2.5]
    assert implicit_rewards(Loss("simpo"), LOGPS, RESPONSE, None).tolist() == [-2.0, -2.0, -2.5]


def test_dpo_compares_log_ratios_to_the_reference():
    assert implicit_rewards(Loss("dpo"), LOGPS, RESPONSE, REFERENCE).tolist() == [-1.0, 1.0, -0.5]


@pytest.mark.parametrize("kind", ["arm", "hinge"])
def test_the_reference_free_losses_compare_sums(kind):
    assert implicit_rewards(Loss(kind), LOGPS, RESPONSE, REFERENCE).tolist() == LOGPS.tolist()


@pytest.mark.parametrize(
    ("loss", "wanted"),
    [
        (Loss("arm", 0.3, 0.1), arm_loss(CHOSEN, REJECTED, 0.2, 0.3, 0.1)),
        (Loss("simpo", 0.3, 0.1), arm_loss(CHOSEN, REJECTED, 0.2, 0.3, 0.1)),
        (Loss("dpo", 0.3, 0.1), arm_loss(CHOSEN, REJECTED, 0.2, 0.3, 0.1)),
        (Loss("hinge", 0.3), hinge_loss(CHOSEN, REJECTED, 0.2, 0.3)),
    ],
)
def test_the_configured_loss_is_computed_with_its_options(loss, wanted):
    torch.testing.assert_close(preference_loss(loss, CHOSEN, REJECTED, 0.2), wanted)


def test_distillation_is_the_divergence_of_the_two_laws_and_its_gradient():
    torch.manual_seed(0)
    child_ND = torch.randn(600, 8, dtype=torch.float64, requires_grad=True)
    parent_ND, head_VD = torch.randn(600, 8, dtype=torch.float64), torch.randn(40, 8, dtype=torch.float64)
    bias_V, label_N = torch.randn(40, dtype=torch.float64), torch.randint(0, 40, (600,))
    kl_N, logps_N = distillation(child_ND, parent_ND, head_VD, label_N, bias_V)
    own_NV, target_NV = (F.log_softmax(F.linear(x, head_VD, bias_V), -1) for x in (child_ND, parent_ND))
    wanted_N = F.kl_div(own_NV, target_NV, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl_N, wanted_N)
    torch.testing.assert_close(logps_N, own_NV.gather(1, label_N[:, None])[:, 0])
    upstream_N = torch.rand(600, dtype=torch.float64)
    found, expected = (torch.autograd.grad(x, child_ND, upstream_N, retain_graph=True)[0] for x in (kl_N, wanted_N))
    torch.testing.assert_close(found, expected)
    assert not logps_N.requires_grad


def test_a_child_that_is_its_parent_has_nothing_to_learn():
    same_ND = torch.randn(10, 8, requires_grad=True)
    kl_N, _ = distillation(same_ND, same_ND.detach(), torch.randn(40, 8), torch.zeros(10, dtype=torch.long))
    torch.testing.assert_close(kl_N, torch.zeros(10), atol=1e-6, rtol=0)
    assert torch.autograd.grad(kl_N.sum(), same_ND)[0].abs().max() < 1e-6
