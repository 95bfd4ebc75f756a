"""How good is a small LVM on emoji it never saw? A table, report.json, and pictures to look at.

    python bench/lvm_report.py --run out/demo/lvm --out out/demo

Each number stands beside what costs nothing: a reconstruction beside thumbnails of the same picture, an
answer to an analogy beside repeating the query and beside the mean of the answers in the prompt, a
continued motion beside its last frame standing still. The model answers several times, and the mean of
these candidates is scored, being its best guess by squared error; a single candidate's score is given too.
Pixels are in [0, 1]; all pictures are held out, those of the prompts too, and the pictures shown are the
first ones, not chosen ones.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import Sentences
from lvm import LVM, run_data
from support import checkpoint, settings
from support.pictures import save_animation, save_grid
from support.sources import open_source
from vqgan import usage

SEED = 1  # of the sentences and of the sampling
SHOWN = 4  # rows in each sheet of pictures


def psnr(a, b):
    """Of each picture, in dB: a, b (N, H, W, 3) uint8 → (N,)."""
    mse = ((a.astype(np.float64) - b) / 255) ** 2
    return -10 * np.log10(mse.mean((1, 2, 3)).clip(1e-10))


def mean_and_error(values):
    """The mean and half the width of its 95 % interval, of the values that are numbers."""
    values = np.asarray(values)[~np.isnan(values)]
    return {"mean": float(np.mean(values)), "error": float(1.96 * np.std(values, ddof=1) / np.sqrt(len(values)))}


def thumbnail(picture, side):
    """Shrunk to side × side and blown up again, the best that Pillow does."""
    small = Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS)
    return np.asarray(small.resize(picture.shape[1::-1], Image.Resampling.LANCZOS))


# ---- the tokenizer ---------------------------------------------------------------------------


def measure_tokenizer(lvm, out):
    result, counts = {}, torch.zeros(lvm.tokenizer.config.num_embeddings)
    for split in ("held_out", "new", "combo"):
        source = open_source("emoji", lvm.side, split)
        pictures = np.stack([item.image for item in source])
        tokens = torch.cat([lvm.encode(part) for part in np.array_split(pictures, -(-len(pictures) // 64))])
        decoded = lvm.decode(tokens)
        result[split] = {"pictures": len(pictures), "psnr": mean_and_error(psnr(decoded, pictures))}
        if split == "held_out":
            for side in (8, 16):
                small = np.stack([thumbnail(p, side) for p in pictures])
                result[f"thumbnail_{side}x{side}"] = mean_and_error(psnr(small, pictures))
            counts += torch.bincount(tokens.flatten(), minlength=len(counts))
            shown = np.linspace(0, len(pictures) - 1, 12).astype(int)
            save_grid([pictures[shown], decoded[shown]], out / "reconstructions.png")
    result["codebook_used"], result["codebook_perplexity"] = usage(counts)
    return result


# ---- analogies -------------------------------------------------------------------------------


def mse(answer, truth, query):
    return ((answer / 255 - truth / 255) ** 2).mean((1, 2, 3))


def mse_in_hole(answer, truth, query):
    """Only where the query is pure black: so are its holes, and nearly nothing else in this set; NaN: no hole."""
    hole = (query == 0).all(-1)  # (N, H, W)
    error = ((answer / 255 - truth / 255) ** 2).mean(-1)
    count = hole.sum((1, 2))
    return np.where(count > 0, (error * hole).sum((1, 2)) / count.clip(1), np.nan)


def mean_iou(answer, truth, query):
    """Intersection over union, mean of foreground and background; foreground is what is nearer white."""
    a, b = (x.mean(-1) > 127.5 for x in (answer, truth))
    ious = [(x & y).sum((1, 2)) / (x | y).sum((1, 2)).clip(1) for x, y in ((a, b), (~a, ~b))]
    return (ious[0] + ious[1]) / 2


ANALOGIES = {  # name: sentence kind, its modalities, score, whether more is better
    "colorization": ("colorization", (), mse, False),
    "inpainting": ("inpainting", (), mse_in_hole, False),
    "segmentation": ("paired", ("mask",), mean_iou, True),
}


def draw(lvm, pictures, frames, candidates, temperature):
    """Prompts (n, N, S, S, 3) → `candidates` continuations of each: (n, candidates, frames, S, S, 3) uint8."""
    n, shape = len(pictures), pictures.shape[2:]
    tokens = lvm.encode(pictures.reshape(-1, *shape)).view(n, -1, lvm.codes)
    sampling = {"temperature": temperature, "generator": torch.Generator().manual_seed(SEED)}
    drawn = torch.cat([lvm.continue_tokens(part, frames, candidates, **sampling) for part in tokens.split(8)])
    return lvm.decode(drawn.flatten(0, 1)).reshape(n, candidates, frames, *shape)


def measure_analogy(lvm, name, count, out, candidates, temperature):
    """`count` prompts x1, y1, …, xn, yn, x: the model's y beside the true one."""
    kind, modalities, score, more_is_better = ANALOGIES[name]
    source = open_source("emoji", lvm.side, "held_out")
    sentences = Sentences(source, kind, modalities, lvm.window - lvm.window % 2, lvm.side, SEED)
    pictures = np.stack([sentences.sentence(i) for i in range(count)])  # (n, N, S, S, 3)
    query, truth = pictures[:, -2], pictures[:, -1]
    drawn = draw(lvm, pictures[:, :-1], 1, candidates, temperature)[:, :, 0]  # (n, K, S, S, 3)
    answers = {"lvm": drawn.mean(1), "repeat_query": query, "mean_of_answers": pictures[:, 1:-1:2].mean(1)}
    result = {who: mean_and_error(score(np.asarray(a, np.float64), truth, query)) for who, a in answers.items()}
    singles = [score(drawn[:, k].astype(np.float64), truth, query) for k in range(candidates)]
    result["one_candidate"] = mean_and_error(np.mean(singles, 0))
    # what the tokenizer alone would lose, had the LLaMA drawn exactly the right codes
    perfect = lvm.decode(lvm.encode(truth))
    result["true_codes"] = mean_and_error(score(perfect.astype(np.float64), truth, query))
    trivial = [result[who]["mean"] for who in ("repeat_query", "mean_of_answers")]
    ours = result["lvm"]["mean"]
    result["beats_both"] = bool(ours > max(trivial) if more_is_better else ours < min(trivial))
    result |= {"score": score.__name__, "prompts": count}
    for i, picture in enumerate(pictures[0, :-1], 1):  # to try `sample.py continue` with
        save_grid([[picture]], out / "prompts" / f"{name}_{i}.png", pad=0)
    # the prompt | one candidate | the mean of all | the truth
    shown = zip(pictures[:SHOWN], drawn, drawn.mean(1).round().astype(np.uint8), strict=False)
    save_grid([[*p[:-1], d[0], mean, p[-1]] for p, d, mean in shown], out / f"{name}.png")
    return result


