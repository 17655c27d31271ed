"""The notebooks without a browser: `python -m csm_nb.runs --langs no sv da --profile mini`."""

import argparse
import os
import re
import signal
import sys

import yaml
from huggingface_hub import is_offline_mode

from csm_nb import cluster, hub, recipe
from csm_nb.paths import STAGES, resolve_path
from csm_nb.processes import count_cores
from csm_nb.recipe import ParameterError
from csm_nb.runs.chain import plan_tasks, run_tasks
from csm_nb.runs.pages import build_index
from csm_nb.runs.params import RECORDINGS, StrictLoader


def parse_arguments(arguments=None) -> argparse.Namespace:
    """Return the command line's options; --audio, --corpus and --set together as {key: value} in `set`."""
    parser = argparse.ArgumentParser(prog="python -m csm_nb.runs", description=__doc__.splitlines()[0])
    parser.add_argument("--langs", nargs="+", default=["no", "sv", "da"], help="languages: files of params/")
    parser.add_argument("--stages", nargs="+", default=STAGES, metavar="STAGE", help=" ".join(STAGES))
    parser.add_argument("--profile", default="mini", help="models and sizes: mini, csm-1b, test or a YAML file")
    parser.add_argument("--audio", help="recordings for 00: a manifest.jsonl or a folder, from the project's root")
    parser.add_argument("--corpus", help="the corpus for 03: a manifest.jsonl or a folder, likewise")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="a parameter")
    parser.add_argument("--jobs", type=int, help="notebooks side by side (default: as many as cores and languages)")
    parser.add_argument("--engine", choices=recipe.ENGINES, default="local", help="where notebooks run: here, or on nodes of Ray")
    parser.add_argument("--force", action="store_true", help="run what is done again, beside the old runs")
    options = parser.parse_args(arguments)
    for stage in options.stages:
        if stage not in STAGES:
            parser.error(f"no stage {stage!r}{recipe.suggest(stage, STAGES)} The stages are {', '.join(STAGES)}")
    try:
        overrides = read_overrides(options.set)
    except ParameterError as error:
        parser.error(str(error))
    overrides |= {key: getattr(options, key) for key in RECORDINGS if getattr(options, key)}
    options.set = overrides
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: at least 1")
    most = len(set(options.langs))
    options.jobs = options.jobs or (most if options.engine == "ray" else min(count_cores(), most))
    return options


def check_away(tasks):
    """Say which models will be fetched from the hub, and refuse where there is none to be had (HF_HUB_OFFLINE)."""
    away = hub.list_missing([task.params for task in tasks])
    if away and is_offline_mode():
        commands = "\n    ".join(map(hub.tell_download, away))
        raise hub.ModelError(f"{', '.join(away)}: not under models/, and HF_HUB_OFFLINE is set. Where there is a network run\n"
                             f"    {commands}\nand copy the folders to models/ here; make models lists what is there")
    if away:
        print(f"from the hub, as they are not under models/: {', '.join(away)} (make models shows sizes and licences)")


def connect_ray():
    """Connect to Ray or start one (cluster.start_ray), for this process and those that it starts."""
    cluster.start_ray()
    import ray

    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address


# KEY=VALUE up to the next KEY=: a value in quotes or brackets may hold anything
_PAIR = re.compile(r"""\s*([A-Za-z_]\w*)=("(?:[^"\\]|\\.)*"|'(?:[^']|'')*'|\[[^\]]*\]|.*?)(?=\s+[A-Za-z_]\w*=|\s*$)""", re.S)


def read_overrides(words) -> dict:
    """Return {key: value} of KEY=VALUE words, the values as YAML reads them; "" for an empty one.

    Words that a shell or make took apart (codebooks=[1, 8]) belong together, and one word may hold several pairs. Raises
    ParameterError for what is no KEY=VALUE or no YAML, and for a key that is given twice.
    """
    text, overrides, at = " ".join(words).strip(), {}, 0
    while at < len(text):
        pair = _PAIR.match(text, at)
        if not pair:
            raise ParameterError(f"--set {text[at:].strip()}: write KEY=VALUE, such as --set seed=1 (make run SET='seed=1')")
        key, value = pair.groups()
        if key in overrides:
            raise ParameterError(f"--set: {key} is given twice")
        try:
            read = yaml.load(value, StrictLoader) if value else ""
            overrides[key] = value if isinstance(read, dict) and value[0] != "{" else read  # a path with a colon in it
        except (yaml.YAMLError, ValueError) as error:
            reason = " ".join(str(getattr(error, "problem", None) or error).split())
            raise ParameterError(f"--set {key}={value}: not readable as YAML ({reason}); a list is [1, 8], a text with "
                                 "special characters stands in quotes") from error
        at = pair.end()
    return overrides


def main(arguments=None) -> int:
    """Run what the command line asks for; return 0 if all is done, 1 if not, 2 for bad parameters, 130 after Ctrl-C."""
    options = parse_arguments(arguments)
    try:
        tasks = plan_tasks(options.langs, options.stages, options.profile, options.set)
        check_away(tasks)
        if options.engine == "ray":
            connect_ray()
    except (ParameterError, hub.ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # a terminal that was closed; under nohup it is ignored
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    interrupted = False
    try:
        run_tasks(tasks, options.jobs, options.force, options.engine)
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
