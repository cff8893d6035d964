"""Text into a data directory of token shards: in parallel, resumable, the same bytes whoever runs it.

Work goes to OUT/.partial; every few seconds `state.json` there records what is safely on disk. When all is done, the
files move to OUT, the manifest last, so a directory with a manifest is whole.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spherelm.counting import counted
from spherelm.data.cutting import Cutter
from spherelm.data.deduplication import Deduplicator
from spherelm.data.documents import WHOLE_TEXT, Block, DocumentError, read_blocks
from spherelm.data.encoding import Encoded, EncodingJob, encode_all
from spherelm.data.hub import HubRequest
from spherelm.data.output import STATE_FILE, check_place, finished, locked, publish, remove_if_useless, write_json
from spherelm.data.plan import SHARD_TOKENS, Plan, Source, make_plan
from spherelm.data.rows import RowSettings
from spherelm.data.shards import MANIFEST_FILE, PARTIAL_DIRECTORY, SPLITS, Split, read_manifest
from spherelm.data.split_writer import SplitWriter
from spherelm.data.tokenizer import described
from spherelm.errors import OutputExistsError, UserError
from spherelm.progress import Bar

CHECKPOINT_SECONDS = 5.0
_DIGESTS_FILE = "digests.bin"


@dataclass
class Position:
    """How far the inputs are read: `blocks` of input `source`, and how many documents each input gave so far.

    `after`: where a stream continues. `left_out`: how many documents and rows, by reason. `duplicates`: how many of the
    documents were left out as seen before.
    """

    source: int = 0
    blocks: int = 0
    after: dict[str, Any] | None = None
    read_bytes: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    unsafe_cuts: int = 0
    documents: list[int] = field(default_factory=list)
    duplicates: list[int] = field(default_factory=list)


def prepare(
    inputs: Sequence[Path],
    out: Path,
    tokenizer: str | Path = "default",
    val: Sequence[Path] | None = None,
    val_fraction: float = 0.0,
    workers: int = 1,
    progress: bool = False,
    *,
    hub: HubRequest | None = None,
    deduplicate: bool = False,
    rows: RowSettings = RowSettings(),
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:
    """Write the documents of `inputs`, then those of the stream `hub`, as a data directory `out`; return its manifest.

    `tokenizer`: as for `load_tokenizer`. Validation text: the files `val`, or the part `val_fraction` (0 to 1) of the
    documents, chosen by their hashes, or none. `workers`: processes; the result does not depend on it (with more than
    one, a script that calls this needs an `if __name__ == "__main__"` guard). Called again after an interruption with
    the same arguments it continues; where all is done already it verifies the shards and changes nothing.
    `rows`: which field of a row holds its text, and whether bad rows are left out. Of a single .txt
    document, `val_fraction` is its end. `deduplicate`: of documents with the same text only the first is kept; the
    validation files are read last, so one that is in the training text too is dropped from the validation text.
    Raises ValueError (DocumentError, ShardError, OutputExistsError) or FileNotFoundError for what the user can fix.
    """
    plan = make_plan(
        list(inputs), list(val or []), hub, tokenizer, val_fraction, workers, shard_tokens, deduplicate, rows, progress
    )
    out = Path(out)
    if (out / MANIFEST_FILE).is_file():
        return finished(out, plan, progress)
    partial = out / PARTIAL_DIRECTORY
    check_place(out)
    if out.exists() and not partial.is_dir() and any(out.iterdir()):
        raise OutputExistsError(f"{out} holds something other than prepared data: choose another --out")
    partial.mkdir(parents=True, exist_ok=True)
    with locked(partial / "lock", f"another process is preparing {out}: wait for it or choose another --out"):
        try:
            if not (out / MANIFEST_FILE).is_file():  # else another process finished it since
                if not (partial / MANIFEST_FILE).is_file():
                    _Work(plan, partial, progress).run(workers)
                publish(partial, out, plan)
        except BaseException:
            remove_if_useless(partial, out)
            raise
    return read_manifest(out)


class _Work:
    """One run of prepare over `plan` in the directory `partial`, from where an earlier one stopped."""

    def __init__(self, plan: Plan, partial: Path, progress: bool) -> None:
        self._plan = plan
        self._partial = partial
        self._progress = progress
        self._cutter = Cutter(plan.tokenizer)
        saved = self._load()
        zeros = [0] * len(plan.sources)
        self._position = Position(**saved["position"]) if saved else Position(documents=zeros, duplicates=zeros.copy())
        self._deduplicator = None
        if plan.deduplicate:
            seen = saved["deduplicator"] if saved else None
            self._deduplicator = Deduplicator(partial / _DIGESTS_FILE, plan.tokenizer.eos_id, seen)
        splits = saved["splits"] if saved else {}
        self._writers = {
            split: SplitWriter(partial, split, plan.tokenizer, plan.shard_tokens, splits.get(split)) for split in SPLITS
        }
        self._saved_at = time.monotonic()

    def run(self, workers: int) -> None:
        """Encode the rest and leave a whole data directory, manifest included, in `partial`."""
        self._plan.tokenizer.save(self._partial)
        sizes = None if any(s.stream for s in self._plan.sources) else sum(s.size for s in self._plan.sources)
        bar = Bar("tokenizing", sizes, unit="B", show=self._progress)
        results = encode_all(self._jobs(), self._partial, self._plan.val_fraction, workers, self._plan.deduplicate)
        try:
            for encoded in results:
                self._take(encoded)
                bar.update(self._position.read_bytes - bar.done)
            self._complain_of_empty(len(self._plan.sources))
            for writer in self._writers.values():
                writer.finish()
            write_json(self._partial / MANIFEST_FILE, self._manifest())
        finally:
            results.close()
            bar.close()
            for writer in self._writers.values():
                writer.close()

    def _jobs(self) -> Iterator[EncodingJob]:
        """The blocks from the saved position on."""
        start, blocks, after = self._position.source, self._position.blocks, self._position.after
        for number, source in enumerate(self._plan.sources):
            if number < start:
                continue
            for block in self._blocks(source, blocks, after) if number == start else self._blocks(source, 0, None):
                yield EncodingJob(number, block, source.split)

    def _blocks(self, source: Source, skip: int, after: dict[str, Any] | None) -> Iterator[Block]:
        """The blocks of one input after the first `skip`, or after the position `after` of a stream."""
        if source.stream is not None:
            return source.stream.blocks(after)
        with_digest, rows = self._plan.needs_digest(source), self._plan.rows
        blocks = read_blocks(source.path, cutter=self._cutter, with_digest=with_digest, rows=rows, span=source.span)
        return itertools.islice(blocks, skip, None)

    def _take(self, encoded: Encoded) -> None:
        """Write one result and move the position past it."""
        duplicates = 0
        if self._deduplicator is not None:
            encoded, duplicates = self._deduplicator.filter(encoded)
        for split, ids in encoded.ids.items():
            self._writers[split].append(ids, encoded.text_bytes[split])
        position = self._position
        if encoded.source != position.source:
            self._complain_of_empty(encoded.source)
            position.source, position.blocks = encoded.source, 0
        position.blocks += 1
        position.after = encoded.after
        position.left_out = dict(Counter(position.left_out) + Counter(encoded.left_out))
        position.unsafe_cuts += encoded.unsafe_cuts
        position.documents[encoded.source] += encoded.documents
        position.duplicates[encoded.source] += duplicates
        position.read_bytes = sum(s.size for s in self._plan.sources[: encoded.source]) + encoded.read_bytes
        if time.monotonic() - self._saved_at >= CHECKPOINT_SECONDS:
            self._save()

    def _complain_of_empty(self, until: int) -> None:
        for source, documents in zip(self._plan.sources[:until], self._position.documents, strict=False):
            if not documents and source.named:
                raise DocumentError(f"{source.path} holds no documents with text: remove it from the inputs")
        if until == len(self._plan.sources) and not any(self._position.documents):
            raise DocumentError("the inputs hold no documents with text: give others")

    def _save(self) -> None:
        splits = {split: writer.state() for split, writer in self._writers.items()}
        state = {"parameters": self._plan.parameters(), "position": vars(self._position), "splits": splits}
        if self._deduplicator is not None:
            self._deduplicator.flush()
            state["deduplicator"] = self._deduplicator.state()
        write_json(self._partial / STATE_FILE, state)
        self._saved_at = time.monotonic()

    def _load(self) -> dict[str, Any] | None:
        """The saved state, if any; ShardError where it is of another command."""
        path = self._partial / STATE_FILE
        if not path.is_file():
            return None
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        position = state["position"]
        # Inputs not started yet may have changed: a user fixes the one that stopped the first attempt.
        begun = position["source"] + (1 if position["blocks"] else 0)
        old, new = state["parameters"], self._plan.parameters()
        same_inputs = old["inputs"][:begun] == new["inputs"][:begun] and position.keys() == vars(Position()).keys()
        if not same_inputs or {**old, "inputs": None} != {**new, "inputs": None}:
            raise OutputExistsError(
                f"{self._partial} holds unfinished work with other inputs or options: "
                "run the first command again, or delete that directory to start over"
            )
        for name in ("documents", "duplicates"):
            counts = position.get(name, [])[:begun]
            position[name] = counts + [0] * (len(self._plan.sources) - len(counts))
        return state

    def _manifest(self) -> dict[str, Any]:
        plan = self._plan
        splits = {split: writer.shards for split, writer in self._writers.items() if writer.shards}
        self._check_splits(splits)
        duplicates = {"duplicate": sum(self._position.duplicates)} if plan.deduplicate else {}
        totals = ("tokens", "documents", "bytes")
        return {
            "spherelm": importlib.metadata.version("spherelm"),
            "parameters": plan.parameters(),
            "tokenizer": described(plan.tokenizer),
            "inputs": [self._described(number, source) for number, source in enumerate(plan.sources)],
            "left_out": {**(Counter(plan.left_out) + Counter(self._position.left_out)), **duplicates},
            "unsafe_cuts": self._position.unsafe_cuts,
            "splits": {
                split: {**{key: sum(shard[key] for shard in shards) for key in totals}, "shards": shards}
                for split, shards in splits.items()
            },
        }

    def _described(self, number: int, source: Source) -> dict[str, Any]:
        """An input's entry in the manifest; `documents` counts those kept."""
        documents, duplicates = self._position.documents[number], self._position.duplicates[number]
        entry: dict[str, Any] = {"name": source.path.name, "bytes": source.size, "sha256": source.sha256}
        if source.stream is not None:
            entry = {"name": source.stream.request.name, "sha256": source.sha256, "dataset": source.stream.identity}
        if source.span != WHOLE_TEXT:
            entry["characters"] = source.span
        left_out = {"duplicates_left_out": duplicates} if self._plan.deduplicate else {}
        return {**entry, "documents": documents - duplicates, **left_out}

    def _check_splits(self, splits: dict[Split, list[dict[str, Any]]]) -> None:
        for source in self._plan.sources:
            if source.split is not None and source.split not in splits:
                raise UserError(f"every document of {source.path} is in the training text too: name other --val files")
        wanted = SPLITS if self._plan.val_fraction else ("train",)
        for split in wanted:
            if split not in splits:
                (self._partial / STATE_FILE).unlink(missing_ok=True)  # another fraction needs another start
                raise UserError(
                    f"val fraction {self._plan.val_fraction} of {counted(sum(self._position.documents), 'document')} "
                    f"leaves none for {split}: choose another --val-fraction, give more documents, or name --val files"
                )
