"""Who may import whom, and what product code may not contain. Read from the source with `ast`; nothing is run."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "sparsespec_compile"
FOLDERS = {"passes": f"{PACKAGE}.passes", "kernels": f"{PACKAGE}.kernels", PACKAGE: PACKAGE}
PRODUCT = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def module_of(path):
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    parts = [FOLDERS[folder], *(part for part in rest if part != "__init__")]
    return ".".join(parts)


def imports_of(path):
    """Absolute names of all that a file imports, at its top and within functions; `from a import b` gives a.b."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found.update(f"{source}.{name.name}" for name in node.names)
    return found


def within(name, *modules):
    return any(name == module or name.startswith(module + ".") for module in modules)


def where(folder, wrong):
    """Names that files of a folder import and `wrong` says they must not, each with its file."""
    files = sorted((ROOT / folder).rglob("*.py"))
    assert len(files) > 5
    return [(str(path.relative_to(ROOT)), name) for path in files for name in imports_of(path) if wrong(name)]


def test_kernels_import_nothing_of_ours():
    def wrong(name):
        ours = within(name, PACKAGE) and not within(name, f"{PACKAGE}.kernels")
        return ours or within(name, "transformers", "torch.fx")

    assert not where("kernels", wrong)


def test_passes_import_only_the_ops():
    allowed = f"{PACKAGE}.passes", f"{PACKAGE}.kernels.ops"
    assert not where("passes", lambda name: within(name, PACKAGE) and not within(name, *allowed))


def test_the_runtime_knows_neither_fx_nor_transformers():
    def wrong(name):
        plain = within(name, f"{PACKAGE}.passes.layout", f"{PACKAGE}.passes.ranks")
        of_passes = within(name, f"{PACKAGE}.passes") and not plain
        return of_passes or within(name, "torch.fx", "torch.export", "transformers")

    assert not where(f"{PACKAGE}/runtime", wrong)


def test_what_the_runtime_reads_of_passes_is_plain_data():
    for name in ("layout", "ranks"):
        names = imports_of(ROOT / "passes" / f"{name}.py")
        assert not any(within(one, "torch", "transformers", PACKAGE) for one in names)


def test_triton_and_reference_never_import_each_other():
    """What may be imported without Triton is torch's implementations and what stands beside the kernels' folders."""
    kernels = {path: imports_of(path) for path in sorted((ROOT / "kernels").rglob("*.py"))}
    triton = {path for path, names in kernels.items() if any(within(name, "triton") for name in names)}
    in_torch = {path for path in kernels if path.parent.name in ("reference", "cpu")}
    assert triton
    assert len(in_torch) > 3
    for path in triton:
        assert not any(within(name, f"{PACKAGE}.kernels.reference", f"{PACKAGE}.kernels.cpu") for name in kernels[path])
    for path in in_torch | {path for path in kernels if path.parent.name == "kernels"}:
        assert path not in triton
        assert not any(within(name, *map(module_of, triton)) for name in kernels[path]), path


def test_product_code_has_no_asserts_and_no_bare_folders():
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.Assert), f"{path}:{node.lineno}"
            assert not isinstance(node, ast.ExceptHandler) or node.type is not None, f"{path}:{node.lineno}"
        assert not any(within(name, "passes", "kernels") for name in imports_of(path)), path


def test_tests_and_scripts_import_the_installed_names():
    for folder in ("tests", "examples", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            names = {
                name.name if isinstance(node, ast.Import) else node.module
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0)
                for name in node.names
            }
            assert not any(within(name, "passes", "kernels") for name in names if name), path


def test_importing_the_package_registers_every_op_once():
    """Run with the root of the repository on the path, where `kernels` and `passes` can be found.

    transformers imports a library called `kernels` when there is one; what it finds here must be empty.
    """
    script = f"import sys; sys.path.append({str(ROOT)!r}); import {PACKAGE}; "
    script += "print([n for n in sys.modules if n.split('.')[0] in ('kernels', 'passes')])"
    run = subprocess.run([sys.executable, "-c", script], cwd="/", capture_output=True, text=True, check=True)
    assert run.stdout.strip() in ("[]", "['kernels']")


def test_a_bare_import_of_a_folder_loads_nothing_of_it():
    script = f"import sys; sys.path.append({str(ROOT)!r}); import kernels, passes, {PACKAGE}; "
    script += "print([n for n in sys.modules if n.startswith(('kernels.', 'passes.'))])"
    run = subprocess.run([sys.executable, "-c", script], cwd="/", capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_python_started_in_the_repository_finds_all_parts():
    """There the folder of the package comes before what is installed, and kernels and passes stand beside it."""
    code = "import sparsespec_compile.kernels.tuning.tune, sparsespec_compile.passes.pipeline as p; print(p.__file__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "passes" / "pipeline.py"


def test_every_folder_of_code_is_installed():
    """Packages are listed by name in pyproject.toml: a folder that is missing there would be missing from the wheel."""
    listed = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert listed is not None
    found = {module_of(path) for path in PRODUCT if path.name == "__init__.py"}
    assert set(re.findall(r'"(.+?)"', listed[1])) == found
