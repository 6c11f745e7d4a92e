"""Best-of-N: of so many samples of the base, the one that reward models score highest.

Shapes: B texts.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from pipeline.decoding.decoder import GuidedDecoder
from pipeline.decoding.request import Generation, Request
from pipeline.evaluation.statistics import best_of_kl
from pipeline.generation.methods.lookahead_cache import LookaheadCache, TextReward
from pipeline.models.prompting import Prompter

_TEXTS = 64  # scored at once
_Key = tuple[str, int]  # a prompt and the number of a sample


class BestOfN:
    """Samples of a base, chosen by reward models; the face of `GuidedDecoder`.

    Requests of one prompt that weigh the reward models differently choose from the same samples.

    Args:
        decoder: of the base.
        prompter: its tokenizer and template.
        rewards: per objective; a request's weights name them.
        n: samples to choose from.
    """

    def __init__(self, decoder: GuidedDecoder, prompter: Prompter, rewards: Mapping[str, TextReward], n: int) -> None:
        self._decoder, self._prompter, self._rewards, self._n = decoder, prompter, dict(rewards), n

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        """All at once: what is shared between requests is sampled once."""
        return [[*range(len(requests))]]

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], progress: str | None = None) -> Iterator[tuple[int, Generation]]:
        """Yield (index into `requests`, generation)."""
        pool = {
            (request.prompt, number): replace(request, weights={}, sample=number)
            for request in requests
            for number in self._numbers(request)
        }
        drawn = dict(self._decoder.generate(list(pool.values()), progress))
        samples = {key: drawn[place] for place, key in enumerate(pool)}
        texts = {key: [*self._prompter.prompt_ids(key[0]), *sampled.tokens] for key, sampled in samples.items()}
        scores = {name: self._score(reward, texts) for name, reward in self._rewards.items()}
        for index, request in enumerate(requests):
            keys = [(request.prompt, number) for number in self._numbers(request)]
            totals = [sum(weight * scores[name][key] for name, weight in request.arms.items()) for key in keys]
            tokens = sum(len(samples[key].tokens) for key in keys)
            chosen = samples[keys[totals.index(max(totals))]]
            kl = best_of_kl(self._n, chosen.logp, chosen.logp_base)
            yield index, replace(chosen, kl=kl, forwards=tokens * (1 + len(request.arms)))

    def _numbers(self, request: Request) -> range:
        """Which samples of the base a request chooses from."""
        return range(request.sample * self._n, (request.sample + 1) * self._n)

    def _score(self, reward: TextReward, texts: Mapping[_Key, Sequence[int]]) -> dict[_Key, float]:
        order = sorted(texts, key=lambda key: len(texts[key]))
        scores: dict[_Key, float] = {}
        for start in range(0, len(order), _TEXTS):
            taken = order[start : start + _TEXTS]
            reading = LookaheadCache(reward.backbone, [texts[key] for key in taken], self._prompter.eos)
            scores |= zip(taken, reward.of(reading.last_BD).tolist(), strict=True)
        return scores
