"""A reward model as judge: a sequence classifier with one label, of the hub, of a folder, or trained here.

Shapes: B rows.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from pipeline.config.errors import UserError
from pipeline.config.judges import RewardJudge, Scoring
from pipeline.data.chat import is_dialogue, turns_of
from pipeline.data.files import digest
from pipeline.data.responses import Response
from pipeline.data.row_store import RowStore
from pipeline.evaluation.judges.resources import Resources
from pipeline.models.architecture import text_config
from pipeline.models.control_tokens import ControlTokens, fill_chat_template
from pipeline.models.identity import folder_identity
from pipeline.models.loading import model_digest, resolve_device, resolve_dtype
from pipeline.models.prompting import Prompter, left_pad
from pipeline.models.reward_model import merged_classifier

_SCORE_MODEL = {r"^score_head\.": "score."}  # safe-rlhf's score models are classifiers under another name


@dataclass(frozen=True)
class Reward:
    """What a reward model says of a response."""

    value: float  # higher is better
    truncated: bool  # whether the text exceeded the model's context, so that it was read without its beginning


class RewardModels:
    """Rewards by one model per objective; made once for a run. What is scored is kept.

    Args:
        judge: the reward models.
        objectives: their names.
        resources: the models at hand, of which reward models may be adapters, and the stores, which keep rewards.

    Raises:
        UserError: an objective has no reward model, or the folder of one does not hold what it needs.
    """

    def __init__(self, judge: RewardJudge, objectives: Sequence[str], resources: Resources) -> None:
        self._judge, self._resources, self._path = judge, resources, resources.store / "rewards.jsonl"
        self._device = resolve_device(resources.device)
        for name in objectives:
            if name not in judge.models:
                raise UserError(f"judge.models has no reward model for {name}: add judge.models.{name}.")
            if judge.models[name].source == "path":
                _check_folder(name, Path(judge.models[name].location), resources)

    def of(self, rows: Mapping[str, Sequence[Response]]) -> dict[str, list[Reward]]:
        """The rewards of the rows of every objective; one model is in memory at a time, and each is loaded once.

        Raises:
            UserError: a model could not be loaded, or its template has no room for a prompt's turns.
            OSError: a reward could not be kept.
        """
        return {name: self._of(name, of_objective) for name, of_objective in rows.items()}

    def _of(self, name: str, rows: Sequence[Response]) -> list[Reward]:
        identity = self._identity(name)
        keys = [digest([identity, row.prompt, row.response, row.finish == "length"]) for row in rows]
        store = RowStore(self._path, keys)
        missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in store}
        if missing:
            taken = list(missing)
            for scored in self._score(name, list(missing.values())):
                store.add(
                    (taken[place], {"reward": reward.value, "truncated": reward.truncated}) for place, reward in scored
                )
        return [Reward(store[key]["reward"], store[key]["truncated"]) for key in keys]

    def _identity(self, name: str) -> str:
        """What rewards depend on beside the row: how the model is asked, and its files or the commit of the hub."""
        spec = self._judge.models[name]
        device = self._device
        how = ["whole or without its beginning", repr(spec), str(resolve_dtype(spec.dtype, device)), device.type]
        if spec.source == "path":
            folder, own = Path(spec.location), _trained_on(spec)
            return digest([*how, folder_identity(folder), own and model_digest(self._resources.source(own).folder)])
        with _loading(spec):
            config = AutoConfig.from_pretrained(spec.location, revision=spec.revision, trust_remote_code=False)
            return digest([*how, config._commit_hash])

    def _score(self, name: str, rows: Sequence[Response]) -> Iterator[list[tuple[int, Reward]]]:
        """Yield batches of (place of a row, reward), the shortest responses first."""
        spec = self._judge.models[name]
        model, tokenizer, own = _load(spec, self._resources)
        control = ControlTokens.of(tokenizer, spec.template) if own is None else own.control
        context = _context(model, tokenizer)
        order = sorted(range(len(rows)), key=lambda place: len(rows[place].response))
        size = self._judge.batch_size
        for start in tqdm(range(0, len(rows), size), desc=f"judge {name}", unit="batch"):
            places = order[start : start + size]
            of_batch = [rows[place] for place in places]
            if own is not None:
                texts = [_as_trained(own, row) for row in of_batch]
            else:
                texts = [_ids(spec, tokenizer, control, row) for row in of_batch]
            read = [_within(ids, context, control) for ids in texts]
            with torch.inference_mode():
                values = _last_rewards(model, own.eos, read) if own else _rewards(model, tokenizer, read)
            sign = -1 if spec.lower_is_better else 1
            yield [
                (place, Reward(sign * value, len(short) < len(whole)))
                for place, value, short, whole in zip(places, values, read, texts, strict=True)
            ]


def _check_folder(name: str, folder: Path, resources: Resources) -> None:
    if not folder.is_dir():
        raise UserError(f"judge.models.{name}: there is no folder {folder}: train it, or correct the path.")
    adapter = (folder / "adapter_config.json").is_file()
    if not adapter and not (folder / "config.json").is_file():
        raise UserError(f"judge.models.{name}: {folder} holds no model (no config.json): correct the path.")
    if not adapter:
        return
    if not (folder / "adapter_model.safetensors").is_file():  # PEFT would unpickle an adapter_model.bin
        raise UserError(
            f"judge.models.{name}: {folder} holds no adapter_model.safetensors: convert its weights to safetensors."
        )
    base = _adapted(folder)
    if not resources.has(base):
        raise UserError(
            f"judge.models.{name}: {folder} is an adapter of {base}, which is not among the models at hand: add it to "
            "models and fetch."
        )


def _adapted(folder: Path) -> str:
    """The model that an adapter is of, by its name in the configuration, as stage tune writes it."""
    return str(PeftConfig.from_pretrained(str(folder)).base_model_name_or_path)


def _trained_on(spec: Scoring) -> str | None:
    """The model that an adapter trained here is of; None for whole models."""
    if spec.source != "path" or not (Path(spec.location) / "adapter_config.json").is_file():
        return None
    return _adapted(Path(spec.location))


@contextmanager
def _loading(spec: Scoring) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the reward model {spec.location} could not be loaded ({reason}): check the name, "
            "and use a model without code of its own."
        ) from error


def _ids(spec: Scoring, tokenizer: Any, control: ControlTokens, row: Response) -> list[int]:
    """A row as the reward model reads it.

    Raises:
        UserError: the prompt has several turns, and the template has room for one.
    """
    if spec.template is None:
        turns = [*turns_of(row.prompt), {"role": "assistant", "content": row.response}]
        return control.ids(fill_chat_template(tokenizer, turns, False, control))
    if is_dialogue(row.prompt) and not spec.template.startswith("{prompt}"):
        raise UserError(
            f"judge.models: the template {spec.template!r} has room for one turn, and a prompt is a dialogue: set it "
            "to null, for the tokenizer's chat template, or to '{prompt} {response}', for the dialogue as it is."
        )
    texts = {"{prompt}": control.escape(row.prompt), "{response}": control.escape(row.response)}
    text = re.sub("|".join(texts), lambda name: texts[name[0]], spec.template)  # at once: texts may hold such names
    return control.ended(control.begun(control.ids(text)))


def _as_trained(prompter: Prompter, row: Response) -> list[int]:
    """A row as what was trained here reads it: its last token is end-of-sequence only where the response ended."""
    return prompter.prompt_ids(row.prompt) + prompter.response_ids(row.prompt, row.response, row.finish != "length")


def _context(model: Any, tokenizer: Any) -> int:
    """How many tokens a reward model reads at most, by its configuration and its tokenizer's."""
    positions = getattr(text_config(model.config), "max_position_embeddings", None)
    return min(int(positions or tokenizer.model_max_length), int(tokenizer.model_max_length))


