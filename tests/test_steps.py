"""What a run resumes from: the newest checkpoint that is whole. A damaged one is named, and nothing of it is lost."""

import json
import os
import shutil

import pytest
from conftest import ROOT, run_tiny
from test_train import assert_same_bits, copy_up_to, forget_checksums, refused

import tasks
from lvm import run_data
from support import checkpoint, runs, whole

FILES = ("model.safetensors", "ema/model.safetensors", "training/optimizer.model.safetensors")


def make_step(run, step, keep=0):
    """A checkpoint as the trainers lay it out, of files that hold a few bytes."""
    with runs.new_step(run, step, keep) as folder:
        for name in FILES:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(bytes(range(100)))
        runs.write_state(folder, step, threads=1)
    return run / f"step_{step:08d}"


@pytest.fixture
def run(tmp_path):
    """A run with the steps 4 and 8."""
    for step in (4, 8):
        make_step(tmp_path / "run", step)
    return tmp_path / "run"


def flip(data, at=None):
    at = len(data) // 2 if at is None else at
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def damaged_in_turn(file, elsewhere):
    """Damages a file in one way after another, and yields each time; afterwards it is as it was."""
    data = file.read_bytes()
    os.rename(file, elsewhere)
    for changed in (flip(data), data[:-2], b"") if data else (b"x",):  # the last byte of a text is a line's end
        file.write_bytes(changed)
        yield
    file.unlink()
    yield
    file.mkdir()
    yield
    file.rmdir()
    os.rename(elsewhere, file)


# ---- which step is used ------------------------------------------------------------------------


@pytest.mark.parametrize("trained", ["tokenizer_run", "lvm_run", "dream_run"])
def test_whatever_file_of_the_newest_checkpoint_is_damaged_it_is_named_and_the_one_before_used(
    trained, request, tmp_path, capsys
):
    run = shutil.copytree(request.getfixturevalue(trained), tmp_path / "run", symlinks=True)
    kind = {"tokenizer_run": "vqgan", "lvm_run": "llama", "dream_run": "dreamllm"}[trained]
    before, newest = checkpoint.step_folders(run)[-2:]
    forget_checksums(before)  # which take a while
    capsys.readouterr()
    assert runs.newest_step(run, kind)[0] == newest
    for file in whole.files_in(newest):
        for _ in damaged_in_turn(file, tmp_path / "elsewhere"):
            checkpoint.say_once.cache_clear()
            assert runs.newest_step(run, kind)[0] == before, file
            said = capsys.readouterr().err
            assert (
                said.startswith(f"{file}: ") and said.endswith(f"; {before.name} is used\n") and said.count("\n") == 1
            )
    assert runs.newest_step(run, kind)[0] == newest and capsys.readouterr().err == ""


STATES = {
    "of another step": b'{"step": 1}',
    "no table": b"[8]",
    "no step": b"{}",
    "a text": b'{"step": "8"}',
    "below zero": b'{"step": -8}',
    "a fraction": b'{"step": 8.0}',
    "endless": b'{"step": 1e999}',
    "5000 digits": b'{"step": ' + b"8" * 5000 + b"}",
    "4000 digits": b'{"step": ' + b"8" * 4000 + b"}",
    "deep": b"[" * 100_000,
    "no UTF-8": b'{"step": "\xff"}',
    "no JSON": b'{"step": 8',
    "empty": b"",
}


@pytest.mark.parametrize("content", STATES.values(), ids=STATES)
def test_a_state_that_is_none_is_one_line(run, content, capsys):
    (run / "step_00000008" / "state.json").write_bytes(content)
    assert runs.newest_step(run, "llama")[0] == run / "step_00000004"
    said = capsys.readouterr().err
    assert said.startswith(f"{run}/step_00000008/state.json: ") and said.count("\n") == 1 and len(said) < 400


