"""What sample.py promises: a window that slides as published, only image codes, files of the size asked for.

Most tests prompt a toy: random weights, 8×8 pictures of 2×2 codes, a context of 4 pictures.
"""

import json
import math
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from conftest import ROOT, run_tiny
from PIL import Image
from torch import nn

import prepare
import sample
from lvm import LVM
from model import LLaMA, LLaMAConfig
from support import checkpoint, pictures
from support.pages import plain
from support.pictures import load_picture
from support.settings import UserError
from support.tokenizer import Tokenizer
from vqgan import VQGAN, VQGANConfig

CODES, SPARE = 16, 4  # image codes, and ids beyond them


def toy(max_seq_len=16):
    torch.manual_seed(0)
    shape = {"hidden_channels": 32, "channel_mult": (1, 1, 1), "num_res_blocks": 1, "z_channels": 4}
    tokenizer = VQGAN(VQGANConfig(resolution=8, num_embeddings=CODES, quantized_embed_dim=4, **shape)).eval()
    nn.init.normal_(tokenizer.quantize.embedding.weight)
    llama = LLaMA(LLaMAConfig(CODES + SPARE, 16, 2, 2, hidden_dim=32, max_seq_len=max_seq_len)).eval()
    with torch.no_grad():  # louder than at the start of a training, so that the prompt decides what follows
        for weight in llama.parameters():
            weight.mul_(15 if weight.ndim == 2 else 1)
        # what every next token would be, were all ids allowed: a spare one
        llama.lm_head.weight[CODES:] *= 50
    return LVM(llama, tokenizer)


@pytest.fixture(scope="module")
def lvm():
    return toy()


@pytest.fixture(scope="module")
def folders(lvm, tmp_path_factory):
    """--run and --tokenizer: the toy as two published folders, which say nothing of each other."""
    folder = tmp_path_factory.mktemp("toy")
    lvm.llama.save_pretrained(folder / "llama")
    lvm.tokenizer.save_pretrained(folder / "vqgan")
    return ["--run", folder / "llama", "--tokenizer", folder / "vqgan", "--device", "cpu"]


@pytest.fixture(scope="module")
def prompt(pictures):
    return sorted(pictures.iterdir())[:3]


def tokens(batch, count, seed=0):
    """(B, N, h·w) codes of `count` pictures."""
    return torch.randint(0, CODES, (batch, count, 4), generator=torch.Generator().manual_seed(seed))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def size(path):
    with Image.open(path) as image:
        return image.size


def sheet(columns, rows, width=8, height=8):
    """The size of a grid of pictures with 2 pixels around each."""
    return columns * (width + 2) + 2, rows * (height + 2) + 2


# ---- continuing ------------------------------------------------------------------------------


def by_hand(lvm, context, pictures):
    """Greedily, `pictures` more after context (B, N, 4), in one call of the language model."""
    drawn = lvm.llama.generate(context.flatten(1), 4 * pictures, temperature=0, allowed=list(range(CODES)))
    return drawn[:, -4 * pictures :].view(len(context), pictures, 4)


def test_what_fits_the_context_is_drawn_in_one_go(lvm):
    assert lvm.pictures_in_context == 4 and lvm.codes_per_picture == 4
    given = tokens(2, 1)
    for frames in (1, 2, 3):
        assert torch.equal(lvm.continue_tokens(given, frames, temperature=0), by_hand(lvm, given, frames))


@pytest.mark.parametrize("given", [1, 2, 3])
def test_beyond_the_context_each_picture_follows_from_the_last_three(lvm, given):
    """window - given at once, then one at a time from the newest window - 1, as LVM does."""
    sentence = tokens(2, given)
    sentence = torch.cat((sentence, by_hand(lvm, sentence, 4 - given)), dim=1)
    for _ in range(3):
        sentence = torch.cat((sentence, by_hand(lvm, sentence[:, -3:], 1)), dim=1)
    frames = 4 - given + 3
    assert torch.equal(lvm.continue_tokens(tokens(2, given), frames, temperature=0), sentence[:, given:])


