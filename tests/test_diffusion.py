"""What diffusion.py promises: the published networks to the last tensor, and samplers that converge at their order."""

import dataclasses
import inspect
import json
import math
from itertools import pairwise

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file, save_file
from sampler_orders import LINE, ORDERED, path_error
from torch import nn

import diffusion
from diffusion import (
    SAMPLERS,
    AutoencoderKL,
    AutoencoderKLConfig,
    AutoencoderLoss,
    Conditioning,
    LatentDiffusion,
    NoiseSchedule,
    UNet,
    UNetConfig,
    classifier_free_guidance,
    diffusion_loss,
)
from published import stable_diffusion
from support import checkpoint, settings
from support.settings import UserError
from support.tokenizer import CLIPTokenizer

FOLDERS = ("sd15_diffusers", "sd21_diffusers", "sdxl_diffusers")
# The published shapes, shrunk in width only.
SMALL = {
    "sd15": {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 24},
    "sd21": {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 24, "heads": (2, 4, 4, 4)},
    "sdxl": {
        "block_out_channels": (32, 64, 64),
        "cross_attention_dim": 24,
        "heads": (2, 4, 4),
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 20 + 6 * 8,
    },
}
TINY = UNetConfig(
    sample_size=8, block_out_channels=(8, 16), layers_per_block=1, depth=(1, 0), heads=(2, 2),
    cross_attention_dim=12, norm_num_groups=4,
)  # fmt: skip
TINY_VAE = AutoencoderKLConfig(sample_size=16, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def randomize(model, seed=0):
    """Every weight away from 0 and 1: no part of the model can be left out unnoticed."""
    draws = seeded(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=draws))
    return model.eval()


def tiny(seed=0, text_encoder=None, schedule=None, **changes):
    torch.manual_seed(seed)
    unet = randomize(UNet(dataclasses.replace(TINY, **changes)))
    vae = randomize(AutoencoderKL(TINY_VAE))
    return LatentDiffusion(unet, vae, schedule or NoiseSchedule(), text_encoder)


def inputs(c, count=2, side=16, dtype=torch.float32):
    """latents, t, context, text_embeds, time_ids as a U-Net of config c takes them."""
    x = randn(count, 4, side, side, dtype=dtype)
    context = randn(count, 7, c.cross_attention_dim, seed=1, dtype=dtype)
    t = torch.tensor([999, 1])[:count]
    if not c.addition_time_embed_dim:
        return x, t, context, None, None
    pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
    time_ids = torch.tensor([[1024, 768, 0, 8, 1024, 1024]] * count)
    return x, t, context, randn(count, pooled, seed=2, dtype=dtype), time_ids


def schedule_of(saved):
    """A scheduler_config.json, as parsed, as a NoiseSchedule."""
    return settings.build(NoiseSchedule, stable_diffusion.schedule_fields(saved))


def original_config(source):
    """A single file's YAML or JSON as our three configurations."""
    classes = UNetConfig, AutoencoderKLConfig, NoiseSchedule
    return tuple(map(settings.build, classes, stable_diffusion.original_fields(source)))


# ---- golden: what the original implementations made of the same weights ----------------------


@torch.inference_mode()
@pytest.mark.parametrize("name", [*FOLDERS, "sd1_compvis"])
def test_unet_and_autoencoder_are_the_references(name):
    folder, config = GOLDEN / name, None
    if name == "sd1_compvis":
        config, folder = folder / "config.json", folder / "weights.ckpt"
    model = LatentDiffusion.from_pretrained(folder, config=config)
    io = load_file(GOLDEN / name / "io.safetensors")
    prediction = model.unet(io["x"], io["t"], io["context"], io.get("text_embeds"), io.get("time_ids"))
    assert (prediction - io["unet_out"]).abs().max() <= 1e-4
    assert (torch.cat(model.vae.encode(io["image"]), dim=1) - io["vae_moments"]).abs().max() <= 1e-4
    assert (model.vae.decode(io["z"]) - io["vae_decoded"]).abs().max() <= 1e-4


def scheduler_runs():
    config = json.loads((GOLDEN / "sd_schedulers" / "config.json").read_text())
    return config, config["runs"]


@pytest.mark.parametrize("run", scheduler_runs()[1], ids=lambda run: run["key"])
def test_trajectories_are_the_references(run):
    """Every step of DDPM, DDIM, DPM-Solver++ and Euler, for a model that is linear in x and t."""
    config, io = scheduler_runs()[0], load_file(GOLDEN / "sd_schedulers" / "io.safetensors")
    saved = config["scheduler_configs"][run["config"]] | {"prediction_type": run["prediction_type"]}
    times, noise = [], iter([io["x_init"], *io["ddpm_noise"]])

    def predict(x, t):
        times.append(float(t))
        return config["a"] * x + config["b"] * float(t) / 1000

    sampler = SAMPLERS[{"dpmpp2m": "dpmpp_2m"}.get(run["scheduler"], run["scheduler"])]
    xs = list(sampler(predict, schedule_of(saved), run["steps"], lambda: next(noise)))
    assert (torch.tensor(times) - io[run["key"] + ".timesteps"]).abs().max() <= 1e-4
    kept = torch.stack([xs[i] for i in run["kept_step_indices"]])
    assert (kept - io[run["key"] + ".x_after"]).abs().max() <= 1e-4


