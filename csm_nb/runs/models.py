"""What models a profile needs, which are here, their sizes and licences; and the rest fetched from the hub.

`python -m csm_nb.runs.models --profile csm-1b --langs no sv da` lists; with --fetch it also brings what is missing to models/.
"""

import argparse
import math
import sys

import httpx
import pandas as pd
import yaml
from huggingface_hub import is_offline_mode

from csm_nb import hub, paths
from csm_nb.hub import find_model, is_hub_id, list_models
from csm_nb.paths import STAGES, show_path
from csm_nb.recipe import ParameterError, read_recipe
from csm_nb.runs import params

GB = 1e9
POSITION_FLOP, DEPTH_FLOP = 4.0e9, 14.8e9  # of training LoRA on CSM-1B: per position, per frame of the depth decoder (README)
CLIP_POSITIONS = 100  # of a clip of 6 s and its text
TRAININGS = (("01_anchor", "anchor_clips", 1), ("02_synthetic", "synthetic_clips", 1), ("03_adapter", "corpus_clips", 1),
             ("05_phonemes", "phoneme_clips", 2))
# Size in GB and licence of what the profiles name, for where the hub can not be asked: about, and to be looked up on their cards
# before anything is published. Sizes are counted from the models' shapes, at two bytes per parameter for whisper-large-v3 and
# four for the others. Where the hub can be asked, its own figures are shown.
KNOWN = {
    "sesame/csm-1b": (6.6, "apache-2.0, terms to accept on its page"),
    "kyutai/mimi": (0.4, "cc-by-4.0"),
    "facebook/mms-lid-126": (3.9, "cc-by-nc-4.0: not for commercial use"),
    "NbAiLab/nb-whisper-large": (6.2, "apache-2.0"),
    "KBLab/kb-whisper-large": (6.2, "apache-2.0"),
    "CoRal-project/roest-v1-whisper-1.5b": (6.2, "openrail"),
    "CoRal-project/roest-wav2vec2-315m-v2": (1.3, "openrail"),
    "openai/whisper-large-v3": (3.1, "apache-2.0"),
}


def list_needed(languages, profile: str, stages=STAGES) -> pd.DataFrame:
    """Return a row per model that `profile` names for these languages and stages; nothing is fetched or loaded.

    Columns: model, used (parameter and stages), languages, here (its folder, "cached" for one in the hub's own cache, ""), fault
    (what keeps it from being whole), GB, licence. Raises ParameterError for an unknown profile, language or stage.
    """
    needed = {}
    for language in dict.fromkeys(languages):
        values, _ = params.load_params(params.find_params(language, profile))
        for stage in stages:
            found = {key: values.get(key, cell.default) for key, cell in params.read_cell(stage).items()}
            for key, names in list_models(found).items():
                for name in names:
                    users = needed.setdefault(name, {})
                    users.setdefault(key, set()).add(stage[:2])
                    users.setdefault("languages", set()).add(language)
    rows, ask = [], not is_offline_mode()
    for name, users in needed.items():
        languages = users.pop("languages")
        try:
            rows.append(_describe(name, users, languages, ask))
        except httpx.TransportError:  # no network: not to be waited for once per model
            ask = False
            rows.append(_describe(name, users, languages, ask))
    return pd.DataFrame(rows, columns=["model", "used", "languages", "here", "fault", "GB", "licence"])


def _describe(name, users, languages, ask):
    used = "; ".join(f"{key} of {' '.join(sorted(stages))}" for key, stages in users.items())
    place = find_model(name)
    cached = place is None and is_hub_id(name)
    folder = hub.find_cached(name) if cached else place
    row = {"model": name, "used": used, "languages": " ".join(sorted(languages)), "here": "", "fault": ""}
    if folder is None or not folder.exists():
        gb, licence = (_ask_hub(name) if ask else None) or KNOWN.get(name, (float("nan"), "not known"))
        return row | {"GB": gb, "licence": licence}
    row["here"] = "cached" if cached else show_path(folder)
    files = [path for path in (folder.iterdir() if folder.is_dir() else [folder]) if path.is_file()]
    faults = [fault for use in users for fault in hub.find_faults(folder, use)] if folder.is_dir() else []
    row["fault"], row["GB"] = "; ".join(dict.fromkeys(faults)), sum(path.stat().st_size for path in files) / GB
    return row | {"licence": _read_licence(name) or KNOWN.get(name, ("", "not stated in its card"))[1]}


def _read_licence(name):
    parts = hub.read_card(name).split("---\n")
    try:
        front = yaml.safe_load(parts[1]) if len(parts) > 2 and not parts[0] else None
    except yaml.YAMLError:
        front = None
    return str(front["license"]) if isinstance(front, dict) and front.get("license") else ""


def _ask_hub(name):
    """(GB, licence) of the files that would be fetched, or None where the hub does not say (terms to accept, say)."""
    if not is_hub_id(name):
        return None
    try:
        files, info = hub.list_remote(name)
    except httpx.TransportError:
        raise
    except hub.HUB_ERRORS:
        return None
    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    licence = info.card_data.get("license") if info.card_data else None
    return sum(sizes[file] for file in files) / GB, licence or KNOWN.get(name, ("", "not stated in its card"))[1]


