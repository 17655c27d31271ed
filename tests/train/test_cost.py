"""What a training costs is known before it starts, and finding out changes nothing."""

from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch

from csm_nb.csm.adapters import add_adapter, train_fully
from csm_nb.csm.load import load_base
from csm_nb.recipe import Recipe
from csm_nb.train import cost
from csm_nb.train.cost import (
    CostError,
    count_activations,
    describe_cost,
    estimate_memory,
    fit_activations,
    measure_cost,
    tabulate_cost,
)
from csm_nb.train.packing import PackedRows, collate, read_clips
from csm_nb.train.trainer import fix_steps, train_model

RECIPE = Recipe(6, lr=5e-3, max_tokens=256, depth_ratio=0.25)


def make_rows(count=30):
    rng = np.random.default_rng(0)
    texts = ["Hei du.", "Jeg vet ikke hva det er.", "Kom hit nå!", "Nei.", "Vi går hjem i dag."]
    return [{"text": texts[i % 5], "speaker_id": "0", "codes": rng.integers(1, 512, (int(frames), 8), dtype=np.uint16)}
            for i, frames in enumerate(rng.integers(10, 70, count))]


def make_model(method="lora", dtype=None):
    model, processor = load_base("models/csm-mini", "cpu", dtype)
    torch.manual_seed(0)
    return (add_adapter(model, 4, 8, 0.1) if method == "lora" else train_fully(model)), processor


def read(processor, recipe=RECIPE):
    return read_clips(make_rows(), processor, recipe.max_tokens, 25.0)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_measuring_changes_no_weight_no_random_number_and_no_mode(method):
    model, processor = make_model(method)
    model.train()
    model.get_submodule("codec_model" if method == "full" else "base_model.model.codec_model").eval()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    measure_cost(model, processor, make_rows(), replace(RECIPE, gradient_accumulation=2, batch_size=2), steps=1)
    for name, value in model.state_dict().items():
        assert torch.equal(value.view(-1).view(torch.uint8), weights[name].view(-1).view(torch.uint8)), name
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_training_after_measuring_has_the_losses_of_one_without(tmp_path):
    histories = []
    for measured in (False, True):
        model, processor = make_model()
        if measured:
            measure_cost(model, processor, make_rows(), RECIPE, steps=1)
        history = train_model(model, processor, make_rows(), make_rows(4), tmp_path / str(measured), RECIPE)
        histories.append([(row.get("loss"), row.get("eval_loss"), row.get("grad_norm")) for row in history])
    assert histories[0] == histories[1] and len(histories[0]) > 6


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"batch_size": 3}, {"text_weight": 0.5},
                                     {"max_tokens": 512}, {"depth_ratio": 1.0, "codebook_weights": (1,) * 8}], ids=str)
def test_activations_counted_on_small_rows_are_those_of_a_full_row(method, changes):
    recipe = replace(RECIPE, **changes)
    model, processor = make_model(method)
    clips = read(processor, recipe)
    shapes = cost.shape_batches(clips, recipe, model.device)
    dataset = PackedRows(clips, cost._plan(clips, recipe), recipe.depth_ratio, recipe.seed)
    batch = collate([dataset[i] for i in range(recipe.batch_size)])
    batch.pop("row")
    assert batch["is_frame"].numel() == shapes[0][1] > 0.8 * recipe.max_tokens
    predicted = shapes[0] @ fit_activations(model, recipe)
    with cost._leave_alone(model, recipe):
        counted = count_activations(model, batch, recipe)
    assert predicted == pytest.approx(counted, rel=0.01)


def test_counting_activations_lets_go_of_them():
    model, _ = make_model()
    fit_activations(model, RECIPE)
    before = psutil.Process().memory_info().rss
    for _ in range(8):
        fit_activations(model, RECIPE)
    assert psutil.Process().memory_info().rss - before < 150e6


def test_gradient_checkpointing_needs_less_and_full_training_more():
    needed = {}
    for method in ("lora", "full"):
        model, processor = make_model(method)
        for less in (False, True):
            recipe = replace(RECIPE, gradient_checkpointing=less)
            needed[method, less] = estimate_memory(model, read(processor), recipe)["needed"]
    assert needed["lora", True] < needed["lora", False] < needed["full", False]
    assert needed["full", True] < needed["full", False]


