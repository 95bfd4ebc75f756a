"""Documents: texts and pictures in one sequence, and which of its tokens are to be learned.

DreamLLM reads one row of tokens in which pictures have their places. A picture to *look at* is a span of as many
<im_patch> as CLIP has patches; a picture to *draw* is a span of as many as there are dream queries. The model
overwrites the embeddings of both: with CLIP's features, with its queries. What is trained where is said by two
things alone: the labels (a token to predict, or -100), and which pictures come along to be drawn.

    IMG   = <im_start> <im_patch> × patches <im_end>              the picture goes into `images`, for CLIP
    DREAM = <dream_start> <im_patch> × queries <dream_end>        … into `images_dm`, for the U-Net to draw

    sample                  sequence                                  labels
    pair, to understand     <s> IMG caption </s>                      <s>, caption, </s>
    pair, to create         <s> caption DREAM </s>                    none: the U-Net's loss alone
    document                <s> (text DREAM IMG) × n </s>             <s>, texts, <dream_start>, </s>
    instructed document     prompt (text DREAM IMG) × n </s>          texts, <dream_start>, </s>
    conversation            <image> → IMG, <dream> → DREAM IMG        answers and their </s>, spans left out
    image → image           <s> IMG DREAM </s>                        none

Only documents have <dream_start> among their labels: they alone teach *when* to draw. A picture drawn is then
looked at (DREAM IMG): in training the true one, in sample.py the model's own. (The paper's <dream> is <dream_start>
here, as in the published code; there <dream> and <image> only mark places in raw texts.)

    emoji | folder | tar | rows.jsonl ──▶ source ──▶ Pair | Document | Conversation      texts, names of pictures
                                                        │ Writer
                                                        ▼
                                          Sample: tokens, labels (T,), the pictures of its spans in reading order
                                                        │ DocumentRows.batch
                                                        ▼
         tokens, labels (B, T) int64    images (N, side, side, 3), images_dm (M, side, side, 3) uint8

As in data.py, nothing keeps a state: a batch is a pure function of (seed, number, row). numpy and Pillow only.
Paper: Dong et al. 2023 (arXiv 2309.11499), section 3.2 (interleaved sequences), 4.1 and appendix (its data).
Row formats: MMC4 (Zhu et al. 2023, arXiv 2304.06939), OBELICS (Laurençon et al. 2023, arXiv 2306.16527),
LLaVA (Liu et al. 2023, arXiv 2304.08485).

    python prepare.py check rows.jsonl --images FOLDER       names every row that cannot be used

To see the idea first, read `Writer`. Read next: model.py, where `DreamLLM` fills the spans.
"""

import collections
import copy
import functools
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from support.pictures import jitter
from support.settings import UserError
from support.sources import (
    DREAM,
    IMAGE,
    Conversation,
    Document,
    FilePairs,
    JsonRows,
    Pair,
    check_count,
    frame_messages,
    is_placeholder,
    open_source,
    warn,
)
from support.tokenizer import TEMPLATES, Special

IGNORED = -100  # the label of a token that is not to be predicted

KINDS = {
    "pair": "picture and caption: to understand or to create it, by a coin",
    "document": "texts with pictures between them",
    "instructed": "the same, in answer to an instruction",
    "conversation": "questions and answers, with pictures",
    "image": "a picture, to be drawn again",
}


@dataclass(frozen=True)
class DocumentSource:
    """One [[data.sources]] table of a DreamLLM's configuration."""

    path: str = "emoji"  # "emoji", a folder, WebDataset .tar, or rows in .jsonl or .json (a shell pattern names many)
    kind: str = "pair"  # which sample: a key of KINDS
    weight: float = 1.0  # share of the samples that are drawn from it
    images: str = ""  # the folder of the pictures that rows name; empty: the one that the rows lie in
    understand: bool = True  # whether its pictures are looked at …
    create: bool = True  # … and drawn
    move: bool = False  # of emoji: those looked at are each time a little turned, shrunk and shifted, on white

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f'source {self.path}: unknown kind "{self.kind}": one of {", ".join(KINDS)}')
        if self.weight < 0:
            raise ValueError(f"source {self.path}: weight must be at least 0")
        if self.move and self.path != "emoji":
            raise ValueError(f"source {self.path}: move is for emoji only")
        if not (self.understand or self.create):
            raise ValueError(f"source {self.path}: pictures neither to understand nor to create teach nothing")


