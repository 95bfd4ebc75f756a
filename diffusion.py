"""Latent diffusion: pictures out of noise, one small step at a time, steered by text. Stable Diffusion 1.5, 2.1, XL.

An autoencoder squeezes a picture to a grid of latents 8 times smaller each way. Training adds noise to the latents, a
random amount t of it, and a U-Net learns to say what was added. Drawing runs the other way: from pure noise, predict
the noise, take a little of it off, and again. The U-Net sees the prompt through cross-attention, so noise that could
become anything becomes what the words say. Its loss is a plain squared error; nothing here is a game of two networks.

    image (B, 3, H, W) in [-1, 1] ── AutoencoderKL.encode · scaling_factor ──▶ x0 (B, 4, H/8, W/8)
                                                                                │ add_noise(x0, noise, t)
    prompt ── text encoder ──▶ context (B, 77, D) ──┐                           ▼
    t (B,) ── sin, cos, MLP ──▶ (B, 4·width) ───────┴──▶ UNet ──▶ prediction of noise, v or x0, the shape of x0

    drawing:   noise ── sampler: UNet at each of n falling t ──▶ x0 ── / scaling_factor · decode ──▶ image

    symbol  B batch   x0 clean latents   ε noise   ᾱ alphas_cumprod   α = √ᾱ   σ = √(1-ᾱ)   x_t = α·x0 + σ·ε
            v = α·ε - σ·x0   SNR = α²/σ²   λ = log(α/σ)

Papers: latent diffusion, Rombach et al. 2022; SDXL, Podell et al. 2023; DDPM, Ho et al. 2020; v-prediction, Salimans &
Ho 2022; guidance, Ho & Salimans 2022. Each sampler names its own. Modules bear the names of the diffusers files, so a
checkpoint's keys can be read beside the code; single files (CompVis, Stability) are renamed at the door.

Text encoders are handed in, never imported. What is asked of one: `.tokenize(texts) → (B, 77) int64`,
`.hidden(tokens, layer=-1 | -2, final_norm=True) → (B, 77, D)`, `.pooled(tokens) → (B, P)`; to be saved, what clip.CLIP
has: `.save_pretrained(folder)`, `.tokenizer`, `.config.text.context_length`.

Read before: clip.py. Read next: documents.py, then DreamLLM in model.py: a language model steers this U-Net.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

from support import checkpoint, settings
from support.settings import UserError

# ---- configuration ---------------------------------------------------------------------------


@dataclass(frozen=True)
class UNetConfig:
    """Shape of a U-Net; the defaults are SD 1.5's. Tuples have one entry per level, the largest grid first."""

    in_channels: int = 4
    out_channels: int = 4
    sample_size: int = 64  # side of the latents it was trained on; others work too
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)  # width of each level
    layers_per_block: int = 2
    depth: tuple[int, ...] = (1, 1, 1, 0)  # transformer blocks after each residual block; 0: no attention there
    mid_depth: int = 1  # … and in the middle
    heads: tuple[int, ...] = (8, 8, 8, 8)
    cross_attention_dim: int = 768
    use_linear_projection: bool = False  # into and out of the transformer: linear, or a 1×1 convolution
    norm_num_groups: int = 32
    # SDXL's second conditioning, one vector a picture: pooled text beside six numbers about its size, each
    # of which becomes `addition_time_embed_dim` sines and cosines. 0: none
    addition_time_embed_dim: int = 0
    projection_class_embeddings_input_dim: int = 0  # pooled text + 6 · addition_time_embed_dim
    upcast_attention: bool = False  # a note to other readers: fused attention sums in float32 as it is

    def __post_init__(self):
        levels = len(self.block_out_channels)
        for name in ("depth", "heads"):
            if len(getattr(self, name)) != levels:
                raise ValueError(f"{name} {getattr(self, name)} must have {levels} entries, as block_out_channels has")
        for width, heads in zip(self.block_out_channels, self.heads, strict=True):
            if width % heads or width % self.norm_num_groups:
                raise ValueError(f"heads {heads} and norm_num_groups {self.norm_num_groups} must divide width {width}")
        if self.depth[-1] not in (0, self.mid_depth):
            raise ValueError(f"mid_depth {self.mid_depth} must be the last level's depth {self.depth[-1]}")
        if bool(self.addition_time_embed_dim) != bool(self.projection_class_embeddings_input_dim):
            raise ValueError("addition_time_embed_dim and projection_class_embeddings_input_dim go together")

    @classmethod
    def named(cls, name):
        """The published shape of that name: sd15, sd21 or sdxl."""
        if name not in UNETS:
            raise UserError(f'no U-Net "{name}"; there are {", ".join(UNETS)}')
        return cls(**UNETS[name])


# fmt: off
UNETS = {
    "sd15": {},
    "sd21": {"sample_size": 96, "heads": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True,
             "upcast_attention": True},
    "sdxl": {"sample_size": 128, "block_out_channels": (320, 640, 1280), "depth": (0, 2, 10), "mid_depth": 10,
             "heads": (5, 10, 20), "cross_attention_dim": 2048, "use_linear_projection": True,
             "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816},
}
# fmt: on


@dataclass(frozen=True)
class AutoencoderKLConfig:
    """Shape of an autoencoder; the defaults are those of SD 1 and 2. The fields are those of vae/config.json."""

    in_channels: int = 3
    out_channels: int = 3
    sample_size: int = 512
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215  # 1 / standard deviation of the latents: the U-Net sees them at about 1

    def __post_init__(self):
        if any(width % self.norm_num_groups for width in self.block_out_channels):
            raise ValueError(f"norm_num_groups {self.norm_num_groups} must divide each of {self.block_out_channels}")

    @property
    def factor(self):
        """Pixels per latent, along one side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def named(cls, name):
        """The published shape of that name: sd (1 and 2) or sdxl."""
        if name not in VAES:
            raise UserError(f'no autoencoder "{name}"; there are {", ".join(VAES)}')
        return cls(**VAES[name])


VAES = {"sd": {}, "sdxl": {"sample_size": 1024, "scaling_factor": 0.13025}}


# ---- blocks both networks are made of --------------------------------------------------------


class ResBlock(nn.Module):
    """(B, i, h, w) → (B, o, h, w): x + conv(silu(norm(conv(silu(norm(x))) + what the time says)))."""

    def __init__(self, i, o, groups, eps, time=0):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, i, eps), nn.Conv2d(i, o, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, o, eps), nn.Conv2d(o, o, 3, padding=1)
        if time:
            self.time_emb_proj = nn.Linear(time, o)
        if i != o:
            self.conv_shortcut = nn.Conv2d(i, o, 1)

    def forward(self, x, emb=None):
        h = self.conv1(F.silu(self.norm1(x)))
        if emb is not None:
            h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]  # one number a channel
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nn.Module):
    """Tokens x (B, N, D) look at themselves, or at the tokens of a context (B, M, D'). → (B, N, D)."""

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
    """The autoencoder's only attention: every position of (B, D, h, w) looks at every other, one head."""

    def __init__(self, width, groups):
        super().__init__(width, 1, bias=True)
        self.group_norm = nn.GroupNorm(groups, width, eps=1e-6)

    def forward(self, x, context=None):
        h = super().forward(rearrange(self.group_norm(x), "b d h w -> b (h w) d"))
        return x + rearrange(h, "b (h w) d -> b d h w", h=x.shape[2])


class GEGLU(nn.Module):
    """A gated layer (Shazeer 2020): the second half of the projection, through gelu, gates the first."""

    def __init__(self, i, o):
        super().__init__()
        self.proj = nn.Linear(i, 2 * o)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Tokens of the picture look at each other, then at the prompt, then think by themselves."""

    def __init__(self, width, heads, context_width):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.attn2 = nn.LayerNorm(width), Attention(width, heads, context_width)
        self.norm3 = nn.LayerNorm(width)
        net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))  # [1] was dropout
        self.ff = nn.ModuleDict({"net": net})

    def forward(self, x, context):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff["net"](self.norm3(x))


class SpatialTransformer(nn.Module):
    """(B, D, h, w), with a context (B, M, D') → (B, D, h, w): the positions become h·w tokens, and come back."""

    def __init__(self, width, heads, depth, c):
        super().__init__()
        self.norm = nn.GroupNorm(c.norm_num_groups, width, eps=1e-6)
        project = nn.Linear if c.use_linear_projection else lambda i, o: nn.Conv2d(i, o, 1)
        self.proj_in, self.proj_out = project(width, width), project(width, width)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, heads, c.cross_attention_dim) for _ in range(depth)
        )

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
    def __init__(self, width, padding):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=padding)

    def forward(self, x):
        if self.conv.padding == (0, 0):
            x = F.pad(x, (0, 1, 0, 1))  # the autoencoder's: only right and below
        return self.conv(x)


