"""Tokenizer: text ⇄ ids, with the vocabulary that comes with a checkpoint; and CLIP's tokenizer.

A language model reads numbers. Byte-pair encoding says which numbers stand for a text (Gage 1994;
Sennrich et al. 2016, algorithm 1; on bytes: Radford et al. 2019). At first, every byte is a token.
In a large text, the two tokens that are neighbours most often are joined into a new one,
everywhere; and again, thousands of times. The list of these merges, in order, is the vocabulary.
To encode another text, the same merges are made in the same order:

    n e w e s t   ─ "s" "t" ─▶   n e w e st   ─ "e" "st" ─▶   n e w est   ─ …

    text ─ split at special tokens ─ split into words (a regex) ─ merge bytes in order ─▶ ids
    ids  ─ each id's bytes, end to end ─ UTF-8, as soon as a character is complete ─────▶ text

`train_bpe` finds the merges of one's own texts (python prepare.py vocabulary writes them as a
tokenizer.json). No token crosses the border of a word, and a space belongs to the word behind it:
"taco" and " taco" are two tokens, and after a prompt that ends with a space a model has never
seen a word begin.

Special tokens (`<s>`, `<|eot_id|>`) mark where a text begins and who speaks. If a user types one
it stays mere text, unless encode() is told to parse them: otherwise anyone could end a turn and
begin another speaker's.

The files in a folder decide which tokenizer it is:

    tokenizer.json      byte-level BPE: Llama 3, SmolLM2, GPT-2 …
                        BPE of characters with byte_fallback: Llama 2's rules, where they come alone
    tokenizer.model     lines "base64 rank": Llama 3 as Meta gives it    with tiktoken
    tokenizer.model     a SentencePiece model: LLaMA, Llama 2, Vicuna    with sentencepiece (optional)
    (the word "bytes")  no file at all: 256 bytes, begin, end            for small runs of our own
    CLIP_FILES          CLIP's kind of BPE: CLIPTokenizer, at the end

Tokens outside the merges (`Added`) are read from all the files that name some: tokenizer.json,
tokenizer_config.json, added_tokens.json, special_tokens_map.json.
"""

import base64
import binascii
import codecs
import collections
import functools
import gzip
import heapq
import html
import io
import itertools
import json
import os
import re
import sys
import unicodedata
import zlib
from pathlib import Path
from typing import NamedTuple

import regex
import tiktoken
from tqdm import tqdm

from support import checkpoint, settings
from support.chat import BOS, EOS, Special, render_chat
from support.settings import UserError

try:
    import ftfy  # mends mis-decoded text, as OpenAI did before tokenizing; an optional extra
except ImportError:
    ftfy = None

FILES = ("tokenizer.json", "tokenizer.model")
SIBLINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json")
SIBLINGS += ("chat_template.jinja", "chat_template.json")

# The tokens that DreamLLM adds to its LLaMA's. Their ids differ between its published files.
ADDED = ("[PAD]", "<image>", "<im_patch>", "<im_start>", "<im_end>", "<dream>", "<dream_start>", "<dream_end>")


class Added(NamedTuple):
    """A token outside the merges, which a text is searched for; its flags as Hugging Face's."""

    id: int
    special: bool = True  # found only if encode() is told to; left out by decode()
    lstrip: bool = False  # takes the white space before it along
    rstrip: bool = False  # and behind it
    single_word: bool = False  # not found within a word
    normalized: bool = False  # found in the text after its normalization, not before


def as_entries(added):
    """{name: Added} → {id: entry}, as tokenizer_config.json has them under added_tokens_decoder."""
    entries = {}
    for name, token in added.items():
        entry = {"content": name} | token._asdict()
        entries[str(entry.pop("id"))] = entry
    return entries


