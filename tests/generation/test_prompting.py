"""Sentences in the prompt while decoding, against the laws written out with one model and plain arithmetic."""

import dataclasses

import numpy as np
import pytest
import torch

from pipeline.config.errors import UserError
from pipeline.config.methods import Prompting
from pipeline.config.points import Mix
from pipeline.config.schema import Objective
from pipeline.decoding.guidance import random_stream
from pipeline.generation.methods.compared_method import ComparedMethod
from pipeline.models import loading
from tests.reference import CPU, log_softmax

WARM, COLD = "Answer warmly.", "Answer coldly."


@pytest.fixture
def params(smoke_params, workspace, tiny):
    workspace.models.mkdir()
    workspace.model("tiny").symlink_to(tiny)
    spec = dataclasses.replace(smoke_params.models["tiny"], dtype="float32")
    return dataclasses.replace(
        smoke_params,
        models={**smoke_params.models, "tiny": spec},
        objectives={"warmth": Objective(label="w", wanted=WARM, unwanted=COLD)},
        decoding=dataclasses.replace(smoke_params.decoding, max_new_tokens=6),
    )


@pytest.mark.parametrize(
    ("method", "exponents"),
    [
        (Prompting(kind="prompting", form="contrast"), {"": 1.0, WARM: 1.5, COLD: -1.5}),
        (Prompting(kind="prompting", form="instruction"), {"": -0.5, WARM: 1.5}),
    ],
)
def test_a_sentence_is_a_lane_of_the_base_with_another_prompt(params, workspace, tiny, prompter, method, exponents):
    mix = Mix("a150", {"warmth": 1.0}, 1.5)
    compared = ComparedMethod(method, params, workspace, params.base, [mix])
    request = compared.request(mix, "Describe tea.", 0)
    [row] = compared.rows([(mix, request)])
    base, tokens, kl = loading.load_model(tiny, torch.float64, CPU), [], 0.0
    for uniform in random_stream(request.stream, 6):
        laws = {}
        for sentence in {"", *exponents}:
            ids = torch.tensor([prompter.prompt_ids(f"Describe tea. {sentence}".strip()) + tokens])
            laws[sentence] = log_softmax(base(ids).logits[0, -1, : prompter.vocab_size].detach().numpy())
        law = log_softmax(sum(exponent * laws[sentence] for sentence, exponent in exponents.items()))
        kl += float(np.exp(law) @ (law - laws[""]))
        tokens.append(int(np.searchsorted(np.exp(law).cumsum(), uniform, side="right")))
        if tokens[-1] == prompter.eos:
            break
    assert row.tokens == tokens and row.kl == pytest.approx(kl, abs=1e-2)
    assert row.prompt == "Describe tea." and row.forwards == len(exponents) * row.n_tokens


def test_another_sentence_is_another_row_and_the_same_one_is_not_generated_again(params, workspace, monkeypatch):
    method, mix = Prompting(kind="prompting", form="instruction"), Mix("a100", {"warmth": 1.0}, 1.0)
    compared = ComparedMethod(method, params, workspace, params.base, [mix])
    asked = [(mix, compared.request(mix, "Describe tea.", 0))]
    first = compared.rows(asked)
    other = dataclasses.replace(params, objectives={"warmth": Objective(label="w", wanted=COLD)})
    assert ComparedMethod(method, other, workspace, other.base, [mix]).rows(asked) != first
    monkeypatch.setattr(ComparedMethod, "decoder", None)
    assert ComparedMethod(method, params, workspace, params.base, [mix]).rows(asked) == first


def test_without_a_sentence_there_is_nothing_to_prompt_with(params, workspace):
    scored = dataclasses.replace(params, objectives={"positivity": Objective(label="p", scorer="positivity")})
    with pytest.raises(UserError, match="positivity has no sentence to prompt with"):
        ComparedMethod(Prompting(kind="prompting", form="contrast"), scored, workspace, scored.base, [])
