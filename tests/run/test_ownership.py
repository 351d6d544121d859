import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

from jaxseg.run import ownership


@pytest.fixture
def start_owner(tmp_path):
    """Function that starts a process which owns `tmp_path` and waits; returns it."""
    children = []

    def start():
        code = f"""
import sys
from jaxseg.run.ownership import owning
with owning({str(tmp_path)!r}):
    print("owned", flush=True)
    sys.stdin.read()
"""
        pipe = subprocess.PIPE
        child = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=pipe,
            stdout=pipe,
            text=True,
            cwd=pathlib.Path(ownership.__file__).parents[2],
        )
        children.append(child)
        assert child.stdout.readline() == "owned\n"
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate()


def assert_refused(workdir, pid):
    with pytest.raises(ownership.OwnershipProblem) as caught, ownership.owning(str(workdir)):
        pytest.fail("not refused")
    message = str(caught.value)
    assert f"process {pid} on host {socket.gethostname()} " in message
    assert str(workdir) in message and "--config.workdir" in message


def test_another_process_is_refused_until_the_owner_is_killed(start_owner, tmp_path):
    owner = start_owner()
    assert_refused(tmp_path, owner.pid)
    assert_refused(tmp_path, owner.pid)  # the first refusal has changed nothing
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    with ownership.owning(str(tmp_path)):
        assert_refused(tmp_path, os.getpid())


def test_an_owner_that_ends_gives_the_folder_back(start_owner, tmp_path):
    owner = start_owner()
    owner.communicate("")
    assert owner.returncode == 0
    assert start_owner().pid != owner.pid


def test_a_second_run_in_the_same_process_is_refused_and_the_first_goes_on(tmp_path):
    with ownership.owning(str(tmp_path)):
        assert_refused(tmp_path, os.getpid())
        assert_refused(tmp_path, os.getpid())
    with ownership.owning(str(tmp_path)):
        pass


def test_a_failure_gives_the_folder_back(tmp_path):
    with pytest.raises(KeyError), ownership.owning(str(tmp_path)):
        raise KeyError
    with ownership.owning(str(tmp_path)):
        pass


def test_folders_are_owned_apart(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with ownership.owning(str(tmp_path / "a")), ownership.owning(str(tmp_path / "b")):
        pass


def test_a_longer_name_of_an_earlier_owner_leaves_nothing(tmp_path):
    (tmp_path / ownership.NAME).write_text("123456789 a-host-with-a-long-name\n" * 3)
    with ownership.owning(str(tmp_path)):
        assert_refused(tmp_path, os.getpid())
        assert (tmp_path / ownership.NAME).read_text() == f"{os.getpid()} {socket.gethostname()}\n"


def test_an_owner_that_has_not_yet_said_who_it_is(tmp_path):
    with ownership.owning(str(tmp_path)):
        (tmp_path / ownership.NAME).write_text("")
        with (
            pytest.raises(ownership.OwnershipProblem, match="process unknown on host unknown"),
            ownership.owning(str(tmp_path)),
        ):
            pass


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError), ownership.owning(str(tmp_path / "missing")):
        pass
