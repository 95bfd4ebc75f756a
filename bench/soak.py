"""Trains a tiny autoencoder for 20,000 steps, with evaluations, samples and saves, and watches what the process holds.

    python bench/soak.py                    minutes; --steps for another length

The memory at the end must be within 2 % of that after 1,000 steps, and so many file handles must be open: exit code 1
if not. A line every 1,000 steps. Linux only: it reads /proc.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
EVERY = ["train.eval_every=250", "train.sample_every=250", "train.save_every=250", "train.log_every=50"]


def make_pictures(folder):
    """64 pictures of noise."""
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), np.uint8)
    for number, picture in enumerate(noise):
        Image.fromarray(picture).save(folder / f"{number:02d}.png")


def held(pid):
    """→ (resident memory in MB, open file handles) of a process: the fewest of ten looks, as it opens pictures too."""
    handles = []
    for _ in range(10):
        handles.append(len(os.listdir(f"/proc/{pid}/fd")))
        time.sleep(0.01)
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, min(handles)


def soak(folder, steps):
    """Trains, and prints what is held → [(step, MB, handles), …]."""
    make_pictures(folder / "pictures")
    run, found = folder / "run", []
    command = [sys.executable, ROOT / "train.py", "--config", ROOT / "configs" / "tiny_vae.toml", "--device", "cpu"]
    command += [f"run.dir={run}", f"train.steps={steps}", "train.batch_size=2", *EVERY]
    command += [f'data.sources=[{{path = "{folder / "pictures"}"}}]', "data.held_out_fraction=0.2"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        time.sleep(0.2)
        newest = os.readlink(run / "latest") if os.path.lexists(run / "latest") else "step_0"
        step = int(newest[5:])
        if step >= 1000 * (len(found) + 1) and process.poll() is None:
            found.append((step, *held(process.pid)))
            print("step {}: {:.1f} MB, {} file handles".format(*found[-1]), flush=True)
    if process.returncode:
        sys.exit(f"FAILED: the training ended with exit code {process.returncode}")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), arguments.steps)
    (_, before, handles), (_, after, handles_after) = found[0], found[-1]
    print(f"memory {100 * (after / before - 1):+.2f} %, file handles {handles_after - handles:+d}")
    sys.exit(abs(after / before - 1) > 0.02 or handles != handles_after)


if __name__ == "__main__":
    main()
