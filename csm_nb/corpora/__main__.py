"""The tokens of a corpus, without a notebook: `python -m csm_nb.corpora my/manifest.jsonl --language no --codec models/csm-mini`.

Started on several machines that share the disk, each makes the shards that no other is at work on. 01 to 03 find the codes
again by their clips, whatever they leave out or call the speakers, and encode nothing.
"""

import argparse
import sys

from csm_nb.codec.mimi import load_codec
from csm_nb.corpora.listed import take_corpus
from csm_nb.corpora.sources import load_corpus
from csm_nb.corpora.tokens import TokensError, write_tokens
from csm_nb.hub import ModelError
from csm_nb.manifest import CorpusError
from csm_nb.paths import resolve_path, show_path
from csm_nb.recipe import ENGINES, ParameterError


def main(arguments=None) -> int:
    """Encode what the command line names; return 0, or 2 with what to do where it can not be."""
    parser = argparse.ArgumentParser(prog="python -m csm_nb.corpora", description=__doc__.splitlines()[0])
    parser.add_argument("corpus", help="a manifest.jsonl, a folder, or a name that params/<language>.yaml lists")
    parser.add_argument("--language", required=True, help="the code of a language, such as no")
    parser.add_argument("--codec", required=True, help="Mimi or a CSM model: a folder, or a hub id such as sesame/csm-1b")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--workers", choices=ENGINES, default="local", help="who encodes: this machine, or the nodes of Ray")
    parser.add_argument("--data", default="data", help="the folder whose tokens/ they go to")
    options = parser.parse_args(arguments)
    try:
        corpus = take_corpus(f"corpus is {options.corpus!r}", options.corpus, options.language)
        rows = load_corpus(corpus, options.language)
        made = write_tokens(rows, load_codec(options.codec, options.device), resolve_path(options.data), options.workers)
    except (CorpusError, ModelError, ParameterError, TokensError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{show_path(made['path'])}: {made['clips']} clips, {made['encoded']} of them encoded here, {made['found']} found; "
          f"{len(made['set_aside'])} set aside (set_aside.jsonl)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
