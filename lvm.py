"""LVM = VQGAN + LLaMA: pictures in, pictures out."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from model import LLaMA
from support import settings
from support.settings import UserError
from vqgan import VQGAN

# ---- (from sample) ----


@dataclass
class LVM:
    """A LLaMA over image codes with the tokenizer that made them."""

    llama: LLaMA
    tokenizer: VQGAN
    side: int = 0  # pixels of a picture; 0: what the tokenizer was made for

    def __post_init__(self):
        self.side = self.side or self.tokenizer.config.resolution
        self.grid = self.tokenizer.grid(self.side)
        self.codes = self.grid[0] * self.grid[1]  # tokens of one picture
        self.window = self.llama.config.max_seq_len // self.codes  # pictures in a context: 16 in LVM
        codes, words = self.tokenizer.config.num_embeddings, self.llama.config.vocab_size
        if codes > words:
            raise UserError(f"the tokenizer has {codes} codes, the LLaMA only {words} words: they are no pair")
        if self.window < 2:
            context = self.llama.config.max_seq_len
            raise UserError(f"two pictures of {self.codes} codes do not fit the LLaMA's context of {context} tokens")

    @classmethod
    def from_pretrained(cls, run, tokenizer="", device="cpu", dtype=None):
        """From a run, which knows its tokenizer and the size of its pictures, or any LLaMA and VQGAN."""
        data = run_data(run)
        tokenizer = tokenizer or data.get("tokenizer")
        if not tokenizer:
            raise UserError(f"{run} does not say which tokenizer it belongs to: name a VQGAN with --tokenizer")
        llama = LLaMA.from_pretrained(run, dtype=dtype, device=device)
        tokenizer = VQGAN.from_pretrained(tokenizer, device=device)  # small: it stays as stored
        return cls(llama, tokenizer, data.get("side", 0))

    @torch.inference_mode()
    def encode(self, pictures):
        """pictures (N, side, side, 3) uint8 → tokens (N, h·w)."""
        images = torch.from_numpy(np.asarray(pictures)).to(self.llama.embed_tokens.weight.device)
        images = images.permute(0, 3, 1, 2) / 255
        return self.tokenizer.encode(images.to(next(self.tokenizer.parameters()).dtype)).flatten(1)

    @torch.inference_mode()
    def decode(self, tokens):
        """tokens (N, h·w) → pictures (N, side, side, 3) uint8."""
        images = torch.cat([self.tokenizer.decode(t.view(-1, *self.grid)).float() for t in tokens.split(64)])
        return (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()

    def continue_tokens(self, tokens, frames, candidates=1, **sampling):
        """tokens (B, N, h·w) of N pictures → the next `frames` pictures, (B·candidates, frames, h·w).

        As many pictures as fit the context come in one go; after that, one at a time from the newest
        window - 1 pictures. Ids that are no image codes are never drawn, and there is no end token.
        """
        allowed = range(self.tokenizer.config.num_embeddings)
        given = tokens.shape[1]
        while (missing := given + frames - tokens.shape[1]) > 0:
            context = tokens[:, -(self.window - 1) :]
            new = min(self.window - context.shape[1], missing)
            count = new * self.codes
            drawn = self.llama.generate(context.flatten(1), count, allowed=allowed, samples=candidates, **sampling)
            drawn = drawn[:, -count:].view(-1, new, self.codes)  # (B·candidates, new, h·w)
            tokens = torch.cat((tokens.repeat_interleave(candidates, dim=0), drawn), dim=1)
            candidates = 1  # they have parted
        return tokens[:, given:]

    def continue_pictures(self, pictures, frames=1, candidates=1, **sampling):
        """N prompt pictures → (candidates, frames, side, side, 3) uint8, independent samples."""
        tokens = self.continue_tokens(self.encode(pictures)[None], frames, candidates, **sampling)
        return self.decode(tokens.flatten(0, 1)).reshape(candidates, frames, self.side, self.side, 3)


def run_data(run):
    """The [data] section of the run that `run` is, or is a step of; {} where there is none."""
    if not Path(run).exists():
        raise UserError(f"{run}: no such file or folder")
    for folder in (Path(run), *Path(run).resolve().parents[:2]):  # the run, or its step, or that step's ema
        if (folder / "config.toml").exists():
            return settings.read(folder / "config.toml").get("data", {})
    return {}
