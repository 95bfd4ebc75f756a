"""Can a small DreamLLM say what it sees, draw a name and write a page? On emoji it never saw.

    python bench/dream_report.py --run out/emoji/dream/instruct --clip out/emoji/clip \\
        --unet out/emoji/unet --out out/emoji/dream

There are two held-out sets: `combo`, whose kind of emoji was seen in other variants (another skin
tone, another gender), and `new`, whose kind was not. About each picture, answered greedily:

    caption     `<s>` and the picture: the text up to `</s>` is its name (exact), or shares words
                with it (word-F1)
    what        the same, asked as "What is this?"
    category    "Which category is it?"
    yes or no   "Is it a …?", once with its own name, once with a wrong one: the mean accuracy

The baseline is the best constant answer, one answer to every picture, chosen with the truth known:
for exact matches and categories the commonest of that set; for word-F1 the best of all emoji names;
for yes or no either, which is right half the time. Case, and space around an answer, do not count.

Then names are drawn, seen ones and `combo`, by the DreamLLM and by the same U-Net conditioned on
CLIP's text tower, with the same noise, guidance and steps, and by the DreamLLM once more, shown the
picture instead of its name. A CLIP must find the name among 100 by the drawing; real pictures and
noise are measured in the same way. Last come documents: how many end by themselves, how many
pictures they hold; the first three are laid out as pages. ± is half a 95 % interval; in brackets, of
shares found, Wilson's.

    report.json   drawn.png   page_1.png … page_3.png   held_out_1.png … held_out_4.png
    page_1/ … page_3/     pages as sample.py document writes them
"""

import collections
import itertools
import json
import re
import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clip_report import Learned, distractors, retrieval
from clip_report import shown as as_share
from lvm_report import mean_and_error

from clip import CLIP, text_encoders
from diffusion import LatentDiffusion
from documents import KINDS, DocumentSettings, chat_parts
from dreamllm import DreamLLM, merge_texts
from lvm import run_data
from support import checkpoint, settings
from support.pages import save_page
from support.pictures import save_grid, to_uint8
from support.rows import CATEGORY, IMAGE, IS_IT, WHAT, EmojiTexts
from support.sources import open_source

SEED = 0
SHOWN = 6  # names of each kind in drawn.png
BATCH = 32  # prompts answered, and pictures drawn, at a time
PAGES = ("people & body:", "people & body: woman firefighter", "food & drink:")
TITLES = {"train": "seen names", "combo": "new variants of seen kinds", "new": "kinds never seen"}


# ---- scores ----------------------------------------------------------------------------------


@cache
def words(text):
    """The words of a text as a multiset, lower case."""
    return collections.Counter(re.findall(r"\w+", text.lower()))


def word_f1(answer, truth):
    """2·|common| / (|answer| + |truth|) of words: the harmonic mean of precision and recall."""
    a, b = words(answer), words(truth)
    return 2 * (a & b).total() / max(1, a.total() + b.total())


def exact(answer, truth):
    return float(answer.strip().lower() == truth.strip().lower())


def best_constant(score, truths, candidates):
    """The one of `candidates` that scores best as the answer to everything → (it, its mean score)."""
    means = {}
    for candidate in dict.fromkeys(candidates):
        means[candidate] = float(np.mean([score(candidate, truth) for truth in truths]))
    return max(means.items(), key=lambda pair: pair[1])


def beside_constant(score, answers, truths, candidates):
    constant, mean = best_constant(score, truths, candidates)
    scores = [score(answer, truth) for answer, truth in zip(answers, truths, strict=True)]
    return {"dreamllm": mean_and_error(scores), "constant": mean, "constant_answer": constant}


def balanced(to_own, to_wrong):
    """Answers to a picture's own name, where yes is right, and to a wrong one: mean of both accuracies.

    A picture counts 0, ½ or 1, so that the interval knows that its two questions are about the same
    thing.
    """
    yes, no = [exact(text, "yes") for text in to_own], [exact(text, "no") for text in to_wrong]
    both = mean_and_error(np.add(yes, no) / 2)
    parts = {"of_yes": mean_and_error(yes), "of_no": mean_and_error(no)}
    return {"dreamllm": both, "constant": 0.5, "constant_answer": "yes"} | parts


