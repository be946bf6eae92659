"""Weights are checked from the written file while others are still written, with the results of checks behind it."""

from __future__ import annotations

import threading
from pathlib import Path

import onnx_ir as ir
import pytest

import export.verify.while_written
from export.rewrite import RewriteResult, rewrite
from export.save import data_name, save_model
from export.verify.while_written import SiteChecks
from stages.errors import GraphError
from stages.records.formats import WeightForm
from tests.export.builders import spec_of
from tests.export.exports import tiny_export

CODES = ["up/MatMul/codes", "down/MatMul/codes"]


def rewritten(folder: Path, form: WeightForm = WeightForm.DQ) -> tuple[RewriteResult, Path]:
    tiny = tiny_export(folder, spec=spec_of(4, symmetric=False), form=form)
    tiny.output.mkdir()
    return rewrite(ir.load(tiny.base.onnx_file), tiny.store), tiny.output


def test_a_weight_is_checked_before_the_next_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, folder = rewritten(tmp_path)
    checked, check_site = threading.Event(), export.verify.while_written.check_site

    def check(*arguments: object) -> tuple[float, ...]:
        errors = check_site(*arguments)  # type: ignore[arg-type]
        checked.set()
        return errors

    monkeypatch.setattr(export.verify.while_written, "check_site", check)
    with SiteChecks(folder / "model.onnx", result.sites, "full") as checks:

        def written(name: str) -> None:
            checks.written(name)
            # All of "up" is in the file once the scales of "down" follow.
            assert not name.startswith("down") or checked.wait(60)

        save_model(result.model, folder, "model.onnx", written)
        streamed = checks.results()
    with SiteChecks(folder / "model.onnx", result.sites, "full") as checks:
        assert checks.results() == streamed
    assert [error.site for error in streamed] == ["up/MatMul", "down/MatMul"]


def test_a_byte_that_the_disk_changes_stops_the_writing(tmp_path: Path) -> None:
    result, folder = rewritten(tmp_path)
    data, seen = folder / data_name("model.onnx"), list[str]()
    with SiteChecks(folder / "model.onnx", result.sites, "quick") as checks:

        def written(name: str) -> None:
            seen.append(name)
            if name == CODES[0]:
                content = bytearray(data.read_bytes())
                content[-1] ^= 1
                data.write_bytes(content)
            checks.written(name)
            while name == CODES[0]:  # until the check has found it
                checks.written("")

        with pytest.raises(GraphError, match=f"'{CODES[0]}' differs"):
            save_model(result.model, folder, "model.onnx", written)
    assert CODES[0] in seen
    assert CODES[1] not in seen


@pytest.mark.parametrize("form", list(WeightForm))
def test_every_tensor_is_announced_once_and_lies_where_the_graph_says(tmp_path: Path, form: WeightForm) -> None:
    result, folder = rewritten(tmp_path, form)
    names = list[str]()
    save_model(result.model, folder, "model.onnx", names.append)
    saved, offset = ir.load(folder / "model.onnx").graph.initializers, 0
    outside = [value.const_value for value in saved.values() if isinstance(value.const_value, ir.ExternalTensor)]
    assert names == [tensor.name for tensor in outside]
    for tensor in outside:
        written = result.model.graph.initializers[str(tensor.name)].const_value
        assert written is not None
        assert (tensor.offset, tensor.tobytes()) == (offset, written.tobytes())
        offset += tensor.nbytes
    assert offset == (folder / data_name("model.onnx")).stat().st_size
