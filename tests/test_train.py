"""What train.py promises: the same bits however often a run is broken off, the same curve on however many processes.

Each test really trains, with the tiny configurations; conftest.py trains those that several tests look at.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import processes
import pytest
import torch
from conftest import ROOT, run_tiny
from safetensors.torch import load_file
from torch import nn

import tasks
import train
import vqgan
from clip import CLIP, text_encoders
from diffusion import LatentDiffusion
from model import LLaMA
from support import checkpoint, machine, settings
from support.settings import OptimSettings, UserError
from vqgan import VQGAN

TOKENIZER = ["train.batch_size=4", "train.accumulate=2", "train.keep=0"]  # as conftest's tokenizer_run
QUIET = ["train.eval_every=0", "train.sample_every=0"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def bits(folder):
    """Every tensor of a checkpoint, by file and name: weights, averages, optimizers, discriminator, the rest."""
    files = sorted(Path(folder).rglob("*.safetensors"))
    assert files, folder
    return {f"{f.relative_to(folder)}:{name}": t for f in files for name, t in load_file(f).items()}


def assert_same_bits(a, b):
    a, b = bits(a), bits(b)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} tensors differ: {different[:5]}"


def metrics(run):
    """metrics.jsonl without what is measured of the machine, which no two runs share."""
    measured = ("_per_second", "_seconds", "memory_gb", "mfu")
    entries = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if not k.endswith(measured)} for entry in entries]


def refused(call, *arguments):
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def copy_up_to(run, step, to):
    """The run as it was after `step`, had it been broken off just before the next checkpoint."""
    shutil.copytree(run, to, symlinks=True)
    for folder in checkpoint.step_folders(to):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    return to


# ---- the learning rate -----------------------------------------------------------------------


def test_the_learning_rate_rises_and_falls():
    """Linear to lr over the warm-up, half a cosine down to min_lr at decay_steps, and flat from there."""
    o = OptimSettings(lr=1.0, min_lr=0.2, warmup_steps=4, decay_steps=12)
    found = [settings.learning_rate(o, step, 20) for step in (0, 1, 3, 4, 6, 8, 12, 19)]
    expected = [0.25, 0.5, 1.0, 1.0, 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.6, 0.2, 0.2]
    assert found == pytest.approx(expected)


def test_the_learning_rate_decays_over_the_whole_run_by_default():
    o = OptimSettings(lr=1.0, warmup_steps=0)
    assert [settings.learning_rate(o, step, 10) for step in (0, 5, 10)] == pytest.approx([1.0, 0.5, 0.0])


# ---- what a run leaves behind ----------------------------------------------------------------


def test_a_run_leaves_checkpoints_samples_and_one_line_a_step(tokenizer_run, lvm_run):
    for run, weights in ((tokenizer_run, VQGAN), (lvm_run, LLaMA)):
        assert [int(p.name[5:]) for p in checkpoint.step_folders(run)] == [4, 8, 12]
        assert os.readlink(run / "latest") == "step_00000012"
        assert sorted(p.name for p in (run / "samples").iterdir()) == ["step_00000006.png", "step_00000012.png"]
        assert [entry["step"] for entry in metrics(run)] == list(range(1, 13))
        assert not list(run.rglob("*.part"))
        step = run / "step_00000012"
        state = json.loads((step / "state.json").read_text())
        assert (state["step"], state["streams"], state["threads"]) == (12, "keyed", 1)
        files = {str(file.relative_to(step)) for file in step.rglob("*") if file.is_file()}
        assert state["files"].keys() == files - {"state.json"}
        for folder in (step, step / "ema"):
            assert (folder / "config.json").exists() and weights.from_pretrained(folder)


def test_the_written_configuration_is_the_run(tokenizer_run, lvm_run):
    """config.toml holds every default that was used; read again, it means the same."""
    for run in (tokenizer_run, lvm_run):
        s, _ = tasks.read_run(run / "config.toml")
        assert s.run.dir == str(run) and s.train.accumulate == 2 and s.optim.beta1 == OptimSettings().beta1


def test_the_loss_falls(tokenizer_run, lvm_run):
    for run in (tokenizer_run, lvm_run):
        entries = metrics(run)
        assert entries[-1]["loss"] < 0.99 * entries[0]["loss"]


def test_each_part_of_the_gan_starts_when_it_is_told(tokenizer_run):
    """disc_start 4: the discriminator learns from step 5 on; disc_warmup 4: the generator listens from step 9 on."""
    entries = metrics(tokenizer_run)
    assert [entry["step"] for entry in entries if "discriminator_loss" in entry] == list(range(5, 13))
    assert [entry["step"] for entry in entries if "g" in entry] == list(range(9, 13))
    before, after = (load_file(tokenizer_run / step / "training/discriminator.safetensors")
                     for step in ("step_00000004", "step_00000008"))  # fmt: skip
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_averaged_weights_are_the_average(lvm_run, row_overrides, tmp_path):
    """decay = min(ema, (1 + step) / (10 + step)): 1/10 after the first step, 2/11 after the second."""
    start = checkpoint.latest_step_folder(lvm_run)
    overrides = [f"model.init={start}", "train.steps=2", "train.save_every=1", "train.ema=0.9", "train.keep=0"]
    run = run_tiny("llama", tmp_path / "run", *overrides, *QUIET, *row_overrides)
    first, one, two = (load_file(f / "model.safetensors") for f in (start, *checkpoint.step_folders(run)))
    saved = load_file(run / "step_00000002" / "ema" / "model.safetensors")
    for name in first:
        average = 2 / 11 * (0.1 * first[name] + 0.9 * one[name]) + 9 / 11 * two[name]
        torch.testing.assert_close(saved[name], average, rtol=1e-6, atol=1e-7)


# ---- resume: N steps = k + resume + (N - k) --------------------------------------------------


def test_a_vqgan_run_in_two_parts_ends_in_the_same_bits(tokenizer_run, tmp_path):
    """5 is before a redraw of dead codes and after the discriminator's start: nothing may be forgotten."""
    run = tmp_path / "run"
    run_tiny("vqgan", run, *TOKENIZER, "train.steps=5", "optim.decay_steps=12")
    assert [p.name for p in checkpoint.step_folders(run)] == ["step_00000004", "step_00000005"]
    run_tiny("vqgan", run, *TOKENIZER, "optim.decay_steps=12")
    assert_same_bits(run / "step_00000012", tokenizer_run / "step_00000012")


