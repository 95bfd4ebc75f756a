"""A run over several processes: what each of them holds of the model.

    "ddp"    all of it. Every rank reads rows of its own; gradients are averaged before AdamW moves all alike.
    "fsdp"   a share: of every weight ⌈n/N⌉ of the n rows of its first dimension (the last ranks may have fewer), and
             the same rows of its gradient and of AdamW's moments, 16 / N bytes a parameter instead of 16. A block's
             weights are brought together just before the block computes, forward and again backward, and dropped
             after; its gradients are summed over the ranks and cut (reduce-scatter).

    share of rank 0   ┐                                                       ┌ share of rank 0
    share of rank 1   ┴─ all-gather ─▶ a block's weights ─▶ its gradients ───▶┴ share of rank 1
                            float32, or cast to bfloat16        reduce-scatter in float32

A share is a run of rows, so in a weight file it is a run of bytes: every rank reads and writes its own, and no
process ever holds a whole model (support/checkpoint.py, write_shares). Only a U-Net or an autoencoder from scratch is
small enough to be made whole before it is cut.

Papers: Rajbhandari et al. 2020 (ZeRO, stage 3), Zhao et al. 2023 (PyTorch FSDP). Here: torch's FSDP2, `fully_shard`.
"""

import contextlib
import datetime
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from support.machine import give_back_freed_memory
from support.settings import UserError


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among those that torchrun started (rank 0 of 1 without it)."""

    rank: int
    world: int
    device: torch.device
    sharded: bool = False  # whether it holds a share of the model
    mesh: DeviceMesh | None = None  # of all ranks, if so
    planned: bool = False  # whether it only pretends, for a plan (support/plan.py)

    @property
    def is_main(self):
        """Whether this is the process that prints, and writes what is not in shares."""
        return self.rank == 0

    def rows(self, batch_size):
        """The rows of a global batch that are this process's, as a range."""
        share = batch_size // self.world
        return range(self.rank * share, (self.rank + 1) * share)

    def mean(self, values):
        """{name: scalar} averaged over all ranks, as floats."""
        stacked = torch.tensor([float(v) for v in values.values()], dtype=torch.float32, device=self.device)
        if self.world > 1:
            dist.all_reduce(stacked)
        return dict(zip(values, (stacked / self.world).tolist(), strict=True))

    def most(self, *numbers):
        """The largest of each of these integers over all ranks, as a list. They may be tensors on the device."""
        if self.world == 1:
            return [int(number) for number in numbers]
        stacked = torch.stack([torch.as_tensor(n, dtype=torch.int32, device=self.device) for n in numbers])
        dist.all_reduce(stacked, dist.ReduceOp.MAX)
        return stacked.tolist()

    def gather(self, value):
        """[`value` as each rank has it, in their order]."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def from_main(self, value):
        """`value` as the main process has it."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def wait(self):
        """Returns when every rank has come here."""
        if self.world > 1:
            dist.barrier()


# How long a rank waits for the others where all must come, on every backend. What ends a wait when another rank
#   dies     gloo, and NCCL between machines: its connection closes. Else torchrun, which sees it exit and ends the
#            others: at once where a signal reaches them, after --shutdown-timeout (30 s) where they hang in NCCL
#   hangs    this time. It is longer than all that one rank may do alone: index its rows, compile, save, sample
PATIENCE = datetime.timedelta(minutes=30)


def start_ranks(device, parallel="ddp"):
    """The Ranks of this process; `device`: "cpu", "cuda", or None for a GPU if there is one."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: must be cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU here")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        # torchrun keeps one store when it starts all again: addresses of dead ranks must not be found there
        store, _, _ = next(dist.rendezvous("env://", timeout=PATIENCE))
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
    sharded = parallel == "fsdp" and world > 1  # alone, a process holds everything whatever it is called
    if sharded:
        give_back_freed_memory()
    mesh = init_device_mesh(torch.device(device).type, (world,)) if sharded else None
    return Ranks(rank, world, torch.device(device), sharded, mesh)


@contextlib.contextmanager
def together(ranks):
    """Within, the ranks work together. If another one is gone, that is a UserError."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        if ranks.world == 1 or not (isinstance(error, dist.DistError) or "gloo" in reason):
            raise
        hint = "a line above may say why. The same command goes on from the last checkpoint"
        raise UserError(f"rank {ranks.rank}: another process is gone, or hangs ({reason}); {hint}") from None
    if ranks.world > 1:
        dist.destroy_process_group()


