"""The workbook with one thing changed at a time, at equal compute: one table and one figure a language.

`python -m csm_nb.ablate --langs no --profile mini` runs each arm (LoRA, LoRA + text, full, without 01, without 02) through
`python -m csm_nb.run` with runs and adapters of its own, below `runs/ablate/<arm>/`, and compares the arms sentence by
sentence. What is done is skipped when it is called again.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from matplotlib.ticker import PercentFormatter
from transformers import CsmConfig, CsmForConditionalGeneration
from transformers.utils import logging

from csm_nb import params as settings
from csm_nb import run as headless
from csm_nb.confusion import share_right
from csm_nb.csm import add_adapter
from csm_nb.hub import ModelError, describe_model, fetch_model
from csm_nb.judge import bootstrap_interval
from csm_nb.languages import get_language
from csm_nb.params import STAGES, ParameterError, resolve_path, show_path
from csm_nb.plots import COLOURS, GREY, INK, make_figure, set_labels
from csm_nb.provenance import count_cores, read_json

ANCHOR, SYNTHETIC, ADAPTER, JUDGING = STAGES[1:5]
STEPS = {ANCHOR: "anchor_steps", SYNTHETIC: "synthetic_steps", ADAPTER: "adapter_steps"}
FROZEN, TRAINED = 4, 6  # FLOPs of a step by weight and position: 2 forward, 2 back to the activations, 2 to a trained weight
FULL_LR = 0.2  # of LoRA's learning rate: what moves every weight moves the model further
REFERENCE = "LoRA + text"  # the arm that the others are compared with
SENTENCES = 24  # held-out sentences that an arm is judged by; 8 leave intervals that hide everything
SET_BY_ARMS = ("language", "method", "train_text", "init_adapter", "adapters_dir", "compare")


@dataclass
class Work:
    """One arm of one language in this call: its calls of csm_nb.run, one after the other, and the runs that they made.

    A call is (stages, overrides); `params` are each stage's parameters before any arm changed them; `cost` is what a step
    costs, 1 with LoRA.
    """

    arm: str
    language: str
    calls: list
    params: dict
    cost: float
    log: Path
    runs: dict[str, Path] = field(default_factory=dict)
    at: int = 0
    state: str = "waiting"
    process: subprocess.Popen | None = None
    started: float = 0.0

    def __str__(self):
        return f"{self.language} {self.arm:<17}"


# What is run


def compare_costs(params: dict) -> float:
    """Return what a step of full fine-tuning costs in FLOPs, where a step of LoRA costs 1.

    A frozen weight costs 4 FLOPs a position (2 forward, 2 back to the activations), a trained one 2 more. So full
    fine-tuning costs 1.5 where the adapter is small; the miniature's has a quarter of the weights that it adapts, and costs
    as well. Weights are counted on the model's shape, the depth decoder's by its positions a frame. Embeddings are looked
    up, not multiplied; attention's scores and recomputation are left out. Raises hub.ModelError.
    """
    config = CsmConfig.from_pretrained(fetch_model(params["base_model"]))
    with torch.device("meta"):
        model = CsmForConditionalGeneration(config)
        model = add_adapter(model, params["rank"], params["alpha"], params["dropout"], params["train_mlp"])
    depth = params["depth_ratio"] * config.num_codebooks  # positions of the depth decoder to one of the backbone
    lora = full = 0.0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "codec_model" not in name:
            weights = module.weight.numel() * (depth if "depth_decoder" in name else 1)
            lora += weights * (TRAINED if "lora_" in name else FROZEN)
            full += weights * (0 if "lora_" in name else TRAINED)
    head = model.get_base_model().depth_decoder.codebooks_head.weight[0].numel() * depth  # one of its matrices a position
    return (full + TRAINED * head) / (lora + FROZEN * head)


def plan_arms(params: dict, cost: float = TRAINED / FROZEN) -> dict[str, list]:
    """Return {arm: [(stages, overrides), ...]}, calls of csm_nb.run that all cost as many FLOPs.

    `params` are the steps and learning rates of 01 to 03, `cost` is what compare_costs says: by so much less are the steps
    of full fine-tuning. An arm without a stage gives its steps to the next one.
    """
    anchor, synthetic, adapter = (params[key] for key in STEPS.values())
    stages, text = (ANCHOR, SYNTHETIC, ADAPTER, JUDGING), {"method": "lora", "train_text": True}
    full = {key: max(1, round(params[key] / cost)) for key in STEPS.values()}
    full |= {key: float(f"{params[key] * FULL_LR:.3g}") for key in ("lr", "adapter_lr")}
    return {
        "LoRA": [(stages, text | {"train_text": False})],
        REFERENCE: [(stages, text)],
        "full": [(stages, text | {"method": "full"} | full)],
        "without anchor": [  # two calls: 02 and 03 take what they go on from by the same name
            ((SYNTHETIC,), text | {"init_adapter": "", "synthetic_steps": anchor + synthetic}),
            ((ADAPTER, JUDGING), text | {"init_adapter": SYNTHETIC}),
        ],
        "without synthetic": [
            ((ANCHOR, ADAPTER, JUDGING), text | {"init_adapter": ANCHOR, "adapter_steps": synthetic + adapter})
        ],
    }


def plan_works(languages, profile: str = "mini", overrides: dict | None = None) -> list[Work]:
    """Return the arms of each language, every parameter of every call checked before anything starts.

    `overrides` hold for all arms; `sentences` is 24 without one. Raises ParameterError, also for what the arms set themselves.
    """
    overrides = {"sentences": SENTENCES} | (overrides or {})
    for key in SET_BY_ARMS:
        if key in overrides:
            raise ParameterError(f"command line: {key} is set by the arms (language by --langs), not by --set")
    works = []
    for language in dict.fromkeys(languages):
        tasks = headless.plan_tasks([language], [*STEPS, JUDGING], profile, overrides)
        params = {task.stage: task.params for task in tasks}
        root, cost = Path(params[JUDGING]["runs_dir"]) / "ablate", compare_costs(params[ADAPTER])
        for arm, calls in plan_arms(params[ANCHOR] | params[SYNTHETIC] | params[ADAPTER], cost).items():
            place = root / re.sub(r"\W+", "_", arm.lower())
            own = overrides | {"runs_dir": str(place), "adapters_dir": str(place / "models"), "compare": [language]}
            calls = [(stages, own | changed) for stages, changed in calls]
            for stages, changed in calls:
                for stage in stages:
                    settings.check_params(stage, params[stage] | changed)
            step = cost if calls[0][1]["method"] == "full" else 1.0
            works.append(Work(arm, language, calls, params, step, resolve_path(place) / f"{language}.log"))
    return works


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
            work.process.terminate()  # csm_nb.run ends its notebooks; SIGINT it may have been told to ignore
        for work in running:
            work.process.wait()
        raise


def _start_call(work, profile, threads):
    stages, overrides = work.calls[work.at]
    values = [f"{key}={_write_value(value)}" for key, value in _go_on(work, overrides).items()]
    command = [sys.executable, "-m", "csm_nb.run", "--langs", work.language, "--profile", profile, "--jobs", "1"]
    command += ["--stages", *stages, "--set", *values]
    environment = {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"} | dict(os.environ)
    work.log.parent.mkdir(parents=True, exist_ok=True)
    with open(work.log, "a", encoding="utf-8") as log:
        log.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')}  {' '.join(command)}\n")
        log.flush()
        work.process = subprocess.Popen(  # in a session of its own, so that Ctrl-C reaches this process only
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def _end_call(work, profile, threads):
    stages, overrides = work.calls[work.at]
    done = work.process.returncode == 0
    for stage in stages if done else ():
        folder = find_made(stage, settings.check_params(stage, _go_on(work, work.params[stage] | overrides)))
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
    inputs = settings.find_inputs(params)
    folder = resolve_path(params["runs_dir"]) / params["language"] / stage
    for done in sorted(folder.glob("*/done.json"), key=os.path.getmtime, reverse=True):
        record = read_json(done.with_name("run.json"))
        if record["params"] == params and record["inputs"] == inputs:
            return done.parent
    return None


def _write_value(value):
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).removesuffix("...\n").strip()


def _clock():
    return time.strftime("%H:%M:%S")


# What is reported


def compare_arms(rows: pd.DataFrame, reference: str = REFERENCE) -> pd.DataFrame:
    """Return shares and error rates by model (confusion.share_right) over held-out sentences, and the difference in CER.

    The difference to `reference` is paired by sentence, with a 95 % bootstrap interval. Probes are left out: a training
    may have chosen its checkpoint by them.
    """
    rows = rows[~rows.probe.astype(bool)]
    table = share_right(rows).drop(columns=["read", "heard most"])
    rates = rows.pivot_table(index="text", columns="model", values="cer")
    paired = []
    for name in table.model:
        difference = np.array([np.nan])
        if reference in rates and name != reference:
            difference = (rates[name] - rates[reference]).dropna().to_numpy()
        low, high = bootstrap_interval(difference)
        paired.append({"difference": difference.mean(), "difference low": low, "difference high": high})
    return table.join(pd.DataFrame(paired).round(3))


def read_judged(work: Work) -> pd.DataFrame:
    """Return what 04 judged of an arm in its own language: the rows of its model, under the arm's name, base and reference."""
    rows = pd.read_csv(work.runs[JUDGING] / "judged.csv", keep_default_na=False)  # "null" may be what was heard
    own = settings.name_trained(work.calls[0][1], work.language)
    rows = rows[(rows.language == work.language) & rows.model.isin(["reference", "base", own])]
    return rows.assign(model=rows.model.replace({own: work.arm}))


