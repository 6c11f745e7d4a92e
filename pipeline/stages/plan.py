"""What a run will need: memory, forwards, time, answers of a judge; and whether it can fit. Nothing is loaded.

python -m pipeline plan                                                    # of params.yaml
make plan EXPERIMENT=pku_saferlhf_65b ARGS="decoding.batch_size=4"         # of any composition
make plan EXPERIMENT=hh_rlhf PLAN="--tokens-per-second 900 --price 0.15 0.60"
"""

import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, comb
from pathlib import Path

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from pipeline.config.errors import UserError
from pipeline.config.judges import LlmJudge, LocalJudge
from pipeline.config.load import load_params, to_params
from pipeline.config.methods import Method
from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.data.contrast import conditions
from pipeline.data.sources import read
from pipeline.data.splits import SPLITS
from pipeline.decoding.speculation import MOST, expected_tokens
from pipeline.evaluation.judges.progress import CHARACTERS, token_cost
from pipeline.evaluation.judges.rubric import RUBRICS
from pipeline.evaluation.standings import entries
from pipeline.generation.model_set import planned_models
from pipeline.models import memory
from pipeline.models.loading import Source, resolve_device, resolve_dtype
from pipeline.models.memory import PROMPT, Need


@dataclass(frozen=True)
class Rows:
    """How many texts a run generates."""

    prompts: int
    known: bool  # whether the prompts are there, or only a thousand of them assumed
    points: int
    samples: int

    @classmethod
    def of(cls, params: Params, workspace: Workspace) -> "Rows":
        """From what prepare wrote, else from the limit of test prompts."""
        file, limit = workspace.results / "prepare" / "prompts.jsonl", params.data.limits.get("test")
        prompts = limit or (len(file.read_text(encoding="utf-8").splitlines()) if file.is_file() else None)
        return cls(prompts or 1000, prompts is not None, len(params.sweep.points), params.decoding.samples_per_prompt)

    @property
    def total(self) -> int:
        """All rows."""
        return self.prompts * self.points * self.samples

    def __str__(self) -> str:
        assumed = "" if self.known else " (assumed)"
        return f"{self.prompts} prompts{assumed} x {self.points} points x {self.samples} samples = {self.total} rows"


def calls(judge: LlmJudge, params: Params, rows: Rows) -> tuple[int, int, int]:
    """Answers that an endpoint is asked for at most, and the tokens it reads and writes for them.

    For the sweep and the card, and where they are configured for the ladder and the comparison.
    """
    orders, objectives = (2 if judge.orders == "both" else 1), len(params.objectives)
    ladder, compared = params.weak_to_strong, params.comparison
    at_each = rows.points - 1 + len(ladder.bases) * (rows.points - 1 + ladder.best_of - 1)
    pairs = at_each * rows.prompts * rows.samples
    pairs += len(ladder.bases) * _asked(ladder.methods, params, rows.prompts) * rows.samples
    if compared.bases:
        prompts = min(rows.prompts, compared.prompts or rows.prompts)
        pairs += _asked(compared.methods, params, prompts) * rows.samples
    questions = orders * objectives * (pairs + judge.card_pairs)
    rubrics = [len((RUBRICS / f"{name}.md").read_text(encoding="utf-8")) for name in set(judge.rubrics.values())]
    question = max(rubrics) // CHARACTERS + PROMPT + 2 * params.decoding.max_new_tokens
    return questions, questions * question, questions * judge.max_tokens


def _asked(methods: Mapping[str, Method], params: Params, prompts: int) -> int:
    """How often the methods are asked for a sample, of so many prompts at the guided points of the sweep."""
    lines = entries(methods, params.sweep.points)
    return sum(min(prompts, methods[line.method].prompts or prompts) for line in lines if line.mix)


