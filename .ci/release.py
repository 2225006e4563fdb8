"""Builds the sdist and the wheel of a commit, byte by byte the same from the same commit, and checks them.

    pip install '.[release]'
    git tag v0.1.0 && python .ci/release.py dist

The version is `sparsespec_compile.__version__`. A tag of the commit that begins with v must agree with it, and the
changelog must have an entry for it. What is not committed is left out.
"""

import gzip
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def git(*arguments: str, root: Path = ROOT) -> bytes:
    """What a git command prints."""
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True).stdout


def require_version(version: str, tags: Sequence[str], changelog: str) -> None:
    """Ends with the reason if a tag names another version, or the newest entry of the changelog does."""
    others = [tag for tag in tags if tag.startswith("v") and tag != f"v{version}"]
    if others:
        sys.exit(f"The commit is tagged {', '.join(others)}, and the package's version is {version}: make them agree.")
    newest = re.search(r"^## (\S+)", changelog, re.MULTILINE)
    if newest is None or newest.group(1) != version:
        sys.exit(f"CHANGELOG.md has no entry '## {version}' at its top: write what changed.")


def repacked(sdist: bytes, epoch: int) -> bytes:
    """The archive with files in order of their names, and times, owners and modes that do not depend on the build."""
    packed = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(sdist)) as source,
        gzip.GzipFile(filename="", fileobj=packed, mode="wb", mtime=epoch) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.USTAR_FORMAT) as target,
    ):
        for member in sorted(source.getmembers(), key=lambda one: one.name):
            member.mtime, member.uid, member.gid, member.uname, member.gname = epoch, 0, 0, "", ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            member.pax_headers = {}
            target.addfile(member, source.extractfile(member) if member.isfile() else None)
    return packed.getvalue()


def build(out: Path, root: Path = ROOT) -> list[Path]:
    """Build both into `out`: the wheel from the sdist, as pip would."""
    epoch = int(git("log", "-1", "--format=%ct", root=root))
    environment = {"SOURCE_DATE_EPOCH": str(epoch), "PYTHONHASHSEED": "0"}
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(git("archive", "HEAD", root=root))) as committed:
            committed.extractall(f"{folder}/source", filter="data")
        _run("build", "--sdist", "--outdir", f"{folder}/sdist", f"{folder}/source", environment=environment)
        (sdist,) = Path(folder, "sdist").iterdir()
        packed = out / sdist.name
        packed.write_bytes(repacked(sdist.read_bytes(), epoch))
        with tarfile.open(packed) as unpacked:
            unpacked.extractall(f"{folder}/unpacked", filter="data")
        (source,) = Path(folder, "unpacked").iterdir()
        _run("build", "--wheel", "--outdir", f"{folder}/wheel", str(source), environment=environment)
        (wheel,) = Path(folder, "wheel").iterdir()
        (out / wheel.name).write_bytes(wheel.read_bytes())
    return [packed, out / wheel.name]


def _run(module: str, *arguments: str, environment: dict[str, str] | None = None) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], check=True, env=os.environ | (environment or {}))


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    version = re.search(
        r'^__version__ = "(.+)"', (ROOT / "sparsespec_compile" / "__init__.py").read_text(), re.MULTILINE
    )
    tags = git("tag", "--points-at", "HEAD").decode().split()
    require_version(version.group(1) if version else "", tags, (ROOT / "CHANGELOG.md").read_text())
    built = build(Path(sys.argv[1]))
    _run("twine", "check", "--strict", *map(str, built))


if __name__ == "__main__":
    main()
