"""Rows: captioned pictures, documents and conversations as they lie on the disk.

    emoji ──▶ EmojiTexts ──▶ any row
    folder | .tar ──▶ FileSource ──▶ FilePairs ──▶ Picture | Pair
    .jsonl | .json ──▶ json_rows ──▶ read_row ──▶ Pair | Document | Conversation
                         └─ JsonRows: an index of the rows; each is read again when it is used

    format     keys of a row                        becomes
    captions   image, caption                       Pair
    MMC4       text_list, image_info, instruction   Document (Zhu et al. 2023, arXiv 2304.06939)
    OBELICS    images, texts                        Document (Laurençon et al. 2023, 2306.16527)
    LLaVA      conversations, image                 Conversation (Liu et al. 2023, 2304.08485)

A row names its pictures; they are opened later, and only those that a sample keeps. documents.py
reads from a *source of rows*: it has a `path`, a length, `read(index, rng)` → row, `open(picture)`
→ a Pillow image in RGB, and `where(index)` → the name of a row in messages. Three of them stand
here: EmojiTexts, FilePairs, JsonRows. Nothing here needs torch.
"""

import array
import collections
import glob
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from support.pictures import load_picture
from support.settings import UserError
from support.sources import hash_to_unit
from support.tokenizer import Special, render_chat

# ---- the types of rows ---------------------------------------------------------------------------
# A picture is whatever its source can open: a file's name, an Item of support/sources.py.


@dataclass(frozen=True)
class Picture:
    """A picture alone."""

    picture: object

    @property
    def pictures(self):
        return [self.picture]


@dataclass(frozen=True)
class Pair(Picture):
    """A picture and its caption."""

    caption: str


@dataclass(frozen=True)
class Document:
    """Texts with pictures between them."""

    pieces: list  # [(text, the picture after it or None), …] in reading order
    prompt: str | None = None  # the instruction that it answers

    @property
    def pictures(self):
        return [picture for _, picture in self.pieces if picture is not None]


@dataclass(frozen=True)
class Conversation:
    """Questions and answers about pictures."""

    messages: list  # as in Tokenizer.encode_chat, "<image>" or "<dream>" where a picture stands
    pictures: list  # one for each of these, in reading order


# ---- conversations: where their pictures stand ---------------------------------------------------

# Placeholders in raw texts; they never become tokens of a sequence.
IMAGE, DREAM = Special("<image>"), Special("<dream>")


def frame_messages(messages, template, system):
    """Messages → [text or Special, …] as the template writes them, IMAGE and DREAM among them.

    system: the system message, if `messages` has none; None: what the template says by itself.
    """
    if system is not None and messages[:1] and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    parts = []
    for part in render_chat(messages, template):
        if isinstance(part, Special):
            parts.append(part)
            continue
        for text in re.split(f"({IMAGE}|{DREAM})", part):
            if text:
                parts.append(Special(text) if text in (IMAGE, DREAM) else text)
    return parts


def is_placeholder(part):
    """Whether a part of `frame_messages` stands for a picture."""
    return isinstance(part, Special) and part in (IMAGE, DREAM)


def check_count(parts, pictures):
    """Raises a ValueError unless there is one picture for each placeholder."""
    if (count := sum(map(is_placeholder, parts))) != len(pictures):
        raise ValueError(f"{count} × <image> or <dream> in its texts, but {len(pictures)} pictures")


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
        caption = item.caption
        if not caption.strip():
            raise ValueError("it has no caption")
        return Pair(item, caption)


# ---- one JSON row --------------------------------------------------------------------------------

TYPES = {str: "a text", int: "a whole number", list: "a list", dict: "a table"}
ROLES = {"human": "user", "gpt": "assistant"}
ROLES |= {"user": "user", "assistant": "assistant", "system": "system"}


def require_type(wanted, value, where):
    """`value`, if it is of the type `wanted` (a key of TYPES); else a ValueError about `where`."""
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise ValueError(f"{where} is {json.dumps(value)[:40]}, not {TYPES[wanted]}")
    if isinstance(value, str):
        value.encode()  # half a surrogate pair is a ValueError too
    return value


def require_list(wanted, row, key):
    """row[key], if it is a list whose items are all of the type `wanted`."""
    items = require_type(list, row[key], key)
    for i, item in enumerate(items):
        require_type(wanted, item, f"{key}[{i}]")
    return items


