"""Several processes, one batch: what a loss needs of the other ranks' shares of it.

DistributedDataParallel gives every rank some rows of the batch and averages the gradients. For most losses that is
all. Those below look at the whole batch: CLIP compares each picture with every text, and a batch norm or an entropy
takes a mean over all rows. With one process, each function is the identity.
"""

import torch
import torch.distributed as dist


def several():
    """Whether there are several ranks (torchrun started this process)."""
    return dist.is_available() and dist.is_initialized()


class Mean(torch.autograd.Function):
    """The mean of x over all ranks; backward, the mean of their gradients."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x / dist.get_world_size()

    @staticmethod
    def backward(ctx, gradient):
        return Mean.forward(ctx, gradient.contiguous())


def across_ranks(x):
    """The mean of x over all ranks, with gradients."""
    return Mean.apply(x) if several() else x


class Gather(torch.autograd.Function):
    """x (B, E) of every rank → (B·ranks, E), with gradients from every rank.

    As torch.distributed.nn.functional.all_gather does, which torch 2.13 warns is on its way out.
    """

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def all_rows(x):
    """The rows of all ranks, one rank's after another's, with gradients."""
    return Gather.apply(x) if several() else x


def row_offset(x):
    """The index of this rank's first row among the rows of all."""
    return dist.get_rank() * len(x) if several() else 0