def test_a_llama_run_in_two_parts_ends_in_the_same_bits(lvm_run, row_overrides, tmp_path):
    overrides = ["optim.decay_steps=12", "train.ema=0.9", *row_overrides]
    run_tiny("llama", tmp_path / "run", "train.steps=5", *overrides)
    run_tiny("llama", tmp_path / "run", *overrides)
    assert_same_bits(tmp_path / "run" / "step_00000012", lvm_run / "step_00000012")


def test_a_clip_run_in_two_parts_ends_in_the_same_bits_and_opens_as_a_clip(tmp_path):
    whole = run_tiny("clip", tmp_path / "whole", "train.ema=0.9")
    run_tiny("clip", tmp_path / "run", "train.steps=10", "optim.decay_steps=20", "train.ema=0.9", *QUIET)
    run_tiny("clip", tmp_path / "run", "optim.decay_steps=20", "train.ema=0.9", *QUIET)
    assert_same_bits(tmp_path / "run" / "step_00000020", whole / "step_00000020")
    losses = [entry["loss"] for entry in metrics(whole)]
    assert losses[-1] < losses[0] and metrics(whole)[-1]["held_out_loss"] < math.log(16)  # better than guessing
    clip = CLIP.from_pretrained(whole)
    assert clip.encode_text(clip.tokenize(["grinning face"])).shape == (1, 32)


def test_a_vae_and_a_unet_run_in_two_parts_end_in_the_same_bits_and_draw(captioned, tmp_path):
    """The U-Net's steps are whole pipelines; its latents are computed once and found again."""
    clip = run_tiny("clip", tmp_path / "clip", "train.steps=2", *QUIET)
    parts = [f"data.clip={clip}", f"data.vae={tmp_path / 'vae_whole'}"]
    for kind in ("vae", "unet"):
        # with seed 0, the pictures of the last step are harder than those of the first ones
        overrides = ["train.seed=1", *captioned] + (parts if kind == "unet" else [])
        whole = run_tiny(kind, tmp_path / f"{kind}_whole", *overrides)
        twice = tmp_path / f"{kind}_twice"
        run_tiny(kind, twice, "train.steps=7", "optim.decay_steps=12", *overrides, *QUIET)
        run_tiny(kind, twice, "optim.decay_steps=12", *overrides, *QUIET)
        assert_same_bits(twice / "step_00000012", whole / "step_00000012")
        losses = [entry["loss"] for entry in metrics(whole)]
        assert losses[-1] < losses[0] and (whole / "samples" / "step_00000012.png").exists()
    assert metrics(tmp_path / "vae_whole")[-1]["held_out_psnr"] > 8
    model = LatentDiffusion.from_pretrained(whole, text_encoders(whole))
    shards = map(checkpoint.read_tensors, whole.glob("latents_train_*/*.safetensors"))
    latents = torch.cat([shard["latents"][:, 0] for shard in shards])
    assert abs(latents.std() * model.vae.config.scaling_factor - 1) < 1e-3  # what the schedule is made for
    again = [model.generate(["pizza"], steps=3, size=16, seed=1) for _ in range(2)]
    assert again[0].shape == (1, 3, 16, 16) and torch.equal(*again)


