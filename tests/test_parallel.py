"""A run over several processes is the run of one: whether each holds the whole model (DDP) or a share (FSDP).

Processes talk through gloo on the CPU; what GPUs add is NCCL and bfloat16.
"""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_tiny
from safetensors.torch import load_file
from test_train import ENVIRONMENT, assert_same_bits, bits, metrics

from support import checkpoint

TEN_STEPS = ["train.steps=10", "train.eval_every=5", "train.save_every=5", "train.keep=0", "train.ema=0.9"]


def torchrun(processes, *command):
    """Runs a program on some processes; its output, or an assertion that shows what went wrong."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    options = {"env": ENVIRONMENT | {"PYTHONPATH": str(ROOT)}, "cwd": ROOT, "timeout": 300}
    done = subprocess.run([*launcher, *map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train_on(processes, kind, run, *overrides):
    config = ["--config", ROOT / "configs" / f"tiny_{kind}.toml", "--device", "cpu", f"run.dir={run}"]
    return torchrun(processes, ROOT / "train.py", *config, *overrides)


def assert_near(a, b, tolerance):
    """Every tensor of two checkpoints: the norm of the difference, as a share of the tensor's own."""
    a, b = bits(a), bits(b)
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).norm() <= tolerance * a[name].norm() + 1e-12, name


@pytest.fixture(scope="module")
def one(row_overrides, tmp_path_factory):
    """A tiny LVM on one process."""
    return run_tiny("llama", tmp_path_factory.mktemp("one") / "run", *TEN_STEPS, *row_overrides)


@pytest.mark.parametrize(("parallel", "processes"), [("ddp", 2), ("fsdp", 4)])
def test_a_llama_ends_with_the_same_weights_on_any_number_of_processes(
    parallel, processes, one, row_overrides, tmp_path
):
    """Its first weights too: each matrix has a seed of its own, of which a process draws its share."""
    run = tmp_path / "run"
    train_on(processes, "llama", run, *TEN_STEPS, f"train.parallel={parallel}", *row_overrides)
    for entry, expected in zip(metrics(run), metrics(one), strict=True):
        assert entry == pytest.approx(expected, rel=1e-5)
    assert_near(one / "step_00000010", run / "step_00000010", 1e-5)
    assert sorted(p.name for p in run.rglob("*.png")) == sorted(p.name for p in one.rglob("*.png"))


SAVE_WHAT_IS_LOADED = """
import sys
import tasks, train
from support import checkpoint, parallel
kind, resume, to, file_bytes, *overrides = sys.argv[1:]
checkpoint.FILE_BYTES = int(file_bytes)
config, keys = tasks.read_run(f"configs/tiny_{kind}.toml", [f"run.dir={to}", *overrides])
ranks = parallel.start_ranks("cpu", config.train.parallel)
task, optimizers, ema = train.begin(config, keys, ranks, checkpoint.Path(resume))
train.save(5, task, optimizers, ema)
"""


def test_a_checkpoint_survives_any_change_of_processes_to_the_bit(one, row_overrides, tmp_path):
    """1 → 4 → 2: what is saved right after loading, on other shares, is what was loaded."""
    script = tmp_path / "save.py"
    script.write_text(SAVE_WHAT_IS_LOADED)
    start = folder = one / "step_00000005"
    for processes in (4, 2):
        overrides = ["train.parallel=fsdp", *TEN_STEPS, *row_overrides]
        torchrun(processes, script, "llama", folder, tmp_path / f"on_{processes}", 5 << 30, *overrides)
        folder = tmp_path / f"on_{processes}" / "step_00000005"
        assert_same_bits(start, folder)


def test_tables_of_tensors_beyond_a_limit_are_several_files_and_an_index(one, row_overrides, tmp_path):
    script = tmp_path / "save.py"
    script.write_text(SAVE_WHAT_IS_LOADED)
    overrides = ["train.parallel=fsdp", *TEN_STEPS, *row_overrides]
    torchrun(2, script, "llama", one / "step_00000005", tmp_path / "run", 10_000, *overrides)
    folder = tmp_path / "run" / "step_00000005"
    files = set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert len(files) > 1 and all((folder / file).stat().st_size < 40_000 for file in files)
    for name in ("model.safetensors", "ema/model.safetensors", "training/optimizer.model.safetensors"):
        expected, found = load_file(one / "step_00000005" / name), checkpoint.read_tensors(folder / name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)


EVERY_PART = 'model.trained=["llama", "projector", "dream_queries", "condition", "clip", "diffusion.unet"]'


@pytest.mark.parametrize(
    "stage",
    [
        [EVERY_PART, "model.drop=0.5"],
        ["model.stage=create", "model.w_lm=0", "train.batch_size=2"],
    ],
)
def test_a_dreamllm_in_shares_is_the_one_of_one_process(stage, dream_parts, tmp_path):
    """One rank may have no picture to read or to draw: it runs these parts all the same, for the others' sake."""
    few = [*dream_parts, *stage, "train.steps=3", "train.log_every=1", "train.eval_every=3", "train.sample_every=3"]
    if "train.batch_size=2" not in few:
        few.append("train.batch_size=4")
    one = run_tiny("dreamllm", tmp_path / "one", *few)
    train_on(2, "dreamllm", tmp_path / "two", *few, "train.parallel=fsdp")
    for entry, expected in zip(metrics(tmp_path / "two"), metrics(one), strict=True):
        assert entry == pytest.approx(expected, rel=1e-4)


def test_an_autoencoder_in_shares_is_the_one_of_one_process(pictures, tmp_path):
    few = ["train.steps=3", "train.log_every=1", "train.eval_every=3", "train.ema=0.9", "train.batch_size=4"]
    few.append(f'data.sources=[{{path = "{pictures}"}}]')
    one = run_tiny("vae", tmp_path / "one", *few)
    train_on(2, "vae", tmp_path / "two", *few, "train.parallel=fsdp")
    for entry, expected in zip(metrics(tmp_path / "two"), metrics(one), strict=True):
        assert entry == pytest.approx(expected, rel=1e-4)


def test_what_cannot_be_cut_says_so(tmp_path):
    with pytest.raises(AssertionError, match=r'"fsdp" is for model[.]kind llama, vae, unet, dreamllm only'):
        train_on(2, "vqgan", tmp_path / "run", "train.parallel=fsdp")
