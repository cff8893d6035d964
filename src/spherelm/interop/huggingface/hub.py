"""The Hugging Face hub: folders go there and come from there, and what their cards say in the hub's own terms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from spherelm.errors import UserError

HTTP_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]
"""Of the HTTP library that huggingface_hub uses, which changes: also where the hub is out of reach."""

READ_FIRST = ["model*.safetensors", "model.safetensors.index.json", "tokenizer*.json"]
"""Files that readers look for, whichever model they are of: what an earlier upload left of them has to go."""

Result = tuple[dict[str, Any], str, float]
"""Where a score comes from (`dataset_type`, `dataset_name`, `dataset_split` of an `EvalResult`),
the metric, the score.
"""


def front_matter(name: str, task: str, results: list[Result], **fields: Any) -> str:
    """The metadata between the lines `---` of a card.
    results: go into its model index; fields: as `ModelCardData` has them.
    """
    scores = [
        EvalResult(task_type=task, metric_type=metric, metric_value=value, **source)
        for source, metric, value in results
    ]
    index: dict[str, Any] = {"model_name": name, "eval_results": scores} if scores else {}
    given = {field: value for field, value in fields.items() if value}
    return str(ModelCardData(library_name="transformers", pipeline_tag=task, **given, **index))


@contextmanager
def in_one_line(asked: str) -> Iterator[None]:
    """Turn the hub's refusals and network errors into `UserError`. asked: the request, such as "push to a/b"."""
    try:
        yield
    except (HTTP_ERROR, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"cannot {asked}: {said} (to log in: hf auth login)") from error


def upload(folder: Path, repo: str, private: bool) -> str:
    """Put the files of `folder` into the model repository `repo` ("user/name"), made if it is not there; its address.

    Weights and tokenizers there that are not in `folder` are deleted; all else that is there stays.
    Raises `UserError` for what the hub refuses.
    """
    with in_one_line(f"push to {repo}"):
        hub = HfApi()
        address = hub.create_repo(repo, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Model exported by spherelm", delete_patterns=READ_FIRST
        )
    return str(address)


def downloaded(repo: str) -> Path:
    """A copy on this disk of the repository `repo`, "user/name" or "user/name@revision". Raises as `upload` does."""
    name, _, revision = repo.partition("@")
    with in_one_line(f"read {repo}"):
        return Path(HfApi().snapshot_download(name, revision=revision or None))
