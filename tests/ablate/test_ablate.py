"""Arms differ in one thing and cost the same, run as tasks of csm_nb.runs, and are reported whatever became of the others."""

import functools
import json
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml

from csm_nb import audio, recipe
from csm_nb.ablate import __main__, arms
from csm_nb.ablate.arms import ADAPTER, ANCHOR, CLIPS, JUDGING, REFERENCE, SYNTHETIC, TRAINED_IN
from csm_nb.provenance import read_json, write_json
from csm_nb.runs import chain, folders

NAMES = ["LoRA", "LoRA + text", "LoRA + text, lr x0.5", "LoRA + text, lr x2", "full", "full, lr x0.5", "full, lr x2",
         "without anchor", "without synthetic", "data 1/8", "data 1/4", "data 1/2"]
PARAMS = {ANCHOR: {"recipe": {"steps": 60, "lr": 3.0e-3}},
          SYNTHETIC: {"recipe": {"steps": 750, "lr": 3.0e-3}, "synthetic_clips": 3000},
          ADAPTER: {"recipe": {"steps": 100, "lr": 1.0e-3}, "corpus_clips": 201}}
# Character error rates of the held-out sentences, by arm; of the probes 0.9 throughout
CERS = {"LoRA": [0.4, 0.5, 0.6], "LoRA + text": [0.3, 0.5, 0.4], "LoRA + text, lr x0.5": [0.1, 0.2, 0.3],
        "LoRA + text, lr x2": [0.9, 0.8, 0.9], "full": [0.3, 0.4, 0.2], "full, lr x0.5": [0.3, 0.3, 0.3],
        "full, lr x2": [0.5, 0.5, 0.5], "without anchor": [0.3, 0.5, 0.5], "without synthetic": [0.7, 0.8, 0.9],
        "data 1/8": [0.6, 0.6, 0.6], "data 1/4": [0.5, 0.5, 0.5], "data 1/2": [0.4, 0.5, 0.4]}
# After 03; of all others 4.5. The rate is chosen by the seed that all of a grid have, so seed 2 does not count
LOSSES = {"LoRA + text, lr x0.5": 4.6, "full, lr x0.5": 4.4, "full, seed 2": 4.0}


