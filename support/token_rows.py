"""Rows of tokens on the disk: LVM's format, and what a rows file was made with.

    rows.jsonl             a visual sentence or a text a line, {"tokens": base64 of little-endian int32}
    rows.jsonl.info.json   what they were made with: RowsInfo. LVM's own rows have no such file

Others write int64 or uint16 (numpy's habits), which their bytes tell, or plain lists of numbers.
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
from support.rows import NAMED, fault_kind, no_json
from support.settings import UserError
from support.sources import Skipping, in_words, tally, warn

# ---- one row -----------------------------------------------------------------------------------


def encode_row(codes):
    """A sentence's codes (n,) as a line of a rows file, with its newline."""
    text = base64.b64encode(np.ascontiguousarray(codes, dtype="<i4").tobytes()).decode()
    return json.dumps({"tokens": text}) + "\n"


DTYPES = {"int64": "<i8", "int32": "<i4", "uint16": "<u2"}  # of the codes in base64, the widest first


def decode_row(line, vocab_size=None, dtype="int32"):
    """A line of a rows file → codes (n,) int32 in [0, vocab_size); ValueError: what is wrong.

    dtype: a key of DTYPES.
    """
    codes = row_data(line)
    if isinstance(codes, bytes):
        if not codes or len(codes) % np.dtype(DTYPES[dtype]).itemsize:
            raise ValueError(f"{len(codes)} bytes are no whole number of {dtype} codes")
        codes = np.frombuffer(codes, DTYPES[dtype])
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= (vocab_size or 2**31):
        raise ValueError(f"code {low if low < 0 else high} lies outside the vocabulary of {vocab_size}")
    return codes.astype(np.int32)


