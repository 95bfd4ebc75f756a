"""Published VQGANs, openMUSE's folders and taming's checkpoints ⇄ our names; the weights of LPIPS.

    openMUSE   config.json and pytorch_model.bin: VQGANModel (the tokenizer of LVM), MaskGitVQGAN
    taming     a Lightning checkpoint NAME.ckpt with the one .yaml file beside it: VQModel;
               or the log folder of its training, checkpoints/last.ckpt and configs/*-project.yaml
    ours       openMUSE's two files, and model.safetensors with the same weights

The weights bear our names everywhere. A field that changes what a model computes is read, or it is
refused by its name if our blocks cannot do what it asks for.
"""

import dataclasses
from pathlib import Path

from support import checkpoint, settings
from support.settings import UserError

CLASS_NAMES = {"muse": "VQGANModel", "maskgit": "MaskGitVQGAN", "taming": "VQModel"}  # layout: _class_name
OURS = "PicturebookVQGAN"  # what none of these classes can do: the file then also names its layout

DEFAULTS = {  # openMUSE's, of both classes: what its config.json may leave out
    "resolution": 256, "num_channels": 3, "hidden_channels": 128, "channel_mult": [1, 1, 2, 2, 4],
    "num_res_blocks": 2, "attn_resolutions": [16], "no_attn_mid_block": False, "z_channels": 256,
    "num_embeddings": 1024, "quantized_embed_dim": 256, "commitment_cost": 0.25,
}  # fmt: skip
FIXED = {"dropout": 0.0, "resample_with_conv": True}
FIXED |= dict.fromkeys(  # a decoder of another shape than the encoder
    ("decoder_res_blocks", "extra_mid_res_blocks", "decoder_hidden_channels", "decoder_channel_mult")
)

TAMING_NAMES = {
    "resolution": "resolution", "num_channels": "in_channels", "hidden_channels": "ch", "channel_mult": "ch_mult",
    "num_res_blocks": "num_res_blocks", "attn_resolutions": "attn_resolutions", "z_channels": "z_channels",
    "num_embeddings": "n_embed", "quantized_embed_dim": "embed_dim",
}  # fmt: skip
TAMING_FIXED = {  # double_z: a Gaussian's mean and variance; remap: codes that were numbered anew
    "double_z": False, "dropout": 0.0, "resamp_with_conv": True, "give_pre_end": False, "tanh_out": False,
    "use_linear_attn": False, "attn_type": "vanilla", "remap": None,
}  # fmt: skip
TAMING_CLASSES = ("VQModel", "VQNoDiscModel", "VQModelInterface")  # the same model


def read(path):
    """A run, a folder or its weight file → (VQGANConfig's Fields, {name: tensor}, where they lie).

    Of a .ckpt the entries loss.* (the discriminator and LPIPS) are left out.
    """
    path = checkpoint.weights_folder(path)
    folder = path if path.is_dir() else path.parent
    ckpts = [path] if path.suffix == ".ckpt" else sorted([*folder.glob("*.ckpt"), *folder.glob("checkpoints/*.ckpt")])
    if not ckpts:
        return config_from_json(folder / "config.json"), checkpoint.read_tensors(path), path
    file = ckpts[-1]
    if len(ckpts) > 1 and file.name != "last.ckpt":  # Lightning's name for the newest, which epoch=….ckpt come before
        raise UserError(f"{folder}: {len(ckpts)} .ckpt files: name one of them")
    fields = config_from_yaml(yaml_of(file))
    tensors = checkpoint.read_tensors(file)
    return fields, checkpoint.renamed(tensors, [(r"^loss\.", None)]), file


def yaml_of(ckpt):
    """The configuration of taming's NAME.ckpt: the one .yaml beside it, or NAME.yaml; in a log folder the newest."""
    log = ckpt.parent.parent / "configs"
    files = sorted([*ckpt.parent.glob("*.yaml"), *ckpt.parent.glob("*.yml")])
    if not files and ckpt.parent.name in ("checkpoints", "ckpts"):
        files = sorted(log.glob("*-project.yaml"))[-1:] or sorted(log.glob("*.yaml"))  # their names begin with the time
    if len(files) > 1 and ckpt.with_suffix(".yaml") in files:
        files = [ckpt.with_suffix(".yaml")]
    if len(files) != 1:
        raise UserError(f"{ckpt.parent}: one .yaml file is expected beside the .ckpt, not {len(files)}")
    return files[0]


