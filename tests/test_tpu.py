"""What train_tpu.py promises: on any mesh the run of one device; train.py's run folder, both ways; a plan that adds up.

Eight CPU devices are made out of one, so every sharding and every collective below is real; only their speed is not.
"""

import dataclasses
import json
import math
import os
import shutil
import signal
import socket
import time

import jax
import numpy as np
import processes
import pytest
import torch
from conftest import GOLDEN, ROOT
from safetensors.torch import load_file
from test_train import assert_same_bits, copy_up_to, metrics, refused

import tasks
import train
import train_tpu
from bench import plan
from data import DataSettings
from model import LLaMA, LLaMAConfig
from support import checkpoint, settings, sharded
from support.token_rows import encode_row
from support.tokenizer import Tokenizer

jax.config.update("jax_num_cpu_devices", 8)

CONFIG = ROOT / "configs" / "tiny_llama.toml"
# 66 is no multiple of 4: there the vocabulary is padded
TINY = ["model.vocab_size=66", "model.n_kv_heads=4", "model.max_seq_len=64", "train.batch_size=8", "train.keep=0",
        "train.ema=0.9", "train.eval_every=0", "train.sample_every=0", "data.tokenizer="]  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory):
    """Programs compiled once are found again, by the other processes too."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_disable_most_optimizations": True,  # of the machine code; sharding is done before
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in options.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        yield


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """The [data] of a run on 100 rows that count upwards by ones and twos."""
    path, rng = tmp_path_factory.mktemp("rows") / "rows.jsonl", np.random.default_rng(0)
    path.write_text("".join(encode_row(rng.integers(1, 3, 90).cumsum() % 66) for _ in range(100)))
    return [f'data.rows=["{path}"]', f'data.held_out=["{path}"]']


def on_mesh(mesh):
    return [f"mesh.{axis}={size}" for axis, size in zip(train_tpu.AXES, mesh, strict=True)]


def with_devices(count):
    """The environment of a process in which JAX finds as many devices, and what is compiled already."""
    return os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}", "JAX_PLATFORMS": "cpu"}


def run_tpu(run, mesh, *overrides):
    """Trains configs/tiny_llama.toml, made TINY, on as many of the eight devices as the mesh has."""
    s, explicit_keys = train_tpu.read_run(CONFIG, [f"run.dir={run}", *TINY, *on_mesh(mesh), *overrides])
    return train_tpu.train(s, explicit_keys, jax.devices()[: math.prod(mesh)])


def opened(folder, mesh, *overrides):
    """What train() holds at its start from `folder`: (settings, Layout, state)."""
    s, explicit_keys = train_tpu.read_run(CONFIG, ["run.dir=unused", *TINY, *on_mesh(mesh), *overrides])
    c = train_tpu.model_config(s, set() if folder else explicit_keys, folder)
    layout = train_tpu.lay_out(c, train_tpu.make_mesh(s.mesh, jax.devices()[: math.prod(mesh)]))
    return s, layout, train_tpu.start(s, layout, folder)


def loss_of(s, layout, tokens):
    """params → the mean loss on these tokens."""
    return lambda params: train_tpu.mean_loss(params, tokens, s, layout.config, layout.table)


def assert_close_weights(a, b, tolerance):
    """‖a - b‖ / ‖b‖ of every weight of two checkpoints."""
    a, b = (LLaMA.from_pretrained(folder).state_dict() for folder in (a, b))
    far = {name: float((a[name] - b[name]).norm() / b[name].norm()) for name in a}
    assert max(far.values()) <= tolerance, max(far.items(), key=lambda item: item[1])


def assert_same_curve(a, b, tolerance):
    a, b = metrics(a), metrics(b)
    assert [entry["step"] for entry in a] == [entry["step"] for entry in b]
    for key in ("loss", "grad_norm", "lr"):
        assert [entry[key] for entry in a] == pytest.approx([entry[key] for entry in b], rel=tolerance), key


# ---- a mesh changes nothing but rounding -----------------------------------------------------


@pytest.fixture(scope="session")
def one_device(rows, tmp_path_factory):
    return run_tpu(tmp_path_factory.mktemp("one") / "run", (1, 1, 1), "train.steps=5", *rows)


@pytest.fixture(scope="session")
def eight_devices(rows, tmp_path_factory):
    """(2, 2, 2), trained without a break: 10 steps, a checkpoint after each 5."""
    run = tmp_path_factory.mktemp("eight") / "run"
    return run_tpu(run, (2, 2, 2), "train.steps=10", "train.save_every=5", *rows)


@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (1, 1, 4), (2, 2, 2)])
def test_every_mesh_trains_as_one_device(one_device, rows, mesh, tmp_path):
    """Five float32 steps from scratch: loss, norm of the gradient, and then every weight."""
    run = run_tpu(tmp_path / "run", mesh, "train.steps=5", *rows)
    assert_same_curve(run, one_device, 1e-5)
    assert_close_weights(run / "latest", one_device / "latest", 1e-5)
    assert metrics(run)[-1]["loss"] < 0.95 * metrics(run)[0]["loss"]


def test_two_processes_train_as_one(eight_devices, rows, tmp_path):
    """2 × 4 devices: each process reads only its rows, and writes its share of the checkpoint's files."""
    run = tmp_path / "run"
    spying = """
import data, sys, train_tpu
from support import settings, sharded
def batch(self, microstep, rows, read=data.TokenRows.batch):
    print(*rows, file=spy, flush=True)
    return read(self, microstep, rows)
spy = open(sys.argv.pop(1), "w")
data.TokenRows.batch = batch
sharded.FILE_BYTES = 20_000
settings.run_main(train_tpu.main)
"""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    settings_of_run = ["train.steps=10", "train.save_every=5", *rows]
    overrides = [f"run.dir={run}", *TINY, *on_mesh((2, 2, 2)), *settings_of_run]
    (tmp_path / "spying.py").write_text(spying)
    both, out = [], tmp_path / "out"
    for i in range(2):
        command = [tmp_path / "spying.py", tmp_path / f"rows{i}", "--config", CONFIG]
        command += ["--distributed", f"{address},2,{i}", *overrides]
        both.append(processes.start(*command, environment=with_devices(4), out=out))
    for process in both:
        process.join(300)
        assert process.exitcode == 0, out.read_text()
    assert_same_curve(run, eight_devices, 1e-5)
    assert_close_weights(run / "latest", eight_devices / "latest", 1e-5)
    assert_close_weights(run / "latest" / "ema", eight_devices / "latest" / "ema", 1e-5)
    assert len(list((run / "latest").glob("model-*-of-*.safetensors"))) > 2
    assert not list(run.rglob(".*.part.*"))
    for i, expected in enumerate(({0, 1, 2, 3}, {4, 5, 6, 7})):
        assert {int(row) for row in (tmp_path / f"rows{i}").read_text().split()} == expected


