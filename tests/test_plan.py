"""train.py --plan: what it counts is what arithmetic says, and what a real step takes."""

import functools

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT

import tasks
import train
from bench.plan import model_flops
from model import LLaMA, LLaMAConfig
from support import plan as planning
from support.chips import CHIPS
from support.parallel import Ranks
from support.settings import UserError

ONE_LAYER = ["model.size=lvm_7b", "model.n_layers=1", "train.batch_size=128", "train.accumulate=1"]


@functools.cache
def planned(name, gpus, *overrides):
    """The plan of configs/{name}.toml."""
    return train.plan(*tasks.read_run(ROOT / "configs" / f"{name}.toml", overrides), gpus)


def test_a_share_has_sixteen_bytes_a_parameter():
    plan = planned("lvm", 64, *ONE_LAYER, "train.parallel=fsdp")
    c, _ = tasks.read_run(ROOT / "configs" / "lvm.toml", ONE_LAYER)
    share = (4 * 4096**2 + 3 * 4096 * 11008 + 3 * 4096 + 2 * 4096 * c.model.vocab_size) / 64
    # a weight of 8292 rows is cut into 64 shares of 130, the last of which are less
    assert plan.parameters == plan.gradients == pytest.approx(4 * share, rel=5e-3)
    assert plan.moments == pytest.approx(8 * share, rel=5e-3)
    assert plan.averaged == 0 and plan.frozen < 1e6


def test_every_share_gathers_weights_in_bfloat16_twice_and_scatters_gradients_in_float32():
    plan = planned("lvm", 64, *ONE_LAYER, "train.parallel=fsdp")
    block = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    rest = 2 * 4096 * 8292 + 4096  # embedding, head and norm stay whole between forward and backward
    assert plan.sent["all-gather"] == pytest.approx(2 * (2 * block + rest) * 63 / 64, rel=5e-3)
    assert plan.sent["reduce-scatter"] == pytest.approx(4 * (block + rest) * 63 / 64, rel=5e-3)


def test_the_flops_are_those_of_the_formula():
    plan = planned("lvm", 64, *ONE_LAYER, "train.parallel=fsdp")
    c, _ = tasks.read_run(ROOT / "configs" / "lvm.toml", ONE_LAYER)
    assert plan.flops(recomputed=False) == pytest.approx(model_flops(c.model, 128 * 4096 / 64), rel=0.05)
    # a block is computed forward once more, but for its last product, whose result nothing needs
    forward = 2 * (4 * 4096**2 + 2 * 4096 * 11008) + 4 * 4096 * 4096
    again = plan.flops(recomputed=True) - plan.flops(recomputed=False)
    assert again == pytest.approx(forward * 128 * 4096 / 64, rel=1e-3)


def test_recomputing_activations_takes_less_memory():
    with_all = planned("lvm", 64, *ONE_LAYER, "model.n_layers=3", "train.activation_checkpointing=false")
    assert planned("lvm", 64, *ONE_LAYER, "model.n_layers=3").activations < 0.7 * with_all.activations
    assert with_all.flops(recomputed=True) == with_all.flops(recomputed=False)


def test_whole_copies_send_their_gradients_once_an_update_and_hold_them_twice():
    plan = planned("tiny_llama", 4, "train.accumulate=2")
    alone = planned("tiny_llama", 1, "train.accumulate=2")
    assert plan.parameters == alone.parameters and plan.moments == alone.moments
    assert plan.frozen - alone.frozen == pytest.approx(plan.gradients, rel=0.01)  # DDP's buckets
    assert plan.sent == {"all-reduce": pytest.approx(2 * 3 / 4 * plan.gradients, rel=0.01)}


def test_of_many_microbatches_three_are_run_and_all_are_counted():
    two, seven = (planned("tiny_llama", 4, f"train.accumulate={n}", "train.parallel=fsdp") for n in (2, 7))
    assert seven.flops(True) == 7 / 2 * two.flops(True)
    assert seven.sent["all-gather"] == pytest.approx(7 / 2 * two.sent["all-gather"], rel=0.01)
    assert seven.sent["reduce-scatter"] == two.sent["reduce-scatter"]


@pytest.mark.parametrize("kind", ["vqgan", "clip", "vae", "unet"])
def test_every_kind_has_a_plan_without_its_data(kind):
    plan = planned(f"tiny_{kind}", 2)
    assert plan.peak > plan.parameters + plan.gradients + plan.moments and plan.flops(True) > 0