class Tokenizer:
    """Text ⇄ ids.

    bos                   the id that stands before every text; None where there is none (GPT-2, SmolLM2)
    eos                   the id that ends a text
    stops                 all ids that end an answer
    encode_text           a function: normalized text without added tokens → ids
    encode_after_special  the same for a text that follows another (only SentencePiece may differ)
    added                 {name: Added}, the tokens outside the merges
    bytes_of              {id: bytes} of every token
    vocab_size            the largest id + 1
    strips                whether decode() takes away the space that SentencePiece writes before a text
    rows                  how many tokens the model has; more than that are refused. None: it is not known
    file                  the tokenizer.json or tokenizer.model that it was read from; None: "bytes"
    files                 {name: content} of that file and of those read with it, to be saved again
    added_since           {name: id} of the special tokens that `add` has added
    """

    def __init__(
        self, encode_text, bytes_of, added, bos=None, eos=None, stops=(), after=None, normalize=str, strips=False
    ):
        self.encode_text, self.encode_after_special, self.normalize = encode_text, after or encode_text, normalize
        self.added, self.bytes_of = added, bytes_of | {token.id: name.encode() for name, token in added.items()}
        self.bos, self.eos, self.strips, self.rows = bos, eos, strips, None
        self.file, self.files, self.added_since = None, {}, {}
        turns = [added[name].id for name in ("<|eot_id|>", "<|eom_id|>", "<|im_end|>") if name in added]
        self.stops = {eos, *stops, *turns} - {None}
        self.parts = finder(added, normalize)

    @property
    def special(self):
        """{name: id} of the special tokens."""
        return {name: token.id for name, token in self.added.items() if token.special}

    @property
    def vocab_size(self):
        return max(self.bytes_of) + 1

    @classmethod
    def from_pretrained(cls, path):
        """The tokenizer of a folder, of a tokenizer.json or tokenizer.model, or "bytes"."""
        if str(path) == "bytes":
            return byte_tokenizer()
        path = checkpoint.weights_folder(path)
        found = [path] if path.is_file() else [path / name for name in FILES if (path / name).exists()]
        if not found:
            reason = "no tokenizer in this folder (looked for tokenizer.json, tokenizer.model)"
            if (path / "vocab.json").exists():
                reason += "; vocab.json says not how words are cut: let transformers' AutoTokenizer save it anew"
            raise UserError(f"{path}: {reason}")
        file = found[0]
        saved = checkpoint.read_json(file) if file.suffix == ".json" else None
        if len(found) == 2 and not is_byte_level(saved):  # Llama 2's .json holds the same rules as its .model
            file = found[1]
        tokenizer = from_json(file, saved) if file.suffix == ".json" else from_model(file)

        # Kept in memory: the folder may be a checkpoint that is deleted when the next one is written.
        files = {f"tokenizer{'.json' if file.suffix == '.json' else '.model'}": file}
        files |= {name: file.parent / name for name in SIBLINGS}
        tokenizer.files = {name: settings.read_bytes(place) for name, place in files.items() if place.exists()}
        tokenizer.file = file
        return tokenizer

    def add(self, names):
        """Makes `names` special tokens after the last id; those that are known keep their ids."""
        for name in names:
            if name not in self.added:
                i = self.added_since[name] = self.vocab_size
                self.added[name], self.bytes_of[i] = Added(i), name.encode()
        self.parts = finder(self.added, self.normalize)

    def save_pretrained(self, folder):
        """Writes the tokenizer's files into `folder`, with the special tokens that were added.

        "bytes" becomes a tokenizer.json without merges, which Hugging Face's tokenizers read too.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.file is None:
            write_merges(folder, [], self.added_since)
            return
        for name, content in self.files.items():
            with checkpoint.atomic_file(folder / name) as file:
                file.write_bytes(content)
        if self.added_since:
            file = folder / "tokenizer_config.json"
            config, ids = sibling_json(file, file.name), sibling_json(file, "added_tokens.json")
            uses = {use: name for use, name in named_tokens(file).items() if use in USES}
            checkpoint.write_json(file, config | uses | {"added_tokens_decoder": as_entries(self.added)})
            checkpoint.write_json(folder / "added_tokens.json", ids | self.added_since)

    def encode(self, text, bos=False, eos=False, special=False, follows=False):
        """text → [id, …]. With `special`, names of special tokens stand for these tokens.

        `follows`: the text comes after a special token of the same conversation.
        """
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half a character: �
        ids = [self.bos] if bos and self.bos is not None else []
        try:
            for part in self.parts(text, special):
                if isinstance(part, int):
                    ids.append(part)
                else:
                    ids += self.encode_after_special(part) if follows else self.encode_text(part)
                follows = True
        except TimeoutError:
            raise UserError(f"{self.file}: a regular expression in it takes over {patience(text):.0f} s") from None
        return self.within(ids + ([self.eos] if eos and self.eos is not None else []))

    def within(self, ids):
        """The ids, if the model has a row for each; otherwise a UserError names the first without."""
        if self.rows and max(ids, default=0) >= self.rows:
            i = next(i for i in ids if i >= self.rows)
            name = self.bytes_of[i].decode(errors="replace")
            raise UserError(f"the model has no row for the token {name}: its id is {i}, and {self.rows} rows are all")
        return ids

    def decode(self, ids, special=False):
        """[id, …] → text; special tokens are left out, or written by name. No UTF-8: �."""
        text = "".join(self.stream(ids, special))
        return text[1:] if self.strips and text.startswith(" ") else text

    def decoder(self, special=False):
        """A function for ids as they come: id → the text that it completes, None → what is left.

        The text is "" while a character lacks bytes, and for a special token unless `special`
        asks for its name.
        """
        hidden = set() if special else set(self.special.values())
        characters = codecs.getincrementaldecoder("utf-8")("replace")  # keeps the bytes of an unfinished character

        def decode(i):
            if i is None:
                return characters.decode(b"", final=True)
            if i not in self.bytes_of:
                raise UserError(f"id {i} stands for nothing in this vocabulary of {len(self.bytes_of)} tokens")
            return "" if i in hidden else characters.decode(self.bytes_of[i])

        return decode

    def stream(self, ids, special=False):
        """Yields text while `ids` come in, only whole characters; a first space stays."""
        decode = self.decoder(special)
        for i in itertools.chain(ids, [None]):
            if text := decode(i):
                yield text

    def encode_chat(self, messages, template):
        """[{"role": "system" | "user" | "assistant", "content": text}, …] → ids.

        `template` is a key of chat.TEMPLATES. The system message comes first or not at all, then user
        and assistant take turns; after a last user message the assistant's answer is what the
        model says next.
        """
        return self.encode_parts(render_chat(messages, template))

    def encode_parts(self, parts):
        """[text, Special or [id, …], …] → ids of one conversation. A list of ids is kept as it is.

        Texts are never searched for special tokens: whoever writes "</s>" into a message gets its
        letters.
        """
        ids, follows = [], False
        for part in parts:
            if isinstance(part, Special):
                ids += self.special_ids(part)
            else:
                ids += self.encode(part, follows=follows) if isinstance(part, str) else part
                follows = True
        return ids

    def special_ids(self, part):
        """A Special → its id in a list; [] for a BOS or EOS that this vocabulary does without."""
        if part in (BOS, EOS):
            i = self.bos if part == BOS else self.eos
            return self.within([] if i is None else [i])
        if part not in self.added:
            raise UserError(f"the chat template needs {part}, which this tokenizer does not have")
        return self.within([self.added[part].id])


def finder(added, normalize):
    """{name: Added} → a function: text, special → its parts: ids of added tokens, and normalized
    texts between them. Special tokens are found only where `special` is true.
    """
    raw, late = {}, {}
    for name, token in added.items():
        (late if token.normalized else raw)[normalize(name) if token.normalized else name] = token
    find_raw, find_late = search(raw), search(late)

    def parts(text, special):
        for part in find_raw(text, special):
            if isinstance(part, int):
                yield part
            else:
                yield from find_late(normalize(part), special)

    return parts


SPACES_BEFORE, SPACES, WORD = regex.compile(r"(?r)\s*"), regex.compile(r"\s*"), regex.compile(r"\w")


def search(added):
    """Like `finder`, for tokens that are all sought in the same text. The longest that fits counts."""
    pattern = re.compile("|".join(map(re.escape, sorted(filter(None, added), key=len, reverse=True))) or r"(?!)")

    def find(text, special):
        parts, end = [], 0
        for match in pattern.finditer(text):
            token, (start, stop) = added[match.group()], match.span()
            in_word = WORD.match(text, stop) or WORD.match(text[max(0, start - 1) : start])
            if (token.special and not special) or (token.single_word and in_word):
                continue
            if token.lstrip:
                start = max(end, SPACES_BEFORE.match(text, 0, start).start())
            if token.rstrip:
                stop = SPACES.match(text, stop).end()
            parts += [text[end:start], token.id]
            end = stop
        return list(filter(lambda part: part != "", [*parts, text[end:]]))

    return find


BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"


def byte_tokenizer():
    """The smallest vocabulary: a byte is its own id; 256 begins a text, 257 ends it."""
    bytes_of = {i: bytes([i]) for i in range(256)}
    return Tokenizer(lambda text: list(text.encode()), bytes_of, {BEGIN: Added(256), END: Added(257)}, bos=256, eos=257)


# ---- byte-pair encoding ----------------------------------------------------------------------

# How a text is split into words before any bytes are merged.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def merge(symbols, rank):
    """Joins neighbours in a list of symbols until no two have a rank (a function: pair → number or
    None): the lowest first, of equal ones the leftmost. "---" becomes "--", "-".
    """
    symbols, queue = [*symbols, None], []  # None: the end, and what has become part of its left neighbour
    left, right = list(range(-1, len(symbols) - 1)), list(range(1, len(symbols) + 1))

    def offer(i):
        if i >= 0 and (found := rank((symbols[i], symbols[right[i]]))) is not None:
            heapq.heappush(queue, (found, i, symbols[i], symbols[right[i]]))

    for i in range(len(symbols) - 1):
        offer(i)
    while queue:
        _, i, first, second = heapq.heappop(queue)
        if symbols[i] == first and symbols[right[i]] == second:  # none of them has been joined meanwhile
            symbols[i], symbols[right[i]] = first + second, None
            right[i] = right[right[i]]
            left[right[i]] = i
            offer(i)
            offer(left[i])
    return [symbol for symbol in symbols if symbol is not None]


def bpe(vocab, merges, unknown=None, fuse=False, whole=False, fallback=False, suffix=""):
    """Byte-pair encoding, as in a tokenizer.json → a function: word → ids.

    vocab      {token: id}; characters are the first symbols of a word
    merges     [(left, right), …], the first merged first
    unknown    the token of a character that is none; without it, it is left out
    fuse       of several unknown characters in a row, one counts
    whole      a word that is a token is not taken apart
    fallback   a character that is no token becomes its bytes' tokens: "<0xC3>", "<0xA9>"
    suffix     what the last symbol of a word ends with
    """
    ranks = {pair: rank for rank, pair in enumerate(merges)}

    def encode(word):
        if whole and word in vocab:
            return [vocab[word]]
        symbols = []
        for character in word:
            if character in vocab:
                symbols.append(character)
            elif fallback and vocab.keys() >= set(spelled := [f"<0x{byte:02X}>" for byte in character.encode()]):
                symbols += spelled
            elif unknown is not None and not (fuse and symbols[-1:] == [unknown]):
                symbols.append(unknown)
        if suffix:
            symbols[-1] += suffix
        return list(map(vocab.__getitem__, merge(symbols, ranks.get)))

    cached = functools.lru_cache(2**16)(encode)
    return lambda word: cached(word) if len(word) < 64 else encode(word)


def _byte_letters():
    """Files write bytes as letters: printable ones as they are, the 68 others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(byte): byte for byte in printable}
    for byte in range(256):
        if byte not in printable:
            letters[chr(256 + len(letters) - len(printable))] = byte
    return letters


