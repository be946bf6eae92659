"""The command line: one line and exit code 2 for what a person can fix."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest

from export.__main__ import command, export
from stages.commands.quantize_options import ExportConfig
from stages.errors import CacheMismatch, OptionError
from tests.export.exports import TinyExport, tiny_export
from tests.support.commands import Commands


def config(tiny: TinyExport) -> ExportConfig:
    return ExportConfig(onnx_path=tiny.base.folder, weights_path=tiny.store.folder, output_path=tiny.output)


def test_weights_go_into_their_own_base(tmp_path: Path) -> None:
    tiny = tiny_export(tmp_path)
    (section,) = command(config(tiny))
    assert (tiny.output / "model.onnx").is_file()
    assert section.record.report.fused == 2


def test_another_form_can_be_written_from_the_same_weights(tmp_path: Path) -> None:
    tiny = tiny_export(tmp_path)
    exported = export(replace(config(tiny), weight_operator="matmul_nbits"))
    assert exported.report is not None
    assert exported.report.fused == 2
    operators = [node.op_type for node in ir.load(tiny.output / "model.onnx").graph]
    assert operators.count("MatMulNBits") == 2
    assert "DequantizeLinear" not in operators


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    tiny = tiny_export(tmp_path)
    data = tiny.base.folder / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[0] ^= 1
    data.write_bytes(content)
    with pytest.raises(CacheMismatch, match="another model"):
        export(config(tiny))
    assert not tiny.output.exists()


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    tiny = tiny_export(tmp_path)
    (tiny.store.folder / "recipe.json").unlink()
    with pytest.raises(OptionError, match=r"recipe\.json"):
        export(config(tiny))


def test_a_user_error_is_one_line_and_exit_code_2(tmp_path: Path, commands: Commands) -> None:
    tiny = tiny_export(tmp_path)
    tiny.store.group_file(1).unlink()
    arguments = ["--onnx_path", tiny.base.folder, "--weights_path", tiny.store.folder, "--output_path", tiny.output]
    code, printed = commands.export(*arguments)
    assert code == 2
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert "run python -m stages.quantize again" in printed
    assert not tiny.output.exists()
