"""What to do next after a verdict: for the box above a page, and the terminal's line."""

from csm_nb.languages import get_language

TRAIN = "make run LANGS={language} STAGES='01_anchor 02_synthetic 03_adapter'"
NEXT = {
    "00_mimi_sanity": {
        "go": f"train: {TRAIN}",
        "stop": "listen to what is lost, below; compare more codebooks, or another codec (codec_model). What the codec loses, no "
                "training brings back",
        "unclear": "see below which criterion is not decided and what it lacks: more clips, texts, or marks",
    },
    "01_anchor": {
        "learned": "02_synthetic goes on from this adapter",
        "no gain": "try another learning rate or more steps: the loss that is held out does not fall",
        "unclear": "give more clips to hold out (anchor_clips), or more steps",
    },
    "02_synthetic": {
        "learned": "03_adapter goes on from this adapter, with your corpus",
        "no gain": "try another learning rate or more steps: the loss that is held out does not fall",
        "unclear": "give more clips to hold out (synthetic_clips), or more steps",
    },
    "03_adapter": {
        "learned": "ask 04_confusion who is heard: make run LANGS={language} STAGES=04_confusion",
        "no gain": "look at the corpus and the learning rate (lr): these clips teach nothing that 02 had not taught",
        "unclear": "give more clips to hold out (corpus_clips), or more steps",
    },
    "04_confusion": {
        "clear": "listen to it, below: the judges hear a language, not whether it is pleasant",
        "bleeds": "train 03_adapter longer or on more speech of {name}, and look in the table below at what is said wrong",
        "unclear": "read more sentences: make run LANGS={language} STAGES=04_confusion SET='sentences=...'",
    },
    "05_phonemes": {
        "phonemes": "train 02 and 03 on phonemes, or give a lexicon for what is still said wrong",
        "spelling": "stay with spelling: phonemes are understood less",
        "no difference": "stay with spelling, the simpler of two that are alike here; more sentences may tell them apart",
        "unclear": "read more sentences: SET='sentences=...'",
    },
}


def say_next(stage: str, verdict: str, params: dict) -> str:
    """Return what to do next after a stage's verdict, one sentence with the command where there is one; "" if unknown.

    What 00 says of synthetic speech alone is tried on recordings before anything else.
    """
    advice = next((advice for word, advice in NEXT.get(stage, {}).items() if verdict.startswith(word)), "")
    if stage == "00_mimi_sanity" and not params.get("audio") and verdict != "go":
        advice = "try it on recordings, since this speech is synthetic: make run LANGS={language} STAGES=00_mimi_sanity AUDIO=..."
    language = params.get("language", "en")
    return advice.format(language=language, name=get_language(language).name)