class Upsample(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x, size):
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution; where there are, an attention after each, and the way to the next."""

    def __init__(self, resnets, attentions=(), down=None, up=None):
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(resnets), nn.ModuleList(attentions)
        if down:
            self.downsamplers = nn.ModuleList([down])  # published as a list of one
        if up:
            self.upsamplers = nn.ModuleList([up])

    def forward(self, x, n, emb=None, context=None):
        """Residual block n and its attention."""
        x = self.resnets[n](x, emb)
        return self.attentions[n](x, context) if n < len(self.attentions) else x

    def forward_all(self, x):
        """All of them, for the autoencoder, which knows no time and no text."""
        for n in range(len(self.resnets)):
            x = self(x, n)
        return x


# ---- the U-Net -------------------------------------------------------------------------------


def sinusoids(t, dim):
    """t (B,), whole or not → (B, dim) float32: cosines, then sines, of wavelengths 2π to 2π·10000."""
    half = dim // 2
    frequency = torch.exp(-math.log(10000) / half * torch.arange(half, device=t.device, dtype=torch.float32))
    angles = t.float()[:, None] * frequency  # (B, dim/2)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class VectorMLP(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(i, o), nn.Linear(o, o)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


class UNet(nn.Module):
    """(noisy latents, time, context) → what the schedule calls the prediction: ε, v or x0.

    Down to smaller and wider grids and up again; every step up also gets what the way down left at that size.
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.activation_checkpointing = False  # recompute each block in the backward pass, to save memory
        widths, layers, last = c.block_out_channels, c.layers_per_block, len(c.block_out_channels) - 1
        time, groups, eps = 4 * widths[0], c.norm_num_groups, 1e-5

        def resnet(i, o):
            return ResBlock(i, o, groups, eps, time)

        def attentions(level, count):
            o, heads, depth = widths[level], c.heads[level], c.depth[level]
            return [SpatialTransformer(o, heads, depth, c) for _ in range(count if depth else 0)]

        self.time_embedding = VectorMLP(widths[0], time)
        if c.addition_time_embed_dim:
            self.add_embedding = VectorMLP(c.projection_class_embeddings_input_dim, time)
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)

        self.down_blocks, x, skips = nn.ModuleList(), widths[0], [widths[0]]
        for n, o in enumerate(widths):
            resnets = [resnet(x if k == 0 else o, o) for k in range(layers)]
            down = Downsample(o, padding=1) if n < last else None
            self.down_blocks.append(Level(resnets, attentions(n, layers), down))
            x, skips = o, skips + [o] * (layers + (n < last))

        self.mid_block = Level([resnet(x, x), resnet(x, x)], [SpatialTransformer(x, c.heads[last], c.mid_depth, c)])

        self.up_blocks = nn.ModuleList()
        for n, o in reversed(list(enumerate(widths))):
            resnets = [resnet((x if k == 0 else o) + skips.pop(), o) for k in range(layers + 1)]
            self.up_blocks.append(Level(resnets, attentions(n, layers + 1), up=Upsample(o) if n > 0 else None))
            x = o
        self.conv_norm_out = nn.GroupNorm(groups, x, eps)
        self.conv_out = nn.Conv2d(x, c.out_channels, 3, padding=1)

        # As in the published training code, every residual branch starts out as nothing, and the prediction too.
        for module in self.modules():
            for name in ("conv2", "proj_out", "conv_out"):
                if hasattr(module, name):
                    nn.init.zeros_(getattr(module, name).weight)
                    nn.init.zeros_(getattr(module, name).bias)

    def forward(self, latents, t, context, text_embeds=None, time_ids=None):
        """latents (B, C, h, w), t a number or (B,), context (B, M, D) → prediction (B, C, h, w).

        SDXL: text_embeds (B, P), the pooled prompt, and time_ids (B, 6): height and width of the original picture,
        top and left of the crop, height and width wanted.
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
        """t (B,), and SDXL's two → (B, 4·width): what every residual block is told."""
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
        # Not only while training: the gradient may have to pass through a U-Net that is itself frozen.
        if self.activation_checkpointing and torch.is_grad_enabled():
            return recompute(level, *inputs, use_reentrant=False)
        return level(*inputs)

    # -- published files --

    @classmethod
    def from_pretrained(cls, path, dtype=None, device="cpu", config=None):
        """A U-Net from a diffusers folder (its own or a pipeline's) or a single file; `dtype` None: as stored.

        A single file says nothing of its heads: unless it is one of the published sizes, give its UNetConfig.
        """
        path = part_of(path, "unet")
        tensors = checkpoint.read_tensors(path)
        if path.is_dir():
            config = unet_config_from_diffusers(checkpoint.read_json(path / "config.json"), path / "config.json")
        else:
            tensors = under(tensors, "model.diffusion_model.", path)
            config = config or UNetConfig.named(published_unet(tensors, path))
            tensors = renamed(tensors, unet_names(config))
        with torch.device("meta"):
            model = cls(config)
        return checkpoint.load_into(model, tensors, path, dtype, device).eval()

    def save_pretrained(self, path):
        """Writes config.json and diffusion_pytorch_model.safetensors, as diffusers' UNet2DConditionModel has them."""
        save_part(self, unet_config_to_diffusers(self.config), path)


# ---- the autoencoder -------------------------------------------------------------------------


