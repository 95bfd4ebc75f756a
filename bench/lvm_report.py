"""How good is a small LVM on emoji it never saw? A table, report.json, and pictures to look at.

    python bench/lvm_report.py --run out/demo/lvm --out out/demo

Each number stands beside baselines that cost nothing: a reconstruction beside thumbnails of the
same picture, the answer to an analogy beside the query repeated and beside the mean of the answers
in the prompt, a continued motion beside its last frame repeated. The model answers each prompt
several times; the mean of these candidates, its best guess by squared error, is scored, and so is a
single candidate. Pixels are in [0, 1]. All pictures are held out, those of the prompts too; the
pictures shown are the first ones, not chosen ones.
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
from support import checkpoint, pictures, settings
from support.options import non_negative, positive_int
from support.pictures import save_animation, save_grid, to_float
from support.sources import open_source
from vqgan import usage

SEED = 1  # of the sentences and of the sampling
SHOWN = 4  # rows in each sheet of pictures


def psnr(a, b):
    """Of each picture, in dB, at most 100: a, b (N, H, W, 3) uint8 → (N,)."""
    return pictures.psnr(to_float(a), to_float(b)).clamp(max=100).numpy()


def mean_and_error(values):
    """The mean and half the width of its 95 % interval; values that are NaN do not count."""
    values = np.asarray(values)
    values = values[~np.isnan(values)]
    error = 1.96 * np.std(values, ddof=1) / np.sqrt(len(values))
    return {"mean": float(np.mean(values)), "error": float(error)}


def thumbnail(picture, side):
    """A picture shrunk to side × side and enlarged again, as well as Pillow can."""
    height, width, _ = picture.shape
    small = Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS)
    return np.asarray(small.resize((width, height), Image.Resampling.LANCZOS))


# ---- the tokenizer ---------------------------------------------------------------------------


def measure_tokenizer(lvm, out):
    """PSNR of reconstructions on each held-out split, that of thumbnails, and the codebook's use."""
    result, encoded = {}, {}
    for split in ("held_out", "new", "combo"):
        true, tokens = encoded[split] = encode_split(lvm, split)
        quality = psnr(lvm.decode(tokens), true)
        result[split] = {"pictures": len(true), "psnr": mean_and_error(quality)}
    true, tokens = encoded["held_out"]
    for side in (8, 16):
        small = np.stack([thumbnail(picture, side) for picture in true])
        result[f"thumbnail_{side}x{side}"] = mean_and_error(psnr(small, true))
    counts = torch.bincount(tokens.flatten(), minlength=lvm.tokenizer.config.num_embeddings)
    result["codebook_used"], result["codebook_perplexity"] = usage(counts.float())
    shown = np.linspace(0, len(true) - 1, 12).astype(int)
    save_grid([true[shown], lvm.decode(tokens[shown])], out / "reconstructions.png")
    return result


