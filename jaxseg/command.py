"""What the commands share: flags, one clear message at the end, compiled programs, configs."""

import contextlib
import errno
import hashlib
import io
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from absl import flags

from jaxseg.problem import Problem

# By a package that a command may lack: the extra that brings it.
EXTRAS = {
    "jinja2": "train",
    "matplotlib": "train",
    "tensorflow": "train",
    "tensorflow_datasets": "train",
}


# By the number of a system's error.
_MENDS = dict.fromkeys(
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free space on its disk, or write elsewhere"
)
_MENDS |= dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS), "make it accessible to you, or give another folder"
)
_MENDS |= dict.fromkeys(
    (errno.EEXIST, errno.ENOTDIR, errno.EISDIR), "something else has that name: give another"
)
_MENDS[errno.EIO] = "the disk fails: check it, or use another"

# What TensorFlow and XLA read when they are loaded, unless the user has set it.
ENVIRONMENT = {
    "TF_ENABLE_ONEDNN_OPTS": "0",  # oneDNN would make sums depend on the number of threads
    "TF_CPP_MIN_LOG_LEVEL": "3",  # start-up notes say nothing to a person who trains a network
    "TF_USE_LEGACY_KERAS": "1",  # and so none: Keras is not used, and takes 1.7 s to load
}


def prepare_environment() -> None:
    """Sets what TensorFlow and XLA are to find when they are loaded; to be called before that."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def say_whatever_comes() -> None:
    """Lets a terminal that lacks a character show another in its place, not fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def parse(
    name: str,
    argv: Sequence[str],
    *,
    text: str,
    define: Callable[[flags.FlagValues], None],
    required: Sequence[str],
) -> flags.FlagValues:
    """Reads a command line; exits with one message if it can not be used, or shows the help.

    Args:
      name: of the command, for messages.
      argv: program and arguments.
      text: shown before the flags by --help.
      define: function that defines the flags in a FlagValues; so flags of different commands may
        have one name.
      required: names of flags that must have a value.
    """
    say_whatever_comes()
    options = flags.FlagValues()
    define(options)
    flags.DEFINE_bool("help", False, "show this text", short_name="h", flag_values=options)
    try:
        rest = options(argv)[1:]
    except flags.Error as error:
        leave(name, str(error))
    if options.help:
        print(text, options.get_help(), sep="\n")
        sys.exit()
    if rest:
        leave(name, f"unexpected argument {rest[0]!r}: see --help")
    missing = [f"--{flag}" for flag in required if not options[flag].value]
    if missing:
        leave(name, f"{', '.join(missing)} must be given: see --help")
    return options


def last_of_each(argv: Sequence[str]) -> list[str]:
    """The arguments without settings of a config that come again, whose values would be joined."""
    place_of = {argument.partition("=")[0]: place for place, argument in enumerate(argv)}
    return [
        argument
        for place, argument in enumerate(argv)
        if not argument.startswith("--config.") or place_of[argument.partition("=")[0]] == place
    ]


@contextlib.contextmanager
def one_message(name: str, *, interrupted: str = "interrupted") -> Iterator[None]:
    """Ends the command with one message where its work fails for a reason that a user can mend.

    Args:
      name: of the command.
      interrupted: the message after Ctrl-C.
    """
    try:
        yield
    except (Problem, OSError) as error:
        leave(name, worded(error))
    except ModuleNotFoundError as error:
        leave(name, missing_extra(error))
    except KeyboardInterrupt:
        leave(name, interrupted, status=130)


def worded(error: Exception) -> str:
    """The message of an error that a user can mend; of what the system says, with the mend."""
    if not isinstance(error, OSError) or error.errno is None or error.filename is None:
        return str(error)
    text = f"{error.filename}: {error.strerror}"
    return f"{text}; {_MENDS[error.errno]}" if error.errno in _MENDS else text


def missing_extra(error: ModuleNotFoundError) -> str:
    """Says which extra brings the package that was not found; raises again if none does."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        raise error
    return (
        f"this command needs {package}, which is not installed: pip install "
        f"'jaxseg[{EXTRAS[package]}]' (in a checkout: pip install -e '.[{EXTRAS[package]}]')"
    )


def leave(name: str, message: str, status: int = 2) -> NoReturn:
    """Ends the command with a message instead of a traceback."""
    print(f"{name}: {message}", file=sys.stderr)
    sys.exit(status)


def hide_accelerators() -> None:
    """Keeps TensorFlow, which prepares data, from taking the memory of JAX's GPUs and TPUs."""
    import tensorflow as tf  # takes seconds, which commands without data are spared

    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)


def keep_compiled(folder: str) -> None:
    """Lets JAX keep compiled programs in a folder, where the next process finds them.

    Programs are kept apart by what they depend on and JAX does not look at: the processor, whose
    instructions they use, and the number of threads, which decides how sums on a CPU are split. A
    folder that JAX was given by its own means (JAX_COMPILATION_CACHE_DIR) stays.

    Args:
      folder: made if missing, for this user alone, since a program from it is executed; "" keeps
        nothing. Where it can not be made nothing is kept either.
    """
    import jax  # not needed to show the help

    if not folder or jax.config.values["jax_compilation_cache_dir"]:
        return
    depends_on = (
        jax.__version__,
        _processor(),
        os.environ.get("NPROC"),
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        jax.config.values["jax_num_cpu_devices"],
    )
    digest = hashlib.sha256(repr(depends_on).encode()).hexdigest()[:16]
    path = os.path.join(os.path.abspath(os.path.expanduser(folder)), digest)
    with contextlib.suppress(OSError):
        os.makedirs(path, mode=0o700, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", path)


def _processor():
    """Model and instruction sets of the processor."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    first = text.partition("\n\n")[0]
    return re.findall(r"^(?:model name|flags|Features|CPU part)\s*:.*", first, re.MULTILINE)


def shipped_configs() -> dict[str, Path]:
    """The config files that come with jaxseg, by name: beside the package, or inside a wheel."""
    package = Path(__file__).parent
    inside = package / "configs"
    folder = inside if inside.is_dir() else package.parent / "configs"
    return {path.name: path for path in sorted(folder.glob("*.py"))}