def test_noising_and_targets_are_the_references():
    io, schedule = load_file(GOLDEN / "sd_schedulers" / "io.safetensors"), NoiseSchedule(prediction_type="v_prediction")
    x0, noise, t = (io[f"train.{name}"] for name in ("x0", "noise", "timesteps"))
    assert (schedule.alphas_cumprod - io["alphas_cumprod"]).abs().max() <= 1e-6
    assert (schedule.add_noise(x0, noise, t) - io["train.noisy"]).abs().max() <= 1e-5
    assert (schedule.target(x0, noise, t) - io["train.velocity"]).abs().max() <= 1e-5


# ---- against diffusers -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, count", [("sd15", 859_520_964), ("sd21", 865_910_724), ("sdxl", 2_567_463_684), ("vae", 83_653_863)]
)
def test_true_size_has_the_published_weights_by_name_and_shape(name, count):
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        if name == "vae":
            ours = AutoencoderKL(AutoencoderKLConfig.named("sd"))
            theirs = diffusers.AutoencoderKL.from_config(stable_diffusion.vae_json(ours.config))
        else:
            ours = UNet(UNetConfig.named(name))
            theirs = diffusers.UNet2DConditionModel.from_config(stable_diffusion.unet_json(ours.config))
    assert sum(p.numel() for p in ours.parameters()) == count
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


