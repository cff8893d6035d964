"""The command line: parses arguments, calls the floor below, and turns what users got wrong into one line and exit code 2.

Everything heavy is imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import tyro

from spherelm.cli import evaluation, inspection, text, trained, training

app = tyro.extras.SubcommandApp()
data_app = tyro.extras.SubcommandApp()
import_app = tyro.extras.SubcommandApp()

# In the order in which `--help` lists them.
app.command(training.compare)
app.command(training.train)
app.command(training.sweep)
app.command(name="eval")(evaluation.eval_)
app.command(inspection.inspect)
app.command(inspection.report)
app.command(trained.generate)
app.command(trained.export)
app.command(data_app, name="data", help="Turn text into token shards.")
app.command(import_app, name="import", help="Turn a checkpoint of another program into a run directory.")
data_app.command(text.prepare)
import_app.command(name="nvidia")(trained.import_nvidia)


def stop(message: str, code: int) -> NoReturn:
    """Say one line and leave with `code`."""
    print(f"spherelm: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 the training diverged, 2 something asked for cannot be, 128 + n signal n."""
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
        stop(str(error), code)


def exit_code(error: RuntimeError) -> int | None:
    """The exit code of an error that training raises on purpose, `None` for any other."""
    from spherelm.train.trainer import Diverged, Interrupted

    if isinstance(error, Interrupted):
        return 128 + error.signal_number
    return 1 if isinstance(error, Diverged) else None
