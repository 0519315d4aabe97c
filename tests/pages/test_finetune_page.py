"""Teaching a storyteller without a browser and without a worker: what goes in, how it is to be learned, who may."""

from __future__ import annotations

import re
from unittest.mock import patch

import pytest
from streamlit.user_info import UserInfoProxy

from model.config import BUNDLED_WEIGHTS, FINE_TUNE_PRESETS
from model.intake import read_upload
from model.jobs.record import JobState
from model.own_models import add_model
from tests.pages.looking import NASTY, facts, labels, press, shown

STORIES = [
    f"On day {i} we sailed to the island and found a parrot. It said hello, and we all went home." for i in range(12)
]


def place(app, place):
    app.button_group(key="place").set_value(place).run()
    assert not app.exception


def upload(app, name, content):
    place(app, "A file")
    content = content if isinstance(content, bytes) else content.encode()
    app.file_uploader(key="file").set_value((name, content, "application/octet-stream")).run()
    assert not app.exception


# Bringing stories.


def test_the_sample_is_ready_to_be_learned(visit, jobs):
    app = visit("finetune")
    assert "34 stories to learn from, 10 held out" in facts(app) and "tokens" in facts(app)
    assert any(re.search(r"\d+ steps: about .* at most on this machine, [\d,]+ MB", each.value) for each in app.caption)
    app.text_input(key="new_name").set_value("pirates")
    press(app, "Start learning")
    [job] = jobs.manager.list()
    assert (job.name, job.source, job.state, job.base) == ("pirates", "Pirate log", JobState.QUEUED, None)
    assert job.settings.max_steps == 200 and len(job.test_ideas) == 3 and job.visitor
    assert len(jobs.manager.stories(job.id)) == 44
    assert app.query_params["job"] == job.id
    assert {"Pause", "Cancel", "Delete it"} <= labels(app), "it goes to the job's page"
    assert not jobs.launcher.started


def test_what_was_typed_last_counts(visit, jobs):
    """A callback would have got what the page showed before: the job was called storyteller-1."""
    app = visit("finetune")
    app.text_input(key="new_name").set_value("owls")
    app.text_area(key="ideas").set_value("a shy owl\n\n  a cat  ")
    app.number_input(key="quick_max_steps").set_value(3)
    press(app, "Start learning")
    [job] = jobs.manager.list()
    assert (job.name, job.test_ideas, job.settings.max_steps) == ("owls", ("a shy owl", "a cat"), 3)


def test_pasted_stories_are_split_and_shown_as_they_are(visit, jobs):
    app = visit("finetune")
    place(app, "Paste")
    assert "Start learning" not in labels(app)
    app.text_area(key="pasted").set_value("\n---\n".join([NASTY, *STORIES[:7]])).run()
    assert "7 stories to learn from, 1 held out" in facts(app)
    assert NASTY.replace("*", "") in [text.value for text in app.text], "plain text, no markdown"
    press(app, "Start learning")
    assert jobs.manager.list()[0].name == "storyteller-1"


def test_a_table_asks_for_its_columns(visit, jobs):
    app = visit("finetune")
    table = "text,tale,about\n" + "".join(f'x{i},"{story}",idea {i}\n' for i, story in enumerate(STORIES))
    upload(app, "tales.csv", table)
    chosen = {box.label: box for box in app.selectbox}
    assert chosen["Column with the stories"].options == ["text", "tale", "about"]
    chosen["Column with the stories"].set_value("tale").run()
    {box.label: box for box in app.selectbox}["Column with their ideas"].set_value("about").run()
    assert not app.error and "Idea: idea 0" in shown(app)
    press(app, "Start learning")
    [job] = jobs.manager.list()
    assert job.source == "tales.csv"
    assert {row["text"]: row["prompt"] for row in jobs.manager.stories(job.id)}[STORIES[0]] == "idea 0"


