"""Tokenizer: text ⇄ ids, with whatever vocabulary a checkpoint's folder brings along.

A language model reads numbers. Which numbers stand for a text was settled before its training, by byte-pair
encoding (Gage 1994; Sennrich et al. 2016, algorithm 1; on bytes: Radford et al. 2019): start from bytes, and
join the two neighbours that were most often neighbours in some large text, again and again. The list of those
joins, in order, is the vocabulary. To encode, make the same joins in the same order.

    text ─ cut at special tokens ─ cut into words (a regex) ─ join bytes, earliest merge first ─▶ ids
    ids  ─ each id's bytes, end to end ─ UTF-8, as soon as a character is whole ─────────────────▶ text

What a folder holds decides which tokenizer it is:

    tokenizer.json      byte-level BPE: Llama 3, SmolLM2, GPT-2 …        merged by the package tiktoken
    tokenizer.model     lines "base64 rank": Llama 3 as Meta gives it    the same
    tokenizer.model     a SentencePiece model: LLaMA, Llama 2, Vicuna    by the package sentencepiece (optional)
    (the word "bytes")  no file at all: 256 bytes, begin, end            for small runs of our own

`train_bpe` finds such joins in texts of one's own (python prepare.py vocabulary writes their tokenizer.json). No token
reaches over a word's border, and a space belongs to the word behind it: "taco" and " taco" are two tokens, and a
prompt that ends with a space hides the next word from a model.

Special tokens (`<s>`, `<|eot_id|>`) are the frame around texts: where one begins, who speaks. Typed by a user
they are mere text, unless encode() is asked to see them: else anyone could end a turn and begin another's.

Read next: data.py, which makes rows of texts; sample.py, which prints them as they come.
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
from pathlib import Path

import regex
import tiktoken
from tqdm import tqdm

from support import checkpoint
from support.settings import UserError

try:
    import ftfy  # mends mis-decoded text, as OpenAI did before tokenizing; an optional extra
except ImportError:
    ftfy = None

FILES = ("tokenizer.json", "tokenizer.model")
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")

# What DreamLLM's tokenizers know besides (its published files; their ids differ: resolve them by name).
ADDED = ("[PAD]", "<image>", "<im_patch>", "<im_start>", "<im_end>", "<dream>", "<dream_start>", "<dream_end>")


class Tokenizer:
    """Text ⇄ ids.

    bos     the id that stands before every text, None where there is none (GPT-2, SmolLM2)
    eos     the id that ends a text; `stops`: all ids that end an answer
    words   a function, text without special tokens → ids
    inner   the same for a text that follows a special token (SentencePiece alone may tell them apart)
    special {name: id} of the tokens that are seen in a text only when asked
    added   {name: id} of tokens that are no merges either but are always seen: SmolLM2's "<repo_name>", say
    bytes_of  {id: bytes} of every token
    file    the tokenizer.json or tokenizer.model it was read from; None: "bytes"
    files   {name: content} of that file and what else was read beside it: what is saved again
    later   {name: id} of the special tokens that were added since
    """

    def __init__(self, words, pieces, special, added=(), bos=None, eos=None, stops=(), inner=None):
        self.words, self.inner = words, inner or words
        self.bytes_of, self.special, self.added = pieces, special, dict(added)
        self.bos, self.eos = bos, eos
        self.file, self.files, self.added_since = None, {}, {}
        turns = [special[name] for name in ("<|eot_id|>", "<|eom_id|>", "<|im_end|>") if name in special]
        self.stops = {i for i in (eos, *stops, *turns) if i is not None}
        self.vocab_size = max(pieces) + 1
        # SentencePiece writes a space before every text, so that its first word looks like any other
        first = words("a")[0]
        self.adds_space = pieces[first].startswith(b" ")

    @classmethod
    def from_pretrained(cls, path):
        """The tokenizer of a folder (a run's too), of a tokenizer.json or tokenizer.model, or "bytes"."""
        if str(path) == "bytes":
            return byte_tokenizer()
        path = checkpoint.weights_folder(path)
        files = [path] if path.is_file() else [path / name for name in FILES if (path / name).exists()]
        if not files:
            raise UserError(f"{path}: no tokenizer here (looked for tokenizer.json, tokenizer.model)")
        file = files[0]
        saved = checkpoint.read_json(file) if file.suffix == ".json" else None
        if files[1:] and not is_byte_level(saved):  # Llama 2's holds SentencePiece's rules, which are in the other
            file = files[1]
        tokenizer = from_json(file, saved) if file.suffix == ".json" else from_model(file)
        names = {f"tokenizer{'.json' if file.suffix == '.json' else '.model'}": file}
        names |= {name: file.parent / name for name in BESIDE}
        # Kept, not copied later: the folder may be a checkpoint that is gone when the next one is written.
        tokenizer.files = {name: place.read_bytes() for name, place in names.items() if place.exists()}
        tokenizer.file = file
        later = _beside(file, "added_tokens.json")
        tokenizer.add(later, later)
        return tokenizer

    def add(self, names, ids=None):
        """Makes each of `names` a special token: at the end of the vocabulary, or where `ids` {name: id} says.

        Names that are known already keep their ids.
        """
        for name in names:
            if name in self.special or name in self.added:
                continue
            i = ids[name] if ids else self.vocab_size
            if type(i) is not int or i < 0 or i in self.bytes_of:
                raise UserError(f"{self.file}: the added token {name} has the id {i!r}, which it cannot have")
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
            with checkpoint.atomic_file(folder / name) as beside:
                beside.write_bytes(content)
        checkpoint.write_text(folder / "added_tokens.json", json.dumps(self.added_since, indent=2) + "\n")

    def encode(self, text, bos=False, eos=False, special=False, follows=False):
        """text → [id, …]. With `special`, the names of special tokens in the text stand for these tokens.

        `follows`: the text goes on after a special token of the same conversation.
        """
        known = self.added | self.special if special else self.added
        ids = [self.bos] if bos and self.bos is not None else []
        for part in _cut_out(text, known):
            words = self.inner if follows else self.words
            ids += [known[part]] if part in known else words(part)
            follows = True
        return ids + ([self.eos] if eos and self.eos is not None else [])

    def decode(self, ids, special=False):
        """[id, …] → text; special tokens are left out, or written by name. Bytes that are no UTF-8 become �."""
        text = "".join(self.stream(ids, special))
        return text[1:] if self.adds_space and text.startswith(" ") else text

    def decoder(self, special=False):
        """A function for decoding as ids come in: id → the text that it completes, None → what is left at the end.

        The text is "" while a character lacks bytes, and for a special token unless `special` asks for its name.
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
        """Yields text while `ids` (any iterable) come in, only whole characters; a text's first space stays."""
        decode = self.decoder(special)
        for i in itertools.chain(ids, [None]):
            if text := decode(i):
                yield text

    def encode_chat(self, messages, template):
        """[{"role": "system" | "user" | "assistant", "content": text}, …] → ids.

        `template` is a key of TEMPLATES. The system message comes first or not at all, then user and assistant
        take turns; after a last user message the assistant's answer is what the model says next.
        """
        return self.encode_parts(render_chat(messages, template))

    def encode_parts(self, parts):
        """[text, Special or [id, …], …] → ids of one conversation. A list of ids (a picture's span) is kept as it is.

        Texts are never searched for special tokens: whoever writes "</s>" into a message gets its letters.
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


def _cut_out(text, names):
    """text → its pieces, each one of `names` (the longest that fits, as the reference does) or what lies between."""
    if not names:
        return [text] if text else []
    pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return [part for part in re.split(f"({pattern})", text) if part]


BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"


def byte_tokenizer():
    """The smallest vocabulary that can say everything: a byte is its own id; 256 begins a text, 257 ends it."""
    special = {BEGIN: 256, END: 257}
    pieces = {i: bytes([i]) for i in range(256)} | {i: name.encode() for name, i in special.items()}
    return Tokenizer(lambda text: list(text.encode(errors="replace")), pieces, special, bos=256, eos=257)


# ---- byte-pair encoding ----------------------------------------------------------------------

# How a text is cut into words before any byte is joined: no token reaches over these borders.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_pair_encoder(tokens, patterns):
    """tokens {bytes: id} in the order of their merges, all 256 bytes first → a function text → ids.

    Each of `patterns` cuts the pieces that the one before left: its matches, and what lies between them.
    """
    patterns = [rf"{pattern}|(?s:(?!{pattern}).)+" for pattern in patterns] or [r"(?s:.)+"]
    *before, last = patterns
    before = [regex.compile(pattern) for pattern in before]
    # tiktoken takes an id for a rank. In published files they may differ (SmolLM2's special tokens come first).
    ranks, ids = {token: rank for rank, token in enumerate(tokens)}, list(tokens.values())
    bpe = tiktoken.Encoding("", pat_str=last, mergeable_ranks=ranks, special_tokens={})

    def encode(text):
        pieces = list(_slices(text))
        for pattern in before:
            pieces = [match.group() for piece in pieces for match in pattern.finditer(piece)]
        return [ids[rank] for piece in pieces for rank in bpe.encode_ordinary(piece)]

    return encode


def _slices(text, size=100_000):
    """text in pieces: tiktoken's regex gives up (by a panic, not an exception) on a million spaces in a row.

    Between a letter and a space every pattern cuts, and none looks back over its cut: there, slices change no id.
    """
    start, border = 0, re.compile(r"(?<=[^\W\d_])(?=\s)")
    while len(text) - start > 4 * size:
        cut = border.search(text, start + size, start + 4 * size)
        end = cut.start() if cut else start + 4 * size
        yield text[start:end]
        start = end
    yield text[start:]


def _byte_letters():
    """tokenizer.json writes bytes as letters: printable ones as themselves, the 68 others as U+0100 and on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


BYTE_OF = _byte_letters()  # in the order of CLIP's first 256 tokens
LETTER_OF = {byte: letter for letter, byte in BYTE_OF.items()}


def train_bpe(texts, merges):
    """texts → the first `merges` joins of byte-pair encoding, [(bytes, bytes), …]; fewer when every word is one token.

    The most frequent pair of neighbours within a word (as GPT-2 cuts words: " taco" is one, its space included) is
    joined everywhere, and all are counted anew; of equally frequent pairs, the one that sorts last. Sennrich et al.
    2016, algorithm 1. A join is a pass over all distinct words: minutes in all for those of a book.
    """
    counts = collections.Counter(match.group() for text in texts for match in regex.finditer(GPT2, text))
    words = [([bytes([byte]) for byte in word.encode()], count) for word, count in counts.items()]
    joins = []
    for _ in tqdm(range(merges), desc="vocabulary", unit=" merges", mininterval=1):
        pairs = collections.Counter()
        for tokens, count in words:
            for pair in itertools.pairwise(tokens):
                pairs[pair] += count
        if not pairs:
            break
        first, second = max(pairs, key=lambda pair: (pairs[pair], pair))
        joins.append((first, second))
        for tokens, _ in words:
            place = 0
            while place < len(tokens) - 1:  # from the left, as encoders do: "---" becomes "--", "-"
                if tokens[place : place + 2] == [first, second]:
                    tokens[place : place + 2] = [first + second]
                place += 1
    return joins


def write_merges(folder, merges, later=None):
    """Writes byte-level BPE as a tokenizer.json with tokenizer_config.json, as Hugging Face's tokenizers read it.

    A byte is its own id, merge n makes the token 256 + n; then come what begins and what ends a text. later:
    {name: id} of special tokens that were added.
    """
    special = {BEGIN: 256 + len(merges), END: 257 + len(merges)} | (later or {})
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": i, "content": name, "special": True} | plain for name, i in special.items()]
    template = [{"SpecialToken": {"id": BEGIN, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    first = {
        "type": "TemplateProcessing",
        "single": template,
        "pair": [*template, {"Sequence": {"id": "B", "type_id": 1}}],
    }
    first["special_tokens"] = {BEGIN: {"id": BEGIN, "ids": [special[BEGIN]], "tokens": [BEGIN]}}
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    letters["use_regex"] = bool(merges)  # it cuts words, as GPT-2 does: without merges there is nothing to cut for
    spelled = [["".join(map(LETTER_OF.get, token)) for token in pair] for pair in merges]
    vocab = BYTE_OF | {"".join(pair): 256 + n for n, pair in enumerate(spelled)}
    saved = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": letters,
        "post_processor": first,
        "decoder": letters,
        "model": {"type": "BPE", "vocab": vocab, "merges": [" ".join(pair) for pair in spelled]},
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END, "add_bos_token": True}
    for name, content in (("tokenizer_config.json", config), ("tokenizer.json", saved)):
        checkpoint.write_text(Path(folder) / name, json.dumps(content, indent=2) + "\n")


def is_byte_level(saved):
    """Whether a tokenizer.json (a dict) holds byte-level BPE."""
    try:
        return saved["model"]["type"] == "BPE" and _steps(saved["pre_tokenizer"])[-1]["type"] == "ByteLevel"
    except (KeyError, TypeError, AttributeError):  # such as "pre_tokenizer": null
        return False


USUAL_ENDS = ("<|end_of_text|>", "<|endoftext|>")  # where no file beside it says what ends a text


def from_json(file, saved):
    """A tokenizer.json (read: `saved`) and the small files beside it as a Tokenizer."""
    if not is_byte_level(saved):
        raise UserError(f"{file}: holds no byte-level BPE; put the tokenizer.model it was made of beside it")
    config = _beside(file, "tokenizer_config.json")
    try:
        tokens, unmade, added = _merged_tokens(saved)
        words = byte_pair_encoder(tokens, _patterns(saved))
        names = {entry["content"]: entry["id"] for entry in added}
        special = {entry["content"]: entry["id"] for entry in added if entry["special"]}
        bos = _name(config.get("bos_token")) if config.get("add_bos_token") else _first(saved.get("post_processor"))
        eos = _name(config.get("eos_token")) or next((n for n in USUAL_ENDS if n in names), None)
        pieces = {i: token for token, i in (tokens | unmade).items()} | {i: name.encode() for name, i in names.items()}
        if odd := [i for i in pieces if type(i) is not int or i < 0]:
            raise ValueError(f"its vocabulary has the id {odd[0]!r}")
        others = {name: i for name, i in names.items() if name not in special}
        return Tokenizer(words, pieces, special, others, names.get(bos), names.get(eos), _stops(file))
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, regex.error) as error:
        reason = error if type(error) is ValueError else f"not the file it should be: {error!r}"
        raise UserError(f"{file}: {reason}") from None


def _merged_tokens(saved):
    """→ {bytes: id} in merge order, {bytes: id} that no merge makes, the added tokens; ValueError if it cannot be."""
    model, added = saved["model"], saved["added_tokens"]
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise ValueError(f"BPE with {key} is not supported")
    if any(entry.get(key) for entry in added for key in ("lstrip", "rstrip", "single_word")):
        raise ValueError("added tokens that take the spaces beside them along are not supported")
    names = {entry["content"] for entry in added}
    spelled = {text: i for text, i in model["vocab"].items() if text not in names or set(text) <= BYTE_OF.keys()}
    vocab = {bytes(map(BYTE_OF.__getitem__, text)): i for text, i in spelled.items()}
    if lacking := [b for b in range(256) if bytes([b]) not in vocab]:
        raise ValueError(f"its vocabulary lacks {len(lacking)} of the 256 bytes")
    order = sorted((token for token in vocab if len(token) == 1), key=vocab.get)
    for merge in model["merges"]:  # "a b", or since 2024 ["a", "b"]
        pair = merge.split(" ") if isinstance(merge, str) else merge
        order.append(bytes(BYTE_OF[letter] for letter in "".join(pair)))
    if absent := [token for token in order if token not in vocab]:
        raise ValueError(f"the merge to {absent[0]!r} makes a token that is not in its vocabulary")
    tokens = {token: vocab[token] for token in order}  # of several merges to one token the first counts
    known = {*tokens.values(), *(entry["id"] for entry in added)}
    unmade = {token: i for token, i in vocab.items() if i not in known}
    if unmade and model.get("ignore_merges"):  # then whole words are looked up there, and tiktoken would merge too
        raise ValueError(f"ignore_merges, with {len(unmade)} tokens that no merge makes, is not supported")
    return tokens, unmade, added


def _steps(step):
    """A part of tokenizer.json, or a sequence of them, as a flat list."""
    parts = step.get("pretokenizers") or step.get("processors") or step.get("normalizers")
    return [inner for part in parts for inner in _steps(part)] if parts else [step]


def _patterns(saved):
    """What cuts a text into words, as regexes one after the other; ValueError where we do not know how."""
    if any(step.get("type") != "Sequence" for step in _steps(saved.get("normalizer") or {"type": "Sequence"})):
        raise ValueError(f"the normalizer {saved['normalizer'].get('type')} is not supported")
    patterns = []
    *steps, letters = _steps(saved["pre_tokenizer"])  # the last one writes bytes as letters
    for step in steps:
        kind, how = step["type"], (step.get("behavior"), step.get("invert"))
        if kind == "Split" and how in (("Isolated", False), ("Removed", True)):
            form, pattern = next(iter(step["pattern"].items()))
            patterns.append(pattern if form == "Regex" else re.escape(pattern))
        elif kind == "Digits":
            patterns.append(r"\p{N}" if step["individual_digits"] else r"\p{N}+")
        else:
            raise ValueError(f"the pre-tokenizer {' '.join([kind, *map(str, filter(None, how))])} is not supported")
    if letters["add_prefix_space"]:
        raise ValueError("add_prefix_space is not supported")
    return [*patterns, GPT2] if letters.get("use_regex", True) else patterns


def _first(post_processor):
    """The name of the token that is put before every text, or None."""
    templates = [step["single"] for step in _steps(post_processor or {}) if step.get("type") == "TemplateProcessing"]
    before = templates[0][0] if templates else {}  # {"SpecialToken": {"id": name}} or {"Sequence": …}, the text
    return before["SpecialToken"]["id"] if "SpecialToken" in before else None


# ---- the files beside it ---------------------------------------------------------------------


def _beside(file, name):
    """A JSON file in the same folder as a dict, {} where there is none."""
    path = file.parent / name
    saved = checkpoint.read_json(path) if path.exists() else {}
    if not isinstance(saved, dict):
        raise UserError(f"{path}: expected a table")
    return saved


def _name(token):
    """A token as configurations give it: a name, or a table that has it."""
    return token.get("content") if isinstance(token, dict) else token


def _stops(file):
    """The ids that end an answer, according to generation_config.json."""
    ids = _beside(file, "generation_config.json").get("eos_token_id")
    return [i for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int]


# ---- tokenizer.model -------------------------------------------------------------------------

LLAMA3_SPECIAL = {  # place among the 256 after the ranks; the others are reserved (Llama 3.1)
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
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    ranks = re.match(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n", data)
    return from_ranks(file, data) if ranks else from_sentencepiece(file)


def from_ranks(file, data):
    """Llama 3's ranks and its 256 special tokens."""
    try:
        pairs = [line.split() for line in data.splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error) as error:
        raise UserError(f"{file}: not a list of tokens and ranks ({error})") from None
    if sorted(ranks.values()) != list(range(128_000)):
        raise UserError(f"{file}: {len(ranks)} ranks; only Llama 3's 128000 are known")
    tokens = dict(sorted(ranks.items(), key=lambda item: item[1]))
    reserved = iter(range(256))
    names = [LLAMA3_SPECIAL.get(i) or f"<|reserved_special_token_{next(reserved)}|>" for i in range(256)]
    special = {name: len(tokens) + i for i, name in enumerate(names)}
    pieces = {i: token for token, i in tokens.items()} | {i: name.encode() for name, i in special.items()}
    words = byte_pair_encoder(tokens, [LLAMA3])
    return Tokenizer(words, pieces, special, bos=128_000, eos=128_001, stops=_stops(file))


def from_sentencepiece(file):
    """A SentencePiece model, with the tokens that were added to it later (a Vicuna's or DreamLLM's)."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise UserError(f"{file} is a SentencePiece model: pip install sentencepiece") from None
    try:
        model = SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError, ValueError):
        raise UserError(f"{file}: neither a SentencePiece model nor a list of tokens and ranks") from None
    pieces, special = {}, {}
    for i in range(model.get_piece_size()):
        name = model.id_to_piece(i)
        if model.is_byte(i):
            pieces[i] = bytes([int(name[1:-1], 16)])  # "<0x0A>"
        else:
            pieces[i] = name.replace("▁", " ").encode()
        if model.is_control(i) or model.is_unknown(i):
            special[name] = i
    config = _beside(file, "tokenizer_config.json")
    try:
        later = {entry["content"]: int(i) for i, entry in config.get("added_tokens_decoder", {}).items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{file.parent / 'tokenizer_config.json'}: added_tokens_decoder: {error!r}") from None
    for name, i in later.items():
        if i not in pieces:
            special[name], pieces[i] = i, name.encode()
    bos = model.bos_id() if model.bos_id() >= 0 and config.get("add_bos_token", True) else None
    eos = model.eos_id() if model.eos_id() >= 0 else None
    inner = None
    if not config.get("legacy", True):  # then only the text that begins a conversation gets a space before it
        # the model file once more with four bytes behind it, which say: normalizer_spec.add_dummy_prefix = false
        inner = SentencePieceProcessor(model_proto=file.read_bytes() + b"\x1a\x02\x18\x00").encode
    return Tokenizer(model.encode, pieces, special, bos=bos, eos=eos, stops=_stops(file), inner=inner)


# ---- conversations ---------------------------------------------------------------------------


class Special(str):
    """A special token by name, in a list of texts: a message that contains the same letters is no such thing."""


BOS, EOS = Special("<s>"), Special("</s>")  # whatever begins and ends a text in the tokenizer at hand


def render_chat(messages, template):
    """Messages → [text or Special, …], as a template (a key of TEMPLATES) writes them."""
    if template not in TEMPLATES:
        raise UserError(f'no chat template "{template}"; there are {", ".join(TEMPLATES)}')
    return TEMPLATES[template](*_turns(messages))


def _turns(messages):
    """→ the system's text (None: it said nothing), [(role, text), …] of the others in turns; or a UserError."""
    if not messages:
        raise UserError("a conversation needs a message")
    first, *rest = messages
    system, turns = (first["content"], rest) if first["role"] == "system" else (None, messages)
    for number, message in enumerate(turns):
        if message["role"] != ("user", "assistant")[number % 2]:
            raise UserError(f"message {number + 1} is of the {message['role']}: user and assistant must take turns")
    if not turns:
        raise UserError("a conversation needs a user's message")
    return system, [(message["role"], message["content"].strip()) for message in turns]


def plain(system, turns):
    """No template: all texts, a line break between them."""
    texts = [text for _, text in turns]
    end = [EOS] if turns[-1][0] == "assistant" else []
    return [BOS, "\n".join(texts if system is None else [system, *texts]), *end]


VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def vicuna(system, turns):
    """Vicuna v1.1 (FastChat's "vicuna_v1.1"); its usual system text stands in for none."""
    system = VICUNA_SYSTEM if system is None else system
    parts, text = [BOS], f"{system} " if system else ""
    for role, content in turns:
        if role == "user":
            text += f"USER: {content} ASSISTANT:"
        else:
            parts += [f"{text} {content}", EOS]
            text = ""
    return [*parts, text] if text else parts


def llama2(system, turns):
    """Llama 2's chat models (Meta's `chat_completion`): each question and its answer are a text of their own."""
    parts = []
    for number, (role, content) in enumerate(turns):
        if role == "user":
            if number == 0 and system is not None:
                content = f"<<SYS>>\n{system}\n<</SYS>>\n\n{content}"
            parts += [BOS, f"[INST] {content} [/INST]"]
        else:
            parts[-1] += f" {content} "
            parts.append(EOS)
    return parts


def llama3(system, turns):
    """Llama 3's instructed models (Meta's `ChatFormat`)."""

    def header(role):
        return [Special("<|start_header_id|>"), role, Special("<|end_header_id|>")]

    said = turns if system is None else [("system", system.strip()), *turns]
    parts = [Special("<|begin_of_text|>")]
    for role, content in said:
        parts += [*header(role), f"\n\n{content}", Special("<|eot_id|>")]
    return [*parts, *header("assistant"), "\n\n"] if turns[-1][0] == "user" else parts


TEMPLATES = {"plain": plain, "vicuna": vicuna, "llama2": llama2, "llama3": llama3}


# ---- (from clip) ----

CLIP_START, CLIP_END, CLIP_WORD_END = "<|startoftext|>", "<|endoftext|>", b"\xff"

CLIP_WORDS = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)

CLIP_FILES = (("vocab.json", "merges.txt"), ("bpe_simple_vocab_16e6.txt.gz",), ("tokenizer.json",))


def _clip_basic_tokens():
    """The 512 tokens before any merge: each byte within a word, then each at a word's end."""
    return [*BYTE_OF, *(f"{c}</w>" for c in BYTE_OF)]


def _clip_bytes(token):
    word = token.removesuffix("</w>")
    return bytes(BYTE_OF[c] for c in word) + (CLIP_WORD_END if word != token else b"")


@functools.cache
def _say_that_ftfy_is_missing():
    print("note: without ftfy (pip install ftfy), a few unusual texts get other CLIP tokens", file=sys.stderr)


def clean_caption(text):
    """Text as CLIP reads it: mended, HTML entities resolved, single spaces, lower case."""
    if ftfy:
        text = ftfy.fix_text(text)
    elif not text.isascii():
        _say_that_ftfy_is_missing()
    return regex.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip().lower()


class CLIPTokenizer:
    """CLIP's byte-pair encoding. `vocabulary` {token: id}; `merges` [(left, right)], the first joined first.

    `pad` fills up after the end of a text: its end token in OpenAI's Hugging Face files, 0 in OpenAI's own
    code and in open_clip's. The pooled feature never sees it, for attention only looks back; latent diffusion
    reads every position, so it does. (Where it is 0, which is
    "!", transformers takes every "!" of a text for padding too; the original code does not, nor does this.)
    """

    def __init__(self, vocabulary, merges, pad):
        tokens = [*_clip_basic_tokens(), *(left + right for left, right in merges)]
        missing = [token for token in (*tokens, CLIP_START, CLIP_END) if token not in vocabulary]
        if missing:
            raise UserError(f"CLIP's vocabulary lacks {missing[0]!r} ({len(missing)} tokens are missing)")
        self.vocabulary, self.merges, self.pad = vocabulary, merges, pad
        self.start, self.end = vocabulary[CLIP_START], vocabulary[CLIP_END]
        self.tokens = {id: token for token, id in vocabulary.items()}
        self.ids = [vocabulary[token] for token in tokens]  # tiktoken's ids are ranks; these are the model's
        ranks = {_clip_bytes(token): rank for rank, token in enumerate(tokens)}
        self.encoding = tiktoken.Encoding("clip", pat_str="", mergeable_ranks=ranks, special_tokens={})

    @classmethod
    def of_bytes(cls):
        """The tokenizer of a small CLIP: 512 basic tokens, start 512, end 513, and no merges."""
        return cls({token: i for i, token in enumerate([*_clip_basic_tokens(), CLIP_START, CLIP_END])}, [], pad=513)

    @classmethod
    def from_pretrained(cls, path):
        """From vocab.json + merges.txt, OpenAI's bpe_simple_vocab_16e6.txt.gz or tokenizer.json, or their folder."""
        path = Path(path)
        if path.is_dir():
            found = next((names for names in CLIP_FILES if all((path / n).exists() for n in names)), None)
            if not found:
                raise UserError(f"{path}: no CLIP tokenizer in this folder (looked for {clip_file_names()})")
            path = path / found[0]
        try:
            if path.name.endswith(".gz"):
                lines = gzip.decompress(path.read_bytes()).decode().split("\n")
                # the file lists more merges than CLIP uses: 49,408 tokens less the 512 basic ones, start and end
                merges = [tuple(line.split()) for line in lines[1 : 1 + 49408 - 512 - 2]]
                tokens = [*_clip_basic_tokens(), *(left + right for left, right in merges), CLIP_START, CLIP_END]
                return cls({token: i for i, token in enumerate(tokens)}, merges, pad=0)
            if path.name == "tokenizer.json":
                saved = checkpoint.read_json(path)
                vocabulary = saved["model"]["vocab"] | {t["content"]: t["id"] for t in saved["added_tokens"]}
                # newer files write a merge as a pair, older ones as a text with a space
                merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in saved["model"]["merges"]]
            else:
                vocabulary = checkpoint.read_json(path.with_name("vocab.json"))
                lines = path.with_name("merges.txt").read_text(encoding="utf-8").split("\n")
                merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
            return cls(vocabulary, merges, pad=vocabulary[_clip_pad_token(path.parent)])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a CLIP tokenizer ({type(error).__name__}: {error})") from None

    def save_pretrained(self, path, context_length):
        """Writes vocab.json, merges.txt and tokenizer_config.json as transformers' CLIPTokenizer reads them."""
        path = Path(path)
        special = {
            "bos_token": CLIP_START,
            "eos_token": CLIP_END,
            "unk_token": CLIP_END,
            "pad_token": self.tokens[self.pad],
        }
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length} | special
        merges = "".join(f"{left} {right}\n" for left, right in self.merges)
        checkpoint.write_text(path / "vocab.json", json.dumps(self.vocabulary, ensure_ascii=False))
        checkpoint.write_text(path / "merges.txt", "#version: 0.2\n" + merges)
        checkpoint.write_text(path / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")

    def encode(self, text):
        """text → ids, without start and end."""
        ids = []
        for piece in CLIP_WORDS.findall(clean_caption(text)):
            if piece in (CLIP_START, CLIP_END):
                ids.append(self.vocabulary[piece])
            else:
                ids += [self.ids[rank] for rank in self.encoding._encode_single_piece(piece.encode() + CLIP_WORD_END)]
        return ids

    def decode(self, ids):
        """ids → text, with a space after every word; the letters' case and the spacing are lost."""
        tokens = [self.tokens[id] for id in ids]
        written = b"".join(t.encode() if t in (CLIP_START, CLIP_END) else _clip_bytes(t) for t in tokens)
        return written.replace(CLIP_WORD_END, b" ").decode(errors="replace")

    def tokenize(self, texts, context_length=77):
        """A list of texts → (B, context_length) int64: start, text, end, padding. Long texts are cut."""
        import torch  # the data code reads texts without it

        tokens = torch.full((len(texts), context_length), self.pad)
        for row, text in zip(tokens, texts, strict=True):
            ids = [self.start, *self.encode(text)[: context_length - 2], self.end]
            row[: len(ids)] = torch.tensor(ids)
        return tokens


def clip_file_names():
    return " or ".join(" + ".join(names) for names in CLIP_FILES)


def _clip_pad_token(folder):
    """The padding token that the files beside a vocabulary name; without any, the end token."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # SD 2: they differ, the first is right
        if (folder / name).exists():
            token = checkpoint.read_json(folder / name).get("pad_token")
            if token:
                return token["content"] if isinstance(token, dict) else token
    return CLIP_END


def find_clip_tokenizer(path):
    """The Tokenizer beside the weights at `path`: there, in tokenizer/ within, or in tokenizer/ for text_encoder/."""
    folder = path if path.is_dir() else path.parent
    for place in (folder, folder.parent / folder.name.replace("text_encoder", "tokenizer"), folder / "tokenizer"):
        if any(all((place / name).exists() for name in names) for names in CLIP_FILES):
            return CLIPTokenizer.from_pretrained(place)
    return None
