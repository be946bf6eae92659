"""Open ONNX Runtime sessions on the first providers that work."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort

from stages.errors import GraphError
from stages.runtime.providers import CPU, CPU_ONLY, SHORT_NAMES, ProviderChoice
from stages.runtime.requirements import installed_runtime, lacks_of, too_old
from stages.system.threads import granted_threads

_REASON_LENGTH = 200
_CODE = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : (?:Load model from .*? failed: ?)?")
_WHERE = re.compile(r"Non-zero status code returned while running (\w+) node\. Name:'([^']*)' Status Message: ")
_CAST = re.compile(
    r"This is an invalid model\. Type Error: .*? \(InsertedPrecisionFreeCast\S*\) of operator \((\w+)\) in node "
    r"\(([^)]*)\) is invalid"
)
"""The runtime puts casts around a 16-bit operator that the CPU has no kernel for, whether it takes float32 or not."""
NO_KERNEL = "no kernel"
_PLACE_IN_SOURCE = re.compile(r"^\S*\.(cc|h|cpp|cu):\d+ .*?\)(?: const)? (?:\[with [^]]*\] )?(?=\S)")
_AS_MANY_AS_CORES = 0
_ONE_NODE = '<ir_version: 8, opset_import: ["": 17]> g (float[1] x) => (float[1] y) { y = Identity(x) }'
ACCURACY_LEVEL = "session.qdq_matmulnbits_accuracy_level"
"""Session key: 1 computes MatMulNBits in float32; the runtime's default 4 rounds activations to int8."""


def runtime_reason(error: BaseException) -> str:
    """Return ONNX Runtime's own words in one line, whole, without its numbers and places in its source."""
    words = _WHERE.sub(r"\1 '\2': ", _CODE.sub("", " ".join(str(error).split())))
    words = _CAST.sub(rf"\1 '\2': {NO_KERNEL} for 16-bit numbers", words)
    return _PLACE_IN_SOURCE.sub("", words).rstrip(".") or type(error).__name__


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSettings:
    """The settings of a session that differ between callers."""

    providers: tuple[str, ...] = (CPU,)
    provider_options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Options by the provider that they go to."""
    external_data_folder: Path | None = None
    """Where a graph given as bytes finds its weights."""
    map_weights: bool = False
    """Whether weights stay mapped file pages instead of repacked copies."""
    spin: bool = True
    """Whether idle threads wait busily for the next run: faster, unless others compute between runs."""
    accuracy_level: int | None = None
    """See ``ACCURACY_LEVEL``."""
    threads: int | None = None
    """How many compute; None: as many as are granted."""
    profile_prefix: Path | None = None
    """Start of the name of a profile, whose kernel events name the nodes of the optimized graph."""


def open_session(model: Path | bytes, settings: SessionSettings) -> ort.InferenceSession:
    """Open a model file, or a serialized graph, with ``settings``.

    Raises:
        GraphError: ONNX Runtime refuses the model; its reason is repeated.
    """
    options = ort.SessionOptions()
    # A session that can't be opened would print, besides the error that is raised, that it writes no profile.
    options.log_severity_level = 3 if settings.profile_prefix is None else 4
    # As in torch: this is how processes that share a machine are told how many threads they may use.
    options.intra_op_num_threads = settings.threads or granted_threads() or _AS_MANY_AS_CORES
    if settings.external_data_folder is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(settings.external_data_folder)
        )
    if settings.map_weights:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if not settings.spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if settings.accuracy_level is not None:
        options.add_session_config_entry(ACCURACY_LEVEL, str(settings.accuracy_level))
    if settings.profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(settings.profile_prefix)
    source = model if isinstance(model, bytes) else str(model)
    providers = [(name, dict(settings.provider_options.get(name, {}))) for name in settings.providers]
    try:
        # Without enable_fallback=0 the library prints a failing provider's error and goes on without it.
        return ort.InferenceSession(source, options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime raises classes without a common base
        raise GraphError(_why_closed(model, error)) from error


def _why_closed(model: Path | bytes, error: Exception) -> str:
    """Return what ONNX Runtime has against a model: all that it says, and the release that would open it."""
    where, reason = "a part of the model" if isinstance(model, bytes) else str(model), runtime_reason(error)
    with suppress(Exception):  # what isn't a model at all is only said to be none
        graph = ir.from_proto(onnx.load_model_from_string(model)) if isinstance(model, bytes) else ir.load(model)
        installed = installed_runtime(graph)
        if lacks := tuple(lacks_of(graph, installed)):
            return f"ONNX Runtime can't open {where} ({reason}), which {too_old(lacks, installed.version)}"
    return f"ONNX Runtime can't open {where} ({reason}); build it again."


@dataclass(frozen=True, slots=True)
class OpenedSession:
    """A session, and the providers that it really has."""

    session: ort.InferenceSession
    providers: ProviderChoice


SessionOpener = Callable[[tuple[str, ...]], ort.InferenceSession]
"""Opens a session with the providers of these names."""


def open_first_session(open_with: SessionOpener, choice: ProviderChoice) -> OpenedSession:
    """Open a session with the providers of ``choice``, without those that turn out not to work for it.

    Raises:
        GraphError: ONNX Runtime refuses the model on the CPU too.
    """
    try:
        session = open_with(choice.names)
    except GraphError as error:
        culprit = _first_failing(open_with, choice)
        if culprit is None:
            raise error from error.__cause__
        return open_first_session(open_with, _without(choice, *culprit))
    loaded = session.get_providers()
    for name in choice.names:
        if name not in loaded:
            choice = _without(choice, name, "ONNX Runtime could not load it; a driver or library is missing")
    return OpenedSession(session, choice)


def loadable(choice: ProviderChoice) -> ProviderChoice:
    """Return ``choice`` without the providers that turn out not to load here, found out with a graph of one node."""
    if choice.names == CPU_ONLY:
        return choice
    model = onnx.parser.parse_model(_ONE_NODE).SerializeToString()
    return open_first_session(lambda names: open_session(model, SessionSettings(providers=names)), choice).providers


def _first_failing(open_with: SessionOpener, choice: ProviderChoice) -> tuple[str, str] | None:
    """Return the first provider that fails by itself, and the reason; None where the CPU is the only one."""
    others = [name for name in choice.names if name != CPU]
    for name in others:
        try:
            open_with((name, CPU))
        except GraphError as error:
            return name, str(error)
    return (others[0], "it fails beside the providers behind it") if others else None


def _without(choice: ProviderChoice, name: str, reason: str) -> ProviderChoice:
    short = reason if len(reason) <= _REASON_LENGTH else f"{reason[:_REASON_LENGTH]}..."
    return ProviderChoice(
        names=tuple(other for other in choice.names if other != name),
        missing=(*choice.missing, (SHORT_NAMES[name], short)),
    )
