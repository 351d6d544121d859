"""A built wheel in a new environment, far from the repository: it predicts, says what it lacks."""

import os
import pathlib
import subprocess
import sys

import nibabel
import numpy as np
import pytest

from jaxseg.data.images import read_image
from jaxseg.experiment import predictor

pytestmark = pytest.mark.multiprocess

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(*command, cwd):
    return subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Folder of the programs of a new environment that holds the wheel and what it asks for."""
    folder = tmp_path_factory.mktemp("wheel")
    built = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, ROOT, cwd=folder)
    if built.returncode and "connection" in built.stderr.lower():
        pytest.skip("no package index can be reached, so no environment can be made")
    assert built.returncode == 0, built.stderr
    [wheel] = folder.glob("jaxseg-*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    programs = folder / "venv" / "bin"
    pip = (sys.executable, "-m", "pip", "--python", programs / "python")
    done = run(*pip, "install", "--no-compile", wheel, cwd=folder)
    assert done.returncode == 0, done.stderr
    return programs


def test_it_predicts_what_the_checkout_predicts(installed, finished_run, tmp_path):
    workdir, data = finished_run
    source = data / "imagesTr" / "case_00.nii.gz"
    done = run(
        installed / "jaxseg-predict",
        f"--workdir={workdir}",
        f"--input={source}",
        f"--output={tmp_path / 'out'}",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    written = np.asarray(nibabel.load(tmp_path / "out" / "case_00.nii.gz").dataobj)
    here = predictor.segment(predictor.load_predictor([str(workdir)]), *read_image(source))
    np.testing.assert_array_equal(written, here["label"])


def test_it_has_no_tensorflow_and_says_how_to_get_it(installed, tmp_path):
    modules = "tensorflow", "tensorflow_datasets", "matplotlib"
    code = f"import importlib.util as u; print([m for m in {modules} if u.find_spec(m)])"
    assert run(installed / "python", "-c", code, cwd=tmp_path).stdout == "[]\n"
    for command in (("jaxseg", "--config=unet.py"), ("jaxseg-reproduce", "--workdir=run")):
        done = run(installed / command[0], *command[1:], cwd=tmp_path)
        assert done.returncode == 2
        assert (
            "needs tensorflow, which is not installed: pip install 'jaxseg[train]'" in done.stderr
        )
        assert "Traceback" not in done.stderr


def test_it_carries_the_configs_and_the_report(installed, tmp_path):
    package = pathlib.Path(
        run(
            installed / "python",
            "-c",
            "import jaxseg; print(jaxseg.__path__[0])",
            cwd=tmp_path,
        ).stdout.strip()
    )
    assert package.is_relative_to(installed.parent)
    shipped = {path.name for path in (package / "configs").glob("*.py")}
    assert shipped == {path.name for path in (ROOT / "configs").glob("*.py")}
    templates = {path.name for path in (package / "evaluation" / "templates").iterdir()}
    assert templates == {"report.html", "report.css", "report.js", "report.md"}
    assert (package / "py.typed").exists()
    done = run(installed / "jaxseg", "--config=unknown.py", cwd=tmp_path)
    assert done.returncode == 2 and "none of the shipped configs" in done.stderr
    assert "unet.py" in done.stderr