def test_weights_are_split_as_declared():
    """Each device holds 1/(fsdp·tensor) of every matrix, of its moments too, after an update as before."""
    for mesh in ((1, 8, 1), (1, 1, 4), (2, 2, 2)):
        s, layout, state = opened(None, mesh)
        with jax.set_mesh(layout.mesh), jax.default_matmul_precision("highest"):  # compiled by train() already
            program = train_tpu.prepare(s, layout)
            tokens = jax.device_put(np.full(program.batch.shape, 7, np.int32), program.batch.sharding)
            state, _ = program.update(state, tokens, train_tpu.step_constants(s, 0))
        for kind, name in ((kind, name) for kind in state for name in layout.table):
            array, parts = state[kind][name], mesh[1] * mesh[2]
            held = {shard.data.nbytes for shard in array.addressable_shards}
            assert held == {array.nbytes // (1 if name.endswith("norm") else parts)}, (mesh, kind, name)
        padding = np.asarray(state["exp_avg"]["lm_head"])[66:]
        assert len(padding) == -66 % mesh[2] and not padding.any()  # no gradient reaches it


# ---- train.py and train_tpu.py: one run folder -----------------------------------------------


@pytest.fixture(scope="session")
def both(one_device, rows, tmp_path_factory):
    """20 steps of each trainer from the same weights, on the same rows: (train.py's run, train_tpu.py's)."""
    folder = tmp_path_factory.mktemp("both")
    overrides = [f"model.init={one_device}", "train.steps=20", "train.save_every=10", "train.eval_every=10", *rows]
    overrides = [*TINY, *on_mesh((1, 2, 2)), *overrides]
    torchs = train.train(*tasks.read_run(CONFIG, [f"run.dir={folder / 'torch'}", *overrides]), device="cpu")
    return torchs, run_tpu(folder / "jax", (1, 2, 2), *overrides), overrides


def test_both_trainers_follow_the_same_curve(both):
    torchs, ours, _ = both
    assert_same_curve(ours, torchs, 1e-4)
    assert_close_weights(ours / "latest", torchs / "latest", 1e-4)
    assert_close_weights(ours / "latest" / "ema", torchs / "latest" / "ema", 1e-4)
    held_out = [[entry["held_out_loss"] for entry in metrics(run)[9::10]] for run in (ours, torchs)]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-4)