def test_of_a_long_prompt_only_the_last_three_pictures_count(lvm):
    given = tokens(2, 7)
    found = lvm.continue_tokens(given, 2, temperature=0)
    assert torch.equal(found, lvm.continue_tokens(given[:, -3:], 2, temperature=0))
    assert not torch.equal(found, lvm.continue_tokens(given[:, :3], 2, temperature=0))


def test_only_image_codes_are_drawn(lvm):
    """The toy would always say a spare id, which no tokenizer could decode."""
    free = lvm.llama.generate(tokens(2, 1).flatten(1), 12, generator=seeded())[:, 4:]
    assert (free >= CODES).any()
    assert (lvm.continue_tokens(tokens(2, 1), 6, generator=seeded()) < CODES).all()


@torch.no_grad()
def test_pictures_go_in_and_out_in_bytes(lvm):
    given = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    codes = lvm.encode(given)
    assert codes.shape == (2, 4) and lvm.decode(codes).shape == (2, 8, 8, 3)
    images = lvm.tokenizer.decode(codes.view(2, 2, 2))
    expected = (images * 255).round().permute(0, 2, 3, 1).numpy().astype(np.uint8)
    assert np.array_equal(lvm.decode(codes), expected)
    drawn = lvm.continue_pictures(given, frames=3, candidates=5, generator=seeded())
    assert drawn.shape == (5, 3, 8, 8, 3) and drawn.dtype == np.uint8


def test_candidates_differ_and_a_seed_repeats(lvm):
    given = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    a, b, c = (lvm.continue_pictures(given, 3, 4, generator=seeded(seed)) for seed in (1, 1, 2))
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    assert len({candidate.tobytes() for candidate in a}) == 4


def test_candidates_share_one_pass_over_the_prompt_and_change_nothing(lvm):
    """generate(samples=K) is K prompts that are equal, read once."""
    tokens = torch.randint(0, CODES, (2, 6), generator=seeded(0))
    apart = lvm.llama.generate(tokens.repeat_interleave(3, 0), 5, generator=seeded(1))
    together = lvm.llama.generate(tokens, 5, samples=3, generator=seeded(1))
    assert torch.equal(apart, together)


def test_a_tokenizer_that_does_not_fit_is_refused(lvm):
    assert toy(max_seq_len=8).pictures_in_context == 2  # one picture to look at, one to draw
    with pytest.raises(UserError, match=r"two pictures of 4 codes do not fit .* context of 7"):
        toy(max_seq_len=7)
    small = LLaMA(LLaMAConfig(CODES - 1, 16, 1, 2, hidden_dim=32, max_seq_len=16))
    with pytest.raises(UserError, match="16 codes, the LLaMA only 15 tokens"):
        LVM(small, lvm.tokenizer)


def test_a_tokenizer_stored_in_half_precision_works(lvm, folders, tmp_path, prompt, program):
    """Published folders are often float16; the language model has its own dtype."""
    VQGAN.from_pretrained(folders[3], dtype=torch.float16).save_pretrained(tmp_path / "half")
    out = tmp_path / "grid.png"
    arguments = [*folders[:2], "--tokenizer", tmp_path / "half", "--device", "cpu"]
    code, _, err = program(sample.main, "continue", *arguments, "--prompt", *prompt, "--out", out)
    assert code == 0 and size(out) == sheet(4, 1), err


# ---- python sample.py continue ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("resize", "width", "height"), [("", 8, 8), ("original", 48, 40), ("20,10", 20, 10)]
)  # the prompt's pictures are 48×40
def test_the_grid_has_a_row_for_each_candidate(folders, prompt, tmp_path, program, resize, width, height):
    """Columns: the prompt, then the new frames."""
    out = tmp_path / "deep" / "grid.png"
    options = ["--frames", 2, "--candidates", 3, "--out", out, *(["--resize", resize] if resize else [])]
    code, text, _ = program(sample.main, "continue", *folders, "--prompt", *prompt, *options)
    assert code == 0 and "3 prompt pictures, then 2 new ones; 3 candidates" in text
    assert size(out) == sheet(5, 3, width, height)


