"""Recipe of the two small judges, asr-mini and lid-mini: made on a CPU from espeak-ng speech that is spoken on the fly.

Every clip is new: a training sentence (or a piece of one), a voice, a pitch, a rate and a recording channel drawn by
the step's own generator. The same voices speak every language, so that a voice never gives a language away, and part of
what the language judge hears is text of one language read by the voice of another: it judges sounds and not words.
"""

import json
from pathlib import Path

import numpy as np
import scipy.fft
import scipy.signal
import torch
from transformers import (
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertConfig,
    Wav2Vec2BertForCTC,
    Wav2Vec2BertForSequenceClassification,
    Wav2Vec2BertProcessor,
    Wav2Vec2CTCTokenizer,
)

from csm_nb import paths
from csm_nb.audio import SAMPLE_RATE as SPEECH_RATE
from csm_nb.codec.mimi import round_trip
from csm_nb.device import half_precision, pick_device
from csm_nb.mini.loop import describe_training, fit
from csm_nb.provenance import write_json
from csm_nb.synth.espeak import Voice, speak_text
from csm_nb.text.normalise import normalise_text
from csm_nb.text.sentences import make_sentences

CODES = ("en", "no", "sv", "da", "de", "fr", "es", "nl", "it", "pl")
LETTERS = "'abcdefghijklmnopqrstuvwxyzßàáâãäåæçèéêëìíîïñòóôõöøùúûüýÿąćęłńóœśźż"
JUDGE_RATE = 16000  # Hz
# espeak-ng formant variants heard in training; those of HELD_OUT_VOICES (m1, f3) are not among them
VARIANTS = ("m2", "m3", "m4", "m5", "m6", "m7", "m8", "f1", "f2", "f4", "f5", "adam", "anika", "ian", "linda", "zac")
EXTRACTOR = SeamlessM4TFeatureExtractor(stride=3)  # 10 ms mel frames, three stacked into one step: 33 Hz
SENTENCES = 12_000  # training sentences drawn of each language
FLAT_START = 0.08  # share of the training time with single words and, in its first half, evenly laid letters
LID_LAYERS = 2  # of the recogniser, that the language judge begins with
ROUND_TRIPS = 0.4  # share of clips that go through the codec
CODEC_FROM = 0.6  # share of the recogniser's training time before any does: what comes out of the codec is slow to make
READ_BY_OTHERS = 0.25  # share of language-judge clips in which the text and the voice are of two languages


# ---- speech --------------------------------------------------------------------------------------------------------


def draw_voice(rng) -> Voice:
    """Return one of the training variants at a random pitch, melody spread and rate; never a held-out voice."""
    pitch, spread, rate = rng.integers((25, 35, 135), (76, 90, 196)).tolist()
    return Voice("judge", str(rng.choice(VARIANTS)), pitch, spread, rate)


