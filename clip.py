"""CLIP: pictures and texts as points of one space, a picture close to the texts that describe it.

    images (B, 3, S, S)                                  tokens (B, T) int64
      │ patch_embedding: a vector per P×P square           │ token_embedding
      │ a class token in front, + positions                │ + positions
      │ pre_layrnorm        (B, 1+N, D), N = (S/P)²        │                  (B, T, D')
      │ layers × [ x + attention(norm(x)) ; x + mlp(norm(x)) ]; the text's attention sees only the past
      │ post_layernorm of the class token  (B, D)          │ final_layer_norm of the end token  (B, D')
      │ visual_projection                                  │ text_projection
      ▼                                                    ▼
    image features (B, E)  ── scale · cosine ──▶ logits (B, B') ◀──  text features (B', E)

CLIP is trained on pairs. In a batch, each picture must find its own text among all texts, and
each text its picture (`contrastive_loss`); or each of the B² combinations is classified as a pair
or not (`sigmoid_loss`, SigLIP).

Other models use one half. Latent diffusion is conditioned on the text tower's output for every
token (`tokenize`, `hidden`, `pooled`); DreamLLM reads pictures as the vision tower's output for
every patch (`patch_features`). So a CLIP may have one tower only: `config.text` or
`config.vision` is None.

Modules bear the names of Hugging Face's files (their misspelt pre_layrnorm too), so that a
checkpoint's keys can be read beside the code. published/clip.py reads these files, OpenAI's and
open_clip's; support/tokenizer.py has the tokenizer.

    symbol  B batch      S image_size       P patch_size   N patches
            T context_length   D width   E embed_dim   H heads

CLIP: Radford et al. 2021 (Figure 3 is this file in ten lines). ViT: Dosovitskiy et al. 2021.
Sigmoid loss: Zhai et al. 2023. H/14 and bigG/14: LAION's OpenCLIP, Cherti et al. 2023.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from published import clip as published
from support import checkpoint, settings
from support.pictures import on_white, square, to_float
from support.ranks import all_rows, row_offset
from support.settings import UserError
from support.tokenizer import CLIPTokenizer, clip_file_names, find_clip_tokenizer

# ---- configuration ---------------------------------------------------------------------------

MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's, of RGB in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)


def quick_gelu(x):
    """OpenAI's approximation of GELU (Hendrycks & Gimpel 2016, section 2)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower's shape, and how its pictures are normalised. Defaults: OpenAI's ViT-B/32."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden_dim: int = 3072  # of the MLP
    patch_size: int = 32  # pixels
    image_size: int = 224
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def __post_init__(self):
        check_tower(self)
        settings.within(self, 1, 2**14, "patch_size", "image_size")
        settings.above(self, 0, "std")
        for name in ("mean", "std"):
            if len(getattr(self, name)) != 3:
                raise ValueError(f"{name} {getattr(self, name)} must be three numbers, for red, green and blue")
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size {self.patch_size} does not divide image_size {self.image_size}")

    @property
    def patches(self):
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class TextConfig:
    """Shape of the text tower. The defaults are those of OpenAI's ViT-B/32."""

    width: int = 512
    layers: int = 12
    heads: int = 8
    hidden_dim: int = 2048
    vocab_size: int = 49408
    context_length: int = 77
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    eos: int | None = None  # the end token, where the text's feature is read off; None: the largest id

    def __post_init__(self):
        check_tower(self)
        settings.within(self, 2, 2**20, "vocab_size", "context_length")
        if self.eos is not None and not 0 <= self.eos < self.vocab_size:
            raise ValueError(f"eos {self.eos} must be an id below vocab_size {self.vocab_size}")


def check_tower(config):
    """The bounds of both towers, as a ValueError."""
    settings.within(config, 1, 2**20, "width", "heads", "hidden_dim")
    settings.within(config, 1, 1000, "layers")
    settings.within(config, 0, 1, "norm_eps")
    settings.one_of(config, ACTIVATIONS, "activation")
    if config.width % config.heads:
        raise ValueError(f"heads {config.heads} does not divide width {config.width}")


