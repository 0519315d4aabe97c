"""Model folders: saved equals loaded; everything wrong is named."""

import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch

from model.checkpoint import (
    load_decoder,
    load_tokenizer,
    read_config,
    read_weights,
    remove_leftovers,
    save_model,
    weight_files,
    write_atomically,
)
from model.config import CHECKOUT
from model.errors import InputError, ModelError
from model.tokenizer import Tokenizer


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(tiny_model, tmp_path / "copy")


def test_saved_equals_loaded_up_to_fp16(tiny_decoder, tiny_model):
    loaded = load_decoder(tiny_model)
    assert loaded.config == tiny_decoder.config
    for name, weights in tiny_decoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weights.half().float()), name


def test_saving_again_keeps_a_model_card(tiny_decoder, tokenizer, folder):
    (folder / "README.md").write_text("my card")
    save_model(folder, tiny_decoder, tokenizer)
    assert (folder / "README.md").read_text() == "my card"
    assert not [p for p in folder.parent.iterdir() if p.name.startswith(".")]


def test_saving_never_overwrites_something_else(tiny_decoder, tokenizer, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    with pytest.raises(InputError, match="another name"):
        save_model(tmp_path / "notes", tiny_decoder, tokenizer)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_what_killed_writes_left_is_found_by_its_name(tmp_path):
    program = """
import os, signal, sys
from pathlib import Path
import model.checkpoint as checkpoint
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
folder = Path(sys.argv[1])
getattr(checkpoint, sys.argv[2])(folder / sys.argv[3], b"new" if sys.argv[2] == "write_atomically" else {"a": b"new"})
"""
    kept = {"config.json", ".worker", ".lock", ".created.jsonl", ".hidden", "a.b.abcdefgh", "job.json"}
    for name in kept:
        (tmp_path / name).write_text("")
    for write in (("write_atomically", "config.json"), ("write_atomically", "job.json"), ("write_folder", "best")):
        done = subprocess.run([sys.executable, "-c", program, str(tmp_path), *write], cwd=CHECKOUT)
        assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == len(kept) + 3
    remove_leftovers(tmp_path, lambda name: name != "job.json")
    [left] = {path.name for path in tmp_path.iterdir()} - kept
    assert left.startswith(".job.json.")
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept
    remove_leftovers(tmp_path / "missing")


def test_missing_weights_are_named(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        load_decoder(folder)


def test_a_pickle_is_refused_and_never_opened(folder):
    (folder / "model.safetensors").unlink()
    # This pickle would create a file when opened.
    marker = folder / "executed"
    (folder / "pytorch_model.bin").write_bytes(f"cposix\nsystem\n(S'touch {marker}'\ntR.".encode())
    with pytest.raises(ModelError, match="pickle"):
        load_decoder(folder)
    with pytest.raises(ModelError, match="pickle"):
        weight_files(folder)
    assert not marker.exists()


def test_truncated_weights_are_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="damaged or incomplete"):
        load_decoder(folder)


def test_weights_of_another_shape_are_named(folder):
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "intermediate_size": 128}))
    with pytest.raises(ModelError, match=r"do not match.*down_proj.weight should be \(32, 128\) and is \(32, 64\)"):
        load_decoder(folder)


def test_a_missing_weight_is_named(tiny_decoder, folder):
    state = {name: weight for name, weight in tiny_decoder.state_dict().items() if name != "lm_head.weight"}
    del state["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(state, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"do not match.*layers.1.mlp.up_proj.weight.*is missing"):
        load_decoder(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(tiny_decoder, folder, value):
    state = {name: weight.clone() for name, weight in tiny_decoder.state_dict().items() if name != "lm_head.weight"}
    state["model.norm.weight"][3] = value
    safetensors.torch.save_file(state, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"infinite numbers or none at all in model.norm.weight"):
        load_decoder(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_float_type_of_the_hub_is_read(tiny_decoder, folder, dtype):
    state = {name: weight.to(dtype) for name, weight in tiny_decoder.state_dict().items() if name != "lm_head.weight"}
    safetensors.torch.save_file(state, folder / "model.safetensors")
    weights = read_weights(folder, tiny_decoder.config)
    assert set(weights) == set(state)
    for name, weight in state.items():
        assert np.array_equal(weights[name], weight.float().numpy())


def test_a_tokenizer_of_another_model_is_named(folder, stories):
    (folder / "tokenizer.model").write_bytes(Tokenizer.train(stories, 326).serialized)
    with pytest.raises(ModelError, match="do not belong"):
        load_tokenizer(folder, read_config(folder))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "does not hold"),
        ('{"model_type": "gpt2"}', "gpt2"),
        ('{"model_type": "llama"}', "does not describe"),
        ('{"model_type": "llama", "attention_bias": true}', "attention_bias"),
        ('{"model_type": "llama", "rope_scaling": "linear"}', "odd rotary"),
        ("[" * 100_000, "cannot be read"),
        ('{"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2}}', "rope_type"),
    ],
)
def test_an_unusable_config_says_why(folder, content, words):
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=words):
        read_config(folder)


def test_a_context_too_short_for_a_story_is_refused_and_a_huge_one_is_not_allocated(folder):
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "max_position_embeddings": 1}))
    with pytest.raises(ModelError, match="too few"):
        read_config(folder)
    (folder / "config.json").write_text(json.dumps({**fields, "max_position_embeddings": 1_000_000}))
    assert read_config(folder).max_position_embeddings == 2048


def test_a_folder_without_config_is_no_model(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        read_config(tmp_path)
