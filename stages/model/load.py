"""Load a model's graph, its weights left in their files, refuse what is damaged, and take its fingerprint."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass

from stages.errors import GraphError, in_one_line
from stages.model.directory import ModelDirectory
from stages.model.form.convolution import write_convolutions
from stages.model.form.packed_attention import write_packed_attention
from stages.model.form.validate import fault_of_graph, fault_of_proto, opset_of
from stages.model.genai_config import EMBEDDED
from stages.model.patterns import STANDARD_DOMAINS, is_constant

_FIRST_WITH_OPTIONAL_INPUTS = 4
"""IR version since which an initializer that is an input of the graph is its default."""
ADAPTER_NAME = re.compile("lora|adapter", re.IGNORECASE)
"""What names of inputs that hold an adapter's weights tell."""
_LFS_POINTER = b"version https://git-lfs"
_SAMPLE = 4096
"""Bytes of each end of a tensor that are hashed."""


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """Yield every initializer that lies in an external data file, subgraphs included, in the graph's order."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value


def load_graph(directory: ModelDirectory) -> ir.Model:
    """Parse the .onnx file; weights stay external tensors that map their file when read.

    Raises:
        GraphError: the file isn't an ONNX model, or its graph is invalid; its external data is missing, a link,
            elsewhere or truncated; or no node makes a graph output.
    """
    model = parse_graph(directory)
    require_weights(model, directory)
    return model


def require_weights(model: ir.Model, directory: ModelDirectory) -> None:
    """Raise GraphError where external data of ``model`` is missing, a link, elsewhere or truncated."""
    _require_known_paths(model, directory.onnx_file)
    for path in external_files(model):
        _require_real_file(path, directory.onnx_file)
    _require_whole(model)


def parse_graph(directory: ModelDirectory) -> ir.Model:
    """Parse only the .onnx file: the data files may be missing.

    Raises:
        GraphError: the file isn't an ONNX model, its graph is invalid, or no node makes an output.
    """
    file = directory.onnx_file
    try:
        proto = onnx.load(file, load_external_data=False)
        fault = fault_of_proto(proto)
        model = ir.from_proto(proto)
        place_weights(model, file)
        fault = fault or (fault_of_graph(model) if model.graph.outputs else None)
    except Exception as error:  # protobuf and onnx-ir raise their own classes for damaged files
        raise _unreadable(file, error) from error
    _require_any_output(model, file)
    _require_known_opset(model, file)
    if fault is not None:
        raise GraphError(f"{file} is not a valid model: {fault}; build it again.")
    _require_outputs(model, directory)
    _normalize(model)
    return model


def read_graph(file: Path) -> ir.Model:
    """Parse an .onnx file as it stands, for its inputs, outputs and nodes.

    Raises:
        GraphError: it isn't an ONNX model.
    """
    try:
        model = ir.load(file)
    except Exception as error:  # see parse_graph
        raise _unreadable(file, error) from error
    _require_any_output(model, file)
    return model


def _unreadable(file: Path, error: Exception) -> GraphError:
    """Return what a person is told where parsing ``file`` raised ``error``."""
    if isinstance(error, PermissionError):
        return GraphError(f"{file} can't be read ({error.strerror}); get the right to read it.")
    _require_fetched(file)
    if file.suffix.lower() != ".onnx":
        return GraphError(f"{file} is not a readable ONNX model; pass an .onnx file, or the folder that holds one.")
    reason = "it is damaged, or a file of another kind" if isinstance(error, DecodeError) else in_one_line(error)
    return GraphError(f"{file} is not a readable ONNX model ({reason}); build it again.")


def _require_any_output(model: ir.Model, file: Path) -> None:
    """Raise GraphError for a graph without outputs: any few bytes may parse as one."""
    if not model.graph.outputs:
        raise GraphError(f"{file} is not a readable ONNX model (it has no outputs); build it again.")


def _require_known_opset(model: ir.Model, file: Path) -> None:
    version, newest = opset_of(model) or 0, onnx.defs.onnx_opset_version()
    if version > newest:
        raise GraphError(
            f"{file} has opset {version}, and the installed onnx {onnx.__version__} knows {newest}; upgrade it (pip "
            "install -U onnx onnxruntime), or build the base again with a lower opset."
        )


def _normalize(model: ir.Model) -> None:
    """Give ``model`` one form, whatever exporter wrote it; it computes what it did.

    Ensures: functions are written out where they are called; weights are initializers, no Constant nodes and not behind
    Identity; they are no inputs of the graph, but for those that only some models have (adapters); all have a shape;
    products with a constant matrix are MatMuls also where a Conv or an Attention node computed them.
    """
    if model.functions:
        for function in model.functions.values():
            # As in ONNX Runtime, which reads their operators as those of the graph, whatever opset they name.
            function.opset_imports.update(model.opset_imports)
        InlinePass()(model)
        model.graph.sort()
    LiftConstantsToInitializersPass()(model)
    for node in tuple(model.graph):
        _bypass_identity(node)
    if _lists_weights_as_inputs(model):
        model.graph.inputs[:] = [value for value in model.graph.inputs if not _has_fixed_default(value)]
    for graph in model.graphs():
        for value in graph.initializers.values():
            is_open = value.shape is None or not value.shape.is_static()
            if value.const_value is not None and is_open and not value.is_graph_input():
                value.shape = ir.Shape(value.const_value.shape.numpy())
    write_convolutions(model)
    write_packed_attention(model)


def _bypass_identity(node: ir.Node) -> None:
    """Let the readers of an Identity of a weight read the weight itself: exporters write so what layers share."""
    source = node.inputs[0] if node.op_type == "Identity" and node.domain in STANDARD_DOMAINS else None
    if source is not None and is_constant(source) and not node.outputs[0].is_graph_output():
        node.outputs[0].replace_all_uses_with(source)


def _lists_weights_as_inputs(model: ir.Model) -> bool:
    """Return whether the graph's inputs include its weights, as exporters once did and IR versions below 4 ask.

    Adapters that callers may give instead of their defaults are inputs too: but then most weights are none.
    """
    sizes: dict[bool, int] = {False: 0, True: 0}
    for value in model.graph.initializers.values():
        if value.const_value is not None and len(value.const_value.shape) > 1:
            sizes[value.is_graph_input()] += value.const_value.nbytes
    return model.ir_version < _FIRST_WITH_OPTIONAL_INPUTS or sizes[True] > sizes[False]


def _has_fixed_default(value: ir.Value) -> bool:
    """Return whether an input of the graph is one of its weights, and no adapter's by its name or open size."""
    shape = value.shape
    is_weight = value.is_initializer() and shape is not None and shape.is_static() and 0 not in shape.numpy()
    return is_weight and ADAPTER_NAME.search(str(value.name)) is None


