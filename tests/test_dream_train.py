"""Training DreamLLM: four stages, each of which moves exactly the weights it names, and resumes to the same bits."""

import dataclasses

import pytest
import torch
from conftest import ROOT, run_tiny
from test_train import QUIET, assert_same_bits, copy_up_to, metrics, refused, train_on

import tasks
from clip import CLIP, CLIPConfig
from diffusion import AutoencoderKL, AutoencoderKLConfig, LatentDiffusion, NoiseSchedule, UNet, UNetConfig
from dreamllm import DreamLLM, DreamLLMConfig
from model import LLaMA, LLaMAConfig
from support.tokenizer import ADDED, Tokenizer

TWO_STEPS = ["train.steps=2", "train.log_every=1", "train.batch_size=4", *QUIET]
EVERYTHING = 'model.trained=["llama", "projector", "dream_queries", "condition"]'


def opened(run):
    return DreamLLM.from_pretrained(run)


def jitter(before, after):
    """Beginnings of the names of the weights that differ."""
    others = dict(after.named_parameters())
    return {name.split(".")[0] for name, p in before.named_parameters() if not torch.equal(p, others[name])}


def test_a_run_in_two_parts_ends_in_the_same_bits(dream_run, dream_parts, tmp_path):
    run = copy_up_to(dream_run, 6, tmp_path / "run")
    run_tiny("dreamllm", run, *dream_parts, "train.keep=0", "train.sample_every=0")
    assert_same_bits(run / "step_00000012", dream_run / "step_00000012")
    assert metrics(run)[-1]["held_out_vm_loss"] == metrics(dream_run)[-1]["held_out_vm_loss"]


def test_the_four_stages_move_what_they_name(dream_parts, tmp_path, capsys):
    stages = {
        "understand": ('model.trained=["projector"]', "model.w_vm=0"),
        "create": ('model.trained=["dream_queries", "condition"]', "model.w_lm=0", "model.drop=0.5"),
        "interleaved": (EVERYTHING,),
        "instruct": (EVERYTHING,),
    }
    expected = [{"projector"}, {"dream_queries", "condition"}] + 2 * [
        {"llama", "projector", "dream_queries", "condition"}
    ]
    start, before = dream_parts, None
    for (stage, options), names in zip(stages.items(), expected, strict=True):
        run = run_tiny("dreamllm", tmp_path / stage, *start, f"model.stage={stage}", *options, *TWO_STEPS)
        shown = capsys.readouterr().out.splitlines()[0]
        assert shown.startswith("trained: ") and "frozen: " in shown
        after = opened(run)
        if before:
            assert jitter(before, after) == names
        drawn = sum(entry["vm_loss"] for entry in metrics(run))  # a step's rows may have no picture to draw
        assert (drawn == 0) == (stage == "understand")
        start, before = [f"model.init={run}"], after


def test_the_eyes_and_the_hand_can_be_trained_too(dream_run, tmp_path):
    trained = 'model.trained=["clip", "diffusion.unet"]'
    run = run_tiny("dreamllm", tmp_path / "run", f"model.init={dream_run}", trained, *TWO_STEPS)
    before, after = opened(dream_run), opened(run)
    assert jitter(before, after) == {"clip", "diffusion"}
    assert jitter(before.diffusion, after.diffusion) == {"unet"}


def test_recomputing_activations_changes_rounding_only(dream_run, tmp_path):
    a, b = (
        metrics(
            run_tiny(
                "dreamllm",
                tmp_path / flag,
                f"model.init={dream_run}",
                f"train.activation_checkpointing={flag}",
                *TWO_STEPS,
            )
        )
        for flag in ("false", "true")
    )
    assert b[-1]["grad_norm"] == pytest.approx(a[-1]["grad_norm"], rel=1e-4)


