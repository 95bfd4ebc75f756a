"""DreamLLM: a LLaMA that reads pictures through CLIP and draws them through latent diffusion.

A picture to be read comes in as CLIP's patches; a picture to be drawn starts from learned queries,
and the LLaMA's hidden states of these steer a U-Net in place of a text encoder:

    <s> a taco <dream_start> q q … q <dream_end> <im_start> p p … p <im_end> , a burrito … </s>
                             │ Q dream queries (Q, D)        ▲ CLIP's patches (N, D)
                  one causal pass of the LLaMA               └── projector ── clip ── picture
                             ▼
             hidden (Q, D) ── condition ──▶ context (Q, C) ── diffusion: its loss, or a picture

    symbol  B batch   T tokens   D the LLaMA's width   V its vocabulary   S side of CLIP's pictures
            N patches of a picture that is read   M pictures to be drawn   Q queries of each
            C width of the U-Net's context

A query learns from both losses: from the U-Net's, through context and LLaMA; and from the text's, as later tokens
attend to its position.

Dong et al. 2023, arXiv 2309.11499. documents.py writes such rows of tokens.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import published.dreamllm
import published.stable_diffusion
from clip import CLIP
from diffusion import LatentDiffusion
from model import LLaMA, LLaMAConfig, rotary_frequencies, sample_token
from support import checkpoint, settings
from support.chat import Special
from support.pictures import to_pil
from support.settings import UserError
from support.tokenizer import ADDED

# ---- projectors: from one model's width to another's -----------------------------------------


class Projector(nn.Module):
    """(B, N, I) → (B, N', O). The kinds are its subclasses in PROJECTORS, which add `layers`."""

    depth = 1  # projector_depth in published configurations
    on_grid = False  # True: the N vectors are those of a square grid, and `layers` see (B, I, h, w)

    def __init__(self, i, o, bias=True):
        super().__init__()
        self.width = i
        self.projector = self.layers(i, o, bias)

    @torch.no_grad()
    def length(self, n):
        """N → N', found by trying: no kind need say it, and none can say it wrongly."""
        return self(next(self.parameters()).new_zeros(1, n, self.width)).shape[1]

    def forward(self, x):
        if not self.on_grid:
            return self.projector(x)
        grid = rearrange(x, "b (h w) i -> b i h w", h=math.isqrt(x.shape[1]))
        return rearrange(self.projector(grid), "b o h w -> b (h w) o")


class LinearProjector(Projector):
    def layers(self, i, o, bias):
        return nn.Linear(i, o, bias)


class MLPProjector(Projector):
    depth = 2

    def layers(self, i, o, bias):
        return nn.Sequential(nn.Linear(i, o, bias), nn.GELU(), nn.Linear(o, o, bias))


class ConvProjector(Projector):
    """Each patch sees its neighbours."""

    on_grid = True

    def layers(self, i, o, bias):
        return nn.Conv2d(i, o, 3, padding=1, bias=bias)


class DownsampleProjector(Projector):
    """A quarter as many patches each way; the last convolution is a linear layer at every patch."""

    on_grid = True

    def layers(self, i, o, bias):
        halves = [nn.Conv2d(i, i, 3, stride=2, padding=1) for _ in range(2)]
        last = nn.Conv2d(i, o, 1, bias=bias)
        return nn.Sequential(halves[0], nn.GELU(), halves[1], nn.GELU(), last)


PROJECTORS = {
    "linear": LinearProjector,
    "mlp": MLPProjector,
    "conv": ConvProjector,
    "downsample": DownsampleProjector,
}


# ---- the model -------------------------------------------------------------------------------


@dataclass(frozen=True)
class DreamLLMConfig:
    """What DreamLLM adds to its parts, and the weights of its two losses."""

    queries: int = 64  # Q
    projector: str = "linear"  # from CLIP's patches to embeddings: a key of PROJECTORS
    condition: str = "linear"  # from hidden states to the U-Net's context: one that needs no grid
    w_lm: float = 1.0  # of the text's cross-entropy
    w_vm: float = 10.0  # of the pictures' squared error
    drop: float = 0.0  # share of pictures trained from the empty prompt: guidance needs it (0.1); published: 0
    min_snr: float = 0.0  # of LatentDiffusion.loss, as the next two; the published runs use none
    noise_offset: float = 0.0
    perturbation: float = 0.0

    def __post_init__(self):
        settings.within(self, 1, 2**16, "queries")
        settings.one_of(self, tuple(PROJECTORS), "projector")
        gridless = tuple(name for name, kind in PROJECTORS.items() if not kind.on_grid)
        settings.one_of(self, gridless, "condition")
        settings.at_least(self, 0, "w_lm", "w_vm", "min_snr", "noise_offset", "perturbation")
        settings.fraction(self, "drop")


END = object()  # what `stream_document` yields last if the model itself ended the document


class DreamLLM(nn.Module):
    """A LLaMA that reads pictures through CLIP and draws them through latent diffusion.

    llama, clip and diffusion are used as they are, of clip only the vision tower, of diffusion
    everything but text encoders. The tokenizer must know the tokens ADDED, and the LLaMA have rows
    for them (`llama.resize`). How many patches a picture has, and how large drawn pictures are,
    follows from these parts.
    """

    def __init__(self, llama, clip, diffusion, config, tokenizer):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.always_run = ()  # of "clip" and "diffusion": see zero_for_absent
        self.llama, self.clip = llama, clip.vision_encoder()
        self.diffusion = LatentDiffusion(diffusion.unet, diffusion.vae, diffusion.schedule)
        vision, unet, vae = clip.config.vision, diffusion.unet.config, diffusion.vae.config
        width = llama.config.dim
        self.projector = PROJECTORS[config.projector](vision.width, width)
        self.dream_queries = nn.Parameter(torch.randn(1, config.queries, width) * 0.02)
        self.condition = PROJECTORS[config.condition](width, unet.cross_attention_dim, bias=False)
        self.patches = self.projector.length(vision.patches)  # N, after the projector
        self.side = unet.sample_size * vae.factor  # pixels of a drawn picture
        if absent := ", ".join(name for name in ADDED if name not in tokenizer.special):
            raise UserError(f"the tokenizer does not know {absent}: tokenizer.add(ADDED)")
        known, rows = tokenizer.vocab_size, llama.config.vocab_size
        if known > rows:
            sizes = f"the tokenizer knows {known} tokens, the LLaMA only {rows}"
            raise UserError(f"{sizes}: llama.resize(tokenizer.vocab_size) adds the missing ones")
        special = tokenizer.special
        patch = special["<im_patch>"]
        # a picture to read; and one to draw, without the <dream_end> that comes after it
        self.image_span = [special["<im_start>"], *[patch] * self.patches, special["<im_end>"]]
        self.dream_prefix = [special["<dream_start>"], *[patch] * config.queries]

    # -- reading and training --

    def embed(self, tokens, images, queries=True):
        """tokens (B, T), images (·, 3, S, S) as CLIP wants them, in reading order → (B, T, D).

        After every <im_start> come a picture's patches, after every <dream_start> the queries.
        queries=False keeps the tokens' own embeddings there, as the published code does for a batch
        with nothing to draw.
        """
        x = self.llama.embed_tokens(tokens)  # (B, T, D)
        if queries:
            rows, columns = self.span_positions(tokens, "<dream_start>", self.config.queries)
            own = self.dream_queries.expand(len(rows), -1, -1)  # (n, Q, D)
            x = x.index_put((rows, columns), own.to(x.dtype))
        rows, columns = self.span_positions(tokens, "<im_start>", self.patches)
        if len(rows) != len(images):
            raise ValueError(f"{len(rows)} spans of <im_start> but {len(images)} pictures")
        if len(images):
            own = self.projector(self.clip.patch_features(images))  # (n, N, D)
            x = x.index_put((rows, columns), own.to(x.dtype))
        return x

    def span_positions(self, tokens, start, length):
        """The `length` positions after each token `start`: rows (n, 1), columns (n, length)."""
        rows, starts = (tokens == self.tokenizer.special[start]).nonzero(as_tuple=True)
        columns = starts[:, None] + torch.arange(1, length + 1, device=tokens.device)
        if len(starts) and columns.max() >= tokens.shape[1]:
            last, end = int(starts.max()), tokens.shape[1]
            raise ValueError(f"{start} at {last}: its {length} positions reach beyond {end} tokens")
        return rows[:, None], columns

    def forward(self, tokens, labels, images, images_dm, draws=None):
        """One pass for both losses → {loss, lm_loss, vm_loss, logits (B, T, V)}.

        tokens (B, T)           padded on the right: attention is causal, so that no token sees it
        labels (B, T)           the same, or -100 where nothing is to be learned
        images (·, 3, S, S)     to be read, normalised as CLIP wants them
        images_dm (M, 3, H, W)  to be drawn, in [0, 1]; both in reading order over the batch
        draws                   the diffusion.LossNoise of the pictures; None: a fresh one

        lm_loss is the mean over all labels of the batch, vm_loss the mean over all pictures.
        """
        embeddings = self.embed(tokens, images, queries=len(images_dm) > 0)
        embeddings = embeddings + self.zero_for_absent(images, images_dm)
        hidden = self.llama.hidden(embeddings)  # (B, T, D)
        logits = self.llama.logits(hidden)  # (B, T, V)
        wanted = labels[:, 1:].flatten()
        predicted = logits[:, :-1].flatten(0, 1).float()
        lm_loss = F.cross_entropy(predicted, wanted, ignore_index=-100, reduction="sum")
        lm_loss = lm_loss / (wanted != -100).sum().clamp(min=1)
        vm_loss = self.drawing_loss(hidden, tokens, images_dm, draws)
        loss = self.config.w_lm * lm_loss + self.config.w_vm * vm_loss
        return {"loss": loss, "lm_loss": lm_loss, "vm_loss": vm_loss, "logits": logits}

    def zero_for_absent(self, images, images_dm):
        """0, made of the weights that a batch without pictures to read or to draw leaves out.

        Ranks average their gradients, so each needs one of every weight. And where they hold shares of the weights
        (support/parallel.py), all must run each part that one of them needs: `always_run`, for this batch.
        """
        vision, zero = self.clip.config.vision, self.dream_queries.new_zeros(())
        if not len(images):
            features = zero.expand(1, vision.patches, vision.width)
            if "clip" in self.always_run:
                features = self.clip.patch_features(zero.expand(1, 3, vision.image_size, vision.image_size))
            zero = zero + 0 * self.projector(features).sum()
        return zero if len(images_dm) else zero + 0 * self.dream_queries.sum()

    def drawing_loss(self, hidden, tokens, images_dm, draws):
        """hidden (B, T, D) → (): the U-Net's squared error, given the states of the queries; 0 without pictures."""
        c = self.config
        if not len(images_dm):
            return 0 * self.blank_drawing_loss(hidden)
        rows, columns = self.span_positions(tokens, "<dream_start>", c.queries)
        if len(rows) != len(images_dm):
            count = len(images_dm)
            raise ValueError(f"{len(rows)} spans of <dream_start> but {count} pictures to draw")
        draws = draws or self.diffusion.loss_noise(len(images_dm), *images_dm.shape[2:])
        return self.loss_of_states(hidden[rows, columns], images_dm, draws)

    def loss_of_states(self, states, images_dm, draws):
        """states of the queries (M, Q, D), images (M, 3, H, W) in [0, 1] → ()."""
        c = self.config
        if c.drop and self.training:
            # The empty prompt is <s> and real queries, as in drawing. (The published code has the
            # embeddings of <im_patch> in their place, which drawing never uses.)
            dropped = (draws.drop < c.drop)[:, None, None]
            states = torch.where(dropped, self.dream_states([""]), states)
        context = self.condition(states)  # (M, Q, C)
        options = (c.min_snr, c.noise_offset, c.perturbation)
        return self.diffusion.loss(images_dm, context, draws, *options)

    def blank_drawing_loss(self, hidden):
        """Of a batch with nothing to draw: a sum over the same weights as drawing_loss, to be multiplied by 0."""
        states = hidden[:1, :1].expand(-1, self.config.queries, -1)  # (1, Q, D)
        if "diffusion" not in self.always_run:
            return self.condition(states).sum()
        blank = states.new_zeros(1, 3, self.side, self.side)
        return self.loss_of_states(states, blank, self.diffusion.loss_noise(1, self.side, self.side))

    # -- prompts --

    def prompt(self, parts):
        """A text, a list of texts and pictures, or documents.chat_parts → ([id, …], [picture, …]).

        Pictures are PIL's, to be read. A list with Specials in it is a conversation.
        """
        parts = [parts] if isinstance(parts, str) else list(parts)
        pictures = [part for part in parts if not isinstance(part, str)]
        if any(isinstance(part, Special) for part in parts):
            return self.chat_ids(parts), pictures
        return self.document_ids(parts), pictures

    def document_ids(self, parts):
        """<s>, then each text by itself and stripped, as in the rows of training."""
        ids = [] if self.tokenizer.bos is None else [self.tokenizer.bos]
        for part in parts:
            ids += self.tokenizer.encode(part.strip()) if isinstance(part, str) else self.image_span
        return ids

    def chat_ids(self, parts):
        """The texts of a conversation are one text, which its template wrote."""
        spans = [part if isinstance(part, str) else self.image_span for part in parts]
        return self.tokenizer.encode_parts(spans)

    def hidden_states(self, ids, pictures=(), caches=None):
        """B lists of T ids, PIL pictures → (B, T, D); with caches, after what they hold."""
        weight = self.llama.embed_tokens.weight
        images = weight.new_zeros(0)
        if len(pictures):
            images = self.clip.preprocess(list(pictures)).to(weight)  # (·, 3, S, S)
        tokens = torch.tensor(ids, device=weight.device)
        return self.llama.hidden(self.embed(tokens, images), caches)

    def dream_states(self, prompts):
        """prompts, each as `prompt` takes it → (B, Q, D): states of the queries after each."""
        rows, pictures = [], []
        for parts in prompts:
            ids, seen = self.prompt(parts)
            rows.append(ids + self.dream_prefix)
            pictures += seen
        longest = max(map(len, rows))
        if longest > self.llama.config.max_seq_len:
            length = longest - len(self.dream_prefix)
            raise UserError(f"a prompt of {length} tokens leaves the context no room for a picture")
        pad = self.tokenizer.special["[PAD]"]  # on the right, after the queries: they never see it
        rows = [row + [pad] * (longest - len(row)) for row in rows]
        hidden = self.hidden_states(rows, pictures)  # (B, T, D)
        tokens = torch.tensor(rows, device=hidden.device)
        return hidden[self.span_positions(tokens, "<dream_start>", self.config.queries)]

    # -- drawing and writing --

    @torch.inference_mode()
    def text_to_image(self, prompts, negative=None, **drawing):
        """prompts, B of them: texts, or lists of texts and PIL pictures → (B, 3, H, W) in [0, 1].

        negative: what to move away from, one or B; None is the empty prompt. drawing: guidance=7.5,
        steps=50, sampler="ddpm", seed, … of LatentDiffusion.generate.
        """
        negative = "" if negative is None else negative
        states = self.dream_states([prompts] if isinstance(prompts, str) else prompts)
        without = self.dream_states([negative] if isinstance(negative, str) else negative)
        return self.images_from(states, without, **drawing)

    def images_from(self, states, without, sampler="ddpm", **drawing):
        """Queries' states (B, Q, D), those of negative prompts → images (B, 3, H, W) in [0, 1]."""
        context, negative = self.condition(states), self.condition(without)  # (B, Q, C)
        return self.diffusion.generate(context, negative, sampler=sampler, **drawing)

    def non_text_mask(self):
        """(V,) bool: True for every id that is neither text nor a stop token."""
        special = set(self.tokenizer.special.values())
        text = (self.tokenizer.bytes_of.keys() - special) | self.tokenizer.stops
        device = self.dream_queries.device
        forbidden = torch.ones(self.llama.config.vocab_size, dtype=torch.bool, device=device)
        forbidden[sorted(text)] = False
        return forbidden

    def generate_document(self, prompt, max_new_tokens=256, max_pictures=4, **options):
        """What `stream_document` yields as a list of texts and PIL pictures."""
        return merge_texts(self.stream_document(prompt, max_new_tokens, max_pictures, **options))[0]

    @torch.inference_mode()
    def stream_document(
        self,
        prompt,
        max_new_tokens=256,
        max_pictures=4,
        temperature=1.0,
        top_k=None,
        top_p=None,
        seed=None,
        progress=False,
        **drawing,
    ):
        """prompt (as `prompt` takes it) → yields what follows: texts, PIL pictures, perhaps END.

        It samples until </s> (then END comes last), max_new_tokens, or the end of its context. At a
        <dream_start> the U-Net draws a picture from all that comes before; the model then reads the
        picture and goes on. With max_pictures=0 it only writes: captions, answers.
        drawing: guidance=7.5, steps=50, sampler="ddpm", … of LatentDiffusion.generate.
        """
        special, capacity = self.tokenizer.special, self.llama.config.max_seq_len
        dream_start = special["<dream_start>"]
        after_picture = [special["<dream_end>"], *self.image_span]
        caches, hidden = self.read_prompt(prompt)  # hidden (1, D)
        generator = torch.Generator(hidden.device)
        generator.seed() if seed is None else generator.manual_seed(seed)
        without = self.dream_states([""])  # for guidance
        forbidden = self.non_text_mask()
        span = len(self.dream_prefix + after_picture)  # a picture's tokens, drawn and then read
        decode, drawn, ended = self.tokenizer.decoder(), 0, False
        for _ in range(max_new_tokens):
            if caches[0].length >= capacity:
                break
            forbidden[dream_start] = drawn == max_pictures or caches[0].length + span > capacity
            logits = self.llama.logits(hidden).float()  # (1, V)
            logits = logits.masked_fill(forbidden, float("-inf"))
            new = sample_token(logits, temperature, top_k, top_p, generator).item()
            ended = new in self.tokenizer.stops
            if text := decode(None if ended or new == dream_start else new):
                yield text
            if ended:
                break
            if new != dream_start:
                hidden = self.hidden_states([[new]], (), caches)[:, -1]
                continue
            states = self.hidden_states([self.dream_prefix], (), caches)[:, 1:]  # (1, Q, D)
            if progress:
                print(file=sys.stderr)  # its bar gets a line of its own, below the text
            own_seed = None if seed is None else seed + 1000 * drawn  # far from the next document's
            options = drawing | {"seed": own_seed, "progress": progress}
            (picture,) = to_pil(self.images_from(states, without, **options))
            yield picture
            drawn += 1
            decode = self.tokenizer.decoder()
            hidden = self.hidden_states([after_picture], [picture], caches)[:, -1]
        if not ended and (text := decode(None)):  # what a character still lacks
            yield text
        if ended:
            yield END

    def read_prompt(self, prompt):
        """A document's prompt → the caches that hold it, its last token's hidden state (1, D)."""
        ids, pictures = self.prompt(prompt)
        capacity = self.llama.config.max_seq_len
        if not ids:
            raise UserError("the prompt is empty, and no token of this tokenizer begins a text")
        if len(ids) >= capacity:
            raise UserError(f"the prompt's {len(ids)} tokens fill the context of {capacity}")
        caches = self.llama.caches(1, capacity)
        return caches, self.hidden_states([ids], pictures, caches)[:, -1]

    # -- published files --

    def save_pretrained(self, path):
        """Writes all weights, frozen ones too, in the published layout, with all configurations and the tokenizer."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        self.clip.save_config(path / published.dreamllm.CLIP_PART)
        published.stable_diffusion.write_configs(path / published.dreamllm.DIFFUSION_PART, self.diffusion)
        self.tokenizer.save_pretrained(path)
        frequencies = rotary_frequencies(self.llama.config, self.dream_queries.device)
        published.dreamllm.write(path, self, frequencies)

    @classmethod
    def from_pretrained(cls, path, dtype=None, device="cpu", parts=(), one_dtype=True):
        """A DreamLLM from a run of ours or a published folder. dtype None: as stored.

        one_dtype: all parts get the LLaMA's, as computing needs; False leaves each part's weights as its file has them.
        The configurations of CLIP and Stable Diffusion, which config.json names, are looked for in
        the folder, beside it, and in the folders `parts`.
        """
        checkpoint.expect(path, "a DreamLLM")
        depths = {name: kind.depth for name, kind in PROJECTORS.items()}
        saved = published.dreamllm.read(checkpoint.weights_folder(path), parts, depths)
        config = settings.build(DreamLLMConfig, saved.fields)
        llama_config = settings.build(LLaMAConfig, saved.llama)
        tensors = saved.tensors
        llama = LLaMA.from_tensors(tensors["llama"], saved.folder, dtype, device, llama_config)
        clip_file, head_file = (saved.folder / published.dreamllm.FILES[name] for name in ("projector", "condition"))
        clip = CLIP.from_tensors(tensors["clip"], saved.clip, dtype, device, file=clip_file)
        diffusion = LatentDiffusion.from_tensors(tensors["diffusion"], saved.diffusion, dtype, device, head_file)
        model = cls(llama, clip, diffusion, config, saved.tokenizer)
        if saved.resolution not in (None, model.side):
            key = f"{saved.folder / 'config.json'}: stable_diffusion_head: resolution is {saved.resolution!r}"
            raise UserError(f"{key}, but its U-Net and autoencoder are of {model.side} pixels")
        model.load_own_weights(saved, dtype, device)
        for part in (model.clip, model.projector, model.condition, model.diffusion.unet) if one_dtype else ():
            part.to(llama.embed_tokens.weight.dtype)
        return model.eval()

    def load_own_weights(self, saved, dtype, device):
        """Loads, from a published.dreamllm.Folder, the weights that belong to no part."""
        queries = nn.ParameterDict({"dream_queries": self.dream_queries})
        own = {"projector": self.projector, "condition": self.condition, "queries": queries}
        for name, module in own.items():
            file = saved.folder / published.dreamllm.FILES[name]
            checkpoint.load_into(module, saved.tensors[name], file, dtype, device)
        self.dream_queries = queries["dream_queries"]


def merge_texts(stream):
    """What `stream_document` yields → (pieces, neighbouring texts as one; whether END came)."""
    pieces, ended = [], False
    for piece in stream:
        if piece is END:
            ended = True
        elif isinstance(piece, str) and pieces and isinstance(pieces[-1], str):
            pieces[-1] += piece
        else:
            pieces.append(piece)
    return pieces, ended
