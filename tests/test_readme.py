"""What the README promises: it is short, what it names is there, and its commands run as they are written."""

import re
import shutil
import subprocess

import numpy as np
import processes
import pytest
from conftest import ROOT
from PIL import Image

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#]+)\)")
FILE = re.compile(r"(?<![\w/.])(?:configs|docs|tests|bench|support|published)/[\w./-]*\w|(?<![\w/.-])[a-z_]+\.py\b")


def commands(text):
    """The lines of the code blocks that are indented, those that end in a backslash joined."""
    lines = re.findall(r"^    (\S.*)$", text.replace("\\\n        ", ""), flags=re.M)
    return [re.sub(r"\s{2,}#.*", "", line) for line in lines]


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, flags=re.M | re.S)[1]


# ---- what it names -----------------------------------------------------------------------------


def test_it_is_short():
    assert README.count("\n") <= 280


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_link_is_there(page):
    text = page.read_text()
    links = [link for link in LINK.findall(text) if not link.startswith("http")]
    missing = [link for link in links if not (page.parent / link).exists()]
    homes = (ROOT, ROOT / "support", ROOT / "published", ROOT / "bench", ROOT / "tests")
    names = {name.rstrip(".") for name in FILE.findall(text)}
    missing += [name for name in names if not any((home / name).exists() for home in homes)]
    assert not missing


def test_the_map_counts_lines_rightly():
    rows = re.findall(r"^\| \[([\w/.]+\.py)\]\([\w/.]+\) \|.*\| (\d+) \|$", README, flags=re.M)
    assert len(rows) >= 13
    for name, count in rows:
        assert abs((ROOT / name).read_text().count("\n") - int(count)) <= 15, name


# ---- what it says to type ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder with all that a clone has, out/ being its own, and a function that runs a bash script in it.

    Its python only writes down what it is told, which runs afterwards, in a process that has torch imported already.
    """
    folder = tmp_path_factory.mktemp("clone")
    for entry in ROOT.iterdir():
        if entry.name not in ("out", ".venv", ".git"):
            (folder / entry.name).symlink_to(entry)
    told = folder / "told"

    def bash(*lines):
        told.write_text("")
        script = "\n".join(["set -eu", f"""python() {{ printf '%s\\0' $# "$@" >> {told}; }}""", *lines])
        subprocess.run(["bash", "-c", script], cwd=folder, check=True)
        words, out = told.read_text().split("\0")[:-1], ""
        while words:
            count = int(words[0])
            command, words = words[1 : count + 1], words[count + 1 :]
            done = processes.run(folder / command[0], *command[1:], cwd=folder)
            assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            out += done.stdout
        return out

    bash.folder = folder
    return bash


@pytest.fixture(scope="module")
def demo(clone):
    """`make demo` with fewer steps, sentences and prompts."""
    recipe = re.search(r"^demo long:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.M)[1]
    steps = "train.steps=2 train.batch_size=2 train.eval_batches=1 train.compile=false train.sample_every=0"
    kinds = [f'{{kind = "{kind}", passes = 0.01}}' for kind in ("colorization", "inpainting", "video")]
    sources = f"data.sources=[{', '.join(kinds)}]"
    shorter = {"train.py": steps, "prepare.py": f"'{sources}'", "bench/lvm_report.py": "--prompts 2 --candidates 2"}
    for line in recipe.replace("$(PY)", "python").replace("$@", "demo").splitlines():
        clone(f"{line} {shorter[line.split()[1]]}")
    return clone


def test_the_demo_s_pictures_can_be_prompted(demo):
    demo(*[line for line in commands(section("Prompt it")) if "emoji/dream" not in line and "$D" not in line])
    for name in ("answers.png", "motion.gif", "grid.png", "sentences.png"):
        assert Image.open(demo.folder / name).size[0] >= 64


def test_a_dreamllm_can_be_prompted(clone, dream_run):
    """Here a DreamLLM of seconds stands for the one that make dream trains."""
    folder = clone.folder / "out" / "emoji" / "dream"
    folder.mkdir(parents=True, exist_ok=True)
    for stage in ("instruct", "interleaved"):
        (folder / stage).symlink_to(dream_run)
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(folder / "held_out_1.png")
    lines = [line for line in commands(section("Prompt it")) if "emoji/dream" in line or "$D" in line]
    few = {"chat": "--max-new 4", "image": "--steps 1", "document": "--max-new 4 --steps 1"}
    shorter = [f"{line} {few[line.split()[2]]}" if "sample.py" in line else line for line in lines]
    clone(*shorter)
    assert (clone.folder / "taco.png").exists() and (clone.folder / "page" / "page.html").exists()


def test_one_s_own_pictures_train_an_lvm(clone):
    folder = clone.folder / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(40):
        Image.fromarray(rng.integers(0, 256, (70, 90, 3), np.uint8)).save(folder / f"{number}.png")
    for name in ("a.png", "b.png", "c.png"):
        shutil.copy(folder / "0.png", clone.folder / name)
    few = "train.steps=2 train.batch_size=2 train.eval_batches=1 train.compile=false train.sample_every=0"
    lines = commands(section("Your own pictures"))
    clone(*[f"{line} {few}" if "train.py" in line else line for line in lines])
    assert Image.open(clone.folder / "answer.png").size[0] > 64


def test_a_run_is_one_file_and_any_key_can_be_overridden(clone):
    lines = [line for line in commands(section("Train")) if "torchrun" not in line and "--plan" not in line]
    few = "train.batch_size=2 train.steps=2 train.eval_batches=1 train.sample_every=0"
    clone(*[f"{line} {few}" for line in lines])


def test_a_plan_is_made_on_a_laptop(clone):
    (line,) = [line for line in commands(section("Train")) if "--plan" in line]
    small = line.replace("model.size=lvm_7b", "model.size=lvm_100m").replace("mesh.fsdp=64", "mesh.fsdp=2")
    assert "GB" in clone(small.replace("mesh.tensor=4", "mesh.tensor=2").replace("batch_size=128", "batch_size=2"))
