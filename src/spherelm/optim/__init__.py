"""Optimizers for both arms: parameter groups by role, retraction, schedules."""

from __future__ import annotations

from spherelm.optim.balancing import attach_balancing
from spherelm.optim.groups import OptimConfig, RateMultipliers, build_optimizer, parameter_roles
from spherelm.optim.retraction import attach_retraction
from spherelm.optim.rules import RULES, AdamW, GatedAdamW, Muon
from spherelm.optim.schedule import ScheduleConfig, factor

__all__ = [
    "RULES",
    "AdamW",
    "GatedAdamW",
    "Muon",
    "OptimConfig",
    "RateMultipliers",
    "ScheduleConfig",
    "attach_balancing",
    "attach_retraction",
    "build_optimizer",
    "factor",
    "parameter_roles",
]
