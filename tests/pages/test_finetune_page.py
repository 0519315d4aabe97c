"""Teaching a storyteller without a browser and without a worker: what goes in, and what the pages say of a job."""

from __future__ import annotations

import json
import re
import shutil
from unittest.mock import patch

import pytest
from streamlit.user_info import UserInfoProxy

from model.config import BUNDLED_WEIGHTS
from model.jobs.record import JobState
from model.own_models import add_model, own_models, rename_model
from tests.paper import ROWS

STORIES = [
    f"On day {i} we sailed to the island and found a parrot. It said hello, and we all went home." for i in range(12)
]
NASTY = "<b>bold</b> **stars** $x^2$ [a](http://b)"


def press(app, label):
    next(button for button in app.button if button.label == label).click().run()
    assert not app.exception


def labels(app):
    return {button.label for button in app.button}


def shown(app):
    """All that can be read on the page, markup included."""
    kinds = (app.html, app.caption, app.text, app.markdown, app.error, app.warning, app.info, app.code, app.subheader)
    values = [getattr(element, "value", None) or getattr(element, "body", "") for kind in kinds for element in kind]
    texts = [progress.proto.text for progress in app.get("progress")]
    return "\n".join([*map(str, values), *texts]).replace("\\", "")


def facts(app):
    found = [element.body for element in app.html if "tl-facts" in element.body and "<style>" not in element.body]
    return re.sub(r"<[^>]+>", " ", " ".join(found))


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

    def fetch(repo, split, text, prompt, limits):
        assert (repo, split) == ("someone/tales", "train")
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


# How to learn.


def test_the_drawer_begins_with_the_preset_and_goes_into_the_job(visit, jobs):
    app = visit("finetune")
    assert app.number_input(key="quick_epochs").value == 8
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


# A job's page.


def run(jobs, name="pirates", **more):
    job = jobs.add(name, **more)
    jobs.manager.tend()
    return jobs.manager.get(job.id)


def record(job, *metrics, samples=()):
    for name, lines in (("metrics", metrics), ("samples", samples)):
        with (job.folder / f"{name}.jsonl").open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


def step(n, of=20):
    figures = {"tokens_per_second": 3456.7, "eta_s": 100.0, "memory_mb": 512.0}
    return {"step": n, "steps": of, "loss": 2.5, "lr": 0.002, "epoch": 0.1, **figures}


def evaluation(n, own, of=20):
    scores = {"own_bits_per_byte": own, "own_train_bits_per_byte": own, "original_bits_per_byte": 0.8}
    return {"step": n, "steps": of, "evaluation": True, "best": True, **scores}


def sample(n, text):
    return {"step": n, "stories": [{"idea": "a shy fox", "seed": 1, "text": text}]}


def finish(jobs, job):
    jobs.say(job, "done", step=20)
    scores = {"before": 1.5, "after": 1.25}
    result = {
        "name": job.name,
        "steps": 20,
        "best_step": 12,
        "own_bits_per_byte": scores,
        "original_bits_per_byte": scores,
        "memorised": {"stories": 50, "longest_run_words": 9, "median_run_words": 4},
        "stopped_because": "It read everything as often as asked.",
        "seconds": 60,
    }
    (job.folder / "result.json").write_text(json.dumps(result))
    add_model(job.name, BUNDLED_WEIGHTS, {"job": job.id, "created": 1.0}, "# card")


def queued(jobs):
    return jobs.add()


def running(jobs):
    job = run(jobs)
    jobs.say(job, "running")
    return job


def paused(jobs):
    job = run(jobs)
    jobs.say(job, "paused")
    return job


def done(jobs):
    job = run(jobs)
    finish(jobs, job)
    return job


def failed(jobs):
    job = run(jobs)
    jobs.say(job, "failed", message="The disk is *full*.")
    return job


def cancelled(jobs):
    job = jobs.add()
    jobs.manager.cancel(job.id)
    return job


