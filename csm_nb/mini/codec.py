"""Recipe of the miniature codec: a small MimiModel trained on espeak-ng speech, first without, then with its quantizer."""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchaudio.functional import melscale_fbanks
from transformers import MimiConfig, MimiModel

from csm_nb.device import pick_device
from csm_nb.mini.loop import describe_training, fit
from csm_nb.provenance import write_json
from csm_nb.synth.espeak import Voice, speak_phonemes
from csm_nb.text.sentences import make_sentences

# Every variant but those of the held-out voices (m1, f3); the same ones speak every language.
TRAINING_VARIANTS = ("m2", "m3", "m4", "m5", "m6", "m7", "m8", "f1", "f2", "f4", "f5")
LANGUAGES = ("en", "no", "sv", "da", "en", "no", "sv", "da", "de", "fr", "es", "nl", "it", "pl")
SEGMENT_SECONDS = 0.8
FRAME = 960  # samples
SHARES = {"autoencoder": 0.4, "wave": 0.35, "quantized": 0.25}  # of the training time
WAVE_WEIGHT, PHONEME_WEIGHT = 2.0, 0.2


def build_codec_config() -> MimiConfig:
    """Return 25 frames per second, 8 codebooks of 512 entries, about 2.5 M parameters; the classes are kyutai/mimi's."""
    return MimiConfig(
        sampling_rate=24_000, upsampling_ratios=[4, 5, 4, 6], num_filters=16, hidden_size=192, num_hidden_layers=2,
        intermediate_size=512, num_attention_heads=4, num_key_value_heads=4, head_dim=48, num_quantizers=8,
        codebook_size=512, codebook_dim=64, vector_quantization_hidden_dimension=64, upsample_groups=192,
        sliding_window=50, max_position_embeddings=2000, layer_scale_initial_scale=0.1,
    )


def random_voice(rng: np.random.Generator, variants=TRAINING_VARIANTS) -> Voice:
    """Return a voice nobody chose: any variant, pitch, spread of the melody and rate, for training and testing on variety."""
    pitch, spread, rate = rng.integers((25, 35, 130), (75, 90, 190)).tolist()
    return Voice("x", str(rng.choice(variants)), pitch, spread, rate)


FLOOR = 3e-4  # about 45 dB below the peaks of speech: with a lower one, most of the loss is the silence between words


def log_distance(magnitudes: torch.Tensor) -> torch.Tensor:
    """Return the mean log10 distance between two halves of a batch of magnitudes, and a quarter of it linear, for peaks."""
    ours, theirs = magnitudes.chunk(2)
    linear = (ours - theirs).abs().mean() / theirs.mean().clamp(min=FLOOR)
    return (torch.log10(ours + FLOOR) - torch.log10(theirs + FLOOR)).abs().mean() + 0.25 * linear