def degrade(wav, rng, silence: float = 0.3, rate_in: int = SPEECH_RATE, rate_out: int = JUDGE_RATE) -> np.ndarray:
    """Return `wav` as another chain delivers it: speed, equaliser, low-pass, up to `silence` s at the ends, noise, level.

    Speed and resampling, equaliser and low-pass are one multiplication in the frequency domain.
    """
    speed = rng.uniform(0.92, 1.09)
    size = scipy.fft.next_fast_len(len(wav), real=True)
    spectrum = scipy.fft.rfft(wav, size)
    points = rng.normal(0, 4 if rng.random() < 0.7 else 0, 9)  # dB, smooth over frequency
    curve = np.interp(np.linspace(0, 8, len(spectrum)), np.arange(9), points)
    if rng.random() < 0.3:
        hertz = np.linspace(0, rate_in / 2, len(spectrum))
        curve -= 24 * np.maximum(0, np.log2(np.maximum(hertz, 1) / rng.uniform(3000, 8000)))
    size_out = scipy.fft.next_fast_len(round(size * rate_out / rate_in / speed), real=True)
    bins = size_out // 2 + 1
    spectrum = (spectrum * 10 ** (curve / 20))[:bins]
    out = scipy.fft.irfft(spectrum, size_out) * (size_out / size)
    out = out[: len(wav) * size_out // size]
    out = np.pad(out, tuple((rng.uniform(0, silence, 2) * rng.integers(0, 2, 2) * rate_out).astype(int)))
    level = np.sqrt(np.mean(out**2)) + 1e-9
    if rng.random() < 0.7:
        colour = rng.uniform(0, 0.97)  # white to brownish
        noise = scipy.signal.lfilter([1], [1, -colour], rng.standard_normal(len(out), dtype=np.float32))
        out = out + noise * (level / noise.std() * 10 ** (-rng.uniform(12, 50) / 20))
    return (out * (rng.uniform(0.02, 0.15) / level)).astype(np.float32)


def pass_codec(codec, wav, rng):
    """Return `wav`, or in ROUND_TRIPS of the cases what `codec` makes of it; without a codec always `wav`."""
    if codec is None or rng.random() >= ROUND_TRIPS:
        return wav
    with half_precision(codec.device.type):
        return round_trip(codec, wav)


def extract_features(wav):
    """Return what the SeamlessM4TFeatureExtractor makes of one 16 kHz clip, six times faster: (steps, 240).

    Its own window and mel filters, in torch instead of a loop over frames; a test holds the two equal.
    """
    frames = torch.from_numpy(wav * np.float32(2**15)).unfold(0, 400, 160)
    frames = frames - frames.mean(1, keepdim=True)
    frames = torch.cat([frames[:, :1] * 0.03, frames[:, 1:] - 0.97 * frames[:, :-1]], 1)
    x = torch.fft.rfft(frames * torch.as_tensor(EXTRACTOR.window, dtype=torch.float32), 512)
    x = (x.real**2 + x.imag**2) @ torch.as_tensor(EXTRACTOR.mel_filters, dtype=torch.float32)
    x = x.clamp_min(1.192092955078125e-07).log()
    x = (x - x.mean(0)) / torch.sqrt(x.var(0) + 1e-7)
    return x[: len(x) // EXTRACTOR.stride * EXTRACTOR.stride].reshape(-1, 80 * EXTRACTOR.stride)


def mask_features(features, rng):
    """Blank a band of mels and a stretch of time in two clips of three: light SpecAugment (Park et al. 2019)."""
    if rng.random() < 0.67:
        low, start = rng.integers(0, 70), rng.integers(0, len(features))
        features.view(len(features), -1, 80)[:, :, low : low + rng.integers(0, 14)] = 0
        features[start : start + rng.integers(0, 6)] = 0
    return features


def pad_features(rows):
    """Return (clips, steps, features) padded with zeros, and the mask of real steps."""
    lengths = torch.tensor([len(row) for row in rows])
    features = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return features, (torch.arange(features.shape[1])[None] < lengths[:, None]).long()


def load_sentences(seed: int) -> dict:
    """Return training sentences of every language, as lists of words. Held-out sentences are never among them."""
    return {code: [s.split() for s in make_sentences(code, SENTENCES, seed=seed, split="train")] for code in CODES}


def draw_words(sentences, letters: int, rng) -> list[str]:
    """Return `letters` letters or more in whole words: sentences or pieces of them, or (one time in five) words of many."""
    words, salad, whole = [], rng.random() < 0.2, rng.random() < 0.5
    first = 0 if rng.random() < 0.6 else rng.integers(100)
    while (lengths := np.cumsum([0] + [len(word) + 1 for word in words]))[-1] < letters:
        sentence = sentences[rng.integers(len(sentences))]
        words += [sentence[rng.integers(len(sentence))]] if salad else sentence[first % len(sentence) :]
        first = 0
    return words if whole and letters > 12 else words[: np.searchsorted(lengths, letters)]


def draw_text(sentences, letters: int, rng) -> str:
    """Return draw_words, drawn until there is something to say."""
    while not normalise_text(text := " ".join(draw_words(sentences, letters, rng))):
        pass
    return text


# ---- speech recognition --------------------------------------------------------------------------------------------


def make_tokenizer(folder) -> Wav2Vec2CTCTokenizer:
    """Return a tokenizer of the characters of all ten languages, `|` between words, the CTC blank is `<pad>`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "vocab.json"
    path.write_text(json.dumps({token: i for i, token in enumerate(["<pad>", "<unk>", "|", *sorted(set(LETTERS))])}))
    return Wav2Vec2CTCTokenizer(str(path), bos_token=None, eos_token=None, pad_token="<pad>", unk_token="<unk>",
                                word_delimiter_token="|")


def encoder_config(hidden: int, layers: int, **more) -> Wav2Vec2BertConfig:
    """Return the config of a conformer of `layers` x `hidden` on stacked mel frames; none of it runs at the sample rate.

    No dropout: training is too short to learn anything by heart.
    """
    return Wav2Vec2BertConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=hidden * 8 // 3,
        feature_projection_input_dim=80 * EXTRACTOR.stride, position_embeddings_type="rotary",
        conv_depthwise_kernel_size=15, add_adapter=False, apply_spec_augment=False, mask_time_prob=0.0, layerdrop=0.0,
        hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, conformer_conv_dropout=0.0,
        feat_proj_dropout=0.0, final_dropout=0.0, **more,
    )


def make_asr_batches(sentences, tokenizer, rng, done: float, steps_in_batch: int, codec=None, clips: int = 96):
    """Return `clips` new clips in ten languages as batches (features, mask, labels, languages), each of like lengths.

    Single words first, then ever longer pieces, whole sentences after a third of the time.
    """
    flat, rows = done < FLAT_START, []
    longest = 12 + int(30 * min(1.0, 3 * max(0.0, done - FLAT_START)))
    for _ in range(clips):
        language = int(rng.integers(len(CODES)))
        code = CODES[language]
        text = draw_text(sentences[code], 1 if flat else int(rng.integers(6, longest)), rng)
        wav = speak_text(text, code, draw_voice(rng))
        wav = degrade(pass_codec(codec, wav, rng), rng, silence=0.0 if flat else 0.3)
        ids = torch.tensor(tokenizer(normalise_text(text)).input_ids)
        rows.append((mask_features(extract_features(wav), rng), ids, language))
    rows.sort(key=lambda row: len(row[0]))
    batches, batch = [], []
    for row in rows:
        if batch and len(row[0]) * (len(batch) + 1) > steps_in_batch:
            batches.append(batch)
            batch = []
        batch.append(row)
    batches.append(batch)
    shuffled = []
    for i in rng.permutation(len(batches)):
        features, labels, languages = zip(*batches[i], strict=True)
        labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        shuffled.append((*pad_features(features), labels, torch.tensor(languages)))
    return shuffled


def flat_start_loss(logits, mask, labels):
    """Return the cross-entropy of single words against letters laid evenly over their frames, blank at the ends.

    CTC from nothing answers "blank" everywhere for its first thousand steps; this (HMM training's flat start) gives it
    letters to align within a minute.
    """
    lengths, letters = mask.sum(1, keepdim=True), (labels >= 0).sum(1, keepdim=True)
    steps = torch.arange(logits.shape[1], device=logits.device)[None]
    place = (steps - 2) * letters // (lengths - 4).clamp_min(1)  # 60 ms of silence at both ends are two steps
    targets = labels.gather(1, place.clamp(0, labels.shape[1] - 1))
    targets = targets.masked_fill((place < 0) | (place >= letters), 0).masked_fill(mask == 0, -100)
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100)


def train_asr(out, minutes: float = 20, seed: int = 0, work=paths.ROOT / "data/mini/asr", hidden: int = 192, layers: int = 5,
              lr: float = 1.5e-3, codec=None, steps_in_batch: int = 600) -> Path:
    """Train the character recogniser for `minutes` and save it in `out`; a killed run goes on from what is in `work`.

    From CODEC_FROM of the time on, ROUND_TRIPS of the clips go through `codec`, if there is one, as what is judged later
    does. A linear reader of the language on the second layer trains along at no cost: the layers below it are what
    `train_lid` begins with.
    """
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(work)
    config = encoder_config(hidden, layers, vocab_size=len(tokenizer),
                            pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=None,
                            ctc_loss_reduction="mean", ctc_zero_infinity=True)
    model = Wav2Vec2BertForCTC(config).train()
    sentences = load_sentences(seed)

    reader = torch.nn.Linear(hidden, len(CODES))
    device, queue = pick_device(), []
    model.to(device), reader.to(device)

    def compute_loss(rng, done):
        if not queue:
            heard = codec if done >= CODEC_FROM else None
            queue.extend(make_asr_batches(sentences, tokenizer, rng, done, steps_in_batch, heard))
        features, mask, labels, languages = (part.to(device) for part in queue.pop())
        with half_precision(device):
            output = model(input_features=features, attention_mask=mask, labels=labels, output_hidden_states=True)
        logits, loss, share = output.logits.float(), output.loss, min(1.0, 2 - 2 * done / FLAT_START)
        if share > 0:
            loss = (1 - share) * loss + share * flat_start_loss(logits, mask, labels)
        if (padding := logits[mask == 0]).numel():  # nothing is written behind a short clip in a batch
            blank = torch.zeros(len(padding), dtype=torch.long, device=device)
            loss = loss + 0.1 * torch.nn.functional.cross_entropy(padding, blank)
        lower = output.hidden_states[LID_LAYERS] if layers > LID_LAYERS else output.hidden_states[-1]
        guess = reader((lower.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
        loss = loss + 0.2 * torch.nn.functional.cross_entropy(guess, languages)
        right = (guess.argmax(1) == languages).float().mean()
        return loss, {"loss": float(loss.detach()), "ctc": float(output.loss.detach()), "language": float(right)}

    modules = {"model": model, "reader": reader}
    result = fit(modules, compute_loss, minutes, work, lr, seed=seed, betas=(0.9, 0.98), weight_decay=0.01)
    return save_judge(model, Wav2Vec2BertProcessor(EXTRACTOR, tokenizer), out, result, seed, codec)


# ---- language identification ---------------------------------------------------------------------------------------


def make_lid_batch(sentences, rng, clips: int = 16, codec=None):
    """Return clips of 1 to 4 s cut anywhere: (features, mask, labels), where the label is the language of the voice.

    The length is drawn before the language, so it says nothing; a quarter of the texts are of another language.
    """
    seconds = rng.uniform(1.0, 4.0)
    rows, labels = [], []
    for _ in range(clips):
        label = int(rng.integers(len(CODES)))
        reads = int(rng.integers(len(CODES))) if rng.random() < READ_BY_OTHERS else label
        text = draw_text(sentences[CODES[reads]], int(20 * seconds) + 5, rng)
        wav = speak_text(text, CODES[label], draw_voice(rng))
        excess = len(wav) - int(seconds * SPEECH_RATE)
        if excess > 0:
            start = int(rng.integers(excess)) if rng.random() < 0.5 else 0
            wav = wav[start : start + int(seconds * SPEECH_RATE)]
        wav = degrade(pass_codec(codec, wav, rng), rng)
        rows.append(mask_features(extract_features(wav), rng))
        labels.append(label)
    return *pad_features(rows), torch.tensor(labels)


def train_lid(out, minutes: float = 8, seed: int = 0, work=paths.ROOT / "data/mini/lid", hidden: int = 192,
              layers: int = LID_LAYERS, lr: float = 1e-3, codec=None, clips_in_batch: int = 16,
              start: str | None = "asr-mini") -> Path:
    """Train the language judge for `minutes` and save it in `out`; `work` and `codec` as in `train_asr`.

    It begins as the lower layers of the recogniser in the folder `start` beside `out`, which already tell sounds apart
    (None: from nothing, which takes several times as long).
    """
    torch.manual_seed(seed)
    config = encoder_config(hidden, layers, classifier_proj_size=hidden, vocab_size=None,
                            id2label=dict(enumerate(CODES)), label2id={code: i for i, code in enumerate(CODES)})
    model = Wav2Vec2BertForSequenceClassification(config).train()
    if start:
        folder = Path(out).parent / start
        if not (folder / "model.safetensors").exists():
            raise FileNotFoundError(f"{folder} holds no recogniser to begin with; run train_asr first")
        model.wav2vec2_bert = Wav2Vec2BertForCTC.from_pretrained(folder, dtype=torch.float32).wav2vec2_bert.train()
        del model.wav2vec2_bert.encoder.layers[layers:]
    device = pick_device()
    model.to(device)
    sentences = load_sentences(seed)

    def compute_loss(rng, done):
        features, mask, labels = (part.to(device) for part in make_lid_batch(sentences, rng, clips_in_batch, codec))
        with half_precision(device):
            logits = model(input_features=features, attention_mask=mask).logits.float()
        loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.05)
        return loss, {"loss": float(loss.detach()), "right": float((logits.argmax(1) == labels).float().mean())}

    result = fit({"model": model}, compute_loss, minutes, work, lr, seed=seed, betas=(0.9, 0.98), weight_decay=0.01)
    return save_judge(model, EXTRACTOR, out, result, seed, codec)


# ---- saving --------------------------------------------------------------------------------------------------------


def save_judge(model, processor, out, result: dict, seed: int, codec) -> Path:
    """Write a folder for `from_pretrained` and `pipeline`: weights stored in half precision, loaded in full."""
    out = Path(out)
    model.cpu().eval().half().save_pretrained(out)
    processor.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    config["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    record = describe_training(result, seed) | {"round_trips": ROUND_TRIPS if codec else 0.0}
    write_json(out / "training.json", record)
    return out
