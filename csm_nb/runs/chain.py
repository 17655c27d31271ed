"""The notebooks without a browser: languages by stages through papermill, each in its own process, done ones skipped.

`python -m csm_nb.runs --langs no sv da --profile mini` checks every parameter first, runs what is not done yet, exports
each notebook as HTML and writes the index. A stage counts as done by the marker of its last cell and exit code 0.
Killed in any of its processes and called again, it ends what is left of them and goes on in the same folder.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from filelock import SoftFileLease

from csm_nb import hub, paths
from csm_nb.cluster import share_cores
from csm_nb.corpora import listed
from csm_nb.paths import STAGES, resolve_path, show_path
from csm_nb.processes import count_cores, end_processes, identify_process, is_running
from csm_nb.provenance import hash_folder, read_json, write_json
from csm_nb.recipe import FIELDS, ParameterError
from csm_nb.runs import folders
from csm_nb.runs.advice import say_next
from csm_nb.runs.pages import export_html
from csm_nb.runs.params import FILES, RECORDINGS, check_inputs, check_params, find_params, load_params, read_cell

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class Task:
    """One stage of one language in this call. `needs` must be done before it, `after` must at least be over.

    Tasks of one language and `arm` (of an ablation) run one after another.
    """

    language: str
    stage: str
    params: dict
    needs: list["Task"] = field(default_factory=list)
    after: list["Task"] = field(default_factory=list)
    arm: str = ""
    origins: dict = field(default_factory=dict)  # where the recipe's fields are from
    state: str = "waiting"
    verdict: str = ""
    note: str = ""
    folder: Path | None = None
    process: subprocess.Popen | None = None
    claim: SoftFileLease | None = None
    started: float = 0.0
    seconds: float = 0.0

    def __str__(self):
        return f"{self.language} {self.arm and f'{self.arm:<29}'}{self.stage:<15}"


def plan_tasks(languages, stages, profile="mini", overrides=None) -> list[Task]:
    """Return the tasks of a call, by language and stage, every parameter of every one checked, and what it names looked at.

    A stage needs the stage that its `init_adapter` names; the one that compares adapters waits for all that train them.
    Raises ParameterError, also for a parameter that no stage of this call has, for recordings that can not be used, and for
    an adapter that no stage of this call makes and no earlier run left; hub.ModelError for a model folder that is not whole.
    """
    if "language" in (overrides or {}):
        raise ParameterError("command line: language is set by --langs (make run LANGS=...), not by --set")
    tasks, stages = {}, sorted(set(stages))
    for language in dict.fromkeys(languages):
        values, origins = load_params(find_params(language, profile), overrides)
        if values.get("language", language) != language:  # a profile's; the language's own file says its own
            raise ParameterError(f"{origins['language']}: language is {values['language']!r}, and this call is for {language!r}; "
                                 "leave it out: the language is chosen by --langs (make run LANGS=...)")
        _check_used(overrides or {}, stages)
        for stage in stages:
            checked = check_params(stage, values | {"language": language}, origins)
            check_inputs(stage, checked, origins)
            _check_files(checked, origins)
            given = {key[1]: place for key, place in origins.items() if key[0] == stage}
            tasks[language, stage] = Task(language, stage, checked, origins=given)
    hub.check_models([task.params for task in tasks.values()])
    for (language, stage), task in tasks.items():
        source = task.params.get("init_adapter")
        if (language, source) in tasks:
            task.needs.append(tasks[language, source])
        elif source:
            found = folders.find_inputs(task.params)["init_adapter"]["path"]
            if source not in STAGES:  # a run of a stage is found by its tag
                _check_tag(task.params, resolve_path(found))
        if stage == "04_confusion":
            task.needs += [tasks[key] for key in [(language, "03_adapter")] if key in tasks]
            task.after = [other for other in tasks.values() if other.stage == "03_adapter"]
    return list(tasks.values())


def _check_used(overrides, stages):
    for key, value in overrides.items():
        there = [stage for stage in STAGES if (paths.NOTEBOOKS / f"{stage}.ipynb").is_file()]
        having = [stage for stage in there if {key, "recipe" if key in FIELDS else key} & read_cell(stage).keys()]
        if not set(having) & set(stages):
            raise ParameterError(f"command line: {key} is {value!r}, a parameter of {', '.join(having)}, and none of the chosen "
                                 f"stages ({', '.join(stages)}) has it; leave it out, or choose a stage that does")


def _check_tag(params, folder):
    """Refuse an adapter that was trained with other tags than this stage is to train with."""
    from csm_nb.csm import tags  # peft takes seconds

    try:
        tags.check_before(tags.read_tags(folder), tags.make_tags(params["tag"], [params["language"], *params["also"]]))
    except tags.TagError as error:
        raise ParameterError(f"init_adapter is {params['init_adapter']!r}: {error}") from error


def _check_files(params, origins):
    """Refuse recordings without a clip of the language, marks and lexica that can not be read, before anything starts.

    A single bad clip is set aside later.
    """
    for key in (*RECORDINGS, *FILES):
        if not params.get(key):
            continue
        found = f"{origins.get(key, 'default')}: {key} is {params[key]!r}"
        names = [name for name, _ in listed.split_corpora(params[key])] if key == "corpus" else [params[key]]
        if any(listed.find_remote(params["language"], name) for name in names if key == "corpus"):
            continue  # what the hub has is seen when it is fetched
        try:
            rows = _read_file(key, names, [params["language"], *(params.get("also", []) if key == "corpus" else [])])
        except (ValueError, OSError) as error:
            raise ParameterError(f"{found}: {error}") from error
        if key in FILES:
            continue
        if not any(os.path.isfile(row["audio_path"]) for row in rows):
            raise ParameterError(f"{found}: none of its {len(rows)} files is there, such as {rows[0]['audio_path']}")
        if key != "corpus" or params.get("pseudo_labels"):  # texts that nobody knows before a recogniser has listened
            continue
        if not any(str(row["text"] or "").strip() for row in rows):
            raise ParameterError(f"{found}: none of its {len(rows)} clips has a text: a manifest's `text`, or a .txt beside each "
                                 "clip of a folder, or pseudo_labels")
        _check_draw(found, params)


def _check_draw(found, params):
    from csm_nb import manifest
    from csm_nb.clips import check
    from csm_nb.corpora import sources

    try:
        check.check_enough(sources.load_corpus(params["corpus"], params["language"], params["corpus_clips"], params["seed"]))
    except manifest.CorpusError as error:
        raise ParameterError(f"{found}, corpus_clips is {params['corpus_clips']}: {error}") from error


def _read_file(key, names, codes):
    from csm_nb.corpora import sources
    from csm_nb.phonemes import ipa
    from csm_nb.prosody import marks

    if key in RECORDINGS:
        return sources.list_taught(names, codes)
    path = resolve_path(names[0])
    return marks.read_marks(path) if key == "marks" else ipa.read_lexicon(path)


def run_tasks(tasks: list[Task], jobs: int, force: bool = False, engine: str = "local") -> None:
    """Run tasks to their end, `jobs` at a time, one of a language and arm at a time; each task then says how it went.

    With `force` what is done is run again, into a folder beside the old one. With the engine ray each runs on a node of the Ray
    that is connected (cluster.start_ray), which finds this disk at the same place.
    On KeyboardInterrupt the running notebooks are ended, so only they are unfinished, and the interrupt goes on.
    """
    threads = str(share_cores(jobs) if engine == "ray" else max(1, count_cores() // jobs))
    try:
        while any(task.state in ("waiting", "running") for task in tasks):
            running = [task for task in tasks if task.state == "running"]
            for task in running:
                if task.process.poll() is not None:
                    _end_task(task)
            ready = [task for task in tasks if task.state == "waiting" and _is_ready(task, tasks)]
            if ready and sum(task.state == "running" for task in tasks) < jobs:
                _start_task(min(ready, key=lambda task: task.stage), threads, force, engine)
            else:
                time.sleep(0.1)
    except BaseException:  # no notebook outlives this process
        with _ignore_signals():
            for task in tasks:
                if task.state == "running":
                    _stop_process(task.process)
                    _end_kernel(task.folder)
                    _record_failure(task, "interrupted", "Ctrl-C")
                    if task.claim:
                        task.claim.release()
                    task.state, task.note = "not run", f"interrupted; {show_path(task.folder)}"
                elif task.state == "waiting":
                    task.state = "not run"
        raise


@contextlib.contextmanager
def _ignore_signals():
    """Let no second Ctrl-C, or make's SIGTERM beside that of `timeout`, stop the ending and leave kernels at work."""
    mine = threading.current_thread() is threading.main_thread()  # others may not set handlers
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ENDING} if mine else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_ready(task, tasks):
    broken = [need for need in task.needs if need.state in ("failed", "not run")]
    if broken:
        task.state, task.note = "not run", f"needs {broken[0].stage}"
        print(f"{_clock()}  {task} not run ({task.note})", flush=True)
    mine = task.language, task.arm
    busy = any((other.language, other.arm) == mine and other.state == "running" for other in tasks)
    over = all(other.state not in ("waiting", "running") for other in task.needs + task.after)
    return task.state == "waiting" and over and not busy


