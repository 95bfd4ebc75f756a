"""What a step of training would need on each of N GPUs that need not be there: train.py --plan N.

    python train.py --config configs/lvm.toml model.size=lvm_7b train.parallel=fsdp --plan 8

Nothing is modelled by hand. train.py's own code runs, one step of it, as rank 0 of N: it builds the model, cuts it
into shares, computes the loss and its gradients, clips, and moves the weights. But its tensors are fake: they have a
shape, a dtype and a storage of so many bytes, no numbers. Its collectives are fake as well and send nothing. Between
the code and these stands a Tally:

    a whole step ─ each operation ─▶ Tally ─▶ a fake result
                                       ├─ storages that are alive: their bytes, and the most there ever were
                                       ├─ FLOPs, and bytes of memory that the operation reads and writes
                                       └─ bytes that a collective sends

Seconds are those of a roofline: an operation takes as long as its FLOPs or its bytes need, whichever is more, at a
share of the datasheet's rates (REACHED: assumed). What the Tally does not see: the memory of CUDA, NCCL and cuBLAS and
the gaps between blocks (USABLE leaves room); what torch.compile fuses, so that bytes read and written are an upper
bound; the latency of many small operations or messages; waiting for data.
"""

import contextlib
import dataclasses
import weakref
from collections import Counter
from dataclasses import dataclass
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from support.chips import CHIPS
from support.parallel import Ranks, local
from support.watch import FORMULAS

REACHED = {"products": 0.6, "memory": 0.8, "network": 0.75}  # of the datasheet's rates: assumed, not measured
USABLE = 0.9  # of a GPU's memory
NODE = 8  # GPUs that NVLink joins
MICROSTEPS = 3  # of an update that run: the first, one between, the last

