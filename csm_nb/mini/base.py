"""Recipe of the miniature base model: a small CSM that reads English characters and speaks with espeak-ng's voices."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CsmConfig,
    CsmForConditionalGeneration,
    CsmProcessor,
    EncodecFeatureExtractor,
    GenerationConfig,
    MimiModel,
    PreTrainedTokenizerFast,
)

from csm_nb.codec.mimi import encode
from csm_nb.csm.load import DEPTH_TABLE, tie_codebooks
from csm_nb.csm.save import save_base
from csm_nb.device import half_precision, pick_device
from csm_nb.languages import LANGUAGES
from csm_nb.mini.loop import describe_training, fit
from csm_nb.provenance import hash_value, read_json, write_json
from csm_nb.synth.espeak import VOICES, speak_text
from csm_nb.text.sentences import make_sentences
from csm_nb.train.loss import compute_loss
from csm_nb.train.packing import batch_clips, read_clips

SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|AUDIO|>", "<|audio_eos|>", "<|unknown|>")
RESERVED = tuple(f"<|reserved_special_token_{number}|>" for number in range(128))  # under Llama 3's names, behind all others
# ASCII, Latin-1 and Extended-A, IPA letters, modifiers, combining marks, tone numbers, the Greek letters of the IPA.
CHARACTERS = [*map(chr, (*range(0x20, 0x7F), *range(0xA1, 0x180), *range(0x250, 0x370))), *"βθχᵻⱱ"]
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if not message['role'] | string | int(-1) >= 0 -%}"
    "{{- raise_exception('the role must be a speaker id such as 0') -}}"
    "{%- endif -%}"
    "{{- '<|begin_of_text|>[' ~ message['role'] ~ ']' -}}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}{%- endfor -%}"
    "{{- '<|end_of_text|>' -}}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'audio' -%}{{- '<|AUDIO|><|audio_eos|>' -}}{%- endif -%}"
    "{%- endfor -%}{%- endfor -%}"
)


def build_processor() -> CsmProcessor:
    """Return a processor with one token per character, CSM's special tokens and chat template, and tokens in reserve."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS, *RESERVED])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[1], pad_token=SPECIAL[2], unk_token=SPECIAL[4],
        additional_special_tokens=[SPECIAL[3], *RESERVED], clean_up_tokenization_spaces=False,
    )
    extractor = EncodecFeatureExtractor(feature_size=1, sampling_rate=24_000, padding_value=0.0)
    return CsmProcessor(extractor, fast, chat_template=CHAT_TEMPLATE)


def build_model(codec: MimiModel, processor, hidden_size: int = 192, layers: int = 6) -> CsmForConditionalGeneration:
    """Return a CsmForConditionalGeneration of about 4.5 M parameters around `codec`, freshly initialised, tables tied.

    Its text table has no rows for RESERVED yet: reserve_rows appends them after the training.
    """
    codebooks, vocabulary = codec.config.num_quantizers, codec.config.codebook_size + 3
    token_id = processor.tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    config = CsmConfig(
        num_codebooks=codebooks, vocab_size=vocabulary, text_vocab_size=len(SPECIAL) + len(CHARACTERS), hidden_size=hidden_size,
        intermediate_size=3 * hidden_size, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=hidden_size // 4, max_position_embeddings=2048, rope_parameters=rope, codebook_pad_token_id=vocabulary - 1,
        codebook_eos_token_id=0, bos_token_id=token_id(SPECIAL[0]), eos_token_id=None, pad_token_id=token_id(SPECIAL[2]),
        audio_token_id=token_id(SPECIAL[2]), audio_eos_token_id=token_id(SPECIAL[3]),
        depth_decoder_config={
            "num_codebooks": codebooks, "backbone_hidden_size": hidden_size, "vocab_size": vocabulary, "hidden_size": 128,
            "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 32, "max_position_embeddings": codebooks + 1, "rope_parameters": rope,
        },
        codec_config={k: v for k, v in codec.config.to_dict().items() if k != "_name_or_path"},  # a path of this machine
    )
    model = CsmForConditionalGeneration(config)
    model.codec_model.load_state_dict(codec.state_dict())
    model.generation_config = GenerationConfig(max_new_tokens=125, do_sample=True, temperature=0.6, top_k=30)
    tie_codebooks(model, [DEPTH_TABLE])
    return model


