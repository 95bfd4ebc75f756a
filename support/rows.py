"""Rows: captioned pictures, documents and conversations as they lie on the disk.

    emoji ──▶ EmojiTexts ──▶ any row
    folder | .tar ──▶ FileSource ──▶ FilePairs ──▶ Picture | Pair
    .jsonl | .json ──▶ json_rows ──▶ formats.read_row ──▶ Captioned | Document | Conversation
                         └─ JsonRows: an index of the rows; each is read when it is used

A row names its pictures; they are opened later, and only those that a sample keeps. documents.py
reads from a *source of rows*: it has a `path`, a length, `read(index, rng)` → row, `open(picture)`
→ a Pillow image in RGB, and `where(index)` → the name of a row in messages. Three of them stand
here: EmojiTexts, FilePairs, JsonRows. Nothing here needs torch.
"""

import array
import base64
import binascii
import collections
import functools
import glob
import json
import os
import re
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image

from support.formats import IMAGE, Captioned, Conversation, Document, Pair, Picture, read_row
from support.index import listed, open_index
from support.pictures import load_picture
from support.settings import UserError, open_file
from support.sources import crc32, in_words, tally, warn

# ---- rows of emoji: what their names and categories say ------------------------------------------

WHAT, CATEGORY, IS_IT = "What is this?", "Which category is it?", "Is it a {name}?"
DRAW, SHOW = "Draw {name}.", "Show {category}."


class EmojiTexts:
    """A source of rows of any kind: each emoji has a name, a category, and neighbours in order."""

    path = "emoji"

    def __init__(self, emoji, kind):
        self.emoji, self.kind = emoji, kind
        self.by_category = collections.defaultdict(list)  # category → indices of its items
        self.index_in_category = []  # of each item
        self.captions = collections.defaultdict(dict)  # category → its captions, each once, as keys
        for index, item in enumerate(emoji):
            self.index_in_category.append(len(self.by_category[item.category]))
            self.by_category[item.category].append(index)
            self.captions[item.category][item.caption] = None

    def __len__(self):
        return len(self.emoji)

    def where(self, index):
        return f"emoji {self.emoji[index].name}"

    def open(self, item):
        return Image.fromarray(item.image)

    def read(self, index, rng):
        """The row of the item at `index`, what is random in it taken from `rng`."""
        return self.kind.emoji(self, index, rng)

    def pair(self, index, rng):
        item = self.emoji[index]
        return Pair(item, item.caption)

    def picture(self, index, rng):
        return Picture(self.emoji[index])

    def document(self, index, rng):
        """Neighbours and their names, after the name of their category."""
        first, *others = self.neighbours(index, rng)
        pieces = [(f"{first.category.lower()}: {first.caption}", first)]
        pieces += [(item.caption, item) for item in others]
        return Document(pieces)

    def instructed(self, index, rng):
        """Neighbours and their names, in answer to "Show …"."""
        pieces = [(item.caption, item) for item in self.neighbours(index, rng)]
        return Document(pieces, SHOW.format(category=self.emoji[index].category.lower()))

    def conversation(self, index, rng):
        """One question about this emoji and its answer, or the instruction to draw it."""
        item = self.emoji[index]
        match rng.integers(4):
            case 0:
                question, answer = WHAT, item.caption
            case 1:
                question, answer = CATEGORY, item.category.lower()
            case 2:
                question, answer = self.yes_or_no(index, rng)
            case _:  # a document: there <dream_start> is a label, in a conversation it is not
                return Document([("", item)], DRAW.format(name=item.caption))
        messages = [
            {"role": "user", "content": f"{IMAGE}\n{question}"},
            {"role": "assistant", "content": answer},
        ]
        return Conversation(messages, [item])

    def neighbours(self, index, rng):
        """2 to 4 items in a row of the same category, this one among them."""
        indices = self.by_category[self.emoji[index].category]
        count = min(int(rng.integers(2, 5)), len(indices))
        start = min(self.index_in_category[index], len(indices) - count)
        return [self.emoji[i] for i in indices[start : start + count]]

    def yes_or_no(self, index, rng):
        """("Is it a …?", "yes" or "no"), each half of the time.

        Half of the wrong names are of the item's category.
        """
        item = self.emoji[index]
        if rng.random() < 0.5:
            return IS_IT.format(name=item.caption), "yes"
        same, other = [], []  # wrong names of its category, and of the others
        for category, captions in self.captions.items():
            names = same if category == item.category else other
            names += [name for name in captions if name != item.caption]
        names = (same or other) if rng.random() < 0.5 else (other or same)
        return IS_IT.format(name=names[int(rng.integers(len(names)))]), "no"


