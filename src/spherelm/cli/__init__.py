"""The command line: parses arguments, calls the floor below, and turns what users got wrong into one line and exit code 2.

Everything heavy is imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import tyro

from spherelm.cli import evaluation, inspection, text, timing, trained, training

RANK_LOST = 3
"""Exit code of a run whose other processes no longer answer."""

app = tyro.extras.SubcommandApp()
data_app = tyro.extras.SubcommandApp()
import_app = tyro.extras.SubcommandApp()

# In the order in which `--help` lists them.
app.command(training.compare)
app.command(training.train)
app.command(training.sweep)
app.command(training.evidence)
app.command(name="eval")(evaluation.eval_)
app.command(inspection.inspect)
app.command(inspection.report)
app.command(trained.generate)
app.command(trained.export)
app.command(timing.bench)
app.command(data_app, name="data", help="Turn text into token shards.")
app.command(import_app, name="import", help="Turn a checkpoint of another program into a run directory.")
data_app.command(text.prepare)
data_app.command(text.pairs)
import_app.command(name="nvidia")(trained.import_nvidia)


def stop(message: str, code: int) -> NoReturn:
    """Say one line and leave with `code`."""
    print(f"spherelm: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 1 the training diverged, 2 something asked for cannot be, 3 processes of the run no longer answer,
    128 + n stopped by signal n.
    """
    try:
        app.cli(prog="spherelm", description="Train language models on the hypersphere: nGPT and its GPT baseline.")
    except BrokenPipeError:  # whoever reads the output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + 13) from None
    except (ValueError, OSError) as error:
        stop(str(error), 2)
    except KeyboardInterrupt:
        stop("interrupted", 130)
    except RuntimeError as error:
        code = exit_code(error)
        if code is None:
            raise
        if code == RANK_LOST:  # whichever process notices must say so, and wait for nobody
            print(f"spherelm: {error}", file=sys.stderr, flush=True)
            os._exit(code)
        if os.environ.get("RANK", "0") != "0":  # all processes of the run end so, and one says why
            raise SystemExit(code) from None
        stop(str(error), code)


def exit_code(error: RuntimeError) -> int | None:
    """The exit code of an error that training raises on purpose, `None` for any other."""
    from spherelm.train.guard import Diverged
    from spherelm.train.parallel import ElsewhereFailed, RankLost
    from spherelm.train.signals import Interrupted

    if isinstance(error, Interrupted):
        return 128 + error.signal_number
    codes = {Diverged: 1, ElsewhereFailed: 2, RankLost: RANK_LOST}
    return codes.get(type(error))