def reserve_rows(model: CsmForConditionalGeneration, seed: int = 0) -> None:
    """Append the rows of RESERVED to the text table, drawn by `seed` as every row begins: normal, config.initializer_range.

    Nothing has read them, as nothing has read those of Llama 3, and an adapter is to train them. Zeros would not do: the
    first layer divides by the row's norm, and the gradient of one such row would be hundreds of times all others, which the
    clipping of gradients is to share out. The mean of the letters would begin every language and phone as the same row.
    """
    table = model.embed_text_tokens.weight.detach()
    rows = torch.empty(len(RESERVED), table.shape[1])
    rows.normal_(std=model.config.initializer_range, generator=torch.Generator().manual_seed(seed))
    model.embed_text_tokens = torch.nn.Embedding.from_pretrained(torch.cat([table, rows.to(table)]), freeze=False)
    model.config.text_vocab_size = len(model.embed_text_tokens.weight)


def make_rows(codec: MimiModel, sentences: int, seed: int = 0, language: str = "en", takes: int = 1) -> list[dict]:
    """Return token rows (text, codes, speaker_id) of espeak-ng's English reading training sentences of `language`.

    Each sentence is read by `takes` of the four voices. Sentences of other languages are read as somebody reads them who
    knows English only.
    """
    rng, rows = np.random.default_rng(seed), []
    for text in make_sentences(language, sentences, seed):
        voices = rng.permutation(len(VOICES))[:takes]
        wavs = [speak_text(text, "en", VOICES[i]) for i in voices]
        with half_precision(codec.device.type):  # one by one: on a CPU that is faster than in batches
            codes = [encode(codec, [wav])[0] for wav in wavs]
        rows += [{"text": text, "codes": code, "speaker_id": VOICES[i].speaker_id} for i, code in zip(voices, codes, strict=True)]
    return rows


def name_codebooks(codec: MimiModel) -> str:
    """Return a short name of the codebooks of `codec`: codes mean something only to a model that learned from them."""
    quantizer = codec.quantizer
    sides = quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer
    return hash_value([layer.codebook.embed_sum.double().sum().item() for side in sides for layer in side.layers])


def train_base(codec_dir, out, minutes: float, seed: int = 0, work="data/mini/base", sentences: int = 24_000,
               takes: int = 2, foreign: int = 3_000, batch: int = 16) -> None:
    """Train the base on English only and save it with processor and codec to `out`, as a published CSM is laid out.

    `sentences` of English, and `foreign` of each other language, read in English: English sentences have some 300 words,
    which it would learn to read as words; with 3,000 words it learns letters, which is what an adapter goes on from.

    As many clips as it hears two or three times: with a third of them it learned them by heart (14,000 clips, seven
    times each: backbone loss .23 on them, 1.18 on held-out sentences).
    """
    torch.manual_seed(seed)
    device = pick_device()
    codec = MimiModel.from_pretrained(codec_dir, dtype=torch.float32).eval()
    processor = build_processor()
    model = build_model(codec, processor).to(device)
    work = Path(work) / name_codebooks(codec)
    work.mkdir(parents=True, exist_ok=True)
    pool = work / "rows.pt"
    if not pool.exists():
        rows = make_rows(codec.to(device), sentences, seed, takes=takes)
        rows += [row for language in LANGUAGES if language != "en" for row in make_rows(codec, foreign, seed, language)]
        torch.save(rows, pool)
        print(f"{pool}: {len(rows)} clips spoken and encoded", flush=True)
    clips = read_clips(torch.load(pool, weights_only=False), processor, 2048, codec.config.frame_rate)
    order = clips.usable[np.argsort(clips.lengths[clips.usable], kind="stable")]
    model.codec_model.requires_grad_(False)
    model.train()

    def loss(rng, done):
        start = int(rng.integers(0, len(order) - batch))
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        chosen = batch_clips(clips, order[start : start + batch], 1 / 4, generator)
        chosen = {key: part.to(device) for key, part in chosen.items()}
        with half_precision(device):
            output = compute_loss(model, chosen)
        return output.loss, {"backbone": output.backbone_loss.item(), "depth": output.depth_decoder_loss.item()}

    result = fit({"model": model}, loss, minutes, work, lr=1.5e-3, seed=seed, betas=(0.9, 0.98), weight_decay=0.05)
    model.cpu().eval().codec_model.load_state_dict(codec.cpu().state_dict())  # its decoder may have learned on since
    reserve_rows(model, seed)
    save_base(model, processor, out, torch.float16, torch.float16)
    record = {"codec": read_json(Path(codec_dir) / "training.json"), "base": describe_training(result, seed)}
    write_json(Path(out) / "training.json", record)
