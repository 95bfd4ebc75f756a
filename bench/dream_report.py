"""Can a small DreamLLM say what it sees, draw what it is told, and write a page? Asked about emoji it never saw.

    python bench/dream_report.py --run out/emoji/dream/instruct --clip out/emoji/clip --unet out/emoji/unet \\
        --out out/emoji/dream

Two held-out sets: `combo`, whose kind of emoji was seen in other variants (another skin tone, another gender), and
`new`, whose kind was not. About each picture, answered greedily:

    caption     `<s>` and the picture: what follows up to `</s>` is its name (exact), or shares words with it (word-F1)
    what        the same, asked as "What is this?"
    category    "Which category is it?"
    yes or no   "Is it a …?", once with its own name, once with a wrong one: the mean of both accuracies

Each stands beside the best constant answer, one answer to every picture, chosen with the truth in hand: for exact
matches and categories the commonest of the very set; for word-F1 the best of all emoji names, those of the set among
them; for yes or no either, which is right half the time. Case, and space around an answer, do not count.

Then names are drawn, seen ones and `combo`, by the DreamLLM and by the same U-Net conditioned on CLIP's text tower,
with the same noise, guidance and steps, and by the DreamLLM once more, shown the picture instead of told its name; a
CLIP must find the name among 100 by the drawing, and the same is asked of the real pictures and of noise. At last
documents: how many end by themselves, how many pictures they hold; the first three are laid out as pages. ± is half a
95 % interval; in brackets, of shares found, Wilson's.

    report.json   drawn.png   page_1.png … page_3.png   page_1/ … page_3/, as sample.py document writes them
    held_out_1.png … held_out_4.png: to ask about with sample.py chat
"""

import collections
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
from support.pictures import save_grid
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
    """2·|common| / (|answer| + |truth|), words as multisets: the harmonic mean of precision and recall."""
    a, b = words(answer), words(truth)
    return 2 * (a & b).total() / max(1, a.total() + b.total())


def exact(answer, truth):
    return float(answer.strip().lower() == truth.strip().lower())


def best_constant(score, truths, candidates):
    """Which of `candidates`, given as the answer to everything, scores best, and how well: (answer, mean score)."""
    means = {c: float(np.mean([score(c, truth) for truth in truths])) for c in dict.fromkeys(candidates)}
    return max(means.items(), key=lambda pair: pair[1])


def beside_constant(score, answers, truths, candidates):
    answer, mean = best_constant(score, truths, candidates)
    pairs = zip(answers, truths, strict=True)
    return {"dreamllm": mean_and_error([score(a, t) for a, t in pairs]), "constant": mean, "constant_answer": answer}


def balanced(to_own, to_wrong):
    """The answers to a picture's own name, which call for yes, and to a wrong one: the mean of both accuracies.

    A picture counts 0, ½ or 1, so that the interval knows that its two questions are about the same thing.
    """
    yes, no = ([exact(a, right) for a in said] for said, right in ((to_own, "yes"), (to_wrong, "no")))
    both = {"dreamllm": mean_and_error(np.add(yes, no) / 2), "constant": 0.5, "constant_answer": "yes"}
    return both | {"of_yes": mean_and_error(yes), "of_no": mean_and_error(no)}


# ---- asking ----------------------------------------------------------------------------------


@torch.inference_mode()
def answer(model, prompts, max_new_tokens=96):
    """prompts, each a list of texts and pictures → what the model most likely says to each, up to </s>.

    Word for word what `stream_document` says at temperature 0 without drawing; but prompts of one length are answered
    together.
    """
    llama, t = model.llama, model.tokenizer
    forbidden, lengths, said = model.non_text_mask(), collections.defaultdict(list), [""] * len(prompts)
    for number, prompt in enumerate(prompts):
        ids, pictures = model.prompt(prompt)
        lengths[len(ids)].append((number, ids, pictures))
    for length, alike in lengths.items():
        for some in (alike[i : i + BATCH] for i in range(0, len(alike), BATCH)):
            count = max(1, min(max_new_tokens, llama.config.max_seq_len - length))
            caches, new = llama.caches(len(some), length + count), []
            done = torch.zeros(len(some), dtype=torch.bool)
            pictures = [picture for _, _, pictures in some for picture in pictures]
            hidden = model.hidden_states([ids for _, ids, _ in some], pictures, caches)  # (B, T, D)
            while not done.all():
                logits = llama.logits(hidden[:, -1]).masked_fill(forbidden, float("-inf"))  # (B, V)
                new.append(logits.argmax(-1))  # (B,)
                done |= torch.isin(new[-1], torch.tensor(sorted(t.stops)))
                if len(new) == count:
                    break
                hidden = llama.hidden(llama.embed_tokens(new[-1][:, None]), caches)  # (B, 1, D)
            for (number, _, _), row in zip(some, torch.stack(new, 1).tolist(), strict=True):
                end = next((place for place, i in enumerate(row) if i in t.stops), len(row))
                said[number] = "".join(t.stream(row[:end]))
    return said


