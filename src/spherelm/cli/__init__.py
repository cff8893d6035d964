"""The command line: parses arguments, calls the floor below, and turns what users got wrong into one line and exit code 2.

Everything heavy is imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, NoReturn

import tyro

from spherelm import __version__
from spherelm.cli import evaluation, inspection, listing, text, timing, trained, training
from spherelm.cli.given import checked, flags_of, refuse_unknown
from spherelm.errors import UserError
from spherelm.third_parties import silenced

RANK_LOST = 3
"""Exit code of a run whose other processes no longer answer."""

COMMANDS: dict[str, Callable[..., None]] = {
    "compare": training.compare,
    "train": training.train,
    "sweep": training.sweep,
    "evidence": training.evidence,
    "eval": evaluation.eval_,
    "inspect": inspection.inspect,
    "report": inspection.report,
    "generate": trained.generate,
    "export": trained.export,
    "push": trained.push,
    "bench": timing.bench,
    "presets": listing.presets,
    "recipes": listing.recipes,
    "data prepare": text.prepare,
    "data pairs": text.pairs,
    "data verify": text.verify,
    "import nvidia": trained.import_nvidia,
    "import hub": trained.import_hub,
}
"""Every command by its whole name, in the order in which `--help` lists them."""

GROUPS = {
    "data": "Turn text into token shards, and verify them.",
    "import": "Turn a model from elsewhere into a run directory.",
}
"""What the commands that have commands are for."""


data_app, import_app = tyro.extras.SubcommandApp(), tyro.extras.SubcommandApp()
data_app.command(checked(text.prepare))
data_app.command(checked(text.pairs))
data_app.command(checked(text.verify))
import_app.command(name="nvidia")(checked(trained.import_nvidia))
import_app.command(name="hub")(checked(trained.import_hub))


def program(asked: str | None = None) -> tyro.extras.SubcommandApp:
    """The command line; of every command but `asked`, if that is given, name and description only.

    A parser is built for every flag of every command, which takes longer than all else that `--help` does.
    """
    app = tyro.extras.SubcommandApp()
    groups = {"data": data_app, "import": import_app}
    for name in dict.fromkeys(name.partition(" ")[0] for name in COMMANDS):
        command: Any = groups.get(name) or COMMANDS[name]
        if asked not in (None, name):
            command = outline(command)
        elif name not in groups:
            command = checked(command)
        app.command(command, name=name, help=GROUPS.get(name))
    return app


def outline(command: Any) -> Callable[[], None]:
    """A command without flags that is described as `command` is."""

    def nothing() -> None: ...

    nothing.__doc__ = command.__doc__
    return nothing


def rank_and_size() -> tuple[int, int]:
    """Which of the processes that torchrun started this is, and of how many."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def one_speaks() -> Iterator[None]:
    """Of several processes, drop what all but the first write; what they raise is not written yet."""
    if rank_and_size()[0] == 0:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def say(message: str) -> None:
    """Write one line to stderr."""
    try:
        print(f"spherelm: {' '.join(message.split())}", file=sys.stderr)
    except OSError:  # the terminal is gone, which may be why a run stops
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def stop(message: str, code: int) -> NoReturn:
    """Say one line and leave with `code`; of several processes, which all end so, one says it."""
    if rank_and_size()[1] > 1:
        from spherelm.train.parallel import leave

        leave(lambda: say(message), code)
    say(message)
    raise SystemExit(code)


def main() -> None:
    """Run the command line. Other libraries are `silenced`; their errors are not.

    Exit codes: 0 done, 1 the training diverged or ended worse than an untrained model, 2 something asked for cannot be,
    3 processes of the run no longer answer, 128 + n stopped by signal n.
    """
    try:
        asked = sys.argv[1] if len(sys.argv) > 1 else ""
        with one_speaks(), silenced():
            for name in (asked, " ".join(sys.argv[1:3])):
                if name in COMMANDS:
                    refuse_unknown(sys.argv[1:], flags_of(COMMANDS[name]), name)
            program(asked).cli(
                prog="spherelm", description="Train language models on the hypersphere: nGPT and its GPT baseline."
            )
    except SystemExit as end:  # the parser has said what it could not read
        if end.code == 2 and rank_and_size()[1] > 1:
            from spherelm.train.parallel import leave

            leave(lambda: None, 2)
        raise
    except BrokenPipeError:  # whoever reads the output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + 13) from None
    except UserError as error:
        stop(str(error), 2)
    except OSError as error:
        if error.errno is None:  # not of the system
            report_mistake()
            raise
        stop(str(error), 2)
    except KeyboardInterrupt:
        stop("interrupted", 130)
    except RuntimeError as error:
        code = exit_code(error)
        if code is None:
            report_mistake()
            raise
        if code == RANK_LOST:  # whichever process notices must say so, and wait for nobody
            print(f"spherelm: {error}", file=sys.stderr, flush=True)
            os._exit(code)
        stop(str(error), code)
    except Exception:
        report_mistake()
        raise


def report_mistake() -> None:
    """Say, before a traceback, whose mistake it is."""
    say(f"this is a mistake in spherelm {__version__}, not in what you asked for: please report it with what follows")


def exit_code(error: RuntimeError) -> int | None:
    """The exit code of an error that training raises on purpose, `None` for any other."""
    from spherelm.train.guard import Diverged
    from spherelm.train.parallel import ElsewhereFailed, RankLost
    from spherelm.train.signals import Interrupted

    if isinstance(error, Interrupted):
        return 128 + error.signal_number
    codes = {Diverged: 1, ElsewhereFailed: 2, RankLost: RANK_LOST}
    return codes.get(type(error))