@dataclass(frozen=True)
class CLIPConfig:
    """Two towers and what joins them. A tower may be None; `embed_dim` 0: no projections."""

    embed_dim: int = 512
    vision: VisionConfig | None = VisionConfig()
    text: TextConfig | None = TextConfig()
    logit_bias: bool = False  # SigLIP's: one more learned number, added to the logits

    def __post_init__(self):
        settings.within(self, 0, 2**20, "embed_dim")
        if not (self.vision or self.text):
            raise ValueError("a CLIP needs a vision or a text tower")
        if self.vision and self.text and not self.embed_dim:
            raise ValueError("embed_dim 0 leaves the two towers without a common space")

    @classmethod
    def named(cls, name, activation=None):
        """A published size: OpenAI's B and L with QuickGELU, LAION's H and bigG with GELU.

        LAION's own B/32, B/16 and L/14 have OpenAI's shapes but activation="gelu".
        """
        if name not in SIZES:
            raise UserError(f'no CLIP size "{name}"; there are {", ".join(SIZES)}')
        embed_dim, vision, text, usual = SIZES[name]
        both = {"activation": activation or usual}
        return cls(embed_dim, VisionConfig(**vision | both), TextConfig(**text | both))

    @classmethod
    def from_weights(cls, path, activation=None):
        """The config of any published file or folder; `activation`: if the files do not say it."""
        path = checkpoint.weights_folder(path)
        return settings.build(cls, published.known(*published.read(path), path, activation))


def _vision(width, layers, heads, patch_size, image_size=224, hidden_dim=0):
    shape = {"width": width, "layers": layers, "heads": heads, "hidden_dim": hidden_dim or 4 * width}
    return shape | {"patch_size": patch_size, "image_size": image_size}


def _text(width, layers, heads):
    return {"width": width, "layers": layers, "heads": heads, "hidden_dim": 4 * width}


SIZES = {  # embed_dim, vision, text, activation
    "ViT-B/32": (512, _vision(768, 12, 12, 32), _text(512, 12, 8), "quick_gelu"),
    "ViT-B/16": (512, _vision(768, 12, 12, 16), _text(512, 12, 8), "quick_gelu"),
    "ViT-L/14": (768, _vision(1024, 24, 16, 14), _text(768, 12, 12), "quick_gelu"),
    "ViT-L/14-336": (768, _vision(1024, 24, 16, 14, 336), _text(768, 12, 12), "quick_gelu"),
    "ViT-H/14": (1024, _vision(1280, 32, 16, 14), _text(1024, 24, 16), "gelu"),
    "ViT-bigG/14": (1280, _vision(1664, 48, 16, 14, hidden_dim=8192), _text(1280, 32, 20), "gelu"),
}


# ---- the parts -------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head self-attention: (B, T, D) → (B, T, D)."""

    def __init__(self, c):
        super().__init__()
        self.heads = c.heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(c.width, c.width) for _ in range(4))

    def forward(self, x, causal):
        """causal: each token sees itself and those before it."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # (B, T, D) each
        q, k, v = (rearrange(a, "b t (h e) -> b h t e", h=self.heads) for a in (q, k, v))  # (B, H, T, D/H) each
        h = F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # (B, H, T, D/H)
        return self.out_proj(rearrange(h, "b h t e -> b t (h e)"))


class MLP(nn.Module):
    """(…, D) → (…, hidden_dim) → (…, D)."""

    def __init__(self, c):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(c.width, c.hidden_dim), nn.Linear(c.hidden_dim, c.width)
        self.activation = ACTIVATIONS[c.activation]

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    """A layer of either tower, (B, T, D) → (B, T, D): the norms stand before attention and MLP."""

    def __init__(self, c):
        super().__init__()
        self.layer_norm1, self.self_attn = nn.LayerNorm(c.width, c.norm_eps), Attention(c)
        self.layer_norm2, self.mlp = nn.LayerNorm(c.width, c.norm_eps), MLP(c)

    def forward(self, x, causal):
        x = x + self.self_attn(self.layer_norm1(x), causal)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The blocks of a tower, (B, T, D) → (B, T, D).

    `layer` counts their outputs from the end, as Hugging Face's hidden_states do: -1 is after the
    last block, -2 after the last but one.
    """

    def __init__(self, c):
        super().__init__()
        self.layers = nn.ModuleList(Block(c) for _ in range(c.layers))

    def forward(self, x, causal, layer):
        for block in self.layers[: len(self.layers) + 1 + layer]:
            x = block(x, causal)
        return x


