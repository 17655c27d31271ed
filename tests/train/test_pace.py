"""A long training says and keeps enough by the clock, without another number for it; one that stopped early stays stopped."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from test_progress import make_rows, strip
from transformers import TrainerCallback

from csm_nb.csm.adapters import add_adapter
from csm_nb.csm.load import load_base
from csm_nb.provenance import read_json
from csm_nb.recipe import ParameterError, Recipe
from csm_nb.train import callbacks, pace
from csm_nb.train.checkpoints import list_checkpoints
from csm_nb.train.trainer import plan_choices, plan_evaluations, train_model

ALWAYS = 1e-6  # a time that has passed at every step
BY_STEPS = Recipe(6, max_tokens=128, log_every=4, eval_every=3, save_every=3, log_seconds=0, save_minutes=0, keep_checkpoints=9)


class Kill(TrainerCallback):
    """Ends a training as a kill does, after `step`."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def train(folder, recipe, **changes):
    recipe = Recipe(**(recipe.__dict__ | changes))
    model, processor = load_base("models/csm-mini", "cpu")
    torch.manual_seed(0)
    model = add_adapter(model, 4, 8, 0.1)
    history = train_model(model, processor, make_rows(), make_rows()[:1], folder, recipe, callbacks.show_progress(recipe))
    return history, {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}


def steps(folder):
    return [step for step, _ in list_checkpoints(folder)]


def test_the_clock_brings_a_line_and_a_checkpoint_at_each_step_and_changes_no_number(tmp_path):
    plain, weights = train(tmp_path / "plain", BY_STEPS)
    timed, weights_too = train(tmp_path / "timed", BY_STEPS, log_seconds=ALWAYS, save_minutes=ALWAYS)
    assert [row["step"] for row in timed if "loss" in row] == [1, 2, 3, 4, 5, 6] == steps(tmp_path / "timed")
    assert [row["step"] for row in plain if "loss" in row] == [1, 3, 4, 5, 6] and steps(tmp_path / "plain") == [3, 5, 6]
    assert [row for row in strip(plain) if "eval_loss" in row] == [row for row in strip(timed) if "eval_loss" in row]
    assert weights.keys() == weights_too.keys() and all(torch.equal(weights[name], weights_too[name]) for name in weights)


@pytest.mark.parametrize("changes", [{"log_seconds": ALWAYS, "save_minutes": ALWAYS}, {"save_every": 2, "log_every": 5}], ids=str)
def test_a_killed_training_goes_on_with_the_lines_of_one_that_was_not(tmp_path, changes):
    recipe = Recipe(**(BY_STEPS.__dict__ | changes))
    whole, weights = train(tmp_path / "whole", recipe)
    model, processor = load_base("models/csm-mini", "cpu")
    torch.manual_seed(0)
    model = add_adapter(model, 4, 8, 0.1)
    with pytest.raises(KeyboardInterrupt):
        train_model(model, processor, make_rows(), make_rows()[:1], tmp_path / "killed", recipe, [Kill(5)])
    killed, weights_too = train(tmp_path / "killed", recipe)
    assert strip(whole) == strip(killed)
    assert all(torch.equal(weights[name], weights_too[name]) for name in weights)


@pytest.mark.parametrize(("count", "expected"), [(1, [1]), (3, [3]), (6, [5, 6]), (9, [7, 8, 9]), (10, [8, 9, 10]),
                                                 (750, [584, 667, 750]), (10_000, [7778, 8889, 10_000])])
def test_three_steps_of_the_last_third_are_chosen_from_where_there_are_three(count, expected):
    assert plan_choices(count) == expected and min(expected) > 2 * count / 3
    assert set(expected) <= set(plan_evaluations(Recipe(count))) <= set(range(1, count + 1))


def test_checkpoints_to_choose_from_carry_a_held_out_loss_and_outlive_those_of_the_clock(tmp_path):
    history, _ = train(tmp_path, BY_STEPS, steps=12, eval_every=100, save_every=100, save_minutes=ALWAYS, keep_checkpoints=1)
    losses = {row["step"]: row["eval_loss"] for row in history if "eval_loss" in row}
    assert steps(tmp_path) == [10, 11, 12] and list(losses) == [0, 10, 11, 12]
    for step, folder in list_checkpoints(tmp_path):
        assert read_json(folder / "complete.json")["eval_loss"] == losses[step]


@pytest.mark.parametrize(("seconds", "minutes", "asked", "most"), [(30, 0, "should_log", 30), (0, 10, "should_save", 600)])
def test_lines_and_checkpoints_come_before_their_time_is_over(monkeypatch, seconds, minutes, asked, most):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: clock.now))
    keeper, args, times = pace.KeepPace(seconds, minutes, [1000]), SimpleNamespace(world_size=1), [0.0]
    for step in range(1, 1000):
        control = SimpleNamespace(should_log=False, should_save=False, should_evaluate=False)
        keeper.on_step_begin(args, None, control)
        clock.now += 7.0
        keeper.on_step_end(args, SimpleNamespace(global_step=step), control)
        if getattr(control, asked):
            times.append(clock.now)
            (keeper.on_log if asked == "should_log" else keeper.on_save)(args, None, control)
        assert not control.should_evaluate and control.should_save <= control.should_log
    gaps = {b - a for a, b in zip(times, times[1:], strict=False)}
    assert gaps == {most // 7 * 7}


def test_the_time_left_counts_the_evaluations_to_come():
    watch = callbacks.PrintProgress([20, 40, 60])
    watch.start = (0.0, 0)
    runtimes = {0: 50.0, 20: 70.0, 40: 60.0}
    for step, left in ((10, 100 + 3 * 50), (30, 60 + 2 * 60), (40, 40 + 60), (59, 2 + 60)):
        history = [{"step": at, "eval_loss": 9.0, "eval_runtime": took} for at, took in runtimes.items() if at <= step]
        state = SimpleNamespace(max_steps=60, global_step=step, log_history=history)
        assert watch.count_left(state, 2.0 * step) == pytest.approx(left)


def test_the_lines_of_a_training_say_what_is_left(tmp_path, capsys):
    train(tmp_path, BY_STEPS)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert all(re.search(r"audio per second  \d+:\d\d:\d\d left$", line) for line in lines[2:])
    assert lines[-1].endswith("0:00:00 left")


@pytest.mark.parametrize(("name", "value"), [("log_seconds", -1.0), ("save_minutes", float("nan"))])
def test_a_time_that_no_training_can_keep_is_refused(name, value):
    with pytest.raises(ParameterError, match=f"{name} is .*allowed is from 0"):
        Recipe(1, **{name: value})


def test_a_training_that_stopped_early_stays_stopped(tmp_path, capsys):
    recipe = Recipe(24, lr=1e-12, max_tokens=128, log_every=2, eval_every=4, save_every=5, patience=1)
    histories, weights = zip(*[train(tmp_path, recipe) for _ in range(3)], strict=True)
    assert histories[0][-1]["step"] == 8 == steps(tmp_path)[-1]
    assert histories[0] == histories[1] == histories[2]
    assert all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    assert "stopped early at step 8 (patience=1) and stays so; delete" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) == 8
