"""Runs the arms of an ablation: `python -m csm_nb.ablate --langs no --seeds 0 1 2`; one table and one figure per language.

An arm's stages are tasks of csm_nb.runs below `runs/ablate/`: what is done is skipped when it is called again.
"""

import argparse
import shlex
import signal
import sys

from transformers.utils import logging

from csm_nb.ablate.arms import plan_trainings
from csm_nb.ablate.report import describe_rates, format_table, write_report
from csm_nb.hub import ModelError
from csm_nb.languages import get_language
from csm_nb.paths import show_path
from csm_nb.processes import count_cores
from csm_nb.recipe import ParameterError
from csm_nb.runs import __main__ as runs
from csm_nb.runs.chain import run_tasks


def parse_arguments(arguments=None) -> argparse.Namespace:
    """Return the command line's options, --set and --corpus as csm_nb.runs reads them."""
    parser = argparse.ArgumentParser(prog="python -m csm_nb.ablate", description=__doc__.splitlines()[0])
    parser.add_argument("--langs", nargs="+", default=["no"], help="languages: files of params/")
    parser.add_argument("--profile", default="mini", help="models and sizes: mini, csm-1b, test or a YAML file")
    parser.add_argument("--corpus", help="the corpus for 03: a manifest.jsonl or a folder")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="a parameter of all arms")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], metavar="N", help="of the trainings (default: one)")
    parser.add_argument("--arms", nargs="+", default=[], metavar="ARM", help="some of them, such as full 'LoRA + text'")
    parser.add_argument("--jobs", type=int, default=count_cores(), help="arms side by side (default: one per core)")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: at least 1")
    read = [*(["--set", *options.set] if options.set else []), *(["--corpus", options.corpus] if options.corpus else [])]
    options.set = runs.parse_arguments(read).set
    return options


def main(arguments=None) -> int:
    """Run and compare what the command line asks for; 0 if every arm is done, 1 if not, 2 for bad input, 130 after Ctrl-C."""
    options = parse_arguments(arguments)
    logging.set_verbosity_error()  # the ids of the miniature's special tokens are none of what is asked here
    try:
        trainings = plan_trainings(options.langs, options.profile, options.set, options.seeds, options.arms)
        tasks = list({id(task): task for training in trainings for task in training.tasks.values()}.values())
        runs.check_away(tasks)
    except (ParameterError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(trainings)} trainings, {len(tasks)} stages to run or to skip")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run_tasks(tasks, min(options.jobs, len(trainings)))
    except KeyboardInterrupt:
        print("interrupted: what is done stays done; the same command goes on from here")
        return 130
    command = shlex.join(["python", "-m", "csm_nb.ablate", *(sys.argv[1:] if arguments is None else arguments)])
    for language in dict.fromkeys(options.langs):
        table, paths = write_report([training for training in trainings if training.language == language], command)
        print(f"\n{get_language(language).name}: 95 % intervals over seeds and sentences\n\n{format_table(table)}\n")
        print(describe_rates(table))
        print(*map(show_path, paths), sep="\n")
    return 0 if all(training.state == "done" for training in trainings) else 1


if __name__ == "__main__":
    sys.exit(main())
