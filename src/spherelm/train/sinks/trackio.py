"""Records for trackio, in its local database: `trackio show --project spherelm`."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any


class TrackioSink:
    """Writes to the project "spherelm" in trackio's own directory (TRACKIO_DIR); raises `ImportError` without trackio.

    A run is known by its whole path, so that resuming continues it. Nothing leaves the machine unless trackio's own
    variables (TRACKIO_SPACE_ID, TRACKIO_SERVER_URL) say so.
    """

    def __init__(self, run: Path, config: dict[str, Any]) -> None:
        # It greets on standard output, which belongs to the command that is run.
        with contextlib.redirect_stdout(io.StringIO()):
            import trackio

            name = str(run.resolve())
            try:
                self.new = name not in {known.name for known in trackio.Api().runs("spherelm")}
            except ValueError:  # there is no such project yet
                self.new = True
            self._run = trackio.init(
                project="spherelm",
                name=name,
                config=config,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            import trackio

            trackio.finish()  # and not the run's own, which would be finished again, and said so, at exit
