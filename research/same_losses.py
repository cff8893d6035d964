"""Record the losses of short seeded runs of every architecture, optimizer and recipe,
and compare them after a refactor.

    python research/same_losses.py record DIR [WORD ...]     # writes DIR/losses.json and the initial weights of each
    python research/same_losses.py compare DIR [WORD ...]    # trains again and asks for the same losses, to the bit

With words, only the runs whose names hold one of them. The names of arms are those of version 0.1.0.

Both sum the gradient norm in an order that does not depend on the order of parameters, and the second one starts from
the weights that the first one wrote, so that neither the order of parameters nor that of random draws matters. A run
whose own draws are unchanged is also counted. Everything runs on one thread.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import spherelm.train.trainer as trainer
from spherelm.data.pairs import PairFiles, PairSettings, prepare_pairs
from spherelm.recipes import make_run
from spherelm.recipes.named import WAYS

SIZES: dict[str, Any] = {"d_model": 32, "n_heads": 2, "seq_len": 32, "batch_size": 4, "steps": 8, "eval_every": 4}
RUN: dict[str, Any] = {**SIZES, "eval_windows": 8, "dtype": "float32", "compile": False, "lr": 1e-2}
DECODER = {**RUN, "n_layers": 2}
HYBRID = {**RUN, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk": 16, "n_experts": 4}
PAIRS = {**DECODER, "n_encoder_layers": 3}


def cases() -> dict[str, dict[str, Any]]:
    """The runs by name: arguments of `make_run`."""
    found: dict[str, dict[str, Any]] = {}
    for arm in ("gpt", "ngpt"):
        for recipe in WAYS:
            found[f"{arm}-{recipe}"] = {"arm": arm, "recipe": recipe, **DECODER}
        found[f"{arm}-tied-grouped"] = {
            "arm": arm,
            "recipe": "law",
            **DECODER,
            "tie_embeddings": True,
            "n_kv_heads": 1,
        }
        found[f"{arm}-documents"] = {"arm": arm, "recipe": "law", **DECODER, "mask_documents": True, "recompute": True}
        found[f"{arm}-bfloat16"] = {"arm": arm, "recipe": "law", **DECODER, "dtype": "bfloat16"}
        found[f"{arm}-compiled"] = {"arm": arm, "recipe": "law", **DECODER, "compile": True}
        found[f"{arm}-resumed"] = {"arm": arm, "recipe": "law", **DECODER, "save_every": 4}
    for name in ("no-qk-norm", "alpha-free", "riemannian", "s_z-fixed", "alpha-scalar", "s_uv-from-rsqrt-at-1"):
        found[f"ngpt-{name}"] = {"arm": "ngpt", "recipe": name, **DECODER}
    for arm in ("hybrid", "nhybrid"):
        for pattern in ("MA-O", "A-A-"):
            sizes = HYBRID if "M" in pattern else RUN
            found[f"{arm}-{pattern}"] = {"arm": arm, "recipe": "law", **sizes, "pattern": pattern}
        balanced = {**HYBRID, "pattern": "AOM-", "balance": "loss", "n_shared_experts": 1}
        found[f"{arm}-loss"] = {"arm": arm, "recipe": "law", **balanced}
        found[f"{arm}-compiled"] = {"arm": arm, "recipe": "law", **HYBRID, "pattern": "MA-O", "compile": True}
        found[f"{arm}-resumed"] = {"arm": arm, "recipe": "law", **HYBRID, "pattern": "MA-O", "save_every": 4}
    for arm in ("encdec", "nencdec"):
        found[f"{arm}"] = {"arm": arm, "recipe": "law", "preset": "pairs", **PAIRS}
        found[f"{arm}-tied"] = {"arm": arm, "recipe": "law", "preset": "pairs", **PAIRS, "tie_embeddings": True}
        found[f"{arm}-paper"] = {"arm": arm, "recipe": "paper", "preset": "pairs", **PAIRS}
        found[f"{arm}-compiled"] = {"arm": arm, "recipe": "law", "preset": "pairs", **PAIRS, "compile": True}
    for arm in ("encoder", "nencoder"):
        found[arm] = {"arm": arm, "recipe": "law", **DECODER}
        found[f"{arm}-resumed"] = {"arm": arm, "recipe": "law", **DECODER, "save_every": 4}
    return found


def make_pairs(directory: Path) -> Path:
    """Pairs of made-up sentences, always the same."""
    words = ["one", "two", "three", "four", "five", "six"]
    lines = [" ".join(words[(i * k) % 6] for k in range(1, 2 + i % 5)) for i in range(120)]
    files = []
    for split, chosen in (("train", lines[:100]), ("val", lines[100:])):
        source, target = directory / f"{split}.source", directory / f"{split}.target"
        source.write_text("".join(f"{line} {split}\n" for line in chosen), encoding="utf-8")
        target.write_text("".join(f"{line[::-1]}\n" for line in chosen), encoding="utf-8")
        files.append(PairFiles(source, target))
    prepare_pairs(files[0], directory / "data", files[1], PairSettings(tokenizer="bytes"))
    return directory / "data"


def ordered_clip(model: torch.nn.Module, limit: float | None) -> torch.Tensor:
    """`clip_gradients`, whose sum does not depend on the order of parameters."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    total = math.sqrt(math.fsum(float(grad.double().square().sum()) for grad in grads))
    if limit is not None and total > limit:
        for grad in grads:
            grad.mul_(limit / total)
    return torch.tensor(total)


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` by the names of today."""
    from spherelm.models.older import today

    return today(state)


class Start:
    """A replacement of `build` that notes the initial weights, or starts from those noted."""

    def __init__(self, path: Path, recording: bool) -> None:
        self.path, self.recording, self.build, self.same = path, recording, trainer.build, True

    def __call__(self, config: Any) -> torch.nn.Module:
        model = self.build(config)
        unique = {id(t): (n, t) for n, t in reversed(model.state_dict(keep_vars=True).items())}
        own = {name: tensor.detach().clone() for name, tensor in unique.values()}
        if self.recording:
            save_file(own, self.path)
        else:
            noted = renamed(load_file(self.path))
            assert own.keys() == noted.keys(), sorted(own.keys() ^ noted.keys())
            self.same = all(torch.equal(own[name], noted[name]) for name in own)
            model.load_state_dict(noted, strict=False)
        torch.manual_seed(123)
        return model


def losses(run: Path) -> list[float]:
    """All losses that a run has logged."""
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def carry_out(name: str, case: dict[str, Any], start: Start, pairs: Path) -> list[float]:
    """Train one case and return its losses."""
    given = dict(case)
    data = str(pairs) if "encdec" in given["arm"] else None
    if name.endswith("compiled"):
        torch.compiler.reset()
    from spherelm.data.sources import parse_data
    from spherelm.models.older import FORMER_ARMS

    arm = given.pop("arm")
    arm, architecture = FORMER_ARMS.get(arm, (arm, "decoder"))
    given.setdefault("preset", {"encoder": "encoder"}.get(architecture, "demo"))
    config = make_run(arm, vocab_size=parse_data(data).vocab_size, data=data, **given)
    trainer.build, trainer.clip_gradients, trainer.WORSE = start, ordered_clip, math.inf
    try:
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory) / "run"
            trainer.train(config, out, show_progress=False)
            if name.endswith("resumed"):
                shutil.rmtree(max((out / "checkpoints").iterdir()))
                trainer.train(config, out, resume=True, show_progress=False)
            return losses(out)
    finally:
        trainer.build = start.build


def main() -> None:
    """Record, or compare; exits 1 where a loss differs."""
    mode, directory = sys.argv[1], Path(sys.argv[2])
    only = sys.argv[3:]
    torch.set_num_threads(1)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "losses.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found, different, redrawn = {}, [], []
    with tempfile.TemporaryDirectory() as temporary:
        pairs = make_pairs(Path(temporary))
        for name, case in cases().items():
            if only and not any(word in name for word in only):
                continue
            start = Start(directory / f"{name}.safetensors", mode == "record")
            found[name] = carry_out(name, case, start, pairs)
            redrawn += [] if start.same else [name]
            gap = 0.0 if mode == "record" else max(abs(a - b) for a, b in zip(found[name], before[name], strict=True))
            different += [name] if gap else []
            print(f"{name:28s} {found[name][-1]:.6f}" + (f" differs by {gap:.1e}" if gap else ""), flush=True)
    if mode == "record":
        path.write_text(json.dumps({**before, **found}, indent=1) + "\n", encoding="utf-8")
        return
    print(f"{len(found)} runs, {len(different)} differ: {', '.join(different) or 'none'}")
    print(f"drawn in another order, compared from the recorded start: {', '.join(redrawn) or 'none'}")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
