"""Time of a training step: our two arms, and what others have of the same shape, in turn in one process.

python benchmarks/step_time.py --rounds 15 --json docs/results/step_time.json
python benchmarks/step_time.py --shape 12,512,8,1024,4,32000 --dtype bfloat16 --threads 2 --json large.json
python benchmarks/step_time.py --llama --nvidia CHECKOUT/model.py --lucidrains --json docs/results/step_time-peers.json
python benchmarks/step_time.py --shape 4,128,2,256,4,4096 --no-compile --nvidia CHECKOUT/model.py --lucidrains \\
    --nanochat CHECKOUT --json docs/results/step_time-demo.json

A step: forward, backward, clipping at 1, fused AdamW, on random tokens; nGPT retracts as well. Our arms are those of
the recipe "paper"; by `--recipe law` their optimizer is Muon, which takes longer than the peers' AdamW. Blocks are
compiled one by one (`Module.compile`), those of the peers too, except with --no-compile. Peers are what is installed or
checked out beside this repository: `--llama` is transformers' LlamaForCausalLM with a plain loss; `--nvidia` names
model.py of a checkout of NVIDIA/ngpt, both of its arms, its flash-attention replaced by torch's, without the
normalization that its train.py does after a step; `--lucidrains` is the package nGPT-pytorch, not compiled and only in
float32 (it does not run otherwise), its own normalization after the step included; `--nanochat` names a checkout of
karpathy/nanochat, whose GPT has value embeddings and MLPs of squared ReLUs without a gate. With --dtype bfloat16 peers
run under autocast, weights of all are float32.

On one thread (`--threads 1`, the default) time is the processor time of this process, which other work on the machine
touches little; on more threads it is the clock on the wall. Ratios are medians of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spherelm.experiments.bench import Shape, configs, parse_shape
from spherelm.experiments.cost import TimedSteps
from spherelm.layers.linear import retract
from spherelm.train.counting import training_flops

PRODUCT = "4096-cube product"
Clock = Callable[[], float]
Step = Callable[[], object]


def peer_step(shape: Shape, dtype: torch.dtype, model: nn.Module, loss: Callable[[Tensor], Tensor]) -> Step:
    """A whole step of a model of others; `loss` takes tokens [batch, seq + 1]."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    tokens = torch.randint(shape.vocab_size, (shape.batch_size, shape.seq_len + 1))
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)

    def step() -> None:
        with autocast:
            value = loss(tokens)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def llama(shape: Shape, dtype: torch.dtype, compiled: bool) -> Step:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"vocab_size": shape.vocab_size, "max_position_embeddings": shape.seq_len}
    sizes |= {"hidden_size": shape.d_model, "intermediate_size": 4 * shape.d_model, "attn_implementation": "sdpa"}
    sizes |= {"num_hidden_layers": shape.n_layers, "num_attention_heads": shape.n_heads, "use_cache": False}
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))
    for layer in model.model.layers if compiled else ():
        layer.compile()

    def loss(tokens: Tensor) -> Tensor:
        logits: Tensor = model(tokens[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    return peer_step(shape, dtype, model, loss)


def attention_by_torch(dtype: torch.dtype) -> ModuleType:
    """A stand-in for the module `flash_attn`: [batch, seq, heads, d_k] in and out, computed in `dtype`."""

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, **rest: Any) -> Tensor:
        q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax_scale).transpose(1, 2)

    module = ModuleType("flash_attn")
    module.flash_attn_func = module.flash_attn_qkvpacked_func = flash_attn_func  # type: ignore[attr-defined]
    return module


def nvidia(path: Path, normalized: bool, shape: Shape, dtype: torch.dtype, compiled: bool) -> Step:
    sys.modules["flash_attn"] = attention_by_torch(dtype)
    spec = importlib.util.spec_from_file_location("nvidia_ngpt_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    config = module.GPTConfig(
        block_size=shape.seq_len,
        vocab_size=shape.vocab_size,
        n_layer=shape.n_layers,
        n_head=shape.n_heads,
        n_embd=shape.d_model,
        base_scale=shape.d_model**-0.5,
        use_nGPT=int(normalized),
    )
    model = module.GPT(config).float()
    for block in model.transformer.h if compiled else ():
        block.compile()
    return peer_step(shape, dtype, model, lambda tokens: model(tokens[:, :-1], tokens[:, 1:].contiguous())[1])


def lucidrains(shape: Shape) -> Step:
    # The package has a class under the name of its module.
    package = importlib.import_module("nGPT_pytorch.nGPT")

    for value in vars(package).values():  # classes with __eq__ and no __hash__, which torch cannot keep in a set
        if isinstance(value, type) and issubclass(value, nn.Module) and value.__hash__ is None:
            value.__hash__ = nn.Module.__hash__
    model = package.nGPT(
        num_tokens=shape.vocab_size,
        dim=shape.d_model,
        depth=shape.n_layers,
        heads=shape.n_heads,
        dim_head=shape.d_model // shape.n_heads,
        ff_expand_factor=6.0,  # of which it takes two thirds: as wide as the others
        attn_flash_kwargs={"enable_flash": True, "enable_math": True, "enable_mem_efficient": True},
    )
    step = peer_step(shape, torch.float32, model, lambda tokens: model(tokens, return_loss=True))

    def with_normalization() -> None:
        step()
        model.norm_weights_()

    return with_normalization


