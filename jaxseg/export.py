"""One file that holds the whole predictor: `python -m jaxseg.export --workdir=RUN --like=FILE`.

`predictor.jaxseg` is a program for CPU, CUDA and TPU that takes volumes as they were read, in RAS+
axes, and returns class indices before post-processing. It needs jax and numpy alone; README shows
the loader. `weights.safetensors` holds the weights by name and, as metadata, the run's JSON files.
"""

import os
import sys
from collections.abc import Sequence

from absl import flags, logging

from jaxseg import command

NAME = "jaxseg-export"


def main(argv: Sequence[str]) -> None:
    """Exports, or turns an expected failure into one clear message."""
    required = ("workdir", "like", "output")
    options = command.parse(NAME, argv, text=__doc__, define=_define_flags, required=required)
    logging.set_verbosity(logging.ERROR)
    with command.one_message(NAME):
        from jaxseg.experiment.portable import export  # JAX takes seconds to load

        like, folder = (os.path.expanduser(path) for path in (options.like, options.output))
        workdirs = [os.path.expanduser(workdir) for workdir in options.workdir]
        print(export(workdirs, like, folder, mirror=options.mirror))


def _define_flags(options):
    own = {"flag_values": options}
    flags.DEFINE_list("workdir", [], "finished runs; of several, the logits are averaged", **own)
    flags.DEFINE_string("like", "", "image of the largest size to be served", **own)
    flags.DEFINE_string("output", "", "folder to write to", **own)
    flags.DEFINE_bool("mirror", False, "average over mirrored images", **own)


def run() -> None:
    """Console script."""
    command.prepare_environment()
    main(sys.argv)


if __name__ == "__main__":
    run()
