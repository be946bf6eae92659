"""Make arrays of images and sounds as the model's own processor does: onnxruntime-genai's, else transformers'."""

from __future__ import annotations

import importlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir
from pydantic import TypeAdapter

from stages.calibration.samples.arrays import require_fits
from stages.calibration.samples.sounds import SOUNDS, read_sound
from stages.errors import UserError, in_one_line, with_class_name
from stages.model.directory import ModelDirectory
from stages.runtime.feeds import Sample
from stages.system.json_file import read_json

if TYPE_CHECKING:
    from PIL.Image import Image

_LOGGER = logging.getLogger(__name__)
Medium = Literal["images", "sounds"]
IMAGES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"})
_HUGGING_FACE = ("preprocessor_config.json", "processor_config.json")
_DESCRIPTIONS = ("processor", "feature_extraction")
"""Keys of which the files have one that describe onnxruntime-genai's processors; their names differ."""
_SAME: Mapping[str, str] = {
    "input_features": "audio_features", "input_values": "audio_features", "audio_embeds": "audio_features",
    "image_grid_thw": "image_grid_thw",
}  # fmt: skip
"""What onnxruntime-genai calls the arrays of transformers' processors."""
_LARGEST_DESCRIPTION = 1 << 20
"""Bytes; tokenizers are larger."""
_PROMPT = "a"
"""Whisper's processor refuses an empty one; those of images put their own tags into an empty one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """Makes arrays of files."""

    title: str
    """In words, for tables."""
    read: Callable[[Path], Mapping[str, np.ndarray]]
    """Returns what it makes of one file, by its own names."""


def medium_of(file: Path) -> Medium | None:
    """Return what a file holds, by the end of its name; None where it is neither image nor sound."""
    suffix = file.suffix.lower()
    return "images" if suffix in IMAGES else "sounds" if suffix in SOUNDS else None


def read_media(
    files: Sequence[Path], processor: Processor, directory: ModelDirectory, inputs: Mapping[str, ir.Value]
) -> Iterator[Sample]:
    """Yield what ``processor`` makes of each file, by the names of the graph's inputs.

    Args:
        files: images or sounds.
        processor: the model's.
        directory: names inputs as genai_config.json does.
        inputs: the graph's, by name.

    Raises:
        UserError: a file can't be read, or nothing that it becomes fits the graph.
    """
    for file in files:
        made = processor.read(file)
        sample = named_for_graph(made, directory, inputs)
        if not sample:
            raise UserError(
                f"{processor.title} makes {', '.join(made)} of {file}, and the graph takes {', '.join(inputs)}; pass "
                "the model's own processor as --model_name, or .npz files."
            )
        for name, array in sample.items():
            require_fits(str(file), array, inputs[name])
        yield sample


def named_for_graph(
    made: Mapping[str, np.ndarray], directory: ModelDirectory, inputs: Mapping[str, ir.Value]
) -> dict[str, np.ndarray]:
    """Return the arrays that the graph takes, by its inputs' names.

    An array goes to the input of its name, of the name that genai_config.json has for it, or of onnxruntime-genai's
    name; where one input is left and one array of its rank, to that.
    """
    found: dict[str, np.ndarray] = {}
    left = dict(made)
    for key, array in made.items():
        names = (key, directory.input_names.get(key), directory.input_names.get(_SAME.get(key, "")), _SAME.get(key))
        name = next((name for name in names if name in inputs and name not in found), None)
        if name is not None:
            found[name] = array
            del left[key]
    lacking = [name for name in inputs if name not in found]
    if len(lacking) == 1:
        shape = inputs[lacking[0]].shape
        fitting = [array for array in left.values() if shape is None or array.ndim == len(shape)]
        if len(fitting) == 1:
            found[lacking[0]] = fitting[0]
    return found


def find_processor(
    directory: ModelDirectory, medium: Medium, model_name: str | None, *, trust_remote_code: bool
) -> Processor:
    """Return the processor of a model: onnxruntime-genai's where its package describes one, else transformers'.

    Args:
        directory: the model.
        medium: what it shall read.
        model_name: a hub name or folder to take transformers' processor from; None: the model's own.
        trust_remote_code: whether the processor's own Python code may run.

    Raises:
        UserError: there is none, or it can't be loaded.
    """
    if model_name is None and _has_genai_processor(directory):
        try:
            return _of_genai(directory, medium)
        except UserError as error:
            if not _has_transformers_processor(directory.folder):
                raise
            _LOGGER.info("transformers' processor takes the place of onnxruntime-genai's: %s", error)
    if model_name is None and not _has_transformers_processor(directory.folder):
        raise UserError(
            f"{directory.folder} describes no processor of {medium} ({_HUGGING_FACE[0]}); copy it there from the "
            "model's repository, name that as --model_name, or pass .npz files."
        )
    return _of_transformers(model_name or str(directory.folder), medium, trust_remote_code=trust_remote_code)


def _has_genai_processor(directory: ModelDirectory) -> bool:
    return directory.has_genai_config and any(map(_describes_genai, sorted(directory.folder.glob("*.json"))))


def _has_transformers_processor(folder: Path) -> bool:
    found = (folder / name for name in _HUGGING_FACE)
    return any(file.is_file() and not _describes_genai(file) for file in found)


def _describes_genai(file: Path) -> bool:
    if not file.is_file() or file.stat().st_size > _LARGEST_DESCRIPTION:
        return False
    content = read_json(file, TypeAdapter(dict[str, Any])) or {}
    return any(isinstance(content.get(key), dict) for key in _DESCRIPTIONS)


def _of_genai(directory: ModelDirectory, medium: Medium) -> Processor:
    """Return onnxruntime-genai's processor, which belongs to an open model."""
    try:
        runtime: Any = importlib.import_module("onnxruntime_genai")
        processor = runtime.Model(str(directory.folder)).create_multimodal_processor()
    except Exception as error:  # onnxruntime-genai raises classes without a common base
        raise UserError(
            f"onnxruntime-genai's processor of {directory.folder} can't be opened ({in_one_line(error)}); name "
            "transformers' processor as --model_name, or pass .npz files."
        ) from error

    def read(file: Path) -> dict[str, np.ndarray]:
        try:
            if medium == "images":
                made = processor("", images=runtime.Images.open_bytes(_as_png(file)))
            else:
                made = processor([_PROMPT], audios=runtime.Audios.open(str(file)))
            return {name: np.array(made[name].as_numpy()) for name in made.keys()}  # noqa: SIM118 - no mapping
        except UserError:
            raise
        except Exception as error:  # onnxruntime-genai raises classes without a common base
            raise UserError(
                f"onnxruntime-genai's processor can't read {file} ({in_one_line(error)}); leave it out, or name "
                "transformers' processor as --model_name."
            ) from error

    return Processor(title="onnxruntime-genai's", read=read)


