"""`taleloom finetune` and `taleloom jobs`: a few real, very short runs of a tiny model, else quick stand-ins."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from model.cli import main
from model.cli_jobs import OPTIONS
from model.config import CHECKOUT, FINE_TUNE_PRESETS, FineTuneSettings, TrainingLimits
from model.intake import read_sample
from model.jobs.launcher import LocalLauncher
from model.jobs.manager import JobManager
from model.jobs.process import is_alive
from model.jobs.record import JobState
from model.own_models import own_models
from tests.paper import Jobs, PaperLauncher

STAND_IN = (sys.executable, "-m", "tests.jobs.stand_in")
VERY_SHORT = "--max-steps 4 --rows-per-step 2 --rows-per-pass 2 --evaluations 2 --patience 0 --replay-share 0.2".split()
STORY = "Mia found a red kite in the garden and gave it to the old owl."


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("TALELOOM_") or name == "SPACE_ID"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TALELOOM_HOME", str(tmp_path / "home"))
    ended = threading.Event()

    def keep_tending(manager):
        def run():
            while not ended.wait(0.05):
                manager.tend()

        threading.Thread(target=run, daemon=True).start()

    monkeypatch.setattr(JobManager, "keep_tending", keep_tending)  # the true one would go on in later tests
    yield tmp_path / "home"
    ended.set()
    for job in JobManager().list():
        if job.process and is_alive(job.process):
            os.kill(job.process.pid, signal.SIGKILL)


@pytest.fixture
def detached(monkeypatch):
    """Nothing is left to tend the queue; how often it would have been."""
    calls = []
    monkeypatch.setattr(JobManager, "detach", lambda manager: calls.append(manager.root))
    return calls


@pytest.fixture
def quick(monkeypatch, detached):
    """Workers that take no torch and no time."""
    monkeypatch.setattr("model.jobs.manager.LocalLauncher", lambda: LocalLauncher(STAND_IN))
    monkeypatch.setattr("model.cli_jobs.POLL_S", 0.02)


@pytest.fixture
def paper(monkeypatch, detached):
    """Jobs as the command line sees them, whose workers exist on paper only."""
    launcher = PaperLauncher()
    monkeypatch.setattr("model.jobs.manager.LocalLauncher", lambda: launcher)
    return Jobs(JobManager(launcher=launcher, limits=TrainingLimits()))


@pytest.fixture
def log(tmp_path):
    """A file of eight stories."""
    path = tmp_path / "log.txt"
    path.write_text("\n---\n".join(f"Day {i}. {STORY}" for i in range(8)))
    return path


def taleloom(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def facts(*arguments):
    done = taleloom(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def wait_for(condition, timeout_s=90):
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


# Real runs.


def test_finetune_waits_and_ends_with_the_result_and_a_storyteller(tiny_model, log):
    command = ("finetune", "--data", log, "--name", "pirates", "--model", tiny_model, "--idea", "a fox", *VERY_SHORT)
    done = taleloom(*command, "--lora-rank", 2, "--json")
    assert done.exit_code == 0, done.output
    ended = json.loads(done.stdout)
    assert (ended["state"], ended["name"], ended["step"], ended["source"]) == ("done", "pirates", 4, "log.txt")
    result = ended["result"]
    assert result["name"] == "pirates" and result["steps"] == 4 and result["memorised"]["stories"] > 0
    assert {"before", "after"} == set(result["own_bits_per_byte"])
    assert "7 stories to learn from, 1 held out" in done.stderr and "4 steps" in done.stderr

    told = facts("tell", "a fox", "--idea", "--seed", 1, "--max-tokens", 8, "--model", "pirates")
    assert told["tokens"] > 0
    jsonl = log.with_suffix(".jsonl")
    jsonl.write_text(json.dumps({"text": STORY}) + "\n")
    assert facts("evaluate", "--data", jsonl, "--model", "pirates")["stories"] == 1
    shown = facts("jobs", "show", "pirates")
    assert shown["settings"]["method"] == "lora" and shown["settings"]["lora_rank"] == 2
    assert [e["step"] for e in shown["evaluations"]] == [0, 2, 4] and shown["result"] == result
    assert own_models()[0].has_adapter
    again = taleloom(*command)
    assert again.exit_code == 1 and "already" in again.stderr


def test_detached_it_is_done_by_another_process(tiny_model, log, tmp_path, monkeypatch):
    """A base named from the folder where one stands is found by the worker, which runs elsewhere."""
    monkeypatch.chdir(tiny_model.parent)
    command = ("finetune", "--data", log, "--name", "owls", "--model", tiny_model.name, *VERY_SHORT, "--detach")
    job = facts(*command)
    assert job["state"] == "queued" and job["base"] == str(tiny_model)
    ended = wait_for(lambda: (now := facts("jobs", "show", job["id"]))["state"] not in ("queued", "running") and now)
    assert ended["state"] == "done", ended["message"]
    assert facts("tell", "a fox", "--idea", "--max-tokens", 4, "--model", "owls")["tokens"] == 4
    assert "--- attempt 1" in taleloom("jobs", "logs", "owls").stdout


# With stand-ins.


def test_without_json_it_says_how_it_goes(quick, tiny_model, log):
    done = taleloom("finetune", "--data", log, "--name", "pirates", "--model", tiny_model, "--max-steps", 8)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == ["Tell with it: taleloom tell 'a shy dragon' --model pirates"]


def test_the_sample_is_learned_when_no_data_is_given(quick):
    done = facts("finetune", "--name", "pirates", "--max-steps", 3)
    assert done["source"] == "Pirate log" and done["base"] is None
    assert len(JobManager().stories(done["id"])) == 44


def test_a_job_that_fails_is_said_and_ends_with_1(quick, monkeypatch):
    """With --json the object comes all the same."""
    sample = dataclasses.replace(read_sample(), name="disk full")  # what the stand-in is to fail of
    monkeypatch.setattr("model.intake.read_sample", lambda: sample)
    done = taleloom("finetune", "--name", "pirates", "--max-steps", 8, "--json")
    assert done.exit_code == 1 and "disk is full" in done.stderr
    assert json.loads(done.stdout)["state"] == "failed" and json.loads(done.stdout)["result"] is None


SCRIPT = f"""
import sys
import model.jobs.manager
from model.cli import main
from model.jobs.launcher import LocalLauncher

