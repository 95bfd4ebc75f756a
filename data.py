"""Data: pictures → visual sentences → rows of codes → batches.

A language model reads sentences of words; LVM reads sentences of *pictures*. A visual sentence is a
short list of related pictures (a photo and its depth map, eight times over; the frames of a clip; a
picture with a hole and the whole one), and its layout alone says what the task is. A VQGAN writes
each picture as a few hundred codes, the codes of a sentence are laid end to end, and a LLaMA
continues them.

    emoji | folder | tar ── open_source ──▶ source ──▶ Item     name, caption, category, pictures
                                              │ Sentences(kind): which items, modalities, order
                                              ▼
    sentence = [picture, picture, …]      each (side, side, 3) uint8
         │                         │
         │ tokenize: VQGAN.encode  └─ PictureRows.batch ──▶ (B, side, side, 3) uint8     train the VQGAN
         ▼
    rows.jsonl, a sentence a line ─── TokenRows.batch ───▶ inputs, targets (B, T) int64  train the LLaMA
         ▲
         └─ Tokenizer.encode ── read_texts(path)     rows of text train a language model likewise

Nothing here keeps a state: a batch is a pure function of the seed and its number in the run, so that
a run resumes exactly and the number of machines changes nothing. numpy and Pillow only: the JAX
trainer reads it too. prepare.py makes the rows; support/sources.py opens the pictures.

    N       pictures in a sentence (data.pictures)     M       modalities (data.sources.modalities)
    B       rows of a batch                            T       tokens of each: the model's context

A *row* of a rows file is a whole sentence, of any length. A batch has B *windows*, T tokens each, of
the endless stream of rows. Nothing separates rows, and a window begins where a sentence begins only
if every sentence has T tokens, as LVM's have: 16 pictures of 256 codes.

Paper: Bai et al. 2023 (arXiv 2312.00785), section 3 (the kinds of sentences) and 4.2 (their codes
in a row).
"""

import bisect
import collections
import functools
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from support import settings
from support.chance import rng, shuffled
from support.formats import pick
from support.pictures import jitter, random_motion
from support.settings import UserError
from support.sources import around, first_readable, open_source, warn
from support.token_rows import DTYPES, RowsFiles, rows_files

# ---- what an item gives to a sentence ------------------------------------------------------------
# A function for each kind of sentence: (item, N, modalities, shared, own) → [Frame, …]. The random
# generator `shared` gives all items of a sentence the same numbers, `own` gives each item others.


class Frame(NamedTuple):
    """A picture that is still to be made."""

    modality: str
    number: int | None = None  # which frame of a clip, or which view of an object
    change: Callable | None = None  # (picture, rng) → picture, such as punch_hole