@pytest.mark.parametrize("name", SMALL)
def test_outputs_and_gradients_are_diffusers(name):
    """Gradients in float64, where the two cannot differ by rounding, so that even vanishing ones are compared."""
    diffusers = pytest.importorskip("diffusers")
    config = dataclasses.replace(UNetConfig.named(name), norm_num_groups=8, **SMALL[name])
    torch.manual_seed(0)
    theirs = randomize(diffusers.UNet2DConditionModel.from_config(stable_diffusion.unet_json(config)))
    ours = UNet(config)
    ours.load_state_dict(theirs.state_dict())

    def predictions(dtype):
        x, t, context, text_embeds, time_ids = inputs(config, dtype=dtype)
        context.requires_grad_()
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        yield ours.to(dtype)(x, t, context, text_embeds, time_ids), context
        yield theirs.to(dtype)(x, t, context, added_cond_kwargs=added if time_ids is not None else None).sample, context

    with torch.no_grad():
        (a, _), (b, _) = predictions(torch.float32)
    assert (a - b).abs().max() <= 1e-4

    gradients = []
    for model, (out, context) in zip((ours, theirs), predictions(torch.float64), strict=True):
        (out * randn(*out.shape, seed=3, dtype=torch.float64)).sum().backward()
        gradients.append({k: p.grad for k, p in model.named_parameters()} | {"context": context.grad.clone()})
        context.grad = None
    for key, gradient in gradients[1].items():
        assert (gradients[0][key] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-12, key


def test_autoencoder_gradients_are_diffusers():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = randomize(diffusers.AutoencoderKL.from_config(stable_diffusion.vae_json(TINY_VAE))).double()
    ours = AutoencoderKL(TINY_VAE).double()
    ours.load_state_dict(theirs.state_dict())
    images, noise = randn(2, 3, 16, 16, dtype=torch.float64), randn(2, 4, 8, 8, seed=1, dtype=torch.float64)
    reconstruction, mean, logvar = ours(images, noise)
    ((reconstruction - images).abs().mean() + diffusion.kl_divergence(mean, logvar)).backward()
    posterior = theirs.encode(images).latent_dist
    out = theirs.decode(posterior.mean + posterior.std * noise).sample
    ((out - images).abs().mean() + posterior.kl().mean()).backward()
    assert (reconstruction - out).abs().max() <= 1e-10
    for key, p in theirs.named_parameters():
        assert (ours.get_parameter(key).grad - p.grad).abs().max() <= 1e-4 * p.grad.abs().max() + 1e-12, key


@pytest.mark.parametrize("xl", [False, True])
def test_diffusers_opens_what_we_save_and_draws_the_same_picture(tmp_path, xl):
    """The whole pipeline folder, in their pipeline class: guidance, scheduler, decoding."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    added = {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 5 + 6 * 4} if xl else {}
    model = tiny(**added)
    model.save_pretrained(tmp_path)
    absent = {} if xl else {"text_encoder": None, "tokenizer": None}  # there, their class wants to hear it
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path, **absent)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline).__name__ == ("StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline")
    context, negative, latents = randn(1, 7, 12), randn(1, 7, 12, seed=1), randn(1, 4, 8, 8, seed=2)
    texts = {"prompt_embeds": context, "negative_prompt_embeds": negative}
    if xl:
        pooled, without = randn(1, 5, seed=3), randn(1, 5, seed=4)
        texts |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": without}
        context, negative = Conditioning(context, pooled), Conditioning(negative, without)
    theirs = pipeline(
        **texts, latents=latents, num_inference_steps=4, guidance_scale=3.0, height=16, width=16, output_type="pt"
    ).images
    ours = model.generate(context, negative, guidance=3.0, steps=4, size=16, noise=lambda: latents)
    assert (ours - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize("xl", [False, True])
def test_a_prompt_becomes_the_picture_that_diffusers_draws(tmp_path, xl):
    """With clip.py's text towers and tokenizer: SD reads one tower's last layer, SDXL two towers' last but one."""
    diffusers, clip = pytest.importorskip("diffusers"), pytest.importorskip("clip")
    pytest.importorskip("transformers")
    towers = []
    for width, embed_dim in ((4, 0), (8, 5)) if xl else ((12, 0),):
        shape = {"width": width, "layers": 2, "heads": 2, "hidden_dim": 16, "vocab_size": 514}
        towers.append(randomize(clip.CLIP(clip.CLIPConfig(embed_dim, vision=None, text=clip.TextConfig(**shape)))))
        towers[-1].tokenizer = CLIPTokenizer.of_bytes()
    added = {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 5 + 6 * 4} if xl else {}
    tiny(text_encoder=towers, **added).save_pretrained(tmp_path)
    model = LatentDiffusion.from_pretrained(tmp_path, clip.text_encoders(tmp_path))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    latents, size = randn(1, 4, 8, 8), {"height": 16, "width": 16}
    for negative in ("a dog", None):
        theirs = pipeline(
            "a cat", negative_prompt=negative, latents=latents, num_inference_steps=3, guidance_scale=5.0, **size,
            output_type="pt",
        ).images  # fmt: skip
        ours = model.generate("a cat", negative, guidance=5.0, steps=3, size=16, noise=lambda: latents)
        assert (ours - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_noise_tables_are_diffusers(beta_schedule, zero_snr):
    diffusers = pytest.importorskip("diffusers")
    ours = NoiseSchedule(100, beta_schedule=beta_schedule, rescale_betas_zero_snr=zero_snr, prediction_type="sample")
    theirs = diffusers.DDIMScheduler.from_config(stable_diffusion.schedule_json(ours))
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-5, atol=1e-7)
    assert (ours.alphas_cumprod[-1] == 0) == zero_snr


THEIRS = {
    "ddim": "DDIM",
    "dpmpp_2m": "DPMSolverMultistep",
    "euler": "EulerDiscrete",
    "euler_ancestral": "EulerAncestralDiscrete",
}
# diffusers' DDIM does not step to its own next time where the spacing is linspace, its Euler-ancestral knows no x0
NOT_THEIRS = {("ddim", "linspace"), ("euler_ancestral", "sample")}
CASES = [
    (sampler, spacing, prediction)
    for sampler in THEIRS
    for spacing in ("leading", "linspace", "trailing")
    for prediction in ("epsilon", "v_prediction", "sample")
    if not NOT_THEIRS & {(sampler, spacing), (sampler, prediction)}
]


@pytest.mark.filterwarnings("ignore:__array")  # diffusers' own
@pytest.mark.parametrize("sampler, spacing, prediction_type", CASES)
def test_every_sampler_and_spacing_ends_where_diffusers_does(sampler, spacing, prediction_type, monkeypatch):
    """What the golden files leave out: the third kind of prediction, other spacings, Euler's ancestral form."""
    diffusers = pytest.importorskip("diffusers")
    schedule = NoiseSchedule(timestep_spacing=spacing, prediction_type=prediction_type)
    theirs = getattr(diffusers, f"{THEIRS[sampler]}Scheduler").from_config(stable_diffusion.schedule_json(schedule))
    theirs.set_timesteps(10)
    noise = [randn(1, 4, 4, 4, seed=i) for i in range(11)]
    module = "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor"
    if sampler == "euler_ancestral":
        monkeypatch.setattr(module, lambda *_, **__: noise[theirs.step_index + 1])
    x = noise[0] * theirs.init_noise_sigma
    for t in theirs.timesteps:
        prediction = 0.35 * theirs.scale_model_input(x, t) - 0.25 * float(t) / 1000
        x = theirs.step(prediction, t, x).prev_sample
    draws = iter(noise)
    *_, ours = SAMPLERS[sampler](lambda x, t: 0.35 * x - 0.25 * float(t) / 1000, schedule, 10, lambda: next(draws))
    assert (ours - x).abs().max() <= 1e-4


# ---- published files -------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS)
def test_saving_and_loading_changes_no_bit(name, tmp_path):
    model = LatentDiffusion.from_pretrained(GOLDEN / name)
    model.save_pretrained(tmp_path)
    again = LatentDiffusion.from_pretrained(tmp_path)
    assert (again.unet.config, again.vae.config) == (model.unet.config, model.vae.config)
    assert again.schedule == model.schedule
    pairs = zip(model.state_dict().items(), again.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("part", ["unet", "vae"])
def test_our_config_says_all_that_the_published_one_says(name, part, tmp_path):
    """Some published keys are defaults that older files leave out, or say with one number where ours has several."""
    LatentDiffusion.from_pretrained(GOLDEN / name).save_pretrained(tmp_path)
    ours, theirs = (json.loads((path / part / "config.json").read_text()) for path in (tmp_path, GOLDEN / name))
    unread = {"_diffusers_version", "addition_embed_type_num_heads", "num_attention_heads", "force_upcast"}
    said = {key: value for key, value in theirs.items() if key not in unread and value is not None}
    assert {key: ours.get(key) for key in said} == said


def test_a_single_file_of_an_unknown_shape_asks_for_its_config():
    with pytest.raises(UserError, match=r"config="):
        LatentDiffusion.from_pretrained(GOLDEN / "sd1_compvis" / "weights.ckpt")


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_a_published_single_file_is_told_by_its_shapes(name):
    """Except that SD 2.1's two kinds of prediction look the same."""
    c = UNetConfig.named(name)
    with torch.device("meta"):
        tensors = {
            "input_blocks.0.0.weight": torch.empty(c.block_out_channels[0], 4, 3, 3),
            "middle_block.1.transformer_blocks.0.attn2.to_k.weight": torch.empty(1280, c.cross_attention_dim),
        }
    assert stable_diffusion.published_unet(tensors, "x.safetensors") == name


def test_every_published_name_of_a_single_file_is_renamed_to_one_of_ours():
    """The golden file has three levels; here all of SDXL's, whose added embedding and depths it lacks."""
    c = UNetConfig.named("sdxl")
    with torch.device("meta"):
        ours = {name.rpartition(".")[0] for name in UNet(c).state_dict()}
    names = stable_diffusion.unet_names(len(c.depth), c.layers_per_block)
    targets = [ours for ours in names.values() if "attentions" not in ours]
    plain = {name for name in ours if "attentions" not in name}
    assert plain <= set(targets)
    places = {name.split(".norm")[0] for name in ours if "attentions" in name and name.endswith(".norm")}
    assert places <= set(names.values())


def single_file(path, changes):
    tensors = checkpoint.read_tensors(GOLDEN / "sd1_compvis" / "weights.ckpt") | changes
    save_file({k: v.clone() for k, v in tensors.items() if v is not None}, path)
    return path


@pytest.mark.parametrize(
    "changes, culprit",
    [
        ({"hypernetwork.weight": torch.zeros(2)}, "hypernetwork.weight"),
        ({"model.diffusion_model.out.2.bias": None}, "conv_out.bias"),
        ({"first_stage_model.decoder.conv_out.bias": torch.zeros(4)}, "conv_out.bias"),
        ({"model.diffusion_model.out.2.bias": torch.full((4,), math.nan)}, "NaN"),
    ],
)
def test_no_weight_of_a_single_file_is_silently_lost(changes, culprit, tmp_path):
    path = single_file(tmp_path / "model.safetensors", changes)
    with pytest.raises(UserError, match=culprit) as error:
        LatentDiffusion.from_pretrained(path, config=GOLDEN / "sd1_compvis" / "config.json")
    assert "\n" not in str(error.value)


def test_a_file_of_the_autoencoder_alone_opens(tmp_path):
    """As the improved autoencoders for SD 1 are published: no prefix, and training's loss beside."""
    tensors = checkpoint.read_tensors(GOLDEN / "sd1_compvis" / "weights.ckpt")
    prefix = "first_stage_model."
    own = {k.removeprefix(prefix): v.clone() for k, v in tensors.items() if k.startswith(prefix)}
    save_file(own | {"loss.logvar": torch.zeros(())}, tmp_path / "vae.safetensors")
    _, config, _ = original_config(GOLDEN / "sd1_compvis" / "config.json")
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae.safetensors", config=config)
    io = load_file(GOLDEN / "sd1_compvis" / "io.safetensors")
    with torch.inference_mode():
        assert (vae.decode(io["z"]) - io["vae_decoded"]).abs().max() <= 1e-4


def test_yaml_says_the_same_as_json(tmp_path):
    yaml = pytest.importorskip("yaml")
    content = json.loads((GOLDEN / "sd1_compvis" / "config.json").read_text())
    content["model"]["params"]["parameterization"] = "v"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    unet, vae, schedule = original_config(tmp_path / "config.yaml")
    assert (unet, vae) == original_config(GOLDEN / "sd1_compvis" / "config.json")[:2]
    assert schedule.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    "part, change",
    [
        ("unet/config.json", {"act_fn": "relu"}),
        ("unet/config.json", {"down_block_types": ["SimpleCrossAttnDownBlock2D", "DownBlock2D"]}),
        ("unet/config.json", {"time_cond_proj_dim": 256}),
        ("unet/config.json", {"norm_num_groups": 3}),
        ("unet/config.json", {"layers_per_block": [2, 1]}),
        ("vae/config.json", {"shift_factor": 0.1}),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}),
    ],
)
def test_what_we_do_not_compute_is_one_line(part, change, tmp_path):
    LatentDiffusion.from_pretrained(GOLDEN / "sd15_diffusers").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / part).read_text())
    (tmp_path / part).write_text(json.dumps(saved | change))
    with pytest.raises(UserError, match=str(tmp_path)) as error:
        LatentDiffusion.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


