"""Several processes, for real: joined by jax.distributed over gloo, they train, die and go on."""

import collections.abc
import contextlib
import dataclasses
import json
import os
import pathlib
import runpy
import signal
import socket
import time

import jax
import numpy as np
import pytest
from PIL import Image

from jaxseg.experiment import gather, train
from jaxseg.parallel import HEARTBEAT_TIMEOUT_S
from jaxseg.run import checkpoint
from jaxseg.run import log as run_log

pytestmark = pytest.mark.multiprocess

ROOT = pathlib.Path(__file__).resolve().parents[1]
CHILD_TIMEOUT_S = 400
NUM_STEPS = 12
KILLED_AT = 8  # batches fetched; step 7 is done then, and that of step 6 the last checkpoint
# Once gloo or the coordinator sees that a connection is gone.
STOP_WITHIN_S = 10
MESSAGES = ("another process of this run has died", "another task died")  # ours, or JAX's

SETTINGS = {
    "data.kind": "images",
    "data.class_names": ("background", "disc"),
    "data.patch_size": (16, 16),
    "model.features": (4, 8),
    "model.dropout": 0.2,
    "optim.warmup_steps": 2,
    "train.num_steps": NUM_STEPS,
    "train.batch_size": 8,
    "train.log_every": 4,
    "train.eval_every": 6,
    "train.checkpoint_every": 3,
}
STRICT = {"parallel.virtual_shards": 4}

# The command, but `{action}` is done whenever a batch is fetched, `count` before it.
PATCHED = """
import os, signal, time
from jaxseg.data import pipeline

train_batches = pipeline.train_batches

def interrupted(*args, **kwargs):
    for count, batch in enumerate(train_batches(*args, **kwargs)):
        {action}
        yield batch

pipeline.train_batches = interrupted
"""
COMMAND = 'import runpy; runpy.run_module(argv[0], run_name="__main__", alter_sys=True)'
KILL = f"if count == {KILLED_AT}: os.kill(os.getpid(), signal.SIGKILL)"


@dataclasses.dataclass(frozen=True)
class Ended:
    """A process that is over: exit status, what it said on stderr, seconds since the epoch."""

    status: int
    error: str
    when: float


@dataclasses.dataclass(frozen=True)
class Lab:
    """One set of images, one folder of compiled programs, and what was trained with them."""

    folder: pathlib.Path
    fork: collections.abc.Callable
    flags: str

    def settings(self, name, **changes):
        own = {
            "data.dir": str(self.folder / "images"),
            "data.cache_dir": str(self.folder / "cache"),
        }
        return SETTINGS | own | {"workdir": str(self.folder / name)} | changes

    @contextlib.contextmanager
    def started(self, count, settings, *, actions=None, devices=1, by_slurm=False):
        """Starts the command in processes that end with the context at the latest.

        `actions` says of each process by number what it does whenever it fetches a batch;
        `by_slurm` leaves it to JAX to find out, as after srun, who they are.
        """
        with socket.socket() as found:
            found.bind(("localhost", 0))
            port = found.getsockname()[1]
        command = ["--config=configs/unet.py"]
        command += [f"--config.{name}={value}" for name, value in settings.items()]
        environment = {
            "NPROC": "8",  # XLA's threads, by which it cuts sums: like 8 devices, however many
            "XLA_FLAGS": f"{self.flags} --xla_force_host_platform_device_count={devices}",
        }
        jax_settings = {
            "jax_platforms": "cpu",
            "jax_compilation_cache_dir": str(self.folder / "compiled"),
            "jax_persistent_cache_min_compile_time_secs": 0.0,
        }
        processes = []
        try:
            for index in range(count):
                joined = ["--distributed"] if count > 1 else []
                if by_slurm:
                    environment |= {
                        "SLURM_JOB_ID": "1",
                        "SLURM_STEP_NODELIST": "localhost",
                        "SLURM_NTASKS": str(count),
                        "SLURM_PROCID": str(index),
                        "SLURM_LOCALID": str(index),
                        "JAX_COORDINATOR_PORT": str(port),
                    }
                elif joined:
                    joined += [f"--coordinator=localhost:{port}", f"--num_processes={count}"]
                    joined += [f"--process_id={index}"]
                patch = PATCHED.format(action=actions[index]) if index in (actions or {}) else ""
                error = pathlib.Path(f"{settings['workdir']}.{index}.err")
                error.unlink(missing_ok=True)
                processes.append(
                    self.fork(
                        "jaxseg.main",
                        *joined,
                        *command,
                        outputs=(os.devnull, error),
                        code=f"{patch}\n{COMMAND}",
                        settings=jax_settings,
                        **environment,
                    )
                )
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.join()

    def run(self, count, settings, **options):
        """Starts processes and waits for all; returns what became of each as a list of Ended."""
        when = [None] * count
        with self.started(count, settings, **options) as processes:
            deadline = time.time() + CHILD_TIMEOUT_S
            while None in when and time.time() < deadline:
                for index, process in enumerate(processes):
                    if when[index] is None and process.exitcode is not None:
                        when[index] = time.time()
                time.sleep(0.05)
        errors = [
            pathlib.Path(f"{settings['workdir']}.{index}.err").read_text() for index in range(count)
        ]
        assert None not in when, f"still running after {CHILD_TIMEOUT_S} s: {when}\n{errors}"
        return [
            Ended(process.exitcode, error, end)
            for process, error, end in zip(processes, errors, when, strict=True)
        ]

    def train(self, count, settings, **options):
        """Trains to the end; returns the folder of the run."""
        for ended in self.run(count, settings, **options):
            assert ended.status == 0, ended.error
        return pathlib.Path(settings["workdir"])

    def train_here(self, settings):
        """Trains in this process, on its one device; returns the folder of the run."""
        train.train(config_of(settings))
        return pathlib.Path(settings["workdir"])


