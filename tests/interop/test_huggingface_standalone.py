"""The code that rides along with an exported model computes what the model of this package computes.

`test_huggingface_export.py` loads it where spherelm is not installed.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import hybrid_config
from torch import Tensor

from spherelm import departure
from spherelm.models import LanguageModel, build
from spherelm.models.config import GPTConfig, NGPTConfig, ScaleSpec, Variant

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
from ride_along import classes_of, twin  # noqa: E402

from spherelm.interop.huggingface import to_hf  # noqa: E402
from spherelm.interop.huggingface.folded import to_folded_hf  # noqa: E402

SIZES: dict[str, Any] = {"vocab_size": 37, "n_layers": 2, "d_model": 32, "n_heads": 4, "max_seq_len": 64}
OTHERWISE = Variant(step="riemannian", alpha_sign="free", qk_norm=False)
DENSE = {
    "gpt": GPTConfig(**SIZES),
    "gpt-grouped": GPTConfig(**SIZES, n_kv_heads=2, qk_norm=True, tie_embeddings=True),
    "gpt-nvidia": GPTConfig(**SIZES, rope="nvidia"),
    "gpt-relu2": GPTConfig(**SIZES, activation="relu2"),
    "ngpt": NGPTConfig(**SIZES),
    "ngpt-inner": NGPTConfig(**SIZES, variant=Variant(inner_norm=True)),
    "ngpt-inner-relu2": NGPTConfig(**SIZES, activation="relu2", variant=Variant(inner_norm=True)),
    "ngpt-grouped": NGPTConfig(**SIZES, n_kv_heads=1, rope="none", tie_embeddings=True),
    "ngpt-nvidia": NGPTConfig(**SIZES, rope="nvidia", variant=Variant(step="nvidia")),
    "ngpt-forms": NGPTConfig(**SIZES, variant=OTHERWISE, s_u=ScaleSpec(form="scalar"), s_z=ScaleSpec(form="fixed")),
}
HYBRIDS = {
    f"{arm}-{pattern}": hybrid_config(arm, pattern, n_shared_experts=1)
    for arm in ("gpt", "ngpt")
    for pattern in ("MA-M", "-MAO")
}
HYBRIDS |= {
    "gpt-relu2-O": hybrid_config("gpt", "AO", n_shared_experts=1, activation="relu2"),
    "ngpt-inner-O": hybrid_config("ngpt", "MAO", n_shared_experts=1, **{"variant.inner_norm": True}),
    "ngpt-inner-relu2-O": hybrid_config(
        "ngpt", "M-O", n_shared_experts=1, activation="relu2", **{"variant.inner_norm": True}
    ),
}
every_model = pytest.mark.parametrize("name", [*DENSE, *HYBRIDS])
every_dense = pytest.mark.parametrize("name", DENSE)


def make_model(name: str) -> LanguageModel:
    """With learned scales and gains that are not at their starts."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build({**DENSE, **HYBRIDS}[name]).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data *= 1 + 0.3 * torch.rand_like(parameter)
    assert isinstance(model, LanguageModel)
    return model


def batch() -> dict[str, Tensor]:
    """Two texts, the second of them padded on the left."""
    tokens = torch.randint(1, 37, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def close(theirs: Tensor, ours: Tensor) -> None:
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


@every_model
def test_logits_and_states_are_ours_with_every_attention(name: str) -> None:
    model, inputs = make_model(name), batch()
    ours, theirs, real = to_hf(model), twin(model), inputs["attention_mask"].bool()
    with torch.no_grad():
        wanted = ours(**inputs, output_hidden_states=True)
        for attention in ("sdpa", "eager"):
            theirs.set_attn_implementation(attention)
            found = theirs(**inputs, output_hidden_states=True, output_attentions=attention == "eager")
            close(found.logits[real], wanted.logits[real])
            for state, their_state in zip(wanted.hidden_states, found.hidden_states, strict=True):
                close(their_state[real], state[real])
        ours.set_attn_implementation("eager")
        for weights, their_weights in zip(
            ours(**inputs, output_attentions=True).attentions, found.attentions or (), strict=True
        ):
            close(their_weights.transpose(1, 2)[real], weights.transpose(1, 2)[real])


@every_model
def test_loss_and_gradients_are_ours(name: str) -> None:
    model, tokens = make_model(name), batch()["input_ids"]
    ours, theirs = to_hf(model), twin(model)
    losses = [each.train()(tokens, labels=tokens).loss for each in (ours, theirs)]
    close(*losses)
    for loss in losses:
        loss.backward()
    gradients = dict(ours.named_parameters())
    for key, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            close(parameter.grad, gradients[key].grad)
    theirs.zero_grad()
    theirs.activation_checkpointing_enable()
    close(theirs(tokens, labels=tokens).loss, losses[0])


@every_model
def test_it_writes_what_ours_writes(name: str) -> None:
    model = make_model(name)
    settings = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    ours, theirs = (each.generate(**batch(), **settings) for each in (to_hf(model), twin(model)))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["gpt", "ngpt"])
