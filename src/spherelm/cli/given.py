"""The flags of a command as they were given: lists add up, any other flag is given once, and what cannot act is refused.

What a flag needs in order to act is declared beside it, by `Needs`.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from tyro.conf import Positional, UseAppendAction, arg

import spherelm
from spherelm.errors import UserError


class Needs:
    """Stands in a flag's annotation and says what it needs in order to act.

    beside: flags, one of which must be given: a name, or a name and its value such as "--strategy hybrid".
    without: flags, written in the same way, that leave this one nothing to do unless one of `beside` is given.
    """

    def __init__(self, *beside: str, without: Sequence[str] = ()) -> None:
        self.beside, self.without = beside, tuple(without)

    def complaint(self, flag: str, found: Mapping[str, Sequence[str]]) -> str | None:
        """Why `flag` cannot act beside the flags that were `found`; `None` if it can."""
        if any(holds(wanted, found) for wanted in self.beside):
            return None
        blocking = [other for other in self.without if holds(other, found)]
        if blocking:
            more = f", or give {' or '.join(self.beside)} too" if self.beside else ""
            return f"{flag} does nothing beside {blocking[0]}: leave one of them out{more}"
        if self.without:
            return None
        return f"{flag} acts only with {' or '.join(self.beside)}: give both, or leave {flag} out"


@dataclasses.dataclass(frozen=True)
class Sets:
    """Stands in a flag's annotation: the flag sets a field of a dataclass, which says what the field is and its default.

    owner: the dataclass by its whole name, since it takes a second to import what needs torch. field: `None` where it is called
    as the flag is. left_out: what the field is without the flag, where that is not the default.
    """

    owner: str
    field: str | None = None
    left_out: str | None = None

    def shown(self, parameter: str, own: Any) -> Any:
        """What `--help` says of the flag of this parameter, whose own default comes before the field's."""
        field = self.field or parameter
        help_text, default = read_fields(self.owner)[field]
        said = "(required)" if own is inspect.Parameter.empty else self.left_out or said_default(own or default)
        return arg(help=help_text, help_behavior_hint=said)


