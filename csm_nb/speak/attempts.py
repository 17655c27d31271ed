"""A safety net: what a recogniser does not understand, or what ran away, is said again, and the best is kept."""

from dataclasses import replace

from csm_nb.judge.judges import transcribe
from csm_nb.speak.generate import Speech, speak
from csm_nb.text.normalise import character_error_rates

MOST_CER = 0.3  # characters wrong, as a share, of a clip that is said again: beyond what recognisers make of clear speech


def speak_again(model, processor, texts, language: str, asr, attempts: int = 3, most_cer: float = MOST_CER, seed: int = 0,
                **how) -> tuple[list[Speech], dict]:
    """Return what is said of `texts`, each the best of up to `attempts`, and how often one was said again.

    A clip is said again, by another seed, where it ran away or the recogniser `asr` has a character error rate over `most_cer`.
    The best is one that ended, with the lowest error rate; one of a later attempt has the finish "retry". `how` is that of
    speak. The account holds texts, said_again, clips (all that were spoken), and how many are still over the bound.
    """
    texts, best, spoken, again = list(texts), {}, 0, set()
    wanted = list(range(len(texts)))
    for attempt in range(attempts):
        said = speak(model, processor, [texts[i] for i in wanted], seed=seed + 1_000_003 * attempt, language=language,
                     **how)
        rates = character_error_rates([texts[i] for i in wanted], transcribe(asr, [one.wav for one in said]), language)
        spoken += len(said)
        for i, one, rate in zip(wanted, said, rates, strict=True):
            one = replace(one, finish="retry") if attempt and one.ended else one
            best[i] = min(best.get(i, (2, 0, one)), (not one.ended, rate, one), key=lambda found: found[:2])
        wanted = [i for i in wanted if best[i][0] or best[i][1] > most_cer]
        if not wanted:
            break
        again |= set(wanted) if attempt + 1 < attempts else set()
    account = {"texts": len(texts), "said again": len(again), "clips": spoken, "still over the bound": len(wanted)}
    return [best[i][2] for i in range(len(texts))], account
