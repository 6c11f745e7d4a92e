"""What guidance across tokenizers costs, per token of the base, beside guidance inside one vocabulary.

    python -m tests.bench.crosstoken     # after `dvc repro` of experiment=cross_family; results/bench/crosstoken.csv

Four decoders in turn, three times over: Gemma alone and guided by the positivity ARM of SmolLM2 and its reference
(across), SmolLM2 alone and guided by the same two as a model of their own (inside). `over` is the time per token
across, over what it would be inside: that of Gemma alone and what the two lanes add to SmolLM2. `left_out` is the
base's mass per token that no ARM was asked about.

`departing` is what the sums along the canonical spelling leave out: at the tokens of Gemma's own texts that SmolLM2
spells with several, the mean distance of log P_arm − log P_ref from its exact value.
"""

import time
import warnings
from pathlib import Path
from statistics import median

import pandas as pd
import torch

from pipeline.config.load import load_params
from pipeline.decoding.backbone import Backbone, SideBackbone
from pipeline.decoding.decoder import GuidedDecoder, Request
from pipeline.decoding.guidance import normalised
from pipeline.models.loading import Source
from tests.exact import ByteModel

TOKENS, REPETITIONS, BATCHES = 24, 3, (1, 8, 32)
MODELS = Path("models")
WEIGHTS = {"positivity": 1.0, "reference": -1.0}


def departing(decoder: GuidedDecoder, arm: Backbone, texts: int = 24) -> tuple[float, int]:
    """Mean |Δ (log P_arm − log P_ref)| in nats, and over how many tokens."""
    bridge = decoder._bridge
    spelling, table = bridge.arm, bridge.table
    asked = [
        Request(f"What is good about number {number}?", seed=number, max_new_tokens=TOKENS) for number in range(texts)
    ]
    gaps = []
    for index, row in decoder.generate(asked):
        prompt = arm.prompter.prompt_ids(asked[index].prompt)
        laws: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}

        def law(lane: str, tokens: tuple[int, ...], laws=laws, prompt=prompt) -> torch.Tensor:
            if (lane, tokens) not in laws:
                arm.adapted.serve([(lane, 0, 1)], step=False)
                with torch.inference_mode():
                    ids = torch.tensor([[*prompt, *tokens]])
                    laws[lane, tokens] = normalised(arm.adapted.model(input_ids=ids).logits[0, -1].double())
            return laws[lane, tokens]

        for place, token in enumerate(row.tokens):
            piece, path = bridge.pieces[token], ()
            if piece and table.same[token] < 0:
                before = spelling.spell(bridge.base.joined(tuple(row.tokens[:place])))
                path = spelling.spell(piece)
            if not path:
                continue
            ratios = []
            for exact in (True, False):
                each = []
                for lane in ("positivity", "reference"):
                    behind = lambda more, lane=lane, before=before: law(lane, (*before, *more))  # noqa: E731
                    parts, left, so_far = [], piece, torch.zeros((), dtype=torch.float64)
                    for at, step in enumerate(path):
                        parts.append(so_far + behind(path[:at])[spelling.covering(left)].logsumexp(0))
                        so_far, left = so_far + behind(path[:at])[step], left[len(spelling.pieces[step]) :]
                    along = torch.stack(parts).logsumexp(0)
                    each.append(ByteModel(behind, spelling, arm.prompter.eos).begins(piece) if exact else along)
                ratios.append(float(each[0] - each[1]))
            gaps.append(abs(ratios[0] - ratios[1]))
    return sum(gaps) / len(gaps), len(gaps)


def main() -> None:
    """Measure, print, write the table."""
    warnings.filterwarnings("ignore", message=".*another tokenizer")
    template = load_params().models["gemma3-270m"].template
    large, small = Source(MODELS / "gemma3-270m", template), Source(MODELS / "smollm2-135m")
    device = torch.device("cpu")
    arm = SideBackbone(small, {"positivity": MODELS / "arms/positivity"}, "reference").load(device)
    decoders = {
        name: GuidedDecoder(Backbone(source.load(device), source.prompter()), arm, batch_size=max(BATCHES))
        for name, source in {"gemma": large, "smollm2": small}.items()
    }
    spent: dict[tuple[str, bool, int], list[float]] = {}
    left = 0.0
    for _ in range(REPETITIONS):
        for batch in BATCHES:
            for name, decoder in decoders.items():
                for guided in (False, True):
                    asked = [
                        Request(f"Describe a rainy Monday morning, number {number}.", WEIGHTS if guided else {}, seed=7,
                                max_new_tokens=TOKENS)
                        for number in range(batch)
                    ]  # fmt: skip
                    started = time.perf_counter()
                    rows = [row for _, row in decoder.generate(asked)]
                    tokens = sum(len(row.tokens) for row in rows)
                    spent.setdefault((name, guided, batch), []).append((time.perf_counter() - started) / tokens)
                    if name == "gemma" and guided and batch == max(BATCHES):
                        left = sum(row.left_out for row in rows) / tokens
    lines = []
    for batch in BATCHES:
        each = [spent[name, guided, batch] for name in decoders for guided in (False, True)]
        ratios = [across / (alone + inside - own) for alone, across, own, inside in zip(*each, strict=True)]
        milliseconds = [round(1000 * median(one), 1) for one in each]
        lines.append((batch, *milliseconds, *(round(value, 2) for value in (median(ratios), min(ratios), max(ratios)))))
    columns = ["batch", "gemma_ms", "across_ms", "smollm2_ms", "inside_ms", "over", "low", "high"]
    apart, count = departing(decoders["gemma"], arm)
    print(f"departing: {apart:.4f} nats on average over {count} tokens")
    table = pd.DataFrame(lines, columns=columns).assign(left_out=round(left, 3), departing=round(apart, 4))
    print(table.to_string(index=False))
    table.to_csv("results/bench/crosstoken.csv", index=False)


if __name__ == "__main__":
    main()
