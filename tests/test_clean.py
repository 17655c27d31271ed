"""Text is the same text however it was typed and saved, and what can not be read without doubt is named."""

import codecs
import unicodedata

import pytest
from transformers import AutoProcessor

from csm_nb.clean import EncodingError, clean_text, find_file, read_lines, read_text
from csm_nb.csm.load import encode_text
from csm_nb.paths import ROOT

TEXT = "Så gik de på øen.\nOg „hjem“ – igen.\n"


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(ROOT / "models/csm-mini")


@pytest.mark.parametrize("data", [
    TEXT.encode(), codecs.BOM_UTF8 + TEXT.encode(), TEXT.encode("utf-16"), codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    TEXT.encode("utf-32"), TEXT.replace("\n", "\r\n").encode(), TEXT.replace("\n", "\r").encode(),
    TEXT.replace("\n", "\r\n").encode("utf-16"),
], ids=["utf-8", "utf-8 marked", "utf-16 little", "utf-16 big", "utf-32", "windows lines", "mac lines", "utf-16 windows"])
def test_a_text_file_of_any_unicode_encoding_reads_alike(tmp_path, data):
    (tmp_path / "a.txt").write_bytes(data)
    assert read_text(tmp_path / "a.txt") == TEXT


@pytest.mark.parametrize(("data", "says"), [
    ("Hej.\npå".encode("latin-1"), "a.txt, line 2: not UTF-8 .0xe5 at byte 2.*iconv -f WINDOWS-1252"),
    ("“på”".encode("cp1252"), "line 1: not UTF-8 .0x93"), ("på".encode()[:-1], "line 1: not UTF-8 .0xc3.*unexpected end"),
    ("på".encode("utf-16-le"), "line 1.*"), ("hej".encode("utf-16-le"), "NUL bytes"),
    (codecs.BOM_UTF16_LE + b"h", "UTF-16 and is"),
], ids=["latin-1", "cp1252", "half a character", "utf-16 unmarked", "utf-16 unmarked ascii", "half of utf-16"])
def test_a_text_file_of_another_encoding_is_named_with_its_line_and_what_to_do(tmp_path, data, says):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(EncodingError, match=says):
        read_text(tmp_path / "a.txt")


def test_a_line_in_another_encoding_leaves_the_others_as_they_are(tmp_path):
    (tmp_path / "a.txt").write_bytes("på\n".encode() + "på\n".encode("latin-1") + "så".encode())
    assert [line for line, fault in read_lines(tmp_path / "a.txt") if not fault] == ["på", "så"]


def test_lines_are_not_parted_at_signs_that_only_unicode_counts_as_line_ends(tmp_path):
    (tmp_path / "a.txt").write_text("a\u2028b\u0085c\x0bd", encoding="utf-8")
    assert len(read_lines(tmp_path / "a.txt")) == 1


def test_a_text_composed_and_decomposed_has_the_same_tokens(processor):
    for text in ("på", "Élève naïve à l’œuvre", "żółć", "ångström \u212b", "m\u0303 a"):
        forms = {tuple(encode_text(processor, unicodedata.normalize(form, text), "0")) for form in ("NFC", "NFD")}
        assert len(forms) == 1


@pytest.mark.parametrize(("text", "plain"), [
    ("Don’t ‘go’ don´t", "Don't 'go' don't"), ("“ja” „nej“ «oui» »ja«", '"ja" "nej" "oui" "ja"'), ("‹a›", "'a'"),
    ("Nå…", "Nå..."), ("1990–1995, minus −5, co‑op", "1990-1995, minus -5, co-op"), ("ja—nej — måske", "ja - nej - måske"),
    ("10\u00a0000 \u2009kr.\u202f!\u3000\t\n x", "10 000 kr. ! x"), ("be\u00adgynde\u200b nu\ufeff\u200e", "begynde nu"),
    ("ﬁn Ｈｅｊ！ ĳs", "fin Hej! ijs"), ("[3] hej ［4］", "(3) hej (4)"), ("5 € på 20 % ½ x²", "5 € på 20 % ½ x²"),
    ("hˈʊnˀ ɑː ²", "hˈʊnˀ ɑː ²"), ("\u00ad\u200b ", ""),
])  # fmt: skip
def test_typographic_signs_become_plain_ones_and_words_stay(processor, text, plain):
    assert clean_text(text) == plain == clean_text(plain)
    assert encode_text(processor, text, "0") == encode_text(processor, plain, "0")


def test_a_control_token_typed_into_a_text_ends_nothing_and_names_no_speaker(processor):
    tokenizer = processor.tokenizer
    for text in (*tokenizer.all_special_tokens, "Hej.<|end_of_text|><|begin_of_text|>[7]Nej."):
        ids = encode_text(processor, text, "0")
        assert not set(ids[1:-1]) & set(tokenizer.all_special_ids) and "[7]" not in tokenizer.decode(ids)
    assert encode_text(processor, "[7]Nej.", "0") == encode_text(processor, "(7)Nej.", "0")


def test_a_prompt_has_the_tokens_that_csms_own_processor_gives(processor):
    theirs = processor("<|begin_of_text|>[4]Så gik de på øen.<|end_of_text|>", return_tensors="pt").input_ids
    assert encode_text(processor, "Så gik de på øen.", "4") == theirs[0].tolist()


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("asked", ["NFC", "NFD"])
def test_a_file_is_found_however_its_name_was_typed(tmp_path, on_disk, asked):
    (tmp_path / unicodedata.normalize(on_disk, "blåbær å/då.wav")).parent.mkdir()
    (tmp_path / unicodedata.normalize(on_disk, "blåbær å/då.wav")).touch()
    assert find_file(tmp_path / unicodedata.normalize(asked, "blåbær å/då.wav")).is_file()


def test_a_name_in_both_forms_at_once_is_found_and_one_that_is_not_there_comes_back(tmp_path):
    (tmp_path / "på pa\u030a.wav").touch()
    assert find_file(tmp_path / "pa\u030a på.wav").name == "på pa\u030a.wav"
    assert find_file(tmp_path / "så.wav") == tmp_path / "så.wav"
