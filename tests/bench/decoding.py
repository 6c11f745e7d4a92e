"""What guided decoding costs beside the unguided base: `make bench`.

    python -m tests.bench.decoding            # needs models/ from `dvc repro`; some 40 minutes on two cores
    python -m tests.bench.decoding --quick    # one repetition, batch 1, k = 2: does it still run?

Writes below results/bench: decoding.csv (speed and memory), sweep.csv (the default sweep at once and point by point),
precision.csv (what bfloat16 does to the guided law) and machine.json. Every method generates the same prompts and
exactly TOKENS new tokens per row; repetitions of all methods are interleaved, so that what else the machine does falls
on all of them alike. In decoding.csv the ARMs are random adapters of the default shape: speed does not depend on their
values.

    unguided     `model.generate` of transformers on the base alone: the floor
    naive        `model.generate` with a plain logits processor: 1 + k models, 1 + k forwards per token
    processor    `model.generate` with `GuidanceLogitsProcessor`: base and ARMs are two forwards
    ours         `GuidedDecoder`: base and ARMs are one forward
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from tqdm import tqdm
from transformers import DynamicCache, LogitsProcessor, PreTrainedModel

from pipeline.config.load import load_params
from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.data.files import replacing, write_json
from pipeline.data.preferences import read_prompts
from pipeline.decoding import batch as batch_step
from pipeline.decoding.backbone import Backbone
from pipeline.decoding.decoder import GuidedDecoder, Request
from pipeline.decoding.guidance import kl_divergence
from pipeline.decoding.logits_processor import GuidanceLogitsProcessor
from pipeline.generation.rows import point_requests
from pipeline.models.loading import Source, load_model, resolve_device, resolve_dtype
from pipeline.models.prompting import Prompter, left_pad

TOKENS, REPETITIONS, PEAK_K = 24, 3, 2
METHODS = ("unguided", "naive", "processor", "ours")
PARAMS: Params = load_params()
BASE, OUT = Workspace().model(PARAMS.base), Path("results/bench")
SPEC = PARAMS.models[PARAMS.base]
DEVICE = resolve_device(PARAMS.decoding.device)
PROMPTS = [row["prompt"] for row in read_prompts(PARAMS.data, PARAMS.seed) if row["split"] == "test"]


class Naive(LogitsProcessor):
    """The ARMs as models of their own, one forward each; what a user would write first."""

    def __init__(self, arms: list[PreTrainedModel], alpha: float, mask_BT: torch.Tensor) -> None:
        self.arms, self.alpha, self.mask_BT = arms, alpha, mask_BT
        self.caches = [DynamicCache(config=arm.config) for arm in arms]

    def __call__(self, input_ids, scores):
        fresh = self.caches[0].get_seq_length() == 0
        if not fresh:
            self.mask_BT = torch.cat([self.mask_BT, self.mask_BT.new_ones(len(input_ids), 1)], dim=1)
        given = input_ids if fresh else input_ids[:, -1:]
        position = (self.mask_BT.cumsum(-1) - 1).clamp_min(0)[:, -given.shape[1] :]
        total = scores.log_softmax(-1)
        for arm, cache in zip(self.arms, self.caches, strict=True):
            out = arm(
                given, attention_mask=self.mask_BT, position_ids=position, past_key_values=cache, logits_to_keep=1
            )
            total += self.alpha * out.logits[:, -1].float().log_softmax(-1)
        return total


class Bench:
    """One precision: the base, k adapters of it, and each method as a function of (k, prompts)."""

    def __init__(self, dtype: torch.dtype, folders: list[Path], methods: tuple[str, ...] = METHODS) -> None:
        self.prompter = Prompter.load(BASE, SPEC.template)
        self.model = load_model(BASE, dtype, DEVICE)
        adapters = {folder.name: folder for folder in folders}
        if "naive" in methods:
            self.merged = [
                PeftModel.from_pretrained(load_model(BASE, dtype, DEVICE), str(folder)).merge_and_unload().eval()
                for folder in folders
            ]
        if "processor" in methods:
            self.arms = Backbone(self.model, self.prompter, adapters, name=None)
        if "ours" in methods:
            # Rows that end early would make the work of two repetitions differ.
            self.decoder = GuidedDecoder(Backbone(self.model, self.prompter, adapters), batch_size=64)
            for backbone in self.decoder._backbones:
                backbone.ends = frozenset()
        self.names, self.seed = list(adapters), 0

    def generate(self, prompts: list[str], processor: Callable[..., list[LogitsProcessor]]) -> int:
        ids, mask = left_pad([self.prompter.prompt_ids(prompt) for prompt in prompts], self.prompter.eos, DEVICE)
        out = self.model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, min_new_tokens=TOKENS, max_new_tokens=TOKENS,
            logits_processor=processor(mask),
        )  # fmt: skip
        return (out.shape[1] - ids.shape[1]) * len(prompts)

    def unguided(self, k: int, prompts: list[str]) -> int:
        return self.generate(prompts, lambda _: [])

    def naive(self, k: int, prompts: list[str]) -> int:
        return self.generate(prompts, lambda mask: [Naive(self.merged[:k], 1 / k, mask)])

    def processor(self, k: int, prompts: list[str]) -> int:
        weights = dict.fromkeys(self.names[:k], 1 / k)
        return self.generate(prompts, lambda _: [GuidanceLogitsProcessor(self.prompter, weights, self.arms)])

    def ours(self, k: int, prompts: list[str]) -> int:
        self.seed += 1
        weights = dict.fromkeys(self.names[:k], 1 / max(k, 1))
        requests = [Request(prompt, weights, max_new_tokens=TOKENS, seed=self.seed) for prompt in prompts]
        return sum(len(generation.tokens) for _, generation in self.decoder.generate(requests))


def adapters(folder: Path, count: int) -> list[Path]:
    """Random adapters of the default shape."""
    arm, made = PARAMS.arm, []
    for number in range(count):
        torch.manual_seed(number)
        targets = arm.targets if arm.targets == "all-linear" else arm.targets.split(",")
        config = LoraConfig(r=arm.rank, lora_alpha=arm.lora_alpha, target_modules=targets, task_type="CAUSAL_LM")
        model = get_peft_model(load_model(BASE, torch.float32, DEVICE), config)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.01)
        made.append(folder / f"arm{number}")
        model.save_pretrained(str(made[-1]))
    return made


def interleaved(
    runs: dict[tuple, Callable[[], int]], repetitions: int, title: str, warm_up: bool = True
) -> dict[tuple, list[float]]:
    """Seconds per token of every run, repetition by repetition; a warm-up before them is not counted."""
    seconds: dict[tuple, list[float]] = {key: [] for key in runs}
    for repetition in tqdm(range(not warm_up, repetitions + 1), desc=title, leave=False):
        for key, run in runs.items():
            started = time.perf_counter()
            tokens = run()
            if repetition:
                seconds[key].append((time.perf_counter() - started) / tokens)
    return seconds


def line(method: str, k: int, batch: int, dtype: str, own: list[float], floor: list[float], peak: float | None) -> dict:
    """One row of the table: medians; `ratio_to_unguided` is time per token over the floor's, pair by pair."""
    ratios = [mine / base for mine, base in zip(own, floor, strict=True)]
    return {
        "method": method, "k": k, "batch": batch, "dtype": dtype,
        "tokens_per_s": round(1 / statistics.median(own), 1),
        "ratio_to_unguided": round(statistics.median(ratios), 3),
        "peak_mb": peak, "low": round(min(ratios), 3), "high": round(max(ratios), 3),
    }  # fmt: skip


