"""The phrases after which a final answer stands, by language. Data: `extraction` reads them, in this order of trust.

An answer phrase is a sentence ("the answer is"); a label is a word with a colon or a line of its own ("Answer:").
"""

from __future__ import annotations

import re

# one argument of "the answer to this question is", so that the phrase stays within its sentence
_ABOUT = r"(?: (?:to|for|of|in|we|here|that|you)\b[^.\n:=?!。]{0,80}?)?"
_KIND = r"(?:final|correct|right|best|exact|numerical|numeric|simplified|overall|required|desired|complete)"
_IS = (
    r"(?:(?:is|was|are) (?:thus |therefore |then )?(?:found|calculated|computed|determined|seen|known) to be"
    r"|is|are|was|would be|must be|should be|will be|has to be|can only be|equals|becomes"
    r"|(?:comes|came|works|worked) out (?:to be|to|as)|(?:comes|came) to|(?:turns|turned) out to be"
    r"|(?:simplifies|reduces|evaluates|amounts) to)"
)
# a value follows at once: without a verb only that tells an answer from other talk of answers
_VALUE = r"(?=\s+[*_]*(?:[-+−$€£(\[]{0,3}\s?\d|\$|\\[(\[A-Za-z]))"
_GIVES = (
    r"(?:giv(?:es?|ing)|gave|yield(?:s|ed|ing)?|get(?:s|ting)?|got|obtain(?:s|ed|ing)?|reach(?:es|ed|ing)?|have|find"
    r"|produc(?:es?|ing)|leaves?|leaving|arriv(?:es?|ed|ing) at)"
)

# each sentence ends where the answer begins; "comma" languages write 3,5 for three and a half
_SENTENCES = {
    "English": rf"\b(?:the|my|our|your|this|an?)\s+(?:{_KIND}\W{{1,3}}){{0,2}}"
    rf"(?:(?:answer|result|solution)s?|(?<=\W)(?:option|choice))(?<!the option)(?<!the choice)"
    rf"(?:{_ABOUT}|,[^.,\n:=]{{1,60}},)\s*[*_]*\s*\b{_IS}\b",
    "English, of": rf"\b(?:the|an?|our|my) (?:{_KIND}\W{{1,3}}){{0,2}}answer of{_VALUE}",
    "English, contracted": rf"\b(?:the|our|my) (?:{_KIND}\W{{1,3}}){{0,2}}(?:answer|result)['’]s{_VALUE}",
    "English, no verb": rf"\b{_GIVES} (?:us |me )?(?:the|an?|our|my) (?:{_KIND}\W{{1,3}}){{0,2}}"
    rf"(?:answer|result){_VALUE}",
    "English, colon": rf"\b(?:the|our|my) (?:{_KIND}\W{{1,3}}){{0,2}}(?:answer|result)[:：]{_VALUE}",
    "English, short": rf"\b(?:final|correct) (?:answer|result|option|choice)s?\s*[*_]*\s*\b{_IS}\b|\banswer is\b",
    "Chinese": r"(?:最终|最后|正确|所以|因此|故)?的?(?:答案|结果|選項|选项|解答)"
    r"(?:应该|應該|就|便|应|應)?(?:是|为|為|选|選)",
    "Chinese, choice": r"(?:故|应|應|所以|因此|答案|正确|，|。|^)(?:选择|選擇|选|選)(?=\s*[(（]?[A-J])",
    "Korean": r"(?:최종\s*|올바른\s*|맞는\s*)?(?:정답|답안|해답|결과|답)(?:은|는|이|가)(?=[\s:])",
    "Japanese": r"(?:最終的な|最終の|最終|正しい)?(?:答え|解答|回答|正解|結果|答)(?:は|が)",
}  # fmt: skip
_COMMA_SENTENCES = {
    "German": r"\b(?:die|das)\s+(?:(?:endgültige|richtige|korrekte|finale|gesuchte)\w?\s+)?"
    r"(?:antwort|ergebnis|lösung|endergebnis|option)(?: auf [^.\n:=]{0,60}?)?\s*[*_]*\s*"
    r"(?:ist(?: also| somit| daher)?|lautet(?: also| somit| daher)?|beträgt|sind)\b"
    r"|\b(?:ist|lautet|beträgt)\s+(?:die|das)\s+(?:(?:endgültige|richtige)\w?\s+)?(?:antwort|ergebnis|lösung)\b",
    "French": r"\b(?:la|le)\s*(?:bonne\s+)?(?:réponse|résultat|solution|option)"
    r"(?:\s+(?:finale?|correcte?|exacte?))?(?: (?:à|de) [^.\n:=]{0,60}?)?\s*[*_]*\s*(?:est(?: donc)?|sont|vaut)\b",
    "Spanish": r"\b(?:la|el)\s+(?:respuesta|resultado|solución|opción)(?:\s+(?:final|correct[ao]|exact[ao]))*"
    r"(?: (?:a|de) [^.\n:=]{0,60}?)?\s*[*_]*\s*\b(?:es|son|sería)\b",
    "Portuguese": r"\b(?:a|o)\s+(?:resposta|resultado|solução)(?:\s+(?:final|corret[ao]))?\s*[*_]*\s*é(?!\w)",
    "Italian": r"\b(?:la|il)\s+(?:risposta|risultato|soluzione)(?:\s+(?:finale|corrett[ao]|esatta))?\s*[*_]*\s*è(?!\w)",
}