def test_both_trainers_leave_the_same_files(both):
    torchs, ours, _ = both
    files = [{p.relative_to(run) for p in run.rglob("*")} for run in (torchs, ours)]
    files = [{p for p in found if "tensorboard" not in str(p)} for found in files]
    assert files[0] == files[1]
    for path in sorted(p for p in files[1] if p.suffix == ".safetensors"):
        a, b = load_file(torchs / path), load_file(ours / path)
        assert {k: (v.shape, v.dtype) for k, v in a.items()} == {k: (v.shape, v.dtype) for k, v in b.items()}
    a, b = ((run / "config.toml").read_text().splitlines() for run in (torchs, ours))
    assert a[2:] == b[2:]  # all but the folder's own name
    assert [set(entry) for entry in metrics(ours)] == [set(entry) for entry in metrics(torchs)]


def test_a_run_on_text_keeps_its_tokenizer(rows, tmp_path):
    sizes = ["model.vocab_size=258", "data.text_tokenizer=bytes", "train.steps=1", "train.eval_every=0"]
    run = run_tpu(tmp_path / "run", (1, 1, 1), *rows, *sizes)
    assert Tokenizer.from_pretrained(run).encode("a", eos=True) == [97, 257]
    assert json.loads((checkpoint.weights_folder(run) / "config.json").read_text())["eos_token_id"] == 257


def test_a_run_begun_in_one_is_finished_in_the_other(both, tmp_path):
    torchs, ours, overrides = both
    begun = copy_up_to(torchs, 10, tmp_path / "torch_jax")
    run_tpu(begun, (1, 2, 2), *overrides)
    assert_same_curve(begun, torchs, 1e-4)
    assert_close_weights(begun / "latest", torchs / "latest", 1e-4)
    begun = copy_up_to(ours, 10, tmp_path / "jax_torch")
    train.train(*tasks.read_run(CONFIG, [f"run.dir={begun}", *overrides]), device="cpu")
    assert_same_curve(begun, torchs, 1e-4)
    assert_close_weights(begun / "latest" / "ema", torchs / "latest" / "ema", 1e-4)


