"""The house rules that a machine can check: who imports whom, how long things are, what must not be written."""

import ast
import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import zoo
from zoo.registry import get

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("models", "kernels", "scripts", "model_cards")
LINKS = {ROOT / "zoo" / name for name in LINKED}  # the same files once more
TOOLS = ("convert", "train", "parallel", "evaluate", "hub")
TEXT = {".py", ".md", ".toml", ".txt", ".in", ".json", ".tsv", ".yaml", ".yml", ".sh", ""}


def files(*folders: str, suffix: str = ".py") -> list[Path]:
    found = (path for folder in folders for path in sorted((ROOT / folder).rglob(f"*{suffix}")))
    return [path for path in found if "__pycache__" not in path.parts and not LINKS & set(path.parents)]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def each(paths: list[Path]):
    return pytest.mark.parametrize("path", [pytest.param(path, id=relative(path)) for path in paths])


KERNELS, MODELS, LIBRARY = files("kernels"), files("models"), files("kernels", "models", "zoo")
CODE = [*LIBRARY, *files("scripts"), ROOT / "setup.py"]
TESTS = files("tests")
ARCHITECTURE_FILES = [path for path in MODELS if path.name != "__init__.py"]
CORE = [path for path in files("zoo") if relative(path).split("/")[1] not in TOOLS]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> Iterator[str]:
    """Every module the file imports, at its top or inside a function; a relative import counts from its package."""
    package = relative(path).removesuffix(".py").split("/")[:-1]
    package = package if package[:1] == ["zoo"] else ["zoo", *package]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1], *filter(None, [node.module])] if node.level else [node.module]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def rank(module: str) -> int:
    """kernels 1, core 2, models 3, what people do with a model 4, scripts 5, the command 6; 0 for everything from outside."""
    parts = module.split(".")
    if parts[0] == "scripts":
        return 5
    if parts[0] != "zoo":
        return 0
    inner = parts[1] if len(parts) > 1 else ""
    return {"kernels": 1, "models": 3, **dict.fromkeys(TOOLS, 4), "scripts": 5, "__main__": 6}.get(inner, 2)


def module_name(path: Path) -> str:
    name = relative(path).removesuffix(".py").replace("/", ".")
    return name if name.startswith(("zoo.", "scripts.")) else f"zoo.{name}"


