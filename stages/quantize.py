"""Stage two, ``python -m stages.quantize``: plan formats, search quantized weights, store them and export the model."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from stages.commands.calibrate_options import CalibrateConfig
from stages.commands.output import Section
from stages.commands.quantize_options import QuantizeConfig
from stages.commands.run import run_command
from stages.errors import UserError
from stages.system.paths import from_here

if TYPE_CHECKING:
    import onnx_ir as ir

    from export.run import QuantizedModel
    from export.save import Destination
    from stages.calibration.cache import CalibrationCache
    from stages.evaluation.records import Evaluation, OutputEvaluation
    from stages.model.directory import ModelDirectory
    from stages.quantization.preview.table import Preview
    from stages.quantization.weights.store import QuantizedStore
    from stages.system.distributed import Processes

_LOGGER = logging.getLogger(__name__)

Made = TypeVar("Made")


def command(config: QuantizeConfig) -> Iterator[Section]:
    """Quantize, or with ``dry_run`` say what that would do."""
    if config.dry_run:
        from stages.quantization.preview.table import preview_table

        config.validate()
        for part in config.parts:
            found = preview(part)
            name = "plan" if len(config.parts) == 1 else f"{part.component}.plan"
            yield Section(name=name, table=preview_table(found), record=found)
        return
    made = yield from run(config)
    if made is not None:
        from stages.report.result import result_section

        yield result_section(config, made)


def quantize(config: QuantizeConfig) -> QuantizedModel | None:
    """Calibrate where that wasn't done yet, search quantized weights, and export the model to ``config.output_path``.

    An output that exactly these options made is left as it is. Processes launched together share the work; all but the
    first return None.

    Raises:
        UserError: an option or the model can't be used, the cache is of another model or text, or the output exists.
    """
    if config.dry_run:
        raise UserError("quantize writes a model, and dry_run asks for none; call preview.")
    steps = run(config)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            made: QuantizedModel | None = end.value
            return made


def run(config: QuantizeConfig) -> Generator[Section, None, QuantizedModel | None]:
    """Yield each result as soon as it is there, so that an export that fails doesn't hide the search; return all."""
    # Imported here, as in every command: --help and errors in options need not wait for torch.
    from stages.system.distributed import join_processes

    config.validate()
    processes = join_processes()
    if len(config.parts) > 1:
        made = yield from _run_several(config, processes)
    else:
        made = yield from _run_one(config, processes, config)
    if made is None or not config.evaluate:
        return made
    for part in config.parts:
        steps = _evaluate(part, made)
        made = yield from steps if len(config.parts) == 1 else _named_sections(part, steps)
    add_to_card(made.folder, made.evaluations, made.outputs)
    return made


def _run_one(
    config: QuantizeConfig, processes: Processes, asked: QuantizeConfig
) -> Generator[Section, None, QuantizedModel | None]:
    """Quantize one component, unless that was done already.

    Args:
        config: what is done.
        processes: those that share the work.
        asked: what was typed: it may name several components.
    """
    from export.finished import find_finished

    made = processes.decided_by_first(lambda: find_finished(config))
    if made is None:
        return (yield from _make(config, processes, asked))
    _LOGGER.info("%s is there already, made with exactly these options.", from_here(made.folder))
    if not processes.is_first:
        return None
    _restore_report(config, made)
    return made


