"""Stable Diffusion's published files ⇄ our names: folders, files of CompVis and Stability.

    folder    config.json ──unet_fields, vae_fields, schedule_fields──▶ settings.Fields     and back: …_json
              weights bear our names already (but for old autoencoders: rename_vae)
    one file  weights ──strip_prefix · rename_unet, rename_vae──▶ tensors under our names
              its YAML, if any ──original_fields──▶ three settings.Fields

A key of theirs is either a field of ours or fixed: our code computes one value of it, and a file
that says another is refused. What only a sampler does otherwise is said, and so is a key that is
unknown here. The others have no effect on what we compute; tests/test_diffusion.py lists them, and why.
"""

import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

from support import checkpoint, settings
from support.settings import Fields, UserError

PIPELINE = "a latent diffusion pipeline"  # as checkpoint.what_is calls them
UNET, VAE = "a U-Net of latent diffusion", "an autoencoder of latent diffusion"
CONFIG, SCHEDULER, INDEX = "config.json", "scheduler_config.json", "model_index.json"
ZEROS = "force_zeros_for_empty_prompt"
PLAIN = "the plain Stable Diffusion 1, 2 or XL that it was made from opens"

# ---- the published sizes ---------------------------------------------------------------------

# fmt: off
UNETS = {  # fields of a UNetConfig; those that are not here are the defaults
    "sd15": {},
    "sd21": {"sample_size": 96, "heads": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True,
             "upcast_attention": True},
    "sdxl": {"sample_size": 128, "block_out_channels": (320, 640, 1280), "depth": (0, 2, 10), "mid_depth": 10,
             "heads": (5, 10, 20), "cross_attention_dim": 2048, "use_linear_projection": True,
             "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816},
}
# fmt: on
VAES = {"sd": {}, "sdxl": {"sample_size": 1024, "scaling_factor": 0.13025}}
SHAPES = {(320, 768): "sd15", (320, 1024): "sd21", (320, 2048): "sdxl"}  # width of the first level, of the context


def size(sizes, name):
    """The fields of a published size, of UNETS or VAES."""
    if name not in sizes:
        raise UserError(f'no size "{name}"; there are {", ".join(sizes)}')
    return sizes[name]


# ---- opening -----------------------------------------------------------------------------------


class Pipeline(NamedTuple):
    """The configurations of a whole Stable Diffusion."""

    fields: tuple[Fields, Fields, Fields]  # of its UNetConfig, AutoencoderKLConfig, NoiseSchedule
    sampler: str = "ddim"  # ours that its scheduler names, or the nearest to it
    zero_negative: bool = True  # of SDXL: see LatentDiffusion


def read_pipeline(path, config=None):
    """A pipeline's folder or a single file → Pipeline; what is not followed of a folder is said.

    config: the YAML or JSON that a single file's code base keeps of it (a path, or its content); where there is
    none, neither here nor beside the file, the shapes of the weights decide.
    """
    path = checkpoint.weights_folder(path)
    if path.is_file():
        return Pipeline(single_file_fields(path, config))
    checkpoint.expect(path, PIPELINE)
    fields = unet, _, schedule = folder_fields(path)
    check_inputs(unet.get("in_channels"), path / "unet" / CONFIG)
    saved = checkpoint.read_json(path / INDEX) if (path / INDEX).exists() else {}
    index = settings.published(saved, path / INDEX, {"zero_negative": ZEROS, "scheduler": "scheduler"})
    if saved and "addition_time_embed_dim" not in unet:
        mend_old_files(path, unet, schedule)
    if (path / "safety_checker").is_dir():
        say(f"{path}: safety_checker/ is left out: no picture is checked")
    zero_negative = settings.convert(bool, index.get("zero_negative", True), f"{path / INDEX}: {ZEROS}")
    file = path / "scheduler" / SCHEDULER
    saved = checkpoint.read_json(file)
    kind = index.get("scheduler")
    if isinstance(kind, list) and kind and kind[-1] not in (None, saved["_class_name"]):
        say(f"{file}: names {saved['_class_name']}, and is followed; diffusers takes model_index.json's {kind[-1]}")
    return Pipeline(fields, sampler_of(saved, file), zero_negative)


def mend_old_files(path, unet, schedule):
    """What diffusers' StableDiffusionPipeline takes old files to mean, in the Fields `unet` and `schedule`."""
    if schedule["steps_offset"] != 1:
        file = path / "scheduler" / SCHEDULER
        say(f"{file}: steps_offset is {schedule['steps_offset']!r}: as in diffusers, 1 counts")
        schedule["steps_offset"] = 1
    version = str(checkpoint.read_json(path / "unet" / CONFIG).get("_diffusers_version"))
    side = unet.get("sample_size")
    if re.match(r"0\.[0-8]\.", version) and type(side) is int and side < 64:
        say(f"{path / 'unet' / CONFIG}: sample_size is {side}, of diffusers {version}: as in diffusers, 64 counts")
        unet["sample_size"] = 64


def folder_fields(path):
    """A pipeline's folder, whose weights may be elsewhere → Fields of U-Net, autoencoder and schedule."""
    path = Path(path)
    for name in ("unet", "vae", "scheduler"):
        if not (path / name).is_dir():
            raise UserError(f"{path}: has no folder {name}/, so it is no diffusers pipeline")
    files = (("unet", CONFIG, unet_fields), ("vae", CONFIG, vae_fields), ("scheduler", SCHEDULER, schedule_fields))
    files = [(path / folder / name, read) for folder, name, read in files]
    return tuple(read(checkpoint.read_json(file), file) for file, read in files)


def single_file_fields(path, config=None):
    """The same of a single file: see read_pipeline."""
    tensors = read_single_file(path)
    unet = strip_prefix(tensors, UNET_PREFIX, path)
    if "input_blocks.0.0.weight" in unet and unet["input_blocks.0.0.weight"].ndim > 1:
        check_inputs(unet["input_blocks.0.0.weight"].shape[1], path)
    if any(name.startswith("model_ema.") for name in tensors):
        say(f"{path}: model_ema.… is left out: weights that were averaged while training, for sampling as well")
    if config := config or config_beside(path):
        return original_fields(config)
    name = published_unet(unet, path)
    if name == "sd21":
        raise UserError(f"{path}: SD 2.1 (v) and 2.1-base (ε) have the same shapes: name its YAML with config=")
    vae, spacing = ("sdxl", "leading") if name == "sdxl" else ("sd", "")
    sizes = UNETS[name], VAES[vae], {"timestep_spacing": spacing}
    return tuple(Fields(fields, path) for fields in sizes)


INPUTS = {  # channels that a U-Net takes: whose it is, if it is not one that draws from noise and text alone
    5: "a U-Net that is shown a depth map (SD 2 depth)",
    7: "a U-Net that enlarges a picture (x4 upscaler)",
    8: "a U-Net that edits or reads a picture (InstructPix2Pix, Marigold)",
    9: "a U-Net for inpainting, which is shown a mask and the rest of the picture",
}


def check_inputs(channels, path):
    """Raises a UserError if the U-Net of so many input channels is of a kind that has a name in INPUTS."""
    if type(channels) is int and channels in INPUTS:
        raise UserError(f"{path}: {channels} channels in: {INPUTS[channels]}; {PLAIN}")


def say(text):
    """One line on stderr: of what is read, what is not followed."""
    print(text, file=sys.stderr)


def read_unet(path, config=None, variant=None):
    """A U-Net, alone or in a pipeline → (its folder or file, Fields of its configuration, tensors).

    config: its configuration, if it is known; then there are no Fields. variant: see checkpoint.find_weights.
    """
    path = subfolder(path, "unet", UNET, PIPELINE)
    tensors = checkpoint.read_tensors(path, variant)
    if path.is_dir():
        return path, config or unet_fields(checkpoint.read_json(path / CONFIG), path / CONFIG), tensors
    tensors = strip_prefix(tensors, UNET_PREFIX, path)
    fields = None if config else Fields(UNETS[published_unet(tensors, path)], path)
    return path, fields, rename_unet(tensors)


def read_vae(path, config=None, variant=None):
    """The same of an autoencoder; a single file is taken to be SD 1's and 2's if no `config` is given."""
    path = subfolder(path, "vae", VAE, PIPELINE)
    tensors = checkpoint.read_tensors(path, variant)
    if path.is_dir():
        fields = config or vae_fields(checkpoint.read_json(path / CONFIG), path / CONFIG)
    else:
        tensors, fields = strip_prefix(tensors, VAE_PREFIX, path), Fields(VAES["sd"], path)
    return path, fields, rename_vae(tensors)


def subfolder(path, name, *wanted):
    """A folder or file of weights: `path` itself, or its folder `name` if it is a whole pipeline.

    path: also a run's folder. A folder that holds something other than `wanted` (see
    checkpoint.what_is) is a UserError.
    """
    path = checkpoint.weights_folder(path)
    if not path.is_dir():
        return path
    checkpoint.expect(path, *wanted)
    return path / name if (path / name).is_dir() else path


def split_parts(tensors, path):
    """Tensors named unet.… and vae.… → those of the U-Net, those of the autoencoder, under our names."""
    rest = dict(tensors)
    unet, vae = checkpoint.pop_prefix(rest, "unet."), checkpoint.pop_prefix(rest, "vae.")
    if rest:
        raise UserError(f"{path}: {next(iter(rest))} belongs to no part of a latent diffusion model")
    return unet, rename_vae(vae)


# ---- writing -----------------------------------------------------------------------------------


def write_part(path, config, tensors):
    """A folder that diffusers opens: config.json and weights."""
    checkpoint.write_json(Path(path) / CONFIG, config)
    checkpoint.write_tensors(Path(path) / "diffusion_pytorch_model.safetensors", tensors)


def write_configs(path, model):
    """The configurations of a LatentDiffusion's pipeline folder, without its weights."""
    checkpoint.write_json(Path(path) / "unet" / CONFIG, unet_json(model.unet.config))
    checkpoint.write_json(Path(path) / "vae" / CONFIG, vae_json(model.vae.config))
    checkpoint.write_json(Path(path) / "scheduler" / SCHEDULER, schedule_json(model.schedule, model.sampler))


def write_pipeline(path, model):
    """A LatentDiffusion's whole folder; model_index.json comes last."""
    path, folders = Path(path), ["unet", "vae", "scheduler"]
    xl = bool(model.unet.config.addition_time_embed_dim)
    write_configs(path, model)
    model.unet.save_pretrained(path / "unet")
    model.vae.save_pretrained(path / "vae")
    for encoder, number in zip(model.text_encoders, ("", "_2") if xl else ("",), strict=False):
        encoder.save_pretrained(path / f"text_encoder{number}")
        folders.append(f"text_encoder{number}")
        if encoder.tokenizer:
            encoder.tokenizer.save_pretrained(path / f"tokenizer{number}", encoder.config.text.context_length)
            folders.append(f"tokenizer{number}")
    checkpoint.write_json(path / INDEX, pipeline_json(folders, xl, model.zero_negative))


# ---- diffusers folders -----------------------------------------------------------------------


def same(*names):
    """{name: name}: keys that are called alike."""
    return dict(zip(names, names, strict=True))


# {our field: their key}
# fmt: off
UNET_KEYS = same(
    "in_channels", "out_channels", "sample_size", "block_out_channels", "layers_per_block", "cross_attention_dim",
    "use_linear_projection", "norm_num_groups", "addition_time_embed_dim", "projection_class_embeddings_input_dim",
    "upcast_attention",
) | {
    "heads": "attention_head_dim",  # a misnomer of theirs: it counts the heads
    "depth": "transformer_layers_per_block", "mid_depth": "transformer_layers_per_block",
}
VAE_KEYS = same(
    "in_channels", "out_channels", "sample_size", "block_out_channels", "layers_per_block", "latent_channels",
    "norm_num_groups", "scaling_factor",
)
SCHEDULE_KEYS = same(
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "rescale_betas_zero_snr",
    "timestep_spacing", "steps_offset", "set_alpha_to_one",
)
# {their key: the one value that our code computes}
UNET_FIXED = {
    "act_fn": "silu", "attention_type": "default", "center_input_sample": False, "class_embed_type": None,
    "class_embeddings_concat": False, "conv_in_kernel": 3, "conv_out_kernel": 3, "cross_attention_norm": None,
    "downsample_padding": 1, "dropout": 0.0, "dual_cross_attention": False, "encoder_hid_dim": None,
    "encoder_hid_dim_type": None, "flip_sin_to_cos": True, "freq_shift": 0, "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-5,
    "num_attention_heads": None, "num_class_embeds": None, "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0, "resnet_skip_time_act": False, "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None, "time_cond_proj_dim": None, "time_embedding_act_fn": None,
    "time_embedding_dim": None, "time_embedding_type": "positional", "timestep_post_act": None,
}
VAE_FIXED = {
    "act_fn": "silu", "latents_mean": None, "latents_std": None, "mid_block_add_attention": True,
    "shift_factor": None, "use_post_quant_conv": True, "use_quant_conv": True,
}
UNET_OTHERS = ("down_block_types", "up_block_types", "addition_embed_type", "addition_embed_type_num_heads")
VAE_OTHERS = ("down_block_types", "up_block_types", "force_upcast")  # the last: LatentDiffusion sees to that
# A U-Net that has one of these keys: what it is
UNET_KINDS = {
    "time_cond_proj_dim": "of a latent consistency model, to which guidance is an input",
    "class_embed_type": "of an upscaler or unCLIP", "num_class_embeds": "of an upscaler or unCLIP",
    "encoder_hid_dim_type": "of Kandinsky, Kolors or with an IP-Adapter",
}
SCHEDULE_FIXED = {
    "timestep_type": "discrete", "trained_betas": None, "use_dynamic_shifting": False, "use_flow_sigmas": False,
}
# Of how it is sampled, not of how it was trained: what our samplers do.
SAMPLER_KEYS = {
    "algorithm_type": "dpmsolver++", "clip_sample": False, "final_sigmas_type": "zero",
    "interpolation_type": "linear", "lambda_min_clipped": -math.inf, "solver_order": 2, "solver_type": "midpoint",
    "thresholding": False, "use_beta_sigmas": False, "use_exponential_sigmas": False, "use_karras_sigmas": False,
    "use_lu_lambdas": False, "variance_type": "fixed_small",
}
UNREAD = (  # of keys above, or of samplers that are not here; or, as the last two, without effect where σ ends at 0
    "clip_sample_range", "dynamic_thresholding_ratio", "flow_shift", "sample_max_value", "sigma_max", "sigma_min",
    "time_shift_type", "skip_prk_steps", "predict_x0", "disable_corrector", "solver_p", "original_inference_steps",
    "timestep_scaling", "predictor_order", "corrector_order", "tau_func", "noise_sampler_seed", "shift_terminal",
    "euler_at_final", "lower_order_final",
)
# fmt: on
SAMPLERS = {  # diffusers' schedulers: ours that compute the same
    "DDIMScheduler": "ddim",
    "DDIMParallelScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DDPMParallelScheduler": "ddpm",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
}
NEAREST = {  # … and those that are not here: the nearest of ours
    "PNDMScheduler": "ddim",
    "LCMScheduler": "ddim",
    "TCDScheduler": "ddim",
    "LMSDiscreteScheduler": "dpmpp_2m",
    "UniPCMultistepScheduler": "dpmpp_2m",
    "DEISMultistepScheduler": "dpmpp_2m",
    "DPMSolverSinglestepScheduler": "dpmpp_2m",
    "DPMSolverSDEScheduler": "dpmpp_2m",
    "HeunDiscreteScheduler": "dpmpp_2m",
    "KDPM2DiscreteScheduler": "dpmpp_2m",
    "KDPM2AncestralDiscreteScheduler": "euler_ancestral",
    "SASolverScheduler": "dpmpp_2m",
}
SCHEDULER_KINDS = (*SAMPLERS, *NEAREST)
NARROW = ("Heun", "KDPM2", "DPMSolverSDE", "LCM", "TCD")  # diffusers' defaults of these: SD's own β


def unet_fields(saved, path="config.json"):
    """A UNet2DConditionModel's config.json, as parsed → the Fields of a UNetConfig."""
    for key, kind in UNET_KINDS.items():
        if isinstance(saved, dict) and saved.get(key) is not None:
            raise UserError(f"{path}: {key} is {saved[key]!r:.60}: a U-Net {kind}; {PLAIN}")
    fields = settings.published(
        saved,
        path,
        UNET_KEYS,
        wants={"_class_name": "UNet2DConditionModel"},
        fixed=UNET_FIXED,
        required=("block_out_channels", "heads", "cross_attention_dim"),
    )
    say_unknown(saved, path, UNET_KEYS.values(), UNET_FIXED, UNET_OTHERS)
    widths = settings.convert(tuple[int, ...], fields["block_out_channels"], f"{path}: block_out_channels")
    kinds, up_kinds = saved.get("down_block_types"), saved.get("up_block_types")
    attends = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
    if not isinstance(kinds, list) or len(kinds) != len(widths) or not all(k in list(attends) for k in kinds):
        raise UserError(
            f"{path}: down_block_types is {kinds!r:.60}; only one of {' and '.join(attends)} for each of "
            f"{len(widths)} block_out_channels is supported"
        )
    if up_kinds != [kind.replace("Down", "Up") for kind in reversed(kinds)]:
        raise UserError(f"{path}: up_block_types is {up_kinds!r:.60}; only down_block_types in reverse is supported")
    added = saved.get("addition_embed_type")
    if added not in (None, "text_time") or bool(added) != bool(fields.get("addition_time_embed_dim")):
        raise UserError(
            f"{path}: addition_embed_type is {added!r:.60}; only 'text_time' with an addition_time_embed_dim, "
            "or neither, is supported"
        )
    depths = per_level(fields.get("depth", 1), widths)
    fields["heads"] = per_level(fields["heads"], widths)
    fields["mid_depth"] = depths[-1] if depths else 1
    fields["depth"] = [n if attends[kind] else 0 for kind, n in zip(kinds, depths, strict=False)]
    return fields


def say_unknown(saved, path, *known):
    """Says which keys of a configuration stand in none of the tables `known`."""
    known = set().union(*known)
    if unknown := [key for key in saved if key not in known and not key.startswith("_")]:
        say(f"{path}: left unread, for unknown here: {', '.join(unknown)}")


def per_level(value, widths):
    """One number for all levels, or a list of one each → a list."""
    return value if isinstance(value, list) else [value] * len(widths)


def unet_json(config):
    """A UNetConfig → what config.json says of it."""
    kinds = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in config.depth]
    depths = [*(depth or 1 for depth in config.depth[:-1]), config.mid_depth]
    fields = {theirs: getattr(config, ours) for ours, theirs in UNET_KEYS.items()}
    fields |= {
        # one number where all levels agree, as SD 1 and 2 have it
        "attention_head_dim": config.heads if len(set(config.heads)) > 1 else config.heads[0],
        "transformer_layers_per_block": depths if len(set(depths)) > 1 else depths[0],
        "down_block_types": kinds,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(kinds)],
        "addition_embed_type": "text_time" if config.addition_time_embed_dim else None,
        "addition_time_embed_dim": config.addition_time_embed_dim or None,
        "projection_class_embeddings_input_dim": config.projection_class_embeddings_input_dim or None,
    }
    return {"_class_name": "UNet2DConditionModel"} | fields | UNET_FIXED


