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


def shuffled(stream, key, size, positions):
    """Which items stand at `positions` (n,) of an endless stream of passes over 0 … size - 1: (n,) int64.

    Every pass has each item once, in an order of its own, and no order is ever written down: where an
    item of 10⁹ stands is found without the others. key: a tuple, (seed, …).
    """
    numbers, places = np.divmod(np.asarray(positions, np.int64), size)
    items = np.empty_like(places)
    for number in np.unique(numbers).tolist():
        in_pass = numbers == number
        items[in_pass] = _permute(places[in_pass].astype(np.uint64), size, _round_keys(stream, key, number))
    return items


ROUNDS = 6


@functools.lru_cache(1024)
def _round_keys(stream, key, number):
    return rng(stream, *key, number).integers(2**64, size=ROUNDS, dtype=np.uint64)


def _permute(x, size, keys):
    """A bijection of 0 … size - 1, applied to all of x (uint64).

    A Feistel network permutes the numbers of 2·bits bits (Luby and Rackoff 1988). Those that it
    leads outside of 0 … size - 1 go through it again, until they are inside: cycle walking (Black and
    Rogaway 2002). There are at most four times as many numbers as items, and 16 for fewer than four.
    """
    bits = np.uint64(max(2, ((size - 1).bit_length() + 1) // 2))
    x = _feistel(x, bits, keys)
    while (outside := x >= size).any():
        x[outside] = _feistel(x[outside], bits, keys)
    return x.astype(np.int64)


def _feistel(x, bits, keys):
    left, right = x >> bits, x & ((np.uint64(1) << bits) - np.uint64(1))
    for key in keys:
        left, right = right, left ^ _hash(right ^ key, bits)
    return left << bits | right


def _hash(x, bits):
    """The upper bits of a scrambled x: the multiplications of MurmurHash3 (Appleby 2011)."""
    x = x * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ x >> np.uint64(33)) * np.uint64(0xC4CEB9FE1A85EC53)
    return x >> (np.uint64(64) - bits)
