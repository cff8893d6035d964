"""The text of a run: which data it names, opened as batches and fixed validation windows."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from spherelm.data.cutting import Cutter
from spherelm.data.documents import check_input, read_blocks
from spherelm.data.hub import HubText, sha256_of
from spherelm.data.loader import Batches, Loader, validation_windows
from spherelm.data.masking import MaskedBatches, hidden
from spherelm.data.mixture import MixtureLoader
from spherelm.data.pair_loader import PairLoader, held_out_pairs
from spherelm.data.pairs import holds_pairs, open_pairs, read_pairs_manifest
from spherelm.data.plan import check_held_out
from spherelm.data.rows import Rows
from spherelm.data.shards import Split, Tokens, open_tokens
from spherelm.data.sources import OF_STREAMS, StreamSpec, sources_of, stream_spec
from spherelm.data.stream import StreamLoader, held_out_windows
from spherelm.data.tokenizer import Tokenizer, load_tokenizer
from spherelm.errors import UserError
from spherelm.evaluate.perplexity import summed_loss
from spherelm.layers.loss import IGNORED
from spherelm.models import Decoder, EncDecArch, EncoderArch
from spherelm.runs.config import RunConfig
from spherelm.runs.group import Group

SPLITS: tuple[Split, Split] = ("train", "val")


@dataclass(frozen=True)
class HeldOut:
    """Validation windows of one source of text: tokens, targets int64 [windows, seq]. The weights of all sources sum to 1."""

    name: str
    weight: float
    tokens: Tensor
    targets: Tensor
    tokens_per_byte: float


@dataclass(frozen=True)
class RunData:
    """The text of a run. end_token: the id that ends documents where they are masked from each other, else `None`.

    tokens_per_update: where updates have another number of tokens than batch_size sequences of seq_len, that on average.
    shards: the prepared texts that are read as they are needed; others were verified when they were opened.
    """

    loader: Batches
    held_out: tuple[HeldOut, ...]
    tokenizer: Tokenizer
    identity: dict[str, str]
    end_token: int | None = None
    tokens_per_update: int | None = None
    shards: tuple[Tokens, ...] = ()

    @property
    def tokens_per_byte(self) -> float:
        """How many tokens a UTF-8 byte of the validation text takes, its sources mixed by their weights."""
        return 1 / sum(part.weight / part.tokens_per_byte for part in self.held_out)


def validation_losses(
    model: Decoder,
    data: RunData,
    batch_size: int,
    group: Group | None = None,
    before_each: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """The mean loss on each source's validation windows, in nats per token, `batch_size` windows at a time.

    The processes of `group` share the windows, and must all call. before_each: called before each batch, by all processes
    equally often; what it raises breaks off.
    """
    group = group or Group()
    losses: dict[str, float] = {}
    for part in data.held_out:
        own = share(part.tokens, 0, group), share(part.targets, IGNORED, group)
        sums = group.gather([float(x) for x in summed_loss(model, *own, batch_size, data.end_token, before_each)])
        losses[part.name] = sum(total for total, _ in sums) / sum(count for _, count in sums)
    return losses


def share(windows: Tensor, filling: int, group: Group) -> Tensor:
    """This process's part of int64 `windows` [n, seq], as many for each process, with windows of `filling` where n runs out."""
    each = -(-len(windows) // group.world_size)
    padded = F.pad(windows, (0, 0, 0, each * group.world_size - len(windows)), value=filling)
    return padded[group.rank :: group.world_size]


def total_loss(data: RunData, losses: dict[str, float]) -> float:
    """One number for the losses of all sources: their mean by weight."""
    return sum(part.weight * losses[part.name] for part in data.held_out)


def epochs(config: RunConfig, steps: int) -> dict[str, float]:
    """How often `steps` updates of the run read each of its training texts, by name; empty where a text's end is not known."""
    train, pairs = config.train, isinstance(config.model.architecture, EncDecArch)
    if stream_spec(config.data or ""):
        return {}
    if config.data is not None and pairs:
        return {
            config.data: steps * train.batch_size / read_pairs_manifest(Path(config.data))["splits"]["train"]["pairs"]
        }
    tokens = steps * train.batch_size * train.seq_len
    return {
        "the text that ships with spherelm" if config.data is None else str(path): float(weight) * tokens / size
        for path, weight in sources_of(config.data).items()
        for size in (len(open_tokens(path, "train")),)
    }


def check_text(config: RunConfig) -> None:
    """Raise `ValueError` for a kind of text that the architecture does not learn from; nothing is opened."""
    architecture, masked = config.model.architecture, config.train.mask_documents
    has_pairs = config.data is not None and holds_pairs(Path(config.data))
    if isinstance(architecture, EncDecArch) and not has_pairs:
        raise UserError(
            f"an encoder-decoder learns from pairs and {config.data or 'the shipped text'} holds none: make them with "
            "spherelm data pairs and name them with --data"
        )
    if has_pairs and not isinstance(architecture, EncDecArch):
        raise UserError(
            f"{config.data} holds pairs of texts, which are for encoder-decoders: train with --preset pairs"
        )
    if masked and isinstance(architecture, EncDecArch):
        raise UserError("--mask-documents is for running text: pairs are apart anyway")
    if masked and isinstance(architecture, EncoderArch):
        raise UserError("--mask-documents is for models that write: an encoder reads a window as one text")


def open_data(config: RunConfig, rank: int = 0, world_size: int = 1) -> RunData:
    """Open the text that `config` names for one process of `world_size`.

    Raises `ValueError` or `FileNotFoundError` if it cannot be read or does not fit the model or the lengths asked for.
    """
    check_text(config)
    spec = stream_spec(config.data or "")
    architecture = config.model.architecture
    if isinstance(architecture, EncDecArch):
        data = _open_pairs(config, rank, world_size)
    else:
        data = _open_stream(config, spec, rank, world_size) if spec else _open_directories(config, rank, world_size)
    if isinstance(architecture, EncoderArch):
        data = _masked(data, config, rank)
    size = data.tokenizer.vocab_size
    if size > config.model.vocab_size:
        raise UserError(f"{config.data or 'the text'} has {size} token ids, the model only {config.model.vocab_size}")
    return data


def _open_directories(config: RunConfig, rank: int, world_size: int) -> RunData:
    sources, train = sources_of(config.data), config.train
    texts, held_out = ([open_tokens(path, split) for path in sources] for split in SPLITS)
    loader: Batches
    if len(texts) == 1:
        loader = Loader(texts[0], train.seq_len, train.batch_size, train.seed, rank, world_size)
    else:
        weights = list(sources.values())
        loader = MixtureLoader(texts, weights, train.seq_len, train.batch_size, train.seed, rank, world_size)
    windows = [validation_windows(text, train.seq_len, train.eval_windows) for text in held_out]
    return RunData(
        loader=loader,
        held_out=tuple(
            HeldOut(str(path), float(weight), *batch, tokens_per_byte(text))
            for (path, weight), batch, text in zip(sources.items(), windows, held_out, strict=True)
        ),
        tokenizer=load_tokenizer(texts[0].directory),
        identity={
            "train": ",".join(text.fingerprint for text in texts),
            "val": ",".join(text.fingerprint for text in held_out),
            "tokenizer": texts[0].tokenizer_fingerprint,
        },
        end_token=texts[0].eos_id if train.mask_documents else None,
        shards=(*texts, *held_out),
    )


def _masked(data: RunData, config: RunConfig, rank: int) -> RunData:
    """The same text with tokens hidden in it, in the validation windows always the same ones."""
    assert isinstance(config.model.architecture, EncoderArch)
    size, part, seed = config.model.vocab_size, config.model.architecture.hidden_part, config.train.seed
    held_out = tuple(
        replace(one, tokens=tokens, targets=targets)
        for one in data.held_out
        for tokens, targets in (hidden(one.tokens, size, part, 0),)
    )
    return replace(data, loader=MaskedBatches(data.loader, size, part, seed, rank), held_out=held_out)


def _open_pairs(config: RunConfig, rank: int, world_size: int) -> RunData:
    directory, train = Path(config.data or ""), config.train
    manifest, tokenizer = read_pairs_manifest(directory), load_tokenizer(directory)
    longest = max(split["longest"] for split in manifest["splits"].values())
    if longest > train.seq_len:
        raise UserError(
            f"{directory} has texts of up to {longest} tokens, the run is for seq_len={train.seq_len}: give --seq-len "
            f"{longest}, or prepare the pairs with --max-tokens {train.seq_len}"
        )
    pairs, val = (open_pairs(directory, split) for split in SPLITS)
    held_out, counts = held_out_pairs(val, train.eval_windows, tokenizer.eos_id), manifest["splits"]["val"]
    per_byte = (counts["target_tokens"] + counts["pairs"]) / counts["target_bytes"]
    loader = PairLoader(pairs, tokenizer.eos_id, train.batch_size, train.seed, rank, world_size)
    return RunData(
        loader=loader,
        held_out=(HeldOut(str(directory), 1.0, *held_out, per_byte),),
        tokenizer=tokenizer,
        identity={"train": pairs.fingerprint, "val": val.fingerprint, "tokenizer": tokenizer.fingerprint},
        tokens_per_update=loader.tokens_per_update,
    )


def _open_stream(config: RunConfig, spec: StreamSpec, rank: int, world_size: int) -> RunData:
    text, tokenizer, train = HubText(spec.request, words=OF_STREAMS), load_tokenizer(spec.tokenizer), config.train
    file = Path(spec.val)
    fraction = None if file.is_file() else _fraction(spec.val)
    if fraction is None:
        check_input(file)
        check_held_out(file, sha256_of(file), text.local_files)
    blocks = (
        read_blocks(
            file,
            cutter=Cutter(tokenizer),
            rows=Rows(spec.request.column, named_by=OF_STREAMS["column"], skipped_by=None),
        )
        if fraction is None
        else text.blocks(None)
    )
    with closing(blocks):
        windows, per_byte, fingerprint = held_out_windows(
            blocks, tokenizer, 1.0 if fraction is None else fraction, train.seq_len, train.eval_windows
        )
    part = fraction or 0.0
    return RunData(
        loader=StreamLoader(text, tokenizer, train.seq_len, train.batch_size, train.seed, part, rank, world_size),
        held_out=(HeldOut(spec.request.name, 1.0, *windows, per_byte),),
        tokenizer=tokenizer,
        identity={"train": text.fingerprint, "val": fingerprint, "tokenizer": tokenizer.fingerprint},
        end_token=tokenizer.eos_id if train.mask_documents else None,
    )


def _fraction(value: str) -> float:
    try:
        fraction = float(value)
    except ValueError:
        fraction = math.nan
    if not 0 < fraction < 1:
        raise UserError(f"val={value} is neither a file nor a part between 0 and 1 of the documents")
    return fraction


def tokens_per_byte(tokens: Tokens) -> float:
    """How many tokens a UTF-8 byte of this text takes on average."""
    return len(tokens) / tokens.bytes_total
