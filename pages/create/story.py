"""Write with the storyteller: ask, watch the story grow, stop, go on, take it home.

The story lives in the engine's thread; this page only looks at it again and again, so nothing that happens to the page
ends a story. Its id is in the URL. Text of readers and model goes to the browser escaped, never as markdown or HTML.
"""

from __future__ import annotations

import html
import os
from dataclasses import replace
from pathlib import Path
from weakref import WeakValueDictionary

import streamlit as st

from model.config import SamplingParams
from model.errors import ModelError, TaleloomError
from model.find import find_model
from model.own_models import own_models
from model.prompt import Mode, guess_mode
from model.storyteller import Story, Storyteller
from pages.create.settings import fill_in_settings, show_settings, typed_params
from pages.shared.parts import guarded, literally, show_complaint, show_polled, visible_models, visitor

DEFAULT_MODEL = os.environ.get("TALELOOM_MODEL") or None
DEVICE = os.environ.get("TALELOOM_DEVICE", "auto")
MAX_RUNNING_PER_VISITOR = 2
POLL_S = 0.15
READING_PACE = 60.0  # tokens a second: faster than anyone reads, slow enough to watch
WAYS: dict[str, Mode | None] = {"Auto": None, "An idea": "idea", "An opening": "opening"}
EXAMPLES: dict[str, Mode] = {
    "a dragon who is afraid of fire": "idea",
    "a little robot who wants to plant a garden": "idea",
    "Once upon a time, a fox found a key": "opening",
    "the moon comes down to play": "idea",
    "two mice build a boat": "idea",
    "One rainy day, Lily heard a tiny voice in her shoe.": "opening",
}
# The story reaches the browser as data; a component's html, css and js are run as they are and hold none of it.
copy_button = st.components.v2.component(
    "copy_story",
    html="""
    <button type="button"><span class="icon" aria-hidden="true">content_copy</span><span class="label"></span></button>
    """,
    css="""
    button {
      align-items: center; background: var(--st-secondary-background-color); border: 1px solid var(--st-border-color);
      border-radius: 999px; box-sizing: border-box; color: inherit; cursor: pointer; display: flex; font: inherit;
      font-size: 0.875rem; gap: 0.5rem; justify-content: center; min-height: 2.5rem; width: 100%;
    }
    button:hover { border-color: var(--st-link-color); color: var(--st-link-color) }
    button:focus-visible { outline: 2px solid var(--st-link-color); outline-offset: 2px }
    .icon { font-family: "Material Symbols Rounded"; font-feature-settings: "liga"; font-size: 1.1rem; line-height: 1 }
    """,
    js="""
    export default function({ data, parentElement }) {
      const button = parentElement.querySelector("button")
      const label = parentElement.querySelector(".label")
      label.textContent = "Copy"
      button.onclick = async () => {
        try {
          await navigator.clipboard.writeText(data)
        } catch {  // pages that are not served over https have no clipboard object
          const area = document.createElement("textarea")
          area.value = data
          document.body.append(area)
          area.select()
          document.execCommand("copy")
          area.remove()
        }
        label.textContent = "Copied"
        setTimeout(() => { label.textContent = "Copy" }, 1600)
      }
    }
    """,
)


@st.cache_resource
def awake() -> WeakValueDictionary[str | None, Storyteller]:
    """The storytellers in memory by model, so that a reloaded page finds a story whoever tells it."""
    return WeakValueDictionary()


def wake(model: str | None) -> Storyteller:
    # Visitors name a model of the Hub or of this app's own; a path would let them look around the server's disk.
    storyteller = (
        Storyteller.load(DEFAULT_MODEL, DEVICE) if model is None else Storyteller.load(model, DEVICE, folders=False)
    )
    storyteller.max_running_per_visitor = MAX_RUNNING_PER_VISITOR
    awake()[model] = storyteller
    return storyteller


@st.cache_resource(show_spinner="The storyteller is waking up …", on_release=Storyteller.close)
def first_storyteller() -> Storyteller:
    return wake(None)


# A visitor who loads a third one must not end the stories of another: the one that goes tells its stories to the end.
@st.cache_resource(show_spinner="The storyteller is waking up …", max_entries=2, on_release=Storyteller.retire)
def chosen_storyteller(model: str, created: float | None) -> Storyteller:
    return wake(model)


def storyteller_of(model: str | None) -> Storyteller:
    """One storyteller for all visitors; None is the one this app was started with."""
    if model is None:
        return first_storyteller()
    # One of the user's own may be deleted, and another be given its name.
    return chosen_storyteller(model, next((own.created for own in own_models() if own.name == model), None))


def name_of(model: str) -> str:
    """What to call a model on the page, "" being the bundled one; of a folder only its name."""
    if not model:
        return "The bundled storyteller" if DEFAULT_MODEL is None else Path(DEFAULT_MODEL).name
    return model


