"""What each process of a sharded run holds, from its start to a resume: memory, polled from outside.

    python bench/shards.py                         lvm_600m on 4 processes, float32, AdamW
    python bench/shards.py --processes 2 --size lvm_300m

Trains a few steps on random rows with train.parallel = "fsdp", saves, and resumes, all of it by torchrun and train.py.
Every 50 ms it reads from /proc what memory each process has that no file backs (RssAnon: weights that are mapped to
a checkpoint are not counted, the system may drop them at any time). Limit: 16 bytes a parameter (weight, gradient,
two moments), over the number of processes, and 1.5 GB for all else: Python and torch, a block's weights and
gradients brought together, activations.
"""

import argparse
import base64
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


def memory(pid):
    """Bytes that a process has for itself; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)


def children(pid):
    """The processes that `pid` has started."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def watch(command):
    """Runs a command; → the peak of each of its child processes, in bytes."""
    process, peaks = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}), {}
    while process.poll() is None:
        for child in children(process.pid):
            peaks[child] = max(peaks.get(child, 0), memory(child))
        time.sleep(0.05)
    if process.returncode:
        sys.exit(f"the run ended with {process.returncode}")
    return sorted(peaks.values())


def write_rows(path, count, length):
    rng = np.random.default_rng(0)
    with open(path, "w") as file:
        for _ in range(count):
            codes = rng.integers(0, 8192, length, dtype="<i4").tobytes()
            file.write(json.dumps({"tokens": base64.b64encode(codes).decode()}) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="lvm_600m", help="of model.py's SIZES")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens in a row; each process trains on one")
    parser.add_argument("--folder", default="", help="where the run may lie (it needs 16 bytes a parameter twice)")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from model import SIZES  # no torch job in this process: it only reads a table

    with tempfile.TemporaryDirectory(dir=arguments.folder or None) as folder:
        rows = Path(folder) / "rows.jsonl"
        write_rows(rows, 64, arguments.length)
        overrides = [
            f"model.size={arguments.size}",
            f"model.max_seq_len={arguments.length}",
            f"run.dir={folder}/run",
            "data.tokenizer=",
            f'data.rows=["{rows}"]',
            "data.held_out=[]",
            f"train.batch_size={arguments.processes}",
            "train.accumulate=1",
            "train.dtype=float32",
            "train.compile=false",
            "train.activation_checkpointing=true",
            "train.parallel=fsdp",
            "train.eval_every=0",
            "train.sample_every=0",
            "train.save_every=2",
            "train.log_every=1",
            "train.keep=1",
            "optim.decay_steps=4",
        ]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launch += ["--nproc-per-node", str(arguments.processes)]
        launch += ["train.py", "--config", "configs/lvm.toml", "--device", "cpu"]
        for title, steps in (("start, 2 steps, a checkpoint", 2), ("resume, 1 step, a checkpoint", 3)):
            peaks = watch([*launch, *overrides, f"train.steps={steps}"])
            print(f"{title}: {', '.join(f'{peak / 1e9:.3f}' for peak in peaks)} GB")
        count = parameters(SIZES[arguments.size])
    limit = 16 * count / arguments.processes + 1.5e9
    print(f"{count:,} parameters; 16 bytes each / {arguments.processes} + 1.5 GB: {limit / 1e9:.3f} GB")


def parameters(size):
    """How many a LLaMA of this size has."""
    import torch

    from model import LLaMA, LLaMAConfig

    with torch.device("meta"):
        return sum(p.numel() for p in LLaMA(LLaMAConfig(**size)).parameters())


if __name__ == "__main__":
    main()
