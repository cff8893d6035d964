"""Tasks through the evaluation harness: its own prompts, continuations and scores, on local copies, without network."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import numpy as np
import pytest
import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from spherelm.evaluate import harness
from spherelm.evaluate.harness import PAPER_TASKS, TaskSettings, evaluate_tasks, load_tasks, paper_average, subdued
from spherelm.interop.huggingface import to_hf
from spherelm.interop.huggingface.tokenization import END, byte_definition, fast_tokenizer
from spherelm.models import GPTConfig, NGPTConfig, build

FILES = {
    "arc_easy": "arc/arc_easy.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "wsc273": "wsc273/default.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
}
SIZES = {"arc_easy": 2376, "hellaswag": 400, "winogrande": 1267, "wsc273": 273, "lambada_openai": 5153}
"""Documents of each set here: of HellaSwag, which the harness rewrites at every access, only the first."""


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **settings: Any) -> None:
        raise OSError("a test went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Our five tasks on the local copies."""
    shared = Path(__file__).resolve().parents[3] / "shared"
    if not (shared / "data/evals").is_dir():
        pytest.skip(f"the evaluation sets are not here: no folder {shared / 'data/evals'}")
    with subdued(progress=False):
        found = load_tasks(PAPER_TASKS, TaskSettings(shared / "data/evals"), tmp_path_factory.mktemp("tasks"))["tasks"]
        rows = found["hellaswag"].dataset
        rows["validation"] = rows["validation"].select(range(SIZES["hellaswag"]))
        yield found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def hub_records(name: str, evals: Path, ours: Any) -> list[dict[str, Any]]:
    """The scored records of the hub's data set, built here in another way."""
    if name == "arc_easy":
        rows = lines(evals / "arc_easy/ARC-Easy.test.jsonl")
        key = "12345"
        return [
            {
                "id": row["id"],
                "question": row["query"][len("Question: ") : -len("\nAnswer:")],
                "choices": {"text": row["choices"], "label": list(key[: len(row["choices"])])},
                "answerKey": key[row["gold"]],
            }
            for row in rows
        ]
    if name == "hellaswag":
        return [{**row, "label": str(row["label"])} for row in ours.dataset["validation"]]
    if name == "winogrande":
        return lines(evals / "winogrande/winogrande_xl.validation.jsonl")
    if name == "lambada_openai":
        rows = lines(evals / "lambada_openai/llm-foundry.lambada_openai.jsonl")
        return [{"text": row["context"] + " " + row["continuation"]} for row in rows]
    return list(ours.dataset["test"])


def theirs(name: str, evals: Path, ours: Any, monkeypatch: pytest.MonkeyPatch) -> ConfigurableTask:
    """The task that the harness's own code makes of its own definition, when the hub answers with these records."""
    records = hub_records(name, evals, ours)

    def load_dataset(path: str, name: str | None = None, **settings: Any) -> datasets.DatasetDict:
        rows = datasets.Dataset.from_list(records)
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), rows))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    definition = load_yaml(Path(lm_eval.tasks.__file__).parent / FILES[name])
    definition.pop("tag", None)
    return ConfigurableTask(config=definition)


