"""A run that is told to end, meets a NaN, loses a rank or its disk: a step is lost at most; a line says what to do."""

import contextlib
import errno
import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, run_tiny
from kill import test as kill
from test_train import ENVIRONMENT, assert_same_bits, bits, metrics, refused

import tasks
import train
from support import checkpoint, signals
from support.token_rows import encode_row

SIGNALS = {signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGINT: 130}


def steps(run):
    return [int(folder.name[5:]) for folder in checkpoint.step_folders(run)]


def at_call(monkeypatch, owner, name, number, do):
    """Has `do` run before the call of that number (from 1 on) of a function or method."""
    calls, call = itertools.count(1), getattr(owner, name)

    def calling(*arguments, **options):
        if next(calls) == number:
            do()
        return call(*arguments, **options)

    monkeypatch.setattr(owner, name, calling)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The [data] and [model] of a tiny LLaMA, without a tokenizer."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    codes = np.random.default_rng(0).integers(0, 64, (64, 64))
    file.write_text("".join(map(encode_row, codes)))
    return [f'data.rows=["{file}"]', "data.held_out=[]", "data.tokenizer=", "model.max_seq_len=64"]


# ---- signals ---------------------------------------------------------------------------------

# a tiny VQGAN without a GAN on tiny pictures: 12 steps, saved after 4, 8 and 12, evaluated and sampled after 6 and 12
LIGHT = ["loss.gan=0", "data.side=16", "train.batch_size=2", "train.accumulate=2", "train.keep=0"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return run_tiny("vqgan", tmp_path_factory.mktemp("unbroken") / "run", *LIGHT)


PHASES = {  # what is called in each, the how-manieth call in a run, the step that must be saved
    "start": (tasks.VQGANTask, "open_data", 1, None),
    "step": (tasks.VQGANTask, "loss", 9, 5),
    "evaluation": (tasks.VQGANTask, "measure", 1, 6),
    "sampling": (tasks.VQGANTask, "reconstruct", 1, 6),
    "saving": (train, "write_step", 2, 9),  # the second is that after step 8
}


CASES = [*((phase, signal.SIGTERM) for phase in PHASES), ("step", signal.SIGHUP), ("step", signal.SIGINT)]


@pytest.mark.parametrize(("phase", "number"), CASES)
def test_a_signal_loses_nothing_in_any_phase(phase, number, unbroken, tmp_path, monkeypatch, capsys):
    """The step is finished, and saved; a start, an evaluation or a sample is broken off. Then the run goes on."""
    owner, name, call, saved = PHASES[phase]
    run = tmp_path / "run"
    at_call(monkeypatch, owner, name, call, lambda: os.kill(os.getpid(), number))
    with pytest.raises(signals.Stopped) as stopped:
        run_tiny("vqgan", run, *LIGHT)
    monkeypatch.undo()
    assert stopped.value.code == SIGNALS[number]
    goes_on = f"the same command goes on from {run}/step_{saved:08d}" if saved else f"nothing is saved in {run} yet"
    assert capsys.readouterr().out.endswith(f"{number.name}: {goes_on}\n")
    assert (steps(run) or [None])[-1] == saved and not list(run.rglob(".*.part.*"))
    if number == signal.SIGTERM:
        run_tiny("vqgan", run, *LIGHT)
        assert_same_bits(run / "step_00000012", unbroken / "step_00000012")


def child(do):
    """The exit code of a process that does this."""
    pid = os.fork()
    if pid == 0:
        do()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize(("first", "second"), [("SIGTERM", "SIGINT"), ("SIGINT", "SIGINT"), ("SIGINT", "SIGHUP")])
def test_the_second_signal_ends_it_at_once(first, second):
    def twice():
        with signals.Stop() as stop:
            stop.waits = True
            os.kill(os.getpid(), signal.Signals[first])
            os.kill(os.getpid(), signal.Signals[second])

    assert child(twice) == SIGNALS[signal.Signals[second]]


def test_a_signal_that_comes_two_ways_is_one(monkeypatch):
    """A scheduler tells torchrun and each of its processes, and torchrun passes it on."""

    def twice():
        with signals.Stop() as stop:
            stop.waits = True
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            monkeypatch.setattr(signals, "ECHO", 0.0)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(1)

    with signals.Stop() as stop:
        stop.waits = True
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
        stop.number = 0  # still here
    assert child(twice) == SIGNALS[signal.SIGTERM]


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.number
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_system_without_sighup_has_the_other_signals(monkeypatch):
    number = signal.SIGHUP
    monkeypatch.delattr(signal, "SIGHUP")
    with signals.Stop() as stop:
        assert number not in stop.before and signal.SIGTERM in stop.before


# ---- numbers that are not finite -------------------------------------------------------------

EVERY_STEP = ["train.save_every=1", "train.eval_every=0", "train.sample_every=0", "train.keep=0"]


def spoil(monkeypatch, task, steps, phase=None, how=lambda loss, module: loss * math.nan):
    """Spoils the loss of the last microstep of these steps."""
    loss_of = task.loss

    def loss(self, phase_now, module, batch, step, microstep):
        loss, logged = loss_of(self, phase_now, module, batch, step, microstep)
        is_last = microstep + 1 == self.config.train.accumulate
        bad = step + 1 in steps and is_last and phase in (None, phase_now)
        return how(loss, module) if bad else loss, logged

    monkeypatch.setattr(task, "loss", loss)


@pytest.mark.parametrize("phase", ["generator", "discriminator"])
def test_a_step_that_is_not_finite_in_one_phase_changes_nothing_in_any(phase, tmp_path, monkeypatch, capsys):
    """Weights, averages, moments, batch norms, the counts of codes: those of both phases, and they go on from there."""
    spoil(monkeypatch, tasks.VQGANTask, [2], phase)
    gan = ["loss.gan=0.8", "loss.disc_start=0", "loss.disc_warmup=0", "data.side=32", "train.steps=3"]
    run = run_tiny("vqgan", tmp_path / "run", *LIGHT, *gan, *EVERY_STEP)
    assert_same_bits(run / "step_00000001", run / "step_00000002")
    before, after = bits(run / "step_00000002"), bits(run / "step_00000003")
    assert sum(not torch.equal(before[name], after[name]) for name in before) > 0.9 * len(before)
    [line] = [entry for entry in metrics(run) if "skipped" in entry]
    name = "loss" if phase == "generator" else "discriminator_loss"
    assert (line["step"], line["skipped"]) == (2, 1) and line["why"].startswith(f"{name} is nan")
    assert line["why"].endswith("(rank 0, batches 2 to 3, rows 0 to 1)")
    assert f"step 2 is skipped: {line['why']}" in capsys.readouterr().err


def test_a_gradient_that_is_not_finite_is_skipped_though_the_loss_is(rows, tmp_path, monkeypatch):
    def steep(loss, module):  # the root of zero
        return loss + (0 * next(module.parameters()).sum()).sqrt()

    spoil(monkeypatch, tasks.LLaMATask, [2], how=steep)
    run = run_tiny("llama", tmp_path / "run", *EVERY_STEP, "train.steps=2", "train.ema=0.9", *rows)
    assert_same_bits(run / "step_00000001", run / "step_00000002")
    assert metrics(run)[1]["why"].startswith("grad_norm is nan (rank 0")


def test_too_many_in_a_row_stop_the_run(rows, tmp_path, monkeypatch):
    spoil(monkeypatch, tasks.LLaMATask, [2, 4, 5, 6, 7])
    many = ["train.max_skipped=3", "train.save_every=3", "train.eval_every=0", "train.sample_every=0"]
    message = refused(run_tiny, "llama", tmp_path / "run", *many, *rows)
    assert message.startswith("step 6: loss is nan, grad_norm is nan (rank 0, batches 10 to 11, rows 0 to 3); stopped")
    assert "optim.lr" in message and message.endswith(f"goes on from {tmp_path}/run/step_00000003")
    assert [entry["skipped"] for entry in metrics(tmp_path / "run") if "skipped" in entry] == [1, 1, 2, 3]


def test_moments_that_are_not_finite_are_not_saved(rows, tmp_path, monkeypatch):
    def spoil_moments(task, optimizers, *rest):
        optimizer = optimizers["model"]
        next(iter(optimizer.state.values()))["exp_avg_sq"].fill_(math.inf)

    descend = train.descend
    monkeypatch.setattr(train, "descend", lambda o, lr: (descend(o, lr), spoil_moments(None, o)))
    message = refused(run_tiny, "llama", tmp_path / "run", *EVERY_STEP, *rows)
    assert message.startswith("step 1: AdamW's moments are not finite any more; not saved")
    assert not steps(tmp_path / "run")


# ---- the disk --------------------------------------------------------------------------------


def full(run):
    """The next line of metrics.jsonl finds no space."""
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to("/dev/full")


@contextlib.contextmanager
def mended():
    """Afterwards this process may write again."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        os.seteuid(os.getuid())
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def limit_files(run):
    """A checkpoint's files are larger than a disk with so little space."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def lose_permission(run):
    """The run goes on as somebody who may not write, nor even look, there."""
    run.chmod(0)
    if os.getuid() == 0:
        os.seteuid(65534)


DISKS = {  # what happens to the disk during step 6 of 12, the first one logged and saved after that, and what is said
    "full": (full, "No space left on device; free some space on that disk: the same command goes on from"),
    "full for checkpoints": (limit_files, "File too large; mend that: the same command goes on from"),
    "read-only": (lose_permission, "Permission denied; you need the right to write there: with it, the same command"),
    "deleted": (shutil.rmtree, "was deleted or moved away: move it back, or begin again with the same command"),
    "moved": (lambda run: run.rename(run.with_name("moved")), "was deleted or moved away: move it back"),
}


@pytest.mark.parametrize("disk", DISKS)
def test_a_disk_that_refuses_is_one_line_and_the_last_checkpoint_stays_whole(disk, unbroken, tmp_path, monkeypatch):
    do, says = DISKS[disk]
    run = tmp_path / "run"
    at_call(monkeypatch, tasks.VQGANTask, "after_step", 6, lambda: do(run))
    with mended():
        message = refused(run_tiny, "vqgan", run, *LIGHT, "train.sample_every=0", "train.eval_every=0")
    monkeypatch.undo()
    assert says in message and str(run) in message
    if disk == "deleted":
        assert not run.exists()
        return
    kept = tmp_path / "moved" if disk == "moved" else run
    kept.chmod(0o755)
    if disk == "full":
        (run / "metrics.jsonl").unlink()
    assert steps(kept) == [4] and not list(kept.rglob(".*.part.*"))
    assert_same_bits(kept / "step_00000004", unbroken / "step_00000004")
    if disk == "full for checkpoints":
        run_tiny("vqgan", run, *LIGHT)
        assert_same_bits(run / "step_00000012", unbroken / "step_00000012")


def test_rows_that_change_under_a_run_are_one_line(rows, tmp_path, monkeypatch):
    def change():
        with open(file, "a") as opened:
            opened.write(encode_row(np.arange(64)))

    file = shutil.copy(json.loads(rows[0].partition("=")[2])[0], tmp_path)
    at_call(monkeypatch, tasks.LLaMATask, "after_step", 2, change)
    here = [f'data.rows=["{file}"]', *rows[1:], "train.sample_every=0", "train.save_every=1", "train.steps=40"]
    message = refused(run_tiny, "llama", tmp_path / "run", *here)
    assert message == f"{file}: was changed after it was opened; start again to read it anew"
    assert steps(tmp_path / "run")


@pytest.mark.parametrize("write", [checkpoint.write_tensors, checkpoint.write_bin])
def test_a_weight_file_that_finds_no_space_is_an_error_of_the_disk(write, tmp_path):
    with mended(), pytest.raises(OSError) as error:
        limit_files(None)
        write(tmp_path / "weights", {"x": torch.zeros(10_000)})
    assert error.value.errno == errno.EFBIG and error.value.filename == str(tmp_path / "weights")
    assert not list(tmp_path.iterdir())


def test_a_clock_that_is_set_back_changes_nothing(unbroken, tmp_path, monkeypatch):
    now = time.time
    at_call(monkeypatch, tasks.VQGANTask, "after_step", 6, lambda: setattr(time, "time", lambda: now() - 86400))
    monkeypatch.setattr(time, "time", now)
    run = run_tiny("vqgan", tmp_path / "run", *LIGHT)
    assert metrics(run) == metrics(unbroken)
    assert_same_bits(run / "step_00000012", unbroken / "step_00000012")


# ---- several processes -----------------------------------------------------------------------

TROUBLE = """
import math, os, signal, sys
import tasks, train
from support import settings
do, rank, loss_of = sys.argv.pop(1), int(os.environ["RANK"]), tasks.LLaMATask.loss
def loss(self, phase, module, batch, step, microstep):
    loss, logged = loss_of(self, phase, module, batch, step, microstep)
    if rank == 1 and microstep == 0 and self.model.training:
        if step == 1 and do == "tell":
            loss = loss * math.nan
        if step == 5 and do == "tell":
            os.kill(os.getpid(), signal.SIGTERM)
        if step == 5 and do == "die" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
    return loss, logged
tasks.LLaMATask.loss = loss
settings.run_main(train.main)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """train.py, on two processes, of which the second has trouble: as `tell` or `die` say."""
    file = tmp_path_factory.mktemp("script") / "trouble.py"
    file.write_text(TROUBLE)
    return file


def on_two(script, do, run, *overrides, restarts=0):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [f"--max-restarts={restarts}", script, do, "--config", ROOT / "configs" / "tiny_llama.toml"]
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    command += ["--device", "cpu", f"run.dir={run}", "train.keep=0", *overrides]
    command += ["train.eval_every=0", "train.sample_every=0"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_skip_a_step_and_stop_together(parallel, script, rows, tmp_path):
    """One of them has the NaN, and is sent the signal: both skip step 2, finish step 6, save it and end as told."""
    run = tmp_path / "run"
    done = on_two(script, "tell", run, f"train.parallel={parallel}", *rows)
    assert "error:" not in done.stderr and "exitcode  : 143" in done.stderr, done.stderr
    assert f"SIGTERM: the same command goes on from {run}/step_00000006" in done.stdout
    [line] = [entry for entry in metrics(run) if "skipped" in entry]
    assert line["step"] == 2 and line["why"].startswith("loss is nan, grad_norm is nan (rank 1, batches 2 to 3, rows 2")
    assert steps(run) == [4, 6]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_rank_that_dies_takes_the_other_along_and_both_are_started_again(parallel, script, rows, tmp_path):
    run = tmp_path / "run"
    done = on_two(script, "die", run, f"train.parallel={parallel}", *rows, restarts=3)
    assert done.returncode == 0, done.stderr
    assert f"resumed from {run}/step_00000004" in done.stdout and steps(run) == [4, 8, 12]
    assert "error: rank 0: another process is gone" in done.stderr and "Traceback" not in done.stderr


def test_a_run_killed_at_random_and_while_saving_ends_in_the_same_bits(tmp_path):
    """The short form of bench/kill.py."""
    assert kill(tmp_path, kills=3, seed=1, steps=12, save_every=2) == []
