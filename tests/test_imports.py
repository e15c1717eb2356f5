"""Imports run one way: tools, methods → ladd → sample → data, discriminator → mmdit → lib."""

import ast
import functools
import graphlib
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("lib", "sd3", "methods", "tools")

# What a file, or every file of a folder, may import of ours when it is itself imported.
MAY = {"lib": {"lib"}, "mmdit": {"lib"}}
MAY["discriminator"] = MAY["data"] = {"mmdit", "lib"}
MAY["sd3"] = {"sd3", "data", "mmdit", "lib"}
MAY["sample"] = {"data", "discriminator", "mmdit", "lib"}
MAY["ladd"] = MAY["sample"] | {"sample"}
MAY["methods"] = MAY["ladd"] | {"ladd", "methods"}
MAY["tools"] = MAY["ladd"] | {"ladd", "tools"}

# What it may import besides, in the moment that it is needed. A star stands for a computed name.
LATER = {
    "data": {"sd3.shards"},
    "sample": {"tools.draw"},
    "ladd": {"tools.train"},
    "tools.draw": {"sd3.encoders", "sd3.weights"},
    "tools.report": {"sd3.weights"},
    "tools.train": {"sd3.weights", "tools.*"},
    "tools.sweep": {"methods.*"},
}


class Import(NamedTuple):
    module: str  # that imports
    target: str  # a module of ours
    later: bool  # inside a function, or by importlib
    names: tuple  # what is taken from it
    line: int


def read_sources():
    """{name of the module: its text} of all our code but the tests."""
    paths = [*ROOT.glob("*.py"), *(path for name in FOLDERS for path in ROOT.glob(f"{name}/*.py"))]
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text("utf-8")
        for path in sorted(paths)
    }


def computed_names(argument):
    """The modules that an argument of importlib.import_module can stand for: f"a.{b}" is a.*"""
    if isinstance(argument, ast.Constant):
        return [argument.value]
    if isinstance(argument, ast.IfExp):
        return computed_names(argument.body) + computed_names(argument.orelse)
    if isinstance(argument, ast.JoinedStr):
        parts = (p.value if isinstance(p, ast.Constant) else "*" for p in argument.values)
        return ["".join(parts)]
    return ["*"]


@functools.cache
def imports_of(module, text, modules):
    """The imports of a module, of ours alone. modules: the names of all of ours."""
    found = []

    def note(node, target, names, later):
        if target in modules or target.rpartition(".")[2] == "*":
            found.append(Import(module, target, later, tuple(names), node.lineno))

    def walk(node, later):
        if isinstance(node, ast.Import):
            for alias in node.names:
                note(node, alias.name, (), later)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: a relative import"
            names = [alias.name for alias in node.names]
            whole = [name for name in names if f"{node.module}.{name}" in modules]
            for name in whole:  # from lib import files
                note(node, f"{node.module}.{name}", (), later)
            if whole != names:
                note(node, node.module, names, later)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            for target in computed_names(node.args[0]):
                note(node, target, (), True)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            walk(child, later or inside)

    walk(ast.parse(text), later=False)
    return [each for each in found if each.target != module]


def graph_of(sources):
    modules = frozenset(sources)
    return [each for name, text in sources.items() for each in imports_of(name, text, modules)]


def faults_of(imports):
    """The imports that run against the order."""
    faults = []
    for each in imports:
        own, other = each.module.split(".")[0], each.target.split(".")[0]
        late = each.later and each.target in LATER.get(each.module, ())
        if other not in MAY[own] and not late:
            faults.append(each)
    return faults


def test_all_imports_run_one_way():
    assert faults_of(graph_of(read_sources())) == []


def test_no_module_waits_for_itself():
    """What is imported together with a module has no circle."""
    imports = [each for each in graph_of(read_sources()) if not each.later]
    before = {}
    for each in imports:
        before.setdefault(each.module, set()).add(each.target)
    graphlib.TopologicalSorter(before).prepare()


def test_every_later_import_that_is_allowed_is_there():
    there = {(each.module, each.target) for each in graph_of(read_sources()) if each.later}
    allowed = {(module, target) for module, targets in LATER.items() for target in targets}
    assert allowed <= there


def test_the_library_takes_nothing_that_is_named_after_a_player_of_ladd():
    for each in graph_of(read_sources()):
        if each.module.startswith("lib."):
            words = " ".join((each.target, *each.names)).lower()
            assert not any(word in words for word in ("teacher", "student")), each


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("lib.files", "import ladd"),
        ("lib.files", "from data import Text"),
        ("lib.files", "def f():\n    import mmdit"),
        ("mmdit", "import data"),
        ("mmdit", "from sd3 import weights"),
        ("discriminator", "if True:\n    from sample import Generator"),
        ("data", "import sd3.shards"),
        ("data", "def f():\n    from sd3.weights import open_sd3"),
        ("data", "def f():\n    return importlib.import_module(f'methods.{name}')"),
        ("data", "def f():\n    return import_module(name)"),
        ("sample", "class A:\n    def f(self):\n        import ladd"),
        ("sample", "from sd3.encoders import codec_of"),
        ("sd3.shards", "async def f():\n    import ladd"),
        ("ladd", "import tools.plan"),
        ("ladd", "f = lambda: importlib.import_module('methods.dmd')"),
        ("methods.dmd", "from tools.plan import plan"),
        ("tools.plan", "from methods.dmd import UNITS"),
    ],
)
def test_an_import_against_the_order_is_found(module, line):
    sources = read_sources()
    sources[module] += f"\n\n{line}\n"
    (fault,) = faults_of(graph_of(sources))
    assert fault.module == module and fault.line > 10


def test_a_circle_is_found(monkeypatch):
    sources = read_sources() | {"lib.errors": "import lib.files"}
    monkeypatch.setitem(globals(), "read_sources", lambda: sources)
    with pytest.raises(graphlib.CycleError):
        test_no_module_waits_for_itself()
