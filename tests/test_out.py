"""No command deletes or replaces what it did not write, and an --out that cannot be is told before any work."""

import sys
from pathlib import Path

import pytest

import prepare
import sample
from support import checkpoint
from support.settings import UserError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
import dream_report
import lvm_report
import unet_report

NOWHERE = ["--run", "nowhere"]  # work would begin by opening it, and say so
PICTURES = {
    "show": (prepare.main, "show", "rows.jsonl"),
    "continue": (sample.main, "continue", *NOWHERE, "--prompt", "a.png"),
    "reconstruct": (sample.main, "reconstruct", *NOWHERE, "--images", "a.png"),
    "image": (sample.main, "image", *NOWHERE, "--prompt", "taco"),
    "chat": (sample.main, "chat", *NOWHERE, "--prompt", "taco"),
}
FILES = {"tokenize": (prepare.main, "tokenize", "--config", "nowhere.toml"), **PICTURES}
FOLDERS = {
    "vocabulary": (prepare.main, "vocabulary", "--config", "nowhere.toml"),
    "document": (sample.main, "document", *NOWHERE),
}
REPORTS = {
    "lvm_report": (lvm_report.main, *NOWHERE),
    "unet_report": (unet_report.main, *NOWHERE, "--clip", "nowhere"),
    "dream_report": (dream_report.main, *NOWHERE, "--clip", "nowhere", "--unet", "nowhere"),
}


def each(table):
    return pytest.mark.parametrize("command", table.values(), ids=table)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with a file of the user's, which is the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    return tmp_path / "mine"


def refused(program, command, out):
    main, *arguments = command
    code, stdout, stderr = program(main, *arguments, "--out", out)
    assert code == 2 and stderr.count("\n") == 1 and not stdout and "nowhere" not in stderr.replace(str(out), "")
    return stderr


@each(FILES)
def test_a_folder_where_a_file_is_meant_is_left_alone(command, mine, program):
    assert "is a folder" in refused(program, command, "mine")
    assert (mine / "thesis.txt").read_text() == "years of work"


@each(PICTURES)
def test_so_is_a_folder_that_is_named_like_a_picture(command, mine, program):
    folder = mine.rename(mine.with_name("dir.png"))
    assert "is a folder" in refused(program, command, "dir.png")
    assert (folder / "thesis.txt").read_text() == "years of work"


@each(FOLDERS)
def test_a_folder_that_another_wrote_is_left_alone(command, mine, program):
    assert "thesis.txt" in refused(program, command, "mine")
    assert (mine / "thesis.txt").read_text() == "years of work"


@each(FOLDERS)
def test_a_file_where_a_folder_is_meant_is_left_alone(command, mine, program):
    assert "is a file" in refused(program, command, "mine/thesis.txt")
    assert (mine / "thesis.txt").read_text() == "years of work"


@each(FILES | FOLDERS)
@pytest.mark.parametrize("out", [".", "", "mine/thesis.txt/x.png", "x" * 250 + ".png", "a\0.png", "/proc/x.png"])
def test_a_name_that_cannot_be_written_is_told_before_any_work(out, command, mine, program):
    refused(program, command, out)
    assert (mine / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    "command",
    [
        (prepare.main, "tokenize", "--config", "mine/a.png"),
        (sample.main, "continue", *NOWHERE, "--prompt", "mine/a.png"),
        (sample.main, "reconstruct", *NOWHERE, "--images", "mine/a.png"),
        (sample.main, "image", *NOWHERE, "--prompt", "taco", "--image", "mine/a.png"),
    ],
    ids=lambda command: command[1],
)
def test_what_a_command_reads_it_does_not_replace(command, mine, program):
    (mine / "a.png").write_text("a picture")
    assert "is read by this command" in refused(program, command, "mine/a.png")
    assert (mine / "a.png").read_text() == "a picture"


def test_a_link_stays_and_a_device_is_none_of_our_files(mine):
    (mine / "link").symlink_to(mine / "thesis.txt")
    checkpoint.write_text(mine / "link", "more work")
    assert (mine / "link").is_symlink() and (mine / "thesis.txt").read_text() == "more work"
    with pytest.raises(UserError, match="no regular file"):
        checkpoint.out_file("/dev/null")


def test_files_are_readable_by_whom_the_umask_lets(mine):
    checkpoint.write_tensors(mine / "x.safetensors", {})
    assert (mine / "x.safetensors").stat().st_mode & 0o777 == 0o666 & ~checkpoint.UMASK


def test_the_numbered_pictures_of_a_chat_are_looked_at_before(mine, program):
    (mine / "chat_02.png").mkdir()
    assert "chat_02.png: is a folder" in refused(program, PICTURES["chat"], "mine/chat.png")


@each(REPORTS)
def test_a_report_needs_a_folder(command, mine, program):
    assert "cannot be written" in refused(program, command, "mine/thesis.txt")
    assert (mine / "thesis.txt").read_text() == "years of work"


@each(PICTURES)
def test_a_picture_needs_a_picture_s_ending(command, mine, program):
    assert ".png" in refused(program, command, "grid.txt")


def test_a_folder_is_never_replaced_by_a_file(mine):
    with pytest.raises(UserError, match="is a folder"), checkpoint.atomic_file(mine) as beside:
        beside.write_text("x")
    assert (mine / "thesis.txt").read_text() == "years of work"
