"""LLaMA: a decoder-only transformer, which for LVM continues sentences of image codes. And DreamLLM on top of it.

    tokens (B, T) ─ embed_tokens ─▶ (B, T, D)
      n_layers × [ x + attention(norm(x)) ;  x + mlp(norm(x)) ]          residual stream (B, T, D)
    ─ norm ─ lm_head ─▶ logits (B, T, V): at each position, a score for every possible next token

Differences from the 2017 transformer: RMSNorm before each part (Zhang & Sennrich 2019), rotary position
embedding of queries and keys (Su et al. 2021, eq. 34), a gated MLP, SwiGLU (Shazeer 2020), no biases,
and optionally fewer key/value heads than query heads (Ainslie et al. 2023). LLaMA: Touvron et al. 2023.
LVM (Bai et al. 2023) is this model unchanged, over 8192 image codes + 100 spare ids.

Modules bear the names of the Hugging Face files, so a checkpoint's keys can be read beside the code.

DreamLLM (Dong et al. 2023, arXiv 2309.11499) puts pictures into that stream on both sides. A picture to be read comes
in as CLIP's patches; a picture to be drawn starts from learned queries, and what the LLaMA makes of them steers a
U-Net in place of a text encoder:

    <s> a taco <dream_start> q q … q <dream_end> <im_start> p p … p <im_end> , a burrito … </s>
                             │ Q dream queries (Q, D)        ▲ CLIP's patches (N, D)
                  one causal pass, as above                  └── projector ── clip.patch_features(picture)
                             ▼
             hidden (Q, D) ── condition ──▶ context (Q, C) ── diffusion: its loss, or a picture

    symbol  B batch   T tokens   D dim   V vocab_size   H n_heads   K n_kv_heads   E head_dim   F hidden_dim
            S side of the pictures that CLIP sees   N places of each   M pictures drawn   Q queries of each
            C width of the U-Net's context

Read before: vqgan.py; for DreamLLM, clip.py, diffusion.py and documents.py. Read next: train.py, then sample.py.
"""

import dataclasses
import json
import math
import re
import sys
import typing
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import EinopsError, rearrange
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

import checkpoint
import settings
from settings import UserError
from tokenizer import ADDED, Special, Tokenizer

# ---- configuration ---------------------------------------------------------------------------


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the rotary wavelengths beyond the context it was first trained on.

    With an original context of 0 every wavelength is stretched: the older "linear" scaling.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class LLaMAConfig:
    """Shape of a LLaMA. `n_kv_heads` and `head_dim` 0: as many as `n_heads`, dim / n_heads."""

    vocab_size: int = 8292
    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = 0
    head_dim: int = 0
    hidden_dim: int = 11008
    max_seq_len: int = 4096
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False

    def __post_init__(self):
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "hidden_dim", "max_seq_len"):
            if not 1 <= getattr(self, name) < 2**31:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1 and less than 2³¹")
        for name in ("norm_eps", "rope_theta"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)} must be greater than 0")
        if not self.head_dim and self.dim % self.n_heads:
            raise ValueError(f"n_heads {self.n_heads} does not divide dim {self.dim}")
        # frozen, but the zeros stand for values that follow from the others
        object.__setattr__(self, "n_kv_heads", self.n_kv_heads or self.n_heads)
        object.__setattr__(self, "head_dim", self.head_dim or self.dim // self.n_heads)
        if self.n_kv_heads < 1 or self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads {self.n_kv_heads} does not divide n_heads {self.n_heads}")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even (rotary pairs)")

    @classmethod
    def named(cls, name):
        """A published size, e.g. "lvm_7b", "llama2_13b", "llama3_8b"."""
        if name not in SIZES:
            raise UserError(f'no LLaMA size "{name}"; there are {", ".join(SIZES)}')
        return cls(**SIZES[name])


def _lvm(dim, n_layers, n_heads, hidden_dim):
    return {"dim": dim, "n_layers": n_layers, "n_heads": n_heads, "hidden_dim": hidden_dim}


_LLAMA2 = {"vocab_size": 32000, "norm_eps": 1e-5}
_LLAMA3 = {"vocab_size": 128256, "max_seq_len": 8192, "norm_eps": 1e-5, "rope_theta": 500000.0, "n_kv_heads": 8}
SIZES = {
    "lvm_100m": _lvm(640, 22, 10, 1664),
    "lvm_300m": _lvm(1024, 22, 8, 2688),
    "lvm_600m": _lvm(1536, 22, 16, 4096),
    "lvm_1b": _lvm(2048, 22, 16, 5504),
    "lvm_3b": _lvm(3200, 26, 32, 8640),
    "lvm_7b": _lvm(4096, 32, 32, 11008),
    "lvm_13b": _lvm(5120, 40, 40, 13824),
    "lvm_20b": _lvm(6144, 46, 48, 16128),
    "lvm_30b": _lvm(6656, 60, 52, 17920),
    "llama2_7b": _lvm(4096, 32, 32, 11008) | _LLAMA2,
    "llama2_13b": _lvm(5120, 40, 40, 13824) | _LLAMA2,
    "llama2_70b": _lvm(8192, 80, 64, 28672) | _LLAMA2 | {"n_kv_heads": 8},
    "llama3_8b": _lvm(4096, 32, 32, 14336) | _LLAMA3,
    "llama31_8b": _lvm(4096, 32, 32, 14336) | _LLAMA3 | {"max_seq_len": 131072, "rope_scaling": RopeScaling()},
    "smollm2_135m": _lvm(576, 30, 9, 1536)
    | {"vocab_size": 49152, "max_seq_len": 8192, "norm_eps": 1e-5, "rope_theta": 1e5, "n_kv_heads": 3}
    | {"tie_embeddings": True},
    "vicuna_7b": _lvm(4096, 32, 32, 11008) | {"vocab_size": 32000, "max_seq_len": 2048},
}


# ---- the parts -------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / rms(x) · weight, computed in float32 whatever the dtype of x."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return h.type_as(x) * self.weight.type_as(x)


def rotary_angles(positions, config):
    """positions (T,) → cos, sin (T, E/2) in float32: pair i turns by position · theta^(-2i/E).

    bfloat16 angles would collapse: of 4096 positions only a few hundred would stay distinct.
    """
    angles = positions.float()[:, None] * rotary_frequencies(config, positions.device)  # (T, E/2)
    return angles.cos(), angles.sin()