class VisionEmbeddings(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(c.width))
        self.patch_embedding = nn.Conv2d(3, c.width, c.patch_size, stride=c.patch_size, bias=False)
        self.position_embedding = nn.Embedding(1 + c.patches, c.width)

    def forward(self, images):
        """(B, 3, S, S) → (B, 1+N, D): the class token, then the patches row by row."""
        patches = self.patch_embedding(images.to(self.patch_embedding.weight.dtype))  # (B, D, S/P, S/P)
        patches = rearrange(patches, "b d h w -> b (h w) d")
        x = torch.cat((self.class_embedding.expand(len(images), 1, -1), patches), dim=1)
        return x + self.position_embedding.weight


class VisionTransformer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.embeddings = VisionEmbeddings(c)
        self.pre_layrnorm = nn.LayerNorm(c.width, c.norm_eps)
        self.encoder = Encoder(c)
        self.post_layernorm = nn.LayerNorm(c.width, c.norm_eps)  # of the class token alone

    def hidden(self, images, layer=-1):
        """Normalised images (B, 3, S, S) → (B, 1+N, D) after the given layer."""
        side = self.config.image_size
        if images.shape[1:] != (3, side, side):
            raise UserError(f"this CLIP reads pictures of (3, {side}, {side}), not {tuple(images.shape[1:])}")
        return self.encoder(self.pre_layrnorm(self.embeddings(images)), False, layer)


class TextEmbeddings(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.token_embedding = nn.Embedding(c.vocab_size, c.width)
        self.position_embedding = nn.Embedding(c.context_length, c.width)

    def forward(self, tokens):
        return self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]  # (B, T, D)


class TextTransformer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.embeddings = TextEmbeddings(c)
        self.encoder = Encoder(c)
        self.final_layer_norm = nn.LayerNorm(c.width, c.norm_eps)

    def hidden(self, tokens, layer=-1, final_norm=True):
        """tokens (B, T) → (B, T, D) after the given layer; final_norm: and after the norm."""
        if tokens.shape[1] > self.config.context_length:
            raise UserError(f"{tokens.shape[1]} tokens do not fit in {self.config.context_length}, this CLIP's context")
        x = self.encoder(self.embeddings(tokens), True, layer)
        return self.final_layer_norm(x) if final_norm else x


# ---- the model -------------------------------------------------------------------------------


