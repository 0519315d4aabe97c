"""How a story is told: the settings below the form, and what they come to as sampling parameters."""

from __future__ import annotations

import streamlit as st

from model.config import SamplingParams

DEFAULTS = SamplingParams()
SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
LENGTHS = {80: "A few lines", 160: "Short", 320: "Medium", 640: "Long", 1280: "Very long"}  # by most tokens


def typed_params() -> SamplingParams:
    """What the settings say now."""
    names = (*SETTINGS, "seed")
    return SamplingParams(max_tokens=st.session_state.length, **{name: st.session_state[name] for name in names})


def fill_in_settings(params: SamplingParams) -> None:
    """Set them to what a story was told with, but for its seed: Tell should tell a new one."""
    st.session_state.length = min(LENGTHS, key=lambda length: abs(length - params.max_tokens))
    for name in SETTINGS:
        st.session_state[name] = getattr(params, name)


def show_settings() -> None:
    # Each widget has its default from here, not from the session: when the first click interrupts the page's first run,
    # the browser never hears of a value set there, sends the widget's own default, and that is its minimum or off.
    with st.container(key="settings"):
        left, right = st.columns(2, gap="medium")
    left.select_slider(
        "Length",
        list(LENGTHS),
        DEFAULTS.max_tokens,
        key="length",
        format_func=lambda length: LENGTHS[length],
        help="The most it may write.",
    )
    right.slider(
        "Creativity",
        0.0,
        1.5,
        DEFAULTS.temperature,
        step=0.05,
        key="temperature",
        help="The sampling temperature: low keeps to the likeliest words, high takes chances.",
    )
    with st.expander("Finer settings", icon=":material/tune:", type="compact"):
        left, right = st.columns(2)
        left.number_input(
            "Top-k", 0, 100_000, DEFAULTS.top_k, key="top_k", help="Choose among the k likeliest tokens; 0 is all."
        )
        right.number_input(
            "Top-p", 0.01, 1.0, DEFAULTS.top_p, 0.01, key="top_p", help="The likeliest tokens up to this share."
        )
        left, right = st.columns(2)  # a second pair: on a phone they stand in the order they are read
        left.number_input(
            "Min-p",
            0.0,
            1.0,
            DEFAULTS.min_p,
            0.01,
            key="min_p",
            help="Leave out tokens below this share of the likeliest.",
        )
        right.number_input(
            "Repetition penalty",
            0.1,
            10.0,
            DEFAULTS.repetition_penalty,
            0.05,
            key="repetition_penalty",
            help="Above 1 avoids said words.",
        )
        left, right = st.columns(2, vertical_alignment="bottom")
        right.toggle(
            "At a pace to read along",
            value=True,
            key="read_along",
            help="Off, the words appear as fast as the storyteller writes them.",
        )
        left.number_input(
            "Seed",
            0,
            2**53 - 1,  # what JavaScript can count to
            None,
            key="seed",
            placeholder="a new one each time",
            help="The same seed tells the same story again.",
        )