def rotary_frequencies(config, device=None):
    """(E/2,) float32: by how much each pair turns from one position to the next."""
    i = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    frequency = config.rope_theta ** (-i / config.head_dim)  # (E/2,)
    if s := config.rope_scaling:
        # Wavelengths well inside the original context stay, those beyond it are stretched by `factor`,
        # and between the two the frequency goes over smoothly.
        turns = s.original_max_position_embeddings * frequency / (2 * torch.pi)
        keep = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
        frequency = frequency * (keep + (1 - keep) / s.factor)
    return frequency


def rotate(x, angles):
    """Turns the pairs (x_i, x_{i+E/2}) of x (B, heads, T, E): the half-split form of Hugging Face files."""
    cos, sin = angles
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


def reference_attention(q, k, v, visible):
    """softmax(q·kᵀ/√E)·v, the slow and obvious twin of the fused one. visible (T, S): who sees whom."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.q_proj = nn.Linear(c.dim, c.n_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.n_heads * c.head_dim, c.dim, bias=False)

    def forward(self, x, angles, cache=None):
        """x (B, T, D) → (B, T, D); with a cache, the tokens before x are attended to as well."""
        split = "b t (h e) -> b h t e"
        q = rotate(rearrange(self.q_proj(x), split, e=self.config.head_dim), angles)  # (B, H, T, E)
        k = rotate(rearrange(self.k_proj(x), split, e=self.config.head_dim), angles)  # (B, K, T, E)
        v = rearrange(self.v_proj(x), split, e=self.config.head_dim)  # (B, K, T, E)
        gqa = self.config.n_kv_heads != self.config.n_heads  # each key/value head serves H/K query heads
        if cache is None:
            h = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        else:
            k, v, visible = cache.append(k, v)  # (B, K, S, E), (T, S)
            h = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=gqa)
        return self.o_proj(rearrange(h, "b h t e -> b t (h e)"))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.dim, c.hidden_dim, bias=False)
        self.up_proj = nn.Linear(c.dim, c.hidden_dim, bias=False)
        self.down_proj = nn.Linear(c.hidden_dim, c.dim, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.dim, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.dim, c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, angles, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), angles, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LayerCache:
    """The keys and values of one layer, in memory allocated once: (B, K, max_tokens, E) each."""

    def __init__(self, batch, max_tokens, config, like):
        shape = (batch, config.n_kv_heads, max_tokens, config.head_dim)
        self.k, self.v = (torch.empty(shape, dtype=like.dtype, device=like.device) for _ in range(2))
        self.length = 0

    def repeat(self, times):
        """Each row of the batch becomes `times` rows."""
        self.k, self.v = (x.repeat_interleave(times, dim=0) for x in (self.k, self.v))

    def append(self, k, v):
        """New keys and values (B, K, T, E) → all so far (B, K, S, E), and which of them each new one sees."""
        start, end = self.length, self.length + k.shape[2]
        self.k[:, :, start:end], self.v[:, :, start:end] = k, v
        self.length = end
        new, all = (torch.arange(n, device=k.device) for n in (k.shape[2], end))
        return self.k[:, :, :end], self.v[:, :, :end], all <= new[:, None] + start


# ---- the model -------------------------------------------------------------------------------


class LLaMA(nn.Module):
    """tokens (B, T) int64 → logits (B, T, V)."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.dim)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.n_layers))
        self.norm = RMSNorm(c.dim, c.norm_eps)
        if not c.tie_embeddings:
            self.lm_head = nn.Linear(c.dim, c.vocab_size, bias=False)
        self.activation_checkpointing = False
        self.tokenizer = None  # a model of text may be given its own: it is saved beside the weights
        for weight in self.parameters():  # the norms' weights stay 1
            if weight.ndim == 2:
                nn.init.normal_(weight, 0, 0.02)

    def forward(self, tokens):
        return self.logits(self.hidden(self.embed_tokens(tokens)))

    def hidden(self, embeddings, caches=None):
        """embeddings (B, T, D) → what the last layer says of each, after the final norm (B, T, D).

        With `caches` (one LayerCache a layer), `embeddings` continue what the caches hold.
        """
        x, start = embeddings, caches[0].length if caches else 0
        positions = torch.arange(start, start + x.shape[1], device=x.device)
        angles = rotary_angles(positions, self.config)
        for n, layer in enumerate(self.layers):
            if self.activation_checkpointing and self.training:
                x = recompute(layer, x, angles, use_reentrant=False)
            else:
                x = layer(x, angles, caches[n] if caches else None)
        return self.norm(x)

    def logits(self, hidden):
        """(B, T, D) → (B, T, V); a tied head reuses the embedding."""
        return self.lm_head(hidden) if hasattr(self, "lm_head") else F.linear(hidden, self.embed_tokens.weight)

    @torch.no_grad()
    def resize(self, vocab_size):
        """Grows the vocabulary: the new rows of embedding and head start as N(0, 0.02)."""
        new = max(0, vocab_size - self.config.vocab_size)
        for layer in (self.embed_tokens, self.lm_head) if hasattr(self, "lm_head") else (self.embed_tokens,):
            rows = torch.randn(new, self.config.dim).to(layer.weight) * 0.02
            layer.weight = nn.Parameter(torch.cat((layer.weight, rows)))
        self.config = dataclasses.replace(self.config, vocab_size=self.config.vocab_size + new)

    def caches(self, batch, max_tokens):
        return [LayerCache(batch, max_tokens, self.config, self.embed_tokens.weight) for _ in self.layers]

    def generate(
        self,
        tokens,
        max_new_tokens,
        temperature=1.0,
        top_k=None,
        top_p=None,
        allowed=None,
        eos=None,
        generator=None,
        samples=1,
    ):
        """tokens (B, T) → (B·samples, T + new): the prompts, and what `stream` draws after them."""
        new = self.stream(tokens, max_new_tokens, temperature, top_k, top_p, allowed, eos, generator, samples)
        return torch.cat((tokens.repeat_interleave(samples, dim=0), *new), dim=1)

    @torch.inference_mode()
    def stream(
        self,
        tokens,
        max_new_tokens,
        temperature=1.0,
        top_k=None,
        top_p=None,
        allowed=None,
        eos=None,
        generator=None,
        samples=1,
    ):
        """tokens (B, T) → yields (B·samples, 1) at a time: each drawn from the model's own prediction.

        temperature 0 takes the likeliest; `allowed` (a list or tensor of ids) forbids all others; a row
        that drew `eos` repeats it, and generation ends early when every row has. The `samples` of a prompt
        stand together and share one pass over it.
        """
        length = tokens.shape[1] + max_new_tokens
        if tokens.shape[1] < 1 or length > self.config.max_seq_len:
            raise UserError(
                f"{tokens.shape[1]} prompt tokens + {max_new_tokens} new ones do not fit "
                f"in 1..{self.config.max_seq_len}, the model's context"
            )
        forbidden = None
        if allowed is not None:
            forbidden = torch.ones(self.config.vocab_size, dtype=torch.bool, device=tokens.device)
            forbidden[torch.as_tensor(allowed, device=tokens.device)] = False
        caches = self.caches(len(tokens), length)
        done = torch.zeros(len(tokens) * samples, dtype=torch.bool, device=tokens.device)
        new = tokens
        for i in range(max_new_tokens):
            logits = self.logits(self.hidden(self.embed_tokens(new), caches)[:, -1]).float()  # (B, V)
            if i == 0 and samples > 1:  # the prompt has been read: from here on, every sample goes its own way
                logits = logits.repeat_interleave(samples, dim=0)
                for cache in caches:
                    cache.repeat(samples)
            if forbidden is not None:
                logits = logits.masked_fill(forbidden, float("-inf"))
            new = draw(logits, temperature, top_k, top_p, generator)  # (B, 1)
            if eos is not None:
                new = new.masked_fill(done[:, None], eos)
                done |= new[:, 0] == eos
            yield new
            if eos is not None and done.all():
                break

    # -- published files --

    @classmethod
    def from_pretrained(cls, path, dtype=None, device="cpu"):
        """A LLaMA from a run of ours, a Hugging Face folder, or Meta's (params.json, consolidated.NN.pth).

        dtype: a torch.dtype; None: as stored; "int8": every matrix of the layers and the head in 8 bits, the rest
        as stored (Int8Linear). `path` may also be a weight file in such a folder.
        """
        path = checkpoint.resolve(path)
        folder = path if path.is_dir() else path.parent
        if (folder / "params.json").exists() and not (folder / "config.json").exists():
            config, tensors = read_meta(folder)
        else:
            config = config_from_hf(checkpoint.read_json(folder / "config.json"), folder / "config.json")
            tensors = from_hf_names(checkpoint.read_tensors(path))
        return cls.from_tensors(tensors, path, dtype, device, config)

    @classmethod
    def from_tensors(cls, tensors, path, dtype, device, config):
        """The same from tensors at hand, under our names; `path` is where they are from."""
        if config.tie_embeddings:
            tensors.pop("lm_head.weight", None)
        if config.n_layers > len(tensors):
            raise UserError(
                f"{path}: {len(tensors)} tensors cannot be the {config.n_layers} layers of its configuration"
            )
        with torch.device("meta"):
            model = cls(config)
        if dtype == "int8":
            checkpoint.check(tensors, model, path)
            return fill_int8(model, tensors).to(device).eval()
        return checkpoint.fill(model, tensors, path, dtype, device).eval()

    def save_pretrained(self, path):
        """Writes config.json and model.safetensors as transformers' LlamaForCausalLM has them; `tokenizer`, if set."""
        if any(isinstance(module, Int8Linear) for module in self.modules()):
            raise UserError("a model in int8 is for inference: its rounded weights are not saved")
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        dtype = str(self.embed_tokens.weight.dtype).removeprefix("torch.")
        config = config_to_hf(self.config, self.tokenizer) | {"torch_dtype": dtype}
        checkpoint.write_text(path / "config.json", json.dumps(config, indent=2) + "\n")
        checkpoint.write_tensors(path / "model.safetensors", to_hf_names(self.state_dict()))
        if self.tokenizer:
            self.tokenizer.save_pretrained(path)


