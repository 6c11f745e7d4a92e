"""What an experiment can say: the sections of params.yaml as frozen dataclasses, and what every option means.

`conf/` has a group per section; `load` reads and checks. Methods and judges are in files of their own.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from pipeline.config.judges import Annotator, Judge, RewardJudge
from pipeline.config.methods import AnyTokenizers, Comparison
from pipeline.config.values import (
    Column,
    Count,
    Device,
    Finite,
    Name,
    NotNegative,
    Positive,
    Seed,
    Sentence,
    Several,
    Share,
    Split,
    Strict,
    Targets,
    Whole,
    without_nulls,
)


@dataclass(frozen=True)
class Distillation(Strict):
    """How a smaller model comes from a larger one: the layers it keeps, the text on which it learns to be like it."""

    layers: tuple[Whole, ...]  # from 0, ascending
    prompts: str  # a file of prompts, to whose splits train and validation the larger model writes that text
    samples_per_prompt: Count = 12
    max_new_tokens: Count = 64
    epochs: Count = 4
    batch_size: Count = 4  # prompts per step, each with up to 8 responses
    lr: Positive = 1.0e-3
    seed: Seed = 0


@dataclass(frozen=True)
class Model(Strict):
    """A causal LM that a base, an ARM or a sampler may be: where its files are, how it is loaded and asked."""

    source: Literal["wheel", "hub", "path", "distilled"]
    location: str  # wheel: file inside site-packages; hub: repository; path: folder; distilled: one of `models`
    sha256: str | None = None  # of the wheel's file
    wheels: tuple[str, ...] = ()  # pinned packages that hold the file in parts, installed aside when it is fetched
    revision: str | None = None  # of the hub repository
    dtype: str = "auto"  # auto: bfloat16 where the hardware computes in it, else float32
    quantisation: Literal["int8", "nf4"] | None = None  # on loading, by bitsandbytes; GPTQ and AWQ come with the files
    device_map: Literal["auto", "balanced", "sequential"] | None = None  # over the GPUs of a machine; null: one device
    template: str | None = None  # text with {prompt}; null: the tokenizer's chat template
    template_arguments: dict[str, bool | int | str] | None = None  # of that, as {enable_thinking: false}
    license: str = "unknown"
    distillation: Distillation | None = None  # how, where the source is distilled


@dataclass(frozen=True)
class Sampling(Strict):
    """How responses are drawn from the base when the data are prompts only."""

    responses_per_prompt: Count = 4  # under each sentence of an objective that has two; else 2 or more, to compare
    temperature: Positive = 0.8
    max_new_tokens: Count = 48


@dataclass(frozen=True)
class Download(Strict):
    """A dataset repository of the Hub, and the folder that its files go to."""

    repository: str
    revision: str
    folder: str  # an output of DVC, which empties it first
    files: tuple[str, ...] = ()  # patterns of those wanted; empty: all that can be read


@dataclass(frozen=True)
class Data(Strict):
    """Preference rows, or prompts to sample and label (`sampling` set)."""

    path: str  # a file (JSON Lines, JSON, Parquet, CSV, TSV), or a folder of such
    sampler: str  # the model that writes the responses where they are sampled, whatever base is steered later
    prompts: str  # where the prompts to generate from are: `path` is its test split, another file all of its prompts
    download: tuple[Download, ...] = ()  # what must be fetched first
    # Which files of a folder are which split, as patterns; a split of none is drawn from train; empty: all files, whose
    # rows say their splits or have them drawn by prompt.
    files: Annotated[dict[Split, str], BeforeValidator(without_nulls)] = field(default_factory=dict)
    columns: Annotated[dict[Column, str], BeforeValidator(without_nulls)] = field(
        default_factory=dict
    )  # as the files call them
    strict: bool = False  # whether a row that cannot be used stops the run
    sampling: Sampling | None = None
    label_noise: Annotated[float, Field(ge=0, lt=0.5)] = (
        0.0  # share of training and validation labels flipped; test labels stay clean
    )
    validation_fraction: Share = 0.1  # of prompts without a split
    test_fraction: Share = 0.1
    # Only the first so many prompts of a split.
    limits: Annotated[dict[Split, Count], BeforeValidator(without_nulls)] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm(Strict):
    """What becomes an ARM, and how: by a LoRA adapter (names as in PEFT), or by training all of it.

    `separate`: an ARM for each objective · `parm`, `uniarm`: one for all mixes, an adapter conditioned on the weights.
    """

    base: str  # the model it is made from, of the vocabulary of the base it guides
    tuning: Literal["lora", "full"] = "lora"
    rank: Count = 8
    lora_alpha: Count = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Targets = "q_proj,k_proj,v_proj,o_proj"  # module names, or all-linear
    quantisation: Literal["nf4"] | None = None  # of the frozen base while its adapter trains; needs bitsandbytes
    kind: Literal["separate", "parm", "uniarm"] = "separate"

    @property
    def for_all_mixes(self) -> bool:
        """Whether one training makes the ARMs of all objectives."""
        return self.kind != "separate"


@dataclass(frozen=True)
class Loss(Strict):
    """What pulls chosen and rejected apart; β is the objective's."""

    kind: Literal["arm", "hinge", "simpo", "dpo"] = "arm"
    margin: NotNegative = 0.0  # γ: by how much a chosen reward must exceed the rejected one
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0  # share of labels believed to be flipped