def test_any_optimizer_keeps_its_unit_weights_on_the_sphere(name: str) -> None:
    tokens, first = batch()["input_ids"], twin(make_model(name))
    for model in (first, copy.deepcopy(first)):
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.5)
        for _ in range(2):
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
        lengths = model.model.blocks[0].mlp.part.o.weight.norm(dim=0)
        assert departure(model) < 1e-6
        assert ((lengths - 1).abs().max() < 1e-6) == (name == "ngpt")


def test_weights_that_something_else_moved_are_refused() -> None:
    model, tokens = twin(make_model("ngpt")).train(), batch()["input_ids"]
    model.model.embed.weight.data *= 1.1
    with pytest.raises(ValueError, match="embed has left the unit sphere"):
        model(tokens)


@every_dense
def test_folded_it_computes_the_same_and_its_head_is_a_matrix(name: str) -> None:
    model, inputs = make_model(name), batch()
    folded, real = to_folded_hf(model), inputs["attention_mask"].bool()
    with torch.no_grad():
        close(folded(**inputs).logits[real], to_hf(model)(**inputs).logits[real])
        states = folded.model(**inputs).last_hidden_state
        close(F.linear(states, folded.lm_head.weight), folded(**inputs).logits)
    assert not any(key.endswith(("s_u.value", "s_v.value", "s_z.value", ".norm.weight")) for key in folded.state_dict())


def test_a_folded_ngpt_is_not_trained_and_a_hybrid_not_folded() -> None:
    folded, tokens = to_folded_hf(make_model("ngpt")), batch()["input_ids"]
    with pytest.raises(ValueError, match="for inference"):
        folded.train()(tokens)
    with pytest.raises(ValueError, match=r"cannot be folded.*without --folded"):
        to_folded_hf(make_model("ngpt-MA-M"))


LENGTHS = [5, 1, 7, 3]


def flat_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float, seen: list[Any], **kwargs: Any
) -> tuple[Tensor, None]:
    """As a server has it: the texts of a batch stand one behind the other, and it alone knows where each begins."""
    assert mask is None
    assert module.is_causal
    seen.append(module.layer_idx)
    parts = zip(*(x.split(LENGTHS, dim=2) for x in (q, k, v)), strict=True)
    made = [F.scaled_dot_product_attention(*each, is_causal=True, scale=scaling, enable_gqa=True) for each in parts]
    return torch.cat(made, dim=2).transpose(1, 2).reshape(q.shape[2], -1), None


@every_dense
def test_a_server_calls_the_base_model_as_vllm_does(name: str) -> None:
    """Calls of vLLM's Transformers backend (vllm/model_executor/models/transformers/base.py),
    with its call and shapes.
    """
    model = make_model(name)
    folded, classes = to_folded_hf(model), classes_of(model, "spherelm-folded")
    transformers.AttentionInterface.register("flat", flat_attention)
    base = classes["AutoModel"](copy.deepcopy(folded.config)).eval()
    base.load_state_dict(
        {key.removeprefix("model."): value for key, value in folded.state_dict().items() if key.startswith("model.")}
    )
    base.config._attn_implementation = "flat"
    tokens = torch.randint(1, 37, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).unsqueeze(0)
    seen: list[Any] = []
    with torch.no_grad():
        states = base(
            input_ids=tokens,
            inputs_embeds=None,
            use_cache=False,
            position_ids=positions,
            seen=seen,
            return_dict=False,
        )[0][0]
        logits = folded.lm_head(states)
        wanted = torch.cat([model(part)[0] for part in tokens.split(LENGTHS, dim=1)])
    close(logits, wanted)
    assert seen == [0, 1]
    assert base.is_backend_compatible()
    # vLLM looks for the call and its scale in the source of the attention's own forward pass.
    source = inspect.getsource(type(base.blocks[0].attention.part).forward)
    assert source.count("ALL_ATTENTION_FUNCTIONS.get_interface(") == source.count("scaling=self.scaling") == 1
    config = base.config
    assert (config.num_attention_heads, config.head_dim, config.hidden_size) == (4, 8, 32)
    for pattern in base.tp_plan or ():
        assert isinstance(base.get_submodule(pattern.replace("*", "0")), torch.nn.Linear)