def current_story() -> Story | None:
    """The story the URL names, wherever it is told; None when it names none or nobody remembers it."""
    story_id = st.query_params.get("story", "")
    story: Story | None = st.session_state.get("story")
    if story is not None and story.id == story_id:
        return story
    for model, storyteller in list(awake().items()):
        if story := storyteller.story(story_id):
            st.session_state.story, st.session_state.model = story, model
            fill_in(story)
            return story
    return None


def fill_in(story: Story) -> None:
    """Set the form to what a story was asked with."""
    st.session_state.prompt = story.prompt
    if guess_mode(story.prompt) != story.mode:
        st.session_state.way = next(way for way, mode in WAYS.items() if mode == story.mode)
    fill_in_settings(story.params)


# What buttons do. Callbacks run before the page is drawn again, so one run shows the outcome.


def tell(prompt: str, mode: Mode | None, params: SamplingParams) -> None:
    """Begin a story and put its id in the URL.

    The visitor's own one that was shown until now is stopped then: nobody would see it grow.
    """
    shown = current_story()
    pace = READING_PACE if st.session_state.read_along else None
    story = storyteller_of(st.session_state.model).tell(prompt, params, mode, visitor(), pace)
    if shown is not None and shown.visitor == story.visitor:
        shown.stop()
        shown.wait(1.0)  # until then it still holds one of the visitor's places
    st.session_state.story = story
    st.query_params["story"] = story.id


def tell_typed() -> None:
    guarded(lambda: tell(st.session_state.prompt, WAYS[st.session_state.get("way", "Auto")], typed_params()))


def tell_example(example: str, mode: Mode) -> None:
    st.session_state.prompt = example
    guarded(lambda: tell(example, mode, typed_params()))


def tell_another(story: Story) -> None:
    guarded(lambda: tell(story.prompt, story.mode, replace(story.params, seed=None)))


def stop(story: Story) -> None:
    story.stop()
    story.wait(1.0)  # the engine ends it within a step; then this run already shows it as stopped


def go_on(story: Story) -> None:
    guarded(lambda: story.extend(story.params.max_tokens))


def begin_anew() -> None:
    st.query_params.clear()
    st.session_state.prompt = ""


def change_storyteller() -> None:
    st.session_state.wanted = st.session_state.model_field.strip()


def pick_storyteller() -> None:
    """One of those that are here; "" is the bundled one, as a select box shows None as nothing chosen."""
    if st.session_state.picked:
        st.session_state.wanted = st.session_state.picked
    else:
        st.session_state.model = None


# What the page shows.


def load_wanted() -> None:
    """Load what was typed in the storyteller's field; on failure the present one stays."""
    wanted = st.session_state.pop("wanted", None)
    if not wanted:
        return
    place = st.empty()
    try:
        with place.status("Looking for the storyteller …") as status:
            # Fetched outside the cache: what a cached function draws is replayed to others.
            if wanted in {model.name for model in own_models()} - {model.name for model in visible_models()}:
                raise ModelError(f"There is no model {wanted!r}.")
            find_model(wanted, lambda sentence: status.update(label=literally(sentence)), folders=False)
            storyteller_of(wanted)
    except TaleloomError as error:
        place.error(literally(str(error)))
    else:
        st.session_state.model = wanted
        place.success("A new storyteller is here.")


def show_header() -> None:
    with st.container(horizontal=True, horizontal_alignment="distribute", vertical_alignment="bottom"):
        st.html(
            '<h1 class="tl-wordmark"><a href="./" target="_self">Taleloom</a></h1>'
            '<p class="tl-tagline">Give it a thought, get a story.</p>',
            width="content",
        )
        with st.popover("Storyteller", type="tertiary"):
            here = st.empty()
            with st.form("storyteller", border=False):
                st.text_input(
                    "Another storyteller",
                    key="model_field",
                    placeholder="owner/name or owner/name@revision",
                    help="A Llama-style model of the Hugging Face Hub.",
                )
                st.form_submit_button("Load", icon=":material/download:", on_click=change_storyteller)
            load_wanted()
            st.session_state.picked = st.session_state.model or ""
            names = dict.fromkeys(["", *(model.name for model in visible_models()), st.session_state.picked])
            here.selectbox("Now telling", list(names), format_func=name_of, key="picked", on_change=pick_storyteller)


def show_form(knows_ideas: bool) -> None:
    with st.form("ask", border=False):
        st.text_area(
            "Your idea, or the opening of a story" if knows_ideas else "The opening of a story",
            key="prompt",
            height=110,
            placeholder="a dragon who is afraid of fire" if knows_ideas else "Once upon a time, a fox found a key",
        )
        with st.container(horizontal=True, vertical_alignment="bottom", horizontal_alignment="distribute"):
            if knows_ideas:
                st.segmented_control(
                    "Read it as",
                    list(WAYS),
                    default="Auto",
                    key="way",
                    required=True,
                    help="An idea becomes a story of its own; an opening is continued word for word. "
                    "Auto decides by how it is written and says so.",
                )
            st.form_submit_button(
                "Tell the story", key="tell", type="primary", icon=":material/auto_stories:", on_click=tell_typed
            )