def test_a_unet_whose_text_encoder_has_another_width_is_one_line(tmp_path):
    clip, vae = (run_tiny(kind, tmp_path / kind, "train.steps=1", *QUIET) for kind in ("clip", "vae"))
    parts = [f"data.clip={clip}", f"data.vae={vae}"]
    message = refused(run_tiny, "unet", tmp_path / "unet", *parts, "model.cross_attention_dim=16")
    assert message == "model.cross_attention_dim 16 must be CLIP's width, 32"
    assert "data.vae is empty" in refused(run_tiny, "unet", tmp_path / "unet", "data.vae=")


def test_a_run_killed_at_any_moment_ends_in_the_same_bits(tokenizer_run, tmp_path):
    """kill -9, once the first checkpoint is there; started again, it also logs each step once, with the same values."""
    run = tmp_path / "run"
    config = ROOT / "configs" / "tiny_vqgan.toml"
    command = ["train.py", "--config", config, "--device", "cpu", f"run.dir={run}", *TOKENIZER]
    process = processes.start(*command)
    while not checkpoint.step_folders(run) and process.exitcode is None:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and len(checkpoint.step_folders(run)) < 3
    again = processes.run(*command)
    assert again.returncode == 0, again.stderr
    assert f"resumed from {run}/step_" in again.stdout
    assert_same_bits(run / "step_00000012", tokenizer_run / "step_00000012")
    assert metrics(run) == metrics(tokenizer_run)


def test_lines_of_steps_that_are_run_again_are_cut(tokenizer_run, tmp_path):
    """A kill leaves lines beyond the checkpoint, the last one perhaps half: afterwards each step is there once."""
    run = copy_up_to(tokenizer_run, 8, tmp_path / "run")
    log = run / "metrics.jsonl"
    log.write_text(log.read_text()[:-40])
    run_tiny("vqgan", run, *TOKENIZER)
    assert metrics(run) == metrics(tokenizer_run)


@pytest.fixture
def no_held_out(captioned, tokenizer_run, row_overrides, tmp_path):
    """{kind: overrides}: the training data of each kind of run, of which none falls into the held-out split."""
    source = [*captioned, "data.held_out_fraction=0"]
    clip, vae = (run_tiny(kind, tmp_path / kind, "train.steps=1", *QUIET) for kind in ("clip", "vae"))
    return {
        "vqgan": source,
        "vae": source,
        "clip": source,
        "unet": [*source, f"data.vae={vae}", f"data.clip={clip}"],
        "llama": [*row_overrides, "data.held_out=[]"],
    }


def test_a_run_without_held_out_data_says_so_at_the_start_and_goes_on(no_held_out, tmp_path, capsys):
    """Evaluated and sampled after every step, it logs the rest."""
    often = ["train.steps=2", "train.log_every=1", "train.eval_every=1", "train.sample_every=1"]
    for kind, overrides in no_held_out.items():
        capsys.readouterr()
        run = run_tiny(kind, tmp_path / f"{kind}_run", *overrides, *often)
        assert capsys.readouterr().err.count("no held-out metrics: ") == 1, kind
        assert [entry["step"] for entry in metrics(run)] == [1, 2] and not (run / "samples").exists()
        assert not any(name.startswith("held_out") for name in metrics(run)[-1])


def test_a_complete_run_started_again_does_nothing(lvm_run, row_overrides, tmp_path, capsys):
    run = shutil.copytree(lvm_run, tmp_path / "run", symlinks=True)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in run.rglob("*")}
    run_tiny("llama", run, "train.keep=0", "train.ema=0.9", *row_overrides)
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in run.rglob("*")} == before
    assert capsys.readouterr().out == f"{run} is complete: step 12 of 12\n"
    run_tiny("llama", run, "train.keep=0", "train.ema=0.9", "optim.lr=1", *row_overrides)
    assert capsys.readouterr().out.endswith("now says otherwise, without effect: optim.lr = 1.0 (was 0.003)\n")


