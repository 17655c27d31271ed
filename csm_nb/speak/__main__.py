"""Say a text.

python -m csm_nb.speak --lang no --text "Hei, hvordan går det?" --out hei.wav
The text may also come from a file (--file) or a pipe. A text of several sentences is read one after the other.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from csm_nb.audio import SAMPLE_RATE, AudioError, write_audio
from csm_nb.clean import EncodingError, read_text
from csm_nb.csm.adapters import AdapterError, load_adapter
from csm_nb.csm.load import BaseModelError, load_base
from csm_nb.csm.record import read_record
from csm_nb.csm.speakers import SpeakerError
from csm_nb.csm.tags import TagError
from csm_nb.hub import ModelError, find_model
from csm_nb.languages import get_language
from csm_nb.paths import resolve_path, show_path
from csm_nb.recipe import TRAINED
from csm_nb.speak.generate import SpeechError
from csm_nb.speak.long import read_aloud

HOME = "en"  # what the base speaks


def parse_arguments(arguments=None) -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser("python -m csm_nb.speak", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lang", default=HOME, help="language of the text: its adapter speaks (default: en, the base)")
    parser.add_argument("--text", help="what to say (default: standard input)")
    parser.add_argument("--file", type=Path, help="a text file to read")
    parser.add_argument("--out", type=Path, default=Path("speech.wav"), help="where it goes: .wav .flac .mp3 .ogg")
    parser.add_argument("--base", default="models/csm-mini", help="folder or hub id of the base")
    parser.add_argument("--adapters", default="models", help="folder that holds lora_<language> or full_<language>")
    parser.add_argument("--speaker", default="", help="a voice of the adapter (default: the one with the most clips)")
    parser.add_argument("--seed", type=int, default=0, help="another seed says it otherwise")
    parser.add_argument("--temperature", type=float, default=0.6, help="0 takes the likeliest code each time")
    parser.add_argument("--attempts", type=int, default=1, help="say what a recogniser does not understand again, up to so often")
    parser.add_argument("--asr", default="models/asr-mini", help="recogniser for --attempts: folder, hub id, or by-language")
    parser.add_argument("--device", default="auto")
    return parser.parse_args(arguments)


def load_speaker(base: str, adapters, language: str, device: str):
    """Return (model, processor, name) of what speaks `language`: its adapter, its fully trained model, or the base for English.

    One of several languages (lora_no+sv) speaks each where none is of that language alone; a base that was taught the language
    itself, as a merged one, needs none. Raises AdapterError where there is none, with the command that makes it.
    """
    home = resolve_path(adapters)
    shared = [path for path in sorted(home.glob("*_*+*")) if language in path.name.partition("_")[2].split("+")]
    folders = [home / f"{name}_{language}" for name in TRAINED] + shared
    folder = next((path for path in folders if (path / TRAINED.get(path.name.partition("_")[0], "")).is_file()), None)
    taught = read_record(find_model(base))
    if language == taught.get("language") or language in taught.get("tags", {}):
        folder = None
    elif folder is None and language != HOME:
        there = ", ".join(sorted(path.name for path in home.glob("[lf][ou][rl][al]_*"))) or "none"
        raise AdapterError(f"there is no {show_path(folders[0])}; there: {there}. `make run LANGS={language}` makes it")
    if folder is not None and folder.name.startswith("full"):
        return *load_base(str(folder), device), folder.name
    model, processor = load_base(base, device)
    return (model if folder is None else load_adapter(model, folder)), processor, folder.name if folder else "base"


def main(arguments=None) -> int:
    """Say what the command line asks for; return 0, or 2 with what is wrong."""
    options = parse_arguments(arguments)
    try:
        language = get_language(options.lang).code
        text = options.text or (read_text(options.file) if options.file else sys.stdin.read())
        model, processor, name = load_speaker(options.base, options.adapters, language, options.device)
        how = {"temperature": options.temperature}
        if options.attempts > 1:
            from csm_nb.judge.judges import load_asr

            how |= {"attempts": options.attempts, "asr": load_asr(options.asr, options.device, language)}
        reading = read_aloud(model, processor, text, language, options.speaker, options.seed, _show_progress, **how)
        comment = f"synthetic speech: csm-nb, {Path(options.base).name}, {name}, seed {options.seed}"
        write_audio(options.out, reading.wav, comment=comment)
    except (AdapterError, AudioError, BaseModelError, EncodingError, ModelError, SpeakerError, SpeechError, TagError, ValueError,
            OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    reasons = Counter(one.finish for one in reading.said)
    print(f"{options.out}: {len(reading.wav) / SAMPLE_RATE:.1f} s by {name}, {len(reading.said)} sentences ("
          f"{', '.join(f'{count} {finish}' for finish, count in reasons.items())})")
    return 0


def _show_progress(number, count):
    if sys.stderr.isatty():
        end = "\n" if number == count else ""
        print(f"\r{number}/{count} {'#' * (30 * number // count):<30}", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
