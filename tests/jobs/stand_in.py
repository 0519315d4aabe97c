"""A worker with a task that takes no torch and no time: `python -m tests.jobs.stand_in FOLDER`.

It learns as FineTune does, in a folder's files: a checkpoint now and then, metrics that a resumption trims to it. Each
step's loss depends on all steps before. What the job's `source` says goes wrong.
"""

import errno
import json
import sys
import time
from pathlib import Path

from model.checkpoint import write_atomically
from model.errors import ModelError, TaleloomError
from model.jobs.record import append_line, read_lines, read_request, read_stories
from model.jobs.worker import main

SAVE_EVERY = 4
STEP_S = 0.01


def undisturbed(n_steps: int) -> list[float]:
    """The losses of a run that nothing happens to."""
    losses, state = [], 1
    for _ in range(n_steps):
        state = next_state(state)
        losses.append(state / 2**31)
    return losses


def next_state(state: int) -> int:
    return (state * 1103515245 + 12345) % 2**31


def learn(folder, report, should_stop):
    job = read_request(folder)
    assert read_stories(folder)
    checkpoint, metrics = folder / "checkpoint.json", folder / "metrics.jsonl"
    step, state = 0, 1
    if checkpoint.is_file():
        try:
            saved = json.loads(checkpoint.read_text())
        except ValueError as error:
            raise ModelError(f"{checkpoint} is damaged. Delete it to start again.") from error
        step, state = saved["step"], saved["state"]
    kept = [record for record in read_lines(metrics) if record["step"] <= step]
    write_atomically(metrics, "".join(json.dumps(record) + "\n" for record in kept))

    def save():
        write_atomically(checkpoint, json.dumps({"step": step, "state": state}))

    n_steps = job.settings.max_steps
    while step < n_steps:
        if wish := None if job.source == "deaf" else should_stop():
            if wish == "pause":
                save()
            return "paused" if wish == "pause" else "cancelled"
        state = next_state(state)
        step += 1
        append_line(metrics, {"step": step, "steps": n_steps, "loss": state / 2**31})
        report({"step": step, "steps": n_steps, "loss": state / 2**31})
        if step == 3:
            fail(job.source)
        if step % SAVE_EVERY == 0:
            save()
        time.sleep(STEP_S)
    write_atomically(folder / "result.json", json.dumps({"name": job.name, "steps": step}))
    return "done"


def fail(how: str) -> None:
    if how == "disk full":
        raise OSError(errno.ENOSPC, "No space left on device")
    if how == "nan":
        raise TaleloomError("The loss at step 3 is not a number. Try again with a lower learning rate.")
    if how == "memory":
        raise MemoryError
    if how == "bug":
        raise KeyError("a bug")
    if how == "exit":
        sys.exit(3)


if __name__ == "__main__":
    main(Path(sys.argv[1]), learn)
