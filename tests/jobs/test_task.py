"""What a worker does with a real, tiny model: it learns, hands over a storyteller that tells, and says how it went."""

import dataclasses
import json
import os
import random
import signal
import time

import pytest
import torch

from model.checkpoint import load_decoder, load_tokenizer, read_config, save_model
from model.config import FineTuneSettings, SamplingParams, TrainingLimits
from model.errors import InputError, TaleloomError
from model.find import find_model
from model.jobs import task
from model.jobs.launcher import LocalLauncher
from model.jobs.manager import JobManager
from model.jobs.record import JobState, read_lines
from model.jobs.task import fine_tune, free_name, memorised, model_card, tell_all
from model.own_models import add_model, delete_model, own_model, own_models, rename_model
from model.storyteller import Storyteller
from model.training.data import is_held_out
from tests.paper import Jobs

SETTINGS = FineTuneSettings(
    epochs=50, max_steps=6, rows_per_step=2, evaluations=2, learning_rate=0.02, replay_share=0.5, patience=0
)
NASTY = "<b> **x** | [a](b) #1"


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch, stories):
    """Few originals and few samples; torch's threads as they were."""
    held_out = [text for text in stories[20:] if is_held_out(text)]
    others = [text for text in stories[20:] if not is_held_out(text)]
    originals = tmp_path / "originals.jsonl"
    lines = [json.dumps({"text": text, "prompt": "a fox"}) + "\n" for text in [*held_out[:2], *others[:12]]]
    originals.write_text("".join(lines))
    monkeypatch.setattr(task, "ORIGINALS", originals)
    monkeypatch.setattr(task, "N_MEMORY_SAMPLES", 6)
    monkeypatch.setattr(task, "SAMPLE_TOKENS", 24)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def rows(stories):
    return [
        {"text": text, "prompt": "a fox" if i % 2 else None, "split": "train" if i < 12 else "test"}
        for i, text in enumerate(stories[:16])
    ]


@pytest.fixture
def add(paper, rows, tiny_model):
    """Adds a job that learns with the tiny model."""

    def add_job(name="pirates", settings=SETTINGS, base=tiny_model, **more):
        ideas = more.pop("test_ideas", ("a shy fox",))
        return paper.manager.create(name, rows, settings, base=str(base), test_ideas=ideas, **more)

    return add_job


def do(job, should_stop=lambda: None):
    reports = []
    return fine_tune(job.folder, reports.append, should_stop), reports