def test_the_prompt_stands_in_front_of_the_grid(folders, prompt, tmp_path, program, lvm):
    out = tmp_path / "grid.png"
    program(sample.main, "continue", *folders, "--prompt", *prompt, "--out", out, "--temperature", 0)
    grid = np.asarray(Image.open(out))
    given = np.stack([load_picture(path, 8) for path in prompt])
    answer = lvm.continue_pictures(given, 1, temperature=0)[0]
    for i, picture in enumerate([*given, *answer]):
        assert np.array_equal(grid[2:10, 2 + 10 * i : 10 + 10 * i], picture)


def test_the_same_seed_writes_the_same_file(folders, prompt, tmp_path, program):
    written = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2), ("d", None), ("e", None)):
        out = tmp_path / f"{name}.png"
        options = ["--frames", 4, "--out", out, *(["--seed", seed] if seed else [])]
        assert program(sample.main, "continue", *folders, "--prompt", *prompt, *options)[0] == 0
        written.append(out.read_bytes())
    a, b, c, d, e = written
    assert a == b and len({a, c, d, e}) == 4


def test_a_gif_shows_the_prompt_and_every_new_frame(folders, prompt, tmp_path, program):
    out = tmp_path / "x.gif"
    options = ["--frames", 4, "--candidates", 2, "--resize", "20,10", "--seed", 0, "--out", out]
    assert program(sample.main, "continue", *folders, "--prompt", *prompt, *options)[0] == 0
    with Image.open(out) as clip:
        assert (clip.n_frames, clip.size, clip.info["loop"]) == (7, (20, 10), 0)


def test_equal_frames_of_a_gif_take_as_long_as_different_ones(tmp_path):
    """Pillow joins equal neighbours to one frame; the time on the screen must stay the same."""
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    pictures.save_animation([black, black, white, white, black], tmp_path / "x.gif", 0.1)
    with Image.open(tmp_path / "x.gif") as clip:
        total = 0
        for frame in range(clip.n_frames):
            clip.seek(frame)
            total += clip.info["duration"]
    assert total == 500


def test_a_run_knows_its_tokenizer(lvm_run, prompt, tmp_path, program):
    """Our run's config.toml names it; its newest step alone finds it too. 8×8 codes, 4 pictures to a context."""
    for run in (lvm_run, lvm_run / "latest", lvm_run / "step_00000012" / "ema"):
        out = tmp_path / "grid.png"
        code, _, err = program(
            sample.main, "continue", "--run", run, "--device", "cpu", "--prompt", *prompt, "--out", out
        )
        assert code == 0 and size(out) == sheet(4, 1, 32, 32), err
        out.unlink()


# ---- mistakes --------------------------------------------------------------------------------


def one_line(result):
    code, out, err = result
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_a_published_folder_needs_a_tokenizer_named(folders, prompt, program):
    result = program(sample.main, "continue", *folders[:2], "--prompt", *prompt)
    assert "name a VQGAN with --tokenizer" in one_line(result)


@pytest.mark.parametrize("option", ["--run", "--tokenizer", "--prompt"])
def test_a_path_that_is_not_there_is_named(folders, prompt, program, tmp_path, option):
    arguments = [*folders, "--prompt", *prompt, "--out", tmp_path / "x.png"]
    arguments[arguments.index(option) + 1] = tmp_path / "absent"
    message = one_line(program(sample.main, "continue", *arguments))
    assert f"{tmp_path / 'absent'}: no such file" in message


