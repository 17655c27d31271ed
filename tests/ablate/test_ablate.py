"""Arms differ in one thing and cost the same; they are compared by last checkpoints, over seeds and held-out sentences."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import yaml

from csm_nb import audio, paths, recipe
from csm_nb.ablate import __main__, arms
from csm_nb.ablate.arms import ADAPTER, ANCHOR, JUDGING, REFERENCE, STEPS, SYNTHETIC
from csm_nb.ablate.report import compare_arms, pick_rates, two_way_interval
from csm_nb.processes import identify_process
from csm_nb.provenance import read_json, write_json
from csm_nb.runs import folders
from csm_nb.runs.__main__ import read_overrides
from csm_nb.runs.params import check_params, load_params, read_cell

POPEN = subprocess.Popen
ARMS = ["LoRA", "LoRA + text", "LoRA + text, lr x0.5", "LoRA + text, lr x2", "full", "full, lr x0.5", "full, lr x2",
        "without anchor", "without synthetic", "data 1/8", "data 1/4", "data 1/2"]
SIZES = {"anchor_steps": 60, "synthetic_steps": 750, "adapter_steps": 100, "lr": 3.0e-3, "adapter_lr": 1.0e-3,
         "synthetic_clips": 3000, "corpus_clips": 201}
# Character error rates of the held-out sentences, by arm; of the probes 0.9 throughout
RATES = {"lora": [0.4, 0.5, 0.6], "lora_text": [0.3, 0.5, 0.4], "lora_text_lr_x0_5": [0.1, 0.2, 0.3],
         "lora_text_lr_x2": [0.9, 0.8, 0.9], "full": [0.3, 0.4, 0.2], "full_lr_x0_5": [0.3, 0.3, 0.3],
         "full_lr_x2": [0.5, 0.5, 0.5], "without_anchor": [0.3, 0.5, 0.5], "without_synthetic": [0.7, 0.8, 0.9],
         "data_1_8": [0.6, 0.6, 0.6], "data_1_4": [0.5, 0.5, 0.5], "data_1_2": [0.4, 0.5, 0.4]}
LOSSES = {"lora_text_lr_x0_5": 4.6, "full_lr_x0_5": 4.4}  # after 03; of all others 4.5


def read_command(command):
    """Return ({option: its values}, {key: value} of --set) of a call of csm_nb.runs."""
    options = {}
    for word in command[3:]:
        if word.startswith("--"):
            options[word] = values = []
        else:
            values.append(word)
    pairs = [word.split("=", 1) for word in options["--set"]]
    return options, {key: yaml.safe_load(value) if value else "" for key, value in pairs}


def pretend_stage(stage, params, folder):
    """Leave what a stage leaves: its records, an adapter, and from 04 the judged sentences."""
    if (folder / "done.json").is_file():
        return False
    (folder / "adapter").mkdir(parents=True)
    inputs, name = folders.find_inputs(params), folders.name_trained(params, params["language"])
    if stage == JUDGING:
        rates = RATES[folder.parents[3].name]
        rows = [{"model": model, "text": f"setning {i}", "probe": i == 0, "heard": params["language"], "cer": rate, "ended": True}
                for model, shift in ((name, 0), ("base", 0.1), ("reference", -0.2))
                for i, rate in enumerate([0.9, *(round(rate + shift, 3) for rate in rates)])]
        rows.append(rows[-1] | {"model": "base", "cer": 0.0})
        frame = pd.DataFrame(rows).assign(language=params["language"], confidence=0.9, transcript="null")
        frame.loc[frame.index[-1], "language"] = "en"
        frame.to_csv(folder / "judged.csv", index=False)
    else:
        for place in (folder / "adapter", *([paths.resolve_path(params["adapters_dir"]) / name] if stage == ADAPTER else [])):
            place.mkdir(parents=True, exist_ok=True)
            (place / recipe.TRAINED[params["method"]]).write_text(json.dumps([stage, inputs, params.get("init_adapter")]))
        loss = LOSSES.get(folder.parents[3].name, 4.5)
        metrics = {"trained_steps": params[STEPS[stage]], "last_loss": loss, "trained_parameters_m": 0.97, "verdict": "learned"}
        write_json(folder / "metrics.json", metrics)
    write_json(folder / "run.json", {"params": params, "inputs": inputs, "seconds": 10.0})
    write_json(folder / "done.json", {"verdict": "learned"})
    return True


class Pretended:
    """Stands for csm_nb.runs as a process: its stages are done when it is started, or it fails."""

    calls, made, environments, failing = [], [], [], set()
    pid = 2**30  # of no process

    def __init__(self, command, env, **options):
        options, overrides = read_command(command)
        arm, (language,) = overrides["runs_dir"].split("/")[-2], options["--langs"]
        self.calls.append((arm, options["--stages"], overrides))
        self.environments.append(env)
        self.returncode = 1 if {arm, (arm, overrides.get("seed"))} & self.failing else 0
        found = {}
        for stage in options["--stages"] if self.returncode == 0 else ():
            values, _ = load_params([f"params/{language}.yaml", f"params/{options['--profile'][0]}.yaml"], overrides)
            params = check_params(stage, values | {"language": language})
            if params.get("init_adapter") in found:
                params["init_adapter"] = paths.show_path(found[params["init_adapter"]] / "adapter")
            key = f"{abs(hash(json.dumps([params, folders.find_inputs(params)], sort_keys=True))):x}"
            found[stage] = paths.resolve_path(params["runs_dir"]) / language / stage / key
            if pretend_stage(stage, params, found[stage]):
                self.made.append((arm, stage))

    def poll(self):
        return self.returncode


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """Return the pretended runner and the arguments of a call whose runs lie in tmp_path."""
    for name in ("calls", "made", "environments", "failing"):
        monkeypatch.setattr(Pretended, name, type(getattr(Pretended, name))())
    monkeypatch.setattr(subprocess, "Popen", Pretended)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    handler = signal.getsignal(signal.SIGTERM)
    yield Pretended, ["--langs", "no", "--profile", "mini", "--jobs", "1", "--set", f"runs_dir={tmp_path}"]
    signal.signal(signal.SIGTERM, handler)


def test_arms_cost_the_same_and_differ_in_one_thing():
    cost = 1.5
    planned = arms.plan_arms(SIZES, cost)
    assert list(planned) == ARMS
    for name, calls in planned.items():
        sizes, steps = dict(SIZES), 0
        for stages, overrides in calls:
            steps += sum((sizes | overrides)[STEPS[stage]] for stage in stages if stage in STEPS)
        spent = steps * (cost if name.startswith("full") else 1)
        assert spent == pytest.approx(910, abs=2), name
    (_, overrides), judging = planned["full"]
    same = {"choice": "last", "seed": 0}
    assert overrides == same | {
        "method": "full", "train_text": True, "anchor_steps": 40, "synthetic_steps": 500, "adapter_steps": 67,
        "lr": pytest.approx(3.0e-3 * arms.FULL_LR), "adapter_lr": pytest.approx(1.0e-3 * arms.FULL_LR)}
    assert judging == ((JUDGING,), {"method": "full"})
    assert [calls[0][1]["train_text"] for calls in planned.values()] == [False, *[True] * 11]
    first, second, _ = planned["without anchor"]
    assert first == ((SYNTHETIC,), same | {"method": "lora", "train_text": True, "init_adapter": "", "synthetic_steps": 810})
    assert second == ((ADAPTER,), same | {"method": "lora", "train_text": True, "init_adapter": SYNTHETIC})
    assert planned["without synthetic"][0] == ((ANCHOR, ADAPTER), same | {
        "method": "lora", "train_text": True, "init_adapter": ANCHOR, "adapter_steps": 850})


def test_every_stage_of_every_arm_keeps_its_last_checkpoint_and_all_are_judged_by_the_same_sentences():
    for seed in (0, 7):
        for arm, calls in arms.plan_arms(SIZES, 1.5, seed).items():
            *trained, (names, judging) = calls
            assert all(overrides["choice"] == "last" and overrides["seed"] == seed for _, overrides in trained), arm
            assert names == (JUDGING,) and "seed" not in judging  # 04 draws its sentences by its seed


def test_full_has_the_grid_of_learning_rates_that_lora_has():
    planned = {arm: calls[0][1] for arm, calls in arms.plan_arms(SIZES, 1.5).items()}
    for arm, scale in ((REFERENCE, 1.0), ("full", arms.FULL_LR)):
        rates = [planned[arms.name_rate(arm, factor)].get("lr", 3.0e-3) for factor in (0.5, 1, 2)]
        assert rates == pytest.approx([scale * factor * 3.0e-3 for factor in (0.5, 1, 2)])
        assert planned[arms.name_rate(arm, 2)]["adapter_lr"] == pytest.approx(2 * scale * 1.0e-3)
    changed = {"lr", "adapter_lr"}
    assert {key: value for key, value in planned["full, lr x2"].items() if key not in changed} == {
        key: value for key, value in planned["full"].items() if key not in changed}


def test_arms_of_less_data_have_a_share_of_the_corpus_and_all_the_steps():
    planned = {arm: calls[0][1] for arm, calls in arms.plan_arms(SIZES, 1.5).items()}
    clips = {arm: (planned[arm]["synthetic_clips"], planned[arm]["corpus_clips"]) for arm in ARMS[-3:]}
    assert clips == {"data 1/8": (375, 26), "data 1/4": (750, 51), "data 1/2": (1500, 101)}
    for arm in clips:
        rest = {key: value for key, value in planned[arm].items() if not key.endswith("_clips")}
        assert rest == planned[REFERENCE]


def test_shares_are_of_the_clips_that_a_corpus_has(tmp_path):
    rows = [{"text": f"Setning {i}.", "audio_path": f"{i}.wav", "speaker_id": "a", "language": "no"} for i in range(80)]
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number in range(2):  # so many are there, and can be told apart: it is no corpus otherwise
        audio.write_audio(tmp_path / f"{number}.wav", np.ones(24_000))
    works = arms.plan_works(["no"], "mini", {"corpus": str(manifest), "corpus_clips": 50_000})
    clips = {work.arm: work.calls[0][1].get("corpus_clips") for work in works}
    assert [clips[arm] for arm in ARMS[-4:]] == [50_000, 10, 20, 40]
    with pytest.raises(recipe.ParameterError, match="nothing of language 'sv'"):
        arms.plan_works(["sv"], "mini", {"corpus": str(manifest)})


def test_a_step_of_full_fine_tuning_costs_half_as_much_again_unless_the_adapter_is_large():
    params = {"base_model": "models/csm-mini", "rank": 1, "alpha": 2, "dropout": 0.0, "train_mlp": False, "depth_ratio": 0.125}
    assert arms.compare_costs(params) == pytest.approx(1.5, rel=0.01)
    # counted by hand: 2.65 M weights and 0.70 M of the adapter in the backbone, 0.42 and 0.16 in the depth decoder, heads
    assert arms.compare_costs(params | {"rank": 32, "alpha": 64, "train_mlp": True}) == pytest.approx(1.07, abs=0.02)


@pytest.mark.parametrize("profile", ["mini", "test"])
def test_every_override_is_a_parameter_of_a_notebook_of_its_call(profile):
    for work in arms.plan_works(["no", "da"], profile):
        for stages, overrides in work.calls:
            known = set().union(*(read_cell(stage) for stage in stages))
            assert set(overrides) - known <= {"compare", "sentences", "adapters_dir"}, work  # of 03 and 04, in the other call


def test_calls_say_what_the_arms_say(runner, tmp_path):
    pretended, arguments = runner
    assert __main__.main([*arguments, "seed=3"]) == 0
    stages = {arm: [short for call, names, _ in pretended.calls if call == arm for short in (" ".join(n[:2] for n in names),)]
              for arm in RATES}
    usual = ["01 02 03", "04"]
    assert stages == dict.fromkeys(RATES, usual) | {"without_anchor": ["02", "03", "04"], "without_synthetic": ["01 03", "04"]}
    for arm, names, overrides in pretended.calls:
        place, known = tmp_path / "ablate" / arm / "seed-3", {key for stage in names for key in read_cell(stage)}
        wanted = {"runs_dir": str(place), "adapters_dir": str(place / "models"), "seed": 3, "sentences": arms.SENTENCES,
                  "compare": ["no"]}
        assert {key: overrides.get(key) for key in wanted} == {key: wanted[key] if key in known else None for key in wanted}
        assert not set(overrides) - known  # csm_nb.runs refuses what none of its stages has
        assert type(overrides.get("lr", 0.1)) is float  # as YAML reads it again, also 2.0e-05
    folder, = (tmp_path / "ablate" / "without_anchor" / "seed-3" / "no" / SYNTHETIC).iterdir()
    later = [overrides for arm, names, overrides in pretended.calls if arm == "without_anchor" and names == [ADAPTER]]
    assert later[0]["init_adapter"] == str(folder / "adapter")
    assert pretended.environments[0]["OMP_NUM_THREADS"]


def test_each_arm_is_reported_over_held_out_sentences_against_the_reference(runner, tmp_path, capsys):
    assert __main__.main(runner[1]) == 0
    folder = tmp_path / "ablate" / "no"
    table = pd.read_csv(folder / "ablation.csv").set_index("model")
    assert list(table.index) == ["reference", "base", *ARMS]
    assert (table.sentences == 3).all() and table.CER["LoRA"] == 0.5  # not the probe's 0.9
    assert table.CER["base"] == pytest.approx(0.6)  # once, of the first arm, in the language only
    assert table.difference["without anchor"] == pytest.approx(0.1 / 3, abs=1e-3)
    assert np.isnan(table.difference[REFERENCE]) and table.difference["full"] < 0
    assert list(table.index[table["best rate"]]) == [REFERENCE, "full, lr x0.5"]  # by loss: the least CER has another
    assert (table.seeds == 1).all()
    assert table.compute[ARMS].to_numpy() == pytest.approx(1, abs=0.01)
    assert list(table.seconds[ARMS]) == [30] * 7 + [20, 20] + [30] * 3
    page, said = (folder / "ablation.md").read_text(), capsys.readouterr().out
    assert "One training per arm (seed 0)" in page and "synthetic" in page and "| without anchor " in page
    assert "| full, lr x0.5 (best rate)" in page and "last checkpoint" in page
    assert "full, lr x0.5 against LoRA + text: -10.0 (" in " ".join(page.split())  # .3 against .4, the rates of the lowest loss
    assert "full, lr x0.5 against LoRA + text: -10.0 (" in said
    assert "| without anchor " in said and str(folder / "ablation.md") in said
    assert (folder / "ablation.png").stat().st_size > 10_000


def test_paired_differences_are_by_sentence_and_leave_probes_out():
    texts = [f"{i}" for i in range(12)]
    hard = np.linspace(0, 1, 12)  # sentences differ far more than arms do
    rows = pd.concat([
        pd.DataFrame({"model": model, "seed": 0, "language": "no", "text": order, "probe": [text == "0" for text in order],
                      "heard": "no", "cer": [0.8 * hard[int(text)] + worse for text in order], "ended": True})
        for model, order, worse in ((REFERENCE, texts, 0), ("other", texts[::-1], 0.1))
    ])
    table = compare_arms(rows).set_index("model")
    assert list(table.loc["other", ["difference", "difference low", "difference high"]]) == [0.1, 0.1, 0.1]
    assert (table.sentences == 11).all()
    assert table.loc["other", "CER low"] < table.loc[REFERENCE, "CER high"]
    alone = compare_arms(rows[rows.model == "other"])
    assert alone.difference.isna().all() and len(alone) == 1


def judge_trainings(effects, texts=40, noise=0.1, seed=0):
    """Rows as 04 leaves them: {model: [what each seed of it adds to the CER]}."""
    rng = np.random.default_rng(seed)
    hard = rng.uniform(0.2, 0.6, texts)
    return pd.DataFrame([
        {"model": model, "seed": number, "language": "no", "text": str(text), "probe": False, "heard": "no", "ended": True,
         "cer": hard[text] + added + rng.normal(0, noise)}
        for model, seeds in effects.items() for number, added in enumerate(seeds) for text in range(texts)
    ])


def test_trainings_that_differ_by_seed_widen_the_interval():
    alike = compare_arms(judge_trainings({REFERENCE: [0, 0, 0], "other": [0.1, 0.1, 0.1]})).set_index("model").loc["other"]
    apart = compare_arms(judge_trainings({REFERENCE: [0, 0, 0], "other": [-0.1, 0.1, 0.3]})).set_index("model").loc["other"]
    assert alike.difference == pytest.approx(0.1, abs=0.03) and apart.difference == pytest.approx(0.1, abs=0.03)
    assert alike["difference low"] > 0 > apart["difference low"]  # over sentences alone, both were certain
    assert alike.seeds == 3 and alike.sentences == 40


def test_the_interval_is_over_seeds_and_sentences():
    rng = np.random.default_rng(0)
    seeds, texts = rng.normal(0, 1, (6, 1)), rng.normal(0, 1, (1, 50))
    low, high = two_way_interval(seeds + texts)
    expected = 2 * 1.96 * (seeds.var() / 6 + texts.var() / 50) ** 0.5
    assert high - low == pytest.approx(expected, rel=0.1)
    assert two_way_interval(np.full((3, 5), 0.2)) == pytest.approx((0.2, 0.2))
    assert np.isnan(two_way_interval(np.zeros((0, 5)))).all() and np.isnan(two_way_interval([])).all()
    one = two_way_interval(texts)
    assert one[1] - one[0] == pytest.approx(2 * 1.96 * (texts.var() / 50) ** 0.5, rel=0.1)


def test_a_seed_that_one_arm_lacks_is_left_out_of_the_difference_and_the_base_stands_against_all():
    rows = judge_trainings({REFERENCE: [0, 0.2], "other": [0.1], "base": [0.3]}, noise=0)
    table = compare_arms(rows).set_index("model")
    assert table.difference["other"] == pytest.approx(0.1) and table.seeds["other"] == 1
    assert table.difference["base"] == pytest.approx(0.2)  # against the mean of 0 and 0.2
    assert table.loc[REFERENCE, "seeds"] == 2


def test_all_heard_right_is_not_certain():
    table = compare_arms(judge_trainings({REFERENCE: [0, 0]}, texts=16))
    assert (table["heard right"] == 1).all() and table.low[0] == pytest.approx(0.806, abs=1e-3)


def test_a_clip_that_babbles_counts_as_one():
    rows = judge_trainings({REFERENCE: [0]}, texts=2, noise=0)
    rows["cer"] = [0.2, 20.0]
    assert compare_arms(rows).CER[0] == pytest.approx(0.6)


def test_each_grid_stands_by_the_rate_with_the_lowest_loss():
    losses = {"LoRA": 1.0, REFERENCE: 4.5, "LoRA + text, lr x2": 4.4, "full": 4.6, "full, lr x0.5": 4.7}
    assert pick_rates(losses) == {REFERENCE: "LoRA + text, lr x2", "full": "full"}
    assert pick_rates({"LoRA": 1.0}) == {}


def test_each_seed_trains_every_arm_and_one_that_fails_is_said(runner, tmp_path, capsys):
    pretended, arguments = runner
    pretended.failing.add(("full", 2))
    assert __main__.main([*arguments, "--seeds", "1", "2"]) == 1
    seeds = {(arm, overrides["seed"]) for arm, names, overrides in pretended.calls if names != [JUDGING]}
    assert seeds == {(arm, seed) for arm in RATES for seed in (1, 2)}
    assert {overrides.get("seed") for _, names, overrides in pretended.calls if names == [JUDGING]} == {None}
    table = pd.read_csv(tmp_path / "ablate" / "no" / "ablation.csv").set_index("model")
    assert list(table.index) == ["reference", "base", *ARMS]
    assert table.seeds["full"] == 1 and table.seeds["LoRA"] == 2 and table.state["full"].startswith("1 of 2 seeds failed: see ")
    said = capsys.readouterr().out
    assert "| full (1 of 2 seeds failed: see log)" in said and "2 trainings per arm (seeds 1, 2)" in (
        tmp_path / "ablate" / "no" / "ablation.md").read_text()


@pytest.mark.parametrize("failing", [{"full"}, {"lora_text"}, set(RATES)], ids=["an arm", "the reference arm", "all"])
def test_a_failed_arm_is_shown_and_the_others_are_reported(runner, tmp_path, capsys, failing):
    runner[0].failing |= failing
    assert __main__.main(runner[1]) == 1
    table = pd.read_csv(tmp_path / "ablate" / "no" / "ablation.csv").set_index("model")
    failed = [arm for arm in ARMS if table.state[arm] != "done"]
    assert len(failed) == len(failing) and set(ARMS) <= set(table.index)
    said = capsys.readouterr().out
    assert all(f"| {arm} (failed: see log)" in said for arm in failed)
    assert f"failed: see {tmp_path / 'ablate' / failing.copy().pop()}" in "".join(table.state[failed])
    if failing == {"full"}:
        assert table.CER["without synthetic"] == pytest.approx(0.8)


def test_an_arm_whose_results_cannot_be_read_has_failed(runner, tmp_path, capsys):
    assert __main__.main(runner[1]) == 0
    judged, = (tmp_path / "ablate" / "lora" / "seed-0" / "no" / JUDGING).glob("*/judged.csv")
    judged.unlink()
    assert __main__.main(runner[1]) == 1
    assert "| LoRA (failed: see log)" in capsys.readouterr().out


def test_a_second_call_runs_nothing_anew_and_reports_its_own_runs(runner, tmp_path):
    pretended, arguments = runner
    assert __main__.main(arguments) == 0
    first = (tmp_path / "ablate" / "no" / "ablation.csv").read_text()
    made = len(pretended.made)
    assert made == 4 * 10 + 3 + 3
    assert __main__.main(arguments) == 0 and len(pretended.made) == made
    assert __main__.main([*arguments, "synthetic_steps=300"]) == 0 and len(pretended.made) > made
    assert __main__.main(arguments) == 0  # the newest runs are now of other steps
    assert (tmp_path / "ablate" / "no" / "ablation.csv").read_text() == first
    chain = [read_json(work / "run.json")["params"] for work in (tmp_path / "ablate" / "without_anchor").glob("*/no/03*/*")]
    assert len({params["init_adapter"] for params in chain}) == 2


@pytest.mark.parametrize("arguments, message", [
    (["--set", "method=full"], "method is set by the arms"),
    (["--set", "clipz=3"], "unknown parameter 'clipz'"),
    (["--set", "adapter_steps=many"], "adapter_steps is 'many'"),
    (["--set", "base_model=models/none"], "models/none"),
    (["--langs", "xx"], "no language 'xx' is taught here"),
    (["--set", "audio=clips"], "audio is 'clips', a parameter of 00_mimi_sanity, and none of the chosen stages"),
])  # fmt: skip
def test_bad_parameters_stop_everything_before_it_starts(runner, capsys, arguments, message):
    assert __main__.main(arguments) == 2
    assert message in capsys.readouterr().err and not runner[0].calls


def test_values_come_back_from_the_command_line_as_they_were():
    for value in (2.0e-5, 0.0006, 3, True, "", "no", ["no", "sv"], "a path/with: signs", "x" * 200):
        assert read_overrides([f"key={arms.write_value(value)}", "seed=1"]) == {"key": value, "seed": 1}


def test_a_call_that_a_killed_ablation_left_is_ended_before_its_arm_goes_on(runner, tmp_path):
    assert __main__.main(runner[1]) == 0
    call = sorted((tmp_path / "ablate").rglob("no.json"))[0]
    left = POPEN([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    write_json(call, {"ablation": identify_process(), "call": identify_process(left.pid)})  # of one that is at work
    assert __main__.main(runner[1]) == 0 and left.poll() is None
    write_json(call, {"ablation": [2**30, 0.0], "call": identify_process(left.pid)})
    assert __main__.main(runner[1]) == 0
    assert left.wait(60) == -signal.SIGTERM


def test_an_interrupt_ends_the_calls_that_run(monkeypatch, tmp_path):
    started = []

    def start(command, **options):
        started.append(POPEN([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True))
        return started[-1]

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(time, "sleep", interrupt)
    works = arms.plan_works(["no"], "mini", {"runs_dir": str(tmp_path)})
    before = time.time()
    with pytest.raises(KeyboardInterrupt):
        __main__.run_works(works, "mini", jobs=2)
    assert len(started) == 2 and all(process.poll() is not None for process in started) and time.time() - before < 60
