"""The reports' scores, on pictures and answers small enough to work them out by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from clip_report import BagOfWords, categories, distractors, retrieval, share
from dream_report import answer, balanced, best_constant, exact, word_f1
from lvm_report import mean_and_error, mean_iou, mse, mse_in_hole, psnr
from PIL import Image
from sd_speed import letters
from unet_report import named_grid

from clip import CLIP, CLIPConfig, TextConfig, VisionConfig
from diffusion import AutoencoderKL, AutoencoderKLConfig, LatentDiffusion, NoiseSchedule, UNet, UNetConfig
from dreamllm import DreamLLM, DreamLLMConfig
from model import LLaMA, LLaMAConfig
from support.tokenizer import ADDED, byte_tokenizer


def flat(*values):
    """One 2 × 2 picture with these four grey values: (1, 2, 2, 3)."""
    return np.repeat(np.array(values, np.float64).reshape(1, 2, 2, 1), 3, axis=-1)


def test_psnr_of_a_tenth_off_everywhere_is_20_db():
    assert psnr(flat(0, 0, 0, 0), flat(25.5, 25.5, 25.5, 25.5)) == pytest.approx([20])


def test_only_the_hole_counts_in_inpainting():
    """The query is black in one pixel only; the answer is wrong by half there and by 1 elsewhere."""
    query, truth, answer = flat(0, 9, 9, 9), flat(255, 255, 255, 255), flat(127.5, 0, 0, 0)
    assert mse_in_hole(answer, truth, query) == pytest.approx([0.25])
    assert mse(answer, truth, query) == pytest.approx([(0.25 + 3) / 4])


def test_a_prompt_without_a_hole_is_left_out_of_the_mean():
    none = mse_in_hole(flat(0, 0, 0, 0), flat(9, 9, 9, 9), flat(9, 9, 9, 9))
    assert np.isnan(none).all() and mean_and_error([*none, 1.0, 3.0])["mean"] == 2


def test_mean_iou_averages_foreground_and_background():
    """Two of four pixels are foreground, the answer finds one: IoU 1/2 of the foreground, 2/3 of the background."""
    answer, truth = flat(255, 0, 0, 0), flat(255, 255, 0, 0)
    assert mean_iou(answer, truth, None) == pytest.approx([(1 / 2 + 2 / 3) / 2])
    assert mean_iou(truth, truth, None) == pytest.approx([1])


# ---- DreamLLM: bench/dream_report.py ----------------------------------------------------------


def test_word_f1_counts_words_as_often_as_they_stand():
    """Two of three said words are among four true ones: precision 2/3, recall 2/4, so F1 = 4/7."""
    assert word_f1("Red red, cat!", "red cat and dog") == pytest.approx(4 / 7)
    assert word_f1("red", "red red") == pytest.approx(2 / 3)
    assert word_f1("", "red") == 0 and word_f1("Dog, red", "red dog") == 1


def test_an_exact_match_ignores_case_and_the_space_around():
    assert exact(" Taco\n", "taco") == 1 and exact("taco.", "taco") == 0


def test_the_best_constant_answer_is_chosen_with_the_truth_in_hand():
    assert best_constant(exact, ["x", "y", "y"], ["x", "y", "z"]) == ("y", pytest.approx(2 / 3))
    # of the truths, each is right once and shares half its words with the three others; "a" has two thirds of any
    truths = ["a b", "a c", "a d", "a e"]
    assert best_constant(word_f1, truths, truths)[1] == pytest.approx((1 + 3 / 2) / 4)
    assert best_constant(word_f1, truths, [*truths, "a"]) == ("a", pytest.approx(2 / 3))


@pytest.mark.parametrize("constant", ["yes", "no", "perhaps"])
def test_a_constant_answer_is_right_half_the_time_at_best(constant):
    expected = 0 if constant == "perhaps" else 0.5
    score = balanced([constant] * 4, [constant] * 4)
    assert score["dreamllm"] == {"mean": expected, "error": 0} and score["constant"] == 0.5


def test_yes_and_no_weigh_the_same():
    """Every own name is recognised, three of four wrong ones too: 100 % and 25 %."""
    score = balanced(["yes", " Yes", "yes", "yes"], ["yes", "yes", "no", "yes"])
    assert score["dreamllm"]["mean"] == pytest.approx((1 + 0.25) / 2)
    assert (score["of_yes"]["mean"], score["of_no"]["mean"]) == (1, 0.25)


@pytest.fixture(scope="module")
def dreamer():
    """A DreamLLM of random weights: pictures of 4 patches, 2 queries, 64 tokens of context."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    tokenizer.add(ADDED)
    sizes = {"vocab_size": tokenizer.vocab_size, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
    vision = VisionConfig(width=8, layers=2, heads=2, hidden_dim=16, patch_size=4, image_size=8)
    clip = CLIP(CLIPConfig(vision=vision, text=TextConfig(width=8, layers=1, heads=2, hidden_dim=16), embed_dim=8))
    unet = UNetConfig(
        sample_size=4, block_out_channels=(8, 8), layers_per_block=1, depth=(0, 1), mid_depth=1, heads=(2, 2),
        cross_attention_dim=8, norm_num_groups=4,
    )  # fmt: skip
    vae = AutoencoderKLConfig(block_out_channels=(8, 8), norm_num_groups=4)
    diffusion = LatentDiffusion(UNet(unet), AutoencoderKL(vae), NoiseSchedule())
    llama = LLaMA(LLaMAConfig(**sizes, max_seq_len=64))
    for weight in llama.parameters():  # as they begin, they would say one byte for ever
        weight.data.mul_(10 if weight.ndim == 2 else 1)
    return DreamLLM(llama, clip, diffusion, DreamLLMConfig(queries=2), tokenizer).eval()


def test_answers_together_are_the_answers_one_by_one(dreamer):
    """Prompts of different lengths, in any order, with and without a picture."""
    draws = np.random.default_rng(0)
    pictures = [Image.fromarray(draws.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(3)]
    prompts = [[pictures[0], "who?"], ["a"], [pictures[1], "what"], [pictures[2]], ["b"]]
    options = {"max_new_tokens": 12, "max_pictures": 0, "temperature": 0}
    one_by_one = ["".join(dreamer.generate_document(prompt, **options)) for prompt in prompts]
    assert answer(dreamer, prompts, max_new_tokens=12) == one_by_one
    assert len(set(one_by_one)) > 3  # else nothing would have been compared


# ---- CLIP and what it judges ---------------------------------------------------------------------


class Colours:
    """A model that knows colours: a picture is its mean colour, a name the colour of the same name."""

    def texts(self, captions):
        return np.array([("red", "green", "blue").index(caption) == np.arange(3) for caption in captions], np.float64)

    def images(self, pictures):
        return np.stack([picture.mean((0, 1)) / 255 for picture in pictures])


def item(caption, colour, category=""):
    return SimpleNamespace(caption=caption, image=np.full((16, 16, 3), colour, np.uint8), category=category)


RED, GREEN, BLUE = (250, 0, 0), (0, 250, 0), (0, 0, 250)


def test_retrieval_counts_names_that_fit_as_well_as_the_own_one():
    """Three pictures among three names: the third is a blue "green", so that blue comes before its own name."""
    others = np.array([["green", "blue"], ["red", "blue"], ["red", "blue"]])
    found = retrieval(Colours(), [item("", c).image for c in (RED, GREEN, BLUE)], ["red", "green", "green"], others)
    assert found["R@1"]["share"] == pytest.approx(2 / 3) and found["R@5"]["share"] == 1
    tie = retrieval(Colours(), [item("", RED).image], ["red"], np.array([["red"]]))
    assert tie["R@1"]["share"] == 0, "a model that finds everything equal knows nothing"


def test_a_category_is_that_of_the_closest_name():
    """Red and green are fruit, blue is sky. The first picture's closest name is red, though fruit's mean is far off."""
    train = [item("red", RED, "fruit"), item("green", GREEN, "fruit"), item("blue", BLUE, "sky")]
    held_out = [item("", (200, 0, 170), "fruit"), item("", (0, 99, 250), "sky"), item("", GREEN, "sky")]
    assert categories(Colours(), held_out, train)["share"] == pytest.approx(2 / 3)


def test_the_other_names_never_hold_the_own_one():
    everyone = np.array([f"name {i}" for i in range(100)])
    others = distractors([item("name 3", RED), item("name 4", RED)], everyone, np.random.default_rng(0))
    assert others.shape == (2, 99) and "name 3" not in others[0] and "name 4" not in others[1]
    assert all(len(set(row)) == 99 for row in others)


def test_wilsons_interval_is_open_to_doubt_at_one():
    """10 of 10: below, n / (n + z²); and 1 of 2 as the textbook has it."""
    sure = share([True] * 10)
    assert sure["share"] == 1 and sure["low"] == pytest.approx(10 / (10 + 1.96**2)) and sure["high"] == pytest.approx(1)
    assert share([True, False])["low"] == pytest.approx(0.0945, abs=1e-3)


def test_the_bag_of_words_learns_a_colours_name():
    items = [item(f"a {name}", colour) for name, colour in (("red", RED), ("green", GREEN), ("blue", BLUE))] * 4
    bag = BagOfWords(items, strength=0.01)
    scores = bag.images([item("", (200, 30, 30)).image]) @ bag.texts(["red", "green", "blue", "unheard"]).T
    assert scores.argmax() == 0 and scores[0, 3] == 0


def test_a_named_grid_shows_what_was_drawn_beside_what_was_meant():
    drawn, real = item("", RED).image, item("", GREEN).image
    sheet = np.asarray(named_grid([("a name that is far too long for one line", drawn, real)] * 7, columns=6))
    cells = (sheet == RED).all(-1).sum(), (sheet == GREEN).all(-1).sum()
    assert cells == (7 * 256, 7 * 256) and (sheet < 100).all(-1).any(), "the pictures whole, and letters"


def test_letters_have_their_published_ids():
    """Of the true-size pipeline: CLIP's own ids, as far as they need no list of merges."""
    tokens = letters().tokenize(["Ah !"], 8)
    # h at a word's end: 256 after h; "!" is 0, and so is the padding
    assert tokens.tolist() == [[49406, 64, 327, 256, 49407, 0, 0, 0]]
    assert tokens.dtype == torch.int64 and tokens.max() < CLIPConfig.named("ViT-H/14").text.vocab_size
