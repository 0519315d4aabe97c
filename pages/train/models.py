"""Your own storytellers: look at them, write with them, rename, take them home, delete them."""

from __future__ import annotations

import re
import time
from functools import partial

import streamlit as st

from model.own_models import (
    ExportForm,
    OwnModel,
    delete_model,
    export_model,
    note_model,
    rename_model,
)
from pages.shared.parts import guarded, is_mine, literally, show_complaint, visible_models

FORMS: dict[ExportForm, str] = {"folder": "Folder (ZIP)", "gguf": "GGUF, for llama.cpp", "adapter": "LoRA adapter"}


def write_with(name: str) -> None:
    st.session_state.wanted = name
    st.session_state.to_story = True


def show(model: OwnModel) -> None:
    with st.container(border=True, key=f"model_{model.name}"):
        st.html(f"<h2 class='tl-name'>{model.name}</h2>")  # letters, digits, dots, dashes: see own_models.NAME
        made = time.strftime("%d %B %Y", time.localtime(model.created))
        st.caption(literally(f"From {model.base or 'the bundled storyteller'}, {made}, {model.size_mb:.0f} MB"))
        mine = is_mine(model.visitor)
        if mine:
            st.text_input(
                "Note", model.note, key=f"note_{model.name}", placeholder="What is special about it?",
                on_change=note, args=(model.name,),
            )  # fmt: skip
        elif model.note:
            st.text(model.note)
        with st.container(horizontal=True, gap="small"):
            st.button(
                "Write with it", type="primary", icon=":material/auto_stories:", key=f"write_{model.name}",
                on_click=write_with, args=(model.name,),
            )  # fmt: skip
            with st.popover("Take it home", icon=":material/download:"):
                for form, label in FORMS.items():
                    if form == "adapter" and not model.has_adapter:
                        continue
                    suffix = {"folder": "zip", "gguf": "gguf", "adapter": "zip"}[form]
                    content = partial(exported, model.name, form)
                    name = f"{model.name}.{suffix}"
                    st.download_button(label, content, name, on_click="ignore", key=f"{form}_{model.name}")
            if mine:
                show_changes(model)
        if model.card:
            with st.expander("Model card"):
                st.text(re.sub(r"\A---\n.*?\n---\n", "", model.card, flags=re.DOTALL).replace("\\", ""))


def show_changes(model: OwnModel) -> None:
    with st.popover("Rename"), st.form(f"rename_{model.name}", border=False):
        st.text_input("New name", model.name, key=f"name_{model.name}", max_chars=60)
        st.form_submit_button("Rename it", on_click=rename, args=(model.name,))
    with st.popover("Delete", icon=":material/delete:", type="tertiary"):
        st.text("It is gone for good then.")
        st.button("Delete it", key=f"delete_{model.name}", on_click=guarded, args=(partial(delete_model, model.name),))


def exported(name: str, form: ExportForm) -> bytes:
    return export_model(name, form)[1]


def note(name: str) -> None:
    guarded(partial(note_model, name, st.session_state[f"note_{name}"]))


def rename(name: str) -> None:
    guarded(partial(rename_model, name, st.session_state[f"name_{name}"]))


if st.session_state.pop("to_story", False):
    st.switch_page("pages/create/story.py")
st.html(
    "<h1 class='tl-wordmark'>Storytellers</h1>"
    "<p class='tl-tagline'>Those you have taught, to write with or to take home.</p>"
)
show_complaint()
models = visible_models()
for model in models:
    show(model)
if not models:
    st.text("There are none of your own yet.")
    st.page_link("pages/train/finetune.py", label="Teach one your stories", icon=":material/school:")
