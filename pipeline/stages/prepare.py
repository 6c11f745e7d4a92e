"""prepare: preference rows, one file of pairs per objective, and the prompts to generate from.

python -m pipeline prepare
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from pipeline.config.errors import UserError
from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.data import sources
from pipeline.data.card import DataCard
from pipeline.data.files import Row, replacing, write_json, write_jsonl
from pipeline.data.labelling import pair_of
from pipeline.data.oracles import scorer
from pipeline.data.preferences import Prompts, read_rows
from pipeline.data.splits import SPLITS
from pipeline.generation.samples import sampled_rows
from pipeline.models.control_tokens import control_names


def run(params: Params, workspace: Workspace) -> None:
    """Read rows, or sample responses and label or contrast them; write results/prepare/ and models/classifiers.json."""
    data, out = params.data, workspace.results / "prepare"
    for objective in params.objectives.values():  # refused here, and not after everything is generated
        for name in filter(None, (objective.scorer, objective.held_out_scorer)):
            scorer(name)
    card = DataCard(params.objectives, data.strict, control_names(workspace.model(data.sampler)))
    sources_used: dict[str, Row] = {
        name: {"source": objective.source(data)} for name, objective in params.objectives.items()
    }
    classifiers: dict[str, Row] = {}
    if data.sampling is None:
        rows = read_rows(data, params.objectives, params.seed, card)
    else:
        rows = iter(sampled_rows(params, data.sampling, workspace, card, sources_used, classifiers))
    prompts = write_pairs(rows, params, out, card)
    write_jsonl(out / "prompts.jsonl", ({"prompt": prompt} for prompt in prompts.unseen(data)))
    write_json(workspace.classifiers, classifiers)
    unread, summary = sources.passed_over(data), card.summary()
    for name, counts in summary["objectives"].items():
        counts |= sources_used[name]
    write_json(out / "data_card.json", summary | ({"files not read": unread} if unread else {}))
    if unread:
        print(f"prepare: of no kind that can be read, and passed over: {', '.join(unread)}")
    for reason, count in summary["dropped"].items():
        print(f"prepare: {count['rows']} of {summary['read']} rows left out: {reason}")
    for name, counts in summary["objectives"].items():
        print(f"prepare: {name}: pairs {counts['pairs']}, ties {counts['ties']}")
        for reason, count in counts.get("left out", {}).items():
            print(f"prepare: {name}: {count} of {counts['sampled']} pairs left out: {reason}")
        if "verdict" in counts:
            print(f"prepare: {counts['verdict']}")


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
