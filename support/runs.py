"""A run's folder: its configuration, its metrics, its checkpoints. Both trainers write it, and write it alike.

    out/NAME/                     a run
      config.toml                 as resolved: every default that was used
      metrics.jsonl               a line every few steps
      samples/                    pictures
      tensorboard/, wandb/        the same as curves, if train.log says so
      profile_10_13.json          a trace of those steps, if train.profile says so
      step_00001000/              one checkpoint: the weights in their published layout …
        ema/                      … the same again for the averaged weights, preferred for sampling
        training/                 … and what only a resumed training needs (optimizer, discriminator)
        state.json                {"step": 1000, …}, and the sizes and checksums of all these files (whole.py)
      latest -> step_00001000     the newest complete step
      step_00000500.damaged/      one that a resume found damaged, as it was: nothing here deletes it

No torch here: train_tpu.py has none either.
"""

import contextlib
import errno
import json
import math
import os
import re
import sys
import time
import tomllib
from pathlib import Path

from tqdm import tqdm

from support import boards, checkpoint, settings, signals, whole
from support.checkpoint import atomic_file, atomic_folder, remove_parts, renamed_when_whole, step_folders, write_text
from support.settings import UserError

# ---- start -------------------------------------------------------------------------------------


def newest_step(run, kind, ranks=whole.ALONE):
    """→ (folder of the newest whole checkpoint, the content of its state.json), or (None, {"step": 0}) of a new run.

    A newer one that is damaged is named; all ranks look at it together (whole.py). A UserError if all are damaged, or
    the folder holds a run of another model.kind.
    """
    run = Path(run)
    try:
        if run.exists() and not run.is_dir():
            raise UserError(f"run.dir {run} is a file: name a folder")
    except OSError as error:  # its name is too long
        raise UserError(f"run.dir {str(run)[:40]}…: {error.strerror}") from None
    if run.absolute() == Path.cwd():
        raise UserError(f'run.dir "{run}" is the folder you are in: name one of its own')
    if (run / "config.toml").exists():
        model = settings.read(run / "config.toml").get("model")
        found = model.get("kind") if isinstance(model, dict) else None
        if found != kind:
            raise UserError(f'{run} holds a run of model.kind "{found}", not "{kind}": name another folder as run.dir')
    if (run / "latest").is_dir() and not (run / "latest").is_symlink():
        raise UserError(f"{run / 'latest'} is a folder, where a link to a step is meant: remove it")
    newest = len(step_folders(run)) and int(step_folders(run)[-1].name[5:])
    if any(list(numbers) != [newest] for numbers in ranks.gather([newest])):
        raise UserError(f"run.dir {run}: its processes see different checkpoints: all need the same disk")
    folder = checkpoint.latest_step_folder(run, ranks)
    if folder is None:
        if (run / "metrics.jsonl").exists() and not (run / "config.toml").exists():
            raise UserError(f"{run} holds a metrics.jsonl that is no run's of ours: name another folder as run.dir")
        return None, {"step": 0}
    return folder, whole.read_state(folder)


STREAMS = "keyed"  # how batches get their rows and random numbers (support/chance.py); before: "named", or nothing


def write_state(folder, step, ranks=whole.ALONE, **more):
    """Writes state.json, the last file of a step: what a resume compares, and the sizes and checksums of all others."""
    state = whole.described(folder, {"step": step, "streams": STREAMS, **more}, ranks)
    if ranks.is_main:
        checkpoint.write_json(folder / "state.json", state)


def start_run(run, s, state):
    """Makes the run's folder, its config.toml, and a metrics.jsonl that ends where the run resumes.

    state: that of the checkpoint from which it resumes, or of a new run, as newest_step returns it.
    """
    first = state["step"]
    try:
        run.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise UserError(f"run.dir {str(run)!r}: cannot be made ({reason})") from None
    remove_parts(run)
    if first and state.get("streams") != STREAMS:
        print(f"step {first} was made with an older order of the data: from here on, the batches are new ones")
    for change in changes(run, s) if first else ():
        print(f"resuming with another setting than before: {change}")
    write_text(run / "config.toml", settings.dumps(s))
    for newer in sorted(run.glob("step_*")):  # what newest_step did not take is damaged
        if re.fullmatch(r"step_[0-9]{8,}", newer.name) and int(newer.name[5:]) > first:
            set_aside(newer)
    if first:
        link_latest(run, first)
    cut_metrics(run / "metrics.jsonl", first)


def cut_metrics(log, last):
    """Takes the lines of steps after `last` out of metrics.jsonl: these steps will be run again."""
    content = settings.read_bytes(log) if log.exists() else b""
    lines = [line for line in content.split(b"\n") if line.strip()]
    steps = [_step_of(line) for line in lines]
    if None in steps[:-1]:  # of the last line, a kill may have left a part
        set_aside(log)
    kept = [line + b"\n" for line, step in zip(lines, steps, strict=True) if step is not None and step <= last]
    with atomic_file(log) as beside:
        beside.write_bytes(b"".join(kept))