def result_of(job):
    return json.loads((job.folder / "result.json").read_text())


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_job_ends_in_a_storyteller_that_tells(add, method):
    job = add(settings=dataclasses.replace(SETTINGS, method=method), source="a.txt", note="Ahoy")
    outcome, reports = do(job)
    assert outcome == "done" and [r["step"] for r in reports if "loss" in r] == [1, 2, 3, 4, 5, 6]
    result = result_of(job)
    evaluations = [r for r in reports if r.get("evaluation")]
    best = min(evaluations, key=lambda r: r["own_bits_per_byte"])
    assert (result["name"], result["steps"], result["best_step"]) == ("pirates", 6, best["step"])
    for kind in ("own", "own_train", "original"):
        scores = result[f"{kind}_bits_per_byte"]
        assert scores == {"before": evaluations[0][f"{kind}_bits_per_byte"], "after": best[f"{kind}_bits_per_byte"]}
    assert result["own_bits_per_byte"]["after"] < result["own_bits_per_byte"]["before"] - 0.3
    assert result["stopped_because"] and result["seconds"] > 0
    assert set(result["memorised"]) == {"stories", "longest_run_words", "median_run_words", "copied_8grams"}
    samples = read_lines(job.folder / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [0, 3, 6]
    assert all(story["idea"] == "a shy fox" and story["seed"] == 1 for s in samples for story in s["stories"])

    made = own_model("pirates")
    assert (made.job, made.base, made.note) == (job.id, job.base, "Ahoy")
    assert made.has_adapter == (method == "lora") and find_model("pirates") == made.folder
    assert (made.folder / "model.safetensors").read_bytes() == (job.folder / "best/model.safetensors").read_bytes()
    with Storyteller.load("pirates", "cpu", folders=False) as storyteller:
        params = SamplingParams(max_tokens=24, seed=1)
        told = storyteller.tell("a shy fox", params, "idea")
        assert told.wait(30)
    best_sample = next(sample for sample in samples if sample["step"] == result["best_step"])
    assert told.text.strip() == best_sample["stories"][0]["text"], "as it was told in the flip-book"


def test_a_job_without_held_out_stories_or_ideas(add, paper, rows):
    paper.manager.create("owls", [row for row in rows if row["split"] == "train"], SETTINGS, base=add().base)
    job = paper.manager.list()[-1]
    do(job)
    result = result_of(job)
    assert "own_bits_per_byte" not in result and result["best_step"] == 6, "the latest is the best"
    assert [s["idea"] for s in read_lines(job.folder / "samples.jsonl")[0]["stories"]] == list(task.TEST_IDEAS)
    assert "held-out own stories |" not in own_model("owls").card


def test_the_card_tells_what_was_done_and_shows_texts_as_they_are(add, tiny_model):
    job = add(source=NASTY, note=NASTY, test_ideas=(NASTY,))
    do(job)
    card = own_model("pirates").card
    front, text = card.split("---\n")[1:3] if card.startswith("---\n") else pytest.fail("no front matter")
    assert f'base_model: "{tiny_model.name}"' in front and "license" not in front
    assert str(tiny_model) not in card, "no path of this computer"
    assert "12 to learn from, 4 held out" in text and "| 6, the best after" in text
    assert "learning_rate 0.02" in text and "epochs 50" in text and "| 0 | " in text and "| 3 | " in text
    assert "\\<b\\> \\*\\*x\\*\\* \\| \\[a\\]\\(b\\) \\#1" in text and NASTY not in card
    assert "word for word" in text and "## Stories" in text


def test_what_came_from_the_bundled_storyteller_carries_its_terms(add, tiny_model, rows):
    job = dataclasses.replace(add(), base=None)
    result = {"steps": 6, "best_step": 6, "seconds": 60, "stopped_because": "Enough."}
    result["memorised"] = {"stories": 50, "longest_run_words": 3, "median_run_words": 1}
    evaluations = [{"step": 0, "original_bits_per_byte": 0.8}]
    card = model_card(job, result, evaluations, [], rows)
    assert "license: other" in card and "Built with Llama" in card and '"Llama-Taleloom-11M"' in card
    for size in ("11M", "8M"):  # the second is of a storyteller that was bundled earlier
        name = f"owls-{size}"
        add_model(name, tiny_model, {}, card.replace("Llama-Taleloom-11M", f"Llama-Taleloom-{size}"))
        child = model_card(dataclasses.replace(job, base=name), result, evaluations, [], rows)
        assert "license: other" in child and f'base_model: "{name}"' in child
        assert child.count("Built with Llama") == 1 and f"made from Llama-Taleloom-{size}, whose" in child
        assert child.endswith("at the beginning of its name.\n")


def test_paused_and_resumed_it_is_one_run(add, monkeypatch):
    """Paused after the best so far is another than the base: what was the base still says what to keep."""
    settings = dataclasses.replace(SETTINGS, evaluations=6)
    whole, cut = add("whole", settings), add("cut", settings)
    do(whole)
    asked = iter(range(100))
    assert do(cut, lambda: "pause" if next(asked) == 2 else None)[0] == "paused"
    best = (cut.folder / "best" / "model.safetensors").read_bytes()
    assert best != (cut.folder / "base" / "model.safetensors").read_bytes()
    assert not (cut.folder / "result.json").exists() and [m.name for m in own_models()] == ["whole"]
    clock = json.loads((cut.folder / "clock.json").read_text())["seconds"]
    (cut.folder / "clock.json").write_text(json.dumps({"seconds": 1000 + clock}))
    assert do(cut)[0] == "done"
    assert 1000 < result_of(cut)["seconds"] < 1200, "time before the pause counts"
    same = ("own_bits_per_byte", "original_bits_per_byte", "best_step", "memorised")
    assert {k: result_of(cut)[k] for k in same} == {k: result_of(whole)[k] for k in same}
    losses = [[m["loss"] for m in read_lines(job.folder / "metrics.jsonl") if "loss" in m] for job in (whole, cut)]
    assert losses[0] == losses[1]
    assert read_lines(cut.folder / "samples.jsonl") == read_lines(whole.folder / "samples.jsonl")
    assert not (cut.folder / "base").exists(), "done with"


def test_cancelled_it_leaves_no_storyteller(add):
    assert do(add(), lambda: "cancel")[0] == "cancelled" and own_models() == []


@pytest.mark.parametrize("renamed", [False, True])
def test_killed_between_handing_over_and_the_result(add, monkeypatch, renamed):
    """The storyteller is there, the result is not: the next attempt writes it, and makes no second storyteller."""
    job = add()
    write = task.write_atomically

    def killed(path, content):
        if path.name == "result.json":
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(task, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        do(job)
    monkeypatch.setattr(task, "write_atomically", write)
    if renamed:
        rename_model("pirates", "sailors")
    assert do(job)[0] == "done"
    [made] = own_models()
    assert result_of(job)["name"] == made.name == ("sailors" if renamed else "pirates")


def test_done_already_it_is_not_handed_over_again(add):
    job = add()
    do(job)
    delete_model("pirates")
    assert do(job)[0] == "done" and own_models() == []


def test_a_name_that_was_taken_meanwhile_gets_a_number(add, tiny_model):
    job = add()
    add_model("pirates", tiny_model, {}, "# other")
    do(job)
    assert result_of(job)["name"] == "pirates-2" and own_model("pirates").card == "# other"
    assert "# pirates-2\n" in own_model("pirates-2").card
    assert free_name("pirates") == "pirates-3"
    long = "x" * 60
    add_model(long, tiny_model, {}, "")
    assert free_name(long) == "x" * 58 + "-2", "not longer than a name may be"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda job: (job.folder / "data.jsonl").write_text("{half"), "stories of this job cannot be read"),
        (lambda job: (job.folder / "job.json").write_text("{half"), "job.json"),
    ],
)
def test_damaged_folders_are_said(add, spoil, words):
    job = add()
    spoil(job)
    with pytest.raises(InputError, match=words):
        do(job)


