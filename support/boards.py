"""Curves in a browser: what train.log names. Both draw the numbers of metrics.jsonl by their names, and the samples.

    "tensorboard"   files in run/tensorboard; tensorboard --logdir out shows all runs
    "wandb"         Weights & Biases; the id of its run lies in run/wandb_id, so that a resumed run draws on

Neither package is needed by anything else: each is imported here, when it is named.
"""

import os
import secrets

import numpy as np
from PIL import Image

from support import settings
from support.checkpoint import write_text
from support.settings import UserError


def open_board(name, run, first):
    """A board of the run whose folder is `run`, which goes on after step `first`; None if the name is ""."""
    try:
        return BOARDS[name](run, first) if name else None
    except ImportError:
        raise UserError(f'train.log = "{name}" needs a package that is not installed: pip install {name}') from None


class TensorBoard:
    def __init__(self, run, first):
        from torch.utils.tensorboard import SummaryWriter

        # what an interrupted run wrote of later steps is hidden: they are made again
        self.writer = SummaryWriter(run / "tensorboard", purge_step=first + 1)

    def scalars(self, step, values):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step, file):
        self.writer.add_image("samples", np.asarray(Image.open(file)), step, dataformats="HWC")

    def close(self):
        self.writer.close()


class WeightsAndBiases:
    def __init__(self, run, first):
        import wandb

        self.wandb, id_file = wandb, run / "wandb_id"
        if not id_file.exists():
            write_text(id_file, secrets.token_hex(4))
        project = os.environ.get("WANDB_PROJECT", "picturebook")
        try:
            # of steps that are made again it keeps what it was told first: the numbers are the same
            self.run = wandb.init(
                project=project, name=run.name, dir=run, id=settings.read_text(id_file), resume="allow"
            )
        except wandb.Error as error:
            raise UserError(f'train.log = "wandb": {error}') from None

    def scalars(self, step, values):
        self.run.log(values, step=step)

    def picture(self, step, file):
        self.run.log({"samples": self.wandb.Image(str(file))}, step=step)

    def close(self):
        self.run.finish()


BOARDS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
