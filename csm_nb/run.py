"""The notebooks without a browser: languages by stages through papermill, each in its own process, done ones skipped.

`python -m csm_nb.run --langs no sv da --profile mini` checks every parameter first, runs what is not done yet, exports
each notebook as HTML and writes the index. A stage counts as done by the marker of its last cell and exit code 0.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml
from huggingface_hub import is_offline_mode

from csm_nb import hub
from csm_nb import params as settings
from csm_nb.params import STAGES, ParameterError, resolve_path, show_path
from csm_nb.provenance import count_cores, hash_folder, read_json, write_json
from csm_nb.report import build_index, export_html


@dataclass
class Task:
    """One stage of one language in this call. `needs` must be done before it, `after` must at least be over."""

    language: str
    stage: str
    params: dict
    needs: list["Task"] = field(default_factory=list)
    after: list["Task"] = field(default_factory=list)
    state: str = "waiting"
    verdict: str = ""
    note: str = ""
    folder: Path | None = None
    process: subprocess.Popen | None = None
    started: float = 0.0
    seconds: float = 0.0

    def __str__(self):
        return f"{self.language} {self.stage:<15}"


def plan_tasks(languages, stages, profile="mini", overrides=None) -> list[Task]:
    """Return the tasks of a call, by language and stage, every parameter of every one checked.

    A stage needs the stage that its `init_adapter` names; the one that compares adapters waits for all that train them.
    Raises ParameterError, also for an adapter that no stage of this call makes and no earlier run left, and hub.ModelError
    for a model folder that is not whole.
    """
    if "language" in (overrides or {}):
        raise ParameterError("command line: language is set by --langs (make run LANGS=...), not by --set")
    profile = settings.name_profile(profile)
    tasks = {}
    for language in dict.fromkeys(languages):
        values, origins = settings.load_params([f"params/{language}.yaml", profile], overrides)
        for stage in sorted(set(stages)):
            checked = settings.check_params(stage, values | {"language": language}, origins)
            tasks[language, stage] = Task(language, stage, checked)
    hub.check_models([task.params for task in tasks.values()])
    for (language, stage), task in tasks.items():
        source = task.params.get("init_adapter")
        if (language, source) in tasks:
            task.needs.append(tasks[language, source])
        elif source:
            settings.find_inputs(task.params)
        if stage == "04_confusion":
            task.needs += [tasks[key] for key in [(language, "03_adapter")] if key in tasks]
            task.after = [other for other in tasks.values() if other.stage == "03_adapter"]
    return list(tasks.values())


def run_tasks(tasks: list[Task], jobs: int) -> None:
    """Run tasks to their end, `jobs` at a time, one of a language at a time; each task then says how it went.

    On KeyboardInterrupt the running notebooks are ended, so only they are unfinished, and the interrupt goes on.
    """
    threads = str(max(1, count_cores() // jobs))
    try:
        while any(task.state in ("waiting", "running") for task in tasks):
            running = [task for task in tasks if task.state == "running"]
            for task in running:
                if task.process.poll() is not None:
                    _end_task(task)
            ready = [task for task in tasks if task.state == "waiting" and _is_ready(task, tasks)]
            if ready and sum(task.state == "running" for task in tasks) < jobs:
                _start_task(min(ready, key=lambda task: task.stage), threads)
            else:
                time.sleep(0.1)
    except BaseException:  # no notebook outlives this process
        for task in tasks:
            if task.state == "running":
                _stop_process(task.process)
                _record_failure(task, "interrupted", "Ctrl-C")
                task.state, task.note = "not run", f"interrupted; {show_path(task.folder)}"
            elif task.state == "waiting":
                task.state = "not run"
        raise


def _is_ready(task, tasks):
    broken = [need for need in task.needs if need.state in ("failed", "not run")]
    if broken:
        task.state, task.note = "not run", f"needs {broken[0].stage}"
        print(f"{_clock()}  {task} not run ({task.note})", flush=True)
    busy = any(other.language == task.language and other.state == "running" for other in tasks)
    over = all(other.state not in ("waiting", "running") for other in task.needs + task.after)
    return task.state == "waiting" and over and not busy


def _start_task(task, threads):
    for need in task.needs:
        if task.params.get("init_adapter") == need.stage:  # this call's own run, not merely the newest
            task.params = task.params | {"init_adapter": show_path(need.folder / "adapter")}
    try:
        base, _ = settings.place_run(task.stage, task.params)
    except (ParameterError, OSError) as error:
        task.state, task.note = "failed", str(error)
        print(f"{_clock()}  {task} failed: {error}", flush=True)
        return
    task.folder = settings.find_done(base)
    if task.folder:
        task.state, task.note = "done", "skipped: done before"
        task.verdict, task.seconds = _read_result(task.folder)
        print(f"{_clock()}  {task} {task.note}{_restore_adapter(task)}", flush=True)
        return
    task.folder = settings.choose_folder(base)
    task.folder.mkdir(parents=True, exist_ok=True)
    notebook = task.folder / "notebook.ipynb"
    if notebook.is_file() and read_json(task.folder / "run.json").get("status") != "interrupted":
        attempt = len(list(task.folder.glob("notebook.failed-*.ipynb"))) + 1
        for path in (notebook, notebook.with_suffix(".html")):
            if path.is_file():
                path.rename(path.with_name(f"notebook.failed-{attempt}{path.suffix}"))
    values = task.folder / "params.yaml"
    values.write_text(yaml.safe_dump(task.params, allow_unicode=True, sort_keys=False), encoding="utf-8")
    source = settings.NOTEBOOKS / f"{task.stage}.ipynb"
    command = [sys.executable, "-m", "papermill", source, notebook, "-f", values, "--kernel", "python3"]
    command += ["--cwd", source.parent, "--log-output", "--no-progress-bar"]
    environment = {"OMP_NUM_THREADS": threads, "JUPYTER_PREFER_ENV_PATH": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    environment["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that wait by spinning starve each other on a busy machine
    environment |= dict(os.environ) | {"TOKENIZERS_PARALLELISM": "false"}
    task.state, task.started = "running", time.time()
    with open(task.folder / "log.txt", "a", encoding="utf-8") as log:
        log.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')}  {' '.join(map(str, command))}\n")
        log.flush()
        task.process = subprocess.Popen(  # in a session of its own, so that Ctrl-C reaches this process only
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    print(f"{_clock()}  {task} started, log: {show_path(task.folder / 'log.txt')}", flush=True)


def _end_task(task):
    marker, notebook = task.folder / "done.json", task.folder / "notebook.ipynb"
    task.seconds = time.time() - task.started
    if task.process.returncode == 0 and marker.is_file():
        task.state = "done"
        task.verdict, task.seconds = _read_result(task.folder)
        print(f"{_clock()}  {task} {task.verdict}, {task.seconds:.0f} s", flush=True)
    else:
        marker.unlink(missing_ok=True)  # a kernel that died after its last cell: not to be trusted
        reason, lines = _find_error(task)
        _record_failure(task, "failed", reason)
        task.state, task.note = "failed", show_path(notebook if notebook.is_file() else task.folder / "log.txt")
        print(f"{_clock()}  {task} failed after {task.seconds:.0f} s: {task.note}", *lines, sep="\n    ", flush=True)
    if notebook.is_file():
        try:
            export_html(notebook)
        except Exception as error:  # half a notebook, say: the run's result stands without its page
            print(f"{_clock()}  {task} no HTML page: {error}", flush=True)


def _find_error(task):
    text = (task.folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    lines = [line for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if line.strip()][-8:]
    code = task.process.returncode
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
    place = resolve_path(task.params["adapters_dir"]) / settings.name_trained(task.params, task.language)
    if place.is_dir() and hash_folder(place) == hash_folder(made):
        return ""
    shutil.copytree(made, place, dirs_exist_ok=True)
    return f"; its adapter copied to {show_path(place)}"


def _stop_process(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        family = [*parent.children(recursive=True), parent]  # the kernel is a session of its own
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.terminate()
        for member in psutil.wait_procs(family, timeout=5)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait()


def _clock():
    return time.strftime("%H:%M:%S")


def parse_arguments(arguments=None) -> argparse.Namespace:
    """Return the command line's options; --audio and --corpus as paths from here, --set as {key: value}."""
    parser = argparse.ArgumentParser(prog="python -m csm_nb.run", description=__doc__.splitlines()[0])
    parser.add_argument("--langs", nargs="+", default=["no", "sv", "da"], help="languages: files of params/")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE", help=" ".join(STAGES))
    parser.add_argument("--profile", default="mini", help="models and sizes: mini, csm-1b, test or a YAML file")
    parser.add_argument("--audio", help="recordings for 00: a manifest.jsonl or a folder")
    parser.add_argument("--corpus", help="the corpus for 03: a manifest.jsonl or a folder")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="a parameter")
    parser.add_argument("--jobs", type=int, help="notebooks side by side (default: one a core and a language)")
    options = parser.parse_args(arguments)
    overrides = {}
    for word in options.set:
        key, equals, value = word.partition("=")
        if not equals:
            parser.error(f"--set {word}: write KEY=VALUE, such as --set seed=1")
        overrides[key] = yaml.safe_load(value) if value else ""
    for key in ("audio", "corpus"):
        if getattr(options, key):
            overrides[key] = str(Path(getattr(options, key)).expanduser().resolve())
    options.set = overrides
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: at least 1")
    options.jobs = options.jobs or min(count_cores(), len(set(options.langs)))
    return options


