"""ARMs to and from the Hugging Face Hub: one that is there already instead of training, one of ours for others."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from peft import PeftModel
from transformers import PreTrainedModel

from pipeline.config.errors import UserError
from pipeline.config.schema import Model
from pipeline.data.files import Row, replacing_folder
from pipeline.models.fetch import fetch
from pipeline.models.loading import Source, load_model, resolve_device, resolve_dtype
from pipeline.models.prompting import Prompter
from pipeline.models.vocabulary import check_vocabulary
from pipeline.training.arm import ResponseModel
from pipeline.training.batches import tokenise
from pipeline.training.fit import Job, eval_loader, longest
from pipeline.training.held_out import HeldOut, evaluate

_USE = """
## Use it

Token rewards for any base with this tokenizer, by [GenARM](https://arxiv.org/abs/2410.08193)'s decoding rule:

```python
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import GuidanceLogitsProcessor

base, arm = Path(snapshot_download("{base}")), Path(snapshot_download("{repository}"))
model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
guidance = GuidanceLogitsProcessor.load(model, base, {arms}, {weights})
chat = [{{"role": "user", "content": "Describe a rainy Monday morning."}}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
tokens = model.generate(**inputs, do_sample=True, max_new_tokens=48, logits_processor=[guidance])
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
```
"""
_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt", "README.md"]


def adopt(job: Job, spec: Model, rows: Sequence[Row], folder: Path) -> HeldOut:
    """Fetch an ARM into `folder` and measure it on test pairs, as if it had been trained here.

    Raises:
        UserError: it cannot be fetched or loaded, or reads other tokens than the model that `arm.base` names.
    """
    fetch(job.name, spec, folder)
    device = resolve_device(job.trainer.accelerator)
    dtype = resolve_dtype(spec.dtype, device)
    prompter = job.source.prompter()
    model = load_arm(folder, job.source, job.start, device, spec)
    arm = ResponseModel(model.requires_grad_(False).eval(), dtype)
    pairs = [row for row in rows if row["split"] == "test"]
    groups = tokenise(pairs, prompter, longest(arm.causal.config, job.trainer), f"{job.name}, test").groups
    size = job.trainer.micro_batch_size or job.trainer.batch_size
    loader = eval_loader(groups, size, prompter.eos)
    return evaluate(arm, job.loss, loader, device, job.bootstrap)


def load_arm(
    folder: Path, start: Source, name: str, device: torch.device, spec: Model | None = None
) -> PeftModel | PreTrainedModel:
    """An ARM of a folder: an adapter on the model it was made from, or a model of its own.

    Args:
        folder: the ARM's.
        start: what it was made from.
        name: of that.
        device: where it goes.
        spec: where the ARM came from, how it is loaded if it is a whole model; None: as `start`.

    Raises:
        UserError: it cannot be loaded, or reads other tokens than `start`.
    """
    where = str(folder) if spec is None else spec.location
    if (folder / "adapter_config.json").is_file():
        try:
            return PeftModel.from_pretrained(start.load(device), str(folder))
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{where} is no adapter of {name} ({reason}): set arm.base to its base.") from error
    how: Model | Source = spec or start
    model = load_model(folder, resolve_dtype(how.dtype, device), device, how.quantisation, how.device_map)
    check_vocabulary(start.prompter().tokenizer, Prompter.load(folder, "{prompt}").tokenizer, where)
    return model


def release(arms: Mapping[str, Path], repository: str, base: str, out: Path) -> list[Path]:
    """Write ARMs as others fetch them: their files, the base by its name on the Hub, a card with code that runs.

    Several are in a folder each, such as those of one ARM for all mixes.

    Args:
        arms: the folder of each, as training wrote it, by its objective.
        repository: owner/name that they will have.
        base: owner/name of the model they were made from.
        out: the folder that is written, whole or not at all.

    Returns:
        The files in it.

    Raises:
        UserError: an ARM is missing, or a name is not one of the Hub.
    """
    for folder in arms.values():
        if not any(folder.glob("*.safetensors")):
            raise UserError(f"{folder} holds no ARM: train it with `dvc repro train`.")
    for name in (repository, base):
        try:
            validate_repo_id(name)
            _owner, _name = name.split("/")  # the Hub also has models without an owner
        except ValueError as error:
            raise UserError(f"{name} is not a name on the Hub: write owner/name.") from error
    with replacing_folder(out) as unfinished:
        places = {name: unfinished / name if len(arms) > 1 else unfinished for name in arms}
        cards = [_release(folder, base, places[name]) for name, folder in arms.items()]
        folders = ", ".join(f'"{name}": ' + (f'arm / "{name}"' if len(arms) > 1 else "arm") for name in arms)
        weights = json.dumps(dict.fromkeys(arms, round(1 / len(arms), 2)))
        use = _USE.format(base=base, repository=repository, arms=f"{{{folders}}}", weights=weights)
        (unfinished / "README.md").write_text(cards[0].rstrip() + "\n" + use, encoding="utf-8")
    return sorted(path for path in out.rglob("*") if path.is_file())


def _release(folder: Path, base: str, out: Path) -> str:
    """Copy the files of one ARM and name its base; its card."""
    out.mkdir(exist_ok=True)
    for file in filter_repo_objects(sorted(folder.iterdir()), allow_patterns=_FILES, key=lambda file: file.name):
        shutil.copyfile(file, out / file.name)
    for name, key in (("adapter_config.json", "base_model_name_or_path"), ("config.json", "_name_or_path")):
        if (out / name).is_file():
            config = json.loads((out / name).read_text(encoding="utf-8"))
            (out / name).write_text(json.dumps(config | {key: base}, indent=2) + "\n", encoding="utf-8")
    card = out / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else f"---\nbase_model: {base}\n---\n# {folder.name}\n"
    text = re.sub(r"^base_model: .*$", f"base_model: {base}", text, count=1, flags=re.MULTILINE)
    card.write_text(text, encoding="utf-8")
    return text


def push(folder: Path, repository: str, private: bool) -> str:
    """Upload the folder of a released ARM in one commit; the address of the commit is returned.

    Raises:
        UserError: the Hub refuses.
    """
    hub = HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        return str(hub.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=_FILES).commit_url)
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{repository} could not be written ({reason}): check the name, the network, and that HF_TOKEN may write."
        ) from error