def _start_task(task, threads, force=False, engine="local"):
    for need in task.needs:
        if task.params.get("init_adapter") == need.stage:  # this call's own run, not merely the newest
            task.params = task.params | {"init_adapter": show_path(need.folder / "adapter")}
    try:
        base, _ = folders.place_run(task.stage, task.params)
    except (ParameterError, OSError) as error:
        task.state, task.note = "failed", str(error)
        print(f"{_clock()}  {task} failed: {error}", flush=True)
        return
    task.folder = None if force else folders.find_done(base)
    if task.folder:
        task.state, task.note = "done", "skipped: done before"
        task.verdict, task.seconds = _read_result(task.folder)
        print(f"{_clock()}  {task} {task.note}{_restore_adapter(task)}", flush=True)
        if not (task.folder / "notebook.html").is_file():  # it was done when the call before was killed
            _export_page(task)
        return
    for folder in (base, *base.parent.glob(f"{base.name}.*")):
        if ended := end_processes(folders.find_orphans(folder)):
            print(f"{_clock()}  {task} ended {', '.join(map(str, ended))}, left at work by a call that was killed", flush=True)
    beside = folders.is_alive(base)
    task.folder, task.claim = folders.claim_notebook(base)
    if beside:
        print(f"{_clock()}  {task} another call is at work on it in {show_path(base)}, and this one does it again beside that;"
              " Ctrl-C, and call again when the other is done, to take its result", flush=True)
    task.folder.mkdir(parents=True, exist_ok=True)
    notebook = task.folder / "notebook.ipynb"
    if notebook.is_file() and read_json(task.folder / "run.json").get("status") != "interrupted":
        attempt = len(list(task.folder.glob("notebook.failed-*.ipynb"))) + 1
        for path in (notebook, notebook.with_suffix(".html")):
            if path.is_file():
                path.rename(path.with_name(f"notebook.failed-{attempt}{path.suffix}"))
    values = task.folder / "params.yaml"
    values.write_text(yaml.safe_dump(task.params, allow_unicode=True, sort_keys=False), encoding="utf-8")
    source = paths.NOTEBOOKS / f"{task.stage}.ipynb"
    command = [sys.executable, "-m", "papermill", source, notebook, "-f", values, "--kernel", "python3"]
    command += ["--cwd", source.parent, "--log-output", "--no-progress-bar"]
    if engine == "ray":
        command = [sys.executable, "-m", "csm_nb.cluster", task.folder, *command]
    environment = {"OMP_NUM_THREADS": threads, "JUPYTER_PREFER_ENV_PATH": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    environment["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that wait by spinning starve each other on a busy machine
    environment |= dict(os.environ) | {"TOKENIZERS_PARALLELISM": "false", folders.HANDED_DOWN: str(task.folder)}
    own = [str(paths.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(own)  # this package, not one that was installed from another checkout
    task.state, task.started = "running", time.time()
    at_work = {"runner": identify_process(), "papermill": None, "recipe": task.origins}
    write_json(task.folder / folders.RUNNER, at_work)  # before it starts: a kill may come at any time
    with open(task.folder / "log.txt", "a", encoding="utf-8") as log:
        log.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')}  {' '.join(map(str, command))}\n")
        log.flush()
        task.process = subprocess.Popen(  # in a session of its own, so that Ctrl-C reaches this process only
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    write_json(task.folder / folders.RUNNER, at_work | {"papermill": identify_process(task.process.pid)})
    print(f"{_clock()}  {task} started, log: {show_path(task.folder / 'log.txt')}", flush=True)


def _end_task(task):
    marker = task.folder / "done.json"
    task.seconds = time.time() - task.started
    _end_kernel(task.folder)
    if task.process.returncode == 0 and marker.is_file():
        task.state = "done"
        task.verdict, task.seconds = _read_result(task.folder)
        why = read_json(task.folder / "metrics.json").get("because", "")
        advice = say_next(task.stage, task.verdict, task.params)
        said = "; ".join(filter(None, [textwrap.shorten(str(why), 160, placeholder=" ..."), advice and f"next: {advice}"]))
        print(f"{_clock()}  {task} {task.verdict}, {task.seconds:.0f} s", *filter(None, [said]), sep="\n    ", flush=True)
    else:
        marker.unlink(missing_ok=True)  # a kernel that died after its last cell: not to be trusted
        reason, lines = _find_error(task)
        _record_failure(task, "failed", reason)
        notebook = task.folder / "notebook.ipynb"
        task.state, task.note = "failed", show_path(notebook if notebook.is_file() else task.folder / "log.txt")
        print(f"{_clock()}  {task} failed after {task.seconds:.0f} s: {task.note}", *lines, sep="\n    ", flush=True)
    _export_page(task)
    if task.claim:
        task.claim.release()


def _export_page(task):
    notebook = task.folder / "notebook.ipynb"
    if notebook.is_file():
        try:
            export_html(notebook)
        except Exception as error:  # half a notebook, say: the run's result stands without its page
            print(f"{_clock()}  {task} no HTML page: {error}", flush=True)


def _find_error(task):
    text = (task.folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    lines = [line for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if line.strip()][-8:]
    code = task.process.returncode
    if code < 0:
        return f"papermill was ended by signal {-code} ({signal.Signals(-code).name})", lines
    if code == 0:
        return "the notebook did not reach finish_run", lines
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt|Exit)\b", line)]
    return (named[-1] if named else f"exit code {code}")[:300], lines


def _record_failure(task, status, error):
    record = {"stage": task.stage, "language": task.language, "params": task.params, "inputs": {}}
    record |= read_json(task.folder / "run.json")
    record |= {"status": status, "error": error, "started": task.started}
    write_json(task.folder / "run.json", record | {"seconds": round(time.time() - task.started, 1)})


def _read_result(folder):
    return read_json(folder / "metrics.json").get("verdict", ""), read_json(folder / "run.json").get("seconds", 0.0)


def _restore_adapter(task):
    """Put the adapter of a skipped run where the later stages look for it, if another one is there or none."""
    made = task.folder / "adapter"
    if task.stage != "03_adapter" or not made.is_dir():
        return ""
    place = resolve_path(task.params["adapters_dir"]) / folders.name_trained(task.params, task.language)
    if place.is_dir() and hash_folder(place) == hash_folder(made):
        return ""
    shutil.copytree(made, place, dirs_exist_ok=True)
    return f"; its adapter copied to {show_path(place)}"


def _stop_process(process):
    end_processes([identify_process(process.pid)])  # and its kernel, though that is a session of its own
    process.wait()


def _end_kernel(folder):
    """End the kernel of a papermill that was killed, which would outlive it: the next call would train beside it."""
    record = read_json(folder / "run.json")
    if record.get("status") == "running" and is_running(record.get("process")):
        end_processes([record["process"]])


def _clock():
    return time.strftime("%H:%M:%S")
