"""vLLM serves folded models: texts, an OpenAI client, tokens per second.
Run by `make serve-test` in vLLM's environment.

build/serving-env/bin/python tests/serving/check.py build/serving --json docs/results/serving.json

There is no spherelm in that environment: the folders bring their code along. What is checked:
- Greedy texts over 50 prompts of many lengths, all at once, are those that transformers writes prompt by
prompt. In float32
  all are equal. In bfloat16 a rounding may decide between two tokens: wherever texts part, transformers must hold the
  two tokens as good as tied, and the same count is taken of transformers against itself with another
  attention function.
- `vllm serve` answers a request of the OpenAI protocol with the same text.
- Tokens per second beside a Llama of the same shape with random weights, the engines taking turns, in
processor time on one
  thread, which other work on the machine hardly touches. Ratios are medians of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
QUIET = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
HERE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""Engines are in this process, whose processor time is theirs, and which imports vLLM once for all."""

os.environ.update({**THREADS, **SETTINGS, **QUIET, **HERE})

import torch  # noqa: E402
import transformers  # noqa: E402
import vllm  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

NEW = 32
"""Tokens that are written after each prompt."""

TIED = 0.25
"""Nats: two tokens whose logits are as near as that may change places in bfloat16,
whose steps are 1/8 at a logit of 16.
"""

PORT = 8731

VLLM = """
import importlib.metadata as found, sys
version = found.version
found.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main
    sys.exit(main())
"""
"""The command `vllm`, which asks for the version of the distribution `vllm`; here it is called vllm-cpu."""


# ---- Texts


def their_texts(model: Any, rows: Iterable[list[int]]) -> list[list[int]]:
    """What transformers writes greedily after each prompt, one at a time."""
    made = (model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False) for ids in rows)
    return [out[0, len(ids) :].tolist() for out, ids in zip(made, rows, strict=True)]


def log_probabilities(model: Any, prompt: list[int], text: list[int]) -> torch.Tensor:
    """Of every token at each place of `text`: [len(text), vocab]."""
    logits = model(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1)


def difference(ours: list[int], theirs: list[int]) -> int | None:
    """The place where two texts part."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)


@torch.no_grad()
def compare_texts(folder: Path, dtype: str, prompts: list[str]) -> dict[str, Any]:
    """vLLM's texts beside transformers'."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype).eval()
    rows = tokenizer(prompts).input_ids
    wanted = their_texts(model, rows)
    engine = vllm.LLM(str(folder), trust_remote_code=True, dtype=dtype, enforce_eager=True)
    sampling = vllm.SamplingParams(temperature=0, max_tokens=NEW, logprobs=1)
    found = engine.generate(prompts, sampling, use_tqdm=False)
    model.model.do_not_compile = True  # what vLLM, which has changed the class in this process, asks before each pass
    assert [list(each.prompt_token_ids) for each in found] == rows, "vLLM reads a prompt as other tokens"
    ties, errors = [], []
    for ids, theirs, each in zip(rows, wanted, found, strict=True):
        out = each.outputs[0]
        ours = list(out.token_ids)
        own = log_probabilities(model, ids, ours)
        reported = torch.tensor([at[token].logprob for at, token in zip(out.logprobs, ours, strict=True)])
        errors.append((own.gather(-1, torch.tensor(ours)[:, None])[:, 0] - reported).abs().max().item())
        if (place := difference(ours, theirs)) is not None:
            ties.append((own[place, theirs[place]] - own[place, ours[place]]).abs().item())
        else:
            assert ours == theirs
    model.set_attn_implementation("eager")
    again = sum(a != b for a, b in zip(their_texts(model, rows), wanted, strict=True))
    return {
        "model": folder.name,
        "dtype": dtype,
        "prompts": len(rows),
        "prompt_tokens": [min(map(len, rows)), max(map(len, rows))],
        "new_tokens": NEW,
        "equal_texts": len(rows) - len(ties),
        "largest_gap_where_texts_part": max(ties, default=None),
        "largest_difference_of_log_probabilities": max(errors),
        "texts_that_transformers_writes_otherwise_with_eager_attention": again,
    }


# ---- An OpenAI client


def post(path: str, body: dict[str, Any]) -> Any:
    """The server's answer."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def wait_for(server: subprocess.Popen[bytes], seconds: float) -> None:
    """Until the server says that it is well."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5):
                return
        except OSError:
            time.sleep(2)
    raise RuntimeError(f"vllm serve did not start; its exit code: {server.poll()}")