def test_full_training_needs_sixteen_bytes_a_parameter_in_half_precision_or_not():
    sums = []
    for dtype in (torch.float32, torch.bfloat16):
        model, processor = make_model("full", dtype)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        memory = estimate_memory(model, read(processor), RECIPE)
        assert memory["gradients"] + memory["optimizer"] == 12 * trained
        sums.append(memory["model"] + memory["copies"] + memory["gradients"] + memory["optimizer"])
    assert sums[0] == sums[1]


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"batch_size": 4}], ids=str)
def test_too_little_memory_is_refused_with_changes_that_are_accepted(changes, monkeypatch):
    recipe = replace(RECIPE, **changes)
    model, processor = make_model()
    needed = estimate_memory(model, read(processor), recipe)["needed"]
    monkeypatch.setattr(cost, "count_free", lambda device: int(0.75 * needed))
    with pytest.raises(CostError, match="What helps: ") as refused:
        measure_cost(model, processor, make_rows(), recipe, steps=1)
    assert refused.value.suggestions and refused.value.memory["needed"] == needed
    for suggestion in refused.value.suggestions:
        name, value = next(iter(suggestion.items()))
        assert f"{name}={str(value).lower()}" in str(refused.value)
        estimate_memory(model, read(processor, replace(recipe, **suggestion)), replace(recipe, **suggestion))
    measure_cost(model, processor, make_rows(), replace(recipe, **refused.value.suggestions[-1]), steps=1)


def test_several_changes_are_suggested_where_one_is_not_enough(monkeypatch):
    model, processor = make_model()
    recipe = replace(RECIPE, batch_size=4)
    least = estimate_memory(model, read(processor), replace(recipe, gradient_checkpointing=True, batch_size=1))["needed"]
    monkeypatch.setattr(cost, "count_free", lambda device: least)
    with pytest.raises(CostError, match="gradient_checkpointing=true and batch_size=1 and gradient_accumulation=4") as refused:
        estimate_memory(model, read(processor), recipe)
    estimate_memory(model, read(processor), replace(recipe, **refused.value.suggestions[0]))


def test_no_memory_at_all_is_refused_before_any_row_is_run(monkeypatch):
    model, processor = make_model("full", torch.bfloat16)
    monkeypatch.setattr(cost, "count_free", lambda device: 1000)
    with pytest.raises(CostError, match="method=lora"):
        measure_cost(model, processor, make_rows(), RECIPE)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters() if p.requires_grad)
    model, processor = make_model()
    with pytest.raises(CostError, match="no smaller row fits"):
        measure_cost(model, processor, make_rows(), RECIPE)


def test_memory_that_runs_out_in_a_step_is_the_same_refusal(monkeypatch):
    model, processor = make_model()
    model.eval()

    def run_out(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cost, "_count_used", run_out)
    with pytest.raises(CostError, match="ran out of memory in a first step.*gradient_checkpointing=true") as refused:
        measure_cost(model, processor, make_rows(), RECIPE, steps=1)
    assert refused.value.suggestions
    assert all(parameter.grad is None for parameter in model.parameters()) and not model.training


def test_a_gradient_that_is_no_number_spoils_no_weight():
    model, processor = make_model()
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad)[0, 0] = float("nan")
    measure_cost(model, processor, make_rows(), RECIPE, steps=1)
    assert sum(int(p.isnan().sum()) for p in model.parameters()) == 1


def test_steps_hours_and_price_of_the_plan_follow_from_one_step():
    model, processor = make_model()
    measured = measure_cost(model, processor, make_rows(), replace(RECIPE, steps=100, batch_size=2, price_per_hour=2.5), steps=1)
    run, *table, total = measured["plan"]
    assert run["hours"] == pytest.approx(100 * measured["seconds_per_step"] / 3600) and run["steps"] == 100
    assert run["price"] == pytest.approx(2.5 * measured["hours"]) and measured["price"] == run["price"]
    assert measured["epochs"] == pytest.approx(
        100 * measured["audio_seconds_per_step"] / sum(len(row["codes"]) / 25 for row in make_rows()))
    assert [row["audio"] for row in table] == [30, 300, 150]
    for row in table:
        assert row["hours"] == pytest.approx(row["audio"] / measured["audio_seconds_per_second"])
        assert row["steps"] == pytest.approx(row["audio"] * 3600 / measured["audio_seconds_per_step"], abs=1)
    for name in ("audio", "steps", "hours", "price"):
        assert total[name] == pytest.approx(sum(row[name] for row in table))


