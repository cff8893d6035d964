"""The text of a run: which data it names, opened as batches and fixed validation windows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from spherelm.data.corpus import shipped_directory
from spherelm.data.cutting import Cutter
from spherelm.data.documents import check_input, read_blocks
from spherelm.data.hub import HubRequest, HubText, sha256_of
from spherelm.data.loader import Batches, Loader, validation_windows
from spherelm.data.masking import MaskedBatches, hidden
from spherelm.data.mixture import MixtureLoader, shares
from spherelm.data.pair_loader import PairLoader, held_out_pairs
from spherelm.data.pairs import holds_pairs, open_pairs, read_pairs_manifest
from spherelm.data.plan import check_held_out
from spherelm.data.rows import Rows
from spherelm.data.shards import Split, Tokens, open_tokens
from spherelm.data.stream import StreamLoader, held_out_windows
from spherelm.data.tokenizer import Tokenizer, load_tokenizer
from spherelm.evaluate.perplexity import summed_loss
from spherelm.layers.loss import IGNORED
from spherelm.models import ARMS, MASKED_CONFIGS, Decoder, EncoderDecoder
from spherelm.train.config import RunConfig
from spherelm.train.parallel import Group

SPLITS: tuple[Split, Split] = ("train", "val")
_WEIGHTED = re.compile(r"(.+)=(\d+\.?\d*|\.\d+)")


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


OF_STREAMS = {
    "column": "column= in --data",
    "config": "config= in --data",
    "other files": "make a data directory of others with spherelm data prepare",
    "bad rows": "",
}
"""How a stream is asked for what `data.rows.FLAGS` ask for; it does not skip bad rows."""


@dataclass(frozen=True)
class StreamSpec:
    """What `stream:NAME,key=value,...` says. val: the part of the documents that is held out, or a file of validation text."""

    request: HubRequest
    tokenizer: str = "default"
    val: str = "0.01"


def stream_spec(data: str) -> StreamSpec | None:
    """The stream that a run's `data` names, `None` if it names none; raises `ValueError` naming an unknown key."""
    if not data.startswith("stream:"):
        return None
    name, *pairs = data.removeprefix("stream:").split(",")
    given = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    known = {"config", "split", "column", "limit", "tokenizer", "val"}
    if not name or len(given) < len(pairs) or given.keys() - known:
        raise ValueError(f"{data!r} is no stream: write stream:NAME,KEY=VALUE,... with keys {', '.join(sorted(known))}")
    limit = given.pop("limit", None)
    if limit is not None and not limit.isdecimal():
        raise ValueError(f"{data!r}: limit={limit} is no number of rows")
    own = {key: given.pop(key) for key in ("tokenizer", "val") if key in given}
    return StreamSpec(HubRequest(name, **given, limit=None if limit is None else int(limit)), **own)


def sources_of(data: str | None) -> dict[Path, Fraction]:
    """The data directories that a run's `data` names, with their weights, which sum to 1.

    `None` is the text that ships with spherelm, prepared on first use; `DIR=WEIGHT,DIR=WEIGHT,...` a mixture, unless a
    directory is called so; all else is one directory.
    """
    if data is None:
        return {shipped_directory(): Fraction(1)}
    found = [_WEIGHTED.fullmatch(part) for part in data.split(",")]
    if Path(data).is_dir() or not all(found):
        named = [match[1] if match else part for match, part in zip(found, data.split(","), strict=True)]
        if len(named) > 1 and not Path(data).is_dir() and all(Path(part).is_dir() for part in named):
            weighted = ",".join(f"{part}=1" for part in named)
            raise ValueError(f"{data!r} names several directories: give each its weight, such as --data {weighted}")
        return {Path(data): Fraction(1)}
    pairs = [(Path(match[1]), Fraction(match[2])) for match in found if match]
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"{data!r} names a directory twice: add its weights up")
    whole = shares([weight for _, weight in pairs])
    return {path: Fraction(part, sum(whole)) for (path, _), part in zip(pairs, whole, strict=True)}


