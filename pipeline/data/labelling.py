"""Labels: the oracle's on sampled responses, and the pairs that an objective makes of labelled rows."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

from pipeline.config.schema import Objective
from pipeline.data.files import Row
from pipeline.data.oracles import scorer
from pipeline.data.splits import RESPONSES, uniform_of


def label_samples(
    prompts: Sequence[Row], samples: Mapping[str, Sequence[tuple[str, bool]]], objectives: Mapping[str, Objective]
) -> Iterator[Row]:
    """Every two distinct responses of a prompt as a row, each objective's oracle preferring one.

    Which rows there are does not depend on the objectives, so a further one leaves the others' pairs alone. Scores
    closer than `objective.tie` make a null label, as an annotator would shrug.

    Args:
        samples: by prompt id, each response and whether it ended by itself rather than at the length limit; `ended_0`
            and `ended_1` keep that, since only a response that ended has an end-of-sequence token to learn from.
    """
    for prompt in prompts:
        ended = {text: end for text, end in samples[prompt["id"]] if text}
        distinct = list(ended)
        scores = {
            objective.label: [scorer(str(objective.scorer))(text) for text in distinct]
            for objective in objectives.values()
        }
        ties = {objective.label: objective.tie for objective in objectives.values()}
        for first, second in combinations(range(len(distinct)), 2):
            row = {**prompt, "id": f"{prompt['id']}-{first}{second}"}
            row |= {"response_0": distinct[first], "response_1": distinct[second]}
            row |= {"ended_0": ended[distinct[first]], "ended_1": ended[distinct[second]]}
            for label, score in scores.items():
                difference = score[second] - score[first]
                close = difference == 0 or abs(difference) < ties[label]
                row[label] = None if close else int(difference > 0)
            yield row


def pair_of(row: Row, name: str, objective: Objective, noise: float, seed: int) -> Row | None:
    """What an objective makes of a row: `id`, `prompt`, `split`, `chosen`, `rejected`, and whether they ended.

    None where it has no preference, or the row is of another objective. A share `noise` of the training and validation
    labels is flipped, each by a coin of its own row; test labels stay clean.
    """
    preferred = row.get(objective.label)
    if preferred is None:
        return None
    if noise and row["split"] != "test" and uniform_of("noise", seed, name, row["id"]) < noise:
        preferred = 1 - preferred
    return (
        {key: row[key] for key in ("id", "prompt", "split")}
        | {"chosen": row[RESPONSES[preferred]], "rejected": row[RESPONSES[1 - preferred]]}
        | {"chosen_ended": row.get(f"ended_{preferred}", True)}
        | {"rejected_ended": row.get(f"ended_{1 - preferred}", True)}
    )