def lost(jobs):
    job = run(jobs)
    jobs.launcher.living.discard(jobs.say(job, "running"))
    return job


def damaged(jobs):
    job = jobs.add()
    (job.folder / "job.json").write_text("{half")
    return job


@pytest.mark.parametrize(
    ("make", "words", "buttons"),
    [
        (queued, "waits for its turn", {"Pause", "Cancel", "Delete it"}),
        (running, "A sentence.", {"Pause", "Cancel"}),
        (paused, "A sentence.", {"Resume", "Cancel", "Delete it"}),
        (done, "What came of it", {"Delete it", "Write with pirates"}),
        (failed, "The disk is *full*.", {"Resume", "Try again", "Delete it"}),
        (cancelled, "It was cancelled.", {"Try again", "Delete it"}),
        (lost, "resume it", {"Resume", "Cancel", "Try again", "Delete it"}),
        (damaged, "cannot be read", {"Delete it"}),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_job_says_what_it_is_and_offers_what_can_be_done(visit, jobs, make, words, buttons):
    job = make(jobs)
    app = visit("job", job=job.id)
    assert words in shown(app) and make.__name__.replace("damaged", "failed") in shown(app)
    assert labels(app) - {"Start it"} == buttons
    listed = visit("finetune")
    assert [
        link.proto.label
        for link in listed.get("page_link")
        if link.proto.label in (job.name, job.id.replace("-", "\\-"))
    ]


def test_pause_resume_cancel_try_again_delete(visit, jobs):
    job = running(jobs)
    app = visit("job", job=job.id)
    press(app, "Pause")
    assert "pauses after this step" in shown(app) and {"Resume", "Cancel"} <= labels(app)
    jobs.say(job, "paused")
    app.run()
    press(app, "Resume")
    assert jobs.state(job) is JobState.QUEUED and "Pause" in labels(app)
    press(app, "Cancel")
    assert jobs.state(job) is JobState.CANCELLED
    press(app, "Try again")
    again = next(each for each in jobs.manager.list() if each.retry_of == job.id)
    assert "Pause" in labels(app) and again.id in app.query_params["job"]
    press(app, "Delete it")
    assert [each.id for each in jobs.manager.list()] == [job.id]
    assert "Start learning" in labels(app), "it goes to the list"


def test_what_was_just_done_elsewhere_is_a_sentence(visit, jobs):
    job = jobs.add()
    app = visit("job", job=job.id)
    jobs.manager.cancel(job.id)
    press(app, "Pause")
    assert "cannot be paused" in app.error[0].value and "Pause" not in labels(app)
    jobs.manager.delete(job.id)
    app.run()
    assert "There is no job" in shown(app) and not app.exception


@pytest.mark.parametrize("id", ["nothing", "..", "../jobs", ".lock", NASTY])
def test_an_unknown_job_is_a_sentence(visit, id):
    app = visit("job", job=id)
    assert "There is no job" in shown(app) and "**stars**" not in app.error[0].value


def test_without_a_job_the_list_is_shown(visit):
    assert "Start learning" in labels(visit("job"))


def test_a_note_is_kept(visit, jobs):
    job = jobs.add()
    app = visit("job", job=job.id)
    app.text_input(key=f"note_{job.id}").set_value(f"  {NASTY} ").run()
    assert jobs.manager.get(job.id).note == NASTY
    jobs.manager.note(job.id, "from elsewhere")
    app.run()
    assert jobs.manager.get(job.id).note == "from elsewhere", "looking changes nothing"


def test_its_figures_and_curves(visit, jobs):
    job = running(jobs)
    assert "told here soon" in shown(visit("job", job=job.id))
    record(job, evaluation(0, 1.6), step(1), step(2), evaluation(2, 1.4))
    (job.folder / "metrics.jsonl").open("a").write('{"step": 3, "lo')
    (job.folder / "log.txt").write_text("--- attempt 1\n**a line**\n")
    app = visit("job", job=job.id)
    assert "step 2 of 20" in facts(app) and "3,457 tokens a second" in facts(app) and "2 min left" in facts(app)
    assert len(app.get("vega_lite_chart") or app.get("arrow_vega_lite_chart")) == 2
    assert "**a line**" in app.code[0].value
    other = jobs.add("owls")
    record(other, evaluation(0, 1.6), evaluation(10, 1.2))
    assert visit("finetune").multiselect[0].value == ["owls", "pirates"], "two runs can be compared"


def test_the_flip_book_follows_the_newest_unless_it_was_moved(visit, jobs):
    job = running(jobs)
    record(job, samples=[sample(0, "Before."), sample(5, "Five.")])
    app = visit("job", job=job.id)
    slider = app.select_slider(key=f"flip_{job.id}")
    assert slider.value == 5 and "Five." in shown(app) and "Before." in shown(app)
    record(job, samples=[sample(10, "Ten.")])
    app.run()
    assert app.select_slider(key=f"flip_{job.id}").value == 10 and "Ten." in shown(app)
    app.select_slider(key=f"flip_{job.id}").set_value(5).run()
    record(job, samples=[sample(15, "Fifteen.")])
    app.run()
    assert app.select_slider(key=f"flip_{job.id}").value == 5 and "Fifteen." not in shown(app)
    app.select_slider(key=f"flip_{job.id}").set_value(15).run()
    record(job, samples=[sample(20, "Twenty.")])
    app.run()
    assert app.select_slider(key=f"flip_{job.id}").value == 20, "who moved to the newest follows again"


def test_texts_of_readers_and_models_are_never_markup(visit, jobs):
    job = jobs.add(source=NASTY, test_ideas=(NASTY,), note=NASTY)
    jobs.manager.tend()
    record(
        job, evaluation(0, 1.6), step(1), samples=[{"step": 0, "stories": [{"idea": NASTY, "seed": 1, "text": NASTY}]}]
    )
    jobs.say(job, "running", message=NASTY)
    for app in (visit("job", job=job.id), visit("finetune")):
        assert not any("<b>" in element.body for element in app.html)
        marked = [*app.caption, *app.markdown, *app.error, *app.warning]
        assert not any("**" in element.value or "<b>" in element.value for element in marked)
        assert not any("**" in bar.proto.text for bar in app.get("progress"))
    job_page = visit("job", job=job.id)
    assert "&lt;b&gt;bold" in "".join(element.body for element in job_page.html)
    assert any(NASTY in text.value for text in job_page.text)


def test_the_new_storyteller_is_one_press_away_even_when_renamed(visit, jobs):
    job = done(jobs)
    app = visit("job", job=job.id)
    assert [(metric.label.split(",")[0], metric.value, metric.delta) for metric in app.metric] == [
        ("Your held-out stories", "1.250", "-0.250"),
        ("Its old stories", "1.250", "-0.250"),
        ("Learned by heart", "9 words", ""),
    ]
    rename_model("pirates", "sailors")
    app.run()
    press(app, "Write with sailors")
    assert app.session_state["model"] == "sailors" and "Tell the story" in labels(app)
    shutil.rmtree(own_models()[0].folder)
    app = visit("job", job=job.id)
    assert "was deleted" in shown(app) and not any(label.startswith("Write with") for label in labels(app))


def test_the_same_stories_learned_otherwise(visit, jobs):
    job = jobs.add()
    app = visit("job", job=job.id)
    press(app, "Start it")
    assert "cannot be" in app.error[0].value and len(jobs.manager.list()) == 1
    app.text_input(key=f"clone_{job.id}").set_value("otherwise")
    app.number_input(key=f"clone_{job.id}_seed").set_value(7)
    press(app, "Start it")
    clone = jobs.manager.list()[-1]
    assert (clone.name, clone.settings.seed, clone.settings.max_steps, clone.clone_of) == ("otherwise", 7, 20, job.id)
    assert clone.id in app.query_params["job"] and jobs.manager.stories(clone.id) == ROWS
