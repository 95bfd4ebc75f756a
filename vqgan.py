"""VQGAN: a picture as a short grid of codes, and back.

A convolutional encoder makes a small grid of vectors; each is replaced by the nearest of K learned
vectors (its *code* is that vector's number); a decoder paints the picture again from the codes. So
a picture becomes a sequence of h·w tokens from a vocabulary of K: all that a language model needs.

    images (B, 3, H, W) in [0, 1]
      │ encoder          (B, z, h, w)      h = H / (fold · 2^(levels-1)), w likewise
      │ quant_conv       (B, D, h, w)
      │ quantize ──────▶ codes (B, h, w) in 0..K-1        nearest codebook entry, squared L2
      │ post_quant_conv  (B, z, h, w)
      ▼ decoder
    reconstruction (B, 3, H, W)

Three published architectures are made of one set of blocks; `VQGANConfig.layout` says which:
    muse      openMUSE `VQGANModel`, the tokenizer of LVM
    maskgit   openMUSE `MaskGitVQGAN` f16-256 (bias-free, average pooling, a quirk in its shortcut)
    taming    CompVis `VQModel` (attention; pixels in [-1, 1] inside)
Attributes bear the names of the published files: a checkpoint's keys can be read beside the code.

    symbol  B batch   H, W pixels   h, w codes   K num_embeddings   D quantized_embed_dim
            z z_channels   i, o, c channels in, out, both (c.… is the configuration)

Training losses: van den Oord et al. 2017 (eq. 3), Esser et al. 2021 (eqs. 4-7), Chang et al. 2022.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import published.vqgan
from support import checkpoint, settings
from support.ranks import across_ranks, several
from support.settings import UserError


@dataclass(frozen=True)
class VQGANConfig:
    """Shape of a VQGAN; the fields are those of openMUSE's config.json, except `layout` and `fold`.

    The defaults are LVM's tokenizer: 146,244,675 parameters, 256 codes for a 256×256 picture.
    """

    layout: str = "muse"
    resolution: int = 256  # decides which levels have attention; pictures of other sizes work too
    num_channels: int = 3
    hidden_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 2, 4, 6)  # width of each level / hidden_channels
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = ()
    no_attn_mid_block: bool = True
    z_channels: int = 64
    num_embeddings: int = 8192  # K
    quantized_embed_dim: int = 64  # D
    commitment_cost: float = 0.25  # β
    fold: int = 1  # fold×fold pixels become channels first: the first level takes most of the time

    def __post_init__(self):
        settings.one_of(self, tuple(published.vqgan.CLASS_NAMES), "layout")
        settings.within(self, 1, 2**14, "resolution", "attn_resolutions")
        settings.within(self, 1, 2**16, "hidden_channels", "channel_mult")
        settings.within(self, 1, 2**16, "z_channels", "quantized_embed_dim")
        settings.within(self, 1, 2**20, "num_embeddings")
        settings.within(self, 1, 100, "num_res_blocks")
        settings.within(self, 1, 64, "num_channels", "fold")
        settings.at_least(self, 0, "commitment_cost")
        if not 1 <= len(self.channel_mult) <= 10:
            raise ValueError(f"channel_mult {list(self.channel_mult)} must have 1 to 10 levels")
        if self.hidden_channels * max(self.channel_mult) > 2**16:
            raise ValueError("hidden_channels · channel_mult must be at most 65536 at every level")
        if self.hidden_channels % 32:
            width = self.hidden_channels
            raise ValueError(f"hidden_channels {width} must be a multiple of 32 (GroupNorm)")
        if self.resolution % self.factor:
            factor = f"{self.factor} (fold · downsampling)"
            raise ValueError(f"resolution {self.resolution} must be a multiple of {factor}")
        if self.layout == "maskgit" and self.z_channels != self.quantized_embed_dim:
            raise ValueError("layout maskgit has no quant_conv: z_channels must equal quantized_embed_dim")

    @property
    def factor(self):
        """Pixels per code, along one side."""
        return self.fold * 2 ** (len(self.channel_mult) - 1)


# ---- blocks ----------------------------------------------------------------------------------


def group_norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    """(B, i, h, w) → (B, o, h, w): x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, i, o, layout):
        super().__init__()
        bias = layout != "maskgit"
        self.norm1, self.conv1 = group_norm(i), nn.Conv2d(i, o, 3, padding=1, bias=bias)
        self.norm2, self.conv2 = group_norm(o), nn.Conv2d(o, o, 3, padding=1, bias=bias)
        self.shortcut_from_output = layout == "maskgit"
        if i != o:
            # MaskGIT's published weights were trained with the shortcut applied to the *new* activation:
            # where channels change, nothing of x itself passes by.
            self.nin_shortcut = nn.Conv2d(o if self.shortcut_from_output else i, o, 1, bias=bias)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        if not hasattr(self, "nin_shortcut"):
            return x + h
        return h + self.nin_shortcut(h if self.shortcut_from_output else x)


