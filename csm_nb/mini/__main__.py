"""The recipe of the miniature models: one command makes codec, base and judges from espeak-ng speech, with no download.

python -m csm_nb.mini codec|base|asr|lid|judges|all --minutes N [--out models] [--work data/mini] [--seed 0]
python -m csm_nb.mini evaluate
"""

import argparse
from pathlib import Path

import torch

from csm_nb.paths import resolve_path

# What `all` gives each part of its minutes, and `judges` its two. The codec comes first: the others hear it.
SHARES = {"codec": 0.20, "base": 0.40, "asr": 0.33, "lid": 0.07}


def main(arguments=None) -> None:
    """Make the part of the miniature models that the command line names, or evaluate them all."""
    parser = argparse.ArgumentParser("python -m csm_nb.mini", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", choices=[*SHARES, "judges", "all", "evaluate"])
    parser.add_argument("--minutes", type=float, default=320, help="training time on this machine (default: %(default)s)")
    parser.add_argument("--out", default="models", help="folder that gets csm-mini, asr-mini and lid-mini (default: models)")
    parser.add_argument("--work", default="data/mini", help="checkpoints; a killed run goes on from them (default: data/mini)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: all)")
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error(f"--minutes is {options.minutes:g}; it has to be above 0")
    if options.threads:
        torch.set_num_threads(options.threads)
    out, work = resolve_path(options.out), resolve_path(options.work)
    if options.part == "evaluate":
        evaluate(out, work / "evaluate")
        return
    parts = {"all": list(SHARES), "judges": ["asr", "lid"]}.get(options.part, [options.part])
    whole = sum(SHARES[part] for part in parts)
    for part in parts:
        train_part(part, round(options.minutes * SHARES[part] / whole, 2), out, work, options.seed)


def train_part(part: str, minutes: float, out: Path, work: Path, seed: int) -> None:
    """Train "codec", "base", "asr" or "lid" for so many minutes; all but the codec need the codec in `work`."""
    codec_dir = work / "codec/model"
    if part == "codec":
        from csm_nb.mini.codec import train_codec
        train_codec(codec_dir, minutes, seed, work / "codec")
        return
    if not (codec_dir / "config.json").exists():
        raise SystemExit(f"{codec_dir} holds no codec; run `python -m csm_nb.mini codec` first")
    if part == "base":
        from csm_nb.mini.base import train_base
        train_base(codec_dir, out / "csm-mini", minutes, seed, work / "base")
        return
    from csm_nb.codec.mimi import load_codec
    from csm_nb.mini.judges import train_asr, train_lid
    train = train_asr if part == "asr" else train_lid
    train(out / f"{part}-mini", minutes, seed, work / part, codec=load_codec(codec_dir))


def evaluate(out: Path, work: Path) -> None:
    """Print the table of figures and write it into the three model cards."""
    from csm_nb.mini.evaluate import evaluate_models, tabulate, write_cards
    figures = evaluate_models(out, work=work)
    print(tabulate(figures))
    print("written to", *write_cards(out, figures))


if __name__ == "__main__":
    main()
