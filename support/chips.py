"""GPUs as their makers describe them: what a training step is measured against (train.py's log, and its --plan).

From NVIDIA's datasheets of the A100 80GB SXM, the H100 SXM, the H200 SXM and the DGX B200 (an eighth of it). They give
products with sparsity, which is twice what dense ones reach, and NVLink in both directions together; here both are
halved. The network is DGX's: a card of InfiniBand beside each of a node's eight GPUs.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    device_name: str  # as torch.cuda.get_device_name gives it; other forms of a chip (PCIe, NVL) are slower
    flops: float  # dense bfloat16 FLOP/s, a multiply-add being two
    memory: float  # bytes
    bandwidth: float  # bytes/s to and from its memory
    nvlink: float  # bytes/s sent to the other GPUs of its node, over all links together
    infiniband: float  # bytes/s sent to other nodes, by its own card


CHIPS = {
    "A100-80": Chip("NVIDIA A100-SXM4-80GB", 312e12, 80e9, 2.039e12, 300e9, 25e9),
    "H100": Chip("NVIDIA H100 80GB HBM3", 989e12, 80e9, 3.35e12, 450e9, 50e9),
    "H200": Chip("NVIDIA H200", 989e12, 141e9, 4.8e12, 450e9, 50e9),
    "B200": Chip("NVIDIA B200", 2.25e15, 180e9, 8e12, 900e9, 50e9),
}


def named(device_name):
    """The Chip that calls itself so; None if it is not among those above."""
    return next((chip for chip in CHIPS.values() if chip.device_name == device_name), None)
