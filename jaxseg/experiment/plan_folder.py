"""What a folder is like and which network fits it, as text and as JSON."""

import ast
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from jaxseg import config_checks
from jaxseg.config import ConfigProblems, flatten
from jaxseg.config_planned import PLANNED, open_config
from jaxseg.experiment import build
from jaxseg.experiment.fitting import Fitted, fit_to_memory
from jaxseg.experiment.gather import Found, find_data
from jaxseg.experiment.planned import Planned, reasons_for
from jaxseg.models.summary import summarise_model
from jaxseg.planning.measures import CaseMeasures, pooled
from jaxseg.run import writers
from jaxseg.run.log import Log


def plan_folder(
    directory: str,
    *,
    preset: str = "auto",
    configuration: str = "auto",
    settings: Sequence[str] = (),
    output: str = "",
    log: Log,
) -> str:
    """Plans for the training cases of a folder.

    Args:
      directory: as `data.dir` of a config.
      preset, configuration: as `plan.preset` and `plan.configuration`.
      settings: "FIELD=VALUE" of other fields.
      output: JSON file to write the decisions to; "" writes none.
      log: where to say what is found while the folder is read.
    Returns:
      Text for the terminal.
    Raises:
      ConfigProblems, RunProblem, DatasetProblems, SplitProblem, OSError: as training.
      TargetProblem: `plan.target` can not be compiled for.
    """
    config = _config_of(directory, preset, configuration, settings)
    config_checks.validate(config)
    found = find_data(config, log)
    fitted = fit_to_memory(config, found)
    planned = fitted.planned
    if output:
        fields = flatten(fitted.config)
        decisions = {name: fields[name] for name in PLANNED}
        content = {
            "preset": planned.preset,
            "configuration": planned.name,
            "decisions": decisions,
            "configurations": {
                name: dataclasses.asdict(made) for name, made in planned.configurations.items()
            },
        }
        writers.write_json(output, content)
    sections = [
        *_about_data(found, planned.facts.channel_names),
        *_about_configurations(planned),
        _about_training(fitted, found),
    ]
    if output:
        sections.append([f"written to {output}; train with --config.plan.file={output}"])
    return "\n\n".join("\n".join(lines) for lines in sections)


def _config_of(directory, preset, configuration, settings):
    config = open_config()
    config.data.dir = directory
    config.plan.preset, config.plan.configuration = preset, configuration
    problems = []
    for setting in settings:
        name, equals, text = setting.partition("=")
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            value = text
        try:
            if not equals:
                raise KeyError("write FIELD=VALUE")
            config.update_from_flattened_dict({name: value})
        except (KeyError, TypeError, ValueError) as error:
            problems.append(f"--set={setting}: {error}")
    if config.plan.file:
        problems.append("plan.file holds a plan already: this command makes one, for --output")
    if problems:
        raise ConfigProblems(problems)
    return config


def _about_data(found: Found, channel_names: Sequence[str]) -> Iterator[list[str]]:
    measures = [found.survey[case_id].measures for case_id in found.planned]
    unit = "mm" if found.dataset.has_volumes else "pixels"
    yield [f"what {len(measures)} training cases are like", *_grid_lines(measures, unit)]
    rows = [(name, pooled(measures, channel)) for channel, name in enumerate(channel_names)]
    yield [
        "intensities of the foreground",
        *_table(
            ("channel", "mean", "sd", "min", "0.5 %", "median", "99.5 %", "max"),
            [(name, *(f"{known[key]:.4g}" for key in _POOLED)) for name, known in rows if known],
        ),
    ]
    structures = _structure_lines(found, measures, unit)
    yield ["structures, medians of the cases that have them", *structures]


_POOLED = ("mean", "std", "min", "percentile_00_5", "median", "percentile_99_5", "max")


def _grid_lines(measures: Sequence[CaseMeasures], unit: str) -> list[str]:
    rows = []
    for name, values in (
        (f"spacing ({unit})", [case.spacing_mm for case in measures]),
        ("voxels", [case.shape for case in measures]),
        ("cropped to what is not 0", [case.cropped_shape for case in measures]),
    ):
        low, median, high = np.percentile(np.asarray(values, float), [0, 50, 100], axis=0)
        rows.append((name, *(" x ".join(f"{n:.4g}" for n in of) for of in (low, median, high))))
    return _table(("", "lowest", "median", "highest"), rows)


def _structure_lines(found: Found, measures: Sequence[CaseMeasures], unit: str) -> list[str]:
    rows = []
    for index, name in enumerate(found.dataset.class_names[1:]):
        there = [
            (case.structures[index], float(np.prod(case.spacing_mm)))
            for case in measures
            if case.structures and case.structures[index].voxels
        ]
        if not there:
            rows.append((name, "0", "", "", "", ""))
            continue
        volume = np.median([of.voxels * voxel_mm3 / 1000 for of, voxel_mm3 in there])
        extent = np.median([of.extent_mm for of, _ in there], axis=0)
        pieces = np.median([of.components for of, _ in there])
        chord = np.median([of.chord_mm for of, _ in there], axis=0)
        size, across = (" x ".join(f"{mm:.3g}" for mm in of) for of in (extent, chord))
        rows.append((name, str(len(there)), f"{volume:.4g}", size, across, f"{pieces:.3g}"))
    volume_of = "ml" if unit == "mm" else "1000 pixels"
    extents = f"extent ({unit})", f"through it ({unit})"
    return _table(("class", "cases", volume_of, *extents, "pieces"), rows)


def _about_configurations(planned: Planned) -> Iterator[list[str]]:
    for name in planned.configurations:
        chosen = f", which is trained: {planned.why}" if name == planned.name else ""
        yield [f"{planned.preset} {name}{chosen}", *_table((), reasons_for(planned, name))]


def _about_training(fitted: Fitted, found: Found) -> list[str]:
    model = build.create_model_for(fitted.config, len(found.dataset.class_names))
    shape = (*fitted.config.data.patch_size, len(fitted.planned.facts.channel_names))
    _, taken, why = fitted.reason
    return [summarise_model(model, shape), f"{taken} ({why})"]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    everything = [*([head] if head else []), *rows]
    widths = [max(map(len, column)) for column in zip(*everything, strict=True)]
    return [
        "  " + "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in everything
    ]
