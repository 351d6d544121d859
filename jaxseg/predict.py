"""Segments images: `python -m jaxseg.predict --workdir=RUN --input=FILE|DIR --output=DIR`.

OUTPUT gets CASE.nii.gz for each volume, on its grid and in its place in the world, and CASE.png for
each picture, with the label values of the training set, or class numbers if it names none. A
further output NAME is CASE_NAME.nii.gz or, of a picture, CASE_NAME.tif: float32, a fourth axis or a
page per class where it has classes. Such maps are the network's, before post-processing.

predictions.json there says what was made of which file, predict.log when. The same command again
does what is missing, what failed and what has changed since. Exits with 1 if a case failed, with 2
if nothing could be done.
"""

import os
import sys
from collections.abc import Sequence

from absl import flags, logging

from jaxseg import command, config_fields

NAME = "jaxseg-predict"


def main(argv: Sequence[str]) -> None:
    """Predicts, and turns every expected failure into one clear message."""
    required = ("workdir", "input", "output")
    options = command.parse(NAME, argv, text=__doc__, define=_define_flags, required=required)
    logging.set_verbosity(logging.ERROR)
    going_on = "interrupted; what is finished is kept, the same command goes on"
    with command.one_message(NAME, interrupted=going_on):
        from jaxseg.experiment.predict_folder import predict  # JAX takes seconds to load

        command.keep_compiled(config_fields.FIELDS["compile"]["cache_dir"])
        num_done, num_before, failed = predict(
            options.workdir,
            os.path.expanduser(options.input),
            os.path.expanduser(options.output),
            outputs=_outputs(options),
            mirror=options.mirror,
            recursive=options.recursive,
        )
    before = f", {num_before} done before" if num_before else ""
    print(f"{num_done} predicted{before}, {len(failed)} failed: see {options.output}")
    if failed:
        command.leave(NAME, "\n- ".join(["these failed:", *sorted(failed)]), status=1)


def _define_flags(options):
    own = {"flag_values": options}
    flags.DEFINE_list(
        "workdir", [], "runs, also while they train; of several, the logits are averaged", **own
    )
    flags.DEFINE_string("input", "", "an image, or a folder of images", **own)
    flags.DEFINE_string("output", "", "folder for what is made of them", **own)
    flags.DEFINE_bool("recursive", False, "take the images in subfolders too", **own)
    flags.DEFINE_bool("mirror", False, "average over mirrored images", **own)
    flags.DEFINE_bool("probs", False, "write the probability of each class", **own)
    flags.DEFINE_bool(
        "uncertainty",
        False,
        "write confidence and entropy and, with --mirror or several runs, mutual_information",
        **own,
    )
    flags.DEFINE_list("explain", [], "classes to write grad_cam, integrated_gradients of", **own)


def _outputs(options):
    """Names of the outputs that the flags ask for."""
    names = ["label"]
    if options.probs:
        names.append("probs")
    if options.uncertainty:
        names += ["confidence", "entropy"]
        if options.mirror or len(options.workdir) > 1:
            names.append("mutual_information")
    for class_name in dict.fromkeys(options.explain):
        names += [f"grad_cam:{class_name}", f"integrated_gradients:{class_name}"]
    return names


def run() -> None:
    """Console script."""
    command.prepare_environment()
    main(sys.argv)


if __name__ == "__main__":
    run()
