"""How the house is built: what may import what, and how long and how dense its code may be.

support ← published ← vqgan, model, clip, diffusion ← lvm, dreamllm ← tasks ← train
support ← data, documents ← prepare, tasks
"""

import ast
import graphlib

import pytest
from conftest import ROOT

FILES = [*sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("support/*.py")), *sorted(ROOT.glob("published/*.py"))]
TREES = {
    file.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): ast.parse(file.read_text()) for file in FILES
}
MODELS = {"vqgan", "model", "clip", "diffusion"}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def imports(name):
    """The modules of this project that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & TREES.keys()


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def comprehensions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, COMPREHENSIONS)]


def test_no_module_imports_itself_over_others():
    graphlib.TopologicalSorter({name: imports(name) for name in TREES}).prepare()  # CycleError names the circle


@pytest.mark.parametrize("name", TREES)
def test_arrows_point_one_way(name):
    room, used = name.split(".")[0], imports(name)
    rooms = {module.split(".")[0] for module in used} - {room}
    if room == "support":
        assert not rooms
    elif room == "published":
        assert rooms <= {"support"}
    elif name in MODELS:
        assert rooms <= {"support", "published"} and used & {m for m in TREES if m.startswith("published.")} <= {
            "published.llama"
            if name == "model"
            else "published.stable_diffusion"
            if name == "diffusion"
            else f"published.{name}"
        }
    elif name in ("data", "documents"):
        assert rooms <= {"support", "data"}
    elif name in ("lvm", "dreamllm"):
        assert rooms <= {"support", "published"} | MODELS
    elif name == "tasks":
        assert not rooms & {"train", "train_tpu", "sample", "prepare"}
    else:  # the programs: nothing imports them
        assert not rooms & {"train", "train_tpu", "sample", "prepare"}


@pytest.mark.parametrize("name", TREES)
def test_no_function_is_longer_than_a_screen(name):
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions(TREES[name]) if f.end_lineno - f.lineno >= 60}
    assert not long


@pytest.mark.parametrize("name", TREES)
def test_comprehensions_are_few_and_flat(name):
    tree = TREES[name]
    lines = tree.body[-1].end_lineno if tree.body else 0
    assert len(comprehensions(tree)) <= max(1, 5 * lines / 100)
    nested = [c.lineno for c in comprehensions(tree) if any(inner is not c for inner in comprehensions(c))]
    assert not nested
