"""Rules of the code that no linter knows, checked on the syntax tree."""

import ast
import dataclasses
import re
from graphlib import TopologicalSorter
from itertools import pairwise
from pathlib import Path
from typing import get_type_hints

import pytest

import tiny_onn
from tiny_onn.config.schema import RunConfig

ROOT = Path(str(tiny_onn.__file__)).parent
FILES = sorted(ROOT.rglob("*.py"))
TREES = {str(path.relative_to(ROOT)): ast.parse(path.read_text("utf-8")) for path in FILES}

# A package imports from earlier rows only; packages of one row do not import each other.
LAYERS = (
    ("errors", "publish"),
    ("console",),
    ("config",),
    ("device", "parallel"),
    ("data", "ops", "report"),
    ("model",),
    ("routing", "teacher"),
    ("conversion",),
    ("planning", "runs"),
    ("evaluation",),
    ("deploy", "distill", "probe"),
    ("studies",),
    ("cli",),
    ("__init__",),
)
LAYER_OF = {module: number for number, layer in enumerate(LAYERS) for module in layer}
MUTABLE = ("list", "dict", "set", "bytearray", "defaultdict", "deque", "Counter", "OrderedDict")

# A docstring that begins with one of these words is a fragment, which needs another sentence.
FRAGMENTS = frozenset(
    "What Of As Its Whether Where How By For In On With Without Until Before After All One "
    "Only".split()
)
# A function's docstring begins with none of these either: they begin the name of a thing.
NOT_VERBS = frozenset(
    "Active Agreement An And Another Any At Attention Because Both Causal Cosine During Each "
    "Either Embedded Empty Every Everything Final First Forward Found From Frozen Generalised "
    "Given Gradient Held-out Here If Into It Largest Last Least Less Mean More Most Neither "
    "Neuron New Newest Next No None Not Nothing Or Our Out Over Peak Per Per-token Plain Quality "
    "Random Routed Same Several Shared Shortest So Some Spherical Such Surprise Tensor That The "
    "Their Then There These They This Those To Token Training Transient True Two Weighted When "
    "While Who Whose Why".split()
)
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef

per_file = pytest.mark.parametrize("name", TREES)


def module_of(name):
    """Return the module of the package, with subpackages as one, that a file belongs to."""
    return Path(name).parts[0].removesuffix(".py")


def imports_of(name):
    """Return the package's own modules that a file imports anywhere in it."""
    known = {module_of(other) for other in TREES}
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: relative import"
            dotted = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for parts in (text.split(".") for text in dotted):
            if parts[0] == "tiny_onn" and len(parts) > 1 and parts[1] in known:
                found.add(parts[1])
    return found - {module_of(name)}


def functions_of(tree):
    """Return every function of a file, nested ones and methods included."""
    return [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]


def is_property(node):
    """Return True if a node is a method that is read as an attribute."""
    names = [ast.unparse(decorator).split(".")[-1] for decorator in node.decorator_list]
    return not {"property", "cached_property"}.isdisjoint(names)


