import os
import pathlib
import stat
import subprocess
import sys

import pytest

from jaxseg import command

# Compiles one program, keeping it in argv[1], and prints how often one was found there.
COMPILES = """
import sys
from jaxseg import command
command.prepare_environment()
import jax
from jax._src import monitoring

found = []
monitoring.register_event_listener(
    lambda event, **_: event.endswith("compilation_cache/cache_hits") and found.append(event)
)
command.keep_compiled(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((8, 8)))
print("found", len(found), "in", jax.config.jax_compilation_cache_dir)
"""


def compiles(folder, **environment):
    """Runs COMPILES; number of programs found and the folder of those kept."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("JAX_") and k != "NPROC"}
    result = subprocess.run(
        [sys.executable, "-c", COMPILES, str(folder)],
        check=True,
        capture_output=True,
        text=True,
        env=own | {"JAX_PLATFORMS": "cpu"} | environment,
    )
    _, found, _, kept_in = result.stdout.split()
    return int(found), kept_in


def test_the_next_process_finds_what_was_compiled_and_is_apart_from_other_threads(tmp_path):
    folder = tmp_path / "deep" / "compiled"
    found, kept_in = compiles(folder)
    assert found == 0
    path = pathlib.Path(kept_in)
    assert path.parent == folder and any(path.iterdir())
    assert stat.S_IMODE(path.stat().st_mode) == 0o700  # what lies there is executed
    again, same = compiles(folder)
    assert again > 0 and same == kept_in
    with_one_thread, other = compiles(folder, NPROC="1")
    assert with_one_thread == 0 and other != kept_in


def test_compiled_programs_are_not_kept_unless_they_can_be(tmp_path):
    assert compiles("") == (0, "None")
    (tmp_path / "file").write_text("")
    assert compiles(tmp_path / "file" / "compiled") == (0, "None")


def test_a_folder_that_jax_was_given_stays(tmp_path):
    given = str(tmp_path / "given")
    assert compiles(tmp_path / "ours", JAX_COMPILATION_CACHE_DIR=given) == (0, given)
    assert not (tmp_path / "ours").exists()


def test_a_missing_package_is_named_with_its_extra():
    message = command.missing_extra(ModuleNotFoundError(name="tensorflow.python.data"))
    assert "needs tensorflow, which is not installed" in message and "jaxseg[train]" in message
    with pytest.raises(ModuleNotFoundError):
        command.missing_extra(ModuleNotFoundError(name="jaxseg.no_such_module"))


def test_the_configs_of_the_repository_are_those_that_are_found():
    folder = pathlib.Path(__file__).resolve().parents[1] / "configs"
    assert command.shipped_configs() == {path.name: path for path in folder.glob("*.py")}
    assert "unet.py" in command.shipped_configs()


def test_one_message_and_no_traceback(capsys):
    with pytest.raises(SystemExit) as ended, command.one_message("the command"):
        raise OSError("the disk is full")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "the command: the disk is full\n"
    with pytest.raises(SystemExit) as ended, command.one_message("it", interrupted="run it again"):
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert capsys.readouterr().err == "it: run it again\n"
    with pytest.raises(ZeroDivisionError), command.one_message("the command"):
        raise ZeroDivisionError  # a fault of ours is not hidden


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left", "/a/b"), "/a/b: No space left; free space on its disk, or"),
        (PermissionError(13, "Permission denied", "/a"), "/a: Permission denied; make it access"),
        (FileExistsError(17, "File exists", "/a"), "/a: File exists; something else has that"),
        (OSError(2, "No such file", "/a"), "/a: No such file"),
        (OSError("/a: our own words"), "/a: our own words"),
        (ValueError("words"), "words"),
    ],
)
def test_what_the_system_says_is_told_with_the_mend(error, message):
    assert command.worded(error).startswith(message)


def test_of_a_setting_that_comes_twice_the_last_counts():
    argv = ["main", "--config=a.py", "--config.x=(1,2)", "--config.y=1", "--config.x=(3,)"]
    assert command.last_of_each(argv) == [
        "main",
        "--config=a.py",
        "--config.y=1",
        "--config.x=(3,)",
    ]