class Attention(nn.Module):
    """(B, c, h, w) → the same: every position looks at every other, one head, 1×1 convolutions."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (rearrange(f(h), "b c h w -> b (h w) c") for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)  # (B, h·w, c)
        return x + self.proj_out(rearrange(h, "b (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    """(B, c, h, w) → (B, c, h/2, w/2)."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # only right and below, as published


class Upsample(nn.Module):
    """(B, c, h, w) → (B, c, 2h, 2w)."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """(B, i, h, w) → (B, o, h, w): residual blocks, at some levels each with attention after it."""

    def __init__(self, i, o, blocks, attention, layout):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(i if n == 0 else o, o, layout) for n in range(blocks))
        self.attn = nn.ModuleList(Attention(o) for _ in range(blocks if attention else 0))
        # openMUSE skips a level's attention if there is only one: its weights exist all the same.
        self.attends = bool(attention) and (layout == "taming" or blocks > 1)

    def forward(self, x):
        for n, block in enumerate(self.block):
            x = block(x)
            if self.attends:
                x = self.attn[n](x)
        return x


class Middle(nn.Module):
    """(B, c, h, w) → the same: residual block, attention (or none), residual block."""

    def __init__(self, channels, attention, layout):
        super().__init__()
        self.block_1 = ResBlock(channels, channels, layout)
        if attention:
            self.attn_1 = Attention(channels)
        self.block_2 = ResBlock(channels, channels, layout)

    def forward(self, x):
        x = self.block_1(x)
        if hasattr(self, "attn_1"):
            x = self.attn_1(x)
        return self.block_2(x)


def middle(channels, c):
    if c.layout == "maskgit":  # blocks named 0, 1, …, never attention
        return nn.Sequential(*(ResBlock(channels, channels, c.layout) for _ in range(c.num_res_blocks)))
    return Middle(channels, not c.no_attn_mid_block, c.layout)


def attends(c, level):
    side = c.resolution // c.fold // 2**level
    return c.layout != "maskgit" and side in c.attn_resolutions


class Encoder(nn.Module):
    """pixels (B, 3·fold², H/fold, W/fold) → (B, z, h, w)."""

    def __init__(self, c):
        super().__init__()
        maskgit = c.layout == "maskgit"
        widths = [c.hidden_channels * m for m in (1, *c.channel_mult)]
        self.conv_in = nn.Conv2d(c.num_channels * c.fold**2, widths[0], 3, padding=1, bias=not maskgit)
        self.down = nn.ModuleList()
        for n, (i, o) in enumerate(zip(widths, widths[1:], strict=False)):
            level = Level(i, o, c.num_res_blocks, attends(c, n), c.layout)
            if n + 1 < len(c.channel_mult):
                level.downsample = nn.AvgPool2d(2) if maskgit else Downsample(o)
            self.down.append(level)
        last = widths[-1]
        self.mid = middle(last, c)
        self.norm_out = group_norm(last)
        self.conv_out = nn.Conv2d(last, c.z_channels, 1) if maskgit else nn.Conv2d(last, c.z_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """(B, z, h, w) → pixels (B, 3·fold², H/fold, W/fold). Level 0 is the largest and runs last."""

    def __init__(self, c):
        super().__init__()
        maskgit = c.layout == "maskgit"
        widths = [c.hidden_channels * m for m in c.channel_mult]
        self.conv_in = nn.Conv2d(c.z_channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1], c)
        levels = []
        # from the smallest grid up; the published decoders have one block more a level (MaskGIT's does not)
        for n, o in reversed(list(enumerate(widths))):
            i = widths[min(n + 1, len(widths) - 1)]
            level = Level(i, o, c.num_res_blocks + (not maskgit), attends(c, n), c.layout)
            if n > 0 and maskgit:
                level.upsample_conv = nn.Conv2d(o, o, 3, padding=1)
            elif n > 0:
                level.upsample = Upsample(o)
            levels.insert(0, level)
        self.up = nn.ModuleList(levels)
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], c.num_channels * c.fold**2, 3, padding=1)

    def forward(self, x):
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
            elif hasattr(level, "upsample_conv"):
                x = level.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))


# ---- the quantizer ---------------------------------------------------------------------------


class Quantizer(nn.Module):
    """The nearest of K codebook vectors for every position (van den Oord et al. 2017, eqs. 1-3)."""

    def __init__(self, c):
        super().__init__()
        self.commitment_cost = c.commitment_cost
        self.with_entropy = False  # set where a training uses MaskGIT's entropy loss
        self.embedding = nn.Embedding(c.num_embeddings, c.quantized_embed_dim)
        nn.init.uniform_(self.embedding.weight, -1 / c.num_embeddings, 1 / c.num_embeddings)

    def distances(self, z):
        """z (B, D, h, w) → squared L2 to every entry, (B·h·w, K), in float32."""
        z = rearrange(z.float(), "b d h w -> (b h w) d")
        e = self.embedding.weight.float()  # (K, D)
        return z.pow(2).sum(1, keepdim=True) - 2 * z @ e.T + e.pow(2).sum(1)

    def lookup(self, codes):
        """codes (B, h, w) → vectors (B, D, h, w)."""
        return rearrange(self.embedding(codes), "b h w d -> b d h w")

    @torch.autocast("cpu", enabled=False)  # in bfloat16 the nearest entry would often be another one
    @torch.autocast("cuda", enabled=False)
    def nearest(self, z):
        """z (B, D, h, w) → codes (B, h, w)."""
        return self.distances(z).argmin(1).view(z.shape[0], *z.shape[2:])

    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def forward(self, z):
        """z (B, D, h, w) → (vectors (B, D, h, w), codes (B, h, w), codebook and commitment losses)."""
        z = z.float()
        codes = self.nearest(z.detach())
        e = self.lookup(codes)
        losses = {
            "codebook": F.mse_loss(e, z.detach()),  # moves the entry to the encoder's output
            "commitment": self.commitment_cost * F.mse_loss(z, e.detach()),  # β: keeps the encoder near it
        }
        if self.with_entropy:
            losses["entropy"] = entropy_loss(self.distances(z))
        # Straight through: forward the entry, backward as though it were z itself.
        return z + (e - z).detach(), codes, losses

    @torch.no_grad()
    def revive_dead_codes(self, dead, z, generator=None):
        """Puts each dead entry (dead (K,) bool) onto a random vector of z (B, D, h, w) → the indices of those moved.

        An entry nothing is nearest to gets no gradient and would stay dead for good.
        """
        z = rearrange(z, "b d h w -> (b h w) d")
        picks = torch.randperm(len(z), generator=generator)[: int(dead.sum())]
        dead = dead.nonzero()[: len(picks), 0]
        self.embedding.weight[dead] = z[picks.to(z.device)].to(self.embedding.weight.dtype)
        return dead


def usage(counts):
    """counts (K,) of each code → (share of entries in use, perplexity).

    The perplexity says how many entries, used equally often, would have the same entropy.
    """
    p = counts.float() / counts.sum().clamp(min=1)
    return (counts > 0).float().mean().item(), torch.exp(-(p * p.clamp(min=1e-10).log()).sum()).item()


# ---- the model -------------------------------------------------------------------------------


class VQGAN(nn.Module):
    """images ⇄ codes. See the top of the file; `forward` is for training, encode/decode for use."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.encoder, self.quantize, self.decoder = Encoder(c), Quantizer(c), Decoder(c)
        if c.layout != "maskgit":
            self.quant_conv = nn.Conv2d(c.z_channels, c.quantized_embed_dim, 1)
            self.post_quant_conv = nn.Conv2d(c.quantized_embed_dim, c.z_channels, 1)

    def latents(self, images):
        """images (B, 3, H, W) in [0, 1] → (B, D, h, w), what enters the quantizer."""
        if images.shape[-1] % self.config.factor or images.shape[-2] % self.config.factor:
            raise UserError(
                f"a picture of {images.shape[-1]}×{images.shape[-2]} has no whole number of codes: "
                f"its sides must be multiples of {self.config.factor}"
            )
        if self.config.layout == "taming":
            images = 2 * images - 1
        z = self.encoder(F.pixel_unshuffle(images, self.config.fold))
        return self.quant_conv(z) if hasattr(self, "quant_conv") else z

    def pixels(self, vectors):
        """vectors (B, D, h, w) → images (B, 3, H, W) around [0, 1], not clamped."""
        z = self.post_quant_conv(vectors) if hasattr(self, "post_quant_conv") else vectors
        images = F.pixel_shuffle(self.decoder(z), self.config.fold)
        return (images + 1) / 2 if self.config.layout == "taming" else images

    def encode(self, images):
        """images (B, 3, H, W) in [0, 1] → codes (B, h, w) int64."""
        return self.quantize.nearest(self.latents(images))

    def decode(self, codes):
        """codes (B, h, w) → images (B, 3, H, W) in [0, 1]."""
        return self.pixels(self.quantize.lookup(codes)).clamp(0, 1)

    def forward(self, images):
        """images (B, 3, H, W) in [0, 1] → (reconstruction, codes (B, h, w), the quantizer's losses)."""
        vectors, codes, losses = self.quantize(self.latents(images))
        return self.pixels(vectors), codes, losses

    def grid(self, side):
        """Rows and columns of codes of a side×side picture."""
        return side // self.config.factor, side // self.config.factor

    # -- published files --

    @classmethod
    def from_pretrained(cls, path, dtype=None, device="cpu"):
        """A VQGAN from a run of ours, openMUSE's folder, or taming's (a .ckpt and its .yaml).

        `path` may also be the weight file in such a folder. dtype None: as stored.
        """
        checkpoint.expect(path, "a VQGAN")
        fields, tensors, file = published.vqgan.read(path)
        config = settings.build(VQGANConfig, fields)
        return checkpoint.load(cls, config, tensors, file, dtype, device)

    def save_pretrained(self, path):
        """Writes openMUSE's layout: config.json and the weights, as .bin and as safetensors."""
        published.vqgan.write(path, self.config, self.state_dict())


