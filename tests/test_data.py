"""What data.py promises: splits that leak nothing, sentences laid out as stated, rows byte for byte, and
batches that are pure functions of their numbers. Each test is one promise."""

import base64
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from data import CaptionRows, DataSettings, HeldOutPictures, PictureRows, Sentences, SourceSettings, TokenRows
from support import pictures, settings, sources
from support.chance import shuffled
from support.settings import UserError
from support.sources import open_source
from support.threads import prefetch
from support.token_rows import decode_row, encode_row

ROOT = Path(__file__).resolve().parent.parent
SIDE = 16


@pytest.fixture(scope="module")
def emoji():
    return open_source("emoji", SIDE, "combo")


def picture(seed=0, side=SIDE):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def png(seed=0):
    file = io.BytesIO()
    picture(seed).save(file, "png")
    return file.getvalue()


def folder_of(path, names, seed=0):
    for i, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed + i).save(path / name)
    return str(path)


def tar_of(path, members):
    with tarfile.open(path, "w") as archive:
        for name, payload in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
    return str(path)


# ---- splits and sources ------------------------------------------------------------------------


def test_the_emoji_split_leaks_no_group():
    """`new` shares no group with training; every `combo` picture's group is trained on, in other variants."""
    names = {split: [item.name for item in open_source("emoji", SIDE, split)] for split in sources.SPLITS}
    groups = {split: {sources.emoji_group(name) for name in names[split]} for split in names}
    assert not groups["new"] & (groups["train"] | groups["combo"])
    assert groups["combo"] <= groups["train"]
    assert sorted(names["held_out"]) == sorted(names["new"] + names["combo"])
    assert len(names["train"]) + len(names["held_out"]) == len({*names["train"], *names["held_out"]}) == 4009
    assert all(50 < len(names[split]) < 400 for split in ("new", "combo"))


def test_a_group_is_what_is_shown_whoever_does_it():
    """Skin, hair, gender and man/woman/person make variants; two flags stay two groups."""
    firefighters = ["1f9d1-200d-1f692", "1f468-200d-1f692", "1f469-1f3ff-200d-1f692"]
    assert {sources.emoji_group(code) for code in firefighters} == {"1f9d1-1f692"}
    assert sources.emoji_group("1f3c3-1f3fb-200d-2640-fe0f") == sources.emoji_group("1f3c3")
    assert sources.emoji_group("1f1eb-1f1f7") != sources.emoji_group("1f1e9-1f1ea")


def test_variants_have_compositional_captions():
    """The caption names who, what and the skin tone: the file name's parts in words."""
    captions = {
        item.name: item.caption for split in ("train", "held_out") for item in open_source("emoji", SIDE, split)
    }
    assert captions["1f469-1f3ff-200d-1f692"] == "woman firefighter, dark skin tone"
    assert captions["1f32e"] == "taco"
    assert all(captions.values())


def test_the_mask_is_the_alpha_and_the_ground_is_white(emoji):
    """Where the mask is black the picture is white, and nowhere is transparency left."""
    for item in list(emoji)[:10]:
        assert item.image.shape == (SIDE, SIDE, 3) and item.image.dtype == np.uint8
        assert (item.image[item.picture("mask") == 0] >= 254).all()


def test_folder_gives_captions_categories_annotations_and_clips(tmp_path):
    """Files beside a picture belong to it: text, sidecars; folders of frames and of views are one item."""
    folder_of(tmp_path, ["cats/a.png", "cats/a.depth.png", "b.jpg", "b.depth.png"])
    folder_of(
        tmp_path,
        [f"run.frames/{i}.png" for i in range(12)] + [f"run.frames/{i}.depth.png" for i in range(12)],
    )
    (tmp_path / "cats/a.txt").write_text("a cat\n")
    (tmp_path / "captions.jsonl").write_text(json.dumps({"file": "b.jpg", "caption": "a bee"}) + "\nbroken\n")
    source = open_source(str(tmp_path), SIDE, held_out_fraction=0)
    items = {item.name: item for item in source}
    assert set(items) == {"cats/a.png", "b.jpg", "run.frames"}
    assert (items["cats/a.png"].caption, items["cats/a.png"].category) == ("a cat", "cats")
    assert (items["b.jpg"].caption, items["b.jpg"].category) == ("a bee", "")
    assert source.skipped == 1  # the broken line of captions.jsonl
    assert source.offers == {"image", "grey", "edges", "depth", "category", "frames"}
    clip = items["run.frames"]
    assert clip.frames == 12
    expected = np.array(Image.open(tmp_path / "run.frames/10.png"))  # the eleventh: 10 comes after 9, not after 1
    assert (clip.picture("image", 10) == expected).all()


