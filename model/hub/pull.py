"""Fetch storytellers and data sets from the Hugging Face Hub into a cache below the user's folder.

Only data comes down (safetensors, JSON, SentencePiece, Parquet, text), never a pickle and never code. A branch or tag
is resolved to a commit first, so that all files are of one state. The receipt of a pull is written after its last file:
what is offered when the network is away is always complete. Knows nothing of torch; huggingface_hub is imported late.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from model.checkpoint import PICKLE_SUFFIXES, read_config, write_atomically
from model.config import user_home
from model.errors import InputError, ModelError, TaleloomError

Kind = Literal["model", "dataset"]
MAX_BYTES = {"model": 300_000_000, "dataset": 8_000_000_000}  # what a laptop can tell stories with, or train on
LOOKUP_TIMEOUT_S = 10.0
COMMIT = re.compile(r"[0-9a-f]{40}")
REQUIRED_FILES = ("config.json", "tokenizer.model")
OPTIONAL_FILES = (
    "generation_config.json tokenizer.json tokenizer_config.json model.safetensors.index.json README.md".split()
)
NOT_STORIES = re.compile(r"(?i)(?<![a-z])(?:valid|validation|val|dev|test|eval|readme|license|requirements)(?![a-z])")
NO_DATA = re.compile(r"(?i)(?<![a-z])(?:readme|license|requirements)(?![a-z])")


def pull_model(spec: str, progress: Callable[[str], None], use_token: bool = True) -> Path:
    """The folder of the Hub's storyteller `spec`: owner/name or owner/name@revision. Downloads what is not there.

    A commit that is in the cache is used without asking the Hub; so is a branch or tag when the Hub is out of reach.

    Args:
        progress: gets short sentences for the reader, possibly from another thread.
        use_token: log in with this computer's token, for private repositories; not on behalf of strangers.

    Raises:
        ModelError: no such repository or revision, no access, not a storyteller Taleloom can open, too large, no
            network, an interrupted download or no room for it. The message says what to do.
    """
    return _pull("model", spec, choose_model_files, progress, None if use_token else False)[0].parent


def pull_dataset(
    repo_id: str,
    progress: Callable[[str], None] = lambda _: None,
    use_token: bool = True,
    max_bytes: int | None = None,
    split: str = "train",
) -> list[Path]:
    """The files (Parquet, JSONL or text) of a split of the Hub's data set `repo_id`, sorted. Downloads what is not
    there, and no other split's.

    Args:
        use_token: as in `pull_model`.
        max_bytes: what all of them may have together; None is MAX_BYTES.
        split: "train" takes all that is not kept for testing; another, the files with this word in their path.

    Raises:
        InputError: as ModelError of `pull_model`, for a data set.
    """
    token: Literal[False] | None = None if use_token else False
    if split == "train":
        return sorted(_pull("dataset", repo_id, choose_training_files, progress, token, max_bytes))
    choose = partial(choose_split_files, split=split)
    return sorted(_pull("dataset", repo_id, choose, progress, token, max_bytes, part=split))


def choose_model_files(names: Iterable[str]) -> list[str]:
    """Which of a repository's files make a storyteller; config.json first, the weights last.

    Raises:
        ModelError: one of them is missing, or the weights are there as a pickle only.
    """
    there = set(names)
    shards = sorted(name for name in there if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name))
    weights = ["model.safetensors"] if "model.safetensors" in there else shards
    has_safetensors = any(name.endswith(".safetensors") for name in there)
    if not has_safetensors and any(name.endswith(PICKLE_SUFFIXES) for name in there):
        raise ModelError(
            "It holds only a pickle, which can run code when opened; Taleloom opens safetensors only. "
            "Ask its owner for model.safetensors."
        )
    missing = [name for name in REQUIRED_FILES if name not in there] + ([] if weights else ["model.safetensors"])
    if missing:
        raise ModelError(
            f"It has no {' and no '.join(missing)}. Taleloom opens Llama-style models with a SentencePiece tokenizer: "
            "choose another."
        )
    return [*REQUIRED_FILES, *(name for name in OPTIONAL_FILES if name in there), *weights]


def choose_training_files(names: Iterable[str]) -> list[str]:
    """Which of a data set's files to train on: Parquet of the train split, else all stories not kept for testing.

    Raises:
        InputError: there is none.
    """
    readable = [
        name for name in names if name.endswith((".parquet", ".jsonl", ".txt")) and not NOT_STORIES.search(name)
    ]
    parquet = [name for name in readable if name.endswith(".parquet") and "train" in name]
    if not readable:
        raise InputError("It has no training file of a kind Taleloom reads (.parquet, .jsonl, .txt). Choose another.")
    return parquet or readable


def choose_split_files(names: Iterable[str], split: str) -> list[str]:
    """Which of a data set's files are of the split: those with this word in their path, Parquet alone where there is.

    Raises:
        InputError: there is none.
    """
    readable = [name for name in names if name.endswith((".parquet", ".jsonl", ".txt")) and not NO_DATA.search(name)]
    chosen = [name for name in readable if has_word(name, split)]
    if not chosen:
        there = ", ".join(re.sub(r"[^\w./-]", "?", name) for name in sorted(readable)[:5]) or "none Taleloom reads"
        raise InputError(f"It has no file for the split {split[:40]!r}. Its files: {there}. Choose another split.")
    return [name for name in chosen if name.endswith(".parquet")] or chosen


def has_word(path: str, word: str) -> bool:
    """Whether the word stands in the path by itself, in capitals or not."""
    return re.search(rf"(?i)(?<![a-z0-9]){re.escape(word)}(?![a-z0-9])", path) is not None


def _pull(
    kind: Kind,
    spec: str,
    choose: Callable[[Iterable[str]], list[str]],
    progress: Callable[[str], None],
    token: Literal[False] | None = None,
    max_bytes: int | None = None,
    part: str = "",
) -> list[Path]:
    """Download what `choose` picks from the repository's file names, in that order.

    Args:
        token: False: without this computer's token; then a copy that came with one is not given away either.
        part: a name for what `choose` picks, where that is not what a pull of this kind usually does.
    """
    from huggingface_hub import HfApi, get_hf_file_metadata, get_token, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HTTPError

    repo, _, revision = spec.partition("@")
    revision = revision or "main"
    failure: type[TaleloomError] = ModelError if kind == "model" else InputError
    cache = user_home().resolve() / "hub"
    receipts = cache / "receipts"
    cached, is_public = _read_receipt(receipts / _receipt_name(kind, repo, revision, part), cache)
    if token is False and not is_public:
        cached = []
    if cached and COMMIT.fullmatch(revision):
        return cached

    progress(f"Looking for {repo} on the Hub ...")
    try:
        look_up = HfApi().model_info if kind == "model" else HfApi().dataset_info
        info = look_up(repo, revision=revision, files_metadata=True, timeout=LOOKUP_TIMEOUT_S, token=token)
        if not COMMIT.fullmatch(commit := info.sha or ""):
            raise ValueError("no commit in the answer")
    except (HTTPError, OSError, ValueError, KeyError, TypeError) as error:
        if cached and _is_out_of_reach(error):
            progress(f"The Hub cannot be reached. Using the copy of {repo} on this computer.")
            return cached
        raise failure(_explain(error, kind, repo, revision)) from error

    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    try:
        names = choose(sizes)
    except TaleloomError as error:
        raise failure(f"{repo} cannot be used. {error}") from error
    most = max_bytes or MAX_BYTES[kind]
    if (n_bytes := sum(sizes[name] for name in names)) > most:
        raise failure(f"{repo} has {_size(n_bytes)}; {_size(most)} are the most. Choose a smaller one.")
    paths = []
    try:
        if token is False:  # huggingface_hub gives files that are here already to anybody, of a gated repository too
            get_hf_file_metadata(hf_hub_url(repo, names[0], repo_type=kind, revision=commit), token=False)
        for name in names:
            bar: Any = _bar_class(name, progress)
            path = hf_hub_download(
                repo, name, repo_type=kind, revision=commit, cache_dir=cache, tqdm_class=bar, token=token
            )
            paths.append(Path(path))
            if name == "config.json":
                read_config(paths[-1].parent)  # refuses another kind of model before its weights come
        receipts.mkdir(parents=True, exist_ok=True)
        is_public = token is False or get_token() is None
        for known_as in (commit, revision):
            receipt = receipts / _receipt_name(kind, repo, known_as, part)
            was_public = _read_receipt(receipt, cache) == (paths, True)
            files = [path.relative_to(cache).as_posix() for path in paths]
            write_atomically(receipt, json.dumps({"files": files, "public": is_public or was_public}))
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: hf_xet's
        raise failure(_explain(error, kind, repo, revision, began=True)) from error
    progress(f"{repo} is here (commit {commit[:7]}).")
    return paths


def _receipt_name(kind: Kind, repo: str, revision: str, part: str) -> str:
    return f"{kind} {quote(repo, safe='')}@{quote(revision, safe='')}{part and ' '}{quote(part, safe='')}.json"


def _read_receipt(receipt: Path, cache: Path) -> tuple[list[Path], bool]:
    """The files of an earlier pull, and whether they came without a token; no files when there was no pull, or one of
    its files is gone."""
    try:
        content = json.loads(receipt.read_text())
        if isinstance(content, list):  # as they once were
            content = {"files": content, "public": False}
        paths = [cache / name for name in content["files"]]
        return (paths, content["public"] is True) if all(path.is_file() for path in paths) else ([], False)
    except (OSError, ValueError, TypeError, KeyError):
        return [], False


def _is_out_of_reach(error: Exception) -> bool:
    """Whether the Hub said nothing about the repository: no network, a login page in between, or the Hub in trouble."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    return not isinstance(error, HFValidationError)