# ---- training: what a good reconstruction is -------------------------------------------------


@dataclass(frozen=True)
class VQGANLossConfig:
    """Weights of the loss's terms. The defaults are taming's, with no perceptual or adversarial term.

    x̂ is the reconstruction of x; pixels are compared in [-1, 1].
    nll = l1·|x-x̂| + l2·(x-x̂)² + perceptual·LPIPS, taming's name for the error;
    total = nll + codebook·(codebook + commitment) + entropy·entropy + λ·gan·g, g = -mean Discriminator(x̂).
    """

    l1: float = 1.0
    l2: float = 0.0
    codebook: float = 1.0
    entropy: float = 0.0  # MaskGIT: 0.1
    perceptual: float = 0.0  # taming: 1, MaskGIT: 0.1; needs the two files below
    vgg: str = ""  # VGG16 weights, torchvision's file
    lpips: str = ""  # the five 1×1 heads, LPIPS's own file
    gan: float = 0.0  # taming: 0.8 (adaptive), MaskGIT: 0.1 (not adaptive)
    adaptive: bool = True  # λ from the two gradients; otherwise λ = 1
    disc_start: int = 0  # the step at which the discriminator starts to learn
    disc_warmup: int = 0  # … and how many steps later its score enters the generator's loss
    redraw_every: int = 50  # steps between two revivals of dead codes; 0: leave them dead

    def __post_init__(self):
        settings.at_least(self, 0, "l1", "l2", "codebook", "entropy", "perceptual", "gan")
        settings.at_least(self, 0, "disc_start", "disc_warmup", "redraw_every")
        if self.perceptual and not (self.vgg and self.lpips):
            raise ValueError("perceptual > 0 needs the paths of two weight files, vgg and lpips")


