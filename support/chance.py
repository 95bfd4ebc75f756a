"""Chance: endless streams of permutations, each item a pure function of its position.

An epoch's order is never stored: pass p over `size` items is permuted by a generator of its own,
whose key holds p. So a resumed run finds its place at once, and any number of machines sees the
same order.
"""

import functools

import numpy as np


@functools.lru_cache(8)
def permutation(key, size, number):
    """The order of pass `number` over 0 … size - 1: (size,) int64, read-only.

    key = (seed, …) names the stream; the generator's key is (seed, number, …).
    """
    seed, *name = key
    order = np.random.default_rng((seed, number, *name)).permutation(size)
    order.flags.writeable = False  # it is shared by all who ask for it
    return order


def shuffled(key, size, start, count):
    """Items start … start + count of the endless stream of passes over 0 … size - 1.

    Each pass is permuted anew.

    → (count,) int64. key = (seed, …) names the stream: see `permutation`.
    """
    parts = [np.zeros(0, np.int64)]
    while count > 0:
        number, place = divmod(start, size)
        part = permutation(key, size, number)[place : place + count]
        parts.append(part)
        start, count = start + len(part), count - len(part)
    return np.concatenate(parts)