def test_train_py_opens_files_in_shards(both, tmp_path, monkeypatch):
    """A large model's checkpoint is many files, the optimizer's state too; transformers reads the weights."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(sharded, "FILE_BYTES", 30_000)
    torchs, _, overrides = both
    begun = copy_up_to(torchs, 10, tmp_path / "run")
    run_tpu(begun, (1, 2, 2), *overrides, "train.steps=11", "optim.decay_steps=20")
    folder = begun / "step_00000011"
    assert (folder / "model.safetensors.index.json").exists() and not (folder / "model.safetensors").exists()
    tokens = torch.arange(32)[None]
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        torch.testing.assert_close(LLaMA.from_pretrained(folder)(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    train.train(*tasks.read_run(CONFIG, [f"run.dir={begun}", *overrides]), device="cpu")
    assert_same_curve(begun, torchs, 1e-4)


@pytest.mark.parametrize("name", ["llama_hf_lvm", "llama_hf_31", "llama_meta_mp2"])
def test_published_folders_are_opened(name):
    """Grouped heads, tied embeddings, stretched rotary wavelengths, sharded files, pieces: the loss of model.py."""
    folder = GOLDEN / name
    reference = LLaMA.from_pretrained(folder, dtype=torch.float32)
    s, _ = train_tpu.read_run(CONFIG, ["run.dir=unused", *on_mesh((2, 2, 2))])
    layout = train_tpu.lay_out(train_tpu.model_config(s, set(), folder), train_tpu.make_mesh(s.mesh, jax.devices()))
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, layout.config.vocab_size, (2, 4, 48)))
    with jax.set_mesh(layout.mesh), torch.inference_mode():
        params = train_tpu.read_weights(folder, layout)
        found = jax.jit(loss_of(s, layout, tokens.numpy().astype(np.int32)))(params)
        expected = torch.nn.functional.cross_entropy(reference(tokens[0]).flatten(0, 1), tokens[1].flatten())
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


# ---- resume ----------------------------------------------------------------------------------


def test_a_run_in_two_parts_ends_in_the_same_bits(eight_devices, rows, tmp_path):
    run = copy_up_to(eight_devices, 5, tmp_path / "run")
    run_tpu(run, (2, 2, 2), "train.steps=10", "train.save_every=5", *rows)
    assert_same_bits(run / "step_00000010", eight_devices / "step_00000010")
    assert metrics(run) == metrics(eight_devices)


def test_a_run_killed_at_any_moment_ends_in_the_same_bits(eight_devices, rows, tmp_path):
    """kill -9, once the first checkpoint is there; saving after every step, so that it likely falls into a save."""
    run = tmp_path / "run"
    overrides = [*TINY, *on_mesh((2, 2, 2)), "train.steps=10", *rows]
    command = ["train_tpu.py", "--config", CONFIG, f"run.dir={run}", *overrides]
    process = processes.start(*command, "train.save_every=1", environment=with_devices(8))
    while not checkpoint.step_folders(run) and process.exitcode is None:
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and len(checkpoint.step_folders(run)) < 10
    again = processes.run(*command, "train.save_every=5", environment=with_devices(8))
    assert again.returncode == 0, again.stderr
    assert f"resumed from {run}/step_" in again.stdout
    assert_same_bits(run / "step_00000010", eight_devices / "step_00000010")
    assert metrics(run) == metrics(eight_devices)


def test_a_signal_ends_a_run_after_its_step(one_device, rows, tmp_path, monkeypatch):
    def constants(s, step, constants_of=train_tpu.step_constants):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return constants_of(s, step)

    monkeypatch.setattr(train_tpu, "step_constants", constants)
    with pytest.raises(SystemExit) as stopped:
        run_tpu(tmp_path / "run", (1, 1, 1), "train.steps=5", *rows)
    monkeypatch.undo()
    assert stopped.value.code == 143
    assert [folder.name for folder in checkpoint.step_folders(tmp_path / "run")] == ["step_00000003"]
    run_tpu(tmp_path / "run", (1, 1, 1), "train.steps=5", *rows)
    assert_same_bits(tmp_path / "run" / "step_00000005", one_device / "step_00000005")


def test_steps_that_are_not_finite_are_skipped(rows, tmp_path):
    """An absurd learning rate: the second step has no gradient any more, nor the third, the last one skipped."""
    run = tmp_path / "run"
    absurd = ["optim.lr=1e30", "optim.warmup_steps=0", "train.save_every=1", "train.max_skipped=2"]
    message = refused(run_tpu, run, (1, 1, 1), *absurd, "train.steps=5", *rows)
    assert message.startswith("step 3: ") and "grad_norm is nan (batches 4 to 5); stopped" in message
    assert message.endswith(f"goes on from {run}/step_00000002")
    first, second = (load_file(run / step / "model.safetensors") for step in ("step_00000001", "step_00000002"))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert [entry.get("skipped") for entry in metrics(run)] == [None, 1, None, 2]


def test_a_checkpoint_opens_on_any_mesh(eight_devices, rows, tmp_path):
    """The same bits right after loading; the same run, to rounding, five steps later."""
    folder = eight_devices / "step_00000005"
    weights = {k.removeprefix("model."): v for k, v in load_file(folder / "model.safetensors").items()}
    moments = load_file(folder / "training" / "optimizer.model.safetensors")
    for mesh in ((1, 1, 1), (1, 4, 2), (1, 1, 4)):
        _, layout, state = opened(folder, mesh)
        for name, layer, file_name, shape in sharded.tensor_names(layout):
            for kind in ("params", "exp_avg", "exp_avg_sq"):
                saved = weights[file_name] if kind == "params" else moments[f"{file_name}.{kind}"]
                held = np.asarray(state[kind][name] if layer is None else state[kind][name][layer])
                assert np.array_equal(held[: shape[0]], saved.numpy()), (mesh, kind, file_name)
    run = copy_up_to(eight_devices, 5, tmp_path / "run")
    run_tpu(run, (1, 4, 2), "train.steps=10", "train.save_every=5", *rows)
    assert_close_weights(run / "latest", eight_devices / "latest", 1e-5)


# ---- computing: recomputed layers, bfloat16 --------------------------------------------------


def test_recomputing_changes_no_gradient(one_device):
    """Whatever is kept between the passes; and bfloat16 stays near float32."""
    tokens = np.random.default_rng(0).integers(0, 66, (2, 4, 64)).astype(np.int32)
    found = {}
    for options in ([], ["mesh.keep=nothing"], ["mesh.keep=products"], ["train.dtype=bfloat16"]):
        recompute = f"train.activation_checkpointing={'true' if options else 'false'}"
        s, layout, state = opened(one_device / "step_00000005", (1, 1, 1), recompute, *options)
        with jax.set_mesh(layout.mesh):
            loss, gradients = jax.jit(jax.value_and_grad(loss_of(s, layout, tokens)))(state["params"])
        found["".join(options)] = float(loss), {name: np.asarray(g) for name, g in gradients.items()}
    loss, gradients = found.pop("")
    for options, (other_loss, other) in found.items():
        tolerance = 0.03 if "bfloat16" in options else 1e-5
        assert other_loss == pytest.approx(loss, rel=tolerance / 3)
        for name, g in gradients.items():
            assert np.linalg.norm(other[name] - g) <= tolerance * np.linalg.norm(g), (options, name)


# ---- the plan --------------------------------------------------------------------------------


PLANNED = ["model.dim=64", "model.hidden_dim=192", "model.n_layers=5", "model.max_seq_len=128", "train.dtype=bfloat16"]


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2), (1, 8, 1)])
def test_the_planned_flops_are_those_of_the_formula(mesh):
    """Loops within loops (microsteps, layers, pieces of the head), counted as often as they run: within 5 %."""
    s, layout, _ = opened(None, mesh, *PLANNED)
    with jax.set_mesh(layout.mesh):
        lowered = train_tpu.prepare(s, layout).lower()
        cost, temporaries = plan.compile_and_count(lowered, math.prod(mesh))
    expected = plan.model_flops(layout.config, 2 * 8 * 128)
    assert cost["flops"] * math.prod(mesh) == pytest.approx(expected, rel=0.05)
    assert temporaries > 0
    sent = {kind for kind in plan.COLLECTIVES if cost[kind]}
    if mesh == (1, 1, 1):
        assert not sent
    if mesh == (1, 8, 1):  # each of 2 microsteps gathers the layers twice, in bfloat16, and sums what it scatters once
        matrices = 5 * (4 * 64 * 64 + 3 * 64 * 192)
        assert cost["all-gather"] == pytest.approx(2 * 2 * 2 * matrices * 7 / 8, rel=0.1)
        assert cost["reduce-scatter"] == pytest.approx(2 * 2 * matrices * 7 / 8, rel=0.1)


def test_the_plan_is_printed_and_nothing_is_run(tmp_path):
    """As typed, in a process of its own: for more devices than the tests have."""
    mesh = ["mesh.fsdp=8", "mesh.tensor=2", "train.batch_size=16"]
    config = ["--config", CONFIG, f"run.dir={tmp_path / 'run'}"]
    done = processes.run("train_tpu.py", *config, *mesh, "--plan")
    assert done.returncode == 0, done.stderr
    assert "fsdp 8 × tensor 2 = 16 devices" in done.stdout and "v5p" in done.stdout
    assert not (tmp_path / "run").exists()


HLO = """HloModule step
%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}
%inner (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %a = bf16[8,4]{1,0} get-tuple-element(%p), index=1
  %dot.1 = bf16[8,8]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}
