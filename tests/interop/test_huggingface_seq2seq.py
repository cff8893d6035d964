"""Encoder-decoders in transformers: the bare model's numbers, padding, cache, beams, saving, training, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_pairs
import torch
from cases import ARMS, LENGTHS, Case, make_pair_case

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

from ride_along import twin  # noqa: E402

from spherelm import attach_retraction, departure, load_model  # noqa: E402
from spherelm.generation.beam import BeamSettings, beam_search  # noqa: E402
from spherelm.interop.export import export  # noqa: E402
from spherelm.interop.huggingface import SphereSeq2SeqConfig, SphereSeq2SeqLM, to_hf  # noqa: E402
from spherelm.train.trainer import train  # noqa: E402

both_arms = pytest.mark.parametrize("arm", ARMS)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


def inputs(c: Case) -> dict[str, torch.Tensor]:
    """The case's sources as transformers pads them."""
    mask = c.source.ge(0).long()
    return {"input_ids": c.source.clamp_min(0), "attention_mask": mask}


def close(ours: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-11)


@both_arms
@pytest.mark.parametrize("fields", [{}, {"n_heads": 6, "n_kv_heads": 2}, {"share_embeddings": True}], ids=str)
def test_logits_and_loss_are_the_bare_models(arm: str, fields: dict[str, Any]) -> None:
    c = make_pair_case(arm, **fields)
    wrapped = to_hf(c.model)
    assert isinstance(wrapped, SphereSeq2SeqLM)
    for implementation in ("sdpa", "eager"):
        wrapped.set_attn_implementation(implementation)
        found = wrapped(**inputs(c), decoder_input_ids=c.tokens, labels=c.targets)
        close(found.logits, c.model(c.source, c.tokens))
        assert found.loss.item() == pytest.approx(c.model.loss(*c.batch).item(), rel=1e-6)


@both_arms
def test_padding_on_either_side_changes_nothing(arm: str) -> None:
    c = make_pair_case(arm)
    wrapped, right = to_hf(c.model), inputs(c)
    rows = [(right["input_ids"][i, :n], 8 - n) for i, n in enumerate(LENGTHS)]
    ids = torch.stack([torch.cat((torch.full((gap,), 5), row)) for row, gap in rows])
    mask = torch.stack([torch.cat((torch.zeros(gap), torch.ones(8 - gap))) for _, gap in rows]).long()
    found = wrapped(input_ids=ids, attention_mask=mask, decoder_input_ids=c.tokens)
    close(found.logits, c.model(c.source, c.tokens))
    left = torch.cat((torch.full((3, 2), 9), c.tokens), 1)  # a target padded on the left counts from its first token
    seen = torch.tensor([[0, 0, *[1] * 9]] * 3)
    close(wrapped(**right, decoder_input_ids=left, decoder_attention_mask=seen).logits[:, 2:], found.logits)


@both_arms
def test_cached_decoding_is_the_full_pass(arm: str) -> None:
    c = make_pair_case(arm)
    wrapped = to_hf(c.model.eval())
    states = wrapped.get_encoder()(**inputs(c))
    cache, parts = None, []
    for piece in c.tokens.split([4, 1, 1, 3], dim=1):
        mask = inputs(c)["attention_mask"]
        out = wrapped(encoder_outputs=states, attention_mask=mask, decoder_input_ids=piece, past_key_values=cache)
        cache = out.get("cache", out.get("past_key_values"))
        parts.append(out.logits)
    close(torch.cat(parts, 1), c.model(c.source, c.tokens))
    assert cache.get_seq_length() == 9


@both_arms
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_its_beams_and_ours_find_the_same(arm: str, length_penalty: float) -> None:
    """Two independent searches; sources of different lengths, so that theirs are padded and ours are not.

    At the last step they differ by intention: there, texts that were cut off compete with finished
    ones in transformers.
    """
    c = make_pair_case(arm, vocab_size=7, max_seq_len=32)
    model = c.model.float().eval()
    with torch.no_grad():  # texts shall end, so that there is something to compare
        dict(model.named_parameters())["head.s_z.value" if arm == "ngpt" else "head.linear.weight"][0] *= 3
    sources = [[3, 1, 4], [1, 5, 2, 6, 5], [2], [6, 6], [5, 4, 3, 2], [1, 1, 1], [4, 2], [2, 6, 4, 1]]
    ours = beam_search(model, sources, 20, 0, BeamSettings(3, length_penalty))
    ids = torch.tensor([[*s, 0, *[0] * (5 - len(s))] for s in sources])
    mask = torch.tensor([[1] * (len(s) + 1) + [0] * (5 - len(s)) for s in sources])
    wrapped = to_hf(model)
    wrapped.config.decoder_start_token_id = wrapped.config.eos_token_id = wrapped.config.pad_token_id = 0
    wrapped.generation_config = transformers.GenerationConfig.from_model_config(wrapped.config)
    theirs = wrapped.generate(
        input_ids=ids, attention_mask=mask, num_beams=3, max_new_tokens=20, length_penalty=length_penalty,
        do_sample=False, early_stopping=False,
    )  # fmt: skip
    ended = [(row[1:], found[0].tokens) for row, found in zip(theirs.tolist(), ours, strict=True) if 0 in row[1:]]
    assert len(ended) >= 2
    for row, tokens in ended:
        assert row[: row.index(0) + 1] == tokens