def entropy_loss(distances, temperature=0.01):
    """MaskGIT's: confident on each sample, diverse over the batch. distances (N, K) → ()."""
    p = F.softmax(-distances / temperature, dim=1)
    log_p = F.log_softmax(-distances / temperature, dim=1)
    mean = across_ranks(p.mean(0))  # (K,), over the whole batch
    return -(p * log_p).sum(1).mean() + (mean * mean.clamp(min=1e-8).log()).sum()


class SyncedBatchNorm(nn.BatchNorm2d):
    """Batch normalisation over the batch of *all* ranks, on any device (torch's own needs a GPU).

    x (B, C, H, W) → the same shape and dtype, computed in float32. Every rank must bring a batch of
    the same size: then the joint mean and variance are the means of the ranks' own. In eval mode, and
    with one process, it is BatchNorm2d.
    """

    def forward(self, x):
        if not self.training or not several():
            return super().forward(x)
        dtype, x = x.dtype, x.float()
        mean = across_ranks(x.mean((0, 2, 3)))  # (C,)
        var = across_ranks((x - mean[:, None, None]).pow(2).mean((0, 2, 3)))  # (C,)
        n = x.numel() / x.shape[1] * dist.get_world_size()  # numbers in each channel, of all ranks
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        x = (x - mean[:, None, None]) * torch.rsqrt(var + self.eps)[:, None, None]
        return (x * self.weight[:, None, None] + self.bias[:, None, None]).to(dtype)


