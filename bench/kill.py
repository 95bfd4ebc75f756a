"""Kills a run again and again, at random instants, and checks that it ends as though nothing had happened.

    python bench/kill.py --kills 100                         one process
    python bench/kill.py --kills 20 --parallel ddp           two, of which one is killed each time; or fsdp

A tiny LLaMA is trained once without a break, then again under SIGKILL: at a random instant after its start, or, a third
of the time, while it writes a checkpoint. After every kill the same command goes on. In the end, every tensor of the
last checkpoint and every line of metrics.jsonl but for its speeds must be the same. A line a kill; exit code 1 if
anything differs. A kill takes the seconds of a start. Unix only.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support import checkpoint
from support.token_rows import encode_row

ROOT = Path(__file__).resolve().parent.parent

CONFIG = """
[model]
kind = "llama"
vocab_size = 64
dim = 32
n_layers = 2
n_heads = 4
hidden_dim = 64
max_seq_len = 32
[data]
rows = ["{rows}"]
held_out = ["{rows}"]
[optim]
lr = 1e-3
[train]
steps = {steps}
batch_size = 4
dtype = "float32"
compile = false
ema = 0.9
save_every = {save_every}
keep = 2
eval_every = 10
eval_batches = 1
sample_every = 0
log_every = 5
parallel = "{parallel}"
"""
SPEEDS = ("_per_second", "_seconds", "_gb", "mfu")  # endings of what no two runs share


def write_config(folder, steps, save_every, parallel):
    """A configuration and its rows in `folder` → the configuration's file."""
    codes = np.random.default_rng(0).integers(0, 64, (64, 32))
    (folder / "rows.jsonl").write_text("".join(map(encode_row, codes)))
    text = CONFIG.format(rows=folder / "rows.jsonl", steps=steps, save_every=save_every, parallel=parallel)
    (folder / "run.toml").write_text(text)
    return folder / "run.toml"


def start(config, run, processes):
    """The training as a subprocess, in a session of its own."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [ROOT / "train.py", "--config", config, "--device", "cpu", f"run.dir={run}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(list(map(str, command)), env=environment, start_new_session=True, **pipes)


def ranks_of(process, processes):
    """The pids of the ranks: torchrun's children, or the process itself."""
    if processes == 1:
        return [process.pid]
    found = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "train.py"], capture_output=True, text=True)
    return list(map(int, found.stdout.split()))


def unfinished(run):
    """The checkpoints that are being written, or were: their folders have temporary names."""
    return set(run.glob(".*.part.step_*"))


def kill_once(config, run, processes, chance, aims_at_save, longest):
    """Starts the run and kills a rank → what was done, in words; "" if the run came to its end before."""
    left_over = unfinished(run)
    process, before = start(config, run, processes), time.monotonic()
    instant, pids, what = chance.uniform(0, longest), [], ""
    while process.poll() is None:
        pids = pids or ranks_of(process, processes)
        passed = time.monotonic() - before
        if pids and (unfinished(run) - left_over if aims_at_save else passed > instant):
            time.sleep(chance.uniform(0, 0.01) if aims_at_save else 0)
            rank = chance.randrange(len(pids))
            os.kill(pids[rank], signal.SIGKILL)
            what = f"rank {rank}, {passed:.2f} s after the start{', while saving' * aims_at_save}"
            break
        time.sleep(0.0005)
    output, _ = process.communicate(timeout=120)  # within a minute, torchrun ends the others
    if process.returncode == 0:
        return ""
    if not what:
        sys.exit(f"FAILED: {run} does not end well:\n{output}")
    return what


def finish(config, run, processes):
    """Runs to the end; an exit with the output if it fails."""
    process = start(config, run, processes)
    output, _ = process.communicate(timeout=600)
    if process.returncode:
        sys.exit(f"FAILED: {run} does not end well:\n{output}")


def lines(run):
    """metrics.jsonl without speeds."""
    entries = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: v for key, v in entry.items() if not key.endswith(SPEEDS)} for entry in entries]


def differences(run, unbroken):
    """What of the last checkpoint and of the log is not as in the other run: a list of words."""
    found = [] if lines(run) == lines(unbroken) else ["metrics.jsonl"]
    a, b = (checkpoint.latest_step_folder(folder) for folder in (run, unbroken))
    files = sorted(file.relative_to(b) for file in b.rglob("*.safetensors"))
    if a.name != b.name or files != sorted(file.relative_to(a) for file in a.rglob("*.safetensors")):
        return [*found, f"{a.name} has other files than {b.name}"]
    for file in files:
        ours, theirs = load_file(a / file), load_file(b / file)
        same = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
        found += [] if same else [str(file)]
    return found


def test(folder, kills, parallel="", seed=0, steps=60, save_every=2):
    """Kills a run `kills` times → what is different at the end, a list. parallel: "ddp", "fsdp", or "": one process."""
    processes, chance = (2 if parallel else 1), random.Random(seed)
    config = write_config(folder, steps, save_every, parallel or "ddp")
    unbroken, run = folder / "unbroken", folder / "run"
    before = time.monotonic()
    finish(config, unbroken, processes)
    longest = time.monotonic() - before
    print(f"unbroken: {steps} steps, saved every {save_every}, in {longest:.1f} s")
    done, found, what = 0, [], ""
    while done < kills or what:  # after the last kill it comes to its end
        if done < kills:
            what = kill_once(config, run, processes, chance, done % 3 == 2, longest)
        else:
            what = finish(config, run, processes)
        step = checkpoint.latest_step_folder(run)
        if what:
            done += 1
            print(f"kill {done}: {what}; saved: {step.name if step else 'nothing'}", flush=True)
        else:  # it came to its end: compare, and begin again
            different = differences(run, unbroken)
            print(f"the end: {', '.join(different) or 'the same bits'}", flush=True)
            found += different
            shutil.rmtree(run)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--parallel", choices=["", "ddp", "fsdp"], default="", help="two processes; default: one")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = test(Path(folder), arguments.kills, arguments.parallel, arguments.seed)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
