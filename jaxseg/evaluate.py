"""Scores segmentations: `python -m jaxseg.evaluate --predictions=DIR --references=DIR`.

A prediction and a reference belong together if their names are equal but for the suffix; both are
label files on one grid. Distances are in millimetres and volumes in millilitres; of pictures, whose
pixels have no known size, in pixels and thousand pixels.

Every file is checked before anything is computed. With --output, scores go to evaluation.json and
evaluation.csv there. With --compare, a second folder of predictions is scored too (compared.json,
compared.csv) and the difference of the two tested (comparison.json). Exits with 2 if something
cannot be evaluated.
"""

import math
import os
import sys
from collections.abc import Sequence

from absl import flags

from jaxseg import command

NAME = "jaxseg-evaluate"


def main(argv: Sequence[str]) -> None:
    """Evaluates, and turns every expected failure into one clear message."""
    required = ("predictions", "references")
    options = command.parse(NAME, argv, text=__doc__, define=_define_flags, required=required)
    values = {}
    for name in ("label_values", "ignore_values"):
        try:
            values[name] = tuple(map(int, options[name].value or ())) or None
        except ValueError as error:
            command.leave(NAME, f"--{name}: {error}")
    if not math.isfinite(options.tolerance_mm):
        command.leave(NAME, f"--tolerance_mm is {options.tolerance_mm}; give a distance in mm")
    folders = (options.predictions, options.references, options.compare, options.output)
    predictions, references, others, output = (f and os.path.expanduser(f) for f in folders)
    with command.one_message(NAME):
        from jaxseg.experiment.evaluate_folder import evaluate_folders

        text = evaluate_folders(
            predictions,
            references,
            others=others,
            label_values=values["label_values"],
            ignore_values=values["ignore_values"] or (),
            spacing_from=options.spacing_from,
            class_names=options.class_names,
            tolerance_mm=options.tolerance_mm,
            lesions=options.lesions,
            subset=options.subset,
            output=output,
        )
    print(text)


def _define_flags(options):
    own = {"flag_values": options}
    flags.DEFINE_string("predictions", "", "folder of predicted label files", **own)
    flags.DEFINE_string("references", "", "folder of reference label files", **own)
    flags.DEFINE_string("compare", None, "folder of another model's predictions", **own)
    flags.DEFINE_string("output", None, "folder for the scores", **own)
    flags.DEFINE_float("tolerance_mm", 1.0, "of the surface Dice (nsd)", lower_bound=0, **own)
    flags.DEFINE_bool("lesions", False, "score the detection of lesions", **own)
    flags.DEFINE_bool("subset", False, "leave out references that have no prediction", **own)
    flags.DEFINE_list("class_names", None, "of all classes, background first", **own)
    flags.DEFINE_list("label_values", None, "in the files, in the order of class_names", **own)
    flags.DEFINE_list("ignore_values", None, "of voxels that do not count, in references", **own)
    flags.DEFINE_enum(
        "spacing_from",
        "pixdim",
        ["pixdim", "sform"],
        "what is believed where a NIfTI header contradicts itself; pixdim as ITK does",
        **own,
    )


def run() -> None:
    """Console script."""
    main(sys.argv)


if __name__ == "__main__":
    run()
