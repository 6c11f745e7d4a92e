"""The decoder's requests and generations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.config.errors import UserError
from pipeline.config.points import BASE
from pipeline.data.files import digest


@dataclass(frozen=True)
class Request:
    """One row to generate: a prompt at a point, and how to sample."""

    prompt: str
    weights: Mapping[str, float] = field(default_factory=dict)  # α per ARM, of any sign; `base` weighs 1 unless named
    temperature: float = 1.0  # divides the guided sum; 0 is greedy
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()  # texts that end a response; they and what follows are left out of it
    seed: int = 0
    sample: int = 0  # which of the prompt's responses at this point

    def __post_init__(self) -> None:
        """Refuse what would generate nonsense.

        Raises:
            UserError: a value out of its range.
        """
        for name, right in (
            ("temperature", self.temperature >= 0), ("top_k", self.top_k >= 0), ("top_p", 0 < self.top_p <= 1),
            ("min_p", 0 <= self.min_p < 1), ("max_new_tokens", self.max_new_tokens >= 1), ("stop", all(self.stop)),
        ):  # fmt: skip
            if not right:
                raise UserError(f"a request's {name} is {getattr(self, name)!r}, which is out of its range.")

    @property
    def arms(self) -> dict[str, float]:
        """The ARMs of nonzero weight: an ARM at α = 0 is never run."""
        return {name: float(alpha) for name, alpha in self.weights.items() if alpha != 0.0 and name != BASE}

    @property
    def base_weight(self) -> float:
        """The exponent of the base itself: 0 leaves it out of the law, but not out of the sums over tokens."""
        return float(self.weights.get(BASE, 1.0))

    @property
    def law(self) -> dict[str, float]:
        """All weights that shape the law, as a row's key names them."""
        return self.arms if self.base_weight == 1.0 else {**self.arms, BASE: self.base_weight}

    @property
    def stream(self) -> str:
        """The key of the row's own random stream: seed, prompt and point, 32 hex digits."""
        return digest([self.seed, self.prompt, self.law, self.temperature, self.sample])


@dataclass(frozen=True)
class Generation:
    """One finished row; log-probabilities are sums over its tokens, in nats."""

    text: str
    prompt_tokens: int
    tokens: list[int]  # the end-of-sequence token included, where there is one
    finish: str  # eos | stop | length
    logp: float  # under the law the tokens were drawn from
    logp_base: float  # under the base at temperature 1
    kl: float  # Σ_t KL(π ‖ π_base), the base at temperature 1
    forwards: int | None = None  # positions computed by any model beyond the prompt; None: as many as lanes × tokens
    drafted: int | None = None  # tokens that a draft proposed; None: nothing drafts for this decoder
    accepted: int | None = None  # those of them that are in `tokens`
    left_out: float | None = None  # across tokenizers: Σ_t of the base's mass on tokens that no ARM evaluated


def until_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop texts in it."""
    places = [place for place in map(text.find, stops) if place >= 0]
    return text[: min(places)] if places else text
