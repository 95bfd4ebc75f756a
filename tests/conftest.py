"""What several test files share: the tiny configurations, really trained once a session, and a way to run a program.

One thread throughout: on tensors this small more only cost, and a fixed number makes bits comparable between
processes, because a sum's rounding depends on how it is split.
"""

import os

import prepare

os.environ["OMP_NUM_THREADS"] = "1"

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tasks
import train
from clip import CLIP, CLIPConfig, VisionConfig
from diffusion import AutoencoderKL, AutoencoderKLConfig, LatentDiffusion, NoiseSchedule, UNet, UNetConfig
from model import LLaMA, LLaMAConfig
from support import settings
from support.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
torch.set_num_threads(1)


def run_tiny(kind, run, *overrides):
    """Trains configs/tiny_{kind}.toml into the folder `run`, in this process."""
    config = ROOT / "configs" / f"tiny_{kind}.toml"
    return train.train(*tasks.read_run(config, [f"run.dir={run}", *overrides]), device="cpu")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of 16 small PNGs: two colours, split at a different place in each."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(16):
        picture = np.full((40, 48, 3), rng.integers(0, 256, 3), np.uint8)
        picture[:, 3 * i :] = rng.integers(0, 256, 3)
        Image.fromarray(picture).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="session")
def captioned(pictures):
    """The [data] of a run on these pictures and their names, of which some are held out. (Emoji are 4,009.)"""
    folder = shutil.copytree(pictures, pictures.parent / "captioned")
    for picture in folder.glob("*.png"):
        picture.with_suffix(".txt").write_text(f"picture {picture.stem}")
    return [f'data.sources=[{{path = "{folder}"}}]', "data.held_out_fraction=0.3"]


@pytest.fixture(scope="session")
def tokenizer_run(tmp_path_factory):
    """configs/tiny_vqgan.toml, trained without a break; its 8 rows come in two microsteps of 4."""
    run = tmp_path_factory.mktemp("runs") / "tokenizer"
    return run_tiny("vqgan", run, "train.batch_size=4", "train.accumulate=2", "train.keep=0")


@pytest.fixture(scope="session")
def row_overrides(tokenizer_run, pictures):
    """The [data] of an LVM run on rows that tokenizer_run made of the pictures."""
    folder = tokenizer_run.parent
    source = f'data.sources=[{{path = "{pictures}", kind = "colorization", passes = 8}}]'
    overrides = [f"data.tokenizer={tokenizer_run}", source, "data.held_out_fraction=0.3"]
    config = str(ROOT / "configs" / "tiny_llama.toml")
    for split in ("train", "held_out"):
        arguments = ["tokenize", "--config", config, "--out", str(folder / f"{split}.jsonl"), "--split", split]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["prepare.py", *arguments, "--device", "cpu", *overrides])
            prepare.main()
    return [*overrides, f'data.rows=["{folder}/train.jsonl"]', f'data.held_out=["{folder}/held_out.jsonl"]']


@pytest.fixture(scope="session")
def lvm_run(tokenizer_run, row_overrides):
    """configs/tiny_llama.toml, trained without a break on those rows (accumulate is 2 there)."""
    return run_tiny("llama", tokenizer_run.parent / "lvm", "train.keep=0", "train.ema=0.9", *row_overrides)


@pytest.fixture(scope="session")
def dream_parts(tmp_path_factory):
    """Random parts of a tiny DreamLLM, each in its published layout, as overrides of configs/tiny_dreamllm.toml."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    llama = LLaMA(LLaMAConfig(258, 32, 2, 4, hidden_dim=64, max_seq_len=192))
    llama.tokenizer = Tokenizer.from_pretrained("bytes")
    llama.save_pretrained(folder / "llama")
    vision = VisionConfig(width=32, layers=2, heads=2, hidden_dim=64, patch_size=8, image_size=32)
    CLIP(CLIPConfig(0, vision, None)).save_pretrained(folder / "clip")
    unet = UNet(UNetConfig(4, 4, 8, (8, 16), 1, (1, 0), 1, (2, 2), 16, norm_num_groups=4))
    with torch.no_grad():  # what starts at zero would let no gradient through to the prompt
        for parameter in unet.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    vae = AutoencoderKL(
        AutoencoderKLConfig(sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
    )
    LatentDiffusion(unet, vae, NoiseSchedule(prediction_type="v_prediction")).save_pretrained(folder / "diffusion")
    return [f"model.{name}={folder / name}" for name in ("llama", "clip", "diffusion")]


@pytest.fixture(scope="session")
def dream_run(dream_parts, tmp_path_factory):
    """configs/tiny_dreamllm.toml on those parts, trained without a break: a DreamLLM to sample from."""
    run = tmp_path_factory.mktemp("dream") / "run"
    return run_tiny("dreamllm", run, *dream_parts, "train.keep=0", "train.sample_every=0")


@pytest.fixture
def program(monkeypatch, capsys):
    """program(main, *arguments) → (exit code, stdout, stderr), as though typed in a shell, but in this process."""

    def run(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            settings.run_main(main)
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return run
