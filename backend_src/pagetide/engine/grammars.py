"""From what a client calls a guide to the grammar that llguidance takes: Lark text with its extensions.

https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from pagetide.types import Guide, RequestError

# Any number of blanks between JSON's parts lets small models write nothing else.
_JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_ANY_TEXT = r"/(.|\n)*/"


def grammar_of(guide: Guide) -> str:
    """The guide as llguidance's grammar, not yet checked.

    Raises RequestError where its form is wrong already.
    """
    try:
        return _GRAMMARS[guide.kind](guide.text)
    except RequestError:
        raise
    except RecursionError:
        raise RequestError(
            f"guided_decoding_guide is no valid {guide.kind}: it is nested too deeply"
        ) from None
    except Exception as error:
        # The library's parsers raise errors of many kinds for a text that they do not understand.
        raise RequestError(
            f"guided_decoding_guide is no valid {guide.kind}: {first_line(str(error))}"
        ) from None


def first_line(message: str) -> str:
    """What the library says, as part of one sentence: without its state, and without the grammar that we
    have made.
    """
    told = re.split(r"\n<state>|\n\s*\d+ \| ", message)[0]
    return " ".join(re.sub(r"^at \d+\(\d+\): ", "", told).split())[:300]


def _json_schema(text: str) -> str:
    schema = json.loads(text)
    if schema is False:
        raise RequestError("guided_decoding_guide is false: this grammar accepts nothing")
    return "start: " + _inline_json({} if schema is True else schema)


def _inline_json(schema: Any) -> str:
    if not isinstance(schema, dict):
        raise RequestError(
            f"guided_decoding_guide has a JSON schema that is a {type(schema).__name__}, must be an object"
        )
    return "%json " + json.dumps({**schema, "x-guidance": _JSON_OPTIONS})


def _choice(text: str) -> str:
    return "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(option) for option in json.loads(text))


def _regex(text: str) -> str:
    from llguidance import LLMatcher  # only guided requests need it

    return LLMatcher.grammar_from_regex(text)


def _ebnf(text: str) -> str:
    """GBNF, llama.cpp's form of EBNF, or Lark itself."""
    from llguidance.gbnf_to_lark import any_to_lark

    if re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", text):
        raise RequestError("guided_decoding_guide is no valid ebnf_grammar: it has control characters")
    # The converter looks at the rest of the text again for each empty line.
    return any_to_lark(re.sub(r"\n\s*\n", "\n", text))


# -- structural tags ---------------------------------------------------------------------------------------


