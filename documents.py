"""Documents: texts and pictures in one sequence, and which of its tokens are to be learned.

DreamLLM reads one row of tokens in which each picture is a span of placeholders. A picture to
*understand* is a span of as many <im_patch> as CLIP has patches; a picture to *create* is a span of
as many as there are dream queries. The model replaces the embeddings of both: by CLIP's features,
by its queries. Two things decide what is trained: the labels (a token to predict, or -100), and
which pictures the U-Net is to create.

    IMG   = <im_start> <im_patch> × patches <im_end>           its picture goes into `images`
    DREAM = <dream_start> <im_patch> × queries <dream_end>     its picture goes into `images_dm`

    sample                sequence                             labels
    pair, to understand   <s> IMG caption </s>                 caption, </s>
    pair, to create       <s> caption DREAM </s>               none: the U-Net's loss alone
    document              <s> (text DREAM IMG) × n </s>        texts, <dream_start>, </s>
    instructed document   prompt (text DREAM IMG) × n </s>     texts, <dream_start>, </s>
    conversation          <image> → IMG, <dream> → DREAM IMG   answers, their </s>; no span
    image → image         <s> IMG DREAM </s>                   none

(<s> is a label too, as in the published code; nothing stands before it, so it is never predicted.)

Only documents have <dream_start> among their labels: only they teach *when* to create a picture.
A created picture is then read (DREAM IMG): in training the true one, in sample.py the model's own.
(The paper's <dream> is <dream_start> here, as in the published code; there <dream> and <image>
only mark the places of pictures in raw texts.)

    emoji | folder | tar | rows.jsonl
      │ a source of rows (support/rows.py)
      ▼
    Picture | Pair | Document | Conversation
      │ Writer.write
      ▼
    Sample: tokens, labels (T,), the pictures of its spans in reading order
      │ DocumentRows.batch
      ▼
    tokens, labels (B, T) int64; images (N, side, side, 3), images_dm (M, side, side, 3) uint8

B samples in a batch, T tokens in the longest of them, N pictures to understand and M to create in
all of them. As in data.py, nothing keeps a state: a batch is a pure function of (seed, number,
row). Only numpy and Pillow are needed.

Paper: Dong et al. 2023 (arXiv 2309.11499), section 3.2 (interleaved sequences), 4.1 and appendix
(its data).
"""

import bisect
import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from support.chance import rng, shuffled
from support.chat import TEMPLATES
from support.formats import (
    DREAM,
    IMAGE,
    Conversation,
    Document,
    Pair,
    Picture,
    check_count,
    frame_messages,
    is_placeholder,
)
from support.pictures import jitter, square
from support.rows import EmojiTexts, FilePairs, JsonRows, names_rows
from support.settings import UserError, fraction, one_of, within
from support.sources import Skipping, open_source

IGNORED = -100  # the label of a token that is not to be predicted
DREAM_TOKENS = "[PAD]", "<im_start>", "<im_patch>", "<im_end>", "<dream_start>", "<dream_end>"


@dataclass(frozen=True)
class Sample:
    tokens: np.ndarray  # (T,) int64
    labels: np.ndarray  # (T,) int64: the token itself, or IGNORED; the model shifts them
    images: list  # a picture for each IMG, in reading order
    images_dm: list  # a picture for each DREAM


# ---- the sequences -------------------------------------------------------------------------------


def chat_parts(messages, pictures=(), template="vicuna", system=None):
    """A chat → [text, Special or picture, …]: a prompt for `DreamLLM.generate_document`.

    messages: as in Tokenizer.encode_chat; each "<image>" (or "<dream>") in them becomes the next of
    `pictures`.
    """
    parts = frame_messages(messages, template, system)
    check_count(parts, pictures)
    remaining = iter(pictures)
    return [next(remaining) if is_placeholder(part) else part for part in parts]


