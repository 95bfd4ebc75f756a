"""LLaMA: a decoder-only transformer. In LVM it continues sentences of image codes.

    tokens (B, T) ─ embed_tokens ─▶ (B, T, D)
      n_layers × [ x + attention(norm(x)) ;  x + mlp(norm(x)) ]          residual stream (B, T, D)
    ─ norm ─ lm_head ─▶ logits (B, T, V): at each position, a score for every possible next token

Differences from the 2017 transformer: RMSNorm before each part (Zhang & Sennrich 2019), rotary
position embedding of queries and keys (Su et al. 2021, eq. 34), a gated MLP, SwiGLU (Shazeer 2020),
no biases, and optionally fewer key/value heads than query heads (Ainslie et al. 2023). LLaMA is of
Touvron et al. 2023. LVM (Bai et al. 2023) is this model unchanged, over 8192 image codes and 100
spare ids.

Generation repeats one step: the logits of the last position, divided by a temperature and cut to
the likeliest ids (top-k; or top-p, the nucleus of Holtzman et al. 2020), give the probabilities
from which the next id is sampled. The keys and values of earlier tokens stay in a cache, so that
each token passes through the model once:

    prompt (B, T) ─▶ hidden ─▶ logits (B, V) ─ sample_token ─▶ id (B, 1) ─┐
                       ▲ caches: keys and values (B, G, L, A) a layer     │
                       └──────────────────────────────────────────────────┘

    symbol  B batch   T tokens   L tokens so far   D dim   V vocab_size
            H n_heads   G n_kv_heads   A head_dim   F hidden_dim

The modules have the names in Hugging Face's files: a checkpoint's keys can be read beside the code.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from published import llama
from support import checkpoint, settings
from support.settings import UserError

# ---- configuration ---------------------------------------------------------------------------


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the rotary wavelengths beyond the context it was first trained on.

    With an original context of 0 every wavelength is stretched: the older "linear" scaling.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0  # a pair that turns fewer times than this in the original context is slowed …
    high_freq_factor: float = 4.0  # … by `factor`; one that turns more often than this stays as it is
    original_max_position_embeddings: int = 8192

    def __post_init__(self):
        settings.above(self, 0, "factor")
        settings.at_least(self, 0, "low_freq_factor", "original_max_position_embeddings")
        settings.above(self, self.low_freq_factor, "high_freq_factor")


@dataclass(frozen=True)
class LLaMAConfig:
    """Shape of a LLaMA. n_kv_heads 0 means n_heads; head_dim 0 means dim / n_heads."""

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
        settings.within(self, 1, 1000, "n_layers")
        settings.within(self, 1, 2**20, "dim", "n_heads", "hidden_dim")
        settings.within(self, 0, 2**20, "n_kv_heads", "head_dim")
        settings.within(self, 1, 2**24, "vocab_size")
        settings.at_least(self, 1, "max_seq_len")
        settings.above(self, 0, "norm_eps", "rope_theta")
        settings.within(self, 0, 1e12, "norm_eps", "rope_theta")
        if not self.head_dim and self.dim % self.n_heads:
            raise ValueError(f"n_heads {self.n_heads} does not divide dim {self.dim}")
        # frozen, but the zeros stand for values that follow from the others
        object.__setattr__(self, "n_kv_heads", self.n_kv_heads or self.n_heads)
        object.__setattr__(self, "head_dim", self.head_dim or self.dim // self.n_heads)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads {self.n_kv_heads} does not divide n_heads {self.n_heads}")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even (rotary pairs)")

    @classmethod
    def named(cls, name):
        """A published size, e.g. "lvm_7b", "llama2_13b", "llama3_8b"."""
        if name not in SIZES:
            raise UserError(f'no LLaMA size "{name}"; there are {", ".join(SIZES)}')
        return settings.build(cls, SIZES[name])


def _shape(dim, n_layers, n_heads, hidden_dim):
    return {"dim": dim, "n_layers": n_layers, "n_heads": n_heads, "hidden_dim": hidden_dim}


_LLAMA2 = {"vocab_size": 32000, "norm_eps": 1e-5}
_LLAMA3 = {"vocab_size": 128256, "max_seq_len": 8192, "norm_eps": 1e-5, "rope_theta": 500000.0, "n_kv_heads": 8}
SIZES = {
    "lvm_100m": _shape(640, 22, 10, 1664),
    "lvm_300m": _shape(1024, 22, 8, 2688),
    "lvm_600m": _shape(1536, 22, 16, 4096),
    "lvm_1b": _shape(2048, 22, 16, 5504),
    "lvm_3b": _shape(3200, 26, 32, 8640),
    "lvm_7b": _shape(4096, 32, 32, 11008),
    "lvm_13b": _shape(5120, 40, 40, 13824),
    "lvm_20b": _shape(6144, 46, 48, 16128),
    "lvm_30b": _shape(6656, 60, 52, 17920),
    "llama2_7b": _shape(4096, 32, 32, 11008) | _LLAMA2,
    "llama2_13b": _shape(5120, 40, 40, 13824) | _LLAMA2,
    "llama2_70b": _shape(8192, 80, 64, 28672) | _LLAMA2 | {"n_kv_heads": 8},
    "llama3_8b": _shape(4096, 32, 32, 14336) | _LLAMA3,
    "llama31_8b": _shape(4096, 32, 32, 14336) | _LLAMA3 | {"max_seq_len": 131072, "rope_scaling": {"factor": 8.0}},
    "smollm2_135m": _shape(576, 30, 9, 1536)
    | {"vocab_size": 49152, "max_seq_len": 8192, "norm_eps": 1e-5, "rope_theta": 1e5, "n_kv_heads": 3}
    | {"tie_embeddings": True},
    "vicuna_7b": _shape(4096, 32, 32, 11008) | {"vocab_size": 32000, "max_seq_len": 2048},
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
    """positions (T,) → cos, sin (T, A/2) in float32: pair i turns by position · theta^(-2i/A).

    bfloat16 has 8 significant bits: above 256 it skips whole numbers, and of 4096 positions only 769 are distinct.
    """
    angles = positions.float()[:, None] * rotary_frequencies(config, positions.device)  # (T, A/2)
    return angles.cos(), angles.sin()


def rotary_frequencies(config, device=None):
    """(A/2,) float32: by how much each pair turns from one position to the next."""
    i = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    frequency = config.rope_theta ** (-i / config.head_dim)  # (A/2,)
    if s := config.rope_scaling:
        # Wavelengths well inside the original context stay, those beyond it are stretched by
        # `factor`, and between the two the frequency goes over smoothly.
        turns = s.original_max_position_embeddings * frequency / (2 * torch.pi)
        keep = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
        frequency = frequency * (keep + (1 - keep) / s.factor)
    return frequency


def rotate(x, angles):
    """Turns the pairs (x_i, x_{i+A/2}) of x (B, heads, T, A).

    So Hugging Face's files have them. Meta's pair neighbours: published/llama.py reorders rows of q and k.
    """
    cos, sin = angles
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.q_proj = nn.Linear(c.dim, c.n_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.n_heads * c.head_dim, c.dim, bias=False)

    def forward(self, x, angles, cache=None, visible=None):
        """x (B, T, D) → (B, T, D); with a cache, x attends to earlier tokens too: visible (T, L)."""
        split = "b t (h e) -> b h t e"
        q = rotate(rearrange(self.q_proj(x), split, e=self.config.head_dim), angles)  # (B, H, T, A)
        k = rotate(rearrange(self.k_proj(x), split, e=self.config.head_dim), angles)  # (B, G, T, A)
        v = rearrange(self.v_proj(x), split, e=self.config.head_dim)  # (B, G, T, A)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, G, L, A)
        gqa = self.config.n_kv_heads != self.config.n_heads  # each key/value head serves H/G query heads
        if visible is None:
            h = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        else:
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

    def forward(self, x, angles, cache=None, visible=None):
        x = x + self.self_attn(self.input_layernorm(x), angles, cache, visible)
        return x + self.mlp(self.post_attention_layernorm(x))


class LayerCache:
    """The keys and values of one layer, (B, G, max_tokens, A) each, allocated before the first token."""

    def __init__(self, batch, max_tokens, config, like):
        shape = (batch, config.n_kv_heads, max_tokens, config.head_dim)
        self.k = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.v = torch.empty_like(self.k)
        self.length = 0

    def repeat(self, times):
        """Each row of the batch becomes `times` rows."""
        self.k = self.k.repeat_interleave(times, dim=0)
        self.v = self.v.repeat_interleave(times, dim=0)

    def append(self, k, v):
        """New keys and values (B, G, T, A) → all so far (B, G, L, A)."""
        start, end = self.length, self.length + k.shape[2]
        self.k[:, :, start:end], self.v[:, :, start:end] = k, v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


# ---- the model -------------------------------------------------------------------------------

INITIAL_STD = 0.02  # of every matrix


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
            if weight.ndim == 2 and not weight.is_meta:  # whose values will come from a file
                nn.init.normal_(weight, 0, INITIAL_STD)

    def forward(self, tokens):
        return self.logits(self.hidden(self.embed_tokens(tokens)))

    def hidden(self, embeddings, caches=None):
        """embeddings (B, T, D) → the final hidden states, after the last norm (B, T, D).

        With `caches` (one LayerCache a layer), `embeddings` continue what the caches hold.
        """
        x = embeddings
        start = caches[0].length if caches else 0
        end = start + x.shape[1]
        positions = torch.arange(start, end, device=x.device)
        angles = rotary_angles(positions, self.config)
        if caches:
            # (T, L): the token at position p attends to keys 0 … p. is_causal would not do: it lets query i see
            # keys 0 … i, but with a cache, query i stands at position start + i
            visible = torch.arange(end, device=x.device) <= positions[:, None]
        for n, layer in enumerate(self.layers):
            if caches:
                x = layer(x, angles, caches[n], visible)
            elif self.activation_checkpointing and self.training:
                x = recompute(layer, x, angles, use_reentrant=False)
            else:
                x = layer(x, angles)
        return self.norm(x)

    def logits(self, hidden):
        """(B, T, D) → (B, T, V); a tied head reuses the embedding."""
        return self.lm_head(hidden) if hasattr(self, "lm_head") else F.linear(hidden, self.embed_tokens.weight)

    @torch.no_grad()
    def resize(self, vocab_size):
        """Grows the vocabulary: the new rows of embedding and head start as N(0, 0.02)."""
        new = max(0, vocab_size - self.config.vocab_size)
        tied = self.config.tie_embeddings
        for layer in (self.embed_tokens,) if tied else (self.embed_tokens, self.lm_head):
            rows = torch.randn(new, self.config.dim).to(layer.weight) * INITIAL_STD
            layer.weight = nn.Parameter(torch.cat((layer.weight, rows)))
        self.config = dataclasses.replace(self.config, vocab_size=self.config.vocab_size + new)

    def caches(self, batch, max_tokens):
        return [LayerCache(batch, max_tokens, self.config, self.embed_tokens.weight) for _ in self.layers]

    def generate(self, tokens, max_new_tokens, temperature=1.0, samples=1, **options):
        """tokens (B, T) → (B·samples, T + new): the prompts and what follows; options: stream's."""
        new = self.stream(tokens, max_new_tokens, temperature, samples=samples, **options)
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
        """tokens (B, T) → yields (B·samples, 1) at a time: ids sampled from the predictions.

        temperature 0 takes the likeliest id; `top_k` and `top_p`: see sample_token. `allowed` (a
        list or tensor of ids) forbids all others. A row that has sampled `eos` repeats it, and
        generation ends early when every row has. The `samples` of one prompt are adjacent rows; the
        prompt is read once.
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
            if i == 0 and samples > 1:  # the prompt has been read: from here on, the samples differ
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
        """A LLaMA from a run of ours, a Hugging Face folder, or Meta's (params.json and .pth).

        dtype: a torch.dtype; None: as stored; "int8": every matrix of the layers and the head in 8
        bits, the rest as stored (Int8Linear). `path` may also be a weight file in such a folder.
        """
        checkpoint.expect(path, "a LLaMA")
        path = checkpoint.weights_folder(path)
        fields, tensors = llama.read(path)
        return cls.from_tensors(tensors, path, dtype, device, settings.build(LLaMAConfig, fields))

    @classmethod
    def from_tensors(cls, tensors, path, dtype, device, config):
        """The same from {our name: tensor}; errors say that the tensors are from `path`."""
        if config.tie_embeddings:
            tensors.pop("lm_head.weight", None)  # some files hold the tied weight twice
        if dtype != "int8":
            return checkpoint.load(cls, config, tensors, path, dtype, device)
        with torch.device("meta"):
            model = cls(config)
        checkpoint.check_tensors(tensors, model, path)
        return fill_int8(model, tensors).to(device).eval()

    def save_pretrained(self, path):
        """Writes transformers' files of a LlamaForCausalLM, and those of `tokenizer`, if set."""
        if any(isinstance(module, Int8Linear) for module in self.modules()):
            raise UserError("a model in int8 is for inference: its rounded weights are not saved")
        dtype = checkpoint.dtype_name(self.embed_tokens.weight)
        config = llama.config_to_hf(self.config, self.tokenizer) | {"torch_dtype": dtype}
        checkpoint.write_json(Path(path) / "config.json", config)
        checkpoint.write_tensors(Path(path) / "model.safetensors", llama.to_hf_names(self.state_dict()))
        if self.tokenizer:
            self.tokenizer.save_pretrained(path)


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """logits (B, V) → ids (B, 1), sampled after temperature, top-k and nucleus (top-p) filtering."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the greatest stays 0, however cold it is
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
    """A bias-free Linear with a matrix (out, in) of integers: row r ≈ scale[r] · weight[r].

    |weight| ≤ 127. Half of bfloat16's memory, a rounding error of at most 1/254 of a row's largest
    entry, and no training. The matrix is unpacked to the dtype of x as it is used.
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
