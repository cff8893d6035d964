"""Records for Weights & Biases, offline unless the environment says otherwise: `wandb sync RUN/wandb/offline-run-*`."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any


class WandbSink:
    """Writes `RUN/wandb`; every piece of a run that was cut off has the same id,
    so that `wandb sync --append` joins them.

    Goes online only where WANDB_MODE says so. Raises `ImportError` without wandb.
    """

    def __init__(self, run: Path, config: dict[str, Any]) -> None:
        import wandb

        before = sorted((run / "wandb").glob("*run-*-*"))
        self.new = not before
        identity = before[0].name.rsplit("-", 1)[1] if before else uuid.uuid4().hex[:8]
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        # Nothing is gathered that was not asked for: no console output, no code, no machine statistics, no git.
        settings = wandb.Settings(
            silent=True, console="off", save_code=False, disable_git=True, x_disable_stats=True, x_disable_meta=True
        )
        self._run = wandb.init(
            project="spherelm",
            name=run.name,
            id=identity,
            dir=str(run),
            mode=mode,
            config=config,
            resume="allow" if mode == "online" else None,
            reinit="create_new",
            settings=settings,
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        # Validation and training share a step, and one call may not go back: the step is a number like the others.
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()
