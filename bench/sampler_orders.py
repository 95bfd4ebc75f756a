"""Makes docs/samplers.png: the paths that samplers take, and how their error falls with more steps.

    python bench/sampler_orders.py

On a line, everything is known. Pictures are numbers: -1 or +1, with spread 0.3, a mixture of two
normals. The noised densities are such mixtures too, so the best possible prediction is a formula,
and so is the exact path of a point: it keeps its quantile. tests/test_diffusion.py asserts the
orders seen here.

Left: exact paths from noise to the two modes, over the density; 8 steps of DDIM, and of
DPM-Solver++(2M). Right: the largest error three quarters of the way, against the number of steps,
of every sampler that has an order in SAMPLERS.
"""

import itertools
import math
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffusion import SAMPLERS, NoiseSchedule
from support import checkpoint

ROOT = Path(__file__).resolve().parent.parent
MEANS, SPREAD, T = torch.tensor([-1.0, 1.0], dtype=torch.float64), 0.3, 4097
# those of which the paths of this file's schedule have an order
ORDERED = [name for name, sampler in SAMPLERS.items() if sampler.order and "epsilon" in sampler.predictions]
LINE = {"num_train_timesteps": T, "beta_start": 1e-4 * 1000 / T, "beta_end": 0.02 * 1000 / T, "beta_schedule": "linear"}


def variance(a):
    return a * SPREAD**2 + 1 - a


def perfect_prediction(schedule):
    def predict(x, t):
        a = schedule.alphas_cumprod[t.round().long()].double()
        distance = x[..., None] - a.sqrt() * MEANS  # to each mode
        likely = (-(distance**2) / (2 * variance(a))).softmax(-1)
        noise = (likely * distance).sum(-1) * (1 - a).sqrt() / variance(a)  # E[ε | x] = -σ·∂log p
        return schedule.target((x - (1 - a).sqrt() * noise) / a.sqrt(), noise, t.round().long())

    return predict


def quantile(x, a):
    return torch.special.ndtr((x[..., None] - a.sqrt() * MEANS) / variance(a).sqrt()).mean(-1)


def exact(x, a_from, a_to):
    """Where the probability flow takes x, by bisection."""
    wanted, low, high = quantile(x, a_from), torch.full_like(x, -10), torch.full_like(x, 10)
    for _ in range(60):
        middle = (low + high) / 2
        below = quantile(middle, a_to) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low