# ---- motion ----------------------------------------------------------------------------------


def measure_motion(lvm, count, out, temperature):
    """The second half of a held-out clip, continued from its first half, once."""
    source = open_source("emoji", lvm.side, "held_out")
    sentences = Sentences(source, "video", (), lvm.window, lvm.side, SEED)
    clips = np.stack([sentences.sentence(i) for i in range(count)])  # (n, N, S, S, 3)
    half = lvm.window // 2
    frames = draw(lvm, clips[:, :half], lvm.window - half, 1, temperature)[:, 0]
    still = np.broadcast_to(clips[:, half - 1 : half], frames.shape)

    def quality(made):
        made, true = (x.reshape(-1, *clips.shape[2:]) for x in (made, clips[:, half:]))
        return mean_and_error(psnr(made, true).reshape(count, -1).mean(1))

    rows = []
    for clip, new in list(zip(clips, frames, strict=True))[:SHOWN]:
        rows += [[*clip[:half], *new], list(clip)]  # ours above the true one
    save_grid(rows, out / "motion.png")
    for i, frame in enumerate(clips[0, :half], 1):  # to try `sample.py continue` with
        save_grid([[frame]], out / "prompts" / f"motion_{i}.png", pad=0)
    save_animation([*clips[0, :half], *frames[0]], out / "motion.gif")
    return {"lvm": quality(frames), "stand_still": quality(still), "clips": count, "score": "psnr"}