def to_hf_names(tensors):
    return {(k if k.startswith("lm_head") else f"model.{k}"): v for k, v in tensors.items()}


def from_hf_names(tensors):
    return {k.removeprefix("model."): v for k, v in tensors.items() if not k.endswith("rotary_emb.inv_freq")}


def draw(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """logits (B, V) → ids (B, 1), sampled after temperature, top-k and nucleus (top-p) filtering."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p is not None:
        values, order = logits.sort(descending=True)
        p = values.softmax(-1)
        beyond = p.cumsum(-1) - p >= top_p  # the mass before an id already suffices; the first always stays
        beyond[:, 0] = False
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


# ---- eight bits ------------------------------------------------------------------------------


class Int8Linear(nn.Module):
    """A bias-free Linear that keeps its matrix (out, in) as integers: row r ≈ scale[r] · weight[r], |weight| ≤ 127.

    Half of bfloat16's memory, a rounding error of at most 1/254 of a row's largest entry, and no training.
    The product is taken in the dtype of x, to which each matrix is unpacked as it is used.
    """

    def __init__(self, weight):
        super().__init__()
        self.register_buffer("weight", torch.empty(weight.shape, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(len(weight)))  # (out,)
        for start in range(0, len(weight), 256):  # a few rows at a time, so that float32 copies stay small
            rows = slice(start, start + 256)
            part = weight[rows].float()
            self.scale[rows] = part.abs().amax(1).clamp(min=1e-30) / 127
            self.weight[rows] = (part / self.scale[rows, None]).round().to(torch.int8)

    def forward(self, x):
        return (F.linear(x, self.weight.to(x.dtype)) * self.scale).type_as(x)


def fill_int8(model, tensors):
    """Puts `tensors` into `model` (on the meta device), one at a time, its Linears as Int8Linear."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Int8Linear(tensors.pop(f"{name}.weight")))
    rest = {name: tensor.clone() for name, tensor in tensors.items()}
    model.load_state_dict(rest, strict=False, assign=True)  # not strict: the Int8Linears have theirs
    return model


# ---- published configurations ----------------------------------------------------------------

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


def config_from_hf(saved, path="config.json"):
    """A Hugging Face `config.json` (a dict, of transformers 4.28 to 5) as a LLaMAConfig."""
    if not isinstance(saved, dict):
        raise UserError(f"{path}: expected a table, got {saved!r}")
    if saved.get("model_type") != "llama":
        raise UserError(f"{path}: model_type is {saved.get('model_type')!r}, expected 'llama'")
    if saved.get("hidden_act", "silu") != "silu":
        raise UserError(f"{path}: hidden_act is {saved['hidden_act']!r}, expected 'silu'")
    # transformers 5 moved what concerns rotary embedding into one table
    rope = saved.get("rope_parameters") or saved.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_scaling: expected a table, got {rope!r}")
    saved = {"max_position_embeddings": 2048} | saved | {k: rope[k] for k in ("rope_theta",) if k in rope}
    fields = _fields(saved, HF_NAMES, path)
    match rope.get("rope_type", rope.get("type", "default")):
        case "default":
            pass
        case "llama3":
            names = [f.name for f in dataclasses.fields(RopeScaling)]
            scaling = {name: rope[name] for name in names if name in rope}
            fields["rope_scaling"] = settings.build(RopeScaling, scaling, f"{path}: rope_scaling")
        case "linear":
            scaling = {"factor": rope.get("factor"), "original_max_position_embeddings": 0}
            fields["rope_scaling"] = settings.build(RopeScaling, scaling, f"{path}: rope_scaling")
        case kind:
            raise UserError(f"{path}: rope type {kind!r} is not supported (default, llama3 and linear are)")
    return _config(fields, path)


def _fields(saved, names, path):
    """The entries of `saved` under our names, each of the right type; the sizes must be there."""
    hints = typing.get_type_hints(LLaMAConfig)
    for ours, theirs in names.items():
        if saved.get(theirs) is None and ours in ("vocab_size", "dim", "n_layers", "n_heads", "hidden_dim"):
            raise UserError(f"{path}: {theirs} is missing")
    given = {ours: theirs for ours, theirs in names.items() if saved.get(theirs) is not None}
    return {ours: settings.convert(hints[ours], saved[theirs], f"{path}: {theirs}") for ours, theirs in given.items()}


def _config(fields, path):
    try:
        return LLaMAConfig(**fields)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def config_to_hf(config, tokenizer=None):
    saved = {theirs: getattr(config, ours) for ours, theirs in HF_NAMES.items()}
    if (scaling := config.rope_scaling) and scaling.original_max_position_embeddings:
        saved["rope_scaling"] = {"rope_type": "llama3"} | dataclasses.asdict(scaling)
    elif scaling:
        saved["rope_scaling"] = {"rope_type": "linear", "factor": scaling.factor}
    fixed = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "initializer_range": 0.02}
    ends = {"bos_token_id": tokenizer and tokenizer.bos, "eos_token_id": tokenizer and tokenizer.eos}  # an LVM: none
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | saved | fixed | ends


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


