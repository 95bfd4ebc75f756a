"""Pictures and texts → rows, vocabularies; show; check."""

import collections
import hashlib
import itertools
import os
import re
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import KINDS, DataSettings, _open_sentences, count_sentences, decode_row, encode_row, prefetch
from support import settings
from support.checkpoint import atomic_file, out_file, out_folder
from support.pictures import SUFFIXES, save_grid
from support.rows import FilePairs, json_rows, open_picture, read_row
from support.settings import UserError
from support.sources import SPLITS, open_source, read_texts
from support.tokenizer import Tokenizer, train_bpe, write_merges
from vqgan import VQGAN

# ---- (from data) ----


def tokenize(arguments):
    """Sentences → rows of codes, one JSON line each."""
    out_file(arguments.out)
    data, seed = _read_config(arguments)
    shard, shards = _shard(arguments.shard)
    if any(source.kind == "text" for source in data.sources):
        return tokenize_text(arguments, data, shard, shards)
    import torch

    sentences = _open_sentences(data, seed, arguments.split)
    model, device = _load_tokenizer(arguments.tokenizer or data.tokenizer, arguments.device)
    counts = [count_sentences(s, source) for s, source in zip(sentences, data.sources, strict=True)]
    starts = np.cumsum([0, *counts])  # sentence i of all is sentence i - starts[which] of source `which`
    numbers = range(shard, int(starts[-1]), shards)

    def make(number):
        which = int(np.searchsorted(starts, number, side="right")) - 1
        pictures = [recipe() for recipe in sentences[which].sentence(number - int(starts[which]))]
        return [(hashlib.blake2b(p.tobytes(), digest_size=16).digest(), p) for p in pictures]

    @torch.inference_mode()
    def encode(pictures):
        # always a full batch, so that a picture's codes cannot depend on how many came with it
        filled = [pictures[i % len(pictures)] for i in range(arguments.batch)]
        images = torch.from_numpy(np.stack(filled)).to(device).permute(0, 3, 1, 2)  # (B, 3, H, W)
        return model.encode(images.float() / 255).flatten(1)[: len(pictures)].cpu().numpy()  # (n, h·w), row-major

    # Pictures come back in many sentences: codes are kept. In one table, because small arrays that stay, among
    # large ones that go, keep the memory of both.
    known, table = {}, np.empty((100_000, np.prod(model.grid(data.side))), np.int32)  # a picture's digest → its row
    tokens = pictures = 0
    began = time.time()
    made = prefetch(make, numbers, data.workers)
    made = iter(tqdm(made, total=len(numbers), desc="tokenize", unit=" sentences", mininterval=1))
    with atomic_file(arguments.out) as beside, open(beside, "w", newline="\n") as file:
        while group := list(itertools.islice(made, 16)):  # 16 sentences at a time: enough to fill batches
            if len(known) + sum(map(len, group)) > len(table):  # enough for a small set; a large one starts anew
                known.clear()
            fresh = {digest: picture for row in group for digest, picture in row if digest not in known}
            digests = list(fresh)
            for i in range(0, len(digests), arguments.batch):
                some = digests[i : i + arguments.batch]
                rows = range(len(known), len(known) + len(some))
                table[rows] = encode([fresh[digest] for digest in some])
                known.update(zip(some, rows, strict=True))
            for row in group:
                codes = table[[known[digest] for digest, _ in row]].ravel()
                file.write(encode_row(codes))
                tokens, pictures = tokens + len(codes), pictures + len(row)
    rate = pictures / max(time.time() - began, 1e-9)
    skipped = sum({id(s.source): s.source.skipped for s in sentences}.values())
    print(f"{arguments.out}: {len(numbers)} rows, {tokens} tokens, {rate:.1f} pictures/s, {skipped} skipped")


def tokenize_text(arguments, data, shard, shards):
    """Documents → rows of ids: what begins a text (if its tokenizer has such an id), the text, what ends it."""
    if any(source.kind != "text" for source in data.sources):
        raise UserError("[[data.sources]] mixes text and pictures: make a rows file of each, in runs of their own")
    path = arguments.tokenizer or data.text_tokenizer
    if not path:
        raise UserError('no tokenizer for text: set data.text_tokenizer to "bytes", or to a folder that has one')
    tokenizer = Tokenizer.from_pretrained(path)
    texts = (t for s in data.sources for t in read_texts(s.path, arguments.split, data.held_out_fraction))
    rows = tokens = 0
    with atomic_file(arguments.out) as beside, open(beside, "w", newline="\n") as file:
        for text in tqdm(itertools.islice(texts, shard, None, shards), desc="tokenize", unit=" texts", mininterval=1):
            ids = tokenizer.encode(text, bos=True, eos=True)
            file.write(encode_row(ids))
            rows, tokens = rows + 1, tokens + len(ids)
        if not rows:
            raise UserError(f"none of the texts falls into the {arguments.split} split: change data.held_out_fraction")
    print(f"{arguments.out}: {rows} rows, {tokens} tokens")


