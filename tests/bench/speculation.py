"""What speculative guidance gains: how often drafts are right, and tokens per second with and without them.

    make params ARGS="arm.base=smollm2-10l" && dvc repro train && python -m tests.bench.speculation     # ten minutes

Writes below results/bench: acceptance.csv (how often the guided law draws what was drafted, by the way both are drawn
and by what drafts are made from) and speculation.csv (tokens per second under one ARM at α = 1, on the base itself and
on a heavier one; repetitions of all lengths are interleaved, so that what else the machine does falls on all). Prompts
are those of validation.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.config.load import load_params
from pipeline.config.points import REFERENCE
from pipeline.config.workspace import Workspace
from pipeline.data.files import replacing
from pipeline.data.preferences import read_prompts
from pipeline.decoding.backbone import Backbone
from pipeline.decoding.decoder import GuidedDecoder, Request
from pipeline.decoding.guidance import draw, guided_logps
from pipeline.decoding.speculation import DraftLength, likely_draw, stand_in
from pipeline.decoding.trace import GUIDED, Trace
from pipeline.generation.model_set import ModelSet
from pipeline.models.prompting import left_pad

OUT, TOKENS, LENGTHS, DRAWS = Path("results/bench"), 48, (1, 2, 3), 4
ALPHAS, FORMS = (0.25, 0.5, 1.0, 2.0), ("plain", "log_ratio")
MODEL, ARMS, BARE = "the model of the ARMs", "the ARMs", "no ARM"


def acceptance(draft_TV: Tensor, guided_TV: Tensor) -> dict[str, Tensor]:
    """Whether a drafted token is kept, by the way both are drawn: shares at positions, or of a few draws there.

    `rejection` is the best that any way reaches (arXiv 2211.17192); `gumbel` adds the same noise to both laws and takes
    the largest; `inverse` inverts both cumulative distributions at one number; `likely`, which the decoder does, drafts
    what the number most likely draws from the guided law.
    """
    generator = torch.Generator().manual_seed(0)
    same: dict[str, list[Tensor]] = {"gumbel": [], "inverse": [], "likely": []}
    for _ in range(DRAWS):
        noise_TV = -torch.empty_like(draft_TV).exponential_(generator=generator).log_()
        same["gumbel"].append((draft_TV + noise_TV).argmax(-1) == (guided_TV + noise_TV).argmax(-1))
        uniforms_T = torch.rand(len(draft_TV), generator=generator, dtype=torch.float64)
        token_T = draw(guided_TV, uniforms_T)
        same["inverse"].append(draw(draft_TV, uniforms_T) == token_T)
        same["likely"].append(likely_draw(draft_TV, uniforms_T) == token_T)
    kept = {way: torch.stack(draws).float().mean(0) for way, draws in same.items()}
    return {"rejection": torch.minimum(draft_TV, guided_TV).exp_().sum(-1), **kept}


def drafts(trace: Trace) -> dict[str, Tensor]:
    """What may be drafted from, by what stands in for the base: draft_TV each."""
    length, size = trace.logps[GUIDED].shape
    every, ones, weights = torch.arange(length), torch.ones(length), trace.request.weights
    weighed = {name: (every, ones * weights[name], trace.logps[name]) for name in trace.arms}
    alone = {name: one for name, one in weighed.items() if name != REFERENCE}
    return {
        MODEL: guided_logps(stand_in(weighed, length, size), weighed.values(), ones),
        ARMS: guided_logps(stand_in(alone, length, size), weighed.values(), ones),
        BARE: trace.logps[REFERENCE],
    }


def acceptances(decoder: GuidedDecoder, prompts: list[str], arms: list[str]) -> Iterator[dict]:
    """A line for each point and draft: acceptance by the way to draw, and tokens per forward of the base as decoded."""
    points = [(tuple(used), form, alpha) for used in (arms[:1], arms) for form in FORMS for alpha in ALPHAS]
    for used, form, alpha in tqdm(dict.fromkeys(points), desc="acceptance"):
        weights = {arm: alpha / len(used) for arm in used} | {REFERENCE: -alpha if form == "log_ratio" else 0.0}
        asked = [Request(prompt, weights, max_new_tokens=TOKENS) for prompt in prompts]
        decoder._draft_length, seen = DraftLength(0), {}
        rows = dict(decoder.generate(asked))
        traces = [decoder.trace(request, rows[index].tokens) for index, request in enumerate(asked)]
        for length in (*LENGTHS, 4):
            decoder._draft_length = DraftLength(length)
            made = [row for _, row in decoder.generate(asked)]
            tokens = sum(len(row.tokens) for row in made)
            seen[f"per_forward_{length}"] = round(tokens / (tokens - sum(row.accepted or 0 for row in made)), 2)
        kept = [
            {name: acceptance(draft, trace.logps[GUIDED]) for name, draft in drafts(trace).items()} for trace in traces
        ]
        for name in (MODEL, ARMS, BARE):
            ways = {way: round(float(torch.cat([one[name][way] for one in kept]).mean()), 3) for way in kept[0][name]}
            line = {"arms": len(used), "form": form, "alpha": alpha, "drafts_from": name, **ways}
            yield line | (seen if name == MODEL else {})


def heavier(model: PreTrainedModel, times: int) -> PreTrainedModel:
    """The same law by a model of `times` as many layers: those that are added add nothing to what they are given."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers *= times
    heavy = AutoModelForCausalLM.from_config(config, dtype=model.dtype).to(model.device).eval()
    added = heavy.load_state_dict(model.state_dict(), strict=False).missing_keys
    for name, weight in heavy.named_parameters():
        if name in added and name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(weight.data)
    heavy.tie_weights()
    return heavy


