"""The hub's names of licences, languages and repositories: a model card may hold no others.

Sources: the licences are listed in huggingface.co/docs/hub/repositories-licenses; two-letter codes are ISO 639-1's; the
form of a repository's id is huggingface_hub's. Known gap: for a three-letter code only the form is checked.
"""

import difflib
import re

_LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0
wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0
isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0
postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2
llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown other
"""
_LANGUAGES = """
aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en eo
es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv ka kg
ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng nl nn
no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st su sv sw ta
te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu
"""
LICENSES, LANGUAGES = frozenset(_LICENSES.split()), frozenset(_LANGUAGES.split())
NAMES = {
    "ar": "Arabic", "code": "code", "de": "German", "en": "English", "es": "Spanish", "fr": "French", "hi": "Hindi",
    "it": "Italian", "ja": "Japanese", "ko": "Korean", "multilingual": "many",
    "pt": "Portuguese", "ru": "Russian", "zh": "Chinese",
}  # fmt: skip
"""English names of the most used languages."""
OTHER_LANGUAGES = ("code", "multilingual")
"""Language codes that the hub knows in addition to ISO 639."""
_PART = re.compile(r"[a-zA-Z0-9_](?:[\w.-]*[a-zA-Z0-9_])?", re.ASCII)
_LONGEST_PART = 96


def license_problem(name: str) -> str | None:
    """Why a name is not a licence of the hub, with the nearest name that is; None if it is one."""
    if name in LICENSES:
        return None
    near = difflib.get_close_matches(name.lower().replace(" ", "-"), sorted(LICENSES), n=1)
    return f"{name!r} is not a licence that the hub knows{f'; the nearest is {near[0]!r}' if near else ''}"


def is_language(code: str) -> bool:
    """Whether this is a code of ISO 639, or a word that the hub takes in its place."""
    return code in LANGUAGES or code in OTHER_LANGUAGES or re.fullmatch("[a-z]{3}", code) is not None


def language_name(code: str) -> str:
    """The language's English name; for a rarer language its code, marked as a code."""
    return NAMES.get(code, f"`{code}`")


def is_repo_id(name: str) -> bool:
    """Whether this may be the id of a model or dataset: NAME or ORG/NAME."""
    parts = name.split("/")
    if len(parts) > 2 or "--" in name or ".." in name or name.endswith(".git"):
        return False
    return all(_PART.fullmatch(part) and len(part) <= _LONGEST_PART for part in parts)
