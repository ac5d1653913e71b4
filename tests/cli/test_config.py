"""[tool.bnify]: flag over file, types checked, and no security switch in a file."""

from __future__ import annotations

import json

import pytest

from bnify.cli.config import AuditConfig, Config, read_config
from bnify.errors import UsageError


def _config(tmp_path, text: str) -> Config:
    (tmp_path / "pyproject.toml").write_text(text)
    return read_config(tmp_path)


def test_no_file_and_no_table(tmp_path):
    assert read_config(tmp_path) == Config()
    assert _config(tmp_path, "[project]\nname = 'x'\n") == Config()


def test_values(tmp_path):
    text = "[tool.bnify]\nk = 5\nrtol = 1e-3\natol = 0.0\nopset = 20\ndevice = 'auto'\n"
    assert _config(tmp_path, text) == Config(k=5, rtol=1e-3, atol=0.0, opset=20, device="auto")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("unsafe-pickle = true", "unsafe-pickle cannot be set in a file"),
        ("unsafe_pickle = true", "unsafe_pickle cannot be set in a file"),
        ("trust-global = ['os.system']", "trust-global cannot be set"),
        ("allow-download = true", "allow-download cannot be set"),
        ("pretrained = false", "pretrained cannot be set"),
        ("kay = 3", "no 'kay'"),
        ("k = '3'", "is not a number"),
        ("k = true", "is not a number"),
        ("k = -1", "below 0"),
        ("k = nan", "below 0"),
        ("opset = 1.5", "is not an integer"),
        ("device = 0", "is not a text"),
        ("k = ", "cannot be read"),
    ],
)
def test_what_a_file_may_not_say(tmp_path, line, message):
    with pytest.raises(UsageError, match=message):
        _config(tmp_path, f"[tool.bnify]\n{line}\n")
    with pytest.raises(UsageError, match="no table"):
        _config(tmp_path, "[tool]\nbnify = 3\n")


def test_the_audit_has_a_table_of_its_own(tmp_path):
    text = """
[tool.bnify.audit]
select = ["BN1"]
ignore = []
extend-select = ["BN209"]
fail-on = "warning"
baseline = "norms.json"

[tool.bnify.audit.per-module-ignores]
"backbone.*" = ["BN301", "BN2"]
"""
    assert _config(tmp_path, text).audit == AuditConfig(
        select=("BN1",),
        ignore=(),
        extend_select=("BN209",),
        fail_on="warning",
        baseline="norms.json",
        per_module_ignores={"backbone.*": ("BN301", "BN2")},
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("select = 'BN1'", "not a list of texts"),
        ("ignore = [1]", "not a list of texts"),
        ("fail-on = 'never'", "no severity"),
        ("fail-on = 3", "not a text"),
        ("baseline = ['a']", "not a text"),
        ("per-module-ignores = ['a']", "no table"),
        ("per-module-ignores = {a = 'BN1'}", "not a list of texts"),
        ("selct = []", "no 'selct'"),
        ("unsafe-pickle = true", "cannot be set in a file"),
    ],
)
def test_what_the_table_of_the_audit_may_not_say(tmp_path, line, message):
    with pytest.raises(UsageError, match=message):
        _config(tmp_path, f"[tool.bnify.audit]\n{line}\n")
    with pytest.raises(UsageError, match="no table"):
        _config(tmp_path, "[tool.bnify]\naudit = 3\n")


def test_the_flag_wins_over_the_file(cli, user):
    (user / "pyproject.toml").write_text("[tool.bnify]\ndevice = 'cuda:77'\n")
    words = ("insert", "net.py:Quiet", "--input", "8,4", "--dry-run", "--format", "json")
    from_file = cli(*words)
    assert from_file.code == 3
    assert "cuda:77" in json.loads(from_file.stdout)["error"]["message"]
    assert cli(*words, "--device", "cpu").code == 0


def test_a_bad_file_is_a_usage_error_on_the_command_line(cli, user):
    (user / "pyproject.toml").write_text("[tool.bnify]\nunsafe-pickle = true\n")
    ran = cli("insert", "net.py:Quiet", "--input", "8,4")
    assert ran.code == 2
    assert "unsafe-pickle cannot be set in a file" in ran.stderr