def test_a_base_that_is_gone_is_said(add, tmp_path):
    with pytest.raises(TaleloomError, match="There is no model"):
        do(add(base=tmp_path / "gone"))


def test_a_storyteller_that_cannot_be_tried_out_is_said(add, monkeypatch):
    """An engine that failed gave empty stories, and nobody was told."""
    from model.engine.cpu_backend import CpuBackend

    monkeypatch.setattr(CpuBackend, "step", lambda *_: (_ for _ in ()).throw(RuntimeError("no ink")))
    with pytest.raises(TaleloomError, match=r"tried out.*no ink"):
        do(add())


def test_what_is_learned_by_heart_is_found(tiny_config, tokenizer, tmp_path, monkeypatch):
    """A model that was trained until it recites its one story, and the same one before that."""
    from model.decoder import Decoder
    from model.training.finetune import FineTune

    monkeypatch.setattr(task, "SAMPLE_TOKENS", 60)
    story = "Tom hid a silver key under the bridge. Ben shared the warm bread with the old owl."
    rows = [{"text": story, "prompt": "Tom", "split": "train"}]
    torch.manual_seed(0)
    save_model(tmp_path / "base", Decoder(tiny_config), tokenizer)
    settings = FineTuneSettings(
        epochs=1000, max_steps=150, rows_per_step=2, rows_per_pass=2, evaluations=1, learning_rate=0.03, replay_share=0,
        dropout=0, weight_decay=0, patience=0,
    )  # fmt: skip
    before = memorised(load_decoder(tmp_path / "base"), tokenizer, rows)
    assert before["longest_run_words"] == 0 and before["copied_8grams"] == 0
    assert FineTune(tmp_path / "run", tmp_path / "base", rows, settings).run() == "done"
    decoder = load_decoder(tmp_path / "run" / "best")
    found = memorised(decoder, tokenizer, rows)
    assert found == {"stories": 6, "longest_run_words": 17, "median_run_words": 17, "copied_8grams": 1}
    other = memorised(decoder, tokenizer, [{"text": "Another story altogether.", "prompt": "Tom", "split": "train"}])
    assert other["longest_run_words"] == 0


