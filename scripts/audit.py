"""Known vulnerabilities in what is installed (pip-audit); a stated skip where the service can't be reached."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def main() -> int:
    command = [str(Path(sys.executable).with_name("pip-audit")), "--local", "--skip-editable", "--format", "json",
               "--progress-spinner", "off", "--timeout", "10"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    try:
        found = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        print(f"pip-audit: skipped, the vulnerability service can't be reached: {reason[:200]}")
        return 0
    audited = [one for one in found if "skip_reason" not in one]
    bad = [one for one in audited if one["vulns"]]
    for one in bad:
        fixes = sorted({fix for vulnerability in one["vulns"] for fix in vulnerability["fix_versions"]})
        ids = ", ".join(vulnerability["id"] for vulnerability in one["vulns"])
        print(
            f"pip-audit: {one['name']} {one['version']}: {ids}; fixed in {', '.join(fixes) or 'no release'}"
        )
    if not audited:
        print(
            f"pip-audit: skipped, the index here has no vulnerability data for any of {len(found)} packages"
        )
    elif not bad:
        print(f"pip-audit: nothing known against {len(audited)} of {len(found)} packages")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
