"""The one table of languages: what every other tool calls a language, its traits and probe sentences."""

import re
import unicodedata
from dataclasses import dataclass


@dataclass(frozen=True)
class Language:
    """One language. `code` (ISO 639-1) is the name used everywhere here, the other fields are what each tool calls it.

    `mms_lid` are the labels of facebook/mms-lid-126 that count as this language, `azure` is the locale of Azure's
    voices, `asr` the hub id of the recogniser to judge with, `traits` what needs a measurement of its own ("stod",
    "pitch_accent"), `probes` short sentences that a neighbouring language would say in other words; they are never among
    the sentences of text.sentences. Which languages are neighbours a language's params say (`compare`).
    """

    code: str
    name: str
    iso3: str
    espeak: str
    whisper: str
    mms_lid: tuple[str, ...]
    azure: str
    asr: str
    traits: tuple[str, ...]
    probes: tuple[str, ...]


WHISPER = "openai/whisper-large-v3"

# New ones come last: the place in this table is that of a language's row in the text table (csm/tags.py).
# whisper is the name that transformers' generate(language=...) takes. Recognisers with published FLEURS figures below
# whisper-large-v3's are named for no, sv and da. mms_lid labels are from the model's config (id2label).
LANGUAGES = {
    language.code: language
    for language in (
        Language(
            "en", "English", "eng", "en-us", "english", ("eng",), "en-US", WHISPER, (),
            (
                "I do not know what that is.", "Where does she live now?", "The weather was lovely yesterday.",
                "Could you say that again?", "They think this is theirs.", "What would you like for breakfast?",
                "My brother has three children.", "Nothing is wrong with that.",
            ),
        ),
        Language(
            "no", "Norwegian", "nob", "nb", "norwegian", ("nob", "nno"), "nb-NO", "NbAiLab/nb-whisper-large",
            ("pitch_accent",),
            (
                "Jeg vet ikke hva det er.", "Hvor mye koster denne boka?", "Kan du hjelpe meg nå?",
                "Kjæresten min kjøper ei skjorte.", "Hun kommer hjem i kveld.", "Hvorfor gråter den lille jenta?",
                "Vi har ikke spist frokost ennå.", "Han snakker bare om været.",
            ),
        ),
        Language(
            "sv", "Swedish", "swe", "sv", "swedish", ("swe",), "sv-SE", "KBLab/kb-whisper-large",
            ("pitch_accent",),
            (
                "Jag vet inte vad det är.", "Hur mycket kostar den här boken?", "Kan du hjälpa mig nu?",
                "Min flickvän köper en skjorta.", "Hon kommer hem i kväll.", "Varför gråter den lilla flickan?",
                "Vi har inte ätit frukost än.", "Han pratar bara om vädret.",
            ),
        ),
        Language(
            "da", "Danish", "dan", "da", "danish", ("dan",), "da-DK", "CoRal-project/roest-v1-whisper-1.5b",
            ("stod",),
            (
                "Jeg ved ikke hvad det er.", "Hvor meget koster den her bog?", "Kan du hjælpe mig nu?",
                "Min kæreste køber en skjorte.", "Hun kommer hjem i aften.", "Hvorfor græder den lille pige?",
                "Vi har ikke spist morgenmad endnu.", "Han taler kun om vejret.",
            ),
        ),
        Language(
            "de", "German", "deu", "de", "german", ("deu",), "de-DE", WHISPER, (),
            (
                "Ich weiß nicht, was das ist.", "Wie viel kostet dieses Buch?", "Kannst du mir jetzt helfen?",
                "Meine Schwester kauft ein Hemd.", "Sie kommt heute Abend nach Hause.",
                "Warum weint das kleine Mädchen?", "Wir haben noch nicht gefrühstückt.", "Er spricht nur vom Wetter.",
            ),
        ),
        Language(
            "fr", "French", "fra", "fr-fr", "french", ("fra",), "fr-FR", WHISPER, (),
            (
                "Je ne sais pas.", "Combien coûte ce livre ?", "Tu peux m'aider maintenant ?",
                "Ma sœur achète une chemise.", "Elle rentre ce soir.", "Pourquoi la petite fille pleure ?",
                "Nous n'avons pas encore mangé.", "Il parle seulement du temps.",
            ),
        ),
        Language(
            "es", "Spanish", "spa", "es", "spanish", ("spa",), "es-ES", WHISPER, (),
            (
                "No sé qué es eso.", "¿Cuánto cuesta este libro?", "¿Puedes ayudarme ahora?",
                "Mi hermana compra una camisa.", "Ella vuelve a casa esta noche.", "¿Por qué llora la niña?",
                "Todavía no hemos desayunado.", "Solo habla del tiempo.",
            ),
        ),
        Language(
            "nl", "Dutch", "nld", "nl", "dutch", ("nld",), "nl-NL", WHISPER, (),
            (
                "Ik weet niet wat dat is.", "Hoeveel kost dit boek?", "Kun je me nu helpen?",
                "Mijn zus koopt een overhemd.", "Ze komt vanavond naar huis.", "Waarom huilt het meisje?",
                "We hebben nog niet ontbeten.", "Hij praat alleen over het weer.",
            ),
        ),
        Language(
            "it", "Italian", "ita", "it", "italian", ("ita",), "it-IT", WHISPER, (),
            (
                "Non so che cosa sia.", "Quanto costa questo libro?", "Puoi aiutarmi adesso?",
                "Mia sorella compra una camicia.", "Lei torna a casa stasera.", "Perché piange la bambina?",
                "Non abbiamo ancora mangiato.", "Parla soltanto del tempo.",
            ),
        ),
        Language(
            "pl", "Polish", "pol", "pl", "polish", ("pol",), "pl-PL", WHISPER, (),
            (
                "Nie wiem, co to jest.", "Ile kosztuje ta książka?", "Czy możesz mi teraz pomóc?",
                "Moja siostra kupuje koszulę.", "Ona wraca dziś wieczorem.", "Dlaczego dziewczynka płacze?",
                "Jeszcze nie jedliśmy śniadania.", "On mówi tylko o pogodzie.",
            ),
        ),
    )
}


def get_language(code: str) -> Language:
    """Return the row of the table for `code`. Raises ValueError naming the codes there are."""
    if code not in LANGUAGES:
        hint = ' (a bare no in YAML is false: write "no")' if code is False else ""
        raise ValueError(f"unknown language {code!r}{hint}; one of {', '.join(LANGUAGES)}")
    return LANGUAGES[code]


# Names that tools give our languages beside those of the table; a locale or script behind them is cut off.
_NAMES = {
    "no": ("nb", "nn", "nor", "bokmål", "bokmal", "nynorsk", "norsk"), "sv": ("svenska",), "da": ("dansk",),
    "de": ("ger", "deutsch"), "fr": ("fre", "français"), "es": ("castilian", "español"),
    "nl": ("dut", "flemish", "nederlands"), "it": ("italiano",), "pl": ("polski",),
}  # fmt: skip
_LABELS = {
    name.lower(): code for code, entry in LANGUAGES.items()
    for name in (code, entry.name, entry.iso3, entry.whisper, *entry.mms_lid, *_NAMES.get(code, ()))
}  # fmt: skip


def read_label(label: str) -> str:
    """Return our code for what a language ID calls a language (nb, nno, "Norwegian", no-NO, nob_Latn, <|no|>), else "other"."""
    name = unicodedata.normalize("NFC", str(label)).lower().removeprefix("__label__").strip("<|> ")
    return _LABELS.get(re.split(r"[\W_]+", name)[0], "other")