def punch_hole(picture, rng):
    """The picture with black holes to fill in, (S, S, 3) → (S, S, 3).

    Sizes are LVM's for 256 pixels, scaled.

    With probability 0.3 one square of side 25..128 is missing; otherwise the picture is cut into
    patches of 32 and each is kept with one probability, itself uniform in (0, 1).
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


def still(item, n, modalities, shared, own):
    return [Frame("image")]


def paired(item, n, modalities, shared, own):
    return [Frame("image"), Frame(shared.choice(modalities).item())]


def colorization(item, n, modalities, shared, own):
    return [Frame("grey"), Frame("image")]


def inpainting(item, n, modalities, shared, own):
    return [Frame("image", change=punch_hole), Frame("image")]


def multimodal(item, n, modalities, shared, own):
    return [Frame(modality) for modality in shared.permutation(modalities).tolist()]


def times(item, n, stride, rng):
    """n frame numbers, evenly apart, from a random start; the stride shrinks to fit the clip."""
    stride = int(min(stride, (item.frames - 1) // max(n - 1, 1)))
    start = int(rng.integers(0, item.frames - (n - 1) * stride))
    return (start + stride * np.arange(n)).tolist()


def frames_of(modality, numbers):
    return [Frame(modality, number) for number in numbers]


def video(item, n, modalities, shared, own):
    return frames_of("image", times(item, n, 8, own))


def sequence(item, n, modalities, shared, own):
    stride = own.integers(1, 5)
    return frames_of("image", times(item, n, stride, own))


def multisequence(item, n, modalities, shared, own):
    modalities, blocks = shared.permutation(modalities).tolist(), shared.random() < 0.5
    chosen = times(item, n, shared.integers(1, 5), own)
    if blocks:
        return [Frame(modality, t) for modality, t in itertools.product(modalities, chosen)]
    return [Frame(modality, t) for t, modality in itertools.product(chosen, modalities)]


def object3d(item, n, modalities, shared, own):
    views = np.sort(own.choice(item.views, n // 4, replace=False)).tolist()
    return frames_of("image", views) + frames_of("mask", views)


# ---- in which order a source's items come --------------------------------------------------------


class Shuffled:
    """Items in random order, `count` a sentence; the last one is filled up from the start."""

    def __init__(self, source, items, count):
        self.items, self.count = items, count
        self.sentences = -(-len(items) // count)  # in a pass

    def choose(self, stream, seed, index, number):
        """Which of the source's items is item `number` of sentence `index` of the endless passes."""
        in_pass, row = divmod(index, self.sentences)
        place = (row * self.count + number) % len(self.items)
        (i,) = shuffled(stream, (seed,), len(self.items), [in_pass * len(self.items) + place])
        return self.items[i]

    def substitutes(self, item):
        """The indices, ascending, of those that may replace a broken item."""
        return self.items