BYTE_OF = _byte_letters()  # in the order of CLIP's first 256 tokens
LETTER_OF = {byte: letter for letter, byte in BYTE_OF.items()}


@functools.lru_cache(2**12)  # words come again and again
def to_letters(token):
    """Bytes, or a text's, as letters."""
    return (token.encode() if isinstance(token, str) else token).decode("latin-1").translate(LETTER_OF)


def from_letters(text):
    return bytes(map(BYTE_OF.__getitem__, text))


def train_bpe(texts, merges):
    """texts → the first `merges` merges, [(bytes, bytes), …]; fewer when no pair is left.

    The most frequent pair of neighbours within a word (as GPT-2 splits: " taco" is one, its space
    included) is merged everywhere, and all pairs are counted anew; of equally frequent ones, the
    pair that sorts last. Sennrich et al. 2016, algorithm 1. A merge is a pass over all distinct
    words: minutes in all for those of a book.
    """
    counts = collections.Counter()
    for text in texts:
        counts.update(regex.findall(GPT2, text))
    words, found = [], []
    for word, count in counts.items():
        words.append(([bytes([byte]) for byte in word.encode()], count))
    for _ in tqdm(range(merges), desc="vocabulary", unit=" merges", mininterval=1):
        pairs = collections.Counter()
        for tokens, count in words:
            for pair in itertools.pairwise(tokens):
                pairs[pair] += count
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        found.append(best)
        for tokens, _ in words:
            if best in itertools.pairwise(tokens):
                tokens[:] = merge(tokens, {best: 0}.get)
    return found


