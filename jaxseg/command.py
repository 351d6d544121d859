"""What the commands share: flags of their own, and one clear message at the end."""

import sys

from absl import flags


def parse(name, argv, *, text, define, required):
    """Reads a command line; exits with one message if it can not be used, or shows the help.

    Args:
      name: of the command, for messages.
      argv: program and arguments.
      text: shown before the flags by --help.
      define: function that defines the flags in a FlagValues; so flags of different commands may
        have one name.
      required: names of flags that must have a value.
    Returns:
      absl FlagValues.
    """
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


def hide_accelerators():
    """Keeps TensorFlow, which prepares data, from taking the memory of JAX's GPUs and TPUs."""
    import tensorflow as tf  # takes seconds, which commands without data are spared

    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)


def leave(name, message, status=2):
    """Ends the command with a message instead of a traceback."""
    print(f"{name}: {message}", file=sys.stderr)
    sys.exit(status)