# ---- every key of a published configuration ---------------------------------------------------

# A second legal value of each key; of numbers twice the first, of a bool the other.
OTHER = {
    "act_fn": "gelu", "addition_embed_type": "text", "addition_time_embed_dim": 8, "algorithm_type": "dpmsolver",
    "attention_head_dim": 4, "attention_type": "gated", "beta_schedule": "squaredcos_cap_v2",
    "block_out_channels": [8, 8], "class_embed_type": "timestep", "clip_sample": True,
    "cross_attention_norm": "layer_norm", "down_block_types": ["DownBlock2D"] * 2, "dropout": 0.1,
    "encoder_hid_dim": 8, "encoder_hid_dim_type": "text_proj", "final_sigmas_type": "sigma_min", "freq_shift": 1,
    "interpolation_type": "log_linear", "lambda_min_clipped": -5.1, "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4, "mid_block_only_cross_attention": True, "mid_block_type": "UNetMidBlock2D",
    "norm_num_groups": 1, "num_attention_heads": 4, "num_class_embeds": 3, "prediction_type": "v_prediction",
    "projection_class_embeddings_input_dim": 64, "resnet_time_scale_shift": "scale_shift",
    "reverse_transformer_layers_per_block": [[1], [1]], "sample_size": 32, "shift_factor": 0.1, "sigma_max": 10.0,
    "sigma_min": 0.1, "solver_type": "heun", "steps_offset": 1, "time_cond_proj_dim": 8,
    "time_embedding_act_fn": "silu", "time_embedding_dim": 8, "time_embedding_type": "fourier",
    "time_shift_type": "linear", "timestep_post_act": "silu", "timestep_spacing": "trailing",
    "timestep_type": "continuous",
    "disable_corrector": [0], "noise_sampler_seed": 1, "shift_terminal": 0.1, "solver_p": "x", "tau_func": "x",
    "trained_betas": [0.1], "up_block_types": ["UpBlock2D"] * 2, "variance_type": "fixed_large",
}  # fmt: skip
NO_EFFECT = {
    "addition_embed_type_num_heads": "of an addition_embed_type that is refused",
    "clip_sample_range": "of clip_sample, which is said to be left out",
    "dynamic_thresholding_ratio": "of thresholding, which is said to be left out",
    "euler_at_final": "the last step goes to σ = 0, which is of first order in any case",
    "flow_shift": "of use_flow_sigmas, which is refused",
    "force_upcast": "LatentDiffusion keeps the autoencoder out of float16, whatever it says",
    "lower_order_final": "as euler_at_final",
    "sample_max_value": "of thresholding, which is said to be left out",
    "sigma_max": "of Karras' and others' spacings of σ, which are said to be left out",
    "sigma_min": "of Karras' and others' spacings of σ, which are said to be left out",
    "time_shift_type": "of use_dynamic_shifting, which is refused",
} | dict.fromkeys(
    ("skip_prk_steps", "predict_x0", "disable_corrector", "solver_p", "original_inference_steps", "timestep_scaling",
     "predictor_order", "corrector_order", "tau_func", "noise_sampler_seed", "shift_terminal"),
    "of a sampler that is not here: it is said that another follows its schedule",
)  # fmt: skip
# what diffusers has only beside another package, torchsde
KINDS = [kind for kind in stable_diffusion.SCHEDULER_KINDS if kind != "DPMSolverSDEScheduler"]


