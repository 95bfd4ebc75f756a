"""Prepare: pictures and texts → rows of tokens, vocabularies; and looks at what was prepared.

    [[data.sources]] ──▶ Sentences ──▶ VQGAN.encode ────▶ rows.jsonl     tokenize: a sentence a row
    [[data.sources]] ──▶ read_texts ─▶ Tokenizer.encode ▶ rows.jsonl     tokenize: a text a row
    [[data.sources]] ──▶ read_texts ─▶ train_bpe ───────▶ tokenizer.json vocabulary
    rows.jsonl ────────▶ VQGAN.decode ──────────────────▶ grid.png       show
    [[data.sources]] ──▶ Sentences ─────────────────────▶ grid.png       show, without rows
    rows, folder, tar ─▶ every row, every picture ──────▶ what is used, and what not   check

    python prepare.py tokenize --config configs/X.toml --out rows.jsonl [--split held_out] [--shard i/n]
    python prepare.py vocabulary --config configs/X.toml --out FOLDER
    python prepare.py show [rows.jsonl] --config configs/X.toml --out grid.png
    python prepare.py check FOLDER | 'shards/*.tar' | rows.jsonl [--images FOLDER]

Beside rows.jsonl, tokenize writes rows.jsonl.info.json: what the rows were made with
(support/token_rows.py).
"""

import argparse
import hashlib
import inspect
import itertools
import os
import re
import time

import numpy as np
import torch
from tqdm import tqdm

from data import KINDS, DataSettings, open_sentences
from support import settings
from support.check import print_findings
from support.checkpoint import out_file, out_folder
from support.options import moderate_int
from support.pictures import SUFFIXES, save_grid, to_float, to_uint8
from support.settings import UserError
from support.sources import SPLITS, read_texts
from support.threads import prefetch
from support.token_rows import INFO, RowsInfo, decode_row, dtype_of, encode_row, new_rows
from support.tokenizer import Tokenizer, train_bpe, write_merges
from vqgan import VQGAN

# ---- tokenize: pictures ------------------------------------------------------------------------


def tokenize(args):
    """Encode the visual sentences (or the texts) of [[data.sources]], one JSON row each."""
    for path in (args.out, f"{args.out}{INFO}"):
        out_file(path, inputs=[args.config])
    data, seed = read_config(args)
    if "text" in kinds(data):
        return tokenize_texts(args, data)
    sentences = open_sentences(data, seed, args.split)
    path = args.tokenizer or data.tokenizer
    model, device = load_tokenizer(path, args.device)
    shard, shards = args.shard
    numbers = range(shard, count(sentences), shards)
    if not numbers:
        raise UserError(f"--shard {shard}/{shards}: no sentence is left for it; make fewer shards")
    cache = CodeCache(model, device, args.batch, data.side)
    tokens = pictures = 0
    began = time.time()
    made = prefetch(lambda number: with_digests(sentence(sentences, number)), numbers, data.workers)
    made = iter(tqdm(made, total=len(numbers), desc="tokenize", unit=" sentences", mininterval=1))
    with new_rows(args.out, RowsInfo.of_pictures(path, model, data.side)) as file:
        while group := list(itertools.islice(made, 16)):  # sentences: enough to fill batches
            codes = cache.codes(list(itertools.chain.from_iterable(group)))  # (pictures, h·w)
            tokens, pictures = tokens + codes.size, pictures + len(codes)
            start = 0
            for row in group:
                file.write(encode_row(codes[start : start + len(row)].ravel()))
                start += len(row)
    rate = pictures / max(time.time() - began, 1e-9)
    sources = {s.source for s in sentences}
    skipped = sum(source.skipped for source in sources)
    print(f"{args.out}: {len(numbers)} rows, {tokens} tokens, {rate:.1f} pictures/s, {skipped} skipped")


def count(sentences):
    """How many sentences all sources have together."""
    return sum(some.count for some in sentences)


def sentence(sentences, number):
    """The pictures of sentence `number`, counted through the Sentences of all sources."""
    for some in sentences:
        if number < some.count:
            return some.sentence(number)
        number -= some.count


