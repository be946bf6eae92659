"""Open a base model lazily: the graph in memory, the weights left in their mapped files."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from stages.errors import GraphError
from stages.external_data import external_tensors
from stages.model_directory import ModelDirectory


def load_graph(directory: ModelDirectory) -> ir.Model:
    """Parse the .onnx file; weights stay external tensors that map their file when read.

    Raises:
        GraphError: the file isn't an ONNX model, or its external data is missing or truncated.
    """
    try:
        model = ir.load(directory.onnx_file)
    except PermissionError as error:
        raise GraphError(
            f"{directory.onnx_file} can't be read ({error.strerror}); get the right to read it."
        ) from error
    except Exception as error:  # protobuf and onnx-ir raise their own classes for damaged files
        raise GraphError(f"{directory.onnx_file} is not a readable ONNX model ({error}); build it again.") from error
    _check_external_data(model)
    return model


def _check_external_data(model: ir.Model) -> None:
    sizes: dict[Path, int] = {}
    for tensor in external_tensors(model):
        path = Path(tensor.path)
        if path not in sizes:
            if not path.is_file():
                raise GraphError(f"External data file {path} is missing; put it beside the model or build it again.")
            sizes[path] = path.stat().st_size
            _require_readable(tensor, path)
        end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
        if end > sizes[path]:
            raise GraphError(
                f"External data file {path} is truncated: '{tensor.name}' ends at byte {end}, the file has "
                f"{sizes[path]}; copy or build it again."
            )


def _require_readable(tensor: ir.ExternalTensor, path: Path) -> None:
    """onnx-ir reads no external data through links that lead out of the model's folder, for safety."""
    if tensor.nbytes > path.stat().st_size:
        return
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
