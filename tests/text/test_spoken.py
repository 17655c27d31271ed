"""A text is read out as its language says it, and a text that has nothing to read out stays as it is.

The words are checked against the sources that csm_nb/text/spoken.yaml names; months and units are the Unicode CLDR's.
"""

import pytest

from csm_nb.languages import LANGUAGES
from csm_nb.text.normalise import character_error_rates, normalise_text
from csm_nb.text.numbers import unify_numbers
from csm_nb.text.sentences import make_sentences
from csm_nb.text.spoken import UNITS, read_out, read_rows

SAID = {
    "no": {
        "Møtet er kl. 14:30 den 12.3.2024.": "Møtet er klokken fjorten tretti den tolvte mars to tusen og tjuefire.",
        "Toget går kl. 9.05 og kommer kl. 21.": "Toget går klokken ni null fem og kommer klokken tjueen.",
        "Det koster kr 250,50, ikke 1 kr.": "Det koster to hundre og femti kroner og femti øre, ikke en krone.",
        "Prisen er 99,- for 2 stk. på mandag.": "Prisen er nittini kroner for to stykker på mandag.",
        "Vi kjøpte bl.a. 5 kg poteter, 2,5 l melk osv.":
            "Vi kjøpte blant annet fem kilogram poteter, to komma fem liter melk og så videre.",
        "Dr. Hansen bor i 3. etasje.": "Doktor Hansen bor i tredje etasje.",
        "Det er -3 °C og 80 km/t.": "Det er minus tre grader celsius og åtti kilometer per time.",
        "Ca. 50 % av 1 000 kr gikk til 17 barn.": "Cirka femti prosent av tusen kroner gikk til sytten barn.",
        "Han tjener 5 millioner kr i året.": "Han tjener fem millioner kroner i året.",
        "Se f.eks. § 5 & nr. 7.": "Se for eksempel paragraf fem og nummer sju.",
        "Hun ble født 17. mai 1984, dvs. før meg.":
            "Hun ble født syttende mai nitten hundre og åttifire, det vil si før meg.",
        "Huset er på 120 m² og 1 km unna.": "Huset er på hundre og tjue kvadratmeter og en kilometer unna.",
        "Den 2024-01-31 stod prisen i €12,50.":
            "Den trettiførste januar to tusen og tjuefire stod prisen i tolv euro og femti cent.",
    },
    "sv": {
        "Mötet är kl. 14.30 den 12 mars 2024.": "Mötet är klockan fjorton och trettio den tolfte mars tvåtusen tjugofyra.",
        "Klockan 9:05 gick tåget.": "Klockan nio noll fem gick tåget.",
        "Det kostar 250 kr, t.ex. 1 kr.": "Det kostar tvåhundrafemtio kronor, till exempel en krona.",
        "Vi köpte 1,5 kg potatis m.m.": "Vi köpte ett komma fem kilogram potatis med mera.",
        "Den 2024-03-01 kom 1 000 personer.": "Den första mars tvåtusen tjugofyra kom tusen personer.",
        "Det var 21 °C kl. 14:00.": "Det var tjugoett grader Celsius klockan fjorton.",
        "Dr Svensson bor på nr 5.": "Doktor Svensson bor på nummer fem.",
        "Han sprang 10 km, dvs. långt.": "Han sprang tio kilometer, det vill säga långt.",
        "Hon fick 3:e plats & 1:a pris.": "Hon fick tredje plats och första pris.",
        "Resan tog t ex 2 h.": "Resan tog till exempel två timmar.",
        "Ca 30 % av 5 miljoner kr.": "Cirka trettio procent av fem miljoner kronor.",
        "Bilen körde i 110 km/h osv. Sedan stannade den.":
            "Bilen körde i hundratio kilometer per timme och så vidare. Sedan stannade den.",
        "Kaffet kostade 24,50 kr.": "Kaffet kostade tjugofyra kronor och femtio öre.",
    },
    "da": {
        "Mødet er kl. 14.30 den 12.3.2024.": "Mødet er klokken fjorten tredive den tolvte marts to tusind og fireogtyve.",
        "Det koster 250 kr. i dag.": "Det koster to hundrede og halvtreds kroner i dag.",
        "Det koster 1 kr.": "Det koster en krone.",
        "Hr. Jensen købte bl.a. 5 l mælk.": "Herr Jensen købte blandt andet fem liter mælk.",
        "Han løb 10 km, fx i går.": "Han løb ti kilometer, for eksempel i går.",
        "Toget går kl. 8.05.": "Toget går klokken otte nul fem.",
        "Det er -1 °C, dvs. koldt.": "Det er minus en grad celsius, det vil sige koldt.",
        "Ca. 50 % af 2 mio. kr. er væk.": "Cirka halvtreds procent af to millioner kroner er væk.",
        "Hun bor på 3. sal, nr. 21.": "Hun bor på tredje sal, nummer enogtyve.",
        "Den 1. maj 1999 kom jeg hjem.": "Den første maj nitten hundrede og nioghalvfems kom jeg hjem.",
        "Vi har 92 høns, ænder osv.": "Vi har tooghalvfems høns, ænder og så videre.",
        "Bilen kører 130 km/t.": "Bilen kører hundrede og tredive kilometer i timen.",
        "Prisen er 12,50 kr. pr. stk.": "Prisen er tolv kroner og halvtreds øre per styk.",
    },
    "de": {
        "Am 12.3.2024 um 14:30 Uhr.": "Am zwölften März zweitausendvierundzwanzig um vierzehn Uhr dreißig.",
        "Der 1. Mai, z. B. um 9 Uhr.": "Der erste Mai, zum Beispiel um neun Uhr.",
        "Es kostete 12,50 € statt 101 €.": "Es kostete zwölf Euro fünfzig statt einhundertein Euro.",
        "Dr. Müller wiegt 80 kg usw. Er lebt.": "Doktor Müller wiegt achtzig Kilogramm und so weiter. Er lebt.",
        "Das ist § 5 bzw. Nr. 7.": "Das ist Paragraf fünf beziehungsweise Nummer sieben.",
        "Um 1:15 Uhr war es -5 °C kalt.": "Um ein Uhr fünfzehn war es minus fünf Grad Celsius kalt.",
        "Er fuhr 120 km/h, d.h. zu schnell.": "Er fuhr einhundertzwanzig Kilometer pro Stunde, das heißt zu schnell.",
        "5 Mio. € kostet das Haus.": "fünf Millionen Euro kostet das Haus.",
        "Ca. 30 % der 1.000 Gäste kamen.": "Circa dreißig Prozent der eintausend Gäste kamen.",
        "Wir haben u. a. 2,5 l Milch.": "Wir haben unter anderem zwei Komma fünf Liter Milch.",
        "Sie kam am 3. Oktober 1990.": "Sie kam am dritten Oktober neunzehnhundertneunzig.",
        "Die Wohnung hat 75 m².": "Die Wohnung hat fünfundsiebzig Quadratmeter.",
        "Der Zug fährt um 17.05 Uhr ab.": "Der Zug fährt um siebzehn Uhr fünf ab.",
    },
    "fr": {
        "M. Dupont arrive à 14h30 le 12/03/2024.":
            "Monsieur Dupont arrive à quatorze heures trente le douze mars deux mille vingt-quatre.",
        "Il est 21 h.": "Il est vingt et une heures.",
        "Le train part à 1 h 15.": "Le train part à une heure quinze.",
        "Cela coûte 12,50 €, pas 1 €.": "Cela coûte douze euros cinquante, pas un euro.",
        "Il gagne 5 millions € par an.": "Il gagne cinq millions d'euros par an.",
        "Mme Curie est née le 1 mai.": "Madame Curie est née le premier mai.",
        "J'ai acheté 2 kg de pommes, p. ex. hier.": "J'ai acheté deux kilogrammes de pommes, par exemple hier.",
        "Il fait -3 °C à 9h.": "Il fait moins trois degrés Celsius à neuf heures.",
        "Il roule à 90 km/h.": "Il roule à quatre-vingt-dix kilomètres par heure.",
        "Env. 30 % des 1 000 élèves sont là.": "Environ trente pour cent des mille élèves sont là.",
        "C'est le n° 7, etc.": "C'est le numéro sept, et cetera.",
        "Le Dr Martin habite au 2e étage.": "Le docteur Martin habite au deuxième étage.",
        "La maison a 120 m².": "La maison a cent vingt mètres carrés.",
    },
    "es": {
        "El Sr. Pérez llega a las 14:30 del 12/3/2024.":
            "El señor Pérez llega a las catorce treinta del doce de marzo de dos mil veinticuatro.",
        "Cuesta 21 € o 12,50 €.": "Cuesta veintiún euros o doce euros con cincuenta céntimos.",
        "Pesa 1 kg, p. ej., y mide 1 m.": "Pesa un kilogramo, por ejemplo, y mide un metro.",
        "Son las 21:05 h.": "Son las veintiuna cero cinco.",
        "Costó 5 millones €.": "Costó cinco millones de euros.",
        "La Dra. Ruiz vive en el 2º piso.": "La doctora Ruiz vive en el segundo piso.",
        "Hace -3 °C hoy.": "Hace menos tres grados Celsius hoy.",
        "El coche va a 120 km/h.": "El coche va a ciento veinte kilómetros por hora.",
        "Un 30 % de los 1.000 niños.": "Un treinta por ciento de los mil niños.",
        "El núm. 7, etc.": "El número siete, etcétera.",
        "Nació el 1 de mayo de 1984.": "Nació el uno de mayo de mil novecientos ochenta y cuatro.",
        "Son las 9:00.": "Son las nueve horas.",
        "Tiene 75 m² y 2,5 l de agua.": "Tiene setenta y cinco metros cuadrados y dos coma cinco litros de agua.",
    },
    "nl": {
        "Dhr. Jansen komt om 14.30 uur op 12-03-2024.":
            "De heer Jansen komt om veertien uur dertig op twaalf maart tweeduizendvierentwintig.",
        "Het kost € 12,50 of € 1.": "Het kost twaalf euro vijftig of één euro.",
        "We kochten bijv. 5 kg appels, d.w.z. genoeg.": "We kochten bijvoorbeeld vijf kilogram appels, dat wil zeggen genoeg.",
        "Om 9 uur is het 20 °C.": "Om negen uur is het twintig graden Celsius.",
        "Hij reed 100 km/u.": "Hij reed honderd kilometer per uur.",
        "Ca. 30 % van de 1.000 gasten.": "Circa dertig procent van de duizend gasten.",
        "Mevr. De Vries woont op nr. 21.": "Mevrouw De Vries woont op nummer eenentwintig.",
        "Het huis kost 2 mln. euro.": "Het huis kost twee miljoen euro.",
        "Op 1 mei 1984 werd hij geboren.": "Op één mei negentienhonderdvierentachtig werd hij geboren.",
        "Hij dronk 1,5 l melk enz.": "Hij dronk één komma vijf liter melk enzovoort.",
        "De kamer is 12 m².": "De kamer is twaalf vierkante meter.",
        "De trein van 8:05 uur is weg.": "De trein van acht uur vijf is weg.",
        "Zij kwam als 2e binnen.": "Zij kwam als tweede binnen.",
    },
    "it": {
        "Il Sig. Rossi arriva alle 14:30 del 12/3/2024.":
            "Il signor Rossi arriva alle quattordici e trenta del dodici marzo duemilaventiquattro.",
        "Costa 12,50 € e non 1 €.": "Costa dodici euro e cinquanta e non un euro.",
        "Il 1 maggio, ad es., ho corso 5 km.": "Il primo maggio, ad esempio, ho corso cinque chilometri.",
        "Fa -3 °C a Milano.": "Fa meno tre gradi Celsius a Milano.",
        "La macchina va a 120 km/h.": "La macchina va a centoventi chilometri orari.",
        "Circa il 30 % di 1.000 persone.": "Circa il trenta per cento di mille persone.",
        "Il n. 7, ecc.": "Il numero sette, eccetera.",
        "La Sig.ra Bianchi abita al 2º piano.": "La signora Bianchi abita al secondo piano.",
        "Costa 5 milioni €.": "Costa cinque milioni di euro.",
        "Ho comprato 2 kg di pane.": "Ho comprato due chilogrammi di pane.",
        "La casa ha 75 m².": "La casa ha settantacinque metri quadrati.",
        "Il treno parte alle ore 9.05.": "Il treno parte alle ore nove e cinque.",
        "È nato il 3 maggio 1984.": "È nato il tre maggio millenovecentottantaquattro.",
    },
    "pl": {
        "Spotkanie jest o godz. 14.30 dnia 12.03.2024 r.":
            "Spotkanie jest o godzinie czternastej trzydzieści dnia dwunastego marca dwa tysiące dwudziestego czwartego roku.",
        "To kosztuje 12,50 zł, a nie 1 zł.": "To kosztuje dwanaście złotych pięćdziesiąt groszy, a nie jeden złoty.",
        "Mam 2 zł i 5 zł.": "Mam dwa złote i pięć złotych.",
        "W 1984 r. mieszkał tu dr Nowak.": "W tysiąc dziewięćset osiemdziesiątym czwartym roku mieszkał tu doktor Nowak.",
        "Biegał 5 km, np. wczoraj itd.": "Biegał pięć kilometrów, na przykład wczoraj i tak dalej.",
        "Pociąg odjeżdża o 21:05.": "Pociąg odjeżdża o dwudziestej pierwszej zero pięć.",
        "Urodził się 3 maja 2024 roku.": "Urodził się trzeciego maja dwa tysiące dwudziestego czwartego roku.",
        "Jest -3 °C.": "Jest minus trzy stopnie Celsjusza.",
        "Jedzie 120 km/h, tzn. za szybko.": "Jedzie sto dwadzieścia kilometrów na godzinę, to znaczy za szybko.",
        "Ok. 30 % z 1 000 osób.": "Około trzydzieści procent z tysiąc osób.",
        "Kupił 2,5 kg jabłek.": "Kupił dwa przecinek pięć kilograma jabłek.",
        "To jest § 5 i nr 7.": "To jest paragraf pięć i numer siedem.",
        "Dom ma 75 m² & ogród.": "Dom ma siedemdziesiąt pięć metrów kwadratowych i ogród.",
    },
    "en": {
        "Mr. Smith left at 2:30 pm on 3/12/2024.": "Mister Smith left at two thirty pm on March twelfth, twenty twenty-four.",
        "It costs $5.99, not £3.": "It costs five dollars and ninety-nine cents, not three pounds.",
        "In 1984, e.g., he ran 5 km.": "In nineteen eighty-four, for example, he ran five kilometers.",
        "We met at 14:00 and at 2:00.": "We met at fourteen hundred and at two o'clock.",
        "On March 12, 1905 it snowed.": "On March twelfth, nineteen oh five it snowed.",
        "The party is on 12 March 2024.": "The party is on the twelfth of March twenty twenty-four.",
        "They paid $5 million for it.": "They paid five million dollars for it.",
        "Dr. Jones weighs 80 kg etc.": "Doctor Jones weighs eighty kilograms and so on.",
        "It is -3 °C and 60 km/h.": "It is minus three degrees Celsius and sixty kilometers per hour.",
        "About 30% of 1,250 people.": "About thirty percent of twelve hundred and fifty people.",
        "See No. 7 & § 5.": "See number seven and section five.",
        "The train leaves at 8:05.": "The train leaves at eight oh five.",
        "He came 21st in 2009.": "He came twenty-first in two thousand and nine.",
    },
}  # fmt: skip


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_text_is_read_out_as_its_language_says_it(language):
    assert len(SAID[language]) >= 12
    assert {text: read_out(text, language) for text in SAID[language]} == SAID[language]


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_was_read_out_stays_as_it_is(language):
    for text in SAID[language].values():
        assert read_out(text, language) == text


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_of_the_default_run_stay_as_they_are_in_training_and_in_comparing(language):
    for text in (*LANGUAGES[language].probes, *(text for split in ("train", "validation", "test")
                                                for text in make_sentences(language, 1000, 0, split))):
        assert read_out(text, language) == text
        assert normalise_text(text, language) == unify_numbers(normalise_text(text), language)


