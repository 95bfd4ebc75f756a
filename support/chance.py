"""Chance: named streams of random numbers, and endless streams of permutations.

No generator is kept and none is saved. Whoever needs random numbers makes a generator from a name
and a key, such as ("VAE noise", seed, batch, row): the same key gives the same numbers in any
process and at any time, and streams of different names have nothing in common. That is why a
batch is a pure function of its number, and a resumed run finds its place at once.
"""

import functools
import zlib

import numpy as np


def rng(stream, *key):
    """A numpy Generator for the stream of that name at `key`, whole numbers from 0 on."""
    return np.random.default_rng((zlib.crc32(stream.encode()), *key))


@functools.lru_cache(8)
def permutation(stream, key, size, number):
    """The order of pass `number` of a stream over 0 … size - 1: (size,) int64, read-only.

    key: a tuple, (seed, …).
    """
    order = rng(stream, *key, number).permutation(size)
    order.flags.writeable = False  # it is shared by all who ask for it
    return order


def shuffled(stream, key, size, start, count):
    """Items start … start + count of the endless stream of passes over 0 … size - 1: (count,) int64.

    Each pass is permuted anew.
    """
    parts = [np.zeros(0, np.int64)]
    while count > 0:
        number, place = divmod(start, size)
        part = permutation(stream, key, size, number)[place : place + count]
        parts.append(part)
        start, count = start + len(part), count - len(part)
    return np.concatenate(parts)