# ---- tokenizer.json --------------------------------------------------------------------------


def write_merges(folder, merges, added=None):
    """Writes byte-level BPE as a tokenizer.json with tokenizer_config.json, as Hugging Face's
    tokenizers read it.

    A byte is its own id, merge n makes the token 256 + n; then come the tokens that begin and end
    a text. added: {name: id} of special tokens that were added.
    """
    special = {BEGIN: 256 + len(merges), END: 257 + len(merges)} | (added or {})
    options = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    vocab, spelled = dict(BYTE_OF), []
    for number, (first, second) in enumerate(merges):
        vocab[to_letters(first + second)] = 256 + number
        spelled.append(f"{to_letters(first)} {to_letters(second)}")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level["use_regex"] = bool(merges)  # it splits words, as GPT-2 does: without merges there is no need to
    begin = {"SpecialToken": {"id": BEGIN, "type_id": 0}}
    text, second_text = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
    template = {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [begin, text, second_text],
        "special_tokens": {BEGIN: {"id": BEGIN, "ids": [special[BEGIN]], "tokens": [BEGIN]}},
    }
    saved = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name} | options for name, i in special.items()],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": template,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": spelled},
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END, "add_bos_token": True}
    checkpoint.write_json(Path(folder) / "tokenizer_config.json", config)
    checkpoint.write_json(Path(folder) / "tokenizer.json", saved)


def steps(part):
    """A part of tokenizer.json (a step, a sequence of them or None) → its steps, a flat list."""
    for key in ("pretokenizers", "processors", "normalizers", "decoders"):
        if part and key in part:
            return list(itertools.chain.from_iterable(map(steps, part[key])))
    return [part] if part else []


def is_byte_level(saved):
    """Whether a tokenizer.json (a dict) holds byte-level BPE."""
    try:
        parts = [*steps(saved.get("normalizer")), *steps(saved.get("pre_tokenizer"))]
        return saved["model"]["type"] == "BPE" and "ByteLevel" in [step["type"] for step in parts]
    except (KeyError, TypeError, AttributeError):
        return False


IDS = 2**31  # they are below this
USUAL_ENDS = ("<|end_of_text|>", "<|endoftext|>")  # where no file says which token ends a text


def from_json(file, saved):
    """A tokenizer.json (its content: `saved`) and the small files next to it → Tokenizer."""
    byte_level, config = is_byte_level(saved), sibling_json(file, "tokenizer_config.json")
    try:
        words, vocab = read_bpe(saved["model"], byte_level), saved["model"]["vocab"]
        for token, i in vocab.items():
            if type(i) is not int or not 0 <= i < IDS:
                raise ValueError(f"the token {token!r:.40} has the id {i!r:.40}")
        added = added_tokens(file, vocab, saved["added_tokens"])
        token_bytes = letters_or_name if byte_level else piece_bytes
        bytes_of = {i: token_bytes(token) for token, i in vocab.items()}
        for name, token in added.items():
            if token.id in bytes_of and name not in vocab:
                raise ValueError(f"the added token {name} has the id {token.id}, which is taken")
        encode, after = (pipeline(steps(saved.get("pre_tokenizer")), words, first) for first in (True, False))
        names, bos = named_tokens(file), bos_name(saved.get("post_processor"))
        if config.get("add_bos_token"):
            bos = names.get("bos_token")
        elif "add_bos_token" in config and str(config.get("tokenizer_class")).startswith("Llama"):
            bos = None
        eos = names.get("eos_token") or next(filter(added.__contains__, USUAL_ENDS), None)
        ends = [added[name].id if name in added else None for name in (bos, eos)]
        strips = any(step["type"] in ("Strip", "Metaspace") for step in steps(saved.get("decoder")))
        normalize = normalizer(steps(saved.get("normalizer")))
        return Tokenizer(encode, bytes_of, added, *ends, stop_ids(file), after, normalize, strips)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, regex.error) as error:
        reason = error if type(error) is ValueError else f"not the file it should be: {error!r}"
        raise UserError(f"{file}: {reason}") from None