class Discriminator(nn.Sequential):
    """PatchGAN (Isola et al. 2017): images (B, 3, H, W) → a score for every patch, (B, 1, h, w)."""

    def __init__(self, channels=3, width=64):
        layers = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, o, stride in ((1, 2, 2), (2, 4, 2), (4, 8, 1)):
            layers += [nn.Conv2d(i * width, o * width, 4, stride=stride, padding=1, bias=False)]
            layers += [SyncedBatchNorm(o * width), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(8 * width, 1, 4, padding=1))
        for module in self:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.02)
            if isinstance(module, SyncedBatchNorm):
                nn.init.normal_(module.weight, 1, 0.02)


def hinge_loss(real, fake):
    """The discriminator's: zero where real scores are above 1 and fake ones below -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(nll, g, last_weight):
    """λ = ‖∇nll‖ / ‖∇g‖ at the decoder's last weight: both terms pull equally hard (Esser et al., eq. 7).

    The gradients are averaged over all ranks before the norms, so that every rank has the same λ.
    """
    nll_grad = across_ranks(torch.autograd.grad(nll, last_weight, retain_graph=True)[0])
    g_grad = across_ranks(torch.autograd.grad(g, last_weight, retain_graph=True)[0])
    return (nll_grad.norm() / (g_grad.norm() + 1e-4)).clamp(0, 1e4).detach()


class LPIPS(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018): VGG16's features, normalised and weighted.

    vgg, heads: the paths of its two weight files, torchvision's VGG16 and LPIPS's five heads; "": for a plan, without
    """

    STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # VGG16: channels, convolutions

    def __init__(self, vgg, heads):
        super().__init__()
        self.stages, channels = nn.ModuleList(), 3
        for n, (width, convolutions) in enumerate(self.STAGES):
            layers = [nn.MaxPool2d(2)] if n else []
            for _ in range(convolutions):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            self.stages.append(nn.Sequential(*layers))
            self.register_buffer(f"head{n}", torch.zeros(1, width, 1, 1))
        if vgg:
            self.load(vgg, heads)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        self.requires_grad_(False)

    def load(self, vgg, heads):
        convolutions = [layer for layer in self.stages.modules() if isinstance(layer, nn.Conv2d)]
        for layer, weights in zip(convolutions, published.vqgan.read_vgg16(vgg), strict=True):
            layer.load_state_dict(weights)
        for n, head in enumerate(published.vqgan.read_lpips_heads(heads)):
            setattr(self, f"head{n}", head)  # (1, C, 1, 1)

    def forward(self, x, y):
        """x, y (B, 3, H, W) in [-1, 1] → distance, mean over the batch."""
        total = 0.0
        x, y = (x - self.shift) / self.scale, (y - self.shift) / self.scale
        for n, stage in enumerate(self.stages):
            x, y = stage(x), stage(y)
            fx = x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)  # features of length 1
            fy = y / (y.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)
            total = total + F.conv2d((fx - fy).pow(2), getattr(self, f"head{n}")).mean()
        return total