def test_a_run_that_is_not_there_is_not_said_to_lack_a_tokenizer(prompt, program, tmp_path):
    message = one_line(program(sample.main, "continue", "--run", tmp_path / "absent", "--prompt", *prompt))
    assert f"{tmp_path / 'absent'}: no such file or folder" in message


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--resize", "big"], "argument --resize: 'big' is not original or W,H, as in 128,128"),
        (["--resize", "0,5"], "argument --resize: '0,5' is not original or W,H, as in 128,128"),
        (["--resize", "1,2,3"], "argument --resize: '1,2,3' is not original or W,H, as in 128,128"),
        (["--frames", "0"], "argument --frames: '0' is not a whole number above 0"),
        (["--candidates", "two"], "argument --candidates: 'two' is not a whole number above 0"),
        (["--dtype", "int4"], "argument --dtype: invalid choice: 'int4'"),
        (["--out", "grid.txt"], "grid.txt: a picture's name must end in"),
    ],
)
def test_a_wrong_option_is_one_line(folders, prompt, program, options, expected):
    assert expected in one_line(program(sample.main, "continue", *folders, "--prompt", *prompt, *options))


def test_a_llama_given_as_the_tokenizer_is_one_line(folders, prompt, program):
    arguments = ["--run", folders[1], "--tokenizer", folders[1]]
    message = one_line(program(sample.main, "continue", *arguments, "--prompt", *prompt))
    assert f"{folders[1]}: holds a LLaMA, but a VQGAN is wanted" in message


@pytest.fixture(scope="session")
def one_of_each(tokenizer_run, lvm_run, dream_run, dream_parts):
    """Runs and published folders: what a folder holds → the folder."""
    parts = {name: Path(path) for name, path in (part.split("=") for part in dream_parts)}
    return {
        "a VQGAN": tokenizer_run,
        "a LLaMA": lvm_run,
        "a DreamLLM": dream_run,
        "a CLIP vision tower": parts["model.clip"],
        "a latent diffusion pipeline": parts["model.diffusion"],
        "a U-Net of latent diffusion": parts["model.diffusion"] / "unet",
        "an autoencoder of latent diffusion": parts["model.diffusion"] / "vae",
    }


TAKES = {  # arguments of a command: what it can be given as --run
    "continue --prompt x.png": ["a LLaMA"],
    "batch --input rows.jsonl": ["a LLaMA"],
    "reconstruct --images x.png": ["a VQGAN"],
    "text": ["a LLaMA"],
    "image --prompt x": ["a latent diffusion pipeline", "a DreamLLM"],
    "chat --prompt x": ["a DreamLLM"],
    "document": ["a DreamLLM"],
    "perplexity --input rows.jsonl": ["a LLaMA"],
    "perplexity --input x.txt": ["a LLaMA"],
}


