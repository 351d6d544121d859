"""Prints a network's layers with their shapes, parameters and operations, and its size as a whole.

python -m jaxseg.models unet --image=128x128x1 features=16,32,64 norm=batch
python -m jaxseg.models fcn --image=224x224x3 --num_classes=21 encoder=vgg16 features='()'
"""

import argparse
import ast
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxseg.models.registry import MODELS, create_model
from jaxseg.models.summary import summarise_model, training_memory


def main(argv: Sequence[str]) -> None:
    """Prints the table; exits with a message if the network can not be built."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxseg.models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--image", type=parse_shape, default="128x128x1", metavar="SIZE")
    parser.add_argument("--num_classes", type=int, default=2)
    parser.add_argument("fields", nargs="*", metavar="FIELD=VALUE", help="of the module")
    arguments = parser.parse_intermixed_args(argv)
    try:
        options = dict(map(parse_field, arguments.fields))
        model = create_model(arguments.model, arguments.num_classes, **options)
        image = jnp.zeros((1, *arguments.image))
        table = model.tabulate(
            jax.random.key(0),
            image,
            compute_flops=True,
            console_kwargs={"width": 140, "force_terminal": False},
        )
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    print(table)
    print(summarise_model(model, arguments.image))
    print(f"kept for the gradient: {training_memory(model, arguments.image) / 2**20:.1f} MiB")


def parse_shape(text: str) -> tuple[int, ...]:
    """Splits "128x128x1": two or three sizes, then the number of channels."""
    shape = tuple(map(int, text.split("x")))
    if len(shape) not in (3, 4):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 128x128x1")
    return shape


def parse_field(text: str) -> tuple[str, Any]:
    """Splits "name=value"; the value is a Python literal, or else a word."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} is not FIELD=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


if __name__ == "__main__":
    main(sys.argv[1:])
