"""Trains what a config describes: `python -m jaxseg.main --config=configs/unet.py`.

Any field can be set on the command line: `--config.optim.learning_rate=1e-3`. A config that is no
file, as in `--config=unet.py`, is the shipped one of that name. With `--distributed` this is one of
several processes that train together.
"""

import functools
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from jaxseg import command, config_checks, config_reference
from jaxseg.problem import Problem

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


def main(argv: Sequence[str]) -> None:
    """Validates, trains, and turns every expected failure into one clear message."""
    begun_s = time.monotonic()
    if len(argv) > 1 or _CONFIG.value is None:
        what = f"unexpected argument {argv[1]!r}: set fields with --config.FIELD=VALUE"
        _exit(what if len(argv) > 1 else "say which experiment: --config=configs/unet.py")
    logging.set_verbosity(logging.ERROR)
    try:
        config_checks.validate(_CONFIG.value)
        command.hide_accelerators()
        from jaxseg import parallel  # TensorFlow and JAX take seconds to load

        if _DISTRIBUTED.value:
            parallel.join_processes(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        command.keep_compiled(_CONFIG.value.compile.cache_dir)
        from jaxseg.experiment.train import train  # needs what `pip install jaxseg[train]` brings

        stopped_by = train(_CONFIG.value, begun_s)
    except KeyboardInterrupt:
        _exit("interrupted; what was saved is kept", status=130)
    except Exception as error:
        if _DISTRIBUTED.value and parallel.has_lost_another(error):
            _exit(
                "another process of this run has died or can not be reached: "
                f"{str(error).splitlines()[0]}. What was saved is kept; start all processes again, "
                "as many as you like, and they go on from the last checkpoint",
                status=3,
            )
        if isinstance(error, Problem | OSError):
            _exit(command.worded(error))
        if isinstance(error, ModuleNotFoundError):
            _exit(command.missing_extra(error))
        if not _DISTRIBUTED.value:
            raise
        traceback.print_exc()
        _exit("this process has failed, and the others stop with it", status=1)
    if stopped_by:
        sys.exit(128 + stopped_by)


def _parse_flags(argv):
    """Parses the command line; lists every setting that can not be used, not just the first."""
    if {"-h", "--help"} & set(argv):
        print(__doc__, flags.FLAGS.module_help(sys.modules[__name__]), sep="\n")
        print("\nSettings, --config.NAME=VALUE:\n", config_reference.reference(), sep="\n")
        sys.exit()
    argv = [_with_shipped_config(argument) for argument in command.last_of_each(argv)]
    rest: list[str] = []
    if (problem := _problem_of(lambda: rest.extend(flags.FLAGS(argv)))) is None:
        return rest
    config = [argument for argument in argv if argument.startswith("--config=")]
    settings = [argument for argument in argv if argument.startswith("--config.")]
    found = {
        setting: _problem_of(functools.partial(_parse_alone, [argv[0], *config, setting]))
        for setting in settings
    }
    lines = [f"{setting}: {text}" for setting, text in found.items() if text]
    _exit("\n".join(lines or [problem]))


def _with_shipped_config(argument):
    name = argument.removeprefix("--config=")
    shipped = command.shipped_configs()
    if name == argument or os.path.exists(name) or os.path.basename(name) != name:
        return argument
    if name not in shipped:
        _exit(f"{name}: no such file, and none of the shipped configs {', '.join(shipped)}")
    return f"--config={shipped[name]}"


def _parse_alone(argv):
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values, sys_argv=argv)
    values(argv)


def _problem_of(parse: Callable[[], object]) -> str | None:
    try:
        parse()
    except (AttributeError, KeyError) as error:  # how ml_collections reports a misspelt field
        nearest = re.search(r'mean "(\w+)"', str(error))
        return "no such field" + (f'; did you mean "{nearest[1]}"?' if nearest else "")
    except (flags.Error, TypeError, ValueError, OSError) as error:
        return str(error)
    return None


def _exit(message: str, status: int = 2) -> NoReturn:
    print(f"jaxseg: {message}", file=sys.stderr, flush=True)
    if flags.FLAGS.is_parsed() and _DISTRIBUTED.value:
        sys.stdout.flush()
        os._exit(status)  # not to wait for a farewell of others, who wait for this one
    sys.exit(status)


def run() -> None:
    """Console script."""
    command.prepare_environment()
    command.say_whatever_comes()
    if "-h" not in sys.argv and "--help" not in sys.argv:
        import jax

        jax.config.config_with_absl()
    app.run(main, flags_parser=_parse_flags)


if __name__ == "__main__":
    run()
