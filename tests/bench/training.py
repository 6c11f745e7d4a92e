"""What a step of training costs beside TRL's: part of `make bench`.

    python -m tests.bench.training            # needs models/ and results/prepare from `dvc repro`; forty minutes
    python -m tests.bench.training --quick    # one repetition of the smallest setting: does it still run?

Writes results/bench/training.csv. Every run is a process of its own that trains a LoRA adapter of the default shape on
the same pairs with the same batch, through the trainer's own loop; repetitions of all trainers are interleaved, so that
what else the machine does falls on all of them alike. The first step is warm-up.

    ours, ours-dpo    `pipeline.training.fit.fit`, the ARM loss or DPO; reference log-probabilities count as time spent
    trl               TRL's CPOTrainer with the reference-free sigmoid loss: the ARM loss
    trl-dpo           TRL's DPOTrainer

    short       the embedded prompts, one pair of each
    long        the same behind two earlier turns, so that most tokens are of the prompt, as in HH-RLHF's dialogues
    embedded    the embedded prompts with four pairs among their four responses, those of both objectives
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning import seed_everything
from rich.console import Console
from tqdm import tqdm

from pipeline.config.load import load_params
from pipeline.config.schema import Loss, Trainer
from pipeline.config.workspace import Workspace
from pipeline.data.files import read_jsonl, replacing
from pipeline.models.fetch import AutoConfig
from pipeline.models.loading import load_model, resolve_dtype
from pipeline.models.prompting import Prompter
from pipeline.training.arm import ARM, ResponseModel, trainable
from pipeline.training.batches import PromptGroup, tokenise
from pipeline.training.fit import eval_loader, fit
from pipeline.training.reference_logps import attach_reference

PARAMS, CPU = load_params(), torch.device("cpu")
BASE, OUT = Workspace().model(PARAMS.arm.base), Path("results/bench")
PAIRS = Path("results/prepare/pairs")
BATCH, STEPS, REPETITIONS = 8, 4, 3  # pairs of a step; steps, the first of them warm-up
COLUMNS = ["trainer", "prompts", "dtype", "pairs_per_s", "ratio_to_trl", "peak_mb", "low", "high", "repetitions"]


def rows(kind: str) -> list[dict]:
    """Pairs for all steps; neighbours in length, so that no trainer pads much."""
    prepared, others = (
        [row for _, row in read_jsonl(PAIRS / f"{name}.jsonl") if row["split"] == "train"]
        for name in ("positivity", "conciseness")
    )
    by_prompt = {row["prompt"]: row for row in prepared}
    if kind == "embedded":
        both = [(by_prompt[row["prompt"]], row) for row in others if row["prompt"] in by_prompt][: 2 * STEPS]
        return [chosen | {"rejected": worse["rejected"]} for pair in both for chosen in pair for worse in pair]
    firsts = list(by_prompt.values())[: BATCH * STEPS]
    if kind == "long":
        turns = [f"User: {row['prompt']}\nAssistant: {row['chosen']}\n" for row in prepared]
        firsts = [
            row | {"prompt": turns[3 * place] + turns[3 * place + 1] + f"User: {row['prompt']}"}
            for place, row in enumerate(firsts)
        ]
    return firsts


def peak_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


class Timed(ARM):
    """Says when each step ended."""

    ends: list[float]

    def on_train_batch_end(self, *_: object) -> None:
        self.ends.append(time.perf_counter())


def ours(kind: str, dtype: torch.dtype, loss: Loss) -> tuple[float, float]:
    prompter, pairs = Prompter.load(BASE, None), rows(kind)
    groups: list[PromptGroup] = tokenise(pairs, prompter, 1024, "bench").groups
    model = ResponseModel(trainable(load_model(BASE, dtype, CPU), PARAMS.arm, 0, CPU), dtype)
    config = Trainer(batch_size=len(groups) // STEPS, evaluations_per_epoch=1, checkpoint_every=1000, accelerator="cpu")
    module, spent = Timed(model, [(0.1, 1.0)], loss, config, STEPS, 0), 0.0
    module.ends = []
    with tempfile.TemporaryDirectory() as folder:
        if loss.kind == "dpo":
            started = time.perf_counter()
            attach_reference(model, groups, "bench", Path(folder), config.batch_size, prompter.eos)
            spent = (time.perf_counter() - started) * (STEPS - 1) / STEPS
        validation = eval_loader(groups[:1], 1, prompter.eos)
        fit(module, groups, validation, config, Path(folder), False, 0, prompter.eos, CPU)
    return spent + module.ends[-1] - module.ends[0], len(pairs) * (STEPS - 1) / STEPS


def trl(kind: str, dtype: torch.dtype, dpo: bool) -> tuple[float, float]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    prompter, pairs, ends = Prompter.load(BASE, None), rows(kind), []

    class Ends(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            ends.append(time.perf_counter())

    def spoken(prompt: str) -> str:
        chat = [{"role": "user", "content": prompt}]
        return str(prompter.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))

    data = [{"prompt": spoken(row["prompt"]), "chosen": row["chosen"], "rejected": row["rejected"]} for row in pairs]
    arm = PARAMS.arm
    lora = LoraConfig(r=arm.rank, lora_alpha=arm.lora_alpha, target_modules=arm.targets, task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "output_dir": folder, "per_device_train_batch_size": BATCH, "max_steps": STEPS, "beta": 0.1, "bf16": False,
            "learning_rate": 5e-4, "report_to": [], "save_strategy": "no", "use_cpu": True, "max_length": 1024,
            "gradient_checkpointing": False, "logging_steps": 1,
        }  # fmt: skip
        kinds: Any = (DPOTrainer, DPOConfig) if dpo else (CPOTrainer, CPOConfig)
        config = kinds[1](**options) if dpo else kinds[1](**options, loss_type="sigmoid", cpo_alpha=0.0)
        # Weights in `dtype`, adapters in float32, no autocast: TRL's leanest setting here, and its fastest.
        kinds[0](
            model=load_model(BASE, dtype, CPU), args=config, train_dataset=Dataset.from_list(data),
            processing_class=prompter.tokenizer, peft_config=lora, callbacks=[Ends()],
        ).train()  # fmt: skip
    return ends[-1] - ends[0], len(pairs) * (STEPS - 1) / STEPS


def work(trainer: str, kind: str, name: str) -> None:
    """One run in this process; the last line printed is its result."""
    seed_everything(0, verbose=False)
    dtype = getattr(torch, name)
    if trainer.startswith("trl"):
        seconds, pairs = trl(kind, dtype, trainer == "trl-dpo")
    else:
        seconds, pairs = ours(kind, dtype, Loss("dpo" if trainer == "ours-dpo" else "arm"))
    print(json.dumps({"pairs_per_s": pairs / seconds, "peak_mb": peak_mb()}))


def measured(trainer: str, kind: str, name: str) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.bench.training", "--worker", trainer, kind, name]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def table(found: dict[tuple[str, str, str], list[dict[str, float]]]) -> pd.DataFrame:
    lines = []
    for (trainer, kind, name), runs in found.items():
        others = found["trl-dpo" if trainer.endswith("dpo") else "trl", kind, name]
        ratios = [mine["pairs_per_s"] / other["pairs_per_s"] for mine, other in zip(runs, others, strict=False)]
        lines.append([
            trainer, kind, name, round(statistics.median(run["pairs_per_s"] for run in runs), 2),
            round(statistics.median(ratios), 2), round(statistics.median(run["peak_mb"] for run in runs)),
            round(min(ratios), 2), round(max(ratios), 2), len(ratios),
        ])  # fmt: skip
    return pd.DataFrame(lines, columns=COLUMNS)


def gemm_rate(dtype: torch.dtype) -> float:
    """Operations per second of the matrix product that the model's largest layer does with a batch."""
    left, right = torch.randn(1080, 576).to(dtype), torch.randn(576, 1536).to(dtype)
    best = float("inf")
    for _ in range(30):
        started = time.perf_counter()
        for _ in range(10):
            left @ right
        best = min(best, (time.perf_counter() - started) / 10)
    return 2 * 1080 * 576 * 1536 / best


