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


def write_rows(path, count):
    random = np.random.default_rng(0)
    some = "".join(encode_row(random.integers(0, 8192, random.integers(100, 274))) for _ in range(10_000)).encode()
    with open(path, "wb") as file:
        for _ in range(count // 10_000):
            file.write(some)


def write_tars(folder, count):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(picture, "jpeg")
    for number in range(count):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as archive:
            for key in range(500):
                for ending, data in ((".jpg", picture.getvalue()), (".txt", b"a red square")):
                    member = tarfile.TarInfo(f"{number:05d}{key:04d}{ending}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))


def open_rows(path):
    """Opens the rows as a run does, and reads a batch at the beginning and one in the middle of the first epoch."""
    began = time.process_time()
    rows, seconds = timed(lambda: TokenRows([path], context=2048, batch_size=64, seed=0, vocab_size=8192))
    found = {"opening": seconds, "of them computing": time.process_time() - began}
    found["MB/s"] = Path(path).stat().st_size / 1e6 / seconds
    found["first batch"] = timed(lambda: rows.batch(0, range(64)))[1]
    found["memory, MB"] = memory()
    found["batch in the middle"] = timed(lambda: rows.batch(rows.tokens // 2 // (64 * 2048), range(64)))[1]
    return found


def open_tars(folder):
    names, seconds = timed(lambda: files.tar_files(files.matches(f"{folder}/*.tar"), print))
    found = {"opening": seconds, "members": len(names), "memory, MB": memory()}
    del names
    found["as a source of pictures"] = timed(lambda: open_source(f"{folder}/*.tar", 64))[1]
    return found


def timed(function):
    began = time.perf_counter()
    result = function()
    return result, time.perf_counter() - began


def memory():
    """The most that this process has held so far, in MB, mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="a folder that does not exist yet, on the disk to measure"
    )
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--tars", type=int, default=1000)
    parser.add_argument("--open", choices=("rows", "tars"), help=argparse.SUPPRESS)  # what a process of its own does
    a = parser.parse_args()
    if a.open:
        print(json.dumps(open_rows(a.out / "rows.jsonl") if a.open == "rows" else open_tars(a.out)))
        return
    a.out.mkdir(parents=True)
    try:
        for what, write, count in (("rows", lambda n: write_rows(a.out / "rows.jsonl", n), a.rows),
                                   ("tars", lambda n: write_tars(a.out, n), a.tars)):  # fmt: skip
            if not count:
                continue
            write(count)
            size = sum(file.stat().st_size for file in a.out.iterdir())
            print(f"{what}: {count:,}, {size / 1e9:.2f} GB")
            for title in ("first", "second"):
                command = [sys.executable, __file__, "--out", a.out, "--open", what]
                said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found = ", ".join(f"{name} {value:,.2f}" for name, value in json.loads(said.splitlines()[-1]).items())
                print(f"  {title}: {found}")
            for file in a.out.iterdir():
                file.unlink()
    finally:
        shutil.rmtree(a.out)


if __name__ == "__main__":
    main()