def data_prompts(params: Params) -> tuple[int, bool]:
    """Prompts that responses are sampled for at most, and whether their number is known or assumed."""
    path, limits = Path(params.data.path), params.data.limits
    if len(limits) == len(SPLITS):
        return sum(limits.values()), True
    return (sum(1 for _ in read(path)), True) if path.is_file() else (1000, False)


def print_preparing(params: Params, console: Console) -> None:
    """Print what stage prepare samples, and the answers that annotators are asked for."""
    sampling = params.data.sampling
    if sampling is None:
        return
    prompts, known = data_prompts(params)
    sources = {name: objective.source(params.data) for name, objective in params.objectives.items()}
    sentences = {
        sentence
        for name, objective in params.objectives.items()
        for sentence in (conditions(objective) if sources[name] == "contrast" else (None,))
    }
    each = sampling.responses_per_prompt
    console.print(
        f"sampling: {prompts} prompts{'' if known else ' (assumed)'} x {len(sentences)} instructions, the bare prompt "
        f"counted as one, x {each} responses = {prompts * len(sentences) * each} responses of {params.data.sampler} "
        f"with up to {sampling.max_new_tokens} tokens, less what the row store has"
    )
    pairs = prompts * comb(each, 2)
    for name, objective in params.objectives.items():
        annotator = objective.annotator
        if sources[name] == "judge" and isinstance(annotator, LlmJudge | LocalJudge):
            questions = pairs * (2 if annotator.orders == "both" else 1)
            console.print(
                f"labelling {name}: at most {questions} answers of {annotator.model} on {pairs} pairs "
                f"(objectives.{name}.annotator.max_calls: {annotator.max_calls})"
            )
        elif sources[name] == "reward_model":
            console.print(f"labelling {name}: {prompts * each} rewards")


def multiplications_per_second(dtype: torch.dtype, device: torch.device, rows: int) -> float:
    """Multiply-adds per second in a product of the decoder's kind, `rows` rows by a 4096 × 4096 matrix, measured."""
    left, right = (torch.randn(size, 4096, device=device).to(dtype) for size in (rows, 4096))
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(4):
            product = left @ right.T
        product.sum().item()  # waits for the device
        seconds.append((time.perf_counter() - started) / 4)
    return rows * 4096 * 4096 / min(seconds)


def bytes_per_second(dtype: torch.dtype, device: torch.device) -> float:
    """Bytes of weights read per second where one row is multiplied with them, measured: more than any cache holds."""
    weights, row = (torch.zeros(size, 16384, device=device, dtype=dtype) for size in (8192, 1))
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        (row @ weights.T).sum().item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return weights.nbytes / min(seconds)


@dataclass(frozen=True)
class Assumed:
    """What a plan cannot know by itself, as it was measured elsewhere."""

    tokens_per_second: float | None = None  # of guided decoding
    price: tuple[float, float] | None = None  # of a million tokens that the judge reads, and writes
    bandwidth: float | None = None  # bytes of weights read per second
    acceptance: float = 0.7  # share of drafted tokens that the guided law draws


def print_plan(
    params: Params,
    workspace: Workspace,
    console: Console,
    assumed: Assumed = Assumed(),
) -> bool:
    """Print what training, generating the sweep and judging need; return whether it fits into memory.

    Args:
        params: the experiment.
        workspace: where fetched models are.
        console: what it is printed on.
        assumed: what was measured elsewhere; without the speed of decoding the bound that arithmetic sets is printed.
    """
    rows = Rows.of(params, workspace)
    console.print(f"[bold]{params.base}[/bold] guided by {', '.join(params.objectives)}: {rows}")
    print_preparing(params, console)
    fits = _training(params, workspace, console)
    fits &= _decoding(params, workspace, console, rows, assumed)
    if isinstance(params.judge, LlmJudge):
        console.print(_judging(params.judge, *calls(params.judge, params, rows), assumed.price or params.judge.price))
    if not fits:
        console.print("[bold]this does not fit, and would be refused before anything is loaded[/bold]")
    return fits


