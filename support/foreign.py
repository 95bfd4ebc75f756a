"""What people have on disk that nothing here opens: it is called by its name, with the way out.

    a file's ending and first bytes ─ of_file ─┐
    a config.json ─────────────── of_config ───┼─▶ (what it is, what to do instead), or None ─ refuse ─▶ UserError
    the names of tensors ────────── of_names ──┤
    a folder ───────────────────── of_folder ──┘

checkpoint.py asks before it reads, so that a GGUF file is "a GGUF file" in every command, and not a
weight that is missing. What does open stands in checkpoint.KINDS.
"""

import os
import re
import zipfile
from pathlib import Path

from support import settings
from support.settings import UserError

ORIGINAL = "download the model's own folder, with .safetensors or .bin files"
AGAIN = "download it again (hf download NAME --local-dir FOLDER fetches only what is missing)"
UNPACK = "unpack it, and name the folder"

STARTS = (  # a file's first bytes; what it is; the way out
    (settings.LFS_POINTER, "a Git LFS pointer, not the file itself", "fetch that: git lfs pull"),
    (b"GGUF", "a GGUF file, llama.cpp's", ORIGINAL),
    (b"tjgg", "a GGML file, llama.cpp's", ORIGINAL),
    (b"lmgg", "a GGML file, llama.cpp's", ORIGINAL),
    (b"\x89HDF", "an HDF5 file, TensorFlow's", ORIGINAL),
    (b"<!DOCTYPE", "a web page: a login or an error, no weights", AGAIN),
    (b"<!doctype", "a web page: a login or an error, no weights", AGAIN),
    (b"<html", "a web page: a login or an error, no weights", AGAIN),
    (b"\x93NUMPY", "a NumPy array, no model", ORIGINAL),
    (b"\x1f\x8b", "a compressed archive", UNPACK),
    (b"BZh", "a compressed archive", UNPACK),
    (b"\xfd7zXZ", "a compressed archive", UNPACK),
    (b"(\xb5/\xfd", "a compressed archive", UNPACK),
    (b"7z\xbc\xaf", "a compressed archive", UNPACK),
    (b"Rar!", "a compressed archive", UNPACK),
)
ENDINGS = {
    ".gguf": ("a GGUF file, llama.cpp's", ORIGINAL),
    ".ggml": ("a GGML file, llama.cpp's", ORIGINAL),
    ".onnx": ("an ONNX graph", ORIGINAL),
    ".h5": ("TensorFlow weights", ORIGINAL),
    ".keras": ("a Keras archive", ORIGINAL),
    ".pb": ("a TensorFlow graph", ORIGINAL),
    ".tflite": ("a TensorFlow Lite graph", ORIGINAL),
    ".msgpack": ("Flax weights", ORIGINAL),
    ".npz": ("JAX or NumPy weights", ORIGINAL),
    ".ot": ("rust-bert's weights", ORIGINAL),
    ".engine": ("a TensorRT engine", ORIGINAL),
    ".mlmodel": ("a Core ML model", ORIGINAL),
    ".distcp": ("a piece of torch.distributed's checkpoint", "join it: torch.distributed.checkpoint.format_utils"),
}
ENDINGS |= dict.fromkeys(
    (".incomplete", ".crdownload", ".part", ".partial", ".download", ".aria2"), ("a half-finished download", AGAIN)
)

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
NO_MODEL = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")  # of such files, what a trainer keeps

LORA = "merge it into the model that it changes (peft: merge_and_unload; diffusers: fuse_lora), and save that"
STABLE = "Stable Diffusion 1, 2 and XL open: a U-Net, an AutoencoderKL, CLIP's text towers"
PIPELINE_PARTS = {  # of a model_index.json: the classes that open; of those without one, any
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "scheduler": (),
    "safety_checker": (),
    "feature_extractor": (),
    "image_encoder": (),
}