def test_ideas_can_be_left_out_and_a_column_without_stories_can_be_left_again(visit):
    app = visit("finetune")
    upload(app, "a.csv", "text,prompt,n\n" + "".join(f'"{story}",idea {i},7\n' for i, story in enumerate(STORIES)))
    assert "Idea: idea 0" in shown(app)
    {box.label: box for box in app.selectbox}["Column with their ideas"].set_value("").run()
    assert "Idea:" not in shown(app), "'none' is none, not a guess"
    {box.label: box for box in app.selectbox}["Column with the stories"].set_value("n").run()
    {box.label: box for box in app.selectbox}["Column with the stories"].set_value("text").run()
    assert not app.error and "to learn from" in facts(app)
    # Another table has other columns.
    app.file_uploader(key="file").set_value(("b.csv", b"story,x\n" + "\n".join(STORIES).encode(), "text/csv")).run()
    assert not app.exception


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "empty"),
        ("photo.txt", bytes(range(256)) * 40, "no text"),
        ("weights.txt", b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00.", ""),
        ("odd.jsonl", b'{"text": "a story"}\n{"tex', "line"),
    ],
)
def test_a_bad_file_is_answered_with_a_sentence(visit, jobs, name, content, words):
    app = visit("finetune")
    upload(app, name, content)
    assert words in app.error[0].value.replace("\\", "")
    assert "Start learning" not in labels(app) and "to learn from" not in facts(app)
    place(app, "Sample: a captain's log")
    assert not app.error and "Start learning" in labels(app)
    assert not jobs.manager.list()


def test_a_name_in_markup_is_shown_literally(visit):
    app = visit("finetune")
    upload(app, "__under__ $x$.txt", b"")
    assert not re.search(r"(?<!\\)[_$*]", app.error[0].value) and "under" in app.error[0].value


def test_a_data_set_is_fetched_when_asked_and_again_after_a_failure(visit):
    from model.errors import InputError
    from model.intake import read_sample

    app = visit("finetune")
    place(app, "Hugging Face Hub")
    outcomes = [InputError("The Hub does not *answer*."), InputError("Not yet."), read_sample()]

    def fetch(repo, split, text, prompt, limits, for_stranger):
        assert (repo, split, for_stranger) == ("someone/tales", "train", False)
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    with patch("model.intake.read_dataset", fetch):
        app.text_input(key="repo").set_value(" someone/tales ")
        press(app, "Fetch")
        assert app.error[0].value == r"The Hub does not \*answer\*\."
        app.run()
        assert len(outcomes) == 2, "a rerun asks nobody"
        press(app, "Fetch")
        press(app, "Fetch")
    assert not app.error and "34 stories" in facts(app)


def test_a_file_is_read_once(visit):
    """With the columns that were found by their names it was read a second time."""
    app = visit("finetune")
    with patch("model.intake.read_upload", side_effect=read_upload) as read:
        upload(app, "a.csv", "text,prompt\n" + "".join(f'"{story}",idea {i}\n' for i, story in enumerate(STORIES)))
        app.run()
        app.button_group(key="preset").set_value("good").run()
        assert read.call_count == 1 and "Idea: idea 0" in shown(app)


# How to learn.


def test_the_drawer_begins_with_the_preset_and_goes_into_the_job(visit, jobs):
    app = visit("finetune")
    assert app.number_input(key="quick_epochs").value == FINE_TUNE_PRESETS["quick"].epochs
    app.button_group(key="preset").set_value("good").run()
    assert app.number_input(key="good_epochs").value == 20
    app.number_input(key="good_learning_rate").set_value(0.003)
    app.number_input(key="good_frozen_layers").set_value(2)
    app.selectbox(key="good_schedule").set_value("cosine").run()
    press(app, "Start learning")
    settings = jobs.manager.list()[0].settings
    assert (settings.learning_rate, settings.frozen_layers, settings.schedule) == (0.003, 2, "cosine")
    assert (settings.epochs, settings.max_steps, settings.method) == (20, 1500, "full")