def speeds(
    decoder: GuidedDecoder, base: str, prompts: list[str], arm: str, repetitions: int, batches: list[int]
) -> Iterator[dict]:
    """Tokens per second of plain guidance, of every length, of the length that chooses itself, and unguided."""
    own = decoder._backbones[0]
    for backbone in decoder._backbones:
        backbone.ends = frozenset()  # else the work of two repetitions differs
    learning = DraftLength()

    def guided(length: DraftLength, count: int, seed: int, alpha: float) -> int:
        decoder._draft_length = length
        asked = [Request(prompt, {arm: alpha}, max_new_tokens=TOKENS, seed=seed) for prompt in prompts[:count]]
        return sum(len(row.tokens) for _, row in decoder.generate(asked))

    def generate(count: int, seed: int) -> int:
        ids, mask = left_pad([own.prompter.prompt_ids(one) for one in prompts[:count]], own.prompter.eos, own.device)
        out = own.adapted.model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, min_new_tokens=TOKENS, max_new_tokens=TOKENS
        )
        return (out.shape[1] - ids.shape[1]) * count

    runs: dict[str, Callable[[int, int], int]] = {
        "generate, unguided": generate,
        "unguided": lambda count, seed: guided(DraftLength(0), count, seed, 0.0),
        **{
            f"guided, {length} drafted": lambda count, seed, length=length: guided(
                DraftLength(length), count, seed, 1.0
            )
            for length in (0, *LENGTHS)
        },
        "guided, as many as pay": lambda count, seed: guided(learning, count, seed, 1.0),
    }
    for count in batches:
        measured: dict[str, list[float]] = {name: [] for name in runs}
        for repetition in tqdm(range(repetitions + 2), desc=f"{base}, batch {count}"):
            for name, run in runs.items():
                started = time.perf_counter()
                tokens = run(count, repetition)
                if repetition > 1:  # the first warms up, and tells what pays
                    measured[name].append(tokens / (time.perf_counter() - started))
        for name, values in measured.items():
            over = [one / plain for one, plain in zip(values, measured["guided, 0 drafted"], strict=True)]
            bare = [one / plain for one, plain in zip(values, measured["unguided"], strict=True)]
            yield {
                "base": base, "batch": count, "run": name, "tokens_per_s": round(statistics.median(values), 1),
                "over_plain": round(statistics.median(over), 3), "low": round(min(over), 3),
                "high": round(max(over), 3), "over_unguided": round(statistics.median(bare), 3),
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=12, help="that acceptance is measured on")
    parser.add_argument("--times", type=int, default=6, help="layers of the heavier base over those of the base")
    parser.add_argument("--only", choices=("acceptance", "speculation"))
    options = parser.parse_args()
    params, workspace = load_params(), Workspace()
    rows = read_prompts(params.data, params.seed)
    prompts = [row["prompt"] for row in rows if row["split"] == "validation"]
    arms = [name for name in params.objectives if workspace.arm(name).is_dir()]
    decoder = ModelSet(params, workspace, params.base, {*arms, REFERENCE}).decoder(params.decoding.device, 64, TOKENS)
    base, beside = decoder._backbones
    repetitions = options.repetitions

    def all_speeds() -> Iterator[dict]:
        yield from speeds(decoder, params.base, prompts, arms[0], repetitions, [1, 4, 8])
        heavy = GuidedDecoder(Backbone(heavier(base.adapted.model, options.times), base.prompter), beside)
        named, fewer = f"{params.base}, {options.times} times its layers", max(2, repetitions // 2)
        yield from speeds(heavy, named, prompts, arms[0], fewer, [1, 8])

    tables = {"acceptance": lambda: acceptances(decoder, prompts[: options.prompts], arms), "speculation": all_speeds}
    for name, lines in tables.items():
        if options.only in (None, name):
            table = pd.DataFrame(list(lines()))
            with replacing(OUT / f"{name}.csv") as stream:
                table.to_csv(stream, index=False)
            print(table.to_string(index=False))


if __name__ == "__main__":
    main()