# ---- captioned pictures of folders and tars ------------------------------------------------------


class FilePairs:
    """The pictures of a support.sources.FileSource as rows: Pair with `captions`, else Picture."""

    def __init__(self, files, captions=True):
        self.path, self.files, self.captions = files.path, files, captions

    def __len__(self):
        return len(self.files)

    def where(self, index):
        return f"{self.path}/{self.files[index].name}"

    def open(self, item):
        return Image.fromarray(item.image)

    def read(self, index, rng):
        item = self.files[index]
        if not self.captions:
            return Picture(item)
        return Captioned(item, item.captions).pair(rng)


# ---- files of JSON rows --------------------------------------------------------------------------
# Each row is found with its place, for messages, and its offset, so that it can be read alone.

BOM = b"\xef\xbb\xbf"  # of UTF-8: Notepad and PowerShell write it
UTF_16 = "is in UTF-16: write it as UTF-8 (iconv -f UTF-16 -t UTF-8)"
TO_JSON = 'write it as JSON Lines (pandas: {}(…).to_json(…, orient="records", lines=True))'
NO_JSON = {  # how files begin that hold no JSON as it is: what they are, and the way out
    b"\x1f\x8b": "is compressed: gunzip it",
    b"\x28\xb5\x2f\xfd": "is compressed: zstd -d it",
    b"BZh": "is compressed: bunzip2 it",
    b"\xfd7zXZ": "is compressed: xz -d it",
    b"PK\x03\x04": "is a zip file: unzip it",
    b"PAR1": f"is Parquet: {TO_JSON.format('read_parquet')}",
    b"ARROW1": f"is Arrow: {TO_JSON.format('read_feather')}",
    b"\xff\xff\xff\xff": "is Arrow: write it as JSON Lines (datasets: Dataset.from_file(…).to_json(…))",
    b"\xff\xfe": UTF_16,
    b"\xfe\xff": UTF_16,
    b"version https://git-lfs": "is a Git LFS pointer, not the file: git lfs pull",
    b"<": "is a page of the web, not the file: download it again",
}


def names_rows(path):
    """Whether a path is that of a file of rows by its ending; the file may be compressed."""
    return bool(re.search(r"\.(jsonl?|ndjson|parquet|arrow|csv|tsv)(\.\w+)?$", path, re.IGNORECASE))


def no_json(path, start):
    """What a file is that begins with the bytes `start` and holds no JSON as it is; or ""."""
    if str(path).lower().endswith((".csv", ".tsv")):
        return f"is CSV: {TO_JSON.format('read_csv')}"
    if b"\0" in start[:2]:
        return UTF_16
    return next((what for sign, what in NO_JSON.items() if start.startswith(sign)), "")


def json_rows(path):
    """Yields (place, offset in bytes, bytes) of each row of a file: JSON Lines, or one JSON list.

    Objects that are printed over many lines, one after the other, are rows too. The place is the
    line, or minus the row's number where a row begins in the same line as the one before it.
    """
    try:
        with open_file(path) as file:
            start = file.read(4096)
            if what := no_json(path, start):
                raise UserError(f"{path}: {what}")
            first, _, more = start.removeprefix(BOM).lstrip().partition(b"\n")
            file.seek(0)
            if first[:1] == b"[" or (more and first.rstrip().endswith((b"{", b","))):
                yield from json_values(file.read())
            else:
                yield from jsonl_rows(file)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(f"{path}: {getattr(error, 'strerror', error)}") from None


def row_name(file, place):
    """What messages call the row at a place that json_rows gives."""
    return f"{file}:{place}" if place > 0 else f"{file} (row {-place})"


def jsonl_rows(file):
    """The rows of a JSONL file, open in binary: a row a line; empty lines are passed over."""
    offset = 0
    for line, raw in enumerate(file, 1):
        if raw.removeprefix(BOM).strip():
            yield line, offset, raw
        offset += len(raw)


