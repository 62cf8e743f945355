"""The files that `make LOCKED=1` installs, by hash: `python .ci/lock.py` writes .ci/requirements.txt.

pip says which files it would take for constraints.txt, without installing, and their SHA-256 hashes are
written down. They are those of one platform and Python, named in the file: on others the same versions are
other files, which constraints.txt alone serves.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TO = ROOT / ".ci" / "requirements.txt"
BUILDS = "setuptools>=77"  # this package; without it pip would look for it, whatever the hashes say


def here() -> str:
    """This platform and Python, as the file names them."""
    return f"{platform.system()} {platform.machine()}, Python {'.'.join(platform.python_version_tuple()[:2])}"


def lines(report: dict) -> list[str]:
    """A line a package of pip's installation report.

    Raises:
        ValueError: a package without a hash.
    """
    found = {}
    for item in report["install"]:
        metadata, source = item["metadata"], item["download_info"]
        sha = source.get("archive_info", {}).get("hashes", {}).get("sha256")
        if sha is None:
            raise ValueError(f"{metadata['name']}: pip's report has no SHA-256 of its file")
        found[metadata["name"].lower()] = f"{metadata['name']}=={metadata['version']} --hash=sha256:{sha}"
    return [found[name] for name in sorted(found)]


def main() -> int:
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--dry-run",
        "--ignore-installed",
        "--no-deps",
    ]
    command += ["--report", "-", "-r", "constraints.txt", BUILDS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(f".ci/lock.py: error: {(done.stderr.strip().splitlines() or ['pip'])[-1]}", file=sys.stderr)
        return 1
    text = [
        f"# {here()}. Written by `python .ci/lock.py`; installed by `make LOCKED=1`.",
        *lines(json.loads(done.stdout)),
    ]
    TO.write_text("\n".join(text) + "\n", encoding="utf-8")
    print(f"{TO.relative_to(ROOT)}: {len(text) - 1} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
