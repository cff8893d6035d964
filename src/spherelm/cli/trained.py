"""Commands for trained models: `generate`, `export`, `push`, `import`."""

from __future__ import annotations

import sys
from json import dumps as encode_json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from spherelm.cli.flags import Given, OnMachine, Run, computing
from spherelm.cli.parser import NOWHERE, POSITIONAL, Fields, Needs
from spherelm.counting import counted
from spherelm.errors import UserError
from spherelm.generation import DRAW

if TYPE_CHECKING:
    from spherelm.generation.samples import Conversation

DRAWN = Needs(without=["--beams", "--temperature 0"])
"""For flags of a draw: neither a search nor the most probable token draws."""
NO_SEARCH, NO_TALK = Needs(without=["--beams"]), Needs(without=["--interactive"])

SAMPLING, BEAMS = "spherelm.generation.sampling.Sampling", "spherelm.generation.beam.BeamSettings"
Drawing = Annotated[
    Given,
    Fields(SAMPLING, "temperature", needs={"temperature": NO_SEARCH}, left_out=str(DRAW["temperature"]), title="draw"),
    Fields(SAMPLING, "top_k", needs={"top_k": DRAWN}, left_out=str(DRAW["top_k"]), title="draw"),
    Fields(SAMPLING, "top_p", "min_p", needs={"top_p": DRAWN, "min_p": DRAWN}, title="draw"),
    Fields(SAMPLING, "repetition_penalty", needs={"repetition_penalty": NO_SEARCH}, title="draw"),
]
Searching = Annotated[
    Given,
    Fields(BEAMS, "beams", needs={"beams": NO_TALK}, left_out="none, texts are drawn", title="search"),
    Fields(BEAMS, "length_penalty", needs={"length_penalty": Needs("--beams")}, title="search"),
]


def import_nvidia(
    *,
    ckpt: Annotated[Path, POSITIONAL],
    out: Annotated[Path, POSITIONAL],
    rope: Literal["nvidia", "standard"] = "nvidia",
    tokenizer: str | None = None,
    moments: bool = False,
) -> None:
    """Turn a ckpt.pt that NVIDIA/ngpt's train.py wrote into a run directory; no code in the file is run.

    Example: spherelm import nvidia ckpt.pt runs/theirs --tokenizer gpt2

    Args:
        ckpt: The file that train.py wrote.
        out: The run directory to create.
        rope: nvidia: as their code computes it, where the rotary embedding is not a rotation; standard:
            the paper's model.
        tokenizer: Its tokenizer, which the file does not hold: a tokenizer.json, a SentencePiece .model, a
            Hugging Face name.
        moments: Keep the optimizer's moments as well, to continue training.
    """
    from spherelm.interop.imported import import_nvidia as run_import
    from spherelm.layers.linear import departure

    model = run_import(ckpt, out, rope, tokenizer, moments)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{type(model).__name__} of {counted(count, 'parameter')} in {out}; departure from the sphere {departure(model):.1e}"
    )


def generate(
    *,
    run: Run,
    prompt: str | None = None,
    prompts: Path | None = None,
    interactive: bool = False,
    max_new_tokens: int | None = None,
    stop: Annotated[tuple[str, ...], NOWHERE] = (),
    samples: Annotated[int, NO_TALK] = 1,
    seed: Annotated[int, DRAWN] = 0,
    window: Annotated[bool, Needs(without=["--beams", "--interactive"])] = False,
    drawing: Drawing,
    search: Searching,
    dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32",
    json: Annotated[bool, NO_TALK] = False,
    machine: OnMachine,
) -> None:
    """Let a model continue a text, each text of a file, or what you type; an encoder-decoder writes a text for it.

    Give one of --prompt, --prompts, --interactive.

    Example: spherelm generate runs/mine --prompt "The old man" --samples 3

    Args:
        run: A run directory, or one of its checkpoints.
        prompt: The text to continue.
        prompts: A file with one prompt on each line, or a .jsonl of objects with a "prompt".
        interactive: Type a line, read how the model continues it, type the next. /new begins a new text, /quit ends.
            The text may have any length; the model reads its end.
        max_new_tokens: The most tokens to add (for --interactive, after each line); if left out, 100, or fewer where
            the model's max_seq_len leaves no room for them.
        stop: End the text before any of these strings; separate them by spaces, since a comma may be part of one.
        samples: Texts to draw for each prompt.
        seed: Seed of the random draw; text i uses seed + i.
        window: Allow texts longer than the model's max_seq_len: where it is reached, the model continues
            from the last half.
        dtype: Format of the weights and of the computation; with int8 the computation is in float32.
        json: Print each text as one line of JSON, with its prompt, sample number and seed.
    """
    if sum((prompt is not None, prompts is not None, interactive)) != 1:
        raise UserError("give exactly one of --prompt, --prompts and --interactive")
    if max_new_tokens is not None and max_new_tokens < 0:
        raise UserError(f"max_new_tokens must not be negative, got {max_new_tokens}")
    from spherelm.generation import samples as texts
    from spherelm.generation.beam import BeamSettings

    settings: dict[str, Any] = {**DRAW, **drawing, "precision": dtype}
    settings |= {"stop": stop, "seed": seed, "device": machine.get("device") or "cpu"}
    with computing(machine):
        if interactive:
            converse(texts.Conversation(run, **settings), texts.LENGTH if max_new_tokens is None else max_new_tokens)
            return
        if search:
            settings["beams"] = BeamSettings(**search)
        given = texts.read_prompts(prompts) if prompts is not None else [prompt or ""]
        write_texts(run, given, samples, max_new_tokens, json, window=window, **settings)


