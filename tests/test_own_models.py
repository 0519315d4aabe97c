"""Storytellers of one's own: listed, renamed, noted, exported, deleted."""

import io
import shutil
import zipfile

import pytest

import model.own_models as own
from model.errors import InputError, ModelError
from model.find import find_model


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TALELOOM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def add(name, tiny_model, **notes):
    return own.add_model(name, tiny_model, {"created": 1.0, "base": None, **notes}, f"# {name}\n")


def test_newest_first_and_found_by_name(tiny_model, home):
    assert own.own_models() == []
    add("pirates", tiny_model)
    add("owls", tiny_model, created=2.0, note="hoo")
    (home / "models" / "half").mkdir()  # no model
    assert [(m.name, m.note) for m in own.own_models()] == [("owls", "hoo"), ("pirates", "")]
    assert find_model("owls") == own.own_model("owls").folder and own.own_model("owls").card == "# owls\n"


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "x" * 61, "no spaces", "dot."])
def test_names_that_cannot_be(tiny_model, name):
    with pytest.raises(InputError, match="name"):
        add(name, tiny_model)
    add("good", tiny_model)
    with pytest.raises(InputError, match="name"):
        own.rename_model("good", name)


def test_a_name_is_given_once(tiny_model):
    add("pirates", tiny_model)
    add("owls", tiny_model)
    for again in (lambda: add("owls", tiny_model), lambda: own.rename_model("pirates", "owls")):
        with pytest.raises(InputError, match="already"):
            again()
    own.rename_model("pirates", "sailors")
    own.note_model("sailors", "  ahoy ")
    assert {(m.name, m.note) for m in own.own_models()} == {("owls", ""), ("sailors", "ahoy")}


def test_deleted_it_is_gone(tiny_model, home):
    add("pirates", tiny_model)
    own.delete_model("pirates")
    assert own.own_models() == [] and list((home / "models").iterdir()) == []
    with pytest.raises(ModelError, match="pirates"):
        own.delete_model("pirates")


def test_whose_it_is_and_what_a_killed_write_left(tiny_model, tmp_path, home):
    source = tmp_path / "best"
    shutil.copytree(tiny_model, source)
    (source / ".model.safetensors.abcdefgh").write_bytes(b"half")
    own.add_model("pirates", source, {"visitor": "0123abcd"}, "")
    add("owls", tiny_model)
    assert {model.name: model.visitor for model in own.own_models()} == {"pirates": "0123abcd", "owls": ""}
    assert sorted(p.name for p in (home / "models/pirates").iterdir() if p.name.startswith(".")) == []
    own.note_model("pirates", "ahoy")
    own.rename_model("pirates", "sailors")
    assert own.own_model("sailors").visitor == "0123abcd"


def test_damaged_notes_do_not_hide_it(tiny_model):
    add("pirates", tiny_model)
    (own.own_model("pirates").folder / own.NOTES).write_text("{half")
    assert own.own_model("pirates").note == ""


def test_exports(tiny_model, tmp_path):
    add("pirates", tiny_model)
    name, content = own.export_model("pirates", "folder")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        archive.extractall(tmp_path / "out")
    assert name == "pirates.zip"
    assert (tmp_path / "out/pirates/model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()
    assert own.export_model("pirates", "gguf")[1].startswith(b"GGUF")
    with pytest.raises(ModelError, match="LoRA"):
        own.export_model("pirates", "adapter")
    shutil.copy(tiny_model / "model.safetensors", own.own_model("pirates").folder / own.ADAPTER)
    (own.own_model("pirates").folder / "adapter_config.json").write_text("{}")
    name, content = own.export_model("pirates", "adapter")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = archive.namelist()
    assert name == "pirates-adapter.zip" and names == [f"pirates/{n}" for n in ("adapter_config.json", own.ADAPTER)]
