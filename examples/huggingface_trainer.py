"""nGPT in transformers' Trainer, on a book that ships with spherelm:
`python examples/huggingface_trainer.py --steps 200`.

Needs `pip install '.[hf]'` in a clone of spherelm. The wrapped model keeps its weights on the sphere; everything else
is transformers' own.
"""

from __future__ import annotations

import argparse

import torch
from transformers import Trainer, TrainingArguments

from spherelm import NGPT, NGPTConfig, ScaleSpec, departure
from spherelm.data.corpus import shipped_documents
from spherelm.data.tokenizer import load_tokenizer
from spherelm.interop.huggingface import to_hf


def main() -> None:
    """Train a small nGPT, save it, and say how far its weights are from the sphere."""
    parser = argparse.ArgumentParser(description="Train a small nGPT with transformers' Trainer.")
    parser.add_argument("--steps", type=int, default=200, help="optimizer updates (default: 200)")
    parser.add_argument(
        "--out", default="runs/trainer", help="where checkpoints and the model go (default: runs/trainer)"
    )
    options = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = load_tokenizer("default")
    ids = torch.tensor(tokenizer.encode(next(shipped_documents("train"))["text"][:400_000]))
    windows = [{"input_ids": window, "labels": window} for window in ids.split(128)[:-1]]
    # In a short run the learned scales cannot travel far: start them near where they belong (docs/paper.md).
    config = NGPTConfig(
        tokenizer.vocab_size, n_layers=4, d_model=128, n_heads=2, s_z=ScaleSpec(128**0.5), alpha=ScaleSpec(0.25)
    )
    model = to_hf(NGPT(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    settings = TrainingArguments(
        options.out,
        max_steps=options.steps,
        per_device_train_batch_size=8,
        lr_scheduler_type="cosine",
        logging_steps=20,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    Trainer(model, settings, train_dataset=windows, optimizers=(optimizer, None)).train()
    model.save_pretrained(f"{options.out}/model")
    print(f"off the sphere by {departure(model):.0e}")


if __name__ == "__main__":
    main()