def describe_training(work: Work) -> dict:
    """Return what an arm's training was: parameters trained, steps, compute, seconds, and the held-out loss after 03.

    Compute is the FLOPs of its steps over those that LoRA takes with the profile's own steps (1 is equal).
    """
    made = [read_json(work.runs[stage] / "metrics.json") for stage in STEPS if stage in work.runs]
    steps = sum(metrics["steps"] for metrics in made)
    planned = sum(work.params[stage][key] for stage, key in STEPS.items())
    return {
        "trained parameters (M)": made[-1].get("trained_parameters_m"),
        "steps": steps,
        "compute": round(steps * work.cost / planned, 3),
        "seconds": round(sum(read_json(work.runs[stage] / "run.json")["seconds"] for stage in STEPS if stage in work.runs)),
        "loss": made[-1]["last_loss"],
    }


def build_table(works: list[Work]) -> pd.DataFrame:
    """Return the comparison of one language: reference and base once, then a row an arm, in the order of the arms.

    The column `state` says "done" or "failed: see <log>"; an arm without results has no figures. An arm whose results
    cannot be read has failed too.
    """
    parts, training = {}, {}
    for work in works:
        if work.state != "done":
            continue
        try:
            rows, described = read_judged(work), describe_training(work)
        except (OSError, LookupError, AttributeError, ValueError) as error:
            work.state = "failed"
            print(f"{_clock()}  {work} failed: its results cannot be read: {error!r}", flush=True)
            continue
        if work.arm not in set(rows.model):
            work.state = "failed"
            print(f"{_clock()}  {work} failed: {show_path(work.runs[JUDGING])} judged no model of it", flush=True)
            continue
        parts |= {name: part for name, part in rows.groupby("model", sort=False) if name not in parts}
        training[work.arm] = described
    names = [name for name in ("reference", "base") if name in parts] + [work.arm for work in works]
    table = pd.DataFrame({"model": names})
    if parts:
        trained = pd.DataFrame([{"model": name} | described for name, described in training.items()])
        judged = compare_arms(pd.concat(parts.values()))
        table = table.merge(trained, on="model", how="left").merge(judged, on="model", how="left")
    failed = {work.arm: f"failed: see {show_path(work.log)}" for work in works if work.state != "done"}
    return table.assign(state=[failed.get(name, "done") for name in names])


