"""Rows of tokens on the disk: LVM's format, and what a rows file was made with.

    rows.jsonl             a visual sentence or a text a line, {"tokens": base64 of little-endian int32}
    rows.jsonl.info.json   what they were made with: RowsInfo. LVM's own rows have no such file

prepare.py writes both, data.TokenRows reads the rows, and a run compares the rest with its
configuration before it starts (check_rows).
"""

import base64
import binascii
import contextlib
import dataclasses
import glob
import hashlib
import itertools
import json
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support import checkpoint, settings
from support.settings import UserError
from support.sources import Skipping

# ---- one row -----------------------------------------------------------------------------------


def encode_row(codes):
    """A sentence's codes (n,) as a line of a rows file, with its newline."""
    text = base64.b64encode(np.ascontiguousarray(codes, dtype="<i4").tobytes()).decode()
    return json.dumps({"tokens": text}) + "\n"


def decode_row(line, vocab_size=None):
    """A line of a rows file → codes (n,) int32 in [0, vocab_size); ValueError: what is wrong."""
    try:
        text = json.loads(line)["tokens"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError('not a JSON row {"tokens": "…"}') from None
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise ValueError(f"bad base64 ({error})") from None
    if not data or len(data) % 4:
        raise ValueError(f"{len(data)} bytes are no whole number of int32 codes")
    codes = np.frombuffer(data, "<i4").astype(np.int32)
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or (vocab_size and high >= vocab_size):
        raise ValueError(f"code {low if low < 0 else high} lies outside the vocabulary of {vocab_size}")
    return codes


# ---- rows files ---------------------------------------------------------------------------------

INFO = ".info.json"  # ROWS.info.json lies beside ROWS


def rows_files(name):
    """[path, …] of an entry of data.rows or data.held_out, which may be a pattern."""
    found = sorted(path for path in glob.glob(str(name)) if not path.endswith(INFO))
    return found or [str(name)]


@contextlib.contextmanager
def new_rows(path, info):
    """Gives an open text file for rows, which becomes `path` when the block ends; `info` beside it.

    Both appear whole, or not at all. The rows come first: rows without an info are read unchecked,
    a wrong one would stop a run.
    """
    beside = Path(f"{path}{INFO}")
    with checkpoint.atomic_file(beside) as info_file:
        info_file.write_text(json.dumps(dataclasses.asdict(info), indent=2) + "\n")
        with checkpoint.atomic_file(path) as rows_file, open(rows_file, "w", newline="\n") as file:
            yield file
            beside.unlink(missing_ok=True)  # of rows that were there before


class RowsFiles(Skipping):
    """All readable rows of some rows files: rows[i] → its tokens, (n,) int32.

    Opening reads and checks all of them (seconds per gigabyte); a broken one is named, counted in
    `skipped` and left out. The files stay mapped into memory, and a row is decoded when it is asked
    for.

    paths                the files
    file, start, end     (rows,) in which file a row's line is, and which of its bytes
    length               (rows,) tokens in a row; tokens: in all of them
    """

    def __init__(self, paths, vocab_size=None):
        super().__init__()
        self.paths = list(paths)
        self._maps = [_mapped(path) for path in self.paths]
        lines = [self._index(path, text, vocab_size) for path, text in zip(self.paths, self._maps, strict=True)]
        counts = list(map(len, lines))
        self.file = np.repeat(np.arange(len(counts)), counts)
        self.start, self.end, self.length = np.concatenate(lines).T
        self.tokens = int(self.length.sum())
        if not len(self):
            raise UserError(f"{', '.join(self.paths)}: no readable rows in it")

    def _index(self, path, text, vocab_size):
        """(rows, 3) int64: start and end of each readable line, and the tokens in it."""
        rows, start, number = [], 0, 0
        while start < len(text):
            end = text.find(b"\n", start)
            end = len(text) if end < 0 else end
            number += 1
            try:
                rows.append((start, end, len(decode_row(text[start:end], vocab_size))))
            except ValueError as error:
                self.skip(f"{path}:{number}: {error}")
            start = end + 1
        return np.array(rows, np.int64).reshape(-1, 3)

    def __len__(self):
        return len(self.length)

    def __getitem__(self, i):
        return decode_row(self._maps[self.file[i]][self.start[i] : self.end[i]])


def _mapped(path):
    """The bytes of a file, mapped into memory."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    except (OSError, ValueError) as error:  # ValueError: a name with NUL in it
        raise UserError(f"{path}: {getattr(error, 'strerror', error)}") from None


# ---- what rows were made with --------------------------------------------------------------------


@dataclass(frozen=True)
class RowsInfo:
    """What a rows file was made with."""

    kind: str  # "pictures" or "text"
    tokenizer: str  # its path
    vocab_size: int  # how many codes or tokens it has: ids are smaller
    fingerprint: str  # a hash of its codebook or its tokens
    side: int = 0  # of pictures, in pixels
    grid: tuple[int, ...] = ()  # codes of a picture: (height, width)

    def __post_init__(self):
        settings.one_of(self, ("pictures", "text"), "kind")
        settings.at_least(self, 1, "vocab_size")
        settings.at_least(self, 0, "side", "grid")

    @classmethod
    def of_pictures(cls, path, vqgan, side):
        """Of rows that the VQGAN at `path` writes of pictures with that side."""
        codebook = vqgan.quantize.embedding.weight.detach().float().cpu().numpy()
        return cls(
            "pictures", str(path), len(codebook), _fingerprint(codebook.tobytes()), side, tuple(vqgan.grid(side))
        )

    @classmethod
    def of_text(cls, path, tokenizer):
        """Of rows that the Tokenizer at `path` writes."""
        pieces = repr(sorted(tokenizer.bytes_of.items())).encode()
        return cls("text", str(path), tokenizer.vocab_size, _fingerprint(pieces))

    @classmethod
    def read(cls, rows):
        """What the rows file of this name was made with, or None if that is not known."""
        path = Path(f"{rows}{INFO}")
        if not path.exists():
            return None
        names = {field.name: field.name for field in dataclasses.fields(cls)}
        return settings.build(cls, settings.published(checkpoint.read_json(path), path, names))


def _fingerprint(data):
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def check_rows(data, vocab_size, tokenizers=()):
    """Raises a UserError if the rows of a run's [data] were made otherwise than it reads them.

    vocab_size   the model's
    tokenizers   RowsInfo.of_pictures or of_text of each tokenizer that the run has; without any,
                 only sizes are compared
    """
    for own in tokenizers:
        if own.vocab_size > vocab_size:
            raise UserError(f"{own.tokenizer} has {own.vocab_size} codes, but model.vocab_size is {vocab_size}")
    for path in itertools.chain.from_iterable(map(rows_files, (*data.rows, *data.held_out))):
        info = RowsInfo.read(path)
        if info is None:
            continue
        if info.vocab_size > vocab_size:
            raise UserError(f"{path} was made with {info.vocab_size} codes, but model.vocab_size is {vocab_size}")
        if info.kind == "pictures" and info.side != data.side:
            raise UserError(f"{path} was made at side {info.side}, data.side is {data.side}")
        if tokenizers and info.kind not in {own.kind for own in tokenizers}:
            raise UserError(f"{path} holds {info.kind}, but {tokenizers[0].tokenizer} is for {tokenizers[0].kind}")
        for own in tokenizers:
            if own.kind == info.kind and own.fingerprint != info.fingerprint:
                raise UserError(
                    f"{path} was made with {info.tokenizer} ({info.vocab_size} codes), which is not, or no longer, "
                    f"what {own.tokenizer} is ({own.vocab_size} codes): tokenize again"
                )