def read_meta(folder):
    """Meta's params.json and consolidated.NN.pth → (config, tensors under our names).

    Each file is one piece of a model cut for tensor parallelism. Meta's rotary embedding turns neighbours
    (x_0, x_1), (x_2, x_3), …; ours, as Hugging Face's, (x_i, x_{i+E/2}): so the rows of q and k move.
    """
    files = sorted(folder.glob("consolidated.*.pth"))
    if [f.name for f in files] != [f"consolidated.{i:02d}.pth" for i in range(len(files))] or not files:
        raise UserError(f"{folder}: expected consolidated.00.pth, 01, …; found {[f.name for f in files]}")
    pieces = [checkpoint.read_tensors(file) for file in files]
    for file, piece in zip(files, pieces, strict=True):
        if differing := sorted(piece.keys() ^ pieces[0].keys()):
            raise UserError(f"{file}: {differing[0]} is not in every piece")
    path = folder / "params.json"
    params = checkpoint.read_json(path)
    if not isinstance(params, dict):
        raise UserError(f"{path}: expected a table, got {params!r}")

    def rows(name):  # of a matrix that is cut along them
        return sum(piece[name].shape[:1].numel() for piece in pieces if name in piece)

    tied = "output.weight" not in pieces[0]
    sizes = {
        "vocab_size": rows("tok_embeddings.weight" if tied else "output.weight"),  # params.json may say -1
        "hidden_dim": rows("layers.0.feed_forward.w1.weight"),  # it says only how this was rounded
        "tie_embeddings": tied,
    }
    names = ("vocab_size", "hidden_dim", "tie_embeddings", "dim", "n_layers", "n_heads", "n_kv_heads", "norm_eps")
    fields = {"norm_eps": 1e-5} | _fields(params | sizes, {n: n for n in (*names, "rope_theta")}, path)
    # the context is nowhere stated; the generation tells it
    if params.get("use_scaled_rope"):  # Llama 3.1
        scaling = {"factor": params.get("rope_scaling_factor", 8.0)}
        fields |= {"max_seq_len": 131072, "rope_scaling": settings.build(RopeScaling, scaling, f"{path}: rope_scaling")}
    else:
        fields["max_seq_len"] = 8192 if fields.get("rope_theta", 0) >= 500000 else 4096
    config = _config(fields, path)

    tensors = {}
    for name in pieces[0]:
        if name == "rope.freqs":  # computed, not learned
            continue
        layer, part = re.fullmatch(r"(layers\.\d+\.)?(.*?)(?:\.weight)?", name).groups(default="")
        ours, axis = META_PARTS.get(part, (part, None))
        parts = [piece[name] for piece in pieces]
        if part == "tok_embeddings":
            axis = 0 if parts[0].shape[-1] == config.dim else 1
        try:
            whole = parts[0] if axis is None or len(parts) == 1 else torch.cat(parts, axis)
            if ours in ("self_attn.q_proj", "self_attn.k_proj"):
                whole = rearrange(whole, "(h i pair) d -> (h pair i) d", i=config.head_dim // 2, pair=2)
        except (RuntimeError, IndexError, EinopsError) as error:
            raise UserError(f"{folder}: the pieces of {name} do not fit ({str(error).splitlines()[0]})") from None
        tensors[f"{layer}{ours}.weight"] = whole
    return config, tensors


# ---- DreamLLM --------------------------------------------------------------------------------

PROJECTORS = ("linear", "mlp", "conv", "downsample")
CLIP_PART, DIFFUSION_PART = "clip_vision", "stable_diffusion"  # folders of the parts' configurations in a saved one


@dataclass(frozen=True)
class DreamLLMConfig:
    """What DreamLLM adds to the models it is handed, and how their two losses are weighed."""

    queries: int = 64  # Q
    projector: str = "linear"  # from CLIP's patches to embeddings: one of PROJECTORS
    condition: str = "linear"  # from hidden states to the U-Net's context: linear or mlp
    w_lm: float = 1.0  # of the text's cross-entropy
    w_vm: float = 10.0  # of the pictures' squared error
    drop: float = 0.0  # share of pictures drawn without what was said before, for guidance
    min_snr: float = 0.0  # these three: see diffusion_loss and offset_noise; the published runs use none
    noise_offset: float = 0.0
    perturbation: float = 0.0

    def __post_init__(self):
        if self.queries < 1:
            raise ValueError(f"queries {self.queries} must be at least 1")
        if self.projector not in PROJECTORS or self.condition not in PROJECTORS[:2]:
            kinds = f'projector "{self.projector}" must be one of {", ".join(PROJECTORS)}'
            raise ValueError(f'{kinds}, condition "{self.condition}" linear or mlp')
        if min(self.w_lm, self.w_vm, self.min_snr, self.noise_offset, self.perturbation) < 0 or not 0 <= self.drop < 1:
            raise ValueError("weights of losses and noise must be at least 0, drop must lie in [0, 1)")


class Projector(nn.Module):
    """(B, N, I) → (B, N', O): from one model's width to another's. N' = N, but for "downsample"."""

    def __init__(self, i, o, kind, bias=True):
        super().__init__()
        self.kind = kind
        if kind == "linear":
            self.projector = nn.Linear(i, o, bias)
        elif kind == "mlp":
            self.projector = nn.Sequential(nn.Linear(i, o, bias), nn.GELU(), nn.Linear(o, o, bias))
        elif kind == "conv":  # on the grid of patches: each sees its neighbours
            self.projector = nn.Conv2d(i, o, 3, padding=1, bias=bias)
        else:  # a quarter as many patches each way; the last convolution is a linear layer at every place
            halves = [nn.Conv2d(i, i, 3, stride=2, padding=1) for _ in range(2)]
            self.projector = nn.Sequential(halves[0], nn.GELU(), halves[1], nn.GELU(), nn.Conv2d(i, o, 1, bias=bias))

    def places(self, n):
        """N → N'."""
        side = math.isqrt(n)
        return n if self.kind != "downsample" else ((side + 3) // 4) ** 2

    def forward(self, x):
        if self.kind in ("linear", "mlp"):
            return self.projector(x)
        grid = rearrange(x, "b (h w) i -> b i h w", h=math.isqrt(x.shape[1]))
        return rearrange(self.projector(grid), "b o h w -> b (h w) o")


class DreamLLM(nn.Module):
    """A LLaMA that reads pictures through CLIP and draws them through latent diffusion. See the top of the file.

    llama, clip (its vision tower is kept) and diffusion are handed in; the tokenizer must know the tokens ADDED, and
    the LLaMA have rows for them (`llama.resize`). The latent diffusion loses its text encoder: it draws from nothing
    but what the queries say. How many patches a picture has, and how large drawn pictures are, follows from these
    parts.
    """

    def __init__(self, llama, clip, diffusion, config, tokenizer):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.llama, self.clip, self.diffusion = llama, clip.vision_encoder(), diffusion
        self.diffusion.text_encoders = nn.ModuleList()
        width, context = clip.config.vision.width, diffusion.unet.config.cross_attention_dim
        self.projector = Projector(width, llama.config.dim, config.projector)
        self.dream_queries = nn.Parameter(torch.randn(1, config.queries, llama.config.dim) * 0.02)
        self.condition = Projector(llama.config.dim, context, config.condition, bias=False)
        self.patches = self.projector.places(clip.config.vision.patches)  # N: fewer, if the projector downsamples
        self.side = diffusion.unet.config.sample_size * diffusion.vae.config.factor  # pixels of a drawn picture
        if absent := [name for name in ADDED if name not in tokenizer.special]:
            raise UserError(f"the tokenizer does not know {', '.join(absent)}: tokenizer.add(ADDED)")
        if tokenizer.vocab_size > llama.config.vocab_size:
            sizes = f"the tokenizer knows {tokenizer.vocab_size} tokens, the LLaMA only {llama.config.vocab_size}"
            raise UserError(f"{sizes}: llama.resize(tokenizer.vocab_size) gives it the missing ones")
        s = tokenizer.special
        self.look = [s["<im_start>"], *[s["<im_patch>"]] * self.patches, s["<im_end>"]]  # a picture to look at
        self.ask = [s["<dream_start>"], *[s["<im_patch>"]] * config.queries]  # one to draw, as far as it is asked for

    # -- reading and training --

    def embed(self, tokens, images, queries=True):
        """tokens (B, T), images (·, 3, S, S) as CLIP wants them, in reading order → embeddings (B, T, D).

        After every <im_start> stand a picture's patches, after every <dream_start> the queries. (queries=False leaves
        those places as their tokens have them: so does the published code where it is given nothing to draw.)
        """
        x = self.llama.embed_tokens(tokens)  # (B, T, D)
        if queries:
            rows, places = self.spans(tokens, "<dream_start>", self.config.queries)
            x = x.index_put((rows, places), self.dream_queries.expand(len(rows), -1, -1).to(x.dtype))
        rows, places = self.spans(tokens, "<im_start>", self.patches)
        if len(rows) != len(images):
            raise ValueError(f"{len(rows)} spans of <im_start> but {len(images)} pictures")
        if len(images):
            x = x.index_put((rows, places), self.projector(self.clip.patch_features(images)).to(x.dtype))
        return x

    def spans(self, tokens, start, length):
        """Where the `length` places after each token `start` are: rows (n, 1), places (n, length), in reading order."""
        rows, at = (tokens == self.tokenizer.special[start]).nonzero(as_tuple=True)
        places = at[:, None] + torch.arange(1, length + 1, device=tokens.device)
        if len(at) and places.max() >= tokens.shape[1]:
            raise ValueError(
                f"{start} at {int(at.max())}: the {length} places after it reach beyond {tokens.shape[1]} tokens"
            )
        return rows[:, None], places

    def forward(self, tokens, labels, images, images_dm, draws=None):
        """One pass for both losses → {loss, lm_loss, vm_loss, logits (B, T, V)}.

        tokens (B, T), padded on the right, where attention, being causal, never sees it; labels (B, T), the same or
        -100 where nothing is to be learned; images (·, 3, S, S) to be read, normalised as CLIP wants them; images_dm
        (M, 3, H, W) to be drawn, in [0, 1]: all those of the batch in reading order. draws: a diffusion.Draws,
        recorded; None: fresh chance. The text's loss is the mean over all labels of the batch, the pictures' the mean
        over all pictures.
        """
        c, v = self.config, self.clip.config.vision
        hidden = self.llama.hidden(self.embed(tokens, images, queries=len(images_dm) > 0))  # (B, T, D)
        logits = self.llama.logits(hidden)  # (B, T, V)
        wanted = labels[:, 1:].flatten()
        lm_loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted, ignore_index=-100, reduction="sum")
        lm_loss = lm_loss / (wanted != -100).sum().clamp(min=1)
        vm_loss = self.drawing_loss(hidden, tokens, images_dm, draws) if len(images_dm) else lm_loss.new_zeros(())
        loss = c.w_lm * lm_loss + c.w_vm * vm_loss
        # Several processes average their gradients: each must have one of every weight, zero where its batch has no
        # such picture.
        if not len(images):
            loss = loss + 0 * self.projector(self.dream_queries.new_zeros(1, v.patches, v.width)).sum()
        if not len(images_dm):
            loss = loss + 0 * self.condition(self.dream_queries).sum()
        return {"loss": loss, "lm_loss": lm_loss, "vm_loss": vm_loss, "logits": logits}

    def drawing_loss(self, hidden, tokens, images_dm, draws):
        """hidden (B, T, D) after the final norm → the U-Net's error on the pictures that its queries should draw."""
        c = self.config
        rows, places = self.spans(tokens, "<dream_start>", c.queries)
        if len(rows) != len(images_dm):
            raise ValueError(f"{len(rows)} spans of <dream_start> but {len(images_dm)} pictures to draw")
        draws = draws or self.diffusion.draws(len(images_dm), *images_dm.shape[2:])
        states = hidden[rows, places]  # (M, Q, D)
        if c.drop and self.training:
            # Here as in drawing, no prompt means real queries after <s>. (The published code trains it with the
            # embeddings of <im_patch> in their places, which drawing never does.)
            states = torch.where((draws.drop < c.drop)[:, None, None], self.dream([""]), states)
        context = self.condition(states)  # (M, Q, C)
        return self.diffusion.loss(images_dm, context, draws, c.min_snr, c.noise_offset, c.perturbation)

    # -- drawing --

    def prompt(self, parts):
        """A text, or a list of texts, Specials and PIL pictures to look at → ([id, …], [picture, …]).

        <s> comes first; each text is encoded by itself and without spaces around it, as between the pictures of a
        training row. But what documents.chat_parts gives is framed by a template, and its texts are one text.
        """
        ids = [] if self.tokenizer.bos is None else [self.tokenizer.bos]
        pictures, follows = [], False
        parts = [parts] if isinstance(parts, str) else parts
        chat = bool(parts) and isinstance(parts[0], Special)
        for n, part in enumerate(parts):
            if isinstance(part, Special):
                frame = self.tokenizer.frame(part)
                ids += [] if n == 0 and frame == ids else frame  # <s> stands there already
                continue
            if isinstance(part, str):
                ids += self.tokenizer.encode(part if chat else part.strip(), follows=follows)
            else:
                ids += self.look
                pictures.append(part)
            follows = chat
        return ids, pictures

    def read(self, ids, pictures=(), caches=None):
        """ids (B lists of equal length), PIL pictures → hidden (B, T, D); with caches, after what they hold."""
        weight = self.llama.embed_tokens.weight
        images = self.clip.preprocess(list(pictures)).to(weight) if len(pictures) else weight.new_zeros(0)
        return self.llama.hidden(self.embed(torch.tensor(ids, device=weight.device), images), caches)

    def dream(self, prompts):
        """prompts (each as `prompt` takes it) → (B, Q, D): what the queries become after each of them."""
        read = [self.prompt(parts) for parts in prompts]
        longest = max(len(ids) for ids, _ in read) + len(self.ask)
        if longest > self.llama.config.max_seq_len:
            raise UserError(f"a prompt of {longest - len(self.ask)} tokens leaves no room for a picture in the context")
        # What is filled up on the right comes after the queries, so that they never see it.
        pad = self.tokenizer.special["[PAD]"]
        rows = [ids + self.ask + [pad] * (longest - len(ids) - len(self.ask)) for ids, _ in read]
        hidden = self.read(rows, [picture for _, pictures in read for picture in pictures])  # (B, T, D)
        return hidden[self.spans(torch.tensor(rows, device=hidden.device), "<dream_start>", self.config.queries)]

    @torch.inference_mode()
    def text_to_image(
        self,
        prompts,
        negative=None,
        guidance=7.5,
        steps=50,
        sampler="ddpm",
        seed=None,
        draw=None,
        rescale=0.0,
        progress=False,
    ):
        """prompts, B of them: texts, or lists of texts and PIL pictures → images (B, 3, H, W) in [0, 1].

        negative: what to move away from, one or B; None is the empty prompt. The rest: see LatentDiffusion.generate.
        """
        negative = "" if negative is None else negative
        context = self.condition(self.dream([prompts] if isinstance(prompts, str) else prompts))  # (B, Q, C)
        without = self.condition(self.dream([negative] if isinstance(negative, str) else negative))
        return self.diffusion.generate(
            context, without, guidance, steps, sampler, seed=seed, draw=draw, rescale=rescale, progress=progress
        )

    def forbidden(self):
        """(V,) bool: what is never drawn as text, all ids but the text's own and those that end it."""
        text = (self.tokenizer.pieces.keys() - set(self.tokenizer.special.values())) | self.tokenizer.stops
        forbidden = torch.ones(self.llama.config.vocab_size, dtype=torch.bool, device=self.dream_queries.device)
        forbidden[sorted(text)] = False
        return forbidden

    def generate_document(self, prompt, max_new_tokens=256, max_pictures=4, **options):
        """What `stream_document` yields, as a list: neighbouring texts are one."""
        return joined(self.stream_document(prompt, max_new_tokens, max_pictures, **options))[0]

    @torch.inference_mode()
    def stream_document(
        self,
        prompt,
        max_new_tokens=256,
        max_pictures=4,
        temperature=1.0,
        top_k=None,
        top_p=None,
        guidance=7.5,
        steps=50,
        sampler="ddpm",
        seed=None,
        progress=False,
    ):
        """prompt (as `prompt` takes it) → yields what follows: texts, and PIL pictures where the model wants them.

        It writes until it samples </s>, has sampled max_new_tokens, or fills its context. At a <dream_start> the U-Net
        draws a picture from all that stands before; the model then looks at that picture and goes on. With
        max_pictures=0 it only writes: captions, answers. Returns, as generators do, whether it ended by itself.
        """
        special, capacity = self.tokenizer.special, self.llama.config.max_seq_len
        ids, pictures = self.prompt(prompt)
        if not ids:
            raise UserError("an empty prompt, and this tokenizer has no token that begins a text: give it a text")
        if len(ids) >= capacity:
            raise UserError(f"the prompt's {len(ids)} tokens fill the context of {capacity}: give a shorter one")
        device = self.llama.embed_tokens.weight.device
        chance = torch.Generator(device)
        chance.seed() if seed is None else chance.manual_seed(seed)
        forbidden = self.forbidden()
        span = len(self.ask) + 1 + len(self.look)  # what a picture takes: drawn, then looked at
        without = self.condition(self.dream([""]))  # what guidance leads away from
        caches = self.llama.caches(1, capacity)
        hidden = self.read([ids], pictures, caches)[:, -1]  # (1, D)
        left, drawn, ended = max_new_tokens, 0, None  # at the end: whether by itself

        def words():
            """The ids of the text up to the next picture, or the end."""
            nonlocal hidden, left, ended
            while left and caches[0].length < capacity:
                room = drawn < max_pictures and caches[0].length + span <= capacity
                forbidden[special["<dream_start>"]] = not room
                logits = self.llama.logits(hidden).float().masked_fill(forbidden, float("-inf"))  # (1, V)
                new, left = draw(logits, temperature, top_k, top_p, chance).item(), left - 1
                if new == special["<dream_start>"]:
                    return
                if new in self.tokenizer.stops:
                    ended = True
                    return
                yield new
                hidden = self.read([[new]], (), caches)[:, -1]
            ended = False

        while True:
            yield from self.tokenizer.stream(words())
            if ended is not None:
                return ended
            states = self.read([self.ask], (), caches)[:, 1:]  # (1, Q, D)
            if progress:
                print(file=sys.stderr)  # its bar gets a line of its own, below the text
            picture = self.diffusion.generate(
                self.condition(states),
                without,
                guidance,
                steps,
                sampler,
                seed=None if seed is None else seed + 1000 * drawn,  # far from the next document's
                progress=progress,
            )
            picture, drawn = to_picture(picture[0]), drawn + 1
            yield picture
            hidden = self.read([[special["<dream_end>"], *self.look]], [picture], caches)[:, -1]

    # -- published files --

    def published(self):
        """The weights as the published code writes them: {file: {key: tensor}}."""
        frequencies = {  # computed, not learned; but the files hold them
            f"layers.{n}.self_attn.rotary_emb.inv_freq": rotary_frequencies(
                self.llama.config, self.dream_queries.device
            )
            for n in range(len(self.llama.layers))
        }

        def named(module, prefix):
            return {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}

        return {
            "model.safetensors": to_hf_names(self.llama.state_dict() | frequencies),
            "clip_vision_embedding.bin": named(self.clip, "clip_vision_model") | named(self.projector, "projector"),
            "dream_embedding.bin": {"dream_queries": self.dream_queries},
            "stable_diffusion_head.bin": self.diffusion.state_dict() | named(self.condition, "projector"),
        }

    def save_pretrained(self, path):
        """Writes the published layout, with its parts' configurations and the tokenizer: a folder that is complete."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        self.clip.save_config(path / CLIP_PART)
        self.diffusion.save_configs(path / DIFFUSION_PART)
        self.tokenizer.save_pretrained(path)
        for name, tensors in self.published().items():
            write = checkpoint.write_tensors if name.endswith(".safetensors") else checkpoint.write_bin
            write(path / name, tensors)
        checkpoint.write_text(path / "config.json", json.dumps(dreamllm_to_hf(self), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, path, clip, diffusion, dtype=None, device="cpu", parts=()):
        """A DreamLLM from a run of ours or a published folder; `clip`, `diffusion`: the classes of its parts.

        The configurations of CLIP and Stable Diffusion, which config.json names, are looked for in the folder, beside
        it, and in the folders `parts`. dtype None: as stored.
        """
        folder = checkpoint.resolve(path)
        if folder.is_file():
            raise UserError(f"{folder}: a DreamLLM is a folder of several files, not one")
        file = folder / "config.json"
        saved = checkpoint.read_json(file)
        config, ids, clip_name, diffusion_name = dreamllm_from_hf(saved, file)
        tokenizer = Tokenizer.from_pretrained(folder)
        for name, i in ids.items():
            if tokenizer.special.get(name) != i:
                raise UserError(
                    f"{file}: {name} is {i} here but {tokenizer.special.get(name)} in the tokenizer's files"
                )

        whole = from_hf_names(checkpoint.read_tensors(folder))
        own = {}  # the three files beside; runs that were sharded keep everything in the one file as well
        for name in ("clip_vision_embedding", "dream_embedding", "stable_diffusion_head"):
            inside = {k.removeprefix(f"{name}."): whole.pop(k) for k in list(whole) if k.startswith(f"{name}.")}
            beside = folder / f"{name}.bin"
            own[name] = checkpoint.read_tensors(beside) if beside.exists() or not inside else inside
        projector = taken(own["clip_vision_embedding"], "projector.")
        condition = taken(own["stable_diffusion_head"], "projector.")
        vision = taken(own["clip_vision_embedding"], "clip_vision_model.")
        if own["clip_vision_embedding"]:
            raise UserError(f"{folder}: {next(iter(own['clip_vision_embedding']))} belongs to no part of DreamLLM")

        llama_config = config_from_hf(saved | {"model_type": "llama"}, file)
        llama = LLaMA.from_tensors(whole, folder, dtype, device, llama_config)
        clip = clip.from_tensors(vision, find_part(clip_name, folder, parts), dtype, device)
        head = own["stable_diffusion_head"]
        diffusion = diffusion.from_tensors(head, find_part(diffusion_name, folder, parts), dtype, device)
        model = cls(llama, clip, diffusion, config, tokenizer)
        checkpoint.fill(model.projector, projector, folder / "clip_vision_embedding.bin", dtype, device)
        checkpoint.fill(model.condition, condition, folder / "stable_diffusion_head.bin", dtype, device)
        queries = own["dream_embedding"].get("dream_queries", torch.empty(0))
        if queries.shape != model.dream_queries.shape or not queries.isfinite().all():
            expected = tuple(model.dream_queries.shape)
            raise UserError(f"{folder}: dream_queries is {tuple(queries.shape)}, expected finite numbers of {expected}")
        model.dream_queries = nn.Parameter(queries.to(device, dtype, copy=True))
        for part in (model.clip, model.projector, model.condition, diffusion.unet):  # files may differ in this
            part.to(llama.embed_tokens.weight.dtype)
        return model.eval()


def joined(stream):
    """A generator of texts and pictures → ([piece, …] with neighbouring texts as one, what it returns)."""
    pieces = []
    while True:
        try:
            piece = next(stream)
        except StopIteration as end:
            return pieces, end.value
        if isinstance(piece, str) and pieces and isinstance(pieces[-1], str):
            pieces[-1] += piece
        else:
            pieces.append(piece)


def taken(tensors, prefix):
    """Moves the entries whose names begin with `prefix` out of `tensors`, into a dict of their own without it."""
    return {k.removeprefix(prefix): tensors.pop(k) for k in list(tensors) if k.startswith(prefix)}


def find_part(name, folder, given):
    """The folder of a part that config.json calls `name`: a path, or one of the hub's "owner/name"."""
    places = [folder / name, folder.parent / name, *(Path(g) / n for g in given for n in (name, Path(name).name))]
    found = next((place for place in places if place.is_dir()), None)
    if not found:
        looked = ", ".join(map(str, places))
        raise UserError(f"{folder}: of its part {name} the configuration is not there (looked for {looked})")
    return found


def to_picture(image):
    """(3, H, W) in [0, 1] → a PIL picture."""
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).cpu().numpy())