class Encoder(nn.Module):
    """images (B, 3, H, W) → (B, 2·z, h, w)."""

    def __init__(self, c):
        super().__init__()
        widths, groups = c.block_out_channels, c.norm_num_groups
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        self.down_blocks, x = nn.ModuleList(), widths[0]
        for n, o in enumerate(widths):
            resnets = [ResBlock(x if k == 0 else o, o, groups, 1e-6) for k in range(c.layers_per_block)]
            self.down_blocks.append(Level(resnets, down=Downsample(o, 0) if n + 1 < len(widths) else None))
            x = o
        self.mid_block = Level([ResBlock(x, x, groups, 1e-6) for _ in range(2)], [PixelAttention(x, groups)])
        self.conv_norm_out = nn.GroupNorm(groups, x, eps=1e-6)
        self.conv_out = nn.Conv2d(x, 2 * c.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level.forward_all(x)
            if hasattr(level, "downsamplers"):
                x = level.downsamplers[0](x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block.forward_all(x))))


class Decoder(nn.Module):
    """(B, z, h, w) → images (B, 3, H, W)."""

    def __init__(self, c):
        super().__init__()
        widths, groups = c.block_out_channels[::-1], c.norm_num_groups
        x = widths[0]
        self.conv_in = nn.Conv2d(c.latent_channels, x, 3, padding=1)
        self.mid_block = Level([ResBlock(x, x, groups, 1e-6) for _ in range(2)], [PixelAttention(x, groups)])
        self.up_blocks = nn.ModuleList()
        for n, o in enumerate(widths):
            resnets = [ResBlock(x if k == 0 else o, o, groups, 1e-6) for k in range(c.layers_per_block + 1)]
            self.up_blocks.append(Level(resnets, up=Upsample(o) if n + 1 < len(widths) else None))
            x = o
        self.conv_norm_out = nn.GroupNorm(groups, x, eps=1e-6)
        self.conv_out = nn.Conv2d(x, c.out_channels, 3, padding=1)

    def forward(self, x):
        x = self.mid_block.forward_all(self.conv_in(x))
        for level in self.up_blocks:
            x = level.forward_all(x)
            if hasattr(level, "upsamplers"):
                x = level.upsamplers[0](x, (2 * x.shape[2], 2 * x.shape[3]))
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """images ⇄ latents; each image becomes a normal distribution over latents (Kingma & Welling 2014)."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        self.quant_conv = nn.Conv2d(2 * c.latent_channels, 2 * c.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(c.latent_channels, c.latent_channels, 1)

    def encode(self, images):
        """images (B, 3, H, W) in [-1, 1] → (mean, log of the variance), each (B, z, H/factor, W/factor), not scaled."""
        if images.shape[-1] % self.config.factor or images.shape[-2] % self.config.factor:
            raise UserError(
                f"a picture of {images.shape[-1]}×{images.shape[-2]} has no whole number of latents: "
                f"its sides must be multiples of {self.config.factor}"
            )
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, latents):
        """latents (B, z, h, w), not scaled → images (B, 3, H, W) around [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(latents))

    def forward(self, images, noise=None):
        """images in [-1, 1], noise (B, z, h, w) ~ N(0, 1) or None for the mean → (reconstruction, mean, logvar)."""
        mean, logvar = self.encode(images)
        return self.decode(mean if noise is None else reparameterize(mean, logvar, noise)), mean, logvar

    @classmethod
    def from_pretrained(cls, path, dtype=None, device="cpu", config=None):
        """An autoencoder from a diffusers folder (its own or a pipeline's) or a single file; `dtype` None: as stored.

        A single file says nothing of its scaling factor; without `config` it is taken to be SD 1's and 2's.
        """
        path = part_of(path, "vae")
        tensors = checkpoint.read_tensors(path)
        if path.is_dir():
            config = vae_config_from_diffusers(checkpoint.read_json(path / "config.json"), path / "config.json")
        else:
            tensors = under(tensors, "first_stage_model.", path)
            config = config or AutoencoderKLConfig()
        tensors = renamed(tensors, vae_names(config))
        # attention as 1×1 convolutions in single files, as linear layers in diffusers': (D, D, 1, 1) → (D, D)
        tensors = {k: v.flatten(1) if ".attentions." in k and v.ndim == 4 else v for k, v in tensors.items()}
        with torch.device("meta"):
            model = cls(config)
        return checkpoint.load_into(model, tensors, path, dtype, device).eval()

    def save_pretrained(self, path):
        """Writes config.json and diffusion_pytorch_model.safetensors, as diffusers' AutoencoderKL has them."""
        save_part(self, vae_config_to_diffusers(self.config), path)


def reparameterize(mean, logvar, noise):
    """A sample of the distribution that encode() gave, made of noise ~ N(0, 1): gradients reach mean and logvar."""
    return mean + (logvar / 2).exp() * noise


def kl_divergence(mean, logvar):
    """KL(N(mean, e^logvar) ‖ N(0, 1)), summed over each picture's latents, mean over the batch. Published weight: 1e-6
    beside a reconstruction error that is summed over pixels too."""
    return 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()


@dataclass(frozen=True)
class AutoencoderLoss:
    """Weights of the terms, each divided by how many numbers a picture has: l1·|x-x̂| + l2·(x-x̂)² + kl·KL."""

    l1: float = 1.0
    l2: float = 0.0
    kl: float = 1e-6

    def __call__(self, images, reconstruction, mean, logvar):
        """→ the loss, {"nll", "kl"}; images and reconstruction (B, 3, H, W) in [-1, 1]."""
        error = (reconstruction.float() - images).abs()
        nll = (self.l1 * error + self.l2 * error**2).mean()
        kl = kl_divergence(mean.float(), logvar.float()) / images[0].numel()
        return nll + self.kl * kl, {"nll": nll, "kl": kl}


# ---- the noise schedule ----------------------------------------------------------------------

SPACINGS = ("", "leading", "linspace", "trailing")