def vae_fields(saved, path="config.json"):
    """An AutoencoderKL's config.json, as parsed → the Fields of an AutoencoderKLConfig."""
    wants = {"_class_name": "AutoencoderKL"}
    fields = settings.published(saved, path, VAE_KEYS, wants, VAE_FIXED, required=("block_out_channels",))
    say_unknown(saved, path, VAE_KEYS, VAE_FIXED, VAE_OTHERS)
    levels = len(settings.convert(tuple[int, ...], fields["block_out_channels"], f"{path}: block_out_channels"))
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if saved.get(key, [kind]) != [kind] * levels:
            raise UserError(
                f"{path}: {key} is {saved.get(key)!r:.60}; only one {kind!r} for each of "
                f"{levels} block_out_channels is supported"
            )
    return with_defaults(fields, {"layers_per_block": 1, "sample_size": 32})


def vae_json(config):
    """An AutoencoderKLConfig → what config.json says of it."""
    fields = {theirs: getattr(config, ours) for ours, theirs in VAE_KEYS.items()}
    levels = len(config.block_out_channels)
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    return {"_class_name": "AutoencoderKL"} | fields | kinds | VAE_FIXED


def schedule_fields(saved, path=SCHEDULER):
    """A scheduler_config.json, as parsed → the Fields of a NoiseSchedule."""
    fields = settings.published(saved, path, SCHEDULE_KEYS, {}, SCHEDULE_FIXED)
    name = saved.get("_class_name")
    if name not in SCHEDULER_KINDS:
        other = "FlowMatch" in str(name) or "EDM" in str(name)
        why = "another way of training (flow matching, EDM)" if other else "no noise schedule of Stable Diffusion"
        raise UserError(f"{path}: _class_name is {name!r:.60}, {why}; Stable Diffusion 1, 2 and XL open")
    say_unknown(saved, path, SCHEDULE_KEYS, SCHEDULE_FIXED, SAMPLER_KEYS, UNREAD)
    beta = (0.00085, 0.012) if name.startswith(NARROW) else (0.0001, 0.02)
    schedule = "scaled_linear" if name in ("LCMScheduler", "TCDScheduler") else "linear"
    defaults = {"beta_start": beta[0], "beta_end": beta[1], "beta_schedule": schedule}
    to_one = name != "PNDMScheduler"
    return with_defaults(fields, defaults | {"steps_offset": 0, "set_alpha_to_one": to_one})


