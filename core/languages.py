"""The one table of languages: codes, names, scripts without spaces, and what an unknown code is.

Codes are those of Whisper (ISO 639-1 with a few exceptions: `jw`, `haw`, `yue`). `language_code` brings what
corpora write to a code; `effective_language` says by which rules a text is normalised and counted.
"""

from __future__ import annotations

from functools import cache

import regex

# A code, then its other codes (ISO 639-2, 639-3, old ones), then "=" and its names in English, the usual one
# first.
_TABLE = """
aa aar = Afar
ab abk = Abkhazian, Abkhaz
ace = Acehnese
af afr = Afrikaans
ak aka = Akan
am amh = Amharic
an arg = Aragonese
ar ara arb arz apc ary ajp acm aeb = Arabic
as asm = Assamese
ast = Asturian
av ava = Avaric
awa = Awadhi
ay aym ayr = Aymara
az aze azj azb = Azerbaijani
ba bak = Bashkir
ban = Balinese
bar = Bavarian
bas = Basaa
be bel = Belarusian
bem = Bemba
bg bul = Bulgarian
bho = Bhojpuri
bi bis = Bislama
bm bam = Bambara
bn ben = Bengali, Bangla
bo bod tib = Tibetan
br bre = Breton
brx = Bodo
bs bos = Bosnian
bug = Buginese
ca cat = Catalan, Valencian
ce che = Chechen
ceb = Cebuano
ch cha = Chamorro
cjy = Jin Chinese
ckb = Central Kurdish, Sorani
cnh = Hakha Chin
cdo = Eastern Min
co cos = Corsican
crh = Crimean Tatar
cs ces cze cz = Czech
cv chv = Chuvash
cy cym wel = Welsh
da dan dk = Danish
de deu ger = German
doi dgo = Dogri
dsb = Lower Sorbian
dv div = Dhivehi, Divehi, Maldivian
dyu = Dyula
dz dzo = Dzongkha
ee ewe = Ewe
el ell gre gr = Greek
en eng = English
eo epo = Esperanto
es spa = Spanish, Castilian
et est ekk = Estonian
eu eus baq = Basque
fa fas per pes prs = Persian, Farsi, Dari
ff ful fuv = Fulah, Fula
fi fin = Finnish
fj fij = Fijian
fo fao = Faroese
fon = Fon
fr fra fre = French
fur = Friulian
fy fry = Western Frisian, Frisian
ga gle = Irish
gan = Gan Chinese
gd gla = Scottish Gaelic
gl glg = Galician
gn grn gug = Guarani
gom kok = Konkani
gsw = Swiss German
gu guj = Gujarati
gv glv = Manx
ha hau = Hausa
hak = Hakka, Hakka Chinese
haw = Hawaiian
he heb iw = Hebrew
hi hin = Hindi
hne = Chhattisgarhi
hr hrv = Croatian
hsb = Upper Sorbian
hsn = Xiang Chinese
ht hat = Haitian Creole, Haitian
hu hun = Hungarian
hy hye arm = Armenian
ia ina = Interlingua
id ind in = Indonesian
ig ibo = Igbo
ilo = Ilocano
io ido = Ido
is isl ice = Icelandic
it ita = Italian
iu iku = Inuktitut
ja jpn jp = Japanese
jw jv jav = Javanese
ka kat geo = Georgian
kab = Kabyle
kam = Kamba
kbd = Kabardian
kea = Kabuverdianu
kg kon = Kongo
khb = Lü
ki kik = Kikuyu
kk kaz kz = Kazakh
kl kal = Kalaallisut, Greenlandic
km khm = Khmer, Cambodian
kmb = Kimbundu
kmr = Northern Kurdish, Kurmanji
kn kan = Kannada
ko kor = Korean
kr kau knc = Kanuri
ks kas = Kashmiri
ksw = S'gaw Karen
ku kur = Kurdish
kv kom kpv = Komi
kw cor = Cornish
ky kir = Kyrgyz, Kirghiz
la lat = Latin
lb ltz = Luxembourgish, Letzeburgesch
lg lug = Ganda, Luganda
li lim = Limburgish
lij = Ligurian
lmo = Lombard
ln lin = Lingala
lo lao = Lao, Laotian
lt lit = Lithuanian
ltg = Latgalian
lu lub = Luba-Katanga
lua = Luba-Lulua
luo = Luo
lus = Mizo
lv lav lvs = Latvian
lzh = Literary Chinese, Classical Chinese
mag = Magahi
mai = Maithili
mdf = Moksha
mg mlg plt = Malagasy
mh mah = Marshallese
mhr chm = Meadow Mari, Mari
mi mri mao = Maori
min = Minangkabau
mk mkd mac = Macedonian
ml mal = Malayalam
mn mon khk = Mongolian
mni = Manipuri, Meitei
mnw = Mon
mos = Mossi
mr mar = Marathi
mrj = Hill Mari
ms msa may zsm = Malay
mt mlt = Maltese
my mya bur = Myanmar, Burmese
myv = Erzya
nan = Min Nan, Taiwanese, Hokkien
nd nde = Northern Ndebele
nds = Low German
ne nep npi = Nepali
nhi = Nahuatl
nl nld dut = Dutch, Flemish
nn nno = Nynorsk
no nor nb nob = Norwegian, Bokmål, Bokmal
nod = Northern Thai
nr nbl = Southern Ndebele
nso = Northern Sotho, Sepedi
nus = Nuer
nv nav = Navajo
ny nya = Chichewa, Nyanja, Chewa
oc oci = Occitan
oj oji = Ojibwe
om orm gaz = Oromo
or ori ory = Odia, Oriya
os oss = Ossetian
pa pan = Punjabi, Panjabi
pag = Pangasinan
pap = Papiamento
pl pol = Polish
ps pus pbt = Pashto, Pushto
pt por = Portuguese
qu que quy = Quechua
rm roh = Romansh
rn run = Rundi, Kirundi
ro ron rum mo = Romanian, Moldavian, Moldovan
ru rus = Russian
rw kin = Kinyarwanda
sa san = Sanskrit
sah = Yakut, Sakha
sat = Santali
sc srd = Sardinian
scn = Sicilian
sd snd = Sindhi
se sme = Northern Sami
sg sag = Sango
shn = Shan
si sin = Sinhala, Sinhalese
sk slk slo = Slovak
skr = Saraiki
sl slv = Slovenian, Slovene
sm smo = Samoan
sn sna = Shona
so som = Somali
sq sqi alb als = Albanian
sr srp = Serbian
ss ssw = Swati
st sot = Southern Sotho, Sotho
su sun = Sundanese
sv swe = Swedish
sw swa swh = Swahili
szl = Silesian
ta tam = Tamil
te tel = Telugu
tg tgk = Tajik
th tha = Thai
ti tir = Tigrinya
tig = Tigre
tk tuk = Turkmen
tl tgl fil = Tagalog, Filipino
tn tsn = Tswana
to ton = Tongan
tok = Toki Pona
tpi = Tok Pisin
tr tur = Turkish
ts tso = Tsonga
tt tat = Tatar
tts = Isan
tum = Tumbuka
tw twi = Twi
ty tah = Tahitian
ug uig = Uyghur, Uighur
uk ukr ua = Ukrainian
umb = Umbundu
ur urd = Urdu
uz uzb uzn = Uzbek
ve ven = Venda
vec = Venetian
vi vie vn = Vietnamese
vot = Votic
war = Waray
wa wln = Walloon
wo wol = Wolof
wuu = Wu Chinese, Shanghainese
xh xho = Xhosa
yi yid ydd ji = Yiddish
yo yor = Yoruba
yue = Cantonese
za zha = Zhuang
zgh = Tamazight
zh zho chi cmn cn = Chinese, Mandarin
zu zul = Zulu
zza = Zaza
"""
CHINESE = frozenset({"zh", "yue", "nan", "wuu", "hak", "gan", "hsn", "cdo", "cjy", "lzh"})
#: Languages whose scripts have no spaces between words: their "word" is the character.
UNSPACED = CHINESE | {"ja", "th", "tts", "nod", "lo", "my", "shn", "mnw", "ksw", "km", "khb"}
#: Not known, or not said: normalised by the basic rules, split by the scripts of the text itself.
UNDETERMINED = "und"