class Writer:
    """Writes the six sequences above, none longer than `context` tokens.

    patches, queries     tokens of a picture to understand, and of one to create
    understand, create   which of the two is trained; if one is off, documents keep one span of each
                         picture. In conversations <image> is always read, and with create off
                         <dream> is read too; image → image always has both
    template, system     how prompts and conversations are framed (system None: the template's usual
                         text)

    A span is never cut. What does not fit is left out from the end: the rest of a caption; of a
    document whole texts and pictures; of a conversation whole turns. ValueError if nothing is left
    to learn from.
    """

    def __init__(
        self,
        tokenizer,
        patches,
        queries,
        context,
        understand=True,
        create=True,
        template="vicuna",
        system=None,
    ):
        self.tokenizer, self.context = tokenizer, context
        self.understand, self.create = understand, create
        self.template, self.system = template, system
        ids = tokenizer.special
        for name in DREAM_TOKENS:
            if name not in ids:
                raise UserError(f"the tokenizer has no {name}: DreamLLM's tokens must be added")
        self.pad = ids["[PAD]"]
        self.bos = [] if tokenizer.bos is None else [tokenizer.bos]
        self.eos = [] if tokenizer.eos is None else [tokenizer.eos]
        patch = ids["<im_patch>"]
        self.img = [ids["<im_start>"], *[patch] * patches, ids["<im_end>"]]
        self.dream = [ids["<dream_start>"], *[patch] * queries, ids["<dream_end>"]]
        least = 2 + len(self.img) + len(self.dream)
        if context < least:
            short = f"a context of {context} tokens is too short"
            raise UserError(f"{short}: one picture alone takes {least}")
        self._prompt("?")  # fails now, not at the first sample, if it lacks a token of the template

    def restricted_to(self, understand, create):
        """This writer, or one that trains only what is also wanted of a source."""
        understand, create = understand and self.understand, create and self.create
        if (understand, create) == (self.understand, self.create):
            return self
        if not (understand or create):
            nothing = "leave nothing of what the stage is to learn"
            raise UserError(f"a source's understand and create {nothing}")
        writer = copy.copy(self)
        writer.understand, writer.create = understand, create
        return writer

    def write(self, row, uniform):
        """Picture | Pair | Document | Conversation → Sample.

        `uniform`, a random number in [0, 1), decides whether a pair is to create or to understand.
        """
        match row:
            case Pair():
                return self.pair(row.caption, row.picture, uniform)
            case Picture():
                return self.image_to_image(row.picture, row.picture)
            case Document():
                return self.document(row.pieces, row.prompt)
            case Conversation():
                return self.conversation(row.messages, row.pictures)

    def pair(self, caption, picture, uniform):
        """A captioned picture: if both are on, to create below 0.5, else to understand."""
        ids = self.tokenizer.encode(caption.strip())
        if self.create and (uniform < 0.5 or not self.understand):
            ids = ids[: self._room_beside(self.dream)]
            parts = [(self.bos + ids + self.dream + self.eos, False)]
            return make_sample(parts, images_dm=[picture])
        ids = ids[: self._room_beside(self.img)]
        parts = [(self.bos, True), (self.img, False), (ids + self.eos, True)]
        return make_sample(parts, images=[picture])

    def _room_beside(self, span):
        """How many tokens of a text fit into a sequence with one span."""
        return self.context - len(span) - len(self.bos) - len(self.eos)

    def document(self, pieces, prompt=None):
        """[(text, picture or None), …] in reading order; with a prompt, as the answer to it.

        It ends before the first text or picture that would not fit.
        """
        start = (self.bos, True) if prompt is None else (self._prompt(prompt), False)
        room = self.context - len(start[0]) - len(self.eos)
        parts, pictures = [], []
        for unit, picture in self._indivisible_units(pieces):
            room -= sum(len(ids) for ids, _ in unit)
            if room < 0:
                break
            parts += unit
            if picture is not None:
                pictures.append(picture)
        if not any(ids for ids, _ in parts):
            raise ValueError(f"nothing of it fits into {self.context} tokens")
        images = pictures if self.understand else []
        images_dm = pictures if self.create else []
        return make_sample([start, *parts, (self.eos, True)], images, images_dm)

    def _indivisible_units(self, pieces):
        """Yields texts and pictures: ([(ids, whether they are learned), …], picture or None)."""
        for text, picture in pieces:
            yield [(self.tokenizer.encode(text.strip()), True)], None
            if picture is None:
                continue
            spans = []
            if self.create:
                spans += [(self.dream[:1], True), (self.dream[1:], False)]
            if self.understand:
                spans.append((self.img, False))
            yield spans, picture

    def conversation(self, messages, pictures):
        """Questions and answers; only answers are learned, and no token of a picture.

        Every template frames answers in its own way, and a tokenizer may join letters over the
        border of an answer. So an answer is found by comparing tokens: of the conversation before
        it, with it, and with the later turns. See `answer_span`.
        """
        check_count(frame_messages(messages, self.template, self.system), pictures)
        whole, answers = None, []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, _, _ = self._encode_chat(messages[:i], pictures)
            longer = self._encode_chat(messages[: i + 1], pictures)
            if len(longer[0]) > self.context:
                break
            whole = longer
            answers.append((before, whole[0]))
        if whole is None:
            raise ValueError(f"its first question and answer do not fit into {self.context} tokens")
        tokens, images, images_dm = whole
        labels = np.full(len(tokens), IGNORED)
        for before, after in answers:
            start, end = answer_span(before, after, tokens)
            labels[start:end] = tokens[start:end]
        labels[np.isin(tokens, self.img + self.dream)] = IGNORED
        return Sample(np.array(tokens, np.int64), labels, images, images_dm)

    def _encode_chat(self, messages, pictures):
        """Messages → (ids, the pictures to understand, the pictures to create).

        pictures: of their placeholders, in order; those of later turns may follow.
        """
        parts, images, images_dm = [], [], []
        remaining = iter(pictures)
        for part in frame_messages(messages, self.template, self.system):
            if is_placeholder(part):
                picture, placeholder, part = next(remaining), part, []
                if placeholder == DREAM and self.create:
                    part += self.dream
                    images_dm.append(picture)
                if placeholder == IMAGE or self.understand:
                    part += self.img
                    images.append(picture)
            parts.append(part)
        return self.tokenizer.encode_parts(parts), images, images_dm

    def _prompt(self, text):
        """The ids of an instruction, up to where its answer begins."""
        messages = [{"role": "user", "content": text}]
        check_count(frame_messages(messages, self.template, self.system), ())
        return self._encode_chat(messages, ())[0]

    def image_to_image(self, source, target):
        """A picture to understand, and one to create from it."""
        ids = self.bos + self.img + self.dream + self.eos
        return make_sample([(ids, False)], [source], [target])


