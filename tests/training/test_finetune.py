"""Fine-tuning: it learns, it resumes exactly, it stops when nothing is gained, it keeps the best."""

import json

import pytest
import torch
from safetensors.torch import load_file

from model.checkpoint import load_decoder
from model.config import FineTuneSettings
from model.errors import InputError, ModelError, TaleloomError
from model.training.finetune import FineTune, RowStream

SETTINGS = FineTuneSettings(epochs=6, rows_per_step=2, evaluations=3, learning_rate=0.02, patience=0)


def rows(stories, n_train=20, n_test=4):
    return [
        {"text": text, "prompt": "a fox" if i % 2 else None, "split": "train" if i < n_train else "test"}
        for i, text in enumerate(stories[: n_train + n_test])
    ]


def metrics(folder):
    """What was recorded, less how fast it went."""
    timed = ("tokens_per_second", "eta_s", "memory_mb")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_it_learns_and_keeps_the_best(tiny_model, stories, tmp_path):
    told = []

    def tell(decoder):
        told.append(decoder.training)
        return [{"idea": "a fox", "seed": 1, "text": "A fox."}]

    originals = rows(stories[100:])
    run = FineTune(tmp_path, tiny_model, rows(stories), SETTINGS, originals, tell=tell)
    assert run.run() == "done" and run.stopped_because
    evaluations = [m for m in metrics(tmp_path) if m.get("evaluation")]
    assert [m["step"] for m in evaluations] == sorted({round(i * run.n_steps / 3) for i in range(4)})
    assert evaluations[-1]["own_bits_per_byte"] < evaluations[0]["own_bits_per_byte"] - 0.5
    assert {"own_train_bits_per_byte", "original_bits_per_byte"} <= set(evaluations[0])
    best = min(evaluations, key=lambda m: m["own_bits_per_byte"])
    assert run.best_step == best["step"]
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [m["step"] for m in evaluations] and told == [False] * len(samples)
    steps = [m for m in metrics(tmp_path) if "loss" in m]
    assert [m["step"] for m in steps] == list(range(1, run.n_steps + 1))
    assert steps[-1]["loss"] < steps[0]["loss"] and steps[-1]["lr"] < steps[len(steps) // 2]["lr"]
    load_decoder(tmp_path / "best")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_paused_or_killed_it_goes_on_as_if_nothing_had_been(tiny_model, stories, tmp_path, method):
    settings = FineTuneSettings(
        method=method, epochs=4, rows_per_step=2, evaluations=2, learning_rate=0.01, dropout=0.2, patience=0
    )

    def start(folder, should_stop=lambda: None):
        return FineTune(folder, tiny_model, rows(stories), settings, rows(stories[50:]), should_stop=should_stop)

    whole = start(tmp_path / "whole")
    whole.run()
    asked = iter(range(100))
    assert start(tmp_path / "cut", lambda: "pause" if next(asked) == 3 else None).run() == "paused"
    # Killed later on: what was recorded after the last checkpoint is dropped, half a line too.
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "steps": 99, "loss": 9.0}\n{"step": 5, "lo')
    resumed = start(tmp_path / "cut")
    assert resumed.run() == "done" and resumed.step == whole.step
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    ours, theirs = (load_file(tmp_path / name / "best" / "model.safetensors") for name in ("cut", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_cancelled_it_keeps_what_was_best(tiny_model, stories, tmp_path):
    asked = iter(range(100))
    run = FineTune(
        tmp_path, tiny_model, rows(stories), SETTINGS, should_stop=lambda: "cancel" if next(asked) == 2 else None
    )
    assert run.run() == "cancelled" and run.step == 2
    load_decoder(tmp_path / "best")


def test_it_stops_when_held_out_stories_are_told_no_better(tiny_model, stories, tmp_path):
    settings = FineTuneSettings(
        epochs=40, rows_per_step=1, evaluations=40, learning_rate=1e-6, warmup_share=0, weight_decay=0, patience=2,
        max_steps=40, schedule="constant", dropout=0,
    )  # fmt: skip
    run = FineTune(tmp_path, tiny_model, rows(stories, 4), settings)
    scores = iter([3.0, 2.0, 2.5, 2.1, 1.0, 0.5])
    run_score = "model.training.finetune.bits_per_byte"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_score, lambda d, t, texts: {"bits_per_byte": next(scores) if len(texts) == 4 else 9.0})
        run._scored["own_train"] = run._scored["own_train"][:3]
        assert run.run() == "done"
    assert run.step == 3 and run.best_step == 1 and "2 evaluations" in run.stopped_because


def test_a_loss_that_is_no_number_is_said_so_and_the_best_stays(tiny_model, stories, tmp_path):
    run = FineTune(tmp_path, tiny_model, rows(stories), SETTINGS)
    asked = iter(range(100))

    def poison():
        if next(asked) == 3:
            run.decoder.model.norm.weight.data.fill_(float("nan"))

    run.should_stop = poison
    with pytest.raises(TaleloomError, match="lower learning rate"):
        run.run()
    assert torch.isfinite(load_decoder(tmp_path / "best").lm_head.weight).all()


def test_frozen_layers_stay_and_others_learn(tiny_model, stories, tmp_path):
    settings = FineTuneSettings(epochs=2, rows_per_step=2, evaluations=1, learning_rate=0.01, frozen_layers=1)
    FineTune(tmp_path, tiny_model, rows(stories), settings).run()
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_model, tmp_path / "best"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any(".layers.0." in name or "embed" in name for name in changed)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"frozen_layers": 3}, "2 layers"),
        ({"method": "lora", "lora_rank": 4, "frozen_layers": 2}, "Nothing would be trained"),
    ],
)
def test_settings_that_train_nothing_are_refused(tiny_model, stories, tmp_path, wrong, message):
    with pytest.raises(InputError, match=message):
        FineTune(tmp_path, tiny_model, rows(stories), FineTuneSettings(**wrong))
    with pytest.raises(InputError, match="no story"):
        FineTune(tmp_path, tiny_model, rows(stories, 0), FineTuneSettings())