# bounded: a long run of these would be read again from each of its characters
_DECORATION = r"[ \t#>*_`\"'\[(-]{0,20}"
_QUALIFIED = r"(?:[ \t]*[(（](?=[^()（）\n]*[A-Za-z]{2})[^()（）\n]{1,60}[)）])?"  # "Answer (in meters):"
_AFTER = r"[*_`\"'\])]*[ \t]*(?:[:：=]|->|→|⇒|[-–—](?=[ \t])|(?=[ \t]*[*_]*[ \t]*\n))"
_LABELS = {
    "English": r"(?:the\s+|my\s+)?(?:final|correct|short)?[ _]*(?:answer|result)s?",
    "English, capitals": r"FINAL ANSWER(?=[ \t]+\S)(?![ \t]*[:：=*])",
    "other scripts": r"(?:最终|最后|正确|標準|标准|参考)?(?:答案|解答|答)|(?:최종\s*)?(?:정답|답안|해답|답)"
    r"|(?:最終)?(?:答え|解答|回答|正解)",
}
_COMMA_LABELS = (
    r"(?:end|final)?[ ]*(?:antwort|ergebnis|endergebnis)|réponse(?:\s+finale)?|résultat|respuesta(?:\s+final)?"
    r"|resultado|resposta(?:\s+final)?|risposta(?:\s+finale)?|ответ"
)
_SHORT_LABELS = r"(?:Ans|ANS|A)"

_START = r"(?:^|(?<=[\n.!?。！？>;,{，；：、]))"
_FLAGS = re.IGNORECASE | re.MULTILINE

SENTENCE = re.compile("|".join(_SENTENCES.values()), _FLAGS)
COMMA_SENTENCE = re.compile("|".join(_COMMA_SENTENCES.values()), _FLAGS)
LABEL = re.compile(rf"{_START}{_DECORATION}(?:{'|'.join(_LABELS.values())}){_QUALIFIED}{_AFTER}", _FLAGS)
CAPITALS = re.compile(r"^[ \t#>*_]*FINAL ANSWER(?=[ \t]+\S)", re.MULTILINE)
COMMA_LABEL = re.compile(rf"{_START}{_DECORATION}(?:{_COMMA_LABELS}){_QUALIFIED}{_AFTER}", _FLAGS)
# "Solution:" stands before whole solutions too; a value that fills the line is the answer
_ALONE = r"(?=[ \t]*(?:\$[^$\n]{1,60}\$|(?:[A-Za-z] ?= ?)?[-+]?[\d.,/]{1,30}%?)[ \t]*\.?[ \t]*$)"
SHORT_LABEL = re.compile(rf"^{_DECORATION}(?:{_SHORT_LABELS}[.:：]|Solution[:：]{_ALONE})", re.MULTILINE)
# the value first: "(B) is the correct answer"
REVERSED = re.compile(
    r"(?P<value>\$[^$\n]+\$|\\\([^\n]+?\\\)|\*\*[^*\n]+\*\*|(?:option|choice)\s+[A-J]\b|\([A-J]\)|(?<![\w.])[A-J]|(?<![\d,./])[-+$€£]?\d[\d,./]{0,30}%?)"
    r"\s+(?:as\s+(?=(?:the|our|my)\s)|(?:is|are)\s+(?:therefore\s+|thus\s+)?)(?:(?:the|our|my)\s+(?:final\s+|correct\s+|right\s+|best\s+)?(?:answer|result|option|choice)|correct)\b",
    re.IGNORECASE,
)

# tokens that end a turn; templates and tokenizers leave them in texts
END_TOKEN = re.compile(
    r"<[|｜][^<>\n]{1,40}?[|｜]>|</?s>|<(?:eos|bos|pad|unk|end_of_turn|start_of_turn|EOS)>|\[/?(?:INST|EOS)\]"
)
# a model that was not stopped goes on with a question of its own
NEXT_TURN = re.compile(
    r"\n\s*(?:\*\*)?(?:Q|Question|Problem|Human|User|Instruction|问题|問題|질문)(?:\s*\d+)?\s*(?:\*\*)?[:：]"
)
THOUGHT_END = re.compile(r"</(?:think|thinking|thought|reasoning|scratchpad)>", re.IGNORECASE)
TAG = re.compile(
    r"<(?P<tag>(?:final[_ -]?)?(?:answer|ans|solution))>(?P<value>(?:(?!<(?P=tag)>).)*?)(?:</(?P=tag)>|\Z)"
    r"|\[(?P<mark>(?:final )?answer)\](?P<other>.*?)(?:\[/(?P=mark)\]|\Z)|\\answer\{(?P<tex>[^{}]*)\}",
    re.IGNORECASE | re.DOTALL,
)
HASHES = re.compile(r"####(?!#)[ \t]*(?P<value>[^\n]*)")
