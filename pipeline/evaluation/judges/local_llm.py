"""A local causal LM as judge: the verdict is what it finds likeliest to say next, and needs no server.

Shapes: B questions, V vocabulary.
"""

import json
from collections.abc import Iterator, Sequence
from os.path import commonprefix
from typing import Any

import torch

from pipeline.config.errors import UserError
from pipeline.config.schema import LocalJudge, Params
from pipeline.config.workspace import Workspace
from pipeline.evaluation.judges.rubric import Question
from pipeline.models.loading import Source, resolve_device
from pipeline.models.prompting import Prompter, left_pad

_WORDS = ("A", "B", "TIE")


class LocalAsked:
    """The model's replies, each the probabilities of the verdicts and the line that says the likeliest.

    Raises:
        UserError: it could not be loaded.
    """

    def __init__(self, judge: LocalJudge, params: Params, workspace: Workspace) -> None:
        self._judge, self._device = judge, resolve_device(params.decoding.device)
        self._source = Source.of(params, workspace, judge.model)
        self._model: Any = None

    @property
    def identity(self) -> list[Any]:
        """What its replies depend on beside the question."""
        return ["local_llm", *self._source.identity(self._device), self._judge.least]

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, str]]:
        """Yield (index, raw reply), the shortest questions first.

        Raises:
            UserError: a question exceeds the model's context, or its tokenizer does not tell the verdicts apart.
        """
        prompter = self._source.prompter()
        if self._model is None:
            self._model = self._source.load(self._device)
        read = [_ids(prompter, question) for question in questions]
        asked = [ids for ids, _ in read]
        context = self._source.context
        order = sorted(range(len(asked)), key=lambda place: len(asked[place]))
        if order and len(asked[order[-1]]) > context:
            raise UserError(
                f"a question of {len(asked[order[-1]])} tokens exceeds the context {context} of {self._judge.model}: "
                "choose another judge.model."
            )
        for start in range(0, len(order), self._judge.batch_size):
            places = order[start : start + self._judge.batch_size]
            ids_BT, mask_BT = left_pad([asked[place] for place in places], prompter.eos, self._device)
            with torch.inference_mode():
                positions_BT = (mask_BT.cumsum(-1) - 1).clamp_min(0)
                said = self._model(
                    input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions_BT, logits_to_keep=1
                )
            verdicts_B3 = torch.tensor([read[place][1] for place in places], device=self._device)
            probs_B3 = said.logits[:, -1].float().softmax(-1).gather(1, verdicts_B3)
            for place, probs in zip(places, probs_B3.tolist(), strict=True):
                yield place, self._reply(questions[place], probs)

    def _reply(self, question: Question, probs: list[float]) -> str:
        told = json.dumps(dict(zip(_WORDS, (round(value, 6) for value in probs), strict=True)))
        if sum(probs) < self._judge.least:
            return told
        return f"{told}\nVERDICT {question.code}: {_WORDS[probs.index(max(probs))]}"


def _ids(prompter: Prompter, question: Question) -> tuple[list[int], list[int]]:
    """The question as the model reads it, up to where the verdicts part, and the token that each goes on with there.

    Raises:
        UserError: two verdicts go on with one token.
    """
    text = "\n\n".join(message["content"] for message in question.messages())
    # Spelled whole: a tokenizer may begin a text otherwise than it goes on, and " A" alone with a blank's token.
    spelled = [prompter.response_ids(text, f"VERDICT {question.code}: {word}", ended=False) for word in _WORDS]
    shared = len(commonprefix(spelled))  # noqa: RUF071  of lists of tokens, not of paths
    verdicts = [ids[shared] for ids in spelled if len(ids) > shared]
    if len(set(verdicts)) < len(_WORDS):
        raise UserError(
            f"the tokenizer of judge.model begins two of the verdicts {', '.join(_WORDS)} with the same token: choose "
            "another judge.model."
        )
    return [*prompter.prompt_ids(text), *spelled[0][:shared]], verdicts