def vocabulary(arguments):
    """Texts → a vocabulary of their commonest pieces, as a tokenizer's files."""
    out = out_folder(arguments.out, r"tokenizer(_config)?\.json")
    data, _ = _read_config(arguments)
    model = settings.read(arguments.config, arguments.overrides).get("model", {})
    if "vocab_size" not in model:
        raise UserError("how many tokens? set model.vocab_size")
    size = settings.convert(int, model["vocab_size"], "model.vocab_size")
    if any(source.kind != "text" for source in data.sources) or not data.sources:
        raise UserError("a vocabulary is made of texts: set the kind of all [[data.sources]] to text")
    if size < 258:
        raise UserError(f"model.vocab_size {size}: 256 bytes, what begins and what ends a text need 258")
    texts = [t for s in data.sources for t in read_texts(s.path, "train", data.held_out_fraction)]
    if not texts:
        raise UserError("none of the texts falls into the train split: change data.held_out_fraction")
    merges = train_bpe(texts, size - 258)
    if (found := len(merges) + 258) < size:
        raise UserError(f"these texts give {found} tokens at most: set model.vocab_size = {found}, or add texts")
    write_merges(out, merges)
    longest = max((first + second for first, second in merges), key=len, default=b"").decode(errors="replace")
    print(f'{out}: {size} tokens; the longest is "{longest}"')