@both_arms
def test_greedy_generation_is_the_bare_models(arm: str) -> None:
    from spherelm.generation.generate import generate

    c = make_pair_case(arm, max_seq_len=32)
    model = c.model.float().eval()
    wrapped = to_hf(model)
    source = [4, 9, 2, 7]
    ours = generate(model, [source], 10, temperature=0.0, eos_id=0)
    for use_cache in (True, False):
        theirs = wrapped.generate(
            torch.tensor([[*source, 0]]), max_new_tokens=10, do_sample=False, decoder_start_token_id=0,
            eos_token_id=0, pad_token_id=0, use_cache=use_cache,
        )  # fmt: skip
        assert theirs.tolist() == ours


def test_embeddings_in_the_place_of_tokens_are_refused() -> None:
    """They would be dropped otherwise."""
    c = make_pair_case("ngpt")
    with pytest.raises(ValueError, match="the encoder reads input_ids, not inputs_embeds"):
        to_hf(c.model)(inputs_embeds=c.model.embed(c.tokens), labels=c.tokens)


@both_arms
def test_a_begun_target_padded_on_the_right_is_refused(arm: str) -> None:
    c = make_pair_case(arm)
    seen = torch.tensor([[1] * 9, [1] * 9, [1] * 7 + [0] * 2])
    begun = {"decoder_input_ids": c.tokens, "decoder_attention_mask": seen}
    with pytest.raises(ValueError, match="prompts are padded on the right"):
        to_hf(c.model.float().eval()).generate(
            **inputs(c), **begun, decoder_start_token_id=0, pad_token_id=0, max_new_tokens=2
        )


@both_arms
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("tie", [False, True])
def test_what_is_saved_comes_back(arm: str, share: bool, tie: bool, tmp_path: Path) -> None:
    c = make_pair_case(arm, share_embeddings=share, tie_embeddings=tie)
    wrapped = to_hf(c.model.float())
    wrapped.save_pretrained(tmp_path)
    again, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(again, SphereSeq2SeqLM)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert isinstance(again.config, SphereSeq2SeqConfig)
    assert again.config.arm_config() == wrapped.config.arm_config()
    assert (again.model.encoder.embed.weight is again.model.embed.weight) == share
    assert (again.model.head.linear.weight is again.model.embed.weight) == tie
    with torch.no_grad():
        assert torch.equal(again.model(c.source, c.tokens), c.model(c.source, c.tokens))


def test_hidden_states_and_attentions_are_shown_on_request() -> None:
    c = make_pair_case("ngpt")
    wrapped = to_hf(c.model)
    wrapped.set_attn_implementation("eager")
    out = wrapped(**inputs(c), decoder_input_ids=c.tokens, output_hidden_states=True, output_attentions=True)
    assert [len(x) for x in (out.decoder_hidden_states, out.encoder_hidden_states)] == [3, 4]
    assert [len(x) for x in (out.decoder_attentions, out.cross_attentions, out.encoder_attentions)] == [2, 2, 3]
    for weights in (*out.decoder_attentions, *out.cross_attentions, *out.encoder_attentions):
        close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert out.cross_attentions[0].shape == (3, 3, 9, 8)
    assert out.cross_attentions[0][2, :, :, 1:].eq(0).all(), "a source of one token"