PARTS = {
    "unet": (UNetConfig, stable_diffusion.unet_fields),
    "vae": (AutoencoderKLConfig, stable_diffusion.vae_fields),
    "scheduler": (NoiseSchedule, stable_diffusion.schedule_fields),
}


def opened(part, saved):
    """A part's diffusers configuration as ours."""
    cls, to_fields = PARTS[part]
    return settings.build(cls, to_fields(saved, "config.json"))


def golden_config(part, name="sd15_diffusers"):
    return checkpoint.read_json(next((GOLDEN / name / part).glob("*config.json")))


@pytest.mark.parametrize("kind", ["UNet2DConditionModel", "AutoencoderKL", *KINDS])
def test_every_key_of_diffusers_is_honoured_refused_or_said(kind, capsys):
    """A key that changes what their class computes changes our configuration, or an error or a line names it."""
    diffusers = pytest.importorskip("diffusers")
    part = {"UNet2DConditionModel": "unet", "AutoencoderKL": "vae"}.get(kind, "scheduler")
    first = {"_class_name": kind, "clip_sample": False} if part == "scheduler" else golden_config(part)
    parameters = list(inspect.signature(getattr(diffusers, kind).__init__).parameters.values())[1:]
    assert len(parameters) > 5
    for parameter in parameters:
        key, default = parameter.name, first.get(parameter.name, parameter.default)
        other = OTHER[key] if key in OTHER else not default if isinstance(default, bool) else 2 * default
        assert other != default, key
        try:
            honoured = opened(part, first | {key: other}) != opened(part, first)
            assert not capsys.readouterr().err, key  # it is known
            if part == "scheduler":
                stable_diffusion.sampler_of(first | {key: other}, "x")
            said = capsys.readouterr().err
            honoured = honoured or f"{key} " in said
        except UserError as error:
            assert key in str(error), key
            honoured = True
        assert honoured != (key in NO_EFFECT), key


@pytest.mark.filterwarnings("ignore:__array")  # diffusers' own
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_scheduler_leaves_out_is_diffusers_default(kind):
    """Theirs, and not those of SD 1.5, which are ours."""
    diffusers = pytest.importorskip("diffusers")
    theirs = dict(getattr(diffusers, kind)().config) | {"clip_sample": False}
    silent = opened("scheduler", {"_class_name": kind, "timestep_spacing": theirs.get("timestep_spacing")})
    assert opened("scheduler", theirs | {"_class_name": kind}) == silent


def test_what_an_autoencoder_leaves_out_is_diffusers_default():
    diffusers = pytest.importorskip("diffusers")
    theirs = json.loads(json.dumps(dict(diffusers.AutoencoderKL().config))) | {"_class_name": "AutoencoderKL"}
    assert opened("vae", theirs) == opened("vae", {"_class_name": "AutoencoderKL", "block_out_channels": [64]})


WRONG = (0, -1, 0.5, 1e30, 2**70, math.nan, -math.inf, "8", "", True, [], [0], [8], [None, None], {}, {"a": 1})


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", FOLDERS)
def test_a_wrong_value_in_diffusers_json_is_one_line(part, name):
    """Whatever stands under a key, what comes out is a configuration or one line that names file and key."""
    saved = golden_config(part, name)
    for value in ([], 5, None, "text"):
        with pytest.raises(UserError, match=r"config\.json: "):
            opened(part, value)
    for key in saved:
        for value in WRONG:
            try:
                opened(part, saved | {key: value})
            except UserError as error:
                assert "config.json: " in str(error) and key in str(error), (key, value)
                assert "\n" not in str(error) and len(str(error)) < 400, (key, value)


def leaves(table, path=()):
    for key, value in table.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))


def test_a_wrong_value_in_the_yaml_of_a_single_file_is_one_line():
    original = checkpoint.read_json(GOLDEN / "sd1_compvis" / "config.json")
    for path in leaves(original):
        for value in (*WRONG, None):
            content = json.loads(json.dumps(original))
            table = content
            for key in path[:-1]:
                table = table[key]
            table[path[-1]] = value
            try:
                original_config(content)
            except UserError as error:
                message = str(error)
                assert message.startswith("config: ") and "\n" not in message and len(message) < 400, (path, value)


