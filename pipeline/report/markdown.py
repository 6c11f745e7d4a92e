"""The result pages, results/*/README.md: what GitHub shows of a folder, written by its stage from its own tables."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import pandas as pd

from pipeline.data.files import Row, replacing

_MATCHED_KL = (4.0, 8.0, 16.0)  # nats per response, of the columns of a page
_NONE = "–"
# What the texts are, beside what they score: heading, column of the tables, digits.
_QUALITY = (
    ("readable", "readable", 2), ("ended", "ended", 2), ("perplexity", "perplexity", 1),
    ("distinct-2", "distinct_2", 2), ("relevance", "relevance", 2),
)  # fmt: skip


def front_page(front: pd.DataFrame, objectives: Sequence[str], metrics: Row, path: Path) -> None:
    """The page of results/pareto/.

    Args:
        front: front.csv.
        objectives: their names.
        metrics: metrics.json, of which the hypervolume is quoted.
        path: of the page.
    """
    lines = [
        "# The front",
        "",
        "Written by the stage `pareto` from [front.csv](front.csv); [metrics.json](metrics.json) has the rest.",
        "",
        "![The front](front.png)",
        "",
        *front_table(front, objectives),
        "",
        f"Hypervolume {metrics['hypervolume']:.3f} against the point "
        f"({', '.join(f'{value:g}' for value in metrics['reference'].values())}); the unguided points alone "
        f"{metrics['hypervolume_controls']:.3f}. With every response that one cannot read at the reference point: "
        f"{metrics['readable_hypervolume']:.3f}, unguided {metrics['readable_hypervolume_controls']:.3f}.",
        "",
        *_paragraph(
            "Scores have bootstrap intervals over prompts. *Held out*: the same measured by a scorer that nothing was "
            "trained or chosen on. KL is to the base, in nats per response. *Readable* and *ended* (by itself) are "
            "shares of the responses; perplexity is under the base; distinct-2 is the share of different word pairs "
            "over all responses; *relevance* is the share of other prompts that a response is less like than its own. "
            "They show when a scorer is gamed; pipeline/evaluation/text_quality.py defines them."
        ),
        "",
        "![Reward against KL](reward_kl.png)",
        "",
        "![Training curves](curves.png)",
    ]
    _write(lines, path)


def front_table(front: pd.DataFrame, objectives: Sequence[str]) -> list[str]:
    """A line for each point: its weights, its scores with intervals, KL, and what its texts are."""
    held_out = [name for name in objectives if f"held_out_{name}" in front]
    quality = [each for each in _QUALITY if each[1] in front]
    head = ["point", *(f"α {name}" for name in objectives), *objectives, *(f"{name}, held out" for name in held_out)]
    return _table(
        [*head, "KL", *(title for title, _, _ in quality)],
        (
            [
                line["point"],
                *(f"{line[f'alpha_{name}']:g}" for name in objectives),
                *(_interval(line, f"score_{name}", f"ci_low_{name}", f"ci_high_{name}") for name in objectives),
                *(
                    _interval(line, f"held_out_{name}", f"held_out_{name}_ci_low", f"held_out_{name}_ci_high")
                    for name in held_out
                ),
                _fixed(line["kl"], 1),
                *(_fixed(line[column], digits) for _, column, digits in quality),
            ]
            for line in front.to_dict("records")
        ),
    )


def comparison_page(tables: Mapping[str, pd.DataFrame], objectives: Sequence[str], against: str, path: Path) -> None:
    """The page of results/comparison/.

    Args:
        tables: `table`, `fronts` and `matched`, as in the files of those names.
        objectives: their names.
        against: the method that the others' differences are from.
        path: of the page.
    """
    lines = [
        "# Comparison of methods",
        "",
        "Written by the stage `comparison` from [table.csv](table.csv) and [fronts.csv](fronts.csv).",
        "[matched.csv](matched.csv): reward at matched KL; [wins.csv](wins.csv): who wins against whom;",
        "[index.html](index.html): the page with samples.",
        "",
        "![Fronts of every method](fronts.png)",
        "",
        *_methods_table(tables["table"], tables["fronts"], objectives),
        "",
        *_paragraph(
            f"Best hypervolume first. Differences are from `{against}`, by paired bootstrap over the prompts both "
            "methods have, each interval for itself. *End*: at the weight of that objective alone. *Even*: at the "
            "most even mix, of which the forwards are too. KL is to the base, in nats per response."
        ),
        "",
        "## Reward at equal KL",
        "",
        "![Reward of each objective against KL to the base](reward_kl.png)",
        "",
        *_matched_table(tables["matched"], objectives),
        "",
        *_paragraph(
            "Along each method's points that weigh one objective alone, from the base on, interpolated; – beyond its "
            "last point. Intervals are 95 % bootstraps over prompts, in which the KL is drawn anew too; differences "
            f"from `{against}`, with p corrected for their number, are in [matched.csv](matched.csv)."
        ),
    ]
    _write(lines, path)


def _matched_table(matched: pd.DataFrame, objectives: Sequence[str]) -> list[str]:
    cells = {(line["objective"], line["kl"], line["method"]): line for line in matched.to_dict("records")}
    columns = [(name, kl) for name in objectives for kl in _MATCHED_KL]
    legible = "readable" in matched
    rows = [
        [f"`{method}`", *(_matched_cell(cells.get((*column, method)), legible) for column in columns)]
        for method in matched.method.drop_duplicates()
    ]
    return _table(["method", *(f"{name} at {kl:g} nats" for name, kl in columns)], rows)


def _matched_cell(line: Row | None, legible: bool) -> str:
    if line is None:
        return _NONE
    return _interval(line, "reward", "ci_low", "ci_high") + (f"; {line['readable']:.2f} readable" if legible else "")


def _methods_table(table: pd.DataFrame, fronts: pd.DataFrame, objectives: Sequence[str]) -> list[str]:
    first = table.drop_duplicates(["method", "point"])  # of several strengths, that which the fronts are drawn at
    corrected, quality = "p_holm" in fronts, [each for each in _QUALITY if each[1] in table]
    read = "readable_hypervolume" in fronts
    head = ["method", "hypervolume", *(["readable hypervolume"] if read else []), "difference"]
    head += ["p (Holm)"] if corrected else []
    head += [*(f"{name} end" for name in objectives), "KL, even", *(f"{title}, even" for title, _, _ in quality)]
    head += ["forwards/token", "M tokens trained", "prompts"]
    rows = []
    for line in fronts.sort_values("hypervolume", ascending=False).to_dict("records"):
        points = first[first.method == line["method"]]
        alphas = points[[f"alpha_{name}" for name in objectives]]
        even = points.loc[(alphas.max(axis=1) - alphas.min(axis=1) - alphas.sum(axis=1)).idxmin()]
        ends = [points.loc[_only(alphas, f"alpha_{name}"), f"reward_{name}"] for name in objectives]
        difference = _interval(line, "delta_hv", "delta_ci_low", "delta_ci_high", "+.3f") if line["delta_hv"] else _NONE
        rows.append(
            [
                f"`{line['method']}`",
                _fixed(line["hypervolume"], 3),
                *([_fixed(line["readable_hypervolume"], 3)] if read else []),
                difference,
                *([_fixed(line["p_holm"], 3)] if corrected else []),
                *(_fixed(end, 2) for end in ends),
                _fixed(even["kl"], 1),
                *(_fixed(even[column], digits) for _, column, digits in quality),
                _fixed(even["forwards_per_token"], 1),
                f"{even['train_tokens'] / 1e6:.2f}" if even["train_tokens"] else _NONE,
                str(line["prompts"]),
            ]
        )
    return _table(head, rows)


def _only(alphas: pd.DataFrame, column: str) -> Any:
    """The point at which one objective weighs the most beyond all others; of an unguided method the first."""
    return (2 * alphas[column] - alphas.sum(axis=1)).idxmax()


def ladder_page(table: pd.DataFrame, objectives: Sequence[str], weak: str, path: Path) -> None:
    """The page of a ladder of bases.

    Args:
        table: table.csv.
        objectives: their names.
        weak: the model that the ARMs are made from.
        path: of the page.
    """
    several = [name for name in objectives if f"alpha_{name}" in table]
    picked = table.picked_by.fillna("") if "picked_by" in table else pd.Series("", index=table.index)
    cut = "left_out" in table and table.left_out.fillna(0).any()
    gaps = table.gap_recovered.notna().any()
    fewer = "prompts" in table and table.prompts.nunique() > 1
    head = ["base", "method", *(f"α {name}" for name in several), *([] if several else ["α"])]
    quality = [each for each in _QUALITY if each[1] in table]
    head += [*objectives, "KL", *(title for title, _, _ in quality)]
    head += [*(["left out"] if cut else []), *(["gap recovered"] if gaps else []), *(["prompts"] if fewer else [])]
    rows = []
    for line, by in zip(table.to_dict("records"), picked, strict=True):
        method = line["method"] + (f" by {by}" if by else "")
        rows.append(
            [
                f"`{line['base']}`",
                f"`{method}`",
                *(_general(line[f"alpha_{name}"]) for name in several),
                *([] if several else [_general(line["alpha"])]),
                *(_interval(line, f"reward_{name}", f"ci_low_{name}", f"ci_high_{name}") for name in objectives),
                _fixed(line["kl"], 1),
                *(_fixed(line[column], digits) for _, column, digits in quality),
                *([_fixed(line["left_out"], 2)] if cut else []),
                *([_gap(line)] if gaps else []),
                *([str(line["prompts"])] if fewer else []),
            ]
        )
    lines = [
        f"# ARMs of {weak} on other bases",
        "",
        "Written by the stage `weak_to_strong` from [table.csv](table.csv); the page with samples is",
        "[index.html](index.html).",
        "",
        "![Reward against KL for every base](figure.png)",
        "",
        *_table(head, rows),
        "",
        *_paragraph(
            "`control` is the base alone, `sharpened` the base as sharp as guidance by that α, `genarm` guidance "
            "in the plain form, `genarm_log_ratio` without what the ARM's model said before training, `arm` the "
            "ARM alone, `dpo` the base tuned by DPO, `best_of_…` the best sample by the judge. Intervals are "
            "bootstraps over prompts; KL is to the base, in nats per response."
            + (
                " `nudging` and `byte_proxy_tuning`: [other methods](../../pipeline/generation/methods/README.md)."
                if table.method.isin(["nudging", "byte_proxy_tuning"]).any()
                else ""
            )
            + (" *Left out*: the base's probability per token that guidance does not cover." if cut else "")
            + (" *Gap recovered*: the share of DPO's gain over the control." if gaps else "")
        ),
    ]
    _write(lines, path)


def _gap(line: Row) -> str:
    if isinstance(line["gap_recovered"], str):
        return "not defined"
    return _interval(line, "gap_recovered", "gap_ci_low", "gap_ci_high")


def _interval(line: Row, value: str, low: str, high: str, spec: str = ".2f") -> str:
    if pd.isna(line[value]):
        return _NONE
    return f"{line[value]:{spec}} [{line[low]:{spec}}, {line[high]:{spec}}]"


def _fixed(value: Any, digits: int) -> str:
    return _NONE if pd.isna(value) else f"{value:.{digits}f}"


def _general(value: Any) -> str:
    return _NONE if pd.isna(value) else f"{value:g}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _paragraph(text: str) -> list[str]:
    return wrap(text, 120, break_on_hyphens=False)


def _write(lines: Sequence[str], path: Path) -> None:
    with replacing(path) as stream:
        stream.write("\n".join(lines) + "\n")
