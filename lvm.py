"""LVM: a language model whose words are pictures (Bai et al. 2023, arXiv 2312.00785).

A VQGAN turns each picture into h·w codes; a LLaMA has learned from *visual sentences*, pictures one
after another that have something to do with each other, to predict the next code. There is no text
and no special token: what a prompt means follows from its pictures alone (section 5).

    sequential prompt   x1, x2, x3, …           frames of a clip, turns of an object: the model continues them
    analogy prompt      x1, y1, …, xn, yn, x    pairs of a picture and its answer, then a query: it answers with y

Both are one operation; in the paper a picture has 256 codes, and 16 pictures fit the context:

    pictures (N, side, side, 3) ─ VQGAN.encode ─▶ tokens (N, h·w)
                                                     │ side by side: (1, N·h·w)
                                      LLaMA.generate │ image codes only
                                                     ▼
    new pictures (frames, side, side, 3) ◀─ VQGAN.decode ─ tokens (frames, h·w)

    symbol  B prompts   N pictures of each   h·w codes of a picture
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from model import LLaMA
from support import checkpoint, settings
from support.pictures import to_float, to_uint8
from support.settings import UserError
from vqgan import VQGAN


@dataclass
class LVM:
    """A LLaMA over image codes with the tokenizer that made them.

    side: pixels of a picture, 0 for what the tokenizer was made for. Derived: grid (h, w), codes
    h·w, and pictures_in_context, the number of pictures that fit the LLaMA's context.
    """

    llama: LLaMA
    tokenizer: VQGAN
    side: int = 0

    def __post_init__(self):
        self.side = self.side or self.tokenizer.config.resolution
        self.grid = self.tokenizer.grid(self.side)
        self.codes_per_picture = self.grid[0] * self.grid[1]
        context, vocabulary = self.llama.config.max_seq_len, self.llama.config.vocab_size
        self.pictures_in_context = context // self.codes_per_picture
        if self.tokenizer.config.num_embeddings > vocabulary:
            codes = self.tokenizer.config.num_embeddings
            raise UserError(f"the tokenizer has {codes} codes, the LLaMA only {vocabulary} tokens: they do not fit")
        if self.pictures_in_context < 2:
            raise UserError(
                f"two pictures of {self.codes_per_picture} codes do not fit the LLaMA's context of {context} tokens"
            )

    @classmethod
    def from_pretrained(cls, run, tokenizer="", device="cpu", dtype=None):
        """From a run, which knows its tokenizer and its pictures' size, or any LLaMA and VQGAN.

        dtype is the LLaMA's: the tokenizer is small and stays as it is stored.
        """
        checkpoint.expect(run, "a LLaMA")
        data = run_data(run)
        tokenizer = tokenizer or data.get("tokenizer")
        if not tokenizer:
            raise UserError(f"{run} does not say which tokenizer it belongs to: name a VQGAN with --tokenizer")
        checkpoint.expect(tokenizer, "a VQGAN")
        llama = LLaMA.from_pretrained(run, dtype=dtype, device=device)
        return cls(llama, VQGAN.from_pretrained(tokenizer, device=device), data.get("side", 0))

    @torch.inference_mode()
    def encode(self, pictures):
        """pictures (N, side, side, 3) uint8 → tokens (N, h·w)."""
        images = to_float(pictures, self.llama.embed_tokens.weight.device)
        return self.tokenizer.encode(images.to(next(self.tokenizer.parameters()).dtype)).flatten(1)

    @torch.inference_mode()
    def decode(self, tokens):
        """tokens (N, h·w) → pictures (N, side, side, 3) uint8."""
        images = [self.tokenizer.decode(part.view(-1, *self.grid)).float() for part in tokens.split(64)]
        return to_uint8(torch.cat(images))

    def continue_tokens(self, tokens, frames, candidates=1, **sampling):
        """tokens (B, N, h·w) of N pictures → the next `frames`, (B·candidates, frames, h·w).

        As many pictures as fit the context are generated at once; after that, one at a time from
        the newest window - 1 pictures. Ids that are no image codes are never sampled, and there is
        no end token. The candidates of one prompt are adjacent rows. sampling: see LLaMA.stream.
        """
        allowed = range(self.tokenizer.config.num_embeddings)
        prompt = tokens.shape[1]
        while (missing := prompt + frames - tokens.shape[1]) > 0:
            context = tokens[:, -(self.pictures_in_context - 1) :]
            new = min(self.pictures_in_context - context.shape[1], missing)
            count = new * self.codes_per_picture
            sampled = self.llama.generate(context.flatten(1), count, allowed=allowed, samples=candidates, **sampling)
            sampled = sampled[:, -count:].view(-1, new, self.codes_per_picture)  # (B·candidates, new, h·w)
            tokens = torch.cat((tokens.repeat_interleave(candidates, dim=0), sampled), dim=1)
            candidates = 1  # from here on each candidate has a history of its own
        return tokens[:, prompt:]

    def continue_pictures(self, pictures, frames=1, candidates=1, **sampling):
        """pictures (N, side, side, 3) uint8 → samples (candidates, frames, side, side, 3) uint8."""
        tokens = self.continue_tokens(self.encode(pictures)[None], frames, candidates, **sampling)
        return self.decode(tokens.flatten(0, 1)).reshape(candidates, frames, self.side, self.side, 3)


TEXTS = ("tokenizer", "text_tokenizer", "template", "system")  # what else than a side is looked for in [data]


def run_data(run):
    """The [data] section of the run that `run` is, or of which it is a step; {} if there is none."""
    if not os.path.exists(run):
        raise UserError(f"{run}: no such file or folder")
    for folder in (Path(run), *Path(run).resolve().parents[:2]):  # the run; or its step, or that step's ema
        if (folder / "config.toml").exists():
            data = settings.read(folder / "config.toml").get("data", {})
            texts = [data.get(key, "") for key in TEXTS] if isinstance(data, dict) else [None]
            if not all(isinstance(text, str) for text in texts) or type(data.get("side", 0)) is not int:
                raise UserError(f"{folder / 'config.toml'}: its section [data] is damaged")
            return data
    return {}
