"""What a training does with its time: the share of a GPU's speed that it uses (MFU), its memory, a trace of its steps.

    first step of a phase ──FlopCount──▶ FLOPs  ─┐
    the log's clock ──────────────────▶ seconds ─┴▶ FLOPs / seconds / what the chip could do = MFU

Papers: Chowdhery et al. 2022 (PaLM, appendix B: MFU).
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

from support import chips
from support.checkpoint import atomic_file

aten = torch.ops.aten
FORMULAS = flop_registry | {  # torch's, and attention's form for CPUs, which takes the same arguments
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        flop_registry[aten._scaled_dot_product_flash_attention_backward]
    ),
}


class FlopCount(TorchDispatchMode):
    """Counts in `flops` what runs within: products, convolutions, attention (as if no pair of tokens were masked).

    What activation checkpointing computes again is not counted, but in a model that is compiled as a whole: there it
    cannot be told from the backward pass.
    """

    def __init__(self):
        super().__init__()
        self.flops = 0

    @classmethod
    def ignore_compile_internals(cls):
        return True  # otherwise nothing would be compiled within, and more memory needed

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        formula = FORMULAS.get(getattr(function, "overloadpacket", None))
        # a backward pass computes gradients of nothing: where they are wanted in it, a forward pass is repeated
        repeated = torch.is_grad_enabled() and torch._C._current_autograd_node() is not None
        if formula and not repeated:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


class Meter:
    """What the log says of this process's device."""

    def __init__(self, device):
        self.device = device
        self.chip = chips.named(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)
        self.flops = {}  # {phase: of one step, on this device}

    @contextlib.contextmanager
    def counting(self, phase):
        """Around the update of a phase: its FLOPs are counted once, if the chip's speed is known."""
        if self.chip is None or phase in self.flops:
            yield
            return
        with FlopCount() as count:
            yield
        self.flops[phase] = count.flops

    def measured(self, seconds):
        """{"mfu": …, "memory_gb": the most that was allocated so far}, each where it is known; seconds: of a step.

        MFU is the share of the chip's dense bfloat16 products, whatever the run computes in.
        """
        values = {}
        if self.flops:
            values["mfu"] = round(sum(self.flops.values()) / seconds / self.chip.flops, 4)
        if self.device.type == "cuda":
            values["memory_gb"] = round(torch.cuda.max_memory_allocated(self.device) / 1e9, 3)
        return values

    def is_idle(self):
        """Whether the device has done all that it was given."""
        return self.device.type != "cuda" or torch.cuda.current_stream(self.device).query()


def profiled(batches, first, steps, run):
    """Yields the batches of the steps after `first`; those of `steps` = (from, to) are recorded by torch.profiler.

    The trace goes to run/profile_FROM_TO.json, for chrome://tracing or ui.perfetto.dev; the ten operations that took
    most time themselves are printed. steps (): nothing is recorded.
    """
    start, stop = steps or (0, 0)
    with contextlib.ExitStack() as stack:
        for done, batch in enumerate(batches, first + 1):
            if done == start:
                profiler = stack.enter_context(torch.profiler.profile())
            yield batch
            if done == stop and start > first:
                stack.close()
                with atomic_file(run / f"profile_{start}_{stop}.json") as beside:
                    profiler.export_chrome_trace(str(beside))
                tqdm.write(slowest(profiler, f"steps {start} to {stop}"))


def slowest(profiler, title):
    """The ten operations that took most time themselves, the GPU's if there is one, as a table."""
    operations = profiler.key_averages()
    device = any(operation.self_device_time_total for operation in operations)
    attribute = "self_device_time_total" if device else "self_cpu_time_total"  # in microseconds
    seconds = {operation: getattr(operation, attribute) / 1e6 for operation in operations}
    total = sum(seconds.values())
    lines = [f"{title}: {total:.3f} s of the {'GPU' if device else 'CPU'} in all, most of it in"]
    for operation in sorted(seconds, key=seconds.get, reverse=True)[:10]:
        share = seconds[operation] / total
        lines.append(f"{seconds[operation]:10.3f} s {share:6.1%}  {operation.count:6} × {operation.key[:80]}")
    return "\n".join(lines)
