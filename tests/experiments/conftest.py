"""Runs done here instead of in processes of their own."""

from __future__ import annotations

import pytest
import tiny

from spherelm.experiments import comparison, evidence, sweep
from spherelm.experiments.jobs import Job, do_job
from spherelm.recipes import PRESETS


@pytest.fixture
def jobs_done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes the preset "tiny", and `compare` and `sweep` do their runs in this process; the names of runs, in order."""
    done: list[str] = []

    def run_here(jobs: list[Job], workers: int | None = None, description: str = "") -> list[float]:
        done.extend(job.out.name for job in jobs)
        return [do_job(job) for job in jobs]

    monkeypatch.setitem(PRESETS, "tiny", tiny.PRESET)
    monkeypatch.setattr(comparison, "run_jobs", run_here)
    monkeypatch.setattr(sweep, "run_jobs", run_here)
    monkeypatch.setattr(evidence, "run_jobs", run_here)
    return done