@dataclass(frozen=True)
class DocumentSettings:
    """The [data] section of a DreamLLM's configuration."""

    sources: tuple[DocumentSource, ...] = ()
    text_tokenizer: str = ""  # "bytes", or a folder with a tokenizer's files; empty: the language model's, or init's
    template: str = "vicuna"  # how questions and answers are framed: a key of tokenizer.TEMPLATES
    system: str | None = None  # what the template says before the first question; absent: its usual words
    held_out_fraction: float = 0.02  # of files, by hash of a picture's name; emoji have their own split
    workers: int = 2  # threads that prepare batches

    def __post_init__(self):
        if self.workers < 1:
            raise ValueError("workers must be at least 1")
        if not 0 <= self.held_out_fraction < 1:
            raise ValueError(f"held_out_fraction {self.held_out_fraction} must lie in [0, 1)")
        if self.sources and not any(source.weight for source in self.sources):
            raise ValueError("every source has weight 0: no sample could be drawn")
        if self.template not in TEMPLATES:
            raise ValueError(f'unknown template "{self.template}": one of {", ".join(TEMPLATES)}')


# ---- what a source says, and what becomes of it ------------------------------------------------
# A picture is whatever its source can open: a name, an Item, a Pillow image. Only what is written gets opened.


@dataclass(frozen=True)
class Sample:
    tokens: np.ndarray  # (T,) int64
    labels: np.ndarray  # (T,) int64: the token itself, or -100; the model shifts them
    images: list  # a picture for each IMG, in reading order
    images_dm: list  # a picture for each DREAM


# ---- the sequences -------------------------------------------------------------------------------


def chat_parts(messages, pictures=(), template="vicuna", system=None):
    """A chat → [text, Special or picture, …]: the prompt of an answer, for `DreamLLM.generate_document`.

    `messages` as in Tokenizer.encode_chat; each "<image>" (or "<dream>") in them becomes the next of `pictures`.
    """
    parts = frame_messages(messages, template, system)
    check_count(parts, pictures)
    left = iter(pictures)
    return [next(left) if is_placeholder(part) else part for part in parts]


