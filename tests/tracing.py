"""Which options and files a stage reads, recorded while it runs in this process."""

import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.config import judges, methods, schema
from pipeline.config.schema import Params
from tests.tiny import ROOT

NAMES = "[names]"  # stands for the keys of a section whose entries are called as the user likes
_active: list["Trace"] = []


class Section(dict):
    """A section of named entries that tells when its names are gone through; a look-up by name does not count."""

    def __init__(self, entries: Mapping[str, Any], path: str) -> None:
        super().__init__(entries)
        self._path = path

    def _go_through(self) -> None:
        for trace in _active:
            trace.options.add(f"{self._path}.{NAMES}")

    def __iter__(self) -> Iterator[str]:
        self._go_through()
        return super().__iter__()

    def keys(self) -> Any:
        self._go_through()
        return super().keys()

    def values(self) -> Any:
        self._go_through()
        return super().values()

    def items(self) -> Any:
        self._go_through()
        return super().items()


class Trace:
    """What was read: paths of options as in params.yaml, and files relative to the working directory or the project."""

    def __init__(self) -> None:
        self.options: set[str] = set()
        self.files: set[str] = set()


class Traced:
    """An experiment whose options tell when they are read."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self._paths: dict[int, tuple[str, frozenset[str]]] = {}  # of every object, and which fields were replaced in it
        self._kept: list[Any] = []  # so that no object's number is given to another
        self._name(params, "")

    def _name(self, value: Any, path: str) -> None:
        self._remember(value, path, frozenset())
        for field in dataclasses.fields(value):
            inside, below = getattr(value, field.name), f"{path}.{field.name}".lstrip(".")
            if dataclasses.is_dataclass(inside):
                self._name(inside, below)
            elif isinstance(inside, dict) and all(map(dataclasses.is_dataclass, inside.values())):
                for name, entry in inside.items():
                    self._name(entry, f"{below}.{name}")
                object.__setattr__(value, field.name, Section(inside, below))

    def _remember(self, value: Any, path: str, replaced: frozenset[str]) -> None:
        self._paths[id(value)] = path, replaced
        self._kept.append(value)

    @property
    def leaves(self) -> set[str]:
        """Every option that has a value of its own."""
        return {
            f"{path}.{field.name}".lstrip(".")
            for value, (path, _) in zip(self._kept, list(self._paths.values()), strict=True)
            for field in dataclasses.fields(value)
            if not dataclasses.is_dataclass(found := getattr(value, field.name)) and not isinstance(found, Section)
        }

    @contextmanager
    def watching(self, trace: Trace, monkeypatch: Any) -> Iterator[None]:
        """Record what is read inside."""
        with monkeypatch.context() as context:
            for kind in [*vars(schema).values(), *vars(methods).values(), *vars(judges).values()]:
                if dataclasses.is_dataclass(kind):
                    self._patch(kind, trace, context)
            _active.append(trace)
            try:
                yield
            finally:
                _active.remove(trace)

    def _patch(self, kind: Any, trace: Trace, context: Any) -> None:
        names = {field.name for field in dataclasses.fields(kind)}
        initialise, replacing = kind.__init__, dataclasses.replace.__code__

        def reading(value: Any, name: str) -> Any:
            found = object.__getattribute__(value, name)
            if name in names and id(value) in self._paths and sys._getframe(1).f_code is not replacing:
                path, replaced = self._paths[id(value)]
                if name not in replaced and not (dataclasses.is_dataclass(found) or isinstance(found, Section)):
                    trace.options.add(f"{path}.{name}".lstrip("."))
            return found

        def beginning(value: Any, *args: Any, **options: Any) -> None:
            initialise(value, *args, **options)
            caller = sys._getframe(1)
            if caller.f_code is replacing and id(caller.f_locals["obj"]) in self._paths:
                former, changes = caller.f_locals["obj"], caller.f_locals["changes"]  # by then with all fields
                path, before = self._paths[id(former)]
                changed = {name for name in names if changes[name] is not object.__getattribute__(former, name)}
                self._remember(value, path, before | changed)

        context.setattr(kind, "__getattribute__", reading)
        context.setattr(kind, "__init__", beginning)


def _opened(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "open" or not _active or not isinstance(arguments[0], str | bytes | os.PathLike):
        return
    flags = arguments[2]
    if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return
    path = Path(os.path.abspath(os.fsdecode(arguments[0])))  # noqa: PTH100  links are followed by nobody
    for place in (Path.cwd(), ROOT):
        if path.is_relative_to(place):
            for trace in _active:
                trace.files.add(path.relative_to(place).as_posix())
            return


sys.addaudithook(_opened)
