"""Latent diffusion: pictures out of noise in small steps, steered by text. SD 1, 2 and XL.

An autoencoder compresses a picture to a grid of latents, 8 times smaller each way. Training adds
noise to the latents, as much as a random time t says, and a U-Net learns to predict it. Sampling
starts from pure noise: it predicts the noise, removes a little of it, and repeats. The U-Net sees
the prompt through cross-attention. Its loss is a plain squared error.

    image (B, 3, H, W) in [-1, 1] ── AutoencoderKL.encode · scaling_factor ──▶ x0 (B, 4, H/8, W/8)
                                                                                │ add_noise(x0, noise, t)
    prompt ── text encoder ──▶ context (B, 77, D) ──┐                           ▼
    t (B,) ── sin, cos, MLP ──▶ (B, 4·width) ───────┴──▶ UNet ──▶ prediction of noise, v or x0, the shape of x0

    sampling:  noise ── sampler: UNet at each of n falling t ──▶ x0 ── / scaling_factor · decode ──▶ image

    symbol  B batch   C channels   x0 clean latents   ε noise   T number of times   M tokens of the context
            D its width   P width of the pooled text   ᾱ alphas_cumprod   α = √ᾱ   σ = √(1-ᾱ)
            x_t = α·x0 + σ·ε   v = α·ε - σ·x0   SNR = α²/σ²   λ = log(α/σ)   σ' = σ/α

Papers: latent diffusion, Rombach et al. 2022; SDXL, Podell et al. 2023; DDPM, Ho et al. 2020;
v-prediction, Salimans & Ho 2022; guidance, Ho & Salimans 2022. Each sampler names its own. Modules
bear the names of the diffusers files, so that a checkpoint's keys can be read beside the code;
published/stable_diffusion.py renames those of single files.

A text encoder has `.tokenize(texts) → (B, 77) int64`, `.hidden(tokens, layer=-1 | -2,
final_norm=True) → (B, 77, D)` and `.pooled(tokens) → (B, P)`. To be saved, it also has what
clip.CLIP has: `.save_pretrained(folder)`, `.tokenizer`, `.config.text.context_length`.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

from published import stable_diffusion as published
from support import checkpoint, settings
from support.settings import UserError

# ---- configuration ---------------------------------------------------------------------------


@dataclass(frozen=True)
class UNetConfig:
    """Shape of a U-Net, SD 1.5's by default. Tuples: one entry per level, largest grid first."""

    in_channels: int = 4
    out_channels: int = 4
    sample_size: int = 64  # side of the latents it was trained on; others work too
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)  # width of each level
    layers_per_block: int = 2
    depth: tuple[int, ...] = (1, 1, 1, 0)  # transformer blocks after each residual block
    mid_depth: int = 1  # … and in the middle
    heads: tuple[int, ...] = (8, 8, 8, 8)
    cross_attention_dim: int = 768
    use_linear_projection: bool = False  # in SpatialTransformer; else 1×1 convolutions
    norm_num_groups: int = 32
    # SDXL's second conditioning, one vector a picture: pooled text beside six numbers about its
    # size, each of which becomes `addition_time_embed_dim` sines and cosines. 0: none
    addition_time_embed_dim: int = 0
    projection_class_embeddings_input_dim: int = 0  # pooled text + 6 · addition_time_embed_dim
    upcast_attention: bool = False  # for diffusers only: our attention sums in float32

    def __post_init__(self):
        check_levels(self)
        settings.within(self, 1, 2**16, "in_channels", "out_channels", "sample_size", "heads", "cross_attention_dim")
        settings.within(self, 0, 100, "depth")
        settings.within(self, 1, 100, "mid_depth")
        settings.within(self, 0, 2**16, "addition_time_embed_dim", "projection_class_embeddings_input_dim")
        levels = len(self.block_out_channels)
        for name in ("depth", "heads"):
            if len(getattr(self, name)) != levels:
                raise ValueError(f"{name} must have {levels} entries, as block_out_channels has")
        for width, heads in zip(self.block_out_channels, self.heads, strict=True):
            if width % heads:
                raise ValueError(f"heads {heads} must divide width {width}, an entry of block_out_channels")
        if self.depth[-1] not in (0, self.mid_depth):
            raise ValueError(f"mid_depth {self.mid_depth} must be the last level's depth {self.depth[-1]}")
        if self.block_out_channels[0] % 2 or self.addition_time_embed_dim % 2:
            raise ValueError("block_out_channels[0] and addition_time_embed_dim must be even: half sines, half cosines")
        added, pooled_and_added = self.addition_time_embed_dim, self.projection_class_embeddings_input_dim
        if bool(added) != bool(pooled_and_added) or (added and pooled_and_added <= 6 * added):
            raise ValueError(
                "addition_time_embed_dim and projection_class_embeddings_input_dim must both be 0, "
                "or the second more than 6 times the first"
            )

    @classmethod
    def named(cls, name):
        """The published shape of that name: sd15, sd21 or sdxl."""
        return cls(**published.size(published.UNETS, name))


def check_levels(config):
    """The bounds that both networks' configurations share."""
    if not 1 <= len(config.block_out_channels) <= 10:
        raise ValueError(f"block_out_channels must have 1 to 10 entries, not {len(config.block_out_channels)}")
    settings.within(config, 1, 2**16, "block_out_channels", "norm_num_groups")
    settings.within(config, 1, 100, "layers_per_block")
    for width in config.block_out_channels:
        if width % config.norm_num_groups:
            raise ValueError(
                f"norm_num_groups {config.norm_num_groups} must divide width {width}, an entry of block_out_channels"
            )


