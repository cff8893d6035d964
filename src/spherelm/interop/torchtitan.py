"""GPT and nGPT for torchtitan 0.3: its trainer, checkpoints and parallelism; our models, data, groups and retraction.

A module `my_runs.py` with a function `ngpt` that returns `trainer_config(run)` is trained by
`torchrun --nproc-per-node 8 -m torchtitan.train --module my_runs --config ngpt`. FSDP, HSDP and tensor parallelism;
pipeline, context and expert parallelism are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

try:
    import tyro
    from torchtitan.components.checkpoint import CheckpointManager
    from torchtitan.components.checkpoint_utils import canonical_fqn
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.components.loss import CrossEntropyLoss
    from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer
    from torchtitan.components.tokenizer import BaseTokenizer
    from torchtitan.config import TORCH_DTYPE_MAP, ParallelismConfig, TrainingConfig
    from torchtitan.distributed.compile import apply_compile
    from torchtitan.distributed.fsdp import disable_fsdp_gradient_division
    from torchtitan.protocols.model import BaseModel
    from torchtitan.protocols.model_spec import ModelSpec
    from torchtitan.protocols.state_dict_adapter import StateDictAdapter
    from torchtitan.trainer import Trainer
except ImportError as error:
    raise ImportError(
        f"spherelm.interop.torchtitan needs torchtitan: pip install torchtitan==0.3.0 ({error})"
    ) from error

from spherelm.data.sources import Reading, parse_data
from spherelm.errors import UserError
from spherelm.interop.tensor_parallel import tensor_parallel
from spherelm.layers.linear import unit_modules
from spherelm.models import Config
from spherelm.models.decoder import LanguageModel
from spherelm.optim import OptimConfig, ScheduleConfig, attach_retraction, build_optimizer, factor
from spherelm.optim.retraction import check_retraction
from spherelm.runs.config import RunConfig
from spherelm.sharding import cut


class TitanModel(BaseModel, LanguageModel):  # type: ignore[misc]
    """`LanguageModel` as torchtitan makes and calls one;
    its parameters have the names that they have in our checkpoints.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseModel.Config):  # type: ignore[misc]
        """shape: the config of the model. seed: of its weights, which are those that a run of ours starts with."""

        shape: Config
        seed: int = 0

        def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
            """Raise `UserError` for what this model cannot be trained with."""
            if config.training.seq_len > self.shape.max_seq_len:
                raise UserError(
                    f"seq_len={config.training.seq_len} is longer than max_seq_len={self.shape.max_seq_len}"
                )

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
            """Parameters, and operations a token: 6 a weight of a product,
            12 L d T for attention (PaLM, appendix B).
            """
            products = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
            attention = 12 * self.shape.n_layers * self.shape.d_model * seq_len
            return sum(p.numel() for p in model.parameters()), 6 * products + attention

        def to_dict(self) -> dict[str, Any]:
            """For the log."""
            return asdict(self.shape)

    def __init__(self, config: Config) -> None:
        self.seed = config.seed
        LanguageModel.__init__(self, config.shape)

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks, by the name that torchtitan knows."""
        return self.blocks

    def get_submodule(self, target: str) -> nn.Module:
        """As torch's, with `layers` for `blocks`."""
        return self.blocks if target == "layers" else super().get_submodule(target)

    def verify_module_protocol(self) -> None:
        """Nothing: the modules within are torch's own, and are initialized from here."""

    def init_weights(self, **kwargs: Any) -> None:
        """Draw the weights: all of them on every process, which keeps its parts."""
        if next(self.parameters()).is_meta:
            return
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(self.seed)
            drawn = LanguageModel(self.config).state_dict()
        set_model_state_dict(self, drawn, options=StateDictOptions(full_state_dict=True))

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Logits, as `LanguageModel.forward`. positions: not read;
        documents in a row see those before, as in our runs.
        """
        return LanguageModel.forward(self, tokens)


def parallelize(
    model: TitanModel, *, parallel_dims: Any, training: TrainingConfig, parallelism: ParallelismConfig,
    compile_config: Any, ac_config: Any, dump_folder: str,
) -> TitanModel:  # fmt: skip
    """Tensor parallelism, recomputation, compilation and FSDP, in this order, as `ModelSpec.parallelize_fn`.

    Weights are gathered in float32 and cast for the products, as in our own runs: norms and learned scales keep their
    digits. Without tensor parallelism matrices are cut between unit vectors.
    """
    if parallel_dims.cp_enabled or parallel_dims.ep_enabled or parallelism.spmd_backend != "partial_dtensor":
        raise UserError(
            "spherelm models train under torchtitan with spmd_backend=partial_dtensor, and without CP and EP"
        )
    axes = {name + ".weight": axis for name, _, axis in unit_modules(model)}
    placements = {id(p): axes.get(name) for name, p in model.named_parameters()}
    if parallel_dims.tp_enabled:
        tensor_parallel(model, parallel_dims.get_mesh("tp"))
    if ac_config is not None:
        ac_config.build(dump_folder=dump_folder).apply(model)
    if compile_config.enable and "model" in compile_config.components:
        apply_compile(model, compile_config=compile_config, parallel_dims=parallel_dims)
    names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
    mesh = parallel_dims.get_mesh(names)
    model.runtime.compute_dtype = TORCH_DTYPE_MAP[training.mixed_precision_param]
    policy = MixedPrecisionPolicy(
        reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce], cast_forward_inputs=False
    )
    for module in (*model.blocks, model):
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            shard_placement_fn=None
            if parallel_dims.tp_enabled
            else lambda p: cut(p.shape, placements.get(id(p)), mesh.size(-1)),
        )
    disable_fsdp_gradient_division(model)
    if mesh.device_type == "cpu":  # gloo has no sums with factors
        for module in (*model.blocks, model):
            module.set_force_sum_reduction_for_comms(True)
    return model


def keep_on_sphere(optimizers: OptimizersContainer, model_parts: list[nn.Module], parallel_dims: Any) -> None:
    """Retract after every step of torchtitan's own optimizers, as
    `ModelSpec.post_optimizer_build_fn`; ours do already.
    """
    for part in model_parts:
        if not isinstance(optimizers, Optimizers) and next(unit_modules(part), None) is not None:
            for optimizer in optimizers.optimizers:
                check_retraction(optimizer, part, allow_decay=False)
            attach_retraction(optimizers, part)


class Adapter(StateDictAdapter):  # type: ignore[misc]
    """Between torchtitan's checkpoints, whose names are ours, and the folders that `spherelm export` writes."""

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """By the names in an exported folder, where a tied matrix is there once."""
        tied = "head.linear.weight" if self.model_config.shape.tie_embeddings else None
        return {f"model.{name}": value for name, value in state_dict.items() if name != tied}

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        """The inverse of `to_hf`."""
        found = {name.removeprefix("model."): value for name, value in hf_state_dict.items()}
        if self.model_config.shape.tie_embeddings:
            found["head.linear.weight"] = found["embed.weight"]
        return found