@dataclass(frozen=True)
class NoiseSchedule:
    """How much noise there is at each time t in 0..T-1, and what the U-Net predicts. The defaults are SD 1.5's.

    `alphas_cumprod` (T,) holds ᾱ, float32 and computed as published: x_t = √ᾱ_t·x0 + √(1-ᾱ_t)·ε. The fields are those
    of scheduler_config.json; "squaredcos_cap_v2" is the cosine schedule, "sample" the prediction of x0.
    """

    num_train_timesteps: int = 1000  # T
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"  # linear | scaled_linear | squaredcos_cap_v2
    prediction_type: str = "epsilon"  # epsilon | v_prediction | sample
    rescale_betas_zero_snr: bool = False  # nothing of the picture is left at T-1: dark and bright ones can be drawn
    timestep_spacing: str = ""  # which times a sampler visits; "": its own published choice
    steps_offset: int = 1  # added to "leading" times
    set_alpha_to_one: bool = False  # DDIM's last step goes to ᾱ = 1 (true), or only to ᾱ_0 (false)

    def __post_init__(self):
        T, first, last = self.num_train_timesteps, self.beta_start, self.beta_end
        if self.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f'prediction_type "{self.prediction_type}" must be epsilon, v_prediction or sample')
        if self.timestep_spacing not in SPACINGS:
            raise ValueError(f'timestep_spacing "{self.timestep_spacing}" must be leading, linspace or trailing')
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError("with rescale_betas_zero_snr the last ε says nothing: predict v_prediction or sample")
        if self.beta_schedule == "linear":  # Ho et al. 2020
            betas = torch.linspace(first, last, T, dtype=torch.float32, device="cpu")
        elif self.beta_schedule == "scaled_linear":  # latent diffusion: linear in √β
            betas = torch.linspace(first**0.5, last**0.5, T, dtype=torch.float32, device="cpu") ** 2
        elif self.beta_schedule == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, eq. 17
            f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]
            betas = torch.tensor([min(1 - f[t + 1] / f[t], 0.999) for t in range(T)], device="cpu")
        else:
            raise ValueError(f'beta_schedule "{self.beta_schedule}" must be linear, scaled_linear or squaredcos_cap_v2')
        alphas_cumprod = (1 - betas).cumprod(0)
        if self.rescale_betas_zero_snr:  # Lin et al. 2023, algorithm 1: move √ᾱ so that the last is 0, the first stays
            root = alphas_cumprod.sqrt()
            alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        object.__setattr__(self, "alphas_cumprod", alphas_cumprod)

    @classmethod
    def from_config(cls, saved, path="scheduler_config.json"):
        """A diffusers scheduler_config.json (a dict) as a schedule: any of our samplers may then follow it."""
        if saved.get("_class_name") not in SCHEDULERS:
            raise UserError(f"{path}: {saved.get('_class_name')} is not supported; {', '.join(SCHEDULERS)} are")
        unsupported(saved, SCHEDULER_FIXED, path)
        # what diffusers takes where the file is silent
        fields = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
        fields |= {"steps_offset": 0, "set_alpha_to_one": True}
        fields |= {f.name: saved[f.name] for f in dataclasses.fields(cls) if saved.get(f.name) is not None}
        return settings.build(cls, fields, str(path))

    def to_config(self):
        """What scheduler_config.json says of this schedule."""
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k != "timestep_spacing" or v}
        return {"_class_name": "DDIMScheduler"} | fields | {"clip_sample": False, "trained_betas": None}

    # -- training --

    def alpha_sigma(self, t, like):
        """α_t and σ_t for t (B,) or one number, shaped to multiply `like` (B, …)."""
        a = self.alphas_cumprod.to(like.device)[t]
        a = a.view(-1, *[1] * (like.ndim - 1)) if a.ndim else a
        return a.sqrt(), (1 - a).sqrt()

    def add_noise(self, x0, noise, t):
        """x_t = α·x0 + σ·ε (Ho et al. 2020, eq. 4); t (B,) int64, or one for all."""
        alpha, sigma = self.alpha_sigma(t, x0)
        return alpha * x0 + sigma * noise

    def target(self, x0, noise, t):
        """What the U-Net should predict from x_t: ε, v = α·ε - σ·x0 (Salimans & Ho 2022), or x0."""
        alpha, sigma = self.alpha_sigma(t, x0)
        return {"epsilon": noise, "v_prediction": alpha * noise - sigma * x0, "sample": x0}[self.prediction_type]

    def loss_weight(self, t, gamma):
        """Min-SNR weights (Hang et al. 2023) for t (B,): as though the error of x0 counted min(SNR, γ) times."""
        a = self.alphas_cumprod.to(t.device)[t]
        snr = a / (1 - a)
        # the squared errors of ε and v are SNR and SNR + 1 times that of x0
        return snr.clamp(max=gamma) / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[self.prediction_type]

    # -- drawing --

    def x0_and_noise(self, prediction, x, a):
        """What the prediction says of x = √ᾱ·x0 + √(1-ᾱ)·ε: (x0, ε); `a` is ᾱ, one number."""
        alpha, sigma = a.sqrt(), (1 - a).sqrt()
        if self.prediction_type == "epsilon":
            return (x - sigma * prediction) / alpha, prediction
        if self.prediction_type == "v_prediction":
            return alpha * x - sigma * prediction, alpha * prediction + sigma * x
        return prediction, (x - alpha * prediction) / sigma

    def timesteps(self, steps, spacing, strength=1.0, skip_last=False):
        """The times a sampler visits, falling, as float64; `spacing` is its own choice, if the schedule makes none.

        strength below 1 keeps only the last so many (image to image); `skip_last` divides the time into one step
        more and leaves the last out, as DPM-Solver++'s published code does.
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


def diffusion_loss(
    unet, schedule, latents, noise, t, context, text_embeds=None, time_ids=None, min_snr=0.0, perturbation=0.0
):
    """E‖target - prediction‖² over noised latents (Ho et al. 2020, eq. 14), in float32. → a scalar

    latents, noise (B, C, h, w), scaled; t (B,) int64 in 0..T-1; `unet`: anything called as a UNet is. min_snr: γ of
    the min-SNR weights, published 5; 0: every time counts the same. perturbation (B, C, h, w): more noise, that the
    U-Net is not told of (Ning et al. 2023: 0.1 · N(0, 1)), so that it learns to mend its own mistakes.
    """
    noised = schedule.add_noise(latents, noise + perturbation, t)
    prediction = unet(noised, t, context, text_embeds, time_ids)
    errors = (prediction.float() - schedule.target(latents, noise, t).float()).pow(2).mean((1, 2, 3))  # (B,)
    return (errors * schedule.loss_weight(t, min_snr)).mean() if min_snr else errors.mean()


def offset_noise(noise, draws, strength):
    """noise (B, C, h, w) + strength · draws (B, C, 1, 1), both ~ N(0, 1): each channel's brightness is noised as well,
    so that it is learned (Guttenberg 2023, published strength 0.1)."""
    return noise + strength * draws


# ---- samplers --------------------------------------------------------------------------------
# Each is a generator: it yields x after every step, and the last x is the drawing. They share their arguments:
#   predict(x, t) → prediction       the U-Net, its conditioning and guidance
#   noise() → N(0, 1) like x          the noise to start from, then that of each step where the algorithm adds some
#   image, strength                  image to image: latents to start from, and the share of the way they are noised


def sample_ddpm(predict, schedule, steps, noise, image=None, strength=1.0):
    """Ancestral sampling (Ho et al. 2020, algorithm 2), with the posterior's own variance (eq. 7)."""
    times = schedule.timesteps(steps, "leading", strength).round().long()
    x = noise() if image is None else schedule.add_noise(image, noise(), times[0])
    abar = torch.cat((schedule.alphas_cumprod[times], torch.ones(1)))
    for t, a, a_next in zip(times, abar[:-1], abar[1:], strict=True):
        x0, _ = schedule.x0_and_noise(predict(x, t), x, a)
        alpha = a / a_next  # α_t of the paper, for this one step
        mean = (a_next.sqrt() * (1 - alpha) * x0 + alpha.sqrt() * (1 - a_next) * x) / (1 - a)
        variance = (1 - a_next) / (1 - a) * (1 - alpha)
        x = mean + variance.sqrt() * noise()
        yield x


def sample_ddim(predict, schedule, steps, noise, image=None, strength=1.0):
    """Denoising diffusion implicit models (Song et al. 2021, eq. 12 with η = 0): no noise but the first. Order 1."""
    times = schedule.timesteps(steps, "leading", strength).round().long()
    x = noise() if image is None else schedule.add_noise(image, noise(), times[0])
    last = torch.ones(1) if schedule.set_alpha_to_one else schedule.alphas_cumprod[:1]
    abar = torch.cat((schedule.alphas_cumprod[times], last))
    for t, a, a_next in zip(times, abar[:-1], abar[1:], strict=True):
        x0, epsilon = schedule.x0_and_noise(predict(x, t), x, a)
        x = a_next.sqrt() * x0 + (1 - a_next).sqrt() * epsilon
        yield x