def ask_server(folder: Path, prompt: str) -> dict[str, Any]:
    """One request to `vllm serve`, as the model's card has it; the server is stopped afterwards."""
    command = [sys.executable, "-c", VLLM, "serve", str(folder), "--trust-remote-code", "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", str(PORT), "--served-model-name", folder.name, "--enforce-eager"]
    surroundings = {name: value for name, value in os.environ.items() if name not in HERE}
    server = subprocess.Popen(command, env=surroundings)
    try:
        wait_for(server, 900)
        answer = post("/v1/completions", {"model": folder.name, "prompt": prompt, "max_tokens": NEW, "temperature": 0})
    finally:
        server.terminate()
        server.wait(60)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    wanted = tokenizer.decode(their_texts(model, tokenizer([prompt]).input_ids)[0], skip_special_tokens=True)
    assert answer["choices"][0]["text"] == wanted, (answer, wanted)
    return {"model": folder.name, "prompt": prompt, "text": wanted, "usage": answer["usage"]}


# ---- Speed


def start(folder: Path, compiled: bool, **settings: Any) -> vllm.LLM:
    """An engine."""
    return vllm.LLM(
        str(folder),
        trust_remote_code=True,
        dtype="float32",
        enforce_eager=not compiled,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_num_batched_tokens=1024,
        **settings,
    )


def rates_of(engine: vllm.LLM, rows: list[list[int]], new: int) -> tuple[float, float]:
    """Tokens written for a second of the processor, and for one of the clock."""
    sampling = vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    busy, start = time.process_time(), time.perf_counter()
    out = engine.generate([{"prompt_token_ids": ids} for ids in rows], sampling, use_tqdm=False)
    busy, seconds = time.process_time() - busy, time.perf_counter() - start
    made = sum(len(each.outputs[0].token_ids) for each in out)
    return made / busy, made / seconds


def compare_speed(folders: Path, compiled: bool, rounds: int, batch: int, length: int, new: int) -> dict[str, Any]:
    """Rates of all engines, and their ratios to the two Llamas."""
    engines = {
        "gpt": start(folders / "speed-gpt", compiled),
        "ngpt": start(folders / "speed-ngpt", compiled),
        "llama, transformers": start(folders / "speed-llama", compiled, model_impl="transformers"),
        "llama, vllm": start(folders / "speed-llama", compiled, model_impl="vllm"),
    }
    torch.manual_seed(0)
    rows = torch.randint(1, 8192, (batch, length)).tolist()
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for i in range(rounds + 1):
        names = list(engines)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            found = rates_of(engines[name], rows, new)
            if i:
                rates[name].append(found)
    llamas = [name for name in engines if name.startswith("llama")]
    return {
        "compiled": compiled,
        "dtype": "float32",
        "batch": batch,
        "prompt": length,
        "new": new,
        "rounds": rounds,
        "tokens_per_processor_second": {k: statistics.median(a for a, _ in v) for k, v in rates.items()},
        "tokens_per_second": {k: statistics.median(b for _, b in v) for k, v in rates.items()},
        "ratios": {
            f"{arm} / {llama}": statistics.median(
                a / b for (a, _), (b, _) in zip(rates[arm], rates[llama], strict=True)
            )
            for arm in ("gpt", "ngpt")
            for llama in llamas
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("texts", "server", "speed"), help="the file keeps what it has of the others")
    args = parser.parse_args()
    torch.set_num_threads(1)
    versions = {"vllm": vllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    versions |= {"cpus": os.cpu_count(), "machine": platform.machine()}
    prompts = json.loads((args.folders / "prompts.json").read_text(encoding="utf-8"))

    def keep(part: str, found: Any) -> None:
        print(part, json.dumps(found), flush=True)
        kept = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {}
        args.json.write_text(json.dumps({**kept, **versions, part: found}, indent=1) + "\n", encoding="utf-8")

    # First, since transformers cannot make a model of a class that an engine in this process has changed.
    if args.only in (None, "server"):
        keep("server", ask_server(args.folders / "ngpt-float32", prompts[5]))
    if args.only in (None, "texts"):
        names = [(arm, dtype) for dtype in ("float32", "bfloat16") for arm in ("gpt", "ngpt")]
        rows = [compare_texts(args.folders / f"{arm}-{dtype}", dtype, prompts) for arm, dtype in names]
        keep("texts", rows)
        for row in rows:
            gap = row["largest_gap_where_texts_part"] or 0.0
            assert row["equal_texts"] == row["prompts"] or (row["dtype"] == "bfloat16" and gap <= TIED), row
    if args.only in (None, "speed"):
        keep("speed", [compare_speed(args.folders, compiled, args.rounds, 8, 32, 64) for compiled in (False, True)])


if __name__ == "__main__":
    main()