class SpectralLoss(nn.Module):
    """Distances of two waveforms, (batch, samples): formants, harmonics and the wave itself, as tensors of one number each.

    Formants: log-mel at five window lengths. Harmonics: log STFT below 3 kHz at the two longest. Wave: complex STFT below
    1 kHz, relative to each frame's level. Magnitudes alone leave the phase open, and a decoder that does not know it
    makes noise where there was a tone: 46 % of the frames with the wrong voicing and F0 correlation .71 without the last
    term, 21 % and .98 with it (the same weights trained six minutes more).
    """

    def __init__(self, sample_rate: int = 24_000):
        super().__init__()
        self.sizes = (128, 256, 512, 1024, 2048)
        for size, bands in zip(self.sizes, (10, 20, 40, 80, 120), strict=True):
            self.register_buffer(f"mel{size}", melscale_fbanks(size // 2 + 1, 0.0, sample_rate / 2, bands, sample_rate), False)
            self.register_buffer(f"window{size}", torch.hann_window(size), False)
        self.harmonic_bins = {1024: 3000 * 1024 // sample_rate, 2048: 3000 * 2048 // sample_rate}
        self.wave_bins = 1000 * 512 // sample_rate + 1

    def forward(self, decoded, original):
        """Return (formants, harmonics, wave): how far `decoded` is from `original`, waveforms (batch, samples)."""
        formants, harmonics, wave = 0.0, 0.0, 0.0
        both = torch.cat([decoded, original])
        for size in self.sizes:
            window = getattr(self, f"window{size}")
            spectrum = torch.stft(both, size, size // 4, window=window, return_complex=True) / window.sum()
            if size == 512:
                ours, theirs = spectrum[:, : self.wave_bins].chunk(2)
                wave = ((ours - theirs).abs().sum(1) / (theirs.abs().sum(1) + 0.01)).mean()
            spectrum = spectrum.abs()
            formants = formants + log_distance(spectrum.transpose(1, 2) @ getattr(self, f"mel{size}"))
            if size in self.harmonic_bins:
                harmonics = harmonics + log_distance(spectrum[:, : self.harmonic_bins[size]])
        return formants, harmonics, wave


def list_phonemes(sentences: dict) -> dict[str, int]:
    """Return {IPA: class} of the phonemes in some sentences of each language; rare ones that none has do without."""
    spoken = [speak_phonemes(text, language)[1] for language, texts in sentences.items() for text in texts[:150]]
    return {name: i for i, name in enumerate(sorted({name for phonemes in spoken for _, name in phonemes} | {""}))}


def make_segments(rng: np.random.Generator, sentences: dict, count: int, classes: dict,
                  seconds: float = SEGMENT_SECONDS) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `count` stretches of new espeak-ng speech, float32 (count, 1, samples), and each frame's phoneme class.

    Two of every sentence spoken, levels varied by 6 dB. A frame's class, long (count, frames), is that of its middle;
    silence is a phoneme too, and one that is not in `classes` is -100.
    """
    samples, segments, labels = int(seconds * 24_000), [], []
    middles = np.arange(samples // FRAME) * FRAME + FRAME // 2
    while len(segments) < count:
        language = str(rng.choice(LANGUAGES))
        text = sentences[language][rng.integers(len(sentences[language]))]
        wav, phonemes = speak_phonemes(text, language, random_voice(rng))
        wav = wav * float(10 ** rng.uniform(-0.3, 0.15))
        edges = np.array([time * 24_000 for time, _ in phonemes])
        names = np.array([classes[""]] + [classes.get(name, -100) for _, name in phonemes])
        for _ in range(2):
            start = int(rng.integers(-samples // 8, max(1, len(wav) - samples // 2)))
            piece = wav[max(0, start) : start + samples]
            segments.append(np.pad(piece, (max(0, -start), samples)) [:samples])
            labels.append(names[np.searchsorted(edges, start + middles, side="right")])
    return torch.from_numpy(np.stack(segments[:count]).astype(np.float32))[:, None], torch.from_numpy(np.stack(labels[:count]))


def initialise(codec: MimiModel) -> None:
    """Set weights from which it trains: transformers' own explode, and PyTorch's let the biases drown the signal.

    Measured on the default: latents of different clips differ by under 1 % of their size. Without biases and with 1.7
    times the convolutions' weights they differ, and the loss falls from the first steps.
    """
    for module in codec.modules():
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d | nn.Linear):
            module.reset_parameters()
            if not isinstance(module, nn.Linear):
                module.weight.data *= 1.7
            if module.bias is not None:
                module.bias.data.zero_()


def encode_hidden(codec: MimiModel, wavs: torch.Tensor) -> torch.Tensor:
    """Return hidden states before the quantizer, (batch, hidden_size, frames)."""
    hidden = codec.encoder(wavs)
    return codec.downsample(codec.encoder_transformer(hidden.transpose(1, 2))[0].transpose(1, 2))


def decode_latents(codec: MimiModel, hidden: torch.Tensor) -> torch.Tensor:
    """Return the waveform (batch, 1, samples) of hidden states after the quantizer, (batch, hidden_size, frames)."""
    hidden = codec.decoder_transformer(codec.upsample(hidden).transpose(1, 2))[0].transpose(1, 2)
    return codec.decoder(hidden)


def train_codec(out, minutes: float, seed: int = 0, work="data/mini/codec", batch: int = 6) -> MimiModel:
    """Train the codec in three phases, save it to `out` and return it; a killed run goes on where it was.

    "autoencoder": no quantizer, magnitudes only. "wave": the wave counts too (from the start it is not learned: .79 after
    4,450 steps, where a trained autoencoder gets from .89 to .52 in 1,400), and, as in Mimi, the first codebook's side of
    the encoder learns what is said: to tell the phonemes apart, which espeak-ng knows. Then residual k-means makes the
    codebooks. "quantized": the decoder alone, on codes.
    """
    torch.manual_seed(seed)
    device = pick_device()
    codec = MimiModel(build_codec_config())
    initialise(codec)
    codec.to(device)
    sentences = {language: make_sentences(language, 10_000, seed, "train") for language in sorted(set(LANGUAGES))}
    classes, distance = list_phonemes(sentences), SpectralLoss().to(device)
    reader = nn.Conv1d(codec.config.codebook_dim, len(classes), 1).to(device)
    quantizer = codec.quantizer
    semantic, acoustic = quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer

    def compare(decoded, wavs):
        formants, harmonics, wave = distance(decoded[:, 0], wavs[:, 0])
        parts = {"formants": formants.item(), "harmonics": harmonics.item(), "wave": wave.item()}
        return formants + harmonics + WAVE_WEIGHT * wave, parts

    def autoencode(hidden):
        latents = acoustic.input_proj(hidden)
        return decode_latents(codec, acoustic.output_proj(latents + 0.05 * latents.detach().std() * torch.randn_like(latents)))

    def match_magnitudes(rng, done):
        wavs = make_segments(rng, sentences, batch, classes)[0].to(device)
        formants, harmonics, _ = distance(autoencode(encode_hidden(codec, wavs))[:, 0], wavs[:, 0])
        return formants + harmonics, {"formants": formants.item(), "harmonics": harmonics.item()}

    def match_wave(rng, done):
        wavs, phonemes = (part.to(device) for part in make_segments(rng, sentences, batch, classes))
        hidden = encode_hidden(codec, wavs)
        loss, parts = compare(autoencode(hidden), wavs)
        told = nn.functional.cross_entropy(reader(semantic.input_proj(hidden)), phonemes)
        return loss + PHONEME_WEIGHT * told, parts | {"phonemes": told.item()}

    work, phases = Path(work), []
    phases.append(fit({"codec": codec}, match_magnitudes, minutes * SHARES["autoencoder"], work / "autoencoder", 8e-4, seed))
    # a phase whose start has learned on since begins anew
    folder = work / f"wave_{phases[0]['steps']}"
    phases.append(fit({"codec": codec, "reader": reader}, match_wave, minutes * SHARES["wave"], folder, 6e-4, seed + 1))
    folder = folder / f"quantized_{phases[1]['steps']}"
    if not (folder / "checkpoint.pt").exists():
        fit_codebooks(codec, make_segments(np.random.default_rng((seed, 1)), sentences, 1500, classes)[0], seed)
    for parameter in codec.parameters():
        parameter.requires_grad_(False)
    for module in (codec.upsample, codec.decoder_transformer, codec.decoder, semantic.output_proj, acoustic.output_proj):
        module.requires_grad_(True)

    def decode_codes(rng, done):
        wavs = make_segments(rng, sentences, batch, classes)[0].to(device)
        with torch.no_grad():
            codes = codec.encode(wavs).audio_codes
        kept = int(rng.choice([1, 2, 4, 8], p=[0.1, 0.1, 0.1, 0.7]))
        return compare(decode_latents(codec, quantizer.decode(codes[:, :kept])), wavs)

    phases.append(fit({"codec": codec}, decode_codes, minutes * SHARES["quantized"], folder, 4e-4, seed + 2))
    codec.cpu().save_pretrained(out)
    whole = {"asked": [minutes], "steps": sum(phase["steps"] for phase in phases), "losses": phases[-1]["losses"]}
    whole["seconds"] = sum(phase["seconds"] for phase in phases)
    write_json(Path(out) / "training.json", describe_training(whole, seed))
    return codec


@torch.no_grad()
def fit_codebooks(codec: MimiModel, wavs: torch.Tensor, seed: int = 0, rounds: int = 12) -> None:
    """Fit the codebooks by residual k-means on what `codec` makes of `wavs`: the first on its side, the others on theirs."""
    hidden = torch.cat([encode_hidden(codec, chunk.to(codec.device)) for chunk in wavs.split(32)])
    quantizer = codec.quantizer
    semantic, acoustic = quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer
    semantic.output_proj.weight.zero_()  # learns what it adds when the decoder is trained on codes
    generator = torch.Generator().manual_seed(seed)
    for side in (semantic, acoustic):
        points = side.input_proj(hidden).transpose(1, 2).flatten(0, 1).cpu()
        residual = points.clone()
        for layer in side.layers:
            codebook = layer.codebook
            centres = residual[torch.randperm(len(residual), generator=generator)[: codebook.codebook_size]].clone()
            for _ in range(rounds):
                nearest = torch.cdist(residual, centres).argmin(1)
                counts = torch.bincount(nearest, minlength=len(centres)).float()
                sums = torch.zeros_like(centres).index_add_(0, nearest, residual)
                spare = residual[torch.randint(len(residual), (len(centres),), generator=generator)]
                centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], spare)
            codebook.embed_sum.copy_(centres)
            codebook.cluster_usage.fill_(1.0)
            codebook._embed = None
            residual = residual - centres[torch.cdist(residual, centres).argmin(1)]
        share = (residual.square().sum() / (points - points.mean(0)).square().sum()).item()
        print(f"{len(side.layers)} codebooks: of {len(points)} frames {share:.2%} of the variance is left", flush=True)
