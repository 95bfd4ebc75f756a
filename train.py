"""One training loop for every model.

    python train.py --config configs/tiny_vqgan.toml                    seconds, to see that it works
    python train.py --config configs/demo_tokenizer.toml run.dir=out/mine train.steps=200    any key can be overridden
    torchrun --nproc-per-node 8 train.py --config configs/lvm.toml      one process per GPU

The loop knows nothing of pictures or tokens. It asks a *task*, which has

    model     what is saved and sampled from
    modules   {phase: the module that phase trains}; a GAN has two phases, everything else one. The first is averaged
    active    (phase, step) → whether that phase has begun
    batch     (step, microstep, rows) → arrays; depends on the seed and these numbers only
    loss      (phase, wrapped module, batch, step, microstep) → a scalar to descend, and values to log
    after_step, evaluate, sample, state, load_state     what their names say; see VQGANTask

and does the rest: mixed precision, gradient accumulation, clipping, AdamW, learning rate, averaged
weights, several processes, held-out loss, samples, checkpoints.

    for step:  for phase:  for microstep:  batch → loss → backward
                           clip → AdamW
               average → log → evaluate → sample → save

How a run starts: (1) resume from its newest complete checkpoint; else (2) from `model.init`, a run or a
published folder; else (3) from scratch. Because batches and random draws are functions of (seed, step,
phase, microstep, row), a checkpoint needs no random state: a resumed run ends with the same bits as an
unbroken one, and the number of processes changes nothing but rounding.

Read before: model.py, vqgan.py; for their tasks clip.py, diffusion.py, documents.py. Read next: sample.py.
"""

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import prefetch
from support import checkpoint, runs, settings
from support.settings import UserError, learning_rate
from tasks import TASKS, read_run

# ---- settings: which sections a run of each kind has -----------------------------------------


# ---- several processes -----------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among those torchrun started (rank 0 of 1 without it)."""

    rank: int
    world: int
    device: torch.device

    def rows(self, batch_size):
        """The slice of a global batch that is ours."""
        share = batch_size // self.world
        return range(self.rank * share, (self.rank + 1) * share)

    def mean(self, values):
        """{name: scalar} averaged over all ranks, as floats."""
        stacked = torch.tensor([float(v) for v in values.values()], dtype=torch.float32, device=self.device)
        if self.world > 1:
            dist.all_reduce(stacked)
        return dict(zip(values, (stacked / self.world).tolist(), strict=True))


def start_ranks(device):
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rank, world = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return Ranks(rank, world, torch.device(device))


# ---- start: resume, init or scratch ----------------------------------------------------------


# ---- tasks -----------------------------------------------------------------------------------


# ---- optimization ----------------------------------------------------------------------------


def make_optimizer(module, o):
    trained = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, o.lr, (o.beta1, o.beta2), o.eps, weight_decay=o.weight_decay, fused=True)


def optimizer_tensors(optimizer, module):
    """The optimizer's state by the names of the weights: {"encoder.conv_in.weight.exp_avg": …}."""
    return {
        f"{name}.{key}": value
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer(optimizer, module, tensors):
    for name, parameter in module.named_parameters():
        state = {k: tensors[f"{name}.{k}"] for k in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{k}" in tensors}
        if state:
            optimizer.state[parameter] = {k: v.to(parameter.device, copy=True) for k, v in state.items()}


@contextlib.contextmanager
def with_ema_weights(model, ema):
    """Within, the model's weights are the averaged ones (or its own where none are kept)."""
    if not ema:
        yield
        return
    own = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        torch._foreach_copy_(list(model.parameters()), ema)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), own)


def can_compile(device):
    """Whether torch.compile finds what it needs here (on a CPU: a C++ compiler); says so if not."""
    try:
        torch.compile(lambda x: x * 2)(torch.ones(2, device=device))
        return True
    except Exception as error:  # whatever is missing, the run goes on without it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"torch.compile does not work here, going on without: {reason[:150]}", file=sys.stderr)
        return False


# ---- the loop --------------------------------------------------------------------------------