def make_sample(parts, images=(), images_dm=()):
    """[(ids, whether they are learned), …] and the pictures of their spans → Sample."""
    tokens, labels = [], []
    for ids, learned in parts:
        tokens += ids
        labels += ids if learned else [IGNORED] * len(ids)
    tokens, labels = np.array(tokens, np.int64), np.array(labels, np.int64)
    return Sample(tokens, labels, list(images), list(images_dm))


def answer_span(before, after, whole):
    """Where an answer stands among a conversation's ids `whole`: (start, end).

    before, after: the ids of the conversation up to the answer, without and with it. They agree up
    to where the answer starts; `after` and `whole` agree up to where it ends, as later turns may
    replace its end. The template "plain" writes only one </s>, so that (in words, not tokens)

        before   <s> Hi
        after    <s> Hi \\n Yes? </s>
        whole    <s> Hi \\n Yes? \\n Bye \\n So long </s>        give (2, 4): "\\n Yes?"
    """
    return common_prefix_length(before, after), common_prefix_length(after, whole)


def common_prefix_length(a, b):
    """How many items two lists share at their beginning."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


# ---- kinds of samples, and the settings ----------------------------------------------------------


def _as_it_is(row):
    return row


def _no_prompt(document):
    return Document(document.pieces)


def _with_prompt(document):
    if document.prompt is None:
        raise ValueError('it has no "instruction"')
    return document


def _picture_alone(row):
    return Picture(row.picture)


@dataclass(frozen=True)
class Kind:
    """A kind of sample: an entry of KINDS. A new class of rows needs a case in Writer.write, too.

    about     what it is, in a line
    row       the class of JSON rows that it is made from; Picture and Pair come from folders and
              tars, too
    emoji     (EmojiTexts, index, rng) → such a row
    convert   a JSON row → the row to be written; a ValueError says what the row lacks
    """

    name: str
    about: str
    row: type
    emoji: Callable
    convert: Callable = _as_it_is


KINDS = {
    kind.name: kind
    for kind in (
        Kind("pair", "picture and caption: to understand or to create it", Pair, EmojiTexts.pair),
        Kind("document", "texts with pictures between them", Document, EmojiTexts.document, _no_prompt),
        Kind("instructed", "the same, as an answer", Document, EmojiTexts.instructed, _with_prompt),
        Kind("conversation", "questions and answers", Conversation, EmojiTexts.conversation),
        Kind("image", "a picture, to be created again", Picture, EmojiTexts.picture, _picture_alone),
    )
}


@dataclass(frozen=True)
class DocumentSource:
    """One [[data.sources]] table of a DreamLLM's configuration."""

    path: str = "emoji"  # "emoji", a folder, .tar, .jsonl or .json, or a shell pattern of files
    kind: str = "pair"  # which sample: a key of KINDS
    weight: float = 1.0  # share of the samples that are taken from it
    images: str = ""  # the folder of the pictures that rows name; empty: that of the rows
    understand: bool = True  # whether the model learns to understand its pictures …
    create: bool = True  # … and to create them
    move: bool = False  # emoji only: turn, shrink and shift those to understand a little, at random

    def __post_init__(self):
        one_of(self, KINDS, "kind")
        within(self, 0, 1e9, "weight")
        if self.move and self.path != "emoji":
            raise ValueError(f'move = true is for path = "emoji" only, not for {self.path}')
        if not (self.understand or self.create):
            raise ValueError("understand and create are both false: nothing is left to learn")


