"""The examples of training run, and print what they promise."""

from __future__ import annotations

from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytestmark = pytest.mark.slow


def test_fine_tuning_prints_what_each_start_costs_and_gains(run_python):
    ran = run_python(EXAMPLES / "finetune_digits.py", "--epochs", "1", "--rates", "0.002")
    assert ran.code == 0, ran.stderr
    rows = {line.split("  ")[1].strip(): line.split() for line in ran.stdout.splitlines()[4:8]}
    assert list(rows) == ["no norms", "reset", "preserve", "stats"]
    found = {
        name: [float(c.rstrip("%")) for c in row if c.endswith("%")] for name, row in rows.items()
    }
    trained = float(ran.stdout.splitlines()[0].split()[-1].rstrip("%"))
    assert abs(found["preserve"][0] - trained) < 0.2
    assert found["preserve"][1] > found["reset"][1] + 10, (
        "in train mode reset loses what was learned"
    )


def test_two_ranks_train_and_save(run_python, tmp_path):
    ran = run_python(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *(EXAMPLES / "torchrun_digits.py", "--epochs", "1", "--norm", "sync"),
        *("--out", tmp_path / "out"),
    )
    assert ran.code == 0, ran.stderr
    assert "batch norm in place of sync" in ran.stdout
    assert "2 ranks: " in ran.stdout
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *("bnify.json", "model.safetensors", "report.json"),
    ]


def test_stale_statistics_are_found_and_mended(run_python):
    ran = run_python(EXAMPLES / "recalibrate_digits.py", "--epochs", "2")
    assert ran.code == 0, ran.stderr
    stale, mended = (
        float(line.split()[1].rstrip("%"))
        for line in ran.stdout.splitlines()
        if line.startswith(("stale:", "calibrated:"))
    )
    assert "% of the initial 0 and 1 is left" in ran.stdout
    assert stale < 50
    assert mended > 85


@pytest.mark.parametrize(
    ("example", "code"), [("watch_lightning.py", "BN203"), ("watch_transformers.py", "BN301")]
)
def test_a_fault_is_found_inside_a_trainer(run_python, example, code):
    ran = run_python(EXAMPLES / example, "--epochs", "1")
    assert ran.code == 0, ran.stderr
    assert f"  {code} " in ran.stdout
    healthy = ("--momentum", "0.1") if "lightning" in example else ("--healthy",)
    ran = run_python(EXAMPLES / example, "--epochs", "1", *healthy)
    assert ran.code == 0, ran.stderr
    assert " 0 findings" in ran.stdout
