"""Prompts in, pictures or text out; and how well a model foresees what it has not made.

    python sample.py continue --run out/demo/lvm --prompt a.png b.png c.png --frames 4 --out grid.png
    python sample.py continue --run out/demo/lvm --prompt x1.png y1.png x2.png y2.png query.png
    python sample.py batch --run out/demo/lvm --input prompts.jsonl
    python sample.py reconstruct --run out/demo/tokenizer --images a.png b.png --out grid.png
    python sample.py text --run FOLDER --prompt "Why is the sky blue?" --chat llama3
    python sample.py perplexity --run out/demo/lvm --input pairs.jsonl
    python sample.py image --run FOLDER --prompt "a taco" --guidance 7.5 --steps 50 --sampler ddim --out taco.png
    python sample.py chat --run DREAM --image x.png --prompt "What is this?"
    python sample.py document --run DREAM --prompt "food & drink:" --out page

An LVM is prompted with nothing but pictures (Bai et al. 2023, section 5). A *sequential* prompt is frames,
and the model continues them; an *analogy* prompt is pairs x1, y1, …, xn, yn and a query x, and the model
answers with its y. Both are the same operation:

    pictures (N, side, side, 3) ─ VQGAN.encode ─▶ N·h·w tokens ─ LLaMA.generate ─▶ h·w more for each
    new picture, drawn from the image codes only ─ VQGAN.decode ─▶ pictures

Text is the same with another tokenizer: words instead of pictures, printed as they are drawn.

A DreamLLM (Dong et al. 2023, section 3) has pictures and texts in one sequence, and draws where it sees fit. Each
picture it looks at before it goes on; a document is then written as a page:

    [picture or text, …] ─ DreamLLM.stream_document ─▶ text, picture, text, … ─ save_page ─▶ page.md, page.html

Perplexity is exp(mean −log p) of what really came next: among how many equally likely tokens the model was in
doubt, on average. It needs no sampling.

--run takes a run of ours or a published folder; --tokenizer names the VQGAN, or for text the folder with the
tokenizer's files (default: the run's own).

Read before: train.py. This is the last file: from here, change something and train it.
"""

import argparse
import base64
import html
import itertools
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from clip import CLIP, text_encoders
from diffusion import SAMPLERS, LatentDiffusion, to_pil
from documents import chat_parts
from dreamllm import DreamLLM
from lvm import LVM, run_data
from model import LLaMA
from support import checkpoint, settings
from support.pictures import SUFFIXES, load_picture, resized, save_animation, save_grid
from support.settings import UserError
from support.sources import warn
from support.tokenizer import FILES, TEMPLATES, Tokenizer
from vqgan import VQGAN


def load_text(run, tokenizer="", device="cpu", dtype=None):
    """(LLaMA, Tokenizer) from a folder that holds both, or a run whose configuration names the latter."""
    data = run_data(run)
    if data.get("tokenizer") and not tokenizer:
        raise UserError(f"{run} is a run on pictures: use sample.py continue, or its perplexity of a .jsonl")
    folder = Path(run).parent if Path(run).is_file() else run
    own = any((checkpoint.weights_folder(folder) / name).exists() for name in FILES)
    tokenizer = Tokenizer.from_pretrained(tokenizer or (not own and data.get("text_tokenizer")) or folder)
    llama = LLaMA.from_pretrained(run, dtype=dtype, device=device)
    if tokenizer.vocab_size > llama.config.vocab_size:
        sizes = f"the tokenizer knows {tokenizer.vocab_size} tokens, the LLaMA only {llama.config.vocab_size}"
        raise UserError(f"{sizes}: they are no pair")
    return llama, tokenizer


def stream_text(llama, tokenizer, ids, max_new_tokens, **sampling):
    """Prompt [id, …] → yields the text that follows, until an end token or the end of the context."""
    device = llama.embed_tokens.weight.device
    prompt = torch.tensor([ids], dtype=torch.long, device=device)  # (1, T)
    count = min(max_new_tokens, llama.config.max_seq_len - len(ids))
    allowed = list(tokenizer.bytes_of)  # a model's vocabulary may be padded beyond its tokenizer's

    def drawn():
        for new in llama.stream(prompt, count, allowed=allowed, **sampling):  # (1, 1)
            if new.item() in tokenizer.stops:
                return
            yield new.item()

    yield from tokenizer.stream(drawn())


