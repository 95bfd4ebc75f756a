"""One picture: opened, cropped, moved, written; and batches of them as tensors.

    file ──load_picture──▶ (H, W, 3) uint8 ──stack, to_float──▶ (B, 3, H, W) float32 in [0, 1]
     ▲                         │   ▲                                    │
     └─ save_grid, ────────────┘   └────────── to_uint8, to_pil ────────┘
        save_animation

An array is always RGB, with white where the file is transparent. torch is imported by `to_float`
only, so that the data code and the JAX trainer do without.
"""

import contextlib
import functools
import io
import math
import os
import sys
import threading
import warnings

import numpy as np
from PIL import Image, ImageOps

from support.checkpoint import atomic_file, out_file
from support.settings import FILE, UserError, content

# ---- files -----------------------------------------------------------------------------------

PIXELS = 1 << 26  # of a picture, as of 8192 × 8192: while it is decoded they take up to 1.4 GB
LARGE = 1 << 24  # from so many on, one picture is decoded at a time, whichever threads want them
_one_at_a_time = threading.Lock()

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".apng", ".tif", ".tiff", ".ppm")  # to write

with contextlib.suppress(ImportError):  # without this package, HEIC files are named and left out
    from pillow_heif import register_heif_opener

    register_heif_opener()

# What is opened, whatever the file is called. Not all that Pillow can: it would start Ghostscript for
# an .eps, and its .h5, .fits and .mpg are data and films.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "HEIF", "JPEG2000", "TGA")
FORMATS += ("PCX", "QOI", "ICO", "SGI", "DDS")
ENDINGS = {ending for ending, form in Image.registered_extensions().items() if form in FORMATS}
FORMATS = [form for form in FORMATS if form in Image.OPEN]

warnings.filterwarnings("ignore", module="PIL")  # of what is refused, an error says it; the rest is read

INSTEAD = {  # how files begin that are called pictures and are none
    b"version https://git-lfs": "a Git LFS pointer, not the file: git lfs pull",
    b"<!doctype html": "a page in HTML, which came instead of the picture",
    b"<html": "a page in HTML, which came instead of the picture",
    b"<?xml": "XML, maybe an SVG drawing: export it as .png",
    b"<svg": "an SVG drawing: export it as .png",
    b"8bps": "a Photoshop file: export it as .png",
    b"%pdf": "a PDF: export its pages as .png",
    b"%!ps": "PostScript: export it as .png",
}


def load_picture(source, side=None, resize="crop", name=None, frame=0):
    """A picture file as (H, W, 3) uint8 RGB, transparency laid on white, camera rotation undone.

    `source` is a path or the file's bytes (then `name` is what errors call it). With `side` the
    result is (side, side, 3): resize="crop" cuts the middle square first, "stretch" squeezes the
    whole picture. `frame` is for animations. A file that is absent or broken is a UserError.
    """
    name = name or (source if isinstance(source, str | os.PathLike) else "picture")
    try:
        data = source if isinstance(source, bytes) else content(source, FILE)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if frame:
                image.seek(frame)
            with decoding(image, side):
                image.load()  # what is broken must raise here, not below
                if image.format == "TIFF" and image.n_frames > 1:
                    _say_first_page(str(name))
                with contextlib.suppress(Exception):  # Exif that Pillow cannot read costs the rotation only
                    ImageOps.exif_transpose(image, in_place=True)
                return np.array(fit_square(on_white(image), side, resize))  # (H, W, 3)
    except FileNotFoundError:
        raise UserError(f"{name}: no such file") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{name}: {not_a_picture(data)}") from None
    except Exception as error:  # Pillow's decoders raise nearly everything on broken bytes
        raise UserError(f"{name}: {error}") from None