def _explain(error: Exception, kind: Kind, repo: str, revision: str, began: bool = False) -> str:
    """A sentence for the reader; `began` says that files were being downloaded."""
    from huggingface_hub import constants, errors

    thing = "model" if kind == "model" else "data set"
    endpoint = constants.ENDPOINT
    page = f"{endpoint}/{repo}" if kind == "model" else f"{endpoint}/datasets/{repo}"
    match error:
        case errors.HFValidationError():
            return f"{repo!r} is no Hub id. Write it as owner/name, or owner/name@revision."
        case errors.GatedRepoError():
            return f"{repo} is gated. Accept its terms at {page}, then log in with `hf auth login`."
        case errors.RepositoryNotFoundError():
            return f"The Hub has no {thing} {repo}, or it is private. Check its name, or log in with `hf auth login`."
        case errors.RevisionNotFoundError():
            return f"{repo} has no branch, tag or commit {revision!r}. Leave out @{revision} for its newest state."
        case errors.HfHubHTTPError():
            status = error.response.status_code
            if status in (401, 403):
                return f"The Hub refuses access to {repo} ({status}). Log in again with `hf auth login`."
            return f"The Hub cannot give {repo} at the moment (error {status}). Try again in a few minutes."
        case OSError(errno=errno.ENOSPC):
            return f"The disk is full, so {repo} cannot be downloaded. Make room in {user_home()} and try again."
        case errors.OfflineModeIsEnabled():
            return (
                f"HF_HUB_OFFLINE is set and {repo} is not on this computer yet. Unset it to download the {thing} once."
            )
        case OSError(strerror=str()):
            return (
                f"{repo} cannot be stored in {user_home()}: {error.strerror}. Check the folder, or set TALELOOM_HOME."
            )
    if began:
        return f"The download of {repo} was interrupted. Try again: files that are complete are kept."
    if isinstance(error, (ValueError, KeyError, TypeError)):
        return f"What answers at {endpoint} is no Hub. Check the network (does it want a login?) and HF_ENDPOINT."
    return (
        f"The Hub ({endpoint}) cannot be reached and {repo} is not on this computer yet. Check the network connection, "
        f"or use a {thing} that is here."
    )


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.0f} MB" if n_bytes >= 1e6 else f"{max(1, n_bytes // 1000)} kB"


def _bar_class(name: str, progress: Callable[[str], None]) -> type:
    """What huggingface_hub takes for a tqdm class; tells `progress` about one file, at most every tenth of it."""

    class Bar:
        def __init__(self, *_: Any, total: int | None = None, initial: int = 0, **__: Any):
            self.total, self.n, self.n_next = total or 0, initial, 0
            self.update(0)

        def update(self, n: int) -> None:
            self.n += n
            if self.n >= self.n_next and (self.n < self.total or not self.n):
                done = f"{_size(self.n)} of " if self.n else ""
                progress(f"Downloading {name} ({done}{_size(self.total)}) ...")
                self.n_next = self.n + self.total // 10 + 1

        def _ignore(self, *_: Any, **__: Any) -> None:
            pass

        def __enter__(self) -> Bar:
            return self

        # The second row serves files that come through Xet.
        __exit__ = close = set_description = refresh = _ignore
        update_transfer = set_postfix_str = set_transfer_postfix_str = _ignore

    return Bar