NO_WORK = ("device", "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
COLLECTIVES = {  # operation: (what it is, how many times (N - 1) / N of its larger side are sent)
    "_allgather_base_": ("all-gather", 1),
    "allgather_": ("all-gather", 1),
    "all_gather_into_tensor": ("all-gather", 1),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_tensor": ("reduce-scatter", 1),
    "allreduce_": ("all-reduce", 2),
    "all_reduce": ("all-reduce", 2),
}

# ---- what is measured ------------------------------------------------------------------------


class Tally(TorchDispatchMode):
    """Within, every operation of torch is counted, on real tensors too."""

    def __init__(self, world=1):
        super().__init__()
        self.world = world
        self.alive = {}  # {address of a storage: (its bytes, a weak reference that tells of its end)}
        self.bytes = 0
        self.start()

    def start(self):
        """Forgets what was counted but for what is alive."""
        self.held = self.peak = self.bytes
        self.times = 1  # how often what runs now is to be counted
        self.work = Counter()  # {(FLOPs, bytes read and written, whether of float32, whether recomputed): how often}
        self.sent = Counter()  # {collective: bytes}

    def __enter__(self):
        self.resize = resize = torch.UntypedStorage.resize_

        def resize_(storage, size):  # no operation: with it FSDP takes and gives back the memory of whole weights
            resize(storage, size)
            if storage._cdata in self.alive:
                self.hold(storage)

        torch.UntypedStorage.resize_ = resize_
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again, with this rank's shares
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for tensor in tensors(out):
            self.hold(tensor.untyped_storage())
        if func.namespace in ("c10d", "_c10d_functional"):
            self.count_sent(func.overloadpacket.__name__, args)
        elif not func.is_view and func.overloadpacket.__name__ not in NO_WORK:
            self.count_work(func, args, kwargs, out)
        return out

    def microbatches(self, batch, accumulate):
        """`batch` as each microbatch of an update. Of more than three the middle ones are alike: one runs for all."""
        count = min(accumulate, MICROSTEPS)
        for microstep in range(count):
            self.times = 1 + accumulate - count if microstep == 1 else 1
            yield batch

    def hold(self, storage):
        """Counts a storage at its present size until it is freed."""
        address, size = storage._cdata, storage.nbytes()
        before, end = self.alive.get(address, (0, None))
        if end is None:
            end = weakref.ref(storage, lambda _: self.release(address))
        self.alive[address] = size, end
        self.bytes += size - before
        self.peak = max(self.peak, self.bytes)

    def release(self, address):
        self.bytes -= self.alive.pop(address)[0]

    def count_work(self, func, args, kwargs, out):
        formula = FORMULAS.get(func.overloadpacket)
        flops = formula(*args, **kwargs, out_val=out) if formula else 0
        moved = tensors((args, kwargs)) + tensors(out)
        for arg, declared in zip(args, func._schema.arguments, strict=False):
            if out is None and declared.is_write:  # of a list of tensors, all in place
                moved += tensors(arg)
        float32 = bool(flops) and moved[0].dtype == torch.float32
        # backward, gradients are on only where a forward pass is repeated
        recomputed = torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled()
        self.work[flops, sum(map(nbytes, moved)), float32, recomputed] += self.times

    def count_sent(self, name, args):
        if name in COLLECTIVES:
            kind, factor = COLLECTIVES[name]
            size = max(sum(map(nbytes, tensors(side))) for side in args)
            self.sent[kind] += self.times * factor * size * (self.world - 1) / self.world


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def nbytes(tensor):
    return tensor.numel() * tensor.itemsize


# ---- GPUs that are not there -------------------------------------------------------------------


def in_float32(function):
    """`function` as autocast computes it on a GPU. On a CPU, which the fake tensors are on, it would be in bfloat16."""

    def computed(*args, **kwargs):
        if torch.is_autocast_enabled("cpu"):
            args = [arg.float() if isinstance(arg, torch.Tensor) else arg for arg in args]
        return function(*args, **kwargs)

    return computed


def unseen(function):
    """`function` outside of all modes."""

    def called(*args):
        with _disable_current_modes():
            return function(*args)

    return called


class PlannedRanks(Ranks):
    """Rank 0 of ranks that are not there: their values are taken to be its own."""

    def mean(self, values):
        return values


@contextlib.contextmanager
def pretend(gpus, parallel):
    """Within, this process is rank 0 of `gpus`, and its tensors are fake → (Ranks, Tally)."""
    with contextlib.ExitStack() as stack:
        mesh = None
        if gpus > 1:
            dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
            stack.callback(dist.destroy_process_group)
            mesh = init_device_mesh("cpu", (gpus,)) if parallel == "fsdp" else None
        for name in ("layer_norm", "group_norm", "softmax"):
            stack.enter_context(mock.patch.object(F, name, in_float32(getattr(F, name))))
        # fake tensors cannot be moved, and need not; nor compared between processes
        stack.enter_context(mock.patch.object(torch.nn.Module, "to", lambda module, *place: module))
        stack.enter_context(mock.patch("torch.nn.parallel.distributed._verify_param_shape_across_processes"))
        # a DTensor finds a result's shape with whole tensors, which nobody needs for anything else
        name = "_propagate_tensor_meta_non_cached"
        stack.enter_context(mock.patch.object(ShardingPropagator, name, unseen(getattr(ShardingPropagator, name))))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        tally = stack.enter_context(Tally(gpus))
        yield PlannedRanks(0, gpus, torch.device("cpu"), mesh is not None, mesh, planned=True), tally


def send_gradients(modules):
    """DDP's exchange of gradients, which it does not get back from a fake process group."""
    for module in modules.values():
        if isinstance(module, DistributedDataParallel):
            module.register_comm_hook(None, all_reduce)


def all_reduce(_, bucket):
    dist.all_reduce(bucket.buffer())
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def make_moments(optimizer):
    """The optimizer's state as every step but the first finds it."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# ---- the plan ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What one of the GPUs would need for an update, in bytes."""

    parameters: int  # those that are trained
    gradients: int
    moments: int
    averaged: int
    frozen: int  # other weights, buffers, and DDP's buckets of gradients
    peak: int  # the most that is alive at a time
    work: Counter  # Tally's
    sent: Counter

    @classmethod
    def of(cls, optimizers, ema, tally):
        trained, moments = 0, 0
        for optimizer in optimizers.values():
            for weight, state in optimizer.state.items():
                trained += nbytes(local(weight))
                moments += sum(nbytes(local(value)) for value in state.values())
        averaged = sum(map(nbytes, ema))
        frozen = tally.held - trained - moments - averaged
        return cls(trained, trained, moments, averaged, frozen, tally.peak, tally.work, tally.sent)

    @property
    def activations(self):
        """What lies beside the others when most is alive: activations, temporaries, weights that are whole."""
        return self.peak - self.parameters - self.gradients - self.moments - self.averaged - self.frozen

    def flops(self, recomputed):
        """Of products, two for each multiply-add."""
        return sum(n * flops for (flops, _, _, again), n in self.work.items() if recomputed or not again)

    def traffic(self):
        return sum(n * size for (_, size, _, _), n in self.work.items())

    def fits(self, chip):
        return self.peak <= USABLE * chip.memory

    def seconds(self, chip, gpus):
        """{what takes the time: seconds of an update}."""
        total = dict.fromkeys(REACHED, 0.0)
        for (flops, size, float32, _), n in self.work.items():
            # float32 is multiplied as TF32, at half the rate
            times = {"products": flops * (1 + float32) / chip.flops, "memory": size / chip.bandwidth}
            for name in times:
                times[name] /= REACHED[name]
            longest = max(times, key=times.get)
            total[longest] += n * times[longest]
        network = chip.nvlink if gpus <= NODE else min(chip.nvlink, NODE * chip.infiniband)
        total["network"] = sum(self.sent.values()) / network / REACHED["network"]
        return total


def report(config, gpus, make_plan, savers):
    """The text of --plan. make_plan: (configuration, GPUs) → Plan; savers: [train]'s keys that save memory."""
    plan, train = make_plan(config, gpus), config.train
    rows = f"{train.batch_size} rows a microstep × {train.accumulate}"
    lines = [f"{gpus} × GPU, {train.parallel if gpus > 1 else 'alone'}, {train.dtype}; {rows}", "each GPU, an update:"]
    parts = {
        "parameters": plan.parameters,
        "gradients": plan.gradients,
        "moments": plan.moments,
        "averaged weights": plan.averaged,
        "frozen, buckets": plan.frozen,
        "activations and …": plan.activations,
        "peak": plan.peak,
    }
    lines += [f"  {name:19}{_gb(size)}" for name, size in parts.items() if size]
    flops = plan.flops(recomputed=True)
    again = 1 - plan.flops(recomputed=False) / flops
    lines.append(f"  products           {flops / 1e12:9.2f} TFLOP, {again:.0%} of it to recompute activations")
    lines.append(f"  memory traffic     {_gb(plan.traffic())}")
    lines += [f"  {kind:19}{_gb(size)}  sent" for kind, size in plan.sent.items()]
    columns = "GPU       memory   fits  products    memory   network"
    lines += ["", f"{columns}   a step, all overlapped … nothing   largest    MFU"]
    lines += [chip_line(name, plan, gpus) for name in CHIPS]
    if not plan.fits(CHIPS["H100"]):
        lines += ["", remedy(config, gpus, make_plan, savers)]
    return "\n".join(lines)


def chip_line(name, plan, gpus):
    """Whether a GPU's memory suffices; seconds of an update for products, memory, network."""
    chip = CHIPS[name]
    seconds = plan.seconds(chip, gpus)
    columns = "".join(f"{value:8.3f} s" for value in seconds.values())
    # products and other operations take turns on a GPU; beside them the network works
    overlapped, total = max(seconds["products"] + seconds["memory"], seconds["network"]), sum(seconds.values())
    largest, mfu = max(seconds, key=seconds.get), plan.flops(recomputed=False) / overlapped / chip.flops
    fits = "yes" if plan.fits(chip) else "no"
    steps = f"{overlapped:17.3f} … {total:.3f} s"
    return f"{name:8}{chip.memory / 1e9:5.0f} GB{fits:>7}{columns}{steps}{largest:>18}{mfu:7.0%}"


def remedy(config, gpus, make_plan, savers):
    """The first of `changes` that fits a GPU of 80 GB, found by planning each."""
    text = "any setting"
    for text, changed, count in changes(config, gpus, savers):
        plan = make_plan(changed, count)
        if plan.fits(CHIPS["H100"]):
            return f"GPUs of 80 GB would do with {text}: {_gb(plan.peak).strip()}"
    return f"GPUs of 80 GB would not do with {text} either"


def changes(config, gpus, savers):
    """Yields (what to write, configuration, GPUs) that need less memory, each on top of the one before."""
    changed, train = {}, config.train
    for key, value in savers.items():
        if getattr(train, key) != value and (gpus > 1 or key != "parallel"):
            changed[key] = value
            yield _changed(config, changed, gpus)
    batch_size, accumulate = train.batch_size, train.accumulate
    while batch_size % (2 * gpus) == 0:
        if config.model.kind == "clip":  # its loss compares the rows of a microstep
            gpus *= 2
        else:
            batch_size, accumulate = batch_size // 2, accumulate * 2
            changed |= {"batch_size": batch_size, "accumulate": accumulate}
        yield _changed(config, changed, gpus)
    while gpus > 1 and changed.get("parallel", train.parallel) == "fsdp" and accumulate % 2 == 0:
        gpus, batch_size, accumulate = 2 * gpus, 2 * batch_size, accumulate // 2
        changed |= {"batch_size": batch_size, "accumulate": accumulate}
        yield _changed(config, changed, gpus)


def _changed(config, keys, gpus):
    written = [f"train.{key}={str(value).lower()}" for key, value in keys.items()]
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **keys))
    return " ".join([*written, f"--plan {gpus}"]), config, gpus


def _gb(size):
    return f"{size / 1e9:9.3f} GB"