def row_data(line):
    """What a line of a rows file holds: the bytes of its base64, or a plain list as an array."""
    try:
        row = settings.parse_json(line)
    except ValueError:
        row = None
    if line.lstrip()[:1] == b"[":
        raise ValueError('a JSON list: write a line {"tokens": …} for each of its rows (jq -c ".[]")')
    if not isinstance(row, dict) or "tokens" not in row:
        keys = f": its keys are {', '.join(row)[:80]}" if isinstance(row, dict) and row else ""
        raise ValueError(f'not a JSON row {{"tokens": "…"}}{keys}')
    if isinstance(row["tokens"], list):
        codes = np.array(row["tokens"]) if set(map(type, row["tokens"])) == {int} else None
        if codes is None or codes.dtype.kind not in "iu":  # beyond 64 bits they are objects
            raise ValueError("its tokens are no list of whole numbers")
        return codes
    try:
        return base64.b64decode(row["tokens"], validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise ValueError(f"bad base64 ({error})") from None


def tell_dtype(lines, vocab_size=None):
    """The dtype that most of these rows are in, by their bytes: a key of DTYPES.

    It is the widest in which all codes of a row lie in the vocabulary, else below 2^20, which no
    vocabulary reaches: int32 read as int64 makes huge numbers, and int64 read as int32 a zero
    behind every code. Zeros alone tell nothing, and 64 bytes are too few to be sure of int64: then it is
    LVM's int32. (A vocabulary above 2^15 does not tell uint16 from int32 with larger codes.)
    """
    bounds = [2**20] if vocab_size is None or vocab_size > 2**15 else [vocab_size, 2**20]
    told = dict.fromkeys(DTYPES, 0)  # bytes
    for line in lines:
        with contextlib.suppress(ValueError):
            data = row_data(line)
            if not isinstance(data, bytes) or not any(data):
                continue
            for bound, dtype in itertools.product(bounds, DTYPES):
                if _fits(data, DTYPES[dtype], bound):
                    told[dtype] += len(data)
                    break
    dtype = max(told, key=told.get)
    return dtype if told[dtype] > (64 if dtype == "int64" else 0) else "int32"


def _fits(data, code, bound):
    """Whether bytes can be codes of that numpy dtype: a whole number, all below `bound`."""
    if len(data) % np.dtype(code).itemsize:
        return False
    codes = np.frombuffer(data, code)
    return codes.min() > -bound and codes.max() < bound


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

    Opening reads and checks all of them (seconds per gigabyte); a broken one is counted in `skipped`
    and left out. NAMED of them are said one by one, more in a line that counts their faults.
    The files stay mapped into memory, and a row is decoded when it is asked for.

    paths, dtypes        the files, and of each that of its codes: a key of DTYPES
    file, start, end     (rows,) in which file a row's line is, and which of its bytes
    length               (rows,) tokens in a row; tokens: in all of them

    dtype: of all the files; "auto" tells it file by file, and says so where it is not LVM's int32.
    """

    def __init__(self, paths, vocab_size=None, dtype="auto"):
        super().__init__()
        self.paths, self.dtypes = list(paths), []
        self._maps = [_mapped(path) for path in self.paths]
        for path, text in zip(self.paths, self._maps, strict=True):
            self.dtypes.append(dtype_of(path, vocab_size, text) if dtype == "auto" else dtype)
        files = zip(self.paths, self._maps, self.dtypes, strict=True)
        lines = [self._index(path, text, vocab_size, of_file) for path, text, of_file in files]
        counts = list(map(len, lines))
        self.file = np.repeat(np.arange(len(counts)), counts)
        self.start, self.end, self.length = np.concatenate(lines).T
        self.tokens = int(self.length.sum())
        if self.skipped > NAMED:
            faults = [reason.partition(": ") for reason in self.reasons]
            warn(f"rows: skipped {in_words(tally((fault_kind(fault), name) for name, _, fault in faults))}")
        if not len(self):
            raise UserError(f"{', '.join(self.paths)}: no readable rows in it")

    def _index(self, path, text, vocab_size, dtype):
        """(rows, 3) int64: start and end of each readable line, and the tokens in it."""
        rows = []
        for number, start, end in _lines(text):
            try:
                rows.append((start, end, len(decode_row(text[start:end], vocab_size, dtype))))
            except ValueError as error:
                self.skip(f"{path}:{number}: {error}", self.skipped < NAMED)
        return np.array(rows, np.int64).reshape(-1, 3)

    def __len__(self):
        return len(self.length)

    def __getitem__(self, i):
        file = self.file[i]
        return decode_row(self._maps[file][self.start[i] : self.end[i]], dtype=self.dtypes[file])


def dtype_of(path, vocab_size=None, text=None):
    """The dtype of a rows file's codes, told by its first thousand rows; said if not int32."""
    if os.path.exists(f"{path}{INFO}"):
        return "int32"  # new_rows wrote it
    text = _mapped(path) if text is None else text
    dtype = tell_dtype((text[start:end] for _, start, end in itertools.islice(_lines(text), 1000)), vocab_size)
    if dtype != "int32":
        warn(f"{path}: its codes are read as {dtype}, by their bytes (data.row_dtype would say otherwise)")
    return dtype


def _lines(text):
    """Yields number, start and end of each line of a file's bytes that is not blank."""
    start, number = 0, 1
    while start < len(text):
        end = text.find(b"\n", start)
        end = len(text) if end < 0 else end
        if end - start > 100 or text[start:end].strip():
            yield number, start, end
        start, number = end + 1, number + 1


NO_ROWS = {  # what holds codes in another way, by its ending or how it begins
    ".npy": "is an array of numpy",
    ".npz": "holds arrays of numpy",
    ".bin": "is a stream of codes without rows (nanoGPT, Megatron)",
    ".idx": "is the index of a .bin of Megatron",
}


def _mapped(path):
    """The bytes of a file, mapped into memory; a UserError if they are no lines of JSON."""
    try:
        with settings.open_file(path) as file:
            start, size = file.read(64), os.fstat(file.fileno()).st_size
            if what := NO_ROWS.get(Path(path).suffix.lower()):
                raise UserError(f'{path}: {what}: write a line {{"tokens": [1, 2, …]}} for each of its rows')
            if what := no_json(path, start):
                raise UserError(f"{path}: {what}")
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
