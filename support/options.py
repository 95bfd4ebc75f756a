"""Values on a command line: types for argparse, whose errors say in one line what is wanted."""

import argparse
import math
import re

from support.settings import is_text


def number(kind, low, high, what):
    """A function for argparse that reads a number of `kind` (int or float) in [low, high].

    What is no 0, but closer to it than 1e-9, is refused too: to divide by it would overflow.
    """

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or 0 < abs(value) < 1e-9:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not {what}")
        return value

    return read


positive_int = number(int, 1, 2**31, "a whole number above 0")
moderate_int = number(int, 1, 2**16, "a whole number above 0, 65536 at most")  # of what is held in memory at once
few_int = number(int, 0, 1000, "a whole number from 0 on, 1000 at most")
seed_number = number(int, 0, 2**63 - 1, "a whole number from 0 on")
fraction = number(float, 1e-9, 1, "a number above 0 and at most 1")
non_negative = number(float, 0, 1e9, "a number from 0 on")
real = number(float, -1e9, 1e9, "a number")


def utf8(text):
    """A function for argparse: a text, which a command line may hold in bytes that are none."""
    if not is_text(text):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no UTF-8")
    return text


def picture_size(text):
    """A function for argparse: "W,H" → (W, H); "original" stays; "" → None."""
    if text in ("", "original"):
        return text or None
    numbers = re.fullmatch(r" *([0-9]{1,9}) *, *([0-9]{1,9}) *", text)
    size = tuple(map(int, numbers.groups())) if numbers else (0, 0)
    if 0 in size or max(size) > 2**14:
        raise argparse.ArgumentTypeError(f"{text!r} is not original or W,H, as in 128,128; 16384 at most")
    return size
