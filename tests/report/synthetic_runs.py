"""A comparison's directory as `spherelm compare` leaves it, with made-up curves and small real models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from spherelm.data.output import write_json
from spherelm.experiments.speedup import speedup
from spherelm.models import build
from spherelm.optim import build_optimizer
from spherelm.recipes import make_run
from spherelm.runs.checkpoint import Progress, save_checkpoint
from spherelm.runs.config import to_dict

TOKENS_PER_STEP = 16 * 256
SHAPE = {"vocab_size": 96, "n_layers": 3, "d_model": 32, "n_heads": 2}
POINTS = 20


def validated(steps: int) -> np.ndarray:
    return np.linspace(0, steps, POINTS + 1)[1:].round().astype(int)


def curve(arm: str, steps: int, budget: int, seed: int) -> np.ndarray:
    """Validation loss at 1/20, 2/20, ... of a run: a power law that a decay bends down at the end."""
    at = validated(steps)
    floor, gain = {"gpt": (3.02, 1.0), "ngpt": (2.975, 1.15)}[arm]
    noise = np.random.default_rng(seed).normal(0, 0.004, at.size)
    decay = 0.22 * np.clip(at / steps - 0.3, 0, None) ** 1.5
    return floor + 5.3 * np.exp(-gain * at / (0.05 * budget)) + 0.95 / (1 + gain * at / (0.12 * budget)) - decay + noise


def write_run(directory: Path, arm: str, losses: np.ndarray, steps: int, seed: int, checkpoint: bool = True) -> None:
    directory.mkdir(parents=True)
    lines = []
    speed = {"gpt": 21_000, "ngpt": 18_500}[arm]
    for step, loss in zip(validated(steps).tolist(), losses.tolist(), strict=True):
        tokens = step * TOKENS_PER_STEP
        common = {"step": step, "tokens": tokens, "seconds": tokens / speed + 1.5}
        lines.append(
            {
                "kind": "train",
                **common,
                "loss": loss + 0.02,
                "lr": 1e-3,
                "grad_norm": 0.8,
                "tokens_per_second": speed + step % 7,
            }
        )
        lines.append({"kind": "val", **common, "loss": loss, "bits_per_byte": loss / np.log(2) / 3.6})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = make_run(arm, steps=steps, seed=seed, batch_size=16, **SHAPE)
    write_json(directory / "config.json", to_dict(config))
    if checkpoint:
        torch.manual_seed(seed)
        model = build(config.model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(torch.exp(0.2 * torch.randn_like(parameter)))
        optimizer = build_optimizer(model, config.optim)
        save_checkpoint(directory, model, optimizer, Progress(steps, lines[-1]["seconds"]), keep=1)


def write_comparison(
    directory: Path, seeds: int = 3, steps: int = 400, swap: bool = False, quick: bool = False, checkpoint: bool = True
) -> dict:
    """Write runs, `summary.json` and `samples.json`; returns the summary. `swap` makes GPT the better arm."""
    curves = {}
    for arm, shape in (("gpt", "ngpt"), ("ngpt", "gpt")) if swap else (("gpt", "gpt"), ("ngpt", "ngpt")):
        curves[arm] = [curve(shape, steps, steps, 10 * seed + len(arm)) for seed in range(seeds)]
        for seed, losses in enumerate(curves[arm]):
            write_run(directory / f"{arm}-{seed}", arm, losses, steps, seed, checkpoint)
    finals = {arm: [float(losses[-1]) for losses in of_arm] for arm, of_arm in curves.items()}
    short, winner = [], "gpt" if swap else "ngpt"
    for fraction in () if quick else (0.3, 0.5, 0.7):
        for seed in range(seeds):
            length, name = round(fraction * steps), f"{winner}-{seed}-steps{round(fraction * steps)}"
            losses = curve("ngpt", length, steps, 100 * seed + length)
            write_run(directory / name, winner, losses, length, seed, checkpoint=False)
            short.append(
                {
                    "run": name,
                    "seed": seed,
                    "steps": length,
                    "tokens": length * TOKENS_PER_STEP,
                    "final_loss": losses[-1],
                }
            )
    summary = {
        "arms": {arm: _arm(arm, finals[arm]) for arm in ("gpt", "ngpt")},
        "short_runs": short,
        "speedup": _speedup(finals, short, steps, quick),
        "step_time_ratio": 1.135,
        "config": {
            "preset": "demo", **SHAPE, "steps": steps, "seq_len": 256, "batch_size": 16, "seeds": seeds, "quick": quick,
            "data": {"path": "shipped", "fingerprint": "0f" * 32}, "dtype": "bfloat16",
        },
        "command": f"spherelm compare --out runs/demo --preset demo --steps {steps} --seeds {seeds}" + " --quick" * quick,
        "versions": {"python": "3.11.2", "torch": "2.13.0", "spherelm": "0.1.0"},
        "git_commit": "4f2a9c1" + "0" * 33,
        "wall_seconds": 437.2,
    }  # fmt: skip
    (directory / "summary.json").write_text(json.dumps(summary))
    (directory / "samples.json").write_text(json.dumps(SAMPLES))
    return summary


def _arm(arm: str, finals: list[float]) -> dict:
    return {
        "final_loss": float(np.mean(finals)),
        "final_loss_by_seed": finals,
        "final_loss_se": float(np.std(finals, ddof=1) / len(finals) ** 0.5) if len(finals) > 1 else None,
        "bits_per_byte": float(np.mean(finals)) / np.log(2) / 3.6,
        "tokens_per_second": {"gpt": 21_000, "ngpt": 18_500}[arm],
        "lr": {"gpt": 3e-3, "ngpt": 6e-3}[arm],
        "recipe": {"gpt": "law", "ngpt": "law"}[arm],
        "optimizer": {"gpt": "adamw", "ngpt": "muon"}[arm],
        "parameters": {"gpt": 5_312_512, "ngpt": 5_327_872}[arm],
        "runs": [f"{arm}-{seed}" for seed in range(len(finals))],
    }


def _speedup(finals: dict, short: list[dict], steps: int, quick: bool) -> dict:
    """By interpolation over the ends, the lower arm being the winner; a made-up factor in quick mode."""
    budget, seeds = steps * TOKENS_PER_STEP, len(finals["gpt"])
    winner, loser = sorted(finals, key=lambda arm: float(np.mean(finals[arm])))
    curves = [
        [(end["tokens"], end["final_loss"]) for end in short if end["seed"] == seed] + [(budget, finals[winner][seed])]
        for seed in range(seeds)
    ]
    result = speedup(finals, budget, curves, 1.135, "schedule-ends")
    if quick:
        reached = budget / 1.4
        factor = 1.4 if winner == "ngpt" else 1 / 1.4
        interval = [factor * 0.93, factor * 1.08] if seeds > 1 else None
        seconds = {"seconds": factor / 1.135, "seconds_interval": interval and [end / 1.135 for end in interval]}
        result |= {
            "method": "in-run",
            "tokens": factor,
            "tokens_interval": interval,
            "tokens_to_reach": reached,
            "bound": None,
        }
        result |= seconds
    assert loser != winner
    return result


SAMPLES = {
    "prompt": "It was a dark evening when the carriage",
    "gpt": [
        "It was a dark evening when the carriage of the house was so much to be seen, and the old man was a little of the "
        "world, that he had been in the street, and the whole of the company was in the same manner.\n\n“I have not been "
        "so much in the house,” said the other, “that you would have been to see him.”",
        "It was a dark evening when the carriage was of the same, and the same was the first of the men of the country.",
    ],
    "ngpt": [
        "It was a dark evening when the carriage drew up before the inn. The landlord came out with a lantern in his hand, "
        "and bade them enter; for the rain, he said, would not be over before the morning.\n\n“You are late, sir,” he "
        "added, “and the horses are tired.”",
        "It was a dark evening when the carriage stopped at the gate, and the servant, who had been waiting, opened it.",
    ],
}