@pytest.mark.parametrize("command", TAKES)
def test_a_model_of_another_kind_is_refused_by_name(command, one_of_each, tmp_path, monkeypatch, program):
    """One line says what --run holds and what the command wants, whether it is a run or a published folder."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", [{"input": ["x.png"], "target": ["x.png"], "output": "y.png"}])
    (tmp_path / "x.txt").write_text("abc")
    Image.new("RGB", (8, 8)).save("x.png")
    for held, folder in one_of_each.items():
        if held not in TAKES[command]:
            message = one_line(program(sample.main, *command.split(), "--run", folder, "--device", "cpu"))
            assert f"{folder}: holds {held}, but {' or '.join(TAKES[command])} is wanted" in message


def test_a_run_on_pictures_has_no_text(lvm_run, program):
    message = one_line(program(sample.main, "text", "--run", lvm_run, "--device", "cpu"))
    assert f"{lvm_run} is a run on pictures: use sample.py continue" in message


@pytest.mark.parametrize("command", [(), *((name,) for name in sample.COMMANDS)])
def test_help_is_help(program, command):
    """Each says what it does and gives an example."""
    code, out, err = program(sample.main, *command, "--help")
    assert code == 0 and err == "" and f"python sample.py {' '.join(command)}" in out


# ---- python sample.py batch ------------------------------------------------------------------


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_batch_writes_each_rows_new_frames(folders, prompt, tmp_path, program):
    """LVM's format; a grid of new frames only: rows are candidates, 4 unless told, columns frames."""
    rows = [{"input": [str(p) for p in prompt[: n + 1]], "output": str(tmp_path / "deep" / f"{n}.png")} for n in (0, 1)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    code, out, _ = program(sample.main, "batch", *folders, "--input", file, "--frames", 2, "--seed", 0)
    assert code == 0 and out == "2 of 2 prompts done\n"
    for row in rows:
        assert size(row["output"]) == sheet(2, 4)
    first = open(rows[0]["output"], "rb").read()
    program(sample.main, "batch", *folders, "--input", file, "--frames", 2, "--seed", 0)
    assert open(rows[0]["output"], "rb").read() == first
    options = ["--candidates", 1, "--resize", "original"]
    assert program(sample.main, "batch", *folders, "--input", file, *options)[0] == 0
    assert size(rows[1]["output"]) == sheet(1, 1, 48, 40)


def test_a_broken_row_is_named_and_the_others_are_done(folders, prompt, tmp_path):
    """As a shell sees it: the line's number on stderr, a count at the end, exit code 2."""
    good, broken = str(prompt[0]), tmp_path / "broken.png"
    broken.write_bytes(prompt[0].read_bytes()[:60])
    inputs = [[good], [good, str(broken)], [str(tmp_path / "absent.png")], [good]]
    rows = [{"input": paths, "output": str(tmp_path / f"{n}.png")} for n, paths in enumerate(inputs, 1)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    done = processes.run("sample.py", "batch", *folders, "--input", file)
    assert done.returncode == 2 and done.stdout == "2 of 4 prompts done\n"
    second, third, last = done.stderr.splitlines()
    assert second.startswith(f"{file}:2: {broken}: ") and third == f"{file}:3: {tmp_path / 'absent.png'}: no such file"
    assert last == "error: 2 of 4 prompts failed, named above"
    assert [path.name for path in sorted(tmp_path.glob("?.png"))] == ["1.png", "4.png"]


@pytest.mark.parametrize(
    "line",
    ["nonsense", '{"input": []}', '{"input": [1], "output": "x.png"}', '{"input": [], "output": "x.png"}', "[1]"],
)
def test_a_line_that_is_no_prompt_is_named_before_anything_is_drawn(folders, prompt, tmp_path, program, line):
    row = json.dumps({"input": [str(prompt[0])], "output": str(tmp_path / "x.png")})
    (tmp_path / "rows.jsonl").write_text(f"{row}\n\n{line}\n")
    message = one_line(program(sample.main, "batch", *folders, "--input", tmp_path / "rows.jsonl"))
    assert message.startswith(f"error: {tmp_path / 'rows.jsonl'}:3: expected") and not (tmp_path / "x.png").exists()


def test_outputs_that_cannot_be_written_are_named_before_the_model_is_opened(tmp_path, program, folders, prompt):
    """The other rows are done all the same."""
    (tmp_path / "folder.png").mkdir()
    names = ("x.txt", "folder.png", "good.png")
    rows = [{"input": [str(prompt[0])], "output": str(tmp_path / name)} for name in names]
    file = write_rows(tmp_path / "bad.jsonl", rows[:2])
    code, out, err = program(sample.main, "batch", "--run", tmp_path / "absent", "--input", file)
    assert (code, out) == (2, "0 of 2 prompts done\n") and "absent" not in err
    assert "bad.jsonl:1: " in err and "must end in one of" in err and "bad.jsonl:2: " in err and "is a folder" in err
    file = write_rows(tmp_path / "rows.jsonl", rows)
    code, out, err = program(sample.main, "batch", *folders, "--input", file)
    assert (code, out) == (2, "1 of 3 prompts done\n") and (tmp_path / "good.png").exists(), err


def test_a_line_of_rows_ends_at_a_line_feed_only(tmp_path):
    """A path may hold what Python's splitlines takes for an end, as JSON may."""
    row = {"input": ["a\u2028b.png"], "output": "x\x85.png"}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row, ensure_ascii=False)}\r\n", encoding="utf-8")
    assert sample.read_rows(tmp_path / "rows.jsonl", "output", many=False) == [(1, row)]


# ---- python sample.py reconstruct ------------------------------------------------------------