def letters_or_name(token):
    """A token of byte-level BPE → bytes; what is not written in letters of bytes is its own name."""
    return from_letters(token) if BYTE_OF.keys() >= set(token) else token.encode()


def piece_bytes(piece):
    """A piece of SentencePiece → bytes: "<0x0A>" is one, "▁" a space."""
    byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode()


def read_bpe(model, byte_level):
    """The "model" of a tokenizer.json → a function: word → ids. ValueError: what is not supported."""
    kind = model.get("type") if isinstance(model, dict) else None
    if not byte_level and not (kind == "BPE" and model.get("byte_fallback")):
        other = f" but {kind}" if kind not in ("BPE", None) else ""
        raise ValueError(f"holds no byte-level BPE{other}; put the original tokenizer.model next to it")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"BPE with {key} is not supported")
    vocab, unknown, merges = model["vocab"], model.get("unk_token"), read_merges(model)
    for left, right in merges:
        if left + right not in vocab:
            token = from_letters(left + right)
            raise ValueError(f"the merge to {token!r} makes a token that is not in its vocabulary")
    if unknown is not None and unknown not in vocab:
        raise ValueError(f"its unk_token {unknown} is not in its vocabulary")
    return bpe(vocab, merges, unknown, *map(model.get, ("fuse_unk", "ignore_merges", "byte_fallback")))


def read_merges(model):
    """[(left, right), …]; files have "left right", or since 2024 ["left", "right"]."""
    return [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]


NORMALIZERS = {  # a step → a function: text → text
    **dict.fromkeys(
        ("NFC", "NFD", "NFKC", "NFKD"), lambda step: functools.partial(unicodedata.normalize, step["type"])
    ),
    "Prepend": lambda step: lambda text: text and step["prepend"] + text,
    "Replace": lambda step: (
        lambda text: regex.sub(pattern_of(step), lambda _: step["content"], text, flags=FLAGS, timeout=patience(text))
    ),
    "ByteLevel": lambda step: to_letters,
}


def normalizer(parts):
    """The steps of a normalizer → a function: text → text. ValueError: not supported."""
    for step in parts:
        if step["type"] not in NORMALIZERS:
            raise ValueError(f"the normalizer {step['type']} is not supported")
    functions = [NORMALIZERS[step["type"]](step) for step in parts]

    def normalize(text):
        for function in functions:
            text = function(text)
        return text

    return normalize


FLAGS = regex.MULTILINE  # in Oniguruma, which the library uses, ^ and $ are the ends of lines
CUTS = {  # a step that cuts texts: what it looks for, what becomes of that, whether the rest is meant
    "Split": lambda step: (pattern_of(step), step["behavior"], step["invert"]),
    "Digits": lambda step: (r"\p{N}", "Isolated" if step["individual_digits"] else "Contiguous", False),
    "Punctuation": lambda step: (r"[!-/:-@\[-`{-~]|\p{P}", step.get("behavior", "Isolated"), False),
    "Whitespace": lambda step: (r"\w+|[^\w\s]+", "Removed", True),
    "WhitespaceSplit": lambda step: (r"\s", "Removed", False),
    "CharDelimiterSplit": lambda step: (re.escape(step["delimiter"]), "Removed", False),
    "ByteLevel": lambda step: (GPT2 if step.get("use_regex", True) else r"(?!)", "Isolated", False),
    "Metaspace": lambda step: ("▁" if step.get("split", True) else r"(?!)", "MergedWithNext", False),
}
JOINS = {  # is this piece joined to the one before it? (each: is it what was looked for?)
    "Isolated": lambda before, this: False,
    "Removed": lambda before, this: False,
    "Contiguous": lambda before, this: before == this,
    "MergedWithPrevious": lambda before, this: this and not before,
    "MergedWithNext": lambda before, this: before and not this,
}


def patience(text):
    """Seconds that a stranger's regular expression may take for a text: some take forever."""
    return 5 + len(text) / 10_000


def pattern_of(step):
    form, pattern = next(iter(step["pattern"].items()))
    return pattern if form == "Regex" else re.escape(pattern)


def cutter(pattern, behavior, invert):
    """→ a function: text → its pieces: the pattern's matches, and what lies between them."""
    pattern, joined = regex.compile(pattern, FLAGS), JOINS[behavior]

    def cut(text):
        parts, end = [], 0  # in turn what lies between matches, and a match
        for match in pattern.finditer(text, timeout=patience(text)):
            parts += (text[end : match.start()], match.group())
            end = match.end()
        parts.append(text[end:])
        if behavior == "Isolated":
            return list(filter(None, parts))
        pieces, before = [], None
        for number, piece in enumerate(parts):
            this = (number % 2 == 1) != invert
            if piece and before is not None and joined(before, this):
                pieces[-1] += piece
            elif piece and not (this and behavior == "Removed"):
                pieces.append(piece)
            before = this if piece else before
        return pieces

    return cut


def pretokenizer(step, first):
    """A step of a pre-tokenizer → a function: text → pieces. `first`: the text begins a longer one."""
    kind, behavior = step["type"], step.get("behavior") or "Isolated"
    if kind not in CUTS or behavior not in JOINS:
        raise ValueError(f"the pre-tokenizer {kind} {step.get('behavior', '')}".strip() + " is not supported")
    cut = cutter(*CUTS[kind](step))
    if kind == "ByteLevel":
        space = " " if step["add_prefix_space"] else ""
        return lambda text: map(to_letters, cut(text if text.startswith(" ") else space + text))
    if kind == "Metaspace":
        scheme = step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")
        space = "▁" if scheme == "always" or (scheme == "first" and first) else ""
        return lambda text: cut(("" if text[0] in " ▁" else space) + text.replace(" ", "▁"))
    return cut


