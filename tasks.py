"""What each kind of run trains: six tasks side by side."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._functorch import config as functorch_config
from tqdm import tqdm

from clip import CLIP, CLIPConfig, contrastive_loss, sigmoid_loss, text_encoders
from data import CaptionRows, DataSettings, PictureRows, TokenRows, held_out_pictures
from diffusion import (
    AutoencoderKL,
    AutoencoderKLConfig,
    AutoencoderLoss,
    LatentDiffusion,
    LossNoise,
    NoiseSchedule,
    UNet,
    UNetConfig,
    diffusion_loss,
    offset_noise,
    reparameterize,
)
from documents import DocumentRows, DocumentSettings, Writer, draw_view
from dreamllm import DreamLLM, DreamLLMConfig
from model import SIZES, LLaMA, LLaMAConfig
from support import checkpoint, settings
from support.pictures import save_grid
from support.settings import MeshSettings, OptimSettings, RunSettings, TrainSettings, UserError
from support.tokenizer import ADDED, CLIPTokenizer, Tokenizer
from vqgan import VQGAN, Discriminator, VQGANConfig, VQGANLoss, VQGANLossConfig, usage

# ---- (from train) ----


@dataclass(frozen=True)
class VQGANSection(VQGANConfig):
    kind: str = "vqgan"
    init: str = ""  # a run or a published folder to start from


@dataclass(frozen=True)
class LLaMASection(LLaMAConfig):
    kind: str = "llama"
    init: str = ""
    size: str = ""  # a published size by name; keys beside it override its numbers


@dataclass(frozen=True)
class CLIPSection(CLIPConfig):
    kind: str = "clip"
    init: str = ""


@dataclass(frozen=True)
class VAESection(AutoencoderKLConfig):
    kind: str = "vae"
    init: str = ""


@dataclass(frozen=True)
class UNetSection(UNetConfig):
    kind: str = "unet"
    init: str = ""


@dataclass(frozen=True)
class DreamLLMSection(DreamLLMConfig):
    """A stage of DreamLLM: understand and create (stage I's two halves), interleaved (II) or instruct (III)."""

    kind: str = "dreamllm"
    init: str = ""  # the DreamLLM that this stage goes on from; without one, these three:
    llama: str = ""
    clip: str = ""
    diffusion: str = ""  # U-Net and autoencoder
    stage: str = "interleaved"
    trained: tuple[str, ...] = ("llama", "projector", "dream_queries", "condition")  # weights, or modules

    def __post_init__(self):
        super().__post_init__()
        if self.stage not in STAGES:
            raise ValueError(f'stage "{self.stage}" must be one of {", ".join(STAGES)}')
        if (self.stage == "understand" and self.w_vm) or (self.stage == "create" and self.w_lm):
            raise ValueError("the stage understand learns no pictures (w_vm = 0), and create no text (w_lm = 0)")


STAGES = ("understand", "create", "interleaved", "instruct")


@dataclass(frozen=True)
class DiffusionLoss:
    """Options of the squared error (what is predicted: [schedule]), and the share of captions dropped."""

    min_snr: float = 0.0  # γ of the min-SNR weights (Hang et al. 2023: 5); 0: none
    noise_offset: float = 0.0  # published 0.1; 0: none
    drop: float = 0.1  # share of captions replaced by the empty one, which guidance needs


@dataclass(frozen=True)
class VQGANRun:
    run: RunSettings
    model: VQGANSection
    data: DataSettings
    train: TrainSettings
    loss: VQGANLossConfig = field(default_factory=VQGANLossConfig)
    optim: OptimSettings = field(default_factory=OptimSettings)


@dataclass(frozen=True)
class LLaMARun:
    run: RunSettings
    model: LLaMASection
    data: DataSettings
    train: TrainSettings
    optim: OptimSettings = field(default_factory=OptimSettings)
    mesh: MeshSettings = field(default_factory=MeshSettings)  # of train_tpu.py; here it only has to be right


@dataclass(frozen=True)
class CLIPRun:
    run: RunSettings
    model: CLIPSection
    data: DataSettings
    train: TrainSettings
    optim: OptimSettings = field(default_factory=OptimSettings)


@dataclass(frozen=True)
class VAERun:
    run: RunSettings
    model: VAESection
    data: DataSettings
    train: TrainSettings
    loss: AutoencoderLoss = field(default_factory=AutoencoderLoss)
    optim: OptimSettings = field(default_factory=OptimSettings)


@dataclass(frozen=True)
class UNetRun:
    run: RunSettings
    model: UNetSection
    data: DataSettings
    train: TrainSettings
    schedule: NoiseSchedule = field(default_factory=NoiseSchedule)
    loss: DiffusionLoss = field(default_factory=DiffusionLoss)
    optim: OptimSettings = field(default_factory=OptimSettings)

    def __post_init__(self):
        if self.loss.min_snr and self.schedule.rescale_betas_zero_snr:
            raise ValueError("loss.min_snr gives a zero-SNR schedule's last time no weight, and drawing begins there")


@dataclass(frozen=True)
class DreamLLMRun:
    run: RunSettings
    model: DreamLLMSection
    data: DocumentSettings
    train: TrainSettings
    optim: OptimSettings = field(default_factory=OptimSettings)


RUNS = {"vqgan": VQGANRun, "llama": LLaMARun, "clip": CLIPRun, "vae": VAERun, "unet": UNetRun, "dreamllm": DreamLLMRun}

RECOMPUTING = ("llama", "unet", "dreamllm")  # what activation_checkpointing is there for


def read_run(path, overrides=()):
    """The configuration at `path` → (settings, the keys of [model] that were written down)."""
    values = settings.read(path, overrides)
    model = values.setdefault("model", {})
    if model.get("kind") not in RUNS:
        raise UserError(f'{path}: model.kind is "{model.get("kind", "")}", must be one of {", ".join(RUNS)}')
    if size := model.get("size"):
        if model["kind"] != "llama" or size not in SIZES:
            raise UserError(f'{path}: model.size "{size}" is not one of {", ".join(SIZES)} (of kind llama)')
        values["model"] = SIZES[size] | model
    s = settings.build(RUNS[model["kind"]], values)
    if s.train.activation_checkpointing and model["kind"] not in RECOMPUTING:
        raise UserError(f"train.activation_checkpointing is for model.kind {', '.join(RECOMPUTING)} only")
    return s, set(values["model"])


def start_model(cls, config_class, section, explicit_keys, resume):
    """A float32 model from `resume` (a step's folder), else section.init, else fresh.

    A key of [model] that was written down must agree with what is loaded.
    """
    names = [f.name for f in dataclasses.fields(config_class)]
    folder = resume or section.init
    if not folder:
        return cls(config_class(**{name: getattr(section, name) for name in names}))
    model = cls.from_pretrained(folder, dtype=torch.float32).train()
    settings.must_agree(explicit_keys & set(names), section, model.config, folder)
    return model


class VQGANTask:
    """Pictures → codes → pictures, with a discriminator as the second phase where loss.gan > 0."""

    unit = "images"

    def __init__(self, s, explicit_keys, ranks, resume):
        self.settings, self.ranks = s, ranks
        self.model = start_model(VQGAN, VQGANConfig, s.model, explicit_keys, resume)
        self.model.quantize.with_entropy = s.loss.entropy > 0
        self.modules = {"generator": self.model}
        if s.loss.gan:
            self.modules["discriminator"] = Discriminator()
        if s.loss.gan and s.loss.adaptive:
            # λ walks part of the graph twice, so a compiled forward must not give its buffers away
            functorch_config.donated_buffer = False
        self.loss_fn = VQGANLoss(s.loss).to(ranks.device)
        self.pictures = PictureRows(s.data, s.train.seed)
        self.from_scratch = not (resume or s.model.init)
        self.counts = torch.zeros(self.model.config.num_embeddings, device=ranks.device)  # since the last redraw
        self.reconstructions = {}  # reconstructions of this step, judged again by the discriminator's phase
        self.items_per_row = 1

    def active(self, phase, step):
        return phase == "generator" or step >= self.settings.loss.disc_start

    def batch(self, step, microstep, rows):
        return self.pictures.batch(step, microstep, rows)  # (B, side, side, 3) uint8

    def loss(self, phase, wrapped, batch, step, microstep):
        images = to_images(batch, self.ranks.device)
        if phase == "discriminator":
            return self.loss_fn.discriminator_loss(images, self.reconstructions.pop(microstep), wrapped)
        reconstruction, codes, losses = wrapped(images)
        discriminator = self.modules.get("discriminator")
        with frozen(discriminator):
            loss, values = self.loss_fn.generator_loss(self.model, images, reconstruction, losses, discriminator, step)
        counts = torch.bincount(codes.flatten(), minlength=len(self.counts))
        if self.ranks.world > 1:
            dist.all_reduce(counts)
        self.counts += counts
        self.images = images
        if discriminator and self.active("discriminator", step):
            self.reconstructions[microstep] = reconstruction.detach()
        return loss, values

    @torch.no_grad()
    def after_step(self, step, ema):
        """Moves codebook entries that nothing used lately onto vectors of the current batch.

        From scratch this happens after the first step too: the codebook starts where the encoder's outputs lie.
        """
        every = self.settings.loss.redraw_every
        if not every or ((step + 1) % every and not (self.from_scratch and step == 0)):
            return
        latents = self.model.latents(self.images)
        if self.ranks.world > 1:
            gathered = [torch.empty_like(latents) for _ in range(self.ranks.world)]
            dist.all_gather(gathered, latents.contiguous())
            latents = torch.cat(gathered)  # in the order of the rows, whatever the number of ranks
        draws = torch.Generator().manual_seed(self.settings.train.seed + step)
        moved = self.model.quantize.revive_dead_codes(self.counts == 0, latents, draws)
        self.counts.zero_()
        if ema:  # the average of a dead entry's past is no place for a living one
            place = [p is self.model.quantize.embedding.weight for p in self.model.parameters()].index(True)
            ema[place][moved] = self.model.quantize.embedding.weight[moved]

    def evaluate(self):
        """Over held-out pictures: PSNR in dB (mean over pictures) and how much of the codebook they use."""
        t = self.settings.train
        pictures = held_out_pictures(self.settings.data, t.eval_batches * t.batch_size)
        counts, psnrs = torch.zeros_like(self.counts), []
        for start in range(0, len(pictures), t.batch_size):
            images = to_images(pictures[start : start + t.batch_size], self.ranks.device)
            reconstruction, codes, _ = self.model(images)
            psnrs.append(-10 * (reconstruction.float().clamp(0, 1) - images).pow(2).mean((1, 2, 3)).log10())
            counts += torch.bincount(codes.flatten(), minlength=len(counts))
        used, perplexity = usage(counts)
        return {"held_out_psnr": torch.cat(psnrs).mean(), "code_usage": used, "code_perplexity": perplexity}

    def sample(self, path):
        """Held-out pictures above their reconstructions."""
        pictures = held_out_pictures(self.settings.data, 8)
        reconstruction = self.model.decode(self.model.encode(to_images(pictures, self.ranks.device)))
        save_grid([list(pictures), to_pictures(reconstruction)], path)

    def state(self):
        """What a resumed run needs beside weights and optimizers: {name: tensor}."""
        return {"counts": self.counts}

    def load_state(self, tensors):
        self.counts.copy_(tensors["counts"])


class Task:
    """What every other task says of the questions that only a GAN answers at length."""

    def active(self, phase, step):
        return True

    def after_step(self, step, ema):
        pass

    def state(self):
        return {}

    def load_state(self, tensors):
        pass


class LLaMATask(Task):
    """Rows of tokens → next-token prediction. With data.tokenizer, the samples are pictures."""

    unit = "tokens"

    def __init__(self, s, explicit_keys, ranks, resume):
        self.settings, self.ranks = s, ranks
        self.model = start_model(LLaMA, LLaMAConfig, s.model, explicit_keys, resume)
        self.model.activation_checkpointing = s.train.activation_checkpointing
        self.modules = {"model": self.model}
        c = self.model.config
        if not s.data.rows:
            raise UserError("data.rows is empty: name the JSONL files to train on (prepare.py tokenize makes them)")
        if s.data.tokenizer:
            checkpoint.weights_folder(
                s.data.tokenizer
            )  # its pictures are wanted first after many steps: is it there at all?
        if s.data.text_tokenizer:
            self.model.tokenizer = Tokenizer.from_pretrained(s.data.text_tokenizer)
            if (words := self.model.tokenizer.vocab_size) > c.vocab_size:
                raise UserError(f"data.text_tokenizer has {words} tokens, but model.vocab_size is {c.vocab_size}")

        def rows(paths, **options):
            return TokenRows(paths, c.max_seq_len, s.train.batch_size, s.train.seed, vocab_size=c.vocab_size, **options)

        self.rows = rows(s.data.rows, weights=s.data.weights)
        self.held_out = rows(s.data.held_out) if s.data.held_out else None
        self.items_per_row = c.max_seq_len

    def batch(self, step, microstep, rows):
        return np.stack(self.rows.batch(step * self.settings.train.accumulate + microstep, rows))  # (2, B, T)

    def loss(self, phase, wrapped, batch, step, microstep):
        inputs, targets = torch.from_numpy(batch).to(self.ranks.device)
        logits = wrapped(inputs)  # (B, T, V)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        return loss, {}

    def evaluate(self):
        if not self.held_out:
            return {}
        t = self.settings.train
        batches = min(t.eval_batches, max(1, self.held_out.tokens // (t.batch_size * self.items_per_row)))
        rows = self.ranks.rows(t.batch_size)
        losses = [
            self.loss("model", self.model, np.stack(self.held_out.batch(i, rows)), 0, 0)[0] for i in range(batches)
        ]
        loss = self.ranks.mean({"loss": torch.stack(losses).mean()})["loss"]
        return {"held_out_loss": loss, "held_out_perplexity": math.exp(min(loss, 50))}

    def sample(self, path):
        """Held-out sentences: every picture but the last is explicit_keys, then come the true last and the model's."""
        data = self.settings.data
        if not data.tokenizer or not self.held_out:
            return
        tokenizer = VQGAN.from_pretrained(data.tokenizer, device=self.ranks.device)
        h, w = tokenizer.grid(data.side)
        count = min(data.pictures, self.items_per_row // (h * w))
        if count < 2:
            return
        tokens = torch.from_numpy(self.held_out.batch(0, range(min(4, self.settings.train.batch_size)))[0])
        tokens = tokens[:, : count * h * w].to(self.ranks.device)
        draws = torch.Generator(self.ranks.device).manual_seed(self.settings.train.seed)
        codes = range(tokenizer.config.num_embeddings)
        drawn = self.model.generate(tokens[:, : -h * w], h * w, allowed=codes, generator=draws)
        codes = torch.cat((tokens, drawn[:, -h * w :]), dim=1)
        pictures = to_pictures(tokenizer.decode(codes.reshape(-1, h, w)))
        save_grid([pictures[i : i + count + 1] for i in range(0, len(pictures), count + 1)], path)


class CLIPTask(Task):
    """Pictures and their captions → two towers that put a pair in one place."""

    unit = "pairs"

    def __init__(self, s, explicit_keys, ranks, resume):
        self.settings, self.ranks = s, ranks
        self.model = start_model(CLIP, CLIPConfig, s.model, explicit_keys, resume)
        if not (self.model.config.vision and self.model.config.text):
            raise UserError("to train a CLIP takes both [model.vision] and [model.text]")
        if self.model.tokenizer is None:
            of = s.data.text_tokenizer
            if not of:
                raise UserError('no tokenizer: set data.text_tokenizer to "bytes", or to a folder of CLIP\'s')
            self.model.tokenizer = CLIPTokenizer.of_bytes() if of == "bytes" else CLIPTokenizer.from_pretrained(of)
        words, vocabulary = len(self.model.tokenizer.vocabulary), self.model.config.text.vocab_size
        if words > vocabulary:
            raise UserError(f"the tokenizer has {words} tokens, model.text.vocab_size is only {vocabulary}")
        if s.data.side != self.model.config.vision.image_size:
            raise UserError(
                f"data.side {s.data.side} must be model.vision.image_size {self.model.config.vision.image_size}"
            )
        self.modules = {"model": self.model}
        self.rows = CaptionRows(s.data, s.train.batch_size, s.train.seed)
        self.items_per_row = 1

    def batch(self, step, microstep, rows):
        return self.rows.batch(step * self.settings.train.accumulate + microstep, rows)  # (B, S, S, 3), B captions

    def loss(self, phase, wrapped, batch, step, microstep):
        pictures, captions = batch
        c, device = self.model.config.vision, self.ranks.device
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (c.mean, c.std))
        images = (to_images(pictures, device) - mean) / std
        image, text, scale, bias = wrapped(images, self.model.tokenize(captions).to(device))
        loss = contrastive_loss(image, text, scale) if bias is None else sigmoid_loss(image, text, scale, bias)
        return loss, {"scale": scale}

    @torch.no_grad()
    def after_step(self, step, ema):
        self.model.logit_scale.clamp_(max=math.log(100))  # Radford et al. 2021, section 2.5

    def evaluate(self):
        """The loss over held-out pairs."""
        t = self.settings.train
        held_out = CaptionRows(self.settings.data, t.batch_size, t.seed, "held_out")
        batches = min(t.eval_batches, max(1, len(held_out) // t.batch_size))
        rows = self.ranks.rows(t.batch_size)
        losses = [self.loss("model", self.model, held_out.batch(i, rows), 0, 0)[0] for i in range(batches)]
        return {"held_out_loss": torch.stack(losses).mean()}

    def sample(self, path):
        pass


class VAETask(Task):
    """Pictures → a normal distribution of latents → pictures."""

    unit = "images"

    def __init__(self, s, explicit_keys, ranks, resume):
        self.settings, self.ranks = s, ranks
        self.model = start_model(AutoencoderKL, AutoencoderKLConfig, s.model, explicit_keys, resume)
        self.modules = {"model": self.model}
        self.pictures = PictureRows(s.data, s.train.seed)
        c = self.model.config
        if s.data.side % c.factor:
            raise UserError(f"data.side {s.data.side} is no multiple of {c.factor}, the pixels of a latent")
        self.shape = (c.latent_channels, s.data.side // c.factor, s.data.side // c.factor)
        self.items_per_row = 1

    def batch(self, step, microstep, rows):
        keys = [(self.settings.train.seed, step, microstep, row, 7) for row in rows]
        noise = np.stack([np.random.default_rng(key).standard_normal(self.shape, np.float32) for key in keys])
        return self.pictures.batch(step, microstep, rows), noise  # (B, side, side, 3), (B, z, h, w)

    def loss(self, phase, wrapped, batch, step, microstep):
        pictures, noise = batch
        images = 2 * to_images(pictures, self.ranks.device) - 1
        return self.settings.loss(images, *wrapped(images, torch.from_numpy(noise).to(self.ranks.device)))

    def evaluate(self):
        """PSNR of held-out pictures in dB (mean over pictures), and how large their latents are."""
        t, psnrs, latents = self.settings.train, [], []
        pictures = held_out_pictures(self.settings.data, t.eval_batches * t.batch_size)
        for start in range(0, len(pictures), t.batch_size):
            images = to_images(pictures[start : start + t.batch_size], self.ranks.device)
            reconstruction, mean, _ = self.model(2 * images - 1)
            error = (reconstruction.float() / 2 + 0.5).clamp(0, 1) - images
            psnrs.append(-10 * error.pow(2).mean((1, 2, 3)).log10())
            latents.append(mean.float())
        return {"held_out_psnr": torch.cat(psnrs).mean(), "latent_std": torch.cat(latents).std()}

    def sample(self, path):
        """Held-out pictures above their reconstructions."""
        pictures = held_out_pictures(self.settings.data, 8)
        reconstruction, _, _ = self.model(2 * to_images(pictures, self.ranks.device) - 1)
        save_grid([list(pictures), to_pictures(reconstruction / 2 + 0.5)], path)


class UNetTask(Task):
    """Captions and noise → the latents of their pictures. Saved, and sampled from, as a whole pipeline.

    The autoencoder and the text tower stay as they are. Every picture is encoded once, at the start.
    """

    unit = "images"

    def __init__(self, s, explicit_keys, ranks, resume):
        self.settings, self.ranks = s, ranks
        for key in ("vae", "clip"):
            if not resume and not getattr(s.data, key):
                raise UserError(f"data.{key} is empty: name the trained {key} to build on")
        unet = start_model(UNet, UNetConfig, s.model, explicit_keys, resume)
        unet.activation_checkpointing = s.train.activation_checkpointing
        vae = AutoencoderKL.from_pretrained(resume or s.data.vae, dtype=torch.float32)
        text = text_encoders(resume)[0] if resume else CLIP.from_pretrained(s.data.clip).text_encoder()
        if text.tokenizer is None:
            raise UserError(f"{s.data.clip}: came without a tokenizer, so it cannot read captions")
        if (width := text.config.text.width) != unet.config.cross_attention_dim:
            raise UserError(
                f"model.cross_attention_dim {unet.config.cross_attention_dim} must be CLIP's width, {width}"
            )
        self.model = LatentDiffusion(unet, vae, s.schedule, text).to(ranks.device)
        for part in (vae, text):
            part.requires_grad_(False)
        self.modules = {"model": unet}
        self.items_per_row = 1
        self.order = functools.lru_cache(4)(
            lambda pass_, count: np.random.default_rng((s.train.seed, pass_, 8)).permutation(count)
        )
        self.pairs = {}  # split: (captions, mean and log-variance of their pictures' latents)
        for split in ("train", "held_out"):
            rows = CaptionRows(s.data, s.train.batch_size, s.train.seed, split)
            items = [source[i] for source, i, _ in rows.places if source.readable(source[i], [("image", None)])]
            self.pairs[split] = [item.caption for item in items], self.encode(items, split)
        if not (resume or s.model.init):  # means of size 1 are what the noise schedule is made for
            scale = 1 / self.pairs["train"][1][:, 0].std().item()
            vae.config = dataclasses.replace(vae.config, scaling_factor=round(scale, 5))
        elif not resume and (saved := checkpoint.weights_folder(s.model.init) / "vae" / "config.json").exists():
            # a whole pipeline: its U-Net knows latents on the scale that is written there
            vae.config = dataclasses.replace(vae.config, scaling_factor=checkpoint.read_json(saved)["scaling_factor"])

    @torch.inference_mode()
    def encode(self, items, split):
        """→ (N, 2, z, h, w): mean and log-variance. Kept in the run's folder, for the next start."""
        made_of = hashlib.blake2b(repr([item.name for item in items]).encode(), digest_size=8)
        made_of.update(str(self.settings.data.side).encode())
        for weight in self.model.vae.parameters():
            made_of.update(weight.detach().cpu().numpy().tobytes())
        file = Path(self.settings.run.dir) / f"latents_{split}_{made_of.hexdigest()}.safetensors"
        if file.exists():
            return checkpoint.read_tensors(file)["latents"]
        device = self.ranks.device
        parts = []
        for start in tqdm(range(0, len(items), 64), desc=f"latents of {split} pictures", disable=self.ranks.rank > 0):
            pictures = np.stack([item.image for item in items[start : start + 64]])
            parts.append(torch.stack(self.model.vae.encode(2 * to_images(pictures, device) - 1), dim=1).cpu())
        latents = torch.cat(parts)
        if self.ranks.rank == 0:
            checkpoint.write_tensors(file, {"latents": latents})
        return latents.clone()  # they were made in inference mode: as they are, no gradient could pass

    def batch(self, step, microstep, rows):
        return self.make_batch("train", step * self.settings.train.accumulate + microstep, rows)

    def make_batch(self, split, number, rows):
        """Batch `number` of a split: captions, latents (B, 2, z, h, w), two noises (2, B, z, h, w), offsets, times."""
        captions, latents = self.pairs[split]
        s, drawn = self.settings, []
        for row in rows:
            pass_, place = divmod(number * s.train.batch_size + row, len(captions))
            i = self.order(pass_, len(captions))[place]
            rng = np.random.default_rng((s.train.seed, number, row, 9))
            noise = rng.standard_normal((2, *latents.shape[2:]), np.float32)
            offset = rng.standard_normal((latents.shape[2], 1, 1), np.float32)
            caption = "" if rng.random() < s.loss.drop and split == "train" else captions[i]
            drawn.append((caption, latents[i], noise, offset, rng.integers(s.schedule.num_train_timesteps)))
        captions, latents, noises, offsets, times = zip(*drawn, strict=True)
        return list(captions), torch.stack(latents), np.stack(noises, axis=1), np.stack(offsets), np.array(times)

    def loss(self, phase, wrapped, batch, step, microstep):
        captions, latents, noises, offsets, times = batch
        device, c = self.ranks.device, self.settings.loss
        mean, logvar = latents.to(device).unbind(1)  # (B, z, h, w)
        sampled, noise = torch.from_numpy(noises).to(device)
        x0 = reparameterize(mean, logvar, sampled) * self.model.vae.config.scaling_factor
        noise = offset_noise(noise, torch.from_numpy(offsets).to(device), c.noise_offset)
        with torch.no_grad():
            context = self.model.encode_text(captions).context
        t = torch.from_numpy(times).to(device)
        return diffusion_loss(wrapped, self.settings.schedule, x0, noise, t, context, min_snr=c.min_snr), {}

    def evaluate(self):
        t, unet = self.settings.train, self.model.unet
        batches = min(t.eval_batches, max(1, len(self.pairs["held_out"][0]) // t.batch_size))
        drawn = [self.make_batch("held_out", i, self.ranks.rows(t.batch_size)) for i in range(batches)]
        return {"held_out_loss": torch.stack([self.loss("model", unet, batch, 0, 0)[0] for batch in drawn]).mean()}

    def sample(self, path):
        """The first held-out captions, drawn twice, below the true pictures' reconstructions."""
        captions, latents = (x[:8] for x in self.pairs["held_out"])
        scale = self.model.vae.config.scaling_factor
        true = self.model.to_images(latents[:, 0].to(self.ranks.device) * scale)
        size = self.settings.data.side
        drawn = [self.model.generate(captions, guidance=3, steps=25, size=size, seed=8 * row) for row in range(2)]
        save_grid([to_pictures(images) for images in (true, *drawn)], path)


class DreamLLMTask(Task):
    """Texts and pictures in one sequence → the next token, and the pictures that are to be drawn.

    What is trained is a list of names in the configuration; all else is frozen, and lets gradients through.
    """

    unit = "samples"

    def __init__(self, s, explicit_keys, ranks, resume):
        self.settings, self.ranks = s, ranks
        if s.train.ema:
            raise UserError("train.ema is not for model.kind dreamllm: set it to 0")
        self.model = model = self.start(s, explicit_keys, resume)
        names = [f.name for f in dataclasses.fields(DreamLLMConfig)]
        model.config = DreamLLMConfig(**{n: getattr(s.model, n) for n in names} | self.shape(model.config))
        counts = freeze_all_but(model, s.model.trained)
        if ranks.rank == 0:
            rest = sum(p.numel() for p in model.parameters() if not p.requires_grad)
            print("trained:", ", ".join(f"{n} {count:,}" for n, count in counts.items()) + f"; frozen: {rest:,}")
        for part in (model.llama, model.diffusion.unet):
            part.activation_checkpointing = s.train.activation_checkpointing
        self.modules = {"model": model}
        context, d, stage = model.llama.config.max_seq_len, s.data, s.model.stage
        spans = {"understand": stage != "create", "create": stage != "understand"}
        options = {"template": d.template, "system": d.system}
        self.writer = Writer(model.tokenizer, model.patches, model.config.queries, context, **spans, **options)
        self.rows = self.open("train")
        try:
            self.held_out = self.open("held_out")
        except UserError as error:  # of few rows, none may fall into that split
            self.held_out = None
            if ranks.rank == 0:
                print(f"no held-out loss: {error}", file=sys.stderr)
        self.items_per_row = 1

    @staticmethod
    def shape(config):
        """What must stay as it is in the weights."""
        return {name: getattr(config, name) for name in ("queries", "projector", "condition")}

    def start(self, s, explicit_keys, resume):
        """A DreamLLM from `resume`, else model.init, else from its parts."""
        if folder := resume or s.model.init:
            model = DreamLLM.from_pretrained(folder, CLIP, LatentDiffusion, torch.float32)
            settings.must_agree(explicit_keys & set(self.shape(s.model)), s.model, model.config, folder)
            return model
        for key in ("llama", "clip", "diffusion"):
            if not getattr(s.model, key):
                raise UserError(f"model.{key} is empty: name the trained part to build on, or a DreamLLM as model.init")
        tokenizer = Tokenizer.from_pretrained(s.data.text_tokenizer or s.model.llama)
        tokenizer.add(ADDED)
        llama = LLaMA.from_pretrained(s.model.llama, torch.float32)
        llama.resize(tokenizer.vocab_size)
        clip = CLIP.from_pretrained(s.model.clip, torch.float32)
        diffusion = LatentDiffusion.from_pretrained(s.model.diffusion, dtype=torch.float32)
        config = DreamLLMConfig(**{f.name: getattr(s.model, f.name) for f in dataclasses.fields(DreamLLMConfig)})
        return DreamLLM(llama, clip, diffusion, config, tokenizer)

    def open(self, split):
        s, side = self.settings, self.model.clip.config.vision.image_size
        return DocumentRows(s.data, self.writer, side, self.model.side, s.train.batch_size, s.train.seed, split)

    def batch(self, step, microstep, rows):
        return self.make_batch(self.rows, step * self.settings.train.accumulate + microstep, rows)

    def make_batch(self, source, number, rows):
        """Batch `number` of a DocumentRows, and the chance in its pictures' loss, each row's its own."""
        batch = source.batch(number, rows)
        unet, vae = self.model.diffusion.unet.config, self.model.diffusion.vae.config
        shape, drawn = (vae.latent_channels, unet.sample_size, unet.sample_size), []
        start = self.model.tokenizer.special["<dream_start>"]
        for row, count in zip(rows, (batch["tokens"] == start).sum(1).tolist(), strict=True):
            rng = np.random.default_rng((self.settings.train.seed, number, row, 10))
            sample, noise, perturbation = rng.standard_normal((3, count, *shape), np.float32)
            offset = rng.standard_normal((count, shape[0], 1, 1), np.float32)
            t = rng.integers(self.model.diffusion.schedule.num_train_timesteps, size=count)
            drawn.append(LossNoise(sample, noise, offset, perturbation, t, rng.random(count)))
        return batch | {"draws": LossNoise(*(np.concatenate(kind) for kind in zip(*drawn, strict=True)))}

    def losses(self, module, batch):
        """→ what to descend; over all ranks the means (lm_loss, vm_loss), and of how many labels and pictures."""
        device, v = self.ranks.device, self.model.clip.config.vision
        tokens, labels = (torch.from_numpy(batch[name]).to(device) for name in ("tokens", "labels"))
        mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (v.mean, v.std))
        images = (to_images(batch["images"], device) - mean) / std
        images_dm = to_images(batch["images_dm"], device)
        draws = LossNoise(*(torch.from_numpy(x).to(device) for x in batch["draws"]))
        out = module(tokens, labels, images, images_dm, draws)
        loss, means, c = out["loss"], (out["lm_loss"], out["vm_loss"]), self.model.config
        counts = torch.stack(((labels[:, 1:] != -100).sum(), torch.tensor(len(images_dm), device=device)))
        if self.ranks.world > 1:  # ranks may have unlike many texts and pictures: each counts by its share
            own = counts.clone()
            dist.all_reduce(counts)
            lm, vm = (own * self.ranks.world / counts.clamp(min=1)).tolist()
            loss = loss + c.w_lm * (lm - 1) * means[0] + c.w_vm * (vm - 1) * means[1]
            means = lm * means[0], vm * means[1]
        return loss, means, counts

    def loss(self, phase, wrapped, batch, step, microstep):
        loss, means, _ = self.losses(wrapped, batch)
        return loss, dict(zip(("lm_loss", "vm_loss"), means, strict=True))

    def evaluate(self):
        """Both losses over held-out samples: the mean over their labels, and over their pictures to draw."""
        if not self.held_out:
            return {}
        t, sums, totals = self.settings.train, 0, 0
        for i in range(min(t.eval_batches, max(1, len(self.held_out) // t.batch_size))):
            batch = self.make_batch(self.held_out, i, self.ranks.rows(t.batch_size))
            _, means, counts = self.losses(self.model, batch)
            sums, totals = sums + torch.stack(means) * counts, totals + counts
        lm_loss, vm_loss = sums / totals.clamp(min=1)
        return {"held_out_lm_loss": lm_loss, "held_out_vm_loss": vm_loss}

    def sample(self, path):
        """The first held-out pairs to create: their pictures, above what is drawn after the same words."""
        if not self.held_out or self.settings.model.stage == "understand":
            return
        tokenizer, prompts, true = self.model.tokenizer, [], []
        samples = (self.held_out.sample(position) for position in range(256))
        for sample in itertools.islice((s for s in samples if s.images_dm and not s.images), 8):
            text = sample.tokens[: np.flatnonzero(sample.tokens == tokenizer.special["<dream_start>"])[0]]
            prompts.append(tokenizer.decode(text.tolist()))
            true.append(draw_view(sample.images_dm[0], self.model.side))
        if prompts:
            drawn = self.model.text_to_image(prompts, guidance=3, steps=25, sampler="ddim", seed=0)
            save_grid([true, to_pictures(drawn)], path)


def freeze_all_but(model, prefixes):
    """Lets train the weights that `prefixes` name, alone or by the modules they are in, and no others.

    → {prefix: how many numbers}.
    """
    counts = dict.fromkeys(prefixes, 0)
    for name, parameter in model.named_parameters():
        chosen = [p for p in prefixes if f"{name}.".startswith(f"{p}.")]
        parameter.requires_grad_(bool(chosen))
        for prefix in chosen:
            counts[prefix] += parameter.numel()
    names = ", ".join(["dream_queries", *dict(model.named_children())])
    absent = [p for p in prefixes if not counts[p]] if prefixes else [""]
    if absent:
        raise UserError(
            f'model.trained: no weight\'s name begins with "{absent[0]}"; there are {names}, and what is in them'
        )
    return counts


TASKS = {"vqgan": VQGANTask, "llama": LLaMATask, "clip": CLIPTask, "vae": VAETask, "unet": UNetTask}
TASKS |= {"dreamllm": DreamLLMTask}


def to_images(pictures, device):
    """(B, H, W, 3) uint8 → (B, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 255


def to_pictures(images):
    """(B, 3, H, W) around [0, 1] → a list of (H, W, 3) uint8."""
    return list((images.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())


@contextlib.contextmanager
def frozen(module):
    """Within, gradients flow through the module but not into its weights."""
    if module is not None:
        module.requires_grad_(False)
    yield
    if module is not None:
        module.requires_grad_(True)
