import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from jaxseg import parallel
from jaxseg.config import base_config, to_json
from jaxseg.data.preprocess import Plan
from jaxseg.run import checkpoint
from jaxseg.training.state import TrainState

PLAN = Plan((1.0, 1 / 3, 2.0), ("ct", "zscore"), ((-1.5, 2.0, 0.1, 1 / 7), ()), 1, 0)
DATA = {"class_names": ["background", "é"], "label_values": None, "num_channels": 2, "split": {}}
TX = optax.adamw(1e-3)


def make_state(step):
    key = jax.random.key(step)
    params = {
        "head": {"kernel": jax.random.normal(key, (16, 16, 2)), "bias": jnp.full((2,), 1e-30)},
    }
    stats = {"norm": {"mean": jax.random.normal(jax.random.fold_in(key, 1), (4,))}}
    opt_state = TX.update(params, TX.init(params), params)[1]
    return TrainState(jnp.int32(step), params, stats, opt_state)


@pytest.fixture
def directory(tmp_path):
    return str(tmp_path / "checkpoints")


@pytest.fixture
def reopen(directory):
    """Function that closes the open manager and opens the folder again."""
    managers = []

    def reopen(keep=2):
        for manager in managers:
            checkpoint.close_checkpoints(manager)
        managers[:] = [checkpoint.open_checkpoints(directory, keep=keep)]
        return managers[0]

    yield reopen
    for manager in managers:
        checkpoint.close_checkpoints(manager)


def save(manager, step, val_dice=None):
    checkpoint.save(
        manager,
        step,
        make_state(step),
        config_json=to_json(base_config()),
        plan_json=PLAN.to_json(),
        data=DATA,
        metrics=None if val_dice is None else {"val_dice": val_dice, "val_loss": 1.0},
    )


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(a, b)


def test_a_restored_state_is_the_saved_one_to_the_bit(reopen):
    manager = reopen()
    save(manager, 3, 0.5)
    save(manager, 7)
    manager = reopen()
    template = parallel.replicate(make_state(0))
    for step in (3, 7):
        restored = checkpoint.restore(manager, step, template)
        assert_equal(restored, make_state(step))
        for leaf, placed in zip(jax.tree.leaves(restored), jax.tree.leaves(template), strict=True):
            assert leaf.sharding == placed.sharding


def test_the_latest_and_the_best_are_kept(reopen):
    manager = reopen(keep=2)
    kept = []
    for step, val_dice in enumerate([0.3, 0.9, 0.5, 0.6, 0.2], start=1):
        save(manager, step, val_dice)
        kept.append(sorted(manager.all_steps()))
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5]]
    assert manager.best_step() == 2 and manager.latest_step() == 5
    manager = reopen(keep=2)
    assert manager.best_step() == 2 and sorted(manager.all_steps()) == [2, 4, 5]
    save(manager, 6, 0.95)
    assert manager.best_step() == 6 and sorted(manager.all_steps()) == [5, 6]
    assert_equal(checkpoint.restore(manager, 5, make_state(0)), make_state(5))


def test_a_step_that_was_not_evaluated_is_saved_but_never_the_best(reopen):
    manager = reopen(keep=2)
    save(manager, 1)
    assert manager.best_step() is None and manager.latest_step() == 1
    save(manager, 2, 0.4)
    for step in (3, 4, 5):
        save(manager, step)
    assert manager.best_step() == 2
    assert sorted(manager.all_steps()) == [2, 4, 5]
    assert reopen().best_step() == 2


def test_to_use_is_the_best_that_was_evaluated_or_the_last_while_training_goes_on(
    reopen, directory
):
    assert checkpoint.step_to_use(directory) is None
    manager = reopen()
    for step, val_dice, wanted in ((1, None, 1), (2, None, 2), (3, 0.5, 3), (4, 0.4, 3)):
        save(manager, step, val_dice)
        assert checkpoint.step_to_use(directory) == wanted
    save(manager, 5)
    weights = checkpoint.load_variables(directory)
    assert_equal(weights["params"], jax.device_get(make_state(3).params))


def test_an_undefined_dice_is_never_better_than_a_number(reopen):
    manager = reopen(keep=1)
    save(manager, 1, float("nan"))
    assert manager.best_step() == 1  # there is no other
    save(manager, 2, 0.1)
    save(manager, 3, float("nan"))
    save(manager, 4, 0.05)
    assert manager.best_step() == 2 and sorted(manager.all_steps()) == [2, 4]
    assert reopen(keep=1).best_step() == 2


