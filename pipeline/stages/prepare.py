"""prepare: preference rows, one file of pairs per objective, and the prompts to generate from.

python -m pipeline prepare
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from pipeline.config.errors import UserError
from pipeline.config.schema import Params, Sampling
from pipeline.config.workspace import Workspace
from pipeline.data import sources
from pipeline.data.card import DataCard
from pipeline.data.files import Row, replacing, write_json, write_jsonl
from pipeline.data.labelling import label_samples, pair_of
from pipeline.data.preferences import Prompts, read_prompts, read_rows
from pipeline.data.splits import SPLITS
from pipeline.generation.rows import generate_stored, with_room
from pipeline.models.control_tokens import control_names


def run(params: Params, workspace: Workspace) -> None:
    """Read rows, or sample and label responses; write results/prepare/."""
    data, out = params.data, workspace.results / "prepare"
    card = DataCard(params.objectives, data.strict, control_names(workspace.model(data.sampler)))
    if data.sampling is None:
        rows = read_rows(data, params.objectives, params.seed, card)
    else:
        asked = read_prompts(data, params.seed)
        samples = sample(asked, params, data.sampling, workspace, card)
        rows = label_samples(asked, samples, params.objectives)
    prompts = write_pairs(rows, params, out, card)
    write_jsonl(out / "prompts.jsonl", ({"prompt": prompt} for prompt in prompts.unseen(data)))
    unread = sources.passed_over(data)
    write_json(out / "data_card.json", (told := card.summary()) | ({"files not read": unread} if unread else {}))
    if unread:
        print(f"prepare: of no kind that can be read, and passed over: {', '.join(unread)}")
    for reason, count in told["dropped"].items():
        print(f"prepare: {count['rows']} of {told['read']} rows left out: {reason}")
    for name, counts in told["objectives"].items():
        print(f"prepare: {name}: pairs {counts['pairs']}, ties {counts['ties']}")


def write_pairs(rows: Iterator[Row], params: Params, out: Path, card: DataCard) -> Prompts:
    """Write pairs/<objective>.jsonl as the rows come; their prompts are returned.

    Raises:
        UserError: an objective has no pair in some split; nothing is written then.
    """
    prompts = Prompts()
    missing = {(name, split) for name in params.objectives for split in SPLITS}
    with ExitStack() as stack:
        files = {name: stack.enter_context(replacing(out / "pairs" / f"{name}.jsonl")) for name in params.objectives}
        for row in rows:
            pairs = {
                name: pair_of(row, name, objective, params.data.label_noise, params.seed)
                for name, objective in params.objectives.items()
            }
            card.keep(row, pairs)
            prompts.add(row)
            for name, pair in pairs.items():
                if pair is not None:
                    missing.discard((name, pair["split"]))
                    files[name].write(json.dumps(pair, ensure_ascii=False) + "\n")
        if missing:
            name, split = min(missing)
            raise UserError(
                f"{params.data.path}: no pair for {name} in split {split}: add rows with that label, or hold out a "
                "larger share of them (data.test_fraction, data.validation_fraction)."
            )
    return prompts


def sample(
    prompts: list[Row], params: Params, sampling: Sampling, workspace: Workspace, card: DataCard
) -> dict[str, list[tuple[str, bool]]]:
    """Responses of the unguided base by prompt id, in the order drawn, and whether each ended by itself.

    A prompt that leaves them no room in the base's context has none, and is counted.
    """
    from pipeline.decoding.decoder import Request
    from pipeline.models.loading import Source

    source = Source.of(params, workspace, params.data.sampler)
    texts = [prompt["prompt"] for prompt in prompts]
    kept = set(with_room([source], texts, sampling.max_new_tokens))
    for prompt in prompts:
        if prompt["prompt"] not in kept:
            card.drop("a prompt that leaves no room for a response in the base's context", f"prompt {prompt['id']}")
    wanted = {
        (prompt["id"], number): Request(
            prompt["prompt"],
            temperature=sampling.temperature,
            max_new_tokens=sampling.max_new_tokens,
            seed=params.seed,
            sample=number,
        )
        for prompt in prompts
        if prompt["prompt"] in kept
        for number in range(sampling.responses_per_prompt)
    }
    rows = generate_stored(list(wanted.values()), params, workspace, params.data.sampler, "prepare")
    samples: dict[str, list[tuple[str, bool]]] = {prompt["id"]: [] for prompt in prompts}
    for (prompt_id, _), row in zip(wanted, rows, strict=True):
        samples[prompt_id].append((row["response"], row["finish"] == "eos"))
    return samples
