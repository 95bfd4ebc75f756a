"""DreamLLM: a LLaMA that looks through CLIP and draws through a U-Net."""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import nn

from model import LLaMA, LLaMAConfig, rotary_frequencies, sample_token
from published.llama import config_from_hf, config_to_hf, from_hf_names, to_hf_names
from support import checkpoint, settings
from support.settings import UserError
from support.tokenizer import ADDED, Special, Tokenizer

# ---- (from model) ----

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
        self.image_span = [s["<im_start>"], *[s["<im_patch>"]] * self.patches, s["<im_end>"]]  # a picture to look at
        self.dream_prefix = [
            s["<dream_start>"],
            *[s["<im_patch>"]] * config.queries,
        ]  # one to draw, as far as it is asked for

    # -- reading and training --

    def embed(self, tokens, images, queries=True):
        """tokens (B, T), images (·, 3, S, S) as CLIP wants them, in reading order → embeddings (B, T, D).

        After every <im_start> stand a picture's patches, after every <dream_start> the queries. (queries=False leaves
        those places as their tokens have them: so does the published code where it is given nothing to draw.)
        """
        x = self.llama.embed_tokens(tokens)  # (B, T, D)
        if queries:
            rows, places = self.span_positions(tokens, "<dream_start>", self.config.queries)
            x = x.index_put((rows, places), self.dream_queries.expand(len(rows), -1, -1).to(x.dtype))
        rows, places = self.span_positions(tokens, "<im_start>", self.patches)
        if len(rows) != len(images):
            raise ValueError(f"{len(rows)} spans of <im_start> but {len(images)} pictures")
        if len(images):
            x = x.index_put((rows, places), self.projector(self.clip.patch_features(images)).to(x.dtype))
        return x

    def span_positions(self, tokens, start, length):
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
        (M, 3, H, W) to be drawn, in [0, 1]: all those of the batch in reading order. draws: a diffusion.LossNoise,
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
        rows, places = self.span_positions(tokens, "<dream_start>", c.queries)
        if len(rows) != len(images_dm):
            raise ValueError(f"{len(rows)} spans of <dream_start> but {len(images_dm)} pictures to draw")
        draws = draws or self.diffusion.loss_noise(len(images_dm), *images_dm.shape[2:])
        states = hidden[rows, places]  # (M, Q, D)
        if c.drop and self.training:
            # Here as in drawing, no prompt means real queries after <s>. (The published code trains it with the
            # embeddings of <im_patch> in their places, which drawing never does.)
            states = torch.where((draws.drop < c.drop)[:, None, None], self.dream_states([""]), states)
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
                frame = self.tokenizer.special_ids(part)
                ids += [] if n == 0 and frame == ids else frame  # <s> stands there already
                continue
            if isinstance(part, str):
                ids += self.tokenizer.encode(part if chat else part.strip(), follows=follows)
            else:
                ids += self.image_span
                pictures.append(part)
            follows = chat
        return ids, pictures

    def hidden_states(self, ids, pictures=(), caches=None):
        """ids (B lists of equal length), PIL pictures → hidden (B, T, D); with caches, after what they hold."""
        weight = self.llama.embed_tokens.weight
        images = self.clip.preprocess(list(pictures)).to(weight) if len(pictures) else weight.new_zeros(0)
        return self.llama.hidden(self.embed(torch.tensor(ids, device=weight.device), images), caches)

    def dream_states(self, prompts):
        """prompts (each as `prompt` takes it) → (B, Q, D): what the queries become after each of them."""
        read = [self.prompt(parts) for parts in prompts]
        longest = max(len(ids) for ids, _ in read) + len(self.dream_prefix)
        if longest > self.llama.config.max_seq_len:
            raise UserError(
                f"a prompt of {longest - len(self.dream_prefix)} tokens leaves no room for a picture in the context"
            )
        # What is filled up on the right comes after the queries, so that they never see it.
        pad = self.tokenizer.special["[PAD]"]
        rows = [ids + self.dream_prefix + [pad] * (longest - len(ids) - len(self.dream_prefix)) for ids, _ in read]
        hidden = self.hidden_states(rows, [picture for _, pictures in read for picture in pictures])  # (B, T, D)
        return hidden[
            self.span_positions(torch.tensor(rows, device=hidden.device), "<dream_start>", self.config.queries)
        ]

    @torch.inference_mode()
    def text_to_image(
        self,
        prompts,
        negative=None,
        guidance=7.5,
        steps=50,
        sampler="ddpm",
        seed=None,
        noise=None,
        rescale=0.0,
        progress=False,
    ):
        """prompts, B of them: texts, or lists of texts and PIL pictures → images (B, 3, H, W) in [0, 1].

        negative: what to move away from, one or B; None is the empty prompt. The rest: see LatentDiffusion.generate.
        """
        negative = "" if negative is None else negative
        context = self.condition(self.dream_states([prompts] if isinstance(prompts, str) else prompts))  # (B, Q, C)
        without = self.condition(self.dream_states([negative] if isinstance(negative, str) else negative))
        return self.diffusion.generate(
            context, without, guidance, steps, sampler, seed=seed, noise=noise, rescale=rescale, progress=progress
        )

    def non_text_mask(self):
        """(V,) bool: what is never drawn as text, all ids but the text's own and those that end it."""
        text = (self.tokenizer.bytes_of.keys() - set(self.tokenizer.special.values())) | self.tokenizer.stops
        forbidden = torch.ones(self.llama.config.vocab_size, dtype=torch.bool, device=self.dream_queries.device)
        forbidden[sorted(text)] = False
        return forbidden

    def generate_document(self, prompt, max_new_tokens=256, max_pictures=4, **options):
        """What `stream_document` yields, as a list: neighbouring texts are one."""
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
        forbidden = self.non_text_mask()
        span = len(self.dream_prefix) + 1 + len(self.image_span)  # what a picture takes: drawn, then looked at
        without = self.condition(self.dream_states([""]))  # what guidance leads away from
        caches = self.llama.caches(1, capacity)
        hidden = self.hidden_states([ids], pictures, caches)[:, -1]  # (1, D)
        left, drawn, ended = max_new_tokens, 0, None  # at the end: whether by itself

        def words():
            """The ids of the text up to the next picture, or the end."""
            nonlocal hidden, left, ended
            while left and caches[0].length < capacity:
                room = drawn < max_pictures and caches[0].length + span <= capacity
                forbidden[special["<dream_start>"]] = not room
                logits = self.llama.logits(hidden).float().masked_fill(forbidden, float("-inf"))  # (1, V)
                new, left = sample_token(logits, temperature, top_k, top_p, chance).item(), left - 1
                if new == special["<dream_start>"]:
                    return
                if new in self.tokenizer.stops:
                    ended = True
                    return
                yield new
                hidden = self.hidden_states([[new]], (), caches)[:, -1]
            ended = False

        while True:
            yield from self.tokenizer.stream(words())
            if ended is not None:
                return ended
            states = self.hidden_states([self.dream_prefix], (), caches)[:, 1:]  # (1, Q, D)
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
            hidden = self.hidden_states([[special["<dream_end>"], *self.image_span]], [picture], caches)[:, -1]

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
        folder = checkpoint.weights_folder(path)
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
        projector = pop_prefix(own["clip_vision_embedding"], "projector.")
        condition = pop_prefix(own["stable_diffusion_head"], "projector.")
        vision = pop_prefix(own["clip_vision_embedding"], "clip_vision_model.")
        if own["clip_vision_embedding"]:
            raise UserError(f"{folder}: {next(iter(own['clip_vision_embedding']))} belongs to no part of DreamLLM")

        llama_config = settings.build(LLaMAConfig, config_from_hf(saved | {"model_type": "llama"}, file))
        llama = LLaMA.from_tensors(whole, folder, dtype, device, llama_config)
        clip = clip.from_tensors(vision, find_part(clip_name, folder, parts), dtype, device)
        head = own["stable_diffusion_head"]
        diffusion = diffusion.from_tensors(head, find_part(diffusion_name, folder, parts), dtype, device)
        model = cls(llama, clip, diffusion, config, tokenizer)
        checkpoint.load_into(model.projector, projector, folder / "clip_vision_embedding.bin", dtype, device)
        checkpoint.load_into(model.condition, condition, folder / "stable_diffusion_head.bin", dtype, device)
        queries = own["dream_embedding"].get("dream_queries", torch.empty(0))
        if queries.shape != model.dream_queries.shape or not queries.isfinite().all():
            expected = tuple(model.dream_queries.shape)
            raise UserError(f"{folder}: dream_queries is {tuple(queries.shape)}, expected finite numbers of {expected}")
        model.dream_queries = nn.Parameter(queries.to(device, dtype, copy=True))
        for part in (model.clip, model.projector, model.condition, diffusion.unet):  # files may differ in this
            part.to(llama.embed_tokens.weight.dtype)
        return model.eval()


def merge_texts(stream):
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


def pop_prefix(tensors, prefix):
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
