"""Stable Diffusion folders as people have them: other files, other pipelines; the pictures are diffusers'."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from test_train import refused

import sample
from clip import text_encoders
from diffusion import LatentDiffusion, UNet
from published import stable_diffusion
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


# ---- more of the same: beside diffusers' own pipeline of the folder ------------------------------


@pytest.fixture
def changed(sd, tmp_path):
    """changed(file, keys) → a copy of the plain folder with other keys in one of its JSON files."""

    def change(file, keys):
        shutil.copytree(sd / "plain", tmp_path / "changed")
        write_json(tmp_path / "changed" / file, read_json(tmp_path / "changed" / file) | keys)
        if "_class_name" in keys and file == SCHEDULER:  # model_index.json names it as well
            index = tmp_path / "changed" / "model_index.json"
            write_json(index, read_json(index) | {"scheduler": ["diffusers", keys["_class_name"]]})
        return tmp_path / "changed"

    return change


SCHEDULER = "scheduler/scheduler_config.json"
START = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def difference(path, negative=None):
    """The largest difference between our picture of a folder and that of diffusers' pipeline of it."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(path)
    asked = {"negative_prompt": negative, "num_inference_steps": 5, "guidance_scale": 5.0, "height": 16, "width": 16}
    theirs = pipeline("a <taco> cat", **asked, latents=START.clone(), output_type="pt").images
    model = LatentDiffusion.from_pretrained(path, text_encoders(path, dtype=torch.float32), torch.float32)
    return (model.generate("a <taco> cat", negative, 5.0, steps=5, size=16, noise=START.clone) - theirs).abs().max()


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("shard", ["10GB", "100KB"])
def test_a_variant_is_found_whole_or_in_shards_of_either_kind(sd, tmp_path, safe, shard):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(sd / "plain")
    pipeline.save_pretrained(tmp_path, variant="non_ema", safe_serialization=safe, max_shard_size=shard)
    model, plain = (LatentDiffusion.from_pretrained(path, text_encoders(path)) for path in (tmp_path, sd / "plain"))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_averaged_weights_come_before_non_ema(sd, tmp_path):
    """Whatever their names' order: here the averaged ones are called zz."""
    shutil.copytree(sd / "fp16", tmp_path / "sd")
    files = tmp_path / "sd" / "unet"
    (files / "diffusion_pytorch_model.fp16.safetensors").rename(files / "diffusion_pytorch_model.zz.safetensors")
    unet = diffusers.UNet2DConditionModel.from_pretrained(sd / "plain" / "unet")
    with torch.no_grad():
        unet.conv_in.bias += 1
    unet.save_pretrained(files, variant="non_ema")
    plain = UNet.from_pretrained(sd / "plain").conv_in.bias
    assert torch.equal(UNet.from_pretrained(tmp_path / "sd").conv_in.bias, plain)


def test_the_command_line_chooses_a_variant(sd, tmp_path, program):
    options = ["--prompt", "a", "--steps", 1, "--seed", 0, "--out", tmp_path / "a.png"]
    assert program(sample.main, "image", "--run", sd / "fp16", *options, "--variant", "fp16")[0] == 0
    code, _, err = program(sample.main, "image", "--run", sd / "fp16", *options, "--variant", "bf16")
    assert code == 2 and "model.fp16.safetensors" in err


