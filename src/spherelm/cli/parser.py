"""A command's flags, read off its signature and docstring: how they are parsed, what --help says, and what is refused.

A command is a function. A parameter is a flag, or a word by its place where it is annotated with `POSITIONAL`. One
that is annotated with `Fields` is the mapping of the given flags, each of which sets a field of a dataclass.
"""

from __future__ import annotations

import argparse
import ast
import functools
import inspect
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import spherelm
from spherelm.errors import UserError, nearest

Command = Callable[..., None]

POSITIONAL = "positional"
"""Stands in the annotation of a parameter that is given by its place."""

BARE = "bare"
"""Stands in the annotation of a flag that may be given without its value, which is the empty text then."""

COMMA, ASSIGNMENT, NOWHERE = ",", r",(?=[\w.]+=)", "(?!)"
"""Where a word of a list is split: of names or numbers, of FIELD=VALUE, of free text; two are annotations."""


class Needs:
    """Stands in a flag's annotation and says what it needs in order to act.

    beside: flags, one of which must be given: a name, or a name and its value such as "--strategy hybrid".
    without: flags, written in the same way, that leave this one nothing to do unless one of `beside` is given.
    """

    def __init__(self, *beside: str, without: Sequence[str] = ()) -> None:
        self.beside, self.without = beside, tuple(without)

    def complaint(self, flag: str, given: Mapping[str, Any]) -> str | None:
        """Why `flag` cannot act beside the flags that are `given`; `None` if it can."""
        if any(holds(wanted, given) for wanted in self.beside):
            return None
        blocking = [other for other in self.without if holds(other, given)]
        if blocking:
            more = f", or give {' or '.join(self.beside)} too" if self.beside else ""
            return f"{flag} has no effect with {blocking[0]}: leave one of them out{more}"
        if self.without:
            return None
        return f"{flag} acts only with {' or '.join(self.beside)}: give both, or leave {flag} out"


def holds(wanted: str, given: Mapping[str, Any]) -> bool:
    """Whether the flag `wanted`, with its value if it names one, is among those that are `given`."""
    flag, _, value = wanted.partition(" ")
    if flag not in given or not value:
        return flag in given
    try:
        return float(given[flag]) == float(value)
    except (TypeError, ValueError):
        return str(given[flag]) == value


class Fields:
    """Stands in a parameter's annotation: flags that set the fields `names` of a dataclass, as it documents them.

    owner: the dataclass by its whole name, since torch takes a second to import. title: of the flags in --help.
    left_out: what the fields are without their flags, where that is not their default. needs: of a flag, by its field.
    called: the flag's name, where it is not the field's. lists: the fields are texts of names by commas.
    """

    def __init__(
        self,
        owner: str,
        *names: str,
        title: str = "",
        left_out: str = "",
        needs: Mapping[str, Needs] = {},
        called: Mapping[str, str] = {},
        lists: bool = False,
    ) -> None:
        self.owner, self.names, self.title, self.left_out = owner, names, title, left_out
        self.needs, self.called, self.lists = needs, called, lists

    def flags(self, parameter: str) -> list[Flag]:
        """The flags, for the command's `parameter`."""
        found = []
        for name in self.names:
            about, default, annotation = read_fields(self.owner)[name]
            kind, is_list = plain_kind(eval(ast.unparse(annotation), {"__builtins__": {}}, TYPES))
            shown = self.left_out or shown_default(default)
            flag, needs = flag_name(self.called.get(name, name)), self.needs.get(name)
            found.append(Flag(flag, parameter, kind, is_list or self.lists, about, shown, needs, name, self.title))
        return found


