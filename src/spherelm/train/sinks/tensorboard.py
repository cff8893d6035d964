"""Records for TensorBoard, as event files in the run directory: `tensorboard --logdir RUN`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class TensorBoardSink:
    """Writes `RUN/tensorboard/events.*`, on the disk after each record; raises `ImportError` without tensorboard."""

    def __init__(self, run: Path, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        directory = run / "tensorboard"
        self.new = not directory.exists()
        self._writer = SummaryWriter(str(directory))
        if self.new:
            self._writer.add_text("config", f"```json\n{json.dumps(config, indent=2)}\n```", 0)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
