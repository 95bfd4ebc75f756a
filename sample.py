"""Samples from trained models: prompts in; pictures, text or pages out.

    python sample.py continue --run LVM --prompt a.png b.png c.png --frames 4 --out grid.png
    python sample.py continue --run LVM --prompt x1.png y1.png x2.png y2.png query.png
    python sample.py batch --run LVM --input prompts.jsonl
    python sample.py text --run LLAMA --prompt "Why is the sky blue?" --chat llama3
    python sample.py image --run DIFFUSION --prompt "a taco" --guidance 7.5 --out taco.png
    python sample.py chat --run DREAMLLM --image x.png --prompt "What is this?"
    python sample.py document --run DREAMLLM --prompt "food & drink:" --out page
    python sample.py reconstruct --run VQGAN --images a.png b.png --out grid.png
    python sample.py perplexity --run LVM --input pairs.jsonl
    python sample.py what PATH

An LVM is prompted with pictures only: frames that it continues, or pairs x1, y1, … and a query x
that it answers with a y (lvm.py). A DreamLLM's prompt has pictures and texts in one sequence; the
model decides where its own pictures stand, and reads each of them before it goes on (dreamllm.py).

    continue    pictures (N, side, side, 3)
                  ─ LVM.continue_pictures ─▶ pictures (candidates, frames, side, side, 3)
    text        text ─ Tokenizer.encode ─▶ ids ─ LLaMA.stream ─▶ ids ─ Tokenizer.stream ─▶ text
    image       text ─ LatentDiffusion.generate or DreamLLM.text_to_image ─▶ pictures (B, 3, H, W)
    document    [picture or text, …]
                  ─ DreamLLM.stream_document ─▶ text, picture, … ─ save_page ─▶ page.md, page.html
    perplexity  tokens (T,) ─ LLaMA.logits ─▶ −log p of each, given those before it ─▶ exp(mean)

A model of perplexity P is on average as uncertain about the next token as a choice among P equally
likely ones.

--run takes a run's folder or a published one; --tokenizer names the VQGAN, or for text the folder
with the tokenizer's files (default: the run's own).
"""

import inspect
import itertools
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from clip import CLIP, text_encoders
from diffusion import SAMPLERS, AutoencoderKL, LatentDiffusion, UNet
from documents import chat_parts
from dreamllm import END, DreamLLM
from lvm import LVM, run_data
from model import LLaMA
from published.llama import in_context
from support import checkpoint, settings, what
from support.chat import TEMPLATES, own_template
from support.options import (
    few_int,
    fraction,
    moderate_int,
    non_negative,
    picture_size,
    positive_int,
    real,
    seed_number,
    utf8,
)
from support.pages import PAGE_FILE, picture_name, save_page
from support.pictures import SUFFIXES, load_picture, psnr, resized, save_animation, save_grid, to_float, to_uint8
from support.settings import UserError, plain
from support.sources import warn
from support.tokenizer import FILES, Tokenizer
from vqgan import VQGAN

# ---- text: sampled, printed, scored ----------------------------------------------------------


def load_text(run, tokenizer="", device="cpu", dtype=None):
    """A run or a published folder, and the tokenizer's if it is another → (LLaMA, Tokenizer).

    Without `tokenizer` its files are looked for beside the weights, then where the run's
    configuration says.
    """
    checkpoint.expect(run, "a LLaMA")
    data = run_data(run)
    if not tokenizer:
        if data.get("tokenizer"):
            other = "use sample.py continue, or its perplexity of a .jsonl"
            raise UserError(f"{run} is a run on pictures: {other}")
        folder = Path(run).parent if Path(run).is_file() else run
        weights = checkpoint.weights_folder(folder)
        complete = any((weights / name).exists() for name in FILES)
        tokenizer = folder if complete else data.get("text_tokenizer") or folder
    tokenizer = Tokenizer.from_pretrained(tokenizer)
    llama = LLaMA.from_pretrained(run, dtype=dtype, device=device)
    tokenizer.rows = llama.config.vocab_size  # padding is often added to a tokenizer alone
    return llama, tokenizer