class _Rules:
    """The rules of a structural tag's grammar: an XGrammar `format`, which is a tree of parts."""

    def __init__(self) -> None:
        self._rules: list[str] = []

    def text(self, root: str) -> str:
        return "\n".join([f"start: {root}", *self._rules])

    def add(self, body: str, attributes: str = "", is_terminal: bool = False) -> str:
        name = f"{'T' if is_terminal else 'r'}{len(self._rules)}"
        self._rules.append(f"{name}{attributes}: {body}")
        return name

    def part(self, form: Any) -> str:
        """The name of a rule for one part of the tree."""
        kind = form.get("type") if isinstance(form, dict) else None
        parts: dict[str, Callable[[dict[str, Any]], str]] = {
            "const_string": lambda f: _literal(f["value"]),
            "json_schema": lambda f: _inline_json(f["json_schema"]),
            "regex": lambda f: f"/{_without_bare_slashes(f['pattern'])}/",
            "any_text": lambda f: self.add(_ANY_TEXT, is_terminal=True),
            "sequence": lambda f: " ".join(self.part(one) for one in _not_empty(f["elements"])),
            "or": lambda f: " | ".join(self.part(one) for one in _not_empty(f["elements"])),
            "tag": self._tag,
            "triggered_tags": self._triggered_tags,
            "tags_with_separator": self._tags_with_separator,
        }
        if not isinstance(kind, str) or kind not in parts:
            raise RequestError(
                f"guided_decoding_guide has a part of type {kind!r}, must be one of {', '.join(parts)}"
            )
        return self.add(parts[kind](form))

    def _tag(self, form: dict[str, Any]) -> str:
        if form["content"].get("type") == "any_text":
            # Text up to the tag's end, as soon as that comes.
            text_and_end = self.add(f"{_ANY_TEXT} {_literal(form['end'])}", "[lazy]")
            return f"{_literal(form['begin'])} {text_and_end}"
        return f"{_literal(form['begin'])} {self.part(form['content'])} {_literal(form['end'])}"

    def _triggered_tags(self, form: dict[str, Any]) -> str:
        """Text in which each trigger begins one of the tags."""
        triggers, at_least_one = _not_empty(form["triggers"]), form.get("at_least_one", False)
        once = form.get("stop_after_first", False)
        bodies = []
        for tag in _not_empty(form["tags"]):
            trigger = next((t for t in triggers if tag["begin"].startswith(t)), None)
            if trigger is None:
                raise RequestError(
                    f"guided_decoding_guide has a tag that begins with {tag['begin']!r}, and none "
                    "of its triggers does"
                )
            head = self.add(f"{_ANY_TEXT} {_literal(trigger)}", "[lazy]")
            bodies.append(
                f"{head} {_literal(tag['begin'][len(trigger) :])} {self.part(tag['content'])} "
                f"{_literal(tag['end'])}"
            )
        one = self.add(" | ".join(bodies))
        end = self.add(_ANY_TEXT, is_terminal=True)
        if once:
            return one if at_least_one else f"{one} | {end}"
        return f"{one}{'+' if at_least_one else '*'} {end}"

    def _tags_with_separator(self, form: dict[str, Any]) -> str:
        one = self.add(" | ".join(self.part({**tag, "type": "tag"}) for tag in _not_empty(form["tags"])))
        if form.get("stop_after_first", False):
            return one if form.get("at_least_one", False) else f"{one}?"
        several = f"{one} ({_literal(form['separator'])} {one})*"
        return several if form.get("at_least_one", False) else f"({several})?"


def _without_bare_slashes(pattern: str) -> str:
    """A regular expression as Lark writes it, between slashes."""
    return re.sub(r"\\.|/", lambda found: r"\/" if found[0] == "/" else found[0], pattern, flags=re.DOTALL)


def _literal(text: str) -> str:
    if not isinstance(text, str):
        raise RequestError(f"guided_decoding_guide has {text!r} where a text must be")
    return json.dumps(text) if text else ""


def _not_empty(items: Any) -> list[Any]:
    if not isinstance(items, list) or not items:
        raise RequestError(
            "guided_decoding_guide has an empty list where a structural tag needs at least one element"
        )
    return items


def _older_form(tag: dict[str, Any]) -> dict[str, Any]:
    """vLLM's and XGrammar's first form: {"structures": [{"begin", "schema", "end"}], "triggers": [...]}."""
    tags = [
        {"begin": s["begin"], "content": {"type": "json_schema", "json_schema": s["schema"]}, "end": s["end"]}
        for s in tag["structures"]
    ]
    return {"type": "triggered_tags", "triggers": tag["triggers"], "tags": tags}


def _structural_tag(text: str) -> str:
    tag = json.loads(text)
    if "format" not in tag and not {"structures", "triggers"} <= tag.keys():
        raise RequestError(
            "guided_decoding_guide is no valid structural_tag: it needs format, or structures and triggers"
        )
    rules = _Rules()
    try:
        return rules.text(rules.part(tag["format"] if "format" in tag else _older_form(tag)))
    except (KeyError, TypeError, AttributeError) as error:
        raise RequestError(
            f"guided_decoding_guide is no valid structural_tag: {error!r} is missing or of the wrong type"
        ) from None


_GRAMMARS: dict[str, Callable[[str], str]] = {
    "json": lambda text: "start: " + _inline_json({"type": "object"}),
    "json_schema": _json_schema,
    "regex": _regex,
    "ebnf_grammar": _ebnf,
    "choice": _choice,
    "structural_tag": _structural_tag,
}
