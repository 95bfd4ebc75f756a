"""How long a run's start takes, whatever the size of its data: the first time, and when the indexes are there.

    python bench/startup.py --out FOLDER [--rows 10000000 --tars 1000]

Writes rows of tokens to FOLDER (10 million of about 1 KB: 100 to 273 codes each, from 10,000 different ones) and
tars (1,000 of 1,000 members: pictures and captions), opens each twice, every time in a process of its own, prints
seconds and the most memory that was used (mapped files included), and deletes what it wrote. The files were just
written, so as much of them as fits is read from memory, not from the disk.
"""

import argparse
import io
import json
import resource
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import TokenRows
from support import files
from support.sources import open_source
from support.token_rows import encode_row


def write_rows(folder, count):
    random = np.random.default_rng(0)
    some = "".join(encode_row(random.integers(0, 8192, random.integers(100, 274))) for _ in range(10_000)).encode()
    with open(folder / "rows.jsonl", "wb") as file:
        for _ in range(count // 10_000):
            file.write(some)


def write_tars(folder, count):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(picture, "jpeg")
    first = folder / "00000.tar"
    with tarfile.open(first, "w") as archive:
        for key in range(500):
            for ending, data in ((".jpg", picture.getvalue()), (".txt", b"a red square")):
                member = tarfile.TarInfo(f"{key:09d}{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    for number in range(1, count):
        shutil.copy(first, folder / f"{number:05d}.tar")


def open_rows(folder):
    """Opens the rows as a run does, and reads a batch at the beginning and one in the middle of the first epoch."""
    path, began = folder / "rows.jsonl", time.process_time()
    rows, seconds = timed(lambda: TokenRows([path], context=2048, batch_size=64, seed=0, vocab_size=8192))
    found = {"opening": seconds, "of them computing": time.process_time() - began}
    found["MB/s"] = path.stat().st_size / 1e6 / seconds
    found["first batch"] = timed(lambda: rows.batch(0, range(64)))[1]
    found["memory, MB"] = memory()
    found["batch in the middle"] = timed(lambda: rows.batch(rows.tokens // 2 // (64 * 2048), range(64)))[1]
    return found


def open_tars(folder):
    began = time.process_time()
    names, seconds = timed(lambda: files.tar_files(files.matches(f"{folder}/*.tar"), print))
    computing = time.process_time() - began
    return {"opening": seconds, "of them computing": computing, "members": len(names), "memory, MB": memory()}


def open_pictures(folder):
    """What a run does with the members: it finds out which of them belong together."""
    source, seconds = timed(lambda: open_source(f"{folder}/*.tar", 64))
    return {"opening": seconds, "of them computing": time.process_time(), "pictures": len(source)}


def timed(function):
    began = time.perf_counter()
    result = function()
    return result, time.perf_counter() - began


def memory():
    """The most that this process has held so far, in MB, mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


OPEN = {"rows": open_rows, "tars": open_tars, "pictures": open_pictures}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="a folder that does not exist yet, on the disk to measure"
    )
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--tars", type=int, default=1000)
    parser.add_argument("--open", choices=OPEN, help=argparse.SUPPRESS)  # what a process of its own does
    a = parser.parse_args()
    if a.open:
        print(json.dumps(OPEN[a.open](a.out)))
        return
    a.out.mkdir(parents=True)
    try:
        for write, count, openings in (
            (write_rows, a.rows, ["rows"] * 2),
            (write_tars, a.tars, ["tars", "tars", "pictures"]),
        ):
            if not count:
                continue
            write(a.out, count)
            print(f"{count:,} {openings[0]}, {sum(file.stat().st_size for file in a.out.iterdir()) / 1e9:.2f} GB")
            for number, what in enumerate(openings, 1):
                command = [sys.executable, __file__, "--out", a.out, "--open", what]
                said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found = ", ".join(f"{name} {value:,.2f}" for name, value in json.loads(said.splitlines()[-1]).items())
                print(f"  {number}, {what}: {found}", flush=True)
            for file in a.out.iterdir():
                file.unlink()
    finally:
        shutil.rmtree(a.out)


if __name__ == "__main__":
    main()
