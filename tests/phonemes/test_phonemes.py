"""A lexicon says what espeak-ng can not: stød and tones; espeak-ng says the rest, without its known mistakes."""

import pytest

from csm_nb.languages import LANGUAGES
from csm_nb.phonemes.ipa import NOFABET, read_lexicon, to_ipa
from csm_nb.text.sentences import make_sentences

WIKIPRON = "hun\th u n\nhund\th u nˀ\nAnders\tɑ n ɐ s\nanden\tæ n n̩\nanden\tæ nˀ n̩\nDe\td̥ i\nde\td̥ i ˕\n"
MFA = "<unk>\tspn\ntomten\tt̪ʰ ɔ˥˧ n̪ t̪ ɛ˩ n̪\ntomten\tt̪ʰ ɔ˧˩ n̪ t̪ ɛ˥˩ n̪\nskjorta\tɧ ʊ ʈ a\n"
MFA_WITH_PROBABILITIES = "tomten\t0.99\t0.12\t1.0\t0.9\tt̪ʰ ɔ˥˧ n̪ t̪ ɛ˩ n̪\n"
NB_UTTALE = "token,transcription,pos\nloven,L OA1 V AX0 N,NN\nlåven,L OA2 V AX0 N,NN\nkjøttdeig,KJ OEH1 T D AEJ3,NN\n"
NB_UTTALE_FULL = "wordform,pos,nofabet_transcription\nlåven,NN,L OA2 V AX0 N\n"


def write(tmp_path, text, name="lexicon"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def bare(ipa):
    return ipa.replace("ˈ", "").replace("ˌ", "")


def test_hund_and_hun_differ_with_the_lexicon_and_not_without(tmp_path):
    hund, hun = to_ipa(["hund", "hun"], "da")
    assert bare(hund) == bare(hun)
    assert to_ipa(["hund", "hun"], "da", read_lexicon(write(tmp_path, WIKIPRON))) == ["hunˀ", "hun"]


def test_tones_differ_with_the_lexicon_and_not_without(tmp_path):
    words = ["loven", "låven"]
    assert to_ipa(words, "no", read_lexicon(write(tmp_path, NB_UTTALE))) == ["l¹oːvən", "l²oːvən"]
    assert not set("¹²") & set("".join(to_ipa(words, "no")))


@pytest.mark.parametrize(("text", "word", "ipa"), [
    (WIKIPRON, "hund", "hunˀ"), (MFA, "tomten", "t̪ʰɔ˥˧n̪t̪ɛ˩n̪"),
    (MFA_WITH_PROBABILITIES, "tomten", "t̪ʰɔ˥˧n̪t̪ɛ˩n̪"),
    (NB_UTTALE, "kjøttdeig", "ç¹œtdˌæɪ"), (NB_UTTALE_FULL, "låven", "l²oːvən"),
    ("\ufeff" + NB_UTTALE, "loven", "l¹oːvən"),
    ("tomten  t ɔ m\nhus h ʉː s\n", "hus", "hʉːs"),
], ids=["wikipron", "mfa", "mfa-probabilities", "nb-uttale", "nb-uttale-full", "marked-utf8", "mfa-spaces"])
def test_every_format_keeps_stod_and_tone(tmp_path, text, word, ipa):
    assert read_lexicon(write(tmp_path, text))[word] == ipa


def test_the_first_pronunciation_wins_and_lowercase_goes_before_names(tmp_path):
    lexicon = read_lexicon(write(tmp_path, WIKIPRON))
    assert lexicon["anden"] == "ænn̩" and lexicon["de"] == "d̥i˕" and lexicon["anders"] == "ɑnɐs"


def test_entries_that_are_no_speech_are_left_out(tmp_path):
    assert set(read_lexicon(write(tmp_path, MFA))) == {"tomten", "skjorta"}


@pytest.mark.parametrize(("text", "message"), [
    ("", "no pronunciations"), ("\n\n", "no pronunciations"), ("hund\n", r"line 1.*'hund'"),
    ("hund\th u n\nkat\n", "line 2.*'kat'"), ("ord\tNN\th u n\n", "line 1"),
    ("word,ipa\nhund,hun\n", r"'word', 'ipa'.*nofabet_transcription"),
    ("token,transcription\nloven,L OA1 V QQ0\n", "line 2.*'QQ0'.*NG"),
    ("token,transcription\nloven,L OA7\n", "line 2.*'OA7'"),
])  # fmt: skip
def test_what_is_no_lexicon_is_refused_with_file_and_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=f"lexicon.*{message}"):
        read_lexicon(write(tmp_path, text))


