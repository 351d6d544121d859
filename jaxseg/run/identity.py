"""What a run was: everything that its numbers depend on, written down at every start."""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from jaxseg import config as config_lib
from jaxseg.run import readers, writers

NAME = "identity.json"
VERSIONS_OF = ("jaxseg", "jax", "flax", "optax", "orbax-checkpoint", "numpy", "scipy", "nibabel")
# What prepares the batches, and what computes the steps.
RUNTIMES = ("tensorflow", "tensorflow-cpu", "jaxlib")
ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE", "TF_ENABLE_ONEDNN_OPTS")
SETTINGS = (
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_enable_x64",
    "jax_threefry_partitionable",
)


def versions() -> dict[str, str | None]:
    """Versions of what computed a result: packages, Python, and the device."""
    found = {name: _version(name) for name in VERSIONS_OF}
    device = jax.devices()[0]
    return found | {
        "python": platform.python_version(),
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
    }


def describe(config_json: str, sha256: str) -> dict[str, Any]:
    """Everything that the numbers of a run depend on, JSON-ready.

    Args:
      config_json: what `jaxseg.config.to_json` wrote.
      sha256: SHA-256 of the data.
    """
    device = jax.devices()[0]
    return {
        "config": hashlib.sha256(config_json.encode()).hexdigest(),
        "data": sha256,
        "seed": json.loads(config_json)["seed"],
        "parallel": json.loads(config_json)["parallel"],
        "source": source_revision(),
        "versions": versions() | {name: _version(name) for name in RUNTIMES},
        "backend": jax.default_backend(),
        "runtime": device.client.platform_version,
        "device_kind": device.device_kind,
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
        "cpu": _cpu(),
        "settings": {name: getattr(jax.config, name) for name in SETTINGS},
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
    }


def record(workdir: str | Path, first_step: int, description: dict[str, Any]) -> None:
    """Adds a session, which goes on from `first_step`, to the identity of the run.

    It takes the place of those that began there or later, whose steps are done again.

    Args:
      workdir: existing folder.
      first_step: number of updates done before.
      description: from `describe`.
    Raises:
      FileProblem: what was recorded before is damaged.
      OSError: the file can not be written.
    """
    sessions = [s for s in read_sessions(workdir) if s["first_step"] < first_step]
    sessions.append({"first_step": first_step} | description)
    writers.write_json(os.path.join(workdir, NAME), {"sessions": sessions})


def read_sessions(workdir: str | Path) -> list[dict[str, Any]]:
    """The sessions that were recorded, oldest first; none for a run without the file.

    Raises:
      FileProblem: the file is damaged.
    """
    if not os.path.exists(os.path.join(workdir, NAME)):
        return []
    return readers.read_file(workdir, NAME, _sessions_in)


def differences(recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What has changed since a session was recorded.

    Args:
      recorded: a session, or a description.
      now: from `describe`.
    Returns:
      List of lines "field: recorded -> now".
    """
    recorded = {name: value for name, value in recorded.items() if name != "first_step"}
    return config_lib.differences(json.dumps(recorded), json.dumps(now))


def source_revision() -> str | None:
    """Git revision of this source code, with "+changes" if files differ; None outside of git."""
    folder = Path(__file__).resolve().parents[1]
    try:
        if not _git(folder, "ls-files", "--", "__init__.py"):
            return None  # installed into somebody else's repository
        revision = _git(folder, "rev-parse", "HEAD")
        return revision + ("+changes" if _git(folder, "status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _sessions_in(text):
    sessions = readers.json_object(text, ("sessions",))["sessions"]
    for session in sessions:
        if not isinstance(session["first_step"], int):
            raise ValueError(f"a session begins at {session['first_step']!r}")
        differences(session, {})
    return sessions


def _git(folder, *arguments):
    command = ["git", "-C", str(folder), *arguments]
    found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10)
    return found.stdout.strip()


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu():
    """Model and number of processors: XLA and TensorFlow choose their sums by them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0] if names else platform.machine()}"
