"""Common words of each language, and which other language a text is in by them."""

import re
from functools import cache

from csm_nb.languages import get_language

# So many different words of a text have to be common ones of another language and not of its own. None of the 434,278
# sentences that text.sentences makes in ten languages, and none of the 1922 clauses of the Declaration of Human Rights in them,
# alone or four together, is taken for another language; with 2 words, 121 of the former are. Of its clauses of eight words
# and more 85 % are found out under another language's label, but of Norwegian ones under Danish's label one in six, and of
# Danish ones under Norwegian's hardly any.
LEAST_WORDS = 3

# Articles, pronouns, prepositions, forms of be and have: what no sentence of some length does without. Norwegian holds both
# written forms, Bokmål and Nynorsk. A word that two languages have speaks for neither of the two.
COMMON = {
    "en": "the of and to in a is that it for was on are as with his they at be this have from or had by but what not were we "
          "when your can said there an each which she do how their if will up about out them then these so her would make "
          "him into has you he i my who its no all been could where than those should does did me our us any very shall",
    "no": "og i jeg det at en et den til er som på de med han av ikke der så var meg seg men har om vi min hun nå over da ved "
          "fra du ut dem oss opp man kan hans hvor eller hva skal selv her alle vil ble blir ville hadde være noe noen mye "
          "etter deg mer uten mellom bare ennå dette disse for å hvorfor hvordan også skulle kunne må enhver sin sitt hver "
          "eg ikkje ein eit frå kva kvar korleis me dei vere vore vart berre noko nokon ho meir mykje sjølv òg "
          "ingen intet når under mot ned hjem hos sine slik gjør gjøre",
    "sv": "och i jag det att en ett den till är som på de med han av inte där så var mig sig men har om vi min hon nu över då "
          "vid från du ut dem oss upp man kan hans hur eller vad ska skall själv här alla vill blev blir ville hade vara något "
          "någon mycket efter dig mer utan mellan bara ännu detta dessa för varför också skulle kunna måste sin sitt "
          "varje är ej icke när mot under ingen inget ned hem hos sina sådan gör göra",
    "da": "og i jeg det at en et den til er som på de med han af ikke der så var mig sig men har om vi min hun nu over da ved "
          "fra du ud dem os op man kan hans hvor eller hvad skal selv her alle vil blev bliver ville havde være noget nogen "
          "nogle meget efter dig mere uden mellem bare kun endnu dette disse for hvorfor hvordan også skulle kunne må enhver "
          "sin sit hver have mod ingen intet når under ned hjem hos sine sådan gør gøre",
    "de": "der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als auch es an werden aus er hat dass "
          "sie nach wird bei einer um am sind noch wie einem über einen so zum war haben nur oder aber vor zur bis mehr durch "
          "man sein wurde ihr ich du wir mir mich dir uns kein keine was wo warum jeder jede ihre seine kann muss hatte",
    "fr": "de la le et les des en un du une que est pour qui dans a par plus pas au sur ne se ce il sont la avec ou son lui "
          "nous comme mais on tout vous si elle même ces aux été cette je d l qu n c s j leur être deux était ils fait sa "
          "ont peut moi toute sans toi mon ma mes tu où quand pourquoi avoir ses tous très",
    "es": "de la que el en y a los se del las un por con no una su para es al lo como más o pero sus le ha me si sin sobre este "
          "ya entre cuando todo esta ser son dos también fue había era muy hasta desde está mi porque qué sólo yo hay toda "
          "nos quien ni contra ese eso mí tiene ella él usted nosotros dónde tú donde",
    "nl": "de en van ik te dat die in een hij het niet zijn is was op aan met als voor had er maar om hem dan zou of wat mijn "
          "men dit zo door over ze zich bij ook tot je mij uit der daar haar naar heb hoe heeft hebben deze u want nog zal me "
          "zij nu geen omdat iets worden toch al waren veel meer doen moet ben wordt kan wij hun onze waar waarom ieder een "
          "wie elk jij",
    "it": "di e che la il un a per in una mi ma lo ha le si ho non con li da se no come io ci questo qui sei del tu bene è al "
          "della mio sono tutto dei te nel anche più alla gli dal sua ed cosa ti era nella delle lui suo essere dalla "
          "l d ogni hanno degli perché dove quando noi voi loro chi ai alle ad questa quella molto",
    "pl": "i w nie na się że z do to jest o jak a ale po co tak za od jego tym już dla jej są przez przed tylko czy był może "
          "go mnie mi ma być ten ta te oraz ze lub ich jako tego które który która było była bo gdy ja ty on ona my wy oni "
          "nas was mu tej każdy każda jeszcze bardzo gdzie dlaczego też pod bez kto żeby sobie",
}  # fmt: skip


@cache
def _list_common(language):
    return frozenset(COMMON[get_language(language).code].split())


def find_language(text: str, language: str) -> tuple[str, list[str]]:
    """Return (code, words) of the other language that a text is in, or ("", []) where its own is as likely.

    The words are those that tell, each once: common in that language and not in `language`. There have to be LEAST_WORDS of them,
    and as many more for each word that is common the other way round, as "si" is in a Norwegian text under French's label. So
    a quotation or a title is taken for nothing, and most short texts are not either.
    """
    own, words = _list_common(language), dict.fromkeys(re.findall(r"[^\W\d_]+", text.lower()))
    best, found = "", []
    for other in COMMON:
        common = _list_common(other)
        against = [word for word in words if word in common and word not in own]
        for_own = sum(word in own and word not in common for word in words)
        if len(against) >= LEAST_WORDS * (1 + for_own) and len(against) > len(found):
            best, found = other, against
    return best, found
