"""Reads trained weights: files in torch's names, and runs of ours. Nothing is downloaded."""

import json
import os
import pickle
import re
import shlex

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from jaxseg.problem import Problem
from jaxseg.run import checkpoint
from jaxseg.training import transfer

TORCHVISION_URL = "https://download.pytorch.org/models/"
TORCHVISION_FILES = {
    "vgg16": "vgg16-397923af.pth",
    "resnet18": "resnet18-f37072fd.pth",
    "resnet34": "resnet34-b627a593.pth",
    "resnet50": "resnet50-11ad3fa6.pth",
}
WRAPPERS = ("state_dict", "model")


class WeightsProblem(Problem, RuntimeError):
    """Weights can not be read."""


def read_weights(path: str) -> dict[str, dict[str, np.ndarray]]:
    """Reads the weights of a network.

    Args:
      path: a `.safetensors` or `.npz` file, or one that torch saved (`.pt`, `.pth`, `.bin`; needs
        torch), with a `state_dict` whose names `transfer.from_torch` knows; or the folder of a
        jaxseg run or of its checkpoints, of which the best step by validation is read, or the last
        if none was validated; of a run with several members `FOLDER/memberN` is the Nth of them,
        from 0. Nothing in a file is ever executed.
    Returns:
      {"params": {path: array}, "batch_stats": {path: array}}, float32, for `transfer.adapt`.
    Raises:
      WeightsProblem: the file is missing (the message says what to fetch), damaged, of another
        format, holds objects that are not arrays, or values that are not finite; a run has several
        members and none is named, or has not the one that is.
      TransferProblem: as `transfer.from_torch`.
    """
    folder, member = _split_member(path)
    if os.path.isdir(folder):
        source = _read_run(folder, member)
    elif os.path.exists(path):
        source = transfer.from_torch(_read_file(path))
    else:
        raise WeightsProblem(_how_to_get(path))
    arrays = source["params"] | source["batch_stats"]
    bad = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if bad:
        raise WeightsProblem(
            f"{path} holds values that are not finite, in {len(bad)} of {len(arrays)} arrays, "
            f"{bad[0]} among them: take another checkpoint of that training"
        )
    return source


def _split_member(path):
    """(folder, N) of `FOLDER/memberN`, else (path, None)."""
    folder, name = os.path.split(path.rstrip(os.sep))
    found = re.fullmatch(r"member(\d+)", name)
    return (folder, int(found[1])) if found and not os.path.exists(path) else (path, None)


def _read_run(folder, member):
    inner = os.path.join(folder, "checkpoints")
    directory = os.path.abspath(inner if os.path.isdir(inner) else folder)
    try:
        num_members = _num_members(os.path.dirname(directory))
        variables = checkpoint.load_variables(directory)
    except Exception as error:  # a damaged checkpoint fails in as many ways as there are files
        raise WeightsProblem(
            f"{folder} is no folder of a jaxseg run with a readable checkpoint: "
            f"{_first_line(error)}"
        ) from error
    _check_member(folder, num_members, member)
    if member is not None:
        variables = jax.tree.map(lambda x: x[member], variables)
    return {name: flatten_dict(tree, sep="/") for name, tree in variables.items()}


def _num_members(workdir):
    """How many members a run trained together; 0 for a single network."""
    path = os.path.join(workdir, "config.json")
    if not os.path.exists(path):
        return 0
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    ensemble = config.get("ensemble", {"size": 1, "folds": 0})  # older runs have none
    rates = config["optim"]["learning_rate"]
    num = max(ensemble["size"], ensemble["folds"], len(rates) if isinstance(rates, list) else 1)
    return num if num > 1 else 0


def _check_member(folder, num_members, member):
    if num_members == 0 and member is not None:
        raise WeightsProblem(f"{folder} holds a single network, no member{member}: give {folder}")
    if num_members > 0 and member not in range(num_members):
        raise WeightsProblem(
            f"{folder} holds {num_members} members, and a network starts from one of them: give "
            f"{folder}/member0 to {folder}/member{num_members - 1}"
        )


def _read_file(path):
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in READERS:
        raise WeightsProblem(
            f"{path} has none of the known endings {', '.join(READERS)}; the folder of a jaxseg "
            "run is read too"
        )
    try:
        state = READERS[suffix](path)
        with np.errstate(over="ignore"):  # an infinity is reported with the others
            return {
                name: np.asarray(array).astype(np.float32, casting="same_kind", copy=False)
                for name, array in state.items()
            }
    except WeightsProblem:
        raise
    except pickle.UnpicklingError as error:  # whose text tells how to execute the file
        raise WeightsProblem(
            f"{path} is refused: it is damaged, no file of torch, or holds objects other than "
            "tensors, which could run code; save a plain state_dict and name that file"
        ) from error
    except Exception as error:  # what a damaged or hostile file raises is up to its reader
        raise WeightsProblem(
            f"{path} can not be read as {suffix}, it is damaged or of another format; fetch it "
            f"again: {_first_line(error)}"
        ) from error


def _read_safetensors(path):
    try:
        from safetensors import numpy
    except ImportError:
        raise WeightsProblem(
            f"{path} needs the package safetensors: pip install safetensors"
        ) from None
    return numpy.load_file(path)


def _read_npz(path):
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def _read_torch(path):
    try:
        import torch
    except ImportError:
        target = os.path.splitext(path)[0] + ".safetensors"
        code = (
            "import torch, safetensors.torch as s; s.save_file({k: v.contiguous().clone() "
            f"for k, v in torch.load({path!r}, weights_only=True).items()}}, {target!r})"
        )
        raise WeightsProblem(
            f"{path} needs torch: pip install torch; or, where torch and safetensors are "
            f"installed, convert it once: python -c {shlex.quote(code)}"
        ) from None
    state = torch.load(path, weights_only=True, map_location="cpu")
    for name in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
            break
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise WeightsProblem(
            f"{path} is no dict from names to tensors, also not under {' or '.join(WRAPPERS)}: "
            "save the network's state_dict() alone"
        )
    return {name: tensor.detach().float().numpy() for name, tensor in state.items()}


READERS = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".bin": _read_torch,
}


def _how_to_get(path):
    folder, name = os.path.split(path)
    found = re.match(f"({'|'.join(TORCHVISION_FILES)})(-[0-9a-f]{{8}}\\.pth$|\\.|$)", name)
    if not found:
        return f"there is no {path}: name a run's folder or a {', '.join(READERS)} file"
    file = name if found[2].startswith("-") else TORCHVISION_FILES[found[1]]
    place = os.path.join(folder, file)
    return (
        f"there is no {path}, and nothing is downloaded at run time: fetch the weights of "
        f"{found[1]} once with `curl -L -o {shlex.quote(place)} {TORCHVISION_URL}{file}` and name "
        f"{place}"
    )


def _first_line(error):
    return f"{type(error).__name__}: {error}".splitlines()[0]
