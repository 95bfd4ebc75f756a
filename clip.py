"""CLIP: pictures and texts as points of one space, where what belongs together lies close together.

    images (B, 3, S, S)                                  tokens (B, T) int64
      │ patch_embedding: a vector per P×P square           │ token_embedding
      │ a class token in front, + positions                │ + positions
      │ pre_layrnorm        (B, 1+N, D), N = (S/P)²        │                  (B, T, D')
      │ layers × [ x + attention(norm(x)) ; x + mlp(norm(x)) ]; the text's attention sees only the past
      │ post_layernorm of the class token  (B, D)          │ final_layer_norm of the end token  (B, D')
      │ visual_projection                                  │ text_projection
      ▼                                                    ▼
    image features (B, E)  ── scale · cosine ──▶ logits (B, B') ◀──  text features (B', E)

Trained on pairs: in a batch, each picture must find its own text among all, and each text its picture
(`contrastive_loss`); or each of the B² pairs is judged by itself (`sigmoid_loss`, SigLIP).

Others use one half. Latent diffusion reads what the text tower says of every token (`tokenize`, `hidden`,
`pooled`); DreamLLM reads what the vision tower says of every patch (`patch_features`). So a CLIP may have
one tower only: `config.text` or `config.vision` is None.

Modules bear the names of the Hugging Face files (their misspelt pre_layrnorm too), so a checkpoint's keys
can be read beside the code. The file's second half, from "published files" on, is about such files only.

    symbol  B batch   S image_size   P patch_size   N patches   T context_length   D width   E embed_dim

CLIP: Radford et al. 2021 (Figure 3 is this file in ten lines). ViT: Dosovitskiy et al. 2021. Sigmoid loss:
Zhai et al. 2023. H/14 and bigG/14: LAION's OpenCLIP, Cherti et al. 2023.
Read before: model.py. Read next: diffusion.py, whose pictures follow these texts.
"""

import dataclasses
import json
import math
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import nn

from support import checkpoint
from support.settings import UserError
from support.tokenizer import CLIP_END, CLIPTokenizer, clip_file_names, find_clip_tokenizer

# ---- configuration ---------------------------------------------------------------------------

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's, of RGB in [0, 1]


def quick_gelu(x):
    """OpenAI's approximation of GELU (Hendrycks & Gimpel 2016, section 2)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


@dataclass(frozen=True)
class VisionConfig:
    """Shape of the vision tower, and how its pictures are normalised. The defaults are OpenAI's ViT-B/32."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden_dim: int = 3072
    patch_size: int = 32
    image_size: int = 224
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def __post_init__(self):
        _check_tower(self)
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
    eos: int | None = None  # the text is read off at the first of these ids; None: at the largest id, as OpenAI does

    def __post_init__(self):
        _check_tower(self)


def _check_tower(c):
    if c.width % c.heads:
        raise ValueError(f"heads {c.heads} does not divide width {c.width}")
    if c.activation not in ACTIVATIONS:
        raise ValueError(f'activation "{c.activation}" must be one of {", ".join(ACTIVATIONS)}')


@dataclass(frozen=True)
class CLIPConfig:
    """Two towers and what joins them. A tower that is None is absent; `embed_dim` 0: no projections."""

    embed_dim: int = 512
    vision: VisionConfig | None = VisionConfig()
    text: TextConfig | None = TextConfig()
    logit_bias: bool = False  # SigLIP's: one more learned number, added to the logits

    def __post_init__(self):
        if not (self.vision or self.text):
            raise ValueError("a CLIP needs a vision or a text tower")
        if self.vision and self.text and not self.embed_dim:
            raise ValueError("embed_dim 0 leaves the two towers without a common space")

    @classmethod
    def named(cls, name, activation=None):
        """A published size, e.g. "ViT-L/14": OpenAI's B and L (QuickGELU), LAION's H and bigG (GELU).

        LAION's own B/32, B/16 and L/14 have OpenAI's shapes but activation="gelu".
        """
        if name not in SIZES:
            raise UserError(f'no CLIP size "{name}"; there are {", ".join(SIZES)}')
        embed_dim, vision, text = SIZES[name]
        common = {"activation": activation or ("gelu" if vision["width"] in HEADS else "quick_gelu")}
        return cls(embed_dim, VisionConfig(**vision | common), TextConfig(**text | common))

    @classmethod
    def from_weights(cls, path, activation=None):
        """The config of any published file or folder; `activation` is needed where it says nothing of it."""
        path = checkpoint.weights_folder(path)
        return find_config(path, *read_weights(path), activation)