@dataclass(frozen=True)
class AutoencoderKLConfig:
    """Shape of an autoencoder, SD 1's and 2's by default. The fields are vae/config.json's."""

    in_channels: int = 3
    out_channels: int = 3
    sample_size: int = 512
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215  # 1 / standard deviation of the latents

    def __post_init__(self):
        check_levels(self)
        settings.within(self, 1, 2**16, "sample_size", "latent_channels")
        settings.within(self, 1e-6, 1e6, "scaling_factor")
        if (self.in_channels, self.out_channels) != (3, 3):
            raise ValueError("in_channels and out_channels must be 3: pictures are RGB")

    @property
    def factor(self):
        """Pixels per latent, along one side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def named(cls, name):
        """The published shape of that name: sd (1 and 2) or sdxl."""
        return cls(**published.size(published.VAES, name))


# ---- blocks both networks are made of --------------------------------------------------------


class ResBlock(nn.Module):
    """(B, i, h, w) → (B, o, h, w): x + conv(silu(norm(conv(silu(norm(x))) + time embedding)))."""

    def __init__(self, i, o, groups, eps, time_width=0):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, i, eps), nn.Conv2d(i, o, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, o, eps), nn.Conv2d(o, o, 3, padding=1)
        if time_width:
            self.time_emb_proj = nn.Linear(time_width, o)
        if i != o:
            self.conv_shortcut = nn.Conv2d(i, o, 1)

    def forward(self, x, emb=None):
        h = self.conv1(F.silu(self.norm1(x)))
        if emb is not None:
            h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]  # one number a channel
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nn.Module):
    """Tokens x (B, N, D) attend to each other, or to a context (B, M, D') → (B, N, D)."""

    def __init__(self, width, heads, context_width=0, bias=False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias)
        self.to_k, self.to_v = (nn.Linear(context_width or width, width, bias) for _ in range(2))
        self.to_out = nn.Sequential(nn.Linear(width, width))  # published as a list of one

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (rearrange(y, "b n (h e) -> b h n e", h=self.heads) for y in (q, k, v))
        return self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n e -> b n (h e)"))


class PixelAttention(Attention):
    """The autoencoder's only attention: every position of (B, D, h, w) attends to all, one head."""

    def __init__(self, width, groups):
        super().__init__(width, 1, bias=True)
        self.group_norm = nn.GroupNorm(groups, width, eps=1e-6)

    def forward(self, x, context=None):
        h = super().forward(rearrange(self.group_norm(x), "b d h w -> b (h w) d"))
        return x + rearrange(h, "b (h w) d -> b d h w", h=x.shape[2])


class GEGLU(nn.Module):
    """A gated layer (Shazeer 2020): half of the projection, through gelu, gates the other half."""

    def __init__(self, i, o):
        super().__init__()
        self.proj = nn.Linear(i, 2 * o)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Tokens x (B, N, D): self-attention, then to the prompt (B, M, D'), an MLP → (B, N, D)."""

    def __init__(self, width, heads, context_width):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.attn2 = nn.LayerNorm(width), Attention(width, heads, context_width)
        self.norm3 = nn.LayerNorm(width)
        gated, dropout, out = GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)
        self.ff = nn.ModuleDict({"net": nn.Sequential(gated, dropout, out)})

    def forward(self, x, context):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff["net"](self.norm3(x))


class SpatialTransformer(nn.Module):
    """(B, D, h, w) and a context (B, M, D') → (B, D, h, w); the positions are h·w tokens within."""

    def __init__(self, width, heads, depth, config):
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_num_groups, width, eps=1e-6)
        project = nn.Linear if config.use_linear_projection else functools.partial(nn.Conv2d, kernel_size=1)
        self.proj_in, self.proj_out = project(width, width), project(width, width)
        blocks = [TransformerBlock(width, heads, config.cross_attention_dim) for _ in range(depth)]
        self.transformer_blocks = nn.ModuleList(blocks)

    def forward(self, x, context):
        h = rearrange(self.norm(x), "b d h w -> b (h w) d")
        h = positionwise(self.proj_in, h)
        for block in self.transformer_blocks:
            h = block(h, context)
        h = positionwise(self.proj_out, h)
        return x + rearrange(h, "b (h w) d -> b d h w", h=x.shape[2])


def positionwise(layer, tokens):
    """A linear layer, or a 1×1 convolution, which is one: its weight (D, D, 1, 1) is flattened."""
    return F.linear(tokens, layer.weight.flatten(1), layer.bias)


class Downsample(nn.Module):
    """(B, D, h, w) → (B, D, h/2, w/2)."""

    def __init__(self, width, padding):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=padding)

    def forward(self, x):
        if self.conv.padding == (0, 0):
            x = F.pad(x, (0, 1, 0, 1))  # the autoencoder's: only right and below
        return self.conv(x)