LOSS_NAMES = {"drop": "drop_prob", "min_snr": "snr_gamma", "noise_offset": "noise_offset"}
LOSS_NAMES |= {"perturbation": "input_perturbation"}  # ours: theirs


def dreamllm_from_hf(saved, path="config.json"):
    """DreamLLM's config.json (a dict) → (DreamLLMConfig, {token: id}, CLIP's and Stable Diffusion's name)."""
    kind = saved.get("model_type") if isinstance(saved, dict) else None
    if kind != "dreamllm":
        raise UserError(f"{path}: model_type is {kind!r}, expected 'dreamllm'")
    try:
        plugins = saved["plugins_init_kwargs"]
        reader, queries, head = (
            plugins[name] for name in ("clip_vision_embedding", "dream_embedding", "stable_diffusion_head")
        )
        if reader.get("select_layer", -2) != -2 or reader.get("use_additional_post_layernorm"):
            raise UserError(f"{path}: only CLIP's features of layer -2, without a norm, are supported")
        fields = {"queries": queries["num_dream_queries"]}
        for ours, plugin in (("projector", reader), ("condition", head)):
            fields[ours] = plugin.get("projector_type", "linear")
            if (depth := plugin.get("projector_depth", 1)) != (2 if fields[ours] == "mlp" else 1):
                raise UserError(f"{path}: a {fields[ours]} projector of depth {depth} is not supported")
        losses = {"w_lm": saved.get("loss_weight_lm"), "w_vm": saved.get("loss_weight_vm")}
        losses |= {ours: head.get(theirs) for ours, theirs in LOSS_NAMES.items()}
        fields |= {name: value for name, value in losses.items() if value is not None}
        tokens = saved.get("special_tokens2ids_dict", {})
        tokens = {k: v for k, v in tokens.items() if k in ADDED} | tokens.get("additional_special_tokens", {})
        names = reader["clip_vision_model_name_or_path"], head["diffusion_name_or_path"]
        if not all(isinstance(name, str) and name for name in names):
            raise UserError(f"{path}: does not name its CLIP and its Stable Diffusion")
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not the configuration of a DreamLLM ({error!r})") from None
    return settings.build(DreamLLMConfig, fields, str(path)), tokens, *names