def test_a_changed_setting_is_told_on_resuming(lvm_run, row_overrides, tmp_path, capsys):
    run = copy_up_to(lvm_run, 8, tmp_path / "run")
    run_tiny("llama", run, "train.steps=9", "optim.lr=1e-4", "train.ema=0.9", "train.keep=0", *QUIET, *row_overrides)
    out = capsys.readouterr().out
    assert "resuming with another setting than before: optim.lr = 0.0001 (was 0.003)" in out
    assert "train.steps = 9 (was 12)" in out and "seed" not in out and "run.dir" not in out


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_every_configuration_of_the_house_can_be_read(config):
    s, given = tasks.read_run(config)
    assert s.run.dir.startswith("out/") and "kind" in given


# ---- CLIP's settings -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.text_tokenizer=", 'set data.text_tokenizer to "bytes"'),
        ("data.side=64", "data.side 64 must be model.vision.image_size 32"),
        ("model.text.vocab_size=100", "the tokenizer has 514 tokens, model.text.vocab_size is only 100"),
        ("model.text.heads=3", "heads 3 does not divide width 32"),
        ("train.activation_checkpointing=true", "is for model.kind llama, unet, dreamllm only"),
    ],
)
def test_a_clip_that_cannot_be_trained_is_one_line(override, says, tmp_path):
    assert says in refused(run_tiny, "clip", tmp_path / "run", override)


# ---- start: init -----------------------------------------------------------------------------


def test_init_starts_from_exactly_those_weights(tokenizer_run, tmp_path):
    """With lr 0 a step changes nothing: what is saved is what was loaded, the other run's average."""
    still = ["optim.lr=0", "train.steps=1", "loss.redraw_every=0", "train.ema=0", *QUIET]
    run = run_tiny("vqgan", tmp_path / "run", f"model.init={tokenizer_run}", *still)
    saved = load_file(run / "step_00000001" / "model.safetensors")
    averaged = load_file(tokenizer_run / "step_00000012" / "ema" / "model.safetensors")
    assert all(torch.equal(saved[name], averaged[name]) for name in averaged)


def test_a_resumed_run_no_longer_looks_at_init(lvm_run, row_overrides, tmp_path):
    run = copy_up_to(lvm_run, 8, tmp_path / "run")
    run_tiny("llama", run, "model.init=no/such/folder", "train.ema=0.9", "train.keep=0", *row_overrides)
    assert_same_bits(run / "step_00000012", lvm_run / "step_00000012")


@pytest.mark.parametrize("override", ["model.dim=64", "model.size=lvm_100m"])
def test_init_that_contradicts_a_written_key_is_one_line(override, lvm_run, row_overrides, tmp_path):
    """Whether the number was written down itself or by the name of a size."""
    config = tmp_path / "config.toml"
    config.write_text('[model]\nkind = "llama"\n[train]\nsteps = 1\nbatch_size = 1\ncompile = false\n')
    overrides = [f"run.dir={tmp_path / 'run'}", f"model.init={lvm_run}", override, *row_overrides]
    message = refused(lambda: train.train(*tasks.read_run(config, overrides), device="cpu"))
    assert message.startswith("model.") and str(lvm_run) in message
    assert not (tmp_path / "run").exists()


def test_init_gives_the_shape_where_nothing_is_written(lvm_run, row_overrides, tmp_path):
    """A folder's own config.json is enough: no need to repeat it."""
    config = tmp_path / "config.toml"
    config.write_text('[model]\nkind = "llama"\n[train]\nsteps = 1\nbatch_size = 1\ncompile = false\n')
    overrides = [f"run.dir={tmp_path / 'run'}", f"model.init={lvm_run}", "data.side=32", *QUIET, *row_overrides]
    run = train.train(*tasks.read_run(config, overrides), device="cpu")
    assert LLaMA.from_pretrained(run).config == LLaMA.from_pretrained(lvm_run).config
    assert tasks.read_run(run / "config.toml")[0].model.dim == 32


# ---- going wrong -----------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_the_run(lvm_run, row_overrides, tmp_path):
    """An absurd learning rate: step 9 still has the good weights, step 10 has no gradient. Step 8 stays the newest."""
    run = copy_up_to(lvm_run, 8, tmp_path / "run")
    absurd = ["optim.lr=1e30", "train.max_skipped=1", "train.save_every=8", "train.ema=0.9", "train.keep=0", *QUIET]
    message = refused(run_tiny, "llama", run, *absurd, *row_overrides)
    assert message.startswith("step 10: ") and "nan" in message and str(run / "step_00000008") in message
    assert [p.name for p in checkpoint.step_folders(run)] == ["step_00000004", "step_00000008"]
    assert_same_bits(run / "step_00000008", lvm_run / "step_00000008")
    assert [entry["step"] for entry in metrics(run)] == list(range(1, 11)) and "skipped" in metrics(run)[-1]