@torch.inference_mode()
def surprise(llama, tokens, given):
    """tokens (T,) → −log p of each from place `given` on, all before it being known: (T - given,), in nats."""
    hidden = llama.hidden(llama.embed_tokens(tokens[None, :-1]))[0, given - 1 :]  # (T - given, D)
    some = zip(hidden.split(512), tokens[given:].split(512), strict=True)  # (512, V) logits at a time are enough
    return torch.cat([F.cross_entropy(llama.logits(h).float(), t, reduction="none") for h, t in some])


def text_surprise(llama, tokens, window):
    """tokens (T,) of any length → −log p of all but the first: (T - 1,).

    The model reads `window` tokens at a time. The window slides by half of it, and only what is new in it
    counts: save at the start, every token is foreseen from half a window or more.
    """
    parts, known = [], 1
    while known < len(tokens):
        end = min(len(tokens), max(window + 1, known + max(1, window // 2)))
        start = max(0, end - window - 1)  # the last token of a window is foreseen only, never read
        parts.append(surprise(llama, tokens[start:end], known - start))
        known = end
    return torch.cat(parts)


def parse_size(text, picture, option="--resize"):
    """What --resize or --size says: "" → None, "original" → the size of the picture at this path, "W,H" → (W, H)."""
    if text == "original":
        return load_picture(picture).shape[1::-1]
    try:
        width, height = (int(n) for n in text.split(",")) if text else (None, None)
        if text and min(width, height) < 1:
            raise ValueError
    except ValueError:
        raise UserError(f'{option} "{text}" must be original or W,H, as in 128,128') from None
    return (width, height) if text else None


# ---- pages: texts and pictures ---------------------------------------------------------------

PAGE_FILE = r"page\.(md|html)|picture_\d+\.png"  # what a page's folder holds, and nothing else
STYLE = """
:root { color-scheme: light dark }
body { max-width: 40rem; margin: 2rem auto; padding: 0 1rem; font: 1.1rem/1.6 Georgia, serif }
p { white-space: pre-wrap; overflow-wrap: anywhere }
img { display: block; width: min(100%, 24rem); margin: 1.5rem auto }
"""


def save_page(pieces, folder, title):
    """Texts and Pillow pictures in reading order → a folder, which appears when all of it is written.

    In it page.md, the picture_01.png, … that it links to, and page.html, which needs no other file. What a model
    writes is text, never markup. A folder that is there is replaced if it is a page, else a UserError.
    """
    markdown, body, number = [], [], 0
    with checkpoint.atomic_folder(Path(folder).resolve(), PAGE_FILE) as beside:
        for piece in pieces:
            if isinstance(piece, str):
                markdown.append(as_markdown(plain(piece).strip()))
                body.append(f"<p>{html.escape(plain(piece).strip())}</p>")
            else:
                number += 1
                file = beside / picture_name(number)
                piece.save(file)
                data = base64.b64encode(file.read_bytes()).decode()
                markdown.append(f"![picture {number}]({file.name})")
                body.append(f'<img alt="picture {number}" src="data:image/png;base64,{data}">')
        head = [
            "<!doctype html>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',  # on a phone: as wide as it is
            f"<title>{html.escape(plain(title).strip())}</title>",
            f"<style>{STYLE}</style>",
        ]
        (beside / "page.md").write_text("\n\n".join(markdown) + "\n", encoding="utf-8")
        (beside / "page.html").write_text("\n".join([*head, *body]) + "\n", encoding="utf-8")


def plain(text):
    """A text without what no page and no terminal should be sent: a model of bytes may write any."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\ufffd", text.replace("\r\n", "\n"))


def as_markdown(text):
    """Markdown that shows the letters of `text`, line by line, whatever they mean to Markdown."""
    text = re.sub(r"[\\`*_~|<>\[\]#]|&(?=#?\w+;)", r"\\\g<0>", text)
    lines = [re.sub(r"^(\d*)([-+=.)])", r"\1\\\2", line.strip()) for line in text.splitlines()]  # no lists, no rules
    return "  \n".join(lines)  # two spaces: the line ends here


def picture_name(number):
    return f"picture_{number:02d}.png"


def tell(stream, place=None, answer=False):
    """Prints texts as they come, and of each picture what place(picture, number from 1) says of it.

    → [text or picture, …], neighbouring texts joined. An answer, and what follows a picture, is shown without the
    space that begins it.
    """
    pieces, number = [], 0
    for piece in stream:
        in_line = bool(pieces) and isinstance(pieces[-1], str)
        if not isinstance(piece, str):
            number += 1
            print("\n" * in_line + f"[{place(piece, number)}]", flush=True)
            pieces.append(piece)
            continue
        piece = piece.lstrip() if not in_line and (pieces or answer) else piece
        if in_line:
            pieces[-1] += piece
        elif piece:
            pieces.append(piece)
        print(plain(piece), end="", flush=True)
    if not pieces or isinstance(pieces[-1], str):
        print()
    return pieces


# ---- commands --------------------------------------------------------------------------------


def find_device(name):
    """The device of that name, if it is at hand; "": the best that is."""
    try:
        torch.zeros(1, device=name or "cpu").item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: not at hand ({str(error).splitlines()[0]})") from None
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def at_hand(a):
    """The device and the dtype that were asked for, else the best at hand."""
    device = find_device(a.device)
    dtype = a.dtype or ("bfloat16" if device.startswith("cuda") else None)  # None: as stored, left in the file
    return device, getattr(torch, dtype) if dtype not in (None, "int8") else dtype


def load(a, loader):
    """What loader(run, tokenizer, device, dtype) makes of what was asked for."""
    return loader(a.run, a.tokenizer, *at_hand(a))


def is_dream(run):
    """Whether a run or a published folder holds a DreamLLM."""
    file = checkpoint.weights_folder(run) / "config.json"
    config = checkpoint.read_json(file) if file.exists() else {}
    return isinstance(config, dict) and config.get("model_type") == "dreamllm"


def load_dream(a):
    device, dtype = at_hand(a)
    if not is_dream(a.run):
        raise UserError(f'{a.run}: no DreamLLM (no config.json with "model_type": "dreamllm")')
    return DreamLLM.from_pretrained(a.run, CLIP, LatentDiffusion, dtype, device, a.parts)


def sampling(a, llama, number=0):
    """The options of generate(); `number` tells the prompts of one run apart, so that each repeats by itself."""
    draws = torch.Generator(llama.embed_tokens.weight.device)
    draws.manual_seed(a.seed + number) if a.seed is not None else draws.seed()
    return {"temperature": a.temperature, "top_k": a.top_k, "top_p": a.top_p, "generator": draws}


def continue_(a):
    checkpoint.out_file(a.out, SUFFIXES)
    size = parse_size(a.resize, a.prompt[-1])
    lvm = load(a, LVM.from_pretrained)
    prompt = np.stack([load_picture(path, lvm.side) for path in a.prompt])  # (N, side, side, 3)
    drawn = lvm.continue_pictures(prompt, a.frames, a.candidates, **sampling(a, lvm.llama))
    rows = [resized([*prompt, *frames], size) for frames in drawn]
    if Path(a.out).suffix.lower() == ".gif":
        save_animation(rows[0], a.out)
    else:
        save_grid(rows, a.out)
    print(f"{a.out}: {len(prompt)} prompt pictures, then {a.frames} new ones; {a.candidates} candidates as rows")


def read_rows(path, key, kind):
    """JSONL of LVM's: each line {"input": [picture paths], key: a `kind`}. → [(line number, row)]."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {error}") from None

    def is_paths(value):
        return isinstance(value, list) and value and all(isinstance(p, str) for p in value)

    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            good = is_paths(row["input"]) and (isinstance(row[key], str) if kind == "path" else is_paths(row[key]))
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            raise UserError(f'{path}:{number}: expected {{"input": [picture paths], "{key}": {kind}}}')
        rows.append((number, row))
    return rows


def batch(a):
    rows = read_rows(a.input, "output", "path")
    lvm = load(a, LVM.from_pretrained)
    failed = 0
    for number, row in rows:
        try:
            checkpoint.out_file(row["output"], SUFFIXES)
            size = parse_size(a.resize, row["input"][-1])
            prompt = np.stack([load_picture(path, lvm.side) for path in row["input"]])
            drawn = lvm.continue_pictures(prompt, a.frames, a.candidates, **sampling(a, lvm.llama, number))
            save_grid([resized(frames, size) for frames in drawn], row["output"])
        except (UserError, OSError) as error:
            failed += 1
            warn(f"{a.input}:{number}: {error}")
    print(f"{len(rows) - failed} of {len(rows)} prompts done")
    if failed:
        raise UserError(f"{failed} of {len(rows)} prompts failed, named above")


@torch.inference_mode()
def reconstruct(a):
    checkpoint.out_file(a.out, SUFFIXES)
    device = find_device(a.device)
    tokenizer = VQGAN.from_pretrained(a.run, device=device, dtype=a.dtype and getattr(torch, a.dtype))
    pictures = np.stack([load_picture(path, tokenizer.config.resolution) for path in a.images])
    images = torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2) / 255  # (N, 3, side, side)
    codes = tokenizer.encode(images.to(next(tokenizer.parameters()).dtype))
    decoded = tokenizer.decode(codes).float()
    psnr = -10 * (decoded - images).pow(2).mean((1, 2, 3)).log10()
    save_grid([list(pictures), list((decoded * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())], a.out)
    for path, value in zip(a.images, psnr.tolist(), strict=True):
        print(f"{path}: {codes[0].numel()} codes, {value:.1f} dB")


def text(a):
    llama, tokenizer = load(a, load_text)
    if a.chat:
        system = [] if a.system is None else [{"role": "system", "content": a.system}]
        ids = tokenizer.encode_chat([*system, {"role": "user", "content": a.prompt}], a.chat)
    elif a.system is not None:
        raise UserError("--system needs --chat: only a chat template has a place for it")
    else:
        ids = tokenizer.encode(a.prompt, bos=True)
    if not ids:
        raise UserError("an empty prompt, and this tokenizer has no token that begins a text: give a --prompt")
    if len(ids) >= (context := llama.config.max_seq_len):
        raise UserError(f"the prompt's {len(ids)} tokens fill the model's context of {context}: give a shorter one")
    said = stream_text(llama, tokenizer, ids, a.max_new, **sampling(a, llama))
    tell(said if a.chat else itertools.chain([a.prompt], said), answer=bool(a.chat))


def perplexity(a):
    if Path(a.input).suffix == ".jsonl":
        picture_perplexity(a)
        return
    try:
        text = Path(a.input).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{a.input}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{a.input}: {error}") from None
    llama, tokenizer = load(a, load_text)
    tokens = torch.tensor(tokenizer.encode(text, bos=True), device=llama.embed_tokens.weight.device)
    if len(tokens) < 2:
        raise UserError(f"{a.input}: too short, nothing in it follows upon anything")
    window = min(a.window, llama.config.max_seq_len)
    losses = text_surprise(llama, tokens, window)
    # without a token that begins a text, its first one cannot be foreseen and does not count
    size = len(text.encode()) - (0 if tokenizer.bos is not None else len(tokenizer.bytes_of[tokens[0].item()]))
    bits = losses.sum().item() / math.log(2) / max(1, size)
    values = f"perplexity {losses.mean().exp():.4g} a token, {bits:.4f} bits a byte"
    print(f"{a.input}: {values} ({len(losses)} tokens, seen through a window of {window})")


def picture_perplexity(a):
    """LVM's protocol: exp(mean −log p of the target's codes) for each row, then the mean over rows."""
    rows = read_rows(a.input, "target", "[picture paths]")
    if not rows:
        raise UserError(f"{a.input}: no rows in it")
    lvm = load(a, LVM.from_pretrained)
    values = []
    for number, row in tqdm(rows, unit=" rows", mininterval=1):
        paths = [*row["input"], *row["target"]]
        if len(paths) > lvm.window:
            raise UserError(f"{a.input}:{number}: {len(paths)} pictures; the model's context holds {lvm.window}")
        codes = lvm.encode([load_picture(path, lvm.side) for path in paths])  # (N, h·w)
        losses = surprise(lvm.llama, codes.flatten(), len(row["input"]) * lvm.codes)
        values.append(losses.mean().exp().item())
    print(f"{a.input}: perplexity {np.mean(values):.4g} a code, the mean of {len(values)} rows")


def denoising(a):
    """The options that drawings from one text share, of latent diffusion and of DreamLLM."""
    names = ("negative", "guidance", "steps", "sampler", "seed", "rescale")
    return {name: getattr(a, name) for name in names} | {"progress": True}


def given_pictures(paths):
    return [Image.fromarray(load_picture(path)) for path in paths]


def diffusion_images(a):
    """What latent diffusion draws: (B, 3, H, W) in [0, 1]."""
    device = find_device(a.device)
    dtype = getattr(torch, a.dtype or ("bfloat16" if device.startswith("cuda") else "float32"))
    encoders = text_encoders(a.run, a.tokenizer or None, dtype, device)
    model = LatentDiffusion.from_pretrained(a.run, encoders, dtype, device, a.config or None)
    size, start = parse_size(a.size, a.image, "--size"), None
    if a.image:
        width, height = size or load_picture(a.image).shape[1::-1]
        (picture,) = resized([load_picture(a.image)], (width, height))
        start = torch.from_numpy(picture.copy())[None].permute(0, 3, 1, 2) / 255  # (1, 3, H, W)
    return model.generate(
        [a.prompt] * a.count,
        size=size and size[::-1],
        image=start,
        strength=a.strength or 0.8,
        **denoising(a),
    )


def image(a):
    checkpoint.out_file(a.out, SUFFIXES)
    dream = is_dream(a.run)
    # without a place there: img2img, sizes, and what single files may need; or the pictures that a LLaMA looks at
    for name in ("image", "strength", "size", "config", "tokenizer") if dream else ("subject", "parts"):
        if getattr(a, name):
            raise UserError(f"--{name} does not apply: {a.run} is {'a' if dream else 'no'} DreamLLM")
    a.sampler = a.sampler or ("ddpm" if dream else "ddim")
    if dream:
        prompt = [*given_pictures(a.subject), a.prompt]
        images = load_dream(a).text_to_image([prompt] * a.count, **denoising(a))
    else:
        images = diffusion_images(a)
    save_grid([[np.asarray(picture) for picture in to_pil(images)]], a.out, pad=0 if a.count == 1 else 2)
    print(f"{a.out}: {a.count} × {images.shape[3]}×{images.shape[2]}, {a.steps} steps of {a.sampler}")


def question(a, pictures):
    """--prompt and pictures in the template of a conversation, as chat_parts has them."""
    data = run_data(a.run)
    content = a.prompt if "<image>" in a.prompt else "<image>\n" * len(pictures) + a.prompt
    system = data.get("system") if a.system is None else a.system
    template = a.template or data.get("template", "vicuna")
    try:
        return chat_parts([{"role": "user", "content": content}], pictures, template, system)
    except ValueError as error:
        raise UserError(f"--prompt: {error}") from None


def stream_document(a, prompt, max_pictures):
    names = ("temperature", "top_k", "top_p", "guidance", "steps", "seed")
    options = {name: getattr(a, name) for name in names} | {"sampler": a.sampler or "ddpm", "progress": True}
    return load_dream(a).stream_document(prompt, a.max_new, max_pictures, **options)


def chat(a):
    checkpoint.out_file(a.out, SUFFIXES)  # before all the work
    pictures = given_pictures(a.image)
    if a.prompt:
        said = stream_document(a, question(a, pictures), a.max_pictures)
    elif pictures:
        said = stream_document(a, pictures, max_pictures=0)  # as captions are learned
    else:
        raise UserError("nothing to talk about: give a --prompt, or an --image to be described, or both")

    def save(picture, number):
        name, ending = os.path.splitext(a.out)
        path = f"{name}_{number:02d}{ending}"
        save_grid([[np.asarray(picture)]], path, pad=0)
        return path

    tell(said, save, answer=True)


def document(a):
    checkpoint.out_folder(a.out, PAGE_FILE)  # before all the work
    pictures = given_pictures(a.image)
    if a.system is not None and not a.template:
        raise UserError("--system needs --template: only a conversation has a place for it")
    prompt = question(a, pictures) if a.template else [*pictures, a.prompt]
    given = [] if a.template else [*pictures, a.prompt]  # the page is the answer, or begins with the prompt
    said = stream_document(a, prompt, a.max_pictures)
    pieces = tell(itertools.chain(given, said), lambda _, number: picture_name(number), answer=bool(a.template))
    save_page(pieces, a.out, title=a.prompt or Path(a.out).name)
    drawn = sum(not isinstance(piece, str) for piece in pieces) - sum(not isinstance(piece, str) for piece in given)
    print(f"{a.out}: page.html, page.md; pictures drawn: {drawn}")


FLOATS = ("float32", "bfloat16", "float16")
PARTS = "where the configurations of a published DreamLLM's CLIP and Stable Diffusion are, if not in or beside it"


def main():
    parser = settings.Parser(prog="python sample.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run, help, example, precisions=(*FLOATS, "int8")):
        c = commands.add_parser(name, help=help, description=help, epilog=f"example:\n  {example}")
        c.set_defaults(run_command=run)
        c.add_argument("--run", required=True, help="a run of ours or a published checkpoint's folder")
        c.add_argument("--device", help="cpu or cuda; default: the best at hand")
        c.add_argument("--dtype", choices=precisions, help="of the weights; default: bfloat16 on a GPU, else as stored")
        return c

    def prompted(c, candidates):
        c.add_argument("--tokenizer", default="", help="the VQGAN; default: the run's data.tokenizer")
        c.add_argument("--frames", type=positive, default=1, help="pictures to add (1)")
        c.add_argument("--candidates", type=positive, default=candidates, help=f"independent samples ({candidates})")
        c.add_argument("--resize", default="", help="of the output: original (as the last input) or W,H")
        drawn(c)

    def repeatable(c):
        c.add_argument("--seed", type=seed, help="makes the result repeatable")

    def drawn(c):
        c.add_argument("--temperature", type=temperature, default=1.0, help="0: always the likeliest token (1)")
        c.add_argument("--top-k", type=positive)
        c.add_argument("--top-p", type=share)
        repeatable(c)

    def denoised(c):
        c.add_argument("--guidance", type=float, default=7.5, help="how far the prompt is followed; 1: as it is (7.5)")
        c.add_argument("--steps", type=positive, default=50, help="passes of the U-Net for a picture (50)")
        c.add_argument("--sampler", choices=SAMPLERS, help="default: ddpm for a DreamLLM, ddim for all else")

    def assembled(c):
        c.add_argument("--parts", nargs="+", default=[], metavar="FOLDER", help=PARTS)

    def interleaved(c, template):
        assembled(c)
        c.add_argument("--image", nargs="+", default=[], metavar="PICTURE", help="shown before the prompt")
        c.add_argument("--template", choices=TEMPLATES, help=template)
        c.add_argument("--system", help="what the chat's system message says (the run's or the template's own)")
        c.add_argument("--max-new", type=positive, default=256, help="most tokens to write (256, or the context's end)")
        c.add_argument("--max-pictures", type=count, default=4, help="most pictures to draw (4)")
        drawn(c)
        denoised(c)

    c = command(
        "continue",
        continue_,
        "continue a sequence of pictures, or answer an analogy",
        "python sample.py continue --run out/demo/lvm --prompt grey1.png colour1.png grey2.png --out grid.png",
    )
    c.add_argument("--prompt", nargs="+", required=True, metavar="PICTURE")
    c.add_argument("--out", default="grid.png", help="a grid, candidates as rows; or .gif, the first one animated")
    prompted(c, candidates=1)

    c = command(
        "batch",
        batch,
        'continue many prompts: one {"input": [pictures], "output": path} a line',
        "python sample.py batch --run out/demo/lvm --input prompts.jsonl --seed 0",
    )
    c.add_argument("--input", required=True, metavar="JSONL")
    prompted(c, candidates=4)

    c = command(
        "reconstruct",
        reconstruct,
        "pictures to codes and back, originals above reconstructions",
        "python sample.py reconstruct --run out/demo/tokenizer --images a.png b.png --out grid.png",
        precisions=FLOATS,
    )
    c.add_argument("--images", nargs="+", required=True, metavar="PICTURE")
    c.add_argument("--out", default="grid.png")

    c = command(
        "text",
        text,
        "continue a text, or answer in a chat; printed as it is drawn",
        'python sample.py text --run out/tiny_text --prompt "woman "',
    )
    c.add_argument("--prompt", default="", help="a text to continue, or the question (empty)")
    c.add_argument("--chat", choices=TEMPLATES, help="the form of conversation that the model was tuned on")
    c.add_argument("--system", help="what the chat's system message says (the template's own)")
    c.add_argument("--max-new", type=positive, default=256, help="most tokens to draw (256, or what the context holds)")
    c.add_argument("--tokenizer", default="", help="folder of the tokenizer's files; default: the run's own")
    drawn(c)

    c = command(
        "image",
        image,
        "draw pictures of a text: latent diffusion (Stable Diffusion 1, 2, XL, or a run of ours) or DreamLLM",
        'python sample.py image --run out/emoji/unet --prompt "pizza" --out pizza.png',
        precisions=FLOATS,
    )
    c.add_argument("--prompt", required=True)
    c.add_argument("--negative", help="what to move away from (the empty text)")
    c.add_argument("--rescale", type=float, default=0.0, help="against too strong contrasts (0; published 0.7)")
    denoised(c)
    repeatable(c)
    c.add_argument("--count", type=positive, default=1, help="pictures, side by side (1)")
    c.add_argument("--out", default="image.png")
    c.add_argument("--subject", nargs="+", default=[], metavar="PICTURE", help="DreamLLM: shown before the prompt")
    assembled(c)
    c = c.add_argument_group("not for DreamLLM")
    c.add_argument("--size", default="", help="W,H in pixels; default: what the model was trained for")
    c.add_argument("--image", default="", help="start from this picture instead of from noise")
    c.add_argument("--strength", type=share, help="how much of it may change: 1, all (0.8)")
    c.add_argument("--config", default="", help="of a single file that needs one: the YAML or JSON of its code base")
    c.add_argument("--tokenizer", default="", help="of a single file: a folder with CLIP's vocabulary")

    c = command(
        "chat",
        chat,
        "ask a DreamLLM about pictures, or for some; without a prompt it describes what it is shown",
        'python sample.py chat --run out/emoji/dream/instruct --image x.png --prompt "What is this?"',
        precisions=FLOATS,
    )
    c.add_argument("--prompt", default="", help="the question; <image> in it: where a picture stands (before it)")
    interleaved(c, "the form of conversation that the model was tuned on (the run's own, else vicuna)")
    c.add_argument("--out", default="chat.png", help="where pictures go that the answer holds, numbered (chat.png)")

    c = command(
        "document",
        document,
        "a DreamLLM writes and draws a page: Markdown, its pictures, and one HTML file that holds all",
        'python sample.py document --run out/emoji/dream/interleaved --prompt "food & drink:" --out page',
        precisions=FLOATS,
    )
    c.add_argument("--prompt", default="", help="how the page begins (empty)")
    interleaved(c, "the prompt is an instruction in this form of conversation, not the page's beginning")
    c.add_argument("--out", default="page", metavar="FOLDER", help="an earlier page in it is replaced (page)")

    c = command(
        "perplexity",
        perplexity,
        "how well a model foresees pictures, or a text",
        "python sample.py perplexity --run out/demo/lvm --input pairs.jsonl",
    )
    c.add_argument(
        "--input",
        required=True,
        metavar="FILE",
        help='a text; or .jsonl of {"input": [pictures], "target": [pictures]} lines',
    )
    c.add_argument("--tokenizer", default="", help="of the pictures or the text; default: the run's own")
    c.add_argument("--window", type=positive, default=4096, help="tokens of a text read at once (4096, or the context)")

    arguments = parser.parse_args()
    arguments.run_command(arguments)


def number(kind, low, high, what):
    """What argparse calls to read a number of `kind` in [low, high]."""

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return read


positive = number(int, 1, 2**31, "a whole number above 0")
count = number(int, 0, 2**31, "a whole number from 0 on")
seed = number(int, 0, 2**63 - 1, "a whole number from 0 on")
share = number(float, 1e-9, 1, "a number above 0 and at most 1")
temperature = number(float, 0, 1e9, "a number from 0 on")


if __name__ == "__main__":
    settings.run_main(main)