def distribute(task):
    """{phase: its module}, wrapped so that the ranks average their gradients if there are several."""
    if task.ranks.world == 1 or task.ranks.sharded:  # a sharded module does so itself
        return task.modules
    skips = task.may_skip_weights and not task.ranks.planned  # fake gradients cannot be looked at
    options = {"broadcast_buffers": False, "find_unused_parameters": skips}
    return {phase: DistributedDataParallel(module, **options) for phase, module in task.modules.items()}


def synchronize(task, module, last):
    """Whether the next backward pass of a distributed module averages gradients: a context.

    It is needed once a step only, with the last microbatch. But FSDP cannot put off the gradients of a part that no
    microbatch has used yet: where there may be such parts, it averages every time.
    """
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    if hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(last or task.may_skip_weights)
    return contextlib.nullcontext()


# ---- shares --------------------------------------------------------------------------------------


def shard(module, blocks, ranks, dtype):
    """Leaves of `module` this rank's share, on its device, in float32.

    blocks: classes of the parts that are brought together one at a time; all else is one such part, of `module`
    itself. The weights may be mapped to files, in any dtype, or on the meta device: then they are still to be filled.
    dtype: of computing. Weights travel in it; gradients are summed in float32.
    """
    # inputs are not cast: rotary angles stay float32, and autocast knows which products are to be bfloat16
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if dtype == "bfloat16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for part in module.modules():
        if isinstance(part, blocks):
            fully_shard(part, mesh=ranks.mesh, mp_policy=policy)
    fully_shard(module, mesh=ranks.mesh, mp_policy=policy)
    module.float()
    if any(parameter.is_meta for parameter in module.parameters()):
        module.to_empty(device=ranks.device)


def local(tensor):
    """What this process holds of a tensor: its rows if it is sharded, else all."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor):
    """A sharded tensor, brought together from all ranks (which all must ask for it); another as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share(tensor, like):
    """The part of a whole `tensor` that this process holds of the tensor `like`, in its form, dtype and device."""
    if not isinstance(like, DTensor):
        return tensor.to(like.device, like.dtype, copy=True)
    rows, start = len(like.to_local()), first_row(like)
    part = tensor[start : start + rows].to(like.device, like.dtype, copy=True)
    return DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def first_row(tensor):
    """The row at which this rank's share of a DTensor begins: torch.chunk's rule, the last ones may get less."""
    mesh = tensor.device_mesh
    each = -(-tensor.shape[0] // mesh.size())
    return min(each * mesh.get_local_rank(), tensor.shape[0])


@contextlib.contextmanager
def gathered(module):
    """Within, what is in no block of a sharded module is whole, as methods beside its forward need it."""
    if hasattr(module, "unshard"):
        module.unshard()
    yield
    if hasattr(module, "reshard"):
        module.reshard()


def check_shared_disk(folder, ranks):
    """A UserError unless all ranks see the files of `folder`: into one checkpoint, all of them write."""
    file = Path(ranks.from_main(str(Path(folder) / f".{secrets.token_hex(8)}")))
    if ranks.is_main:
        file.touch()
    ranks.wait()
    seen = ranks.mean({"seen": file.exists()})["seen"]
    ranks.wait()
    if ranks.is_main:
        file.unlink()
    if seen < 1:
        hosts = f"{round((1 - seen) * ranks.world)} of {ranks.world} processes do not see it"
        raise UserError(f'run.dir {folder}: {hosts}; train.parallel = "fsdp" needs a disk that all hosts share')
