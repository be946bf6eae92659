"""Samples give inputs by name; what follows from their tokens needn't be in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto

from stages.errors import GraphError
from stages.model.directory import locate_model
from stages.runtime.feeds import SampleFeeds
from tests.support.encoders import save_text_encoder, save_vision


def opened(file: Path) -> ort.InferenceSession:
    return ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def test_numbers_come_in_the_declared_type(tmp_path: Path) -> None:
    file = save_vision(tmp_path, dtype=TensorProto.FLOAT16)
    feeds = SampleFeeds.of(opened(file), locate_model(file), names=frozenset({"pixel_values"}))
    fed = feeds({"pixel_values": np.ones((1, 3, 16, 16))})
    assert {name: value.dtype for name, value in fed.items()} == {"pixel_values": np.float16}


def test_a_mask_follows_from_the_tokens_unless_the_sample_has_it(tmp_path: Path) -> None:
    file = save_text_encoder(tmp_path, 30)
    session, directory = opened(file), locate_model(file)
    tokens = np.array([[3, 4, 5]], np.int32)
    fed = SampleFeeds.of(session, directory, names=frozenset({"input_ids"}))({"input_ids": tokens})
    assert {name: (value.dtype, value.tolist()) for name, value in fed.items()} == {
        "input_ids": (np.int64, [[3, 4, 5]]),
        "attention_mask": (np.int64, [[1, 1, 1]]),
    }
    names = frozenset({"input_ids", "attention_mask"})
    fed = SampleFeeds.of(session, directory, names=names)(
        {"input_ids": tokens, "attention_mask": np.array([[1, 0, 0]])}
    )
    assert fed["attention_mask"].tolist() == [[1, 0, 0]]


def test_an_input_that_nothing_gives_is_named(tmp_path: Path) -> None:
    file = save_text_encoder(tmp_path, 30)
    with pytest.raises(GraphError, match="'input_ids' has no default and isn't in the samples"):
        SampleFeeds.of(opened(file), locate_model(file), names=frozenset({"attention_mask"}))