@functools.cache
def read_fields(owner: str) -> dict[str, tuple[str, Any]]:
    """What the dataclass `owner` says of each field, and the field's default (`None` for what is no plain value).

    They are read off the source: to import it would import torch, and help should be there at once.
    """
    import docstring_parser

    module, _, name = owner.rpartition(".")
    file = Path(spherelm.__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    documented = docstring_parser.parse(ast.get_docstring(body) or "").params
    said = {one.arg_name: " ".join((one.description or "").split()) for one in documented}
    lines = [line for line in body.body if isinstance(line, ast.AnnAssign)]
    named = {line.target.id: line.value for line in lines if isinstance(line.target, ast.Name)}
    return {name: (said[name], plain(value)) for name, value in named.items() if name in said}


def plain(value: ast.expr | None) -> Any:
    """The value of an expression of numbers, texts and the like; `None` for any other."""
    try:
        return None if value is None else ast.literal_eval(value)
    except ValueError:
        return None


def said_default(default: Any) -> str:
    """What `--help` says of a default; nothing of one that says nothing."""
    if isinstance(default, tuple):
        default = " ".join(map(str, default))
    nothing = default in (None, "", dataclasses.MISSING) or isinstance(default, bool)
    return "" if nothing else f"(default: {default})"


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a flag is: whether it takes a list, or no value at all, and what it needs."""

    is_list: bool
    is_switch: bool
    needs: Needs | None


def holds(wanted: str, found: Mapping[str, Sequence[str]]) -> bool:
    """Whether the flag `wanted`, with its value if it names one, is among those that were `found`."""
    flag, _, value = wanted.partition(" ")
    return flag in found and (not value or same(found[flag][-1:], value))


def same(values: Sequence[str], wanted: str) -> bool:
    """Whether a flag's value is `wanted`, as text or as a number."""
    try:
        return [float(value) for value in values] == [float(wanted)]
    except ValueError:
        return list(values) == [wanted]


def flags_of(command: Callable[..., Any]) -> dict[str, Kind]:
    """Every flag of `command`, those in the dataclasses among its parameters too."""
    found: dict[str, Kind] = {}
    for name, hint in get_type_hints(command, include_extras=True).items():
        kind, notes = unfold(hint)
        if dataclasses.is_dataclass(kind):
            found |= flags_of(kind)  # type: ignore[arg-type]
        elif name != "return" and Positional not in notes:
            needs = next((note for note in notes if isinstance(note, Needs)), None)
            found[flag_name(name, notes)] = Kind(is_list(kind), kind is bool, needs)
    return found


def unfold(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type and the notes with which it is annotated."""
    return (hint.__origin__, hint.__metadata__) if get_origin(hint) is Annotated else (hint, ())


def is_list(kind: Any) -> bool:
    """Whether a flag of this type takes any number of values."""
    return get_origin(kind) is tuple and get_args(kind)[-1] is ...


def flag_name(parameter: str, notes: Sequence[Any] = ()) -> str:
    """The flag of a parameter."""
    renamed = next((note.name for note in notes if getattr(note, "name", None)), None)
    return "--" + (renamed or parameter).replace("_", "-")


def read(words: Sequence[str], flags: Mapping[str, Kind]) -> Iterator[tuple[str, list[str]]]:
    """Each flag among `words` that is one of `flags`, and the words behind it up to the next."""
    places = [place for place, word in enumerate(words) if key_of(word) in flags]
    end = words.index("--") if "--" in words else len(words)
    for place, following in itertools.pairwise([*(place for place in places if place < end), end]):
        _, equals, value = words[place].partition("=")
        yield key_of(words[place]), [*([value] if equals else []), *words[place + 1 : following]]


def key_of(word: str) -> str:
    """The flag in a word that may hold its value too; underscores may stand for hyphens."""
    return word.partition("=")[0].replace("_", "-")


def check(words: Sequence[str], flags: Mapping[str, Kind]) -> None:
    """Raise `ValueError` for a flag in `words` that is given twice, has no value, or cannot act."""
    found: dict[str, list[str]] = {}
    for flag, values in read(words, flags):
        kind = flags[flag]
        if flag in found and not (kind.is_list or kind.is_switch):
            raise UserError(f"{flag} is given twice, with {found[flag][0]} and with {values[0]}: give it once")
        if kind.is_list and not values:
            raise UserError(f"{flag} has no value: give one, or leave it out")
        found.setdefault(flag, []).extend(values if kind.is_list else values[:1])
    written = {flag: flag for flag in found}
    for field, _, value in (word.partition("=") for word in found.get("--set", [])):
        found.setdefault(flag_name(field), []).append(value)
        written.setdefault(flag_name(field), f"--set {field}")
    for flag in found:
        needs = flags[flag].needs if flag in flags else None
        complaint = needs.complaint(written[flag], found) if needs else None
        if complaint:
            raise UserError(complaint)


METAVARS = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH"}


def described(hint: Any, name: str, default: Any) -> Any:
    """The annotation `hint` of the parameter `name` with what `--help` shows of its flag, or of the flags of its dataclass."""
    kind, notes = unfold(hint)
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        flags = [(f.name, described(hints[f.name], f.name, f.default), f.default) for f in dataclasses.fields(kind)]
        about = {"__doc__": kind.__doc__}
        assert isinstance(kind, type)
        kind = dataclasses.make_dataclass(kind.__name__, flags, bases=(kind,), frozen=True, namespace=about)
    else:
        sets = next((note for note in notes if isinstance(note, Sets)), None)
        if sets:
            notes = (*notes, sets.shown(name, default))
        elif default is not inspect.Parameter.empty:
            notes = (*notes, arg(help_behavior_hint=said_default(default)))
        if type(None) in get_args(kind):
            inner = next(one for one in get_args(kind) if one is not type(None))
            choices = "{" + ",".join(map(str, get_args(inner))) + "}"
            notes = (*notes, arg(metavar=METAVARS.get(inner, choices)))
    for note in notes:
        kind = Annotated[kind, note]
    return kind


def checked(command: Callable[..., Any]) -> Callable[..., Any]:
    """`command` for the parser: it looks at what was given before it begins, and its lists add up where they are repeated."""
    flags, hints = flags_of(command), get_type_hints(command, include_extras=True)
    parameters, defaults = [], {}
    for name, parameter in inspect.signature(command).parameters.items():
        (kind, notes), default = unfold(hints[name]), parameter.default
        hint = described(hints[name], name, default)
        if is_list(kind) and Positional not in notes:
            hint = tuple[kind, ...]  # type: ignore[valid-type]
            for note in (*unfold(described(hints[name], name, default))[1], UseAppendAction):
                hint = Annotated[hint, note]
            defaults[name], default = default, ()
        if dataclasses.is_dataclass(kind):
            default = unfold(hint)[0]()
        parameters.append(parameter.replace(annotation=hint, default=default))

    @functools.wraps(command)
    def run(**values: Any) -> None:
        check(sys.argv[1:], flags)
        lists = {name: tuple(itertools.chain(*values[name])) or default for name, default in defaults.items()}
        command(**{**values, **lists})

    del run.__wrapped__  # the parser would look through it
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def fields_by(flags: Mapping[str, Kind]) -> dict[str, str]:
    """How each field of a run is given where one of `flags` takes fields, by the flag that it might be taken for."""
    takes = next((flag for flag in ("--set", "--vary") if flag in flags), None)
    if takes is None:
        return {}
    from spherelm.models import ARMS
    from spherelm.recipes.overrides import fields_of

    return {flag_name(field): f"{takes} {field}=VALUE" for arm in ARMS for field in sorted(fields_of(arm))}


def refuse_unknown(words: Sequence[str], flags: Mapping[str, Kind], name: str) -> None:
    """Raise `ValueError` for what is written as a flag and is none of the command `name`, with the nearest that is."""
    for word in words[: words.index("--") if "--" in words else None]:
        key = key_of(word)
        written_as_flag = key.startswith("--") and key[2:3].isalpha()
        if not written_as_flag or key in flags or key == "--help" or key.startswith("--tyro-"):
            continue
        meant = fields_by(flags) | {flag: flag for flag in flags}
        near = get_close_matches(key, meant, 1, 0.7)
        advice = f"did you mean {meant[near[0]]}?" if near else f"see spherelm {name} --help"
        raise UserError(f"{name} has no flag {key}: {advice}")
