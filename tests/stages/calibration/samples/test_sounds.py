"""Sounds come out as one channel of numbers from -1 to 1, at the rate that is asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stages.calibration.samples.sounds import read_sound, resampled
from stages.errors import UserError
from tests.support.encoders import save_sound


@pytest.mark.parametrize(("kind", "scale", "offset"), [("u1", 127, 128), ("<i2", 32767, 0), ("<i4", 2**31 - 1, 0)])
def test_pcm_of_each_width(kind: str, scale: int, offset: int, tmp_path: Path) -> None:
    wave = np.sin(np.arange(400) / 9)
    save_sound(tmp_path / "x.wav", (wave * scale + offset).astype(kind), 8000)
    np.testing.assert_allclose(read_sound(tmp_path / "x.wav", 8000), wave, atol=2 / scale)


def test_channels_are_averaged(tmp_path: Path) -> None:
    save_sound(tmp_path / "x.wav", np.array([[1000, 3000]] * 5, "<i2"), 8000)
    np.testing.assert_allclose(read_sound(tmp_path / "x.wav", 8000), 2000 / 32768)


@pytest.mark.parametrize(("own", "rate"), [(44100, 16000), (8000, 16000), (16000, 16000)])
def test_resampling_keeps_tones(own: int, rate: int) -> None:
    """The oracle is the tone itself, computed at the other rate; a second holds whole periods."""
    tone = np.sin(2 * np.pi * 440 * np.arange(own) / own)
    np.testing.assert_allclose(resampled(tone, own, rate), np.sin(2 * np.pi * 440 * np.arange(rate) / rate), atol=1e-5)


def test_what_is_no_sound_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.wav").write_bytes(b"RIFF no sound")
    with pytest.raises(UserError, match=r"x\.wav can't be read"):
        read_sound(tmp_path / "x.wav", 16000)