def _run_several(config: QuantizeConfig, processes: Processes) -> Generator[Section, None, QuantizedModel | None]:
    """Quantize components one after the other, each in the package that the one before it made.

    What comes between lies beside the output until that is there, so that a run that is stopped goes on.
    """
    from export.card.record import read_record
    from export.finished import find_finished
    from stages.system.shared_folder import wait_for

    *earlier, last = config.parts
    between = [config.output_path.with_name(f"{config.output_path.name}.{part.component}.part") for part in earlier]
    # A component's graph is the same in the base and in what comes between.
    made = processes.decided_by_first(lambda: find_finished(last))
    if made is not None:
        _LOGGER.info("%s is there already, made with exactly these options.", from_here(made.folder))
        if not processes.is_first:
            return None
        _restore_report(last, made)
    else:
        check_before_calibration(config)
        base = config.onnx_path
        for part, folder in zip(earlier, between, strict=True):
            steps = _run_one(replace(part, onnx_path=base, output_path=folder), processes, config)
            yield from _named_sections(part, steps)
            processes.barrier()
            wait_for([folder])
            base = folder
        made = yield from _named_sections(last, _run_one(replace(last, onnx_path=base), processes, config))
        if made is None:
            return None
    for folder in between:
        shutil.rmtree(folder, ignore_errors=True)
    record = read_record(made.folder)
    if record is None:
        return made
    sizes = [(part.base.bytes, part.bytes) for part in (*record.parts, record)]
    before, after = (sum(column) for column in zip(*sizes, strict=True))
    return replace(made, export=replace(made.export, bytes_before=before, bytes_after=after))


def _named_sections(config: QuantizeConfig, steps: Generator[Section, None, Made]) -> Generator[Section, None, Made]:
    """Yield the sections of one of several components under its name."""
    while True:
        try:
            section = next(steps)
        except StopIteration as end:
            made: Made = end.value
            return made
        yield replace(section, name=f"{config.component}.{section.name}")


def _evaluate(config: QuantizeConfig, made: QuantizedModel) -> Generator[Section, None, QuantizedModel]:
    """Compare one component with its base: on samples where it runs on these, else on text."""
    from stages.evaluate import evaluate_result, evaluate_result_outputs, evaluation_sections, output_section
    from stages.model.directory import DECODER, locate_model

    outputs = evaluate_result_outputs(config)
    if outputs is not None:
        yield output_section((outputs,), detail=True)
        return replace(made, outputs=(*made.outputs, outputs))
    component = locate_model(config.onnx_path, config.component).component
    if component != DECODER:
        _LOGGER.warning("--evaluate compares %s with its base on --samples, and there are none: skipped.", component)
        return made
    found = evaluate_result(config)
    yield from evaluation_sections(found, detail=True)
    return replace(made, evaluations=found)


def add_to_card(folder: Path, found: Sequence[Evaluation], outputs: Sequence[OutputEvaluation] = ()) -> None:
    """Let the model's card show what was found; log a warning where it can't: the model is finished."""
    from export.card.write import update_card

    try:
        update_card(folder, found, outputs)
    except UserError as error:
        _LOGGER.warning("the model is finished, but its card lacks the evaluation: %s", error)


def _make(
    config: QuantizeConfig, processes: Processes, asked: QuantizeConfig
) -> Generator[Section, None, QuantizedModel | None]:
    """Do what ``run`` does for an output that isn't there."""
    from stages.model.directory import locate_model
    from stages.quantization.weights.store import REPORT_FOLDER
    from stages.report.document import read_report
    from stages.system.lock import exclusive
    from stages.system.threads import granted_threads

    granted_threads()  # the export opens sessions: what they can't use is an error before the search
    with processes.main_process_first():
        directory = locate_model(config.onnx_path, config.component)
        destination = _destination(config, directory)
        destination.warn_inside(directory.folder)
        read_report(config.weights_folder / REPORT_FOLDER)  # so that a damaged report is an error before the search
    with (
        exclusive(destination.folder, option="--output_path", owner=processes.is_first),
        exclusive(config.weights_folder, option="--weights_path", owner=processes.is_first),
    ):
        return (yield from _write(config, processes, directory, destination, asked))


