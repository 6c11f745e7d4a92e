"""The section `comparison`: the methods that GenARM is compared with."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.values import Count, Finite, Name, NotNegative, Positive, Several, Strict, Whole


@dataclass(frozen=True, kw_only=True)
class _Method(Strict):
    """What methods of a comparison have in common."""

    strengths: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1.0,)  # what multiplies a point's weights: all
    # points at the first; those of one objective at the others too, for reward against KL
    prompts: Count | None = None  # only the first so many, where more would take too long


@dataclass(frozen=True, kw_only=True)
class GenArm(_Method):
    """ARMs guide the base."""

    kind: Literal["genarm"]
    form: Literal["plain", "log_ratio"] = "plain"
    arms: Literal["arms", "policies"] = "arms"  # policies: what DPO trained of the base takes the place of the ARMs


@dataclass(frozen=True, kw_only=True)
class Policies(_Method):
    """Adapters of the base.

    `mod` mixes the objectives' policies token by token, `morl` trained one for each mix, `rloo` too, by reinforcement
    learning; `soup` and `soup_factors` merge the objectives' policies; `parm` and `uniarm` are one ARM for all mixes
    and guide the base.
    """

    kind: Literal["mod", "morl", "rloo", "soup", "soup_factors", "parm", "uniarm"]


@dataclass(frozen=True, kw_only=True)
class BestOf(_Method):
    """The best of n samples by reward models."""

    kind: Literal["best_of_n"]
    n: Several = 4


@dataclass(frozen=True, kw_only=True)
class Candidates(_Method):
    """Reward models value the base's likeliest next tokens, as they stand (`args`) or rolled out (`transfer_q`)."""

    kind: Literal["args", "transfer_q"]
    top_k: Several = 10
    scale: Positive = 1.0  # of the rewards, which come in standard deviations
    horizon: Whole = 0  # tokens rolled out


@dataclass(frozen=True, kw_only=True)
class Prefixes(_Method):
    """Prefix scorers value every next token, with no forward but the base's.

    The law is π_base · exp(scale · Σ α_i V_i) with V_i the probability that the response is as objective i prefers
    (controlled decoding), or its logarithm (FUDGE).
    """

    kind: Literal["prefix_scorer"]
    value: Literal["probability", "log_probability"] = "probability"
    scale: Positive = 1.0


@dataclass(frozen=True, kw_only=True)
class Segments(_Method):
    """Reward models accept or refuse segments of the base's text (CARDS)."""

    kind: Literal["cards"]
    threshold: NotNegative = 3.0  # nats of entropy before whose token a segment ends
    longest: Count = 16  # tokens of a segment
    tries: Count = 4  # proposals of a segment
    target: Finite = 1.0  # what the text as a whole should earn, in standard deviations of the rewards
    softness: Positive = 0.3  # by how much less is still taken


@dataclass(frozen=True, kw_only=True)
class Prompting(_Method):
    """The sentences of contrast objectives in the base's prompt, and no training.

    `instruction`: the base asked with the wanted sentence · `contrast`: the base, and α times what the wanted sentence
    makes more likely than the unwanted one.
    """

    kind: Literal["prompting"]
    form: Literal["instruction", "contrast"]
    role: Literal["user", "system"] = "user"  # whose turn the sentence stands in


@dataclass(frozen=True, kw_only=True)
class Bytes(_Method):
    """The log-ratio law over bytes, for models of any tokenizers (byte-wise proxy tuning)."""

    kind: Literal["byte_proxy_tuning"]


@dataclass(frozen=True, kw_only=True)
class Words(_Method):
    """Where the base is unsure, what the ARMs make of their own model writes the next words (nudging)."""

    kind: Literal["nudging"]
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.3  # the base is unsure where no token is as likely as this


AnyTokenizers = Annotated[Bytes | Words, Field(discriminator="kind")]  # of the base and of the ARMs
Method = Annotated[
    GenArm | Policies | BestOf | Candidates | Prefixes | Segments | Prompting | Bytes | Words,
    Field(discriminator="kind"),
]


@dataclass(frozen=True)
class Comparison(Strict):
    """GenARM beside other methods, at the weights of the sweep."""

    name: Name = "comparison"  # of the folder below results/ that it goes to
    bases: tuple[str, ...] = ()  # the one that is steered, `base`; empty: no such comparison
    prompts: Count | None = None  # only the first so many of those that prepare wrote; a method may have fewer still
    against: str = ""  # the method that the others' differences are from
    methods: dict[Name, Method] = field(default_factory=dict)