def stream_text(llama, tokenizer, ids, max_new_tokens, **sampling):
    """Prompt [id, …] → yields the text that follows, up to an end token or the context's end."""
    device = llama.embed_tokens.weight.device
    prompt = torch.tensor([ids], dtype=torch.long, device=device)  # (1, T)
    count = min(max_new_tokens, llama.config.max_seq_len - len(ids))
    rows = range(llama.config.vocab_size)
    allowed = list(filter(tokenizer.bytes_of.__contains__, rows))  # either may be padded beyond the other

    def new_ids():
        for new in llama.stream(prompt, count, allowed=allowed, **sampling):  # (1, 1)
            if new.item() in tokenizer.stops:
                return
            yield new.item()

    yield from tokenizer.stream(new_ids())


@torch.inference_mode()
def negative_log_likelihood(llama, tokens, start):
    """tokens (T,) → −log p of each from index `start` on, given all before it: (T - start,), in nats.

    start: 1 or more, for the first token has nothing before it.
    """
    hidden = llama.hidden(llama.embed_tokens(tokens[None, :-1]))[0, start - 1 :]  # (T - start, D)
    losses = []
    for states, targets in zip(hidden.split(512), tokens[start:].split(512), strict=True):
        logits = llama.logits(states).float()  # (512, V): (T, V) might not fit the memory
        losses.append(F.cross_entropy(logits, targets, reduction="none"))
    return torch.cat(losses)