def write_texts(
    run: Path, given: list[str], samples: int, max_new_tokens: int | None, as_json: bool, **settings: Any
) -> None:
    """Print the texts that `continuations` gives: one as it comes, several in full,
    with --- between those that go on.
    """
    from spherelm.generation.samples import continuations, continues

    goes_on = continues(run)
    asked = [(prompt, i) for prompt in given for i in range(samples)]
    if len(asked) == 1 and not as_json:
        writer = Writer(given[0] if goes_on else "")
        continuations(run, given, 1, max_new_tokens, write=writer.write, **settings)
        writer.write("\n")  # after the prompt, where nothing was generated
        return
    written = continuations(run, given, samples, max_new_tokens, **settings)
    if not as_json:
        whole = [prompt + text if goes_on else text for (prompt, _), text in zip(asked, written, strict=False)]
        print(("\n---\n" if goes_on else "\n").join(whole))
        return
    for i, ((prompt, sample), text) in enumerate(zip(asked, written, strict=False)):
        record = {"prompt": prompt, "sample": sample, "seed": settings["seed"] + i, "text": text}
        print(encode_json(record, ensure_ascii=False))


class Writer:
    """Writes a text to standard output as it comes: the prompt with the first piece,
    so that what is refused writes nothing.
    """

    def __init__(self, prompt: str) -> None:
        self.before = prompt

    def write(self, piece: str) -> None:
        """Write `piece` at once."""
        print(self.before + piece, end="", flush=True)
        self.before = ""


NEW, QUIT = "/new", "/quit"
"""Lines that are no part of the text."""


def converse(text: Conversation, max_new_tokens: int) -> None:
    """Read lines from standard input and write how the model continues them, until `QUIT` or the end of the input."""
    print(
        f"Type how a text begins; the model continues it. {NEW} begins a new text, {QUIT} or Ctrl-D ends, and Ctrl-C stops "
        "the model.",
        file=sys.stderr,
        flush=True,
    )
    while True:
        try:
            said = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            print()
            return
        if said.strip() == QUIT:
            return
        if said.strip() == NEW:
            text.restart()
            continue
        try:
            for piece in text.answer(said, max_new_tokens):
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        except UserError as error:
            print(f"spherelm: {error}", file=sys.stderr, flush=True)
            continue
        print(flush=True)


WeightFormat = Literal["float32", "bfloat16", "float16", "fp8", "nvfp4"]


def export(
    *,
    run: Run,
    out: Annotated[Path, POSITIONAL],
    standalone: bool = False,
    folded: bool = False,
    onnx: bool = False,
    dtype: WeightFormat = "float32",
    license: str | None = None,
    no_tokenizer: bool = False,
) -> None:
    """Write a run's model as a folder that Hugging Face transformers loads, with tokenizer and model card.

    Example: spherelm export runs/mine models/mine

    Args:
        run: A run directory, or one of its checkpoints.
        out: The directory to create.
        standalone: Put the modeling code beside the weights, so that trust_remote_code loads them without spherelm.
        folded: Like --standalone, for servers such as vLLM: learned scales are folded into the matrices;
            for inference only.
        onnx: Also write onnx/model.onnx, which onnxruntime runs, in float32, with keys and values passed in and out.
        dtype: Format of the weights. fp8 and nvfp4 imply --folded, and are of the blocks' matrices (8 bits; 4 bits):
            transformers loads them with torchao.
        license: License of the weights, as the hub names it: apache-2.0, cc-by-4.0, ...
        no_tokenizer: Leave the tokenizer out.
    """
    from spherelm.interop.export import export as run_export

    run_export(run, out, dtype, standalone, not no_tokenizer, folded, license, onnx=onnx)
    print(f"The folder: {out.resolve()}")


def push(
    *,
    run: Run,
    repo: Annotated[str, POSITIONAL],
    private: bool = False,
    standalone: bool = False,
    folded: bool = False,
    dtype: WeightFormat = "float32",
    license: str | None = None,
    no_tokenizer: bool = False,
) -> None:
    """Upload a run's model to the Hugging Face hub, as `export` writes it; log in with `hf auth login` first.

    Example: spherelm push runs/mine me/mine --standalone --license apache-2.0

    Args:
        run: A run directory, or one of its checkpoints.
        repo: user/name; created if it does not exist.
        private: Make the repository private.
        standalone: As for export.
        folded: As for export.
        dtype: As for export.
        license: As for export.
        no_tokenizer: Leave the tokenizer out.
    """
    from spherelm.interop.export import push as run_push

    settings: dict[str, Any] = {"dtype": dtype, "standalone": standalone, "folded": folded, "license": license}
    print(f"The model: {run_push(run, repo, private, with_tokenizer=not no_tokenizer, **settings)}")


def import_hub(*, source: Annotated[str, POSITIONAL], out: Annotated[Path, POSITIONAL]) -> None:
    """Turn a model that `push` uploaded, or a folder that `export` wrote, into a run directory.

    Example: spherelm import hub me/mine runs/mine

    Args:
        source: user/name or user/name@revision on the hub, or a folder.
        out: The run directory to create.
    """
    from spherelm.interop.imported import import_hub as run_import

    model = run_import(source, out)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{type(model).__name__} of {counted(count, 'parameter')} in {out}")
