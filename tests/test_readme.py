"""Figures that README quotes are those of the tables it names."""

import re

import pandas as pd

from tests.tiny import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title):
    return re.search(rf"^##+ {re.escape(title)}\n(.*?)(?=^##)", README, flags=re.DOTALL | re.MULTILINE).group(1)


def test_speeds_on_a_gpu_are_those_of_the_bench():
    text, table = section("On a GPU"), pd.read_csv(ROOT / "results/bench/gpu.csv")
    table = table[(table.model == "7b")]
    lines = {
        "`generate`, unguided": ("unguided", 0), "`GuidedDecoder`, unguided": ("ours", 0),
        "`GuidedDecoder`, two ARMs": ("ours", 2), "`GuidedDecoder`, a 1B model as ARM": ("own", 1),
        "naive: a plain logits processor, two ARMs": ("naive", 2),
    }  # fmt: skip
    quoted = {cells[0]: cells[1:] for line in text.splitlines() if len(cells := re.split(r" *\| *", line)[1:-1]) == 5}
    for title, (method, k) in lines.items():
        rows = table[(table.method == method) & (table.k == k) & (table.prompt_tokens == 64)].set_index("batch")
        for batch, said in zip((1, 8, 32, 128), quoted[title], strict=True):
            assert said == "–" if batch not in rows.index else int(said) == round(rows.tokens_per_s[batch])
    steps = table[(table.batch == 1) & (table.prompt_tokens == 64)].set_index(["method", "k"]).step_ms
    for said in (f"{steps['ours', 0]} ms", f"{steps['ours', 2]} ms", f"{steps['eager', 2]} ms"):
        assert said in text
    assert f"{steps['ours', 0] / steps['ours', 2]:.2f} of the unguided" in text
    share = table[(table.method == "ours") & (table.k == 0) & (table.batch == 1) & (table.prompt_tokens == 64)]
    assert f"{share.bandwidth_share.item():.2f} of the unguided step" in text
    trained = pd.read_csv(ROOT / "results/bench/gpu_training.csv").set_index(["model", "kind", "trainer"])
    for model in ("7b", "1b"):
        for trainer in ("ours", "trl"):
            row = trained.loc[(model, "short", trainer)]
            assert re.search(rf"{row.pairs_per_s:.1f}[^.]* in {row.peak_gb:.1f} GB", text)
