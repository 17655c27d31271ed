"""Recipe of the miniature codec: a small MimiModel trained on espeak-ng speech, first without, then with its quantizer."""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchaudio.functional import melscale_fbanks
from transformers import MimiConfig, MimiModel

from csm_nb.mini_loop import describe_training, fit
from csm_nb.provenance import write_json
from csm_nb.synth import Voice, speak_text
from csm_nb.texts import make_sentences

# Every variant but those of the held-out voices (m1, f3); the same ones speak every language.
TRAINING_VARIANTS = ("m2", "m3", "m4", "m5", "m6", "m7", "m8", "f1", "f2", "f4", "f5")
LANGUAGES = ("en", "no", "sv", "da", "en", "no", "sv", "da", "de", "fr", "es", "nl", "it", "pl")
SEGMENT_SECONDS = 0.8


def build_codec_config() -> MimiConfig:
    """25 frames a second, 8 codebooks of 512 entries, about 2.5 M parameters; the classes are those of kyutai/mimi."""
    return MimiConfig(
        sampling_rate=24_000, upsampling_ratios=[4, 5, 4, 6], num_filters=16, hidden_size=192, num_hidden_layers=2,
        intermediate_size=512, num_attention_heads=4, num_key_value_heads=4, head_dim=48, num_quantizers=8,
        codebook_size=512, codebook_dim=64, vector_quantization_hidden_dimension=64, upsample_groups=192,
        sliding_window=50, max_position_embeddings=2000, layer_scale_initial_scale=0.1,
    )


def random_voice(rng: np.random.Generator, variants=TRAINING_VARIANTS) -> Voice:
    """A voice nobody chose: any variant, pitch, spread of the melody and rate, for training and testing on variety."""
    pitch, spread, rate = rng.integers((25, 35, 130), (75, 90, 190)).tolist()
    return Voice("x", str(rng.choice(variants)), pitch, spread, rate)


FLOOR = 3e-4  # about 45 dB below the peaks of speech: with a lower one, most of the loss is the silence between words


def log_distance(magnitudes: torch.Tensor) -> torch.Tensor:
    """Mean distance in log10 between the two halves of a batch of magnitudes, and a quarter of it linear, for the peaks."""
    ours, theirs = magnitudes.chunk(2)
    linear = (ours - theirs).abs().mean() / theirs.mean().clamp(min=FLOOR)
    return (torch.log10(ours + FLOOR) - torch.log10(theirs + FLOOR)).abs().mean() + 0.25 * linear


