"""Text files into a data directory of token shards: in parallel, resumable, the same bytes whoever runs it.

Work goes to OUT/.partial; every few seconds `state.json` there records what is safely on disk. When all is done, the
files move to OUT, the manifest last, so a directory with a manifest is whole.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from spherelm.data.documents import DocumentError, read_blocks
from spherelm.data.encoding import Encoded, Job, cut_rule, encode_all
from spherelm.data.plan import SHARD_TOKENS, Plan, make_plan
from spherelm.data.shards import (
    MANIFEST_FILE,
    PARTIAL_DIRECTORY,
    Ids,
    Shard,
    ShardError,
    ShardWriter,
    Split,
    open_tokens,
    read_manifest,
)
from spherelm.data.tokenizer import load_tokenizer

CHECKPOINT_SECONDS = 5.0
_STATE_FILE = "state.json"
_SPLITS: tuple[Split, Split] = ("train", "val")


class OutputExistsError(FileExistsError, ValueError):
    """The output directory holds something else; the message says what to do."""


@dataclass
class Position:
    """How far the inputs are read: `blocks` of input `source`, and how many documents each input gave so far."""

    source: int = 0
    blocks: int = 0
    read_bytes: int = 0
    empty: int = 0
    documents: list[int] = field(default_factory=list)


def prepare(
    inputs: Sequence[Path],
    out: Path,
    tokenizer: str | Path = "default",
    val: Sequence[Path] | None = None,
    val_fraction: float = 0.0,
    workers: int = 1,
    progress: bool = False,
    *,
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:
    """Write the documents of `inputs` as a data directory `out` and return its manifest.

    `tokenizer`: as for `load_tokenizer`. Validation text: the files `val`, or the part `val_fraction` (0 to 1) of the
    documents, chosen by their hashes, or none. `workers`: processes; the result does not depend on it (with more than
    one, a script that calls this needs an `if __name__ == "__main__"` guard). Called again after an interruption with
    the same arguments it goes on; where all is done already it verifies the shards and changes nothing.
    Raises ValueError (DocumentError, ShardError, OutputExistsError) or FileNotFoundError for what the user can mend.
    """
    plan = make_plan(list(inputs), list(val or []), tokenizer, val_fraction, workers, shard_tokens, progress)
    out = Path(out)
    if (out / MANIFEST_FILE).is_file():
        return _finished(out, plan, progress)
    partial = out / PARTIAL_DIRECTORY
    if out.exists() and not partial.is_dir() and (not out.is_dir() or any(out.iterdir())):
        raise OutputExistsError(f"{out} holds something else than prepared data: choose another --out")
    partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial, out):
        try:
            if not (out / MANIFEST_FILE).is_file():  # else another process finished it since
                if not (partial / MANIFEST_FILE).is_file():
                    _Work(plan, partial, progress).run(workers)
                _publish(partial, out, plan)
        except BaseException:
            _remove_if_useless(partial, out)
            raise
    return read_manifest(out)


class _SplitWriter:
    """The shards of one split, one open at a time."""

    def __init__(self, directory: Path, split: Split, plan: Plan, state: dict[str, Any] | None) -> None:
        self._directory = directory
        self._split = split
        self._plan = plan
        self.shards: list[dict[str, Any]] = list(state["shards"]) if state else []
        self._in_document = bool(state["in_document"]) if state else False
        self._open: ShardWriter | None = None
        for entry in self.shards:
            _verify_entry(directory, entry)
        if state and state["open"]:
            self._open = ShardWriter(
                directory / state["open"]["file"], plan.tokenizer, state["open"]["starts_inside"], state["open"]
            )

    def append(self, ids: Ids, text_bytes: int) -> None:
        if self._open is None:
            path = self._directory / f"{self._split}-{len(self.shards):05d}.bin"
            self._open = ShardWriter(path, self._plan.tokenizer, self._in_document)
        self._open.append(ids, text_bytes)
        if self._open.tokens >= self._plan.shard_tokens:
            self.finish()

    def finish(self) -> None:
        """Close the open shard, if there is one."""
        if self._open is None:
            return
        header = self._open.finish()
        self._in_document = self._open.in_document
        entry = {"file": self._open.path.name, "sha256": header.body_sha256, "bytes": header.text_bytes}
        self.shards.append({**entry, "tokens": header.tokens, "documents": header.documents})
        self._open = None

    def state(self) -> dict[str, Any]:
        """What another writer needs to go on from here, everything before it being on disk."""
        if self._open is not None:
            self._open.flush()
        open_state = self._open.state() if self._open else None
        return {"shards": self.shards, "open": open_state, "in_document": self._in_document}

    def close(self) -> None:
        if self._open is not None:
            self._open.close()


class _Work:
    """One run of prepare over `plan` in the directory `partial`, from where an earlier one stopped."""

    def __init__(self, plan: Plan, partial: Path, progress: bool) -> None:
        self._plan = plan
        self._partial = partial
        self._progress = progress
        saved = self._load()
        self._position = Position(**saved["position"]) if saved else Position(documents=[0] * len(plan.sources))
        splits = saved["splits"] if saved else {}
        self._writers = {split: _SplitWriter(partial, split, plan, splits.get(split)) for split in _SPLITS}
        self._saved_at = time.monotonic()

    def run(self, workers: int) -> None:
        """Encode what is left and leave a whole data directory, manifest included, in `partial`."""
        self._plan.tokenizer.save(self._partial)
        sizes = sum(source.size for source in self._plan.sources)
        bar = tqdm(total=sizes, unit="B", unit_scale=True, desc="tokenizing", disable=not self._progress)
        results = encode_all(self._jobs(), self._partial, self._plan.val_fraction, workers)
        try:
            for encoded in results:
                self._take(encoded)
                bar.update(self._position.read_bytes - bar.n)
            self._complain_of_empty(len(self._plan.sources))
            for writer in self._writers.values():
                writer.finish()
            _write_json(self._partial / MANIFEST_FILE, self._manifest())
        finally:
            results.close()
            bar.close()
            for writer in self._writers.values():
                writer.close()

    def _jobs(self) -> Iterator[Job]:
        """The blocks from the saved position on."""
        can_cut = cut_rule(self._plan.tokenizer) is not None
        start = self._position.source, self._position.blocks
        for number, source in enumerate(self._plan.sources):
            if number < start[0]:
                continue
            blocks = read_blocks(source.path, can_cut=can_cut, with_digest=source.split is None)
            for block in itertools.islice(blocks, start[1] if number == start[0] else 0, None):
                yield Job(number, block, source.split)

    def _take(self, encoded: Encoded) -> None:
        """Write one result and move the position behind it."""
        for split, ids in encoded.ids.items():
            self._writers[split].append(ids, encoded.text_bytes[split])
        position = self._position
        if encoded.source != position.source:
            self._complain_of_empty(encoded.source)
            position.source, position.blocks = encoded.source, 0
        position.blocks += 1
        position.empty += encoded.empty
        position.documents[encoded.source] += encoded.documents
        position.read_bytes = sum(s.size for s in self._plan.sources[: encoded.source]) + encoded.read_bytes
        if time.monotonic() - self._saved_at >= CHECKPOINT_SECONDS:
            self._save()

    def _complain_of_empty(self, until: int) -> None:
        for source, documents in zip(self._plan.sources[:until], self._position.documents, strict=False):
            if not documents:
                raise DocumentError(f"{source.path} holds no documents with text: remove it from the inputs")

    def _save(self) -> None:
        splits = {split: writer.state() for split, writer in self._writers.items()}
        state = {"parameters": self._plan.parameters(), "position": vars(self._position), "splits": splits}
        _write_json(self._partial / _STATE_FILE, state)
        self._saved_at = time.monotonic()

    def _load(self) -> dict[str, Any] | None:
        """The saved state, if any; ShardError where it is of another command."""
        path = self._partial / _STATE_FILE
        if not path.is_file():
            return None
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        position = state["position"]
        # Inputs not begun yet may have changed: a user mends the one that stopped the first attempt.
        begun = position["source"] + (1 if position["blocks"] else 0)
        old, new = state["parameters"], self._plan.parameters()
        same_inputs = old["inputs"][:begun] == new["inputs"][:begun]
        if not same_inputs or {**old, "inputs": None} != {**new, "inputs": None}:
            raise OutputExistsError(
                f"{self._partial} holds unfinished work with other inputs or options: "
                "give the first command again, or delete that directory to start over"
            )
        counts = position["documents"][:begun]
        position["documents"] = counts + [0] * (len(self._plan.sources) - len(counts))
        return state

    def _manifest(self) -> dict[str, Any]:
        plan, tokenizer = self._plan, self._plan.tokenizer
        splits = {split: writer.shards for split, writer in self._writers.items() if writer.shards}
        self._check_splits(splits)
        totals = ("tokens", "documents", "bytes")
        described = ("name", "vocab_size", "eos_id", "fingerprint")
        return {
            "spherelm": _version(),
            "parameters": plan.parameters(),
            "tokenizer": {name: getattr(tokenizer, name) for name in described},
            "inputs": [
                {"name": source.path.name, "bytes": source.size, "sha256": source.sha256, "documents": documents}
                for source, documents in zip(plan.sources, self._position.documents, strict=True)
            ],
            "empty_documents_left_out": self._position.empty,
            "splits": {
                split: {**{key: sum(shard[key] for shard in shards) for key in totals}, "shards": shards}
                for split, shards in splits.items()
            },
        }

    def _check_splits(self, splits: dict[Split, list[dict[str, Any]]]) -> None:
        wanted = _SPLITS if self._plan.val_fraction else ("train",)
        for split in wanted:
            if split not in splits:
                (self._partial / _STATE_FILE).unlink(missing_ok=True)  # another fraction needs another start
                raise ValueError(
                    f"val fraction {self._plan.val_fraction} of {sum(self._position.documents)} documents leaves none "
                    f"for {split}: choose another --val-fraction, give more documents, or name --val files"
                )


def _publish(partial: Path, out: Path, plan: Plan) -> None:
    """Move a whole data directory from `partial` to `out`, the manifest last; may be interrupted and repeated."""
    manifest = read_manifest(partial)
    _check_same(partial, manifest, plan)
    shards = [entry["file"] for split in manifest["splits"].values() for entry in split["shards"]]
    for name in [*shards, *(path.name for path in partial.glob("tokenizer*")), MANIFEST_FILE]:
        if (partial / name).exists():
            os.replace(partial / name, out / name)
    shutil.rmtree(partial)


def _finished(out: Path, plan: Plan, progress: bool) -> dict[str, Any]:
    """The manifest of `out`, if it is what `plan` would write and undamaged."""
    manifest = read_manifest(out)
    _check_same(out, manifest, plan)
    for split in manifest["splits"]:
        open_tokens(out, split).verify()
    if load_tokenizer(out).fingerprint != plan.tokenizer.fingerprint:
        raise ShardError.about(out, "its tokenizer is not the one its shards were made with")
    shutil.rmtree(out / PARTIAL_DIRECTORY, ignore_errors=True)
    if progress:
        print(f"{out} is already prepared: nothing to do", file=sys.stderr)
    return manifest


def _check_same(directory: Path, manifest: dict[str, Any], plan: Plan) -> None:
    old, new = manifest.get("parameters", {}), plan.parameters()
    different = [key for key in new if old.get(key) != new[key]]
    if different:
        raise OutputExistsError(
            f"{directory} holds data prepared with another {', '.join(different)}: choose another --out or delete it"
        )


def _verify_entry(directory: Path, entry: dict[str, Any]) -> None:
    shard = Shard(directory / entry["file"])
    shard.verify()
    if shard.header.body_sha256 != entry["sha256"]:
        raise ShardError.about(shard.path, "changed since the interruption", f"delete {directory} to start over")


def _remove_if_useless(partial: Path, out: Path) -> None:
    """After a failure before the first saved state, leave no trace."""
    if partial.is_dir() and not any((partial / name).exists() for name in (_STATE_FILE, MANIFEST_FILE)):
        shutil.rmtree(partial)
        if not any(out.iterdir()):
            out.rmdir()


@contextmanager
def _locked(partial: Path, out: Path) -> Iterator[None]:
    """Hold `partial` for this process. Raises OutputExistsError while another one does."""
    with open(partial / "lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputExistsError(
                f"another process is preparing {out}: wait for it or choose another --out"
            ) from error
        except OSError:
            pass  # some network file systems have no locks
        yield


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace `path` whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _version() -> str:
    try:
        return importlib.metadata.version("spherelm")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