def path_error(sampler, prediction_type, steps):
    """After three quarters of the way from T-1 to 0, which `steps` divides evenly; the last steps
    to no noise at all are first order in every sampler.
    """
    schedule = NoiseSchedule(**LINE, prediction_type=prediction_type, timestep_spacing="linspace")
    a = schedule.alphas_cumprod.double()
    start = torch.linspace(-2, 2, 64, dtype=torch.float64)
    times = steps if SAMPLERS[sampler].skip_last else steps + 1  # the last is t = 0
    xs = SAMPLERS[sampler](perfect_prediction(schedule), schedule, times, lambda: start)
    x = next(itertools.islice(xs, 3 * steps // 4 - 1, None))
    begin, end = a[T - 1], a[(T - 1) // 4]
    if SAMPLERS[sampler].in_sigma:  # x is x_t / √ᾱ, and starts at σ/α times the noise
        x, start = x * end.sqrt(), start * (1 - begin).sqrt()
    return (x - exact(start, begin, end)).abs().max().item()


# ---- the figure ------------------------------------------------------------------------------

SCALE, SIDE, GAP = 2, 420, 70  # drawn twice as large and shrunk: smooth lines
GREY, PALETTE = (150, 150, 150), ((214, 88, 40), (38, 110, 190), (60, 150, 80), (150, 60, 160), (190, 150, 20))
COLOURS = dict(zip(ORDERED, itertools.cycle(PALETTE), strict=False))
LABELS = {"ddim": "DDIM", "euler": "Euler", "dpmpp_2m": "DPM-Solver++(2M)"}  # any other: its name


class Panel:
    """A square of the figure with its own coordinates: x and y in the given ranges."""

    def __init__(self, draw, left, x_range, y_range, title):
        self.draw, self.left, self.x_range, self.y_range = draw, left, x_range, y_range
        self.font = ImageFont.load_default(13 * SCALE)
        self.text((0, -26), title)

    def place(self, x, y):
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        return SCALE * (self.left + SIDE * (x - x0) / (x1 - x0)), SCALE * (GAP + SIDE * (y1 - y) / (y1 - y0))

    def line(self, xs, ys, colour, width=1.5, dots=False):
        points = [self.place(x, y) for x, y in zip(xs, ys, strict=True)]
        self.draw.line(points, colour, round(width * SCALE), "curve")
        for x, y in points if dots else ():
            self.draw.ellipse((x - 3 * SCALE, y - 3 * SCALE, x + 3 * SCALE, y + 3 * SCALE), colour)

    def text(self, offset, text, colour=(40, 40, 40)):
        """At an offset in pixels from the panel's upper left corner."""
        self.draw.text((SCALE * (self.left + offset[0]), SCALE * (GAP + offset[1])), text, colour, self.font)

    def frame(self):
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        self.line([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], (40, 40, 40), 1)


def density(figure, panel, abar):
    """The density of x at every time, darker where likelier, behind the paths."""
    x = torch.linspace(*panel.y_range, SIDE, dtype=torch.float64).flip(0)[:, None, None]  # (rows, 1, 1)
    a = abar[torch.linspace(T - 1, 0, SIDE).long()][:, None]  # (columns, 1): noise on the left
    p = (-((x - a.sqrt() * MEANS) ** 2) / (2 * variance(a))).exp() / variance(a).sqrt()
    p = p.mean(-1)  # (rows, columns)
    grey = (255 - 70 * (p / p.max()).sqrt()).round().byte().numpy()
    picture = Image.fromarray(grey).convert("RGB").resize((SCALE * SIDE, SCALE * SIDE))
    figure.paste(picture, (SCALE * panel.left, SCALE * GAP))


def main():
    figure = Image.new("RGB", (SCALE * (2 * SIDE + 3 * GAP), SCALE * (SIDE + 2 * GAP)), "white")
    draw = ImageDraw.Draw(figure)
    schedule = NoiseSchedule(**LINE, timestep_spacing="linspace")
    abar, predict = schedule.alphas_cumprod.double(), perfect_prediction(schedule)

    paths = Panel(draw, GAP, (T - 1, 0), (-2.5, 2.5), "paths from noise (left) to pictures at -1 and +1; 8 steps")
    density(figure, paths, abar)
    start = torch.tensor([-1.7, -0.8, -0.25, 0.25, 0.8, 1.7], dtype=torch.float64)
    times = torch.linspace(T - 1, 0, 100).long()
    curves = torch.stack([exact(start, abar[-1], abar[t]) for t in times])  # (100, 6)
    for curve in curves.T.tolist():
        paths.line(times.tolist(), curve, GREY, 2)
    for name, steps in (("ddim", 9), ("dpmpp_2m", 8)):
        xs = [start, *SAMPLERS[name](predict, schedule, steps, lambda: start)][:9]
        times = torch.linspace(T - 1, 0, 9).tolist()
        for path in torch.stack(xs).T.tolist():
            paths.line(times, path, COLOURS[name], dots=True)
    paths.frame()

    counts = [8, 16, 32, 64, 128, 256, 512]
    x = [math.log2(n) for n in counts]
    errors = Panel(draw, SIDE + 2 * GAP, (2.7, 9.3), (-6, 0), "error against the number of steps (logarithmic)")
    for i, name in enumerate(ORDERED):
        y = [math.log10(path_error(name, "epsilon", n)) for n in counts]
        print(name, [f"{n}: {10**e:.1e}" for n, e in zip(counts, y, strict=True)])
        slope = SAMPLERS[name].order * math.log10(2)
        errors.line([x[0], x[-1]], [y[-1] + slope * (x[-1] - x[0]), y[-1]], GREY, 1)
        errors.line(x, y, COLOURS[name], 2 + 3 * (len(ORDERED) - 1 - i), dots=True)  # some fall together
        errors.text((14, SIDE - 28 - 20 * i), LABELS.get(name, name), COLOURS[name])
    errors.text((14, SIDE - 28 - 20 * len(ORDERED)), "exact, and slopes of each order", GREY)
    for n, place in zip(counts, x, strict=True):
        px, _ = errors.place(place, 0)
        errors.text((px / SCALE - errors.left - 8, SIDE + 8), str(n))
    for power in range(-6, 1):
        _, py = errors.place(0, power)
        errors.text((-46, py / SCALE - GAP - 8), f"1e{power}")
    errors.frame()

    out = ROOT / "docs" / "samplers.png"
    with checkpoint.atomic_file(out) as beside:
        figure.resize((figure.width // SCALE, figure.height // SCALE), Image.Resampling.LANCZOS).save(beside)
    print(out)


if __name__ == "__main__":
    main()
