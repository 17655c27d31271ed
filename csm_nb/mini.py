"""The recipe of the miniature models: one command makes codec, base and judges from espeak-ng speech, with no download.

python -m csm_nb.mini codec|base|judges|all --minutes N [--out models] [--work data/mini] [--seed 0]
python -m csm_nb.mini evaluate
"""

import argparse

import torch

from csm_nb.params import resolve_path

# What `all` gives each part of its minutes.
SHARES = {"codec": 0.45, "base": 0.25, "asr": 0.2, "lid": 0.1}


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m csm_nb.mini", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", choices=["codec", "base", "judges", "all", "evaluate"])
    parser.add_argument("--minutes", type=float, default=100, help="training time on this machine (judges: 2/3 ASR, 1/3 language ID)")
    parser.add_argument("--out", default="models", help="folder that gets csm-mini, asr-mini and lid-mini")
    parser.add_argument("--work", default="data/mini", help="checkpoints; a killed run goes on from them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all")
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error(f"--minutes is {options.minutes:g}; it has to be above 0")
    if options.threads:
        torch.set_num_threads(options.threads)
    out, work = resolve_path(options.out), resolve_path(options.work)
    minutes = {part: options.minutes * share for part, share in SHARES.items()}
    if options.part == "evaluate":
        from csm_nb.mini_evaluate import evaluate_models
        print(evaluate_models(out))
        return
    if options.part in ("codec", "all"):
        from csm_nb.mini_codec import train_codec
        train_codec(work / "codec/model", minutes["codec"] if options.part == "all" else options.minutes, options.seed, work / "codec")
    if options.part in ("base", "all"):
        from csm_nb.mini_base import train_base
        if not (work / "codec/model/config.json").exists():
            parser.error(f"{work}/codec/model holds no codec; run `python -m csm_nb.mini codec` first")
        train_base(work / "codec/model", out / "csm-mini", minutes["base"] if options.part == "all" else options.minutes,
                   options.seed, work / "base")
    if options.part in ("judges", "all"):
        from csm_nb.mini_judges import train_asr, train_lid
        total = minutes["asr"] + minutes["lid"] if options.part == "all" else options.minutes
        train_asr(out / "asr-mini", total * 2 / 3, options.seed, work / "asr")
        train_lid(out / "lid-mini", total / 3, options.seed, work / "lid")


if __name__ == "__main__":
    main()
