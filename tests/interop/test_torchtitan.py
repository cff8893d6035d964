"""torchtitan's trainer trains our models as ours does. It runs where torchtitan 0.3 can be imported:

pip install --no-deps --target DIR torchtitan==0.3.0 torchdata torch_checkpointing einops spmd_types==0.2.3 tyro \\
    docstring_parser typeguard shtab triton
PYTHONPATH=DIR pytest tests/interop/test_torchtitan.py
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spherelm.recipes import make_run
from spherelm.runs.metrics import read_metrics
from spherelm.train.trainer import train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("torchtitan") is None, reason="torchtitan is not there: see this file"),
]


def steps(out: Path, arm: str, steps: int = 6, processes: int = 1, **settings: Any) -> list[float]:
    """The losses that torchtitan logs, of its first process."""
    given = json.dumps({"arm": arm, "steps": steps, "out": str(out), "parallel": {}, **settings})
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    done = subprocess.run(
        [*start, str(Path(__file__).with_name("titan_ranks.py")), given],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},  # there are many, of its own
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses: list[float] = json.loads((out / "losses-0.json").read_text())
    return losses


def ours(arm: str, out: Path) -> list[float]:
    """Those of our trainer."""
    shape = {"n_layers": 2, "d_model": 64, "n_heads": 4, "seq_len": 64, "batch_size": 8, "steps": 6}
    run = make_run(arm, "demo", vocab_size=4096, dtype="float32", compile=False, eval_every=0, threads=1, **shape)
    train(run, out, show_progress=False)
    return [record["loss"] for record in read_metrics(out / "metrics.jsonl") if record["kind"] == "train"]


@pytest.mark.row("The torchtitan engine")
def test_its_losses_are_those_of_our_trainer(tmp_path: Path) -> None:
    """Gradients accumulated; FSDP over two processes; tensor parallelism; both over four. And with AdamW of its own."""
    expected = {arm: ours(arm, tmp_path / f"{arm}-ours") for arm in ("gpt", "ngpt")}
    two, four = {"tensor_parallel_degree": 2}, {"tensor_parallel_degree": 2, "data_parallel_shard_degree": 2}
    cases: list[tuple[str, int, dict[str, int]]] = [("gpt", 1, {}), ("gpt", 2, two), ("ngpt", 2, {}), ("ngpt", 4, four)]
    for arm, processes, parallel in cases:
        found = steps(tmp_path / f"{arm}-{processes}", arm, processes=processes, parallel=parallel)
        assert found == pytest.approx(expected[arm], rel=1e-4), (arm, processes, parallel)
    its_own = steps(tmp_path / "adamw", "ngpt", adamw=True)
    assert its_own[-1] < its_own[0]


def test_a_run_that_is_resumed_goes_on(tmp_path: Path) -> None:
    """Two processes of FSDP, their checkpoint read by one with another cut."""
    whole = steps(tmp_path / "whole", "ngpt")
    steps(tmp_path / "run", "ngpt", steps=3, save=3, processes=2)
    assert steps(tmp_path / "run", "ngpt", save=3) == pytest.approx(whole[3:], rel=1e-4)