model.jobs.manager.LocalLauncher = lambda: LocalLauncher({STAND_IN!r})
model.jobs.manager.JobManager.detach = lambda manager: None
main()
"""


def test_interrupted_it_pauses_and_can_be_resumed(tiny_model, log):
    """Ctrl-C goes to every process of the terminal; the worker is in a session of its own and keeps its state."""
    command = [sys.executable, "-c", SCRIPT, "finetune", "--data", log, "--name", "pirates", "--model", tiny_model]
    process = subprocess.Popen(
        [*map(str, command), "--max-steps", "2000"],
        cwd=CHECKOUT,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what runs in a shell's background ignores it
    )
    manager = JobManager(launcher=LocalLauncher(STAND_IN))
    wait_for(lambda: manager.list() and manager.list()[0].step > 3)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=30)[1].decode()
    assert process.returncode == 130 and "Traceback" not in said
    job = manager.list()[0]
    assert f"Paused. Go on with: taleloom jobs resume {job.id}" in said
    wait_for(lambda: manager.get(job.id).state is JobState.PAUSED)
    steps = len(manager.metrics(job.id))
    manager.resume(job.id)
    manager.tend()
    wait_for(lambda: len(manager.metrics(job.id)) > steps)
    manager.cancel(job.id)
    wait_for(lambda: manager.get(job.id).state is JobState.CANCELLED)
    assert [record["step"] for record in manager.metrics(job.id)] == list(range(1, len(manager.metrics(job.id)) + 1))


def test_interrupted_in_the_moment_it_ends_is_no_error(paper, monkeypatch, log, tiny_model):
    def end(_):
        [job] = paper.manager.list()
        paper.manager.tend()
        paper.say(job, "done")
        raise KeyboardInterrupt

    monkeypatch.setattr(JobManager, "keep_tending", lambda _: None)
    monkeypatch.setattr("model.cli_jobs.time", SimpleNamespace(sleep=end))
    done = taleloom("finetune", "--data", log, "--name", "pirates", "--model", tiny_model)
    assert done.exit_code == 130 and "cannot be paused" not in done.stderr and "Paused" not in done.stderr


# Settings and what goes in.


def test_every_setting_has_an_option_and_reaches_the_job(paper, log, tiny_model):
    named = {*OPTIONS, "lora_targets", "warmup_share"}
    assert named == set(FineTuneSettings.__dataclass_fields__), "a new setting needs an option"
    options = "--epochs 3 --schedule cosine --frozen-layers 1 --seed 9 --lora-target q_proj --lora-target v_proj"
    finetune = ("finetune", "--data", log, "--model", tiny_model, "--detach")
    job = facts(*finetune, "--name", "a", *options.split())
    settings = paper.manager.get(job["id"]).settings
    assert (settings.epochs, settings.schedule, settings.frozen_layers, settings.seed) == (3, "cosine", 1, 9)
    assert settings.lora_targets == ("q_proj", "v_proj") and settings.method == "full"
    assert settings.evaluations == FINE_TUNE_PRESETS["quick"].evaluations
    job = facts(*finetune, "--name", "b", "--preset", "good", "--lora-rank", 4)
    settings = paper.manager.get(job["id"]).settings
    assert (settings.method, settings.lora_rank, settings.epochs) == ("lora", 4, 20)


def test_columns_and_ideas(paper, tmp_path, tiny_model):
    path = tmp_path / "t.csv"
    path.write_text("tale,about\n" + "".join(f'"{i}. {STORY}",idea {i}\n' for i in range(6)))
    command = ("finetune", "--data", path, "--name", "a", "--model", tiny_model, "--detach", "--text-column", "tale")
    job = facts(*command, "--prompt-column", "about", "--idea", "a cat", "--idea", "an owl")
    assert paper.manager.get(job["id"]).test_ideas == ("a cat", "an owl")
    assert paper.manager.stories(job["id"])[0] == {"text": f"0. {STORY}", "prompt": "idea 0", "split": "train"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--data none.txt", "no file"),
        ("--data x.csv --dataset a/b", "not both"),
        ("--model no-such-model", "no model"),
        ("--learning-rate 7", "learning_rate"),
        ("--lora-rank 999", "lora_rank"),
        ("--name ../x", "cannot be"),
        ("--idea a --idea b --idea c --idea d --idea e", "5 test ideas"),
    ],
)
def test_bad_input_is_one_sentence_and_no_job(paper, options, words):
    done = taleloom("finetune", "--name", "a", "--detach", *options.split())
    assert done.exit_code == 1 and words in done.stderr.splitlines()[-1] and not done.stdout
    assert "Traceback" not in done.output and not paper.manager.list()


def test_training_switched_off_is_said(paper, monkeypatch):
    monkeypatch.setenv("TALELOOM_TRAINING", "off")
    done = taleloom("finetune", "--name", "a", "--detach")
    assert done.exit_code == 1 and "switched off" in done.stderr


# jobs ...


def test_list_and_show(paper):
    assert "There are no jobs" in taleloom("jobs", "list").stdout and facts("jobs", "list") == []
    first, second = paper.add("first"), paper.add("second", note="Ahoy")
    assert [job["name"] for job in facts("jobs", "list")] == ["second", "first"]
    lines = taleloom("jobs", "list").stdout.splitlines()
    assert lines[0].split()[:4] == [second.id, "queued", "0%", "second"] and "waits for its turn" in lines[0]
    shown = facts("jobs", "show", first.id)
    assert shown["id"] == first.id and shown["settings"]["max_steps"] == 20 and shown["result"] is None
    assert json.loads(taleloom("jobs", "show", "second").stdout)["note"] == "Ahoy", "by name too"
    (first.folder / "job.json").write_text("{half")
    assert facts("jobs", "list")[1]["state"] == "failed"


def test_pause_resume_cancel_retry_delete(paper, detached):
    job = paper.add("pirates")
    done = taleloom("jobs", "pause", "pirates")
    assert done.stdout == f"{job.id} (pirates) is paused: It waits until it is resumed.\n" and not detached
    assert facts("jobs", "resume", job.id)["state"] == "queued" and detached == [paper.root]
    assert facts("jobs", "cancel", job.id)["state"] == "cancelled"
    detached.clear()
    anew = facts("jobs", "retry", job.id)
    assert anew["state"] == "queued" and anew["id"] != job.id and detached == [paper.root]
    assert facts("jobs", "show", "pirates")["id"] == anew["id"], "a name means the latest"
    assert taleloom("jobs", "delete", job.id).exit_code == 0
    assert [each.id for each in paper.manager.list()] == [anew["id"]]


def test_clone_changes_what_is_given(paper, detached):
    job = paper.add("pirates")
    other = facts("jobs", "clone", "pirates", "--name", "owls", "--seed", 5, "--lora-rank", 2)
    settings = paper.manager.get(other["id"]).settings
    assert (settings.seed, settings.method, settings.lora_rank, settings.max_steps) == (5, "lora", 2, 20)
    assert paper.manager.get(other["id"]).clone_of == job.id and detached


def test_logs(paper):
    job = paper.add("pirates")
    (job.folder / "log.txt").write_text("".join(f"line {i}\n" for i in range(100)))
    assert taleloom("jobs", "logs", "pirates", "--lines", 2).stdout == "line 98\nline 99\n"
    assert taleloom("jobs", "logs", "pirates", "--lines", 0).exit_code == 2


@pytest.mark.parametrize("command", ["show", "logs", "pause", "resume", "cancel", "retry", "delete"])
def test_an_unknown_job_and_a_wrong_moment_are_sentences(paper, command):
    done = taleloom("jobs", command, "nothing")
    assert done.exit_code == 1 and "There is no job" in done.stderr and "Traceback" not in done.output
    job = paper.add("pirates")
    paper.manager.tend()
    paper.say(job, "running")
    if command in ("resume", "retry", "delete"):
        done = taleloom("jobs", command, job.id)
        assert done.exit_code == 1 and "pirates is running and cannot be" in done.stderr