_OTHER_LETTERS = regex.compile(r"[\p{L}&&[^\p{Latin}\p{Common}]]", regex.VERSION1)
_UNSPACED_SCRIPTS = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
    r"\p{Tai_Tham}\p{New_Tai_Lue}\p{Tai_Le}\p{Tai_Viet}\p{Yi}]"
)


def _read() -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Any code -> the code; any name in lower case -> the code; the code -> its usual name."""
    codes: dict[str, str] = {}
    names: dict[str, str] = {}
    usual: dict[str, str] = {}
    for line in _TABLE.strip().splitlines():
        codes_text, _, right = line.partition("=")
        code = codes_text.split()[0]
        codes |= dict.fromkeys(codes_text.split(), code)
        spellings = [name.strip() for name in right.split(",")]
        usual[code] = spellings[0]
        names |= {name.lower(): code for name in spellings}
    return codes, names, usual


_CODES, _NAMES, _USUAL = _read()


def language_code(lang: str | None) -> str | None:
    """Return the code of a language, given as a code with or without a region (zh-CN, en_us), or as a name in
    English that may have a word before it (Mandarin Chinese). What is not known is returned in lower case;
    None for None or ""."""
    if not lang or not str(lang).strip():
        return None
    code = str(lang).lower().replace("_", "-").split("-")[0].strip()
    return _CODES.get(code) or named_language(str(lang)) or code


@cache
def named_language(words: str) -> str | None:
    """Return the code of the language whose English name these words end with; None where none is named."""
    word_list = words.lower().split()
    for start in range(len(word_list)):  # the longest name first: "Swiss German" is not German
        if code := _NAMES.get(" ".join(word_list[start:])):
            return code
    return next((_NAMES[word] for word in reversed(word_list) if word in _NAMES), None)


def is_known(lang: str | None) -> bool:
    """Return whether the table holds this language."""
    return language_code(lang) in _USUAL


def language_name(lang: str) -> str:
    """Return the name that an instruction uses: German for de, de-DE or german; what is not known stays as it
    is."""
    return _USUAL.get(language_code(lang) or "", lang)


def writes_no_spaces(character: str) -> bool:
    """Return whether a character belongs to a script without spaces between words."""
    return _UNSPACED_SCRIPTS.match(character) is not None


def effective_language(lang: str | None, text: str) -> str:
    """Return the code by whose rules a text is scored.

    A known language counts as itself. Where none is given, text in Latin letters counts as English, the
    language of most data. A language that the table does not hold is undetermined (`und`), and so is a
    missing one of text in other scripts: the basic normaliser, words split at spaces, characters of scripts
    without spaces each by itself.
    """
    code = language_code(lang)
    if code is None:
        return UNDETERMINED if _OTHER_LETTERS.search(text) else "en"
    return code if code in _USUAL else UNDETERMINED