def constants(path: Path) -> Iterator[ast.Constant]:
    """String constants that are not docstrings."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree(path))
        if isinstance(node, owners) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node


# -- who imports whom ------------------------------------------------------------------------------------------------


@each([path for path in LIBRARY if path != ROOT / "zoo" / "__init__.py"])
def test_imports_run_one_way(path):
    own = rank(module_name(path))
    wrong = sorted({module for module in imports(path) if rank(module) > own and module != "zoo.models"})
    assert not wrong, f"{relative(path)} imports what is built on it: {wrong}"


@each(KERNELS)
def test_kernels_import_torch_and_themselves(path):
    allowed = {"torch", *sys.stdlib_module_names} | ({"triton"} if path.name.startswith("fused") else set())
    wrong = [module for module in imports(path) if module.split(".")[0] not in allowed and not module.startswith("zoo.kernels.")]
    assert not wrong, f"{relative(path)} imports {wrong}; kernels know torch only, and Triton in the files named fused*"


@each(ARCHITECTURE_FILES)
def test_architectures_do_not_import_each_other(path):
    wrong = [module for module in imports(path) if module.startswith("zoo.models")]
    assert not wrong, f"{relative(path)} imports {wrong}; share through zoo/layers.py, name parts by registry string"


@each(CORE)
def test_the_core_names_no_architecture(path):
    entries = [get(name) for name in zoo.list_mixers()]
    names = {entry.name for entry in entries}
    classes = {cls.__name__ for entry in entries for cls in (entry.config, entry.mixer, *entry.models.values())}
    named = {node.value for node in constants(path) if node.value in names}
    named |= {node.id for node in ast.walk(tree(path)) if isinstance(node, ast.Name) and node.id in classes}
    named |= {module for module in imports(path) if module.startswith("zoo.models.") and module.split(".")[2] in names | classes}
    assert not named, f"{relative(path)} names {sorted(named)}; let the architecture's own file say it"


@each([*CODE, *TESTS])
def test_folders_are_imported_through_the_package(path):
    wrong = [module for module in imports(path) if module.split(".")[0] in ("kernels", "models")]
    assert not wrong, f"{relative(path)}: write zoo.{wrong[0]}"


def test_what_is_imported_is_required():
    keywords = {
        keyword.arg: keyword.value for call in ast.walk(tree(ROOT / "setup.py")) if isinstance(call, ast.Call) for keyword in call.keywords
    }
    required = ast.literal_eval(keywords["install_requires"])
    extras = [requirement for extra in ast.literal_eval(keywords["extras_require"]).values() for requirement in extra]
    packages = {re.match(r"[\w-]+", requirement).group().replace("-", "_") for requirement in [*required, *extras]}
    packages |= {"yaml"} & {name.removeprefix("py") for name in packages}  # is named otherwise than what it installs
    foreign = {module.split(".")[0] for path in [*LIBRARY, *files("scripts"), *TESTS] for module in imports(path)}
    own = {"zoo", *(path.stem for path in TESTS)}
    missing = foreign - packages - sys.stdlib_module_names - own
    assert not missing, f"add {sorted(missing)} to setup.py"


def test_files_that_would_shadow_other_packages_are_absent():
    # an importable top-level `kernels` breaks transformers; a conftest.py puts its folder on the path
    for name in ("kernels/__init__.py", "tests/__init__.py", "conftest.py", "__init__.py"):
        assert not (ROOT / name).exists(), f"remove {name}"


def test_links_lead_to_the_folders():
    for name in LINKED:
        assert os.readlink(ROOT / "zoo" / name) == f"../{name}"


# -- what importing does ---------------------------------------------------------------------------------------------


def python(code: str) -> str:
    """The output of a fresh interpreter in the root of the tree, which `-c` puts on the path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"} | {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_transformers_imports_from_the_root():
    assert (
        python("import transformers.integrations.hub_kernels as hub; print(hub.__name__)").strip()
        == "transformers.integrations.hub_kernels"
    )


# Hides modules from whoever looks for them, and prints those files of the zoo that import them all the same.
HIDE = """
import importlib.machinery, sys
from pathlib import Path
ZOO, HIDDEN = [Path.cwd() / name for name in ("zoo", "models", "kernels")], {"triton", "matplotlib"}

class Hiding(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in HIDDEN:
            return super().find_spec(name, path, target)
        frame = sys._getframe(1)
        while "importlib" in frame.f_code.co_filename and "util" not in frame.f_code.co_filename:
            frame = frame.f_back
        if any(Path(frame.f_code.co_filename).is_relative_to(folder) for folder in ZOO):
            print(f"{frame.f_code.co_filename}:{frame.f_lineno} imports {name}")

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Hiding
import torch, zoo
logits = zoo.from_config("gla-tiny")(torch.arange(8)[None]).logits
assert logits.shape == (1, 8, 256) and not HIDDEN & set(sys.modules)
"""


def test_zoo_imports_neither_triton_nor_matplotlib_and_works_without():
    assert python(HIDE) == ""


# -- budgets ---------------------------------------------------------------------------------------------------------


@each(ARCHITECTURE_FILES)
def test_architecture_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 250


@each(KERNELS)
def test_kernel_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450


