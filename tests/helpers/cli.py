"""Run scripts as processes, and judge what they said."""

import os
import subprocess
import sys
from dataclasses import dataclass

from helpers.paths import ROOT


@dataclass
class Result:
    """Hold the exit code of a script and what it wrote to stdout and stderr."""

    code: int
    out: str
    err: str

    def refused(self, *words: str, code: int = 1) -> str:
        """Assert that the script ended with one clear line on stderr, holding these words."""
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert self.code == code and len(errors) == 1 and "Traceback" not in self.err, (self.code, self.err)
        assert all(word in errors[0] for word in words), errors[0]
        return errors[0]


def run_process(script: str, **flags) -> Result:
    """Run a script in a process of its own, as a user does, for five minutes at most."""
    process = spawn(script, **flags)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return Result(process.returncode, out, err)


def spawn(script: str, start_new_session: bool = False, **flags) -> subprocess.Popen:
    """Start a script in a process of its own, or in a session, which can be killed with all that it starts."""
    argv = [sys.executable, str(ROOT / script), *(f"--{k}={v}" for k, v in flags.items())]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(argv, **pipes, text=True, env=env, start_new_session=start_new_session)