def write(path, config, tensors):
    """Writes config.json, model.safetensors and pytorch_model.bin (openMUSE reads the latter)."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(path / "config.json", config_to_json(config))
    checkpoint.write_tensors(path / "model.safetensors", tensors)
    checkpoint.write_bin(path / "pytorch_model.bin", tensors)


def config_from_json(path):
    """openMUSE's config.json → Fields."""
    saved = checkpoint.read_json(path)
    layouts = {name: layout for layout, name in CLASS_NAMES.items()}
    settings.published(saved, path, {}, wants={"_class_name": (*layouts, OURS)}, fixed=FIXED)
    name = saved["_class_name"]
    if name == OURS:
        settings.published(saved, path, {"layout": "layout"}, required=("layout",))
    extra = {key for key in saved if key in FIXED or key.startswith("_")}
    fields = {key: saved[key] for key in saved if key not in extra}
    layout = {} if name == OURS else {"layout": layouts[name]}
    return settings.Fields(DEFAULTS | fields | layout, path)


def config_to_json(config):
    """A VQGANConfig → openMUSE's config.json, under its class's name or OURS.

    It is OURS if a field that the published class lacks, such as `fold`, differs from its default.
    """
    fields = dataclasses.asdict(config)
    name = CLASS_NAMES[fields.pop("layout")]
    for field in dataclasses.fields(config):
        ours = field.name not in ("layout", *DEFAULTS)
        if ours and getattr(config, field.name) != field.default:
            name, fields["layout"] = OURS, config.layout
    dropout_and_resampling = {"dropout": 0.0, "resample_with_conv": True}
    return {"_class_name": name, "_version": "0.0.1"} | fields | dropout_and_resampling


def config_from_yaml(file):
    """taming's configuration → Fields."""
    model = _section(checkpoint.read_yaml(file), "model", file)
    params = _section(model, "params", file)
    shape = _section(params, "ddconfig", file)
    target = str(model.get("target", "VQModel")).rpartition(".")[2]
    if target not in TAMING_CLASSES:
        raise UserError(f"{file}: target is a {target}, expected {' or '.join(TAMING_CLASSES)}")
    fixed = TAMING_FIXED | {"out_ch": shape.get("in_channels", shape.get("out_ch"))}
    for key in shape:
        if key not in fixed and key not in TAMING_NAMES.values():
            raise UserError(f"{file}: ddconfig.{key} is not supported")
    saved = shape | {key: params[key] for key in ("n_embed", "embed_dim", "remap") if key in params}
    fields = settings.published(saved, file, TAMING_NAMES, fixed=fixed, required=TAMING_NAMES)
    fields |= {"layout": "taming", "no_attn_mid_block": False}
    return fields


def _section(table, key, file):
    found = table.get(key) if isinstance(table, dict) else None
    if not isinstance(found, dict):
        raise UserError(f"{file}: no taming model is described there ({key} is no table)")
    return found


# ---- the perceptual loss ---------------------------------------------------------------------

VGG16 = {  # torchvision's numbers of its convolutions: their channels
    0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256, 17: 512, 19: 512, 21: 512, 24: 512, 26: 512, 28: 512,
}  # fmt: skip


def read_vgg16(file):
    """torchvision's VGG16 → of each convolution, in order, {"weight" (O, I, 3, 3), "bias" (O,)}."""
    tensors = checkpoint.read_tensors(file)
    found, channels = [], 3
    for number, width in VGG16.items():
        own = checkpoint.pop_prefix(tensors, f"features.{number}.")
        shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
        if shapes != {"weight": (width, channels, 3, 3), "bias": (width,)}:
            raise UserError(f"{file}: features.{number} is not VGG16's")
        found.append(own)
        channels = width
    return found


def read_lpips_heads(file):
    """LPIPS's own file → its five heads (1, C, 1, 1), one for each stage of VGG16."""
    tensors = checkpoint.read_tensors(file)
    names = [f"lin{n}.model.1.weight" for n in range(5)]
    for name, width in zip(names, (64, 128, 256, 512, 512), strict=True):
        if name not in tensors or tensors[name].shape != (1, width, 1, 1):
            raise UserError(f"{file}: {name} must be (1, {width}, 1, 1), as LPIPS has it")
    return [tensors[name] for name in names]