def dreamllm_to_hf(model):
    c, width = model.config, model.llama.config.dim

    def plugin(name, rest):
        return {"_target_": f"omni.models.dreamllm.modeling_plugins.{name}", "embed_hidden_size": width} | rest

    def projector(kind):
        return {"projector_type": kind, "projector_depth": 2 if kind == "mlp" else 1, "freeze_projector": False}

    reader = {"clip_vision_model_name_or_path": CLIP_PART, "select_layer": -2, "use_additional_post_layernorm": False}
    reader |= {"freeze_clip_vision_model": True, "freeze_embedding_layers": True} | projector(c.projector)
    head = {"diffusion_name_or_path": DIFFUSION_PART, "freeze_unet": True, "freeze_vae": True, "resolution": model.side}
    head |= projector(c.condition) | {theirs: getattr(c, ours) for ours, theirs in LOSS_NAMES.items()}
    queries = {"num_dream_queries": c.queries, "freeze_dream_queries": False}
    kinds = {"clip_vision_embedding": "embedding", "dream_embedding": "embedding", "stable_diffusion_head": "head"}
    ids = {name: model.tokenizer.special[name] for name in ADDED}
    tokens = {"[PAD]": ids.pop("[PAD]"), "additional_special_tokens": ids}
    return (
        config_to_hf(model.llama.config, model.tokenizer)
        | {"pad_token_id": tokens["[PAD]"]}
        | {
            "architectures": ["DreamLLMForCausalMLM"],
            "model_type": "dreamllm",
            "loss_weight_lm": c.w_lm,
            "loss_weight_vm": c.w_vm,
            "loss_scale_schedule": "none",
            "plugins_type": kinds,
            "plugins_init_kwargs": {
                "clip_vision_embedding": plugin("CLIPVisionEmbedding", reader),
                "dream_embedding": plugin("DreamEmbedding", queries),
                "stable_diffusion_head": plugin("StableDiffusionHead", head),
            },
            "special_tokens2ids_dict": tokens,
            "torch_dtype": str(model.dream_queries.dtype).removeprefix("torch."),
        }
    )
