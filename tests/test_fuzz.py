"""A short form of bench/fuzz.py: two damaged inputs at every door, and the good one."""

from processes import run


def test_damaged_inputs_are_one_line_each():
    done = run("bench/fuzz.py", "--seed", "0", "--inputs", "102")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "102 inputs at 51 doors: nothing found" in done.stdout
