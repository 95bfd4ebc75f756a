"""Is a checkpoint whole? Its state.json says what its other files were when they had been written.

    out/NAME/step_00001000/state.json
        {"step": 1000, …, "files": {"model.safetensors": "4400000000 bytes, CRC-32 89abcdef", …}, "crc32": 305419896}

    write_step ─ described ─▶ state.json        sizes and checksums of all other files, and one of the table itself
    a resume ─── trouble ───▶ None, or a line   sizes and checksums of all: what a run goes on from is read anyway
    sample.py ── trouble ───▶ None, or a line   sizes of what it opens; of no file is a byte read for it

A file's checksum is the CRC-32 of the CRC-32s of its pieces, so that all cores of all processes can share the work.
Steps that were written before there were checksums have neither entry, and open.
"""

import json
import os
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

from support.settings import UserError, read_json

PIECE = 64 << 20  # bytes
FILE = r"\d{1,18} bytes, CRC-32 [0-9a-f]{8}"  # as state.json describes one
# Which of several processes this is, and how they exchange numbers: (integers) → [those of rank 0, of rank 1, …]
ALONE = SimpleNamespace(rank=0, world=1, is_main=True, gather=lambda numbers: [numbers], wait=lambda: None)


def crc32(path, begin, size):
    """The CRC-32 of `size` bytes of a file (or of fewer, where it ends)."""
    value = 0
    with open(path, "rb", buffering=0) as file:
        file.seek(begin)
        while data := file.read(min(size, 1 << 20)):
            value = zlib.crc32(data, value)
            size -= len(data)
    return value


def checksums(folder, sizes, ranks):
    """{file: bytes} → {file: checksum}. The pieces are dealt out to all ranks, who all must call this."""

    def sum_of(piece):
        name, begin = piece
        try:
            return crc32(folder / name, begin, PIECE)
        except OSError:  # a disk that cannot read it: no checksum fits
            return 0

    pieces = []
    for name, size in sizes.items():
        pieces += [(name, begin) for begin in range(0, size, PIECE)]
    found = [0] * len(pieces)
    with ThreadPoolExecutor() as pool:
        found[ranks.rank :: ranks.world] = pool.map(sum_of, pieces[ranks.rank :: ranks.world])
    found, sums = ranks.gather(found), dict.fromkeys(sizes, 0)
    for number, (name, _) in enumerate(pieces):
        piece = int(found[number % ranks.world][number])
        sums[name] = zlib.crc32(piece.to_bytes(4, "little"), sums[name])
    return sums


def described(folder, state, ranks):
    """The content of a step's state.json, with what all other files in its folder are; all ranks must call this.

    What they have written is on the disk then. While that is waited for, the processor computes checksums.
    """
    ranks.wait()  # until all have written: half-written files lie beside theirs
    with ThreadPoolExecutor(1) as pool:
        flushed = pool.submit(flush, files_in(folder))
        if ranks.world > 1:  # the others read what this one has written, perhaps on another machine
            flushed.result()
            ranks.wait()
        sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files_in(folder)}
        sums = checksums(folder, sizes, ranks)
        flushed.result()
    state = state | {"files": {name: f"{size} bytes, CRC-32 {sums[name]:08x}" for name, size in sizes.items()}}
    return state | {"crc32": _crc32_of(state)}


def files_in(folder):
    return sorted(file for file in folder.rglob("*") if file.is_file())


def flush(files):
    """Returns when these files are on the disk."""
    for file in files:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def _crc32_of(table):
    return zlib.crc32(json.dumps(table, sort_keys=True).encode())


def read_state(folder):
    """The content of a step's state.json; a UserError if it is not what was written, or belongs to another step."""
    file = folder / "state.json"
    state = read_json(file)
    step = state.get("step") if isinstance(state, dict) else None
    if type(step) is not int or step < 0:
        raise UserError(f"{file}: step is {step!r:.60}, expected the number of steps that were made")
    if f"step_{step:08d}" != folder.name:
        raise UserError(f"{file}: step is {step!r:.60}, in the folder of another")
    if "files" in state or "crc32" in state:
        written = state.pop("crc32", None)
        if written != _crc32_of(state) or not _is_table(state.get("files")):
            raise UserError(f"{file}: is not what was written (its checksum differs)")
    return state


def _is_table(files):
    return isinstance(files, dict) and all(re.fullmatch(FILE, str(text)) for text in files.values())


def trouble(folder, ranks=None, sampled=False):
    """What is wrong with a step's folder, a line that names the file; None: nothing that can be told.

    ranks: with them, checksums are compared as well, and all must call this. sampled: what a resume alone needs may be
    missing.
    """
    try:
        if sampled and not (folder / "state.json").exists():
            return None if any(folder.iterdir()) else f"{folder}: is empty"
        files = read_state(folder).get("files", {})
        sizes = {name: int(text.partition(" ")[0]) for name, text in files.items()}
        for name, size in sizes.items():
            found = (folder / name).stat().st_size if (folder / name).is_file() else None
            if found != size and not (sampled and name.startswith("training/")):
                what = "is missing" if found is None else f"has {found:,} bytes"
                return f"{folder / name}: {what}, {size:,} were written"
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{folder}: {error.strerror}"
    for name, value in checksums(folder, sizes, ranks).items() if ranks else ():
        if not files[name].endswith(f"{value:08x}"):
            return f"{folder / name}: is not what was written (its checksum differs)"
    return None
