"""The HTML pages: one file each that opens from disk without a network, every value escaped."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, select_autoescape

from pipeline.config.points import point_laws
from pipeline.config.schema import Params
from pipeline.data.files import Row, replacing
from pipeline.decoding.token_colours import STRONGEST
from pipeline.report.drawing import Drawing

_CHARACTERS = (
    600_000  # of prompts and responses that a page holds: some hundreds of kilobytes, so that it opens at once
)
_LONGEST = 4_000  # characters of one text that a page shows; 512 tokens are about half of that


def report(
    params: Params, tables: Mapping[str, pd.DataFrame], cards: Mapping[str, Row], scored: pd.DataFrame,
    tokens: Sequence[Row], drawings: Sequence[Drawing], path: Path,
) -> None:  # fmt: skip
    """The report of a sweep.

    Args:
        params: the experiment.
        tables: `front` and `wins`, as in the files of those names.
        cards: `metrics` of the front, and the `data` card.
        scored: all judged rows.
        tokens: the token rewards of some responses, as `explain` wrote them.
        drawings: front, reward_kl and curves.
        path: of the page.
    """
    front, wins, objectives = tables["front"], tables["wins"].to_dict("records"), list(params.objectives)
    control = dict.fromkeys(front.point, params.sweep.control)
    of_point = scored.groupby("point").n_tokens.sum()
    values = {
        "front": front.to_dict("records"), "chooser": point_chooser(params, front),
         "wins": {(row["point"], row["objective"]): row for row in wins}, **cards,
        "samples": samples(scored, list(front.point), control, objectives, params.seed),
        "rest": "../judge/scores.jsonl", "tokens": token_rewards(tokens), "strongest": STRONGEST,
        "prompts": scored.prompt.nunique(), "generated": of_point.to_dict(),
    }  # fmt: skip
    _write("report.html.j2", params, values, drawings, path)


def ladder(
    params: Params, table: pd.DataFrame, rows: pd.DataFrame, models: Mapping[str, Row], drawn: Drawing, path: Path
) -> None:
    """The weak-to-strong page: what was asked, the models, the figure, the table and samples.

    Args:
        params: the experiment.
        table: table.csv.
        rows: all scored rows, with `base`.
        models: facts of each model, as `fetch` wrote them.
        drawn: the figure.
        path: of the page.
    """
    by_base = rows.assign(point=rows.base + " " + rows.point)
    named = set(zip(rows.base, rows.point, strict=True))
    control = {f"{base} {point}": f"{base} {params.sweep.control}" for base, point in named}
    values = {
        "weak": params.arm.base, "bases": params.weak_to_strong.bases, "ladder": models, "lines": _records(table),
        "best": f"best_of_{params.weak_to_strong.best_of}", "prompts": rows.prompt.nunique(),
        "per_prompt": params.decoding.samples_per_prompt,
        "samples": samples(by_base, list(by_base.point.unique()), control, list(params.objectives), params.seed),
        "rest": "rows.jsonl",
    }  # fmt: skip
    _write("weak_to_strong.html.j2", params, values, [drawn], path)


def comparison(
    params: Params, tables: Mapping[str, pd.DataFrame], rows: pd.DataFrame, drawings: Sequence[Drawing], path: Path
) -> None:
    """The comparison's page: what is compared, figures, tables and samples.

    Args:
        params: the experiment.
        tables: table, fronts, matched and wins, as in the files of those names.
        rows: all scored rows, with `line`.
        drawings: fronts and rewards_kl.
        path: of the page.
    """
    points = rows.assign(point=rows.line)
    lines = list(points.point.unique())
    shown = {name: _records(table) for name, table in tables.items()}
    values = {
        "prompts": rows.prompt.nunique(), **shown, "methods": list(params.comparison.methods),
        "against": params.comparison.against, "won": {(line["method"], line["other"]): line for line in shown["wins"]},
        "samples": samples(points, lines, dict.fromkeys(lines, lines[0]), list(params.objectives), params.seed),
        "rest": "rows.jsonl",
    }  # fmt: skip
    _write("comparison.html.j2", params, values, drawings, path)


def point_chooser(params: Params, front: pd.DataFrame) -> Row:
    """What the page says of a point that is chosen.

    Returns:
        `objectives`, `base`, `max_new_tokens`, and `points`: of each its weights as objectives and as the law has them,
        its temperature, scores with intervals, KL and readable share.
    """
    laws = point_laws(params, params.base)
    points = []
    for line in front.to_dict("records"):
        law = laws[line["point"]]
        scores = [
            [_number(line[f"{column}_{name}"], 3) for column in ("score", "ci_low", "ci_high")]
            for name in params.objectives
        ]
        points.append(
            {
                "name": line["point"], "method": law.method, "alphas": dict(law.alphas), "weights": dict(law.weights),
                "temperature": law.temperature, "scores": scores, "kl": _number(line["kl"], 1),
                "readable": _number(line["readable"], 2),
            }
        )  # fmt: skip
    return {
        "objectives": list(params.objectives), "base": params.base, "max_new_tokens": params.decoding.max_new_tokens,
        "points": points,
    }  # fmt: skip


def samples(
    scored: pd.DataFrame, points: Sequence[str], controls: Mapping[str, str], objectives: Sequence[str], seed: int
) -> Row:
    """What the sample browser shows: for each prompt the first response at every point.

    Prompts that every point has a response to; where the texts are too many for a page, some drawn at random stand for
    all.

    Args:
        scored: judged rows: `point, prompt, sample, response, n_tokens, kl`, and a score per objective.
        points: in the order they are shown.
        controls: per point, the one it is held against.
        objectives: their names.
        seed: of the draw.

    Returns:
        `objectives`, `points` with their `control`, `total` prompts, `seed`, and `prompts` in their order, each with
        its `responses`: text, tokens, KL and scores, None where there is none.
    """
    everywhere = set.intersection(*(set(part.prompt) for _, part in scored.groupby("point")))
    first = scored[(scored["sample"] == scored["sample"].min()) & scored.prompt.isin(everywhere)]
    shown = first.response.str.len().clip(upper=_LONGEST).groupby(first.prompt, sort=False).sum()
    shown += shown.index.str.len().to_series(shown.index).clip(upper=_LONGEST)  # characters, by prompt
    drawn = np.random.default_rng(seed).permutation(len(shown))
    room = int((shown.to_numpy()[drawn].cumsum() <= _CHARACTERS).sum())
    chosen = [shown.index[place] for place in sorted(drawn[: max(1, room)])]
    cells = {(row["prompt"], row["point"]): row for row in first[first.prompt.isin(set(chosen))].to_dict("records")}
    return {
        "objectives": list(objectives),
        "points": [{"name": point, "control": points.index(controls[point])} for point in points],
        "total": len(shown), "seed": seed,
        "prompts": [
            {
                "prompt": _cut(prompt),
                "responses": [
                    {
                        "text": _cut(row["response"]), "tokens": row["n_tokens"], "kl": _number(row["kl"], 1),
                        "scores": [_number(row[name], 4) for name in objectives],
                    }
                    for row in (cells[prompt, point] for point in points)
                ],
            }
            for prompt in chosen
        ],
    }  # fmt: skip


def token_rewards(traces: Sequence[Row]) -> Row:
    """What the token view shows: `prompts`, each once and cut for a page, and `traces` with the place of theirs."""
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(trace["prompt"] for trace in traces))}
    return {
        "prompts": [_cut(prompt) for prompt in places],
        "traces": [{**trace, "prompt": places[trace["prompt"]]} for trace in traces],
    }


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… [{len(text) - _LONGEST} more characters]"


def _number(value: Any, digits: int) -> float | None:
    return None if pd.isna(value) else round(float(value), digits)


def _records(table: pd.DataFrame) -> list[Row]:
    records: list[Row] = table.astype(object).where(table.notna(), None).to_dict("records")
    return records


def _write(template: str, params: Params, values: Row, drawings: Sequence[Drawing], path: Path) -> None:
    environment = Environment(loader=PackageLoader("pipeline.report"), autoescape=select_autoescape(["j2"]))
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "ensure_ascii": False, "separators": (",", ":")}
    figures = {drawn.name: drawn.svg() for drawn in drawings}
    shared = {"params": params, "objectives": list(params.objectives), "figures": figures}
    html = environment.get_template(template).render(**shared, **values)
    with replacing(path) as stream:
        stream.write(html)
