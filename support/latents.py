"""Latents on the disk: what an autoencoder makes of a set of pictures, once, by all ranks in parts.

    pictures ── encode, SHARD at a time ──▶ FOLDER/00000.safetensors, 00001.… ──▶ Latents[numbers]  (B, 2, z, h, w)

A shard is tensors of its n pictures: latents (n, 2, z, h, w), their means and log-variances; places (n,), which
pictures of the set they are of (one that cannot be read has none); sums (3,), how many numbers the means have, their
sum and that of their squares. A shard appears whole or not at all, and one that is there is not made again.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from tqdm import tqdm

from support.checkpoint import write_tensors

SHARD = 512  # pictures


class Latents:
    """The latents of those of `count` pictures that can be read: latents[numbers] → (B, 2, z, h, w) on the CPU.

    encode   (range of pictures) → (which of them can be read (n,), their latents (n, 2, z, h, w))
    places   (len,) which picture of the set each one is of
    """

    def __init__(self, folder, count, encode, ranks, title):
        self.files = [Path(folder) / f"{number:05d}.safetensors" for number in range(-(-count // SHARD))]
        numbers = range(len(self.files))
        self._make(numbers[ranks.rank :: ranks.world], count, encode, title if ranks.is_main else None)
        ranks.wait()
        self._make(numbers, count, encode, None)  # what ranks have written to a disk that this one does not see
        places, sums = zip(*map(self._read_places, self.files), strict=True)
        self.places, self.sums = torch.cat(places), torch.stack(sums).sum(0)
        self.first = np.cumsum([0, *map(len, places)])  # of each file

    def _make(self, numbers, count, encode, title):
        missing = [number for number in numbers if not self.files[number].exists()]
        for number in tqdm(missing, desc=title, unit=f" × {SHARD}", disable=not title or not missing):
            pictures = range(count)[number * SHARD : (number + 1) * SHARD]
            places, latents = encode(pictures)
            means = latents[:, 0].double()
            sums = torch.stack((torch.tensor(means.numel()).double(), means.sum(), means.square().sum()))
            shard = {"latents": latents, "places": torch.tensor(places, dtype=torch.int64), "sums": sums}
            write_tensors(self.files[number], shard)

    @staticmethod
    def _read_places(file):
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor("places"), opened.get_tensor("sums")

    def __len__(self):
        return len(self.places)

    def __getitem__(self, numbers):
        parts = []
        for number in numbers:
            file = int(np.searchsorted(self.first, number, side="right")) - 1
            with safe_open(self.files[file], framework="pt") as opened:  # mapped: only this picture's are read
                row = number - int(self.first[file])
                parts.append(opened.get_slice("latents")[row : row + 1])
        return torch.cat(parts)

    def std(self):
        """The standard deviation of all means."""
        count, total, squares = self.sums.tolist()
        return ((squares - total**2 / count) / max(count - 1, 1)) ** 0.5