@pytest.mark.parametrize(
    "cls, key, value",
    [
        (UNetConfig, "norm_num_groups", 0),
        (UNetConfig, "heads", (0, 8, 8, 8)),
        (UNetConfig, "block_out_channels", ()),
        (UNetConfig, "block_out_channels", (32,) * 11),
        (UNetConfig, "block_out_channels", 5),
        (UNetConfig, "depth", (-1, 1, 1, 0)),
        (UNetConfig, "depth", (1000, 1, 1, 1)),
        (UNetConfig, "layers_per_block", 0),
        (UNetConfig, "layers_per_block", 10**6),
        (UNetConfig, "cross_attention_dim", "768"),
        (AutoencoderKLConfig, "norm_num_groups", 0),
        (AutoencoderKLConfig, "in_channels", 1),
        (AutoencoderKLConfig, "latent_channels", 10**9),
        (AutoencoderKLConfig, "scaling_factor", 0.0),
        (AutoencoderKLConfig, "scaling_factor", math.nan),
        (NoiseSchedule, "num_train_timesteps", 0),
        (NoiseSchedule, "num_train_timesteps", 10**9),
        (NoiseSchedule, "num_train_timesteps", None),
        (NoiseSchedule, "beta_start", 0.0),
        (NoiseSchedule, "beta_start", 1e-12),
        (NoiseSchedule, "beta_end", 1.5),
        (NoiseSchedule, "beta_end", math.nan),
        (NoiseSchedule, "steps_offset", -1),
        (NoiseSchedule, "prediction_type", "velocity"),
        (AutoencoderLoss, "kl", -1.0),
        (AutoencoderLoss, "l1", 0.0),
    ],
)
def test_a_wrong_number_in_a_toml_section_is_one_line(cls, key, value):
    with pytest.raises(UserError, match=key) as error:
        settings.build(cls, {key: value}, "model")
    assert "model" in str(error.value) and "\n" not in str(error.value)


def test_the_default_size_is_that_of_the_latents_not_the_one_marked_as_unused():
    """SD's own YAML says image_size: 64 of the model, and 32 of its U-Net, "# unused"."""
    content = checkpoint.read_json(GOLDEN / "sd1_compvis" / "config.json")
    content["model"]["params"]["image_size"] = 64
    assert original_config(content)[0].sample_size == 64


def test_sdxl_s_yaml_says_its_prediction_by_the_class_of_a_scaling():
    content = checkpoint.read_json(GOLDEN / "sd1_compvis" / "config.json")
    scaling = {"target": "sgm.modules.diffusionmodules.denoiser_scaling.VScaling"}
    denoiser = {"scaling_config": scaling, "discretization_config": {"target": "LegacyDDPMDiscretization"}}
    content["model"]["params"]["denoiser_config"] = {"params": denoiser}
    assert original_config(content)[2].prediction_type == "v_prediction"
    scaling["target"] = "sgm.modules.diffusionmodules.denoiser_scaling.EDMScaling"
    with pytest.raises(UserError, match="EDMScaling"):
        original_config(content)


@pytest.mark.parametrize("cls", [LatentDiffusion, UNet, AutoencoderKL])
def test_a_folder_of_another_kind_is_named(cls, tmp_path):
    with pytest.raises(UserError, match=r"holds a LLaMA, but .* is wanted"):
        cls.from_pretrained(GOLDEN / "llama_hf_lvm")
    (tmp_path / "config.json").write_text('{"_class_name": "VQModel"}')
    with pytest.raises(UserError, match="holds a VQGAN"):
        cls.from_pretrained(tmp_path)


def test_a_part_alone_is_no_pipeline():
    with pytest.raises(UserError, match="holds a U-Net of latent diffusion"):
        LatentDiffusion.from_pretrained(GOLDEN / "sd15_diffusers" / "unet")
    with pytest.raises(UserError, match="holds an autoencoder"):
        UNet.from_pretrained(GOLDEN / "sd15_diffusers" / "vae")


def test_a_unet_for_inpainting_is_refused():
    """It takes nine channels: noise, the rest of the picture, and the mask."""
    with pytest.raises(UserError, match="9 channels in"):
        tiny(in_channels=9)


# ---- the networks ----------------------------------------------------------------------------


def test_attention_is_softmax_of_scores():
    """The slow and obvious twin of the fused one."""
    layer = diffusion.Attention(8, heads=2, context_width=6)
    x, context = randn(1, 5, 8), randn(1, 3, 6, seed=1)
    heads = []
    for head in range(2):
        rows = slice(4 * head, 4 * head + 4)
        q, k, v = (
            x @ layer.to_q.weight[rows].T,
            context @ layer.to_k.weight[rows].T,
            context @ layer.to_v.weight[rows].T,
        )
        heads.append((q @ k.transpose(1, 2) / 2).softmax(-1) @ v)  # 2 = √4
    torch.testing.assert_close(layer(x, context), layer.to_out(torch.cat(heads, dim=-1)))


def test_a_fresh_unet_predicts_nothing_and_every_weight_can_learn():
    torch.manual_seed(0)
    unet = UNet(TINY)
    x, t, context, *_ = inputs(TINY, side=8)
    assert unet(x, t, context).abs().max() == 0
    for p in unet.parameters():  # away from the start, where the zeros hide what is behind them
        nn.init.normal_(p, std=0.2)
    unet(x, t, context).pow(2).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in unet.parameters())


