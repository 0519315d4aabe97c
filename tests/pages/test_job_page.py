"""A job's page without a browser and without a worker: what it says of a job, what can be done with it."""

from __future__ import annotations

import json
import shutil

import pytest

from model.config import BUNDLED_WEIGHTS
from model.jobs.record import JobState
from model.own_models import add_model, own_models, rename_model
from tests.pages.looking import NASTY, facts, labels, press, shown
from tests.paper import ROWS


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
