"""What a decoder is compared with: requests to run, and the decoding rule written independently."""

import numpy as np
import torch
from peft import PeftModel

from pipeline.decoding.decoder import Request
from pipeline.decoding.guidance import random_stream
from pipeline.models.loading import load_model

PROMPTS = [
    "Describe a rainy Monday.", "Describe a rainy Monday. Why?", "Tips?",
    "Write a review of the corner bakery near the station.", "Why?",
]  # fmt: skip
POINTS = [{}, {"one": 1.0}, {"one": 0.5, "two": 0.5}, {"two": 0.3, "three": 0.9}]
CPU = torch.device("cpu")


def requests(prompts=PROMPTS, points=POINTS, **how):
    how = {"max_new_tokens": 6, **how}
    return [Request(prompt, point, **how) for prompt in prompts for point in points]


def run(decoder, wanted):
    rows = dict(decoder.generate(wanted))
    assert sorted(rows) == list(range(len(wanted)))
    return [rows[index] for index in range(len(wanted))]


def log_softmax(values):
    values = values - values.max()
    return values - np.log(np.exp(values).sum())


class Reference:
    """The decoding rule once more: float64, one row, PEFT's own forward, no cache, numpy arithmetic."""

    def __init__(self, tiny, arms, prompter):
        self.base = load_model(tiny, torch.float64, CPU)
        fresh = {name: load_model(tiny, torch.float64, CPU) for name in arms}
        self.arms = {
            name: PeftModel.from_pretrained(fresh[name], str(folder)).double().eval() for name, folder in arms.items()
        }
        self.prompter = prompter

    @torch.no_grad()
    def laws(self, request, tokens):
        """The base's and the guided next-token log-probabilities after a prompt and `tokens`."""
        ids = torch.tensor([self.prompter.prompt_ids(request.prompt) + tokens])
        weights = {"base": 1.0, **request.weights}
        experts = [(alpha, self.base if name == "base" else self.arms[name]) for name, alpha in weights.items()]
        each = [log_softmax(model(ids).logits[0, -1, : self.prompter.vocab_size].numpy()) for _, model in experts]
        total = sum(alpha * logps for (alpha, _), logps in zip(experts, each, strict=True))
        return each[0], log_softmax(total / (request.temperature or 1.0))

    def row(self, request):
        tokens, sums, laws = [], np.zeros(3), []
        for uniform in random_stream(request.stream, request.max_new_tokens):
            base, law = self.laws(request, tokens)
            if request.temperature:
                token = int(np.searchsorted(np.cumsum(np.exp(law)), uniform, side="right"))
                sums += [law[token], base[token], (np.exp(law) * (law - base)).sum()]
            else:
                token = int(law.argmax())
                sums += [0.0, base[token], -base[token]]
            tokens.append(token)
            laws.append(law)
            if token == self.prompter.eos:
                break
        return tokens, sums, laws
