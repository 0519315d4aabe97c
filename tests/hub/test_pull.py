"""Pulling models and data sets over real HTTP from a stand-in Hub (see conftest.py)."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, file_download

from model.config import SamplingParams
from model.errors import InputError, ModelError
from model.hub import pull
from model.hub.pull import pull_dataset, pull_model
from model.storyteller import Storyteller
from model.training.data import read_rows, resolve_sources

REPO = "someone/tiny"
CONFIG = json.dumps({"model_type": "llama"}).encode()


def quiet(_: str) -> None:
    pass


def variant(folder: Path) -> dict[str, bytes]:
    """The model's files with one weight changed."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    weights = bytearray(files["model.safetensors"])
    weights[-1] ^= 1
    return {**files, "model.safetensors": bytes(weights)}


def run(hub: Any, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, with the environment a reader would set and an empty home."""
    folders = {"HF_HOME": "hf", "TALELOOM_HOME": "home", "HOME": "user", "TMPDIR": "tmp"}
    for name in ("user", "tmp"):
        (tmp_path / name).mkdir(exist_ok=True)
    environment = {
        "PATH": os.environ["PATH"],
        "HF_ENDPOINT": hub.url,
        **{name: str(tmp_path / folder) for name, folder in folders.items()},
    }
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=60)


def test_pull_brings_the_same_bytes_and_nothing_else(hub: Any, tiny_model: Path) -> None:
    files = {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    unwanted = {"pytorch_model.bin": b"\x80", "modeling.py": b"1/0", "onnx/model.onnx": b"-", "old/config.json": b"{}"}
    hub.push(REPO, {**files, **unwanted})
    said: list[str] = []
    folder = pull_model(REPO, said.append)
    assert {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*")} == files
    assert sorted(hub.asked_for("HEAD")) == sorted(files)
    assert said[0] == "Looking for someone/tiny on the Hub ..."
    size = len(files["model.safetensors"]) // 1000
    assert f"Downloading model.safetensors ({size} kB) ..." in said
    assert said[-1].startswith("someone/tiny is here (commit ")

    hub.requests.clear()
    said.clear()
    assert pull_model(REPO, said.append) == folder
    assert [path for _, path, _ in hub.requests] == ["/api/models/someone/tiny/revision/main"]
    assert len(said) == 2


def test_progress_tells_how_much_of_a_large_file_is_there(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    files = {"train.jsonl": b"x" * 4_000_000}
    hub.push("someone/stories", files, kind="datasets")
    said: list[str] = []
    pull_dataset("someone/stories", said.append)
    parts = [text for text in said if text.startswith("Downloading")]
    assert parts[0] == "Downloading train.jsonl (4 MB) ..."
    assert "Downloading train.jsonl (3 MB of 4 MB) ..." in parts
    assert 6 <= len(parts) <= 11


def test_a_story_from_the_hub_is_the_one_its_folder_tells(hub: Any, tiny_model: Path, tmp_path: Path) -> None:
    hub.push(REPO, tiny_model)
    told = run(
        hub,
        tmp_path,
        *("-m", "model.cli", "tell", "Once Mia found a key.", "--opening"),
        *("--model", REPO, "--json", "--seed", "5", "--max-tokens", "12", "--device", "cpu"),
    )
    assert told.returncode == 0, told.stderr
    with Storyteller.load(str(tiny_model), device="cpu", n_slots=1) as storyteller:
        story = storyteller.tell("Once Mia found a key.", SamplingParams(seed=5, max_tokens=12), mode="opening")
        assert story.wait(30)
    assert json.loads(told.stdout)["text"] == story.text
    assert story.n_tokens > 0


def test_a_revision_gives_the_weights_of_its_commit(hub: Any, tiny_model: Path) -> None:
    old = variant(tiny_model)
    old_commit = hub.push(REPO, old, tag="v1/first")
    new_commit = hub.push(REPO, tiny_model)
    new_weights = (tiny_model / "model.safetensors").read_bytes()
    for spec in (f"{REPO}@v1/first", f"{REPO}@{old_commit}"):
        assert (pull_model(spec, quiet) / "model.safetensors").read_bytes() == old["model.safetensors"]
    for spec in (REPO, f"{REPO}@main", f"{REPO}@{new_commit}"):
        assert (pull_model(spec, quiet) / "model.safetensors").read_bytes() == new_weights


def test_a_branch_is_followed_when_it_moves(hub: Any, tiny_model: Path) -> None:
    hub.push(REPO, tiny_model)
    pull_model(REPO, quiet)
    new = variant(tiny_model)
    hub.push(REPO, new)
    assert (pull_model(REPO, quiet) / "model.safetensors").read_bytes() == new["model.safetensors"]


@pytest.mark.parametrize("trouble", ["down", "offline", "429", "503", "login page"])
def test_without_the_hub_the_cached_copy_is_used(
    hub: Any, tiny_model: Path, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.push(REPO, tiny_model)
    hub.push("someone/other", tiny_model)
    folder = pull_model(REPO, quiet)
    if trouble == "down":
        hub.stop()
        expected = f"The Hub ({hub.url}) cannot be reached and someone/other is not on this computer yet."
    elif trouble == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        expected = "HF_HUB_OFFLINE is set and someone/other is not on this computer yet."
    elif trouble == "login page":
        hub.login_page = True
        expected = f"What answers at {hub.url} is no Hub."
    else:
        hub.status = int(trouble)
        expected = f"The Hub cannot give someone/other at the moment (error {trouble})."
    said: list[str] = []
    assert pull_model(REPO, said.append) == folder
    assert said[-1] == "The Hub cannot be reached. Using the copy of someone/tiny on this computer."
    assert pull_model(f"{REPO}@{commit}", quiet) == folder
    with pytest.raises(ModelError) as caught:
        pull_model("someone/other", quiet)
    assert str(caught.value).startswith(expected)


def test_a_cached_commit_is_used_without_asking(hub: Any, tiny_model: Path) -> None:
    commit = hub.push(REPO, tiny_model)
    folder = pull_model(REPO, quiet)
    hub.requests.clear()
    assert pull_model(f"{REPO}@{commit}", quiet) == folder
    assert hub.requests == []


def test_a_damaged_cache_is_not_offered_offline(hub: Any, tiny_model: Path) -> None:
    hub.push(REPO, tiny_model)
    (pull_model(REPO, quiet) / "model.safetensors").unlink()
    hub.stop()
    with pytest.raises(ModelError, match="cannot be reached"):
        pull_model(REPO, quiet)


def test_the_command_line_says_it_in_one_sentence(hub: Any, tmp_path: Path) -> None:
    hub.stop()
    told = run(hub, tmp_path, "-m", "model.cli", "tell", "a fox", "--model", REPO)
    assert told.returncode == 1
    assert told.stdout == ""
    assert told.stderr.startswith(f"taleloom: The Hub ({hub.url}) cannot be reached")
    assert len(told.stderr.splitlines()) == 1


WEIGHTS = {"model.safetensors": b"-" * 1000}
TOKENIZER = {"tokenizer.model": b"-"}


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"config.json": CONFIG, **TOKENIZER, "pytorch_model.bin": b"-"}, "only a pickle, which can run code"),
        ({"config.json": CONFIG, "weights.pt": b"-"}, "only a pickle, which can run code"),
        ({"config.json": CONFIG, **TOKENIZER}, "no model.safetensors"),
        (
            {"config.json": CONFIG, **TOKENIZER, "adapter_model.safetensors": b"-", "args.bin": b"-"},
            "no model.safetens",
        ),
        ({**TOKENIZER, **WEIGHTS}, "no config.json"),
        ({"config.json": CONFIG, **WEIGHTS, "tokenizer.json": b"{}"}, "no tokenizer.model"),
        ({}, "no config.json and no tokenizer.model and no model.safetensors"),
        ({"config.json": CONFIG, **TOKENIZER, "model.safetensors": b"-" * 5_000_000}, "has 5 MB; 2 MB are the most"),
    ],
)
def test_what_cannot_be_used_is_refused_from_its_file_names(
    hub: Any, files: dict[str, bytes], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pull.MAX_BYTES, "model", 2_000_000)
    hub.push(REPO, files)
    with pytest.raises(ModelError, match=sentence) as caught:
        pull_model(REPO, quiet)
    assert REPO in str(caught.value)
    assert [path for _, path, _ in hub.requests] == ["/api/models/someone/tiny/revision/main"]


def test_shards_come_all_with_their_index() -> None:
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = "model.safetensors.index.json"
    names = [*shards[::-1], index, "config.json", "tokenizer.model", "adapter_model.safetensors", "training_args.bin"]
    assert pull.choose_model_files(names) == ["config.json", "tokenizer.model", index, *shards]
    # The loader reads every model*.safetensors of a folder, so a second copy of the weights must not come along.
    assert pull.choose_model_files([*names, "model.safetensors"])[-2:] == [index, "model.safetensors"]


def test_another_kind_of_model_is_refused_before_its_weights_come(hub: Any) -> None:
    hub.push(REPO, {"config.json": b'{"model_type": "gpt2"}', **TOKENIZER, **WEIGHTS})
    with pytest.raises(ModelError, match="of type 'gpt2'"):
        pull_model(REPO, quiet)
    assert hub.asked_for("GET") == ["config.json"]


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("someone/nothing", "The Hub has no model someone/nothing, or it is private. Check its name"),
        (f"{REPO}@v9", "someone/tiny has no branch, tag or commit 'v9'."),
        (f"{REPO}@{'0' * 40}", f"someone/tiny has no branch, tag or commit '{'0' * 40}'."),
        (f"{REPO}@{'x/' * 300}", "someone/tiny has no branch, tag or commit 'x/x/"),
        ("some--one/tiny", "'some--one/tiny' is no Hub id. Write it as owner/name"),
        ("a/b/c", "'a/b/c' is no Hub id."),
        ("", "'' is no Hub id."),
        ("../../etc", "'../../etc' is no Hub id."),
    ],
)
def test_what_is_not_there_is_said(hub: Any, tiny_model: Path, spec: str, sentence: str) -> None:
    hub.push(REPO, tiny_model)
    with pytest.raises(ModelError) as caught:
        pull_model(spec, quiet)
    assert str(caught.value).startswith(sentence)
    assert hub.asked_for("GET") == []


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_token_is_said(hub: Any, status: int) -> None:
    hub.status = status
    with pytest.raises(ModelError, match=rf"refuses access to someone/tiny \({status}\).*hf auth login"):
        pull_model(REPO, quiet)


def test_a_gated_model_asks_to_accept_its_terms(hub: Any, tiny_model: Path) -> None:
    hub.push(REPO, tiny_model)
    hub.gated.add(REPO)
    with pytest.raises(ModelError, match=f"gated. Accept its terms at {hub.url}/someone/tiny, then log in"):
        pull_model(REPO, quiet)


def test_a_dropped_connection_is_taken_up_where_it_broke(
    hub: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.push(REPO, tiny_model)
    hub.cut["model.safetensors"] = "close"
    weights = (tiny_model / "model.safetensors").read_bytes()
    assert (pull_model(REPO, quiet) / "model.safetensors").read_bytes() == weights
    [asked] = [asked for _, _, asked in hub.requests if asked]
    assert 0 < int(asked.removeprefix("bytes=").removesuffix("-")) <= len(weights) // 2


def test_after_an_interrupted_download_a_second_try_works(hub: Any, tiny_model: Path) -> None:
    """An unfinished pull leaves no receipt: what an earlier one brought is still what is used offline."""
    hub.push(REPO, variant(tiny_model))
    before = pull_model(REPO, quiet)
    hub.push(REPO, tiny_model)
    hub.cut["model.safetensors"] = "reset"
    with pytest.raises(ModelError, match=r"The download of someone/tiny was interrupted\. Try again"):
        pull_model(REPO, quiet)
    hub.status = 503
    assert pull_model(REPO, quiet) == before

    hub.status = 200
    hub.requests.clear()
    weights = pull_model(REPO, quiet) / "model.safetensors"
    assert weights.read_bytes() == (tiny_model / "model.safetensors").read_bytes()
    assert set(hub.asked_for("HEAD")) == {"model.safetensors"}  # the others are kept


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "The disk is full.*Make room in .*home and try again"),
        # What hf_xet raised when its server could not be reached, and huggingface_hub when Xet headers were missing.
        (RuntimeError("Task error: File reconstruction error: CAS Client Error"), "was interrupted. Try again"),
        (ValueError("Xet headers have not been correctly set by the server."), "was interrupted. Try again"),
    ],
)
def test_what_stops_a_download_is_said(
    hub: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    hub.push(REPO, tiny_model)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(file_download, "http_get", fail)
    with pytest.raises(ModelError, match=sentence):
        pull_model(REPO, quiet)


def test_a_folder_that_cannot_be_written_is_said(hub: Any, tiny_model: Path, tmp_path: Path) -> None:
    hub.push(REPO, tiny_model)
    (tmp_path / "home").write_text("a file where the folder should be")
    with pytest.raises(ModelError, match=r"cannot be stored in .*home: Not a directory"):
        pull_model(REPO, quiet)


def test_a_pull_writes_into_taleloom_home_only(hub: Any, tiny_model: Path, tmp_path: Path) -> None:
    """huggingface_hub keeps one small file of its own in HF_HOME (which tools call it); ours all go below the home.

    The same process shows that pulling needs no torch and that importing pull is cheap.
    """
    hub.push(REPO, tiny_model)
    program = (
        "import sys; from model.hub.pull import pull_model; early = 'huggingface_hub' in sys.modules;"
        f"pull_model('{REPO}', print); print(early, 'torch' in sys.modules)"
    )
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    done = run(hub, tmp_path, "-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False False"
    written = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()} - before
    assert {path for path in written if path.parts[0] != "home"} <= {Path("hf/.agent_harnesses.json")}
    assert {path.parts[:2] for path in written if path.parts[0] == "home"} == {("home", "hub")}


def test_a_data_set_gives_its_training_stories(hub: Any) -> None:
    row = b'{"text": "Mia found a key."}\n'
    hub.push(
        "someone/stories",
        {
            "README.md": b"stories",
            "data/train-00001-of-00002.parquet": b"two",
            "data/train-00000-of-00002.parquet": b"one",
            "data/validation-00000-of-00001.parquet": b"no",
            "TinyStories-train.txt": b"the same again",
            "TinyStories_all_data.tar.gz": b"no",
        },
        kind="datasets",
    )
    hub.push(
        "someone/plain",
        {"b.jsonl": row, "a.txt": b"Once.", "my-valid.txt": b"no", "test/c.jsonl": row, "latest.jsonl": row},
        kind="datasets",
    )
    assert [p.read_bytes() for p in pull_dataset("someone/stories")] == [b"one", b"two"]
    [(source, paths)] = resolve_sources(["someone/plain"], pull_dataset)
    assert source.path == "someone/plain"
    assert [path.name for path in paths] == ["a.txt", "b.jsonl", "latest.jsonl"]
    assert [row["text"] for path in paths for row in read_rows(path)] == ["Once.", *["Mia found a key."] * 2]
    hub.stop()
    assert pull_dataset("someone/plain") == paths


def test_a_split_other_than_train_brings_its_files_alone(hub: Any) -> None:
    row = b'{"text": "Mia found a key."}\n'
    files = {"README-test.txt": b"no", "train.jsonl": row, "data/Test-0.jsonl": row, "latest.txt": b"no"}
    files |= {"validation/0.parquet": b"yes", "validation/0.jsonl": row}
    commit = hub.push("someone/stories", files, kind="datasets")
    for spec in ("someone/stories", f"someone/stories@{commit}"):  # the second from the receipts
        for split, expected in [("train", ["train.jsonl", "latest.txt"]), ("test", ["Test-0.jsonl"])]:
            assert {path.name for path in pull_dataset(spec, split=split)} == set(expected)
        assert [path.read_bytes() for path in pull_dataset(spec, split="validation")] == [b"yes"]
    assert sorted(hub.asked_for("HEAD")) == ["data/Test-0.jsonl", "latest.txt", "train.jsonl", "validation/0.parquet"]
    with pytest.raises(InputError, match=r"no file for the split 'dev'\. Its files: data/Test-0\.jsonl, latest"):
        pull_dataset("someone/stories", split="dev")
    hub.stop()
    assert [path.name for path in pull_dataset("someone/stories", split="test")] == ["Test-0.jsonl"]


@pytest.mark.parametrize("lock", ["private", "gated"])
def test_strangers_get_nothing_that_came_with_a_token(
    hub: Any, tiny_model: Path, lock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.push(REPO, tiny_model)
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    folder = pull_model(REPO, quiet)
    if lock == "private":
        private = hub.commits.pop(("models", REPO))
    else:
        hub.gated.add(REPO)
    for spec in (REPO, f"{REPO}@{commit}"):
        with pytest.raises(ModelError, match="or it is private" if lock == "private" else "gated"):
            pull_model(spec, quiet, use_token=False)
    assert pull_model(f"{REPO}@{commit}", quiet) == folder  # the owner still has it
    if lock == "private":
        hub.commits["models", REPO] = private
    hub.gated.clear()
    hub.authorizations.clear()
    assert pull_model(f"{REPO}@{commit}", quiet, use_token=False) == folder
    assert hub.authorizations == {None}
    hub.requests.clear()
    pull_model(REPO, quiet)  # what came to strangers once stays theirs
    hub.stop()
    for spec in (REPO, f"{REPO}@{commit}"):
        with_token = pull_model(spec, quiet)
        assert with_token == folder
    assert pull_model(f"{REPO}@{commit}", quiet, use_token=False) == folder


def test_strangers_get_what_came_without_a_token_also_offline(hub: Any, tiny_model: Path) -> None:
    commit = hub.push(REPO, tiny_model)
    folder = pull_model(REPO, quiet)  # there is no token here
    hub.stop()
    for spec in (REPO, f"{REPO}@{commit}"):
        assert pull_model(spec, quiet, use_token=False) == folder


def test_receipts_of_earlier_versions_are_the_owners(hub: Any, tiny_model: Path, tmp_path: Path) -> None:
    hub.push(REPO, tiny_model)
    folder = pull_model(REPO, quiet)
    for receipt in (tmp_path / "home/hub/receipts").iterdir():
        receipt.write_text(json.dumps(json.loads(receipt.read_text())["files"]))
    hub.stop()
    assert pull_model(REPO, quiet) == folder
    with pytest.raises(ModelError, match="cannot be reached"):
        pull_model(REPO, quiet, use_token=False)


def test_a_data_set_that_cannot_be_used_is_said(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push("someone/pictures", {"a.png": b"-", "train.csv": b"-"}, kind="datasets")
    hub.push("someone/huge", {"train.txt": b"-" * 3000}, kind="datasets")
    hub.push("someone/tiny", {"config.json": CONFIG})
    monkeypatch.setitem(pull.MAX_BYTES, "dataset", 2000)
    for spec, sentence in [
        ("someone/pictures", "no training file of a kind Taleloom reads"),
        ("someone/huge", "has 3 kB; 2 kB are the most"),
        ("someone/tiny", "The Hub has no data set someone/tiny"),
        ("no such id", "is no Hub id"),
    ]:
        with pytest.raises(InputError, match=sentence):
            pull_dataset(spec)
    assert hub.asked_for("GET") == []
