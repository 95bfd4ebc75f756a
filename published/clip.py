"""Others' CLIP files ⇄ ours: Hugging Face's both ways, OpenAI's, open_clip's, Stable Diffusion's.

    Hugging Face    config.json, preprocessor_config.json, model.safetensors   ┐
    OpenAI          ViT-B-32.pt, …: TorchScript archives                       ├─ read ─▶ (fields,
    open_clip       open_clip_config.json, open_clip_model.safetensors         ┘           tensors)
    SD's files      v1-5-pruned.safetensors, …                  ─ text_towers ─▶ [(fields, tensors, place, pad)]

    CLIPConfig ─ config_to_hf, preprocessor_to_hf ─▶ config.json, preprocessor_config.json

Tensors come out under Hugging Face's names, which are the names of clip.py's modules. What a
configuration says is used, or refused where clip.py does something else; left unread are entries
that change no result of a trained model (dropout, initializers, ids of special tokens). A file
without a configuration has shapes: they say everything but the number of heads, which is 64 wide
in all published towers but LAION's two largest, and the kind of GELU, which params.txt of
open_clip's training run says.
"""

import ast
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from support import checkpoint, pickles, settings
from support.settings import UserError
from support.tokenizer import CLIP_END

CLIPS = ("a CLIP", "a CLIP text tower", "a CLIP vision tower")


def read(path):
    """The CLIP at `path`, a folder or a file → (settings.Fields of a CLIPConfig, {name: tensor}).

    The fields are None where no configuration lies beside the weights: from_shapes can tell most
    of them.
    """
    folder, file = path.parent, path
    if path.is_dir():
        checkpoint.expect(path, *CLIPS)
        folder, file = path, newest_epoch(path) or path
    elif pickles.is_torchscript(path):
        return read_openai(path)
    tensors = checkpoint.renamed(checkpoint.read_tensors(file), [(r"^(model|clip)\.", "")])  # as Lightning wraps it
    if any(name.startswith(("visual.", "transformer.resblocks.")) for name in tensors):
        return read_open_clip(tensors, file if file.is_file() else folder)
    tensors = from_hf_names(tensors)
    if not any(name.startswith(("vision_model.", "text_model.")) for name in tensors):
        reason = "no weights of a vision or text tower (text_encoders reads Stable Diffusion's files)"
        raise UserError(f"{path}: holds no CLIP: {reason}")
    return read_hf_config(folder, tensors), tensors


def known(fields, tensors, path, activation=None):
    """The fields that `read` returned; where they are None, those that shapes and `activation` say.

    activation: "quick_gelu" or "gelu"; None is a UserError.
    """
    if fields is None and activation is None:
        ways = "set model.vision.activation and model.text.activation for train.py"
        ways += ', or pass activation="quick_gelu" if they are OpenAI\'s, "gelu" if LAION\'s'
        beside = "open_clip's params.txt or open_clip_config.json beside them would"
        raise UserError(f"{path}: these weights do not say which GELU they were trained with ({beside}): {ways}")
    return fields or from_shapes(tensors, path, activation)


# ---- Hugging Face ----------------------------------------------------------------------------

TOWER_NAMES = {  # ours: theirs
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "activation": "hidden_act",
    "norm_eps": "layer_norm_eps",
}
VISION_NAMES = TOWER_NAMES | {"patch_size": "patch_size", "image_size": "image_size"}
TEXT_NAMES = TOWER_NAMES | {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "eos": "eos_token_id",
}
KINDS = ("clip", "clip_text_model", "clip_vision_model")
LARGEST_ID = 2  # as eos_token_id: not an id, but "read the text off at its largest id"
DEFAULT_EOS, DEFAULT_IMAGE_SIZE = 49407, 224  # transformers', where a file is silent


def from_hf_names(tensors):
    """Names of any age: new single towers may lack the tower's name, old files number positions."""
    tower = "vision_model." if "embeddings.class_embedding" in tensors else "text_model."
    table = [(r"position_ids$", None), (r"^(?=embeddings\.|encoder\.|final_|pre_|post_)", tower)]
    return checkpoint.renamed(tensors, table)


def read_hf_config(folder, tensors):
    """config.json and preprocessor_config.json in `folder` → Fields; None without the first."""
    file = folder / "config.json"
    if not file.exists():
        return None
    fields = config_from_hf(checkpoint.read_json(file), file)
    preprocessor = folder / "preprocessor_config.json"
    if fields["vision"] is not None and preprocessor.exists():
        saved = checkpoint.read_json(preprocessor)
        fields["vision"].add(colours_from_hf(saved, preprocessor, fields["vision"]["image_size"]))
    fields["logit_bias"] = "logit_bias" in tensors  # ours; transformers has none
    return fields


