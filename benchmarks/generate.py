"""Decoding: tokens per second of GPT, of nGPT with its scales folded into the matrices and without,
and of a Llama as large.

python benchmarks/generate.py --json docs/results/generate.json

All models have the same shape and random weights: greedy decoding takes the same time whatever the weights are. The
Llama is `transformers.LlamaForCausalLM` (separate q, k, v, as published), in the leanest loop that is fair: its own
forward pass, a cache of its own, `logits_to_keep=1`, argmax; not its `generate`, which does more and takes longer
(`llama generate` says how much). What is timed: `--new` tokens after a prompt of `--prompt`, whose reading is not. The
contestants take turns in one process, every one once a round; rates are medians over rounds, ratios medians of the
rounds' own ratios. On one thread (`--threads 1`, the default) time is the processor time of this process, which other
work on the machine hardly touches; on more threads it is the clock on the wall.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from spherelm.generation.folding import folded
from spherelm.generation.generate import stream
from spherelm.generation.sampling import Sampling
from spherelm.layers.readout import read_logits
from spherelm.models import Decoder, GPTConfig, NGPTConfig, build

Clock = Callable[[], float]

Decode = Callable[[Tensor], Iterator[None]]
"""Reads a prompt [batch, seq] by the first `next`, makes one token a row by each one after it."""


@dataclass(frozen=True)
class Shape:
    """Of the models that are timed: both of ours and the Llama."""

    n_layers: int
    d_model: int
    n_heads: int
    vocab_size: int
    max_seq_len: int


def ours(model: Decoder) -> Decode:
    """The forward pass of a model of ours in a bare loop."""

    def decode(prompt: Tensor) -> Iterator[None]:
        cache, tokens = model.new_cache(), prompt
        while True:
            h = model.trunk(model.embedded(tokens), cache)
            tokens = read_logits(model.readout(h[:, -1:]))[:, -1:].argmax(-1)
            yield

    return decode


def ours_complete(model: Decoder, limit: int) -> Decode:
    """`spherelm.generate`: with rows, draws and all."""

    def decode(prompt: Tensor) -> Iterator[None]:
        new = limit - prompt.shape[1]
        for _ in stream(model, prompt.tolist(), new, Sampling(temperature=0), fold=False):
            yield

    return decode


def llama(model: LlamaForCausalLM, new_cache: Callable[[], Any]) -> Decode:
    """The forward pass of the Llama in a bare loop."""

    def decode(prompt: Tensor) -> Iterator[None]:
        cache, tokens = new_cache(), prompt
        while True:
            # The fourth argument is the cache; its name differs between versions of transformers.
            out = model(tokens, None, None, cache, use_cache=True, logits_to_keep=1)
            tokens = out.logits[:, -1:].argmax(-1)
            yield

    return decode


class EachToken:
    """A streamer of transformers that does nothing but let time pass between tokens be seen."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(self.clock())

    def end(self) -> None:
        pass


def llama_generate(model: LlamaForCausalLM, prompt: Tensor, new: int, clock: Clock) -> float:
    """Tokens per second and row of the Llama's own `generate`, which tells of the prompt and then of each token."""
    ticks = EachToken(clock)
    mask = torch.ones_like(prompt)
    model.generate(
        prompt, attention_mask=mask, max_new_tokens=new + 1, min_new_tokens=new + 1, do_sample=False, streamer=ticks
    )
    return new / (ticks.times[-1] - ticks.times[1])


def rate(decode: Decode, prompt: Tensor, new: int, clock: Clock) -> float:
    """Tokens per second and row."""
    steps = decode(prompt)
    next(steps)
    start = clock()
    for _ in range(new):
        next(steps)
    return new / (clock() - start)


def make_llama(shape: Shape) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.d_model,
        intermediate_size=4 * shape.d_model,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        max_position_embeddings=shape.max_seq_len,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def contestants(
    shape: Shape, prompt: Tensor, new: int, dtype: torch.dtype, clock: Clock
) -> dict[str, Callable[[], float]]:
    """The timed calls, by name; each is one run."""
    batch = len(prompt)
    sizes = (shape.vocab_size, shape.n_layers, shape.d_model, shape.n_heads)
    gpt, ngpt = (
        build(config(*sizes, max_seq_len=shape.max_seq_len)).to(dtype).eval() for config in (GPTConfig, NGPTConfig)
    )
    peer = make_llama(shape).to(dtype)  # type: ignore[arg-type]
    total = prompt.shape[1] + new + 1
    decoders = {
        "gpt": ours(gpt),
        "gpt folded": ours(folded(gpt)),
        "ngpt": ours(ngpt),
        "ngpt folded": ours(folded(ngpt)),
        "llama, dynamic cache": llama(peer, lambda: DynamicCache(config=peer.config)),
        "llama, static cache": llama(peer, lambda: StaticCache(config=peer.config, max_cache_len=total)),
        "gpt, spherelm.generate": ours_complete(folded(gpt), total),
        "ngpt, spherelm.generate": ours_complete(folded(ngpt), total),
    }
    runs: dict[str, Callable[[], float]] = {
        name: lambda decode=decode: batch * rate(decode, prompt, new, clock)  # type: ignore[misc]
        for name, decode in decoders.items()
    }
    return runs | {"llama, its generate": lambda: batch * llama_generate(peer, prompt, new, clock)}


RATIOS = {
    "ngpt folded / gpt folded": ("ngpt folded", "gpt folded"),
    "ngpt folded / gpt": ("ngpt folded", "gpt"),
    "ngpt / gpt": ("ngpt", "gpt"),
    "ngpt folded / ngpt": ("ngpt folded", "ngpt"),
    "ngpt folded / llama, dynamic cache": ("ngpt folded", "llama, dynamic cache"),
    "ngpt folded / llama, static cache": ("ngpt folded", "llama, static cache"),
    "gpt / llama, dynamic cache": ("gpt", "llama, dynamic cache"),
    "ngpt, spherelm.generate / llama, its generate": ("ngpt, spherelm.generate", "llama, its generate"),
}


@torch.no_grad()
def measure(shape: Shape, batch: int, length: int, new: int, rounds: int, dtype: torch.dtype) -> dict[str, Any]:
    """Medians over `rounds` rounds, after one that does not count."""
    torch.manual_seed(0)
    prompt = torch.randint(1, shape.vocab_size, (batch, length))
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    runs = contestants(shape, prompt, new, dtype, clock)
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        names = list(runs)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            value = runs[name]()
            if i:
                rates[name].append(value)
    ratios = {
        name: statistics.median(a / b for a, b in zip(rates[one], rates[other], strict=True))
        for name, (one, other) in RATIOS.items()
    }
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {"batch": batch, "tokens_per_second": medians, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="6,384,6,8192", help="layers,d_model,heads,vocabulary")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--new", type=int, default=96, help="tokens")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = Shape(*map(int, arguments.shape.split(",")), max_seq_len=arguments.prompt + arguments.new + 1)
    rows = []
    for batch in arguments.batch:
        row = measure(shape, batch, arguments.prompt, arguments.new, arguments.rounds, getattr(torch, arguments.dtype))
        rows.append(row)
        print(json.dumps(row, indent=1), flush=True)
    if arguments.json:
        record = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "cpus": os.cpu_count(),
            **{key: value for key, value in vars(arguments).items() if key not in ("json", "batch")},
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