def sampler_of(saved, path):
    """The name of our sampler for a scheduler_config.json; says what of it the sampler does not follow."""
    name = saved["_class_name"]
    sampler = SAMPLERS.get(name) or NEAREST[name]
    lacking = [] if name in SAMPLERS else [name]
    for key, value in SAMPLER_KEYS.items():
        if saved.get(key, value) not in (None, value):
            lacking.append(f"{key} {saved[key]!r:.40}")
    if lacking:
        say(
            f"{path}: {', '.join(lacking)}: not here; if no other is chosen, {sampler} samples instead, on its schedule"
        )
    return sampler


def schedule_json(schedule, sampler="ddim"):
    """A NoiseSchedule, and the sampler that follows it → what scheduler_config.json says of them."""
    fields = {theirs: getattr(schedule, ours) for ours, theirs in SCHEDULE_KEYS.items()}
    if not schedule.timestep_spacing:  # each sampler's own
        del fields["timestep_spacing"]
    kind = next(kind for kind, ours in SAMPLERS.items() if ours == sampler)
    return {"_class_name": kind} | fields | {"clip_sample": False, "trained_betas": None}


def with_defaults(fields, defaults):
    """Puts in diffusers' own defaults where a file leaves a key out and ours are other ones."""
    for name, value in defaults.items():
        fields.setdefault(name, value)
    return fields


