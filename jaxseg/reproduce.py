"""Replays a run and says where it first differs: `python -m jaxseg.reproduce --workdir=RUN`.

Every step of a run leaves a line in trace.jsonl: checksums of its batch and of the parameters after
it, its loss and gradient norm. The same steps are done again, from the first, and compared to the
bit. Nothing is written. Exits with 1 where a step differs, with 2 if nothing could be replayed.

Give it the devices and the environment variables of the run; what else has changed since is shown.
"""

import os
import sys

# As jaxseg.main does: read when TensorFlow is loaded, and decides the sums of the augmentation.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from absl import flags, logging
from tqdm import tqdm

from jaxseg import command, experiment, identity, train, writers
from jaxseg import config as config_lib
from jaxseg.data.cases import DatasetProblems
from jaxseg.data.splits import SplitProblem
from jaxseg.optim import GroupProblem
from jaxseg.transfer import TransferProblem
from jaxseg.weights import WeightsProblem

NAME = "jaxseg-reproduce"
# In the order in which one follows from the other.
COMPARED = ("batch", "loss", "grad_norm", "params")


class ReproduceProblem(ValueError):
    """The run can not be replayed; the message says why."""


def reproduce(workdir, num_steps=None, *, say):
    """Replays the first steps of a run up to one that differs.

    Args:
      workdir: the run's folder.
      num_steps: how many; None for all that were recorded.
      say: called with each line for the user: what has changed since the run, what was found.
    Returns:
      Whether all steps agree.
    Raises:
      ReproduceProblem: so many steps were not recorded.
      OSError: a file of the run can not be read.
      ConfigProblems and what `train.replay` raises: the run can not be started again.
    """
    with open(os.path.join(workdir, "config.json"), encoding="utf-8") as file:
        config_json = file.read()
    config = config_lib.from_json(config_json)
    recorded = {row["step"]: row for row in writers.read_trace(workdir)}
    num_steps = num_steps or max(recorded, default=1)
    missing = [step for step in range(1, num_steps + 1) if step not in recorded]
    if missing:
        raise ReproduceProblem(
            f"{os.path.join(workdir, writers.TRACE_NAME)} has {len(recorded)} steps, not step "
            f"{missing[0]}; choose a smaller --num_steps, or a run that was recorded"
        )
    log = writers.SilentLog()
    data = experiment.load_data(config, log)
    now = identity.describe(config_json, data.fingerprint)
    for session in identity.read_sessions(workdir):
        for line in identity.differences(session, now):
            say(f"the run from step {session['first_step'] + 1} on -> now: {line}")

    rows = train.replay(config, data, log, num_steps)
    for row in tqdm(rows, total=num_steps, unit="step", disable=None):
        found = differences(recorded[row["step"]], row)
        if found:
            say("\n  ".join([f"step {row['step']} is the first that differs:", *found]))
            return False
    say(f"all {num_steps} steps agree to the bit")
    return True


def differences(recorded, replayed):
    """What differs between two rows of `writers.trace_row`, as lines."""
    lines = []
    for name in COMPARED:
        pairs = [_as_list(recorded[name]), _as_list(replayed[name])]
        if len(pairs[0]) != len(pairs[1]):
            lines.append(f"{name}: of {len(pairs[0])} members -> of {len(pairs[1])}")
            continue
        for member, (then, now) in enumerate(zip(*pairs, strict=True)):
            if then != now:
                of = f" of member {member}" if len(pairs[0]) > 1 else ""
                lines.append(f"{name}{of}: {_shown(name, then)} -> {_shown(name, now)}")
    return lines


def _as_list(value):
    return value if isinstance(value, list) else [value]


def _shown(name, text):
    return text if name in ("batch", "params") else repr(float.fromhex(text))


def main(argv):
    """Replays, and turns every expected failure into one clear message."""
    options = command.parse(NAME, argv, text=__doc__, define=_define_flags, required=("workdir",))
    logging.set_verbosity(logging.ERROR)
    command.hide_accelerators()
    try:
        agrees = reproduce(os.path.expanduser(options.workdir), options.num_steps, say=_say)
    except (
        config_lib.ConfigProblems,
        DatasetProblems,
        GroupProblem,
        OSError,
        ReproduceProblem,
        SplitProblem,
        TransferProblem,
        WeightsProblem,
        train.RunProblem,
    ) as error:
        command.leave(NAME, str(error))
    except KeyboardInterrupt:
        command.leave(NAME, "interrupted", status=130)
    sys.exit(0 if agrees else 1)


def _say(line):
    tqdm.write(line, file=sys.stdout)


def _define_flags(options):
    own = {"flag_values": options}
    flags.DEFINE_string("workdir", "", "the run", **own)
    flags.DEFINE_integer("num_steps", None, "how many, of all", lower_bound=1, **own)


def run():
    """Console script."""
    main(sys.argv)


if __name__ == "__main__":
    run()
