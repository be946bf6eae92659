"""Evaluations: what is measured again replaces what was known, and the rest stays."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from stages.evaluation.records import Evaluation, load_evaluation, save_evaluation
from tests.stages.report import sample


def test_what_is_asked_again_replaces_what_was_known() -> None:
    earlier = sample.evaluation()
    bare = Evaluation(comparison=earlier.comparison, rows=earlier.rows)
    assert bare.kept_from(earlier) == earlier
    assert bare.kept_from(None) == bare
    other_text = replace(earlier, comparison=replace(earlier.comparison, text="other"))
    assert bare.kept_from(other_text) == bare
    again = replace(earlier.generations[0], templated=False)
    new = replace(earlier.generations[0], prompt="another")
    base, int4 = earlier.tasks
    score = replace(base, value=0.25)
    found = replace(bare, generations=(again, new), tasks=(score,)).kept_from(earlier)
    assert found.generations == (again, new)
    assert set(found.tasks) == {score, int4}
    assert found.speed == earlier.speed


def test_records_that_name_no_levels_are_read_and_hold_for_no_comparison(tmp_path: Path) -> None:
    found = sample.evaluation()
    levels = replace(found.comparison, accuracy_levels=(1, 1, 1))
    save_evaluation(replace(found, comparison=levels), path := tmp_path / "found.json")
    assert load_evaluation(path, levels) is not None
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["comparison"]["accuracy_levels"]
    path.write_text(json.dumps(content), encoding="utf-8")
    assert load_evaluation(path, levels) is None
    assert load_evaluation(path, found.comparison) == found
