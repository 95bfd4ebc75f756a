"""Others' LLaMA files ⇄ ours: Hugging Face's folders, both ways, and Meta's.

    config.json   model.safetensors (or in shards, or .bin)   ┐
    params.json   consolidated.00.pth, 01, …                  ├─ read ─▶ fields of a LLaMAConfig, {name: tensor}
                                                              ┘
    LLaMAConfig ─ config_to_hf ─▶ config.json      {name: tensor} ─ to_hf_names ─▶ model.safetensors

A Hugging Face checkpoint has our names, behind a `model.`. Its configuration comes in the dialects
of transformers 4.28 to 5. What it says is used, or refused where model.py does something else; left
unread are entries that change no prediction (dropout, pretraining_tp, use_cache, ids of special
tokens).

Fields that somebody adds to LLaMAConfig are unknown to transformers. They are written as a table
`picturebook` as soon as one of them differs from its default, and then the file says that it is no
LlamaForCausalLM.
"""

import dataclasses
import math
import re
import sys
from dataclasses import dataclass

import torch
from einops import EinopsError, rearrange

from support import checkpoint, settings
from support.settings import UserError


def read(path):
    """A folder, or a weight file in one → (settings.Fields of a LLaMAConfig, {name: tensor})."""
    folder = path if path.is_dir() else path.parent
    file = folder / "config.json"
    if (folder / "params.json").exists() and not file.exists():
        if path.is_file() and not path.name.startswith("consolidated."):
            raise UserError(f"{path}: params.json beside it belongs to consolidated.00.pth, …: name the folder")
        return read_meta(folder)
    if not file.exists():
        raise UserError(f"{path}: no config.json beside the weights, which do not say a LLaMA's heads: get it too")
    fields, tensors = config_from_hf(checkpoint.read_json(file), file), from_hf_names(checkpoint.read_tensors(path))
    return untied(fields, tensors, path), tensors


def untied(fields, tensors, path):
    """The fields; without tie_embeddings if the file holds a head of its own all the same, as transformers reads it."""
    head, embedding = (tensors.get(f"{name}.weight") for name in ("lm_head", "embed_tokens"))
    both = head is not None and embedding is not None and not head.is_meta  # without numbers, nobody can tell
    if fields.get("tie_embeddings") is True and both and not torch.equal(head, embedding):
        print(f"{path}: lm_head.weight differs from embed_tokens.weight, so they are not tied", file=sys.stderr)
        fields["tie_embeddings"] = False
    return fields


# ---- Hugging Face ----------------------------------------------------------------------------


def from_hf_names(tensors):
    # a second model. is Lightning's, base_model. peft's
    return checkpoint.renamed(tensors, [(r"rotary_emb\.inv_freq$", None), (r"^(base_model\.)?(model\.)+", "")])


def to_hf_names(tensors):
    return checkpoint.renamed(tensors, [(r"^(?!lm_head)", "model.")])