def draw_ablation(table: pd.DataFrame, title: str = ""):
    """Return a figure of the arms on one axis: CER and share heard right, whiskers the 95 % interval over sentences.

    `table` is what build_table returns. The dashed line is the arm that the others are compared with; models without a
    training of this call (base, reference) are grey; an arm without results says that it failed.
    """
    figure, axes = make_figure(1, 2, 9, 0.42 * len(table) + 1.2, sharey=True)
    panels = (("CER", "CER low", "CER high", "Character error rate: less is better"),
              ("heard right", "low", "high", "Heard as its language: more is better"))
    done = table.state == "done"
    for ax, (name, low, high, label) in zip(axes, panels, strict=True):
        for place, row in enumerate(table.to_dict("records")):
            if not done[place]:
                ax.text(0.015, place, "failed", transform=ax.get_yaxis_transform(), va="center", fontsize=8.5, color=GREY)
                continue
            own = row["model"] not in ("reference", "base")
            colour = GREY if not own else COLOURS[0]
            ax.barh(place, row[name], color=colour, height=0.62, alpha=0.85 if own else 0.5)
            ax.errorbar(row[name], place, xerr=[[row[name] - row[low]], [row[high] - row[name]]], color=INK, capsize=3,
                        linewidth=1.2)
            ax.annotate(f"{row[name]:.0%}", (max(row[name], row[high]), place), (6, 0), textcoords="offset points",
                        va="center", fontsize=8.5, color=INK)
        for row in table[done & (table.model == REFERENCE)].to_dict("records"):
            ax.axvline(row[name], color=COLOURS[1], linestyle="--", linewidth=1.1, zorder=0.9)
        set_labels(ax, label)
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.set_xlim(0, 1.15 * np.nanmax([table.get(high, pd.Series(dtype=float)).max(), 0.2]))
        ax.grid(False, axis="y")
    axes[0].set_yticks(range(len(table)), table.model)
    axes[0].invert_yaxis()
    counts = sorted(set(table.sentences.dropna().astype(int))) if "sentences" in table else []
    count = " to ".join(map(str, dict.fromkeys([counts[0], counts[-1]]))) if counts else "no"
    figure.supxlabel(f"n = {count} held-out sentences; whiskers: 95 % interval over sentences; dashed: {REFERENCE}",
                     fontsize=8.5, color=INK)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    return figure


