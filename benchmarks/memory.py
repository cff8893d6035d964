"""The most memory that the tensors of a training step hold at once, in both arms, compiled and not:
counted, not sampled.

    python benchmarks/memory.py --shape 12,512,8,1024,4,32000 --dtype bfloat16 --json docs/results/memory.json

Torch's profiler notes every allocation and release with the total since it began. "held" is what weights and the
optimizer's moments hold between steps, "step" what a step needs at its peak beyond that: activations, gradients and
buffers. Resident memory, which `spherelm bench` reports, holds besides these the interpreter, the libraries and what
the allocator keeps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from spherelm.experiments.bench import Shape, configs, parse_shape
from spherelm.experiments.cost import TimedSteps


def held(step: TimedSteps) -> int:
    """Bytes of the weights and of the optimizer's state."""
    moments = (value for state in step.optimizer.state.values() for value in state.values())
    tensors = [*step.model.parameters(), *step.model.buffers(), *(m for m in moments if isinstance(m, torch.Tensor))]
    return sum(tensor.nbytes for tensor in tensors)


def peak(step: TimedSteps) -> int:
    """The most bytes that one step holds beyond what is held when it begins."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step.time_step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return max(int(e["args"]["Total Allocated"]) for e in events if e.get("name") == "[memory]")


def measure(shape: Shape, dtype: str) -> dict[str, Any]:
    """MiB by arm, held between steps and needed by a step beyond that, compiled and not;
    and the arms' sums compared.
    """
    result: dict[str, Any] = {"torch": torch.__version__, "shape": asdict(shape), "dtype": dtype}
    for name, compiled in (("uncompiled", False), ("compiled", True)):
        rows = result[name] = {}
        for arm, config in configs(shape, dtype, compiled).items():
            step = TimedSteps(config)
            step.time_step()
            rows[arm] = {"held": held(step) / 2**20, "step": peak(step) / 2**20}
            del step
        sums = {arm: sum(row.values()) for arm, row in rows.items()}
        rows["ngpt_over_gpt"] = sums["ngpt"] / sums["gpt"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", default="12,512,8,1024,4,32000", help="layers,d_model,heads,sequence,batch,vocabulary"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    text = json.dumps(measure(parse_shape(arguments.shape), arguments.dtype), indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
