"""Regular expressions out of a file, matched in bounded time.

The pattern becomes an automaton whose states are all followed at once (Thompson, 1968), so there is nothing to
backtrack into: time grows with pattern times text, whatever quantifiers are nested in it. A budget bounds the whole.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

if sys.version_info >= (3, 11):
    from re import _constants as _c  # type: ignore[attr-defined]
    from re import _parser  # type: ignore[attr-defined]
else:
    import sre_constants as _c
    import sre_parse as _parser

_MOST_CHARACTERS = 20_000
_MOST_STATES = 20_000
_MOST_STEPS = 5_000_000  # some seconds
_MOST_TRIES = 1_000_000  # expressions times names; as long
_PLAIN = re.compile(r"\^?[\w\-]+(?:\\?\.[\w\-]+)*")


class PatternError(ValueError):
    """Not a regular expression, or one that cannot be matched in bounded time."""


class Pattern:
    """A regular expression that answers whether it matches a whole text, in bounded time.

    Literals, classes, groups, alternatives, quantifiers, anchors, ``\\b`` and lookahead; no back references,
    lookbehind, atomic groups, conditionals or flags.

    Raises:
        PatternError: the pattern is invalid or uses something else; in :meth:`matches`: it takes too long.
    """

    def __init__(self, pattern: str):
        self.pattern = pattern
        self._states: list[tuple[Any, tuple[int, ...]]] = [(None, ())]  # state 0 accepts
        self._looks: dict[tuple[int, int], bool] = {}
        self._known: dict[Any, frozenset[int]] = {}
        self._looks_around = self._looks_far = False
        self._steps = 0
        if len(pattern) > _MOST_CHARACTERS:
            raise PatternError(f"a pattern of {len(pattern):,} characters is longer than {_MOST_CHARACTERS:,}")
        try:
            parsed = _parser.parse(pattern)
            if parsed.state.flags & ~re.UNICODE:
                raise PatternError(f"{pattern!r} sets flags")
            self._start = self._sequence(parsed, 0)
        except (re.error, OverflowError, RecursionError) as error:
            raise PatternError(f"{pattern[:200]!r} is not a usable regular expression: {error}") from None

    def matches(self, text: str) -> bool:
        """Whether the whole text matches, as re.fullmatch has it."""
        self._looks.clear()
        states = self._follow({self._start}, text, 0)
        for i in range(len(text)):
            states = self._next(states, text, i)
        return 0 in states

    def _looks_ahead(self, start: int, text: str, position: int) -> bool:
        """Whether some stretch of the text from this position on matches from this state."""
        if (start, position) not in self._looks:
            states, i = self._follow({start}, text, position), position
            while states and 0 not in states and i < len(text):
                states = self._next(states, text, i)
                i += 1
            self._looks[start, position] = 0 in states
        return self._looks[start, position]

    def _next(self, states: frozenset[int], text: str, i: int) -> frozenset[int]:
        """The states after reading text[i]. Names begin alike and end alike, so most steps were taken before."""
        around = (text[i + 1 : i + 2], i + 2 >= len(text)) if self._looks_around else None
        key = (states, text[i], around)
        known = self._known.get(key)
        if known is None:
            following: set[int] = set()
            for state in states:
                test, after = self._states[state]
                if isinstance(test, _Character) and test.accepts(text[i]):
                    following.update(after)
            known = self._follow(following, text, i + 1)
            if not self._looks_far:
                self._known[key] = known
        return known

    def _follow(self, states: set[int], text: str, position: int) -> frozenset[int]:
        """The states reached without reading a character."""
        reached, waiting = set(), list(states)
        while waiting:
            state = waiting.pop()
            if state in reached:
                continue
            reached.add(state)
            self._steps += 1
            if self._steps > _MOST_STEPS:
                raise PatternError(f"{self.pattern[:200]!r} takes too long to match")
            test, after = self._states[state]
            if test is None or (callable(test) and test(text, position)):
                waiting.extend(after)
        return frozenset(reached)

    def _add(self, test: Any, *after: int) -> int:
        if len(self._states) >= _MOST_STATES:
            raise PatternError(f"{self.pattern[:200]!r} repeats too much")
        self._states.append((test, after))
        return len(self._states) - 1

    def _sequence(self, items: Iterable[tuple[Any, Any]], after: int) -> int:
        for operation, argument in reversed(list(items)):
            after = self._item(operation, argument, after)
        return after

    def _item(self, operation: Any, argument: Any, after: int) -> int:
        """The state from which this item leads to ``after``."""
        if operation in (_c.LITERAL, _c.NOT_LITERAL, _c.ANY, _c.IN):
            return self._add(_Character(operation, argument), after)
        if operation is _c.BRANCH:
            return self._add(None, *[self._sequence(branch, after) for branch in argument[1]])
        if operation is _c.SUBPATTERN and not argument[1] and not argument[2]:
            return self._sequence(argument[3], after)
        if operation in (_c.MAX_REPEAT, _c.MIN_REPEAT):
            least, most, items = argument
            return self._repeat(least, most, items, after)
        if operation is _c.AT and argument in _ANCHORS:
            self._looks_around = True
            return self._add(_ANCHORS[argument], after)
        if operation in (_c.ASSERT, _c.ASSERT_NOT) and argument[0] == 1:
            self._looks_far = True
            inner, wanted = self._sequence(argument[1], 0), operation is _c.ASSERT
            return self._add(lambda text, i: self._looks_ahead(inner, text, i) == wanted, after)
        raise PatternError(f"{self.pattern[:200]!r} uses {str(operation).lower()}, which has no bound on its time")

    def _repeat(self, least: int, most: int, items: Any, after: int) -> int:
        if most is _c.MAXREPEAT:
            loop = self._add(None)
            self._states[loop] = (None, (self._sequence(items, loop), after))
            after = loop
        else:
            out = after
            for _ in range(int(most) - least):
                after = self._add(None, self._sequence(items, after), out)
        for _ in range(least):
            before = len(self._states)
            after = self._sequence(items, after)
            if len(self._states) == before:
                break  # nothing to repeat
        return after


class _Character:
    """A test of one character."""

    def __init__(self, operation: Any, argument: Any):
        self._operation, self._argument = operation, argument
        self._known: dict[str, bool] = {}

    def accepts(self, character: str) -> bool:
        known = self._known.get(character)
        if known is None:
            known = self._known[character] = self._test(character)
        return known

    def _test(self, character: str) -> bool:
        code = ord(character)
        if self._operation is _c.LITERAL:
            return code == self._argument
        if self._operation is _c.NOT_LITERAL:
            return code != self._argument
        if self._operation is _c.ANY:
            return character != "\n"
        items = list(self._argument)
        negated = bool(items) and items[0][0] is _c.NEGATE
        return negated != any(_in(code, character, *item) for item in items[negated:])


def _in(code: int, character: str, operation: Any, argument: Any) -> bool:
    if operation is _c.LITERAL:
        return code == argument
    if operation is _c.RANGE:
        return argument[0] <= code <= argument[1]
    if operation is _c.CATEGORY and argument in _CATEGORIES:
        return _CATEGORIES[argument](character)
    raise PatternError(f"a character class with {operation} is not supported")


def _word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _boundary(text: str, i: int) -> bool:
    return (i > 0 and _word(text[i - 1])) != (i < len(text) and _word(text[i]))


_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    _c.CATEGORY_DIGIT: str.isdecimal,
    _c.CATEGORY_NOT_DIGIT: lambda character: not character.isdecimal(),
    _c.CATEGORY_WORD: _word,
    _c.CATEGORY_NOT_WORD: lambda character: not _word(character),
    _c.CATEGORY_SPACE: str.isspace,
    _c.CATEGORY_NOT_SPACE: lambda character: not character.isspace(),
}
_ANCHORS: dict[Any, Callable[[str, int], bool]] = {
    _c.AT_BEGINNING: lambda text, i: i == 0,
    _c.AT_BEGINNING_STRING: lambda text, i: i == 0,
    _c.AT_END: lambda text, i: i == len(text) or (i == len(text) - 1 and text[i] == "\n"),
    _c.AT_END_STRING: lambda text, i: i == len(text),
    _c.AT_BOUNDARY: _boundary,
    _c.AT_NON_BOUNDARY: lambda text, i: not _boundary(text, i),
}


def first_match(keys: Iterable[str]) -> Callable[[str], int | None]:
    """For a name the index of the first of ``keys`` that fits it, or None, as PEFT reads rank_pattern.

    A key is a regular expression for a name or for its last components. Keys that are names themselves are looked up,
    so that a file with a key for each of its layers takes no time to match.

    Raises:
        PatternError: see :class:`Pattern`; and in the function, where there are too many expressions for the names.
    """
    whole: dict[str, int] = {}
    ends: dict[str, int] = {}
    expressions: list[tuple[int, Pattern]] = []
    for index, key in enumerate(keys):
        if _PLAIN.fullmatch(key):
            plain = key.replace("\\.", ".")
            table, plain = (whole, plain[1:]) if plain.startswith("^") else (ends, plain)
            table.setdefault(plain, index)
        else:
            expressions.append((index, Pattern(rf"(?:.*\.)?(?:{key})")))
    tried = 0

    def find(name: str) -> int | None:
        nonlocal tried
        components = name.split(".")
        found = [whole[name]] if name in whole else []
        found += [ends[end] for i in range(len(components)) if (end := ".".join(components[i:])) in ends]
        first = min(found, default=None)
        for index, pattern in expressions:
            if first is not None and index > first:
                break
            tried += 1
            if tried > _MOST_TRIES:
                raise PatternError(f"{len(expressions):,} regular expressions are too many for the layers they are for")
            if pattern.matches(name):
                return index
        return first

    return find


def suffix_matcher(key: str) -> Callable[[str], bool]:
    """Whether one key fits a name, as :func:`first_match` reads keys."""
    find = first_match((key,))
    return lambda name: find(name) is not None