def test_recomputing_changes_memory_not_gradients():
    """Through a frozen U-Net in eval mode, to the context: as DreamLLM needs it."""
    unet = tiny().unet.requires_grad_(False)
    x, t, context, *_ = inputs(TINY, side=8)
    gradients, kept = [], []
    for unet.activation_checkpointing in (False, True):
        context = context.detach().requires_grad_()
        saved = []

        def keep(tensor, saved=saved):
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            unet(x, t, context).sum().backward()
        gradients.append(context.grad)
        kept.append(sum(saved))
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0].abs().max() > 0
    assert kept[1] < kept[0] / 2


def test_sides_that_do_not_halve_evenly_pass_through():
    unet = tiny().unet
    x, t, context, *_ = inputs(TINY, side=7)
    assert unet(x, t, context).shape == x.shape


def test_an_autoencoder_names_a_picture_it_cannot_divide():
    with pytest.raises(UserError, match="15×16"):
        tiny().vae.encode(torch.zeros(1, 3, 16, 15))


# ---- training --------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_counts_the_error_of_x0(prediction_type):
    """However the error is measured, its weighted square is that of the x0 it stands for, times min(SNR, γ)."""
    schedule = NoiseSchedule(prediction_type=prediction_type)
    x0, noise, t = randn(3, 4, 2, 2), randn(3, 4, 2, 2, seed=1), torch.tensor([900, 400, 10])
    x = schedule.add_noise(x0, noise, t)
    wrong = schedule.target(x0, noise, t) + 0.01 * randn(3, 4, 2, 2, seed=2)
    loss = diffusion_loss(lambda *_: wrong, schedule, x0, noise, t, None, min_snr=5.0)
    errors, snrs = [], []
    for i in range(3):
        a = schedule.alphas_cumprod[t[i]]
        errors.append((schedule.x0_and_noise(wrong[i], x[i], a)[0] - x0[i]).pow(2).mean())
        snrs.append(min(float(a / (1 - a)), 5.0))
    torch.testing.assert_close(loss, sum(e * s for e, s in zip(errors, snrs, strict=True)) / 3, rtol=1e-3, atol=0)
    plain = diffusion_loss(lambda *_: wrong, schedule, x0, noise, t, None)
    torch.testing.assert_close(plain, (wrong - schedule.target(x0, noise, t)).pow(2).mean())


def test_a_unet_taught_two_words_draws_what_each_means():
    """Two contexts, two pictures, each of one colour: noise and the word alone bring the colour back."""
    torch.manual_seed(0)
    unet, schedule, draws = UNet(TINY), NoiseSchedule(prediction_type="v_prediction"), seeded()
    words = randn(2, 7, 12, seed=5)
    colours = torch.tensor([[1.0, -1, 1, -1], [-1, 1, 1, 1]])[:, :, None, None].expand(-1, -1, 8, 8)
    optimizer = torch.optim.Adam(unet.parameters(), 1e-2)
    for _ in range(100):
        which, t = torch.randint(2, (16,), generator=draws), torch.randint(1000, (16,), generator=draws)
        noise = torch.randn(16, 4, 8, 8, generator=draws)
        diffusion_loss(unet, schedule, colours[which], noise, t, words[which]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        *_, drawn = SAMPLERS["ddim"](lambda x, t: unet(x, t, words), schedule, 10, lambda: randn(2, 4, 8, 8, seed=9))
    right, wrong = ((drawn - x).abs().mean() for x in (colours, colours.flip(0)))
    assert right < wrong / 2


def test_offset_noise_moves_whole_channels():
    noise, draws = randn(2, 4, 8, 8), randn(2, 4, 1, 1, seed=1)
    moved = diffusion.offset_noise(noise, draws, 0.1) - noise
    torch.testing.assert_close(moved, (0.1 * draws).expand_as(noise), rtol=0, atol=1e-6)


def test_noise_cannot_be_predicted_where_no_signal_is_left():
    with pytest.raises(ValueError, match="v_prediction"):
        NoiseSchedule(rescale_betas_zero_snr=True)


def test_a_sampler_follows_only_the_predictions_of_its_row(monkeypatch):
    """A new prediction type, forgotten in the samplers' rows, is no half-way state."""
    monkeypatch.setitem(diffusion.PREDICTIONS, "new", diffusion.PREDICTIONS["epsilon"])
    schedule = NoiseSchedule(prediction_type="new")
    for name in SAMPLERS:
        with pytest.raises(UserError, match=f'"{name}" cannot follow'):
            next(diffusion.SAMPLERS[name](lambda x, t: x, schedule, 5, lambda: torch.zeros(1)))


def test_a_row_that_leaves_a_part_out_is_an_error():
    with pytest.raises(TypeError):
        diffusion.Prediction(target=lambda x0, noise, alpha, sigma: noise)
    with pytest.raises(TypeError):
        diffusion.Sampler(diffusion.sample_ddim, diffusion.DIFFUSION, "leading")


# ---- samplers on a line, where everything is known: bench/sampler_orders.py -------------------


@pytest.mark.parametrize("prediction_type", diffusion.DIFFUSION)
@pytest.mark.parametrize("sampler", ORDERED)
def test_a_sampler_converges_at_its_order(sampler, prediction_type):
    """Twice the steps, 1/2 or 1/4 of the error."""
    order = SAMPLERS[sampler].order
    errors = [path_error(sampler, prediction_type, steps) for steps in (64, 128, 256)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25), errors


@pytest.mark.parametrize("sampler", ["ddpm", "euler_ancestral"])
def test_a_random_sampler_converges_in_distribution(sampler):
    """x0 normal with spread 0.5: every step is linear, so x is a sum of the noise drawn, and its spread is known."""
    schedule = NoiseSchedule(**LINE, timestep_spacing="linspace")

    def spread(steps):
        units = iter(torch.eye(steps + 1, dtype=torch.float64))  # the k-th draw is the k-th unit vector

        def predict(x, t):
            a = schedule.alphas_cumprod[t.round().long()].double()
            return x * (1 - a).sqrt() / (a * 0.5**2 + 1 - a)

        *_, x = SAMPLERS[sampler](predict, schedule, steps, lambda: next(units))
        return x.norm().item()

    errors = [abs(spread(steps) - 0.5) for steps in (65, 129, 257)]
    for coarse, fine in pairwise(errors):
        assert 1.6 < coarse / fine < 2.6, errors  # order 1, in the distribution


# ---- from text to picture --------------------------------------------------------------------


class Words(nn.Module):
    """A text encoder that shows what it was asked for."""

    def __init__(self, width):
        super().__init__()
        self.table = nn.Embedding(256, width)

    def tokenize(self, texts):
        return torch.tensor([[*text.encode()[:7], *[0] * (7 - len(text[:7]))] for text in texts])

    def hidden(self, tokens, layer=-1, final_norm=True):
        return self.table(tokens) + 10 * layer + 100 * final_norm

    def pooled(self, tokens):
        return self.table(tokens).sum(1)


def test_each_generation_reads_its_own_layers():
    one = tiny(text_encoder=Words(12)).encode_text(["a", "b"])
    assert one.text_embeds is None and one.context.shape == (2, 7, 12)
    assert one.context.mean().item() == pytest.approx(-10 + 100, abs=1)  # last layer, normed
    two = tiny(text_encoder=[Words(5), Words(7)]).encode_text(["a", "b"])
    assert two.context.shape == (2, 7, 12) and two.text_embeds.shape == (2, 7)
    assert two.context.mean().item() == pytest.approx(-20, abs=1)  # penultimate, not normed


def test_a_picture_is_the_same_in_any_batch():
    model = tiny(text_encoder=Words(12))
    both = model.generate(["a cat", "a dog"], steps=3, seed=5)
    alone = model.generate("a dog", steps=3, seed=6)
    assert both.shape == (2, 3, 16, 16) and both.min() >= 0 and both.max() <= 1
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-5)
    assert (both[0] - both[1]).abs().max() > 1e-3