def test_a_damaged_or_foreign_checkpoint_is_refused(tiny_model, stories, tmp_path):
    FineTune(tmp_path, tiny_model, rows(stories), SETTINGS).run()
    with pytest.raises(ModelError, match="other settings"):
        FineTune(tmp_path, tiny_model, rows(stories), FineTuneSettings(epochs=9)).run()
    (tmp_path / "checkpoint.safetensors").write_bytes(b"half")
    with pytest.raises(ModelError, match="damaged"):
        FineTune(tmp_path, tiny_model, rows(stories), SETTINGS).run()


def test_replay_has_its_share(tiny_model, stories, tmp_path):
    settings = FineTuneSettings(epochs=3, rows_per_step=4, replay_share=0.25, evaluations=1)
    run = FineTune(tmp_path, tiny_model, rows(stories), settings, rows(stories[50:]))
    run.run()
    assert run._replayed.n_taken == run.step and run._own.n_taken == 3 * run.step


def test_originals_pull_back_to_what_the_base_says_not_to_their_text(tiny_model, stories, tmp_path):
    run = FineTune(tmp_path, tiny_model, rows(stories), SETTINGS, rows(stories[50:]))
    row = torch.tensor(run._replayed.take(1))

    def gradient_norm(loss):
        run.decoder.zero_grad()
        loss(row[:, :-1], row[:, 1:]).backward()
        return torch.nn.utils.get_total_norm([p.grad for p in run.decoder.parameters()])

    run.decoder.eval()
    at_first = gradient_norm(run._kept_loss)
    assert at_first < 0.02 * gradient_norm(run._own_loss)
    for _ in range(5):
        run._train_step()
    run.decoder.eval()
    assert gradient_norm(run._kept_loss) > 10 * at_first


def test_rows_are_the_same_for_everyone_and_shuffled_anew_each_epoch(stories, tokenizer):
    own = rows(stories)
    one, other = (RowStream(own, tokenizer, 65, 1, idea_share=0.5) for _ in range(2))
    n = len(one.epoch_rows(0))
    assert one.take(2 * n) == other.take(n) + other.take(n)
    told = {share: RowStream(own, tokenizer, 257, 1, share).epoch_rows(0) for share in (0.0, 1.0)}
    n_ideas = {share: sum(row.count(tokenizer.idea_id) for row in rows) for share, rows in told.items()}
    assert n_ideas[0.0] == 0 and n_ideas[1.0] > 10
    assert one.epoch_rows(0) != one.epoch_rows(1) != RowStream(own, tokenizer, 65, 2, idea_share=0.5).epoch_rows(1)


@pytest.mark.parametrize(
    "wrong",
    [{"method": "magic"}, {"epochs": 0}, {"learning_rate": float("nan")}, {"replay_share": 1}, {"lora_targets": ()}],
)
def test_settings_say_what_they_can_be(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        FineTuneSettings(**wrong)