class Upsample(nn.Module):
    """(B, D, h, w) → (B, D, *size), size the height and width that are wanted."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x, size):
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Level(nn.Module):
    """One resolution: residual blocks, an attention after each (or none), the way to the next."""

    def __init__(self, resnets, attentions=(), down=None, up=None):
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(resnets), nn.ModuleList(attentions)
        if down:
            self.downsamplers = nn.ModuleList([down])  # published as a list of one
        if up:
            self.upsamplers = nn.ModuleList([up])

    def forward(self, x, n, emb=None, context=None):
        """Residual block n and its attention: x (B, i, h, w), context (B, M, D') → (B, o, h, w)."""
        x = self.resnets[n](x, emb)
        return self.attentions[n](x, context) if n < len(self.attentions) else x

    def forward_all(self, x):
        """All of them, for the autoencoder, which has no time and no text."""
        for n in range(len(self.resnets)):
            x = self(x, n)
        return x


# ---- the U-Net -------------------------------------------------------------------------------


def sinusoids(t, dim):
    """t (B,) → (B, dim) float32: cosines, then sines, of wavelengths 2π to 2π·10000."""
    half = dim // 2
    frequency = torch.exp(-math.log(10000) / half * torch.arange(half, device=t.device, dtype=torch.float32))
    angles = t.float()[:, None] * frequency  # (B, dim/2)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class VectorMLP(nn.Module):
    """(B, i) → (B, o)."""

    def __init__(self, i, o):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(i, o), nn.Linear(o, o)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


class UNet(nn.Module):
    """(noisy latents, time, context) → what the schedule calls the prediction: ε, v or x0.

    It goes down to smaller and wider grids, then up again. Each residual block on the way up also
    gets the output of its counterpart on the way down: the skips.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # saves memory: see maybe_recompute
        widths, layers = config.block_out_channels, config.layers_per_block
        last, time_width, eps = len(widths) - 1, 4 * widths[0], 1e-5

        def resnet(i, o):
            return ResBlock(i, o, config.norm_num_groups, eps, time_width)

        def attentions(level, count):
            heads, depth = config.heads[level], config.depth[level]
            count = count if depth else 0
            return [SpatialTransformer(widths[level], heads, depth, config) for _ in range(count)]

        self.time_embedding = VectorMLP(widths[0], time_width)
        if config.addition_time_embed_dim:
            self.add_embedding = VectorMLP(config.projection_class_embeddings_input_dim, time_width)
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)

        before, skips = widths[0], [widths[0]]  # width of the block before, widths of the skips
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            resnets = [resnet(before if k == 0 else width, width) for k in range(layers)]
            down = Downsample(width, padding=1) if level < last else None
            self.down_blocks.append(Level(resnets, attentions(level, layers), down))
            before = width
            skips += [width] * (layers + (level < last))

        resnets = [resnet(before, before) for _ in range(2)]
        self.mid_block = Level(resnets, [SpatialTransformer(before, config.heads[last], config.mid_depth, config)])

        self.up_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            resnets = [resnet((before if k == 0 else width) + skips.pop(), width) for k in range(layers + 1)]
            attention = attentions(level, layers + 1)
            self.up_blocks.append(Level(resnets, attention, up=Upsample(width) if level > 0 else None))
            before = width
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, before, eps)
        self.conv_out = nn.Conv2d(before, config.out_channels, 3, padding=1)

        # As in the published training code, all residual branches and the prediction start at zero.
        for module in self.modules():
            for name in ("conv2", "proj_out", "conv_out"):
                if hasattr(module, name):
                    nn.init.zeros_(getattr(module, name).weight)
                    nn.init.zeros_(getattr(module, name).bias)

    def forward(self, latents, t, context, text_embeds=None, time_ids=None):
        """latents (B, C, h, w), t a number or (B,), context (B, M, D) → prediction (B, C, h, w).

        SDXL: text_embeds (B, P), the pooled prompt, and time_ids (B, 6): height and width of the
        original picture, top and left of the crop, height and width wanted.
        """
        emb = self.embed(torch.as_tensor(t, device=latents.device).expand(len(latents)), text_embeds, time_ids)
        emb = emb.to(latents.dtype)
        x = self.conv_in(latents)
        skips = [x]
        for level in self.down_blocks:
            for n in range(len(level.resnets)):
                x = self.maybe_recompute(level, x, n, emb, context)
                skips.append(x)
            if hasattr(level, "downsamplers"):
                x = level.downsamplers[0](x)
                skips.append(x)
        for n in range(2):
            x = self.maybe_recompute(self.mid_block, x, n, emb, context)
        for level in self.up_blocks:
            for n in range(len(level.resnets)):
                x = self.maybe_recompute(level, torch.cat((x, skips.pop()), dim=1), n, emb, context)
            if hasattr(level, "upsamplers"):
                x = level.upsamplers[0](x, skips[-1].shape[2:])
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def embed(self, t, text_embeds, time_ids):
        """t (B,), and SDXL's text_embeds (B, P), time_ids (B, 6) → time embedding (B, 4·width)."""
        dtype = self.time_embedding.linear_1.weight.dtype
        emb = self.time_embedding(sinusoids(t, self.config.block_out_channels[0]).to(dtype))
        if self.config.addition_time_embed_dim:
            if text_embeds is None or time_ids is None:
                raise UserError("this U-Net (SDXL) also needs text_embeds and time_ids")
            sizes = sinusoids(time_ids.flatten(), self.config.addition_time_embed_dim)  # (B·6, dim)
            sizes = sizes.view(len(time_ids), -1)  # (B, 6·dim)
            emb = emb + self.add_embedding(torch.cat((text_embeds, sizes.to(dtype)), dim=-1))
        return emb

    def maybe_recompute(self, level, *inputs):
        # Recomputes a block in the backward pass; in eval mode too, for the gradient may have to
        # pass through a U-Net that is itself frozen.
        if self.activation_checkpointing and torch.is_grad_enabled():
            return recompute(level, *inputs, use_reentrant=False)
        return level(*inputs)

    # -- published files --

    @classmethod
    def from_pretrained(cls, path, dtype=None, device="cpu", config=None, variant=None):
        """A U-Net from a diffusers folder, its own or a pipeline's, or from a single file.

        dtype None: as stored. config: a UNetConfig for a single file, which says nothing of its
        heads; not needed for the published sizes. variant: of a folder's files, as "fp16".
        """
        path, fields, tensors = published.read_unet(path, config, variant)
        return checkpoint.load(cls, config or settings.build(UNetConfig, fields), tensors, path, dtype, device)

    def save_pretrained(self, path):
        """Writes a folder that diffusers' UNet2DConditionModel opens: config.json and weights."""
        published.write_part(path, published.unet_json(self.config), self.state_dict())


# ---- the autoencoder -------------------------------------------------------------------------


class Encoder(nn.Module):
    """images (B, 3, H, W) → (B, 2·z, h, w)."""

    def __init__(self, config):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks, before = nn.ModuleList(), widths[0]
        for level, width in enumerate(widths):
            layers = range(config.layers_per_block)
            resnets = [ResBlock(before if k == 0 else width, width, groups, 1e-6) for k in layers]
            self.down_blocks.append(Level(resnets, down=Downsample(width, 0) if level + 1 < len(widths) else None))
            before = width
        self.mid_block = middle(before, groups)
        self.conv_norm_out = nn.GroupNorm(groups, before, eps=1e-6)
        self.conv_out = nn.Conv2d(before, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level.forward_all(x)
            if hasattr(level, "downsamplers"):
                x = level.downsamplers[0](x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block.forward_all(x))))


class Decoder(nn.Module):
    """(B, z, h, w) → images (B, 3, H, W)."""

    def __init__(self, config):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        before = widths[0]
        self.conv_in = nn.Conv2d(config.latent_channels, before, 3, padding=1)
        self.mid_block = middle(before, groups)
        self.up_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            layers = range(config.layers_per_block + 1)
            resnets = [ResBlock(before if k == 0 else width, width, groups, 1e-6) for k in layers]
            self.up_blocks.append(Level(resnets, up=Upsample(width) if level + 1 < len(widths) else None))
            before = width
        self.conv_norm_out = nn.GroupNorm(groups, before, eps=1e-6)
        self.conv_out = nn.Conv2d(before, config.out_channels, 3, padding=1)

    def forward(self, x):
        x = self.mid_block.forward_all(self.conv_in(x))
        for level in self.up_blocks:
            x = level.forward_all(x)
            if hasattr(level, "upsamplers"):
                x = level.upsamplers[0](x, (2 * x.shape[2], 2 * x.shape[3]))
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def middle(width, groups):
    """The autoencoder's smallest grid: a residual block, attention, a residual block."""
    resnets = [ResBlock(width, width, groups, 1e-6) for _ in range(2)]
    return Level(resnets, [PixelAttention(width, groups)])