def config_from_hf(saved, path="config.json"):
    """A config.json (a dict) of a CLIP or of one of its towers → Fields of a CLIPConfig."""
    fields = settings.published(saved, path, {"embed_dim": "projection_dim"}, wants={"model_type": KINDS})
    kind = saved["model_type"]
    if kind != "clip" and "WithProjection" not in str(saved.get("architectures")):
        fields["embed_dim"] = 0
    fields["vision"] = fields["text"] = None
    if kind == "clip":
        fields["vision"] = vision_from_hf(*tables(saved, "vision_config", path))
        fields["text"] = text_from_hf(*tables(saved, "text_config", path))
    elif kind == "clip_text_model":
        fields["text"] = text_from_hf((saved, path))
    else:
        fields["vision"] = vision_from_hf((saved, path))
    return fields


def tables(saved, key, path):
    """A tower's tables and their names: the oldest files have two, and the second counts."""
    found = [(saved[k], f"{path}: {k}") for k in (key, f"{key}_dict") if saved.get(k) is not None]
    return found or [({}, f"{path}: {key}")]


def vision_from_hf(*tables):
    fields = settings.Fields({"image_size": DEFAULT_IMAGE_SIZE}, tables[0][1])
    for saved, where in tables:
        fields.add(settings.published(saved, where, VISION_NAMES, fixed={"num_channels": 3}))
    return fields


def text_from_hf(*tables):
    fields = settings.Fields({"eos": DEFAULT_EOS}, tables[0][1])
    for saved, where in tables:
        fields.add(settings.published(saved, where, TEXT_NAMES))
    if fields["eos"] == LARGEST_ID:
        fields["eos"] = None
    return fields


def colours_from_hf(saved, path, side):
    """A preprocessor_config.json (a dict) → Fields of mean and std.

    Its other entries must say what clip.preprocess does.
    """
    fixed = {
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
    }
    fields = settings.published(saved, path, {"mean": "image_mean", "std": "image_std"}, fixed=fixed)
    # older files write a number, newer ones a table
    for key, table in (("size", {"shortest_edge": side}), ("crop_size", {"height": side, "width": side})):
        if saved.get(key) not in (None, side, table):
            raise UserError(f"{path}: {key} is {saved[key]}; only the image_size of the tower, {side}, is supported")
    return fields


def write_config(path, config, tokenizer, dtype):
    """Writes config.json, and preprocessor_config.json if there is a vision tower; dtype: its name."""
    path = Path(path)
    checkpoint.write_json(path / "config.json", config_to_hf(config, tokenizer) | {"torch_dtype": dtype})
    if config.vision:
        checkpoint.write_json(path / "preprocessor_config.json", preprocessor_to_hf(config.vision))


def config_to_hf(config, tokenizer=None):
    """The other way: the dict that is written as config.json."""
    c, towers = config, {}
    if c.vision:
        shape = {theirs: getattr(c.vision, ours) for ours, theirs in VISION_NAMES.items()}
        shape |= {"num_channels": 3, "projection_dim": c.embed_dim or c.vision.width}
        towers["vision_config"] = {"model_type": "clip_vision_model"} | shape
    if c.text:
        shape = {theirs: getattr(c.text, ours) for ours, theirs in TEXT_NAMES.items() if ours != "eos"}
        shape |= {"projection_dim": c.embed_dim or c.text.width}
        ids = {"bos_token_id": tokenizer.start, "pad_token_id": tokenizer.pad} if tokenizer else {}
        ids |= {"eos_token_id": LARGEST_ID if c.text.eos is None else c.text.eos}
        towers["text_config"] = {"model_type": "clip_text_model"} | shape | ids
    if len(towers) == 2:
        return {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": c.embed_dim} | towers
    architecture = ("CLIPVisionModel" if c.vision else "CLIPTextModel") + ("WithProjection" if c.embed_dim else "")
    return {"architectures": [architecture]} | next(iter(towers.values()))


def preprocessor_to_hf(vision):
    """A VisionConfig → the dict that is written as preprocessor_config.json."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": vision.image_size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": vision.image_size, "width": vision.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": vision.mean,
        "image_std": vision.std,
    }


# ---- OpenAI and open_clip --------------------------------------------------------------------

OPENAI_NAMES = [
    (r"^(input_resolution|context_length|vocab_size|attn_mask)$", None),  # no weights
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.attn\.", ".self_attn."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
]


def from_openai_names(tensors):
    """OpenAI's and open_clip's names → Hugging Face's; splits q, k, v, transposes projections."""
    unpacked = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("text.")  # open_clip's custom_text
        if ".in_proj_" in name and tensor.ndim and len(tensor) % 3 == 0:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):  # (3·D, …) → three times (D, …)
                unpacked[name.replace("in_proj_", f"{letter}_proj.")] = part
        elif name in ("visual.proj", "text_projection") and tensor.ndim == 2:
            unpacked[name] = tensor.T.contiguous()  # (D, E) → (E, D)
        else:
            unpacked[name] = tensor
    return checkpoint.renamed(unpacked, OPENAI_NAMES)


