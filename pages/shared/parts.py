"""What several pages need: the one job manager, whose visitor it is and what is theirs, text shown as it is."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from typing import Any, Literal

import streamlit as st

from model.errors import TaleloomError
from model.jobs.admission import visitor_key
from model.jobs.manager import JobManager
from model.jobs.record import JobState
from model.own_models import OwnModel, own_models

BADGES: dict[JobState, Literal["gray", "blue", "orange", "green", "red"]] = {
    JobState.QUEUED: "gray",
    JobState.RUNNING: "blue",
    JobState.PAUSED: "orange",
    JobState.DONE: "green",
    JobState.FAILED: "red",
    JobState.CANCELLED: "gray",
    JobState.LOST: "red",
}
XSRF_COOKIE = re.compile(r"2\|([0-9a-f]{8})\|((?:[0-9a-f]{2})+)\|\d+")


def literally(text: str) -> str:
    """Markdown that shows a text as it is: a message may quote what somebody typed."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)


def guarded(action: Callable[[], Any]) -> None:
    """Do it; what a person should know about it goes to the page (`show_complaint`)."""
    try:
        action()
    except TaleloomError as error:
        st.session_state.complaint = str(error)
    except OSError as error:
        st.session_state.complaint = f"A file could not be written or read: {error.strerror or error}. Try again."


def show_complaint() -> None:
    if "complaint" in st.session_state:
        st.error(literally(st.session_state.pop("complaint")))


def show_polled(show: Callable[..., None], every_s: float | None, *args: Any) -> None:
    """Draw a part of the page, and that part alone every so many seconds; None: just once.

    It gets a container of its own. When such a redrawing follows a run of the whole page at once, Streamlit drops what
    that run had sent of the part, the browser removes it as stale, what stands below it moves up one place, and the
    part then overwrites the first of that.
    """
    with st.container():
        st.fragment(show, run_every=every_s)(*args)


def visitor() -> str:
    """A key that stays the same over reloads and tabs: the token behind Streamlit's XSRF cookie, else the session."""
    # The server masks the token anew for every response (2|mask|masked token|time): unmask it or it never repeats.
    match = XSRF_COOKIE.fullmatch(str(st.context.cookies.get("_streamlit_xsrf", "")))
    if match:
        mask, token = (bytes.fromhex(part) for part in match.groups())
        return bytes(byte ^ mask[i % 4] for i, byte in enumerate(token)).hex()
    return str(st.session_state.setdefault("visitor", uuid.uuid4().hex))


def signed_in() -> str:
    """Who is signed in, where the site has sign-in; empty when nobody is."""
    return str(st.user.get("sub") or st.user.get("email") or "") if st.user.get("is_logged_in") else ""


def asker() -> str:
    """Whose the jobs are that are started from here, see JobManager.create."""
    return signed_in() if manager().limits.sign_in else visitor()


def is_mine(key: str) -> bool:
    """Whether this visitor may look at and change what belongs to `key` (Job.visitor): on one's own machine all of it.

    On a public site strangers would else read each other's stories, and delete each other's storytellers.
    """
    return is_ones_own_machine() or (bool(key) and key == visitor_key(asker()))


def is_ones_own_machine() -> bool:
    """Whether whoever visits may do what the machine's owner may; else this is a public site."""
    limits = manager().limits
    return limits.mode == "open" and not limits.sign_in


def visible_models() -> list[OwnModel]:
    """The own storytellers that this visitor may tell with and take home: their own, and those of the site itself.

    A storyteller may recite what it learned, so those of strangers are nobody else's.
    """
    return [model for model in own_models() if not model.visitor or is_mine(model.visitor)]


@st.cache_resource
def manager() -> JobManager:
    """One for all visitors; its thread starts what waits in the queue."""
    jobs = JobManager()
    jobs.keep_tending()
    return jobs