@dataclass(frozen=True)
class Flag:
    """A flag, or, where `notes` has `POSITIONAL`, a word by its place.

    parameter: of the command, which takes the value; or, under the key `field`, a mapping of values. kind:
    of a value, or of each of a list: int, float, str, bool, Path or a `Literal`. default: as --help shows it. notes:
    see `POSITIONAL` and those below it.
    """

    name: str
    parameter: str
    kind: Any
    is_list: bool
    about: str
    default: str = ""
    needs: Needs | None = None
    field: str | None = None
    title: str = ""
    required: bool = False
    notes: tuple[Any, ...] = ()

    @property
    def is_switch(self) -> bool:
        """Whether it has no value."""
        return self.kind is bool

    @property
    def metavar(self) -> str:
        """The placeholder of a value in --help."""
        if get_origin(self.kind) is Literal:
            value = "{" + ",".join(map(str, get_args(self.kind))) + "}"
        else:
            value = METAVARS.get(self.name) or {int: "N", float: "X", Path: "FILE"}[self.kind]
        spaced = self.kind is Path or self.pattern == NOWHERE
        return value if not self.is_list else f"{value} ..." if spaced else f"{value},..."

    @property
    def pattern(self) -> str:
        """Where a word of a list is taken apart."""
        return next((note for note in self.notes if note in (ASSIGNMENT, NOWHERE)), COMMA)

    def words(self, word: str) -> list[Any]:
        """The values in one word of a list."""
        if self.pattern == NOWHERE or (self.kind is Path and Path(word).exists()):
            return [self.value(word)]
        parts = re.split(self.pattern, word)
        parts = [part.strip() for part in parts] if self.pattern == COMMA else parts
        return [self.value(part) for part in parts if part]

    def value(self, word: str) -> Any:
        """A word as a value. Raises `ArgumentTypeError` for one that cannot be."""
        known = get_args(self.kind)
        if known and word not in known:
            raise argparse.ArgumentTypeError(f"{word!r} is not one of {', '.join(known)}{nearest(word, known)}")
        try:
            return word if known else self.kind(word)
        except ValueError:
            kind = "whole number" if self.kind is int else "number"
            raise argparse.ArgumentTypeError(f"{word!r} is not a valid {kind}") from None

    def add_to(self, parser: Any) -> None:
        """Have `parser`, or a group of its flags, read this one. What is not given is not in the namespace."""
        needed = " (required)" if self.required and POSITIONAL not in self.notes else ""
        about = self.about + (f" (default: {self.default})" if self.default else needed)
        options: dict[str, Any] = {"help": about.replace("%", "%%"), "default": argparse.SUPPRESS}
        if POSITIONAL in self.notes:
            read = {"nargs": "+", "type": self.kind} if self.is_list else {"type": self.value}
            parser.add_argument(self.name, metavar=METAVARS[self.parameter], **(options | read))
            return
        options |= {"dest": self.name}
        if self.is_switch:
            parser.add_argument(self.name, action="store_true", **options)
            return
        options |= {"metavar": self.metavar, "required": self.required, "action": Once, "type": self.value}
        if self.is_list:
            options |= {"action": Added, "type": self.words, "nargs": "+"}
        elif BARE in self.notes:
            options |= {"nargs": "?", "const": ""}
        parser.add_argument(self.name, **options)


METAVARS = {
    **dict.fromkeys(("runs", "run"), "RUN"), "directories": "DIR", "ckpt": "CKPT", "repo": "USER/NAME",
    "source": "SOURCE", "out": "OUT", "what": "WHAT",
    **dict.fromkeys(("--out", "--task-data"), "DIR"), **dict.fromkeys(("--data", "--test"), "DATA"),
    **dict.fromkeys(("--preset", "--recipe", "--sizes", "--contenders", "--tasks", "--eval-tasks", "--log-to"), "NAME"),
    "--set": "FIELD=VALUE", "--vary": "FIELD=VALUE,VALUE", "--resume": "RUN", "--init-from": "RUN", "--device": "NAME",
    **dict.fromkeys(("--prompt", "--sentence", "--stop"), "TEXT"), "--tokenizer": "NAME", "--field": "PATH.IN.ROW",
    **dict.fromkeys(("--hf", "--hf-config", "--hf-split", "--license"), "NAME"), "--shape": "L,D,H,T,B,V",
    "--pattern": "LETTERS", "--rope-scaling": "linear:X|yarn:X",
}  # fmt: skip
"""Placeholders in --help for values of flags and positional arguments, where the type is not enough."""