def _of_transformers(path: str, medium: Medium, *, trust_remote_code: bool) -> Processor:
    """Return an image processor or a feature extractor of transformers, from a folder or the hub."""
    import transformers  # here, because it takes seconds

    kind: Any = transformers.AutoImageProcessor if medium == "images" else transformers.AutoFeatureExtractor
    try:
        processor = kind.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and the hub's clients raise classes without a common base
        raise UserError(
            f"No processor of {medium} can be loaded from {path} ({with_class_name(error)}); pass a folder that has "
            "one, or the model's hub name, as --model_name, or pass .npz files."
        ) from error

    def read(file: Path) -> dict[str, np.ndarray]:
        try:
            made = (
                _image(processor, file) if medium == "images" else _sound(processor, int(processor.sampling_rate), file)
            )
        except UserError:
            raise
        except Exception as error:  # Pillow and transformers raise classes without a common base
            raise UserError(f"{file} can't be read ({in_one_line(error)}); leave it out.") from error
        return {name: np.asarray(value) for name, value in made.items()}

    return Processor(title=type(processor).__name__, read=read)


def _image(processor: Callable[..., Mapping[str, Any]], file: Path) -> Mapping[str, Any]:
    return processor(images=[_opened(file)], return_tensors="pt")


def _as_png(file: Path) -> bytes:
    """Return an image as PNG: onnxruntime-genai ends the process at a damaged one, and reads few other formats."""
    content = io.BytesIO()
    _opened(file).save(content, "PNG")
    return content.getvalue()


def _opened(file: Path) -> Image:
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError(f"{file} needs the package Pillow; pip install pillow, or pass .npz files.") from error
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for damaged files
        raise UserError(f"{file} can't be read as an image ({in_one_line(error)}); leave it out.") from error


def _sound(processor: Callable[..., Mapping[str, Any]], rate: int, file: Path) -> Mapping[str, Any]:
    return processor(read_sound(file, rate), sampling_rate=rate, return_tensors="np")
