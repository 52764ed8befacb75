"""Push a proven checkpoint to the Hugging Face Hub: private unless told otherwise, in one commit, resumable.

`upload_folder` of huggingface_hub 2 cuts a large folder into several commits, so the commit is made here, by
`create_commit`: it sends the contents of large files first and skips those that the Hub has (by hash over LFS, by chunk
over Xet), then files the commit, from which it leaves out what has not changed.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils._validators import validate_repo_id
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from llmprune.core.errors import PushError, quoted
from llmprune.core.files import read_json, sha256_file
from llmprune.models.checkpoint import METADATA_FILE
from llmprune.models.licence import Licence
from llmprune.publish.card import model_card
from llmprune.publish.contents import CARD_FILE, PUSH_FILE, Contents

# What no request got an answer for, whichever HTTP library this huggingface_hub stands on.
_TransportError: type[Exception] = HfHubHTTPError.__bases__[0]
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Pushed:
    """What is on the Hub now."""

    url: str
    commit: str
    commit_url: str
    new_commit: bool
    private: bool
    removed: tuple[str, ...]
    """Files of an earlier push that this one no longer has."""


def check_repo(repo: str) -> None:
    """Raises PushError unless `repo` is user/name."""
    try:
        validate_repo_id(repo)
        valid = repo.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise PushError(f"a repository is user/name, of letters, digits, '-', '_' and '.'; got {quoted(repo)}")


def required_token() -> str:
    """The token of HF_TOKEN or of the stored login. Raises PushError if there is none."""
    token = get_token()
    if not token:
        raise PushError("pushing needs a token with write access: set HF_TOKEN, or log in with `hf auth login`")
    return token


def settled_licence(contents: Contents, option: str | None, token: str | None) -> Licence:
    """The licence that the card names: the one acknowledged by `option` or else by the recipe.

    With a token, a parent that is on the Hub is asked for the licence that it states there now. Raises PushError if
    none is acknowledged, or another one than the parent states.
    """
    acknowledged = option or contents.acknowledged_licence
    stated = contents.parent_licence
    if stated is None and token and contents.parent_id:
        stated = _hub_licence(contents, contents.parent_id, token)
    if not acknowledged:
        known = f"{stated.label} by its own card" if stated else "not stated where it was looked for"
        raise PushError(
            f"nobody has acknowledged the licence of {contents.parent_name} ({known}): read its terms, then name it "
            "with --licence or as deploy.licence in the recipe"
        )
    if stated and not stated.is_called(acknowledged):
        raise PushError(
            f"{contents.parent_name} states licence {stated.label}, but {acknowledged} is acknowledged; read its terms "
            f"and name {stated.label}"
        )
    return stated or Licence(acknowledged)


def _hub_licence(contents: Contents, parent: str, token: str) -> Licence | None:
    revision = contents.metadata["provenance"]["parent"].get("revision")
    with _readable_errors(parent, token, "asking for the licence of"):
        try:
            info = _api(token).model_info(parent, revision=revision)
        except (RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError):
            # It is gone, or closed to this user: it states nothing any more.
            return None
    return Licence.from_metadata(vars(info.card_data)) if info.card_data else None


def card_of(contents: Contents, repo: str, licence: Licence) -> str:
    """The README.md that goes up: the directory's own as it is, or else a model card made of the other files.

    Raises PushError if the directory's own names another licence.
    """
    own = contents.file(CARD_FILE)
    if own is None:
        return model_card(contents, repo, licence)
    try:
        text = own.read_bytes().decode("utf-8")
        stated = Licence.from_metadata(metadata_load(own) or {})
    except (ValueError, yaml.YAMLError) as error:
        raise PushError(f"{own} is no model card ({error}); correct it, or take it away to have one made") from None
    if stated is None or not stated.is_called(licence.label):
        raise PushError(
            f"{own} names licence {stated.label if stated else 'none'}, but {licence.label} is acknowledged; "
            f"give it `license: {licence.id}`, or take it away to have one made"
        )
    return text


def additions_of(contents: Contents, card: str) -> list[CommitOperationAdd]:
    """All files that go up: those of the checkpoint, the card, and the list by which the next push knows ours."""
    files = [CommitOperationAdd(file.name, file.path) for file in contents.files if file.name != CARD_FILE]
    files.append(CommitOperationAdd(CARD_FILE, card.encode()))
    hashes = {file.path_in_repo: file.upload_info.sha256.hex() for file in files}
    return [*files, CommitOperationAdd(PUSH_FILE, (json.dumps({"files": hashes}, indent=2) + "\n").encode())]


def push(
    contents: Contents,
    card: str,
    repo: str,
    token: str,
    *,
    public: bool = False,
    revision: str | None = None,
    message: str | None = None,
    quiet: bool = False,
) -> Pushed:
    """Bring the repository, made if it is missing, to these contents and this card, in at most one commit.

    What an interrupted push has uploaded is not uploaded again. Files that are there and came from no push of ours,
    or were changed since, stay. Raises PushError if the token may not, the Hub cannot be reached, or the repository's
    visibility is not the one asked for.
    """
    check_repo(repo)
    if revision and _COMMIT.fullmatch(revision):
        raise PushError(f"--revision is a branch to commit to, got the commit {revision}")
    api = _api(token)
    with _readable_errors(repo, token, "pushing to"), _hub_output(quiet):
        info = _opened(api, repo, public=public, revision=revision)
        additions = additions_of(contents, card)
        stale = _stale(api, info, {addition.path_in_repo for addition in additions})
        commit = api.create_commit(
            repo,
            operations=[*additions, *(CommitOperationDelete(name, is_folder=False) for name in stale)],
            commit_message=message or f"{contents.parent_name} pruned to {contents.metadata['id']} by llmprune",
            revision=revision,
            # Nobody else's commit in between is overwritten.
            parent_commit=info.sha,
        )
    return Pushed(
        url=f"{api.endpoint}/{repo}",
        commit=commit.oid,
        commit_url=str(commit.commit_url),
        new_commit=commit.oid != info.sha,
        private=bool(info.private),
        removed=tuple(stale),
    )


def _api(token: str) -> HfApi:
    return HfApi(token=token, library_name="llmprune")


def _opened(api: HfApi, repo: str, *, public: bool, revision: str | None) -> ModelInfo:
    """The repository and the branch as they are, made if they are missing."""
    try:
        info = api.model_info(repo)
    except RepositoryNotFoundError:
        api.create_repo(repo, private=not public, exist_ok=True)
        info = api.model_info(repo)
    if bool(info.private) == public:
        is_now, option = ("private", "leave out --public") if public else ("public", "give --public")
        raise PushError(f"{repo} exists and is {is_now}; {option}, or change it in the repository's settings first")
    if revision is None:
        return info
    try:
        return api.model_info(repo, revision=revision)
    except RevisionNotFoundError:
        api.create_branch(repo, branch=revision, exist_ok=True)
        return api.model_info(repo, revision=revision)


def _stale(api: HfApi, info: ModelInfo, wanted: set[str]) -> list[str]:
    """Files of an earlier push, still as it left them, that this one does not have: beside other weights they would be
    of another network."""
    there = {sibling.rfilename for sibling in info.siblings or ()}
    with tempfile.TemporaryDirectory() as scratch:

        def fetched(name: str) -> Path:
            # Not into the user's cache: it would keep a file for each push.
            return Path(api.hf_hub_download(info.id, name, revision=info.sha, local_dir=scratch))

        # Pushes from before there was such a list left the hashes of proven files only.
        record = next((name for name in (PUSH_FILE, METADATA_FILE) if name in there), None)
        earlier = read_json(fetched(record)) if record else {}
        known = earlier.get("files") if isinstance(earlier, dict) else None
        candidates = {name: known[name] for name in there - wanted if name in known} if isinstance(known, dict) else {}
        if not candidates:
            return []
        detailed = api.model_info(info.id, revision=info.sha, files_metadata=True)
        large = {sibling.rfilename: sibling.lfs.sha256 for sibling in detailed.siblings or () if sibling.lfs}
        return sorted(
            name for name, left in candidates.items() if (large.get(name) or sha256_file(fetched(name))) == left
        )


@contextmanager
def _hub_output(quiet: bool) -> Iterator[None]:
    """huggingface_hub's own bars of each file on stderr, or none; its warnings are said by the caller's result."""
    level, were_hidden = hub_logging.get_verbosity(), are_progress_bars_disabled()
    hub_logging.set_verbosity(logging.ERROR)
    if quiet:
        disable_progress_bars()
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)
        if quiet and not were_hidden:
            enable_progress_bars()


@contextmanager
def _readable_errors(repo: str, token: str, doing: str) -> Iterator[None]:
    try:
        yield
    except PushError:
        raise
    except (HfHubHTTPError, _TransportError, OSError, RuntimeError, ValueError) as error:
        # The causes may hold headers: they are not kept.
        raise PushError(_told(error, repo, doing).replace(token, "***")) from None


def _told(error: BaseException, repo: str, doing: str) -> str:
    at = constants.ENDPOINT
    # Where the contents of files go, a status tells of that place, and nothing of the token.
    status = int(error.response.status_code) if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return f"{at} does not accept the token (401); set HF_TOKEN to a valid one, or log in with `hf auth login`"
    if status == 403:
        return f"the token may not do this: {doing} {repo} was refused (403); use one with write access to it"
    cause: Any = error
    while isinstance(cause, RuntimeError) and cause.__cause__ is not None:
        cause = cause.__cause__
    # The address that a file is sent to may be signed: whoever has its query may write there.
    said = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", " ".join(str(cause).split())) or type(cause).__name__
    if status in (409, 412):
        said = f"somebody else committed in the meantime ({status})"
    return f"{doing} {repo} at {at} failed: {said:.400}. What was uploaded is kept there: run the same command again"
