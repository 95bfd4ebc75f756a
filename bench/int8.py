"""What do 8-bit weights cost? The held-out perplexity of one LLaMA at four precisions, and the memory it takes.

python bench/int8.py --run out/demo/lvm --rows out/demo/held_out.jsonl
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import LLaMA
from support import settings
from support.token_rows import decode_row


@torch.inference_mode()
def mean_loss(model, rows):
    """Of the next token, over rows (N, T) of held-out tokens."""
    losses = []
    for batch in rows.split(16):
        logits = model(batch[:, :-1]).float()
        losses.append(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none"))
    return torch.cat(losses).mean()


def main():
    parser = settings.Parser(prog="python bench/int8.py", description=__doc__)
    parser.add_argument("--run", required=True, help="a trained LLaMA")
    parser.add_argument("--rows", required=True, help="held-out rows that its tokenizer made")
    parser.add_argument("--count", type=int, default=256, help="how many of them (256)")
    a = parser.parse_args()
    with open(a.rows) as file:
        codes = [decode_row(line) for line, _ in zip(file, range(a.count), strict=False)]
    length = min(len(row) for row in codes)
    rows = torch.tensor([row[:length].tolist() for row in codes])  # (N, T)
    exact = None
    for dtype in (torch.float32, torch.bfloat16, torch.float16, "int8"):
        model = LLaMA.from_pretrained(a.run, dtype=dtype)
        size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        perplexity = mean_loss(model, rows).exp().item()
        exact = exact or perplexity
        name = str(dtype).removeprefix("torch.")
        print(f"{name:10}{size / 1e6:8.1f} MB   perplexity {perplexity:8.3f}   {perplexity / exact - 1:+.3%}")


if __name__ == "__main__":
    settings.run_main(main)
