"""What every test may use."""

import dataclasses
import fcntl
import json
import multiprocessing
import os
import pathlib
import time

from jaxseg import command

command.prepare_environment()

import jax
import nibabel as nib
import numpy as np
import pytest

from jaxseg.config import base_config

# Programs that run a few times need not be fast, but soon there: this halves the time of all tests.
# It is for this process alone. Commands that tests start, among them all whose bits are compared
# between processes, are compiled as a user's are; XLA_FLAGS="" pytest compiles everything so.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)

# What a forked process does: it becomes what `code` says, most often a command.
FORKED = """
import os, runpy, sys
import jax
from jax._src import xla_bridge

assert not xla_bridge.backends_are_initialized()  # a fork would have broken them
for number, path in enumerate(outputs, start=1):
    os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
os.environ.update(environment)
for name, value in settings.items():
    jax.config.update(name, value)
sys.argv = argv
exec(code)
"""
COMMAND = 'runpy.run_module(argv[0], run_name="__main__", alter_sys=True)'

SCRIPT = """
import warnings
warnings.simplefilter("error")
runpy.run_path(argv[0], run_name="__main__")
"""

SHARED_DATA = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_configure(config):
    runs_tests = hasattr(config, "workerinput") or not config.getoption("numprocesses")
    if runs_tests and "XLA_FLAGS" not in os.environ:
        os.environ["XLA_FLAGS"] = QUICK
        jax.devices()  # reads the flags, once and for all
        del os.environ["XLA_FLAGS"]


def pytest_collection_modifyitems(items):
    """Tests that start processes take longest: they begin first, so that all workers end alike."""
    items.sort(key=lambda item: "multiprocess" not in item.keywords)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """A folder that all workers of this session share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session", autouse=True)
def compile_once(shared_folder):
    """Keeps compiled programs for the session: many tests train the same tiny network."""
    jax.config.update("jax_compilation_cache_dir", str(shared_folder / "compiled_here"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(shared_folder / "compiled_by_commands")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"


@pytest.fixture
def shared_data():
    """Function from a folder's name to its path among the real images; skips where absent."""

    def path_of(name):
        path = SHARED_DATA / name
        if not path.exists():
            pytest.skip(f"real images not found: {path}")
        return path

    return path_of


@pytest.fixture
def make_msd_folder(tmp_path):
    """Function that writes a tiny MSD folder of boxes in noise; returns its path.

    Each case holds a bright box (class 1) and a brighter one (class 2); spacing is in mm.
    """
    return _msd_folders_in(tmp_path)


@pytest.fixture(scope="session")
def quick():
    """Environment in which a process compiles as this one does."""
    return {"XLA_FLAGS": os.environ.get("XLA_FLAGS", QUICK)}


@pytest.fixture(scope="session")
def forked():
    """Source of what a forked process does, for tests that fork by themselves."""
    return FORKED


@pytest.fixture(scope="session")
def fork(compile_once):
    """Function that starts a command in a process whose imports are done; returns the process.

    Python's fork server has imported what takes seconds, once for all of them, and started nothing:
    its children are as good as new.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jaxseg.experiment.train"])
    processes = []

    def start(*argv, outputs=(os.devnull,) * 2, code=COMMAND, names=(), settings=(), **environment):
        """Of `python -m argv`; outputs are files for stdout and stderr, settings those of JAX."""
        given = {
            "argv": [*map(str, argv)],
            "outputs": [*map(str, outputs)],
            "code": code,
            "settings": dict(settings),
            "environment": environment,
        }
        process = context.Process(target=exec, args=(FORKED, given | dict(names)))
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.join()


@pytest.fixture(scope="session")
def run_script(fork, tmp_path_factory):
    """Function that runs a test file as a script, to the end, in a process that has imported."""
    folder = tmp_path_factory.mktemp("scripts")

    def run(*argv, settings=(), **environment):
        said = folder / f"{time.monotonic_ns()}"
        process = fork(*argv, outputs=(said,) * 2, code=SCRIPT, settings=settings, **environment)
        process.join()
        assert process.exitcode == 0, said.read_text()

    return run


@dataclasses.dataclass(frozen=True)
class Done:
    """A command that has ended."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run_command(fork, tmp_path):
    """Function that runs `python -m` of its arguments to the end; returns what became of it.

    What is given as `first` is executed before.
    """

    def run(*argv, first=""):
        outputs = [tmp_path / f"{name}.{time.monotonic_ns()}" for name in ("stdout", "stderr")]
        process = fork(*argv, outputs=outputs, code=f"{first}\n{COMMAND}", XLA_FLAGS=QUICK)
        process.join(300)
        return Done(process.exitcode, *(path.read_text() for path in outputs))

    return run


@pytest.fixture(scope="session")
def boxes(shared_folder):
    """Folder of eight cases as make_msd_folder makes them, for all to read."""
    return _once(shared_folder / "boxes", lambda folder: _msd_folders_in(folder)(num_cases=8))


@pytest.fixture(scope="session")
def finished_run(shared_folder, boxes):
    """(workdir, data folder) of a tiny 2D network that was trained on the boxes."""
    folder = shared_folder / "finished"
    return _once(folder, lambda folder: _train_on(boxes, folder) or folder / "run"), boxes


def _once(folder, make):
    """What `make` returned when the first worker made the folder; the others wait for it."""
    with open(f"{folder}.lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        made = lock.read()
        if not made:
            folder.mkdir()
            made = str(make(folder))
            lock.write(made)
    return pathlib.Path(made)


def _train_on(data, folder):
    from jaxseg.experiment import train  # takes seconds, which the process that waits is spared

    config = base_config("unet")
    config.workdir = str(folder / "run")
    config.data.dir = str(data)
    config.data.cache_dir = str(folder / "cache")
    config.data.patch_size = (16, 16)
    config.model.features = (8, 16)
    config.optim.warmup_steps = 0
    config.optim.learning_rate = 0.02
    config.train.num_steps = 80
    config.train.batch_size = 4
    config.train.eval_every = 80
    train.train(config)


def _msd_folders_in(folder_of_all):
    def make(num_cases=6, shape=(20, 18, 8), spacing_mm=(1.0, 1.0, 2.0), name="msd"):
        root = folder_of_all / name
        for folder in ("imagesTr", "labelsTr"):
            (root / folder).mkdir(parents=True)
        affine = np.diag([*spacing_mm, 1.0])
        training = []
        for index in range(num_cases):
            rng = np.random.default_rng(index)
            label = np.zeros(shape, np.uint8)
            x, y = rng.integers(2, 6, 2)
            label[x : x + 10, y : y + 8, 1:-1] = 1
            label[x + 2 : x + 6, y + 2 : y + 6, 2:-2] = 2
            image = rng.normal(0, 10, shape) + 100.0 * label
            for folder, array in (("imagesTr", image.astype(np.float32)), ("labelsTr", label)):
                nib.save(nib.Nifti1Image(array, affine), root / folder / f"case_{index:02d}.nii.gz")
            training.append(
                {
                    "image": f"./imagesTr/case_{index:02d}.nii.gz",
                    "label": f"./labelsTr/case_{index:02d}.nii.gz",
                }
            )
        metadata = {
            "name": "boxes",
            "tensorImageSize": "3D",
            "modality": {"0": "MRI"},
            "labels": {"0": "background", "1": "outer", "2": "inner"},
            "numTraining": num_cases,
            "numTest": 0,
            "training": training,
        }
        (root / "dataset.json").write_text(json.dumps(metadata))
        return root

    return make
