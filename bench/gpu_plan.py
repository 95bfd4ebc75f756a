"""The memory that train.py --plan predicts, beside what real processes take, through gloo on the CPU.

    torchrun --nproc-per-node 2 bench/gpu_plan.py --config configs/lvm.toml model.size=lvm_100m model.max_seq_len=512 \\
        train.batch_size=4 train.accumulate=1 train.dtype=float32 train.parallel=fsdp

Each process takes the step of the plan, without data, on real tensors. Printed are, for each: the planned peak; that of
the same count of real storages; and how far the process's own memory (RssAnon) rose above what it was before.
"""

import argparse
import dataclasses
import os
import re
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import tasks
import train
from support import parallel
from support import plan as planning


def rss_anon():
    """Bytes of this process's own memory, without mapped files."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


class Highest(threading.Thread):
    """Looks at rss_anon again and again; `peak` is the most it has seen."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = 0
        self.start()

    def run(self):
        while True:
            self.peak = max(self.peak, rss_anon())
            time.sleep(0.002)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    arguments, overrides = parser.parse_known_args()
    torch.set_num_threads(1)
    parallel.give_back_freed_memory()  # else what glibc keeps of it is counted, too
    config, explicit_keys = tasks.read_run(arguments.config, overrides)
    plan = train.plan(config, explicit_keys, int(os.environ["WORLD_SIZE"]))
    ranks = dataclasses.replace(parallel.start_ranks("cpu", config.train.parallel), planned=True)
    ranks.wait()
    before, highest = rss_anon(), Highest()
    with planning.Tally(ranks.world) as tally:
        real = train.counted_step(config, explicit_keys, ranks, tally)
    rise = highest.peak - before
    line = f"planned {plan.peak / 1e6:8.1f} MB   counted {real.peak / 1e6:8.1f} MB ({real.peak / plan.peak - 1:+.1%})"
    for rank in range(ranks.world):
        if rank == ranks.rank:
            print(f"rank {rank}: {line}   RssAnon +{rise / 1e6:.1f} MB ({rise / plan.peak - 1:+.1%})", flush=True)
        ranks.wait()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
