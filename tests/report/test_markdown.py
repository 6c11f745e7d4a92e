"""Result pages of what the committed tables lack: gaps that are not defined, p-values corrected for many methods."""

import pandas as pd

from pipeline.report import markdown

COMMON = {"kl": 2.0, "perplexity": 10.04, "distinct_2": 0.5, "ci_low_kind": 0.1, "ci_high_kind": 0.3}


def rows(path):
    return [line.split(" | ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]


def test_a_gap_that_is_not_defined_or_not_there_is_no_number(tmp_path):
    line = {"base": "big", "alpha": 1.0, "reward_kind": 0.2, "gap_ci_low": None, "gap_ci_high": None, **COMMON}
    table = pd.DataFrame(
        [
            {**line, "method": "genarm", "gap_recovered": "not defined: the gap's interval includes 0"},
            {**line, "method": "control", "gap_recovered": None, "perplexity": float("nan")},
        ]
    )
    markdown.ladder_page(table, ["kind"], "small", tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (
        text.startswith("# ARMs of small on other bases\n") and "*Gap recovered*" in text and "*Left out*" not in text
    )
    assert rows(tmp_path / "README.md") == [
        ["| `big`", "`genarm`", "1", "0.20 [0.10, 0.30]", "2.0", "10.0", "0.50", "not defined |"],
        ["| `big`", "`control`", "1", "0.20 [0.10, 0.30]", "2.0", "–", "0.50", "– |"],
    ]


def test_methods_are_listed_best_first_with_corrected_p_values(tmp_path):
    line = {"forwards_per_token": 2.0, "train_tokens": 1_500_000, **COMMON}
    points = {"end": (1.0, 0.9), "even": (0.5, 0.6)}
    table = pd.DataFrame(
        [
            {**line, "method": method, "point": point, "alpha_kind": alpha, "alpha_short": 1 - alpha}
            | {"reward_kind": reward, "reward_short": 1 - reward}
            for method in ("worse", "better")
            for point, (alpha, reward) in points.items()
        ]
    )
    fronts = pd.DataFrame(
        {
            "method": ["worse", "better"], "hypervolume": [0.1, 0.5], "delta_hv": [-0.4, 0.0],
            "delta_ci_low": [-0.5, 0.0], "delta_ci_high": [-0.3, 0.0], "p_holm": [0.02, float("nan")],
            "prompts": [16, 100],
        }
    )  # fmt: skip
    bounds = {"ci_low": 0.1, "ci_high": 0.3, "readable": 0.98}
    matched = pd.DataFrame(
        [
            {"objective": "kind", "kl": kl, "method": method, "reward": kl / 20, **bounds}
            for method, kls in (("better", (4.0, 8.0, 32.0)), ("worse", (4.0,)))
            for kl in kls
        ]
    )
    tables = {"table": table, "fronts": fronts, "matched": matched}
    markdown.comparison_page(tables, ["kind", "short"], "better", tmp_path / "README.md")
    better, worse, *at_equal_kl = rows(tmp_path / "README.md")
    assert at_equal_kl == [
        ["| `better`", "0.20 [0.10, 0.30]; 0.98 readable", "0.40 [0.10, 0.30]; 0.98 readable", *["–"] * 3, "– |"],
        ["| `worse`", "0.20 [0.10, 0.30]; 0.98 readable", *["–"] * 4, "– |"],
    ]
    ends = ["0.90", "0.40", "2.0", "10.0", "0.50", "2.0", "1.50"]
    assert better == ["| `better`", "0.500", "–", "–", *ends, "100 |"]
    assert worse == ["| `worse`", "0.100", "-0.400 [-0.500, -0.300]", "0.020", *ends, "16 |"]