def sample_dpmpp_2m(predict, schedule, steps, noise, image=None, strength=1.0):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): remembers the last x0 to see where it is heading. Order 2."""
    times = schedule.timesteps(steps, "linspace", strength, skip_last=True).round().long()
    x = noise() if image is None else schedule.add_noise(image, noise(), times[0])
    abar = torch.cat((schedule.alphas_cumprod[times], torch.ones(1)))
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    lambdas = (alpha / sigma).log()  # the last is infinite: no noise left
    before = None
    for i, t in enumerate(times):
        x0, _ = schedule.x0_and_noise(predict(x, t), x, abar[i])
        h = lambdas[i + 1] - lambdas[i]
        d = x0
        if before is not None and i < len(times) - 1:  # at the last one h is infinite, and r would be 0
            r = (lambdas[i] - lambdas[i - 1]) / h
            d = x0 + (x0 - before) / (2 * r)
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * torch.expm1(-h) * d
        before = x0
        yield x


def sample_euler(predict, schedule, steps, noise, image=None, strength=1.0, ancestral=False):
    """Euler's method on dx/dσ' = ε, where x = x0 + σ'·ε and σ' = σ/α (Karras et al. 2022, algorithm 1
    without its second half, the correction). Order 1.

    x lives on that scale, at SD's last time 15 times larger than the other samplers', with zero SNR 4096 times; the
    U-Net still sees x·α.
    """
    T, times = schedule.num_train_timesteps, schedule.timesteps(steps, "linspace", strength)
    abar = schedule.alphas_cumprod.clamp(min=2**-24)  # zero-SNR schedules: σ' stays finite
    table = ((1 - abar) / abar).sqrt()  # (T,)
    whole = times.floor().long()  # between whole times, σ' is interpolated
    sigmas = torch.lerp(table[whole], table[(whole + 1).clamp(max=T - 1)], (times - whole).float())
    sigmas = torch.cat((sigmas, torch.zeros(1)))
    if image is not None:
        x = image + sigmas[0] * noise()
    else:  # as published: √(σ'²+1) where the times start below T - 1
        leading = schedule.timestep_spacing == "leading"
        x = noise() * ((sigmas[0] ** 2 + 1).sqrt() if leading else sigmas[0])
    for t, s, s_next in zip(times, sigmas[:-1], sigmas[1:], strict=True):
        a = 1 / (s**2 + 1)  # ᾱ
        _, epsilon = schedule.x0_and_noise(predict(a.sqrt() * x, t), a.sqrt() * x, a)
        up = (s_next**2 * (s**2 - s_next**2) / s**2).sqrt() if ancestral else torch.zeros(())
        x = x + epsilon * ((s_next**2 - up**2).sqrt() - s)
        if ancestral:
            x = x + up * noise()
        yield x


def sample_euler_ancestral(predict, schedule, steps, noise, image=None, strength=1.0):
    """Euler's method, but each step goes further down and adds noise back (Crowson's k-diffusion, `euler_a`)."""
    yield from sample_euler(predict, schedule, steps, noise, image, strength, ancestral=True)


SAMPLERS = {
    "ddpm": sample_ddpm,
    "ddim": sample_ddim,
    "dpmpp_2m": sample_dpmpp_2m,
    "euler": sample_euler,
    "euler_ancestral": sample_euler_ancestral,
}


def classifier_free_guidance(conditional, unconditional, scale, rescale=0.0):
    """Classifier-free guidance (Ho & Salimans 2022): away from what would be drawn without the prompt.

    rescale in [0, 1] takes back, by so much, the contrast that guidance adds (Lin et al. 2023, eqs. 15-16).
    """
    guided = unconditional + scale * (conditional - unconditional)
    if rescale:
        ratio = conditional.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
        guided = guided * (rescale * ratio + 1 - rescale)
    return guided


# ---- the whole: text → picture ---------------------------------------------------------------


class Conditioning(NamedTuple):
    """What steers the U-Net: context (B, M, D); for SDXL also the pooled prompt (B, P)."""

    context: torch.Tensor
    text_embeds: torch.Tensor | None = None


class LossNoise(NamedTuple):
    """The chance in the loss of M pictures, in the order in which the published code draws it."""

    sample: torch.Tensor  # (M, C, h, w) ~ N(0, 1): of the autoencoder's distribution
    noise: torch.Tensor  # (M, C, h, w) ~ N(0, 1): what the U-Net is to find
    offset: torch.Tensor  # (M, C, 1, 1) ~ N(0, 1)
    perturbation: torch.Tensor  # (M, C, h, w) ~ N(0, 1)
    t: torch.Tensor  # (M,) int64 in 0..T-1
    drop: torch.Tensor  # (M,) in [0, 1): DreamLLM drops a picture's conditioning where it is below config.drop


class LatentDiffusion(nn.Module):
    """A U-Net, an autoencoder, a schedule, and the text encoder (two for SDXL, as a list; None: bring conditioning)."""

    def __init__(self, unet, vae, schedule, text_encoder=None):
        super().__init__()
        self.unet, self.vae, self.schedule = unet, vae, schedule
        encoders = [] if text_encoder is None else text_encoder if isinstance(text_encoder, list) else [text_encoder]
        self.text_encoders = nn.ModuleList(encoders)
        if vae.quant_conv.weight.dtype == torch.float16:
            vae.float()  # the published autoencoders overflow in float16

    def encode_text(self, texts):
        """texts (a list of B) → Conditioning.

        One encoder (SD 1 and 2): its last layer, after the final norm. Two (SDXL): the penultimate layers of both, no
        norm, side by side, and the second's pooled projection. SD 2 learned from the penultimate layer too: its
        published text encoder ends there.
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

    def to_latents(self, images, noise=None):
        """images (B, 3, H, W) in [0, 1] → scaled latents: a sample made of noise ~ N(0, 1), or the mean."""
        weight = self.vae.quant_conv.weight
        mean, logvar = (x.float() for x in self.vae.encode((2 * images - 1).to(weight.device, weight.dtype)))
        return (mean if noise is None else reparameterize(mean, logvar, noise)) * self.vae.config.scaling_factor

    def loss_noise(self, count, height, width, generator=None):
        """Chance for `count` pictures of height × width pixels."""
        c, device = self.vae.config, self.unet.conv_in.weight.device
        shape = (count, c.latent_channels, height // c.factor, width // c.factor)
        sample, noise, perturbation = torch.randn(3, *shape, generator=generator).to(device)
        offset = torch.randn(*shape[:2], 1, 1, generator=generator).to(device)
        t = torch.randint(self.schedule.num_train_timesteps, (count,), generator=generator).to(device)
        return LossNoise(sample, noise, offset, perturbation, t, torch.rand(count, generator=generator).to(device))

    def loss(self, images, context, draws, min_snr=0.0, offset=0.0, perturbation=0.0):
        """images (M, 3, H, W) in [0, 1], context (M, L, D) → diffusion_loss: what DreamLLM asks of it.

        Frozen weights let the gradient through to `context`. offset, perturbation: see offset_noise, diffusion_loss.
        """
        x0 = self.to_latents(images, draws.sample)
        noise = offset_noise(draws.noise, draws.offset, offset)
        extra = perturbation * draws.perturbation
        return diffusion_loss(
            self.unet, self.schedule, x0, noise, draws.t, context, min_snr=min_snr, perturbation=extra
        )

    def to_images(self, latents):
        """Scaled latents (B, C, h, w) → images (B, 3, H, W) in [0, 1], float32."""
        z = (latents / self.vae.config.scaling_factor).to(self.vae.quant_conv.weight.dtype)
        return (self.vae.decode(z).float() / 2 + 0.5).clamp(0, 1)

    @torch.inference_mode()
    def generate(
        self,
        prompts,
        negative=None,
        guidance=7.5,
        steps=50,
        sampler="ddim",
        size=None,
        seed=None,
        noise=None,
        image=None,
        strength=0.8,
        rescale=0.0,
        progress=False,
    ):
        """prompts (texts, context (B, M, D) or a Conditioning) → images (B, 3, H, W) in [0, 1].

        negative: what to move away from, in the same forms, one or B; None is the empty text (SDXL: zeros).
        guidance: 1 for none; one pass of the U-Net a step instead of two. size: pixels, a side or (height, width).
        seed: picture i draws from seed + i, so that it is the same in any batch; or noise() → (B, C, h, w) ~ N(0, 1).
        image (B, 3, H, W) in [0, 1]: start from it instead of from noise; strength 1 leaves nothing of it.
        """
        if sampler not in SAMPLERS:
            raise UserError(f'no sampler "{sampler}"; there are {", ".join(SAMPLERS)}')
        weight, factor = self.unet.conv_in.weight, self.vae.config.factor
        context, text_embeds = self.to_conditioning(prompts)
        count = len(context)
        if image is not None:
            height, width = image.shape[2:]
        else:
            size = size or self.unet.config.sample_size * factor
            height, width = (size, size) if isinstance(size, int) else size
        if height % factor or width % factor:
            raise UserError(f"pictures of {width}×{height}: sides must be multiples of {factor}")

        if guidance != 1:
            if negative is None and text_embeds is not None:
                without = Conditioning(torch.zeros_like(context), torch.zeros_like(text_embeds))
            else:
                without = self.to_conditioning("" if negative is None else negative)
                if (without.text_embeds is None) != (text_embeds is None):
                    raise UserError(
                        "negative must be of the form of the prompts: for SDXL texts, or a whole Conditioning"
                    )
            context = torch.cat((without.context.expand_as(context), context))  # (2B, M, D), without first
            if text_embeds is not None:
                text_embeds = torch.cat((without.text_embeds.expand_as(text_embeds), text_embeds))
        context = context.to(weight)
        time_ids = None
        if text_embeds is not None:
            text_embeds = text_embeds.to(weight)
            sizes = [height, width, 0, 0, height, width]
            time_ids = torch.tensor([sizes] * len(context), device=weight.device)

        def predict(x, t):
            if guidance == 1:
                return self.unet(x.to(weight), t, context, text_embeds, time_ids).float()
            prediction = self.unet(torch.cat((x, x)).to(weight), t, context, text_embeds, time_ids)
            without, with_ = prediction.float().chunk(2)
            return classifier_free_guidance(with_, without, guidance, rescale)

        if noise is None:
            shape = (self.vae.config.latent_channels, height // factor, width // factor)
            draws = [torch.Generator() for _ in range(count)]  # on the CPU: the same noise for every device
            for i, generator in enumerate(draws):
                generator.seed() if seed is None else generator.manual_seed(seed + i)

            def noise():
                return torch.stack([torch.randn(shape, generator=g) for g in draws]).to(weight.device)

        start = () if image is None else (self.to_latents(image.expand(count, -1, -1, -1)), strength)
        drawing = SAMPLERS[sampler](predict, self.schedule, steps, noise, *start)
        for x in tqdm(drawing, total=steps, disable=not progress):
            if not x.isfinite().all():
                raise UserError("the U-Net gave NaN or infinity: try float32 or bfloat16")
        return self.to_images(x)

    # -- published files --

    @classmethod
    def from_pretrained(cls, path, text_encoder=None, dtype=None, device="cpu", config=None):
        """Latent diffusion from a diffusers pipeline folder or a single file (.safetensors, .ckpt) of SD 1, 2, XL.

        text_encoder: what reads the prompts, as the class takes it: clip.text_encoders(path). config, for single files:
        the YAML or JSON its code base keeps of it (a path, or its content as a dict), needed where shapes don't decide.
        """
        path = checkpoint.weights_folder(path)
        if path.is_file():
            return cls.from_single_file(path, text_encoder, dtype, device, config)
        for name in ("unet", "vae", "scheduler"):
            if not (path / name).is_dir():
                raise UserError(f"{path}: has no folder {name}/, so it is no diffusers pipeline")
        saved = path / "scheduler" / "scheduler_config.json"
        schedule = NoiseSchedule.from_config(checkpoint.read_json(saved), saved)
        unet = UNet.from_pretrained(path / "unet", dtype, device)
        vae = AutoencoderKL.from_pretrained(path / "vae", dtype, device)
        return cls(unet, vae, schedule, text_encoder)

    @classmethod
    def from_single_file(cls, path, text_encoder=None, dtype=None, device="cpu", config=None):
        """See from_pretrained; a config of the same name beside the file is found. Averaged weights are left aside."""
        tensors = checkpoint.read_tensors(path)
        beside = (path.with_suffix(ending) for ending in (".yaml", ".json"))
        config = config or next((file for file in beside if file.exists()), None)
        for name in tensors:
            if not name.startswith(("model.diffusion_model.", "first_stage_model.", *ASIDE)):
                raise UserError(f"{path}: {name} belongs to no part of a latent diffusion model")
        if config:
            unet_config, vae_config, schedule = original_config(config)
        else:
            name = published_unet(under(tensors, "model.diffusion_model.", path), path)
            if name == "sd21":
                raise UserError(f"{path}: SD 2.1 (v) and 2.1-base (ε) have the same shapes: name its YAML with config=")
            xl = name == "sdxl"
            unet_config, vae_config = UNetConfig.named(name), AutoencoderKLConfig.named("sdxl" if xl else "sd")
            schedule = NoiseSchedule(timestep_spacing="leading" if xl else "")
        unet = UNet.from_pretrained(path, dtype, device, unet_config)
        vae = AutoencoderKL.from_pretrained(path, dtype, device, vae_config)
        return cls(unet, vae, schedule, text_encoder)

    @classmethod
    def from_tensors(cls, tensors, path, dtype=None, device="cpu"):
        """The same, without a text encoder, from tensors named unet.… and vae.…; `path`: a folder of their configs."""
        path = Path(path)
        unet_file, vae_file = (path / name / "config.json" for name in ("unet", "vae"))
        with torch.device("meta"):
            unet = UNet(unet_config_from_diffusers(checkpoint.read_json(unet_file), unet_file))
            vae = AutoencoderKL(vae_config_from_diffusers(checkpoint.read_json(vae_file), vae_file))
        own = {name: {} for name in ("unet", "vae")}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            if part not in own:
                raise UserError(f"{path}: {name} belongs to no part of a latent diffusion model")
            own[part][rest] = tensor
        checkpoint.load_into(unet, own["unet"], path, dtype, device).eval()
        checkpoint.load_into(vae, renamed(own["vae"], vae_names(vae.config)), path, dtype, device).eval()
        saved = path / "scheduler" / "scheduler_config.json"
        return cls(unet, vae, NoiseSchedule.from_config(checkpoint.read_json(saved), saved))

    def save_configs(self, path):
        """Of a pipeline folder, what says what the weights are: the other half of from_tensors."""
        configs = {"unet": unet_config_to_diffusers(self.unet.config), "vae": vae_config_to_diffusers(self.vae.config)}
        for name, config in configs.items():
            checkpoint.write_text(Path(path) / name / "config.json", as_json(config))
        checkpoint.write_text(Path(path) / "scheduler" / "scheduler_config.json", as_json(self.schedule.to_config()))

    def save_pretrained(self, path):
        """Writes a diffusers pipeline folder; model_index.json last, so that it is there only when all else is."""
        path = Path(path)
        xl = bool(self.unet.config.addition_time_embed_dim)
        parts = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
        self.unet.save_pretrained(path / "unet")
        self.vae.save_pretrained(path / "vae")
        checkpoint.write_text(path / "scheduler" / "scheduler_config.json", as_json(self.schedule.to_config()))
        parts["scheduler"] = ["diffusers", "DDIMScheduler"]
        for n, number in enumerate(("", "_2") if xl else ("",)):
            there = n < len(self.text_encoders)
            if there:
                encoder = self.text_encoders[n]
                encoder.save_pretrained(path / f"text_encoder{number}")
                if encoder.tokenizer:
                    encoder.tokenizer.save_pretrained(path / f"tokenizer{number}", encoder.config.text.context_length)
            kind = "CLIPTextModelWithProjection" if number else "CLIPTextModel"
            parts[f"text_encoder{number}"] = ["transformers", kind] if there else [None, None]
            there = (path / f"tokenizer{number}").is_dir()
            parts[f"tokenizer{number}"] = ["transformers", "CLIPTokenizer"] if there else [None, None]
        if xl:
            index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
        else:
            index = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
            parts |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
        checkpoint.write_text(path / "model_index.json", as_json(index | parts))


def to_pil(images):
    """images (B, 3, H, W) in [0, 1] → a list of B Pillow pictures."""
    pictures = (images.float() * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)
    return [Image.fromarray(picture) for picture in pictures]


# ---- diffusers folders: config.json ⇄ our configurations -------------------------------------

# What our code does and their configuration could say otherwise: {key: the value we write and accept}.
# fmt: off
UNET_FIXED = {
    "act_fn": "silu", "attention_type": "default", "center_input_sample": False, "class_embed_type": None,
    "class_embeddings_concat": False, "conv_in_kernel": 3, "conv_out_kernel": 3, "cross_attention_norm": None,
    "downsample_padding": 1, "dropout": 0.0, "dual_cross_attention": False, "encoder_hid_dim": None,
    "encoder_hid_dim_type": None, "flip_sin_to_cos": True, "freq_shift": 0, "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-5,
    "num_class_embeds": None, "only_cross_attention": False, "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False, "resnet_time_scale_shift": "default", "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None, "time_embedding_act_fn": None, "time_embedding_dim": None,
    "time_embedding_type": "positional", "timestep_post_act": None,
}
VAE_FIXED = {
    "act_fn": "silu", "latents_mean": None, "latents_std": None, "mid_block_add_attention": True,
    "shift_factor": None, "use_post_quant_conv": True, "use_quant_conv": True,
}
SCHEDULER_FIXED = {
    "clip_sample": False, "thresholding": False, "trained_betas": None, "use_karras_sigmas": False,
    "variance_type": "fixed_small", "interpolation_type": "linear",
}
# fmt: on
KINDS = ("DDIM", "DDPM", "DPMSolverMultistep", "EulerAncestralDiscrete", "EulerDiscrete", "LMSDiscrete", "PNDM")
SCHEDULERS = tuple(f"{kind}Scheduler" for kind in KINDS)


def unsupported(saved, fixed, path):
    for key, value in fixed.items():
        if saved.get(key, value) not in (value, None):
            raise UserError(f"{path}: {key} is {saved[key]!r}; only {value!r} is supported")


def as_json(config):
    return json.dumps(config, indent=2) + "\n"


def save_part(model, config, path):
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(path / "config.json", as_json(config))
    checkpoint.write_tensors(path / "diffusion_pytorch_model.safetensors", model.state_dict())


def part_of(path, name):
    """`path`, or its folder `name` where it is a whole pipeline's."""
    path = checkpoint.weights_folder(path)
    return path / name if (path / name).is_dir() else path


def unet_config_from_diffusers(saved, path="config.json"):
    """A diffusers UNet2DConditionModel's config.json (a dict) as a UNetConfig."""
    if saved.get("_class_name") != "UNet2DConditionModel":
        raise UserError(f"{path}: _class_name is {saved.get('_class_name')!r}, expected 'UNet2DConditionModel'")
    unsupported(saved, UNET_FIXED, path)
    fields = {f.name: saved[f.name] for f in dataclasses.fields(UNetConfig) if saved.get(f.name) is not None}
    try:
        kinds, levels = saved["down_block_types"], len(saved["block_out_channels"])
        heads = saved.get("num_attention_heads") or saved["attention_head_dim"]  # a misnomer: it counts the heads
        up = saved["up_block_types"]
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]} is missing") from None
    depths = saved.get("transformer_layers_per_block") or 1
    heads, depths = (x if isinstance(x, list) else [x] * levels for x in (heads, depths))
    with_attention = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
    if set(kinds) - with_attention.keys() or up != [kind.replace("Down", "Up") for kind in reversed(kinds)]:
        raise UserError(f"{path}: levels of {kinds} and {up} are not supported")
    fields |= {"heads": heads, "mid_depth": depths[-1]}
    fields["depth"] = [depth if with_attention[kind] else 0 for kind, depth in zip(kinds, depths, strict=False)]
    kind = saved.get("addition_embed_type")
    if kind not in (None, "text_time"):
        raise UserError(f"{path}: addition_embed_type is {kind!r}; only 'text_time' is supported")
    return settings.build(UNetConfig, fields, str(path))