def _check_away(tasks):
    """Say which models will be fetched from the hub, and refuse where there is none to be had (HF_HUB_OFFLINE)."""
    away = hub.list_missing([task.params for task in tasks])
    if away and is_offline_mode():
        commands = "\n    ".join(map(hub.tell_download, away))
        raise hub.ModelError(f"{', '.join(away)}: not under models/, and HF_HUB_OFFLINE is set. Where there is a network run\n"
                             f"    {commands}\nand copy the folders to models/ here; make models lists what is there")
    if away:
        print(f"from the hub, as they are not under models/: {', '.join(away)} (make models shows sizes and licences)")


def main(arguments=None) -> int:
    """Run what the command line asks for; return 0 if all is done, 1 if not, 2 for bad parameters, 130 after Ctrl-C."""
    options = parse_arguments(arguments)
    try:
        tasks = plan_tasks(options.langs, options.stages, options.profile, options.set)
        _check_away(tasks)
    except (ParameterError, hub.ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    interrupted = False
    try:
        run_tasks(tasks, options.jobs)
    except KeyboardInterrupt:
        interrupted = True
    print()
    for task in tasks:
        seconds = f"{task.seconds:6.0f} s" if task.seconds else " " * 8
        note = f"  ({task.note})" if task.note else ""
        print(f"{task} {task.verdict or task.state:<10} {seconds}{note}")
    current = [task.folder for task in tasks if task.folder]
    for runs_dir in dict.fromkeys(task.params["runs_dir"] for task in tasks):
        print(f"\nindex: {build_index(resolve_path(runs_dir), current)}")
    if interrupted:
        print("interrupted: what is done stays done; the same command goes on from here")
        return 130
    return 0 if all(task.state == "done" for task in tasks) else 1


if __name__ == "__main__":
    sys.exit(main())