def parse_captions(row):
    """{"image": name, "caption": text} → Pair."""
    caption = require_type(str, row["caption"], "caption")
    return Pair(require_type(str, row["image"], "image"), caption)


def parse_mmc4(row):
    """{"text_list": [text, …], "image_info": [{"image_name", "matched_text_index"}, …]} → Document.

    Each picture stands behind the text that it matches. "instruction", if there is one, is what the
    document answers.
    """
    texts = require_list(str, row, "text_list")
    names_after = [[] for _ in texts]  # of each text: the pictures behind it
    for i, info in enumerate(require_list(dict, row, "image_info")):
        where = f"image_info[{i}]"
        name = require_type(str, info.get("image_name"), f"{where}.image_name")
        index = require_type(int, info.get("matched_text_index"), f"{where}.matched_text_index")
        if not 0 <= index < len(texts):
            wrong = f"{index} is not the index of one of the {len(texts)} texts"
            raise ValueError(f"{where}.matched_text_index {wrong}")
        names_after[index].append(name)
    pieces = []
    for text, names in zip(texts, names_after, strict=True):
        pieces.append((text, names[0] if names else None))
        pieces += [("", name) for name in names[1:]]
    prompt = row.get("instruction")
    return Document(pieces, None if prompt is None else require_type(str, prompt, "instruction"))


def parse_obelics(row):
    """{"images": […], "texts": […]}, two lists in reading order → Document.

    At each index one of them has a picture's name or a text, and the other null.
    """
    images = require_type(list, row["images"], "images")
    texts = require_type(list, row["texts"], "texts")
    if len(images) != len(texts):
        counts = f"{len(images)} images but {len(texts)} texts"
        raise ValueError(f"{counts}: one of each pair must be null")
    pieces = []
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        if image is not None and text is not None:
            both = f"images[{i}] and texts[{i}] are both set"
            raise ValueError(f"{both}: one of each pair must be null")
        if image is not None:
            pieces.append(("", require_type(str, image, f"images[{i}]")))
        elif text is not None:
            pieces.append((require_type(str, text, f"texts[{i}]"), None))
    return Document(pieces)


def parse_llava(row):
    """{"conversations": [{"from", "value"}, …], "image": a name or a list of names} → Conversation.

    "from" is a key of ROLES, "value" a text; "image" may be absent.
    """
    messages = []
    for i, turn in enumerate(require_list(dict, row, "conversations")):
        where = f"conversations[{i}]"
        speaker = require_type(str, turn.get("from"), f"{where}.from")
        if speaker not in ROLES:
            raise ValueError(f'{where}.from is "{speaker}": one of {", ".join(ROLES)}')
        text = require_type(str, turn.get("value"), f"{where}.value")
        messages.append({"role": ROLES[speaker], "content": text})
    names = row.get("image")
    if names is None:
        names = []
    elif not isinstance(names, list):
        names = [names]
    for name in names:
        require_type(str, name, "image")
    try:
        check_count(frame_messages(messages, "plain", None), names)
    except UserError as error:  # user and assistant do not take turns
        raise ValueError(str(error)) from None
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("it has no answer")
    return Conversation(messages, names)


class Format(NamedTuple):
    keys: tuple[str, ...]  # a row with all of these keys is of this format
    parse: Callable  # its table → Pair | Document | Conversation


FORMATS = {
    "MMC4": Format(("text_list", "image_info"), parse_mmc4),
    "OBELICS": Format(("images", "texts"), parse_obelics),
    "LLaVA": Format(("conversations",), parse_llava),
    "captions": Format(("image", "caption"), parse_captions),
}


def read_row(raw):
    """The bytes of a row → (a key of FORMATS, Pair | Document | Conversation).

    A ValueError says what is wrong with it.
    """
    try:
        row = json.loads(raw)
    except RecursionError:
        raise ValueError("not JSON (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__}, not a table {{…}}")
    for name, format in FORMATS.items():
        if all(key in row for key in format.keys):
            return name, format.parse(row)
    known = "; ".join(f"{', '.join(format.keys)} ({name})" for name, format in FORMATS.items())
    raise ValueError(f"its keys {', '.join(row) or '(none)'} are of no known row: {known}")


# ---- files of JSON rows --------------------------------------------------------------------------
# Each row is found with its line, for messages, and its offset, so that it can be read alone later.