def decoding(image, side):
    """What a Pillow image is decoded within, if it is not too large: then a ValueError.

    A JPEG that is too large is decoded at a half, a quarter or an eighth of its size, if twice `side` is left of it.
    (Of 179 million pixels and more, Pillow opens none.)
    """
    width, height = image.size
    if width * height > PIXELS and side and image.format in ("JPEG", "MPO"):
        image.draft(None, (2 * side * max(1, width // height), 2 * side * max(1, height // width)))
    if math.prod(image.size) > PIXELS:
        raise ValueError(f"{width}×{height} pixels, more than {PIXELS}: save it smaller")
    return _one_at_a_time if math.prod(image.size) > LARGE else contextlib.nullcontext()


def not_a_picture(data):
    """What the bytes of a file are that Pillow does not open."""
    if not data:
        return "an empty file"
    if data[4:11] in (b"ftyphei", b"ftyphev", b"ftypmif"):
        return "not a picture that is read here, but HEIC: pip install pillow-heif"
    start = data[:100].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return next((what for sign, what in INSTEAD.items() if start.startswith(sign)), "not a picture")


@functools.cache  # once a file
def _say_first_page(name):
    print(f"{name}: a TIFF of several pages, of which the first is read", file=sys.stderr)


def may_be_animated(start):
    """Whether a file that starts with these bytes (16 KB are enough) can hold more than one frame."""
    webp = start[8:16] == b"WEBPVP8X" and len(start) > 20 and start[20] & 2
    return bool(start[:4] == b"GIF8" or webp or start[4:12] == b"ftypavis" or b"acTL" in start)


def on_white(image):
    """A Pillow image of any mode as RGB; what is transparent becomes white.

    16 bits (PNG, TIFF, PGM): 0 is black, 65535 white. 32 bits and floats have no white of their own:
    0 (or the least value, if it is negative) is black, and the picture's greatest value white.
    """
    if image.mode.startswith("I;") or (image.mode == "I" and image.format == "PPM"):
        values = np.asarray(image)  # (H, W)
        if 0 < values.max() < 257:  # labels, or 8 bits in the wrong file: they would all be black
            raise ValueError(f"16 bits, but no value above {values.max()} of 65535: save it with 8 bits")
        return Image.fromarray((values / 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        return Image.fromarray(stretch(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def stretch(values):
    """Numbers (H, W) → (H, W) uint8: 0 or a negative least one becomes 0, the greatest 255; NaN 0."""
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError("not one of its values is a finite number")
    low = float(values.min(initial=0, where=finite))
    high = float(values.max(initial=low, where=finite))
    out = np.empty(values.shape, np.uint8)
    for top in range(0, len(values), 256):  # in strips: as float64, all of them would fill the memory
        part = np.nan_to_num(values[top : top + 256].astype(np.float64), nan=low, posinf=high, neginf=low)
        out[top : top + 256] = ((part - low) * (255 / max(high - low, 1e-300))).round()
    return out


# ---- squares: two ways to cut the middle out ---------------------------------------------------


def fit_square(image, side, resize="crop"):
    """A Pillow image as side × side pixels: its middle square, resized (bicubic, antialiased).

    resize="stretch" squeezes the whole image instead; side None leaves it as it is.
    """
    if side is None or image.size == (side, side):
        return image
    width, height = image.size
    edge = min(width, height)
    left, top = (width - edge) // 2, (height - edge) // 2
    box = (left, top, left + edge, top + edge) if resize == "crop" else None
    return image.resize((side, side), Image.Resampling.BICUBIC, box=box)


def square(image, side, resample=Image.Resampling.BICUBIC, rounding=math.floor):
    """A Pillow image as side × side pixels: its shorter side becomes `side`, the rest is cut off.

    So do CLIP (bicubic, floor) and torchvision's Resize with CenterCrop (bilinear, round):
    `rounding` says which pixel comes first where the middle lies half a pixel off.
    """
    width, height = image.size
    edge = min(width, height)
    image = image.resize((side * width // edge, side * height // edge), resample)
    left, top = rounding((image.width - side) / 2), rounding((image.height - side) / 2)
    return image.crop((left, top, left + side, top + side))


# ---- what any picture has: grey, edges -----------------------------------------------------------


def grey(picture):
    """(H, W, 3) → (H, W, 3), every channel the luma .2989 R + .5870 G + .1140 B."""
    luma = picture @ np.array([0.2989, 0.5870, 0.1140])  # (H, W)
    return np.repeat(luma.round().astype(np.uint8)[..., None], 3, axis=-1)


def edges(picture):
    """(H, W, 3) → (H, W, 3): the length of the brightness gradient, white lines on black."""
    down, right = np.gradient(grey(picture)[..., 0].astype(np.float32))  # (H, W) each
    strength = (2 * np.hypot(down, right)).clip(0, 255)
    return np.repeat(strength.astype(np.uint8)[..., None], 3, axis=-1)


COMPUTED = {"grey": grey, "edges": edges}  # modalities that any picture has


# ---- motion: clips made of one still picture ---------------------------------------------------

CLIP_FRAMES = 128  # 16 frames, 8 apart, and a little room for the start


def random_motion(rng):
    """(2, 4): a pose (scale, angle in degrees, x and y of the centre in sides), its change a frame.

    The picture turns by 10-30° in 8 frames, or slides, or grows and shrinks.
    """
    sign = rng.choice([-1, 1])
    match rng.integers(3):
        case 0:  # small enough for its corners to stay in sight
            return np.array([(0.8, rng.uniform(0, 360), 0, 0), (0, sign * rng.uniform(10, 30) / 8, 0, 0)])
        case 1:
            direction, speed = rng.uniform(0, 2 * np.pi), rng.uniform(0.06, 0.12) / 8
            start = (0.5, 0, *rng.uniform(-0.25, 0.25, size=2))
            return np.array([start, (0, 0, speed * np.cos(direction), speed * np.sin(direction))])
        case _:
            return np.array([(rng.uniform(0.4, 1), 0, 0, 0), (sign * rng.uniform(0.05, 0.1) / 8, 0, 0, 0)])


def motion_frame(picture, motion, t, background=255):
    """Frame t of the clip in which `picture` (S, S, 3) moves: (S, S, 3) uint8.

    At the edge (of the frame, or of the sizes 0.4..1) it bounces, so any two frames determine the
    next.
    """
    side = len(picture)
    scale, angle, x, y = motion[0] + t * motion[1]
    scale, x, y = _bounce(scale, 0.4, 1), _bounce(x, -0.25, 0.25), _bounce(y, -0.25, 0.25)
    # Pillow asks where each output pixel comes from. At twice the size, then halved: antialiased.
    a, b = np.cos(np.deg2rad(angle)) / (2 * scale), np.sin(np.deg2rad(angle)) / (2 * scale)
    u, v = side * (1 + 2 * x), side * (1 + 2 * y)  # the picture's centre in the doubled frame
    inverse = (a, -b, side / 2 - a * u + b * v, b, a, side / 2 - b * u - a * v)
    size, fill = (2 * side, 2 * side), (background,) * 3
    double = Image.fromarray(picture).transform(
        size, Image.Transform.AFFINE, inverse, Image.Resampling.BICUBIC, fillcolor=fill
    )
    return np.array(double.reduce(2))


def jitter(picture, rng):
    """A picture (S, S, 3), turned up to 12°, shrunk to 0.8 at most, shifted a little, on white."""
    x, y = rng.uniform(-0.06, 0.06, size=2)
    pose = (rng.uniform(0.8, 1), rng.uniform(-12, 12), x, y)
    return motion_frame(picture, np.array([pose, (0, 0, 0, 0)]), 0)


def _bounce(value, low, high):
    """`value` reflected at both ends of [low, high]: a triangle wave."""
    width = high - low
    return high - abs((value - low) % (2 * width) - width)


# ---- batches as tensors --------------------------------------------------------------------------


def to_float(pictures, device="cpu"):
    """Array or list (B, H, W, 3) uint8 → tensor (B, 3, H, W) float32 in [0, 1] on `device`."""
    import torch

    return torch.from_numpy(np.asarray(pictures)).to(device).permute(0, 3, 1, 2).float() / 255


def to_uint8(images):
    """Tensor (B, 3, H, W) in [0, 1] (what lies outside is clipped) → array (B, H, W, 3) uint8."""
    return (images.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def to_pil(images):
    """Tensor (B, 3, H, W) around [0, 1] → a list of B Pillow images."""
    return [Image.fromarray(picture) for picture in to_uint8(images)]


def psnr(images, truth):
    """Peak signal-to-noise ratio of each picture, (B,), in dB; of tensors (B, 3, H, W) in [0, 1].

    -10 log₁₀ of the mean squared error, `images` clipped to [0, 1].
    """
    return -10 * (images.float().clamp(0, 1) - truth).pow(2).mean((1, 2, 3)).log10()


# ---- written -----------------------------------------------------------------------------------


def resized(pictures, size):
    """A list of the pictures (H, W, 3) as they are (size None), or each at size (W, H), bicubic."""
    if size is None:
        return list(pictures)
    return [np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC)) for p in pictures]


def save_grid(rows, path, pad=2):
    """Rows of (H, W, 3) uint8 pictures as one picture file on white; rows may differ in length."""
    height = max(picture.shape[0] for row in rows for picture in row) + pad
    width = max(picture.shape[1] for row in rows for picture in row) + pad
    columns = max(map(len, rows))
    sheet = np.full((len(rows) * height + pad, columns * width + pad, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            top, left = pad + i * height, pad + j * width
            sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    with atomic_file(out_file(path, SUFFIXES)) as beside:
        Image.fromarray(sheet).save(beside)


def save_animation(pictures, path, seconds_per_frame=0.15):
    """Pictures as an animated GIF that repeats."""
    first, *rest = (Image.fromarray(p) for p in pictures)
    with atomic_file(path) as beside:
        first.save(beside, "GIF", save_all=True, append_images=rest, duration=int(1000 * seconds_per_frame), loop=0)
