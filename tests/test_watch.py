"""Watching a run: what a line of the log measures of the machine, curves in a browser, a trace of some steps."""

import contextlib
import dataclasses
import json
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import refused

from bench.plan import model_flops
from model import LLaMA, LLaMAConfig
from support import boards, chips, runs, settings, watch
from support.pictures import save_grid
from support.settings import TrainSettings
from support.token_rows import encode_row

TINY = LLaMAConfig(66, 32, 2, 4, n_kv_heads=2, hidden_dim=64, max_seq_len=32)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """configs/tiny_llama.toml made TINY, on 20 rows that count upwards by ones and twos, evaluated never."""
    path, rng = tmp_path_factory.mktemp("rows") / "rows.jsonl", np.random.default_rng(0)
    path.write_text("".join(encode_row(rng.integers(1, 3, 40).cumsum() % 66) for _ in range(20)))
    quiet = ["train.eval_every=0", "train.sample_every=0", "data.tokenizer=", "data.held_out=[]"]
    return [f'data.rows=["{path}"]', "model.vocab_size=66", "model.max_seq_len=32", "train.steps=5", *quiet]


def entries(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def a_log(folder, **measured):
    return runs.Log(folder, TrainSettings(steps=4, batch_size=1, log_every=1, **measured), 0, "images", 1)


# ---- a line of the log -------------------------------------------------------------------------


def test_a_line_says_how_long_data_were_waited_for_and_how_much_memory_it_takes(rows, tmp_path):
    for entry in entries(run_tiny("llama", tmp_path / "run", *rows)):
        assert 0 <= entry["waiting_seconds"] < 10 and 0.1 < entry["memory_gb"] < 1000
        assert "mfu" not in entry  # of a processor that no table knows


@pytest.mark.parametrize("recomputed", [False, True])
def test_flops_are_six_a_weight_and_token_and_those_of_attention(recomputed):
    """Though blocks that are recomputed run twice. Attention's backward pass multiplies q by k once more."""
    model, tokens = LLaMA(TINY), torch.randint(66, (3, TINY.max_seq_len))
    model.activation_checkpointing = recomputed
    with watch.FlopCount() as count:
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    again = 2 * TINY.n_layers * TINY.n_heads * TINY.head_dim * TINY.max_seq_len * tokens.numel()
    assert count.flops == model_flops(TINY, tokens.numel()) + again


def test_mfu_is_the_share_of_what_the_chip_could_do(rows, tmp_path, monkeypatch):
    monkeypatch.setitem(chips.CHIPS, "mine", dataclasses.replace(chips.CHIPS["H100"], device_name="cpu", flops=1e10))
    for entry in entries(run_tiny("llama", tmp_path / "run", *rows)):
        flops = 1.0 * model_flops(TINY, 1) * entry["tokens_per_second"]
        assert entry["mfu"] == pytest.approx(flops / 1e10, rel=0.15)  # 0.1 for attention that is computed again


def test_only_what_a_loop_waits_for_with_nothing_else_to_do_is_waiting(tmp_path, capsys):
    """Three batches are late by 30 ms, but the first always is."""

    def late():
        for number in range(3):
            time.sleep(0.03)
            yield number

    for is_idle, least, most in ((True, 0.06, 0.5), (False, 0, 0)):
        log = a_log(tmp_path)
        assert list(log.waiting(late(), lambda idle=is_idle: idle)) == [0, 1, 2]
        entry = log.entry(3, {"loss": 1.0})
        log.write(entry)
        log.close()
        assert least <= entry["waiting_seconds"] <= most
        assert ("waiting for data" in capsys.readouterr().err) == is_idle


# ---- curves ------------------------------------------------------------------------------------


def test_tensorboard_draws_every_step_once_though_the_run_was_broken_off(rows, tmp_path):
    """The first part is logged beyond its last checkpoint, as a kill leaves it."""
    run, log = tmp_path / "run", ["train.log=tensorboard", "train.save_every=3"]
    run_tiny("llama", run, *rows, *log, "train.keep=0")
    for path in (run / "latest", *(run / "step_00000005").rglob("*.*")):
        path.unlink()
    (run / "step_00000005" / "training").rmdir()
    (run / "step_00000005").rmdir()
    run_tiny("llama", run, *rows, *log)
    drawn, written = EventAccumulator(str(run / "tensorboard")).Reload(), entries(run)
    assert set(drawn.Tags()["scalars"]) == set(written[0]) - {"step"}
    losses = [(event.step, event.value) for event in drawn.Scalars("loss")]
    assert losses == [(entry["step"], pytest.approx(entry["loss"], rel=1e-6)) for entry in written]
    assert [entry["step"] for entry in written] == [1, 2, 3, 4, 5]


def test_tensorboard_shows_the_samples(tmp_path):
    with contextlib.closing(boards.open_board("tensorboard", tmp_path, 0)) as board:
        save_grid([[np.zeros((8, 8, 3), np.uint8)]], tmp_path / "sheet.png")
        board.picture(3, tmp_path / "sheet.png")
    (image,) = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Images("samples")
    assert (image.step, image.height, image.width) == (3, 12, 12)


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_is_named(name, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # Python's own way to say that it is not there
    message = refused(boards.open_board, name, tmp_path, 0)
    assert message.endswith(f"needs a package that is not installed: pip install {name}")


# ---- a trace -----------------------------------------------------------------------------------


def test_a_trace_of_some_steps_lies_in_the_run_s_folder(rows, tmp_path, capsys):
    run = run_tiny("llama", tmp_path / "run", *rows, "train.profile=[2, 3]")
    events = json.loads((run / "profile_2_3.json").read_text())["traceEvents"]
    assert sum(event["name"] == "Optimizer.step#AdamW.step" for event in events) == 2
    head, *table = capsys.readouterr().out.partition("steps 2 to 3: ")[2].splitlines()
    assert head.endswith("of the CPU in all, most of it in") and len(table) == 10
    assert any("aten::mm" in line for line in table)


def test_a_resumed_run_records_no_steps_that_it_has_made(rows, tmp_path):
    run_tiny("llama", tmp_path / "run", *rows, "train.steps=3")
    run_tiny("llama", tmp_path / "run", *rows, "train.profile=[2, 4]")
    assert not list((tmp_path / "run").glob("profile*"))


@pytest.mark.parametrize("steps", ([3], [4, 3], [0, 2], [3, 9], [1, 2, 3]))
def test_a_trace_of_steps_that_are_none_is_one_line(steps):
    values = {"steps": 8, "batch_size": 1, "profile": steps}
    message = refused(settings.build, TrainSettings, values, "train")
    assert message == f"[train] profile {steps} must be two of the steps 1 to 8, in order"