class AutoencoderKL(nn.Module):
    """images ⇄ latents; an image becomes a normal distribution of them (Kingma & Welling 2014)."""

    def __init__(self, config):
        super().__init__()
        self.config, channels = config, config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def encode(self, images):
        """images (B, 3, H, W) in [-1, 1] → (mean, log of the variance), not scaled.

        Each is (B, z, H/factor, W/factor).
        """
        height, width = images.shape[-2:]
        if width % self.config.factor or height % self.config.factor:
            raise UserError(
                f"a picture of {width}×{height} has no whole number of latents: "
                f"its sides must be multiples of {self.config.factor}"
            )
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, latents):
        """latents (B, z, h, w), not scaled → images (B, 3, H, W) around [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(latents))

    def forward(self, images, noise=None):
        """→ (reconstruction, mean, logvar) of images (B, 3, H, W) in [-1, 1].

        noise (B, z, h, w) ~ N(0, 1); None: the mean is decoded.
        """
        mean, logvar = self.encode(images)
        return self.decode(mean if noise is None else reparameterize(mean, logvar, noise)), mean, logvar

    @classmethod
    def from_pretrained(cls, path, dtype=None, device="cpu", config=None, variant=None):
        """An autoencoder from a diffusers folder, its own or a pipeline's, or from a single file.

        dtype None: as stored. config: an AutoencoderKLConfig for a single file, which says nothing
        of its scaling factor; without one it is taken to be SD 1's and 2's.
        """
        path, fields, tensors = published.read_vae(path, config, variant)
        return checkpoint.load(cls, config or settings.build(AutoencoderKLConfig, fields), tensors, path, dtype, device)

    def save_pretrained(self, path):
        """Writes a folder that diffusers' AutoencoderKL opens: config.json and weights."""
        published.write_part(path, published.vae_json(self.config), self.state_dict())


def reparameterize(mean, logvar, noise):
    """A sample of encode()'s distribution, from noise ~ N(0, 1); mean and logvar get gradients."""
    return mean + (logvar / 2).exp() * noise


def kl_divergence(mean, logvar):
    """KL(N(mean, e^logvar) ‖ N(0, 1)), summed over each picture's latents, mean over the batch.

    Its published weight is 1e-6, beside a reconstruction error that is summed over pixels too.
    """
    return 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()


@dataclass(frozen=True)
class AutoencoderLoss:
    """l1·|x-x̂| + l2·(x-x̂)² + kl·KL, each divided by how many numbers a picture has."""

    l1: float = 1.0
    l2: float = 0.0
    kl: float = 1e-6

    def __post_init__(self):
        settings.within(self, 0, 1e6, "l1", "l2", "kl")
        if not (self.l1 or self.l2):
            raise ValueError("l1 and l2 are both 0: nothing would be reconstructed")

    def __call__(self, images, reconstruction, mean, logvar):
        """→ the loss, {"nll", "kl"}; images and reconstruction (B, 3, H, W) in [-1, 1]."""
        error = (reconstruction.float() - images).abs()
        nll = (self.l1 * error + self.l2 * error**2).mean()
        kl = kl_divergence(mean.float(), logvar.float()) / images[0].numel()
        return nll + self.kl * kl, {"nll": nll, "kl": kl}


# ---- the noise schedule ----------------------------------------------------------------------


def linear_betas(first, last, T):
    """Ho et al. 2020."""
    return torch.linspace(first, last, T, dtype=torch.float32, device="cpu")


def scaled_linear_betas(first, last, T):
    """Latent diffusion: linear in √β."""
    return torch.linspace(first**0.5, last**0.5, T, dtype=torch.float32, device="cpu") ** 2


def cosine_betas(first, last, T):
    """Nichol & Dhariwal 2021, eq. 17."""
    f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]
    return torch.tensor([min(1 - f[t + 1] / f[t], 0.999) for t in range(T)], device="cpu")


BETA_SCHEDULES = {  # (beta_start, beta_end, T) → β (T,) float32
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "squaredcos_cap_v2": cosine_betas,
}


class Prediction(NamedTuple):
    """A kind of prediction from x_t = α·x0 + σ·ε, and what follows from it."""

    target: Callable  # (x0, ε, α, σ) → what it learns to predict
    x0_and_noise: Callable  # (prediction, x_t, α, σ) → (x0, ε)
    relative_error: Callable  # SNR → (squared error of the prediction) / (that of the x0 computed from it)


PREDICTIONS = {
    "epsilon": Prediction(
        target=lambda x0, noise, alpha, sigma: noise,
        x0_and_noise=lambda noise, x, alpha, sigma: ((x - sigma * noise) / alpha, noise),
        relative_error=lambda snr: snr,
    ),
    "v_prediction": Prediction(  # Salimans & Ho 2022
        target=lambda x0, noise, alpha, sigma: alpha * noise - sigma * x0,
        x0_and_noise=lambda v, x, alpha, sigma: (alpha * x - sigma * v, alpha * v + sigma * x),
        relative_error=lambda snr: snr + 1,
    ),
    "sample": Prediction(
        target=lambda x0, noise, alpha, sigma: x0,
        x0_and_noise=lambda x0, x, alpha, sigma: (x0, (x - alpha * x0) / sigma),
        relative_error=lambda snr: 1,
    ),
}
SPACINGS = ("", "leading", "linspace", "trailing")


