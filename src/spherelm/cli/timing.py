"""Commands about this machine: `bench` measures what training costs on it, `doctor` whether it works."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from spherelm.cli.flags import TRAIN, Given, OnMachine, computing
from spherelm.cli.parser import Fields
from spherelm.errors import UserError


def bench(
    *,
    shape: str = "6,384,6,512,8,8192",
    steps: int = 15,
    number_format: Annotated[Given, Fields(TRAIN, "dtype")],
    no_compile: bool = False,
    json: Path | None = None,
    profile: bool = False,
    pattern: str | None = None,
    machine: OnMachine,
) -> None:
    """Time training steps of nGPT and GPT in turn on this machine, with their memory and MFU.

    Example: spherelm bench --shape 6,384,6,512,8,8192 --json step.json

    Args:
        shape: Layers, d_model, heads, tokens per sequence, sequences, vocabulary.
        steps: Steps of each arm to time, after 3 warm-up steps.
        no_compile: Do not use torch.compile.
        json: File to write the result to, as JSON.
        profile: Also show where each arm's steps spend their time, by torch's profiler.
        pattern: Time hybrids with this pattern of layers, such as MAM-MAM-, instead of transformers; one
            letter per layer.
    """
    from spherelm.data.output import check_new_file
    from spherelm.experiments import bench as module
    from spherelm.runs.config import TrainConfig

    what, dtype = module.parse_shape(shape), number_format.get("dtype", TrainConfig.dtype)
    if steps < 1:
        raise UserError(f"steps must be at least 1, got {steps}")
    if json is not None:
        check_new_file(json, "--json")
    with computing(machine):
        result = module.bench(what, dtype, not no_compile, steps, pattern)
        print(module.bench_table(result))
        if json is not None:
            module.write_result(result, json)
        if profile:
            for arm, config in module.configs(what, dtype, not no_compile, pattern).items():
                print(f"\nWhere three steps of {arm} spend their time:\n{module.profile(config)}")


def doctor(*, json: Path | None = None) -> None:
    """Check in two minutes that this machine trains: device, formats, compilation, processes, a short run.

    Prints a block to paste into an issue, and a verdict; the exit code is 1 where a check failed. Runs are made in the
    working directory, and removed.

    Example: spherelm doctor --json doctor.json

    Args:
        json: File to write the checks to, as JSON.
    """
    from spherelm.data.output import check_new_file, write_json
    from spherelm.experiments import doctor as module

    if json is not None:
        check_new_file(json, "--json")
    found = []
    print("```", flush=True)
    for one in module.examine():
        found.append(one)
        print(one.lines(), flush=True)
    print("```")
    result = module.record(found)
    print(result["verdict"])
    if json is not None:
        write_json(json, result)
    if any(one.state == "failed" for one in found):
        raise SystemExit(1)
