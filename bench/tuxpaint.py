"""Does a real captioned set go through whole? Tux Paint's stamps: check, tokenize, a CLIP of emoji_clip's size.

    apt-get download tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default_*.deb out/stamps   # 161 MB, GPL-2
    python bench/tuxpaint.py out/stamps/usr/share/tuxpaint/stamps

Nothing was made for us there: 796 pictures of many sizes with transparency, captions with 100 translations below
them, sounds and drawings between them. A tiny VQGAN is trained on them to have codes to write. Two cores: 8 minutes.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support import settings
from support.options import positive_int
from support.settings import UserError

ROOT = Path(__file__).resolve().parent.parent
BATCH = 64


def run(program, *arguments):
    """One of our programs, its output shown as it comes; a UserError if it fails."""
    print(f"\n$ python {program} {' '.join(map(str, arguments))}", flush=True)
    done = subprocess.run([sys.executable, ROOT / program, *map(str, arguments)], stderr=subprocess.PIPE, text=True)
    # progress bars are drawn over themselves: what is left are the lines that warn
    said = [line for line in done.stderr.splitlines() if line.startswith(("skipped", "error")) or "not read" in line]
    print("\n".join(said), flush=True)
    if done.returncode:
        raise UserError(f"{program} failed")


def main():
    parser = settings.Parser(prog="python bench/tuxpaint.py", description=__doc__)
    parser.add_argument("stamps", help="the folder stamps of the package")
    parser.add_argument("--out", default=str(ROOT / "out" / "tuxpaint"), help="where runs and rows go")
    parser.add_argument("--steps", type=positive_int, default=40, help="of the CLIP (40)")
    a = parser.parse_args()
    configs, out = ROOT / "configs", Path(a.out)
    run("prepare.py", "check", a.stamps)

    data = ["data.held_out_fraction=0.1", "train.dtype=float32", "train.compile=false"]
    pictures = f'data.sources=[{{path = "{a.stamps}", kind = "colorization"}}]'
    run("train.py", "--config", configs / "tiny_vqgan.toml", f"run.dir={out / 'vqgan'}", pictures, *data)
    rows = ["--tokenizer", out / "vqgan", "--out", out / "rows.jsonl", pictures, "data.pictures=16", data[0]]
    run("prepare.py", "tokenize", "--config", configs / "tiny_vqgan.toml", *rows)
    run("prepare.py", "check", out / "rows.jsonl")

    steps = [f"train.steps={a.steps}", f"train.batch_size={BATCH}", f"train.eval_every={a.steps}"]
    steps += ["train.eval_batches=1", "optim.warmup_steps=20"]
    captions = [f'data.sources=[{{path = "{a.stamps}"}}]', f"run.dir={out / 'clip'}"]
    run("train.py", "--config", configs / "emoji_clip.toml", *captions, *steps, *data)
    last = json.loads((out / "clip" / "metrics.jsonl").read_text().splitlines()[-1])
    print(f"\nCLIP, held-out loss after {a.steps} steps: {last['held_out_loss']:.3f} (by chance {math.log(BATCH):.3f})")


if __name__ == "__main__":
    settings.run_main(main)