@dataclass(frozen=True)
class NoiseSchedule:
    """How much noise there is at each time t in 0..T-1, and what the U-Net predicts.

    `alphas_cumprod` (T,) holds ᾱ, float32 and computed as published: x_t = √ᾱ_t·x0 + √(1-ᾱ_t)·ε.
    The fields are those of scheduler_config.json, by default SD 1.5's; "squaredcos_cap_v2" is the
    cosine schedule, "sample" the prediction of x0.
    """

    num_train_timesteps: int = 1000  # T
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"  # one of BETA_SCHEDULES
    prediction_type: str = "epsilon"  # one of PREDICTIONS
    # nothing of the picture is left at T-1, so that dark and bright ones can be sampled
    rescale_betas_zero_snr: bool = False
    timestep_spacing: str = ""  # which times a sampler visits; "": its own published choice
    steps_offset: int = 1  # added to "leading" times
    set_alpha_to_one: bool = False  # DDIM's last step goes to ᾱ = 1 (true), or only to ᾱ_0 (false)

    def __post_init__(self):
        settings.within(self, 1, 100_000, "num_train_timesteps")
        settings.within(self, 0, self.num_train_timesteps, "steps_offset")
        settings.above(self, 0, "beta_start", "beta_end")
        settings.fraction(self, "beta_start", "beta_end")
        settings.one_of(self, BETA_SCHEDULES, "beta_schedule")
        settings.one_of(self, PREDICTIONS, "prediction_type")
        settings.one_of(self, SPACINGS, "timestep_spacing")
        betas = BETA_SCHEDULES[self.beta_schedule](self.beta_start, self.beta_end, self.num_train_timesteps)
        alphas_cumprod = (1 - betas).cumprod(0)
        if self.rescale_betas_zero_snr:
            # Lin et al. 2023, algorithm 1: move √ᾱ so that the last is 0 and the first stays
            root = alphas_cumprod.sqrt()
            alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        if not alphas_cumprod[0] < 1 or not (alphas_cumprod[:-1] > 0).all():
            raise ValueError(
                f"beta_start {self.beta_start} and beta_end {self.beta_end} must add noise at the first of "
                f"num_train_timesteps {self.num_train_timesteps}, and leave some of the picture before the last"
            )
        if alphas_cumprod[-1] == 0 and self.prediction_type == "epsilon":
            raise ValueError(
                "prediction_type epsilon says nothing of the picture where only noise is left, as at the last time "
                "with rescale_betas_zero_snr or large betas: use v_prediction or sample"
            )
        object.__setattr__(self, "alphas_cumprod", alphas_cumprod)

    # -- training --

    def alpha_sigma(self, abar):
        """α and σ of x_t = α·x0 + σ·ε where ᾱ is `abar`."""
        return abar.sqrt(), (1 - abar).sqrt()

    def alpha_sigma_at(self, t, like):
        """α and σ at t (B,) or one number, shaped to multiply `like` (B, …)."""
        abar = self.alphas_cumprod.to(like.device)[t]
        return self.alpha_sigma(abar.view(-1, *[1] * (like.ndim - 1)) if abar.ndim else abar)

    def add_noise(self, x0, noise, t):
        """x_t = α·x0 + σ·ε (Ho et al. 2020, eq. 4); t (B,) int64, or one for all."""
        alpha, sigma = self.alpha_sigma_at(t, x0)
        return alpha * x0 + sigma * noise

    def target(self, x0, noise, t):
        """What the U-Net should predict from x_t: ε, v or x0."""
        return PREDICTIONS[self.prediction_type].target(x0, noise, *self.alpha_sigma_at(t, x0))

    def loss_weight(self, t, gamma):
        """Min-SNR weights (Hang et al. 2023) at t (B,): an error of x0 counts min(SNR, γ) times."""
        alpha, sigma = self.alpha_sigma(self.alphas_cumprod.to(t.device)[t])
        snr = (alpha / sigma) ** 2
        return snr.clamp(max=gamma) / PREDICTIONS[self.prediction_type].relative_error(snr)

    # -- sampling --

    def x0_and_noise(self, prediction, x, abar):
        """(x0, ε) that follow from the prediction at x = α·x0 + σ·ε; ᾱ is one number."""
        return PREDICTIONS[self.prediction_type].x0_and_noise(prediction, x, *self.alpha_sigma(abar))

    def timesteps(self, steps, spacing, strength=1.0, skip_last=False):
        """The times a sampler visits, (n,) falling; float64: "linspace" falls between whole ones.

        spacing: the sampler's default, unless the schedule sets one. strength below 1 keeps the
        last int(steps · strength) of them (image to image). skip_last makes steps + 1 of them and leaves out the
        last, as DPM-Solver++'s published code does; "trailing" times have no such last one.
        """
        T, spacing = self.num_train_timesteps, self.timestep_spacing or spacing
        if not 1 <= steps <= T - skip_last or not 0 < strength <= 1:
            raise UserError(
                f"{steps} steps at strength {strength}: steps must be 1..{T - skip_last}, strength in (0, 1]"
            )
        n = steps + (skip_last and spacing != "trailing")
        if spacing == "linspace":
            times = torch.linspace(0, T - 1, n, dtype=torch.float64)
        elif spacing == "leading":
            times = torch.arange(n, dtype=torch.float64) * (T // n) + self.steps_offset
        else:
            times = (torch.arange(1, n + 1, dtype=torch.float64) * T / n).round() - 1
        return times.clamp(max=T - 1).flip(0)[:steps][steps - max(1, int(steps * strength)) :]

    def sigmas(self, times):
        """σ' = σ/α at times (n,) that need not be whole, and 0 for the end: (n + 1,)."""
        abar = self.alphas_cumprod.clamp(min=2**-24)  # zero-SNR schedules: σ' stays finite
        table = ((1 - abar) / abar).sqrt()  # (T,)
        whole = times.floor().long()
        after = (whole + 1).clamp(max=self.num_train_timesteps - 1)
        sigmas = torch.lerp(table[whole], table[after], (times - whole).float())
        return torch.cat((sigmas, torch.zeros(1)))


def diffusion_loss(
    unet, schedule, latents, noise, t, context, text_embeds=None, time_ids=None, min_snr=0.0, perturbation=0.0
):
    """E‖target - prediction‖² over noised latents (Ho et al. 2020, eq. 14), in float32. → a scalar

    latents, noise (B, C, h, w), scaled; t (B,) int64 in 0..T-1; `unet`: anything called as a UNet
    is. min_snr: γ of the min-SNR weights, published 5; 0: every time counts the same. perturbation
    (B, C, h, w): more noise, that the U-Net is not told of (Ning et al. 2023: 0.1 · N(0, 1)), so
    that it learns to correct its own errors.
    """
    noised = schedule.add_noise(latents, noise + perturbation, t)
    prediction = unet(noised, t, context, text_embeds, time_ids)
    target = schedule.target(latents, noise, t)
    errors = (prediction.float() - target.float()).pow(2).mean((1, 2, 3))  # (B,)
    return (errors * schedule.loss_weight(t, min_snr)).mean() if min_snr else errors.mean()


def offset_noise(noise, offsets, strength):
    """noise (B, C, h, w) + strength · offsets (B, C, 1, 1), both ~ N(0, 1).

    So each channel's mean is noised as well, and brightness is learned (Guttenberg 2023, published
    strength 0.1).
    """
    return noise + strength * offsets


# ---- samplers --------------------------------------------------------------------------------
# Each is a generator: it yields x after every step, and the last x is the sample. Arguments:
#   predict(x, t) → prediction   the U-Net, its conditioning and guidance
#   noise() → N(0, 1) like x     the noise to start from, then that of each step that adds some
#   image, strength              latents to begin from (None: noise), and how far they are noised; 1 is all the way
# To add one, write its function and its row of SAMPLERS, below. The name that it gives to begin() must be its row's:
# from there come its spacing, and the predictions that it can follow.


def sampler_times(name, schedule, steps, strength):
    """The times (n,) that this sampler visits; a UserError if it cannot follow the schedule."""
    sampler = SAMPLERS[name]
    kind = schedule.prediction_type
    if kind not in sampler.predictions:
        fitting = [other for other in SAMPLERS if kind in SAMPLERS[other].predictions]
        raise UserError(
            f'sampler "{name}" cannot follow a schedule of {kind}; these can: {", ".join(fitting) or "none"}'
        )
    return schedule.timesteps(steps, sampler.spacing, strength, sampler.skip_last)


def fitting_sampler(schedule, preferred="ddim"):
    """The name of a sampler that can follow the schedule: `preferred`, or else the first that can."""
    for name in (preferred, *SAMPLERS):
        if schedule.prediction_type in SAMPLERS[name].predictions:
            return name
    return preferred


def begin(name, schedule, steps, noise, image, strength, last=1.0):
    """→ times (n,) int64, ᾱ at each and, at the end, `last` (n + 1,), and the first x."""
    times = sampler_times(name, schedule, steps, strength).round().long()
    x = noise() if image is None else schedule.add_noise(image, noise(), times[0])
    abar = torch.cat((schedule.alphas_cumprod[times], torch.full((1,), float(last))))
    return times, abar, x


def sample_ddpm(predict, schedule, steps, noise, image=None, strength=1.0):
    """Ancestral sampling (Ho et al. 2020, algorithm 2) with the posterior's variance (eq. 7)."""
    times, abar, x = begin("ddpm", schedule, steps, noise, image, strength)
    for t, a, a_next in zip(times, abar[:-1], abar[1:], strict=True):
        x0, _ = schedule.x0_and_noise(predict(x, t), x, a)
        alpha = a / a_next  # α_t of the paper, for this one step
        mean = (a_next.sqrt() * (1 - alpha) * x0 + alpha.sqrt() * (1 - a_next) * x) / (1 - a)
        variance = (1 - a_next) / (1 - a) * (1 - alpha)
        x = mean + variance.sqrt() * noise()
        yield x


def sample_ddim(predict, schedule, steps, noise, image=None, strength=1.0):
    """DDIM (Song et al. 2021, eq. 12 with η = 0): adds no noise after the first. Order 1."""
    last = 1.0 if schedule.set_alpha_to_one else schedule.alphas_cumprod[0]
    times, abar, x = begin("ddim", schedule, steps, noise, image, strength, last)
    for t, a, a_next in zip(times, abar[:-1], abar[1:], strict=True):
        x0, epsilon = schedule.x0_and_noise(predict(x, t), x, a)
        x = a_next.sqrt() * x0 + (1 - a_next).sqrt() * epsilon
        yield x


def sample_dpmpp_2m(predict, schedule, steps, noise, image=None, strength=1.0):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): extrapolates the last two x0. Order 2."""
    times, abar, x = begin("dpmpp_2m", schedule, steps, noise, image, strength)
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    lambdas = (alpha / sigma).log()  # the last is infinite: no noise left
    before = None
    for i, t in enumerate(times):
        x0, _ = schedule.x0_and_noise(predict(x, t), x, abar[i])
        h = lambdas[i + 1] - lambdas[i]
        d = x0
        if before is not None and i < len(times) - 1:  # at the last step h is infinite: r would be 0
            r = (lambdas[i] - lambdas[i - 1]) / h
            d = x0 + (x0 - before) / (2 * r)
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * torch.expm1(-h) * d
        before = x0
        yield x


# The two Euler samplers follow Karras et al. 2022: their x is x_t / α = x0 + σ'·ε with σ' = σ/α. At SD's last time
# it is 15 times as large as x_t; with zero SNR, where σ' is clamped, 4096 times. The U-Net is given α·x, which is x_t.


def begin_sigmas(name, schedule, steps, noise, image, strength):
    """→ times (n,) float64, σ' at each and, at the end, 0 (n + 1,), and the first x."""
    times = sampler_times(name, schedule, steps, strength)
    sigmas = schedule.sigmas(times)
    if image is not None:
        return times, sigmas, image + sigmas[0] * noise()
    # as published: √(σ'²+1) where the times start below T - 1
    leading = schedule.timestep_spacing == "leading"
    return times, sigmas, noise() * ((sigmas[0] ** 2 + 1).sqrt() if leading else sigmas[0])