@pytest.mark.row("Downstream tasks")
@pytest.mark.parametrize("name", PAPER_TASKS)
def test_requests_are_the_harnesss_own(
    name: str, ours: dict[str, Any], shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts and continuations letter by letter, and what becomes of any answers, on 60 documents of each set."""
    task, other = ours[name], theirs(name, shared / "data/evals", ours[name], monkeypatch)
    assert len(task.eval_docs) == SIZES[name] == len(other.eval_docs)
    chosen = random.Random(5).sample(range(SIZES[name]), 60)
    for each in (task, other):
        each.set_config(key="num_fewshot", value=0)
        each.build_all_requests(samples=sorted(chosen))
    requests = [[(r.request_type, r.doc_id, r.idx, r.arguments) for r in each.instances] for each in (task, other)]
    assert requests[0] == requests[1]
    assert len(requests[0]) >= 60
    draw, docs = np.random.default_rng(0), [each.eval_docs for each in (task, other)]
    for number, index in enumerate(sorted(chosen)[:20]):
        count = sum(r.doc_id == number for r in task.instances)
        answers = [(float(draw.normal(-20, 5)), bool(draw.integers(2))) for _ in range(count)]
        scores = [each.process_results(rows[index], answers) for each, rows in zip((task, other), docs, strict=True)]
        assert scores[0] == scores[1]
    assert task.aggregation() == other.aggregation()


@pytest.mark.parametrize("name", PAPER_TASKS)
def test_definitions_differ_in_where_the_data_lies_only(name: str, ours: dict[str, Any]) -> None:
    own = load_yaml(Path(lm_eval.tasks.__file__).parent / FILES[name])
    used = ours[name].config.to_dict()
    for key, value in own.items():
        if key in ("dataset_path", "dataset_name", "tag", "metadata"):
            continue
        if key == "metric_list":
            kept = [{k: m[k] for k in ("metric", "higher_is_better")} for m in used[key]]
            assert kept == [{k: m[k] for k in ("metric", "higher_is_better")} for m in value]
        elif key.endswith("_split"):
            assert used.get(key, None) in (value, None)
        elif callable(value):
            assert used[key] == ours[name].config.serialize_function(value)
        else:
            assert used[key] == value
    assert used["metadata"]["version"] == own["metadata"]["version"]
    assert (used["target_delimiter"], used["fewshot_delimiter"], used["description"]) == (" ", "\n\n", "")


FIRST = {
    "arc_easy": (
        "Question: Which statement best explains why photosynthesis is the foundation of most food webs?\nAnswer:",
        " Sunlight is the source of energy for nearly all ecosystems.",
    ),
    "hellaswag": (
        "Roof shingle removal: A man is sitting on a roof. He",
        " is using wrap to wrap a pair of skis.",
    ),
    "winogrande": ("Sarah was a much better surgeon than Maria so Sarah", " always got the easier cases."),
    # Two spaces: the harness puts one before the rest of the sentence, which starts with one.
    "wsc273": (
        "The city councilmen refused the demonstrators a permit because the city councilmen",
        "  feared violence.",
    ),
}


@pytest.mark.parametrize("name", sorted(FIRST))
def test_the_first_request_is_as_written_down(name: str, ours: dict[str, Any]) -> None:
    task = ours[name]
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(limit=1)
    assert task.instances[0].arguments == FIRST[name]


@pytest.mark.parametrize(
    ("name", "file"),
    [("winogrande", "winogrande/llm-foundry.winogrande.jsonl"), ("wsc273", "wsc273/llm-foundry.winograd_wsc.jsonl")],
)
def test_partial_scoring_is_that_of_another_project(name: str, file: str, ours: dict[str, Any], shared: Path) -> None:
    """llm-foundry's ready-made contexts and continuations of the same questions:
    all agree but for spaces and capitals.
    """
    task, rows = ours[name], lines(shared / "data/evals" / file)
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests()
    assert len(task.instances) == 2 * len(rows)
    agree = 0
    for i, row in enumerate(rows):
        pair = [r.arguments for r in task.instances[2 * i : 2 * i + 2]]
        here = [(context.lower(), rest.strip()) for context, rest in pair]
        agree += here == [(context.lower(), row["continuation"].strip()) for context in row["context_options"]]
        gold = task.doc_to_text(task.instances[2 * i].doc)
        assert int(gold) == row["gold"]
    assert agree >= 0.98 * len(rows)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return fast_tokenizer(byte_definition(), END, 512)


def untrained(arm: str) -> Any:
    torch.manual_seed(1)
    config = (GPTConfig if arm == "gpt" else NGPTConfig)(
        vocab_size=257, n_layers=1, d_model=16, n_heads=2, max_seq_len=512
    )
    return build(config).eval()


@pytest.mark.row("Downstream tasks")
@pytest.mark.parametrize(("arm", "names"), [("ngpt", PAPER_TASKS), ("gpt", ("arc_easy", "winogrande"))])
def test_an_untrained_model_guesses(arm: str, names: tuple[str, ...], tokenizer: Any, shared: Path) -> None:
    """At chance within four standard errors on every task, which a wrong answer key or a leak of it would not be."""
    model = untrained(arm)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state, drawn = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    found = evaluate_tasks(to_hf(model), tokenizer, names, TaskSettings(shared / "data/evals", limit=24), False)
    assert list(found["tasks"]) == list(names)
    for name, record in found["tasks"].items():
        assert record["documents"] == 24
        assert record["cut"] == 0
        accuracy = record["metrics"]["acc"]
        if name == "lambada_openai":
            assert record["chance"] is None
            assert accuracy["value"] == 0
            assert record["metrics"]["perplexity"]["stderr"] > 0
            continue
        assert record["chance"] == pytest.approx(0.5 if name in ("winogrande", "wsc273") else 0.25, abs=0.01)
        error = (record["chance"] * (1 - record["chance"]) / 24) ** 0.5
        assert abs(accuracy["value"] - record["chance"]) < 4 * error
        assert accuracy["stderr"] == pytest.approx((accuracy["value"] * (1 - accuracy["value"]) / 23) ** 0.5)
    assert ("average" in found) == (names == PAPER_TASKS)
    assert json.loads(json.dumps(found)) == found
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.get_state()[1].tolist() == drawn  # type: ignore[union-attr]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_likelihoods_are_our_models(tokenizer: Any, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness's score of a request is the sum of our model's log-probabilities of the continuation's bytes."""
    kept: dict[str, Any] = {}
    monkeypatch.setattr(harness, "task_record", lambda name, found: kept.update(found) or {})
    model = untrained("ngpt")
    evaluate_tasks(
        to_hf(model), tokenizer, ["winogrande"], TaskSettings(shared / "data/evals", limit=5, batch_size=3), False
    )
    for sample in kept["samples"]["winogrande"]:
        for (context, continuation), answer in zip(sample["arguments"], sample["filtered_resps"], strict=True):
            ids = torch.tensor(list((context + continuation).encode()))
            logs = model(ids[:-1].unsqueeze(0))[0].log_softmax(-1).gather(-1, ids[1:].unsqueeze(-1))
            expected = logs[-len(continuation.encode()) :].sum().item()
            assert answer[0] == pytest.approx(expected, rel=1e-4)


def test_what_does_not_fit_is_counted_or_refused(tokenizer: Any, shared: Path) -> None:
    settings = TaskSettings(shared / "data/evals", limit=20)
    rows = lines(shared / "data/evals/winogrande/winogrande_xl.validation.jsonl")[:20]
    longest = [len(row["sentence"].encode()) - 1 + max(len(row[f"option{i}"].encode()) for i in (1, 2)) for row in rows]
    short = build(GPTConfig(vocab_size=257, n_layers=1, d_model=16, n_heads=2, max_seq_len=100))
    found = evaluate_tasks(to_hf(short), tokenizer, ["winogrande"], settings, False)["tasks"]["winogrande"]
    assert found["cut"] == sum(length > 101 for length in longest)
    assert 0 < found["cut"] < 20
    tiny = build(GPTConfig(vocab_size=257, n_layers=1, d_model=16, n_heads=2, max_seq_len=8))
    with pytest.raises(ValueError, match="an answer may be longer than the model's max_seq_len=8: choose other tasks"):
        evaluate_tasks(to_hf(tiny), tokenizer, ["winogrande"], settings, False)


def test_few_shot_examples_come_before(shared: Path, tmp_path: Path) -> None:
    """From a split that is not scored; where the copy has none, this is said."""
    evals = shared / "data/evals"
    with subdued(progress=False):
        task = load_tasks(["arc_easy"], TaskSettings(evals, few_shot=2), tmp_path)["tasks"]["arc_easy"]
    task.set_config(key="num_fewshot", value=2)
    task.set_fewshot_seed(1234)
    task.build_all_requests(limit=3)
    validation = {row["question"] for row in lines(evals / "arc_easy/ARC-Easy.validation.jsonl")}
    shots = task.instances[0].arguments[0].split("\n\n")
    assert len(shots) == 3
    assert all(shot[len("Question: ") :].partition("\nAnswer:")[0] in validation for shot in shots[:2])
    assert shots[2] == FIRST["arc_easy"][0]
    with pytest.raises(ValueError, match="the local copy of wsc273 has only the test split, which is scored"):
        load_tasks(["wsc273"], TaskSettings(evals, few_shot=1), tmp_path)


def test_without_network_one_line_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And at once: the hub's library is told not to try for minutes."""

    def load_dataset(path: str, **settings: Any) -> None:
        assert datasets.config.HF_HUB_OFFLINE
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub\nand more lines")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with (
        subdued(progress=False),
        pytest.raises(
            ValueError, match=r"the data of winogrande cannot be downloaded \(Couldn't reach '.*' on the Hub\): "
        ),
    ):
        load_tasks(["winogrande"], TaskSettings(), tmp_path)
    assert not datasets.config.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"limit": 0}, "limit must be more than 0"),
        ({"few_shot": -1}, "few_shot must be at least 0"),
        ({"batch_size": 0}, "batch_size must be more than 0"),
    ],
)
def test_settings_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskSettings(**fields)