def read_openai(path):
    """OpenAI's archives; their GELU is known."""
    tensors = from_openai_names(checkpoint.read_tensors(path))
    return from_shapes(tensors, path, "quick_gelu"), tensors


def read_open_clip(tensors, path):
    """A state dict under the names that open_clip shares with OpenAI, read from the file or folder `path`."""
    tensors, folder = from_openai_names(tensors), path if path.is_dir() else path.parent
    file = folder / "open_clip_config.json"
    if not file.exists():
        activation, colours = run_parameters(folder)
        fields = activation and from_shapes(tensors, path, activation)
        if fields and fields["vision"] is not None:
            fields["vision"].add(colours)
        return fields, tensors
    fields = config_from_open_clip(checkpoint.read_json(file), file)
    fields["logit_bias"] = fields["logit_bias"] or "logit_bias" in tensors
    return fields, tensors


def newest_epoch(folder):
    """The newest of the checkpoints/epoch_N.pt in the folder of a training run of open_clip; None: it is none."""
    files = sorted(folder.glob("checkpoints/epoch_*.pt"), key=lambda file: (len(file.name), file.name))
    return files[-1] if files and (folder / "params.txt").exists() else None


def run_parameters(folder):
    """params.txt of open_clip's training run around `folder` → (the GELU, Fields of mean and std); (None, None).

    A run that began with OpenAI's weights does not say it: that depends on open_clip's version.
    """
    file = next((place / "params.txt" for place in (folder, folder.parent) if (place / "params.txt").exists()), None)
    if file is None:
        return None, None
    saved = {}
    for line in settings.read_text(file).splitlines():
        name, _, value = line.partition(": ")
        try:
            saved[name] = ast.literal_eval(value)  # a list, a number, None; no code is run
        except (ValueError, SyntaxError):
            saved[name] = value
    colours = settings.published(saved, file, {"mean": "image_mean", "std": "image_std"}, fixed=RUN_FIXED)
    if saved.get("force_quick_gelu") is True or str(saved.get("model")).endswith("-quickgelu"):
        return "quick_gelu", colours
    unknown = "model" not in saved or saved.get("pretrained") == "openai"
    return (None, None) if unknown else ("gelu", colours)


