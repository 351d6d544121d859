"""Trains what a config describes: `python -m jaxseg.main --config=configs/unet.py`.

Any field can be set on the command line: `--config.optim.learning_rate=1e-3`.
"""

import os
import re
import sys

# Read when TensorFlow is loaded. oneDNN would make its sums depend on the number of threads; the
# start-up notes say nothing to a person who trains a network.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import tensorflow as tf
from absl import app, flags, logging
from ml_collections import config_flags

from jaxseg import config as config_lib
from jaxseg.data.cases import DatasetProblems
from jaxseg.data.splits import SplitProblem
from jaxseg.optim import GroupProblem
from jaxseg.train import RunProblem, train
from jaxseg.transfer import TransferProblem
from jaxseg.weights import WeightsProblem

# What a user can mend: shown without a traceback.
EXPECTED = (
    config_lib.ConfigProblems,
    DatasetProblems,
    GroupProblem,
    OSError,
    RunProblem,
    SplitProblem,
    TransferProblem,
    WeightsProblem,
)

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)


def main(argv):
    """Validates, trains, and turns every expected failure into one clear message."""
    if len(argv) > 1:
        _exit(f"unexpected argument {argv[1]!r}: set fields with --config.FIELD=VALUE")
    if _CONFIG.value is None:
        _exit("say which experiment: --config=configs/unet.py")
    logging.set_verbosity(logging.ERROR)
    tf.config.set_visible_devices([], "GPU")  # they are JAX's
    tf.config.set_visible_devices([], "TPU")
    try:
        config_lib.validate(_CONFIG.value)
        stopped_by = train(_CONFIG.value)
    except EXPECTED as error:
        _exit(str(error))
    except KeyboardInterrupt:
        _exit("interrupted; what was saved is kept", status=130)
    if stopped_by:
        sys.exit(128 + stopped_by)


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


def _exit(message, status=2):
    print(f"jaxseg: {message}", file=sys.stderr)
    sys.exit(status)


def run():
    """Console script."""
    jax.config.config_with_absl()
    app.run(main, flags_parser=_parse_flags)


if __name__ == "__main__":
    run()