def json_values(data):
    """The same of a file's bytes that are JSON lists, or objects one after the other.

    They cannot be cut at line breaks, as a row may span many: json finds where each row ends.
    latin-1 maps each byte to one character, so that json's positions are offsets in bytes; what it
    decodes is thrown away. Behind a broken row the next one is where a row begins as the first did.
    """
    text = data.decode("latin-1")
    decoder, gap = json.JSONDecoder(), re.compile(r"[\s,]*")
    position, in_list = len(BOM) * data.startswith(BOM), False
    line, counted = 1, 0  # `line` is that of the character text[counted]
    number, previous, opening = 0, 0, ""  # of the row; line of the one before it; {"key" of the first
    while True:
        start = gap.match(text, position).end()
        line, counted = line + text.count("\n", counted, start), start
        bracket = text[start : start + 1]
        if bracket == "" and not in_list:
            return
        if bracket == "]" if in_list else bracket == "[":
            position, in_list = start + 1, not in_list
            continue
        number += 1
        place, previous = (-number if line == previous else line), line
        opening = opening or text[start : text.find('"', text.find('"', start) + 1) + 1]
        try:
            position = decoder.raw_decode(text, start)[1]
        except (ValueError, RecursionError):
            position = text.find(opening, start + 1) if opening else -1
            if position < 0:
                yield place, start, data[start:]
                return
        yield place, start, data[start:position]


def fault_kind(reason):
    """What is wrong with a row, without numbers and names: equal faults can be counted."""
    return re.sub(r'"[^"]*"|\S*/\S*[^\s:]|\S+\.(jpe?g|png|webp|gif)\b|[0-9]+', "…", reason)


def read_rows(path):
    """Yields of each row: itself or None, what is wrong or "", its name, its format or "".

    path: a file, or a shell pattern of files. What only one kind of sample needs is not looked at,
    but for a caption; nor is whether the pictures can be opened.
    """
    for file in sorted(glob.glob(path)) or [path]:
        for place, _, raw in json_rows(file):
            name = row_name(file, place)
            try:
                form, row = read_row(raw)
                if isinstance(row, Captioned):
                    row = row.pair(None)
                yield row, "", name, form
            except ValueError as error:
                yield None, str(error), name, ""


COLUMNS = {"offset": "<i8", "length": "<i8", "place": "<i8", "crc": "<u4"}  # of an index; crc: decides about the split
NAMED = 10  # rows that cannot be used: as many are said one by one