def pipeline(parts, words, first):
    """Steps of a pre-tokenizer, then `words` (a function: word → ids) → a function: text → ids."""
    cuts = [pretokenizer(step, first) for step in parts]

    def encode(text):
        pieces = [text]
        for cut in cuts:
            pieces = list(itertools.chain.from_iterable(map(cut, pieces)))
        return list(itertools.chain.from_iterable(map(words, pieces)))

    return encode


def bos_name(post_processor):
    """The name of the token that is put before every text, or None."""
    for step in steps(post_processor):
        if step.get("type") == "TemplateProcessing":
            first = step["single"][0]  # {"SpecialToken": {"id": name}} or {"Sequence": …}, the text
            return first["SpecialToken"]["id"] if "SpecialToken" in first else None
    return None


# ---- the small files next to it --------------------------------------------------------------


def sibling_json(file, name):
    """A JSON file in the same folder as a dict, {} where there is none."""
    path = file.parent / name
    saved = checkpoint.read_json(path) if path.exists() else {}
    if not isinstance(saved, dict):
        raise UserError(f"{path}: expected a table")
    return saved


def name_of(token):
    """A token as configurations give it: a name, or a table that has it."""
    return token.get("content") if isinstance(token, dict) else token


def stop_ids(file):
    """The ids that end an answer, according to generation_config.json."""
    ids = sibling_json(file, "generation_config.json").get("eos_token_id")
    return [i for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int]


USES = [f"{use}_token" for use in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]


