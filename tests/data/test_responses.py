import json
from dataclasses import replace

import pytest

from pipeline.config.errors import UserError
from pipeline.data.responses import read_generated, write_generated
from tests.judges import generated

ROW = generated("Why?", "So.", tokens=[3, 1], point="base", finish="length", left_out=0.25)


def test_a_row_comes_back_from_its_file_as_it_was(tmp_path):
    judged = replace(ROW, tokens=(), scores={"positivity": 0.5, "brevity": None})
    write_generated(tmp_path / "rows.jsonl", [ROW])
    write_generated(tmp_path / "scores.jsonl", [judged])
    assert list(read_generated(tmp_path / "rows.jsonl")) == [ROW]
    assert list(read_generated(tmp_path / "scores.jsonl", ["positivity", "brevity"])) == [judged]
    assert judged.to_json().keys() >= {"positivity", "brevity"} and "tokens" not in judged.to_json()


@pytest.mark.parametrize(("lacking", "objectives"), [("kl", []), ("positivity", ["positivity"])])
def test_a_row_that_lacks_something_is_named(tmp_path, lacking, objectives):
    lines = [ROW.to_json() | {"positivity": 1.0}, ROW.to_json() | {"positivity": 0.0}]
    del lines[1][lacking]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=rf"rows\.jsonl, line 2: not a generated row .*{lacking}.*run its stage again"):
        list(read_generated(tmp_path / "rows.jsonl", objectives))
