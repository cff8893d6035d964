"""Commands on models that are trained already: `generate`, `export`, `import`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from spherelm.cli.flags import Flag


def import_nvidia(
    ckpt: Positional[Path],
    out: Positional[Path],
    rope: Literal["nvidia", "standard"] = "nvidia",
    tokenizer: str | None = None,
    moments: Flag = False,
) -> None:
    """Turn a ckpt.pt that NVIDIA/ngpt's train.py wrote into a run directory; nothing in the file is run.

    Args:
        ckpt: The file.
        out: The run directory to make.
        rope: nvidia: what their code computes, whose rotary embedding is not a rotation; standard: the paper's model.
        tokenizer: What it was trained with (a tokenizer.json, a SentencePiece .model, a Hugging Face name); not in the file.
        moments: Keep the optimizer's moments as well, for training on.
    """
    from spherelm.layers.linear import departure
    from spherelm.train.imported import import_nvidia as run_import

    model = run_import(ckpt, out, rope, tokenizer, moments)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{type(model).__name__} of {count:,} parameters in {out}; departure from the sphere {departure(model):.1e}")


def generate(
    run: Positional[Path],
    prompt: str,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = None,
    samples: int = 1,
    seed: int = 0,
) -> None:
    """Continue a text.

    Args:
        run: A run directory, or one of its checkpoints.
        prompt: How the text begins.
        max_new_tokens: Tokens to add.
        temperature: 0 always takes the most probable token; 1 draws as the model predicts.
        top_k: Draw among the k most probable tokens only.
        top_p: Draw among the fewest tokens that reach this probability.
        samples: Continuations to draw.
        seed: Of the draw.
    """
    from spherelm.train.samples import continuations

    texts = continuations(
        run, prompt, samples, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    print("\n---\n".join(prompt + text for text in texts))


def export(
    run: Positional[Path],
    out: Positional[Path],
    standalone: Flag = False,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    no_tokenizer: Flag = False,
) -> None:
    """Write a run's model as a folder that Hugging Face transformers loads, with tokenizer and model card.

    Args:
        run: A run directory, or one of its checkpoints.
        out: The directory to make.
        standalone: Put the modeling code beside the weights, for trust_remote_code where spherelm is not installed.
        dtype: Format of the weights.
        no_tokenizer: Leave the tokenizer out.
    """
    from spherelm.train.export import export as run_export

    run_export(run, out, dtype, standalone, with_tokenizer=not no_tokenizer)
    print(f"The folder: {out.resolve()}")