@dataclass(frozen=True)
class DocumentSettings:
    """The [data] section of a DreamLLM's configuration."""

    sources: tuple[DocumentSource, ...] = ()
    text_tokenizer: str = ""  # "bytes", or a folder; empty: that of the language model or of init
    template: str = "vicuna"  # how questions and answers are framed: a key of chat.TEMPLATES
    system: str | None = None  # the text before the first question; absent: the template's own
    held_out_fraction: float = 0.02  # by hash of a picture's name; emoji have a split of their own
    workers: int = 2  # threads that prepare batches

    def __post_init__(self):
        one_of(self, TEMPLATES, "template")
        fraction(self, "held_out_fraction")
        within(self, 1, 1024, "workers")
        if self.sources and not any(source.weight for source in self.sources):
            raise ValueError("sources: every weight is 0, so that there is nothing to read")


# ---- batches -------------------------------------------------------------------------------------


def clip_view(picture, side):
    """A Pillow image as CLIP sees it, (side, side, 3) uint8, before it is normalized."""
    return np.asarray(square(picture, side))


def draw_view(picture, side):
    """A Pillow image as the U-Net is to draw it, (side, side, 3) uint8: Resize and CenterCrop."""
    return np.asarray(square(picture, side, Image.Resampling.BILINEAR, round))


def _stack(pictures, side):
    """N pictures, maybe none → (N, side, side, 3) uint8."""
    return np.array(pictures, np.uint8).reshape(-1, side, side, 3)


MOST_SKIPPED = 1000  # unusable rows in a row: more than a few broken ones, so that training stops


