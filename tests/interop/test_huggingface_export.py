"""`spherelm export`: what it writes is loaded by transformers alone and computes what the run's model computes."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from stand_in_hub import TOKEN, Hub, stand_in_hub

from spherelm import departure, load_model
from spherelm.cli import main
from spherelm.data.tokenizer import load_tokenizer
from spherelm.interop.export import export
from spherelm.train.trainer import train

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
huggingface_hub = pytest.importorskip("huggingface_hub", reason="needs the extra hf")

from spherelm.interop.huggingface import standalone  # noqa: E402
from spherelm.interop.huggingface.card import Facts, model_card  # noqa: E402
from spherelm.interop.huggingface.tokenization import END, byte_definition, fast_tokenizer  # noqa: E402

TEXTS = [
    "It was a dark and stormy night;\n\n  the rain fell -- 'in torrents'.",
    "",
    " leading, and\ttabs\r\n",
    "naïve café 北京 🙂‍↔️ \x00\x7f",
    f"no {END} in here, nor {END}{END}",
    "a  b   c" * 40,
]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of six updates of each arm."""
    base = tmp_path_factory.mktemp("runs")
    data = tiny.make_data(base)
    with torch.enable_grad():
        for arm in tiny.ARMS:
            train(tiny.run_config(arm, data, save_every=3), base / arm, show_progress=False)
    return {arm: base / arm for arm in tiny.ARMS}


def copied(run: Path, to: Path) -> Path:
    """The same run without its tokenizer and its metrics."""
    shutil.copytree(run / "checkpoints", to / "checkpoints")
    shutil.copy(run / "config.json", to)
    return to


def command(*arguments: object) -> int:
    """The exit code of `spherelm ARGUMENTS`."""
    before = sys.argv
    sys.argv = ["spherelm", *map(str, arguments)]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return 0


def load(folder: Path, **settings: Any) -> Any:
    import spherelm.interop.huggingface  # noqa: F401

    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **settings)
    assert not any(info.values()), info
    return model