def test_tasks_are_named_once(tokenizer: Any) -> None:
    for names in ([], ["winogrande", "winogrande"]):
        with pytest.raises(ValueError, match="name each task once"):
            evaluate_tasks(to_hf(untrained("gpt")), tokenizer, names, TaskSettings())


def test_the_average_is_over_the_papers_five() -> None:
    def record(acc: float, norm: float | None = None) -> dict[str, Any]:
        scores = {"acc": {"value": acc, "stderr": 0.03}}
        return {"metrics": scores | ({} if norm is None else {"acc_norm": {"value": norm, "stderr": 0.04}})}

    rows = [record(0.1, 0.6), record(0.2, 0.7), record(0.3), record(0.4), record(0.5)]
    records = dict(zip(PAPER_TASKS, rows, strict=True))
    found = paper_average({**records, "piqa": record(0.9)})
    assert found is not None
    assert found["acc"]["value"] == pytest.approx(0.3)
    assert found["acc"]["stderr"] == pytest.approx(0.03 * 5**0.5 / 5)
    assert found["acc_norm"]["value"] == pytest.approx((0.6 + 0.7 + 0.3 + 0.4 + 0.5) / 5)
    assert found["acc_norm"]["stderr"] == pytest.approx((2 * 0.04**2 + 3 * 0.03**2) ** 0.5 / 5)
    records.pop("wsc273")
    assert paper_average(records) is None