def test_a_discriminator_that_is_no_number_stops_the_run(tmp_path, monkeypatch):
    """Even before the generator listens to it: a checkpoint with NaN in it could not be opened again."""

    class Broken(vqgan.Discriminator):
        def __init__(self):
            super().__init__()
            nn.init.constant_(self[0].weight, 1e38)

    monkeypatch.setattr(tasks, "Discriminator", Broken)
    run = tmp_path / "run"
    options = ["loss.disc_start=0", "train.steps=2", "train.save_every=1", "train.max_skipped=1"]
    message = refused(run_tiny, "vqgan", run, *options, *QUIET)
    assert message.startswith("step 1: ") and checkpoint.step_folders(run) == []


def test_sentences_too_short_to_sample_do_not_end_a_run_half_way(row_overrides, tmp_path):
    """One picture fills the context: none is left to prompt with. That is said before the first step or not at all."""
    run = tmp_path / "run"
    try:
        run_tiny("llama", run, *row_overrides, "data.pictures=1", "train.steps=2", "train.sample_every=1")
    except UserError:
        assert not run.exists()
    else:
        assert checkpoint.latest_step_folder(run).name == "step_00000002"


@pytest.mark.parametrize("method", ["sample", "evaluate"])
def test_an_error_in_a_sample_or_an_evaluation_loses_no_steps(method, row_overrides, tmp_path, monkeypatch):
    def broken(*arguments):
        raise UserError("the disk is full")

    monkeypatch.setattr(tasks.LLaMATask, method, broken)
    often = ["train.save_every=100", "train.eval_every=3", "train.sample_every=3", "train.ema=0.9"]
    with pytest.raises(UserError, match="the disk is full"):
        run_tiny("llama", tmp_path / "run", *often, *row_overrides)
    monkeypatch.undo()
    assert [p.name for p in checkpoint.step_folders(tmp_path / "run")] == ["step_00000003"]
    run_tiny("llama", tmp_path / "run", *often, *row_overrides)
    assert checkpoint.latest_step_folder(tmp_path / "run").name == "step_00000012"


def test_weights_that_are_no_numbers_are_not_saved_for_a_failed_sample(row_overrides, tmp_path, monkeypatch):
    def broken(task):
        task.model.norm.weight[0] = math.nan
        raise RuntimeError("probabilities are nan")

    monkeypatch.setattr(tasks.LLaMATask, "sample", broken)
    options = ["train.save_every=100", "train.eval_every=0", "train.sample_every=3"]
    message = refused(run_tiny, "llama", tmp_path / "run", *options, *row_overrides)
    assert message == "step 3: weights are not finite any more; not saved. Try a lower optim.lr"
    assert checkpoint.step_folders(tmp_path / "run") == []


def forget_checksums(step):
    """Makes a step's state.json one from before there were checksums: what is damaged, only what it holds can tell."""
    state = json.loads((step / "state.json").read_text())
    (step / "state.json").write_text(json.dumps({key: state[key] for key in ("step", "streams", "threads")}))