@pytest.mark.parametrize(("language", "text", "said"), [
    ("en", "No. I saw Max.", "No. I saw Max."), ("en", "It is 5 min away.", "It is five min away."),
    ("en", "It grew at 1.25 a year.", "It grew at one point two five a year."),
    ("no", "De 3 vil ha 5 ha.", "De tre vil ha fem ha."), ("fr", "Je vois M.", "Je vois M."), ("de", "Er sah Dr.", "Er sah Dr."),
    ("it", "Ho 2 amici, n. e m.", "Ho due amici, n. e m."), ("pl", "Ok. Idę do domu.", "Ok. Idę do domu."),
    ("sv", "Den 3 kl som var.", "Den tre kl som var."), ("no", "Versjon 1.2.3", "Versjon en.to.tre"),
])  # fmt: skip
def test_what_only_looks_like_an_abbreviation_or_a_unit_is_none(language, text, said):
    assert read_out(text, language) == said


@pytest.mark.parametrize(("language", "written", "said"), [
    ("no", "Kl. 14:30", "klokken fjorten tretti"), ("no", "12.3.2024", "tolvte mars to tusen og tjuefire"),
    ("sv", "5 kg", "fem kilogram"), ("da", "250 kr.", "to hundrede og halvtreds kroner"), ("de", "z. B.", "zum Beispiel"),
    ("de", "9:05 Uhr", "neun Uhr fünf"), ("fr", "14h30", "quatorze heures trente"), ("es", "21 €", "veintiún euros"),
    ("nl", "€ 12,50", "twaalf euro vijftig"), ("it", "ecc.", "eccetera"), ("pl", "2 zł", "dwa złote"),
    ("en", "$5.99", "Five dollars and ninety-nine cents"), ("en", "in 1984", "in nineteen hundred and eighty-four"),
])  # fmt: skip
def test_a_judge_compares_the_written_and_the_said_form_as_equal(language, written, said):
    assert normalise_text(written, language) == normalise_text(said, language)
    assert character_error_rates([written], [said], language)[0] == 0


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("text", ["", "%", "1.2.3", "31.2.2024", "99/99/9999", "25:61", "12:30:15", "2024-13-45", "€", "kr 1 kr",
                                  "1/2", "3 m.fl. 5 m²/s", "9" * 400 + " km", "7" * 5000 + " €", "-1,5 °C", "٣ kg", "& §",
                                  "1,2,3 €", "0,50 €", "0:00", "1.000.000,00 $", "10-12 kg", "M. 5", "kl. 25.99", "$5 million"])
def test_any_text_comes_through_without_digits(language, text):
    assert not any(character.isdecimal() for character in read_out(text, language))
    assert normalise_text(text, language) == normalise_text(read_out(text, language), language)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_unit_has_a_name_in_every_language(language):
    for sign in UNITS:
        said = {read_out(f"{count} {sign}", language) for count in (1, 2, 5)}
        assert len(said) == 3 and all(sign not in words.split() and len(words.split()) > 1 for words in said)


def test_a_row_keeps_how_its_text_stood_only_where_that_differs():
    rows = [{"text": text, "speaker_id": "1", "language": "no"} for text in ("Ca. 5 kg", "Hunden sover.")]
    assert read_rows(rows) == [rows[0] | {"text": "Cirka fem kilogram", "written": "Ca. 5 kg"}, rows[1]]