def test_an_animated_gif_is_a_clip(tmp_path):
    """Each frame of an animation is a frame of the clip."""
    frames = [Image.new("RGB", (20, 20), (40 * i, 0, 0)) for i in range(6)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:])
    sentences = Sentences(open_source(str(tmp_path), SIDE, held_out_fraction=0), "video", pictures=3)
    reds = np.stack(sentences.sentence(0))[:, 0, 0, 0].astype(int)
    assert sentences.source[0].frames == 6
    assert reds[1] - reds[0] == reds[2] - reds[1] == 80  # 3 of 6 frames: the stride shrinks from 8 to 2


def test_a_tar_is_read_like_a_folder(tmp_path):
    """The members KEY.png, KEY.txt, KEY.mask.png of a WebDataset shard make one item."""
    for shard in range(2):
        members = {f"{i}.png": png(i) for i in range(3)} | {f"{i}.mask.png": png(9) for i in range(3)}
        tar_of(tmp_path / f"s{shard}.tar", {**members, "1.txt": b"one", "2.json": b'{"caption": "two"}'})
    source = open_source(str(tmp_path / "s*.tar"), SIDE, held_out_fraction=0)
    assert len(source) == 6 and "mask" in source.offers
    assert (source[0].image == np.array(picture(0))).all()
    assert [item.caption for item in source] == ["", "one", "two"] * 2


def test_held_out_pictures_depend_on_their_names_only(tmp_path):
    """Adding pictures to a folder moves none from one split to the other."""
    names = [f"{i}.png" for i in range(40)]
    path = folder_of(tmp_path, names[:20])
    before = {item.name for item in open_source(path, SIDE, "held_out", 0.3)}
    folder_of(tmp_path, names)
    train, held_out = ({item.name for item in open_source(path, SIDE, split, 0.3)} for split in ("train", "held_out"))
    assert before == held_out & set(names[:20]) and before
    assert not train & held_out and len(train | held_out) == 40


# ---- what is broken ------------------------------------------------------------------------------


def test_a_broken_picture_is_named_skipped_and_replaced(tmp_path, capsys):
    """Its neighbour stands in, in picture and annotation alike; one line on stderr, counted once."""
    path = folder_of(tmp_path, [f"{i}.png" for i in range(4)] + [f"{i}.mask.png" for i in range(4)])
    (tmp_path / "2.mask.png").write_bytes(b"\x89PNG not really")
    source = open_source(path, SIDE, held_out_fraction=0)
    sentences = Sentences(source, "paired", ("mask",), 8)
    shown = np.stack(sentences.sentence(0))
    pairs = {(shown[i].tobytes(), shown[i + 1].tobytes()) for i in range(0, 8, 2)}
    assert pairs == {(source[i].image.tobytes(), source[i].picture("mask").tobytes()) for i in (0, 1, 3)}
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "2.mask.png" in lines[0] and source.skipped == 1


def test_a_truncated_tar_gives_what_is_before_the_break(tmp_path, capsys):
    """Half a shard is half a shard of pictures and one line; a file that is no tar is refused."""
    path = Path(tar_of(tmp_path / "a.tar", {f"{i}.png": png(i) for i in range(4)}))
    path.write_bytes(path.read_bytes()[: 3 * 1536 + 600])
    source = open_source(str(path), SIDE, held_out_fraction=0)
    assert 1 <= len(source) < 4 and source[0].image.any()
    assert "truncated" in capsys.readouterr().err
    path.write_bytes(b"not a tar at all" * 100)
    with pytest.raises(UserError, match=r"a\.tar"):
        open_source(str(path), SIDE)


