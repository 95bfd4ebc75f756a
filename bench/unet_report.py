"""Do the pictures of a latent diffusion show what the text says? Emoji by their names.

    python bench/unet_report.py --run out/emoji/unet --clip out/emoji/clip --out out/emoji --guidance 1 2 4

It generates one picture for each name, of the training set and of unseen combinations (`combo`:
another skin tone or gender of a kind that was seen). A recogniser then ranks 100 names by the
picture; reported is how often the right one comes first, beside the same for

    real    the emoji themselves. Those of the seen names are training pictures of both the CLIP
            and the U-Net; neither has seen a picture of `combo`
    noise   what the autoencoder makes of random latents

There are two recognisers: the CLIP, whose text tower also steers the U-Net, so that it may be
partial; and the bag of words of clip_report.py (linear, on 16×16 thumbnails), which had no part in
the U-Net. Of several --guidance, the one is reported whose pictures the CLIP recognises most often,
for other names of the training set. The report also has the autoencoder's PSNR on held-out emoji.
Brackets and ± are 95 % intervals.
"""

import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clip_report import BagOfWords, Learned, distractors, retrieval, shown

from clip import CLIP, text_encoders
from diffusion import LatentDiffusion
from support import checkpoint, settings
from support.pictures import psnr, to_float, to_uint8
from support.sources import open_source

SEED, TRIED = 0, 64
SHOWN = {"train": 12, "combo": 6}  # names in the grid


@torch.inference_mode()
def draw(model, captions, side, guidance, steps):
    """captions → (N, side, side, 3) uint8; picture i from seed SEED + i."""
    parts = []
    for i in range(0, len(captions), 32):
        some = captions[i : i + 32]
        parts.append(model.generate(some, guidance=guidance, steps=steps, size=side, seed=SEED + i))
    return to_uint8(torch.cat(parts))


@torch.inference_mode()
def decoded_noise(model, count, side):
    """(count, side, side, 3) uint8: pictures of random latents, for which nothing was predicted."""
    c = model.vae.config
    shape = (count, c.latent_channels, side // c.factor, side // c.factor)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
    return to_uint8(model.to_images(latents))


@torch.inference_mode()
def reconstruction_psnr(model, pictures):
    """Of each picture through the autoencoder and back, in dB."""
    images = to_float(pictures)
    back = torch.cat([model.to_images(model.to_latents(part)) for part in images.split(64)])
    return psnr(back, images).numpy()


def named_grid(rows, columns=6, lines=3):
    """Rows of (name, drawn, real), pictures (S, S, 3) → one picture of all."""
    side, font, pad, line = rows[0][1].shape[0], ImageFont.load_default(10), 6, 12
    width, height = 2 * side + 2 * pad, side + lines * line + 2 * pad
    sheet = Image.new("RGB", (columns * width, -(-len(rows) // columns) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (name, drawn, real) in enumerate(rows):
        left, top = i % columns * width + pad // 2, i // columns * height + pad // 2
        for k, picture in enumerate((drawn, real)):
            sheet.paste(Image.fromarray(picture), (left + k * (side + pad // 2), top))
        wrapped = textwrap.wrap(name, 24, max_lines=lines, placeholder=" …")
        pen.multiline_text((left, top + side + 2), "\n".join(wrapped), "black", font, spacing=1)
    return sheet


@torch.inference_mode()
def main():
    parser = settings.Parser(prog="python bench/unet_report.py", description=__doc__)
    parser.add_argument("--run", required=True, help="a trained U-Net's folder")
    parser.add_argument("--clip", required=True, help="the CLIP that recognises")
    parser.add_argument("--out", required=True, help="where unet_report.json and unet.png go")
    parser.add_argument("--count", type=int, default=128, help="names of each kind, or all there are (128)")
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.0])
    parser.add_argument("--steps", type=int, default=25)
    a = parser.parse_args()
    checkpoint.out_file(Path(a.out) / "unet_report.json")  # before all the work
    model = LatentDiffusion.from_pretrained(a.run, text_encoders(a.run), torch.float32).eval()
    side = model.unet.config.sample_size * model.vae.config.factor
    splits = {split: list(open_source("emoji", side, split)) for split in ("train", "combo", "new")}
    recognisers = {
        "clip": Learned(CLIP.from_pretrained(a.clip, dtype=torch.float32)),
        "bag": BagOfWords(splits["train"]),
    }
    everyone = np.array(sorted({item.caption for items in splits.values() for item in items}))
    rng, report = np.random.default_rng(SEED), {"steps": a.steps}

    psnrs = reconstruction_psnr(model, [item.image for split in ("combo", "new") for item in splits[split]])
    error = 1.96 * psnrs.std(ddof=1) / len(psnrs) ** 0.5
    report["autoencoder_psnr"] = {"mean": float(psnrs.mean()), "error": float(error), "pictures": len(psnrs)}
    print(f"autoencoder, PSNR of {len(psnrs)} held-out emoji: {psnrs.mean():.1f} ± {error:.1f} dB")

    names = {}
    for split in ("train", "combo"):
        names[split] = [splits[split][i] for i in rng.permutation(len(splits[split]))]
    report["guidance"] = a.guidance[0]
    if len(a.guidance) > 1:
        tried = names["train"][a.count : a.count + TRIED]
        captions, others, found = [item.caption for item in tried], distractors(tried, everyone, rng), {}
        for guidance in a.guidance:
            drawn = draw(model, captions, side, guidance, a.steps)
            found[guidance] = retrieval(recognisers["clip"], drawn, captions, others)["R@1"]
            print(f"guidance {guidance:g}, {len(tried)} other seen names: first of 100 {shown(found[guidance])}")
        report |= {"tried": found, "guidance": max(found, key=lambda guidance: found[guidance]["share"])}
    print(f"reported: guidance {report['guidance']:g}, {a.steps} steps of DDIM")

    rows = []
    for split, title in (("train", "seen names"), ("combo", "unseen combinations")):
        items = names[split][: a.count]
        captions, others = [item.caption for item in items], distractors(items, everyone, rng)
        pictures = {
            "drawn": draw(model, captions, side, report["guidance"], a.steps),
            "real": [item.image for item in items],
            "noise": decoded_noise(model, len(items), side),
        }
        report[split] = {"pictures": len(items)}
        print(f"\n{title}, {len(items)}   first of 100         among five           bag of words, first  among five")
        for kind, some in pictures.items():
            found = {name: retrieval(recogniser, some, captions, others) for name, recogniser in recognisers.items()}
            report[split][kind] = found
            print(f"  {kind:22}" + " ".join(f"{shown(found[j][k]):20}" for j in recognisers for k in ("R@1", "R@5")))
        rows += list(zip(captions, pictures["drawn"], pictures["real"], strict=True))[: SHOWN[split]]
    checkpoint.write_json(Path(a.out) / "unet_report.json", report)
    with checkpoint.atomic_file(Path(a.out) / "unet.png") as beside:
        # 256 colours for all: half the size, and no eye sees it
        named_grid(rows).quantize(256, dither=Image.Dither.NONE).save(beside, optimize=True)


if __name__ == "__main__":
    settings.run_main(main)