class FourCategories(Shuffled):
    """Sentences of four blocks, each of one category: every item comes at least once in a pass."""

    def __init__(self, source, items, count):
        self.size = count // 4  # items in a block
        self.members = collections.defaultdict(list)  # category → its items
        for i in items:
            self.members[source[i].category].append(i)
        blocks = [-(-len(members) // self.size) for members in self.members.values()]
        self.sentences = max(-(-sum(blocks) // 4), *blocks)
        self._permuted = functools.lru_cache(8)(lambda *key: self._permute(rng(*key)))

    def choose(self, stream, seed, index, number):
        in_pass, row = divmod(index, self.sentences)
        return int(self._permuted(stream, seed, in_pass)[row, number])

    def _permute(self, rng):
        """Indices of the source's items, (sentences, N): one pass."""
        # Taking a block from the four fullest categories each time needs the fewest sentences.
        whole = {}
        for category, members in self.members.items():
            count = -(-len(members) // self.size)
            whole[category] = np.resize(rng.permutation(members), (count, self.size))
        left = {category: list(blocks) for category, blocks in whole.items()}
        sentences = []
        while any(left.values()):
            mixed = rng.permutation(list(left)).tolist()  # so that chance decides among equals
            fullest = sorted(mixed, key=lambda category: -len(left[category]))[:4]
            # a category that has run out repeats one of its blocks
            blocks = [left[c].pop() if left[c] else rng.choice(whole[c]) for c in fullest]
            sentences.append(np.concatenate([blocks[i] for i in rng.permutation(4)]))  # (N,)
        return np.stack(sentences)[rng.permutation(len(sentences))]

    def substitutes(self, item):
        return self.members[item.category]


# ---- visual sentences ----------------------------------------------------------------------------


class Requirement(NamedTuple):
    """Which items of a source a kind of sentence can use."""

    usable: Callable  # (item, N) → bool
    name: str  # in errors
    categories: int = 1  # of how many categories they must be, at least


ANY = Requirement(lambda item, n: True, "pictures")
CLIPS = Requirement(lambda item, n: item.frames >= n, "clips of {n} frames or more")
OBJECTS = Requirement(lambda item, n: item.views >= n // 4, "objects with {views} views or more")
CATEGORIZED = Requirement(lambda item, n: item.category, "4 categories (sub-folders) or more", categories=4)


@dataclass(frozen=True)
class Kind:
    """A kind of visual sentence: all that is to be known of it."""

    holds: str  # in words
    layout: Callable  # (N, M) → (items of a sentence, pictures that each of them gives)
    frames: Callable  # which pictures an item gives: see above
    requires: Requirement = ANY
    order: type = Shuffled
    divisor: int = 1  # of N
    modalities: int = 0  # the least M; 0: it takes none
    needs: tuple[str, ...] = ()  # modalities that it takes without being told to


KINDS = {
    "image": Kind("N unrelated pictures", lambda n, m: (n, 1), still),
    "paired": Kind(
        "(picture, annotation) × N/2, one modality a sentence",
        lambda n, m: (n // 2, 2),
        paired,
        divisor=2,
        modalities=1,
    ),
    "colorization": Kind("(grey, colour) × N/2", lambda n, m: (n // 2, 2), colorization, divisor=2),
    "inpainting": Kind("(with a hole, whole) × N/2", lambda n, m: (n // 2, 2), inpainting, divisor=2),
    "multimodal": Kind(
        "all modalities of one picture, × N // modalities", lambda n, m: (n // m, m), multimodal, modalities=2
    ),
    "category": Kind("4 categories × N/4 pictures", lambda n, m: (n, 1), still, CATEGORIZED, FourCategories, divisor=4),
    "video": Kind("N frames, 8 apart", lambda n, m: (1, n), video, CLIPS),
    "sequence": Kind("N frames, 1 to 4 apart", lambda n, m: (1, n), sequence, CLIPS),
    "multisequence": Kind(
        "2 clips × modalities × N frames", lambda n, m: (2, m * n), multisequence, CLIPS, modalities=2
    ),
    "object3d": Kind(
        "4 objects × (N/4 views, their N/4 masks): 2N pictures",
        lambda n, m: (4, n // 2),
        object3d,
        OBJECTS,
        divisor=4,
        needs=("mask",),
    ),
}


class Sentences:
    """The visual sentences of one kind that a source gives.

    index runs over endless passes, each of len(self) sentences in a new order. count: how many of them
    prepare.py writes, passes · len(self). All is a pure function of (seed, index).
    """

    def __init__(self, source, kind, modalities=(), pictures=16, side=None, seed=0, mirror=False, passes=1.0):
        if kind not in KINDS:
            raise UserError(f'unknown kind "{kind}" of visual sentence: one of {", ".join(KINDS)}')
        if side not in (None, source.side):
            raise UserError(f"{source.path}: was opened at {source.side} pixels, not {side}")
        self.source, self.kind = source, KINDS[kind]
        self.modalities, self.pictures, self.mirror = tuple(modalities), pictures, mirror
        self.name, self.seed = kind, seed
        items = [i for i, item in enumerate(source) if self.kind.requires.usable(item, pictures)]
        if need := self._unmet(items):
            offers = ", ".join(sorted(source.offers))
            raise UserError(f"{source.path}: {kind} sentences ({self.kind.holds}) need {need}; it offers {offers}")
        short = sum(1 < item.frames < pictures for item in source)
        if short and self.kind.requires is CLIPS:
            warn(f"{source.path}: {kind} sentences leave out {short} clips of fewer than {pictures} frames")
        self.items_per_sentence, self.pictures_per_item = self.kind.layout(pictures, len(self.modalities))
        self.order = self.kind.order(source, items, self.items_per_sentence)
        self.count = max(1, round(len(self) * passes))

    def _unmet(self, items):
        """What the kind needs that items, N or M do not offer, for an error; None: nothing."""
        kind, n, m = self.kind, self.pictures, len(self.modalities)
        # first: no usable item at all has no category either
        if len({self.source[i].category for i in items}) < kind.requires.categories:
            return kind.requires.name.format(n=n, views=n // 4)
        if n % kind.divisor:
            return f"data.pictures to be a multiple of {kind.divisor}, not {n}"
        if m < kind.modalities:
            return f"{kind.modalities} modalities or more, not {m}"
        wanted = kind.needs + (self.modalities if kind.modalities else ())
        offered = set.intersection(*(self.source[i].modalities for i in items))
        if missing := [modality for modality in wanted if modality not in offered]:
            return f"{', '.join(missing)} of every item"
        if kind.layout(n, m)[0] < 1:
            return f"data.pictures to be {m} or more, not {n}"
        return None

    def __len__(self):
        return self.order.sentences

    def sentence(self, index):
        """The pictures of one sentence in order: a list of (side, side, 3) uint8."""
        pictures = []
        for number in range(self.items_per_sentence):
            item, frames = self._choose(index, number)
            pictures += [self._render(item, frame, index, number) for frame in frames]
        return pictures

    def picture(self, index, number, k):
        """Picture k of item `number` of a sentence, alone: (side, side, 3) uint8."""
        item, frames = self._choose(index, number)
        return self._render(item, frames[k], index, number)

    def _choose(self, index, number):
        """Item `number` of a sentence, or what replaces it if it is broken, and its Frames."""
        wanted = self.order.choose(f"order of {self.name}", self.seed, index, number)
        pool = self.order.substitutes(self.source[wanted])
        for i in around(pool, bisect.bisect_left(pool, wanted)):
            item = self.source[i]
            shared, own = self._rng("sentence", index), self._rng("item", index, number)
            frames = self.kind.frames(item, self.pictures, self.modalities, shared, own)
            if self.source.readable(item, [(frame.modality, frame.number) for frame in frames]):
                return item, frames
        raise UserError(f"{self.source.path}: not one of its {len(pool)} pictures can be read")

    def _render(self, item, frame, index, number):
        random = self._rng("picture", index, number)  # one for all frames of an item: they share a motion
        motion = None if frame.number is None else random_motion(random)
        picture = item.picture(frame.modality, frame.number, motion)
        if frame.change:
            picture = frame.change(picture, random)
        if self.mirror and self._rng("mirror", index).random() < 0.5:  # the whole sentence
            picture = picture[:, ::-1].copy()
        return picture

    def _rng(self, stream, *key):
        return rng(f"{stream} of {self.name}", self.seed, *key)


# ---- settings --------------------------------------------------------------------------------


@dataclass(frozen=True)
class SourceSettings:
    """One [[data.sources]] table: where pictures come from and what sentences are made of them."""

    path: str = "emoji"  # "emoji", a folder, WebDataset .tar (a shell pattern names many), a text
    kind: str = "image"  # which visual sentence: a key of KINDS; or "text", which has no pictures
    modalities: tuple[str, ...] = ()  # which annotations, for the kinds that need them
    weight: float = 1.0  # of single pictures for the tokenizer; an LVM's mixture: passes, data.weights
    passes: float = 1.0  # how often its pictures are permuted into sentences; 0.5: half of them
    mirror: bool = False  # mirrors half of the sentences: a small set goes further (LVM: no)
    move: bool = False  # of captioned pictures: turns, shrinks and shifts each a little, on white

    def __post_init__(self):
        settings.one_of(self, (*KINDS, "text"), "kind")
        settings.within(self, 0, 1e9, "weight")
        settings.above(self, 0, "passes")
        settings.within(self, 0, 1e6, "passes")
        if self.kind == "text" and (self.modalities or self.mirror or (self.weight, self.passes) != (1, 1)):
            raise ValueError(f"source {self.path}: of kind text it takes nothing but a path")


@dataclass(frozen=True)
class DataSettings:
    """The [data] section of every configuration."""

    side: int = 256  # pictures are side × side pixels
    pictures: int = 16  # pictures in a visual sentence of most kinds: the N of KINDS
    sources: tuple[SourceSettings, ...] = ()
    held_out_fraction: float = 0.02  # of folders and tars, by hash of the name; emoji have their own
    tokenizer: str = ""  # the VQGAN of an LVM run: a run's folder or a published one
    text_tokenizer: str = ""  # of a run on text: "bytes", or a folder with a tokenizer's files
    vae: str = ""  # of a U-Net's run: the autoencoder whose latents it draws
    clip: str = ""  # of a U-Net's run: the CLIP whose text tower reads its prompts
    rows: tuple[str, ...] = ()  # rows files of tokenized sentences to train on, or patterns of them
    weights: tuple[float, ...] = ()  # how they are mixed; empty: all rows shuffled together (LVM)
    held_out: tuple[str, ...] = ()  # JSONL files for the held-out loss
    row_dtype: str = "auto"  # of the codes in both: int32 (LVM), int64 or uint16; auto: as their bytes tell
    workers: int = 2  # threads that prepare pictures

    def __post_init__(self):
        settings.within(self, 1, 2**14, "side")
        settings.within(self, 1, 2**16, "pictures")
        settings.within(self, 1, 1024, "workers")
        settings.fraction(self, "held_out_fraction")
        if self.sources and not any(source.weight for source in self.sources):
            raise ValueError("every source has weight 0: no picture could be drawn")
        check_weights(self.weights, self.rows)
        settings.one_of(self, ("auto", *DTYPES), "row_dtype")


def check_weights(weights, rows):
    if not weights:
        return
    if len(weights) != len(rows) or not all(0 <= w <= 1e9 for w in weights) or not any(weights):
        raise ValueError(f"weights {list(weights)}: {len(rows)} rows files need a number from 0 to 1e9 each")


# ---- batches of pictures -------------------------------------------------------------------------


def open_sources(data, split):
    """{path: its source} of all [[data.sources]]."""
    if not data.sources:
        raise UserError("no pictures: the configuration has no [[data.sources]]")
    if any(source.kind == "text" for source in data.sources):
        raise UserError("a source of kind text has no pictures: remove it from [[data.sources]]")
    opened = {}
    for source in data.sources:
        if source.path not in opened:
            opened[source.path] = open_source(source.path, data.side, split, data.held_out_fraction)
    return opened


def open_sentences(data, seed, split="train"):
    """The Sentences of each of the [[data.sources]]."""
    opened, sentences = open_sources(data, split), []
    for s in data.sources:
        source = opened[s.path]
        sizes = (data.pictures, data.side)
        sentences.append(Sentences(source, s.kind, s.modalities, *sizes, seed, s.mirror, s.passes))
    return sentences


class PictureRows:
    """Single pictures for the tokenizer, out of the same visual sentences: with holes, masks and greys."""

    def __init__(self, data, seed, split="train"):
        self.seed = seed
        self.sentences = open_sentences(data, seed, split)
        weights = np.array([source.weight for source in data.sources])
        self.cumulative_weights = np.cumsum(weights / weights.sum())

    def batch(self, number, rows):
        """Rows `rows` (a range) of batch `number`: (len(rows), side, side, 3) uint8."""
        return np.stack([self._picture(number, row) for row in rows])

    def _picture(self, number, row):
        random = rng("pictures", self.seed, number, row)
        which = int(np.searchsorted(self.cumulative_weights, random.random(), side="right"))
        sentences = self.sentences[min(which, len(self.sentences) - 1)]
        index = int(random.integers(sentences.count))
        item = int(random.integers(sentences.items_per_sentence))
        return sentences.picture(index, item, int(random.integers(sentences.pictures_per_item)))


class HeldOutPictures:
    """The held-out pictures of all [[data.sources]], opened once, at a run's start.

    A UserError at opening names the source that has none: a run can say so, and go on without.
    """

    def __init__(self, data):
        self.entries = []  # (source, index in it)
        for source in open_sources(data, "held_out").values():
            self.entries += [(source, i) for i in range(len(source))]

    def __len__(self):
        return len(self.entries)

    def take(self, n):
        """n pictures, always the same, evenly spaced in the sources: (n, side, side, 3) uint8."""
        pictures = []
        for number in range(n):
            source, start = self.entries[number * len(self) // n]
            pictures.append(first_readable(source, start).image)
        return np.stack(pictures)


class CaptionRows:
    """Captioned pictures: every pair once in a pass, each pass in a new order."""

    def __init__(self, data, batch_size, seed, split="train"):
        self.seed, self.batch_size = seed, batch_size
        opened = open_sources(data, split)
        self.pairs = []  # (Item with captions, whether to move its picture)
        for s in data.sources:
            moves = s.move and split == "train"
            self.pairs += [(item, moves) for item in opened[s.path].captioned()]
        if not self.pairs:
            raise UserError('no captions: [[data.sources]] must name pictures with NAME.txt beside them, or "emoji"')

    def __len__(self):
        return len(self.pairs)

    def batch(self, number, rows):
        """Rows `rows` (a range) of batch `number`: (n, side, side, 3) uint8, n captions."""
        pairs = [self.pair(number * self.batch_size + row) for row in rows]
        pictures, captions = zip(*pairs, strict=True)
        return np.stack(pictures), list(captions)

    def pair(self, position):
        """The picture and caption at one position of the endless sequence of passes."""
        for place in around(range(len(self)), position % len(self)):
            in_pass = position - position % len(self) + place
            (i,) = shuffled("captions", (self.seed,), len(self), [in_pass])
            item, moves = self.pairs[i]
            if item.source.readable(item):
                image = item.image
                if moves:
                    image = jitter(image, rng("jitter", self.seed, position))
                return image, pick(item.captions, rng("one of the captions", self.seed, position))
        raise UserError(f"not one of the {len(self)} captioned pictures can be read")


# ---- rows of codes -----------------------------------------------------------------------------


class TokenRows:
    """Rows files as batches of (inputs, targets): one endless stream of tokens, cut into windows.

    The rows of an epoch are permuted and laid end to end without separators, epoch after epoch.
    Batch n covers stream[n·B·T : (n+1)·B·T + 1]: its first B·T tokens are the inputs, the last
    B·T the targets, both as (B, T). Any window is found from the sums of row lengths: a run resumes
    at any batch.

    Rows lie in pools. Without `weights` there is one, and an epoch is all of it. With them each
    file is a pool: of R rows in all it gives round(R·wᵢ/Σw) to every epoch, and continues where the
    last epoch stopped; its rows come round again and again, in a new order each time.

    No order is written down (chance.shuffled). If all rows have equally many tokens, any window is
    found at once. If not, the lengths of the rows before it are summed up, of its own epoch only
    (with weights: of all), `block` rows at a time, and the sums are kept.

    rows      RowsFiles: all readable rows; skipped: how many rows are broken and left out
    pools     [(its first row, how many it has, how many of them make an epoch)]
    tokens    in all rows together
    """

    def __init__(self, paths, context, batch_size, seed, weights=(), vocab_size=None, shuffle=True, dtype="auto"):
        if not paths:
            raise UserError("no rows to read: set data.rows (python prepare.py tokenize writes them)")
        try:
            check_weights(weights, paths)
        except ValueError as error:
            raise UserError(f"[data] {error}") from None
        self.context, self.batch_size, self.seed, self.shuffle = context, batch_size, seed, shuffle
        self.rows = RowsFiles(itertools.chain.from_iterable(map(rows_files, paths)), vocab_size, dtype)
        self.skipped, self.tokens = self.rows.skipped, self.rows.tokens
        self.weighted = bool(weights)
        self.pools = self._weighted_pools(paths, weights) if weights else [(0, len(self.rows), len(self.rows))]
        self.ends = np.cumsum([count for _, _, count in self.pools])  # of the pools' shares of an epoch
        self.block = min(2**16, int(self.ends[-1]))
        self._block_ends = functools.lru_cache(4)(self._sum_block)
        self._block_starts = functools.lru_cache(4)(lambda epoch: [epoch * self.tokens])
        self._lock = threading.Lock()

    def _weighted_pools(self, entries, weights):
        shares = []  # of each file: an entry's weight, divided evenly among its files
        for entry, weight in zip(entries, weights, strict=True):
            count = len(rows_files(entry))
            shares += [weight / count] * count
        pools = []
        for number, share in enumerate((np.array(shares) / sum(shares)).tolist()):
            first, end = self.rows.first[number : number + 2].tolist()
            if share and first == end:
                raise UserError(f"{self.rows.paths[number]}: no readable rows in it, but it has a weight")
            pools.append((first, end - first, max(1, round(len(self.rows) * share)) if share else 0))
        return pools

    def order(self, places):
        """Which rows stand at these places (n,) of the endless sequence of epochs: (n,) int64."""
        epochs, picks = np.divmod(places, self.ends[-1])
        if self.shuffle:
            picks = shuffled("epoch of rows", (self.seed,), int(self.ends[-1]), places)
        which, rows = np.searchsorted(self.ends, picks, side="right"), np.empty(len(places), np.int64)
        for number in np.unique(which).tolist():
            first, size, count = self.pools[number]
            from_pool = which == number
            # where they stand in the pool's own endless passes, of which an epoch takes `count` rows
            positions = epochs[from_pool] * count + picks[from_pool] - (self.ends[number] - count)
            if self.weighted and self.shuffle:
                positions = shuffled("rows of a pool", (self.seed, number), size, positions)
            rows[from_pool] = first + positions % size
        return rows

    def _locate(self, position):
        """Position in the stream → (place of its row in the sequence of epochs, position in the row)."""
        if self.rows.shortest == self.rows.longest:
            return divmod(position, self.rows.longest)
        epoch = 0 if self.weighted else position // self.tokens  # without weights, epochs have one length
        with self._lock:
            starts = self._block_starts(epoch)  # of its blocks, positions in the stream
            while starts[-1] <= position:
                starts.append(starts[-1] + int(self._block_ends(epoch, len(starts) - 1)[-1]))
            block = bisect.bisect_right(starts, position) - 1
        ends, position = self._block_ends(epoch, block), position - starts[block]
        row = int(np.searchsorted(ends, position, side="right"))
        return int(epoch * self.ends[-1]) + block * self.block + row, position - (int(ends[row - 1]) if row else 0)

    def _sum_block(self, epoch, block):
        """The running sum of the lengths of the rows in a block of an epoch: (self.block,) int64."""
        places = epoch * self.ends[-1] + block * self.block + np.arange(self.block)
        return np.cumsum(self.rows.lengths(self.order(places)))

    def stream(self, start, count):
        """Tokens start … start + count of the endless stream: (count,) int64."""
        tokens, filled, some = np.empty(count, np.int64), 0, min(256, self.block)
        place, skipped = self._locate(start)
        while filled < count:
            for row in self.order(place + np.arange(some)).tolist():
                codes = self.rows[row][skipped:][: count - filled]
                tokens[filled : filled + len(codes)] = codes
                filled, skipped = filled + len(codes), 0
                if filled == count:
                    break
            place += some
        return tokens

    def batch(self, number, rows):
        """Windows `rows` (a range within range(B)) of batch `number`: inputs, targets (n, T) int64."""
        size = len(rows) * self.context
        first = (number * self.batch_size + rows.start) * self.context
        window = self.stream(first, size + 1)
        return window[:-1].reshape(-1, self.context), window[1:].reshape(-1, self.context)
