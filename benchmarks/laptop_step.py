"""The cost of a small run's step on few cores, and the part of it that is not the model's own products.

python benchmarks/laptop_step.py step muon --json docs/results/laptop.json
python benchmarks/laptop_step.py step muon --other OTHER_CHECKOUT/src
python benchmarks/laptop_step.py threads dtype dtype-compiled cold ladder

Each of what is compared is a process of its own with a model of the demo's shape (4 layers, 128 wide, 4 sequences of
256, vocabulary 4096) or, for `ladder`, of the preset 0.3m; they take turns, a few steps at a time, and ratios are
medians over the turns. --other: the src of another checkout, whose figures stand beside as "other". On one thread time
is the processor's, which other work touches little; else the clock's.

step: nGPT over GPT, and each over its own products, which are recorded and timed alone, in their shapes (the
optimizer's and attention's are not among them). muon: its part of a step. threads: the number that a run chooses, with
and without another program on one core, over one thread alone. dtype: "auto" over the better format. cold: seconds of
compiling with empty caches.
ladder: tokens a second of a compiled step of 0.3m on two threads.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

OWN = Path(__file__).resolve().parents[1] / "src"
DEMO, SMALLEST = "4,128,2,256,4,4096", "4,64,1,256,4,4096"
BUSY = "while True: pass"


class Child:
    """A process with the code in `src` and one model, which follows commands."""

    def __init__(self, src: Path, arm: str, dtype: str = "float32", threads: int | None = 1, **more: Any) -> None:
        asked = {"arm": arm, "dtype": dtype, "threads": threads, "compiled": False, "shape": DEMO, **more}
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | more.pop("environment", {})
        words = [sys.executable, __file__, "--child", json.dumps({"src": str(src), **asked}, default=str)]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd="/"
        )
        self.ready = self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a process that was to be measured has ended")
        return json.loads(line)

    def ask(self, what: str) -> Any:
        assert self.process.stdin is not None
        print(what, file=self.process.stdin, flush=True)
        return self.answer()

    def steps(self, count: int = 4) -> float:
        """Median seconds of a step, of so many."""
        return statistics.median(self.ask(f"steps {count}"))

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def child(asked: dict[str, Any]) -> None:
    """The loop of a child process: takes steps, or times their products, one command a line."""
    sys.path.insert(0, asked["src"])
    import torch

    if asked["threads"] is not None:
        torch.set_num_threads(asked["threads"])
    from spherelm.experiments.bench import configs, parse_shape
    from spherelm.experiments.cost import TimedSteps

    shape = parse_shape(asked["shape"])
    start = time.perf_counter()
    steps = TimedSteps(configs(shape, asked["dtype"], asked["compiled"])[asked["arm"]])
    seconds = time.perf_counter() - start
    choose = chooser(steps) if asked["threads"] is None else (lambda: None)
    clock = time.process_time if asked["threads"] == 1 else time.perf_counter

    def taken(action: Callable[[], object]) -> float:
        start = clock()
        action()
        return clock() - start

    for _ in range(0 if asked.get("cold") else 8):
        steps.time_step()
    known = {
        "steps": lambda count: [taken(steps.time_step) for _ in range(count)],
        "products": lambda count: [products_seconds(steps, taken) for _ in range(count)],
        "muon": lambda count: [muon_seconds(steps, taken) for _ in range(count)],
        "choose": lambda count: [choose() or torch.get_num_threads() for _ in range(count)],
        "dtype": lambda count: str(steps.model.runtime.compute_dtype),
    }
    print(json.dumps({"made": seconds, "threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        what, _, count = line.partition(" ")
        print(json.dumps(known[what.strip()](int(count or 1))), flush=True)


def chooser(steps: Any) -> Callable[[], None]:
    """A callable that sets the number of threads as a run does at its start;
    it does nothing in code that does not choose.
    """
    try:
        from spherelm.train.rehearsal import matrices
        from spherelm.train.threads import Rehearsal, Threads
    except ImportError:
        return lambda: None
    import torch

    limit, dtype = torch.get_num_threads(), steps.model.runtime.compute_dtype
    rehearsal = Rehearsal(matrices(steps.model), steps.tokens.numel(), dtype)
    return lambda: Threads(limit, rehearsal) and None


def products_seconds(steps: Any, taken: Callable[[Callable[[], object]], float]) -> float:
    """Of the matrix products of one forward and backward pass alone: each as it is laid out, the best of five."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    found: Counter[tuple[Any, ...]] = Counter()

    class Recorder(TorchDispatchMode):
        """Counts matrix products by the shapes, strides and formats of their factors."""

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            """Note one product, and compute it."""
            if function._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
                found[tuple((tuple(x.shape), x.stride(), x.dtype) for x in args[-2:])] += 1
            return function(*args, **(kwargs or {}))

    with Recorder():
        steps.model.loss(steps.tokens, steps.targets).backward()
    steps.optimizer.zero_grad()
    total = 0.0
    for key, count in found.items():
        a, b = (torch.empty_strided(size, stride, dtype=dtype).fill_(0.5) for size, stride, dtype in key)
        total += count * min(taken(lambda a=a, b=b: torch.mm(a, b)) for _ in range(5))
    return total


