"""Every kind of tokenizer file against the library that owns it, on texts that break tokenizers.

ugly_texts.txt holds one JSON string a line: marks and their pairs, emoji, spaces, digits, code, controls, names of
special tokens typed in. Its vocabularies are small ones, trained here.
"""

import base64
import io
import json
import re
import unicodedata

import pytest
from conftest import ROOT

from support import tokenizer
from support.tokenizer import CLIPTokenizer, Tokenizer

TEXTS = list(map(json.loads, (ROOT / "tests" / "ugly_texts.txt").read_text().splitlines()))
CORPUS = [(ROOT / name).read_text() for name in ("README.md", "data.py")] + TEXTS
SPECIAL = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|end_of_text|>"]
LACKING = [chr(256 + 0), "z", "Q", "ð", "þ", "ÿ"]  # NUL, two letters, bytes of four-byte characters, in GPT-2's letters
LLAMA2 = {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}


def byte_level(*before, normalizer=None, lacking=(), use_regex=True, prefix=False, added=(), **model):
    """A byte-level BPE of `tokenizers`: steps before the last one, letters that its vocabulary shall lack."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    last = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=use_regex)
    made = Library(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence([*before, last]), decoders.ByteLevel()
    if normalizer:
        made.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    made.add_tokens(["<tool_call>", "[INST]", *added])
    saved = json.loads(made.to_str())
    saved["model"] |= model
    if lacking:
        merges = [pair for pair in saved["model"]["merges"] if not set("".join(pair)) & set(lacking)]
        made = {*map("".join, merges), *SPECIAL}
        kept = [t for t in saved["model"]["vocab"] if t in made or (len(t) == 1 and t not in lacking)]
        saved["model"] |= {"merges": merges, "vocab": {text: i for i, text in enumerate(kept)}}
        for i, entry in enumerate(saved["added_tokens"][len(SPECIAL) :]):
            entry["id"] = len(kept) + i
    return saved


def characters(normalizer=None, pre_tokenizer=None, decoder=None):
    """BPE of characters with bytes for what it lacks: the tokenizer.json of a Llama 2, a Mistral or a Gemma."""
    from tokenizers import AddedToken, models, trainers
    from tokenizers import Tokenizer as Library

    made = Library(models.BPE(**LLAMA2))
    made.normalizer, made.pre_tokenizer = normalizer, pre_tokenizer
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=names, limit_alphabet=120, max_token_length=9, show_progress=False
    )
    words = [word for text in CORPUS for word in text.split("\n")]
    made.train_from_iterator(words, trainer)
    saved = json.loads(made.to_str())
    saved["added_tokens"] = saved["added_tokens"][:3]
    saved["model"] |= LLAMA2
    made = Library.from_str(json.dumps(saved))
    made.decoder = decoder
    made.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    return json.loads(made.to_str())


def kinds():
    """{name: content of a tokenizer.json}."""
    from tokenizers import AddedToken, Regex, decoders, normalizers
    from tokenizers import pre_tokenizers as before

    spaces = normalizers.Replace(" ", "▁")
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    odd = [
        AddedToken("<b>", lstrip=True),
        AddedToken("tool", rstrip=True, normalized=False),
        AddedToken("mask", single_word=True),
    ]
    return {
        "gpt2": lambda: byte_level(),
        "smollm2": lambda: byte_level(before.Digits(individual_digits=True), lacking=LACKING),
        "unknown": lambda: byte_level(lacking=LACKING, unk_token="<unk>"),
        "unknown, fused": lambda: byte_level(lacking=LACKING, unk_token="<unk>", fuse_unk=True),
        "llama 3": lambda: byte_level(
            before.Split(Regex(tokenizer.LLAMA3), "isolated"), use_regex=False, ignore_merges=True
        ),
        "space before": lambda: byte_level(prefix=True),
        "punctuation": lambda: byte_level(
            before.Punctuation("contiguous"), before.Digits(individual_digits=False), prefix=True
        ),
        "to the left": lambda: byte_level(before.Split(" ", "merged_with_previous"), use_regex=False),
        "to the right": lambda: byte_level(before.Split(Regex(r"\s+$"), "merged_with_next"), use_regex=False),
        "nested": lambda: byte_level(
            before.Sequence([before.Split(Regex(r"^\p{L}+|\d{2}"), "removed", invert=False), before.WhitespaceSplit()])
        ),
        "letters first": lambda: byte_level(before.ByteLevel(False, use_regex=False), before.Digits(True)),
        "nfc": lambda: byte_level(normalizer=normalizers.NFC()),
        "nfkc": lambda: byte_level(
            normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("x", "y")])
        ),
        "flags": lambda: byte_level(added=odd),
        "flags, nfc": lambda: byte_level(added=odd, normalizer=normalizers.NFC()),
        "llama 2": lambda: characters(
            normalizers.Sequence([normalizers.Prepend("▁"), spaces]),
            None,
            decoders.Sequence([*back, decoders.Strip(" ", 1, 0)]),
        ),
        "llama 2, legacy: false": lambda: characters(
            None,
            before.Metaspace("▁", prepend_scheme="first", split=False),
            decoders.Sequence([*back, decoders.Strip(" ", 1, 0)]),
        ),
        "gemma": lambda: characters(spaces, before.Split(" ", "merged_with_previous"), decoders.Sequence(back)),
        "metaspace": lambda: characters(
            None, before.Metaspace("▁"), decoders.Sequence([*back, decoders.Strip(" ", 1, 0)])
        ),
    }


@pytest.mark.parametrize("name", kinds())
def test_a_tokenizer_json_of_any_kind_gives_its_librarys_ids(name, tmp_path):
    from tokenizers import Tokenizer as Library

    saved = kinds()[name]()
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    library, ours = Library.from_str(json.dumps(saved)), Tokenizer.from_pretrained(tmp_path)
    for special in (False, True):
        library.encode_special_tokens = not special
        for text in TEXTS:
            ids = library.encode(text, add_special_tokens=False).ids
            assert ours.encode(text, special=special) == ids, text
            assert ours.decode(ids) == library.decode(ids), text
            assert ours.decode(ids, special=True) == library.decode(ids, skip_special_tokens=False)
            check_stream(ours, ids)


def check_stream(ours, ids):
    """Its pieces are the whole, and no half characters."""
    assert "".join(ours.stream(ids)).removeprefix(" " * ours.strips) == ours.decode(ids)


@pytest.mark.parametrize(
    "options",
    [
        {
            "model_type": "bpe",
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
        },
        {
            "model_type": "bpe",
            "byte_fallback": True,
            "add_dummy_prefix": False,
            "user_defined_symbols": "<tool_call>,[INST]",
        },
        {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc_cf", "control_symbols": "<mask>"},
    ],
)
def test_a_sentencepiece_model_of_any_kind_gives_its_librarys_ids(options, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    lines = [line for text in CORPUS for line in text.replace("\0", " ").split("\n")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=700,
        character_coverage=0.98,
        minloglevel=2,
        **options,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    library = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ours = Tokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = library.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == library.decode(ids), text
        check_stream(ours, ids)


def test_ranks_of_llama_3s_kind_give_tiktokens_ids(tmp_path):
    """128,000 ranks are what tells them; most of these occur in no text."""
    import tiktoken

    vocab = [tokenizer.from_letters(text) for text in byte_level()["model"]["vocab"] if text not in SPECIAL]
    ranks = {token: rank for rank, token in enumerate(vocab)}
    for number in range(128_000 - len(ranks)):
        ranks[b"\xff" + number.to_bytes(3, "big")] = len(ranks)
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (tmp_path / "tokenizer.model").write_text("".join(lines))
    library = tiktoken.Encoding("", pat_str=tokenizer.LLAMA3, mergeable_ranks=ranks, special_tokens={})
    ours = Tokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = library.encode_ordinary(text)
        assert ours.encode(text) == ids and ours.decode(ids) == text
        check_stream(ours, ids)


CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]")


def cleaned_alike(text):
    """Texts that OpenAI's cleaning (mended, HTML resolved), which is ours, leaves as transformers' does."""
    plain = unicodedata.normalize("NFC", re.sub("[\t\n\r ]+", " ", text)).lower().strip()
    return tokenizer.clean_caption(text) == plain and not CONTROLS.search(text) and "<|ENDOFTEXT" not in text


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("form", ["one file", "vocabulary and merges", "saved by us"])
def test_clips_added_words_are_transformers(form, special, tmp_path):
    """Textual inversion adds a word to a CLIP's vocabulary: Stable Diffusion then reads it as one token."""
    transformers = pytest.importorskip("transformers")
    CLIPTokenizer.of_bytes().save_pretrained(tmp_path, 77)
    library = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    library.add_tokens(["<cat-toy>", "sks_1"], special_tokens=special)
    if form == "one file":
        library.save_pretrained(tmp_path / "one")
        ours = CLIPTokenizer.from_pretrained(tmp_path / "one")
    else:
        added = {"<cat-toy>": 514, "sks_1": 515}
        (tmp_path / "added_tokens.json").write_text(json.dumps(added))
        named = {"additional_special_tokens": list(added)} if special else {}
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(named))
        ours = CLIPTokenizer.from_pretrained(tmp_path)
    if form == "saved by us":
        ours.save_pretrained(tmp_path / "two", 77)
        ours = CLIPTokenizer.from_pretrained(tmp_path / "two")
        library = transformers.CLIPTokenizer.from_pretrained(tmp_path / "two")
    texts = [text for text in TEXTS if cleaned_alike(text)]
    assert len(texts) > 120 and len(ours.vocabulary) == 516
    for text in [*texts, "a photo of <cat-toy>", "<cat-toy>sks_1, x<cat-toy>, a <cat toy>", "SKS_1"]:
        ids = library(text, add_special_tokens=False).input_ids
        assert ours.encode(text) == ids, text
        # a space behind an added word is the older libraries' way, and ours
        assert ours.decode(ids).split() == re.sub("(<cat-toy>|sks_1)", r"\1 ", library.decode(ids)).split(), text