def test_config_plan_and_data_are_read_back(reopen):
    save(reopen(), 4, 0.5)
    names = ("config", "plan", "data")
    items = ocp.args.Composite(**{name: ocp.args.JsonRestore() for name in names})
    saved = reopen().restore(4, args=items)
    assert json.dumps(saved.config, indent=2, sort_keys=True) == to_json(base_config())
    assert Plan.from_json(json.dumps(saved.plan)) == PLAN
    assert saved.data == DATA


def test_a_new_folder_has_no_checkpoint(reopen):
    manager = reopen()
    assert manager.latest_step() is None and manager.best_step() is None


def test_a_half_written_checkpoint_is_not_seen(reopen, directory, tmp_path):
    save(reopen(), 4, 0.5)
    half = tmp_path / "checkpoints" / "8.orbax-checkpoint-tmp-123"
    half.mkdir()
    (half / "state").mkdir()
    manager = reopen()
    assert manager.latest_step() == 4
    save(manager, 8, 0.6)
    assert_equal(checkpoint.restore(manager, 8, make_state(0)), make_state(8))
    assert not half.exists()


def test_another_architecture_is_not_restored(reopen):
    manager = reopen()
    save(manager, 1, 0.5)
    other = make_state(0)
    params = {**other.params, "extra": jnp.zeros(3)}
    with pytest.raises(ValueError, match="extra"):
        checkpoint.restore(manager, 1, other.replace(params=params))


# What can happen to a file.
DAMAGES = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "missing": os.remove,
    "flipped": lambda path: flip_bit(path, path.stat().st_size // 2),
    "foreign": lambda path: path.write_bytes(NESTED),
}
NESTED = b"[" * 100_000  # deeper than Python reads
# Files that Orbax writes and nothing reads; without the last it guesses right.
UNREAD = ("commit_success.txt", "_sharding", "_CHECKPOINT_METADATA")


def flip_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A folder with checkpoints of steps 3 and 5, to be copied."""
    folder = tmp_path_factory.mktemp("two_steps") / "checkpoints"
    manager = checkpoint.open_checkpoints(str(folder), keep=3)
    save(manager, 3, 0.5)
    save(manager, 5, 0.4)
    checkpoint.close_checkpoints(manager)
    return folder


@pytest.fixture
def copied(two_steps, tmp_path):
    return shutil.copytree(two_steps, tmp_path / "checkpoints")


def restore_latest(folder):
    """(step, steps that are left, what was said); the state must be that step's to the bit."""
    lines = []
    manager = checkpoint.open_checkpoints(str(folder), keep=3)
    step, state = checkpoint.restore_latest(manager, make_state(0), log_text=lines.append)
    steps = sorted(manager.all_steps())
    best = manager.best_step()
    checkpoint.close_checkpoints(manager)
    assert_equal(state, make_state(step))
    assert best == 3
    return step, steps, lines


def test_the_latest_is_restored_and_nothing_said(copied):
    assert restore_latest(copied) == (5, [3, 5], [])
    assert not (copied.parent / "damaged").exists()


def test_without_checkpoints_there_is_nothing_to_restore(reopen):
    assert checkpoint.restore_latest(reopen(), make_state(0), log_text=pytest.fail) is None


@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_file_is_damaged_the_state_is_right_or_that_of_the_checkpoint_before(
    two_steps, tmp_path, damage
):
    files = [path.relative_to(two_steps) for path in (two_steps / "5").rglob("*") if path.is_file()]
    fell_back = []
    for number, name in enumerate(sorted(files)):
        if damage == "flipped" and name.parent.name == "array_metadatas":
            continue  # found as well, but by Orbax, which prints tracebacks from its threads
        if damage == "foreign" and name.name == checkpoint.NOTE:
            continue  # refused, see below
        folder = shutil.copytree(two_steps, tmp_path / str(number) / "checkpoints")
        DAMAGES[damage](folder / name)
        step, steps, lines = restore_latest(folder)
        if step == 5:
            assert steps == [3, 5] and lines == []
            continue
        fell_back.append(name)
        moved = folder.parent / "damaged" / "5"
        assert (step, steps) == (3, [3]) and moved.is_dir()
        assert len(lines) == 1 and str(moved) in lines[0] and f"{folder}/5 is damaged" in lines[0]
    needed = {"config", "plan", "data", "metrics", "digest", "state/_METADATA", "state/d"}
    needed |= {"state/manifest.ocdbt"}
    found = {name.relative_to("5").as_posix() for name in fell_back}
    assert all(any(one.startswith(name) for one in found) for name in needed)
    assert not any(name.name in UNREAD for name in fell_back)