def muon_seconds(steps: Any, taken: Callable[[Callable[[], object]], float]) -> float:
    """Of an update what is neither Adam's nor the hooks'."""
    steps.model.loss(steps.tokens, steps.targets).backward()
    optimizer = steps.optimizer
    groups = [group for group in optimizer.param_groups if group["muon"]]
    import torch

    with torch.no_grad():
        seconds = taken(lambda: [optimizer._turn_all(group) for group in groups])
        from spherelm.layers.linear import retract

        retract(steps.model)
    optimizer.zero_grad()
    return seconds


def ratios(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def step(sources: dict[str, Path], turns: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    with ExitStack() as stack:
        models = {
            (name, arm): stack.enter_context(Child(src, arm))
            for name, src in sources.items()
            for arm in ("gpt", "ngpt")
        }
        times: dict[Any, list[float]] = {key: [] for key in models}
        products: dict[Any, list[float]] = {key: [] for key in models}
        for _ in range(turns):
            for key, model in models.items():
                times[key].append(model.steps(2))
                products[key] += model.ask("products")
    for name in sources:
        result[name] = {
            "step_ms": {arm: 1e3 * statistics.median(times[name, arm]) for arm in ("gpt", "ngpt")},
            "ngpt_over_gpt": ratios(times[name, "ngpt"], times[name, "gpt"]),
            "step_over_products": {arm: ratios(times[name, arm], products[name, arm]) for arm in ("gpt", "ngpt")},
        }
    if "other" in sources:
        result["own_over_other"] = {arm: ratios(times["own", arm], times["other", arm]) for arm in ("gpt", "ngpt")}
    return result


def muon(sources: dict[str, Path], turns: int) -> dict[str, Any]:
    with ExitStack() as stack:
        models = {name: stack.enter_context(Child(src, "ngpt")) for name, src in sources.items()}
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        for _ in range(turns):
            for name, model in models.items():
                found[name].append((statistics.median(model.ask("muon 3")), model.steps(2)))
    return {
        name: {"share": statistics.median(a / b for a, b in pairs), "ms": 1e3 * statistics.median(a for a, _ in pairs)}
        for name, pairs in found.items()
    }


def threads(sources: dict[str, Path], turns: int) -> dict[str, Any]:
    """Seconds of a step of nGPT over those of one thread alone;
    the number is chosen when the other program comes or goes.
    """
    with ExitStack() as stack:
        models = {"one thread": stack.enter_context(Child(OWN, "ngpt", threads=1))}
        models |= {"two threads": stack.enter_context(Child(OWN, "ngpt", threads=2))}
        models |= {name: stack.enter_context(Child(src, "ngpt", threads=None)) for name, src in sources.items()}
        busy = stack.enter_context(subprocess.Popen([sys.executable, "-c", BUSY]))
        stack.callback(busy.kill)
        times: dict[tuple[str, str], list[float]] = {}
        chosen: dict[tuple[str, str], list[int]] = {}
        for _ in range(turns):
            for about, number in (("alone", signal.SIGSTOP), ("beside a program", signal.SIGCONT)):
                busy.send_signal(number)
                time.sleep(0.1)
                for name, model in models.items():
                    chosen.setdefault((name, about), []).extend(model.ask("choose"))
                    times.setdefault((name, about), []).append(model.steps(4))
        busy.send_signal(signal.SIGCONT)
    base = times["one thread", "alone"]
    return {f"{name}, {about}": ratios(found, base) for (name, about), found in times.items()} | {
        "chosen": {f"{name}, {about}": found for (name, about), found in chosen.items() if name in sources}
    }


def dtype(sources: dict[str, Path], turns: int, compiled: bool = False) -> dict[str, Any]:
    """Speed of "auto" over that of the better format."""
    formats = ("auto", "float32", "bfloat16")
    with ExitStack() as stack:
        models = {name: stack.enter_context(Child(OWN, "ngpt", name, compiled=compiled)) for name in formats}
        came_to = models["auto"].ask("dtype")
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(turns):
            for name, model in models.items():
                times[name].append(model.steps(1))
    best = min(formats[1:], key=lambda name: statistics.median(times[name]))
    return {
        "auto is": came_to,
        "bfloat16_over_float32": ratios(times["bfloat16"], times["float32"]),
        "speed_over_the_better": ratios(times[best], times["auto"]),
    }


def cold(sources: dict[str, Path], turns: int) -> dict[str, Any]:
    """Seconds from nothing to a compiled model of the demo's shape, on two threads."""
    found: dict[str, list[float]] = {name: [] for name in sources}
    for _ in range(max(1, turns // 5)):
        for name, src in sources.items():
            with tempfile.TemporaryDirectory() as empty:
                environment = {"TMPDIR": empty, "TORCHINDUCTOR_CACHE_DIR": f"{empty}/cache"}
                with Child(src, "ngpt", threads=2, compiled=True, cold=True, environment=environment) as one:
                    found[name].append(one.ready["made"])
    return {name: statistics.median(values) for name, values in found.items()}


def ladder(sources: dict[str, Path], turns: int) -> dict[str, Any]:
    """Tokens a second of 0.3m, 1024 an update, compiled, on two threads."""
    with ExitStack() as stack:
        models = {
            name: stack.enter_context(Child(src, "ngpt", threads=2, compiled=True, shape=SMALLEST))
            for name, src in sources.items()
        }
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(turns):
            for name, model in models.items():
                times[name].append(model.steps(8))
    result: dict[str, Any] = {name: 1024 / statistics.median(values) for name, values in times.items()}
    return result | ({"own_over_other": ratios(times["other"], times["own"])} if "other" in times else {})


MEASURES: dict[str, Callable[[dict[str, Path], int], dict[str, Any]]] = {
    "step": step,
    "muon": muon,
    "threads": threads,
    "dtype": dtype,
    "dtype-compiled": partial(dtype, compiled=True),
    "cold": cold,
    "ladder": ladder,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "measures", nargs="*", choices=[*MEASURES, []], help="some of the above; all where none is given"
    )
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--other", type=Path, help="src of another checkout")
    parser.add_argument("--json", type=Path, help="file for the results, added to what is there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(json.loads(arguments.child))
        return
    sources = {"own": OWN} | ({"other": arguments.other.resolve()} if arguments.other else {})
    record = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else {}
    for name in arguments.measures or MEASURES:
        found = MEASURES[name](sources, arguments.turns)
        record[name] = json.loads(json.dumps(found), parse_float=lambda text: float(f"{float(text):.4g}"))
        print(json.dumps({name: record[name]}, indent=1), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
