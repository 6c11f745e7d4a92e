"""A local causal LM as judge: the verdict is the answer that it finds likeliest, and needs no server.

Shapes: B questions, R texts, T positions, V vocabulary.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

import torch

from pipeline.config.errors import UserError
from pipeline.config.judges import LocalJudge
from pipeline.evaluation.judges.reply import CONTEXT_LENGTH, Reply
from pipeline.evaluation.judges.rubric import Question
from pipeline.models.loading import Source, resolve_device
from pipeline.models.prompting import Prompter, left_pad

_WORDS = ("A", "B", "TIE")


class LocalModel:
    """A judge on this machine; its replies are the probabilities of the verdicts and a line with the likeliest.

    Raises:
        UserError: it is not at hand.
    """

    def __init__(self, judge: LocalJudge, source: Source, device: str) -> None:
        self._judge, self._source, self._device = judge, source, resolve_device(device)
        self._model: Any = None
        # What its replies depend on beside the question.
        self.identity = ["local_llm", "whole answers", *self._source.identity(self._device), judge.least]

    def ask(self, questions: Sequence[Question], keep: Callable[[int, Reply], None]) -> None:
        """Ask a batch at a time, the shortest questions first; `keep(index, reply)` gets every reply at once.

        A question that exceeds the model's context has no verdict.

        Raises:
            UserError: the model could not be loaded, or its tokenizer does not tell the verdicts apart.
            Exception: whatever `keep` raises.
        """
        if not questions:
            return
        prompter, context = self._source.prompter(), self._source.context
        if self._model is None:
            self._model = self._source.load(self._device)
        spelled = [Spelled.of(prompter, question) for question in questions]
        order = sorted(range(len(spelled)), key=lambda place: spelled[place].length)
        for start in range(0, len(order), self._judge.batch_size):
            places = order[start : start + self._judge.batch_size]
            fitting = [place for place in places if spelled[place].length <= context]
            probs = self._probs([spelled[place] for place in fitting], prompter.eos) if fitting else []
            for place, row in zip(fitting, probs, strict=True):
                keep(place, self._reply(questions[place], row))
            for place in places[len(fitting) :]:
                keep(place, Reply(fault=CONTEXT_LENGTH))

    def _probs(self, questions: Sequence["Spelled"], pad: int) -> list[list[float]]:
        """Of every question, the probabilities of the verdicts, each of all of its tokens."""
        owners = [(place, stem) for place, one in enumerate(questions) for stem in one.stems]
        texts = [[*questions[place].ids, *stem] for place, stem in owners]
        ids_RT, mask_RT = left_pad(texts, pad, self._device)
        longest = max(len(stem) for _, stem in owners)
        with torch.inference_mode():
            logits_RTV = self._model(
                input_ids=ids_RT, attention_mask=mask_RT, position_ids=(mask_RT.cumsum(-1) - 1).clamp_min(0),
                logits_to_keep=longest + 1,
            ).logits.float()  # fmt: skip
        every = []
        for place, one in enumerate(questions):
            probs = []
            for answer in one.answers:
                row = next(row for row, (own, stem) in enumerate(owners) if own == place and _begins(stem, answer[:-1]))
                first = longest - len(owners[row][1])  # where the logits of an answer's first token stand
                logps_TV = logits_RTV[row, first : first + len(answer)].log_softmax(-1)
                steps = torch.tensor(answer, device=self._device)[:, None]
                probs.append(float(logps_TV.gather(1, steps).sum().exp()))
            every.append(probs)
        return every

    def _reply(self, question: Question, probs: list[float]) -> Reply:
        shown = json.dumps(dict(zip(_WORDS, (round(value, 6) for value in probs), strict=True)))
        if sum(probs) < self._judge.least:
            return Reply(shown, fault="all verdicts are improbable")
        return Reply(f"{shown}\nVERDICT {question.code}: {_WORDS[probs.index(max(probs))]}")


@dataclass(frozen=True)
class Spelled:
    """A question as the model reads it, up to where the verdicts part, and the tokens that each goes on with there.

    Tokenizers need not spell a verdict with one token, and several may share their first: SentencePiece models that
    split off the blank begin " A", " B" and " TIE" with it. So whole answers are compared.
    """

    ids: list[int]
    answers: list[list[int]]  # in the order of _WORDS

    @classmethod
    def of(cls, prompter: Prompter, question: Question) -> "Spelled":
        """Spelled by a model's tokenizer.

        Raises:
            UserError: one verdict's tokens are the beginning of another's, so that they cannot be compared.
        """
        text = "\n\n".join(message["content"] for message in question.messages())
        # Spelled whole: a tokenizer may begin a text otherwise than it goes on.
        spelled = [prompter.response_ids(text, f"VERDICT {question.code}: {word}", ended=False) for word in _WORDS]
        shared = len(commonprefix(spelled))  # noqa: RUF071  of lists of tokens, not of paths
        answers = [ids[shared:] for ids in spelled]
        if any(_begins(other, one) for one in answers for other in answers if one is not other):
            raise UserError(
                f"the tokenizer of judge.model spells one of the verdicts {', '.join(_WORDS)} as the beginning of "
                "another: choose another judge.model."
            )
        return cls([*prompter.prompt_ids(text), *spelled[0][:shared]], answers)

    @property
    def stems(self) -> list[list[int]]:
        """What has to be read behind `ids`: of every answer all tokens but the last, unless another begins so."""
        stems = [answer[:-1] for answer in self.answers]
        return [
            stem
            for place, stem in enumerate(stems)
            if not any(
                _begins(other, stem) and (other != stem or at < place) for at, other in enumerate(stems) if at != place
            )
        ]

    @property
    def length(self) -> int:
        """Tokens of the longest text that is read."""
        return len(self.ids) + max(map(len, self.stems))


def _begins(text: Sequence[int], start: Sequence[int]) -> bool:
    return list(text[: len(start)]) == list(start)