DAMAGE = {  # name of a tensor of the optimizer → what is done to it, and what is said
    "shape": ("norm.weight.exp_avg", lambda t: t[:-1], "norm.weight.exp_avg is float32 (31,), expected float32 (32,)"),
    "dtype": ("norm.weight.exp_avg_sq", lambda t: t.half(), "norm.weight.exp_avg_sq is float16 (32,), expected"),
    "NaN": ("norm.weight.exp_avg", lambda t: t * math.nan, "norm.weight.exp_avg holds NaN or infinity"),
    "negative": ("norm.weight.exp_avg_sq", lambda t: t - 1, "norm.weight.exp_avg_sq holds negative numbers"),
    "step": ("norm.weight.step", lambda t: t[None], "norm.weight.step is float32 (1,), expected float32 ()"),
    "moment left out": ("norm.weight.exp_avg", lambda t: None, "norm.weight.exp_avg is missing"),
    "weight left out": ("norm.weight.", lambda t: None, "norm.weight.step is missing"),
    "one too many": ("noise.exp_avg", lambda t: torch.zeros(3), "noise.exp_avg belongs to nothing in this run"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_optimizer_file_is_one_line(damage, lvm_run, row_overrides, tmp_path):
    """AdamW would read and write beyond a moment that is too short."""
    name, change, says = damage
    run = copy_up_to(lvm_run, 8, tmp_path / "run")
    file = run / "step_00000008" / "training" / "optimizer.model.safetensors"
    tensors = load_file(file)
    for key in [key for key in tensors if key.startswith(name)] or [name]:
        changed = change(tensors.pop(key, None))
        tensors |= {} if changed is None else {key: changed}
    checkpoint.write_tensors(file, tensors)
    forget_checksums(run / "step_00000008")
    message = refused(run_tiny, "llama", run, "train.ema=0.9", "train.keep=0", *row_overrides)
    assert message.startswith(f"{file}: {says}") and message.endswith(f"move {run / 'step_00000008'} away")


def test_other_damaged_files_of_a_checkpoint_are_one_line(tokenizer_run, tmp_path):
    run = copy_up_to(tokenizer_run, 8, tmp_path / "run")
    forget_checksums(run / "step_00000008")
    training = run / "step_00000008" / "training"
    for name, damaged in (("discriminator", {}), ("state", {"counts": torch.zeros(3)})):
        whole = load_file(training / f"{name}.safetensors")
        nan = {key: tensor * math.nan if tensor.is_floating_point() else tensor for key, tensor in whole.items()}
        for tensors in (damaged, nan):
            checkpoint.write_tensors(training / f"{name}.safetensors", tensors)
            assert str(training / f"{name}.safetensors") in refused(run_tiny, "vqgan", run, *TOKENIZER)
        checkpoint.write_tensors(training / f"{name}.safetensors", whole)


def test_a_folder_of_another_kind_of_run_is_left_alone(tokenizer_run, row_overrides):
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in tokenizer_run.rglob("*")}
    message = refused(run_tiny, "llama", tokenizer_run, *row_overrides)
    assert message == f'{tokenizer_run} holds a run of model.kind "vqgan", not "llama": name another folder as run.dir'
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in tokenizer_run.rglob("*")} == before


def test_a_run_has_a_folder(row_overrides):
    assert refused(run_tiny, "llama", "", *row_overrides).endswith("[run] dir is empty: name the run's folder")


@pytest.mark.parametrize("folder", [".", "x" * 300, "README.md", "README.md/run"])
def test_a_run_needs_a_folder_of_its_own(folder, row_overrides, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert refused(run_tiny, "llama", folder, *row_overrides).startswith("run.dir ")


def test_a_run_that_is_resumed_with_other_threads_says_so(lvm_run, row_overrides, tmp_path, capsys):
    """A sum's rounding depends on how it is split. A checkpoint from before this was recorded says nothing."""
    for state, said in (({"step": 8, "threads": 7}, True), ({"step": 8}, False)):
        run = copy_up_to(lvm_run, 8, tmp_path / str(said))
        (run / "step_00000008" / "state.json").write_text(json.dumps(state))
        run_tiny("llama", run, "train.steps=9", "train.ema=0.9", *QUIET, *row_overrides)
        assert ("resuming with 1 threads instead of 7" in capsys.readouterr().out) == said


def test_a_run_with_an_older_order_of_the_data_says_that_its_batches_are_new(lvm_run, row_overrides, tmp_path, capsys):
    for state, said in (({"step": 8, "streams": "named"}, 1), ({"step": 8, "streams": "keyed"}, 0)):
        run = copy_up_to(lvm_run, 8, tmp_path / str(said))
        (run / "step_00000008" / "state.json").write_text(json.dumps(state))
        run_tiny("llama", run, "train.steps=9", "train.ema=0.9", *QUIET, *row_overrides)
        assert capsys.readouterr().out.count("was made with an older order of the data") == said


def test_a_folder_with_somebody_s_metrics_is_no_run_s(row_overrides, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 7, "mine": 1}\n')
    assert "name another folder as run.dir" in refused(run_tiny, "llama", tmp_path, *row_overrides)
    assert "mine" in (tmp_path / "metrics.jsonl").read_text()


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    """The loss of a step is that of the weights before it: here nothing but the save could see them."""
    wild = ["train.steps=1", "train.eval_every=0", "optim.lr=1e38", "optim.warmup_steps=0", "optim.weight_decay=10"]
    message = refused(run_tiny, "clip", tmp_path / "run", *wild)
    assert "weights are not finite any more" in message and not list((tmp_path / "run").glob("step_*"))


def test_a_model_too_large_for_the_memory_is_one_line(row_overrides, tmp_path):
    huge = ["model.vocab_size=16777216", "model.dim=1048576"]
    message = refused(run_tiny, "llama", tmp_path / "run", *row_overrides, *huge)
    assert message.startswith("[model] describes a LLaMA of 41,7") and message.endswith("too large for the memory")


def test_init_of_another_kind_is_one_line(tokenizer_run, row_overrides, tmp_path):
    message = refused(run_tiny, "llama", tmp_path / "run", *row_overrides, f"model.init={tokenizer_run}")
    assert message.endswith("holds a VQGAN, but a LLaMA is wanted")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.vocab_size=63", "has 64 codes, but model.vocab_size is 63"),
        ("data.side=16", "was made at side 32, data.side is 16"),
        ("data.side=33", "data.side 33 is no multiple of data.tokenizer's"),
        ("data.text_tokenizer=bytes", "but model.vocab_size is 64"),
        ("data.tokenizer=no/such/folder", "no/such/folder: no such file or folder"),
    ],
)
def test_a_llama_that_does_not_fit_its_tokenizer_is_told_at_the_start(override, says, row_overrides, tmp_path):
    assert says in refused(run_tiny, "llama", tmp_path / "run", *row_overrides, override)
    assert not (tmp_path / "run").exists()