class Writer:
    """Writes the six sequences above, none longer than `context` tokens.

    patches, queries   tokens of a picture looked at, and of one drawn
    understand, create which of the two is trained: documents keep one span of each picture where one is off
    template, system   how prompts and conversations are framed (system None: the template's usual words)

    A span is never cut. What does not fit is left out from the end: the rest of a caption; of a document whole
    texts and pictures; of a conversation whole turns. ValueError where nothing is left to learn from.
    """

    def __init__(
        self, tokenizer, patches, queries, context, understand=True, create=True, template="vicuna", system=None
    ):
        self.tokenizer, self.context, self.template, self.system = tokenizer, context, template, system
        self.understand, self.create = understand, create
        names = ("[PAD]", "<im_start>", "<im_patch>", "<im_end>", "<dream_start>", "<dream_end>")
        if absent := [name for name in names if name not in tokenizer.special]:
            raise UserError(f"the tokenizer has no {absent[0]}: DreamLLM's tokens must be added to it")
        self.pad, im_start, im_patch, im_end, dream_start, dream_end = (tokenizer.special[name] for name in names)
        self.bos, self.eos = ([] if i is None else [i] for i in (tokenizer.bos, tokenizer.eos))
        self.img = [im_start, *[im_patch] * patches, im_end]
        self.dream = [dream_start, *[im_patch] * queries, dream_end]
        if context < (least := 2 + len(self.img) + len(self.dream)):
            raise UserError(f"a context of {context} tokens is too short: one picture alone takes {least}")
        self._ids(self._prompt("?"))  # a template whose tokens are absent shall be found here

    def only(self, understand, create):
        """This writer, or one that leaves out what is not wanted of a source."""
        understand, create = understand and self.understand, create and self.create
        if (understand, create) == (self.understand, self.create):
            return self
        if not (understand or create):
            raise UserError("a source's understand and create leave nothing of what the stage is to learn")
        writer = copy.copy(self)
        writer.understand, writer.create = understand, create
        return writer

    def pair(self, caption, picture, coin):
        """A captioned picture; with both directions on, a coin in [0, 1) below 0.5 asks to create."""
        if self.create and (coin < 0.5 or not self.understand):
            text = self._text(caption, len(self.dream))
            return _sample([(self.bos + text + self.dream + self.eos, False)], images_dm=[picture])
        text = self._text(caption, len(self.img))
        return _sample([(self.bos, True), (self.img, False), (text + self.eos, True)], images=[picture])

    def document(self, pieces, prompt=None):
        """[(text, picture or None), …] in reading order; with a prompt, as the answer to that instruction.

        It ends before the first text or picture that would not fit.
        """
        parts = [(self.bos, True)] if prompt is None else [(self._ids(self._prompt(prompt)), False)]
        begin = length = len(parts[0][0])
        shown = []
        for unit, picture in self._units(pieces):
            size = sum(len(ids) for ids, _ in unit)
            if length + size + len(self.eos) > self.context:
                break
            parts, length = parts + unit, length + size
            shown += [] if picture is None else [picture]
        if length == begin:
            raise ValueError(f"nothing of it fits into {self.context} tokens")
        parts.append((self.eos, True))
        return _sample(parts, shown if self.understand else [], shown if self.create else [])

    def _units(self, pieces):
        """The indivisible parts of a document: ([(ids, whether they are learned), …], picture or None)."""
        for text, picture in pieces:
            yield [(self._text(text), True)], None
            if picture is not None:
                draw = [(self.dream[:1], True), (self.dream[1:], False)] if self.create else []
                yield draw + ([(self.img, False)] if self.understand else []), picture

    def conversation(self, messages, pictures):
        """Questions and answers; only answers are learned, and no part of a picture.

        What an answer adds to the prompt before it is what the model is to say: so the labels are found in
        any template, and text is tokenized as one piece, as it will be when the model is asked.
        """
        check_count(frame_messages(messages, self.template, self.system), pictures)
        tokens, answers, parts = [], [], []
        for end, message in enumerate(messages, 1):
            if message["role"] != "assistant":
                continue
            prompt = self._ids(frame_messages(messages[: end - 1], self.template, self.system))
            longer = frame_messages(messages[:end], self.template, self.system)
            if len(ids := self._ids(longer)) > self.context:
                break
            parts, tokens = longer, ids
            answers.append((_common(prompt, tokens), tokens))
        if not answers:
            raise ValueError(f"its first question and answer do not fit into {self.context} tokens")
        tokens = np.array(tokens, np.int64)
        labels = np.full(len(tokens), IGNORED)
        for start, said in answers:  # what followed may have replaced its end: "plain" has one </s> only, the last
            end = _common(said, tokens.tolist())
            labels[start:end] = tokens[start:end]
        labels[np.isin(tokens, self.img + self.dream)] = IGNORED
        shown = list(zip(filter(is_placeholder, parts), pictures, strict=False))  # fewer, if turns were left out
        images = [picture for place, picture in shown if place == IMAGE or self.understand]
        return Sample(tokens, labels, images, [picture for place, picture in shown if place == DREAM and self.create])

    def image_to_image(self, source, target):
        """A picture to look at, and one to draw from it."""
        return _sample([(self.bos + self.img + self.dream + self.eos, False)], [source], [target])

    def _text(self, text, span=0):
        """Ids of a text, stripped; if it stands beside a span, no more of them than fit."""
        ids = self.tokenizer.encode(text.strip())
        return ids[: self.context - span - len(self.bos + self.eos)] if span else ids

    def _prompt(self, prompt):
        return frame_messages([{"role": "user", "content": prompt}], self.template, self.system)

    def _ids(self, parts):
        """What `frame_messages` gives → ids, spans in the places of pictures."""
        ids, follows = [], False
        for part in parts:
            if is_placeholder(part):
                ids += self.dream if part == DREAM and self.create else []
                ids += self.img if part == IMAGE or self.understand else []
            elif isinstance(part, Special):
                ids += self.tokenizer.special_ids(part)
                continue
            else:
                ids += self.tokenizer.encode(part, follows=follows)
            follows = True
        return ids


