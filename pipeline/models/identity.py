"""What a result depends on beside its request: the files of the models, and the law that rows are drawn from."""

from pathlib import Path

from pipeline.data.files import digest, file_digest

ORIGIN = "origin.json"  # beside the weights of a fetched model: where they came from, and the digest of its files
# Weights, configs and tokenizers in all their forms (merges.txt, tokenizer.model, tekken.json, …), chat templates.
_READ = {".safetensors", ".json", ".txt", ".model", ".tiktoken", ".jinja"}


def model_files(folder: Path) -> list[Path]:
    """Every file of a model's or adapter's folder that loading it or asking it may read, in order of their names."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix in _READ and path.name != ORIGIN)
    return sorted(path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def folder_identity(folder: Path) -> str:
    """Digest of a model's folder: names and contents of its files (32 hex digits)."""
    return digest([[path.relative_to(folder).as_posix(), file_digest(path)] for path in model_files(folder)])
