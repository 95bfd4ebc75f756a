"""DreamLLM's published folder ⇄ our names.

    config.json                  the LLaMA's keys, weights of the losses, a table for each plugin
    model.safetensors            the LLaMA
    clip_vision_embedding.bin    clip_vision_model.…, projector.…
    dream_embedding.bin          dream_queries
    stable_diffusion_head.bin    unet.…, vae.…, projector.… (our `condition`)
    tokenizer.model or .json, added_tokens.json …
    clip_vision/, stable_diffusion/     configurations only: ours are written here

Of CLIP and Stable Diffusion a published folder has the weights only: config.json names the folders
of their configurations, which are looked for inside it, beside it, and where `parts` says. A
checkpoint that was saved in shards may have the tensors of the .bin files in its main files, each
name behind the plugin's. Fields of ours that the publication lacks are written as a table
`picturebook_dreamllm` if they differ from their defaults.
"""

import dataclasses
import os
from pathlib import Path
from typing import NamedTuple

from published import llama
from support import checkpoint, settings
from support.settings import Fields, UserError
from support.tokenizer import ADDED, Tokenizer

CLIP_PART, DIFFUSION_PART = "clip_vision", "stable_diffusion"  # the folders that `write` names

# the plugins, and what the files of their weights are called
CLIP, QUERIES, DIFFUSION = "clip_vision_embedding", "dream_embedding", "stable_diffusion_head"
LOSS_NAMES = {  # ours: theirs
    "drop": "drop_prob",
    "min_snr": "snr_gamma",
    "noise_offset": "noise_offset",
    "perturbation": "input_perturbation",
}
WEIGHT_NAMES = {"w_lm": "loss_weight_lm", "w_vm": "loss_weight_vm"}
NAMES = {  # plugin: {our field: their key}
    CLIP: {"projector": "projector_type"},
    QUERIES: {"queries": "num_dream_queries"},
    DIFFUSION: {"condition": "projector_type"} | LOSS_NAMES,
}
FIXED = {CLIP: {"select_layer": -2, "use_additional_post_layernorm": False}}
FOLDER_KEYS = {CLIP: "clip_vision_model_name_or_path", DIFFUSION: "diffusion_name_or_path"}
OWN = "picturebook_dreamllm"
FILES = {"projector": f"{CLIP}.bin", "condition": f"{DIFFUSION}.bin", "queries": f"{QUERIES}.bin"}


class Folder(NamedTuple):
    """What a published folder holds."""

    folder: Path
    fields: Fields  # of a DreamLLMConfig
    llama: Fields  # of its LLaMAConfig
    tokenizer: Tokenizer
    clip: Path  # the folder of CLIP's configuration
    diffusion: Path  # … of Stable Diffusion's
    tensors: dict  # {part: {name: tensor}}: llama, clip, projector, queries, condition, diffusion
    resolution: object  # of pictures to draw, in pixels, as config.json says; None: it does not


def read(folder, parts, depths):
    """A published folder (a run's step is one) → Folder.

    parts: more folders in which the configurations of CLIP and Stable Diffusion may lie
    depths: {kind of projector: the projector_depth that it has}
    """
    if folder.is_file():
        raise UserError(f"{folder}: a DreamLLM is a folder of several files, not one")
    file = folder / "config.json"
    saved = checkpoint.read_json(file)
    fields, plugins = config_from_hf(saved, file, depths)
    llama_fields = llama.config_from_hf(saved | {"model_type": "llama"}, file)
    tokenizer = Tokenizer.from_pretrained(folder)
    check_ids(saved, tokenizer, file)
    tensors = read_tensors(folder)
    configs = {}
    for plugin, key in FOLDER_KEYS.items():
        name = plugins[plugin].get(key)
        if not isinstance(name, str) or not name:
            raise UserError(f"{file}: {plugin}: {key} must name a folder, not {name!r}")
        configs[plugin] = find_part(name, folder, parts)
    clip, diffusion = configs[CLIP], configs[DIFFUSION]
    resolution = plugins[DIFFUSION].get("resolution")
    return Folder(folder, fields, llama_fields, tokenizer, clip, diffusion, tensors, resolution)


# ---- config.json -----------------------------------------------------------------------------


def config_from_hf(saved, file, depths):
    """DreamLLM's config.json → (Fields of a DreamLLMConfig, {plugin: its table})."""
    fixed = {"loss_scale_schedule": "none"}
    fields = settings.published(saved, file, WEIGHT_NAMES, {"model_type": "dreamllm"}, fixed)
    plugins = _table(saved, "plugins_init_kwargs", file)
    for plugin, names in NAMES.items():
        where, required = f"{file}: {plugin}", names.keys() & {"queries"}
        table = plugins.get(plugin)
        found = settings.published(table, where, names, fixed=FIXED.get(plugin), required=required)
        fields |= found
        fields.names |= {ours: f"{plugin}.{theirs}" for ours, theirs in names.items()}
    for plugin, ours in ((CLIP, "projector"), (DIFFUSION, "condition")):
        kind = fields.setdefault(ours, "linear")
        if isinstance(kind, str) and kind in depths:
            fixed = {"projector_depth": depths[kind]}
            settings.published(plugins[plugin], f"{file}: {plugin}", {}, fixed=fixed)
    return Fields(fields | _table(saved, OWN, file), file, fields.names), plugins


def _table(saved, key, file):
    """A table in a JSON table, {} if it is not there."""
    table = saved.get(key, {})
    settings.published(table, f"{file}: {key}", {})  # a UserError if it is no table
    return table