# ---- asking ----------------------------------------------------------------------------------


def answer(model, prompts, max_new_tokens=96):
    """prompts, each a list of texts and pictures → the likeliest answer to each, up to </s>.

    The same as `stream_document` writes at temperature 0 without pictures, but prompts of equal
    length are answered together.
    """
    by_length = collections.defaultdict(list)
    for number, prompt in enumerate(prompts):
        ids, pictures = model.prompt(prompt)
        by_length[len(ids)].append((number, ids, pictures))
    answers = [""] * len(prompts)
    for alike in by_length.values():
        for start in range(0, len(alike), BATCH):
            numbers, ids, pictures = zip(*alike[start : start + BATCH], strict=True)
            flat = list(itertools.chain(*pictures))
            texts = answer_together(model, list(ids), flat, max_new_tokens)
            for number, text in zip(numbers, texts, strict=True):
                answers[number] = text
    return answers


@torch.inference_mode()
def answer_together(model, ids, pictures, max_new_tokens):
    """ids (B lists of equal length), the pictures in them → B texts."""
    llama, tokenizer = model.llama, model.tokenizer
    forbidden, stops = model.non_text_mask(), torch.tensor(sorted(tokenizer.stops))
    length = len(ids[0])
    count = max(1, min(max_new_tokens, llama.config.max_seq_len - length))
    caches, new = llama.caches(len(ids), length + count), []
    done = torch.zeros(len(ids), dtype=torch.bool)
    hidden = model.hidden_states(ids, pictures, caches)  # (B, T, D)
    while not done.all():
        logits = llama.logits(hidden[:, -1]).masked_fill(forbidden, float("-inf"))  # (B, V)
        new.append(logits.argmax(-1))  # (B,)
        done |= torch.isin(new[-1], stops)
        if len(new) == count:
            break
        hidden = llama.hidden(llama.embed_tokens(new[-1][:, None]), caches)  # (B, 1, D)
    texts = []
    for row in torch.stack(new, 1).tolist():
        text = itertools.takewhile(lambda i: i not in tokenizer.stops, row)
        texts.append("".join(tokenizer.stream(text)))
    return texts


def no_question(texts, index, rng):
    """A question "Is it a …?" as in training, sampled again until "no" is right."""
    while True:
        question, right = texts.yes_or_no(index, rng)
        if right == "no":
            return question


def measure_answers(model, source, count, names, data):
    """All questions about `count` random pictures of `source`; names: possible constant captions."""
    rng, texts = np.random.default_rng(SEED), EmojiTexts(source, KINDS["conversation"])
    chosen = rng.permutation(len(source))[:count].tolist()
    items = [source[i] for i in chosen]
    pictures = [Image.fromarray(item.image) for item in items]
    own, categories = [item.caption for item in items], [item.category.lower() for item in items]

    def ask(questions, *most):
        prompts = []
        for question, picture in zip(questions, pictures, strict=True):
            chat = [{"role": "user", "content": f"{IMAGE}\n{question}"}]
            prompts.append(chat_parts(chat, [picture], data.template, data.system))
        return answer(model, prompts, *most)

    captions, what = answer(model, [[picture] for picture in pictures]), ask([WHAT] * len(items))
    category = ask([CATEGORY] * len(items))
    to_own = ask([IS_IT.format(name=name) for name in own], 8)  # longer is neither yes nor no
    to_wrong = ask([no_question(texts, i, rng) for i in chosen], 8)
    examples = [{"name": name, "caption": text} for name, text in zip(own, captions, strict=True)]
    return {
        "pictures": len(items),
        "answers": {
            "caption, exact": beside_constant(exact, captions, own, own),
            "caption, word-F1": beside_constant(word_f1, captions, own, names),
            "what is this, exact": beside_constant(exact, what, own, own),
            "what is this, word-F1": beside_constant(word_f1, what, own, names),
            "category": beside_constant(exact, category, categories, categories),
            "yes or no, balanced": balanced(to_own, to_wrong),
        },
        "examples": examples[:12],
    }


# ---- drawing ---------------------------------------------------------------------------------