@pytest.mark.parametrize(
    "keys",
    [
        {"_class_name": "DDIMScheduler", "clip_sample": False},
        {"_class_name": "DPMSolverMultistepScheduler"},
        {"_class_name": "DPMSolverMultistepScheduler", "euler_at_final": True, "lower_order_final": False},
        {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"},
        {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' own
def test_the_sampler_that_a_folder_names_is_the_one_that_samples(changed, keys, capsys):
    assert difference(changed(SCHEDULER, keys)) <= 1e-4
    assert "not here" not in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers' own, of the same
@pytest.mark.parametrize("keys", [{"steps_offset": 0}, {"clip_sample": True}, {"steps_offset": 0, "clip_sample": True}])
def test_what_diffusers_mends_in_an_old_scheduler_is_mended_and_said(changed, keys, capsys):
    assert difference(changed(SCHEDULER, {"_class_name": "DDIMScheduler", "clip_sample": False} | keys)) <= 1e-4
    said = capsys.readouterr().err
    assert all(key in said for key in keys)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_old_unet_of_32_draws_64(changed):
    path = changed("unet/config.json", {"sample_size": 32, "_diffusers_version": "0.6.0"})
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(path).unet.config.sample_size
    assert LatentDiffusion.from_pretrained(path).unet.config.sample_size == theirs == 64


@pytest.mark.parametrize("kind", stable_diffusion.NEAREST)
def test_every_sampler_that_is_not_here_has_one_that_samples_instead(changed, kind, capsys):
    path = changed(SCHEDULER, {"_class_name": kind})
    model = LatentDiffusion.from_pretrained(path, text_encoders(path))
    said = [line for line in capsys.readouterr().err.splitlines() if kind in line]
    assert len(said) == 1 and f"{model.sampler} samples instead" in said[0]
    assert model.generate("a", steps=2, size=16, seed=0).isfinite().all()


@pytest.mark.parametrize(
    "keys",
    [
        {"use_exponential_sigmas": True},
        {"algorithm_type": "sde-dpmsolver++"},
        {"final_sigmas_type": "sigma_min"},
        {"solver_order": 3},
        {"thresholding": True},
    ],
    ids=str,
)
def test_an_option_of_a_sampler_that_is_not_here_is_said(changed, keys, capsys):
    changed = changed(SCHEDULER, {"_class_name": "DPMSolverMultistepScheduler"} | keys)
    assert LatentDiffusion.from_pretrained(changed).sampler == "dpmpp_2m"
    [(key, value)] = keys.items()
    assert f"{key} {value!r}: not here" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["FlowMatchEulerDiscreteScheduler", "EDMDPMSolverMultistepScheduler"])
def test_a_schedule_of_another_training_is_refused_by_its_name(changed, kind):
    said = refused(lambda: LatentDiffusion.from_pretrained(changed(SCHEDULER, {"_class_name": kind})))
    assert kind in said and "another way of training" in said


def test_two_files_that_name_two_schedulers_are_said(changed, capsys):
    path = changed("model_index.json", {"scheduler": ["diffusers", "EulerDiscreteScheduler"]})
    assert LatentDiffusion.from_pretrained(path).sampler == "ddim"
    assert "diffusers takes model_index.json's EulerDiscreteScheduler" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["unet/config.json", "vae/config.json", SCHEDULER])
def test_a_key_that_nobody_knows_is_said(changed, file, capsys):
    LatentDiffusion.from_pretrained(changed(file, {"warp_factor": 9}))
    assert f"{file}: left unread, for unknown here: warp_factor" in capsys.readouterr().err


def test_a_safety_checker_is_left_out_and_said(changed, capsys):
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    path = changed("model_index.json", {"safety_checker": checker})
    (path / "safety_checker").mkdir()
    LatentDiffusion.from_pretrained(path)
    assert "safety_checker/ is left out" in capsys.readouterr().err


def test_a_sampler_survives_saving(changed, tmp_path):
    path = changed(SCHEDULER, {"_class_name": "EulerDiscreteScheduler"})
    LatentDiffusion.from_pretrained(path).save_pretrained(tmp_path / "again")
    assert LatentDiffusion.from_pretrained(tmp_path / "again").sampler == "euler"
    assert read_json(tmp_path / "again" / SCHEDULER)["_class_name"] == "EulerDiscreteScheduler"


def test_words_of_textual_inversion_draw_what_they_learned(sd, tmp_path):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(sd / "plain")
    pipeline.load_textual_inversion({"<taco>": torch.randn(32, generator=torch.Generator().manual_seed(1))})
    pipeline.scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False)
    pipeline.save_pretrained(tmp_path)
    assert difference(tmp_path) <= 1e-4 and difference(tmp_path, "no <taco>") <= 1e-4


@pytest.mark.parametrize("says_so", [True, False])
def test_a_refiner_is_refused_by_its_name(tmp_path, program, says_so):
    """It says so itself, or it has the second text tower only."""
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    tokenizer, vae, unet = parts(tmp_path, 32, **added, projection_class_embeddings_input_dim=32 + 8 * 5)
    text = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**TEXT))
    towers = (None, text, None, tokenizer)
    options = {"requires_aesthetics_score": says_so, "add_watermarker": False}
    schedule = diffusers.EulerDiscreteScheduler(**BETAS)
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline(vae, *towers, unet, schedule, **options)
    refiner.save_pretrained(tmp_path / "refiner")
    options = ["--prompt", "a", "--out", tmp_path / "a.png"]
    code, _, err = program(sample.main, "image", "--run", tmp_path / "refiner", *options)
    assert code == 2 and "SDXL refiner" in err and "stable-diffusion-xl-base" in err


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ("controlnet", "ControlNetModel"),
        ("unet", "UNet3DConditionModel"),
        ("unet", "FlaxUNet2DConditionModel"),
        ("vae", "AutoencoderTiny"),
        ("vae", "ConsistencyDecoderVAE"),
        ("text_encoder", "T5EncoderModel"),
        ("depth_estimator", "DPTForDepthEstimation"),
        ("prior", "PriorTransformer"),
        ("adapter", "T2IAdapter"),
    ],
)
def test_a_part_that_does_not_open_names_the_pipeline(changed, part, kind):
    path = changed("model_index.json", {"_class_name": "OtherPipeline", part: ["library", kind]})
    said = refused(lambda: LatentDiffusion.from_pretrained(path))
    assert "OtherPipeline" in said and kind in said and "Stable Diffusion 1, 2 and XL open" in said


