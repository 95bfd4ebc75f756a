"""LLaMA: a decoder-only transformer, which for LVM continues sentences of image codes.

    tokens (B, T) ─ embed_tokens ─▶ (B, T, D)
      n_layers × [ x + attention(norm(x)) ;  x + mlp(norm(x)) ]          residual stream (B, T, D)
    ─ norm ─ lm_head ─▶ logits (B, T, V): at each position, a score for every possible next token

Differences from the 2017 transformer: RMSNorm before each part (Zhang & Sennrich 2019), rotary position
embedding of queries and keys (Su et al. 2021, eq. 34), a gated MLP, SwiGLU (Shazeer 2020), no biases,
and optionally fewer key/value heads than query heads (Ainslie et al. 2023). LLaMA: Touvron et al. 2023.
LVM (Bai et al. 2023) is this model unchanged, over 8192 image codes + 100 spare ids.

Modules bear the names of the Hugging Face files, so a checkpoint's keys can be read beside the code.

    symbol  B batch   T tokens   D dim   V vocab_size   H n_heads   K n_kv_heads   E head_dim   F hidden_dim

Read before: vqgan.py. Read next: train.py, then sample.py.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

import checkpoint
from settings import UserError

# ---- configuration ---------------------------------------------------------------------------


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the rotary wavelengths beyond the context it was first trained on."""

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
        if not self.head_dim and self.dim % self.n_heads:
            raise ValueError(f"n_heads {self.n_heads} does not divide dim {self.dim}")
        # frozen, but the zeros stand for values that follow from the others
        object.__setattr__(self, "n_kv_heads", self.n_kv_heads or self.n_heads)
        object.__setattr__(self, "head_dim", self.head_dim or self.dim // self.n_heads)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads {self.n_kv_heads} does not divide n_heads {self.n_heads}")
        if self.head_dim % 2:
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
    i = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    frequency = config.rope_theta ** (-i / config.head_dim)  # (E/2,)
    if s := config.rope_scaling:
        # Wavelengths well inside the original context stay, those beyond it are stretched by `factor`,
        # and between the two the frequency goes over smoothly.
        turns = s.original_max_position_embeddings * frequency / (2 * torch.pi)
        keep = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
        frequency = frequency * (keep + (1 - keep) / s.factor)
    angles = positions.float()[:, None] * frequency  # (T, E/2)
    return angles.cos(), angles.sin()


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

    def caches(self, batch, max_tokens):
        weight = self.layers[0].self_attn.k_proj.weight
        return [LayerCache(batch, max_tokens, self.config, weight) for _ in self.layers]

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
        """A LLaMA from a run of ours or a Hugging Face folder; `dtype` None: as stored."""
        path = checkpoint.resolve(path)
        config = config_from_hf(checkpoint.read_json(path / "config.json"), path / "config.json")
        tensors = checkpoint.read_tensors(path)
        tensors = {k.removeprefix("model."): v for k, v in tensors.items() if not k.endswith("rotary_emb.inv_freq")}
        if config.tie_embeddings:
            tensors.pop("lm_head.weight", None)
        with torch.device("meta"):
            model = cls(config)
        return checkpoint.fill(model, tensors, path, dtype, device).eval()

    def save_pretrained(self, path):
        """Writes config.json and model.safetensors as transformers' LlamaForCausalLM has them."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        dtype = str(self.embed_tokens.weight.dtype).removeprefix("torch.")
        config = config_to_hf(self.config) | {"torch_dtype": dtype}
        checkpoint.write_text(path / "config.json", json.dumps(config, indent=2) + "\n")
        weights = {(k if k.startswith("lm_head") else f"model.{k}"): v for k, v in self.state_dict().items()}
        checkpoint.write_tensors(path / "model.safetensors", weights)


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


# ---- config.json of Hugging Face folders -----------------------------------------------------

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
    if saved.get("model_type") != "llama":
        raise UserError(f"{path}: model_type is {saved.get('model_type')!r}, expected 'llama'")
    # transformers 5 moved what concerns rotary embedding into one table
    rope = saved.get("rope_parameters") or saved.get("rope_scaling") or {}
    saved = saved | ({"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {})
    fields = {ours: saved[theirs] for ours, theirs in HF_NAMES.items() if saved.get(theirs) is not None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "llama3":
        fields["rope_scaling"] = RopeScaling(**{f.name: rope[f.name] for f in dataclasses.fields(RopeScaling)})
    elif kind != "default":
        raise UserError(f"{path}: rope type {kind!r} is not supported (default and llama3 are)")
    try:
        return LLaMAConfig(**fields)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def config_to_hf(config):
    saved = {theirs: getattr(config, ours) for ours, theirs in HF_NAMES.items()}
    if config.rope_scaling:
        saved["rope_scaling"] = {"rope_type": "llama3"} | dataclasses.asdict(config.rope_scaling)
    fixed = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "initializer_range": 0.02}
    ends = {"bos_token_id": None, "eos_token_id": None}  # no id of an LVM means "stop"
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | saved | fixed | ends