HF_NAMES = {  # ours: theirs
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "tie_embeddings": "tie_word_embeddings",
}
REQUIRED = ("vocab_size", "dim", "n_layers", "n_heads", "hidden_dim")
HF_FIXED = {  # what model.py does
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,  # the share of a head's entries that turn
    "rope_interleaved": False,
    "sliding_window": None,
    "quantization_config": None,
}
ROPE_FIELDS = {  # of each kind of rotary embedding: what its table must hold
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
OWN = "picturebook_llama"  # model_type of a LLaMA with fields that transformers does not know


def config_from_hf(saved, path="config.json"):
    """A Hugging Face config.json (its content, as a dict) → settings.Fields of a LLaMAConfig."""
    wants = {"model_type": ("llama", OWN)}
    fields = settings.published(saved, path, HF_NAMES, wants, HF_FIXED, REQUIRED)
    fields.setdefault("max_seq_len", 2048)  # transformers' default
    # transformers 5 has one table for all rotary settings; before, rope_theta stood outside
    key = "rope_scaling" if saved.get("rope_parameters") is None else "rope_parameters"
    if saved.get(key) is not None:
        fields |= rope_from_hf(saved[key], f"{path}: {key}")
    scaling = fields.get("rope_scaling")
    if scaling and not scaling["original_max_position_embeddings"]:
        stretch_context(fields, saved, path)
    if saved.get("picturebook") is not None:
        settings.published(saved["picturebook"], f"{path}: picturebook", {})  # is it a table?
        fields |= saved["picturebook"]
    return fields


def stretch_context(fields, saved, path):
    """Linear scaling: max_position_embeddings is the context before it, as transformers and FastChat have it.

    max_sequence_length says the context after it where it is there (in Vicuna-16k's file, and in ours).
    """
    context, factor = fields["max_seq_len"], fields["rope_scaling"]["factor"]
    if saved.get("max_sequence_length") is not None:
        fields["max_seq_len"], fields.names["max_seq_len"] = saved["max_sequence_length"], "max_sequence_length"
    elif type(context) is int and type(factor) in (int, float) and 0 < factor < 2**20:  # else LLaMAConfig refuses them
        fields["max_seq_len"] = int(context * factor)


def rope_from_hf(saved, path):
    """The table of rotary settings → {"rope_theta", "rope_scaling"}: those of the two that it sets."""
    fields = settings.published(saved, path, {"rope_theta": "rope_theta"}, fixed={"partial_rotary_factor": 1.0})
    kind = saved.get("rope_type") or saved.get("type") or "default"
    if kind not in list(ROPE_FIELDS):
        within = "; without this entry, the model reads what its context was before it" if kind == "dynamic" else ""
        raise UserError(f"{path}: rope type {kind!r} is not supported (default, llama3 and linear are){within}")
    if kind == "default":
        # a factor would belong to a kind that is not named, a table to some of the layers only
        if unknown := saved.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}:
            raise UserError(f"{path}: {min(unknown)} does not belong to rope type 'default'")
        return fields
    names = {name: name for name in ROPE_FIELDS[kind]}
    scaling = settings.published(saved, path, names, required=names)
    if kind == "linear":
        scaling["original_max_position_embeddings"] = 0
    return fields | {"rope_scaling": scaling}


def config_to_hf(config, tokenizer=None):
    """A LLaMAConfig, and a text model's Tokenizer → config.json's content, but for the dtype."""
    scaling, own = config.rope_scaling, own_fields(config)
    saved = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    if own:
        saved = {"architectures": ["PicturebookLlamaForCausalLM"], "model_type": OWN, "picturebook": own}
    saved |= {theirs: getattr(config, ours) for ours, theirs in HF_NAMES.items()}
    if scaling and scaling.original_max_position_embeddings:
        saved["rope_scaling"] = {"rope_type": "llama3"} | dataclasses.asdict(scaling)
    elif scaling:
        saved["rope_scaling"] = {"rope_type": "linear", "factor": scaling.factor}
        saved["max_sequence_length"] = config.max_seq_len
        saved["max_position_embeddings"] = math.ceil(config.max_seq_len / scaling.factor)
    saved |= {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "initializer_range": 0.02}
    # an LVM has no ends: its rows are pictures
    return saved | {"bos_token_id": tokenizer and tokenizer.bos, "eos_token_id": tokenizer and tokenizer.eos}


def own_fields(config):
    """{name: value} of the fields unknown to transformers that differ from their defaults."""
    values = dataclasses.asdict(config)
    known = {*HF_NAMES, "rope_scaling"}
    unknown = [field for field in dataclasses.fields(config) if field.name not in known]
    return {field.name: values[field.name] for field in unknown if getattr(config, field.name) != field.default}


# No weight depends on these: who starts from a published model may train and sample it in another context.
CONTEXT = {"max_seq_len", "rope_theta", "rope_scaling"}


def in_context(config, **changes):
    """A LLaMAConfig with these fields of CONTEXT changed; a line says so if the context is longer than the model's.

    Beyond it, a model whose angles are not scaled is lost until it has been trained there.
    """
    changed = dataclasses.replace(config, **changes)
    scaled = (changed.rope_theta, changed.rope_scaling) != (config.rope_theta, config.rope_scaling)
    if changed.max_seq_len > config.max_seq_len and not scaled:
        lengths = f"a context of {changed.max_seq_len} tokens; the model was made for {config.max_seq_len}"
        print(f"note: {lengths}, and its rotary angles are not scaled", file=sys.stderr)
    return changed