def place_weights(model: ir.Model, file: Path) -> None:
    """Let external tensors name the real files that they lie in, through whatever links lead there.

    As in ONNX Runtime they lie in the folder of the .onnx file or, where that is a link, also in the one of its target:
    the Hugging Face hub's cache links every file into one folder. Tensors that are named otherwise stay as they are,
    and can't be read.

    Args:
        model: parsed from ``file``.
        file: the .onnx file, or a link to it.
    """
    ir.external_data.set_base_dir(model.graph, str(file.parent))
    homes = _homes(file)
    real = {path: place for path in {tensor.path for tensor in external_tensors(model)} if (place := _real(path))}
    inside = {path: place for path, place in real.items() if any(home in place.parents for home in homes)}
    if not inside:
        return
    shared = os.path.commonpath([place.parent for place in inside.values()])
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and tensor.path in inside and not _is_absolute(tensor):
                value.const_value = _PlacedTensor(
                    os.path.relpath(inside[tensor.path], shared),
                    tensor.offset,
                    tensor.length,
                    tensor.dtype,
                    shape=tensor.shape,
                    name=tensor.name,
                    doc_string=tensor.doc_string,
                    metadata_props=dict(tensor.metadata_props),
                    base_dir=shared,
                )


class _PlacedTensor(ir.ExternalTensor):
    """A tensor in a file whose place was checked."""

    __slots__ = ()

    def _check_path_containment(self) -> None:
        """Allow what onnx-ir refuses and ONNX Runtime opens: a file with a second name (a hard link)."""


def weights_folder(model: ir.Model, file: Path) -> Path:
    """Return the folder that the external tensors of ``model``, parsed from ``file``, name their files from."""
    first = next(external_tensors(model), None)
    return file.parent if first is None else Path(first.base_dir)


def _is_absolute(tensor: ir.ExternalTensor) -> bool:
    return Path(tensor.location).is_absolute()


def _homes(file: Path) -> tuple[Path, Path]:
    return file.parent.resolve(), file.resolve().parent


def _real(path: str) -> Path | None:
    """Return where ``path`` leads; None where it leads nowhere: a zero in it, or a loop of links."""
    try:
        return Path(path).resolve()
    except (ValueError, TypeError, OSError, RuntimeError):
        return None


def _require_known_paths(model: ir.Model, file: Path) -> None:
    """Raise GraphError for places that no file can have, or that may be anywhere."""
    for tensor in _one_of_each_file(model):
        try:
            Path(tensor.path).resolve()
        except (ValueError, TypeError, OSError, RuntimeError) as error:  # a zero, invalid UTF-8, a loop of links
            raise GraphError(
                f"{file} names an external data file that can't exist ({in_one_line(error)}); build it again."
            ) from error
        if _is_absolute(tensor):
            raise GraphError(
                f"{file} names its external data by an absolute path, {tensor.location}, which ONNX Runtime refuses; "
                "save it again with the file beside it."
            )


def external_files(model: ir.Model) -> Iterator[Path]:
    """Yield the external data files that ``model``'s initializers lie in, each once."""
    yield from dict.fromkeys(Path(tensor.path).resolve() for tensor in _one_of_each_file(model))


