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
         └─ Tokenizer.encode ── read_texts(path)      text makes rows just as well: then it is a language model

Nothing here keeps a state: a batch is a pure function of (seed, step, row), so that a run resumes exactly
and the number of machines changes nothing. numpy and Pillow only: the JAX trainer reads it too.
Paper: Bai et al. 2023 (arXiv 2312.00785), section 3 (the kinds of sentences) and 4.2 (their codes in a row).

    python prepare.py tokenize --config configs/X.toml --out rows.jsonl
    python prepare.py vocabulary --config configs/X.toml --out words         (of texts, for data.text_tokenizer)
    python prepare.py show rows.jsonl --config configs/X.toml --out grid.png
    python prepare.py check read_texts.jsonl --images FOLDER                  (what DreamLLM reads: read_texts.py)

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
import itertools
import json
import mmap
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from support.pictures import jitter, random_motion
from support.settings import UserError
from support.sources import first_readable, open_source, warn

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


# ---- pictures --------------------------------------------------------------------------------


# ---- motion: clips made of one still picture ---------------------------------------------------


# ---- sources ---------------------------------------------------------------------------------


# ---- emoji: 4,009 pictures that pip installs -----------------------------------------------------


# ---- folders and tars -------------------------------------------------------------------------


# ---- visual sentences --------------------------------------------------------------------------


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
        item, taken = first_readable(self.source, pool, start, lambda item: self._takes(item, index, shot))
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
        return jitter(item.image, np.random.default_rng((self.seed, position, 5))), item.caption

    def item(self, position):
        """What stands at a position: the Item, and whether its picture is to be moved."""
        number, place = divmod(position, len(self))
        # a broken picture is replaced by what follows it
        order, n = self._order(number), len(self)
        places = (self.places[order[(place + k) % n]] for k in range(n))
        sound = ((source[i], moves) for source, i, moves in places if source.readable(source[i], [("image", None)]))
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
    items = [first_readable(s, range(len(s)), i, lambda item: [("image", None)])[0] for s, i in chosen]
    return np.stack([item.image for item in items])


# ---- text --------------------------------------------------------------------------------------


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
            raise UserError("no rows to read: set data.rows (python prepare.py tokenize writes them)")
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