# ---- Meta ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MetaParams:
    """What params.json says; vocabulary and hidden width, which it only hints at, the weights say."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int = 0
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    use_scaled_rope: bool = False  # from Llama 3.1 on
    rope_scaling_factor: float = 8.0
    rope_high_freq_factor: float = 4.0

    def __post_init__(self):
        settings.at_least(self, 1, "dim", "n_heads")
        if self.dim % (2 * self.n_heads):
            raise ValueError(f"n_heads {self.n_heads} does not divide dim {self.dim} into heads of an even width")


META_PARTS = {  # Meta's name: ours, and the axis along which its pieces are cut
    "tok_embeddings": ("embed_tokens", None),  # the width in Llama 1 and 2, the vocabulary in 3
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
    "attention_norm": ("input_layernorm", None),  # norms are whole in every piece
    "ffn_norm": ("post_attention_layernorm", None),
    "norm": ("norm", None),
    "output": ("lm_head", 0),
}


# what others' params.json may ask for: Mistral's, Mixtral's, those of quantised and of tuned models
META_FIXED = dict.fromkeys(("sliding_window", "moe", "moe_args", "quantization", "quantization_args", "lora_args"))


def read_meta(folder):
    """Meta's params.json and consolidated.NN.pth → the same as `read`."""
    file = folder / "params.json"
    names = {field.name: field.name for field in dataclasses.fields(MetaParams)}
    params = settings.published(checkpoint.read_json(file), file, names, fixed=META_FIXED)
    params = settings.build(MetaParams, params)
    pieces = read_pieces(folder)
    tensors = {}
    for name in pieces[0]:
        if name != "rope.freqs":  # computed, not learned
            ours, axis = meta_name(name)
            try:
                tensors[ours] = join_pieces(ours, [piece[name] for piece in pieces], axis, params)
            except (RuntimeError, IndexError, EinopsError) as error:
                reason = str(error).splitlines()[0]
                raise UserError(f"{folder}: the pieces of {name} do not fit ({reason})") from None
    return settings.Fields(meta_config(params, tensors), file, {"factor": "rope_scaling_factor"}), tensors


def read_pieces(folder):
    """The tables of tensors in consolidated.00.pth, 01, …: a model cut for tensor parallelism."""
    files = sorted(folder.glob("consolidated.*.pth"))
    if not files and (folder / "consolidated.safetensors").exists():  # Mistral's
        return [checkpoint.read_tensors(folder / "consolidated.safetensors")]
    found, expected = [file.name for file in files], [f"consolidated.{i:02d}.pth" for i in range(len(files))]
    if found != expected or not files:
        raise UserError(f"{folder}: expected consolidated.00.pth, 01, …; found {found}")
    pieces = [checkpoint.read_tensors(file) for file in files]
    for file, piece in zip(files, pieces, strict=True):
        if differing := sorted(piece.keys() ^ pieces[0].keys()):
            raise UserError(f"{file}: {differing[0]} is not in every piece")
    return pieces


def meta_name(name):
    """Meta's name of a tensor → (ours, the axis along which its pieces are cut, if any)."""
    layer, part = re.fullmatch(r"(layers\.\d+\.)?(.*?)(?:\.weight)?", name).groups(default="")
    ours, axis = META_PARTS.get(part, (part, None))
    return f"{layer}{ours}.weight", axis


def join_pieces(name, pieces, axis, params):
    """The pieces of the tensor that we call `name` → the whole, in our order.

    Meta's rotary embedding turns neighbours (x_0, x_1), (x_2, x_3), …; ours, as Hugging Face's,
    (x_i, x_{i+E/2}): so the rows of q and k move.
    """
    if name == "embed_tokens.weight":
        axis = 0 if pieces[0].shape[-1] == params.dim else 1
    whole = pieces[0] if axis is None or len(pieces) == 1 else torch.cat(pieces, axis)
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        half = params.dim // params.n_heads // 2
        whole = rearrange(whole, "(h i pair) d -> (h pair i) d", i=half, pair=2)
    return whole


def meta_config(params, tensors):
    """MetaParams and the joined weights → {field of a LLaMAConfig: value}."""

    def rows(name):
        return tensors[name].shape[:1].numel() if name in tensors else 0

    fields = {name: getattr(params, name) for name in ("dim", "n_layers", "n_heads", "n_kv_heads")}
    fields |= {"norm_eps": params.norm_eps, "rope_theta": params.rope_theta}
    fields |= {"vocab_size": rows("embed_tokens.weight"), "hidden_dim": rows("layers.0.mlp.gate_proj.weight")}
    fields["tie_embeddings"] = "lm_head.weight" not in tensors
    # params.json has no context length: it follows from the generation
    if params.use_scaled_rope:
        fields["max_seq_len"] = 131072
        scaling = {"factor": params.rope_scaling_factor, "high_freq_factor": params.rope_high_freq_factor}
        fields["rope_scaling"] = scaling
    else:
        fields["max_seq_len"] = 8192 if params.rope_theta >= 500000 else 4096
    return fields