class Text(BaseDataLoader):  # type: ignore[misc]
    """The batches of our own loader: the text of `--data`, the same at any number of processes,
    which its state fits.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):  # type: ignore[misc]
        """data: as `spherelm train --data`; by default the shipped text. seed: of the order."""

        data: str | None = None
        seed: int = 0

    def __init__(
        self, config: Config, *, dp_world_size: int, dp_rank: int, seq_len: int, local_batch_size: int, **kwargs: Any
    ) -> None:
        self.batch_size = local_batch_size * dp_world_size
        how = Reading(seq_len, self.batch_size, config.seed, 1, False, dp_rank, dp_world_size)
        self.loader, self.step = parse_data(config.data).open(how).loader, 0

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        while True:
            tokens, targets = self.loader.batch(self.step)
            self.step += 1
            yield {"input": tokens}, targets

    def state_dict(self) -> dict[str, Any]:
        """How many sequences were read by all processes."""
        return {"sequences": self.step * self.batch_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after them."""
        self.step = state_dict["sequences"] // self.batch_size


class NoTokenizer(BaseTokenizer):  # type: ignore[misc]
    """In place of a tokenizer, for text that was prepared."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):  # type: ignore[misc]
        """Nothing."""

    def __init__(self, config: Config, *, tokenizer_path: str) -> None:
        super().__init__()

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        """Nothing encodes."""
        raise NotImplementedError

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """Nothing decodes."""
        raise NotImplementedError

    def get_vocab_size(self) -> int:
        """None."""
        return 0


class Optimizers(OptimizersContainer):  # type: ignore[misc]
    """The optimizer of a run of ours, with everything that hangs on it, as torchtitan keeps optimizers."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):  # type: ignore[misc]
        """optim: that of the run."""

        optim: Annotated[OptimConfig, tyro.conf.Suppress]

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        self.model_parts = model_parts
        self.optimizers = [build_optimizer(part, config.optim) for part in model_parts]
        names = {id(p): name for part in model_parts for name, p in part.named_parameters()}
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["param_names"] = [canonical_fqn(names[id(p)]) for p in group["params"]]
        self._post_init([p for part in model_parts for p in part.parameters() if p.requires_grad])