class Once(argparse.Action):
    """Of a flag that is no list."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        """Keep the value. Raises `UserError` where there is one."""
        if hasattr(namespace, self.dest):
            before = getattr(namespace, self.dest)
            raise UserError(f"{option} is given twice, with {before} and with {values}: give it once")
        setattr(namespace, self.dest, values)


class Added(argparse.Action):
    """Of a list: the values of all occurrences of the flag."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        """Keep the values beside those that there are. Raises `UserError` where nothing is listed."""
        listed = tuple(itertools.chain(*values))
        if not listed:
            raise UserError(f"{option} is empty: name at least one, or leave it out")
        setattr(namespace, self.dest, (*getattr(namespace, self.dest, ()), *listed))


class Layout(argparse.RawDescriptionHelpFormatter):
    """Lists are shown as they are written."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return str(action.metavar) if isinstance(action, Added) else super()._format_args(action, default_metavar)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Raise `UserError`."""
        raise UserError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


def parser_of(command: Command, name: str) -> Parser:
    """The parser of the words after the command's name."""
    prog, flags = f"spherelm {name}", flags_of(command).values()
    wanted = [METAVARS[flag.parameter] if POSITIONAL in flag.notes else f"{flag.name} {flag.metavar}"
              for flag in flags if flag.required]  # fmt: skip
    usage = " ".join([prog, *wanted, *(["[flags]"] if len(wanted) < len(flags) else [])])
    about = inspect.getdoc(command) or ""
    parser = Parser(prog, usage, about.partition("\n\nArgs:")[0], formatter_class=Layout, allow_abbrev=False)
    groups: dict[str, Any] = {"": parser}
    for flag in flags:
        if flag.title not in groups:
            groups[flag.title] = parser.add_argument_group(flag.title)
        flag.add_to(groups[flag.title])
    return parser


def parse(command: Command, name: str, words: Sequence[str]) -> dict[str, Any]:
    """The arguments, from the words after the command. `UserError` for what cannot be read or cannot act."""
    flags = flags_of(command)
    words = [key_of(word) + word[len(key_of(word)) :] if word.startswith("--") else word for word in words]
    refuse_unknown(words, flags, name)
    given = vars(parser_of(command, name).parse_args(words))
    refuse_idle(given, flags)
    arguments: dict[str, Any] = {flag.parameter: {} for flag in flags.values() if flag.field}
    for flag in flags.values():
        if flag.name in given:
            value = tuple(given[flag.name]) if flag.is_list else given[flag.name]
            place = arguments[flag.parameter] if flag.field else arguments
            place[flag.field or flag.parameter] = value
    return arguments


def key_of(word: str) -> str:
    """The flag in a word that may hold its value too; underscores may stand for hyphens."""
    return word.partition("=")[0].replace("_", "-")


def refuse_idle(given: Mapping[str, Any], flags: Mapping[str, Flag]) -> None:
    """Raise `UserError` for a flag that cannot act beside the others; a field that is --set counts as its flag."""
    found, written = dict(given), {flag: flag for flag in given}
    for field, _, value in (word.partition("=") for word in given.get("--set", ())):
        found.setdefault(flag_name(field), value)
        written.setdefault(flag_name(field), f"--set {field}")
    for name in found:
        needs = flags[name].needs if name in flags else None
        if needs and (complaint := needs.complaint(written[name], found)):
            raise UserError(complaint)


def refuse_unknown(words: Sequence[str], flags: Mapping[str, Flag], name: str) -> None:
    """Raise `UserError` for what is written as a flag and is none of the command `name`, with the nearest that is."""
    for word in words[: words.index("--") if "--" in words else None]:
        key = key_of(word)
        if not re.match("--[a-z]", key) or key in flags:
            continue
        meant = fields_by(flags) | {flag: flag for flag in flags}
        near = nearest(key, meant, "{}")
        advice = f"did you mean {meant[near]}?" if near else f"see spherelm {name} --help"
        raise UserError(f"{name} has no flag {key}: {advice}")