def with_digests(pictures):
    """[(digest, picture), …]: equal pictures have equal digests."""
    return [(hashlib.blake2b(p.tobytes(), digest_size=16).digest(), p) for p in pictures]


class CodeCache:
    """A VQGAN's codes of pictures, which come back in many sentences: each is encoded once.

    rows     {a picture's digest: its row in the table}
    table    (100,000, h·w) int32, made in one piece: many small arrays would fragment the heap
    """

    def __init__(self, model, device, batch, side):
        self.model, self.device, self.batch = model, device, batch
        self.rows = {}
        self.table = np.empty((100_000, np.prod(model.grid(side))), np.int32)

    def codes(self, pictures):
        """[(digest, (side, side, 3) uint8), …] → (pictures, h·w) int32, row-major."""
        self._make_room(len(pictures))
        fresh = {digest: picture for digest, picture in pictures if digest not in self.rows}
        digests = list(fresh)
        for i in range(0, len(digests), self.batch):
            some = digests[i : i + self.batch]
            rows = range(len(self.rows), len(self.rows) + len(some))
            self.table[rows] = self._encode([fresh[digest] for digest in some])
            self.rows.update(zip(some, rows, strict=True))
        return self.table[[self.rows[digest] for digest, _ in pictures]]

    def _make_room(self, count):
        if len(self.rows) + count > len(self.table):
            self.rows.clear()  # full: forget all (a small data set never gets here)
        if count > len(self.table):
            self.table = np.empty((count, self.table.shape[1]), np.int32)

    @torch.inference_mode()
    def _encode(self, pictures):
        # always a full batch, so that a picture's codes cannot depend on how many came with it
        filled = [pictures[i % len(pictures)] for i in range(self.batch)]
        codes = self.model.encode(to_float(np.stack(filled), self.device))  # (batch, h, w)
        return codes.flatten(1)[: len(pictures)].cpu().numpy()


# ---- tokenize: texts; vocabulary -----------------------------------------------------------------


def tokenize_texts(args, data):
    """Texts as rows of ids: the id that begins a text (if there is one), the text, the end's."""
    if kinds(data) != {"text"}:
        raise UserError("[[data.sources]] mixes text and pictures: make a rows file of each, in runs of their own")
    path = args.tokenizer or data.text_tokenizer
    if not path:
        raise UserError('no tokenizer for text: set data.text_tokenizer to "bytes", or to a folder that has one')
    tokenizer = Tokenizer.from_pretrained(path)
    shard, shards = args.shard
    texts = itertools.islice(all_texts(data, args.split), shard, None, shards)
    rows = tokens = 0
    with new_rows(args.out, RowsInfo.of_text(path, tokenizer)) as file:
        for text in tqdm(texts, desc="tokenize", unit=" texts", mininterval=1):
            ids = tokenizer.encode(text, bos=True, eos=True)
            file.write(encode_row(ids))
            rows, tokens = rows + 1, tokens + len(ids)
        if not rows:
            raise UserError(f"none of the texts falls into the {args.split} split: change data.held_out_fraction")
    print(f"{args.out}: {rows} rows, {tokens} tokens")


def kinds(data):
    return {source.kind for source in data.sources}


def all_texts(data, split):
    for source in data.sources:
        yield from read_texts(source.path, split, data.held_out_fraction)


def vocabulary(args):
    """Find the commonest pieces of the texts of [[data.sources]]; write them as a tokenizer's files.

    Byte-pair encoding of their train split, model.vocab_size tokens in all: a folder for
    data.text_tokenizer.
    """
    out = out_folder(args.out, r"tokenizer(_config)?\.json")
    data, _ = read_config(args)
    model = settings.read(args.config, args.overrides).get("model", {})
    if "vocab_size" not in model:
        raise UserError("how many tokens? set model.vocab_size")
    size = settings.convert(int, model["vocab_size"], "model.vocab_size")
    if kinds(data) != {"text"}:
        raise UserError("a vocabulary is made of texts: set the kind of all [[data.sources]] to text")
    if size < 258:
        raise UserError(f"model.vocab_size {size}: 256 bytes, what begins and what ends a text need 258")
    texts = list(all_texts(data, "train"))
    if not texts:
        raise UserError("none of the texts falls into the train split: change data.held_out_fraction")
    merges = train_bpe(texts, size - 258)
    if (found := len(merges) + 258) < size:
        raise UserError(f"these texts give {found} tokens at most: set model.vocab_size = {found}, or add texts")
    write_merges(out, merges)
    longest = max((first + second for first, second in merges), key=len, default=b"").decode(errors="replace")
    print(f'{out}: {size} tokens; the longest is "{longest}"')


