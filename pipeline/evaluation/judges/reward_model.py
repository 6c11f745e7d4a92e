"""A reward model as judge: a sequence classifier with one label, of the hub, of a folder, or trained here.

Shapes: B rows.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from pipeline.config.errors import UserError
from pipeline.config.schema import Params, RewardJudge, Scoring
from pipeline.config.workspace import Workspace
from pipeline.data.chat import turns_of
from pipeline.data.files import Row, digest
from pipeline.models.control_tokens import ControlTokens, fill_chat_template
from pipeline.models.identity import folder_identity
from pipeline.models.loading import Source, model_digest, resolve_device, resolve_dtype
from pipeline.models.prompting import Prompter, left_pad
from pipeline.models.reward_model import merged_classifier

_SCORE_MODEL = {r"^score_head\.": "score."}  # safe-rlhf's score models are classifiers under another name


class RewardModelJudge:
    """Scores of every response by one reward model per objective.

    Raises:
        UserError: an objective has no reward model, or one could not be loaded.
    """

    def __init__(self, judge: RewardJudge, params: Params, workspace: Workspace) -> None:
        self._judge, self._params, self._workspace = judge, params, workspace
        if lacking := [name for name in params.objectives if name not in judge.models]:
            raise UserError(f"judge.models has no reward model for {lacking[0]}: add judge.models.{lacking[0]}.")

    def identity(self, objective: str) -> str:
        """What its scores of an objective depend on: how it is asked, and its files or the commit of the hub."""
        spec = self._judge.models[objective]
        device = resolve_device(self._params.decoding.device)
        how = [repr(spec), str(resolve_dtype(spec.dtype, device)), device.type]
        if spec.source == "path":
            folder, own = Path(spec.location), _trained_on(spec)
            return digest([*how, folder_identity(folder), own and model_digest(self._workspace.model(own))])
        with _loading(spec):
            return digest([*how, AutoConfig.from_pretrained(spec.location, revision=spec.revision)._commit_hash])

    def score(self, objective: str, rows: Sequence[Row]) -> list[float]:
        """The reward of every response, higher is better."""
        spec = self._judge.models[objective]
        model, tokenizer, own = _load(spec, self._params, self._workspace)
        control = ControlTokens.of(tokenizer, spec.template) if own is None else own.control
        order = sorted(range(len(rows)), key=lambda place: len(rows[place]["response"]))
        found = [0.0] * len(rows)
        size = self._judge.batch_size
        for start in tqdm(range(0, len(rows), size), desc=f"judge {objective}", unit="batch"):
            places = order[start : start + size]
            mine = [rows[place] for place in places]
            with torch.inference_mode():
                rewards = _as_trained(model, own, mine) if own else _rewards(model, tokenizer, control, spec, mine)
            for place, reward in zip(places, rewards, strict=True):
                found[place] = -reward if spec.lower_is_better else reward
        return found


def _trained_on(spec: Scoring) -> str | None:
    """The model that an adapter trained here is of, by its name in the configuration; None for whole models."""
    if spec.source != "path" or not (Path(spec.location) / "adapter_config.json").is_file():
        return None
    return str(PeftConfig.from_pretrained(spec.location).base_model_name_or_path)  # as stage tune writes it


@contextmanager
def _loading(spec: Scoring) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the reward model {spec.location} could not be loaded ({reason}): check the name.") from error


def _ids(spec: Scoring, tokenizer: Any, control: ControlTokens, row: Row) -> list[int]:
    """A row as the reward model reads it."""
    if spec.template is None:
        turns = [*turns_of(row["prompt"]), {"role": "assistant", "content": row["response"]}]
        return control.ids(fill_chat_template(tokenizer, turns, False, control))
    texts = {"{prompt}": control.escape(row["prompt"]), "{response}": control.escape(row["response"])}
    text = re.sub("|".join(texts), lambda name: texts[name[0]], spec.template)  # at once: texts may hold such names
    return control.ended(control.begun(control.ids(text)))


def _rewards(model: Any, tokenizer: Any, control: ControlTokens, spec: Scoring, rows: Sequence[Row]) -> list[float]:
    ids = [_ids(spec, tokenizer, control, row) for row in rows]
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    found: list[float] = model(**batch.to(model.device)).logits[:, 0].float().tolist()
    return found


def _as_trained(model: Any, prompter: Prompter, rows: Sequence[Row]) -> list[float]:
    """Rewards of what was trained here: at the last token, which is end-of-sequence only where the response ended."""
    texts = [
        prompter.prompt_ids(row["prompt"])
        + prompter.response_ids(row["prompt"], row["response"], row.get("finish") != "length")
        for row in rows
    ]
    ids_BT, mask_BT = left_pad(texts, prompter.eos, model.device)
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp_min(0)
    hidden_BTD = model.base_model(
        input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions_BT, use_cache=False
    ).last_hidden_state
    found: list[float] = model.score(hidden_BTD[:, -1])[:, 0].float().tolist()
    return found


def _load(spec: Scoring, params: Params, workspace: Workspace) -> tuple[Any, Any, Prompter | None]:
    """The classifier in eval mode on its device, its tokenizer, and if it was trained here how its base is asked.

    Raises:
        UserError: it cannot be had, or is no sequence classifier with one label.
    """
    device = resolve_device(params.decoding.device)
    where: dict[str, Any] = {"revision": spec.revision} if spec.source == "hub" else {"local_files_only": True}
    own = None
    with _loading(spec):
        tokenizer = AutoTokenizer.from_pretrained(spec.location, **where)
        if name := _trained_on(spec):
            model = merged_classifier(Path(spec.location), workspace.model(name))
            own = Source.of(params, workspace, name).prompter()
        else:
            config = AutoConfig.from_pretrained(spec.location, **where)
            kind = (config.architectures or ["a model without architecture"])[0]
            classifies = kind.endswith("ForSequenceClassification") and config.num_labels == 1
            if not (classifies or kind.endswith("ForScore")):
                raise UserError(
                    f"{spec.location} is {kind} with {config.num_labels} labels: use a sequence classifier with one "
                    "label, or a score model."
                )
            model, found = AutoModelForSequenceClassification.from_pretrained(
                spec.location, num_labels=1, use_safetensors=True, key_mapping=_SCORE_MODEL, output_loading_info=True,
                dtype=torch.float32, **where,
            )  # fmt: skip
            if found["missing_keys"]:
                raise UserError(f"{spec.location} lacks the weights {min(found['missing_keys'])}: use a whole model.")
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UserError(f"the reward model {spec.location} has no fast tokenizer: add its tokenizer.json.")
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(device=device, dtype=resolve_dtype(spec.dtype, device)).eval(), tokenizer, own
