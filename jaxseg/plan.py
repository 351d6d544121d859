"""Plans a network for a folder of scans and labels: `python -m jaxseg.plan --dir=DIR`.

Reads every case once, prints what the data are like and what was decided, each with its reason, and
trains nothing. With --output=plan.json the decisions are written as JSON, which training takes:
`python -m jaxseg.main --config=configs/auto.py --config.data.dir=DIR --config.plan.file=plan.json`.
Decisions that you change in that file are obeyed.
"""

import os
import sys
from collections.abc import Sequence

from absl import flags, logging

from jaxseg import command

NAME = "jaxseg-plan"


def main(argv: Sequence[str]) -> None:
    """Plans, or turns an expected failure into one clear message."""
    options = command.parse(NAME, argv, text=__doc__, define=_define_flags, required=("dir",))
    logging.set_verbosity(logging.ERROR)
    with command.one_message(NAME):
        command.hide_accelerators()
        from jaxseg.experiment.plan_folder import plan_folder  # needs `pip install jaxseg[train]`
        from jaxseg.run.log import TerminalLog

        text = plan_folder(
            os.path.expanduser(options.dir),
            preset=options.preset,
            configuration=options.configuration,
            settings=options.set,
            output=os.path.expanduser(options.output),
            log=TerminalLog(),
        )
        print(f"\n{text}")


def _define_flags(options):
    own = {"flag_values": options}
    flags.DEFINE_string("dir", "", "the folder", **own)
    flags.DEFINE_string("preset", "auto", "how large: as plan.preset of a config", **own)
    flags.DEFINE_string("configuration", "auto", "as plan.configuration of a config", **own)
    flags.DEFINE_multi_string(
        "set", [], "another field of the config, such as --set=split.fold=1; repeatable", **own
    )
    flags.DEFINE_string("output", "", "JSON file for the decisions", **own)


def run() -> None:
    """Console script."""
    command.prepare_environment()
    main(sys.argv)


if __name__ == "__main__":
    run()