def describe_work(language: str, profile: str) -> str:
    """Return what the trainings of a language will ask of a machine, in words: steps, and for CSM-1B memory, hours and price.

    Hours are operations by the speed of the machine. Where a recipe counts epochs, a clip is taken for one of 6 s.
    """
    values, origins = params.load_params(params.find_params(language, profile))
    steps, positions, flop = 0, 0, 0.0
    for stage, clips, times in TRAININGS:
        found = params.check_params(stage, values | {"init_adapter": ""}, origins)
        recipe = read_recipe(found)
        row = recipe.max_tokens * recipe.batch_size * recipe.gradient_accumulation
        read = times * (recipe.steps * row if recipe.steps else recipe.epochs * found[clips] * CLIP_POSITIONS)
        steps, positions = steps + math.ceil(read / row), positions + read
        flop += read * (POSITION_FLOP + DEPTH_FLOP * recipe.depth_ratio)
    said = f"01, 02, 03 and 05 train about {steps:,} steps of {positions / steps:,.0f} positions per language."
    if str(found["base_model"]).split("/")[-1] == "csm-1b" and values.get("method", "lora") == "lora":
        said += (f"\nAt CSM-1B's size that is {flop / 1e15:.0f} PFLOP: {flop / 5e13 / 3600:.1f} hours at 50 TFLOP/s, and as many "
                 "times the price of an hour.\n"
                 "LoRA in bfloat16 took 7.6 GB at one row of 1,024 positions (bench/train.py, on a CPU).")
    return said + ("\nWhat it is on your machine, 01 to 03 measure in a few real steps before they train, and stop where the "
                   f"memory will not do:\n    make run PROFILE={profile} LANGS={language} STAGES=01_anchor "
                   "SET='steps=1 price_per_hour=2.5'")


def fetch_missing(table: pd.DataFrame) -> list[str]:
    """Bring each hub id of list_needed that is not here or not whole to models/ and return what could not be had, in words.

    Nothing is begun where the disk would not hold it all.
    """
    missing = table[(table.here == "") | (table.fault != "")]
    wanted, free = missing.GB.sum() * GB, hub.count_free_disk()
    if wanted > free:
        return [f"{wanted / GB:.1f} GB are missing and the disk has {free / GB:.1f} GB free: make room, or name fewer languages"]
    failed = []
    for name in missing.model:
        try:
            if not is_hub_id(name):
                raise hub.ModelError(f"{name}: a folder, which no hub can bring")
            folder = paths.ROOT / hub.place_model(name)
            hub.check_folder(hub.download_model(name, folder), name)
            print(f"{name} is in {show_path(folder)}", flush=True)
        except hub.ModelError as error:
            failed.append(str(error))
            if isinstance(error.__cause__, httpx.TransportError):
                break  # nor will it bring the others
    return failed


def parse_arguments(arguments=None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(prog="python -m csm_nb.runs.models", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="mini", help="mini, csm-1b, test or a YAML file")
    parser.add_argument("--langs", nargs="+", default=["no", "sv", "da"], help="languages: files of params/")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE", help=" ".join(STAGES))
    parser.add_argument("--fetch", action="store_true", help="bring what is missing from the hub to models/")
    return parser.parse_args(arguments)


def main(arguments=None) -> int:
    """Print the list, fetch if asked to, and say what is left to do; return 0 if all is here, 1 if not, 2 for bad parameters."""
    options = parse_arguments(arguments)
    try:
        table = list_needed(options.langs, options.profile, options.stages)
    except ParameterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for row in table.itertuples():
        state = f"NOT WHOLE in {row.here}: {row.fault}" if row.fault else row.here or "MISSING"
        print(f"{row.model:<38} {row.GB:6.2f} GB  {row.licence}\n    {row.used} ({row.languages}): {state}")
    missing = table[(table.here == "") | (table.fault != "")]
    print(f"\n{len(table) - len(missing)} of {len(table)} models are here; {missing.GB.sum():.1f} GB are missing, "
          f"{hub.count_free_disk() / GB:.1f} GB of disk are free.\n")
    print(describe_work(options.langs[0], options.profile))
    failed = []
    if len(missing) and options.fetch and not is_offline_mode():
        failed = fetch_missing(table)
        table = list_needed(options.langs, options.profile, options.stages)
        missing = table[(table.here == "") | (table.fault != "")]
    if len(missing):
        print("\nWhere there is a network, and after accepting the terms of those that have any, run", *(
            f"    {hub.tell_download(name)}" if is_hub_id(name) else f"    (copy or make {name})" for name in missing.model),
            "and copy the folders to models/ here, where they are looked for by their last name.", sep="\n")
    for reason in failed:
        print(f"\nerror: {reason}", file=sys.stderr)
    return 1 if len(missing) else 0


if __name__ == "__main__":
    sys.exit(main())