def format_table(table: pd.DataFrame) -> str:
    """Return build_table's frame as a Markdown table for people, columns aligned; rates and intervals in %, "–" for nothing."""
    heads = ["arm", "trained (M)", "steps", "compute", "seconds", "loss", "CER, %", f"against {REFERENCE}, points",
             "heard right, %", "runaways", "sentences"]
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    for row in table.to_dict("records"):
        failed = "" if row["state"] == "done" else " (failed: see log)"
        lines.append([
            row["model"] + failed, _write_number(row, "trained parameters (M)", "{:.2f}"), _write_number(row, "steps", "{:.0f}"),
            _write_number(row, "compute", "{:.1%}"), _write_number(row, "seconds", "{:.0f}"),
            _write_number(row, "loss", "{:.2f}"),
            _write_interval(row, "CER", "CER low", "CER high", ".1f"),
            _write_interval(row, "difference", "difference low", "difference high", "+.1f"),
            _write_interval(row, "heard right", "low", "high", ".0f"),
            _write_number(row, "runaways", "{:.0f}"), _write_number(row, "sentences", "{:.0f}"),
        ])  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    rows = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(f"| {row} |" for row in rows)


def _write_number(row, name, form):
    value = row.get(name)
    return "–" if value is None or pd.isna(value) else form.format(value)


def _write_interval(row, name, low, high, form):
    if pd.isna(row.get(name, np.nan)):
        return "–"
    value, bottom, top = (f"{round(100 * row[key], 1) + 0.0:{form}}" for key in (name, low, high))
    return f"{value} ({bottom} to {top})"


