"""Files of one kind in a folder become samples in an order that the seed gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stages.calibration.samples.load import load_samples, sample_files
from stages.commands.calibrate_options import TextOptions
from stages.errors import GraphError, OptionError, UserError
from stages.model.directory import locate_model
from stages.model.load import load_graph
from tests.support.encoders import save_text_encoder, save_vision


def test_a_folder_of_arrays(tmp_path: Path) -> None:
    save_vision(tmp_path / "model")
    pixels = np.random.default_rng(0).standard_normal((12, 3, 16, 16)).astype(np.float32)
    (tmp_path / "data" / "deeper").mkdir(parents=True)
    for number in range(11):
        np.savez(tmp_path / "data" / f"{number}.npz", pixel_values=pixels[number])
    np.savez(tmp_path / "data" / "deeper" / "last.npz", pixel_values=pixels[11:])
    (tmp_path / "data" / "labels.csv").write_text("not an array")
    directory = locate_model(tmp_path / "model")
    model = load_graph(directory)

    def loaded(**options: int) -> np.ndarray:
        found = load_samples(TextOptions(samples=str(tmp_path / "data"), **options), model, directory, "")
        samples = (*found.calibration, *found.held_out, *found.unseen)
        return np.concatenate([sample["pixel_values"] for sample in samples])

    found = loaded()
    assert {each.tobytes() for each in found} == {each.tobytes() for each in pixels}
    np.testing.assert_array_equal(found, loaded())
    assert not np.array_equal(found, loaded(seed=1))
    assert len(loaded(calib_size=4)) == 5


def test_files_of_several_kinds_or_of_none_are_refused(tmp_path: Path) -> None:
    save_vision(tmp_path / "model")
    directory = locate_model(tmp_path / "model")
    data = tmp_path / "data"
    data.mkdir()
    options = TextOptions(samples=str(data))
    with pytest.raises(UserError, match="holds neither"):
        load_samples(options, load_graph(directory), directory, "")
    (data / "a.png").touch()
    (data / "b.wav").touch()
    with pytest.raises(UserError, match="holds images and sounds; pass files of one"):
        load_samples(options, load_graph(directory), directory, "")
    with pytest.raises(UserError, match="does not exist"):
        sample_files(tmp_path / "nothing")


def test_an_input_that_no_array_gives_is_named(tmp_path: Path) -> None:
    save_text_encoder(tmp_path / "model", 30)
    directory = locate_model(tmp_path / "model")
    np.savez(tmp_path / "x.npz", attention_mask=np.ones((4, 5), np.int64))
    options = TextOptions(samples=str(tmp_path / "x.npz"))
    with pytest.raises(GraphError, match="'input_ids' has no default and isn't in the samples"):
        load_samples(options, load_graph(directory), directory, "")
    np.savez(tmp_path / "x.npz", input_ids=np.ones((4, 5), np.int64))  # the mask follows from the tokens
    assert load_samples(options, load_graph(directory), directory, "").names == {"input_ids"}


def test_samples_are_named_by_component() -> None:
    options = TextOptions(samples="vision=a,speech=b/c=d")
    assert (options.samples_of("vision"), options.samples_of("speech")) == (Path("a"), Path("b/c=d"))
    assert options.samples_of("decoder") is None
    assert TextOptions(samples="a").samples_of("decoder") == Path("a")
    assert TextOptions(samples="a").samples_of("decoder", unnamed=False) is None


def test_a_list_with_a_gap_is_refused(tmp_path: Path) -> None:
    from stages.commands.calibrate_options import CalibrateConfig

    with pytest.raises(OptionError, match="a comma or a name without a path"):
        CalibrateConfig(onnx_path=tmp_path, samples="vision=a,,speech=b").validate()