def test_two_processes_have_the_curve_of_one(dream_parts, tmp_path):
    """Though one may have twice the text and none of the pictures: losses are means over both."""
    few = ["train.steps=3", "train.log_every=1", "train.batch_size=4", "train.eval_every=3", "train.sample_every=0"]
    few += ['model.trained=["llama", "projector", "dream_queries", "condition", "clip", "diffusion.unet"]']
    one = metrics(run_tiny("dreamllm", tmp_path / "one", *dream_parts, *few))
    done = train_on(2, "dreamllm", tmp_path / "two", *dream_parts, *few)
    assert done.returncode == 0, done.stderr
    for entry, expected in zip(metrics(tmp_path / "two"), one, strict=True):
        assert entry == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ('model.trained=["lama"]', 'no weight\'s name begins with "lama"; there are dream_queries, llama, clip'),
        ("model.stage=understand", "the stage understand learns no pictures"),
        ("model.stage=dreaming", 'stage "dreaming" must be one of understand'),
        ("model.llama=", "model.llama is empty"),
        ("train.ema=0.9", "train.ema is not for model.kind dreamllm"),
        ("model.projector=round", 'projector "round" must be one of linear'),
    ],
)
def test_what_cannot_be_trained_is_one_line(override, says, dream_parts, tmp_path):
    assert says in refused(run_tiny, "dreamllm", tmp_path / "run", *dream_parts, override)


def test_a_stage_with_other_queries_than_its_start_is_one_line(dream_run, tmp_path):
    message = refused(run_tiny, "dreamllm", tmp_path / "run", f"model.init={dream_run}", "model.queries=5")
    assert message.startswith("model.queries is 5 in the configuration but 4 in ")


@pytest.mark.parametrize("stage", tasks.STAGES)
def test_a_stage_says_what_is_trained_if_the_configuration_does_not(stage, dream_run, tmp_path, capsys):
    """As in the published recipes: stage I trains what joins the parts, II and III the LLaMA too."""
    weights = {"understand": ["model.w_vm=0"], "create": ["model.w_lm=0"]}.get(stage, [])
    options = [f"model.init={dream_run}", "model.trained=[]", f"model.stage={stage}", *weights, *TWO_STEPS]
    run_tiny("dreamllm", tmp_path / "run", *options)
    shown = capsys.readouterr().out.splitlines()[0].partition(";")[0].removeprefix("trained: ")
    assert tuple(part.split()[0] for part in shown.split(", ")) == tasks.STAGES[stage]


def test_a_dreamllm_without_held_out_rows_goes_on(dream_run, pictures, tmp_path, capsys):
    source = [f'data.sources=[{{path = "{pictures}", kind = "image"}}]', "data.held_out_fraction=0"]
    often = ["train.steps=2", "train.eval_every=1", "train.sample_every=1"]
    run = run_tiny("dreamllm", tmp_path / "run", f"model.init={dream_run}", *source, *often)
    assert capsys.readouterr().err.count("no held-out metrics: ") == 1
    assert metrics(run)[-1]["step"] == 2 and "held_out_lm_loss" not in metrics(run)[-1]


@pytest.mark.parametrize("stage", tasks.STAGES)
def test_the_published_stages_at_true_size(stage):
    """configs/dreamllm_*.toml: what they train, counted on a DreamLLM-7B without weights."""
    s, _ = tasks.read_run(ROOT / "configs" / f"dreamllm_{stage}.toml")
    tokenizer = Tokenizer.from_pretrained("bytes")
    tokenizer.add(ADDED)
    with torch.device("meta"):
        llama = LLaMA(dataclasses.replace(LLaMAConfig.named("vicuna_7b"), vocab_size=32008))
        clip = CLIP(dataclasses.replace(CLIPConfig.named("ViT-L/14"), text=None, embed_dim=0))
        unet = UNet(dataclasses.replace(UNetConfig.named("sd21"), sample_size=64))
        diffusion = LatentDiffusion(unet, AutoencoderKL(AutoencoderKLConfig.named("sd")), NoiseSchedule())
        model = DreamLLM(llama, clip, diffusion, DreamLLMConfig(), tokenizer)
    projector, queries, condition = 1024 * 4096 + 4096, 64 * 4096, 4096 * 1024
    expected = {"understand": projector, "create": queries + condition}
    everything = sum(p.numel() for p in llama.parameters()) + projector + queries + condition
    assert sum(tasks.freeze_all_but(model, s.model.trained).values()) == expected.get(stage, everything)
    lr = {"understand": 2e-3, "create": 2e-3, "interleaved": 2e-5, "instruct": 4e-5}[stage]
    weights = {"understand": (1, 0), "create": (0, 1)}.get(stage, (1, 10))
    assert (s.optim.lr, s.optim.weight_decay, (s.model.w_lm, s.model.w_vm)) == (lr, 0, weights)
    assert s.train.activation_checkpointing and s.train.dtype == "bfloat16"