def test_codes_that_the_tokenizer_does_not_have_are_told_at_the_start(row_overrides, tmp_path):
    """LVM's own rows say nothing of the tokenizer that they were made with."""
    small = run_tiny("vqgan", tmp_path / "small", "model.num_embeddings=4", "train.steps=1", *QUIET)
    for split in ("train", "held_out"):
        shutil.copy(Path(row_overrides[0].partition("=")[2]).parent / f"{split}.jsonl", tmp_path)
    rows = [f'data.rows=["{tmp_path}/train.jsonl"]', f'data.held_out=["{tmp_path}/held_out.jsonl"]']
    message = refused(run_tiny, "llama", tmp_path / "run", *rows, f"data.tokenizer={small}")
    assert message.startswith("data.held_out has the code ") and message.endswith("but data.tokenizer only 4 codes")


def test_rows_are_asked_for(tmp_path):
    assert refused(run_tiny, "llama", tmp_path / "run", "data.rows=[]").startswith("data.rows is empty")


# ---- the same sum, added differently ---------------------------------------------------------


def first_update(run, *overrides):
    """The first step's metrics and its gradients, as AdamW's first moment has them (the weights only keep signs)."""
    run_tiny("llama", run, "train.steps=1", *QUIET, *overrides)
    tensors = load_file(run / "step_00000001" / "training" / "optimizer.model.safetensors")
    return metrics(run)[0], {name: t for name, t in tensors.items() if name.endswith("exp_avg")}


def test_two_microbatches_of_4_are_one_batch_of_8(row_overrides, tmp_path):
    """The rows are the same ones: the stream of tokens is cut into microsteps in order."""
    (a, gradient), (b, other) = (
        first_update(tmp_path / str(n), f"train.batch_size={n}", f"train.accumulate={8 // n}", *row_overrides)
        for n in (4, 8)
    )
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-6) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    for name in gradient:
        torch.testing.assert_close(gradient[name], other[name], rtol=1e-4, atol=1e-7)


def test_recomputing_activations_changes_no_bit(row_overrides, tmp_path):
    a, b = (
        first_update(tmp_path / flag, f"train.activation_checkpointing={flag}", *row_overrides)
        for flag in ("false", "true")
    )
    assert a[0] == b[0] and all(torch.equal(a[1][name], b[1][name]) for name in a[1])


def test_auto_computes_in_bfloat16_only_where_the_processor_has_it(row_overrides, tmp_path):
    """Without its instructions, bfloat16 takes 50 times as long; the run's folder says which one was used."""
    device = torch.device("cpu")
    dtype = "bfloat16" if machine.has_bfloat16(device) else "float32"
    a, b = (first_update(tmp_path / name, f'train.dtype="{name}"', *row_overrides) for name in ("auto", dtype))
    assert a[0] == b[0] and all(torch.equal(a[1][name], b[1][name]) for name in a[1])
    assert tomllib.loads((tmp_path / "auto" / "config.toml").read_text())["train"]["dtype"] == dtype
    if Path("/proc/cpuinfo").exists():
        flags = Path("/proc/cpuinfo").read_text().split()
        assert machine.has_bfloat16(device) == ("avx512_bf16" in flags or "amx_bf16" in flags)