def floor(kind: str, dtype: torch.dtype) -> str:
    """Seconds a step needs at least: forward and backward to the activations, whose weights are frozen."""
    config = AutoConfig.from_pretrained(BASE)
    prompter = Prompter.load(BASE, None)
    groups = tokenise(rows(kind), prompter, 1024, "bench").groups
    tokens, labels = sum(map(len, groups)) / STEPS, sum(len(r) for g in groups for r in g.responses) / STEPS
    shared, kv = sum(len(g.prompt) for g in groups) / STEPS / tokens, config.num_key_value_heads
    width, inner, head = config.hidden_size, config.intermediate_size, config.hidden_size // config.num_attention_heads
    layer = width * (2 * width + 2 * kv * head + 3 * inner)
    low_rank = PARAMS.arm.rank * (2 * width + 2 * (width + kv * head) + 2 * width + 3 * (width + inner))
    needed = config.num_hidden_layers * tokens * (4 * layer + 6 * low_rank) + 4 * labels * width * config.vocab_size
    rate = gemm_rate(dtype)
    return (
        f"{kind}, {str(dtype)[6:]}: {tokens:.0f} tokens a step, {shared:.0%} of them prompt, {labels:.0f} labels; "
        f"{needed / 1e9:.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s are {needed / rate:.2f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="one repetition of the smallest setting")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(*options.worker)
        return
    fast = str(resolve_dtype("auto", CPU)).removeprefix("torch.")
    names = list(dict.fromkeys(["float32", fast]))
    cells = [(trainer, kind, name) for name in names for kind in ("short", "long", "embedded")
             for trainer in ("trl", "ours")]  # fmt: skip
    cells += [(trainer, kind, fast) for kind in ("short", "long") for trainer in ("trl-dpo", "ours-dpo")]
    repetitions = REPETITIONS
    if options.quick:
        cells, repetitions = [("trl", "short", fast), ("ours", "short", fast)], 1
    found: dict[tuple[str, str, str], list[dict[str, float]]] = {cell: [] for cell in cells}
    bar = tqdm(total=len(cells) * repetitions, desc="training")
    for _ in range(repetitions):
        for cell in cells:
            bar.set_postfix_str(" ".join(cell))
            found[cell].append(measured(*cell))
            bar.update()
        if not options.quick:
            with replacing(OUT / "training.csv") as stream:
                table(found).to_csv(stream, index=False)
    bar.close()
    console = Console(width=140)
    console.print(table(found).to_string(index=False))
    for kind in ("short", "long", "embedded"):
        for name in names:
            console.print(floor(kind, getattr(torch, name)))


if __name__ == "__main__":
    main()