def encode_split(lvm, split):
    """The emoji of a split: pictures (N, S, S, 3) uint8, tokens (N, codes)."""
    true = np.stack([item.image for item in open_source("emoji", lvm.side, split)])
    batches = np.array_split(true, -(-len(true) // 64))
    return true, torch.cat([lvm.encode(batch) for batch in batches])


# ---- analogies: scores of answers (N, H, W, 3) in 0..255 → (N,) ------------------------------


def mse(answer, truth, query):
    return ((answer / 255 - truth / 255) ** 2).mean((1, 2, 3))


def mse_in_hole(answer, truth, query):
    """MSE where the query is pure black, as its holes are and nearly nothing else; NaN: no hole."""
    hole = (query == 0).all(-1)  # (N, H, W)
    error = ((answer / 255 - truth / 255) ** 2).mean(-1)
    count = hole.sum((1, 2))
    return np.where(count > 0, (error * hole).sum((1, 2)) / count.clip(1), np.nan)


def mean_iou(answer, truth, query):
    """Intersection over union, mean of foreground (nearer to white) and background."""
    found, true = answer.mean(-1) > 127.5, truth.mean(-1) > 127.5  # (N, H, W)
    return (iou(found, true) + iou(~found, ~true)) / 2


def iou(found, true):
    return (found & true).sum((1, 2)) / (found | true).sum((1, 2)).clip(1)


ANALOGIES = {  # name: sentence kind, its modalities, score, whether more is better
    "colorization": ("colorization", (), mse, False),
    "inpainting": ("inpainting", (), mse_in_hole, False),
    "segmentation": ("paired", ("mask",), mean_iou, True),
}


def held_out_sentences(lvm, kind, modalities, length, count):
    """`count` sentences of `length` held-out emoji: (count, length, S, S, 3) uint8."""
    source = open_source("emoji", lvm.side, "held_out")
    sentences = Sentences(source, kind, modalities, length, lvm.side, SEED)
    return np.stack([sentences.sentence(i) for i in range(count)])


def continue_prompts(lvm, prompts, frames, candidates, temperature):
    """Prompts (n, N, S, S, 3) → continuations (n, candidates, frames, S, S, 3) uint8."""
    n, shape = len(prompts), prompts.shape[2:]
    tokens = lvm.encode(prompts.reshape(-1, *shape)).view(n, -1, lvm.codes_per_picture)
    generator = torch.Generator().manual_seed(SEED)
    options = {"temperature": temperature, "generator": generator}
    parts = [lvm.continue_tokens(part, frames, candidates, **options) for part in tokens.split(8)]
    return lvm.decode(torch.cat(parts).flatten(0, 1)).reshape(n, candidates, frames, *shape)


def measure_analogy(lvm, name, count, out, candidates, temperature):
    """`count` prompts x1, y1, …, xn, yn, x: the model's y against the true one."""
    kind, modalities, score, more_is_better = ANALOGIES[name]
    sentences = held_out_sentences(lvm, kind, modalities, lvm.pictures_in_context - lvm.pictures_in_context % 2, count)
    prompts, query, truth = sentences[:, :-1], sentences[:, -2], sentences[:, -1]
    answers = continue_prompts(lvm, prompts, 1, candidates, temperature)[:, :, 0]  # (n, K, S, S, 3)

    def measured(pictures):
        return mean_and_error(score(np.asarray(pictures, np.float64), truth, query))

    singles = [score(answers[:, k].astype(np.float64), truth, query) for k in range(candidates)]
    result = {
        "lvm": measured(answers.mean(1)),
        "repeat_query": measured(query),
        "mean_of_answers": measured(prompts[:, 1::2].mean(1)),
        "one_candidate": mean_and_error(np.mean(singles, 0)),
        "true_codes": measured(lvm.decode(lvm.encode(truth))),  # what the tokenizer alone loses
    }
    ours = result["lvm"]["mean"]
    baselines = [result["repeat_query"]["mean"], result["mean_of_answers"]["mean"]]
    beats_both = ours > max(baselines) if more_is_better else ours < min(baselines)
    save_prompt(prompts[0], out, name)
    rows = []  # the prompt | one candidate | the mean of all | the truth
    for i in range(min(SHOWN, count)):
        mean = answers[i].mean(0).round().astype(np.uint8)
        rows.append([*prompts[i], answers[i, 0], mean, truth[i]])
    save_grid(rows, out / f"{name}.png")
    return result | {"beats_both": bool(beats_both), "score": score.__name__, "prompts": count}


def save_prompt(prompt, out, name):
    """The pictures of one prompt as files, to try `sample.py continue` with."""
    for i, picture in enumerate(prompt, 1):
        save_grid([[picture]], out / "prompts" / f"{name}_{i}.png", pad=0)


# ---- motion ----------------------------------------------------------------------------------


def measure_motion(lvm, count, out, temperature):
    """The second half of a held-out clip, continued from its first half, once."""
    clips = held_out_sentences(lvm, "video", (), lvm.pictures_in_context, count)  # (n, N, S, S, 3)
    half = lvm.pictures_in_context // 2
    given, truth = clips[:, :half], clips[:, half:]
    frames = continue_prompts(lvm, given, lvm.pictures_in_context - half, 1, temperature)[:, 0]
    still = np.broadcast_to(given[:, -1:], frames.shape)

    def measured(frames):  # a clip's score is the mean of its frames'
        quality = psnr(frames.reshape(-1, *clips.shape[2:]), truth.reshape(-1, *clips.shape[2:]))
        return mean_and_error(quality.reshape(count, -1).mean(1))

    rows = []
    for i in range(min(SHOWN, count)):
        rows += [[*given[i], *frames[i]], list(clips[i])]  # ours above the true one
    save_grid(rows, out / "motion.png")
    save_prompt(given[0], out, "motion")
    save_animation([*given[0], *frames[0]], out / "motion.gif")
    result = {"lvm": measured(frames), "stand_still": measured(still)}
    return result | {"clips": count, "score": "psnr"}


# ---- the report ------------------------------------------------------------------------------


def measured_by_training(run, unit):
    """The last held-out numbers and the median speed that a run's metrics.jsonl holds."""
    try:
        text = settings.read_text(Path(run) / "metrics.jsonl")
    except settings.UserError:  # published weights have none
        return {}
    result, speeds = {}, []
    for line in text.splitlines():
        try:
            metrics = json.loads(line)
        except ValueError:  # a kill has cut it short
            continue
        speeds.append(metrics.get(f"{unit}_per_second", np.nan))
        for name, value in metrics.items():
            if name.startswith("held_out") or name == "step":
                result[name] = value
    return result | {f"{unit}_per_second": float(np.nanmedian(speeds))}


def line(name, *columns):
    """One line of the table."""
    ours, *others = columns
    return f"  {name:<32}{ours:<16}" + "   ".join(others)


def plus_minus(entry, form):
    return f"{entry['mean']:{form}} ± {entry['error']:{form}}"


def table(report):
    """The report as text, a line for each number."""
    tokenizer, motion = report["tokenizer"], report["motion"]
    lines = ["", "on held-out emoji                   ours            baselines"]
    small = [f"{tokenizer[f'thumbnail_{n}x{n}']['mean']:.1f} ({n}×{n} thumbnail)" for n in (8, 16)]
    psnrs = [f"{tokenizer[split]['psnr']['mean']:.1f}" for split in ("new", "combo")]
    used, perplexity = tokenizer["codebook_used"], tokenizer["codebook_perplexity"]
    lines += [
        line("reconstruction PSNR, dB", plus_minus(tokenizer["held_out"]["psnr"], ".1f"), *small),
        line("  of new kinds | new variants", " | ".join(psnrs)),
        line("codebook in use | perplexity", f"{used:.0%} | {perplexity:.0f}"),
    ]
    titles = ("colorization MSE", "inpainting MSE in the hole", "segmentation mIoU")
    for name, title in zip(ANALOGIES, titles, strict=True):
        entry = report[name]
        query = f"{entry['repeat_query']['mean']:.4f} (repeat query)"
        mean = f"{entry['mean_of_answers']['mean']:.4f} (mean of answers)"
        verdict = "beats both" if entry["beats_both"] else "does not beat both"
        lines.append(line(title, plus_minus(entry["lvm"], ".4f"), query, mean, verdict))
        lines.append(line("  one candidate", plus_minus(entry["one_candidate"], ".4f")))
    still = f"{motion['stand_still']['mean']:.1f} (stand still)"
    lines.append(line("motion, PSNR of new frames, dB", plus_minus(motion["lvm"], ".1f"), still))
    if "held_out_perplexity" in report["lvm_run"]:
        lines.append(line("perplexity of a code", f"{report['lvm_run']['held_out_perplexity']:.1f}"))
    speeds = []
    for run, unit in (("tokenizer_run", "images"), ("lvm_run", "tokens")):
        if speed := report[run].get(f"{unit}_per_second"):
            speeds.append(f"{speed:,.0f} {unit}/s")
    if speeds:
        lines.append(line("training speed", ", ".join(speeds)))
    return "\n".join(lines)


def main():
    parser = settings.Parser(prog="python bench/lvm_report.py", description=__doc__)
    parser.add_argument("--run", required=True, help="a trained LVM's folder")
    parser.add_argument("--out", required=True, help="where report.json and the pictures go")
    parser.add_argument("--tokenizer", default="", help="default: the run's data.tokenizer")
    parser.add_argument("--prompts", type=positive_int, default=64, help="for each analogy (64)")
    parser.add_argument("--candidates", type=positive_int, default=16, help="answers to each prompt (16)")
    parser.add_argument("--temperature", type=non_negative, default=1.0, help="0: the likeliest codes (1)")
    arguments = parser.parse_args()
    run, out = arguments.run, Path(arguments.out)
    candidates, temperature = arguments.candidates, arguments.temperature
    checkpoint.out_file(out / "report.json")  # before all the work
    tokenizer = arguments.tokenizer or run_data(run).get("tokenizer", "")
    lvm = LVM.from_pretrained(run, tokenizer, dtype=torch.float32)
    torch.set_grad_enabled(False)

    report = {"tokenizer": measure_tokenizer(lvm, out)}
    for name in ANALOGIES:
        report[name] = measure_analogy(lvm, name, arguments.prompts, out, candidates, temperature)
    report["motion"] = measure_motion(lvm, arguments.prompts, out, temperature)
    report["tokenizer_run"] = measured_by_training(tokenizer, "images")
    report["lvm_run"] = measured_by_training(run, "tokens")
    report |= {"candidates": candidates, "temperature": temperature}
    checkpoint.write_json(out / "report.json", report)
    print(table(report))
    print(f"\npictures and report.json are in {out}")


if __name__ == "__main__":
    settings.run_main(main)