def _sample(parts, images=(), images_dm=()):
    """[(ids, whether they are learned), …] and the pictures of their spans as a Sample."""
    tokens = np.array([i for ids, _ in parts for i in ids], np.int64)
    labels = np.array([i if learned else IGNORED for ids, learned in parts for i in ids], np.int64)
    return Sample(tokens, labels, list(images), list(images_dm))


def _common(a, b):
    """How many items two lists share at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# ---- emoji: what their names and categories say ----------------------------------------------------

WHAT, CATEGORY, IS_IT = "What is this?", "Which category is it?", "Is it a {name}?"
DRAW, SHOW = "Draw {name}.", "Show {category}."


class EmojiTexts:
    """Samples of one kind from emoji, with no labelling: they have a name, a category, and neighbours in order."""

    path = "emoji"

    def __init__(self, emoji, kind):
        self.emoji, self.kind = emoji, kind
        self.shelves = collections.defaultdict(list)  # category → its items in order
        for index, item in enumerate(emoji):
            self.shelves[item.category].append(index)
        self.places = {index: place for shelf in self.shelves.values() for place, index in enumerate(shelf)}
        self.names = {c: list(dict.fromkeys(emoji[i].caption for i in s)) for c, s in self.shelves.items()}

    def __len__(self):
        return len(self.emoji)

    def where(self, index):
        return f"emoji {self.emoji[index].name}"

    def open(self, item):
        return Image.fromarray(item.image)

    def read(self, index, rng):
        item = self.emoji[index]
        match self.kind:
            case "document":
                first, *rest = self.neighbours(index, rng)
                pieces = [(f"{first.category.lower()}: {first.caption}", first)]
                return Document(pieces + [(other.caption, other) for other in rest])
            case "instructed":
                pieces = [(other.caption, other) for other in self.neighbours(index, rng)]
                return Document(pieces, SHOW.format(category=item.category.lower()))
            case "conversation":
                return self.exchange(index, rng)
        return Pair(item.caption, item)

    def neighbours(self, index, rng):
        """2 to 4 items in a row that stand in the same category, this one among them."""
        shelf = self.shelves[self.emoji[index].category]
        count = min(int(rng.integers(2, 5)), len(shelf))
        start = min(self.places[index], len(shelf) - count)
        return [self.emoji[i] for i in shelf[start : start + count]]

    def exchange(self, index, rng):
        """One question about this emoji, or the wish to have it drawn, and the answer."""
        item = self.emoji[index]
        match rng.integers(4):
            case 0:
                question, answer = WHAT, item.caption
            case 1:
                question, answer = CATEGORY, item.category.lower()
            case 2:
                question, answer = self.yes_or_no(index, rng)
            case _:  # in a conversation <dream_start> is no label: in an instructed document it is learned
                return Document([("", item)], DRAW.format(name=item.caption))
        messages = [{"role": "user", "content": f"{IMAGE}\n{question}"}, {"role": "assistant", "content": answer}]
        return Conversation(messages, [item])

    def yes_or_no(self, index, rng):
        """("Is it a …?", "yes" or "no"), as often one as the other; every second wrong name is of its category."""
        item = self.emoji[index]
        if rng.random() < 0.5:
            return IS_IT.format(name=item.caption), "yes"
        near = [name for name in self.names[item.category] if name != item.caption]
        far = [name for c, names in self.names.items() if c != item.category for name in names if name != item.caption]
        names = (near or far) if rng.random() < 0.5 else (far or near)
        return IS_IT.format(name=names[int(rng.integers(len(names)))]), "no"


# ---- folders and tars of captioned pictures --------------------------------------------------------


# ---- rows in JSON ------------------------------------------------------------------------------------


# ---- batches -------------------------------------------------------------------------------------------


def clip_view(picture, side):
    """A Pillow image as CLIP sees it, (side, side, 3) uint8: what clip.preprocess does, before it normalises."""
    return _square(picture, side, Image.Resampling.BICUBIC, math.floor)


def draw_view(picture, side):
    """A Pillow image as it is to be drawn, (side, side, 3) uint8: torchvision's Resize and CenterCrop."""
    return _square(picture, side, Image.Resampling.BILINEAR, round)


