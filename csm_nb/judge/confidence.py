"""How sure a recogniser is of what it wrote: the mean probability of what it chose."""

import numpy as np
import torch
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from csm_nb.audio import SAMPLE_RATE, resample


@torch.inference_mode()
def measure_confidence(asr, wavs, texts) -> np.ndarray:
    """Return for each clip (24 kHz, at most 30 s) how sure the recogniser is of the text that it wrote for it, 0 to 1.

    Of a CTC model it is the mean posterior of the labels on its best path, blanks left out; of a Whisper the mean probability
    of the text's tokens, each after those before it. It is 0 where nothing was written. Neither is calibrated: which one is
    enough is to be found by listening.
    """
    return np.array([_measure(asr, wav, text) if text else 0.0 for wav, text in zip(wavs, texts, strict=True)], float)


def _measure(asr, wav, text):
    rate = asr.feature_extractor.sampling_rate
    inputs = asr.feature_extractor(resample(wav, SAMPLE_RATE, rate), sampling_rate=rate, return_tensors="pt").to(asr.model.device)
    if asr.type != "seq2seq_whisper":
        best, labels = asr.model(**inputs).logits[0].float().softmax(-1).max(-1)
        return float(best[labels != asr.model.config.pad_token_id].mean().nan_to_num())
    prompt = _list_prompt(asr.generation_config)
    tokens = torch.tensor([prompt + asr.tokenizer(text, add_special_tokens=False).input_ids], device=asr.model.device)
    shares = asr.model(**inputs, decoder_input_ids=tokens[:, :-1]).logits[0].float().softmax(-1)
    return float(shares.gather(1, tokens[0, 1:, None])[len(prompt) - 1 :].mean())


def _list_prompt(settings):
    """Return the tokens that a Whisper's text begins with, by what it was told (judges.load_asr)."""
    told = (getattr(settings, "lang_to_id", None) or {}).get(f"<|{TO_LANGUAGE_CODE.get(getattr(settings, 'language', None))}|>")
    task = (getattr(settings, "task_to_id", None) or {}).get(getattr(settings, "task", None))
    plain = getattr(settings, "no_timestamps_token_id", None)
    return [token for token in (settings.decoder_start_token_id, told, task, plain) if token is not None]
