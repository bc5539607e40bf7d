"""Finds the functions of a C++ or CUDA source: where, how long, how many parameters, how deep.

No compiler is asked: comments, strings and preprocessor lines are blanked, and what stands before
each brace says what the brace opens. Enough for budgets; what it takes for no function is not
counted.
"""

import re
from dataclasses import dataclass

controls = ("if", "for", "while", "switch", "do", "try", "catch", "else")
opening, closing = "([{<", ")]}>"


@dataclass
class Function:
    name: str
    line: int
    lines: int
    place: str  # host, device or global
    parameters: int
    nesting: int


def blanked(text: str) -> str:
    """The text with comments, literals and preprocessor lines made of spaces; same length."""
    pattern = re.compile(
        r"//[^\n]*|/\*.*?\*/"
        r'|R"(?P<tag>[^(]*)\(.*?\)(?P=tag)"'
        r'|"(?:\\.|[^"\\\n])*"'
        r"|(?<![0-9A-Za-z_])'(?:\\.|[^'\\\n])+'"
        r"|^[ \t]*#(?:\\\n|[^\n])*",
        re.DOTALL | re.MULTILINE,
    )
    return pattern.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def count_items(text: str) -> int:
    """The items of a list without its brackets, split at the commas of the outermost level."""
    if not text.strip() or text.strip() == "void":
        return 0
    level, items = 0, 1
    for at, letter in enumerate(text):
        if letter in opening:
            level += 1
        elif letter in closing and text[at - 1] != "-":
            level -= 1
        elif letter == "," and level == 0:
            items += 1
    return items


def matching(text: str, start: int, pair: str) -> int:
    """Where the bracket that opens at `start` closes."""
    level = 0
    for at in range(start, len(text)):
        if text[at] == pair[0]:
            level += 1
        elif text[at] == pair[1]:
            level -= 1
            if level == 0:
                return at
    return len(text) - 1


def header_before(text: str, brace: int) -> tuple[int, str]:
    """Where the statement that ends at a brace begins, and its words."""
    start = max(text.rfind(mark, 0, brace) for mark in ";{}") + 1
    header = text[start:brace]
    label = re.match(r"\s*(?:public|private|protected)\s*:(?!:)", header)
    if label:
        start += label.end()
        header = header[label.end() :]
    return start + len(header) - len(header.lstrip()), header.strip()


def parameter_list(header: str) -> str | None:
    """What stands between the brackets of a function's parameters; None for no function."""
    words = re.sub(
        r"\b(?:__launch_bounds__|__attribute__|alignas|noexcept|decltype|requires)\s*\(",
        "§(",
        header,
    )
    for match in re.finditer(r"([\w~\]]|operator\s*[^\s\w(]+|operator\s*\(\))\s*\(", words):
        return words[match.end() : matching(words, match.end() - 1, "()")]
    return None


def is_function(header: str) -> bool:
    if re.match(
        r"(?:template\s*<.*>\s*)?(?:inline\s+)?(?:namespace|extern\b\s*$)", header, re.DOTALL
    ):
        return False
    if re.match(
        r"(?:template\s*<.*>\s*)?(?:typedef\s+)?(?:struct|class|enum|union|concept)\b",
        header,
        re.DOTALL,
    ):
        return False
    if "=" in re.sub(r"operator\s*[=!<>]*=|[=!<>]=|\([^()]*\)|<[^<>]*>", "", header):
        return False
    return parameter_list(header) is not None


def place_of(header: str) -> str:
    if "__global__" in header:
        return "global"
    return "device" if "__device__" in header else "host"


def name_of(header: str) -> str:
    words = re.sub(r"__launch_bounds__\s*\([^)]*\)", "", header)
    found = re.search(r"(operator\s*[^\s\w(]+|operator\s*\(\)|[\w~:]+)\s*\(", words)
    return found[1] if found else "a function"


def deepest(body: str) -> int:
    """How deep the control blocks of a body lie within each other."""
    worst, stack = 0, []
    for match in re.finditer(r"[{}]", body):
        if match[0] == "}":
            stack and stack.pop()
            continue
        header = header_before(body, match.start())[1]
        is_control = re.match(rf"(?:{'|'.join(controls)})\b", header) is not None
        stack.append(is_control)
        worst = max(worst, sum(stack))
    return worst


def functions_of(text: str) -> list[Function]:
    """Every function that the text defines, in order."""
    code = blanked(text)
    found = []
    at = 0
    while (brace := code.find("{", at)) >= 0:
        start, header = header_before(code, brace)
        at = brace + 1
        if not is_function(header):
            continue
        body = body_brace(code, brace, header)
        end = matching(code, body, "{}")
        first, last = code.count("\n", 0, start) + 1, code.count("\n", 0, end) + 1
        found.append(
            Function(
                name=name_of(without_template(header)),
                line=first,
                lines=last - first + 1,
                place=place_of(header),
                parameters=count_items(parameter_list(without_template(header)) or ""),
                nesting=deepest(code[body + 1 : end]),
            )
        )
        at = end + 1
    return found


def body_brace(code: str, brace: int, header: str) -> int:
    """The brace that opens the body: after a constructor's members initialised in braces."""
    if not re.search(r"\)\s*(?:noexcept\s*)?:(?!:)", header):
        return brace
    while re.search(r"[\w>]\s*$", code[:brace]) and not re.search(r"\)\s*$", code[:brace]):
        after = matching(code, brace, "{}") + 1
        brace = code.find("{", after)
    return brace


def without_template(header: str) -> str:
    """The header after its template<...> and requires clauses."""
    while found := re.match(r"template\s*<", header):
        header = header[matching(header, found.end() - 1, "<>") + 1 :].lstrip()
    return header


def template_lists_of(text: str) -> list[tuple[int, int]]:
    """The line and the number of parameters of each template<...>."""
    code = blanked(text)
    lists = []
    for match in re.finditer(r"\btemplate\s*<", code):
        end = matching(code, match.end() - 1, "<>")
        lists.append((code.count("\n", 0, match.start()) + 1, count_items(code[match.end() : end])))
    return lists
