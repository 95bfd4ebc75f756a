"""Two ways to write the checkpoint of a model in shares: ours, and torch.distributed.checkpoint's for safetensors.

    torchrun --nproc-per-node 2 bench/writers.py            lvm_300m in float32
    torchrun --nproc-per-node 4 bench/writers.py lvm_600m

Prints for each: seconds until all have written (median of three, in turn), bytes that all ranks wrote, and the files.
Theirs is HuggingFaceStorageWriter with enable_consolidation, which is what leaves a folder that others open.
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import SIZES, Block, LLaMA, LLaMAConfig
from support import checkpoint, parallel


def written():
    """Bytes that this process has handed to the system so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"])


def ours(folder, tensors):
    with checkpoint.shares_only() if dist.get_rank() else open(os.devnull):
        checkpoint.write_shares(folder / "model.safetensors", tensors)


def theirs(folder, tensors):
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True, enable_consolidation=True)
    dcp.save(tensors, storage_writer=writer)


def main():
    size = sys.argv[1] if len(sys.argv) > 1 else "lvm_300m"
    ranks = parallel.start_ranks("cpu", "fsdp")
    with torch.device("meta"):
        model = LLaMA(LLaMAConfig(**SIZES[size]))
    parallel.shard(model, (Block,), ranks, "float32")
    tensors = model.state_dict()
    if ranks.is_main:
        print(f"{size}: {4 * sum(t.numel() for t in tensors.values()) / 1e9:.2f} GB on {ranks.world} processes")
    seconds, volume, files = {}, {}, {}
    for _ in range(3):
        for write in (ours, theirs):
            folder = Path(ranks.from_main(tempfile.mkdtemp()))
            ranks.wait()
            start, before = time.perf_counter(), written()
            write(folder, tensors)
            ranks.wait()
            seconds.setdefault(write.__name__, []).append(time.perf_counter() - start)
            volume[write.__name__] = ranks.mean({"bytes": written() - before})["bytes"] * ranks.world
            files[write.__name__] = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
            ranks.wait()
            if ranks.is_main:
                shutil.rmtree(folder)
    for name in seconds if ranks.is_main else ():
        print(f"{name}: {statistics.median(seconds[name]):.1f} s, {volume[name] / 1e9:.2f} GB written, {files[name]}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