def show(arguments):
    """Rows of codes → a sheet of pictures, one sentence a row, evenly spaced through the file."""
    import torch

    out_file(arguments.out, SUFFIXES)
    data = _read_config(arguments)[0] if arguments.config else None
    model, device = _load_tokenizer(arguments.tokenizer or (data and data.tokenizer), arguments.device)
    side = arguments.side or (data.side if data else model.config.resolution)
    height, width = model.grid(side)
    try:
        with open(arguments.rows_file, "rb") as file:
            total = sum(1 for _ in file)
            chosen = {i * total // arguments.rows for i in range(arguments.rows)}
            file.seek(0)
            lines = [(number, line) for number, line in enumerate(file, 1) if number - 1 in chosen]
    except OSError as error:
        raise UserError(f"{arguments.rows_file}: {error.strerror}") from None
    if not lines:
        raise UserError(f"{arguments.rows_file}: no rows in it")
    sheet = []
    for number, line in lines:
        try:
            codes = decode_row(line, model.config.num_embeddings)
            if len(codes) % (height * width):
                raise ValueError(f"{len(codes)} codes do not make pictures of {height}×{width}; set --side")
        except ValueError as error:
            raise UserError(f"{arguments.rows_file}:{number}: {error}") from None
        grids = torch.from_numpy(codes).long().view(-1, height, width)  # (pictures, h, w)
        with torch.inference_mode():
            images = torch.cat([model.decode(some.to(device)).cpu() for some in grids.split(16)])
        sheet.append(list((images * 255).round().byte().permute(0, 2, 3, 1).numpy()))  # (pictures, H, W, 3)
    save_grid(sheet, arguments.out)
    print(f"{arguments.out}: {len(sheet)} of {total} rows")


def check(arguments):
    """What DreamLLM could not read of a file, line by line."""
    counts, wrong = check_rows(arguments.file, arguments.images)
    for line in wrong[:20]:
        print(line)
    if len(wrong) > 20:
        print(f"… and {len(wrong) - 20} more")
    if wrong:
        raise UserError(counts)
    print(counts)


def _read_config(arguments):
    """(DataSettings, seed) of the configuration; its other sections belong to other programs."""
    values = settings.read(arguments.config, arguments.overrides)
    data = settings.build(DataSettings, values.get("data", {}), "data")
    return data, settings.convert(int, values.get("train", {}).get("seed", 0), "train.seed")


def _load_tokenizer(path, device):
    import torch

    if not path:
        raise UserError("no tokenizer: set data.tokenizer or give --tokenizer (a VQGAN's folder)")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return VQGAN.from_pretrained(path, dtype=torch.float32, device=device).eval(), device


def _shard(text):
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise UserError(f"--shard {text}: written i/n with i from 0 to n-1, as in 0/4")
    return int(match[1]), int(match[2])


def main():
    kinds = "\n".join(f"  {kind:14} {text}" for kind, text in KINDS.items())
    parser = settings.Parser(
        prog="python prepare.py",
        description="Pictures to visual sentences, rows of codes, and back; texts to rows of ids.",
        epilog=f"kinds of visual sentences (N = data.pictures):\n{kinds}",
    )
    commands = parser.add_subparsers(required=True, metavar="tokenize | vocabulary | show | check")
    encoding = commands.add_parser(
        "tokenize",
        help="pictures → visual sentences → rows.jsonl (or texts → rows.jsonl)",
        description="Encode the visual sentences (or texts) of a configuration's [data] section, one JSON row each.",
        epilog="example: python prepare.py tokenize --config configs/lvm.toml --out rows-0.jsonl --shard 0/4",
    )
    encoding.add_argument("--config", required=True, help="a TOML file with [data] and [[data.sources]]")
    encoding.add_argument("--out", required=True, help="the rows file to write")
    encoding.add_argument("--split", default="train", choices=SPLITS, help="which pictures (default: train)")
    encoding.add_argument("--shard", default="0/1", help="i/n: every n-th sentence from i on")
    encoding.add_argument("--batch", type=int, default=16, help="pictures encoded at once (default: 16)")
    encoding.set_defaults(run=tokenize)
    spelling = commands.add_parser(
        "vocabulary",
        help="texts → a tokenizer of their own",
        description="Find the commonest pieces of a configuration's texts (byte-pair encoding of their train split), "
        "model.vocab_size in all, and write them as tokenizer.json: a folder for data.text_tokenizer.",
        epilog="example: python prepare.py vocabulary --config configs/emoji_llama.toml --out out/emoji/vocabulary",
    )
    spelling.add_argument("--config", required=True, help="a TOML file with [[data.sources]] of kind text")
    spelling.add_argument("--out", required=True, help="the folder to write")
    spelling.set_defaults(run=vocabulary)
    showing = commands.add_parser(
        "show",
        help="rows.jsonl → a picture of its sentences",
        description="Decode rows, evenly spaced through the file, to a sheet: one sentence a row.",
        epilog="example: python prepare.py show rows.jsonl --tokenizer out/vqgan --out grid.png",
    )
    showing.add_argument("rows_file", metavar="rows.jsonl")
    showing.add_argument("--out", required=True, help="the picture to write")
    showing.add_argument("--config", help="where data.tokenizer and data.side are read")
    showing.add_argument("--rows", type=int, default=8, help="how many rows (default: 8)")
    showing.add_argument("--side", type=int, help="of a picture (default: data.side, or the tokenizer's)")
    showing.set_defaults(run=show)
    checking = commands.add_parser(
        "check",
        help="name every row of a DreamLLM's data that cannot be used",
        description="Check captioned pictures (a folder, a .tar, or JSONL), MMC4, OBELICS or LLaVA rows: every row is "
        "read, every picture opened. Exit code 2 if any is bad.",
        epilog="example: python prepare.py check llava.json --images coco",
    )
    checking.add_argument("file", metavar="FILE", help="rows in .jsonl or .json, a .tar, or a folder")
    checking.add_argument("--images", help="the folder of the pictures that rows name (default: the file's own)")
    checking.set_defaults(run=check)
    for command, what in ((encoding, "the VQGAN's folder, or a text tokenizer's"), (showing, "the VQGAN's folder")):
        command.add_argument("--tokenizer", help=f"{what} (default: the configuration's)")
        command.add_argument("--device", help="default: cuda where there is one")
    arguments = parser.parse_with_overrides()
    if min(getattr(arguments, "batch", 1), getattr(arguments, "rows", 1)) < 1:
        raise UserError("--batch and --rows must be at least 1")
    arguments.run(arguments)


# ---- (from documents) ----


def check_rows(path, images=None):
    """All that is wrong with a file of rows, a .tar or a folder: (one line of counts, [what is wrong where, …]).

    Every row is read, and every picture that it names is opened, under the folder `images` (default: the
    file's own). What is broken in a way that training would skip is listed; nothing is raised but for a file
    that cannot be opened, or has nothing in it.
    """
    if os.path.isdir(path) or path.endswith(".tar"):
        return _check_pictures(path)
    folder = Path(images) if images else Path(path).parent
    wrong, forms, rows, bad = [], collections.Counter(), 0, 0
    seen = {}  # picture → what is wrong with it
    for line, _, raw in json_rows(path):
        rows += 1
        try:
            form, said = read_row(raw)
            forms[form] += 1
            if form != (first := next(iter(forms))):
                raise ValueError(f"a row of {form} among those of {first}")
            for name in said.pictures:
                if name not in seen:
                    seen[name] = what_is_wrong(folder, name)
                if seen[name]:
                    raise ValueError(seen[name])
        except ValueError as error:
            bad += 1
            wrong.append(f"{path}:{line}: {error}")
    if not rows:
        raise UserError(f"{path}: no rows in it")
    form = next(iter(forms), "unknown format")
    return f"{path}: {form}, {rows} rows, {sum(not s for s in seen.values())} pictures, {bad} bad", wrong


def what_is_wrong(folder, name):
    try:
        open_picture(folder, name)
    except (UserError, ValueError) as error:
        return str(error)


def _check_pictures(path):
    wrong = []
    report = lambda text: wrong.append(text.removeprefix("skipped "))  # noqa: E731
    pairs = FilePairs(open_source(path, None, "train", 0, report))
    for index in range(len(pairs)):
        try:
            pairs.open(pairs.read(index, None).picture)
        except (UserError, ValueError) as error:
            reason = str(error)
            wrong.append(reason if reason.startswith(pairs.path) else f"{pairs.where(index)}: {reason}")
    form = "folder" if os.path.isdir(path) else "WebDataset"
    return f"{path}: {form}, {len(pairs)} captioned pictures, {len(wrong)} bad", wrong


if __name__ == "__main__":
    settings.run_main(main)