class Schedules(LRSchedulersContainer):  # type: ignore[misc]
    """The schedule of a run of ours."""

    @dataclass(kw_only=True, slots=True)
    class Config(LRSchedulersContainer.Config):  # type: ignore[misc]
        """schedule: that of the run."""

        schedule: Annotated[ScheduleConfig, tyro.conf.Suppress]

        def build(self, *, optimizers: OptimizersContainer, training_steps: int) -> LRSchedulersContainer:
            """As torchtitan's."""
            total = self.total_steps or training_steps
            return LRSchedulersContainer(optimizers, lambda step: factor(self.schedule, step, total))


def model_spec(config: Config, seed: int = 0) -> ModelSpec:
    """The `ModelSpec` of a causal model of either arm; seed: of its weights."""
    return ModelSpec(
        "spherelm", config.arm, TitanModel.Config(shape=config, seed=seed), parallelize, None, keep_on_sphere, Adapter
    )


def trainer_config(run: RunConfig, **fields: Any) -> Trainer.Config:
    """The run, as `spherelm.recipe` or `recipes.make_run` make it, for torchtitan's trainer.
    fields: of `Trainer.Config`.

    Model, text, length, precision, optimizer, clipping and schedule are the run's.
    """
    optim, train = run.optim, run.train
    given: dict[str, Any] = {
        "model_spec": model_spec(run.model, train.seed),
        "loss": CrossEntropyLoss.Config(global_vocab_size=run.model.vocab_size),
        "tokenizer": NoTokenizer.Config(),
        "dataloader": Text.Config(data=run.data, seed=train.seed),
        "optimizer": Optimizers.Config(optim=optim),
        "lr_scheduler": Schedules.Config(schedule=run.schedule, warmup_steps=run.schedule.warmup_steps),
        "training": TrainingConfig(
            local_batch_size=train.micro_batch_size or train.batch_size, global_batch_size=train.batch_size,
            seq_len=train.seq_len, steps=train.steps, max_norm=optim.grad_clip or float("inf"),
            mixed_precision_param="float32" if train.dtype == "float32" else "bfloat16", disable_cuda_graphs=True,
        ),
        "parallelism": ParallelismConfig(spmd_backend="partial_dtensor"),
        "checkpoint": CheckpointManager.Config(enable=False),
        "activation_checkpoint": None,
    }  # fmt: skip
    return Trainer.Config(**{**given, **fields})