class JsonRows:
    """The rows of .jsonl or .json files in any of FORMATS, with random access.

    path     a file, or a shell pattern of files
    kind     a documents.Kind: only rows of its class `row` are used, and its `convert` is applied
    images   the folder of the pictures; "": that of the first file
    split    "train" or "held_out". A row is held out by a hash of its first picture's name (of its
             own bytes, if it has no picture): rows that begin with one picture are on the same side
    skip     is called with a line about each row that cannot be used, and whether to say it

    Each file has an index for each kind, ROWS.KIND.index: making it reads and checks every row. Ten
    rows that cannot be used are said one by one, more of them in a line that counts them by their
    faults; so is what is left out of other rows.

    rows, first   of each file, which rows of its index belong to the split, and how many came before them
    """

    def __init__(self, path, kind, images, split, held_out_fraction, skip):
        self.path, self.kind = path, kind
        self.files = sorted(glob.glob(path)) or [path]
        self.folder = Path(images) if images else Path(self.files[0]).parent
        self.indexes, self.rows, unusable, left_out = [], [], [], {}
        for file in self.files:
            index = self._open_index(file)
            for place, reason in index.facts["faults"]:
                unusable.append((fault_kind(reason), row_name(file, place)))
                skip(f"{row_name(file, place)}: {reason}", len(unusable) <= NAMED)
            for what, (count, place) in index.facts["left_out"].items():
                before, first = left_out.get(what, (0, row_name(file, place)))
                left_out[what] = before + count, first
            held_out = index.columns["crc"] < held_out_fraction * 2**32  # hash_to_unit(…) < held_out_fraction
            self.indexes.append(index)
            self.rows.append(np.flatnonzero(held_out == (split == "held_out")))
        if len(unusable) > NAMED:
            warn(f"{path}: skipped {in_words(tally(unusable))}")
        if left_out:
            warn(f"{path}: left out of rows: {in_words(left_out)}")
        usable = sum(len(index.columns["crc"]) for index in self.indexes)
        if not usable:
            raise UserError(f'{path}: no row in it can be used for kind "{kind.name}"')
        self.first = np.cumsum([0, *map(len, self.rows)])
        if not len(self):
            empty = f"{path}: none of its {usable} rows falls into the {split} split"
            raise UserError(f"{empty}: change data.held_out_fraction")

    def _open_index(self, file):
        try:
            return open_index(file, COLUMNS, functools.partial(self._scan, file), warn, self.kind.name)
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise UserError(f"{file}: {getattr(error, 'strerror', error)}") from None

    def _scan(self, file, add):
        """Reads a file's rows → {"faults": [(place, reason), …], "left_out": {what: (count, place of the first)}}."""
        columns, faults, left_out = {name: array.array("q") for name in COLUMNS}, [], []
        for place, offset, raw in json_rows(file):
            try:
                row = self.parse_row(raw)
                key = crc32(row.pictures[0] if row.pictures else raw.decode())
            except ValueError as error:
                faults.append((place, str(error)))
                continue
            if getattr(row, "left_out", ""):
                left_out.append((row.left_out, place))
            for column, value in zip(columns.values(), (offset, len(raw), place, key), strict=True):
                column.append(value)
        add(**{name: np.array(column) for name, column in columns.items()})
        return {"faults": listed(faults), "left_out": tally(left_out)}

    def parse_row(self, raw, rng=None):
        """The bytes of a row → Picture | Pair | Document | Conversation, as the kind wants it."""
        form, row = read_row(raw)
        if isinstance(row, Captioned) and self.kind.row is Pair:
            row = row.pair(rng)
        if not isinstance(row, self.kind.row):
            no = f"a row of {form} is no {self.kind.name}"
            raise ValueError(f"{no}: set another kind in [[data.sources]]")
        return self.kind.convert(row)

    def __len__(self):
        return int(self.first[-1])

    def _entry(self, index):
        """→ (file, offset, length, place) of a row."""
        number = int(np.searchsorted(self.first, index, side="right")) - 1
        row, columns = self.rows[number][index - self.first[number]], self.indexes[number].columns
        return self.files[number], *(int(columns[name][row]) for name in ("offset", "length", "place"))

    def where(self, index):
        file, _, _, place = self._entry(index)
        return row_name(file, place)

    def open(self, name):
        return open_picture(self.folder, name)

    def read(self, index, rng):
        file, offset, length, _ = self._entry(index)
        with open(file, "rb") as opened:
            opened.seek(offset)
            return self.parse_row(opened.read(length), rng)


def open_picture(folder, name):
    """The picture `name` in `folder` as a Pillow image; UserError or ValueError if it is unusable.

    The name may be a data: address, which holds the picture itself.
    """
    if name.startswith(("http://", "https://", "s3://", "gs://")):
        address = f"{name[:80]} is an address, not a file"
        raise ValueError(f"{address}: download the pictures, and write their names")
    if name.startswith("data:"):
        path, source = "the picture in the row", picture_bytes(name)
    else:
        path = source = find_picture(folder, name)
    picture = load_picture(source, name=path)  # (H, W, 3)
    height, width, _ = picture.shape
    if max(height, width) > 100 * min(height, width):
        size = f"of its {width}×{height} pixels one side is over 100 times the other"
        raise ValueError(f"{path}: {size}")
    return Image.fromarray(picture)


def picture_bytes(address):
    """The bytes in "data:image/png;base64,…"."""
    kind, _, data = address.partition(",")
    try:
        if not kind.endswith(";base64"):
            raise ValueError("it is not in base64")
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"the picture in the row, {address[:40]}, cannot be read ({error})") from None


def find_picture(folder, name):
    """The path of a picture that a row names; a ValueError names one of another machine."""
    if len(name) > 1000:  # base64 without "data:"
        raise ValueError(f"{name[:40]}… is no file's name: a picture in the row begins with data:image/png;base64,")
    path = folder / name.removeprefix("file://")
    # a Mac writes é as e and ´, and the row may come from another machine
    forms = (path, *(Path(unicodedata.normalize(form, str(path))) for form in ("NFC", "NFD")))
    path = next(filter(os.path.exists, forms), path)
    if "\\" in name and not os.path.exists(path):  # as Windows writes names
        path = folder / name.replace("\\", "/")
    if Path(name).is_absolute() and not os.path.exists(path):
        raise ValueError(f"{name}: no such file on this machine: write names inside the folder `images`")
    if os.path.isdir(path):
        raise ValueError(f"{path}: a folder, no picture")
    return path