NAMES = (  # a regex that some tensor's name fits; what these weights are; the way out
    (r"lora_[AB]\b|lora[_.](up|down)\b|_lora\.|hada_w1|lokr_w1|dora_scale", "a LoRA adapter", LORA),
    (r"^<[^<>]+>$|^emb_params$|^string_to_param$|^clip_[lg]$", "a textual inversion: one token's embedding",
     "it has no model; a folder whose text encoder and tokenizer hold the token opens"),
    (r"^(control_model|controlnet_\w+|input_hint_block)\.", "a ControlNet", "only the U-Net it controls opens"),
    (r"^(ip_adapter|image_proj)\b", "an IP-Adapter", "only the U-Net that it adapts opens"),
    (r"\bmotion_modules\.", "AnimateDiff's motion module", "only the U-Net that it animates opens"),
    (r"^(adapter\.)?body\.\d+\.(block1|in_conv|resnets)\b", "a T2I adapter", "only the U-Net that it steers opens"),
    (r"(^|\.)joint_blocks\.\d", "Stable Diffusion 3", STABLE),
    (r"(^|\.)double_blocks\.\d", "FLUX", STABLE),
    (r"(^|\.)adaln_single\.linear\.|^(model\.)?t_block\.1\.", "PixArt", STABLE),
    (r"\.time_stack\.|\.time_mixer\.", "Stable Video Diffusion", STABLE),
    (r"^(noise_augmentor|embedder\.model)\.", "an unCLIP", STABLE),
    (r"^depth_model\.", "Stable Diffusion 2 with a depth map", STABLE),
    (r"^low_scale_model\.", "Stable Diffusion's upscaler", STABLE),
    (r"^conditioner\.embedders\.0\.model\.", "an SDXL refiner: it ends what a base model began", STABLE),
    (r"\.(qweight|qzeros|g_idx|SCB|absmax|weight_packed|weight_scale|weight_scale_inv|quant_state\..*)$",
     "a quantised model", "download its unquantised weights"),
    (r"^vision_model\.head\.probe$", "a SigLIP", "CLIPs open: openai/clip-vit-base-patch32, say"),
    (r"^(module\.)?text_decoder\.(transformer|cross)", "open_clip's CoCa", "its CLIPs ViT-B-32 … ViT-bigG-14 open"),
    (r"^visual\.trunk\.", "an open_clip model with a vision tower of timm", "its CLIPs ViT-B-32 … ViT-bigG-14 open"),
    (r"^text\.transformer\.(embeddings|encoder)\.", "an open_clip model with a text tower of transformers",
     "its CLIPs ViT-B-32 … ViT-bigG-14 open"),
    (r"^visual\.blocks\.\d+\.", "an EVA-CLIP", "OpenAI's, LAION's and Hugging Face's CLIPs open"),
    (r"^visual\.(layer1|stem)\.", "a CLIP with a ResNet", "its ViTs open: ViT-B-32, ViT-B-16, ViT-L-14"),
)  # fmt: skip

CLASSES = {  # config.json's _class_name or model_type: the way out; any other has none
    "ControlNetModel": "a ControlNet only steers a U-Net",
    "siglip": "CLIPs open: openai/clip-vit-base-patch32, say",
}
OPEN = "LLaMA, VQGAN, CLIP, Stable Diffusion 1.5, 2.1, XL and DreamLLM open"


def refuse(path, found):
    """Raises a UserError that calls what lies at `path` by its name; found: what the functions below return."""
    if found:
        what, way_out = found
        raise UserError(f"{path}: is {what}; {way_out}")


def of_file(path):
    """What the file at `path` is, by its ending and its first bytes."""
    with settings.open_file(path) as file:
        head = file.read(512)
    for start, what, way_out in STARTS:
        if head.startswith(start):
            return what, way_out
    if head[257:262] == b"ustar" or (head.startswith(b"PK\3\4") and not is_torch_zip(path)):
        return "an archive", UNPACK
    return ENDINGS.get(Path(path).suffix.lower())