def test_a_dreamllm_has_a_plan(dream_parts):
    plan = planned("tiny_dreamllm", 2, *dream_parts, "train.parallel=fsdp")
    assert plan.frozen > 0 and plan.flops(True) > 0


def test_a_plan_takes_the_shape_of_a_folder_that_is_here(tmp_path):
    LLaMA(LLaMAConfig(96, 48, 3, 4, hidden_dim=64, max_seq_len=64)).save_pretrained(tmp_path)
    plan = planned("lvm_finetune", 8, f"model.init={tmp_path}")
    assert plan.parameters == 4 * (2 * 96 * 48 + 3 * (4 * 48**2 + 3 * 48 * 64 + 2 * 48) + 48)


def test_a_real_step_takes_what_was_planned_to_the_byte():
    config, keys = tasks.read_run(ROOT / "configs" / "tiny_llama.toml", ["train.ema=0.9"])
    ranks = Ranks(0, 1, torch.device("cpu"), planned=True)  # without data; but its tensors are real
    with planning.Tally() as tally:
        real = train.counted_step(config, keys, ranks, tally)
    plan = planned("tiny_llama", 1, "train.ema=0.9")
    assert real.peak == plan.peak and real.flops(True) == plan.flops(True)
    assert (real.parameters, real.moments, real.averaged) == (plan.parameters, plan.moments, plan.averaged)


def test_what_does_not_fit_names_the_setting_that_does(program, tmp_path):
    options = [f"run.dir={tmp_path / 'run'}", "train.batch_size=131072", "train.accumulate=1"]
    code, out, _ = program(train.main, "--config", ROOT / "configs" / "tiny_llama.toml", "--plan", 1, *options)
    assert code == 0 and " no " in out
    settings = out.split("GPUs of 80 GB would do with ")[1].split(" --plan 1:")[0].split()
    assert settings[0] == "train.activation_checkpointing=true" and settings[-1] == "train.accumulate=2"
    assert planned("tiny_llama", 1, *options, *settings).fits(CHIPS["H100"])
    assert not (tmp_path / "run").exists()


def test_after_a_plan_tensors_are_real_and_processes_alone():
    with pytest.raises(UserError, match="batch_size 4 is no multiple of the 3 processes"):
        planned("tiny_llama", 3)
    planned("tiny_llama", 2, "train.parallel=fsdp")
    assert torch.ones(2).sum().item() == 2 and not dist.is_initialized()


def test_the_slowest_of_flops_and_bytes_decides():
    chip = CHIPS["H100"]
    work = {(chip.flops, 1, False, False): 2, (0, chip.bandwidth, False, False): 1, (chip.flops, 1, True, True): 1}
    plan = planning.Plan(0, 0, 0, 0, 0, 0, work, {"all-gather": chip.nvlink})
    assert plan.seconds(chip, 8) == pytest.approx({"products": 4 / 0.6, "memory": 1 / 0.8, "network": 1 / 0.75})
    assert plan.seconds(chip, 16)["network"] == pytest.approx(450 / 400 / 0.75)


def test_norms_are_in_float32_as_autocast_of_a_gpu_has_them():
    with planning.pretend(1, "ddp") as (_, tally), torch.autocast("cpu", torch.bfloat16):
        half = torch.ones(2, 4, 3, dtype=torch.bfloat16)
        assert torch.nn.GroupNorm(2, 4)(half).dtype == torch.nn.LayerNorm(3)(half).dtype == torch.float32
    assert tally.bytes > 0


def test_less_memory_is_looked_for_in_an_order_that_keeps_what_is_learned():
    config, _ = tasks.read_run(ROOT / "configs" / "lvm.toml", ["train.activation_checkpointing=false"])
    savers = {"parallel": "fsdp", "activation_checkpointing": True}
    written = [text for text, _, _ in planning.changes(config, 16, savers)]
    fsdp = "train.parallel=fsdp"
    recomputing = f"{fsdp} train.activation_checkpointing=true"
    smaller = f"{recomputing} train.batch_size=16 train.accumulate=8"
    assert written[:3] == [f"{text} --plan 16" for text in (fsdp, recomputing, smaller)]
    assert written[3] == f"{recomputing} train.batch_size=32 train.accumulate=4 --plan 32"
    clip, _ = tasks.read_run(ROOT / "configs" / "clip.toml")  # its loss compares all rows of a microstep
    assert [text for text, _, _ in planning.changes(clip, 8, {})][:2] == ["--plan 16", "--plan 32"]