def json_rows(path):
    """Yields (line, offset in bytes, bytes) of each row of a file: JSON Lines, or one JSON list."""
    try:
        with open(path, "rb") as file:
            is_list = file.read(4096).lstrip()[:1] == b"["
            file.seek(0)
            if is_list:
                yield from list_rows(file.read())
            else:
                yield from jsonl_rows(file)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(f"{path}: {getattr(error, 'strerror', error)}") from None


def jsonl_rows(file):
    """The rows of a JSONL file, open in binary: a row a line; empty lines are passed over."""
    offset = 0
    for line, raw in enumerate(file, 1):
        if raw.strip():
            yield line, offset, raw
        offset += len(raw)


def list_rows(data):
    """The same of a file's bytes that are one JSON list.

    A list cannot be cut at line breaks, as a row may span many: json finds where each row ends.
    latin-1 maps each byte to one character, so that json's positions are offsets in bytes; what it
    decodes is thrown away.
    """
    text = data.decode("latin-1")
    decoder, gap = json.JSONDecoder(), re.compile(r"[\s,]*")
    end = text.index("[") + 1
    line, counted = 1, 0  # `line` is that of the character text[counted]
    while True:
        start = gap.match(text, end).end()
        line, counted = line + text.count("\n", counted, start), start
        if text[start : start + 1] == "]":
            return
        try:
            end = decoder.raw_decode(text, start)[1]
        except (ValueError, RecursionError):  # broken here; where the next row starts is unknown
            yield line, start, data[start:]
            return
        yield line, start, data[start:end]


class JsonRows:
    """The rows of .jsonl or .json files in any of FORMATS, with random access.

    path     a file, or a shell pattern of files
    kind     a documents.Kind: only rows of its class `row` are used, and its `convert` is applied
    images   the folder of the pictures; "": that of the first file
    split    "train" or "held_out". A row is held out by a hash of its first picture's name (of its
             own bytes, if it has no picture): rows that begin with one picture are on the same side
    skip     is called with a line about each row that cannot be used

    Opening reads and checks every row, and keeps only where it is: `index` (rows, 4) int64 holds
    its file, offset, length in bytes, and line.
    """

    def __init__(self, path, kind, images, split, held_out_fraction, skip):
        self.path, self.kind = path, kind
        self.files = sorted(glob.glob(path)) or [path]
        self.folder = Path(images) if images else Path(self.files[0]).parent
        index, usable = array.array("q"), 0  # compact: there may be millions of rows
        for number, file in enumerate(self.files):
            for line, offset, raw in json_rows(file):
                try:
                    names = self.parse_row(raw).pictures
                    key = hash_to_unit(names[0] if names else raw.decode())
                except ValueError as error:
                    skip(f"{file}:{line}: {error}")
                    continue
                usable += 1
                if (key < held_out_fraction) == (split == "held_out"):
                    index.extend((number, offset, len(raw), line))
        if not usable:
            raise UserError(f'{path}: no row in it can be used for kind "{kind.name}"')
        if not index:
            empty = f"{path}: none of its {usable} rows falls into the {split} split"
            raise UserError(f"{empty}: change data.held_out_fraction")
        self.index = np.array(index).reshape(-1, 4)  # (rows, 4)

    def parse_row(self, raw):
        """The bytes of a row → Picture | Pair | Document | Conversation, as the kind wants it."""
        form, row = read_row(raw)
        if not isinstance(row, self.kind.row):
            no = f"a row of {form} is no {self.kind.name}"
            raise ValueError(f"{no}: set another kind in [[data.sources]]")
        return self.kind.convert(row)

    def __len__(self):
        return len(self.index)

    def where(self, index):
        file, _, _, line = self.index[index].tolist()
        return f"{self.files[file]}:{line}"

    def open(self, name):
        return open_picture(self.folder, name)

    def read(self, index, rng):
        file, offset, length, _ = self.index[index].tolist()
        with open(self.files[file], "rb") as opened:
            opened.seek(offset)
            return self.parse_row(opened.read(length))


def open_picture(folder, name):
    """The picture `name` in `folder` as a Pillow image; UserError or ValueError if it is unusable."""
    if name.startswith(("http://", "https://")):
        address = f"{name[:80]} is an address, not a file"
        raise ValueError(f"{address}: download the pictures, and write their names")
    picture = load_picture(folder / name)  # (H, W, 3)
    height, width, _ = picture.shape
    if max(height, width) > 100 * min(height, width):
        size = f"of its {width}×{height} pixels one side is over 100 times the other"
        raise ValueError(f"{folder / name}: {size}")
    return Image.fromarray(picture)