@both_arms
def test_the_trainer_of_transformers_trains_it(arm: str, tmp_path: Path) -> None:
    model = to_hf(make_pair_case(arm, max_seq_len=32).model.float())
    model.config.decoder_start_token_id = model.config.pad_token_id = model.config.eos_token_id = 0
    rows = [{"input_ids": [3 + i, 4, 0], "labels": [4, 3 + i, 0]} for i in range(8)]

    class Collator:
        def __call__(self, batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
            ids, labels = (torch.tensor([row[name] for row in batch]) for name in ("input_ids", "labels"))
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    arguments = transformers.Seq2SeqTrainingArguments(
        str(tmp_path), max_steps=30, per_device_train_batch_size=8, learning_rate=1e-2, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, use_cpu=True, weight_decay=0.0, label_smoothing_factor=0.0,
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    if arm == "ngpt":
        attach_retraction(optimizer, model)
    trainer = transformers.Seq2SeqTrainer(
        model, arguments, train_dataset=rows, data_collator=Collator(), optimizers=(optimizer, None)
    )
    batch = Collator()(rows)
    before = model(**batch).loss.item()
    trainer.train()
    assert model(**batch).loss.item() < 0.8 * before
    assert departure(model) < 1e-6


def test_what_is_missing_is_named() -> None:
    c = make_pair_case("ngpt")
    wrapped = to_hf(c.model)
    with pytest.raises(ValueError, match="there is no source"):
        wrapped(decoder_input_ids=c.tokens)
    with pytest.raises(ValueError, match="there is nothing to write"):
        wrapped(input_ids=c.tokens)
    with pytest.raises(ValueError, match="decoder_start_token_id is not set"):
        wrapped(input_ids=c.tokens, labels=c.targets)
    with pytest.raises(ValueError, match="a spherelm-seq2seq model has the architecture encdec"):
        SphereSeq2SeqConfig(architecture={"kind": "decoder"})


@both_arms
@pytest.mark.parametrize(
    "fields", [{"n_encoder_layers": 1}, {"share_embeddings": True, "tie_embeddings": True}], ids=str
)
def test_the_code_that_rides_along_translates(arm: str, fields: dict[str, Any]) -> None:
    c = make_pair_case(arm, **fields)
    ours, theirs = to_hf(c.model).train(), twin(c.model).train()
    close(theirs(**inputs(c), decoder_input_ids=c.tokens).logits, c.model(c.source, c.tokens))
    given = {**inputs(c), "decoder_input_ids": c.tokens, "labels": c.targets}
    losses = [each(**given).loss for each in (ours, theirs)]
    close(*losses)
    for loss in losses:
        loss.backward()
    gradients = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        close(parameter.grad, gradients[name].grad)
    settings = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "decoder_start_token_id": 0}
    padded = {name: value.flip(1) for name, value in inputs(c).items()}  # on the left, where a source may be padded too
    for source in (inputs(c), {**padded, "input_ids": right_side_first(**padded)}):
        written = [each.eval().generate(**source, **settings) for each in (ours, theirs)]
        assert torch.equal(*written)
    for each in (ours, theirs):
        each.set_attn_implementation("eager")
    shown = [each(**given, output_attentions=True, output_hidden_states=True) for each in (ours, theirs)]
    for name in ("decoder_hidden_states", "decoder_attentions", "cross_attentions", "encoder_hidden_states"):
        for wanted, found in zip(shown[0][name], shown[1][name], strict=True):
            real = c.source.ge(0) if name == "encoder_hidden_states" else slice(None)
            close(found[real], wanted[real])


def right_side_first(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Rows of reversed tokens behind their padding, each turned around."""
    rows = [
        torch.cat((row[mask == 0], row[mask == 1].flip(0))) for row, mask in zip(input_ids, attention_mask, strict=True)
    ]
    return torch.stack(rows)


@pytest.mark.row("Hugging Face transformers")
@both_arms
@pytest.mark.parametrize("standalone", [False, True])
def test_an_exported_run_translates(arm: str, standalone: bool, tmp_path: Path) -> None:
    data = tiny_pairs.make_pairs(tmp_path, tokenizer=None, vocab_size=270)
    train(tiny_pairs.run_config(arm, data), tmp_path / "run", show_progress=False)
    export(tmp_path / "run", tmp_path / "out", standalone=standalone)
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ("auto_map" in described) == standalone
    model, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    bare = load_model(tmp_path / "run")
    texts = ["bada ki", "mu"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    found = model.generate(**batch, num_beams=3, max_new_tokens=8, do_sample=False)
    prompts = [[t for t in row if t != 0] for row in tokenizer(texts).input_ids]
    for row, hypotheses in zip(found.tolist(), beam_search(bare, prompts, 8, 0, BeamSettings(3)), strict=True):
        assert [t for t in row if t != 0] == [t for t in hypotheses[0].tokens if t != 0]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModelForSeq2SeqLM" in card
    assert "text2text-generation" in card