def _one_of_each_file(model: ir.Model) -> list[ir.ExternalTensor]:
    """Return one of the external tensors in each file: thousands share a few, and resolving a path takes a while."""
    return list({tensor.path: tensor for tensor in external_tensors(model)}.values())


def _require_real_file(path: Path, onnx_file: Path) -> None:
    """Raise GraphError for external data that leaves the model, or is no file."""
    homes = _homes(onnx_file)
    if not any(home in path.parents for home in homes):
        raise GraphError(
            f"External data file {path} lies outside of {onnx_file.parent}, or a link leads there; pass a copy of the "
            "folder that holds files in place of links (cp -rL), or build the base again with its data beside it."
        )
    if path.is_file():
        return
    target = onnx_file.resolve()
    if path.is_relative_to(homes[0]) and (target.parent / path.relative_to(homes[0])).is_file():
        raise GraphError(
            f"External data file {path} is missing, and ONNX Runtime doesn't look for it beside the file that the link "
            f"{onnx_file.name} leads to; pass {target}."
        )
    raise GraphError(f"External data file {path} is missing; put it beside the model or build it again.")


def _require_whole(model: ir.Model) -> None:
    files = {tensor.path: Path(tensor.path).resolve() for tensor in _one_of_each_file(model)}
    sizes = {path: path.stat().st_size for path in files.values()}
    tried: set[Path] = set()
    for tensor in external_tensors(model):
        path = files[tensor.path]
        end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
        if end > sizes[path]:
            _require_fetched(path)
            raise GraphError(
                f"External data file {path} is truncated: '{tensor.name}' ends at byte {end}, the file has "
                f"{sizes[path]}; copy or build it again."
            )
        if path not in tried:
            tried.add(path)
            _require_readable(tensor, path)


def _require_fetched(path: Path) -> None:
    if is_lfs_pointer(path):
        raise GraphError(f"{path} is a pointer of Git LFS in place of the file; fetch that with 'git lfs pull'.")


def is_lfs_pointer(path: Path) -> bool:
    """Return whether ``path`` is what a clone without Git LFS has in place of a large file."""
    with suppress(OSError), path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER
    return False


def _require_readable(tensor: ir.ExternalTensor, path: Path) -> None:
    """Map one tensor of the file: permissions, and whatever else onnx-ir may refuse."""
    try:
        tensor.numpy()
    except PermissionError as error:
        raise GraphError(
            f"External data file {path} can't be read ({error.strerror}); get the right to read it."
        ) from error
    except (ValueError, OSError) as error:
        raise GraphError(
            f"External data file {path} can't be read ({in_one_line(error)}); put a real copy there."
        ) from error
    finally:
        tensor.release()


def _require_outputs(model: ir.Model, directory: ModelDirectory) -> None:
    """Raise GraphError for an output that no node makes.

    onnxruntime-genai 0.18 builds such float32 models for cuda, dml and NvTensorRtRtx, and no runtime opens them.
    """
    for value in model.graph.outputs:
        if value.producer() is None and not value.is_graph_input() and not value.is_initializer():
            raise GraphError(
                f"{directory.onnx_file} is not a valid model: no node makes its output '{value.name}' "
                "(onnxruntime-genai's builder writes such graphs for some precisions of an execution provider); build "
                "it with --precision fp16, or for cpu."
            )


def producer_of(model: ir.Model) -> str:
    """Return what wrote the graph, name and version; empty where it doesn't say."""
    return " ".join(filter(None, (model.producer_name, model.producer_version)))


def fingerprint_model(directory: ModelDirectory, model: ir.Model | None = None) -> str:
    """Return the hex digest over the graph and a sample of every external tensor.

    The .onnx file is hashed whole; of each external tensor its place and its first and last 4 KiB: training changes
    every matrix everywhere, and reading 16 GB to notice it would take longer than rounding them. An embedding model
    that the graph reads in place of tokens counts too.

    Args:
        directory: where the model lies.
        model: what ``load_graph`` gave for it; None parses the file here.

    Raises:
        GraphError: the model can't be read, or isn't whole.
    """
    model = load_graph(directory) if model is None else model
    digest = hashlib.sha256(directory.onnx_file.read_bytes())
    for tensor in external_tensors(model):
        digest.update(_sample(tensor))
    if directory.embedding is not None and reads_embedded_tokens(model, directory):
        with suppress(GraphError):  # what runs it says so
            digest.update(fingerprint_model(directory.embedding).encode())
    return digest.hexdigest()


def reads_embedded_tokens(model: ir.Model, directory: ModelDirectory) -> bool:
    """Return whether ``model`` takes what an embedding model makes of the tokens."""
    names = {directory.input_names.get(key, key) for key in EMBEDDED}
    return any(value.name in names for value in model.graph.inputs)


def _sample(tensor: ir.ExternalTensor) -> bytes:
    offset, length = tensor.offset or 0, tensor.length or tensor.nbytes
    with Path(tensor.path).open("rb") as file:
        file.seek(offset)
        head = file.read(min(_SAMPLE, length))
        file.seek(offset + max(length - _SAMPLE, 0))
        tail = file.read(min(_SAMPLE, length))
    return head + tail
