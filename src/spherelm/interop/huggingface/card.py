"""The model card of an exported run: what the model is, how it came about, how to load it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spherelm.generation import DRAW
from spherelm.interop.huggingface.hub import Result, front_matter

ARM_NAMES = {
    "gpt": "GPT (pre-norm, RMSNorm, rotary embedding, SwiGLU), the baseline of the nGPT paper",
    "ngpt": "nGPT, the normalized Transformer (arXiv 2410.01131): weights and hidden states are unit vectors",
}
KIND_NAMES = {
    "decoder": "a language model",
    "pattern": "a language model of Mamba-2, attention, MLP and experts",
    "encdec": "an encoder-decoder",
}


@dataclass(frozen=True)
class Purpose:
    """The purpose of a kind of model. auto: the class that loads it. prompt, settings: of the example in its card."""

    auto: str
    pipeline: str
    summary: str
    prompt: str
    settings: str


WRITES_ON = Purpose(
    "AutoModelForCausalLM",
    "text-generation",
    "A language model trained by spherelm. It continues text. It is no chat model: it was not taught to follow "
    "instructions, has no chat template, and what it writes need not be true or kind.",
    "It was",
    ", ".join(["max_new_tokens=40, do_sample=True", *(f"{name}={value}" for name, value in DRAW.items())]),
)
READS_AND_WRITES = Purpose(
    "AutoModelForSeq2SeqLM",
    "text2text-generation",
    "An encoder-decoder trained by spherelm on pairs of texts. It reads a text like those it was trained on and writes "
    "another, which need not be right. Chat is out of its scope.",
    "A text to read.",
    "max_new_tokens=40, num_beams=5, do_sample=False",
)
FEW_BITS = ("fp8", "nvfp4")
"""Formats of matrices alone, which are stored as tensors of torchao."""

TASKS = ("arc_easy", "hellaswag", "winogrande", "wsc273", "lambada_openai")
"""The tasks in the card's lm_eval command if no scores are known: the nGPT paper's five."""

PURPOSES = {"decoder": WRITES_ON, "encdec": READS_AND_WRITES}
"""By architecture."""


@dataclass(frozen=True)
class Facts:
    """The facts that a card states.

    config: the run's config.json. validation: the last record of kind "val" up to `step`. tasks: scores
    by task and metric.
    datasets: names on the hub of what the text is. license: of the weights, as the hub names it.
    address: loads the model.
    """

    name: str
    config: Mapping[str, Any]
    step: int
    parameters: int
    validation: Mapping[str, Any] | None
    dtype: str
    standalone: bool
    has_tokenizer: bool
    folded: bool = False
    tasks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    datasets: Sequence[str] = ()
    license: str | None = None
    address: str = "PATH"

    @property
    def purpose(self) -> Purpose:
        """The purpose of the model."""
        return PURPOSES[self.config["model"]["architecture"]["kind"]]


def two_columns(rows: Iterable[tuple[str, object]]) -> str:
    """A Markdown table of two columns; rows whose value is `None` are left out."""
    lines = [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines])


def from_shipped_text(facts: Facts) -> bool:
    """Whether the model was trained here, on the books that ship with spherelm."""
    return facts.config.get("data") is None and "imported" not in facts.config


def metadata(facts: Facts) -> str:
    """The metadata that the Hugging Face hub reads. A licence only if one was given: the publisher decides."""
    return front_matter(
        facts.name,
        facts.purpose.pipeline,
        evaluations(facts),
        tags=["spherelm", facts.config["arm"]],
        license=facts.license,
        datasets=list(facts.datasets),
        language=["en"] if from_shipped_text(facts) else None,
    )


def evaluations(facts: Facts) -> list[Result]:
    """The validation loss and the scores of tasks, as the hub has evaluation results."""
    found: list[Result] = []
    if facts.validation is not None:
        text = {"dataset_type": "text", "dataset_name": "validation text", "dataset_split": "validation"}
        if len(facts.datasets) == 1:
            text |= {"dataset_type": facts.datasets[0], "dataset_name": facts.datasets[0]}
        measured = {name: facts.validation[name] for name in ("loss", "bits_per_byte")}
        found += [(text, name, round(value, 6)) for name, value in measured.items() if value is not None]
    for task, scores in facts.tasks.items():
        source = {"dataset_type": task, "dataset_name": task}
        found += [(source, name, round(value, 6)) for name, value in scores.items() if not name.endswith("_stderr")]
    return found


def loading(facts: Facts) -> str:
    """A program that loads the model and writes a few words with it."""
    trust = ", trust_remote_code=True" if facts.standalone else ""
    lines = [
        *(["# needs torchao: pip install torchao"] if facts.dtype in FEW_BITS else []),
        *(
            []
            if facts.standalone
            else ["import spherelm.interop.huggingface  # pip install '.[hf]' in a clone of spherelm"]
        ),
        f"from transformers import {facts.purpose.auto}, AutoTokenizer",
        "",
        f'model = {facts.purpose.auto}.from_pretrained("{facts.address}"{trust})',
    ]
    if facts.has_tokenizer:
        lines += [
            f'tokenizer = AutoTokenizer.from_pretrained("{facts.address}"{trust})',
            f'inputs = tokenizer("{facts.purpose.prompt}", return_tensors="pt")',
            f"output = model.generate(**inputs, {facts.purpose.settings})",
            "print(tokenizer.decode(output[0], skip_special_tokens=True))",
        ]
    return "\n".join(lines)


def measuring(facts: Facts) -> list[str]:
    """How to score the model on tasks and to serve it, where these programs can load it."""
    if not (facts.standalone and facts.has_tokenizer and facts.purpose is WRITES_ON):
        return []
    tasks = ",".join(facts.tasks or TASKS)
    model = f"pretrained={facts.address},trust_remote_code=True"
    lines = [f"lm_eval --model hf --model_args {model} --tasks {tasks}"]
    if facts.folded and facts.dtype not in FEW_BITS:
        lines.append(f"vllm serve {facts.address} --trust-remote-code")
    return [
        "## Evaluating and serving it" if len(lines) > 1 else "## Evaluating it",
        "```sh\n" + "\n".join(lines) + "\n```",
    ]


def result_rows(facts: Facts) -> list[tuple[str, object]]:
    """How far the model was trained and how well it predicts."""
    train = facts.config["train"]
    if "imported" in facts.config:
        return [("updates", f"{facts.step:,}")]
    seen = facts.step * train["batch_size"] * train["seq_len"]
    if facts.validation is not None and facts.validation["step"] == facts.step:
        seen = facts.validation.get("tokens", seen)
    rows: list[tuple[str, object]] = [
        ("updates", f"{facts.step:,} of {train['steps']:,}"),
        ("tokens seen", f"{seen:,}"),
    ]
    if facts.validation is not None:
        rows += [
            (
                "validation loss",
                f"{facts.validation['loss']:.4f} nats per token, at update {facts.validation['step']:,}",
            ),
            ("bits per byte", f"{facts.validation['bits_per_byte']:.4f}"),
        ]
    return rows


def origin_rows(facts: Facts) -> list[tuple[str, object]]:
    """How the model came about."""
    config = facts.config
    imported, versions = config.get("imported"), config.get("versions") or {}
    made: list[tuple[str, object]] = [
        ("command", f"`{config['command']}`" if config.get("command") else None),
        ("commit", f"`{config['git_commit']}`" if config.get("git_commit") else None),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items()) or None),
    ]
    if imported is not None:
        return [("imported from", f"{imported['format']}, `{imported['path']}`"), *made]
    return [*training_rows(config), *made]


def training_rows(config: Mapping[str, Any]) -> list[tuple[str, object]]:
    """The settings of the run, and the text's identity."""
    data, identity = config.get("data"), config.get("data_identity") or {}
    return [
        ("recipe", f"`{config['recipe']}` at the size `{config['preset']}`"),
        ("peak learning rate", config["optim"]["lr"]),
        ("schedule", config["schedule"]["kind"]),
        ("seed", config["train"]["seed"]),
        ("text", "the public-domain books that ship with spherelm" if data is None else f"`{data}`"),
        *(
            (f"sha256 of the {split} tokens", f"`{digest}`")
            for split, digest in identity.items()
            if split != "tokenizer"
        ),
        ("sha256 of the tokenizer", f"`{identity['tokenizer']}`" if "tokenizer" in identity else None),
    ]


