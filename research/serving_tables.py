"""The tables of docs/serving.md, from docs/results/serving.json, which `make serve-test` writes."""

from __future__ import annotations

from result_tables import NAMES, grid, read


def texts() -> str:
    """How many texts under vLLM are transformers' own."""
    rows = []
    for row in read("serving")["texts"]:
        arm, dtype = row["model"].split("-")
        gap, error = row["largest_gap_where_texts_part"], row["largest_difference_of_log_probabilities"]
        rows.append(
            [
                f"{NAMES[arm]}, {dtype}",
                f"{row['equal_texts']} of {row['prompts']}",
                "none part" if gap is None else f"{gap:.3f}",
                f"{error:.1e}",
                str(row["texts_that_transformers_writes_otherwise_with_eager_attention"]),
            ]
        )
    heads = ["equal texts", "largest gap where they part, nats", "largest difference of a log probability, nats"]
    return grid(["", *heads, "texts that transformers changes with eager attention"], rows)


def speed() -> str:
    """Tokens a second of the processor, and their ratios to both Llamas."""
    found = read("serving")["speed"]
    names = {
        "gpt": "GPT", "ngpt": "nGPT", "llama, transformers": "Llama by transformers' code", "llama, vllm": "vLLM's Llama"
    }  # fmt: skip
    heads = ["compiled" if each["compiled"] else "uncompiled" for each in found]
    rates = [
        [name, *(f"{each['tokens_per_processor_second'][key]:.0f}" for each in found)] for key, name in names.items()
    ]
    ratios = [
        [" / ".join(names[part] for part in key.split(" / ")), *(f"{each['ratios'][key]:.2f}" for each in found)]
        for key in found[0]["ratios"]
    ]
    first = grid(["tokens a second of the processor", *heads], rates)
    return first + "\n\n" + grid(["ratio, median of rounds", *heads], ratios)
