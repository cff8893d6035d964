"""nGPT in a training loop of your own: `python examples/own_loop.py --steps 200`, on the text that ships with spherelm.

Nothing here belongs to spherelm's trainer. Any torch optimizer does, and one line keeps the weights on the sphere.
"""

from __future__ import annotations

import argparse

import torch

from spherelm import attach_retraction, build, departure, recipe
from spherelm.data.corpus import shipped_directory
from spherelm.data.loader import Loader
from spherelm.data.shards import open_tokens


def main() -> None:
    """Train a small nGPT and say how the loss falls and how far the weights are from the sphere."""
    parser = argparse.ArgumentParser(description="Train a small nGPT with torch's AdamW.")
    parser.add_argument("--steps", type=int, default=200, help="optimizer updates (default: 200)")
    steps = parser.parse_args().steps

    torch.manual_seed(0)
    text = open_tokens(shipped_directory(), "train")
    loader = Loader(text, seq_len=128, batch_size=8, seed=0)
    # From a size and a length to initial values that suit them (docs/tutorials/layers-in-your-model.md).
    size = {"d_model": 128, "n_layers": 4, "n_heads": 2, "vocab_size": text.vocab_size}
    run = recipe("ngpt", **size, seq_len=128, batch_size=8, steps=steps)
    model = build(run.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    attach_retraction(optimizer, model)  # unit weights now and after every step
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)

    for step in range(steps):
        tokens, targets = loader.batch(step)
        loss = model.loss(tokens, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step + 1 == steps:
            print(f"step {step + 1}: loss {loss.item():.3f} nats per token, off the sphere by {departure(model):.0e}")


if __name__ == "__main__":
    main()