def slope(predict, schedule, x, t, s):
    """dx/dσ' = ε at x = x0 + σ'·ε, σ' = s."""
    abar = 1 / (s**2 + 1)
    scaled = abar.sqrt() * x
    return schedule.x0_and_noise(predict(scaled, t), scaled, abar)[1]


def sample_euler(predict, schedule, steps, noise, image=None, strength=1.0):
    """Euler's method on dx/dσ' = ε (Karras et al. 2022, algorithm 1, uncorrected). Order 1."""
    times, sigmas, x = begin_sigmas("euler", schedule, steps, noise, image, strength)
    for t, s, s_next in zip(times, sigmas[:-1], sigmas[1:], strict=True):
        x = x + slope(predict, schedule, x, t, s) * (s_next - s)
        yield x


def sample_euler_ancestral(predict, schedule, steps, noise, image=None, strength=1.0):
    """Euler's method, but each step goes too far, then adds noise (Crowson, k-diffusion)."""
    times, sigmas, x = begin_sigmas("euler_ancestral", schedule, steps, noise, image, strength)
    for t, s, s_next in zip(times, sigmas[:-1], sigmas[1:], strict=True):
        up = (s_next**2 * (s**2 - s_next**2) / s**2).sqrt()
        down = (s_next**2 - up**2).sqrt()
        x = x + slope(predict, schedule, x, t, s) * (down - s)
        x = x + up * noise()
        yield x


class Sampler(NamedTuple):
    """All that is to be known of a sampler."""

    function: Callable
    predictions: tuple[str, ...]  # the prediction types whose schedules it can follow
    spacing: str  # of its times, where the schedule sets none: as published
    skip_last: bool  # see NoiseSchedule.timesteps
    order: int  # a path's error falls as 1/steps^order; 0: random, its distribution converges
    in_sigma: bool  # x is x0 + σ'·ε instead of x_t

    def __call__(self, predict, schedule, steps, noise, image=None, strength=1.0):
        return self.function(predict, schedule, steps, noise, image, strength)