def test_lora_has_its_own_fields(visit, jobs):
    app = visit("finetune")
    assert "LoRA rank" not in [field.label for field in app.number_input]
    app.selectbox(key="quick_method").set_value("lora").run()
    app.number_input(key="quick_lora_rank").set_value(4)
    app.multiselect(key="quick_lora_targets").set_value([]).run()
    assert "lora_targets" in app.error[0].value.replace("\\", "") and "Start learning" not in labels(app)
    app.multiselect(key="quick_lora_targets").set_value(["q_proj", "v_proj"]).run()
    press(app, "Start learning")
    settings = jobs.manager.list()[0].settings
    assert (settings.method, settings.lora_rank, settings.lora_targets) == ("lora", 4, ("q_proj", "v_proj"))


def test_ones_own_storyteller_can_be_the_start(visit, jobs):
    add_model("owls", BUNDLED_WEIGHTS, {"created": 1.0}, "# owls")
    app = visit("finetune")
    app.selectbox(key="base").set_value("owls").run()
    assert "to learn from" in facts(app)
    press(app, "Start learning")
    assert jobs.manager.list()[0].base == "owls"


@pytest.mark.parametrize(
    ("name", "ideas", "words"),
    [("no spaces", "a", "cannot be"), ("taken", "a", "already"), ("new", "a\nb\nc\nd\ne", "5 test ideas")],
)
def test_what_cannot_be_started_is_said(visit, jobs, name, ideas, words):
    jobs.add("taken")
    app = visit("finetune")
    app.text_input(key="new_name").set_value(name)
    app.text_area(key="ideas").set_value(ideas)
    press(app, "Start learning")
    assert words in app.error[0].value and len(jobs.manager.list()) == 1


# On a public site.


def test_training_off(visit, monkeypatch, jobs):
    jobs.add("mine")
    monkeypatch.setenv("TALELOOM_TRAINING", "off")
    app = visit("finetune")
    assert "switched off" in app.info[0].value and not app.button and not app.get("page_link")


def test_limits_are_kept_and_said(visit, monkeypatch, jobs):
    monkeypatch.setenv("TALELOOM_TRAINING", "limited")
    monkeypatch.setenv("TALELOOM_MAX_JOB_STEPS", "50")
    monkeypatch.setenv("TALELOOM_MAX_JOBS_PER_VISITOR", "1")
    app = visit("finetune")
    assert app.number_input(key="quick_max_steps").value == 50
    press(app, "Start learning")
    [job] = jobs.manager.list()
    assert job.settings.max_steps == 50 and "Pause" in labels(app)
    app.switch_page("pages/train/finetune.py").run()
    press(app, "Start learning")
    assert "You have started 1 jobs" in app.error[0].value.replace("\\", "") and len(jobs.manager.list()) == 1


def test_strangers_see_and_touch_nothing_of_each_other(visit, monkeypatch, jobs):
    monkeypatch.setenv("TALELOOM_TRAINING", "limited")
    mine = visit("finetune")
    mine.text_input(key="new_name").set_value("secret")
    press(mine, "Start learning")
    [job] = jobs.manager.list()
    assert "secret" in shown(mine)
    stranger = visit("finetune")
    assert "secret" not in shown(stranger) and not stranger.get("page_link")
    stranger = visit("job", job=job.id)
    assert "There is no job" in shown(stranger) and not stranger.button
    assert "secret" not in shown(stranger)


def test_sign_in_can_be_asked_for(visit, monkeypatch, jobs):
    monkeypatch.setenv("TALELOOM_TRAINING_SIGN_IN", "1")
    app = visit("finetune")
    assert "Sign in" in labels(app) and "Start learning" not in labels(app)
    who = {"is_logged_in": True, "sub": "mia"}
    with patch.object(UserInfoProxy, "get", lambda self, name, default=None: who.get(name, default)):
        app = visit("finetune")
        press(app, "Start learning")
        [job] = jobs.manager.list()
        assert "Pause" in labels(app)
        who["sub"] = "tom"
        assert "There is no job" in shown(visit("job", job=job.id))