@pytest.mark.parametrize("content", [NESTED, b"[]", b"1"])
def test_a_note_that_orbax_trips_over_is_named_and_the_mend_is_right(copied, content):
    note = copied / "5" / checkpoint.NOTE
    note.write_bytes(content)
    for read in (restore_latest, lambda folder: checkpoint.load_variables(str(folder), 5)):
        with pytest.raises(checkpoint.CheckpointProblem, match=rf"^{note}: damaged; delete it"):
            read(copied)
    note.unlink()
    assert restore_latest(copied) == (5, [3, 5], [])


def test_one_wrong_bit_in_the_numbers_is_found(two_steps, tmp_path):
    # Nothing in such a file says that it has changed; some of its bytes may be of no use to anyone.
    largest = max((two_steps / "5/state").rglob("d/*"), key=lambda path: path.stat().st_size)
    size = largest.stat().st_size
    assert size > 2000
    steps = []
    for position in range(size // 16, size, size // 16):
        folder = shutil.copytree(two_steps, tmp_path / str(position) / "checkpoints")
        flip_bit(folder / largest.relative_to(two_steps), position)
        steps.append(restore_latest(folder)[0])  # whose state is right in any case
    assert steps.count(3) > len(steps) / 2


@pytest.mark.parametrize("leftovers", ["empty", "without a file", "temporary"])
def test_folders_that_are_no_checkpoint(copied, leftovers):
    if leftovers == "empty":
        (copied / "8").mkdir()
    elif leftovers == "without a file":
        for folder in copied.joinpath("5").rglob("*"):
            (copied / "8" / folder.relative_to(copied / "5")).parent.mkdir(
                parents=True, exist_ok=True
            )
    else:
        shutil.copytree(copied / "5", copied / "8.orbax-checkpoint-tmp")
    step, steps, lines = restore_latest(copied)
    assert (step, steps) == (5, [3, 5])
    assert len(lines) == (leftovers != "temporary")
    assert sorted(path.name for path in copied.iterdir()) == ["3", "5"]


def test_two_damaged_ones_in_a_row_and_one_more_at_the_same_step(copied, reopen):
    manager = reopen(keep=4)
    save(manager, 8)
    reopen(keep=4)
    for step in ("5", "8"):
        os.remove(copied / step / "state/manifest.ocdbt")
    assert restore_latest(copied)[:2] == (3, [3])
    save(reopen(keep=4), 5)
    reopen(keep=4)
    os.remove(copied / "5/state/manifest.ocdbt")
    assert restore_latest(copied)[:2] == (3, [3])
    damaged = sorted(path.name for path in (copied.parent / "damaged").iterdir())
    assert damaged == ["5", "5-again", "8"]


def test_if_none_is_whole_all_stay_and_each_is_named(copied):
    for step in ("3", "5"):
        os.truncate(copied / step / "config/metadata", 7)
    manager = checkpoint.open_checkpoints(str(copied), keep=3)
    with pytest.raises(checkpoint.CheckpointProblem) as caught:
        checkpoint.restore_latest(manager, make_state(0), log_text=pytest.fail)
    checkpoint.close_checkpoints(manager)
    assert "step 3: " in str(caught.value) and "step 5: " in str(caught.value)
    assert f"{copied}/5/config/metadata: Unterminated" in str(caught.value)
    assert sorted(path.name for path in copied.iterdir()) == ["3", "5"]


def test_another_structure_is_not_taken_for_damage(copied):
    manager = checkpoint.open_checkpoints(str(copied), keep=3)
    other = make_state(0).replace(batch_stats={"other": jnp.zeros(3)})
    with pytest.raises(checkpoint.CheckpointProblem, match="no checkpoint"):
        checkpoint.restore_latest(manager, other, log_text=pytest.fail)
    checkpoint.close_checkpoints(manager)
    assert restore_latest(copied)[0] == 5


def test_metrics_that_were_changed_do_not_stop_the_others_from_being_opened(copied):
    for position in range((copied / "5/metrics/metrics").stat().st_size):
        folder = shutil.copytree(copied, copied.parent / str(position) / "checkpoints")
        flip_bit(folder / "5/metrics/metrics", position)
        manager = checkpoint.open_checkpoints(str(folder), keep=3)
        assert manager.best_step() in (3, 5)
        checkpoint.close_checkpoints(manager)


def test_the_digest_is_that_of_the_bytes():
    state = make_state(2)
    assert checkpoint.digest(state) == checkpoint.digest(parallel.replicate(make_state(2)))
    bias = state.params["head"]["bias"]
    for other in (
        np.nextafter(np.asarray(bias), 1),
        np.asarray(bias).view(np.int32),
        bias.reshape(1, 2),
    ):
        params = {"head": {**state.params["head"], "bias": other}}
        assert checkpoint.digest(state.replace(params=params)) != checkpoint.digest(state)
    zeros = [
        checkpoint.digest(TrainState(np.int32(0), {"a": np.float32([sign * 0.0])}, {}, ()))
        for sign in (1, -1)
    ]
    assert zeros[0] != zeros[1]
    renamed = TrainState(np.int32(0), {"b": np.float32([0.0])}, {}, ())
    assert checkpoint.digest(renamed) != zeros[0]


@pytest.fixture
def start_child(quick):
    """Function as `child_of`; what it starts compiles as this process does."""
    return functools.partial(child_of, quick)


def child_of(quick, code, directory, prefix=()):
    """Starts Python with what this file has to offer; code sees `directory` and `manager`."""
    start = f"""
        import os, resource, signal, sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_checkpoint import checkpoint, make_state, save
        directory = {str(directory)!r}
        manager = checkpoint.open_checkpoints(directory, keep=2)
    """
    code = textwrap.dedent(start) + textwrap.dedent(code)
    command = [*prefix, sys.executable, "-c", code]
    compiled_once = {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | compiled_once | quick
    )


def small_filesystem(folder):
    """Start of a command that sees a file system of its own in `folder`; skips where forbidden."""
    mount = f"mount -t tmpfs -o size=1m none {folder} && exec "
    unshared = ("unshare", "--map-root-user", "--mount", "sh", "-c")
    try:
        subprocess.run([*unshared, mount + "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    return (*unshared, mount + '"$@"', "sh")


def test_killed_at_any_moment_every_checkpoint_that_is_seen_is_whole(
    start_child, directory, reopen
):
    code = """
        step = max(manager.all_steps(), default=0)
        while True:
            step += 1
            save(manager, step, 1 / step)
            print(step, flush=True)
    """
    for delay_lines in (1, 2, 3):
        child = start_child(code, directory)
        saved = [int(child.stdout.readline()) for _ in range(delay_lines)][-1]
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.013 * delay_lines)  # somewhere in one of the next saves
        child.kill()
        saved = max([saved, *map(int, child.communicate()[0].split())])
        manager = reopen()
        step, state = checkpoint.restore_latest(manager, make_state(0), log_text=pytest.fail)
        assert step in (saved, saved + 1)  # on disk when `save` returned, or soon after
        assert_equal(state, make_state(step))
        for step in manager.all_steps():
            assert_equal(checkpoint.restore(manager, step, make_state(0)), make_state(step))
        assert all(name.isdecimal() for name in os.listdir(directory))


def test_an_old_step_is_out_of_sight_before_its_first_file_is_removed(
    reopen, directory, monkeypatch
):
    manager = reopen(keep=2)
    with monkeypatch.context() as patch:
        patch.setattr(
            os, "unlink", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("killed"))
        )
        for step in (1, 2, 3):
            save(manager, step)
    assert any(files for _, _, files in os.walk(os.path.join(directory, checkpoint.DISCARDED)))
    assert sorted(reopen(keep=2).all_steps()) == [2, 3]
    assert sorted(os.listdir(directory)) == ["2", "3"]


@pytest.mark.parametrize(
    "reasons",
    [["File too large"], ["No space left on device", "Read-only file system"]],
    ids=["a limit", "a disk"],
)
def test_a_disk_that_takes_no_more(start_child, tmp_path, reasons):
    """The message says what could not be written; what was saved before is kept and restored."""
    code = f"""
        def file_too_large():
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
            return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

        def no_space_left_on_device():
            filler = os.path.join(directory, "filler")
            with open(filler, "wb", buffering=0) as file:
                try:
                    while file.write(bytes(1024)):
                        pass
                except OSError:
                    pass
            return lambda: os.remove(filler)

        def read_only_file_system():
            mount = "mount -o remount,%s " + os.path.dirname(directory)
            assert not os.system(mount % "ro")
            return lambda: os.system(mount % "rw")

        save(manager, 3, 0.5)
        for reason in {reasons!r}:
            mend = globals()[reason.lower().replace(" ", "_").replace("-", "_")]()
            try:
                save(manager, 5, 0.4)
            except checkpoint.CheckpointProblem as problem:
                print(problem)
            mend()
            checkpoint.close_checkpoints(manager)
            manager = checkpoint.open_checkpoints(directory, keep=2)
            print(manager.all_steps())
            print(checkpoint.restore_latest(manager, make_state(0), log_text=print)[0])
        save(manager, 5, 0.4)
        print(manager.all_steps())
        checkpoint.close_checkpoints(manager)
    """
    prefix = () if reasons == ["File too large"] else small_filesystem(tmp_path)
    output = start_child(code, tmp_path / "checkpoints", prefix).communicate()[0]
    lines = output.splitlines()
    assert len(lines) == 3 * len(reasons) + 1, output
    for reason, said in zip(reasons, zip(*[iter(lines)] * 3, strict=False), strict=True):
        expected = f"checkpoint of step 5 could not be written to {tmp_path}/checkpoints: {reason}"
        assert expected in said[0]
        assert "kept, by step: 3." in said[0] and "run the same command" in said[0]
        assert said[1:] == ("[3]", "3")
    assert lines[-1] == "[3, 5]"


@pytest.mark.multiprocess
def test_several_processes_save_together_and_fall_back_together(tmp_path):
    """Two processes with two members each; then one process, which finds what they saved."""
    code = f"""
import os, sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
if sys.argv[1] == "1":
    jax.distributed.initialize("localhost:" + sys.argv[3], 2, int(sys.argv[2]))
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxseg.run import checkpoint
from jaxseg.training.state import TrainState
from pathlib import Path

folder = Path({str(tmp_path / "checkpoints")!r})
mesh = Mesh(np.asarray(jax.devices()).reshape(-1, 2), ("batch", "member"))
place = NamedSharding(mesh, PartitionSpec("member"))

def state(step):
    full = np.arange(2 * 400, dtype=np.float32).reshape(2, 400) + step
    params = jax.make_array_from_callback(full.shape, place, lambda index: full[index])
    steps = np.full(2, step, np.int32)
    steps = jax.make_array_from_callback((2,), place, lambda index: steps[index])
    return TrainState(steps, {{"w": params}}, {{}}, ())

def leaves(state):
    return [np.asarray(s.data) for x in jax.tree.leaves(state) for s in x.addressable_shards]

manager = checkpoint.open_checkpoints(str(folder), keep=3)
if sys.argv[1] == "1":
    for step in (1, 2):
        checkpoint.save(
            manager, step, state(step), config_json="{{}}", plan_json="{{}}", data={{}},
            metrics=None,
        )
    sync_global_devices("saved")
    if sys.argv[2] == "0":
        (largest,) = [max(folder.glob("2/state/**/d/*"), key=lambda p: p.stat().st_size)]
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
    sync_global_devices("damaged")
lines = []
step, restored = checkpoint.restore_latest(manager, state(0), log_text=lines.append)
equal = all(np.array_equal(a, b) for a, b in zip(leaves(restored), leaves(state(1)), strict=True))
print("FOUND", step, equal, len(lines), checkpoint.digest(restored) == checkpoint.digest(state(1)))
checkpoint.close_checkpoints(manager)
"""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])

    def start(*arguments):
        command = [sys.executable, "-c", code, *arguments]
        root = os.path.dirname(os.path.dirname(checkpoint.__file__))
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)

    def found(child):
        output = child.communicate(timeout=120)[0].splitlines()
        return [line for line in output if line.startswith("FOUND")]

    both = [start("1", rank, port) for rank in ("0", "1")]
    assert [found(child) for child in both] == [["FOUND 1 True 1 True"]] * 2
    assert found(start("2")) == ["FOUND 1 True 0 True"]
    assert os.listdir(tmp_path / "damaged") == ["2"]