def _write(
    config: QuantizeConfig,
    processes: Processes,
    directory: ModelDirectory,
    destination: Destination,
    asked: QuantizeConfig,
) -> Generator[Section, None, QuantizedModel | None]:
    """Do what ``run`` does once the places for output and weights are this run's alone.

    Args:
        config: the options.
        processes: those that share the work.
        directory: the base model.
        destination: where the output goes.
        asked: what was typed, for the model card.
    """
    from export.card.record import save_origin
    from export.finished import remember_output
    from export.run import QuantizedModel, export_model
    from export.summary import export_table
    from stages.quantization.run import discard_if_bad_input, prepare, round_embeddings, search_weights
    from stages.quantization.targets.explain import choice_table
    from stages.quantization.weights.summary import quantization_table, search_summary
    from stages.system.hardware import choose_device

    yield from _calibrate(config, directory, processes)
    prepared = prepare(config, directory, processes)
    store, choice = prepared.store, prepared.plan.choice
    if prepared.plan.target is not None:
        table = choice_table(prepared.plan.target.label, choice.explanations)
        yield Section(name="formats", table=table, record=choice, detail=True)
    with discard_if_bad_input(store, owner=processes.is_first):
        search_weights(config, prepared, processes)
        if not processes.is_first:
            return None
        round_embeddings(prepared.model, store, choose_device(config.device))
    search = search_summary(store, store.seconds())
    yield Section(name="search", table=quantization_table(store, search.seconds), record=search, detail=True)
    save_origin(store, asked, None if prepared.cache is None else prepared.cache.manifest.key)
    exported = export_model(directory, store, destination, config.export_options, prepared.model)
    made = QuantizedModel(
        folder=destination.folder,
        onnx_file=exported.onnx_file,
        weights=store.folder,
        choice=choice,
        search=search,
        export=exported,
    )
    remember_output(config, made)  # at once: a run that is stopped from here on finds its output finished
    _write_report(store, directory, prepared.model, made.onnx_file)
    yield Section(name="export", table=export_table(exported), record=exported)
    return made


def _calibrate(config: QuantizeConfig, directory: ModelDirectory, processes: Processes) -> Iterator[Section]:
    """Make the cache where there is none, or where options name a text; one that is there must be of this model."""
    from stages.calibration.run import calibrate
    from stages.calibration.summary import calibration_section

    if not config.needs_cache:
        return
    found = processes.decided_by_first(lambda: _usable_cache(config, directory))
    if found is None:
        with processes.main_process_first():
            check_before_calibration(config)
        yield calibration_section(calibrate(config.calibration))
    else:
        _LOGGER.info("calibration: %s is there and used: %s.", from_here(found.folder), found.manifest.key.text)


def _usable_cache(config: QuantizeConfig, directory: ModelDirectory) -> CalibrationCache | None:
    """Return the cache that is used as it is; None where calibration makes one, or compares the text."""
    from stages.calibration.cache import find_cache, open_cache
    from stages.model.load import fingerprint_model

    found = find_cache(config.cache_path)
    if found is not None and config.names_text:
        open_cache(config.cache_path, fingerprint_model(directory))
        return None
    return found


def preview(config: QuantizeConfig, calibration: CalibrateConfig | None = None) -> Preview:
    """Forecast what ``quantize`` would do: formats, bytes, memory, seconds, obstacles.

    The graph is read; where a budget is spent, the cache and the weights too, and forecasts are kept in the cache.

    Args:
        config: as for ``quantize``.
        calibration: how stage one would run before it; None: as ``config`` says.

    Raises:
        UserError: an option or the model can't be used.
    """
    from stages.quantization.preview.preview import preview as forecast

    config.validate()
    return forecast(config, calibration or config.calibration, tuple(_obstacles(config)))


def check_before_calibration(config: QuantizeConfig) -> None:
    """Raise now what ``quantize`` would raise before it reads the cache: hours of calibration may come between."""
    from stages.calibration.run import require_inputs

    config.validate()
    for part in config.parts:
        _check_part(part)
        if len(config.parts) > 1 and part.needs_cache:
            require_inputs(part.calibration)