def write_report(works: list[Work], command: str) -> tuple[pd.DataFrame, list[Path]]:
    """Write ablation.md, .csv and .png of one language's arms; return (table, their paths).

    They lie in <runs_dir>/ablate/<language>/ and are written anew by each call.
    """
    language, params = works[0].language, {key: value for part in works[0].params.values() for key, value in part.items()}
    folder = resolve_path(params["runs_dir"]) / "ablate" / language
    folder.mkdir(parents=True, exist_ok=True)
    table = build_table(works)
    table.to_csv(folder / "ablation.csv", index=False)
    name, base, cost = get_language(language).name, Path(params["base_model"]).name, max(work.cost for work in works)
    draw_ablation(table, f"{name}, {base}: arms at equal compute").savefig(folder / "ablation.png", dpi=150)
    corpus = params["corpus"] or "an espeak-ng voice that no stage before has used, standing in for a corpus (synthetic)"
    changed = "\n".join(f"- **{work.arm}** ({work.state}): {_describe_calls(work)}" for work in works)
    (folder / "ablation.md").write_text(f"""# {name}: the workbook with one thing changed at a time

{describe_model(params["base_model"])}

Speech: 01 and 02 train with espeak-ng (synthetic); 03 with {corpus}. Judges: {params["lid_model"]}, {params["asr_model"]}.

{format_table(table)}

![Character error rate and share heard right, by arm](ablation.png)

- **One training each** (seed {params["seed"]}): the intervals are over sentences, not over trainings. Another seed may move
  an arm by more than they say.
- CER, heard right and runaways are over held-out sentences only; the probes are left out, since a training may choose its
  checkpoint by them. Intervals are 95 % bootstraps; "against {REFERENCE}" is paired by sentence, + is worse.
- **Equal compute** is counted in FLOPs: {FROZEN} a position for a frozen weight (2 forward, 2 back to the activations), {TRAINED}
  for a trained one, the adapter's own weights included. A step of "full" costs {cost:.2f} of LoRA's, so it takes 1/{cost:.2f} of
  the steps, at {FULL_LR:g} of the learning rates. Compute is relative to the profile's own steps with LoRA. Seconds are those of
  01 to 03 with everything that they do besides training, and depend on how many arms ran side by side.
- "without anchor" gives the steps of 01 to 02, "without synthetic" those of 02 to 03: more epochs over the same corpus, at
  the learning rate of 03 ({params["adapter_lr"]:g} instead of {params["lr"]:g}). Loss is on 03's held-out clips, at its end.
- `reference` is espeak-ng itself, the judges' ceiling; `base` is the model before any training.

What each arm changed, and its runs:

{changed}

Made by `{command}`.
""", encoding="utf-8")
    return table, [folder / f"ablation.{end}" for end in ("md", "csv", "png")]


def _describe_calls(work):
    own = ("runs_dir", "adapters_dir", "compare", "sentences")  # the same for all, or said by the runs' folders
    calls = [f"{', '.join(stage[:2] for stage in stages)} with " + ", ".join(
        f"{key}={_write_value(value)}" for key, value in overrides.items() if key not in own
    ) for stages, overrides in work.calls]
    runs = ", ".join(f"`{show_path(folder)}`" for folder in work.runs.values())
    return "; then ".join(calls) + f". Runs: {runs or 'none'}. Log: `{show_path(work.log)}`"


def parse_arguments(arguments=None) -> argparse.Namespace:
    """Return the command line's options, --set and --corpus as csm_nb.run reads them."""
    parser = argparse.ArgumentParser(prog="python -m csm_nb.ablate", description=__doc__.splitlines()[0])
    parser.add_argument("--langs", nargs="+", default=["no"], help="languages: files of params/")
    parser.add_argument("--profile", default="mini", help="models and sizes: mini, csm-1b, test or a YAML file")
    parser.add_argument("--corpus", help="the corpus for 03: a manifest.jsonl or a folder")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="a parameter of all arms")
    parser.add_argument("--jobs", type=int, default=count_cores(), help="arms side by side (default: one a core)")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: at least 1")
    read = [*(["--set", *options.set] if options.set else []), *(["--corpus", options.corpus] if options.corpus else [])]
    options.set = headless.parse_arguments(read).set
    return options


def main(arguments=None) -> int:
    """Run and compare what the command line asks for; 0 if every arm is done, 1 if not, 2 for bad input, 130 after Ctrl-C."""
    options = parse_arguments(arguments)
    logging.set_verbosity_error()  # the ids of the miniature's special tokens are none of what is asked here
    try:
        works = plan_works(options.langs, options.profile, options.set)
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
        print(f"\n{get_language(language).name}, one training each: intervals are over sentences\n\n{format_table(table)}\n")
        print(*map(show_path, paths), sep="\n")
    return 0 if all(work.state == "done" for work in works) else 1


if __name__ == "__main__":
    sys.exit(main())
