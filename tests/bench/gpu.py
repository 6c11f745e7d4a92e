"""Tests, guided decoding, and training against TRL on one NVIDIA GPU: `make bench-gpu`.

    python -m tests.bench.gpu                                   # an H100 or H200; eight minutes and no more
    python -m tests.bench.gpu --only decoding --models 1b,13b   # what the eight minutes may not have reached
    python -m tests.bench.gpu --tiny --out scratch/bench-gpu    # tiny shapes, without a GPU too: does it still run?

Writes below results/bench as it goes: gpu.csv (decoding), gpu_training.csv, gpu_profile.txt (where a step spends its
time) and gpu.json (the card and its two ceilings). Each part, the tests among them, is a process of its own, stopped
when its share of `--seconds` is over. Models are random and of Llama's shapes, ARMs random adapters: speed does not
depend on values. Every method generates the same prompts and exactly as many new tokens per row; repetitions of all
methods are interleaved. What fails says why in column `error`, and the rest goes on.

    unguided    `model.generate` of transformers on the base alone
    naive       `model.generate` with a plain logits processor: 1 + k models and forwards per token; 7b, short prompts
    eager       `GuidedDecoder` whose backbones are not `static`: a step is launched kernel by kernel
    ours        `GuidedDecoder` as it is: base and ARMs are one forward, replayed as a CUDA graph; k = 0 is the base
    own         `GuidedDecoder` with a model of its own as ARM, 1b guiding 7b

tokens_per_s is of the whole call (median, low and high): reading of prompts included, and capture of graphs where more
than one row is generated. Ratios are of tokens_per_s within a repetition, to `ours` at k = 0 (ratio_to_unguided) and to
`unguided` (ratio_to_generate). step_ms is one more step of running rows. bandwidth_share is the least that such a step
reads (weights, and keys and values) over step_ms and over the copy bandwidth, which counts bytes read and written:
weights are only read, so 1 is what a copy reaches and no strict bound. peak_gb leaves out the weights of models that
the method does not use.

Training is a step of 8 pairs with a LoRA adapter of the default shape in bfloat16, responses of 48 words behind prompts
of 64 (short) or 512 (long): `ours` is `fit.fit`, `trl` TRL's CPOTrainer with the same loss, its weights
in bfloat16, its adapter in float32, no autocast (as in tests.bench.training).
"""

import argparse
import gc
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList, PreTrainedTokenizerFast

from pipeline.data.files import replacing, write_json
from pipeline.decoding.backbone import Backbone
from pipeline.decoding.batch import Batch
from pipeline.decoding.decoder import GuidedDecoder, Request
from pipeline.models.loading import resolve_device
from pipeline.models.prompting import Prompter, left_pad
from pipeline.training.fit import eval_loader, fit

DEVICE = resolve_device("auto")
SHARES = {
    "tests": 0.2,
    "decoding": 0.5,
    "profile": 0.08,
    "training": 0.22,
}  # of the time; what a part leaves goes to the next
FILES = {"decoding": "gpu.csv", "profile": "gpu_profile.txt", "training": "gpu_training.csv"}
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
STEPS, WARM = 6, 2  # of training, and how many of them are not counted
_SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
SHAPES: dict[str, tuple[int, ...]] = {
    "7b": (4096, 32, 32, 32, 11008), "1b": (2048, 16, 32, 8, 8192), "13b": (5120, 40, 40, 40, 13824)
}  # fmt: skip
Cell = tuple[str, int]  # a method and its k
QUICK: list[Cell] = [("ours", 0), ("ours", 1), ("ours", 2)]
OWN, GENERATE, EAGER, NAIVE = ("own", 1), ("unguided", 0), ("eager", 2), ("naive", 2)
UNDER_WAY = 8  # steps
SLOW = ("unguided", "eager", "naive")  # methods that launch kernel by kernel, whatever else is in the way


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    shapes: dict[str, tuple[int, ...]]
    vocabulary: int
    dtype: torch.dtype
    settings: tuple[tuple[str, int, int, list[Cell]], ...]  # model, batch, tokens of a prompt; what matters most first
    new_tokens: int
    pairs: int  # of a training step
    prompts: dict[str, int]  # words of those that are trained on
    response: int  # words
    copied: int  # bytes of a copy
    product: int  # rows and columns of a matrix product