def named_tokens(file):
    """{"bos_token": name, …}: the special tokens that the files name; those without a use, by number."""
    config = sibling_json(file, "tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # older files: the map counts (Stable Diffusion 2's differ)
        config = config | sibling_json(file, "special_tokens_map.json")
    more = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    more = list(more.values()) if isinstance(more, dict) else more
    found = {use: name_of(config.get(use)) for use in USES} | dict(enumerate(map(name_of, more)))
    return {use: name for use, name in found.items() if isinstance(name, str)}


def added_tokens(file, known, listed=()):
    """The tokens outside the merges → {name: Added}, from all files that name some.

    known     {name: id} of the vocabulary
    listed    entries as in tokenizer.json: [{"id": i, "content": name, "special": …}, …]
    A name without an id has the one in the vocabulary, or gets the next.
    """
    names, more = named_tokens(file), sibling_json(file, "added_tokens.json")
    entries = []  # of several for one token, the first has its flags
    for i, entry in (sibling_json(file, "tokenizer_config.json").get("added_tokens_decoder") or {}).items():
        entries.append(entry | {"id": int(i)})
    entries += listed
    for name, i in more.items():
        special = name in ADDED or name in names.values()
        entries.append({"content": name, "id": i, "special": special, "normalized": not special})
    entries += [{"content": name, "special": True} for name in names.values()]
    ids, added = dict(known), {}
    for entry in entries:
        name = entry["content"]
        i = entry["id"] if "id" in entry else ids.get(name, max(ids.values(), default=-1) + 1)
        if type(i) is not int or not 0 <= i < IDS or ids.setdefault(name, i) != i:
            raise ValueError(f"the added token {name} has the id {i!r}, but is {ids.get(name)} elsewhere")
        added.setdefault(name, Added(i, *(bool(entry.get(flag)) for flag in Added._fields[1:])))
    return added


# ---- tokenizer.model -------------------------------------------------------------------------

LLAMA3_SPECIAL = {  # their number among the 256 after the ranks; the others are reserved (Llama 3.1)
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}


def from_model(file):
    """A tokenizer.model: lines of "base64 rank", else SentencePiece's binary."""
    data = settings.read_bytes(file)
    is_text = re.match(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n", data)
    return from_ranks(file, data) if is_text else from_sentencepiece(file)


def from_ranks(file, data):
    """Llama 3's ranks and its 256 special tokens."""
    tokens = {}
    try:
        for line in filter(bytes.strip, data.splitlines()):
            token, rank = line.split()
            tokens[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error) as error:
        raise UserError(f"{file}: not a list of tokens and ranks ({error})") from None
    if sorted(tokens.values()) != list(range(128_000)):
        raise UserError(f"{file}: {len(tokens)} ranks; only Llama 3's 128000 are known")
    tokens = dict(sorted(tokens.items(), key=lambda item: item[1]))
    added, reserved = {}, itertools.count()
    for number in range(256):
        name = LLAMA3_SPECIAL.get(number) or f"<|reserved_special_token_{next(reserved)}|>"
        added[name] = Added(len(tokens) + number)
    bytes_of = {i: token for token, i in tokens.items()}
    return Tokenizer(ranked(tokens, LLAMA3), bytes_of, added, bos=128_000, eos=128_001, stops=stop_ids(file))


def ranked(ranks, pattern):
    """{bytes: id}, where an id is a rank too, and the regex of words → a function: text → ids."""
    encoding = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return lambda text: list(itertools.chain.from_iterable(map(encoding.encode_ordinary, chunks(text))))


def chunks(text, size=100_000):
    """Yields text in pieces: tiktoken's regex panics (no exception) on a million spaces in a row.

    Between a letter and a space every pattern splits, and none looks back across: splitting there
    changes no id.
    """
    start, border = 0, re.compile(r"(?<=[^\W\d_])(?=\s)")
    while len(text) - start > 4 * size:
        found = border.search(text, start + size, start + 4 * size)
        end = found.start() if found else start + 4 * size
        yield text[start:end]
        start = end
    yield text[start:]


def from_sentencepiece(file):
    """A SentencePiece model, with the tokens added to it later (a Vicuna's or DreamLLM's)."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise UserError(f"{file} is a SentencePiece model: pip install sentencepiece") from None
    try:
        model = SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError, ValueError):
        raise UserError(f"{file}: neither a SentencePiece model nor a list of tokens and ranks") from None
    known = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    control = [{"content": piece, "id": i, "special": True} for piece, i in known.items() if model.is_control(i)]
    config, names = sibling_json(file, "tokenizer_config.json"), named_tokens(file)
    try:
        added = added_tokens(file, known, control)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{file.parent}: its added tokens: {error!r}") from None
    ends = {"bos_token": model.bos_id(), "eos_token": model.eos_id()}
    bos, eos = (added[names[use]].id if use in names else i if i >= 0 else None for use, i in ends.items())
    bytes_of = {i: piece_bytes(piece) for piece, i in known.items()}
    bytes_of[model.unk_id()] = model.decode([model.unk_id()]).encode()  # " ⁇ "
    encode = after = model.encode
    prefix = config.get("add_prefix_space") is not False
    if not prefix or config.get("legacy") is False:  # then at most the text that begins a conversation gets a space
        # four more bytes at the end of the model file say: normalizer_spec.add_dummy_prefix = false
        after = SentencePieceProcessor(model_proto=settings.read_bytes(file) + b"\x1a\x02\x18\x00").encode
        encode = model.encode if prefix else after
    bos = bos if config.get("add_bos_token", True) else None
    strips = bytes_of[encode("a")[0]].startswith(b" ")
    return Tokenizer(encode, bytes_of, added, bos, eos, stop_ids(file), after, strips=strips)


# ---- CLIP's tokenizer ------------------------------------------------------------------------
# It differs in three ways: a text is cleaned and lower-cased; spaces separate words and are no part
# of them; the end of a word belongs to its last symbol ("t</w>" is not "t").

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
CLIP_WORDS = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)
CLIP_SIZE = 49408
CLIP_BYTES = 1 << 24  # of the list of merges when it is unpacked: OpenAI's has 3 MB
CLIP_FILES = (("vocab.json", "merges.txt"), ("bpe_simple_vocab_16e6.txt.gz",), ("tokenizer.json",))


def clip_tokens(merges):
    """All tokens but start and end: each byte, each byte at a word's end, what the merges make."""
    tokens = [*BYTE_OF, *(f"{letter}</w>" for letter in BYTE_OF)]
    return tokens + [left + right for left, right in merges]


def numbered(tokens):
    """{token: id} in their order, with start and end behind them."""
    return {token: i for i, token in enumerate([*tokens, CLIP_START, CLIP_END])}


@functools.cache
def note_that_ftfy_is_missing():
    print("note: without ftfy (pip install ftfy), a few unusual texts get other CLIP tokens", file=sys.stderr)


def clean_caption(text):
    """Text as CLIP reads it: mended, HTML entities resolved, single spaces, lower case."""
    if ftfy:
        text = ftfy.fix_text(text)
    elif not text.isascii():
        note_that_ftfy_is_missing()
    return regex.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip().lower()


class CLIPTokenizer:
    """CLIP's byte-pair encoding. `vocabulary` {token: id}; `merges` [(left, right)], the first
    merged first; `added` {name: Added}: words learned later, which textual inversion publishes.

    `pad` fills up after the end of a text: its end token in OpenAI's Hugging Face files, 0 in
    OpenAI's own code and in open_clip's. The pooled feature never sees it, because attention only
    looks back; latent diffusion reads every position, so it does. (Where it is 0, which is "!",
    transformers takes every "!" of a text for padding too; the original code does not, nor does
    this.)
    """

    def __init__(self, vocabulary, merges, pad, added=None):
        tokens = clip_tokens(merges)
        missing = [token for token in (*tokens, CLIP_START, CLIP_END) if token not in vocabulary]
        if missing:
            raise UserError(f"CLIP's vocabulary lacks {missing[0]!r} ({len(missing)} tokens are missing)")
        for token, i in vocabulary.items():
            if type(i) is not int or not 0 <= i < 2**31:
                raise UserError(f"CLIP's vocabulary gives {token!r} the id {i!r}")
        self.added = added or {}
        self.vocabulary = vocabulary | {name: token.id for name, token in self.added.items()}
        self.merges, self.pad = merges, pad
        self.start, self.end = vocabulary[CLIP_START], vocabulary[CLIP_END]
        self.tokens = {i: token for token, i in self.vocabulary.items()}
        self.words, self.parts = bpe(vocabulary, merges, suffix="</w>"), finder(self.added, clean_caption)

    @classmethod
    def of_bytes(cls):
        """The tokenizer of a small CLIP: 512 basic tokens, start 512, end 513, and no merges."""
        return cls(numbered(clip_tokens([])), [], pad=513)

    @classmethod
    def from_pretrained(cls, path):
        """From vocab.json + merges.txt, OpenAI's bpe_simple_vocab_16e6.txt.gz or tokenizer.json,
        or their folder.
        """
        path = Path(path)
        if os.path.isdir(path):
            names = find_clip_files(path)
            if not names:
                raise UserError(f"{path}: no CLIP tokenizer in this folder (looked for {clip_file_names()})")
            path = path / names[0]
        try:
            if path.name.endswith(".gz"):
                merges = read_clip_gz(path)
                return cls.named(path, numbered(clip_tokens(merges)), merges, 0)
            read = read_clip_json if path.name == "tokenizer.json" else read_clip_pair
            vocabulary, merges, listed = read(path)
            added = added_tokens(path, vocabulary, listed)
            ends = {name: added[name].id for name in (CLIP_START, CLIP_END) if name in added}
            pad = added.get(named_tokens(path).get("pad_token"), added[CLIP_END])
            added = {name: token for name, token in added.items() if name not in vocabulary | ends}
            return cls.named(path, vocabulary | ends, merges, pad.id, added)
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zlib.error) as error:
            raise UserError(f"{path}: not a CLIP tokenizer ({type(error).__name__}: {error})") from None

    @classmethod
    def named(cls, path, *arguments):
        """The same as cls(*arguments), of which errors say that it comes from the file `path`."""
        try:
            return cls(*arguments)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def save_pretrained(self, path, context_length):
        """Writes vocab.json, merges.txt and tokenizer_config.json as transformers' CLIPTokenizer
        reads them.
        """
        path = Path(path)
        config = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": context_length,
            "bos_token": CLIP_START,
            "eos_token": CLIP_END,
            "unk_token": CLIP_END,
            "pad_token": self.tokens[self.pad],
        }
        merges = "".join(f"{left} {right}\n" for left, right in self.merges)
        vocabulary = {token: i for token, i in self.vocabulary.items() if token not in self.added}
        if self.added:
            config["added_tokens_decoder"] = as_entries(self.added)
        checkpoint.write_text(path / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
        checkpoint.write_text(path / "merges.txt", "#version: 0.2\n" + merges)
        checkpoint.write_json(path / "tokenizer_config.json", config)

    def encode(self, text):
        """text → ids, without start and end."""
        ids = []
        for part in self.parts(text, special=True):
            for word in [part] if isinstance(part, int) else CLIP_WORDS.findall(part):
                if isinstance(word, int):
                    ids.append(word)
                else:
                    ids += [self.vocabulary[word]] if word in (CLIP_START, CLIP_END) else self.words(to_letters(word))
        return ids

    def decode(self, ids):
        """ids → text, with a space after every word; the letters' case and the spacing are lost."""
        written = b""
        for token in map(self.tokens.__getitem__, ids):
            word = token.removesuffix("</w>")
            space = b" " if word != token or token in self.added else b""
            written += letters_or_name(word) + space
        return written.decode(errors="replace")

    def tokenize(self, texts, context_length=77):
        """A list of texts → (B, context_length) int64: start, text, end, padding."""
        import torch  # the data code reads texts without it

        tokens = torch.full((len(texts), context_length), self.pad)
        for row, text in zip(tokens, texts, strict=True):
            ids = [self.start, *self.encode(text)[: context_length - 2], self.end]
            row[: len(ids)] = torch.tensor(ids)
        return tokens


def read_clip_gz(path):
    """OpenAI's list of merges, which is longer than what CLIP uses."""
    with gzip.open(io.BytesIO(settings.read_bytes(path))) as file:
        text = file.read(CLIP_BYTES + 1)
    if len(text) > CLIP_BYTES:
        raise ValueError(f"more than {CLIP_BYTES >> 20} MiB when unpacked")
    lines = text.decode().split("\n")
    used = CLIP_SIZE - 2 * 256 - 2
    return [tuple(line.split()) for line in lines[1 : 1 + used]]


def read_clip_json(path):
    """A tokenizer.json → (vocabulary, merges, its list of added tokens)."""
    saved = checkpoint.read_json(path)
    merges = read_merges(saved["model"])
    return saved["model"]["vocab"], merges, saved["added_tokens"]


def read_clip_pair(path):
    """vocab.json and merges.txt → (vocabulary, merges, no list of added tokens)."""
    vocabulary = checkpoint.read_json(path.with_name("vocab.json"))
    lines = settings.read_text(path.with_name("merges.txt")).split("\n")
    merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    return vocabulary, merges, []


def clip_file_names():
    return " or ".join(map(" + ".join, CLIP_FILES))


def find_clip_files(folder):
    """The names of the first of CLIP_FILES that are in a folder, or None."""
    for names in CLIP_FILES:
        if all((folder / name).exists() for name in names):
            return names
    return None


def find_clip_tokenizer(path):
    """The CLIPTokenizer of the weights at `path`, or None.

    It is looked for in their folder, in tokenizer/ next to text_encoder/, and in tokenizer/ within.
    """
    folder = path if path.is_dir() else path.parent
    neighbour = folder.parent / folder.name.replace("text_encoder", "tokenizer")
    for place in (folder, neighbour, folder / "tokenizer"):
        if find_clip_files(place):
            return CLIPTokenizer.from_pretrained(place)
    return None