DIFFUSION = ("epsilon", "v_prediction", "sample")  # x_t = α·x0 + σ·ε with α² + σ² = 1
# fmt: off
SAMPLERS = {  #               function                predictions spacing     skip_last order in_sigma
    "ddpm":            Sampler(sample_ddpm,            DIFFUSION, "leading",  False,    0,    False),
    "ddim":            Sampler(sample_ddim,            DIFFUSION, "leading",  False,    1,    False),
    "dpmpp_2m":        Sampler(sample_dpmpp_2m,        DIFFUSION, "linspace", True,     2,    False),
    "euler":           Sampler(sample_euler,           DIFFUSION, "linspace", False,    1,    True),
    "euler_ancestral": Sampler(sample_euler_ancestral, DIFFUSION, "linspace", False,    0,    True),
}
# fmt: on


def classifier_free_guidance(conditional, unconditional, scale, rescale=0.0):
    """Classifier-free guidance (Ho & Salimans 2022): away from the prediction without the prompt.

    rescale in [0, 1] takes back, by so much, the contrast that guidance adds (Lin et al. 2023, eqs.
    15-16).
    """
    guided = unconditional + scale * (conditional - unconditional)
    if rescale:
        ratio = conditional.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
        guided = guided * (rescale * ratio + 1 - rescale)
    return guided


def seeded_noise(seed, count, shape, device):
    """→ noise() → (count, *shape) ~ N(0, 1), new at each call.

    Row i comes from a generator seeded with seed + i; seed None: by chance.
    """
    # on the CPU: the same noise for every device
    generators = [torch.Generator() for _ in range(count)]
    for i, generator in enumerate(generators):
        generator.seed() if seed is None else generator.manual_seed(seed + i)

    def noise():
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)

    return noise


# ---- the whole: text → picture ---------------------------------------------------------------

CONFIGS = UNetConfig, AutoencoderKLConfig, NoiseSchedule  # what the files of a pipeline say


class Conditioning(NamedTuple):
    """What steers the U-Net: context (B, M, D); for SDXL also the pooled prompt (B, P)."""

    context: torch.Tensor
    text_embeds: torch.Tensor | None = None


class LossNoise(NamedTuple):
    """The random numbers in the loss of M pictures, in the published code's order."""

    sample: torch.Tensor  # (M, C, h, w) ~ N(0, 1): of the autoencoder's distribution
    noise: torch.Tensor  # (M, C, h, w) ~ N(0, 1): the ε that is added
    offset: torch.Tensor  # (M, C, 1, 1) ~ N(0, 1)
    perturbation: torch.Tensor  # (M, C, h, w) ~ N(0, 1)
    t: torch.Tensor  # (M,) int64 in 0..T-1
    drop: torch.Tensor  # (M,) in [0, 1): DreamLLM drops the conditioning if it is below config.drop