def check_ids(saved, tokenizer, file):
    """Raises a UserError unless config.json and the tokenizer's files agree on special tokens."""
    table = _table(saved, "special_tokens2ids_dict", file)
    added = _table(table, "additional_special_tokens", file)
    ids = {name: i for name, i in table.items() if name in ADDED} | added
    for name, i in ids.items():
        known = tokenizer.special.get(name)
        if i != known:
            raise UserError(f"{file}: {name} is {i}, but {known} in the tokenizer's files")


def find_part(name, folder, parts):
    """The folder of a part that config.json calls `name`: a path, or the hub's "owner/name"."""
    candidates = [folder / name, folder.parent / name]
    for part in parts:
        candidates += [Path(part) / name, Path(part) / Path(name).name]
    for candidate in candidates:
        if os.path.isdir(candidate):
            return candidate
    looked = ", ".join(map(str, candidates))
    raise UserError(f"{folder}: its part {name} has no configuration (looked for {looked})")


def config_to_hf(model):
    """A DreamLLM → what config.json holds."""
    config, ids = model.config, {name: model.tokenizer.special[name] for name in ADDED}
    pad = ids.pop("[PAD]")
    saved = {
        "architectures": ["DreamLLMForCausalMLM"],
        "model_type": "dreamllm",
        "pad_token_id": pad,
        **{theirs: getattr(config, ours) for ours, theirs in WEIGHT_NAMES.items()},
        "loss_scale_schedule": "none",
        "plugins_type": {CLIP: "embedding", QUERIES: "embedding", DIFFUSION: "head"},
        "plugins_init_kwargs": plugins_to_hf(model),
        "special_tokens2ids_dict": {"[PAD]": pad, "additional_special_tokens": ids},
        "torch_dtype": checkpoint.dtype_name(model.dream_queries),
    }
    known = {*WEIGHT_NAMES, *NAMES[CLIP], *NAMES[QUERIES], *NAMES[DIFFUSION]}
    own = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in known and value != field.default:
            own[field.name] = value
    saved |= {OWN: own} if own else {}
    return llama.config_to_hf(model.llama.config, model.tokenizer) | saved


def plugins_to_hf(model):
    """A DreamLLM → {plugin: its table}."""
    config = model.config
    clip = {
        FOLDER_KEYS[CLIP]: CLIP_PART,
        "select_layer": -2,
        "use_additional_post_layernorm": False,
        "freeze_clip_vision_model": True,
        "freeze_embedding_layers": True,
    }
    queries = {"num_dream_queries": config.queries, "freeze_dream_queries": False}
    diffusion = {
        FOLDER_KEYS[DIFFUSION]: DIFFUSION_PART,
        "freeze_unet": True,
        "freeze_vae": True,
        "resolution": model.side,
    }
    clip |= _projector_to_hf(config.projector, model.projector)
    diffusion |= _projector_to_hf(config.condition, model.condition)
    diffusion |= {theirs: getattr(config, ours) for ours, theirs in LOSS_NAMES.items()}
    tables = {CLIP: clip, QUERIES: queries, DIFFUSION: diffusion}
    classes = {CLIP: "CLIPVisionEmbedding", QUERIES: "DreamEmbedding", DIFFUSION: "StableDiffusionHead"}
    for plugin, table in tables.items():
        target = {"_target_": f"omni.models.dreamllm.modeling_plugins.{classes[plugin]}"}
        tables[plugin] = target | {"embed_hidden_size": model.llama.config.dim} | table
    return tables


def _projector_to_hf(kind, projector):
    return {"projector_type": kind, "projector_depth": projector.depth, "freeze_projector": False}


# ---- weights ---------------------------------------------------------------------------------


def read_tensors(folder):
    """The four files → {part: {name: tensor}}."""
    whole = llama.from_hf_names(checkpoint.read_tensors(folder))
    plugins = {}
    for plugin in NAMES:
        inside = checkpoint.pop_prefix(whole, f"{plugin}.")
        beside = folder / f"{plugin}.bin"
        if beside.exists() or not inside:
            inside = checkpoint.read_tensors(beside)
        plugins[plugin] = inside
    clip, diffusion = plugins[CLIP], plugins[DIFFUSION]
    tensors = {
        "llama": whole,
        "projector": checkpoint.pop_prefix(clip, "projector."),
        "clip": checkpoint.pop_prefix(clip, "clip_vision_model."),
        "queries": plugins[QUERIES],
        "condition": checkpoint.pop_prefix(diffusion, "projector."),
        "diffusion": diffusion,
    }
    if clip:
        raise UserError(f"{folder}: {next(iter(clip))} belongs to no part of DreamLLM")
    return tensors


def tensors_to_hf(model, frequencies):
    """A DreamLLM → {file: {key: tensor}}.

    frequencies: of the LLaMA's rotary embedding, which the file repeats for every layer.
    """
    layers = range(len(model.llama.layers))
    whole = model.llama.state_dict()
    whole |= {f"layers.{n}.self_attn.rotary_emb.inv_freq": frequencies for n in layers}
    clip = model.clip.state_dict(prefix="clip_vision_model.")
    diffusion = model.diffusion.state_dict()
    return {
        "model.safetensors": llama.to_hf_names(whole),
        f"{CLIP}.bin": clip | model.projector.state_dict(prefix="projector."),
        f"{QUERIES}.bin": {"dream_queries": model.dream_queries},
        f"{DIFFUSION}.bin": diffusion | model.condition.state_dict(prefix="projector."),
    }


def write(path, model, frequencies):
    """Writes config.json and the four files of weights; frequencies: see tensors_to_hf."""
    for name, tensors in tensors_to_hf(model, frequencies).items():
        if name.endswith(".bin"):
            checkpoint.write_bin(path / name, tensors)
        else:
            checkpoint.write_tensors(path / name, tensors)
    checkpoint.write_json(path / "config.json", config_to_hf(model))