def training_note(facts: Facts) -> list[str]:
    """How the model is trained further."""
    if facts.folded:
        return ["The learned scales are inside the matrices: this folder is for inference."]
    if facts.config["arm"] == "ngpt":
        return ["Any torch optimizer, the Trainer's own too, keeps the weights on the sphere."]
    return []


def licence_note(facts: Facts) -> str:
    """The rights to text, code and weights, as far as they are known."""
    if from_shipped_text(facts):
        text = "The training text was in print before 1919 and is in the public domain in the United States."
    else:
        text = "Nothing is recorded here about the rights to the training text: whoever publishes this model must know."
    code = " The Python files are part of spherelm (Apache-2.0)." if facts.standalone else ""
    weights = "No licence is stated for the weights; whoever publishes them chooses one."
    return f"{text}{code} {weights if facts.license is None else f'The licence of the weights is {facts.license}.'}"


def model_card(facts: Facts) -> str:
    """The text of the exported folder's README.md."""
    model, arm = facts.config["model"], facts.config["arm"]
    pattern = model["architecture"].get("pattern")
    kind = "pattern" if pattern else model["architecture"]["kind"]
    rest = " in the matrices of the blocks, else as float32" if facts.dtype in FEW_BITS else ""
    shape = [
        ("architecture", f"{ARM_NAMES[arm]}; {KIND_NAMES[kind]}"),
        ("parameters", f"{facts.parameters:,}, stored as {facts.dtype}{rest}"),
        ("layers, width, heads", f"{model['n_layers']}, {model['d_model']}, {model['n_heads']}"),
        ("pattern of layers", f"`{pattern}`" if pattern else None),
        ("vocabulary", f"{model['vocab_size']:,}"),
        ("longest sequence", f"{model['max_seq_len']:,} tokens"),
    ]
    return "\n\n".join(
        [
            f"---\n{metadata(facts)}\n---",
            f"# {facts.name}",
            facts.purpose.summary,
            "## The model",
            two_columns([*shape, *result_rows(facts)]),
            "## Loading it",
            f"```python\n{loading(facts)}\n```",
            *training_note(facts),
            *measuring(facts),
            "## How it was trained",
            two_columns(origin_rows(facts)),
            "## Rights",
            licence_note(facts) + "\n",
        ]
    )