def train(s, explicit_keys, device=None):
    """Runs (or resumes) the training that the settings `s` describe. → the run's folder."""
    ranks = start_ranks(device)
    t, run = s.train, Path(s.run.dir)
    is_main = ranks.rank == 0  # the one process that prints and writes
    if t.batch_size % ranks.world:
        raise UserError(f"train.batch_size {t.batch_size} is no multiple of the {ranks.world} processes")

    # -- start: resume, init or scratch --
    resume = checkpoint.latest_step_folder(run)
    first = checkpoint.read_json(resume / "state.json")["step"] if resume else 0
    if first >= t.steps:
        if is_main:
            print(f"{run} is complete: step {first} of {t.steps}")
        return run
    torch.manual_seed(t.seed)
    task = TASKS[s.model.kind](s, explicit_keys, ranks, resume)
    model = next(iter(task.modules.values()))  # the one that is averaged; a U-Net is saved as part of a pipeline
    s = dataclasses.replace(s, model=dataclasses.replace(s.model, **vars(model.config)))
    for module in task.modules.values():
        module.to(ranks.device).train()
    optimizers = {phase: make_optimizer(module, s.optim) for phase, module in task.modules.items()}
    ema = [p.detach().clone() for p in model.parameters()] if t.ema else []
    if resume:
        load_training(resume, task, optimizers, ema, ranks)
    if is_main:
        count = sum(p.numel() for p in model.parameters())
        parts = [str(getattr(s.model, key, "")) for key in ("llama", "clip", "diffusion")]  # DreamLLM's
        start = s.model.init or ", ".join(filter(None, parts))
        origin = f"resumed from {resume}" if resume else f"from {start}" if start else "from scratch"
        print(f"{s.model.kind}, {count:,} parameters, {origin}, on {ranks.world} × {ranks.device}; run: {run}")
        runs.start_run(run, s, first)

    if t.compile and can_compile(ranks.device):
        model.compile()
    wrapped = task.modules
    if ranks.world > 1:
        # a batch of DreamLLM may have no picture for a CLIP or a U-Net that is trained too
        options = {"broadcast_buffers": False, "find_unused_parameters": s.model.kind == "dreamllm"}
        wrapped = {k: DistributedDataParallel(m, **options) for k, m in task.modules.items()}

    # -- batches, prepared a few ahead in threads --
    rows = ranks.rows(t.batch_size)
    order = [(step, micro) for step in range(first, t.steps) for micro in range(t.accumulate)]
    batches = prefetch(lambda i: task.batch(*i, rows), order, s.data.workers)

    autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=t.dtype == "bfloat16")
    bar = tqdm(total=t.steps, initial=first, disable=not is_main, unit="step", dynamic_ncols=True)
    board = tensorboard(run) if is_main else None
    metrics = open(run / "metrics.jsonl", "a") if is_main else None
    clock, since = time.perf_counter(), first
    for step in range(first, t.steps):
        lr = learning_rate(s.optim, step, t.steps)
        values = {}
        microbatches = [next(batches) for _ in range(t.accumulate)]
        for phase, optimizer in optimizers.items():
            if not task.active(phase, step):
                continue
            for micro, batch in enumerate(microbatches):
                last = micro + 1 == t.accumulate
                # gradients of several processes are averaged once a step, with the last microstep
                with wrapped[phase].no_sync() if ranks.world > 1 and not last else contextlib.nullcontext():
                    with autocast:
                        loss, logged = task.loss(phase, wrapped[phase], batch, step, micro)
                    (loss / t.accumulate).backward()
                name = "loss" if phase == next(iter(optimizers)) else f"{phase}_loss"
                for key, value in {name: loss, **logged}.items():
                    values[key] = values.get(key, 0.0) + value.detach().float() / t.accumulate
            norm = torch.nn.utils.clip_grad_norm_(task.modules[phase].parameters(), s.optim.clip or math.inf)
            values |= {"grad_norm" if name == "loss" else f"{phase}_grad_norm": norm}
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if ema:
            # early on the average follows quickly, so that it does not remember the random start
            decay = min(t.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(ema, [p.detach() for p in model.parameters()], 1 - decay)
        task.after_step(step, ema)

        # -- log, evaluate, sample, save --
        done = step + 1
        evaluates = t.eval_every and (done % t.eval_every == 0 or done == t.steps)
        saves = done % t.save_every == 0 or done == t.steps
        if done % t.log_every == 0 or done == t.steps or saves or evaluates:
            entry = {"step": done, **ranks.mean(values), "lr": lr}
            bad = [f"{key} is {value}" for key, value in entry.items() if not math.isfinite(value)]
            if bad:
                last_good = checkpoint.latest_step_folder(run) or "none was saved"
                raise UserError(
                    f"step {done}: {', '.join(bad)}; stopped. Try a lower optim.lr (last good checkpoint: {last_good})"
                )
            elapsed, clock = time.perf_counter() - clock, time.perf_counter()
            rate = (done - since) * t.batch_size * t.accumulate * task.items_per_row / elapsed
            entry[f"{task.unit}_per_second"], since = round(rate, 1), done
            if evaluates:
                model.eval()
                with torch.inference_mode(), autocast, with_ema_weights(model, ema):
                    entry |= ranks.mean(task.evaluate())
                model.train()
            if is_main:
                metrics.write(json.dumps(entry) + "\n")
                metrics.flush()
                bar.set_postfix_str(f"loss {entry['loss']:.4f}, {rate:,.0f} {task.unit}/s")
                if evaluates:
                    bar.write(f"step {done}: " + ", ".join(f"{k} {v:.4g}" for k, v in entry.items() if k != "step"))
                for key, value in entry.items() if board else ():
                    board.add_scalar(key, value, done)
        if is_main and t.sample_every and (done % t.sample_every == 0 or done == t.steps):
            model.eval()
            with torch.inference_mode(), autocast, with_ema_weights(model, ema):
                task.sample(run / "samples" / f"step_{done:08d}.png")
            model.train()
        if saves and is_main:
            with runs.new_step(run, done, t.keep) as folder:
                save_training(folder, done, task, optimizers, ema)
        if evaluates or saves or (t.sample_every and done % t.sample_every == 0):
            clock = time.perf_counter()  # the rate is that of training alone
        bar.update()
    bar.close()
    if ranks.world > 1:
        dist.destroy_process_group()
    return run


def tensorboard(run):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(run / "tensorboard")


def save_training(folder, step, task, optimizers, ema):
    """Fills `folder` with a checkpoint: see checkpoint.py for its layout."""
    task.model.save_pretrained(folder)
    model, *others = task.modules.values()
    if ema:
        with with_ema_weights(model, ema):
            task.model.save_pretrained(folder / "ema")
    for phase, module in task.modules.items():
        tensors = optimizer_tensors(optimizers[phase], module)
        checkpoint.write_tensors(folder / "training" / f"optimizer.{phase}.safetensors", tensors)
        if module in others:
            checkpoint.write_tensors(folder / "training" / f"{phase}.safetensors", module.state_dict())
    checkpoint.write_tensors(folder / "training" / "state.safetensors", task.state())
    checkpoint.write_text(folder / "state.json", json.dumps({"step": step}) + "\n")


def load_training(folder, task, optimizers, ema, ranks):
    """The other half: everything but the model's weights, which are loaded already."""
    model, *others = task.modules.values()
    for phase, module in task.modules.items():
        file = folder / "training" / f"optimizer.{phase}.safetensors"
        load_optimizer(optimizers[phase], module, checkpoint.read_tensors(file))
        if module in others:
            module.load_state_dict(checkpoint.read_tensors(folder / "training" / f"{phase}.safetensors"))
    task.load_state(checkpoint.read_tensors(folder / "training" / "state.safetensors"))
    if ema and (folder / "ema").is_dir():
        saved = type(model).from_pretrained(folder / "ema", dtype=torch.float32, device=ranks.device)
        torch._foreach_copy_(ema, [p.detach() for p in saved.parameters()])


def main():
    parser = settings.Parser(prog="python train.py", description=__doc__)
    parser.add_argument("--config", required=True, help="a TOML file of configs/")
    parser.add_argument("--device", help="cpu or cuda; default: the best at hand")
    arguments = parser.parse_with_overrides()
    train(*read_run(arguments.config, arguments.overrides), device=arguments.device)


if __name__ == "__main__":
    settings.run_main(main)
