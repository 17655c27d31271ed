"""Headless runs: done stages are skipped, failures are kept and shown, an interrupt loses nothing that is finished."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import nbformat
import numpy as np
import psutil
import pytest

from csm_nb import paths
from csm_nb.audio import write_audio
from csm_nb.corpora.sources import load_corpus
from csm_nb.manifest import write_manifest
from csm_nb.paths import STAGES
from csm_nb.processes import is_running
from csm_nb.provenance import read_json
from csm_nb.recipe import ParameterError
from csm_nb.runs import __main__
from csm_nb.runs import chain as runs_chain
from csm_nb.runs.chain import Task, _restore_adapter, plan_tasks, run_tasks


def write_torch(project):
    """Put a stub into a project: importing the real torch would take most of the time of a notebook that only seeds it."""
    stub = "class cuda:\n    is_available = lambda: False\n\nmanual_seed = set_num_threads = print\nget_num_threads = int\n"
    (project / "torch.py").write_text(stub)


def start(project, *arguments):
    write_torch(project)
    # the runner sees to it that notebooks import its own package, whichever is installed
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-m", "csm_nb.runs", *arguments]
    return subprocess.Popen(  # a suite that a shell runs in the background has Ctrl-C ignored, and hands that down
        command, cwd=project, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def call(project, *arguments):
    process = start(project, *arguments)
    output = process.communicate(timeout=300)[0]
    return process.returncode, output


def put_cell(project, stage, source, at=-1):
    """Put a code cell into a notebook, before its last one."""
    path = project / "notebooks" / f"{stage}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(at if at >= 0 else len(notebook.cells) + at, nbformat.v4.new_code_cell(source))
    nbformat.write(notebook, path)


def find_run(project, stage, language="da"):
    (folder,) = (project / "runs" / language / stage).iterdir()
    return folder


def test_finished_stages_are_skipped_and_the_index_links_them(project):
    stages = ["00_mimi_sanity", "01_anchor", "02_synthetic"]
    code, output = call(project, "--langs", "da", "--stages", *stages)
    assert code == 0, output
    times = {}
    for stage in stages:
        folder = find_run(project, stage)
        assert read_json(folder / "run.json")["params"]["lr"] == 2.0e-3  # of the profile
        times[stage] = (folder / "notebook.ipynb").stat().st_mtime_ns
        assert f"da/{stage}/{folder.name}/notebook.html" in (project / "runs" / "index.html").read_text()
        assert (folder / "notebook.html").is_file()
    made = find_run(project, "01_anchor") / "adapter"
    assert read_json(find_run(project, "02_synthetic") / "run.json")["inputs"]["init_adapter"]["path"] == str(
        made.relative_to(project)
    )
    code, output = call(project, "--langs", "da", "--stages", *stages)
    assert code == 0 and output.count("(skipped: done before)") == 3, output
    assert times == {stage: (find_run(project, stage) / "notebook.ipynb").stat().st_mtime_ns for stage in stages}


def test_a_failed_notebook_is_kept_and_shown_and_what_needs_it_is_not_run(project):
    put_cell(project, "01_anchor", 'import os\nif os.path.exists("broken"): raise ValueError("the clip is gone")')
    (project / "notebooks" / "broken").touch()
    code, output = call(project, "--langs", "da", "--stages", "01_anchor", "02_synthetic")
    folder = find_run(project, "01_anchor")
    assert code == 1
    assert "ValueError: the clip is gone" in output and f"runs/da/01_anchor/{folder.name}/notebook.ipynb" in output
    assert "da 02_synthetic    not run" in output and "(needs 01_anchor)" in output
    record = read_json(folder / "run.json")
    assert record["status"] == "failed" and record["error"] == "ValueError: the clip is gone" and record["versions"]
    index = (project / "runs" / "index.html").read_text()
    assert "the clip is gone" in index and f"{folder.name}/notebook.html" in index

    (project / "notebooks" / "broken").unlink()
    code, output = call(project, "--langs", "da", "--stages", "01_anchor")
    assert code == 0 and find_run(project, "01_anchor") == folder, output
    assert (folder / "notebook.failed-1.ipynb").is_file() and (folder / "notebook.failed-1.html").is_file()


def test_a_kernel_killed_after_its_last_cell_does_not_count_as_done(project):
    put_cell(project, "00_mimi_sanity", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", at=5)
    code, output = call(project, "--langs", "da", "--stages", "00_mimi_sanity")
    folder = find_run(project, "00_mimi_sanity")
    assert code == 1 and "failed" in output
    assert (folder / "metrics.json").is_file() and not (folder / "done.json").exists()
    assert read_json(folder / "run.json")["status"] == "failed"


def test_a_notebook_that_never_finishes_its_run_is_a_failure(project):
    path = project / "notebooks" / "00_mimi_sanity.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1:] = [nbformat.v4.new_code_cell("1 + 1")]
    nbformat.write(notebook, path)
    code, output = call(project, "--langs", "da", "--stages", "00_mimi_sanity")
    assert code == 1
    record = read_json(find_run(project, "00_mimi_sanity") / "run.json")
    assert record["error"] == "the notebook did not reach finish_run", output


@pytest.mark.parametrize("arguments, message", [
    (["--set", "clipz=3"], "command line: unknown parameter 'clipz'"),
    (["--set", "lr=1e-4"], "command line: lr is '1e-4'"),
    (["--set", "language=sv"], "language is set by --langs"),
    (["--audio", "nowhere"], "no "),
    (["--set", "clips=0"], "command line: clips is 0; allowed is from 1 on"),
    (["--set", "init_adapter="], "init_adapter is '', a parameter of 02_synthetic, and none of the chosen stages"),
    (["--audio", "empty"], "audio is 'empty': .* nothing of language 'da'; found: no clip at all"),
    (["--audio", "lost.jsonl"], "audio is 'lost.jsonl': none of its 1 files is there, such as .*gone.wav"),
    (["--audio", "broken.jsonl"], "audio is 'broken.jsonl': .*broken.jsonl: line 1 lacks speaker_id"),
    (["--langs", "xx"], r"no language 'xx' is taught here. The languages are sv \(Swedish: params/sv.yaml\), da .*"),
    (["--langs", "danish"], "no language 'danish' is taught here; did you mean da?"),
    (["--langs", "da", "sv,da"], "no language 'sv,da' .* written with spaces"),
    (["--profile", "minni"], r"no profile 'minni'; did you mean mini\? There are mini \(params"),
    (["--profile", "da"], r"no profile 'da'. There are mini \(params"),
    (["--profile", "my.yaml"], "my.yaml: no such file"),
    (["--profile", "swedish.yaml"], "swedish.yaml: language is 'sv', and this call is for 'da'; leave it out"),
    (["--set", "runs_dir=/proc/x"], r"runs_dir is '/proc/x': /proc is not to be written to \(.*\); allowed is a folder"),
    (["--stages", "02_synthetic"], "run 01_anchor for da first"),
])  # fmt: skip
def test_bad_parameters_stop_everything_before_it_starts(project, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(paths, "ROOT", project)
    monkeypatch.setattr(paths, "NOTEBOOKS", project / "notebooks")
    (project / "empty").mkdir()
    (project / "swedish.yaml").write_text("language: sv")
    row = {"text": "hej", "audio_path": "gone.wav", "language": "da"}
    (project / "broken.jsonl").write_text(json.dumps(row))
    (project / "lost.jsonl").write_text(json.dumps(row | {"speaker_id": "1"}))
    stages = [] if "--stages" in arguments else ["--stages", "00_mimi_sanity"]
    assert __main__.main(["--langs", "da", *stages, *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (project / "runs").exists()


def test_an_interrupt_ends_the_kernel_and_the_next_call_goes_on_from_there(project):
    put_cell(project, "01_anchor", 'import os, time\nwhile not os.path.exists("go-on"): time.sleep(0.1)')
    process = start(project, "--langs", "da", "--stages", "00_mimi_sanity", "01_anchor")
    for _ in range(600):
        anchors = list((project / "runs").glob("da/01_anchor/*/run.json"))
        if anchors:
            break
        time.sleep(0.2)
    kernel = read_json(anchors[0])["process"][0]
    family = psutil.Process(process.pid).children(recursive=True)
    assert kernel in [member.pid for member in family]
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "the same command goes on from here" in output
    assert not psutil.wait_procs(family, timeout=10)[1]
    assert read_json(anchors[0])["status"] == "interrupted"
    assert (find_run(project, "00_mimi_sanity") / "done.json").is_file()

    (project / "notebooks" / "go-on").touch()
    code, output = call(project, "--langs", "da", "--stages", "00_mimi_sanity", "01_anchor")
    assert code == 0 and output.count("skipped: done before)") == 1, output
    assert find_run(project, "01_anchor") == anchors[0].parent


def test_a_second_signal_does_not_stop_the_ending_of_what_is_at_work(tmp_path, monkeypatch):
    ended, task = [], Task("da", "01_anchor", {}, state="running", folder=tmp_path)

    def end(process):
        signal.raise_signal(signal.SIGINT)  # somebody is impatient, and make passes SIGTERM on
        signal.raise_signal(signal.SIGTERM)
        ended.append(process)

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs_chain, "_stop_process", end)
    monkeypatch.setattr(runs_chain, "_is_ready", lambda *_: False)
    monkeypatch.setattr(runs_chain.time, "sleep", interrupt)
    task.process = SimpleNamespace(poll=lambda: None)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run_tasks([task], 1)
    assert ended == [task.process] and task.state == "not run"
    assert read_json(tmp_path / "run.json")["status"] == "interrupted"
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_a_corpus_of_which_nothing_can_be_held_out_is_refused_before_anything_starts(tmp_path):
    def write(name, texts, seconds=1.0):
        rows = [{"text": text, "audio_path": str(write_audio(tmp_path / f"{name}-{i}.wav", np.ones(int(24000 * seconds)) * 0.1)),
                 "speaker_id": "a", "language": "da"} for i, text in enumerate(texts)]
        return str(write_manifest(rows, tmp_path / f"{name}.jsonl"))

    for corpus, message in (
        (write("same", ["Hej med dig.", "hej med dig."]), "corpus_clips is 12: of the 2 clips that are drawn those that can be"),
        (write("long", ["Hej.", "Farvel."], 31.0), r"none can be used, .*long-0.wav: 31.00 s long; allowed are 0.3 to 30 s"),
    ):
        with pytest.raises(ParameterError, match=message):
            plan_tasks(["da"], ["03_adapter"], "test", {"corpus": corpus, "init_adapter": ""})
    good = write("good", ["Hej med dig.", "Farvel."])
    assert plan_tasks(["da"], ["03_adapter"], "test", {"corpus": good, "init_adapter": ""})


WAITING = 'import os, time\nopen(run.dir / "attempts", "a").write("x")\nwhile not os.path.exists("go-on"): time.sleep(0.1)'


def start_and_wait(project):
    """Start a call whose notebook waits; return its process, and the ids of papermill and kernel once the kernel is there."""
    process = start(project, "--langs", "da", "--stages", "01_anchor")
    for _ in range(600):
        if attempts := list((project / "runs").glob("da/01_anchor/*/attempts")):
            break
        time.sleep(0.1)
    folder = attempts[0].parent
    return process, read_json(folder / "runner.json")["papermill"], read_json(folder / "run.json")["process"]


@pytest.mark.parametrize("killed", ["everything", "runner"])
def test_after_kill_9_the_same_command_goes_on_in_the_same_folder_and_nothing_is_left(project, killed):
    put_cell(project, "01_anchor", WAITING)
    process, papermill, kernel = start_and_wait(project)
    for pid in (process.pid, papermill[0], kernel[0]) if killed == "everything" else (process.pid,):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert killed == "everything" or is_running(kernel) and is_running(papermill)
    again = start(project, "--langs", "da", "--stages", "01_anchor")  # at once
    for _ in range(600):
        folder = find_run(project, "01_anchor")  # one and no other
        if (folder / "attempts").read_text() == "xx":
            break
        time.sleep(0.1)
    assert not is_running(kernel) and not is_running(papermill)
    (project / "notebooks" / "go-on").touch()
    output = again.communicate(timeout=120)[0]
    assert again.returncode == 0, output
    assert killed == "everything" or "left at work by a call that was killed" in output
    assert find_run(project, "01_anchor") == folder and read_json(folder / "run.json")["status"] == "done"


@pytest.mark.parametrize("killed", ["papermill", "kernel"])
def test_a_killed_papermill_or_kernel_is_a_failure_that_the_next_call_mends(project, killed):
    put_cell(project, "01_anchor", WAITING)
    process, papermill, kernel = start_and_wait(project)
    os.kill({"papermill": papermill, "kernel": kernel}[killed][0], signal.SIGKILL)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 1, output
    assert not is_running(kernel) and not is_running(papermill)
    error = read_json(find_run(project, "01_anchor") / "run.json")["error"]
    assert ("papermill was ended by signal 9 (SIGKILL)" if killed == "papermill" else "DeadKernelError") in error
    (project / "notebooks" / "go-on").touch()
    code, output = call(project, "--langs", "da", "--stages", "01_anchor")
    assert code == 0, output
    folder = find_run(project, "01_anchor")
    assert read_json(folder / "run.json")["status"] == "done" and (folder / "attempts").read_text() == "xx"


def test_a_second_call_leaves_a_living_one_alone(project):
    put_cell(project, "01_anchor", WAITING)
    process, papermill, kernel = start_and_wait(project)
    first = find_run(project, "01_anchor")
    second = start(project, "--langs", "da", "--stages", "01_anchor")
    for _ in range(600):
        if first.with_name(f"{first.name}.2").is_dir():
            break
        time.sleep(0.1)
    (project / "notebooks" / "go-on").touch()
    output = second.communicate(timeout=120)[0]
    assert (second.returncode, process.wait(60)) == (0, 0), output
    assert "ended" not in output and read_json(first / "run.json")["process"] == kernel
    assert f"another call is at work on it in runs/da/01_anchor/{first.name}, and this one does it again" in output


def test_force_runs_what_is_done_again_beside_it(project):
    assert call(project, "--langs", "da", "--stages", "00_mimi_sanity")[0] == 0
    first = find_run(project, "00_mimi_sanity")
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    code, output = call(project, "--langs", "da", "--stages", "00_mimi_sanity", "--force")
    assert code == 0 and "skipped" not in output, output
    assert read_json(first.with_name(f"{first.name}.2") / "run.json")["status"] == "done"
    assert before == {path: path.stat().st_mtime_ns for path in first.rglob("*")}


class Ended:
    """A process that has ended when it is looked at the second time."""

    def __init__(self):
        self.codes = iter([None, 0])

    def poll(self):
        return next(self.codes)


@pytest.fixture
def pretended(monkeypatch):
    """Run tasks without notebooks; return (what started, in order; how many ran beside each; what is to fail)."""
    started, beside, failing, now = [], [], set(), []

    def start_task(task, threads, force, engine):
        assert task.language not in [language for language, _ in now]
        task.state, task.process = "running", Ended()
        now.append((task.language, task.stage))
        started.append((task.language, task.stage))
        beside.append(len(now))

    def end_task(task):
        task.state = "failed" if (task.language, task.stage) in failing else "done"
        now.remove((task.language, task.stage))

    monkeypatch.setattr(runs_chain, "_start_task", start_task)
    monkeypatch.setattr(runs_chain, "_end_task", end_task)
    monkeypatch.setattr(runs_chain.time, "sleep", lambda seconds: None)
    return started, beside, failing


def plan(languages):
    tasks = {(language, stage): Task(language, stage, {}) for language in languages for stage in STAGES}
    for (language, stage), task in tasks.items():
        before = {"02_synthetic": "01_anchor", "03_adapter": "02_synthetic", "04_confusion": "03_adapter"}.get(stage)
        task.needs = [tasks[language, before]] if before else []
        task.after = [other for other in tasks.values() if stage == "04_confusion" and other.stage == "03_adapter"]
    return list(tasks.values())


def test_languages_run_side_by_side_and_the_comparison_waits_for_every_adapter(pretended):
    started, beside, _ = pretended
    tasks = plan(["no", "sv", "da"])
    run_tasks(tasks, jobs=2)
    assert max(beside) == 2 and len(started) == 18
    for language in ("no", "sv", "da"):
        chain = [stage for code, stage in started if code == language and stage != "05_phonemes"]
        assert chain == sorted(chain)
    first = min(n for n, (_, stage) in enumerate(started) if stage == "04_confusion")
    assert sum(stage == "03_adapter" for _, stage in started[:first]) == 3


def test_a_failure_stops_its_own_chain_only(pretended):
    started, _, failing = pretended
    failing.add(("no", "01_anchor"))
    tasks = plan(["no", "da"])
    run_tasks(tasks, jobs=1)
    states = {(task.language, task.stage): task.state for task in tasks}
    assert [states["no", stage] for stage in STAGES] == ["done", "failed", "not run", "not run", "not run", "done"]
    assert {states["da", stage] for stage in STAGES} == {"done"}


def test_every_stage_of_every_shipped_language_passes_the_check():
    tasks = plan_tasks(["no", "sv", "da", "de", "fr", "es", "nl", "it", "pl"], STAGES, "mini")
    assert len(tasks) == 54
    chains = {task.stage: [need.stage for need in task.needs] for task in tasks if task.language == "no"}
    assert chains["02_synthetic"] == ["01_anchor"] and chains["04_confusion"] == ["03_adapter"]


@pytest.mark.parametrize(("words", "values"), [
    (["seed=1", "codebooks=[1]", "corpus="], {"seed": 1, "codebooks": [1], "corpus": ""}),
    (["codebooks=[1, 8] seed=1"], {"codebooks": [1, 8], "seed": 1}),  # of make: one word
    (["codebooks=[1,", "8]", "seed=1"], {"codebooks": [1, 8], "seed": 1}),  # of a shell without quotes
    (["codebooks=[", "1", ",8", "]"], {"codebooks": [1, 8]}),
    (["corpus_licence=CC BY 4.0", "clips=3"], {"corpus_licence": "CC BY 4.0", "clips": 3}),
    (["corpus_licence='a b=1' method=full"], {"corpus_licence": "a b=1", "method": "full"}),
    (['compare=["no", "sv"]'], {"compare": ["no", "sv"]}),
    (["corpus=/it's here/m.jsonl"], {"corpus": "/it's here/m.jsonl"}),
    (["corpus=/my corpus, æøå: nr 1/m.jsonl", "engine={name: azure}"],
     {"corpus": "/my corpus, æøå: nr 1/m.jsonl", "engine": {"name": "azure"}}),
    (["lr=3.0e-4", "lid_model=~/a-b/c"], {"lr": 3e-4, "lid_model": "~/a-b/c"}),
    ([" "], {}),
])  # fmt: skip
def test_values_with_spaces_survive_shell_and_make(words, values):
    assert __main__.read_overrides(words) == values


@pytest.mark.parametrize(("words", "message"), [
    (["codebooks=[1,"], r"--set codebooks=\[1,: not readable as YAML .*a list is \[1, 8\]"),
    (["clips"], "--set clips: write KEY=VALUE"),
    (["clips", "seed=1"], "--set clips seed=1: write KEY=VALUE"),
    (["seed=1", "seed=2"], "seed is given twice"),
    (["recipe={rank: 8, rank: 16}"], "--set recipe=.*rank is given twice, in line 1"),
    (["marks='a"], "not readable as YAML"),
    (["audio=a: b: c"], "not readable as YAML"),
    (["day=2026-99-99"], "not readable as YAML"),
])  # fmt: skip
def test_what_is_no_value_is_refused_with_the_word_and_no_traceback(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        __main__.parse_arguments(["--set", *words])
    assert re.search(message, capsys.readouterr().err)


def test_marks_and_lexicon_are_read_before_anything_starts(tmp_path):
    (tmp_path / "marks.tsv").write_text("audio\tstart\na\t1\n")
    (tmp_path / "lexicon.csv").write_text("word,sound\na,b\n")
    for stage, key, name, message in ((STAGES[0], "marks", "marks.tsv", "found the columns audio, start; end, stod missing"),
                                      (STAGES[5], "lexicon", "lexicon.csv", "a NB Uttale CSV has")):
        with pytest.raises(ParameterError, match=f"command line: {key} is .*{message}"):
            plan_tasks(["da"], [stage], "test", {key: str(tmp_path / name)})


@pytest.mark.parametrize(("stage", "meant"), [("00", "00_mimi_sanity"), ("03_adaptor", "03_adapter"), ("confusion", STAGES[4])])
def test_an_unknown_stage_is_refused_with_the_nearest(stage, meant, capsys):
    with pytest.raises(SystemExit, match="2"):
        __main__.parse_arguments(["--stages", stage])
    assert f"no stage '{stage}'; did you mean {meant}? The stages are 00_mimi_sanity, 01_anchor" in capsys.readouterr().err


def test_a_relative_path_means_the_same_wherever_it_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert __main__.parse_arguments(["--audio", "clips"]).set == __main__.parse_arguments(["--set", "audio=clips"]).set
    manifest = write_manifest([{"text": "hej", "audio_path": "a.wav", "speaker_id": "1", "language": "da"}], tmp_path / "m.jsonl")
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")  # where a notebook that is run by hand stands
    assert load_corpus("m.jsonl", "da") == load_corpus(manifest, "da")


def test_a_skipped_adapter_is_put_where_the_next_stages_look_for_it(tmp_path):
    made = tmp_path / "run" / "adapter"
    made.mkdir(parents=True)
    (made / "adapter_config.json").write_text("mine")
    task = Task("da", "03_adapter", {"adapters_dir": str(tmp_path / "models")}, folder=tmp_path / "run")
    assert "copied" in _restore_adapter(task)
    assert (tmp_path / "models" / "lora_da" / "adapter_config.json").read_text() == "mine"
    assert _restore_adapter(task) == ""


def test_bad_profile_is_an_error_that_names_the_others():
    with pytest.raises(ParameterError, match="There are csm-1b, mini, test "):
        plan_tasks(["da"], ["01_anchor"], "no-such-profile")