def test_originals_stand_above_reconstructions(folders, prompt, tmp_path, program, lvm):
    out = tmp_path / "grid.png"
    arguments = ["--run", folders[3], "--device", "cpu", "--images", *prompt, "--out", out]
    code, text, _ = program(sample.main, "reconstruct", *arguments)
    assert code == 0 and text.count("4 codes") == len(text.splitlines()) == 3
    assert size(out) == sheet(3, 2)
    grid = np.asarray(Image.open(out))
    given = np.stack([load_picture(path, 8) for path in prompt])
    decoded = lvm.decode(lvm.encode(given))
    for i in range(3):
        assert np.array_equal(grid[2:10, 2 + 10 * i : 10 + 10 * i], given[i])
        assert np.array_equal(grid[12:20, 2 + 10 * i : 10 + 10 * i], decoded[i])
        error = ((decoded[i] / 255.0 - given[i] / 255.0) ** 2).mean()
        assert f"{prompt[i]}: 4 codes, " in text
        shown = float(text.splitlines()[i].split(", ")[1].removesuffix(" dB"))
        assert shown == pytest.approx(-10 * np.log10(error), abs=0.1)  # shown to 0.1, from unrounded pixels


# ---- python sample.py text -------------------------------------------------------------------

LETTERS = Tokenizer.from_pretrained("bytes")


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A toy that writes bytes, and where it is: (LLaMA, folder). It has four ids more than there are tokens."""
    torch.manual_seed(0)
    llama = LLaMA(LLaMAConfig(LETTERS.vocab_size + 4, 16, 2, 2, hidden_dim=32, max_seq_len=32)).eval()
    with torch.no_grad():
        for weight in llama.parameters():
            weight.mul_(10 if weight.ndim == 2 else 1)
        llama.lm_head.weight[LETTERS.vocab_size :] *= 50  # what it would always say, were it allowed to
    folder = tmp_path_factory.mktemp("writer")
    llama.save_pretrained(folder)
    return llama, folder


def write(program, folder, *options):
    """What `sample.py text` prints, with the byte tokenizer."""
    code, out, err = program(sample.main, "text", "--run", folder, "--tokenizer", "bytes", "--device", "cpu", *options)
    assert code == 0, err
    return out


def speaking(llama, *ids):
    """A copy of the LLaMA that says nothing but these ids whatever it reads, each e^½ times as often as the next."""
    copy = LLaMA(llama.config).eval()
    with torch.no_grad():
        copy.embed_tokens.weight[:] = 1.0
        h = copy.hidden(copy.embed_tokens(torch.zeros(1, 1, dtype=torch.long)))[0, 0]  # (D,), the same at all places
        copy.lm_head.weight.zero_()
        for place, i in enumerate(ids):
            copy.lm_head.weight[i] = h / h.norm() ** 2 * (40 - place / 2)  # its logit: all others' are 0
    return copy


def test_what_is_streamed_is_what_is_generated(writer):
    """generate() is stream() gathered; each step gives a column."""
    llama, _ = writer
    tokens = torch.randint(0, 256, (2, 5), generator=seeded(0))
    columns = list(llama.stream(tokens, 6, samples=2, generator=seeded(1)))
    assert [tuple(new.shape) for new in columns] == [(4, 1)] * 6
    whole = llama.generate(tokens, 6, samples=2, generator=seeded(1))
    assert torch.equal(whole, torch.cat((tokens.repeat_interleave(2, 0), *columns), dim=1))


def test_a_text_is_its_prompt_and_what_the_model_says(writer, program):
    """Ids beyond the tokenizer's are never drawn; a seed repeats, another does not."""
    llama, folder = writer
    first, again, other = (write(program, folder, "--prompt", "ab", "--max-new", 9, "--seed", n) for n in (1, 1, 2))
    assert first == again != other
    prompt = torch.tensor([LETTERS.encode("ab", bos=True)])
    drawn = llama.generate(prompt, 9, allowed=range(LETTERS.vocab_size), generator=seeded(1))[0].tolist()
    assert first == plain(LETTERS.decode(drawn)) + "\n"  # what would steer a terminal is not printed


