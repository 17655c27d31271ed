"""A CSM folder of CSM-1B's real shape with random weights: for measuring speed and memory, which do not depend on them.

    python bench/full_size.py data/csm-1b-random

writes 3.4 GB in about a minute: bfloat16 weights with one of the two codebook tables (as csm_nb.csm.load.load_base expects), a
full-size Mimi inside, and a processor whose byte-level BPE cuts these languages into pieces of about Llama's length.
"""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CsmConfig,
    CsmForConditionalGeneration,
    CsmProcessor,
    EncodecFeatureExtractor,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from csm_nb.csm.load import DEPTH_TABLE, tie_codebooks
from csm_nb.csm.save import save_base
from csm_nb.languages import LANGUAGES
from csm_nb.mini.base import CHAT_TEMPLATE
from csm_nb.text.sentences import make_sentences

SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|AUDIO|>", "<|audio_eos|>")  # ids 128000 to 128003, as in CSM-1B
PIECES = 2_500  # few, as there are few words to learn from: 2.5 to 3.5 characters per token, as Llama's in these languages


def build_processor(config: CsmConfig) -> CsmProcessor:
    """A CSM processor whose tokenizer has Llama's vocabulary size, and the special tokens at the ids of `config`."""
    layout = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=PIECES, initial_alphabet=layout.alphabet(), show_progress=False)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = layout
    bpe.train_from_iterator((text for language in LANGUAGES for text in make_sentences(language, 3_000)), trainer)
    trained = json.loads(bpe.to_str())["model"]
    ids = {i: f"<|unused_{i}|>" for i in range(config.text_vocab_size)} | {i: piece for piece, i in trained["vocab"].items()}
    ids |= dict(enumerate(SPECIAL, config.bos_token_id))
    bpe = Tokenizer(models.BPE({piece: i for i, piece in ids.items()}, [tuple(pair) for pair in trained["merges"]]))
    bpe.pre_tokenizer, bpe.decoder = layout, decoders.ByteLevel()
    # padding must not be <|AUDIO|>, though config.pad_token_id is: the processor would label padding as audio
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=SPECIAL[0], eos_token=SPECIAL[1], pad_token=SPECIAL[1],
        additional_special_tokens=list(SPECIAL[2:]), clean_up_tokenization_spaces=False,
    )
    extractor = EncodecFeatureExtractor(feature_size=1, sampling_rate=24_000, padding_value=0.0)
    return CsmProcessor(extractor, tokenizer, chat_template=CHAT_TEMPLATE)


def build_model(config: CsmConfig, seed: int = 0) -> CsmForConditionalGeneration:
    """CSM-1B at random, made in bfloat16 (3.4 GB), so random that each decoder's loss is near ln(2051) = 7.6."""
    torch.manual_seed(seed)
    model = CsmForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    tie_codebooks(model, [DEPTH_TABLE])
    model.generation_config = GenerationConfig(max_new_tokens=125, do_sample=True, temperature=0.6, top_k=30)
    quantizer = model.codec_model.quantizer  # Mimi starts with codebooks of zeros: every clip would be the code 0
    for side in (quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer):
        for layer in side.layers:
            layer.codebook.embed_sum.normal_(std=0.02)
    return model.eval()


def make_folder(folder, seed: int = 0) -> Path:
    """The random CSM-1B in `folder`, written when it is not there yet."""
    if (Path(folder) / "model.safetensors").exists():
        return Path(folder)
    logging.set_verbosity_error()  # of ids of text tokens, which it holds against the size of the audio vocabulary
    logging.disable_progress_bar()
    config = CsmConfig()  # transformers' defaults are CSM-1B's sizes, Mimi's inside included
    return save_base(build_model(config, seed), build_processor(config), folder, dtype=None)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = make_folder(args.folder, args.seed)
    size = (folder / "model.safetensors").stat().st_size
    print(f"{folder}: {size / 1e9:.2f} GB of weights")


if __name__ == "__main__":
    main()
