"""Runs the arms of an ablation: `python -m csm_nb.ablate --langs no --profile mini`; one table and one figure per language.

Each arm (arms.plan_arms) runs once per seed through `python -m csm_nb.runs` with runs and adapters of its own, below
`runs/ablate/<arm>/seed-<n>/`. What is done is skipped when it is called again.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from transformers.utils import logging

from csm_nb.ablate.arms import Work, plan_works, write_value
from csm_nb.ablate.report import describe_rates, format_table, write_report
from csm_nb.hub import ModelError
from csm_nb.languages import get_language
from csm_nb.paths import resolve_path, show_path
from csm_nb.processes import count_cores, end_processes, identify_process, is_running
from csm_nb.provenance import read_json, write_json
from csm_nb.recipe import ParameterError
from csm_nb.runs import __main__, folders
from csm_nb.runs.params import check_params, read_cell


def run_works(works: list[Work], profile: str, jobs: int) -> None:
    """Run every arm to its end, `jobs` at a time; each then says how it went, and a failure stops its own arm only.

    On KeyboardInterrupt the running calls are told to end, and the interrupt goes on when they have.
    """
    threads = str(max(1, count_cores() // max(1, min(jobs, len(works)))))
    try:
        while any(work.state in ("waiting", "running") for work in works):
            for work in works:
                if work.state == "running" and work.process.poll() is not None:
                    _end_call(work, profile, threads)
            waiting = [work for work in works if work.state == "waiting"]
            if waiting and sum(work.state == "running" for work in works) < jobs:
                work = waiting[0]
                work.state, work.started = "running", time.time()
                _start_call(work, profile, threads)
                print(f"{_clock()}  {work} started, log: {show_path(work.log)}", flush=True)
            else:
                time.sleep(0.2)
    except BaseException:  # no call outlives this process
        running = [work for work in works if work.state == "running"]
        for work in running:
            work.process.terminate()  # csm_nb.runs ends its notebooks; SIGINT it may have been told to ignore
        for work in running:
            work.process.wait()
        raise


def _start_call(work, profile, threads):
    stages, overrides = work.calls[work.at]
    known = {name for stage in stages for name in read_cell(stage)}  # csm_nb.runs refuses what no stage of a call has
    values = [f"{key}={write_value(value)}" for key, value in _go_on(work, overrides).items() if key in known]
    command = [sys.executable, "-m", "csm_nb.runs", "--langs", work.language, "--profile", profile, "--jobs", "1"]
    command += ["--stages", *stages, "--set", *values]
    environment = {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"} | dict(os.environ)
    work.log.parent.mkdir(parents=True, exist_ok=True)
    call = work.log.with_suffix(".json")
    left = read_json(call)
    if left and not is_running(left["ablation"]):  # it was killed, and what it had started was not
        end_processes([left["call"]])
    with open(work.log, "a", encoding="utf-8") as log:
        log.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')}  {' '.join(command)}\n")
        log.flush()
        work.process = subprocess.Popen(  # in a session of its own, so that Ctrl-C reaches this process only
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    write_json(call, {"ablation": identify_process(), "call": identify_process(work.process.pid)})


def _end_call(work, profile, threads):
    stages, overrides = work.calls[work.at]
    done = work.process.returncode == 0
    for stage in stages if done else ():
        folder = find_made(stage, check_params(stage, _go_on(work, work.params[stage] | overrides)))
        if folder is None:
            done = False
            break
        work.runs[stage] = folder
    if done and work.at + 1 < len(work.calls):
        work.at += 1
        _start_call(work, profile, threads)
        return
    work.state = "done" if done else "failed"
    log = "" if done else f": see {show_path(work.log)}"
    print(f"{_clock()}  {work} {work.state} after {time.time() - work.started:.0f} s{log}", flush=True)


def _go_on(work, params):
    """`params` with the folder of this call's own run where `init_adapter` names its stage; the newest could be another."""
    source = params.get("init_adapter")
    return params | {"init_adapter": show_path(work.runs[source] / "adapter")} if source in work.runs else params


def find_made(stage: str, params: dict) -> Path | None:
    """Return the newest complete run of a stage with exactly these parameters and inputs, or None.

    The code is not asked about, as the runner does: it may have been edited since the run began.
    """
    inputs = folders.find_inputs(params)
    folder = resolve_path(params["runs_dir"]) / params["language"] / stage
    for done in sorted(folder.glob("*/done.json"), key=os.path.getmtime, reverse=True):
        record = read_json(done.with_name("run.json"))
        if record["params"] == params and record["inputs"] == inputs:
            return done.parent
    return None


def _clock():
    return time.strftime("%H:%M:%S")


def parse_arguments(arguments=None) -> argparse.Namespace:
    """Return the command line's options, --set and --corpus as csm_nb.runs reads them."""
    parser = argparse.ArgumentParser(prog="python -m csm_nb.ablate", description=__doc__.splitlines()[0])
    parser.add_argument("--langs", nargs="+", default=["no"], help="languages: files of params/")
    parser.add_argument("--profile", default="mini", help="models and sizes: mini, csm-1b, test or a YAML file")
    parser.add_argument("--corpus", help="the corpus for 03: a manifest.jsonl or a folder")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="a parameter of all arms")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], metavar="N", help="of the trainings (default: one)")
    parser.add_argument("--jobs", type=int, default=count_cores(), help="arms side by side (default: one a core)")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: at least 1")
    read = [*(["--set", *options.set] if options.set else []), *(["--corpus", options.corpus] if options.corpus else [])]
    options.set = __main__.parse_arguments(read).set
    return options


def main(arguments=None) -> int:
    """Run and compare what the command line asks for; 0 if every arm is done, 1 if not, 2 for bad input, 130 after Ctrl-C."""
    options = parse_arguments(arguments)
    logging.set_verbosity_error()  # the ids of the miniature's special tokens are none of what is asked here
    try:
        works = plan_works(options.langs, options.profile, options.set, options.seeds)
    except (ParameterError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run_works(works, options.profile, options.jobs)
    except KeyboardInterrupt:
        print("interrupted: what is done stays done; the same command goes on from here")
        return 130
    command = " ".join(["python -m csm_nb.ablate", *(sys.argv[1:] if arguments is None else arguments)])
    for language in dict.fromkeys(options.langs):
        table, paths = write_report([work for work in works if work.language == language], command)
        print(f"\n{get_language(language).name}: 95 % intervals over seeds and sentences\n\n{format_table(table)}\n")
        print(describe_rates(table))
        print(*map(show_path, paths), sep="\n")
    return 0 if all(work.state == "done" for work in works) else 1


if __name__ == "__main__":
    sys.exit(main())
