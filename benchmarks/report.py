"""What every benchmark prints beside its figures: versions and device, as one JSON object."""

import json
import os
import platform
from importlib import metadata

PACKAGES = ("jaxseg", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets")


def print_report(name, figures, device):
    """Prints {"benchmark", "figures", "device", "cores", "python", "versions"} to stdout.

    Args:
      name: of the benchmark.
      figures: JSON-ready dict.
      device: what the work ran on, in words.
    """
    report = {
        "benchmark": name,
        "figures": figures,
        "device": device,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {package: _version_of(package) for package in PACKAGES},
    }
    print(json.dumps(report, indent=1))


def _version_of(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
