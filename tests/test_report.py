"""The demo's scores, on pictures small enough to work them out by hand."""

import numpy as np
import pytest
from lvm_report import mean_and_error, mean_iou, mse, mse_in_hole, psnr


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