def _square(picture, side, resample, whole):
    """Shorter side to `side`, the middle cut out; where it lies half a pixel off, the two differ."""
    width, height = picture.size
    short = min(width, height)
    picture = picture.resize((side * width // short, side * height // short), resample)
    left, top = whole((picture.width - side) / 2), whole((picture.height - side) / 2)
    return np.asarray(picture.crop((left, top, left + side, top + side)))


MOST_SKIPPED = 1000  # rows one after the other: then it is not a few that are broken


class DocumentRows:
    """Samples of all sources, mixed by weight, as batches.

    A batch is of one source: its samples are of like length, so that little is spent on padding. An epoch has
    about as many samples as there are rows; source i gives the share wᵢ / Σw of its batches, taken onward from
    its own endless passes, each in a new order. What cannot be used (a row, its picture, a text that is
    too long) is named once, counted in `skipped`, and replaced by the next row of its source.
    """

    def __init__(self, settings, writer, clip_side, draw_side, batch_size, seed, split="train"):
        if not settings.sources:
            raise UserError("nothing to read: the configuration has no [[data.sources]]")
        self.batch_size, self.seed, self.clip_side, self.draw_side = batch_size, seed, clip_side, draw_side
        self.pad, self.skipped, self.reported = writer.pad, 0, set()
        tables = [table for table in settings.sources if table.weight]
        self.writers = [writer.only(table.understand, table.create) for table in tables]
        opened = functools.cache(lambda path: open_source(path, None, split, settings.held_out_fraction))
        self.sources = [self._open(table, opened, split, settings.held_out_fraction) for table in tables]
        self.moves = [table.move and split == "train" for table in tables]
        total, weights = sum(map(len, self.sources)), [table.weight for table in tables]
        batches = [max(1, round(total * weight / sum(weights) / batch_size)) for weight in weights]
        self.take = [count * batch_size for count in batches]  # samples of each source in an epoch
        self._epoch = functools.lru_cache(2)(self._permute)

    def _open(self, table, opened, split, held_out_fraction):
        if table.path == "emoji":
            return EmojiTexts(opened("emoji"), table.kind)
        if table.path.endswith((".jsonl", ".json")):
            if split not in ("train", "held_out"):
                raise UserError(f'{table.path}: it has no split "{split}": train or held_out')
            return JsonRows(table.path, table.kind, table.images, split, held_out_fraction, self._skip)
        return FilePairs(opened(table.path), table.kind)

    def __len__(self):
        """Samples in an epoch."""
        return sum(self.take)

    def batch(self, number, rows):
        """Rows `rows` (a range within range(batch_size)) of batch `number`, from their numbers only.

        tokens, labels   (rows, T) int64, on the right filled up with [PAD] and -100
        images           (N, clip_side, clip_side, 3) uint8: all pictures to look at, in reading order
        images_dm        (M, draw_side, draw_side, 3) uint8: all pictures to draw; N and M may be 0
        """
        samples = [self.sample(number * self.batch_size + row) for row in rows]
        length = max(len(sample.tokens) for sample in samples)
        tokens = np.full((len(samples), length), self.pad)
        labels = np.full((len(samples), length), IGNORED)
        for i, sample in enumerate(samples):
            tokens[i, : len(sample.tokens)], labels[i, : len(sample.labels)] = sample.tokens, sample.labels
        images = [clip_view(picture, self.clip_side) for sample in samples for picture in sample.images]
        drawn = [draw_view(picture, self.draw_side) for sample in samples for picture in sample.images_dm]
        return {
            "tokens": tokens,
            "labels": labels,
            "images": np.array(images, np.uint8).reshape(-1, self.clip_side, self.clip_side, 3),
            "images_dm": np.array(drawn, np.uint8).reshape(-1, self.draw_side, self.draw_side, 3),
        }

    def sample(self, position):
        """The Sample at one position of the endless sequence of epochs, its pictures opened."""
        epoch, place = divmod(position, len(self))
        which, index = self._epoch(epoch)[place].tolist()
        source = self.sources[which]
        for step in range(min(len(source), MOST_SKIPPED)):
            row = (index + step) % len(source)
            try:
                return self._write(which, row, np.random.default_rng((self.seed, position, 7)))
            except (UserError, ValueError, OSError) as error:
                where, reason = source.where(row), str(error)
                self._skip(reason if reason.startswith(where) else f"{where}: {reason}")
        raise UserError(f"{source.path}: not one of {step + 1} rows can be used; the last: {reason}")

    def _write(self, which, row, rng):
        source, writer = self.sources[which], self.writers[which]
        coin = rng.random()
        match source.read(row, rng):
            case Pair(picture=picture) if source.kind == "image":
                sample = writer.image_to_image(picture, picture)
            case Pair(caption, picture):
                sample = writer.pair(caption, picture, coin)
            case Document(pieces, prompt):
                sample = writer.document(pieces, prompt)
            case Conversation(messages, pictures):
                sample = writer.conversation(messages, pictures)
        wanted = {id(picture): picture for picture in sample.images + sample.images_dm}  # most are in both
        opened = {key: source.open(picture) for key, picture in wanted.items()}
        images, images_dm = ([opened[id(p)] for p in pictures] for pictures in (sample.images, sample.images_dm))
        if self.moves[which]:
            images = [Image.fromarray(jitter(np.asarray(picture), rng)) for picture in images]
        return Sample(sample.tokens, sample.labels, images, images_dm)

    def _permute(self, epoch):
        """(samples, 2): source and row of each sample of an epoch."""
        picked = np.concatenate([self._onward(i, epoch * take, take) for i, take in enumerate(self.take)])
        batches = picked.reshape(-1, self.batch_size, 2)
        return np.random.default_rng((self.seed, epoch, 8)).permutation(batches).reshape(-1, 2)

    def _onward(self, which, start, count):
        """`count` rows of one source, from place `start` of its endless stream of passes: (count, 2)."""
        size, picked = len(self.sources[which]), []
        while count:
            number, place = divmod(start, size)
            order = np.random.default_rng((self.seed, number, which, 9)).permutation(size)[place : place + count]
            picked.append(order)
            start, count = start + len(order), count - len(order)
        rows = np.concatenate(picked)
        return np.stack([np.full_like(rows, which), rows], axis=1)

    def _skip(self, reason):
        if reason not in self.reported:
            self.reported.add(reason)
            self.skipped += 1
            warn(f"skipped {reason}")


# ---- python prepare.py check --------------------------------------------------------------------------------