def test_a_lexicon_that_is_not_utf8_or_not_there_says_so(tmp_path):
    path = tmp_path / "old.dict"
    path.write_bytes("blåbær\tb l ɔ\n".encode("utf-16"))
    assert read_lexicon(path) == {"blåbær": "blɔ"}
    path.write_bytes("hej\th ɑ j\nblåbær\tb l\n".encode("latin-1", "replace"))
    with pytest.raises(ValueError, match=r"old\.dict, line 2: not UTF-8"):
        read_lexicon(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_lexicon(tmp_path / "nowhere.tsv")


def test_case_spacing_and_punctuation_are_kept_out_of_the_look_up():
    lexicon = {"hund": "hunˀ", "hun": "hun"}
    assert to_ipa(["Hun, HUND? «hund»…"], "da", lexicon) == ['hun, hunˀ? "hunˀ"...']
    assert to_ipa(["", " . "], "da") == ["", "."]


def test_decomposed_letters_find_their_word():
    assert to_ipa(["Pa\u030a"], "da", {"p\u00e5": "pʰɔˀ"}) == ["pʰɔˀ"]


def test_danish_has_no_false_glottal_stop_and_no_leaked_names():
    ipa = "".join(to_ipa([*LANGUAGES["da"].probes, *make_sentences("da", 300), "mig"], "da"))
    assert "ʔ" not in ipa and "ε" not in ipa
    assert "?" not in to_ipa(["mig"], "da")[0]


def test_norwegian_kj_is_palatal():
    assert all(bare(ipa).startswith("ç") for ipa in to_ipa(["kjøtt", "kino", "Kjersti"], "no"))
    assert "x" in to_ipa(["acht"], "nl")[0] and "x" in to_ipa(["Buch"], "de")[0]


@pytest.mark.parametrize("code", LANGUAGES)
def test_ipa_of_every_sentence_is_ipa(code):
    texts = [*make_sentences(code, 500), *LANGUAGES[code].probes]
    for text, ipa in zip(texts, to_ipa(texts, code), strict=True):
        assert len(ipa.split()) == len(text.split()), (text, ipa)
        assert not set(ipa) & set("()-_^!'0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"), (text, ipa)
        assert [c for c in ipa if c in ",.?¿"] == [c for c in text if c in ",.?¿"]


def test_a_word_sounds_the_same_in_any_batch():
    texts = make_sentences("en", 50)
    assert [to_ipa([text], "en")[0] for text in texts] == to_ipa(texts, "en")


def test_unknown_words_go_to_espeak_in_one_call_and_known_ones_not_at_all(monkeypatch):
    calls = []

    def ask(words, language):
        calls.append(words)
        return [f"<{word}>" for word in words]

    monkeypatch.setattr("csm_nb.phonemes.ipa._ask_espeak", ask)
    texts = ["Hun ser en hund.", "En hund ser."]
    assert to_ipa(texts, "da", {"hund": "hunˀ"}) == ["<hun> <ser> <en> hunˀ.", "<en> hunˀ <ser>."]
    assert calls == [["hun", "ser", "en"]]


def test_the_callers_lexicon_is_not_written_to():
    lexicon = {"hund": "hunˀ"}
    to_ipa(["En hund."], "da", lexicon)
    assert lexicon == {"hund": "hunˀ"}


def test_nofabet_is_covered_once():
    assert len(NOFABET) == 57 and all(ipa and ipa.isascii() <= (len(ipa) == 1) for ipa in NOFABET.values())


def test_wrong_requests_are_named():
    with pytest.raises(ValueError, match="en, no, sv"):
        to_ipa(["hund"], "xx")
    with pytest.raises(TypeError, match="list of texts"):
        to_ipa("hund", "da")
