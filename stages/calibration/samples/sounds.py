"""Read sounds: PCM .wav files with the standard library, others with soundfile where it is installed."""

from __future__ import annotations

import importlib
import wave
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from stages.errors import UserError, in_one_line

SOUNDS = frozenset({".wav", ".flac", ".mp3", ".ogg", ".m4a"})
_PCM = {1: ("u1", 128, 128), 2: ("<i2", 0, 1 << 15), 4: ("<i4", 0, 1 << 31)}
"""numpy type, offset and full scale of a .wav file's numbers, by their bytes."""


def read_sound(file: Path, rate: int) -> Float32[np.ndarray, " T"]:
    """Return a sound as one channel of numbers from -1 to 1, ``rate`` a second.

    Raises:
        UserError: the file can't be read, or soundfile, which it needs, isn't installed.
    """
    try:
        numbers, own_rate = _pcm(file) if file.suffix.lower() == ".wav" else _by_soundfile(file)
    except (OSError, EOFError, wave.Error, KeyError) as error:
        try:
            numbers, own_rate = _by_soundfile(file)
        except UserError:
            raise UserError(
                f"{file} can't be read ({in_one_line(error)}); save it as 16-bit PCM .wav, or pip install soundfile."
            ) from error
    return resampled(numbers.mean(axis=1), own_rate, rate)


def _pcm(file: Path) -> tuple[np.ndarray, int]:
    with wave.open(str(file)) as sound:
        kind, offset, scale = _PCM[sound.getsampwidth()]
        raw = np.frombuffer(sound.readframes(sound.getnframes()), kind).astype(np.float64)
        return ((raw - offset) / scale).reshape(-1, sound.getnchannels()), sound.getframerate()


def _by_soundfile(file: Path) -> tuple[np.ndarray, int]:
    try:
        soundfile = importlib.import_module("soundfile")  # optional
    except ImportError as error:
        raise UserError(
            f"{file} needs the package soundfile; pip install soundfile, or save it as 16-bit PCM .wav."
        ) from error
    try:
        numbers, rate = soundfile.read(file, always_2d=True)
    except Exception as error:  # its own classes, which change with its version
        raise UserError(f"{file} can't be read as sound ({in_one_line(error)}); leave it out.") from error
    return numbers, rate


def resampled(numbers: np.ndarray, own_rate: int, rate: int) -> Float32[np.ndarray, " T"]:
    """Return a signal of ``own_rate`` numbers a second as ``rate`` a second: its spectrum, cut or filled with zeros.

    Args:
        numbers: [T], taken as one period.
        own_rate: of ``numbers``.
        rate: of the result.
    """
    if own_rate == rate or not len(numbers):
        return numbers.astype(np.float32)
    length = max(1, round(len(numbers) * rate / own_rate))
    spectrum = np.fft.rfft(numbers)[: length // 2 + 1]
    return (np.fft.irfft(spectrum, length) * (length / len(numbers))).astype(np.float32)
