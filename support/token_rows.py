"""Rows of tokens on the disk: LVM's format, and what a rows file was made with.

    rows.jsonl             a visual sentence or a text a line, {"tokens": base64 of little-endian int32}
    rows.jsonl.info.json   what they were made with: RowsInfo. LVM's own rows have no such file
    rows.jsonl.index       where each row begins: made once of anybody's rows, and may be deleted

Others write int64 or uint16 (numpy's habits), which their bytes tell, or plain lists of numbers.
prepare.py writes both, data.TokenRows reads the rows, and a run compares the rest with its
configuration before it starts (check_rows).
"""

import base64
import binascii
import contextlib
import dataclasses
import functools
import glob
import hashlib
import itertools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support import checkpoint, settings
from support.index import ENDING, listed, open_index, stamp_of
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
    codes = row_codes(line, dtype)
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= (vocab_size or 2**31):
        raise ValueError(outside(low if low < 0 else high, vocab_size))
    return codes.astype(np.int32)


def outside(code, vocab_size):
    return f"code {code} lies outside the vocabulary of {vocab_size}"


def row_codes(line, dtype):
    """The codes (n,) of a line, whatever numbers they are; ValueError: what is wrong."""
    codes = row_data(line)
    if isinstance(codes, bytes):
        if not codes or len(codes) % np.dtype(DTYPES[dtype]).itemsize:
            raise ValueError(f"{len(codes)} bytes are no whole number of {dtype} codes")
        codes = np.frombuffer(codes, DTYPES[dtype])
    return codes


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
    found = sorted(path for path in glob.glob(str(name)) if not path.endswith((INFO, ENDING)))
    return found or [str(name)]


@contextlib.contextmanager
def new_rows(path, info):
    """Gives an open text file for rows, which becomes `path` when the block ends; `info` and index beside it.

    Each appears whole, or not at all. The rows come first: rows without an info are read unchecked,
    a wrong one would stop a run.
    """
    beside = Path(f"{path}{INFO}")
    with checkpoint.atomic_file(beside) as info_file:
        info_file.write_text(json.dumps(dataclasses.asdict(info), indent=2) + "\n")
        with checkpoint.atomic_file(path) as rows_file, open(rows_file, "w", newline="\n") as file:
            yield file
            beside.unlink(missing_ok=True)  # of rows that were there before
    rows_index(path, "int32")