def test_a_text_ends_where_the_model_says_so_or_its_context(writer, program, tmp_path):
    """An end token is not shown; without one the context of 32 is filled: begin, "ab", 29 letters."""
    speaking(writer[0], LETTERS.eos).save_pretrained(tmp_path / "silent")
    speaking(writer[0], ord("z")).save_pretrained(tmp_path / "sleepy")
    assert write(program, tmp_path / "silent", "--prompt", "ab", "--temperature", 0) == "ab\n"
    assert write(program, tmp_path / "sleepy", "--prompt", "ab", "--temperature", 0) == "ab" + 29 * "z" + "\n"
    assert write(program, tmp_path / "sleepy", "--prompt", "ab", "--temperature", 0, "--max-new", 3) == "abzzz\n"


def test_a_chat_shows_the_answer_alone(writer, program, tmp_path):
    """The question stands in its template; the answer's first space is the template's, so to speak."""
    llama = speaking(writer[0], ord(" "), ord("!"))
    llama.save_pretrained(tmp_path)
    options = ["--prompt", "Hi", "--chat", "plain", "--system", "Be kind.", "--max-new", 9]
    shown = write(program, tmp_path, *options, "--seed", 3)
    ids = LETTERS.encode("Be kind.\nHi", bos=True)
    drawn = llama.generate(torch.tensor([ids]), 9, allowed=range(LETTERS.vocab_size), generator=seeded(3))
    answer = LETTERS.decode(drawn[0, len(ids) :].tolist())
    assert answer[0] == " " and "!" in answer and shown == answer.lstrip() + "\n"


def test_a_prompt_that_cannot_be_is_one_line(writer, program, folders):
    _, folder = writer
    common = ["text", "--run", folder, "--device", "cpu", "--tokenizer"]
    assert "no tokenizer in this folder" in one_line(program(sample.main, *common, folder, "--prompt", "a"))
    assert "--system needs --chat" in one_line(program(sample.main, *common, "bytes", "--system", "a"))
    message = one_line(program(sample.main, *common, "bytes", "--prompt", "a" * 31))
    assert "the prompt's 32 tokens fill the model's context of 32" in message
    pair = ["--run", folders[1], "--tokenizer", "bytes"]
    message = one_line(program(sample.main, "text", *pair, "--device", "cpu"))
    assert "no row for the token <|begin_of_text|>: its id is 256, and 20 rows are all" in message


def test_a_run_on_text_from_its_words_to_its_samples(program, tmp_path):
    """configs/tiny_text.toml as its comment says, cut short. The run remembers its tokenizer."""
    config = ROOT / "configs" / "tiny_text.toml"
    overrides = [f'data.rows=["{tmp_path}/train.jsonl"]', f'data.held_out=["{tmp_path}/held_out.jsonl"]']
    for split in ("train", "held_out"):
        arguments = ["tokenize", "--config", config, "--out", tmp_path / f"{split}.jsonl", "--split", split]
        assert program(prepare.main, *arguments)[0] == 0
    run = run_tiny("text", tmp_path / "run", "train.steps=30", "train.eval_batches=1", *overrides)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["held_out_perplexity"] < 40  # of 258
    saved = json.loads((checkpoint.weights_folder(run) / "config.json").read_text())
    assert (saved["bos_token_id"], saved["eos_token_id"]) == (256, 257)
    assert Tokenizer.from_pretrained(run).encode("a") == [97]  # the run is a folder that holds both
    arguments = ["--run", run, "--prompt", "woman ", "--max-new", 5, "--seed", 0, "--device", "cpu"]
    code, out, err = program(sample.main, "text", *arguments)
    assert code == 0 and out.startswith("woman "), err
    (tmp_path / "x.txt").write_text("woman firefighter, dark skin tone")
    code, out, err = program(sample.main, "perplexity", "--run", run, "--input", tmp_path / "x.txt", "--device", "cpu")
    assert code == 0 and "(33 tokens" in out, err


