"""Tokens in the colour of their reward: blue where an ARM wants one more than the base does, orange where less.

The same two hues as elsewhere; unlike red and green, everyone can tell them apart. Beside them stands the number.
"""

from collections.abc import Sequence
from html import escape

STRONGEST = 3.0  # nats at which a colour is full
_MORE, _LESS = (56, 152, 205), (226, 120, 40)


def tint(reward: float) -> tuple[int, int, int, float]:
    """Red, green, blue, and how strong the colour is, 0 to 1."""
    return *(_MORE if reward > 0 else _LESS), min(1.0, abs(reward) / STRONGEST)


def on_white(reward: float) -> tuple[int, int, int]:
    """The colour where there is nothing to shine through: red, green and blue on white."""
    red, green, blue, strength = tint(reward)
    return tuple(round(255 + (channel - 255) * strength) for channel in (red, green, blue))  # type: ignore[return-value]


def coloured(texts: Sequence[str], rewards: Sequence[float]) -> str:
    """A line of HTML, safe to embed: each token on its colour, its reward in nats where the mouse rests."""
    parts = []
    for text, reward in zip(texts, rewards, strict=True):
        red, green, blue, strength = tint(reward)
        colour = f"background:rgba({red},{green},{blue},{0.75 * strength:.2f})"
        parts.append(f'<span style="{colour}" title="{reward:+.2f} nats">{escape(text)}</span>')
    return f'<p style="white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.7">{"".join(parts)}</p>'
