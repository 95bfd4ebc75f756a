"""How fast are the demo's training steps here? Eager beside compiled, bfloat16 beside float32.

    make bench

The variants take turns, round after round, and the median round of each is printed: on a busy
machine the ratios mean more than the numbers.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import LLaMA, LLaMAConfig
from support.machine import can_compile
from tasks import read_run, start_model
from train import make_optimizer
from vqgan import VQGAN, VQGANConfig

ROOT = Path(__file__).resolve().parent.parent
ROUNDS, STEPS = 5, 3


def llama_step(model, batch):
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def vqgan_step(model, batch):
    reconstruction, _, losses = model(batch)
    return F.mse_loss(reconstruction.float(), batch) + losses["codebook"] + losses["commitment"]


def measure(name, classes, step, make_batch, unit, items):
    s, given = read_run(ROOT / "configs" / f"{name}.toml")
    batch = make_batch(s)
    variants = {}
    for compiled in (False, True) if can_compile("cpu") else (False,):
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            model = start_model(*classes, s.model, given, None)
            if compiled:
                model.compile()
            variants[compiled, dtype] = (model, make_optimizer(model, s.optim), [])
    for _ in range(ROUNDS + 1):
        for (_, dtype), (model, optimizer, seconds) in variants.items():
            start = time.perf_counter()
            for _ in range(STEPS):
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                    loss = step(model, batch)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            seconds.append((time.perf_counter() - start) / STEPS)
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, batch of {len(batch)}")
    for (compiled, dtype), (_, _, seconds) in variants.items():
        rate = items(batch) / np.median(seconds[1:])  # the first round warms up and compiles
        print(f"  {'compiled' if compiled else 'eager':9}{str(dtype)[6:]:9}{rate:10,.0f} {unit}/s")


def main():
    def tokens(s):
        return torch.randint(0, s.model.vocab_size, (s.train.batch_size, s.model.max_seq_len + 1))

    def pictures(s):
        return torch.rand(s.train.batch_size, 3, s.data.side, s.data.side)

    measure("demo_lvm", (LLaMA, LLaMAConfig), llama_step, tokens, "tokens", lambda b: b[:, 1:].numel())
    measure("demo_tokenizer", (VQGAN, VQGANConfig), vqgan_step, pictures, "images", len)


if __name__ == "__main__":
    main()