def _within(ids: list[int], context: int, control: ControlTokens) -> list[int]:
    """Token ids that fit the context: what is left out is what follows the tokens that begin a text.

    The reward is read at the end, and the response stands there.
    """
    if len(ids) <= context:
        return ids
    begin = control.around[0] if ids[: len(control.around[0])] == control.around[0] else []
    return [*begin, *ids[len(ids) - context + len(begin) :]]


def _rewards(model: Any, tokenizer: Any, ids: Sequence[list[int]]) -> list[float]:
    batch = tokenizer.pad({"input_ids": list(ids)}, return_tensors="pt")
    rewards: list[float] = model(**batch.to(model.device)).logits[:, 0].float().tolist()
    return rewards


def _last_rewards(model: Any, pad: int, ids: Sequence[list[int]]) -> list[float]:
    """Rewards at the last token of each text, whichever it is."""
    ids_BT, mask_BT = left_pad(ids, pad, model.device)
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp_min(0)
    hidden_BTD = model.base_model(
        input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions_BT, use_cache=False
    ).last_hidden_state
    rewards: list[float] = model.score(hidden_BTD[:, -1])[:, 0].float().tolist()
    return rewards


def _load(spec: Scoring, resources: Resources) -> tuple[Any, Any, Prompter | None]:
    """The classifier in eval mode on its device, its tokenizer, and if it was trained here how its base is asked.

    Raises:
        UserError: it cannot be had, or is no sequence classifier with one label.
    """
    device = resolve_device(resources.device)
    where: dict[str, Any] = {"revision": spec.revision} if spec.source == "hub" else {"local_files_only": True}
    own = None
    with _loading(spec):
        tokenizer = AutoTokenizer.from_pretrained(spec.location, **where, trust_remote_code=False)
        if name := _trained_on(spec):
            model = merged_classifier(Path(spec.location), resources.source(name).folder)
            own = resources.source(name).prompter()
        else:
            config = AutoConfig.from_pretrained(spec.location, **where, trust_remote_code=False)
            kind = (config.architectures or ["a model without architecture"])[0]
            classifies = kind.endswith("ForSequenceClassification") and config.num_labels == 1
            if not (classifies or kind.endswith("ForScore")):
                raise UserError(
                    f"{spec.location} is {kind} with {config.num_labels} labels: use a sequence classifier with one "
                    "label, or a score model."
                )
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                spec.location, num_labels=1, use_safetensors=True, key_mapping=_SCORE_MODEL, output_loading_info=True,
                dtype=torch.float32, **where, trust_remote_code=False,
            )  # fmt: skip
            if loading["missing_keys"]:
                raise UserError(f"{spec.location} lacks the weights {min(loading['missing_keys'])}: use a whole model.")
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UserError(f"the reward model {spec.location} has no fast tokenizer: add its tokenizer.json.")
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(device=device, dtype=resolve_dtype(spec.dtype, device)).eval(), tokenizer, own