def test_words_of_the_prompt_are_not_counted_as_learned_by_heart(tiny_decoder, tokenizer):
    """A prompt too long for an idea is continued as an opening; taken from the training text it stands there."""
    text = "Tom hid a silver key under the bridge and Ben shared the warm bread with the old owl."
    found = memorised(tiny_decoder, tokenizer, [{"text": text, "prompt": text[:-5], "split": "train"}])
    assert found["longest_run_words"] == 0


@pytest.mark.soak
def test_a_real_worker_killed_twenty_times_learns_as_an_undisturbed_one(home, rows, tiny_model):
    """At random moments: while it starts, learns, evaluates, writes, hands over."""
    jobs = Jobs(JobManager(launcher=LocalLauncher(), limits=TrainingLimits()))
    settings = dataclasses.replace(SETTINGS, epochs=1000, max_steps=1500, evaluations=50, dropout=0.2)
    whole, cut = (jobs.manager.create(name, rows, settings, base=str(tiny_model)) for name in ("whole", "cut"))
    jobs.until(whole, JobState.DONE, timeout_s=600)
    rng = random.Random(1)
    for n_kills in range(20):
        process = jobs.until_step(cut, 0)
        time.sleep(rng.uniform(0, 6))
        assert jobs.state(cut) is JobState.RUNNING, f"done after {n_kills} kills: make it longer"
        os.kill(process.pid, signal.SIGKILL)
        jobs.until(cut, JobState.LOST, JobState.FAILED)  # the latter: killed before its first word
        jobs.manager.resume(cut.id)
    jobs.until(cut, JobState.DONE, timeout_s=600)
    timed = ("tokens_per_second", "eta_s", "memory_mb")
    curves = [
        [
            {name: value for name, value in record.items() if name not in timed}
            for record in jobs.manager.metrics(job.id)
        ]
        for job in (whole, cut)
    ]
    assert curves[0] == curves[1] and curves[0][-1]["step"] == 1500
    assert jobs.manager.samples(cut.id) == jobs.manager.samples(whole.id)
    assert {model.name for model in own_models()} == {"whole", "cut"}
    weights = [(own_model(name).folder / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    assert result_of(cut)["memorised"] == result_of(whole)["memorised"]


def test_stories_are_told_as_readers_get_them(tiny_model):
    """More prompts than there are places; each as the storyteller tells it from the folder."""
    tokenizer = load_tokenizer(tiny_model, read_config(tiny_model))
    prompts = [f"a fox and {i} owls" for i in range(19)]
    texts = tell_all(load_decoder(tiny_model), tokenizer, prompts, range(19))
    with Storyteller.load(str(tiny_model), "cpu") as storyteller:
        for i in (0, 18):
            told = storyteller.tell(prompts[i], SamplingParams(max_tokens=task.SAMPLE_TOKENS, seed=i), "idea")
            told.wait(30)
            assert texts[i] == told.text.strip()