class CLIP(nn.Module):
    """images (B, 3, S, S) and tokens (B', T) → features of one space. See the top of the file.

    A text encoder of latent diffusion has three methods:
        tokenize(texts) → (B, T) int64
        hidden(tokens, layer, final_norm) → (B, T, D)
        pooled(tokens) → (B, E)
    SD 1 and SD 2 take hidden(tokens); SDXL takes hidden(tokens, layer=-2, final_norm=False) of
    its two encoders, side by side, and pooled(tokens) of the second.
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.tokenizer = None  # a CLIPTokenizer; from_pretrained sets it where it finds one
        if c.vision:
            self.vision_model = VisionTransformer(c.vision)
        if c.text:
            self.text_model = TextTransformer(c.text)
        if c.vision and c.embed_dim:
            self.visual_projection = nn.Linear(c.vision.width, c.embed_dim, bias=False)
        if c.text and c.embed_dim:
            self.text_projection = nn.Linear(c.text.width, c.embed_dim, bias=False)
        if c.vision and c.text:
            # the logarithm of the factor before the cosines: it starts at 1 / 0.07, or with SigLIP
            # at 10. Training should keep it at or below ln 100 (section 2.5)
            self.logit_scale = nn.Parameter(torch.tensor(math.log(10 if c.logit_bias else 1 / 0.07)))
        if c.logit_bias:
            self.logit_bias = nn.Parameter(torch.tensor(-10.0))
        self.initialize()

    @torch.no_grad()
    def initialize(self):
        """Random weights as OpenAI's code draws those of its text tower, for both towers.

        Norms stay 1 and 0; the patch embedding stays as PyTorch draws a convolution.
        """
        for tower in self.children():
            if isinstance(tower, nn.Linear):  # a projection
                nn.init.normal_(tower.weight, 0, tower.in_features**-0.5)
                continue
            width, layers = tower.config.width, tower.config.layers
            into_stream = (2 * width * layers) ** -0.5  # two additions a layer: the sum's variance stays near 1
            for block in tower.encoder.layers:
                a, m = block.self_attn, block.mlp
                for linear, std in ((a.out_proj, into_stream), (m.fc2, into_stream), (m.fc1, (2 * width) ** -0.5)):
                    nn.init.normal_(linear.weight, 0, std)
                for linear in (a.q_proj, a.k_proj, a.v_proj):
                    nn.init.normal_(linear.weight, 0, width**-0.5)
                for linear in (a.q_proj, a.k_proj, a.v_proj, a.out_proj, m.fc1, m.fc2):
                    nn.init.zeros_(linear.bias)
            if isinstance(tower, TextTransformer):
                nn.init.normal_(tower.embeddings.token_embedding.weight, 0, 0.02)
                nn.init.normal_(tower.embeddings.position_embedding.weight, 0, 0.01)
            else:
                nn.init.normal_(tower.embeddings.class_embedding, 0, width**-0.5)
                nn.init.normal_(tower.embeddings.position_embedding.weight, 0, width**-0.5)

    def forward(self, images, tokens):
        """For training: image features (B, E), text features (B', E), scale (), bias () or None.

        Features, not logits, because the losses below compare them with those of every other
        process too.
        """
        bias = self.logit_bias if self.config.logit_bias else None
        return self.encode_image(images), self.encode_text(tokens), self.logit_scale.exp(), bias

    def logits(self, images, tokens):
        """images (B, 3, S, S), tokens (B', T) → (B, B'): how well each picture fits each text."""
        image, text, scale, bias = self(images, tokens)
        return pair_logits(image, text, scale, bias)

    def encode_image(self, images, normalize=True):
        """images (B, 3, S, S), normalised → features (B, E), of length 1 if `normalize`."""
        x = self.vision_model.post_layernorm(self.vision_model.hidden(images)[:, 0])  # (B, D)
        x = self.visual_projection(x) if self.config.embed_dim else x
        return F.normalize(x, dim=-1) if normalize else x

    def encode_text(self, tokens, normalize=True):
        """tokens (B, T) → features (B, E), of length 1 if `normalize`."""
        x = self.pooled(tokens)
        return F.normalize(x, dim=-1) if normalize else x

    def patch_features(self, images):
        """images (B, 3, S, S) → (B, N, D): each patch after the last block but one, as in LLaVA."""
        return self.vision_model.hidden(images, layer=-2)[:, 1:]

    def hidden(self, tokens, layer=-1, final_norm=True):
        """tokens (B, T) → (B, T, D): the text tower's output after the given layer."""
        return self.text_model.hidden(tokens, layer, final_norm)

    def pooled(self, tokens):
        """tokens (B, T) → (B, E): the end token, which has seen the whole text.

        (B, D) without a projection.
        """
        eos = self.config.text.eos
        end = tokens.argmax(-1) if eos is None else (tokens == eos).int().argmax(-1)  # (B,), the first of them
        x = self.text_model.hidden(tokens)[torch.arange(len(tokens), device=tokens.device), end]  # (B, D)
        return self.text_projection(x) if self.config.embed_dim else x

    def tokenize(self, texts):
        """A list of texts → (B, T) int64: start, text, end, padding. Long texts are cut."""
        if self.tokenizer is None:
            raise UserError(
                f"this CLIP came without a tokenizer: put {clip_file_names()} next to its weights, "
                "or set .tokenizer = CLIPTokenizer.from_pretrained(…)"
            )
        tokens = self.tokenizer.tokenize(texts, self.config.text.context_length)
        if tokens.numel() and tokens.max() >= self.config.text.vocab_size:
            raise UserError(
                f"its tokenizer is another model's: it has the id {tokens.max()}, this CLIP has only "
                f"{self.config.text.vocab_size} tokens"
            )
        return tokens

    def text_encoder(self):
        """The text tower as a CLIP of its own that shares the weights: latent diffusion's part."""
        alone = self.without("vision")
        alone.text_model, alone.tokenizer = self.text_model, self.tokenizer
        return alone

    def vision_encoder(self):
        """The vision tower as a CLIP of its own that shares the weights: DreamLLM's part."""
        alone = self.without("text")
        alone.vision_model = self.vision_model
        return alone

    def without(self, tower):
        """A CLIP of the other tower, which has no weights yet."""
        with torch.device("meta"):
            return CLIP(dataclasses.replace(self.config, embed_dim=0, logit_bias=False, **{tower: None}))

    def normalize(self, images):
        """images (B, 3, S, S) in [0, 1] → as this model was trained to see them."""
        c = self.config.vision
        return normalize(images, c.mean, c.std)

    def preprocess(self, images):
        """A list of PIL images → (B, 3, S, S), cropped and normalised for this model."""
        c = self.config.vision
        return preprocess(images, c.image_size, c.mean, c.std)

    # -- published files --

    @classmethod
    def from_pretrained(cls, path, dtype=None, device="cpu", config=None, activation=None):
        """A CLIP, or one tower of it, from a run of ours or a published file or folder.

        Reads Hugging Face folders (CLIPModel, CLIPTextModel and CLIPVisionModel, with or without
        projection), OpenAI's .pt archives, and state dicts with OpenAI's names, which open_clip
        shares. `dtype` None: as stored, or float32 where a file mixes several. `activation`, or a
        whole `config`, is asked for where a file leaves it open.
        """
        path = checkpoint.weights_folder(path)
        fields, tensors = published.read(path)
        config = config or settings.build(CLIPConfig, published.known(fields, tensors, path, activation))
        return cls.from_tensors(tensors, path, dtype, device, config)

    @classmethod
    def from_tensors(cls, tensors, path, dtype=None, device="cpu", config=None, file=None):
        """A CLIP of tensors under Hugging Face's names.

        Its tokenizer is looked for at `path`, and so is its config if none is given. file: the tensors', for errors.
        """
        if config is None:
            fields = published.read_hf_config(path if path.is_dir() else path.parent, tensors)
            config = settings.build(CLIPConfig, published.known(fields, tensors, path))
        if dtype is None and len({tensor.dtype for tensor in tensors.values()}) > 1:
            dtype = torch.float32  # OpenAI's archives: matrices in float16, the rest in float32
        model = checkpoint.load(cls, config, tensors, file or path, dtype, device)
        model.tokenizer = find_clip_tokenizer(path) if config.text else None
        return model

    def save_pretrained(self, path):
        """Writes config.json, model.safetensors, preprocessor_config.json and the tokenizer.

        transformers opens the folder as a CLIPModel, or as the tower that it is.
        """
        self.save_config(path)
        checkpoint.write_tensors(Path(path) / "model.safetensors", self.state_dict())
        if self.config.text and self.tokenizer:
            self.tokenizer.save_pretrained(path, self.config.text.context_length)

    def save_config(self, path):
        """Writes config.json, and preprocessor_config.json if there is a vision tower."""
        published.write_config(path, self.config, self.tokenizer, checkpoint.dtype_name(next(self.parameters())))


# ---- training --------------------------------------------------------------------------------


def pair_logits(image, text, scale, bias=None):
    """image (B, E), text (B', E), both of length 1 → (B, B'): scale · cosine (+ bias)."""
    logits = scale * image @ text.T
    return logits if bias is None else logits + bias


def contrastive_loss(image, text, scale):
    """CLIP's loss (Figure 3): image i and text i, both (B, E), must find each other → ().

    With several processes, each has the pairs of its own rows and compares them with the rows of
    all. The mean of loss and gradients over the processes, which DistributedDataParallel takes,
    is that of one process with all rows.
    """
    image, text = image.float(), text.float()
    own = row_offset(image) + torch.arange(len(image), device=image.device)
    with torch.autocast(image.device.type, enabled=False):  # bfloat16 would round 100 · cosine to a step of 0.5
        per_image = F.cross_entropy(pair_logits(image, all_rows(text), scale), own)
        per_text = F.cross_entropy(pair_logits(text, all_rows(image), scale), own)
    return (per_image + per_text) / 2


def sigmoid_loss(image, text, scale, bias):
    """SigLIP's loss (section 3.2): does image i belong to text j? for every i and j → ().

    Over several processes as in contrastive_loss.
    """
    image, text = image.float(), text.float()
    with torch.autocast(image.device.type, enabled=False):
        logits = pair_logits(image, all_rows(text), scale, bias)  # (B, B·processes)
        own = torch.eye(*logits.shape, device=image.device).roll(row_offset(image), dims=1)  # 1 for pairs, else 0
        return -F.logsigmoid((2 * own - 1) * logits).sum() / len(image)


# ---- pictures --------------------------------------------------------------------------------


def normalize(images, mean=MEAN, std=STD):
    """images (B, 3, H, W) in [0, 1] → (x - mean) / std, in each colour."""
    mean, std = (torch.tensor(numbers, device=images.device).view(3, 1, 1) for numbers in (mean, std))
    return (images - mean) / std


def preprocess(images, side=224, mean=MEAN, std=STD):
    """A list of PIL images → (B, 3, side, side).

    Laid on white, resized (bicubic) until the shorter side is `side`, cropped to the middle,
    normalised. Pixel for pixel what the CLIPImageProcessor of transformers 5 does. OpenAI's own
    differs in two details: it drops transparency instead of showing white behind it, and of an
    odd number of superfluous pixels it sometimes cuts one more on the left or top.
    """
    pictures = [np.asarray(square(on_white(image), side)) for image in images]
    return normalize(to_float(np.stack(pictures)), mean, std).contiguous()


# ---- the text towers of Stable Diffusion -----------------------------------------------------


def text_encoders(path, tokenizer=None, dtype=None, device="cpu", variant=None):
    """The text towers of a Stable Diffusion: a list of one (SD 1, SD 2) or two CLIPs (SDXL).

    `path`: a folder with text_encoder/ (and text_encoder_2/), or a single-file checkpoint, which
    brings no vocabulary: `tokenizer` names its file or folder, unless it lies beside the
    checkpoint. `variant`: of a folder's files, as "fp16".
    """
    encoders = []
    for fields, tensors, place, pad in published.text_towers(checkpoint.weights_folder(path), variant):
        encoder = CLIP.from_tensors(tensors, place, dtype, device, settings.build(CLIPConfig, fields))
        if tokenizer:
            encoder.tokenizer = CLIPTokenizer.from_pretrained(tokenizer)
        if encoder.tokenizer and pad:
            encoder.tokenizer.pad = encoder.tokenizer.vocabulary[pad]
        encoders.append(encoder)
    return encoders