# ---- the report ------------------------------------------------------------------------------


def measured_by_training(run, unit):
    """The last held-out numbers and the median speed that a run's metrics.jsonl holds."""
    try:
        lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    except OSError:
        return {}
    result = {}
    for line in lines:
        result |= {k: v for k, v in line.items() if k.startswith("held_out") or k == "step"}
    return result | {f"{unit}_per_second": float(np.median([line[f"{unit}_per_second"] for line in lines]))}


def table(report):
    """The report as text, a line for each number."""
    t = report["tokenizer"]
    lines = ["", "on held-out emoji                 ours            trivial answers"]

    def line(name, ours, *others):
        lines.append(f"  {name:<30}{ours:<16}" + "   ".join(others))

    def show(entry, form):
        return f"{entry['mean']:{form}} ± {entry['error']:{form}}"

    small = [f"{t[f'thumbnail_{n}x{n}']['mean']:.1f} ({n}×{n} thumbnail)" for n in (8, 16)]
    line("reconstruction PSNR, dB", show(t["held_out"]["psnr"], ".1f"), *small)
    line("  of new groups | new variants", " | ".join(f"{t[s]['psnr']['mean']:.1f}" for s in ("new", "combo")))
    line("codebook in use | perplexity", f"{t['codebook_used']:.0%} | {t['codebook_perplexity']:.0f}")
    names = {"colorization": "colorization MSE", "inpainting": "inpainting MSE in the hole"}
    for name in ANALOGIES:
        a = report[name]
        others = [f"{a[k]['mean']:.4f} ({k.replace('_', ' ')})" for k in ("repeat_query", "mean_of_answers")]
        verdict = "beats both" if a["beats_both"] else "does not beat both"
        line(names.get(name, "segmentation mIoU"), show(a["lvm"], ".4f"), *others, verdict)
        line("  one candidate", show(a["one_candidate"], ".4f"))
    m = report["motion"]
    line("motion, PSNR of new frames, dB", show(m["lvm"], ".1f"), f"{m['stand_still']['mean']:.1f} (stand still)")
    if "held_out_perplexity" in report["lvm_run"]:
        line("perplexity of a code", f"{report['lvm_run']['held_out_perplexity']:.1f}")
    speeds = [
        f"{r[k]:,.0f} {k.split('_')[0]}/s"
        for r in (report["tokenizer_run"], report["lvm_run"])
        for k in r
        if "per_second" in k
    ]
    line("training speed", ", ".join(speeds))
    return "\n".join(lines)


def main():
    parser = settings.Parser(prog="python bench/lvm_report.py", description=__doc__)
    parser.add_argument("--run", required=True, help="a trained LVM's folder")
    parser.add_argument("--out", required=True, help="where report.json and the pictures go")
    parser.add_argument("--tokenizer", default="", help="default: the run's data.tokenizer")
    parser.add_argument("--prompts", type=int, default=64, help="for each analogy (64)")
    parser.add_argument("--candidates", type=int, default=16, help="answers to each prompt (16)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest code (1)")
    a = parser.parse_args()
    checkpoint.out_file(Path(a.out) / "report.json")  # before all the work
    tokenizer, out = a.tokenizer or run_data(a.run).get("tokenizer", ""), Path(a.out)
    lvm = LVM.from_pretrained(a.run, tokenizer, dtype=torch.float32)
    torch.set_grad_enabled(False)

    report = {"tokenizer": measure_tokenizer(lvm, out)}
    for name in ANALOGIES:
        report[name] = measure_analogy(lvm, name, a.prompts, out, a.candidates, a.temperature)
    report["motion"] = measure_motion(lvm, a.prompts, out, a.temperature)
    report["tokenizer_run"] = measured_by_training(tokenizer, "images")
    report["lvm_run"] = measured_by_training(a.run, "tokens")
    report |= {"candidates": a.candidates, "temperature": a.temperature}
    checkpoint.write_text(out / "report.json", json.dumps(report, indent=2) + "\n")
    print(table(report))
    print(f"\npictures and report.json are in {out}")


if __name__ == "__main__":
    settings.run_main(main)
