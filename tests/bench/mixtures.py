"""What a mix of several objectives costs: an ARM for each, and one ARM for all mixes.

    python -m tests.bench.mixtures            # needs models/ from `dvc repro`; a quarter of an hour on two cores

Writes results/bench/mixtures.csv: time per token over that of the unguided base in the same decoder, repetitions of all
interleaved. The adapters are random, of the default shape: speed does not depend on their values.
"""

import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
from safetensors.torch import load_file, save_file

from pipeline.data.files import replacing
from pipeline.decoding.backbone import Backbone
from pipeline.decoding.decoder import GuidedDecoder, Request
from pipeline.models.loading import load_model, resolve_dtype
from pipeline.models.mixtures import HEADER
from pipeline.models.prompting import Prompter
from tests.bench.decoding import BASE, DEVICE, OUT, PROMPTS, SPEC, TOKENS, adapters, interleaved, line

OBJECTIVES, BATCHES, REPETITIONS = (2, 3, 5), (1, 8, 32), 3


def marked(folders: list[Path], home: Path) -> list[Path]:
    """Copies that say they are of one mixture."""
    for folder in folders:
        shutil.copytree(folder, home / folder.name)
        tensors = load_file(folder / "adapter_model.safetensors")
        header = {"format": "pt", HEADER: "bench"}
        save_file(tensors, home / folder.name / "adapter_model.safetensors", metadata=header)
    return [home / folder.name for folder in folders]


def main() -> None:
    dtype = resolve_dtype(SPEC.dtype, DEVICE)
    model, prompter = load_model(BASE, dtype, DEVICE), Prompter.load(BASE, SPEC.template)
    with tempfile.TemporaryDirectory() as scratch:
        folders = adapters(Path(scratch), max(OBJECTIVES))
        kinds = {"separate": folders, "for all mixes": marked(folders, Path(scratch) / "mixture")}
        decoders = {}
        for kind, own in kinds.items():
            decoders[kind] = GuidedDecoder(Backbone(model, prompter, {folder.name: folder for folder in own}))
            for backbone in decoders[kind]._backbones:
                backbone.ends = frozenset()  # rows that end early would make the work of two repetitions differ
    names, seeds = [folder.name for folder in folders], iter(range(1 << 30))

    def decode(kind: str, objectives: int, batch: int) -> int:
        # Unequal weights: rows of a batch have mixes of their own, as requests of a server do.
        seed, own = next(seeds), names[:objectives]
        requests = [
            Request(
                prompt,
                {name: (place + row) / sum(range(row + 1, row + 1 + objectives)) for place, name in enumerate(own, 1)},
                max_new_tokens=TOKENS, seed=seed,
            )
            for row, prompt in enumerate(PROMPTS[:batch])
        ]  # fmt: skip
        return sum(len(generation.tokens) for _, generation in decoders[kind].generate(requests))

    rows = []
    for batch in BATCHES:
        runs: dict[tuple, Callable[[], int]] = {("unguided", 0): partial(decode, "separate", 0, batch)}
        runs |= {(kind, count): partial(decode, kind, count, batch) for count in OBJECTIVES for kind in kinds}
        seconds = interleaved(runs, REPETITIONS, f"batch {batch}")
        floor = seconds["unguided", 0]
        for (kind, count), spent in seconds.items():
            measured = line(kind, count, batch, str(dtype).removeprefix("torch."), spent, floor, None)
            rows.append({"arms": measured.pop("method"), "objectives": measured.pop("k"), **measured})
    with replacing(OUT / "mixtures.csv") as stream:
        pd.DataFrame(rows).drop(columns="peak_mb").to_csv(stream, index=False)


if __name__ == "__main__":
    main()