def _judging(judge: LlmJudge, questions: int, read: int, written: int, price: tuple[float, float] | None) -> str:
    most = judge.max_calls
    runs = "" if most is None else f" in {ceil(questions / most)} runs of at most {most}"
    shown = f"judging: at most {questions} answers of {judge.model}{runs}, "
    shown += f"{read / 1e6:.3g} M tokens read and {written / 1e6:.3g} M written"
    if price is None:
        return shown
    return f"{shown}, at most {token_cost(read, written, price):.2f} at {price[0]:g} and {price[1]:g}"


def _training(params: Params, workspace: Workspace, console: Console) -> bool:
    config, name = params.trainer, params.arm.base
    source, device = Source.of(params.models, workspace, name), resolve_device(config.accelerator)
    shape = memory.shape_of(memory.config_of(name, params.models[name], source.folder))
    dtype, whole = resolve_dtype(source.dtype, device), params.arm.tuning == "full"
    each = config.devices if isinstance(config.devices, int) else max(1, torch.cuda.device_count())
    shards = config.num_nodes * each if config.strategy == "fsdp" else 1
    packed = params.arm.quantisation or source.quantisation
    wanted, free = memory.training_bytes(shape, dtype, packed, whole, shards), memory.available_bytes(device, False)
    how = "all weights, with gradients and optimizer" if whole else f"LoRA of rank {params.arm.rank}, weights"
    over = f" on each of {shards} devices" if shards > 1 else ""
    arms = f"{len(params.objectives)} ARMs of {name} one after the other"
    if params.arm.for_all_mixes:
        arms = f"one ARM of {name} for all mixes"
    console.print(f"training: {arms}, {how}: {_size(wanted)}{over} beside activations, {_size(free)} free on {device}")
    return wanted <= free


def _decoding(params: Params, workspace: Workspace, console: Console, rows: Rows, assumed: Assumed) -> bool:
    decoding, device = params.decoding, resolve_device(params.decoding.device)
    tokens = PROMPT + decoding.max_new_tokens
    forms = {point.form for point in params.sweep.points.values() if point.guided}
    policies = len(params.objectives) if "dpo" in forms else 0
    arms = 1 if params.arm.for_all_mixes else len(params.objectives)
    models = planned_models(params, workspace, params.base, arms, policies, "log_ratio" in forms)
    needs = memory.needs_of(models, decoding.batch_size, decoding.max_new_tokens, device)
    console.print(_table(params, needs, f"{decoding.batch_size} rows of {tokens} tokens ({PROMPT} of them prompt)"))
    spread = params.models[params.base].device_map is not None
    wanted, free = sum(each.total for each in needs), memory.available_bytes(device, spread)
    console.print(f"generating: {_size(wanted)} with a tenth for buffers, {_size(free)} free on {device}")
    base, arm = needs[0].shape.parameters, needs[-1].shape.parameters
    console.print(
        f"forwards per token: {len(needs)}; parameters multiplied per token: {base / 1e9:.3g} B unguided, "
        f"{(base + arm) / 1e9:.3g} B guided by one ARM ({1 + arm / base:.2f} times)"
    )
    dtype = resolve_dtype(params.models[params.base].dtype, device)
    # Embeddings of one tokenizer may be padded to sizes a little apart.
    if len(needs) > 1 and abs(needs[-1].shape.vocabulary / needs[0].shape.vocabulary - 1) < 0.01:
        console.print(_speculation(needs[0], needs[-1], assumed, assumed.bandwidth or bytes_per_second(dtype, device)))
    new = rows.total * decoding.max_new_tokens
    if assumed.tokens_per_second is not None:
        speed = assumed.tokens_per_second
        console.print(f"time: {_time(new / speed)} at most, at {speed:g} tokens/s")
        return wanted <= free
    rate = multiplications_per_second(dtype, device, decoding.batch_size)
    for what, cost in (("unguided", base), ("guided by one ARM", base + arm)):
        console.print(
            f"at most {rate / cost:.3g} tokens/s {what}, by {rate / 1e9:.3g} G multiply-adds/s measured here: "
            f"{_time(new * cost / rate)} or more for all rows at full length"
        )
    return wanted <= free