def _check_part(config: QuantizeConfig) -> None:
    """Do what ``check_before_calibration`` does for one component."""
    from stages.calibration.samples.load import takes_samples
    from stages.model.directory import locate_model
    from stages.model.load import load_graph
    from stages.quantization.plan.plan import plan_model
    from stages.runtime.blocks.chain import open_chain
    from stages.runtime.blocks.decoder import open_blocks

    directory = locate_model(config.onnx_path, config.component)
    _destination(config, directory)
    model = load_graph(directory)
    if takes_samples(config, model, directory):
        config.require_no_text()
    plan = plan_model(config, model, directory)
    if config.tunes_blocks:
        open_blocks(model, plan.sites.groups)
    if config.distill:
        open_chain(model, plan.sites.groups)


def _destination(config: QuantizeConfig, directory: ModelDirectory) -> Destination:
    """Return where the model goes, once both places and the device can be used."""
    from export.finished import was_made_otherwise
    from export.save import Destination
    from stages.model.load import parse_graph
    from stages.model.unquantized import require_float_base
    from stages.system.atomic import is_occupied, require_creatable
    from stages.system.hardware import choose_device

    choose_device(config.device)
    require_creatable(config.output_path, option="--output_path")
    if is_occupied(config.output_path) and not config.overwrite:
        # The base and the output may have been swapped.
        require_float_base(parse_graph(directory), directory)
        if was_made_otherwise(config):
            raise UserError(
                f"--output_path {config.output_path} already exists, made with other options or from another base (its "
                "README.md says how); choose another path or pass --overwrite to replace it."
            )
    destination = Destination.from_path(config.output_path, directory, overwrite=config.overwrite)
    require_creatable(config.weights_folder, option="--weights_path")
    destination.require_apart_from(config.weights_folder, "the quantized weights")
    return destination


def _obstacles(config: QuantizeConfig) -> Iterator[str]:
    """Yield the reasons why the output can't be written as things are."""
    from stages.model.directory import locate_model
    from stages.quantization.weights.store import REPORT_FOLDER
    from stages.report.document import read_report
    from stages.runtime.blocks.converters.onnx2torch import import_onnx2torch

    try:
        _destination(config, locate_model(config.onnx_path, config.component))
        read_report(config.weights_folder / REPORT_FOLDER)
    except UserError as error:
        yield str(error)
    if config.improves_search:
        try:
            import_onnx2torch()
        except UserError as error:
            yield str(error)


def _restore_report(config: QuantizeConfig, made: QuantizedModel) -> None:
    """Write the report of a finished output where there is none: its run was stopped, or someone deleted it."""
    from stages.model.directory import locate_model
    from stages.model.load import load_graph
    from stages.quantization.weights.store import REPORT_FOLDER, open_store
    from stages.report.document import REPORT_HTML

    if (made.weights / REPORT_FOLDER / REPORT_HTML).exists():
        return
    base = locate_model(config.onnx_path, config.component)
    _write_report(open_store(made.weights), base, load_graph(base), made.onnx_file)


def _write_report(store: QuantizedStore, base: ModelDirectory, graph: ir.Model, output: Path) -> None:
    """Write the report into the weights' folder; log a warning where that fails, since the model is finished.

    Args:
        store: the finished weights.
        base: the base model.
        graph: its graph.
        output: the quantized model's .onnx file.
    """
    from stages.errors import in_one_line
    from stages.model.directory import locate_model
    from stages.model.sizes import size_parts
    from stages.quantization.weights.store import REPORT_FOLDER
    from stages.report.from_runs import write_quantization
    from stages.system.paths import shell_line

    try:
        made = locate_model(output)
        sizes = size_parts(base, made, graph)
        write_quantization(store, sizes, title=made.folder.name, base=base.folder)
    except Exception as error:  # whatever a report may raise
        again = ["stages.report", store.folder / REPORT_FOLDER, "--weights_path", store.folder]
        models = ["--base", base.onnx_file, "--model", output]
        _LOGGER.warning(
            "the model is finished, but its report is not (%s); write it again: %s",
            in_one_line(error),
            shell_line([str(word) for word in (*again, *models)]),
        )


if __name__ == "__main__":
    run_command(QuantizeConfig, command, "python -m stages.quantize")