def leave_results(folder, task):
    """Leave what a notebook leaves: its records, an adapter, and from 04 the judged sentences."""
    inputs, params, arm = folders.find_inputs(task.params), task.params, task.arm.split(", seed")[0]
    name = folders.name_trained(params, params["language"])
    if task.stage == JUDGING:
        rows = [{"model": model, "text": f"setning {i}", "probe": i == 0, "heard": params["language"], "cer": rate, "ended": True}
                for model, shift in ((name, 0), ("base", 0.1), ("reference", -0.2))
                for i, rate in enumerate([0.9, *(round(rate + shift, 3) for rate in CERS[arm])])]
        rows.append(rows[-1] | {"model": "base", "cer": 0.0})
        frame = pd.DataFrame(rows).assign(language=params["language"], confidence=0.9, transcript="null")
        frame.loc[frame.index[-1], "language"] = "en"
        frame.to_csv(folder / "judged.csv", index=False)
    else:
        for place in (folder / "adapter", *([Path(params["adapters_dir"]) / name] if task.stage == ADAPTER else [])):
            place.mkdir(parents=True, exist_ok=True)
            (place / recipe.TRAINED[params["method"]]).write_text(json.dumps([task.stage, params]))
    metrics = {"last_loss": LOSSES.get(task.arm, LOSSES.get(arm, 4.5)), "trained_parameters_m": 0.97, "verdict": "learned"}
    if task.stage in TRAINED_IN:
        metrics["trained_steps"] = params["recipe"]["steps"]
    write_json(folder / "metrics.json", metrics)
    write_json(folder / "run.json", {"params": params, "inputs": inputs, "seconds": 10.0})
    write_json(folder / "done.json", {"verdict": "learned"})


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """Return what was started (arm, stage, parameters), how many ran then, what is to fail (arm, stage), and a call's arguments.

    All is as in csm_nb.runs but the notebook, which is over when it is looked at the second time.
    """
    started, running, failing, planned = [], [], set(), []

    def run_tasks(tasks, jobs):
        planned[:] = tasks
        chain.run_tasks(tasks, jobs)

    def start_process(command, **options):
        folder = Path(command[command.index("-f") + 1]).parent
        task = next(task for task in planned if task.folder == folder and task.state == "running" and not task.process)
        started.append((task.arm, task.stage, yaml.safe_load((folder / "params.yaml").read_text())))
        running.append(sum(task.state == "running" for task in planned))
        broken = {(task.arm, task.stage), (task.arm.split(", seed")[0], task.stage)} & failing
        if not broken:
            leave_results(folder, task)
        looks = iter([None, 0])
        return SimpleNamespace(pid=2**30, returncode=1 if broken else 0, poll=lambda: next(looks))  # the id of no process

    monkeypatch.setattr(__main__, "run_tasks", run_tasks)
    monkeypatch.setattr(chain.subprocess, "Popen", start_process)
    monkeypatch.setattr(chain.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(folders, "hash_code", functools.cache(folders.hash_code))  # it does not change here
    handler = signal.getsignal(signal.SIGTERM)
    arguments = ["--langs", "no", "--profile", "mini", "--jobs", "2", "--set", f"runs_dir={tmp_path}"]
    yield SimpleNamespace(started=started, running=running, failing=failing, arguments=arguments)
    signal.signal(signal.SIGTERM, handler)


def plan(cost=1.5):
    return {arm.name: arms.plan_arm(arm, PARAMS, cost) for arm in arms.ARMS}


def test_arms_cost_the_same_and_differ_in_one_thing():
    planned = plan(cost=1.5)
    assert list(planned) == NAMES
    for name, stages in planned.items():
        steps = sum(changed["recipe"]["steps"] for changed in stages.values())
        assert steps * (1.5 if name.startswith("full") else 1) == pytest.approx(910, abs=2), name
    def change(stage, recipe=(), **values):
        own = planned[REFERENCE][stage]
        return own | values | {"recipe": own["recipe"] | dict(recipe)}

    same = {"train_text": True, "choice": "last"}
    assert planned[REFERENCE] == {
        ANCHOR: {"method": "lora", "init_adapter": "", "recipe": same | {"steps": 60}},
        SYNTHETIC: {"method": "lora", "init_adapter": ANCHOR, "recipe": same | {"steps": 750}, "synthetic_clips": 3000},
        ADAPTER: {"method": "lora", "init_adapter": SYNTHETIC, "recipe": same | {"steps": 100}, "corpus_clips": 201},
    }
    assert planned["LoRA"] == {stage: change(stage, {"train_text": False}) for stage in TRAINED_IN}
    full = {ANCHOR: (40, 6.0e-4), SYNTHETIC: (500, 6.0e-4), ADAPTER: (67, 2.0e-4)}
    assert planned["full"] == {stage: change(stage, {"steps": steps, "lr": pytest.approx(rate)}, method="full")
                               for stage, (steps, rate) in full.items()}
    assert planned["without anchor"] == {SYNTHETIC: change(SYNTHETIC, {"steps": 810}, init_adapter=""),
                                         ADAPTER: planned[REFERENCE][ADAPTER]}
    assert planned["without synthetic"] == {ANCHOR: planned[REFERENCE][ANCHOR],
                                            ADAPTER: change(ADAPTER, {"steps": 850}, init_adapter=ANCHOR)}


def test_arms_that_count_epochs_hear_as_many_clips():
    params = {stage: own | {"recipe": {"steps": 0, "epochs": 3.0, "lr": 1e-4}} for stage, own in PARAMS.items()}
    params[ANCHOR] |= {"anchor_clips": 60}
    for arm in arms.ARMS:
        changed = arms.plan_arm(arm, params, 1.5)
        heard = sum(arms.count_length(stage, params[stage] | own | {"recipe": params[stage]["recipe"] | own["recipe"]})
                    for stage, own in changed.items())
        assert heard * (1.5 if arm.method == "full" else 1) == pytest.approx(3 * (60 + 3000 + 201)), arm.name
    assert arms.plan_arm(arms.ARMS[-3], params, 1.5)[SYNTHETIC]["recipe"]["epochs"] == 24  # an eighth of the clips


def test_full_has_the_grid_of_learning_rates_that_lora_has():
    planned = plan()
    for arm, scale in ((REFERENCE, 1.0), ("full", arms.FULL_LR)):
        for factor in (0.5, 1, 2):
            for stage, changed in planned[arms.name_rate(arm, factor)].items():
                rate, recipe = PARAMS[stage]["recipe"]["lr"], changed["recipe"]
                assert recipe.get("lr", rate) == pytest.approx(scale * factor * rate)
                assert recipe | {"lr": 0} == planned[arm][stage]["recipe"] | {"lr": 0}
                assert changed | {"recipe": 0} == planned[arm][stage] | {"recipe": 0}


def test_arms_of_less_data_have_a_share_of_the_corpus_and_all_the_steps():
    planned = plan()
    assert [[planned[f"data 1/{share}"][stage][CLIPS[stage]] for stage in CLIPS] for share in (8, 4, 2)] == [
        [375, 26], [750, 51], [1500, 101]]
    for share in (8, 4, 2):
        for stage, changed in planned[f"data 1/{share}"].items():
            count = {CLIPS[stage]: 0} if stage in CLIPS else {}
            assert changed | count == planned[REFERENCE][stage] | count




def test_shares_are_of_the_clips_that_a_corpus_has(tmp_path):
    rows = [{"text": f"Setning {i}.", "audio_path": f"{i}.wav", "speaker_id": "a", "language": "no"} for i in range(80)]
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number in range(2):  # so many are there, and can be told apart: it is no corpus otherwise
        audio.write_audio(tmp_path / f"{number}.wav", np.ones(24_000))
    trainings = arms.plan_trainings(["no"], "mini", {"corpus": str(manifest), "corpus_clips": 50_000})
    clips = {training.arm: training.tasks[ADAPTER].params["corpus_clips"] for training in trainings}
    assert [clips[arm] for arm in NAMES[-4:]] == [80, 10, 20, 40]
    with pytest.raises(recipe.ParameterError, match="nothing of language 'sv'"):
        arms.plan_trainings(["sv"], "mini", {"corpus": str(manifest)})


def test_a_step_of_full_fine_tuning_costs_half_as_much_again_unless_the_adapter_is_large():
    params = {"base_model": "models/csm-mini", "seed": 0}
    small = {"rank": 1, "alpha": 2, "dropout": 0.0, "train_mlp": False, "depth_ratio": 0.125}
    assert arms.compare_costs(params | {"recipe": small}) == pytest.approx(1.5, rel=0.01)
    # counted by hand: 2.65 M weights and 0.70 M of the adapter in the backbone, 0.42 and 0.16 in the depth decoder, heads
    large = small | {"rank": 32, "alpha": 64, "train_mlp": True}
    assert arms.compare_costs(params | {"recipe": large}) == pytest.approx(1.07, abs=0.02)


@pytest.mark.parametrize("profile", ["mini", "test"])
def test_every_task_has_what_its_arm_sets_and_the_seed_of_its_training(profile):
    trainings = arms.plan_trainings(["no", "da"], profile, {"seed": 3, "runs_dir": "here"}, seeds=[0, 7])
    assert {training.language for training in trainings} == {"no", "da"}
    for training in trainings:
        arm = next(arm for arm in arms.ARMS if arm.name == training.arm)
        changed = arms.plan_arm(arm, training.params, 1.5 if arm.method != "full" else training.cost)
        *trained, judging = training.tasks.values()
        assert [task.stage for task in trained] == list(changed), training
        for before, task in zip([None, *trained], trained, strict=False):
            assert task.needs == ([before] if before else []), training
            wanted = changed[task.stage] | {"seed": training.seed, "runs_dir": "here/ablate/runs"}
            recipe = wanted.pop("recipe")
            assert recipe.items() <= task.params["recipe"].items(), training
            assert {key: task.params.get(key) for key in wanted if key in task.params} == {
                key: value for key, value in wanted.items() if key in task.params}, training
            assert wanted.keys() - task.params.keys() <= ({"init_adapter"} if task.stage == ANCHOR else set()), training
        place = f"here/ablate/models/{arms.name_folder(arm.name)}/seed-{training.seed}"
        wanted = {"method": arm.method, "compare": [training.language], "seed": 3, "sentences": 24, "adapters_dir": place}
        assert judging.stage == JUDGING and wanted.items() <= judging.params.items() and judging.needs == trained[-1:]
        assert trained[-1].params["adapters_dir"] == place


def test_each_seed_trains_every_arm_but_the_grid_has_one():
    seeds = {}
    for training in arms.plan_trainings(["no"], "mini", seeds=[5, 6, 7]):
        seeds.setdefault(training.arm, []).append(training.seed)
    assert seeds == {name: [5] if ", lr x" in name else [5, 6, 7] for name in NAMES}


def test_what_arms_have_in_common_is_one_task():
    trainings = {training.arm: training.tasks for training in arms.plan_trainings(["no"], "mini")}
    assert all(trainings[arm][ANCHOR] is trainings[REFERENCE][ANCHOR] for arm in NAMES[8:])
    assert len({id(task) for tasks in trainings.values() for task in tasks.values()}) == 4 * 10 + 2 * 3 - 4
    assert trainings["without synthetic"][ADAPTER] is not trainings[REFERENCE][ADAPTER]


def test_arms_run_side_by_side_and_each_goes_on_from_its_own_stages(runner):
    assert __main__.main([*runner.arguments, "--arms", REFERENCE, "without anchor", "data 1/2"]) == 0
    assert max(runner.running) == 2
    places = {(arm, stage): params for arm, stage, params in runner.started}
    assert len(places) == len(runner.started) == 4 + 3 + 3
    for arm, stages in ((REFERENCE, (ANCHOR, SYNTHETIC, ADAPTER)), ("without anchor", (SYNTHETIC, ADAPTER))):
        for before, stage in zip(stages, stages[1:], strict=False):
            source = Path(places[f"{arm}, seed 0", stage]["init_adapter"])
            made = read_json(source.parent / "run.json")["params"]
            assert source.parent.parent.name == before and made == places[f"{arm}, seed 0", before]
    assert places["without anchor, seed 0", SYNTHETIC]["init_adapter"] == ""


def test_each_arm_is_reported_over_held_out_sentences_against_the_reference(runner, tmp_path, capsys):
    assert __main__.main(runner.arguments) == 0
    folder = tmp_path / "ablate" / "no"
    table = pd.read_csv(folder / "ablation.csv").set_index("model")
    assert list(table.index) == ["reference", "base", *NAMES]
    assert (table.sentences == 3).all() and table.CER["LoRA"] == 0.5  # not the probe's 0.9
    assert table.CER["base"] == pytest.approx(0.6)  # once, of the first arm, in the language only
    assert table.difference["without anchor"] == pytest.approx(0.1 / 3, abs=1e-3)
    assert np.isnan(table.difference[REFERENCE]) and table.difference["full"] < 0
    assert list(table.index[table["best rate"]]) == [REFERENCE, "full, lr x0.5"]  # by loss: the least CER has another
    assert (table.seeds == 1).all()
    assert table.compute[NAMES].to_numpy() == pytest.approx(1, abs=0.01)
    assert list(table.seconds[NAMES]) == [30] * 7 + [20, 20] + [30] * 3
    page, said = (folder / "ablation.md").read_text(), capsys.readouterr().out
    assert "One training per arm (seed 0)" in page and "synthetic" in page and "| without anchor " in page
    assert "| full, lr x0.5 (best rate)" in page and "last checkpoint" in page
    assert "full, lr x0.5 against LoRA + text: -10.0 (" in " ".join(page.split())  # .3 against .4, the rates of the lowest loss
    assert "full, lr x0.5 against LoRA + text: -10.0 (" in said
    assert "| without anchor " in said and str(folder / "ablation.md") in said
    assert (folder / "ablation.png").stat().st_size > 10_000


def test_a_seed_that_fails_is_said_and_the_grid_is_compared_on_the_seed_that_it_has(runner, tmp_path, capsys):
    runner.failing.add(("full, seed 3", ADAPTER))
    assert __main__.main([*runner.arguments, "--seeds", "1", "2", "3", "--arms", *NAMES[1:7]]) == 1
    table = pd.read_csv(tmp_path / "ablate" / "no" / "ablation.csv").set_index("model")
    assert list(table.index) == ["reference", "base", *NAMES[1:7]]
    assert list(table.seeds[NAMES[1:7]]) == [3, 1, 1, 2, 1, 1]
    assert table.state["full"].startswith(f"1 of 3 seeds failed: {ADAPTER} failed, see {tmp_path}")
    assert list(table.index[table["best rate"]]) == [REFERENCE, "full, lr x0.5"]
    said, page = capsys.readouterr().out, (tmp_path / "ablate" / "no" / "ablation.md").read_text()
    assert "| full (1 of 3 seeds failed)" in said and "3 trainings per arm (seeds 1, 2, 3), one at the other" in page


ALL = {(name, stage) for name in NAMES for stage in TRAINED_IN}


@pytest.mark.parametrize(("failing", "failed"), [
    ({("full", SYNTHETIC)}, ["full"]),
    ({(REFERENCE, ADAPTER)}, [REFERENCE]),
    ({(REFERENCE, ANCHOR)}, [REFERENCE, *NAMES[8:]]),  # theirs too
    (ALL, NAMES),
], ids=["an arm", "the reference", "a common stage", "all"])  # fmt: skip
def test_a_failed_arm_is_shown_and_the_others_are_reported(runner, tmp_path, capsys, failing, failed):
    runner.failing.update(failing)
    assert __main__.main(runner.arguments) == 1
    table = pd.read_csv(tmp_path / "ablate" / "no" / "ablation.csv").set_index("model")
    assert [arm for arm in NAMES if table.state[arm] != "done"] == failed and set(NAMES) <= set(table.index)
    said = capsys.readouterr().out
    assert all(f"| {arm} (failed)" in said for arm in failed)
    assert all(f"failed, see {tmp_path}" in table.state[arm] for arm in failed)
    if failed == ["full"]:
        assert table.CER["without synthetic"] == pytest.approx(0.8)


def test_an_arm_whose_results_cannot_be_read_has_failed(runner, tmp_path, capsys):
    arguments = [*runner.arguments, "--arms", "LoRA", REFERENCE]
    assert __main__.main(arguments) == 0
    judged, = (path for path in (tmp_path / "ablate" / "runs").rglob("judged.csv")
               if "/lora/" in read_json(path.with_name("run.json"))["params"]["adapters_dir"])
    judged.unlink()
    assert __main__.main(arguments) == 1
    assert "| LoRA (failed)" in capsys.readouterr().out


def test_a_second_call_runs_nothing_anew_and_reports_its_own_runs(runner, tmp_path):
    started, failing, arguments = runner.started, runner.failing, runner.arguments
    some = ["--arms", REFERENCE, "without anchor"]
    failing.add((REFERENCE, ADAPTER))
    assert __main__.main([*arguments, *some]) == 1 and len(started) == 3 + 3
    failing.clear()
    assert __main__.main([*arguments, *some]) == 0 and [stage for _, stage, _ in started[6:]] == [ADAPTER, JUDGING]
    first = (tmp_path / "ablate" / "no" / "ablation.csv").read_text()
    assert __main__.main([*arguments, *some]) == 0 and len(started) == 8
    assert __main__.main([*arguments, "recipe={02_synthetic: {steps: 300}}", *some]) == 0 and len(started) == 8 + 3 + 3
    assert __main__.main([*arguments, *some]) == 0 and len(started) == 14  # the newest runs are now of other steps
    assert (tmp_path / "ablate" / "no" / "ablation.csv").read_text() == first


def test_an_interrupt_ends_the_call_and_the_same_call_goes_on(runner, tmp_path, monkeypatch, capsys):
    started, arguments = runner.started, [*runner.arguments, "--arms", "LoRA"]
    start_process = chain.subprocess.Popen

    def interrupt(command, **options):
        if len(started) == 2:
            raise KeyboardInterrupt
        return start_process(command, **options)

    monkeypatch.setattr(chain, "_stop_process", lambda process: None)
    monkeypatch.setattr(chain.subprocess, "Popen", interrupt)
    assert __main__.main(arguments) == 130 and "the same command goes on from here" in capsys.readouterr().out
    monkeypatch.setattr(chain.subprocess, "Popen", start_process)
    assert __main__.main(arguments) == 0 and [stage for _, stage, _ in started] == [ANCHOR, SYNTHETIC, ADAPTER, JUDGING]


@pytest.mark.parametrize("arguments, message", [
    (["--set", "method=full"], "method is set by the arms"),
    (["--set", "clipz=3"], "unknown parameter 'clipz'"),
    (["--set", "steps=many"], "command line: steps is 'many'"),
    (["--set", "train_text=true"], "train_text is set by the arms"),
    (["--set", "recipe={03_adapter: {epochs: 3}}"], "01_anchor, 02_synthetic of profile mini count steps and the others epochs"),
    (["--set", "base_model=models/none"], "models/none"),
    (["--arms", "LoRA", "ful"], "no arm 'ful'; did you mean full? The arms are LoRA; LoRA"),
    (["--langs", "xx"], "no language 'xx' is taught here"),
    (["--set", "audio=clips"], "audio is 'clips', a parameter of 00_mimi_sanity, and none of the chosen stages"),
])  # fmt: skip
def test_bad_parameters_stop_everything_before_it_starts(runner, capsys, arguments, message):
    assert __main__.main(arguments) == 2
    assert message in capsys.readouterr().err and not runner.started
