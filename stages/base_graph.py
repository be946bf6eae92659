"""Open a base model lazily: the graph in memory, weights left in their mapped files, damage named at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from stages.errors import GraphError
from stages.external_data import external_tensors
from stages.model_directory import ModelDirectory


def load_graph(directory: ModelDirectory) -> ir.Model:
    """Parse the .onnx file; weights stay external tensors that map their file when read.

    Raises:
        GraphError: the file isn't an ONNX model; its external data is missing, a link or truncated; or a graph output
            is made by no node.
    """
    try:
        model = ir.load(directory.onnx_file)
    except PermissionError as error:
        raise GraphError(
            f"{directory.onnx_file} can't be read ({error.strerror}); get the right to read it."
        ) from error
    except Exception as error:  # protobuf and onnx-ir raise their own classes for damaged files
        raise GraphError(f"{directory.onnx_file} is not a readable ONNX model ({error}); build it again.") from error
    for path in external_files(model):
        _require_real_file(path, directory.folder)
    _require_whole(model)
    _require_outputs(model, directory)
    return model


def external_files(model: ir.Model) -> Iterator[Path]:
    """The external data files that ``model``'s initializers lie in, each once."""
    yield from dict.fromkeys(Path(tensor.path).resolve() for tensor in external_tensors(model))


def _require_real_file(path: Path, folder: Path) -> None:
    """onnx-ir refuses to read through links, which could lead anywhere; say so before anything is computed."""
    if not path.is_file():
        raise GraphError(f"External data file {path} is missing; put it beside the model or build it again.")
    if folder.resolve() not in path.parents or path.stat().st_nlink > 1:
        raise GraphError(f"External data file {path} is a link; copy the base folder with its files and pass that.")


def _require_whole(model: ir.Model) -> None:
    sizes = {path: path.stat().st_size for path in external_files(model)}
    tried: set[Path] = set()
    for tensor in external_tensors(model):
        path = Path(tensor.path).resolve()
        end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
        if end > sizes[path]:
            raise GraphError(
                f"External data file {path} is truncated: '{tensor.name}' ends at byte {end}, the file has "
                f"{sizes[path]}; copy or build it again."
            )
        if path not in tried:
            tried.add(path)
            _require_readable(tensor, path)


def _require_readable(tensor: ir.ExternalTensor, path: Path) -> None:
    """One tensor of each file is mapped once: permissions, and whatever else onnx-ir may refuse."""
    try:
        tensor.numpy()
    except PermissionError as error:
        raise GraphError(
            f"External data file {path} can't be read ({error.strerror}); get the right to read it."
        ) from error
    except (ValueError, OSError) as error:
        raise GraphError(f"External data file {path} can't be read ({error}); put a real copy there.") from error
    finally:
        tensor.release()


def _require_outputs(model: ir.Model, directory: ModelDirectory) -> None:
    """onnxruntime-genai 0.18 builds float32 models for cuda, dml and NvTensorRtRtx that no runtime opens."""
    for value in model.graph.outputs:
        if value.producer() is None and not value.is_graph_input() and not value.is_initializer():
            raise GraphError(
                f"{directory.onnx_file} is not a valid model: no node makes its output '{value.name}' "
                "(onnxruntime-genai's builder writes such graphs for some precisions of an execution provider); build "
                "it with --precision fp16, or for cpu."
            )