def is_torch_zip(path):
    """Whether the zip at `path` is a pickle of torch's; one that is cut short may be."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except Exception:  # on broken records, zipfile raises more than its own
        return True


def of_config(saved, known):
    """What a config.json (its content) describes; known: {(key, value)} of the models that open."""
    quantised = saved.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        return f"a quantised model (config.json: quantization_config, {method})", "download its unquantised weights"
    for key in ("_class_name", "model_type"):
        value = saved.get(key)
        if isinstance(value, str) and (key, value) not in known:
            return f"another model (config.json: {key} is {value!r})", CLASSES.get(value, OPEN)
    return None


def of_pipeline(index):
    """What the model_index.json at `index` describes, if it is no Stable Diffusion that draws from a text alone."""
    saved = json_table(index) if index.exists() else {}
    parts = {part: kind[1] for part, kind in saved.items() if isinstance(kind, list) and len(kind) == 2 and kind[1]}
    if saved.get("requires_aesthetics_score") is True or ("text_encoder_2" in parts and "text_encoder" not in parts):
        return "an SDXL refiner: it ends what a base model began", "name that, as stable-diffusion-xl-base-1.0"
    for part, kind in parts.items():
        open_here = PIPELINE_PARTS.get(part)
        if open_here is None or (open_here and kind not in open_here):
            name = saved.get("_class_name")
            return f"diffusers' {name!s:.60} (model_index.json: its {part!s:.60} is a {kind!s:.60})", STABLE
    return None


def of_names(names):
    """What the weights with these names are."""
    for pattern, what, way_out in NAMES:
        for name in names:
            if isinstance(name, str) and re.search(pattern, name):
                return f"{what} ({name})", way_out
    return None


def of_folder(folder, has_weights=True):
    """What a folder is, by the names of its files; has_weights: whether weights were found in it."""
    names = sorted(entry.name for entry in folder.iterdir())
    for name in names:
        if (folder / name).is_symlink() and not (folder / name).exists():
            return f"incomplete: {name} is a link to a file that is not there", AGAIN
    if missing := missing_shards(folder, names):
        return f"half downloaded: {missing} not there", AGAIN
    if has_weights and {"adapter_config.json", "config.json"} <= set(names):
        # transformers adds it to the weights, where peft is installed
        return "a model with a LoRA adapter beside it", f"{LORA}; or move adapter_config.json away, to use it alone"
    if has_weights:
        return None
    if "adapter_config.json" in names:
        saved = json_table(folder / "adapter_config.json")
        return f"a LoRA adapter of {saved.get('base_model_name_or_path')}", LORA
    if "modules.json" in names:
        modules = [name for name in names if (folder / name / "config.json").exists()]
        inside = f"name the model in it: {folder / modules[0]}" if modules else OPEN
        return "a sentence-transformers model", inside
    if any(name.startswith(("zero_pp_rank_", "mp_rank_")) or name == "zero_to_fp32.py" for name in names):
        return "DeepSpeed's checkpoint in pieces", "join them: python zero_to_fp32.py . pytorch_model.bin"
    cache = folder / ".cache" / "huggingface" / "download"
    names += [file.name for file in cache.glob("*.incomplete")]
    for name in names:
        if found := ENDINGS.get(Path(name).suffix.lower()):
            return f"a folder without weights that open, only {found[0]} ({name})", found[1]
    return of_folders(folder, names)


def of_folders(folder, names):
    """What a folder without weights is: empty, or one around what has some."""
    if not names:
        return "empty", AGAIN
    found = {}  # {what: names}
    for name in names:
        if any((folder / name).glob("*.json")):
            found.setdefault("a folder around others", []).append(name)
        elif re.search(r"\.(zip|tar|tgz|tar\.\w+|7z|rar)$", name):
            found.setdefault("a folder around an archive", []).append(name)
        elif name.endswith(WEIGHTS) and not name.startswith(NO_MODEL):
            found.setdefault("one whose weight files bear other names", []).append(name)
    for what, inside in found.items():
        return what, f"name {'it' if len(inside) == 1 else 'one of them'}: {', '.join(inside[-5:])}"
    return None


def missing_shards(folder, names):
    """Which files of a checkpoint in shards are absent, in words ("2 of 4 shards are"), or None."""
    for name in names:
        if re.search(r"\.index(\.\w+)?\.json$", name):
            table = json_table(folder / name).get("weight_map")
            shards = set(table.values()) if isinstance(table, dict) and set(map(type, table.values())) == {str} else ()
            absent = sorted(shard for shard in shards if not os.path.exists(folder / shard))
            if absent:
                return f"{len(absent)} of the {len(shards)} shards that {name} names are ({absent[0]:.200})"
    for name in names:
        shard = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)", name)
        if shard and not any(".index." in other for other in names):
            return f"the index of its {int(shard[3])} shards ({shard[1]}{shard[4]}.index.json) is"
    return None


def json_table(path):
    """A JSON file's table; {} if there is another thing in it."""
    try:
        saved = settings.parse_json(settings.read_text(path, settings.FILE))
    except ValueError:
        return {}
    return saved if isinstance(saved, dict) else {}
