"""Stable Diffusion folders as people have them: other files, other pipelines; the pictures are diffusers'."""

import json
import shutil

import pytest
import torch
from test_train import refused

from clip import text_encoders
from diffusion import LatentDiffusion, UNet
from support.checkpoint import read_json, write_json
from support.settings import UserError
from support.tokenizer import CLIPTokenizer

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

LEVELS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
SMALL = {"block_out_channels": (16, 32), "norm_num_groups": 4}
CROSS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
TEXT = {"vocab_size": 514, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 2, "bos_token_id": 512, "eos_token_id": 513, "projection_dim": 32}


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def parts(folder, context, **options):
    """A tiny tokenizer, autoencoder and U-Net of diffusers."""
    torch.manual_seed(0)
    CLIPTokenizer.of_bytes().save_pretrained(folder / "bytes", 77)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "bytes")
    vae = diffusers.AutoencoderKL(**LEVELS, **SMALL, sample_size=16)
    heads = {"attention_head_dim": (2, 4), "cross_attention_dim": context, "sample_size": 8, "layers_per_block": 1}
    return tokenizer, vae, diffusers.UNet2DConditionModel(**CROSS, **SMALL, **heads, **options)


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    """A Stable Diffusion 1 in small, as diffusers saves it."""
    folder = tmp_path_factory.mktemp("sd")
    tokenizer, vae, unet = parts(folder, 32)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT))
    schedule = diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True)
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = diffusers.StableDiffusionPipeline(vae, text, tokenizer, unet, schedule, **none)
    pipeline.save_pretrained(folder / "plain")
    pipeline.save_pretrained(folder / "fp16", variant="fp16")
    return folder


def weights(model):
    return dict(model.named_parameters())


def test_files_of_a_variant_are_found(sd):
    plain, fp16 = (weights(UNet.from_pretrained(sd / name)) for name in ("plain", "fp16"))
    assert all(torch.equal(plain[name], fp16[name]) for name in plain)
    assert text_encoders(sd / "fp16")[0].config.text.width == 32


def test_of_several_variants_the_plain_one_is_read_and_another_if_it_is_named(sd, tmp_path, capsys):
    folder = tmp_path / "both"
    shutil.copytree(sd / "plain", folder)
    other = diffusers.UNet2DConditionModel.from_pretrained(sd / "plain" / "unet")
    with torch.no_grad():
        other.conv_in.bias += 1
    other.save_pretrained(folder / "unet", variant="non_ema")
    plain = UNet.from_pretrained(folder)
    assert "diffusion_pytorch_model.safetensors" in capsys.readouterr().err
    named = UNet.from_pretrained(folder, variant="non_ema")
    assert torch.equal(plain.conv_in.bias + 1, named.conv_in.bias)


def test_a_variant_that_is_not_there_is_one_line(sd):
    assert "bf16" in refused(lambda: UNet.from_pretrained(sd / "plain", variant="bf16"))


@pytest.mark.parametrize("zeros", [True, False])
def test_sdxl_without_a_negative_prompt_begins_where_diffusers_does(zeros, tmp_path):
    """From zeros, or from the empty prompt: model_index.json says which."""
    numbers = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    numbers |= {"projection_class_embeddings_input_dim": 32 + 8 * 6, "use_linear_projection": True}
    tokenizer, vae, unet = parts(tmp_path, 64, **numbers)
    config = transformers.CLIPTextConfig(**TEXT)
    one, two = transformers.CLIPTextModel(config), transformers.CLIPTextModelWithProjection(config)
    schedule = diffusers.EulerDiscreteScheduler(**BETAS)
    options = {"force_zeros_for_empty_prompt": zeros, "add_watermarker": False}
    pipeline = diffusers.StableDiffusionXLPipeline(vae, one, two, tokenizer, tokenizer, unet, schedule, **options)
    pipeline.save_pretrained(tmp_path / "sdxl")
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "sdxl")
    ours = LatentDiffusion.from_pretrained(tmp_path / "sdxl", text_encoders(tmp_path / "sdxl"))
    start = torch.randn(1, 4, 8, 8)
    common = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "pt", "height": 16, "width": 16}
    expected = theirs("a taco", latents=start.clone(), **common).images
    drawn = ours.generate(["a taco"], guidance=5.0, steps=3, noise=lambda: start.clone())  # the folder's own: euler
    assert ours.sampler == "euler" and (drawn - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("channels", "says"), [(9, "for inpainting"), (8, "edits or reads a picture"), (5, "a depth map")]
)
def test_a_unet_that_is_shown_more_than_noise_is_called_by_its_name(channels, says, sd, tmp_path):
    shutil.copytree(sd / "plain", tmp_path / "sd")
    file = tmp_path / "sd" / "unet" / "config.json"
    write_json(file, read_json(file) | {"in_channels": channels})
    assert says in refused(lambda: LatentDiffusion.from_pretrained(tmp_path / "sd"))


@pytest.mark.parametrize(
    "kind",
    ["StableDiffusion3Pipeline", "FluxPipeline", "StableDiffusionXLImg2ImgPipeline", "StableUnCLIPPipeline"],
)
def test_a_pipeline_of_another_class_is_called_by_it(kind, sd, tmp_path):
    shutil.copytree(sd / "plain", tmp_path / "sd")
    index = tmp_path / "sd" / "model_index.json"
    parts = read_json(index) | {"_class_name": kind, "transformer": ["diffusers", "SD3Transformer2DModel"]}
    index.write_text(json.dumps(parts | {"requires_aesthetics_score": True}))
    with pytest.raises(UserError, match="is a"):
        LatentDiffusion.from_pretrained(tmp_path / "sd")


@pytest.mark.parametrize(
    ("kind", "sampler"),
    [("UniPCMultistepScheduler", "dpmpp_2m"), ("HeunDiscreteScheduler", "dpmpp_2m"), ("PNDMScheduler", "ddim")],
)
def test_a_sampler_that_is_not_here_keeps_its_schedule_and_says_which_one_samples(kind, sampler, sd, tmp_path, capsys):
    shutil.copytree(sd / "plain", tmp_path / "sd")
    file = tmp_path / "sd" / "scheduler" / "scheduler_config.json"
    write_json(file, read_json(file) | {"_class_name": kind})
    model = LatentDiffusion.from_pretrained(tmp_path / "sd")
    said = capsys.readouterr().err
    assert model.sampler == sampler and f"{kind}: not here" in said and sampler in said
    assert model.schedule.beta_end == 0.012 and model.schedule.steps_offset == 1


def test_karras_sigmas_are_said_to_be_left_out(sd, tmp_path, capsys):
    shutil.copytree(sd / "plain", tmp_path / "sd")
    file = tmp_path / "sd" / "scheduler" / "scheduler_config.json"
    write_json(file, read_json(file) | {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True})
    assert LatentDiffusion.from_pretrained(tmp_path / "sd").sampler == "dpmpp_2m"
    assert "use_karras_sigmas True" in capsys.readouterr().err