def no_question(texts, index, draws):
    """A question "Is it a …?" as in training, drawn again until "no" is right."""
    while True:
        question, right = texts.yes_or_no(index, draws)
        if right == "no":
            return question


def measure_answers(model, source, count, names, data):
    """All questions about `count` pictures of `source`, drawn at random; names: what a constant caption may be."""
    draws, texts = np.random.default_rng(SEED), EmojiTexts(source, KINDS["conversation"])
    chosen = draws.permutation(len(source))[:count].tolist()
    items = [source[i] for i in chosen]
    pictures = [Image.fromarray(item.image) for item in items]
    own, categories = [item.caption for item in items], [item.category.lower() for item in items]

    def ask(questions, *most):
        asked = [[{"role": "user", "content": f"{IMAGE}\n{question}"}] for question in questions]
        pairs = zip(asked, pictures, strict=True)
        return answer(model, [chat_parts(chat, [p], data.template, data.system) for chat, p in pairs], *most)

    captions, what = answer(model, [[picture] for picture in pictures]), ask([WHAT] * len(items))
    category = ask([CATEGORY] * len(items))
    to_own = ask([IS_IT.format(name=name) for name in own], 8)  # what is longer is neither yes nor no
    to_wrong = ask([no_question(texts, i, draws) for i in chosen], 8)
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
        "examples": [{"name": name, "caption": said} for name, said in zip(own, captions, strict=True)][:12],
    }


# ---- drawing ---------------------------------------------------------------------------------


def draw(generate, prompts):
    """prompts → (N, side, side, 3) uint8; generate(prompts, seed) draws picture i from seed + i."""
    images = [generate(prompts[i : i + BATCH], SEED + i) for i in range(0, len(prompts), BATCH)]
    return (torch.cat(images) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def render_chat(text, size=(64, 64)):
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
    """Names of both kinds drawn by both, and found again or not; the first of each as a grid at `path`."""
    draws, result, sheet = np.random.default_rng(SEED), {}, []
    side = model.side
    for split in ("train", "combo"):
        items = [splits[split][i] for i in draws.permutation(len(splits[split]))[:count]]
        names, others = [item.caption for item in items], distractors(items, everyone, draws)
        pictures = {
            "real": np.stack([item.image for item in items]),
            "unet": draw(lambda some, seed: unet.generate(some, size=side, seed=seed, **sampling), names),
            "dreamllm": draw(lambda some, seed: model.text_to_image(some, seed=seed, **sampling), names),
            "looking": draw(
                lambda some, seed: model.text_to_image(some, seed=seed, **sampling),
                [[Image.fromarray(item.image)] for item in items],
            ),
            "noise": draws.integers(0, 256, (len(items), side, side, 3), dtype=np.uint8),
        }
        result[split] = {who: retrieval(judge, list(some), names, others) for who, some in pictures.items()}
        result[split] |= {"names": len(items), "shown": names[:SHOWN]}
        drawings = [pictures[who] for who in ("real", "unet", "dreamllm", "looking")]
        shown = [[render_chat(name) for name in names], *drawings]
        titles = (TITLES[split], "real", "U-Net on CLIP's text", "DreamLLM", "DreamLLM, shown the picture")
        head = [render_chat(title) for title in titles]
        sheet.append([head, *([column[i] for column in shown] for i in range(min(SHOWN, len(names))))])
    save_grid([[*seen, *unseen] for seen, unseen in zip(*sheet, strict=True)], path)
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
    blank = render_chat("", (128, 128))
    pictures = [np.asarray(Image.fromarray(c[1]).resize((128, 128))) if c[1:] else blank for c in columns]
    return [[render_chat(column[0], (128, 64)) for column in columns], pictures]


def measure_documents(model, prompts, temperature, sampling, out):
    """A document for each prompt; the first as pages."""
    result = {"documents": len(prompts), "temperature": temperature, "pages": []}
    by_itself, pictures = [], []
    for number, prompt in enumerate(prompts):
        context = model.llama.config.max_seq_len
        pieces, ended = merge_texts(
            model.stream_document(prompt, context, temperature=temperature, seed=SEED + number, **sampling)
        )
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