def nanochat(checkout: Path, shape: Shape, dtype: torch.dtype, compiled: bool) -> Step:
    sys.path.insert(0, str(checkout))
    module = importlib.import_module("nanochat.gpt")
    config = module.GPTConfig(
        sequence_len=shape.seq_len,
        vocab_size=shape.vocab_size,
        n_layer=shape.n_layers,
        n_head=shape.n_heads,
        n_kv_head=shape.n_heads,
        n_embd=shape.d_model,
        window_pattern="L",
    )
    model = module.GPT(config)
    model.init_weights()
    for block in model.transformer.h if compiled else ():
        block.compile()
    return peer_step(shape, dtype, model, lambda tokens: model(tokens[:, :-1], tokens[:, 1:].contiguous()))


def contestants(arguments: argparse.Namespace, shape: Shape) -> dict[str, Step]:
    """The timed steps, by name."""
    compiled, dtype = not arguments.no_compile, getattr(torch, arguments.dtype)
    runs = configs(shape, arguments.dtype, compiled, recipe=arguments.recipe)
    ours = {arm: TimedSteps(config).time_step for arm, config in runs.items()}
    steps: dict[str, Step] = dict(ours)
    if arguments.llama:
        steps["llama"] = llama(shape, dtype, compiled)
    if arguments.nvidia:
        for name, normalized in (("nvidia gpt", False), ("nvidia ngpt", True)):
            steps[name] = nvidia(arguments.nvidia, normalized, shape, dtype, compiled)
    if arguments.lucidrains:
        steps["lucidrains ngpt"] = lucidrains(shape)
    if arguments.nanochat:
        steps["nanochat gpt"] = nanochat(arguments.nanochat, shape, dtype, compiled)
    return steps


def seconds(step: Step, clock: Clock) -> float:
    start = clock()
    step()
    return clock() - start


def product(dtype: torch.dtype) -> Step:
    """The peak rate of the machine: of a product of two 4096 x 4096 matrices."""
    a, b = torch.randn(2, 4096, 4096).to(dtype).unbind()
    return lambda: a @ b


def rounds(steps: dict[str, Step], count: int, clock: Clock) -> dict[str, list[float]]:
    """The seconds of `count` steps of each, after two that do not count; who begins changes from round to round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for i in range(count + 2):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            value = seconds(steps[name], clock)
            print(f"round {i}: {name} {value:.3f} s", file=sys.stderr, flush=True)
            if i >= 2:
                times[name].append(value)
    return times


def retraction_ratio(shape: Shape, dtype: str, step_seconds: float, clock: Clock) -> float:
    """The time of putting all weights back on the sphere, of a step."""
    model = TimedSteps(configs(shape, dtype, compiled=False)["ngpt"]).model
    return statistics.median(seconds(lambda: retract(model), clock) for _ in range(9)) / step_seconds


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    shape = parse_shape(arguments.shape)
    steps = contestants(arguments, shape) | {PRODUCT: product(getattr(torch, arguments.dtype))}
    times = rounds(steps, arguments.rounds, clock)
    medians = {name: statistics.median(values) for name, values in times.items()}
    pairs = {name: [a / b for a, b in zip(values, times["ngpt"], strict=True)] for name, values in times.items()}
    ratios = sorted(b / a for a, b in zip(times["gpt"], times["ngpt"], strict=True))
    over_product = {arm: [a / b for a, b in zip(times[arm], times[PRODUCT], strict=True)] for arm in ("gpt", "ngpt")}
    flops = {
        arm: training_flops(config.model, shape.batch_size, shape.seq_len)
        for arm, config in configs(shape, arguments.dtype, compiled=False).items()
    }
    return {
        "torch": torch.__version__,
        "cpus": os.cpu_count(),
        "clock": clock.__name__,
        "shape": asdict(shape),
        **{name: getattr(arguments, name) for name in ("dtype", "threads", "rounds", "no_compile", "recipe")},
        "step_seconds": medians,
        "all_seconds": times,
        "ngpt_over_gpt": statistics.median(ratios),
        "ngpt_over_gpt_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        "over_our_ngpt": {name: statistics.median(values) for name, values in pairs.items()},
        "matmul_gflops": 2 * 4096**3 / medians[PRODUCT] / 1e9,
        "gflops": {arm: flops[arm] / medians[arm] / 1e9 for arm in flops},
        "mfu": {arm: flops[arm] / (2 * 4096**3) / statistics.median(over_product[arm]) for arm in flops},
        "retraction_share": retraction_ratio(shape, arguments.dtype, medians["ngpt"], clock),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="6,384,6,512,8,8192", help="layers,d_model,heads,sequence,batch,vocabulary")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--llama", action="store_true")
    parser.add_argument("--nvidia", type=Path)
    parser.add_argument("--recipe", default="paper")
    parser.add_argument("--lucidrains", action="store_true")
    parser.add_argument("--nanochat", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments)
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