def test_a_state_says_what_it_said_or_is_refused(run):
    """Any of its bytes may be another one: what is read is what was written, or nothing."""
    file = run / "step_00000008" / "state.json"
    data, state = file.read_bytes(), whole.read_state(file.parent)
    for at in range(len(data)):
        file.write_bytes(flip(data, at))
        if whole.trouble(file.parent) is None:
            assert whole.read_state(file.parent) == state, at


def test_a_table_of_files_that_is_none_is_refused_even_with_its_checksum(run):
    for files in ([], 5, {"model.safetensors": 5}, {"model.safetensors": "9 bytes"}):
        state = {"step": 8, "files": files}
        state["crc32"] = whole.zlib.crc32(json.dumps(state, sort_keys=True).encode())
        (run / "step_00000008" / "state.json").write_text(json.dumps(state))
        assert "is not what was written" in whole.trouble(run / "step_00000008")


def test_an_empty_step_is_no_step(run, capsys):
    (run / "step_00000012").mkdir()
    assert runs.newest_step(run, "llama")[0] == run / "step_00000008"
    assert checkpoint.weights_folder(run) == run / "step_00000008" / "ema"
    assert capsys.readouterr().err.count("step_00000012") == 2


def test_steps_from_before_there_were_checksums_are_used(run):
    forget_checksums(run / "step_00000008")
    assert runs.newest_step(run, "llama") == (run / "step_00000008", {"step": 8, "streams": runs.STREAMS, "threads": 1})


def test_large_files_are_summed_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(whole, "PIECE", 30)
    folder = make_step(tmp_path, 4)
    assert whole.trouble(folder, whole.ALONE) is None
    data = (folder / "model.safetensors").read_bytes()
    for at in (0, 29, 30, 95):
        (folder / "model.safetensors").write_bytes(flip(data, at))
        assert whole.trouble(folder, whole.ALONE).startswith(f"{folder}/model.safetensors: is not what was written")
    (folder / "model.safetensors").write_bytes(data[30:60] + data[:30] + data[60:])
    assert whole.trouble(folder, whole.ALONE)


def test_if_no_checkpoint_is_whole_nothing_is_touched(run):
    for name, step in (("model.safetensors", 8), ("ema/model.safetensors", 4)):
        (run / f"step_{step:08d}" / name).write_bytes(b"")
    (run / "metrics.jsonl").write_text('{"step": 8}\n')
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in run.rglob("*")}
    message = refused(runs.newest_step, run, "llama")
    assert message.startswith(f"{run}/step_00000008/model.safetensors: has 0 bytes, 100 were written; ")
    assert "no other checkpoint that is whole" in message
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in run.rglob("*")} == before


def test_whoever_samples_is_told_of_a_damaged_step_by_its_sizes_alone(run, capsys):
    """What only a resume needs may be gone; and a step's folder itself opens as far as it can."""
    shutil.rmtree(run / "step_00000008" / "training")
    assert checkpoint.weights_folder(run) == run / "step_00000008" / "ema" and capsys.readouterr().err == ""
    (run / "step_00000008" / "ema" / "model.safetensors").write_bytes(b"x")
    for _ in range(2):  # a command looks more than once, and says it once
        assert checkpoint.weights_folder(run) == run / "step_00000004" / "ema"
    expected = f"{run}/step_00000008/ema/model.safetensors: has 1 bytes, 100 were written; step_00000004 is used\n"
    assert capsys.readouterr().err == expected
    shutil.rmtree(run / "step_00000004")
    assert "a step's folder itself opens" in refused(checkpoint.weights_folder, run)
    assert checkpoint.weights_folder(run / "step_00000008") == run / "step_00000008"


def settings_of(run):
    return tasks.read_run(ROOT / "configs" / "tiny_llama.toml", [f"run.dir={run}"])[0]


# ---- what becomes of a damaged step ------------------------------------------------------------


