"""Who may import whom: a file imports from its own room and those below it, and nothing else."""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

import jaxseg

ROOT = pathlib.Path(jaxseg.__file__).parent

# From the ground up, in the order in which a scan comes down. Rooms of one floor know nothing of
# each other. A file at the door is a room of its own; so is what `python -m jaxseg.models` does.
VERBS = {"main", "plan", "predict", "evaluate", "export", "reproduce", "models.__main__"}
GROUND = {
    "command",
    "config",
    "config_checks",
    "config_checks_fields",
    "config_checks_models",
    "config_fields",
    "config_planned",
    "config_reference",
    "geometry",
    "models",
    "parallel",
    "problem",
}
FLOORS = (
    GROUND,
    {"training", "planning"},
    {"run"},
    {"data", "evaluation"},
    {"inference"},
    {"experiment"},
    VERBS,
)
PURE = {
    "config",
    "config_checks",
    "config_checks_fields",
    "config_checks_models",
    "config_fields",
    "geometry",
    "models",
    "parallel",
    "planning",
    "training",
    "inference",
}
PURE_FILES = {
    f"jaxseg.evaluation.{name}"
    for name in ("calibration", "metrics", "report_numbers", "statistics", "surfaces", "tables")
}
# What a pure room may load besides Python itself.
LIBRARIES = {"flax", "jax", "ml_collections", "numpy", "optax", "scipy"}
HEAVY = {"tensorflow", "tensorflow_datasets", "orbax", "nibabel", "matplotlib"}
# Commands that need no more than `pip install jaxseg` must not load what training brings.
LIGHT = (
    "jaxseg.experiment.evaluate_folder",
    "jaxseg.experiment.portable",
    "jaxseg.experiment.predict_folder",
)
EXTRAS = {"tensorflow", "tensorflow_datasets", "matplotlib", "jinja2"}

FILES = sorted(ROOT.rglob("*.py"))
MODULES = {
    ".".join(("jaxseg", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in FILES
    if "configs" not in path.parts
}


def room_of(module):
    """Name of the room of a module of ours; "" for the package itself, which holds nothing."""
    inner = module.partition(".")[2]
    return inner if inner in VERBS else inner.partition(".")[0]


def floor_of(module):
    room = room_of(module)
    return next(n for n, rooms in enumerate(FLOORS) if room in rooms) if room else -1


def is_pure(module):
    return room_of(module) in PURE or module in PURE_FILES


def imports_of(source):
    """Full names of what a source text imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def imports_too_high(module, source):
    """The imports that this module's place in the house does not allow."""
    wrong = []
    for name in imports_of(source):
        top = name.partition(".")[0]
        if top == "jaxseg":
            is_at_home = room_of(name) == room_of(module) or floor_of(name) == floor_of(module) == 0
            allowed = is_at_home or floor_of(name) < floor_of(module)
        else:
            allowed = not is_pure(module) or top in sys.stdlib_module_names or top in LIBRARIES
        if not allowed:
            wrong.append(name)
    return wrong


def names_in(source):
    """Every identifier that a source text reads, imports or looks up as an attribute."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield from node.name.split(".")


def test_every_file_has_a_floor_and_every_room_is_there():
    assert {room_of(module) for module in MODULES} - {""} == set().union(*FLOORS)


@pytest.mark.parametrize("module", MODULES)
def test_file_imports_from_its_own_room_or_below(module):
    assert imports_too_high(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("jaxseg.training.steps", "from jaxseg.run import log", ["jaxseg.run.log"]),
        (
            "jaxseg.data.cases",
            "from jaxseg.evaluation import metrics",
            ["jaxseg.evaluation.metrics"],
        ),
        (
            "jaxseg.evaluation.plots",
            "from jaxseg.data.formats import nifti",
            ["jaxseg.data.formats.nifti"],
        ),
        ("jaxseg.models.unet", "from jaxseg.training.optim import f", ["jaxseg.training.optim"]),
        ("jaxseg.predict", "from jaxseg import evaluate", ["jaxseg.evaluate"]),
        ("jaxseg.run.log", "import jaxseg.data.cases", ["jaxseg.data.cases"]),
        ("jaxseg.training.losses", "def f():\n    import tensorflow", ["tensorflow"]),
        ("jaxseg.evaluation.metrics", "import matplotlib.pyplot", ["matplotlib.pyplot"]),
        ("jaxseg.models.unet", "from jaxseg.models.blocks import UpConv\nimport jax", []),
        ("jaxseg.data.cases", "import tensorflow\nfrom jaxseg import geometry", []),
        ("jaxseg.evaluation.plots", "import matplotlib\nfrom jaxseg.run import writers", []),
    ],
)
def test_the_check_above_can_fail(module, source, wrong):
    assert imports_too_high(module, source) == wrong


def test_a_package_file_holds_one_docstring():
    for path in FILES:
        if path.name == "__init__.py":
            [statement] = ast.parse(path.read_text()).body
            assert isinstance(statement.value, ast.Constant), path


def test_verbs_are_thin():
    for verb in VERBS:
        assert len(MODULES[f"jaxseg.{verb}"].read_text().splitlines()) < 150, verb


def test_no_file_and_no_function_is_long():
    benchmarks = sorted(ROOT.parent.joinpath("benchmarks").glob("*.py"))
    for path in (*FILES, *benchmarks):
        text = path.read_text()
        assert len(text.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                if body:
                    length = body[-1].end_lineno - body[0].lineno + 1
                    assert length <= 50, f"{path}: {node.name} has {length} lines"


def test_pmap_is_named_in_parallel_alone():
    assert [path.name for path in FILES if "pmap" in names_in(path.read_text())] == ["parallel.py"]


def test_orbax_is_imported_in_checkpoint_alone():
    assert [path.name for path in FILES if "orbax" in names_in(path.read_text())] == [
        "checkpoint.py"
    ]


def test_nothing_is_pickled():
    picklers = {
        "pickle",
        "cPickle",
        "_pickle",
        "cloudpickle",
        "dill",
        "joblib",
        "marshal",
        "shelve",
    }
    named = {path.name: picklers & set(names_in(path.read_text())) for path in FILES}
    # Whose error torch raises when a file holds more than arrays.
    assert {name: found for name, found in named.items() if found} == {"weights.py": {"pickle"}}


def loaded_after_each(modules):
    """Top-level packages that a fresh Python has loaded after each of some imports, one by one."""
    code = (
        "import importlib, json, sys\n"
        "for module in sys.argv[1:]:\n"
        "    importlib.import_module(module)\n"
        "    print(json.dumps([module, sorted({n.partition('.')[0] for n in sys.modules})]))\n"
    )
    command = [sys.executable, "-c", code, *modules]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {module: set(loaded) for module, loaded in map(json.loads, done.stdout.splitlines())}


def test_pure_modules_load_nothing_heavy_and_commands_of_the_plain_install_no_extra():
    pure = [module for module in MODULES if is_pure(module) and "__main__" not in module]
    assert len(pure) >= 30
    loaded = loaded_after_each([*pure, *LIGHT])
    assert {m: loaded[m] & HEAVY for m in pure} == {m: set() for m in pure}
    assert {m: loaded[m] & EXTRAS for m in LIGHT} == {m: set() for m in LIGHT}