def _step_of(line):
    """The step that a line of metrics.jsonl is about; None if the line is damaged."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if type(step) is int else None


@contextlib.contextmanager
def way_out(folder):
    """Within, an error that is the fault of the checkpoint `folder` says how a run goes on without it."""
    try:
        yield
    except UserError as error:
        if folder and str(error).startswith(str(folder)):
            raise UserError(f"{error}; to resume from the checkpoint before it, move {folder} away") from None
        raise


def set_aside(path):
    """Renames what is damaged to NAME.damaged, or .damaged2, …, and says so; nothing of it is removed."""
    number, aside = 1, path.with_name(f"{path.name}.damaged")
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.damaged{number}")
    os.rename(path, aside)
    print(f"{path}: is damaged; what it holds stays in {aside.name}", file=sys.stderr)


def changes(run, s, explicit_keys=None):
    """["optim.lr = 0.0001 (was 0.001)", …]: where the settings `s` differ from the run's config.toml.

    explicit_keys: the keys of [model] that are compared, where the others follow from the weights; None: all.
    """
    if not (run / "config.toml").exists():
        return []
    before = _flat(settings.read(run / "config.toml"))
    found = []
    for key, value in _flat(tomllib.loads(settings.dumps(s))).items():
        section, _, name = key.partition(".")
        follows = section == "model" and explicit_keys is not None and name.split(".")[0] not in explicit_keys
        # a key that the old file lacks is one that the program did not have yet
        if section != "run" and not follows and key in before and before[key] != value:
            found.append(f"{key} = {json.dumps(value)} (was {json.dumps(before[key], default=str)})")
    return found


def _flat(table, prefix=""):
    """{"a": {"b": 1}} → {"a.b": 1}; lists stay values."""
    flat = {}
    for name, value in table.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def already_complete(run, s, explicit_keys, first):
    """The line that a trainer prints when the run has made its train.steps already."""
    changed = changes(run, s, explicit_keys)
    hint = f"; the configuration now says otherwise, without effect: {', '.join(changed)}" if changed else ""
    return f"{run} is complete: step {first} of {s.train.steps}{hint}"


# ---- the end ---------------------------------------------------------------------------------


@contextlib.contextmanager
def ending(run, is_main=True):
    """Within, what the disk refuses is a UserError, and a signal that ends the run says what is saved: in one line."""
    try:
        yield
    except BrokenPipeError:  # whoever reads what is printed has left
        raise
    except OSError as error:
        raise UserError(f"{error.filename or run}: {error.strerror or error}{_way_out(run, error)}") from None
    except signals.Stopped as stopped:
        if is_main:
            print(f"{stopped.name}: {how_to_go_on(run)}")
        raise


def how_to_go_on(run):
    folder = checkpoint.latest_step_folder(run)
    return f"the same command goes on from {folder}" if folder else f"nothing is saved in {run} yet"


def _way_out(run, error):
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "; you need the right to write there: with it, the same command goes on from the last checkpoint"
    if not os.path.exists(run / "config.toml"):
        return f"; {run} was deleted or moved away: move it back, or begin again with the same command"
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"; {'free some space on that disk' if is_full else 'mend that'}: {how_to_go_on(run)}"


# ---- on the way --------------------------------------------------------------------------------


class Log:
    """metrics.jsonl, curves (boards.py), the progress bar; and which steps are logged, evaluated, saved.

    Steps are counted when they are done, 1 … train.steps; after the last one everything happens once more.

        log = Log(run, train, first, unit="tokens", items=tokens_per_step)
        for batch in log.waiting(batches):
            …
            if log.due(done):
                entry = log.entry(done, values)
                if log.evaluates(done):
                    with log.paused():
                        entry |= …
                log.write(entry)
            log.advance()
        log.close()

    Beside the trainer's values an entry has "…_per_second", "waiting_seconds", in which the loop had no batch (since
    the entry before), and "memory_gb", the most that was in use so far: of the process, if `measured` knows no better.

    first: the step at which the run begins; items: how many `unit` a step works through; is_main: only the main
    process writes and prints; measured: (seconds of a step) → {name: value}, what the trainer knows of its device.
    """

    def __init__(self, run, train, first, unit, items, is_main=True, measured=lambda seconds: {}):
        self.run, self.train, self.unit, self.items, self.is_main = run, train, unit, items, is_main
        if is_main:
            (run / "metrics.jsonl").touch()
        self.board = boards.open_board(train.log, run, first) if is_main else None
        self.bar = tqdm(total=train.steps, initial=first, disable=not is_main, unit="step", dynamic_ncols=True)
        self.skipped, self.last_skipped = 0, -1  # steps in a row that were skipped, the last of them
        self.clock, self.since = time.perf_counter(), first  # when the rate was last measured, and after which step
        self.measured, self.waited = measured, 0.0

    def evaluates(self, done):
        return self._every(self.train.eval_every, done)

    def saves(self, done):
        return self._every(self.train.save_every, done)

    def samples(self, done):
        return self._every(self.train.sample_every, done)

    def due(self, done):
        """Whether step `done` gets a line: every log_every steps, and wherever it is evaluated or saved."""
        return self._every(self.train.log_every, done) or self.evaluates(done) or self.saves(done)

    def _every(self, interval, done):
        return bool(interval) and (done % interval == 0 or done == self.train.steps)

    def entry(self, done, values):
        """{"step": done, **values, "…_per_second": …}; a UserError that stops the run if a value is not finite."""
        entry = {"step": done, **values}
        if bad := not_finite(entry):
            good = checkpoint.latest_step_folder(self.run) or "none was saved"
            raise UserError(f"step {done}: {bad}; stopped. Try a lower optim.lr (last good checkpoint: {good})")
        now = time.perf_counter()
        steps, seconds = done - self.since, now - self.clock
        entry |= {f"{self.unit}_per_second": round(steps * self.items / seconds, 1)}
        entry |= {"waiting_seconds": round(self.waited, 4)} | resident_memory() | self.measured(seconds / steps)
        self.waiting_share = self.waited / seconds
        self.clock, self.since, self.waited = now, done, 0.0
        return entry

    def waiting(self, batches, is_idle=lambda: True):
        """The batches; counts the seconds until one comes, if the device (is_idle) had nothing to do by then.

        The first one does not count: everything begins with waiting for it.
        """
        batches = iter(batches)
        yield next(batches)
        began = time.perf_counter()
        for batch in batches:
            if is_idle():
                self.waited += time.perf_counter() - began
            yield batch
            began = time.perf_counter()

    @contextlib.contextmanager
    def paused(self):
        """The time spent within does not count: the rate is that of training alone."""
        start = time.perf_counter()
        yield
        self.clock += time.perf_counter() - start

    def write(self, entry):
        """A line of metrics.jsonl, and the same on the terminal."""
        if not self.is_main:
            return
        self._append(entry)
        done, rate = entry["step"], entry[f"{self.unit}_per_second"]
        loss = f"loss {entry['loss']:.4f}, " if "loss" in entry else ""  # a skipped step has none
        postfix = f"{loss}{rate:,.0f} {self.unit}/s"
        if self.waiting_share > 0.1:
            postfix += f", waiting for data {self.waiting_share:.0%}: more data.workers or smaller pictures"
        self.bar.set_postfix_str(postfix)
        values = {name: value for name, value in entry.items() if name != "step"}
        if self.evaluates(done):
            self.bar.write(f"step {done}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
        if self.board:
            self.board.scalars(done, values)

    def picture(self, done, file):
        """Shows a sheet of samples with the curves, if there are any."""
        if self.board:
            self.board.picture(done, file)

    def _append(self, entry):
        """A line of metrics.jsonl. The file is opened anew each time: what became of it would not be seen otherwise."""
        (self.run / "metrics.jsonl").stat()  # an OSError if the run's folder is gone
        with open(self.run / "metrics.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")

    def skip(self, done, why):
        """Counts and logs a step that was skipped; a UserError after train.max_skipped of them in a row."""
        self.skipped = self.skipped + 1 if done == self.last_skipped + 1 else 1
        self.last_skipped = done
        if self.is_main:
            self.bar.write(f"step {done} is skipped: {why}", file=sys.stderr)
            self._append({"step": done, "skipped": self.skipped, "why": why})
        if self.skipped >= self.train.max_skipped:
            raise UserError(
                f"step {done}: {why}; stopped after skipping {self.skipped} in a row (train.max_skipped). Look at "
                f'these rows, try a lower optim.lr or optim.clip, or train.dtype = "float32"; {how_to_go_on(self.run)}'
            )

    def advance(self):
        """The progress bar, by one step."""
        self.bar.update()

    def close(self):
        self.bar.close()
        if self.board:
            self.board.close()


def resident_memory():
    """{"memory_gb": the most memory that this process has had}; {} where the system does not say."""
    try:
        import resource
    except ImportError:  # on Windows
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"memory_gb": round(peak * (1 if sys.platform == "darwin" else 1024) / 1e9, 3)}  # Linux counts in KiB


def not_finite(values):
    """ "loss is nan, grad_norm is inf": which of the numbers {name: number} are not finite."""
    return ", ".join(f"{name} is {float(value)}" for name, value in values.items() if not math.isfinite(value))


def batches(step, accumulate):
    """ "batches 6 to 7": the numbers of a step's batches in the run."""
    first = step * accumulate
    return f"batch {first}" if accumulate == 1 else f"batches {first} to {first + accumulate - 1}"


# ---- checkpoints -------------------------------------------------------------------------------


@contextlib.contextmanager
def new_step(run, step, keep=0):
    """Gives a folder to fill, which then appears whole as run/step_XXXXXXXX; the `keep` newest stay (0: all).

    Damaged steps are not counted.
    """
    folder = Path(run) / f"step_{step:08d}"
    with atomic_folder(folder) as beside:
        yield beside
    link_latest(run, step)
    good = 0
    for old in reversed(step_folders(run)) if keep else ():
        if good >= keep:
            checkpoint.remove_folder(old)
        good += whole.trouble(old) is None


def link_latest(run, step):
    with renamed_when_whole(Path(run) / "latest") as beside:
        beside.symlink_to(f"step_{step:08d}")