def _speculation(base: Need, arm: Need, assumed: Assumed, bandwidth: float) -> str:
    """What drafting by the ARM's model gains at one row at a time, if nothing takes time but reading weights."""
    base_seconds, arm_seconds, a = base.weights / bandwidth, arm.weights / bandwidth, assumed.acceptance
    speeds = [expected_tokens(a, drafted) / (base_seconds + (drafted + 1) * arm_seconds) for drafted in range(MOST + 1)]
    best = max(range(MOST + 1), key=lambda drafted: speeds[drafted])
    return (
        f"one row at a time, by reading weights at {bandwidth / 1e9:.3g} GB/s: {1 / base_seconds:.3g} tokens/s of "
        f"{base.name} unguided, {speeds[0]:.3g} guided, {speeds[best]:.3g} if {arm.name} drafts {best} tokens in each "
        f"round of which {a:g} are right ({speeds[best] / speeds[0]:.2f} times guided, "
        f"{speeds[best] * base_seconds:.2f} times unguided)"
    )


def _table(params: Params, needs: list[Need], title: str) -> Table:
    table, device = Table(title=title), resolve_device(params.decoding.device)
    for column in ("model", "parameters", "layers", "dtype", "weights", "KV cache"):
        table.add_column(column, justify="left" if column in ("model", "dtype") else "right")
    for need in needs:
        spec = params.models[need.name]
        kind = str(resolve_dtype(spec.dtype, device)).removeprefix("torch.")
        packed = f", {need.shape.packed_bits} bits" if need.shape.packed_bits else ""
        table.add_row(
            need.name, f"{need.shape.parameters / 1e9:.3g} B", str(need.shape.layers),
            spec.quantisation or kind + packed, _size(need.weights), _size(need.cache),
        )  # fmt: skip
    return table


def _size(amount: float) -> str:
    return f"{amount / 1e9:.3g} GB"


def _time(seconds: float) -> str:
    return f"{seconds / 60:.3g} minutes" if seconds < 7200 else f"{seconds / 3600:.3g} hours"


def main(arguments: Sequence[str]) -> None:
    """Plan params.yaml, or the composition that comes on standard input."""
    parser = ArgumentParser("python -m pipeline plan", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("params", nargs="?", default="params.yaml", help="a file, or - for standard input")
    parser.add_argument("--tokens-per-second", type=float, help="of guided decoding at that batch, as it was measured")
    parser.add_argument("--price", type=float, nargs=2, metavar=("READ", "WRITTEN"), help="in the place of judge.price")
    parser.add_argument("--bandwidth", type=float, help="GB of weights read per second; else measured here")
    parser.add_argument("--acceptance", type=float, default=0.7, help="share of drafted tokens that are right")
    options = parser.parse_args(arguments)
    if options.params == "-":
        params = to_params(OmegaConf.create(sys.stdin.read()), "the composition")
    else:
        params = load_params(Path(options.params))
    for name in ("tokens_per_second", "bandwidth"):
        if (rate := getattr(options, name)) is not None and not 0 < rate < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} {rate:g} is no speed: give a number above 0.")
    if not 0 <= options.acceptance <= 1:
        raise UserError(f"--acceptance {options.acceptance:g} is no share: give a number from 0 to 1.")
    bandwidth = options.bandwidth and options.bandwidth * 1e9
    assumed = Assumed(options.tokens_per_second, options.price, bandwidth, options.acceptance)
    if not print_plan(params, Workspace(), Console(), assumed):
        raise UserError("this run cannot fit here: see above.")