def text_negative_log_likelihood(llama, tokens, window):
    """tokens (T,) of any length → −log p of all but the first: (T - 1,), in nats.

    The model reads `window` tokens at a time. The window slides by half of itself, and only its new
    tokens are scored: except at the start, each is predicted from half a window or more.
    """
    parts, scored = [], 1
    while scored < len(tokens):
        end = min(len(tokens), max(window + 1, scored + max(1, window // 2)))
        start = max(0, end - window - 1)  # the last token of a window is predicted only, never read
        parts.append(negative_log_likelihood(llama, tokens[start:end], scored - start))
        scored = end
    return torch.cat(parts)


def print_stream(stream, name_picture=None, answer=False):
    """Prints texts as they come, and a line for each picture; returns all, neighbouring texts joined.

    name_picture(picture, number from 1) returns what the line says. A text that follows a picture
    loses the spaces that it begins with; so does the first text, if `answer`.
    """
    pieces, pictures = [], 0
    for piece in stream:
        after_text = bool(pieces) and isinstance(pieces[-1], str)
        if not isinstance(piece, str):
            pictures += 1
            line = f"[{name_picture(piece, pictures)}]"
            print(f"\n{line}" if after_text else line, flush=True)
            pieces.append(piece)
            continue
        if after_text:
            pieces[-1] += piece
        else:
            piece = piece.lstrip() if pieces or answer else piece
            if piece:
                pieces.append(piece)
        print(plain(piece), end="", flush=True)
    if not pieces or isinstance(pieces[-1], str):
        print()
    return pieces


# ---- what the options ask for ----------------------------------------------------------------


def find_device(name):
    """--device as a name that torch knows: cpu, cuda, …; "" or None: a GPU if there is one."""
    try:
        torch.zeros(1, device=name or "cpu").item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: not available ({str(error).splitlines()[0]})") from None
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def device_and_dtype(args):
    """--device and --dtype → (the device's name; a torch.dtype, "int8", or None: as stored)."""
    device = find_device(args.device)
    dtype = args.dtype or ("bfloat16" if device.startswith("cuda") else None)
    return device, dtype if dtype in (None, "int8") else getattr(torch, dtype)


def load_with(args, loader):
    """loader(run, tokenizer, device, dtype) with what the options say."""
    return loader(args.run, args.tokenizer, *device_and_dtype(args))


def load_in_context(args):
    """The LLaMA of --run and its Tokenizer, in the context that --context asks for."""
    llama, tokenizer = load_with(args, load_text)
    if args.context:
        llama.config = in_context(llama.config, max_seq_len=args.context)
    return llama, tokenizer


def framing(template, system, folder):
    """--chat or --template, and --system → (a key of TEMPLATES, the system message or None).

    "auto" is the chat template in the tokenizer's `folder`, with the system message that this one begins with.
    """
    if template != "auto":
        return template, system
    if folder is None:
        raise UserError('the tokenizer "bytes" has no chat template: name one')
    template, own_system = own_template(folder)
    return template, own_system if system is None else system


def load_dream(args):
    """The DreamLLM at --run."""
    device, dtype = device_and_dtype(args)
    return DreamLLM.from_pretrained(args.run, dtype, device, args.parts)


def sampling_options(args, llama, row=0):
    """The options of LLaMA.generate.

    With a seed, each row of a batch has a random generator of its own: its result does not depend
    on the other rows.
    """
    generator = torch.Generator(llama.embed_tokens.weight.device)
    if args.seed is None:
        generator.seed()
    else:
        generator.manual_seed(args.seed + row)
    return selected(args, "temperature", "top_k", "top_p") | {"generator": generator}


def drawing_options(args, sampler):
    """The options that LatentDiffusion.generate and DreamLLM.text_to_image share."""
    options = selected(args, "negative", "guidance", "steps", "seed", "rescale")
    return options | {"sampler": sampler, "progress": True}


def selected(args, *names):
    """These options as keyword arguments."""
    return {name: getattr(args, name) for name in names}


def open_pictures(paths):
    """Picture files → Pillow pictures."""
    return [Image.fromarray(load_picture(path)) for path in paths]


def size_in_pixels(size, path):
    """--resize or --size → (W, H), or None; "original" is the size of the picture at `path`."""
    if size == "original":
        height, width = load_picture(path).shape[:2]
        return width, height
    return size


def chat_prompt(args, pictures):
    """--prompt and pictures as the first message of a conversation → what chat_parts makes of it.

    Each <image> in the prompt becomes the next picture; without one the pictures stand before it.
    Template and system message: the options', else those of the run's training, else vicuna's.
    """
    data = run_data(args.run)
    content = args.prompt if "<image>" in args.prompt else "<image>\n" * len(pictures) + args.prompt
    system = data.get("system") if args.system is None else args.system
    template = args.template or data.get("template", "vicuna")
    template, system = framing(template, system, checkpoint.weights_folder(args.run))
    try:
        return chat_parts([{"role": "user", "content": content}], pictures, template, system)
    except ValueError as error:
        raise UserError(f"--prompt: {error}") from None


def stream_document(args, prompt, max_pictures):
    """Texts and pictures that the DreamLLM at --run writes after `prompt`, as it samples them."""
    options = selected(args, "temperature", "top_k", "top_p", "guidance", "steps", "seed")
    options |= {"sampler": args.sampler or "ddpm", "progress": True}
    stream = load_dream(args).stream_document(prompt, args.max_new, max_pictures, **options)
    return (piece for piece in stream if piece is not END)


def read_rows(path, key, many):
    """LVM's JSONL, lines {"input": [picture paths], key: …} → [(line number, row), …].

    key: the row's other entry, a list of picture paths if `many`, else one path. Empty lines are
    skipped; any other is a UserError that names it.
    """
    rows = []
    for number, line in enumerate(settings.read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = settings.parse_json(line)
        except ValueError:
            row = None
        row = row if isinstance(row, dict) else {}
        other_is_good = is_paths(row.get(key)) if many else isinstance(row.get(key), str)
        if not is_paths(row.get("input")) or not other_is_good:
            form = f'{{"input": [picture paths], "{key}": {"[picture paths]" if many else "path"}}}'
            raise UserError(f"{path}:{number}: expected {form}")
        rows.append((number, row))
    return rows


def is_paths(value):
    """Whether the value is a list of one or more texts."""
    return isinstance(value, list) and bool(value) and all(isinstance(path, str) for path in value)


# ---- commands --------------------------------------------------------------------------------
# The docstring of each is its --help; its first line stands in the list of commands.


def continue_pictures(args):
    """Continues a sequence of pictures, or answers an analogy.

    The output is a grid with a row for each candidate: the prompt, then the new pictures. An --out
    that ends in .gif shows the first candidate as an animation.
    """
    checkpoint.out_file(args.out, SUFFIXES, args.prompt)
    size = size_in_pixels(args.resize, args.prompt[-1])
    lvm = load_with(args, LVM.from_pretrained)
    prompt = np.stack([load_picture(path, lvm.side) for path in args.prompt])  # (N, side, side, 3)
    options = sampling_options(args, lvm.llama)
    candidates = lvm.continue_pictures(prompt, args.frames, args.candidates, **options)
    rows = [resized([*prompt, *frames], size) for frames in candidates]
    if Path(args.out).suffix.lower() == ".gif":
        save_animation(rows[0], args.out)
    else:
        save_grid(rows, args.out)
    counts = f"{len(prompt)} prompt pictures, then {args.frames} new ones"
    print(f"{args.out}: {counts}; {args.candidates} candidates as rows")


def batch(args):
    """Continues many prompts: one {"input": [pictures], "output": path} a line.

    Each output is a grid of the new pictures with a row for each candidate. A line that fails is
    named, the others are done, and the exit code is 2.
    """
    rows, writable = read_rows(args.input, "output", many=False), []
    for number, row in rows:
        try:
            checkpoint.out_file(row["output"], SUFFIXES, row["input"])
            writable.append((number, row))
        except UserError as error:
            warn(f"{args.input}:{number}: {error}")
    done = 0
    lvm = load_with(args, LVM.from_pretrained) if writable else None
    for number, row in writable:
        try:
            size = size_in_pixels(args.resize, row["input"][-1])
            prompt = np.stack([load_picture(path, lvm.side) for path in row["input"]])
            options = sampling_options(args, lvm.llama, number)
            candidates = lvm.continue_pictures(prompt, args.frames, args.candidates, **options)
            save_grid([resized(frames, size) for frames in candidates], row["output"])
            done += 1
        except (UserError, OSError) as error:
            warn(f"{args.input}:{number}: {error}")
    print(f"{done} of {len(rows)} prompts done")
    if done < len(rows):
        raise UserError(f"{len(rows) - done} of {len(rows)} prompts failed, named above")


@torch.inference_mode()
def reconstruct(args):
    """Encodes pictures as codes and decodes them again.

    The output is a grid of two rows, originals above reconstructions. For each picture a line says
    how many codes it has, and the reconstruction's PSNR in dB.
    """
    checkpoint.out_file(args.out, SUFFIXES, args.images)
    device = find_device(args.device)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    tokenizer = VQGAN.from_pretrained(args.run, device=device, dtype=dtype)
    pictures = np.stack([load_picture(path, tokenizer.config.resolution) for path in args.images])
    images = to_float(pictures, device)  # (N, 3, side, side)
    codes = tokenizer.encode(images.to(next(tokenizer.parameters()).dtype))
    decoded = tokenizer.decode(codes).float()
    save_grid([list(pictures), list(to_uint8(decoded))], args.out)
    for path, value in zip(args.images, psnr(decoded, images).tolist(), strict=True):
        print(f"{path}: {codes[0].numel()} codes, {value:.1f} dB")


def continue_text(args):
    """Continues a text, or answers in a chat; prints each token as it is sampled.

    It ends at an end token, after --max-new tokens, or where the model's context is full.
    """
    llama, tokenizer = load_in_context(args)
    if args.chat:
        template, system = framing(args.chat, args.system, tokenizer.file and tokenizer.file.parent)
        system = [] if system is None else [{"role": "system", "content": system}]
        ids = tokenizer.encode_chat([*system, {"role": "user", "content": args.prompt}], template)
    elif args.system is not None:
        raise UserError("--system needs --chat: only a chat template has a place for it")
    else:
        ids = tokenizer.encode(args.prompt, bos=True)
    if not ids:
        no_start = "this tokenizer has no token that begins a text"
        raise UserError(f"an empty prompt, and {no_start}: give a --prompt")
    if len(ids) >= (context := llama.config.max_seq_len):
        full = f"the prompt's {len(ids)} tokens fill the model's context of {context}"
        raise UserError(f"{full}: give a shorter one")
    stream = stream_text(llama, tokenizer, ids, args.max_new, **sampling_options(args, llama))
    if args.chat:
        print_stream(stream, answer=True)
    else:
        print_stream(itertools.chain([args.prompt], stream))


def generate_images(args):
    """Generates pictures from a text, with latent diffusion or a DreamLLM.

    Latent diffusion is a run or a published Stable Diffusion 1, 2 or XL. Several pictures stand
    side by side in the output.
    """
    checkpoint.out_file(args.out, SUFFIXES, [*args.subject, *filter(None, [args.image])])
    checkpoint.expect(args.run, "a latent diffusion pipeline", "a DreamLLM")
    is_dream = checkpoint.what_is(args.run) == "a DreamLLM"
    for flag, _ in DIFFUSION_ONLY if is_dream else DREAM_ONLY:
        if getattr(args, flag.removeprefix("--")):
            article = "a" if is_dream else "no"
            raise UserError(f"{flag} does not apply: {args.run} is {article} DreamLLM")
    if is_dream:
        prompts, sampler = [[*open_pictures(args.subject), args.prompt]] * args.count, args.sampler or "ddpm"
        images = load_dream(args).text_to_image(prompts, **drawing_options(args, sampler))
    else:
        images, sampler = diffusion_images(args)
    save_grid([list(to_uint8(images))], args.out, pad=0 if args.count == 1 else 2)
    height, width = images.shape[2:]
    print(f"{args.out}: {args.count} × {width}×{height}, {args.steps} steps of {sampler}")


def diffusion_images(args):
    """What the latent diffusion at --run generates: (B, 3, H, W) in [0, 1], and the sampler's name."""
    device, dtype = device_and_dtype(args)
    dtype = dtype or torch.float32
    if args.size == "original" and not args.image:
        raise UserError("--size original needs an --image")
    size, start = args.size, None
    if args.image:
        size = size_in_pixels(size or "original", args.image)
        start = to_float(resized([load_picture(args.image)], size))  # (1, 3, H, W)
    encoders = text_encoders(args.run, args.tokenizer or None, dtype, device, args.variant)
    model = LatentDiffusion.from_pretrained(args.run, encoders, dtype, device, args.config or None, args.variant)
    sampler = args.sampler or model.sampler
    images = model.generate(
        [args.prompt] * args.count,
        size=size and size[::-1],
        image=start,
        strength=args.strength or 0.8,
        **drawing_options(args, sampler),
    )
    return images, sampler


def chat(args):
    """Asks a DreamLLM about pictures, or for some; without a prompt it describes what it is shown.

    The answer is printed as it is sampled. Its pictures are saved as --out with a number:
    chat_01.png, …
    """

    def numbered(number):
        name, ending = os.path.splitext(args.out)
        return f"{name}_{number:02d}{ending}"

    checkpoint.out_file(args.out, SUFFIXES)
    for number in range(1, args.max_pictures + 1):
        checkpoint.out_file(numbered(number), SUFFIXES, args.image)
    pictures = open_pictures(args.image)
    if args.prompt:
        stream = stream_document(args, chat_prompt(args, pictures), args.max_pictures)
    elif pictures:
        stream = stream_document(args, pictures, max_pictures=0)  # as captions are learned
    else:
        missing = "give a --prompt, or an --image to be described, or both"
        raise UserError(f"nothing to talk about: {missing}")

    def save(picture, number):
        save_grid([[np.asarray(picture)]], numbered(number), pad=0)
        return numbered(number)

    print_stream(stream, save, answer=True)


def document(args):
    """Writes an illustrated page: Markdown, its pictures, and one HTML file that holds all.

    A DreamLLM decides where the pictures stand. The page begins with --image and --prompt; with
    --template they are an instruction instead, and the page is the answer.
    """
    checkpoint.out_folder(args.out, PAGE_FILE)
    pictures = open_pictures(args.image)
    if args.template:
        prompt, beginning = chat_prompt(args, pictures), []
    elif args.system is not None:
        raise UserError("--system needs --template: only a conversation has a place for it")
    else:
        prompt = beginning = [*pictures, args.prompt]
    stream = itertools.chain(beginning, stream_document(args, prompt, args.max_pictures))
    pieces = print_stream(stream, lambda _, number: picture_name(number), answer=bool(args.template))
    save_page(pieces, args.out, title=args.prompt or Path(args.out).name)
    total = sum(isinstance(piece, Image.Image) for piece in pieces)
    drawn = total - len(pictures) if beginning else total
    print(f"{args.out}: page.html, page.md; pictures drawn: {drawn}")


def perplexity(args):
    """Measures how well a model predicts pictures, or a text.

    Pictures, as in LVM's paper: exp(mean −log p of the target's codes) for each row, then the mean
    over rows. --input is a .jsonl of {"input": [pictures], "target": [pictures]} lines.

    A text: the perplexity of a token, and bits per byte, which tokenizers have in common.
    """
    if Path(args.input).suffix == ".jsonl":
        if args.context:
            raise UserError("--context is for a text: a row of pictures is read whole")
        picture_perplexity(args)
    else:
        text_perplexity(args)


def picture_perplexity(args):
    """The perplexity of a code, printed: the mean over the rows of --input."""
    rows = read_rows(args.input, "target", many=True)
    if not rows:
        raise UserError(f"{args.input}: no rows in it")
    lvm = load_with(args, LVM.from_pretrained)
    values = []
    for number, row in tqdm(rows, unit=" rows", mininterval=1):
        paths = [*row["input"], *row["target"]]
        if len(paths) > lvm.pictures_in_context:
            counts = f"{len(paths)} pictures; the model's context holds {lvm.pictures_in_context}"
            raise UserError(f"{args.input}:{number}: {counts}")
        codes = lvm.encode([load_picture(path, lvm.side) for path in paths])  # (N, h·w)
        losses = negative_log_likelihood(lvm.llama, codes.flatten(), len(row["input"]) * lvm.codes_per_picture)
        values.append(losses.mean().exp().item())
    print(f"{args.input}: perplexity {np.mean(values):.4g} a code, the mean of {len(values)} rows")


def text_perplexity(args):
    """The perplexity of a token of --input, and its bits per byte, printed."""
    text = settings.read_text(args.input)
    llama, tokenizer = load_in_context(args)
    tokens = torch.tensor(tokenizer.encode(text, bos=True), device=llama.embed_tokens.weight.device)
    if len(tokens) < 2:
        raise UserError(f"{args.input}: too short: it has no token that follows another")
    window = min(args.window, llama.config.max_seq_len)
    losses = text_negative_log_likelihood(llama, tokens, window)
    size = len(text.encode())
    if tokenizer.bos is None:  # then the first token has nothing before it, and is not scored
        size -= len(tokenizer.bytes_of[tokens[0].item()])
    bits = losses.sum().item() / math.log(2) / max(1, size)
    values = f"perplexity {losses.mean().exp():.4g} a token, {bits:.4f} bits a byte"
    print(f"{args.input}: {values} ({len(losses)} tokens, seen through a window of {window})")


def open_pipeline(path, device):
    """The whole latent diffusion at `path`, its text encoders included."""
    model = LatentDiffusion.from_pretrained(path, device=device)
    text = text_encoders(path, device=device)
    return LatentDiffusion(model.unet, model.vae, model.schedule, text if len(text) > 1 else text[0])


OPENERS = {  # what it is: (what opens it, the command to use it with)
    "a LLaMA": (LLaMA.from_pretrained, 'sample.py text --run {} --prompt "The sky is"'),
    "a DreamLLM": (DreamLLM.from_pretrained, 'sample.py chat --run {} --image x.png --prompt "What is this?"'),
    "a VQGAN": (VQGAN.from_pretrained, "sample.py reconstruct --run {} --images a.png"),
    "a CLIP": (CLIP.from_pretrained, "train.py --config configs/clip.toml model.init={}"),
    "a CLIP text tower": (CLIP.from_pretrained, "train.py --config configs/unet.toml data.clip={}"),
    "a CLIP vision tower": (CLIP.from_pretrained, "train.py --config configs/dreamllm_understand.toml model.clip={}"),
    "an autoencoder of latent diffusion": (
        AutoencoderKL.from_pretrained,
        "train.py --config configs/vae.toml model.init={}",
    ),
    "a U-Net of latent diffusion": (UNet.from_pretrained, "train.py --config configs/unet.toml model.init={}"),
    "a latent diffusion pipeline": (open_pipeline, 'sample.py image --run {} --prompt "a taco"'),
    what.TOKENIZER: (None, 'sample.py text --run LLAMA --tokenizer {} --prompt "The sky is"'),
}


def say_what(args):
    """Says what a run, a folder or a file is: its size, its tokenizer, and the command to use it with.

    It is opened as every other command does, but without its weights: names, shapes and dtypes are
    compared, no number is read. What does not open is called by its name, and the exit code is 2.
    """
    path = Path(args.path)
    kind = what.kind_of(path)
    opener, command = OPENERS[kind]
    rows = {"what": kind, "run": what.origin(path)}
    print_rows(rows)
    rows = {"tokenizer": what.tokenizer_of(checkpoint.weights_folder(path))}
    if opener:
        with torch.device("meta"):
            model = opener(path, device="meta")
        size, dtype = what.size(model)
        rows = {"size": size, "dtype": dtype, "context": what.reach(getattr(model, "config", None))} | rows
    data = run_data(path) if kind == "a LLaMA" else {}
    if data.get("tokenizer"):
        command = "sample.py continue --run {} --prompt a.png b.png"
    elif kind == "a LLaMA" and not rows["tokenizer"]:
        rows["tokenizer"] = data.get("text_tokenizer")
        if not rows["tokenizer"]:
            rows["tokenizer"] = "none beside it: name an LVM's VQGAN, or the folder of a text's"
            command = "sample.py continue --run {} --tokenizer VQGAN --prompt a.png b.png"
    print_rows(rows | {"use": f"python {command.format(path)}"})


def print_rows(rows):
    for label, text in rows.items():
        if text:
            print(f"{label:10} {plain(text)}", flush=True)


# ---- the command line ------------------------------------------------------------------------


def option(flag, **properties):
    """An option of a command: what argparse's add_argument takes."""
    return flag, properties


FLOATS = ("float32", "bfloat16", "float16")
DTYPE = "of the weights; default: bfloat16 on a GPU, else as stored"
FRAMING = "the form of conversation that the model was tuned on"
PICTURES = {"nargs": "+", "metavar": "PICTURE"}

MODEL = (
    option("--run", required=True, help="a run's folder or a published checkpoint's"),
    option("--device", help="cpu or cuda; default: a GPU if there is one"),
)
FLOAT_MODEL = (*MODEL, option("--dtype", choices=FLOATS, help=DTYPE))
LLAMA = (*MODEL, option("--dtype", choices=(*FLOATS, "int8"), help=DTYPE))
CONTEXT = option("--context", type=positive_int, metavar="N", help="tokens that the model may see; default: its own")
SEED = option("--seed", type=seed_number, help="makes the result repeatable")
SAMPLING = (
    option("--temperature", type=non_negative, default=1.0, help="0: always the most likely token (1)"),
    option("--top-k", type=positive_int, help="sample among the K most likely tokens"),
    option("--top-p", type=fraction, help="sample among the most likely tokens of this total probability"),
    SEED,
)
CONTINUATION = (
    *LLAMA,
    option("--tokenizer", default="", help="the VQGAN; default: the run's data.tokenizer"),
    option("--frames", type=moderate_int, default=1, help="pictures to add (1)"),
    option("--resize", type=picture_size, help="of the output: original (as the last input) or W,H"),
    *SAMPLING,
)
DIFFUSION = (
    option("--guidance", type=real, default=7.5, help="how strongly to follow the prompt; 1: no guidance (7.5)"),
    option("--steps", type=positive_int, default=50, help="passes of the U-Net for a picture (50)"),
    option("--sampler", choices=SAMPLERS, help="default: the one of the folder's scheduler; for a DreamLLM ddpm"),
)
PARTS = option(
    "--parts",
    nargs="+",
    default=[],
    metavar="FOLDER",
    help="where a published DreamLLM's parts have their configurations, if not in or beside it",
)
INTERLEAVED = (
    *FLOAT_MODEL,
    PARTS,
    option("--image", **PICTURES, default=[], help="shown before the prompt"),
    option("--system", type=utf8, help="the chat's system message (the run's or the template's own)"),
    option("--max-new", type=positive_int, default=256, help="most tokens to write (256, or the context's end)"),
    option("--max-pictures", type=few_int, default=4, help="most pictures to generate (4)"),
    *SAMPLING,
    *DIFFUSION,
)
DREAM_ONLY = (option("--subject", **PICTURES, default=[], help="DreamLLM: shown before the prompt"), PARTS)
DIFFUSION_ONLY = (
    option("--size", type=picture_size, help="not for DreamLLM: W,H (as in training)"),
    option("--image", default="", help="not for DreamLLM: start from this instead of from noise"),
    option("--strength", type=fraction, help="not for DreamLLM: how far --image may change; 1: all (0.8)"),
    option("--variant", help="of a diffusers folder: which files, as fp16 or non_ema"),
    option("--config", default="", help="of a single file: its code base's YAML or JSON, if needed"),
    option("--tokenizer", default="", help="of a single file: a folder with CLIP's vocabulary"),
)

COMMANDS = {  # name: (function, example, options …)
    "continue": (
        continue_pictures,
        "--run out/demo/lvm --prompt grey1.png colour1.png grey2.png --out grid.png",
        *CONTINUATION,
        option("--prompt", **PICTURES, required=True),
        option("--candidates", type=moderate_int, default=1, help="independent samples (1)"),
        option("--out", default="grid.png", help="a grid, candidates as rows; or .gif, the first one animated"),
    ),
    "batch": (
        batch,
        "--run out/demo/lvm --input prompts.jsonl --seed 0",
        *CONTINUATION,
        option("--input", required=True, metavar="JSONL"),
        option("--candidates", type=moderate_int, default=4, help="independent samples (4)"),
    ),
    "reconstruct": (
        reconstruct,
        "--run out/demo/tokenizer --images a.png b.png --out grid.png",
        *FLOAT_MODEL,
        option("--images", **PICTURES, required=True),
        option("--out", default="grid.png"),
    ),
    "text": (
        continue_text,
        '--run out/tiny_text --prompt "woman "',
        *LLAMA,
        option("--prompt", type=utf8, default="", help="a text to continue, or the question (empty)"),
        option("--chat", choices=(*TEMPLATES, "auto"), help=f"{FRAMING}; auto: the folder's own"),
        CONTEXT,
        option("--system", type=utf8, help="the chat's system message (the template's own)"),
        option("--max-new", type=positive_int, default=256, help="most tokens to write (256, or the context's end)"),
        option("--tokenizer", default="", help="the tokenizer's folder; default: the run's own"),
        *SAMPLING,
    ),
    "image": (
        generate_images,
        '--run out/emoji/unet --prompt "pizza" --out pizza.png',
        *FLOAT_MODEL,
        option("--prompt", type=utf8, required=True),
        option("--negative", type=utf8, help="what to move away from (the empty text)"),
        option("--rescale", type=real, default=0.0, help="against strong contrasts (0; published 0.7)"),
        *DIFFUSION,
        SEED,
        option("--count", type=moderate_int, default=1, help="pictures, side by side (1)"),
        option("--out", default="image.png"),
        *DREAM_ONLY,
        *DIFFUSION_ONLY,
    ),
    "chat": (
        chat,
        '--run out/emoji/dream/instruct --image x.png --prompt "What is this?"',
        *INTERLEAVED,
        option("--prompt", type=utf8, default="", help="the question; <image> in it: where a picture stands (first)"),
        option("--template", choices=(*TEMPLATES, "auto"), help=f"{FRAMING}; auto: the folder's own (the run's)"),
        option("--out", default="chat.png", help="the answer's pictures, numbered (chat.png)"),
    ),
    "document": (
        document,
        '--run out/emoji/dream/interleaved --prompt "food & drink:" --out page',
        *INTERLEAVED,
        option("--prompt", type=utf8, default="", help="how the page begins (empty)"),
        option("--template", choices=TEMPLATES, help="the prompt is an instruction in this form of conversation"),
        option("--out", default="page", metavar="FOLDER", help="an earlier page is replaced (page)"),
    ),
    "perplexity": (
        perplexity,
        "--run out/demo/lvm --input pairs.jsonl",
        *LLAMA,
        option("--input", required=True, metavar="FILE", help="a text; or a .jsonl of pictures"),
        CONTEXT,
        option("--tokenizer", default="", help="of the pictures or the text; default: the run's own"),
        option(
            "--window", type=positive_int, default=4096, help="tokens of a text read at once (4096, or the context)"
        ),
    ),
    "what": (
        say_what,
        "out/demo/lvm",
        option("path", metavar="PATH", help="a run's folder, a published one, or a file of weights"),
    ),
}


def main():
    parser = settings.Parser(prog="python sample.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (function, example, *options) in COMMANDS.items():
        description = inspect.getdoc(function)
        epilog = f"example:\n  python sample.py {name} {example}"
        summary = description.splitlines()[0]
        command = commands.add_parser(name, help=summary, description=description, epilog=epilog)
        command.set_defaults(function=function)
        for flag, properties in options:
            command.add_argument(flag, **properties)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    settings.run_main(main)
