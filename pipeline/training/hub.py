"""ARMs to and from the Hugging Face Hub: one that is there already instead of training, one of ours for others.

python -m pipeline push positivity your-name/arm-positivity      # push; HF_TOKEN says who you are
make params ARGS="'objectives.positivity.pretrained={source: hub, location: your-name/arm-positivity}'"
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftModel
from transformers import PreTrainedModel

from pipeline.config.errors import UserError
from pipeline.config.schema import Model
from pipeline.config.workspace import Workspace
from pipeline.data.files import Row
from pipeline.models.fetch import fetch
from pipeline.models.loading import Source, load_model, resolve_device, resolve_dtype
from pipeline.models.prompting import Prompter
from pipeline.models.vocabulary import check_vocabulary
from pipeline.training.arm import ResponseModel
from pipeline.training.batches import tokenise
from pipeline.training.fit import Job, eval_loader, longest
from pipeline.training.held_out import HeldOut, evaluate

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


def push(folder: Path, repository: str, private: bool) -> str:
    """Upload an ARM's folder, its card included, in one commit; the address of the commit is returned.

    Raises:
        UserError: there is no such folder, or the Hub refuses.
    """
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} holds no ARM: train it with `dvc repro train`.")
    hub = HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        return str(hub.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=_FILES).commit_url)
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{repository} could not be written ({reason}): check the name, the network, and that HF_TOKEN may write."
        ) from error


def main(arguments: Sequence[str]) -> None:
    """Push the ARM of an objective."""
    parser = ArgumentParser("python -m pipeline push", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("objective", help="whose ARM is pushed: models/arms/<objective>")
    parser.add_argument("repository", help="owner/name")
    parser.add_argument("--private", action="store_true", help="where the repository does not exist yet")
    options = parser.parse_args(arguments)
    print(f"hub: {push(Workspace().arm(options.objective), options.repository, options.private)}")