def draw(generate, prompts):
    """prompts → (N, side, side, 3) uint8; generate(prompts, seed) draws picture i from seed + i."""
    images = [generate(prompts[i : i + BATCH], SEED + i) for i in range(0, len(prompts), BATCH)]
    return to_uint8(torch.cat(images))


def text_picture(text, size=(64, 64)):
    """A text as a picture, broken into lines, centred on white: for the margins of grids and pages."""
    sheet, font = Image.new("RGB", size, "white"), ImageFont.load_default(10)
    pen, lines = ImageDraw.Draw(sheet), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and pen.textlength(longer, font) > size[0]:
            lines.append(word)
        else:
            lines[-1] = longer
    middle = (size[0] / 2, size[1] / 2)
    pen.multiline_text(middle, "\n".join(lines), "black", font, anchor="mm", align="center", spacing=1)
    return np.asarray(sheet)


def measure_drawings(model, unet, judge, splits, everyone, count, sampling, path):
    """Retrieval of names, seen and unseen, by what both models draw; the first of each at `path`."""
    rng, result, columns = np.random.default_rng(SEED), {}, []
    side = model.side

    def by_unet(prompts, seed):
        return unet.generate(prompts, size=side, seed=seed, **sampling)

    def by_dreamllm(prompts, seed):
        return model.text_to_image(prompts, seed=seed, **sampling)

    for split in ("train", "combo"):
        items = [splits[split][i] for i in rng.permutation(len(splits[split]))[:count]]
        names, others = [item.caption for item in items], distractors(items, everyone, rng)
        pictures = {
            "real": np.stack([item.image for item in items]),
            "unet": draw(by_unet, names),
            "dreamllm": draw(by_dreamllm, names),
            "looking": draw(by_dreamllm, [[Image.fromarray(item.image)] for item in items]),
            "noise": rng.integers(0, 256, (len(items), side, side, 3), dtype=np.uint8),
        }
        result[split] = {"names": len(items), "shown": names[:SHOWN]}
        for who, drawings in pictures.items():
            result[split][who] = retrieval(judge, list(drawings), names, others)
        titles = ("real", "U-Net on CLIP's text", "DreamLLM", "DreamLLM, shown the picture")
        columns.append([text_picture(text) for text in (TITLES[split], *names[:SHOWN])])
        for title, drawings in zip(titles, pictures.values(), strict=False):  # all but noise
            columns.append([text_picture(title), *drawings[:SHOWN]])
    save_grid(list(zip(*columns, strict=True)), path)
    return result


# ---- documents -------------------------------------------------------------------------------


def page(pieces):
    """Texts and pictures in reading order → one picture: each text above the picture that it leads to."""
    columns = [[""]]
    for piece in pieces:
        if isinstance(piece, str):
            columns[-1][0] += piece
        else:
            columns[-1].append(np.asarray(piece))
            columns.append([""])
    columns = [column for column in columns if len(column) > 1 or column[0].strip()]
    blank = text_picture("", (128, 128))
    pictures = [np.asarray(Image.fromarray(c[1]).resize((128, 128))) if c[1:] else blank for c in columns]
    return [[text_picture(column[0], (128, 64)) for column in columns], pictures]


def measure_documents(model, prompts, temperature, sampling, out):
    """A document for each prompt; the first as pages."""
    result = {"documents": len(prompts), "temperature": temperature, "pages": []}
    by_itself, pictures = [], []
    for number, prompt in enumerate(prompts):
        options = {"temperature": temperature, "seed": SEED + number} | sampling
        stream = model.stream_document(prompt, model.llama.config.max_seq_len, **options)
        pieces, ended = merge_texts(stream)
        first = [] if pieces and isinstance(pieces[0], str) else [""]
        pieces = [*first, *pieces]
        pieces[0] = prompt + pieces[0]
        by_itself.append(ended)
        pictures.append(sum(not isinstance(piece, str) for piece in pieces))
        if number < len(PAGES):
            save_grid(page(pieces), out / f"page_{number + 1}.png")
            save_page(pieces, out / f"page_{number + 1}", prompt.rstrip(":"))
            texts = "".join(piece if isinstance(piece, str) else "[picture]" for piece in pieces)
            result["pages"].append({"text": texts, "ended": by_itself[-1], "pictures": pictures[-1]})
    return result | {"ended": mean_and_error(by_itself), "pictures": mean_and_error(pictures)}