# ---- show --------------------------------------------------------------------------------------


def show(args):
    """Draw a sheet of pictures, one sentence a row, evenly spaced.

    Of a rows file, which is decoded; without one, of the visual sentences of [[data.sources]], as
    tokenize would encode them.
    """
    out_file(args.out, SUFFIXES)
    if args.rows_file and "=" in args.rows_file and not os.path.exists(args.rows_file):
        args.overrides.insert(0, args.rows_file)  # argparse takes the first override for the rows
        args.rows_file = None
    data, seed = read_config(args) if args.config else (None, 0)
    if args.rows_file:
        sheet, total = decoded_rows(args, data)
    elif data:
        sentences = open_sentences(data, seed)
        total = count(sentences)
        sheet = [sentence(sentences, number) for number in evenly(total, args.rows)]
    else:
        raise UserError("nothing to show: name a rows file, or a --config with [[data.sources]]")
    save_grid(sheet, args.out)
    print(f"{args.out}: {len(sheet)} of {total} rows")


def evenly(total, count):
    """At most `count` different numbers below `total`, evenly spaced, ascending."""
    return [i * total // count for i in range(count)] if count < total else list(range(total))


def decoded_rows(args, data):
    """→ ([the pictures of a row, …], how many rows there are)."""
    info = RowsInfo.read(args.rows_file)
    if info and info.kind == "text":
        raise UserError(f"{args.rows_file}: holds text, which has no pictures")
    path = args.tokenizer or (data and data.tokenizer) or (info and info.tokenizer)
    model, device = load_tokenizer(path, args.device)
    side = args.side or (info and info.side) or (data and data.side) or model.config.resolution
    lines, total = some_lines(args.rows_file, args.rows)
    dtype = data.row_dtype if data else "auto"
    dtype = dtype_of(args.rows_file, model.config.num_embeddings) if dtype == "auto" else dtype
    sheet = []
    for number, line in lines.items():
        try:
            sheet.append(decode_pictures(line, model, device, side, dtype))
        except ValueError as error:
            raise UserError(f"{args.rows_file}:{number + 1}: {error}") from None
    return sheet, total


def some_lines(path, count):
    """→ ({number: line} of `count` lines of a file, evenly spaced; how many it has)."""
    try:
        with settings.open_file(path) as file:
            total = sum(1 for _ in file)
            numbers = set(evenly(total, count))
            file.seek(0)
            lines = {number: line for number, line in enumerate(file) if number in numbers}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if not lines:
        raise UserError(f"{path}: no rows in it")
    return lines, total


@torch.inference_mode()
def decode_pictures(line, model, device, side, dtype):
    """A line of a rows file → (pictures, side, side, 3) uint8; ValueError if they are none."""
    height, width = model.grid(side)
    codes = decode_row(line, model.config.num_embeddings, dtype)
    if len(codes) % (height * width):
        raise ValueError(f"{len(codes)} codes do not make pictures of {height}×{width}; set --side")
    grids = torch.from_numpy(codes).long().view(-1, height, width)
    return np.concatenate([to_uint8(model.decode(some.to(device))) for some in grids.split(16)])


# ---- check -------------------------------------------------------------------------------------


def check(args):
    """Say what training would use of a folder, a tar or a file, what it would leave out, and why.

    Every row is read, every picture opened. Exit code 2 if any is bad.
    """
    print_findings(args.file, args.images)


# ---- the command line ----------------------------------------------------------------------------


def read_config(args):
    """(DataSettings, seed) of the configuration; its other sections belong to other programs."""
    values = settings.read(args.config, args.overrides)
    data = settings.build_from(args.config, DataSettings, values.get("data", {}), "data")
    train = values.get("train", {})
    seed = train.get("seed", 0) if isinstance(train, dict) else 0
    seed = settings.convert(int, seed, "train.seed")
    if seed < 0:
        raise UserError(f"train.seed {seed} must be at least 0")
    return data, seed


def load_tokenizer(path, device):
    if not path:
        raise UserError("no tokenizer: set data.tokenizer or give --tokenizer (a VQGAN's folder)")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return VQGAN.from_pretrained(path, dtype=torch.float32, device=device).eval(), device


def shard(text):
    """A function for argparse: "i/n" → (i, n)."""
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text} is not i/n with i from 0 to n-1, as in 0/4")
    return int(match[1]), int(match[2])