def proportions(data: str | None) -> tuple[float | str | Fraction, ...]:
    """What a run's `data` says that is not in the identity of its texts: the weights of a mixture, a stream's held-out part.

    Two `data` with equal identities and equal proportions are the same text, wherever it lies.
    """
    spec = stream_spec(data or "")
    if spec is None:
        return (Fraction(1),) if data is None else tuple(sources_of(data).values())
    try:
        return (float(spec.val),)
    except ValueError:
        return ("a file",)


def vocabulary_size(data: str | None) -> int:
    """The number of token ids in the data that a run's `data` names."""
    spec = stream_spec(data or "")
    if spec is not None:
        return load_tokenizer(spec.tokenizer).vocab_size
    if data is not None and holds_pairs(Path(data)):
        size: int = read_pairs_manifest(Path(data))["tokenizer"]["vocab_size"]
        return size
    return open_tokens(next(iter(sources_of(data))), "train").vocab_size


def epochs(config: RunConfig, steps: int) -> dict[str, float]:
    """How often `steps` updates of the run read each of its training texts, by name; empty where a text's end is not known."""
    train, pairs = config.train, issubclass(ARMS[config.arm][1], EncoderDecoder)
    if stream_spec(config.data or "") or (pairs and config.data is None):
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


def open_data(config: RunConfig, rank: int = 0, world_size: int = 1) -> RunData:
    """Open the text that `config` names for one process of `world_size`.

    Raises `ValueError` or `FileNotFoundError` if it cannot be read or does not fit the model or the lengths asked for.
    """
    spec = stream_spec(config.data or "")
    if issubclass(ARMS[config.arm][1], EncoderDecoder):
        data = _open_pairs(config, rank, world_size)
    elif config.data is not None and holds_pairs(Path(config.data)):
        raise ValueError(f"{config.data} holds pairs, which {config.arm} does not read: give encdec or nencdec")
    else:
        data = _open_stream(config, spec, rank, world_size) if spec else _open_directories(config, rank, world_size)
    if isinstance(config.model, MASKED_CONFIGS):
        data = _masked(data, config, rank)
    size = data.tokenizer.vocab_size
    if size > config.model.vocab_size:
        raise ValueError(f"{config.data or 'the text'} has {size} token ids, the model only {config.model.vocab_size}")
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
    if data.end_token is not None:
        raise ValueError("--mask-documents is for models that write: an encoder reads a window as one text")
    assert isinstance(config.model, MASKED_CONFIGS)
    size, part, seed = config.model.vocab_size, config.model.hidden_part, config.train.seed
    held_out = tuple(
        replace(one, tokens=tokens, targets=targets)
        for one in data.held_out
        for tokens, targets in (hidden(one.tokens, size, part, 0),)
    )
    return replace(data, loader=MaskedBatches(data.loader, size, part, seed, rank), held_out=held_out)


def _open_pairs(config: RunConfig, rank: int, world_size: int) -> RunData:
    if config.data is None or not holds_pairs(Path(config.data)):
        raise ValueError(
            f"{config.arm} learns from pairs and {config.data or 'the shipped text'} holds none: make them with spherelm data "
            "pairs and name them with --data"
        )
    directory, train = Path(config.data), config.train
    if train.mask_documents:
        raise ValueError("--mask-documents is for running text: pairs are apart anyway")
    manifest, tokenizer = read_pairs_manifest(directory), load_tokenizer(directory)
    longest = max(split["longest"] for split in manifest["splits"].values())
    if longest > train.seq_len:
        raise ValueError(
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
        read_blocks(file, cutter=Cutter(tokenizer), rows=Rows(spec.request.column, words=OF_STREAMS))
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
        raise ValueError(f"val={value} is neither a file nor a part between 0 and 1 of the documents")
    return fraction


def tokens_per_byte(tokens: Tokens) -> float:
    """How many tokens a UTF-8 byte of this text takes on average."""
    return len(tokens) / tokens.bytes_total
