"""The page of one's own storytellers, without a browser."""

from __future__ import annotations

import io
import json
import shutil
import zipfile

import pytest

from model.own_models import ADAPTER, add_model, export_model, own_models
from tests.pages.looking import NASTY, press

CARD = "---\nlanguage: en\n---\n# pirates\n\n\\*A shy fox\\* <b>"


def labels(app):
    return {button.label for button in [*app.button, *app.get("download_button")]}


@pytest.fixture
def pirates(tiny_model, home):
    return add_model("pirates", tiny_model, {"created": 1.0, "base": None, "note": "Ahoy"}, CARD)


def test_without_any_it_says_where_to_begin(visit):
    app = visit("models")
    assert "none of your own" in app.text[0].value and app.get("page_link") and not app.button


def test_each_is_shown_the_newest_first(visit, pirates, tiny_model):
    add_model("owls", tiny_model, {"created": 9e8, "base": "a/**b**", "note": NASTY}, "")
    app = visit("models")
    names = [element.body for element in app.html if "tl-name'" in element.body]
    assert [name.split(">")[1].split("<")[0] for name in names] == ["owls", "pirates"]
    captions = [caption.value.replace("\\", "") for caption in app.caption]
    assert captions[0].startswith("From a/**b**, 09 July 1998") and "the bundled storyteller" in captions[1]
    assert not any("**" in caption.value for caption in app.caption)
    assert [field.value for field in app.text_input if field.label == "Note"] == [NASTY, "Ahoy"]
    assert "# pirates\n\n*A shy fox* <b>" in [text.value for text in app.text], "the card, as plain text"


def test_write_with_it(visit, pirates):
    app = visit("models")
    press(app, "Write with it")
    assert app.session_state["model"] == "pirates" and "Tell the story" in labels(app)
    assert app.selectbox(key="picked").value == "pirates"
    app.session_state["read_along"] = False
    app.text_area(key="prompt").set_value("Mia found")
    press(app, "Tell the story")
    assert app.session_state["story"].wait(30) and not app.session_state["story"].error


def test_a_note_is_kept_and_looking_changes_nothing(visit, pirates):
    app = visit("models")
    app.text_input(key="note_pirates").set_value(f" {NASTY} ").run()
    assert own_models()[0].note == NASTY and not app.exception
    notes = pirates.folder / "taleloom.json"
    notes.write_text(json.dumps({"note": "from elsewhere"}))
    app.run()
    assert own_models()[0].note == "from elsewhere"


def test_rename(visit, pirates, tiny_model):
    add_model("owls", tiny_model, {"created": 2.0}, "")
    app = visit("models")
    for name, words in (("owls", "already"), ("no spaces", "cannot be"), ("../x", "cannot be")):
        app.text_input(key="name_pirates").set_value(name)
        app.button(key="FormSubmitter:rename_pirates-Rename it").click().run()
        assert not app.exception and words in app.error[0].value.replace("\\", "")
    app.text_input(key="name_pirates").set_value("sailors")
    app.button(key="FormSubmitter:rename_pirates-Rename it").click().run()
    assert not app.error and [model.name for model in own_models()] == ["owls", "sailors"]
    assert any(">sailors<" in element.body for element in app.html)


def test_delete(visit, pirates):
    app, other_tab = visit("models"), visit("models")
    press(app, "Delete it")
    assert own_models() == [] and "none of your own" in app.text[0].value
    press(other_tab, "Delete it")
    assert "no storyteller of your own" in other_tab.error[0].value


def test_what_can_be_taken_home(visit, pirates, tiny_model):
    assert {"Folder (ZIP)", "GGUF, for llama.cpp"} <= labels(visit("models"))
    assert "LoRA adapter" not in labels(visit("models"))
    shutil.copy(tiny_model / "model.safetensors", pirates.folder / ADAPTER)
    assert "LoRA adapter" in labels(visit("models"))
    # What a press on each answers with.
    archive = zipfile.ZipFile(io.BytesIO(export_model("pirates", "folder")[1]))
    assert "pirates/config.json" in archive.namelist()


def test_on_a_public_site_only_its_maker_may_change_it(visit, pirates, jobs, tiny_model, monkeypatch):
    monkeypatch.setenv("TALELOOM_TRAINING", "limited")
    app = visit("models")
    assert "Write with it" in labels(app) and "Folder (ZIP)" in labels(app)
    assert not {"Delete it", "Rename it"} & labels(app) and not app.text_input
    assert "Ahoy" in [text.value for text in app.text]
    maker = visit("finetune")
    press(maker, "Start learning")
    [job] = jobs.manager.list()
    add_model("owls", tiny_model, {"created": 2.0, "job": job.id, "visitor": job.visitor}, "")
    jobs.manager.cancel(job.id)
    jobs.manager.delete(job.id)  # whose it is does not depend on the job
    maker.switch_page("pages/train/models.py").run()
    assert [button.key for button in maker.button if button.label == "Delete it"] == ["delete_owls"]
    assert "owls" in maker.switch_page("pages/create/story.py").run().selectbox(key="picked").options
    # It may recite its maker's stories, so nobody else sees it, or can tell with it by typing its name.
    assert not [button for button in visit("models").button if button.key == "write_owls"]
    stranger = visit("models").switch_page("pages/create/story.py").run()
    assert "owls" not in stranger.selectbox(key="picked").options
    stranger.text_input(key="model_field").set_value("owls")
    press(stranger, "Load")
    assert "There is no model" in stranger.error[0].value and stranger.session_state["model"] is None