@dataclass(frozen=True)
class Trainer(Strict):
    """The training run; batches count prompts, each with all its pairs."""

    lr: Positive = 5.0e-4
    scheduler: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup_steps: Whole | Share = 5  # below 1: that share of all steps
    weight_decay: NotNegative = 0.05
    epochs: Count = 1
    batch_size: Count = 8  # per optimizer step, over all devices
    micro_batch_size: Count | None = None  # per forward on one device; null: its share of batch_size
    max_length: Count | None = None  # tokens of a prompt and a response; null: the model's context
    gradient_clip: Positive = 1.0
    gradient_checkpointing: bool = False
    evaluations_per_epoch: Count = 2
    checkpoint_every: Count = 10  # optimizer steps
    accelerator: Literal["auto", "cpu", "cuda", "gpu"] = "auto"
    devices: Count | Literal["auto"] = 1
    num_nodes: Count = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"


@dataclass(frozen=True)
class Decoding(Strict):
    """Guided generation; `batch_size` counts rows (a prompt at a point)."""

    max_new_tokens: Count = 48
    temperature: NotNegative = 1.0  # of the guided sum; 0 is greedy
    top_k: Whole = 0  # 0: all tokens
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()  # texts that end a response
    samples_per_prompt: Count = 1
    batch_size: Count = 64
    # Tokens that the model of the ARMs drafts, where it is another than the base. None: as many as pay by the times
    # measured, and for rows that are stored none, since they are to be the same at every run.
    num_speculative_tokens: Annotated[int, Field(ge=0, le=16)] | None = None
    device: Device = "auto"
    engine: Literal["transformers", "vllm"] = (
        "transformers"  # vllm: for the generate stage, in `make vllm`'s environment
    )


@dataclass(frozen=True)
class Point(Strict):
    """One weight vector α; no weights is the unguided base."""

    weights: dict[str, Finite] = field(default_factory=dict)  # negative ones, in the log-ratio form, steer away
    sharpen: NotNegative = 0.0  # divides decoding.temperature by 1 + this: unguided, as sharp as guidance by so much Σα
    form: Literal["plain", "log_ratio", "alone", "dpo"] = "plain"  # what the weights weigh: see `method`

    @property
    def guided(self) -> bool:
        """Whether any ARM has a say."""
        return any(self.weights.values())

    @property
    def method(self) -> str:
        """What is sampled from, as tables name it.

        `base` · `genarm`: base and Σ α log π_arm · `genarm_log_ratio`: base and Σ α (log π_arm − log π of what the ARM
        was made from) · `arm`: Σ α log π_arm without the base · `dpo`: Σ α log π of the base tuned by DPO for each
        objective, in the place of the base.
        """
        guided = {"plain": "genarm", "log_ratio": "genarm_log_ratio", "alone": "arm", "dpo": "dpo"}
        return guided[self.form] if self.guided else "base"


@dataclass(frozen=True)
class Sweep(Strict):
    """The weight vectors to generate at, and which of them the others are compared with."""

    control: str
    points: Annotated[dict[Name, Point], Field(min_length=1)]


