"""Photographs the registry and the newest flow run of the servers that `make serve` started, with headless Chromium.

``. .prefect/services.env && python docs/screenshots.py --to docs/images``. Chromium: ``apt-get install chromium``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

SETTLE_MILLISECONDS = 30_000
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def newest_flow_run(api: str, flow: str) -> str:
    """The id of the flow's newest run that is over.

    Raises:
        SystemExit: there is none.
    """
    states = {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED"]}}}
    body = {"flows": {"name": {"any_": [flow]}}, "flow_runs": states, "sort": "START_TIME_DESC", "limit": 1}
    request = urllib.request.Request(
        f"{api}/flow_runs/filter", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        found = json.loads(answer.read())
    if not found:
        sys.exit(f"Error: no run of the flow {flow} is over yet")
    return str(found[0]["id"])


def photograph(browser: str, url: str, file: Path, size: str) -> None:
    """One page as a PNG.

    Raises:
        SystemExit: the browser left no picture.
    """
    with tempfile.TemporaryDirectory(prefix="lolcats-chromium-") as profile:
        command = [browser, "--headless=new", "--hide-scrollbars", f"--user-data-dir={profile}"]
        command += [f"--window-size={size}", f"--virtual-time-budget={SETTLE_MILLISECONDS}", f"--screenshot={file}"]
        command += ["--disable-gpu", "--disable-background-networking", "--no-first-run"]
        if os.geteuid() == 0:
            command.append("--no-sandbox")
        done = subprocess.run([*command, url], capture_output=True, text=True, timeout=180, check=False)
    if not file.is_file():
        sys.exit(f"Error: {browser} left no picture of {url}: {done.stderr.strip()[-300:]}")
    print(file)


def main() -> None:
    """Both pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=Path("docs/images"))
    parser.add_argument("--model", default="lolcats-demo")
    parser.add_argument("--flow", default="relinearize")
    options = parser.parse_args()
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"Error: none of {', '.join(BROWSERS)} is installed")
    api, mlflow = os.environ.get("PREFECT_API_URL"), os.environ.get("MLFLOW_TRACKING_URI")
    if not api or not mlflow:
        sys.exit("Error: PREFECT_API_URL and MLFLOW_TRACKING_URI are not set; run `. .prefect/services.env` first")
    ui, run = api.removesuffix("/api"), newest_flow_run(api, options.flow)
    options.to.mkdir(parents=True, exist_ok=True)
    photograph(browser, f"{mlflow}/#/models/{options.model}", options.to / "operations_registry.png", "1400,800")
    photograph(browser, f"{ui}/runs/flow-run/{run}", options.to / "operations_flow_run.png", "1400,1000")


if __name__ == "__main__":
    main()