@pytest.mark.parametrize(
    ("key", "value", "whose"),
    [
        ("time_cond_proj_dim", 256, "latent consistency"),
        ("num_class_embeds", 1000, "upscaler"),
        ("class_embed_type", "projection", "unCLIP"),
        ("encoder_hid_dim_type", "ip_image_proj", "IP-Adapter"),
        ("in_channels", 7, "enlarges"),
    ],
)
def test_a_unet_with_other_inputs_is_called_by_whose_it_is(changed, key, value, whose):
    said = refused(lambda: LatentDiffusion.from_pretrained(changed("unet/config.json", {key: value})))
    assert str(value) in said and whose in said and "plain Stable Diffusion" in said


@pytest.mark.parametrize(
    ("tensor", "shape", "named"),
    [
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", (2, 2), "Stable Diffusion 3"),
        ("double_blocks.0.img_attn.qkv.weight", (2, 2), "FLUX"),
        ("adapter.body.0.block1.weight", (2, 2), "T2I adapter"),
        ("noise_augmentor.time_embed.weight", (2, 2), "unCLIP"),
        ("conditioner.embedders.0.model.ln_final.weight", (2,), "SDXL refiner"),
        ("control_model.zero_convs.0.0.weight", (2, 2), "ControlNet"),
        ("model.diffusion_model.input_blocks.0.0.weight", (320, 9, 3, 3), "inpainting"),
        ("model.diffusion_model.input_blocks.0.0.weight", (320, 8, 3, 3), "InstructPix2Pix"),
    ],
)
def test_a_single_file_of_something_else_is_called_by_its_name(tmp_path, tensor, shape, named):
    save_file({tensor: torch.zeros(shape)}, tmp_path / "model.safetensors")
    assert named in refused(lambda: LatentDiffusion.from_pretrained(tmp_path / "model.safetensors"))
