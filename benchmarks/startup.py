"""How long `bnify --help` and `--version` take beside importing typer and rich alone.

    python benchmarks/startup.py [--rounds 15]

CPU seconds of child processes, interleaved, medians. Fails above 3×, or if torch is loaded.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys

LIMIT = 3.0
COMMANDS = {
    "import typer, rich": ["-c", "import typer, rich"],
    "bnify --help": ["-m", "bnify", "--help"],
    "bnify --version": ["-m", "bnify", "--version"],
    "bnify insert --help": ["-m", "bnify", "insert", "--help"],
}
NO_TORCH = (
    "import sys; sys.argv = ['bnify', {argument!r}]\n"
    "from bnify.cli import main\n"
    "try:\n    main()\n"
    "except SystemExit:\n    pass\n"
    "sys.exit(sum(name in sys.modules for name in ('torch', 'numpy', 'onnx')))"
)


def cpu_seconds(arguments: list[str]) -> float:
    """User and system time of one child process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    for arguments in COMMANDS.values():  # byte code is compiled and files are cached
        cpu_seconds(arguments)
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, arguments in COMMANDS.items():
            times[name].append(cpu_seconds(arguments))
    base = statistics.median(times["import typer, rich"])
    slow = []
    print(f"{'':24}{'CPU s':>8}{'ratio':>8}")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:24}{median:8.3f}{median / base:8.2f}")
        if median > LIMIT * base:
            slow.append(name)
    for argument in ("--help", "--version"):
        code = NO_TORCH.format(argument=argument)
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            slow.append(f"{argument} loads torch, numpy or onnx")
    print(f"limit {LIMIT}x: " + ("FAIL " + ", ".join(slow) if slow else "PASS"))
    return 1 if slow else 0


if __name__ == "__main__":
    raise SystemExit(main())