def docstrings(tree):
    """Yield of each docstring its line, its text, and True if it is that of a function."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | FUNCTIONS):
            continue
        if text := ast.get_docstring(node):
            acts = isinstance(node, FUNCTIONS) and not is_property(node)
            yield getattr(node, "lineno", 1), text, acts
        # A string under a field or a constant is its docstring.
        for field, below in pairwise(node.body):
            match field, below:
                case (
                    ast.Assign() | ast.AnnAssign(),
                    ast.Expr(ast.Constant(value=str(text))),
                ) if not isinstance(node, FUNCTIONS):
                    yield below.lineno, text, False


def is_imperative(text):
    """Return True if a docstring can begin with a verb in the imperative."""
    first, second = [*text.rstrip(".").split()[:2], ""][:2]
    # Third persons and plurals end in one s; symbols, code and abbreviations are no verbs.
    third_person = first.endswith("s") and not first.endswith("ss")
    plain = re.fullmatch(r"[A-Z][a-z]+(-[a-z]+)?", first)
    known_noun = second == "of" or first in FRAGMENTS | NOT_VERBS
    return bool(plain) and not third_person and not known_noun


@per_file
def test_imports_point_one_way(name):
    module = module_of(name)
    assert module in LAYER_OF, f"{module}: give it a place in LAYERS"
    not_earlier = {o for o in imports_of(name) if LAYER_OF.get(o, 0) >= LAYER_OF[module]}
    assert not_earlier == set()


def test_every_module_has_one_place_in_the_layers():
    named = [module for layer in LAYERS for module in layer]
    assert sorted(named) == sorted({module_of(name) for name in TREES})


def test_imports_have_no_cycle():
    graph = {}
    for name in TREES:
        graph.setdefault(module_of(name), set()).update(imports_of(name))
    assert list(TopologicalSorter(graph).static_order())


def test_every_setting_is_read_by_the_code():
    read = {
        node.attr
        for name, tree in TREES.items()
        if not name.startswith("config/")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    unread = [
        f"{section}.{field.name}"
        for section, cls in get_type_hints(RunConfig).items()
        for field in dataclasses.fields(cls)
        if field.name not in read
    ]
    assert unread == []


@per_file
def test_public_names_are_documented(name):
    tree = TREES[name]
    assert ast.get_docstring(tree) or not tree.body, f"{name}: no module docstring"
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    bodies = [tree, *(node for node in classes if not node.name.startswith("_"))]
    lines = (ROOT / name).read_text("utf-8").splitlines()
    # A method that a framework calls and documents says so with `noqa: D102`.
    bare = [
        f"{name}:{node.lineno} {node.name}"
        for body in bodies
        for node in body.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
        and "noqa: D102" not in lines[node.lineno - 1]
    ]
    assert bare == []


@per_file
def test_docstrings_of_functions_begin_with_an_imperative(name):
    bad = [
        f"{name}:{line} {text.splitlines()[0]}"
        for line, text, acts in docstrings(TREES[name])
        if acts and not is_imperative(text)
    ]
    assert bad == []


@per_file
def test_docstrings_of_things_are_no_fragments(name):
    bad = [
        f"{name}:{line} {text.splitlines()[0]}"
        for line, text, acts in docstrings(TREES[name])
        if not acts and (text.split()[0] in FRAGMENTS or text.startswith("The same "))
    ]
    assert bad == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Return the rows.", True),
        ("Compress a file.", True),
        ("Time a step.", True),
        ("Close.", True),
        ("Re-read a file.", True),
        ("Time of a step.", False),
        ("Returns the rows.", False),
        ("What a row holds.", False),
        ("The rows.", False),
        ("FLOPs per token.", False),
        ("`x + y`.", False),
        ("Gain, and loss.", False),
    ],
)
def test_an_imperative_is_told_from_a_noun_phrase(text, expected):
    assert is_imperative(text) is expected


@per_file
def test_modules_hold_nothing_that_changes(name):
    bad = []
    for node in TREES[name].body:
        if not isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if [ast.unparse(target) for target in targets] == ["__all__"]:
            continue
        value = node.value
        literal = ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp
        call = isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1] in MUTABLE
        if isinstance(value, literal) or call or isinstance(node, ast.AugAssign):
            bad.append(f"{name}:{node.lineno} {ast.unparse(targets[0])}")
    bad += [
        f"{name}:{node.lineno} global"
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Global)
    ]
    assert bad == []


@per_file
def test_files_and_functions_are_short(name):
    assert len((ROOT / name).read_text("utf-8").splitlines()) <= 400
    long = [
        f"{name}:{node.lineno} {node.name}"
        for node in functions_of(TREES[name])
        if (node.end_lineno or 0) - node.lineno + 1 > 80
    ]
    assert long == []


@per_file
def test_banks_and_routers_are_set_in_their_own_files(name):
    # What changes their calls is given by contexts and methods there. Buffers change in place.
    if name in ("model/experts.py", "model/router.py"):
        return
    targets = [
        target
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    ]
    found = [
        f"{name}:{node.lineno} {ast.unparse(node)}"
        for target in targets
        for node in ast.walk(target)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and re.search(r"\b(banks?|routers?)(\[.*\])?$", ast.unparse(node.value))
    ]
    assert found == []


@per_file
def test_no_error_is_caught_blindly(name):
    broad = [
        f"{name}:{node.lineno}"
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.ExceptHandler)
        and (
            node.type is None
            or {"Exception", "BaseException"}
            & {part.id for part in ast.walk(node.type) if isinstance(part, ast.Name)}
        )
    ]
    assert broad == []


@per_file
def test_no_postponed_annotations(name):
    # They hide the shapes from the runtime checks.
    assert not any(
        isinstance(node, ast.ImportFrom) and node.module == "__future__"
        for node in TREES[name].body
    )


@per_file
def test_text_is_ascii_and_finished(name):
    text = (ROOT / name).read_text("utf-8")
    assert text.isascii()
    assert [word for word in ("TODO", "FIXME", "XXX", "HACK") if word in text] == []