# ---- the report ------------------------------------------------------------------------------


def show(entry):
    return f"{entry['mean']:6.3f} ± {entry['error']:.3f}"


def table(report):
    """The report as text, a line for each number."""
    lines = []
    for split in ("combo", "new"):
        r = report[split]
        lines.append(f"\n{TITLES[split]}, {r['pictures']} pictures      DreamLLM          best constant answer")
        for what, e in r["answers"].items():
            lines.append(f"  {what:<34}{show(e['dreamllm'])}    {e['constant']:6.3f}  ({e['constant_answer']})")
        e = r["answers"]["yes or no, balanced"]
        lines.append(f"    of its own name | a wrong one     {show(e['of_yes'])} | {show(e['of_no'])}")
    for split in ("train", "combo"):
        r = report["drawn"][split]
        lines.append(f"\n{TITLES[split]}, {r['names']} drawn: name found among 100, first | in the first five")
        for who in ("dreamllm", "looking", "unet", "real", "noise"):
            lines.append(f"  {who:<34}{as_share(r[who]['R@1'])} | {as_share(r[who]['R@5'])}")
    d = report["documents"]
    lines.append(
        f"\n{d['documents']} documents: {show(d['ended'])} ended by themselves, {show(d['pictures'])} pictures"
    )
    for n, p in enumerate(d["pages"], 1):
        how = "ended by itself" if p["ended"] else "cut off"
        lines.append(f"  page {n}, {how}, {p['pictures']} pictures: {p['text']}")
    return "\n".join(lines)


@torch.inference_mode()
def main():
    parser = settings.Parser(prog="python bench/dream_report.py", description=__doc__)
    parser.add_argument("--run", required=True, help="a trained DreamLLM's folder")
    parser.add_argument("--clip", required=True, help="the CLIP that judges drawn pictures")
    parser.add_argument("--unet", required=True, help="the U-Net's folder, with its CLIP text tower")
    parser.add_argument("--out", required=True, help="where report.json and the pictures go")
    parser.add_argument("--pictures", type=int, default=200, help="asked about, at most, of each kind (200: all)")
    parser.add_argument("--names", type=int, default=96, help="drawn, of each kind (96)")
    parser.add_argument("--documents", type=int, default=20, help="(20)")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--temperature", type=float, default=0.3, help="of documents' texts (0.3)")
    a = parser.parse_args()
    checkpoint.out_file(Path(a.out) / "report.json")  # before all the work
    model = DreamLLM.from_pretrained(a.run, torch.float32)
    unet = LatentDiffusion.from_pretrained(a.unet, text_encoders(a.unet), torch.float32)
    judge, out = Learned(CLIP.from_pretrained(a.clip, dtype=torch.float32)), Path(a.out)
    splits = {split: list(open_source("emoji", model.side, split)) for split in ("train", "combo", "new")}
    everyone = np.array(sorted({item.caption for items in splits.values() for item in items}))
    sampling = {"guidance": a.guidance, "steps": a.steps, "sampler": "ddim"}
    data = settings.build(DocumentSettings, run_data(a.run), "data")

    for number, item in enumerate(splits["new"][:: max(1, len(splits["new"]) // 4)][:4], 1):
        save_grid([[item.image]], out / f"held_out_{number}.png", pad=0)
    report = dict(sampling)
    for split in ("combo", "new"):
        report[split] = measure_answers(model, open_source("emoji", model.side, split), a.pictures, everyone, data)
    report["drawn"] = measure_drawings(model, unet, judge, splits, everyone, a.names, sampling, out / "drawn.png")
    categories = dict.fromkeys(f"{item.category.lower()}:" for item in splits["train"])
    prompts = [*PAGES, *(prompt for prompt in categories if prompt not in PAGES)]
    prompts = [prompts[i % len(prompts)] for i in range(a.documents)]
    report["documents"] = measure_documents(model, prompts, a.temperature, sampling, out)
    checkpoint.write_text(out / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    print(table(report))
    print(f"\npictures and report.json are in {out}")


if __name__ == "__main__":
    settings.run_main(main)