@dataclass(frozen=True)
class Rival(Strict):
    """What ARMs are compared with: a LoRA adapter of a base, or a head on it, trained on the same pairs.

    `dpo`: the base as a policy tuned for the mix of objectives · `parm`, `uniarm`: one ARM for all mixes ·
    `reward_model`: a scalar head that scores whole texts · `prefix_scorer`: a head that scores each next token from
    what the frozen base computes · `rloo`: a policy trained on its own samples against the scorers, by TRL.
    """

    weights: Annotated[dict[str, Positive], Field(min_length=1)]  # how much the pairs of each objective count
    kind: Literal["dpo", "parm", "uniarm", "reward_model", "prefix_scorer", "rloo"] = "dpo"
    beta: Positive | None = 0.1  # null: each objective's own β_r; rloo: of the KL to the base
    lr: Positive = 1.0e-3
    epochs: Count = 1
    samples: Several = 4  # rloo: responses to a prompt in a step, and their length
    max_new_tokens: Count = 48


@dataclass(frozen=True)
class Tune(Strict):
    """What is trained for comparison, on which bases."""

    bases: tuple[str, ...] = ()  # empty: nothing
    rivals: dict[Name, Rival] = field(default_factory=dict)


@dataclass(frozen=True)
class WeakToStrong(Strict):
    """One ARM on bases of several sizes, beside what tuning each of them would give."""

    name: Name = "weak_to_strong"  # of the folder below results/ that it goes to
    weak: tuple[str, ...] = ()  # the model of the ARM, `arm.base`; empty: no such comparison
    bases: tuple[str, ...] = ()
    best_of: Count = 4  # samples of the base, of which the judge picks one
    methods: dict[Name, AnyTokenizers] = field(default_factory=dict)  # at the guided points of the sweep as well


@dataclass(frozen=True)
class Objective(Strict):
    """One preference: where its pairs come from, the oracle that scores it, the β_r that trains its ARM.

    Pairs come from one of these: the column `label` of the data's rows; where responses are sampled
    (`data.sampling`), the `scorer`, the `annotator`, or the two sentences `wanted` and `unwanted`.
    """

    label: str
    scorer: str | None = None  # null with `wanted`: a classifier of responses to the two sentences is the oracle
    held_out_scorer: str | None = None  # measures the same by other means; nothing is trained or chosen on it
    wanted: Sentence | None = None  # an instruction; responses to prompts that end in it are preferred
    unwanted: Sentence | None = None  # over responses to prompts that end in this one; null: to the prompts themselves
    annotator: Annotator | None = None  # the judge that labels sampled responses
    tie: NotNegative = 0.0  # sampled responses whose scores are closer make no pair
    beta: Positive = 0.1
    reference: Finite = 0.0  # the objective's coordinate of the hypervolume reference point
    pretrained: Model | None = None  # an ARM that is there already, whole or an adapter of arm.base; null: train one

    def source(self, data: Data) -> Literal["labels", "scorer", "contrast", "judge", "reward_model"]:
        """Where its pairs come from."""
        if self.wanted is not None:
            return "contrast"
        if self.annotator is not None:
            return "reward_model" if isinstance(self.annotator, RewardJudge) else "judge"
        return "labels" if data.sampling is None else "scorer"


@dataclass(frozen=True)
class Explain(Strict):
    """Whose token rewards the report shows."""

    prompts: Whole = 3
    tokens: Count = 64  # of a response, from its start
    alternatives: Count = 4  # the likeliest tokens of each law at every position


@dataclass(frozen=True)
class Tracking(Strict):
    """Weights & Biases; the key comes from the environment."""

    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "genarm"
    entity: str | None = None


@dataclass(frozen=True)
class Params(Strict):
    """One experiment, whole."""

    seed: Seed
    models: Annotated[dict[Name, Model], Field(min_length=1)]  # those there are to choose from
    base: str  # the frozen LLM that is steered
    fetch: Annotated[tuple[str, ...], Field(min_length=1)]  # the models this experiment needs at hand
    data: Data
    objectives: Annotated[dict[Name, Objective], Field(min_length=1)]
    arm: Arm
    loss: Loss
    trainer: Trainer
    decoding: Decoding
    sweep: Sweep
    tune: Tune
    weak_to_strong: WeakToStrong
    comparison: Comparison
    judge: Judge
    explain: Explain
    tracking: Tracking
