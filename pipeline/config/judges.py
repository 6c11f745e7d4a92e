"""Judges, which score responses (the section `judge`) or label pairs (an objective's `annotator`)."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.values import Count, NotNegative, Positive, Share, Strict, spelled


@dataclass(frozen=True, kw_only=True)
class _Judge(Strict):
    """What all judges have in common."""

    confidence: Share = 0.95  # of every interval
    resamples: Count = 2000  # of a bootstrap
    card_pairs: Count = 100  # held-out pairs per objective, drawn, that the judge is checked on first


@dataclass(frozen=True, kw_only=True)
class OracleJudge(_Judge):
    """Every objective's own scorer."""

    kind: Literal["oracle"]


@dataclass(frozen=True)
class Scoring(Strict):
    """A reward model: a sequence classifier with one label."""

    source: Literal["hub", "path"]
    location: str
    revision: str | None = None
    template: str | None = None  # text with {prompt} and {response}; null: the tokenizer's chat template
    lower_is_better: bool = False  # a cost
    dtype: str = "auto"


@dataclass(frozen=True, kw_only=True)
class RewardJudge(_Judge):
    """A reward model for each objective; pointwise."""

    kind: Literal["reward_model"]
    models: dict[str, Scoring]
    batch_size: Count = 16


@dataclass(frozen=True, kw_only=True)
class _RubricJudge(_Judge):
    """Whoever reads two responses and a rubric; pairwise, against the control."""

    rubrics: dict[str, str]  # per objective, a file in pipeline/evaluation/judges/rubrics
    orders: Literal["both", "seeded"] = "both"  # seeded: one order, drawn from the question itself
    max_calls: Count | None = None  # questions of one run, over card, rows and objectives; what is answered is kept


@dataclass(frozen=True, kw_only=True)
class LlmJudge(_RubricJudge):
    """A model behind an endpoint that speaks OpenAI's chat protocol."""

    kind: Literal["llm"]
    base_url: Annotated[
        str, spelled(r"https?://[^\s?#]+", "an address starts with http:// or https://, without ? or #")
    ]
    model: str
    api_key_env: str  # the environment variable that holds the key
    max_tokens: Count = 200
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = "max_completion_tokens"
    temperature: NotNegative | None = None  # null: the endpoint's own
    extra_body: dict[str, bool | int | float | str] = field(default_factory=dict)
    concurrency: Count = 4
    timeout: Positive = 60.0  # seconds
    attempts: Count = 6
    price: tuple[NotNegative, NotNegative] | None = None  # of a million tokens read, and written; null: not reckoned


@dataclass(frozen=True, kw_only=True)
class LocalJudge(_RubricJudge):
    """A model of `models` that is at hand; its verdict is read from the probabilities of the next token."""

    kind: Literal["local_llm"]
    model: str
    batch_size: Count = 8
    least: Share = 0.05  # probability of all verdicts together, below which there is none


Judge = Annotated[OracleJudge | RewardJudge | LlmJudge | LocalJudge, Field(discriminator="kind")]
Annotator = Annotated[RewardJudge | LlmJudge | LocalJudge, Field(discriminator="kind")]