@pytest.fixture(scope="module")
def lab(fork, quick, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    for name in ("images", "masks"):
        (folder / "images" / name).mkdir(parents=True)
    for index in range(8):  # two parts of prepared cases
        rng = np.random.default_rng(index)
        x, y = np.indices((24, 20))
        mask = (x - rng.integers(6, 18)) ** 2 + (y - rng.integers(6, 14)) ** 2 < 25
        image = (rng.normal(80, 10, mask.shape) + 90 * mask).astype(np.uint8)
        Image.fromarray(image).save(folder / "images" / "images" / f"{index}.png")
        Image.fromarray(255 * mask.astype(np.uint8)).save(folder / "images/masks" / f"{index}.png")
    return Lab(folder, fork, quick["XLA_FLAGS"])


@pytest.fixture(scope="module")
def alone(lab):
    """Folder of a strict run of one process that nothing has interrupted."""
    return lab.train(1, lab.settings("alone", **STRICT))


def config_of(settings):
    config = runpy.run_path(str(ROOT / "configs" / "unet.py"))["get_config"]()
    config.update_from_flattened_dict(settings)
    return config


def digest(workdir, step=NUM_STEPS):
    """SHA-256 of the whole state at a step, as it was saved."""
    path = workdir / "checkpoints" / str(step) / "digest" / "metadata"
    return json.loads(path.read_text())["state"]


def params(workdir):
    return checkpoint.load_variables(str(workdir / "checkpoints"), NUM_STEPS)["params"]


def scores(workdir):
    return [row for row in run_log.read_metrics(workdir) if "val_dice" in row]


def assert_equal_to_the_bit(workdir, expected):
    assert digest(workdir) == digest(expected)
    assert run_log.read_trace(workdir) == run_log.read_trace(expected)
    assert len(run_log.read_trace(workdir)) == NUM_STEPS
    for row, wanted in zip(scores(workdir), scores(expected), strict=True):
        assert row["val_dice"] == wanted["val_dice"]
        # The loss of evaluation is summed in whatever order, strict or not.
        assert row["val_loss"] == pytest.approx(wanted["val_loss"], rel=1e-6)


def assert_close(workdir, expected):
    """Equal up to the order of sums, over NUM_STEPS steps of AdamW at a rate of 3e-3."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-6),
        params(workdir),
        params(expected),
    )
    batches = [[row["batch"] for row in run_log.read_trace(run)] for run in (workdir, expected)]
    assert batches[0] == batches[1]
    for row, wanted in zip(scores(workdir), scores(expected), strict=True):
        assert row["val_loss"] == pytest.approx(wanted["val_loss"], rel=1e-4)


def assert_whole(workdir):
    """No half-written checkpoint is there, and the newest is whole."""
    saved = workdir / "checkpoints"
    assert all(path.name.isdigit() for path in saved.iterdir()), list(saved.iterdir())
    assert not (workdir / "damaged").exists()
    assert digest(workdir, max(int(path.name) for path in saved.iterdir()))


def assert_stopped(ended, died, within_s=STOP_WITHIN_S):
    """All but the process `died` stopped soon after it, and said why."""
    for index, process in enumerate(ended):
        if index != died:
            assert process.status not in (0, None), process
            assert any(message in process.error for message in MESSAGES), process
            assert process.when - ended[died].when < within_s


def assert_same_cases(settings, expected_settings):
    stores = [
        gather.load_data(config_of(with_these), run_log.SilentLog()).store
        for with_these in (settings, expected_settings)
    ]
    for case_id in map(str, range(8)):
        case, expected = (store[case_id] for store in stores)
        whole = (slice(None),) * 3
        np.testing.assert_array_equal(case.image[whole], expected.image[whole])
        np.testing.assert_array_equal(case.label[whole], expected.label[whole])
        for found, wanted in zip(case.locations, expected.locations, strict=True):
            np.testing.assert_array_equal(found, wanted)


def lines_of(workdir):
    return (workdir / "train.log").read_text().splitlines()


def steps_logged(workdir):
    lines = lines_of(workdir)
    return [
        line.split(" step ")[1].split("/")[0] for line in lines if f"/{NUM_STEPS}  loss" in line
    ]


def test_two_processes_do_what_one_does(lab, alone):
    settings = lab.settings("two", **STRICT) | {"data.cache_dir": str(lab.folder / "cache_of_two")}
    two = lab.train(2, settings)
    assert_equal_to_the_bit(two, alone)
    assert_whole(two)

    # The first alone speaks.
    assert steps_logged(two) == steps_logged(alone) == ["3", "4", "6", "8", "9", "12"]
    metrics = [[row["step"] for row in run_log.read_metrics(run)] for run in (two, alone)]
    assert metrics[0] == metrics[1]
    assert json.loads((two / "test.json").read_text()) == json.loads(
        (alone / "test.json").read_text()
    )
    for run, num_cases in ((two, 4), (alone, 8)):  # the second has done its share
        assert any(f"preprocessing: {num_cases} cases" in line for line in lines_of(run))
    assert_same_cases(settings, lab.settings("alone"))


@pytest.mark.parametrize(
    ("died", "count"), [(1, 1), pytest.param(0, 4, marks=pytest.mark.slow)], ids=str
)
def test_killed_process_stops_the_other_and_other_numbers_go_on(lab, alone, died, count):
    """The first is the one that coordinates."""
    settings = lab.settings(f"killed{died}", **STRICT)
    ended = lab.run(2, settings, actions={died: KILL})
    assert ended[died].status == -signal.SIGKILL
    assert_stopped(ended, died=died)
    workdir = pathlib.Path(settings["workdir"])
    assert_whole(workdir)

    lab.train(count, settings)
    assert "resuming at step 6" in (workdir / "train.log").read_text()
    assert_equal_to_the_bit(workdir, alone)


@pytest.mark.slow
def test_one_of_four_that_hangs_stops_the_others_and_two_go_on(lab, alone):
    """As when its host is cut off: only heartbeats tell."""
    settings = lab.settings("hanging", **STRICT)
    action = f"if count == {KILLED_AT}: os.kill(os.getpid(), signal.SIGSTOP)"
    errors = [pathlib.Path(f"{settings['workdir']}.{index}.err") for index in range(4)]
    with lab.started(4, settings, actions={2: action}) as processes:
        stat = pathlib.Path(f"/proc/{processes[2].pid}/stat")
        deadline = time.time() + CHILD_TIMEOUT_S
        while stat.read_text().split()[2] != "T" and time.time() < deadline:
            time.sleep(0.05)
        for index in (0, 1, 3):
            processes[index].join(HEARTBEAT_TIMEOUT_S + STOP_WITHIN_S)
            assert processes[index].exitcode not in (0, None)
            assert any(message in errors[index].read_text() for message in MESSAGES)
    workdir = pathlib.Path(settings["workdir"])
    assert_whole(workdir)

    lab.train(2, settings)
    assert_equal_to_the_bit(workdir, alone)


@pytest.mark.slow
def test_preempted_process_stops_all_at_one_step_and_they_go_on(lab, alone):
    settings = lab.settings("preempted", **STRICT)
    slowly = "time.sleep(1)"  # the news takes a moment
    actions = {
        0: slowly,
        1: f"if count == 3: os.kill(os.getpid(), signal.SIGTERM)\n        {slowly}",
    }
    for ended in lab.run(2, settings, actions=actions):
        assert ended.status == 128 + signal.SIGTERM, ended.error
        assert "Traceback" not in ended.error
    workdir = pathlib.Path(settings["workdir"])
    [line] = [s for s in (workdir / "train.log").read_text().splitlines() if "SIGTERM" in s]
    step = int(line.split("saved at step ")[1].split(";")[0])
    assert 3 <= step < NUM_STEPS and digest(workdir, step)
    assert_whole(workdir)

    lab.train(2, settings)
    assert f"resuming at step {step}" in (workdir / "train.log").read_text()
    assert_equal_to_the_bit(workdir, alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("died", "action", "status", "message"),
    [
        (1, "os.kill(os.getpid(), signal.SIGINT)", 130, "interrupted; what was saved is kept"),
        (0, "raise OSError('disk full')", 2, "jaxseg: disk full"),
        (1, "raise LookupError('nobody expects this')", 1, "nobody expects this"),
    ],
)
def test_what_ends_one_process_ends_all(lab, died, action, status, message):
    settings = lab.settings(f"ended{status}", **STRICT)
    ended = lab.run(2, settings, actions={died: f"if count == {KILLED_AT}: {action}"})
    assert ended[died].status == status and message in ended[died].error
    assert_stopped(ended, died)
    assert_whole(pathlib.Path(settings["workdir"]))


@pytest.mark.slow
def test_problems_that_only_the_first_process_looks_for_end_all(lab, tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        for index in range(8):
            shape = (16, 16) if name == "images" or index < 7 else (16, 17)
            Image.fromarray(np.full(shape, 255, np.uint8)).save(tmp_path / name / f"{index}.png")
    settings = lab.settings("problems") | {"data.dir": str(tmp_path)}
    ended = lab.run(2, settings)
    assert ended[0].status == 2 and "7.png" in ended[0].error
    assert_stopped(ended, died=0)


@pytest.mark.slow
def test_others_wait_for_a_process_longer_than_a_heartbeat_may_take(lab, alone):
    settings = lab.settings("waiting", **STRICT)
    wait = f"if count == {KILLED_AT}: time.sleep({HEARTBEAT_TIMEOUT_S + 15})"
    assert_equal_to_the_bit(lab.train(2, settings, actions={0: wait}), alone)


@pytest.mark.slow
def test_four_processes_that_slurm_starts_do_what_one_does_to_the_bit(lab, alone):
    four = lab.train(4, lab.settings("four", **STRICT), by_slurm=True)
    assert "4 cpu device(s) of 4 process(es)" in (four / "train.log").read_text()
    assert_equal_to_the_bit(four, alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count", "devices", "changes"),
    [
        ("pmap2", 2, 1, {}),
        ("pmap4", 4, 1, {}),
        ("shards", 2, 2, {"parallel.mode": "shard_map"}),
        ("space", 2, 2, {"parallel.mode": "shard_map", "parallel.space": 2}),
        ("members", 2, 1, {"ensemble.size": 2}),
        ("members_apart", 2, 2, {"ensemble.size": 2, "parallel.mode": "shard_map"}),
    ],
)
def test_processes_are_close_to_one_in_every_layout(lab, name, count, devices, changes):
    size = {name: value for name, value in changes.items() if name == "ensemble.size"}
    here = lab.train_here(lab.settings(f"{name}_here", **size))
    assert_close(lab.train(count, lab.settings(name, **changes), devices=devices), here)
