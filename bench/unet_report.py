"""Does latent diffusion draw what a text says? Emoji by their names, judged by a CLIP.

    python bench/unet_report.py --run out/emoji/unet --clip out/emoji/clip --out out/emoji

Names that were seen in training, and unseen combinations (`combo`: another skin tone or gender of a kind that was
seen). Each is drawn once; the CLIP must find the name among 100 by the picture, and the same is asked of the real
pictures and of noise. The autoencoder's PSNR on held-out emoji stands in the report too. ± is half a 95 % interval.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clip_report import Learned, distractors, interval, retrieval

import checkpoint
import settings
from clip import CLIP, text_encoders
from data import open_source, save_grid
from diffusion import LatentDiffusion

SEED, SHOWN = 0, 16


@torch.inference_mode()
def draw(model, captions, side, guidance, steps):
    """captions → (N, side, side, 3) uint8; picture i from seed SEED + i."""
    parts = []
    for i in range(0, len(captions), 32):
        some = captions[i : i + 32]
        parts.append(model.generate(some, guidance=guidance, steps=steps, size=side, seed=SEED + i))
    images = torch.cat(parts)  # (N, 3, side, side)
    return (images * 255).round().byte().permute(0, 2, 3, 1).numpy()


@torch.inference_mode()
def reconstruction_psnr(model, pictures):
    """Of each picture through the autoencoder and back, in dB."""
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    back = torch.cat([model.to_images(model.to_latents(part)) for part in images.split(64)])
    return -10 * ((back - images) ** 2).mean((1, 2, 3)).log10().numpy()


@torch.inference_mode()
def main():
    parser = settings.Parser(prog="python bench/unet_report.py", description=__doc__)
    parser.add_argument("--run", required=True, help="a trained U-Net's folder")
    parser.add_argument("--clip", required=True, help="the CLIP that judges")
    parser.add_argument("--out", required=True, help="where unet_report.json and the pictures go")
    parser.add_argument("--count", type=int, default=96, help="names of each kind (96)")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=25)
    a = parser.parse_args()
    model = LatentDiffusion.from_pretrained(a.run, text_encoders(a.run), torch.float32).eval()
    judge = Learned(CLIP.from_pretrained(a.clip, dtype=torch.float32))
    side = model.unet.config.sample_size * model.vae.config.factor
    splits = {split: list(open_source("emoji", side, split)) for split in ("train", "combo", "new")}
    everyone = np.array(sorted({item.caption for items in splits.values() for item in items}))
    draws, report = np.random.default_rng(SEED), {}
    held_out = [item.image for split in ("combo", "new") for item in splits[split]]
    report["autoencoder_psnr"] = interval(reconstruction_psnr(model, held_out))
    print(f"autoencoder, held-out PSNR {report['autoencoder_psnr']['mean']:.1f} dB")
    for split, title in (("train", "seen names"), ("combo", "unseen combinations")):
        items = splits[split]
        items = [items[i] for i in draws.permutation(len(items))[: a.count]]
        captions, others = [item.caption for item in items], distractors(items, everyone, draws)
        pictures = {
            "drawn": draw(model, captions, side, a.guidance, a.steps),
            "real": [item.image for item in items],
            "noise": draws.integers(0, 256, (len(items), side, side, 3), dtype=np.uint8),
        }
        report[split] = {name: retrieval(judge, list(some), captions, others) for name, some in pictures.items()}
        print(f"{title}, {len(items)} of them: name found among 100, first | in the first five")
        for name, r in report[split].items():
            print(f"  {name:8}" + " | ".join(f"{r[k]['mean']:.3f} ± {r[k]['error']:.3f}" for k in ("R@1", "R@5")))
        shown = zip(captions[:SHOWN], pictures["drawn"], pictures["real"], strict=False)
        rows = [(caption, drawn, real) for caption, drawn, real in shown]
        save_grid([[r[1] for r in rows], [r[2] for r in rows]], Path(a.out) / f"drawn_{split}.png")
        report[split]["shown"] = [r[0] for r in rows]
        print("  " + "; ".join(r[0] for r in rows))
    report |= {"guidance": a.guidance, "steps": a.steps}
    checkpoint.write_text(Path(a.out) / "unet_report.json", json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    settings.run_main(main)