def show_examples(knows_ideas: bool) -> None:
    with st.container(horizontal=True, gap="xsmall", key="examples", vertical_alignment="center"):
        st.html('<span class="tl-facts">Or try one of these</span>', width="content")
        for example, mode in EXAMPLES.items():
            if knows_ideas or mode == "opening":
                st.button(example, on_click=tell_example, args=(example, mode))


def page_html(story: Story) -> str:
    """The story as escaped HTML: a paragraph a line, the reader's own words marked."""

    def span(text: str, kind: str) -> str:
        between = f'</span></p><p><span class="{kind}">'
        first, *others = html.escape(text).split("\n")
        lines = [first.rstrip(), *(line.strip() for line in others if line.strip())] if others else [first]
        return f'<span class="{kind}">{between.join(lines)}</span>'

    running = not story.is_done
    continuation = story.continuation.rstrip()
    if story.mode == "opening":
        asked = "Read as an opening"
        text = span(story.prompt if continuation else story.prompt.rstrip(), "tl-own") + span(continuation, "")
    else:
        asked = f"Read as an idea: “{html.escape(story.prompt)}”"
        text = span(continuation.lstrip(), "")
    caret = '<span class="tl-caret"></span>' if running else ""
    end = '<div class="tl-end">***</div>' if story.finish_reason == "stop" else ""
    waiting = ""
    if running and not story.n_tokens:
        n_ahead = story.place_in_queue - 1
        waiting = {-1: "The storyteller is thinking …", 0: "Your story is next.", 1: "1 story is ahead of yours."}.get(
            n_ahead, f"{n_ahead} stories are ahead of yours."
        )
        waiting = f'<p class="tl-waiting">{waiting}</p>'
    return (
        f'<article class="tl-page"><div class="tl-asked">{asked}</div>'
        f'<p class="tl-first">{text}{caret}</p>{waiting}{end}</article>'
    )


def show_story(story: Story, was_running: bool) -> None:
    st.html(page_html(story))
    if was_running and story.is_done:
        st.rerun()  # the whole page: its buttons change
    # Of a story told for reading along, what the storyteller could do says more than the pace.
    possible = story.possible_tokens_per_second
    told = f"written at {possible:,.0f}, told at" if possible > 1.5 * story.tokens_per_second else "at"
    speed = f"<span>{told} {story.tokens_per_second:,.0f} tokens a second</span>" if story.tokens_per_second else ""
    st.html(
        f'<div class="tl-facts"><span>{len(story.text.split()):,} words</span>{speed}'
        f"<span>Seed {story.params.seed}</span></div>"
    )
    if story.n_forgotten_tokens:
        st.caption(
            f"The story has outgrown the storyteller's memory: the oldest {story.n_forgotten_tokens:,} tokens slid "
            "out of it, so it may forget how things began."
        )


def show_endings(story: Story) -> None:
    """What can be done with a story that has ended."""
    if story.error:
        st.error(literally(story.error))
    elif story.finish_reason == "length":
        st.caption("It stopped at the length you chose; it can go on.")
    elif story.finish_reason == "cancelled":
        st.caption("You stopped it here.")
    with st.container(horizontal=True, gap="small"):
        if story.finish_reason == "length":
            st.button("Continue", type="primary", icon=":material/arrow_forward:", on_click=go_on, args=(story,))
        st.button("Tell another", icon=":material/casino:", on_click=tell_another, args=(story,))
        st.download_button(
            "Download",
            story.text,
            f"taleloom-{story.params.seed}.txt",
            "text/plain",
            icon=":material/download:",
            on_click="ignore",
        )
        copy_button(data=story.text, key="copy", width=110)
        st.button("New story", type="tertiary", icon=":material/add:", on_click=begin_anew)


st.session_state.setdefault("model", None)

story = current_story()
show_header()
try:
    storyteller = storyteller_of(st.session_state.model)
except TaleloomError as error:
    st.error(literally(str(error)))
    st.stop()
show_form(storyteller.knows_ideas)
show_complaint()
if story is None:
    if "story" in st.query_params:
        st.info("That story is no longer remembered: the storyteller keeps the latest ones only. Ask for a new one.")
    show_examples(storyteller.knows_ideas)
show_settings()
if story is not None:
    is_running = not story.is_done
    show_polled(show_story, POLL_S if is_running else None, story, is_running)
    if is_running:
        with st.container(horizontal=True, horizontal_alignment="right", key="stopping"):
            st.button("Stop", icon=":material/stop_circle:", on_click=stop, args=(story,))
    else:
        show_endings(story)
