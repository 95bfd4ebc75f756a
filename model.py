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
import re
import typing
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import EinopsError, rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from support import checkpoint, settings
from support.settings import UserError

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
            new = sample_token(logits, temperature, top_k, top_p, generator)  # (B, 1)
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
        path = checkpoint.weights_folder(path)
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
            checkpoint.check_tensors(tensors, model, path)
            return fill_int8(model, tensors).to(device).eval()
        return checkpoint.load_into(model, tensors, path, dtype, device).eval()

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


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
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