def pipeline_json(folders, xl, zero_negative=True):
    """model_index.json of a pipeline with these folders: the class of each, for diffusers."""
    kinds = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
    }
    if xl:
        index = {"_class_name": "StableDiffusionXLPipeline", ZEROS: zero_negative}
    else:
        index = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
        kinds = {name: kind for name, kind in kinds.items() if not name.endswith("_2")}
        kinds |= {"safety_checker": None, "feature_extractor": None}
    for name, kind in kinds.items():
        index[name] = kind if name in folders else [None, None]
    return index


# ---- single files: their weights -------------------------------------------------------------

UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
# Neither the U-Net's nor the autoencoder's: averaged weights, text encoders, the schedule's tables.
# fmt: off
NOT_WEIGHTS = (
    "model_ema.", "cond_stage_model.", "conditioner.", "denoiser.", "betas", "alphas_cumprod", "sqrt_",
    "log_one_minus_", "posterior_", "lvlb_weights", "logvar", "scale_factor",
)
# fmt: on


def read_single_file(path):
    """The tensors of a whole model in one file; one that belongs to no part is a UserError."""
    tensors = checkpoint.read_tensors(path)
    for name in tensors:
        if not name.startswith((UNET_PREFIX, VAE_PREFIX, *NOT_WEIGHTS)):
            raise UserError(f"{path}: {name} belongs to no part of a latent diffusion model")
    return tensors


