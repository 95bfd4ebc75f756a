"""What the machine at hand can do, and one thing that it is told."""

import contextlib
import ctypes
import sys

import torch


def has_bfloat16(device):
    """Whether `device` multiplies bfloat16 itself. A CPU that does not takes 20 to 50 times as long as for float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    instructions = torch.cpu.get_capabilities()  # of ARM's nothing was measured: float32 is right everywhere
    return instructions.get("avx512_bf16", False) or instructions.get("amx_bf16", False)


def can_compile(device):
    """Whether torch.compile finds what it needs here (on a CPU: a C++ compiler); if not, says so."""
    try:
        torch.compile(lambda x: x * 2)(torch.ones(2, device=device))
        return True
    except Exception as error:  # whatever is missing, the run goes on without it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"torch.compile does not work here, going on without: {reason[:150]}", file=sys.stderr)
        return False


def give_back_freed_memory():
    """Tells glibc to give back memory of 1 MB and more as soon as it is freed, where it would keep up to 32 MB a piece.

    On a CPU weights are brought together and dropped in such pieces; kept, they came to several times the shares.
    """
    with contextlib.suppress(OSError, AttributeError):  # another system, another library
        ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD
