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

    tokenizer.json      byte-level BPE: Llama 3, SmolLM2, GPT-2 …        with the package tiktoken
    tokenizer.model     lines "base64 rank": Llama 3 as Meta gives it    with tiktoken
    tokenizer.model     a SentencePiece model: LLaMA, Llama 2, Vicuna    with sentencepiece (optional)
    (the word "bytes")  no file at all: 256 bytes, begin, end            for small runs of our own
    CLIP_FILES          CLIP's kind of BPE: CLIPTokenizer, at the end    with tiktoken
"""

import base64
import binascii
import codecs
import collections
import functools
import gzip
import html
import itertools
import json
import re
import sys
import zlib
from pathlib import Path

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
SIBLINGS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
SIBLINGS += ("chat_template.jinja", "chat_template.json")

# The tokens that DreamLLM adds to its LLaMA's. Their ids differ between its published files.
ADDED = ("[PAD]", "<image>", "<im_patch>", "<im_start>", "<im_end>", "<dream>", "<dream_start>", "<dream_end>")


class Tokenizer:
    """Text ⇄ ids.

    bos                   the id that stands before every text; None where there is none (GPT-2, SmolLM2)
    eos                   the id that ends a text
    stops                 all ids that end an answer
    encode_text           a function: text without special tokens → ids
    encode_after_special  the same for a text after a special token (only SentencePiece may differ)
    special               {name: id} of tokens that encode() finds in a text only if it is told to
    always_parsed         {name: id} of other tokens outside the merges, found in any text: "<repo_name>", say
    bytes_of              {id: bytes} of every token
    vocab_size            the largest id + 1
    file                  the tokenizer.json or tokenizer.model that it was read from; None: "bytes"
    files                 {name: content} of that file and of those read with it, to be saved again
    added_since           {name: id} of the special tokens that `add` has added
    """

    def __init__(
        self, encode_text, bytes_of, special, always_parsed=(), bos=None, eos=None, stops=(), encode_after_special=None
    ):
        self.encode_text, self.encode_after_special = encode_text, encode_after_special or encode_text
        self.bytes_of, self.special, self.always_parsed = bytes_of, special, dict(always_parsed)
        self.bos, self.eos = bos, eos
        self.file, self.files, self.added_since = None, {}, {}
        turns = [special[name] for name in ("<|eot_id|>", "<|eom_id|>", "<|im_end|>") if name in special]
        self.stops = {eos, *stops, *turns} - {None}
        self.vocab_size = max(bytes_of) + 1
        # SentencePiece writes a space before every text, so that its first word looks like any other
        first = encode_text("a")[0]
        self.adds_space = bytes_of[first].startswith(b" ")

    @classmethod
    def from_pretrained(cls, path):
        """The tokenizer of a folder, of a tokenizer.json or tokenizer.model, or "bytes"."""
        if str(path) == "bytes":
            return byte_tokenizer()
        path = checkpoint.weights_folder(path)
        found = [path] if path.is_file() else [path / name for name in FILES if (path / name).exists()]
        if not found:
            raise UserError(f"{path}: no tokenizer in this folder (looked for tokenizer.json, tokenizer.model)")
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
        added = sibling_json(file, "added_tokens.json")
        tokenizer.add(added, added)
        return tokenizer

    def add(self, names, ids=None):
        """Makes `names` special tokens: after the last id, or where `ids` {name: id} says.

        Names that are known already keep their ids.
        """
        for name in names:
            if name in self.special or name in self.always_parsed:
                continue
            i = ids[name] if ids else self.vocab_size
            if type(i) is not int or i < 0 or i in self.bytes_of:
                raise UserError(f"{self.file}: the added token {name} has the id {i!r}, which is taken or no number")
            self.special[name], self.bytes_of[i], self.added_since[name] = i, name.encode(), i
            self.vocab_size = max(self.vocab_size, i + 1)

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
        checkpoint.write_json(folder / "added_tokens.json", self.added_since)

    def encode(self, text, bos=False, eos=False, special=False, follows=False):
        """text → [id, …]. With `special`, names of special tokens stand for these tokens.

        `follows`: the text comes after a special token of the same conversation.
        """
        known = self.always_parsed | self.special if special else self.always_parsed
        ids = [self.bos] if bos and self.bos is not None else []
        for part in split_at(text, known):
            if part in known:
                ids.append(known[part])
            else:
                ids += self.encode_after_special(part) if follows else self.encode_text(part)
            follows = True
        return ids + ([self.eos] if eos and self.eos is not None else [])

    def decode(self, ids, special=False):
        """[id, …] → text; special tokens are left out, or written by name. No UTF-8: �."""
        text = "".join(self.stream(ids, special))
        return text[1:] if self.adds_space and text.startswith(" ") else text

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
            return [] if i is None else [i]
        if part not in self.special:
            raise UserError(f"the chat template needs {part}, which this tokenizer does not have")
        return [self.special[part]]


def split_at(text, names):
    """text → its pieces: `names` that occur in it (the longest that fits), and what lies between."""
    if not names:
        return [text] if text else []
    pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return list(filter(None, re.split(f"({pattern})", text)))


BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"


def byte_tokenizer():
    """The smallest vocabulary: a byte is its own id; 256 begins a text, 257 ends it."""
    special = {BEGIN: 256, END: 257}
    bytes_of = {i: bytes([i]) for i in range(256)} | names_as_bytes(special)
    return Tokenizer(lambda text: list(text.encode(errors="replace")), bytes_of, special, bos=256, eos=257)


def names_as_bytes(ids):
    """{name: id} → {id: bytes of the name}."""
    return {i: name.encode() for name, i in ids.items()}


# ---- byte-pair encoding ----------------------------------------------------------------------

# How a text is split into words before any bytes are merged.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def merger(tokens, pattern=""):
    """tokens {bytes: id} in the order of their merges → (tiktoken's encoder, the id of each rank).

    The 256 bytes come before all merges. tiktoken takes ids for ranks. In published files they
    may differ (SmolLM2's special tokens come first).
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}), list(tokens.values())


def byte_pair_encoder(tokens, patterns, unknown=None):
    """tokens as `merger` takes them → a function text → ids.

    Each of `patterns` splits the pieces that the one before left, into its matches and what lies
    between them. A byte that is no token becomes `unknown`; without it, it is left out of its word
    before any merge.
    """
    patterns = [rf"{pattern}|(?s:(?!{pattern}).)+" for pattern in patterns] or [r"(?s:.)+"]
    lacking = bytes(byte for byte in range(256) if bytes([byte]) not in tokens)
    if lacking:
        words = [regex.compile(pattern) for pattern in patterns]
        # tiktoken wants all bytes: those that lack get numbers that no merge knows
        bpe, ids = merger(tokens | {bytes([byte]): unknown for byte in lacking})

        def encode_words(text):
            found = []
            for word in split_words(text, words):
                kept = word.encode(errors="replace")
                kept = kept.translate(None, lacking) if unknown is None else kept
                found += [ids[rank] for rank in bpe._encode_single_piece(kept)] if kept else []
            return found

        return encode_words
    bpe, ids = merger(tokens, patterns.pop())
    patterns = [regex.compile(pattern) for pattern in patterns]

    def encode(text):
        pieces = split_words(text, patterns)
        return [ids[rank] for piece in pieces for rank in bpe.encode_ordinary(piece)]

    return encode


def split_words(text, patterns):
    """text → its pieces, which each of `patterns` cuts smaller."""
    pieces = chunks(text)
    for pattern in patterns:
        pieces = [match.group() for piece in pieces for match in pattern.finditer(piece)]
    return pieces


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


def to_letters(token):
    return "".join(map(LETTER_OF.__getitem__, token))


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
            merge(tokens, best)
    return found


def merge(tokens, pair):
    """Joins each `pair` in a list of tokens, from the left: "---" becomes "--", "-"."""
    i = 0
    while i < len(tokens) - 1:
        if (tokens[i], tokens[i + 1]) == pair:
            tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]
        i += 1


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


def is_byte_level(saved):
    """Whether a tokenizer.json (a dict) holds byte-level BPE."""
    try:
        return saved["model"]["type"] == "BPE" and flatten(saved["pre_tokenizer"])[-1]["type"] == "ByteLevel"
    except (KeyError, TypeError, AttributeError):  # such as "pre_tokenizer": null
        return False


USUAL_ENDS = ("<|end_of_text|>", "<|endoftext|>")  # where no file says which token ends a text


def from_json(file, saved):
    """A tokenizer.json (its content: `saved`) and the small files next to it → Tokenizer."""
    if not is_byte_level(saved):
        raise UserError(f"{file}: holds no byte-level BPE; put the original tokenizer.model next to it")
    config = sibling_json(file, "tokenizer_config.json")
    try:
        tokens, without_merge = merged_tokens(saved)
        unknown = saved["model"].get("unk_token")
        if unknown is not None and unknown not in saved["model"]["vocab"]:
            raise ValueError(f"its unk_token {unknown} is not in its vocabulary")
        encode_text = byte_pair_encoder(tokens, split_patterns(saved), saved["model"]["vocab"].get(unknown))
        special, always_parsed = {}, {}
        for entry in saved["added_tokens"]:
            (special if entry["special"] else always_parsed)[entry["content"]] = entry["id"]
        names = always_parsed | special
        bytes_of = {i: token for token, i in (tokens | without_merge).items()} | names_as_bytes(names)
        for i in bytes_of:
            if type(i) is not int or i < 0:
                raise ValueError(f"its vocabulary has the id {i!r}")
        bos = name_of(config.get("bos_token")) if config.get("add_bos_token") else bos_name(saved.get("post_processor"))
        eos = name_of(config.get("eos_token")) or next(filter(names.__contains__, USUAL_ENDS), None)
        stops = stop_ids(file)
        return Tokenizer(encode_text, bytes_of, special, always_parsed, names.get(bos), names.get(eos), stops)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, regex.error) as error:
        reason = error if type(error) is ValueError else f"not the file it should be: {error!r}"
        raise UserError(f"{file}: {reason}") from None


def merged_tokens(saved):
    """→ {bytes: id} in the order of merges, and {bytes: id} that no merge makes.

    A ValueError says what is not supported.
    """
    model, added = saved["model"], saved["added_tokens"]
    refuse_unsupported(model, added)
    vocab = vocab_in_bytes(model["vocab"], added)

    # the bytes in the order of their ids, then what each merge makes
    by_id = sorted(vocab, key=vocab.get)
    tokens = {token: vocab[token] for token in by_id if len(token) == 1}
    for pair in model["merges"]:  # "a b", or since 2024 ["a", "b"]
        token = from_letters("".join(pair.split(" ") if isinstance(pair, str) else pair))
        if token not in vocab:
            raise ValueError(f"the merge to {token!r} makes a token that is not in its vocabulary")
        tokens.setdefault(token, vocab[token])  # of several merges to one token the first counts

    # what is left was put into the vocabulary by hand: encoding never yields it, but a model may
    known = {*tokens.values(), *(entry["id"] for entry in added)}
    without_merge = {token: i for token, i in vocab.items() if i not in known}
    if without_merge and model.get("ignore_merges"):  # then whole words are looked up, which tiktoken would not do
        raise ValueError(f"ignore_merges, with {len(without_merge)} tokens that no merge makes, is not supported")
    return tokens, without_merge


def refuse_unsupported(model, added):
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "fuse_unk"):
        if model.get(key):
            raise ValueError(f"BPE with {key} is not supported")
    for entry in added:
        if entry.get("lstrip") or entry.get("rstrip") or entry.get("single_word"):
            raise ValueError("added tokens that take the spaces beside them along are not supported")


def vocab_in_bytes(vocab, added):
    """{letters: id} → {bytes: id}, without the added tokens that are no bytes in letters."""
    names, spelled = {entry["content"] for entry in added}, {}
    for text, i in vocab.items():
        if text not in names or set(text) <= BYTE_OF.keys():
            spelled[from_letters(text)] = i
    return spelled


def flatten(step):
    """A part of tokenizer.json, or a sequence of them, as a flat list."""
    parts = step.get("pretokenizers") or step.get("processors") or step.get("normalizers")
    return list(itertools.chain.from_iterable(map(flatten, parts))) if parts else [step]


def split_patterns(saved):
    """The regexes that split a text into words, one after the other. ValueError: not supported."""
    for step in flatten(saved.get("normalizer") or {"type": "Sequence"}):
        if step.get("type") != "Sequence":
            raise ValueError(f"the normalizer {saved['normalizer'].get('type')} is not supported")
    patterns = []
    *steps, byte_level = flatten(saved["pre_tokenizer"])  # the last one writes bytes as letters
    for step in steps:
        kind, how = step["type"], (step.get("behavior"), step.get("invert"))
        if kind == "Split" and how in (("Isolated", False), ("Removed", True)):
            form, pattern = next(iter(step["pattern"].items()))
            patterns.append(pattern if form == "Regex" else re.escape(pattern))
        elif kind == "Digits":
            patterns.append(r"\p{N}" if step["individual_digits"] else r"\p{N}+")
        else:
            raise ValueError(f"the pre-tokenizer {' '.join([kind, *map(str, filter(None, how))])} is not supported")
    if byte_level["add_prefix_space"]:
        raise ValueError("add_prefix_space is not supported")
    return [*patterns, GPT2] if byte_level.get("use_regex", True) else patterns


def bos_name(post_processor):
    """The name of the token that is put before every text, or None."""
    for step in flatten(post_processor or {}):
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
    special, reserved = {}, itertools.count()
    for number in range(256):
        name = LLAMA3_SPECIAL.get(number) or f"<|reserved_special_token_{next(reserved)}|>"
        special[name] = len(tokens) + number
    bytes_of = {i: token for token, i in tokens.items()} | names_as_bytes(special)
    encode_text = byte_pair_encoder(tokens, [LLAMA3])
    return Tokenizer(encode_text, bytes_of, special, bos=128_000, eos=128_001, stops=stop_ids(file))


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
    bytes_of, special = {}, {}
    for i in range(model.get_piece_size()):
        name = model.id_to_piece(i)
        if model.is_byte(i):
            bytes_of[i] = bytes([int(name[1:-1], 16)])  # "<0x0A>"
        else:
            bytes_of[i] = name.replace("▁", " ").encode()
        if model.is_control(i) or model.is_unknown(i):
            special[name] = i
    config = sibling_json(file, "tokenizer_config.json")
    try:
        for i, entry in config.get("added_tokens_decoder", {}).items():
            if int(i) not in bytes_of:
                special[entry["content"]], bytes_of[int(i)] = int(i), entry["content"].encode()
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{file.parent / 'tokenizer_config.json'}: added_tokens_decoder: {error!r}") from None
    bos = model.bos_id() if model.bos_id() >= 0 and config.get("add_bos_token", True) else None
    eos = model.eos_id() if model.eos_id() >= 0 else None
    inner = None
    if not config.get("legacy", True):  # then only the text that begins a conversation gets a space before it
        # four more bytes at the end of the model file say: normalizer_spec.add_dummy_prefix = false
        inner = SentencePieceProcessor(model_proto=settings.read_bytes(file) + b"\x1a\x02\x18\x00").encode
    stops = stop_ids(file)
    return Tokenizer(model.encode, bytes_of, special, bos=bos, eos=eos, stops=stops, encode_after_special=inner)


# ---- CLIP's tokenizer ------------------------------------------------------------------------
# It differs in three ways: a text is cleaned and lower-cased; spaces separate words and are no part
# of them; the end of a word belongs to its last byte ("t</w>" is not "t"). tiktoken knows bytes
# only, so "</w>" is written 0xFF, a byte that no UTF-8 text contains.

CLIP_START, CLIP_END, CLIP_WORD_END = "<|startoftext|>", "<|endoftext|>", b"\xff"
CLIP_WORDS = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)
CLIP_SIZE = 49408
CLIP_FILES = (("vocab.json", "merges.txt"), ("bpe_simple_vocab_16e6.txt.gz",), ("tokenizer.json",))


def clip_tokens(merges):
    """All tokens but start and end: each byte, each byte at a word's end, what the merges make."""
    tokens = [*BYTE_OF, *(f"{letter}</w>" for letter in BYTE_OF)]
    return tokens + [left + right for left, right in merges]


