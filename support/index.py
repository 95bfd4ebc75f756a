"""Indexes: what reading a large file once has told of it, kept beside it.

    rows.jsonl ── scan ──▶ columns of numbers (where each row begins, …), facts ──▶ rows.jsonl.index

    FILE.index      {"picturebook index": 1, "file": [its size, when it was changed], "columns": …, "facts": …}⏎
                    the bytes of the columns, one after the other: they are mapped to memory
                    the CRC-32 of all this, in 8 bytes

The checksum of an index beyond CHECKED bytes is not compared, so that opening it costs nothing;
whoever reads FILE at the places that it names looks at what is there. An index belongs to the file
that has this size and this time of change: of another one it is made anew. It may be deleted.
Where none can be written beside FILE, it is an unnamed temporary file.
"""

import contextlib
import json
import mmap
import os
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.checkpoint import atomic_file
from support.settings import UserError, open_file, parse_json

ENDING = ".index"
CHECKED = 64 << 20  # bytes: read in a twentieth of a second
SIGN = b'{"picturebook index": 1, '  # how the file begins; 1: of what is in it
OTHERS, STALE = "is no index", "has changed, or its index was damaged: the index was made anew"
_told = set()  # folders in which no index can be kept


class Index(NamedTuple):
    facts: dict
    columns: dict  # {name: array of whole numbers}


def stamp_of(opened):
    """What tells whether an open file has been changed: [its size, when it was written]."""
    status = os.fstat(opened.fileno())
    return [status.st_size, status.st_mtime_ns]


def open_index(path, dtypes, scan, report, about=""):
    """The Index of the file at `path`: the one beside it, or a new one.

    dtypes   {column: numpy dtype}
    scan     (add) → facts, for JSON; add(column=array, …) puts numbers to the ends of columns
    report   is called with a line about an index that is made anew, or cannot be kept
    about    what the scan depends on beside the file: each has its own index, FILE.ABOUT.index
    """
    file = Path(f"{path}.{about}{ENDING}" if about else f"{path}{ENDING}")
    with open_file(path) as opened:  # or an OSError says why not
        stamp = stamp_of(opened)
    index, wrong = _read(file, stamp, dtypes)
    if index:
        return index
    folder = file.parent if os.access(file.parent, os.W_OK) else None
    with contextlib.ExitStack() as stack:
        parts = {name: stack.enter_context(tempfile.TemporaryFile(dir=folder)) for name in dtypes}

        def add(**columns):
            for name, values in columns.items():
                parts[name].write(np.ascontiguousarray(values, dtypes[name]).data)

        facts = scan(add)
        try:
            if wrong == OTHERS:
                raise UserError(f"{file}: {OTHERS}")
            with atomic_file(file) as beside, open(beside, "w+b") as out:
                _write(out, stamp, facts, parts)
                index = _parse(out, stamp, dtypes)
            if wrong:
                report(f"{path}: {wrong}")
        except (OSError, UserError) as error:
            if file.parent not in _told:
                _told.add(file.parent)
                report(f"{path}: no index can be kept beside it, so every start reads it all again ({error})")
            with tempfile.TemporaryFile() as out:
                _write(out, stamp, facts, parts)
                index = _parse(out, stamp, dtypes)
    return index


def _read(file, stamp, dtypes):
    """→ (the Index in a file or None, what is wrong with the file: "" if there is none)."""
    try:
        with open_file(file) as opened:
            if opened.read(len(SIGN)) != SIGN:
                return None, OTHERS
            return _parse(opened, stamp, dtypes), ""
    except (FileNotFoundError, NotADirectoryError):
        return None, ""
    except OSError:
        return None, OTHERS
    except (ValueError, KeyError, TypeError):
        return None, STALE


def _parse(file, stamp, dtypes):
    """The Index in an open file; a ValueError, KeyError or TypeError if it is damaged, or of another stamp."""
    file.seek(0)
    header = parse_json(file.readline())
    if header["file"] != stamp:
        raise ValueError(STALE)
    begins, columns = file.tell(), {}
    file.flush()
    whole = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    if len(whole) <= CHECKED and zlib.crc32(whole[:-8]) != int.from_bytes(whole[-8:].tobytes(), "little"):
        raise ValueError("its checksum differs")
    for name, dtype in dtypes.items():
        size = header["columns"][name]
        columns[name] = whole[begins : begins + size].view(dtype)
        begins += size + -size % 8
    if begins != len(whole) - 8:
        raise ValueError("its end is missing")
    return Index(header["facts"], columns)


def _write(out, stamp, facts, parts):
    """Writes an index; parts: {column: open file of its numbers}."""
    sizes = {name: part.seek(0, os.SEEK_END) for name, part in parts.items()}
    header = SIGN + json.dumps({"file": stamp, "columns": sizes, "facts": facts})[1:].encode()
    checksum = 0
    for piece in _pieces(header + b" " * (-(len(header) + 1) % 8) + b"\n", sizes, parts):
        out.write(piece)
        checksum = zlib.crc32(piece, checksum)
    out.write(checksum.to_bytes(8, "little"))
    out.flush()


def _pieces(header, sizes, parts):
    """Yields the bytes of an index, but for its checksum; numbers lie at multiples of 8 bytes."""
    yield header
    for name, part in parts.items():
        part.seek(0)
        while data := part.read(2**20):
            yield data
        yield bytes(-sizes[name] % 8)


MOST_FAULTS = 10**5


def listed(faults):
    """[(place in the file, reason), …], as an index lists them: of very many, the last entry counts the rest."""
    more = len(faults) - MOST_FAULTS
    return [*faults[:MOST_FAULTS], (faults[-1][0], f"the last of {more} more broken rows")] if more > 0 else faults


def is_index(name, names):
    """Whether a file of this name is the index of one of `names`, files in the same folder."""
    indexed = name.removesuffix(ENDING)
    return indexed != name and (indexed in names or os.path.splitext(indexed)[0] in names)
