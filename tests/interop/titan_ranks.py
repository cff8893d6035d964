"""torchtitan's trainer on processors, which it is not made for: as torchrun starts it, `python titan_ranks.py JSON`.

What is replaced are questions about a GPU's name and memory, and a barrier that names devices. The
losses go into a file.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch.cpu
import torchtitan.tools.utils as tools

tools.device_type, tools.device_module = "cpu", torch.cpu
STAND_INS: dict[str, Any] = {
    "get_device_name": lambda device=None: "cpu",
    "get_device_properties": lambda device=None: types.SimpleNamespace(total_memory=2**34),
    "memory_stats": lambda device=None: {},
    "reset_peak_memory_stats": lambda: None,
    "empty_cache": lambda: None,
}
for name, stand_in in STAND_INS.items():
    setattr(torch.cpu, name, stand_in)

import torchtitan.distributed.utils  # noqa: E402
from torchtitan.components.checkpoint import CheckpointManager  # noqa: E402
from torchtitan.components.optimizer import default_adamw  # noqa: E402
from torchtitan.config import ParallelismConfig  # noqa: E402

torchtitan.distributed.utils.set_pg_timeouts = lambda **_: None

from spherelm.interop.huggingface import to_hf  # noqa: E402
from spherelm.interop.torchtitan import Adapter, trainer_config  # noqa: E402
from spherelm.layers.linear import unit_modules  # noqa: E402
from spherelm.models import build  # noqa: E402
from spherelm.recipes import make_run  # noqa: E402
from spherelm.sharding import gathered  # noqa: E402


def run_of(arm: str, steps: int) -> Any:
    """A small run on the shipped text."""
    shape = {"n_layers": 2, "d_model": 64, "n_heads": 4, "seq_len": 64, "batch_size": 8, "steps": steps}
    return make_run(arm, "demo", vocab_size=4096, dtype="float32", compile=False, eval_every=0, threads=1, **shape)


def adapted(run: Any) -> None:
    """Check that checkpoints become what an exported folder holds, and come back."""
    model = build(run.model)
    adapter = Adapter(trainer_config(run).model_spec.model, None)
    theirs, ours = adapter.to_hf(model.state_dict()), to_hf(model).state_dict()
    assert theirs.keys() == ours.keys()
    assert all(theirs[name].equal(ours[name]) for name in ours)
    back = adapter.from_hf(theirs)
    assert back.keys() == model.state_dict().keys()
    assert all(back[name].equal(tensor) for name, tensor in model.state_dict().items())


def main(arm: str, steps: int, out: str, parallel: dict[str, int], save: int = 0, adamw: bool = False) -> None:
    """Train, write the losses, and check that all unit vectors are unit."""
    run = run_of(arm, 6)
    adapted(run)
    fields: dict[str, Any] = {"optimizer": default_adamw(lr=1e-3, weight_decay=0.0)} if adamw else {}
    fields["checkpoint"] = CheckpointManager.Config(enable=bool(save), interval=save or 1, last_save_model_only=False)
    parallelism = ParallelismConfig(spmd_backend="partial_dtensor", **parallel)
    config = trainer_config(run, dump_folder=out, parallelism=parallelism, **fields)
    config.training.steps, config.training.local_batch_size, config.metrics.log_freq = steps, 2, 1
    config.lr_scheduler.total_steps = 6
    trainer, losses = config.build(), []
    log = trainer.metrics_processor.log

    def noted(step: int, loss: float, *rest: Any, **more: Any) -> None:
        losses.append(loss)
        log(step, loss, *rest, **more)

    trainer.metrics_processor.log = noted
    trainer.train()
    for _, module, axis in unit_modules(trainer.model_parts[0]):
        lengths = torch.linalg.vector_norm(gathered(module.weight).double(), dim=axis)
        assert (lengths - 1).abs().max() < 1e-6
    (Path(out) / f"losses-{torch.distributed.get_rank()}.json").write_text(json.dumps(losses))
    trainer.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