def test_the_table_and_its_line_show_what_was_measured():
    model, processor = make_model()
    measured = measure_cost(model, processor, make_rows(), replace(RECIPE, price_per_hour=2.0), steps=1)
    table = tabulate_cost(measured)
    assert list(table.columns) == ["audio (h)", "steps", "hours", "price"]
    assert list(table.index) == ["this run", "anchor 10 h x 3", "synthetic 100 h x 3", "real 50 h x 3", "all three"]
    assert "s of audio per second" in describe_cost(measured) and "GiB free; disk: 4 checkpoints of" in describe_cost(measured)
    assert "price" not in tabulate_cost(measure_cost(model, processor, make_rows(), RECIPE, steps=1))


def test_a_containers_limit_counts_as_free_memory(monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setattr(cost, "read_memory_left", lambda: 600)
    assert cost.count_free(device) == 600
    monkeypatch.setattr(cost, "read_memory_left", lambda: None)
    assert cost.count_free(device) > 2**20


@pytest.mark.parametrize(("method", "keep", "at_once"), [("lora", 3, 4), ("full", 1, 4), ("full", 6, 7)])
def test_the_disk_that_checkpoints_take_is_what_they_turn_out_to_take(tmp_path, method, keep, at_once):
    model, processor = make_model(method)
    recipe = replace(RECIPE, steps=9, save_every=1, keep_checkpoints=keep)
    disk = cost.estimate_disk(model, recipe, tmp_path / "training")
    assert disk["checkpoints"] == at_once and disk["needed"] == at_once * disk["checkpoint"]
    train_model(model, processor, make_rows(8), make_rows(4), tmp_path / "training", recipe)
    kept = [sum(file.stat().st_size for file in folder.rglob("*")) for folder in (tmp_path / "training").glob("checkpoint-*")]
    assert len(kept) == at_once - 1 and kept == pytest.approx([disk["checkpoint"]] * len(kept), rel=0.2)
    free = cost.estimate_disk(model, recipe, tmp_path / "training")["free"]
    assert free == pytest.approx(disk["free"], abs=200e6)  # what a training's own checkpoints take is room for it


def test_a_full_training_of_the_real_model_needs_100_gb_of_disk(monkeypatch):
    shape = torch.nn.Module()
    shape.weight = torch.nn.Parameter(torch.empty(1_630_000_000, device="meta"))
    monkeypatch.setattr(cost.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 90e9}))
    with pytest.raises(CostError, match=r"5 of 18.22 GiB, 91.08 GiB, 83.82 GiB are free in .*keep_checkpoints=3") as refused:
        cost.estimate_disk(shape, Recipe(10_000, keep_checkpoints=4))
    assert refused.value.suggestions == [{"keep_checkpoints": 3}] and "method=lora" in str(refused.value)
    assert cost.estimate_disk(shape, Recipe(10_000, keep_checkpoints=3))["needed"] == 4 * 12 * 1_630_000_000


def test_checkpoints_that_the_disk_can_not_hold_are_refused_before_a_step(monkeypatch, tmp_path):
    model, processor = make_model("full")
    monkeypatch.setattr(cost.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1e6}))
    with pytest.raises(CostError, match="checkpoints do not fit the disk.*method=lora.*runs_dir"):
        measure_cost(model, processor, make_rows(), RECIPE, steps=1, out_dir=tmp_path)


def test_a_recipe_of_epochs_gets_the_steps_that_read_the_clips_so_often_and_keeps_them(tmp_path):
    model, processor = make_model()
    recipe = Recipe(epochs=2.0, max_tokens=256, depth_ratio=0.25)
    fixed = fix_steps(recipe, make_rows(), processor, model, tmp_path)
    assert fixed.steps > 1 and fixed.epochs == 0 and fix_steps(fixed, [], processor, model, tmp_path) == fixed
    assert measure_cost(model, processor, make_rows(), recipe, steps=1, out_dir=tmp_path)["epochs"] == pytest.approx(2, rel=0.2)
    halves = [fix_steps(replace(recipe, **change), make_rows(), processor, model, tmp_path / str(change)).steps
              for change in ({"batch_size": 2}, {"gradient_accumulation": 2}, {"epochs": 1.0})]
    assert halves == [-(-fixed.steps // 2)] * 3
    train_model(model, processor, make_rows(), make_rows(2), tmp_path, replace(fixed, steps=3))
    assert fix_steps(recipe, make_rows(), processor, model, tmp_path).steps == 3  # what it was begun with


def test_a_clip_that_is_heard_ten_times_is_warned_of():
    model, processor = make_model()
    few, many = (describe_cost(measure_cost(model, processor, make_rows(), replace(RECIPE, steps=steps), steps=1))
                 for steps in (1, 400))
    assert "learned by heart" not in few and "heard" in few and "learned by heart" in many
