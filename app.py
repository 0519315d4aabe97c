"""The front door: page config and the menu. Each folder of pages/ is one section of it."""

from pathlib import Path

import streamlit as st

# An emoji or a :material: icon would be fetched from a font server; a drawing of our own works without a network.
BOOK = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64">'
    '<path d="M32 16C24 9 13 8 5 10v40c8-2 19-1 27 6 8-7 19-8 27-6V10c-8-2-19-1-27 6z" fill="#8c3a2b"/>'
    '<path d="M32 20v30M13 20c5 0 9 1 12 3M13 30c5 0 9 1 12 3M51 20c-5 0-9 1-12 3M51 30c-5 0-9 1-12 3"'
    ' stroke="#faf4e6" stroke-width="3" stroke-linecap="round" fill="none"/></svg>'
)

st.set_page_config(
    page_title="Taleloom",
    page_icon=BOOK,
    layout="centered",
    initial_sidebar_state="collapsed",
    menu_items={"About": "Taleloom writes short stories with a small language model that runs on this very machine."},
)

st.html(Path(__file__).parent / "pages" / "taleloom.css")
pages = {
    "Create": [st.Page("pages/create/story.py", title="Write a story", icon=":material/auto_stories:", default=True)],
    "Train": [
        st.Page("pages/train/finetune.py", title="Teach it your stories", icon=":material/school:"),
        st.Page("pages/train/job.py", title="A fine-tune", visibility="hidden"),
        st.Page("pages/train/models.py", title="Storytellers", icon=":material/groups:"),
    ],
}
st.navigation(pages, position="top").run()
