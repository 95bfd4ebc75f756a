"""One step of the emoji LVM on the CPU: train.py's, eager and compiled, beside train_tpu.py's.

    python bench/tpu_speed.py

The same batch, AdamW and clipping for all; as in speed.py the variants take turns, and the median
round is printed.
"""

import sys
import time
from pathlib import Path

import jax
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_tpu
from bench.speed import ROUNDS, STEPS, llama_step
from model import LLaMA, LLaMAConfig
from support.machine import can_compile
from tasks import read_run, start_model
from train import make_optimizer

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "demo_lvm.toml"


def torch_steps(tokens, compiled, dtype):
    """→ a function that makes STEPS updates."""
    s, given = read_run(CONFIG)
    model = start_model(LLaMA, LLaMAConfig, s.model, given, None)
    optimizer, batch = make_optimizer(model, s.optim), torch.from_numpy(tokens)
    if compiled:
        model.compile()

    def run():
        for _ in range(STEPS):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = llama_step(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), s.optim.clip)
            optimizer.step()
            optimizer.zero_grad()

    return run


def jax_steps(tokens, dtype):
    s, explicit_keys = train_tpu.read_run(CONFIG, ["mesh.fsdp=1", f"train.dtype={dtype}"])
    c = train_tpu.model_config(s, explicit_keys, None)
    layout = train_tpu.lay_out(c, train_tpu.make_mesh(s.mesh, jax.devices("cpu")[:1]))
    with jax.set_mesh(layout.mesh):
        program = train_tpu.prepare(s, layout)
        state = train_tpu.start(s, layout, None)
    batch = np.stack((tokens[:, :-1], tokens[:, 1:]))[None].astype(np.int32)  # (1, 2, B, T)
    batch = jax.device_put(batch, program.batch.sharding)

    def run():
        nonlocal state
        with jax.set_mesh(layout.mesh):
            for i in range(STEPS):
                state, _ = program.update(state, batch, train_tpu.step_constants(s, i))
            jax.block_until_ready(state)

    return run


def main():
    s, _ = read_run(CONFIG)
    tokens = np.random.default_rng(0).integers(0, s.model.vocab_size, (s.train.batch_size, s.model.max_seq_len + 1))
    variants = {}
    for dtype in ("float32", "bfloat16"):
        variants["train.py, eager", dtype] = torch_steps(tokens, False, dtype)
        if can_compile("cpu"):
            variants["train.py, compiled", dtype] = torch_steps(tokens, True, dtype)
        variants["train_tpu.py", dtype] = jax_steps(tokens, dtype)
    seconds = {variant: [] for variant in variants}
    for _ in range(ROUNDS + 1):
        for variant, run in variants.items():
            began = time.perf_counter()
            run()
            seconds[variant].append((time.perf_counter() - began) / STEPS)
    print(f"{CONFIG.stem}: a step of {tokens[:, 1:].size} tokens")
    for (name, dtype), measured in seconds.items():
        print(f"  {name:20}{dtype:10}{1000 * np.median(measured[1:]):8.0f} ms")  # the first round compiles


if __name__ == "__main__":
    main()