FULL = Scale(
    SHAPES, 32_000, torch.bfloat16,
    (("7b", 1, 64, [GENERATE, *QUICK, OWN, EAGER, NAIVE]), ("7b", 32, 64, [GENERATE, *QUICK, OWN, EAGER]),
     ("7b", 8, 64, [GENERATE, *QUICK, OWN]), ("7b", 128, 64, [GENERATE, *QUICK, OWN]),
     ("7b", 1, 1024, [GENERATE, *QUICK, OWN]), ("7b", 32, 1024, [GENERATE, *QUICK, OWN]),
     ("7b", 8, 1024, [*QUICK]), ("7b", 128, 1024, [*QUICK]),
     ("1b", 1, 64, [GENERATE, *QUICK]), ("1b", 32, 64, [GENERATE, *QUICK]),
     ("13b", 1, 64, [GENERATE, *QUICK]), ("13b", 32, 64, [GENERATE, *QUICK])),
    32, 8, {"short": 64, "long": 512}, 48, 2**32, 8192,
)  # fmt: skip
TINY = Scale(
    dict.fromkeys(SHAPES, (64, 2, 4, 2, 128)), 512, torch.float32,
    (("7b", 1, 8, [GENERATE, *QUICK, OWN, EAGER, NAIVE]), ("1b", 2, 8, [GENERATE, *QUICK]), ("13b", 1, 8, QUICK)),
    6, 2, {"short": 8, "long": 16}, 6, 2**20, 128,
)  # fmt: skip
scale = FULL


def need(deadline: float, seconds: float) -> None:
    """Stop before what would end too late."""
    if time.time() + seconds + 3 > deadline:
        raise TimeoutError("no time was left")


def build(name: str) -> LlamaForCausalLM:
    """A random frozen model of that shape, made where it stays."""
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(zip(_SHAPE, scale.shapes[name], strict=True))
    config = LlamaConfig(
        **shape, tie_word_embeddings=name == "1b",
        vocab_size=scale.vocabulary, max_position_embeddings=4096, bos_token_id=None,
        pad_token_id=scale.vocabulary - 2, eos_token_id=scale.vocabulary - 1,
    )  # fmt: skip
    with DEVICE:
        model = LlamaForCausalLM._from_config(config, dtype=scale.dtype)
    width = config.hidden_size // config.num_attention_heads
    right = 10000.0 ** -(torch.arange(0, width, 2) / width)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq.cpu(), right)
    return model.requires_grad_(False).eval()


def prompter() -> Prompter:
    """A tokenizer of words w0, w1, …, one token each."""
    words = [*(f"w{number}" for number in range(scale.vocabulary - 2)), "<pad>", "<end>"]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    return Prompter(fast, "{prompt}")


def texts(seed: int, count: int, length: int) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(f"w{chance.randrange(scale.vocabulary - 2)}" for _ in range(length)) for _ in range(count)]


def write_adapter(model: LlamaForCausalLM, folder: Path) -> Path:
    """A random adapter of the default shape, as PEFT's folder."""
    LoraConfig(**LORA).save_pretrained(str(folder))
    tensors = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and layer is not model.get_output_embeddings():
            key, size, rank = f"base_model.model.{name}.lora_", layer.in_features, LORA["r"]
            tensors[f"{key}A.weight"] = torch.randn(rank, size) / size**0.5
            tensors[f"{key}B.weight"] = torch.randn(layer.out_features, rank) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def size_of(model: nn.Module) -> int:
    """Bytes of its weights; shared ones count once."""
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def now() -> float:
    """The time at which all that was asked of the device is done."""
    torch.get_device_module(DEVICE).synchronize()
    return time.perf_counter()


def seconds_of(run: Callable[[], Any], times: int) -> float:
    """Of one run, the first three left out."""
    for _ in range(3):
        run()
    started = now()
    for _ in range(times):
        run()
    return (now() - started) / times


