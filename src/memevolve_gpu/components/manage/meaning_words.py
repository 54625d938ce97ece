"""Word lists of :mod:`.meaning`: fillers, numbers, units, synonyms and opposites of five languages, and negations.

Stems on the right of SYNONYMS are as the stemmer leaves them. A word that is in no list is never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _map(text: str, between: str | None = None) -> dict[str, str]:
    """``a b c=d`` on each line maps a, b and c to d; ``between`` separates phrases, which hold blanks themselves."""
    pairs: dict[str, str] = {}
    for line in text.strip().splitlines():
        words, target = line.strip().split("=")
        pairs.update(dict.fromkeys(words.split(between), target))
    return pairs


def _numbers(text: str, start: int = 0, step: int = 1) -> dict[str, float]:
    """Numbers in ascending order, ``step`` apart, the first ``start * step``; a slash separates names of one number."""
    return {word: float(at * step) for at, words in enumerate(text.split(), start) for word in words.split("/")}


FILLERS: Mapping[str, frozenset[str]] = {
    "en": _set(
        "a an the of is are be been being am it its this that these those you your we our "
        "should must shall do does did please always simply just also so at in on for as has have get gets got "
        "which there and then version"
    ),
    "de": _set(
        "der die das den dem des ein eine einen einem einer ist sind sei du dein wir unser es bitte "
        "immer auch so in im an am auf zu zum zur für von vom als wird werden soll sollte muss und dann man beträgt"
    ),
    "fr": _set(
        "le la les l un une des du de d est sont être tu ton ta vous votre nous notre en dans à au aux "
        "pour par toujours aussi et puis ce cette doit faut veuillez avoir qu que"
    ),
    "es": _set(
        "el la los las lo un una unos unas de del es son ser está tu su sus nuestro en a al para por "
        "siempre también y luego este esta debe hay que le se durante"
    ),
    "zh": _set("的 了 请 要 在 把 应 该 应该 必须 务必 你 我们 总是 之 时 是 为 将 会 地 得 都"),
}
"""Words that change nothing, with the prepositions whose meaning the nouns beside them carry."""

ROLES: Mapping[str, frozenset[str]] = {"en": _set("you"), "fr": _set("tu vous nous"), "zh": _set("你 我们")}
"""Fillers that may be who acts or who is acted on: beside them, the place of a name decides which it is."""

NEGATIONS: Mapping[str, frozenset[str]] = {
    "en": _set(
        "not no never without cannot neither nor don't doesn't didn't isn't aren't wasn't weren't won't can't couldn't "
        "shouldn't mustn't wouldn't hasn't haven't hadn't dont doesnt cant wont none nothing nobody"
    ),
    "de": _set("nicht nie niemals kein keine keinen keinem keiner keines ohne nichts niemand"),
    "fr": _set("ne n pas jamais sans aucun aucune ni rien"),
    "es": _set("no nunca jamás sin ningún ninguna ninguno ni nada nadie tampoco"),
    "zh": _set("不 没 没有 别 勿 不要 不能 不得 不可 禁止 从不 绝不 切勿 未 无 非 ない なく なし ません せん ずに"),
}

OTHER_NEGATIONS = _set(
    "não nem nunca sem nenhum nenhuma ninguém jamais non nessun nessuno nessuna niente senza "  # pt, it
    "niet nooit geen zonder niets inte ikke aldrig aldri ingen inget intet utan uden uten "  # nl, sv, da, no
    "nie nigdy bez ani żaden żadna żadne brak ne nikdy není "  # pl, cs
    "не нет нельзя ни никогда без ні немає ніколи "  # ru, uk
    "değil asla hiç hiçbir yok olmadan không đừng chưa tidak jangan bukan tanpa "  # tr, vi, id
    "لا ليس ليست لم لن غير بدون دون أبدا أبداً לא אל אין בלי אסור "  # ar, he
    "नहीं मत बिना न कभी 안 못 마세요 마십시오 마라"  # hi, ko
)
"""Negations of languages whose other words are not known; in texts of a language that is, they negate too."""

NEGATED = ("않", "없", "못하", "말아", "금지")
"""How Korean words of negation begin."""

DIRECTIONS: Mapping[str, Mapping[str, str]] = {
    "en": _map(
        "before=before\nafter=after\nfrom=from\ninto=into\nthan=than\nover=over\ninstead=instead\nbecause=because\n"
        "if=if\nwhen whenever=when\nunless=unless\nuntil=until\nonly=only\nexcept=except\nwith=with\nbut=but\n"
        "within=within\nbelow under=below\nabove=above\nfirst=first\nlast=last\nsince=since\noff=off\nout=out\nup=up\n"
        "down=down\nto=to\nby=by"
    ),
    "de": _map(
        "vor bevor=vor\nnach nachdem=nach\nals=als\nwenn falls=wenn\nmit=mit\nstatt anstatt=statt\nnur=nur\naus=aus"
    ),
    "fr": _map(
        "avant=avant\naprès=après\nsi=si\navec=avec\nquand lorsque=quand\nseulement=seulement\nsous=sous\nsur=sur"
    ),
    "es": _map("antes=antes\ndespués=después\nsi=si\ncon=con\ncuando=cuando\nsolo=solo\nbajo=bajo\nsobre=sobre"),
    "zh": _map("前 之前 以前=前\n后 之后 以后=后\n如果=如果\n只 仅 只能=只\n从=从\n到=到\n比=比"),
}
"""Words that say how the word after them relates to the rest."""

MODALS = frozenset({"optional", "may", "can", "might"})
"""Words that alone change a duty."""

NUMBERS: Mapping[str, Mapping[str, float]] = {
    "en": {
        **_numbers("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"),
        **_numbers("twenty thirty forty fifty sixty", 2, 10),
        "ninety": 90.0,
        "hundred": 100.0,
        "thousand": 1000.0,
    },
    "de": {
        **_numbers("null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf"),
        **_numbers("zwanzig dreißig vierzig fünfzig sechzig", 2, 10),
        "neunzig": 90.0,
    },
    "fr": {
        **_numbers("deux trois quatre cinq six sept huit neuf dix onze douze", 2),
        "quinze": 15.0,
        **_numbers("vingt trente quarante cinquante soixante", 2, 10),
    },
    "es": {
        **_numbers("dos tres cuatro cinco seis siete ocho nueve diez once doce", 2),
        "quince": 15.0,
        **_numbers("veinte treinta cuarenta cincuenta sesenta", 2, 10),
    },
    "zh": _numbers("零 一 二/两 三 四 五 六 七 八 九"),
}

SINGULAR = _set("news goods customs means")
"""English words that end in s and are no plural of the word without it."""

CASED = {"Kb": "kilobit", "Mb": "megabit", "Gb": "gigabit", "Tb": "terabit", "M": "million"}
"""Units whose capitals decide."""

CURRENCIES = "$\u20ac\u00a3\u00a5%"


def _units() -> dict[str, tuple[float, str]]:
    found: dict[str, tuple[float, str]] = {}
    for line in """
        1e-3 s ms millisecond milliseconds millisekunde millisekunden millisecondes milisegundos 毫秒
        1 s s sec secs second seconds sekunde sekunden seconde secondes segundo segundos 秒 秒钟
        60 s min mins minute minutes minuten minuto minutos 分钟 分
        3600 s h hr hrs hour hours stunde stunden heure heures hora horas 小时
        86400 s day days tag tage tagen jour jours día días 天 日
        604800 s week weeks woche wochen semaine semaines semana semanas 周
        1 month month months monat monate mois mes meses 个月
        12 month year years jahr jahre jahren an ans année années año años 年
        1 B b byte bytes
        1e3 B kb kilobyte kilobytes
        1e6 B mb megabyte megabytes
        1e9 B gb gigabyte gigabytes
        1e12 B tb terabyte terabytes
        1024 B kib
        1048576 B mib
        1073741824 B gib
        1e-3 m mm millimetre millimetres millimeter millimeters
        1e-2 m cm centimetre centimetres centimeter centimeters
        1 m m metre metres meter meters mètre mètres metro metros 米
        1e3 m km kilometre kilometres kilometer kilometers kilomètre kilomètres kilómetros 公里
        1e-3 kg g gram grams gramm gramme grammes gramos 克
        1 kg kg kilo kilos kilogram kilograms 公斤
        1 % % percent prozent
        1 $ $ dollar dollars usd
        1 \u20ac \u20ac euro euros eur 欧元
        1 \u00a3 \u00a3 pound pounds gbp
        1 \u00a5 \u00a5 yen yuan 元
        1 am am
        1 pm pm
    """.strip().splitlines():
        factor, base, *words = line.split()
        found.update(dict.fromkeys(words, (float(factor), base)))
    return found


UNITS: Mapping[str, tuple[float, str]] = _units()
"""Unit: (factor, base unit)."""

MONTHS: Mapping[str, str] = {
    name: f"month{at:g}"
    for name, at in _numbers(
        "january/januar/janvier/enero february/februar/février/febrero märz/mars/marzo april/avril/abril mai/mayo "
        "june/juni/juin/junio july/juli/juillet/julio august/août/agosto september/septembre/septiembre "
        "october/oktober/octobre/octubre november/novembre/noviembre december/dezember/décembre/diciembre",
        1,
    ).items()
}
"""Without "may" and "march", which are words too; the capital decides."""

PHRASES: Mapping[str, Mapping[str, str]] = {
    "en": _map(
        """
        make sure to/make sure that/be sure to/remember to/don't forget to/do not forget to/never forget to=
        need to/needs to/have to/has to=
        don't have to/do not have to/doesn't have to/don't need to/do not need to/need not=optional
        instead of/rather than=instead
        because of=because
        turn on/switch on=enable
        turn off/switch off=disable
        at most/no more than=maximum
        at least/no less than=minimum
        no longer=not anymore
        more than=more than
        get rid of=delete
        phone number=phonenumber
        every day/each day=daily
        every night/each night=nightly
        every week=weekly
        an hour=one hour
        a minute=per minute
        a second=per second
        a day=per day
        """,
        "/",
    ),
    "de": {"du musst": "", "stelle sicher dass": "", "denk daran": "", "nicht müssen": "optional"},
    "fr": {"du tout": "", "assure-toi de": "", "n'oublie pas de": "", "au plus": "maximum", "au moins": "minimum"},
    "es": {"asegúrate de": "", "no olvides": "", "como máximo": "maximo", "al menos": "minimo"},
}

SYNONYMS: Mapping[str, Mapping[str, str]] = {
    "en": _map(
        "remove erase delete=delet\nmax maximum maximal=maximum\nmin minimum minimal=minimum\n"
        "need needs require requires=requir\nfavor favour favors prefer prefers=prefer\n"
        "raise raises increase increases grow=increas\nlower lowers reduce reduces decrease decreases=decreas\n"
        "let allow allowed allows permit permitted permits=allow\nforbid forbidden deny denied disallow=forbid\n"
        "keep keeps kept store stored stores hold holds=stor\nadmin admins administrator administrators=admin\n"
        "folder folders directory directories=folder\nwant wants=want\nlike likes enjoy enjoys=lik\n"
        "begin begins start starts launch launches=start\nhalt halts stop stops=stop\n"
        "rest use uses used using=us\nwritten write writes=writ\ni my me mine=me\nhe his him=he\n"
        "she her hers=she\nthey their them=they\nram memory=memory\n"
        "colour color=color\ncentre center=center\nkilometre kilometer kilometres kilometers km=kilomet\n"
        "quick quickly fast=fast\nbug defect=bug\nrepo repos repository repositories=repo\n"
        "config configuration=config\ndocs documentation=documentation\ndb database databases=database\n"
        "app apps application applications=app\nuser users=user\nfix repair=fix\nshow display=show\n"
        "tell inform notify=notify\nbuy purchase=buy\ncar automobile=car\nchild kid=child\nchildren kids=children\n"
        "mom mum mother=mother\ndad father=father\nbig large=larg\nsmall little=small\nper each every=per\n"
        "finish finished complete completed=finish\nerror errors=error\nrun execute=run\nruns executes=run\n"
        "may=may\ncan=can\nset=set\nbuild=build\nhome house=hous"
    ),
    "de": _map(
        "nutzer benutzer anwender=nutzer\nausführen führe führen=führ\nlöschen entfernen lösche entferne=lösch\n"
        "höchstens maximal=maximal\nmindestens minimal=minimal"
    ),
    "fr": _map(
        "activer active activez=activ\nsupprimer efface supprime effacer=supprim\nrelancer relance relancez=relanc"
    ),
    "es": _map(
        "borrar borra eliminar elimina elimines borres=borr\nejecuta ejecutar ejecutes=ejecut\n"
        "guarda guardar guardes=guard\n"
        "reintenta reintentar reintentes=reintent"
    ),
    "zh": _map("启用 开启 打开=启用\n禁用 关闭=禁用\n位于=\n喜欢喝 喜欢=喜欢\n删除 移除=删除\n运行 执行=运行"),
}

ANTONYMS: frozenset[frozenset[str]] = frozenset(
    frozenset(pair.split("/"))
    for pair in _set(
        "enabl/disabl allow/forbid increas/decreas maximum/minimum before/after more/less above/below start/stop "
        "ascend/descend ascending/descending open/close opens/closes op/clos light/dark full/empty pass/fail "
        "left/right public/private lock/unlock rise/fall rose/fell on/off up/down read/write first/last lik/dislik "
        "succeeded/failed idl/busy true/false yes/no all/some everyone/only into/from encrypt/decrypt import/export "
        "add/delet accept/reject hot/cold early/late internal/external old/new owner/guest love/hate vor/nach "
        "maximal/minimal avant/après antes/después activ/désactiv 前/后 启用/禁用 喜欢/讨厌 增加/减少 最大/最小"
    )
)