def test_the_prompt_the_negative_and_the_seed_all_matter():
    model = tiny(text_encoder=Words(12))
    base = {"prompts": "a cat", "negative": "a dog", "steps": 3, "seed": 0}
    picture = model.generate(**base)
    for change in ({"prompts": "a cow"}, {"negative": "a cow"}, {"seed": 1}, {"guidance": 2.0}, {"rescale": 1.0}):
        assert (model.generate(**base | change) - picture).abs().max() > 1e-4, change
    assert torch.equal(model.generate(**base), picture)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_to_image_keeps_more_of_the_picture_the_lower_its_strength(sampler):
    schedule = NoiseSchedule(prediction_type=SAMPLERS[sampler].predictions[0])
    model = tiny(text_encoder=Words(12), schedule=schedule)
    with torch.no_grad():
        model.unet.conv_out.weight.zero_()  # no noise is ever seen: what was added stays
        model.unet.conv_out.bias.zero_()
    image = torch.rand(1, 3, 16, 16, generator=seeded())
    kept = model.to_latents(image)
    distances = []
    model.to_images = lambda latents: latents  # compared before decoding
    for strength in (0.1, 0.5, 1.0):
        drawn = model.generate("a", steps=10, sampler=sampler, seed=0, image=image, strength=strength)
        distances.append((drawn - kept).pow(2).mean().item())
    assert distances[0] < distances[1] < distances[2]


def test_guidance():
    with_, without = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1)
    torch.testing.assert_close(classifier_free_guidance(with_, without, 1.0), with_)
    torch.testing.assert_close(classifier_free_guidance(with_, without, 3.0), 3 * with_ - 2 * without)
    rescaled = classifier_free_guidance(with_, without, 3.0, rescale=1.0)
    torch.testing.assert_close(rescaled.std((1, 2, 3)), with_.std((1, 2, 3)))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sampler": "plms"}, "dpmpp_2m"),
        ({"size": 17}, "17×17"),
        ({"steps": 0}, "steps"),
        ({"image": torch.zeros(1, 3, 16, 16), "strength": 0.0}, "strength"),
        ({"negative": ["b", "c"]}, "2 negatives"),
        ({"prompts": torch.zeros(1, 7, 13)}, "width 13"),
    ],
)
def test_a_wrong_request_is_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        tiny(text_encoder=Words(12)).generate(**{"prompts": "a"} | arguments)
    assert "\n" not in str(error.value)


def test_texts_without_a_text_encoder_are_refused():
    with pytest.raises(UserError, match="no text encoder"):
        tiny().generate("a cat")


def test_in_float16_the_autoencoder_stays_in_float32():
    model = tiny()
    model = LatentDiffusion(model.unet.half(), model.vae.half(), model.schedule)
    assert model.unet.conv_in.weight.dtype == torch.float16
    assert {p.dtype for p in model.vae.parameters()} == {torch.float32}


def test_a_step_that_breaks_is_reported_not_painted():
    model = tiny(text_encoder=Words(12))
    with torch.no_grad():
        model.unet.conv_out.bias[0] = math.inf
    with pytest.raises(UserError, match="NaN"):
        model.generate("a cat", steps=3)