def test_bfloat16_changes_rounding_only_and_weights_stay_float32(row_overrides, tmp_path):
    (a, _), (b, _) = (
        first_update(tmp_path / dtype, f'train.dtype="{dtype}"', *row_overrides) for dtype in ("float32", "bfloat16")
    )
    assert a["loss"] != b["loss"] == pytest.approx(a["loss"], rel=1e-2)
    assert LLaMA.from_pretrained(tmp_path / "bfloat16").norm.weight.dtype == torch.float32


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.skipif("SLOW" not in os.environ, reason="minutes of compiling; SLOW=1 runs it")
def test_a_compiled_run_has_the_same_loss(row_overrides, tmp_path, capsys):
    small = ["train.steps=2", "model.n_layers=1", *QUIET]
    runs = [
        run_tiny("llama", tmp_path / flag, f"train.compile={flag}", *small, *row_overrides)
        for flag in ("false", "true")
    ]
    assert "going on without" not in capsys.readouterr().err
    for eager, compiled in zip(*map(metrics, runs), strict=True):
        assert compiled == pytest.approx(eager, rel=1e-4)


# ---- two processes ---------------------------------------------------------------------------

# everything at once and soon: the discriminator from step 2, heard from step 3, entropy loss, redraws, samples
SHORT = [
    *("train.steps=4", "train.save_every=1", "train.keep=0", "train.eval_every=2", "train.sample_every=2"),
    *("loss.disc_start=1", "loss.disc_warmup=1", "loss.entropy=0.1", "train.batch_size=4", "train.accumulate=2"),
    "train.seed=4",  # of 1 to 4, measured up to the third step: 6e-5, 2e-3, 7e-5, 5e-5, as near the game is to a tie
]


def train_on(count, kind, run, *overrides):
    """Trains configs/tiny_{kind}.toml into the folder `run`, on some processes."""
    config = ["--config", ROOT / "configs" / f"tiny_{kind}.toml", "--device", "cpu", f"run.dir={run}"]
    return processes.ranks(count, "train.py", *config, *overrides)


def torchrun(kind, run, *overrides):
    """The same on two, as it is typed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [ROOT / "train.py", "--config", ROOT / "configs" / f"tiny_{kind}.toml", "--device", "cpu"]
    command += [f"run.dir={run}", *overrides]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.terminate()  # where it hangs: torchrun takes its workers with it, which a kill would leave behind
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def test_a_llama_on_two_processes_has_the_curve_of_one(lvm_run, row_overrides, tmp_path):
    done = torchrun("llama", tmp_path / "run", "train.keep=0", "train.ema=0.9", *row_overrides)
    assert done.returncode == 0, done.stderr
    for entry, expected in zip(metrics(tmp_path / "run"), metrics(lvm_run), strict=True):
        assert entry == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def vqgan_on_two(tmp_path_factory):
    run = tmp_path_factory.mktemp("two") / "run"
    done = train_on(2, "vqgan", run, *SHORT)
    assert done.returncode == 0, done.stderr
    return run


def test_a_vqgan_on_two_processes_has_the_curve_of_one(vqgan_on_two, tmp_path):
    """With every part of the loss, both optimizers and a redraw: 1e-4 over the first three steps.

    Then the game amplifies rounding, as games do: where two entries are nearly equally near, it decides
    which is taken. By how much depends on the processor: the fourth step differed by 2e-4 on one with
    AVX-512, by 3e-2 on one without.
    """
    one = metrics(run_tiny("vqgan", tmp_path / "run", *SHORT))
    assert len(one) == 4
    for entry, expected in zip(metrics(vqgan_on_two)[:3], one[:3], strict=True):
        assert entry == pytest.approx(expected, rel=1e-4)
    assert "g" in one[2] and "discriminator_loss" in one[1] and "entropy" in one[0]


def test_two_processes_resume_to_the_same_bits(vqgan_on_two, tmp_path):
    """After 2 steps a redraw is pending: which codes were used since the last one, each process saw only in part."""
    run = copy_up_to(vqgan_on_two, 2, tmp_path / "run")
    done = train_on(2, "vqgan", run, *SHORT)
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stderr
    assert_same_bits(run / "step_00000004", vqgan_on_two / "step_00000004")


def test_a_batch_that_two_processes_cannot_share_is_refused(tmp_path):
    done = train_on(2, "vqgan", tmp_path / "run", "train.batch_size=3")
    assert done.returncode != 0 and "train.batch_size 3 is no multiple of the 2 processes" in done.stderr
    assert not (tmp_path / "run").exists()