def fields_by(flags: Mapping[str, Flag]) -> dict[str, str]:
    """How each field of a run is given where one of `flags` takes fields, by the flag that it might be taken for."""
    takes = next((flag for flag in ("--set", "--vary") if flag in flags), None)
    if takes is None:
        return {}
    from spherelm.models import ARMS
    from spherelm.recipes.overrides import fields_of

    return {flag_name(field): f"{takes} {field}=VALUE" for arm in ARMS for field in sorted(fields_of(arm))}


@functools.cache
def flags_of(command: Command) -> dict[str, Flag]:
    """Every flag of `command` by its name, and every word by its place."""
    parameters, hints = inspect.signature(command).parameters, get_type_hints(command, include_extras=True)
    said = documented((inspect.getdoc(command) or "").partition("Args:")[2], parameters)
    found: list[Flag] = []
    for name, parameter in parameters.items():
        kind, notes = unfold(hints[name])
        own = [note for note in notes if isinstance(note, Fields)]
        if own:
            found += itertools.chain(*(fields.flags(name) for fields in own))
            continue
        needs = next((note for note in notes if isinstance(note, Needs)), None)
        shown, required = shown_default(parameter.default), parameter.default is inspect.Parameter.empty
        flag = name if POSITIONAL in notes else flag_name(name)
        found.append(Flag(flag, name, *plain_kind(kind), said[name], shown, needs, required=required, notes=notes))
    return {flag.name: flag for flag in found}


def flag_name(parameter: str) -> str:
    """The flag of a parameter, whose name may end in an underscore where it would be one of Python's own."""
    return "--" + parameter.rstrip("_").replace("_", "-")


def unfold(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type and the notes with which it is annotated."""
    return (hint.__origin__, hint.__metadata__) if get_origin(hint) is Annotated else (hint, ())


def plain_kind(hint: Any) -> tuple[Any, bool]:
    """The type of a value, or of each value of a list, and whether it is a list; without `None`."""
    kind = unfold(hint)[0]
    if type(None) in get_args(kind):
        return plain_kind(next(one for one in get_args(kind) if one is not type(None)))
    if get_origin(kind) is tuple:
        return plain_kind(get_args(kind)[0])[0], True
    return kind, False


def shown_default(default: Any) -> str:
    """The default as `--help` shows it; "" for one that needs no mention."""
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    return "" if default in (None, "", inspect.Parameter.empty) or isinstance(default, bool) else str(default)


def about(documented: object) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join((inspect.getdoc(documented) or "").partition("\n\n")[0].split())


def documented(text: str, names: Sequence[str] | Mapping[str, Any]) -> dict[str, str]:
    """What a docstring says of each of `names`, fields or parameters: from "name:" up to the next name."""
    one = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    parts = re.split(rf"(?:^|(?<=\s))((?:{one})(?:, (?:{one}))*):\s", text)
    return {
        name: " ".join(body.partition("\n\n")[0].split())
        for group, body in zip(parts[1::2], parts[2::2], strict=True)
        for name in group.split(", ")
    }


@functools.cache
def read_fields(owner: str) -> dict[str, tuple[str, Any, Any]]:
    """For each field of the dataclass `owner`: its description, its default (`None` if not a plain value) and its type.

    They are read off the source: to import it would import torch, and help should be there at once.
    """
    module, _, name = owner.rpartition(".")
    file = Path(spherelm.__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    lines = {line.target.id: line for line in body.body
             if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)}  # fmt: skip
    said = documented(ast.get_docstring(body) or "", lines)
    return {field: (said.get(field, ""), plain_value(line.value), line.annotation) for field, line in lines.items()}


def plain_value(value: ast.expr | None) -> Any:
    """The value of an expression of numbers, texts and the like; `None` for any other."""
    try:
        return None if value is None else ast.literal_eval(value)
    except ValueError:
        return None


TYPES = {
    **dict.fromkeys(("int", "PositiveInt", "NonNegativeInt"), int),
    **dict.fromkeys(("float", "PositiveFloat", "NonNegativeFloat", "BelowOne"), float),
    **{"str": str, "bool": bool, "tuple": tuple, "Path": Path, "Literal": Literal, "Annotated": Annotated},
    "Field": lambda **bounds: None,
}
"""The names in the types of fields that are flags."""
