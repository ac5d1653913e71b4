"""The documentation says everything that the code offers, and nothing else."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

README = (ROOT / "README.md").read_text()
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SHIPPED = [ROOT / name for name in ("pyproject.toml", "constraints.txt", "Makefile")]
SHIPPED.append(ROOT / "docs" / "picture.svg")


@pytest.fixture(scope="module")
def generate():
    """docs/generate.py as a module."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def section(name):
    found = re.search(rf"<!-- generated: {name} -->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert found, name
    return found[1]


def test_every_verb_and_option_is_documented(generate):
    reference = (ROOT / "docs" / "cli.md").read_text()
    for name, command in generate.click_commands().items():
        assert f"`bnify {name}`" in section("verbs")
        assert f"## bnify {name}\n" in reference
        assert len((command.help or "").strip()) > 20, name
        part = reference.split(f"## bnify {name}\n")[1].split("\n## ")[0]
        for parameter in command.params:
            for flag in parameter.opts:
                if flag.startswith("--") and not getattr(parameter, "hidden", False):
                    assert f"`{flag}`" in part or flag == "--help", f"{name} {flag}"
                    assert flag == "--help" or (parameter.help or "").strip(), f"{name} {flag}"


def test_every_reason_and_norm_and_exit_code_is_documented(generate):
    from bnify import errors
    from bnify.norms import KINDS
    from bnify.plan import Reason

    page = (ROOT / "docs" / "folding.md").read_text(encoding="utf-8")
    for reason in Reason:
        assert reason.insertion or reason.folding
        line = f"| `{reason}` | {reason.sentence} |"
        assert (line in section("reasons")) == reason.insertion
        assert (line in page) == reason.folding
    for kind in KINDS:
        assert f"| `{kind}` |" in section("norms")
    kinds = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, Exception)]
    assert {kind.exit_code for kind in kinds} <= set(generate.EXIT_CODES)


@pytest.mark.parametrize("name", ["verbs", "norms", "reasons", "rules", "exit-codes"])
def test_tables_are_up_to_date(generate, name):
    assert section(name).strip() == generate.SECTIONS[name]().strip(), "run make docs"


def test_outputs_are_up_to_date():
    command = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_stale_word_is_noticed_and_a_number_is_not(generate):
    text = section("insert-output")
    assert generate.masked(text) == generate.masked(text.replace("0.", "7."))
    assert generate.masked(text) != generate.masked(text.replace("output-head", "gate"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_python_blocks_parse():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        ast.parse(block)


def test_the_readme_runs(run_python, tmp_path):
    """The Python of the README, as a reader would paste it."""
    (tmp_path / "mlp.py").write_text((ROOT / "examples" / "mlp.py").read_text())
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    done = run_python("-c", block, cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert "['fc1', 'fc2'] output-head True" in done.stdout
    assert (tmp_path / "model.onnx").exists()


def test_order_of_the_readme():
    titles = re.findall(r"^## (.*)$", README, re.MULTILINE)
    assert titles == [
        "30 seconds on the command line",
        "30 seconds in Python",
        "Before and after",
        "What it can do",
        "Use it in CI",
        "How it works",
        "Measured",
        "Limits",
        "More",
    ]


def test_nothing_tells_of_the_machine_it_was_written_on():
    """No absolute paths of a build machine in what is shipped."""
    for path in [*PAGES, *SHIPPED]:
        text = path.read_text()
        assert "bnify-tmp" not in text, path.name
        for word in ("/home/", "/root/", "/work/", "/tmp/", "/opt/"):
            assert word not in text, f"{path.name} mentions {word}"