def peak_mb(method: str, k: int, batch: int, dtype: str, folder: Path) -> float:
    """Peak memory of a process that does this and nothing else (resident set; on CUDA what torch allocated)."""
    command = [sys.executable, "-m", "tests.bench.decoding", "--peak", method, str(k), str(batch), dtype, str(folder)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def measure_peak(method: str, k: int, batch: int, dtype: str, folder: str) -> None:
    names = [Path(folder) / f"arm{number}" for number in range(int(k))]
    bench = Bench(getattr(torch, dtype), names, (method,))
    getattr(bench, method)(int(k), PROMPTS[: int(batch)])
    if DEVICE.type == "cuda":
        print(torch.cuda.max_memory_allocated() / 1e6)
        return
    status = Path("/proc/self/status").read_text()
    print(next(int(text.split()[1]) for text in status.splitlines() if text.startswith("VmHWM")) * 1024 / 1e6)


def decoder_of(folders: dict[str, Path], dtype: str) -> GuidedDecoder:
    """The default experiment's decoder in a given precision."""
    how: Any = {"device": PARAMS.decoding.device, "batch_size": PARAMS.decoding.batch_size}
    return GuidedDecoder.load(Source(BASE, SPEC.template, dtype), folders, **how)


def sweep(folders: dict[str, Path], repetitions: int) -> list[dict]:
    """The default sweep, every prompt and point of it, at once and point by point."""
    decoder, wanted = decoder_of(folders, SPEC.dtype), list(point_requests(PARAMS, PARAMS.base, PROMPTS))
    points = [[request for name, request in wanted if name == point] for point in PARAMS.sweep.points]

    def decode(requests: list[Request]) -> int:
        return sum(len(generation.tokens) for _, generation in decoder.generate(requests))

    runs = {
        ("at once",): lambda: decode([request for _, request in wanted]),
        ("point by point",): lambda: sum(map(decode, points)),
    }
    decode(points[0][:4])
    seconds = interleaved(runs, repetitions, "sweep", warm_up=False)
    lines = []
    for (method,), own in seconds.items():
        ratios = [mine / once for mine, once in zip(own, seconds["at once",], strict=True)]
        lines.append({
            "method": method, "rows": len(wanted), "tokens_per_s": round(1 / statistics.median(own), 1),
            "ratio_to_at_once": round(statistics.median(ratios), 3), "low": round(min(ratios), 3),
            "high": round(max(ratios), 3),
        })  # fmt: skip
    return lines


def precision(folders: dict[str, Path]) -> list[dict]:
    """What bfloat16 does to the guided law: KL of float32's law from bfloat16's, per step, on the same real texts.

    Also how many of the same rows change when the batch around them does.
    """
    made, laws, texts = {}, {}, None
    asked = list(point_requests(PARAMS, PARAMS.base, PROMPTS[:4]))
    names, requests = [name for name, _ in asked], [request for _, request in asked]
    for name in ("float32", "bfloat16"):
        decoder = decoder_of(folders, name)
        rows = dict(decoder.generate(requests))
        decoder._batch_size = 7
        few = dict(decoder.generate(requests))
        made[name] = sum(rows[index].tokens != few[index].tokens for index in rows)
        texts = texts or [rows[index].tokens for index in range(len(requests))]  # those of float32
        laws[name] = forced(decoder, requests, texts)
    lines = []
    for point in PARAMS.sweep.points:
        own = [index for index, name in enumerate(names) if name == point]
        kl = torch.cat([kl_divergence(laws["float32"][index], laws["bfloat16"][index]) for index in own])
        lines.append({"point": point, "steps": len(kl), "mean_kl": round(kl.mean().item(), 5),
                      "p99_kl": round(kl.quantile(0.99).item(), 5)})  # fmt: skip
    steps = sum(row["steps"] for row in lines)
    mean = sum(row["mean_kl"] * row["steps"] for row in lines) / steps
    lines.append({"point": "all", "steps": steps, "mean_kl": round(mean, 5), "p99_kl": None})
    for row in lines:
        row |= {"rows": len(names), "changed_float32": made["float32"], "changed_bfloat16": made["bfloat16"]}
    return lines


def forced(decoder: GuidedDecoder, requests: list[Request], texts: list[list[int]]) -> list[torch.Tensor]:
    """The guided law at every token of given texts, row by row: list of logps_TV."""
    found = []
    for request, tokens in zip(requests, texts, strict=True):
        laws: list[torch.Tensor] = []
        plain_draw = batch_step.draw
        given, law = iter(tokens), batch_step.guided_logps
        batch_step.guided_logps = lambda *args, laws=laws, law=law: laws.append(law(*args)) or laws[-1].clone()
        batch_step.draw = lambda logps, _, given=given: torch.tensor([next(given)], device=logps.device)
        try:
            list(decoder.generate([request]))
        finally:
            batch_step.guided_logps, batch_step.draw = law, plain_draw
        found.append(torch.cat(laws))
    return found


def save(name: str, lines: list[dict]) -> pd.DataFrame:
    table = pd.DataFrame(lines)
    with replacing(OUT / name) as stream:
        table.to_csv(stream, index=False)
    return table


def speed(folder: Path, repetitions: int, batches: tuple[int, ...], counts: tuple[int, ...]) -> list[dict]:
    """Every method at every k, batch and precision; saved as it goes."""
    folders, fast = adapters(folder, max(counts)), resolve_dtype("auto", DEVICE)
    lines: list[dict] = []
    for dtype in [torch.float32] if fast == torch.float32 else [torch.float32, fast]:
        name, bench = str(dtype).removeprefix("torch."), Bench(dtype, folders)
        for batch in batches:
            runs: dict[tuple, Callable[[], int]] = {}
            for method, k in [("unguided", 0), ("ours", 0), *((method, k) for k in counts for method in METHODS[1:])]:
                runs[method, k] = partial(getattr(bench, method), k, PROMPTS[:batch])
            seconds = interleaved(runs, repetitions, f"{name}, batch {batch}")
            for (method, k), own in seconds.items():
                peak = round(peak_mb(method, k, batch, name, folder)) if k in (0, PEAK_K) else None
                lines.append(line(method, k, batch, name, own, seconds["unguided", 0], peak))
                save("decoding.csv", lines)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="one repetition of the smallest setting")
    parser.add_argument("--only", choices=["speed", "sweep", "precision"])
    parser.add_argument("--peak", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        measure_peak(*options.peak)
        return
    console, arms = Console(width=120), {name: Workspace().arm(name) for name in PARAMS.objectives}
    repetitions, batches, counts = (1, (1,), (2,)) if options.quick else (REPETITIONS, (1, 8, 32), (1, 2, 3))
    if options.only in (None, "speed"):
        with tempfile.TemporaryDirectory() as folder:
            console.print(
                save("decoding.csv", speed(Path(folder), repetitions, batches, counts)).to_string(index=False)
            )
    if options.only == "sweep" or not (options.only or options.quick):
        console.print(save("sweep.csv", sweep(arms, 1)).to_string(index=False))
    if options.only == "precision" or not (options.only or options.quick):
        console.print(save("precision.csv", precision(arms)).to_string(index=False))
    cpu = next((text.split(":")[1].strip() for text in Path("/proc/cpuinfo").read_text().splitlines()
                if text.startswith("model name")), platform.processor())  # fmt: skip
    machine = {"cpu": cpu, "cores": os.cpu_count(), "device": str(DEVICE), "torch": torch.__version__,
               "repetitions": REPETITIONS, "new_tokens": TOKENS}  # fmt: skip
    write_json(OUT / "machine.json", machine)
    console.print_json(json.dumps(machine))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
