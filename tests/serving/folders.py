"""The folders that `check.py` serves: trained models with a tokenizer, and large random ones whose speed is measured.

.venv/bin/python tests/serving/folders.py build/serving [--runs runs/demo]

Folders are written anew, from the code as it is. Without `--runs` a GPT and an nGPT are trained at the preset `demo`, a
few minutes each; these runs stay in `build/serving/runs`, and what was interrupted there is resumed.
"""

from __future__ import annotations

import argparse
import json
import lzma
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spherelm.interop.export import export
from spherelm.interop.huggingface.folder import save_folder
from spherelm.models import GPTConfig, NGPTConfig, build

ARMS = {"gpt": GPTConfig, "ngpt": NGPTConfig}
DTYPES = ("float32", "bfloat16")
N_LAYERS, D_MODEL, N_HEADS, VOCAB, LENGTH = 6, 384, 6, 8192, 1024
"""Of the models whose speed is measured."""


def make_trained(out: Path, runs: Path | None) -> None:
    """`ARM-DTYPE` of both arms, folded."""
    for arm in ARMS:
        run = out / "runs" / arm if runs is None else runs / f"{arm}-0"
        if runs is None:
            command = [sys.executable, "-m", "spherelm", "train", "--arm", arm, "--preset", "demo", "--out", str(run)]
            subprocess.run(command + ["--resume"] * run.exists(), check=True)
        for dtype in DTYPES:
            export(run, out / f"{arm}-{dtype}", dtype, folded=True)


def make_random(out: Path) -> None:
    """`speed-NAME` of both arms, folded, and of a Llama of the same shape; the time does not depend on the weights."""
    torch.manual_seed(0)
    for arm, config in ARMS.items():
        model = build(config(VOCAB, N_LAYERS, D_MODEL, N_HEADS, max_seq_len=LENGTH))
        save_folder(model, out / f"speed-{arm}", tokenizer=None, card="", folded=True)
    llama = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        intermediate_size=4 * D_MODEL,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(llama).save_pretrained(out / "speed-llama")


def prompts() -> list[str]:
    """50 pieces of the shipped validation text, of 2 to 492 characters."""
    lines = lzma.decompress(resources.files("spherelm.data.shipped").joinpath("val.jsonl.xz").read_bytes())
    text = "\n\n".join(json.loads(line)["text"] for line in lines.splitlines())
    return [text[800 * i : 800 * i + 10 * i + 2] for i in range(50)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--runs", type=Path, help="with trained runs gpt-0 and ngpt-0")
    args = parser.parse_args()
    for old in (*args.out.glob("*-*"), args.out / "prompts.json"):
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    make_trained(args.out, args.runs)
    make_random(args.out)
    (args.out / "prompts.json").write_text(json.dumps(prompts()), encoding="utf-8")


if __name__ == "__main__":
    main()
