"""What is released: versions that agree, and archives that depend on the commit alone."""

import re
import runpy
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import sparsespec_compile as ss

ROOT = Path(__file__).parents[1]
RELEASE = runpy.run_path(str(ROOT / ".ci" / "release.py"))


def git(*arguments, cwd=ROOT):
    return subprocess.run(["git", *arguments], cwd=cwd, check=True, capture_output=True, text=True).stdout


def in_a_repository():
    return (ROOT / ".git").exists()


def test_package_changelog_citation_and_tag_name_one_version():
    changelog, citation = (ROOT / "CHANGELOG.md").read_text(), (ROOT / "CITATION.cff").read_text()
    tags = git("tag", "--points-at", "HEAD").split() if in_a_repository() else []
    RELEASE["require_version"](ss.__version__, tags, changelog)
    assert re.search(r"^version: (\S+)$", citation, re.MULTILINE).group(1) == ss.__version__


@pytest.mark.parametrize(
    ("version", "tags", "reason"),
    [
        ("0.2.0", [], "CHANGELOG.md has no entry '## 0.2.0'"),
        ("0.1.0", ["v0.1.1", "nightly"], "tagged v0.1.1, and the package's version is 0.1.0"),
    ],
)
def test_versions_that_differ_are_not_released(version, tags, reason):
    with pytest.raises(SystemExit, match=re.escape(reason)):
        RELEASE["require_version"](version, tags, "# Changelog\n\n## 0.1.0\n")
    RELEASE["require_version"]("0.1.0", ["v0.1.0", "nightly"], "# Changelog\n\n## 0.1.0\n")


def test_extras_that_are_named_anywhere_exist():
    project = (ROOT / "pyproject.toml").read_text()
    section = project.split("[project.optional-dependencies]\n")[1].split("\n\n")[0]
    known = set(re.findall(r"^(\w+) = ", section, re.MULTILINE))
    paths = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / ".ci" / "run", *ROOT.glob("docs/*.md")]
    paths += [*ROOT.glob("examples/*.py"), *ROOT.glob("tests/**/*.py")]
    named = {
        name
        for path in paths
        for names in re.findall(r"'\.\[([\w,]+)\]'", path.read_text())
        for name in names.split(",")
    }
    assert {"ray", "trl", "eval", "serve", "plot", "parallel", "release"} <= named <= known


@pytest.mark.slow
@pytest.mark.skipif(find_spec("pyproject_hooks") is None or find_spec("twine") is None, reason="needs '.[release]'")
@pytest.mark.skipif(not in_a_repository(), reason="archives are made of a commit")
def test_two_builds_of_a_commit_are_the_same_bytes(tmp_path):
    built = [RELEASE["build"](tmp_path / name, ROOT) for name in ("one", "two")]
    for one, two in zip(*built, strict=True):
        assert one.read_bytes() == two.read_bytes(), one.name
    sdist, wheel = built[0]
    assert sdist.name == f"sparsespec_compile-{ss.__version__}.tar.gz"
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in (
        "sparsespec_compile/py.typed",
        "sparsespec_compile/passes/pipeline.py",
        "sparsespec_compile/kernels/ops.py",
    ):
        assert wanted in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "examples"))]
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", str(sdist), str(wheel)], check=True)