class RowsFiles(Skipping):
    """All readable rows of some rows files: rows[i] → its tokens, (n,) int32.

    Where the rows are is read from indexes (`rows_index`), which stay mapped to memory; a row itself
    is read and decoded when it is asked for. A broken one is counted in `skipped` and left out. NAMED
    of them are said one by one, more in a line that counts their faults.

    paths, dtypes   the files, and of each that of its codes: a key of DTYPES
    first           (files + 1,) number of the first row of each; the last is the number of all
    tokens          in all rows; the shortest and the longest of them have `shortest` and `longest`

    dtype: of all the files; "auto" tells it file by file, and says so where it is not LVM's int32.
    """

    def __init__(self, paths, vocab_size=None, dtype="auto"):
        super().__init__()
        self.vocab_size = vocab_size
        self.paths, self.dtypes, self.columns, self.tokens = list(paths), [], [], 0
        self.stamps = []  # of each file, by which a change under a run is noticed
        counts, ranges = [0], []
        for path in self.paths:
            self.dtypes.append(dtype_of(path, vocab_size) if dtype == "auto" else dtype)
            index = rows_index(path, self.dtypes[-1])
            rows = self._usable(path, index, vocab_size)
            counts.append(len(rows["tokens"]))
            self.columns.append(rows)
            with open(path, "rb") as opened:
                self.stamps.append(stamp_of(opened))
            if counts[-1]:
                whole = counts[-1] == index.facts["rows"]
                ranges += index.facts["lengths"] if whole else [int(rows["tokens"].min()), int(rows["tokens"].max())]
                self.tokens += index.facts["tokens"] if whole else int(rows["tokens"].sum())
        self.first = np.cumsum(counts)
        if self.skipped > NAMED:
            faults = [reason.partition(": ") for reason in self.reasons]
            warn(f"rows: skipped {in_words(tally((fault_kind(fault), name) for name, _, fault in faults))}")
        if not len(self):
            raise UserError(f"{', '.join(self.paths)}: no readable rows in it")
        self.shortest, self.longest = min(ranges), max(ranges)

    def _usable(self, path, index, vocab_size):
        """The index's columns of those rows whose codes lie in the vocabulary; the others are skipped."""
        least, greatest = index.facts["codes"]
        faults, columns = list(index.facts["faults"]), index.columns
        if least < 0 or greatest >= (vocab_size or 2**31):
            usable = (columns["extreme"] >= 0) & (columns["extreme"] < (vocab_size or 2**31))
            for line, code in zip(columns["line"][~usable].tolist(), columns["extreme"][~usable].tolist(), strict=True):
                faults.append([line, outside(code, vocab_size)])
            columns = {name: column[usable] for name, column in columns.items()}
        for line, fault in sorted(faults):
            self.skip(f"{path}:{line}: {fault}", self.skipped < NAMED)
        return columns

    def __len__(self):
        return int(self.first[-1])

    def __getitem__(self, i):
        file = int(np.searchsorted(self.first, i, side="right")) - 1
        path, columns, place = self.paths[file], self.columns[file], i - self.first[file]
        try:
            with open(path, "rb") as opened:
                if stamp_of(opened) != self.stamps[file]:
                    raise UserError(f"{path}: was changed after it was opened; start again to read it anew")
                opened.seek(columns["start"][place])
                codes = decode_row(opened.readline(), self.vocab_size, self.dtypes[file])
            if len(codes) != columns["tokens"][place]:
                raise ValueError(f"{len(codes)} codes where there were {columns['tokens'][place]}")
        except (OSError, ValueError) as error:
            line = columns["line"][place]  # looked at only here: it would be another page in memory for each row
            raise UserError(f"{path}:{line}: is not as its index says ({error}): remove the index") from None
        return codes

    def lengths(self, rows):
        """How many tokens these rows (n,) have: (n,) int64."""
        if self.shortest == self.longest:
            return np.full(len(rows), self.longest)
        lengths, files = np.empty(len(rows), np.int64), np.searchsorted(self.first, rows, side="right") - 1
        for file in np.unique(files).tolist():
            lengths[files == file] = self.columns[file]["tokens"][rows[files == file] - self.first[file]]
        return lengths


def dtype_of(path, vocab_size=None):
    """The dtype of a rows file's codes, told by its first rows (a megabyte of them); said if not int32."""
    if os.path.exists(f"{path}{INFO}"):
        return "int32"  # new_rows wrote it
    with open_rows(path) as file:
        dtype = tell_dtype(file.readlines(2**20)[:1000], vocab_size)
    if dtype != "int32":
        warn(f"{path}: its codes are read as {dtype}, by their bytes (data.row_dtype would say otherwise)")
    return dtype


# ---- their indexes -------------------------------------------------------------------------------

COLUMNS = {  # of an index, an entry for each row that can be decoded
    "start": "<i8",  # its first byte in the file
    "line": "<i8",  # for messages
    "tokens": "<i4",  # how many there are in it
    "extreme": "<i8",  # the least of its codes if that is negative, else the greatest
}
BLOCK = 2**20  # bytes that are scanned at once: they stay in the processor's cache


def rows_index(path, dtype):
    """The Index of a rows file, whose codes are of a key of DTYPES. Making it reads and checks every row.

    facts   rows, tokens: their numbers; lengths, codes: [least, greatest] of them; faults: [[line, reason], …]
    """
    with open_rows(path):  # or says why not
        pass
    about = "" if dtype == "int32" else dtype
    return open_index(path, COLUMNS, functools.partial(_scan, path, dtype), warn, about)