def strip_prefix(tensors, prefix, path):
    """The tensors whose names begin with `prefix`, without it.

    If there are none, all: a file of one part only has no prefix.
    """
    own = checkpoint.pop_prefix(dict(tensors), prefix)
    own = own or {k: v for k, v in tensors.items() if not k.startswith(("loss.", *NOT_WEIGHTS))}
    if not own:
        raise UserError(f"{path}: holds nothing named {prefix}…")
    return own


def published_unet(tensors, path):
    """The name of the published U-Net that these tensors, under their single-file names, are."""
    shapes = []
    for name in ("input_blocks.0.0.weight", "middle_block.1.transformer_blocks.0.attn2.to_k.weight"):
        if name not in tensors or tensors[name].ndim < 2:
            raise UserError(f"{path}: {name} is missing, so it is no U-Net of Stable Diffusion")
        shapes.append(tensors[name].shape)
    width, context = shapes[0][0], shapes[1][1]
    if (width, context) not in SHAPES:
        raise UserError(f"{path}: no published U-Net has width {width} and context {context}: it needs config=")
    return SHAPES[width, context]


def rename_unet(tensors):
    """A U-Net's tensors of a single file, under our names."""
    blocks = {match[1] for name in tensors if (match := re.match(r"input_blocks\.(\d+)\.", name))}
    levels = 1 + sum(name.endswith(".0.op.weight") for name in tensors)
    # an input block for each residual block and each way down, and one that comes before
    return checkpoint.renamed(tensors, as_patterns(unet_names(levels, len(blocks) // levels - 1)))


def as_patterns(names):
    """{beginning of a name: new beginning} → a table for checkpoint.renamed, longer ones first."""
    longest_first = sorted(names.items(), key=lambda pair: len(pair[0]), reverse=True)
    return [(rf"^{re.escape(theirs)}\.", f"{ours}.") for theirs, ours in longest_first]


def unet_names(levels, layers):
    """{beginning of a name in single files: ours}. They number the blocks in the order in which
    they run. SD 1's:

    input_blocks.0.0              conv_in
    input_blocks.1.0.in_layers.2  down_blocks.0.resnets.0.conv1
    input_blocks.1.1              down_blocks.0.attentions.0
    input_blocks.2                … the level's second residual block and attention
    input_blocks.3.0.op           down_blocks.0.downsamplers.0.conv
    input_blocks.4                … the next level
    middle_block.0, .1, .2        mid_block.resnets.0, .attentions.0, .resnets.1
    output_blocks.0.0             up_blocks.0.resnets.0
    output_blocks.2.1.conv        up_blocks.0.upsamplers.0.conv; 2.2.conv if the level has attention, which is 2.1
    """
    names = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "middle_block.1": "mid_block.attentions.0",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    resnets = {"middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1"}
    block = 1
    for level in range(levels):
        for k in range(layers):
            resnets[f"input_blocks.{block}.0"] = f"down_blocks.{level}.resnets.{k}"
            names[f"input_blocks.{block}.1"] = f"down_blocks.{level}.attentions.{k}"
            block += 1
        names[f"input_blocks.{block}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        block += 1
    block = 0
    for level in range(levels):
        for k in range(layers + 1):
            resnets[f"output_blocks.{block}.0"] = f"up_blocks.{level}.resnets.{k}"
            names[f"output_blocks.{block}.1"] = f"up_blocks.{level}.attentions.{k}"
            block += 1
        for place in (1, 2):
            names[f"output_blocks.{block - 1}.{place}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    for theirs, ours in resnets.items():
        names |= {
            f"{theirs}.in_layers.0": f"{ours}.norm1",
            f"{theirs}.in_layers.2": f"{ours}.conv1",
            f"{theirs}.emb_layers.1": f"{ours}.time_emb_proj",
            f"{theirs}.out_layers.0": f"{ours}.norm2",
            f"{theirs}.out_layers.3": f"{ours}.conv2",
            f"{theirs}.skip_connection": f"{ours}.conv_shortcut",
        }
    return names


VAE_NAMES = [  # of single files, and of old diffusers folders
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.attentions\.0\.norm\.", ".attentions.0.group_norm."),
    (r"\.attentions\.0\.(q|query)\.", ".attentions.0.to_q."),
    (r"\.attentions\.0\.(k|key)\.", ".attentions.0.to_k."),
    (r"\.attentions\.0\.(v|value)\.", ".attentions.0.to_v."),
    (r"\.attentions\.0\.(proj_out|proj_attn)\.", ".attentions.0.to_out.0."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
    (r"^encoder\.down\.", "encoder.down_blocks."),
]


def rename_vae(tensors):
    """An autoencoder's tensors of a single file, or of an old folder, as ours."""
    levels = {match[1] for name in tensors if (match := re.match(r"decoder\.up\.(\d+)\.", name))}
    # their decoder's level 0 is the largest grid, though it runs last; ours runs first
    reverse = [(rf"^decoder\.up\.{n}\.", f"decoder.up_blocks.{len(levels) - 1 - int(n)}.") for n in levels]
    tensors = checkpoint.renamed(tensors, VAE_NAMES + reverse)
    for name, tensor in tensors.items():
        if ".attentions." in name and tensor.ndim == 4:  # as 1×1 convolutions: (D, D, 1, 1) → (D, D)
            tensors[name] = tensor.flatten(1)
    return tensors


# ---- single files: the YAML or JSON that their code bases keep of them ---------------------------

# {our field: their key}, and what is fixed; see above
# fmt: off
ORIGINAL_UNET_KEYS = {
    "in_channels": "in_channels", "out_channels": "out_channels", "sample_size": "image_size",
    "block_out_channels": "channel_mult", "layers_per_block": "num_res_blocks", "depth": "transformer_depth",
    "mid_depth": "transformer_depth_middle", "heads": "num_heads", "cross_attention_dim": "context_dim",
    "use_linear_projection": "use_linear_in_transformer", "projection_class_embeddings_input_dim": "adm_in_channels",
}
ORIGINAL_UNET_FIXED = {
    "conv_resample": True, "dims": 2, "disable_self_attentions": None, "dropout": 0, "n_embed": None,
    "num_attention_blocks": None, "num_heads_upsample": -1, "resblock_updown": False, "use_scale_shift_norm": False,
    "use_spatial_transformer": True,
}
ORIGINAL_VAE_KEYS = {
    "sample_size": "resolution", "block_out_channels": "ch_mult", "layers_per_block": "num_res_blocks",
    "latent_channels": "z_channels", "scaling_factor": "scale_factor",
}
ORIGINAL_VAE_FIXED = {
    "attn_resolutions": [], "double_z": True, "dropout": 0, "in_channels": 3, "out_ch": 3, "resamp_with_conv": True,
    "tanh_out": False, "use_linear_attn": False,
}
# fmt: on
ORIGINAL_FIXED = {"beta_schedule": "linear", "conditioning_key": "crossattn"}  # "linear": in √β
PARAMETERIZATIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}  # CompVis's names
SCALINGS = {"EpsScaling": "epsilon", "VScaling": "v_prediction"}  # Stability's, of SDXL


def config_beside(path):
    """The YAML or JSON of the same name as a single file, or None."""
    for ending in (".yaml", ".json"):
        if Path(path).with_suffix(ending).exists():
            return Path(path).with_suffix(ending)
    return None


def original_fields(source):
    """A YAML or JSON file, or its content → Fields of U-Net, autoencoder and schedule."""
    path, content = "config", source
    if not isinstance(source, dict):
        path = Path(source)
        content = checkpoint.read_json(path) if path.suffix == ".json" else checkpoint.read_yaml(path)
    model = section(content, path, "model", "params")
    return original_unet(model, path), original_vae(model, path), original_schedule(model, path)


def section(table, path, *names):
    """table[names[0]][names[1]]…, or a UserError if that is no table."""
    for name in names:
        table = table.get(name) if isinstance(table, dict) else None
    if not isinstance(table, dict):
        raise UserError(f"{path}: has no section {'.'.join(names)}, so it is no configuration of latent diffusion")
    return table


def original_unet(model, path):
    saved = section(model, path, "unet_config" if "unet_config" in model else "network_config", "params")
    # the published files have two of image_size, and mark the U-Net's own as unused
    saved = {"image_size": 64, "num_heads": -1, "num_head_channels": -1} | saved
    saved["image_size"] = model.get("image_size", saved["image_size"])
    required = ("in_channels", "out_channels", "block_out_channels", "layers_per_block", "cross_attention_dim")
    fields = settings.published(saved, path, ORIGINAL_UNET_KEYS, fixed=ORIGINAL_UNET_FIXED, required=required)

    width = settings.convert(int, saved.get("model_channels"), f"{path}: model_channels")
    multipliers = settings.convert(tuple[int, ...], saved["channel_mult"], f"{path}: channel_mult")
    fields["block_out_channels"] = widths = [width * multiplier for multiplier in multipliers]
    key = "num_heads" if saved["num_head_channels"] == -1 else "num_head_channels"
    count = settings.convert(int, saved[key], f"{path}: {key}")
    if count < 1:
        raise UserError(f"{path}: {key} {count} must be at least 1")
    fields["heads"] = [count if key == "num_heads" else width // count for width in widths]
    attended = settings.convert(tuple[int, ...], saved.get("attention_resolutions"), f"{path}: attention_resolutions")
    depths = per_level(fields.get("depth", 1), widths)
    fields.setdefault("mid_depth", depths[-1] if depths else 1)
    fields["depth"] = [depth if 2**n in attended else 0 for n, depth in enumerate(depths)]
    if fields.get("projection_class_embeddings_input_dim"):
        fields["addition_time_embed_dim"] = 256
    return fields


def original_vae(model, path):
    saved = section(model, path, "first_stage_config", "params", "ddconfig")
    saved = saved | {"scale_factor": model.get("scale_factor", 1.0)}
    required = ("block_out_channels", "layers_per_block", "latent_channels")
    fields = settings.published(saved, path, ORIGINAL_VAE_KEYS, fixed=ORIGINAL_VAE_FIXED, required=required)
    width = settings.convert(int, saved.get("ch"), f"{path}: ch")
    multipliers = settings.convert(tuple[int, ...], saved["ch_mult"], f"{path}: ch_mult")
    fields["block_out_channels"] = [width * multiplier for multiplier in multipliers]
    return fields


def original_schedule(model, path):
    keys = {"num_train_timesteps": "timesteps", "beta_start": "linear_start", "beta_end": "linear_end"}
    keys |= {"prediction_type": "parameterization"}
    saved = {"linear_start": 1e-4, "linear_end": 2e-2, "parameterization": "eps"} | model
    kinds = PARAMETERIZATIONS
    if "denoiser_config" in model:  # Stability's: the class of the "scaling" says what is predicted
        denoiser = section(model, path, "denoiser_config", "params")
        scaling = section(denoiser, path, "scaling_config").get("target")
        saved |= {"linear_start": 0.00085, "linear_end": 0.012, "parameterization": str(scaling).rpartition(".")[2]}
        if "params" in section(denoiser, path, "discretization_config"):
            saved |= section(denoiser, path, "discretization_config", "params")
        kinds = SCALINGS
    fields = settings.published(saved, path, keys, {"parameterization": tuple(kinds)}, ORIGINAL_FIXED)
    fields["prediction_type"] = kinds[saved["parameterization"]]
    return fields
