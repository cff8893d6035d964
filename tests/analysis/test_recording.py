"""A recorded pass is the model's own pass: its equations hold between what was written down,
and nothing stays behind.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from spherelm.analysis import motion, weights
from spherelm.analysis.inside import look_inside
from spherelm.analysis.recording import Recording, attention_entropy, record
from spherelm.layers.attention import attend
from spherelm.models import GPTConfig, NGPTConfig, build
from spherelm.models.decoder import Decoder
from spherelm.sphere import norm, step

SHAPE = {"vocab_size": 37, "n_layers": 3, "d_model": 24, "n_heads": 3, "d_ff": 40, "max_seq_len": 16}
ARMS = ("gpt", "ngpt")


def model_of(arm: str, **fields: int) -> Decoder:
    model = build({"gpt": GPTConfig, "ngpt": NGPTConfig}[arm](**{**SHAPE, **fields})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "alpha" in name or parameter.ndim == 1:
                parameter.mul_(1 + torch.randn_like(parameter))
            elif arm == "gpt":
                parameter.mul_(8)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(37, (2, 11), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=ARMS)
def recorded(request: pytest.FixtureRequest) -> tuple[Decoder, Recording]:
    model = model_of(request.param)
    return model, record(model, tokens())


def test_it_starts_at_the_embedding_and_ends_where_the_model_does(recorded: tuple[Decoder, Recording]) -> None:
    model, found = recorded
    assert len(found.stops) == 7
    assert len(found.proposals) == 6
    torch.testing.assert_close(found.stops[0], model.embedded(tokens()).flatten(0, 1), rtol=0, atol=0)
    torch.testing.assert_close(found.stops[-1], model.trunk(model.embedded(tokens())).flatten(0, 1), rtol=0, atol=0)


def test_each_step_of_a_gpt_adds_its_proposal() -> None:
    found = record(model_of("gpt"), tokens())
    for i, proposal in enumerate(found.proposals):
        torch.testing.assert_close(found.stops[i + 1], found.stops[i] + proposal)


def test_each_step_of_an_ngpt_moves_towards_its_proposal() -> None:
    model = model_of("ngpt")
    found = record(model, tokens())
    for i, proposal in enumerate(found.proposals):
        block = model.blocks[i // 2]
        alpha = (block.mlp if i % 2 else block.attention).alpha().abs()  # type: ignore[union-attr, operator]
        torch.testing.assert_close(found.stops[i + 1], step(found.stops[i], norm(proposal), alpha))


def broken(*inputs: object) -> torch.Tensor:
    raise RuntimeError("on purpose")


def test_nothing_stays_behind_even_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("ngpt")
    before = model(tokens())
    record(model, tokens())
    with monkeypatch.context() as patch:
        patch.setattr(model.blocks[1].mlp, "forward", broken)
        with pytest.raises(RuntimeError, match="on purpose"):
            record(model, tokens())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert model.runtime.attend is attend
    torch.testing.assert_close(model(tokens()), before, rtol=0, atol=0)


@pytest.mark.parametrize("n_kv_heads", [3, 1])
def test_attention_entropy_is_that_of_the_weights(n_kv_heads: int) -> None:
    q, k = torch.randn(2, 3, 6, 8), torch.randn(2, n_kv_heads, 6, 8)
    found = attention_entropy(q, k, 0.5)
    assert found.shape == (3, 2, 6)
    for head in range(3):
        for t in range(6):
            p = torch.softmax(0.5 * q[1, head, t] @ k[1, head if n_kv_heads == 3 else 0, : t + 1].T, -1)
            assert found[head, 1, t].item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-5)


def test_equal_keys_spread_attention_as_far_as_it_goes() -> None:
    found = attention_entropy(torch.randn(1, 1, 9, 4), torch.ones(1, 1, 9, 4), 1.0)
    torch.testing.assert_close(found[0, 0], torch.arange(1, 10.0).log(), atol=1e-5, rtol=0)
    recording = Recording(torch.zeros(1, 9, dtype=torch.int64), [], [], found.unsqueeze(0), [(1, "attention")])
    _, spread = motion.attention_spread(recording)
    assert spread == pytest.approx(1.0, abs=1e-5)


def test_entropies_come_from_the_models_own_attention() -> None:
    """Where s_qk is zero every query looks at all keys alike."""
    model = model_of("ngpt")
    with torch.no_grad():
        model.blocks[1].attention.part.s_qk.value.zero_()  # type: ignore[union-attr, operator]
    found = motion.measure_motion(model, record(model, tokens()))
    assert found.entropies.shape == found.spread.shape == (3, 3)
    assert found.spread[1] == pytest.approx(1.0, abs=1e-5)
    assert (found.spread[[0, 2]] < 0.999).all()


def test_the_lens_ends_at_the_models_loss(recorded: tuple[Decoder, Recording]) -> None:
    model, recording = recorded
    lens = motion.logit_lens(model, recording)
    targets = F.pad(tokens()[:, 1:], (0, 1), value=-100)
    assert lens.loss[-1] == pytest.approx(model.loss(tokens(), targets).item(), rel=1e-5)
    assert lens.agreement[-1] == 1
    assert lens.divergence[-1] == pytest.approx(0, abs=1e-6)
    assert (lens.divergence[:-1] > 0).all()
    logits = model(tokens()).flatten(0, 1)
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean().item()
    assert lens.entropy[-1] == pytest.approx(entropy, rel=1e-5)


def test_the_lens_reads_any_stop_as_the_model_reads_the_last() -> None:
    """A model cut off after a block predicts what the lens says there."""
    model = model_of("gpt")
    recording = record(model, tokens())
    lens = motion.logit_lens(model, recording)
    whole = model.blocks
    model.blocks = whole[:2]  # type: ignore[assignment]
    cut = model(tokens()).flatten(0, 1)
    targets = F.pad(tokens()[:, 1:], (0, 1), value=-100).flatten()
    assert lens.loss[4] == pytest.approx(F.cross_entropy(cut, targets).item(), rel=1e-5)
    model.blocks = whole
    final = model(tokens()).flatten(0, 1)
    assert lens.agreement[4] == pytest.approx((cut.argmax(-1) == final.argmax(-1)).double().mean().item())
    divergence = F.kl_div(cut.log_softmax(-1), final.log_softmax(-1), log_target=True, reduction="batchmean")
    assert lens.divergence[4] == pytest.approx(divergence.item(), rel=1e-4)


def test_chunks_do_not_matter(recorded: tuple[Decoder, Recording], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = motion.logit_lens(*recorded)
    monkeypatch.setattr(motion, "CHUNK", 5)
    parts = motion.logit_lens(*recorded)
    for name in ("loss", "entropy", "agreement", "divergence"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-4, abs=1e-6)


def test_angles_lengths_and_directions(recorded: tuple[Decoder, Recording]) -> None:
    model, recording = recorded
    found = motion.measure_motion(model, recording)
    stops = [stop.double() for stop in recording.stops]
    cosine = F.cosine_similarity(stops[2], stops[3], dim=-1)
    assert found.angles[2] == pytest.approx(cosine.acos().rad2deg().numpy(), abs=1e-2)
    assert found.angles.shape == (6, 22)
    assert (found.chords <= found.angles.sum(axis=0) + 1e-3).all(), "the straight way is the shortest"
    assert found.lengths[-1] == pytest.approx(stops[-1].norm(dim=-1).mean().item(), rel=1e-5)
    assert found.to_state[3] == pytest.approx(
        F.cosine_similarity(recording.proposals[3], recording.stops[-1], dim=-1).mean().item(), abs=1e-5
    )


def test_output_directions_are_those_in_which_logits_grow(recorded: tuple[Decoder, Recording]) -> None:
    """The logit of an entry, over a state's length (GPT) or as it is (nGPT),
    is largest where the state points its way.
    """
    model, _ = recorded
    directions = motion.output_directions(model)
    assert directions.norm(dim=-1) == pytest.approx(torch.ones(37).numpy(), abs=1e-5)
    states = torch.cat((directions[5:6], norm(torch.randn(200, 24))))
    logits = motion._logits(model, states)[:, 5]
    best = logits.argmax() if hasattr(model.head, "norm") or model.head.s_z()[5] > 0 else logits.argmin()  # type: ignore[operator]
    assert best == 0


@pytest.mark.parametrize("arm", ARMS)
def test_all_is_measured_at_once_and_agrees_with_its_parts(arm: str) -> None:
    model = model_of(arm, n_layers=4)
    inside = look_inside(model, tokens())
    assert inside.layer == 2
    assert inside.pair_rows == 37
    assert inside.singular["Q"].shape == (4, 3, 8)
    assert inside.weights.condition_numbers["V"].shape == inside.unit_conditions["V"].shape == (4,)
    for name, values in weights.conditions(weights.singular_values(model, unit=True)).items():
        assert inside.unit_conditions[name] == pytest.approx(values, rel=1e-4), "also where it is not computed again"
    assert (inside.weights.s_z is None) == (arm == "gpt")
    assert all(0 < value <= 1 for ranks in inside.ranks.values() for value in ranks)
    assert look_inside(model, tokens(), layer=0).layer == 0


def test_a_model_with_nan_is_refused() -> None:
    model = model_of("gpt")
    model.get_parameter("blocks.1.mlp.part.u.weight").data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.part\.u\.weight holds NaN or Inf"):
        look_inside(model, tokens())


def test_states_that_overflow_are_refused() -> None:
    model = model_of("gpt")
    with torch.no_grad():
        model.get_parameter("blocks.1.mlp.part.u.weight").mul_(1e30)
        model.get_parameter("blocks.1.mlp.part.v.weight").mul_(1e30)
    with pytest.raises(ValueError, match="the hidden state at stop 4 holds NaN or Inf"):
        look_inside(model, tokens())
