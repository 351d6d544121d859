"""Whatever happens to a run, it becomes what it would have been: each claim on whole runs."""

import itertools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from jaxseg import config as config_lib
from jaxseg.experiment import build
from jaxseg.run import checkpoint, writers
from jaxseg.run import log as run_log
from jaxseg.training import checksum

NUM_STEPS = 9
CHECKPOINT_EVERY = 3
ROOT = pathlib.Path(checkpoint.__file__).parents[2]
# What a process does: it becomes the command, and notes what it has come to.
CODE = """
import os, runpy
from jaxseg.experiment import assess, train

assess._draw = assess._report = lambda *args: None  # take longest, and no number is in them

notes = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def note(line):
    os.write(notes, f"{line}\\n".encode())

def noting(name, function):
    def noted(*args, **kwargs):
        note(name)
        return function(*args, **kwargs)
    return noted

def compile_step(*args, original=train.compile_step):
    program = original(*args)
    def train_step(state, *rest):
        number = int(state.step) + 1
        result = program(state, *rest)
        note(f"step {number}")
        return result
    train_step.memory_analysis = program.memory_analysis
    return train_step

train.compile_step = compile_step
train.validate = noting("validating", train.validate)
train.assess = noting("finishing", train.assess)
runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def command(fork, config_file):
    """Function that starts `python -m` a module of jaxseg with a workdir; returns the process.

    It is forked from one that has imported what it needs (a true new process is compared below).
    """

    def start(workdir, *arguments, module="jaxseg.main"):
        prefix = "config." if module == "jaxseg.main" else ""
        return fork(
            module,
            *arguments,
            f"--{prefix}workdir={workdir}",
            outputs=(f"{workdir}.output",) * 2,
            code=CODE,
            names={"notes": f"{workdir}.notes"},
            settings=kept_in(config_file),
        )

    return start


def kept_in(config_file):
    """JAX's settings that keep compiled programs beside a config."""
    return {
        "jax_compilation_cache_dir": str(config_file.parent / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }


@pytest.fixture(scope="module")
def config_file(tmp_path_factory, boxes):
    """Path of a Python file with a tiny experiment."""
    folder = tmp_path_factory.mktemp("kills")
    config = config_lib.base_config("unet")
    config.data.dir = str(boxes)
    config.data.cache_dir = str(folder / "cache")
    config.data.patch_size = (16, 16)
    config.augment.on = "device"  # on the host in test_resume
    config.model.features = (4, 8)
    config.model.num_convs, config.model.decoder_convs = (1,), 1
    config.model.norm = "batch"
    config.model.dropout = 0.2
    config.optim.warmup_steps = 2
    config.train.num_steps = NUM_STEPS
    config.train.batch_size = 4
    config.train.log_every = 2
    config.train.eval_every = 5
    config.train.checkpoint_every = CHECKPOINT_EVERY
    path = folder / "tiny.py"
    path.write_text(
        "from jaxseg.config import from_json\n\n\n"
        f"def get_config():\n    return from_json({config_lib.to_json(config)!r})\n"
    )
    return path


@pytest.fixture(scope="module")
def uninterrupted(command, config_file):
    """Folder of the run as it is when nothing happens to it."""
    workdir = config_file.parent / "uninterrupted"
    process = command(workdir, f"--config={config_file}")
    process.join()
    assert process.exitcode == 0, output_of(workdir)
    return workdir


@pytest.fixture(scope="module")
def template(uninterrupted):
    """A TrainState of the structure that the runs save."""
    config = config_lib.from_json((uninterrupted / "config.json").read_text())
    data = json.loads((uninterrupted / "data.json").read_text())
    model = build.create_model_for(config, len(data["class_names"]))
    image_shape = (*config.data.patch_size, data["num_channels"])
    return build.create_members(config, model, build.create_tx(config), image_shape)[0]


def command_line(config_file, workdir):
    return ["jaxseg.main", f"--config={config_file}", f"--config.workdir={workdir}"]


def output_of(workdir):
    return pathlib.Path(f"{workdir}.output").read_text()


def notes_of(workdir):
    path = pathlib.Path(f"{workdir}.notes")
    return path.read_text().splitlines() if path.exists() else []


def log_of(workdir):
    path = workdir / run_log.LOG_NAME
    return path.read_text() if path.exists() else ""


def names_in(folder):
    return os.listdir(folder) if folder.exists() else []


def visible_steps(workdir):
    return sorted(int(name) for name in names_in(workdir / "checkpoints") if name.isdecimal())


def states_of(workdir, template, scratch):
    """{step: TrainState} of all checkpoints, read from a copy: what is left open stays so."""
    if not names_in(workdir / "checkpoints"):
        return {}
    shutil.copytree(workdir / "checkpoints", scratch)
    manager = checkpoint.open_checkpoints(str(scratch), keep=3)
    states = {step: checkpoint.restore(manager, step, template) for step in manager.all_steps()}
    checkpoint.close_checkpoints(manager)
    shutil.rmtree(scratch)
    return states


def assert_same_run(workdir, expected, template, scratch):
    """The same final state (SHA-256), every step (batch, loss, ...), metrics, and test scores."""
    digests = [
        checkpoint.digest(states_of(folder, template, scratch)[NUM_STEPS])
        for folder in (workdir, expected)
    ]
    assert digests[0] == digests[1]
    traces = [(folder / run_log.TRACE_NAME).read_bytes() for folder in (workdir, expected)]
    assert traces[0] == traces[1]
    numbers = [
        [{**row, "images_per_s": None, "minutes": None} for row in run_log.read_metrics(folder)]
        for folder in (workdir, expected)
    ]
    assert numbers[0] == numbers[1]
    scores = [json.loads((folder / "test.json").read_text()) for folder in (workdir, expected)]
    assert scores[0] == scores[1]


@pytest.fixture(scope="module")
def in_a_new_process(command, config_file, uninterrupted):
    """Folder of the same run in a true new process, which compiled for itself, and its pid.

    While it trained, a second run was started in the same folder; it has ended. (What it is forked
    from is ready: another run was before.)
    """
    workdir = config_file.parent / "new_process"
    line = [sys.executable, "-m", *command_line(config_file, workdir)]
    with open(f"{workdir}.first", "w") as output:
        environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        first = subprocess.Popen(line, stdout=output, stderr=output, cwd=ROOT, env=environment)
    while not (workdir / run_log.TRACE_NAME).exists():
        assert first.poll() is None
        time.sleep(0.01)
    second = command(workdir, f"--config={config_file}")
    second.join()
    assert first.poll() is None  # still at work
    assert first.wait() == 0
    return workdir, first.pid, second.exitcode


@pytest.mark.multiprocess
def test_the_same_config_and_seed_give_the_same_run(
    in_a_new_process, uninterrupted, template, tmp_path
):
    workdir = in_a_new_process[0]
    assert_same_run(workdir, uninterrupted, template, tmp_path / "scratch")
    rows = run_log.read_trace(workdir)
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    for name in ("batch", "params", "loss", "grad_norm"):
        assert len({row[name] for row in rows}) == NUM_STEPS  # no constant that always agrees


@pytest.mark.multiprocess
def test_a_second_run_in_the_folder_is_refused_and_the_first_goes_on(in_a_new_process):
    workdir, pid, status = in_a_new_process
    assert status == 2
    (line,) = output_of(workdir).splitlines()
    owner = f"process {pid} on host {socket.gethostname()} is training in {workdir}"
    assert line.startswith(f"jaxseg: {owner}")
    assert pathlib.Path(f"{workdir}.first").read_text().count("mean test Dice") == 1


# Moments to kill at: whether one has come, from the run's folder, what the process has noted, and
# the checkpoints there were at its start; and the most seconds to wait then.
MOMENTS = {
    "at any time": (lambda workdir, noted, before: True, 3.0),
    "when a checkpoint is to be seen": (
        lambda workdir, noted, before: visible_steps(workdir)[-1:] > before[-1:],
        0.0,
    ),
    "while a checkpoint is written": (lambda workdir, noted, before: noted and torn(workdir), 0.0),
    "in validation": (lambda workdir, noted, before: "validating" in noted, 0.1),
    "when test cases are scored": (lambda workdir, noted, before: "finishing" in noted, 0.1),
}


def torn(workdir):
    """Names of unfinished checkpoints."""
    suffix = checkpoint.ocp.utils.TMP_DIR_SUFFIX
    return [name for name in names_in(workdir / "checkpoints") if suffix in name]


def kill_at(moment, fraction, process, workdir, before, num_notes):
    """Kills the process, unless it ends before; returns whether it did."""
    has_come, within_s = MOMENTS[moment]
    while process.exitcode is None:
        if has_come(workdir, notes_of(workdir)[num_notes:], before):
            process.join(fraction * within_s)
            process.kill()
            break
        time.sleep(0.0005)
    process.join()
    return process.exitcode == -signal.SIGKILL


def assert_resumed_at_the_last_checkpoint(workdir, before, num_notes, log_before):
    """No step is lost that could be seen, and no more than there are between two checkpoints."""
    notes = notes_of(workdir)
    steps_done = [
        [int(line.split()[1]) for line in part if line.startswith("step ")]
        for part in (notes[:num_notes], notes[num_notes:])
    ]
    resumed = re.findall(r"resuming at step (\d+)", log_of(workdir)[log_before:])
    if resumed:
        assert resumed == [str(before[-1])]
    if steps_done[1]:
        first_step = before[-1] if before else 0
        assert bool(resumed) == bool(before)
        assert steps_done[1] == list(range(first_step + 1, first_step + 1 + len(steps_done[1])))
        assert max(steps_done[0][-1:], default=0) - first_step <= CHECKPOINT_EVERY


@pytest.mark.multiprocess
@pytest.mark.parametrize("num_kills", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_any_moment_a_run_becomes_the_same(
    command, config_file, uninterrupted, template, tmp_path, num_kills
):
    draw = random.Random(num_kills)
    params_after = {row["step"]: row["params"] for row in run_log.read_trace(uninterrupted)}
    moments = list(itertools.islice(itertools.cycle(MOMENTS), num_kills))
    num_torn = 0
    for number in itertools.count():
        workdir = tmp_path / str(number)
        arguments = [f"--config={config_file}", f"--config.data.cache_dir={tmp_path / 'cache'}"]
        killed = True
        while killed:
            before, num_notes = visible_steps(workdir), len(notes_of(workdir))
            log_before = len(log_of(workdir))
            process = command(workdir, *arguments)
            killed = moments and kill_at(
                moments[0], draw.random(), process, workdir, before, num_notes
            )
            if killed:
                num_torn += bool(torn(workdir))
                moments.pop(0)
            process.join()
            assert killed or process.exitcode == 0, output_of(workdir)
            assert_resumed_at_the_last_checkpoint(workdir, before, num_notes, log_before)
            for step, state in states_of(workdir, template, tmp_path / "scratch").items():
                assert f"{checksum.checksum(state.params):08x}" == params_after[step]
        assert_same_run(workdir, uninterrupted, template, tmp_path / "scratch")
        assert not (workdir / "damaged").exists() and not torn(workdir)
        if not moments:
            break
    assert num_torn >= num_kills / 10  # kills did come while checkpoints were written


UNABLE = 77  # exit status where no file system can be mounted
# Attempts at a run on a disk of its own: some kB are free, then it can not be written, then it is
# mended. Prints a line of JSON for each: [name, exit status, output].
DISK = """
import ctypes, json, os, shutil

user, group = os.getuid(), os.getgid()
if ctypes.CDLL(None).unshare(0x10000000 | 0x00020000):  # CLONE_NEWUSER, CLONE_NEWNS
    raise SystemExit(UNABLE)
for name, text in ("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1"):
    with open(f"/proc/self/{name}", "w") as file:
        file.write(text)
if os.system(f"mount -t tmpfs -o size=8m none {disk}"):
    raise SystemExit(UNABLE)

def attempt(name):
    output = f"{scratch}/output"
    pid = os.fork()
    if not pid:
        try:
            exec(forked, given | {"outputs": [output] * 2, "notes": f"{scratch}/notes"})
        except SystemExit as end:
            os._exit(end.code or 0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(json.dumps([name, status, open(output).read()]), flush=True)
    os.remove(output)

filler = f"{disk}/filler"
for free_kb in (0, 8, 360):
    with open(filler, "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
        file.truncate(file.tell() - 1024 * free_kb)
    attempt(f"{free_kb} kB")
os.remove(filler)
assert not os.system(f"mount -o remount,ro {disk}")
attempt("read-only")
assert not os.system(f"mount -o remount,rw {disk}")
attempt("mended")
shutil.copytree(f"{disk}/run", f"{scratch}/run")
"""


@pytest.mark.multiprocess
def test_a_full_and_a_read_only_disk_stop_a_run_that_goes_on_once_they_are_mended(
    fork, forked, config_file, uninterrupted, template, tmp_path
):
    disk, scratch = tmp_path / "disk", tmp_path / "scratch"
    disk.mkdir()
    scratch.mkdir()
    given = {
        "argv": command_line(config_file, disk / "run"),
        "code": CODE,
        "settings": kept_in(config_file),
        "environment": {},
    }
    names = {"disk": str(disk), "scratch": str(scratch), "forked": forked, "given": given}
    outputs = tmp_path / "attempts", tmp_path / "errors"
    process = fork("disk", outputs=outputs, code=DISK, names=names | {"UNABLE": UNABLE})
    process.join()
    if process.exitcode == UNABLE:
        pytest.skip("no file system can be mounted here")
    assert process.exitcode == 0, outputs[1].read_text()

    attempts = [json.loads(line) for line in outputs[0].read_text().splitlines()]
    assert not any("Traceback" in output for _, _, output in attempts)
    assert [status for _, status, _ in attempts] == [2, 2, 2, 2, 0]
    said = {name: output.splitlines()[-1] for name, _, output in attempts}
    run, full = disk / "run", "No space left on device; free space on its disk, or write elsewhere"
    assert said["0 kB"] == f"jaxseg: {run}/.owner: {full}"
    assert said["8 kB"].startswith(f"jaxseg: {run}/") and said["8 kB"].endswith(full)
    kept = re.fullmatch(
        rf"jaxseg: the checkpoint of step \d+ could not be written to {run}/checkpoints: "
        r"No space left on device; those that are kept, by step: (?:\d+, )*(\d+|none)\. "
        "Free or mend the disk, then run the same command to go on",
        said["360 kB"],
    )
    assert said["read-only"].startswith(f"jaxseg: {run}/.owner: Read-only file system; make it")
    assert kept and (kept[1] == "none" or f"resuming at step {kept[1]}\n" in attempts[-1][2])
    assert_same_run(scratch / "run", uninterrupted, template, tmp_path / "copy")


@pytest.mark.multiprocess
def test_a_damaged_checkpoint_is_told_and_the_run_goes_on_from_the_one_before(
    command, config_file, uninterrupted, template, tmp_path
):
    workdir = shutil.copytree(uninterrupted, tmp_path / "run")
    before, latest = visible_steps(workdir)[-2:]
    assert latest == NUM_STEPS
    saved = workdir / "checkpoints" / str(latest)
    for path in saved.glob("state/**/d/*"):  # of which some hold what nothing refers to
        content = path.read_bytes()
        half = len(content) // 2
        path.write_bytes(content[:half] + bytes(byte ^ 1 for byte in content[half:]))

    process = command(workdir, f"--config={config_file}")
    process.join()
    output = output_of(workdir)
    assert process.exitcode == 0 and "Traceback" not in output
    assert f"the checkpoint in {saved} is damaged: " in output
    assert f"moved to {workdir}/damaged/{latest}, going on from the one before" in output
    assert f"resuming at step {before}\n" in output
    assert_same_run(workdir, uninterrupted, template, tmp_path / "scratch")
    assert (workdir / "damaged" / str(latest) / "state").exists()


@pytest.mark.multiprocess
@pytest.mark.parametrize("altered", [None, 4])
def test_a_run_is_reproduced_or_the_step_named_that_differs(
    command, uninterrupted, tmp_path, altered
):
    workdir = shutil.copytree(uninterrupted, tmp_path / "run")
    rows = run_log.read_trace(workdir)
    if altered:
        rows[altered - 1]["grad_norm"] = (0.125).hex()
        text = "".join(json.dumps(row) + "\n" for row in rows)
        writers.write_text(workdir / run_log.TRACE_NAME, text)
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    process = command(workdir, module="jaxseg.reproduce")
    process.join()
    lines = output_of(workdir).splitlines()
    if altered:
        assert process.exitcode == 1
        assert lines[0] == "step 4 is the first that differs:"
        assert lines[1].startswith("  grad_norm: 0.125 -> ") and len(lines) == 2
    else:
        assert (process.exitcode, lines) == (0, [f"all {NUM_STEPS} steps agree to the bit"])
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before
