"""A run's folder: its configuration, its metrics, its checkpoints.

out/NAME/                     a run
  config.toml                 as resolved
  metrics.jsonl               a line every few steps
  step_00001000/              one checkpoint: the weights in their published layout …
    ema/                      … the same again for the averaged weights, preferred for sampling
    training/                 … and what only a resumed training needs (optimizer, discriminator)
    state.json
  latest -> step_00001000     the newest complete step
"""

import contextlib
import json
import shutil
from pathlib import Path

from support import settings
from support.checkpoint import atomic_folder, remove_parts, renamed_when_whole, step_folders, write_text


def start_run(run, s, first):
    """Makes the run's folder, its config.toml, and a metrics.jsonl that ends where the run resumes: step `first`."""
    run.mkdir(parents=True, exist_ok=True)
    remove_parts(run)
    text = settings.dumps(s)
    if first and (run / "config.toml").exists():
        before = (run / "config.toml").read_text().splitlines()
        for line in text.splitlines():
            if line not in before:
                print(f"resuming with another setting than before: {line}")
    write_text(run / "config.toml", text)
    log = run / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    # a kill may have cut the last line short, and steps after the checkpoint will be run again
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= first]
    write_text(log, "".join(line + "\n" for line in kept))


@contextlib.contextmanager
def new_step(run, step, keep=0):
    """Gives a folder to fill, which then appears whole as run/step_XXXXXXXX; the `keep` newest stay (0: all)."""
    folder = Path(run) / f"step_{step:08d}"
    with atomic_folder(folder) as beside:
        yield beside
    with renamed_when_whole(Path(run) / "latest") as beside:
        beside.symlink_to(folder.name)
    for old in step_folders(run)[:-keep] if keep else []:
        shutil.rmtree(old)