@each([*CODE, *TESTS])
def test_functions_are_short(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            lines = node.end_lineno - node.lineno + 1 - (first.end_lineno - first.lineno + 1 if documented else 0)
            assert lines <= 60, f"{relative(path)}:{node.lineno} {node.name} has {lines} lines"


@pytest.mark.parametrize("name", zoo.list_models())
def test_configs_have_few_fields_of_their_own(name):
    assert len(own_fields(get(name).config)) <= 12


# -- configs ---------------------------------------------------------------------------------------------------------


def own_fields(config: type) -> set[str]:
    return {f.name for f in dataclasses.fields(config)} - {f.name for f in dataclasses.fields(zoo.ZooConfig)}


@cache
def attributes_read(path: Path) -> frozenset[str]:
    """Names read as attributes, and strings handed to `getattr` or to a method of the config, which reads the field they name."""
    names = {node.attr for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    for call in ast.walk(tree(path)):
        if isinstance(call, ast.Call) and re.fullmatch(r"getattr|(self|config)\.\w+", ast.unparse(call.func)):
            names |= {argument.value for argument in call.args if isinstance(argument, ast.Constant)}
    return frozenset(names)


@pytest.mark.parametrize("name", zoo.list_models())
def test_every_field_of_an_architecture_is_read(name):
    read = attributes_read(ROOT / "models" / f"{name}.py").union(*map(attributes_read, CORE))
    unread = own_fields(get(name).config) - read
    assert not unread, f"nobody reads {sorted(unread)} of {get(name).config.__name__}; remove or use them"


def test_every_shared_field_is_read():
    for_transformers = {"tie_word_embeddings", "bos_token_id", "eos_token_id"}  # it ties, and it ends generation
    fields = set(zoo.ZooConfig.__annotations__) - {"name", "keys_to_ignore_at_inference"}
    read = frozenset().union(*map(attributes_read, [*CORE, *MODELS]))
    assert fields - read <= for_transformers


@each(ARCHITECTURE_FILES)
def test_a_file_is_one_architecture(path):
    calls = [node.value for node in tree(path).body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    entered = [call.args[0].value for call in calls if getattr(call.func, "id", None) == "register"]
    assert entered == [path.stem], f"{relative(path)} registers {entered}, expected ['{path.stem}']"
    assert (ROOT / "model_cards" / f"{path.stem}.md").exists(), f"write model_cards/{path.stem}.md"


def test_every_card_has_its_architecture():
    assert {path.stem for path in files("model_cards", suffix=".md")} <= set(zoo.list_models())


# -- what must not be written ----------------------------------------------------------------------------------------


@each([*CODE, *TESTS])
def test_nothing_is_left_for_later(path):
    marks = re.findall(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b", path.read_text(encoding="utf-8"))
    assert not marks
    for node in ast.walk(tree(path)):
        assert not (isinstance(node, ast.Name) and node.id == "NotImplemented" + "Error"), (
            f"{relative(path)}:{node.lineno}: say what is missing"
        )
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{relative(path)}:{node.lineno}: except names no error"


@each(TESTS)
def test_no_test_can_be_skipped(path):
    evasions = {"skip", "skipif", "xfail", "importorskip", "flaky", "skipTest", "expectedFailure"}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and node.attr in evasions:
            assert ast.unparse(node.value).split(".")[0] not in ("pytest", "unittest", "self", "mark"), f"{relative(path)}:{node.lineno}"
    skipping = [module for module in imports(path) if module.split(".")[0] in ("pytest", "unittest") and module.split(".")[-1] in evasions]
    assert not skipping


@each(LIBRARY)
def test_the_library_does_not_print(path):
    lines = [
        node.lineno
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not lines, f"{relative(path)} prints in lines {lines}; return it, and let a script print"


@each([*ARCHITECTURE_FILES, ROOT / "zoo" / "config.py"])
def test_annotations_are_real_types(path):
    # `strict` checks fields by their types; postponed annotations are strings
    assert "__future__.annotations" not in set(imports(path))


def test_no_file_holds_a_path_of_a_machine():
    pattern = re.compile(r"(?<![\w.:/-])/(?:home|Users|root|work|opt|mnt|scratch)/\w|[A-Z]:\\\\?Users")
    folders = ("kernels", "models", "zoo", "scripts", "tests", "model_cards", ".ci")
    paths = [*(path for folder in folders for path in files(folder, suffix="")), *ROOT.glob("*")]
    for path in paths:
        if path.is_file() and path.suffix in TEXT and path != Path(__file__).resolve():
            found = pattern.search(path.read_text(encoding="utf-8"))
            assert not found, f"{relative(path)} holds {found.group()}"
