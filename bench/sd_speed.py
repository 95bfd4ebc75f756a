"""How long does Stable Diffusion 2.1, at its true size, take for a picture on this machine, and how
much memory?

    python bench/sd_speed.py                                         512×512, bfloat16, DDIM with guidance 7.5
    python bench/sd_speed.py --steps 2 --out sd.png                  only to see that it runs

It measures text → tokens → text tower → U-Net → autoencoder. The weights are random, and as many as
the published ones: SD 2.1's text tower is ViT-H/14's without its last block. CLIP's list of merges
does not come with this repository, so a prompt is read letter by letter, with the published ids of
the 256 bytes and of start and end; the tower always reads 77 tokens, so this changes no time.
Prints the seconds of each part and the peak memory.
"""

import dataclasses
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clip import CLIP, CLIPConfig
from diffusion import AutoencoderKL, AutoencoderKLConfig, LatentDiffusion, NoiseSchedule, UNet, UNetConfig
from support import settings
from support.pictures import to_pil
from support.tokenizer import CLIP_END as END
from support.tokenizer import CLIP_START as START
from support.tokenizer import CLIPTokenizer


def timed(module, name, seconds):
    """From now on, appends to `seconds` how long each call of module.name takes."""
    method = getattr(module, name)

    def run(*inputs):
        start = time.perf_counter()
        result = method(*inputs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        return result

    setattr(module, name, run)


def parameter_count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def letters():
    """CLIP's tokenizer without its merges; the ids of bytes, start, end and padding are CLIP's."""
    vocabulary = CLIPTokenizer.of_bytes().vocabulary | {START: 49406, END: 49407}
    return CLIPTokenizer(vocabulary, [], pad=vocabulary["!"])


def text_tower():
    """SD 2.1's text encoder: ViT-H/14's text tower without its last block and projection."""
    config = dataclasses.replace(CLIPConfig.named("ViT-H/14").text, layers=23)
    encoder = CLIP(CLIPConfig(embed_dim=0, vision=None, text=config)).eval()
    encoder.tokenizer = letters()
    return encoder


def main():
    parser = settings.Parser(prog="python bench/sd_speed.py", description=__doc__)
    parser.add_argument("--prompt", default="a watercolour of a lighthouse at dawn")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--out", help="write the picture here: noise, as the weights are")
    a = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    start = time.perf_counter()
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, a.dtype))  # so that no float32 copy is ever made
    with torch.device(device):
        unet, vae = UNet(UNetConfig.named("sd21")).eval(), AutoencoderKL(AutoencoderKLConfig.named("sd")).eval()
        torch.nn.init.normal_(unet.conv_out.weight, std=0.01)  # starts at 0, and would predict nothing
        encoder = text_tower()
    torch.set_default_dtype(torch.float32)
    model = LatentDiffusion(unet, vae, NoiseSchedule(prediction_type="v_prediction"), encoder)
    sizes = {name: parameter_count(part) for name, part in model.named_children()}
    print(f"SD 2.1 in {a.dtype}, made in {time.perf_counter() - start:.0f} s, on {device}; weights: {sizes}")

    text_seconds, unet_seconds, vae_seconds = [], [], []
    timed(model, "encode_text", text_seconds)  # twice: the prompt, and guidance's empty text
    timed(unet, "forward", unet_seconds)
    timed(vae, "decode", vae_seconds)
    start = time.perf_counter()
    images = model.generate(a.prompt, size=a.size, steps=a.steps, sampler=a.sampler, seed=0)
    print(f"{a.size}×{a.size}, {a.steps} {a.sampler} steps with guidance: {time.perf_counter() - start:.1f} s")
    print(f"  two texts: {sum(text_seconds):.2f} s")
    print(f"  a step (median, both passes at once): {statistics.median(unet_seconds):.2f} s")
    print(f"  decoding: {vae_seconds[0]:.2f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
    print(f"  most memory held: {peak:.2f} GiB")
    if device == "cuda":
        print(f"  of the GPU's: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    if a.out:
        to_pil(images)[0].save(a.out)


if __name__ == "__main__":
    settings.run_main(main)
