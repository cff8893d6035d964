"""The command line: parses arguments, calls the floor below,
and turns what users got wrong into one line and exit code 2.

Everything heavy is imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import os
import select
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from textwrap import fill
from typing import NoReturn

from spherelm import __version__
from spherelm.cli import evaluation, inspection, listing, text, timing, trained, training
from spherelm.cli.parser import Command, about, parse, parser_of
from spherelm.errors import UserError, nearest
from spherelm.progress import say
from spherelm.third_parties import silenced

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says of a full disk, without a path."""

RANK_LOST = 3
"""Exit code of a run whose other processes no longer answer."""

COMMANDS: dict[str, Command] = {
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
    "doctor": timing.doctor,
    "list": listing.list_,
    "data prepare": text.prepare,
    "data tokenizer": text.tokenizer,
    "data convert": text.convert,
    "data pairs": text.pairs,
    "data verify": text.verify,
    "import nvidia": trained.import_nvidia,
    "import hub": trained.import_hub,
}
"""Every command by its whole name, in the order in which `--help` lists them."""

ALSO = {"presets": ["list", "presets"], "recipes": ["list", "recipes"]}
"""Short names of a command with its first argument."""


def run(words: Sequence[str]) -> None:
    """Do what a shell's `spherelm WORD ...` asks for."""
    words = [*ALSO.get(words[0], words[:1]), *words[1:]] if words else ["--help"]
    name = next((name for name in (" ".join(words[:2]), words[0]) if name in COMMANDS), None)
    group = [name for name in COMMANDS if name.startswith(f"{words[0]} ")]
    wants_help = bool({"-h", "--help"} & set(words))
    if name is not None and wants_help:
        print(parser_of(COMMANDS[name], name).format_help(), end="")
    elif name is not None:
        COMMANDS[name](**parse(COMMANDS[name], name, words[len(name.split()) :]))
    elif words == ["--version"]:
        print(f"spherelm {__version__}")
    elif wants_help and (group or len(words) == 1):
        print(overview(group or list(COMMANDS)))
    else:
        asked = " ".join(words[:2] if group else words[:1])
        raise UserError(f"no command {asked!r}{nearest(asked, COMMANDS)}: spherelm --help lists them")


def overview(names: Sequence[str]) -> str:
    """The commands of these names, and what each is for."""
    width = max(map(len, names)) + 4
    texts = [about(COMMANDS[name]) for name in names]
    return "\n".join(
        [
            "usage: spherelm COMMAND [arguments and flags]\n",
            "Train language models on the hypersphere: nGPT and its GPT baseline.\n",
            *(
                fill(f"  {name:{width - 2}}{text}", 110, subsequent_indent=" " * width)
                for name, text in zip(names, texts, strict=True)
            ),
            "\nspherelm COMMAND --help describes a command; spherelm --version prints the version.",
            "Lists are separated by commas or spaces; a repeated flag adds to its list.",
        ]
    )


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


def stop(message: str, code: int) -> NoReturn:
    """Say one line and leave with `code`; of several processes, which all end so, one says it."""
    if rank_and_size()[1] > 1:
        from spherelm.train.parallel import leave

        leave(lambda: say(message), code)
    say(message)
    raise SystemExit(code)


def main() -> None:
    """Run the command line. Other libraries are `silenced`; their errors are not.

    Exit codes: 0 done, 1 the training diverged or ended worse than an untrained model, or `doctor` found a fault, 2 a
    request that cannot be met, 3 processes of the run no longer answer, 128 + n stopped by signal n.
    """
    try:
        with one_speaks(), silenced():
            run(sys.argv[1:])
            sys.stdout.flush()  # here, where a reader that is gone is noticed
    except UserError as error:
        stop(str(error), 2)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and nobody_reads():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise SystemExit(128 + 13) from None
        if error.filename is None and error.errno not in FULL:
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


def nobody_reads() -> bool:
    """Whether the reader of the output has seen enough, as `head` does;
    other pipes may break too, and that is an error.
    """
    ends = select.poll()
    for output in (1, 2):
        ends.register(output, 0)
    return any(event & select.POLLERR for _, event in ends.poll(0))


def report_mistake() -> None:
    """Say, before a traceback, whose mistake it is."""
    say(f"this is a bug in spherelm {__version__}: please report it with the traceback below")


def exit_code(error: RuntimeError) -> int | None:
    """The exit code of an error that training raises on purpose, `None` for any other."""
    from spherelm.train.guard import Diverged
    from spherelm.train.parallel import ElsewhereFailed, RankLost
    from spherelm.train.signals import Interrupted

    if isinstance(error, Interrupted):
        return 128 + error.signal_number
    codes = {Diverged: 1, ElsewhereFailed: 2, RankLost: RANK_LOST}
    return codes.get(type(error))
