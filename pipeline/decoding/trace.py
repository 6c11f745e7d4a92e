"""The token rewards of a response: what each ARM wanted more or less of than the base, token by token.

Shapes: T tokens of the response, V vocabulary of the base's tokenizer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import torch
from torch import Tensor

from pipeline.config.points import BASE
from pipeline.decoding.request import Request
from pipeline.decoding.token_colours import coloured
from pipeline.models.prompting import Prompter

GUIDED = "guided"  # the law that the weights make of base and ARMs


@dataclass(frozen=True)
class Alternative:
    """A token that might have stood at a position, with its probability under every law."""

    text: str
    chosen: bool  # whether it is the token of the response
    probabilities: Mapping[str, float]


@dataclass(frozen=True)
class Trace:
    """The next-token laws at every position of a response.

    Args:
        request: the prompt at its point.
        tokens: the response.
        logps: per law, `base`, each ARM and `guided`, log-probabilities of the next token: logps_TV.
        prompter: spells tokens.
        proposals: at every position the token that a draft proposes behind those before it, with the numbers of the
            request: where it is the response's own, speculative decoding takes it unseen; None where nothing drafts.
    """

    request: Request
    tokens: Sequence[int]
    logps: Mapping[str, Tensor]
    prompter: Prompter
    proposals: Sequence[int] | None = None

    @property
    def arms(self) -> list[str]:
        """The ARMs that read the response, in the request's order."""
        return [name for name in self.request.weights if name != BASE]

    @property
    def texts(self) -> list[str]:
        """What each token adds to the text: see `Prompter.pieces`."""
        return self.prompter.pieces(self.tokens)

    def token_logps(self, law: str) -> list[float]:
        """log π(y_t | x, y_<t) of a law at every position, in nats; their sum is log π(y|x)."""
        index_T1 = torch.tensor(self.tokens)[:, None]
        values: list[float] = self.logps[law].gather(1, index_T1)[:, 0].tolist()
        return values

    def rewards(self, arm: str) -> list[float]:
        """log π_r(y_t | x, y_<t) − log π_base(y_t | x, y_<t) at every position, in nats.

        Above 0 where the ARM wants the token more than the base does. The token's reward in GenARM is log π_r alone;
        the base's share is taken off, because what every language model finds likely is no preference.
        """
        pairs = zip(self.token_logps(arm), self.token_logps(BASE), strict=True)
        return [arm_logp - base_logp for arm_logp, base_logp in pairs]

    def alternatives(self, position: int, count: int = 5) -> list[Alternative]:
        """The `count` likeliest tokens of every law at a position, and the response's own; likeliest first."""
        at = {name: logps_TV[position] for name, logps_TV in self.logps.items()}
        likeliest = {int(token) for logps_V in at.values() for token in logps_V.topk(min(count, len(logps_V))).indices}
        chosen = int(self.tokens[position])
        ordered = sorted(likeliest | {chosen}, key=lambda token: -float(at[GUIDED][token]))
        return [
            Alternative(
                str(self.prompter.tokenizer.decode([token])),
                token == chosen,
                {name: float(logps_V[token].exp()) for name, logps_V in at.items()},
            )
            for token in ordered
        ]

    def record(self, count: int) -> dict[str, Any]:
        """The trace as a JSON value, with `count` alternatives per law at every position; no law is kept whole.

        An alternative is `[text, chosen, probabilities]`, these in the order of `laws`. `refused` is there if something
        drafts: at every position the text that was proposed, null where it is the response's own.
        """
        laws = [BASE, *self.arms, GUIDED]
        alternatives = [
            [
                [alternative.text, alternative.chosen, [round(alternative.probabilities[law], 3) for law in laws]]
                for alternative in self.alternatives(position, count)
            ]
            for position in range(len(self.tokens))
        ]
        refused = {} if self.proposals is None else {"refused": self.refused}
        return {
            "prompt": self.request.prompt, "weights": dict(self.request.weights), "tokens": self.texts,
            "rewards": {arm: [round(reward, 2) for reward in self.rewards(arm)] for arm in self.arms},
            "laws": laws, "alternatives": alternatives, **refused,
        }  # fmt: skip

    @property
    def refused(self) -> list[str | None]:
        """The text that a draft proposes at every position, None where it proposes the response's own token."""
        pairs = zip(self.proposals or (), self.tokens, strict=True)
        spell = self.prompter.tokenizer.decode
        return [None if proposal == token else str(spell([proposal])) for proposal, token in pairs]

    def _repr_html_(self) -> str:
        """The response once per ARM in its colours, as notebooks show it."""
        parts = []
        for arm in self.arms:
            rewards, alpha = self.rewards(arm), self.request.weights.get(arm, 0.0)
            parts.append(f"<b>{escape(arm)}</b>, α = {alpha:g}: {sum(rewards):+.1f} nats beside the base")
            parts.append(coloured(self.texts, rewards))
        return "".join(parts)