def clean() -> None:
    """Give all memory back that nothing holds, and forget the peak."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.init()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(DEVICE)


def card() -> str:
    return torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else DEVICE.type


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def save(path: Path, lines: list[dict[str, Any]]) -> None:
    with replacing(path) as stream:
        pd.DataFrame(lines).to_csv(stream, index=False)


def ceilings() -> dict[str, Any]:
    """The card, and how fast it copies and multiplies."""

    pair = torch.randint(256, (2, scale.copied), dtype=torch.uint8, device=DEVICE)
    copying = seconds_of(lambda: pair[0].copy_(pair[1]), 10)
    left, right = torch.randn(2, scale.product, scale.product, device=DEVICE, dtype=scale.dtype)
    multiplying = seconds_of(lambda: left @ right, 10)
    return {
        "card": card(), "torch": torch.__version__, "transformers": version("transformers"),
        "copy_bytes_per_s": round(2 * scale.copied / copying),
        "matmul_flop_per_s": round(2 * scale.product**3 / multiplying),
        "dtype": str(scale.dtype).removeprefix("torch."), "new_tokens": scale.new_tokens,
    }  # fmt: skip


class Models:
    """One base with two adapters, what stands beside it, and each method as a way to generate."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.model, self.prompter, self.seed = name, build(name), prompter(), 0
        self.folders = {f"arm{number}": write_adapter(self.model, folder / f"{name}-{number}") for number in (1, 2)}
        self.base = Backbone(self.model, self.prompter, self.folders)
        self.static = getattr(self.base, "static", False)
        self.last: dict[Cell, float] = {}  # seconds of the last whole run
        self.sessions: dict[Any, list[Any]] = {}  # of each cell, as if it were all that the model is used for

    @cached_property
    def own(self) -> tuple[LlamaForCausalLM, Backbone]:
        """The small model that guides."""
        return (small := build("1b")), Backbone(small, self.prompter, name="own")

    @cached_property
    def merged(self) -> list[Any]:
        """The ARMs of `naive`, each a copy of the base."""
        return [
            PeftModel.from_pretrained(build(self.name), str(folder)).merge_and_unload().eval()
            for folder in self.folders.values()
        ]

    def decoder(self, method: str, k: int, prompts: list[str], new: int) -> tuple[GuidedDecoder, list[Request]]:
        backbones = [self.base, *([self.own[1]] if method == "own" else [])]
        for backbone in backbones:
            backbone.static = self.static and method != "eager"
            backbone.idle = self.sessions.setdefault((method, k, id(backbone)), [])
            backbone.ends = frozenset()  # rows that end early would make the work of two repetitions differ
        decoder = GuidedDecoder(*backbones, batch_size=len(prompts))
        decoder._halved = True  # half the batch would be another measurement
        self.seed += 1
        weights = {"own": 1.0} if method == "own" else dict.fromkeys(list(self.folders)[:k], 1 / max(k, 1))
        return decoder, [Request(prompt, weights, max_new_tokens=new, seed=self.seed) for prompt in prompts]

    def prepare(self, method: str, k: int, prompts: list[str], new: int) -> Callable[[], int]:
        """What is to be timed; it returns how many tokens it made."""
        if method not in ("unguided", "naive"):
            decoder, requests = self.decoder(method, k, prompts, new)
            return lambda: sum(len(generation.tokens) for _, generation in decoder.generate(requests))

        def generate() -> int:
            ids, mask = left_pad([self.prompter.prompt_ids(text) for text in prompts], self.prompter.eos, DEVICE)
            out = self.model.generate(
                input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, min_new_tokens=new, max_new_tokens=new,
                logits_processor=self.processors(method, k, mask),
            )  # fmt: skip
            return out[:, ids.shape[1] :].numel()

        return generate

    def processors(self, method: str, k: int, mask_BT: torch.Tensor) -> LogitsProcessorList:
        if method != "naive":
            return LogitsProcessorList()
        from tests.bench.decoding import Naive

        return LogitsProcessorList([Naive(self.merged[:k], 1 / k, mask_BT)])

    def timed(self, cell: Cell, prompts: list[str], new: int, deadline: float) -> tuple[float, float]:
        """Seconds of one run, and its peak in GB; a warning that a step could not be captured is an error."""
        need(deadline, 1.5 * self.last.get(cell, 0) + 2)
        if len(prompts) > 1:
            self.sessions.clear()
        clean()  # `generate` leaves its cache to the garbage collector
        run = self.prepare(*cell, prompts, new)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*runs eagerly.*")
            started = now()
            made = run()
            spent = now() - started
        if made != len(prompts) * new:
            raise RuntimeError(f"{made} tokens were made instead of {len(prompts) * new}")
        beside = {"naive": self.__dict__.get("merged", ()), "own": self.__dict__.get("own", ())[:1]}
        idle = sum(size_of(model) for method, found in beside.items() if method != cell[0] for model in found)
        return spent, (torch.cuda.max_memory_allocated() - idle) / 1e9

    @torch.inference_mode()
    def running(self, method: str, k: int, prompts: list[str]) -> Batch:
        """Rows some steps under way: compiled and captured."""
        decoder, requests = self.decoder(method, k, prompts, 5 * UNDER_WAY)
        batch = Batch(decoder._backbones, decoder._vocab_size, decoder._bridge)
        batch.admit_rows(decoder._rows(requests))
        for _ in range(UNDER_WAY):
            batch.step()
        return batch

    @torch.inference_mode()
    def step_seconds(self, cell: Cell, prompts: list[str], whole: float, deadline: float) -> float:
        """Seconds of one more step; of `generate`, which has no steps to call, the rest of a run of `whole` seconds."""
        if cell[0] in ("unguided", "naive"):
            return (whole - self.timed(cell, prompts, 2, deadline)[0]) / (scale.new_tokens - 2)
        need(deadline, 3 * whole + 2)
        clean()
        batch = self.running(*cell, prompts)
        return seconds_of(batch.step, 2 * UNDER_WAY)

    def least(self, method: str, k: int, batch: int, length: int) -> int:
        """Bytes that a step reads: the weights it multiplies with, and keys and values of rows of that length."""
        size = scale.dtype.itemsize
        others = [self.model] * k if method == "naive" else [self.own[0]] if method == "own" else []
        adapters = [] if others else list(self.folders.values())[:k]
        found = sum((folder / "adapter_model.safetensors").stat().st_size // 4 * size for folder in adapters)
        for model in [self.model, *others]:  # an embedding is multiplied with where it is the head as well
            found += size_of(model)
            found -= 0 if model.config.tie_word_embeddings else size_of(model.get_input_embeddings())
        for config in [model.config for model in [self.model, *(others or [self.model] * k)]]:
            width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
            found += batch * length * 2 * config.num_hidden_layers * width * size
        return found


def setting(
    models: Models, batch: int, length: int, cells: list[Cell], copying: float, deadline: float
) -> Iterator[list[dict[str, Any]]]:
    """All methods on the same prompts: the rows of the table, again and again as repetitions are done."""
    new, prompts = scale.new_tokens, texts(length, batch, length)
    seconds: dict[Cell, list[float | None]] = {cell: [] for cell in cells}
    steps: dict[Cell, float] = {}
    peaks: dict[Cell, float] = {}
    errors: dict[Cell, str] = {}

    def run(cell: Cell, new: int) -> float | None:
        if cell in errors:
            return None
        try:
            spent, peak = models.timed(cell, prompts, new, deadline)
        except TimeoutError:
            raise
        except Exception as error:
            errors[cell], spent, peak = told(error), None, 0.0
        if spent is None:  # by now nothing holds what the failed run had allocated
            clean()
            return None
        peaks[cell] = max(peak, peaks.get(cell, 0))
        if new == scale.new_tokens:
            models.last[cell] = spent
        return spent

    def ratio(cell: Cell, floor: Cell) -> float | None:
        pairs = zip(seconds[cell], seconds.get(floor, []), strict=False)
        found = [other / mine for mine, other in pairs if mine and other]
        return round(statistics.median(found), 3) if found else None

    def row(cell: Cell) -> dict[str, Any]:
        found = [each for each in seconds[cell] if each]
        speeds = [round(batch * new / each, 1) for each in found]
        step, share = steps.get(cell), None
        if step:
            share = models.least(*cell, batch, length + 2 * UNDER_WAY) / copying / step
        return {
            "model": models.name, "method": cell[0], "k": cell[1], "batch": batch, "prompt_tokens": length,
            "new_tokens": new, "tokens_per_s": statistics.median(speeds) if speeds else None,
            "low": min(speeds, default=None), "high": max(speeds, default=None),
            "ratio_to_unguided": ratio(cell, ("ours", 0)), "ratio_to_generate": ratio(cell, ("unguided", 0)),
            "step_ms": step and round(1000 * step, 3), "bandwidth_share": share and round(share, 3),
            "peak_gb": peaks.get(cell) and round(peaks[cell], 2),
            "error": errors.get(cell, None if found else "no time was left"), "card": card(),
        }  # fmt: skip

    try:
        for cell in cells:  # warm-up
            run(cell, 2 if cell[0] in SLOW else new)
        for _ in range(3 if batch <= 8 else 2):
            for cell in cells:
                seconds[cell].append(run(cell, new))
            yield [row(cell) for cell in cells]
        for cell in (cell for cell in cells if cell not in errors):
            whole = statistics.median(each for each in seconds[cell] if each)
            try:
                steps[cell] = models.step_seconds(cell, prompts, whole, deadline)
            except TimeoutError:
                raise
            except Exception as error:
                errors[cell] = told(error)
    except TimeoutError:
        pass
    yield [row(cell) for cell in cells]


def decoding(out: Path, deadline: float, wanted: list[str]) -> None:
    torch.set_grad_enabled(False)
    machine = ceilings()
    write_json(out / "gpu.json", machine)
    lines: list[dict[str, Any]] = []
    models: Models | None = None
    with tempfile.TemporaryDirectory() as folder:
        for name, batch, length, cells in (one for one in scale.settings if one[0] in wanted):
            started, rows = time.perf_counter(), []
            try:
                need(deadline, 10 if scale is FULL else 0)
                if models is None or models.name != name:
                    models = None
                    clean()
                    models = Models(name, Path(folder))
                if NAIVE not in cells:  # whose copies take room
                    models.__dict__.pop("merged", None)
                models.base.idle.clear()
                clean()
                for rows in setting(models, batch, length, cells, machine["copy_bytes_per_s"], deadline):
                    save(out / "gpu.csv", [*lines, *rows])
            except Exception as error:
                rows = [{"model": name, "batch": batch, "prompt_tokens": length, "error": told(error), "card": card()}]
            lines += rows
            save(out / "gpu.csv", lines)
            print(f"{name}, batch {batch}, prompts of {length}: {time.perf_counter() - started:.1f} s", flush=True)


@torch.inference_mode()
def steps_of(models: Models, method: str, k: int) -> str:
    """Where the time of a decoding step goes, at batch 1."""
    counted, activity, on_gpu = UNDER_WAY, torch.profiler.ProfilerActivity, DEVICE.type == "cuda"
    batch = models.running(method, k, texts(0, 1, 64))
    wall = seconds_of(batch.step, 2 * counted)
    with torch.profiler.profile(activities=[activity.CPU, *[activity.CUDA] * on_gpu]) as profiler:
        for _ in range(counted):
            batch.step()
        now()
    spent: dict[str, list[float]] = {}
    for event in profiler.events():
        if (event.device_type.name == "CUDA") == on_gpu:
            own = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
            spent.setdefault(event.name, []).append(own)
    total, calls = sum(map(sum, spent.values())) / counted, sum(map(len, spent.values())) / counted
    lines = [
        f"{models.name}, batch 1, k = {k}, {method}: {1000 * wall:.2f} ms a step, in which {calls:.0f} kernels take "
        f"{total / 1000:.2f} ms"
    ]
    for name, times in sorted(spent.items(), key=lambda item: -sum(item[1]))[:15]:
        lines.append(f"{sum(times) / counted:9.1f} us {len(times) / counted:7.1f} calls  {name[:80]}")
    return "\n".join(lines)


def profile(out: Path, deadline: float, _: list[str]) -> None:
    torch.set_grad_enabled(False)
    found: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        models = Models("7b", Path(folder))
        for method, k in [("ours", 0), ("ours", 2), ("eager", 2)]:
            try:
                need(deadline, 3)
                found.append(steps_of(models, method, k))
            except Exception as error:
                found.append(f"7b, batch 1, k = {k}, {method}: {told(error)}")
            print(found[-1], flush=True)
            with replacing(out / FILES["profile"]) as stream:
                stream.write("\n\n".join([card(), *found]) + "\n")


def pairs_of(length: int) -> list[dict[str, str]]:
    """Pairs for all steps; a space makes the response words of its own."""
    count = scale.pairs * STEPS
    prompts, responses = texts(1, count, length), texts(2, 2 * count, scale.response)
    sides = zip(prompts, responses[:count], responses[count:], strict=True)
    return [{"prompt": prompt, "chosen": f" {one}", "rejected": f" {two}"} for prompt, one, two in sides]


def ours(name: str, length: int, folder: Path) -> tuple[list[float], int]:
    """When each step ended, and how many tokens of responses there were."""
    from pipeline.config.schema import Arm, Loss, Trainer
    from pipeline.training.arm import ARM, ResponseModel, trainable
    from pipeline.training.batches import tokenise

    class Timed(ARM):
        ends: list[float]

        def on_train_batch_end(self, *_: object) -> None:
            self.ends.append(now())

    asked, arm = prompter(), Arm("random", rank=LORA["r"], lora_alpha=LORA["lora_alpha"], targets="all-linear")
    groups = tokenise(pairs_of(length), asked, 1024, "bench").groups
    model = ResponseModel(trainable(build(name), arm, 0, DEVICE), scale.dtype)
    config = Trainer(batch_size=scale.pairs, evaluations_per_epoch=1, checkpoint_every=1000)
    module = Timed(model, [(0.1, 1.0)], Loss("arm"), config, STEPS, 0)
    module.ends = []
    validation = eval_loader(groups[:1], 1, asked.eos)
    fit(module, groups, validation, config, folder, False, 0, asked.eos, DEVICE)
    return module.ends, sum(len(response) for group in groups for response in group.responses)


def trl(name: str, length: int, folder: Path) -> tuple[list[float], int]:
    """As `ours`."""
    import datasets
    from transformers import TrainerCallback
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    class Ends(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            ends.append(now())

    ends: list[float] = []
    datasets.disable_progress_bars()
    config = CPOConfig(
        output_dir=str(folder), per_device_train_batch_size=scale.pairs, max_steps=STEPS, beta=0.1, bf16=False,
        learning_rate=5e-4, report_to=[], save_strategy="no", use_cpu=DEVICE.type == "cpu", max_length=1024,
        gradient_checkpointing=False, logging_strategy="no", loss_type="sigmoid", cpo_alpha=0.0, disable_tqdm=True,
    )  # fmt: skip
    trainer = CPOTrainer(
        model=build(name), args=config, train_dataset=datasets.Dataset.from_list(pairs_of(length)),
        processing_class=prompter().tokenizer, peft_config=LoraConfig(**LORA), callbacks=[Ends()],
    )  # fmt: skip
    trainer.train()
    labels = [row for side in ("chosen_labels", "rejected_labels") for row in trainer.train_dataset[side]]
    return ends, sum(label != -100 for row in labels for label in row)


def train(out: Path, deadline: float, wanted: list[str]) -> None:
    lines: list[dict[str, Any]] = []
    for name, kind in [(name, kind) for name in ("7b", "1b") if name in wanted for kind in scale.prompts]:
        found: dict[str, dict[str, Any]] = {
            each: {"model": name, "kind": kind, "trainer": each, "pairs_per_s": None} for each in ("ours", "trl")
        }
        speeds: dict[str, list[float]] = {each: [] for each in found}
        tokens, last = {}, {"ours": 7.0 if scale is FULL else 0.0, "trl": 7.0 if scale is FULL else 0.0}
        for trainer, run in (("ours", ours), ("trl", trl)) * (2 if kind == "short" else 1):
            clean()
            row, started = found[trainer], time.perf_counter()
            try:
                need(deadline, 1.2 * last[trainer])
                with tempfile.TemporaryDirectory() as folder:
                    ends, tokens[trainer] = run(name, scale.prompts[kind], Path(folder))
                if len(set(tokens.values())) > 1:
                    raise RuntimeError(f"they train on different numbers of tokens: {tokens}")
                speeds[trainer].append(scale.pairs * (STEPS - WARM) / (ends[-1] - ends[WARM - 1]))
                row["pairs_per_s"] = round(statistics.median(speeds[trainer]), 2)
                row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
            except Exception as error:
                if not (isinstance(error, TimeoutError) and speeds[trainer]):
                    row["error"] = told(error)
            last[trainer] = time.perf_counter() - started
            for each, line in found.items():
                ratios = [mine / other for mine, other in zip(speeds[each], speeds["trl"], strict=False)]
                line["ratio_to_trl"] = round(statistics.median(ratios), 3) if ratios else None
            save(out / FILES["training"], [*lines, *(line | {"card": card()} for line in found.values())])
            print(f"{name}, {kind}, {trainer}: {last[trainer]:.1f} s", flush=True)
        lines += [line | {"card": card()} for line in found.values()]


def main() -> None:
    global scale
    began = max(psutil.Process().create_time(), time.time() - 60)
    runs = {"decoding": decoding, "profile": profile, "training": train}
    tests = [sys.executable, "-m", "pytest", "tests/gpu", "-n", "4", "--dist", "load", "-q", "-rs"]
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    parser.add_argument("--seconds", type=float, default=480, help="wall clock of everything")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU too")
    parser.add_argument("--only", default=",".join(SHARES), help="parts, in this order")
    parser.add_argument("--models", default=",".join(SHAPES), help="models that are decoded with and trained")
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    scale, parts = TINY if options.tiny else FULL, options.only.split(",")
    if DEVICE.type == "cpu" and not options.tiny:
        parser.error("there is no GPU: use --tiny")
    if options.deadline:
        runs[parts[0]](options.out, options.deadline, options.models.split(","))
        return
    offline = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}
    quiet = {"PYTHONWARNINGS": "ignore::FutureWarning", "TRL_EXPERIMENTAL_SILENCE": "1"}
    for place, part in enumerate(parts):
        started = time.time()
        share = (began + options.seconds - 3 - started) * SHARES[part] / sum(SHARES[name] for name in parts[place:])
        command = [sys.executable, "-m", "tests.bench.gpu", "--only", part, "--deadline", str(started + share),
                   "--out", str(options.out), "--models", options.models, *["--tiny"] * options.tiny]  # fmt: skip
        command = tests if part == "tests" else command
        try:
            done = subprocess.run(command, env=os.environ | offline | quiet, timeout=share, check=False)
            end = f"status {done.returncode}"
        except subprocess.TimeoutExpired:
            end = "its time was over"
        print(f"{part}: {time.time() - started:.0f} s of {share:.0f}, {end}", flush=True)
    for part in (part for part in reversed(parts) if part in FILES):
        path = options.out / FILES[part]
        if not path.is_file() or path.stat().st_mtime < began:
            print(f"{part}: nothing was measured")
        elif part == "profile":
            print("\n".join(line for line in path.read_text().splitlines() if line.startswith("7b")))
        else:
            table = pd.read_csv(path, dtype={"error": str})
            table = table.drop(columns=["card", "low", "high", "new_tokens"], errors="ignore")
            print(table.to_string(index=False, na_rep="", max_colwidth=60))
    if "decoding" in parts:
        print((options.out / "gpu.json").read_text())


if __name__ == "__main__":
    main()