@pytest.mark.parametrize("arm", tiny.ARMS)
def test_the_folder_holds_the_runs_model_and_tokenizer(arm: str, runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "folder"
    assert command("export", runs[arm], out) == 0
    assert not list(tmp_path.glob(".*")), "nothing is left beside it"
    model, loaded = load_model(runs[arm]), load(out)
    ours = load_tokenizer(runs[arm])
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    inputs = tokenizer(["badu kibo", "se"], return_tensors="pt", padding=True)
    assert inputs["input_ids"][0].tolist() == ours.encode("badu kibo")
    assert inputs["input_ids"][1, -2:].tolist() == ours.encode("se")
    ids = inputs["input_ids"][:1]
    torch.testing.assert_close(loaded(ids).logits, model(ids), rtol=0, atol=1e-5)
    assert departure(loaded) == departure(model) < 1e-6
    assert loaded.generation_config.eos_token_id == loaded.generation_config.pad_token_id == ours.eos_id
    assert loaded.generate(**inputs, max_new_tokens=4, do_sample=False).shape[0] == 2
    assert tokenizer.model_max_length == model.config.max_seq_len


def test_the_text_generation_pipeline(runs: dict[str, Path], tmp_path: Path) -> None:
    export(runs["ngpt"], tmp_path / "folder")
    load(tmp_path / "folder")
    pipe = transformers.pipeline("text-generation", model=str(tmp_path / "folder"), device="cpu")
    prompts = ["badu kibo", "se"]
    results = pipe(prompts, max_new_tokens=5, do_sample=False, batch_size=2, return_full_text=False)
    alone = [pipe(prompt, max_new_tokens=5, do_sample=False, return_full_text=False) for prompt in prompts]
    assert [r[0]["generated_text"] for r in results] == [a[0]["generated_text"] for a in alone]
    assert pipe("badu", max_new_tokens=5, do_sample=False)[0]["generated_text"].startswith("badu")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_weights_can_be_stored_in_half(dtype: str, runs: dict[str, Path], tmp_path: Path) -> None:
    assert command("export", runs["ngpt"], tmp_path / "half", "--dtype", dtype) == 0
    loaded = load(tmp_path / "half", dtype="auto")
    assert {p.dtype for p in loaded.parameters()} == {getattr(torch, dtype)}
    state = load_model(runs["ngpt"]).state_dict()
    assert all(torch.equal(p, state[name].to(p.dtype)) for name, p in loaded.model.state_dict().items())


def test_a_checkpoint_of_a_run(runs: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = runs["gpt"] / "checkpoints" / "step-00000003"
    export(checkpoint, tmp_path / "early")
    state = load_model(checkpoint).state_dict()
    assert all(torch.equal(p, state[name]) for name, p in load(tmp_path / "early").model.state_dict().items())
    card = (tmp_path / "early" / "README.md").read_text()
    assert "| updates | 3 of 6 |" in card
    assert "at update 2 |" in card


def test_the_card_says_what_the_run_says(runs: dict[str, Path], tmp_path: Path) -> None:
    export(runs["ngpt"], tmp_path / "mine", standalone=True, dtype="bfloat16")
    card = (tmp_path / "mine" / "README.md").read_text()
    config = tiny.read_json(runs["ngpt"] / "config.json")
    val = [r for r in tiny.metrics(runs["ngpt"]) if r["kind"] == "val"][-1]
    assert described(card)["library_name"] == "transformers"
    for piece in [
        "# mine\n",
        "nGPT, the normalized Transformer",
        "stored as bfloat16",
        f"{val['loss']:.4f} nats per token, at update 6",
        f"{val['bits_per_byte']:.4f}",
        "| tokens seen | 384 |",
        "`law` at the size",
        config["data_identity"]["train"],
        config["versions"]["torch"],
        "trust_remote_code=True",
        "Nothing is recorded here about the rights",
        "It is no chat model",
        "lm_eval --model hf --model_args pretrained=PATH,trust_remote_code=True --tasks arc_easy,hellaswag,",
    ]:
        assert piece in card, piece
    assert "None" not in card


def described(card: str) -> dict[str, Any]:
    """The card's metadata, by the hub's own reader."""
    found: dict[str, Any] = huggingface_hub.ModelCard(card).data.to_dict()
    return found


def test_the_cards_results_are_those_of_the_run_in_the_hubs_format(runs: dict[str, Path], tmp_path: Path) -> None:
    run = copied(runs["ngpt"], tmp_path / "run")
    shutil.copy(runs["ngpt"] / "metrics.jsonl", run)
    score = {"acc": {"value": 0.25, "stderr": 0.1}}
    (run / "tasks.json").write_text(json.dumps({"step": 6, "tasks": {"arc_easy": {"metrics": score}}}))
    (run / "earlier.json").write_text(
        json.dumps({"step": 3, "tasks": {"arc_easy": {"metrics": {"acc": {"value": 1}}}}})
    )
    config = json.loads((run / "config.json").read_text())
    data = tmp_path / "data"
    data.mkdir()
    (data / "manifest.json").write_text(
        json.dumps({"inputs": [{"dataset": {"name": "some/books"}}, {"name": "a.txt"}]})
    )
    (run / "config.json").write_text(json.dumps(config | {"data": str(data)}))
    export(run, tmp_path / "mine", with_tokenizer=False, license="cc-by-4.0")
    data_of_card = huggingface_hub.ModelCard.load(tmp_path / "mine" / "README.md").data
    assert (data_of_card.license, data_of_card.datasets) == ("cc-by-4.0", ["some/books"])
    val = [r for r in tiny.metrics(run) if r["kind"] == "val"][-1]
    found = {(r.dataset_type, r.metric_type): r.metric_value for r in data_of_card.eval_results}
    assert found.pop(("arc_easy", "acc")) == 0.25
    assert found == {("some/books", name): pytest.approx(val[name], abs=1e-6) for name in ("loss", "bits_per_byte")}
    assert "The licence of the weights is cc-by-4.0" in (tmp_path / "mine" / "README.md").read_text()


HUB_API = "spherelm.interop.huggingface.hub.HfApi"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub on this machine, which the library asks in the place of the real one."""
    with stand_in_hub() as stand_in:
        monkeypatch.setattr(HUB_API, partial(huggingface_hub.HfApi, stand_in.address))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield stand_in


@pytest.mark.parametrize("arm", tiny.ARMS)
def test_a_run_goes_to_the_hub_and_comes_back(arm: str, runs: dict[str, Path], tmp_path: Path, hub: Hub) -> None:
    assert command("push", runs[arm], "you/mine", "--private", "--standalone", "--license", "mit") == 0
    assert hub.private == {"you/mine": True}
    files = hub.files["you/mine"]
    assert {"config.json", "model.safetensors", "tokenizer.json", f"modeling_{arm}.py", "README.md"} <= files.keys()
    assert b'from_pretrained("you/mine", trust_remote_code=True)' in files["README.md"]
    assert command("import", "hub", "you/mine", tmp_path / "back") == 0
    before, after = load_model(runs[arm]).state_dict(), load_model(tmp_path / "back").state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert load_tokenizer(tmp_path / "back").encode("badu kibo") == load_tokenizer(runs[arm]).encode("badu kibo")
    there, here = (tiny.read_json(run / "config.json") for run in (runs[arm], tmp_path / "back"))
    assert all(here[name] == there[name] for name in ("model", "optim", "schedule", "train"))
    export(tmp_path / "back", tmp_path / "again")
    assert "| imported from | spherelm, `you/mine` |" in (tmp_path / "again" / "README.md").read_text()


def test_a_second_push_leaves_nothing_of_the_first_that_would_be_read(
    runs: dict[str, Path], tmp_path: Path, hub: Hub
) -> None:
    """Weights in several files beside weights in one, and a tokenizer beside none."""
    assert command("push", runs["gpt"], "you/mine") == 0
    kept = {"notes.txt": b"mine", "images/model.png": b"mine"}
    stale = {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}"}
    hub.files["you/mine"] |= kept | stale
    assert command("push", runs["gpt"], "you/mine", "--no-tokenizer") == 0
    export(runs["gpt"], tmp_path / "out", with_tokenizer=False)
    assert hub.files["you/mine"].keys() == kept.keys() | {path.name for path in (tmp_path / "out").iterdir()}


def test_what_the_hub_refuses_is_said_in_one_line(
    runs: dict[str, Path], tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("import", "hub", "you/nothing", tmp_path / "out") == 2
    assert "cannot read you/nothing" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    for repo, reason in (("you/mine", "401"), ("not a name", "Repo id")):
        assert command("push", runs["gpt"], repo) == 2
        said = capsys.readouterr().err
        assert reason in said
        assert "hf auth login" in said
    monkeypatch.setattr(HUB_API, partial(huggingface_hub.HfApi, "http://127.0.0.1:9"))
    assert command("push", runs["gpt"], "you/mine") == 2
    assert not (tmp_path / "out").exists()
    assert not hub.files


def test_a_folder_of_another_make_is_no_run(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(runs["ngpt"], tmp_path / "folded", folded=True)
    card = (tmp_path / "folded" / "README.md").read_text()
    assert "vllm serve PATH --trust-remote-code" in card
    assert "for inference" in card
    for folder in (tmp_path / "folded", tmp_path):
        assert command("import", "hub", folder, tmp_path / "out") == 2
        assert "cannot become a run again" in capsys.readouterr().err


def test_the_cards_program_runs(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(runs["gpt"], tmp_path / "mine")
    program = (tmp_path / "mine" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(program.replace("PATH", str(tmp_path / "mine")), {})
    assert capsys.readouterr().out.startswith("It was")


def test_what_cannot_be_exported_is_refused(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "empty").mkdir()
    for run, out, message in [
        (runs["gpt"], tmp_path / "full", "already holds something"),
        (runs["gpt"], tmp_path / "full" / "file", "is a file"),
        (tmp_path / "empty", tmp_path / "out", "holds no run"),
    ]:
        assert command("export", run, out) == 2
        assert message in capsys.readouterr().err
    assert command("export", runs["gpt"], tmp_path / "empty") == 0, "an empty directory is free"


def test_a_run_without_a_tokenizer_json(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(runs["gpt"], tmp_path / "run")
    assert command("export", run, tmp_path / "out") == 2
    assert "--no-tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert command("export", run, tmp_path / "out", "--no-tokenizer") == 0
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert "AutoTokenizer.from" not in (tmp_path / "out" / "README.md").read_text()


def test_a_run_with_a_tokenizer_json(runs: dict[str, Path], tmp_path: Path) -> None:
    run, ours = copied(runs["gpt"], tmp_path / "run"), load_tokenizer("default")
    ours.save(run)
    export(run, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert all(theirs(text)["input_ids"] == ours.encode(text) for text in TEXTS)
    assert load(tmp_path / "out").generation_config.eos_token_id == ours.eos_id


def test_sentencepiece_is_refused(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spherelm.interop.export.load_tokenizer", lambda run: SimpleNamespace(name="some.model"))
    with pytest.raises(ValueError, match=r"some.model is a SentencePiece model.*--no-tokenizer"):
        export(runs["gpt"], tmp_path / "out")


def test_without_transformers_the_extra_is_named(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("spherelm.interop.huggingface")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert command("export", runs["gpt"], tmp_path / "out") == 2
    assert "pip install '.[hf]' in a clone of spherelm" in capsys.readouterr().err


def test_the_card_of_an_imported_run_claims_nothing(runs: dict[str, Path]) -> None:
    imported = {"format": "NVIDIA/ngpt", "path": "/some/ckpt.pt"}
    config = tiny.read_json(runs["ngpt"] / "config.json") | {"data": None, "imported": imported}
    facts = Facts("theirs", config, 12, 345, None, "float32", standalone=False, has_tokenizer=False)
    card = model_card(facts)
    assert "| imported from | NVIDIA/ngpt, `/some/ckpt.pt` |" in card
    assert "| updates | 12 |" in card
    assert "Nothing is recorded here about the rights" in card
    for claim in ("tokens seen", "books", "language:", "learning rate", "validation loss"):
        assert claim not in card, claim
    shipped = model_card(dataclasses.replace(facts, config={k: v for k, v in config.items() if k != "imported"}))
    assert "public domain" in shipped
    assert described(shipped)["language"] == ["en"]


def test_the_byte_tokenizer_is_ours(tmp_path: Path) -> None:
    ours = load_tokenizer("bytes")
    fast_tokenizer(byte_definition(), END, 64).save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.vocab_size, len(theirs), theirs.eos_token_id) == (256, 257, 256)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.decode([104, 105, 256, 195], skip_special_tokens=True) == ours.decode([104, 105, 256, 195])


def test_the_shipped_tokenizer_is_ours(tmp_path: Path) -> None:
    ours = load_tokenizer("default")
    ours.save(tmp_path)
    fast = fast_tokenizer((tmp_path / "tokenizer.json").read_text(encoding="utf-8"), END, 64)
    fast.save_pretrained(tmp_path / "folder")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert theirs.eos_token_id == theirs.pad_token_id == ours.eos_id
    for text in TEXTS:
        inputs = theirs(text)
        assert inputs["input_ids"] == ours.encode(text)
        assert set(inputs) == {"input_ids", "attention_mask"}
        assert theirs.decode(inputs["input_ids"]) == ours.decode(ours.encode(text))
    assert theirs.decode([ours.eos_id], skip_special_tokens=True) == ""


def test_the_end_token_is_written_when_asked_for(tmp_path: Path) -> None:
    fast = fast_tokenizer(byte_definition(), END, 64)
    assert fast(f"a{END}", split_special_tokens=False)["input_ids"] == [97, 256]
    assert fast(f"a{END}")["input_ids"] == [97, *END.encode()]


def test_a_tokenizer_that_adds_tokens_is_kept_from_it() -> None:
    import tokenizers

    adding = tokenizers.Tokenizer.from_str(byte_definition())
    adding.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A $B", special_tokens=[(END, 256)]
    )
    assert fast_tokenizer(adding.to_str(), END, 64)("hi")["input_ids"] == [104, 105]


@pytest.mark.parametrize("kind", standalone.MODULES)
@pytest.mark.parametrize("arm", tiny.ARMS)
def test_the_code_that_rides_along_is_short_and_needs_torch_and_transformers_alone(arm: str, kind: str) -> None:
    files = dict(standalone.files_of(standalone.MODULES[kind].format(arm)))
    for text in files.values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1
                assert f"{node.module}.py" in files
            elif isinstance(node, ast.Import | ast.ImportFrom):
                name = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                assert (name or "").split(".")[0] in {"torch", "transformers", *sys.stdlib_module_names}
    assert not any(other in name for name in files for other in {"gpt", "ngpt"} - {arm} if f"_{other}" in name)
    if kind == "decoder":
        assert sum(len(text.splitlines()) for text in files.values()) <= 600


ALONE = """
import json, sys
sys.modules["spherelm"] = None  # any import of it fails, however it was installed
import torch, transformers
transformers.utils.logging.disable_progress_bar()
result = {}
for arm in ("gpt", "ngpt"):
    folder = sys.argv[1] + "/" + arm
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    inputs = tokenizer(["badu kibo", "se"], return_tensors="pt", padding=True)
    text = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    model.save_pretrained(folder + "-again")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with torch.no_grad():
        logits = model(inputs["input_ids"][:1]).logits
    try:
        model.generate(**tokenizer(["badu kibo", "se"], return_tensors="pt", padding=True, padding_side="right"))
        raise AssertionError("padding on the right was taken")
    except ValueError as error:
        assert "pad on the left" in str(error), error
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=0.1)
    for _ in range(3):
        model(inputs["input_ids"], labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    lengths = model.model.embed.weight.norm(dim=1) if arm == "ngpt" else torch.ones(1)
    assert (lengths - 1).abs().max() < 1e-6, lengths
    result[arm] = {"logits": logits.tolist(), "text": text.tolist(), "file": sys.modules[type(model).__module__].__file__}
    folded = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/folded-" + arm, trust_remote_code=True)
    base = transformers.AutoModel.from_pretrained(sys.argv[1] + "/folded-" + arm, trust_remote_code=True)
    with torch.no_grad():
        states = base(inputs["input_ids"][:1]).last_hidden_state
        assert (folded(inputs["input_ids"][:1]).logits - logits).abs().max() < 1e-5
        assert (states @ folded.lm_head.weight.T - logits).abs().max() < 1e-5
assert not [name for name in sys.modules if name.startswith("spherelm.")]
print(json.dumps(result))
"""


def test_the_standalone_folder_loads_without_spherelm(runs: dict[str, Path], tmp_path: Path) -> None:
    for arm in tiny.ARMS:
        assert command("export", runs[arm], tmp_path / arm, "--standalone") == 0
        assert command("export", runs[arm], tmp_path / f"folded-{arm}", "--folded") == 0
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-I", "-c", textwrap.dedent(ALONE), str(tmp_path)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    for arm in tiny.ARMS:
        assert Path(result[arm]["file"]).is_relative_to(tmp_path / "modules")
        ids = torch.tensor([load_tokenizer("bytes").encode("badu kibo")])
        logits = torch.tensor(result[arm]["logits"])
        torch.testing.assert_close(logits, load_model(runs[arm])(ids), rtol=0, atol=1e-5)
        loaded = load(tmp_path / arm, trust_remote_code=False)
        assert type(loaded).__module__ == "spherelm.interop.huggingface.modeling", "where spherelm is there, it is used"
        loaded.save_pretrained(tmp_path / "resaved")
        assert "auto_map" not in tiny.read_json(tmp_path / "resaved" / "config.json"), "the code is not there either"
        inputs = transformers.AutoTokenizer.from_pretrained(tmp_path / arm)(
            ["badu kibo", "se"], return_tensors="pt", padding=True
        )
        assert loaded.generate(**inputs, max_new_tokens=4, do_sample=False).tolist() == result[arm]["text"]
