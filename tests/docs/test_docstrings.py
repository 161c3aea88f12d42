"""Public names are documented, with the arguments that they have."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import sharedkd

MODULES = [
    importlib.import_module(found.name)
    for found in pkgutil.walk_packages(sharedkd.__path__, "sharedkd.")
]


def public(module):
    """Name -> function or class that the module itself lists and defines."""
    found = {name: getattr(module, name) for name in getattr(module, "__all__", ())}
    return {
        name: thing
        for name, thing in found.items()
        if callable(thing) and getattr(thing, "__module__", None) == module.__name__
    }


def documented(docstring):
    """The arguments that a docstring's Args section names."""
    section = re.search(r"^Args:\n((?:    .*\n?|\n)*)", inspect.cleandoc(docstring or ""), re.M)
    entries = (
        re.findall(r"^    (\*{0,2}\w[\w, *]*)(?: \(.*?\))?:", section[1], re.M) if section else []
    )
    return {name.strip(" *") for entry in entries for name in entry.split(",")}


def mentioned(docstring):
    """What a docstring quotes."""
    return set(re.findall(r"``(\w+)", docstring or ""))


def accepted(thing):
    return set(inspect.signature(thing).parameters) - {"self", "cls"}


def functions(module):
    """Qualified name -> (function, docstrings that may document it), public methods included.

    A method without a docstring has that of the class which it inherits from.
    """
    for name, thing in public(module).items():
        if not inspect.isclass(thing):
            yield name, thing, [thing.__doc__]
            continue
        yield name, thing, [thing.__doc__, thing.__init__.__doc__]
        for method, function in vars(thing).items():
            if inspect.isfunction(function) and not method.startswith("_"):
                yield f"{name}.{method}", function, [inspect.getdoc(getattr(thing, method))]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_public_names_have_a_docstring(module):
    assert module.__doc__ or not vars(module).get("__all__")
    for name in getattr(module, "__all__", ()):
        assert hasattr(module, name), f"__all__ names {name}"
    assert [name for name, thing in public(module).items() if not thing.__doc__] == []


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_documented_arguments_exist(module):
    for name, thing, docstrings in functions(module):
        try:
            real = accepted(thing)
        except ValueError:  # a class that is built by something else
            continue
        unknown = set().union(*map(documented, docstrings)) - real
        assert not unknown, f"{name} documents {sorted(unknown)}, and takes {sorted(real)}"


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_every_argument_is_documented(module):
    """In an Args section, or by ``name`` in a sentence where one says it all."""
    silent = {}
    for name, thing, docstrings in functions(module):
        try:
            real = accepted(thing)
        except ValueError:
            continue
        named = set().union(*map(documented, docstrings), *map(mentioned, docstrings))
        if real - named:
            silent[name] = sorted(real - named)
    assert not silent


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_examples_of_docstrings(module):
    found = doctest.testmod(module)
    assert not found.failed
    assert found.attempted or ">>>" not in Path(module.__file__).read_text()


def test_the_reader_of_docstrings_reads():
    docstring = """Does.

    Args:
        a, b: two.
        c (int): three,
            and: more.
        **d: rest.

    Returns:
        e: no argument.
    """
    assert documented(docstring) == {"a", "b", "c", "d"}
    assert documented("Nothing.") == set()
    assert mentioned("``one`` and ``two[0]``, not `three`") == {"one", "two"}
