"""Trains what a config describes: `python -m jaxseg.main --config=configs/unet.py`.

Any field can be set on the command line: `--config.optim.learning_rate=1e-3`. With `--distributed`
it is one of several processes that train together.
"""

import faulthandler
import os
import re
import sys
import traceback

# Read when TensorFlow is loaded. oneDNN would make its sums depend on the number of threads; the
# start-up notes say nothing to a person who trains a network.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from jaxseg import config as config_lib
from jaxseg.checkpoint import CheckpointProblem
from jaxseg.command import hide_accelerators
from jaxseg.data.cases import DatasetProblems
from jaxseg.data.splits import SplitProblem
from jaxseg.optim import GroupProblem
from jaxseg.ownership import OwnershipProblem
from jaxseg.train import RunProblem, train
from jaxseg.transfer import TransferProblem
from jaxseg.weights import WeightsProblem

# What a user can mend: shown without a traceback.
EXPECTED = (
    CheckpointProblem,
    config_lib.ConfigProblems,
    DatasetProblems,
    GroupProblem,
    OSError,
    OwnershipProblem,
    RunProblem,
    SplitProblem,
    TransferProblem,
    WeightsProblem,
)

# A process that is not heard of for so long has died, and the others stop.
HEARTBEAT_TIMEOUT_S = 30
# The first process evaluates; the others wait for it.
SHUTDOWN_TIMEOUT_S = 7 * 24 * 3600

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "this is one of several processes; JAX finds the others under Slurm, OpenMPI, GKE and on TPU "
    "pods, and elsewhere by the next three",
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of the first process")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "how many processes there are")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "which of them this is, from 0")


def main(argv):
    """Validates, trains, and turns every expected failure into one clear message."""
    if len(argv) > 1:
        _exit(f"unexpected argument {argv[1]!r}: set fields with --config.FIELD=VALUE")
    if _CONFIG.value is None:
        _exit("say which experiment: --config=configs/unet.py")
    logging.set_verbosity(logging.ERROR)
    hide_accelerators()
    try:
        config_lib.validate(_CONFIG.value)
        if _DISTRIBUTED.value:
            join_processes(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        stopped_by = train(_CONFIG.value)
    except KeyboardInterrupt:
        _exit("interrupted; what was saved is kept", status=130)
    except Exception as error:
        if _DISTRIBUTED.value and _comes_from_another(error):
            _exit(
                "another process of this run has died or can not be reached: "
                f"{str(error).splitlines()[0]}. What was saved is kept; start all processes again, "
                "as many as you like, and they go on from the last checkpoint",
                status=3,
            )
        if isinstance(error, EXPECTED):
            _exit(str(error))
        if not _DISTRIBUTED.value:
            raise
        traceback.print_exc()
        _exit("this process has failed, and the others stop with it", status=1)
    if stopped_by:
        sys.exit(128 + stopped_by)


def join_processes(coordinator, num_processes, process_id):
    """Makes this one of several processes, whose devices become one set.

    Args:
      coordinator: "host:port" of the first; None lets JAX ask Slurm, OpenMPI, GKE or the TPU pod.
      num_processes, process_id: how many there are, and which this is; None likewise.
    Raises:
      RunProblem: there is no such environment, or the others do not come.
    """
    faulthandler.disable()  # absl's: its stacks of all threads would bury JAX's last words
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
        )
    except (RuntimeError, ValueError) as error:
        raise RunProblem(
            f"the processes could not be joined: {error}; where there is no Slurm, OpenMPI, GKE or "
            "TPU pod, give --coordinator=HOST:PORT --num_processes=N --process_id=I to each"
        ) from error


def _parse_flags(argv):
    """Parses the command line; lists every setting that can not be used, not just the first."""
    rest = []
    problem = _problem_of(lambda: rest.extend(flags.FLAGS(argv)))
    if problem is None:
        return rest
    config = [argument for argument in argv if argument.startswith("--config=")]
    settings = [argument for argument in argv if argument.startswith("--config.")]
    found = {s: _problem_of(lambda s=s: _parse_alone([argv[0], *config, s])) for s in settings}
    lines = [f"{setting}: {text}" for setting, text in found.items() if text]
    _exit("\n".join(lines or [problem]))


def _parse_alone(argv):
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values, sys_argv=argv)
    values(argv)


def _problem_of(parse):
    try:
        parse()
    except (AttributeError, KeyError) as error:  # how ml_collections reports a misspelt field
        nearest = re.search(r'mean "(\w+)"', str(error))
        return "no such field" + (f'; did you mean "{nearest[1]}"?' if nearest else "")
    except (flags.Error, TypeError, ValueError, OSError) as error:
        return str(error)
    return None


def _comes_from_another(error):
    """Whether a process was lost; what gloo says of it is raised as errors of several types."""
    text = str(error)
    is_lost = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in text
    return is_lost or "Gloo" in text


def _exit(message, status=2):
    print(f"jaxseg: {message}", file=sys.stderr, flush=True)
    if flags.FLAGS.is_parsed() and _DISTRIBUTED.value:
        sys.stdout.flush()
        os._exit(status)  # not to wait for a farewell of others, who wait for this one
    sys.exit(status)


def run():
    """Console script."""
    jax.config.config_with_absl()
    app.run(main, flags_parser=_parse_flags)


if __name__ == "__main__":
    run()
