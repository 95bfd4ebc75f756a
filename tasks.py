"""What each kind of run trains: six tasks side by side, and the sections of their configurations.

    kind       batch                                    loss                              sampled from
    vqgan      pictures                                 reconstruction, codebook, GAN     VQGAN
    llama      windows of a stream of tokens            next token                        LLaMA
    clip       pictures, captions                       contrastive                       CLIP
    vae        pictures, noise                          reconstruction, KL                AutoencoderKL
    unet       captions, latents, noise, times          squared error                     LatentDiffusion
    dreamllm   texts with pictures between them         next token, squared error         DreamLLM

train.py's loop asks a task for all that differs between them; `Task` lists the questions. A batch is a pure function
of the seed and its number, the random numbers of the loss included.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._functorch import config as functorch_config
from torch._subclasses.fake_tensor import unset_fake_temporarily

from clip import CLIP, CLIPConfig, TextConfig, contrastive_loss, sigmoid_loss, text_encoders
from clip import Block as CLIPBlock
from data import CaptionRows, DataSettings, HeldOutPictures, PictureRows, TokenRows
from diffusion import (
    AutoencoderKL,
    AutoencoderKLConfig,
    AutoencoderLoss,
    LatentDiffusion,
    LossNoise,
    NoiseSchedule,
    ResBlock,
    SpatialTransformer,
    UNet,
    UNetConfig,
    diffusion_loss,
    fitting_sampler,
    offset_noise,
    reparameterize,
)
from documents import DocumentRows, DocumentSettings, Writer, draw_view
from dreamllm import DreamLLM, DreamLLMConfig
from model import INITIAL_STD, SIZES, LLaMA, LLaMAConfig
from model import Block as LLaMABlock
from published.llama import CONTEXT, in_context
from support import checkpoint, parallel, settings
from support.chance import rng, shuffled
from support.formats import pick
from support.latents import Latents
from support.pictures import psnr, to_float, to_uint8
from support.settings import MeshSettings, UserError, run_class
from support.token_rows import RowsInfo, check_rows
from support.tokenizer import ADDED, CLIPTokenizer, Tokenizer
from vqgan import VQGAN, Discriminator, VQGANConfig, VQGANLoss, VQGANLossConfig, usage

# ---- settings: the sections of a run of each kind ----------------------------------------------

STAGES = {  # of DreamLLM: what each trains. The last two differ in their data and learning rate only
    "understand": ("projector",),
    "create": ("dream_queries", "condition"),
    "interleaved": ("llama", "projector", "dream_queries", "condition"),
    "instruct": ("llama", "projector", "dream_queries", "condition"),
}


@dataclass(frozen=True)
class DreamLLMStage(DreamLLMConfig):
    """A stage of DreamLLM: understand and create (stage I's two halves), interleaved (II) or instruct (III)."""

    llama: str = ""  # folder of the trained LLaMA; this and the next two are for a run without model.init
    clip: str = ""  # … of the CLIP
    diffusion: str = ""  # … of the latent diffusion: U-Net, autoencoder, schedule
    stage: str = "interleaved"  # decides which spans a row has, and what is trained where `trained` is empty
    trained: tuple[str, ...] = ()  # weights, or modules; empty: those of the stage

    def __post_init__(self):
        super().__post_init__()
        settings.one_of(self, STAGES, "stage")
        if (self.stage == "understand" and self.w_vm) or (self.stage == "create" and self.w_lm):
            raise ValueError("the stage understand learns no pictures (w_vm = 0), and create no text (w_lm = 0)")


@dataclass(frozen=True)
class DiffusionLoss:
    """Options of the squared error (what is predicted: [schedule]), and the share of captions dropped."""

    min_snr: float = 0.0  # γ of the min-SNR weights (Hang et al. 2023: 5); 0: none
    noise_offset: float = 0.0  # published 0.1; 0: none
    drop: float = 0.1  # share of captions replaced by the empty one, which guidance needs

    def __post_init__(self):
        settings.at_least(self, 0, "min_snr", "noise_offset")
        settings.within(self, 0, 1, "drop")


@dataclass(frozen=True)
class UNetRun(run_class(UNetConfig, DataSettings, schedule=NoiseSchedule, loss=DiffusionLoss)):
    """A U-Net's run, whose sections must fit each other."""

    def __post_init__(self):
        if self.loss.min_snr and self.schedule.rescale_betas_zero_snr:
            raise ValueError("loss.min_snr gives a zero-SNR schedule's last time no weight, and drawing begins there")


RUNS = {
    "vqgan": run_class(VQGANConfig, DataSettings, loss=VQGANLossConfig),
    "llama": run_class(LLaMAConfig, DataSettings, mesh=MeshSettings),
    "clip": run_class(CLIPConfig, DataSettings),
    "vae": run_class(AutoencoderKLConfig, DataSettings, loss=AutoencoderLoss),
    "unet": UNetRun,
    "dreamllm": run_class(DreamLLMStage, DocumentSettings),
}
RECOMPUTING = ("llama", "unet", "dreamllm")  # the kinds that support train.activation_checkpointing


def read_run(path, overrides=()):
    """The configuration at `path` → (settings, the keys of [model] that are written down in it)."""
    config, explicit_keys = settings.read_run(path, overrides, RUNS, {"llama": SIZES})
    if config.train.activation_checkpointing and config.model.kind not in RECOMPUTING:
        raise UserError(f"train.activation_checkpointing is for model.kind {', '.join(RECOMPUTING)} only")
    return config, explicit_keys


# ---- start: resume, init or scratch ------------------------------------------------------------


def part_of(config_class, section):
    """The model's own configuration out of its section [model], which has more keys."""
    names = [field.name for field in dataclasses.fields(config_class)]
    return config_class(**{name: getattr(section, name) for name in names})


def start_model(cls, config_class, section, explicit_keys, resume, sharded=False, **options):
    """A float32 model from `resume` (a step's folder), else section.init, else fresh.

    A key of [model] that was written down must agree with what is loaded. sharded: it is to be cut into shares, which
    are float32; until then the weights stay mapped to the file, as they are stored. options: of from_pretrained.
    """
    config, folder = part_of(config_class, section), resume or section.init
    if not folder:
        return fresh_model(cls, config)
    model = cls.from_pretrained(folder, dtype=None if sharded else torch.float32, **options).train()
    written = {key for key in explicit_keys if key.partition(".")[0] in vars(config)}
    settings.must_agree(written, section, model.config, folder)
    return model


def shape_of(cls, folder, otherwise, name):
    """The configuration of the model in a folder: all that a plan needs of it. Without a folder, `otherwise`.

    So, too, if the folder is not here, and then `name` says what is planned instead.
    """
    if folder and os.path.exists(folder):
        with unset_fake_temporarily():
            return cls.from_pretrained(folder).config
    if folder:
        print(f"{folder} is not here: {name} is planned in its place", file=sys.stderr)
    return otherwise


def without_words(clip):
    """Turns every text into tokens without a meaning: a plan needs no vocabulary, and looks nothing up."""
    clip.tokenize = lambda texts: torch.zeros(len(texts), clip.config.text.context_length, dtype=torch.int64)


def from_scratch(config, explicit_keys):
    """The same run without weights to start from, of the same shapes: what a plan is made for."""
    classes = {"vqgan": VQGAN, "llama": LLaMA, "clip": CLIP, "vae": AutoencoderKL, "unet": UNet}
    if not config.model.init or config.model.kind not in classes:  # a DreamLLM's task does so itself
        return config
    shape = shape_of(classes[config.model.kind], config.model.init, config.model, "the shape in [model]")
    own_context = {key: getattr(config.model, key) for key in CONTEXT & explicit_keys}
    written = {key for key in explicit_keys - CONTEXT if key.partition(".")[0] in vars(shape)}
    settings.must_agree(written - {"kind", "init", "size"}, config.model, shape, config.model.init)
    model = dataclasses.replace(config.model, **vars(shape) | own_context | {"init": ""})
    return dataclasses.replace(config, model=model)


def fresh_model(cls, config):
    """cls(config) with random weights; a UserError if there is not memory enough."""
    probe, count = torch.empty(0), "too many"
    try:
        if probe.is_meta or type(probe) is not torch.Tensor:  # no memory is taken: of shares, or of a plan
            return cls(config)
        with torch.device("meta"):
            count = sum(p.numel() for p in cls(config).parameters())
        if 4 * count <= settings.memory():
            return cls(config)
        count = f"{count:,}"
    except (RuntimeError, MemoryError) as error:  # more than 2⁶³ bytes are too many even to count
        if not settings.is_out_of_memory(error):
            raise
    raise UserError(f"[model] describes a {cls.__name__} of {count} parameters, 4 bytes each: too large for the memory")


# ---- what every task says ----------------------------------------------------------------------


class Task:
    """What train.py asks of a kind of run. The answers here are those of a run with one phase.

    model         what is saved, and sampled from
    modules       {phase: the module that this phase trains}; the first one is averaged
    held_out      what evaluations read; None: there is nothing to evaluate

    open_data     (resume: the folder it goes on from, or None) opens what batches are made of
    active        (phase, step) → whether that phase has begun
    batch         (number, rows: a range) → arrays; number = step · accumulate + microstep, through the whole run
    blank_batch   (rows) → the largest batch that the settings allow, of zeros, without data: for a plan
    loss          (phase, its module, batch, step, microstep) → (a scalar to descend, {name: scalar to log});
                  the module may be DDP around self.model: forward goes through it, weights are read from self.model
    after_step    (step, averaged weights): what else changes the weights; not called after a step that is skipped
    evaluate      () → {name: scalar}, of held-out data
    sample        () → rows of (H, W, 3) uint8 pictures of what the model makes now, or None
    blocks        classes of the parts that FSDP brings together one at a time; (): this kind cannot be sharded
    initialize    () fills the weights of a run from scratch that are not filled yet
    state, load_state   {name: tensor} that a resumed run needs beside weights and optimizers
    """

    unit = "images"  # what the rate counts: items_per_row of them in each row of a batch
    items_per_row = 1
    may_skip_weights = False  # whether a batch may leave weights without a gradient
    held_out = None
    blocks = ()

    def __init__(self, config, ranks):
        self.config, self.ranks = config, ranks
        self.device = ranks.device
        if ranks.sharded and not self.blocks:
            kinds = ", ".join(kind for kind, task in TASKS.items() if task.blocks)
            raise UserError(f'train.parallel "fsdp" is for model.kind {kinds} only: set it to "ddp"')

    @property
    def main_phase(self):
        return next(iter(self.modules))

    @property
    def main(self):
        """The module of the first phase: it is averaged, evaluated and described by [model]."""
        return self.modules[self.main_phase]

    @property
    def start(self):
        """What the first step's weights were made of; "": nothing, they are random."""
        return self.config.model.init

    def active(self, phase, step):
        return True

    def after_step(self, step, ema):
        pass

    def state(self):
        return {}

    def load_state(self, tensors):
        pass

    def sample(self):
        pass

    def initialize(self):
        pass

    # -- held-out data: opened once, before the first step --

    def open_held_out(self, opener):
        """What `opener` opens; None if it finds nothing: of few pictures or rows, none may fall into that split."""
        try:
            return opener()
        except UserError as error:
            return self.without_held_out(error)

    def without_held_out(self, reason):
        if self.ranks.is_main:
            print(f"no held-out metrics: {reason}", file=sys.stderr)

    def evaluate(self):
        """The one loop over held-out data: measures each batch, then summarizes."""
        if self.held_out is None:
            return {}
        return self.summarize([self.measure(batch) for batch in self.held_out_batches()])

    def held_out_batches(self):
        """train.eval_batches of them, or as many as the data fill, but at least one."""
        train = self.config.train
        rows = self.ranks.rows(train.batch_size)
        count = min(train.eval_batches, max(1, self.held_out_rows() // train.batch_size))
        return (self.held_out_batch(number, rows) for number in range(count))

    def held_out_rows(self):
        return len(self.held_out)

    def held_out_batch(self, number, rows):
        return self.held_out.batch(number, rows)

    def measure(self, batch):
        loss, _ = self.loss(self.main_phase, self.main, batch, 0, 0)
        return loss

    def summarize(self, measured):
        return {"held_out_loss": torch.stack(measured).mean()}


class PictureTask(Task):
    """What VQGAN and autoencoder share: pictures (B, side, side, 3) uint8 in, the same pictures out."""

    def open_data(self, resume):
        data, factor = self.config.data, self.model.config.factor
        if data.side % factor:
            raise UserError(f"data.side {data.side} is no multiple of {factor}, the model's reduction")
        self.pictures = PictureRows(data, self.config.train.seed)
        self.held_out = self.open_held_out(lambda: HeldOutPictures(data))

    def blank_batch(self, rows):
        return np.zeros((len(rows), self.config.data.side, self.config.data.side, 3), np.uint8)

    def held_out_batches(self):
        train = self.config.train
        pictures = self.held_out.take(train.eval_batches * train.batch_size)  # every rank reads all of them
        return np.split(pictures, train.eval_batches)

    def sample(self):
        """Held-out pictures above their reconstructions."""
        if self.held_out is not None:
            pictures = self.held_out.take(8)
            return [list(pictures), list(to_uint8(self.reconstruct(to_float(pictures, self.device))))]


class VQGANTask(PictureTask):
    """Pictures → codes → pictures, with a discriminator as the second phase if loss.gan > 0."""

    def __init__(self, config, explicit_keys, ranks, resume):
        super().__init__(config, ranks)
        self.model = start_model(VQGAN, VQGANConfig, config.model, explicit_keys, resume)
        self.model.quantize.with_entropy = config.loss.entropy > 0
        self.modules = {"generator": self.model}
        if config.loss.gan:
            self.modules["discriminator"] = Discriminator()
        if config.loss.gan and config.loss.adaptive:
            # λ walks part of the graph twice, so a compiled forward must not give its buffers away
            functorch_config.donated_buffer = False
        self.loss_fn = VQGANLoss(config.loss, ranks.planned).to(ranks.device)
        self.from_scratch = not (resume or config.model.init)
        # (K,) how often each code was used since dead ones were last moved
        self.counts = torch.zeros(self.model.config.num_embeddings, device=ranks.device)
        self.reconstructions = {}  # {microstep: the generator's, of this step}: the discriminator's phase takes them

    def active(self, phase, step):
        return phase == "generator" or step >= self.config.loss.disc_start

    def batch(self, number, rows):
        return self.pictures.batch(number, rows)  # (B, side, side, 3) uint8

    def loss(self, phase, module, batch, step, microstep):
        images = to_float(batch, self.device)  # (B, 3, side, side)
        if phase == "discriminator":
            return self.loss_fn.discriminator_loss(images, self.reconstructions.pop(microstep), module)
        reconstruction, codes, losses = module(images)
        discriminator = self.modules.get("discriminator")
        with frozen(discriminator):
            loss, values = self.loss_fn.generator_loss(self.model, images, reconstruction, losses, discriminator, step)
        used = codes.flatten()
        counts = torch.zeros_like(self.counts).index_add_(0, used, torch.ones_like(used, dtype=self.counts.dtype))
        self.new_counts = counts if microstep == 0 else self.new_counts + counts
        self.images = images
        if discriminator and self.active("discriminator", step):
            self.reconstructions[microstep] = reconstruction.detach()
        return loss, values

    @torch.no_grad()
    def after_step(self, step, ema):
        """Moves codebook entries that nothing used lately onto vectors of the current batch.

        From scratch this happens after the first step too: the codebook starts where the encoder's outputs lie.
        """
        if self.ranks.world > 1:
            dist.all_reduce(self.new_counts)
        self.counts += self.new_counts
        every = self.config.loss.redraw_every
        if not every or ((step + 1) % every and not (self.from_scratch and step == 0)):
            return
        latents = self.model.latents(self.images)
        if self.ranks.world > 1:
            gathered = [torch.empty_like(latents) for _ in range(self.ranks.world)]
            dist.all_gather(gathered, latents.contiguous())
            latents = torch.cat(gathered)  # in the order of the rows, whatever the number of ranks
        generator = torch.Generator().manual_seed(self.config.train.seed + step)
        moved = self.model.quantize.revive_dead_codes(self.counts == 0, latents, generator)
        self.counts.zero_()
        if ema:  # otherwise the average would drag a revived entry back
            codebook = self.model.quantize.embedding.weight
            index = [p is codebook for p in self.model.parameters()].index(True)
            ema[index][moved] = codebook[moved]

    def measure(self, batch):
        images = to_float(batch, self.device)
        reconstruction, codes, _ = self.model(images)
        return psnr(reconstruction, images), torch.bincount(codes.flatten(), minlength=len(self.counts))

    def summarize(self, measured):
        """PSNR in dB (mean over pictures); the share of the codebook that is used, and its perplexity."""
        psnrs, counts = zip(*measured, strict=True)
        used, perplexity = usage(torch.stack(counts).sum(0))
        return {"held_out_psnr": torch.cat(psnrs).mean(), "code_usage": used, "code_perplexity": perplexity}

    def reconstruct(self, images):
        return self.model.decode(self.model.encode(images))

    def state(self):
        return {"counts": self.counts}

    def load_state(self, tensors):
        self.counts.copy_(tensors["counts"])


class LLaMATask(Task):
    """Rows of tokens → next-token prediction. With data.tokenizer, the samples are pictures."""

    unit = "tokens"
    blocks = (LLaMABlock,)

    def __init__(self, config, explicit_keys, ranks, resume):
        super().__init__(config, ranks)
        self.from_scratch = not (resume or config.model.init)
        own_context = set() if resume else CONTEXT & explicit_keys
        with torch.device("meta") if self.from_scratch and ranks.sharded else contextlib.nullcontext():
            start = (config.model, explicit_keys - own_context, resume, ranks.sharded)
            self.model = start_model(LLaMA, LLaMAConfig, *start)
        changes = {name: getattr(config.model, name) for name in own_context}
        self.model.config = in_context(self.model.config, **changes)
        self.model.activation_checkpointing = config.train.activation_checkpointing
        self.modules = {"model": self.model}
        self.items_per_row = self.model.config.max_seq_len

    def open_data(self, resume):
        data = self.config.data
        if not data.rows:
            raise UserError("data.rows is empty: name the JSONL files to train on (prepare.py tokenize makes them)")
        self.check_tokenizers()
        self.rows = self.open_rows(data.rows, weights=data.weights)
        if data.held_out:
            self.held_out = self.open_rows(data.held_out)
        elif self.config.train.eval_every:
            self.without_held_out("data.held_out is empty")
        self.sample_prompt = self.open_sample() if data.tokenizer and data.held_out else None

    def check_tokenizers(self):
        """Opens data.tokenizer and data.text_tokenizer; a UserError if the model or the rows do not fit them."""
        data, infos = self.config.data, []
        if data.tokenizer:
            self.vqgan = VQGAN.from_pretrained(data.tokenizer)
            if data.side % self.vqgan.config.factor:
                raise UserError(f"data.side {data.side} is no multiple of data.tokenizer's {self.vqgan.config.factor}")
            infos.append(RowsInfo.of_pictures(data.tokenizer, self.vqgan, data.side))
        if data.text_tokenizer:
            self.model.tokenizer = Tokenizer.from_pretrained(data.text_tokenizer)
            infos.append(RowsInfo.of_text(data.text_tokenizer, self.model.tokenizer))
        check_rows(data, self.model.config.vocab_size, infos)

    def open_rows(self, paths, **options):
        train, model = self.config.train, self.model.config
        options |= {"vocab_size": model.vocab_size, "dtype": self.config.data.row_dtype}
        return TokenRows(paths, model.max_seq_len, train.batch_size, train.seed, **options)

    def open_sample(self):
        """The first windows of the held-out stream, cut to whole pictures: (B, count · h · w) int64.

        None if the context has no room for two pictures. Windows begin where sentences do only if every sentence
        has max_seq_len codes.
        """
        h, w = self.vqgan.grid(self.config.data.side)
        count = min(self.config.data.pictures, self.items_per_row // (h * w))
        if count < 2:
            return None
        tokens, _ = self.held_out.batch(0, range(min(4, self.config.train.batch_size)))  # (B, T)
        tokens, codes = tokens[:, : count * h * w], self.vqgan.config.num_embeddings
        if tokens.max() >= codes:
            raise UserError(f"data.held_out has the code {tokens.max()}, but data.tokenizer only {codes} codes")
        return torch.from_numpy(tokens)

    @torch.no_grad()
    def initialize(self):
        """Random weights as LLaMA's own, each matrix from a seed of its own: a process can fill its share of it."""
        for name, weight in self.model.named_parameters() if self.from_scratch else ():
            values = torch.zeros(weight.shape) if name.endswith("bias") else torch.ones(weight.shape)
            if weight.ndim == 2:
                random = rng(f"initial {name}", self.config.train.seed)
                values = torch.from_numpy(random.standard_normal(weight.shape, np.float32)) * INITIAL_STD
            parallel.local(weight).copy_(parallel.local(parallel.share(values, weight)))

    def batch(self, number, rows):
        """(2, B, T) int64: inputs, and the same one token later."""
        return np.stack(self.rows.batch(number, rows))

    def blank_batch(self, rows):
        return np.zeros((2, len(rows), self.items_per_row), np.int64)

    def loss(self, phase, module, batch, step, microstep):
        inputs, targets = torch.from_numpy(batch).to(self.device)
        logits = module(inputs)  # (B, T, V)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()), {}

    def held_out_rows(self):
        return self.held_out.tokens // self.items_per_row

    def held_out_batch(self, number, rows):
        return np.stack(self.held_out.batch(number, rows))

    def summarize(self, measured):
        # averaged here already: the exponential must be that of the mean over all ranks
        loss = self.ranks.mean(super().summarize(measured))["held_out_loss"]
        return {"held_out_loss": loss, "held_out_perplexity": math.exp(min(loss, 50))}

    def sample(self):
        """Held-out sentences: all pictures but the last are the prompt; then come the true last one and the model's."""
        if self.sample_prompt is None:
            return None
        tokens, vqgan = self.sample_prompt.to(self.device), self.vqgan.to(self.device)
        h, w = vqgan.grid(self.config.data.side)
        generator = torch.Generator(self.device).manual_seed(self.config.train.seed)
        allowed = range(vqgan.config.num_embeddings)
        continued = self.model.generate(tokens[:, : -h * w], h * w, allowed=allowed, generator=generator)
        codes = torch.cat((tokens, continued[:, -h * w :]), dim=1)
        pictures = to_uint8(vqgan.decode(codes.reshape(-1, h, w)))
        return [list(row) for row in np.split(pictures, len(tokens))]


class CLIPTask(Task):
    """Pictures and their captions → two towers that put a pair in one place."""

    unit = "pairs"

    def __init__(self, config, explicit_keys, ranks, resume):
        super().__init__(config, ranks)
        # for published weights that do not say it
        activation = config.model.vision.activation if "vision.activation" in explicit_keys else None
        self.model = start_model(CLIP, CLIPConfig, config.model, explicit_keys, resume, activation=activation)
        if not (self.model.config.vision and self.model.config.text):
            raise UserError("to train a CLIP takes both [model.vision] and [model.text]")
        self.modules = {"model": self.model}

    def open_data(self, resume):
        vision, text, data = self.model.config.vision, self.model.config.text, self.config.data
        if self.model.tokenizer is None:
            self.model.tokenizer = self.open_tokenizer(data.text_tokenizer)
        count = len(self.model.tokenizer.vocabulary)
        if count > text.vocab_size:
            raise UserError(f"the tokenizer has {count} tokens, model.text.vocab_size is only {text.vocab_size}")
        if data.side != vision.image_size:
            raise UserError(f"data.side {data.side} must be model.vision.image_size {vision.image_size}")
        self.rows = self.open_rows("train")
        self.held_out = self.open_held_out(lambda: self.open_rows("held_out"))

    def open_tokenizer(self, path):
        if not path:
            raise UserError('no tokenizer: set data.text_tokenizer to "bytes", or to a folder of CLIP\'s')
        return CLIPTokenizer.of_bytes() if path == "bytes" else CLIPTokenizer.from_pretrained(path)

    def open_rows(self, split):
        return CaptionRows(self.config.data, self.config.train.batch_size, self.config.train.seed, split)

    def batch(self, number, rows):
        return self.rows.batch(number, rows)  # (B, S, S, 3) uint8, B captions

    def blank_batch(self, rows):
        without_words(self.model)
        side = self.model.config.vision.image_size
        return np.zeros((len(rows), side, side, 3), np.uint8), [""] * len(rows)

    def loss(self, phase, module, batch, step, microstep):
        pictures, captions = batch
        images = self.model.normalize(to_float(pictures, self.device))  # (B, 3, S, S)
        tokens = self.model.tokenize(captions).to(self.device)  # (B, T)
        image, text, scale, bias = module(images, tokens)  # (B, E), (B, E), (), () or None
        loss = contrastive_loss(image, text, scale) if bias is None else sigmoid_loss(image, text, scale, bias)
        return loss, {"scale": scale}

    @torch.no_grad()
    def after_step(self, step, ema):
        self.model.logit_scale.clamp_(max=math.log(100))  # Radford et al. 2021, section 2.5


class VAETask(PictureTask):
    """Pictures → a normal distribution of latents → pictures."""

    blocks = (ResBlock,)

    def __init__(self, config, explicit_keys, ranks, resume):
        super().__init__(config, ranks)
        self.model = start_model(AutoencoderKL, AutoencoderKLConfig, config.model, explicit_keys, resume, ranks.sharded)
        self.modules = {"model": self.model}
        side = config.data.side // self.model.config.factor
        self.shape = (self.model.config.latent_channels, side, side)  # (z, h, w)

    def batch(self, number, rows):
        """Pictures (B, side, side, 3) uint8, and noise (B, z, h, w) float32."""
        noise = []
        for row in rows:
            random = rng("VAE noise", self.config.train.seed, number, row)
            noise.append(random.standard_normal(self.shape, np.float32))
        return self.pictures.batch(number, rows), np.stack(noise)

    def blank_batch(self, rows):
        return super().blank_batch(rows), np.zeros((len(rows), *self.shape), np.float32)

    def loss(self, phase, module, batch, step, microstep):
        pictures, noise = batch
        images = 2 * to_float(pictures, self.device) - 1  # (B, 3, side, side)
        return self.config.loss(images, *module(images, torch.from_numpy(noise).to(self.device)))

    def measure(self, batch):
        images = to_float(batch, self.device)
        reconstruction, mean, _ = self.model(2 * images - 1)
        return psnr(reconstruction.float() / 2 + 0.5, images), mean.float()

    def summarize(self, measured):
        """PSNR in dB (mean over pictures), and how large the latents are."""
        psnrs, means = zip(*measured, strict=True)
        return {"held_out_psnr": torch.cat(psnrs).mean(), "latent_std": torch.cat(means).std()}

    def reconstruct(self, images):
        return self.model(2 * images - 1)[0] / 2 + 0.5


class UNetTask(Task):
    """Captions and noise → the latents of their pictures. Saved, and sampled from, as a whole pipeline.

    The autoencoder and the text tower stay as they are. Every picture is encoded once, at the start.
    """

    blocks = (ResBlock, SpatialTransformer)

    def __init__(self, config, explicit_keys, ranks, resume):
        super().__init__(config, ranks)
        unet = start_model(UNet, UNetConfig, config.model, explicit_keys, resume, ranks.sharded)
        unet.activation_checkpointing = config.train.activation_checkpointing
        vae, text = self.load_parts(resume)
        self.check_fit(unet.config, vae.config, text.config.text)
        self.model = LatentDiffusion(unet, vae.to(ranks.device), config.schedule, text.to(ranks.device))
        vae.requires_grad_(False)
        text.requires_grad_(False)
        self.modules = {"model": unet}

    def open_data(self, resume):
        self.pairs = {"train": self.open_pairs("train")}
        self.held_out = self.open_held_out(lambda: self.open_pairs("held_out"))
        if not resume:
            vae = self.model.vae
            vae.config = dataclasses.replace(vae.config, scaling_factor=self.latent_scale())

    def load_parts(self, resume):
        """→ (autoencoder, text tower with its tokenizer): those of the run's own pipeline, if it is resumed."""
        data = self.config.data
        if resume:
            return AutoencoderKL.from_pretrained(resume, dtype=torch.float32), text_encoders(resume)[0]
        if self.ranks.planned:
            width = self.config.model.cross_attention_dim
            tower = CLIPConfig(0, None, TextConfig(width, heads=max(1, width // 64), hidden_dim=4 * width))
            text = CLIP(shape_of(CLIP, data.clip, tower, f"a text tower of width {width}")).text_encoder()
            without_words(text)
            vae = shape_of(AutoencoderKL, data.vae, AutoencoderKLConfig(), "Stable Diffusion's autoencoder")
            return AutoencoderKL(vae), text
        for key in ("vae", "clip"):
            if not getattr(data, key):
                raise UserError(f"data.{key} is empty: name the trained {key} to build on")
        text = CLIP.from_pretrained(data.clip).text_encoder()
        if text.tokenizer is None:
            raise UserError(f"{data.clip}: came without a tokenizer, so it cannot read captions")
        return AutoencoderKL.from_pretrained(data.vae, dtype=torch.float32), text

    def check_fit(self, unet, vae, text):
        """A UserError unless the three configurations fit each other."""
        if unet.cross_attention_dim != text.width:
            raise UserError(f"model.cross_attention_dim {unet.cross_attention_dim} must be CLIP's width, {text.width}")
        for key in ("in_channels", "out_channels"):
            if getattr(unet, key) != vae.latent_channels:
                latents = f"the autoencoder's latent_channels, {vae.latent_channels}"
                raise UserError(f"model.{key} {getattr(unet, key)} must be {latents}")
        if unet.addition_time_embed_dim:
            raise UserError("model.addition_time_embed_dim must be 0: SDXL's sizes are for sampling only, not training")

    def latent_scale(self):
        """The factor between the autoencoder's latents and those that the U-Net sees."""
        if self.config.model.init:
            saved = checkpoint.weights_folder(self.config.model.init) / "vae" / "config.json"
            # in a whole pipeline, the U-Net knows latents on the scale that is written there
            if saved.exists():
                return AutoencoderKL.from_pretrained(saved.parent).config.scaling_factor
            return self.model.vae.config.scaling_factor
        return round(1 / self.pairs["train"][1].std(), 5)  # to unit variance, as the noise schedule assumes

    # -- pictures: encoded once, and kept for the next start --

    def open_pairs(self, split):
        """→ ([the Item of each picture, …], Latents: mean and log-variance of each one's picture)."""
        rows = CaptionRows(self.config.data, self.config.train.batch_size, self.config.train.seed, split)
        items = [item for item, _ in rows.pairs]
        folder = Path(self.config.run.dir) / f"latents_{split}_{self.fingerprint(items)}"
        encode, title = functools.partial(self.encode, items), f"latents of {split} pictures"
        latents = Latents(folder, len(items), encode, self.ranks, title)
        if not len(latents):
            raise UserError(f"not one of the {len(items)} captioned pictures can be read")
        return [items[place] for place in latents.places.tolist()], latents

    def fingerprint(self, items):
        """Of all that the latents depend on: the pictures' names and files, their side, the autoencoder's weights."""
        digest = hashlib.blake2b(str(self.config.data.side).encode(), digest_size=8)
        for item in items:
            digest.update(repr((item.name, item.source.stamp(item))).encode())
        for weight in self.model.vae.parameters():
            digest.update(weight.detach().cpu().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def encode(self, items, numbers):
        """Items `numbers` (a range) → (which of them can be read, their latents (n, 2, z, h, w) on the CPU)."""
        numbers = [number for number in numbers if items[number].source.readable(items[number])]
        side = self.config.data.side // self.model.vae.config.factor
        parts = [torch.zeros(0, 2, self.model.vae.config.latent_channels, side, side)]
        for start in range(0, len(numbers), 64):
            pictures = np.stack([items[number].image for number in numbers[start : start + 64]])
            images = 2 * to_float(pictures, self.device) - 1
            parts.append(torch.stack(self.model.vae.encode(images), dim=1).cpu())
        return numbers, torch.cat(parts)

    # -- training --

    def batch(self, number, rows):
        return self.make_batch("train", self.pairs["train"], number, rows)

    def blank_batch(self, rows):
        vae, count = self.model.vae.config, len(rows)
        z, side = vae.latent_channels, self.config.data.side // vae.factor
        noises, offsets = np.zeros((2, count, z, side, side), np.float32), np.zeros((count, z, 1, 1), np.float32)
        return [""] * count, torch.zeros(count, 2, z, side, side), noises, offsets, np.zeros(count, np.int64)

    def held_out_rows(self):
        return len(self.held_out[0])

    def held_out_batch(self, number, rows):
        return self.make_batch("held_out", self.held_out, number, rows)

    def make_batch(self, split, pairs, number, rows):
        """Batch `number` of a split: captions, latents (B, 2, z, h, w), two noises (2, B, z, h, w), offsets, times."""
        items, all_latents = pairs
        config = self.config
        positions = number * config.train.batch_size + np.array(rows)
        order = shuffled("U-Net pairs", (config.train.seed,), len(items), positions).tolist()
        latents = all_latents[order]  # (B, 2, z, h, w)
        shape = latents.shape[2:]
        captions, noises, offsets, times = [], [], [], []
        for row, i in zip(rows, order, strict=True):
            random = rng("U-Net noise", config.train.seed, number, row)
            noises.append(random.standard_normal((2, *shape), np.float32))
            offsets.append(random.standard_normal((shape[0], 1, 1), np.float32))
            drops = random.random() < config.loss.drop and split == "train"
            times.append(random.integers(config.schedule.num_train_timesteps))
            captions.append("" if drops else pick(items[i].captions, random))
        return captions, latents, np.stack(noises, axis=1), np.stack(offsets), np.array(times)

    def loss(self, phase, module, batch, step, microstep):
        captions, latents, noises, offsets, times = batch
        loss, schedule = self.config.loss, self.config.schedule
        mean, logvar = latents.to(self.device).unbind(1)  # (B, z, h, w)
        sampled, noise = torch.from_numpy(noises).to(self.device)
        x0 = reparameterize(mean, logvar, sampled) * self.model.vae.config.scaling_factor
        noise = offset_noise(noise, torch.from_numpy(offsets).to(self.device), loss.noise_offset)
        with torch.no_grad():
            context = self.model.encode_text(captions).context
        t = torch.from_numpy(times).to(self.device)
        return diffusion_loss(module, schedule, x0, noise, t, context, min_snr=loss.min_snr), {}

    def sample(self):
        """The first held-out captions, drawn twice, below the true pictures' reconstructions."""
        if self.held_out is None:
            return None
        items, latents = self.held_out
        items, latents = items[:8], latents[range(min(8, len(items)))]
        true = self.model.to_images(latents[:, 0].to(self.device) * self.model.vae.config.scaling_factor)
        rows = [true]
        for seed in (0, 8):
            options = {"steps": 25, "sampler": fitting_sampler(self.config.schedule), "size": self.config.data.side}
            rows.append(self.model.generate([item.caption for item in items], guidance=3, seed=seed, **options))
        return [list(to_uint8(images)) for images in rows]


class DreamLLMTask(Task):
    """Texts and pictures in one sequence → the next token, and the pictures that are to be drawn.

    What is trained is a list of names in the configuration; all else is frozen. The LLaMA and the U-Net let gradients
    through to what lies before them; before CLIP and the autoencoder nothing is trained, so none enters them.
    """

    unit = "samples"
    blocks = (LLaMABlock, CLIPBlock, ResBlock, SpatialTransformer)
    OF_WEIGHTS = ("queries", "projector", "condition")  # keys of [model] that follow a loaded folder
    may_skip_weights = True  # if CLIP or the U-Net is trained, a batch without pictures leaves it without a gradient

    def __init__(self, config, explicit_keys, ranks, resume):
        super().__init__(config, ranks)
        if config.train.ema:
            raise UserError("train.ema is not for model.kind dreamllm: set it to 0")
        self.model = model = self.load(explicit_keys, resume)
        fixed = {name: getattr(model.config, name) for name in self.OF_WEIGHTS}
        model.config = dataclasses.replace(part_of(DreamLLMConfig, config.model), **fixed)
        counts = freeze_all_but(model, config.model.trained or STAGES[config.model.stage])
        if ranks.is_main:
            frozen_count = sum(p.numel() for p in model.parameters() if not p.requires_grad)
            shown = ", ".join(f"{name} {count:,}" for name, count in counts.items())
            print(f"trained: {shown}; frozen: {frozen_count:,}")
        for part in (model.llama, model.diffusion.unet):
            part.activation_checkpointing = config.train.activation_checkpointing
        self.modules = {"model": model}
        self.writer = self.make_writer()

    def open_data(self, resume):
        self.rows = self.open_rows("train")
        self.held_out = self.open_held_out(lambda: self.open_rows("held_out"))

    @property
    def start(self):
        model = self.config.model
        return model.init or ", ".join((model.llama, model.clip, model.diffusion))

    def load(self, explicit_keys, resume):
        """A DreamLLM from `resume`, else model.init, else from its parts."""
        section = self.config.model
        if self.ranks.planned:
            return self.planned_model(section)
        dtype = None if self.ranks.sharded else torch.float32  # None: mapped, until it is cut into shares
        if folder := resume or section.init:
            model = DreamLLM.from_pretrained(folder, dtype=dtype, one_dtype=not self.ranks.sharded)
            settings.must_agree(explicit_keys & set(self.OF_WEIGHTS), section, model.config, folder)
            return model
        for key in ("llama", "clip", "diffusion"):
            if not getattr(section, key):
                raise UserError(f"model.{key} is empty: name the trained part to build on, or a DreamLLM as model.init")
        tokenizer = Tokenizer.from_pretrained(self.config.data.text_tokenizer or section.llama)
        tokenizer.add(ADDED)
        llama = LLaMA.from_pretrained(section.llama, dtype=dtype)
        for layer in (llama.embed_tokens, getattr(llama, "lm_head", llama.embed_tokens)):
            layer.float()  # so that the new rows are not rounded to the dtype of the file
        llama.resize(tokenizer.vocab_size)
        clip = CLIP.from_pretrained(section.clip, dtype=dtype)
        diffusion = LatentDiffusion.from_pretrained(section.diffusion, dtype=dtype)
        return DreamLLM(llama, clip, diffusion, part_of(DreamLLMConfig, section), tokenizer)

    def planned_model(self, section):
        """A DreamLLM of the shapes of model.init, or of its parts; of what is not here, of the published shape."""
        tokenizer = Tokenizer.from_pretrained("bytes")  # how many ids it has changes no shape
        tokenizer.add(ADDED)
        vicuna, sd = LLaMAConfig.named("vicuna_7b"), "Stable Diffusion 2.1-base"
        unet = dataclasses.replace(UNetConfig.named("sd21"), sample_size=64)
        if section.init and os.path.exists(section.init):
            with unset_fake_temporarily():
                whole = DreamLLM.from_pretrained(section.init, one_dtype=False)
            shapes = whole.llama.config, whole.clip.config, whole.diffusion.unet.config, whole.diffusion.vae.config
        else:
            if section.init:
                print(f"{section.init} is not here: the published 7B's parts are planned in its place", file=sys.stderr)
            llama = shape_of(LLaMA, section.llama, vicuna, "Vicuna 7B")
            shapes = (
                dataclasses.replace(llama, vocab_size=llama.vocab_size + len(ADDED)),
                shape_of(CLIP, section.clip, CLIPConfig.named("ViT-L/14"), "ViT-L/14"),
                shape_of(UNet, section.diffusion, unet, f"{sd}'s U-Net"),
                shape_of(AutoencoderKL, section.diffusion, AutoencoderKLConfig.named("sd"), f"{sd}'s autoencoder"),
            )
        parts = zip((LLaMA, CLIP, UNet, AutoencoderKL), shapes, strict=True)
        llama, clip, unet, vae = (cls(shape) for cls, shape in parts)
        config = dataclasses.replace(part_of(DreamLLMConfig, section), drop=0.0)  # its one short row costs nothing
        with unset_fake_temporarily():
            schedule = NoiseSchedule()  # looks at its own numbers
        return DreamLLM(llama, clip, LatentDiffusion(unet, vae, schedule), config, tokenizer)

    def make_writer(self):
        model, data, stage = self.model, self.config.data, self.config.model.stage
        options = {"understand": stage != "create", "create": stage != "understand"}
        options |= {"template": data.template, "system": data.system}
        context = model.llama.config.max_seq_len
        return Writer(model.tokenizer, model.patches, model.config.queries, context, **options)

    def open_rows(self, split):
        data, train, clip_side = self.config.data, self.config.train, self.model.clip.config.vision.image_size
        return DocumentRows(data, self.writer, clip_side, self.model.side, train.batch_size, train.seed, split)

    def batch(self, number, rows):
        return self.make_batch(self.rows, number, rows)

    def held_out_batch(self, number, rows):
        return self.make_batch(self.held_out, number, rows)

    def blank_batch(self, rows):
        """Rows as long as the context; of pairs each has one picture, of all else as many as fit."""
        writer, model = self.writer, self.model
        span = writer.dream * writer.create + writer.img * writer.understand
        several = any(source.kind not in ("pair", "image") for source in self.config.data.sources)
        count = (writer.context - 2) // len(span) if several else 1
        tokens = np.array([(span * count + [0] * writer.context)[: writer.context]] * len(rows), np.int64)
        read, drawn = count * len(rows) * writer.understand, count * len(rows) * writer.create
        side, find = model.clip.config.vision.image_size, type(model).span_positions

        def span_positions(_, start, length):  # nothing can be found among fake tokens
            with unset_fake_temporarily():
                return find(model, torch.from_numpy(tokens), start, length)

        model.span_positions = span_positions
        with unset_fake_temporarily():
            draws = LossNoise(*map(torch.Tensor.numpy, model.diffusion.loss_noise(drawn, model.side, model.side)))
        images = np.zeros((read, side, side, 3), np.uint8)
        images_dm = np.zeros((drawn, model.side, model.side, 3), np.uint8)
        return {"tokens": tokens, "labels": tokens, "images": images, "images_dm": images_dm, "draws": draws}

    def make_batch(self, source, number, rows):
        """Batch `number` of a DocumentRows, with the random numbers of its pictures' loss as a LossNoise of arrays."""
        batch = source.batch(number, rows)
        unet, vae = self.model.diffusion.unet.config, self.model.diffusion.vae.config
        shape = (vae.latent_channels, unet.sample_size, unet.sample_size)
        start = self.model.tokenizer.special["<dream_start>"]
        counts = (batch["tokens"] == start).sum(1).tolist()  # pictures to draw in each row
        noises = []  # each row has its own, whoever its neighbours are
        for row, count in zip(rows, counts, strict=True):
            random = rng("DreamLLM noise", self.config.train.seed, number, row)
            sample, noise, perturbation = random.standard_normal((3, count, *shape), np.float32)
            offset = random.standard_normal((count, shape[0], 1, 1), np.float32)
            t = random.integers(self.model.diffusion.schedule.num_train_timesteps, size=count)
            noises.append(LossNoise(sample, noise, offset, perturbation, t, random.random(count)))
        joined = [np.concatenate(arrays) for arrays in zip(*noises, strict=True)]
        return batch | {"draws": LossNoise(*joined)}

    def losses(self, module, batch):
        """→ (a scalar to descend; lm_loss, vm_loss (2,); of how many labels and pictures they are means (2,)).

        Where there are several ranks, the two losses are this rank's summands of the means over all ranks.
        """
        tokens = torch.from_numpy(batch["tokens"]).to(self.device)  # (B, T)
        labels = torch.from_numpy(batch["labels"]).to(self.device)  # (B, T)
        images = self.model.clip.normalize(to_float(batch["images"], self.device))  # (N, 3, S, S)
        images_dm = to_float(batch["images_dm"], self.device)  # (M, 3, side, side)
        noise = LossNoise(*(torch.from_numpy(array).to(self.device) for array in batch["draws"]))
        if self.ranks.sharded:  # a part that one rank needs, all must run: each holds a share of it
            needed = self.ranks.mean({"clip": len(images), "diffusion": len(images_dm)})
            self.model.always_run = [part for part, count in needed.items() if count]
        out = module(tokens, labels, images, images_dm, noise)
        loss, means = out["loss"], torch.stack((out["lm_loss"], out["vm_loss"]))
        counts = torch.stack(((labels[:, 1:] != -100).sum(), torch.tensor(len(images_dm), device=self.device)))
        if self.ranks.world > 1:
            # A rank's mean mᵣ is over its own nᵣ labels (or pictures); wanted is the mean over all n = Σ nᵣ of them,
            # Σ nᵣmᵣ / n. What is averaged over the W ranks, gradients and metrics alike, is therefore W·nᵣ/n · mᵣ:
            # its mean, Σ (W·nᵣ/n · mᵣ) / W, is the one wanted. `loss` has weight·mᵣ already, and
            # weight·(W·nᵣ/n - 1)·mᵣ is added.
            total = counts.clone()
            dist.all_reduce(total)
            shares = counts * self.ranks.world / total.clamp(min=1)  # W·nᵣ/n
            weights = torch.tensor((self.model.config.w_lm, self.model.config.w_vm), device=self.device)
            loss = loss + (weights * (shares - 1) * means).sum()
            means, counts = shares * means, total
        return loss, means, counts

    def loss(self, phase, module, batch, step, microstep):
        loss, means, _ = self.losses(module, batch)
        return loss, dict(zip(("lm_loss", "vm_loss"), means, strict=True))

    def measure(self, batch):
        _, means, counts = self.losses(self.model, batch)
        return means * counts, counts

    def summarize(self, measured):
        """Both losses: the mean over all labels of the held-out samples, and over all their pictures to draw."""
        sums, counts = (sum(values) for values in zip(*measured, strict=True))
        lm_loss, vm_loss = sums / counts.clamp(min=1)
        return {"held_out_lm_loss": lm_loss, "held_out_vm_loss": vm_loss}

    def sample(self):
        """The first held-out pairs to create: their pictures, above what is drawn after the same texts."""
        if self.held_out is None or self.config.model.stage == "understand":
            return None
        tokenizer, prompts, true = self.model.tokenizer, [], []
        samples = (self.held_out.sample(position) for position in range(256))
        to_create = (sample for sample in samples if sample.images_dm and not sample.images)
        for sample in itertools.islice(to_create, 8):
            start = np.flatnonzero(sample.tokens == tokenizer.special["<dream_start>"])[0]
            prompts.append(tokenizer.decode(sample.tokens[:start].tolist()))
            true.append(draw_view(sample.images_dm[0], self.model.side))
        if not prompts:
            return None
        sampler = fitting_sampler(self.model.diffusion.schedule)
        drawn = self.model.text_to_image(prompts, guidance=3, steps=25, sampler=sampler, seed=0)
        return [true, list(to_uint8(drawn))]


TASKS = {
    "vqgan": VQGANTask,
    "llama": LLaMATask,
    "clip": CLIPTask,
    "vae": VAETask,
    "unet": UNetTask,
    "dreamllm": DreamLLMTask,
}


# ---- helpers -----------------------------------------------------------------------------------


def freeze_all_but(model, prefixes):
    """Lets gradients into the weights that `prefixes` name, alone or by their modules, and into no others.

    → {prefix: how many numbers it stands for}.
    """
    counts = dict.fromkeys(prefixes, 0)
    for name, parameter in model.named_parameters():
        chosen = [prefix for prefix in prefixes if f"{name}.".startswith(f"{prefix}.")]
        parameter.requires_grad_(bool(chosen))
        for prefix in chosen:
            counts[prefix] += parameter.numel()
    for prefix, count in counts.items():
        if not count:
            names = ", ".join(["dream_queries", *dict(model.named_children())])
            raise UserError(
                f'model.trained: no weight\'s name begins with "{prefix}"; there are {names}, and what is in them'
            )
    return counts


@contextlib.contextmanager
def frozen(module):
    """Within, gradients flow through the module but not into its weights."""
    if module is not None:
        module.requires_grad_(False)
    yield
    if module is not None:
        module.requires_grad_(True)