class SpectralLoss(nn.Module):
    """Distance of two waveforms that hears formants (log-mel at five window lengths) and harmonics (log STFT below 3 kHz).

    Mel losses alone do not see harmonics: pitch is lost with them (tried; F0 correlation about 0).
    """

    def __init__(self, sample_rate: int = 24_000):
        super().__init__()
        self.sizes = (128, 256, 512, 1024, 2048)
        for size, bands in zip(self.sizes, (10, 20, 40, 80, 120), strict=True):
            self.register_buffer(f"mel{size}", melscale_fbanks(size // 2 + 1, 0.0, sample_rate / 2, bands, sample_rate), False)
            self.register_buffer(f"window{size}", torch.hann_window(size), False)
        self.harmonic_bins = {1024: 3000 * 1024 // sample_rate, 2048: 3000 * 2048 // sample_rate}

    def forward(self, decoded, original):
        mel_loss, harmonic_loss = 0.0, 0.0
        both = torch.cat([decoded, original])
        for size in self.sizes:
            window = getattr(self, f"window{size}")
            spectrum = torch.stft(both, size, size // 4, window=window, return_complex=True).abs() / window.sum()
            mel = spectrum.transpose(1, 2) @ getattr(self, f"mel{size}")
            mel_loss = mel_loss + log_distance(mel)
            if size in self.harmonic_bins:
                harmonic_loss = harmonic_loss + log_distance(spectrum[:, : self.harmonic_bins[size]])
        return mel_loss, harmonic_loss


def make_segments(rng: np.random.Generator, sentences: dict, count: int, seconds: float = SEGMENT_SECONDS) -> torch.Tensor:
    """`count` stretches of fresh espeak-ng speech, float32 (count, samples): two per spoken sentence, levels varied by 6 dB."""
    samples, segments = int(seconds * 24_000), []
    while len(segments) < count:
        language = str(rng.choice(LANGUAGES))
        text = str(rng.choice(sentences[language]))
        wav = speak_text(text, language, random_voice(rng)) * float(10 ** rng.uniform(-0.3, 0.15))
        for _ in range(2):
            start = int(rng.integers(-samples // 8, max(1, len(wav) - samples // 2)))
            piece = wav[max(0, start) : start + samples]
            segments.append(np.pad(piece, (max(0, -start), samples)) [:samples])
    return torch.from_numpy(np.stack(segments[:count]).astype(np.float32))[:, None]


def initialise(codec: MimiModel) -> None:
    """Weights from which it trains: transformers' own explode; PyTorch's let the biases drown the signal on its way.

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


def encode_latents(codec: MimiModel, wavs: torch.Tensor) -> torch.Tensor:
    """Latents before the quantizer, (batch, 64, frames): what the codebooks have to approximate."""
    hidden = codec.encoder(wavs)
    hidden = codec.encoder_transformer(hidden.transpose(1, 2))[0].transpose(1, 2)
    return codec.quantizer.acoustic_residual_vector_quantizer.input_proj(codec.downsample(hidden))


def decode_latents(codec: MimiModel, hidden: torch.Tensor) -> torch.Tensor:
    """Waveform (batch, 1, samples) from hidden states after the quantizer, (batch, hidden_size, frames)."""
    hidden = codec.decoder_transformer(codec.upsample(hidden).transpose(1, 2))[0].transpose(1, 2)
    return codec.decoder(hidden)


def train_codec(out, minutes: float, seed: int = 0, work="data/mini/codec", batch: int = 6) -> MimiModel:
    """Trains the codec and saves it to `out`; two thirds of the time without quantizer, then the decoder on codes.

    Residual k-means between the two phases makes the codebooks. Returns the model; a killed run goes on where it was.
    """
    torch.manual_seed(seed)
    codec = MimiModel(build_codec_config())
    initialise(codec)
    sentences = {language: make_sentences(language, 3000, seed, "train") for language in sorted(set(LANGUAGES))}
    distance = SpectralLoss()

    def reconstruct(rng, done):
        wavs = make_segments(rng, sentences, batch)
        latents = encode_latents(codec, wavs)
        latents = latents + 0.05 * latents.detach().std() * torch.randn_like(latents)
        decoded = decode_latents(codec, codec.quantizer.acoustic_residual_vector_quantizer.output_proj(latents))
        mel, harmonic = distance(decoded[:, 0], wavs[:, 0])
        return mel + harmonic, {"mel": mel.item(), "harmonic": harmonic.item()}

    first = fit({"codec": codec}, reconstruct, minutes * 0.7, Path(work) / "autoencoder", lr=8e-4, seed=seed)
    quantizer = codec.quantizer
    if not (Path(work) / "quantized" / "checkpoint.pt").exists():
        fit_codebooks(codec, make_segments(np.random.default_rng((seed, 1)), sentences, 1500), seed)
    for parameter in codec.parameters():
        parameter.requires_grad_(False)
    for module in (codec.upsample, codec.decoder_transformer, codec.decoder,
                   quantizer.semantic_residual_vector_quantizer.output_proj,
                   quantizer.acoustic_residual_vector_quantizer.output_proj):
        module.requires_grad_(True)

    def decode_codes(rng, done):
        wavs = make_segments(rng, sentences, batch)
        with torch.no_grad():
            codes = codec.encode(wavs).audio_codes
        kept = int(rng.choice([1, 2, 4, 8], p=[0.1, 0.1, 0.1, 0.7]))
        decoded = decode_latents(codec, quantizer.decode(codes[:, :kept]))
        mel, harmonic = distance(decoded[:, 0], wavs[:, 0])
        return mel + harmonic, {"mel": mel.item(), "harmonic": harmonic.item()}

    second = fit({"codec": codec}, decode_codes, minutes * 0.3, Path(work) / "quantized", lr=4e-4, seed=seed + 1)
    codec.save_pretrained(out)
    whole = {key: first[key] + second[key] for key in ("steps", "seconds", "losses")} | {"asked": [minutes]}
    write_json(Path(out) / "training.json", describe_training(whole, seed))
    return codec


@torch.no_grad()
def fit_codebooks(codec: MimiModel, wavs: torch.Tensor, seed: int = 0, rounds: int = 12) -> None:
    """Residual k-means on the latents of `wavs` into the codec's codebooks; the semantic one is a first k-means of its own."""
    latents = torch.cat([encode_latents(codec, chunk) for chunk in wavs.split(32)])
    points = latents.transpose(1, 2).reshape(-1, latents.shape[1])
    quantizer = codec.quantizer
    semantic, acoustic = quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer
    semantic.input_proj.weight.copy_(acoustic.input_proj.weight)
    semantic.output_proj.weight.zero_()  # learns what it adds when the decoder is trained on codes
    generator = torch.Generator().manual_seed(seed)
    for layers in (semantic.layers, acoustic.layers):
        residual = points.clone()
        for layer in layers:
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
    print(f"codebooks: of {len(points)} frames {share:.2%} of the latents' variance is left", flush=True)