def test_a_named_picture_that_cannot_be_read_is_refused(tmp_path):
    """load_picture serves prompts: a wrong file is the user's to mend, in a line that names it."""
    with pytest.raises(UserError, match=r"absent\.png: no such file"):
        pictures.load_picture(tmp_path / "absent.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(UserError, match=r"text\.png: not a picture"):
        pictures.load_picture(tmp_path / "text.png")
    cut = png()[:200]
    with pytest.raises(UserError, match="cut"):
        pictures.load_picture(cut, name="cut")


def test_pictures_are_cropped_to_the_middle_square_on_white(tmp_path):
    """Transparent becomes white; a wide picture loses its sides, or is squeezed when asked."""
    wide = np.zeros((8, 24, 4), np.uint8)
    wide[:, :8, 0], wide[:, :8, 3] = 255, 255  # a red left third, the rest transparent black
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert pictures.load_picture(tmp_path / "wide.png").shape == (8, 24, 3)
    assert (pictures.load_picture(tmp_path / "wide.png", 8) == 255).all()
    assert tuple(pictures.load_picture(tmp_path / "wide.png", 8, resize="stretch")[0, 0]) == (255, 0, 0)


def test_a_16_bit_depth_map_keeps_its_range(tmp_path):
    """65535 is white and 0 black: not everything above 255 clipped."""
    Image.fromarray(np.array([[0, 32768, 65535]], np.uint16)).save(tmp_path / "d.png")
    assert pictures.load_picture(tmp_path / "d.png")[0, :, 0].tolist() == [0, 127, 255]


# ---- visual sentences ------------------------------------------------------------------------------


def test_every_kind_holds_the_stated_number_of_pictures(emoji, tmp_path):
    """The ten kinds at N = 8: pairs, shots and blocks multiply out as the paper's table says."""
    views = [f"{o}.views/{i}{m}.png" for o in range(4) for i in range(3) for m in ("", ".mask")]
    objects = open_source(folder_of(tmp_path, views), SIDE, held_out_fraction=0)
    three = ("image", "mask", "grey")
    modalities = {"paired": ("mask",), "multimodal": three, "multisequence": three}
    expected = {"multimodal": 6, "multisequence": 2 * 3 * 8, "object3d": 4 * (2 + 2)}
    for kind in data.KINDS:
        source = {"object3d": objects, "category": open_source("emoji", SIDE, "new")}.get(kind, emoji)
        sentences = Sentences(source, kind, modalities.get(kind, ()), 8)
        shown = np.stack(sentences.sentence(len(sentences) - 1))
        assert shown.shape == (expected.get(kind, 8), SIDE, SIDE, 3), kind


def test_paired_and_colorization_put_the_annotation_in_its_place(emoji):
    """(picture, mask) and (grey, colour); one modality in a sentence, perhaps another in the next."""
    stills = {item.image.tobytes(): item for item in emoji}
    sentences = Sentences(emoji, "paired", ("mask", "edges"), 4)
    used = set()
    for index in range(8):
        shown = np.stack(sentences.sentence(index))
        pairs = list(zip(shown[::2], shown[1::2], strict=True))
        fits = [m for m in ("mask", "edges") if all((stills[a.tobytes()].picture(m) == b).all() for a, b in pairs)]
        assert len(fits) == 1
        used.update(fits)
    assert used == {"mask", "edges"}
    for a, b in np.split(np.stack(Sentences(emoji, "colorization", (), 4).sentence(0)), 2):
        assert (a == pictures.grey(b)).all()
        assert (a[..., 0] == np.rint(b @ [0.2989, 0.5870, 0.1140])).all()


def test_a_hole_hides_and_never_repaints(emoji):
    """The masked picture is the whole one, or black."""
    for masked, whole in np.split(np.stack(Sentences(emoji, "inpainting", (), 8).sentence(3)), 4):
        assert ((masked == whole) | (masked == 0)).all()


@pytest.mark.parametrize("side", [256, 64])
def test_hole_sizes_scale_with_the_picture(side):
    """Three in ten are one square of side 25..128 (of 256); the others are patches of 32 (of 256)."""
    white, squares = np.full((side, side, 3), 255, np.uint8), []
    patch = 32 * side // 256
    for seed in range(300):
        hole = data.punch_hole(white, np.random.default_rng(seed))[..., 0] == 0
        patches = hole.reshape(side // patch, patch, side // patch, patch)
        if (patches.any((1, 3)) == patches.all((1, 3))).all():
            continue  # whole patches only
        rows, columns = np.flatnonzero(hole.any(1)), np.flatnonzero(hole.any(0))
        assert hole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all() and len(rows) == len(columns)
        squares.append(len(rows))
    assert 0.2 < len(squares) / 300 < 0.4
    assert round(25 * side / 256) <= min(squares) < max(squares) <= side // 2


def test_a_multimodal_sentence_keeps_one_order(emoji):
    """Every shot lists the modalities in the same order; other sentences have others."""
    stills = {item.picture(m).tobytes(): m for item in emoji for m in ("image", "mask", "grey")}
    sentences = Sentences(emoji, "multimodal", ("image", "mask", "grey"), 9)
    orders = set()
    for index in range(6):
        kinds = [stills[shown.tobytes()] for shown in np.stack(sentences.sentence(index))]
        assert kinds[:3] == kinds[3:6] == kinds[6:] and len(set(kinds)) == 3
        orders.add(tuple(kinds[:3]))
    assert len(orders) > 1


def test_a_category_sentence_has_four_categories_in_blocks(tmp_path):
    """4 × N/4 pictures, each block of one category, and a pass uses every picture of unequal categories."""
    names = [f"c{c}/{i}.png" for c, count in enumerate((5, 2, 3, 7, 1)) for i in range(count)]
    source = open_source(folder_of(tmp_path, names), SIDE, held_out_fraction=0)
    category = {item.image.tobytes(): item.category for item in source}
    sentences, seen = Sentences(source, "category", (), 8), set()
    for index in range(len(sentences)):
        shown = [p.tobytes() for p in np.stack(sentences.sentence(index))]
        blocks = [{category[p] for p in shown[i : i + 2]} for i in range(0, 8, 2)]
        assert all(len(block) == 1 for block in blocks) and len(set.union(*blocks)) == 4
        seen |= set(shown)
    assert seen == set(category)


@pytest.mark.parametrize("kind, stride", [("video", {8}), ("sequence", {1, 2, 3, 4})])
def test_frames_are_evenly_apart(tmp_path, kind, stride):
    """Eight frames of one clip: 8 apart for video, 1 to 4 apart for an image sequence."""
    (tmp_path / "c.frames").mkdir()
    for t in range(100):  # a frame's brightness is its number
        Image.new("RGB", (SIDE, SIDE), (t, t, t)).save(tmp_path / f"c.frames/{t:03}.png")
    sentences = Sentences(open_source(str(tmp_path), SIDE, held_out_fraction=0), kind, (), 8)
    steps, starts = set(), set()
    for index in range(20):
        times = np.stack(sentences.sentence(index))[:, 0, 0, 0].astype(int)
        assert len(set(np.diff(times))) == 1
        steps.add(int(times[1] - times[0]))
        starts.add(int(times[0]))
    assert steps == stride and len(starts) > 5


def test_a_multisequence_is_blocks_or_interleaved(emoji):
    """Two clips × tasks × frames, in both arrangements; masks are the black-and-white ones."""
    sentences = Sentences(emoji, "multisequence", ("image", "mask"), 4)
    layouts = set()
    for index in range(12):
        shown = np.stack(sentences.sentence(index))
        layouts.add("".join("m" if (p[0, 0] == 0).all() else "i" for p in shown))
    assert {"iiiimmmmiiiimmmm", "mmmmiiiimmmmiiii"} & layouts and {
        "imimimimimimimim",
        "mimimimimimimimi",
    } & layouts


def test_motion_is_steady_and_the_mask_moves_along():
    """A slide's centre moves equally far each frame until it bounces; what is drawn lies inside the mask."""
    dot, mask = np.full((64, 64, 3), 255, np.uint8), np.zeros((64, 64, 3), np.uint8)
    dot[16:48, 16:48], mask[16:48, 16:48] = 0, 255
    motion = np.array([(0.5, 0, -0.2, 0), (0, 0, 0.005, 0)])
    centres = []
    for t in range(0, 80, 8):
        shown, masked = pictures.motion_frame(dot, motion, t), pictures.motion_frame(mask, motion, t, background=0)
        assert np.abs(shown.astype(int) + masked - 255).max() <= 2
        centres.append(np.average(np.arange(64) + 0.5, weights=masked[32, :, 0].astype(float)))
    assert np.allclose(np.diff(centres), 0.005 * 64 * 8, atol=0.1)
    assert pictures._bounce(0.3, -0.25, 0.25) == pytest.approx(0.2)


def test_every_picture_appears_in_every_pass(emoji):
    """A pass is a permutation cut into sentences; the next pass permutes anew."""
    sentences = Sentences(emoji, "image", (), 16)
    everything = {item.image.tobytes() for item in emoji}
    passes = [
        [np.stack(sentences.sentence(p * len(sentences) + i)).tobytes() for i in range(len(sentences))] for p in (0, 1)
    ]
    size = SIDE * SIDE * 3
    for shown in passes:
        assert {s[i : i + size] for s in shown for i in range(0, len(s), size)} == everything
    assert passes[0] != passes[1]


def test_the_same_seed_gives_the_same_bytes(emoji):
    """Sentences are functions of (seed, index): opened again they are equal, another seed differs."""
    for kind, modalities in (("inpainting", ()), ("video", ()), ("multisequence", ("image", "mask"))):
        one, two, other = (Sentences(emoji, kind, modalities, 4, seed=seed) for seed in (1, 1, 2))
        assert np.stack(two.sentence(7)).tobytes() == np.stack(one.sentence(7)).tobytes()
        assert np.stack(other.sentence(7)).tobytes() != np.stack(one.sentence(7)).tobytes()
        number, k = divmod(2, one.pictures_per_item)
        assert (one.picture(7, number, k) == one.sentence(7)[2]).all()  # one picture without the others


@pytest.mark.parametrize(
    "kind, modalities, pictures, says",
    [
        ("pairs", (), 8, 'unknown kind "pairs" of visual sentence: one of image, paired'),
        ("paired", ("depth",), 8, "depth of every item; it offers .*mask"),
        ("paired", (), 8, "1 modalities or more"),
        ("paired", ("mask",), 7, "multiple of 2"),
        ("object3d", (), 6, "objects"),
        ("category", (), 8, "4 categories"),
        ("multimodal", ("image", "mask", "grey"), 2, "3 or more"),
        ("video", (), 200, "clips of 200 frames or more"),
        ("object3d", (), 8, "objects with 2 views"),
    ],
)
def test_what_a_source_cannot_serve_is_refused_in_one_line(emoji, kind, modalities, pictures, says):
    """The refusal comes when Sentences is made, and says what is missing."""
    with pytest.raises(UserError, match=says) as error:
        Sentences(emoji, kind, modalities, pictures)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path, split", [("/no/such/folder", "train"), ("emoji", "test"), (str(ROOT), "new")])
def test_an_unknown_source_or_split_is_refused(path, split):
    """A wrong path or split is one line as well."""
    with pytest.raises(UserError):
        open_source(path, SIDE, split)


def test_settings_refuse_what_does_not_fit_together():
    """Checked across fields, before anything is opened."""
    for wrong in ({"rows": ("a", "b"), "weights": (1.0,)}, {"side": 0}, {"held_out_fraction": 1.0}):
        with pytest.raises(ValueError):
            DataSettings(**wrong)
    with pytest.raises(ValueError, match="did you mean"):
        SourceSettings(kind="vidoe")


@pytest.mark.parametrize("cls", [DataSettings, SourceSettings])
def test_a_wrong_value_is_one_line_that_names_its_key(cls):
    """Every field, whatever stands in it: it is taken, or refused by name."""
    values = [0, -1, 2**40, 1e300, float("nan"), None, [], [1], {}, "x", True, 1.5, ["a"], [float("inf")]]
    for field in dataclasses.fields(cls):
        for value in values:
            try:
                settings.build(cls, {field.name: value}, "data")
            except UserError as error:
                assert field.name in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("wrong", [{"side": 2**15}, {"pictures": 0}, {"pictures": 2**17}, {"workers": 5000}])
def test_numbers_that_no_machine_can_serve_are_refused(wrong):
    with pytest.raises(UserError, match=f"{next(iter(wrong))} .* must be at (least|most)"):
        settings.build(DataSettings, wrong, "data")


def test_a_kind_of_sentence_is_known_as_a_whole():
    """What a kind must have cannot be left out: forgetting how its pictures are made stops the import."""
    with pytest.raises(TypeError, match="frames"):
        data.Kind("N pictures, some day", lambda n, m: (n, 1))


def test_a_new_kind_is_one_row_of_the_table(emoji, monkeypatch):
    """Bright → dark, as a reader would add it: a function that says what an item gives, and a row."""

    def darker(item, n, modalities, shared, own):
        return [data.Frame("image"), data.Frame("image", change=lambda picture, rng: picture // 2)]

    kind = data.Kind("(bright, dark) × N/2", lambda n, m: (n // 2, 2), darker, divisor=2)
    monkeypatch.setitem(data.KINDS, "dark", kind)
    rows = PictureRows(DataSettings(side=SIDE, pictures=4, sources=(SourceSettings(kind="dark"),)), 0)
    assert rows.batch(0, range(4)).shape == (4, SIDE, SIDE, 3)
    bright, dark = np.stack(Sentences(emoji, "dark", (), 4).sentence(0)).reshape(2, 2, SIDE, SIDE, 3).swapaxes(0, 1)
    assert (bright // 2 == dark).all()


# ---- batches of pictures -----------------------------------------------------------------------


def test_picture_rows_are_functions_of_their_numbers():
    """The slices that ranks take, laid together, are the whole batch; another number is another batch."""
    sources = (SourceSettings(kind="paired", modalities=("mask",)), SourceSettings(kind="video"))
    rows = PictureRows(DataSettings(side=SIDE, pictures=4, sources=sources), seed=5)
    whole = rows.batch(3, range(8))
    assert whole.shape == (8, SIDE, SIDE, 3) and whole.dtype == np.uint8
    assert (np.concatenate([rows.batch(3, range(5)), rows.batch(3, range(5, 8))]) == whole).all()
    assert (rows.batch(4, range(8)) != whole).any()


def test_picture_rows_respect_the_weights(tmp_path):
    """Of black and white pictures weighted 3 : 1, three in four drawn are black."""
    for name, colour in (("black", 0), ("white", 255)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4), (colour,) * 3).save(tmp_path / name / "a.png")
    sources = tuple(SourceSettings(str(tmp_path / n), weight=w) for n, w in (("black", 3.0), ("white", 1.0)))
    rows = PictureRows(DataSettings(side=4, pictures=1, sources=sources, held_out_fraction=0), 0)
    assert 0.68 < (rows.batch(0, range(800)) == 0).mean() < 0.82


def test_a_text_source_is_no_source_of_pictures():
    with pytest.raises(UserError, match="kind text has no pictures"):
        PictureRows(DataSettings(side=SIDE, sources=(SourceSettings("emoji", "text"),)), seed=0)


def test_held_out_pictures_are_fixed_and_held_out():
    """What a tokenizer is judged by is none of what it is trained on."""
    settings = DataSettings(side=SIDE, sources=(SourceSettings("emoji"),))
    shown = HeldOutPictures(settings).take(5)
    held_out = {item.image.tobytes() for item in open_source("emoji", SIDE, "held_out")}
    train = {item.image.tobytes() for item in open_source("emoji", SIDE, "train")}
    assert shown.shape == (5, SIDE, SIDE, 3)
    assert {picture.tobytes() for picture in shown} <= held_out - train


def test_a_set_without_held_out_pictures_says_so_when_it_is_opened(tmp_path):
    """A run can then say so, once, before its first step, and go on."""
    settings = DataSettings(side=SIDE, sources=(SourceSettings(folder_of(tmp_path, ["a.png"])),))
    with pytest.raises(UserError, match="none of its 1 pictures falls into the held_out split"):
        HeldOutPictures(settings)


def test_a_broken_held_out_picture_is_replaced_by_its_neighbour(tmp_path):
    path = folder_of(tmp_path, [f"{i}.png" for i in range(40)])
    settings = DataSettings(side=SIDE, sources=(SourceSettings(path),), held_out_fraction=0.3)
    items = list(open_source(path, SIDE, "held_out", 0.3))
    (tmp_path / items[0].name).write_bytes(b"broken")
    assert np.array_equal(HeldOutPictures(settings).take(1)[0], items[1].image)


# ---- rows of tokens --------------------------------------------------------------------------------


def rows_file(path, rows):
    path.write_text("".join(map(encode_row, rows)))
    return str(path)


def some_rows(count=7, seed=0):
    """Rows of different lengths whose tokens tell where they come from: 100·row + place."""
    lengths = np.random.default_rng(seed).integers(1, 12, count)
    return [100 * row + np.arange(length) for row, length in enumerate(lengths)]


def test_a_row_is_lvms_format_byte_for_byte():
    """One JSON object, base64 of little-endian int32, a newline; and back."""
    codes = np.array([0, 1, 8191, 70000])
    payload = base64.b64encode(b"".join(int(c).to_bytes(4, "little") for c in codes)).decode()
    assert encode_row(codes) == json.dumps({"tokens": payload}) + "\n"
    assert decode_row(encode_row(codes)).tolist() == codes.tolist()
    assert decode_row(encode_row(codes)).dtype == np.int32


@pytest.mark.parametrize("B, S", [(1, 5), (2, 3), (3, 8), (2, 64)])
def test_packing_equals_the_buffer_that_lvm_keeps(tmp_path, B, S):
    """A slow twin: pour the epochs' rows into a buffer; while it holds B·S + 1 tokens, emit B·S of them."""
    rows = some_rows()
    reader = TokenRows([rows_file(tmp_path / "r.jsonl", rows)], S, B, seed=3)
    assert reader.tokens == sum(map(len, rows))
    expected, buffer, epoch = [], [], 0
    while len(expected) < 6:
        for row in shuffled("epoch of rows", (3,), len(rows), np.arange(7) + 7 * epoch):
            buffer += rows[row].tolist()
            while len(buffer) >= B * S + 1:
                expected.append((buffer[: B * S], buffer[1 : B * S + 1]))
                buffer = buffer[B * S :]
        epoch += 1
    for m in (0, 1, 2, 3, 4, 5, 2):  # the last: back to any microstep, as a resumed run does
        inputs, targets = reader.batch(m, range(B))
        assert inputs.shape == targets.shape == (B, S) and inputs.dtype == np.int64
        assert (inputs.ravel().tolist(), targets.ravel().tolist()) == expected[m]


@pytest.mark.parametrize("weights", [(), (1.0, 2.0)])
def test_a_resumed_run_reads_on_where_it_was(tmp_path, weights):
    """A reader opened afresh gives microstep 50 at once, and equal to one that went there step by step."""
    paths = [rows_file(tmp_path / f"{i}.jsonl", some_rows(5 + i, i)) for i in range(2)]
    walked, fresh = (TokenRows(paths, 6, 2, seed=1, weights=weights) for _ in range(2))
    batches = [walked.batch(m, range(2)) for m in range(51)]
    assert (np.array(fresh.batch(50, range(2))) == np.array(batches[50])).all()
    assert (np.array(fresh.batch(7, range(2))) == np.array(batches[7])).all()
    stream = np.concatenate([inputs.ravel() for inputs, _ in batches])
    assert (np.concatenate([targets.ravel() for _, targets in batches])[:-1] == stream[1:]).all()


def test_the_ranks_slices_make_the_batch(tmp_path):
    """Any number of ranks sees the same rows."""
    reader = TokenRows([rows_file(tmp_path / "r.jsonl", some_rows())], 5, 6, seed=0)
    whole = np.array(reader.batch(4, range(6)))  # (2, 6, 5)
    for ranks in (2, 3):
        parts = [reader.batch(4, range(r * 6 // ranks, (r + 1) * 6 // ranks)) for r in range(ranks)]
        assert (np.concatenate([np.array(part) for part in parts], axis=1) == whole).all()


def test_one_stream_of_permutations_serves_all():
    """Any stretch of it can be had alone, each pass holds all items once, and another key gives another order."""
    whole = shuffled("a", (1, 2), 7, range(21))
    assert [sorted(part) for part in np.split(whole, 3)] == [list(range(7))] * 3
    assert shuffled("a", (1, 2), 7, [20, 3, 3]).tolist() == whole[[20, 3, 3]].tolist()
    others = shuffled("b", (1, 2), 7, range(21)), shuffled("a", (1, 3), 7, range(21))
    assert not any(np.array_equal(whole, other) for other in others) and len(shuffled("a", (1, 2), 7, [])) == 0


def test_an_epoch_is_a_permutation_of_all_rows(tmp_path):
    """Proportional mixing: every token once an epoch, in another order in the next and with another seed."""
    paths = [rows_file(tmp_path / f"{i}.jsonl", some_rows(6, i)) for i in range(2)]
    reader, other = (TokenRows(paths, 1, 1, seed) for seed in (0, 1))
    first, second = reader.stream(0, reader.tokens), reader.stream(reader.tokens, reader.tokens)
    expected = np.sort(np.concatenate([*some_rows(6, 0), *some_rows(6, 1)]))
    assert (np.sort(first) == expected).all() and (np.sort(second) == expected).all()
    assert (first != second).any() and (first != other.stream(0, reader.tokens)).any()


def test_weights_decide_how_many_rows_each_file_gives(tmp_path):
    """20 rows at 3 : 1 are 15 + 5 an epoch, and a file's own rows are used equally often."""
    paths = [rows_file(tmp_path / f"{i}.jsonl", [[10 * i + j] for j in range(10)]) for i in range(2)]
    reader = TokenRows(paths, 1, 1, seed=0, weights=(3.0, 1.0))
    for epoch in range(4):
        assert (reader.stream(20 * epoch, 20) < 10).sum() == 15
    counts = np.bincount(reader.stream(0, 40), minlength=20)  # two epochs: 30 rows of one, 10 of the other
    assert counts.tolist() == [3] * 10 + [1] * 10


def test_held_out_rows_stay_in_order(tmp_path):
    """shuffle=False reads the files as they lie, around and around."""
    reader = TokenRows([rows_file(tmp_path / "r.jsonl", [[1, 2], [3]])], 4, 1, seed=0, shuffle=False)
    assert [part.tolist() for part in reader.batch(0, range(1))] == [[[1, 2, 3, 1]], [[2, 3, 1, 2]]]


def test_broken_rows_are_named_counted_and_left_out(tmp_path, capsys):
    """Bad JSON, bad base64, half a code, a code outside the codebook: a line each; the rest is read.

    An empty line is no row.
    """
    good = encode_row([5, 6])
    half = json.dumps({"tokens": base64.b64encode(b"12345").decode()}) + "\n"
    broken = ["{oops\n", '{"tokens": "a*b"}\n', half, encode_row([8]), encode_row([-1]), "\n"]
    (tmp_path / "r.jsonl").write_text(good + "".join(broken) + good)
    reader = TokenRows([tmp_path / "r.jsonl"], 4, 1, seed=0, vocab_size=8)
    assert reader.skipped == 5 and reader.tokens == 4
    assert reader.batch(0, range(1))[0].tolist() == [[5, 6, 5, 6]]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[0].rsplit(":")[-1] for line in lines] == ["2", "3", "4", "5", "6"]
    assert "base64" in lines[1] and "vocabulary of 8" in lines[3]
    with pytest.raises(UserError, match="no readable rows"):
        (tmp_path / "none.jsonl").write_text("")
        TokenRows([tmp_path / "none.jsonl"], 4, 1, seed=0)


def test_prefetch_keeps_the_order_and_raises_what_went_wrong():
    """Threads run ahead, results come in order, and an exception is not lost."""
    assert list(prefetch(lambda i: i * i, range(50), workers=3)) == [i * i for i in range(50)]
    results = prefetch(lambda i: 1 // (3 - i), range(9), workers=2)
    assert [next(results) for _ in range(3)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_a_grid_is_written_whole(tmp_path):
    """Rows of different lengths on white; nothing else is left in the folder."""
    black = np.zeros((4, 4, 3), np.uint8)
    pictures.save_grid([[black, black, black], [black]], tmp_path / "new" / "grid.png", pad=1)
    sheet = np.array(Image.open(tmp_path / "new" / "grid.png"))
    assert sheet.shape == (11, 16, 3) and (sheet == 0).all(-1).sum() == 4 * 16
    assert os.listdir(tmp_path / "new") == ["grid.png"]


def test_data_is_importable_without_torch():
    """The JAX trainer reads it on machines that have no torch."""
    code = "import sys; sys.modules['torch'] = None; import data, documents; print(data.DataSettings().side)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "256\n"


def test_rows_may_be_named_by_a_pattern(tmp_path):
    """Shards of a tokenization are one entry of data.rows."""
    for shard in range(3):
        (tmp_path / f"rows-{shard}.jsonl").write_text(encode_row(np.full(8, shard)))
    rows = TokenRows((str(tmp_path / "rows-*.jsonl"),), 4, 2, seed=0)
    assert rows.tokens == 24 and set(rows.stream(0, 24)) == {0, 1, 2}


# ---- captioned pictures ----------------------------------------------------------------------


def captions(path="emoji", side=SIDE, split="train", **source):
    return CaptionRows(DataSettings(side=side, sources=(SourceSettings(path, **source),)), 8, 0, split)


def test_every_captioned_picture_comes_once_in_a_pass_in_another_order_each(pictures, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    for file in sorted(folder.glob("*.png"))[:10]:
        file.with_suffix(".txt").write_text(f"number {file.stem}")
    settings = DataSettings(side=SIDE, sources=(SourceSettings(str(folder)),), held_out_fraction=0)
    rows = CaptionRows(settings, 8, 0)
    first, second = ([rows.pair(n * 10 + i)[1] for i in range(10)] for n in (0, 1))
    assert sorted(first) == sorted(second) == [f"number {i:02d}" for i in range(10)] and first != second
    broken = folder / "03.png"
    broken.write_bytes(broken.read_bytes()[:50])
    assert "number 03" not in {CaptionRows(settings, 8, 0).pair(i)[1] for i in range(10)}


def test_a_batch_of_captions_is_the_same_however_it_is_cut():
    """And moved pictures are a function of their place, too."""
    rows = captions(move=True)
    whole, halves = rows.batch(3, range(8)), [rows.batch(3, range(4)), rows.batch(3, range(4, 8))]
    assert np.array_equal(whole[0], np.concatenate([half[0] for half in halves]))
    assert whole[1] == halves[0][1] + halves[1][1]
    still = captions().batch(3, range(8))
    assert still[1] == whole[1] and not np.array_equal(still[0], whole[0])


def test_pictures_without_captions_are_refused(pictures):
    with pytest.raises(UserError, match=r"no captions"):
        captions(str(pictures))