def unet_config_to_diffusers(c):
    kinds = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in c.depth]
    depths = [*(depth or 1 for depth in c.depth[:-1]), c.mid_depth]
    fields = dataclasses.asdict(c)
    for ours in ("depth", "mid_depth", "heads"):
        del fields[ours]
    # one number where all levels agree, as SD 1 and 2 have it
    fields["attention_head_dim"] = c.heads if len(set(c.heads)) > 1 else c.heads[0]
    fields["transformer_layers_per_block"] = depths if len(set(depths)) > 1 else depths[0]
    fields |= {"down_block_types": kinds, "up_block_types": [kind.replace("Down", "Up") for kind in reversed(kinds)]}
    fields["addition_embed_type"] = "text_time" if c.addition_time_embed_dim else None
    for name in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
        fields[name] = fields[name] or None
    return {"_class_name": "UNet2DConditionModel"} | fields | UNET_FIXED


def vae_config_from_diffusers(saved, path="config.json"):
    """A diffusers AutoencoderKL's config.json (a dict) as an AutoencoderKLConfig."""
    if saved.get("_class_name") != "AutoencoderKL":
        raise UserError(f"{path}: _class_name is {saved.get('_class_name')!r}, expected 'AutoencoderKL'")
    unsupported(saved, VAE_FIXED, path)
    kinds = {*saved.get("down_block_types", ()), *saved.get("up_block_types", ())}
    if odd := kinds - {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
        raise UserError(f"{path}: levels of {', '.join(odd)} are not supported")
    names = [f.name for f in dataclasses.fields(AutoencoderKLConfig)]
    return settings.build(AutoencoderKLConfig, {n: saved[n] for n in names if saved.get(n) is not None}, str(path))


def vae_config_to_diffusers(c):
    levels = len(c.block_out_channels)
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    return {"_class_name": "AutoencoderKL"} | dataclasses.asdict(c) | kinds | VAE_FIXED


# ---- single files: CompVis's and Stability's names → ours ------------------------------------

# Not the U-Net's nor the autoencoder's: averaged weights, text encoders, and tables that follow from the schedule.
ASIDE = ("model_ema.", "cond_stage_model.", "conditioner.", "denoiser.", "betas", "alphas_cumprod", "sqrt_")
ASIDE += ("log_one_minus_", "posterior_", "lvlb_weights", "logvar", "scale_factor")


def under(tensors, prefix, path):
    """The tensors whose names begin with `prefix`, which goes; all, where none does: a file of one part only."""
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    own = own or {k: v for k, v in tensors.items() if not k.startswith(("loss.", *ASIDE))}
    if not own:
        raise UserError(f"{path}: holds nothing named {prefix}…")
    return own


def renamed(tensors, names):
    """Every name whose beginning, up to a dot, is in `names` gets the new beginning; the longest one counts."""
    out = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        for n in range(len(parts), 0, -1):
            if (old := ".".join(parts[:n])) in names:
                name = names[old] + name[len(old) :]
                break
        out[name] = tensor
    return out


def unet_names(c):
    """{the beginning of a name in single files: ours}: they number the U-Net's blocks in the order they run."""
    names = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
    names |= {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}
    names |= {"input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"}
    resnets = {"middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1"}
    names["middle_block.1"] = "mid_block.attentions.0"
    n = 1
    for level in range(len(c.depth)):
        for k in range(c.layers_per_block):
            resnets[f"input_blocks.{n}.0"] = f"down_blocks.{level}.resnets.{k}"
            names[f"input_blocks.{n}.1"] = f"down_blocks.{level}.attentions.{k}"
            n += 1
        names[f"input_blocks.{n}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        n += 1
    n = 0
    for level, depth in enumerate(reversed(c.depth)):
        for k in range(c.layers_per_block + 1):
            resnets[f"output_blocks.{n}.0"] = f"up_blocks.{level}.resnets.{k}"
            names[f"output_blocks.{n}.1"] = f"up_blocks.{level}.attentions.{k}"
            n += 1
        names[f"output_blocks.{n - 1}.{2 if depth else 1}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    inside = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj"}
    inside |= {"out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}
    return names | {f"{a}.{k}": f"{b}.{v}" for a, b in resnets.items() for k, v in inside.items()}


def vae_names(c):
    """{the beginning of a name in single files, or in old diffusers folders: ours}."""
    names, last = {}, len(c.block_out_channels) - 1
    old = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    older = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    for side in ("encoder", "decoder"):
        attention = f"{side}.mid_block.attentions.0"
        names[f"{side}.norm_out"] = f"{side}.conv_norm_out"
        names |= {f"{side}.mid.block_{k + 1}": f"{side}.mid_block.resnets.{k}" for k in range(2)}
        names |= {f"{side}.mid.attn_1.{k}": f"{attention}.{v}" for k, v in old.items()}
        names |= {f"{attention}.{k}": f"{attention}.{v}" for k, v in older.items()}
    for n in range(last + 1):
        # their decoder's level 0 is the largest grid, though it runs last; ours runs first
        pairs = {f"encoder.down.{n}": f"encoder.down_blocks.{n}", f"decoder.up.{n}": f"decoder.up_blocks.{last - n}"}
        for theirs, ours in pairs.items():
            for k in range(c.layers_per_block + 1):
                names[f"{theirs}.block.{k}"] = f"{ours}.resnets.{k}"
                names[f"{theirs}.block.{k}.nin_shortcut"] = f"{ours}.resnets.{k}.conv_shortcut"
            names |= {f"{theirs}.downsample": f"{ours}.downsamplers.0", f"{theirs}.upsample": f"{ours}.upsamplers.0"}
    return names


def published_unet(tensors, path):
    """The name of the published U-Net that these tensors, under their single-file names, are."""
    try:
        width = len(tensors["input_blocks.0.0.weight"])
        context = tensors["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1]
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]} is missing, so it is no U-Net of Stable Diffusion") from None
    for name in UNETS:
        c = UNetConfig.named(name)
        if (c.block_out_channels[0], c.cross_attention_dim) == (width, context):
            return name
    raise UserError(f"{path}: no published U-Net has width {width} and context {context}: it needs config=")


def original_config(source):
    """The YAML or JSON a single file's code base keeps of it → (UNetConfig, AutoencoderKLConfig, NoiseSchedule)."""
    path, content = "config", source
    if not isinstance(source, dict):
        path = Path(source)
        content = checkpoint.read_json(path) if path.suffix == ".json" else checkpoint.read_yaml(path)
    try:
        model = content["model"]["params"]
        u = (model.get("unet_config") or model["network_config"])["params"]  # CompVis's name, SDXL's
        v = model["first_stage_config"]["params"]["ddconfig"]
        widths = [u["model_channels"] * m for m in u["channel_mult"]]
        depths = u.get("transformer_depth", 1)
        depths = depths if isinstance(depths, list) else [depths] * len(widths)
        unet = {
            "in_channels": u["in_channels"],
            "out_channels": u["out_channels"],
            "sample_size": u.get("image_size", 64),
            "block_out_channels": widths,
            "layers_per_block": u["num_res_blocks"],
            "depth": [d if 2**n in u["attention_resolutions"] else 0 for n, d in enumerate(depths)],
            "mid_depth": depths[-1],
            "heads": [u["num_heads"] if "num_heads" in u else width // u["num_head_channels"] for width in widths],
            "cross_attention_dim": u["context_dim"],
            "use_linear_projection": u.get("use_linear_in_transformer", False),
            "addition_time_embed_dim": 256 if u.get("adm_in_channels") else 0,
            "projection_class_embeddings_input_dim": u.get("adm_in_channels", 0),
        }
        vae = {
            "sample_size": v["resolution"],
            "block_out_channels": [v["ch"] * m for m in v["ch_mult"]],
            "layers_per_block": v["num_res_blocks"],
            "latent_channels": v["z_channels"],
            "scaling_factor": model.get("scale_factor", 0.18215),
        }
        in_v = model.get("parameterization") == "v" or "VScaling" in json.dumps(model.get("denoiser_config"))
        schedule = {
            "num_train_timesteps": model.get("timesteps", 1000),
            "beta_start": model.get("linear_start", 0.00085),  # what they call linear is linear in √β
            "beta_end": model.get("linear_end", 0.012),
            "prediction_type": "v_prediction" if in_v else "epsilon",
        }
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: is no configuration of latent diffusion ({error!r})") from None
    return (
        settings.build(UNetConfig, unet, str(path)),
        settings.build(AutoencoderKLConfig, vae, str(path)),
        settings.build(NoiseSchedule, schedule, str(path)),
    )
