"""Whether two sentences will make an ARM, said before it is trained: how their responses differ, and by what.

Everything is chosen on training pairs and measured on the others: which way length points, the telling phrase, the
classifier. An accuracy is the share of held-out pairs in which the preferred response is told from the other one.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import mean

from pipeline.data.files import Row
from pipeline.evaluation.statistics import Bootstrap, Share, share
from pipeline.evaluation.text_classifier import TextClassifier, features_of

_SIDES = {"wanted": "response_0", "unwanted": "response_1"}
_TELLING = 8  # words shown of either side
_LITTLE = 0.05  # accuracy that the classifier must add to length or a phrase for these not to be all there is
_MOSTLY = 0.75  # accuracy from which length or a phrase alone would pass for the objective


def contrast_card(
    name: str, rows: Sequence[Row], counts: Mapping[str, int], bootstrap: Bootstrap
) -> tuple[Row, TextClassifier]:
    """The card of a contrast objective as a JSON value, and the classifier behind it.

    Args:
        name: the objective.
        rows: its usable pairs, `response_0` preferred.
        counts: of pairs that were sampled, and left out by reason.
        bootstrap: of the intervals.
    """
    train = [row for row in rows if row["split"] == "train"]
    held_out = [row for row in rows if row["split"] != "train"]
    classifier = TextClassifier.fit(*([row[key] for row in train] for key in _SIDES.values()))
    phrase, phrase_sign = telling_phrase(train)

    def accuracy(score: Callable[[str], float]) -> Share:
        return accuracy_of(score, held_out, bootstrap)

    longer = accuracy_of(_words, train, bootstrap).value or 0.0
    direction = 1 if longer >= 0.5 else -1
    measured = {
        "classifier": accuracy(classifier.log_odds),
        "length": accuracy(lambda text: direction * _words(text)),
        "phrase": accuracy(lambda text: phrase_sign * (phrase in features_of(text))),
    }
    telling = classifier.strongest(_TELLING)
    card = {
        "sampled": counts["sampled"],
        "left out": {reason: count for reason, count in counts.items() if reason != "sampled"},
        "usable": dict(Counter(row["split"] for row in rows)),
        "held-out accuracy": {kind: asdict(accuracies) for kind, accuracies in measured.items()},
        "words": {side: round(mean(_words(row[key]) for row in rows), 1) for side, key in _SIDES.items()},
        "ended": {side: round(mean(row[f"ended_{key[-1]}"] for row in rows), 3) for side, key in _SIDES.items()},
        "telling words": dict(zip(_SIDES, telling, strict=True)),
        "telling phrase": phrase,
    }
    return card | {"verdict": verdict(name, measured, phrase, direction)}, classifier


def verdict(name: str, measured: Mapping[str, Share], phrase: str, direction: int) -> str:
    """One sentence: whether the pairs carry a signal, and whether it is more than length or a phrase."""
    classifier, length, worded = measured["classifier"], measured["length"], measured["phrase"]
    if classifier.value is None or length.value is None or worded.value is None:
        return f"{name}: no held-out pair, so nothing can be said of it."
    shown = f"{classifier.value:.2f} [{classifier.ci_low:.2f}, {classifier.ci_high:.2f}]"
    best = max(classifier.value, length.value, worded.value)
    known = max(float(one.ci_low or 0) for one in (classifier, length))
    if known <= 0.5:
        return (
            f"{name}: no signal: a classifier tells {shown} of held-out pairs apart, as a coin would, so the model "
            "does not follow the sentences and an ARM will not either; reword them, or sample from a larger model "
            "(data.sampler)."
        )
    if length.value >= _MOSTLY and length.value >= best - _LITTLE:
        which = "longer" if direction > 0 else "shorter"
        return (
            f"{name}: length trap: the preferred response is the {which} one in {length.value:.2f} of held-out "
            f"pairs, and a classifier of words tells {shown}; a summed loss is solved by length alone, so train with "
            "loss=simpo, as objectives=sentence does."
        )
    if worded.value >= _MOSTLY and worded.value >= best - _LITTLE:
        return (
            f"{name}: a set phrase: the words {phrase!r} alone tell {worded.value:.2f} of held-out pairs apart, and a "
            f"classifier of all words {shown}, so the ARM may learn that phrase and no more; reword the sentences."
        )
    return (
        f"{name}: usable: a classifier of words tells {shown} of held-out pairs apart, length alone "
        f"{length.value:.2f}, the most telling phrase alone {worded.value:.2f}."
    )


def accuracy_of(score: Callable[[str], float], rows: Sequence[Row], bootstrap: Bootstrap) -> Share:
    """The share of pairs whose preferred response scores higher, equal scores counting half."""
    right = []
    for row in rows:
        better, worse = (score(row[key]) for key in _SIDES.values())
        right.append(0.5 * (1 + (better > worse) - (better < worse)))
    return share(right, [row["prompt"] for row in rows], bootstrap)


def telling_phrase(rows: Sequence[Row]) -> tuple[str, int]:
    """The one word or pair of words that tells most pairs apart, and which side it speaks for: 1 the preferred."""
    counts: Counter[str] = Counter()
    for row in rows:
        better, worse = (features_of(row[key]) for key in _SIDES.values())
        counts.update(better - worse)
        counts.subtract(worse - better)
    if not counts:
        return "", 1
    phrase = max(sorted(counts), key=lambda feature: abs(counts[feature]))
    return phrase, 1 if counts[phrase] >= 0 else -1


def _words(text: str) -> int:
    return len(text.split())