class VQGANLoss(nn.Module):
    """Both losses of the adversarial training.

    `generator_loss` is the VQGAN's, of its reconstruction; `discriminator_loss` is that of the
    Discriminator, which learns to tell reconstructions from originals.
    """

    def __init__(self, config, planned=False):
        super().__init__()
        self.config = config
        files = ("", "") if planned else (config.vgg, config.lpips)
        self.perceptual = LPIPS(*files) if config.perceptual else None

    def gan_active(self, step):
        """Whether the discriminator's score is part of the generator's loss at this step."""
        return self.config.gan > 0 and step >= self.config.disc_start + self.config.disc_warmup

    def generator_loss(self, model, images, reconstruction, losses, discriminator, step):
        """→ (total, {name: value}). images, reconstruction (B, 3, H, W) in [0, 1].

        losses: the quantizer's, by name ("codebook", "commitment", perhaps "entropy").
        """
        c = self.config
        x, y = 2 * images - 1, 2 * reconstruction.float() - 1
        nll = c.l1 * (x - y).abs().mean() + c.l2 * (x - y).pow(2).mean()
        if self.perceptual:
            nll = nll + c.perceptual * self.perceptual(x, y)
        total = nll + c.codebook * (losses["codebook"] + losses["commitment"])
        values = {"nll": nll, **losses}
        if "entropy" in losses:
            total = total + c.entropy * losses["entropy"]
        if self.gan_active(step):
            g = -discriminator(y).mean()
            weight = adaptive_weight(nll, g, model.decoder.conv_out.weight) if c.adaptive else 1.0
            total = total + weight * c.gan * g
            values |= {"g": g, "lambda": torch.as_tensor(weight, device=x.device)}
        return total, values

    def discriminator_loss(self, images, reconstruction, discriminator):
        """→ (hinge loss, {name: value}). No gradient reaches the reconstruction."""
        real = discriminator(2 * images - 1)
        fake = discriminator(2 * reconstruction.detach().float() - 1)
        loss = hinge_loss(real, fake)
        return loss, {"disc": loss, "real": real.mean(), "fake": fake.mean()}
