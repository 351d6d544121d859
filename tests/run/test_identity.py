import copy
import hashlib
import json
import os
import pathlib
import platform
import subprocess

import jax
import numpy as np
import pytest

from jaxseg.config import base_config, to_json
from jaxseg.run import identity

CONFIG = to_json(base_config())


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git checkout of a package that `identity` takes for the one it lies in."""
    for name in ("GIT_DIR", "GIT_WORK_TREE"):
        monkeypatch.delenv(name, raising=False)
    package = tmp_path / "checkout" / "jaxseg"
    (package / "run").mkdir(parents=True)
    for name in ("__init__.py", "run/identity.py"):
        (package / name).write_text("")
    monkeypatch.setattr(identity, "__file__", str(package / "run/identity.py"))
    git(package.parent, "init", "-q")
    git(package, "add", ".")
    git(package, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "first")
    return package


def git(folder, *arguments):
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_what_is_described(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/nowhere")
    found = identity.describe(CONFIG, "f" * 64)
    assert found["config"] == hashlib.sha256(CONFIG.encode()).hexdigest()
    assert (found["data"], found["seed"]) == ("f" * 64, 0)
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["numpy"] == np.__version__
    assert found["versions"]["jax"] == jax.__version__
    count, kind = jax.device_count(), jax.devices()[0].device_kind
    assert found["versions"]["device"] == f"{count} x {kind} ({jax.default_backend()})"
    assert found["backend"] == jax.default_backend()
    assert found["num_devices"] == jax.device_count() and found["num_processes"] == 1
    assert found["device_kind"] == jax.devices()[0].device_kind
    assert found["cpu"].startswith(f"{os.cpu_count()} x ")
    assert found["environment"]["XLA_FLAGS"] == "--xla_dump_to=/nowhere"
    assert json.loads(json.dumps(found)) == found


def test_a_setting_that_changes_numbers_is_seen():
    before = identity.describe(CONFIG, "data")
    with jax.default_matmul_precision("bfloat16"):
        changed = identity.differences(before, identity.describe(CONFIG, "data"))
    assert changed == ["settings.jax_default_matmul_precision: None -> 'bfloat16'"]


def test_differences_are_lines_field_by_field():
    now = identity.describe(CONFIG, "data")
    then = copy.deepcopy(now) | {"first_step": 7, "seed": 3}
    then["versions"]["jax"] = "0.0.1"
    del then["cpu"]
    assert identity.differences(then, now) == [
        f"cpu: '(absent)' -> {now['cpu']!r}",
        "seed: 3 -> 0",
        f"versions.jax: '0.0.1' -> {jax.__version__!r}",
    ]
    assert identity.differences({"first_step": 7} | now, now) == []


def test_every_session_is_kept(tmp_path):
    assert identity.read_sessions(tmp_path) == []
    identity.record(tmp_path, 0, {"seed": 1})
    identity.record(tmp_path, 40, {"seed": 1, "backend": "cpu"})
    sessions = [{"first_step": 0, "seed": 1}, {"first_step": 40, "seed": 1, "backend": "cpu"}]
    assert json.loads((tmp_path / "identity.json").read_text()) == {"sessions": sessions}
    assert identity.read_sessions(tmp_path) == sessions


def test_the_revision_is_that_of_the_source(repository):
    revision = git(repository, "rev-parse", "HEAD")
    assert len(revision) == 40 and identity.source_revision() == revision
    (repository.parent / "notes.txt").write_text("not of the package")
    assert identity.source_revision() == revision
    (repository / "new.py").write_text("")
    assert identity.source_revision() == f"{revision}+changes"
    os.remove(repository / "new.py")
    (repository / "__init__.py").write_text("x = 1\n")
    assert identity.source_revision() == f"{revision}+changes"


def test_outside_of_git_there_is_no_revision(repository, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert identity.source_revision() is None  # no git at all
    monkeypatch.undo()
    (tmp_path / "installed" / "jaxseg").mkdir(parents=True)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setattr(identity, "__file__", str(tmp_path / "installed/jaxseg/run/identity.py"))
    assert identity.source_revision() is None  # no repository


def test_the_revision_of_somebody_elses_repository_is_not_ours(repository, monkeypatch):
    installed = pathlib.Path(repository.parent, "venv", "jaxseg")
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    monkeypatch.setattr(identity, "__file__", str(installed / "run/identity.py"))
    assert identity.source_revision() is None
