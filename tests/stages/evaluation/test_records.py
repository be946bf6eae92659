"""Evaluations: what is measured again replaces what was known, and the rest stays."""

from __future__ import annotations

from dataclasses import replace

from stages.evaluation.records import Evaluation
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
    found = replace(bare, generations=(again, new), tasks=(replace(earlier.tasks[0], value=0.5),)).kept_from(earlier)
    assert found.generations == (again, new)
    assert [score.value for score in found.tasks] == [0.5]
    assert found.speed == earlier.speed