# What open_clip might do otherwise, with the same weights or with more of them
RUN_FIXED = {"image_interpolation": "bicubic", "image_resize_mode": "shortest"}
BLOCK_FIXED = {
    "ls_init_value": None, "final_ln_after_pool": False, "act_kwargs": {}, "norm_kwargs": {}, "block_type": "default",
    "qk_norm": False, "scaled_cosine_attn": False, "scale_heads": False, "scale_attn_inner": False,
    "scale_attn": False, "scale_fc": False,
}  # fmt: skip
MODEL_FIXED = {"multimodal_cfg": None, "nonscalar_logit_scale": False}
VISION_FIXED = BLOCK_FIXED | {
    "timm_model_name": None, "pool_type": "tok", "no_ln_pre": False, "attentional_pool": False,
    "pos_embed_type": "learnable",
}  # fmt: skip
TEXT_FIXED = BLOCK_FIXED | {
    "hf_model_name": None, "hf_tokenizer_name": None, "tokenizer_mode": None, "tokenizer_kwargs": {},
    "pool_type": "argmax", "no_causal_mask": False, "embed_cls": False, "proj_bias": False, "proj_type": "linear",
}  # fmt: skip
PREPROCESS_FIXED = {"mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest"}
# What changes nothing: how training goes, or how a tower works that the keys above exclude
MODEL_UNREAD = ("custom_text", "init_logit_scale", "cast_dtype", "output_dict")  # custom_text: other names
VISION_UNREAD = ("patch_dropout", "output_tokens", "attn_pooler_queries", "attn_pooler_heads")
VISION_UNREAD += ("timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path")
TEXT_UNREAD = ("pad_id", "eos_id", "output_tokens", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type")


@dataclass(frozen=True)
class OpenCLIPShape:
    """What open_clip says of a tower in other numbers than clip.py."""

    width: int
    head_width: int = 64
    mlp_ratio: float = 4.0

    def __post_init__(self):
        settings.within(self, 1, 2**20, "width", "head_width")
        settings.within(self, 0, 2**20, "mlp_ratio")


def config_from_open_clip(saved, path="open_clip_config.json"):
    """An open_clip_config.json (a dict) of two transformers → Fields of a CLIPConfig."""
    if isinstance(saved, dict) and "vision_cfg" in saved:  # one of open_clip's own model_configs
        saved = {"model_cfg": saved}
    names = {"model": "model_cfg", "preprocess": "preprocess_cfg"}
    parts = settings.published(saved, path, names, required=("model",))
    where = f"{path}: model_cfg"
    names = {"embed_dim": "embed_dim", "vision": "vision_cfg", "text": "text_cfg", "quick_gelu": "quick_gelu"}
    names |= {"logit_bias": "init_logit_bias"}
    fields = settings.published(parts["model"], where, names, fixed=MODEL_FIXED)
    refuse_unknown(parts["model"], where, (*names.values(), *MODEL_FIXED, *MODEL_UNREAD))
    fields = settings.published(parts["model"], where, names, required=("embed_dim", "vision", "text"))
    fields["logit_bias"] = "logit_bias" in fields  # SigLIP's loss; its value is among the weights

    vision = {"width": "width", "layers": "layers", "patch_size": "patch_size", "image_size": "image_size"}
    vision = open_clip_tower(fields["vision"], f"{where}: vision_cfg", vision, vision, VISION_FIXED, VISION_UNREAD)
    required = {"width": "width", "layers": "layers", "heads": "heads"}
    names = required | {"vocab_size": "vocab_size", "context_length": "context_length"}
    text = open_clip_tower(fields["text"], f"{where}: text_cfg", names, required, TEXT_FIXED, TEXT_UNREAD)

    quick_gelu = settings.convert(bool, fields.pop("quick_gelu", False), f"{where}: quick_gelu")
    vision["activation"] = text["activation"] = "quick_gelu" if quick_gelu else "gelu"
    if "preprocess" in parts:
        vision.add(colours_from_open_clip(parts["preprocess"], f"{path}: preprocess_cfg", vision["image_size"]))
    fields["vision"], fields["text"] = vision, text
    return fields


def open_clip_tower(saved, where, names, required, fixed, unread):
    """vision_cfg or text_cfg (a dict) → Fields of a VisionConfig or TextConfig."""
    fields = settings.published(saved, where, names, fixed=fixed, required=required)
    theirs = {"width": "width", "head_width": "head_width", "mlp_ratio": "mlp_ratio"}
    refuse_unknown(saved, where, (*names.values(), *theirs, *fixed, *unread))
    shape = settings.build(OpenCLIPShape, settings.published(saved, where, theirs))
    fields["hidden_dim"] = int(shape.width * shape.mlp_ratio)
    fields.setdefault("heads", shape.width // shape.head_width)  # which a text tower says itself
    fields.names |= {"hidden_dim": "mlp_ratio · width =", "heads": fields.names.get("heads", "width / head_width =")}
    return fields


def refuse_unknown(saved, where, keys):
    """Raises a UserError that names a key of the table `saved` that is none of `keys`."""
    for key, value in saved.items():
        if key not in keys and value is not None:
            raise UserError(f"{where}: {key} is not known here: open_clip's CLIPs of two plain transformers open")


def colours_from_open_clip(saved, path, side):
    """preprocess_cfg (a dict) → Fields of mean and std."""
    fields = settings.published(saved, path, {"mean": "mean", "std": "std"}, fixed=PREPROCESS_FIXED)
    if saved.get("size") not in (None, side, [side, side]):
        raise UserError(f"{path}: size is {saved['size']}; only the image_size of the tower, {side}, is supported")
    return fields


# ---- weights alone ---------------------------------------------------------------------------

LAION_HEADS = {1280: 16, 1664: 16}  # of vision towers, by width; every other published head is 64 wide


def from_shapes(tensors, path, activation):
    """What the shapes of `tensors` (under Hugging Face's names) say, as Fields of a CLIPConfig.

    activation: "quick_gelu" or "gelu", which shapes do not tell.
    """
    vision, text = (tower_from_shapes(tensors, name, path, activation) for name in ("vision_model", "text_model"))
    if vision:
        patches = shape_of(tensors, "vision_model.embeddings.patch_embedding.weight", 4, path)  # (D, 3, P, P)
        positions = shape_of(tensors, "vision_model.embeddings.position_embedding.weight", 2, path)  # (1+N, D)
        vision["heads"] = LAION_HEADS.get(vision["width"], vision["heads"])
        vision["patch_size"] = patches[-1]
        vision["image_size"] = patches[-1] * math.isqrt(max(0, positions[0] - 1))
    if text:
        text["vocab_size"] = shape_of(tensors, "text_model.embeddings.token_embedding.weight", 2, path)[0]
        text["context_length"] = shape_of(tensors, "text_model.embeddings.position_embedding.weight", 2, path)[0]
    embed_dim = 0
    for name in ("visual_projection.weight", "text_projection.weight"):  # (E, D)
        if name in tensors:
            embed_dim = shape_of(tensors, name, 2, path)[0]
    bias = "logit_bias" in tensors
    return settings.Fields({"embed_dim": embed_dim, "vision": vision, "text": text, "logit_bias": bias}, path)


def tower_from_shapes(tensors, name, path, activation):
    """What both towers have, as Fields; None where there is no such tower."""
    layers = count_layers(tensors, name)
    if not layers:
        return None
    hidden_dim, width = shape_of(tensors, f"{name}.encoder.layers.0.mlp.fc1.weight", 2, path)
    if width % 64:
        raise UserError(f"{path}: {name} is {width} wide, which does not tell its number of heads; pass config=")
    shape = {"width": width, "layers": layers, "heads": width // 64, "hidden_dim": hidden_dim}
    return settings.Fields(shape | {"activation": activation}, f"{path}: {name}")


def count_layers(tensors, tower):
    return sum(name.startswith(f"{tower}.encoder.layers.") and name.endswith("layer_norm1.weight") for name in tensors)


def shape_of(tensors, name, dimensions, path):
    if name not in tensors:
        raise UserError(f"{path}: {name} is missing")
    shape = tuple(tensors[name].shape)
    if len(shape) != dimensions:
        raise UserError(f"{path}: {name} is {shape}, expected {dimensions} dimensions")
    return shape


# ---- Stable Diffusion's single files ---------------------------------------------------------


class TextTower(NamedTuple):
    """A text tower within a single-file checkpoint, which says none of this itself."""

    prefix: str  # how the names of its weights begin
    rename: Callable  # what follows → Hugging Face's names
    activation: str
    pad: str  # the token that fills up texts
    drop_last: bool = False  # whether the last layer is left in the file


TEXT_TOWERS = (
    TextTower("cond_stage_model.transformer.", from_hf_names, "quick_gelu", CLIP_END),  # SD 1
    TextTower("cond_stage_model.model.", from_openai_names, "gelu", "!", drop_last=True),  # SD 2; "!" has id 0
    TextTower("conditioner.embedders.0.transformer.", from_hf_names, "quick_gelu", CLIP_END),  # SDXL, first of two
    TextTower("conditioner.embedders.0.model.", from_openai_names, "gelu", "!"),  # SDXL's refiner
    TextTower("conditioner.embedders.1.model.", from_openai_names, "gelu", "!"),  # SDXL, second of two
)


def text_towers(path, variant=None):
    """A Stable Diffusion → [(Fields of a CLIPConfig, tensors, where its files lie, padding token), …].

    Of a folder: those of text_encoder/ and text_encoder_2/, whose tokenizers say how to pad: None here.
    variant: of its files, as "fp16".
    """
    if path.is_file():
        towers = single_file_towers(path)
    else:
        folders = [folder for folder in (path / "text_encoder", path / "text_encoder_2") if folder.is_dir()]
        if variant is not None:
            folders = [checkpoint.find_weights(folder, variant) or folder for folder in folders]
        towers = []
        for place in folders:
            fields, tensors = read(place)
            towers.append((known(fields, tensors, place), tensors, place, None))
    if not towers:
        raise UserError(f"{path}: holds no CLIP text tower (looked for text_encoder/ or SD's own names)")
    return towers


def single_file_towers(path):
    """The same of a single file.

    SD 2 reads its tower after the last block but one: the last, and the projection, are left out,
    as diffusers does.
    """
    everything, towers = checkpoint.read_tensors(path), []
    for tower in TEXT_TOWERS:
        found = checkpoint.pop_prefix(everything, tower.prefix)
        tensors = checkpoint.renamed(tower.rename(found), [(r"^logit_scale$", None)])  # for pairs with pictures
        layers = count_layers(tensors, "text_model")
        if not layers:
            continue
        if tower.drop_last:
            unused = rf"^text_model\.encoder\.layers\.{layers - 1}\.|^text_projection"
            tensors = checkpoint.renamed(tensors, [(unused, None)])
        towers.append((from_shapes(tensors, path, tower.activation), tensors, path, tower.pad))
    return towers
