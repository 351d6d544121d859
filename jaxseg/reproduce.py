"""Replays a run and says where it first differs: `python -m jaxseg.reproduce --workdir=RUN`.

Every step of a run leaves a line in trace.jsonl: checksums of its batch and of the parameters after
it, its loss and gradient norm. The same steps are done again, from the first, and compared to the
bit. Nothing is written. Exits with 1 where a step differs, with 2 if nothing could be replayed, as
where the trace ends before the run does.

Give it the devices and the environment variables of the run; what else has changed since is shown.
"""

import os
import sys
from collections.abc import Sequence

from absl import flags, logging
from tqdm import tqdm

from jaxseg import command, config_fields

NAME = "jaxseg-reproduce"


def main(argv: Sequence[str]) -> None:
    """Replays, and turns every expected failure into one clear message."""
    options = command.parse(NAME, argv, text=__doc__, define=_define_flags, required=("workdir",))
    logging.set_verbosity(logging.ERROR)
    with command.one_message(NAME):
        command.hide_accelerators()
        command.keep_compiled(config_fields.FIELDS["compile"]["cache_dir"])
        from jaxseg.experiment.replay import reproduce  # needs `pip install jaxseg[train]`

        agrees = reproduce(os.path.expanduser(options.workdir), options.num_steps, say=_say)
    sys.exit(0 if agrees else 1)


def _say(line):
    tqdm.write(line, file=sys.stdout)


def _define_flags(options):
    own = {"flag_values": options}
    flags.DEFINE_string("workdir", "", "the run", **own)
    flags.DEFINE_integer("num_steps", None, "how many, of all", lower_bound=1, **own)


def run() -> None:
    """Console script."""
    command.prepare_environment()
    main(sys.argv)


if __name__ == "__main__":
    run()