def test_a_run_that_falls_back_ends_in_the_same_bits_and_keeps_what_was_damaged(lvm_run, row_overrides, tmp_path):
    run = copy_up_to(lvm_run, 8, tmp_path / "run")
    file = run / "step_00000008" / "training" / "optimizer.model.safetensors"
    damaged = flip(file.read_bytes())
    file.write_bytes(damaged)
    run_tiny("llama", run, "train.ema=0.9", "train.keep=0", "train.eval_every=0", *row_overrides)
    for step in ("step_00000008", "step_00000012"):
        assert_same_bits(run / step, lvm_run / step)
    assert (run / "step_00000008.damaged" / file.relative_to(run / "step_00000008")).read_bytes() == damaged
    assert os.readlink(run / "latest") == "step_00000012"


def test_what_is_newer_than_the_step_that_is_used_is_set_aside_each_time(run, row_overrides, capsys):
    """Under its own name it would keep the step from being saved again."""
    s = settings_of(run)
    for aside in ("step_00000008.damaged", "step_00000008.damaged2"):
        (run / "step_00000008" / "state.json").unlink()
        folder, state = runs.newest_step(run, "llama")
        runs.start_run(run, s, state)
        assert os.readlink(run / "latest") == "step_00000004" == folder.name
        assert (run / aside / "model.safetensors").exists() and aside in capsys.readouterr().err
        make_step(run, 8)
    assert runs.newest_step(run, "llama")[0] == run / "step_00000008"


def test_a_damaged_step_is_none_of_those_that_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        make_step(tmp_path, step)
    (tmp_path / "step_00000003" / "model.safetensors").write_bytes(b"")
    (tmp_path / "step_00000004" / "state.json").unlink()
    make_step(tmp_path, 5, keep=2)
    assert [int(p.name[5:]) for p in checkpoint.step_folders(tmp_path)] == [2, 3, 4, 5]
    make_step(tmp_path, 6, keep=2)
    assert [int(p.name[5:]) for p in checkpoint.step_folders(tmp_path)] == [5, 6]
    assert not list(tmp_path.glob(".*"))


# ---- the run's other files ---------------------------------------------------------------------


def metrics_after(run, content, first=8):
    (run / "metrics.jsonl").write_bytes(content)
    runs.start_run(run, settings_of(run), {"step": first, "streams": runs.STREAMS})
    return (run / "metrics.jsonl").read_bytes()


def test_a_last_line_that_a_kill_has_cut_is_left_out(run, capsys):
    for cut in (b'{"step": 9, "lo', b'{"step": 9}', b""):
        assert metrics_after(run, b'{"step": 7}\n{"step": 8}\n' + cut) == b'{"step": 7}\n{"step": 8}\n'
    assert metrics_after(run, b'{"step": 7}\n{"step": 8}') == b'{"step": 7}\n{"step": 8}\n'
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("line", [b"{", b"\xff", b"[" * 100_000, b"5", b'{"step": "7"}', b'{"step": 1e999}', b"{}"])
def test_damaged_metrics_are_kept_aside_and_the_whole_lines_go_on(run, line, capsys):
    content = b'{"step": 6}\n' + line + b'\n{"step": 8}\n'
    assert metrics_after(run, content) == b'{"step": 6}\n{"step": 8}\n'
    assert (run / "metrics.jsonl.damaged").read_bytes() == content
    assert capsys.readouterr().err.startswith(f"{run}/metrics.jsonl: is damaged; ")


@pytest.mark.parametrize(
    "content",
    [b"[model", b"\xff", b"x = " + b"[" * 100_000, b"x = " + b"9" * 5000, b"model = 5", b"model = {kind = [1]}", b""],
)
def test_a_damaged_configuration_of_a_run_is_one_line(run, content):
    (run / "config.toml").write_bytes(content)
    message = refused(runs.newest_step, run, "llama")
    assert str(run) in message and len(message) < 400


@pytest.mark.parametrize("content", ["data = 5", "[data]\ntokenizer = 5", "[data]\nside = 1.5", "[data]\nsystem = [1]"])
def test_a_damaged_section_of_data_is_one_line_to_whoever_samples(run, content):
    (run / "config.toml").write_text(content)
    assert refused(run_data, run) == f"{run}/config.toml: its section [data] is damaged"