def _scan(path, dtype, add):
    """Reads a rows file block by block: its rows to `add`, the facts about them returned."""
    counts, faults, ranges = np.zeros(2, np.int64), [], []
    with open_rows(path) as file:
        offset, line = 0, 1
        while block := file.read(BLOCK) + file.readline():  # whole lines
            found = scan_plain(block, dtype)
            lines = block.count(b"\n") if found is None else len(found[0])
            if found is None:
                found, wrong = scan_lines(block, dtype)
                faults += [(line + number, reason) for number, reason in wrong]
            start, number, tokens, extreme = found
            add(start=offset + start, line=line + number, tokens=tokens, extreme=extreme)
            if len(tokens):
                counts += len(tokens), tokens.sum()
                ranges.append((tokens.min(), tokens.max(), extreme.min(), extreme.max()))
            offset, line = offset + len(block), line + lines
    low, high = (reduce(ranges, axis=0).tolist() if ranges else [0] * 4 for reduce in (np.min, np.max))
    facts = {"rows": int(counts[0]), "tokens": int(counts[1]), "faults": listed(faults)}
    return facts | {"lengths": [low[0], high[1]], "codes": [low[2], high[3]]}


def scan_plain(block, dtype):
    """Where the rows of a block of lines start, their lines' numbers, how many tokens they have, the extreme code.

    (rows,) each; None if a line is not `{"tokens": "BASE64"}` of a whole number of codes. No loop: all
    of the base64 is decoded at once, with A (six zero bits) in place of each row's = (none).
    """
    opening = re.match(rb'\{"tokens": ?"', block)
    if not opening or not block.endswith(b'"}\n'):
        return None
    frame = b'"}\n' + opening[0]  # what stands between two rows' base64
    texts = block.split(frame)
    texts[0], texts[-1] = texts[0][len(opening[0]) :], texts[-1][:-3]
    sizes = np.fromiter(map(len, texts), np.int64, len(texts))
    if not sizes.all() or (sizes % 4).any():
        return None
    letters = np.frombuffer(bytearray().join(texts), np.uint8)
    last = np.cumsum(sizes) - 1
    ends = letters[last] == ord("=")
    ends_twice = ends & (letters[last - 1] == ord("="))
    letters[last[ends]], letters[last[ends_twice] - 1] = ord("A"), ord("A")
    try:
        data = np.frombuffer(binascii.a2b_base64(letters, strict_mode=True), np.uint8)
    except binascii.Error:
        return None
    size = np.dtype(DTYPES[dtype]).itemsize
    last = np.cumsum(sizes // 4 * 3) - 1
    tokens, odd = np.divmod(sizes // 4 * 3 - ends - ends_twice, size)
    if odd.any():
        return None
    if ends.any():
        data = np.delete(data, np.concatenate((last[ends], last[ends_twice] - 1)))
    codes, first = data.view(DTYPES[dtype]), np.cumsum(tokens) - tokens
    low, high = np.minimum.reduceat(codes, first), np.maximum.reduceat(codes, first)
    number = np.arange(len(sizes))
    return np.cumsum(sizes) - sizes + number * len(frame), number, tokens, np.where(low < 0, low, high)


def scan_lines(block, dtype):
    """The same of any lines, one by one: → (the four arrays, [(number of a line, what is wrong with it), …])."""
    rows, wrong, start = [], [], 0
    for number, line in enumerate(block.split(b"\n")):
        try:
            if line.strip():
                codes = row_codes(line, dtype)
                low, high = int(codes.min()), min(int(codes.max()), 2**63 - 1)
                rows.append((start, number, len(codes), low if low < 0 else high))
        except ValueError as error:
            wrong.append((number, str(error)))
        start += len(line) + 1
    return np.array(rows, np.int64).reshape(-1, 4).T, wrong


NO_ROWS = {  # what holds codes in another way, by its ending or how it begins
    ".npy": "is an array of numpy",
    ".npz": "holds arrays of numpy",
    ".bin": "is a stream of codes without rows (nanoGPT, Megatron)",
    ".idx": "is the index of a .bin of Megatron",
}


def open_rows(path):
    """A rows file, open in binary; a UserError if it cannot be opened, or holds no lines of JSON."""
    try:
        file = settings.open_file(path)
        start = file.read(64)
        file.seek(0)
    except (OSError, ValueError) as error:  # ValueError: a name with NUL in it
        raise UserError(f"{path}: {getattr(error, 'strerror', error)}") from None
    if what := NO_ROWS.get(Path(path).suffix.lower()):
        raise UserError(f'{path}: {what}: write a line {{"tokens": [1, 2, …]}} for each of its rows')
    if what := no_json(path, start):
        raise UserError(f"{path}: {what}")
    return file


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
        if not os.path.exists(path):
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
