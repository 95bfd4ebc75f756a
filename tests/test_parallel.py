"""A run over several processes is the run of one: whether each holds the whole model (DDP) or a share (FSDP).

Processes talk through gloo on the CPU; what GPUs add is NCCL and bfloat16.
"""

import json
import zipfile

import processes
import pytest
import torch
from conftest import run_tiny
from test_train import assert_same_bits, bits, metrics, train_on

from support import checkpoint, whole

TEN_STEPS = ["train.steps=10", "train.eval_every=5", "train.save_every=5", "train.keep=0", "train.ema=0.9"]
FEW_STEPS = ["train.steps=3", "train.log_every=1", "train.eval_every=3", "train.sample_every=3", "train.batch_size=4"]


def succeed(done):
    assert done.returncode == 0, done.stdout + done.stderr


def every_tensor(folder):
    """As `bits`, with those of pickles."""
    pickles = {file.name: torch.load(file, weights_only=True) for file in sorted(folder.glob("*.bin"))}
    return bits(folder) | {f"{file}:{name}": t for file, tensors in pickles.items() for name, t in tensors.items()}


def assert_near(a, b, tolerance):
    """Every tensor of two checkpoints: the norm of the difference, as a share of the tensor's own.

    But for the biases of keys: softmax cancels them, so that their gradients are rounding and nothing else.
    """
    a, b = every_tensor(a), every_tensor(b)
    assert a.keys() == b.keys()
    for name in a:
        if "k_proj.bias" in name or "to_k.bias" in name:
            continue
        assert (a[name] - b[name]).norm() <= tolerance * a[name].norm() + 1e-12, name


@pytest.fixture(scope="module")
def one(row_overrides, tmp_path_factory):
    """A tiny LVM on one process."""
    return run_tiny("llama", tmp_path_factory.mktemp("one") / "run", *TEN_STEPS, *row_overrides)


@pytest.mark.parametrize(("parallel", "count"), [("ddp", 2), ("fsdp", 4)])
def test_a_llama_ends_with_the_same_weights_on_any_number_of_processes(parallel, count, one, row_overrides, tmp_path):
    """Its first weights too: each matrix has a seed of its own, of which a process draws its share."""
    run = tmp_path / "run"
    succeed(train_on(count, "llama", run, *TEN_STEPS, f"train.parallel={parallel}", *row_overrides))
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


SAVE_WHAT_TRAIN_TPU_LOADED = """
import sys
import jax
from pathlib import Path
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
import train_tpu
resume, to, *overrides = sys.argv[1:]
s, keys = train_tpu.read_run("configs/tiny_llama.toml", [f"run.dir={to}", "mesh.fsdp=2", *overrides])
layout = train_tpu.lay_out(train_tpu.model_config(s, keys, Path(resume)), train_tpu.make_mesh(s.mesh, jax.devices()))
with jax.set_mesh(layout.mesh):
    train_tpu.save(Path(to), 5, 0, train_tpu.start(s, layout, Path(resume)), layout)
"""


STATE = ("model.safetensors", "ema/model.safetensors", "training/optimizer.model.safetensors")


def test_a_checkpoint_survives_any_change_of_processes_to_the_bit(one, row_overrides, tmp_path):
    """1 → 4 → 2 → train_tpu.py → 2: what is saved right after loading, on other shares, is what was loaded.

    In between tables of tensors are beyond the limit of one file: they are several, and an index.
    """
    ours, tpus = tmp_path / "ours.py", tmp_path / "tpus.py"
    ours.write_text(SAVE_WHAT_IS_LOADED)
    tpus.write_text(SAVE_WHAT_TRAIN_TPU_LOADED)
    folder = one / "step_00000005"
    expected = {name: checkpoint.read_tensors(folder / name) for name in STATE}
    overrides = ["train.parallel=fsdp", *TEN_STEPS, *row_overrides]
    for number, (count, file_bytes) in enumerate([(4, 5 << 30), (2, 10_000), ("tpu", 5 << 30), (2, 5 << 30)]):
        run = tmp_path / str(number)
        if count == "tpu":
            succeed(processes.run(tpus, folder, run, *overrides))
        else:
            succeed(processes.ranks(count, ours, "llama", folder, run, file_bytes, *overrides))
        folder = run / "step_00000005"
        assert whole.trouble(folder, whole.ALONE) is None
        for name, tensors in expected.items():
            found = checkpoint.read_tensors(folder / name)
            assert tensors.keys() == found.keys()
            assert all(torch.equal(tensors[key], found[key]) for key in tensors)
        if file_bytes == 10_000:
            index = json.loads((folder / "model.safetensors.index.json").read_text())
            files = set(index["weight_map"].values())
            assert len(files) > 1 and all((folder / file).stat().st_size < 40_000 for file in files)
    assert_same_bits(one / "step_00000005", folder)


EVERY_PART = 'model.trained=["llama", "projector", "dream_queries", "condition", "clip", "diffusion.unet"]'
STAGES = {
    "every part": [EVERY_PART, "model.drop=0.5", "train.accumulate=2"],
    "create": ["model.stage=create", "model.w_lm=0"],
}


@pytest.mark.parametrize(("stage", "count"), [("every part", 4), ("create", 2)])
def test_a_dreamllm_in_shares_is_the_one_of_one_process(stage, count, dream_parts, tmp_path):
    """One rank may have no picture to read or to draw: it runs these parts all the same, for the others' sake."""
    overrides = [*dream_parts, *STAGES[stage], *FEW_STEPS, "train.steps=10"]
    overrides += ["train.eval_every=10", "train.sample_every=10"]  # sampling takes longer than training
    one = run_tiny("dreamllm", tmp_path / "one", *overrides)
    shares = tmp_path / "shares"
    succeed(train_on(count, "dreamllm", shares, *overrides, "train.parallel=fsdp"))
    for entry, expected in zip(metrics(shares), metrics(one), strict=True):
        assert entry == pytest.approx(expected, rel=1e-5)
    assert_near(one / "latest", shares / "latest", 1e-5)
    for file in (shares / "latest").glob("*.bin"):
        assert zipfile.ZipFile(file).testzip() is None  # the checksums are those of what all ranks wrote


@pytest.mark.parametrize("kind", ["vae", "unet"])
def test_latent_diffusion_in_shares_is_that_of_one_process(kind, captioned, tmp_path):
    overrides = [*FEW_STEPS, "train.ema=0.9", *captioned]
    if kind == "unet":
        clip = run_tiny("clip", tmp_path / "clip", "train.steps=1", "train.eval_every=0")
        vae = run_tiny("vae", tmp_path / "vae", "train.steps=1", "train.eval_every=0", "train.sample_every=0")
        overrides += [f"data.clip={clip}", f"data.vae={vae}"]
    one = run_tiny(kind, tmp_path / "one", *overrides)
    succeed(train_on(2, kind, tmp_path / "two", *overrides, "train.parallel=fsdp"))
    for entry, expected in zip(metrics(tmp_path / "two"), metrics(one), strict=True):
        assert entry == pytest.approx(expected, rel=1e-4)
    assert_near(one / "latest", tmp_path / "two" / "latest", 1e-4)


def test_what_cannot_be_cut_says_so(tmp_path):
    done = train_on(2, "vqgan", tmp_path / "run", "train.parallel=fsdp")
    assert done.returncode and '"fsdp" is for model.kind llama, vae, unet, dreamllm only' in done.stderr
