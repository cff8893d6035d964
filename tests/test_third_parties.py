"""Other libraries print nothing while a command runs: stderr holds our own lines.
Errors and our own warnings get through.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tiny

from spherelm.third_parties import silence, silenced
from spherelm.train.trainer import train

UNASKED = {name: value for name, value in os.environ.items() if name not in ("PYTHONWARNINGS", "TORCH_LOGS")}


def warn_as(module: str) -> None:
    """A warning about a line of `module`."""
    warnings.warn_explicit("spoken", UserWarning, "some.py", 7, module=module)


def test_others_are_silenced_and_errors_and_our_own_warnings_are_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "warnoptions", [])
    monkeypatch.delenv("TORCH_LOGS", raising=False)
    other = logging.getLogger("some.library")
    with silenced():
        for level in (logging.INFO, logging.WARNING, logging.ERROR):
            other.log(level, "level %d", level)
        for module in ("some.library", "spherelmish"):
            warn_as(module)
        for module in ("spherelm", "spherelm.train.trainer"):
            with pytest.raises(UserWarning, match="spoken"):  # as the tests' filters make of any warning
                warn_as(module)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


def test_all_is_as_before_afterwards(caplog: pytest.LogCaptureFixture) -> None:
    before = dict(os.environ), list(warnings.filters), logging.root.manager.disable
    with pytest.raises(ValueError, match="of the command"), silenced():
        raise ValueError("of the command")
    assert (dict(os.environ), list(warnings.filters), logging.root.manager.disable) == before
    logging.getLogger("some.library").warning("heard")
    assert caplog.messages == ["heard"]
    with pytest.warns(UserWarning, match="spoken"):
        warn_as("some.library")


@pytest.mark.parametrize("asked", ["-W", "TORCH_LOGS"])
def test_who_asks_hears_everything(
    asked: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "warnoptions", ["default"] if asked == "-W" else [])
    monkeypatch.setenv("TORCH_LOGS", "recompiles") if asked == "TORCH_LOGS" else None
    with silenced():
        logging.getLogger("some.library").warning("heard")
        with pytest.warns(UserWarning, match="spoken"):
            warn_as("some.library")
    assert caplog.messages == ["heard"]


def test_a_choice_of_ones_own_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    with silenced():
        silence()
        assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "0"
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "0"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("quiet")
    train(tiny.run_config("ngpt", tiny.make_data(place), steps=2), place / "run", show_progress=False)
    return place / "run"


HANDLERS = """
import logging
from spherelm.evaluate.harness import check_harness

check_harness()
loggers = [logging.root, *logging.root.manager.loggerDict.values()]
handlers = [handler for logger in loggers for handler in getattr(logger, "handlers", [])]
closed = [handler for handler in handlers if getattr(getattr(handler, "stream", None), "closed", False)]
assert handlers and not closed, closed
"""
Ended = dict[str, tuple[int, list[str]]]


@pytest.fixture(scope="module")
def ended(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The exit codes and the lines on stderr of processes that run side by side:
    one of them waits for half a minute.
    """
    place, tasks = tmp_path_factory.mktemp("ended"), ["-m", "spherelm", "eval", run, "--tasks", "arc_easy"]
    asked: dict[str, tuple[list[object], dict[str, str]]] = {
        "export": (["-m", "spherelm", "export", run, place / "out"], {}),
        # As without a network: tried again and again.
        "unreachable": (tasks, {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(place / "a")}),
        "offline": (tasks, {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "b")}),
        "handlers": (["-c", HANDLERS], {}),
    }
    begun = {
        name: subprocess.Popen(
            [sys.executable, *map(str, words)],
            env=UNASKED | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, (words, variables) in asked.items()
    }
    errors = {name: process.communicate()[1] for name, process in begun.items()}
    return {name: (begun[name].returncode, said.splitlines()) for name, said in errors.items()}


@pytest.mark.slow
def test_export_prints_nothing_of_others(ended: Ended) -> None:
    pytest.importorskip("transformers", reason="needs the extra hf")
    assert ended["export"] == (0, [])


@pytest.mark.slow
@pytest.mark.parametrize("network", ["offline", "unreachable"])
def test_tasks_that_cannot_be_had_are_one_line(network: str, ended: Ended) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    code, (line,) = ended[network]
    assert code == 2
    assert line.startswith("spherelm: the data of arc_easy cannot be downloaded (")
    assert line.endswith("check the network, or give --task-data DIR")


@pytest.mark.slow
def test_the_logs_of_what_the_harness_imports_have_somewhere_to_go(ended: Ended) -> None:
    """Whatever a library logs there later is a traceback of logging else."""
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    assert ended["handlers"][0] == 0, ended["handlers"][1]