def _vision(width, layers, heads, patch_size, image_size=224, hidden_dim=0):
    shape = {"width": width, "layers": layers, "heads": heads, "hidden_dim": hidden_dim or 4 * width}
    return shape | {"patch_size": patch_size, "image_size": image_size}


def _text(width, layers, heads):
    return {"width": width, "layers": layers, "heads": heads, "hidden_dim": 4 * width}


SIZES = {  # embed_dim, vision, text
    "ViT-B/32": (512, _vision(768, 12, 12, 32), _text(512, 12, 8)),
    "ViT-B/16": (512, _vision(768, 12, 12, 16), _text(512, 12, 8)),
    "ViT-L/14": (768, _vision(1024, 24, 16, 14), _text(768, 12, 12)),
    "ViT-L/14-336": (768, _vision(1024, 24, 16, 14, 336), _text(768, 12, 12)),
    "ViT-H/14": (1024, _vision(1280, 32, 16, 14), _text(1024, 24, 16)),
    "ViT-bigG/14": (1280, _vision(1664, 48, 16, 14, hidden_dim=8192), _text(1280, 32, 20)),
}
HEADS = {1280: 16, 1664: 16}  # of LAION's vision towers, by width; every other published head is 64 wide


# ---- the parts -------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads = c.heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(c.width, c.width) for _ in range(4))

    def forward(self, x, causal):
        """x (B, T, D) → (B, T, D); causal: each token sees itself and those before it."""
        q, k, v = (
            rearrange(project(x), "b t (h e) -> b h t e", h=self.heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        h = F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # (B, H, T, D/H)
        return self.out_proj(rearrange(h, "b h t e -> b t (h e)"))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(c.width, c.hidden_dim), nn.Linear(c.hidden_dim, c.width)
        self.activation = ACTIVATIONS[c.activation]

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.layer_norm1, self.self_attn = nn.LayerNorm(c.width, c.norm_eps), Attention(c)
        self.layer_norm2, self.mlp = nn.LayerNorm(c.width, c.norm_eps), MLP(c)

    def forward(self, x, causal):
        x = x + self.self_attn(self.layer_norm1(x), causal)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The blocks of a tower. `layer` counts their outputs from the end, as Hugging Face's hidden_states do:
    -1 is after the last block, -2 after the last but one."""

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
        """images (B, 3, S, S), normalised → (B, 1+N, D) after the given layer, before post_layernorm."""
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
        """tokens (B, T) → (B, T, D) after the given layer, and after the final norm unless told otherwise."""
        if tokens.shape[1] > self.config.context_length:
            raise UserError(f"{tokens.shape[1]} tokens do not fit in {self.config.context_length}, this CLIP's context")
        x = self.encoder(self.embeddings(tokens), True, layer)
        return self.final_layer_norm(x) if final_norm else x


# ---- the model -------------------------------------------------------------------------------


class CLIP(nn.Module):
    """images (B, 3, S, S) and tokens (B', T) → features of one space. See the top of the file.

    As a text encoder of latent diffusion it has three methods:
        tokenize(texts) → (B, T) int64;  hidden(tokens, layer, final_norm) → (B, T, D);  pooled(tokens) → (B, E)
    SD 1 and SD 2 take hidden(tokens); SDXL takes hidden(tokens, layer=-2, final_norm=False) of its two
    encoders, side by side, and pooled(tokens) of the second.
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
            # the logarithm of the factor before the cosines: it starts at 1 / 0.07, or with SigLIP at 10.
            # Training should keep it at or below ln 100 (section 2.5)
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

        Features, not logits, because the losses below compare them with those of every other process too.
        """
        bias = self.logit_bias if self.config.logit_bias else None
        return self.encode_image(images), self.encode_text(tokens), self.logit_scale.exp(), bias

    def logits(self, images, tokens):
        """images (B, 3, S, S), tokens (B', T) → (B, B'): how well each picture fits each text."""
        image, text, scale, bias = self(images, tokens)
        return pair_logits(image, text, scale, bias)

    def encode_image(self, images, normalize=True):
        """images (B, 3, S, S) as `preprocess` makes them → features (B, E), of length 1 if normalize."""
        x = self.vision_model.post_layernorm(self.vision_model.hidden(images)[:, 0])  # (B, D)
        x = self.visual_projection(x) if self.config.embed_dim else x
        return F.normalize(x, dim=-1) if normalize else x

    def encode_text(self, tokens, normalize=True):
        """tokens (B, T) as `tokenize` makes them → features (B, E), of length 1 if normalize."""
        x = self.pooled(tokens)
        return F.normalize(x, dim=-1) if normalize else x

    def patch_features(self, images):
        """images (B, 3, S, S) → (B, N, D): each patch after the last block but one, without a norm (LLaVA's choice)."""
        return self.vision_model.hidden(images, layer=-2)[:, 1:]

    def hidden(self, tokens, layer=-1, final_norm=True):
        """tokens (B, T) → (B, T, D): what the text tower says of each token after the given layer."""
        return self.text_model.hidden(tokens, layer, final_norm)

    def pooled(self, tokens):
        """tokens (B, T) → (B, E): the end token, which has seen the whole text; (B, D) without a projection."""
        eos = self.config.text.eos
        end = tokens.argmax(-1) if eos is None else (tokens == eos).int().argmax(-1)  # (B,), the first of them
        x = self.text_model.hidden(tokens)[torch.arange(len(tokens), device=tokens.device), end]  # (B, D)
        return self.text_projection(x) if self.config.embed_dim else x

    def tokenize(self, texts):
        """A list of texts → (B, T) int64; what is too long loses its end."""
        if self.tokenizer is None:
            raise UserError(
                f"this CLIP came without a tokenizer: put {clip_file_names()} beside its weights, "
                "or set .tokenizer = CLIPTokenizer.from_pretrained(…)"
            )
        return self.tokenizer.tokenize(texts, self.config.text.context_length)

    def text_encoder(self):
        """The text tower by itself, sharing its weights: what latent diffusion keeps of a CLIP."""
        with torch.device("meta"):  # no weights of its own
            alone = CLIP(dataclasses.replace(self.config, vision=None, embed_dim=0, logit_bias=False))
        alone.text_model, alone.tokenizer = self.text_model, self.tokenizer
        return alone

    def vision_encoder(self):
        """The vision tower by itself, sharing its weights: what DreamLLM keeps of a CLIP."""
        with torch.device("meta"):
            alone = CLIP(dataclasses.replace(self.config, text=None, embed_dim=0, logit_bias=False))
        alone.vision_model = self.vision_model
        return alone

    def preprocess(self, images):
        """A list of PIL images → (B, 3, S, S) as this model was trained to see them."""
        c = self.config.vision
        return preprocess(images, c.image_size, c.mean, c.std)

    # -- published files --

    @classmethod
    def from_pretrained(cls, path, dtype=None, device="cpu", config=None):
        """A CLIP, or one tower of it, from a run of ours or a published file or folder.

        Reads Hugging Face folders (CLIPModel, CLIPTextModel and CLIPVisionModel, with or without projection),
        OpenAI's .pt archives, and state dicts with OpenAI's names, which open_clip shares. `dtype` None: as
        stored, or float32 where a file mixes several. `config` is asked for where a file leaves it open.
        """
        path = checkpoint.weights_folder(path)
        tensors, source = read_weights(path)
        return cls.from_tensors(tensors, path, dtype, device, config or find_config(path, tensors, source))

    @classmethod
    def from_tensors(cls, tensors, path, dtype=None, device="cpu", config=None):
        """The same from tensors at hand, under Hugging Face's names: at `path` lie their config and tokenizer."""
        config = config or find_config(path, tensors, "huggingface")
        if dtype is None and len({tensor.dtype for tensor in tensors.values()}) > 1:
            dtype = torch.float32  # OpenAI's archives: matrices in float16, the rest in float32
        with torch.device("meta"):
            model = cls(config)
        checkpoint.load_into(model, tensors, path, dtype, device).eval()
        model.tokenizer = find_clip_tokenizer(path) if config.text else None
        return model

    def save_pretrained(self, path):
        """Writes config.json, model.safetensors, preprocessor_config.json and the tokenizer as transformers does."""
        self.save_config(path)
        checkpoint.write_tensors(Path(path) / "model.safetensors", self.state_dict())
        if self.config.text and self.tokenizer:
            self.tokenizer.save_pretrained(path, self.config.text.context_length)

    def save_config(self, path):
        """Of these files, the two that say what the weights are and how pictures come in."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        dtype = str(next(self.parameters()).dtype).removeprefix("torch.")
        config = config_to_hf(self.config, self.tokenizer) | {"torch_dtype": dtype}
        checkpoint.write_text(path / "config.json", json.dumps(config, indent=2) + "\n")
        if self.config.vision:
            checkpoint.write_text(path / "preprocessor_config.json", _preprocessor_json(self.config.vision))


# ---- training: what belongs together ---------------------------------------------------------


def pair_logits(image, text, scale, bias=None):
    """image (B, E), text (B', E), both of length 1 → (B, B'): scale · cosine (+ bias)."""
    logits = scale * image @ text.T
    return logits if bias is None else logits + bias


def contrastive_loss(image, text, scale):
    """CLIP's loss (Figure 3): pair i of image (B, E) and text (B, E) must find each other among all → ().

    With several processes, each brings the pairs of its rows and sees everyone's: the mean over the processes
    of loss and gradients, which DistributedDataParallel takes, is that of one process with all rows.
    """
    image, text = image.float(), text.float()
    own = row_offset(image) + torch.arange(len(image), device=image.device)
    with torch.autocast(image.device.type, enabled=False):  # bfloat16 would round 100 · cosine to a step of 0.5
        per_image = F.cross_entropy(pair_logits(image, all_rows(text), scale), own)
        per_text = F.cross_entropy(pair_logits(text, all_rows(image), scale), own)
    return (per_image + per_text) / 2


def sigmoid_loss(image, text, scale, bias):
    """SigLIP's loss (Zhai et al. 2023, section 3.2): is picture i the one of text j? asked of each pair → ().

    Over several processes as in contrastive_loss.
    """
    image, text = image.float(), text.float()
    with torch.autocast(image.device.type, enabled=False):
        logits = pair_logits(image, all_rows(text), scale, bias)  # (B, B·processes)
        own = torch.eye(*logits.shape, device=image.device).roll(row_offset(image), dims=1)  # 1 for pairs, else 0
        return -F.logsigmoid((2 * own - 1) * logits).sum() / len(image)


class Gather(torch.autograd.Function):
    """Every process's x (B, E), one after the other; gradients come back from wherever x was used."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def all_rows(x):
    """The rows of all processes, with gradients; x itself where there is one process."""
    return Gather.apply(x) if dist.is_available() and dist.is_initialized() else x


def row_offset(x):
    """The place of our first row among everyone's."""
    return dist.get_rank() * len(x) if dist.is_available() and dist.is_initialized() else 0


# ---- pictures --------------------------------------------------------------------------------


def preprocess(images, side=224, mean=MEAN, std=STD):
    """A list of PIL images → (B, 3, side, side): on white, shorter side to `side` (bicubic), centre crop, normalised.

    Pixel for pixel what the CLIPImageProcessor of transformers 5 does. OpenAI's own differs in two details: it
    drops transparency instead of showing white behind it, and of an odd number of superfluous pixels it
    sometimes cuts one more on the left or top.
    """
    batch = []
    for image in images:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        w, h = image.size
        image = image.convert("RGB").resize((side * w // min(w, h), side * h // min(w, h)), Image.Resampling.BICUBIC)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        batch.append(np.asarray(image.crop((left, top, left + side, top + side))))
    pixels = torch.from_numpy(np.stack(batch)).float() / 255  # (B, side, side, 3)
    return rearrange((pixels - torch.tensor(mean)) / torch.tensor(std), "b h w c -> b c h w").contiguous()


# ---- texts -----------------------------------------------------------------------------------
# Byte-pair encoding: a word starts as its UTF-8 bytes, and the pair of neighbours that stands first in the
# list of merges is joined, again and again, until no neighbours are in the list. The end of a word belongs to
# its last byte ("t</w>" is not "t"). tiktoken does the joining. It knows bytes only, so "</w>" is written 0xFF,
# a byte that no UTF-8 text contains.


# ---- published files: weights ----------------------------------------------------------------


def read_weights(path):
    """({name: tensor} under Hugging Face's names, who wrote them: "huggingface", "openai" or "open_clip").

    OpenAI's archives are told from state dicts; in those, OpenAI's names are open_clip's too.
    """
    if path.is_file() and is_torchscript(path):
        return from_openai_names(read_torchscript(path)), "openai"
    open_clip = [path / name for name in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")]
    file = next((f for f in open_clip if f.exists() and not (path / "config.json").exists()), path)
    tensors = checkpoint.read_tensors(file)
    # what training programs wrap around the weights
    tensors = {name.removeprefix("module."): t for name, t in tensors.items()}
    if any(name.startswith(("visual.", "transformer.resblocks.")) for name in tensors):
        return from_openai_names(tensors), "open_clip"
    tensors = from_hf_names(tensors)
    if not any(name.startswith(("vision_model.", "text_model.")) for name in tensors):
        raise UserError(f"{path}: holds no CLIP: no weights of a vision or text tower (text_encoders reads SD's files)")
    return tensors, "huggingface"


def from_hf_names(tensors):
    """Hugging Face's names of any age: newer single towers may lack the tower's name, older files number positions."""
    tower = "vision_model." if "embeddings.class_embedding" in tensors else "text_model."
    return {
        (tower + name if name.startswith(("embeddings.", "encoder.", "final_", "pre_", "post_")) else name): tensor
        for name, tensor in tensors.items()
        if not name.endswith("position_ids")
    }


OPENAI_NAMES = {  # how names begin: OpenAI's, Hugging Face's
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
}
OPENAI_BLOCK_NAMES = {
    ".attn.": ".self_attn.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}
OPENAI_IGNORED = ("input_resolution", "context_length", "vocab_size", "attn_mask")  # no weights


def from_openai_names(tensors):
    """OpenAI's and open_clip's names → Hugging Face's: q, k, v apart, and projections as linear layers hold them."""
    renamed = {}
    for name, tensor in tensors.items():
        if name in OPENAI_IGNORED:
            continue
        start = next((s for s in OPENAI_NAMES if name.startswith(s)), "")
        name = OPENAI_NAMES.get(start, "") + name.removeprefix(start)
        for theirs, ours in OPENAI_BLOCK_NAMES.items():
            name = name.replace(theirs, ours)
        if ".in_proj_" in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):  # (3·D, …) → three times (D, …)
                renamed[name.replace("in_proj_", f"{letter}_proj.")] = part
        elif name in ("visual_projection.weight", "text_projection.weight"):
            renamed[name] = tensor.T.contiguous()  # (D, E) → (E, D)
        else:
            renamed[name] = tensor
    return renamed


# Stable Diffusion's single files: where a text tower's names begin, whose names follow, its activation, its padding
SINGLE_FILE_TOWERS = (
    ("cond_stage_model.transformer.", from_hf_names, "quick_gelu", CLIP_END),  # SD 1
    ("cond_stage_model.model.", from_openai_names, "gelu", "!"),  # SD 2; "!" has id 0
    ("conditioner.embedders.0.transformer.", from_hf_names, "quick_gelu", CLIP_END),  # SDXL, the first of two
    ("conditioner.embedders.0.model.", from_openai_names, "gelu", "!"),  # SDXL's refiner
    ("conditioner.embedders.1.model.", from_openai_names, "gelu", "!"),  # SDXL, the second
)


def text_encoders(path, tokenizer=None, dtype=None, device="cpu"):
    """The text towers of a Stable Diffusion at `path`, in order: a list of one (SD 1, SD 2) or two CLIPs (SDXL).

    `path`: a folder with text_encoder/ (and text_encoder_2/), or a single-file checkpoint, which brings no
    vocabulary: `tokenizer` names its file or folder, unless it lies beside the checkpoint. SD 2 reads its
    tower after the last block but one: the last, and the projection, are left in the file, as diffusers does.
    """
    path, found = checkpoint.weights_folder(path), []  # (encoder, its padding where no file names one)
    if path.is_dir():
        folders = [path / name for name in ("text_encoder", "text_encoder_2") if (path / name).is_dir()]
        found = [(CLIP.from_pretrained(folder, dtype, device), None) for folder in folders]
    else:
        everything = checkpoint.read_tensors(path)
        for start, rename, activation, pad in SINGLE_FILE_TOWERS:
            tensors = {name.removeprefix(start): t for name, t in everything.items() if name.startswith(start)}
            tensors = rename(tensors)
            tensors.pop("logit_scale", None)  # for pairs with pictures
            layers = _count_layers(tensors, "text_model")
            if not layers:
                continue
            if start == "cond_stage_model.model.":
                last = f"text_model.encoder.layers.{layers - 1}."
                tensors = {name: t for name, t in tensors.items() if not name.startswith((last, "text_projection"))}
            config = config_from_shapes(tensors, activation, path)
            found.append((CLIP.from_tensors(tensors, path, dtype, device, config), pad))
    if not found:
        raise UserError(f"{path}: holds no CLIP text tower (looked for text_encoder/ or SD's own names)")
    for encoder, pad in found:
        if tokenizer:
            encoder.tokenizer = CLIPTokenizer.from_pretrained(tokenizer)
        if encoder.tokenizer and pad:
            encoder.tokenizer.pad = encoder.tokenizer.vocabulary[pad]
    return [encoder for encoder, _ in found]


# ---- published files: OpenAI's archives ------------------------------------------------------
# Their .pt files are programs (TorchScript): zip archives of code, which is not looked at, and of pickled modules.
# Here every class the pickle names becomes an inert holder of attributes, and only tensors are built.

STORAGE_TYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
}


class _Inert:
    """Stands for any class: takes the attributes a pickle gives it and does nothing."""

    def __new__(cls, *arguments):
        self = super().__new__(cls)
        self.attributes = {}
        return self

    def __setstate__(self, attributes):
        self.attributes = attributes


class _ArchiveUnpickler(pickle.Unpickler):
    def __init__(self, archive, root):
        super().__init__(archive.open(f"{root}/data.pkl"))
        self.archive, self.root = archive, root

    def find_class(self, module, name):
        if module == "torch" and name in STORAGE_TYPES:
            return STORAGE_TYPES[name]
        return _strided if (module, name) == ("torch._utils", "_rebuild_tensor_v2") else _Inert

    def persistent_load(self, key):
        _, dtype, number, *_ = key  # ("storage", type, name in the archive, device, elements)
        return torch.frombuffer(bytearray(self.archive.read(f"{self.root}/data/{number}")), dtype=dtype)


def _strided(storage, offset, shape, strides, *_):
    return storage.as_strided(shape, strides, offset)


def is_torchscript(path):
    """Whether the file at `path` is a TorchScript archive: those alone keep their constants apart."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path):
    """The tensors of a TorchScript archive, {dotted name: tensor}; nothing in it is executed."""

    def tensors(module, prefix):
        for name, value in module.attributes.items():
            if isinstance(value, torch.Tensor):
                yield prefix + name, value
            elif isinstance(value, _Inert):
                yield from tensors(value, f"{prefix}{name}.")

    try:
        with zipfile.ZipFile(path) as archive:
            root = archive.namelist()[0].partition("/")[0]
            return dict(tensors(_ArchiveUnpickler(archive, root).load(), ""))
    except Exception as error:  # a pickle can fail in any way
        raise UserError(f"{path}: not a whole TorchScript archive ({type(error).__name__}: {error})") from None


# ---- published files: configurations ---------------------------------------------------------

HF_TOWER_NAMES = {  # ours: theirs
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "activation": "hidden_act",
    "norm_eps": "layer_norm_eps",
}
HF_VISION_NAMES = HF_TOWER_NAMES | {"patch_size": "patch_size", "image_size": "image_size"}
HF_TEXT_NAMES = HF_TOWER_NAMES | {"vocab_size": "vocab_size", "context_length": "max_position_embeddings"}
LARGEST_ID = 2  # as eos_token_id in config.json: not an id, but "read the text off at its largest id"


def find_config(path, tensors, source, activation=None):
    """The CLIPConfig of weights as read_weights returns them: from the JSON beside them, else from their shapes."""
    folder = path if path.is_dir() else path.parent
    bias = "logit_bias" in tensors
    if source == "huggingface" and (folder / "config.json").exists():
        file = folder / "config.json"
        config = config_from_hf(checkpoint.read_json(file), file)
        if config.vision and (folder / "preprocessor_config.json").exists():
            saved = checkpoint.read_json(folder / "preprocessor_config.json")
            colours = {k: tuple(saved[f"image_{k}"]) for k in ("mean", "std") if f"image_{k}" in saved}
            config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, **colours))
        return dataclasses.replace(config, logit_bias=bias)
    if source == "open_clip" and (folder / "open_clip_config.json").exists():
        file = folder / "open_clip_config.json"
        return dataclasses.replace(config_from_open_clip(checkpoint.read_json(file), file), logit_bias=bias)
    if source == "openai":
        activation = activation or "quick_gelu"
    if activation is None:
        raise UserError(
            f"{path}: these weights do not say which GELU they were trained with; pass "
            'config=CLIPConfig.from_weights(path, activation="quick_gelu") if they are OpenAI\'s, "gelu" if LAION\'s'
        )
    return dataclasses.replace(config_from_shapes(tensors, activation, path), logit_bias=bias)


def config_from_open_clip(saved, path="open_clip_config.json"):
    """An `open_clip_config.json` (a dict) of a CLIP of two transformers, as a CLIPConfig."""
    try:
        c, pictures = saved["model_cfg"], saved.get("preprocess_cfg", {})
        v, t = c["vision_cfg"], c["text_cfg"]
        common = {"activation": "quick_gelu" if c.get("quick_gelu") else "gelu"}
        colours = {k: tuple(pictures[k]) for k in ("mean", "std") if k in pictures}
        hidden_dim, heads = int(v["width"] * v.get("mlp_ratio", 4)), v["width"] // v.get("head_width", 64)
        vision = _vision(v["width"], v["layers"], heads, v["patch_size"], v["image_size"], hidden_dim)
        text = _text(t["width"], t["layers"], t["heads"])
        text |= {k: t[k] for k in ("vocab_size", "context_length") if k in t}
        return CLIPConfig(c["embed_dim"], VisionConfig(**vision | common | colours), TextConfig(**text | common))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not the config of a CLIP ({type(error).__name__}: {error})") from None


def config_from_shapes(tensors, activation, path):
    """What the shapes of `tensors` (under Hugging Face's names) tell; heads are 64 wide but for LAION's largest."""

    def tower(name, heads):
        first = f"{name}.encoder.layers.0.mlp.fc1.weight"
        if first not in tensors:
            return None
        hidden_dim, width = tensors[first].shape
        if width % 64:
            raise UserError(f"{path}: {name} is {width} wide, which does not tell its number of heads; pass config=")
        shape = {"width": width, "layers": _count_layers(tensors, name), "hidden_dim": hidden_dim}
        return shape | {"heads": heads.get(width, width // 64), "activation": activation}

    try:
        if vision := tower("vision_model", HEADS):
            patch_size = tensors["vision_model.embeddings.patch_embedding.weight"].shape[-1]
            positions = len(tensors["vision_model.embeddings.position_embedding.weight"])
            vision = VisionConfig(**vision, patch_size=patch_size, image_size=patch_size * math.isqrt(positions - 1))
        if text := tower("text_model", {}):
            vocab_size = len(tensors["text_model.embeddings.token_embedding.weight"])
            context_length = len(tensors["text_model.embeddings.position_embedding.weight"])
            text = TextConfig(**text, vocab_size=vocab_size, context_length=context_length)
        projections = [n for n in ("visual_projection.weight", "text_projection.weight") if n in tensors]
        return CLIPConfig(len(tensors[projections[0]]) if projections else 0, vision, text)
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]} is missing") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _count_layers(tensors, tower):
    return sum(name.startswith(f"{tower}.encoder.layers.") and name.endswith("layer_norm1.weight") for name in tensors)


def config_from_hf(saved, path="config.json"):
    """A Hugging Face `config.json` (a dict) of a CLIP or of one of its towers, as a CLIPConfig."""
    kind = saved.get("model_type")
    if kind not in ("clip", "clip_text_model", "clip_vision_model"):
        raise UserError(f"{path}: model_type is {kind!r}, expected 'clip', 'clip_text_model' or 'clip_vision_model'")
    vision = text = None
    if kind == "clip":
        # the oldest files write a tower twice, and the second is right
        vision = (saved.get("vision_config") or {}) | (saved.get("vision_config_dict") or {})
        text = (saved.get("text_config") or {}) | (saved.get("text_config_dict") or {})
    elif kind == "clip_text_model":
        text = saved
    else:
        vision = saved
    architecture = (saved.get("architectures") or [""])[0]
    projects = kind == "clip" or architecture.endswith("WithProjection")
    try:
        if vision is not None:
            vision = VisionConfig(**{a: vision[b] for a, b in HF_VISION_NAMES.items() if b in vision})
        if text is not None:
            eos = text.get("eos_token_id", 49407)
            eos = None if eos == LARGEST_ID else eos
            text = TextConfig(**{a: text[b] for a, b in HF_TEXT_NAMES.items() if b in text}, eos=eos)
        return CLIPConfig(saved.get("projection_dim", 512) if projects else 0, vision, text)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None


def config_to_hf(config, tokenizer=None):
    """The other way: the dict that is written as config.json."""
    c, towers = config, {}
    if c.vision:
        shape = {theirs: getattr(c.vision, ours) for ours, theirs in HF_VISION_NAMES.items()}
        shape |= {"num_channels": 3, "projection_dim": c.embed_dim or c.vision.width}
        towers["vision_config"] = {"model_type": "clip_vision_model"} | shape
    if c.text:
        shape = {theirs: getattr(c.text, ours) for ours, theirs in HF_TEXT_NAMES.items()}
        shape |= {"projection_dim": c.embed_dim or c.text.width}
        ids = {"bos_token_id": tokenizer.start, "pad_token_id": tokenizer.pad} if tokenizer else {}
        ids |= {"eos_token_id": LARGEST_ID if c.text.eos is None else c.text.eos}
        towers["text_config"] = {"model_type": "clip_text_model"} | shape | ids
    if len(towers) == 2:
        return {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": c.embed_dim} | towers
    architecture = ("CLIPVisionModel" if c.vision else "CLIPTextModel") + ("WithProjection" if c.embed_dim else "")
    return {"architectures": [architecture]} | next(iter(towers.values()))


def _preprocessor_json(c):
    saved = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": c.image_size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": c.image_size, "width": c.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": c.mean,
        "image_std": c.std,
    }
    return json.dumps(saved, indent=2) + "\n"