def clip_bytes(token):
    word = token.removesuffix("</w>")
    return from_letters(word) + (CLIP_WORD_END if word != token else b"")


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
    merged first.

    `pad` fills up after the end of a text: its end token in OpenAI's Hugging Face files, 0 in
    OpenAI's own code and in open_clip's. The pooled feature never sees it, because attention only
    looks back; latent diffusion reads every position, so it does. (Where it is 0, which is "!",
    transformers takes every "!" of a text for padding too; the original code does not, nor does
    this.)
    """

    def __init__(self, vocabulary, merges, pad):
        tokens = clip_tokens(merges)
        missing = [token for token in (*tokens, CLIP_START, CLIP_END) if token not in vocabulary]
        if missing:
            raise UserError(f"CLIP's vocabulary lacks {missing[0]!r} ({len(missing)} tokens are missing)")
        for token, i in vocabulary.items():
            if type(i) is not int or not 0 <= i < 2**31:
                raise UserError(f"CLIP's vocabulary gives {token!r} the id {i!r}")
        self.vocabulary, self.merges, self.pad = vocabulary, merges, pad
        self.start, self.end = vocabulary[CLIP_START], vocabulary[CLIP_END]
        self.tokens = {i: token for token, i in vocabulary.items()}
        self.bpe, self.ids = merger({clip_bytes(token): vocabulary[token] for token in tokens})

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
        if path.is_dir():
            names = find_clip_files(path)
            if not names:
                raise UserError(f"{path}: no CLIP tokenizer in this folder (looked for {clip_file_names()})")
            path = path / names[0]
        try:
            if path.name.endswith(".gz"):
                merges = read_clip_gz(path)
                return cls(numbered(clip_tokens(merges)), merges, pad=0)
            read = read_clip_json if path.name == "tokenizer.json" else read_clip_pair
            vocabulary, merges = read(path)
            return cls(vocabulary, merges, vocabulary[clip_pad_token(path)])
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zlib.error) as error:
            raise UserError(f"{path}: not a CLIP tokenizer ({type(error).__name__}: {error})") from None

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
        checkpoint.write_text(path / "vocab.json", json.dumps(self.vocabulary, ensure_ascii=False))
        checkpoint.write_text(path / "merges.txt", "#version: 0.2\n" + merges)
        checkpoint.write_json(path / "tokenizer_config.json", config)

    def encode(self, text):
        """text → ids, without start and end."""
        ids = []
        for word in CLIP_WORDS.findall(clean_caption(text)):
            if word in (CLIP_START, CLIP_END):
                ids.append(self.vocabulary[word])
            else:
                ranks = self.bpe._encode_single_piece(word.encode() + CLIP_WORD_END)
                ids += [self.ids[rank] for rank in ranks]
        return ids

    def decode(self, ids):
        """ids → text, with a space after every word; the letters' case and the spacing are lost."""
        written = b""
        for token in map(self.tokens.__getitem__, ids):
            written += token.encode() if token in (CLIP_START, CLIP_END) else clip_bytes(token)
        return written.replace(CLIP_WORD_END, b" ").decode(errors="replace")

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
    lines = gzip.decompress(settings.read_bytes(path)).decode().split("\n")
    used = CLIP_SIZE - 2 * 256 - 2
    return [tuple(line.split()) for line in lines[1 : 1 + used]]


def read_clip_json(path):
    """A tokenizer.json → (vocabulary, merges)."""
    saved = checkpoint.read_json(path)
    vocabulary = saved["model"]["vocab"] | {token["content"]: token["id"] for token in saved["added_tokens"]}
    # newer files write a merge as a pair, older ones as a text with a space
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in saved["model"]["merges"]]
    return vocabulary, merges


def read_clip_pair(path):
    """vocab.json and merges.txt → (vocabulary, merges)."""
    vocabulary = checkpoint.read_json(path.with_name("vocab.json"))
    lines = settings.read_text(path.with_name("merges.txt")).split("\n")
    merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    return vocabulary, merges


def clip_pad_token(file):
    """The padding token that the files beside a vocabulary name; without any, the end token."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # SD 2: they differ, the first is right
        token = name_of(sibling_json(file, name).get("pad_token"))
        if token:
            return token
    return CLIP_END


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