%short (p: (s32[], bf16[8,4])) -> pred[] {
  %limit = s32[] constant(3)
}
%outer (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %w = (s32[], /*index=1*/bf16[8,4]{1,0}) while(%p), condition=%short, body=%inner
  %g = bf16[8,4]{1,0} all-gather(%x), replica_groups=[4,2]<=[8], dimensions={0}
}
%long (p: (s32[], bf16[8,4])) -> pred[] {
  %limit = s32[] constant(5)
}
ENTRY %main (p: (s32[], bf16[8,4])) -> f32[4] {
  %w = (s32[], bf16[8,4]{1,0}) while(%p), condition=%long, body=%outer
  %r = f32[100]{0} all-reduce(%q), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %whole = f32[80]{0} all-reduce(%q2), replica_groups=mesh['a'=4,'b'=2] {'a','b'}, to_apply=%add
  ROOT %part = f32[10]{0} dynamic-slice(%whole, %i), dynamic_slice_sizes={10}
}
"""


def test_loops_are_counted_as_often_as_they_run():
    cost = plan.count(*plan.parse(HLO), 8)
    assert cost["flops"] == 5 * 3 * 2 * 8 * 8 * 4
    assert cost["traffic"] == 5 * 3 * (2 * 64 + 2 * 32 + 2 * 32)
    assert cost["all-gather"] == 5 * 64 // 2  # half of the result is there already
    assert cost["all-reduce"] == 2 * 400 * 3 // 4
    assert cost["reduce-scatter"] == 320 * 7 // 8  # a sum of which only a slice is used


# ---- settings --------------------------------------------------------------------------------


def test_train_py_reads_a_configuration_with_a_mesh(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(CONFIG.read_text() + "\n[mesh]\ntensor = 2\n")
    assert tasks.read_run(path)[0].mesh == train_tpu.read_run(path)[0].mesh == settings.MeshSettings(tensor=2)


def test_what_does_not_fit_a_mesh_is_named(rows, tmp_path):
    def attempt(mesh, *overrides):
        return refused(lambda: run_tpu(tmp_path / "run", mesh, *rows, *overrides))

    assert "data 3 × fsdp 4 × tensor 1 is not 8 devices" in attempt((3, 4, 1))
    assert "mesh.tensor 4 does not divide the 2 key/value heads" in attempt((1, 1, 4), "model.n_kv_heads=2")
    assert "batch_size 9 is no multiple of mesh data 2 × fsdp 2" in attempt((2, 2, 1), "train.batch_size=9")
    narrow = ["model.n_heads=2", "model.n_kv_heads=2", "model.dim=20"]
    assert "mesh.fsdp 8 does not divide 20, a dimension of embed_tokens" in attempt((1, 8, 1), *narrow)
    assert 'keep "all" must be' in attempt((1, 1, 1), "mesh.keep=all")
    assert not (tmp_path / "run").exists()


def test_only_a_llama_is_trained_here():
    assert 'model.kind is "vqgan"' in refused(train_tpu.read_run, ROOT / "configs" / "tiny_vqgan.toml")


def test_a_field_that_is_not_implemented_here_is_refused_at_the_start(tmp_path, monkeypatch):
    """As somebody would add it to model.py: from the configuration, and from weights that were trained with it."""
    extended = dataclasses.make_dataclass("LLaMAConfig", [("qk_norm", bool, False)], bases=(LLaMAConfig,), frozen=True)
    monkeypatch.setattr(train_tpu, "LLaMAConfig", extended)
    run_class = settings.run_class(extended, DataSettings, mesh=settings.MeshSettings)
    monkeypatch.setitem(train_tpu.RUNS, "llama", run_class)
    found = refused(lambda: run_tpu(tmp_path / "run", (1, 1, 1), "model.qk_norm=true"))
    assert found == "model.qk_norm = True: train_tpu.py does not implement it, train.py does"
    LLaMA(extended(66, 32, 1, 4, hidden_dim=64, qk_norm=True)).save_pretrained(tmp_path / "llama")
    s, _ = train_tpu.read_run(CONFIG, ["run.dir=unused", f"model.init={tmp_path / 'llama'}"])
    assert refused(train_tpu.model_config, s, set(), None) == found


def test_a_checkpoint_of_another_shape_is_named(one_device, tmp_path):
    folder = one_device / "step_00000005"
    _, layout, _ = opened(folder, (1, 1, 1))
    tensors = checkpoint.read_tensors(folder)
    missing = {k: v for k, v in tensors.items() if k != "model.norm.weight"}
    wrong = tensors | {"lm_head.weight": torch.zeros(5, 32)}
    extra = tensors | {"model.bias": torch.zeros(5)}
    for number, (found, said) in enumerate(
        [(missing, "norm.weight is missing"), (wrong, "lm_head.weight is (5, 32)"), (extra, "bias belongs to no part")]
    ):
        checkpoint.write_tensors(tmp_path / str(number) / "model.safetensors", found)
        shutil.copy(folder / "config.json", tmp_path / str(number))
        assert said in refused(train_tpu.read_weights, tmp_path / str(number), layout)
    state = json.loads((folder / "state.json").read_text())
    assert (state["step"], state["streams"]) == (5, "keyed") and "training/state.safetensors" in state["files"]


def test_between_slices_only_the_data_axis_runs():
    """Of two slices (stand-ins: there is no TPU here), each holds whole copies of the model."""
    names = ("id", "slice_index", "process_index", "platform", "device_kind")
    stand_in = dataclasses.make_dataclass("StandIn", names, frozen=True)
    devices = [stand_in(i, i % 2, i % 2, "cpu", "cpu") for i in range(16)]
    grid = train_tpu.make_mesh(settings.MeshSettings(data=4, fsdp=2, tensor=2), devices).devices
    assert [{device.slice_index for device in copy.flat} for copy in grid] == [{0}, {0}, {1}, {1}]
    assert "multiple of the 2 slices" in refused(train_tpu.make_mesh, settings.MeshSettings(data=1), devices)


def test_a_model_larger_than_the_memory_is_refused(tmp_path):
    sizes = ["model.dim=65536", "model.hidden_dim=65536", "model.n_layers=10", f"run.dir={tmp_path}"]
    s, keys = train_tpu.read_run(ROOT / "configs" / "tiny_llama.toml", sizes)
    with pytest.raises(settings.UserError, match="too large for the memory"):
        train_tpu.train(s, keys, jax.devices()[:1])