class DocumentRows(Skipping):
    """Samples of all sources, mixed by weight, as batches.

    A batch is of one source: its samples are of similar length, so that little is spent on padding.
    An epoch has about as many samples as there are rows; source i gives the share wᵢ / Σw of its
    batches. Each source is read in endless passes, each in a new order, and the next epoch goes on
    where this one stopped. What cannot be used (a row, its picture, a text that is too long) is
    named once, counted in `skipped`, and replaced by the next row of its source.
    """

    def __init__(self, settings, writer, clip_side, draw_side, batch_size, seed, split="train"):
        super().__init__()
        if not settings.sources:
            raise UserError("nothing to read: the configuration has no [[data.sources]]")
        self.batch_size, self.seed, self.pad = batch_size, seed, writer.pad
        self.clip_side, self.draw_side = clip_side, draw_side
        tables = [table for table in settings.sources if table.weight]
        self.writers = [writer.restricted_to(table.understand, table.create) for table in tables]
        self.moves = [table.move and split == "train" for table in tables]
        share = settings.held_out_fraction
        opened = functools.cache(lambda path: open_source(path, None, split, share))
        self.sources = [self._open(table, opened, split, share) for table in tables]
        rows = sum(len(source) for source in self.sources)
        total_weight = sum(table.weight for table in tables)
        self.samples_per_epoch = []  # of each source
        for table in tables:
            batches = max(1, round(rows * table.weight / total_weight / batch_size))
            self.samples_per_epoch.append(batches * batch_size)
        self.ends = list(itertools.accumulate(self.samples_per_epoch))

    def _open(self, table, opened, split, held_out_fraction):
        """A [[data.sources]] table → a source of rows."""
        kind = KINDS[table.kind]
        if table.path == "emoji":
            return EmojiTexts(opened("emoji"), kind)
        if names_rows(table.path):
            if split not in ("train", "held_out"):
                raise UserError(f'{table.path}: it has no split "{split}": train or held_out')
            return JsonRows(table.path, kind, table.images, split, held_out_fraction, self.skip)
        if kind.row not in (Pair, Picture):
            needs = "needs rows in a .jsonl or .json file"
            raise UserError(f'{table.path}: kind "{kind.name}" {needs}')
        return FilePairs(opened(table.path), captions=kind.row is Pair)

    def __len__(self):
        """Samples in an epoch."""
        return sum(self.samples_per_epoch)

    def batch(self, number, rows):
        """Rows `rows` (a range within range(batch_size)) of batch `number`.

        tokens, labels   (rows, T) int64, on the right filled up with [PAD] and IGNORED
        images           (N, clip_side, clip_side, 3) uint8: the pictures to understand, in order
        images_dm        (M, draw_side, draw_side, 3) uint8: the pictures to create; N, M may be 0
        """
        samples = [self.sample(number * self.batch_size + row) for row in rows]
        length = max(len(sample.tokens) for sample in samples)
        tokens = np.full((len(samples), length), self.pad)
        labels = np.full((len(samples), length), IGNORED)
        images, images_dm = [], []
        for i, sample in enumerate(samples):
            tokens[i, : len(sample.tokens)] = sample.tokens
            labels[i, : len(sample.labels)] = sample.labels
            images += [clip_view(picture, self.clip_side) for picture in sample.images]
            images_dm += [draw_view(picture, self.draw_side) for picture in sample.images_dm]
        return {
            "tokens": tokens,
            "labels": labels,
            "images": _stack(images, self.clip_side),
            "images_dm": _stack(images_dm, self.draw_side),
        }

    def sample(self, position):
        """The Sample at a position of the endless sequence of epochs; its pictures are opened."""
        which, index = self.locate(position)
        source = self.sources[which]
        for step in range(min(len(source), MOST_SKIPPED)):
            row = (index + step) % len(source)
            try:
                return self._make_sample(which, row, rng("sample", self.seed, position))
            except (UserError, ValueError, OSError) as error:
                where, reason = source.where(row), str(error)
                self.skip(reason if reason.startswith(where) else f"{where}: {reason}")
        unusable = f"not one of {step + 1} rows can be used"
        raise UserError(f"{source.path}: {unusable}; the last: {reason}")

    def _make_sample(self, which, row, rng):
        """A row of a source as a Sample; only the pictures that the writer keeps are opened."""
        source = self.sources[which]
        uniform = rng.random()
        written = self.writers[which].write(source.read(row, rng), uniform)
        opened = {}  # most pictures are both to understand and to create
        for picture in written.images + written.images_dm:
            if id(picture) not in opened:
                opened[id(picture)] = source.open(picture)
        images = [opened[id(picture)] for picture in written.images]
        images_dm = [opened[id(picture)] for picture in written.images_dm]
        if self.moves[which]:
            images = [Image.fromarray(jitter(np.asarray(picture), rng)) for picture in images]
        return Sample(written.tokens, written.labels, images, images_dm)

    def locate(self, position):
        """Source and row of the sample at a position of the endless sequence of epochs."""
        batch, place = divmod(position, self.batch_size)
        epoch, batches = position // len(self), len(self) // self.batch_size
        (batch,) = shuffled("epoch of batches", (self.seed,), batches, [batch]).tolist()
        which = bisect.bisect_right(self.ends, batch * self.batch_size)
        # what this epoch takes of the source begins where the last one stopped
        count = self.samples_per_epoch[which]
        taken = epoch * count + batch * self.batch_size + place - (self.ends[which] - count)
        (row,) = shuffled("rows of a source", (self.seed, which), len(self.sources[which]), [taken]).tolist()
        return which, row
