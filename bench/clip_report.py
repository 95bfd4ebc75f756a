"""Does a small CLIP know emoji it never saw? Retrieval of their names, and their categories.

    python bench/clip_report.py --run out/emoji/clip

Two held-out sets: `combo`, whose kind of emoji was seen in other variants (another skin tone,
another gender), and `new`, whose kind was not. For each picture:

    retrieval   its own name among 100, the others chosen at random from all emoji; R@1: it comes first, R@5: among five
    category    one of ten: that of the training name that lies closest (names only: no picture serves as example)

The two baselines are chance and a bag of words: ridge regression from a 16×16 thumbnail to the
words of the name. Chance for a category is the share of the most frequent one. Every picture of
`combo` is of one category, people, so a constant answer is as good there as any; only `new`
measures categories.

Why the closest name: a category is not one direction in the space of names (its mean would lie in
the middle of "people" and "symbols" alike), but a set of them. And the closest name needs only a
model's ranking, so the rule is the same for both models and has no scale to choose, as sums of
probabilities would have for the bag of words.

In brackets: 95 % intervals (Wilson's, which hold at 0 and 1 too).
"""

import collections
import re
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clip import CLIP
from support import checkpoint, settings
from support.sources import open_source

SEED, AMONG = 0, 100


def words(caption):
    return re.findall(r"\w+", caption.lower())


class BagOfWords:
    """A linear map from small pictures to the words of their names, without their order."""

    def __init__(self, items, strength=30.0):
        known = set()
        for item in items:
            known.update(words(item.caption))
        self.vocabulary = {word: i for i, word in enumerate(sorted(known))}
        x = self.pixels([item.image for item in items])  # (N, 769)
        y = self.texts([item.caption for item in items])  # (N, V)
        self.map = np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.T @ y)  # (769, V)

    @staticmethod
    def pixels(pictures):
        small = [np.asarray(Image.fromarray(p).resize((16, 16), Image.Resampling.BOX)) for p in pictures]
        x = np.stack(small).reshape(len(small), -1) / 255 - 0.5
        return np.concatenate((x, np.ones((len(x), 1))), axis=1)

    def texts(self, captions):
        """(N, V): which words a caption has, as a vector of length 1; unknown words are left out."""
        y = np.zeros((len(captions), len(self.vocabulary)))
        for row, caption in zip(y, captions, strict=True):
            for word in words(caption):
                if word in self.vocabulary:
                    row[self.vocabulary[word]] = 1
        return y / np.linalg.norm(y, axis=1, keepdims=True).clip(1e-9)

    def images(self, pictures):
        return self.pixels(pictures) @ self.map


class Learned:
    """A CLIP with the same two functions."""

    def __init__(self, clip):
        self.clip, self.known = clip, {}

    def texts(self, captions):
        new = sorted(set(captions) - self.known.keys())  # each name is encoded once
        for i in range(0, len(new), 256):
            part = new[i : i + 256]
            self.known |= zip(part, self.clip.encode_text(self.clip.tokenize(part)).numpy(), strict=True)
        return np.stack([self.known[caption] for caption in captions])

    def images(self, pictures):
        images = self.clip.preprocess([Image.fromarray(p) for p in pictures])
        return torch.cat([self.clip.encode_image(part) for part in images.split(256)]).numpy()


def share(hits):
    """The share of hits among outcomes (N,), and its 95 % interval (Wilson 1927)."""
    n, p, z = len(hits), float(np.mean(hits)), 1.96
    centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return {"share": p, "low": (centre - half) / (1 + z * z / n), "high": (centre + half) / (1 + z * z / n)}


def shown(s):
    return f"{s['share']:.2f} [{s['low']:.2f}, {s['high']:.2f}]"


def distractors(items, names, rng):
    """For each item 99 other names (N, 99), among which its own must be found."""
    return np.stack([rng.choice(names[names != item.caption], AMONG - 1, replace=False) for item in items])


def retrieval(model, pictures, captions, others):
    """How often a picture's own caption comes first, or among the first five, of itself and
    `others` (N, 99).
    """
    names, index = np.unique(np.column_stack((captions, others)), return_inverse=True)
    scores = model.images(pictures) @ model.texts(list(names)).T  # (N, names)
    scores = np.take_along_axis(scores, index.reshape(len(captions), -1), axis=1)  # (N, 100), its own name first
    better = (scores[:, 1:] >= scores[:, :1]).sum(1)  # a tie is no hit
    return {"R@1": share(better < 1), "R@5": share(better < 5)}


def categories(model, items, train):
    """How often the training name closest to a picture is of the picture's own category."""
    names = model.texts([item.caption for item in train])  # (N, E)
    closest = (model.images([item.image for item in items]) @ names.T).argmax(1)
    return share([train[i].category == item.category for i, item in zip(closest, items, strict=True)])


@torch.inference_mode()
def main():
    parser = settings.Parser(prog="python bench/clip_report.py", description=__doc__)
    parser.add_argument("--run", required=True, help="a trained CLIP's folder")
    run = parser.parse_args().run
    clip = CLIP.from_pretrained(run, dtype=torch.float32)
    side = clip.config.vision.image_size
    train = list(open_source("emoji", side, "train"))
    splits = {split: list(open_source("emoji", side, split)) for split in ("combo", "new")}
    names = np.array(sorted({item.caption for item in (*train, *splits["combo"], *splits["new"])}))
    models = {"clip": Learned(clip), "bag_of_words": BagOfWords(train)}
    rng, report = np.random.default_rng(SEED), {}
    for split, items in splits.items():
        others = distractors(items, names, rng)
        pictures, captions = [item.image for item in items], [item.caption for item in items]
        commonest, count = collections.Counter(item.category for item in items).most_common(1)[0]
        scores = {}
        for name, model in models.items():
            found = retrieval(model, pictures, captions, others)
            scores[name] = found | {"category": categories(model, items, train)}
        scores["chance"] = {"R@1": 1 / AMONG, "R@5": 5 / AMONG, "category": count / len(items)}
        report[split] = scores | {"pictures": len(items), "commonest_category": commonest}

        print(f"\n{split}, {len(items)} pictures".ljust(27) + "clip                bag of words        chance")
        for measure, chance in scores["chance"].items():
            row = "".join(f"{shown(scores[name][measure]):20}" for name in models)
            print(f"  {measure:24}{row}{chance:.2f}")
        print(f'  (always "{commonest}": {count} of {len(items)})')
    checkpoint.write_json(Path(run) / "report.json", report)


if __name__ == "__main__":
    settings.run_main(main)