MODEL = {
    "--tokenizer": dict(help="the tokenizer's folder: a VQGAN's, or a text tokenizer's (default: the configuration's)"),
    "--device": dict(help="default: cuda where there is one"),
}
COMMANDS = {  # name → (function, whose docstring is its --help; a summary; an example; its options)
    "tokenize": (
        tokenize,
        "pictures → visual sentences → rows.jsonl (or texts → rows.jsonl)",
        "--config configs/lvm.toml --out rows-0.jsonl --shard 0/4",
        {
            "--config": dict(required=True, help="a TOML file with [data] and [[data.sources]]"),
            "--out": dict(required=True, help="the rows file to write"),
            "--split": dict(default="train", choices=SPLITS, help="which pictures (default: train)"),
            "--shard": dict(type=shard, default="0/1", help="i/n: every n-th sentence from i on"),
            "--batch": dict(type=moderate_int, default=16, help="pictures encoded at once (default: 16)"),
            **MODEL,
        },
    ),
    "vocabulary": (
        vocabulary,
        "texts → a tokenizer of their own",
        "--config configs/emoji_llama.toml --out out/emoji/vocabulary",
        {
            "--config": dict(required=True, help="a TOML file with [[data.sources]] of kind text"),
            "--out": dict(required=True, help="the folder to write"),
        },
    ),
    "show": (
        show,
        "rows.jsonl, or a configuration's sentences → a picture of them",
        "rows.jsonl --tokenizer out/vqgan --out grid.png",
        {
            "rows_file": dict(metavar="rows.jsonl", nargs="?", help="the rows (default: the sentences)"),
            "--out": dict(required=True, help="the picture to write"),
            "--config": dict(help="where data.tokenizer, data.side and [[data.sources]] are read"),
            "--rows": dict(type=moderate_int, default=8, help="how many rows (default: 8)"),
            "--side": dict(type=moderate_int, help="of a picture (default: the rows', or data.side)"),
            **MODEL,
        },
    ),
    "check": (
        check,
        "what training would use of any data, what it would leave out, and why",
        "llava.json --images coco",
        {
            "file": dict(metavar="PATH", help="a folder, a .tar or a pattern of them, texts, rows in .jsonl or .json"),
            "--images": dict(default="", help="the folder of the pictures that rows name (default: the file's own)"),
        },
    ),
}


def main():
    kinds = {name: kind.holds for name, kind in KINDS.items()}
    kinds["text"] = "no pictures: a document a row (.txt, .jsonl, or the emoji's names and categories)"
    lines = [f"  {name:14} {holds}" for name, holds in kinds.items()]
    parser = settings.Parser(
        prog="python prepare.py",
        description="Pictures to visual sentences, rows of codes, and back; texts to rows of ids.",
        epilog="\n".join(["kinds of visual sentences (N = data.pictures):", *lines]),
    )
    commands = parser.add_subparsers(required=True, metavar=" | ".join(COMMANDS))
    for name, (run, summary, example, options) in COMMANDS.items():
        epilog = f"example: python prepare.py {name} {example}"
        command = commands.add_parser(name, help=summary, description=inspect.getdoc(run), epilog=epilog)
        command.set_defaults(run=run)
        for option, keywords in options.items():
            command.add_argument(option, **keywords)
    args = parser.parse_with_overrides()
    args.run(args)


if __name__ == "__main__":
    settings.run_main(main)