# ---- python sample.py perplexity -------------------------------------------------------------


def by_definition(llama, tokens, place, seen):
    """−log p of tokens[place], with the `seen` tokens before it known."""
    return -llama(tokens[None, place - seen : place])[0, -1].log_softmax(-1)[tokens[place]].item()


@torch.no_grad()
@pytest.mark.parametrize("length", [2, 20, 33, 34, 70])
def test_every_token_of_a_long_text_counts_once(writer, length):
    """A window of 32: 32 tokens at once, then 16 by 16. The slow twin asks for each token by itself."""
    llama, _ = writer
    tokens = torch.randint(0, 256, (length,), generator=seeded(length))
    losses = sample.text_negative_log_likelihood(llama, tokens, 32)
    ends = [min(33 + 16 * i, length) for i in range(9)]  # where windows end
    starts = [max(0, end - 33) for end in ends]
    window = [next(i for i, end in enumerate(ends) if place < end) for place in range(length)]
    expected = [by_definition(llama, tokens, p, p - starts[window[p]]) for p in range(1, length)]
    assert losses.tolist() == pytest.approx(expected, abs=1e-4)


def test_the_perplexity_of_a_text_is_counted_in_tokens_and_bytes(writer, program, tmp_path):
    """One that says a or b, e^½ : 1, has the perplexity of that coin; an id is a byte."""
    speaking(writer[0], ord("a"), ord("b")).save_pretrained(tmp_path / "coin")
    (tmp_path / "x.txt").write_text("ab" * 40)
    options = ["--run", tmp_path / "coin", "--tokenizer", "bytes", "--device", "cpu", "--input", tmp_path / "x.txt"]
    code, out, err = program(sample.main, "perplexity", *options)
    p = 1 / (1 + math.exp(-0.5))
    bits = -(math.log2(p) + math.log2(1 - p)) / 2
    shown = f"perplexity {2**bits:.4g} a token, {bits:.4f} bits a byte (80 tokens, seen through a window of 32)"
    assert (code, out) == (0, f"{tmp_path / 'x.txt'}: {shown}\n"), err


@torch.no_grad()
def test_perplexity_of_pictures_follows_lvms_protocol(lvm, folders, prompt, tmp_path, program):
    """exp(mean −log p of the target's codes) for each row; then the mean of that over rows."""
    a, b, c = (str(path) for path in prompt)
    rows = [{"input": [a, b], "target": [c]}, {"input": [a], "target": [b, c]}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    values = []
    for row in rows:
        given = np.stack([load_picture(path, 8) for path in row["input"] + row["target"]])
        tokens = lvm.encode(given).flatten()
        places = range(4 * len(row["input"]), 12)
        values.append(math.exp(np.mean([by_definition(lvm.llama, tokens, p, p) for p in places])))
    code, out, err = program(sample.main, "perplexity", *folders, "--input", file)
    assert code == 0, err
    assert float(out.split("perplexity ")[1].split()[0]) == pytest.approx(np.mean(values), rel=1e-3)
    assert "the mean of 2 rows" in out


def test_what_has_no_perplexity_is_one_line(folders, writer, prompt, tmp_path, program):
    """More pictures than the context holds, a row without a target, a file that is not there."""
    common = ["perplexity", *folders, "--input"]
    file = write_rows(tmp_path / "long.jsonl", [{"input": [str(prompt[0])] * 4, "target": [str(prompt[1])]}])
    code, _, err = program(sample.main, *common, file)
    assert code == 2 and "long.jsonl:1: 5 pictures; the model's context holds 4" in err
    file = write_rows(tmp_path / "half.jsonl", [{"input": [str(prompt[0])]}])
    expected = 'half.jsonl:1: expected {"input": [picture paths], "target": [picture paths]}'
    assert expected in one_line(program(sample.main, *common, file))
    absent = ["perplexity", "--run", writer[1], "--tokenizer", "bytes", "--input", tmp_path / "absent.txt"]
    assert "absent.txt" in one_line(program(sample.main, *absent))