class LatentDiffusion(nn.Module):
    """A U-Net, an autoencoder, a schedule, and a text encoder.

    text_encoder: SDXL has two, as a list; None: `generate` then takes conditioning, no texts.
    """

    def __init__(self, unet, vae, schedule, text_encoder=None):
        super().__init__()
        channels = unet.config.in_channels, unet.config.out_channels
        if channels != (vae.config.latent_channels,) * 2:
            raise UserError(
                f"a U-Net of {channels[0]} channels in and {channels[1]} out does not fit an autoencoder of "
                f"{vae.config.latent_channels} latent channels"
            )
        self.unet, self.vae, self.schedule = unet, vae, schedule
        self.sampler = "ddim"  # where `generate` is given none; from_pretrained: the one that its files name
        self.zero_negative = True  # SDXL, without a negative: from zeros (true), or from ""
        encoders = text_encoder if isinstance(text_encoder, list) else [text_encoder]
        self.text_encoders = nn.ModuleList(encoder for encoder in encoders if encoder is not None)
        if vae.quant_conv.weight.dtype == torch.float16:
            vae.float()  # the published autoencoders overflow in float16

    def encode_text(self, texts):
        """texts (a list of B) → Conditioning.

        One encoder (SD 1 and 2): its last layer, after the final norm. Two (SDXL): the penultimate
        layers of both, no norm, side by side, and the second's pooled projection. SD 2 learned from
        the penultimate layer too: its published text encoder ends there.
        """
        if not self.text_encoders:
            raise UserError("this latent diffusion has no text encoder: give it conditioning instead of texts")
        device = next(self.unet.parameters()).device
        tokens = [encoder.tokenize(texts).to(device) for encoder in self.text_encoders]
        if len(tokens) == 1:
            return Conditioning(self.text_encoders[0].hidden(tokens[0], layer=-1, final_norm=True))
        pairs = zip(self.text_encoders, tokens, strict=True)
        context = torch.cat([encoder.hidden(t, layer=-2, final_norm=False) for encoder, t in pairs], dim=-1)
        return Conditioning(context, self.text_encoders[1].pooled(tokens[1]))

    def to_conditioning(self, prompts):
        """Texts (one or a list), context (B, M, D) or a Conditioning → a Conditioning."""
        if isinstance(prompts, Conditioning):
            return prompts
        if isinstance(prompts, torch.Tensor):
            return Conditioning(prompts)
        return self.encode_text([prompts] if isinstance(prompts, str) else list(prompts))

    def with_guidance(self, prompts, negative, guidance):
        """→ the Conditioning of the B prompts; with guidance 2B rows, the negatives first."""
        wanted = self.to_conditioning(prompts)
        if (width := wanted.context.shape[-1]) != self.unet.config.cross_attention_dim:
            raise UserError(f"a context of width {width}: the U-Net takes {self.unet.config.cross_attention_dim}")
        if guidance == 1:
            return wanted
        if negative is None and wanted.text_embeds is not None and self.zero_negative:
            avoided = Conditioning(*(torch.zeros_like(part) for part in wanted))
        else:
            avoided = self.to_conditioning("" if negative is None else negative)
        if (avoided.text_embeds is None) != (wanted.text_embeds is None):
            raise UserError("negative must be of the form of the prompts: for SDXL texts, or a whole Conditioning")
        if len(avoided.context) not in (1, len(wanted.context)):
            raise UserError(f"{len(avoided.context)} negatives for {len(wanted.context)} prompts: give one, or as many")
        context = torch.cat((avoided.context.expand_as(wanted.context), wanted.context))
        if wanted.text_embeds is None:
            return Conditioning(context)
        return Conditioning(context, torch.cat((avoided.text_embeds.expand_as(wanted.text_embeds), wanted.text_embeds)))

    def time_ids(self, height, width, count):
        """SDXL's six numbers (count, 6) about a picture that was neither cropped nor resized."""
        return torch.tensor([[height, width, 0, 0, height, width]] * count, device=self.unet.conv_in.weight.device)

    def to_latents(self, images, noise=None):
        """images (B, 3, H, W) in [0, 1] → scaled latents: their mean, or a sample from `noise`."""
        weight = self.vae.quant_conv.weight
        mean, logvar = (x.float() for x in self.vae.encode((2 * images - 1).to(weight.device, weight.dtype)))
        return (mean if noise is None else reparameterize(mean, logvar, noise)) * self.vae.config.scaling_factor

    def to_images(self, latents):
        """Scaled latents (B, C, h, w) → images (B, 3, H, W) in [0, 1], float32."""
        z = (latents / self.vae.config.scaling_factor).to(self.vae.quant_conv.weight.dtype)
        return (self.vae.decode(z).float() / 2 + 0.5).clamp(0, 1)

    def loss_noise(self, count, height, width, generator=None):
        """The LossNoise of `count` pictures of height × width pixels."""
        config, device = self.vae.config, self.unet.conv_in.weight.device
        shape = (count, config.latent_channels, height // config.factor, width // config.factor)
        sample, noise, perturbation = torch.randn(3, *shape, generator=generator).to(device)
        offset = torch.randn(*shape[:2], 1, 1, generator=generator).to(device)
        t = torch.randint(self.schedule.num_train_timesteps, (count,), generator=generator).to(device)
        return LossNoise(sample, noise, offset, perturbation, t, torch.rand(count, generator=generator).to(device))

    def loss(self, images, context, draws, min_snr=0.0, offset=0.0, perturbation=0.0):
        """images (M, 3, H, W) in [0, 1], context (M, L, D), LossNoise → diffusion_loss.

        For DreamLLM: frozen weights let the gradient through to `context`. offset, perturbation:
        strengths of draws.offset and draws.perturbation, 0 for none.
        """
        x0 = self.to_latents(images, draws.sample)
        noise = offset_noise(draws.noise, draws.offset, offset)
        extra = perturbation * draws.perturbation
        return diffusion_loss(
            self.unet, self.schedule, x0, noise, draws.t, context, min_snr=min_snr, perturbation=extra
        )

    @torch.inference_mode()
    def generate(
        self,
        prompts,
        negative=None,
        guidance=7.5,
        steps=50,
        sampler=None,
        size=None,
        seed=None,
        noise=None,
        image=None,
        strength=0.8,
        rescale=0.0,
        progress=False,
    ):
        """prompts (texts, context (B, M, D) or a Conditioning) → images (B, 3, H, W) in [0, 1].

        negative: what to move away from, in the same forms, one or B; None: "" (SDXL: zeros).
        guidance: 1 for none; one pass of the U-Net a step instead of two. sampler: one of SAMPLERS.
        size: pixels, a side or (height, width); None: the size the U-Net was trained on.
        seed: picture i's noise is that of seed + i, in any batch. noise() → (B, C, h, w) ~ N(0, 1)
        replaces it.
        image (B, 3, H, W) in [0, 1]: what to start from; strength 1 leaves nothing of it.
        rescale: see classifier_free_guidance. progress: shows a bar.
        """
        sampler = sampler or self.sampler
        if sampler not in SAMPLERS:
            raise UserError(f'no sampler "{sampler}"; there are {", ".join(SAMPLERS)}')
        weight, factor = self.unet.conv_in.weight, self.vae.config.factor
        size = image.shape[2:] if image is not None else size or self.unet.config.sample_size * factor
        height, width = (size, size) if isinstance(size, int) else size
        if height % factor or width % factor or min(height, width) < factor:
            raise UserError(f"pictures of {width}×{height}: sides must be multiples of {factor}")

        context, text_embeds = self.with_guidance(prompts, negative, guidance)
        count = len(context) if guidance == 1 else len(context) // 2
        context, time_ids = context.to(weight), None
        if text_embeds is not None:
            text_embeds, time_ids = text_embeds.to(weight), self.time_ids(height, width, len(context))

        def predict(x, t):
            if guidance == 1:
                return self.unet(x.to(weight), t, context, text_embeds, time_ids).float()
            prediction = self.unet(torch.cat((x, x)).to(weight), t, context, text_embeds, time_ids)
            unconditional, conditional = prediction.float().chunk(2)
            return classifier_free_guidance(conditional, unconditional, guidance, rescale)

        shape = (self.vae.config.latent_channels, height // factor, width // factor)
        noise = noise or seeded_noise(seed, count, shape, weight.device)
        start = () if image is None else (self.to_latents(image.expand(count, -1, -1, -1)), strength)
        path = SAMPLERS[sampler](predict, self.schedule, steps, noise, *start)
        for x in tqdm(path, total=steps, disable=not progress):
            if not x.isfinite().all():
                raise UserError("the U-Net gave NaN or infinity: try float32 or bfloat16")
        return self.to_images(x)

    # -- published files --

    @classmethod
    def from_pretrained(cls, path, text_encoder=None, dtype=None, device="cpu", config=None, variant=None):
        """SD 1, 2 or XL from a diffusers pipeline folder or a single file (.safetensors, .ckpt).

        text_encoder: as the class takes it, e.g. clip.text_encoders(path).
        config, for single files: the YAML or JSON its code base keeps of it (a path, or its content
        as a dict), needed if the shapes don't decide. variant: of a folder's files, as "fp16".
        """
        pipeline = published.read_pipeline(path, config)
        unet_config, vae_config, schedule = map(settings.build, CONFIGS, pipeline.fields)
        unet = UNet.from_pretrained(path, dtype, device, unet_config, variant)
        vae = AutoencoderKL.from_pretrained(path, dtype, device, vae_config, variant)
        model = cls(unet, vae, schedule, text_encoder)
        model.sampler, model.zero_negative = pipeline.sampler, pipeline.zero_negative
        return model

    @classmethod
    def from_tensors(cls, tensors, path, dtype=None, device="cpu", file=None):
        """The same, without a text encoder, from tensors named unet.… and vae.….

        path: a folder of their configurations, as published.write_configs writes it; file: the tensors', for errors.
        """
        unet_config, vae_config, schedule = map(settings.build, CONFIGS, published.folder_fields(path))
        file = file or path
        unet, vae = published.split_parts(tensors, file)
        unet = checkpoint.load(UNet, unet_config, unet, file, dtype, device)
        return cls(unet, checkpoint.load(AutoencoderKL, vae_config, vae, file, dtype, device), schedule)

    def save_pretrained(self, path):
        """Writes a diffusers pipeline folder; one that has model_index.json is complete."""
        published.write_pipeline(path, self)
