"""Accelerators that are not there, as XLA knows them: steps can be compiled for them all the same.

A GPU is described by a text file, XLA's GpuTargetConfigProto; a TPU slice by its name and shape.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import topologies

from jaxseg.problem import Problem

# GiB of a chip; https://cloud.google.com/tpu/docs, "System architecture".
TPU_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
# XLA tries tiles of matrix products on the card; without one it fails to choose some.
_WITHOUT_A_CARD = {"xla_gpu_enable_triton_gemm": False}


class TargetProblem(Problem, ValueError):
    """A described device can not be compiled for; the message says what is missing."""


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
      devices: of JAX, which can run nothing.
      num_bytes: memory of each.
      options: of the compiler.
    """

    devices: tuple[Any, ...]
    num_bytes: float
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def described_target(name: str) -> Target:
    """The devices of a description.

    Args:
      name: path of a file such as XLA's h100.txtpb, or a TPU slice such as "v5e:2x2".
    Raises:
      TargetProblem: there is none, or this installation can not compile for it.
    """
    path = os.path.expanduser(name)
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            text = file.read()
        size = re.search(r"^\s*device_memory_size: (\d+)", text, re.MULTILINE)
        if not size:
            raise TargetProblem(f"plan.target {name}: says no device_memory_size; see XLA's own")
        devices = _devices(name, "cuda", "1x1x1", target_config=text)
        return Target(devices, float(size[1]), _WITHOUT_A_CARD)
    kind, colon, _ = name.partition(":")
    if not colon or kind not in TPU_GIB:
        kinds = ", ".join(TPU_GIB)
        raise TargetProblem(
            f"plan.target {name}: no such file, and no slice of TPUs; give the path of a GPU's "
            f"description, or KIND:SHAPE such as v5e:2x2, of {kinds}"
        )
    return Target(_devices(name, "tpu", name), TPU_GIB[kind] * 2.0**30)


def _devices(name, platform, topology, **options):
    extra = {"cuda": "jax[cuda12]", "tpu": "jax[tpu]"}[platform]
    try:
        if platform == "cuda":
            options |= {"topology": topology}
            topology = ""
        made = topologies.get_topology_desc(topology, platform, **options)
    except NotImplementedError:
        wanted = f"pip install '{extra}=={jax.__version__}'"
        raise TargetProblem(f"plan.target {name}: needs XLA's compiler for it, {wanted}") from None
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        wanted = f"with '{extra}=={jax.__version__}' installed"
        raise TargetProblem(f"plan.target {name}: {error} ({wanted} it may be known)") from None
    return tuple(made.devices)
