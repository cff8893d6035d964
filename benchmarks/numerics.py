"""How far a compiled bfloat16 step is from an uncompiled float32 one, in a deep model: logits and every gradient.

python benchmarks/numerics.py --json docs/results/numerics.json

The relative error of a tensor is ||a - b|| / ||b||, b in float32. Both see the same weights and tokens; the weights
are those of a fresh model after `--steps` float32 updates. For comparison the same of uncompiled bfloat16.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spherelm.experiments.bench import configs, parse_shape
from spherelm.models import Decoder, build
from spherelm.optim import build_optimizer
from spherelm.optim.groups import parameter_roles
from spherelm.runs.config import RunConfig
from spherelm.train.precision import compile_blocks


def trained(config: RunConfig, tokens: Tensor, targets: Tensor, steps: int) -> Decoder:
    torch.manual_seed(0)
    model = build(config.model)
    optimizer = build_optimizer(model, replace(config.optim, lr=1e-3))
    for _ in range(steps):
        model.loss(tokens, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def tensors(model: Decoder, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Logits and gradients of one step, by name."""
    model.zero_grad()
    model.loss(tokens, targets).backward()
    with torch.no_grad():
        found = {"logits": model(tokens).double()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        found[name] = parameter.grad.double().clone()
    return found


def error(found: Tensor, right: Tensor) -> float:
    return ((found - right).norm() / right.norm()).item()


def measure(config: RunConfig, batch: tuple[Tensor, Tensor], steps: int) -> dict[str, Any]:
    model = trained(config, *batch, steps)
    right = tensors(model, *batch)
    model.runtime.compute_dtype = torch.bfloat16
    eager = tensors(model, *batch)
    torch.compiler.reset()
    compile_blocks(model, lambda: model.loss(*batch).backward())
    compiled = tensors(model, *batch)
    roles = parameter_roles(model)
    result: dict[str, Any] = {}
    for name, got in (("bfloat16", eager), ("bfloat16 compiled", compiled)):
        by_role: dict[str, list[float]] = defaultdict(list)
        for parameter, role in roles.items():
            by_role[role].append(error(got[parameter], right[parameter]))
        result[name] = {
            "logits": error(got["logits"], right["logits"]),
            "gradients": {role: {"median": statistics.median(x), "largest": max(x)} for role, x in by_role.items()},
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="24,128,2,256,2,1024", help="layers,d_model,heads,sequence,batch,vocabulary")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    shape = parse_shape(arguments.shape)
    batch = torch.randint(shape.vocab_size, (2, shape.batch_size, shape.seq_len)).unbind()
    arms = {arm: measure(config, batch, arguments.steps) for arm, config in configs(shape, "float32", False).items()}
    result = {"torch": torch.__version__, "shape": arguments.shape, "steps": arguments.steps, "arms": arms}
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
